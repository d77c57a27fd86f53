#include "runtime/execute/threads.h"

#include <exception>
#include <mutex>
#include <thread>

#include "base/error.h"

namespace partita::execute {

std::vector<RankResult> run_threads(const Program& program, const Options& options,
                                    const ThreadOptions& threads) {
  const auto n = static_cast<int>(program.ranks());
  auto hub = make_thread_hub(n, threads.timeout_s, threads.algorithm);
  std::vector<RankResult> results(static_cast<std::size_t>(n));
  std::mutex guard;
  std::exception_ptr first;
  bool first_is_peer = false;
  const auto work = [&](int rank) {
    const auto transport = thread_transport(hub, rank);
    const auto note = [&](bool peer, const std::string& why) {
      const std::lock_guard<std::mutex> lock(guard);
      // The cause before those who only heard of it.
      if (!first || (first_is_peer && !peer))
        first = std::current_exception(), first_is_peer = peer;
      transport->abort(why, 3);
    };
    try {
      results[static_cast<std::size_t>(rank)] = run_rank(program, *transport, options);
    } catch (const PeerError& e) {
      note(true, e.what());
    } catch (const MachineError& e) {
      note(false, e.what());
    } catch (const std::exception& e) {
      note(false, "rank " + std::to_string(rank) + ": " + e.what());
    }
  };
  std::vector<std::thread> all;
  for (int r = 1; r < n; ++r) all.emplace_back(work, r);
  work(0);
  for (auto& t : all) t.join();
  if (first) std::rethrow_exception(first);
  return results;
}

}  // namespace partita::execute
