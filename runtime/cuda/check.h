// runtime/cuda/check.h: return codes of CUDA and its libraries become errors with their reason.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "base/error.h"

namespace partita::cuda {

/// Throws MachineError("CUDA: WHAT: REASON") unless the call succeeded. A failed kernel shows in a
/// later call: PARTITA_CUDA_CHECK=1 in the environment waits after each operator and names it.
inline void check(cudaError_t e, const std::string& what) {
  if (e == cudaSuccess) return;
  // Said once: it stays the thread's last error, and the next kernel's start would have it again.
  static_cast<void>(cudaGetLastError());
  throw MachineError("CUDA: " + what + ": " + cudaGetErrorName(e) + ", " + cudaGetErrorString(e));
}
inline void check(cublasStatus_t s, const std::string& what) {
  if (s == CUBLAS_STATUS_SUCCESS) return;
  throw MachineError("cuBLASLt: " + what + ": " + cublasLtGetStatusString(s));
}

/// Pageable memory to the GPU, there when it returns: cudaMemcpy alone may return while the last
/// part is still on its way, and streams that do not block know nothing of it (CUDA Runtime API,
/// "API synchronization behavior").
inline cudaError_t copy_now(void* to, const void* from, std::size_t bytes) {
  const cudaError_t e = cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice);
  return e != cudaSuccess ? e : cudaStreamSynchronize(cudaStreamLegacy);
}

}  // namespace partita::cuda
