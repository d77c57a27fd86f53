#include "validation/evidence.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <map>
#include <optional>
#include <sstream>
#include <tuple>

#include "base/error.h"
#include "simulator/cost/kernels.h"
#include "topologies/device.h"
#include "validation/collectives.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

/// Programs of nccl-tests and what a collective is called here; "": priced from links, no curve of
/// it is used.
constexpr std::array<std::pair<std::string_view, std::string_view>, 7> kPrograms{
    {{"all_reduce_perf", "all_reduce"},
     {"all_gather_perf", "all_gather"},
     {"reduce_scatter_perf", "reduce_scatter"},
     {"alltoall_perf", ""},
     {"broadcast_perf", "broadcast"},
     {"sendrecv_perf", ""},
     {"reduce_perf", "reduce"}}};

/// Behind what launchers put before each line: mpirun --tag-output "[1,0]<stdout>:", srun --label
/// "0: ".
std::string untagged(const std::string& line) {
  const auto digits = [&](std::size_t at) {
    while (at < line.size() && std::isdigit(static_cast<unsigned char>(line[at])) != 0) ++at;
    return at;
  };
  if (line.starts_with('[')) {
    const std::size_t end = line.find(">:");
    if (end != std::string::npos && line.find("]<std") < end) return line.substr(end + 2);
    return line;
  }
  const std::size_t from = line.find_first_not_of(' ');
  if (from == std::string::npos) return line;
  const std::size_t end = digits(from);
  return end > from && line.compare(end, 2, ": ") == 0 ? line.substr(end + 2) : line;
}

std::vector<std::string> words(const std::string& line) {
  std::istringstream in(untagged(line));
  std::vector<std::string> all;
  for (std::string w; in >> w;) all.push_back(w);
  return all;
}

/// The first program that a text names; null: none.
const std::pair<std::string_view, std::string_view>* program_in(const std::string& text) {
  const std::pair<std::string_view, std::string_view>* found = nullptr;
  std::size_t first = std::string::npos;
  for (const auto& entry : kPrograms) {
    const std::string_view program = entry.first;
    // "all_reduce_perf" begins before the "reduce_perf" that it ends with.
    const std::size_t at = text.find(program);
    if (at < first) first = at, found = &entry;
  }
  return found;
}

/// The line with "size", "type" and "time": where the columns stand.
bool names_columns(const std::vector<std::string>& w) {
  const auto has = [&](const char* x) { return std::find(w.begin(), w.end(), x) != w.end(); };
  return !w.empty() && w[0][0] == '#' && has("size") && has("type") && has("time");
}

}  // namespace

bool is_nccl_tests(const std::string& text) {
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) {
    if (names_columns(words(line))) return true;
  }
  return false;
}

