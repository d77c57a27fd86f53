// runtime/cuda/state_space.h: Mamba-2's convolution, scan and gated norm (docs/cuda.md, "State
// space models").
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

// ---------------------------------------------------------------------------- causal convolution

/// A causal convolution's x [rows, channels]; a sample's tokens are `tokens` rows.
struct Causal {
  Numbers x, w, b;
  std::int64_t rows = 0, tokens = 0, channels = 0, kernel = 0;

  /// What the curve is of, of 8 channels.
  PARTITA_LANE Octet sums(std::int64_t row, std::int64_t first, std::int64_t count) const {
    Octet sum{};
    if (b != nullptr) sum = octet(b, first, count);
    const std::int64_t t = row % tokens;
    for (std::int64_t back = 0; back < kernel && back <= t; ++back) {
      const Octet o = octet(x, (row - back) * channels + first, count);
      for (std::int64_t k = 0; k < Octet::kSize && k < count; ++k)
        sum.v[k] += static_cast<float>(w[(first + k) * kernel + kernel - 1 - back]) * o.v[k];
    }
    return sum;
  }
};
inline Causal causal_of(const CausalConvolution& op, const Arguments& a) {
  const Tensor& x = a.inputs[0];
  Causal c;
  c.x = numbers(x);
  c.w = numbers(a.parameters[0]);
  c.b = op.bias ? numbers(a.parameters[1]) : nullptr;
  c.rows = extent(x, 0, 2), c.tokens = extent(x, 1, 2), c.channels = extent(x, 2, 4);
  c.kernel = op.kernel;
  return c;
}
/// Gradients of the sums, [rows, channels].
template <class M>
Numbers gradients_of_sums(M& m, const Causal& c, Numbers dy) {
  const Numbers to = m.scratch(c.rows * c.channels);
  each_of_rows(
      m, c.rows, c.channels,
      PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        Octet o = octet(dy, row * c.channels + first, count);
        const Octet sums = c.sums(row, first, count);
        for (int k = 0; k < Octet::kSize; ++k) o.v[k] *= silu(sums.v[k]).slope;
        put(to, row * c.channels + first, count, o);
      });
  return to;
}
template <class M>
bool forward(M& m, const CausalConvolution& op, const Context&, const Arguments& a) {
  const Causal c = causal_of(op, a);
  const Numbers y = numbers(a.results[0]);
  each_of_rows(
      m, c.rows, c.channels,
      PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        Octet o = c.sums(row, first, count);
        for (int k = 0; k < Octet::kSize; ++k) o.v[k] = silu(o.v[k]).value;
        put(y, row * c.channels + first, count, o);
      });
  return true;
}
template <class M>
bool data(M& m, const CausalConvolution& op, const Context&, const Arguments& a) {
  const Causal c = causal_of(op, a);
  const Numbers d = gradients_of_sums(m, c, numbers(a.output_gradients[0]));
  const Numbers dx = numbers(a.results[0]);
  each_of_rows(
      m, c.rows, c.channels,
      PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        Octet sum{};
        const std::int64_t t = row % c.tokens;
        for (std::int64_t on = 0; on < c.kernel && t + on < c.tokens; ++on) {
          const Octet o = octet(d, (row + on) * c.channels + first, count);
          for (std::int64_t k = 0; k < Octet::kSize && k < count; ++k)
            sum.v[k] +=
                static_cast<float>(c.w[(first + k) * c.kernel + c.kernel - 1 - on]) * o.v[k];
        }
        put(dx, row * c.channels + first, count, sum);
      });
  return true;
}
template <class M>
bool weight(M& m, const CausalConvolution& op, const Context&, const Arguments& a) {
  const Causal c = causal_of(op, a);
  const Numbers d = gradients_of_sums(m, c, numbers(a.output_gradients[0]));
  const Numbers dw = wanted(a, 0) ? numbers(a.results[0]) : nullptr,
                db = op.bias && wanted(a, 1) ? numbers(a.results[1]) : nullptr;
  const bool adds = a.accumulate;
  if (db != nullptr) sum_columns(m, d, c.rows, c.channels, db, adds);
  if (dw == nullptr) return true;
  // In two stages, as columns: their order is fixed.
  const std::int64_t chunk = 64, chunks = (c.rows + chunk - 1) / chunk,
                     taps = c.channels * c.kernel;
  float* parts = m.scratch(chunks * taps);
  m.each(
      chunks * taps, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t channel = i % c.channels, back = i / c.channels % c.kernel,
                           first = i / taps * chunk,
                           end = first + chunk < c.rows ? first + chunk : c.rows;
        float sum = 0;
        std::int64_t t = first % c.tokens;
        for (std::int64_t row = first; row < end; ++row, t = t + 1 < c.tokens ? t + 1 : 0) {
          if (t < back) continue;
          sum += d[row * c.channels + channel] *
                 static_cast<float>(c.x[(row - back) * c.channels + channel]);
        }
        parts[i] = sum;
      });
  m.each(
      taps, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t channel = i / c.kernel, back = c.kernel - 1 - i % c.kernel;
        float sum = 0;
        for (std::int64_t k = 0; k < chunks; ++k)
          sum += parts[k * taps + back * c.channels + channel];
        dw[i] = adds ? dw[i] + sum : sum;
      });
  return true;
}

