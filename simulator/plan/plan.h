// simulator/plan/plan.h: how a network is partitioned: mesh, views, shardings, stages, schedule,
// policies.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/element_type.h"
#include "base/error.h"
#include "models/graph.h"
#include "simulator/plan/framework.h"
#include "simulator/program/mesh.h"
#include "simulator/program/program.h"

namespace partita {

enum class Schedule : std::uint8_t {
  naive,
  gpipe,
  one_f_one_b,
  interleaved,
  zero_bubble_h1,
  dualpipe
};
/// Does it run gradients of weights as blocks of their own, later than those of activations?
inline bool splits_backward(Schedule s) {
  return s == Schedule::zero_bubble_h1 || s == Schedule::dualpipe;
}
/// Copies of the network in the pipeline, each with its own micro-batches: DualPipe feeds one from
/// either end. Chunks of copy d are numbered from d times the chunks of one.
inline int directions(Schedule s) { return s == Schedule::dualpipe ? 2 : 1; }
/// Where a chunk, of any copy, lives.
inline int stage_of_chunk(Schedule s, int chunk, int stages) {
  return s == Schedule::dualpipe && chunk >= stages ? 2 * stages - 1 - chunk : chunk % stages;
}
std::string_view name(Schedule s);

/// `attention`: its cores; `selective`: what the plan's framework calls so.
enum class Recompute : std::uint8_t { none, attention, selective, full, first, patterns };
/// Which operators a backward computes again.
struct RecomputeSet {
  Recompute kind = Recompute::none;
  std::int64_t first = 0;  ///< blocks
  /// Of operators; behind a ~ of such whose results are not kept for those who read them either
  /// (Megatron-Core's CheckpointWithoutOutput, JAX's policies).
  std::vector<std::string> patterns = {};
  friend bool operator==(const RecomputeSet&, const RecomputeSet&) = default;
};
/// "none", "attention", "selective", "full", "first:4" or patterns with commas.
RecomputeSet parse_recompute(std::string_view text, const std::string& place);
std::string text(const RecomputeSet& set);

/// "Cut iteration dimension `dim` of operators matching `pattern` over `axis`." Rules apply in
/// order; an atom that an earlier rule has used for this operator is left out, so that a later rule
/// takes what is left.
struct ShardingRule {
  std::string pattern = "*";  ///< operator name, or "kind:grouped_product"
  Dim dim = Dim::sample;
  std::string axis;
  bool zigzag = false;
  /// Applies only to operators that no earlier rule has cut over any atom of this axis (sequence
  /// parallel regions: "what tensor parallelism leaves alone").
  bool where_unused = false;
};

bool rule_matches(const ShardingRule& rule, const Operator& op);

/// Element types by role.
struct Precision {
  ElementType parameters = ElementType::bf16;
  ElementType activations = ElementType::bf16;
  ElementType compute = ElementType::bf16;    ///< of the matrix products
  ElementType gradients = ElementType::fp32;  ///< accumulated
  ElementType gradient_communication = ElementType::fp32;
  ElementType optimizer = ElementType::fp32;
  bool master_copy = true;  ///< fp32 parameters beside low-precision ones
};

struct Plan {
  std::string strategy = "megatron";
  std::string framework = "megatron-core";
  std::int64_t tp = 1, pp = 1, dp = 1, cp = 1, ep = 1,
               etp = 0;  ///< etp 0: as tp where ep > 1, else tp
  std::int64_t virtual_stages = 1;
  /// Interleaved: micro-batches that walk the chunks together (Megatron-Core's
  /// microbatch_group_size_per_vp_stage); 0: pp, or the next more that leaves no group below pp.
  std::int64_t micro_batch_group = 0;
  std::int64_t micro_batch = 1;   ///< samples per data-parallel rank
  std::int64_t global_batch = 0;  ///< samples per step; 0: one micro-batch per rank
  bool sequence_parallel = false;
  enum class ContextExchange : std::uint8_t {
    all_gather,
    all_to_all,
    ring
  } context = ContextExchange::all_gather;
  bool context_given = false;  ///< else it is the framework's, where the network lets it
  Schedule schedule = Schedule::one_f_one_b;
  bool schedule_given = false;
  int zero = 0;                 ///< 0..3
  std::int64_t zero_group = 0;  ///< ranks that share one copy of the state (HSDP); 0: all of dp·cp
  RecomputeSet recompute;
  RecomputeSet selective{.kind = Recompute::attention};  ///< FrameworkProfile's, never `selective`
  /// What "selective" stands for filled in.
  const RecomputeSet& recomputed() const {
    return recompute.kind == Recompute::selective ? selective : recompute;
  }
  std::vector<std::int64_t> cuts;  ///< explicit: blocks per chunk, in order; empty: the rule
  Precision precision;
  std::string precision_name = "bf16";
  bool precision_roles = false;              ///< some role differs from what the name says
  Fp8Format fp8_format = Fp8Format::hybrid;  ///< of products in fp8: executed, times are one
  Optimizer optimizer;
  bool clip_given = false;          ///< optimizer.clip is the plan's own, not the framework's
  double framework_clip = 0;        ///< FrameworkProfile's clip
  Bytes bucket = 40_MiB;            ///< of gradients reduced by one call
  std::int64_t pad_vocabulary = 0;  ///< > 0: to a multiple of this x tp (Megatron: 128)
  bool overlap_gradients = true;    ///< reduce buckets while the backward goes on
  /// A token's row goes once to each NVLink domain (inside one: to each rank) that has experts of
  /// it, which hands it on: DeepEP, HybridEP. A price; what is executed sends a row an expert.
  bool rows_once = false;
  /// A micro-batch's exchanges of rows run beside another one's blocks (docs/cost.md, "In twos"):
  /// Megatron-Core's overlap_moe_expert_parallel_comm, DualPipe. A price; what is executed runs
  /// block after block. Left out: as the schedule does it.
  std::optional<bool> overlap_experts;
  bool exchanges_beside_blocks() const {
    return overlap_experts.value_or(schedule == Schedule::dualpipe && framework != "partita");
  }
  /// What only products in an 8- or 4-bit type read is gathered over tp in that type. A price.
  bool narrow_gathers = false;
  bool expert_bias_apart = false;  ///< of the framework (docs/cost.md): a price
  bool channels_first = false;     ///< FrameworkProfile's, where activations have 32 bits
  bool fuses_normalise = false;    ///< FrameworkProfile's
  bool joins_projections = false;  ///< FrameworkProfile's
  /// What runs again before a backward stops where nothing more is needed (FrameworkProfile's).
  bool recompute_stops_early = false;
  int score_passes_forward = 2, score_passes_backward = 3;  ///< FrameworkProfile's
  /// ZeRO-3: gather parameters again for the backward (true) or keep them from the forward.
  bool reshard_after_forward = true;
  /// ZeRO-3: gradients meet by the units that parameters are gathered in, not by `bucket`.
  bool reduces_units = false;
  StaysGathered stays_gathered;  ///< of those that are gathered again, FrameworkProfile's
  /// Products beside a gather or scatter of the sequence over tp go in parts, one for each rank of
  /// tp, while the next part travels.
  bool overlap_tensor_parallel = false;
  /// No transfer over tp runs beside a kernel: a backward gathers right before the kernel that
  /// reads it, and sums when the kernels before have ended.
  bool tensor_parallel_in_turn = false;
  bool save_gathered =
      false;  ///< keep all-gathered inputs for the backward instead of gathering again
  bool regathers_recomputed = false;  ///< again, too, where a recomputation has just gathered them
  /// Batches come from ranks of their own, one for each data-parallel rank (a role); else every
  /// rank makes what it needs.
  bool loader = false;
  /// > 0: parameters live on so many servers (times tp), ranks of their own; data-parallel ranks
  /// push gradients and pull parameters in every step. An update uses the gradient of `staleness`
  /// steps ago, so that workers need not wait for it.
  std::int64_t servers = 0, staleness = 0;
  /// What lies in the host's memory: optimizer state, which the host then updates; activations
  /// between forward and backward.
  bool offload_optimizer = false, offload_activations = false;
  std::int64_t offload_blocks = 0;  ///< > 0: activations of the first so many blocks only
  /// Stages meet through a queue: device to host, serialise, a broker (a rank of its own for each
  /// rank of a stage), host to device.
  bool message_queue = false;
  LossScale loss_scale;
  Launches launches;         ///< what the framework's host thread takes to start work on its device
  FrameworkKernels kernels;  ///< the framework's
  SendWait send_wait = SendWait::never;
  bool scatter_messages = false;
  /// Backward sums over tp start when the kernels before them have ended, a weight's gradient too;
  /// else beside these. From the framework profile.
  bool sums_in_turn = false;
  /// Shards are summed over the copies of a sharded state when the backward is over, as XLA does
  /// with a loop over layers; else bucket by bucket.
  bool sums_copies_last = false;
  int overlap_multiprocessors = 0;  ///< FrameworkProfile's: > 0: parts are copied between peers
  int scatter_multiprocessors = 0;  ///< FrameworkProfile's
  Allocations allocations;          ///< of the framework
  Compression compression;
  /// Batches are read from storage, each rank's samples from a shard of its own; else they are
  /// there.
  bool sharded_storage = false;
  /// Strategy replicas: > 0 averages their parameters every so many steps (local SGD).
  std::int64_t average_every = 0;
  /// Axes of the mesh, or parts of them, as they lie on the devices, innermost first, like {"dp",
  /// "tp", "pp"} or {"tp=4", "dp", "tp"}; empty: ranks in order, or `devices`.
  std::vector<std::string> placement;
  std::vector<std::int32_t> devices;  ///< of each rank; empty: as `placement` says
  /// How many places apart rings over an axis visit its ranks (docs/topologies.md, "Rings"); of
  /// axes that are not here: 1.
  std::map<std::string, std::vector<std::int64_t>> rings;
  /// Is it where and as the cluster has it, rank r on device r?
  bool as_ranked() const { return placement.empty() && devices.empty() && rings.empty(); }
  std::vector<ShardingRule> user_rules;  ///< before the strategy's own: per-operator shardings
  std::vector<std::string> freeze;
  std::vector<std::string> lora;
  std::int64_t lora_rank = 0;

