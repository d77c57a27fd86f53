#include "simulator/search/refine.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "base/error.h"
#include "base/parallel.h"

namespace partita {
namespace {

struct Trial {
  std::string what;
  Plan plan;
};

bool has_experts(const Graph& g) {
  return std::any_of(g.operators.begin(), g.operators.end(), [](const Operator& op) {
    return std::holds_alternative<GroupedProduct>(op.operation);
  });
}

/// What a pattern names of one block: "mlp.*" of "layers.12.mlp.*"; "" where it is none of a block.
std::string of_block(const std::string& pattern) {
  const auto dot = pattern.starts_with("layers.") ? pattern.find('.', 7) : std::string::npos;
  return dot == std::string::npos || pattern.find('*') < dot ? "" : pattern.substr(dot + 1);
}

/// Does the set name whole blocks, be it some of them?
bool names_blocks(const RecomputeSet& set) {
  return set.kind == Recompute::full || set.kind == Recompute::first ||
         std::any_of(set.patterns.begin(), set.patterns.end(),
                     [](const std::string& p) { return p == "*" || of_block(p) == "*"; });
}

/// Something that a framework may have. `turn` gives the flags that ask for it; "" where it has no
/// place in the plan, or is on. `key`: of plan files; what the user has said of it stays.
struct Switch {
  const char* key;
  std::string (*turn)(const Graph&, Plan&);
};

std::string exchange_by(Plan& p, Plan::ContextExchange how, const char* word) {
  // One that is chosen, here too, stays.
  if (p.cp == 1 || p.context_given || p.context == how) return "";
  p.context = how;
  p.context_given = true;
  return fmt::format("--context-exchange {}", word);
}
std::string turn_on(bool& what, bool has_place, const char* key) {
  if (!has_place || what) return "";
  what = true;
  return fmt::format("--set {}=true", key);
}

constexpr std::array<Switch, 10> kSwitches{{
    {"overlap_tensor_parallel",
     [](const Graph&, Plan& p) {
       return turn_on(p.overlap_tensor_parallel, p.tp > 1 && p.sequence_parallel,
                      "overlap_tensor_parallel");
     }},
    {"overlap_experts",
     [](const Graph& g, Plan& p) {
       bool on = p.exchanges_beside_blocks();
       // Megatron-Core has no such exchange beside blocks that run again, nor in a pipeline of one
       // chunk a stage; ours run block after block.
       const bool has_place = p.ep > 1 && has_experts(g) && !names_blocks(p.recompute) &&
                              (p.pp == 1 || p.virtual_stages > 1) && p.framework != "partita";
       const std::string flags = turn_on(on, has_place, "overlap_experts");
       if (!flags.empty()) p.overlap_experts = true;
       return flags;
     }},
    {"rows_once",
     [](const Graph& g, Plan& p) {
       return turn_on(p.rows_once, p.ep > 1 && has_experts(g), "rows_once");
     }},
    {"reshard_after_forward",
     [](const Graph&, Plan& p) {
       if (p.zero != 3 || !std::exchange(p.reshard_after_forward, false)) return std::string();
       return std::string("--set reshard_after_forward=false");
     }},
    {"context_exchange",
     [](const Graph&, Plan& p) {
       return exchange_by(p, Plan::ContextExchange::all_gather, "all_gather");
     }},
    {"context_exchange",
     [](const Graph&, Plan& p) {
       return exchange_by(p, Plan::ContextExchange::all_to_all, "all_to_all");
     }},
    {"schedule",
     [](const Graph&, Plan& p) {
       // Cuts are of as many chunks as there are now.
       if (p.pp == 1 || splits_backward(p.schedule) || (p.virtual_stages > 1 && !p.cuts.empty()))
         return std::string();
       p.schedule = Schedule::zero_bubble_h1;
       const bool interleaved = std::exchange(p.virtual_stages, 1) > 1;
       return std::string("--schedule zb-h1") + (interleaved ? " --virtual-stages 1" : "");
     }},
    {"launch",
     [](const Graph&, Plan& p) { return turn_on(p.launches.graphs, true, "launch.graphs"); }},
    {"offload",
     [](const Graph&, Plan& p) {
       const bool again = std::exchange(p.recompute, RecomputeSet{}).kind != Recompute::none;
       const std::string flags = turn_on(p.offload_activations, true, "offload.activations");
       return flags + (again && !flags.empty() ? " --recompute none" : "");
     }},
    {"offload",
     [](const Graph&, Plan& p) { return turn_on(p.offload_optimizer, true, "offload.optimizer"); }},
}};

class Refiner {
 public:
  Refiner(const Graph& graph, const Topology& topology, Network network,
          const Adjustment& adjustment, std::size_t workers)
      : graph_(graph), network_(network) {
    if (workers == 0) workers = std::max(1u, std::thread::hardware_concurrency());
    for (std::size_t w = 0; w < workers; ++w) {
      communications_.push_back(std::make_unique<Communication>(topology));
      communications_.back()->set_adjustment(adjustment);
    }
  }

