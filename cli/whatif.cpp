#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/unit_text.h"
#include "cli/cluster_flags.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/report.h"
#include "simulator/search/placement.h"
#include "validation/fit_rows.h"

namespace partita::cli {
namespace {

struct Vary {
  std::string path;
  std::vector<std::string> values;
};

struct Options {
  std::string model, topology;
  PlanFlags flags;
  ClusterFlags cluster;
  std::vector<std::string> vary;
  bool json = false, csv = false;
};

/// "PATH=v1,v2": a comma inside brackets does not separate.
Vary parse_vary(const std::string& text) {
  Vary v;
  std::size_t equals = std::string::npos;
  int depth = 0;
  for (std::size_t i = 0; i < text.size() && equals == std::string::npos; ++i) {
    if (text[i] == '[') ++depth;
    if (text[i] == ']') --depth;
    if (text[i] == '=' && depth == 0) equals = i;
  }
  if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
    throw InputError(
        "--vary",
        fmt::format(
            "'{}' is not PATH=value,value; like plan.tp=2,4,8 or device.memory_bandwidth=x0.5,x2",
            text));
  }
  v.path = text.substr(0, equals);
  std::string item;
  depth = 0;
  for (const char c : text.substr(equals + 1) + ",") {
    if (c == '[' || c == '{') ++depth;
    if (c == ']' || c == '}') --depth;
    if (c == ',' && depth == 0) {
      if (item.empty()) throw InputError("--vary", fmt::format("'{}' has an empty value", text));
      v.values.push_back(item);
      item.clear();
    } else {
      item += c;
    }
  }
  return v;
}

/// `there`: what "x2" would multiply.
std::int64_t whole(const std::string& text, const std::string& path, std::int64_t there) {
  if (multiplies(text) && there == 0)
    throw InputError(
        "--vary " + path,
        fmt::format("{} multiplies what is there, and there is none; give a number", text));
  const std::string value = multiplied(std::to_string(there), text, "--vary " + path);
  try {
    std::size_t used = 0;
    const std::int64_t n = std::stoll(value, &used);
    if (used == value.size()) return n;
  } catch (const std::exception&) {
  }
  throw InputError("--vary " + path, fmt::format("'{}' is not a whole number", value));
}

/// One combination of values, ready to simulate.
struct Scenario {
  std::string model, topology;
  PlanFlags flags;
  ClusterFlags cluster;
  TopologyEdits edits;
  std::vector<GivenKey> plan_keys;
  /// "sequence", "layers", "vocabulary": they may multiply those of a model that varies too.
  std::vector<std::pair<std::string, std::string>> sizes;
};

/// Sets in the flags what the scenario says of the network's sizes.
void settle_sizes(Scenario& s) {
  const std::vector<std::pair<std::string, std::string>> sizes = std::exchange(s.sizes, {});
  for (const auto& [key, value] : sizes) {
    std::int64_t there = 0;
    if (multiplies(value)) {
      const Graph g = load_model(s.model, model_options(s.flags));
      there = key == "sequence" ? g.sequence : key == "layers" ? g.layers : vocabulary_of(g);
    }
    (key == "sequence" ? s.flags.sequence
     : key == "layers" ? s.flags.layers
                       : s.flags.vocabulary) = whole(value, "model." + key, there);
  }
}

/// One more slow device, failed link, ...; `none` adds nothing.
void change_cluster(ClusterFlags& cluster, const std::string& key, const std::string& value) {
  if (key == "spines") {
    cluster.spines = value;
    return;
  }
  if (key == "ranks_per_device") {
    cluster.ranks_per_device =
        static_cast<int>(whole(value, "cluster." + key, cluster.ranks_per_device));
    if (cluster.ranks_per_device < 1 || cluster.ranks_per_device > 64)
      throw InputError("--vary cluster.ranks_per_device",
                       fmt::format("'{}' is not 1 to 64", value));
    return;
  }
  std::vector<std::string>* list = key == "slow"         ? &cluster.slow
                                   : key == "degrade"    ? &cluster.degrade
                                   : key == "fail"       ? &cluster.fail
                                   : key == "background" ? &cluster.background
                                                         : nullptr;
  if (list == nullptr)
    throw InputError("--vary", fmt::format("'cluster.{}' is not known; use cluster.slow, "
                                           "cluster.degrade, cluster.fail, cluster.background, "
                                           "cluster.ranks_per_device or cluster.spines",
                                           key));
  if (value != "none") list->push_back(value);
}

/// Is it a whole that other paths change a part of?
bool whole_of_others(const std::string& path) { return path == "model" || path == "topology"; }

void change(Scenario& s, const std::string& path, const std::string& value) {
  const auto dot = path.find('.');
  const std::string root = path.substr(0, dot);
  const std::string key = dot == std::string::npos ? "" : path.substr(dot + 1);
  if (root == "model" && key.empty()) {
    s.model = value;
  } else if (root == "topology" && key.empty()) {
    s.topology = value;
  } else if (root == "topology" && key == "nodes") {
    s.topology = with_nodes(s.topology, value);
  } else if (root == "topology" && !key.empty()) {
    s.edits.cluster.push_back({key, value});
  } else if (root == "cluster" && !key.empty()) {
    change_cluster(s.cluster, key, value);
  } else if (root == "device" && !key.empty()) {
    s.edits.device.push_back({key, value});
  } else if (root == "plan" && !key.empty()) {
    s.plan_keys.push_back({key, value, "--vary " + path});
  } else if (root == "model" && (key == "sequence" || key == "layers" || key == "vocabulary")) {
    s.sizes.emplace_back(key, value);
  } else if (root == "model") {
    s.flags.model_edits.push_back({key, value});
  } else {
    throw InputError("--vary", fmt::format("'{}' is not known; use model, model.sequence, "
                                           "model.layers, model.vocabulary, model.PATH, topology, "
                                           "topology.nodes, topology.PATH, device.PATH, "
                                           "cluster.KEY or plan.KEY",
                                           path));
  }
}

/// InputError that names the flag where a value is wrong whatever the others are, before anything
/// is printed. What is impossible only in combination becomes a note of its row.
void check_values(const Options& o, const std::vector<Vary>& vary) {
  const auto of_model = [](const Vary& v) { return v.path.compare(0, 5, "model") == 0; };
  const bool one_of_model = std::count_if(vary.begin(), vary.end(), of_model) == 1;
  for (const Vary& v : vary) {
    for (const std::string& value : v.values) {
      const std::string place = fmt::format("--vary {}={}", v.path, value);
      Scenario s{o.model, o.topology, o.flags, {}, {}, {}, {}};
      change(s, v.path, value);
      if (!s.plan_keys.empty()) {
        for (GivenKey& k : s.plan_keys) k.flag = place;
        plan_from(o.flags, "megatron-core", s.plan_keys);
        continue;
      }
      try {
        if (!of_model(v)) {
          s.cluster.in_state(load_cluster(s.topology, s.edits));
        } else if (v.path == "model" || one_of_model) {
          settle_sizes(s);
          load_model(s.model, model_options(s.flags));
        }
      } catch (const InputError& e) {
        // A message about the sequence or the number of blocks of the base case has its place.
        if (v.path == "model" && e.place() != "model") continue;
        // With what varies beside it, it may be possible.
        const std::string root = v.path.substr(0, v.path.find('.') + 1);
        const auto beside = [&](const Vary& w) {
          return w.path != v.path && w.path.compare(0, root.size(), root) == 0;
        };
        if (!root.empty() && e.place() != v.path.substr(root.size()) &&
            std::any_of(vary.begin(), vary.end(), beside))
          continue;
        throw InputError(place, e.message());
      }
    }
  }
}

/// A field of a CSV line (RFC 4180).
std::string csv(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

/// One combination and what came of it: a prediction or the reason why there is none.
struct Outcome {
  Graph graph;
  std::optional<Topology> topology;
  std::optional<Prediction> prediction;
  std::string note;
  std::vector<std::string> assumed;
};

Outcome outcome(Scenario s, const std::vector<std::string>& given,
                const std::optional<validation::FitProfile>& fitted) {
  Outcome r;
  try {
    settle_sizes(s);
    const Topology cluster = load_cluster(s.topology, s.edits);
    Plan plan = plan_from(s.flags, "megatron-core", s.plan_keys);
    r.topology = s.cluster.in_state(cluster);
    const Topology& t = *r.topology;
    settle_ranks(plan, static_cast<std::int64_t>(t.used_ranks()), t.name());
    PlanFlags flags = s.flags;
    std::vector<std::string> varied;
    for (const GivenKey& k : s.plan_keys) varied.push_back(k.key);
    auto defaults = framework_defaults(flags, plan, s.model, t, varied);
    r.graph = load_graph(s.model, flags, plan);
    if (s.flags.placement == "search") {
      const auto placed = place(r.graph, plan, t);
      if (!placed) throw InputError("--placement", placed.reason());
      place_as(plan, placed->best().plan);
    }
    const auto* entry = fitted ? fitted->find(t, plan.framework) : nullptr;
    Communication communication(t);
    if (entry != nullptr) communication.set_adjustment(validation::adjustment_of(*entry));
    auto p =
        predict(r.graph, plan, communication, nullptr, nullptr, false, nullptr, s.flags.sharing());
    if (p) {
      if (fitted) validation::rest_on_fit(*p, entry, r.graph, t);
      r.assumed = assumptions(s.flags, p->plan, r.graph, given);
      for (std::string& a : defaults) r.assumed.push_back(std::move(a));
      for (std::string& a : state_assumptions(t, s.flags.sharing()))
        r.assumed.push_back(std::move(a));
      r.prediction = std::move(*p);
    } else {
      r.note = p.reason();
    }
  } catch (const InputError& e) {
    r.note = e.what();  // one impossible combination must not lose the others
  }
  return r;
}

void run(const Options& o) {
  if (o.json && o.csv) throw InputError("--csv", "contradicts --json; give one of them");
  std::vector<Vary> vary;
  for (const auto& v : o.vary) vary.push_back(parse_vary(v));
  if (vary.empty())
    throw InputError("--vary", "nothing varies; give --vary PATH=v1,v2 at least once");
  constexpr std::size_t kMost = 100'000;
  std::size_t count = 1;
  std::vector<std::string> given;
  for (const auto& v : vary) {
    const auto same = [&](const Vary& other) { return other.path == v.path; };
    // Lists of the cluster's get one entry more from each.
    if (v.path.compare(0, 8, "cluster.") != 0 && std::count_if(vary.begin(), vary.end(), same) > 1)
      throw InputError("--vary " + v.path, "is given twice; write all values after one =");
    count *= v.values.size();
    if (count > kMost)
      throw InputError("--vary",
                       fmt::format("more than {} combinations; give fewer values", grouped(kMost)));
    if (v.path.compare(0, 5, "plan.") == 0) given.push_back(v.path.substr(5));
    if (v.path == "model.sequence") given.emplace_back("sequence");
  }
  plan_from(o.flags, "megatron-core");
  model_options(o.flags);
  if (std::none_of(vary.begin(), vary.end(),
                   [](const Vary& v) { return v.path.compare(0, 5, "model") == 0; }))
    load_model(o.model, model_options(o.flags));
  // On other clusters these may name nothing: a note of the row.
  if (std::none_of(vary.begin(), vary.end(),
                   [](const Vary& v) { return v.path.compare(0, 8, "topology") == 0; }))
    o.cluster.in_state(load_cluster(o.topology));
  check_values(o, vary);
  const auto fitted = fit_of(o.flags);

  std::vector<std::vector<std::string>> rows(1);
  for (const auto& v : vary) rows[0].push_back(v.path);
  for (const char* h : {"step", "tokens/s/device", "samples/s", "MFU", "memory", "fits"})
    rows[0].emplace_back(h);
  if (fitted) rows[0].emplace_back("90 % interval");
  std::string head;  // of CSV; printed once the first row is there
  for (const auto& v : vary) head += csv(v.path) + ",";
  head += "step_time_s,tokens_per_s_per_device,samples_per_s,mfu,peak_device_bytes,fits,";
  head += fitted ? "interval_lo_s,interval_hi_s,note\n" : "note\n";
  // Reasons are long and often shared: below the table, by number.
  std::vector<std::string> notes;
  std::vector<std::string> remarks;  // of all rows of a network
  const auto numbered = [&](const std::string& note) {
    auto at = std::find(notes.begin(), notes.end(), note);
    if (at == notes.end()) at = notes.insert(at, note);
    return fmt::format("- ({})", at - notes.begin() + 1);
  };
  struct Assumed {
    std::string what;
    std::vector<std::string> values;
    std::size_t rows = 0;
  };
  std::vector<Assumed> assumed;
  std::size_t predicted = 0;
  std::vector<std::string> effect(count);  // of a row: step and memory, or why there are none
  for (std::size_t n = 0; n < count; ++n) {
    Scenario s{o.model, o.topology, o.flags, o.cluster, {}, {}, {}};
    std::vector<std::string> chosen(vary.size());
    for (std::size_t k = vary.size(), rest = n; k-- > 0;) {
      chosen[k] = vary[k].values[rest % vary[k].values.size()];
      rest /= vary[k].values.size();
    }
    for (const bool first : {true, false}) {
      for (std::size_t k = 0; k < vary.size(); ++k)
        if (whole_of_others(vary[k].path) == first) change(s, vary[k].path, chosen[k]);
    }
    const Outcome r = outcome(s, given, fitted);
    const auto& p = r.prediction;
    if (!p && count == 1) throw InputError("", r.note);
    effect[n] =
        p ? fmt::format("{:.9g} {} {}", p->step_time.count, p->peak_device.count, p->fits) : r.note;
    if (o.json) {
      nlohmann::ordered_json j;
      for (std::size_t k = 0; k < vary.size(); ++k) j["vary"][vary[k].path] = chosen[k];
      if (p) {
        j.update(
            nlohmann::ordered_json::parse(prediction_json(r.graph, *r.topology, *p, r.assumed)));
      } else {
        j["infeasible"] = r.note;
      }
      fmt::print("{}\n", j.dump());
    } else if (o.csv) {
      std::string line = std::exchange(head, "");
      for (const auto& c : chosen) line += csv(c) + ",";
      if (p) {
        const std::string tokens =
            r.graph.sequence > 0 ? fmt::format("{}", p->tokens_per_second_per_device) : "";
        const std::string interval = !fitted       ? ""
                                     : p->interval ? fmt::format("{},{},", p->interval->first.count,
                                                                 p->interval->second.count)
                                                   : ",,";
        fmt::print("{}{},{},{},{},{},{},{}{}\n", line, p->step_time.count, tokens,
                   p->samples_per_second, p->mfu, p->peak_device.count, p->fits ? "true" : "false",
                   interval, fitted && !p->interval ? csv(p->fit) : "");
      } else {
        fmt::print("{},,,,,,{}{}\n", line, fitted ? ",," : "", csv(r.note));
      }
    } else {
      std::vector<std::string> row = chosen;
      if (p) {
        const auto tokens = static_cast<long long>(p->tokens_per_second_per_device + 0.5);
        row.insert(row.end(), {text(p->step_time), r.graph.sequence > 0 ? grouped(tokens) : "",
                               fmt::format("{:.4g}", p->samples_per_second),
                               fmt::format("{:.1f} %", 100 * p->mfu), text(p->peak_device),
                               p->fits ? "yes" : "NO"});
        if (fitted)
          row.push_back(p->interval ? fmt::format("{} to {}", text(p->interval->first),
                                                  text(p->interval->second))
                                    : numbered(p->fit));
        ++predicted;
        if (const std::string remark = mfu_remark(r.graph, *p);
            !remark.empty() && std::find(remarks.begin(), remarks.end(), remark) == remarks.end())
          remarks.push_back(remark);
        for (const auto& a : r.assumed) {
          const std::string what = a.substr(0, a.rfind(' ')), value = a.substr(a.rfind(' '));
          auto at = std::find_if(assumed.begin(), assumed.end(),
                                 [&](const auto& entry) { return entry.what == what; });
          if (at == assumed.end()) at = assumed.insert(at, {what, {}});
          ++at->rows;
          auto& values = at->values;
          if (std::find(values.begin(), values.end(), value) == values.end())
            values.push_back(value);
        }
      } else {
        row.push_back(numbered(r.note));
      }
      rows.push_back(row);
    }
  }
  if (o.json || o.csv) return;
  for (std::size_t k = 0; k < assumed.size(); ++k) {
    const Assumed& a = assumed[k];
    fmt::print("{}{}{}{}{}", k == 0 ? "assumed: " : ", ", a.what, fmt::join(a.values, " or"),
               a.rows < predicted ? fmt::format(" ({} of {} rows)", a.rows, predicted) : "",
               k + 1 == assumed.size() ? "\n\n" : "");
  }
  fmt::print("{}", align(rows));
  if (!notes.empty() || !remarks.empty()) fmt::print("\n");
  for (std::size_t k = 0; k < notes.size(); ++k) fmt::print("({}) {}\n", k + 1, notes[k]);
  for (const std::string& remark : remarks) fmt::print("{}\n", remark);
  // What turns no row into another is read by no price here, or never the bound.
  for (std::size_t k = 0, inner = count; k < vary.size(); ++k) {
    const std::size_t values = vary[k].values.size();
    inner /= values;
    bool same = values > 1;
    for (std::size_t n = 0; n < count && same; ++n)
      same = effect[n] == effect[n - n / inner % values * inner];
    if (same)
      fmt::print(
          "{} changes neither time nor memory here: no price reads it, or something else "
          "bounds them\n",
          vary[k].path);
  }
}

}  // namespace

void add_whatif(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand(
      "whatif", "simulate again with quantities of model, topology, device or plan changed");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  o->flags.add_to(*c);
  o->flags.add_framework_defaults(*c);
  o->flags.add_network(*c);
  o->flags.add_placement(*c);
  o->cluster.add_to(*c);
  o->flags.add_profile(*c);
  c->add_option("--vary", o->vary,
                "PATH=v1,v2: plan.tp=2,4; device.memory_bandwidth=x0.5,x1; topology.nodes=8,16; "
                "'topology.nodes[0].links[kind=nvlink].bandwidth=25 GB/s,50 GB/s'; "
                "model.sequence=4096,8192; model.transformer.ffn=x1,x2; "
                "'cluster.fail=none,node0.nic0->rail0'; cluster.spines=spray,ecmp:1; repeatable, "
                "crossed")
      ->allow_extra_args(false);
  c->add_flag("--json", o->json, "print JSON lines");
  c->add_flag("--csv", o->csv, "print CSV");
  c->callback([o, &code] {
    run(*o);
    (void)code;
  });
}

}  // namespace partita::cli
