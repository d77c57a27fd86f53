#include "runtime/reference/ring_attention.h"

#include <cmath>
#include <limits>

namespace partita::reference {
namespace {

/// Calls f(q offset, k offset, v offset, y offset, lse offset, visible) for every query and key of
/// the pieces.
template <class Row>
void for_each_query(const Attention& a, const Piece& q, const Piece& k, Row row) {
  const std::size_t samples = q.index[0].size(), queries = q.index[1].size(),
                    heads = q.index[2].size();
  const auto group = static_cast<std::size_t>(a.queries_per_head);
  for (std::size_t b = 0; b < samples; ++b) {
    for (std::size_t h = 0; h < heads; ++h) {
      for (std::size_t g = 0; g < group; ++g) {
        for (std::size_t i = 0; i < queries; ++i) {
          const std::size_t cell = (b * queries + i) * heads + h;
          const std::size_t state = ((b * heads + h) * group + g) * queries + i;
          row(cell * group + g, state, q.index[1][i],
              [&](std::size_t j) { return (b * k.index[1].size() + j) * heads + h; });
        }
      }
    }
  }
}

bool visible(const Attention& a, std::int64_t query, std::int64_t key) {
  if (a.causal && key > query) return false;
  return a.window == 0 || key > query - a.window;
}

double scale_of(const Attention& a) {
  return a.scale != 0 ? a.scale : 1 / std::sqrt(static_cast<double>(a.qk_dim));
}

double dot(const double* x, const double* y, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace

void attend_part(const Attention& a, const Piece& q, const Piece& k, const Piece& v, Piece& output,
                 Piece& lse) {
  const auto dq = static_cast<std::size_t>(a.qk_dim), dv = static_cast<std::size_t>(a.v_dim);
  const double scale = scale_of(a);
  std::vector<double> part(dv);
  for_each_query(
      a, q, k, [&](std::size_t row, std::size_t state, std::int64_t position, auto key_row) {
        double largest = -std::numeric_limits<double>::infinity();
        std::vector<double> scores(k.index[1].size(), largest);
        for (std::size_t j = 0; j < scores.size(); ++j) {
          if (!visible(a, position, k.index[1][j])) continue;
          scores[j] = scale * dot(&q.values[row * dq], &k.values[key_row(j) * dq], dq);
          largest = std::max(largest, scores[j]);
        }
        if (std::isinf(largest)) return;  // sees nothing of this part
        double sum = 0;
        std::fill(part.begin(), part.end(), 0.0);
        for (std::size_t j = 0; j < scores.size(); ++j) {
          if (std::isinf(scores[j])) continue;
          const double w = std::exp(scores[j] - largest);
          sum += w;
          for (std::size_t d = 0; d < dv; ++d) part[d] += w * v.values[key_row(j) * dv + d];
        }
        const double here = largest + std::log(sum), before = lse.values[state];
        const double top = std::max(here, before);
        const double total = top + std::log(std::exp(here - top) + std::exp(before - top));
        const double keep = std::exp(before - total), add = std::exp(here - total) / sum;
        for (std::size_t d = 0; d < dv; ++d) {
          double& y = output.values[row * dv + d];
          y = keep * y + add * part[d];
        }
        lse.values[state] = total;
      });
}

void attend_part_backward(const Attention& a, const Piece& q, const Piece& k, const Piece& v,
                          const Piece& output, const Piece& lse, const Piece& d_output, Piece& dq,
                          Piece& dk, Piece& dv) {
  const auto n = static_cast<std::size_t>(a.qk_dim), m = static_cast<std::size_t>(a.v_dim);
  const double scale = scale_of(a);
  for_each_query(
      a, q, k, [&](std::size_t row, std::size_t state, std::int64_t position, auto key_row) {
        const double* dy = &d_output.values[row * m];
        const double delta = dot(dy, &output.values[row * m], m);
        for (std::size_t j = 0; j < k.index[1].size(); ++j) {
          if (!visible(a, position, k.index[1][j])) continue;
          const std::size_t key = key_row(j);
          const double p =
              std::exp(scale * dot(&q.values[row * n], &k.values[key * n], n) - lse.values[state]);
          const double ds = p * (dot(dy, &v.values[key * m], m) - delta) * scale;
          for (std::size_t d = 0; d < m; ++d) dv.values[key * m + d] += p * dy[d];
          for (std::size_t d = 0; d < n; ++d) {
            dq.values[row * n + d] += ds * k.values[key * n + d];
            dk.values[key * n + d] += ds * q.values[row * n + d];
          }
        }
      });
}

}  // namespace partita::reference
