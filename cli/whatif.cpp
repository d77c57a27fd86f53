#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/unit_text.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/report.h"

namespace partita::cli {
namespace {

struct Vary {
  std::string path;
  std::vector<std::string> values;
};

struct Options {
  std::string model, topology;
  PlanFlags flags;
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
    throw InputError("--vary", fmt::format("'{}' is not PATH=value,value; like plan.tp=2,4,8 or device.memory_bandwidth=x0.5,x2", text));
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

std::int64_t whole(const std::string& value, const std::string& path) {
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
  TopologyEdits edits;
  std::vector<std::pair<std::string, std::string>> plan_keys;
};

void change(Scenario& s, const std::string& path, const std::string& value) {
  const auto dot = path.find('.');
  const std::string root = path.substr(0, dot);
  const std::string key = dot == std::string::npos ? "" : path.substr(dot + 1);
  if (root == "model" && key.empty()) {
    s.model = value;
  } else if (root == "topology" && key.empty()) {
    s.topology = value;
  } else if (root == "topology" && key == "nodes") {
    const auto colon = s.topology.rfind(':');
    s.topology = (colon == std::string::npos ? s.topology : s.topology.substr(0, colon)) + ":" + value;
  } else if (root == "topology" && !key.empty()) {
    s.edits.cluster.push_back({key, value});
  } else if (root == "device" && !key.empty()) {
    s.edits.device.push_back({key, value});
  } else if (root == "plan" && !key.empty()) {
    s.plan_keys.emplace_back(key, value);
  } else if (root == "model" && key == "sequence") {
    s.flags.sequence = whole(value, path);
  } else if (root == "model" && key == "layers") {
    s.flags.layers = whole(value, path);
  } else if (root == "model" && key == "vocabulary") {
    s.flags.vocabulary = whole(value, path);
  } else {
    throw InputError("--vary", fmt::format("'{}' is not known; use model, model.sequence, model.layers, model.vocabulary, topology, "
                                           "topology.nodes, topology.PATH, device.PATH or plan.KEY",
                                           path));
  }
}

void run(const Options& o) {
  if (o.json && o.csv) throw InputError("--csv", "contradicts --json; give one of them");
  std::vector<Vary> vary;
  for (const auto& v : o.vary) vary.push_back(parse_vary(v));
  if (vary.empty()) throw InputError("--vary", "nothing varies; give --vary PATH=v1,v2 at least once");
  std::size_t count = 1;
  for (const auto& v : vary) count *= v.values.size();
  if (count > 100000) throw InputError("--vary", fmt::format("{} combinations; at most 100,000", count));

  std::vector<std::vector<std::string>> rows(1);
  for (const auto& v : vary) rows[0].push_back(v.path);
  for (const char* h : {"step", "tokens/s/device", "samples/s", "MFU", "memory", "fits"}) rows[0].emplace_back(h);
  if (o.csv) {
    std::string head;
    for (const auto& v : vary) head += v.path + ",";
    fmt::print("{}step_time_s,tokens_per_s_per_device,samples_per_s,mfu,peak_device_bytes,fits,note\n", head);
  }
  for (std::size_t n = 0; n < count; ++n) {
    Scenario s{o.model, o.topology, o.flags, {}, {}};
    std::vector<std::string> chosen(vary.size());
    for (std::size_t k = vary.size(), rest = n; k-- > 0;) {
      chosen[k] = vary[k].values[rest % vary[k].values.size()];
      rest /= vary[k].values.size();
    }
    for (std::size_t k = 0; k < vary.size(); ++k) change(s, vary[k].path, chosen[k]);
    const Topology t = load_topology(s.topology, s.edits);
    Plan plan = plan_from(s.flags, "megatron-core");
    for (const auto& [key, value] : s.plan_keys) set(plan, key, value, "--vary plan." + key);
    std::string note;
    std::optional<Prediction> p;
    Graph g;
    try {
      settle_ranks(plan, static_cast<std::int64_t>(t.used_devices()), t.name());
      g = load_graph(s.model, s.flags, plan);
      Communication communication(t);
      auto r = predict(g, plan, communication);
      if (r) {
        p = std::move(*r);
      } else {
        note = r.reason();
      }
    } catch (const InputError& e) {
      // One impossible combination must not lose the others; if all are, say why.
      if (count == 1) throw;
      note = e.what();
    }
    if (o.json) {
      nlohmann::ordered_json j;
      for (std::size_t k = 0; k < vary.size(); ++k) j["vary"][vary[k].path] = chosen[k];
      if (p) {
        j.update(nlohmann::ordered_json::parse(prediction_json(g, t, *p)));
      } else {
        j["infeasible"] = note;
      }
      fmt::print("{}\n", j.dump());
    } else if (o.csv) {
      std::string line;
      for (const auto& c : chosen) line += (c.find(',') == std::string::npos ? c : "\"" + c + "\"") + ",";
      if (p) {
        fmt::print("{}{},{},{},{},{},{},\n", line, p->step_time.count, p->tokens_per_second_per_device, p->samples_per_second,
                   p->mfu, p->peak_device.count, p->fits ? "true" : "false");
      } else {
        fmt::print("{},,,,,,\"{}\"\n", line, note);
      }
    } else {
      std::vector<std::string> row = chosen;
      if (p) {
        row.insert(row.end(), {text(p->step_time),
                               g.sequence > 0 ? grouped(static_cast<long long>(p->tokens_per_second_per_device + 0.5)) : "",
                               fmt::format("{:.4g}", p->samples_per_second), fmt::format("{:.1f} %", 100 * p->mfu),
                               text(p->peak_device), p->fits ? "yes" : "NO"});
      } else {
        row.push_back("- " + note);
      }
      rows.push_back(row);
    }
  }
  if (!o.json && !o.csv) fmt::print("{}", align(rows));
}

}  // namespace

void add_whatif(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("whatif", "simulate again with quantities of model, topology, device or plan changed");
  c->add_option("MODEL", o->model, "catalogue name or file")->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  o->flags.add_to(*c, true);
  c->add_option("--vary", o->vary,
                "PATH=v1,v2: plan.tp=2,4; device.memory_bandwidth=x0.5,x1; topology.nodes=8,16; "
                "'topology.nodes[0].links[kind=nvlink].bandwidth=25 GB/s,50 GB/s'; model.sequence=4096,8192; repeatable, crossed")
      ->allow_extra_args(false);
  c->add_flag("--json", o->json, "print JSON lines");
  c->add_flag("--csv", o->csv, "print CSV");
  c->callback([o, &code] {
    run(*o);
    (void)code;
  });
}

}  // namespace partita::cli
