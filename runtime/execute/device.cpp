#include "runtime/execute/device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <set>

#include "base/error.h"
#include "runtime/transport/narrow.h"

namespace partita::execute {
namespace {

constexpr std::size_t kGrain = 64;

/// Aligned as `like`: kernels round alike.
std::byte* aligned(std::vector<std::byte>& room, std::int64_t bytes, const std::byte* like) {
  room.resize(static_cast<std::size_t>(bytes) + 2 * kGrain);
  const auto place = [](const std::byte* p) {
    return reinterpret_cast<std::uintptr_t>(p) % kGrain;
  };
  return room.data() + (kGrain + place(like) - place(room.data())) % kGrain;
}

bool any_narrow(const cpu::Arguments& a) {
  for (const auto* list :
       {&a.inputs, &a.parameters, &a.outputs, &a.output_gradients, &a.extras, &a.results}) {
    for (const cpu::Tensor& t : *list) {
      if (t && t.type != ElementType::fp32) return true;
    }
  }
  return false;
}

/// fp32, where the host can follow it.
class HostKernel {
 public:
  explicit HostKernel(reference::Context context) : kernel_(std::move(context)) {}
  const reference::Context& context() const { return kernel_.context(); }
  void set_step(std::int64_t step, std::int64_t first_sample) {
    kernel_.set_step(step, first_sample);
  }
  void run(Work work, std::size_t statistic, const cpu::Arguments& a) {
    kernel_.routed.clear();
    switch (work) {
      case Work::forward_statistic:
        kernel_.forward_statistic(statistic, a);
        break;
      case Work::forward:
        kernel_.forward(a);
        break;
      case Work::backward_statistic:
        kernel_.backward_statistic(statistic, a);
        break;
      case Work::backward_data:
        kernel_.backward_data(a);
        break;
      case Work::backward_weight:
        kernel_.backward_weight(a);
        break;
      case Work::attend_part:
        kernel_.attend_part(a);
        break;
      case Work::attend_part_backward:
        kernel_.attend_part_backward(a);
        break;
    }
    routed = std::move(kernel_.routed);
    kernel_.routed.clear();
  }
  std::vector<cpu::RoutedResult> routed;

 private:
  cpu::Kernel kernel_;
};

class HostDevice : public Device {
 public:
  std::string name() const override { return "cpu"; }
  bool is_host() const override { return true; }
  std::byte* allocate(std::int64_t bytes) override { return allocate_on_host(bytes); }
  void release(std::byte* block) override { release_on_host(block); }
  void to_device(std::byte* to, const void* from, std::int64_t bytes) override {
    move(to, from, bytes);
  }
  void to_host(void* to, const std::byte* from, std::int64_t bytes) override {
    move(to, from, bytes);
  }
  void to_host_later(void* to, const std::byte* from, std::int64_t bytes) override {
    move(to, from, bytes);
  }
  void copy(std::byte* to, const std::byte* from, std::int64_t bytes) override {
    move(to, from, bytes);
  }
  void fill(std::byte* to, std::int64_t count, float value) override {
    std::fill_n(reinterpret_cast<float*>(to), count, value);
  }
  void pack(const RunList& list, std::int64_t word, const std::byte* from, std::byte* to) override {
    for (const Run& r : list.runs) {
      std::memcpy(to, from + r.offset * word, static_cast<std::size_t>(r.count * word));
      to += r.count * word;
    }
  }
  void unpack(const RunList& list, std::int64_t word, const std::byte* from,
              std::byte* to) override {
    for (const Run& r : list.runs) {
      std::memcpy(to + r.offset * word, from, static_cast<std::size_t>(r.count * word));
      from += r.count * word;
    }
  }
  void unpack_add(const RunList& list, ElementType type, const std::byte* from,
                  std::byte* to) override {
    const std::int64_t word = storage(type, 1).count;
    for (const Run& r : list.runs) {
      add_numbers(type, to + r.offset * word, from, r.count);
      from += r.count * word;
    }
  }
  std::unique_ptr<OperatorKernel> kernel(reference::Context context) override;
  void plain(const PlainCall& call) override { plain_on_host(call); }

