// runtime/cuda/nccl.h: GPUs of several ranks linked by NCCL (docs/cuda.md, "Links").
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "runtime/execute/device.h"

namespace partita::cuda {

struct NcclOptions {
  double timeout_s = 60;  ///< of a meeting, and of a wait without an end
  /// Several ranks on one GPU, each seen by NCCL as a machine of its own (share_one_gpu).
  bool shared_gpu = false;
};

/// Communicators, of which one waits for others: whoever waits for a stream calls poll() now and
/// then, and abort() when it gives up, so that kernels which wait for a peer end.
class NcclLinks : public execute::Links {
 public:
  /// PeerError: a communicator has failed, asynchronously.
  virtual void poll() = 0;
  virtual void abort() = 0;
  virtual double timeout_s() const = 0;
  std::function<void()> before_abort;  ///< forgets what holds calls of the communicators
};

/// `stream`: the device's current one, a cudaStream_t. Null where this build has no NCCL.
std::unique_ptr<NcclLinks> nccl_links(const NcclOptions& options, std::function<void*()> stream);
/// "2.28.9"; empty: none.
std::string nccl_version();

/// Sets this process's environment, before NCCL's first call, so that it takes ranks which share a
/// GPU for ranks of several machines: it refuses two of one machine on one GPU. What the user has
/// set stays. Such ranks take turns on the GPU, milliseconds each: it proves mathematics, not
/// speed.
void share_one_gpu(int rank);

}  // namespace partita::cuda