NcclTestsLog parse_nccl_tests(const std::string& text, const std::string& file) {
  NcclTestsLog log;
  log.file = file;
  const auto* program = program_in(text);
  if (program == nullptr) program = program_in(file);
  if (program == nullptr)
    throw InputError(file,
                     "neither the log nor its name says which test it is of; put "
                     "all_reduce_perf or its like into the file's name");
  if (program->second.empty())
    throw InputError(file, fmt::format("{}: exchanges are priced from links, no curve of them is "
                                       "used; leave it out",
                                       program->first));
  log.kind = program->second;
  std::map<std::string, int> hosts;  // and how many ranks they have
  std::map<Bytes, std::vector<Seconds>> times_of;
  std::vector<std::size_t> times, wrong;
  std::size_t columns = 0, type = 0;
  std::istringstream in(text);
  int number_of_line = 0;
  for (std::string line; std::getline(in, line);) {
    ++number_of_line;
    const std::string place = fmt::format("{}:{}", file, number_of_line);
    auto w = words(line);
    if (w.empty()) continue;
    if (line.find("Test NCCL failure") != std::string::npos ||
        line.find("Test failure") != std::string::npos ||
        line.find("Test CUDA failure") != std::string::npos)
      throw InputError(place, "the run failed here; give the log of one that came to its end");
    if (w[0] == "#" && w.size() > 2 && w[1] == "Rank") {
      ++log.ranks;
      // "... Pid 4711 on host1 device 0 [0x07] NVIDIA H100"
      const auto on = std::find(w.begin(), w.end(), "on");
      if (on == w.end() || on + 1 == w.end())
        throw InputError(place,
                         "names no host of the rank; keep the lines as nccl-tests prints "
                         "them");
      ++hosts[on[1]];
      const auto bus = std::find_if(on, w.end(), [](const auto& x) { return x.starts_with('['); });
      if (log.device.empty() && bus != w.end())
        log.device = fmt::format("{}", fmt::join(bus + 1, w.end(), " "));
      continue;
    }
    if (names_columns(w)) {
      if (columns > 0)
        throw InputError(place, "a second run begins here; give one file for each run");
      w.erase(w.begin());
      for (std::size_t k = 0; k < w.size(); ++k) {
        if (w[k] == "time") times.push_back(k);
        if (w[k] == "#wrong" || w[k] == "error") wrong.push_back(k);
        if (w[k] == "type") type = k;
      }
      columns = w.size();
      continue;
    }
    log.ended |= line.find("Avg bus bandwidth") != std::string::npos ||
                 line.find("Out of bounds values") != std::string::npos;
    // Ranks' own output, "# Avg bus bandwidth" and the like.
    const auto size = number(w[0]);
    if (!size || columns == 0) continue;
    if (w.size() < columns)
      throw InputError(place, fmt::format("a row of {} columns where the head has {}; is the log "
                                          "cut off?",
                                          w.size(), columns));
    const bool in_place = log.kind == "all_reduce" && times.size() > 1;
    const std::string& cell = w[times[in_place ? 1 : 0]];
    const auto us = number(cell);
    if (!(*size >= 0) || !us || !(*us > 0))
      throw InputError(place, fmt::format("'{}' is no time in us of {} bytes", cell, w[0]));
    for (const std::size_t k : wrong) {
      if (const auto n = number(w[k]); n && *n >= 1)
        throw InputError(place, fmt::format("{} values came out wrong; such a run says nothing of "
                                            "time",
                                            w[k]));
    }
    log.type = w[type];
    if (*size > 0) times_of[Bytes{static_cast<std::int64_t>(*size)}].push_back(Seconds{*us * 1e-6});
  }
  if (columns == 0)
    throw InputError(file,
                     "has no line that names columns size, type and time; give the text that "
                     "nccl-tests prints");
  if (log.ranks == 0)
    throw InputError(file,
                     "lists no ranks ('# Rank 0 ... on HOST device 0'); give the whole "
                     "output of nccl-tests");
  if (log.ranks == 1)
    throw InputError(file, "is of 1 rank, between which nothing passes; give a log of 2 or more");
  if (times_of.empty()) throw InputError(file, "has no rows of sizes and times");
  for (auto& [bytes, all] : times_of) {
    const auto middle = all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2);
    std::nth_element(all.begin(), middle, all.end());
    log.times.emplace_back(bytes, *middle);
  }
  log.nodes = static_cast<int>(hosts.size());
  for (const auto& [host, n] : hosts) {
    if (n > log.ranks_of_fullest) log.fullest = host, log.ranks_of_fullest = n;
  }
  return log;
}

void check_device(const NcclTestsLog& log, const std::string& device, const Catalogue& catalogue) {
  const auto generation = [](const std::string& name) { return name.substr(0, name.find('-')); };
  auto w = words(log.device);
  if (!w.empty() && (w[0] == "NVIDIA" || w[0] == "Tesla")) w.erase(w.begin());
  if (w.empty()) return;
  const DeviceProfile* of_log = nullptr;
  try {
    of_log = &device_of(catalogue, w[0], "", "");
  } catch (const InputError&) {
    return;  // not in the catalogue: nothing to compare with
  }
  if (generation(of_log->name) != generation(device))
    throw InputError(log.file, fmt::format("was measured on {}, but the cluster's devices are {}; "
                                           "name the cluster that was measured with --topology",
                                           log.device, device));
}

