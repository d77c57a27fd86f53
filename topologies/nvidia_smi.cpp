// The matrix that `nvidia-smi topo -m` prints. docs/topologies.md says what is read and what is
// assumed: the matrix has distances, not rates, and doesn't name the GPU.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <numeric>
#include <sstream>

#include "base/error.h"
#include "topologies/cluster.h"
#include "topologies/importing.h"

namespace partita {

namespace {

std::string without_escapes(const std::string& text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\x1b' && i + 1 < text.size() && text[i + 1] == '[') {
      i += 2;
      while (i < text.size() && !(text[i] >= '@' && text[i] <= '~')) ++i;
    } else if (text[i] != '\r') {
      out += text[i];
    }
  }
  return out;
}

std::vector<std::string> words(const std::string& line) {
  std::istringstream in(line);
  std::vector<std::string> out;
  for (std::string word; in >> word;) out.push_back(word);
  return out;
}

/// "gpu3" in words' first column: GPU and digits.
bool is_gpu(const std::string& word) {
  return word.size() > 3 && word.starts_with("GPU") &&
         std::all_of(word.begin() + 3, word.end(), [](char c) { return c >= '0' && c <= '9'; });
}

/// How far apart two entries are, nearest first. NVLink is beside these: the matrix shows it
/// instead of the PCIe distance.
enum class Distance { pix, pxb, phb, node, sys };
constexpr std::array<std::string_view, 5> kDistances = {"PIX", "PXB", "PHB", "NODE", "SYS"};

class Reader {
 public:
  Reader(const std::string& text, const std::string& file, const std::string& device)
      : file_(file), device_(device) {
    std::istringstream in(without_escapes(text));
    for (std::string line; std::getline(in, line);) lines_.push_back(line);
  }

  ClusterSpec read() {
    spec_.name = spec_.place = node_.place = file_;
    read_matrix();
    read_device();
    add_pcie();
    add_nvlinks();
    spec_.sources.emplace_back("nodes[0]", "nvidia-smi topo -m, file " + file_);
    spec_.groups.push_back(std::move(node_));
    return std::move(spec_);
  }

 private:
  void read_matrix() {
    std::size_t header = 0;
    while (header < lines_.size()) {
      const auto row = words(lines_[header]);
      if (row.size() > 0 && is_gpu(row[0]) && (row.size() < 2 || row[1] != "X")) break;
      read_comment(lines_[header]);
      ++header;
    }
    if (header == lines_.size())
      throw InputError(file_,
                       "no header row 'GPU0 GPU1 ...' in this file; save the output of "
                       "nvidia-smi topo -m");
    for (const auto& word : words(lines_[header])) {
      if (word == "CPU") break;  // "CPU Affinity": the columns after it are not entries.
      entries_.push_back(word);
    }
    gpus_ = static_cast<std::size_t>(std::count_if(entries_.begin(), entries_.end(), is_gpu));
    for (std::size_t e = 0; e < gpus_; ++e)
      if (!is_gpu(entries_[e]))
        throw InputError(place(header), fmt::format("column {} is '{}'; GPUs must come first",
                                                    e + 1, entries_[e]));
    for (std::size_t e = 0; e < entries_.size(); ++e) read_row(header + 1 + e, e);
    for (std::size_t a = 0; a < entries_.size(); ++a)
      for (std::size_t b = 0; b < a; ++b)
        if (cells_[a][b] != cells_[b][a])
          throw InputError(
              place(header + 1 + a),
              fmt::format("{} to {} is {}, but {} to {} is {}; save the matrix again", entries_[a],
                          entries_[b], cells_[a][b], entries_[b], entries_[a], cells_[b][a]));
  }

