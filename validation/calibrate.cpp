#include "validation/calibrate.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <set>
#include <tuple>

#include "base/hash.h"
#include "models/models.h"
#include "simulator/cost/cost.h"
#include "simulator/cost/measured.h"
#include "validation/compare.h"

namespace partita::validation {
namespace {

TransformerConfig decoder(std::int64_t hidden, std::int64_t sequence, std::int64_t ffn,
                          std::int64_t heads, std::int64_t vocabulary, bool modern) {
  TransformerConfig c;
  c.name = fmt::format("{} h{} s{}", modern ? "llama" : "gpt", hidden, sequence);
  c.layers = 1;
  c.hidden = hidden;
  c.heads = heads;
  c.kv_heads = modern ? std::max<std::int64_t>(1, heads / 2) : heads;
  c.ffn = ffn;
  c.vocabulary = vocabulary;
  c.sequence = sequence;
  c.norm = modern ? TransformerConfig::Norm::rms : TransformerConfig::Norm::layer;
  c.positions = modern ? 0 : sequence;
  c.rotary_dim = modern ? hidden / heads : 0;
  c.activation = modern ? ActivationKind::silu : ActivationKind::gelu_tanh;
  c.gated = modern;
  c.qkv_bias = c.attention_output_bias = c.mlp_bias = !modern;
  c.tied = !modern;
  return c;
}

TransformerConfig mixture(std::int64_t hidden, std::int64_t sequence, std::int64_t ffn) {
  TransformerConfig c = decoder(hidden, sequence, ffn, 4, 64, true);
  c.name = "mixtral " + c.name;
  c.moe.experts = 4;
  c.moe.top_k = 2;
  c.moe.ffn = ffn;
  return c;
}

Graph images(const std::string& name, std::int64_t side, std::int64_t channels,
             bool synchronised = false, bool bias = false) {
  GraphBuilder b(name);
  TensorId x = b.input(
      "image", {{Dim::sample, 1}, {Dim::feature, 3}, {Dim::height, side}, {Dim::width, side}});
  const TensorId labels = b.input("labels", {{Dim::sample, 1}});
  int layer = 0;
  const auto block = [&](std::int64_t out, std::int64_t stride) {
    b.set_layer(layer);
    b.set_scope(fmt::format("layers.{}.", layer++));
    Convolution c;
    c.out = out;
    c.height = c.width = {3, stride, 1, 1, 1};
    c.bias = bias;
    x = b.add("convolution", c, {x});
    Normalize n;
    n.kind = Normalize::Kind::batch;
    n.synchronised = synchronised;
    x = b.add("norm", n, {x});
    x = b.add("relu", Activation{ActivationKind::relu}, {x});
  };
  block(channels, 1);
  block(channels, 1);
  block(2 * channels, 2);
  block(2 * channels, 1);
  b.set_layer(layer);
  b.set_scope("");
  Pool pool;
  pool.height = pool.width = {2, 2, 0, 0, 1};
  x = b.add("pool", pool, {x});
  x = b.add("average", GlobalAveragePool{}, {x});
  Linear head;
  head.out = {{Dim::vocabulary, 10}};
  head.bias = true;
  x = b.add("head", head, {x});
  x = b.add("loss", CrossEntropy{}, {x, labels});
  return b.finish(x, layer, 0);
}

Plan single_precision() {
  Plan p;
  set_framework(p, "partita", "");
  set_precision(p, "fp32", "");
  p.optimizer.kind = OptimizerKind::adam;
  return p;
}

/// What only some policies run: a small and a larger network for each.
void add_policies(int ranks, std::vector<CalibrationRun>& all) {
  const auto add = [&](const std::string& what, const Graph& g, auto change) {
    CalibrationRun r;
    r.graph = g;
    r.plan = single_precision();
    r.plan.dp = ranks;
    r.plan.micro_batch = 2;
    change(r.plan);
    r.name = fmt::format("{}, {}", g.name, what);
    r.startup = what == "start-up";
    if (r.plan.ranks() == ranks && complete(r.graph, r.plan)) all.push_back(std::move(r));
  };
  for (const auto& [hidden, sequence, ffn] : {std::tuple{40, 24, 112}, {112, 20, 300}}) {
    const std::int64_t wide = ceil_div(std::int64_t{hidden}, 4 * ranks) * 4 * ranks;
    const std::int64_t heads = ranks % 2 == 0 ? 2 * ranks : ranks;
    const std::int64_t positions = std::int64_t{sequence} * ranks;
    const Graph g =
        build_transformer(decoder(wide, positions, ffn * ranks / 4 * 4, heads,
                                  std::int64_t{32} * ranks + hidden / 8 * 8 * ranks, false));
    const Graph d = build_transformer(decoder(hidden, sequence, ffn, 4, hidden * 2, true));
    const auto alone = [&](Plan& p) {
      if (ranks > 1) p.strategy = "replicas";
    };
    add("offload", d, [&](Plan& p) {
      alone(p);
      p.offload_optimizer = p.offload_activations = true;
    });
    add("loss scale", d, [&](Plan& p) {
      alone(p);
      p.loss_scale = {256, true, 1};
    });
    add("start-up", d, [&](Plan&) {});
    add("sharded storage", d, [&, batch = hidden](Plan& p) {
      alone(p);
      p.sharded_storage = true;
      p.micro_batch = batch;
    });
    if (ranks == 1) continue;
    add("averaged", d, [&](Plan& p) {
      alone(p);
      p.average_every = 1;
    });
    for (const auto kind : {CompressionKind::cast, CompressionKind::top_k, CompressionKind::one_bit,
                            CompressionKind::power_sgd})
      add(fmt::format("{}", name(kind)), d, [&](Plan& p) { p.compression.kind = kind; });
    add("server", d, [&](Plan& p) {
      p.dp = ranks - 1, p.servers = 1, p.staleness = 1;
      p.optimizer.kind = OptimizerKind::sgd;
    });
    add("overlapped tensor parallel", g, [&](Plan& p) {
      p.dp = 1, p.tp = ranks;
      p.sequence_parallel = p.overlap_tensor_parallel = true;
    });
    add("context parallel", g, [&](Plan& p) { p.dp = 1, p.cp = ranks; });
    add("ring attention", g, [&](Plan& p) {
      p.dp = 1, p.cp = ranks;
      p.context = Plan::ContextExchange::ring;
    });
  }
}

CalibrationRun run_of(Graph g, std::int64_t micro_batch, bool sgd) {
  CalibrationRun r;
  r.name = fmt::format("{}, batch {}", g.name, micro_batch);
  r.graph = std::move(g);
  r.plan = single_precision();
  r.plan.micro_batch = micro_batch;
  // Two micro-batches: gradients that add up are kernels of their own kind.
  r.plan.global_batch = 2 * micro_batch;
  if (sgd) r.plan.optimizer.kind = OptimizerKind::sgd;
  if (!sgd) r.plan.optimizer.clip = 1;
  return r;
}

}  // namespace

std::vector<CalibrationRun> calibration_runs(int ranks) {
  std::vector<CalibrationRun> all;
  const auto add = [&](const Graph& g, std::int64_t micro_batch, bool sgd = false) {
    CalibrationRun r = run_of(g, micro_batch, sgd);
    r.plan.strategy = ranks > 1 ? "replicas" : "megatron";
    r.plan.dp = ranks;
    r.plan.global_batch *= ranks;
    all.push_back(std::move(r));
  };
  // Shapes around and between those of the suite, and none of its own.
  for (const auto& [hidden, sequence, ffn, heads, vocabulary, batch] :
       {std::tuple{16, 12, 40, 4, 48, 1},
        {24, 20, 72, 4, 80, 2},
        {40, 24, 112, 4, 120, 3},
        {56, 40, 152, 4, 200, 1},
        {72, 28, 208, 6, 280, 5},
        {88, 44, 280, 4, 360, 3},
        {112, 56, 360, 8, 520, 2},
        {144, 36, 480, 6, 700, 6},
        // Multiples of what a vector holds are faster: as in networks that people train.
        {32, 16, 96, 4, 96, 3},
        {48, 48, 192, 2, 144, 2},
        {80, 16, 320, 10, 224, 6},
        {128, 24, 384, 4, 320, 2},
        {128, 80, 512, 8, 512, 1}}) {
    add(build_transformer(decoder(hidden, sequence, ffn, heads, vocabulary, false)), batch);
    add(build_transformer(decoder(hidden, sequence, ffn, heads, vocabulary, true)), batch, true);
  }
  for (const auto& [hidden, sequence, ffn, batch] :
       {std::tuple{24, 12, 32, 1}, {40, 24, 56, 2}, {72, 20, 88, 3}, {104, 40, 120, 2}})
    add(build_transformer(mixture(hidden, sequence, ffn)), batch);
  for (const auto& [side, channels, batch] : {std::tuple{10, 6, 2},
                                              {14, 12, 1},
                                              {18, 10, 5},
                                              {22, 20, 3},
                                              {28, 14, 6},
                                              {12, 8, 3},
                                              {12, 32, 2},
                                              {20, 24, 2},
                                              {24, 32, 1},
                                              {8, 48, 4},
                                              {20, 8, 6}})
    add(images(fmt::format("images {} x {}", side, channels), side, channels), batch, true);
  if (ranks > 1) {
    // Statistics that ranks share are kernels of their own: vocabularies and batches cut over
    // ranks.
    for (const auto& [hidden, sequence, vocabulary, batch] :
         {std::tuple{32, 20, 56 * ranks, 2}, {64, 36, 120 * ranks, 3}, {96, 28, 200 * ranks, 4}}) {
      CalibrationRun r;
      // Heads that the ranks divide, and a hidden size that the heads divide.
      const std::int64_t heads = ranks % 2 == 0 ? 2 * ranks : ranks;
      const std::int64_t wide = ceil_div(std::int64_t{hidden}, 4 * heads) * 4 * heads;
      r.graph = build_transformer(decoder(wide, sequence, 2 * wide, heads, vocabulary, false));
      r.name = fmt::format("{}, vocabulary over {}", r.graph.name, ranks);
      r.plan = single_precision();
      r.plan.tp = ranks;
      r.plan.micro_batch = batch;
      if (complete(r.graph, r.plan)) all.push_back(std::move(r));
    }
    for (const auto& [side, channels, batch] : {std::tuple{12, 10, 2}, {18, 14, 3}, {22, 18, 5}}) {
      CalibrationRun r;
      r.graph =
          images(fmt::format("images {} x {} synchronised", side, channels), side, channels, true);
      r.name = r.graph.name;
      r.plan = single_precision();
      r.plan.optimizer.kind = OptimizerKind::sgd;
      r.plan.dp = ranks;
      r.plan.micro_batch = batch;
      all.push_back(std::move(r));
    }
  }
  Graph digits = build_mnist_linear();
  for (const std::int64_t batch : {24, 48, 96, 160}) add(digits, batch, true);
  add_policies(ranks, all);
  return all;
}

namespace {

CalibrationRun two_layers(const char* name, TransformerConfig c, std::int64_t batch) {
  c.layers = 2;
  CalibrationRun r = run_of(build_transformer(c), batch, false);
  set_precision(r.plan, "bf16", "");
  r.name = name;
  return r;
}

}  // namespace

CalibrationRun dispatch_run() {
  return two_layers("between instructions", decoder(2048, 1024, 8192, 16, 4096, false), 2);
}
CalibrationRun graph_run() {
  return two_layers("a step as a CUDA graph", decoder(256, 128, 1024, 4, 1024, false), 1);
}

std::vector<CalibrationRun> gpu_calibration_runs(bool eights) {
  std::vector<CalibrationRun> all;
  const auto add = [&](Graph g, const char* precision, std::int64_t batch, bool sgd) {
    CalibrationRun r = run_of(std::move(g), batch, sgd);
    set_precision(r.plan, precision, "");
    r.name += fmt::format(", {}", precision);
    all.push_back(std::move(r));
  };
  // Corners first: what is interpolated between needs them.
  for (const auto& [hidden, sequence, ffn, heads, vocabulary, batch] :
       {std::tuple{1024, 512, 4096, 16, 8192, 1},
        {8192, 2048, 24576, 64, 16384, 2},
        {1280, 2048, 5120, 20, 24576, 8},
        {5120, 1024, 13824, 40, 32768, 2},
        {2048, 3072, 5504, 16, 49157, 2},
        {3072, 1536, 8192, 24, 65536, 3},
        {1536, 768, 6144, 12, 40960, 6},
        {6144, 512, 16384, 48, 20480, 1},
        {2560, 2560, 10240, 20, 12288, 2},
        {896, 1280, 3584, 14, 28994, 12}}) {
    const bool modern = hidden % 2048 == 0 || hidden == 5120;
    TransformerConfig c = decoder(hidden, sequence, ffn, heads, vocabulary, modern);
    if (!modern && batch > 5) c.activation = ActivationKind::gelu;
    add(build_transformer(c), "bf16", batch, hidden % 3 == 0);
  }
  // Attention by itself: long and short, of heads of 64 and 128, of all keys and of those before.
  for (const auto& [sequence, heads, width, batch, causal] : {std::tuple{16384, 8, 128, 1, true},
                                                              {512, 16, 64, 24, false},
                                                              {8192, 32, 128, 1, true},
                                                              {1024, 20, 64, 16, false},
                                                              {2048, 32, 64, 4, true},
                                                              {4096, 24, 128, 1, false},
                                                              {1024, 48, 128, 4, true},
                                                              {384, 12, 64, 64, false}}) {
    TransformerConfig c = decoder(heads * width, sequence, 256, heads, 256, false);
    c.causal = causal;
    c.name =
        fmt::format("attention {} x {} x {}{}", heads, sequence, width, causal ? "" : ", all keys");
    add(build_transformer(c), "bf16", batch, true);
  }
  // Experts: grouped products of few and of many rows each.
  for (const auto& [hidden, sequence, ffn, heads, experts, batch] :
       {std::tuple{1024, 1024, 2048, 16, 8, 2},
        {3072, 2048, 8192, 24, 8, 2},
        {2048, 4096, 5632, 16, 16, 1},
        {5120, 1536, 12288, 40, 4, 1}}) {
    TransformerConfig c = decoder(hidden, sequence, ffn, heads, 16384, true);
    c.name = "mixtral " + c.name;
    c.moe.experts = experts;
    c.moe.top_k = 2;
    c.moe.ffn = ffn;
    add(build_transformer(c), "bf16", batch, true);
  }
  // Mamba-2 blocks.
  for (const auto& [hidden, sequence, groups, state, batch] :
       {std::tuple{1024, 2048, 1, 128, 4}, {5120, 4096, 8, 128, 1}, {2560, 1024, 4, 64, 6}}) {
    TransformerConfig c = decoder(hidden, sequence, 256, hidden / 64, 4096, true);
    c.name = fmt::format("mamba h{} s{}", hidden, sequence);
    c.pattern = "M";
    c.rotary_dim = 0;
    c.gated = false;
    c.activation = ActivationKind::squared_relu;
    c.mamba.heads = hidden / 32;
    c.mamba.head_dim = 64;
    c.mamba.groups = groups;
    c.mamba.state = state;
    add(build_transformer(c), "bf16", batch, true);
  }
  for (const char* precision : {"fp32", "tf32", "fp16"}) {
    for (const auto& [hidden, sequence, ffn, heads, vocabulary, batch] :
         {std::tuple{1024, 768, 4096, 16, 8192, 2}, {2560, 1024, 6912, 20, 16384, 1}})
      add(build_transformer(decoder(hidden, sequence, ffn, heads, vocabulary, hidden == 2560)),
          precision, batch, false);
  }
  if (eights) {
    for (const auto& [hidden, sequence, ffn, heads, vocabulary, batch] :
         {std::tuple{1024, 768, 4096, 16, 8192, 2},
          {8192, 1536, 20480, 64, 8192, 1},
          {2560, 1024, 6912, 20, 16384, 1},
          {5120, 2560, 16384, 40, 8192, 1}})
      add(build_transformer(decoder(hidden, sequence, ffn, heads, vocabulary, true)), "fp8", batch,
          true);
  }
  for (const auto& [side, channels, batch] :
       {std::tuple{96, 48, 24}, {48, 96, 48}, {24, 192, 64}, {12, 384, 96}, {192, 24, 12}})
    add(images(fmt::format("images {} x {}", side, channels), side, channels), "bf16", batch, true);
  for (const auto& [side, channels, batch] :
       {std::tuple{208, 48, 24}, {104, 96, 24}, {40, 160, 32}, {16, 320, 48}})
    add(images(fmt::format("images {} x {}, biases", side, channels), side, channels, false, true),
        "bf16", batch, true);
  return all;
}

std::vector<CalibrationRun> more_gpu_calibration_runs(std::size_t count) {
  std::vector<CalibrationRun> all;
  std::uint64_t drawn = 1;
  const auto one_of = [&](std::initializer_list<std::int64_t> list) {
    drawn = mix(drawn, 0);
    return *(list.begin() + static_cast<std::ptrdiff_t>(drawn % list.size()));
  };
  std::set<std::string> names;
  const auto add = [&](Graph g, std::int64_t batch, bool sgd) {
    CalibrationRun r = run_of(std::move(g), batch, sgd);
    set_precision(r.plan, "bf16", "");
    r.name += ", bf16, more";
    if (names.insert(r.name).second) all.push_back(std::move(r));
  };
  while (all.size() < count) {
    if (one_of({0, 1, 2, 3}) == 0) {
      const std::int64_t side = one_of({10, 20, 36, 44, 64, 72, 88, 160}),
                         channels = one_of({32, 80, 96, 160, 192, 320, 384}),
                         batch = one_of({16, 24, 48, 96});
      if (side * side * channels * batch <= std::int64_t{64} << 20)
        add(images(fmt::format("images {} x {}", side, channels), side, channels), batch, true);
      continue;
    }
    // Neither hidden sizes nor lengths of the suite's networks: none of its products.
    const std::int64_t width = one_of({64, 128}),
                       hidden = one_of({896, 1152, 1280, 1536, 1792, 2304, 2560, 3072, 3584, 5120,
                                        6144, 7168, 8192}),
                       sequence = one_of({384, 640, 768, 1280, 1536, 2560, 3072, 6144}),
                       tokens = one_of({1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384}),
                       vocabulary = one_of({4096, 12288, 24576, 33280, 49152, 65536});
    const bool modern = one_of({0, 1}) == 1;
    const std::int64_t ffn = modern ? hidden * one_of({20, 28, 22}) / 8 : 4 * hidden,
                       batch = std::max<std::int64_t>(1, tokens / sequence);
    // What state and logits fit beside each other on a GPU of 80 GB, and takes some milliseconds.
    if (batch * sequence * hidden > std::int64_t{64} << 20 || (modern && hidden / width % 2 != 0) ||
        batch * sequence * vocabulary > std::int64_t{512} << 20)
      continue;
    TransformerConfig c =
        decoder(hidden, sequence, ffn / 128 * 128, hidden / width, vocabulary, modern);
    c.name += fmt::format(" {} x {} of {}", hidden / width, width, vocabulary);
    add(build_transformer(c), batch, modern);
  }
  return all;
}

CalibrationRun layer_run(bool gpu) {
  CalibrationRun r = run_of(build_transformer(gpu ? decoder(4096, 4096, 16384, 32, 256, false)
                                                  : decoder(128, 64, 512, 4, 64, false)),
                            1, true);
  if (gpu) set_precision(r.plan, "bf16", "");
  return r;
}

void harvest(const Program& p, const std::vector<RankMeasurement>& ranks, KernelTable& into) {
  // Samples are in program order, the same on every step.
  using Key = std::tuple<std::string, double, double, double, double, double>;
  std::map<Key, std::vector<double>> times;
  for (const auto& r : ranks) {
    if (r.samples.empty()) continue;
    for (std::size_t k = 0; k < r.samples[0].size(); ++k) {
      const Sample& x = r.samples[0][k];
      const Instruction& i = p.blocks[static_cast<std::size_t>(x.block)]
                                 .instructions[static_cast<std::size_t>(x.instruction)];
      if (i.kind != Kind::compute && i.kind != Kind::slice && i.kind != Kind::load &&
          i.kind != Kind::copy)
        continue;
      const KernelShape s = shape_of(p, i, r.rank);
      if (s.kernel.empty()) continue;
      times[{s.kernel, s.m, s.n, s.k, s.count, s.bytes}].push_back(time_of_sample(r, k));
    }
  }
  for (auto& [key, list] : times) {
    const auto& [kernel, m, n, k, count, bytes] = key;
    KernelPoint point;
    point.ranks = static_cast<int>(ranks.size());
    point.m = m, point.n = n, point.k = k, point.count = count, point.bytes = bytes;
    std::sort(list.begin(), list.end());
    point.time = Seconds{std::max(1e-9, list[list.size() / 2])};
    point.spread = (list[list.size() * 3 / 4] - list[list.size() / 4]) / 2 / point.time.count;
    into[kernel].push_back(point);
  }
}

namespace {

/// Was the host ahead of the GPU in steps without marks? Else what they take says nothing of the
/// GPU, and what queueing takes nothing of the host, whose queue may have been full.
bool ahead(const RankMeasurement& r) {
  constexpr double kShare = 0.8;
  return r.queued_s.empty() || median(r.queued_s) <= kShare * median(r.plain_s);
}
/// What `steps` have beside their kernels, per instruction.
double beside_kernels(const RankMeasurement& r, const std::vector<double>& steps) {
  double busy = 0;
  for (std::size_t k = 0; k < r.samples[0].size(); ++k) busy += time_of_sample(r, k);
  return (median(steps) - busy) / static_cast<double>(r.samples[0].size());
}
std::optional<Seconds> middle_of(std::vector<double> list) {
  if (list.empty()) return std::nullopt;
  return Seconds{std::max(0.0, median(std::move(list)))};
}

}  // namespace

std::optional<Seconds> dispatch_of(const std::vector<RankMeasurement>& ranks) {
  std::vector<double> each;
  for (const auto& r : ranks) {
    if (!r.kernel_ns.empty() && !r.plain_s.empty() && !r.samples.empty()) {
      if (ahead(r)) each.push_back(beside_kernels(r, r.plain_s));
      continue;
    }
    for (const auto& step : r.samples) {
      double busy = 0;
      for (const Sample& s : step) busy += static_cast<double>(s.end - s.start);
      if (step.empty()) continue;
      const double whole = static_cast<double>(step.back().end);
      each.push_back((whole - busy) * 1e-9 / static_cast<double>(step.size()));
    }
  }
  return middle_of(std::move(each));
}

std::optional<Seconds> dispatch_in_graph_of(const std::vector<RankMeasurement>& ranks) {
  std::vector<double> each;
  for (const auto& r : ranks) {
    if (!r.kernel_ns.empty() && !r.captured_s.empty())
      each.push_back(beside_kernels(r, r.captured_s));
  }
  return middle_of(std::move(each));
}

std::optional<Seconds> list_row_of(const Program& p, const std::vector<RankMeasurement>& ranks) {
  std::vector<double> each;
  for (const auto& r : ranks) {
    if (r.kernel_ns.empty() || r.samples.empty()) continue;
    for (std::size_t k = 0; k < r.samples[0].size(); ++k) {
      const Sample& x = r.samples[0][k];
      const Instruction& i = p.blocks[static_cast<std::size_t>(x.block)]
                                 .instructions[static_cast<std::size_t>(x.instruction)];
      if (!lists_rows(p, i)) continue;
      std::vector<double> whole;
      for (const auto& step : r.samples)
        whole.push_back(static_cast<double>(step[k].end - step[k].start) * 1e-9);
      const double rows = rows_listed(p, i, r.rank);
      if (rows > 0) each.push_back((median(std::move(whole)) - time_of_sample(r, k)) / rows);
    }
  }
  return middle_of(std::move(each));
}

std::optional<Seconds> launch_of(const std::vector<RankMeasurement>& ranks) {
  std::vector<double> each;
  for (const auto& r : ranks) {
    if (!r.queued_s.empty() && ahead(r))
      each.push_back(median(r.queued_s) / static_cast<double>(r.samples.at(0).size()));
  }
  return middle_of(std::move(each));
}

namespace {

constexpr std::int64_t kSmallest = 64;  // bytes of a collective or message
std::size_t size_index(std::int64_t bytes) {
  std::size_t k = 0;
  for (std::int64_t b = kSmallest; b < bytes; b *= 4) ++k;
  return k;
}

}  // namespace

BufferId add_buffer(Program& p, Shape shape, Layout layout) {
  Buffer b;
  b.name = fmt::format("buffer {}", p.buffers.size());
  b.category = Category::buffers;
  b.scope = Scope::step;
  layout.dims.resize(shape.size());
  b.shape = std::move(shape);
  b.layout = std::move(layout);
  p.buffers.push_back(std::move(b));
  return BufferId{p.buffers.size() - 1};
}

std::vector<Program> collective_programs(int ranks, std::int64_t largest) {
  std::vector<Program> all;
  if (ranks < 2) return all;
  const auto begin = [&](Mesh mesh) {
    Program p;
    p.mesh = std::move(mesh);
    p.streams = {"compute"};
    p.blocks.resize(1);
    p.blocks[0].name = "collectives";
    p.blocks[0].kind = BlockKind::step;
    return p;
  };
  // All ranks in one group, and in groups of two at once.
  for (const std::int64_t n : {std::int64_t{ranks}, std::int64_t{2}}) {
    if (n != ranks && ranks % n != 0) continue;
    if (n == 2 && n == ranks && !all.empty()) continue;
    Program p = begin(n == ranks ? Mesh{{{"r", n}}} : Mesh{{{"g", ranks / n}, {"r", n}}});
    const AtomId last = static_cast<AtomId>(p.mesh.atoms.size() - 1);
    const AtomMask r = bit(last);
    DimSplit cut;
    cut.atoms = {last};
    const auto add = [&](CollectiveKind kind, const Shape& shape, Layout from, Layout to,
                         bool in_place) {
      Instruction i;
      i.kind = Kind::collective;
      i.collective = kind;
      i.atoms = r;
      i.reads = {add_buffer(p, shape, std::move(from))};
      i.writes = {add_buffer(p, shape, std::move(to))};
      if (in_place) p.buffers[i.writes[0].index()].alias = i.reads[0].value;
      // What is exchanged has just been computed: it lies in the caches.
      Instruction fresh;
      fresh.kernel = Kernel::zero;
      fresh.writes = i.reads;
      p.blocks[0].instructions.push_back(std::move(fresh));
      p.blocks[0].instructions.push_back(std::move(i));
    };
    for (std::int64_t bytes = kSmallest; bytes <= largest; bytes *= 4) {
      const std::int64_t wide = std::max<std::int64_t>(1, bytes / 4 / n / n);
      const Shape shape{{Dim::sample, n}, {Dim::feature, n * wide}};
      Layout whole, owed, rows, columns, root, shifted;
      whole.dims.resize(2);
      owed = rows = columns = root = shifted = whole;
      owed.partial = r;
      rows.dims[0] = cut;
      columns.dims[1] = cut;
      root.root = r;
      shifted.dims[0] = cut;
      shifted.dims[0].shift = 1;
      add(CollectiveKind::all_reduce, shape, owed, whole, true);
      add(CollectiveKind::all_gather, shape, rows, whole, false);
      add(CollectiveKind::reduce_scatter, shape, owed, rows, false);
      add(CollectiveKind::all_to_all, shape, rows, columns, false);
      add(CollectiveKind::broadcast, shape, root, whole, false);
      add(CollectiveKind::reduce, shape, owed, root, false);
      add(CollectiveKind::shift, shape, rows, shifted, false);
      Layout block, window;
      block.dims.resize(2);
      block.dims[0] = cut;
      window = block;
      window.dims[0].kind = SplitKind::window;
      window.dims[0].window = {3, 1, 1, 1, 1};
      window.dims[0].outputs = 8 * n;
      add(CollectiveKind::halo_exchange, {{Dim::height, 8 * n}, {Dim::width, wide}}, block, window,
          false);
    }
    p.stages = {{{BlockId{0}, -1}}};
    all.push_back(std::move(p));
  }
  const std::int64_t n = ranks;
  if (n % 2 == 0) {
    Program t = n == 2 ? begin(Mesh{{{"pp", 2}}}) : begin(Mesh{{{"pp", 2}, {"r", n / 2}}});
    t.pipeline = {0};
    t.blocks.resize(2);
    t.blocks[1] = t.blocks[0];
    t.blocks[1].stage = 1;
    const auto make = [&](std::int64_t bytes) {
      return add_buffer(t, {{Dim::feature, bytes / 4}});
    };
    const auto fresh = [&](int stage, BufferId id) {
      Instruction i;
      i.kernel = Kernel::zero;
      i.writes = {id};
      t.blocks[static_cast<std::size_t>(stage)].instructions.push_back(std::move(i));
    };
    const auto half = [&](Kind kind, int stage, std::int32_t message, BufferId id) {
      Instruction i;
      i.kind = kind;
      i.stage = 1 - stage;
      i.index = message;
      (kind == Kind::send ? i.reads : i.writes) = {id};
      t.blocks[static_cast<std::size_t>(stage)].instructions.push_back(std::move(i));
    };
    std::int32_t messages = 0;
    const auto whole = [&](int from, BufferId id) {
      half(Kind::send, from, messages, id);
      half(Kind::receive, 1 - from, messages++, make(elements(t.buffer(id).shape) * 4));
    };
    // There and back: the one that waits is there when the message comes.
    for (std::int64_t bytes = kSmallest; bytes <= largest; bytes *= 4) {
      const std::array<BufferId, 2> sent{make(bytes), make(bytes)};
      for (const int stage : {0, 1}) fresh(stage, sent[static_cast<std::size_t>(stage)]);
      for (const int stage : {0, 1}) whole(stage, sent[static_cast<std::size_t>(stage)]);
    }
    // What each side does of it: all messages have come when the first is taken.
    const std::int32_t first = messages;
    for (std::int64_t bytes = kSmallest; bytes <= largest; bytes *= 4) {
      const BufferId sent = make(bytes);
      fresh(0, sent);
      half(Kind::send, 0, messages++, sent);
    }
    whole(0, make(kSmallest));
    for (std::int64_t bytes = kSmallest; bytes <= largest; bytes *= 4)
      half(Kind::receive, 1, first + static_cast<std::int32_t>(size_index(bytes)), make(bytes));
    whole(1, make(kSmallest));
    t.stages = {{{BlockId{0}, -1}}, {{BlockId{1}, -1}}};
    all.push_back(std::move(t));
  }
  return all;
}

namespace {

BufferId step_buffer(Program& p, std::int64_t bytes) {
  // Of two dimensions: interpreters write each one's indices out.
  const std::int64_t row = std::min<std::int64_t>(bytes / 4, 1024);
  return add_buffer(p, {{Dim::sample, bytes / 4 / row}, {Dim::feature, row}});
}

Instruction copying(BufferId from, BufferId to) {
  Instruction i;
  i.kind = Kind::copy;
  i.reads = {from};
  i.writes = {to};
  return i;
}

double slowest_step(const std::vector<RankMeasurement>& ranks) { return median(step_times(ranks)); }

}  // namespace

Program copy_program(int ranks, std::int64_t largest) {
  Program p;
  if (ranks > 1) p.mesh.atoms = {{"r", ranks}};
  p.streams = {"compute"};
  p.blocks.resize(1);
  p.blocks[0].name = "copies";
  p.blocks[0].kind = BlockKind::step;
  for (std::int64_t bytes = 4 << 10; bytes <= largest; bytes *= 4) {
    const BufferId from = step_buffer(p, bytes), to = step_buffer(p, bytes);
    p.blocks[0].instructions.push_back(copying(from, to));
  }
  p.stages = {{{BlockId{0}, -1}}};
  return p;
}

void harvest_copies(const Program& p, const std::vector<RankMeasurement>& ranks,
                    KernelTable& into) {
  KernelTable all;
  harvest(p, ranks, all);
  auto& to = into["copy"];
  for (const auto& [kernel, points] : all) to.insert(to.end(), points.begin(), points.end());
}

Program host_copy_program(std::int64_t largest) {
  Program p;
  p.streams = {"compute"};
  p.blocks.resize(1);
  p.blocks[0].name = "copies to the host and back";
  p.blocks[0].kind = BlockKind::step;
  for (std::int64_t bytes = 4 << 10; bytes <= largest; bytes *= 4) {
    const BufferId here = step_buffer(p, bytes), there = step_buffer(p, bytes),
                   back = step_buffer(p, bytes);
    p.buffers[there.index()].host = true;
    p.blocks[0].instructions.push_back(copying(here, there));
    p.blocks[0].instructions.push_back(copying(there, back));
  }
  p.stages = {{{BlockId{0}, -1}}};
  return p;
}

void harvest_host_copies(const Program& p, const std::vector<RankMeasurement>& ranks,
                         KernelTable& into) {
  for (const auto& r : ranks) {
    for (std::size_t k = 0; !r.samples.empty() && k < r.samples[0].size(); ++k) {
      const Sample& x = r.samples[0][k];
      const Instruction& i = p.blocks[static_cast<std::size_t>(x.block)]
                                 .instructions[static_cast<std::size_t>(x.instruction)];
      std::vector<double> steps;
      for (const auto& step : r.samples)
        steps.push_back(static_cast<double>(step[k].end - step[k].start) * 1e-9);
      std::sort(steps.begin(), steps.end());
      KernelPoint point;
      point.ranks = static_cast<int>(ranks.size());
      point.bytes = static_cast<double>(4 * elements(p.buffer(i.reads[0]).shape));
      point.time = Seconds{std::max(1e-9, steps[steps.size() / 2])};
      point.spread = (steps[steps.size() * 3 / 4] - steps[steps.size() / 4]) / 2 / point.time.count;
      into[p.buffer(i.writes[0]).host ? "copy to host" : "copy from host"].push_back(point);
    }
  }
}

Program overlap_program(OverlapPart part) {
  constexpr std::int64_t kTransfer = 1 << 20, kCompute = 1 << 15;
  constexpr int kCopies = 150;  // in a cache: some hundred microseconds, as the transfer
  Program p;
  p.mesh.atoms = {{"pp", 2}};
  p.pipeline = {0};
  p.streams = {"compute"};
  p.blocks.resize(2);
  for (const int stage : {0, 1}) {
    Block& b = p.blocks[static_cast<std::size_t>(stage)];
    b.name = "overlap";
    b.kind = BlockKind::step;
    b.stage = stage;
    const BufferId moved = step_buffer(p, kTransfer), from = step_buffer(p, kCompute),
                   to = step_buffer(p, kCompute);
    Instruction message;
    message.kind = stage == 0 ? Kind::send : Kind::receive;
    message.stage = 1 - stage;
    (stage == 0 ? message.reads : message.writes) = {moved};
    if (part != OverlapPart::compute && stage == 0) b.instructions.push_back(message);
    for (int k = 0; k < kCopies && part != OverlapPart::transfer; ++k)
      b.instructions.push_back(copying(from, to));
    if (part != OverlapPart::compute && stage == 1) b.instructions.push_back(message);
  }
  p.stages = {{{BlockId{0}, -1}}, {{BlockId{1}, -1}}};
  return p;
}

double overlap_of(const std::vector<RankMeasurement>& both,
                  const std::vector<RankMeasurement>& transfer,
                  const std::vector<RankMeasurement>& compute) {
  const double b = slowest_step(both), t = slowest_step(transfer), c = slowest_step(compute);
  return std::clamp((c + t - b) / std::min(c, t), 0.0, 1.0);
}

namespace {
/// One of the values: of two that are far apart one is left, not none.
double upper_middle(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto at = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), at, values.end());
  return *at;
}
}  // namespace