void check_hosts(const NcclTestsLog& log, const ClusterShape& cluster) {
  if (log.ranks_of_fullest > cluster.devices_per_node)
    throw InputError(
        log.file,
        fmt::format("has {} ranks on {}, but a node of {} has {} devices; name the "
                    "cluster that was measured with --topology",
                    log.ranks_of_fullest, log.fullest, cluster.name, cluster.devices_per_node));
}

void check_times(const NcclTestsLog& log, const Topology& topology) {
  constexpr double kFaster = 5, kSlower = 50;
  const auto largest =
      std::max_element(log.times.begin(), log.times.end(),
                       [](const auto& a, const auto& b) { return a.first < b.first; });
  if (largest == log.times.end() || largest->first < Bytes{1 << 20} || log.ranks < 2) return;
  const CollectiveCurve curve = curve_on(topology, log.kind, log.ranks, log.nodes, "", "");
  const double model =
      1e-6 * predicted_us(curve, static_cast<double>(largest->first.count), CollectiveConstants{});
  const double ratio = largest->second.count / model;
  if (ratio < 1 / kFaster || ratio > kSlower)
    throw InputError(
        log.file,
        fmt::format("{} of {} B took {:.4g} us where {} ranks of {} need about {:.4g}; is "
                    "it of this cluster, and whole?",
                    log.kind, largest->first.count, 1e6 * largest->second.count, log.ranks,
                    topology.name(), 1e6 * model));
}

std::vector<ProductTable> parse_products(const CsvTable& table) {
  // Letters of any case, units in brackets or behind "_": "M", "dtype", "Time (us)".
  std::vector<std::string> header;
  for (const std::string& name : table.header) {
    std::string plain;
    for (const char c : lower(name)) {
      const bool other = c == ' ' || c == '(' || c == '[' || c == '_';
      if (other && !plain.empty() && plain.back() != '_') plain += '_';
      if (!other && c != ')' && c != ']' && c != '/') plain += c;
    }
    header.push_back(plain == "dtype" || plain == "precision"    ? "type"
                     : plain == "tflops_s" || plain == "tflop_s" ? "tflops"
                                                                 : plain);
  }
  const auto column = [&](const char* name) -> std::optional<std::size_t> {
    const auto at = std::find(header.begin(), header.end(), name);
    if (at == header.end()) return std::nullopt;
    return static_cast<std::size_t>(at - header.begin());
  };
  constexpr std::array<std::pair<const char*, double>, 4> kTimes{
      {{"time_s", 1}, {"time_ms", 1e-3}, {"time_us", 1e-6}, {"tflops", 0}}};
  std::optional<std::size_t> measured;
  double unit = 0;
  for (const auto& [name, factor] : kTimes) {
    if (const auto at = column(name); at && !measured) measured = at, unit = factor;
  }
  for (const char* name : {"m", "n", "k", "type"}) {
    if (!column(name))
      throw InputError(table.file + ":1", fmt::format("has no column {}; a table of products has "
                                                      "m, n, k, type and tflops or time_us",
                                                      name));
  }
  if (!measured)
    throw InputError(table.file + ":1",
                     "has no column of what was measured; add tflops, time_us, time_ms or time_s");
  std::map<std::tuple<ElementType, ElementType, ProductLayout>, ProductTable> tables;
  for (const CsvTable::Record& r : table.records) {
    const std::string place = fmt::format("{}:{}", table.file, r.line);
    const auto positive = [&](std::size_t at) {
      const auto x = number(r.fields[at]);
      if (!x || !(*x > 0) || !std::isfinite(*x))
        throw InputError(
            place, fmt::format("{}: '{}' is no number above 0", table.header[at], r.fields[at]));
      return *x;
    };
    const auto cell = [&](const char* name) {
      const auto at = column(name);
      return at ? r.fields[*at] : std::string();
    };
    ProductTable t;
    // "torch.bfloat16".
    const auto type_of = [&](std::string word) {
      if (word.rfind("torch.", 0) == 0) word.erase(0, 6);
      if (word.rfind("float8_e4m3", 0) == 0 || word == "e4m3") word = "fp8";
      return parse_element_type(word, place);
    };
    t.type = type_of(cell("type"));
    t.out = cell("out").empty() ? t.type : type_of(cell("out"));
    if (const std::string layout = cell("layout"); !layout.empty()) {
      for (const auto x : {ProductLayout::nn, ProductLayout::nt, ProductLayout::tn})
        if (name(x) == layout) t.layout = x;
      if (t.layout == ProductLayout::any)
        throw InputError(place,
                         fmt::format("layout: '{}' is unknown; use NN, NT, TN or nothing", layout));
    }
    ProductTable::Point p;
    p.m = positive(*column("m")), p.n = positive(*column("n")), p.k = positive(*column("k"));
    if (const auto at = column("count"); at && !r.fields[*at].empty()) p.count = positive(*at);
    const double x = positive(*measured);
    const double flops = 2 * p.m * p.n * p.k * p.count;
    p.time = Seconds{unit > 0 ? x * unit : flops / (x * 1e12)};
    if (const auto at = column("tflops"); at && unit > 0 && !r.fields[*at].empty()) {
      const double said = positive(*at), follows = flops / p.time.count / 1e12;
      if (std::abs(follows / said - 1) > 0.1)
        throw InputError(place, fmt::format("{} says {:.4g} TFLOP/s, tflops {:.4g}; leave out the "
                                            "column that is wrong",
                                            table.header[*measured], follows, said));
    }
    t.source = table.file;
    tables.try_emplace({t.type, t.out, t.layout}, t).first->second.points.push_back(p);
  }
  if (tables.empty()) throw InputError(table.file, "has no rows");
  std::vector<ProductTable> all;
  for (auto& [key, t] : tables) all.push_back(std::move(t));
  return all;
}

