// runtime/cuda/operators/losses.h: cross-entropy and mean squared error (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

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
  // One block alone would take longer over an image than all of a GPU over its layers.
  constexpr std::int64_t kPart = 8192;
  const std::int64_t parts = (n + kPart - 1) / kPart;
  auto* sums = reinterpret_cast<double*>(m.scratch(2 * parts));  // a double takes two floats' room
  m.rows(
      parts, kPart / 16, PARTITA_KERNEL(std::int64_t part, const Lanes& lanes) {
        const std::int64_t end = (part + 1) * kPart < n ? (part + 1) * kPart : n;
        double sum = 0;
        for (std::int64_t i = part * kPart + lanes.lane(); i < end; i += lanes.count()) {
          const float d = x[i] - target[i];
          sum += static_cast<double>(d * d);
        }
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) sums[part] = sum;
      });
  m.rows(
      1, parts, PARTITA_KERNEL(std::int64_t, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t i = lanes.lane(); i < parts; i += lanes.count()) sum += sums[i];
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

}  // namespace partita::cuda
