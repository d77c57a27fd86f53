// The reader of cluster files. docs/topologies.md has the grammar.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <map>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "topologies/cluster.h"

namespace partita {

namespace {

constexpr const char* kSchema = "partita.topology/1";
constexpr std::size_t kMostVertices = 512;  ///< In one node.

template <class T>
T one_of(const YamlNode& node, const std::vector<std::pair<std::string, T>>& choices) {
  const std::string word = node.as_string();
  std::vector<std::string> known;
  for (const auto& [name, value] : choices) {
    if (name == word) return value;
    known.push_back(name);
  }
  throw InputError(node.place(), fmt::format("unknown kind '{}'; use one of {}{}", word,
                                             fmt::join(known, ", "), did_you_mean(word, known)));
}

VertexKind vertex_kind(const YamlNode& node) {
  std::vector<std::pair<std::string, VertexKind>> choices;
  for (const auto kind : {VertexKind::device, VertexKind::cpu, VertexKind::pcie_switch,
                          VertexKind::nvswitch, VertexKind::nic, VertexKind::network_switch})
    choices.emplace_back(name(kind), kind);
  return one_of(node, choices);
}

LinkKind link_kind(const YamlNode& node) {
  std::vector<std::pair<std::string, LinkKind>> choices;
  for (const auto kind : {LinkKind::nvlink, LinkKind::pcie, LinkKind::c2c,
                          LinkKind::cpu_interconnect, LinkKind::network, LinkKind::other})
    choices.emplace_back(name(kind), kind);
  return one_of(node, choices);
}

Seconds latency(const YamlNode& record, const char* key) {
  const YamlNode node = record.get(key);
  const Seconds value = node.as_seconds();
  if (value > 10.0_s)
    throw InputError(node.place(),
                     fmt::format("a link's latency is at most 10 s; {} s is given", value.count));
  return value;
}

/// "gpu[0-3,6]" -> gpu0 gpu1 gpu2 gpu3 gpu6; "cpu" -> cpu.
std::vector<std::string> expand(const std::string& text, const std::string& place) {
  const auto bad = [&] {
    return InputError(place, fmt::format("'{}' is no name or range; write gpu, gpu[0-7] or "
                                         "gpu[0,2,4-6]",
                                         text));
  };
  const std::size_t open = text.find('[');
  if (open == std::string::npos) {
    if (text.empty() || text.find_first_of("]., ") != std::string::npos) throw bad();
    return {text};
  }
  if (open == 0 || text.back() != ']') throw bad();
  const std::string stem = text.substr(0, open);
  std::vector<std::string> names;
  const char* at = text.data() + open + 1;
  const char* const end = text.data() + text.size() - 1;
  const auto number = [&] {
    std::size_t value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error != std::errc{}) throw bad();
    at = next;
    return value;
  };
  for (;;) {
    const std::size_t first = number();
    std::size_t last = first;
    if (at != end && *at == '-') {
      ++at;
      last = number();
    }
    if (last < first || last - first >= kMostVertices) throw bad();
    for (std::size_t i = first; i <= last; ++i) names.push_back(fmt::format("{}{}", stem, i));
    if (at == end) return names;
    if (*at != ',') throw bad();
    ++at;
  }
}

/// Each list of names, or one.
std::vector<std::string> expand(const YamlNode& node) {
  std::vector<std::string> names;
  for (const auto& text : node.as_strings())
    for (auto& name : expand(text, node.place())) names.push_back(std::move(name));
  return names;
}

class Reader {
 public:
  Reader(const std::string& text, const std::string& file, const TopologyEdits& edits)
      : file_(file), edits_(edits), root_(YamlNode::load_text(text, file, kSchema)) {}

  ClusterSpec read() {
    spec_.place = file_;
    spec_.name = root_.get("name").as_string();
    root_.find("description");
    for (const char* of_rows : {"aliases", "network"}) root_.find(of_rows);  // docs/published.md
    const std::string source = own_source(root_, "");
    const YamlNode groups = root_.get("nodes");
    for (const auto& node : groups.items()) read_group(node, own_source(node, source));
    if (const auto table = root_.find("collectives")) {
      std::map<std::string, std::string> cited;
      spec_.collectives = read_collectives(*table, source, cited);
      for (auto& entry : cited) spec_.sources.push_back(std::move(entry));
    }
    if (const auto fabric = root_.find("fabric")) read_fabric(*fabric, own_source(*fabric, source));
    root_.reject_unknown_keys();
    return std::move(spec_);
  }

