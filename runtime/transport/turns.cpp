#include "runtime/transport/turns.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

namespace partita {

Turns::Turns(int ranks, std::vector<int> cores)
    : places_(static_cast<std::size_t>(ranks)), all_(std::move(cores)) {
  cpu_set_t mine;
  CPU_ZERO(&mine);
  if (all_.empty() && ::sched_getaffinity(0, sizeof mine, &mine) == 0) {
    for (int c = 0; c < CPU_SETSIZE; ++c) {
      if (CPU_ISSET(c, &mine)) all_.push_back(c);
    }
  }
  binds_ = !all_.empty() && places_.size() > all_.size();
  if (all_.empty()) {  // more than such a set can hold: nobody is bound to any
    for (int c = 0; c < std::max(1, static_cast<int>(std::thread::hardware_concurrency())); ++c)
      all_.push_back(c);
  }
  idle_.assign(all_.rbegin(), all_.rend());
}

void Turns::bind(Place& p, int core) const {
  if (!binds_ || !p.known || p.bound == core) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int c : all_) {
    if (core == kNone || c == core) CPU_SET(static_cast<std::size_t>(c), &set);
  }
  // Where that is not allowed the system places threads as it likes.
  ::pthread_setaffinity_np(p.thread, sizeof set, &set);
  p.bound = core;
}

void Turns::give(Place& to, int core) {
  to.core = core;
  bind(to, core);
}

void Turns::pass_on(Place& from) {
  const int core = from.core;
  if (core == kNone) return;
  from.core = kNone;
  if (queue_.empty()) {
    idle_.push_back(core);
    return;
  }
  const int rank = queue_.front();
  Place& next = places_[static_cast<std::size_t>(rank)];
  leave_queue(rank);
  give(next, core);
  next.may_run = true;
  next.turn.notify_one();
}

void Turns::leave_queue(int rank) {
  places_[static_cast<std::size_t>(rank)].queues = false;
  queue_.erase(std::find(queue_.begin(), queue_.end(), rank));
  queued_.store(static_cast<int>(queue_.size()), std::memory_order_relaxed);
}

bool Turns::wait(int rank, std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(guard_);
  Place& p = places_[static_cast<std::size_t>(rank)];
  p.thread = ::pthread_self();
  p.known = true;
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(timeout);
  if (!p.may_run) pass_on(p);
  p.waits = true;
  bool came = true;
  while (!p.may_run) {
    const auto now = Clock::now();
    if (p.queues && (stopped_ || now - p.since >= kPatience)) {
      leave_queue(rank);
      bind(p, kNone);
      break;
    }
    if (!p.queues && (stopped_ || now >= end)) {
      came = false;
      break;
    }
    // Who comes to queue is not told so: it looks from time to time.
    p.turn.wait_until(
        lock, p.queues ? p.since + kPatience : std::min<Clock::time_point>(end, now + kPatience));
  }
  p.waits = p.may_run = false;
  return came;
}

void Turns::ready(int rank) {
  const std::lock_guard<std::mutex> lock(guard_);
  Place& p = places_[static_cast<std::size_t>(rank)];
  if (!p.waits) {
    p.may_run = true;  // before it began to wait
  } else if (!idle_.empty()) {
    // Its last one, if that is free.
    const auto last = std::find(idle_.begin(), idle_.end(), p.bound);
    const auto one = last == idle_.end() ? idle_.end() - 1 : last;
    const int core = *one;
    idle_.erase(one);
    give(p, core);
    p.may_run = true;
    p.turn.notify_one();
  } else {
    p.queues = true;
    p.since = Clock::now();
    queue_.push_back(rank);
    queued_.store(static_cast<int>(queue_.size()), std::memory_order_relaxed);
  }
}

void Turns::enter(int rank) {
  const std::lock_guard<std::mutex> lock(guard_);
  Place& p = places_[static_cast<std::size_t>(rank)];
  if (p.core != kNone || idle_.empty()) return;
  p.thread = ::pthread_self();
  p.known = true;
  const int core = idle_.back();
  idle_.pop_back();
  give(p, core);
}

void Turns::leave(int rank) {
  const std::lock_guard<std::mutex> lock(guard_);
  Place& p = places_[static_cast<std::size_t>(rank)];
  pass_on(p);
  if (p.known && ::pthread_equal(p.thread, ::pthread_self()) != 0) bind(p, kNone);
}

int Turns::waiting() {
  const std::lock_guard<std::mutex> lock(guard_);
  return static_cast<int>(
      std::count_if(places_.begin(), places_.end(), [](const Place& p) { return p.waits; }));
}

void Turns::stop() {
  const std::lock_guard<std::mutex> lock(guard_);
  stopped_ = true;
  for (Place& p : places_) p.turn.notify_one();
}

}  // namespace partita
