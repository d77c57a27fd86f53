// A training step in which transfers share links and compute shares the device with them: the
// page's examples by hand, and laws.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>

#include "base/yaml.h"
#include "simulator/cost/axes.h"
#include "simulator/engine/collectives.h"
#include "simulator/engine/contend.h"
#include "simulator/engine/device_use.h"
#include "simulator/engine/links.h"
#include "simulator/engine/simulate.h"
#include "simulator/engine/step_graph.h"
#include "tests/simulator/clusters.h"
#include "tests/simulator/networks.h"

namespace partita {
namespace {

constexpr const char* kShared = R"(schema: partita.topology/1
name: shared
source: made up
nodes:
  - count: 2
    vertices:
      gpu[0-1]: {kind: device, device: h100-sxm}
      switch0: {kind: nvswitch}
      nic0: {kind: nic, bandwidth: 10 GB/s, latency: 1 us}
    links:
      - {from: "gpu[0-1]", to: switch0, kind: nvlink, bandwidth: 450 GB/s, latency: 0.5 us}
      - {from: "gpu[0-1]", to: nic0, kind: pcie, bandwidth: 63 GB/s, latency: 0.25 us}
fabric: {kind: single switch}
)";

BufferId buffer(Program& p, std::int64_t elements, ElementType type, Layout layout = {}) {
  Buffer b;
  b.name = "buffer";
  b.category = Category::buffers;
  b.scope = Scope::step;
  b.type = type;
  b.shape = {{Dim::feature, elements}};
  layout.dims.resize(1);
  b.layout = layout;
  p.buffers.push_back(b);
  return BufferId{p.buffers.size() - 1};
}

Program program(Mesh mesh) {
  Program p;
  p.mesh = std::move(mesh);
  p.streams = {"compute", "communication"};
  p.blocks.resize(1);
  p.blocks[0].name = "step";
  p.blocks[0].kind = BlockKind::step;
  p.stages = {{{BlockId{0}, -1}}};
  return p;
}

void all_reduce(Program& p, AtomMask atoms, std::int64_t elements) {
  Layout owed;
  owed.partial = atoms;
  Instruction i;
  i.kind = Kind::collective;
  i.collective = CollectiveKind::all_reduce;
  i.atoms = atoms;
  i.stream = 1;
  i.reads = {buffer(p, elements, ElementType::fp32, owed)};
  i.writes = {buffer(p, elements, ElementType::fp32)};
  p.blocks[0].instructions.push_back(i);
}

void kernel(Program& p, Kernel kernel, std::int64_t elements, ElementType type) {
  Instruction i;
  i.kernel = kernel;
  if (kernel == Kernel::add) i.reads = {buffer(p, elements, type)};
  i.writes = {buffer(p, elements, type)};
  p.blocks[0].instructions.push_back(i);
}

Timeline run(const Program& p, const Topology& t, Network network) {
  Communication communication(t);
  SimulateOptions options;
  options.network = network;
  options.record = true;
  return simulate(p, communication, options);
}

// docs/sharing.md, "A training step".
TEST(Contention, TwoGroupsShareANetworkCard) {
  const Topology t = without_nccl(kShared);
  Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});  // {0, 2} and {1, 3}: both over the one card
  all_reduce(p, bit(0), 25'000'000);                  // 100 MB
  const Timeline idle = run(p, t, Network::idle), flows = run(p, t, Network::flows);
  // Alone: 3 us + 2 steps of 2.5 us + 100 MB at 10 GB/s. Two share: twice the bytes' time.
  EXPECT_EQ(idle.step.count, (3'000'000 + 2 * 2'500'000) + 10'000'000'000);
  EXPECT_NEAR(static_cast<double>(flows.step.count),
              (3'000'000 + 2 * 2'500'000) + 2 * 10'000'000'000.0, 100);
  ASSERT_FALSE(flows.contended.empty());
  EXPECT_EQ(flows.contended[0].what, "exposed:dp");
  EXPECT_NE(flows.contended[0].resource.find("nic0->switch"), std::string::npos)
      << flows.contended[0].resource;
  EXPECT_NEAR(static_cast<double>(flows.contended[0].lost.count), 10'000'000'000.0, 100);
  // The same for a trace: every entry says over what.
  ASSERT_EQ(flows.entries.size(), 1u);
  EXPECT_NEAR(static_cast<double>(flows.entries[0].lost.count), 10'000'000'000.0, 100);
  ASSERT_EQ(flows.resources.size(), 1u);
  EXPECT_EQ(flows.resources[0], flows.contended[0].resource);
  EXPECT_EQ(idle.entries[0].over, -1);
}

TEST(Contention, OneGroupHasTheNetworkToItself) {
  const Topology t = without_nccl(kShared);
  Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
  all_reduce(p, bit(1), 25'000'000);  // {0, 1} and {2, 3}: each in its node
  EXPECT_EQ(run(p, t, Network::flows).step, run(p, t, Network::idle).step);
}

TEST(Contention, KernelsGiveWayToTransfers) {
  const Topology t = without_nccl(kShared);
  const auto first_end = [&](const Timeline& timeline) {
    std::int64_t end = 0;
    for (const Entry& e : timeline.entries) {
      if (e.instruction == 1) end = std::max(end, (e.end - e.start).count);
    }
    return static_cast<double>(end);
  };
  {
    // A copy of 1 GB: 2 GB over 3.015 TB/s = 663.350 us. The all-reduce of 1 GB in a node moves 1
    // GB at 450 GB/s, 2.22 ms, and takes 2.5 bytes of memory for each: 1.125 TB/s of 3.015, so that
    // the copy gets 0.62687.
    Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
    all_reduce(p, bit(1), 250'000'000);
    kernel(p, Kernel::add, 250'000'000, ElementType::fp32);
    const double alone = 2e9 / 3.015e12 * 1e12;
    EXPECT_NEAR(first_end(run(p, t, Network::idle)), 3e6 + alone, 2);
    const double shared = first_end(run(p, t, Network::flows));
    // The all-reduce begins to move after 5 us, the copy after 3: for 2 it has the memory to
    // itself.
    const double head = 2e6;
    EXPECT_NEAR(shared, 3e6 + head + (alone - head) / (1 - 1.125 / 3.015), 20);
    EXPECT_NEAR(first_end(run(p, t, Network::beside)), shared, 20);
  }
  {
    // Random numbers in bf16: 60 operations each, 66.9 TFLOP/s; memory is not what limits. The
    // all-reduce keeps 24 of 132 multiprocessors.
    Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
    all_reduce(p, bit(1), 250'000'000);
    kernel(p, Kernel::initialise, 500'000'000, ElementType::bf16);
    const double alone = 60 * 5e8 / 66.9e12 * 1e12;
    EXPECT_NEAR(first_end(run(p, t, Network::idle)), 3e6 + alone, 2);
    EXPECT_NEAR(first_end(run(p, t, Network::flows)), 3e6 + alone * 132 / 108, 20);
    EXPECT_NEAR(first_end(run(p, t, Network::beside)), 3e6 + alone * 132 / 108, 20);
  }
}

constexpr const char* kOneGpu = R"(schema: partita.topology/1
name: one
source: made up
nodes:
  - count: 1
    vertices:
      gpu0: {kind: device, device: here.yaml}
      cpu0: {kind: cpu}
    links:
      - {from: gpu0, to: cpu0, kind: pcie, bandwidth: 64 GB/s, latency: 0.5 us}
)";

Topology seats(const Topology& t, int ranks, bool mps) {
  ClusterState state;
  state.ranks_per_device = ranks;
  state.mps = mps;
  return t.in_state(std::move(state));
}

// docs/sharing.md, "Several ranks on a device".
TEST(Contention, RanksOfADeviceShareIt) {
  const Topology t = cluster(kOneGpu, {"1 TFLOP/s", "1 TFLOP/s", "2 TB/s", "3 us", 0});
  // 20 MB and 2.5 million additions: 10 us, a quarter of the units' time.
  Program sums = program(Mesh{{{"dp", 1}}});
  kernel(sums, Kernel::add, 2'500'000, ElementType::fp32);
  EXPECT_EQ(run(sums, seats(t, 1, false), Network::flows).step.count, 13'000'000);
  for (const int ranks : {2, 3}) {
    sums.mesh = Mesh{{{"dp", ranks}}};
    for (const bool mps : {false, true}) {
      const Timeline folded = run(sums, seats(t, ranks, mps), Network::flows);
      EXPECT_NEAR(static_cast<double>(folded.step.count), 3e6 + ranks * 10e6, 2);
      EXPECT_EQ(folded.classes.size(), 1u);
      ASSERT_FALSE(folded.contended.empty());
      EXPECT_EQ(folded.contended[0].resource, mps ? "memory" : "multiprocessors");
    }
    EXPECT_EQ(run(sums, seats(t, ranks, false), Network::idle).step.count, 13'000'000);
  }
  // Another stage's kernel: 60 operations for each of 4 bytes, 10 us of the units.
  Program p = program(Mesh{{{"pp", 2}}});
  p.pipeline = {AtomId{0}};
  p.blocks.push_back(p.blocks[0]);
  p.stages = {{{BlockId{0}, -1}}, {{BlockId{1}, -1}}};
  kernel(p, Kernel::add, 2'500'000, ElementType::fp32);
  std::swap(p.blocks[0].instructions, p.blocks[1].instructions);
  kernel(p, Kernel::initialise, 166'667, ElementType::fp32);
  EXPECT_NEAR(static_cast<double>(run(p, seats(t, 2, true), Network::flows).step.count),
              3e6 + 10e6 * 31 / 30, 100);
}

TEST(Contention, RanksOfADeviceTalkOverItsHost) {
  const Topology t = cluster(kOneGpu, {"1 TFLOP/s", "1 TFLOP/s", "2 TB/s", "3 us", 0});
  const auto message = [&](int ranks, bool mps) {
    Communication c(seats(t, ranks, mps));
    return c.point_to_point(Bytes{64'000'000}, 0, 1).count;
  };
  EXPECT_NEAR(message(2, false), 3e-6 + 2 * 0.5e-6 + 2.18e-3 + 1e-3, 1e-12);
  EXPECT_NEAR(message(3, false), 3e-6 + 2 * 0.5e-6 + 2 * 2.18e-3 + 1e-3, 1e-12);
  EXPECT_NEAR(message(2, true), 3e-6 + 2 * 0.5e-6 + 1e-3, 1e-12);
}

// docs/sharing.md, "Beside its own transfers".
TEST(Contention, AKernelIsSlowerOnlyWhileTransfersRun) {
  DeviceUse kernel;
  kernel.units = 1;
  kernel.memory = 0.5;
  // 100 ticks of work from 10; a quarter of the units is kept from 30 to 70, 0.8 of the memory
  // from 50 to 60.
  const std::vector<Running> running{{30, 40, 70, 0.25, 0, 0}, {45, 50, 60, 0, 0.8, 1}};
  // 20 by 30, 15 by 50, 10 · 0.2 / 0.5 = 4 by 60, 7.5 by 70; 53.5 more.
  EXPECT_EQ(end_beside(0, 10, 100, kernel, running), 124);
  EXPECT_EQ(end_beside(0, 10, 20, kernel, running), 30);  // over before
  EXPECT_EQ(end_beside(70, 0, 20, kernel, running), 90);  // begins when all have ended
  EXPECT_EQ(end_beside(0, 30, 30, kernel, running), 74);  // 15 + 4 + 7.5 by 70, 3.5 more
  // All is kept: it waits.
  EXPECT_EQ(end_beside(0, 0, 5, kernel, {{2, 2, 9, 1, 0, 0}}), 12);
}

SlowdownPoint slowdown(KernelFamily family, const char* beside, int ranks, int multiprocessors,
                       Bytes bytes, double of_kernel, double of_transfer) {
  SlowdownPoint p;
  p.kernel = family;
  p.beside = beside;
  p.ranks = ranks;
  p.multiprocessors = multiprocessors;
  p.bytes = bytes;
  p.of_kernel = of_kernel;
  p.of_transfer = of_transfer;
  return p;
}

// docs/sharing.md, "Kernels and transfers at once, as measured".
TEST(AtOnce, SlowdownsLieBetweenMeasuredOnes) {
  constexpr auto kProduct = KernelFamily::product;
  SlowdownTable t{slowdown(kProduct, "all_reduce", 8, 0, 1_MiB, 1.2, 1.5),
                  slowdown(kProduct, "all_reduce", 8, 0, 16_MiB, 1.4, 1.1),
                  slowdown(kProduct, "all_reduce", 2, 0, 1_MiB, 3, 3)};
  const auto of = [&](const char* kind, int ranks, Bytes bytes, int multiprocessors = 16) {
    return measured_slowdown(t, kProduct, kind, ranks, bytes, multiprocessors);
  };
  EXPECT_NEAR(of("all_reduce", 8, 4_MiB).of_kernel, 1.3, 1e-12);
  EXPECT_NEAR(of("all_reduce", 8, 4_MiB).of_transfer, 1.3, 1e-12);
  EXPECT_EQ(of("all_reduce", 8, 64_MiB).of_kernel, 1.4);
  EXPECT_EQ(of("all_reduce", 8, 0_B).of_kernel, 1.2);
  EXPECT_EQ(of("all_reduce", 64, 16_MiB).of_kernel, 1.4);
  EXPECT_EQ(of("all_reduce", 3, 16_MiB).of_kernel, 3);
  // Another kind: the first that there is, unless there is a stand-in.
  EXPECT_NEAR(of("broadcast", 8, 4_MiB).of_kernel, 1.3, 1e-12);
  t.insert(t.begin(), slowdown(kProduct, "stand_in", 1, 24, 720_MiB, 1.3, 1.0));
  t.insert(t.begin(), slowdown(kProduct, "stand_in", 1, 8, 240_MiB, 1.1, 1.2));
  EXPECT_NEAR(of("all_reduce", 8, 4_MiB).of_kernel, 1.3, 1e-12);
  EXPECT_NEAR(of("broadcast", 8, 4_MiB).of_kernel, 1.2, 1e-12);
  EXPECT_NEAR(of("broadcast", 8, 4_MiB, 4).of_kernel, 1.05, 1e-12);
  EXPECT_NEAR(of("broadcast", 8, 4_MiB, 4).of_transfer, 1.1, 1e-12);
  EXPECT_EQ(of("broadcast", 8, 4_MiB, 100).of_kernel, 1.3);
  EXPECT_EQ(of("broadcast", 8, 4_MiB, 0).of_kernel, 1);
  // Two of one size: the mean.
  t.push_back(slowdown(kProduct, "send", 2, 0, 1_MiB, 1, 1));
  t.push_back(slowdown(kProduct, "send", 2, 0, 1_MiB, 2, 2));
  EXPECT_EQ(of("send", 2, 8_MiB).of_kernel, 1.5);
  // Of kernels that were not measured nothing is known.
  EXPECT_EQ(measured_slowdown(t, KernelFamily::memory, "all_reduce", 8, 1_MiB, 8).of_kernel, 0);
}

TEST(AtOnce, EveryCollectiveHasItsNameInADevicesFile) {
  std::set<std::string_view> all{"send", kStandIn};
  for (int k = 0; k < kCollectiveKinds; ++k) all.insert(name(static_cast<CollectiveKind>(k)));
  EXPECT_EQ(all, std::set<std::string_view>(transfers_beside().begin(), transfers_beside().end()));
  EXPECT_EQ(all.size(), transfers_beside().size());
}

TEST(AtOnce, EachIsSlowerWhileTheOtherRuns) {
  DeviceUse kernel, transfer;
  kernel.family = 0;
  // What it takes counts no more.
  kernel.units = kernel.memory = 1;
  transfer.units = transfer.memory = 0.75;
  transfer.slows[0] = {2, 1.5};
  const std::vector<Running> none;
  bool given = false;
  const auto next = [&](std::int64_t free) -> std::optional<Coming> {
    if (given) return {};
    given = true;
    EXPECT_EQ(free, 0);
    return Coming{0, 10, 100, &kernel};
  };
  EXPECT_EQ(end_beside_kernels(30, 10, 60, transfer, 0, next, none), 130);
  const std::vector<Running> running{{30, 40, 130, 0.75, 0.75, 0, transfer.slows}};
  EXPECT_EQ(end_beside(0, 10, 100, kernel, running), 160);
  // It moves before the kernel begins, beside it, and after its end.
  const auto at = [&](std::int64_t start, std::int64_t work) {
    given = false;
    return end_beside_kernels(
        0, 0, work, transfer, 0,
        [&](std::int64_t) -> std::optional<Coming> {
          if (given) return {};
          given = true;
          return Coming{start, 0, 30, &kernel};  // 60 beside the transfer
        },
        none);
  };
  EXPECT_EQ(at(20, 20), 20);
  EXPECT_EQ(at(20, 21), 22);  // 1.5, rounded up
  EXPECT_EQ(at(20, 60), 80);  // 20 and 60 / 1.5
  EXPECT_EQ(at(20, 70), 90);
  // Of two transfers the one that slows more counts.
  std::vector<Running> two{{0, 0, 50, 0, 0, 0, {{{2, 1}, {}, {}}}},
                           {0, 0, 100, 0, 0, 1, {{{4, 1}, {}, {}}}}};
  EXPECT_EQ(end_beside(0, 0, 50, kernel, two), 125);
  // A kernel of another family knows what is left of units and memory, nothing else.
  DeviceUse derived;
  derived.units = 1;
  EXPECT_EQ(end_beside(0, 0, 30, derived, running), 30);
  EXPECT_EQ(end_beside(0, 0, 40, derived, running), 70);
}

/// The cluster, whose devices have these slowdowns.
Topology with_slowdown(const std::string& lines) {
  std::string pattern = (std::filesystem::temp_directory_path() / "partita-test-XXXXXX").string();
  const std::string folder = mkdtemp(pattern.data());
  std::ifstream in(data_folder("topologies/devices/h100-sxm.yaml"));
  std::ofstream(folder + "/here.yaml")
      << std::string(std::istreambuf_iterator<char>(in), {}) << "\n"
      << (lines.empty() ? "" : "slowdown:\n" + lines);
  std::string text = kShared;
  text.replace(text.find("h100-sxm"), 8, "here.yaml");
  std::ofstream(folder + "/cluster.yaml") << text;
  Topology t = load_topology(folder + "/cluster.yaml", without_nccl());
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  return t;
}
std::string line(const char* family, double of_kernel, double of_transfer) {
  return fmt::format(
      "  - {{kernel: {}, beside: all_reduce, ranks: 2, bytes: 1 GB, of_kernel: {}, of_transfer: "
      "{}}}\n",
      family, of_kernel, of_transfer);
}

/// An instruction of the timeline's first class, from start to end.
std::pair<double, double> span(const Timeline& t, std::int32_t instruction) {
  for (const Entry& e : t.entries) {
    if (e.rank_class == 0 && e.instruction == instruction)
      return {static_cast<double>(e.start.count), static_cast<double>(e.end.count)};
  }
  ADD_FAILURE() << "instruction " << instruction << " was not played";
  return {};
}

TEST(AtOnce, PredictionsFollowTheTable) {
  // In a node 1 GB all-reduced: 5 us, then 2.222 ms. Five copies of 1 GB beside it, of 3 us and
  // 663.350 us alone: 3.3 ms in all, more than it takes.
  Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
  all_reduce(p, bit(1), 250'000'000);
  for (int k = 0; k < 5; ++k) kernel(p, Kernel::add, 250'000'000, ElementType::fp32);
  const double copy = 2e9 / 3.015e12 * 1e12, moves = 1e9 / 450e9 * 1e12;
  for (const Network network : {Network::beside, Network::flows}) {
    SCOPED_TRACE(name(network));
    const auto at = [&](const std::string& lines, std::int32_t instruction) {
      const auto [start, end] = span(run(p, with_slowdown(lines), network), instruction);
      return end - start;
    };
    const std::string twice = line("memory", 2, 1.25);
    // The copy that begins with it is covered by it: twice as long.
    EXPECT_NEAR(at(twice, 1), 3e6 + 2 * copy, 20);
    EXPECT_NEAR(at(twice, 0), 5e6 + 1.25 * moves, 20);
    EXPECT_GT(at(twice, 1), at("", 1));
    // Products alone were measured: copies are derived as without a table.
    EXPECT_EQ(at(line("product", 2, 2), 1), at("", 1));
    EXPECT_EQ(at(line("product", 2, 2), 0), at("", 0));
    // Slowdowns of 1: as on an idle network, though both want the memory.
    const Timeline free = run(p, with_slowdown(line("memory", 1, 1)), network),
                   idle = run(p, with_slowdown(""), Network::idle);
    ASSERT_EQ(free.entries.size(), idle.entries.size());
    for (std::int32_t k = 0; k < 6; ++k) EXPECT_EQ(span(free, k), span(idle, k)) << k;
  }
  // A second wave: a kernel that needs all multiprocessors, of which 24 of 132 are kept.
  Program units = program(Mesh{{{"dp", 2}, {"tp", 2}}});
  all_reduce(units, bit(1), 250'000'000);
  kernel(units, Kernel::initialise, 500'000'000, ElementType::bf16);
  const double alone = 60 * 5e8 / 66.9e12 * 1e12;
  for (const Network network : {Network::beside, Network::flows}) {
    const auto [from, to] = span(run(units, with_slowdown(""), network), 1);
    EXPECT_NEAR(to - from, 3e6 + alone * 132 / 108, 20);
    const auto [start, end] = span(run(units, with_slowdown(line("memory", 2, 1)), network), 1);
    EXPECT_NEAR(end - start, 3e6 + alone * 2, 20);
  }
  // In a trace and in the table it says over what.
  const Timeline t = run(p, with_slowdown(line("memory", 2, 1.25)), Network::flows);
  std::set<std::string> over;
  for (const Contended& c : t.contended) over.insert(c.resource);
  EXPECT_EQ(over, (std::set<std::string>{"kernels at once", "transfers at once"}));
}

TEST(AtOnce, RanksThatShareADeviceAreDerived) {
  Program p = program(Mesh{{{"dp", 4}, {"tp", 2}}});
  all_reduce(p, bit(1), 250'000'000);
  kernel(p, Kernel::add, 250'000'000, ElementType::fp32);
  const auto step = [&](const std::string& lines, Network network) {
    return run(p, seats(with_slowdown(lines), 2, true), network).step;
  };
  for (const Network network : {Network::beside, Network::flows})
    EXPECT_EQ(step(line("memory", 3, 3), network), step("", network));
}

/// Steps of a small network whose ranks share no link, on devices with random slowdowns: the same
/// played kernel by kernel and on shared resources; slower with any larger figure; folded or not.
TEST(AtOnce, BesideAndFlowsAgreeWhereNoLinkIsShared) {
  std::mt19937 rng{20261127};
  TransformerConfig c = small_config();
  c.sequence = c.positions = 2048;
  c.hidden = 2048;
  c.ffn = 8192;
  const Graph g = build_transformer(c);
  std::vector<Program> programs;
  for (const int kind : {0, 1, 2}) {
    Plan wanted = base_plan();
    if (kind == 0) wanted.tp = 2, wanted.sequence_parallel = true;
    if (kind > 0) wanted.dp = 2;
    if (kind == 2) wanted.zero = 3;
    programs.push_back(lowered(g, wanted));
  }
  const auto ratio = [&] { return 1 + static_cast<double>(rng() % 1000) / 500; };
  for (int n = 0; n < 24; ++n) {
    std::string lines;
    for (const char* family : {"product", "attention", "memory"}) {
      if (rng() % 4 == 0) continue;  // derived
      for (const char* kind : {"all_gather", "reduce_scatter", "all_reduce"})
        lines += fmt::format(
            "  - {{kernel: {}, beside: {}, ranks: 2, bytes: 1 MiB, of_kernel: {}, of_transfer: "
            "{}}}\n",
            family, kind, ratio(), ratio());
    }
    SCOPED_TRACE(lines);
    const Topology t = with_slowdown(lines);
    const Program& p = programs[static_cast<std::size_t>(n) % programs.size()];
    const Timeline idle = run(p, t, Network::idle), beside = run(p, t, Network::beside),
                   flows = run(p, t, Network::flows);
    EXPECT_LE(idle.step, beside.step);
    // A gather that is asked for ahead begins beside the block before, whose kernels were played.
    const double known = n % 3 == 2 ? 5e-3 : 1e-4;
    EXPECT_NEAR(static_cast<double>(beside.step.count), static_cast<double>(flows.step.count),
                known * static_cast<double>(flows.step.count));
    Communication communication(t);
    SimulateOptions options;
    for (const Network network : {Network::beside, Network::flows}) {
      options.network = network;
      options.unfolded = false, options.replay = true;
      const Ticks folded = simulate(p, communication, options).step;
      options.replay = false;
      EXPECT_EQ(simulate(p, communication, options).step, folded) << name(network);
      options.unfolded = true;
      EXPECT_EQ(simulate(p, communication, options).step, folded) << name(network);
    }
  }
}

/// Pipelines, tensor and data parallel at once over a shared card: folded as unfolded, replayed as
/// played; never faster than alone.
TEST(AtOnce, FoldedStepsAgreeToThePicosecond) {
  std::mt19937 rng{20261128};
  const auto ratio = [&] { return 1 + static_cast<double>(rng() % 1000) / 500; };
  const Graph g = build_transformer(small_config());
  for (int n = 0; n < 12; ++n) {
    Plan wanted = base_plan();
    (n % 3 == 0 ? wanted.pp : n % 3 == 1 ? wanted.tp : wanted.dp) = 2;
    (n % 3 == 0 ? wanted.tp : wanted.dp) *= 2;
    wanted.micro_batch = 1;
    wanted.global_batch = 4 * wanted.dp;
    const Program p = lowered(g, wanted);
    ASSERT_EQ(p.ranks(), 4);
    std::string lines;
    for (const char* family : {"product", "attention", "memory"}) {
      for (const char* kind : {"all_reduce", "send"})
        lines += fmt::format(
            "  - {{kernel: {}, beside: {}, ranks: 2, bytes: 1 MiB, of_kernel: {}, of_transfer: "
            "{}}}\n",
            family, kind, ratio(), ratio());
    }
    SCOPED_TRACE(lines);
    const Topology t = with_slowdown(lines);
    Communication communication(t);
    const Ticks idle = run(p, t, Network::idle).step;
    for (const Network network : {Network::beside, Network::flows}) {
      SimulateOptions options;
      options.network = network;
      const Ticks folded = simulate(p, communication, options).step;
      EXPECT_GE(folded, idle);
      options.replay = false;
      EXPECT_EQ(simulate(p, communication, options).step, folded) << name(network);
      options.unfolded = true;
      EXPECT_EQ(simulate(p, communication, options).step, folded) << name(network);
    }
  }
}

// A reduce-scatter comes after the weight's gradient in the program and runs beside it.
TEST(Contention, KernelsGiveWayToTransfersThatComeLaterInTheProgram) {
  const Topology t = load_topology("dgx-h100:1");
  Plan wanted = base_plan();
  wanted.tp = 2;
  wanted.sequence_parallel = true;
  TransformerConfig c = small_config();
  c.sequence = c.positions = 2048;
  c.hidden = 2048;
  c.ffn = 8192;
  const Program p = lowered(build_transformer(c), wanted);
  const Timeline idle = run(p, t, Network::idle), beside = run(p, t, Network::beside),
                 flows = run(p, t, Network::flows);
  EXPECT_GT(beside.step, idle.step);
  // Nothing shares links: what is left are transfers of which one waits for the other's memory.
  EXPECT_NEAR(static_cast<double>(beside.step.count), static_cast<double>(flows.step.count),
              1e-4 * static_cast<double>(flows.step.count));
}

// Gradients that are not reduced while the backward goes on are when it is over, whatever the
// bucket.
TEST(Contention, LateGradientSumsWaitForTheBackward) {
  const Topology t = load_topology("dgx-h100:1");
  TransformerConfig c = small_config();
  c.sequence = c.positions = 512;
  c.hidden = 1024;
  c.ffn = 4096;
  Plan plan = base_plan();
  plan.dp = plan.global_batch = 2;
  plan.bucket = Bytes{1'000'000};
  const auto last_and_sums = [&](bool overlap) {
    plan.overlap_gradients = overlap;
    const Program p = lowered(build_transformer(c), plan);
    const Timeline line = run(p, t, Network::idle);
    Ticks last{0}, first{std::numeric_limits<std::int64_t>::max()};
    int sums = 0;
    for (const Entry& e : line.entries) {
      const Instruction& i = p.blocks[static_cast<std::size_t>(e.block)]
                                 .instructions[static_cast<std::size_t>(e.instruction)];
      if (i.kernel == Kernel::backward_weight && i.kind == Kind::compute)
        last = std::max(last, e.end);
      if (i.kind == Kind::collective && i.tie < 0) first = std::min(first, e.start), ++sums;
    }
    return std::tuple{last, first, sums};
  };
  const auto [last, first, sums] = last_and_sums(true);
  EXPECT_GT(sums, 4);
  EXPECT_LT(first, last);
  const auto [late_last, late_first, late_sums] = last_and_sums(false);
  EXPECT_GT(late_sums, 4);
  EXPECT_GE(late_first, late_last);
}

TEST(Contention, WhatIsAloneTakesItsTime) {
  const Topology t = load_topology("dgx-h100:2");
  std::mt19937 rng{3};
  const Graph graphs[] = {gpt(), llama(), mixtral()};
  int equal = 0;
  for (int k = 0; k < 200; ++k) {
    Plan wanted = base_plan();
    // One axis over one node, nothing beside compute.
    const int axis = static_cast<int>(rng() % 3);
    (axis == 0 ? wanted.tp : axis == 1 ? wanted.cp : wanted.dp) = 2;
    const Graph& g = graphs[rng() % 3];
    set_framework(wanted, "partita", "");
    wanted = with_launches(wanted, rng);
    const auto plan = complete(g, wanted);
    if (!plan) continue;
    const auto program = lower(g, *plan);
    if (!program) continue;
    SCOPED_TRACE(to_yaml(*plan));
    const Timeline idle = run(*program, t, Network::idle), flows = run(*program, t, Network::flows);
    // Where it differs, something says what was shared.
    EXPECT_EQ(idle.step != flows.step, idle.step < flows.step);
    if (idle.step == flows.step)
      ++equal;
    else
      EXPECT_FALSE(flows.contended.empty());
  }
  EXPECT_GT(equal, 20);
}

TEST(Contention, BackgroundTrafficTakesItsShare) {
  const Topology plain = without_nccl(kShared);
  ClusterState busy;
  busy.background[plain.find_link("node0.nic0->switch", "--background")] = BytesPerSecond{3e9};
  Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
  all_reduce(p, bit(0), 25'000'000);
  // 10 GB/s less 3: two all-reduces of 100 MB at 3.5 GB/s each; 3 GB/s is below an equal share.
  EXPECT_NEAR(static_cast<double>(run(p, plain.in_state(busy), Network::flows).step.count),
              8'000'000 + 1e8 / 3.5e9 * 1e12, 200);
  // 6 are not: three flows share alike.
  busy.background.begin()->second = BytesPerSecond{6e9};
  EXPECT_NEAR(static_cast<double>(run(p, plain.in_state(busy), Network::flows).step.count),
              8'000'000 + 3e10, 200);
}

// The same of a collective message by message, and of an axis's rate.
TEST(Contention, BackgroundTrafficSlowsMessagesAndAxes) {
  const Topology plain = without_nccl(kShared);
  ClusterState busy;
  busy.background[plain.find_link("node0.nic0->switch", "--background")] = BytesPerSecond{3e9};
  const auto ring = [](const Topology& t) {
    const auto times = time_collective(CollectiveKind::all_reduce, Bytes{100'000'000}, {0, 2}, t,
                                       Algorithm::ring, {});
    return times.algorithms.at(0).time.count;
  };
  // Two steps of 2.5 us and 50 MB each: at 10, at 7 GB/s.
  EXPECT_NEAR(static_cast<double>(ring(plain)), 2 * (2.5e6 + 5e9), 2);
  EXPECT_NEAR(static_cast<double>(ring(plain.in_state(busy))), 2 * (2.5e6 + 5e7 / 7e9 * 1e12), 2);
  // One flow beside b of a link's bytes has it as if it were slow, but never less than half.
  const LinkId link = plain.find_link("node1.nic0->switch", "--background");
  for (const double part : {0.1, 0.3, 0.5, 0.7, 0.95}) {
    ClusterState beside, slow;
    beside.background[link] = BytesPerSecond{part * 1e10};
    slow.link_speed[link] = std::max(1 - part, 0.5);
    for (const CollectiveKind kind :
         {CollectiveKind::all_reduce, CollectiveKind::all_gather, CollectiveKind::reduce_scatter,
          CollectiveKind::shift, CollectiveKind::broadcast, CollectiveKind::all_to_all}) {
      const auto times = [&](const ClusterState& state) {
        return time_collective(kind, Bytes{64 << 20}, {0, 2}, plain.in_state(state), {}, {});
      };
      const auto with = times(beside), as_slow = times(slow);
      ASSERT_EQ(with.algorithms.size(), as_slow.algorithms.size());
      for (std::size_t a = 0; a < with.algorithms.size(); ++a) {
        const double t = static_cast<double>(as_slow.algorithms[a].time.count);
        EXPECT_NEAR(static_cast<double>(with.algorithms[a].time.count), t, 1e-9 * t)
            << part << " " << name(kind);
      }
    }
  }
  const Mesh mesh{{{"dp", 2}, {"tp", 2}}};
  const auto dp = [&](const Topology& t) { return axis_crossings(mesh, Communication(t)).back(); };
  EXPECT_DOUBLE_EQ(dp(plain).together.count, 5e9);
  EXPECT_DOUBLE_EQ(dp(plain.in_state(busy)).alone.count, 7e9);
  EXPECT_DOUBLE_EQ(dp(plain.in_state(busy)).together.count, 3.5e9);
  busy.background.begin()->second = BytesPerSecond{9e9};
  EXPECT_DOUBLE_EQ(dp(plain.in_state(busy)).alone.count, 5e9);
}

TEST(Contention, SlowDevicesAndLinksSplitOnlyWhatTheyTouch) {
  const Topology plain = load_topology("dgx-h100:4");
  Plan wanted = base_plan();
  wanted.tp = 4, wanted.dp = 4, wanted.pp = 2;
  const auto plan = complete(gpt(), wanted);
  ASSERT_TRUE(plan);
  const auto program = lower(gpt(), *plan);
  ASSERT_TRUE(program);
  const auto classes = [&](const Topology& t) {
    Communication c(t);
    return share_links(*program, c).ranks.classes.size();
  };
  const std::size_t before = classes(plain);
  ClusterState slow;
  slow.device_speed[plain.find_device("node1.gpu3", "")] = 0.5;
  const Topology with_slow = plain.in_state(slow);
  const std::size_t after = classes(with_slow);
  EXPECT_GT(after, before);
  EXPECT_LT(after, static_cast<std::size_t>(program->ranks()));
  const Timeline fast = run(*program, plain, Network::flows),
                 slower = run(*program, with_slow, Network::flows);
  EXPECT_LT(fast.step, slower.step);
  ClusterState worn;
  worn.link_speed[plain.find_link("node1.nic0->rail0", "")] = 0.25;
  EXPECT_LT(fast.step, run(*program, plain.in_state(worn), Network::flows).step);
  // Unfolded all the same.
  for (const ClusterState& state : {slow, worn}) {
    Communication c(plain.in_state(state));
    SimulateOptions options;
    options.network = Network::flows;
    const Ticks folded = simulate(*program, c, options).step;
    options.unfolded = true;
    EXPECT_EQ(simulate(*program, c, options).step, folded);
  }
}

// NCCL's time is of links as built: a card at a fifth of its speed takes what its bytes need.
TEST(Contention, NoCollectiveIsFasterThanItsSlowLink) {
  const Topology plain = load_topology("dgx-h100:2");
  ClusterState worn;
  worn.link_speed[plain.find_link("node1.nic0->rail0", "")] = 0.05;
  const Topology slow = plain.in_state(worn);
  Communication fast(plain), slower(slow);
  const std::vector<std::int64_t> ranks{0, 2, 4, 6, 8, 10, 12, 14};
  for (const CollectiveKind kind : {CollectiveKind::all_reduce, CollectiveKind::all_gather,
                                    CollectiveKind::reduce_scatter, CollectiveKind::all_to_all}) {
    const Bytes bytes{1'000'000'000};
    const double t = slower.collective(kind, bytes, ranks).count;
    EXPECT_GT(t, 2 * fast.collective(kind, bytes, ranks).count);
  }
  // Inside a node that has it nothing changes.
  EXPECT_EQ(slower.collective(CollectiveKind::all_reduce, Bytes{1 << 20}, {0, 1, 2, 3}),
            fast.collective(CollectiveKind::all_reduce, Bytes{1 << 20}, {0, 1, 2, 3}));
}

// docs/sharing.md, "What is slow".
TEST(Contention, SlowPartsAreNamedWhateverRunsBeside) {
  const Topology plain = without_nccl(kShared);
  ClusterState state;
  state.link_speed[plain.find_link("node1.nic0->switch", "")] = 0.5;
  state.device_speed[plain.find_device("node0.gpu1", "")] = 0.8;
  const Topology slow = plain.in_state(state);
  Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
  kernel(p, Kernel::add, 250'000'000, ElementType::fp32);
  all_reduce(p, bit(0), 25'000'000);
  for (const Network network : {Network::idle, Network::flows}) {
    const Timeline t = run(p, slow, network);
    std::map<std::pair<std::string, std::string>, double> lost;
    for (const Contended& c : t.contended) {
      if (c.worn) {
        double& most = lost[{c.what, c.resource}];
        most = std::max(most, static_cast<double>(c.lost.count));
      }
    }
    ASSERT_EQ(lost.size(), 2u);
    // 100 MB at 5 instead of 10 GB/s; a copy of 3 us + 663.35 us at 0.8 of its speed.
    EXPECT_NEAR((lost[{"exposed:dp", "node1.nic0->switch at 0.5 of its bandwidth"}]), 1e10, 10);
    const double copy = 2e9 / 3.015e12 * 1e12;
    EXPECT_NEAR((lost[{"other", "node0.gpu1 at 0.8 of its speed"}]), (3e6 + copy) / 0.8 * 0.2, 1e6);
  }
  EXPECT_TRUE(run(p, plain, Network::idle).contended.empty());
}

TEST(Contention, SlicesOfAStepAddUpToIt) {
  std::mt19937 rng{20261127};
  const Topology t = load_topology("dgx-h100:2");
  int seen = 0;
  for (int i = 0; i < 60; ++i) {
    const auto plan = complete(gpt(), random_plan(rng));
    if (!plan || plan->ranks() > 16) continue;
    const auto program = lower(gpt(), *plan);
    if (!program) continue;
    ++seen;
    SCOPED_TRACE(to_yaml(*plan));
    for (const Network network : {Network::idle, Network::flows}) {
      const Timeline step = run(*program, t, network);
      std::vector<std::int64_t> until(step.classes.size(), 0);
      for (const Span& s : step.spans) {
        std::int64_t& end = until[static_cast<std::size_t>(s.rank_class)];
        EXPECT_EQ(s.start.count, end);
        end = s.end.count;
      }
      for (const std::int64_t end : until) EXPECT_EQ(end, step.step.count);
      std::int64_t spent = 0, lost = 0, all_lost = 0, linear = 0;
      for (const TimeSlice& slice : over_time(step, 7)) {
        for (const auto& [label, ticks] : slice.spent) {
          spent += ticks.count;
          if (label == "compute:linear") linear += ticks.count;
        }
        for (const auto& [resource, ticks] : slice.lost) lost += ticks.count;
      }
      for (const Entry& e : step.entries) {
        if (e.rank_class == step.last_class && e.over >= 0) all_lost += e.lost.count;
      }
      EXPECT_EQ(spent, step.step.count);
      const auto& last = step.breakdown[static_cast<std::size_t>(step.last_class)];
      const auto products = last.compute.find("linear");
      EXPECT_EQ(linear, products == last.compute.end() ? 0 : products->second.count);
      EXPECT_NEAR(static_cast<double>(lost), static_cast<double>(all_lost),
                  8.0 * static_cast<double>(step.entries.size()));
    }
  }
  EXPECT_GT(seen, 10);
}

// NCCL searches what is left; whichever node lost it, no faster than its cut.
TEST(Contention, LostLinksSlowTheirGroupsAlikeOnEveryNode) {
  const Topology plain = load_topology("dgx-h100:2");
  std::vector<std::int64_t> all;
  for (std::int64_t r = 0; r < 16; ++r) all.push_back(r);
  const Bytes bytes{1'000'000'000};
  Communication whole(plain);
  std::set<double> times;
  for (const char* lost :
       {"node0.nic0->rail0", "node0.nic5->rail5", "node1.nic0->rail0", "node1.nic7->rail7"}) {
    ClusterState state;
    state.link_speed[plain.find_link(lost, "")] = 0;
    Communication c(plain.in_state(state));
    times.insert(c.collective(CollectiveKind::all_reduce, bytes, all).count);
    // Each half sends what the other half is to have: over seven cards of 50 GB/s.
    EXPECT_GE(c.collective(CollectiveKind::all_reduce, bytes, all).count, 1e9 / 350e9) << lost;
    EXPECT_GE(c.collective(CollectiveKind::all_reduce, bytes, all),
              whole.collective(CollectiveKind::all_reduce, bytes, all));
  }
  EXPECT_LT(*times.rbegin() - *times.begin(), 1e-9);
  // Behind its NVSwitch it is reached over PCIe: 63 GB/s instead of 450.
  ClusterState state;
  state.link_speed[plain.find_link("node0.gpu0->node0.nvswitch0", "")] = 0;
  Communication c(plain.in_state(state));
  const std::vector<std::int64_t> node{0, 1, 2, 3, 4, 5, 6, 7},
      others{8, 9, 10, 11, 12, 13, 14, 15};
  EXPECT_GT(c.collective(CollectiveKind::all_reduce, bytes, node).count,
            3 * whole.collective(CollectiveKind::all_reduce, bytes, node).count);
  EXPECT_EQ(c.collective(CollectiveKind::all_reduce, bytes, others),
            whole.collective(CollectiveKind::all_reduce, bytes, others));
  EXPECT_GE(c.point_to_point(bytes, 0, 1).count, 1e9 / 64e9);
  // And back as built.
  EXPECT_EQ(c.as_built().collective(CollectiveKind::all_reduce, bytes, node),
            whole.collective(CollectiveKind::all_reduce, bytes, node));
}

// docs/plan.md, overlap_multiprocessors: parts of the sequence that travel beside products keep as
// many as the framework's exchange, not NCCL's channels.
TEST(Contention, PartsBesideProductsKeepWhatTheirExchangeTakes) {
  TransformerConfig c;
  c.name = "wide";
  c.layers = 2, c.hidden = 8192, c.heads = c.kv_heads = 64, c.ffn = 28672, c.vocabulary = 32000;
  c.sequence = c.positions = 4096;
  const Graph g = build_transformer(c);
  const auto step = [&](const char* framework, const char* precision, std::set<int>& kept_by) {
    Plan wanted;
    set_framework(wanted, framework, "");
    set_precision(wanted, precision, "");
    wanted.tp = 8, wanted.micro_batch = 1, wanted.global_batch = 1;
    wanted.sequence_parallel = wanted.overlap_tensor_parallel = true;
    const auto plan = complete(g, wanted);
    EXPECT_TRUE(plan);
    const auto program = lower(g, *plan);
    EXPECT_TRUE(program);
    kept_by.clear();
    Program kept = *program;
    for (Block& b : kept.blocks) {
      for (Instruction& i : b.instructions) {
        if (i.kind == Kind::collective && i.collective == CollectiveKind::shift)
          kept_by.insert(static_cast<int>(i.multiprocessors));
      }
    }
    const Topology t = load_topology("dgx-h100:1");
    const Ticks own = run(kept, t, Network::beside).step;
    for (Block& b : kept.blocks) {
      for (Instruction& i : b.instructions) i.multiprocessors = 0;
    }
    return std::pair{own, run(kept, t, Network::beside).step};
  };
  std::set<int> kept_by;
  const auto nemo = step("nemo", "bf16", kept_by);
  EXPECT_EQ(kept_by, (std::set<int>{1, 20}));  // sums of forward products, in their pipeline, more
  EXPECT_LT(nemo.first, nemo.second);
  step("nemo", "fp8", kept_by);
  EXPECT_EQ(kept_by, (std::set<int>{1}));
  const auto core = step("megatron-core", "bf16", kept_by);
  EXPECT_EQ(kept_by, (std::set<int>{0}));
  EXPECT_EQ(core.first, core.second);
}

// Whichever node it is on: renaming changes nothing, but for a node's place in the two trees. Of
// four nodes 0 and 3 are a root above one and a leaf, 1 and 2 a leaf and between three others.
TEST(Contention, ASlowCardIsAsSlowOnEveryNode) {
  const Topology plain = load_topology("dgx-h100:4");
  for (const int members : {1, 4, 8}) {
    std::vector<std::int64_t> ranks;
    for (std::int64_t r = 0; r < 32; ++r) {
      if (r % 8 < members) ranks.push_back(r);
    }
    for (const double speed : {0.5, 0.1}) {
      std::map<std::string, std::set<double>> times;
      for (int node = 0; node < 4; ++node) {
        for (int card = 0; card < members; ++card) {
          ClusterState worn;
          worn.link_speed[plain.find_link(fmt::format("node{}.nic{}->rail{}", node, card, card),
                                          "")] = speed;
          Communication c(plain.in_state(worn));
          for (const CollectiveKind kind : {CollectiveKind::all_reduce, CollectiveKind::all_gather,
                                            CollectiveKind::all_to_all}) {
            const Bytes bytes{500'000'000};
            const bool trees =
                c.lay(kind, bytes, ranks) != Lay::rings && kind != CollectiveKind::all_to_all;
            times[fmt::format("{}{}", name(kind), trees && node % 3 == 0 ? ", outer" : "")].insert(
                c.collective(kind, bytes, ranks).count);
          }
        }
      }
      if (const auto outer = times.find("all_reduce, outer"); outer != times.end()) {
        EXPECT_LE(*outer->second.begin(), *times.at("all_reduce").begin());
      }
      for (const auto& [kind, of_card] : times)
        EXPECT_LT(*of_card.rbegin() - *of_card.begin(), 1e-9 * *of_card.begin())
            << kind << " of " << members << " a node at " << speed;
    }
  }
}

// What a step's all-reduce loads is what its algorithm lays, not a ring: docs/cost.md, 16 GPUs.
TEST(Contention, AStepsTransfersLieAsNcclLaysThem) {
  Program p = program(Mesh{{{"dp", 16}}});
  all_reduce(p, bit(0), 525'000'000);
  Communication communication(load_topology("dgx-h100:2"));
  const SharedLinks links = share_links(p, communication);
  ASSERT_EQ(links.of_class.size(), 1u);
  EXPECT_EQ(links.of_class.begin()->first.lay, Lay::switch_trees);
  ASSERT_EQ(links.transfers.size(), 1u);
  const auto& t = links.transfers[0];
  std::set<LinkKind> seen;
  for (const auto& x : t.crossings) {
    const auto& l = links.links[static_cast<std::size_t>(x.link_class)];
    const LinkKind kind = communication.topology().link(l.representative).kind;
    seen.insert(kind);
    // Of the 15/8 S that a rank would send in a ring.
    const double part = kind == LinkKind::nvlink ? 9.0 / 8 : 1.0 / 8;
    EXPECT_NEAR(static_cast<double>(x.flows) * t.share, part / (15.0 / 8), 1e-12);
  }
  EXPECT_EQ(seen, (std::set{LinkKind::nvlink, LinkKind::pcie, LinkKind::network}));
}

// A neighbour that computes is not its message on the way: only the latter grows with slow cards.
TEST(Contention, OverTimeTellsNeighboursFromTheirMessages) {
  Plan wanted = base_plan();
  wanted.dp = 8, wanted.pp = 2, wanted.global_batch = 32;
  const auto plan = complete(gpt(), wanted);
  ASSERT_TRUE(plan);
  const auto program = lower(gpt(), *plan);
  ASSERT_TRUE(program);
  const Topology built = load_topology("dgx-h100:2");
  ClusterState slow;
  for (std::size_t l = 0; l < built.link_count(); ++l) {
    if (built.link(LinkId{l}).kind == LinkKind::network) slow.link_speed[LinkId{l}] = 1e-5;
  }
  const auto spent = [&](const Topology& t) {
    const Timeline step = run(*program, t, Network::idle);
    auto all = over_time(step, 1)[0].spent;
    EXPECT_EQ(all["bubble"] + all["bubble:messages"],
              step.breakdown[static_cast<std::size_t>(step.last_class)].bubble);
    return all;
  };
  auto fast = spent(built), late = spent(built.in_state(slow));
  EXPECT_GT(fast["bubble"].count, 0);
  EXPECT_GT(fast["bubble:messages"].count, 0);
  EXPECT_GT(late["bubble:messages"].count, 2 * fast["bubble:messages"].count);
}

TEST(Contention, TasksFollowTheirPrecedences) {
  Sharing sharing;
  const ResourceId link = sharing.add(10);
  Usage u;
  u.demands = {{link, 10}};
  Contention c;
  const auto a = c.add({5, 100, 0}), b = c.add({0, 100, 0}), after = c.add({7, 0, -1}),
             with = c.add({1, 0, -1});
  c.order(a, after, Precedence::end_to_start);
  c.order(b, with, Precedence::start_to_start);
  c.order(b, with, Precedence::end_to_end);
  const auto r = c.play(sharing, {u});
  // b alone from 0 to 5; then both at half speed: a has 100, b 95 to go. b ends at 5 + 190 = 195, a
  // has 5 left: 200.
  EXPECT_EQ(r.end[static_cast<std::size_t>(b)], 195);
  EXPECT_EQ(r.end[static_cast<std::size_t>(a)], 200);
  EXPECT_EQ(r.start[static_cast<std::size_t>(after)], 200);
  EXPECT_EQ(r.end[static_cast<std::size_t>(after)], 207);
  EXPECT_EQ(r.start[static_cast<std::size_t>(with)], 0);
  EXPECT_EQ(r.end[static_cast<std::size_t>(with)], 195);
}

// docs/simulation.md, "Host".
TEST(Host, LaunchesBindWhereTheyTakeLongerThanKernels) {
  const Topology t = parse_topology(kShared, "shared.yaml");
  Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
  for (int k = 0; k < 3; ++k) kernel(p, Kernel::zero, 1000, ElementType::fp32);
  const std::int64_t one = run(p, t, Network::idle).step.count / 3;
  EXPECT_GT(one, 3'000'000);
  const auto step = [&](double kernel_s, bool graphs) {
    p.launches.kernel = Seconds{kernel_s};
    p.launches.graphs = graphs;
    const Timeline idle = run(p, t, Network::idle), flows = run(p, t, Network::flows);
    EXPECT_EQ(idle.step, flows.step);
    EXPECT_EQ(idle.breakdown[0].total(), idle.step);
    if (kernel_s > 0) {
      EXPECT_EQ(idle.breakdown[0].exposed.at("launch") + Ticks{3 * one}, idle.step);
    }
    return idle.step.count;
  };
  EXPECT_EQ(step(6e-6, false), 3 * 6'000'000 + one);
  EXPECT_EQ(step(1e-6, false), 1'000'000 + 3 * one);
  EXPECT_EQ(step(6e-6, true), 6'000'000 + 3 * one);
  EXPECT_EQ(step(0, false), 3 * one);
  // The first kernel is of another operator than the two that were captured: 6, 12, 12.
  p.operators.resize(2);
  p.operators[1].captured = true;
  for (std::size_t k = 0; k < 3; ++k) p.blocks[0].instructions[k].op = k > 0 ? 1 : 0;
  EXPECT_EQ(step(6e-6, false), 12'000'000 + 2 * one);
  EXPECT_EQ(step(6e-6, true), 6'000'000 + 3 * one);
  for (Instruction& i : p.blocks[0].instructions) i.op = -1;
  // Between steps devices wait for the host.
  p.launches = {};
  p.launches.kernel = Seconds{6e-6};
  p.launches.step = Seconds{5e-6};
  const Timeline between = run(p, t, Network::flows);
  EXPECT_EQ(between.step.count, 3 * 6'000'000 + one + 5'000'000);
  EXPECT_EQ(between.breakdown[0].total(), between.step);
  // A host that waits for each kernel launches while the device idles.
  p.launches = {};
  p.launches.kernel = Seconds{1e-6};
  p.launches.blocking = true;
  for (const Network network : {Network::idle, Network::flows}) {
    const Timeline blocked = run(p, t, network);
    EXPECT_EQ(blocked.step.count, 3 * (1'000'000 + one));
    EXPECT_EQ(blocked.breakdown[0].exposed.at("launch"), Ticks{3'000'000});
  }
}

/// An H100 whose profile has these figures, too.
Topology measured_to(const std::string& figures) {
  std::ifstream in(data_folder("topologies") + "/devices/h100-sxm.yaml");
  const std::string text{std::istreambuf_iterator<char>(in), {}},
      folder = fmt::format("{}/launches-{}", ::testing::TempDir(), ::getpid());
  EXPECT_FALSE(text.empty());
  std::filesystem::create_directories(folder);
  std::ofstream(folder + "/here.yaml") << text << figures;
  std::ofstream(folder + "/cluster.yaml") << kOneGpu;
  const Topology t = load_topology(folder + "/cluster.yaml");
  std::filesystem::remove_all(folder);
  return t;
}

// What our own runtime was measured to take, of a plan that says nothing.
TEST(Host, AProfilesLaunchesAreThoseOfAPlanWithoutAny) {
  const auto step = [](double launch_us, double dispatch_us, double in_graph_us, bool graphs,
                       double of_plan_s = 0) {
    std::string figures;
    for (const auto& [key, us] : {std::pair{"launch", launch_us},
                                  {"dispatch", dispatch_us},
                                  {"dispatch_in_graph", in_graph_us}}) {
      if (us > 0) figures += fmt::format("{}: {{value: {} us, source: a test}}\n", key, us);
    }
    const Topology t = measured_to(figures);
    Program p = program(Mesh{{{"dp", 1}}});
    for (int k = 0; k < 3; ++k) kernel(p, Kernel::zero, 1000, ElementType::fp32);
    p.launches.graphs = graphs;
    p.launches.kernel = Seconds{of_plan_s};
    const Timeline idle = run(p, t, Network::idle);
    EXPECT_EQ(idle.step, run(p, t, Network::flows).step);
    return idle.step.count;
  };
  const std::int64_t one = step(0, 0, 0, false) / 3, us = 1'000'000;
  EXPECT_GT(one, 3 * us);
  EXPECT_LT(one, 6 * us);
  EXPECT_EQ(step(6, 0, 0, false), 3 * 6 * us + one);
  EXPECT_EQ(step(1, 0, 0, false), us + 3 * one);
  EXPECT_EQ(step(6, 0, 0, true), 6 * us + 3 * one);
  EXPECT_EQ(step(6, 0, 0, false, 1e-6), us + 3 * one) << "the plan's";
  // A kernel ends when the next may begin.
  EXPECT_EQ(step(0, 2, 1, false), 3 * one + 3 * 2 * us);
  EXPECT_EQ(step(0, 2, 1, true), 3 * one + 3 * us);
  EXPECT_EQ(step(0, 2, 0, true), 3 * one + 3 * 2 * us);
  EXPECT_EQ(step(10, 2, 1, true), 10 * us + 3 * one + 3 * us);
}

/// Our own runtime's host reads which experts tokens go to, and is ahead of nothing then.
TEST(Host, ListsTheRowsOfExperts) {
  const Program p = lowered(mixtral(), base_plan());
  const Topology known = measured_to("launch: {value: 0.001 us, source: a test}\n");
  const Timeline t = run(p, known, Network::idle), free = run(p, measured_to(""), Network::idle);
  EXPECT_GT(t.step, free.step);
  EXPECT_LT(t.step.count, free.step.count + 1'000'000);
  // After each wait a launch that is not hidden: more than those of the first kernels.
  const auto exposed = [](const Timeline& of) {
    const auto& all = of.breakdown[0].exposed;
    return all.count("launch") > 0 ? all.at("launch").count : 0;
  };
  const Timeline dense = run(lowered(gpt(), base_plan()), known, Network::idle);
  EXPECT_GT(exposed(dense), 0);
  EXPECT_GE(exposed(t), 2 * exposed(dense));
}

/// Where launches bind, two steps differ by what launches take, and by nothing else.
struct Launched {
  double kernels = 0;
  std::int64_t calls = 0, groups = 0, parts = 0;
};
Launched launched(const Program& p) {
  Launched n;
  for (const BlockCall& call : p.stages[0]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind == Kind::slice || i.kind == Kind::copy) ++n.kernels;
      // What passes parts on and adds them up.
      if (i.part >= 0 && i.op < 0) ++n.kernels, ++n.parts;
      if (i.kind != Kind::compute || (i.part >= 0 && i.op < 0)) continue;
      const Work w = work_of(p, i, 0);
      n.kernels += w.kernels, n.groups += w.groups;
      if (w.products.empty()) continue;
      if (i.part > 0)
        ++n.parts;
      else
        n.calls += i.kernel != Kernel::backward_weight;
    }
  }
  return n;
}

// docs/simulation.md, "By hand": 40 us the first kernel of a call, 5 us what follows it.
TEST(Host, CallsOfLayersTakeLongerAndTheirFurtherKernelsShorter) {
  Plan experts = base_plan();
  Plan parts = base_plan();
  parts.tp = 2, parts.sequence_parallel = true, parts.overlap_tensor_parallel = true;
  for (const bool in_parts : {false, true}) {
    Program p = lowered(in_parts ? gpt() : mixtral(), in_parts ? parts : experts);
    const auto step = [&](double kernel, double product, double loop, double factor) {
      p.launches = {};
      p.launches.kernel = Seconds{kernel};
      p.launches.product = Seconds{product};
      p.launches.loop = Seconds{loop};
      std::string text = kShared;
      const std::string count = "- count: 2\n";
      EXPECT_NE(text.find(count), std::string::npos);
      text.insert(text.find(count) + count.size(), fmt::format("    launch_time: {}\n", factor));
      const Topology t = parse_topology(text, "shared.yaml");
      return static_cast<double>(run(p, t, Network::idle).step.count) * 1e-12;
    };
    const Launched n = launched(p);
    EXPECT_GT(n.calls, 0);
    EXPECT_GT(in_parts ? n.parts : n.groups, 0);
    const double all = n.kernels + static_cast<double>(n.groups);
    const double plain = step(0.01, 0, 0, 1);
    EXPECT_NEAR(step(0.02, 0, 0, 1) - plain, 0.01 * all, 1e-6);
    EXPECT_NEAR(step(0.01, 0.04, 0, 1) - plain, 0.03 * static_cast<double>(n.calls), 1e-6);
    EXPECT_NEAR(step(0.01, 0, 0.005, 1) - plain, -0.005 * static_cast<double>(n.groups + n.parts),
                1e-6);
    // Slower processors.
    EXPECT_NEAR(step(0.01, 0, 0, 2.6) - plain, 1.6 * 0.01 * all, 1e-6);
  }
}

/// What is captured costs no more launches: all of it less than all but experts, that less than
/// none.
TEST(Host, GraphsBesideExpertsAreBetweenNoneAndAll) {
  Plan plan = base_plan();
  plan.dp = plan.ep = 2;
  plan.global_batch = 2 * plan.micro_batch;
  Program p = lowered(mixtral(), plan);
  const Topology t = load_topology("dgx-h100:2 gpus");
  const auto step = [&](bool all, bool beside) {
    p.launches = {};
    p.launches.kernel = Seconds{1e-3};
    p.launches.graphs = all;
    p.launches.graphs_beside_experts = beside;
    return run(p, t, Network::idle).step;
  };
  const Ticks eager = step(false, false), beside = step(false, true), all = step(true, false);
  EXPECT_LT(all, beside);
  EXPECT_LT(beside, eager);
  EXPECT_EQ(step(true, true), all);
  // So is what a pattern of operators names.
  const auto of = [&](const std::string& pattern) {
    plan.launches = {};
    plan.launches.kernel = Seconds{1e-3};
    plan.launches.graphs_of = pattern;
    return run(lowered(mixtral(), plan), t, Network::idle).step;
  };
  EXPECT_LT(of("*attention*"), eager);
  EXPECT_LT(all, of("*attention*"));
  EXPECT_EQ(of(""), eager);
}

TEST(Host, AShardThatIsAViewIsNotLaunched) {
  // All is host-bound: a step is shorter by the launch of every parameter's shard.
  Plan plan = base_plan();
  plan.dp = 2;
  plan.zero = 1;
  plan.global_batch = 2 * plan.micro_batch;
  const Graph g = build_transformer(small_config());
  Program p = lowered(g, plan);
  p.launches.kernel = Seconds{1e-3};
  const Topology t = load_topology("dgx-h100:2 gpus");
  const double copies = to_seconds(run(p, t, Network::idle).step).count;
  p.kernels.shard_views = true;
  const double views = to_seconds(run(p, t, Network::idle).step).count;
  EXPECT_NEAR((copies - views) / 1e-3, static_cast<double>(g.parameters.size()), 0.1);
}

// docs/cost.md, "In twos".
TEST(Host, ExchangesBesideAnotherMicroBatchCostWhatIsLeft) {
  EXPECT_NEAR(exposed_in_twos(Seconds{0.03}, Seconds{0.02}, 7.0 / 8, 24.0 / 132), 0.2841, 5e-5);
  EXPECT_NEAR(exposed_in_twos(Seconds{0.03}, Seconds{0.06}, 7.0 / 8, 24.0 / 132), 0.6420, 5e-5);
  EXPECT_EQ(exposed_in_twos(Seconds{0}, Seconds{0}, 1, 0), 1);
  EXPECT_EQ(exposed_in_twos(Seconds{1}, Seconds{1}, 0, 0), 1);
  Plan plan = base_plan();
  plan.dp = plan.ep = 2;
  plan.global_batch = 4 * 2 * plan.micro_batch;
  Program p = lowered(mixtral(), plan);
  const Topology t = load_topology("dgx-h100:2 gpus");
  const Timeline apart = run(p, t, Network::idle);
  p.overlap_experts = true;
  const Timeline twos = run(p, t, Network::idle);
  const Ticks before = apart.breakdown[0].exposed.at("ep"),
              after = twos.breakdown[0].exposed.at("ep");
  EXPECT_LT(after, before);
  EXPECT_EQ(twos.breakdown[0].total(), twos.step);
  // One micro-batch of four has none beside it.
  EXPECT_GT(static_cast<double>(after.count), 0.25 * static_cast<double>(before.count));
}

// Passes over gradients are the device's where the host updates: a thousand are 64 MB or 19 us of
// its 3.35 TB/s, and 0.8 ms of the host's memory.
TEST(Host, PassesOverGradientsBeforeItsUpdateTakeTheDevice) {
  Plan plan = base_plan();
  plan.offload_optimizer = true;
  plan.optimizer.kind = OptimizerKind::adam;
  const Topology t = load_topology("dgx-h100:1 gpus");
  const auto step = [&](double passes) {
    Program p = lowered(load_model("mnist-linear"), plan);
    p.kernels.gradient_passes = passes;
    return to_seconds(run(p, t, Network::idle).step).count;
  };
  const double more = step(1000) - step(0);
  EXPECT_GT(more, 5e-6);
  EXPECT_LT(more, 100e-6);
}

// DualPipe runs them so by itself, but not where blocks are executed one after the other.
TEST(Host, ExchangesLieBesideBlocksAsThePlanOrTheScheduleHasIt) {
  const auto exposed = [](Schedule schedule, const char* framework, std::optional<bool> overlap) {
    Plan plan = base_plan();
    plan.framework = framework;
    plan.dp = plan.ep = plan.pp = 2;
    plan.schedule = schedule, plan.schedule_given = true;
    plan.overlap_experts = overlap;
    plan.global_batch = 8 * 2 * plan.micro_batch;
    const Timeline t =
        run(lowered(mixtral(), plan), load_topology("dgx-h100:4 gpus"), Network::idle);
    return t.breakdown[0].exposed.at("ep").count;
  };
  const auto f1b = Schedule::one_f_one_b, dual = Schedule::dualpipe;
  EXPECT_EQ(exposed(f1b, "megatron-core", {}), exposed(f1b, "megatron-core", false));
  EXPECT_LT(exposed(f1b, "megatron-core", true), exposed(f1b, "megatron-core", false));
  EXPECT_EQ(exposed(dual, "megatron-core", {}), exposed(dual, "megatron-core", true));
  EXPECT_LT(exposed(dual, "megatron-core", {}), exposed(dual, "megatron-core", false));
  EXPECT_EQ(exposed(dual, "partita", {}), exposed(dual, "partita", false));
}

/// Fifty calls of a block whose kernels take longer than their launches leave the host so far ahead
/// that 40 slow launches after them bind nothing: after two they do.
TEST(Host, GetsAheadCallByCall) {
  const Topology t = without_nccl(kShared);
  const auto step = [&](int calls, double transfer) {
    Program p = program(Mesh{{{"dp", 2}, {"tp", 2}}});
    p.launches.kernel = Seconds{1e-6};
    p.launches.transfer = Seconds{transfer};
    for (int k = 0; k < 3; ++k) kernel(p, Kernel::zero, 1000, ElementType::fp32);
    p.blocks.push_back(p.blocks[0]);
    p.blocks[1].instructions.clear();
    std::swap(p.blocks[0].instructions, p.blocks[1].instructions);
    for (int k = 0; k < 40; ++k) all_reduce(p, bit(1), 1);
    std::swap(p.blocks[0], p.blocks[1]);
    p.stages[0].clear();
    for (int k = 0; k < calls; ++k) p.stages[0].push_back({BlockId{0}, -1});
    p.stages[0].push_back({BlockId{1}, -1});
    Communication communication(t);
    SimulateOptions options;
    const Timeline replayed = simulate(p, communication, options);
    options.replay = false;
    EXPECT_EQ(replayed.step, simulate(p, communication, options).step);
    return replayed.step;
  };
  EXPECT_EQ(step(50, 7e-6), step(50, 0));
  EXPECT_GT(step(2, 7e-6), step(2, 0));
}

/// One rank computes for 10, its host waits for that and launches for 2: its transfer begins at 12
/// on a link that another rank's transfer of 20 has had so far. From then on both have half of it:
/// 8 are left of the other, until 28; the last 2 of 10 take until 30. The next launch ends at 15.
TEST(Host, LaunchesAfterAWaitFollowTheDevice) {
  Sharing sharing;
  const ResourceId link = sharing.add(1);
  const std::vector<Usage> usages{Usage{{{link, 1}}, 1, {}}};
  StepGraph graph(2, 2, {0, 0});
  graph.step(0, {Task{10, 0, -1}, kComputeStream, false, {}, {}, 0, false});
  graph.step(0, {Task{0, 10, 0}, 1, false, {}, {}, 2, true});
  graph.step(0, {Task{1, 0, -1}, kComputeStream, false, {}, {}, 3, false});
  graph.step(1, {Task{0, 20, 0}, 1, false, {}, {}, 0, false});
  // Begins with the third of rank 0.
  graph.meet(0, {Task{7, 0, -1}, kComputeStream, false, {}, {}, 0, false}, {1});
  graph.meet(1, {Task{7, 0, -1}, kComputeStream, false, {}, {}, 40, false}, {1});
  const auto played = graph.play(sharing, usages);
  ASSERT_EQ(played.stretched[0].size(), 1u);  // others: as long as alone
  EXPECT_EQ(played.stretched[0][0].instance, 1);
  EXPECT_EQ(played.stretched[0][0].ticks, 18);
  ASSERT_EQ(played.stretched[1].size(), 1u);
  EXPECT_EQ(played.stretched[1][0].instance, 0);
  EXPECT_EQ(played.stretched[1][0].ticks, 28);
}

// docs/sharing.md, "In chains": parts of 4, 6 and 5 on a link of 1; another transfer of 3 comes
// at 5.
TEST(Chains, WhatComesBetweenFindsThePartThatRuns) {
  Sharing sharing;
  const std::vector<Usage> usages{Usage{{{sharing.add(1), 1}}, 1, {}}};
  Contention c;
  Task chain;
  chain.chain = c.add_chain({{4, 0, -1}, {0, 6, 0}, {5, 0, -1}});
  c.add(chain);
  c.add({0, 3, 0, 5});
  const auto result = c.play(sharing, usages);
  EXPECT_EQ(result.end[1], 11);  // half of it from 5
  EXPECT_EQ(result.end[0], 18);  // 1 + 3 of the second part done by 11
  ASSERT_EQ(result.stretched.size(), 1u);
  EXPECT_EQ(result.stretched[0].part, 1);
  EXPECT_EQ(result.stretched[0].ticks, 9);
}

/// Chains against the same parts as tasks of their own, ordered one after the other.
TEST(Chains, TakeAsLongAsTheirPartsOneByOne) {
  std::mt19937 rng{20261201};
  const auto pick = [&](std::int64_t below) {
    return static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(below));
  };
  std::int64_t disturbed = 0, fewer = 0;
  for (int i = 0; i < 2000; ++i) {
    SCOPED_TRACE(::testing::Message() << "case " << i);
    Sharing whole, single;
    std::vector<ResourceId> resources;
    for (std::int64_t r = 1 + pick(4); r-- > 0;) {
      const double capacity = 0.5 + static_cast<double>(pick(3)) * 0.5;
      resources.push_back(whole.add(capacity));
      single.add(capacity);
    }
    std::vector<Usage> usages;
    for (int u = 0; u < 5; ++u) {
      Usage usage;
      for (const ResourceId r : resources) {
        if (pick(3) == 0) usage.demands.push_back({r, 0.25 + 0.25 * static_cast<double>(pick(5))});
        if (pick(6) == 0) usage.held.emplace_back(r, 0.125);
      }
      usage.weight = 1 + static_cast<double>(pick(3));
      usages.push_back(usage);
    }
    const auto task = [&] {
      return Task{pick(3) * pick(20), pick(3) * pick(50), static_cast<std::int32_t>(pick(6)) - 1,
                  pick(4) == 0 ? pick(100) : 0};
    };
    Contention chains, tasks;
    std::vector<std::int32_t> ends, last;  // of each chain: its last task
    for (std::int64_t k = 1 + pick(5); k-- > 0;) {
      std::vector<Task> parts;
      const std::int64_t base = pick(2) * pick(60);
      for (std::int64_t n = 1 + pick(6); n-- > 0;) parts.push_back(task());
      Task chain;
      chain.chain = chains.add_chain(parts);
      chain.earliest = base;
      ends.push_back(chains.add(chain));
      for (std::size_t n = 0; n < parts.size(); ++n) {
        parts[n].earliest += base;
        const std::int32_t id = tasks.add(parts[n]);
        if (n > 0) tasks.order(id - 1, id, Precedence::end_to_start);
        if (n == 0 && !last.empty() && pick(2) == 0) {
          const auto other = static_cast<std::size_t>(pick(static_cast<std::int64_t>(last.size())));
          tasks.order(last[other], id, Precedence::end_to_start);
          chains.order(ends[other], ends.back(), Precedence::end_to_start);
        }
      }
      last.push_back(static_cast<std::int32_t>(tasks.size()) - 1);
    }
    const auto joined = chains.play(whole, usages), apart = tasks.play(single, usages);
    for (std::size_t k = 0; k < ends.size(); ++k) {
      EXPECT_EQ(joined.end[static_cast<std::size_t>(ends[k])],
                apart.end[static_cast<std::size_t>(last[k])]);
    }
    std::int64_t lost[2] = {0, 0};
    for (const Loss& l : joined.losses) lost[0] += l.ticks;
    for (const Loss& l : apart.losses) lost[1] += l.ticks;
    EXPECT_EQ(lost[0], lost[1]);
    disturbed += !joined.stretched.empty();
    fewer += joined.events < apart.events;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GE(disturbed, 300);
  EXPECT_GE(fewer, 300);
}

TEST(Host, WaitsUntilItKnowsHowManyRowsExpertsGet) {
  const Topology t = load_topology("dgx-h100:1");
  Plan wanted = base_plan();
  wanted.dp = wanted.ep = 2;
  const auto step = [&](double launch, bool waits) {
    wanted.launches = {};
    wanted.launches.kernel = wanted.launches.transfer = Seconds{launch};
    wanted.launches.waits_for_counts = waits;
    const Program p = lowered(mixtral(), wanted);
    EXPECT_TRUE(std::any_of(p.blocks.begin(), p.blocks.end(), [&](const Block& b) {
      return std::any_of(b.instructions.begin(), b.instructions.end(),
                         [&](const Instruction& i) { return brings_rows(p, i); });
    }));
    const Timeline idle = run(p, t, Network::idle);
    EXPECT_LE(idle.step, run(p, t, Network::flows).step);
    EXPECT_LE(idle.step, run(p, t, Network::beside).step);
    return idle.step.count;
  };
  const std::int64_t free = step(0, true);
  // A fast host loses at most its launches after each wait; one that waits is never faster.
  EXPECT_GT(step(1e-9, true), free);
  EXPECT_LT(step(1e-9, true), free + 1'000'000);
  EXPECT_GT(step(2e-6, true), step(2e-6, false));
}

// Launches alone take time: where each stage's host waits for what comes, stages that take turns
// take the sum of their launches; else each host runs ahead and they take those of one.
TEST(Host, WaitsForMessagesOfItsNeighbours) {
  const Topology t = load_topology("dgx-h100:1");
  constexpr double kLaunch = 1e-3;
  Plan wanted = base_plan();
  wanted.pp = 2;
  wanted.global_batch = 3;
  wanted.schedule = Schedule::naive;
  const auto step = [&](bool waits, SendWait sends, double(&launched)[2]) {
    wanted.launches = {};
    wanted.launches.kernel = Seconds{kLaunch};
    wanted.launches.waits_for_messages = waits;
    wanted.send_wait = sends;
    const Program p = lowered(llama(), wanted);
    for (int stage = 0; stage < 2; ++stage) {
      launched[stage] = 0;
      for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) {
        for (const Instruction& i : p.blocks[call.block.index()].instructions) {
          if (i.kind == Kind::compute || i.kind == Kind::slice)
            launched[stage] += kLaunch * work_of(p, i, p.rank_on_stage(0, stage)).kernels;
        }
      }
    }
    const Timeline idle = run(p, t, Network::idle);
    const auto of_idle = static_cast<double>(idle.step.count);
    EXPECT_NEAR(of_idle, static_cast<double>(run(p, t, Network::flows).step.count), 1e-3 * of_idle);
    return 1e-12 * of_idle;
  };
  double of[2];
  // Whatever stands between a message and what reads it: a segment that runs again, a gather.
  for (const auto& [recompute, zero] : {std::pair{"none", 0}, {"full", 0}, {"none", 3}}) {
    SCOPED_TRACE(fmt::format("recompute {}, ZeRO-{}", recompute, zero));
    wanted.recompute = parse_recompute(recompute, "");
    wanted.zero = zero;
    wanted.dp = zero > 0 ? 2 : 1;
    wanted.global_batch = 3 * wanted.dp;
    const double ahead = step(false, SendWait::always, of);
    EXPECT_NEAR(ahead, std::max(of[0], of[1]), 0.03 * ahead);
    const double turns = step(true, SendWait::always, of);
    EXPECT_NEAR(turns, of[0] + of[1], 0.2 * turns);  // updates are beside each other
    EXPECT_GT(turns, 1.5 * ahead);
  }
  // Whoever does not wait for what it sends does not wait for what comes.
  EXPECT_EQ(step(true, SendWait::never, of), step(false, SendWait::never, of));
}

}  // namespace
}  // namespace partita
