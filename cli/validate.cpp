// `partita calibrate` and `partita validate`: this machine measured, and predictions beside it.
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <thread>
#include <tuple>

#include "base/error.h"
#include "base/hash.h"
#include "base/temporary.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "cli/backend.h"
#include "cli/checkpoint.h"
#include "cli/commands.h"
#include "cli/crew.h"
#include "cli/incomplete.h"
#include "cli/launch.h"
#include "cli/options.h"
#include "cli/records.h"
#include "cli/rows.h"
#include "cli/suite_report.h"
#include "report/report.h"
#include "runtime/execute/threads.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"
#include "runtime/transport/environment.h"
#include "simulator/lower/lower.h"
#include "simulator/lower/startup.h"
#include "simulator/program/routing.h"
#include "validation/calibrate.h"
#include "validation/compare.h"
#include "validation/evidence.h"
#include "validation/journal.h"
#include "validation/nccl_estimates.h"
#include "validation/row_case.h"
#include "validation/sampling.h"
#include "validation/slowdown.h"
#ifdef PARTITA_MPI
#  include "runtime/transport/mpi.h"
#endif

namespace partita::cli {
namespace {

using validation::CalibrationRun;
using validation::Profile;
using validation::SuiteCase;
constexpr std::uint64_t kSeed = 1;
/// Ranks that have just started run as the system likes for some milliseconds, many small steps.
constexpr int kWarmUp = 20;

struct Options {
  std::string backend, out, only, calibrate_only, transport, budget, routing, base, clock;
  std::string kernel_times = "records";
  std::vector<std::string> from;
  std::optional<std::string> ranks_text;
  std::vector<int> ranks{1, 2, 4};
  std::optional<std::int64_t> rounds, steps_given;
  std::int64_t steps = 15;
  double timeout_s = 30, budget_s = 0;
  bool json = false, no_reference = false, share_gpu = false;
  bool launched = false;  ///< this process is a rank that a launcher has started
  int most_ranks() const { return *std::max_element(ranks.begin(), ranks.end()); }
  bool gpu() const { return backend == "cuda"; }
  bool by_events() const { return kernel_times == "events"; }
  std::int64_t round_count() const { return rounds.value_or(gpu() ? 1 : budget_s > 0 ? 1000 : 3); }
  /// Of the suite's cases: a GPU's have clocks that stray, which other rounds tell.
  std::int64_t suite_rounds() const { return rounds.value_or(3); }
};

#ifdef PARTITA_MPI
constexpr bool kMpi = true;
#else
constexpr bool kMpi = false;
#endif

void check(Options& o) {
  if (o.backend.empty()) throw InputError("--backend", "is missing; there are cpu and cuda");
  check_backend({o.backend, o.share_gpu});
  if (o.kernel_times != "records" && o.kernel_times != "events")
    throw InputError("--kernel-times",
                     fmt::format("'{}' is unknown; use records, which are the GPU's own, or events",
                                 o.kernel_times));
  if (o.by_events() && !o.gpu())
    throw InputError("--kernel-times", "is for --backend cuda; leave it out");
  if (o.steps_given) o.steps = *o.steps_given;
  if (o.gpu()) {
    o.ranks = {1};
    if (!o.steps_given) o.steps = 5;
  }
  if (o.round_count() < 1 || o.round_count() > 1000)
    throw InputError("--rounds", fmt::format("{} is not in 1 to 1,000", o.round_count()));
  if (o.steps < 1 || o.steps > 100000)
    throw InputError("--steps", fmt::format("{} is not in 1 to 100,000", o.steps));
  if (o.ranks_text) {
    o.ranks.clear();
    for (const std::string& one : CLI::detail::split(*o.ranks_text + " ", ',')) {
      const std::string text = CLI::detail::trim_copy(one);
      int ranks = 0;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), ranks);
      if (error != std::errc() || end != text.data() + text.size() || ranks < 1 || ranks > 64)
        throw InputError("--ranks", fmt::format("'{}' is not in 1 to 64; write 1,2,4", text));
      o.ranks.push_back(ranks);
    }
  }
  std::sort(o.ranks.begin(), o.ranks.end());
  o.ranks.erase(std::unique(o.ranks.begin(), o.ranks.end()), o.ranks.end());
  if (!(o.timeout_s >= 0.1 && o.timeout_s <= 1e6))
    throw InputError("--timeout",
                     fmt::format("{} is not a number of seconds in 0.1 to 1e6", o.timeout_s));
  if (!o.budget.empty()) {
    char* end = nullptr;
    const double n = std::strtod(o.budget.c_str(), &end);
    const std::string unit = end;
    const double one = unit == "s" ? 1 : unit == "m" || unit == "min" ? 60 : unit == "h" ? 3600 : 0;
    if (one == 0 || !(n > 0 && n * one <= 1e6))
      throw InputError("--budget", fmt::format("'{}' is no time; write 90s, 5m or 1h", o.budget));
    o.budget_s = n * one;
  }
  if (!o.transport.empty() && o.transport != "threads" && o.transport != "mpi" &&
      o.transport != "tcp")
    throw InputError("--transport",
                     fmt::format("'{}' is unknown; use threads, mpi or tcp", o.transport));
  if (o.transport == "mpi" && !kMpi)
    throw InputError("--transport",
                     "this build has no MPI; install libopenmpi-dev and build again, "
                     "or use tcp or threads");
  const Launcher l = o.transport == "threads"
                         ? Launcher{}
                         : launcher_of([](const char* name) { return std::getenv(name); }, kMpi);
  o.launched = l.kind != Launcher::Kind::nobody;
  // Ranks that another launcher started may be on several machines, or see one GPU each.
  check_backend({o.backend, o.share_gpu, false, o.launched ? 1 : o.most_ranks()});
  if (o.transport == "threads") return;
  const std::string its = l.kind == Launcher::Kind::tcp ? "tcp" : "mpi";
  if (o.launched && !o.transport.empty() && o.transport != its)
    throw InputError("--transport",
                     fmt::format("is {}, but by {} another launcher started this process; use {} "
                                 "or threads, or unset {}",
                                 o.transport, l.what, its, its == "tcp" ? "them" : "it"));
  if (its == "tcp" && l.size < o.most_ranks())
    throw InputError("--ranks",
                     fmt::format("has {}, but by {} {} were started; start as many, or leave the "
                                 "larger numbers out",
                                 o.most_ranks(), l.what, l.size));
  if (o.transport.empty()) o.transport = o.launched ? its : "threads";
}

/// Does this process start the ranks, and is none itself?
bool launches(const Options& o) { return o.transport != "threads" && !o.launched; }

Program program_of(const Graph& graph, const Plan& plan, const std::string& name) {
  auto complete_plan = complete(graph, plan);
  if (!complete_plan) throw InternalError(name + ": " + complete_plan.reason());
  auto program = lower(graph, as_executed(*complete_plan));
  if (!program) throw InternalError(name + ": " + program.reason());
  return std::move(*program);
}

/// On the backend's devices.
void put_on_backend(execute::Options& e, const Options& o, const Program& program,
                    ElementType compute) {
  e.device = devices_of({o.backend, o.share_gpu, o.transport == "threads",
                         static_cast<int>(program.ranks()), o.timeout_s, compute});
}

int warm_up(const Options& o) { return o.gpu() ? 2 : kWarmUp; }

execute::Options timed(const Graph& graph, const Program& program, const Options& o,
                       ElementType compute = ElementType::fp32, bool routing = false) {
  execute::Options e = generated(graph, kSeed);
  put_on_backend(e, o, program, compute);
  // A GPU's networks are too large to be drawn one number at a time.
  e.drawn = o.gpu();
  e.warm_up = warm_up(o);
  e.steps = static_cast<int>(o.steps);
  e.record = true;
  e.collect = false;
  e.routing = routing;
  // A GPU's marks between instructions take time of their own: a step's is taken without.
  if (o.gpu()) {
    e.plain_steps = static_cast<int>(std::min<std::int64_t>(o.steps, 3));
    e.warm_up_s = 0.3;
  }
  return e;
}
/// One rank's kernels by the GPU's own records, where it keeps some.
execute::Options by_records(execute::Options e) {
  e.recorded_steps = e.plain_steps;
  return e;
}

