// runtime/cuda/operators.h: the operators' kernels, over any machine (machine.h) that has
//
//   each(n, f)            f(i) for every i below n
//   rows(n, width, f)     f(row, lanes) for every row below n, of about `width` elements
//   product(p)            matrices
//   product(eights)       matrices in 8 bits, where it has_eights()
//   scratch(floats)       memory until the operator ends
//   scores()              of attention that may be in memory at once
//   flash(call, pass)     attention whose scores are in none (flash.h); false where it cannot
//   list(indices)         an IndexList, kept: it comes again
//   table(key, make)      what make() gives on the host, kept likewise by its key
//   upload(numbers)       an IndexList until the operator ends
//   read(numbers, n)      what they are once all before is done, on the host
//   convolve(shape, pass, x, w, y, adds)  fills y, x or w, by pass; `adds`: to w; false where it
//                         cannot
//
// Each returns false where it does not know the case: the caller then asks the host's kernel.
// Formulas are those of runtime/cpu/fast.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime/cpu/normalisation.h"
#include "runtime/cuda/flash.h"
#include "runtime/cuda/operands.h"
#include "runtime/cuda/state_space.h"

namespace partita::cuda {

// --------------------------------------------------------------------------- products in 8 bits

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

// ---------------------------------------------------------------------------------------- linear

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

// ------------------------------------------------------------------------------------ embeddings

template <class M>
bool forward(M& m, const Embedding&, const Context&, const Arguments& a) {
  const Tensor &ids = a.inputs[0], &table = a.parameters[0];
  if (ids.ids == nullptr) return false;
  const std::int64_t n = extent(table, 1, 2);
  const IndexList held = m.list((*table.index)[0]);
  const std::int64_t* id = ids.ids;
  const Numbers w = numbers(table);
  const Numbers y = numbers(a.results[0]);
  each_of_rows(
      m, ids.size(), n, PARTITA_KERNEL(std::int64_t at, std::int64_t first, std::int64_t count) {
        const std::int64_t row = held.find(id[at]);
        put(y, at * n + first, count, row < 0 ? Octet{} : octet(w, row * n + first, count));
      });
  return true;
}
template <class M>
bool data(M&, const Embedding&, const Context&, const Arguments& a) {
  return !wanted(a, 0);
}
/// Of a table of few rows (segments, say), whose chains would be too long for one block each: every
/// row's sum over all tokens, in two stages so that its order is fixed.
template <class M>
void sum_few_rows(M& m, const std::int64_t* id, std::int64_t tokens, const IndexList& held,
                  Numbers dy, std::int64_t n, Numbers w, bool accumulate) {
  const std::int64_t rows = held.size, chunk = 64, chunks = (tokens + chunk - 1) / chunk;
  float* parts = m.scratch(chunks * rows * n);
  m.each(
      chunks * rows * n, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t f = i % n, row = i / n % rows, first = i / (n * rows) * chunk,
                           end = first + chunk < tokens ? first + chunk : tokens,
                           wanted = held.at(row);
        float sum = 0;
        for (std::int64_t t = first; t < end; ++t) {
          if (id[t] == wanted) sum += dy[t * n + f];
        }
        parts[i] = sum;
      });
  m.each(
      rows * n, PARTITA_KERNEL(std::int64_t i) {
        float sum = 0;
        for (std::int64_t k = 0; k < chunks; ++k) sum += parts[k * rows * n + i];
        w[i] = accumulate ? w[i] + sum : sum;
      });
}
/// Tokens in the order of their rows, of one row in their own.
struct TokensByRow {
  std::int32_t *row, *token;
};
/// A token goes where its rank in its run is, then where it is in so many runs at a time: each
/// looks for its place in the others, of which those before it go first where rows are equal.
template <class M>
TokensByRow sorted_by_row(M& m, const std::int64_t* id, std::int64_t tokens,
                          const IndexList& held) {
  constexpr std::int64_t kRun = 64, kRuns = 8;
  // Rows and tokens below 2^31, as words.
  auto* const words = reinterpret_cast<std::int32_t*>(m.scratch(4 * tokens));
  TokensByRow from{words, words + tokens}, to{words + 2 * tokens, words + 3 * tokens};
  m.each(
      tokens, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t row = held.find(id[i]);
        from.row[i] = static_cast<std::int32_t>(row < 0 ? held.size : row);
      });
  m.each(
      tokens, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t first = i / kRun * kRun,
                           end = first + kRun < tokens ? first + kRun : tokens;
        const std::int32_t row = from.row[i];
        std::int64_t at = first;
        for (std::int64_t j = first; j < end; ++j)
          at += from.row[j] < row || (from.row[j] == row && j < i) ? 1 : 0;
        to.row[at] = row;
        to.token[at] = static_cast<std::int32_t>(i);
      });
  for (std::int64_t run = kRun; run < tokens; run *= kRuns) {
    std::swap(from, to);
    m.each(
        tokens, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t mine = i / run, all = mine / kRuns * kRuns;
          const std::int32_t row = from.row[i];
          std::int64_t at = all * run + i % run;
          for (std::int64_t r = all; r < all + kRuns && r * run < tokens; ++r) {
            const std::int64_t left = tokens - r * run;
            if (r != mine)
              at +=
                  not_below(from.row + r * run, left < run ? left : run, row + (r < mine ? 1 : 0));
          }
          to.row[at] = row;
          to.token[at] = from.token[i];
        });
  }
  return to;
}
/// Sums of rows' tokens, in two stages so that one row of many tokens keeps many threads busy: by
/// chunks of the tokens in their rows' order, then of what lies in several chunks.
template <class M>
void sum_sorted(M& m, const TokensByRow& by, std::int64_t tokens, std::int64_t rows, Numbers dy,
                std::int64_t n, Numbers w, bool accumulate) {
  constexpr std::int64_t kChunk = 32, kAtOnce = 4;
  const std::int64_t chunks = (tokens + kChunk - 1) / kChunk;
  // Of a chunk's first row, if it begins before it; of its last, if it begins in it and goes on.
  const Numbers heads = m.scratch(chunks * n), tails = m.scratch(chunks * n);
  each_of_rows(
      m, chunks, n, PARTITA_KERNEL(std::int64_t chunk, std::int64_t first, std::int64_t count) {
        const std::int64_t begin = chunk * kChunk,
                           end = begin + kChunk < tokens ? begin + kChunk : tokens;
        std::int32_t row = by.row[begin];
        bool head = begin > 0 && by.row[begin - 1] == row;
        const bool goes_on = end < tokens && by.row[end - 1] == by.row[end];
        Octet sum{};
        const auto give = [&](bool tail) {
          if (row == rows) return;
          if (head || tail) {
            put(head ? heads : tails, chunk * n + first, count, sum);
            return;
          }
          const std::int64_t at = row * n + first;
          if (accumulate) {
            const Octet had = octet(w, at, count);
            for (int e = 0; e < Octet::kSize; ++e) sum.v[e] = had.v[e] + sum.v[e];
          }
          put(w, at, count, sum);
        };
        for (std::int64_t t = begin; t < end; t += kAtOnce) {
          Raw raw[kAtOnce];
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k) {
            const std::int64_t at = t + k < end ? t + k : end - 1;
            raw[k] = raw_octet(dy, by.token[at] * n + first, count);
          }
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k) {
            if (t + k >= end) break;
            if (by.row[t + k] != row) {
              give(false);
              head = false, row = by.row[t + k], sum = Octet{};
            }
            const Octet o = octet_of(raw[k], dy.type());
            for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += o.v[e];
          }
        }
        give(goes_on);
      });
  each_of_rows(
      m, chunks, n, PARTITA_KERNEL(std::int64_t chunk, std::int64_t first, std::int64_t count) {
        const std::int64_t begin = chunk * kChunk, end = begin + kChunk;
        if (end >= tokens || by.row[end - 1] != by.row[end]) return;
        const std::int32_t row = by.row[end - 1];
        // It begins in an earlier chunk, or is of no row here.
        if (row == rows || (begin > 0 && by.row[begin - 1] == row)) return;
        const std::int64_t last =
            (end + not_below(by.row + end, tokens - end, row + 1) - 1) / kChunk;
        Octet sum = octet(tails, chunk * n + first, count);
        for (std::int64_t c = chunk + 1; c <= last; c += kAtOnce) {
          Raw raw[kAtOnce];
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k)
            raw[k] = raw_octet(heads, (c + k < last ? c + k : last) * n + first, count);
          PARTITA_UNROLL
          for (std::int64_t k = 0; k < kAtOnce; ++k) {
            if (c + k > last) break;
            const Octet o = octet_of(raw[k], ElementType::fp32);
            for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += o.v[e];
          }
        }
        const std::int64_t at = row * n + first;
        if (accumulate) {
          const Octet had = octet(w, at, count);
          for (int e = 0; e < Octet::kSize; ++e) sum.v[e] = had.v[e] + sum.v[e];
        }
        put(w, at, count, sum);
      });
}
template <class M>
bool weight(M& m, const Embedding&, const Context&, const Arguments& a) {
  const Tensor &ids = a.inputs[0], &table = a.results[0];
  if (ids.ids == nullptr) return false;
  const std::int64_t n = extent(table, 1, 2), tokens = ids.size();
  const IndexList held = m.list((*table.index)[0]);
  const std::int64_t* id = ids.ids;
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers w = numbers(table);
  constexpr std::int64_t kFewRows = 4;
  if (held.size <= kFewRows) {
    sum_few_rows(m, id, tokens, held, dy, n, w, a.accumulate);
    return true;
  }
  if (!a.accumulate) fill_values(m, w, table.size(), 0);
  sum_sorted(m, sorted_by_row(m, id, tokens, held), tokens, held.size, dy, n, w, a.accumulate);
  return true;
}
template <class M>
bool forward(M& m, const PositionEmbedding&, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &table = a.parameters[0];
  const std::int64_t n = extent(x, 2, 3), tokens = extent(x, 1, 2);
  const IndexList held = m.list((*table.index)[0]), positions = m.list((*x.index)[1]);
  const Numbers from = numbers(x), w = numbers(table);
  const Numbers y = numbers(a.results[0]);
  each_of_rows(
      m, x.size() / n, n, PARTITA_KERNEL(std::int64_t at, std::int64_t first, std::int64_t count) {
        const Octet a_part = octet(from, at * n + first, count),
                    place = octet(w, held.find(positions.at(at % tokens)) * n + first, count);
        Octet to;
        for (int k = 0; k < Octet::kSize; ++k) to.v[k] = a_part.v[k] + place.v[k];
        put(y, at * n + first, count, to);
      });
  return true;
}
template <class M>
bool weight(M& m, const PositionEmbedding&, const Context&, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &table = a.results[0];
  const std::int64_t n = extent(dy, 2, 3), tokens = extent(dy, 1, 2), samples = extent(dy, 0, 1);
  const bool accumulate = a.accumulate;
  const IndexList held = m.list((*table.index)[0]), positions = m.list((*dy.index)[1]);
  const Numbers d = numbers(dy);
  const Numbers w = numbers(table);
  m.each(
      table.size(), PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t token = positions.find(held.at(i / n));
        float sum = accumulate ? w[i] : 0.0f;
        for (std::int64_t s = 0; s < samples && token >= 0; ++s)
          sum += d[(s * tokens + token) * n + i % n];
        w[i] = sum;
      });
  return true;
}

// --------------------------------------------------------------------------------- normalisation

/// Local response normalisation over neighbouring features.
struct Neighbours {
  Numbers x;
  std::int64_t features = 0, stride = 0, before = 0, after = 0;
  float offset = 0, alpha = 0;  ///< of one square

  /// The divisor to the power of 1 / beta.
  PARTITA_LANE float base(std::int64_t i) const {
    const std::int64_t f = i / stride % features, down = f < before ? f : before,
                       left = features - 1 - f, up = left < after ? left : after;
    float squares = 0;
    for (std::int64_t k = -down; k <= up; ++k) {
      const float v = x[i + k * stride];
      squares += v * v;
    }
    return offset + alpha * squares;
  }
};
inline Neighbours neighbours_of(const Normalize& op, const Tensor& x) {
  Neighbours n;
  n.x = numbers(x);
  n.features = extent(x, 1, 2), n.stride = extent(x, 2, x.index->size());
  n.before = op.window / 2, n.after = (op.window - 1) / 2;
  n.offset = static_cast<float>(op.offset);
  n.alpha = static_cast<float>(op.alpha / static_cast<double>(op.window));
  return n;
}
template <class M>
bool normalised_locally(M& m, const Normalize& op, const Arguments& a) {
  const Neighbours n = neighbours_of(op, a.inputs[0]);
  const Numbers y = numbers(a.results[0]);
  const auto power = static_cast<float>(-op.beta);
  m.each(
      a.inputs[0].size(),
      PARTITA_KERNEL(std::int64_t i) { y[i] = n.x[i] * powf(n.base(i), power); });
  return true;
}
template <class M>
bool local_data(M& m, const Normalize& op, const Arguments& a) {
  const Neighbours n = neighbours_of(op, a.inputs[0]);
  const Numbers dy = numbers(a.output_gradients[0]), dx = numbers(a.results[0]);
  const std::int64_t size = a.inputs[0].size();
  const auto power = static_cast<float>(-op.beta);
  // What a feature sends to each of those that it was divided by, over theirs.
  float *const own = m.scratch(size), *const sent = m.scratch(size);
  m.each(
      size, PARTITA_KERNEL(std::int64_t i) {
        const float base = n.base(i), scaled = dy[i] * powf(base, power);
        own[i] = scaled;
        sent[i] = scaled * n.x[i] / base;
      });
  const float slope = 2 * static_cast<float>(op.beta) * n.alpha;
  m.each(
      size, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t f = i / n.stride % n.features, down = f < n.after ? f : n.after,
                           left = n.features - 1 - f, up = left < n.before ? left : n.before;
        float sum = 0;
        for (std::int64_t k = -down; k <= up; ++k) sum += sent[i + k * n.stride];
        dx[i] = own[i] - slope * sum * n.x[i];
      });
  return true;
}

struct Runs : cpu::NormalisedRuns {
  double epsilon = 0;
  PARTITA_BOTH std::int64_t size() const { return repeats * length; }
  /// Where element e of group g lies, and its column.
  PARTITA_BOTH std::int64_t at(std::int64_t g, std::int64_t e) const {
    return batch ? (e / length * groups + g) * length + e % length : g * length + e;
  }
  /// f(where, column, count, numbers there) of the group's octets, each in one run: of those that
  /// are one part's of so many.
  template <class F>
  PARTITA_LANE void each(const Lanes& lanes, std::int64_t g, const Numbers& x, F f,
                         std::int64_t part = 0, std::int64_t parts = 1) const {
    const std::int64_t pieces = (length + Octet::kSize - 1) / Octet::kSize;
    for (std::int64_t p = part * lanes.count() + lanes.lane(); p < repeats * pieces;
         p += parts * lanes.count()) {
      const std::int64_t e = p / pieces * length + p % pieces * Octet::kSize,
                         left = length - p % pieces * Octet::kSize,
                         count = left < Octet::kSize ? left : std::int64_t{Octet::kSize};
      const std::int64_t i = at(g, e);
      f(i, batch ? g : e, count, octet(x, i, count));
    }
  }
  /// Blocks that share a group: of a batch few channels would leave most of a GPU idle.
  std::int64_t parts() const {
    constexpr std::int64_t kBlocks = 1024, kLeast = 8192;
    const std::int64_t wanted = (kBlocks + groups - 1) / groups, most = size() / kLeast;
    return !batch || most < 2 ? 1 : wanted < most ? wanted : most;
  }
  /// Lanes that a group's part keeps busy, as rows() takes them.
  std::int64_t lanes_wanted() const { return (size() / parts() + 1) / 2; }
};