  void read_row(std::size_t line, std::size_t entry) {
    const auto row = line < lines_.size() ? words(lines_[line]) : std::vector<std::string>{};
    if (row.size() <= entries_.size() || row[0] != entries_[entry])
      throw InputError(place(line),
                       fmt::format("the row of {} with {} cells is expected here; save "
                                   "the whole matrix",
                                   entries_[entry], entries_.size()));
    cells_.emplace_back(row.begin() + 1,
                        row.begin() + 1 + static_cast<std::ptrdiff_t>(entries_.size()));
    for (std::size_t e = 0; e < entries_.size(); ++e) {
      const std::string& cell = cells_.back()[e];
      const bool good = e == entry
                            ? cell == "X"
                            : nvlinks(cell) > 0 || std::find(kDistances.begin(), kDistances.end(),
                                                             cell) != kDistances.end();
      if (!good)
        throw InputError(place(line), fmt::format("cell {} to {} is '{}'; it must be X on the "
                                                  "diagonal, else NV#, PIX, PXB, PHB, NODE or SYS",
                                                  entries_[entry], entries_[e], cell));
    }
    // "0-51,104-155  0  N/A": CPU affinity, then NUMA affinity.
    numa_.push_back(row.size() > entries_.size() + 2 ? row[entries_.size() + 2] : "");
  }

  /// 18 of "NV18"; 0 if it is no such cell.
  static int nvlinks(const std::string& cell) {
    int count = 0;
    if (!cell.starts_with("NV")) return 0;
    const auto [end, error] = std::from_chars(cell.data() + 2, cell.data() + cell.size(), count);
    const bool whole = error == std::errc{} && end == cell.data() + cell.size();
    return whole && count >= 1 && count <= 1000 ? count : 0;
  }

  void read_comment(const std::string& line) {
    const auto row = words(line);
    if (row.size() == 3 && row[0] == "#" && row[1] == "device:" && device_.empty())
      device_ = row[2];
  }

  void read_device() {
    if (device_.empty())
      throw InputError(file_, fmt::format("nvidia-smi topo -m doesn't name the GPU; write "
                                          "{}?device=h100-sxm, or '# device: h100-sxm' as the "
                                          "first line of the file",
                                          file_));
    spec_.profiles.push_back(load_device(device_));
    capability_ = spec_.profiles[0].compute_capability;
  }

  Distance distance(std::size_t a, std::size_t b) const {
    for (std::size_t d = 0; d < kDistances.size(); ++d)
      if (cells_[a][b] == kDistances[d]) return static_cast<Distance>(d);
    // NVLink hides the PCIe distance. Equal NUMA affinity says at least "one socket".
    return !numa_[a].empty() && numa_[a] == numa_[b] && numa_[a] != "N/A" ? Distance::node
                                                                          : Distance::sys;
  }

