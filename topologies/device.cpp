#include "topologies/device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <sstream>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "topologies/cluster.h"

namespace partita {

namespace {

constexpr const char* kFolder = "topologies/devices";
constexpr const char* kSchema = "partita.device/1";

double fraction(const YamlNode& node) {
  const double value = node.as_double();
  if (!(value > 0 && value <= 1))
    throw InputError(node.place(), fmt::format("an efficiency is a fraction of the peak, above 0 "
                                               "and at most 1; {} is given",
                                               value));
  return value;
}

/// Reads figures and remembers where each comes from. A figure is `{value: ..., source: ...}`, or a
/// plain value that takes the file's own `source`.
class FigureReader {
 public:
  FigureReader(const YamlNode& file, std::map<std::string, std::string>& sources)
      : sources_(sources) {
    if (const auto source = file.find("source")) file_source_ = source->as_string();
  }

  /// `efficiency`: where a figure may have one of its own.
  YamlNode operator()(const YamlNode& parent, const std::string& key, double* efficiency = nullptr,
                      double* fast = nullptr) {
    const YamlNode node = parent.get(key);
    std::string source = file_source_;
    YamlNode value = node;
    if (node.is_map()) {
      value = node.get("value");
      if (efficiency != nullptr)
        if (const auto own = node.find("efficiency")) *efficiency = fraction(*own);
      if (fast != nullptr)
        if (const auto own = node.find("fast_efficiency")) *fast = fraction(*own);
      if (const auto own = node.find("source")) source = own->as_string();
      node.reject_unknown_keys();
    }
    if (source.empty())
      throw InputError(node.place(),
                       "every hardware figure needs a source; write {value: ..., source: 'name of "
                       "the datasheet, or measured'}, or one source: for the whole file");
    sources_[key] = source;
    return value;
  }

  const std::string& file_source() const { return file_source_; }

