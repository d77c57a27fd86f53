// runtime/cuda/operands.h: what operators' kernels read and write, and what they share.
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cpu/kernels.h"
#include "runtime/cuda/machine.h"

namespace partita::cuda {

using cpu::Arguments;
using cpu::Indices;
using cpu::Tensor;
using reference::Context;

/// By octets of a row where rows are whole octets, else by element: f(row, first, count).
template <class M, class F>
void each_of_rows(M& m, std::int64_t rows, std::int64_t n, F f) {
  const std::int64_t step = n % Octet::kSize == 0 ? Octet::kSize : 1, pieces = n / step;
  m.each(rows * pieces, RowPieces<F>{pieces, step, f});
}
inline std::int64_t extent(const Tensor& t, std::size_t first, std::size_t last) {
  std::int64_t n = 1;
  for (std::size_t d = first; d < last; ++d) n *= static_cast<std::int64_t>((*t.index)[d].size());
  return n;
}
inline Numbers numbers(const Tensor& t) { return {t.values, t.type}; }
inline bool wanted(const Arguments& a, std::size_t k) {
  return k < a.results.size() && static_cast<bool>(a.results[k]);
}
inline std::int64_t at_least_1(std::int64_t n) { return n > 1 ? n : 1; }
inline bool any_rows(const Arguments& a) {
  for (const auto* list : {&a.inputs, &a.outputs, &a.output_gradients, &a.results}) {
    for (const Tensor& t : *list) {
      if (t && t.rows != nullptr) return true;
    }
  }
  return false;
}

/// Of `type`, as scratch.
template <class M>
Numbers scratch(M& m, std::int64_t n, ElementType type) {
  return {m.scratch(type == ElementType::fp32 ? n : (n + 1) / 2), type};
}

template <class M>
void copy_values(M& m, Numbers from, Numbers to, std::int64_t n) {
  map_one(
      m, n, from, to, PARTITA_KERNEL(float v) { return v; });
}
template <class M>
void fill_values(M& m, Numbers to, std::int64_t n, float value) {
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        Octet o;
        for (int k = 0; k < Octet::kSize; ++k) o.v[k] = value;
        put(to, number * Octet::kSize, n - number * Octet::kSize, o);
      });
}

/// to[column] (+)= sum over rows of y[row, column], in two stages so that its order is fixed.
template <class M>
void sum_columns(M& m, Numbers y, std::int64_t rows, std::int64_t columns, Numbers to,
                 bool accumulate) {
  const std::int64_t chunk = 64, chunks = (rows + chunk - 1) / chunk;
  float* parts = m.scratch(chunks * columns);
  m.each(
      chunks * columns, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t first = i / columns * chunk, column = i % columns;
        const std::int64_t end = first + chunk < rows ? first + chunk : rows;
        float sum = 0;
        for (std::int64_t r = first; r < end; ++r) sum += y[r * columns + column];
        parts[i] = sum;
      });
  m.each(
      columns, PARTITA_KERNEL(std::int64_t c) {
        float sum = 0;
        for (std::int64_t k = 0; k < chunks; ++k) sum += parts[k * columns + c];
        to[c] = accumulate ? to[c] + sum : sum;
      });
}

/// y[i] = x[i] + b[i % columns].
template <class M>
void add_columns(M& m, Numbers x, Numbers b, Numbers y, std::int64_t n, std::int64_t columns) {
  const bool whole = columns % Octet::kSize == 0;  // an octet is of one row
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        const std::int64_t first = number * Octet::kSize, count = n - first;
        Octet o = octet(x, first, count);
        if (whole) {
          const Octet c = octet(b, first % columns, Octet::kSize);
          for (int k = 0; k < Octet::kSize; ++k) o.v[k] += c.v[k];
        } else {
          for (std::int64_t k = 0; k < Octet::kSize && k < count; ++k)
            o.v[k] += b[(first + k) % columns];
        }
        put(y, first, count, o);
      });
}

struct Curve {
  float value, slope;
};
PARTITA_BOTH Curve curve(ActivationKind kind, float x) {
  constexpr float kRoot2 = 1.41421356237309505f, kInverseRoot2Pi = 0.39894228040143268f,
                  kRoot2OverPi = 0.79788456080286536f;
  switch (kind) {
    case ActivationKind::relu:
      return {x > 0 ? x : 0.0f, x > 0 ? 1.0f : 0.0f};
    case ActivationKind::squared_relu:
      return {x > 0 ? x * x : 0.0f, x > 0 ? 2 * x : 0.0f};
    case ActivationKind::gelu: {
      const float half = 0.5f * (1 + erff(x / kRoot2));
      return {x * half, half + x * expf(-0.5f * x * x) * kInverseRoot2Pi};
    }
    case ActivationKind::gelu_tanh: {
      const float t = tanhf(kRoot2OverPi * (x + 0.044715f * x * x * x));
      return {0.5f * x * (1 + t),
              0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kRoot2OverPi * (1 + 3 * 0.044715f * x * x)};
    }
    case ActivationKind::silu: {
      const float s = 1 / (1 + expf(-x));
      return {x * s, s * (1 + x * (1 - s))};
    }
    case ActivationKind::sigmoid: {
      const float s = 1 / (1 + expf(-x));
      return {s, s * (1 - s)};
    }
    case ActivationKind::tanh: {
      const float t = tanhf(x);
      return {t, 1 - t * t};
    }
  }
  return {0, 0};
}

}  // namespace partita::cuda