// ------------------------------------------------------------------------------------ gated norm

struct Gated {
  Numbers x, gate, w;
  std::int64_t rows = 0, groups = 0, size = 0, step = 1;
  double epsilon = 0;

  PARTITA_LANE float inverse(std::int64_t row, const Lanes& lanes) const {
    double square = 0;
    for (std::int64_t f = lanes.lane() * step; f < size; f += lanes.count() * step) {
      const Octet v = octet(x, row * size + f, step), g = octet(gate, row * size + f, step);
      // Where it is one element the others are 0.
      for (int k = 0; k < Octet::kSize; ++k) {
        const float one = v.v[k] * silu(g.v[k]).value;
        square += static_cast<double>(one * one);
      }
    }
    square = lanes.sum(square);
    return static_cast<float>(1 / sqrt(square / static_cast<double>(size) + epsilon));
  }
};
inline Gated gated_of(const GatedNorm& op, const Arguments& a) {
  Gated g;
  g.x = numbers(a.inputs[0]), g.gate = numbers(a.inputs[1]);
  g.rows = extent(a.inputs[0], 0, 3), g.groups = extent(a.inputs[0], 2, 3);
  g.size = extent(a.inputs[0], 3, 4);
  g.step = g.size % Octet::kSize == 0 ? Octet::kSize : 1;
  g.epsilon = op.epsilon;
  return g;
}
template <class M>
bool forward(M& m, const GatedNorm& op, const Context&, const Arguments& a) {
  const Gated g = gated_of(op, a);
  const Numbers w = numbers(a.parameters[0]), y = numbers(a.results[0]);
  m.rows(
      g.rows, g.size, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const float inverse = g.inverse(row, lanes);
        const std::int64_t weights = row % g.groups * g.size;
        for (std::int64_t f = lanes.lane() * g.step; f < g.size; f += lanes.count() * g.step) {
          Octet v = octet(g.x, row * g.size + f, g.step);
          const Octet gate = octet(g.gate, row * g.size + f, g.step),
                      by = octet(w, weights + f, g.step);
          for (int k = 0; k < Octet::kSize; ++k)
            v.v[k] *= silu(gate.v[k]).value * inverse * by.v[k];
          put(y, row * g.size + f, g.step, v);
        }
      });
  return true;
}
template <class M>
bool data(M& m, const GatedNorm& op, const Context&, const Arguments& a) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const Gated g = gated_of(op, a);
  const Numbers w = numbers(a.parameters[0]), dy = numbers(a.output_gradients[0]);
  const Numbers dx = numbers(a.results[0]), to_gate = numbers(a.results[1]);
  m.rows(
      g.rows, g.size, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const float inverse = g.inverse(row, lanes);
        const std::int64_t weights = row % g.groups * g.size, at = row * g.size;
        double along = 0;
        for (std::int64_t f = lanes.lane() * g.step; f < g.size; f += lanes.count() * g.step) {
          const Octet v = octet(g.x, at + f, g.step), gate = octet(g.gate, at + f, g.step),
                      d = octet(dy, at + f, g.step), by = octet(w, weights + f, g.step);
          for (int k = 0; k < Octet::kSize; ++k)
            along += static_cast<double>(d.v[k] * by.v[k] * v.v[k] * silu(gate.v[k]).value);
        }
        const float mean =
            static_cast<float>(lanes.sum(along) / static_cast<double>(g.size)) * inverse * inverse;
        for (std::int64_t f = lanes.lane() * g.step; f < g.size; f += lanes.count() * g.step) {
          const Octet v = octet(g.x, at + f, g.step), gate = octet(g.gate, at + f, g.step),
                      d = octet(dy, at + f, g.step), by = octet(w, weights + f, g.step);
          Octet of_x, of_gate;
          for (int k = 0; k < Octet::kSize; ++k) {
            const Curve c = silu(gate.v[k]);
            const float slope = (d.v[k] * by.v[k] - v.v[k] * c.value * mean) * inverse;
            of_x.v[k] = slope * c.value;
            of_gate.v[k] = slope * v.v[k] * c.slope;
          }
          put(dx, at + f, g.step, of_x);
          put(to_gate, at + f, g.step, of_gate);
        }
      });
  return true;
}
template <class M>
bool weight(M& m, const GatedNorm& op, const Context&, const Arguments& a) {
  const Gated g = gated_of(op, a);
  const Numbers dy = numbers(a.output_gradients[0]), dw = numbers(a.results[0]);
  float* const inverses = m.scratch(g.rows);
  m.rows(
      g.rows, g.size, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
        const float inverse = g.inverse(row, lanes);
        if (lanes.lane() == 0) inverses[row] = inverse;
      });
  // A token's groups are one row of the weights.
  const std::int64_t columns = g.groups * g.size, tokens = g.rows / g.groups, chunk = 64,
                     chunks = (tokens + chunk - 1) / chunk;
  float* const parts = m.scratch(chunks * columns);
  m.each(
      chunks * columns, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t column = i % columns, first = i / columns * chunk,
                           end = first + chunk < tokens ? first + chunk : tokens;
        float sum = 0;
        for (std::int64_t t = first; t < end; ++t) {
          const std::int64_t at = t * columns + column;
          sum +=
              dy[at] * inverses[t * g.groups + column / g.size] * g.x[at] * silu(g.gate[at]).value;
        }
        parts[i] = sum;
      });
  const bool adds = a.accumulate;
  m.each(
      columns, PARTITA_KERNEL(std::int64_t column) {
        float sum = 0;
        for (std::int64_t k = 0; k < chunks; ++k) sum += parts[k * columns + column];
        dw[column] = adds ? dw[column] + sum : sum;
      });
  return true;
}

