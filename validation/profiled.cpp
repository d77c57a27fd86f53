#include "validation/profiled.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/yaml.h"
#include "models/graph.h"
#include "simulator/engine/breakdown.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

/// Whole nanoseconds of a decimal text of microseconds; empty: beyond 290 years.
std::optional<std::int64_t> nanoseconds(std::string_view us) {
  constexpr std::size_t kDigits = 15;  // of whole microseconds: 31 years
  if (us.find_first_of("eE") != std::string_view::npos) {
    const double ns = std::strtod(std::string(us).c_str(), nullptr) * 1e3;
    if (!(std::abs(ns) < 9e18)) return std::nullopt;
    return std::llround(ns);
  }
  const bool negative = !us.empty() && us[0] == '-';
  if (negative) us.remove_prefix(1);
  const std::size_t point = std::min(us.find('.'), us.size());
  if (point > kDigits + 1) return std::nullopt;
  std::int64_t ns = 0;
  for (std::size_t k = 0; k < point + 3; ++k) {
    const std::size_t at = k < point ? k : k + 1;
    ns = 10 * ns + (at < us.size() ? us[at] - '0' : 0);
  }
  if (point + 4 < us.size() && us[point + 4] >= '5') ++ns;
  return negative ? -ns : ns;
}

constexpr std::string_view kStep = "ProfilerStep#";

