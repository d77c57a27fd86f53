#include "cli/crew.h"

#include <fmt/format.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <thread>
#include <utility>

#include "base/error.h"
#include "cli/backend.h"
#include "cli/fault.h"
#include "cli/launch.h"
#include "runtime/reference/serial.h"
#include "runtime/transport/environment.h"
#include "runtime/transport/tcp.h"
#ifdef PARTITA_MPI
#  include "runtime/transport/mpi.h"
#endif

namespace partita::cli {
namespace {

constexpr std::int64_t kOrderTag = 5;
constexpr std::array<std::int64_t, 2> kDismissed{-1, -1};  ///< else a task, and its turn
/// Ranks that are not needed wait for hours.
constexpr double kPatience = 1e7;

}  // namespace

execute::Options generated(const Graph& graph, std::uint64_t seed) {
  execute::Options o;
  o.seed = seed;
  o.input = [&graph, seed](std::size_t input, std::int64_t step, std::int64_t sample,
                           std::int64_t index) {
    return reference::input_value(graph, input, seed, step, sample, index);
  };
  o.initial = [&graph, seed](std::size_t replica, std::size_t q, std::int64_t linear) {
    return reference::initial_value(graph.parameters[q], seed + replica, linear);
  };
  o.operator_seed = [seed](std::int32_t op) {
    return reference::operator_seed(seed, OpId{static_cast<std::size_t>(op)});
  };
  return o;
}

std::string place_of_task(const RankState& rank, int r, const std::vector<Task>& tasks) {
  const std::int64_t task = rank.task;
  if (task < 0 || task >= static_cast<std::int64_t>(tasks.size())) return "between two programs";
  const Task& t = tasks[static_cast<std::size_t>(task)];
  return fmt::format("{} of {}", execute::place(*t.program, r, rank.step, rank.instruction),
                     t.name);
}

Crew::Crew(const CrewOptions& options, std::vector<Task> tasks)
    : o_(options), tasks_(std::move(tasks)) {
  if (o_.transport == "threads") return;
  const auto variable = [](const char* name) { return std::getenv(name); };
  if (const char* path = variable(kBoardVariable)) board_ = Board::open(path, o_.ranks);
  // Where a rank is, the board knows; of those on other hosts their last message tells, and they
  // work on the same program as all.
  const Describe describe = [this](int r, std::int64_t step, std::int64_t instruction) {
    RankState elsewhere;
    if (board_) return place_of_task(board_->rank(r), r, tasks_);
    elsewhere.task = at_work_.load();
    elsewhere.step = step;
    elsewhere.instruction = instruction;
    return place_of_task(elsewhere, r, tasks_);
  };
#ifdef PARTITA_MPI
  if (o_.transport == "mpi") world_ = mpi_transport({kPatience, board_, describe});
#endif
  if (o_.transport == "tcp") {
    const Launcher l = launcher_of(variable, false);
    TcpOptions t;
    t.rank = l.rank;
    t.size = l.size;
    t.host = l.host;
    t.port = l.port;
    if (const char* socket = variable(kListenerVariable)) t.listener = std::atoi(socket);
    t.key = o_.key;
    t.timeout_s = kPatience;
    t.board = board_;
    t.describe = describe;
    t.own_process = true;
    world_ = tcp_transport(t);
  }
  if (world_->size() < o_.ranks)
    world_->abort("the launcher started fewer ranks than the largest of --ranks; start as many", 2);
}

Crew::~Crew() {
  // After a failure they have heard of it.
  if (world_ && world_->rank() == 0 && std::uncaught_exceptions() == 0) {
    for (int r = 1; r < world_->size(); ++r)
      world_->send(r, kOrderTag, kDismissed.data(), sizeof kDismissed);
  }
  parts_.clear();
}

bool Crew::leads() const { return !world_ || world_->rank() == 0; }

execute::RankResult Crew::work(std::int64_t task, std::int64_t turn) {
  const Task& t = tasks_.at(static_cast<std::size_t>(task));
  execute::Options options = t.options;
  options.name = t.name;
  options.before = test_fault(turn);
  if (!world_) {
    execute::ThreadOptions threads;
    threads.timeout_s = o_.timeout_s;
    try {
      return std::move(execute::run_threads(*t.program, options, threads)[0]);
    } catch (const PeerError& e) {
      throw PeerError(fmt::format("{} of {}", e.what(), t.name));
    }
  }
  at_work_ = task;
  world_->work_on(task);
  auto result = execute::run_rank(*t.program, part(static_cast<int>(t.program->ranks())), options);
  world_->work_on(-1);
  at_work_ = -1;
  return result;
}

void Crew::serve() {
  for (;;) {
    std::array<std::int64_t, 2> order = kDismissed;
    world_->receive(0, kOrderTag, order.data(), sizeof order);
    if (order == kDismissed) {
      world_->leave();
      return;
    }
    work(order[0], order[1]);
  }
}

execute::RankResult Crew::run(std::size_t task) {
  const std::array<std::int64_t, 2> order{static_cast<std::int64_t>(task), turn_++};
  if (world_) {
    const auto ranks = static_cast<int>(tasks_.at(task).program->ranks());
    // Those that were needed so far look for the next order for a tenth of a second before they
    // rest.
    if (ranks < last_ranks_) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    last_ranks_ = ranks;
    for (int r = 1; r < ranks; ++r) world_->send(r, kOrderTag, order.data(), sizeof order);
  }
  auto result = work(order[0], order[1]);
  if (!result.no_links.empty() && !std::exchange(said_no_links_, true))
    note_no_links(result.no_links);
  return result;
}

void Crew::abort(const std::exception& why) {
  if (!world_) return;
  const int code = dynamic_cast<const InputError*>(&why) != nullptr ? 2 : 3;
  world_->abort(why.what(), code);
  if (!world_->speaks()) throw ToldElsewhere(code, why.what());
}

Transport& Crew::part(int ranks) {
  auto& p = parts_[ranks];
#ifdef PARTITA_MPI
  if (!p && o_.transport == "mpi") p = mpi_part(*world_, o_.timeout_s, ranks);
#endif
  if (!p) p = tcp_part(*world_, o_.timeout_s, ranks);
  return *p;
}

}  // namespace partita::cli
