// tests/simulator/random_collective.h: a collective drawn from all rows on clusters of the
// catalogue.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "simulator/engine/flows.h"

namespace partita {

/// A row of kAlgorithms among some devices of a cluster.
struct RandomCollective {
  AlgorithmRow row{};
  Topology topology;
  std::vector<std::int64_t> ranks;
  Bytes payload;
  Rhythm rhythm;
  EvenCut cut;
  NetworkTraffic traffic() const { return traffic_of(rhythm, cut, ranks, topology); }
};

/// `symmetric`: the first devices in order; else any.
inline RandomCollective random_collective(std::mt19937_64& rng, bool symmetric) {
  const auto pick = [&](int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); };
  const char* names[] = {"dgx-h100:2", "gb200-nvl72:6", "dgx-a100-80gb:3", "a100-pcie-8:2",
                         "dgx1-v100:2"};
  const AlgorithmRow row =
      kAlgorithms[static_cast<std::size_t>(pick(0, static_cast<int>(kAlgorithms.size()) - 1))];
  const bool in_switch = row.algorithm == Algorithm::nvls || row.algorithm == Algorithm::nvls_tree;
  const int cluster = pick(0, in_switch ? 1 : 4);
  // The DGX has a switch to a node: whole nodes in order.
  symmetric |= in_switch && cluster == 0;
  Topology topology = load_topology(names[cluster]);
  std::vector<std::int64_t> ranks(topology.device_count());
  std::iota(ranks.begin(), ranks.end(), 0);
  if (!symmetric) std::shuffle(ranks.begin(), ranks.end(), rng);
  ranks.resize(static_cast<std::size_t>(symmetric ? pick(1, 2) * static_cast<int>(ranks.size()) / 2
                                                  : pick(2, static_cast<int>(ranks.size()))));
  const auto n = static_cast<std::int32_t>(ranks.size());
  std::vector<std::int32_t> levels;
  if (in_switch && cluster == 0 && n == 16) levels = {8, 2};
  const Bytes payload{pick(0, 2) > 0 ? n * std::int64_t{pick(1, 3'000'000)}
                                     : std::int64_t{pick(0, 90'000'000)}};
  Rhythm r = rhythm(row.kind, row.algorithm, n, levels);
  const EvenCut cut(row.kind, r, payload);
  return {row, std::move(topology), std::move(ranks), payload, std::move(r), cut};
}

}  // namespace partita