// ------------------------------------------------------------------------------------------ scan

/// A state space model's problem, cut into cells: a chunk of a sample's tokens and a group of
/// heads.
struct Scan {
  std::int64_t samples = 0, tokens = 0, groups = 0, heads = 0, dim = 0, state = 0;
  std::int64_t chunk = 0, chunks = 0;
  Numbers x, step, decay, skip, bias;
  ElementType type = ElementType::fp32;
  float *length = nullptr, *sum = nullptr;  ///< [cell, head, t]: d_t, and Σ of log a up to it

  PARTITA_BOTH std::int64_t cells() const { return samples * chunks * groups; }
  PARTITA_BOTH std::int64_t inner() const { return heads * dim; }
  PARTITA_BOTH std::int64_t width() const { return inner() + 2 * state; }
  /// Row of the operands [sample, token, group]; -1 beyond the last token.
  PARTITA_BOTH std::int64_t row(std::int64_t cell, std::int64_t t) const {
    const std::int64_t part = cell / groups, token = part % chunks * chunk + t;
    return token < tokens ? (part / chunks * tokens + token) * groups + cell % groups : -1;
  }
  /// Of the parameters.
  PARTITA_BOTH std::int64_t head(std::int64_t cell, std::int64_t h) const {
    return cell % groups * heads + h;
  }
  PARTITA_BOTH std::int64_t at(std::int64_t cell, std::int64_t h, std::int64_t t) const {
    return (cell * heads + h) * chunk + t;
  }
  /// What is left of token s's part of the state at token t >= s.
  PARTITA_BOTH float kept(std::int64_t cell, std::int64_t h, std::int64_t t, std::int64_t s) const {
    return expf(sum[at(cell, h, t)] - sum[at(cell, h, s)]);
  }
  /// `ends`: of token t's part of the state at the chunk's end; else of what was before the chunk.
  PARTITA_BOTH float weight(std::int64_t cell, std::int64_t h, std::int64_t t, bool ends) const {
    return ends ? kept(cell, h, chunk - 1, t) * length[at(cell, h, t)] : kept_before(cell, h, t);
  }
  /// Of all that was before the chunk, at token t.
  PARTITA_BOTH float kept_before(std::int64_t cell, std::int64_t h, std::int64_t t) const {
    return expf(sum[at(cell, h, t)]);
  }
};
/// log(1 + e^x)
PARTITA_BOTH float softplus(float x) { return x > 0 ? x + log1pf(expf(-x)) : log1pf(expf(x)); }

