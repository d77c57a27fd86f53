// NCCL's topology files (NCCL_TOPO_DUMP_FILE, NCCL_TOPO_FILE). docs/topologies.md says what is read
// and what is assumed.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <pugixml.hpp>
#include <set>

#include "base/error.h"
#include "topologies/cluster.h"
#include "topologies/importing.h"

namespace partita {

namespace {

bool starts_with(const pugi::xml_node& node, const char* attribute, std::string_view prefix) {
  return std::string_view(node.attribute(attribute).value()).starts_with(prefix);
}

/// GB/s per lane and direction, after coding, by the number that link_speed begins with ("16 GT/s",
/// "16.0 GT/s PCIe"). Nominal: NCCL itself plans with about three quarters of it.
BytesPerSecond lane_rate(std::string_view speed, bool& known) {
  known = true;
  const double rate = std::strtod(std::string(speed).c_str(), nullptr);
  if (rate == 2.5) return BytesPerSecond{0.25e9};
  if (rate == 5) return BytesPerSecond{0.5e9};
  if (rate == 8) return BytesPerSecond{0.985e9};
  if (rate == 16) return BytesPerSecond{1.969e9};
  if (rate == 32) return BytesPerSecond{3.938e9};
  if (rate == 64) return BytesPerSecond{7.563e9};
  known = false;
  return BytesPerSecond{0.985e9};
}

constexpr int kDeepest = 64;

class Reader {
 public:
  Reader(const std::string& text, const std::string& file, const std::string& device)
      : file_(file), device_(device) {
    const auto result = document_.load_buffer(text.data(), text.size());
    if (!result) {
      const auto end =
          text.begin() + std::min(result.offset, static_cast<std::ptrdiff_t>(text.size()));
      throw InputError(fmt::format("{}:{}", file, 1 + std::count(text.begin(), end, '\n')),
                       fmt::format("this is no XML: {}; dump the file again with "
                                   "NCCL_TOPO_DUMP_FILE",
                                   result.description()));
    }
  }

  ClusterSpec read() {
    const auto system = document_.child("system");
    if (!system)
      throw InputError(file_, fmt::format("the root of an NCCL topology is <system>; this file has "
                                          "<{}>",
                                          document_.first_child().name()));
    spec_.name = spec_.place = file_;
    node_.place = file_;
    number_gpus(system);
    for (const auto& cpu : system.children("cpu")) read_cpu(cpu);
    add_nvlinks();
    add_cpu_links();
    note(
        fmt::format("{}: latencies are assumed: NVLink 0.5 us, PCIe 0.25 us, C2C 0.4 us, between "
                    "CPUs 0.2 us; NVLink and PCIe have their nominal rates",
                    file_));
    spec_.sources.emplace_back("nodes[0]", "NCCL topology file " + file_);
    spec_.groups.push_back(std::move(node_));
    return std::move(spec_);
  }

 private:
  struct Gpu {
    pugi::xml_node pci;
    std::string busid;
    int rank = -1;
    std::size_t cpu = 0;  ///< Vertex.
    int sm = 0;
  };

  void note(std::string text) {
    if (std::find(spec_.notes.begin(), spec_.notes.end(), text) == spec_.notes.end())
      spec_.notes.push_back(std::move(text));
  }

  /// An attribute as a number up to `most`; `absent` where there is none.
  double number(const pugi::xml_node& node, const char* attribute, double absent, double most) {
    const double value = node.attribute(attribute).as_double(absent);
    if (!(std::abs(value) <= most))
      throw InputError(
          file_, fmt::format("<{}> has {}=\"{}\"; at most {:g} makes sense", node.name(), attribute,
                             node.attribute(attribute).value(), most));
    return value;
  }

  std::size_t add_vertex(std::string name, VertexKind kind) {
    VertexSpec vertex;
    vertex.name = std::move(name);
    vertex.kind = kind;
    vertex.place = file_;
    node_.vertices.push_back(std::move(vertex));
    return node_.vertices.size() - 1;
  }

