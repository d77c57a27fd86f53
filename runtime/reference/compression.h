// runtime/reference/compression.h: what gradient compression does to numbers (docs/compression.md).
//
// The same text for the interpreter's doubles, the executor's floats and the serial reference, so
// that they differ by rounding only. `p` is a rank's gradient plus what it kept of earlier steps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "base/element_type.h"
#include "simulator/program/program.h"

namespace partita::reference {

/// Top-k (arXiv 1712.01887): positions of the `k` values of largest magnitude, ascending; of equal
/// ones the first.
template <class T>
std::vector<std::uint32_t> top_positions(const T* p, std::int64_t n, std::int64_t k) {
  std::vector<std::uint32_t> at(static_cast<std::size_t>(n));
  std::iota(at.begin(), at.end(), 0u);
  const auto larger = [&](std::uint32_t a, std::uint32_t b) {
    const T x = std::abs(p[a]), y = std::abs(p[b]);
    return x > y || (x == y && a < b);
  };
  const auto end = at.begin() + static_cast<std::ptrdiff_t>(std::min(n, k));
  std::nth_element(at.begin(), end, at.end(), larger);
  at.erase(end, at.end());
  std::sort(at.begin(), at.end());
  return at;
}

/// One bit (arXiv 2102.02888, section 4): every value becomes its sign times the mean magnitude.
template <class T>
T mean_magnitude(const T* p, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += std::abs(static_cast<double>(p[i]));
  return n == 0 ? T{0} : static_cast<T>(sum / static_cast<double>(n));
}
/// Bit i of the words is 1 where value i is negative.
template <class T>
std::uint32_t sign_word(const T* p, std::int64_t n, std::int64_t word) {
  std::uint32_t bits = 0;
  for (std::int64_t i = 32 * word; i < std::min(n, 32 * word + 32); ++i)
    bits |= (p[i] < 0 ? 1u : 0u) << (i % 32);
  return bits;
}

/// PowerSGD (arXiv 1905.13727, algorithm 1) on a rows x cols matrix, rank r; all row-major.
struct PowerShape {
  std::int64_t rows = 0, cols = 0, rank = 0;
};
/// p = m q: rows x r.
template <class T>
void power_left(const PowerShape& s, const T* m, const T* q, T* p) {
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t k = 0; k < s.rank; ++k) {
      double sum = 0;
      for (std::int64_t j = 0; j < s.cols; ++j)
        sum += static_cast<double>(m[i * s.cols + j]) * static_cast<double>(q[j * s.rank + k]);
      p[i * s.rank + k] = static_cast<T>(sum);
    }
  }
}
/// q = mᵀ p: cols x r.
template <class T>
void power_right(const PowerShape& s, const T* m, const T* p, T* q) {
  std::vector<double> sum(static_cast<std::size_t>(s.cols * s.rank), 0.0);
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = 0; j < s.cols; ++j) {
      for (std::int64_t k = 0; k < s.rank; ++k)
        sum[static_cast<std::size_t>(j * s.rank + k)] +=
            static_cast<double>(m[i * s.cols + j]) * static_cast<double>(p[i * s.rank + k]);
    }
  }
  for (std::size_t x = 0; x < sum.size(); ++x) q[x] = static_cast<T>(sum[x]);
}
/// Gram-Schmidt on the columns of the rows x r matrix `p`. What the columns before explain up to
/// rounding becomes zero, not noise of length 1.
template <class T>
void orthonormalise(const PowerShape& s, T* p) {
  for (std::int64_t k = 0; k < s.rank; ++k) {
    const auto dot = [&](std::int64_t a, std::int64_t b) {
      double sum = 0;
      for (std::int64_t i = 0; i < s.rows; ++i)
        sum += static_cast<double>(p[i * s.rank + a]) * static_cast<double>(p[i * s.rank + b]);
      return sum;
    };
    const double before = std::sqrt(dot(k, k));
    for (int twice = 0; twice < 2; ++twice) {
      for (std::int64_t l = 0; l < k; ++l) {
        const double along = dot(k, l);
        for (std::int64_t i = 0; i < s.rows; ++i)
          p[i * s.rank + k] -= static_cast<T>(along * static_cast<double>(p[i * s.rank + l]));
      }
    }
    const double length = std::sqrt(dot(k, k));
    const double scale = length > 1e-3 * before && length > 0 ? 1 / length : 0;
    for (std::int64_t i = 0; i < s.rows; ++i)
      p[i * s.rank + k] = static_cast<T>(static_cast<double>(p[i * s.rank + k]) * scale);
  }
}
/// m = p qᵀ.
template <class T>
void power_product(const PowerShape& s, const T* p, const T* q, T* m) {
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t j = 0; j < s.cols; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < s.rank; ++k)
        sum += static_cast<double>(p[i * s.rank + k]) * static_cast<double>(q[j * s.rank + k]);
      m[i * s.cols + j] = static_cast<T>(sum);
    }
  }
}

/// Element `linear` of PowerSGD's first right factor of a parameter.
double power_start(std::int32_t parameter, std::int64_t linear);

/// What the replicas of one parameter (or of one shard of it) exchange in a step, all at one place:
/// the serial reference of a compressed plan. `gradients[r]` are replica r's; `kept[r]` what it
/// kept of earlier steps (PowerSGD: `right` is the factor of the step before, empty in the first).
/// Returns the gradient that all replicas use.
struct Exchange {
  std::vector<std::vector<double>> kept;
  std::vector<double> right;
};
std::vector<double> exchange(const Compression& compression, const PowerShape& shape,
                             std::int32_t parameter,
                             const std::vector<std::vector<double>>& gradients, Exchange& state);

}  // namespace partita::reference