template <class M>
Scan scan_of(M& m, const StateSpace& op, const Arguments& a) {
  const Tensor &x = a.inputs[0], &step = a.inputs[1];
  Scan s;
  s.samples = extent(x, 0, 1), s.tokens = extent(x, 1, 2), s.groups = extent(x, 2, 3);
  s.heads = op.heads_per_group, s.dim = op.head_dim, s.state = op.state;
  s.chunk = std::min(op.chunk, s.tokens);
  s.chunks = (s.tokens + s.chunk - 1) / s.chunk;
  s.x = numbers(x), s.step = numbers(step);
  s.decay = numbers(a.parameters[0]), s.skip = numbers(a.parameters[1]);
  s.bias = numbers(a.parameters[2]);
  s.type = x.type;
  const std::int64_t n = s.cells() * s.heads * s.chunk;
  s.length = m.scratch(n), s.sum = m.scratch(n);
  const Scan q = s;
  m.each(
      n, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t cell = i / q.chunk / q.heads, h = i / q.chunk % q.heads,
                           row = q.row(cell, i % q.chunk);
        q.length[i] =
            row < 0 ? 0.0f : softplus(q.step[row * q.heads + h] + q.bias[q.head(cell, h)]);
      });
  // Each by itself, as a warp reads one length at a time for all of its tokens: few would do it one
  // after the other.
  m.each(
      n, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t head = i / q.chunk;
        const float rate = expf(q.decay[q.head(head / q.heads, head % q.heads)]);
        float sum = 0;
        for (std::int64_t k = head * q.chunk; k <= i; ++k) sum -= q.length[k] * rate;
        q.sum[i] = sum;
      });
  return s;
}
/// Columns of rows [row of Scan, stride] from `first` on, as [cell, t, count] of the scan's type;
/// zeros beyond the last token.
template <class M>
Numbers cells_of(M& m, const Scan& s, Numbers from, std::int64_t stride, std::int64_t first,
                 std::int64_t count) {
  const Numbers to = scratch(m, s.cells() * s.chunk * count, s.type);
  each_of_rows(
      m, s.cells() * s.chunk, count,
      PARTITA_KERNEL(std::int64_t i, std::int64_t f, std::int64_t some) {
        const std::int64_t row = s.row(i / s.chunk, i % s.chunk);
        put(to, i * count + f, some,
            row < 0 ? Octet{} : octet(from, row * stride + first + f, some));
      });
  return to;
}
/// The same of heads' columns, as [cell, head, t, dim].
template <class M>
Numbers heads_of(M& m, const Scan& s, Numbers from, std::int64_t stride) {
  const Numbers to = scratch(m, s.cells() * s.chunk * s.inner(), s.type);
  each_of_rows(
      m, s.cells() * s.heads * s.chunk, s.dim,
      PARTITA_KERNEL(std::int64_t i, std::int64_t f, std::int64_t some) {
        const std::int64_t t = i % s.chunk, h = i / s.chunk % s.heads,
                           row = s.row(i / s.chunk / s.heads, t);
        put(to, i * s.dim + f, some,
            row < 0 ? Octet{} : octet(from, row * stride + h * s.dim + f, some));
      });
  return to;
}
/// of(head) of each of the columns from f on.
template <class F>
PARTITA_LANE Octet by_heads(const Scan& s, std::int64_t f, std::int64_t some, F of) {
  Octet o{};
  if (s.dim % Octet::kSize == 0) {  // one head's
    const float v = of(f / s.dim);
    for (int k = 0; k < Octet::kSize; ++k) o.v[k] = v;
    return o;
  }
  for (std::int64_t k = 0; k < Octet::kSize; ++k)
    if (k < some) o.v[k] = of((f + k) / s.dim);
  return o;
}
/// And as [cell, t, heads · dim], each by what the chunk's end keeps of it and its length (`ends`),
/// or by what its token keeps of what was before.
template <class M>
Numbers weighted(M& m, const Scan& s, Numbers from, std::int64_t stride, bool ends) {
  const std::int64_t inner = s.inner();
  const Numbers to = scratch(m, s.cells() * s.chunk * inner, s.type);
  each_of_rows(
      m, s.cells() * s.chunk, inner,
      PARTITA_KERNEL(std::int64_t i, std::int64_t f, std::int64_t some) {
        const std::int64_t cell = i / s.chunk, t = i % s.chunk, row = s.row(cell, t);
        Octet o{};
        if (row >= 0) {
          o = octet(from, row * stride + f, some);
          const Octet by =
              by_heads(s, f, some, [&](std::int64_t h) { return s.weight(cell, h, t, ends); });
          for (int k = 0; k < Octet::kSize; ++k) o.v[k] *= by.v[k];
        }
        put(to, i * inner + f, some, o);
      });
  return to;
}
/// c[rows, columns] of each cell (+)= a · b.
struct CellProduct {
  std::int64_t rows = 0, columns = 0, sum = 0;
};
template <class M>
void cell_product(M& m, std::int64_t batch, CellProduct p, Numbers a, bool a_turned, Numbers b,
                  bool b_turned, Numbers c, bool adds = false) {
  Product q;
  q.m = p.rows, q.n = p.columns, q.k = p.sum;
  q.a = {a, a_turned ? p.rows : p.sum, p.rows * p.sum, a_turned};
  q.b = {b, b_turned ? p.sum : p.columns, p.sum * p.columns, b_turned};
  q.c = {c, p.columns, p.rows * p.columns, false};
  q.batch = batch;
  q.beta = adds ? 1.0f : 0.0f;
  m.product(q);
}
/// The state before each cell's first token, [cell, heads · dim, state].
template <class M>
Numbers states_before(M& m, const Scan& s, Numbers b) {
  const std::int64_t n = s.inner() * s.state;
  const Numbers by_end = weighted(m, s, s.x, s.width(), true);
  float* const made = m.scratch(s.cells() * n);
  cell_product(m, s.cells(), {s.inner(), s.state, s.chunk}, by_end, true, b, false, made);
  const Numbers before = scratch(m, s.cells() * n, s.type);
  m.each(
      s.samples * s.groups * n, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t e = i % n, g = i / n % s.groups, sample = i / n / s.groups,
                           h = e / s.state / s.dim;
        float state = 0;
        for (std::int64_t k = 0; k < s.chunks; ++k) {
          const std::int64_t cell = (sample * s.chunks + k) * s.groups + g;
          before[cell * n + e] = state;
          state = state * s.kept_before(cell, h, s.chunk - 1) + made[cell * n + e];
        }
      });
  return before;
}
/// Cells at once, so that [cell, head, t, s] fits.
template <class M>
std::int64_t cells_at_once(M& m, const Scan& s) {
  return std::min(s.cells(), at_least_1(m.scores() / at_least_1(s.heads * s.chunk * s.chunk)));
}
/// [cell, head, t, s] of cells from `first` on: what token s gives to token t of the same chunk.
template <class M>
void within(M& m, const Scan& s, float* scores, std::int64_t first, std::int64_t count,
            Numbers to) {
  const Numbers all = scores, sums = s.sum, lengths = s.length;
  each_of_rows(
      m, count * s.heads * s.chunk, s.chunk,
      PARTITA_KERNEL(std::int64_t i, std::int64_t f, std::int64_t some) {
        const std::int64_t t = i % s.chunk, head = first * s.heads + i / s.chunk,
                           cell = head / s.heads, at = head * s.chunk;
        Octet o{};
        if (f <= t) {
          const float until = s.sum[at + t];
          const Octet score = octet(all, (cell * s.chunk + t) * s.chunk + f, some),
                      sum = octet(sums, at + f, some), length = octet(lengths, at + f, some);
          for (int k = 0; k < Octet::kSize; ++k)
            o.v[k] = f + k > t ? 0.0f : score.v[k] * expf(until - sum.v[k]) * length.v[k];
        }
        put(to, i * s.chunk + f, some, o);
      });
}
/// Heads' columns from f on of token t, of [head, t, dim] of the nth cell.
PARTITA_LANE Octet of_heads(const Scan& s, const Numbers& by_head, std::int64_t nth, std::int64_t t,
                            std::int64_t f, std::int64_t some) {
  const auto at = [&](std::int64_t e) {
    return ((nth * s.heads + e / s.dim) * s.chunk + t) * s.dim + e % s.dim;
  };
  if (s.dim % Octet::kSize == 0) return octet(by_head, at(f), some);
  Octet o{};
  for (std::int64_t k = 0; k < Octet::kSize; ++k)
    if (k < some) o.v[k] = by_head[at(f + k)];
  return o;
}