/// Says on stderr what is being done and how long the rest will take.
class Progress {
 public:
  /// `budget_s` > 0: the end is then, whatever is done.
  Progress(std::size_t total, double budget_s)
      : total_(total), budget_s_(budget_s), start_(std::chrono::steady_clock::now()) {}
  void next(const std::string& what) {
    const double spent =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    if (done_ > 0 && spent - said_ > 5) {
      said_ = spent;
      const double rest =
          spent / static_cast<double>(done_) * static_cast<double>(std::max(total_, done_) - done_);
      fmt::print(stderr, "progress: {}, about {:.0f} s left: {}\n",
                 budget_s_ > 0 ? fmt::format("{} measured", done_)
                               : fmt::format("{} of {}", done_, total_),
                 budget_s_ > 0 ? std::max(0.0, budget_s_ - spent) : rest, what);
    }
    ++done_;
  }

 private:
  std::size_t total_, done_ = 0;
  double budget_s_, said_ = 0;
  std::chrono::steady_clock::time_point start_;
};

std::string host() {
  utsname name{};
  ::uname(&name);
  return fmt::format("{}, {}, Linux {}", name.nodename, this_machine(), name.release);
}

/// A hash of this very program: what another build measured is not joined.
std::string build() {
  std::ifstream self("/proc/self/exe", std::ios::binary);
  std::uint64_t hash = 0;
  std::vector<std::uint64_t> words(1 << 15);
  while (self) {
    self.read(reinterpret_cast<char*>(words.data()),
              static_cast<std::streamsize>(words.size() * sizeof words[0]));
    for (std::size_t k = 0; k < static_cast<std::size_t>(self.gcount()) / sizeof words[0]; ++k)
      hash = mix(hash, words[k]);
  }
  return fmt::format("{:08x}", hash >> 32);
}

int host_cores() { return static_cast<int>(std::thread::hardware_concurrency()); }

std::string transport_name(const Options& o) {
#ifdef PARTITA_MPI
  if (o.transport == "mpi") return "processes under " + mpi_version();
#endif
  return o.transport == "threads" ? "threads" : "processes over sockets";
}

/// The host, and the GPU with its libraries' versions.
std::string machine(const Options& o) {
  return o.gpu() ? host() + ", " + backend_version() : host();
}

std::string provenance(const Options& o, std::size_t rounds) {
  return fmt::format(
      "measured by partita calibrate 0.1.0, {:%Y-%m-%d}, {}, ranks as {}, {} rounds of {} steps, "
      "medians",
      fmt::localtime(std::time(nullptr)), machine(o), transport_name(o), rounds, o.steps);
}

/// Runs this command again as its ranks. Returns why they failed, if they did; `at`: at which task.
std::string launch(const Options& o, const std::vector<Task>& tasks, int& code,
                   std::int64_t* at = nullptr) {
  const auto board = Board::create(o.most_ranks(), 0, 0);
  const Describe describe = [&](int rank, std::int64_t, std::int64_t) {
    return place_of_task(board->rank(rank), rank, tasks);
  };
  Patience patience;
  // The ranks prepare the same programs, all at once.
  patience.start_s = 60;
  patience.stopped_s = std::min(patience.stopped_s, o.timeout_s + 4);
  const Launched l = o.transport == "mpi" ? launch_mpi(*board, describe, patience)
                                          : launch_tcp(*board, describe, patience);
  code = l.code;
  if (code == 2) throw InputError("", l.reason);
  if (at != nullptr) *at = board->rank(0).task;
  return code == 0 ? "" : l.reason;
}

CrewOptions crew_options(const Options& o, const std::string& command, std::size_t tasks) {
  return {o.transport, o.most_ranks(), o.timeout_s,
          fmt::format(
              "{}; ranks {}; rounds {}; steps {}; only '{}' and '{}'; routing '{}'; reference {}; "
              "{} programs;",
              command, fmt::join(o.ranks, ","), o.round_count(), o.steps, o.only, o.calibrate_only,
              o.routing, !o.no_reference, tasks)};
}

/// One thing that is measured in every round: its programs, and what their measurements say.
struct Measured {
  int ranks = 1;
  std::string name;
  std::vector<std::size_t> tasks;
  std::vector<KernelShape> shapes;  ///< of a GPU's run: whose times it is measured for
  bool more = false;                ///< for what is left of --budget
  std::function<void(const std::vector<std::vector<RankMeasurement>>&, validation::Unit&)> harvest;
};

/// Everything calibration measures, and the programs for it: at addresses that stay.
struct Calibration {
  std::deque<CalibrationRun> runs;
  std::deque<Checkpoint> files;
  std::deque<Program> programs;
  std::vector<Task> tasks;
  std::vector<Measured> all;
};

const Graph& no_graph() {
  static const Graph nothing;
  return nothing;
}

/// What has this text in its name.
void keep_only(Calibration& c, const std::string& text, const std::string& flag) {
  c.all.erase(
      std::remove_if(c.all.begin(), c.all.end(),
                     [&](const Measured& x) { return x.name.find(text) == std::string::npos; }),
      c.all.end());
  if (c.all.empty())
    throw InputError(flag, fmt::format("nothing that is measured has '{}' in its name", text));
}

/// Kernels and transfers at once. Not where transfers pass through the host or ranks take turns on
/// a GPU: nothing is at once there.
template <class AddTask>
void plan_slowdowns(const Options& o, int ranks, const AddTask& task, Calibration& c) {
  if (o.gpu() && ranks > 1 && (o.share_gpu || o.transport == "threads")) return;
  constexpr auto kFamilies =
      std::array{KernelFamily::product, KernelFamily::attention, KernelFamily::memory};
  const bool gpu = o.gpu();
  for (const validation::TransferBeside& t : validation::transfers_to_measure(ranks, gpu)) {
    std::vector<std::size_t> tasks;
    const auto add = [&](KernelFamily family, validation::AtOnce part) {
      tasks.push_back(task(no_graph(), validation::at_once_program(family, t, part, gpu)));
      c.tasks[tasks.back()].options.drawn = true;
    };
    add(kFamilies[0], validation::AtOnce::transfer);
    for (const KernelFamily family : kFamilies) {
      add(family, validation::AtOnce::kernels);
      add(family, validation::AtOnce::both);
    }
    c.all.push_back(
        {ranks, "kernels beside " + t.name(), tasks, {}, false, [=](const auto& m, auto& u) {
           for (std::size_t f = 0; f < kFamilies.size(); ++f)
             validation::harvest_slowdown(kFamilies[f], t, m[2 + 2 * f], m[1 + 2 * f], m[0], !gpu,
                                          u.slowdown);
         }});
  }
}

void put(std::optional<Seconds> from, std::vector<double>& to) {
  if (from) to.push_back(from->count);
}