std::vector<std::size_t> off_clock(const std::vector<Unit>& units) {
  // Each beside its own rounds: what a GPU's power allows of clock depends on what it does. One
  // that has no other is beside all that no power cap held down, if none did it.
  std::map<std::pair<std::string, int>, std::vector<double>> clocks;
  std::vector<double> free;
  const auto capped = [](const Conditions& c) {
    return c.throttled.find("power cap") != std::string::npos;
  };
  for (const Unit& u : units) {
    if (!u.conditions.known()) continue;
    clocks[{u.name, u.ranks}].push_back(u.conditions.clock_mhz);
    if (!capped(u.conditions)) free.push_back(u.conditions.clock_mhz);
  }
  std::vector<std::size_t> off;
  for (std::size_t k = 0; k < units.size(); ++k) {
    const Conditions& c = units[k].conditions;
    if (!c.known()) continue;
    const auto& own = clocks.at({units[k].name, units[k].ranks});
    const double middle = upper_middle(own.size() == 1 && !capped(c) ? free : own);
    bool held_back = false;
    for (const char* reason : {"heat", "slowdown", "power brake"})
      held_back |= c.throttled.find(reason) != std::string::npos;
    if (held_back || std::abs(c.clock_mhz - middle) > 0.01 * middle) off.push_back(k);
  }
  return off;
}