 private:
  static void move(void* to, const void* from, std::int64_t bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
};

/// The operands of an operator where the host can follow them.
class OperandVisits {
 public:
  explicit OperandVisits(Device& device) : visits_(device) {}
  std::vector<cpu::Tensor> tensors(const std::vector<cpu::Tensor>& list, bool written) {
    std::vector<cpu::Tensor> all = list;
    for (cpu::Tensor& t : all) {
      if (!t) continue;
      const std::int64_t n = t.size();
      if (t.values != nullptr)
        t.values = visits_.floats(reinterpret_cast<std::byte*>(t.values), t.type, n, written);
      t.type = ElementType::fp32;
      if (t.ids != nullptr) {
        auto* at = reinterpret_cast<std::byte*>(const_cast<std::int64_t*>(t.ids));
        t.ids = reinterpret_cast<const std::int64_t*>(visits_.host(at, n * 8, false));
      }
      // Of masks the host's kernels keep nothing.
      t.bytes = nullptr;
    }
    return all;
  }
  /// The operand becomes a copy, rounded to the type in which the product is computed.
  void round(const reference::Context& c, bool gradient, cpu::Tensor& t) {
    if (!t || t.values == nullptr) return;
    auto& copy = rounded_.emplace_back(t.values, t.values + t.size());
    std::vector<double> exact(copy.begin(), copy.end());
    reference::round_operand(c, gradient, t.rows, t.rows != nullptr ? 0 : (*t.index)[0].size(),
                             exact);
    for (std::size_t i = 0; i < copy.size(); ++i) copy[i] = static_cast<float>(exact[i]);
    t.values = copy.data();
  }
  void give_back() { visits_.give_back(); }

 private:
  Visits visits_;
  std::deque<std::vector<float>> rounded_;
};

class VisitingKernel : public OperatorKernel {
 public:
  VisitingKernel(Device& device, reference::Context context)
      : device_(device), kernel_(std::move(context)) {}
  const reference::Context& context() const override { return kernel_.context(); }
  void set_step(std::int64_t step, std::int64_t first_sample) override {
    kernel_.set_step(step, first_sample);
  }
  void run(Work work, std::size_t statistic, const cpu::Arguments& a) override {
    PARTITA_ASSERT(!a.own_statistics, "the host's kernels are given their statistics");
    const ElementType compute = context().compute;
    if (device_.is_host() && !any_narrow(a) && compute == ElementType::fp32) {
      kernel_.run(work, statistic, a);
      routed = std::move(kernel_.routed);
      return;
    }
    OperandVisits visits(device_);
    cpu::Arguments h;
    const bool extras = work == Work::forward || work == Work::attend_part;
    h.inputs = visits.tensors(a.inputs, false);
    h.parameters = visits.tensors(a.parameters, false);
    h.outputs = visits.tensors(a.outputs, false);
    h.output_gradients = visits.tensors(a.output_gradients, false);
    h.statistics = visits.tensors(a.statistics, false);
    h.backward_statistics = visits.tensors(a.backward_statistics, false);
    h.extras = visits.tensors(a.extras, extras);
    h.results = visits.tensors(a.results, true);
    h.accumulate = a.accumulate;
    h.whole_statistics = a.whole_statistics;
    if (compute != ElementType::fp32) {
      // A bias's gradient is the sum of what nobody has rounded; a bias is only added.
      if (work == Work::backward_weight && h.results.size() > 1) {
        cpu::Arguments sums = h;
        sums.results[0] = {};
        kernel_.run(work, statistic, sums);
        h.results.resize(1);
      }
      for (cpu::Tensor& t : h.inputs) visits.round(context(), false, t);
      if (!h.parameters.empty()) visits.round(context(), false, h.parameters[0]);
      for (cpu::Tensor& t : h.output_gradients) visits.round(context(), true, t);
    }
    kernel_.run(work, statistic, h);
    routed = std::move(kernel_.routed);
    visits.give_back();
  }