/// Whatever has `only` in its name.
void plan_calibration(const Options& o, const std::string& only, const std::string& flag,
                      Calibration& c) {
  const auto task = [&](const Graph& graph, Program program) {
    c.programs.push_back(std::move(program));
    c.tasks.push_back({&graph, &c.programs.back(), timed(graph, c.programs.back(), o), ""});
    return c.tasks.size() - 1;
  };
  for (const int ranks : o.ranks) {
    if (o.gpu() && ranks == 1) {
      // First: what has recorded kernels once may call more slowly from then on.
      for (auto& run : {validation::dispatch_run(), validation::graph_run()}) {
        c.runs.push_back(run);
        const CalibrationRun& r = c.runs.back();
        const std::size_t at = task(r.graph, program_of(r.graph, r.plan, r.name));
        execute::Options& e = c.tasks[at].options;
        put_on_backend(e, o, *c.tasks[at].program, r.plan.precision.compute);
        if (!o.by_events()) e = by_records(e);
        const bool graph = r.name == validation::graph_run().name;
        if (graph) e.captured_steps = e.plain_steps;
        c.all.push_back(
            {ranks, r.name, {at}, {}, false, [graph](const auto& m, validation::Unit& u) {
               if (graph) {
                 put(validation::dispatch_in_graph_of(m[0]), u.in_graph);
               } else {
                 put(validation::dispatch_of(m[0]), u.dispatch);
                 put(validation::launch_of(m[0]), u.launch);
               }
             }});
      }
      const bool eights = backend_gpu().compute_capability >= 89;
      auto runs = validation::gpu_calibration_runs(eights);
      const std::size_t always = runs.size();
      constexpr std::size_t kMore = 160;
      if (o.budget_s > 0) {
        for (auto& run : validation::more_gpu_calibration_runs(kMore))
          runs.push_back(std::move(run));
      }
      for (std::size_t number = 0; number < runs.size(); ++number) {
        c.runs.push_back(std::move(runs[number]));
        const CalibrationRun& r = c.runs.back();
        const std::size_t at = task(r.graph, program_of(r.graph, r.plan, r.name));
        const Program* p = c.tasks[at].program;
        put_on_backend(c.tasks[at].options, o, *p, r.plan.precision.compute);
        if (!o.by_events()) c.tasks[at].options = by_records(c.tasks[at].options);
        Measured m{ranks, r.name, {at}, validation::shapes_of(*p), number >= always, {}};
        m.harvest = [p](const auto& measured, validation::Unit& u) {
          validation::harvest(*p, measured[0], u.kernels);
          put(validation::launch_of(measured[0]), u.launch);
          put(validation::list_row_of(*p, measured[0]), u.list_row);
        };
        c.all.push_back(std::move(m));
      }
    }
    for (auto& run :
         o.gpu() ? std::vector<CalibrationRun>{} : validation::calibration_runs(ranks)) {
      c.runs.push_back(std::move(run));
      const CalibrationRun& r = c.runs.back();
      if (r.startup) {
        const auto wanted = [&](Startup form) {
          return fmt::format("{} {}", r.name, name(form)).find(only) != std::string::npos;
        };
        if (!wanted(Startup::each) && !wanted(Startup::sharded_read)) continue;  // nor its file
        c.files.emplace_back(r.graph, kSeed);
        const Checkpoint* file = &c.files.back();
        for (const Startup form : {Startup::each, Startup::sharded_read}) {
          const std::size_t at =
              task(r.graph, startup_program(program_of(r.graph, r.plan, r.name), form));
          c.tasks[at].options.read = [file](std::size_t, std::size_t q, std::int64_t first,
                                            std::int64_t count,
                                            float* to) { file->read(q, first, count, to); };
          const Program* p = c.tasks[at].program;
          c.all.push_back({ranks,
                           fmt::format("{} {}", r.name, name(form)),
                           {at},
                           {},
                           false,
                           [p](const auto& m, validation::Unit& u) {
                             validation::harvest(*p, m[0], u.kernels);
                           }});
        }
        continue;
      }
      const std::size_t at = task(r.graph, program_of(r.graph, r.plan, r.name));
      const Program* p = c.tasks[at].program;
      c.all.push_back({ranks, r.name, {at}, {}, false, [p](const auto& m, validation::Unit& u) {
                         validation::harvest(*p, m[0], u.kernels);
                         put(validation::dispatch_of(m[0]), u.dispatch);
                       }});
    }
    for (auto& program : validation::collective_programs(
             ranks, std::int64_t{1} << (o.gpu() && !o.share_gpu ? 28 : 22))) {
      const std::size_t at = task(no_graph(), std::move(program));
      const Program* p = c.tasks[at].program;
      c.all.push_back({ranks,
                       !p->pipeline.empty()        ? "transfers"
                       : p->mesh.atoms.size() == 1 ? "collectives"
                                                   : "collectives of two",
                       {at},
                       {},
                       false,
                       [p](const auto& m, validation::Unit& u) {
                         validation::harvest_collectives(*p, m[0], host_cores(), u.collectives);
                       }});
    }
    if (o.gpu() && ranks > 1) {
      plan_slowdowns(o, ranks, task, c);
      continue;
    }
    const std::int64_t largest = std::int64_t{1} << (o.gpu() ? 30 : 24);
    const std::size_t at = task(no_graph(), validation::copy_program(ranks, largest));
    const Program* p = c.tasks[at].program;
    c.all.push_back({ranks, "copies", {at}, {}, false, [p](const auto& m, validation::Unit& u) {
                       validation::harvest_copies(*p, m[0], u.kernels);
                     }});
    if (o.gpu()) {
      const std::size_t there = task(no_graph(), validation::host_copy_program(256 << 20));
      const Program* q = c.tasks[there].program;
      c.all.push_back(
          {ranks, "copies to the host", {there}, {}, false, [q](const auto& m, auto& u) {
             validation::harvest_host_copies(*q, m[0], u.kernels);
           }});
    }
    plan_slowdowns(o, ranks, task, c);
    if (ranks != 2) continue;
    std::vector<std::size_t> parts;
    for (const auto part : {validation::OverlapPart::both, validation::OverlapPart::transfer,
                            validation::OverlapPart::compute})
      parts.push_back(task(no_graph(), validation::overlap_program(part)));
    c.all.push_back({ranks, "overlap", parts, {}, false, [](const auto& m, validation::Unit& u) {
                       u.overlap.push_back(validation::overlap_of(m[0], m[1], m[2]));
                     }});
  }
  keep_only(c, only, flag);
}

void name_tasks(Calibration& c) {
  for (const Measured& x : c.all) {
    for (const std::size_t task : x.tasks)
      c.tasks[task].name = fmt::format("{} on {} rank{}", x.name, x.ranks, x.ranks == 1 ? "" : "s");
  }
}

validation::Conditions conditions_of(StateWatch& watch) {
  const cuda::GpuState s = watch.at_work();
  return {s.clock_mhz, s.memory_clock_mhz, s.power_w, s.temperature_c, s.throttled};
}

void measure(const Measured& x, std::int64_t round, const Options& o, Crew& crew,
             validation::Journal& journal, Progress& progress) {
  progress.next(fmt::format("{} on {} rank{}", x.name, x.ranks, x.ranks == 1 ? "" : "s"));
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::vector<RankMeasurement>> m;
  // While it works: an idle GPU lowers its clock, and one that power held back is at its best
  // again.
  std::optional<StateWatch> watch;
  if (o.gpu()) watch.emplace();
  for (const std::size_t task : x.tasks) m.push_back(crew.run(task).ranks);
  validation::Unit u;
  if (watch) u.conditions = conditions_of(*watch);
  // Of one process several runs, each of which leaves its kernels loaded: the last has all.
  if (!m.empty() && !m.back().empty()) u.outside = m.back()[0].outside;
  if (!m.empty() && m[0].size() == 1) {
    const RankMeasurement& one = m[0][0];
    u.no_records = one.no_kernel_ns;
    if (!one.recorded_s.empty())
      u.recording = validation::median(one.recorded_s) / validation::median(one.plain_s) - 1;
  }
  u.round = round;
  u.ranks = x.ranks;
  u.name = x.name;
  x.harvest(m, u);
  u.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  journal.add(std::move(u));
}

/// A GPU's: what has no shapes first, then the run that the points so far say least of, until all
/// are measured or the time is over; what is left of a budget goes to more of them.
void calibrate_gpu_round(std::int64_t round, int ranks, const Options& o, const Calibration& c,
                         Crew& crew, validation::Journal& journal, Progress& progress) {
  std::vector<const Measured*> left;
  std::deque<const Measured*> more;
  for (const Measured& x : c.all) {
    if (x.ranks != ranks || journal.has(round, ranks, x.name)) continue;
    x.more ? more.push_back(&x) : left.push_back(&x);
  }
  // So many of them at a time: to weigh one takes some milliseconds.
  constexpr std::size_t kAtOnce = 16;
  bool only_more = false;
  while (true) {
    only_more |= left.empty();
    while (only_more && left.size() < kAtOnce && !more.empty()) {
      left.push_back(more.front());
      more.pop_front();
    }
    if (left.empty() || (o.budget_s > 0 && journal.seconds() >= o.budget_s)) return;
    std::size_t next = 0;
    const auto plain =
        std::find_if(left.begin(), left.end(), [](const Measured* x) { return x->shapes.empty(); });
    if (plain != left.end()) {
      next = static_cast<std::size_t>(plain - left.begin());
    } else {
      std::vector<std::vector<KernelShape>> shapes;
      for (const Measured* x : left) shapes.push_back(x->shapes);
      // By the points that predictions will be made from.
      KernelTable kernels = validation::joined(journal.units()).kernels;
      validation::take_held_out(kernels);
      next = validation::next_candidate(kernels, shapes, backend_gpu().multiprocessors);
    }
    const auto begun = std::chrono::steady_clock::now();
    try {
      measure(*left[next], round, o, crew, journal, progress);
    } catch (const MachineError& e) {
      // One that does not run, for its memory or an algorithm, costs no other.
      fmt::print(stderr, "progress: {} was not measured: {}\n", left[next]->name, e.what());
      validation::Unit u;
      u.round = round, u.ranks = ranks, u.name = left[next]->name, u.failed = e.what();
      u.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
      journal.add(std::move(u));
    }
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(next));
  }
}

