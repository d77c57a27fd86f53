#include "runtime/cuda/device.h"

#include <fmt/format.h>
#include <nvtx3/nvToolsExt.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>

#include "runtime/cuda/activity.h"
#include "runtime/cuda/convolutions.h"
#include "runtime/cuda/cuda_machine.h"
#include "runtime/cuda/fused_attention.h"
#include "runtime/cuda/kernels.h"
#include "runtime/cuda/nvml.h"
#include "runtime/cuda/operands.h"
#include "runtime/execute/process_links.h"

namespace partita::cuda {
namespace {

using execute::PlainCall;
using execute::RunList;
using execute::Work;

/// A kernel's name on a profiler's line, while it is queued.
class Range {
 public:
  /// `activity`: null, or what records it.
  Range(bool on, Activity* activity, const std::string& name) : on_(on), activity_(activity) {
    if (on_) nvtxRangePushA(name.c_str());
    if (activity_ != nullptr) activity_->enter(name);
  }
  ~Range() {
    if (activity_ != nullptr) activity_->leave();
    if (on_) nvtxRangePop();
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  bool on_;
  Activity* activity_;
};

/// A RunList in the GPU's memory: by words, and in units of 16 bytes.
struct KeptTable {
  std::unique_ptr<DeviceBlock> block;
  RunTable table;
};
struct KeptRuns {
  std::array<KeptTable, 2> by;
  bool wide = false;  ///< may go by the second
};

/// A step that is one launch (docs/cuda.md, "CUDA graphs").
struct Captured {
  explicit Captured(const std::function<void()>& make_room) : numbers(kNumbers, make_room) {
    void* p = nullptr;
    check(cudaHostAlloc(&p, kNumbers, cudaHostAllocDefault), "pinned memory");
    pinned.push_back(p);
  }
  ~Captured() {
    forget();
    for (void* p : pinned) static_cast<void>(cudaFreeHost(p));
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;

  /// Its calls, but not its memory, which something may still be at work in.
  void forget() {
    if (launch != nullptr) static_cast<void>(cudaGraphExecDestroy(std::exchange(launch, nullptr)));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(std::exchange(graph, nullptr)));
  }
  /// The next launch's numbers, on the host; where they go.
  std::byte* host() const { return static_cast<std::byte*>(pinned[0]); }
  void* number(std::size_t bytes, std::function<void(std::int64_t, void*)> fill) {
    constexpr std::size_t kGrain = 16;
    const std::size_t at = used;
    used += (bytes + kGrain - 1) / kGrain * kGrain;
    if (used > kNumbers)
      throw MachineError(fmt::format(
          "a step has more than the {} bytes of its own that a CUDA graph has room for; "
          "leave launch.graphs out",
          kNumbers));
    fills.emplace_back(at, std::move(fill));
    return numbers.at + at;
  }

