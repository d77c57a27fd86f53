#include "cli/backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/unit_text.h"
#ifdef PARTITA_WITH_CUDA
#  include <dlfcn.h>

#  include <filesystem>

#  include "cli/wheels.h"
#  include "runtime/cuda/plugin.h"
#endif

namespace partita::cli {
namespace {

#ifdef PARTITA_WITH_CUDA
/// Loaded once, for good.
const cuda::Plugin& plugin() {
  static const cuda::Plugin* const loaded = [] {
    const auto beside = std::filesystem::read_symlink("/proc/self/exe").parent_path();
    std::string why;
    if (!std::filesystem::exists(beside / cuda::kPluginFile))
      throw InputError("--backend", fmt::format("cuda needs {} beside the command, and {} has "
                                                "none; build it with a CUDA compiler "
                                                "(docs/cuda.md), or use cpu",
                                                cuda::kPluginFile, beside.string()));
    void* library = open_with_wheels(beside / cuda::kPluginFile, why);
    void* entry = library == nullptr ? nullptr : ::dlsym(library, cuda::kPluginEntry);
    if (entry == nullptr)
      throw InputError("--backend",
                       fmt::format("cuda needs {}, which cannot be loaded ({}); put the folders of "
                                   "CUDA's, cuDNN's and NCCL's libraries into LD_LIBRARY_PATH, "
                                   "activate the Python environment that has NVIDIA's wheels, or "
                                   "use cpu",
                                   cuda::kPluginFile, why.empty() ? "no entry" : why));
    return reinterpret_cast<const cuda::Plugin* (*)()>(entry)();
  }();
  return *loaded;
}
using Linked = cuda::DeviceOptions::Linked;
/// NCCL refuses several ranks of one process on one GPU.
Linked linked(const BackendOptions& o) {
  if (o.ranks <= 1) return Linked::not_at_all;
  const bool nccl = !plugin().nccl_version().empty();
  if (o.threads) return nccl && !o.share_gpu ? Linked::nccl : Linked::in_process;
  return nccl ? Linked::nccl : Linked::not_at_all;
}
/// The GPU of a rank, by its number on its host.
int gpu_of(int rank, int gpus, bool shared) {
  for (const char* name :
       {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"}) {
    const char* value = std::getenv(name);
    if (value == nullptr) continue;
    char* end = nullptr;
    const long n = std::strtol(value, &end, 10);
    if (end == value || *end != 0 || n < 0 || n > 1'000'000)
      throw InputError(name, fmt::format("'{}' is no rank of a host, which count from 0; unset it, "
                                         "or start the ranks with torchrun, srun or mpirun",
                                         value));
    // A launcher may show each rank one GPU.
    if (n >= gpus && gpus > 1 && !shared)
      throw InputError(name, fmt::format("rank {} of this host finds {} GPUs; start no more ranks "
                                         "than GPUs, or use --share-gpu, which proves mathematics "
                                         "and not speed",
                                         n, gpus));
    return static_cast<int>(n % gpus);
  }
  return rank % gpus;
}
#endif

}  // namespace

void check_backend(const BackendOptions& o) {
  if (o.name != "cpu" && o.name != "cuda")
    throw InputError("--backend", fmt::format("'{}' is unknown; there are cpu and cuda", o.name));
  if (o.share_gpu && o.name != "cuda")
    throw InputError("--share-gpu", "is for --backend cuda; leave it out");
  if (o.name == "cpu") return;
#ifdef PARTITA_WITH_CUDA
  const std::string why = plugin().absent();
  if (!why.empty()) throw InputError("--backend", why);
  const int gpus = plugin().device_count();
  if (o.ranks > gpus && !o.share_gpu)
    throw InputError("--ranks",
                     fmt::format("{} ranks, and this machine has {} GPU{}; use as many, or "
                                 "--share-gpu, which proves mathematics and not speed",
                                 o.ranks, gpus, gpus == 1 ? "" : "s"));
#else
  throw InputError("--backend",
                   "this build has no CUDA; put nvcc on PATH and build again, or use cpu");
#endif
}

void note_no_links(const std::string& why) {
  fmt::print(stderr,
             "note: messages pass through the host, as GPUs that are shared are not linked: {}; "
             "with --transport threads they stay in the GPU's memory\n",
             why);
}

std::string products_json(const std::vector<execute::ProductAlgorithm>& products) {
  auto all = nlohmann::ordered_json::array();
  for (const execute::ProductAlgorithm& p : products)
    all.push_back({{"m", p.m},
                   {"n", p.n},
                   {"k", p.k},
                   {"batch", p.batch},
                   {"transposed", p.transposed},
                   {"type", name(p.type)},
                   {"out", name(p.out)},
                   {"adds", p.adds},
                   {"algorithm", p.algorithm},
                   {"candidates", p.candidates},
                   {"taken", p.taken},
                   {"seconds", p.seconds},
                   {"seconds_of_usual", p.seconds_of_usual}});
  return all.dump();
}

#ifdef PARTITA_WITH_CUDA
namespace {
/// Of cuBLASLt's algorithms for a product, timed after the first step.
int candidates() {
  const char* text = std::getenv("PARTITA_CUDA_CANDIDATES");
  if (text == nullptr) return 4;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (end == text || *end != 0 || n < 1 || n > 64)
    throw InputError("PARTITA_CUDA_CANDIDATES",
                     fmt::format("'{}' is not in 1 to 64, as many of cuBLASLt's algorithms for a "
                                 "product as are timed",
                                 text));
  return static_cast<int>(n);
}
}  // namespace
#endif

std::function<std::unique_ptr<execute::Device>(int rank)> devices_of(const BackendOptions& o) {
  if (o.name == "cpu") return nullptr;
#ifdef PARTITA_WITH_CUDA
  return [o](int rank) -> std::unique_ptr<execute::Device> {
    cuda::DeviceOptions d;
    const int gpus = std::max(plugin().device_count(), 1);
    d.device = o.threads ? rank % gpus : gpu_of(rank, gpus, o.share_gpu);
    // Ranks that share a GPU would time each other.
    d.candidates = o.share_gpu ? 1 : candidates();
    d.tf32 = o.compute == ElementType::tf32;
    d.linked = linked(o);
    d.links.shared_gpu = o.share_gpu;
    d.links.timeout_s = std::max(o.timeout_s, 30.0);
    return plugin().device(d);
  };
#else
  return nullptr;
#endif
}

Gpu backend_gpu() {
#ifdef PARTITA_WITH_CUDA
  const cuda::Facts f = plugin().facts(0);
  return {f.name,
          f.memory_bytes,
          f.free_bytes,
          f.multiprocessors,
          f.compute_capability,
          plugin().device_count()};
#else
  return {};
#endif
}

int backend_gpu_count() {
#ifdef PARTITA_WITH_CUDA
  return plugin().device_count();
#else
  return 0;
#endif
}

std::string backend_gpu_name() {
#ifdef PARTITA_WITH_CUDA
  return plugin().gpu_name(0);
#else
  return "";
#endif
}

cuda::GpuState backend_state() {
#ifdef PARTITA_WITH_CUDA
  static const auto library = cuda::nvml();
  static const std::string bus = plugin().facts(0).bus_id;
  if (library) return library->state(bus);
#endif
  return {};
}

StateWatch::StateWatch()
    : thread_([this] {
        std::unique_lock lock(guard_);
        do {
          lock.unlock();
          const cuda::GpuState s = backend_state();
          lock.lock();
          states_.push_back(s);
        } while (!ended_.wait_for(lock, std::chrono::milliseconds(20), [this] { return ends_; }));
      }) {}
StateWatch::~StateWatch() { stop(); }
void StateWatch::stop() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(guard_);
    ends_ = true;
  }
  ended_.notify_all();
  thread_.join();
}
cuda::GpuState StateWatch::at_work() {
  stop();
#ifdef PARTITA_WITH_CUDA
  return cuda::at_work(states_);
#else
  return {};
#endif
}

