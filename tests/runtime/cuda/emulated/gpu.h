// tests/runtime/cuda/emulated/gpu.h: GPUs that a process emulates, for the libraries beside this
// file: CUDA's runtime, cuBLASLt, cuDNN, NCCL and CUPTI as far as runtime/cuda calls them
// (docs/cuda.md, "An emulated GPU").
//
// Nothing that is queued is done until the host waits or looks, then one call of some stream after
// the other, drawn (PARTITA_EMULATED_SEED): work that is not ordered by events comes in any order,
// and pinned memory is read as late as can be. GPU memory lies where the host may not look; blocks
// begin as no numbers, end at a page that is nobody's, and their addresses are never used again.
// What a real library refuses, these refuse; what it does not find, a pointer outside of memory,
// ends the process with a line that says so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

namespace emulated {

/// One process's GPUs are emulated by one thread at a time.
std::recursive_mutex& guard();

struct Call {
  std::string name;
  std::function<bool()> ready;  ///< null: when it is first of its stream
  std::function<void()> run;
  enum class Kind { kernel, copy, fill, order } kind = Kind::kernel;
  bool gives_way = false;  ///< what else is ready goes first: it waits for other processes
};

/// Queues on the stream, under the caller's correlation for CUPTI. cudaErrorInvalidResourceHandle
/// where there is no such stream.
cudaError_t queue(cudaStream_t stream, Call call);
/// In a capture of that stream: each launch of the graph calls `again` with the stream that stands
/// for it. False: none goes on there.
bool captured(cudaStream_t stream, std::function<void(cudaStream_t)> again);
/// A kernel, without a step from one thread to another.
cudaError_t launch(cudaStream_t stream, std::string name, std::function<void()> run);
/// True if anything was done. Of one stream, or of all.
bool work_once(cudaStream_t only = nullptr);

/// GPU or pinned memory that nobody has released, of `bytes` from `at` on?
bool reachable(const void* at, std::size_t bytes);
/// GPU memory, of whichever device.
bool on_gpu(const void* at);
/// "what a real library refuses", on stderr, and the code.
template <class Code>
Code refuse(Code code, const std::string& why);
void say(const std::string& why);

template <class Code>
Code refuse(Code code, const std::string& why) {
  say(why);
  return code;
}

/// Handles of the libraries are pointers to what only they know.
template <class To, class From>
To* the(From* p) {
  return reinterpret_cast<To*>(p);
}

/// Bytes that stay no numbers, so that what was written there before is not read after.
void spoil(void* at, std::size_t bytes);

/// What CUPTI's records would hold; null: nobody listens.
struct Record {
  std::string name;
  Call::Kind kind = Call::Kind::kernel;
  std::uint32_t stream = 0, correlation = 0;
  std::uint64_t start = 0, end = 0;
};
extern std::function<void(const Record&)> on_record;
/// A call of the runtime that queued something: gives its correlation.
extern std::function<std::uint32_t()> on_api_call;

}  // namespace emulated