  void add_link(std::size_t a, std::size_t b, LinkKind kind, BytesPerSecond rate) {
    node_.edges.push_back({a, b, kind, rate, assumed_latency(kind)});
  }

  void collect_gpus(const pugi::xml_node& parent, int depth = 0) {
    if (depth > kDeepest)
      throw InputError(file_,
                       fmt::format("<pci> nested more than {} deep; no machine is", kDeepest));
    for (const auto& pci : parent.children("pci")) {
      if (starts_with(pci, "class", "0x03")) {
        Gpu gpu;
        gpu.pci = pci;
        gpu.busid = pci.attribute("busid").value();
        gpu.rank = pci.child("gpu").attribute("rank").as_int(-1);
        gpus_.push_back(gpu);
      }
      collect_gpus(pci, depth + 1);
    }
  }

  /// Devices come first among the vertices, in the order of their ranks: NCCL ignores a GPU without
  /// a rank, a file that was written before the run has none, and we take those in file order.
  void number_gpus(const pugi::xml_node& system) {
    for (const auto& cpu : system.children("cpu")) collect_gpus(cpu);
    if (gpus_.empty())
      throw InputError(file_,
                       "no GPU in this file: a <pci> whose class begins with 0x03; dump it "
                       "with NCCL_TOPO_DUMP_FILE on a machine that has GPUs");
    if (std::any_of(gpus_.begin(), gpus_.end(), [](const Gpu& g) { return g.rank < 0; }))
      note(file_ + ": a GPU has no rank; such GPUs come last, in the order of the file");
    std::stable_sort(gpus_.begin(), gpus_.end(), [](const Gpu& a, const Gpu& b) {
      return static_cast<unsigned>(a.rank) < static_cast<unsigned>(b.rank);
    });
    for (std::size_t g = 0; g < gpus_.size(); ++g) {
      Gpu& gpu = gpus_[g];
      if (!gpu_by_busid_.emplace(gpu.busid, g).second)
        throw InputError(
            file_, fmt::format("two GPUs have the bus id '{}'; each needs its own", gpu.busid));
      const std::size_t vertex = add_vertex(fmt::format("gpu{}", g), VertexKind::device);
      node_.vertices[vertex].profile = profile(gpu);
      gpu.sm = gpu.pci.child("gpu").attribute("sm").as_int(
          spec_.profiles[node_.vertices[vertex].profile].compute_capability);
    }
  }

  std::size_t profile(const Gpu& gpu) {
    std::string name = device_;
    if (name.empty()) {
      const std::string id = gpu.pci.attribute("device").value();
      name = device_of_pci_id(id);
      if (name.empty())
        throw InputError(file_, fmt::format("the model of GPU {} isn't known from its PCI device "
                                            "id '{}'; name it: {}?device=h100-sxm",
                                            gpu.busid, id, file_));
      note(fmt::format("{}: PCI device {} is taken as {}", file_, id, name));
    }
    const auto [entry, is_new] = profile_by_name_.emplace(name, spec_.profiles.size());
    if (is_new) spec_.profiles.push_back(load_device(name));
    return entry->second;
  }

  BytesPerSecond pci_rate(const pugi::xml_node& pci) {
    bool known = false;
    const BytesPerSecond lane = lane_rate(pci.attribute("link_speed").value(), known);
    double width = number(pci, "link_width", 0, 1024);
    if (width <= 0) width = 16;
    if (!known)
      note(fmt::format("{}: PCI {} has no known link speed ('{}'): PCIe 3.0 is assumed", file_,
                       pci.attribute("busid").value(), pci.attribute("link_speed").value()));
    return width * lane;
  }