namespace {

/// Boards of one name differ by some per cent in clock.
constexpr double kAbovePeak = 1.1;
/// No product that takes so long at the peak takes a hundred times as long.
constexpr double kLarge = 1e-4, kBelowPeak = 100;

std::string quoted(const std::string& s) {
  std::string out = "'";
  for (const char c : s) out += c == '\'' ? std::string("''") : std::string(1, c);
  return out + "'";
}

/// `block` behind the line that is `key`, at the start of a line; with the key at the end of the
/// text where it has none.
void insert_under(std::string& text, const std::string& key, const std::string& block) {
  std::size_t at = text.rfind(key, 0) == 0 ? 0 : text.find("\n" + key);
  if (at == std::string::npos) {
    if (!text.empty() && text.back() != '\n') text += '\n';
    text += key + "\n" + block;
    return;
  }
  at = text.find('\n', at + 1);
  if (at == std::string::npos) {
    text += '\n';
    at = text.size() - 1;
  }
  text.insert(at + 1, block);
}

}  // namespace

double clock_of(const std::vector<ProductTable>& tables, const DeviceProfile& device) {
  if (!(device.sustained_clock < 1)) return 1;
  ShapePrices brief(device, Clock::brief), sustained(device, Clock::sustained);
  std::vector<double> off;  // 0 at the brief price, 1 at the other
  bool any = false;
  for (const ProductTable& table : tables) {
    for (const auto& x : table.points) {
      if (x.time.count < 50e-6) continue;
      any = true;
      Product p{x.m,           x.n,       x.k,          x.count,
                table.type,    table.out, table.layout, table.accumulate,
                table.grouped, {},        false};
      p.bytes = p.operand_bytes();
      const double fast = std::log((device.kernel_latency + brief.of(p).work).count),
                   slow = std::log((device.kernel_latency + sustained.of(p).work).count);
      if (slow - fast > 0.05) off.push_back((std::log(x.time.count) - fast) / (slow - fast));
    }
  }
  // Where its own points were down at that clock, prices for the other are the same.
  if (off.empty()) return any ? device.sustained_clock : 1;
  const auto middle = off.begin() + static_cast<std::ptrdiff_t>(off.size() / 2);
  std::nth_element(off.begin(), middle, off.end());
  // Not the nearer of the two: a product a little slower would make the device much faster.
  return std::pow(device.sustained_clock, std::clamp(*middle, 0.0, 1.0));
}