OutsideMemory joined(const std::vector<OutsideMemory>& units) {
  const auto all = [&](Bytes OutsideMemory::*part) {
    std::vector<Bytes> list;
    for (const OutsideMemory& m : units) {
      if ((m.*part).count > 0) list.push_back(m.*part);
    }
    std::sort(list.begin(), list.end());
    return list;
  };
  const auto middle = [](const std::vector<Bytes>& sorted) {
    return sorted.empty() ? Bytes{0} : sorted[sorted.size() / 2];
  };
  OutsideMemory m;
  m.context = middle(all(&OutsideMemory::context));
  // Once loaded they stay: the most is all.
  const auto kernels = all(&OutsideMemory::kernels);
  m.kernels = kernels.empty() ? Bytes{0} : kernels.back();
  m.libraries = middle(all(&OutsideMemory::libraries));
  m.workspace = middle(all(&OutsideMemory::workspace));
  std::map<int, std::vector<Bytes>> by_ranks;
  for (const OutsideMemory& u : units) {
    for (const auto& [ranks, bytes] : u.by_ranks) by_ranks[ranks].push_back(bytes);
  }
  for (auto& [ranks, list] : by_ranks) {
    std::sort(list.begin(), list.end());
    m.by_ranks[ranks] = middle(list);
  }
  return m;
}

