// report/collectives.h: a collective's algorithms side by side.
#pragma once

#include <string>
#include <vector>

#include "simulator/engine/collectives.h"

namespace partita {

/// partita.collective/1 (docs/formats.md).
std::string collective_json(CollectiveKind kind, Bytes payload,
                            const std::vector<std::int64_t>& ranks, const Topology& topology,
                            const CollectiveTimes& times);
std::string collective_table(CollectiveKind kind, Bytes payload,
                             const std::vector<std::int64_t>& ranks, const Topology& topology,
                             const CollectiveTimes& times);

}  // namespace partita