/// Measures what the journal does not have of this round on `ranks` ranks.
void calibrate_round(std::int64_t round, int ranks, const Options& o, const Calibration& c,
                     Crew& crew, validation::Journal& journal, Progress& progress) {
  if (o.gpu()) return calibrate_gpu_round(round, ranks, o, c, crew, journal, progress);
  for (const Measured& x : c.all) {
    if (x.ranks != ranks || journal.has(round, ranks, x.name)) continue;
    measure(x, round, o, crew, journal, progress);
  }
}

void write(const std::string& file, const std::string& text) {
  std::ofstream out(file, std::ios::binary);
  out << text;
  if (!out.flush())
    throw InputError(
        "--out",
        fmt::format("cannot write {}; check its permissions and whether the disk is full", file));
}

/// Before the work, not after it.
void make_folder(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error)
    throw InputError(
        "--out", fmt::format("cannot make {}: {}; name another folder", folder, error.message()));
  // Without touching a profile that is there: it stays until the new one is complete.
  const std::string probe = folder + "/device.yaml.new";
  write(probe, "");
  std::filesystem::remove(probe, error);
}

/// Device and cluster files; returns the cluster's path.
std::string save(const Profile& p, const std::string& folder, int devices) {
  const auto replace = [&](const std::string& name, const std::string& content) {
    write(folder + "/" + name + ".new", content);
    std::filesystem::rename(folder + "/" + name + ".new", folder + "/" + name);
  };
  replace("device.yaml", validation::device_yaml(p));
  replace("cluster.yaml", validation::cluster_yaml(p, "device.yaml", devices));
  return folder + "/cluster.yaml";
}

Profile profile_of(const validation::Journal& journal, const Options& o) {
  Profile p = validation::joined(journal.units());
  // Those that are joined: a journal that goes on may have more than are asked for now.
  std::set<std::int64_t> of_calibration;
  for (const validation::Unit& u : journal.units()) {
    if (u.record.empty() && u.failed.empty()) of_calibration.insert(u.round);
  }
  const std::size_t rounds = of_calibration.size();
  p.provenance = provenance(o, rounds);
  if (o.gpu() && p.recorded + p.unrecorded > 0)
    p.provenance += p.unrecorded == 0 ? ", kernels by CUPTI"
                    : p.recorded == 0 ? ", kernels between events"
                                      : ", kernels by CUPTI or between events";
  p.cores = host_cores();
  if (o.gpu()) {
    const Gpu g = backend_gpu();
    p.gpu = {g.name, Bytes{g.memory_bytes}, g.multiprocessors, g.compute_capability,
             Bytes{g.free_bytes}};
  }
  return p;
}

/// A GPU's profile without the points that are there to judge it; those.
KernelTable held_out_of(Profile& p) {
  return p.gpu ? validation::take_held_out(p.kernels) : KernelTable{};
}

std::size_t points_of(const Profile& p) {
  std::size_t n = 0;
  for (const auto& [kernel, points] : p.kernels) n += points.size();
  for (const auto& [kind, points] : p.collectives) n += points.size();
  return n + p.slowdown.size();
}

/// Figures whose rounds lie far apart.
std::vector<std::string> outliers(const Profile& p) {
  std::vector<std::pair<double, std::string>> all;
  for (const auto& [kernel, points] : p.kernels) {
    for (const auto& x : points)
      all.emplace_back(x.spread, fmt::format("{} on {} ranks, {} ± {:.0f} %", kernel, x.ranks,
                                             text(x.time), 100 * x.spread));
  }
  for (const auto& [kind, points] : p.collectives) {
    for (const auto& x : points)
      all.emplace_back(x.spread, fmt::format("{} of {} on {} ranks, {} ± {:.0f} %", kind,
                                             text(x.bytes), x.ranks, text(x.time), 100 * x.spread));
  }
  for (const SlowdownPoint& x : p.slowdown)
    all.emplace_back(
        x.spread,
        fmt::format("{} kernels beside {} of {}, {:.2f} and {:.2f} ± {:.0f} %", name(x.kernel),
                    x.beside, text(x.bytes), x.of_kernel, x.of_transfer, 100 * x.spread));
  std::sort(all.rbegin(), all.rend());
  std::vector<std::string> worst;
  for (const auto& [spread, line] : all) {
    if (spread > 0.5 && worst.size() < 5) worst.push_back(line);
  }
  return worst;
}

/// Rates of copies by size and ranks, how much of a transfer hides, dispatch.
/// How a GPU's kernels were timed.
std::string kernel_times_line(const Profile& p) {
  if (p.recorded == 0)
    return p.no_records.empty()
               ? std::string("kernels timed between CUDA events")
               : fmt::format("kernels timed between CUDA events, as there are no records: {}",
                             p.no_records);
  return fmt::format(
      "kernels of {} runs timed by the GPU's own records (CUPTI), which take {:+.1f} % of a step; "
      "of "
      "{} between CUDA events{}",
      p.recorded, 100 * p.recording, p.unrecorded, p.no_records.empty() ? "" : ": " + p.no_records);
}

void print_machine(const Profile& p) {
  const auto copies = p.kernels.find("copy");
  if (copies != p.kernels.end()) {
    std::map<double, std::map<int, double>> rate;  // bytes, ranks
    std::set<int> ranks;
    for (const auto& x : copies->second)
      rate[x.bytes][x.ranks] = x.bytes / x.time.count, ranks.insert(x.ranks);
    std::vector<std::vector<std::string>> table{{"copies of"}};
    for (const int r : ranks)
      table[0].push_back(r == 1 ? "1 rank" : fmt::format("each of {} ranks", r));
    for (const auto& [bytes, by_ranks] : rate) {
      table.push_back({text(Bytes{static_cast<std::int64_t>(bytes) / 2})});
      for (const int r : ranks)
        table.back().push_back(by_ranks.count(r) > 0 ? text(BytesPerSecond{by_ranks.at(r)}) : "-");
    }
    fmt::print("{}\n", align(table));
  }
  if (!p.slowdown.empty()) {
    const double all = p.gpu ? p.gpu->multiprocessors : 0;
    std::vector<std::vector<std::string>> table{
        {"at once, over alone", "beside", "kernel", "transfer", all > 0 ? "P / (P - c)" : ""}};
    for (const SlowdownPoint& x : p.slowdown) {
      const bool stands_in = x.beside == kStandIn;
      table.push_back({std::string(name(x.kernel)),
                       stands_in
                           ? fmt::format("stand-in of {}", x.multiprocessors)
                           : fmt::format("{} of {}, {} ranks", x.beside, text(x.bytes), x.ranks),
                       fmt::format("{:.3f}", x.of_kernel), fmt::format("{:.3f}", x.of_transfer),
                       stands_in && all > x.multiprocessors
                           ? fmt::format("{:.3f}", all / (all - x.multiprocessors))
                           : ""});
    }
    fmt::print("{}\n", align(table));
  }
  if (p.dispatch_measured)
    fmt::print("between two instructions {} ± {:.0f} %\n", text(p.dispatch),
               100 * p.dispatch_spread);
  if (p.in_graph.count > 0)
    fmt::print("the same in a CUDA graph {} ± {:.0f} %\n", text(p.in_graph),
               100 * p.in_graph_spread);
  if (p.launch.count > 0)
    fmt::print("the host queues an instruction in {} ± {:.0f} %\n", text(p.launch),
               100 * p.launch_spread);
  if (p.list_row.count > 0)
    fmt::print("it lists a row of experts in {} ± {:.0f} %\n", text(p.list_row),
               100 * p.list_row_spread);
  if (p.overlap_measured)
    fmt::print("of the smaller of a transfer and a computation {:.0f} % ± {:.0f} % is hidden\n",
               100 * p.overlap, 100 * p.overlap_spread);
}

/// A catalogue's cluster and device with what users measured on theirs.
/// What measured curves and products are added to: a cluster of the catalogue, or a cluster file of
/// one of the catalogue's devices.
validation::ClusterShape base_cluster(const std::string& base,
                                      const validation::Catalogue& catalogue) {
  std::vector<std::string> names;
  for (const auto& c : catalogue.clusters) {
    if (c.name == base) return c;
    names.push_back(c.name);
  }
  if (!base.ends_with(".yaml") && !base.ends_with(".yml"))
    throw InputError("--topology",
                     fmt::format("'{}' is no cluster of the catalogue{}, and no file "
                                 "of one (.yaml); there are {}",
                                 base, did_you_mean(base, names), fmt::join(names, ", ")));
  validation::ClusterShape own = validation::cluster_shape(base);
  const auto devices = device_catalogue();
  if (std::find(devices.begin(), devices.end(), own.device) == devices.end())
    throw InputError("--topology", fmt::format("the devices of {} are of a file of their own, {}; "
                                               "name one of the catalogue in it, like h100-sxm",
                                               base, own.device));
  return own;
}

