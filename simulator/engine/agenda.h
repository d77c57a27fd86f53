// simulator/engine/agenda.h: what happens when, all of one instant together.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <unordered_map>
#include <vector>

namespace partita {

/// Times in a heap, and a list for each: instants of symmetric programs are few and full.
template <class What>
class Agenda {
 public:
  void add(std::int64_t time, What what) {
    const auto [it, fresh] = at_.try_emplace(time, 0);
    if (fresh) {
      if (unused_.empty()) {
        unused_.push_back(lists_.size());
        lists_.emplace_back();
      }
      it->second = unused_.back();
      unused_.pop_back();
      times_.push(time);
    }
    lists_[it->second].push_back(what);
  }
  bool empty() const { return times_.empty(); }
  std::int64_t next() const { return times_.top(); }
  /// Everything of the next instant.
  void take(std::vector<What>& into) {
    const auto it = at_.find(times_.top());
    into.clear();
    into.swap(lists_[it->second]);
    unused_.push_back(it->second);
    at_.erase(it);
    times_.pop();
  }

 private:
  std::priority_queue<std::int64_t, std::vector<std::int64_t>, std::greater<>> times_;
  std::unordered_map<std::int64_t, std::size_t> at_;
  std::vector<std::vector<What>> lists_;
  std::vector<std::size_t> unused_;
};

}  // namespace partita
