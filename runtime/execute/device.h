// runtime/execute/device.h: where a rank's tensors lie, and who computes on them (docs/cuda.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/cpu/kernels.h"
#include "runtime/execute/pieces.h"
#include "runtime/transport/transport.h"
#include "simulator/program/measurement.h"
#include "simulator/program/program.h"

namespace partita::execute {

/// What is packed and unpacked, with what a device keeps of it for the next time.
struct RunList {
  std::vector<Run> runs;
  bool passing = false;  ///< of one call: nothing is kept of it
  mutable std::shared_ptr<void> kept;
  RunList() = default;
  RunList(std::vector<Run> list) : runs(std::move(list)) {}  // NOLINT: implicit by design
};

/// A kernel of an operator: the passes of cpu::Kernel by number.
enum class Work : std::uint8_t {
  forward_statistic,
  forward,
  backward_statistic,
  backward_data,
  backward_weight,
  attend_part,
  attend_part_backward
};
std::string_view name(Work w);

/// An operator on one rank's device; the contract is cpu::Kernel's, the operands lie in the
/// device's memory, in fp32, bf16 or fp16. Queued on the device's current stream.
class OperatorKernel {
 public:
  virtual ~OperatorKernel() = default;
  virtual const reference::Context& context() const = 0;
  virtual void set_step(std::int64_t step, std::int64_t first_sample) = 0;
  /// `statistic`: which one, of the first and third kind of work.
  virtual void run(Work work, std::size_t statistic, const cpu::Arguments& a) = 0;
  /// Takes Arguments::own_statistics, in the forward and the backward by data.
  virtual bool makes_statistics() const { return false; }
  /// Set where results are rows, in the host's memory: taken by the caller.
  std::vector<cpu::RoutedResult> routed;
};

/// What a library computed products of one kind by.
struct ProductAlgorithm {
  std::int64_t m = 0, n = 0, k = 0, batch = 1;
  std::string transposed;  ///< "NN", "NT", "TN"; of a and b
  ElementType type = ElementType::fp32;
  int algorithm = -1;             ///< the library's number
  int candidates = 0, taken = 0;  ///< how many were timed, which it was of those the library named
  double seconds = 0;             ///< as timed; 0: not
  ElementType out = ElementType::fp32;
  bool adds = false;            ///< to what is there
  double seconds_of_usual = 0;  ///< of the fastest of those that are timed unless told otherwise
};

/// A kernel of plain buffers (Kernel::zero and after), as a device takes it.
struct PlainCall {
  struct Operand {
    std::byte* data = nullptr;
    std::int64_t elements = 0, bytes = 0;
    const Box* box = nullptr;
    bool host = false;                     ///< in the host's memory, whatever the device
    ElementType type = ElementType::fp32;  ///< fp32, too, for words that are no numbers
    float* values() const { return reinterpret_cast<float*>(data); }
  };
  const Program* program = nullptr;
  const Instruction* instruction = nullptr;
  std::int64_t step = 0;
  Optimizer optimizer;  ///< the program's, but for a rate of 0 where nothing is to be learnt
  /// By the instruction's lists; `outputs` and `extras` (a master copy) are read and written.
  std::vector<Operand> reads, outputs, statistics, extras, writes;
};
/// All operands where the host can follow them.
void plain_on_host(const PlainCall& call);

/// What one update of Adam multiplies by, rounded once for all elements.
struct AdamStep {
  float beta1, beta2, keep, rate, scale, epsilon;
};
/// After `updates` earlier ones.
AdamStep adam_step(const Optimizer& o, std::int64_t updates);

/// Ranks that call together; a lane has its own order of calls. Two calls of one channel come in
/// the same order on all its members, of two channels in any.
struct Channel {
  std::vector<int> group;  ///< ascending
  int lane = 0;
  friend auto operator<=>(const Channel&, const Channel&) = default;
};
/// A device's streams: the program's, and one for each message, whose sends and receives may come
/// in different orders on both sides.
using DeviceStream = int;
DeviceStream stream_of(const Instruction& i);
bool is_message(const Channel& channel);
/// Of a message: each has a channel of its own, in which its micro-batches follow each other.
Channel channel_of(const Instruction& message, int rank, int peer);
/// Every channel that some rank of the program needs, in an order that all ranks agree on.
std::vector<Channel> channels_of(const Program& program);

/// Moves what lies in the memory of the ranks' devices, without the host. Calls are queued on the
/// device's current stream. PeerError when a peer is gone.
class Links {
 public:
  virtual ~Links() = default;
  virtual std::string name() const = 0;
  /// All ranks at once, before meet(). Why this rank cannot, where it may do without links: then
  /// all ranks leave them.
  virtual std::string open(Transport&) { return {}; }
  virtual void leave() {}
  /// All ranks at once, before the first call.
  virtual void meet(Transport& control, const std::vector<Channel>& channels) = 0;
  /// `call.data` and `call.send` lie on the device.
  virtual void collective(const Channel& channel, const CollectiveCall& call) = 0;
  /// Its own model of collectives of all ranks, none of which is carried out; of all ranks at once.
  virtual std::vector<LinkEstimate> estimates() { return {}; }
  virtual void send(const Channel& channel, int to, const std::byte* from, std::int64_t bytes) = 0;
  virtual void receive(const Channel& channel, int from, std::byte* to, std::int64_t bytes) = 0;

