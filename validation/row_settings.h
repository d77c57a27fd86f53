// validation/row_settings.h: what a row's column of settings says in words, clause by clause
// (docs/published.md, "Settings in words").
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace partita::validation {

/// Empty: not said.
struct Settings {
  std::optional<bool> overlap_gradients;
  std::optional<bool> overlap_tensor_parallel;  ///< products beside their transfers, in parts
  std::optional<bool> overlap_experts;          ///< one micro-batch's rows beside another's blocks
  std::optional<bool> overlap_messages;         ///< between stages
  bool nothing_overlaps = false;  ///< nor does any kernel run beside a transfer over tp
  std::optional<bool> rows_once;  ///< DeepEP's or HybridEP's dispatcher, or another
  /// Rows of experts fill equal capacities, what does not fit is dropped; or none is.
  std::optional<bool> padded_capacity;
  std::optional<bool> compiled;  ///< by torch.compile
  std::optional<bool> graphs;    ///< CUDA graphs
  /// Of what they are: "" all, "attention", "mlp", or "beside experts" (all but their rows).
  std::string graphs_of;
  std::optional<bool> fused_loss;
  std::optional<bool> tied;  ///< table and output layer
  std::optional<bool> lora;
  std::optional<bool> offload_activations, offload_optimizer;
  std::int64_t offload_blocks = 0;  ///< > 0: activations of so many
  std::optional<bool> fp32_gradients;  ///< or in the parameters' type
  bool interleaved = false;
  std::string schedule;                    ///< a plan's name of it, where it is not the usual one
  std::string context;                     ///< a plan's context_exchange
  std::string precision;                   ///< "fp8", of products
  /// As a table's `cp`, `zero_or_fsdp` and `recompute` would say it.
  std::string context_parallel, sharding, recompute;
  std::vector<std::string> unread;         ///< clauses that none of this is, as written
};

/// Outside brackets clauses end with ";", ",", a line's end, " + ", "and", "but" or before
/// "without"; those of recomputation list modules and do not end with words. What stands in a
/// clause's brackets is a clause too, and may say of which part the clause is; braces
/// ("features={"moe_dispatcher": "deepep"}") hold clauses. A clause is off behind "no", "not",
/// "without" or "disable", with "off", "false", "disabled", "unused", "not used" or "not enabled"
/// in it, or with the value "none", "no", "n" or "0". "_" and "-" are spaces; letters of any case.
/// A flag of a command line ("--name=value", row_flags.h) is a clause.
Settings settings_of(std::string_view text);

}  // namespace partita::validation