void calibrate_from(const Options& o) {
  if (o.out.empty()) throw InputError("--out", "is missing; name a folder for the profile");
  if (o.base.empty())
    throw InputError("--topology", "is missing; name the cluster that was measured");
  const auto catalogue = validation::load_catalogue();
  const validation::ClusterShape of_log = base_cluster(o.base, catalogue);
  const validation::ClusterShape* const at = &of_log;
  reject_repeats("--from", o.from);
  if (!o.clock.empty() && o.clock != "brief" && o.clock != "sustained")
    throw InputError("--clock",
                     fmt::format("'{}' is no clock of products; use brief (short kernels "
                                 "on a device that rested) or sustained (a loop of them)",
                                 o.clock));
  std::vector<validation::NcclTestsLog> logs;
  std::map<std::tuple<std::string, int, int, std::int64_t>, std::string> seen;
  std::vector<ProductTable> products;
  const DeviceProfile device = load_device(at->device);
  std::size_t points = 0;
  std::string said;  // once all of it is good
  for (const std::string& file : o.from) {
    const std::string text = read_file(file);
    if (validation::is_nccl_tests(text)) {
      logs.push_back(validation::parse_nccl_tests(text, file));
      validation::check_device(logs.back(), at->device, catalogue);
      validation::check_hosts(logs.back(), *at);
      const validation::NcclTestsLog& read = logs.back();
      for (const auto& [bytes, time] : read.times) {
        const auto [at_size, fresh] =
            seen.try_emplace({read.kind, read.ranks, read.nodes, bytes.count}, read.file);
        if (!fresh)
          throw InputError(
              read.file, fmt::format("has times of {} of {} ranks for {}, and so has {}; "
                                     "give the one that counts",
                                     read.kind, read.ranks, partita::text(bytes), at_size->second));
      }
      points += read.times.size();
      said += fmt::format("{}: {} of {} ranks on {} hosts, {} sizes\n", file, read.kind, read.ranks,
                          read.nodes, read.times.size());
      if (!read.ended)
        fmt::print(stderr,
                   "note: {} ends without nccl-tests' last lines: larger sizes may be missing\n",
                   file);
      continue;
    }
    if (!file.ends_with(".csv"))
      throw InputError(file, "is neither the text that nccl-tests prints nor a .csv of products");
    auto tables = validation::parse_products(validation::parse_csv(text, file));
    const double clock = o.clock == "brief"       ? 1
                         : o.clock == "sustained" ? device.sustained_clock
                                                  : validation::clock_of(tables, device);
    for (ProductTable& t : tables) {
      points += t.points.size();
      t.clock = clock;
      said += fmt::format("{}: {} products of {}", file, t.points.size(), name(t.type));
      if (device.sustained_clock < 1)
        said += fmt::format(
            ", taken as at {:.2f} of the clock of short kernels{}", clock,
            !o.clock.empty() ? ""
                             : fmt::format(" (long work keeps {:.2f}; --clock brief or sustained)",
                                           device.sustained_clock));
      said += "\n";
      products.push_back(std::move(t));
    }
  }
  int ranks = 0, nodes = 1;
  for (const auto& log : logs) {
    if (log.nodes > nodes || (log.nodes == nodes && log.ranks > ranks))
      ranks = log.ranks, nodes = log.nodes;
    const std::int64_t gpus = std::max<std::int64_t>(log.ranks, log.nodes * at->devices_per_node);
    validation::check_times(log, load_topology(fmt::format("{}:{} gpus", at->name, gpus)));
  }
  const std::string device_file = data_folder("topologies/devices/" + at->device + ".yaml");
  const std::string& cluster_file = at->file;
  const std::string with_points =
      validation::with_products(read_file(device_file), device_file, products);
  const std::string cluster = validation::with_curves(
      read_file(cluster_file), cluster_file, at->device, "device.yaml", at->nodes_per_domain, logs);
  make_folder(o.out);
  fmt::print("{}", said);
  write(o.out + "/device.yaml", with_points);
  write(o.out + "/cluster.yaml", cluster);
  load_topology(o.out + "/cluster.yaml");
  fmt::print("{} points in {}/cluster.yaml and {}/device.yaml\n", points, o.out, o.out);
  std::map<std::string, std::set<int>> sizes;
  for (const auto& log : logs) sizes[log.kind].insert(log.ranks);
  for (const auto& [kind, of] : sizes)
    fmt::print("{} of {} ranks has the log's times, of other groups the catalogue's prices\n", kind,
               fmt::join(of, ", "));
  // Plans differ in which of these they use.
  std::vector<std::string> others;
  for (const char* kind : {"all_reduce", "all_gather", "reduce_scatter"}) {
    if (sizes.count(kind) == 0) others.emplace_back(kind);
  }
  if (!sizes.empty() && !others.empty())
    fmt::print(
        "{} keep{} the catalogue's prices: plans that use them compare wrongly with those that "
        "don't if this fabric is another; measure all three\n",
        fmt::join(others, " and "), others.size() == 1 ? "s" : "");
  if (nodes > 1) {
    const bool part = ranks % nodes == 0 && ranks / nodes < at->devices_per_node;
    fmt::print(
        "the cluster file is of one node; that of the log is \"{}/cluster.yaml:{}\"\n", o.out,
        part ? fmt::format("{} nodes of {}", nodes, ranks / nodes) : fmt::format("{} gpus", ranks));
  }
}

void calibrate(Options& o, int& code) {
  if (o.from.empty() && !o.clock.empty())
    throw InputError("--clock", "is of products that --from brings; leave it out");
  if (!o.from.empty()) {
    calibrate_from(o);
    return;
  }
  check(o);
  if (o.out.empty()) throw InputError("--out", "is missing; name a folder for the profile");
  Calibration c;
  plan_calibration(o, o.only, "--only", c);
  name_tasks(c);
  const std::string file = o.out + "/journal.jsonl";
  const validation::JournalHeader header{
      machine(o), fmt::format("partita 0.1.0 (build {}), ranks {} as {}, {} steps{}", build(),
                              fmt::join(o.ranks, ","), o.transport, o.steps,
                              (o.only.empty() ? "" : ", only " + o.only) +
                                  (o.gpu() && o.by_events() ? ", kernels between events" : ""))};
  if (!o.launched) {
    make_folder(o.out);
    // A longer budget goes on where a shorter one ended.
    if (o.gpu() && o.budget_s > 0)
      validation::Journal::reopen(o.out + "/measured.jsonl", file, header, o.budget_s);
    // What is wrong with it is said here once, not by every rank.
    { const validation::Journal journal(file, header); }
  }
  if (launches(o)) {
    const std::string failure = launch(o, c.tasks, code);
    if (!failure.empty()) std::fputs(("partita: " + failure + "\n").c_str(), stderr);
    return;
  }
  Crew crew(crew_options(o, "calibrate", c.tasks.size()), c.tasks);
  try {
    if (!crew.leads()) {
      crew.serve();
      return;
    }
    validation::Journal journal(file, header);
    if (!journal.units().empty())
      fmt::print(stderr, "progress: {} of the last calibration's measurements are kept\n",
                 journal.units().size());
    const auto measured_always =
        std::count_if(c.all.begin(), c.all.end(), [](const Measured& x) { return !x.more; });
    const std::size_t total =
        static_cast<std::size_t>(measured_always) * static_cast<std::size_t>(o.round_count());
    Progress progress(total - std::min(total, journal.units().size()),
                      o.budget_s > 0 ? std::max(1.0, o.budget_s - journal.seconds()) : 0);
    std::int64_t round = 0;
    for (; round < o.round_count(); ++round) {
      // A round that would not fit is not begun; one that has begun is ended.
      const bool begun = std::any_of(journal.units().begin(), journal.units().end(),
                                     [&](const auto& u) { return u.round == round; });
      const double mean = round > 0 ? journal.seconds() / static_cast<double>(round) : 0;
      if (round > 0 && !begun && o.budget_s > 0 && journal.seconds() + mean > o.budget_s) break;
      for (const int ranks : o.ranks) calibrate_round(round, ranks, o, c, crew, journal, progress);
    }
    Profile p = profile_of(journal, o);
    if (points_of(p) == 0 && p.strayed > 0) {
      // Not to be gone on with: these runs would be kept.
      journal.keep_as(o.out + "/measured.jsonl");
      throw MachineError(fmt::format(
          "nothing is left of {} runs: the GPU's clock was held down by heat, a slowdown or a "
          "power brake in all of them (nvidia-smi -q -d PERFORMANCE says which; {}/measured.jsonl "
          "has them); let it cool and calibrate again",
          p.strayed, o.out));
    }
    const KernelTable held = held_out_of(p);
    const std::string cluster = save(p, o.out, o.most_ranks());
    journal.keep_as(o.out + "/measured.jsonl");
    fmt::print("{} points of {} rounds in {} and {}/device.yaml\n\n", points_of(p), round, cluster,
               o.out);
    print_machine(p);
    if (!held.empty())
      fmt::print("{}\n",
                 held_out_table(validation::judge(p.kernels, held, p.gpu->multiprocessors)));
    if (o.gpu()) fmt::print("{}\n", kernel_times_line(p));
    if (p.strayed > 0)
      fmt::print(
          "{} runs left out: their clock was more than 1 % off their other rounds' or was held "
          "down\n",
          p.strayed);
    const auto failed = std::count_if(journal.units().begin(), journal.units().end(),
                                      [](const validation::Unit& u) { return !u.failed.empty(); });
    if (failed > 0)
      fmt::print("{} runs could not be measured: {}/measured.jsonl says why\n", failed, o.out);
    for (const auto& line : outliers(p)) fmt::print("rounds far apart: {}\n", line);
    if (!o.gpu() && o.budget_s > 0 && journal.seconds() > 1.5 * o.budget_s)
      fmt::print("one round takes {:.0f} s, longer than --budget\n",
                 journal.seconds() / static_cast<double>(round));
  } catch (const ToldElsewhere&) {
    throw;
  } catch (const std::exception& e) {
    crew.abort(e);
    throw;
  }
}

