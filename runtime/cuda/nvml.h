// runtime/cuda/nvml.h: what a GPU's driver says of its clock, power and temperature.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace partita::cuda {

struct GpuState {
  double clock_mhz = 0, memory_clock_mhz = 0;  ///< 0: not said
  double power_w = 0, temperature_c = 0;
  std::int64_t used_bytes = 0;  ///< of its memory, by all processes
  /// What keeps the clock down: "power cap", "heat", ...; empty: nothing.
  std::string throttled;
};

/// Of states taken one after the other while something ran, what it ran at: the medians of those
/// whose power is at least the middle of the range, since before and after the GPU idles; of all
/// where none is said. Throttled by what held any of these back.
GpuState at_work(const std::vector<GpuState>& states);

/// NVML, loaded when it is asked for: a driver brings it, no toolkit needs it.
class Nvml {
 public:
  virtual ~Nvml() = default;
  virtual std::string driver() const = 0;  ///< "580.95.05"
  /// Of the GPU at that bus id ("00000000:0F:00.0"); what it does not say stays 0.
  virtual GpuState state(const std::string& bus_id) const = 0;
};
/// Null where there is none, or it does not start.
std::unique_ptr<Nvml> nvml(const std::string& library = "libnvidia-ml.so.1");

}  // namespace partita::cuda
