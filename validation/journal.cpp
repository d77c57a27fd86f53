#include "validation/journal.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "base/error.h"
#include "base/yaml.h"
#include "validation/outside_record.h"

namespace partita::validation {
namespace {

using Json = nlohmann::json;
constexpr const char* kSchema = "partita.calibration-journal/1";

Json json_of(const Unit& u) {
  Json j{{"round", u.round}, {"ranks", u.ranks}, {"unit", u.name}, {"seconds", u.seconds}};
  for (const auto& [kernel, points] : u.kernels) {
    for (const KernelPoint& p : points)
      j["kernels"][kernel].push_back(
          {p.ranks, p.m, p.n, p.k, p.count, p.bytes, p.time.count, p.spread});
  }
  for (const auto& [kind, points] : u.collectives) {
    for (const CollectivePoint& p : points)
      j["collectives"][kind].push_back({p.ranks, p.bytes.count, p.time.count, p.spread, p.at_work});
  }
  for (const SlowdownPoint& p : u.slowdown)
    j["slowdown"].push_back({name(p.kernel), p.beside, p.ranks, p.multiprocessors, p.bytes.count,
                             p.of_kernel, p.of_transfer, p.spread});
  if (!u.dispatch.empty()) j["dispatch"] = u.dispatch;
  if (!u.in_graph.empty()) j["in_graph"] = u.in_graph;
  if (!u.launch.empty()) j["launch"] = u.launch;
  if (!u.list_row.empty()) j["list_row"] = u.list_row;
  if (!u.overlap.empty()) j["overlap"] = u.overlap;
  if (const Conditions& c = u.conditions; c.known()) {
    j["conditions"] = {{"clock_mhz", c.clock_mhz},
                       {"memory_clock_mhz", c.memory_clock_mhz},
                       {"power_w", c.power_w},
                       {"temperature_c", c.temperature_c},
                       {"throttled", c.throttled}};
  }
  if (u.outside != OutsideMemory{}) j["outside"] = Json::parse(record_of(u.outside));
  if (u.recording) j["recording"] = *u.recording;
  if (!u.no_records.empty()) j["no_records"] = u.no_records;
  if (!u.failed.empty()) j["failed"] = u.failed;
  if (!u.record.empty()) j["record"] = Json::parse(u.record);
  return j;
}

Unit unit_of(const Json& j) {
  Unit u;
  u.round = j.at("round").get<std::int64_t>();
  u.ranks = j.at("ranks").get<int>();
  u.name = j.at("unit").get<std::string>();
  u.seconds = j.at("seconds").get<double>();
  const Json kernels = j.value("kernels", Json::object());
  for (const auto& [kernel, points] : kernels.items()) {
    for (const Json& p : points) {
      KernelPoint k;
      k.ranks = p.at(0).get<int>();
      k.m = p.at(1).get<double>(), k.n = p.at(2).get<double>(), k.k = p.at(3).get<double>();
      k.count = p.at(4).get<double>(), k.bytes = p.at(5).get<double>();
      k.time = Seconds{p.at(6).get<double>()};
      k.spread = p.at(7).get<double>();
      u.kernels[kernel].push_back(k);
    }
  }
  const Json collectives = j.value("collectives", Json::object());
  for (const auto& [kind, points] : collectives.items()) {
    for (const Json& p : points)
      u.collectives[kind].push_back({p.at(0).get<int>(), Bytes{p.at(1).get<std::int64_t>()},
                                     Seconds{p.at(2).get<double>()}, p.at(3).get<double>(),
                                     p.at(4).get<int>()});
  }
  for (const Json& p : j.value("slowdown", Json::array())) {
    SlowdownPoint x;
    for (const auto family : {KernelFamily::product, KernelFamily::attention, KernelFamily::memory})
      if (p.at(0).get<std::string>() == name(family)) x.kernel = family;
    x.beside = p.at(1).get<std::string>();
    x.ranks = p.at(2).get<int>();
    x.multiprocessors = p.at(3).get<int>();
    x.bytes = Bytes{p.at(4).get<std::int64_t>()};
    x.of_kernel = p.at(5).get<double>();
    x.of_transfer = p.at(6).get<double>();
    x.spread = p.at(7).get<double>();
    u.slowdown.push_back(x);
  }
  u.dispatch = j.value("dispatch", std::vector<double>{});
  u.in_graph = j.value("in_graph", std::vector<double>{});
  u.launch = j.value("launch", std::vector<double>{});
  u.list_row = j.value("list_row", std::vector<double>{});
  u.overlap = j.value("overlap", std::vector<double>{});
  if (j.contains("conditions")) {
    const Json& c = j.at("conditions");
    u.conditions = {c.at("clock_mhz").get<double>(), c.at("memory_clock_mhz").get<double>(),
                    c.at("power_w").get<double>(), c.at("temperature_c").get<double>(),
                    c.at("throttled").get<std::string>()};
  }
  if (j.contains("outside")) u.outside = outside_memory_of(j.at("outside").dump());
  if (j.contains("recording")) u.recording = j.at("recording").get<double>();
  u.no_records = j.value("no_records", "");
  u.failed = j.value("failed", "");
  if (j.contains("record")) u.record = j.at("record").dump();
  return u;
}

Json head_of(const JournalHeader& header) {
  return {{"schema", kSchema}, {"host", header.host}, {"settings", header.settings}};
}

}  // namespace

Journal::Journal(const std::string& file, const JournalHeader& header) : file_(file) {
  descriptor_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (descriptor_ < 0)
    throw InputError("--out", fmt::format("cannot write {}: {}; name another folder", file,
                                          std::strerror(errno)));
  const auto refuse = [&](const std::string& why) {
    ::close(descriptor_);
    descriptor_ = -1;
    throw InputError("--out", why);
  };
  // The ranks of one that was killed take some seconds to end.
  int tries = 100;
  while (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && --tries > 0)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  if (tries == 0)
    refuse(
        fmt::format("{} is being written by another calibration; wait for it or name another "
                    "folder",
                    file));
  const std::string text = read_file(file);
  const std::size_t whole = text.rfind('\n');
  // A torn last line is one that was being written when the end came.
  const std::size_t length = whole == std::string::npos ? 0 : whole + 1;
  const Json head = head_of(header);
  if (length == 0) {
    const std::string line = head.dump() + "\n";
    if (::ftruncate(descriptor_, 0) != 0 ||
        ::write(descriptor_, line.data(), line.size()) != static_cast<ssize_t>(line.size()))
      refuse(fmt::format("cannot write {}; check whether the disk is full", file));
    return;
  }
  if (length < text.size() && ::ftruncate(descriptor_, static_cast<off_t>(length)) != 0)
    refuse(fmt::format("cannot write {}; check its permissions", file));
  const std::string remedy = fmt::format("remove {} to begin anew, or name another folder", file);
  std::int64_t line = 0;
  for (std::size_t at = 0; at < length;) {
    const std::size_t end = text.find('\n', at);
    ++line;
    try {
      const Json j = Json::parse(text.begin() + static_cast<std::ptrdiff_t>(at),
                                 text.begin() + static_cast<std::ptrdiff_t>(end));
      if (line > 1) {
        Unit u = unit_of(j);
        known_.insert({u.round, u.ranks, u.name});
        units_.push_back(std::move(u));
      } else if (j.value("schema", "") != kSchema) {
        refuse(fmt::format("{} is no journal of this version; {}", file, remedy));
      } else if (j.value("host", "") != header.host) {
        refuse(fmt::format("{} was measured on {}, this is {}; {}", file, j.value("host", ""),
                           header.host, remedy));
      } else if (j.value("settings", "") != header.settings) {
        refuse(
            fmt::format("{} was measured with {}, now it is {}; use the same settings to go "
                        "on, {}",
                        file, j.value("settings", ""), header.settings, remedy));
      }
    } catch (const Json::exception&) {
      refuse(fmt::format("{}:{} is damaged; {}", file, line, remedy));
    }
    at = end + 1;
  }
}

void Journal::reopen(const std::string& name, const std::string& file, const JournalHeader& header,
                     double seconds) {
  std::error_code error;
  if (!std::filesystem::exists(name, error) || std::filesystem::exists(file, error)) return;
  std::istringstream lines(read_file(name));
  double spent = 0;
  bool first = true;
  for (std::string line; std::getline(lines, line); first = false) {
    const Json j = Json::parse(line, nullptr, false);
    if (j.is_discarded() || (first && j != head_of(header))) return;
    if (!first) spent += j.value("seconds", 0.0);
  }
  if (!first && spent < seconds) std::filesystem::rename(name, file, error);
}

Journal::~Journal() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

bool Journal::has(std::int64_t round, int ranks, const std::string& name) const {
  return known_.count({round, ranks, name}) > 0;
}

const Unit* Journal::find(std::int64_t round, int ranks, const std::string& name) const {
  for (const Unit& u : units_) {
    if (u.round == round && u.ranks == ranks && u.name == name) return &u;
  }
  return nullptr;
}

void Journal::add(Unit unit) {
  if (descriptor_ >= 0) {
    const std::string line = json_of(unit).dump() + "\n";
    for (std::size_t done = 0; done < line.size();) {
      const ssize_t n = ::write(descriptor_, line.data() + done, line.size() - done);
      if (n <= 0)
        throw MachineError(
            fmt::format("--out: cannot write {}: {}; make room and start again: "
                        "what is in it is kept",
                        file_, std::strerror(n == 0 ? ENOSPC : errno)));
      done += static_cast<std::size_t>(n);
    }
  }
  known_.insert({unit.round, unit.ranks, unit.name});
  units_.push_back(std::move(unit));
}

double Journal::seconds() const {
  double sum = 0;
  for (const Unit& u : units_) sum += u.seconds;
  return sum;
}

void Journal::keep_as(const std::string& name) { std::rename(file_.c_str(), name.c_str()); }

}  // namespace partita::validation
