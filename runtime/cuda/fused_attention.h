// runtime/cuda/fused_attention.h: attention by cuDNN's graphs, where cudnn_frontend's headers were
// found when this was built (docs/cuda.md, "Attention").
#pragma once

#include <cstdint>
#include <memory>

#include "runtime/cuda/flash.h"

namespace partita::cuda {

class CudaMachine;

class FusedAttention {
 public:
  virtual ~FusedAttention() = default;
  /// The forward, or all gradients; false where cuDNN cannot, which it says once: nothing was done.
  virtual bool run(CudaMachine& m, const FlashCall& call, bool backward) = 0;
  /// Bytes of the GPU's memory that an earlier run of this process had taken for it.
  virtual std::int64_t taken_before() const = 0;
};

/// Of this process that cuDNN has done.
std::int64_t fused_attention_calls();

/// Null where this build has no cudnn_frontend or this machine no cuDNN, and where
/// PARTITA_CUDA_FLASH in the environment is "own".
std::unique_ptr<FusedAttention> make_fused_attention();

}  // namespace partita::cuda
