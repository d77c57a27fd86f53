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
};

/// Without namespaces' and templates' arguments: "flash_kernel", "ncclDevKernel_AllReduce_Sum_f32".
std::string short_name(const std::string& mangled);

/// Time by what it was called for; streams that overlap count twice.
struct TracedTime {
  std::int64_t count = 0, nanoseconds = 0;
  std::int64_t first = 0, last = 0;  ///< start of the first, end of the last
};
std::map<std::string, TracedTime> by_caller(const std::vector<KernelRecord>& records);

/// Chrome's trace format: an event for each record, a thread for each stream; microseconds since
/// the first.
std::string chrome_trace(const std::vector<KernelRecord>& records);

}  // namespace partita::cuda
