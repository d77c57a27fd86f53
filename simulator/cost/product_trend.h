// simulator/cost/product_trend.h: products and attention between measured points (docs/cost.md,
// "Measured").
#pragma once

#include <string>
#include <vector>

#include "simulator/cost/measured.h"

namespace partita {

/// With fewer points of its own a kernel has those with, or without, a bias beside it.
inline constexpr std::size_t kFewPoints = 24;

/// What a kernel took that is, or is like, the one that is priced.
struct ProductPoint {
  KernelShape shape;
  Seconds time;
};
/// Of one kernel's points those of so many ranks.
std::vector<ProductPoint> product_points(const std::string& kernel,
                                         const std::vector<KernelPoint>& points, int ranks);

/// Seconds of a product of this shape from points, of which there is one at least: a trend, times 2
/// to a plane in the logarithms of the shape through what the nearest twelve are off it. The trend
/// is work as FLOPs, or, of a GPU with so many `multiprocessors` (0: a host), terms in starts,
/// FLOPs, bytes, results and whole waves of tiles: those of the points or, where they are few, of
/// another kernel of the table that multiplies likewise.
double measured_product(const KernelTable& table, const std::vector<ProductPoint>& points,
                        const KernelShape& shape, int multiprocessors);

}  // namespace partita