  /// What each of them takes, weighed as in a search; of those that cannot be, nothing.
  std::vector<std::optional<Prediction>> weigh(const std::vector<Trial>& trials) {
    std::vector<std::optional<Prediction>> all(trials.size());
    parallel_for(trials.size(), communications_.size(), [&](std::size_t w, std::size_t k) {
      all[k] = tried(trials[k].plan, *communications_[w], true);
    });
    for (const auto& p : all) {
      if (p) ++simulated, instructions += p->instructions;
    }
    return all;
  }
  /// The same with its allocator's blocks, as it is shown; nothing where it does not fit.
  std::vector<std::optional<Prediction>> whole(const std::vector<Trial>& trials) {
    std::vector<std::optional<Prediction>> all(trials.size());
    parallel_for(trials.size(), communications_.size(), [&](std::size_t w, std::size_t k) {
      all[k] = tried(trials[k].plan, *communications_[w], false);
    });
    for (auto& p : all) {
      if (p) ++simulated, instructions += p->instructions;
      if (p && !p->fits) p.reset();
    }
    return all;
  }
  /// Of trials that are faster than `than`, the fastest that fits.
  std::optional<Refinement> best(const std::vector<Trial>& trials, Seconds than) {
    auto found = weigh(trials);
    std::vector<std::size_t> order;
    for (std::size_t k = 0; k < found.size(); ++k) {
      if (found[k] && found[k]->fits && found[k]->step_time < than) order.push_back(k);
    }
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return found[a]->step_time < found[b]->step_time;
    });
    for (const std::size_t k : order) {
      if (auto p = std::move(whole({trials[k]})[0]); p && p->step_time < than)
        return Refinement{trials[k].what, std::move(*p)};
    }
    return std::nullopt;
  }

