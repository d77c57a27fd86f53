// runtime/cuda/operators/router.h: the choice of experts (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

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

}  // namespace partita::cuda
