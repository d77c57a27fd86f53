// simulator/plan/framework.h: what a framework does unless it is told otherwise.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/units.h"
#include "simulator/program/program.h"

namespace partita {

/// When a stage's compute stream waits until what it sends to the next has left.
enum class SendWait : std::uint8_t { never, not_interleaved, always };

/// Under ZeRO-3 with resharding, what is not gathered again for the backward (docs/plan.md): what
/// the forward gathers last, what is in no block, or what is wanted again before so many elements
/// of parameters have been read.
struct StaysGathered {
  enum Kind : std::uint8_t { near, last, root };
  Kind kind = near;
  std::int64_t elements = 0;  ///< of `near`; 0: nothing stays
  friend bool operator==(const StaysGathered&, const StaysGathered&) = default;
};
/// "nothing", "last", "root" or a number of elements.
StaysGathered parse_stays_gathered(std::string_view text, const std::string& place);
std::string name(const StaysGathered& s);

/// What a framework's own configuration of a network on a device sets. Empty lists and 0 are any.
struct Workload {
  std::vector<std::string> frameworks;     ///< patterns of what tables call versions of it
  std::vector<std::string> networks;       ///< patterns of catalogue names
  std::vector<std::string> rows;           ///< patterns of what tables call them, in lower case
  std::vector<std::string> devices;        ///< patterns of device names
  std::vector<std::string> precisions;     ///< their names
  std::vector<std::string> between_nodes;  ///< patterns of what tables say is between nodes
  std::int64_t gpus = 0;
  std::optional<std::int64_t> zero;  ///< of the row's plan
  std::optional<bool> rows_once;
  std::optional<bool> graphs, graphs_beside_experts;    ///< Launches'
  std::optional<bool> fused_experts;                    ///< FrameworkKernels'
  std::optional<bool> overlaps_experts;                 ///< Plan's overlap_experts
  std::optional<bool> overlaps_tensor_parallel;         ///< FrameworkProfile's
  std::optional<bool> lora;                             ///< adapters are trained
  std::optional<bool> recompute_stops_early;
  std::optional<bool> blocking;     ///< Launches'
  std::string graphs_of;            ///< Launches'
  std::string recompute;            ///< of rows that print none
  std::int64_t offload_blocks = 0;  ///< > 0: Plan's, of activations
  /// > 0: a sequence is packed from samples of so many tokens, which do not see each other.
  std::int64_t packed = 0;
  std::int64_t zero_group = 0;           ///< > 0: Plan's, of rows that print none
  std::optional<bool> narrow_gradients;  ///< in the parameters' type
  /// > 0: FrameworkKernels'.
  int activation_passes_forward = 0, activation_passes_backward = 0;
  std::string source;
};

/// A configuration of the framework: what it sets, under the names of a table's columns ("ep",
/// "micro_batch_per_dp_rank", "precision").
struct Recipe {
  std::map<std::string, std::string> sets;
  /// Not empty: of rows that print these, two at least, and of the rest nothing else; a row need
  /// not name it.
  std::map<std::string, std::string> when;
  std::vector<std::string> frameworks;  ///< of those: patterns of what tables call versions; or any
};

/// A framework file (schema partita.framework/1). Every setting has an entry in `sources` under its
/// YAML key: a document, a line of code, or "assumed".
struct FrameworkProfile {
  std::string name;  ///< "megatron-core"
  std::string like;  ///< another profile, whose settings it has where its file sets none
  /// What tables of measurements call it: patterns, letters of any case.
  std::vector<std::string> aliases;
  /// Not empty: code of these networks only, patterns of what tables call them.
  std::vector<std::string> networks;
  /// Not empty: as it runs in these types only, likewise.
  std::vector<std::string> precisions;
  /// Not empty: as it runs on these devices only, patterns of their names.
  std::vector<std::string> devices;
  /// Of rows that print nothing that came later: a sharding of the state, or a network of gated
  /// blocks, RMS norms, groups of heads or experts.
  bool early = false;

  /// Not empty: the profile of the same code where a row does not say that it was compiled.
  std::string uncompiled;