 private:
  static std::string own_source(const YamlNode& node, const std::string& inherited) {
    if (!node.is_map()) return inherited;
    const auto own = node.find("source");
    return own ? own->as_string() : inherited;
  }

  void cite(const YamlNode& record, const std::string& source) {
    if (source.empty())
      throw InputError(record.place(),
                       "every hardware figure needs a source; add source: 'name of the datasheet, "
                       "or measured, or assumed' here, to its group or to the file");
    std::string place = record.place();
    if (place.starts_with(file_)) place = place.substr(file_.size());
    const std::size_t path = place.find(": ");
    spec_.sources.emplace_back(path == std::string::npos ? place : place.substr(path + 2), source);
  }

  /// Index of a device's profile; an alias and its name share one.
  std::size_t profile(const YamlNode& node) {
    const std::string name = node.as_string();
    if (const auto known = profile_by_name_.find(name); known != profile_by_name_.end())
      return known->second;
    const bool is_file = name.ends_with(".yaml");
    const std::filesystem::path folder = std::filesystem::path(file_).parent_path();
    try {
      // An absolute path replaces the folder.
      DeviceProfile device = load_device(is_file ? (folder / name).string() : name, edits_.device);
      std::size_t index = spec_.profiles.size();
      if (!is_file) index = profile_by_name_.try_emplace(device.name, index).first->second;
      if (index == spec_.profiles.size()) spec_.profiles.push_back(std::move(device));
      profile_by_name_[name] = index;
      return index;
    } catch (const InputError& error) {
      // A mistake inside a device file already has a better place than ours.
      if (error.place() != "device") throw;
      throw InputError(node.place(), error.message());
    }
  }

  void read_group(const YamlNode& node, const std::string& source) {
    NodeSpec group;
    group.place = node.place();
    if (const auto count = node.find("count")) group.count = count->as_int();
    if (const auto vendor = node.find("cpu_vendor"))
      group.cpu_vendor = one_of<std::string>(
          *vendor, {{"intel", "intel"}, {"amd", "amd"}, {"arm", "arm"}, {"other", ""}});
    const auto rate = [&](const char* key, const char* source_key, BytesPerSecond& to) {
      const auto bandwidth = node.find(key);
      const auto own = node.find(source_key);
      if (!bandwidth) return;
      to = bandwidth->as_byte_rate();
      cite(*bandwidth, own ? own->as_string() : source);
    };
    rate("host_memory_bandwidth", "host_source", group.host_memory_bandwidth);
    if (const auto memory = node.find("host_memory")) {
      group.host_memory = memory->as_bytes();
      const auto own = node.find("host_memory_source");
      cite(*memory, own ? own->as_string() : source);
    }
    if (const auto factor = node.find("launch_time")) {
      group.launch_time = factor->as_double();
      if (!(group.launch_time > 0 && group.launch_time <= 100))
        throw InputError(factor->place(),
                         fmt::format("{} is no factor on the times of launches; write more than 0 "
                                     "and at most 100",
                                     group.launch_time));
      const auto own = node.find("launch_source");
      cite(*factor, own ? own->as_string() : source);
    }
    rate("storage_bandwidth", "storage_source", group.storage_bandwidth);
    for (const auto& [names, vertex] : node.get("vertices").members())
      read_vertices(names, vertex, own_source(vertex, source), group);
    std::map<std::string, std::size_t> by_name;
    for (std::size_t v = 0; v < group.vertices.size(); ++v)
      if (!by_name.emplace(group.vertices[v].name, v).second)
        throw InputError(group.vertices[v].place,
                         fmt::format("vertex '{}' is named twice in this node; give each its own "
                                     "name",
                                     group.vertices[v].name));
    if (const auto links = node.find("links"))
      for (const auto& link : links->items())
        read_links(link, own_source(link, source), by_name, group);
    if (const auto domain = node.find("domain")) {
      DomainSpec d;
      d.nodes = domain->get("nodes").as_int(1, kMostNodes);
      d.kind = link_kind(domain->get("kind"));
      d.ports = lookup(domain->get("ports"), by_name);
      d.bandwidth = domain->get("bandwidth").as_byte_rate();
      d.latency = latency(*domain, "latency");
      cite(*domain, own_source(*domain, source));
      domain->reject_unknown_keys();
      group.domain = d;
    }
    node.reject_unknown_keys();
    spec_.groups.push_back(std::move(group));
  }

