// The operators' kernels as nvcc compiles them.
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/launch.cuh"
#include "runtime/cuda/plain.h"
#include "runtime/cuda/runs.h"
#include "runtime/cuda/stand_in.h"

namespace partita::cuda {

bool run_operator(CudaMachine& m, execute::Work work, const reference::Context& c,
                  std::size_t statistic, const cpu::Arguments& a) {
  switch (work) {
    case execute::Work::forward_statistic:
      return run_forward_statistic(m, c, statistic, a);
    case execute::Work::forward:
      return run_forward(m, c, a);
    case execute::Work::backward_statistic:
      return run_backward_statistic(m, c, a);
    case execute::Work::backward_data:
      return run_backward_data(m, c, a);
    case execute::Work::backward_weight:
      return run_backward_weight(m, c, a);
    case execute::Work::attend_part:
      return run_attend_part(m, c, a);
    case execute::Work::attend_part_backward:
      return run_attend_part_backward(m, c, a);
  }
  return false;
}
bool run_plain_kernel(CudaMachine& m, const execute::PlainCall& call) { return run_plain(m, call); }

void fill(CudaMachine& m, float* to, std::int64_t n, float value) { fill_values(m, to, n, value); }
void draw(CudaMachine& m, Numbers to, std::int64_t n, float mean, float deviation,
          std::uint64_t seed) {
  draw_values(m, to, n, mean, deviation, seed);
}

void stand_in(CudaMachine& m, std::byte* to, const std::byte* from, std::int64_t bytes,
              int multiprocessors) {
  if (bytes == 0) return;
  StandIn s;
  s.from = from;
  s.to = to;
  s.bytes = bytes;
  s.blocks = multiprocessors;
  s.nanoseconds = 1e9 * static_cast<double>(kStandInChunk) / kStandInRate;
  start_stand_in(m, s);
}

void move(CudaMachine& m, const RunTable& t, std::int64_t unit, const std::byte* from,
          std::byte* to, bool unpacks) {
  move_runs(m, t, unit, from, to, unpacks);
}
void unpack_add(CudaMachine& m, const RunTable& t, ElementType type, const std::byte* from,
                std::byte* to) {
  add_runs(m, t, type, from, to);
}

}  // namespace partita::cuda