Profile joined(const std::vector<Unit>& units) {
  Profile p;
  std::vector<double> dispatch, launch, in_graph, list_row, overlap, recording;
  SlowdownTable slowdown;
  std::vector<OutsideMemory> units_outside;
  const std::vector<std::size_t> off = off_clock(units);
  for (std::size_t number = 0; number < units.size(); ++number) {
    const Unit& u = units[number];
    if (!u.record.empty()) continue;
    if (std::binary_search(off.begin(), off.end(), number)) {
      ++p.strayed;
      continue;
    }
    for (const auto& [kernel, points] : u.kernels)
      p.kernels[kernel].insert(p.kernels[kernel].end(), points.begin(), points.end());
    for (const auto& [kind, points] : u.collectives)
      p.collectives[kind].insert(p.collectives[kind].end(), points.begin(), points.end());
    slowdown.insert(slowdown.end(), u.slowdown.begin(), u.slowdown.end());
    units_outside.push_back(u.outside);
    dispatch.insert(dispatch.end(), u.dispatch.begin(), u.dispatch.end());
    launch.insert(launch.end(), u.launch.begin(), u.launch.end());
    in_graph.insert(in_graph.end(), u.in_graph.begin(), u.in_graph.end());
    list_row.insert(list_row.end(), u.list_row.begin(), u.list_row.end());
    overlap.insert(overlap.end(), u.overlap.begin(), u.overlap.end());
    if (u.recording) recording.push_back(*u.recording);
    p.recorded += u.recording ? 1 : 0;
    p.unrecorded += u.no_records.empty() ? 0 : 1;
    if (!u.no_records.empty()) p.no_records = u.no_records;
  }
  if (!recording.empty()) p.recording = median(std::move(recording));
  p.outside = joined(units_outside);
  // Points of the same shape from several rounds: the median, and how far the rounds are apart.
  const auto join = [](auto& points, auto key) {
    std::map<decltype(key(points[0])),
             std::vector<typename std::decay_t<decltype(points)>::value_type>>
        by;
    for (const auto& x : points) by[key(x)].push_back(x);
    points.clear();
    for (auto& [k, list] : by) {
      std::sort(list.begin(), list.end(),
                [](const auto& a, const auto& b) { return a.time < b.time; });
      auto one = list[list.size() / 2];
      one.spread = std::max(
          one.spread, (list.back().time.count - list.front().time.count) / 2 / one.time.count);
      points.push_back(one);
    }
  };
  for (auto& [kernel, points] : p.kernels)
    join(points,
         [](const KernelPoint& x) { return std::tuple{x.ranks, x.m, x.n, x.k, x.count, x.bytes}; });
  for (auto& [kind, points] : p.collectives)
    join(points, [](const CollectivePoint& x) {
      return std::tuple{x.ranks, x.at_work, x.bytes.count};
    });
  std::map<std::tuple<KernelFamily, std::string, int, int, std::int64_t>, SlowdownTable> pairs;
  for (const SlowdownPoint& x : slowdown)
    pairs[{x.kernel, x.beside, x.ranks, x.multiprocessors, x.bytes.count}].push_back(x);
  for (auto& [pair, list] : pairs) {
    SlowdownPoint one = list[0];
    for (double SlowdownPoint::*ratio : {&SlowdownPoint::of_kernel, &SlowdownPoint::of_transfer}) {
      std::vector<double> all;
      for (const SlowdownPoint& x : list) {
        all.push_back(x.*ratio);
        one.spread = std::max(one.spread, x.spread);
      }
      const auto [least, most] = std::minmax_element(all.begin(), all.end());
      one.spread = std::max(one.spread, (*most - *least) / 2 / median(all));
      one.*ratio = median(std::move(all));
    }
    p.slowdown.push_back(one);
  }
  const auto settle = [](std::vector<double> list, double& middle, double& spread) {
    if (list.empty()) return;
    std::sort(list.begin(), list.end());
    middle = median(list);
    spread = (list[list.size() * 3 / 4] - list[list.size() / 4]) / 2;
  };
  p.dispatch_measured = !dispatch.empty();
  p.overlap_measured = !overlap.empty();
  const auto time = [&](std::vector<double> list, Seconds& t, double& spread) {
    double each = 0, apart = 0;
    settle(std::move(list), each, apart);
    t = Seconds{each};
    spread = each > 0 ? apart / each : 0;
  };
  time(std::move(dispatch), p.dispatch, p.dispatch_spread);
  time(std::move(launch), p.launch, p.launch_spread);
  time(std::move(in_graph), p.in_graph, p.in_graph_spread);
  time(std::move(list_row), p.list_row, p.list_row_spread);
  settle(std::move(overlap), p.overlap, p.overlap_spread);
  return p;
}