  static constexpr std::size_t kNumbers = 1 << 20;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t launch = nullptr;
  DeviceBlock numbers;
  std::size_t used = 0;
  std::vector<std::pair<std::size_t, std::function<void(std::int64_t, void*)>>> fills;
  std::vector<void*> pinned;                           ///< copies in the graph read them
  std::vector<std::pair<void*, std::size_t>> brought;  ///< by bring(), in its order
  std::vector<std::pair<void*, std::size_t>> later;    ///< as Gpu's
  std::vector<std::unique_ptr<DeviceBlock>> scratch;   ///< that grew meanwhile
};

/// A process's context of a GPU, which it has once and for good.
struct Started {
  std::int64_t context = 0;  ///< what NVML counts more than before it; 0: not known
  std::int64_t left = 0;     ///< free, when there was a context and nothing else
};
/// Starts it, if nobody has, and makes the GPU current. Memory that another process takes
/// meanwhile is taken for the context's.
Started start_context(int device) {
  static std::mutex mutex;
  static std::map<int, Started> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [it, fresh] = known.try_emplace(device);
  if (fresh) {
    char bus[32] = {};
    check(cudaDeviceGetPCIBusId(bus, sizeof bus, device), fmt::format("GPU {}", device));
    const auto library = nvml();
    const auto used = [&] { return library ? library->state(bus).used_bytes : 0; };
    const std::int64_t before = used();
    check(cudaSetDevice(device), fmt::format("GPU {}", device));
    check(cudaFree(nullptr), fmt::format("start of GPU {}", device));
    const std::int64_t after = used();
    if (before > 0 && after > before) it->second.context = after - before;
    std::size_t available = 0, all = 0;
    check(cudaMemGetInfo(&available, &all), "its memory");
    it->second.left = static_cast<std::int64_t>(available);
  }
  check(cudaSetDevice(device), fmt::format("GPU {}", device));
  return it->second;
}

class Gpu : public CudaDevice {
 public:
  explicit Gpu(const DeviceOptions& o) : o_(o) {
    const std::string why = absent();
    if (!why.empty()) throw MachineError(why);
    // An error that somebody has met before is not this one's.
    static_cast<void>(cudaGetLastError());
    if (o.device < 0 || o.device >= device_count())
      throw MachineError(
          fmt::format("there is no GPU {}; this machine has {}", o.device, device_count()));
    started_ = start_context(o.device);
    const std::int64_t before = left();
    libraries_ = std::make_unique<Libraries>(ProductOptions{o.tf32, o.candidates});
    handles_ = std::max<std::int64_t>(0, before - left());
    if (libraries_->attention) handles_ += libraries_->attention->taken_before();
    libraries_->make_room = [this] {
      if (make_room) make_room();
    };
    libraries_->staging = [this](std::size_t bytes) { return staging(bytes); };
    libraries_->come = [this](cudaStream_t s, const std::string& what) { come(s, what); };
    on(kComputeStream);
    void* slots = nullptr;
    check(cudaHostAlloc(&slots, kSlots * sizeof(float), cudaHostAllocDefault), "pinned memory");
    slots_ = static_cast<float*>(slots);
    if (o.linked == DeviceOptions::Linked::nccl)
      links_ = nccl_links(o.links, [this] { return static_cast<void*>(lane_->stream); });
    if (links_)
      links_->before_abort = [this] {
        // NCCL waits for graphs that have its calls before it gives a communicator up.
        leave_capture();
        if (captured_) captured_->forget();
      };
    if (o.linked == DeviceOptions::Linked::in_process)
      in_process_ = execute::process_links(*this, o.links.timeout_s);
    careful_ = std::getenv("PARTITA_CUDA_CHECK") != nullptr;
    o_.ranges |= std::getenv("PARTITA_CUDA_RANGES") != nullptr;
    if (const char* file = std::getenv("PARTITA_CUDA_TRACE")) {
      trace_file_ = o.linked == DeviceOptions::Linked::nccl
                        ? fmt::format("{}.{}", file, static_cast<int>(::getpid()))
                        : file;
      std::string untraced;
      activity_ = start_activity(untraced, false);
      if (!activity_) fmt::print(stderr, "note: no trace of the GPU's kernels: {}\n", untraced);
    }
  }
  ~Gpu() override {
    if (activity_) write_trace();
    leave_capture();
    // Before the communicators whose calls it has.
    captured_.reset();
    links_.reset();
    in_process_.reset();
    // Of a GPU that has failed nothing more is asked.
    static_cast<void>(cudaDeviceSynchronize());
    records_.reset();
    activity_.reset();
    for (auto& [s, lane] : lanes_) static_cast<void>(cudaStreamDestroy(lane.stream));
    for (const cudaEvent_t e : events_) static_cast<void>(cudaEventDestroy(e));
    for (const cudaEvent_t e : marks_) static_cast<void>(cudaEventDestroy(e));
    for (const auto& [p, bytes] : staged_) static_cast<void>(cudaFreeHost(p));
    for (const auto& [bytes, p] : spare_) static_cast<void>(cudaFreeHost(p));
    static_cast<void>(cudaFreeHost(slots_));
  }

  std::string name() const override { return fmt::format("GPU {}", o_.device); }
  CudaMachine& machine() override { return *lane_->machine; }
  int number() const override { return o_.device; }

