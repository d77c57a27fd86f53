// runtime/cuda/runs.h: packing and unpacking of runs over any machine (operators.h).
#pragma once

#include "base/element_type.h"
#include "runtime/cuda/machine.h"
#include "runtime/execute/pieces.h"

namespace partita::cuda {

/// Which run packed word i belongs to: the last with no more than i words before it.
PARTITA_BOTH std::int64_t run_of(const std::int64_t* before, std::int64_t count, std::int64_t i) {
  std::int64_t low = 0, high = count - 1;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (before[middle] <= i) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

/// `T` is a runs' table: runs, before, count, words. `unpacks`: from packed words to their places.
template <class Word, class M, class T>
void move_runs(M& m, const T& table, const std::byte* from, std::byte* to, bool unpacks) {
  const auto* source = reinterpret_cast<const Word*>(from);
  auto* target = reinterpret_cast<Word*>(to);
  const T t = table;
  m.each(
      t.words, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t r = run_of(t.before, t.count, i);
        const std::int64_t place = t.runs[r].offset + i - t.before[r];
        if (unpacks) {
          target[place] = source[i];
        } else {
          target[i] = source[place];
        }
      });
}
template <class M, class T>
void add_runs(M& m, const T& table, ElementType type, const std::byte* from, std::byte* to) {
  const T t = table;
  m.each(
      t.words, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t r = run_of(t.before, t.count, i);
        const std::int64_t place = t.runs[r].offset + i - t.before[r];
        if (type == ElementType::fp32) {
          reinterpret_cast<float*>(to)[place] += reinterpret_cast<const float*>(from)[i];
          return;
        }
        const std::uint16_t own = reinterpret_cast<const std::uint16_t*>(to)[place],
                            other = reinterpret_cast<const std::uint16_t*>(from)[i];
        reinterpret_cast<std::uint16_t*>(to)[place] =
            type == ElementType::bf16 ? to_bf16(from_bf16(own) + from_bf16(other))
                                      : to_fp16(from_fp16(own) + from_fp16(other));
      });
}

}  // namespace partita::cuda