/// Of a case's timed runs.
struct TimedRun {
  std::int64_t round = 0;
  std::vector<RankMeasurement> ranks;
  Routing routing;  ///< of its last step
};
struct Outcome {
  SuiteCase* suite;
  Program program;
  reference::Comparison reference;
  std::vector<TimedRun> measured;
  std::size_t strayed = 0;                  ///< runs that are no measurement for their clock
  std::size_t mathematics = 0, timing = 0;  ///< tasks
  bool checked = false;                     ///< its reference is known
  bool given_up = false;                    ///< its ranks hung, or died
  bool has_reference = true, is_timed = true;
  bool routed = false;
};

/// Where a suite's measurements are kept: in the folder; else, of ranks that this command starts,
/// in memory that it shares with them.
class SuiteJournal {
 public:
  explicit SuiteJournal(const Options& o) {
    if (!o.out.empty()) {
      file_ = o.out + "/suite-journal.jsonl";
    } else if (const char* shared = std::getenv(kJournalVariable); shared && o.launched) {
      file_ = shared;
    } else if (launches(o)) {
      memory_ = ::memfd_create("partita-journal", MFD_CLOEXEC);
      if (memory_ < 0) throw MachineError("no memory for the journal of the suite");
      file_ = fmt::format("/proc/{}/fd/{}", ::getpid(), memory_);
      ::setenv(kJournalVariable, file_.c_str(), 1);
    }
  }
  ~SuiteJournal() {
    if (memory_ >= 0) ::close(memory_);
  }
  SuiteJournal(const SuiteJournal&) = delete;
  SuiteJournal& operator=(const SuiteJournal&) = delete;

  std::unique_ptr<validation::Journal> open(const Options& o) const {
    if (file_.empty()) return std::make_unique<validation::Journal>();
    return std::make_unique<validation::Journal>(
        file_,
        validation::JournalHeader{
            machine(o),
            fmt::format(
                "partita 0.1.0 (build {}) validate, ranks {} as {}, {} steps{}{}", build(),
                fmt::join(o.ranks, ","), o.transport, o.steps,
                (o.only.empty() ? "" : ", only " + o.only) +
                    (o.gpu() && o.by_events() ? ", kernels between events" : "") +
                    (o.calibrate_only.empty() ? "" : ", calibrated with " + o.calibrate_only),
                o.no_reference ? ", no reference" : "")});
  }

 private:
  std::string file_;
  int memory_ = -1;
};

/// In a journal the mathematics of a case come before all rounds, and that it was given up before.
constexpr std::int64_t kMathematics = -1, kGivenUp = -2;

void note(validation::Journal& journal, std::int64_t round, const Outcome& c, std::string record,
          const validation::Conditions& conditions = {}) {
  validation::Unit u;
  u.conditions = conditions;
  u.round = round;
  u.ranks = static_cast<int>(c.suite->ranks);
  u.name = c.suite->name;
  u.record = std::move(record);
  journal.add(std::move(u));
}

/// What the journal has of the cases; returns how many measurements it has in all.
std::size_t recall(const validation::Journal& journal, std::deque<Outcome>& outcomes) {
  for (const validation::Unit& u : journal.units()) {
    for (Outcome& c : outcomes) {
      if (c.suite->name != u.name || c.suite->ranks != u.ranks) continue;
      if (u.round == kGivenUp) c.given_up = c.checked = true;  // and differs
      if (u.record.empty()) continue;
      if (u.round == kMathematics) {
        c.reference = comparison_record(u.record);
        c.checked = true;
      } else {
        CaseRecord r = case_record(u.record);
        c.measured.push_back({u.round, std::move(r.ranks), std::move(r.routing)});
      }
    }
  }
  return journal.units().size();
}

/// Takes out the timed runs that are no measurement for their clock.
void leave_out_strayed(const validation::Journal& journal, std::deque<Outcome>& outcomes) {
  for (const std::size_t number : validation::off_clock(journal.units())) {
    const validation::Unit& u = journal.units()[number];
    if (u.record.empty()) continue;
    for (Outcome& c : outcomes) {
      if (c.suite->name != u.name || c.suite->ranks != u.ranks) continue;
      c.strayed += std::erase_if(c.measured, [&](const TimedRun& r) { return r.round == u.round; });
    }
  }
}

/// Of a suite whose ranks have failed.
void show_incomplete(const Options& o, const std::deque<Outcome>& outcomes, std::size_t units,
                     const std::string& reason) {
  IncompleteSuite s{o.backend, o.transport, reason, o.suite_rounds(), units, !o.out.empty(), {}};
  for (const Outcome& c : outcomes) {
    s.cases.push_back({c.suite->name, c.suite->ranks, c.checked, c.reference.equal, {}});
    for (const TimedRun& run : c.measured) s.cases.back().measured.push_back(&run.ranks);
  }
  fmt::print("{}", o.json ? to_json(s) : to_text(s));
}