/// What the parser reports, kept as far as it is about the GPU or a step: traces are long, most of
/// them are the host's.
class TraceReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  struct Event {
    std::string name, category, phase;
    std::optional<std::string> start, duration;
    std::optional<std::int64_t> process, device, stream, group_size;
    std::string group_ranks;
  };
  struct OfDevice {
    std::int64_t device;
    ProfilerTrace::Event event;
  };

  explicit TraceReader(std::string file) : file_(std::move(file)) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(std::int64_t x) override { return number(std::to_string(x), x); }
  bool number_unsigned(std::uint64_t x) override {
    return number(std::to_string(x), static_cast<std::int64_t>(x));
  }
  bool number_float(double x, const std::string& text) override {
    return number(text, static_cast<std::int64_t>(std::clamp(x, -1e18, 1e18)));
  }
  bool string(std::string& x) override {
    if (depth_ == kEvent && section_ == "deviceProperties" && key_ == "name") gpus.push_back(x);
    if (depth_ == kArguments && arguments_ && key_ == "Process Group Ranks")
      event_.group_ranks = std::move(x);
    if (depth_ != kEvent || !in_events_) return true;
    if (key_ == "name") event_.name = std::move(x);
    if (key_ == "cat") event_.category = std::move(x);
    if (key_ == "ph") event_.phase = std::move(x);
    return true;
  }
  bool binary(nlohmann::json::binary_t&) override { return true; }
  bool start_object(std::size_t) override {
    ++depth_;
    if (depth_ == 1) object_ = true;
    if (depth_ == 2) section_ = key_;
    if (depth_ == kEvent && in_events_) event_ = {};
    if (depth_ == kArguments) arguments_ = key_ == "args";
    return true;
  }
  bool end_object() override {
    if (depth_ == kEvent && in_events_) note();
    --depth_;
    return true;
  }
  bool start_array(std::size_t) override {
    ++depth_;
    if (depth_ == 2 && object_) section_ = key_;
    if (depth_ == 2 && object_ && key_ == "traceEvents") in_events_ = has_events = true;
    return true;
  }
  bool end_array() override {
    if (depth_ == 2) in_events_ = false;
    --depth_;
    return true;
  }
  bool key(std::string& x) override {
    key_ = std::move(x);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception&) override {
    failed_at = position;
    return false;
  }

  std::vector<std::string> names;
  std::vector<std::string> gpus;  ///< by device
  std::vector<ProfilerTrace::Group> groups;
  std::vector<OfDevice> events;
  std::map<std::string, ProfilerTrace::Step> steps;  ///< the host's, by name
  /// By device and name: from the first of its kernels to the last, on whatever stream.
  std::map<std::int64_t, std::map<std::string, ProfilerTrace::Step>> gpu_steps;
  std::optional<std::int64_t> ranks, rank;
  bool has_events = false;
  std::optional<std::size_t> failed_at;

 private:
  // {"traceEvents": [{..., "args": {...}}]}
  static constexpr int kEvent = 3, kArguments = 4;

  bool number(std::string text, std::int64_t whole) {
    if (depth_ == 2 && section_ == "distributedInfo") {
      if (key_ == "world_size") ranks = whole;
      if (key_ == "rank") rank = whole;
    }
    if (!in_events_) return true;
    if (depth_ == kEvent) {
      if (key_ == "ts") event_.start = std::move(text);
      if (key_ == "dur") event_.duration = std::move(text);
      if (key_ == "pid") event_.process = whole;
    } else if (depth_ == kArguments && arguments_) {
      if (key_ == "device") event_.device = whole;
      if (key_ == "stream") event_.stream = whole;
      if (key_ == "Group size") event_.group_size = whole;
    }
    return true;
  }

  void note() {
    ++event_number_;
    if (event_.phase != "X") return;
    // Before PyTorch 1.12: "Kernel", "Memcpy", "Memset".
    const std::string category = lower(event_.category);
    const bool gpu = category == "kernel" || category == "gpu_memcpy" || category == "memcpy" ||
                     category == "gpu_memset" || category == "memset";
    const bool step = event_.name.rfind(kStep, 0) == 0;
    if (!gpu && !step) return;
    const std::string place =
        fmt::format("{}: traceEvents[{}] ({})", file_, event_number_ - 1, event_.name);
    const auto time = [&](const char* key, const std::optional<std::string>& text) {
      const auto ns = text ? nanoseconds(*text) : std::nullopt;
      if (!ns)
        throw InputError(place,
                         fmt::format("{}: {} is no time in us; give what torch.profiler wrote", key,
                                     text ? *text : "nothing"));
      return *ns;
    };
    const std::int64_t start = time("ts", event_.start), ns = time("dur", event_.duration);
    if (ns < 0)
      throw InputError(
          place, fmt::format("dur: {} us is below 0; record the trace again", *event_.duration));
    if (step) {
      // Kineto's marks of a GPU are a device's (its process) and a stream's.
      auto& marks = category == "gpu_user_annotation"
                        ? gpu_steps[event_.device.value_or(event_.process.value_or(0))]
                        : steps;
      auto& mark =
          marks.try_emplace(event_.name, ProfilerTrace::Step{start, start + ns}).first->second;
      mark.start = std::min(mark.start, start), mark.end = std::max(mark.end, start + ns);
      return;
    }
    const auto [it, fresh] =
        name_of_.try_emplace(event_.name, static_cast<std::int32_t>(names.size()));
    if (fresh) names.push_back(event_.name);
    events.push_back({event_.device.value_or(0),
                      {start, start + ns, event_.stream.value_or(0), it->second, group()}});
  }

  /// "[0, 1, ..., 31]" of 32: the numbers it has.
  std::int32_t group() {
    ProfilerTrace::Group g;
    const std::string& s = event_.group_ranks;
    for (std::size_t at = 0; at < s.size();) {
      std::size_t end = at;
      while (end < s.size() && s[end] >= '0' && s[end] <= '9') ++end;
      if (end > at && end - at < 10) g.ranks.push_back(std::stoll(s.substr(at, end - at)));
      at = std::max(at + 1, end);
    }
    if (g.ranks.empty()) return -1;
    std::sort(g.ranks.begin(), g.ranks.end());
    g.size = event_.group_size.value_or(static_cast<std::int64_t>(g.ranks.size()));
    const auto [it, fresh] =
        group_of_.try_emplace(std::move(g), static_cast<std::int32_t>(groups.size()));
    if (fresh) groups.push_back(it->first);
    return it->second;
  }

  std::string file_, key_, section_;
  int depth_ = 0;
  bool object_ = false, in_events_ = false, arguments_ = false;
  std::size_t event_number_ = 0;
  Event event_;
  std::unordered_map<std::string, std::int32_t> name_of_;
  std::map<ProfilerTrace::Group, std::int32_t> group_of_;
};

