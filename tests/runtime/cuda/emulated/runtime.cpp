// CUDA's runtime.
#include <fmt/format.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "tests/runtime/cuda/emulated/gpu.h"

namespace emulated {
std::function<void(const Record&)> on_record;
std::function<std::uint32_t()> on_api_call;

namespace {

constexpr std::size_t kPage = 4096, kGrain = 256, kLargeGrain = std::size_t{2} << 20,
                      kReserved = std::size_t{1} << 40;
constexpr std::size_t kContext = 400 << 20;

std::size_t number(const char* variable, std::size_t otherwise) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}
/// Large blocks have pages of their own.
std::size_t used_by(std::size_t bytes) {
  const std::size_t grain = bytes > kLargeGrain / 2 ? kLargeGrain : kGrain;
  return (bytes + grain - 1) / grain * grain;
}
int devices() { return static_cast<int>(number("PARTITA_EMULATED_GPUS", 1)); }
std::size_t memory() { return number("PARTITA_EMULATED_MIB", 6144) << 20; }

struct Moment {
  bool done = false;
  std::uint64_t at = 0;  ///< nanoseconds of the stream's clock
};
struct Queued {
  Call call;
  std::uint32_t correlation = 0;
};

}  // namespace
}  // namespace emulated

namespace emulated {
namespace {

/// What is kept of each stream: how far it has come, and has waited for others to come.
using Clock = std::vector<std::size_t>;
struct Capture;

}  // namespace
}  // namespace emulated

// The runtime's handles are pointers to these.
struct CUevent_st {
  std::shared_ptr<emulated::Moment> recorded;   ///< of the last record
  std::shared_ptr<emulated::Capture> captured;  ///< or it was captured,
  std::size_t moment = 0;                       ///< as that
  bool timed = true;
};
struct CUgraph_st {
  /// In the order of calls: again(), or a moment that is set or waited for.
  struct Item {
    std::size_t stream = 0;
    std::function<void(cudaStream_t)> again;
    std::size_t moment = 0;
    bool sets = false;
  };
  std::vector<Item> items;
  std::size_t streams = 0, moments = 0;
};
struct CUgraphExec_st {
  CUgraph_st graph;
  std::vector<cudaStream_t> streams;
};
struct CUstream_st {
  int device = 0;
  std::shared_ptr<emulated::Capture> capture;
  std::size_t slot = 0;  ///< in it
  std::uint32_t number = 0;
  std::deque<emulated::Queued> calls;
  std::uint64_t now = 0;  ///< nanoseconds: when the last call ended
};

namespace emulated {
namespace {

struct Capture {
  CUstream_st* origin = nullptr;
  CUgraph_st graph;
  std::vector<CUstream_st*> streams;
  std::vector<Clock> clocks, moments;
  std::string broken;  ///< why it is none any more

