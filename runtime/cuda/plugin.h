// runtime/cuda/plugin.h: what the command finds in libpartita_cuda.so. A library of its own: CUDA's
// take a tenth of a second to load, which only those pay who use them.
#pragma once

#include <memory>
#include <string>

#include "runtime/cuda/device.h"

namespace partita::cuda {

struct Plugin {
  std::string (*absent)();
  int (*device_count)();
  std::string (*gpu_name)(int device);
  Facts (*facts)(int device);
  std::string (*nccl_version)();
  std::unique_ptr<CudaDevice> (*device)(const DeviceOptions& options);
};
/// The library's one entry; it uses the command's own symbols, so both are of one build.
inline constexpr const char* kPluginEntry = "partita_cuda_plugin";
inline constexpr const char* kPluginFile = "libpartita_cuda.so";

}  // namespace partita::cuda
