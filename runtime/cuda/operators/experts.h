// runtime/cuda/operators/experts.h: rows of experts (../operators.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "runtime/cuda/operands.h"
#include "runtime/cuda/operators/linear.h"

namespace partita::cuda {

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

}  // namespace partita::cuda