  /// Less recomputation than all of every block: sets of operators, and as many blocks of each
  /// stage as its memory asks for.
  std::vector<Trial> recomputations(const Prediction& now) {
    const Plan& plan = now.plan;
    std::vector<Trial> trials;
    if (plan.recompute.kind == Recompute::none) return trials;
    const auto add = [&](RecomputeSet set) {
      if (set == plan.recompute) return;
      const std::string what =
          set.kind == Recompute::none ? "no recompute" : "recompute of " + in_words(set);
      Plan p = plan;
      p.recompute = std::move(set);
      trials.push_back({what, std::move(p)});
    };
    add({});
    const auto& patterns = plan.recompute.patterns;
    if (plan.recompute.kind == Recompute::full) {
      for (const char* pattern : {"*.mlp.*", "*.moe.*", "*.attention.*", "*.mlp.activation"}) {
        const bool there =
            std::any_of(graph_.operators.begin(), graph_.operators.end(),
                        [&](const Operator& op) { return matches(pattern, op.name); });
        if (there) add({Recompute::patterns, 0, {pattern}});
      }
      for (RecomputeSet& set : by_stage(now, "*")) add(std::move(set));
    } else if (patterns.size() == 1 && patterns[0].starts_with("*.")) {
      for (RecomputeSet& set : by_stage(now, patterns[0].substr(2))) add(std::move(set));
    }
    return trials;
  }
  /// Of what `all` runs again, `what` in every block, as many blocks as a stage's memory asks for.
  std::vector<RecomputeSet> by_stage(const Prediction& all, const std::string& what) {
    const Plan& plan = all.plan;
    std::vector<RecomputeSet> sets;
    const auto chunks = chunk_of_operators(graph_, plan);
    if (!chunks || directions(plan.schedule) > 1) return sets;
    Trial none{"", plan};
    none.plan.recompute = {};
    const auto without = weigh({none})[0];
    if (!without) return sets;
    std::vector<std::vector<int>> layers(static_cast<std::size_t>(plan.pp));  // of each stage
    for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
      const int layer = graph_.operators[i].layer;
      if (layer < 0 || layer >= graph_.layers) continue;
      auto& of_stage = layers[static_cast<std::size_t>((*chunks)[i] % plan.pp)];
      if (of_stage.empty() || of_stage.back() != layer) of_stage.push_back(layer);
    }
    const double limit = static_cast<double>((all.usable - all.outside.total()).count) * 0.985;
    std::vector<std::int64_t> needed;
    for (std::size_t s = 0; s < layers.size(); ++s) {
      if (s >= all.memory_by_stage.size() || s >= without->memory_by_stage.size()) return sets;
      const auto least = static_cast<double>(all.memory_by_stage[s].total.count),
                 most = static_cast<double>(without->memory_by_stage[s].total.count);
      const double share = most <= limit || most <= least
                               ? 0
                               : std::clamp((most - limit) / (most - least), 0.0, 1.0);
      needed.push_back(
          static_cast<std::int64_t>(std::ceil(share * static_cast<double>(layers[s].size()))));
    }
    // What a block keeps is not all that counts: a few more or fewer.
    for (const std::int64_t more : {-1, 0, 1, 2, 4}) {
      RecomputeSet set{Recompute::patterns, 0, {}};
      bool whole = true;
      for (std::size_t s = 0; s < layers.size(); ++s) {
        const auto has = static_cast<std::int64_t>(layers[s].size());
        const std::int64_t n =
            needed[s] == 0 ? 0 : std::clamp<std::int64_t>(needed[s] + more, 0, has);
        whole &= n == has;
        for (std::int64_t k = 0; k < n; ++k)
          set.patterns.push_back(
              fmt::format("layers.{}.{}", layers[s][static_cast<std::size_t>(k)], what));
      }
      if (!whole && !set.patterns.empty()) sets.push_back(std::move(set));
    }
    return sets;
  }

  /// One block from the last chunk, which has the head too, from the first or the largest to
  /// another.
  std::vector<Trial> cuts(const Plan& plan) const {
    std::vector<Trial> trials;
    const std::int64_t chunks = plan.chunks();
    if (plan.pp == 1 || chunks < 2 || chunks > graph_.layers) return trials;
    const auto now = plan.cuts.empty() ? blocks_per_chunk(graph_.layers, chunks) : plan.cuts;
    std::vector<std::int64_t> to;
    const std::int64_t middle = plan.virtual_stages / 2 * plan.pp;
    for (const std::int64_t stage : {std::int64_t{0}, std::int64_t{1}, plan.pp / 2, plan.pp - 2}) {
      for (const std::int64_t c : {middle + stage, stage}) {
        if (stage >= 0 && c < chunks && std::find(to.begin(), to.end(), c) == to.end())
          to.push_back(c);
      }
    }
    std::vector<std::int64_t> sources{chunks - 1, 0};
    const std::int64_t largest = std::max_element(now.begin(), now.end()) - now.begin();
    if (largest > 0 && largest < chunks - 1) sources.push_back(largest);
    for (const std::int64_t from : sources) {
      for (const std::int64_t c : to) {
        if (c % plan.pp == from % plan.pp || now[static_cast<std::size_t>(from)] < 1) continue;
        Plan p = plan;
        p.cuts = now;
        --p.cuts[static_cast<std::size_t>(from)];
        ++p.cuts[static_cast<std::size_t>(c)];
        trials.push_back({fmt::format("--cuts {}", fmt::join(p.cuts, ",")), std::move(p)});
      }
    }
    return trials;
  }

  bool on_gpus() const {
    return communications_[0]->topology().device(DeviceId{0}).compute_capability > 0;
  }
  std::vector<Trial> turned(const Plan& plan, const RefineLimits& limits) const {
    std::vector<Trial> trials;
    if (!on_gpus()) return trials;  // they are GPUs'
    for (const Switch& s : kSwitches) {
      if (limits.given.count(s.key) > 0) continue;
      Plan p = plan;
      std::string flags = s.turn(graph_, p);
      const bool changes_recompute = !(p.recompute == plan.recompute);
      if (!flags.empty() && (limits.recompute || !changes_recompute))
        trials.push_back({std::move(flags), std::move(p)});
    }
    return trials;
  }

  std::int64_t simulated = 0, instructions = 0;

 private:
  /// Nothing of a plan that cannot be, or whose step is too long to be simulated.
  std::optional<Prediction> tried(const Plan& plan, Communication& communication,
                                  bool only_if_fits) const {
    try {
      auto p =
          predict(graph_, plan, communication, nullptr, nullptr, only_if_fits, nullptr, network_);
      if (p) return std::move(*p);
    } catch (const InputError&) {
    }
    return std::nullopt;
  }
  const Graph& graph_;
  Network network_;
  std::vector<std::unique_ptr<Communication>> communications_;
};