  void read_cpu(const pugi::xml_node& cpu) {
    const std::string name = fmt::format("cpu{}", cpu.attribute("numaid").as_int(0));
    for (const std::size_t other : cpus_)
      if (node_.vertices[other].name == name)
        throw InputError(file_, fmt::format("two <cpu> have numaid {}; a file describes one host: "
                                            "for several alike write {}:2",
                                            cpu.attribute("numaid").value(), file_));
    const std::size_t vertex = add_vertex(name, VertexKind::cpu);
    if (cpus_.empty()) read_vendor(cpu);
    cpus_.push_back(vertex);
    read_pci(cpu, vertex, vertex);
    // NICs without a PCI path: sockets. NCCL gives them an unlimited way to the CPU.
    for (const auto& nic : cpu.children("nic"))
      read_nets(nic, vertex, BytesPerSecond{5000e9}, LinkKind::other);
  }

  void read_vendor(const pugi::xml_node& cpu) {
    const std::string_view arch = cpu.attribute("arch").value();
    const std::string_view vendor = cpu.attribute("vendor").value();
    const int model = cpu.attribute("modelid").as_int(0);
    cpu_rate_ = BytesPerSecond{10e9};
    if (arch == "arm64") {
      node_.cpu_vendor = "arm";
      cpu_rate_ = BytesPerSecond{6e9};
    } else if (arch == "ppc64") {
      cpu_rate_ = BytesPerSecond{32e9};
    } else if (vendor == "AuthenticAMD") {
      node_.cpu_vendor = "amd";
      cpu_rate_ = BytesPerSecond{16e9};
    } else if (vendor == "GenuineIntel") {
      node_.cpu_vendor = "intel";
      cpu_rate_ = BytesPerSecond{model >= 0xCF   ? 40e9
                                 : model >= 0x8F ? 22e9
                                 : model >= 0x55 ? 10e9
                                                 : 6e9};
    }
  }

  void read_pci(const pugi::xml_node& parent, std::size_t above, std::size_t cpu) {
    for (const auto& pci : parent.children("pci")) {
      const std::string busid = pci.attribute("busid").value();
      if (starts_with(pci, "class", "0x03")) {
        Gpu& gpu = gpus_[gpu_by_busid_.at(busid)];
        gpu.cpu = cpu;
        const std::size_t vertex = gpu_by_busid_.at(busid);
        add_link(vertex, above, LinkKind::pcie, pci_rate(pci));
        for (const auto& c2c : pci.child("gpu").children("c2c")) {
          const double rate = number(c2c, "bw", 0, 1e9) * number(c2c, "count", 1, 1000);
          if (rate > 0) add_link(vertex, cpu, LinkKind::c2c, BytesPerSecond{rate * 1e6});
        }
      } else if (starts_with(pci, "class", "0x02")) {
        const auto nic = pci.child("nic");
        if (!nic || !nic.child("net")) {
          note(fmt::format("{}: NIC {} has no <net>, so no known speed: left out", file_, busid));
          continue;
        }
        read_nets(nic, above, pci_rate(pci), LinkKind::pcie);
      } else if (pci.child("pci")) {
        const std::size_t vertex =
            add_vertex(fmt::format("pcie{}", switches_++), VertexKind::pcie_switch);
        add_link(vertex, above, LinkKind::pcie, pci_rate(pci));
        if (pci.child("pcilink"))
          note(fmt::format("{}: <pcilink> of switch {} is left out", file_, busid));
        read_pci(pci, vertex, cpu);
      }
    }
  }

  void read_nets(const pugi::xml_node& nic, std::size_t above, BytesPerSecond rate, LinkKind kind) {
    for (const auto& net : nic.children("net")) {
      if (!net.attribute("dev")) continue;  // As NCCL does.
      const std::size_t vertex = add_vertex(fmt::format("nic{}", nics_++), VertexKind::nic);
      double megabits = number(net, "speed", 0, 1e9);
      if (megabits <= 0) {
        megabits = 10'000;
        note(fmt::format("{}: <net> '{}' has no speed: 10 Gb/s is assumed, as NCCL does", file_,
                         net.attribute("name").value()));
      }
      VertexSpec& spec = node_.vertices[vertex];
      spec.port_bandwidth = BytesPerSecond{megabits * 1e6 / 8};
      spec.port_latency = Seconds{number(net, "latency", 0, 1e6) * 1e-6};
      if (spec.port_latency.count <= 0) {
        spec.port_latency = assumed_latency(LinkKind::network);
        note(file_ + ": a NIC has no latency: 0.6 us is assumed");
      }
      add_link(vertex, above, kind, rate);
    }
  }