  /// Adds what its communicators have of the device's memory.
  virtual void add_memory(OutsideMemory&) const {}

  const Traffic& traffic() const { return traffic_; }
  void reset_traffic() { traffic_ = {}; }

 protected:
  Traffic traffic_;
};

/// One rank's device. Whatever it does is queued on its current stream, in order; streams meet in
/// events. Addresses of its memory allow arithmetic, and are followed by nobody else. All calls
/// throw MachineError when the device gives out.
class Device {
 public:
  using Event = std::int64_t;

  virtual ~Device() = default;
  virtual std::string name() const = 0;
  /// Its memory is the host's and everything is done at once: no copies, streams and events.
  virtual bool is_host() const { return false; }

  /// Set by whoever keeps blocks of its memory that nobody uses: gives them back.
  std::function<void()> make_room;
  /// nullptr where there is no more. Aligned to 64 bytes at least.
  virtual std::byte* allocate(std::int64_t bytes) = 0;
  /// Nothing that is queued uses it any more.
  virtual void release(std::byte* block) = 0;
  /// From here on, or no longer, it writes down what runs on it and for how long. Why not, in
  /// words; empty: it does.
  virtual std::string record_kernels(bool on) { return on ? "this device keeps no records" : ""; }
  /// What is queued from here on belongs to `tag`; -1: to none.
  virtual void belongs_to(std::int64_t) {}
  /// By tag: nanoseconds of what was recorded, without tags of which the host has computed a part.
  /// After finish(); given once.
  virtual std::map<std::int64_t, std::int64_t> recorded() { return {}; }
  /// Bytes of its memory that are taken since its start: blocks, and what libraries, communicators
  /// and kernels work in. 0: not known.
  virtual std::int64_t taken() { return 0; }
  /// What of it blocks of `asked` bytes in all have, with what each is rounded up to.
  virtual std::int64_t taken_by_blocks(std::int64_t asked) { return asked; }
  /// What of it is known to be no block's, but for kernels; and the context before.
  virtual OutsideMemory outside() { return {}; }
  /// The host's, for what is copied often: pinned.
  virtual std::byte* allocate_on_host(std::int64_t bytes);
  virtual void release_on_host(std::byte* block);

  /// From the host; what is copied may be changed at once.
  virtual void to_device(std::byte* to, const void* from, std::int64_t bytes) = 0;
  /// The same of what another step would have other values of; from memory of allocate_on_host that
  /// stays as it is until finish().
  virtual void bring(std::byte* to, const void* from, std::int64_t bytes) {
    to_device(to, from, bytes);
  }
  /// To the host; waits until it is there.
  virtual void to_host(void* to, const std::byte* from, std::int64_t bytes) = 0;
  /// The same of at most 4 bytes without waiting: there after finish().
  virtual void to_host_later(void* to, const std::byte* from, std::int64_t bytes) = 0;
  /// Either may be of allocate_on_host.
  virtual void copy(std::byte* to, const std::byte* from, std::int64_t bytes) = 0;
  /// A copy that stands in for a transfer: by a kernel that keeps so many multiprocessors, each of
  /// which moves kStandInRate; without multiprocessors a copy.
  virtual void stand_in(std::byte* to, const std::byte* from, std::int64_t bytes,
                        int multiprocessors);
  virtual void fill(std::byte* to, std::int64_t count, float value) = 0;
  /// Normal numbers of `type`, counter-based.
  virtual void draw(std::byte* to, ElementType type, std::int64_t n, float mean, float deviation,
                    std::uint64_t seed);
  /// Runs of `word` bytes, one after the other, and back.
  virtual void pack(const RunList& runs, std::int64_t word, const std::byte* from,
                    std::byte* to) = 0;
  virtual void unpack(const RunList& runs, std::int64_t word, const std::byte* from,
                      std::byte* to) = 0;
  /// Adds numbers of `type`, rounded to it.
  virtual void unpack_add(const RunList& runs, ElementType type, const std::byte* from,
                          std::byte* to) = 0;

  virtual std::unique_ptr<OperatorKernel> kernel(reference::Context context) = 0;
  virtual void plain(const PlainCall& call) = 0;

