// simulator/cost/adjustment.h: what measured steps of a cluster say of prices (docs/fit.md).
#pragma once

#include <cstdint>

#include "base/units.h"

namespace partita {

/// Factors on times, and times beside them. As it stands: prices as the profiles have them.
struct Adjustment {
  double product_time = 1;    ///< products and attention
  double memory_time = 1;     ///< other kernels
  double optimizer_time = 1;  ///< the optimizer's
  double launch_time = 1;     ///< the host's launches
  double inside_time = 1;     ///< transfers within a node or NVLink domain
  double between_time = 1;    ///< transfers over the network
  /// Beside that, of groups of which a node (or NVLink domain) holds several members: what enters it
  /// through one network card leaves it through another.
  double across_cards_time = 1;
  Seconds step{0};            ///< of every step, beside all of this
  /// Ranks' speeds differ beside their device's `speed_spread`: standard deviation, relative. Who
  /// meets waits for the slowest.
  double spread = 0;
  friend bool operator==(const Adjustment&, const Adjustment&) = default;
};

/// Expected maximum of n independent standard normal draws: 0 for one, 0.5642 for two, 1.0296 for
/// four, 2.5077 for 100.
double expected_maximum(std::int64_t n);

}  // namespace partita