/// Heads' columns of `to`, of cells from `first` on: what comes from inside of a chunk, [cell,
/// head, t, dim] of these cells; from beyond it, [cell, t, heads · dim], by its weight; and
/// `beside` by the heads' skips. Rows of `beside` and `to` have these strides.
template <class M>
void put_tokens(M& m, const Scan& s, std::int64_t first, std::int64_t count, float* inside,
                float* beyond, bool ends, Numbers beside, std::int64_t stride, Numbers to,
                std::int64_t to_stride) {
  const Numbers by_head = inside, others = beyond;
  const std::int64_t inner = s.inner();
  each_of_rows(
      m, count * s.chunk, inner, PARTITA_KERNEL(std::int64_t i, std::int64_t f, std::int64_t some) {
        const std::int64_t t = i % s.chunk, nth = i / s.chunk, cell = first + nth,
                           row = s.row(cell, t);
        if (row < 0) return;
        Octet o = of_heads(s, by_head, nth, t, f, some);
        const Octet other = octet(others, (cell * s.chunk + t) * inner + f, some),
                    here = octet(beside, row * stride + f, some),
                    by = by_heads(s, f, some,
                                  [&](std::int64_t h) { return s.weight(cell, h, t, ends); }),
                    skips = by_heads(s, f, some, [&](std::int64_t h) {
                      return static_cast<float>(s.skip[s.head(cell, h)]);
                    });
        for (int k = 0; k < Octet::kSize; ++k)
          o.v[k] += by.v[k] * other.v[k] + skips.v[k] * here.v[k];
        put(to, row * to_stride + f, some, o);
      });
}

