// What a measured profile predicts: cores that ranks share, transfers beside work. Examples of
// docs/simulation.md and docs/calibration.md.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "simulator/engine/simulate.h"
#include "validation/calibrate.h"

namespace partita::validation {
namespace {

constexpr double kMs = 1e-3;

Topology host(const Profile& profile, int ranks) {
  const std::string folder = ::testing::TempDir() + fmt::format("predicted-{}", ::getpid());
  std::filesystem::create_directories(folder);
  std::ofstream(folder + "/device.yaml") << device_yaml(profile);
  std::ofstream(folder + "/cluster.yaml") << cluster_yaml(profile, "device.yaml", ranks);
  Topology t = load_topology(folder + "/cluster.yaml");
  std::filesystem::remove_all(folder);
  return t;
}

/// Zeroing 1 KiB takes `zero_ms`; nothing else does.
Profile profile_of(int cores, int ranks, double zero_ms) {
  Profile p;
  p.provenance = "a test";
  p.cores = cores;
  p.kernels["zero"] = {{ranks, 0, 0, 0, 1, 1024, Seconds{zero_ms * kMs}, 0}};
  return p;
}

BufferId buffer(Program& p) {
  Buffer b;
  b.name = fmt::format("buffer {}", p.buffers.size());
  b.category = Category::buffers;
  b.scope = Scope::step;
  b.shape = {{Dim::feature, 256}};
  b.layout.dims.resize(1);
  p.buffers.push_back(std::move(b));
  return BufferId{p.buffers.size() - 1};
}
Instruction zero(Program& p) {
  Instruction i;
  i.kernel = Kernel::zero;
  i.writes = {buffer(p)};
  return i;
}
Instruction half(Program& p, Kind kind, int peer_stage) {
  Instruction i;
  i.kind = kind;
  i.stage = peer_stage;
  (kind == Kind::send ? i.reads : i.writes) = {buffer(p)};
  return i;
}
Program blocks(int count) {
  Program p;
  p.streams = {"compute"};
  p.blocks.resize(static_cast<std::size_t>(count));
  for (int s = 0; s < count; ++s) {
    Block& b = p.blocks[static_cast<std::size_t>(s)];
    b.name = "work";
    b.kind = BlockKind::step;
    b.stage = s;
    p.stages.push_back({{BlockId{static_cast<std::size_t>(s)}, -1}});
  }
  if (count > 1) {
    p.mesh.atoms = {{"pp", count}};
    p.pipeline = {0};
  }
  return p;
}
double step_ms(const Program& p, const Profile& profile) {
  Communication c(host(profile, static_cast<int>(p.ranks())));
  return to_seconds(simulate(p, c).step).count / kMs;
}

TEST(SharedCores, RanksTakeTurns) {
  // Four ranks on two cores: two zero, then the other two, then all reduce together.
  Program p = blocks(1);
  p.mesh.atoms = {{"dp", 4}};
  p.blocks[0].instructions = {zero(p)};
  Profile profile = profile_of(2, 4, 1);
  EXPECT_NEAR(step_ms(p, profile), 2, 1e-9);
  Instruction reduce;
  reduce.kind = Kind::collective;
  reduce.collective = CollectiveKind::all_reduce;
  reduce.atoms = 1;
  reduce.reads = {buffer(p)};
  reduce.writes = {buffer(p)};
  p.buffers[reduce.reads[0].index()].layout.partial = 1;
  p.blocks[0].instructions.push_back(reduce);
  // 0.4 ms with four at work: 0.2 ms of a core each.
  profile.collectives["all_reduce"] = {{4, Bytes{1024}, Seconds{0.4 * kMs}, 0, 4}};
  EXPECT_NEAR(step_ms(p, profile), 2.4, 1e-9);
  // Measured alone on two cores it needs as much of a core as it takes: twice 0.4 ms.
  profile.collectives["all_reduce"] = {{4, Bytes{1024}, Seconds{0.4 * kMs}, 0, 2}};
  EXPECT_NEAR(step_ms(p, profile), 2.8, 1e-9);
  // A core for each: nobody waits.
  profile.cores = 4;
  EXPECT_NEAR(step_ms(p, profile), 1.4, 1e-9);
}

TEST(SharedCores, WhoWaitsForAnotherNeedsNoCore) {
  // A pipeline of two stages: on one core as on two.
  Program p = blocks(2);
  p.blocks[0].instructions = {zero(p), half(p, Kind::send, 1)};
  p.blocks[1].instructions = {half(p, Kind::receive, 0), zero(p)};
  for (const int cores : {1, 2}) {
    Profile profile = profile_of(cores, 2, 1);
    profile.collectives["send"] = {{2, Bytes{1024}, Seconds{0.3 * kMs}, 0, 2}};
    profile.collectives["send_held"] = {{2, Bytes{1024}, Seconds{0.1 * kMs}, 0, 2}};
    profile.collectives["receive_held"] = {{2, Bytes{1024}, Seconds{0.1 * kMs}, 0, 2}};
    EXPECT_NEAR(step_ms(p, profile), 2.3, 1e-9) << cores << " cores";
  }
}

TEST(Overlap, WhatHidesOfATransferIsPredicted) {
  // 3 ms of arithmetic, 2 ms of transfer: the three programs that overlap is measured by.
  for (const auto& [overlap, both] : {std::pair{0.0, 5.0}, {0.5, 4.0}, {1.0, 3.0}}) {
    Profile profile = profile_of(2, 2, 3);
    profile.overlap = overlap;
    profile.overlap_measured = true;
    profile.collectives["send"] = {{2, Bytes{1024}, Seconds{2 * kMs}, 0, 2}};
    Program p = blocks(2);
    p.blocks[0].instructions = {half(p, Kind::send, 1)};
    p.blocks[1].instructions = {half(p, Kind::receive, 0)};
    EXPECT_NEAR(step_ms(p, profile), 2, 1e-9) << "the transfer alone";
    p.blocks[0].instructions.push_back(zero(p));
    p.blocks[1].instructions.insert(p.blocks[1].instructions.begin(), zero(p));
    EXPECT_NEAR(step_ms(p, profile), both, 1e-9);
  }
}

}  // namespace
}  // namespace partita::validation