  void join(CUstream_st* s) {
    s->slot = streams.size();
    streams.push_back(s);
    for (auto* list : {&clocks, &moments}) {
      for (Clock& c : *list) c.resize(streams.size(), 0);
    }
    clocks.emplace_back(streams.size(), 0);
  }
  void put(const CUstream_st& s, CUgraph_st::Item item) {
    item.stream = s.slot;
    graph.items.push_back(std::move(item));
    ++clocks[s.slot][s.slot];
  }
};

struct Block {
  std::size_t bytes = 0, pages = 0;  ///< asked for; mapped, all of them
  std::byte* base = nullptr;
  int device = 0;
};

/// All of a process's GPUs.
struct Machine {
  std::recursive_mutex guard;
  std::byte *arena = nullptr, *next = nullptr;
  std::map<const std::byte*, Block> blocks;        ///< by first byte
  std::map<const std::byte*, std::size_t> pinned;  ///< bytes
  std::vector<std::size_t> used;                   ///< by device
  std::vector<std::pair<std::byte*, std::size_t>> open;
  std::set<CUstream_st*> streams;
  std::set<CUevent_st*> events;
  std::map<int, CUstream_st> legacy;  ///< by device
  std::uint32_t numbers = 0;
  std::mt19937_64 rng{number("PARTITA_EMULATED_SEED", 1)};
};
Machine& machine() {
  // Never ended: statics of the program may be after it.
  static Machine& m = *new Machine;
  return m;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
/// What is being done, by this thread.
thread_local const char* doing = nullptr;
thread_local int doing_on = -1;

cudaError_t keep(cudaError_t e) {
  if (e != cudaSuccess && e != cudaErrorNotReady) last_error = e;
  return e;
}

const Block* block_of(const void* at) {
  Machine& m = machine();
  auto it = m.blocks.upper_bound(static_cast<const std::byte*>(at));
  if (it == m.blocks.begin()) return nullptr;
  --it;
  return static_cast<const std::byte*>(at) < it->first + it->second.bytes ? &it->second : nullptr;
}

[[noreturn]] void die(const std::string& why) {
  say(why);
  ::_exit(134);
}

/// GPU memory is nobody's until what is being done comes to it.
void on_fault(int, siginfo_t* info, void*) {
  Machine& m = machine();
  auto* at = static_cast<std::byte*>(info->si_addr);
  if (at < m.arena || at >= m.arena + kReserved) {
    if (doing != nullptr)
      die(fmt::format("{} reads or writes at {}, not GPU memory", doing, info->si_addr));
    ::signal(SIGSEGV, SIG_DFL);
    return;
  }
  if (doing == nullptr)
    die(fmt::format("the host reads or writes GPU memory at {}", info->si_addr));
  for (const auto& [first, b] : m.blocks) {
    if (at < b.base || at >= b.base + b.pages) continue;
    if (b.device != doing_on)
      die(fmt::format("{} on GPU {} touches memory of GPU {}", doing, doing_on, b.device));
    ::mprotect(b.base, b.pages, PROT_READ | PROT_WRITE);
    m.open.emplace_back(b.base, b.pages);
    return;
  }
  die(fmt::format("{} reads or writes GPU memory that is not allocated, at {}", doing,
                  info->si_addr));
}

void start() {
  Machine& m = machine();
  if (m.arena != nullptr) return;
  void* p =
      ::mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) die("no addresses for GPU memory");
  m.arena = m.next = static_cast<std::byte*>(p);
  m.used.assign(static_cast<std::size_t>(std::max(devices(), 1)), 0);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  ::sigaction(SIGSEGV, &action, nullptr);
}

void close_memory() {
  Machine& m = machine();
  for (const auto& [base, pages] : m.open) ::mprotect(base, pages, PROT_NONE);
  m.open.clear();
}

/// In it this thread is the GPU.
class Working {
 public:
  Working(const std::string& name, int device) {
    doing = name.c_str();
    doing_on = device;
  }
  ~Working() {
    doing = nullptr;
    doing_on = -1;
    close_memory();
  }
  Working(const Working&) = delete;
  Working& operator=(const Working&) = delete;
};

bool is_ready(const CUstream_st& s) {
  return !s.calls.empty() && (!s.calls.front().call.ready || s.calls.front().call.ready());
}

void perform(CUstream_st& s) {
  Queued q = std::move(s.calls.front());
  s.calls.pop_front();
  const auto before = std::chrono::steady_clock::now();
  if (q.call.run) {
    const Working working(q.call.name, s.device);
    q.call.run();
  }
  if (q.call.kind == Call::Kind::order) return;
  const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - before;
  Record r;
  r.start = s.now + 1000;
  // Its own time, or, so that a test knows it, one that all calls take.
  static const std::size_t fixed = number("PARTITA_EMULATED_NS", 0);
  r.end = s.now =
      r.start +
      (fixed > 0 ? fixed : static_cast<std::size_t>(std::max<std::int64_t>(took.count(), 500)));
  if (!on_record) return;
  r.name = q.call.name;
  r.kind = q.call.kind;
  r.stream = s.number;
  r.correlation = q.correlation;
  on_record(r);
}

CUstream_st* known(cudaStream_t s) {
  Machine& m = machine();
  if (s == nullptr || s == cudaStreamLegacy) {
    CUstream_st& its = m.legacy[current_device];
    its.device = current_device;
    return &its;
  }
  return m.streams.count(s) > 0 ? s : nullptr;
}

/// The host waits; others may go on meanwhile.
void until(const std::function<bool()>& done) {
  std::unique_lock lock(machine().guard);
  while (!done()) {
    if (work_once()) continue;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    lock.lock();
  }
}
/// A capture that is asked for what has not happened is none any more.
cudaError_t unsupported(const CUstream_st& s, const std::string& what) {
  s.capture->broken = what;
  return refuse(cudaErrorStreamCaptureUnsupported, what + " in a capture");
}
void drain() {
  until([] {
    const auto& all = machine().streams;
    return std::all_of(all.begin(), all.end(), [](const CUstream_st* s) {
      return s->device != current_device || s->calls.empty();
    });
  });
}

cudaError_t set_moment(cudaStream_t stream, const std::shared_ptr<Moment>& moment) {
  CUstream_st* s = known(stream);
  return queue(stream, {"event", nullptr,
                        [moment, s] {
                          moment->done = true;
                          moment->at = s->now;
                        },
                        Call::Kind::order, false});
}
cudaError_t wait_moment(cudaStream_t stream, const std::shared_ptr<Moment>& moment) {
  CUstream_st* s = known(stream);
  return queue(stream,
               {"wait", [moment] { return moment->done; },
                [moment, s] { s->now = std::max(s->now, moment->at); }, Call::Kind::order, false});
}

}  // namespace

std::recursive_mutex& guard() { return machine().guard; }
void say(const std::string& why) {
  fmt::print(stderr, "emulated GPU: {}\n", why);
  // Of ranks that are processes of their own nobody may see that.
  if (const char* file = std::getenv("PARTITA_EMULATED_LOG")) {
    std::FILE* log = std::fopen(file, "a");
    if (log == nullptr) return;
    fmt::print(log, "{}: {}\n", ::getpid(), why);
    std::fclose(log);
  }
}

bool on_gpu(const void* at) { return block_of(at) != nullptr; }
bool reachable(const void* at, std::size_t bytes) {
  const auto* p = static_cast<const std::byte*>(at);
  if (bytes == 0) return true;
  const auto inside = [&](const auto& blocks, const auto& size) {
    auto it = blocks.upper_bound(p);
    if (it == blocks.begin()) return false;
    --it;
    return p + bytes <= it->first + size(it->second);
  };
  const Machine& m = machine();
  return inside(m.blocks, [](const Block& b) { return b.bytes; }) ||
         inside(m.pinned, [](std::size_t n) { return n; });
}

void spoil(void* at, std::size_t bytes) {
  // Of a large block the ends: what reads too much reads there.
  constexpr std::size_t kMost = 1 << 20;
  auto* p = static_cast<std::byte*>(at);
  std::memset(p, 0xff, std::min(bytes, kMost));
  if (bytes > kMost)
    std::memset(p + bytes - std::min(bytes - kMost, kMost), 0xff, std::min(bytes - kMost, kMost));
}

bool captured(cudaStream_t stream, std::function<void(cudaStream_t)> again) {
  const std::lock_guard lock(machine().guard);
  const CUstream_st* s = known(stream);
  if (s == nullptr || !s->capture) return false;
  s->capture->put(*s, {0, std::move(again), 0, false});
  return true;
}
cudaError_t queue(cudaStream_t stream, Call call) {
  const std::lock_guard lock(machine().guard);
  CUstream_st* s = known(stream);
  if (s != nullptr && s->capture) {
    s->capture->put(*s, {0, [call](cudaStream_t again) { queue(again, call); }, 0, false});
    return cudaSuccess;
  }
  if (s == nullptr)
    return keep(
        refuse(cudaErrorInvalidResourceHandle, call.name + " on a stream that is not there"));
  if (s->device != current_device && call.kind == Call::Kind::kernel)
    return keep(refuse(cudaErrorInvalidResourceHandle,
                       fmt::format("{} on a stream of GPU {} while {} is current", call.name,
                                   s->device, current_device)));
  Queued q;
  if (on_api_call && call.kind != Call::Kind::order) q.correlation = on_api_call();
  q.call = std::move(call);
  s->calls.push_back(std::move(q));
  // A queue has an end, and a GPU begins when it likes.
  constexpr std::size_t kMost = 1024;
  if (s->calls.size() > kMost || machine().rng() % 8 == 0) work_once();
  return cudaSuccess;
}
cudaError_t launch(cudaStream_t stream, std::string name, std::function<void()> run) {
  return queue(stream, {std::move(name), nullptr, std::move(run), Call::Kind::kernel, false});
}

bool work_once(cudaStream_t only) {
  const std::lock_guard lock(machine().guard);
  // What is being done does nothing else.
  if (doing != nullptr) return false;
  Machine& m = machine();
  std::vector<CUstream_st*> now, later;
  for (CUstream_st* s : m.streams) {
    if (s->calls.empty() || (only != nullptr && s != only)) continue;
    (s->calls.front().call.gives_way ? later : now).push_back(s);
  }
  for (auto& [device, s] : m.legacy) {
    if (!s.calls.empty()) now.push_back(&s);
  }
  for (auto* list : {&now, &later}) {
    std::shuffle(list->begin(), list->end(), m.rng);
    for (CUstream_st* s : *list) {
      if (!is_ready(*s)) continue;
      perform(*s);
      return true;
    }
  }
  return false;
}

}  // namespace emulated