/// f(group, lanes, part, parts, a, b) adds to two sums of a group's part.
template <class F>
struct PartSums {
  std::int64_t parts;
  double* to;
  F f;
  PARTITA_LANE void operator()(std::int64_t q, const Lanes& lanes) const {
    double a = 0, b = 0;
    f(q / parts, lanes, q % parts, parts, a, b);
    a = lanes.sum(a);
    b = lanes.sum(b);
    if (lanes.lane() != 0) return;
    to[2 * q] = a;
    to[2 * q + 1] = b;
  }
};
/// then(group, a, b) of the parts' sums, in their order.
template <class Then>
struct SumsOfParts {
  std::int64_t parts;
  const double* from;
  Then then;
  PARTITA_LANE void operator()(std::int64_t g) const {
    double a = 0, b = 0;
    for (std::int64_t k = g * parts; k < (g + 1) * parts; ++k)
      a += from[2 * k], b += from[2 * k + 1];
    then(g, a, b);
  }
};
template <class M, class F, class Then>
void sum_by_parts(M& m, const Runs& r, F f, Then then) {
  const std::int64_t parts = r.parts();
  // A double takes two floats' room.
  auto* sums = reinterpret_cast<double*>(m.scratch(4 * r.groups * parts));
  m.rows(r.groups * parts, r.lanes_wanted(), PartSums<F>{parts, sums, f});
  m.each(r.groups, SumsOfParts<Then>{parts, sums, then});
}
/// Of the columns from one on; of a batch's group all have one. 1 and 0 where there are none.
PARTITA_BOTH Octet by_column(const Runs& r, const Numbers& list, std::int64_t column,
                             std::int64_t count, float none) {
  if (list != nullptr && !r.batch) return octet(list, column, count);
  Octet o;
  const float v = list != nullptr ? static_cast<float>(list[column]) : none;
  for (int k = 0; k < Octet::kSize; ++k) o.v[k] = v;
  return o;
}
inline bool runs_of(const Normalize& op, const Context& c, const Tensor& x, Runs& r) {
  r.epsilon = op.epsilon;
  return cpu::runs_of(op, c, x, r) && r.length > 0;
}

struct Moments {
  float mean, inverse;
};
/// From sums, or as a forward statistic of the whole left them.
PARTITA_BOTH Moments moments_of(const Runs& r, Numbers sums, bool whole, std::int64_t g) {
  const float last = sums[g * r.width + r.width - 1];
  if (whole) return {r.width == 2 ? sums[g * 2] : 0.0f, last};
  const double mean = r.width == 2 ? static_cast<double>(sums[g * 2]) / r.members : 0;
  const double square = static_cast<double>(last) / r.members - mean * mean;
  return {static_cast<float>(mean),
          static_cast<float>(1 / sqrt((square > 0 ? square : 0) + r.epsilon))};
}

template <class M>
bool statistic(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  const Numbers x = numbers(a.inputs[0]);
  const Numbers to = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  if (r.parts() > 1) {
    sum_by_parts(
        m, r,
        PARTITA_KERNEL(std::int64_t g, const Lanes& lanes, std::int64_t part, std::int64_t parts,
                       double& sum, double& square) {
          r.each(
              lanes, g, x,
              [&](std::int64_t, std::int64_t, std::int64_t count, const Octet& o) {
                for (int k = 0; k < count; ++k) {
                  const auto v = static_cast<double>(o.v[k]);
                  sum += v;
                  square += v * v;
                }
              },
              part, parts);
        },
        PARTITA_KERNEL(std::int64_t g, double sum, double square) {
          const double mean = r.width == 2 ? sum / r.members : 0;
          if (whole) {
            // In doubles the difference of two sums is as good as a second look.
            const double variance = square / r.members - mean * mean;
            sum = mean;
            square = 1 / sqrt((variance > 0 ? variance : 0) + r.epsilon);
          }
          if (r.width == 2) to[2 * g] = static_cast<float>(sum);
          to[g * r.width + r.width - 1] = static_cast<float>(square);
        });
    return true;
  }
  m.rows(
      r.groups, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        double sum = 0, square = 0;
        r.each(lanes, g, x, [&](std::int64_t, std::int64_t, std::int64_t count, const Octet& o) {
          for (int k = 0; k < count; ++k) {
            const auto v = static_cast<double>(o.v[k]);
            sum += v;
            square += v * v;
          }
        });
        sum = r.width == 2 ? lanes.sum(sum) : 0;
        if (whole) {
          const auto mean = static_cast<float>(sum / r.members);
          sum = static_cast<double>(mean);
          square = 0;
          r.each(lanes, g, x, [&](std::int64_t, std::int64_t, std::int64_t count, const Octet& o) {
            for (int k = 0; k < count; ++k) {
              const auto v = static_cast<double>(o.v[k] - mean);
              square += v * v;
            }
          });
        }
        square = lanes.sum(square);
        if (whole) square = 1 / sqrt(square / r.members + r.epsilon);
        if (lanes.lane() != 0) return;
        if (r.width == 2) to[2 * g] = static_cast<float>(sum);
        to[g * r.width + r.width - 1] = static_cast<float>(square);
      });
  return true;
}
/// Sums of an octet are in fp32, of a row in double.
PARTITA_LANE float sum_of(const Octet& o) {
  float sum = 0;
  for (int k = 0; k < Octet::kSize; ++k) sum += o.v[k];
  return sum;
}
/// Rows whose statistics nobody else has a part of: they are made, left in their place and used
/// while the row is in registers.
template <bool kWhole, bool kNarrow, class M>
void normalised_rows(M& m, const Normalize& op, const Runs& r, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), sums = numbers(a.statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers bias = op.bias ? numbers(a.parameters[op.scale ? 1 : 0]) : nullptr;
  const Numbers y = numbers(a.results[0]);
  m.rows(
      r.groups, kept_width(r.length), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        const Numbers from[1] = {x};
        const std::int64_t start = g * r.length;
        const KeptRows<1, kWhole, kNarrow> row(from, start, r.length, lanes);
        // Sums of the differences to one of the lane's own numbers, o, and of their squares: exact
        // where a small variance lies beside a large mean. With c numbers, sum x = c o + s, sum x^2
        // = c o^2 + 2 o s + q, and in doubles the mean's square may be taken off.
        double sum = 0, square = 0;
        float own = 0;
        if (r.width == 2 && lanes.lane() * Octet::kSize < r.length)
          own = octet_of(row.kept[0][0], x.type()).v[0];
        float differences = 0, squares = 0;
        std::int64_t numbers_here = 0;
        row.each([&](std::int64_t, std::int64_t count, const Octet(&o)[1]) {
          float d[Octet::kSize], part = 0, part_of_squares = 0;
          for (int k = 0; k < Octet::kSize; ++k) {
            d[k] = k < count ? o[0].v[k] - own : 0.0f;
            part += d[k];
            part_of_squares += d[k] * d[k];
          }
          differences += part;
          squares += part_of_squares;
          numbers_here += count < Octet::kSize ? count : std::int64_t{Octet::kSize};
        });
        {
          const auto o = static_cast<double>(own), s = static_cast<double>(differences),
                     c = static_cast<double>(numbers_here);
          sum = c * o + s;
          square = c * o * o + 2 * o * s + static_cast<double>(squares);
        }
        float mean = 0;
        if (r.width == 2) {
          lanes.sum(sum, square);
          const double exact = sum / r.members;
          mean = static_cast<float>(exact);
          square -= exact * sum;
          square = square > 0 ? square : 0;
        } else {
          square = lanes.sum(square);
        }
        const auto inverse = static_cast<float>(1 / sqrt(square / r.members + r.epsilon));
        if (lanes.lane() == 0) {
          if (r.width == 2) sums[2 * g] = mean;
          sums[g * r.width + r.width - 1] = inverse;
        }
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&o)[1]) {
          Raw of_scale{}, of_bias{};
          if (scale != nullptr) of_scale = raw_octet<kWhole>(scale, e, count);
          if (bias != nullptr) of_bias = raw_octet<kWhole>(bias, e, count);
          const Octet by = octet_of(of_scale, scale.type()), more = octet_of(of_bias, bias.type());
          Octet to;
          for (int k = 0; k < Octet::kSize; ++k) {
            float v = (o[0].v[k] - mean) * inverse;
            if (scale != nullptr) v *= by.v[k];
            to.v[k] = bias != nullptr ? v + more.v[k] : v;
          }
          put<kWhole>(y, start + e, count, to);
        });
      });
}
/// The same of their gradients, whose sums are nobody else's.
template <bool kWhole, bool kNarrow, class M>
void slopes_of_rows(M& m, const Normalize& op, const Runs& r, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), dy = numbers(a.output_gradients[0]),
                sums = numbers(a.statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers dx = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  m.rows(
      r.groups, kept_width(r.length), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        const Numbers from[2] = {x, dy};
        const std::int64_t start = g * r.length;
        const KeptRows<2, kWhole, kNarrow> row(from, start, r.length, lanes);
        const Moments o = moments_of(r, sums, whole, g);
        double sum = 0, along = 0;
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&v)[2]) {
          Octet by{};
          if (scale != nullptr) by = octet<kWhole>(scale, e, count);
          Octet slopes, times;
          for (int k = 0; k < Octet::kSize; ++k) {
            slopes.v[k] = scale != nullptr ? v[1].v[k] * by.v[k] : v[1].v[k];
            times.v[k] = slopes.v[k] * (v[0].v[k] - o.mean);
          }
          sum += static_cast<double>(sum_of(slopes));
          along += static_cast<double>(sum_of(times));
        });
        if (r.width == 2) {
          lanes.sum(sum, along);
        } else {
          along = lanes.sum(along);
        }
        const float mean = r.width == 2 ? static_cast<float>(sum / r.members) : 0.0f;
        const auto by_mean = static_cast<float>(along * static_cast<double>(o.inverse) / r.members);
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&v)[2]) {
          Octet by{};
          if (scale != nullptr) by = octet<kWhole>(scale, e, count);
          Octet to;
          for (int k = 0; k < Octet::kSize; ++k) {
            const float d = scale != nullptr ? v[1].v[k] * by.v[k] : v[1].v[k];
            to.v[k] = o.inverse * (d - mean - (v[0].v[k] - o.mean) * o.inverse * by_mean);
          }
          put<kWhole>(dx, start + e, count, to);
        });
      });
}
template <class M>
bool forward(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  if (op.kind == Normalize::Kind::local) return normalised_locally(m, op, a);
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  if (a.own_statistics) {
    by_rows(whole_rows(r.length, a), numbers(a.inputs[0]).narrow(),
            [&]<bool kWhole, bool kNarrow>() { normalised_rows<kWhole, kNarrow>(m, op, r, a); });
    return true;
  }
  const Numbers x = numbers(a.inputs[0]), sums = numbers(a.statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers bias = op.bias ? numbers(a.parameters[op.scale ? 1 : 0]) : nullptr;
  const Numbers y = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  const std::int64_t parts = r.parts();
  m.rows(
      r.groups * parts, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t q, const Lanes& lanes) {
        const std::int64_t g = q / parts;
        const Moments o = moments_of(r, sums, whole, g);
        r.each(
            lanes, g, x,
            [&](std::int64_t i, std::int64_t column, std::int64_t count, const Octet& from) {
              const Octet by = by_column(r, scale, column, count, 1),
                          more = by_column(r, bias, column, count, 0);
              Octet to;
              for (int k = 0; k < Octet::kSize; ++k) {
                float v = (from.v[k] - o.mean) * o.inverse;
                if (scale != nullptr) v *= by.v[k];
                to.v[k] = bias != nullptr ? v + more.v[k] : v;
              }
              put(y, i, count, to);
            },
            q % parts, parts);
      });
  return true;
}
/// Adds up a group's gradients, and these times what they are gradients of less its mean.
struct SlopeSums {
  Runs r;
  Numbers x, dy, scale, sums;
  bool whole;
  PARTITA_LANE void operator()(std::int64_t g, const Lanes& lanes, std::int64_t part,
                               std::int64_t parts, double& sum, double& along) const {
    const Moments o = moments_of(r, sums, whole, g);
    r.each(
        lanes, g, x,
        [&](std::int64_t i, std::int64_t column, std::int64_t count, const Octet& from) {
          const Octet slopes = octet(dy, i, count), by = by_column(r, scale, column, count, 1);
          for (int k = 0; k < count; ++k) {
            const float d = scale != nullptr ? slopes.v[k] * by.v[k] : slopes.v[k];
            sum += static_cast<double>(d);
            along += static_cast<double>(d * (from.v[k] - o.mean));
          }
        },
        part, parts);
  }
};
template <class M>
bool backward_statistic(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  const Numbers sums = numbers(a.statistics[0]), to = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  const SlopeSums add{r,
                      numbers(a.inputs[0]),
                      numbers(a.output_gradients[0]),
                      op.scale ? numbers(a.parameters[0]) : Numbers(),
                      sums,
                      whole};
  if (r.parts() > 1) {
    sum_by_parts(
        m, r, add, PARTITA_KERNEL(std::int64_t g, double sum, double along) {
          const Moments o = moments_of(r, sums, whole, g);
          if (r.width == 2) to[2 * g] = static_cast<float>(sum);
          to[g * r.width + r.width - 1] =
              static_cast<float>(along * static_cast<double>(o.inverse));
        });
    return true;
  }
  m.rows(
      r.groups, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        double sum = 0, along = 0;
        add(g, lanes, 0, 1, sum, along);
        sum = r.width == 2 ? lanes.sum(sum) : 0;
        along = lanes.sum(along);
        if (lanes.lane() != 0) return;
        if (r.width == 2) to[2 * g] = static_cast<float>(sum);
        to[g * r.width + r.width - 1] =
            static_cast<float>(along * static_cast<double>(moments_of(r, sums, whole, g).inverse));
      });
  return true;
}
template <class M>
bool data(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  if (op.kind == Normalize::Kind::local) return local_data(m, op, a);
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  if (a.own_statistics) {
    by_rows(whole_rows(r.length, a),
            numbers(a.inputs[0]).narrow() && numbers(a.output_gradients[0]).narrow(),
            [&]<bool kWhole, bool kNarrow>() { slopes_of_rows<kWhole, kNarrow>(m, op, r, a); });
    return true;
  }
  const Numbers x = numbers(a.inputs[0]), dy = numbers(a.output_gradients[0]),
                sums = numbers(a.statistics[0]), back = numbers(a.backward_statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers dx = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  const std::int64_t parts = r.parts();
  m.rows(
      r.groups * parts, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t q, const Lanes& lanes) {
        const std::int64_t g = q / parts;
        const Moments o = moments_of(r, sums, whole, g);
        const float mean =
            r.width == 2 ? static_cast<float>(static_cast<double>(back[2 * g]) / r.members) : 0.0f;
        const auto along =
            static_cast<float>(static_cast<double>(back[g * r.width + r.width - 1]) / r.members);
        r.each(
            lanes, g, x,
            [&](std::int64_t i, std::int64_t column, std::int64_t count, const Octet& from) {
              const Octet slopes = octet(dy, i, count), by = by_column(r, scale, column, count, 1);
              Octet to;
              for (int k = 0; k < Octet::kSize; ++k) {
                const float d = scale != nullptr ? slopes.v[k] * by.v[k] : slopes.v[k];
                to.v[k] = o.inverse * (d - mean - (from.v[k] - o.mean) * o.inverse * along);
              }
              put(dx, i, count, to);
            },
            q % parts, parts);
      });
  return true;
}
/// Of a row's elements, what scales and biases get.
struct ScaleSlopes {
  static constexpr int kSums = 2;
  struct Loaded {
    Raw x, dy;
    Moments of;
  };
  Runs r;
  Numbers x, dy, sums;
  bool whole;
  PARTITA_LANE Loaded load(std::int64_t g, std::int64_t first, std::int64_t count) const {
    const std::int64_t at = g * r.length + first;
    return {raw_octet(x, at, count), raw_octet(dy, at, count), moments_of(r, sums, whole, g)};
  }
  PARTITA_LANE void add(const Loaded& l, Octet (&to)[2]) const {
    const Octet v = octet_of(l.x, x.type()), d = octet_of(l.dy, dy.type());
    for (int e = 0; e < Octet::kSize; ++e) {
      to[0].v[e] += d.v[e] * (v.v[e] - l.of.mean) * l.of.inverse;
      to[1].v[e] += d.v[e];
    }
  }
};
template <class M>
bool weight(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  const Numbers x = numbers(a.inputs[0]), dy = numbers(a.output_gradients[0]),
                sums = numbers(a.statistics[0]);
  const Numbers to_scale = op.scale && wanted(a, 0) ? numbers(a.results[0]) : nullptr;
  const std::size_t second = op.scale ? 1 : 0;
  const Numbers to_bias = op.bias && wanted(a, second) ? numbers(a.results[second]) : nullptr;
  const bool whole = a.whole_statistics, accumulate = a.accumulate;
  if (r.batch) {
    sum_by_parts(
        m, r, SlopeSums{r, x, dy, nullptr, sums, whole},
        PARTITA_KERNEL(std::int64_t g, double sum, double along) {
          along *= static_cast<double>(moments_of(r, sums, whole, g).inverse);
          if (to_scale != nullptr)
            to_scale[g] = static_cast<float>(along) + (accumulate ? to_scale[g] : 0.0f);
          if (to_bias != nullptr)
            to_bias[g] = static_cast<float>(sum) + (accumulate ? to_bias[g] : 0.0f);
        });
    return true;
  }
  // Rows are groups, columns elements.
  sum_rows(
      m, ScaleSlopes{r, x, dy, sums, whole}, r.groups, r.length,
      PARTITA_KERNEL(std::int64_t column, const float(&s)[2]) {
        if (to_scale != nullptr) to_scale[column] = s[0] + (accumulate ? to_scale[column] : 0.0f);
        if (to_bias != nullptr) to_bias[column] = s[1] + (accumulate ? to_bias[column] : 0.0f);
      });
  return true;
}