std::string with_products(std::string text, const std::string& file,
                          const std::vector<ProductTable>& products) {
  const DeviceProfile device = parse_device(text, file);
  std::string points;
  for (const ProductTable& t : products) {
    const double peak = device.matrix_rate(t.type).count;
    for (const auto& p : t.points) {
      const double flops = 2 * p.m * p.n * p.k * p.count, rate = flops / p.time.count;
      if (flops > kLarge * peak && kBelowPeak * rate < peak)
        throw InputError(
            t.source,
            fmt::format("{:g} x {:g} x {:g} of {} would run at {:.3g} TFLOP/s where {} "
                        "has {:.0f} at most; is the time in another unit?",
                        p.m, p.n, p.k, name(t.type), rate / 1e12, device.name, peak / 1e12));
      if (rate > kAbovePeak * peak)
        throw InputError(
            t.source,
            fmt::format("{:g} x {:g} x {:g} of {} would run at {:.0f} TFLOP/s where "
                        "{} has {:.0f} at most; is the time in another unit, or the "
                        "table of another device?",
                        p.m, p.n, p.k, name(t.type), rate / 1e12, device.name, peak / 1e12));
    }
    points += fmt::format(
        "  - type: {}\n    out: {}\n    replaces_nearby: true\n{}    source: {}\n    points: |\n"
        "      m n k count time[us]\n",
        name(t.type), name(t.out),
        (t.layout == ProductLayout::any ? "" : fmt::format("    layout: {}\n", name(t.layout))) +
            (t.clock < 1 ? fmt::format("    clock: {:.4g}\n", t.clock) : ""),
        quoted(t.source));
    for (const auto& p : t.points)
      points += fmt::format("      {:.17g} {:.17g} {:.17g} {:.17g} {:.6g}\n", p.m, p.n, p.k,
                            p.count, p.time.count * 1e6);
  }
  if (!points.empty()) insert_under(text, "products:", points);
  parse_device(text, file);  // whatever the file's style is, it is still one
  return text;
}

std::string with_curves(std::string text, const std::string& file, const std::string& device,
                        const std::string& device_file, std::int64_t per_domain,
                        const std::vector<NcclTestsLog>& logs) {
  const std::string key = "device: " + device;
  std::size_t replaced = 0;
  for (std::size_t at = text.find(key); at != std::string::npos;
       at = text.find(key, at + key.size())) {
    const std::size_t end = at + key.size();
    if (end < text.size() && std::string_view("},\n ").find(text[end]) == std::string_view::npos)
      continue;
    text.replace(at, key.size(), "device: '" + device_file + "'");
    ++replaced;
  }
  if (replaced == 0) throw InputError(file, fmt::format("has no device: {}", device));
  std::map<std::string, std::string> curves;  // by kind
  for (const NcclTestsLog& log : logs) {
    std::string& s = curves[log.kind];
    s += fmt::format("    - ranks: {}\n      nodes: {}\n      source: {}\n      times:\n",
                     log.ranks, (log.nodes + per_domain - 1) / per_domain,
                     quoted(fmt::format("nccl-tests, {}, {}", log.type, log.file)));
    for (const auto& [bytes, time] : log.times)
      s += fmt::format("        {} B: {:.6g} us\n", bytes.count, time.count * 1e6);
  }
  for (const auto& [kind, block] : curves) {
    const std::string line = "  " + kind + ":";
    if (text.find("\n" + line) != std::string::npos)
      insert_under(text, line, block);
    else
      insert_under(text, "collectives:", line + "\n" + block);
  }
  return text;
}

}  // namespace partita::validation