  /// Entries at most `limit` apart are in one class: its lowest entry.
  std::vector<std::size_t> classes(Distance limit) const {
    std::vector<std::size_t> group(entries_.size());
    std::iota(group.begin(), group.end(), std::size_t{0});
    for (std::size_t a = 0; a < entries_.size(); ++a)
      for (std::size_t b = 0; b < a; ++b)
        if (distance(a, b) <= limit && group[a] != group[b]) {
          const auto [low, high] = std::minmax({group[a], group[b]});
          std::replace(group.begin(), group.end(), high, low);
        }
    return group;
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

  /// A tree: entries, then a switch wherever two or more meet at PIX, PXB or PHB, then one CPU per
  /// class of NODE; the CPUs are all joined.
  void add_pcie() {
    std::vector<std::size_t> top(entries_.size());
    std::size_t nics = 0;
    for (std::size_t e = 0; e < entries_.size(); ++e) {
      if (e < gpus_) {
        top[e] = add_vertex(fmt::format("gpu{}", e), VertexKind::device);
        continue;
      }
      top[e] = add_vertex(fmt::format("nic{}", nics++), VertexKind::nic);
      node_.vertices[top[e]].port_bandwidth = usual_nic_rate(capability_);
      node_.vertices[top[e]].port_latency = assumed_latency(LinkKind::network);
    }
    std::size_t switches = 0, cpus = 0;
    std::vector<std::size_t> cpu_vertices;
    for (const Distance level : {Distance::pix, Distance::pxb, Distance::phb, Distance::node}) {
      const auto group = classes(level);
      const auto below = top;
      for (std::size_t e = 0; e < entries_.size(); ++e) {
        if (group[e] != e) continue;
        std::vector<std::size_t> parts;
        for (std::size_t other = 0; other < entries_.size(); ++other)
          if (group[other] == e &&
              std::find(parts.begin(), parts.end(), below[other]) == parts.end())
            parts.push_back(below[other]);
        if (level != Distance::node && parts.size() < 2) continue;
        const std::size_t hub =
            level == Distance::node
                ? add_vertex(fmt::format("cpu{}", cpus++), VertexKind::cpu)
                : add_vertex(fmt::format("pcie{}", switches++), VertexKind::pcie_switch);
        if (level == Distance::node) cpu_vertices.push_back(hub);
        for (const std::size_t part : parts)
          add_link(part, hub, LinkKind::pcie, pcie_rate(capability_));
        for (std::size_t other = 0; other < entries_.size(); ++other)
          if (group[other] == e) top[other] = hub;
      }
    }
    for (std::size_t i = 0; i < cpu_vertices.size(); ++i)
      for (std::size_t j = i + 1; j < cpu_vertices.size(); ++j)
        add_link(cpu_vertices[i], cpu_vertices[j], LinkKind::cpu_interconnect,
                 BytesPerSecond{32e9});
    spec_.notes.push_back(fmt::format(
        "{}: the matrix has no rates: PCIe {:g} GB/s{}{} and all latencies are assumed", file_,
        pcie_rate(capability_).count / 1e9, cpu_vertices.size() > 1 ? ", 32 GB/s between CPUs" : "",
        nics > 0 ? fmt::format(", {:g} Gb/s per NIC", usual_nic_rate(capability_).count * 8e-9)
                 : ""));
  }

  void add_nvlinks() {
    bool any = false, switched = false;
    for (std::size_t a = 0; a < gpus_; ++a) {
      int sum = 0;
      for (std::size_t b = 0; b < gpus_; ++b) sum += a == b ? 0 : nvlinks(cells_[a][b]);
      any = any || sum > 0;
      // More cables than the GPU has: they all lead to a switch.
      switched = switched || sum > most_nvlinks(capability_);
    }
    if (!any) return;
    const BytesPerSecond one = nvlink_rate(capability_);
    if (switched) {
      const std::size_t hub = add_vertex("nvswitch0", VertexKind::nvswitch);
      for (std::size_t a = 0; a < gpus_; ++a) {
        int most = 0;
        for (std::size_t b = 0; b < gpus_; ++b) most = std::max(most, nvlinks(cells_[a][b]));
        if (most > 0) add_link(a, hub, LinkKind::nvlink, static_cast<double>(most) * one);
      }
    } else {
      for (std::size_t a = 0; a < gpus_; ++a)
        for (std::size_t b = a + 1; b < gpus_; ++b)
          if (const int count = nvlinks(cells_[a][b]))
            add_link(a, b, LinkKind::nvlink, static_cast<double>(count) * one);
    }
    spec_.notes.push_back(fmt::format(
        "{}: NVLinks are taken as {}, {:g} GB/s each", file_,
        switched ? "cables to one NVSwitch" : "cables between the GPUs", one.count / 1e9));
  }

  std::string place(std::size_t line) const { return fmt::format("{}:{}", file_, line + 1); }

  std::string file_, device_;
  std::vector<std::string> lines_, entries_, numa_;
  std::vector<std::vector<std::string>> cells_;
  std::size_t gpus_ = 0;
  int capability_ = 0;
  ClusterSpec spec_;
  NodeSpec node_;
};

}  // namespace

ClusterSpec read_nvidia_smi(const std::string& text, const std::string& file,
                            const std::string& device) {
  return Reader(text, file, device).read();
}

}  // namespace partita
