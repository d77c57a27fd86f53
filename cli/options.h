// cli/options.h: flags shared by the commands, and what they mean for a plan.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "models/models.h"
#include "simulator/plan/plan.h"
#include "simulator/search/predict.h"
#include "topologies/topology.h"
#include "validation/fit_rows.h"

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
  bool sequence_parallel = false, no_sequence_parallel = false, loader = false;
  std::string schedule, recompute, precision, framework, strategy, context_exchange, cuts;
  std::string network = "flows";
  std::string profile;    ///< of partita fit; "": none
  std::string placement;  ///< axes, devices, a file or "search"; "": the plan's
  std::string routing;    ///< balanced, zipf:S or a file; "": the command's default
  std::vector<std::string> set, freeze, lora;
  std::optional<std::int64_t> lora_rank;
  // model
  std::optional<std::int64_t> sequence, layers, vocabulary;
  bool materialised_attention = false;
  bool framework_defaults = false;
  std::optional<double> dropout;
  std::vector<YamlEdit> model_edits;  ///< whatif only

  Network sharing() const { return network_named(network).value_or(Network::flows); }
  void add_to(CLI::App& app);
  void add_framework_defaults(CLI::App& app);
  void add_network(CLI::App& app);
  void add_profile(CLI::App& app);
  void add_placement(CLI::App& app);
  void add_routing(CLI::App& app);
};

/// The profile that --profile names; InputError where the order of axes is to be searched, whose
/// choices are compared as the catalogue prices them.
std::optional<validation::FitProfile> fit_of(const PlanFlags& flags);

/// File and flags put together; `dp` 0 where neither says. InputError names flag, value and remedy.
/// A key of a plan file that a flag gives.
struct GivenKey {
  std::string key, value, flag;
};
/// `more` stands behind what the flags say. Of a framework that any of them gives, all others'
/// values stand behind what it sets, wherever they are.
Plan plan_from(const PlanFlags& flags, const std::string& default_framework,
               const std::vector<GivenKey>& more = {});

/// What the flags say of the parameters that are trained; `none` is what a plan file's is.
void set_trained(Plan& plan, const PlanFlags& flags);

/// Leaves in the space only what flags or plan file give.
void restrict_space(SearchSpace& space, const PlanFlags& flags, const Plan& given);

/// dp = ranks / (tp pp cp), or a check that the given one agrees.
void settle_ranks(Plan& plan, std::int64_t ranks, const std::string& where);

/// set() of simulator/plan with messages that name the flag: a flag has no line and no path.
void set_key(Plan& plan, const std::string& key, const std::string& value, const std::string& flag);

/// Does the plan file or a --set name this key?
bool in_plan(const PlanFlags& flags, const std::string& key);

/// What the user left open of framework, precision, global batch and sequence, and what stands in
/// for it: "precision bf16". `plan` and `graph` are those of the prediction; `given` adds keys that
/// are set in another way.
std::vector<std::string> assumptions(const PlanFlags& flags, const Plan& plan, const Graph& graph,
                                     const std::vector<std::string>& given = {});

/// load_topology, and a word where model and topology have changed places.
Topology load_cluster(const std::string& text, const TopologyEdits& edits = {});

/// InputError{flag} if one of these files is another one too, by whatever path: its figures would
/// count twice.
void reject_repeats(const std::string& flag, const std::vector<std::string>& files);

/// InputError{flag} if a file could not be written there; before the work, not after it.
/// `others`: what the command reads or writes besides, by flag: none of them is overwritten.
void check_writable(const std::string& flag, const std::string& file,
                    const std::vector<std::pair<std::string, std::string>>& others = {});
/// MachineError{flag} where the text cannot be written.
void write_text(const std::string& flag, const std::string& file, const std::string& text);

/// "2 cores of AMD EPYC 9354": what profiles measured here are recognised by.
std::string this_machine();

/// InputError{flag} for a profile that another machine was measured for: it says nothing of what is
/// measured here.
void refuse_foreign(const Topology& topology, const std::string& file, const std::string& flag);

ModelOptions model_options(const PlanFlags& flags);
/// --framework-defaults: what the plan's framework does where neither flag nor file says otherwise,
/// and what its configuration of the network on such devices sets (docs/plan.md), as rows of tables
/// have it. `given`: plan keys that are said in another way. Says what it changed; nothing without
/// the flag. Before load_graph: attention and dropout are the network's.
std::vector<std::string> framework_defaults(PlanFlags& flags, Plan& plan, const std::string& model,
                                            const Topology& topology,
                                            const std::vector<std::string>& given = {});
/// Loads the network and applies freezing and adapters.
Graph load_graph(const std::string& model, const PlanFlags& flags, Plan& plan);

}  // namespace partita::cli
