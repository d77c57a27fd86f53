#include "simulator/cost/product_trend.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

namespace partita {
namespace {

constexpr double kVector =
    16;  // fp32 numbers of the widest vectors: rows that fill them are faster

/// A measured point as seen from the shape that is priced: log2 of m, n, k, count; do rows of n and
/// of k fill vectors?
struct Near {
  double squared = 0;  ///< distance
  std::array<double, 6> at{};
  double value = 0;
};

/// Weighted least squares; within the values of the points.
double plane_at_origin(const std::vector<Near>& near, double prior) {
  constexpr std::size_t kUnknowns = 7;
  constexpr double kNearest = 1e-6;
  std::array<std::array<double, kUnknowns + 1>, kUnknowns> e{};  // normal equations
  double low = near[0].value, high = low, weights = 0;
  for (const Near& x : near) {
    const double w = 1 / (x.squared + kNearest);
    std::array<double, kUnknowns> row{1};
    std::copy(x.at.begin(), x.at.end(), row.begin() + 1);
    for (std::size_t i = 0; i < kUnknowns; ++i) {
      for (std::size_t j = 0; j < kUnknowns; ++j) e[i][j] += w * row[i] * row[j];
      e[i][kUnknowns] += w * row[i] * x.value;
    }
    weights += w;
    low = std::min(low, x.value);
    high = std::max(high, x.value);
  }
  // Slopes of 0 (time as the trend) weigh `prior` times a mean point at distance 1.
  for (std::size_t i = 1; i < kUnknowns; ++i)
    e[i][i] += prior * weights / static_cast<double>(near.size());
  // Elimination from the last unknown on: positive definite, so the diagonal is never 0.
  for (std::size_t c = kUnknowns; c-- > 0;) {
    for (std::size_t r = 0; r < c; ++r) {
      const double f = e[r][c] / e[c][c];
      for (std::size_t k = 0; k <= kUnknowns; ++k) e[r][k] -= f * e[c][k];
    }
  }
  return std::clamp(e[0][kUnknowns] / e[0][0], low, high);
}

double flops_of(const KernelShape& s) { return 2 * s.m * s.n * s.k * s.count; }

/// Rows and columns of one product's results, and the length of their sums. Of shapes, which are
/// the forward's.
struct Result {
  double rows = 0, columns = 0, sum = 0;
};
Result result_of(const KernelShape& s) {
  const auto has = [&](const char* word) { return s.kernel.find(word) != std::string::npos; };
  if (has("attention")) return {s.m, s.n, s.k};  // scores
  if (has(" data")) return {s.m, s.k, s.n};
  if (has(" weight")) return {s.n, s.k, s.m};
  return {s.m, s.n, s.k};
}

struct Tile {
  double rows = 0, columns = 0;
};
constexpr Tile kTiles[] = {{128, 128}, {128, 256}, {64, 128}, {256, 128}, {192, 128}};

constexpr std::size_t kTerms = 7;
using Terms = std::array<double, kTerms>;

/// FLOPs of `count` such results at once with tiles and waves of them filled up.
double in_waves(const Result& r, double count, const Tile& tile, int multiprocessors) {
  const double tiles = std::ceil(r.rows / tile.rows) * std::ceil(r.columns / tile.columns) * count;
  return std::ceil(tiles / multiprocessors) * multiprocessors * tile.rows * tile.columns * 2 *
         r.sum;
}

/// The same of an expert's, in the mean: its rows vary about theirs as a fair draw's do, by their
/// square root, here evenly.
double in_waves_of_an_expert(Result r, const Tile& tile, int multiprocessors, bool weight) {
  constexpr int kDraws = 32;
  double& rows = weight ? r.sum : r.rows;
  const double mean = rows, varies = std::min(mean, std::sqrt(3 * mean));
  double sum = 0;
  for (int i = 0; i < kDraws; ++i) {
    rows = std::max(1.0, mean + varies * ((2 * i + 1.0) / kDraws - 1));
    sum += in_waves(r, 1, tile, multiprocessors);
  }
  return sum / kDraws;
}

/// What a GPU's time may be a sum of: a start, one of each product, FLOPs, bytes, results, waves of
/// tiles filled up, and what a bias is added to. Experts' products are launched one by one.
Terms terms_of(const KernelShape& s, const Tile& tile, int multiprocessors) {
  const Result r = result_of(s);
  const double bytes = s.bytes > 0 ? s.bytes : 2 * s.count * (s.m * s.k + s.k * s.n + s.m * s.n);
  const auto has = [&](const char* word) { return s.kernel.find(word) != std::string::npos; };
  return {1,
          s.count,
          flops_of(s),
          bytes,
          r.rows * r.columns * s.count,
          has("grouped_product")
              ? s.count * in_waves_of_an_expert(r, tile, multiprocessors, has(" weight"))
              : in_waves(r, s.count, tile, multiprocessors),
          has(" with bias") ? s.m * s.n * s.count : 0};
}

/// Sum of terms, none negative.
struct Trend {
  Terms each{};
  Tile tile;
  double error = 0;  ///< squares of relative errors, over points less terms
  double terms = 0;
};

/// Solves the equations of the terms in `set`; nothing where one would be negative.
std::optional<Terms> solved(const std::array<Terms, kTerms>& gram, const Terms& right,
                            unsigned set) {
  std::array<std::size_t, kTerms> at{};
  std::size_t n = 0;
  for (std::size_t i = 0; i < kTerms; ++i) {
    if ((set >> i & 1u) != 0) at[n++] = i;
  }
  std::array<std::array<double, kTerms + 1>, kTerms> e{};
  for (std::size_t i = 0; i < n; ++i) {
    for (std::size_t j = 0; j < n; ++j) e[i][j] = gram[at[i]][at[j]];
    e[i][i] *= 1 + 1e-9;  // terms that are the same
    e[i][n] = right[at[i]];
  }
  for (std::size_t c = 0; c < n; ++c) {
    if (e[c][c] <= 0) return std::nullopt;
    for (std::size_t r = 0; r < n; ++r) {
      if (r == c) continue;
      const double f = e[r][c] / e[c][c];
      for (std::size_t k = c; k <= n; ++k) e[r][k] -= f * e[c][k];
    }
  }
  Terms x{};
  for (std::size_t i = 0; i < n; ++i) {
    x[at[i]] = e[i][n] / e[i][i];
    if (x[at[i]] < 0) return std::nullopt;
  }
  return x;
}

/// Another kernel whose points' trend is likely this one's: products of one kind, attention of all
/// keys and of those before; empty: none.
std::vector<std::string> likes_of(std::string kernel) {
  std::vector<std::string> all;
  const auto replace = [&](std::string_view from, std::string_view to) {
    const std::size_t at = kernel.find(from);
    if (at != std::string::npos) kernel.replace(at, from.size(), to);
    return at != std::string::npos;
  };
  replace(" of rows", "");
  replace(" part", "");
  replace(" given statistics", "");
  bool other = replace(" unaligned", "");
  other |= replace(" with bias", "");
  for (const std::string_view product : {"grouped_product", "batched_product", "convolution"})
    other |= replace(product, "linear");
  if (kernel.rfind("attention", 0) == 0) {
    other = true;
    if (!replace(" of all keys", "") && !replace(" of a window", "")) {
      const std::size_t type = kernel.find(' ', kernel.find(' ') + 1);
      kernel.insert(std::min(type, kernel.size()), " of all keys");
    }
  }
  if (other) all.push_back(kernel);
  const std::size_t last = kernel.rfind(' ');
  for (const std::string_view type : {"fp16", "fp8", "tf32"}) {
    if (last != std::string::npos && kernel.substr(last + 1) == type)
      all.push_back(kernel.substr(0, last + 1) + "bf16");
  }
  return all;
}

/// By least squares of relative errors, over all sets of terms with FLOPs and all tiles.
Trend trend_of(const std::vector<ProductPoint>& points, int multiprocessors) {
  const auto n = static_cast<double>(points.size());
  std::optional<Trend> best;
  for (const Tile& tile : kTiles) {
    std::vector<Terms> rows;
    Terms scale{};
    for (const ProductPoint& p : points) {
      Terms row = terms_of(p.shape, tile, multiprocessors);
      for (std::size_t i = 0; i < kTerms; ++i) scale[i] += (row[i] /= p.time.count) / n;
      rows.push_back(row);
    }
    std::array<Terms, kTerms> gram{};
    Terms right{};
    for (Terms& row : rows) {
      for (std::size_t i = 0; i < kTerms; ++i) row[i] /= scale[i] > 0 ? scale[i] : 1;
      for (std::size_t i = 0; i < kTerms; ++i) {
        right[i] += row[i];
        for (std::size_t j = 0; j < kTerms; ++j) gram[i][j] += row[i] * row[j];
      }
    }
    for (unsigned set = 1; set < 1u << kTerms; ++set) {
      if ((set & (1u << 2 | 1u << 5)) == 0) continue;
      const auto terms = static_cast<double>(__builtin_popcount(set));
      if (terms > std::max(1.0, std::floor(n / 2))) continue;
      const auto x = solved(gram, right, set);
      if (!x) continue;
      double squares = n;
      for (std::size_t i = 0; i < kTerms; ++i) {
        squares -= 2 * (*x)[i] * right[i];
        for (std::size_t j = 0; j < kTerms; ++j) squares += (*x)[i] * (*x)[j] * gram[i][j];
      }
      // Half a per cent is no difference: then the fewest terms.
      constexpr double kLeast = 2.5e-5;
      const double error = std::max(kLeast, squares / std::max(1.0, n - terms));
      if (best && (error > best->error || (error == best->error && terms >= best->terms))) continue;
      best = Trend{*x, tile, error, terms};
      for (std::size_t i = 0; i < kTerms; ++i) best->each[i] /= scale[i] > 0 ? scale[i] : 1;
    }
  }
  return *best;
}

}  // namespace

std::vector<ProductPoint> product_points(const std::string& kernel,
                                         const std::vector<KernelPoint>& points, int ranks) {
  std::vector<ProductPoint> all;
  for (const KernelPoint& p : points) {
    if (p.ranks == ranks && p.m > 0)
      all.push_back({{kernel, p.m, p.n, p.k, p.count, p.bytes}, p.time});
  }
  return all;
}

double measured_product(const KernelTable& table, const std::vector<ProductPoint>& points,
                        const KernelShape& s, int multiprocessors) {
  constexpr std::size_t kOfItsOwn = 6;
  const bool gpu = multiprocessors > 0;
  std::optional<Trend> trend;
  if (gpu) {
    std::vector<ProductPoint> from = points;
    for (const std::string& like : likes_of(s.kernel)) {
      const auto found = table.find(like);
      if (points.size() >= kOfItsOwn || found == table.end() || found->second.size() <= from.size())
        continue;
      from = product_points(like, found->second, found->second[0].ranks);
    }
    if (from.size() >= kOfItsOwn) trend = trend_of(from, multiprocessors);
  }
  const auto expected = [&](const KernelShape& x) {
    if (!trend) return flops_of(x);
    const Terms terms = terms_of(x, trend->tile, multiprocessors);
    double sum = 0;
    for (std::size_t i = 0; i < kTerms; ++i) sum += trend->each[i] * terms[i];
    return sum;
  };
  const auto fills = [](double x) { return std::fmod(x, kVector) == 0 ? 1.0 : 0.0; };
  const auto biased = [](const KernelShape& x) {
    return x.kernel.find(" with bias") != std::string::npos;
  };
  std::vector<Near> near;
  for (const auto& [p, time] : points) {
    Near x;
    x.at = {std::log2(p.m / s.m),         std::log2(p.n / s.n),    std::log2(p.k / s.k),
            std::log2(p.count / s.count), fills(p.n) - fills(s.n), fills(p.k) - fills(s.k)};
    const auto& d = x.at;
    x.squared = d[0] * d[0] + d[1] * d[1] + d[2] * d[2] + d[3] * d[3] / 4 +
                (d[4] * d[4] + d[5] * d[5]) / 2 + (biased(p) != biased(points[0].shape) ? 0.5 : 0);
    x.value = std::log2(time.count / expected(p));
    near.push_back(x);
  }
  std::sort(near.begin(), near.end(),
            [](const Near& a, const Near& b) { return a.squared < b.squared; });
  constexpr std::size_t kPoints = 12;
  if (near.size() > kPoints) near.resize(kPoints);
  return expected(s) * std::exp2(plane_at_origin(near, gpu ? 1.0 : 0.3));
}

}  // namespace partita
