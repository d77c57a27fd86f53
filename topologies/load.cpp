// load_topology: which reader a text calls for, and how many nodes of it.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <optional>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "topologies/cluster.h"

namespace partita {

namespace {

constexpr const char* kFolder = "topologies/catalogue";

/// "16", "16 nodes", "16 nodes of 2" or "12 gpus" after the colon.
struct Amount {
  std::int64_t number = 0;
  bool devices = false;
  std::int64_t of = 0;  ///< > 0: only so many devices of each node
};

/// "NAME:AMOUNT?device=D" taken apart.
struct Request {
  std::string name;
  std::string device;
  std::optional<Amount> amount;
};

Amount parse_amount(const std::string& text, const std::string& whole) {
  Amount amount;
  const char* const end = text.data() + text.size();
  const auto [next, error] = std::from_chars(text.data(), end, amount.number);
  std::string unit(next, end);
  unit.erase(0, unit.find_first_not_of(' '));
  if (const std::size_t of = unit.find(" of "); of != std::string::npos) {
    const char* const few = unit.data() + of + 4;
    const auto [last, wrong] = std::from_chars(few, unit.data() + unit.size(), amount.of);
    if (wrong != std::errc{} || last != unit.data() + unit.size() || amount.of < 1)
      throw InputError(whole, fmt::format("'{}' is no number of devices of a node; write e.g. "
                                          ":16 nodes of 2",
                                          unit.substr(of + 4)));
    unit.resize(of);
  }
  if (amount.of == 0 && (unit == "gpus" || unit == "gpu" || unit == "devices" || unit == "device"))
    amount.devices = true;
  else if (error != std::errc{} || !(unit.empty() || unit == "nodes" || unit == "node"))
    throw InputError(whole, fmt::format("'{}' is no number of nodes or devices; write e.g. :16, "
                                        ":16 nodes or :12 gpus",
                                        text));
  if (error != std::errc{} || amount.number < 1 || amount.number > 100 * kMostNodes)
    throw InputError(whole,
                     fmt::format("the number of {} must be 1 to {}; '{}' is given",
                                 amount.devices ? "devices" : "nodes",
                                 grouped(amount.devices ? 100 * kMostNodes : kMostNodes), text));
  return amount;
}

Request parse_request(const std::string& text) {
  Request request;
  request.name = text;
  // A colon inside a path (a drive, a folder) is not ours: only what follows the last one counts.
  const std::size_t colon = request.name.rfind(':');
  if (colon != std::string::npos && request.name.find('/', colon) == std::string::npos &&
      !std::filesystem::exists(request.name)) {
    request.amount = parse_amount(request.name.substr(colon + 1), text);
    request.name.resize(colon);
  }
  const std::size_t question = request.name.find('?');
  if (question != std::string::npos) {
    const std::string option = request.name.substr(question + 1);
    request.name.resize(question);
    if (!option.starts_with("device="))
      throw InputError(
          text, fmt::format("unknown option '?{}'; the one there is, is ?device=NAME", option));
    request.device = option.substr(7);
  }
  return request;
}

ClusterSpec read(const Request& request, const std::string& whole, const TopologyEdits& edits) {
  const auto known = topology_catalogue();
  if (std::binary_search(known.begin(), known.end(), request.name)) {
    if (!request.device.empty())
      throw InputError(whole,
                       "?device= is for files that don't name their GPU; a catalogue entry "
                       "does: leave it out");
    const std::string file = data_folder(kFolder) + "/" + request.name + ".yaml";
    return read_cluster_yaml(read_file(file), file, edits);
  }
  const std::string ending = std::filesystem::path(request.name).extension().string();
  if (ending == ".yaml" || ending == ".yml") {
    if (!request.device.empty())
      throw InputError(whole,
                       "?device= is for files that don't name their GPU; a cluster file "
                       "does: write device: there");
    return read_cluster_yaml(read_file(request.name), request.name, edits);
  }
  const bool xml = ending == ".xml";
  if (xml || ending == ".txt" || std::filesystem::is_regular_file(request.name)) {
    ClusterSpec spec = (xml ? read_nccl_xml : read_nvidia_smi)(read_file(request.name),
                                                               request.name, request.device);
    if (!edits.cluster.empty() || !edits.device.empty()) {
      // What-if changes are made to the YAML that says the same.
      ClusterSpec edited = read_cluster_yaml(to_cluster_yaml(spec), request.name, edits);
      edited.notes = spec.notes;
      spec = std::move(edited);
    }
    spec.imported = true;
    return spec;
  }
  throw InputError(
      "topology",
      fmt::format("unknown topology '{}'; use one of {}, or the path of a .yaml "
                  "(cluster), .xml (NCCL) or .txt (nvidia-smi topo -m) file{}",
                  request.name, fmt::join(known, ", "), did_you_mean(request.name, known)));
}

/// Only the first `few` devices of each node, with all else that it has.
void keep_devices(NodeSpec& group, std::int64_t few) {
  constexpr std::size_t kGone = static_cast<std::size_t>(-1);
  std::vector<std::size_t> now(group.vertices.size(), kGone);
  std::vector<VertexSpec> vertices;
  for (std::size_t v = 0; v < group.vertices.size(); ++v) {
    if (group.vertices[v].kind == VertexKind::device && few-- <= 0) continue;
    now[v] = vertices.size();
    vertices.push_back(std::move(group.vertices[v]));
  }
  group.vertices = std::move(vertices);
  std::erase_if(group.edges,
                [&](const EdgeSpec& e) { return now[e.a] == kGone || now[e.b] == kGone; });
  for (EdgeSpec& e : group.edges) e.a = now[e.a], e.b = now[e.b];
  if (!group.domain) return;
  std::erase_if(group.domain->ports, [&](std::size_t v) { return now[v] == kGone; });
  for (std::size_t& v : group.domain->ports) v = now[v];
}

void set_amount(ClusterSpec& spec, const Amount& amount, const std::string& whole,
                bool equal_parts) {
  if (spec.groups.size() != 1)
    throw InputError(whole, fmt::format("a number after the colon needs a cluster with one group "
                                        "of nodes; this one has {}: change count: in its file",
                                        spec.groups.size()));
  NodeSpec& group = spec.groups.front();
  const auto per_node = static_cast<std::int64_t>(
      std::count_if(group.vertices.begin(), group.vertices.end(),
                    [](const VertexSpec& v) { return v.kind == VertexKind::device; }));
  if (amount.of > per_node)
    throw InputError(whole,
                     fmt::format("a node has {} devices; {} are asked for", per_node, amount.of));
  if (amount.of > 0) keep_devices(group, amount.of);
  if (amount.devices && per_node > 0) {
    group.count = ceil_div(amount.number, per_node);
    spec.used_devices = static_cast<std::size_t>(amount.number);
  } else {
    group.count = amount.number;
  }
  if (group.domain && equal_parts) {
    const std::int64_t each = nodes_of_each_domain(group.count, group.domain->nodes);
    if (each != group.domain->nodes) {
      group.domain->nodes = each;
      spec.assumed.push_back(fmt::format("{} nodes of each NVLink domain", each));
    }
  }
  if (group.count > 1 && spec.imported) {
    spec.fabric = SingleSwitch{};
    spec.notes.push_back(
        fmt::format("{}: {} nodes alike, their NICs on one non-blocking switch, "
                    "are assumed",
                    spec.name, group.count));
  }
  if (group.count > kMostNodes)
    throw InputError(whole, fmt::format("a cluster has at most {} nodes; {} are asked for",
                                        grouped(kMostNodes), grouped(group.count)));
}

}  // namespace

std::int64_t nodes_of_each_domain(std::int64_t nodes, std::int64_t per_domain) {
  if (nodes <= per_domain) return per_domain;
  for (std::int64_t each = per_domain; 2 * each >= per_domain; --each)
    if (nodes % each == 0) return each;
  return per_domain;
}

std::vector<std::string> data_names(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(data_folder(folder), error))
    if (entry.path().extension() == ".yaml") names.push_back(entry.path().stem().string());
  if (error)
    throw InputError(data_folder(folder),
                     "can't list this folder of data files; set PARTITA_DATA "
                     "to the folder that has " +
                         folder);
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> topology_catalogue() { return data_names(kFolder); }

Topology parse_topology(const std::string& text, const std::string& file) {
  return build_topology(read_cluster_yaml(text, file));
}

Topology load_topology(const std::string& text) { return load_topology(text, {}); }

std::string with_nodes(const std::string& text, const std::string& nodes) {
  const Request r = parse_request(text);
  if (r.amount && r.amount->devices)
    throw InputError("topology.nodes", fmt::format("{} counts devices; write it by nodes, like "
                                                   "{}:2 or {}:2 nodes of 4",
                                                   text, r.name, r.name));
  const std::string there =
      multiplies(nodes) ? std::to_string(load_topology(text, {}).node_count()) : "";
  return fmt::format("{}{}:{}{}", r.name, r.device.empty() ? "" : "?device=" + r.device,
                     multiplied(there, nodes, "topology.nodes"),
                     r.amount && r.amount->of > 0 ? fmt::format(" nodes of {}", r.amount->of) : "");
}

Topology load_topology(const std::string& text, const TopologyEdits& edits) {
  const Request request = parse_request(text);
  ClusterSpec spec = read(request, text, edits);
  const bool measured = !spec.collectives.empty() ||
                        std::any_of(spec.profiles.begin(), spec.profiles.end(),
                                    [](const auto& d) { return !d.collectives.empty(); });
  if (measured && !(edits.cluster.empty() && edits.device.empty()))
    spec.measured_on = std::make_shared<Topology>(load_topology(text));
  if (request.amount) {
    // Domains as they were changed to are not cut again.
    const bool asked = std::any_of(edits.cluster.begin(), edits.cluster.end(),
                                   [](const auto& e) { return e.path.ends_with(".domain.nodes"); });
    set_amount(spec, *request.amount, text, !asked);
  }
  return build_topology(std::move(spec));
}

}  // namespace partita