// ---------------------------------------------------------------------------------- element-wise

// What becomes of a number's curve c: `x` has the number and those beside it, `y` takes the
// results.
struct ValueOf {
  PARTITA_BOTH static void of(const Curve& c, const float (&)[1], float (&y)[1]) { y[0] = c.value; }
};
struct SlopeOf {  ///< of (x, dy)
  PARTITA_BOTH static void of(const Curve& c, const float (&x)[2], float (&y)[1]) {
    y[0] = x[1] * c.slope;
  }
};
struct GatedValueOf {  ///< of (x, up)
  PARTITA_BOTH static void of(const Curve& c, const float (&x)[2], float (&y)[1]) {
    y[0] = c.value * x[1];
  }
};
struct GatedSlopesOf {  ///< of (x, up, dy)
  PARTITA_BOTH static void of(const Curve& c, const float (&x)[3], float (&y)[2]) {
    y[0] = x[2] * x[1] * c.slope;
    y[1] = x[2] * c.value;
  }
};
template <class M>
bool forward(M& m, const Activation& op, const Context&, const Arguments& a) {
  const std::int64_t n = a.inputs[0].size();
  map_curves<ValueOf>(m, Curved<1, 1>{op.kind, {numbers(a.inputs[0])}, {numbers(a.results[0])}, n});
  return true;
}
template <class M>
bool data(M& m, const Activation& op, const Context&, const Arguments& a) {
  const Tensor& x = op.kind == ActivationKind::relu ? a.outputs[0] : a.inputs[0];
  const std::int64_t n = x.size();
  map_curves<SlopeOf>(
      m, Curved<2, 1>{
             op.kind, {numbers(x), numbers(a.output_gradients[0])}, {numbers(a.results[0])}, n});
  return true;
}
template <class M>
bool forward(M& m, const GatedActivation& op, const Context&, const Arguments& a) {
  const std::int64_t n = a.inputs[0].size();
  map_curves<GatedValueOf>(
      m, Curved<2, 1>{
             op.kind, {numbers(a.inputs[0]), numbers(a.inputs[1])}, {numbers(a.results[0])}, n});
  return true;
}
template <class M>
bool data(M& m, const GatedActivation& op, const Context&, const Arguments& a) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const std::int64_t n = a.inputs[0].size();
  map_curves<GatedSlopesOf>(
      m, Curved<3, 2>{op.kind,
                      {numbers(a.inputs[0]), numbers(a.inputs[1]), numbers(a.output_gradients[0])},
                      {numbers(a.results[0]), numbers(a.results[1])},
                      n});
  return true;
}
/// Sums pass their gradient on.
template <class M>
bool copied(M& m, const Arguments& a) {
  const Tensor& dy = a.output_gradients[0];
  for (const Tensor& t : a.results) {
    if (t) copy_values(m, numbers(dy), numbers(t), dy.size());
  }
  return true;
}
template <class M>
bool data(M& m, const AddBias&, const Context&, const Arguments& a) {
  return copied(m, a);
}
template <class M>
bool data(M& m, const PositionEmbedding&, const Context&, const Arguments& a) {
  return copied(m, a);
}
template <class M>
bool data(M& m, const Add&, const Context&, const Arguments& a) {
  return copied(m, a);
}
template <class M>
bool forward(M& m, const Add&, const Context&, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), z = numbers(a.inputs[1]);
  const Numbers y = numbers(a.results[0]);
  map_two(
      m, a.inputs[0].size(), x, z, y, PARTITA_KERNEL(float v, float w) { return v + w; });
  return true;
}
template <class M>
bool forward(M& m, const Multiply&, const Context&, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), z = numbers(a.inputs[1]);
  const Numbers y = numbers(a.results[0]);
  map_two(
      m, a.inputs[0].size(), x, z, y, PARTITA_KERNEL(float v, float w) { return v * w; });
  return true;
}
template <class M>
bool data(M& m, const Multiply&, const Context&, const Arguments& a) {
  const Numbers dy = numbers(a.output_gradients[0]);
  for (std::size_t k = 0; k < 2; ++k) {
    if (!wanted(a, k)) continue;
    const Numbers other = numbers(a.inputs[1 - k]);
    const Numbers dx = numbers(a.results[k]);
    map_two(
        m, a.output_gradients[0].size(), dy, other, dx,
        PARTITA_KERNEL(float d, float v) { return d * v; });
  }
  return true;
}

/// The tensor's dimensions but the last, as dropout numbers them.
struct Places {
  static constexpr int kMost = 6;
  IndexList list[kMost];
  std::int64_t extent[kMost];
  int dims = 0, sample = -1;
};
template <class M>
Stepped<std::uint64_t> dropout_key(M& m, const Context& c) {
  return m.stepped(c.step, [seed = c.seed](std::int64_t step) {
    constexpr std::uint64_t kDropout = 0x64726f70;
    return random_bits(seed, static_cast<std::uint64_t>(step), kDropout);
  });
}
/// Rows of experts: each by its token and expert.
template <class M>
bool dropped_rows(M& m, const Dropout& op, const Context& c, const Tensor& x, Numbers to) {
  std::vector<std::int64_t> samples, tokens;
  for (const reference::Row& r : *x.rows) {
    samples.push_back(c.first_sample + r.sample);
    tokens.push_back(static_cast<std::int64_t>(random_bits(
        0, static_cast<std::uint64_t>(r.sequence), static_cast<std::uint64_t>(r.expert))));
  }
  const IndexList sample = m.upload(samples), token = m.upload(tokens),
                  feature = m.list((*x.index)[3]);
  const Numbers from = numbers(x);
  const Stepped<std::uint64_t> key = dropout_key(m, c);
  const auto kept = static_cast<float>(1 - op.probability);
  const auto below = static_cast<std::uint64_t>(std::ceil(op.probability * 0x1p53));
  const std::int64_t n = feature.size;
  each_of_rows(
      m, std::ssize(*x.rows), n,
      PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        const std::uint64_t common =
            splitmix(splitmix(key()) ^ static_cast<std::uint64_t>(sample.at(row)));
        const auto place = static_cast<std::uint64_t>(token.at(row));
        Octet o = octet(from, row * n + first, count);
        for (int k = 0; k < Octet::kSize && k < count; ++k) {
          const std::uint64_t bits =
              splitmix(common ^ (place + static_cast<std::uint64_t>(feature.at(first + k))));
          o.v[k] = bits >> 11 < below ? 0.0f : o.v[k] / kept;
        }
        put(to, row * n + first, count, o);
      });
  return true;
}
/// Keeps what the reference keeps: an element's number depends on its place in its sample.
template <class M>
bool dropped(M& m, const Dropout& op, const Context& c, const Tensor& x, Numbers from, Numbers to) {
  if (x.rows != nullptr) return dropped_rows(m, op, c, x, to);
  const Shape& shape = c.signature->outputs[0].shape;
  Places p;
  p.dims = static_cast<int>(shape.size());
  if (p.dims > Places::kMost || shape.back().dim == Dim::sample) return false;
  for (int d = 0; d < p.dims; ++d) {
    const auto k = static_cast<std::size_t>(d);
    p.list[d] = m.list((*x.index)[k]);
    p.extent[d] = shape[k].extent;
    if (shape[k].dim == Dim::sample) p.sample = d;
  }
  const Stepped<std::uint64_t> key = dropout_key(m, c);
  const auto kept = static_cast<float>(1 - op.probability);
  // uniform() < probability, in whole numbers.
  const auto below = static_cast<std::uint64_t>(std::ceil(op.probability * 0x1p53));
  const std::int64_t first_sample = c.first_sample;
  const std::int64_t n = p.list[p.dims - 1].size;
  each_of_rows(
      m, x.size() / n, n, PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        std::int64_t at[Places::kMost], rest = row, sample = 0, place = 0;
        for (int d = p.dims - 2; d >= 0; --d) {
          at[d] = p.list[d].at(rest % p.list[d].size);
          rest /= p.list[d].size;
        }
        for (int d = 0; d + 1 < p.dims; ++d) {
          if (d == p.sample) {
            sample = at[d];
          } else {
            place = place * p.extent[d] + at[d];
          }
        }
        place *= p.extent[p.dims - 1];
        // As random_bits(key, sample, place), whose first half all of them share.
        const std::uint64_t common =
            splitmix(splitmix(key()) ^ static_cast<std::uint64_t>(first_sample + sample));
        const Octet o = octet(from, row * n + first, count);
        Octet result;
        for (int k = 0; k < Octet::kSize && k < count; ++k) {
          const std::int64_t last = p.list[p.dims - 1].at(first + k);
          const std::uint64_t bits = splitmix(common ^ static_cast<std::uint64_t>(place + last));
          result.v[k] = bits >> 11 < below ? 0.0f : o.v[k] / kept;
        }
        put(to, row * n + first, count, result);
      });
  return true;
}
template <class M>
bool forward(M& m, const Dropout& op, const Context& c, const Arguments& a) {
  return dropped(m, op, c, a.inputs[0], numbers(a.inputs[0]), numbers(a.results[0]));
}
template <class M>
bool data(M& m, const Dropout& op, const Context& c, const Arguments& a) {
  const Tensor& dy = a.output_gradients[0];
  return dropped(m, op, c, dy, numbers(dy), numbers(a.results[0]));
}

/// Cosines of the pairs' angles, then their sines, of position after position; by the host, whose
/// double precision costs nothing where it is needed once.
inline std::vector<float> turns_of(const Rotary& op, const Indices& positions) {
  const std::int64_t half = op.rotated / 2;
  std::vector<double> rates;
  for (std::int64_t r = 0; r < half; ++r)
    rates.push_back(
        std::pow(op.base, -2 * static_cast<double>(r) / static_cast<double>(op.rotated)));
  std::vector<float> turns;
  turns.reserve(positions.size() * 2 * rates.size());
  for (const std::int64_t p : positions) {
    for (const double rate : rates)
      turns.push_back(static_cast<float>(std::cos(rate * static_cast<double>(p))));
    for (const double rate : rates)
      turns.push_back(static_cast<float>(std::sin(rate * static_cast<double>(p))));
  }
  return turns;
}
/// What tells a table of turns from all others.
inline std::vector<std::int64_t> key_of_turns(const Rotary& op, const Indices& positions) {
  std::int64_t base = 0;
  static_assert(sizeof base == sizeof op.base);
  std::memcpy(&base, &op.base, sizeof base);
  const std::int64_t n = std::ssize(positions);
  std::vector<std::int64_t> key{base, op.rotated, n};
  const bool follow = n > 0 && positions.back() - positions.front() == n - 1;
  key.insert(key.end(), positions.begin(), follow ? positions.begin() + 1 : positions.end());
  return key;
}
/// Turns each pair by `direction` times its angle.
template <class M>
bool rotate(M& m, const Rotary& op, Numbers from, const Tensor& to, float direction) {
  const std::size_t dims = to.index->size();
  const std::int64_t tokens = extent(to, 1, 2), inner = extent(to, 2, dims), head = op.head_dim,
                     half = op.rotated / 2, still = op.head_dim - op.rotated;
  if (extent(to, dims - 1, dims) % head != 0) return false;
  const Numbers y = numbers(to);
  // All heads of a token, all samples, layers and steps turn by the same angles.
  const Indices& positions = (*to.index)[1];
  const float* const turns =
      m.table(key_of_turns(op, positions), [&] { return turns_of(op, positions); });
  if (still == 0 && half % Octet::kSize == 0) {
    const std::int64_t pieces = half / Octet::kSize;
    m.each(
        to.size() / head * pieces, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t r = i % pieces * Octet::kSize, first = i / pieces * head + r,
                             token = i / pieces * head / inner % tokens;
          const Numbers table(const_cast<float*>(turns) + token * 2 * half);
          const Raw of_a = raw_octet(from, first, Octet::kSize),
                    of_b = raw_octet(from, first + half, Octet::kSize),
                    of_c = raw_octet(table, r, Octet::kSize),
                    of_s = raw_octet(table, half + r, Octet::kSize);
          const Octet a_half = octet_of(of_a, from.type()), b_half = octet_of(of_b, from.type()),
                      c = octet_of(of_c, ElementType::fp32), s = octet_of(of_s, ElementType::fp32);
          Octet one, other;
          for (int k = 0; k < Octet::kSize; ++k) {
            const float sine = direction * s.v[k];
            one.v[k] = a_half.v[k] * c.v[k] - b_half.v[k] * sine;
            other.v[k] = b_half.v[k] * c.v[k] + a_half.v[k] * sine;
          }
          put(y, first, Octet::kSize, one);
          put(y, first + half, Octet::kSize, other);
        });
    return true;
  }
  m.each(
      to.size(), PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t within = i % inner % head;
        if (within < still || 2 * half + still <= within) {
          y[i] = from[i];
          return;
        }
        const std::int64_t r = (within - still) % half, token = i / inner % tokens;
        const bool second = within - still >= half;
        const float c = turns[token * 2 * half + r],
                    s = direction * turns[token * 2 * half + half + r];
        y[i] = second ? from[i] * c + from[i - half] * s : from[i] * c - from[i + half] * s;
      });
  return true;
}
template <class M>
bool forward(M& m, const Rotary& op, const Context&, const Arguments& a) {
  return rotate(m, op, numbers(a.inputs[0]), a.results[0], 1);
}
template <class M>
bool data(M& m, const Rotary& op, const Context&, const Arguments& a) {
  return rotate(m, op, numbers(a.output_gradients[0]), a.results[0], -1);
}

// ------------------------------------------------------------------------------------- attention

