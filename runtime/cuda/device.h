// runtime/cuda/device.h: a GPU as a rank's device (docs/cuda.md).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda/nccl.h"
#include "runtime/execute/device.h"

namespace partita::cuda {

/// Why there is no GPU to run on, in words; empty: there is one.
std::string absent();
/// 0 where there is none.
int device_count();

struct Facts {
  std::string name, bus_id;
  int compute_capability = 0;  ///< 90: 9.0
  int multiprocessors = 0;
  std::int64_t memory_bytes = 0, free_bytes = 0;
  std::string driver, runtime, blas, dnn, nccl;  ///< versions; empty: not in this build
};
Facts facts(int device);
/// As facts() has it, without the GPU's start, which takes some of its memory.
std::string gpu_name(int device);

struct DeviceOptions {
  int device = 0;
  bool tf32 = false;
  int candidates = 1;   ///< of cuBLASLt's algorithms for a product, timed after the first step
  bool ranges = false;  ///< an NVTX range around each kernel
  /// Of several ranks: nothing, so that messages pass through the host; NCCL, where this build has
  /// it; copies in the GPUs' memory, of ranks that are threads of one process.
  enum class Linked { not_at_all, nccl, in_process } linked = Linked::not_at_all;
  NcclOptions links;
};

class CudaMachine;

/// What the NCCL transport and reports know of it beside execute::Device.
class CudaDevice : public execute::Device {
 public:
  virtual CudaMachine& machine() = 0;  ///< the current stream
  virtual int number() const = 0;
};
/// MachineError where there is no such GPU, or it cannot be used.
std::unique_ptr<CudaDevice> cuda_device(const DeviceOptions& options);

}  // namespace partita::cuda