void fastest_first(std::vector<Refinement>& all) {
  std::stable_sort(all.begin(), all.end(), [](const Refinement& a, const Refinement& b) {
    return a.prediction.step_time < b.prediction.step_time;
  });
}

}  // namespace

std::string in_words(const RecomputeSet& set) {
  std::string of_all;
  for (const std::string& p : set.patterns) {
    const std::string of_this = of_block(p);
    if (of_this.empty() || (!of_all.empty() && of_this != of_all)) return text(set);
    of_all = of_this;
  }
  if (of_all.empty()) return text(set);
  return fmt::format("{}{} block{}", of_all == "*" ? "" : of_all + " in ", set.patterns.size(),
                     set.patterns.size() == 1 ? "" : "s");
}

Refined refine(const Graph& graph, const Topology& topology, const Prediction& plan,
               Network network, const Adjustment& adjustment, const RefineLimits& limits,
               const std::vector<Prediction>& others, std::size_t workers) {
  Refiner r(graph, topology, network, adjustment, workers);
  Refined result;
  result.given = plan.step_time;
  const auto now = [&]() -> const Prediction& {
    return result.taken.empty() ? plan : result.taken.back().prediction;
  };
  const auto goal = [&](const Prediction& p) {
    return Seconds{p.step_time.count * (1 - limits.least_gain)};
  };
  // As many as the rest of what may be simulated is for.
  const auto affordable = [&](std::vector<Trial> trials, std::int64_t limit) {
    const std::int64_t left =
        (limit - r.instructions) / std::max<std::int64_t>(1, now().instructions);
    if (static_cast<std::int64_t>(trials.size()) > left)
      trials.resize(static_cast<std::size_t>(std::max<std::int64_t>(0, left)));
    return trials;
  };
  const auto take = [&](std::vector<Trial> wanted) {
    const std::vector<Trial> trials = affordable(std::move(wanted), limits.most_instructions);
    if (trials.empty() || result.taken.size() >= limits.rounds) return false;
    auto better = r.best(trials, goal(now()));
    if (!better) return false;
    result.taken.push_back(std::move(*better));
    return true;
  };
  // Of each twice: of operators, then of fewer blocks. Whose result is fastest is gone on with.
  const auto lessened = [&](const Prediction& from) {
    std::vector<Refinement> steps;
    while (steps.size() < std::min<std::size_t>(2, limits.rounds) &&
           r.instructions < limits.most_instructions) {
      const Prediction& last = steps.empty() ? from : steps.back().prediction;
      auto better = r.best(r.recomputations(last), goal(last));
      if (!better) break;
      steps.push_back(std::move(*better));
    }
    return steps;
  };
  if (limits.recompute) {
    result.taken = lessened(plan);
    for (const Prediction& other : others) {
      if (r.instructions >= limits.most_instructions) break;
      if (to_yaml(other.plan) == to_yaml(plan.plan)) continue;
      // Its time was without contention.
      const auto whole = std::move(r.whole({{"", other.plan}})[0]);
      if (!whole) continue;
      std::vector<Refinement> steps = lessened(*whole);
      if (steps.empty() || !(steps.back().prediction.step_time < goal(now()))) continue;
      steps.back().what = "another plan, with " + steps.back().what;
      result.taken.clear();
      result.taken.push_back(std::move(steps.back()));
    }
  }
  bool changed = true;
  while (changed && r.instructions < limits.most_instructions) {
    changed = limits.recompute && take(r.recomputations(now()));
    changed |= limits.cuts && take(r.cuts(now().plan));
  }
  const Prediction& base = now();
  std::vector<Trial> faster;
  {
    std::vector<Trial> trials =
        affordable(r.turned(base.plan, limits), r.instructions + limits.most_instructions);
    const auto weighed = r.weigh(trials);
    for (std::size_t k = 0; k < trials.size(); ++k) {
      if (weighed[k] && weighed[k]->fits && weighed[k]->step_time < goal(base))
        faster.push_back(std::move(trials[k]));
    }
  }
  auto found = r.whole(faster);
  for (std::size_t k = 0; k < faster.size(); ++k) {
    if (found[k] && found[k]->step_time < goal(base))
      result.switches.push_back({faster[k].what, std::move(*found[k])});
  }
  fastest_first(result.switches);
  // The best with others that make it better still.
  if (result.switches.size() > 1) {
    Refinement all = result.switches.front();
    for (std::size_t more = 0;
         more < result.switches.size() && r.instructions < 2 * limits.most_instructions; ++more) {
      std::vector<Trial> next;
      for (Trial& t : r.turned(all.prediction.plan, limits)) {
        const bool helps = std::any_of(result.switches.begin(), result.switches.end(),
                                       [&](const Refinement& s) { return s.what == t.what; });
        if (!helps) continue;
        t.what = all.what + " " + t.what;
        next.push_back(std::move(t));
      }
      auto better = r.best(next, goal(all.prediction));
      if (!better) break;
      all = std::move(*better);
    }
    if (all.what != result.switches.front().what) result.together.push_back(std::move(all));
  }
  result.simulated = r.simulated;
  return result;
}