template <class M>
Heads heads_of(M& m, const Attention& op, const Tensor& q, const Tensor& k) {
  Heads h;
  h.samples = extent(q, 0, 1);
  h.queries = extent(q, 1, 2);
  h.keys = extent(k, 1, 2);
  h.heads = extent(q, 2, 3);
  h.group = op.queries_per_head;
  h.width = op.qk_dim;
  h.v_width = op.v_dim;
  h.q_row = h.heads * h.group * h.width;
  h.k_row = h.heads * h.width;
  h.v_row = h.heads * h.v_width;
  h.y_row = h.heads * h.group * h.v_width;
  h.scale =
      static_cast<float>(op.scale != 0 ? op.scale : 1 / std::sqrt(static_cast<double>(op.qk_dim)));
  h.causal = op.causal;
  h.window = op.window;
  h.tile = at_least_1(m.scores() / at_least_1(h.heads * h.keys));
  // Smaller tiles see fewer keys.
  if (op.causal && h.tile > 512) h.tile = 512;
  h.query_at = m.list((*q.index)[1]);
  h.key_at = m.list((*k.index)[1]);
  return h;
}

/// Queries of all heads of one sample, one query head of each group.
struct ScoreTile {
  std::int64_t sample, g, first, rows;  ///< queries [first, first + rows)
  std::int64_t key, keys;               ///< that some of them see
};
/// f(tile) for all, in order.
template <class F>
void for_each_tile(const Attention& op, const Heads& h, const Tensor& q, const Tensor& k, F f) {
  const Indices &queries = (*q.index)[1], &keys = (*k.index)[1];
  const std::int64_t tile = h.tile;
  for (std::int64_t b = 0; b < h.samples; ++b) {
    for (std::int64_t g = 0; g < h.group; ++g) {
      for (std::int64_t first = 0; first < h.queries; first += tile) {
        ScoreTile t{b, g, first, h.queries - first < tile ? h.queries - first : tile, 0, h.keys};
        const auto up_to = [&](std::int64_t global) {  // how many are at most that
          std::int64_t n = 0;
          std::int64_t high = static_cast<std::int64_t>(keys.size());
          while (n < high) {
            const std::int64_t middle = (n + high) / 2;
            if (keys[static_cast<std::size_t>(middle)] <= global) {
              n = middle + 1;
            } else {
              high = middle;
            }
          }
          return n;
        };
        std::int64_t last = h.keys;
        if (op.causal) last = up_to(queries[static_cast<std::size_t>(first + t.rows - 1)]);
        if (op.window > 0) t.key = up_to(queries[static_cast<std::size_t>(first)] - op.window);
        t.key = t.key < last ? t.key : last;
        t.keys = last - t.key;
        f(t);
      }
    }
  }
}
/// Operands of a tile's products, batched over the heads.
struct TileOperands {
  Matrix q, k, v, y;
};
inline TileOperands operands_of(const Heads& h, const ScoreTile& t, Numbers q, Numbers k, Numbers v,
                                Numbers y) {
  const auto at = [](Numbers p, std::int64_t offset) { return p == nullptr ? p : p + offset; };
  const std::int64_t query = t.sample * h.queries + t.first, key = t.sample * h.keys + t.key;
  return {{at(q, query * h.q_row + t.g * h.width), h.q_row, h.group * h.width, false},
          {at(k, key * h.k_row), h.k_row, h.width, false},
          {at(v, key * h.v_row), h.v_row, h.v_width, false},
          {at(y, query * h.y_row + t.g * h.v_width), h.y_row, h.group * h.v_width, false}};
}
inline Matrix transposed(Matrix m) {
  m.transposed = true;
  return m;
}
/// The log-sum-exp of row `row` of a tile's scores: [sample, head, query of the group, query].
PARTITA_BOTH std::int64_t line_of(const Heads& h, const ScoreTile& t, std::int64_t head,
                                  std::int64_t i) {
  return ((t.sample * h.heads + head) * h.group + t.g) * h.queries + t.first + i;
}

/// Scores of one tile, in fp32, and what products take of them: the same memory where the operands
/// are fp32, else numbers of the operands' type.
struct Scores {
  float *scores = nullptr, *slopes = nullptr;
  Numbers factors;
  Matrix matrix(Numbers at, const ScoreTile& t) const {
    return {at, t.keys, t.rows * t.keys, false};
  }
};
/// For the largest tile; `slopes`: a backward's. No scores where no query sees a key.
template <class M>
Scores scores_for(M& m, const Attention& op, const Heads& h, const Tensor& q, const Tensor& k,
                  bool slopes) {
  std::int64_t most = 0;
  for_each_tile(op, h, q, k, [&](const ScoreTile& t) {
    most = h.heads * t.rows * t.keys > most ? h.heads * t.rows * t.keys : most;
  });
  Scores s;
  if (most == 0) return s;
  s.scores = m.scratch(most);
  if (slopes) s.slopes = m.scratch(most);
  s.factors = q.type == ElementType::fp32 ? Numbers(s.scores) : scratch(m, most, q.type);
  return s;
}
inline bool one_type(const Tensor& q, const Tensor& k, const Tensor& v) {
  return q.type == k.type && q.type == v.type;
}

inline std::uint16_t* words(const Tensor& t) { return reinterpret_cast<std::uint16_t*>(t.values); }
template <class M>
FlashCall flash_call(M& m, const Attention& op, const Arguments& a, bool part) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2];
  FlashCall c;
  c.h = heads_of(m, op, q, k);
  c.type = q.type;
  c.q = words(q), c.k = words(k), c.v = words(v);
  c.lse = a.extras.empty() ? nullptr : a.extras[0].values;
  c.part = part;
  return c;
}
/// False: nothing was done, it is for products.
template <class M>
bool flash_forward(M& m, const Attention& op, const Arguments& a, bool part) {
  if (op.materialised || a.results[0].type != a.inputs[0].type) return false;
  FlashCall c = flash_call(m, op, a, part);
  c.y = words(a.results[0]);
  if (op.sinks && !part) c.sinks = numbers(a.parameters[0]);
  return has_flash(c) && m.flash(c, FlashPass::forward);
}
/// From the saved output: the mean of a row's slopes is dy · y.
template <class M>
bool flash_backward(M& m, const Attention& op, const Arguments& a, bool part) {
  const Tensor& dy = a.output_gradients[0];
  if (op.materialised || a.outputs.empty() || !a.outputs[0] || a.outputs[0].values == nullptr)
    return false;
  for (const Tensor* t : {&dy, &a.outputs[0], &a.results[0], &a.results[1], &a.results[2]}) {
    if (t->type != a.inputs[0].type) return false;
  }
  FlashCall c = flash_call(m, op, a, part);
  c.dy = words(dy);
  c.y = words(a.outputs[0]);
  c.dq = words(a.results[0]), c.dk = words(a.results[1]), c.dv = words(a.results[2]);
  if (!has_flash(c) || !m.has_flash()) return false;
  if (m.flash(c, FlashPass::backward)) return true;
  const Heads h = c.h;
  const std::int64_t query_heads = h.heads * h.group;
  float* along = m.scratch(h.samples * query_heads * h.queries);
  const Numbers y = numbers(a.outputs[0]), slopes = numbers(dy);
  // One token's head is a row; they come as they lie in memory.
  m.rows(
      h.samples * h.queries * query_heads, h.v_width,
      PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t o = lanes.lane(); o < h.v_width / Octet::kSize; o += lanes.count()) {
          const std::int64_t at = row * h.v_width + o * Octet::kSize;
          const Octet one = octet(y, at, Octet::kSize), other = octet(slopes, at, Octet::kSize);
          float part_of_it = 0;
          for (int e = 0; e < Octet::kSize; ++e) part_of_it += one.v[e] * other.v[e];
          sum += static_cast<double>(part_of_it);
        }
        sum = lanes.sum(sum);
        const std::int64_t token = row / query_heads, sample = token / h.queries;
        if (lanes.lane() == 0)
          along[(sample * query_heads + row % query_heads) * h.queries + token % h.queries] =
              static_cast<float>(sum);
      });
  c.along = along;
  return m.flash(c, FlashPass::queries) && m.flash(c, FlashPass::keys);
}

template <class M>
bool forward(M& m, const Attention& op, const Context&, const Arguments& a) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2];
  if (!one_type(q, k, v)) return false;
  if (flash_forward(m, op, a, false)) return true;
  const Heads h = heads_of(m, op, q, k);
  const Numbers lse = !op.materialised && !a.extras.empty() ? numbers(a.extras[0]) : nullptr;
  const Numbers kept = op.materialised && !a.extras.empty() ? numbers(a.extras[0]) : nullptr;
  const Numbers sinks = op.sinks ? numbers(a.parameters[0]) : nullptr;
  if (kept != nullptr) fill_values(m, kept, a.extras[0].size(), 0);
  const Numbers y = numbers(a.results[0]);
  const Scores s = scores_for(m, op, h, q, k, false);
  if (s.scores == nullptr) {
    fill_values(m, y, a.results[0].size(), 0);
    if (lse != nullptr) fill_values(m, lse, a.extras[0].size(), -INFINITY);
    return !op.sinks;
  }
  for_each_tile(op, h, q, k, [&](const ScoreTile& t) {
    attend_tile(m, h, t, operands_of(h, t, numbers(q), numbers(k), numbers(v), y), s, sinks, lse,
                kept);
  });
  return true;
}
template <class M>
void attend_tile(M& m, const Heads& h, const ScoreTile& t, const TileOperands& o, const Scores& s,
                 Numbers sinks, Numbers lse, Numbers kept) {
  float* const scores = s.scores;
  const Numbers factors = s.factors;
  if (t.keys > 0)
    m.product(
        {t.rows, t.keys, h.width, o.q, transposed(o.k), s.matrix(scores, t), h.heads, h.scale, 0});
  m.rows(
      h.heads * t.rows, t.keys, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const std::int64_t head = row / t.rows, i = row % t.rows, line = line_of(h, t, head, i);
        float* p = scores + row * t.keys;
        const Numbers to = factors + row * t.keys;
        double top = -INFINITY;
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
          if (h.sees(t.first + i, t.key + j)) top = fmax(top, static_cast<double>(p[j]));
        }
        top = lanes.max(top);
        const float sink =
            sinks != nullptr ? static_cast<float>(sinks[head * h.group + t.g]) : -INFINITY;
        top = fmax(top, static_cast<double>(sink));
        const float high = infinite(top) ? 0.0f : static_cast<float>(top);
        double sum = 0;
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
          const float e = h.sees(t.first + i, t.key + j) ? expf(p[j] - high) : 0.0f;
          p[j] = e;
          sum += static_cast<double>(e);
        }
        auto total = static_cast<float>(lanes.sum(sum));
        if (sinks != nullptr) total += expf(sink - high);
        const float factor = total > 0 ? 1 / total : 0.0f;
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
          const float share = p[j] * factor;
          to[j] = share;
          if (kept != nullptr) kept[line * h.keys + t.key + j] = share;
        }
        if (lse != nullptr && lanes.lane() == 0)
          lse[line] = total > 0 ? high + logf(total) : -INFINITY;
      });
  if (t.keys > 0) {
    m.product({t.rows, h.v_width, t.keys, s.matrix(factors, t), o.v, o.y, h.heads, 1, 0});
  } else {
    const Matrix y = o.y;
    const std::int64_t width = h.v_width;
    m.each(
        h.heads * t.rows * width, PARTITA_KERNEL(std::int64_t e) {
          y.at[e / (t.rows * width) * y.step + e / width % t.rows * y.stride + e % width] = 0.0f;
        });
  }
}

/// One tile's gradients, added to dk and dv; dq is overwritten or, of a ring's part, added to.
/// `kept`: the probabilities; else they are computed again from `lse`. `y`: what a ring's part
/// multiplies dy with, else the probabilities do.
template <class M>
void attend_tile_backward(M& m, const Heads& h, const ScoreTile& t, const TileOperands& o,
                          const TileOperands& d, const Matrix& dy, const Scores& all, Numbers lse,
                          Numbers kept, bool part) {
  float *const scores = all.scores, *const slopes = all.slopes;
  const Numbers factors = all.factors;
  const Matrix p = all.matrix(factors, t);
  if (kept == nullptr)
    m.product({t.rows, t.keys, h.width, o.q, transposed(o.k), all.matrix(scores, t), h.heads,
               h.scale, 0});
  m.each(
      h.heads * t.rows * t.keys, PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t row = e / t.keys, j = e % t.keys, head = row / t.rows, i = row % t.rows;
        const std::int64_t line = line_of(h, t, head, i);
        float share = 0;
        if (kept != nullptr) {
          share = kept[line * h.keys + t.key + j];
        } else {
          const bool sees = h.sees(t.first + i, t.key + j) && !infinite(lse[line]);
          share = sees ? expf(scores[e] - lse[line]) : 0.0f;
        }
        scores[e] = share;
        factors[e] = share;
      });
  m.product({t.keys, h.v_width, t.rows, transposed(p), dy, d.v, h.heads, 1, 1});
  m.product({t.rows, t.keys, h.v_width, dy, transposed(o.v), all.matrix(slopes, t), h.heads, 1, 0});
  const Matrix y = o.y;
  const std::int64_t width = part ? h.v_width : t.keys;
  m.rows(
      h.heads * t.rows, t.keys, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const std::int64_t head = row / t.rows, i = row % t.rows;
        float *s = scores + row * t.keys, *ds = slopes + row * t.keys;
        const Numbers to = factors + row * t.keys;
        Numbers one = s, other = ds;
        if (part) {
          one = y.at + (head * y.step + i * y.stride);
          other = dy.at + (head * dy.step + i * dy.stride);
        }
        double along = 0;
        for (std::int64_t j = lanes.lane(); j < width; j += lanes.count())
          along += static_cast<double>(one[j] * other[j]);
        const auto mean = static_cast<float>(lanes.sum(along));
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count())
          to[j] = s[j] * ((ds[j] - mean) * h.scale);
      });
  m.product({t.rows, h.width, t.keys, p, o.k, d.q, h.heads, 1, part ? 1.0f : 0.0f});
  m.product({t.keys, h.width, t.rows, transposed(p), o.q, d.k, h.heads, 1, 1});
}
template <class M>
bool attend_backward(M& m, const Attention& op, const Arguments& a, bool part) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2], &dy = a.output_gradients[0];
  if (a.extras.empty() || numbers(a.extras[0]) == nullptr) return false;
  if (!wanted(a, 0) || !wanted(a, 1) || !wanted(a, 2)) return false;
  if (!one_type(q, k, v) || dy.type != q.type) return false;
  if (flash_backward(m, op, a, part)) return true;
  const Heads h = heads_of(m, op, q, k);
  if (!part) fill_values(m, numbers(a.results[0]), a.results[0].size(), 0);
  // All tiles add to these: in fp32.
  Numbers sums[3];
  for (std::size_t n : {std::size_t{1}, std::size_t{2}}) {
    const Tensor& to = a.results[n];
    sums[n] = numbers(to).narrow() ? Numbers(m.scratch(to.size())) : numbers(to);
    if (!part || numbers(to).narrow()) fill_values(m, sums[n], to.size(), 0);
  }
  const Scores s = scores_for(m, op, h, q, k, true);
  const Numbers lse = op.materialised ? nullptr : numbers(a.extras[0]);
  const Numbers kept = op.materialised ? numbers(a.extras[0]) : nullptr;
  const Numbers y = part ? numbers(a.outputs[0]) : nullptr;
  for_each_tile(op, h, q, k, [&](const ScoreTile& t) {
    if (t.keys == 0) return;
    attend_tile_backward(m, h, t, operands_of(h, t, numbers(q), numbers(k), numbers(v), y),
                         operands_of(h, t, numbers(a.results[0]), sums[1], sums[2], nullptr),
                         operands_of(h, t, nullptr, nullptr, nullptr, numbers(dy)).y, s, lse, kept,
                         part);
  });
  for (std::size_t n : {std::size_t{1}, std::size_t{2}}) {
    const Numbers to = numbers(a.results[n]), from = sums[n];
    if (!to.narrow()) continue;
    m.each(
        a.results[n].size(), PARTITA_KERNEL(std::int64_t i) {
          to[i] = part ? to[i] + from[i] : static_cast<float>(from[i]);
        });
  }
  return true;
}
template <class M>
bool data(M& m, const Attention& op, const Context&, const Arguments& a) {
  return attend_backward(m, op, a, false);
}

