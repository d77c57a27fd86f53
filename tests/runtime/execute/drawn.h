// tests/runtime/execute/drawn.h: values of a run, drawn as the reference draws them.
#pragma once

#include <cstdint>

#include "runtime/execute/executor.h"
#include "runtime/reference/compare.h"
#include "runtime/reference/serial.h"

namespace partita::execute {

/// Inputs, initial values and dropout of `seed`. The graph must outlive the options.
inline void draw(Options& o, const Graph& graph, std::uint64_t seed) {
  o.input = [&graph, seed](std::size_t input, std::int64_t step, std::int64_t sample,
                           std::int64_t index) {
    return reference::input_value(graph, input, seed, step, sample, index);
  };
  o.initial = [&graph, seed](std::size_t replica, std::size_t q, std::int64_t linear) {
    return reference::initial_value(graph.parameters[q], seed + replica, linear);
  };
  o.operator_seed = [seed](std::int32_t op) {
    return reference::operator_seed(seed, OpId{static_cast<std::size_t>(op)});
  };
}

}  // namespace partita::execute
