// simulator/search/predict.h: one plan's prediction, and the plain exhaustive search over plans.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "models/graph.h"
#include "simulator/engine/simulate.h"
#include "simulator/lower/lower.h"
#include "simulator/plan/plan.h"
#include "simulator/program/routing.h"
#include "topologies/topology.h"

namespace partita {

struct StageMemory {
  int stage = 0;
  Bytes total;
  Bytes resident;         ///< of it: what the framework holds beside the program's buffers
  Bytes kept_inputs;      ///< beside state and `resident` between steps: kept_inputs()
  Bytes saved;            ///< most that forward passes keep for backward ones
  Bytes saved_by_layers;  ///< most of it that layers' backward passes read
  Bytes reserved;         ///< by the framework's allocator
  std::array<Bytes, kCategoryCount> by_category;
};

/// What a figure stands on: specified (data sheet), measured, fitted, assumed; and its share of the
/// step.
struct RestsOn {
  std::string term, kind;
  double share = 0;
};

struct Prediction {
  Plan plan;
  std::int64_t devices = 0;
  Seconds step_time;
  std::optional<std::pair<Seconds, Seconds>> interval;  ///< 90 % of step_time; null: none known
  double tokens_per_second_per_device = 0;              ///< 0 for networks without sequences
  double samples_per_second = 0;
  double mfu = 0, hfu = 0;
  /// Of the rank whose device has least left, and that device's.
  Bytes peak_allocated, peak_reserved, peak_device, usable;
  OutsideMemory outside;  ///< of peak_device, beside peak_reserved
  Bytes peak_host;        ///< of what is offloaded, by the rank with most
  Bytes peak_host_node;   ///< by the node with most, its ranks at their own peaks
  Bytes host_memory;      ///< of that node; 0: its topology does not say
  bool host_fits = true;  ///< on every node that says what it has
  bool fits = false;
  std::vector<StageMemory> memory_by_stage;
  std::vector<Alive> alive;  ///< at the peak of the stage that needs most
  std::string peak_at;       ///< stage and block of the peak
  Breakdown breakdown;       ///< of the class that ends last
  /// What the step takes at least where it does not cut sequences over tp: less by 1.1 of the share
  /// that any rank waits for tp and its host of that and of what it computes.
  Seconds least_without_sequences;
  std::vector<RestsOn> rests_on;
  /// Which measured steps the whole of it is adjusted to, or that none are; "": nobody asked.
  std::string fit;
  Network network = Network::idle;
  std::vector<Contended> contended;  ///< of the class that ends last, most lost first
  std::vector<TimeSlice> over_time;  ///< if asked for: over_time()
  std::size_t classes = 0;
  std::int64_t instructions = 0;
};

/// What a rank's device holds beside its allocator's: as its file has measured it, else the
/// framework's context and NCCL's buffers (docs/simulation.md, "Memory").
OutsideMemory outside_memory(const Program& program, const RankClass& rank_class,
                             Communication& communication, const DeviceProfile& device);

/// A complete plan's program, of the network with the vocabulary padded as the framework does.
Feasible<Program> lower_padded(const Graph& graph, const Plan& plan);

/// Completes, lowers and simulates. `recorded`, `program`: filled if given. `only_if_fits`: a plan
/// that does not fit gets its memory, but no times. `routing`: which experts tokens go to; null:
/// balanced. The classes that `recorded` counts in are those of `network`.
Feasible<Prediction> predict(const Graph& graph, const Plan& plan, Communication& communication,
                             Timeline* recorded = nullptr, Program* program = nullptr,
                             bool only_if_fits = false, const RoutingSource* routing = nullptr,
                             Network network = Network::idle);

/// Values to try, all combinations. The rest of a candidate is the base plan's.
struct SearchSpace {
  std::vector<std::int64_t> tp, pp, cp, ep, micro_batch, virtual_stages;
  std::vector<std::int64_t> dp;  ///< empty: what the other sizes leave
  std::vector<int> zero;
  std::vector<RecomputeSet> recompute;
  std::vector<Schedule> schedules;
  std::vector<char> sequence_parallel;  ///< empty: wherever tp > 1
  std::vector<std::int64_t> etp = {0};  ///< 0: as tp; others only where experts and tp are cut
  int zero_pipelined = 3;               ///< the highest stage beside a pipeline
};

/// Every value that could be fastest for this network on this cluster (docs/command.md, "plan").
SearchSpace full_space(const Graph& graph, const Topology& topology, std::int64_t ranks,
                       const Plan& base);

struct SearchResult {
  std::vector<Prediction> plans;  ///< that fit, fastest first
  std::int64_t space = 0, evaluated = 0, pruned_memory = 0, pruned_bound = 0, illegal = 0;
  std::string example_illegal;  ///< one reason, for people
  Seconds search_time;
  std::optional<Prediction> smallest;  ///< if nothing fits: the plan that lacks least
  /// Plans that recompute every block, do not or hardly fit without, and may be faster than all of `plans`
  /// with as many recomputed as memory asks for: by an estimate, the best first, a few.
  std::vector<Prediction> to_refine;
};

/// How far a search is, for who watches it from another thread.
struct SearchProgress {
  std::atomic<std::int64_t> space{0}, done{0};  ///< plans
  std::atomic<double> fastest{0};               ///< step time of those that fit, s; 0: none yet
  std::atomic<std::int64_t> again{0};           ///< of the fastest, simulated with `network`
  std::atomic<bool> refining{false};            ///< the search is over
};

/// Simulates every plan of the space that can fit, each transfer alone on the network; the `keep`
/// fastest that fit with their allocator's blocks too are simulated again with `network` and
/// returned, fastest first. `adjustment`: what
/// measured steps say of prices.
SearchResult search(const Graph& graph, const Topology& topology, std::int64_t ranks,
                    const Plan& base, const SearchSpace& space, std::size_t keep,
                    std::size_t workers = 0, Network network = Network::idle,
                    const Adjustment& adjustment = {}, SearchProgress* progress = nullptr);

}  // namespace partita
