// base/parallel.h: independent work on all cores, results in order.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace partita {

/// Calls f(worker, index) for every index in [0, count) on up to `workers` threads (0: one per
/// core). Rethrows the exception of the lowest index that failed. What f writes must depend on its
/// index only.
template <class F>
void parallel_for(std::size_t count, std::size_t workers, F f) {
  if (workers == 0) workers = std::max(1u, std::thread::hardware_concurrency());
  workers = std::min(workers, count);
  std::atomic<std::size_t> next{0};
  std::mutex guard;
  std::exception_ptr failure;
  std::size_t failed_at = count;
  const auto work = [&](std::size_t worker) {
    for (;;) {
      const std::size_t i = next.fetch_add(1);
      if (i >= count) return;
      try {
        f(worker, i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        if (i < failed_at) failed_at = i, failure = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t w = 1; w < workers; ++w) threads.emplace_back(work, w);
  if (workers > 0) work(0);
  for (auto& t : threads) t.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace partita
