// runtime/cuda/operators/linear.h: products with weights, also in 8 bits (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

/// `from` [rows, columns], or its transpose, times scale_of its largest number, rounded; rows are
/// padded to whole pieces of 16, and zero ones added to a multiple of `pieces`.
template <class M>
Eights rounded_eights(M& m, EightBits format, Numbers from, std::int64_t rows, std::int64_t columns,
                      bool turned, std::int64_t pieces) {
  const std::int64_t n = rows * columns, chunk = 1 << 16, chunks = (n + chunk - 1) / chunk;
  float* parts = m.scratch(chunks + 2);
  float *const scale = parts + chunks, *const inverse = scale + 1;
  m.rows(
      chunks, 4096, PARTITA_KERNEL(std::int64_t part, const Lanes& lanes) {
        const std::int64_t end = (part + 1) * chunk < n ? (part + 1) * chunk : n;
        double top = 0;
        for (std::int64_t i = part * chunk + lanes.lane() * Octet::kSize; i < end;
             i += lanes.count() * Octet::kSize) {
          const Octet o = octet(from, i, end - i);
          for (int e = 0; e < Octet::kSize; ++e) top = fmax(top, fabs(static_cast<double>(o.v[e])));
        }
        top = lanes.max(top);
        if (lanes.lane() == 0) parts[part] = static_cast<float>(top);
      });
  m.rows(
      1, chunks, PARTITA_KERNEL(std::int64_t, const Lanes& lanes) {
        double top = 0;
        for (std::int64_t i = lanes.lane(); i < chunks; i += lanes.count())
          top = fmax(top, static_cast<double>(parts[i]));
        top = lanes.max(top);
        if (lanes.lane() != 0) return;
        *scale = scale_of(format, static_cast<float>(top));
        *inverse = 1 / *scale;
      });
  Eights e;
  e.format = format;
  e.rows = turned ? columns : rows;
  e.padded = (e.rows + pieces - 1) / pieces * pieces;
  e.columns = turned ? rows : columns;
  e.stride = (e.columns + 15) / 16 * 16;
  e.at = reinterpret_cast<std::uint8_t*>(m.scratch((e.padded * e.stride + 3) / 4));
  e.inverse = inverse;
  const std::int64_t across = e.stride / Octet::kSize;
  if (!turned) {
    m.each(
        e.padded * across, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t row = i / across, column = i % across * Octet::kSize;
          Octet o{};
          if (row < e.rows && column < e.columns)
            o = octet(from, row * e.columns + column, e.columns - column);
          std::uint64_t bits = 0;
          for (int k = 0; k < Octet::kSize; ++k)
            bits |= static_cast<std::uint64_t>(to_eight(e.format, o.v[k] * *scale)) << 8 * k;
          store_bytes(e.at + i * Octet::kSize, bits);
        });
    return e;
  }
  // Squares of 8 x 8. A warp's are 8 down and 4 across, so that it reads 128 bytes of 16-bit
  // numbers and writes 32 in a row.
  constexpr std::int64_t kDown = 8, kAcross = 4;
  const std::int64_t down = (e.padded + Octet::kSize - 1) / Octet::kSize,
                     blocks_down = (down + kDown - 1) / kDown,
                     blocks_across = (across + kAcross - 1) / kAcross;
  m.each(
      blocks_down * kDown * blocks_across * kAcross, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t block = i / (kDown * kAcross),
                           row = (block % blocks_down * kDown + i / kAcross % kDown) * Octet::kSize,
                           column = (block / blocks_down * kAcross + i % kAcross) * Octet::kSize;
        if (row >= e.padded || column >= e.stride) return;
        std::uint64_t bits[Octet::kSize] = {};
        for (int k = 0; k < Octet::kSize; ++k) {
          Octet o{};
          if (column + k < e.columns && row < e.rows)
            o = octet(from, (column + k) * e.rows + row, e.rows - row);
          for (int j = 0; j < Octet::kSize; ++j)
            bits[j] |= static_cast<std::uint64_t>(to_eight(e.format, o.v[j] * *scale)) << 8 * k;
        }
        for (int j = 0; j < Octet::kSize && row + j < e.padded; ++j)
          store_bytes(e.at + (row + j) * e.stride + column, bits[j]);
      });
  return e;
}
/// c[m, n] = a[m, k] · b[k, n] + beta · c of operands rounded to 8 bits, which lie as in a Product,
/// without gaps; false where the machine cannot.
template <class M>
bool product_of_eights(M& m, const Product& p, EightBits of_a) {
  if (p.batch != 1 || !m.has_eights()) return false;
  // cuBLASLt's: whole pieces of 16 of what lies in a row of c.
  constexpr std::int64_t kPiece = 16;
  EightProduct e;
  e.a = p.a.transposed ? rounded_eights(m, of_a, p.a.at, p.k, p.m, true, 1)
                       : rounded_eights(m, of_a, p.a.at, p.m, p.k, false, 1);
  e.b = p.b.transposed ? rounded_eights(m, EightBits::e4m3, p.b.at, p.n, p.k, false, kPiece)
                       : rounded_eights(m, EightBits::e4m3, p.b.at, p.k, p.n, true, kPiece);
  e.passing = p.passing;
  if (e.b.padded == p.n) {
    e.c = p.c, e.beta = p.beta;
    m.product(e);
    return true;
  }
  // Else beside c, in fp32, and from there in one rounding.
  const std::int64_t n = p.n, wide = e.b.padded, stride = p.c.stride;
  const Numbers sums = m.scratch(p.m * wide), to = p.c.at;
  e.c = {sums, wide, 0, false};
  m.product(e);
  const bool adds = p.beta != 0;
  m.each(
      p.m * n, PARTITA_KERNEL(std::int64_t i) {
        const float sum = sums[i / n * wide + i % n];
        const auto c = to[i / n * stride + i % n];
        c = adds ? c + sum : sum;
      });
  return true;
}
/// By the context's type of products. `gradient`: a is an output's.
template <class M>
bool multiply(M& m, const Context& c, const Product& p, bool gradient) {
  if (c.compute == ElementType::fp8)
    return product_of_eights(m, p, gradient ? of_gradients(c.fp8_format) : EightBits::e4m3);
  m.product(p);
  return true;
}

