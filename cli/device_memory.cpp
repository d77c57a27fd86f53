#include "cli/device_memory.h"

#include <algorithm>

#include "simulator/cost/cost.h"
#include "simulator/engine/caching_allocator.h"
#include "simulator/search/predict.h"

namespace partita::cli {

std::vector<DeviceMemoryRow> device_memory(const Program& program, Communication& communication,
                                           const std::vector<RankClass>& classes,
                                           const std::vector<Bytes>& predicted_peaks,
                                           const std::vector<RankMeasurement>& ranks) {
  const auto most = std::max_element(ranks.begin(), ranks.end(),
                                     [](const auto& a, const auto& b) { return a.peak < b.peak; });
  if (most == ranks.end() || most->outside.total().count == 0) return {};
  const auto fullest = static_cast<std::size_t>(
      std::max_element(predicted_peaks.begin(), predicted_peaks.end()) - predicted_peaks.begin());
  const RankClass& c = classes.at(fullest);
  const OutsideMemory& m = most->outside;
  const OutsideMemory p = outside_memory(
      program, c, communication,
      communication.topology().device(DeviceId{static_cast<std::size_t>(c.representative)}));
  const Bytes reserved = reserved_by_us(program, c);
  return {{"allocated", most->peak, predicted_peaks[fullest]},
          {"reserved", most->reserved, reserved},
          {"context", m.context, p.context},
          {"kernels", m.kernels, p.kernels},
          {"libraries", m.libraries, p.libraries},
          {"workspace", m.workspace, p.workspace},
          {"communicators", m.communicators, p.communicators},
          {"device", most->reserved + m.total(), reserved + p.total()}};
}

}  // namespace partita::cli