using namespace emulated;

extern "C" {

// ------------------------------------------------------------------------------------- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices();
  return *count > 0 ? cudaSuccess : keep(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return keep(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= devices()) return keep(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    default:
      return keep(refuse(cudaErrorInvalidValue,
                         fmt::format("no attribute {}", static_cast<int>(attribute))));
  }
}
cudaError_t cudaDeviceGetPCIBusId(char* to, int length, int device) {
  if (device < 0 || device >= devices()) return keep(cudaErrorInvalidDevice);
  const std::string id = fmt::format("0000:{:02X}:00.0", 16 + device);
  if (std::ssize(id) >= length) return keep(cudaErrorInvalidValue);
  std::memcpy(to, id.c_str(), id.size() + 1);
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (device < 0 || device >= devices()) return keep(cudaErrorInvalidDevice);
  *p = {};
  std::strcpy(p->name, "emulated GPU");
  p->major = 9;
  p->minor = 0;
  p->multiProcessorCount = 8;
  p->totalGlobalMem = memory();
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  for (const CUstream_st* s : machine().streams) {
    if (s->capture) return keep(unsupported(*s, "a wait for the GPU"));
  }
  drain();
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------- errors

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    default:
      return "cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNotReady:
      return "device not ready";
    default:
      return "an error that the emulated GPU has said";
  }
}

