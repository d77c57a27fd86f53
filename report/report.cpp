#include "report/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <tuple>

#include "base/unit_text.h"
#include "base/yaml.h"
#include "topologies/bisection.h"

namespace partita {
namespace {

using Json = nlohmann::ordered_json;

Json value_of(const YamlNode& n) {
  if (n.is_map()) {
    Json all = Json::object();
    for (const auto& [key, member] : n.members()) all[key] = value_of(member);
    return all;
  }
  if (n.is_list()) {
    Json all = Json::array();
    for (const YamlNode& item : n.items()) all.push_back(value_of(item));
    return all;
  }
  const std::string text = n.as_string();
  // Numbers and truths are written alike in both.
  if (auto known = Json::parse(text, nullptr, false); known.is_number() || known.is_boolean())
    return known;
  return text;
}

/// All that a plan file says of it, the usual first.
Json plan_json(const Plan& p) {
  const Json file = value_of(YamlNode::load_text(to_yaml(p), "the plan", "partita.plan/1"));
  Json j;
  for (const char* key : {"strategy", "framework", "tp", "pp", "dp", "cp", "ep", "etp",
                          "virtual_stages", "micro_batch", "global_batch"})
    if (file.contains(key)) j[key] = file[key];
  if (!j.contains("etp")) j["etp"] = p.etp;
  j["micro_batches"] = p.micro_batches();
  for (const auto& [key, value] : file.items()) {
    if (!j.contains(key) && key != "schema") j[key] = value;
  }
  if (!p.devices.empty()) j["placement"] = p.devices;
  return j;
}

Json prediction_object(const Graph& graph, const Topology& topology, const Prediction& p,
                       const std::vector<std::string>& assumed) {
  Json j;
  j["model"] = graph.name;
  j["topology"] = topology.name();
  j["devices"] = p.devices;
  j["plan"] = plan_json(p.plan);
  j["sequence"] = graph.sequence > 0 ? Json(graph.sequence) : Json(nullptr);
  j["assumed"] = assumed;
  j["step_time_s"] = p.step_time.count;
  j["interval_s"] =
      p.interval ? Json{p.interval->first.count, p.interval->second.count} : Json(nullptr);
  j["tokens_per_s_per_device"] =
      graph.sequence > 0 ? Json(p.tokens_per_second_per_device) : Json(nullptr);
  j["samples_per_s"] = p.samples_per_second;
  j["mfu"] = p.mfu;
  j["hfu"] = p.hfu;
  j["flop_convention"] =
      "PaLM: matrix products of forward and backward, attention over the whole square";
  j["peak_allocated_bytes"] = p.peak_allocated.count;
  j["peak_reserved_bytes"] = p.peak_reserved.count;
  j["peak_device_bytes"] = p.peak_device.count;
  j["outside_memory_bytes"] = {{"context", p.outside.context.count},
                               {"kernels", p.outside.kernels.count},
                               {"libraries", p.outside.libraries.count},
                               {"workspace", p.outside.workspace.count},
                               {"communicators", p.outside.communicators.count}};
  j["peak_memory_bytes"] = p.peak_allocated.count;
  j["peak_host_bytes"] = p.peak_host.count;
  if (p.peak_host.count > 0) {
    j["peak_host_node_bytes"] = p.peak_host_node.count;
    if (p.host_memory.count > 0) j["host_memory_bytes"] = p.host_memory.count;
  }
  j["usable_memory_bytes"] = p.usable.count;
  j["peak_at"] = p.peak_at;
  j["alive_at_peak"] = Json::array();
  for (const Alive& a : p.alive) {
    j["alive_at_peak"].push_back({{"category", std::string(name(a.category))},
                                  {"owner", a.owner},
                                  {"bytes", a.bytes.count},
                                  {"buffers", a.buffers}});
  }
  j["fits"] = p.fits;
  j["memory_bytes_by_stage"] = Json::array();
  for (const StageMemory& s : p.memory_by_stage) {
    Json m;
    m["stage"] = s.stage;
    m["total"] = s.total.count;
    for (int c = 0; c < kCategoryCount; ++c) {
      m[std::string(name(static_cast<Category>(c)))] =
          s.by_category[static_cast<std::size_t>(c)].count;
    }
    j["memory_bytes_by_stage"].push_back(m);
  }
  Json b;
  b["compute"] = Json::object();
  for (const auto& [kind, t] : p.breakdown.compute) b["compute"][kind] = to_seconds(t).count;
  b["exposed"] = Json::object();
  for (const auto& [axis, t] : p.breakdown.exposed) b["exposed"][axis] = to_seconds(t).count;
  b["bubble"] = to_seconds(p.breakdown.bubble).count;
  b["optimizer"] = to_seconds(p.breakdown.optimizer).count;
  b["other"] = to_seconds(p.breakdown.other).count;
  j["breakdown_s"] = b;
  j["network"] = name(p.network);
  j["contended"] = Json::array();
  for (const Contended& c : p.contended)
    j["contended"].push_back({{"what", c.what},
                              {"resource", c.resource},
                              {"lost_s", to_seconds(c.lost).count},
                              {"beside", c.beside},
                              {"slow_part", c.worn}});
  if (!p.over_time.empty()) j["over_time"] = Json::array();
  for (const TimeSlice& slice : p.over_time) {
    Json s{{"start_s", to_seconds(slice.start).count}, {"end_s", to_seconds(slice.end).count}};
    s["spent_s"] = Json::object(), s["lost_s"] = Json::object();
    for (const auto& [what, t] : slice.spent) s["spent_s"][what] = to_seconds(t).count;
    for (const auto& [resource, t] : slice.lost) s["lost_s"][resource] = to_seconds(t).count;
    j["over_time"].push_back(std::move(s));
  }
  j["rests_on"] = Json::array();
  for (const RestsOn& r : p.rests_on)
    j["rests_on"].push_back({{"term", r.term}, {"kind", r.kind}, {"share", r.share}});
  if (!p.fit.empty()) j["fit"] = p.fit;
  return j;
}

/// "exposed:dp" as "communication: dp", in a list without the blank; labels of Contended.
std::string in_words(const std::string& label, bool in_a_list) {
  if (label == "bubble") return "pipeline bubble";
  if (label == "bubble:messages")
    return in_a_list ? "communication:pipeline" : "communication: pipeline";
  const auto colon = label.find(':');
  if (colon == std::string::npos) return label;
  const std::string kind =
      label.compare(0, colon, "exposed") == 0 ? "communication" : label.substr(0, colon);
  return kind + (in_a_list ? ":" : ": ") + label.substr(colon + 1);
}

std::string link_text(const Topology& topology, LinkId link) {
  return link.valid() ? topology.link_name(link) : "";
}

std::string percent(double fraction) { return fmt::format("{:.1f} %", 100 * fraction); }

/// By slice: most of what it computes, most of what it waits for, most of what is lost.
std::vector<std::vector<std::string>> over_time_rows(const std::vector<TimeSlice>& slices) {
  std::vector<std::vector<std::string>> rows{{"over time, until", "computing", "most of it",
                                              "waiting", "most of it", "work lost", "over"}};
  for (const TimeSlice& slice : slices) {
    const auto all = static_cast<double>((slice.end - slice.start).count);
    struct Group {
      std::int64_t total = 0, most = 0;
      std::string what;
      void add(const std::string& name, std::int64_t ticks) {
        total += ticks;
        if (ticks > most) most = ticks, what = name;
      }
    } computes, waits, lost;
    for (const auto& [label, t] : slice.spent) {
      const bool wait = label.compare(0, 6, "bubble") == 0 || label.compare(0, 8, "exposed:") == 0;
      const auto what = label.compare(0, 8, "compute:") == 0 ? label.substr(8) : label;
      (wait ? waits : computes).add(wait ? in_words(label, true) : what, t.count);
    }
    for (const auto& [resource, t] : slice.lost) lost.add(resource, t.count);
    const auto share = [&](const Group& g) {
      return g.total == 0 ? "" : percent(static_cast<double>(g.total) / all);
    };
    rows.push_back({"  " + text(to_seconds(slice.end)), share(computes), computes.what,
                    share(waits), waits.what, share(lost), lost.what});
  }
  return rows;
}

}  // namespace

std::string align(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> width;
  for (const auto& row : rows) {
    if (row.size() > width.size()) width.resize(row.size(), 0);
    for (std::size_t i = 0; i < row.size(); ++i) width[i] = std::max(width[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      line += i == 0 ? fmt::format("{:<{}}", row[i], width[i])
                     : fmt::format("  {:>{}}", row[i], width[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string plan_line(const Plan& p) {
  std::string s = fmt::format("tp {} pp {} dp {}", p.tp, p.pp, p.dp);
  if (p.cp > 1) s += fmt::format(" cp {}", p.cp);
  if (p.ep > 1) s += fmt::format(" ep {}", p.ep);
  if (p.ep > 1 && p.etp > 0 && p.etp < p.tp) s += fmt::format(" etp {}", p.etp);
  s += fmt::format(", micro-batch {} x {}", p.micro_batch, p.micro_batches());
  if (p.pp > 1) s += fmt::format(", {}", name(p.schedule));
  if (p.virtual_stages > 1) s += fmt::format(" x {}", p.virtual_stages);
  if (p.sequence_parallel) s += ", sequence parallel";
  if (p.strategy == "dataparallel") {
    s += ", one rank has the parameters";
  } else if (p.zero > 0) {
    s += fmt::format(", ZeRO-{}", p.zero);
  }
  if (p.loader) s += fmt::format(", {} loader{}", p.dp, p.dp == 1 ? "" : "s");
  if (p.recompute.kind == Recompute::patterns) {
    s += fmt::format(", recompute of {}", in_words(p.recompute));
  } else if (p.recompute.kind != Recompute::none) {
    s += fmt::format(", {} recompute", text(p.recompute));
  }
  if (!p.cuts.empty()) s += fmt::format(", cuts {}", fmt::join(p.cuts, ","));
  if (const std::string where = placement_line(p); !where.empty()) s += ", " + where;
  return s;
}

std::string placement_line(const Plan& p) {
  constexpr std::size_t kMost = 60;  // characters of a list
  const auto shortened = [&](std::string list) {
    if (list.size() > kMost) list = list.substr(0, list.rfind(',', kMost)) + ", ...";
    return list;
  };
  std::string s;
  if (p.placement.size() > 1) s = fmt::format("innermost first {}", fmt::join(p.placement, ","));
  if (!p.devices.empty()) s = "on devices " + shortened(devices_text(p.devices));
  for (const auto& [axis, strides] : p.rings)
    s += fmt::format("{}rings of {} by {}", s.empty() ? "" : ", ", axis,
                     shortened(fmt::format("{}", fmt::join(strides, ", "))));
  return s;
}

std::string mfu_remark(const Graph& graph, const Prediction& p) {
  double seen = 0, counted = 0;
  int sliding = 0, all = 0;
  for (std::size_t i = 0; i < graph.operators.size(); ++i) {
    const auto* a = std::get_if<Attention>(&graph.operators[i].operation);
    if (a == nullptr) continue;
    ++all;
    const Signature s = signature(graph, OpId{i}, 1);
    const auto extent = [&](Dim dim) {
      return static_cast<double>(s.dims[static_cast<std::size_t>(s.find(dim))].extent);
    };
    const double queries = extent(Dim::sequence), keys = extent(Dim::key_sequence);
    const double window = static_cast<double>(a->window);
    if (a->window == 0 || window >= keys) continue;
    ++sliding;
    counted += queries * keys;
    // The first queries of a causal sequence see fewer keys than the window has.
    seen += queries * window - (a->causal ? window * (window - 1) / 2 : 0);
  }
  if (sliding == 0 && p.mfu > 1 && p.hfu < p.mfu) {
    const bool convolves = std::any_of(
        graph.operators.begin(), graph.operators.end(),
        [](const Operator& op) { return std::holds_alternative<Convolution>(op.operation); });
    return fmt::format(
        "kernels do {} of the FLOPs that the model counts ({}): utilisation by model "
        "FLOPs passes 100 %",
        percent(p.hfu / p.mfu),
        convolves ? "Winograd's algorithm, of fp32 convolutions of 3 x 3"
                  : "causal attention leaves half of its square out");
  }
  if (sliding == 0) return "";
  return fmt::format(
      "model FLOPs count the whole square of attention, of which the windows of {} of {} blocks "
      "see {}: utilisation by them may pass 100 %",
      sliding, all, percent(seen / counted));
}

std::string prediction_json(const Graph& graph, const Topology& topology, const Prediction& p,
                            const std::vector<std::string>& assumed, const Placements* placed) {
  Json j;
  j["schema"] = "partita.prediction/1";
  j.update(prediction_object(graph, topology, p, assumed));
  if (placed != nullptr) {
    for (const Prediction& other : placed->tried) {
      const Json plan = plan_json(other.plan);
      Json one{{"placement", plan["placement"]}};
      if (plan.contains("rings")) one["rings"] = plan["rings"];
      one["step_time_s"] = other.step_time.count;
      one["default"] = &other == &placed->as_given();
      j["placements"].push_back(std::move(one));
    }
    Json& search = j["placement_search"];
    search["mappings_weighed"] = placed->weighed;
    search["left_out"] = placed->left_out.empty() ? Json(nullptr) : Json(placed->left_out);
    for (std::size_t a = 0; a < placed->before.size(); ++a)
      search["busiest"].push_back({{"axis", placed->before[a].axis},
                                   {"default_s", placed->before[a].busy.count},
                                   {"default_link", link_text(topology, placed->before[a].link)},
                                   {"found_s", placed->after[a].busy.count},
                                   {"found_link", link_text(topology, placed->after[a].link)}});
  }
  return j.dump(2) + "\n";
}

std::string prediction_table(const Graph& graph, const Topology& topology, const Prediction& p,
                             const std::vector<std::string>& assumed, const Placements* placed) {
  std::string out =
      fmt::format("{} on {} devices of {}, {}, {}, global batch {}", graph.name, p.devices,
                  topology.name(), p.plan.precision_name, p.plan.framework, p.plan.global_batch);
  if (graph.sequence > 0) out += fmt::format(", sequence {}", graph.sequence);
  out += "\n" + plan_line(p.plan) + "\n";
  if (!assumed.empty()) out += fmt::format("assumed: {}\n", fmt::join(assumed, ", "));
  out += "\n";
  std::vector<std::vector<std::string>> rows{{"step time", text(p.step_time)}};
  if (p.interval)
    rows.push_back({"90 % interval",
                    fmt::format("{} to {}", text(p.interval->first), text(p.interval->second))});
  if (graph.sequence > 0) {
    rows.push_back({"tokens/s per device",
                    grouped(static_cast<long long>(p.tokens_per_second_per_device + 0.5))});
  }
  rows.push_back({"samples/s", fmt::format("{:.4g}", p.samples_per_second)});
  rows.push_back({"model FLOP utilisation", percent(p.mfu)});
  rows.push_back({"hardware FLOP utilisation", percent(p.hfu)});
  rows.push_back({"peak memory, allocated", text(p.peak_allocated)});
  rows.push_back({"peak memory, device",
                  fmt::format("{} of {} usable: {}", text(p.peak_device), text(p.usable),
                              p.peak_device <= p.usable ? "fits" : "DOES NOT FIT")});
  rows.push_back({"  reserved", text(p.peak_reserved)});
  for (const auto& [part, n] : {std::pair{"  context", p.outside.context},
                                {"  kernels", p.outside.kernels},
                                {"  libraries", p.outside.libraries},
                                {"  workspace", p.outside.workspace},
                                {"  communicators", p.outside.communicators}}) {
    if (n.count > 0) rows.push_back({part, text(n)});
  }
  if (p.peak_host.count > 0) {
    rows.push_back({"peak memory, host", text(p.peak_host) + " a rank"});
    if (p.host_memory.count > 0) {
      rows.push_back(
          {"  of a node", fmt::format("{} of {}: {}", text(p.peak_host_node), text(p.host_memory),
                                      p.host_fits ? "fits" : "DOES NOT FIT")});
    }
  }
  out += align(rows);
  if (const std::string remark = mfu_remark(graph, p); !remark.empty()) out += remark + "\n";

  const double total = static_cast<double>(std::max<std::int64_t>(1, p.breakdown.total().count));
  std::vector<std::vector<std::string>> where{{"where the time goes", "time", "share"}};
  const auto row = [&](const std::string& label, Ticks t) {
    if (t.count == 0) return;
    where.push_back({label, text(to_seconds(t)), percent(static_cast<double>(t.count) / total)});
  };
  std::vector<std::pair<std::string, Ticks>> kinds(p.breakdown.compute.begin(),
                                                   p.breakdown.compute.end());
  std::stable_sort(kinds.begin(), kinds.end(),
                   [](const auto& a, const auto& b) { return b.second < a.second; });
  for (const auto& [kind, t] : kinds) row("  compute: " + kind, t);
  for (const auto& [axis, t] : p.breakdown.exposed)
    row(axis == "launch" ? "  waiting for the host's launches" : "  exposed communication: " + axis,
        t);
  row("  pipeline bubble", p.breakdown.bubble);
  row("  optimizer", p.breakdown.optimizer);
  row("  other", p.breakdown.other);
  out += "\n" + align(where);
  if (!p.contended.empty()) {
    constexpr std::size_t kLosers = 6;
    constexpr std::size_t kBeside = 3;
    std::vector<std::vector<std::string>> lost{{"slowed down", "work lost", "over", "beside"}};
    for (std::size_t k = 0; k < std::min(kLosers, p.contended.size()); ++k) {
      const Contended& c = p.contended[k];
      std::vector<std::string> beside;
      for (const std::string& other : c.beside) beside.push_back(in_words(other, true));
      // Transfers first: they are what kernels give way to.
      std::stable_partition(beside.begin(), beside.end(), [](const std::string& other) {
        return other.compare(0, 13, "communication") == 0;
      });
      if (beside.size() > kBeside) {
        const std::size_t more = beside.size() - kBeside;
        beside.resize(kBeside);
        beside.push_back(fmt::format("{} more", more));
      }
      lost.push_back({"  " + in_words(c.what, false), text(to_seconds(c.lost)), c.resource,
                      c.worn           ? ""
                      : beside.empty() ? "its like"
                                       : fmt::format("{}", fmt::join(beside, ", "))});
    }
    if (p.contended.size() > kLosers)
      lost.push_back({fmt::format("  {} more", p.contended.size() - kLosers), "", "", ""});
    out += "\n" + align(lost);
  }

  if (!p.over_time.empty()) out += "\n" + align(over_time_rows(p.over_time));

  // One unit for the whole table, so that stages compare at a glance.
  const std::int64_t largest = p.peak_allocated.count;
  const int shift = largest >= 1 << 30 ? 30 : largest >= 1 << 20 ? 20 : 10;
  const char* unit = shift == 30 ? "GiB" : shift == 20 ? "MiB" : "KiB";
  const auto amount = [&](Bytes n) {
    return fmt::format("{:.2f}", static_cast<double>(n.count) / (1 << shift));
  };
  std::vector<std::vector<std::string>> memory{
      {fmt::format("peak memory by stage, {}", unit), "total"}};
  for (int c = 0; c < kCategoryCount; ++c) memory[0].emplace_back(name(static_cast<Category>(c)));
  for (const StageMemory& m : p.memory_by_stage) {
    std::vector<std::string> line{fmt::format("  stage {}", m.stage), amount(m.total)};
    for (int c = 0; c < kCategoryCount; ++c)
      line.push_back(amount(m.by_category[static_cast<std::size_t>(c)]));
    memory.push_back(line);
  }
  out += "\n" + align(memory) + "  at " + p.peak_at + "\n";
  constexpr std::size_t kShown = 8;
  std::vector<std::vector<std::string>> alive{
      {"largest at the peak", "category", "memory", "buffers"}};
  for (std::size_t k = 0; k < std::min(kShown, p.alive.size()); ++k) {
    const Alive& a = p.alive[k];
    alive.push_back(
        {"  " + a.owner, std::string(name(a.category)), text(a.bytes), grouped(a.buffers)});
  }
  if (p.alive.size() > kShown) {
    Bytes rest{0};
    for (std::size_t k = kShown; k < p.alive.size(); ++k) rest += p.alive[k].bytes;
    alive.push_back({fmt::format("  {} more", p.alive.size() - kShown), "", text(rest), ""});
  }
  out += "\n" + align(alive);

  std::vector<std::vector<std::string>> rests{{"what this rests on", "kind", "share"}};
  for (const RestsOn& r : p.rests_on) rests.push_back({"  " + r.term, r.kind, percent(r.share)});
  if (!p.fit.empty()) rests.push_back({"  " + p.fit, p.interval ? "fitted" : "specified", ""});
  out += "\n" + align(rests);
  if (placed != nullptr) {
    std::vector<std::vector<std::string>> tried{{"placements", "step time", ""}};
    for (const Prediction& other : placed->tried) {
      const std::string lies = placement_line(other.plan);
      tried.push_back({"  " + (lies.empty() ? "ranks in order" : lies), text(other.step_time),
                       &other == &placed->as_given() ? "default" : ""});
    }
    out += "\n" + align(tried);
    std::vector<std::vector<std::string>> busiest{
        {"busiest links, a step", "default", "", "found", ""}};
    for (std::size_t a = 0; a < placed->before.size(); ++a)
      busiest.push_back({"  " + placed->before[a].axis, text(placed->before[a].busy),
                         link_text(topology, placed->before[a].link), text(placed->after[a].busy),
                         link_text(topology, placed->after[a].link)});
    if (busiest.size() > 1) out += "\n" + align(busiest);
    out += fmt::format("{} mappings weighed by these loads{}{}\n", grouped(placed->weighed),
                       placed->left_out.empty() ? "" : "; left out: ", placed->left_out);
  }
  return out;
}

namespace {

Json refinements(const std::vector<Refinement>& all) {
  Json list = Json::array();
  for (const Refinement& x : all)
    list.push_back({{"what", x.what},
                    {"step_time_s", x.prediction.step_time.count},
                    {"peak_device_bytes", x.prediction.peak_device.count}});
  return list;
}

/// What the first plan took on the way, and what switches would make of it.
std::string refined_table(const Refined& refined, const Prediction& first) {
  std::string out;
  const auto changed = [](Seconds from, Seconds to) {
    return fmt::format("{:+.1f} %", 100 * (to.count / from.count - 1));
  };
  if (!refined.taken.empty()) {
    std::vector<std::vector<std::string>> rows{
        {"the first one, finer than the space", "step", "change", "memory"}};
    Seconds before = refined.given;
    for (const Refinement& x : refined.taken) {
      rows.push_back({"  " + x.what, text(x.prediction.step_time),
                      changed(before, x.prediction.step_time), text(x.prediction.peak_device)});
      before = x.prediction.step_time;
    }
    out += "\n" + align(rows);
  }
  if (!refined.switches.empty()) {
    std::vector<std::vector<std::string>> rows{
        {"the first one, if the framework can do so (not searched)", "step", "change", "memory"}};
    const auto add = [&](const Refinement& x) {
      rows.push_back({"  " + x.what, text(x.prediction.step_time),
                      changed(first.step_time, x.prediction.step_time),
                      text(x.prediction.peak_device)});
    };
    for (const Refinement& x : refined.switches) add(x);
    for (const Refinement& x : refined.together) add(x);
    out += "\n" + align(rows);
  }
  return out;
}

}  // namespace

std::string search_json(const Graph& graph, const Topology& topology, const SearchResult& r,
                        const std::vector<std::string>& assumed, const Beyond& beyond) {
  Json j;
  j["schema"] = "partita.search/1";
  j["plans"] = Json::array();
  for (const Prediction& p : r.plans)
    j["plans"].push_back(prediction_object(graph, topology, p, assumed));
  j["search_time_s"] = r.search_time.count;
  j["certificate"] = {{"space", r.space},
                      {"evaluated", r.evaluated},
                      {"pruned_memory", r.pruned_memory},
                      {"pruned_bound", r.pruned_bound},
                      {"illegal", r.illegal}};
  if (r.plans.empty() && r.smallest)
    j["smallest"] = prediction_object(graph, topology, *r.smallest, assumed);
  if (r.plans.empty() && !r.smallest) j["example_illegal"] = r.example_illegal;
  if (r.plans.empty()) j["would_fit"] = refinements(beyond.would_fit);
  if (beyond.refined)
    j["refined"] = {{"given_step_time_s", beyond.refined->given.count},
                    {"taken", refinements(beyond.refined->taken)},
                    {"switches", refinements(beyond.refined->switches)},
                    {"together", refinements(beyond.refined->together)},
                    {"simulated", beyond.refined->simulated}};
  return j.dump(2) + "\n";
}

std::string search_table(const Graph& graph, const Topology& topology, const SearchResult& r,
                         const std::vector<std::string>& assumed, const Beyond& beyond) {
  std::string out = fmt::format(
      "{} plans in the space: {} simulated, {} do not fit, {}{} illegal; searched in {:.1f} s\n",
      grouped(r.space), grouped(r.evaluated), grouped(r.pruned_memory),
      r.pruned_bound > 0 ? grouped(r.pruned_bound) + " cannot be as fast, " : "",
      grouped(r.illegal), r.search_time.count);
  if (r.plans.empty()) {
    out += "nothing fits";
    if (r.smallest) {
      out += fmt::format("; the smallest needs {} of {} usable:\n  {}\n",
                         text(r.smallest->peak_device), text(r.smallest->usable),
                         plan_line(r.smallest->plan));
      for (const Refinement& x : beyond.would_fit)
        out += fmt::format(
            "with {}, if the framework can do so, that plan needs {} and a step takes {}; search "
            "so\n",
            x.what, text(x.prediction.peak_device), text(x.prediction.step_time));
    } else {
      out +=
          r.example_illegal.empty() ? "\n" : fmt::format("; for example: {}\n", r.example_illegal);
    }
    return out;
  }
  std::vector<std::vector<std::string>> rows{
      {"plan", "step", graph.sequence > 0 ? "tokens/s/device" : "samples/s", "MFU", "memory"}};
  for (const Prediction& p : r.plans) {
    rows.push_back({plan_line(p.plan), text(p.step_time),
                    graph.sequence > 0
                        ? grouped(static_cast<long long>(p.tokens_per_second_per_device + 0.5))
                        : fmt::format("{:.4g}", p.samples_per_second),
                    percent(p.mfu), text(p.peak_device)});
  }
  out += "\n" + align(rows);
  if (beyond.refined) out += refined_table(*beyond.refined, r.plans[0]);
  out += "\nThe first one:\n\n" + prediction_table(graph, topology, r.plans[0], assumed);
  return out;
}

std::string catalogue_json(const std::string& what, const std::vector<std::string>& names) {
  Json j;
  j["schema"] = "partita.catalogue/1";
  j[what] = names;
  return j.dump(2) + "\n";
}

namespace {

struct OperatorRow {
  std::int64_t parameters = 0;
  Flops forward;
};
OperatorRow row_of(const Graph& graph, std::size_t i) {
  const Operator& op = graph.operators[i];
  const Signature s = signature(graph, OpId{i}, 1);
  std::vector<std::int64_t> extents;
  for (const auto& d : s.dims) extents.push_back(d.extent);
  OperatorRow row;
  for (const ParameterId q : op.parameters) row.parameters += elements(graph.parameter(q).shape);
  row.forward = flops(op.operation, s, extents, Pass::forward);
  return row;
}

}  // namespace

std::string model_json(const Graph& graph, bool operators) {
  const NetworkFlops f = network_flops(graph);
  Json j;
  j["schema"] = "partita.model_summary/1";
  j["model"] = graph.name;
  j["parameters"] = parameter_count(graph);
  j["trainable_parameters"] = trainable_parameter_count(graph);
  j["layers"] = graph.layers;
  j["sequence"] = graph.sequence;
  j["operators"] = graph.operators.size();
  j["flops_per_sample"] = {{"forward", f.forward.count},
                           {"backward_data", f.backward_data.count},
                           {"backward_weight", f.backward_weight.count}};
  if (operators) {
    j["operator_list"] = Json::array();
    for (std::size_t i = 0; i < graph.operators.size(); ++i) {
      const Operator& op = graph.operators[i];
      const OperatorRow row = row_of(graph, i);
      j["operator_list"].push_back({{"name", op.name},
                                    {"kind", kind_name(op.operation)},
                                    {"parameters", row.parameters},
                                    {"forward_flops", row.forward.count},
                                    {"output", text(graph.tensor(op.outputs[0]).shape)}});
    }
  }
  return j.dump(2) + "\n";
}

std::string model_table(const Graph& graph, bool operators) {
  const NetworkFlops f = network_flops(graph);
  std::vector<std::vector<std::string>> rows{
      {"parameters", grouped(parameter_count(graph))},
      {"  trainable", grouped(trainable_parameter_count(graph))},
      {"blocks", std::to_string(graph.layers)},
      {"operators", std::to_string(graph.operators.size())}};
  if (graph.sequence > 0) rows.push_back({"tokens per sample", grouped(graph.sequence)});
  rows.push_back({"forward, per sample", text(f.forward)});
  rows.push_back({"backward by data", text(f.backward_data)});
  rows.push_back({"backward by weight", text(f.backward_weight)});
  std::string out = graph.name + "\n\n" + align(rows);
  if (!operators) return out;
  std::vector<std::vector<std::string>> list{
      {"operator", "kind", "parameters", "forward", "output"}};
  for (std::size_t i = 0; i < graph.operators.size(); ++i) {
    const Operator& op = graph.operators[i];
    const OperatorRow row = row_of(graph, i);
    list.push_back({op.name, std::string(kind_name(op.operation)),
                    row.parameters > 0 ? grouped(row.parameters) : "", text(row.forward),
                    text(graph.tensor(op.outputs[0]).shape)});
  }
  return out + "\n" + align(list);
}

namespace {

/// Links alike in kind, rate and latency: how many, and the first.
struct LinkSort {
  Link link;
  LinkId first;
  std::int64_t count = 0;
};
std::vector<LinkSort> sorts_of_links(const Topology& t) {
  std::map<std::tuple<LinkKind, double, double>, std::size_t> known;
  std::vector<LinkSort> all;
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    const Link link = t.link(LinkId{l});
    const auto [it, fresh] =
        known.try_emplace({link.kind, link.bandwidth.count, link.latency.count}, all.size());
    if (fresh) all.push_back({link, LinkId{l}, 0});
    ++all[it->second].count;
  }
  return all;
}

Json link_json(const Topology& t, LinkId id) {
  const Link link = t.link(id);
  return {{"link", t.link_name(id)},
          {"kind", name(link.kind)},
          {"bandwidth_bytes_per_s", link.bandwidth.count},
          {"latency_s", link.latency.count}};
}

}  // namespace

std::vector<LinkId> links_of(const Topology& t, const std::string& wanted,
                             const std::string& place) {
  constexpr std::size_t kMost = 10'000;
  std::vector<LinkId> all;
  const auto is = [&](std::string_view end) {
    return end == wanted ||
           (end.size() > wanted.size() && end.starts_with(wanted) && end[wanted.size()] == '.');
  };
  for (std::size_t l = 0; l < t.link_count(); ++l) {
    const std::string link = t.link_name(LinkId{l});
    const auto arrow = link.find("->");
    if (is(std::string_view(link).substr(0, arrow)) || is(std::string_view(link).substr(arrow + 2)))
      all.emplace_back(l);
    if (all.size() > kMost)
      throw InputError(place, fmt::format("{} has more than {} links; name a part of it", wanted,
                                          grouped(static_cast<std::int64_t>(kMost))));
  }
  if (all.empty())
    throw InputError(place, fmt::format("'{}' is no vertex of {} and no first part of one; the "
                                        "first link is {}",
                                        wanted, t.name(), t.link_name(LinkId{std::size_t{0}})));
  return all;
}

std::string topology_json(const Topology& t, const TopologyViews& views) {
  Json j;
  j["schema"] = "partita.topology_summary/1";
  j["topology"] = t.name();
  j["nodes"] = t.node_count();
  j["devices"] = t.device_count();
  j["links"] = t.link_count();
  j["bisection_bytes_per_s"] = bisection(t).count;
  if (t.spines() > 1) {
    j["spines"] = t.spines();
    j["routing"] = t.routing().ecmp ? "ecmp" : "spray";
    if (t.routing().ecmp) j["seed"] = t.routing().seed;
  }
  j["link_kinds"] = Json::array();
  for (const LinkSort& s : sorts_of_links(t)) {
    Json kind = link_json(t, s.first);
    kind["count"] = s.count;
    j["link_kinds"].push_back(std::move(kind));
  }
  for (const LinkId l : views.links) j["listed_links"].push_back(link_json(t, l));
  for (const auto& [a, b] : views.routes) {
    Json route{{"from", t.device_name(a)}, {"to", t.device_name(b)}, {"links", Json::array()}};
    for (const LinkId l : t.route(a, b)) route["links"].push_back(link_json(t, l));
    j["routes"].push_back(std::move(route));
  }
  for (const AxisCrossing& a : views.axes)
    j["axes"].push_back({{"axis", a.name},
                         {"size", a.size},
                         {"nodes", a.nodes},
                         {"alone_bytes_per_s", a.alone.count},
                         {"together_bytes_per_s", a.together.count},
                         {"binds", t.link_name(a.binds)},
                         {"latency_s", a.latency.count}});
  j["device_profiles"] = Json::array();
  for (std::size_t k = 0; k < t.profile_count(); ++k) {
    const DeviceProfile& d = t.profile(k);
    Json p;
    p["name"] = d.name;
    p["memory_bytes"] = d.memory.count;
    p["usable_memory_bytes"] = d.usable_memory.count;
    p["memory_bandwidth_bytes_per_s"] = d.memory_bandwidth.count;
    for (const auto& [type, rate] : d.matrix_rates)
      p["matrix_rate_flop_per_s"][std::string(name(type))] = rate.peak.count;
    j["device_profiles"].push_back(p);
  }
  j["notes"] = t.notes();
  j["assumed"] = t.assumed();
  return j.dump(2) + "\n";
}

std::string topology_table(const Topology& t, const TopologyViews& views) {
  std::string out = fmt::format("{}: {} nodes, {} devices, {} links (one direction each)\n",
                                t.name(), t.node_count(), t.device_count(), t.link_count());
  if (t.spines() > 1)
    out += fmt::format(
        "{} spines: {}\n", t.spines(),
        t.routing().ecmp
            ? fmt::format("each pair of devices on one, by hash (ecmp, seed {})", t.routing().seed)
            : "traffic spreads evenly (spray, ideal)");
  if (t.goes_around()) out += "routes go around failed links, the shortest way left\n";
  if (t.device_count() > 1)
    out += fmt::format("between its halves: {} each way (maximum flow)\n", text(bisection(t)));
  for (std::size_t k = 0; k < t.profile_count(); ++k) {
    const DeviceProfile& d = t.profile(k);
    out += fmt::format("\n{}: {} ({} usable), {}\n", d.name, text(d.memory), text(d.usable_memory),
                       text(d.memory_bandwidth));
    for (const auto& [type, rate] : d.matrix_rates) {
      out += fmt::format("  {:<6} {:>14}   {}\n", name(type), text(rate.peak), rate.source);
    }
  }
  std::vector<std::vector<std::string>> sorts{{"links", "bandwidth", "latency", "", "like"}};
  for (const LinkSort& s : sorts_of_links(t))
    sorts.push_back({"  " + grouped(s.count), text(s.link.bandwidth), text(s.link.latency),
                     std::string(name(s.link.kind)), t.link_name(s.first)});
  out += "\n" + align(sorts);
  const auto show_link = [&](LinkId l) {
    const Link link = t.link(l);
    out += fmt::format("  {:<44} {:<8} {:>10}  {}\n", t.link_name(l), name(link.kind),
                       text(link.bandwidth), text(link.latency));
  };
  if (!views.links.empty()) out += "\n";
  for (const LinkId l : views.links) show_link(l);
  const auto show = [&](std::size_t a, std::size_t b) {
    if (b >= t.device_count()) return;
    const auto route = t.route(DeviceId{a}, DeviceId{b});
    double slowest = 1e300, latency = 0;
    out +=
        fmt::format("\nroute {} -> {}\n", t.device_name(DeviceId{a}), t.device_name(DeviceId{b}));
    for (const LinkId l : route) {
      const Link link = t.link(l);
      slowest = std::min(slowest, link.bandwidth.count);
      latency += link.latency.count;
      show_link(l);
    }
    out += fmt::format("  all: {}, {}\n", text(BytesPerSecond{slowest}), text(Seconds{latency}));
  };
  if (views.routes.empty() && views.links.empty()) {
    show(0, 1);
    if (t.node_count() > 1) show(0, t.first_device(1).index());
  }
  for (const auto& [a, b] : views.routes) show(a.index(), b.index());
  if (!views.axes.empty()) {
    std::vector<std::vector<std::string>> rows{
        {"axis", "size", "nodes", "a rank alone", "all groups at once", "then binds"}};
    for (const AxisCrossing& a : views.axes)
      rows.push_back({"  " + a.name, grouped(a.size), grouped(static_cast<std::int64_t>(a.nodes)),
                      text(a.alone), text(a.together), t.link_name(a.binds)});
    out += "\n" + align(rows);
  }
  for (const auto& note : t.notes()) out += "note: " + note + "\n";
  for (const auto& assumed : t.assumed()) out += "assumed: " + assumed + "\n";
  return out;
}

void write_trace(const std::string& file, const Program& program, const Timeline& timeline) {
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> out(std::fopen(file.c_str(), "w"), &std::fclose);
  if (!out)
    throw InputError("--trace",
                     fmt::format("cannot write {}; check the folder and its permissions", file));
  fmt::memory_buffer text;
  const auto check = [&](bool good) {
    if (!good)
      throw MachineError(fmt::format("--trace: writing {} failed; is the disk full?", file));
  };
  const auto flush = [&] {
    const bool good = std::fwrite(text.data(), 1, text.size(), out.get()) == text.size();
    text.clear();
    check(good);
  };
  const auto append = [&](const std::string& s) {
    text.append(s.data(), s.data() + s.size());
    if (text.size() > 1 << 20) flush();
  };
  append("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n");
  bool first = true;
  const auto event = [&](const std::string& s) {
    append((first ? "" : ",\n") + s);
    first = false;
  };
  for (std::size_t c = 0; c < timeline.classes.size(); ++c) {
    const RankClass& k = timeline.classes[c];
    event(Json{{"ph", "M"},
               {"name", "process_name"},
               {"pid", c},
               {"args",
                {{"name", fmt::format("stage {} ({} ranks like rank {})", k.stage, k.count,
                                      k.representative)}}}}
              .dump());
    for (std::size_t s = 0; s < program.streams.size(); ++s) {
      event(Json{{"ph", "M"},
                 {"name", "thread_name"},
                 {"pid", c},
                 {"tid", s},
                 {"args", {{"name", program.streams[s]}}}}
                .dump());
    }
    // What the instructions of a stream wait for while they run.
    for (std::size_t s = 0; s < program.streams.size() && !timeline.resources.empty(); ++s) {
      event(Json{{"ph", "M"},
                 {"name", "thread_name"},
                 {"pid", c},
                 {"tid", program.streams.size() + s},
                 {"args", {{"name", "slowed down: " + program.streams[s]}}}}
                .dump());
    }
  }
  for (const Entry& e : timeline.entries) {
    const Block& block = program.blocks[static_cast<std::size_t>(e.block)];
    const Instruction& i = block.instructions[static_cast<std::size_t>(e.instruction)];
    if (e.end == e.start) continue;
    std::string label;
    std::string what(name(i.kind));
    if (i.kind == Kind::compute) {
      what = std::string(name(i.kernel));
      label = i.op >= 0 ? program.operators[static_cast<std::size_t>(i.op)].name
                        : program.buffer(i.writes.empty() ? i.reads[0] : i.writes[0]).name;
    } else {
      label = program.buffer(i.reads.empty() ? i.writes[0] : i.reads[0]).name;
      if (i.kind == Kind::collective) what = std::string(name(i.collective));
    }
    const Bytes bytes =
        i.kind == Kind::collective
            ? payload(program, i,
                      timeline.classes[static_cast<std::size_t>(e.rank_class)].representative)
            : Bytes{0};
    Json args{{"block", block.name}, {"micro_batch", e.micro_batch}};
    if (bytes.count > 0) args["bytes"] = bytes.count;
    const auto micro = [](Ticks t) {
      return fmt::format("{}.{:06}", t.count / 1000000, t.count % 1000000);
    };
    event(fmt::format(
        R"({{"ph":"X","name":{},"cat":"{}","pid":{},"tid":{},"ts":{},"dur":{},"args":{}}})",
        Json(what + " " + label).dump(), what, e.rank_class, i.stream, micro(e.start),
        micro(e.end - e.start), args.dump()));
    if (e.over >= 0) {
      event(fmt::format(
          R"({{"ph":"X","name":{},"cat":"contention","pid":{},"tid":{},"ts":{},"dur":{},"args":{}}})",
          Json(timeline.resources[static_cast<std::size_t>(e.over)]).dump(), e.rank_class,
          program.streams.size() + i.stream, micro(e.start), micro(e.end - e.start),
          Json{{"block", block.name},
               {"what", what + " " + label},
               {"lost_us", static_cast<double>(e.lost.count) * 1e-6}}
              .dump()));
    }
  }
  append("\n]}\n");
  flush();
  // The last bytes reach the disk only now.
  check(std::fclose(out.release()) == 0);
}

}  // namespace partita