  std::byte* allocate(std::int64_t bytes) override {
    use();
    void* p = nullptr;
    const std::int64_t before = left();
    const cudaError_t e = cudaMalloc(&p, static_cast<std::size_t>(bytes));
    if (e == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());  // it is known, and not the next call's
      return nullptr;
    }
    check(e, fmt::format("{} bytes", bytes));
    in_blocks_ += before - left();
    return static_cast<std::byte*>(p);
  }
  void release(std::byte* block) override {
    captured_.reset();  // it may have it
    // Also at the end of what has failed: no error is one's own.
    std::size_t before = 0, after = 0, all = 0;
    const bool known = cudaMemGetInfo(&before, &all) == cudaSuccess;
    static_cast<void>(cudaFree(block));
    if (known && cudaMemGetInfo(&after, &all) == cudaSuccess)
      in_blocks_ -= static_cast<std::int64_t>(after) - static_cast<std::int64_t>(before);
  }
  std::int64_t taken() override { return started_.left - left(); }
  std::int64_t taken_by_blocks(std::int64_t asked) override { return std::max(asked, in_blocks_); }
  OutsideMemory outside() override {
    OutsideMemory m;
    m.context = Bytes{started_.context};
    m.libraries = Bytes{handles_};
    for (const auto& [s, lane] : lanes_) m.workspace += Bytes{lane.machine->held()};
    for (const auto* kept : {&libraries_->lists, &libraries_->tables}) {
      for (const auto& [key, block] : *kept)
        if (block) m.workspace += Bytes{static_cast<std::int64_t>(block->bytes)};
    }
    for (const auto& block : libraries_->retired)
      m.workspace += Bytes{static_cast<std::int64_t>(block->bytes)};
    if (captured_) m.workspace += Bytes{static_cast<std::int64_t>(captured_->numbers.bytes)};
    if (links_) links_->add_memory(m);
    return m;
  }
  std::byte* allocate_on_host(std::int64_t bytes) override {
    void* p = nullptr;
    const cudaError_t e = cudaHostAlloc(&p, static_cast<std::size_t>(bytes), cudaHostAllocDefault);
    if (e == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      return nullptr;
    }
    check(e, fmt::format("{} bytes of pinned memory", bytes));
    return static_cast<std::byte*>(p);
  }
  void release_on_host(std::byte* block) override { static_cast<void>(cudaFreeHost(block)); }