/// Of the sinks. A sink's own value is 0, so of its weight only the mean of its row's slopes pulls:
/// - exp(sink) / sum of all · dy · y, over all queries. Scores and slopes are computed again.
template <class M>
bool weight(M& m, const Attention& op, const Context&, const Arguments& a) {
  if (!op.sinks) return true;
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2], &dy = a.output_gradients[0];
  if (!one_type(q, k, v) || dy.type != q.type || a.parameters.empty()) return false;
  const Numbers sinks = numbers(a.parameters[0]);
  if (sinks == nullptr || !wanted(a, 0)) return false;
  const Heads h = heads_of(m, op, q, k);
  const std::int64_t all = h.heads * h.group;
  float* const pulls = m.scratch(h.samples * all * h.queries);
  fill_values(m, pulls, h.samples * all * h.queries, 0);
  const Scores s = scores_for(m, op, h, q, k, true);
  for_each_tile(op, h, q, k, [&](const ScoreTile& t) {
    if (t.keys == 0) return;
    const TileOperands o = operands_of(h, t, numbers(q), numbers(k), numbers(v), numbers(dy));
    float *const scores = s.scores, *const slopes = s.slopes;
    m.product(
        {t.rows, t.keys, h.width, o.q, transposed(o.k), s.matrix(scores, t), h.heads, h.scale, 0});
    m.product(
        {t.rows, t.keys, h.v_width, o.y, transposed(o.v), s.matrix(slopes, t), h.heads, 1, 0});
    m.rows(
        h.heads * t.rows, t.keys, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
          const std::int64_t head = row / t.rows, i = row % t.rows;
          const float *p = scores + row * t.keys, *ds = slopes + row * t.keys;
          const auto sink = static_cast<float>(sinks[head * h.group + t.g]);
          double top = static_cast<double>(sink);
          for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
            if (h.sees(t.first + i, t.key + j)) top = fmax(top, static_cast<double>(p[j]));
          }
          const auto high = static_cast<float>(lanes.max(top));
          double sum = 0, along = 0;
          for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
            if (!h.sees(t.first + i, t.key + j)) continue;
            const float e = expf(p[j] - high);
            sum += static_cast<double>(e);
            along += static_cast<double>(e * ds[j]);
          }
          sum = lanes.sum(sum);
          along = lanes.sum(along);
          if (lanes.lane() != 0) return;
          const auto own = static_cast<double>(expf(sink - high));
          const double total = sum + own;
          pulls[line_of(h, t, head, i)] = static_cast<float>(-own * along / (total * total));
        });
  });
  const Numbers d = numbers(a.results[0]);
  const bool adds = a.accumulate;
  m.rows(
      all, h.samples * h.queries, PARTITA_KERNEL(std::int64_t n, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t e = lanes.lane(); e < h.samples * h.queries; e += lanes.count())
          sum += static_cast<double>(pulls[(e / h.queries * all + n) * h.queries + e % h.queries]);
        sum = lanes.sum(sum);
        if (lanes.lane() == 0)
          d[n] = (adds ? static_cast<float>(d[n]) : 0.0f) + static_cast<float>(sum);
      });
  return true;
}

/// Adds one part of keys and values to y and its log-sum-exp: runtime/reference/ring_attention.h.
template <class M>
bool attend_part(M& m, const Attention& op, const Arguments& a) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2];
  if (!one_type(q, k, v)) return false;
  if (flash_forward(m, op, a, true)) return true;
  const Heads h = heads_of(m, op, q, k);
  const Scores s = scores_for(m, op, h, q, k, false);
  const Numbers lse = numbers(a.extras[0]);
  for_each_tile(op, h, q, k, [&](const ScoreTile& t) {
    if (t.keys == 0) return;
    add_tile(m, h, t, operands_of(h, t, numbers(q), numbers(k), numbers(v), numbers(a.results[0])),
             s, lse);
  });
  return true;
}
template <class M>
void add_tile(M& m, const Heads& h, const ScoreTile& t, const TileOperands& o, const Scores& s,
              Numbers lse) {
  float* const scores = s.scores;
  const Numbers factors = s.factors;
  const Matrix y = o.y;
  m.product(
      {t.rows, t.keys, h.width, o.q, transposed(o.k), s.matrix(scores, t), h.heads, h.scale, 0});
  m.rows(
      h.heads * t.rows, t.keys, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const std::int64_t head = row / t.rows, i = row % t.rows, line = line_of(h, t, head, i);
        float* p = scores + row * t.keys;
        const Numbers share = factors + row * t.keys, to = y.at + (head * y.step + i * y.stride);
        double top = -INFINITY;
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
          if (h.sees(t.first + i, t.key + j)) top = fmax(top, static_cast<double>(p[j]));
        }
        top = lanes.max(top);
        const float before = lse[line];
        const auto high = static_cast<float>(top);
        double sum = 0;
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) {
          const bool sees = !infinite(top) && h.sees(t.first + i, t.key + j);
          p[j] = sees ? expf(p[j] - high) : 0.0f;
          sum += static_cast<double>(p[j]);
        }
        // The sum is every lane's: nobody writes lse before all have read it.
        const auto all = static_cast<float>(lanes.sum(sum));
        if (infinite(top)) {  // sees nothing of this part
          for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count()) share[j] = 0.0f;
          return;
        }
        const float here = high + logf(all), largest = fmaxf(here, before);
        const float total = largest + logf(expf(here - largest) + expf(before - largest));
        const float factor = expf(here - total) / all, rest = expf(before - total);
        for (std::int64_t j = lanes.lane(); j < t.keys; j += lanes.count())
          share[j] = p[j] * factor;
        for (std::int64_t f = lanes.lane(); f < h.v_width; f += lanes.count()) to[f] *= rest;
        if (lanes.lane() == 0) lse[line] = total;
      });
  m.product({t.rows, h.v_width, t.keys, s.matrix(factors, t), o.v, o.y, h.heads, 1, 1});
}

template <class M>
bool forward(M& m, const BatchedProduct&, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &w = a.inputs[1];
  const std::size_t dims = x.index->size();
  const std::int64_t rows = extent(x, dims - 2, dims - 1), k = extent(x, dims - 1, dims),
                     n = extent(w, dims - 1, dims), batch = extent(x, 0, dims - 2);
  if (rows * k * n * batch == 0 || x.type != w.type) return false;
  m.product({rows,
             n,
             k,
             {numbers(x), k, rows * k, false},
             {numbers(w), n, k * n, false},
             {numbers(a.results[0]), n, rows * n, false},
             batch});
  return true;
}
template <class M>
bool data(M& m, const BatchedProduct&, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &w = a.inputs[1];
  const std::size_t dims = x.index->size();
  const std::int64_t rows = extent(x, dims - 2, dims - 1), k = extent(x, dims - 1, dims),
                     n = extent(w, dims - 1, dims), batch = extent(x, 0, dims - 2);
  if (rows * k * n * batch == 0 || x.type != w.type) return false;
  const Matrix dy{numbers(a.output_gradients[0]), n, rows * n, false};
  if (wanted(a, 0))
    m.product({rows,
               k,
               n,
               dy,
               {numbers(w), n, k * n, true},
               {numbers(a.results[0]), k, rows * k, false},
               batch});
  if (wanted(a, 1))
    m.product({k,
               n,
               rows,
               {numbers(x), k, rows * k, true},
               dy,
               {numbers(a.results[1]), n, k * n, false},
               batch});
  return true;
}

template <bool kWhole, class M>
void shares_of_rows(M& m, std::int64_t n, const Tensor& x, Numbers y) {
  const Numbers all = numbers(x);
  m.rows(
      x.size() / n, kept_width(n), PARTITA_KERNEL(std::int64_t r, const Lanes& lanes) {
        const Numbers from[1] = {all};
        const KeptRows<1, kWhole> row(from, r * n, n, lanes);
        SumOfPowers powers;
        row.each(
            [&](std::int64_t, std::int64_t count, const Octet(&o)[1]) { powers.add(count, o[0]); });
        powers.join(lanes);
        const float by = 1 / static_cast<float>(powers.sum);
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&o)[1]) {
          Octet to;
          for (int k = 0; k < Octet::kSize; ++k) to.v[k] = quick_power(o[0].v[k] - powers.top) * by;
          put<kWhole>(y, r * n + e, count, to);
        });
      });
}
template <class M>
bool forward(M& m, const Softmax&, const Context&, const Arguments& a) {
  const Tensor& x = a.inputs[0];
  const std::int64_t n = extent(x, x.index->size() - 1, x.index->size());
  if (n == 0) return true;
  if (whole_rows(n, a)) {
    shares_of_rows<true>(m, n, x, numbers(a.results[0]));
  } else {
    shares_of_rows<false>(m, n, x, numbers(a.results[0]));
  }
  return true;
}
template <bool kWhole, class M>
void slopes_of_shares(M& m, std::int64_t n, const Tensor& y, Numbers dy, Numbers dx) {
  const Numbers p = numbers(y);
  m.rows(
      y.size() / n, kept_width(n), PARTITA_KERNEL(std::int64_t r, const Lanes& lanes) {
        const Numbers from[2] = {p, dy};
        const KeptRows<2, kWhole> row(from, r * n, n, lanes);
        double along = 0;
        row.each([&](std::int64_t, std::int64_t, const Octet(&o)[2]) {
          Octet times;
          for (int k = 0; k < Octet::kSize; ++k) times.v[k] = o[0].v[k] * o[1].v[k];
          along += static_cast<double>(sum_of(times));
        });
        const auto mean = static_cast<float>(lanes.sum(along));
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&o)[2]) {
          Octet to;
          for (int k = 0; k < Octet::kSize; ++k) to.v[k] = o[0].v[k] * (o[1].v[k] - mean);
          put<kWhole>(dx, r * n + e, count, to);
        });
      });
}
template <class M>
bool data(M& m, const Softmax&, const Context&, const Arguments& a) {
  const Tensor& y = a.outputs[0];
  const std::int64_t n = extent(y, y.index->size() - 1, y.index->size());
  if (n == 0) return true;
  const Numbers dy = numbers(a.output_gradients[0]), dx = numbers(a.results[0]);
  if (whole_rows(n, a) && together(numbers(y), Octet::kSize)) {
    slopes_of_shares<true>(m, n, y, dy, dx);
  } else {
    slopes_of_shares<false>(m, n, y, dy, dx);
  }
  return true;
}

// ---------------------------------------------------------------------------------------- losses

/// What a label's row has there; 0 where it is another rank's.
PARTITA_LANE float logit_of(const Numbers& row, const IndexList& held, std::int64_t label) {
  const std::int64_t at = held.find(label);
  return at < 0 ? 0.0f : static_cast<float>(row[at]);
}
template <class M>
bool statistic(M& m, const CrossEntropy&, std::size_t k, const Arguments& a) {
  const Tensor &x = a.inputs[0], &labels = a.inputs[1];
  if (labels.ids == nullptr) return false;
  const std::int64_t n = extent(x, x.index->size() - 1, x.index->size());
  const Numbers from = numbers(x), top = k == 0 ? nullptr : numbers(a.statistics[0]);
  const std::int64_t* label = labels.ids;
  const Numbers s = numbers(a.results[0]);
  const IndexList held = m.list(x.index->back());
  m.rows(
      labels.size(), once_width(n), PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const Numbers line = from + row * n;
        if (top == nullptr) {
          float high = -INFINITY;
          each_octet(line, n, lanes, [&](std::int64_t, std::int64_t count, const Octet& o) {
            for (int e = 0; e < Octet::kSize; ++e) {
              if (e < count) high = fmaxf(high, o.v[e]);
            }
          });
          high = static_cast<float>(lanes.max(static_cast<double>(high)));
          if (lanes.lane() == 0) s[row] = high;
          return;
        }
        const float high = top[row];
        double sum = 0;
        each_octet(line, n, lanes, [&](std::int64_t, std::int64_t count, const Octet& o) {
          float part = 0;
          for (int e = 0; e < Octet::kSize; ++e) {
            if (e < count) part += quick_power(o.v[e] - high);
          }
          sum += static_cast<double>(part);
        });
        sum = lanes.sum(sum);
        if (lanes.lane() != 0) return;
        s[2 * row] = static_cast<float>(sum);
        s[2 * row + 1] = logit_of(line, held, label[row]);
      });
  return true;
}
/// Both statistics of rows that nobody else has a part of, in one look.
template <bool kWhole, bool kNarrow, class M>
void statistics(M& m, const CrossEntropy&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &labels = a.inputs[1];
  const std::int64_t n = extent(x, x.index->size() - 1, x.index->size());
  const Numbers from = numbers(x), top = numbers(a.statistics[0]), sums = numbers(a.statistics[1]);
  const std::int64_t* label = labels.ids;
  const IndexList held = m.list(x.index->back());
  m.rows(
      labels.size(), once_width(n), PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const Numbers line = from + row * n;
        // On its way while the row is looked at.
        const float own = lanes.lane() == 0 ? logit_of(line, held, label[row]) : 0.0f;
        SumOfPowers powers;
        each_octet<kWhole, kNarrow>(
            line, n, lanes,
            [&](std::int64_t, std::int64_t count, const Octet& o) { powers.add(count, o); });
        powers.join(lanes);
        if (lanes.lane() != 0) return;
        top[row] = powers.top;
        sums[2 * row] = static_cast<float>(powers.sum);
        sums[2 * row + 1] = own;
      });
}
template <class M>
bool forward(M& m, const CrossEntropy& op, const Context& c, const Arguments& a) {
  if (a.own_statistics) {
    if (a.inputs[1].ids == nullptr && a.inputs[1].size() > 0) return false;
    by_rows(whole_rows(std::ssize(a.inputs[0].index->back()), a), numbers(a.inputs[0]).narrow(),
            [&]<bool kWhole, bool kNarrow>() { statistics<kWhole, kNarrow>(m, op, a); });
  }
  const Numbers top = numbers(a.statistics[0]), sums = numbers(a.statistics[1]);
  const std::int64_t rows = a.inputs[1].size();
  const double scale = c.loss_scale;
  const Numbers y = numbers(a.results[0]);
  m.rows(
      1, rows, PARTITA_KERNEL(std::int64_t, const Lanes& lanes) {
        double loss = 0;
        for (std::int64_t r = lanes.lane(); r < rows; r += lanes.count())
          loss += static_cast<double>(logf(sums[2 * r]) + (top[r] - sums[2 * r + 1]));
        loss = lanes.sum(loss);
        if (lanes.lane() == 0) y[0] = static_cast<float>(loss * scale);
      });
  return true;
}
/// Gradient of the loss; null: 1, it is the end of the network.
inline Numbers above(const Arguments& a) {
  return a.output_gradients.empty() || !a.output_gradients[0] ? nullptr
                                                              : numbers(a.output_gradients[0]);
}
/// In place, too: a lane writes only what it has read.
template <bool kWhole, bool kNarrow, class M>
void slopes_of_losses(M& m, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &labels = a.inputs[1];
  const std::int64_t n = extent(x, x.index->size() - 1, x.index->size());
  const Numbers from = numbers(x), top = numbers(a.statistics[0]), sums = numbers(a.statistics[1]),
                gradient = above(a), dx = numbers(a.results[0]);
  const std::int64_t* label = labels.ids;
  const double scale = c.loss_scale;
  const IndexList held = m.list(x.index->back());
  m.rows(
      labels.size(), once_width(n), PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const auto d = static_cast<float>(
            (gradient != nullptr ? static_cast<double>(gradient[0]) : 1.0) * scale);
        const float high = top[row], by = d / sums[2 * row];
        const std::int64_t at = held.find(label[row]);
        const Numbers to = dx + row * n;
        each_octet<kWhole, kNarrow>(
            from + row * n, n, lanes, [&](std::int64_t first, std::int64_t count, Octet o) {
              // Of the octet, where it is: -1 where it is not.
              const std::int64_t ahead = at - first;
              const int hit = at >= 0 && ahead >= 0 && ahead < count && ahead < Octet::kSize
                                  ? static_cast<int>(ahead)
                                  : -1;
              for (int k = 0; k < Octet::kSize; ++k) {
                const float p = quick_power(o.v[k] - high) * by;
                o.v[k] = k == hit ? p - d : p;
              }
              put<kWhole>(to, first, count, o);
            });
      });
}
template <class M>
bool data(M& m, const CrossEntropy&, const Context& c, const Arguments& a) {
  const Tensor& x = a.inputs[0];
  if (a.inputs[1].ids == nullptr) return false;
  by_rows(whole_rows(std::ssize(x.index->back()), a),
          numbers(x).narrow() && numbers(a.results[0]).narrow(),
          [&]<bool kWhole, bool kNarrow>() { slopes_of_losses<kWhole, kNarrow>(m, c, a); });
  return true;
}
template <class M>
bool forward(M& m, const MeanSquaredError&, const Context& c, const Arguments& a) {
  const std::int64_t n = a.inputs[0].size();
  const Numbers x = numbers(a.inputs[0]), target = numbers(a.inputs[1]);
  const double scale = c.loss_scale;
  const Numbers y = numbers(a.results[0]);
  m.rows(
      1, n, PARTITA_KERNEL(std::int64_t, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t i = lanes.lane(); i < n; i += lanes.count()) {
          const float d = x[i] - target[i];
          sum += static_cast<double>(d * d);
        }
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) y[0] = static_cast<float>(sum * scale);
      });
  return true;
}
template <class M>
bool data(M& m, const MeanSquaredError&, const Context& c, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), target = numbers(a.inputs[1]), gradient = above(a);
  const double scale = c.loss_scale;
  const Numbers dx = numbers(a.results[0]);
  m.each(
      a.inputs[0].size(), PARTITA_KERNEL(std::int64_t i) {
        const double g = gradient != nullptr ? static_cast<double>(gradient[0]) : 1.0;
        dx[i] = static_cast<float>(2 * g * scale) * (x[i] - target[i]);
      });
  return true;
}