std::string conditions_line(const cuda::GpuState& s) {
  if (s.clock_mhz <= 0) return "";
  std::string line = fmt::format("{:.0f} MHz", s.clock_mhz);
  if (s.power_w > 0) line += fmt::format(", {:.0f} W", s.power_w);
  if (s.temperature_c > 0) line += fmt::format(", {:.0f} °C", s.temperature_c);
  if (s.throttled.empty()) return line;
  line += ", held back by " + s.throttled;
  return s.throttled == "power cap" ? line : line + ": no measurement";
}
std::string conditions_json(const cuda::GpuState& s) {
  if (s.clock_mhz <= 0) return "null";
  return nlohmann::ordered_json{{"clock_mhz", s.clock_mhz},
                                {"memory_clock_mhz", s.memory_clock_mhz},
                                {"power_w", s.power_w},
                                {"temperature_c", s.temperature_c},
                                {"throttled", s.throttled}}
      .dump();
}

std::string note_of(const BackendOptions& o) {
#ifdef PARTITA_WITH_CUDA
  if (o.name == "cuda" && o.ranks > 1 && linked(o) == Linked::not_at_all)
    return "this build has no NCCL: what ranks exchange passes through the host";
  if (o.name == "cuda" && o.ranks > 1 && linked(o) == Linked::in_process)
    return "ranks are threads that exchange by copies in the GPU's memory: their times are no "
           "prediction's";
  if (o.name == "cuda" && o.share_gpu)
    return "ranks share a GPU: predicted in turns of time slices; NCCL's hops between them, "
           "milliseconds each, are in no prediction";
#endif
  static_cast<void>(o);
  return "";
}

std::string backend_version() {
#ifdef PARTITA_WITH_CUDA
  const std::string why = plugin().absent();
  const cuda::Facts f = plugin().facts(why.empty() ? 0 : -1);
  // The driver's own version is NVML's to say; the runtime knows which CUDA it is of.
  const auto library = cuda::nvml();
  const std::string driver = library ? library->driver() : "";
  const std::string libraries = fmt::format(
      "CUDA {}, driver {}, cuBLASLt {}, {}, NCCL {}", f.runtime,
      driver.empty() ? "for CUDA " + f.driver : fmt::format("{} (CUDA {})", driver, f.driver),
      f.blas, f.dnn.empty() ? "no cuDNN" : f.dnn, f.nccl.empty() ? "none" : f.nccl);
  if (!why.empty()) return libraries + "; " + why;
  return fmt::format("{} ({}.{}, {} multiprocessors, {}), {}", f.name, f.compute_capability / 10,
                     f.compute_capability % 10, f.multiprocessors, text(Bytes{f.memory_bytes}),
                     libraries);
#else
  return "no CUDA in this build";
#endif
}

}  // namespace partita::cli
