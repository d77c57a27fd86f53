// simulator/search/refine.h: what a search's space leaves as its base has it, tried on one plan.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "simulator/search/predict.h"

namespace partita {

/// One change of a plan, and what it leads to.
struct Refinement {
  std::string what;  ///< for people: "recompute of 24 blocks", "--set rows_once=true"
  Prediction prediction;
};

struct Refined {
  Seconds given;  ///< step time of the plan that was given
  /// Changes that any framework can carry out, each on top of those before: the last is the result.
  std::vector<Refinement> taken;
  /// Switches that a framework must have, on the result, or on what was given: each alone, fastest
  /// first, and those that make each other's result faster together, if several do. What would not
  /// be faster, or does not fit, is not there.
  std::vector<Refinement> switches, together;
  std::int64_t simulated = 0;
};

/// What may be changed: not what the user has said.
struct RefineLimits {
  bool recompute = true, cuts = true;
  std::set<std::string> given = {};  ///< keys of plan files: their switches are not tried
  std::size_t rounds = 8;            ///< changes that are taken at most
  double least_gain = 0.001;         ///< of the step; less is no change worth a line
  std::int64_t most_instructions = 100'000'000;  ///< simulated for changes; for switches again
};

/// From `plan`, which fits, on: fewer blocks recomputed, as memory allows on each stage; sets of
/// operators instead of blocks; blocks moved off the first and the last stage. Then switches:
/// products in parts beside transfers over tp, exchanges of experts beside blocks, rows once, ...
/// `others`: slower ones, whose recomputation may be lessened too (SearchResult::to_refine): the
/// first change that is taken may lead from one of them.
Refined refine(const Graph& graph, const Topology& topology, const Prediction& plan,
               Network network, const Adjustment& adjustment = {}, const RefineLimits& limits = {},
               const std::vector<Prediction>& others = {}, std::size_t workers = 0);

/// What there is to say beyond a search's plans.
struct Beyond {
  std::optional<Refined> refined;     ///< of the first plan
  std::vector<Refinement> would_fit;  ///< where none fits
};

/// Of a plan that does not fit: switches under which it does, fastest first.
std::vector<Refinement> fitting(const Graph& graph, const Topology& topology,
                                const Prediction& plan, Network network,
                                const Adjustment& adjustment = {}, const RefineLimits& limits = {},
                                std::size_t workers = 0);

/// "24 blocks" of a set that names whole blocks alone; else its text.
std::string in_words(const RecomputeSet& set);

}  // namespace partita