/// The kinds of operators, and whether they are matrix products.
template <std::size_t... I>
std::map<std::string, bool, std::less<>> operator_kinds(std::index_sequence<I...>) {
  std::map<std::string, bool, std::less<>> kinds;
  const auto add = [&](const Operation& op) { kinds.emplace(kind_name(op), is_product(op)); };
  (add(Operation(std::in_place_index<I>)), ...);
  return kinds;
}
std::map<std::string, bool, std::less<>> operator_kinds() {
  return operator_kinds(std::make_index_sequence<std::variant_size_v<Operation>>{});
}

constexpr const char* kHost = "host";
constexpr const char* kUnknown = "unknown";

/// What gzip has packed, of one member after another.
std::string unpacked(const std::string& packed, const std::string& file) {
  std::string text;
  z_stream z{};
  constexpr int kGzip = 15 + 16;  // the widest window; gzip's header
  if (inflateInit2(&z, kGzip) != Z_OK) throw InternalError("zlib does not start");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> end(&z, inflateEnd);
  std::vector<unsigned char> part(1 << 20);
  std::size_t at = 0;
  int state = Z_OK;
  do {
    if (z.avail_in == 0) {
      const std::size_t n = std::min<std::size_t>(packed.size() - at, 1 << 20);
      if (n == 0)
        throw InputError(file, fmt::format("is cut off after {} bytes; copy it again, or let the "
                                           "profiler finish writing",
                                           packed.size()));
      // zlib does not write there.
      z.next_in =
          const_cast<unsigned char*>(reinterpret_cast<const unsigned char*>(packed.data() + at));
      z.avail_in = static_cast<unsigned>(n);
      at += n;
    }
    z.next_out = part.data();
    z.avail_out = static_cast<unsigned>(part.size());
    state = inflate(&z, Z_NO_FLUSH);
    if (state != Z_OK && state != Z_STREAM_END && state != Z_BUF_ERROR)
      throw InputError(file, fmt::format("is a damaged gzip file ({}); copy it again",
                                         z.msg != nullptr ? z.msg : "no reason given"));
    text.append(reinterpret_cast<const char*>(part.data()), part.size() - z.avail_out);
    const bool more = at < packed.size() || z.avail_in > 0;
    if (state == Z_STREAM_END && more) inflateReset(&z), state = Z_OK;
  } while (state != Z_STREAM_END);
  return text;
}

/// Who gets an instant: the smallest.
std::tuple<int, bool, std::int64_t, std::size_t> rank_of(TermGroup group, bool busiest,
                                                         const ProfilerTrace::Event& e,
                                                         std::size_t index) {
  const int order = group == TermGroup::communication ? 1 : group == TermGroup::host ? 2 : 0;
  return {order, order == 0 && !busiest, e.start, index};
}

}  // namespace

