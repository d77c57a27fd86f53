// cli/options.h: flags shared by the commands, and what they mean for a plan.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "models/models.h"
#include "simulator/plan/plan.h"
#include "topologies/topology.h"

namespace CLI {
class App;
}

namespace partita::cli {

/// Flags that override a plan file; absent ones leave it alone. Texts are parsed late, so that a
/// message can name the flag.
struct PlanFlags {
  std::string file;
  std::optional<std::int64_t> tp, pp, dp, cp, ep, etp, virtual_stages, micro_batch, global_batch,
      zero, zero_group;
  bool sequence_parallel = false, no_sequence_parallel = false;
  std::string schedule, recompute, precision, framework, strategy, context_exchange, cuts;
  std::string network = "idle";
  std::vector<std::string> freeze, lora;
  std::int64_t lora_rank = 16;
  // model
  std::int64_t sequence = 0, layers = 0, vocabulary = 0;
  bool materialised_attention = false;
  std::optional<double> dropout;

  void add_to(CLI::App& app, bool fixed_axes);
};

/// File and flags put together; `dp` 0 where neither says. InputError names flag, value and remedy.
Plan plan_from(const PlanFlags& flags, const std::string& default_framework);

/// dp = ranks / (tp pp cp), or a check that the given one agrees.
void settle_ranks(Plan& plan, std::int64_t ranks, const std::string& where);

ModelOptions model_options(const PlanFlags& flags);
/// Loads the network and applies freezing and adapters.
Graph load_graph(const std::string& model, const PlanFlags& flags, const Plan& plan);

}  // namespace partita::cli
