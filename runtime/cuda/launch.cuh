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

/// Rows that a part of a warp shares: of one each, blocks could not fill a multiprocessor, and most
/// of a warp would have nothing of a head's norm on its way.
constexpr unsigned kShortRowsThreads = 256, kLeastLanes = 4;
template <class F>
__global__ void __launch_bounds__(kShortRowsThreads)
    short_rows_kernel(std::int64_t n, unsigned of_row, F f) {
  const Lanes lanes(of_row);
  const unsigned rows = kShortRowsThreads / of_row;
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * rows + threadIdx.x / of_row;
       row < n; row += static_cast<std::int64_t>(gridDim.x) * rows)
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
  unsigned lanes = kLeastLanes;
  while (lanes < kMostLanes && lanes * 4 < width) lanes *= 2;
  const std::int64_t rows = lanes <= Lanes::kWarp ? kShortRowsThreads / lanes : 1,
                     wanted = (n + rows - 1) / rows;
  const auto blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  if (rows > 1) {
    short_rows_kernel<<<blocks, kShortRowsThreads, 0, stream_>>>(n, lanes, f);
  } else {
    rows_kernel<<<blocks, lanes, 0, stream_>>>(n, f);
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