 private:
  std::map<std::string, std::string>& sources_;
  std::string file_source_;
};

/// A text of rows of numbers under a line that names them; the last is a time: "m n k time[us]".
std::vector<std::vector<double>> rows_of(const YamlNode& node,
                                         const std::vector<std::string_view>& columns) {
  const std::string text = node.as_string();
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  std::istringstream head(line);
  std::vector<std::string> names{std::istream_iterator<std::string>(head), {}};
  const std::string wanted = fmt::format("{} time[us]", fmt::join(columns, " "));
  double unit = 0;
  if (!names.empty()) {
    for (const auto& [suffix, seconds] :
         {std::pair{"time[us]", 1e-6}, std::pair{"time[ms]", 1e-3}, std::pair{"time[s]", 1.0}})
      if (names.back() == suffix) unit = seconds;
    names.pop_back();
  }
  if (unit == 0 || !std::equal(names.begin(), names.end(), columns.begin(), columns.end()))
    throw InputError(node.place(), fmt::format("the first line of points names their columns, "
                                               "'{}' (or ms, s); it is '{}'",
                                               wanted, line));
  std::vector<std::vector<double>> rows;
  for (int number = 2; std::getline(lines, line); ++number) {
    const char* at = line.c_str();
    std::vector<double> row;
    for (char* end = nullptr;; at = end) {
      const double x = std::strtod(at, &end);
      if (end == at) break;
      row.push_back(x);
    }
    const bool good =
        row.size() == columns.size() + 1 && at[std::strspn(at, " \t\r")] == 0 &&
        std::all_of(row.begin(), row.end(), [](double x) { return x > 0 && std::isfinite(x); });
    if (!good)
      throw InputError(node.place(), fmt::format("line {} of points is '{}'; it needs {} numbers "
                                                 "above 0: {}",
                                                 number, line, columns.size() + 1, wanted));
    row.back() *= unit;
    rows.push_back(std::move(row));
  }
  return rows;
}

ElementType type_of(const YamlNode& map, const char* key, ElementType otherwise) {
  const auto node = map.find(key);
  return node ? parse_element_type(node->as_string(), node->place()) : otherwise;
}
bool flag(const YamlNode& map, const char* key) {
  const auto node = map.find(key);
  return node && node->as_bool();
}
double spread_of(const YamlNode& map) {
  const auto node = map.find("spread");
  const double spread = node ? node->as_double() : 0;
  if (!(spread >= 0 && spread < 1))
    throw InputError(node->place(),
                     fmt::format("a spread is a fraction from 0 to below 1; {} is given", spread));
  return spread;
}

/// `outside_memory: {context, kernels, libraries, workspace, communicators: [{ranks, value}]}`,
/// each with a source of its own.
OutsideMemory outside_of(const YamlNode& y, Bytes memory,
                         std::map<std::string, std::string>& sources) {
  const auto bytes = [&](const YamlNode& n, const std::string& key) {
    sources["outside_memory." + key] = n.get("source").as_string();
    const YamlNode value = n.get("value");
    const Bytes b = value.as_bytes();
    if (b > memory)
      throw InputError(value.place(), fmt::format("{} is more than the device's memory, {}",
                                                  text(b), text(memory)));
    return b;
  };
  OutsideMemory m;
  const auto part = [&](const char* key, Bytes& to) {
    const YamlNode n = y.get(key);
    to = bytes(n, key);
    n.reject_unknown_keys();
  };
  part("context", m.context);
  part("kernels", m.kernels);
  part("libraries", m.libraries);
  part("workspace", m.workspace);
  if (const auto list = y.find("communicators")) {
    for (const YamlNode& n : list->items()) {
      const YamlNode count = n.get("ranks");
      const auto ranks = static_cast<int>(count.as_int(2, 1'000'000));
      const Bytes b = bytes(n, fmt::format("communicators of {}", ranks));
      if (!m.by_ranks.emplace(ranks, b).second)
        throw InputError(count.place(),
                         fmt::format("communicators of {} ranks are given twice", ranks));
      n.reject_unknown_keys();
    }
  }
  y.reject_unknown_keys();
  return m;
}

ProductTable products_of(const YamlNode& y) {
  ProductTable t;
  t.type = type_of(y, "type", t.type);
  t.out = type_of(y, "out", t.type);
  t.accumulate = flag(y, "accumulate");
  t.grouped = flag(y, "grouped");
  t.mixed_clocks = flag(y, "mixed_clocks");
  t.replaces_nearby = flag(y, "replaces_nearby");
  if (const auto node = y.find("clock")) {
    t.clock = fraction(*node);
    if (t.mixed_clocks)
      throw InputError(node->place(),
                       "all points ran at one clock, or at several (mixed_clocks); take out one");
  }
  t.spread = spread_of(y);
  t.source = y.get("source").as_string();
  if (const auto node = y.find("layout")) {
    const std::string wanted = node->as_string();
    for (const auto layout : {ProductLayout::nn, ProductLayout::nt, ProductLayout::tn})
      if (name(layout) == wanted) t.layout = layout;
    if (t.layout == ProductLayout::any)
      throw InputError(node->place(), fmt::format("a layout is NN, NT or TN; '{}' is given; leave "
                                                  "it out where it is not known",
                                                  wanted));
  }
  for (const auto& r : rows_of(y.get("points"), {"m", "n", "k", "count"}))
    t.points.push_back({r[0], r[1], r[2], r[3], Seconds{r[4]}});
  y.reject_unknown_keys();
  return t;
}

AttentionTable attention_of(const YamlNode& y) {
  AttentionTable t;
  t.type = type_of(y, "type", t.type);
  t.backward = flag(y, "backward");
  t.causal = flag(y, "causal");
  t.mixed_clocks = flag(y, "mixed_clocks");
  t.spread = spread_of(y);
  t.source = y.get("source").as_string();
  for (const auto& r : rows_of(y.get("points"), {"batch", "queries", "keys", "heads", "qk", "v"}))
    t.points.push_back({r[0], r[1], r[2], r[3], r[4], r[5], Seconds{r[6]}});
  y.reject_unknown_keys();
  return t;
}

}  // namespace

std::string_view name(ProductLayout layout) {
  switch (layout) {
    case ProductLayout::any:
      return "any";
    case ProductLayout::nn:
      return "NN";
    case ProductLayout::nt:
      return "NT";
    case ProductLayout::tn:
      return "TN";
  }
  return "";
}

FlopsPerSecond DeviceProfile::matrix_rate(ElementType type) const {
  const auto found = matrix_rates.find(type);
  if (found != matrix_rates.end()) return found->second.peak;
  std::vector<std::string_view> known;
  for (const auto& [other, rate] : matrix_rates) known.push_back(partita::name(other));
  throw InputError("device " + name, fmt::format("no matrix rate for {}; it has {}",
                                                 partita::name(type), fmt::join(known, ", ")));
}

FlopsPerSecond DeviceProfile::sustained_rate(ElementType type, bool fast_sums) const {
  const double peak = matrix_rate(type).count;
  const Rate& rate = matrix_rates.at(type);
  if (fast_sums && rate.fast_efficiency > 0) return FlopsPerSecond{peak * rate.fast_efficiency};
  return FlopsPerSecond{peak * (rate.efficiency > 0 ? rate.efficiency : matrix_efficiency)};
}

DeviceProfile parse_device(const std::string& text, const std::string& file) {
  const YamlNode root = YamlNode::load_text(text, file, kSchema);
  DeviceProfile device;
  FigureReader figure(root, device.sources);
  device.name = root.get("name").as_string();
  if (const auto aliases = root.find("aliases")) device.aliases = aliases->as_strings();
  device.memory = figure(root, "memory").as_bytes();
  const YamlNode usable = figure(root, "usable_memory");
  device.usable_memory = usable.as_bytes();
  if (device.memory.count == 0) throw InputError(root.get("memory").place(), "memory is 0 B");
  if (device.usable_memory.count == 0 || device.usable_memory > device.memory)
    throw InputError(usable.place(),
                     fmt::format("usable memory must be above 0 and at most memory; it is {} B of "
                                 "{} B",
                                 device.usable_memory.count, device.memory.count));
  if (const auto outside = root.find("outside_memory"))
    device.outside = outside_of(*outside, device.memory, device.sources);
  device.memory_bandwidth = figure(root, "memory_bandwidth").as_byte_rate();
  device.vector_rate = figure(root, "vector_rate").as_flop_rate();
  device.matrix_efficiency = fraction(figure(root, "matrix_efficiency"));
  device.memory_efficiency = fraction(figure(root, "memory_efficiency"));
  if (root.has("sustained_clock"))
    device.sustained_clock = fraction(figure(root, "sustained_clock"));
  if (root.has("attention_clock"))
    device.attention_clock = fraction(figure(root, "attention_clock"));
  if (root.has("speed_spread")) {
    const YamlNode spread = figure(root, "speed_spread");
    device.speed_spread = spread.as_double();
    if (!(device.speed_spread >= 0 && device.speed_spread <= 0.2))
      throw InputError(spread.place(),
                       fmt::format("a standard deviation of speeds is 0 to 0.2; {} is given",
                                   device.speed_spread));
  }
  device.kernel_latency = figure(root, "kernel_latency").as_seconds();
  device.multiprocessors = static_cast<int>(figure(root, "multiprocessors").as_int(1, 1'000'000));
  if (root.has("communication_multiprocessors"))
    device.communication_multiprocessors =
        static_cast<int>(figure(root, "communication_multiprocessors")
                             .as_int(0, std::max(1, device.multiprocessors) - 1));
  if (root.has("compute_capability"))
    device.compute_capability =
        static_cast<int>(figure(root, "compute_capability").as_int(10, 10'000));
  if (const auto n = root.find("concurrent_streams")) device.concurrent_streams = n->as_bool();
  if (const auto n = root.find("host_cores"))
    device.host_cores = static_cast<int>(n->as_int(1, 1'000'000));
  if (device.host_cores > 0 && device.concurrent_streams)
    throw InputError(root.get("host_cores").place(),
                     "cores that ranks share run one instruction of a rank at a time; add "
                     "concurrent_streams: false");
  if (root.has("dispatch")) device.dispatch = figure(root, "dispatch").as_seconds();
  if (root.has("list_row")) device.list_row = figure(root, "list_row").as_seconds();
  if (root.has("launch")) device.launch = figure(root, "launch").as_seconds();
  if (root.has("dispatch_in_graph"))
    device.dispatch_in_graph = figure(root, "dispatch_in_graph").as_seconds();
  if (root.has("time_slice")) device.time_slice = figure(root, "time_slice").as_seconds();
  if (root.has("overlap")) {
    const YamlNode n = figure(root, "overlap");
    device.overlap = n.as_double();
    if (!(device.overlap >= 0 && device.overlap <= 1))
      throw InputError(n.place(), fmt::format("a share is 0 to 1; {} is given", device.overlap));
  }
  if (const auto kernels = root.find("kernels")) {
    for (const auto& [name, list] : kernels->members()) {
      for (const YamlNode& y : list.items()) {
        KernelPoint p;
        const auto number = [&](const char* key, double& to) {
          if (const auto n = y.find(key)) to = n->as_double();
        };
        if (const auto n = y.find("ranks")) p.ranks = static_cast<int>(n->as_int(1, 1'000'000));
        number("m", p.m);
        number("n", p.n);
        number("k", p.k);
        number("count", p.count);
        if (const auto n = y.find("bytes")) p.bytes = static_cast<double>(n->as_bytes().count);
        p.time = y.get("time").as_seconds();
        number("spread", p.spread);
        y.reject_unknown_keys();
        if (!(p.time.count > 0) || !((p.m > 0 && p.n > 0 && p.k > 0 && p.count > 0) || p.bytes > 0))
          throw InputError(y.place(),
                           "a measured kernel has a time above 0 and either m, n and k or bytes");
        device.kernels[name].push_back(p);
      }
    }
  }
  if (const auto node = root.find("collectives_on")) {
    device.collectives_on = node->as_string();
    const auto known = topology_catalogue();
    if (std::find(known.begin(), known.end(), device.collectives_on) == known.end())
      throw InputError(
          node->place(),
          fmt::format("'{}' is no node of the catalogue (partita topo){}", device.collectives_on,
                      did_you_mean(device.collectives_on, known)));
  }
  if (const auto table = root.find("collectives"))
    device.collectives = read_collectives(*table, figure.file_source(), device.sources);
  if (const auto list = root.find("slowdown")) {
    if (figure.file_source().empty())
      throw InputError(list->place(),
                       "what was measured needs a source; write source: for the whole file");
    device.sources["slowdown"] = figure.file_source();
    device.slowdown = read_slowdowns(*list);
  }
  for (const auto& [key, to] :
       {std::pair{"attention_forward_efficiency", &device.attention_forward_efficiency},
        std::pair{"attention_backward_efficiency", &device.attention_backward_efficiency},
        std::pair{"flash2_forward_efficiency", &device.flash2_forward_efficiency},
        std::pair{"flash2_backward_efficiency", &device.flash2_backward_efficiency}})
    if (root.has(key)) *to = fraction(figure(root, key));
  if (const auto list = root.find("products"))
    for (const YamlNode& y : list->items()) device.products.push_back(products_of(y));
  if (const auto list = root.find("attention"))
    for (const YamlNode& y : list->items()) device.attention.push_back(attention_of(y));
  if (root.has("like")) {
    const YamlNode n = figure(root, "like");
    device.like = std::make_shared<DeviceProfile>(load_device(n.as_string()));
    if (device.like->like != nullptr)
      throw InputError(n.place(), fmt::format("{} has no points of its own but those of {}; name "
                                              "that one",
                                              device.like->name, device.like->like->name));
  }
  const YamlNode rates = root.get("matrix_rates");
  for (const auto& [key, node] : rates.members()) {
    const ElementType type = parse_element_type(key, node.place());
    double efficiency = 0, fast = 0;
    const FlopsPerSecond peak = figure(rates, key, &efficiency, &fast).as_flop_rate();
    const auto entry = device.sources.extract(key);
    device.matrix_rates[type] = {peak, entry.mapped(), efficiency, fast};
  }
  if (device.matrix_rates.empty())
    throw InputError(rates.place(), "a device needs at least one matrix rate; add e.g. bf16: ...");
  root.reject_unknown_keys();
  return device;
}

std::vector<std::string> device_catalogue() { return data_names(kFolder); }

namespace {

/// With `edits` done. What the points say of the file's figures holds for the edited ones too: a
/// device of twice the rate misses its model as the measured one does.
DeviceProfile edited(const std::string& file, std::vector<YamlEdit> edits) {
  const std::string text = read_file(file);
  const auto of = [&](const char* path) {
    return std::find_if(edits.begin(), edits.end(),
                        [&](const YamlEdit& e) { return e.path == path; });
  };
  if (const auto memory = of("memory");
      memory != edits.end() && of("usable_memory") == edits.end()) {
    // The same share of it is usable.
    const std::int64_t there = parse_device(text, file).memory.count;
    const Bytes now = parse_bytes(
        multiplied(fmt::format("{} B", there), memory->value, memory->path), memory->path);
    const double share = static_cast<double>(now.count) / static_cast<double>(there);
    edits.push_back({"usable_memory", fmt::format("x{:.17g}", share)});
  }
  DeviceProfile device = parse_device(yaml_with(text, edits, file), file);
  if (!edits.empty() && (!device.products.empty() || !device.attention.empty())) {
    device.like = std::make_shared<DeviceProfile>(parse_device(text, file));
    device.products.clear();
    device.attention.clear();
  }
  return device;
}

}  // namespace

DeviceProfile load_device(const std::string& name_or_file, const std::vector<YamlEdit>& edits) {
  if (name_or_file.ends_with(".yaml")) return edited(name_or_file, edits);
  const std::string folder = data_folder(kFolder);
  const auto known = device_catalogue();
  const auto load = [&](const std::string& name) {
    return edited(folder + "/" + name + ".yaml", edits);
  };
  if (std::binary_search(known.begin(), known.end(), name_or_file)) return load(name_or_file);
  for (const auto& name : known) {
    DeviceProfile device = load(name);
    if (std::find(device.aliases.begin(), device.aliases.end(), name_or_file) !=
        device.aliases.end())
      return device;
  }
  throw InputError("device", fmt::format("unknown device '{}'; use one of {}, or the path of a "
                                         ".yaml file{}",
                                         name_or_file, fmt::join(known, ", "),
                                         did_you_mean(name_or_file, known)));
}

}  // namespace partita
