// runtime/cuda/operators/shapes.h: what only moves or joins numbers (../operators.h).
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

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

}  // namespace partita::cuda