// ---------------------------------------------------------------------------------------- images

/// The local window along one dimension: input positions of output o are first + o · stride + k ·
/// dilation, those outside [0, inputs) are padding.
struct LocalWindow {
  std::int64_t outputs, inputs, first, kernel, stride, dilation;
  PARTITA_BOTH std::int64_t input(std::int64_t out, std::int64_t k) const {
    return first + out * stride + k * dilation;
  }
  PARTITA_BOTH bool inside(std::int64_t in) const { return in >= 0 && in < inputs; }
};
inline LocalWindow local_window(const Window& w, const Indices& x, const Indices& y) {
  return {static_cast<std::int64_t>(y.size()),
          static_cast<std::int64_t>(x.size()),
          y.empty() || x.empty() ? 0 : y.front() * w.stride - w.pad_before - x.front(),
          w.kernel,
          w.stride,
          w.dilation};
}
/// Pads or crops: to[plane, i, j] = from[plane, i + top, j + left], 0 outside.
template <class M>
void shift_planes(M& m, Numbers from, Numbers to, std::int64_t planes, std::int64_t from_rows,
                  std::int64_t from_columns, std::int64_t rows, std::int64_t columns,
                  std::int64_t top, std::int64_t left) {
  m.each(
      planes * rows * columns, PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t plane = e / (rows * columns), i = e / columns % rows + top,
                           j = e % columns + left;
        const bool inside = i >= 0 && i < from_rows && j >= 0 && j < from_columns;
        to[e] = inside ? from[(plane * from_rows + i) * from_columns + j] : 0.0f;
      });
}

/// Which plane of `area` numbers a number is in, and those after it: divided once for all.
struct PlaneOf {
  std::int64_t plane, within, area;
  PARTITA_BOTH PlaneOf(std::int64_t number, std::int64_t of)
      : plane(number / of), within(number - plane * of), area(of) {}
  PARTITA_BOTH void step() {
    if (++within == area) within = 0, ++plane;
  }
};
/// to[channel] (+)= sum of y over samples and places.
template <class M>
void sum_channels(M& m, const ConvolutionShape& s, Numbers y, Numbers to, bool accumulate) {
  Runs r;
  r.batch = true;
  r.groups = s.out, r.repeats = s.samples, r.length = s.out_height * s.out_width;
  sum_by_parts(
      m, r,
      PARTITA_KERNEL(std::int64_t g, const Lanes& lanes, std::int64_t part, std::int64_t parts,
                     double& sum, double&) {
        r.each(
            lanes, g, y,
            [&](std::int64_t, std::int64_t, std::int64_t, const Octet& o) {
              sum += static_cast<double>(sum_of(o));
            },
            part, parts);
      },
      PARTITA_KERNEL(std::int64_t g, double sum, double) {
        to[g] = static_cast<float>(sum) + (accumulate ? to[g] : 0.0f);
      });
}
/// Libraries pad alike on both sides: where the local window does not, the input is padded by a
/// copy.
template <class M>
bool convolution(M& m, const Convolution& op, const Context& c, const Arguments& a,
                 ConvolutionPass pass) {
  const Signature& s = *c.signature;
  std::vector<Indices> xi, wi, yi;
  for (std::size_t d = 0; d < 4; ++d) {
    xi.push_back(reference::touched(c, s.inputs[0], d));
    wi.push_back(reference::touched(c, s.parameters[0], d));
    yi.push_back(reference::touched(c, s.outputs[0], d));
  }
  for (const Indices* list : {&xi[2], &xi[3], &yi[2], &yi[3]}) {
    if (list->empty() ||
        list->back() - list->front() + 1 != static_cast<std::int64_t>(list->size()))
      return false;
  }
  const auto length = [](const Indices& list) { return static_cast<std::int64_t>(list.size()); };
  const LocalWindow h = local_window(op.height, xi[2], yi[2]),
                    w = local_window(op.width, xi[3], yi[3]);
  ConvolutionShape shape{length(xi[0]), length(xi[1]), h.inputs,   w.inputs,  length(yi[1]),
                         op.groups,     h.kernel,      w.kernel,   h.outputs, w.outputs,
                         h.stride,      w.stride,      h.dilation, w.dilation};
  if (shape.samples * shape.in * shape.out == 0 || shape.out % op.groups != 0) return false;
  // Whatever the pass reads is of one type, which the library computes in.
  const Tensor& one = pass == ConvolutionPass::data ? a.output_gradients[0] : a.inputs[0];
  const Tensor& other = pass == ConvolutionPass::weight ? a.output_gradients[0] : a.parameters[0];
  if (one.type != other.type) return false;
  shape.type = one.type;
  const auto needs = [](const LocalWindow& l) {
    return (l.outputs - 1) * l.stride + l.dilation * (l.kernel - 1) + 1;
  };
  const auto alike = [&](const LocalWindow& l) {
    const std::int64_t pad = -l.first;
    return pad >= 0 && l.inputs + 2 * pad >= needs(l) && l.inputs + 2 * pad < needs(l) + l.stride;
  };
  const std::int64_t planes = shape.samples * shape.in, columns = w.inputs, rows = h.inputs;
  const bool direct = alike(h) && alike(w);
  Numbers padded;
  if (direct) {
    shape.pad_height = -h.first;
    shape.pad_width = -w.first;
  } else {
    shape.height = needs(h);
    shape.width = needs(w);
    padded = scratch(m, planes * shape.height * shape.width, shape.type);
    if (pass != ConvolutionPass::data)
      shift_planes(m, numbers(a.inputs[0]), padded, planes, rows, columns, shape.height,
                   shape.width, h.first, w.first);
  }
  const bool bias = op.bias && c.adds_bias;
  const std::int64_t area = shape.out_height * shape.out_width, out = shape.out;
  if (pass == ConvolutionPass::forward) {
    const Numbers y = numbers(a.results[0]);
    if (!m.convolve(shape, pass, direct ? numbers(a.inputs[0]) : padded, numbers(a.parameters[0]),
                    y, false))
      return false;
    if (bias) {
      const Numbers b = numbers(a.parameters[1]);
      const std::int64_t n = shape.samples * out * area;
      m.each(
          octets(n), PARTITA_KERNEL(std::int64_t number) {
            const std::int64_t first = number * Octet::kSize, count = n - first;
            Octet o = octet(y, first, count);
            PlaneOf at(first, area);
            for (int k = 0; k < Octet::kSize && k < count; ++k, at.step())
              o.v[k] += b[at.plane % out];
            put(y, first, count, o);
          });
    }
    return true;
  }
  const Numbers dy = numbers(a.output_gradients[0]);
  if (pass == ConvolutionPass::data) {
    const Numbers dx = numbers(a.results[0]);
    if (!m.convolve(shape, pass, direct ? dx : padded, numbers(a.parameters[0]), dy, false))
      return false;
    if (!direct)
      shift_planes(m, padded, dx, planes, shape.height, shape.width, rows, columns, -h.first,
                   -w.first);
    return true;
  }
  if (!wanted(a, 0)) return false;
  const Numbers dw = numbers(a.results[0]);
  const std::int64_t weights = a.results[0].size();
  const bool apart = dw.type() != shape.type, accumulates = a.accumulate;
  const Numbers made = apart ? scratch(m, weights, shape.type) : dw;
  if (!m.convolve(shape, pass, direct ? numbers(a.inputs[0]) : padded, made, dy,
                  accumulates && !apart))
    return false;
  if (apart) {
    m.each(
        weights, PARTITA_KERNEL(std::int64_t i) {
          dw[i] = accumulates ? dw[i] + made[i] : static_cast<float>(made[i]);
        });
  }
  if (op.bias && wanted(a, 1)) {
    const Numbers to = numbers(a.results[1]);
    if (bias) {
      sum_channels(m, shape, dy, to, a.accumulate);
    } else if (!a.accumulate) {
      fill_values(m, to, out, 0);
    }
  }
  return true;
}
template <class M>
bool forward(M& m, const Convolution& op, const Context& c, const Arguments& a) {
  return convolution(m, op, c, a, ConvolutionPass::forward);
}
template <class M>
bool data(M& m, const Convolution& op, const Context& c, const Arguments& a) {
  return convolution(m, op, c, a, ConvolutionPass::data);
}
template <class M>
bool weight(M& m, const Convolution& op, const Context& c, const Arguments& a) {
  return convolution(m, op, c, a, ConvolutionPass::weight);
}

/// A local window of a pool, in numbers that a GPU divides fast.
struct PoolWindow {
  int outputs, inputs, first, kernel, stride, dilation;
  explicit PoolWindow(const LocalWindow& w)
      : outputs(static_cast<int>(w.outputs)),
        inputs(static_cast<int>(w.inputs)),
        first(static_cast<int>(w.first)),
        kernel(static_cast<int>(w.kernel)),
        stride(static_cast<int>(w.stride)),
        dilation(static_cast<int>(w.dilation)) {}
  PARTITA_BOTH int steps(int distance) const {  ///< rounded up; of no distance none
    return distance <= 0 ? 0 : dilation == 1 ? distance : (distance + dilation - 1) / dilation;
  }
  /// Elements [low, high) of an output's window are no padding.
  PARTITA_BOTH int low(int out) const { return steps(-(first + out * stride)); }
  PARTITA_BOTH int high(int out) const {
    const int n = steps(inputs - (first + out * stride));
    return n < kernel ? n : kernel;
  }
  PARTITA_BOTH int inside(int out) const {
    const int n = high(out) - low(out);
    return n > 0 ? n : 0;
  }
  /// Outputs [from, to) are those whose windows may have an input: if they reach it.
  PARTITA_BOTH int from(int in) const {
    const int distance = in - first - (kernel - 1) * dilation;
    return distance <= 0 ? 0 : (distance + stride - 1) / stride;
  }
  PARTITA_BOTH int to(int in) const {
    const int distance = in - first, n = distance < 0 ? 0 : distance / stride + 1;
    return n < outputs ? n : outputs;
  }
  PARTITA_BOTH bool reaches(int out, int in) const {
    return dilation == 1 || (in - first - out * stride) % dilation == 0;
  }
};
struct PoolWindows {
  PoolWindow h, w;
  bool padding;
  PARTITA_BOTH std::int64_t inputs() const { return std::int64_t{h.inputs} * w.inputs; }
  PARTITA_BOTH std::int64_t outputs() const { return std::int64_t{h.outputs} * w.outputs; }
  PARTITA_BOTH float divisor(int i, int j) const {
    const int n = padding ? h.kernel * w.kernel : h.inside(i) * w.inside(j);
    return static_cast<float>(n > 0 ? n : 1);
  }
  /// f(position, number) of what output (i, j) reads of a plane, row by row.
  template <class F>
  PARTITA_LANE void each(const Numbers& plane, int i, int j, F f) const {
    const int first = w.low(j), end = w.high(j);
    for (int r = h.low(i); r < h.high(i); ++r) {
      int at = (h.first + i * h.stride + r * h.dilation) * w.inputs + w.first + j * w.stride +
               first * w.dilation;
      for (int s = first; s < end; ++s, at += w.dilation) f(at, static_cast<float>(plane[at]));
    }
  }
};
inline PoolWindows pool_windows(const Pool& op, const Tensor& x, const Tensor& y) {
  return {PoolWindow(local_window(op.height, (*x.index)[2], (*y.index)[2])),
          PoolWindow(local_window(op.width, (*x.index)[3], (*y.index)[3])), op.count_padding};
}
/// Position of the first of the largest numbers; -1 where all is padding.
struct Largest {
  int at = -1;
  float v = -INFINITY;
  PARTITA_LANE void see(int position, float x) {
    if (at < 0 || x > v) at = position, v = x;
  }
};
template <class M>
bool forward(M& m, const Pool& op, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &y = a.results[0];
  const PoolWindows p = pool_windows(op, x, y);
  const Numbers from = numbers(x);
  const Numbers to = numbers(y);
  const bool maximum = op.maximum;
  m.each(
      y.size(), PARTITA_KERNEL(std::int64_t e) {
        const PlaneOf of(e, p.outputs());
        const int at = static_cast<int>(of.within), i = at / p.w.outputs, j = at - i * p.w.outputs;
        const Numbers plane = from + of.plane * p.inputs();
        if (maximum) {
          Largest top;
          p.each(plane, i, j, [&](int position, float v) { top.see(position, v); });
          to[e] = top.v;
        } else {
          float sum = 0;
          p.each(plane, i, j, [&](int, float v) { sum += v; });
          to[e] = sum / p.divisor(i, j);
        }
      });
  return true;
}
/// Each input adds up what it gets from the outputs that read it; of a maximum only where it was
/// the first, which is looked for once.
template <class M>
bool data(M& m, const Pool& op, const Context&, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &dx = a.results[0];
  const PoolWindows p = pool_windows(op, dx, dy);
  const Numbers d = numbers(dy), to = numbers(dx);
  std::int32_t* const largest =
      op.maximum ? reinterpret_cast<std::int32_t*>(m.scratch(dy.size())) : nullptr;
  if (op.maximum) {
    const Numbers from = numbers(a.inputs[0]);
    m.each(
        dy.size(), PARTITA_KERNEL(std::int64_t e) {
          const PlaneOf of(e, p.outputs());
          const int at = static_cast<int>(of.within), i = at / p.w.outputs,
                    j = at - i * p.w.outputs;
          Largest top;
          p.each(from + of.plane * p.inputs(), i, j,
                 [&](int position, float v) { top.see(position, v); });
          largest[e] = top.at;
        });
  }
  m.each(
      dx.size(), PARTITA_KERNEL(std::int64_t e) {
        const PlaneOf of(e, p.inputs());
        const int at = static_cast<int>(of.within), y = at / p.w.inputs, x = at - y * p.w.inputs;
        const std::int64_t plane = of.plane * p.outputs();
        const int first = p.w.from(x), end = p.w.to(x);
        float sum = 0;
        for (int i = p.h.from(y); i < p.h.to(y); ++i) {
          if (!p.h.reaches(i, y)) continue;
          for (int j = first; j < end; ++j) {
            const std::int64_t output = plane + i * p.w.outputs + j;
            if (largest != nullptr) {
              if (largest[output] == at) sum += d[output];
            } else if (p.w.reaches(j, x)) {
              sum += d[output] / p.divisor(i, j);
            }
          }
        }
        to[e] = sum;
      });
  return true;
}

