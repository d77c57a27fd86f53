#include "runtime/cuda/plugin.h"

extern "C" const partita::cuda::Plugin* partita_cuda_plugin() {
  static const partita::cuda::Plugin plugin{
      partita::cuda::absent, partita::cuda::device_count, partita::cuda::gpu_name,
      partita::cuda::facts,  partita::cuda::nccl_version, partita::cuda::cuda_device};
  return &plugin;
}