  std::size_t nvswitch() {
    if (!nvswitch_) nvswitch_ = add_vertex("nvswitch0", VertexKind::nvswitch);
    return *nvswitch_;
  }

  void add_nvlinks() {
    bool any = false;
    for (std::size_t g = 0; g < gpus_.size(); ++g) {
      int to_switch = 0;
      std::map<std::size_t, int> to_gpu;
      for (const auto& link : gpus_[g].pci.child("gpu").children("nvlink")) {
        any = true;
        const int count = static_cast<int>(number(link, "count", 1, 1000));
        if (count < 1)
          throw InputError(file_, fmt::format("<nvlink> of GPU {} has count '{}'; it must be at "
                                              "least 1",
                                              gpus_[g].busid, link.attribute("count").value()));
        if (starts_with(link, "tclass", "0x068001")) {
          add_link(g, gpus_[g].cpu, LinkKind::nvlink,
                   static_cast<double>(count) * nvlink_rate(gpus_[g].sm));
        } else if (starts_with(link, "tclass", "0x0680")) {
          to_switch += count;
        } else {
          const std::string target = link.attribute("target").value();
          const auto peer = gpu_by_busid_.find(target);
          if (peer == gpu_by_busid_.end())
            throw InputError(file_, fmt::format("<nvlink> of GPU {} leads to '{}', which is no GPU "
                                                "of this file",
                                                gpus_[g].busid, target));
          to_gpu[peer->second] += count;
        }
      }
      if (to_switch > 0)
        add_link(g, nvswitch(), LinkKind::nvlink,
                 static_cast<double>(to_switch) * nvlink_rate(gpus_[g].sm));
      // Each end lists the cable; either alone is enough.
      for (const auto& [peer, count] : to_gpu)
        if (joined_.insert(std::minmax(g, peer)).second)
          add_link(g, peer, LinkKind::nvlink,
                   static_cast<double>(count) * nvlink_rate(gpus_[g].sm));
    }
    if (any || gpus_.size() < 2) return;
    for (std::size_t g = 0; g < gpus_.size(); ++g) {
      const DeviceProfile& device = spec_.profiles[node_.vertices[g].profile];
      const int links = has_nvswitch(device) ? most_nvlinks(gpus_[g].sm) : 0;
      if (links == 0) continue;
      add_link(g, nvswitch(), LinkKind::nvlink,
               static_cast<double>(links) * nvlink_rate(gpus_[g].sm));
      note(
          fmt::format("{}: no <nvlink> in the file: {} NVLinks of each {} to one NVSwitch are "
                      "assumed",
                      file_, links, device.name));
    }
  }

  void add_cpu_links() {
    for (std::size_t i = 0; i < cpus_.size(); ++i)
      for (std::size_t j = i + 1; j < cpus_.size(); ++j)
        add_link(cpus_[i], cpus_[j], LinkKind::cpu_interconnect, cpu_rate_);
    if (cpus_.size() > 1)
      note(fmt::format("{}: between CPUs {:g} GB/s is assumed, NCCL's figure for this make", file_,
                       cpu_rate_.count / 1e9));
  }

  std::string file_, device_;
  pugi::xml_document document_;
  ClusterSpec spec_;
  NodeSpec node_;
  std::vector<Gpu> gpus_;  ///< Vertex g is gpus_[g].
  std::map<std::string, std::size_t> gpu_by_busid_, profile_by_name_;
  std::set<std::pair<std::size_t, std::size_t>> joined_;
  std::vector<std::size_t> cpus_;
  std::optional<std::size_t> nvswitch_;
  BytesPerSecond cpu_rate_;
  int switches_ = 0, nics_ = 0;
};

}  // namespace

ClusterSpec read_nccl_xml(const std::string& text, const std::string& file,
                          const std::string& device) {
  return Reader(text, file, device).read();
}

}  // namespace partita