template <class M>
bool forward(M& m, const StateSpace& op, const Context&, const Arguments& a) {
  if (a.inputs[0].type != a.results[0].type || a.inputs[0].size() == 0) return false;
  const Scan s = scan_of(m, op, a);
  const std::int64_t inner = s.inner(), square = s.chunk * s.chunk;
  const Numbers b = cells_of(m, s, s.x, s.width(), inner, s.state),
                c = cells_of(m, s, s.x, s.width(), inner + s.state, s.state);
  const Numbers x = heads_of(m, s, s.x, s.width());
  const Numbers before = states_before(m, s, b);
  float *const scores = m.scratch(s.cells() * square), *const of_before =
                                                           m.scratch(s.cells() * s.chunk * inner);
  cell_product(m, s.cells(), {s.chunk, s.chunk, s.state}, c, false, b, true, scores);
  cell_product(m, s.cells(), {s.chunk, inner, s.state}, c, false, before, true, of_before);
  const std::int64_t tile = cells_at_once(m, s), rows = s.heads * s.chunk;
  const Numbers gives = scratch(m, tile * s.heads * square, s.type);
  float* const of_chunk = m.scratch(tile * rows * s.dim);
  const Numbers y = numbers(a.results[0]);
  for (std::int64_t first = 0; first < s.cells(); first += tile) {
    const std::int64_t count = std::min(tile, s.cells() - first);
    within(m, s, scores, first, count, gives);
    cell_product(m, count * s.heads, {s.chunk, s.dim, s.chunk}, gives, false,
                 x + first * rows * s.dim, false, of_chunk);
    put_tokens(m, s, first, count, of_chunk, of_before, false, s.x, s.width(), y, inner);
  }
  return true;
}

