#include "validation/figures.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>

#include "validation/compare.h"

namespace partita::validation {
namespace {

/// Do two cases differ by more than what the machine varies by?
bool differ(double a, double b, double noise_of_a, double noise_of_b) {
  return std::abs(a - b) > std::max(noise_of_a * a, noise_of_b * b);
}

/// Concordant minus discordant, and how many.
std::pair<std::int64_t, std::int64_t> pairs_of(const std::vector<double>& predicted,
                                               const std::vector<double>& measured,
                                               const std::vector<double>& noise) {
  std::int64_t sum = 0, pairs = 0;
  for (std::size_t i = 0; i < measured.size(); ++i) {
    for (std::size_t j = i + 1; j < measured.size(); ++j) {
      if (!differ(measured[i], measured[j], noise[i], noise[j])) continue;
      ++pairs;
      const double e = predicted[i] - predicted[j];
      sum += e == 0 ? 0 : (measured[i] > measured[j]) == (e > 0) ? 1 : -1;
    }
  }
  return {sum, pairs};
}

struct Point {
  double predicted, measured, noise, flops;
};

std::optional<GroupFigures> group_of(const std::string& name, const std::vector<Point>& points,
                                     double base, double times_noise) {
  if (points.empty()) return {};
  GroupFigures g;
  g.name = name;
  g.cases = static_cast<int>(points.size());
  const double n = static_cast<double>(points.size());
  double log_rate = 0;
  for (const Point& x : points) log_rate += std::log(x.flops / x.measured) / n;
  for (const Point& x : points) {
    const double error = (x.predicted - x.measured) / x.measured;
    g.mean_error += std::abs(error) / n;
    g.bias += error / n;
    g.noise += x.noise / n;
    g.baseline += std::abs(x.flops / std::exp(log_rate) - x.measured) / x.measured / n;
  }
  g.bound = std::max(base, times_noise * g.noise);
  return g;
}

}  // namespace

std::vector<GroupFigures> groups_of(const std::vector<CaseFigures>& cases, bool gpu) {
  std::vector<Point> compute, few, more;
  for (const CaseFigures& c : cases) {
    if (c.compute_measured > 0)
      compute.push_back({c.compute_predicted, c.compute_measured, c.compute_noise, c.flops});
    (c.ranks <= (gpu ? 1 : 2) ? few : more).push_back({c.predicted, c.measured, c.noise, c.flops});
  }
  auto alone = group_of("compute alone", compute, gpu ? 0.03 : 0.07, 0);
  auto least = gpu ? group_of("1 GPU", few, 0.03, 0) : group_of("1 and 2 ranks", few, 0.10, 2);
  for (auto* g : {&alone, &least}) {
    if (gpu && *g) (*g)->bias_bound = 0.01;
  }
  std::vector<GroupFigures> all;
  for (auto& g : {alone, least, group_of("more ranks", more, 0.25, 3)}) {
    if (g) all.push_back(*g);
  }
  return all;
}

std::pair<double, double> over_rounds(const std::vector<double>& rounds,
                                      const std::vector<double>& within) {
  const auto [low, high] = std::minmax_element(rounds.begin(), rounds.end());
  const double middle = median(rounds);
  return {middle, std::max(median(within), (*high - *low) / 2 / std::max(1e-12, middle))};
}

double kendall_tau(const std::vector<double>& predicted, const std::vector<double>& measured,
                   const std::vector<double>& noise) {
  const auto [sum, pairs] = pairs_of(predicted, measured, noise);
  return pairs == 0 ? 1 : static_cast<double>(sum) / static_cast<double>(pairs);
}

std::vector<OrderFigures> orders_of(const std::vector<CaseFigures>& cases) {
  std::vector<std::string> networks;
  for (const CaseFigures& c : cases) {
    if (std::find(networks.begin(), networks.end(), c.network) == networks.end())
      networks.push_back(c.network);
  }
  networks.emplace_back();
  std::vector<OrderFigures> all;
  for (const std::string& network : networks) {
    std::vector<double> predicted, measured, noise;
    for (const CaseFigures& c : cases) {
      if (!network.empty() && c.network != network) continue;
      predicted.push_back(c.predicted), measured.push_back(c.measured), noise.push_back(c.noise);
    }
    if (!network.empty() && measured.size() < 2) continue;
    const auto [sum, pairs] = pairs_of(predicted, measured, noise);
    all.push_back({network, static_cast<int>(measured.size()), pairs,
                   pairs == 0 ? 1 : static_cast<double>(sum) / static_cast<double>(pairs)});
  }
  return all;
}

std::vector<std::pair<std::size_t, std::size_t>> discordant(const std::vector<CaseFigures>& cases) {
  std::vector<std::pair<double, std::pair<std::size_t, std::size_t>>> all;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    for (std::size_t j = 0; j < cases.size(); ++j) {
      const CaseFigures &a = cases[i], &b = cases[j];
      if (a.measured >= b.measured || a.predicted <= b.predicted) continue;
      if (differ(a.measured, b.measured, a.noise, b.noise))
        all.push_back({-b.measured / a.measured, {i, j}});
    }
  }
  std::sort(all.begin(), all.end());
  std::vector<std::pair<std::size_t, std::size_t>> pairs;
  for (const auto& [apart, pair] : all) pairs.push_back(pair);
  return pairs;
}

}  // namespace partita::validation
