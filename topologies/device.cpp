#include "topologies/device.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "base/yaml.h"
#include "topologies/cluster.h"

namespace partita {

namespace {

constexpr const char* kFolder = "topologies/devices";
constexpr const char* kSchema = "partita.device/1";

/// Reads figures and remembers where each comes from. A figure is `{value: ..., source: ...}`, or a
/// plain value that takes the file's own `source`.
class FigureReader {
 public:
  FigureReader(const YamlNode& file, std::map<std::string, std::string>& sources)
      : sources_(sources) {
    if (const auto source = file.find("source")) file_source_ = source->as_string();
  }

  YamlNode operator()(const YamlNode& parent, const std::string& key) {
    const YamlNode node = parent.get(key);
    std::string source = file_source_;
    YamlNode value = node;
    if (node.is_map()) {
      value = node.get("value");
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

double fraction(const YamlNode& node) {
  const double value = node.as_double();
  if (!(value > 0 && value <= 1))
    throw InputError(node.place(), fmt::format("an efficiency is a fraction of the peak, above 0 "
                                               "and at most 1; {} is given",
                                               value));
  return value;
}

}  // namespace

FlopsPerSecond DeviceProfile::matrix_rate(ElementType type) const {
  const auto found = matrix_rates.find(type);
  if (found != matrix_rates.end()) return found->second.peak;
  std::vector<std::string_view> known;
  for (const auto& [other, rate] : matrix_rates) known.push_back(partita::name(other));
  throw InputError("device " + name, fmt::format("no matrix rate for {}; it has {}",
                                                 partita::name(type), fmt::join(known, ", ")));
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
  device.memory_bandwidth = figure(root, "memory_bandwidth").as_byte_rate();
  device.vector_rate = figure(root, "vector_rate").as_flop_rate();
  device.matrix_efficiency = fraction(figure(root, "matrix_efficiency"));
  device.memory_efficiency = fraction(figure(root, "memory_efficiency"));
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
  if (root.has("dispatch")) device.dispatch = figure(root, "dispatch").as_seconds();
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
  if (const auto table = root.find("collectives"))
    device.collectives = read_collectives(*table, figure.file_source(), device.sources);
  const YamlNode rates = root.get("matrix_rates");
  for (const auto& [key, node] : rates.members()) {
    const ElementType type = parse_element_type(key, node.place());
    std::map<std::string, std::string>& sources = device.sources;
    const FlopsPerSecond peak = figure(rates, key).as_flop_rate();
    const auto entry = sources.extract(key);
    device.matrix_rates[type] = {peak, entry.mapped()};
  }
  if (device.matrix_rates.empty())
    throw InputError(rates.place(), "a device needs at least one matrix rate; add e.g. bf16: ...");
  root.reject_unknown_keys();
  return device;
}

std::vector<std::string> device_catalogue() { return data_names(kFolder); }

DeviceProfile load_device(const std::string& name_or_file, const std::vector<YamlEdit>& edits) {
  if (name_or_file.ends_with(".yaml"))
    return parse_device(yaml_with(read_file(name_or_file), edits, name_or_file), name_or_file);
  const std::string folder = data_folder(kFolder);
  const auto known = device_catalogue();
  const auto load = [&](const std::string& name) {
    const std::string file = folder + "/" + name + ".yaml";
    return parse_device(yaml_with(read_file(file), edits, file), file);
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