 private:
  Device& device_;
  HostKernel kernel_;
};

/// The host's own: its device has no state.
class OwnKernel : public VisitingKernel {
 public:
  explicit OwnKernel(reference::Context context) : VisitingKernel(host_, std::move(context)) {}

 private:
  HostDevice host_;
};
std::unique_ptr<OperatorKernel> HostDevice::kernel(reference::Context context) {
  return std::make_unique<OwnKernel>(std::move(context));
}

}  // namespace

std::string_view name(Work w) {
  switch (w) {
    case Work::forward_statistic:
      return "forward_statistic";
    case Work::forward:
      return "forward";
    case Work::backward_statistic:
      return "backward_statistic";
    case Work::backward_data:
      return "backward_data";
    case Work::backward_weight:
      return "backward_weight";
    case Work::attend_part:
      return "attend_part";
    case Work::attend_part_backward:
      return "attend_part_backward";
  }
  return "";
}

std::byte* Device::allocate_on_host(std::int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) + kGrain - 1) / kGrain * kGrain;
  return static_cast<std::byte*>(std::aligned_alloc(kGrain, rounded));
}
void Device::release_on_host(std::byte* block) { std::free(block); }
void Device::draw(std::byte* to, ElementType type, std::int64_t n, float mean, float deviation,
                  std::uint64_t seed) {
  Visits visits(*this);
  float* v = visits.floats(to, type, n, true);
  for (std::int64_t k = 0; k < n; ++k)
    v[k] = mean + deviation *
                      static_cast<float>(reference::normal(seed, 0, static_cast<std::uint64_t>(k)));
  visits.give_back();
}

std::vector<Channel> channels_of(const Program& p) {
  std::set<Channel> all;
  for (int stage = 0; stage < p.stage_count(); ++stage) {
    std::set<BlockId> blocks;
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)])
      blocks.insert(call.block);
    for (std::int64_t rank = 0; rank < p.ranks(); ++rank) {
      if (p.stage_of(rank) != stage) continue;
      for (const BlockId block : blocks) {
        for (const Instruction& i : p.blocks[block.index()].instructions) {
          Channel c;
          if (i.kind == Kind::collective) {
            for (const std::int64_t m : p.group(i, rank)) c.group.push_back(static_cast<int>(m));
            c.lane = stream_of(i);
          } else if (i.kind == Kind::send || i.kind == Kind::receive) {
            const BufferId id = i.kind == Kind::send ? i.reads[0] : i.writes[0];
            if (!p.holds(id, rank)) continue;
            c = channel_of(i, static_cast<int>(rank), static_cast<int>(p.peer_of(i, rank)));
          }
          if (c.group.size() > 1) all.insert(std::move(c));
        }
      }
    }
  }
  return {all.begin(), all.end()};
}

constexpr DeviceStream kFirstMessage = 256;  // after every Stream

bool is_message(const Channel& channel) { return channel.lane >= kFirstMessage; }

DeviceStream stream_of(const Instruction& i) {
  const bool message = i.kind == Kind::send || i.kind == Kind::receive;
  return message ? kFirstMessage + i.index : static_cast<DeviceStream>(i.stream);
}
Channel channel_of(const Instruction& message, int rank, int peer) {
  return {{std::min(rank, peer), std::max(rank, peer)}, stream_of(message)};
}

void Device::stand_in(std::byte* to, const std::byte* from, std::int64_t bytes, int) {
  copy(to, from, bytes);
}

std::unique_ptr<Device> host_device() { return std::make_unique<HostDevice>(); }

std::unique_ptr<OperatorKernel> visiting_kernel(Device& device, reference::Context context) {
  return std::make_unique<VisitingKernel>(device, std::move(context));
}

void plain_by_visit(Device& device, const PlainCall& call) {
  PlainCall h = call;
  Visits visits(device);
  const auto visit = [&](std::vector<PlainCall::Operand>& list, bool written) {
    for (PlainCall::Operand& o : list) {
      if (!o.host) o.data = visits.host(o.data, o.bytes, written);
    }
  };
  visit(h.reads, false);
  visit(h.outputs, true);
  visit(h.statistics, false);
  visit(h.extras, true);
  visit(h.writes, true);
  plain_on_host(h);
  visits.give_back();
}