  void to_device(std::byte* to, const void* from, std::int64_t bytes) override {
    if (bytes == 0) return;
    const auto n = static_cast<std::size_t>(bytes);
    if (n > kMostStaged && !capturing_) {
      check(cudaMemcpyAsync(to, from, n, cudaMemcpyHostToDevice, stream()), "copy to the GPU");
      come(stream(), "copy to the GPU");
      return;
    }
    void* pinned = staging(n);
    std::memcpy(pinned, from, n);
    check(cudaMemcpyAsync(to, pinned, n, cudaMemcpyHostToDevice, stream()), "copy to the GPU");
  }
  void bring(std::byte* to, const void* from, std::int64_t bytes) override {
    const auto n = static_cast<std::size_t>(bytes);
    if (capturing_) {
      to_device(to, from, bytes);
      captured_->brought.emplace_back(bytes > 0 ? captured_->pinned.back() : nullptr, n);
    } else if (bytes > 0) {
      check(cudaMemcpyAsync(to, from, n, cudaMemcpyHostToDevice, stream()), "copy to the GPU");
    }
  }
  void to_host(void* to, const std::byte* from, std::int64_t bytes) override {
    if (bytes == 0) return;
    // To pageable memory the copy itself waits for the stream, and nobody would look for a peer
    // that is gone.
    if (links_) come(stream(), "what is copied from the GPU");
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost,
                          stream()),
          "copy from the GPU");
    come(stream(), "copy from the GPU");
  }
  void to_host_later(void* to, const std::byte* from, std::int64_t bytes) override {
    if (later_.size() == kSlots) {
      for (auto& [s, lane] : lanes_) come(lane.stream, "the losses so far");
      deliver();
    }
    float* slot = slots_ + later_.size();
    check(cudaMemcpyAsync(slot, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost,
                          stream()),
          "copy of a loss");
    later_.emplace_back(to, static_cast<std::size_t>(bytes));
  }
  void copy(std::byte* to, const std::byte* from, std::int64_t bytes) override {
    if (bytes == 0) return;
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, stream()),
          "copy");
  }
  void stand_in(std::byte* to, const std::byte* from, std::int64_t bytes,
                int multiprocessors) override {
    cuda::stand_in(machine(), to, from, bytes, multiprocessors);
    look("a stand-in");
  }
  void fill(std::byte* to, std::int64_t count, float value) override {
    if (count > 0) cuda::fill(machine(), reinterpret_cast<float*>(to), count, value);
  }
  void draw(std::byte* to, ElementType type, std::int64_t n, float mean, float deviation,
            std::uint64_t seed) override {
    if (n > 0) cuda::draw(machine(), {to, type}, n, mean, deviation, seed);
  }
  void pack(const RunList& list, std::int64_t word, const std::byte* from, std::byte* to) override {
    if (list.runs.size() == 1) {
      const execute::Run& r = list.runs[0];
      copy(to, from + r.offset * word, r.count * word);
    } else if (!list.runs.empty()) {
      move(list, word, from, to, false);
    }
  }
  void unpack(const RunList& list, std::int64_t word, const std::byte* from,
              std::byte* to) override {
    if (list.runs.size() == 1) {
      const execute::Run& r = list.runs[0];
      copy(to + r.offset * word, from, r.count * word);
    } else if (!list.runs.empty()) {
      move(list, word, from, to, true);
    }
  }
  void unpack_add(const RunList& list, ElementType type, const std::byte* from,
                  std::byte* to) override {
    if (!list.runs.empty())
      cuda::unpack_add(machine(), table(list, storage(type, 1).count, false), type, from, to);
  }

  std::unique_ptr<execute::OperatorKernel> kernel(reference::Context context) override;
  void plain(const PlainCall& call) override {
    const std::string what(partita::name(call.instruction->kernel));
    const Range range(o_.ranges, activity_.get(), what);
    const bool done = run_plain_kernel(machine(), call);
    machine().end();
    if (!done) {
      note_fallback(what);
      plain_by_visit(*this, call);
    }
    look(what);
  }

  void on(execute::DeviceStream s) override {
    Lane& lane = lanes_[s];
    if (lane.stream == nullptr) {
      use();
      int least = 0, greatest = 0;
      check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities of streams");
      // What others wait for goes first.
      check(cudaStreamCreateWithPriority(&lane.stream, cudaStreamNonBlocking,
                                         s == kComputeStream ? least : greatest),
            "a stream");
      lane.machine = std::make_unique<CudaMachine>(*libraries_, lane.stream);
      lane_ = &lane;
      if (capturing_) wait(fork_);
    }
    lane_ = &lane;
  }
  Event record() override {
    const auto at = static_cast<std::size_t>(recorded_ - past_);
    check(cudaEventRecord(event(events_, at, cudaEventDisableTiming), stream()), "an event");
    return ++recorded_;
  }
  void wait(Event e) override {
    if (e > past_)
      check(cudaStreamWaitEvent(stream(), events_[static_cast<std::size_t>(e - past_ - 1)], 0),
            "a wait for an event");
  }
  bool reached(Event e) override {
    if (e <= past_) return true;
    if (capturing_) return false;
    const cudaError_t state = cudaEventQuery(events_[static_cast<std::size_t>(e - past_ - 1)]);
    if (state != cudaErrorNotReady) check(state, "a look at an event");
    return state == cudaSuccess;
  }
  void host_waits(Event e) override {
    if (e <= past_) return;
    note_wait("the host waits for the device");
    const cudaEvent_t event = events_[static_cast<std::size_t>(e - past_ - 1)];
    come_to([event] { return cudaEventQuery(event); }, "an event");
  }
  void finish() override {
    use();
    if (capturing_) note_wait("its memory is not enough");  // who asked for more made room
    waited_before_ = std::exchange(waited_, {});
    for (auto& [s, lane] : lanes_) settle(lane.stream, "the end of what was queued");
    past_ = recorded_;
    if (!libraries_->retired.empty()) captured_.reset();  // it may have them
    libraries_->retired.clear();
    deliver();
    for (const auto& [p, bytes] : staged_) spare_.emplace(bytes, p);
    staged_.clear();
  }

  void begin_marks() override {
    marked_ = 0;
    on(kComputeStream);
    mark();
  }
  std::int64_t mark() override {
    check(cudaEventRecord(event(marks_, static_cast<std::size_t>(marked_), cudaEventDefault),
                          stream()),
          "a time");
    return marked_++;
  }
  std::int64_t nanoseconds(std::int64_t mark) override {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, marks_[0], marks_.at(static_cast<std::size_t>(mark))),
          "a time");
    return static_cast<std::int64_t>(static_cast<double>(ms) * 1e6);
  }

  std::string not_captured() override { return waited_before_; }
  void begin_capture() override {
    use();
    captured_.reset();
    captured_ = std::make_unique<Captured>(libraries_->make_room);
    on(kComputeStream);
    // Not the strictest mode: NCCL's own threads call what that forbids.
    check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed), "a graph's begin");
    capturing_ = true;
    libraries_->stepped = [this](std::size_t bytes, std::function<void(std::int64_t, void*)> fill) {
      return captured_->number(bytes, std::move(fill));
    };
    // All streams belong to it, whether they wait for another or not.
    fork_ = record();
    for (auto& [s, lane] : lanes_) {
      if (s == kComputeStream) continue;
      on(s);
      wait(fork_);
    }
    on(kComputeStream);
  }
  void end_capture() override {
    for (auto& [s, lane] : lanes_) {
      if (s == kComputeStream) continue;
      on(s);
      const Event end = record();
      on(kComputeStream);
      wait(end);
    }
    on(kComputeStream);
    libraries_->stepped = nullptr;
    capturing_ = false;
    check(cudaStreamEndCapture(stream(), &captured_->graph), "a graph's end");
    check(cudaGraphInstantiate(&captured_->launch, captured_->graph,
                               cudaGraphInstantiateFlagUseNodePriority),
          "a graph's start");
    // Else the first launch would have that in it.
    check(cudaGraphUpload(captured_->launch, stream()), "a graph's way to the GPU");
    settle(stream(), "a graph's way to the GPU");
    past_ = recorded_;
    captured_->later = std::exchange(later_, {});
    for (auto& block : libraries_->retired) captured_->scratch.push_back(std::move(block));
    libraries_->retired.clear();
  }
  void drop_capture() override {
    leave_capture();
    captured_.reset();
  }
  bool has_capture() const override { return captured_ && captured_->launch != nullptr; }
  void launch_captured(std::int64_t step, const std::vector<const void*>& brought) override {
    Captured& c = *captured_;
    PARTITA_ASSERT(brought.size() == c.brought.size(),
                   fmt::format("{} inputs for {}", brought.size(), c.brought.size()));
    on(kComputeStream);
    for (std::size_t k = 0; k < brought.size(); ++k) {
      if (c.brought[k].second > 0) std::memcpy(c.brought[k].first, brought[k], c.brought[k].second);
    }
    for (const auto& [at, fill] : c.fills) fill(step, c.host() + at);
    if (c.used > 0)
      check(cudaMemcpyAsync(c.numbers.at, c.host(), c.used, cudaMemcpyHostToDevice, stream()),
            "the numbers of a step");
    check(cudaGraphLaunch(c.launch, stream()), "a graph");
    later_ = c.later;
  }

  execute::Links* links() override {
    return links_ ? static_cast<execute::Links*>(links_.get()) : in_process_.get();
  }

  std::string record_kernels(bool on) override {
    if (!on) {
      if (!records_) return {};
      // CUPTI goes, which wants neither a graph nor work on its way.
      leave_capture();
      captured_.reset();
      check(cudaDeviceSynchronize(), "the end of records");
      records_.reset();
      return {};
    }
    if (activity_) return "its kernels are being traced already";
    std::string why;
    records_ = start_activity(why, true);
    return why;
  }
  void belongs_to(std::int64_t tag) override {
    close_tag();
    if (!records_ || tag < 0) return;
    tag_ = tag;
    fallbacks_before_ = fallback_count_;
    records_->enter(std::to_string(tag));
  }
  std::map<std::int64_t, std::int64_t> recorded() override {
    close_tag();
    std::map<std::int64_t, std::int64_t> all;
    if (!records_) return all;
    std::vector<KernelRecord> records = records_->take();
    // Of runs before the tags; their names would be read for nothing.
    std::erase_if(records, [](const KernelRecord& r) { return r.called_for.empty(); });
    for (const auto& [tag, t] : by_caller(records)) {
      std::int64_t number = 0;
      const auto [end, error] = std::from_chars(tag.data(), tag.data() + tag.size(), number);
      if (error != std::errc() || end != tag.data() + tag.size() || of_host_.count(number) > 0)
        continue;
      all[number] = t.last - t.first;
    }
    of_host_.clear();
    return all;
  }

  std::vector<execute::ProductAlgorithm> products() const override {
    std::vector<execute::ProductAlgorithm> all;
    for (const auto& [key, c] : libraries_->products)
      all.push_back({key.m, key.n, key.k, key.batch,
                     std::string(key.a_transposed ? "T" : "N") + (key.b_transposed ? "T" : "N"),
                     key.type, c.id, c.candidates, c.taken, c.seconds, key.sum, key.adds,
                     c.seconds_of_usual});
    return all;
  }
  std::string found_best() override {
    use();
    on(kComputeStream);
    const ProductChoices timed = machine().time_open_products();
    return told(fmt::format("{} of {}", cublasLtGetVersion(), gpu_name(o_.device)), timed);
  }
  std::string common(const std::vector<std::string>& of_ranks) override {
    return cuda::common(of_ranks);
  }
  void take_common(const std::string& best) override {
    libraries_->agreed = agreed_choices(best);
    libraries_->agree = true;
    for (auto& [key, choice] : libraries_->products) {
      if (const ProductChoice* c = libraries_->agreed_on(key)) choice = *c;
    }
  }
  /// In a careful run: has what is queued so far failed?
  void look(const std::string& what) {
    if (careful_ && !capturing_) check(cudaStreamSynchronize(stream()), what);
  }
  bool ranges() const { return o_.ranges || activity_; }
  bool marked_ranges() const { return o_.ranges; }
  Activity* activity() const { return activity_.get(); }
  void note_fallback(const std::string& kernel) {
    ++fallback_count_;
    note_wait(kernel + " is the host's");
    count_fallback(kernel);
  }

 private:
  struct Lane {
    cudaStream_t stream = nullptr;
    std::unique_ptr<CudaMachine> machine;
  };
  static constexpr std::size_t kSlots = 1024, kMostStaged = 4 << 20;

  std::int64_t left() const {
    std::size_t available = 0, all = 0;
    check(cudaMemGetInfo(&available, &all), "its memory");
    return static_cast<std::int64_t>(available);
  }
  void close_tag() {
    if (tag_ < 0) return;
    if (records_) records_->leave();
    if (fallback_count_ != fallbacks_before_) of_host_.insert(tag_);
    tag_ = -1;
  }
  /// The trace of one rank, whole at its end; several devices of one process follow each other.
  void write_trace() {
    static_cast<void>(cudaDeviceSynchronize());
    const std::vector<KernelRecord> records = activity_->take();
    std::ofstream out(trace_file_, std::ios::binary);
    out << chrome_trace(records);
    if (!out.flush())
      fmt::print(stderr, "note: cannot write {}: no trace of the GPU's kernels\n", trace_file_);
  }
  void use() const { check(cudaSetDevice(o_.device), fmt::format("GPU {}", o_.device)); }
  cudaStream_t stream() const { return lane_->stream; }
  /// Waits until the query says that it is done. A stream that waits for a peer who is gone would
  /// never be: then its communicators are given up, so that it ends.
  template <class Query>
  void come_to(Query query, const std::string& what) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t e = query();
      if (e == cudaSuccess) return;
      if (e != cudaErrorNotReady) check(e, what);
      if (!links_) {
        std::this_thread::yield();
        continue;
      }
      links_->poll();
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (waited.count() > links_->timeout_s()) {
        links_->abort();
        throw PeerError(
            fmt::format("{} did not come within {:g} s: another rank is gone or hangs "
                        "(CUDA_MODULE_LOADING=EAGER if it does at its first steps)",
                        what, waited.count()));
      }
      if (waited.count() > 1e-3) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
  /// A capture that does not come to its end.
  void leave_capture() {
    if (!std::exchange(capturing_, false)) return;
    libraries_->stepped = nullptr;
    cudaGraph_t graph = nullptr;
    static_cast<void>(cudaStreamEndCapture(lanes_.at(kComputeStream).stream, &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    static_cast<void>(cudaGetLastError());
    past_ = recorded_;
    later_.clear();
  }
  /// The host takes part in this step.
  void note_wait(const std::string& why) {
    if (waited_.empty()) waited_ = why;
    if (capturing_)
      throw MachineError(
          fmt::format("a step that is captured cannot go on: {}; leave launch.graphs "
                      "out",
                      why));
  }
  void come(cudaStream_t s, const std::string& what) {
    note_wait("the host waits for " + what);
    settle(s, what);
  }
  void settle(cudaStream_t s, const std::string& what) {
    if (!links_) return check(cudaStreamSynchronize(s), what);
    come_to([s] { return cudaStreamQuery(s); }, what);
  }
  static cudaEvent_t event(std::vector<cudaEvent_t>& all, std::size_t at, unsigned flags) {
    while (all.size() <= at) {
      cudaEvent_t e = nullptr;
      check(cudaEventCreateWithFlags(&e, flags), "an event");
      all.push_back(e);
    }
    return all[at];
  }
  /// Pinned memory until finish(), or as long as a graph that copies it.
  void* staging(std::size_t bytes) {
    if (capturing_) {
      void* p = nullptr;
      check(cudaHostAlloc(&p, bytes, cudaHostAllocDefault), fmt::format("{} pinned bytes", bytes));
      captured_->pinned.push_back(p);
      return p;
    }
    auto known = spare_.lower_bound(bytes);
    if (known != spare_.end() && known->first <= 2 * bytes + 4096) {
      void* p = known->second;
      staged_.emplace_back(p, known->first);
      spare_.erase(known);
      return p;
    }
    void* p = nullptr;
    check(cudaHostAlloc(&p, bytes, cudaHostAllocDefault), fmt::format("{} pinned bytes", bytes));
    staged_.emplace_back(p, bytes);
    return p;
  }
  void deliver() {
    for (std::size_t i = 0; i < later_.size(); ++i)
      std::memcpy(later_[i].first, slots_ + i, later_[i].second);
    later_.clear();
  }
  void move(const RunList& list, std::int64_t word, const std::byte* from, std::byte* to,
            bool unpacks) {
    constexpr std::int64_t kWide = 16;
    const bool aligned = reinterpret_cast<std::uintptr_t>(from) % kWide == 0 &&
                         reinterpret_cast<std::uintptr_t>(to) % kWide == 0;
    if (list.passing) {
      const bool wide = aligned && whole(list.runs, kWide / word);
      const RunNumbers n = numbers_of(list.runs, wide ? kWide / word : 1);
      cuda::move(machine(), n.at(machine().upload(n.numbers).list), wide ? kWide : word, from, to,
                 unpacks);
      machine().end();
      return;
    }
    const bool wide = aligned && kept(list, word).wide;
    cuda::move(machine(), table(list, word, wide), wide ? kWide : word, from, to, unpacks);
  }
  static KeptRuns& kept(const RunList& list, std::int64_t word) {
    if (!list.kept) {
      auto kept = std::make_shared<KeptRuns>();
      kept->wide = whole(list.runs, 16 / word);
      list.kept = std::move(kept);
    }
    return *static_cast<KeptRuns*>(list.kept.get());
  }
  /// By words, or in units of 16 bytes.
  const RunTable& table(const RunList& list, std::int64_t word, bool wide) {
    auto& [block, table] = kept(list, word).by[wide ? 1 : 0];
    if (!block) {
      const RunNumbers n = numbers_of(list.runs, wide ? 16 / word : 1);
      const std::size_t bytes = n.numbers.size() * sizeof(std::int64_t);
      block = std::make_unique<DeviceBlock>(bytes, libraries_->make_room);
      check(copy_now(block->at, n.numbers.data(), bytes), "a list of runs");
      table = n.at(block->at);
    }
    return table;
  }

  DeviceOptions o_;
  std::unique_ptr<Libraries> libraries_;
  std::unique_ptr<NcclLinks> links_;
  std::unique_ptr<execute::Links> in_process_;
  std::map<execute::DeviceStream, Lane> lanes_;
  Lane* lane_ = nullptr;
  std::vector<cudaEvent_t> events_, marks_;
  Event recorded_ = 0, past_ = 0;
  std::int64_t marked_ = 0;
  float* slots_ = nullptr;
  std::vector<std::pair<void*, std::size_t>> later_;
  std::vector<std::pair<void*, std::size_t>> staged_;
  std::multimap<std::size_t, void*> spare_;
  bool careful_ = false;
  std::unique_ptr<Captured> captured_;
  bool capturing_ = false;
  Event fork_ = 0;  ///< where the streams of what is captured begin
  /// Why this step, and the one before, could not be captured: the first reason.
  std::string waited_, waited_before_;
  std::unique_ptr<Activity> activity_;
  std::unique_ptr<Activity> records_;  ///< of a run's own kernels, by tag
  std::int64_t tag_ = -1, fallback_count_ = 0, fallbacks_before_ = 0;
  std::set<std::int64_t> of_host_;  ///< tags of which the host has computed a part
  std::string trace_file_;
  Started started_;
  std::int64_t in_blocks_ = 0;  ///< bytes that went with its blocks
  std::int64_t handles_ = 0;    ///< bytes that went when the libraries started
};

/// Ours where we have one, else the host's.
class GpuKernel : public execute::OperatorKernel {
 public:
  GpuKernel(Gpu& gpu, reference::Context context)
      : gpu_(gpu), context_(std::move(context)), host_(visiting_kernel(gpu, context_)) {}
  const reference::Context& context() const override { return context_; }
  void set_step(std::int64_t step, std::int64_t first_sample) override {
    context_.step = step;
    context_.first_sample = first_sample;
    host_->set_step(step, first_sample);
  }
  void run(Work work, std::size_t statistic, const cpu::Arguments& a) override {
    const auto what = [&] {
      return fmt::format("{} of {}", name(work), kind_name(*context_.operation));
    };
    const Range range(gpu_.marked_ranges(), gpu_.activity(),
                      gpu_.ranges() ? what() : std::string());
    routed.clear();
    const bool done = run_operator(gpu_.machine(), work, context_, statistic, a);
    gpu_.machine().end();
    if (!done) {
      gpu_.note_fallback(what());
      host_->run(work, statistic, a);
      routed = std::move(host_->routed);
    }
    gpu_.look(what());
  }
  bool makes_statistics() const override { return cuda::makes_statistics(context_); }

 private:
  Gpu& gpu_;
  reference::Context context_;
  std::unique_ptr<execute::OperatorKernel> host_;
};

std::unique_ptr<execute::OperatorKernel> Gpu::kernel(reference::Context context) {
  return std::make_unique<GpuKernel>(*this, std::move(context));
}

std::string version(int v) { return fmt::format("{}.{}", v / 1000, v / 10 % 100); }

}  // namespace