// --------------------------------------------------------------------------------------- memory

cudaError_t cudaMalloc(void** to, size_t bytes) {
  const std::lock_guard lock(guard());
  start();
  Machine& m = machine();
  *to = nullptr;
  if (bytes == 0) return cudaSuccess;
  auto& used = m.used[static_cast<std::size_t>(current_device)];
  const std::size_t taken = (bytes + kGrain - 1) / kGrain * kGrain;
  if (kContext + used + used_by(bytes) > memory()) return keep(cudaErrorMemoryAllocation);
  Block b;
  b.bytes = bytes;
  b.pages = (taken + kPage - 1) / kPage * kPage;
  b.base = m.next;
  b.device = current_device;
  // Its end is the page's, which nobody's follows.
  std::byte* at = b.base + b.pages - taken;
  m.next += b.pages + kPage;
  if (m.next > m.arena + kReserved) die("no addresses for GPU memory are left");
  ::mprotect(b.base, b.pages, PROT_READ | PROT_WRITE);
  spoil(at, taken);
  ::mprotect(b.base, b.pages, PROT_NONE);
  used += used_by(bytes);
  m.blocks[at] = b;
  *to = at;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p == nullptr) {
    const std::lock_guard lock(guard());
    start();
    return cudaSuccess;
  }
  // It waits for all that is queued.
  drain();
  const std::lock_guard lock(guard());
  Machine& m = machine();
  const auto it = m.blocks.find(static_cast<const std::byte*>(p));
  if (it == m.blocks.end())
    return keep(refuse(cudaErrorInvalidValue, "cudaFree of what is no block"));
  const Block b = it->second;
  m.blocks.erase(it);
  m.used[static_cast<std::size_t>(b.device)] -= used_by(b.bytes);
  ::mmap(b.base, b.pages, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
         0);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* available, size_t* all) {
  const std::lock_guard lock(guard());
  start();
  *all = memory();
  *available = memory() - kContext - machine().used[static_cast<std::size_t>(current_device)];
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  const std::lock_guard lock(guard());
  *to =
      std::aligned_alloc(kPage, std::max<std::size_t>((bytes + kPage - 1) / kPage * kPage, kPage));
  if (*to == nullptr) return keep(cudaErrorMemoryAllocation);
  spoil(*to, bytes);
  machine().pinned[static_cast<const std::byte*>(*to)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  if (p == nullptr) return cudaSuccess;
  drain();
  const std::lock_guard lock(guard());
  if (machine().pinned.erase(static_cast<const std::byte*>(p)) == 0)
    return keep(refuse(cudaErrorInvalidValue, "cudaFreeHost of what is not pinned"));
  std::free(p);
  return cudaSuccess;
}

// --------------------------------------------------------------------------------------- copies

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const std::lock_guard lock(guard());
  if (known(stream) == nullptr)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a copy on a stream that is not there"));
  if (bytes == 0) return cudaSuccess;
  const bool to_gpu = on_gpu(to), from_gpu = on_gpu(from);
  const bool right = kind == cudaMemcpyDefault ||
                     (kind == cudaMemcpyHostToDevice && to_gpu && !from_gpu) ||
                     (kind == cudaMemcpyDeviceToHost && !to_gpu && from_gpu) ||
                     (kind == cudaMemcpyDeviceToDevice && to_gpu && from_gpu);
  if (!right)
    return keep(refuse(cudaErrorInvalidValue,
                       fmt::format("a copy of kind {} that is none", static_cast<int>(kind))));
  for (const void* p : {static_cast<const void*>(to), from}) {
    if (on_gpu(p) && !reachable(p, bytes))
      return keep(
          refuse(cudaErrorInvalidValue, fmt::format("a copy of {} bytes past its block", bytes)));
  }
  Call c{"copy", nullptr, nullptr, Call::Kind::copy, false};
  if (const CUstream_st* s = known(stream);
      s->capture && ((!from_gpu && !reachable(from, bytes)) || (!to_gpu && !reachable(to, bytes))))
    return keep(unsupported(*s, "a copy of memory that is not pinned"));
  if (!from_gpu && !reachable(from, bytes)) {
    // Of memory that is not pinned it has read when it returns.
    const auto* p = static_cast<const std::byte*>(from);
    auto held = std::make_shared<std::vector<std::byte>>(p, p + bytes);
    c.run = [=] { std::memcpy(to, held->data(), bytes); };
    return queue(stream, std::move(c));
  }
  c.run = [=] { std::memmove(to, from, bytes); };
  const cudaError_t e = queue(stream, std::move(c));
  // To memory that is not pinned it waits.
  if (e != cudaSuccess || to_gpu || reachable(to, bytes)) return e;
  return cudaStreamSynchronize(stream);
}
/// Maybe still on its way when it returns: streams that do not block know nothing of it.
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const std::lock_guard lock(guard());
  if (known(stream) == nullptr)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a fill on a stream that is not there"));
  if (bytes == 0) return cudaSuccess;
  if (!on_gpu(to) || !reachable(to, bytes))
    return keep(
        refuse(cudaErrorInvalidValue, fmt::format("a fill of {} bytes past its block", bytes)));
  Call c{"fill", nullptr, nullptr, Call::Kind::fill, false};
  c.run = [=] { std::memset(to, value, bytes); };
  return queue(stream, std::move(c));
}