/// A case's measurements beside its prediction; adds to the sums by kind of instruction.
SuiteRow row_of(const Outcome& c, const Topology& topology, const RoutingSource& routing,
                bool feeds_back, const Options& o, std::map<std::string, SuiteKind>& kinds) {
  if (!c.is_timed) {
    SuiteRow row;
    row.figures.name = c.suite->name;
    row.figures.network = c.suite->graph.name;
    row.figures.ranks = c.suite->ranks;
    row.checked = c.checked;
    row.equal = c.reference.equal;
    row.timed = false;
    return row;
  }
  Communication communication(topology);
  SimulateOptions simulation;
  simulation.record = true;
  simulation.unfolded = true;  // each rank's counts are compared
  const Program program = c.routed ? with_routing(c.program, routing) : c.program;
  const Timeline timeline = simulate(program, communication, simulation);
  SuiteRow row;
  validation::CaseFigures& f = row.figures;
  f.name = c.suite->name;
  f.network = c.suite->graph.name;
  f.ranks = c.suite->ranks;
  for (const Flops& n : timeline.flops) f.flops = std::max(f.flops, n.count);
  std::vector<double> medians, compute, within, compute_within;
  validation::StepComparison step;
  for (const TimedRun& run : c.measured) {
    step = validation::compare(program, timeline, run.ranks);
    medians.push_back(step.measured.count);
    compute.push_back(step.compute_measured.count);
    within.push_back(step.noise);
    compute_within.push_back(step.compute_noise);
    for (const auto& k : step.kinds) {
      SuiteKind& kind = kinds[k.kind.substr(0, k.kind.find(' '))];
      kind.sum.count += k.count;
      kind.sum.measured += k.measured;
      kind.sum.predicted += k.predicted;
      kind.by_round.resize(c.measured.size());
      kind.by_round[medians.size() - 1] += k.measured.count;
    }
  }
  std::tie(f.measured, f.noise) = validation::over_rounds(medians, within);
  std::tie(f.compute_measured, f.compute_noise) = validation::over_rounds(compute, compute_within);
  f.predicted = step.predicted.count;
  f.compute_predicted = step.compute_predicted.count;
  row.strayed = c.strayed;
  row.checked = !o.no_reference && c.has_reference;
  row.equal = c.reference.equal;
  row.memory_error = static_cast<double>(step.predicted_peak.count - step.measured_peak.count) /
                     static_cast<double>(step.measured_peak.count);
  row.memory_measured = step.measured_memory, row.memory_predicted = step.predicted_memory;
  if (!c.measured.empty()) {
    std::vector<Bytes> peaks;
    for (const MemoryUse& use : timeline.memory) peaks.push_back(use.peak);
    row.device_memory =
        device_memory(program, communication, timeline.classes, peaks, c.measured.back().ranks);
  }
  // The rows that are fed back are those of the last round's last step; other rows, given or of
  // earlier rounds, are other counts.
  for (std::size_t k = c.routed ? c.measured.size() - 1 : 0; k < c.measured.size(); ++k) {
    if (c.routed && !feeds_back) break;
    if (!row.program || row.program->equal())
      row.program =
          validation::check_program(program, timeline, c.measured[k].ranks,
                                    warm_up(o) + o.steps - 1, o.transport != "mpi" && !o.gpu());
  }
  return row;
}

/// Our model on the machine as NCCL has seen it, beside its estimates; or why not.
std::pair<std::optional<validation::EstimateComparison>, std::string> beside_nccl(
    const Options& o, const std::vector<LinkEstimate>& estimates) {
  if (!o.gpu() || o.most_ranks() < 2) return {};
  if (estimates.empty()) return {std::nullopt, "the ranks' GPUs are not linked by NCCL"};
  const char* dump = std::getenv("NCCL_TOPO_DUMP_FILE");
  if (dump == nullptr || !std::filesystem::exists(dump))
    return {std::nullopt, "NCCL left no file of its topology; name a folder by --out"};
  try {
    // Ranks that share a GPU are machines of their own to NCCL.
    const std::int64_t nodes = o.share_gpu ? o.most_ranks() : 1;
    const Topology t = load_topology(fmt::format("{}:{}", dump, nodes));
    std::vector<std::int64_t> ranks(static_cast<std::size_t>(o.most_ranks()));
    std::iota(ranks.begin(), ranks.end(), 0);
    if (t.rank_count() < ranks.size())
      return {std::nullopt,
              fmt::format("{} has {} GPUs for {} ranks", dump, t.rank_count(), ranks.size())};
    return {validation::compare_estimates(nccl::communicator(t, ranks), estimates), ""};
  } catch (const InputError& e) {
    return {std::nullopt, e.what()};
  }
}