void harvest_collectives(const Program& p, const std::vector<RankMeasurement>& ranks, int cores,
                         CollectiveTable& into) {
  const auto seconds = [](std::int64_t from, std::int64_t to) {
    return static_cast<double>(to - from) * 1e-9;
  };
  const auto add = [&](const std::string& kind, int members, Bytes bytes,
                       std::vector<double> times) {
    std::sort(times.begin(), times.end());
    CollectivePoint point;
    point.ranks = members;
    point.at_work = static_cast<int>(ranks.size());
    point.bytes = bytes;
    point.time = Seconds{std::max(1e-9, times[times.size() / 2])};
    point.spread = (times[times.size() * 3 / 4] - times[times.size() / 4]) / 2 / point.time.count;
    into[kind].push_back(point);
  };
  const auto& list = p.blocks[0].instructions;
  if (!p.pipeline.empty()) {
    std::int64_t most = kSmallest;
    for (const Buffer& b : p.buffers) most = std::max(most, 4 * elements(b.shape));
    const std::size_t sizes = size_index(most) + 1;
    std::int64_t bytes = kSmallest;
    for (std::size_t k = 0; k < sizes; ++k, bytes *= 4) {
      std::vector<double> whole, sending, receiving;
      for (const auto& r : ranks) {
        for (const auto& step : r.samples) {
          const auto took = [&](std::size_t from, std::size_t to) {
            return seconds(step[from].start, step[to].end);
          };
          if (p.stage_of(r.rank) == 0) {
            whole.push_back(took(3 * k + 1, 3 * k + 2) / 2);
            sending.push_back(took(3 * sizes + 2 * k + 1, 3 * sizes + 2 * k + 1));
          } else {
            receiving.push_back(took(3 * sizes + 1 + k, 3 * sizes + 1 + k));
          }
        }
      }
      add("send", 2, Bytes{bytes}, std::move(whole));
      add("send_held", 2, Bytes{bytes}, std::move(sending));
      add("receive_held", 2, Bytes{bytes}, std::move(receiving));
    }
    return;
  }
  for (std::size_t k = 0; k < list.size(); ++k) {
    const Instruction& i = list[k];
    if (i.kind != Kind::collective) continue;
    std::vector<double> times;
    for (std::size_t s = 0; s < ranks[0].samples.size(); ++s) {
      if (static_cast<int>(ranks.size()) > cores) {
        // Some are done before others have had a core: it lies between the last ends, with what all
        // did on the cores in between.
        std::int64_t before = 0, end = 0;
        double others = 0;
        for (const auto& r : ranks) {
          const auto& samples = r.samples[s];
          before = std::max(before, k > 1 ? samples[k - 2].end : samples[k - 1].start);
          end = std::max(end, samples[k].end);
          others += seconds(samples[k - 1].start, samples[k - 1].end) / cores;
        }
        times.push_back(seconds(before, end) - others);
        continue;
      }
      // From the last one's arrival on: waiting for it is not the collective's time.
      std::map<std::int64_t, double> shortest;  // by group
      for (const auto& r : ranks) {
        const double t = seconds(r.samples[s][k].start, r.samples[s][k].end);
        const auto [it, fresh] = shortest.emplace(p.mesh.group_root(r.rank, i.atoms), t);
        it->second = std::min(it->second, t);
      }
      for (const auto& [group, t] : shortest) times.push_back(t);
    }
    add(std::string(name(i.collective)), static_cast<int>(p.mesh.size(i.atoms)), payload(p, i, 0),
        std::move(times));
  }
}