// ---------------------------------------------------------------------------------------- Visits

std::byte* Visits::host(std::byte* at, std::int64_t bytes, bool written) {
  if (device_.is_host() || at == nullptr || bytes == 0) return at;
  const auto [it, fresh] = copies_.try_emplace(at);
  Copy& c = it->second;
  PARTITA_ASSERT(fresh || c.bytes == bytes,
                 fmt::format("{} and {} bytes of one address", c.bytes, bytes));
  // Parts of one buffer would be two on the host.
  const auto apart = [&](const auto& low, const auto& high) {
    PARTITA_ASSERT(low.first + low.second.bytes <= high.first ||
                       !(written || low.second.written || high.second.written),
                   "operands overlap");
  };
  c.written |= written;
  if (fresh) {
    c.at = aligned(c.room, bytes, at);
    c.bytes = bytes;
    device_.to_host(c.at, at, bytes);
  }
  if (it != copies_.begin()) apart(*std::prev(it), *it);
  if (std::next(it) != copies_.end()) apart(*it, *std::next(it));
  return c.at;
}

float* Visits::floats(std::byte* at, ElementType type, std::int64_t n, bool written, bool here) {
  if (at == nullptr) return nullptr;
  const std::int64_t bytes = n * storage(type, 1).count;
  std::byte* from = here ? at : host(at, bytes, written);
  if (type == ElementType::fp32) return reinterpret_cast<float*>(from);
  const auto [it, fresh] = wide_.try_emplace(from);
  Wide& w = it->second;
  PARTITA_ASSERT(fresh || (w.count == n && w.type == type), "two views of one address");
  w.written |= written;
  if (fresh) {
    w.at = aligned(w.room, 4 * n, nullptr);
    w.type = type;
    w.count = n;
    widen(type, from, reinterpret_cast<float*>(w.at), n);
  }
  return reinterpret_cast<float*>(w.at);
}

void Visits::give_back() {
  for (const auto& [at, w] : wide_) {
    if (w.written) narrow(w.type, reinterpret_cast<const float*>(w.at), at, w.count);
  }
  wide_.clear();
  for (const auto& [at, c] : copies_) {
    if (c.written) device_.to_device(at, c.at, c.bytes);
  }
  copies_.clear();
}

// ----------------------------------------------------------------------------------------- Order

void Order::begin(DeviceStream stream, bool after_compute) {
  if (device_.is_host()) return;
  reads_.clear();
  writes_.clear();
  stream_ = stream;
  if (after_compute && stream != kComputeStream) {
    device_.on(kComputeStream);
    const Device::Event here = device_.record();
    device_.on(stream);
    device_.wait(here);
  }
  device_.on(stream);
}

void Order::wait(const std::vector<Use>& uses) {
  for (const Use& u : uses) {
    if (u.stream != stream_) device_.wait(u.event);
  }
}

void Order::read(const std::byte* block) {
  if (device_.is_host() || block == nullptr) return;
  wait(blocks_[block].writer);
  reads_.push_back(block);
}

void Order::write(const std::byte* block) {
  if (device_.is_host() || block == nullptr) return;
  Block& b = blocks_[block];
  wait(b.writer);
  wait(b.readers);
  writes_.push_back(block);
}

void Order::end() {
  if (device_.is_host() || (reads_.empty() && writes_.empty())) return;
  const Use use{stream_, device_.record()};
  for (const std::byte* block : reads_) {
    auto& readers = blocks_[block].readers;
    const auto mine = std::find_if(readers.begin(), readers.end(),
                                   [&](const Use& u) { return u.stream == stream_; });
    if (mine == readers.end()) {
      readers.push_back(use);
    } else {
      mine->event = use.event;
    }
  }
  for (const std::byte* block : writes_) blocks_[block] = {{use}, {}};
}

void Order::forget() { blocks_.clear(); }

}  // namespace partita::execute