  // Filled by a strategy: what the lowering reads.
  Mesh mesh;
  std::map<std::string, AtomList> axes;
  std::vector<ShardingRule> rules;
  AtomList pipeline;
  AtomList zero_atoms;  ///< candidates for sharded state, slowest first
  AtomMask replicas = 0;
  AtomMask root_state = 0;  ///< parameters and optimizer live on the first rank along these atoms
  std::vector<std::string> root_operators;  ///< run there only

  /// Of the mesh, and with the roles'.
  std::int64_t mesh_ranks() const { return tp * pp * dp * cp; }
  std::int64_t ranks() const { return dp * ranks_of_replica() + servers * tp; }
  /// Of one data-parallel rank: its mesh ranks, loader and brokers.
  std::int64_t ranks_of_replica() const {
    return tp * pp * cp + (loader ? 1 : 0) + (message_queue ? tp * cp : 0);
  }
  std::int64_t micro_batches() const;
  std::int64_t chunks() const { return pp * virtual_stages; }
};

/// Names of strategies: functions that write mesh, axes and rules.
std::vector<std::string> strategies();

/// Checks the numbers against each other and the network, then fills mesh, axes and rules by the
/// plan's strategy. Infeasible reasons name what does not hold and the legal choices.
Feasible<Plan> complete(const Graph& graph, Plan plan);

/// Blocks per chunk: explicit cuts, else equal counts where the chunks divide the layers, else
/// ⌊L/c⌋ or one more with the smaller first at the last chunk, then the first, then inward.
std::vector<std::int64_t> blocks_per_chunk(std::int64_t layers, std::int64_t chunks);
/// Chunk of every operator.
Feasible<std::vector<int>> chunk_of_operators(const Graph& graph, const Plan& plan);

/// Order of block instances on every stage: (forward, backward or backward by weight, chunk,
/// micro-batch).
struct Turn {
  BlockKind kind = BlockKind::forward;
  int chunk = 0;
  int micro_batch = 0;
  friend bool operator==(const Turn&, const Turn&) = default;
};
/// `group`: Plan::micro_batch_group of an interleaved schedule; 0: as many as stages.
std::vector<std::vector<Turn>> turns(Schedule schedule, int stages, int virtual_stages,
                                     int micro_batches, int group = 0);

/// YAML (schema partita.plan/1). What it does not say is of its framework: of `instead` (named at
/// `place`) if there is one, else of the one that it names, else of `unless_said`.
Plan load_plan(const std::string& file, std::string_view unless_said = "",
               std::string_view instead = "", const std::string& place = "");
/// Sets one key as a plan file would: set(plan, "tp", "4", "--vary"). A word that begins with * is
/// a pattern, with or without quotes; "x2" multiplies the number that the plan says.
void set(Plan& plan, const std::string& key, const std::string& value, const std::string& place);
std::string to_yaml(const Plan& plan);

Schedule parse_schedule(std::string_view text, const std::string& place);
Plan::ContextExchange parse_context_exchange(std::string_view text, const std::string& place);
void set_precision(Plan& plan, std::string_view text, const std::string& place);
/// Applies a framework's defaults (bucket size, main gradients' type, ...); InputError when
/// unknown.
void set_framework(Plan& plan, std::string_view text, const std::string& place);

/// What a framework's configurations are chosen by. Texts of tables, in small letters, are empty
/// where there is no table: what is of a version or of a row is then not meant.
struct Occasion {
  std::string framework, row, between_nodes;  ///< what a table calls version, network and cards
  std::string network, device, precision;     ///< names of the catalogue
  std::int64_t gpus = 0;
};
bool concerns(const Workload& workload, const Occasion& where, const Plan& plan);
/// Sets in the plan what the configuration sets of the keys (of plan files) that are `open`, and
/// says what changed. `overlaps`: as FrameworkProfile::overlap_tensor_parallel.
std::vector<std::string> apply(const Workload& workload, Plan& plan,
                               const std::function<bool(const char* key)>& open, bool& overlaps);

/// The plan as our executor runs it, which weights experts' rows when it combines them and keeps
/// what it made.
Plan executable(Plan plan);
/// The same, priced as that, too: without a framework's fusions, kernels, launches and allocations.
/// What passes between ranks, and when, stays the plan's.
Plan as_executed(Plan plan);

/// "1, 2, 3, 4, 6 or 12".
std::string divisors_text(std::int64_t n);

}  // namespace partita