ProfilerTrace parse_profiler_trace(const std::string& text, const std::string& file,
                                   std::optional<std::int64_t> device) {
  if (text.rfind("\x1f\x8b", 0) == 0)
    return parse_profiler_trace(unpacked(text, file), file, device);
  if (text.rfind("PK", 0) == 0)
    throw InputError(file, fmt::format("is compressed; unpack it: unzip {}", file));
  TraceReader reader(file);
  if (!nlohmann::json::sax_parse(text, &reader)) {
    const std::size_t at = reader.failed_at.value_or(0);
    if (text.find_first_not_of(" \t\r\n") == std::string::npos)
      throw InputError(file, "is empty; give what torch.profiler's export_chrome_trace wrote");
    if (at > text.find_last_not_of(" \t\r\n") + 1)
      throw InputError(file, fmt::format("is cut off after {} bytes; copy it again, or let the "
                                         "profiler finish writing",
                                         text.size()));
    throw InputError(file, fmt::format("is no JSON at byte {}; give what torch.profiler's "
                                       "export_chrome_trace wrote",
                                       at));
  }
  if (!reader.has_events)
    throw InputError(file,
                     "has no traceEvents; give what torch.profiler's export_chrome_trace wrote");
  ProfilerTrace trace;
  trace.file = file;
  trace.ranks = reader.ranks;
  trace.rank = reader.rank;
  std::set<std::int64_t> devices;
  for (const auto& e : reader.events) devices.insert(e.device);
  if (devices.empty())
    throw InputError(file,
                     "has no kernels of a GPU; record with activities=[ProfilerActivity.CPU, "
                     "ProfilerActivity.CUDA]");
  if (!device && devices.size() > 1)
    throw InputError(file, fmt::format("has kernels of devices {}; pick one with --device",
                                       fmt::join(devices, ", ")));
  trace.device = device.value_or(*devices.begin());
  if (devices.count(trace.device) == 0)
    throw InputError("--device", fmt::format("{} has no kernels of device {}; it has those of {}",
                                             file, trace.device, fmt::join(devices, ", ")));
  for (const auto& e : reader.events) {
    if (e.device == trace.device) trace.events.push_back(e.event);
  }
  if (static_cast<std::size_t>(trace.device) < reader.gpus.size() && trace.device >= 0)
    trace.gpu = reader.gpus[static_cast<std::size_t>(trace.device)];
  trace.names = std::move(reader.names);
  trace.groups = std::move(reader.groups);
  const auto by_start = [](const std::map<std::string, ProfilerTrace::Step>& marks) {
    std::vector<ProfilerTrace::Step> steps;
    for (const auto& [name, s] : marks) steps.push_back(s);
    std::stable_sort(steps.begin(), steps.end(),
                     [](const auto& a, const auto& b) { return a.start < b.start; });
    return steps;
  };
  const auto& gpu_marks = reader.gpu_steps[trace.device];
  trace.steps_of_gpu = reader.steps.empty() && !gpu_marks.empty();
  for (const auto& [name, ran] : gpu_marks) {
    const auto host = reader.steps.find(name);
    constexpr std::int64_t kLag = 20;  // a twentieth of the step
    if (host != reader.steps.end() &&
        ran.end - host->second.end > (host->second.end - host->second.start) / kLag)
      trace.steps_of_gpu = true;
  }
  trace.steps = by_start(trace.steps_of_gpu ? gpu_marks : reader.steps);
  // Streams end a step at different times: it lasts until the next begins.
  if (trace.steps_of_gpu) {
    for (std::size_t s = 0; s + 1 < trace.steps.size(); ++s)
      trace.steps[s].end = trace.steps[s + 1].start;
  }
  return trace;
}

std::string_view name(TermGroup group) {
  constexpr std::array<std::string_view, kTermGroups> names{
      "products", "other kernels", "optimizer", "exposed communication", "host copies", "idle"};
  return names[static_cast<std::size_t>(group)];
}