template <class M>
bool forward(M& m, const GlobalAveragePool&, const Context& c, const Arguments& a) {
  const Tensor& x = a.inputs[0];
  const Shape& whole = c.signature->inputs[0].shape;
  const auto all = static_cast<float>(whole[2].extent * whole[3].extent);
  const std::int64_t plane = extent(x, 2, 4);
  const Numbers from = numbers(x);
  const Numbers y = numbers(a.results[0]);
  m.rows(
      extent(x, 0, 2), plane, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t e = lanes.lane(); e < plane; e += lanes.count())
          sum += static_cast<double>(from[i * plane + e]);
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) y[i] = static_cast<float>(sum) / all;
      });
  return true;
}
template <class M>
bool data(M& m, const GlobalAveragePool&, const Context& c, const Arguments& a) {
  const Tensor& dx = a.results[0];
  const Shape& whole = c.signature->inputs[0].shape;
  const auto all = static_cast<float>(whole[2].extent * whole[3].extent);
  const std::int64_t plane = extent(dx, 2, 4);
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers to = numbers(dx);
  const std::int64_t n = dx.size();
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        const std::int64_t first = number * Octet::kSize, count = n - first;
        PlaneOf at(first, plane);
        Octet o;
        for (int k = 0; k < Octet::kSize && k < count; ++k, at.step()) o.v[k] = dy[at.plane] / all;
        put(to, first, count, o);
      });
  return true;
}

/// y[i] = x[i] * by[i / area].
template <class M>
void scale_planes(M& m, Numbers x, Numbers by, Numbers y, std::int64_t n, std::int64_t area) {
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        const std::int64_t first = number * Octet::kSize, count = n - first;
        Octet o = octet(x, first, count);
        PlaneOf at(first, area);
        for (int k = 0; k < Octet::kSize && k < count; ++k, at.step()) o.v[k] *= by[at.plane];
        put(y, first, count, o);
      });
}
template <class M>
bool forward(M& m, const ScaleFeatures&, const Context&, const Arguments& a) {
  const std::int64_t plane = extent(a.inputs[0], 2, 4);
  const Numbers x = numbers(a.inputs[0]), gate = numbers(a.inputs[1]);
  const Numbers y = numbers(a.results[0]);
  scale_planes(m, x, gate, y, a.inputs[0].size(), plane);
  return true;
}
template <class M>
bool data(M& m, const ScaleFeatures&, const Context&, const Arguments& a) {
  const std::int64_t plane = extent(a.inputs[0], 2, 4);
  const Numbers x = numbers(a.inputs[0]), gate = numbers(a.inputs[1]);
  const Numbers dy = numbers(a.output_gradients[0]);
  if (wanted(a, 0)) {
    const Numbers dx = numbers(a.results[0]);
    scale_planes(m, dy, gate, dx, a.inputs[0].size(), plane);
  }
  if (wanted(a, 1)) {
    const Numbers dg = numbers(a.results[1]);
    m.rows(
        extent(a.inputs[0], 0, 2), plane, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
          double sum = 0;
          for (std::int64_t e = lanes.lane(); e < plane; e += lanes.count())
            sum += static_cast<double>(dy[i * plane + e]) * static_cast<double>(x[i * plane + e]);
          sum = lanes.sum(sum);
          if (lanes.lane() == 0) dg[i] = static_cast<float>(sum);
        });
  }
  return true;
}

// ---------------------------------------------------------------------------------------- shapes

/// to[i, c, r] = from[i, r, c].
template <class M>
void turn(M& m, Numbers from, Numbers to, std::int64_t images, std::int64_t rows,
          std::int64_t columns) {
  m.each(
      images * rows * columns, PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t image = e / (rows * columns), at = e % (rows * columns);
        to[e] = from[image * rows * columns + at % rows * columns + at / rows];
      });
}
template <class M>
bool forward(M& m, const ToSequence&, const Context&, const Arguments& a) {
  const Tensor& x = a.inputs[0];
  turn(m, numbers(x), numbers(a.results[0]), extent(x, 0, 1), extent(x, 1, 2), extent(x, 2, 4));
  return true;
}
template <class M>
bool data(M& m, const ToSequence&, const Context&, const Arguments& a) {
  const Tensor& dx = a.results[0];
  turn(m, numbers(a.output_gradients[0]), numbers(dx), extent(dx, 0, 1), extent(dx, 2, 4),
       extent(dx, 1, 2));
  return true;
}

template <class M>
bool forward(M& m, const PrependToken&, const Context&, const Arguments& a) {
  const std::int64_t n = a.parameters[0].size(), tokens = extent(a.inputs[0], 1, 2) * n,
                     sample = n + tokens;
  const Numbers token = numbers(a.parameters[0]), x = numbers(a.inputs[0]);
  const Numbers y = numbers(a.results[0]);
  m.each(
      extent(a.inputs[0], 0, 1) * sample, PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t i = e / sample, at = e % sample;
        y[e] = at < n ? token[at] : x[i * tokens + at - n];
      });
  return true;
}
template <class M>
bool data(M& m, const PrependToken&, const Context&, const Arguments& a) {
  const Tensor& dx = a.results[0];
  const std::int64_t n = extent(dx, 2, 3), tokens = extent(dx, 1, 2) * n;
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers to = numbers(dx);
  m.each(
      dx.size(),
      PARTITA_KERNEL(std::int64_t e) { to[e] = dy[e / tokens * (n + tokens) + n + e % tokens]; });
  return true;
}
template <class M>
bool weight(M& m, const PrependToken&, const Context&, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &d = a.results[0];
  const std::int64_t sample = extent(dy, 1, 3), samples = extent(dy, 0, 1);
  const Numbers from = numbers(dy);
  const Numbers to = numbers(d);
  const bool accumulate = a.accumulate;
  m.each(
      d.size(), PARTITA_KERNEL(std::int64_t f) {
        float sum = accumulate ? to[f] : 0.0f;
        for (std::int64_t i = 0; i < samples; ++i) sum += from[i * sample + f];
        to[f] = sum;
      });
  return true;
}

template <class M>
bool forward(M& m, const SelectToken& op, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &y = a.results[0];
  const std::int64_t token = m.list((*x.index)[1]).below(op.index), n = extent(x, 2, 3),
                     tokens = extent(x, 1, 2);
  const Indices& held = (*x.index)[1];
  const bool here = token < tokens && held[static_cast<std::size_t>(token)] == op.index;
  const Numbers from = numbers(x);
  const Numbers to = numbers(y);
  m.each(
      y.size(), PARTITA_KERNEL(std::int64_t e) {
        to[e] = here ? from[(e / n * tokens + token) * n + e % n] : 0.0f;
      });
  return true;
}
template <class M>
bool data(M& m, const SelectToken& op, const Context&, const Arguments& a) {
  const Tensor& dx = a.results[0];
  const std::int64_t n = extent(dx, 2, 3), tokens = extent(dx, 1, 2), index = op.index;
  const IndexList held = m.list((*dx.index)[1]);
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers to = numbers(dx);
  m.each(
      dx.size(), PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t token = e / n % tokens;
        to[e] = held.at(token) == index ? dy[e / (n * tokens) * n + e % n] : 0.0f;
      });
  return true;
}

/// Parts of a concatenation take turns in memory: part k's run i goes to i · sum of all lengths +
/// the lengths before.
template <class M, class F>
void for_each_run(const Concat& op, const std::vector<Tensor>& parts, M&, F f) {
  const std::size_t dims = parts[0].index->size(), axis = op.last ? dims - 1 : 1;
  std::int64_t whole = 0, before = 0;
  for (const Tensor& t : parts) whole += extent(t, axis, dims);
  for (const Tensor& t : parts) {
    const std::int64_t length = extent(t, axis, dims);
    f(t, length, before, whole);
    before += length;
  }
}
template <class M>
void join(M& m, Numbers from, Numbers to, std::int64_t n, std::int64_t length, std::int64_t before,
          std::int64_t whole, bool apart) {
  m.each(
      n, PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t at = e / length * whole + before + e % length;
        if (apart) {
          to[e] = from[at];
        } else {
          to[at] = from[e];
        }
      });
}
template <class M>
bool forward(M& m, const Concat& op, const Context&, const Arguments& a) {
  for_each_run(op, a.inputs, m,
               [&](const Tensor& t, std::int64_t length, std::int64_t before, std::int64_t whole) {
                 join(m, numbers(t), numbers(a.results[0]), t.size(), length, before, whole, false);
               });
  return true;
}
template <class M>
bool data(M& m, const Concat& op, const Context& c, const Arguments& a) {
  for (std::size_t k = 0; k < c.signature->inputs.size(); ++k) {
    if (!wanted(a, k)) return false;
  }
  for_each_run(op, a.results, m,
               [&](const Tensor& t, std::int64_t length, std::int64_t before, std::int64_t whole) {
                 join(m, numbers(a.output_gradients[0]), numbers(t), t.size(), length, before,
                      whole, true);
               });
  return true;
}

template <class M>
bool forward(M& m, const AppendToHeads&, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &tail = a.inputs[1];
  const std::int64_t heads = extent(x, 2, 3), n = extent(x, 3, 4), r = extent(tail, 2, 3);
  const Numbers from = numbers(x), end = numbers(tail);
  const Numbers y = numbers(a.results[0]);
  m.each(
      extent(x, 0, 3) * (n + r), PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t head = e / (n + r), at = e % (n + r);
        y[e] = at < n ? from[head * n + at] : end[head / heads * r + at - n];
      });
  return true;
}
template <class M>
bool data(M& m, const AppendToHeads&, const Context&, const Arguments& a) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const Tensor &dx = a.results[0], &tail = a.results[1];
  const std::int64_t heads = extent(dx, 2, 3), n = extent(dx, 3, 4), r = extent(tail, 2, 3);
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers to = numbers(dx), end = numbers(tail);
  m.each(
      dx.size(), PARTITA_KERNEL(std::int64_t e) { to[e] = dy[e / n * (n + r) + e % n]; });
  m.each(
      tail.size(), PARTITA_KERNEL(std::int64_t e) {
        float sum = 0;
        for (std::int64_t h = 0; h < heads; ++h)
          sum += dy[(e / r * heads + h) * (n + r) + n + e % r];
        end[e] = sum;
      });
  return true;
}

// ---------------------------------------------------------------------------------------- router

/// Score of an expert before it is scaled.
PARTITA_BOTH double score_of(bool sigmoid, double x, double top, double sum) {
  return sigmoid ? 1 / (1 + exp(-x)) : exp(x - top) / sum;
}
/// What a token's choice of experts is by: Router's.
struct Choosing {
  std::int64_t experts, top_k, each, groups, top_groups, group_best;
  bool sigmoid;
};
/// What is no number is behind all others: a token of them has as many experts as any.
PARTITA_BOTH float ordered(float v) { return v == v ? v : -INFINITY; }
/// Groups that experts may be of, a bit each.
PARTITA_BOTH std::uint64_t open_groups(Numbers logits, const Choosing& c, double top, double sum) {
  if (c.groups <= 1) return ~std::uint64_t{0};
  double sums[64];
  for (std::int64_t g = 0; g < c.groups; ++g) {
    // The best ones in turn: each the largest behind the one before it.
    double last = INFINITY, all = 0;
    std::int64_t taken = 0;
    while (taken < c.group_best) {
      double next = -INFINITY;
      std::int64_t equal = 0;
      for (std::int64_t e = g * c.each; e < (g + 1) * c.each; ++e) {
        double s = score_of(c.sigmoid, static_cast<double>(logits[e]), top, sum);
        if (!(s >= 0)) s = 0;
        if (s >= last || s < next) continue;
        equal = s == next ? equal + 1 : 1;
        next = s;
      }
      for (; equal > 0 && taken < c.group_best; --equal, ++taken) all += next;
      last = next;
    }
    sums[g] = all;
  }
  std::uint64_t open = 0;
  for (std::int64_t g = 0; g < c.groups; ++g) {
    std::int64_t better = 0;
    for (std::int64_t o = 0; o < c.groups; ++o)
      better += sums[o] > sums[g] || (sums[o] == sums[g] && o < g) ? 1 : 0;
    if (better < c.top_groups) open |= std::uint64_t{1} << g;
  }
  return open;
}
/// Is expert e among the best top_k of these groups; of equal logits the lower?
PARTITA_BOTH bool chosen(Numbers logits, const Choosing& c, std::uint64_t open, std::int64_t e) {
  const auto may = [&](std::int64_t o) {
    return c.groups <= 1 || ((open >> (o / c.each)) & 1) != 0;
  };
  if (!may(e)) return false;
  const float mine = ordered(logits[e]);
  std::int64_t better = 0;
  for (std::int64_t o = 0; o < c.experts; ++o) {
    const float other = ordered(logits[o]);
    better += may(o) && (other > mine || (other == mine && o < e)) ? 1 : 0;
  }
  return better < c.top_k;
}
/// One token is a row; its lanes share the experts.
template <class M>
bool route(M& m, const Router& op, const Tensor& x, Numbers dy, Numbers to) {
  const std::int64_t experts = extent(x, 2, 3);
  const Choosing by{experts,       op.top_k,      experts / op.groups, op.groups,
                    op.top_groups, op.group_best, op.sigmoid};
  const Numbers from = numbers(x);
  const bool sigmoid = op.sigmoid, normalise = op.normalise;
  const double scale = op.scale;
  m.rows(
      extent(x, 0, 2), experts, PARTITA_KERNEL(std::int64_t t, const Lanes& lanes) {
        const Numbers logits = from + t * experts;
        double top = -INFINITY, sum = 0, total = 0, mean = 0, along = 0;
        for (std::int64_t e = lanes.lane(); e < experts; e += lanes.count())
          top = fmax(top, static_cast<double>(logits[e]));
        top = lanes.max(top);
        for (std::int64_t e = lanes.lane(); e < experts; e += lanes.count())
          sum += exp(static_cast<double>(logits[e]) - top);
        sum = lanes.sum(sum);
        const std::uint64_t open = open_groups(logits, by, top, sum);
        for (std::int64_t e = lanes.lane(); e < experts; e += lanes.count()) {
          if (!chosen(logits, by, open, e)) continue;
          const double s = score_of(sigmoid, static_cast<double>(logits[e]), top, sum);
          total += s;
          if (dy != nullptr) mean += static_cast<double>(dy[t * experts + e]) * s;
        }
        total = lanes.sum(total);
        mean = lanes.sum(mean) / total;
        // Gradient of a chosen expert's score; none of the others'.
        const double factor = normalise ? 1 / total : 1;
        if (dy != nullptr) {
          for (std::int64_t e = lanes.lane(); e < experts; e += lanes.count()) {
            if (!chosen(logits, by, open, e)) continue;
            const double g = static_cast<double>(dy[t * experts + e]) - (normalise ? mean : 0);
            along +=
                score_of(sigmoid, static_cast<double>(logits[e]), top, sum) * scale * g * factor;
          }
          along = lanes.sum(along);
        }
        for (std::int64_t e = lanes.lane(); e < experts; e += lanes.count()) {
          const bool mine = chosen(logits, by, open, e);
          const double s = score_of(sigmoid, static_cast<double>(logits[e]), top, sum);
          if (dy == nullptr) {
            to[t * experts + e] = mine ? static_cast<float>(scale * factor * s) : 0.0f;
            continue;
          }
          const double g =
              mine ? scale * factor *
                         (static_cast<double>(dy[t * experts + e]) - (normalise ? mean : 0))
                   : 0;
          to[t * experts + e] = static_cast<float>(sigmoid ? g * s * (1 - s) : s * (g - along));
        }
      });
  return true;
}
template <class M>
bool forward(M& m, const Router& op, const Context&, const Arguments& a) {
  return route(m, op, a.inputs[0], nullptr, numbers(a.results[0]));
}
template <class M>
bool data(M& m, const Router& op, const Context&, const Arguments& a) {
  return route(m, op, a.inputs[0], numbers(a.output_gradients[0]), numbers(a.results[0]));
}

