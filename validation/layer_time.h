// validation/layer_time.h: what one layer, or a part of it, takes of a recorded step.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/units.h"
#include "simulator/engine/simulate.h"
#include "simulator/program/program.h"

namespace partita::validation {

/// Which layers' time a quantity names.
struct LayerQuantity {
  enum class Part : std::uint8_t { all, attention, experts, mlp } part = Part::all;
  enum class Pass : std::uint8_t { forward, backward, both } pass = Pass::both;
  bool alone = false;  ///< nothing else ran, with pauses in between ("single layer")
  friend bool operator==(const LayerQuantity&, const LayerQuantity&) = default;
};
/// "forward time per layer", "single MoE layer backward_ms"; empty for what names no layer, no
/// pass, or another thing than a time.
std::optional<LayerQuantity> layer_quantity(std::string_view text);

/// From the end of the kernel or exchange before to the end of the part's last kernel or
/// exchange, as events around a module measure it; a backward with what it computes again. The
/// median over the recorded class with most layers, its layers and micro-batches. Empty: no layer
/// has such a part. `program` and `recorded` are those of one predict().
std::optional<Seconds> layer_time(const LayerQuantity& quantity, const Program& program,
                                  const Timeline& recorded);

}  // namespace partita::validation