std::vector<Refinement> fitting(const Graph& graph, const Topology& topology,
                                const Prediction& plan, Network network,
                                const Adjustment& adjustment, const RefineLimits& limits,
                                std::size_t workers) {
  Refiner r(graph, topology, network, adjustment, workers);
  std::vector<Trial> trials;
  if (!r.on_gpus() || limits.given.count("offload") > 0) return {};
  for (const auto& [optimizer, activations] :
       {std::pair{true, false}, {false, true}, {true, true}}) {
    Plan p = plan.plan;
    if ((optimizer && p.offload_optimizer) || (activations && p.offload_activations)) continue;
    if (activations && !limits.recompute && p.recompute.kind != Recompute::none) continue;
    p.offload_optimizer |= optimizer;
    p.offload_activations |= activations;
    const bool again =
        activations && std::exchange(p.recompute, RecomputeSet{}).kind != Recompute::none;
    std::string flags = optimizer ? "--set offload.optimizer=true" : "";
    if (activations)
      flags += fmt::format("{}--set offload.activations=true{}", optimizer ? " " : "",
                           again ? " --recompute none" : "");
    trials.push_back({std::move(flags), std::move(p)});
  }
  std::vector<Refinement> all;
  auto found = r.whole(trials);
  for (std::size_t k = 0; k < trials.size(); ++k) {
    if (found[k]) all.push_back({trials[k].what, std::move(*found[k])});
  }
  fastest_first(all);
  return all;
}

}  // namespace partita