namespace {

/// What its allocator does not give; empty where the context's is not known: without it the others
/// are no whole.
std::string outside_yaml(const Profile& p) {
  const OutsideMemory& m = p.outside;
  if (m.context.count == 0) return "";
  std::string s = "outside_memory:\n";
  const auto part = [&](const char* key, Bytes n, const char* how) {
    s += fmt::format("  {}: {{value: {} B, source: '{}: {}'}}\n", key, n.count, p.provenance, how);
  };
  part("context", m.context, "NVML, after the context less before it");
  part("kernels", m.kernels, "cudaMemGetInfo, what the other parts leave, the most of all runs");
  part("libraries", m.libraries, "cudaMemGetInfo, before and after cublasLtCreate and cudnnCreate");
  part("workspace", m.workspace, "counted, at the end of a run, the median");
  if (!m.by_ranks.empty()) s += "  communicators:\n";
  for (const auto& [ranks, bytes] : m.by_ranks)
    s += fmt::format(
        "    - {{ranks: {}, value: {} B, source: '{}: cudaMemGetInfo, before ncclCommSplit "
        "and after the first collective'}}\n",
        ranks, bytes.count, p.provenance);
  return s;
}

/// Of a GPU: its figures measured or its own, the rest assumed.
std::string gpu_yaml(const Profile& p) {
  std::map<std::string, double> rates;  // by type
  double bandwidth = 0, largest = 0, latency = 0;
  for (const auto& [kernel, points] : p.kernels) {
    const std::size_t space = kernel.rfind(' ');
    const std::string last = space == std::string::npos ? "" : kernel.substr(space + 1);
    const bool typed = last == "bf16" || last == "fp16" || last == "tf32" || last == "fp8";
    for (const KernelPoint& x : points) {
      if (kernel == "copy" && x.bytes > largest)
        largest = x.bytes, bandwidth = x.bytes / x.time.count;
      const bool moves = kernel.rfind("copy", 0) == 0 || kernel == "load" || kernel == "slice";
      if (!moves && (latency == 0 || x.time.count < latency)) latency = x.time.count;
      // Attention's causal half is counted whole there: no rate of products.
      if (x.m > 0 && kernel.rfind("linear", 0) == 0) {
        double& rate = rates[typed ? last : "fp32"];
        rate = std::max(rate, 2 * x.m * x.n * x.k * x.count / x.time.count);
      }
    }
  }
  const GpuFacts& g = *p.gpu;
  std::string s = fmt::format(
      "schema: partita.device/1\nname: calibrated-gpu\nsource: '{0}'\n"
      "memory: {{value: {1} MiB, source: '{2}: its own word'}}\n"
      "usable_memory: {{value: {3} MiB, source: '{4}'}}\n",
      p.provenance, g.memory.count >> 20, g.name,
      g.usable.count > 0 ? g.usable.count >> 20 : (g.memory.count >> 20) - 512,
      g.usable.count > 0 ? p.provenance + ": free beside a context and its libraries"
                         : "memory less 0.5 GiB of context (assumed)");
  const auto figure = [&](const std::string& key, double value, double assumed,
                          const std::string& unit, const std::string& how) {
    s += value > 0 ? fmt::format("{}: {{value: {:.5g} {}, source: '{}: {}'}}\n", key, value, unit,
                                 p.provenance, how)
                   : fmt::format("{}: {{value: {:g} {}, source: assumed}}\n", key, assumed, unit);
  };
  figure("memory_bandwidth", bandwidth / 1e9, 1000, "GB/s", "the largest copy");
  s += "matrix_rates:\n";
  for (const char* type : {"fp32", "tf32", "bf16", "fp16", "fp8"}) {
    const auto it = rates.find(type);
    // A GPU without 8-bit units has no rate of them.
    if (it == rates.end() && std::string_view(type) == "fp8") continue;
    figure(fmt::format("  {}", type), it == rates.end() ? 0 : it->second / 1e12, 50, "TFLOP/s",
           "the fastest product");
  }
  s += "vector_rate: {value: 30 TFLOP/s, source: assumed}\n";
  s +=
      fmt::format("matrix_efficiency: {{value: {}, source: assumed}}\n", rates.empty() ? 0.6 : 1.0);
  s += fmt::format("memory_efficiency: {{value: {}, source: assumed}}\n", bandwidth > 0 ? 1 : 0.8);
  figure("kernel_latency", latency * 1e6, 3, "us", "the shortest kernel");
  const auto apart = [&](const char* key, Seconds t, double spread) {
    if (t.count > 0)
      s += fmt::format("{}: {{value: {:.6g} us, source: '{}: spread {:.3f}'}}\n", key,
                       t.count * 1e6, p.provenance, spread);
  };
  apart("dispatch", p.dispatch, p.dispatch_spread);
  apart("dispatch_in_graph", p.in_graph, p.in_graph_spread);
  apart("launch", p.launch, p.launch_spread);
  apart("list_row", p.list_row, p.list_row_spread);
  s += fmt::format(
      "multiprocessors: {{value: {}, source: '{}: its own word'}}\n"
      "compute_capability: {{value: {}, source: '{}: its own word'}}\n",
      g.multiprocessors, g.name, g.compute_capability, g.name);
  return s + outside_yaml(p);
}

std::string kernels_yaml(const Profile& p);
std::string slowdown_yaml(const Profile& p);

}  // namespace