template <class M>
bool forward(M& m, const Linear& op, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &w = a.parameters[0];
  const std::size_t batch = x.index->size() - static_cast<std::size_t>(op.contracted);
  const std::int64_t rows = extent(x, 0, batch), in = extent(x, batch, x.index->size());
  if (rows == 0 || in == 0 || x.type != w.type) return false;
  const std::int64_t out = w.size() / in;
  const Numbers y = numbers(a.results[0]),
                bias = op.bias && c.adds_bias ? numbers(a.parameters[1]) : Numbers(nullptr);
  // Of 16 bits the product adds it before it rounds; else it is a kernel of its own.
  bool inside = bias != nullptr && y.narrow() && bias.type() == y.type() &&
                c.compute != ElementType::fp8 &&
                reinterpret_cast<std::uintptr_t>(bias.data()) % 16 == 0;
  Product p{
      rows, out, in, {numbers(x), in, 0, false}, {numbers(w), in, 0, true}, {y, out, 0, false}};
  if (inside) {
    p.bias = bias;
    inside = m.product(p);
    p.bias = nullptr;
  }
  if (!inside && !multiply(m, c, p, false)) return false;
  if (bias != nullptr && !inside) add_columns(m, y, bias, y, rows * out, out);
  return true;
}
template <class M>
bool data(M& m, const Linear&, const Context& c, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &w = a.parameters[0], &dx = a.results[0];
  // rows · in = all, rows · out = grads, in · out = weights: the input itself need not be kept.
  const std::int64_t weights = w.size(), all = dx.size(), grads = dy.size();
  if (weights == 0 || all == 0 || grads == 0 || dy.type != w.type) return false;
  const auto rows = static_cast<std::int64_t>(std::llround(std::sqrt(
      static_cast<double>(all) * static_cast<double>(grads) / static_cast<double>(weights))));
  const std::int64_t in = all / rows, out = grads / rows;
  return multiply(m, c,
                  {rows,
                   in,
                   out,
                   {numbers(dy), out, 0, false},
                   {numbers(w), in, 0, false},
                   {numbers(dx), in, 0, false},
                   1,
                   1,
                   a.accumulate ? 1.0f : 0.0f},
                  true);
}
template <class M>
bool weight(M& m, const Linear& op, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0];
  const std::size_t batch = x.index->size() - static_cast<std::size_t>(op.contracted);
  const std::int64_t rows = extent(x, 0, batch), in = extent(x, batch, x.index->size());
  if (rows == 0 || in == 0 || x.type != dy.type) return false;
  const std::int64_t out = dy.size() / rows;
  if (wanted(a, 0)) {
    if (!multiply(m, c,
                  {out,
                   in,
                   rows,
                   {numbers(dy), out, 0, true},
                   {numbers(x), in, 0, false},
                   {numbers(a.results[0]), in, 0, false},
                   1,
                   1,
                   a.accumulate ? 1.0f : 0.0f},
                  true))
      return false;
  }
  if (op.bias && wanted(a, 1)) {
    if (c.adds_bias) {
      sum_columns(m, numbers(dy), rows, out, numbers(a.results[1]), a.accumulate);
    } else if (!a.accumulate) {
      fill_values(m, numbers(a.results[1]), out, 0);
    }
  }
  return true;
}

template <class M>
bool forward(M& m, const AddBias&, const Context&, const Arguments& a) {
  const std::int64_t n = a.parameters[0].size();
  const Numbers x = numbers(a.inputs[0]), b = numbers(a.parameters[0]);
  const Numbers y = numbers(a.results[0]);
  add_columns(m, x, b, y, a.inputs[0].size(), n);
  return true;
}
template <class M>
bool weight(M& m, const AddBias&, const Context&, const Arguments& a) {
  const std::int64_t n = a.results[0].size();
  if (n > 0)
    sum_columns(m, numbers(a.output_gradients[0]), a.output_gradients[0].size() / n, n,
                numbers(a.results[0]), a.accumulate);
  return true;
}

}  // namespace partita::cuda