  void read_vertices(const std::string& names, const YamlNode& node, const std::string& source,
                     NodeSpec& group) {
    VertexSpec vertex;
    vertex.place = node.place();
    vertex.kind = vertex_kind(node.get("kind"));
    if (vertex.kind == VertexKind::device) vertex.profile = profile(node.get("device"));
    if (vertex.kind == VertexKind::nic) {
      vertex.port_efficiency = share(node, "efficiency");
      vertex.port_bandwidth =
          BytesPerSecond{node.get("bandwidth").as_byte_rate().count * vertex.port_efficiency};
      vertex.port_latency = latency(node, "latency");
      cite(node, source);
    }
    node.reject_unknown_keys();
    for (auto& name : expand(names, node.place())) {
      vertex.name = std::move(name);
      group.vertices.push_back(vertex);
    }
    if (group.vertices.size() > kMostVertices)
      throw InputError(node.place(), fmt::format("a node has at most {} vertices; this one has {}",
                                                 kMostVertices, group.vertices.size()));
  }

  /// A number above 0, at most 1; absent: 1.
  static double share(const YamlNode& node, const char* key) {
    const auto n = node.find(key);
    if (!n) return 1;
    const double x = n->as_double();
    if (!(x > 0 && x <= 1))
      throw InputError(n->place(),
                       fmt::format("{} {} is no share; use a number above 0, at most 1", key, x));
    return x;
  }

  std::vector<std::size_t> lookup(const YamlNode& node,
                                  const std::map<std::string, std::size_t>& by_name) const {
    std::vector<std::size_t> found;
    for (const auto& name : expand(node)) {
      const auto entry = by_name.find(name);
      if (entry == by_name.end()) {
        std::vector<std::string> known;
        for (const auto& [other, index] : by_name) known.push_back(other);
        throw InputError(node.place(),
                         fmt::format("no vertex '{}' in this node; it has {}{}", name,
                                     fmt::join(known, ", "), did_you_mean(name, known)));
      }
      found.push_back(entry->second);
    }
    return found;
  }

  void read_links(const YamlNode& node, const std::string& source,
                  const std::map<std::string, std::size_t>& by_name, NodeSpec& group) {
    EdgeSpec edge;
    edge.kind = link_kind(node.get("kind"));
    edge.bandwidth = node.get("bandwidth").as_byte_rate();
    edge.latency = latency(node, "latency");
    if (const auto lanes = node.find("lanes"))
      edge.bandwidth = static_cast<double>(lanes->as_int(1, 1000)) * edge.bandwidth;
    cite(node, source);
    const auto add = [&](std::size_t a, std::size_t b) {
      if (a == b)
        throw InputError(node.place(),
                         fmt::format("vertex '{}' is linked to itself; name two vertices",
                                     group.vertices[a].name));
      edge.a = a;
      edge.b = b;
      group.edges.push_back(edge);
    };
    if (const auto between = node.find("between")) {
      const auto all = lookup(*between, by_name);
      for (std::size_t i = 0; i < all.size(); ++i)
        for (std::size_t j = i + 1; j < all.size(); ++j) add(all[i], all[j]);
      node.reject_unknown_keys();
      return;
    }
    const auto from = lookup(node.get("from"), by_name);
    const auto to = lookup(node.get("to"), by_name);
    node.reject_unknown_keys();
    const std::size_t longer = std::max(from.size(), to.size());
    if (from.empty() || to.empty() || longer % from.size() != 0 || longer % to.size() != 0)
      throw InputError(node.place(),
                       fmt::format("{} vertices can't be linked to {}: one number must divide the "
                                   "other; write several links",
                                   from.size(), to.size()));
    // Equal ranges pair up; a shorter one is dealt out in blocks: gpu[0-3] to pcie[0-1] joins
    // gpu0 and gpu1 to pcie0.
    for (std::size_t i = 0; i < longer; ++i)
      add(from[i / (longer / from.size())], to[i / (longer / to.size())]);
  }