std::vector<KernelKind> load_kernel_kinds(const std::string& file) {
  const auto operators = operator_kinds();
  std::vector<KernelKind> all;
  const YamlNode root = YamlNode::load_file(file, "partita.kernel_kinds/1");
  for (const YamlNode& n : root.get("kernels").items()) {
    KernelKind k;
    const auto collective = n.find("collective");
    const YamlNode kind = collective ? *collective : n.get("kind");
    k.kind = kind.as_string();
    const auto refuse = [&](const std::vector<std::string>& there) {
      throw InputError(kind.place(),
                       fmt::format("'{}' is unknown{}; use one of {}", k.kind,
                                   did_you_mean(k.kind, there), fmt::join(there, ", ")));
    };
    if (collective) {
      k.group = TermGroup::communication;
      std::vector<std::string> there{"send_receive", "mixed"};
      for (int c = 0; c < kCollectiveKinds; ++c)
        there.emplace_back(partita::name(static_cast<CollectiveKind>(c)));
      if (std::find(there.begin(), there.end(), k.kind) == there.end()) refuse(there);
    } else if (const auto op = operators.find(k.kind); op != operators.end()) {
      k.group = op->second ? TermGroup::product : TermGroup::kernel;
    } else if (k.kind == "optimizer") {
      k.group = TermGroup::optimizer;
    } else if (k.kind == kHost) {
      k.group = TermGroup::host;
    } else if (k.kind != "other") {
      std::vector<std::string> there{"optimizer", "other", kHost};
      for (const auto& [known, product] : operators) there.push_back(known);
      refuse(there);
    }
    n.get("source").as_string();
    for (const std::string& p : n.get("patterns").as_strings()) k.patterns.push_back(lower(p));
    n.reject_unknown_keys();
    all.push_back(std::move(k));
  }
  root.reject_unknown_keys();
  return all;
}

const KernelKind* kind_of_kernel(const std::vector<KernelKind>& kinds, const std::string& name) {
  const std::string word = lower(name);
  for (const KernelKind& k : kinds) {
    for (const std::string& p : k.patterns) {
      if (matches(p, word)) return &k;
    }
  }
  return nullptr;
}

std::vector<GroupAxes> axes_of(const Program& p, std::int64_t rank,
                               const std::vector<ProfilerTrace::Group>& groups) {
  // What the rank's stage meets about, and whom it sends to: ranks, axis, collective.
  std::set<std::tuple<std::vector<std::int64_t>, std::string, std::string>> met;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(p.stage_of(rank))]) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind != Kind::collective) continue;
      auto ranks = p.group(i, rank);
      std::sort(ranks.begin(), ranks.end());
      // NCCL's all-to-all is made of sends.
      met.emplace(std::move(ranks), axis_name(p, i),
                  i.collective == CollectiveKind::all_to_all
                      ? "send_receive"
                      : std::string(partita::name(i.collective)));
    }
  }
  if (p.pipeline_stages() > 1) {
    std::vector<std::int64_t> ranks;
    for (int s = 0; s < p.pipeline_stages(); ++s) ranks.push_back(p.rank_on_stage(rank, s));
    std::sort(ranks.begin(), ranks.end());
    met.emplace(std::move(ranks), "pp", "send_receive");
  }
  std::vector<GroupAxes> all;
  for (const ProfilerTrace::Group& g : groups) {
    GroupAxes axes;
    for (const auto& [ranks, axis, collective] : met) {
      if (static_cast<std::int64_t>(ranks.size()) != g.size ||
          !std::includes(ranks.begin(), ranks.end(), g.ranks.begin(), g.ranks.end()))
        continue;
      axes.emplace(collective, axis);
      axes.emplace("", axis);
    }
    all.push_back(std::move(axes));
  }
  return all;
}

