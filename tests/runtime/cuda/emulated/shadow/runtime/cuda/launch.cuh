// In the place of runtime/cuda/launch.cuh: kernels run on the host, as the emulated GPU's.
#pragma once

#include <atomic>

#include "runtime/cuda/cuda_machine.h"
#include "runtime/cuda/stand_in.h"
#include "tests/runtime/cuda/emulated/gpu.h"
#include "tests/runtime/cuda/emulated/lanes.h"

namespace partita::cuda {

template <class F>
void CudaMachine::each(std::int64_t n, F f) {
  if (n <= 0) return;
  check(emulated::launch(stream_, "each_kernel",
                         [n, f] {
                           for (std::int64_t i = 0; i < n; ++i) f(i);
                         }),
        "start of a kernel for each of " + std::to_string(n));
}
template <class F>
void CudaMachine::rows(std::int64_t n, std::int64_t width, F f) {
  if (n <= 0) return;
  int threads = 32;
  while (threads < 512 && threads * 4 < width) threads *= 2;
  // Kernels are right on any number of warps: by turns on more than a GPU would take.
  static std::atomic<int> calls = 0;
  if (++calls % 2 == 0 && threads < 1024) threads *= 2;
  check(emulated::launch(stream_, "rows_kernel",
                         [n, f, threads] {
                           for (std::int64_t i = 0; i < n; ++i)
                             emulated::block(threads, [&] { f(i, Lanes{}); });
                         }),
        "start of a kernel for " + std::to_string(n) + " rows");
}
/// Copies without its pace: its clock is always late.
inline void start_stand_in(CudaMachine& m, const StandIn& s) {
  check(emulated::launch(m.stream(), "stand_in_kernel",
                         [s] {
                           std::int64_t now = 0;
                           for (std::int64_t b = 0; b < s.blocks; ++b)
                             s(b, 0, 1, [&now] { return now += std::int64_t{1} << 40; });
                         }),
        "start of a stand-in");
}

}  // namespace partita::cuda