  // Of every plan.
  std::int64_t pad_vocabulary = 0;  ///< > 0: to a multiple of this x tp
  bool fp32_gradients = true;       ///< else accumulated and sent in the parameters' type
  Bytes bucket;                     ///< of gradients reduced by one call
  bool overlap_gradients = true;
  Launches launches;  ///< of a host that launches beside its device; zero: it is its device
  FrameworkKernels kernels;
  SendWait send_wait = SendWait::never;
  bool scatter_messages = false;  ///< between stages, over tp
  /// Kept by a part of the sequence that travels beside products (overlap_tensor_parallel); 0: by
  /// any transfer's.
  int overlap_multiprocessors = 0;
  int scatter_multiprocessors = 0;  ///< of forward sums of wide products; 0: as others
  bool sums_in_turn = false;  ///< backward, over tp, after weights' gradients
  bool sums_copies_last = false;  ///< Plan's
  Allocations allocations;
  /// The first of its workspaces in deterministic runs; both in those of its own layers. 0: alike.
  Bytes workspace_deterministic, workspace_local;
  Bytes loss_forward_fused;        ///< Allocations::loss_forward of the loss that is a flag
  double logit_forward_fused = 0, logit_backward_fused = 0;  ///< FrameworkKernels' of that loss
  bool save_gathered = false;      ///< all-gathered inputs are kept for the backward
  bool regathers_recomputed = false;  ///< Plan's
  bool reduces_units = false;         ///< Plan's
  bool ring_context = false;          ///< context parallelism: Plan::ContextExchange::ring
  bool expert_bias_apart = false;  ///< experts' output biases are added by kernels of their own
  bool rows_once = false;          ///< a token's row goes once to a domain that has experts of it
  bool narrow_gathers = false;     ///< Plan's
  double clip = 0;  ///< the norm that it scales gradients down to by default; 0: none
  Fp8Format fp8_format = Fp8Format::e4m3;
  /// 32-bit images lie channels first (NCHW), and so are turned for every product of tensor cores.
  bool channels_first = false;
  /// A batch norm's kernel adds the residual and applies the activation that follow it.
  bool fuses_normalise = false;
  /// Queries, keys and values are one product; so are a gated activation's two halves.
  bool joins_projections = false;
  /// A segment that runs again ends with the last operator whose backward needs what it makes.
  bool recompute_stops_early = false;
  StaysGathered stays_gathered;
  /// How often the scores of a materialised attention pass through memory between its products.
  int score_passes_forward = 2, score_passes_backward = 3;

  // Where a table does not say.
  std::string precision = "bf16";
  int zero = 0;
  /// The highest ZeRO stage with pipeline parallelism: 1 where parameters stay gathered and
  /// gradients whole until the last micro-batch.
  int zero_pipelined = 1;
  int zero_highest = 3;  ///< the highest ZeRO stage that it has: what a search tries
  bool reshard_after_forward = true;
  /// A pipeline makes micro-batches of one sample of the batch that a rank is given; where
  /// interleaved, a rank has two stages.
  bool splits_batch = false;
  bool sequence_parallel = false;  ///< where tp > 1
  bool flash_attention = true;
  /// > 0: its flash kernels need this compute capability, and types of at most 16 bits.
  int flash_capability = 0;
  double dropout = 0;  ///< of a network that says nothing of it
  std::string recompute = "none";
  std::string selective = "attention";   ///< what it recomputes where told "selective" alone
  bool overlap_tensor_parallel = false;  ///< of networks without experts, sequence parallel
  bool mtp = false;  ///< trains the multi-token prediction modules of a network that has them
  bool logs_first_stage = false;  ///< a "logging rank" is of the first stage, not the last
  bool logs_hardware_flops = false;  ///< its FLOP/s count what is computed again
  /// Which memory it prints: "device" (as nvidia-smi), "reserved" or "allocated".
  std::string logs_memory = "device";
  std::string model;              ///< catalogue entry whose kind of block an unnamed network has
  std::int64_t vocabulary = 0;    ///< of an unnamed network
  /// Mean tokens that a sample of BERT's pre-training has in its batch, of at most 512; 0: padded
  /// to 512.
  std::int64_t mean_of_512 = 0;

  std::map<std::string, Recipe> recipes;  ///< by name
  std::vector<Workload> workloads;        ///< later ones win

  std::map<std::string, std::string> sources;
};

/// A name of framework_catalogue(). InputError{place} otherwise.
FrameworkProfile load_framework(std::string_view name, const std::string& place);

/// Names of the framework files, sorted.
std::vector<std::string> frameworks();

/// From a file's text; `file` is used in messages.
FrameworkProfile parse_framework(const std::string& text, const std::string& file);

}  // namespace partita
