#include "simulator/cost/adjustment.h"

#include <cmath>
#include <numbers>

namespace partita {

double expected_maximum(std::int64_t n) {
  if (n <= 1) return 0;
  // The density of the maximum is n φ Φ^(n-1); its mean by Simpson's rule.
  constexpr int kParts = 2000;
  constexpr double kFrom = -9, kTo = 9, kStep = (kTo - kFrom) / kParts;
  const auto m = static_cast<double>(n);
  double sum = 0;
  for (int k = 0; k <= kParts; ++k) {
    const double x = kFrom + k * kStep;
    const double density = std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
    const double below = std::erfc(-x / std::numbers::sqrt2) / 2;
    const double weight = k == 0 || k == kParts ? 1 : k % 2 == 1 ? 4 : 2;
    sum += weight * x * m * density * std::pow(below, m - 1);
  }
  return sum * kStep / 3;
}

}  // namespace partita