std::string device_yaml(const Profile& p) {
  if (p.gpu) return gpu_yaml(p) + slowdown_yaml(p) + kernels_yaml(p);
  // What the tables do not hold is priced by rates: those of the largest copy and the fastest
  // product.
  double bandwidth = 0, largest = 0, product = 0;
  for (const auto& [kernel, points] : p.kernels) {
    for (const KernelPoint& x : points) {
      if (x.ranks == 1 && kernel == "copy" && x.bytes > largest)
        largest = x.bytes, bandwidth = x.bytes / x.time.count;
      if (x.m > 0) product = std::max(product, 2 * x.m * x.n * x.k * x.count / x.time.count);
    }
  }
  const auto figure = [&](double measured, double assumed, const std::string& unit,
                          const std::string& how) {
    return measured > 0 ? fmt::format("{{value: {:.4g} {}, source: '{}: {}'}}", measured / 1e9,
                                      unit, p.provenance, how)
                        : fmt::format("{{value: {:g} {}, source: assumed}}", assumed, unit);
  };
  const std::string rate = figure(product, 80, "GFLOP/s", "the fastest product");
  std::string s = fmt::format(
      "schema: partita.device/1\nname: calibrated-cpu\nsource: '{}'\n"
      "memory: {{value: 4 GiB, source: assumed}}\nusable_memory: {{value: 3584 MiB, source: "
      "assumed}}\n"
      "memory_bandwidth: {}\nmatrix_rates: {{fp32: {}, bf16: {}, fp16: {}, fp8: {}}}\n"
      "vector_rate: {{value: 20 GFLOP/s, source: assumed}}\n"
      "matrix_efficiency: {{value: {}, source: assumed}}\n"
      "memory_efficiency: {{value: {}, source: assumed}}\n"
      "kernel_latency: {{value: 1 us, source: assumed}}\nmultiprocessors: {}\n"
      "concurrent_streams: false\nhost_cores: {}\n"
      "{}{}",
      p.provenance, figure(bandwidth, 10, "GB/s", "the largest copy, one rank"), rate, rate, rate,
      rate, product > 0 ? "1" : "0.6", bandwidth > 0 ? "1" : "0.8", p.cores, p.cores,
      !p.dispatch_measured
          ? ""
          : fmt::format("dispatch: {{value: {:.6g} us, source: '{}: spread {:.3f}'}}\n",
                        p.dispatch.count * 1e6, p.provenance, p.dispatch_spread),
      !p.overlap_measured ? ""
                          : fmt::format("overlap: {{value: {:.3f}, source: '{}: spread {:.3f}'}}\n",
                                        p.overlap, p.provenance, p.overlap_spread));
  return s + slowdown_yaml(p) + kernels_yaml(p);
}

namespace {

std::string slowdown_yaml(const Profile& p) {
  std::string s = p.slowdown.empty() ? "" : "slowdown:\n";
  for (const SlowdownPoint& x : p.slowdown)
    s += fmt::format(
        "  - {{kernel: {}, beside: {}, {}: {}, bytes: {} B, of_kernel: {:.4f}, of_transfer: "
        "{:.4f}, spread: {:.3f}}}\n",
        name(x.kernel), x.beside, x.beside == kStandIn ? "multiprocessors" : "ranks",
        x.beside == kStandIn ? x.multiprocessors : x.ranks, x.bytes.count, x.of_kernel,
        x.of_transfer, x.spread);
  return s;
}

std::string kernels_yaml(const Profile& p) {
  std::string s = "kernels:\n";
  for (const auto& [kernel, points] : p.kernels) {
    s += fmt::format("  '{}':\n", kernel);
    for (const KernelPoint& x : points) {
      s += fmt::format("    - {{ranks: {}", x.ranks);
      if (x.m > 0)
        s += fmt::format(", m: {:g}, n: {:g}, k: {:g}, count: {:g}", x.m, x.n, x.k, x.count);
      s += fmt::format(", bytes: {} B, time: {:.6g} us, spread: {:.3f}}}\n",
                       static_cast<std::int64_t>(x.bytes), x.time.count * 1e6, x.spread);
    }
  }
  return s;
}

}  // namespace

std::string cluster_yaml(const Profile& p, const std::string& device_file, int devices) {
  // A GPU's way to its host's memory: the slower direction of the largest copy, the time of the
  // smallest.
  std::string link = "kind: other, bandwidth: 10 GB/s, latency: 0.2 us";
  double rate = 0, latency = 0;
  for (const char* kernel : {"copy to host", "copy from host"}) {
    const auto found = p.kernels.find(kernel);
    if (found == p.kernels.end() || found->second.empty()) continue;
    const auto by_bytes = [](const KernelPoint& a, const KernelPoint& b) {
      return a.bytes < b.bytes;
    };
    const auto [least, most] =
        std::minmax_element(found->second.begin(), found->second.end(), by_bytes);
    const double one = most->bytes / most->time.count;
    rate = rate > 0 ? std::min(rate, one) : one;
    latency = std::max(latency, least->time.count);
  }
  if (p.gpu && rate > 0)
    link = fmt::format("kind: pcie, bandwidth: {:.4g} GB/s, latency: {:.4g} us", rate / 1e9,
                       latency * 1e6);
  std::string s = fmt::format(
      "schema: partita.topology/1\nname: calibrated-host\nsource: '{}'\n"
      "nodes:\n  - count: 1\n    cpu_vendor: other\n    vertices:\n      'rank[0-{}]': {{kind: "
      "device, device: '{}'}}\n"
      "      memory: {{kind: cpu}}\n    links:\n"
      "      - {{from: 'rank[0-{}]', to: memory, {}}}\n",
      p.provenance, devices - 1, device_file, devices - 1, link);
  if (p.collectives.empty()) return s;
  s += "collectives:\n";
  for (const auto& [kind, points] : p.collectives) {
    s += fmt::format("  {}:\n", kind);
    for (const CollectivePoint& x : points)
      s += fmt::format(
          "    - {{ranks: {}, at_work: {}, bytes: {} B, time: {:.6g} us, spread: {:.3f}}}\n",
          x.ranks, x.working(), x.bytes.count, x.time.count * 1e6, x.spread);
  }
  return s;
}

