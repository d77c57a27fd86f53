// cli/device_memory.h: a GPU's memory, measured beside predicted, by what has it.
#pragma once

#include <string>
#include <vector>

#include "simulator/engine/classes.h"
#include "simulator/program/measurement.h"
#include "topologies/topology.h"

namespace partita {
class Communication;
}

namespace partita::cli {

struct DeviceMemoryRow {
  std::string part;  ///< "allocated", "reserved", "context", ..., "device"
  Bytes measured, predicted;
};
/// Of the rank with most allocated, and of the class that is predicted to have most. "device" is
/// reserved and all that is outside; empty where the device says nothing of its memory.
std::vector<DeviceMemoryRow> device_memory(const Program& program, Communication& communication,
                                           const std::vector<RankClass>& classes,
                                           const std::vector<Bytes>& predicted_peaks,
                                           const std::vector<RankMeasurement>& ranks);

}  // namespace partita::cli
