// runtime/cuda/run_table.h: lists of runs as kernels read them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "runtime/execute/pieces.h"

namespace partita::cuda {

/// Runs in the GPU's memory, with how many units lie before each; `even` > 0: each has so many, and
/// `before` is null.
struct RunTable {
  const execute::Run* runs = nullptr;
  const std::int64_t* before = nullptr;
  std::int64_t count = 0, units = 0, even = 0;
};

/// The same on the host, as it is copied to wherever it will lie.
struct RunNumbers {
  std::vector<std::int64_t> numbers;  ///< each run's offset and count, then what lies before it
  RunTable table;                     ///< without its addresses
  RunTable at(const void* where) const {
    RunTable t = table;
    t.runs = static_cast<const execute::Run*>(where);
    if (t.even == 0) t.before = static_cast<const std::int64_t*>(where) + 2 * t.count;
    return t;
  }
};
/// `words` of the runs' make a unit.
inline RunNumbers numbers_of(const std::vector<execute::Run>& runs, std::int64_t words = 1) {
  static_assert(sizeof(execute::Run) == 2 * sizeof(std::int64_t));
  RunNumbers n;
  n.table.count = static_cast<std::int64_t>(runs.size());
  n.numbers.reserve(3 * runs.size());
  bool even = true;
  for (const execute::Run& r : runs) {
    n.numbers.push_back(r.offset / words);
    n.numbers.push_back(r.count / words);
    even &= r.count == runs[0].count;
    n.table.units += r.count / words;
  }
  if (even && !runs.empty()) {
    n.table.even = runs[0].count / words;
  } else {
    std::int64_t before = 0;
    for (const execute::Run& r : runs) {
      n.numbers.push_back(before);
      before += r.count / words;
    }
  }
  return n;
}
/// Do all of them begin and end at multiples of so many words?
inline bool whole(const std::vector<execute::Run>& runs, std::int64_t words) {
  return std::all_of(runs.begin(), runs.end(), [&](const execute::Run& r) {
    return r.offset % words == 0 && r.count % words == 0;
  });
}

}  // namespace partita::cuda
