// runtime/cuda/check.h: return codes of CUDA and its libraries become errors with their reason.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <string>

#include "base/error.h"

namespace partita::cuda {

/// Throws MachineError("CUDA: WHAT: REASON") unless the call succeeded. A failed kernel shows in a
/// later call: PARTITA_CUDA_CHECK=1 in the environment waits after each operator and names it.
inline void check(cudaError_t e, const std::string& what) {
  if (e == cudaSuccess) return;
  throw MachineError("CUDA: " + what + ": " + cudaGetErrorName(e) + ", " + cudaGetErrorString(e));
}
inline void check(cublasStatus_t s, const std::string& what) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  throw MachineError("cuBLASLt: " + what + ": " + cublasLtGetStatusString(s));
}

}  // namespace partita::cuda