  double oversubscription(const YamlNode& node) const {
    const auto ratio = node.find("oversubscription");
    if (!ratio) return 1;
    const double value = ratio->as_double();
    if (!(value > 0 && value <= 1e6))
      throw InputError(ratio->place(),
                       fmt::format("oversubscription is bandwidth below a leaf over "
                                   "bandwidth above it, e.g. 1 or 2; {} is given",
                                   value));
    return value;
  }

  Uplinks uplinks(const YamlNode& node) const {
    Uplinks up;
    up.oversubscription = oversubscription(node);
    if (const auto uplink = node.find("uplink")) up.rate = uplink->as_byte_rate();
    up.latency = latency(node, "uplink_latency");
    if (const auto spines = node.find("spines")) up.spines = spines->as_int(1, 4096);
    const auto seed = node.find("seed");
    if (seed) up.routing.seed = static_cast<std::uint64_t>(seed->as_int(0));
    if (const auto routing = node.find("routing")) {
      up.routing.ecmp = one_of<bool>(*routing, {{"spray", false}, {"ecmp", true}});
      if (up.routing.ecmp && up.spines < 2)
        throw InputError(routing->place(), fmt::format("ecmp chooses between spines and there is "
                                                       "{}; add spines: 2 or more, or spray",
                                                       up.spines));
    }
    if (seed && !up.routing.ecmp)
      throw InputError(seed->place(), "a seed is of routing: ecmp; leave it out or add that");
    return up;
  }

  void read_torus(const YamlNode& node) {
    TorusSpec torus;
    const YamlNode size = node.get("size");
    torus.place = size.place();
    std::int64_t nodes = 1;
    for (const YamlNode& side : size.items()) {
      torus.size.push_back(side.as_int(1, kMostNodes));
      nodes = std::min(nodes * torus.size.back(), kMostNodes + 1);
    }
    if (torus.size.empty() || torus.size.size() > 8)
      throw InputError(size.place(), fmt::format("a torus has 1 to 8 dimensions, like [4, 4, 4]; "
                                                 "{} are given",
                                                 torus.size.size()));
    if (nodes > kMostNodes)
      throw InputError(size.place(),
                       fmt::format("a cluster has at most {} nodes; a torus of {} has "
                                   "more",
                                   grouped(kMostNodes), fmt::join(torus.size, " x ")));
    torus.bandwidth = node.get("bandwidth").as_byte_rate();
    torus.latency = latency(node, "latency");
    if (const auto nics = node.find("nics"))
      torus.by_direction = one_of<bool>(*nics, {{"router", false}, {"direction", true}});
    spec_.fabric = std::move(torus);
  }

  void read_dragonfly(const YamlNode& node) {
    DragonflySpec fly;
    fly.place = node.place();
    fly.groups = node.get("groups").as_int(1, kMostNodes);
    fly.routers = node.get("routers_per_group").as_int(1, 4096);
    fly.nodes_per_router = node.get("nodes_per_router").as_int(1, kMostNodes);
    if (fly.routers > 1 || node.find("local_bandwidth")) {
      fly.local_bandwidth = node.get("local_bandwidth").as_byte_rate();
      fly.local_latency = latency(node, "local_latency");
    }
    if (fly.groups > 1) {
      const YamlNode links = node.get("global_links_per_router");
      fly.global_links = links.as_int(1, 4096);
      const std::int64_t ports = fly.routers * fly.global_links, others = fly.groups - 1;
      if (ports % others != 0)
        throw InputError(links.place(),
                         fmt::format("{} routers with {} global links have {} for {} other groups; "
                                     "give each group as many: a multiple of {}",
                                     fly.routers, fly.global_links, ports, others, others));
      fly.global_bandwidth = node.get("global_bandwidth").as_byte_rate();
      fly.global_latency = latency(node, "global_latency");
    }
    spec_.fabric = std::move(fly);
  }

