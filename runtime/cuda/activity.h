// runtime/cuda/activity.h: a GPU's own record of what it ran, by CUPTI, where its header was found
// when this was built and its library is found now (docs/cuda.md, "Tracing").
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "runtime/cuda/kernel_trace.h"

namespace partita::cuda {

/// Records from start to end, at which the device is idle and has no graph. One at a time in a
/// process: CUPTI's callbacks know nobody.
class Activity {
 public:
  virtual ~Activity() = default;
  /// What is queued from here to the matching leave() was called for that.
  virtual void enter(const std::string& called_for) = 0;
  virtual void leave() = 0;
  /// All records so far, in order of their start; the device must be idle. They are given once.
  virtual std::vector<KernelRecord> take() = 0;
};

/// Null, and `why` says it, where there is no CUPTI, or another tool has it.
/// `goes`: CUPTI leaves the process with it.
std::unique_ptr<Activity> start_activity(std::string& why, bool goes);

}  // namespace partita::cuda
