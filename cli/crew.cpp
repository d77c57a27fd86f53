#include "cli/crew.h"

#include <chrono>
#include <thread>

#include "base/error.h"
#include "runtime/reference/serial.h"
#ifdef PARTITA_MPI
#  include "runtime/transport/mpi.h"
#endif

namespace partita::cli {
namespace {

constexpr std::int64_t kOrderTag = 5, kDismissed = -1;
/// Ranks that are not needed wait for hours.
[[maybe_unused]] constexpr double kPatience = 1e7;

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

Crew::Crew([[maybe_unused]] const std::string& transport, [[maybe_unused]] int ranks,
           double timeout_s, std::vector<Task> tasks)
    : timeout_s_(timeout_s), tasks_(std::move(tasks)) {
#ifdef PARTITA_MPI
  if (transport != "mpi") return;
  world_ = mpi_transport({kPatience, nullptr, nullptr});
  if (world_->size() < ranks)
    world_->abort("the launcher started fewer ranks than the largest of --ranks; start as many", 2);
#endif
}

Crew::~Crew() {
  if (world_ && world_->rank() == 0) {
    for (int r = 1; r < world_->size(); ++r)
      world_->send(r, kOrderTag, &kDismissed, sizeof kDismissed);
  }
  parts_.clear();
}

bool Crew::leads() const { return !world_ || world_->rank() == 0; }

void Crew::serve() {
  for (;;) {
    std::int64_t task = kDismissed;
    world_->receive(0, kOrderTag, &task, sizeof task);
    if (task == kDismissed) return;
    const Task& t = tasks_.at(static_cast<std::size_t>(task));
    execute::run_rank(*t.program, part(static_cast<int>(t.program->ranks())), t.options);
  }
}

execute::RankResult Crew::run(std::size_t task) {
  const Task& t = tasks_.at(task);
  if (!world_) {
    execute::ThreadOptions threads;
    threads.timeout_s = timeout_s_;
    return std::move(execute::run_threads(*t.program, t.options, threads)[0]);
  }
  const auto ranks = static_cast<int>(t.program->ranks());
  // Those that were needed so far look for the next order for a tenth of a second before they rest.
  if (ranks < last_ranks_) std::this_thread::sleep_for(std::chrono::milliseconds(200));
  last_ranks_ = ranks;
  const auto order = static_cast<std::int64_t>(task);
  for (int r = 1; r < ranks; ++r) world_->send(r, kOrderTag, &order, sizeof order);
  return execute::run_rank(*t.program, part(ranks), t.options);
}

void Crew::abort(const std::exception& why) {
  if (world_) world_->abort(why.what(), dynamic_cast<const InputError*>(&why) != nullptr ? 2 : 3);
}

Transport& Crew::part([[maybe_unused]] int ranks) {
  auto& p = parts_[ranks];
#ifdef PARTITA_MPI
  if (!p) p = mpi_part(timeout_s_, ranks);
#endif
  return *p;
}

}  // namespace partita::cli
