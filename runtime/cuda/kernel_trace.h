// runtime/cuda/kernel_trace.h: what ran on a GPU and when, as it says itself (activity.h), and as a
// trace for a browser; plain arithmetic and text, tested without a GPU.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace partita::cuda {

/// A kernel, copy or fill. Times in nanoseconds of the GPU's clock.
struct KernelRecord {
  std::string name;        ///< as the compiler has mangled it
  std::string called_for;  ///< "forward of linear"; empty: not known
  std::uint32_t stream = 0;
  std::int64_t start = 0, end = 0;
  std::int64_t asked = 0;  ///< the call that queued it was over; 0: not known
};

/// Without namespaces' and templates' arguments: "flash_kernel", "ncclDevKernel_AllReduce_Sum_f32".
std::string short_name(const std::string& mangled);

/// What passes between the end of a kernel and the start of the next of its stream which was
/// waiting for that: asked for a microsecond before. The median, nanoseconds; 0 where none waited.
std::int64_t between_kernels(const std::vector<KernelRecord>& records);

/// Time by what it was called for; streams that overlap count twice.
struct TracedTime {
  std::int64_t count = 0, nanoseconds = 0;
};
std::map<std::string, TracedTime> by_caller(const std::vector<KernelRecord>& records);

/// Chrome's trace format: an event for each record, a thread for each stream; microseconds since
/// the first.
std::string chrome_trace(const std::vector<KernelRecord>& records);

}  // namespace partita::cuda