std::vector<SuiteCase> suite() {
  TransformerConfig gpt = decoder(64, 32, 256, 4, 160, false);
  gpt.name = "gpt";
  gpt.layers = 4;
  TransformerConfig llama = decoder(96, 32, 256, 4, 240, true);
  llama.name = "llama";
  llama.layers = 2;
  TransformerConfig mixtral = mixture(48, 32, 64);
  mixtral.name = "mixtral";
  mixtral.layers = 2;
  const Graph g = build_transformer(gpt), l = build_transformer(llama),
              x = build_transformer(mixtral), c = images("cnn", 16, 16), d = build_mnist_linear();
  std::vector<SuiteCase> all;
  const auto add = [&](const Graph& graph, const std::string& name, auto change) {
    SuiteCase one;
    one.graph = graph;
    one.plan = single_precision();
    // Adam divides by its own estimate of the gradient: where that is all rounding, so is the
    // update. One network has it, the others' parameters are compared as they are.
    if (&graph != &g) one.plan.optimizer.kind = OptimizerKind::sgd;
    one.plan.micro_batch = 4;
    change(one.plan);
    if (one.plan.global_batch == 0) one.plan.global_batch = one.plan.micro_batch * one.plan.dp;
    one.ranks = one.plan.ranks();
    one.name = fmt::format("{} {}", graph.name, name);
    all.push_back(std::move(one));
  };
  for (const Graph* any : {&g, &l, &x, &c}) {
    add(*any, "1 rank", [](Plan&) {});
    add(*any, "dp 2", [](Plan& p) { p.dp = 2, p.micro_batch = 2; });
    add(*any, "dp 4", [](Plan& p) { p.dp = 4, p.micro_batch = 1; });
  }
  add(d, "1 rank", [](Plan& p) { p.micro_batch = 128; });
  add(d, "dp 4", [](Plan& p) { p.micro_batch = 32, p.dp = 4; });
  for (const Graph* any : {&g, &l}) {
    add(*any, "2 micro-batches", [](Plan& p) { p.micro_batch = 2, p.global_batch = 4; });
    add(*any, "full recompute", [](Plan& p) { p.recompute = {Recompute::full}; });
    add(*any, "tp 2", [](Plan& p) { p.tp = 2; });
    add(*any, "tp 2 sequence parallel", [](Plan& p) { p.tp = 2, p.sequence_parallel = true; });
    add(*any, "pp 2", [](Plan& p) { p.pp = 2, p.micro_batch = 1, p.global_batch = 4; });
    add(*any, "dp 2 ZeRO-1", [](Plan& p) { p.dp = 2, p.micro_batch = 2, p.zero = 1; });
    add(*any, "dp 2 ZeRO-3", [](Plan& p) { p.dp = 2, p.micro_batch = 2, p.zero = 3; });
    add(*any, "cp 2", [](Plan& p) { p.cp = 2; });
    add(*any, "tp 2 dp 2", [](Plan& p) { p.tp = 2, p.dp = 2, p.micro_batch = 2; });
    add(*any, "pp 2 dp 2",
        [](Plan& p) { p.pp = 2, p.dp = 2, p.micro_batch = 1, p.global_batch = 8; });
  }
  // Every other row of the plans that there are.
  add(g, "pp 2 zero bubble", [](Plan& p) {
    p.pp = 2, p.micro_batch = 1, p.global_batch = 4;
    p.schedule = Schedule::zero_bubble_h1, p.schedule_given = true;
  });
  add(g, "pp 2 DualPipe", [](Plan& p) {
    p.pp = 2, p.micro_batch = 1, p.global_batch = 4;
    p.schedule = Schedule::dualpipe, p.schedule_given = true;
  });
  add(g, "pp 2 interleaved", [](Plan& p) {
    p.pp = 2, p.virtual_stages = 2, p.micro_batch = 1, p.global_batch = 4;
    p.schedule = Schedule::interleaved, p.schedule_given = true;
  });
  add(g, "pp 3 message queue",
      [](Plan& p) { p.pp = 3, p.message_queue = true, p.micro_batch = 1, p.global_batch = 4; });
  add(g, "offloaded optimizer", [](Plan& p) { p.offload_optimizer = true; });
  add(g, "offloaded activations", [](Plan& p) { p.offload_activations = true; });
  add(g, "clipped, loss scaled", [](Plan& p) {
    p.optimizer.clip = 0.5;
    p.loss_scale = {256, true, 1};
  });
  for (const auto kind : {CompressionKind::cast, CompressionKind::top_k, CompressionKind::one_bit,
                          CompressionKind::power_sgd}) {
    add(l, fmt::format("dp 2 {}", name(kind)), [&](Plan& p) {
      p.dp = 2, p.micro_batch = 2;
      p.compression.kind = kind;
    });
  }
  add(l, "dp 3, 1 server", [](Plan& p) { p.dp = 3, p.micro_batch = 1, p.servers = 1; });
  add(l, "dp 3, 1 server, stale",
      [](Plan& p) { p.dp = 3, p.micro_batch = 1, p.servers = p.staleness = 1; });
  add(l, "tp 2 overlapped",
      [](Plan& p) { p.tp = 2, p.sequence_parallel = p.overlap_tensor_parallel = true; });
  add(l, "cp 2 ring", [](Plan& p) { p.cp = 2, p.context = Plan::ContextExchange::ring; });
  add(l, "2 replicas, local SGD", [](Plan& p) {
    p.strategy = "replicas";
    p.dp = 2, p.micro_batch = 2, p.average_every = 1;
  });
  add(c, "dp 2 loaders", [](Plan& p) { p.dp = 2, p.micro_batch = 2, p.loader = true; });
  add(c, "dp 2 sharded storage",
      [](Plan& p) { p.dp = 2, p.micro_batch = 2, p.sharded_storage = true; });
  add(x, "ep 2 dp 2", [](Plan& p) { p.ep = 2, p.dp = 2, p.micro_batch = 2; });
  add(x, "tp 2", [](Plan& p) { p.tp = 2; });
  add(images("cnn synchronised", 16, 16, true), "spatial 2",
      [](Plan& p) { p.strategy = "spatial", p.tp = 2; });
  return all;
}

std::vector<SuiteCase> gpu_suite() {
  std::vector<SuiteCase> all;
  const auto add = [&](const char* model, int layers, std::int64_t sequence, std::int64_t batch) {
    ModelOptions o;
    o.layers = layers;
    o.sequence = sequence;
    SuiteCase one;
    one.graph = load_model(model, o);
    one.plan = single_precision();
    set_precision(one.plan, "bf16", "");
    one.plan.micro_batch = one.plan.global_batch = batch;
    one.name =
        fmt::format("{}{}{}, batch {}", model, layers > 0 ? fmt::format(" x {}", layers) : "",
                    sequence > 0 ? fmt::format(", {} tokens", sequence) : "", batch);
    all.push_back(std::move(one));
  };
  add("gpt2", 0, 1024, 4);
  add("llama-3-8b", 2, 4096, 1);
  add("gpt3-1.3b", 0, 2048, 1);
  add("mixtral-8x7b", 1, 4096, 1);
  add("bert-large", 0, 512, 8);
  add("resnet-50", 0, 0, 32);
  add("vgg-16", 0, 0, 32);
  return all;
}

}  // namespace partita::validation
