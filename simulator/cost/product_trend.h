// simulator/cost/product_trend.h: products and attention between measured points (docs/cost.md,
// "Measured").
#pragma once

#include <vector>

#include "simulator/cost/measured.h"

namespace partita {

/// Fewer points say too little of a kernel by themselves.
inline constexpr std::size_t kFewPoints = 6;

/// Seconds of a product of this shape from points of its kernel, of which there is one at least: a
/// trend, times 2 to a plane in the logarithms of the shape through what the nearest twelve are off
/// it. The trend is work as FLOPs, or, of a GPU with so many `multiprocessors` (0: a host), terms
/// in starts, FLOPs, bytes, results and whole waves of tiles: those of the points or, where they
/// are few, of another kernel of the table that multiplies likewise.
double measured_product(const KernelTable& table, const std::vector<KernelPoint>& points,
                        const KernelShape& shape, int multiprocessors);

}  // namespace partita
