// validation/row_text.h: what the free text of a table's cells means. Each rule is stated in
// docs/published.md; text that none of them knows gives an empty result, never a guess.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/units.h"

namespace partita::validation {

/// ASCII letters small.
std::string lower(std::string_view text);
/// Letters small, what stands in round or square brackets gone, runs of space one space, trimmed.
std::string plain_text(std::string_view text);
/// plain_text with letters, digits and dots only: "LLAMA3.1_405B (SFT)" -> "llama3.1405b". A dot
/// stays between digits.
std::string squeezed(std::string_view text);
/// Is `word` in the text, with no small letter, digit or underscore on either side?
bool has_word(std::string_view text, std::string_view word);
/// A whole cell that is a number, finite and not negative; empty otherwise.
std::optional<double> number(std::string_view text);

/// "[N x] RATE [per node|per GPU]" anywhere in the text.
struct NetworkRate {
  BytesPerSecond rate;   ///< of all N together, one direction
  bool per_gpu = false, per_card = false;  ///< else per node
  bool bare = false;                       ///< of what is not said
  friend bool operator==(const NetworkRate&, const NetworkRate&) = default;
};
/// Bits ("400 Gb/s", "400Gbps", "25 Gbit/s") and bytes ("50 GB/s"). Of several clauses the one that
/// says compute counts, those that say storage or management do not; of several rates the last
/// before "per node" or "per GPU", else the first. After "inter:" if there is one.
std::optional<NetworkRate> network_rate(std::string_view text);

/// Name of the plan's precision, and whether gradients are accumulated in fp32 whatever the
/// framework does.
struct PrecisionText {
  std::string name;
  bool fp32_gradients = false;
  bool fp32_beside = false;  ///< narrow products among parameters and activations in fp32
  friend bool operator==(const PrecisionText&, const PrecisionText&) = default;
};
std::optional<PrecisionText> precision_of(std::string_view text);

/// The plan's recompute text: "none", "full", "attention", "selective" or operator patterns.
std::optional<std::string> recompute_of(std::string_view text);

/// Blocks that run again as a whole, of all.
struct RecomputedBlocks {
  std::int64_t every = 1;  ///< the last of each so many ("every other layer": 2)
  std::int64_t first = 0;  ///< > 0: the first so many of a pipeline's chunk ("block, 10 layers")
  std::int64_t in_all =
      0;  ///< > 0: so many of the network ("4 of 32 layers"), of each chunk as many
  friend bool operator==(const RecomputedBlocks&, const RecomputedBlocks&) = default;
};
/// Empty: all, or none, or parts of blocks.
std::optional<RecomputedBlocks> recomputed_blocks(std::string_view text);

/// How state is sharded.
struct ShardingText {
  std::optional<int> zero;  ///< empty: as the framework does ("DDP" of one that shards anyway)
  std::int64_t group = 0;   ///< ranks that share one copy; 0: all
  bool reshard = true;
  bool offload_optimizer = false;
  bool offload_parameters = false;  ///< which plans do not know
  bool hybrid = false;  ///< ranks of a node share one copy, unless `group` says otherwise
  friend bool operator==(const ShardingText&, const ShardingText&) = default;
};
std::optional<ShardingText> sharding_of(std::string_view text);

/// "on", "off" and texts that begin so.
std::optional<bool> switch_of(std::string_view text);

/// "80GB", "80 GB", "96G" of a text -> 80, 80, 96: the first.
std::optional<double> gigabytes(std::string_view text);

/// Billions of parameters in a network's name: "GPT-2 1.5B", "MPT-125m", not "8x7B", "A3B".
std::optional<double> billions_of(std::string_view name);
/// Is it a mixture's name: "8x7B", "17B-16E", "480B A35B"?
bool names_experts(std::string_view name);

/// FrameworkKernels::flash of a kernel's name in small letters: "fa2", "sdpa flash v2" 2,
/// "flash-attn 1.0" 1, "fa3", "cudnn" 0. Empty: it does not say.
std::optional<int> flash_version_of(const std::string& kernel);

/// Which bytes a measurement of memory counts, and whose.
struct MemoryQuantity {
  enum class What : std::uint8_t {
    allocated,          ///< peak of the framework's allocations
    reserved,           ///< peak of what its allocator holds
    device,             ///< reserved, context and communicators: nvidia-smi
    printed,            ///< what the framework prints, mostly `device`
    state,              ///< parameters, gradients and optimizer (or some), the mean of ranks
    after_step,         ///< and what the framework keeps allocated between steps
    activations,        ///< that forward passes keep for backward ones
    activations_layer,  ///< of one block
    activations_ratio,  ///< against the same plan without recompute and sequence parallelism
    fits,               ///< an out-of-memory fact
  } what = What::printed;
  enum class Who : std::uint8_t { most, rank, logging, first, last } who = Who::most;
  int rank = 0;  ///< of Who::rank
  bool parameters = true, gradients = true, optimizer = true;  ///< of What::state
  friend bool operator==(const MemoryQuantity&, const MemoryQuantity&) = default;
};
/// Empty for what is no memory of a rank (a layer's time).
std::optional<MemoryQuantity> memory_quantity(std::string_view text);

/// "grad accumulation=4" -> 4.
std::optional<std::int64_t> accumulation_of(std::string_view text);

/// What a printed rate of floating-point operations counts (docs/published.md).
enum class FlopFormula : std::uint8_t {
  hardware_4x,  ///< 96 B s l h² (1 + s/6h + V/16lh): Megatron with full recompute
  model_3x,     ///< 72 B s l h² (1 + s/6h + V/12lh): without
  six_n,        ///< 6 N + 12 l h s per token (PaLM)
  six_n_alone,  ///< 6 N per token: attention counts nothing
  eight_n,      ///< 8 N per token
};
std::optional<FlopFormula> flop_formula(std::string_view text);

}  // namespace partita::validation
