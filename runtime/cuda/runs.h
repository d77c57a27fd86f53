// runtime/cuda/runs.h: packing and unpacking of runs over any machine (operators.h).
#pragma once

#include "base/element_type.h"
#include "runtime/cuda/machine.h"
#include "runtime/cuda/run_table.h"

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

/// Where packed unit i lies.
PARTITA_BOTH std::int64_t place_of(const RunTable& t, std::int64_t i) {
  if (t.even > 0) return t.runs[i / t.even].offset + i % t.even;
  const std::int64_t r = run_of(t.before, t.count, i);
  return t.runs[r].offset + i - t.before[r];
}
/// 16 bytes that lie on a multiple of as many.
struct alignas(16) Wide {
  std::uint64_t w[2];
};
/// `unpacks`: from packed units to their places.
template <class Unit, class M>
void move_runs(M& m, const RunTable& table, const std::byte* from, std::byte* to, bool unpacks) {
  const auto* source = reinterpret_cast<const Unit*>(from);
  auto* target = reinterpret_cast<Unit*>(to);
  const RunTable t = table;
  m.each(
      t.units, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t place = place_of(t, i);
        if (unpacks) {
          target[place] = source[i];
        } else {
          target[i] = source[place];
        }
      });
}
/// A unit of `unit` bytes: 2, 4 or 16.
template <class M>
void move_runs(M& m, const RunTable& t, std::int64_t unit, const std::byte* from, std::byte* to,
               bool unpacks) {
  if (unit == 16) {
    move_runs<Wide>(m, t, from, to, unpacks);
  } else if (unit == 2) {
    move_runs<std::uint16_t>(m, t, from, to, unpacks);
  } else {
    move_runs<std::uint32_t>(m, t, from, to, unpacks);
  }
}
template <class M>
void add_runs(M& m, const RunTable& table, ElementType type, const std::byte* from, std::byte* to) {
  const RunTable t = table;
  m.each(
      t.units, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t place = place_of(t, i);
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