  void read_fabric(const YamlNode& node, const std::string& source) {
    enum class Kind { none, single_switch, rails, fat_tree, torus, dragonfly };
    const auto kind = one_of<Kind>(node.get("kind"), {{"none", Kind::none},
                                                      {"single switch", Kind::single_switch},
                                                      {"rails", Kind::rails},
                                                      {"fat tree", Kind::fat_tree},
                                                      {"torus", Kind::torus},
                                                      {"dragonfly", Kind::dragonfly}});
    switch (kind) {
      case Kind::none:
        break;
      case Kind::single_switch:
        spec_.fabric = SingleSwitch{};
        break;
      case Kind::rails: {
        Rails rails;
        if (const auto below = node.find("nodes_per_leaf"))
          rails.nodes_per_leaf = below->as_int(1, kMostNodes);
        if (const auto spine = node.find("spine")) rails.spine = spine->as_bool();
        if (const auto pxn = node.find("pxn")) rails.pxn = pxn->as_bool();
        if (rails.spine) rails.uplinks = uplinks(node);
        spec_.fabric = rails;
        break;
      }
      case Kind::fat_tree: {
        FatTree tree;
        tree.nodes_per_leaf = node.get("nodes_per_leaf").as_int(1, kMostNodes);
        tree.uplinks = uplinks(node);
        spec_.fabric = tree;
        break;
      }
      case Kind::torus:
        read_torus(node);
        break;
      case Kind::dragonfly:
        read_dragonfly(node);
        break;
    }
    if (kind == Kind::single_switch || kind == Kind::rails || kind == Kind::fat_tree) {
      if (const auto sharp = node.find("sharp")) spec_.sharp = sharp->as_bool();
    }
    if (kind != Kind::none) cite(node, source);
    node.reject_unknown_keys();
  }

  std::string file_;
  const TopologyEdits& edits_;
  YamlNode root_;
  ClusterSpec spec_;
  std::map<std::string, std::size_t> profile_by_name_;
};

}  // namespace

ClusterSpec read_cluster_yaml(const std::string& text, const std::string& file,
                              const TopologyEdits& edits) {
  return Reader(yaml_with(text, edits.cluster, file), file, edits).read();
}

std::string to_cluster_yaml(const ClusterSpec& spec) {
  PARTITA_ASSERT(spec.groups.size() == 1 && !spec.groups[0].domain, "one plain group of nodes");
  const NodeSpec& group = spec.groups[0];
  const auto quoted = [](const std::string& text) {
    std::string s = "'";
    for (const char c : text) s += c == '\'' ? std::string("''") : std::string(1, c);
    return s + "'";
  };
  std::string s =
      fmt::format("schema: {}\nname: {}\nsource: {}\nnodes:\n  - count: {}\n    cpu_vendor: {}\n",
                  kSchema, quoted(spec.name), quoted("imported from " + spec.place), group.count,
                  group.cpu_vendor.empty() ? "other" : group.cpu_vendor);
  s += "    vertices:\n";
  for (const VertexSpec& v : group.vertices) {
    s += fmt::format("      {}: {{kind: {}", quoted(v.name), name(v.kind));
    if (v.kind == VertexKind::device) s += ", device: " + quoted(spec.profiles[v.profile].name);
    // As many digits as a double has: read back, it is the same number.
    if (v.kind == VertexKind::nic)
      s += fmt::format(", bandwidth: {} B/s, latency: {} s", v.port_bandwidth.count,
                       v.port_latency.count);
    s += "}\n";
  }
  s += "    links:\n";
  for (const EdgeSpec& e : group.edges) {
    s += fmt::format("      - {{from: {}, to: {}, kind: {}, bandwidth: {} B/s, latency: {} s}}\n",
                     quoted(group.vertices[e.a].name), quoted(group.vertices[e.b].name),
                     name(e.kind), e.bandwidth.count, e.latency.count);
  }
  return s;
}

}  // namespace partita