ProfiledStep profiled_step(const ProfilerTrace& trace, const std::vector<KernelKind>& kinds,
                           const std::vector<GroupAxes>& axes) {
  PARTITA_ASSERT(!trace.events.empty(), "a trace without kernels");
  std::vector<std::pair<TermGroup, std::string>> of_name;
  for (const std::string& n : trace.names) {
    const KernelKind* k = kind_of_kernel(kinds, n);
    of_name.emplace_back(k != nullptr ? k->group : TermGroup::kernel,
                         k != nullptr ? k->kind : kUnknown);
  }
  const auto group_of = [&](const ProfilerTrace::Event& e) {
    return of_name[static_cast<std::size_t>(e.name)].first;
  };
  const auto term_of = [&](const ProfilerTrace::Event& e) {
    auto of = of_name[static_cast<std::size_t>(e.name)];
    if (of.first != TermGroup::communication || e.group < 0 ||
        static_cast<std::size_t>(e.group) >= axes.size())
      return of;
    const GroupAxes& there = axes[static_cast<std::size_t>(e.group)];
    auto axis = there.find(of.second);
    if (axis == there.end()) axis = there.find("");
    if (axis != there.end()) of.second = axis->second;
    return of;
  };

  // The step.
  ProfiledStep step;
  ProfilerTrace::Step window{INT64_MAX, INT64_MIN};
  for (const auto& e : trace.events) {
    window.start = std::min(window.start, e.start);
    window.end = std::max(window.end, e.end);
  }
  // Of the events that begin before an instant, when the last one ends.
  std::vector<std::pair<std::int64_t, std::int64_t>> last;
  for (const auto& e : trace.events) last.emplace_back(e.start, e.end);
  std::sort(last.begin(), last.end());
  for (std::size_t k = 1; k < last.size(); ++k)
    last[k].second = std::max(last[k].second, last[k - 1].second);
  std::vector<ProfilerTrace::Step> steps;
  for (std::size_t s = trace.steps.size() > 1 ? 1 : 0; s < trace.steps.size(); ++s) {
    const auto& x = trace.steps[s];
    const auto later = std::lower_bound(last.begin(), last.end(), std::pair(x.end, INT64_MIN));
    if (later != last.begin() && std::prev(later)->second > x.start) steps.push_back(x);
  }
  if (!steps.empty()) {
    std::stable_sort(steps.begin(), steps.end(), [](const auto& a, const auto& b) {
      return a.end - a.start < b.end - b.start;
    });
    window = steps[(steps.size() - 1) / 2];
    step.steps = static_cast<std::int64_t>(steps.size());
    step.low = steps.front().end - steps.front().start;
    step.high = steps.back().end - steps.back().start;
  }
  step.ns = window.end - window.start;
  if (!trace.steps.empty()) {
    std::int64_t all = 0, later = 0, end = INT64_MIN;
    for (const auto& s : trace.steps) end = std::max(end, s.end);
    for (const auto& e : trace.events) {
      all += e.end - e.start;
      if (e.start >= end) later += e.end - e.start;
    }
    if (all > 0) step.later = static_cast<double>(later) / static_cast<double>(all);
  }

  // What ran in it.
  std::vector<ProfilerTrace::Event> events;
  std::map<std::int64_t, std::int64_t> work;  // of each stream, computing
  std::map<std::pair<TermGroup, std::string>, ProfiledTerm> terms;
  std::map<std::int32_t, UnknownKernel> unknown;
  for (ProfilerTrace::Event e : trace.events) {
    e.start = std::max(e.start, window.start), e.end = std::min(e.end, window.end);
    if (e.start >= e.end) continue;
    events.push_back(e);
    const auto of = term_of(e);
    ProfiledTerm& t = terms.try_emplace(of, ProfiledTerm{of.first, of.second}).first->second;
    t.kernel_ns += e.end - e.start;
    ++t.kernels;
    if (of.first != TermGroup::communication && of.first != TermGroup::host)
      work[e.stream] += e.end - e.start;
    if (of.second != kUnknown) continue;
    UnknownKernel& u = unknown[e.name];
    u.name = trace.names[static_cast<std::size_t>(e.name)];
    u.ns += e.end - e.start;
    ++u.count;
  }
  std::optional<std::int64_t> busiest;
  for (const auto& [stream, ns] : work) {
    if (!busiest || ns > work[*busiest]) busiest = stream;
  }

  // Every instant to one of them.
  std::vector<std::tuple<std::int64_t, bool, std::size_t>> changes;  // time, begins, event
  for (std::size_t k = 0; k < events.size(); ++k) {
    changes.emplace_back(events[k].start, true, k);
    changes.emplace_back(events[k].end, false, k);
  }
  std::sort(changes.begin(), changes.end());
  std::set<std::tuple<int, bool, std::int64_t, std::size_t>> running;
  std::int64_t now = window.start, idle = 0;
  for (const auto& [time, begins, k] : changes) {
    if (running.empty())
      idle += time - now;
    else
      terms.at(term_of(events[std::get<3>(*running.begin())])).ns += time - now;
    now = time;
    const auto rank = rank_of(group_of(events[k]), events[k].stream == busiest, events[k], k);
    if (begins)
      running.insert(rank);
    else
      running.erase(rank);
  }
  idle += window.end - now;

  for (auto& [key, t] : terms) step.terms.push_back(std::move(t));
  if (idle > 0) step.terms.push_back({TermGroup::idle, "", idle});
  std::stable_sort(step.terms.begin(), step.terms.end(), [](const auto& a, const auto& b) {
    return std::tuple(a.group, -a.ns) < std::tuple(b.group, -b.ns);
  });
  for (auto& [key, u] : unknown) step.unknown.push_back(std::move(u));
  std::stable_sort(step.unknown.begin(), step.unknown.end(),
                   [](const auto& a, const auto& b) { return a.ns > b.ns; });
  return step;
}