  /// What follows is queued on that stream.
  virtual void on(DeviceStream) {}
  /// Everything queued on the current stream so far.
  virtual Event record() { return 0; }
  /// What follows on the current stream waits for it.
  virtual void wait(Event) {}
  /// Is it past?
  virtual bool reached(Event) { return true; }
  /// The host waits for it.
  virtual void host_waits(Event) {}
  /// The host waits for all that is queued; events before are past.
  virtual void finish() {}

  /// Why what was queued between the last two calls of finish() could not be captured, in words;
  /// empty: it could (docs/cuda.md, "CUDA graphs").
  virtual std::string not_captured() { return name() + " has no graphs"; }
  /// After finish(): what is queued from here to end_capture(), on whatever stream, is not done but
  /// kept, once; what was kept before is forgotten.
  virtual void begin_capture() {}
  virtual void end_capture() {}
  /// Ends a capture on its way, and forgets what is kept.
  virtual void drop_capture() {}
  /// False where nothing is kept, or memory of it was given back.
  virtual bool has_capture() const { return false; }
  /// After finish(): queues what is kept, as that step, with what bring() brings by now, in its
  /// order.
  virtual void launch_captured(std::int64_t /*step*/, const std::vector<const void*>& /*brought*/) {
  }

  /// Nanoseconds of the time that it keeps instead of this machine's, as tests' devices do; -1:
  /// none.
  virtual std::int64_t own_time() const { return -1; }

  /// To the other ranks' devices; null: the transport moves copies on the host.
  virtual Links* links() { return nullptr; }

  /// Measured times: marks are set on the current stream; mark 0 by begin_marks().
  virtual void begin_marks() {}
  virtual std::int64_t mark() { return 0; }
  /// Between mark 0 and this one, after finish().
  virtual std::int64_t nanoseconds(std::int64_t) { return 0; }

  virtual std::vector<ProductAlgorithm> products() const { return {}; }

  /// Where it tries several ways to do one thing and ranks must do it alike: what was best here of
  /// what has been done since its start. After finish(). Empty: all is done in the only way.
  virtual std::string found_best() { return {}; }
  /// What all ranks, who found that best, take.
  virtual std::string common(const std::vector<std::string>& /*of_ranks*/) { return {}; }
  virtual void take_common(const std::string& /*best*/) {}

  /// Kernels that were the host's, by name: calls.
  const std::map<std::string, std::int64_t>& fallbacks() const { return fallbacks_; }

 protected:
  void count_fallback(const std::string& kernel) { ++fallbacks_[kernel]; }

 private:
  std::map<std::string, std::int64_t> fallbacks_;
};

/// The host itself: the kernels of runtime/cpu.
std::unique_ptr<Device> host_device();

/// Device memory where the host can follow addresses: itself on the host, else copies, one for each
/// address, so that what is one buffer stays one.
class Visits {
 public:
  explicit Visits(Device& device) : device_(device) {}
  /// `written`: give_back() brings it to the device.
  std::byte* host(std::byte* at, std::int64_t bytes, bool written);
  /// n numbers of `type` as fp32: copies where they are stored in another. `here`: they are the
  /// host's, whatever the device.
  float* floats(std::byte* at, ElementType type, std::int64_t n, bool written, bool here = false);
  void give_back();

 private:
  struct Copy {
    std::vector<std::byte> room;
    std::byte* at = nullptr;  ///< aligned as the original: kernels round alike
    std::int64_t bytes = 0;
    bool written = false;
  };
  struct Wide {
    std::vector<std::byte> room;
    std::byte* at = nullptr;
    ElementType type = ElementType::fp32;
    std::int64_t count = 0;
    bool written = false;
  };
  Device& device_;
  std::map<std::byte*, Copy> copies_;
  std::map<std::byte*, Wide> wide_;
};

/// The same kernels by the host's, on copies: what a device does with those it has not.
std::unique_ptr<OperatorKernel> visiting_kernel(Device& device, reference::Context context);
void plain_by_visit(Device& device, const PlainCall& call);

/// Streams meet through memory: an instruction waits for whoever wrote what it reads, and used what
/// it writes, on another stream. Known by the address of a block, so that memory which goes to
/// another buffer is waited for, too.
class Order {
 public:
  explicit Order(Device& device) : device_(device) {}
  /// An instruction on `stream`; `after_compute`: not before the compute stream gets here.
  void begin(DeviceStream stream, bool after_compute);
  void read(const std::byte* block);
  void write(const std::byte* block);
  void end();
  /// After Device::finish(): nobody needs to wait for what was before.
  void forget();

 private:
  struct Use {
    DeviceStream stream = 0;
    Device::Event event = 0;
  };
  struct Block {
    std::vector<Use> writer;  ///< at most one
    std::vector<Use> readers;
  };
  void wait(const std::vector<Use>& uses);
  Device& device_;
  DeviceStream stream_ = kComputeStream;
  std::map<const std::byte*, Block> blocks_;
  std::vector<const std::byte*> reads_, writes_;
};

}  // namespace partita::execute