// --------------------------------------------------------------------------------- rows of experts
//
// The host knows which rows there are: it reads a dispatch's gates, the only wait, and hands on
// lists of tokens. Values stay on the device. Sums over a token's rows go by their order.

using Rows = std::vector<reference::Row>;

inline std::int64_t position_of(const Indices& list, std::int64_t global) {
  return std::lower_bound(list.begin(), list.end(), global) - list.begin();
}
/// Of each row, its token's position in [sample, sequence].
inline std::vector<std::int64_t> tokens_of(const Rows& rows, const Tensor& dense) {
  const Indices &samples = (*dense.index)[0], &sequence = (*dense.index)[1];
  std::vector<std::int64_t> all;
  all.reserve(rows.size());
  for (const reference::Row& r : rows)
    all.push_back(position_of(samples, r.sample) * std::ssize(sequence) +
                  position_of(sequence, r.sequence));
  return all;
}
inline std::vector<std::int64_t> experts_of(const Rows& rows, const Indices& experts) {
  std::vector<std::int64_t> all;
  all.reserve(rows.size());
  for (const reference::Row& r : rows) all.push_back(position_of(experts, r.expert));
  return all;
}
/// Rows of each token: those of token t are list[first[t]] to list[first[t + 1]].
struct RowsByToken {
  IndexList first, list;
};
template <class M>
RowsByToken by_token(M& m, const std::vector<std::int64_t>& tokens, std::int64_t count) {
  std::vector<std::int64_t> first(static_cast<std::size_t>(count) + 1), list(tokens.size());
  for (const std::int64_t t : tokens) ++first[static_cast<std::size_t>(t) + 1];
  for (std::size_t t = 1; t < first.size(); ++t) first[t] += first[t - 1];
  std::vector<std::int64_t> next = first;
  for (std::size_t r = 0; r < tokens.size(); ++r)
    list[static_cast<std::size_t>(next[static_cast<std::size_t>(tokens[r])]++)] =
        static_cast<std::int64_t>(r);
  return {m.upload(first), m.upload(list)};
}
/// Where result k's rows, those of `rows`, are; `rows` may be the result's own.
inline Numbers placed(const Arguments& a, std::size_t k, const Rows& rows) {
  return {a.place(k, rows), a.results[k].type};
}
/// Rows of one expert follow each other: f(expert's position, first row, rows).
template <class F>
void for_each_expert(const Rows& list, const Indices& experts, F f) {
  for (std::size_t r = 0; r < list.size();) {
    std::size_t end = r;
    while (end < list.size() && list[end].expert == list[r].expert) ++end;
    f(position_of(experts, list[r].expert), static_cast<std::int64_t>(r),
      static_cast<std::int64_t>(end - r));
    r = end;
  }
}

template <class M>
bool forward(M& m, const Dispatch&, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &gates = a.inputs[1];
  const std::int64_t n = extent(x, 2, 3), columns = extent(gates, 2, 3);
  const std::vector<float> values = m.read(numbers(gates), gates.size());
  Rows rows;
  // In the order of rows: by expert, sample, position.
  for (const std::int64_t e : c.indices[static_cast<std::size_t>(c.signature->find(Dim::expert))]) {
    std::int64_t at = position_of((*gates.index)[2], e);
    for (const std::int64_t sample : (*x.index)[0]) {
      for (const std::int64_t position : (*x.index)[1]) {
        if (values[static_cast<std::size_t>(at)] != 0) rows.push_back({sample, position, e});
        at += columns;
      }
    }
  }
  const IndexList tokens = m.upload(tokens_of(rows, x));
  const Numbers y = placed(a, 0, rows), from = numbers(x);
  each_of_rows(
      m, std::ssize(rows), n,
      PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        put(y, row * n + first, count, octet(from, tokens.at(row) * n + first, count));
      });
  return true;
}
template <class M>
bool data(M& m, const Dispatch&, const Context&, const Arguments& a) {
  if (!wanted(a, 0)) return false;
  const Tensor &dy = a.output_gradients[0], &dx = a.results[0];
  const std::int64_t n = extent(dx, 2, 3), tokens = extent(dx, 0, 2);
  const RowsByToken of = by_token(m, tokens_of(*dy.rows, dx), tokens);
  const Numbers from = numbers(dy), to = numbers(dx);
  each_of_rows(
      m, tokens, n, PARTITA_KERNEL(std::int64_t token, std::int64_t first, std::int64_t count) {
        Octet sum{};
        for (std::int64_t k = of.first.at(token); k < of.first.at(token + 1); ++k) {
          const Octet o = octet(from, of.list.at(k) * n + first, count);
          for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += o.v[e];
        }
        put(to, token * n + first, count, sum);
      });
  return true;
}

/// In the context's type of products; each expert's operands have a scale of their own.
template <class M>
bool can_multiply(const M& m, const Context& c) {
  return c.compute == ElementType::fp32 || (c.compute == ElementType::fp8 && m.has_eights());
}
template <class M>
bool forward(M& m, const GroupedProduct& op, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &w = a.parameters[0];
  if (!can_multiply(m, c)) return false;
  if (x.type != w.type || (a.results[0].type != x.type && a.results[0].type != ElementType::fp32))
    return false;
  const std::int64_t out = extent(w, 1, 2), in = extent(w, 2, 3), rows = std::ssize(*x.rows);
  const Indices& experts = (*w.index)[0];
  const Numbers y = placed(a, 0, *x.rows);
  for_each_expert(*x.rows, experts, [&](std::int64_t e, std::int64_t first, std::int64_t count) {
    Product p{count,
              out,
              in,
              {numbers(x) + first * in, in, 0, false},
              {numbers(w) + e * out * in, in, 0, true},
              {y + first * out, out, 0, false}};
    p.passing = true;
    multiply(m, c, p, false);
  });
  if (op.bias && c.adds_bias) {
    const Numbers b = numbers(a.parameters[1]);
    const IndexList of = m.upload(experts_of(*x.rows, experts));
    m.each(
        rows * out, PARTITA_KERNEL(std::int64_t i) { y[i] += b[of.at(i / out) * out + i % out]; });
  }
  return true;
}
template <class M>
bool data(M& m, const GroupedProduct&, const Context& c, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &w = a.parameters[0];
  if (!can_multiply(m, c)) return false;
  if (dy.type != w.type || (a.results[0].type != dy.type && a.results[0].type != ElementType::fp32))
    return false;
  const std::int64_t out = extent(w, 1, 2), in = extent(w, 2, 3);
  const Numbers dx = placed(a, 0, *dy.rows);
  for_each_expert(*dy.rows, (*w.index)[0],
                  [&](std::int64_t e, std::int64_t first, std::int64_t count) {
                    Product p{count,
                              in,
                              out,
                              {numbers(dy) + first * out, out, 0, false},
                              {numbers(w) + e * out * in, in, 0, false},
                              {dx + first * in, in, 0, false},
                              1,
                              1,
                              a.accumulate ? 1.0f : 0.0f};
                    p.passing = true;
                    multiply(m, c, p, true);
                  });
  return true;
}
template <class M>
bool weight(M& m, const GroupedProduct& op, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0], &dw = a.results[0];
  if (!can_multiply(m, c)) return false;
  if (!dw || x.type != dy.type || (dw.type != x.type && dw.type != ElementType::fp32)) return false;
  const std::int64_t out = extent(dw, 1, 2), in = extent(dw, 2, 3);
  const Indices& experts = (*dw.index)[0];
  const bool bias = op.bias && wanted(a, 1);
  std::vector<bool> met(experts.size());
  for_each_expert(*x.rows, experts, [&](std::int64_t e, std::int64_t first, std::int64_t count) {
    met[static_cast<std::size_t>(e)] = true;
    Product p{out,
              in,
              count,
              {numbers(dy) + first * out, out, 0, true},
              {numbers(x) + first * in, in, 0, false},
              {numbers(dw) + e * out * in, in, 0, false},
              1,
              1,
              a.accumulate ? 1.0f : 0.0f};
    p.passing = true;
    multiply(m, c, p, true);
    if (!bias) return;
    if (c.adds_bias) {
      sum_columns(m, numbers(dy) + first * out, count, out, numbers(a.results[1]) + e * out,
                  a.accumulate);
    } else if (!a.accumulate) {
      fill_values(m, numbers(a.results[1]) + e * out, out, 0);
    }
  });
  // Who got no rows has no gradient.
  for (std::size_t e = 0; e < met.size() && !a.accumulate; ++e) {
    if (met[e]) continue;
    const auto at = static_cast<std::int64_t>(e);
    fill_values(m, numbers(dw) + at * out * in, out * in, 0);
    if (bias) fill_values(m, numbers(a.results[1]) + at * out, out, 0);
  }
  return true;
}

template <class M>
bool forward(M& m, const Combine&, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &gates = a.inputs[1], &y = a.results[0];
  const std::int64_t n = extent(x, 3, 4), columns = extent(gates, 2, 3), tokens = extent(y, 0, 2);
  const RowsByToken of = by_token(m, tokens_of(*x.rows, gates), tokens);
  const IndexList expert = m.upload(experts_of(*x.rows, (*gates.index)[2]));
  const Numbers from = numbers(x), gate = numbers(gates), to = numbers(y);
  each_of_rows(
      m, tokens, n, PARTITA_KERNEL(std::int64_t token, std::int64_t first, std::int64_t count) {
        Octet sum{};
        for (std::int64_t k = of.first.at(token); k < of.first.at(token + 1); ++k) {
          const std::int64_t row = of.list.at(k);
          const float g = gate[token * columns + expert.at(row)];
          const Octet o = octet(from, row * n + first, count);
          for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += g * o.v[e];
        }
        put(to, token * n + first, count, sum);
      });
  return true;
}
template <class M>
bool data(M& m, const Combine&, const Context&, const Arguments& a) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const Tensor &x = a.inputs[0], &gates = a.inputs[1];
  const std::int64_t n = extent(x, 3, 4), columns = extent(gates, 2, 3);
  const IndexList token = m.upload(tokens_of(*x.rows, gates)),
                  expert = m.upload(experts_of(*x.rows, (*gates.index)[2]));
  const Numbers from = numbers(x), gate = numbers(gates), dy = numbers(a.output_gradients[0]),
                to_gate = numbers(a.results[1]);
  const Numbers dx = placed(a, 0, *x.rows);
  fill_values(m, to_gate, a.results[1].size(), 0);
  const std::int64_t step = n % Octet::kSize == 0 ? Octet::kSize : 1;
  m.rows(
      std::ssize(*x.rows), n, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const std::int64_t t = token.at(row), place = t * columns + expert.at(row);
        const float g = gate[place];
        double sum = 0;
        for (std::int64_t f = lanes.lane() * step; f < n; f += lanes.count() * step) {
          const Octet d = octet(dy, t * n + f, step), o = octet(from, row * n + f, step);
          Octet r;
          float part = 0;
          for (int e = 0; e < Octet::kSize; ++e) {
            r.v[e] = g * d.v[e];
            part += d.v[e] * o.v[e];
          }
          put(dx, row * n + f, step, r);
          sum += static_cast<double>(part);
        }
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) to_gate[place] = static_cast<float>(sum);
      });
  return true;
}

// What has no kernel here is the host's.
template <class M, class Op>
bool forward(M&, const Op&, const Context&, const Arguments&) {
  return false;
}
template <class M, class Op>
bool data(M&, const Op&, const Context&, const Arguments&) {
  return false;
}
template <class M, class Op>
bool weight(M&, const Op&, const Context&, const Arguments&) {
  return false;
}

/// Element-wise operators take rows as they come: their result's are those of what they read.
inline bool takes_rows(const Operation& op) {
  return std::holds_alternative<Activation>(op) || std::holds_alternative<GatedActivation>(op) ||
         std::holds_alternative<Add>(op) || std::holds_alternative<Multiply>(op) ||
         std::holds_alternative<Dropout>(op);
}
inline bool of_experts(const Operation& op) {
  return std::holds_alternative<Dispatch>(op) || std::holds_alternative<GroupedProduct>(op) ||
         std::holds_alternative<Combine>(op);
}
/// f(arguments) with memory for results that are rows like `like`'s; false: not for rows.
template <class F>
bool with_rows(const Context& c, const Arguments& a, F f) {
  if (of_experts(*c.operation)) return a.place && f(a);
  if (!any_rows(a)) return f(a);
  if (!a.place || a.accumulate || !takes_rows(*c.operation)) return false;
  const Rows* rows = nullptr;
  for (const auto* list : {&a.inputs, &a.output_gradients}) {
    for (const Tensor& t : *list) {
      if (t && t.rows != nullptr) rows = t.rows;
    }
  }
  if (rows == nullptr) return false;
  Arguments here = a;
  for (std::size_t k = 0; k < here.results.size(); ++k) {
    if (!here.results[k]) {
      if (std::holds_alternative<GatedActivation>(*c.operation)) return false;
      continue;
    }
  }
  for (std::size_t k = 0; k < here.results.size(); ++k) {
    Tensor& t = here.results[k];
    if (!t) continue;
    t.values = a.place(k, *rows);
    t.rows = rows;
  }
  return f(here);
}

/// One kernel of an operator; false where it has none for this case.
template <class M>
bool run_forward(M& m, const Context& c, const Arguments& a) {
  if (a.accumulate) return false;
  return with_rows(c, a, [&](const Arguments& here) {
    return std::visit([&](const auto& op) { return forward(m, op, c, here); }, *c.operation);
  });
}
template <class M>
bool run_backward_data(M& m, const Context& c, const Arguments& a) {
  if (a.accumulate && !std::holds_alternative<Linear>(*c.operation) &&
      !std::holds_alternative<GroupedProduct>(*c.operation))
    return false;
  return with_rows(c, a, [&](const Arguments& here) {
    return std::visit([&](const auto& op) { return data(m, op, c, here); }, *c.operation);
  });
}
template <class M>
bool run_backward_weight(M& m, const Context& c, const Arguments& a) {
  if (any_rows(a) && !of_experts(*c.operation)) return false;
  return std::visit([&](const auto& op) { return weight(m, op, c, a); }, *c.operation);
}
template <class M>
bool run_forward_statistic(M& m, const Context& c, std::size_t k, const Arguments& a) {
  if (any_rows(a)) return false;
  if (const auto* n = std::get_if<Normalize>(c.operation)) return statistic(m, *n, c, a);
  if (const auto* e = std::get_if<CrossEntropy>(c.operation)) return statistic(m, *e, k, a);
  return false;
}
template <class M>
bool run_backward_statistic(M& m, const Context& c, const Arguments& a) {
  if (any_rows(a)) return false;
  if (const auto* n = std::get_if<Normalize>(c.operation)) return backward_statistic(m, *n, c, a);
  return false;
}
template <class M>
bool run_attend_part(M& m, const Context& c, const Arguments& a) {
  return attend_part(m, std::get<Attention>(*c.operation), a);
}
template <class M>
bool run_attend_part_backward(M& m, const Context& c, const Arguments& a) {
  return attend_backward(m, std::get<Attention>(*c.operation), a, true);
}

}  // namespace partita::cuda
