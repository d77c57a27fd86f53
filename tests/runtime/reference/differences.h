// Central differences with a bound on their own error.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

namespace partita::reference {

/// Expects `analytic` to be the derivative of `loss` by `value`.
///
/// D(h) = (f(x+h) - f(x-h)) / 2h errs by h² f'''/6 + O(h⁴), so D(h) - D(h/2) is about 3/4 of D(h)'s
/// error and bounds that of the extrapolation (4 D(h/2) - D(h)) / 3. To it comes rounding: f, a sum
/// of at most 10⁴ terms of total size `magnitude`, is known to 10⁴ · 2⁻⁵³ · magnitude, divided by
/// h/2.
inline void expect_derivative(double analytic, double& value, double magnitude,
                              const std::function<double()>& loss, const std::string& what) {
  const double h = 0x1p-10, x = value;
  const auto central = [&](double step) {
    value = x + step;
    const double above = loss();
    value = x - step;
    const double below = loss();
    value = x;
    return (above - below) / (2 * step);
  };
  const double wide = central(h), narrow = central(h / 2);
  const double tolerance =
      std::abs(wide - narrow) + 1e4 * 0x1p-53 * (magnitude + std::abs(analytic)) / h;
  EXPECT_NEAR(analytic, (4 * narrow - wide) / 3, tolerance) << what;
}

}  // namespace partita::reference