void validate(Options& o, int& code) {
  check(o);
  auto cases = validation::suite();
  const std::size_t small = cases.size();
  // A GPU's time for those is that of their launches.
  if (o.gpu()) {
    for (SuiteCase& c : validation::gpu_suite()) cases.push_back(std::move(c));
  }
  std::deque<Outcome> outcomes;
  for (SuiteCase& c : cases) {
    if (std::find(o.ranks.begin(), o.ranks.end(), static_cast<int>(c.ranks)) == o.ranks.end())
      continue;
    if (!o.only.empty() && c.name.find(o.only) == std::string::npos) continue;
    Outcome one;
    one.suite = &c;
    one.has_reference = static_cast<std::size_t>(&c - cases.data()) < small;
    one.is_timed = !o.gpu() || !one.has_reference;
    one.program = program_of(c.graph, c.plan, c.name);
    one.routed = std::any_of(one.program.buffers.begin(), one.program.buffers.end(),
                             [](const Buffer& b) { return b.routed; });
    outcomes.push_back(std::move(one));
  }
  if (outcomes.empty() && o.only.empty())
    throw InputError("--ranks", fmt::format("no case of the suite runs on {} ranks; use 1, 2 or 4",
                                            fmt::join(o.ranks, ", ")));
  if (outcomes.empty())
    throw InputError("--only", fmt::format("no case of the suite has '{}' in its name", o.only));
  const bool feeds_back = o.routing.empty() || o.routing == "recorded";
  const RoutingSource given = feeds_back ? RoutingSource{} : routing_source(o.routing, "--routing");
  // Before the work, not after it.
  if (o.out.empty()) {
    temporary_place();
  } else {
    make_folder(o.out);
  }
  constexpr int kSteps = 2;
  Calibration calibration;
  plan_calibration(o, o.calibrate_only, "--calibrate-only", calibration);
  name_tasks(calibration);
  auto tasks = calibration.tasks;
  for (Outcome& c : outcomes) {
    execute::Options e = generated(c.suite->graph, kSeed);
    e.steps = kSteps;
    const ElementType compute = c.suite->plan.precision.compute;
    put_on_backend(e, o, c.program, compute);
    c.mathematics = tasks.size();
    tasks.push_back({&c.suite->graph, &c.program, e, "case '" + c.suite->name + "'"});
    c.timing = tasks.size();
    execute::Options timing = timed(c.suite->graph, c.program, o, compute, c.routed);
    if (c.suite->ranks == 1 && o.gpu() && !o.by_events()) timing = by_records(std::move(timing));
    tasks.push_back(
        {&c.suite->graph, &c.program, std::move(timing), "case '" + c.suite->name + "'"});
  }
  // What NCCL itself expects, on a communicator of the most ranks; its word of the machine is ours.
  std::optional<std::size_t> estimating;
  std::deque<Program> estimated;
  if (o.gpu() && o.most_ranks() > 1) {
    estimated.push_back(std::move(validation::collective_programs(o.most_ranks()).front()));
    execute::Options e = timed(no_graph(), estimated.back(), o);
    e.warm_up = 0;
    e.steps = 1;
    e.estimates = true;
    estimating = tasks.size();
    tasks.push_back({&no_graph(), &estimated.back(), e, "NCCL's own estimates"});
    if (!o.out.empty()) ::setenv("NCCL_TOPO_DUMP_FILE", (o.out + "/nccl-topology.xml").c_str(), 0);
  }
  const SuiteJournal place(o);
  if (launches(o)) {
    { const auto journal = place.open(o); }  // what is wrong with it is said here once
    std::int64_t at = -1;
    std::string failure = launch(o, tasks, code, &at);
    // On a shared GPU a plan may never end, of which others are no worse.
    while (!failure.empty() && o.share_gpu && code == 3) {
      const auto its = std::find_if(outcomes.begin(), outcomes.end(), [&](const Outcome& one) {
        return static_cast<std::size_t>(at) == one.mathematics ||
               static_cast<std::size_t>(at) == one.timing;
      });
      if (its == outcomes.end() || its->given_up) break;
      Outcome* c = &*its;
      c->given_up = true;
      validation::Unit u;
      u.round = kGivenUp, u.ranks = static_cast<int>(c->suite->ranks), u.name = c->suite->name;
      u.failed = failure;
      place.open(o)->add(std::move(u));
      fmt::print(stderr, "progress: {} is given up, and counts as different: {}\n", c->suite->name,
                 failure);
      failure = launch(o, tasks, code, &at);
    }
    if (failure.empty()) return;
    const auto journal = place.open(o);
    recall(*journal, outcomes);
    show_incomplete(o, outcomes, journal->units().size(), failure);
    std::fputs(("partita: " + failure + "\n").c_str(), stderr);
    return;
  }
  Crew crew(crew_options(o, "validate", tasks.size()), tasks);
  if (!crew.leads()) {
    try {
      crew.serve();
    } catch (const ToldElsewhere&) {
      throw;
    } catch (const std::exception& e) {
      crew.abort(e);
      throw;
    }
    return;
  }
  std::unique_ptr<validation::Journal> kept;
  std::vector<LinkEstimate> estimates;
  try {
    kept = place.open(o);
    validation::Journal& journal = *kept;
    const std::size_t before = recall(journal, outcomes);
    if (before > 0)
      fmt::print(stderr, "progress: {} of the last validation's measurements are kept\n", before);
    const auto timed_cases = std::count_if(outcomes.begin(), outcomes.end(),
                                           [](const Outcome& c) { return c.is_timed; });
    const auto measured_always = std::count_if(calibration.all.begin(), calibration.all.end(),
                                               [](const Measured& x) { return !x.more; });
    const std::size_t total = static_cast<std::size_t>(measured_always * o.round_count()) +
                              static_cast<std::size_t>(timed_cases * o.suite_rounds()) +
                              outcomes.size() + (estimating ? 1 : 0);
    Progress progress(total - std::min(total, before), 0);
    // Mathematics first: a wrong plan's time is of no interest.
    for (Outcome& c : outcomes) {
      if (c.checked || !c.has_reference) continue;
      progress.next("mathematics of " + c.suite->name);
      if (o.no_reference) continue;
      execute::RankResult result;
      try {
        result = crew.run(c.mathematics);
      } catch (const MachineError& e) {
        if (!o.gpu()) throw;
        fmt::print(stderr, "progress: {} was not carried out: {}\n", c.suite->name, e.what());
        c.checked = true;  // and differs
        continue;
      }
      const auto exact = reference::options_for(c.suite->graph, c.program, kSteps, kSeed);
      const int groups = static_cast<int>(c.suite->plan.dp);
      const auto serial = reference::train_serially(c.suite->graph, c.program, exact, groups);
      c.reference =
          reference::compare_in_own_types(c.suite->graph, c.program, result.values, serial, exact);
      c.checked = true;
      note(journal, kMathematics, c, to_record(c.reference));
      if (!c.reference.equal) {
        const auto& r = c.reference;
        fmt::print(stderr,
                   "progress: {} differs from its reference: loss by {:.1e}, gradient of {} by "
                   "{:.1e}, {} by {:.1e}; rounding allows {:.1e}\n",
                   c.suite->name, r.loss_error, r.worst_gradient, r.gradient_error,
                   r.worst_parameter, r.parameter_error, r.tolerance);
      }
    }
    if (estimating) {
      progress.next("NCCL's own estimates");
      try {
        estimates = crew.run(*estimating).estimates;
      } catch (const MachineError& e) {
        fmt::print(stderr, "progress: NCCL's own estimates failed: {}\n", e.what());
      }
    }
    // Calibration and suite take turns, so that a slow minute of the machine meets both.
    for (std::int64_t round = 0; round < std::max(o.round_count(), o.suite_rounds()); ++round) {
      for (const int ranks : o.ranks) {
        if (round < o.round_count())
          calibrate_round(round, ranks, o, calibration, crew, journal, progress);
        for (Outcome& c : outcomes) {
          if (c.suite->ranks != ranks || !c.is_timed || c.given_up ||
              journal.has(round, ranks, c.suite->name))
            continue;
          progress.next(c.suite->name);
          execute::RankResult result;
          validation::Conditions conditions;
          try {
            std::optional<StateWatch> watch;
            if (o.gpu()) watch.emplace();
            result = crew.run(c.timing);
            if (watch) conditions = conditions_of(*watch);
          } catch (const MachineError& e) {
            if (!o.gpu()) throw;
            fmt::print(stderr, "progress: {} was not measured: {}\n", c.suite->name, e.what());
            continue;
          }
          note(journal, round, c, to_record(CaseRecord{result.ranks, result.routing}), conditions);
          c.measured.push_back({round, std::move(result.ranks), std::move(result.routing)});
        }
      }
    }
  } catch (const ToldElsewhere&) {
    throw;
  } catch (const InputError& e) {
    crew.abort(e);
    throw;
  } catch (const std::exception& e) {
    // Where this command has started the ranks, it tells what is left.
    if (std::getenv(kBoardVariable) == nullptr && crew.speaks())
      show_incomplete(o, outcomes, kept ? kept->units().size() : 0, e.what());
    crew.abort(e);
    throw;
  }
  validation::Journal& journal = *kept;
  if (!o.out.empty()) journal.keep_as(o.out + "/suite.jsonl");
  leave_out_strayed(journal, outcomes);
  Profile p = profile_of(journal, o);
  const KernelTable held = held_out_of(p);
  const bool temporary = o.out.empty();
  const std::string folder =
      temporary ? temporary_folder() + fmt::format("/partita-{}", ::getpid()) : o.out;
  make_folder(folder);
  const std::string cluster = save(p, folder, o.most_ranks());
  const Topology topology = load_topology(cluster);
  if (temporary) {
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
  }

  SuiteReport report;
  report.backend = o.backend;
  report.transport = o.transport;
  report.provenance = p.provenance;
  report.outliers = outliers(p);
  report.strayed = p.strayed;
  if (!held.empty()) report.held_out = validation::judge(p.kernels, held, p.gpu->multiprocessors);
  std::tie(report.estimates, report.no_estimates) = beside_nccl(o, estimates);
  std::map<std::string, SuiteKind> kinds;
  for (Outcome& c : outcomes) {
    report.strayed_of_suite += c.strayed;
    if (c.is_timed && c.measured.empty()) {  // as was said, or is below
      if (c.strayed > 0 || c.given_up) report.no_figures.push_back(c.suite->name);
      continue;
    }
    RoutingSource routing = given;
    if (feeds_back && !c.measured.empty()) routing.recorded = c.measured.back().routing;
    try {
      report.rows.push_back(row_of(c, topology, routing, feeds_back, o, kinds));
    } catch (const InputError& e) {
      // Calibrated with a part only (--calibrate-only): its mathematics stands all the same.
      fmt::print(stderr, "progress: {} has no prediction: {}\n", c.suite->name, e.what());
      c.is_timed = false;
      report.rows.push_back(row_of(c, topology, routing, feeds_back, o, kinds));
    }
  }
  for (auto& [kind, all] : kinds) {
    all.sum.kind = kind;
    report.kinds.push_back(all);
  }
  code = exit_code(report);
  o.json ? print_json(report) : print(report);
}

void add_common(CLI::App& c, Options& o) {
  c.add_option("--backend", o.backend, "cpu or cuda");
  c.add_flag("--share-gpu", o.share_gpu, "cuda: several ranks on one GPU");
  c.add_option("--transport", o.transport, "threads (default), mpi or tcp: what ranks are");
  c.add_option("--ranks", o.ranks_text, "numbers of ranks, like 1,2,4");
  c.add_option("--rounds", o.rounds,
               "how often everything is measured, in turns (default: 3, of a GPU's calibration 1)");
  c.add_option("--steps", o.steps_given, "timed steps of each run");
  c.add_option("--kernel-times", o.kernel_times,
               "cuda: records (default), the GPU's own where CUPTI is found; events: CUDA events "
               "around each");
  c.add_option("--out", o.out, "folder for device.yaml and cluster.yaml");
  c.add_option("--timeout", o.timeout_s, "seconds without an answer after which a rank gives up");
}

}  // namespace

void add_validate(CLI::App& app, int& code) {
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("calibrate", "measure this machine: a device and link profile");
  add_common(*c, *o);
  c->add_option("--only", o->only, "only what has this text in its name: a profile of a part");
  c->add_option("--budget", o->budget,
                "as many rounds as fit in this time, like 90s, 5m, 1h; at least one");
  c->add_option("--from", o->from,
                "instead: nccl-tests logs and tables of products (.csv) measured on a cluster");
  c->add_option("--topology", o->base, "with --from: the catalogue's cluster that they are of");
  c->add_option("--clock", o->clock,
                "with --from: products ran brief (short kernels on a device that rested) or "
                "sustained (a loop of them); default: what they are nearer to");
  c->callback([o, &code] { calibrate(*o, code); });
  auto v = std::make_shared<Options>();
  c = app.add_subcommand("validate",
                         "run a suite of plans on this machine beside their predictions");
  add_common(*c, *v);
  c->add_option("--only", v->only, "cases with this text in their name");
  c->add_option("--calibrate-only", v->calibrate_only,
                "calibrate with programs with this text in their name: quicker and coarser");
  c->add_option("--budget", v->budget, "cuda: most time for calibration, like 90s or 5m");
  c->add_option("--routing", v->routing,
                "experts' rows: recorded (default: of each case's last step), balanced or zipf:S");
  c->add_flag("--no-reference", v->no_reference, "do not check the mathematics");
  c->add_flag("--json", v->json, "print JSON");
  c->callback([v, c, &code] {
    if (c->get_subcommands().empty()) validate(*v, code);
  });
  add_rows(*c, code);
}

}  // namespace partita::cli
