// validation/traffic.h: what each rank has to send in a step by the program, to be held against
// what a transport has counted.
#pragma once

#include <optional>
#include <vector>

#include "simulator/program/measurement.h"

namespace partita::validation {

/// By rank. `by_steps`: of a transport that carries collectives out step by step, bytes on each
/// link; else calls and payload by kind of collective, and sends. Messages are not counted. Nothing
/// for a program with routed buffers whose rows it does not know.
std::optional<std::vector<Traffic>> predicted_traffic(const Program& program, std::int64_t step,
                                                      bool by_steps);

}  // namespace partita::validation