// -------------------------------------------------------------------------------------- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* to, unsigned flags, int) {
  if (flags != cudaStreamNonBlocking)
    return keep(refuse(cudaErrorInvalidValue, "streams that block are not emulated"));
  const std::lock_guard lock(guard());
  start();
  auto* s = new CUstream_st;
  s->device = current_device;
  s->number = ++machine().numbers;
  machine().streams.insert(s);
  *to = s;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  const cudaError_t e = cudaStreamSynchronize(s);
  if (e != cudaSuccess) return e;
  const std::lock_guard lock(guard());
  machine().streams.erase(s);
  delete s;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const std::lock_guard lock(guard());
  CUstream_st* s = known(stream);
  if (s == nullptr)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a look at a stream that is not there"));
  if (s->capture) return keep(unsupported(*s, "a look at a stream"));
  for (int k = 0; k < 16 && !s->calls.empty(); ++k) {
    if (!work_once()) break;
  }
  return s->calls.empty() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CUstream_st* s = nullptr;
  {
    const std::lock_guard lock(guard());
    s = known(stream);
  }
  if (s == nullptr)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a wait for a stream that is not there"));
  if (s->capture) return keep(unsupported(*s, "a wait for a stream"));
  until([s] { return s->calls.empty(); });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t e, unsigned) {
  const std::lock_guard lock(guard());
  if (machine().events.count(e) == 0)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a wait for an event that is not there"));
  CUstream_st* s = known(stream);
  if (e->captured) {
    Capture& c = *e->captured;
    if (s->capture == nullptr) {
      if (!s->calls.empty() || std::find(c.streams.begin(), c.streams.end(), s) != c.streams.end())
        return keep(
            refuse(cudaErrorStreamCaptureMerge, "a stream that joins with work of its own"));
      s->capture = e->captured;
      c.join(s);
    }
    if (s->capture != e->captured)
      return keep(refuse(cudaErrorStreamCaptureMerge, "a wait of one capture for another"));
    c.put(*s, {0, nullptr, e->moment, false});
    Clock& mine = c.clocks[s->slot];
    const Clock& theirs = c.moments[e->moment];
    for (std::size_t k = 0; k < mine.size(); ++k) mine[k] = std::max(mine[k], theirs[k]);
    return cudaSuccess;
  }
  if (s->capture && e->recorded != nullptr) {
    s->capture->broken = "a wait for what is not in it";
    return keep(refuse(cudaErrorStreamCaptureIsolation, "a capture waits for what is not in it"));
  }
  if (e->recorded == nullptr) return cudaSuccess;
  return wait_moment(stream, e->recorded);
}

