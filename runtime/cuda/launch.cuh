// runtime/cuda/launch.cuh: CudaMachine's kernels; for nvcc.
#pragma once

#include "runtime/cuda/cuda_machine.h"
#include "runtime/cuda/stand_in.h"

namespace partita::cuda {

template <class F>
__global__ void each_kernel(std::int64_t n, F f) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += step)
    f(i);
}
constexpr unsigned kMostLanes = 512;
/// All lanes of a block take the same rows. Of so many threads none has more than 128 registers:
/// with more it would not start.
template <class F>
__global__ void __launch_bounds__(kMostLanes, 1) rows_kernel(std::int64_t n, F f) {
  const Lanes lanes;
  for (std::int64_t row = blockIdx.x; row < n; row += gridDim.x) f(row, lanes);
}

/// As many rows as the block has warps: of a warp each, blocks could not fill a multiprocessor.
constexpr unsigned kWarpsOfRows = 8;
template <class F>
__global__ void __launch_bounds__(kWarpsOfRows * 32) short_rows_kernel(std::int64_t n, F f) {
  const Lanes lanes(true);
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kWarpsOfRows + threadIdx.x / 32;
       row < n; row += static_cast<std::int64_t>(gridDim.x) * kWarpsOfRows)
    f(row, lanes);
}

template <class F>
void CudaMachine::each(std::int64_t n, F f) {
  if (n <= 0) return;
  constexpr std::int64_t kThreads = 256, kMostBlocks = 1 << 20;
  const std::int64_t blocks = (n + kThreads - 1) / kThreads;
  each_kernel<<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0,
                stream_>>>(n, f);
  check(cudaGetLastError(), "start of a kernel for each of " + std::to_string(n));
}
template <class F>
void CudaMachine::rows(std::int64_t n, std::int64_t width, F f) {
  if (n <= 0) return;
  constexpr std::int64_t kMostBlocks = 1 << 20;
  unsigned threads = 32;
  while (threads < kMostLanes && threads * 4 < width) threads *= 2;
  const std::int64_t rows = threads == 32 ? kWarpsOfRows : 1, wanted = (n + rows - 1) / rows;
  const auto blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  if (rows > 1) {
    short_rows_kernel<<<blocks, kWarpsOfRows * 32, 0, stream_>>>(n, f);
  } else {
    rows_kernel<<<blocks, threads, 0, stream_>>>(n, f);
  }
  check(cudaGetLastError(), "start of a kernel for " + std::to_string(n) + " rows");
}

inline __global__ void stand_in_kernel(StandIn s) {
  s(blockIdx.x, threadIdx.x, blockDim.x, [] {
    std::int64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
  });
}
inline void start_stand_in(CudaMachine& m, const StandIn& s) {
  // Every call: an attribute is of the device that is current.
  check(cudaFuncSetAttribute(stand_in_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kStandInShared),
        "shared memory of a stand-in");
  stand_in_kernel<<<static_cast<unsigned>(s.blocks), kStandInThreads, kStandInShared, m.stream()>>>(
      s);
  check(cudaGetLastError(), "start of a stand-in");
}

}  // namespace partita::cuda
