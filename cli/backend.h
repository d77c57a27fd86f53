// cli/backend.h: --backend: on whose memory and kernels the ranks of a run work.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime/cuda/nvml.h"
#include "runtime/execute/device.h"

namespace partita::cli {

struct BackendOptions {
  std::string name = "cpu";  ///< or cuda
  bool share_gpu = false;    ///< several ranks on one GPU
  bool threads = false;      ///< the ranks are threads of this process
  int ranks = 1;
  double timeout_s = 10;
  ElementType compute = ElementType::fp32;  ///< the plan's: tf32 is a GPU's choice of products
};

/// InputError, in one line, where the backend is unknown, not in this build, or finds no GPU.
void check_backend(const BackendOptions& options);
/// What a rank's executor asks for its device; null: the host. After check_backend.
std::function<std::unique_ptr<execute::Device>(int rank)> devices_of(const BackendOptions& options);
/// RankResult::no_links in a line on stderr.
void note_no_links(const std::string& why);
/// By which of its libraries' algorithms a rank's device computed products, as JSON's text.
std::string products_json(const std::vector<execute::ProductAlgorithm>& products);
/// The first GPU, in figures, and what its driver says of it just now (0: nothing). After
/// check_backend.
struct Gpu {
  std::string name;
  std::int64_t memory_bytes = 0, free_bytes = 0;
  int multiprocessors = 0, compute_capability = 0;
  int count = 0;  ///< of this machine's GPUs
};
Gpu backend_gpu();
/// How many there are, and the first one's name, without a start of the GPU.
int backend_gpu_count();
std::string backend_gpu_name();
cuda::GpuState backend_state();
/// Asks for the state every 20 ms from its making on, until at_work() ends it: at_work of them.
class StateWatch {
 public:
  StateWatch();
  ~StateWatch();
  cuda::GpuState at_work();

 private:
  void stop();
  std::vector<cuda::GpuState> states_;
  std::mutex guard_;
  std::condition_variable ended_;
  bool ends_ = false;
  std::thread thread_;
};
/// "1755 MHz, 690 W, 61 °C, held back by power cap"; "": the driver says nothing. What heat, a
/// slowdown or a power brake held back is said to be no measurement.
std::string conditions_line(const cuda::GpuState& state);
/// The same as JSON's text; "null" where nothing is said.
std::string conditions_json(const cuda::GpuState& state);
/// What the user should know of how the ranks' GPUs are reached; empty: nothing.
std::string note_of(const BackendOptions& options);
/// "NVIDIA H200 (9.0, 132 multiprocessors, 139.8 GiB), driver 13.0, ..." ; of a build without CUDA
/// or a machine without a GPU, that.
std::string backend_version();

}  // namespace partita::cli