// --------------------------------------------------------------------------------------- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* to, unsigned flags) {
  const std::lock_guard lock(guard());
  auto* e = new CUevent_st;
  e->timed = (flags & cudaEventDisableTiming) == 0;
  machine().events.insert(e);
  *to = e;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* to) {
  return cudaEventCreateWithFlags(to, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  const std::lock_guard lock(guard());
  if (machine().events.erase(e) == 0) return keep(cudaErrorInvalidResourceHandle);
  delete e;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
  const std::lock_guard lock(guard());
  if (machine().events.count(e) == 0)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a record of an event that is not there"));
  CUstream_st* s = known(stream);
  e->captured = s->capture;
  if (s->capture) {
    Capture& c = *s->capture;
    e->recorded = nullptr;
    e->moment = c.graph.moments++;
    c.put(*s, {0, nullptr, e->moment, true});
    c.moments.push_back(c.clocks[s->slot]);
    return cudaSuccess;
  }
  auto moment = std::make_shared<Moment>();
  e->recorded = moment;
  return set_moment(stream, moment);
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  const std::lock_guard lock(guard());
  if (machine().events.count(e) == 0) return keep(cudaErrorInvalidResourceHandle);
  if (e->captured) return keep(refuse(cudaErrorCapturedEvent, "a look at an event of a capture"));
  if (e->recorded == nullptr) return cudaSuccess;
  for (int k = 0; k < 4 && !e->recorded->done; ++k) {
    if (!work_once()) break;
  }
  return e->recorded->done ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  std::shared_ptr<Moment> moment;
  {
    const std::lock_guard lock(guard());
    if (machine().events.count(e) == 0) return keep(cudaErrorInvalidResourceHandle);
    if (e->captured) return keep(refuse(cudaErrorCapturedEvent, "a wait for a capture's event"));
    moment = e->recorded;
  }
  if (moment) until([&] { return moment->done; });
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t from, cudaEvent_t to) {
  const std::lock_guard lock(guard());
  for (const cudaEvent_t e : {from, to}) {
    if (machine().events.count(e) == 0 || e->recorded == nullptr || !e->timed)
      return keep(refuse(cudaErrorInvalidResourceHandle, "the time of an event that has none"));
    if (!e->recorded->done) return keep(cudaErrorNotReady);
  }
  *ms = static_cast<float>(
      (static_cast<double>(to->recorded->at) - static_cast<double>(from->recorded->at)) * 1e-6);
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------- captures

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(guard());
  CUstream_st* s = known(stream);
  if (stream == nullptr || stream == cudaStreamLegacy || s == nullptr || s->capture ||
      mode != cudaStreamCaptureModeRelaxed)
    return keep(refuse(cudaErrorInvalidValue, "a capture that is not emulated"));
  s->capture = std::make_shared<Capture>();
  s->capture->origin = s;
  s->capture->join(s);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* to) {
  const std::lock_guard lock(guard());
  *to = nullptr;
  const CUstream_st* s = known(stream);
  if (s == nullptr || !s->capture || s->capture->origin != s)
    return keep(refuse(cudaErrorIllegalState, "the end of a capture that did not begin there"));
  const std::shared_ptr<Capture> c = s->capture;
  for (CUstream_st* one : c->streams) one->capture = nullptr;
  for (CUevent_st* e : machine().events) {
    if (e->captured == c) e->captured = nullptr;
  }
  if (!c->broken.empty())
    return keep(refuse(cudaErrorStreamCaptureInvalidated, "a capture's end after " + c->broken));
  for (std::size_t k = 0; k < c->streams.size(); ++k) {
    if (c->clocks[0][k] < c->clocks[k][k])
      return keep(refuse(cudaErrorStreamCaptureUnjoined,
                         fmt::format("a capture's end, which stream {} of it has not joined", k)));
  }
  c->graph.streams = c->streams.size();
  *to = new CUgraph_st(c->graph);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long flags) {
  if (graph == nullptr || (flags != 0 && flags != cudaGraphInstantiateFlagUseNodePriority))
    return keep(refuse(cudaErrorInvalidValue, "a graph that is none"));
  auto* exec = new CUgraphExec_st{*graph, {}};
  for (std::size_t k = 0; k < graph->streams; ++k) {
    cudaStream_t s = nullptr;
    cudaStreamCreateWithPriority(&s, cudaStreamNonBlocking, 0);
    exec->streams.push_back(s);
  }
  *to = exec;
  return cudaSuccess;
}
/// What is in it is called again, on streams of its own.
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const std::lock_guard lock(guard());
  if (exec == nullptr || known(stream) == nullptr)
    return keep(refuse(cudaErrorInvalidResourceHandle, "a launch of a graph that is none"));
  const auto start = std::make_shared<Moment>();
  set_moment(stream, start);
  for (const cudaStream_t s : exec->streams) wait_moment(s, start);
  std::vector<std::shared_ptr<Moment>> moments(exec->graph.moments);
  for (auto& m : moments) m = std::make_shared<Moment>();
  for (const CUgraph_st::Item& i : exec->graph.items) {
    const cudaStream_t on = exec->streams[i.stream];
    if (i.again) {
      i.again(on);
    } else if (i.sets) {
      set_moment(on, moments[i.moment]);
    } else {
      wait_moment(on, moments[i.moment]);
    }
  }
  // Those that others wait for not: the first has waited for all.
  const auto end = std::make_shared<Moment>();
  set_moment(exec->streams.at(0), end);
  return wait_moment(stream, end);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t stream) {
  return exec != nullptr && known(stream) != nullptr ? cudaSuccess
                                                     : keep(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  for (const cudaStream_t s : exec->streams) cudaStreamDestroy(s);
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

}  // extern "C"
