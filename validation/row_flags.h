// validation/row_flags.h: command lines in a row's column of settings (docs/published.md, "Flags").
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace partita::validation {

/// "--name value", "--name=value" or "--name".
struct Flag {
  std::string name;  ///< without "--"; of "--group.name" what follows the last point; "-" for "_"
  std::string value;
  std::string written;
};

struct CommandLine {
  std::vector<Flag> flags;  ///< in their order
  std::string words;        ///< the text without them
};

/// Flags begin with "--" and a letter at a word's start. One that takes no value, or whose comma or
/// semicolon ends it, leaves the words behind it to the words; `recompute-modules` and
/// `cuda-graph-scope` take all up to the next flag.
CommandLine command_line(std::string_view text);

/// What flags say as a table's columns would: sizes, parallelism, batches, precision,
/// recomputation, sharding; by column. Megatron-LM's, Megatron-DeepSpeed's and torchtitan's names.
std::map<std::string, std::string> cells_of(const std::vector<Flag>& flags);

/// A flag that is a column's (cells_of), the architecture's (megatron_flags), or one that changes
/// neither time nor memory.
bool is_read_elsewhere(const Flag& flag);

/// Megatron's, of a command line of flags only.
struct MegatronFlags {
  bool any = false;  ///< the text is a list of flags: what it does not say is off
  bool architecture = false;  ///< it says something of the network, behind words, too
  std::optional<std::int64_t> chunk_layers;  ///< of a virtual stage
  bool gated = false, untied = false, no_bias = false, rope = false, latent = false;
  bool overlap_gradients = false, overlap_tensor_parallel = false;
  bool fused_loss = false, grouped_product = false;
  bool local = false;            ///< Megatron's own layers, not Transformer Engine's
  bool flex_dispatcher = false;  ///< DeepEP or HybridEP
  bool no_dropout = false;
  std::string attention;  ///< of --attention-backend
};
MegatronFlags megatron_flags(std::string_view text);

}  // namespace partita::validation
