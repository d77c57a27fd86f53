// bench/partita_bench.cpp: speed of lowering and simulation. Prints events, events per second, peak memory.
#include <benchmark/benchmark.h>
#include <sys/resource.h>

#include "models/models.h"
#include "simulator/search/predict.h"

namespace partita {
namespace {

Plan gpt3_plan(std::int64_t dp) {
  Plan p;
  set_framework(p, "megatron-core", "");
  p.tp = 8;
  p.pp = 8;
  p.dp = dp;
  p.global_batch = 64 * dp;
  p.recompute = Recompute::full;
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

/// GPT-3 175B, 96 layers, tp 8, pp 8, 64 micro-batches, 1F1B, full recomputation, on 64 · dp devices.
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
  state.counters["events/s"] = benchmark::Counter(static_cast<double>(events), benchmark::Counter::kIsIterationInvariantRate);
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

}  // namespace
}  // namespace partita

BENCHMARK_MAIN();