std::string absent() {
  // Each message has a stream of its own; more than 8 would share queues, where one that waits for
  // a peer holds up what stands behind it. Before CUDA's start; a user's own word counts.
  static const int once = ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  static_cast<void>(once);
  int n = 0;
  const cudaError_t e = cudaGetDeviceCount(&n);
  if (e == cudaSuccess && n > 0) return "";
  static_cast<void>(cudaGetLastError());
  return fmt::format(
      "this machine has no GPU that CUDA {} can use ({}); run on one that has, or "
      "use --backend cpu",
      version(CUDART_VERSION), e == cudaSuccess ? "none found" : cudaGetErrorString(e));
}

int device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  static_cast<void>(cudaGetLastError());
  return 0;
}

std::string gpu_name(int device) {
  cudaDeviceProp p = {};
  check(cudaGetDeviceProperties(&p, device), fmt::format("GPU {}", device));
  return p.name;
}

Facts facts(int device) {
  Facts f;
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "the runtime's version");
  f.driver = version(driver);
  f.runtime = version(runtime);
  const std::size_t blas = cublasLtGetVersion();
  f.blas = fmt::format("{}.{}.{}", blas / 10000, blas / 100 % 100, blas % 100);
  f.dnn = cudnn_version();
  f.nccl = nccl_version();
  if (device < 0) return f;
  cudaDeviceProp p = {};
  check(cudaGetDeviceProperties(&p, device), fmt::format("GPU {}", device));
  char bus[32] = {};
  check(cudaDeviceGetPCIBusId(bus, sizeof bus, device), fmt::format("GPU {}", device));
  f.name = p.name;
  f.bus_id = bus;
  f.compute_capability = 10 * p.major + p.minor;
  f.multiprocessors = p.multiProcessorCount;
  start_context(device);
  std::size_t available = 0, all = 0;
  check(cudaMemGetInfo(&available, &all), "its memory");
  f.memory_bytes = static_cast<std::int64_t>(all);
  f.free_bytes = static_cast<std::int64_t>(available);
  return f;
}

std::unique_ptr<CudaDevice> cuda_device(const DeviceOptions& options) {
  return std::make_unique<Gpu>(options);
}

}  // namespace partita::cuda
