// bench/partita_bench.cpp: speed of lowering and simulation. Prints events, events per second, peak
// memory, and what peers took for the same on another 2-core machine.
#include <benchmark/benchmark.h>
#include <sys/resource.h>

#include <numeric>

#include "models/models.h"
#include "simulator/engine/flows.h"
#include "simulator/search/predict.h"
#include "tests/simulator/traffic.h"

namespace partita {
namespace {

Plan gpt3_plan(std::int64_t dp) {
  Plan p;
  set_framework(p, "megatron-core", "");
  p.tp = 8;
  p.pp = 8;
  p.dp = dp;
  p.global_batch = 64 * dp;
  p.recompute = {Recompute::full};
  return p;
}

double peak_mebibytes() {
  rusage use{};
  getrusage(RUSAGE_SELF, &use);
  return static_cast<double>(use.ru_maxrss) / 1024;
}

void lowering(benchmark::State& state) {
  const Graph graph = with_padded_vocabulary(load_model("gpt3-175b", {}), 1024);
  const auto plan = complete(graph, gpt3_plan(state.range(0)));
  for (auto _ : state) benchmark::DoNotOptimize(lower(graph, *plan));
}
BENCHMARK(lowering)->Arg(1)->Arg(256)->Unit(benchmark::kMillisecond);

/// GPT-3 175B, 96 layers, tp 8, pp 8, 64 micro-batches, 1F1B, full recomputation, on 64 · dp
/// devices.
void simulation(benchmark::State& state) {
  const Graph graph = with_padded_vocabulary(load_model("gpt3-175b", {}), 1024);
  const auto plan = complete(graph, gpt3_plan(state.range(0)));
  const auto program = lower(graph, *plan);
  const Topology topology = load_topology("dgx-h100:" + std::to_string(8 * state.range(0)));
  std::int64_t events = 0;
  for (auto _ : state) {
    Communication communication(topology);
    const Timeline t = simulate(*program, communication);
    events = t.instructions;
    benchmark::DoNotOptimize(t.step);
  }
  state.counters["events"] = static_cast<double>(events);
  state.counters["events/s"] = benchmark::Counter(static_cast<double>(events),
                                                  benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak_MiB"] = peak_mebibytes();
}
BENCHMARK(simulation)->Arg(1)->Arg(8)->Arg(256)->Unit(benchmark::kMillisecond);

void lower_and_simulate(benchmark::State& state) {
  const Graph graph = with_padded_vocabulary(load_model("gpt3-175b", {}), 1024);
  const Topology topology = load_topology("dgx-h100:" + std::to_string(8 * state.range(0)));
  Plan plan = gpt3_plan(state.range(0));
  for (auto _ : state) {
    Communication communication(topology);
    benchmark::DoNotOptimize(predict(graph, plan, communication));
  }
}
BENCHMARK(lower_and_simulate)->Arg(1)->Arg(256)->Unit(benchmark::kMillisecond);

/// Lowering and simulation of a step whose transfers and kernels share everything they share;
/// classes of ranks and links included. Peers: ASTRA-sim 17 s after 46 s of trace making for 16
/// blocks on 512 devices, vTrain's engine 3.4 to 3.8 s for GPT-3 175B on 512 (each on another
/// 2-core machine).
void contended_step(benchmark::State& state, const Graph& graph, Plan plan,
                    const std::string& cluster, SpineRouting routing = {},
                    Network network = Network::flows) {
  set_framework(plan, "megatron-core", "");
  Topology topology = load_topology(cluster);
  if (routing.ecmp) topology = topology.with_routing(routing, "");
  Prediction p;
  for (auto _ : state) {
    Communication communication(topology);
    p = *predict(graph, plan, communication, nullptr, nullptr, false, nullptr, network);
  }
  state.counters["devices"] = static_cast<double>(p.devices);
  state.counters["classes"] = static_cast<double>(p.classes);
  state.counters["instructions"] = static_cast<double>(p.instructions);
  state.counters["step_s"] = p.step_time.count;
  state.counters["peak_MiB"] = peak_mebibytes();
}
Plan sized(std::int64_t tp, std::int64_t pp, std::int64_t dp, std::int64_t batch) {
  Plan p;
  p.tp = tp, p.pp = pp, p.dp = dp, p.global_batch = batch, p.sequence_parallel = true, p.zero = 1;
  return p;
}
void sixteen_blocks(benchmark::State& state) {
  TransformerConfig c;
  c.name = "16 blocks";
  c.layers = 16, c.hidden = 4096, c.heads = c.kv_heads = 32, c.ffn = 16384, c.vocabulary = 32000,
  c.sequence = 2048;
  c.positions = 2048;
  contended_step(state, build_transformer(c), sized(8, 8, 8, 128), "dgx-h100:64");
  state.SetLabel("ASTRA-sim 17 s after 46 s of trace making");
}
BENCHMARK(sixteen_blocks)->Unit(benchmark::kMillisecond);
void gpt3_175b(benchmark::State& state) {
  contended_step(state, load_model("gpt3-175b", {}), sized(8, 8, 8, 512), "dgx-h100:64");
  state.SetLabel("vTrain's engine 3.4 to 3.8 s");
}
BENCHMARK(gpt3_175b)->Unit(benchmark::kMillisecond);
/// Each transfer at its own price, as vTrain's engine has them, kernels beside them slower.
void gpt3_175b_beside(benchmark::State& state) {
  contended_step(state, load_model("gpt3-175b", {}), sized(8, 8, 8, 512), "dgx-h100:64", {},
                 Network::beside);
  state.SetLabel("vTrain's engine 3.4 to 3.8 s");
}
BENCHMARK(gpt3_175b_beside)->Unit(benchmark::kMillisecond);
/// The simulation alone, lowering left out: what vTrain's engine does.
void gpt3_175b_simulated(benchmark::State& state) {
  const Graph graph = load_model("gpt3-175b", {});
  Plan wanted = sized(8, 8, 8, 512);
  set_framework(wanted, "megatron-core", "");
  const auto plan = complete(graph, wanted);
  const auto program = lower_padded(graph, *plan);
  const Topology topology = load_topology("dgx-h100:64");
  SimulateOptions options;
  options.network = state.range(0) != 0 ? Network::flows : Network::beside;
  for (auto _ : state) {
    Communication communication(topology);
    benchmark::DoNotOptimize(simulate(*program, communication, options));
  }
  state.SetLabel("vTrain's engine 3.4 to 3.8 s");
}
BENCHMARK(gpt3_175b_simulated)->ArgName("contended")->Arg(0)->Arg(1)->Unit(benchmark::kMillisecond);
/// Leaves of 20 nodes, GPUs that share PCIe switches.
void gpt3_175b_a100(benchmark::State& state) {
  contended_step(state, load_model("gpt3-175b", {}), sized(8, 8, 8, 512), "dgx-a100-80gb:64");
}
BENCHMARK(gpt3_175b_a100)->Unit(benchmark::kMillisecond);
/// Spines by hash: rank by rank.
void gpt3_175b_ecmp(benchmark::State& state) {
  contended_step(state, load_model("gpt3-175b", {}), sized(8, 8, 8, 64), "dgx-h100:64", {true, 1});
}
BENCHMARK(gpt3_175b_ecmp)->Unit(benchmark::kMillisecond);
/// From one node to 16,384: Llama-3-8B, tp 8.
void llama_8b(benchmark::State& state) {
  const std::int64_t dp = state.range(0) / 8;
  contended_step(state, load_model("llama-3-8b", {}), sized(8, 1, dp, 4 * dp),
                 "dgx-h100:" + std::to_string(dp));
}
BENCHMARK(llama_8b)->RangeMultiplier(8)->Range(8, 32768)->Arg(131072)->Unit(
    benchmark::kMillisecond);
void llama_405b(benchmark::State& state) {
  const std::int64_t dp = state.range(0) / 128;
  contended_step(state, load_model("llama-3.1-405b", {}), sized(8, 16, dp, 16 * dp),
                 "dgx-h100:" + std::to_string(state.range(0) / 8));
}
BENCHMARK(llama_405b)->Arg(1024)->Arg(16384)->Arg(131072)->Unit(benchmark::kMillisecond);

/// Ring all-reduce of 1 GiB, routes and classes included. ASTRA-sim on another 2-core machine:
/// 1,024 devices 8.6 s (congestion-unaware), 12.0 s (aware); wall time grows as n^2.1 to n^2.3.
void ring(benchmark::State& state, bool folded) {
  const auto n = static_cast<std::int32_t>(state.range(0));
  Played p;
  for (auto _ : state) {
    const Rhythm r = rhythm(CollectiveKind::all_reduce, Algorithm::ring, n);
    const EvenCut cut(CollectiveKind::all_reduce, r, Bytes{1 << 30});
    p = play(on_ring(r, cut, 50e9, Ticks{500'000}), {folded});
  }
  state.counters["classes"] = static_cast<double>(p.classes);
  state.counters["messages"] = static_cast<double>(p.messages);
  state.counters["messages/s"] = benchmark::Counter(static_cast<double>(p.messages),
                                                    benchmark::Counter::kIsIterationInvariantRate);
  state.counters["end_ms"] = static_cast<double>(p.end.count) * 1e-9;
  state.counters["peak_MiB"] = peak_mebibytes();
  if (n == 1024) state.SetLabel("ASTRA-sim 8.6 to 12.0 s, 365 MB");
}
BENCHMARK_CAPTURE(ring, folded, true)
    ->RangeMultiplier(8)
    ->Range(8, 32768)
    ->Arg(131072)
    ->Arg(1024)
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(ring, unfolded, false)
    ->Arg(64)
    ->Arg(256)
    ->Arg(1024)
    ->Unit(benchmark::kMillisecond);

/// 1 GiB over three levels of 8, 8 and n / 64 members at 300, 50 and 25 GB/s. ASTRA-sim's
/// all-reduce, 4,096 devices: 13.1 s.
void levels(benchmark::State& state, CollectiveKind kind, Algorithm algorithm, bool slow) {
  const auto n = static_cast<std::int32_t>(state.range(0));
  Played p;
  for (auto _ : state) {
    const std::vector<std::int32_t> members{8, 8, n / 64};
    const Rhythm r = rhythm(kind, algorithm, n, members);
    const Ticks hop{500'000};
    NetworkTraffic t = on_switches(r, EvenCut(kind, r, Bytes{1 << 30}), members,
                                   {300e9, 50e9, 25e9}, {hop, hop, hop});
    if (slow) slow_some(t);
    p = play(t);
  }
  state.counters["classes"] = static_cast<double>(p.classes);
  state.counters["end_ms"] = static_cast<double>(p.end.count) * 1e-9;
  state.counters["peak_MiB"] = peak_mebibytes();
}
void hierarchical(benchmark::State& state, bool slow) {
  levels(state, CollectiveKind::all_reduce, Algorithm::hierarchical, slow);
  if (state.range(0) == 4096 && !slow) state.SetLabel("ASTRA-sim 13.1 s, 247 MB");
}
BENCHMARK_CAPTURE(hierarchical, equal, false)
    ->Arg(512)
    ->Arg(4096)
    ->Arg(131072)
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(hierarchical, one_percent_slow, true)
    ->Arg(512)
    ->Arg(4096)
    ->Unit(benchmark::kMillisecond);
void hierarchical_all_to_all(benchmark::State& state) {
  levels(state, CollectiveKind::all_to_all, Algorithm::hierarchical, false);
}
BENCHMARK(hierarchical_all_to_all)->Arg(512)->Arg(4096)->Unit(benchmark::kMillisecond);
void nvls(benchmark::State& state) {
  levels(state, CollectiveKind::all_reduce, Algorithm::nvls, false);
}
BENCHMARK(nvls)->Arg(512)->Arg(4096)->Unit(benchmark::kMillisecond);
/// In one domain of 72 GPUs, unfolded: 72 meetings of 72 messages.
void nvls_reduce_scatter(benchmark::State& state) {
  const Topology topology = load_topology("gb200-nvl72:18");
  std::vector<std::int64_t> ranks(72);
  std::iota(ranks.begin(), ranks.end(), 0);
  Played p;
  for (auto _ : state) {
    const Rhythm r = rhythm(CollectiveKind::reduce_scatter, Algorithm::nvls, 72);
    const EvenCut cut(CollectiveKind::reduce_scatter, r, Bytes{72 << 20});
    p = play(traffic_of(r, cut, ranks, topology), {state.range(0) == 1});
  }
  state.counters["classes"] = static_cast<double>(p.classes);
  state.counters["end_ms"] = static_cast<double>(p.end.count) * 1e-9;
}
BENCHMARK(nvls_reduce_scatter)->Arg(0)->Arg(1)->Unit(benchmark::kMillisecond);

/// What an all-to-all among so many H100 loads, node by node of a kind or pair by pair.
void exchange(benchmark::State& state, bool counted) {
  const auto ranks = static_cast<std::size_t>(state.range(0));
  const Topology t = load_topology("dgx-h100:" + std::to_string(ranks / 8));
  std::vector<DeviceId> devices;
  for (std::size_t d = 0; d < ranks; ++d) devices.emplace_back(d);
  for (auto _ : state) {
    if (counted) {
      benchmark::DoNotOptimize(t.all_pairs(devices));
      continue;
    }
    std::vector<std::int64_t> load(t.link_count());
    for (const DeviceId a : devices) {
      for (const DeviceId b : devices) {
        for (const LinkId l : t.route(a, b)) ++load[l.index()];
      }
    }
    benchmark::DoNotOptimize(load);
  }
  state.counters["peak_MiB"] = peak_mebibytes();
}
void exchange_counted(benchmark::State& state) { exchange(state, true); }
void exchange_enumerated(benchmark::State& state) { exchange(state, false); }
BENCHMARK(exchange_counted)->Arg(64)->Arg(4096)->Arg(16384)->Unit(benchmark::kMillisecond);
BENCHMARK(exchange_enumerated)->Arg(64)->Arg(4096)->Arg(16384)->Unit(benchmark::kMillisecond);

/// 1,000 live flows between random hosts of a full-bisection tree, 16 to a leaf: one ends, another
/// begins, rates are solved after each. The fewer hosts, the more flows share a NIC.
void arrivals_and_departures(benchmark::State& state) {
  const auto hosts = static_cast<std::size_t>(state.range(0));
  Sharing s;
  std::uint64_t seed = 1;
  const auto random = [&](std::size_t n) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<std::size_t>(seed >> 33) % n;
  };
  std::vector<ResourceId> out, in, up, down;
  for (std::size_t h = 0; h < hosts; ++h) out.push_back(s.add(50e9)), in.push_back(s.add(50e9));
  for (std::size_t l = 0; l < hosts / 16; ++l)
    up.push_back(s.add(800e9)), down.push_back(s.add(800e9));
  const auto start = [&] {
    const std::size_t a = random(hosts), b = (a + 1 + random(hosts - 1)) % hosts;
    std::vector<Demand> d{{out[a]}, {in[b]}};
    if (a / 16 != b / 16) d.push_back({up[a / 16]}), d.push_back({down[b / 16]});
    return s.start(d);
  };
  std::vector<ActivityId> live;
  for (int k = 0; k < 1000; ++k) live.push_back(start());
  s.solve();
  std::int64_t changed = 0, events = 0;
  for (auto _ : state) {
    const std::size_t k = random(live.size());
    s.stop(live[k]);
    changed += static_cast<std::int64_t>(s.solve().size());
    live[k] = start();
    changed += static_cast<std::int64_t>(s.solve().size());
    events += 2;
  }
  state.counters["events/s"] =
      benchmark::Counter(static_cast<double>(events), benchmark::Counter::kIsRate);
  state.counters["changed_per_event"] = static_cast<double>(changed) / static_cast<double>(events);
}
BENCHMARK(arrivals_and_departures)->Arg(256)->Arg(1024)->Arg(4096);

}  // namespace
}  // namespace partita

BENCHMARK_MAIN();
