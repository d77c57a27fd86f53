// validation/left_out.h: how far a device's prices of products and attention are off where it has
// no points: some of its measured points are left out and predicted from the rest (docs/cost.md,
// "Left out").
#pragma once

#include <string>
#include <vector>

#include "topologies/device.h"

namespace partita::validation {

/// Which points are left out together. Whole problems always, in every layout, type of result and
/// count: twins never stand on both sides.
enum class LeftOut {
  half,   ///< half of the problems (m, n, k in any order) at random; 8 seeded draws
  pairs,  ///< an eighth of the pairs (n, k), eight times; attention: of (heads, values in a head)
  depth,  ///< all problems of one k; attention: of one number of keys
  rows    ///< all problems of one m; attention: of one number of heads
};
inline constexpr LeftOut kLeftOuts[] = {LeftOut::half, LeftOut::pairs, LeftOut::depth,
                                        LeftOut::rows};
std::string_view name(LeftOut rule);

/// Of |predicted − measured| / measured.
struct ShapeErrors {
  double median = 0, mean = 0, p95 = 0;
};

/// One kind of kernel: "tf32 NN", "bf16 NT + fp32 grouped", "attention backward"; all points left
/// out of it, over all draws.
struct LeftOutFigures {
  std::string kernel;
  std::size_t points = 0;  ///< distinct
  ShapeErrors price;
  ShapeErrors model;  ///< without points, but for the level of those kept
  /// Calculon's steps for an A100 (systems/a100_80g.json of calculon-ai/calculon, the rates the
  /// device's own): FLOPs at 0.95, 0.9, 0.6 or 0.1 of peak by size and bytes at 0.9, 0.75, 0.6 or
  /// 0.3, one after the other.
  ShapeErrors steps;
  ShapeErrors one_rate;  ///< FLOPs at one rate, the median of the points kept of the same kernel
};
/// By kernel in the order of the file; all products, then all attentions, last. Empty for a device
/// without points.
std::vector<LeftOutFigures> left_out(const DeviceProfile& device, LeftOut rule);

}  // namespace partita::validation
