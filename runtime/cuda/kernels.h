// runtime/cuda/kernels.h: what nvcc compiled, for the host's compiler to call.
#pragma once

#include "runtime/cuda/cuda_machine.h"
#include "runtime/cuda/run_table.h"
#include "runtime/execute/device.h"

namespace partita::cuda {

/// False where there is no kernel for this case.
bool run_operator(CudaMachine& m, execute::Work work, const reference::Context& c,
                  std::size_t statistic, const cpu::Arguments& a);
bool run_plain_kernel(CudaMachine& m, const execute::PlainCall& call);

void fill(CudaMachine& m, float* to, std::int64_t n, float value);
void draw(CudaMachine& m, Numbers to, std::int64_t n, float mean, float deviation,
          std::uint64_t seed);

/// As execute::Device::stand_in.
void stand_in(CudaMachine& m, std::byte* to, const std::byte* from, std::int64_t bytes,
              int multiprocessors);

/// Packs runs, or unpacks them. A table's `unit` is 2, 4 or 16 bytes; those of 16 lie on multiples.
void move(CudaMachine& m, const RunTable& t, std::int64_t unit, const std::byte* from,
          std::byte* to, bool unpacks);
void unpack_add(CudaMachine& m, const RunTable& t, ElementType type, const std::byte* from,
                std::byte* to);

}  // namespace partita::cuda