std::vector<TermRow> compare_terms(const ProfiledStep& measured, const Breakdown& predicted) {
  struct Group {
    std::vector<TermRow> kinds;
    std::int64_t measured = 0, kernels = 0;
    Ticks predicted{0};
  };
  std::array<Group, kTermGroups> groups;
  const auto seconds = [](std::int64_t ns) { return Seconds{static_cast<double>(ns) / 1e9}; };
  const auto row = [&](TermGroup group, const std::string& kind) -> TermRow& {
    auto& kinds = groups[static_cast<std::size_t>(group)].kinds;
    const auto at =
        std::find_if(kinds.begin(), kinds.end(), [&](const TermRow& r) { return r.kind == kind; });
    if (at != kinds.end()) return *at;
    kinds.push_back({group, kind, std::nullopt, std::nullopt, std::nullopt});
    return kinds.back();
  };
  for (const ProfiledTerm& t : measured.terms) {
    Group& g = groups[static_cast<std::size_t>(t.group)];
    g.measured += t.ns;
    g.kernels += t.kernel_ns;
    TermRow& r = row(t.group, t.kind);
    r.measured = seconds(t.ns), r.kernels = seconds(t.kernel_ns);
  }
  const auto predict = [&](TermGroup group, const std::string& kind, Ticks t) {
    if (t.count == 0) return;
    groups[static_cast<std::size_t>(group)].predicted += t;
    row(group, kind).predicted = to_seconds(t);
  };
  const auto operators = operator_kinds();
  for (const auto& [kind, t] : predicted.compute)
    predict(operators.at(kind) ? TermGroup::product : TermGroup::kernel, kind, t);
  predict(TermGroup::kernel, "other", predicted.other);
  predict(TermGroup::optimizer, "optimizer", predicted.optimizer);
  for (const auto& [axis, t] : predicted.exposed) {
    const bool launch = axis == "launch", host = axis == kHost;
    predict(launch ? TermGroup::idle
            : host ? TermGroup::host
                   : TermGroup::communication,
            launch ? "" : axis, t);
  }
  predict(TermGroup::communication, "bubble", predicted.bubble);
  std::vector<TermRow> rows;
  for (int k = 0; k < kTermGroups; ++k) {
    Group& g = groups[static_cast<std::size_t>(k)];
    if (g.kinds.empty()) continue;
    const auto group = static_cast<TermGroup>(k);
    rows.push_back({group, "", seconds(g.measured), to_seconds(g.predicted), seconds(g.kernels)});
    for (TermRow& r : g.kinds) {
      if (!r.kind.empty()) rows.push_back(std::move(r));
    }
  }
  return rows;
}

}  // namespace partita::validation
