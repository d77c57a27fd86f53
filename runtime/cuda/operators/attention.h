// runtime/cuda/operators/attention.h: attention in tiles of scores, and softmax; flash.h has the
// rest (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cuda/flash.h"
#include "runtime/cuda/operands.h"

namespace partita::cuda {

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

}  // namespace partita::cuda