/// Gradients of the inputs (`of_data`: results 0 and 1) or of the three parameters.
template <class M>
bool scan_gradients(M& m, const StateSpace& op, const Arguments& a, bool of_data) {
  const Tensor& out = a.output_gradients[0];
  if (a.inputs[0].type != out.type || a.inputs[0].size() == 0) return false;
  const Scan s = scan_of(m, op, a);
  const std::int64_t cells = s.cells(), inner = s.inner(), square = s.chunk * s.chunk,
                     n = inner * s.state, rows = s.heads * s.chunk, lengths = cells * rows;
  const Numbers dy = numbers(out);
  const Numbers b = cells_of(m, s, s.x, s.width(), inner, s.state),
                c = cells_of(m, s, s.x, s.width(), inner + s.state, s.state);
  const Numbers x = heads_of(m, s, s.x, s.width()), d = heads_of(m, s, dy, inner);
  const Numbers before = states_before(m, s, b);
  // Of the state before each cell, and, from the last chunk to the first, of that after it.
  const Numbers d_before = weighted(m, s, dy, inner, false);
  float* const own = m.scratch(cells * n);
  cell_product(m, cells, {inner, s.state, s.chunk}, d_before, true, c, false, own);
  const Numbers after = scratch(m, cells * n, s.type);
  m.each(
      s.samples * s.groups * n, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t e = i % n, g = i / n % s.groups, sample = i / n / s.groups,
                           h = e / s.state / s.dim;
        float slope = 0;
        for (std::int64_t k = s.chunks - 1; k >= 0; --k) {
          const std::int64_t cell = (sample * s.chunks + k) * s.groups + g;
          after[cell * n + e] = slope;
          slope = slope * s.kept_before(cell, h, s.chunk - 1) + own[cell * n + e];
        }
      });
  float *const scores = m.scratch(cells * square),
               *const of_before = m.scratch(cells * s.chunk * inner),
               *const of_after = m.scratch(cells * s.chunk * inner);
  cell_product(m, cells, {s.chunk, s.chunk, s.state}, c, false, b, true, scores);
  cell_product(m, cells, {s.chunk, inner, s.state}, c, false, before, true, of_before);
  cell_product(m, cells, {s.chunk, inner, s.state}, b, false, after, true, of_after);

  float *db = nullptr, *dc = nullptr;
  if (of_data) {
    db = m.scratch(cells * s.chunk * s.state), dc = m.scratch(cells * s.chunk * s.state);
    const Numbers by_end = weighted(m, s, s.x, s.width(), true);
    cell_product(m, cells, {s.chunk, s.state, inner}, by_end, false, after, false, db);
    cell_product(m, cells, {s.chunk, s.state, inner}, d_before, false, before, false, dc);
  }
  // Inside of chunks: [cell, head, t] of what lengths and sums get, and dx.
  float *const d_length = m.scratch(lengths), *const d_sum = m.scratch(lengths);
  const std::int64_t tile = cells_at_once(m, s);
  float* const d_gives = m.scratch(tile * s.heads * square);
  const Numbers gives = of_data ? scratch(m, tile * s.heads * square, s.type) : nullptr,
                d_scores = of_data ? scratch(m, tile * square, s.type) : nullptr;
  float* const of_chunk = of_data ? m.scratch(tile * rows * s.dim) : nullptr;
  const Numbers dx = of_data ? numbers(a.results[0]) : nullptr;
  for (std::int64_t first = 0; first < cells; first += tile) {
    const std::int64_t count = std::min(tile, cells - first);
    cell_product(m, count * s.heads, {s.chunk, s.chunk, s.dim}, d + first * rows * s.dim, false,
                 x + first * rows * s.dim, true, d_gives);
    // Columns: tokens side by side read side by side, from the first of 32 on.
    m.each(
        count * rows, PARTITA_KERNEL(std::int64_t i) {
          constexpr std::int64_t kWarp = 32;
          const std::int64_t t = i % s.chunk, head = first * s.heads + i / s.chunk,
                             matrix = i / s.chunk * square, of = head / s.heads * square,
                             at = head * s.chunk;
          const float sum = s.sum[at + t];
          float given = 0;
          for (std::int64_t later = t / kWarp * kWarp; later < s.chunk; ++later) {
            if (later >= t)
              given += d_gives[matrix + later * s.chunk + t] * scores[of + later * s.chunk + t] *
                       expf(s.sum[at + later] - sum);
          }
          d_length[at + t] = given;
        });
    m.rows(
        count * rows, s.chunk, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
          const std::int64_t t = i % s.chunk, head = first * s.heads + i / s.chunk,
                             row = i / s.chunk * square + t * s.chunk,
                             of = head / s.heads * square + t * s.chunk, at = head * s.chunk;
          const float until = s.sum[at + t];
          double got = 0;
          for (std::int64_t from = lanes.lane(); from <= t; from += lanes.count())
            got += static_cast<double>(d_gives[row + from] * scores[of + from] *
                                       expf(until - s.sum[at + from]) * s.length[at + from]);
          got = lanes.sum(got);
          if (lanes.lane() == 0)
            d_sum[at + t] = static_cast<float>(got) - d_length[at + t] * s.length[at + t];
        });
    if (!of_data) continue;
    m.each(
        count * square, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t from = i % s.chunk, t = i / s.chunk % s.chunk, nth = i / square;
          float sum = 0;
          for (std::int64_t h = 0; h < s.heads && from <= t; ++h)
            sum += d_gives[(nth * s.heads + h) * square + t * s.chunk + from] *
                   s.kept(first + nth, h, t, from) * s.length[s.at(first + nth, h, from)];
          d_scores[i] = sum;
        });
    const std::int64_t at = first * s.chunk * s.state;
    cell_product(m, count, {s.chunk, s.state, s.chunk}, d_scores, true, c + at, false, db + at,
                 true);
    cell_product(m, count, {s.chunk, s.state, s.chunk}, d_scores, false, b + at, false, dc + at,
                 true);
    within(m, s, scores, first, count, gives);
    cell_product(m, count * s.heads, {s.chunk, s.dim, s.chunk}, gives, true,
                 d + first * rows * s.dim, false, of_chunk);
    put_tokens(m, s, first, count, of_chunk, of_after, true, dy, inner, dx, s.width());
  }
  if (of_data) {
    m.each(
        cells * s.chunk * s.state, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t row = s.row(i / s.state / s.chunk, i / s.state % s.chunk);
          if (row < 0) return;
          const auto to = dx + (row * s.width() + inner + i % s.state);
          to[0] = db[i];
          to[s.state] = dc[i];
        });
  }
  // Through the states: of each token what it got from those before its chunk, and gave to that
  // after it; and dy · x, of which the skips' gradients are sums.
  float *const to_end = m.scratch(lengths), *const through = m.scratch(lengths);
  m.rows(
      lengths, s.dim, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
        const std::int64_t t = i % s.chunk, h = i / s.chunk % s.heads, cell = i / s.chunk / s.heads,
                           at = (cell * s.chunk + t) * inner + h * s.dim;
        double got = 0, given = 0, beside = 0;
        for (std::int64_t p = lanes.lane(); p < s.dim; p += lanes.count()) {
          const float one = d[i * s.dim + p], from = x[i * s.dim + p];
          got += static_cast<double>(one * of_before[at + p]);
          given += static_cast<double>(from * of_after[at + p]);
          beside += static_cast<double>(one * from);
        }
        got = lanes.sum(got), given = lanes.sum(given), beside = lanes.sum(beside);
        if (lanes.lane() != 0) return;
        const float by = s.kept(cell, h, s.chunk - 1, t);
        const auto gave = static_cast<float>(given);
        to_end[i] = by * s.length[i] * gave;
        d_length[i] += by * gave;
        d_sum[i] += s.kept_before(cell, h, t) * static_cast<float>(got) - to_end[i];
        through[i] = static_cast<float>(beside);
      });
  float* const passed = m.scratch(cells * s.heads);
  m.rows(
      cells * s.heads, s.dim * s.state, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
        const std::int64_t each = s.dim * s.state;
        double sum = 0;
        for (std::int64_t e = lanes.lane(); e < each; e += lanes.count())
          sum += static_cast<double>(before[i * each + e] * after[i * each + e]);
        sum = lanes.sum(sum) *
              static_cast<double>(s.kept_before(i / s.heads, i % s.heads, s.chunk - 1));
        double ends = 0;
        for (std::int64_t t = lanes.lane(); t < s.chunk; t += lanes.count())
          ends += static_cast<double>(to_end[i * s.chunk + t]);
        ends = lanes.sum(ends);
        if (lanes.lane() == 0) passed[i] = static_cast<float>(sum + ends);
      });
  // A sum is of all log a up to it: theirs are sums from the chunk's end on. As in scan_of.
  float *const of_decay = m.scratch(lengths), *const of_raw = m.scratch(lengths);
  m.each(
      lengths, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t cell = i / s.chunk / s.heads, h = i / s.chunk % s.heads,
                           head = s.head(cell, h), first = i / s.chunk * s.chunk,
                           row = s.row(cell, i % s.chunk);
        const float rate = expf(s.decay[head]);
        float slope = passed[i / s.chunk];
        for (std::int64_t k = first + s.chunk - 1; k >= i; --k) slope += d_sum[k];
        const float raw = row < 0 ? 0.0f : s.step[row * s.heads + h] + s.bias[head];
        of_decay[i] = -slope * s.length[i] * rate;
        of_raw[i] = row < 0 ? 0.0f : (d_length[i] - rate * slope) / (1 + expf(-raw));
      });
  if (of_data) {
    const Numbers d_step = numbers(a.results[1]);
    m.each(
        lengths, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t row = s.row(i / s.chunk / s.heads, i % s.chunk);
          if (row >= 0) d_step[row * s.heads + i / s.chunk % s.heads] = of_raw[i];
        });
    return true;
  }
  const Numbers decay = wanted(a, 0) ? numbers(a.results[0]) : nullptr,
                skip = wanted(a, 1) ? numbers(a.results[1]) : nullptr,
                bias = wanted(a, 2) ? numbers(a.results[2]) : nullptr;
  const bool adds = a.accumulate;
  const std::int64_t parts = s.samples * s.chunks;
  m.rows(
      s.groups * s.heads, parts * s.chunk, PARTITA_KERNEL(std::int64_t head, const Lanes& lanes) {
        const std::int64_t g = head / s.heads, h = head % s.heads;
        double for_decay = 0, for_skip = 0, for_bias = 0;
        for (std::int64_t k = lanes.lane(); k < parts * s.chunk; k += lanes.count()) {
          const std::int64_t cell = k / s.chunk * s.groups + g, at = s.at(cell, h, k % s.chunk);
          for_decay += static_cast<double>(of_decay[at]);
          for_skip += static_cast<double>(through[at]);
          for_bias += static_cast<double>(of_raw[at]);
        }
        for_decay = lanes.sum(for_decay);
        for_skip = lanes.sum(for_skip);
        for_bias = lanes.sum(for_bias);
        if (lanes.lane() != 0) return;
        if (decay != nullptr)
          decay[head] =
              (adds ? static_cast<float>(decay[head]) : 0.0f) + static_cast<float>(for_decay);
        if (skip != nullptr)
          skip[head] =
              (adds ? static_cast<float>(skip[head]) : 0.0f) + static_cast<float>(for_skip);
        if (bias != nullptr)
          bias[head] =
              (adds ? static_cast<float>(bias[head]) : 0.0f) + static_cast<float>(for_bias);
      });
  return true;
}
template <class M>
bool data(M& m, const StateSpace& op, const Context&, const Arguments& a) {
  return wanted(a, 0) && wanted(a, 1) && scan_gradients(m, op, a, true);
}
template <class M>
bool weight(M& m, const StateSpace& op, const Context&, const Arguments& a) {
  return scan_gradients(m, op, a, false);
}

}  // namespace partita::cuda
