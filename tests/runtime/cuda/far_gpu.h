// tests/runtime/cuda/far_gpu.h: a far device with the CUDA kernels' text and with links that carry
// out NCCL's calls as nccl_steps() says: all of the backend but CUDA, cuBLASLt, cuDNN and NCCL.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "runtime/cuda/nccl_plan.h"
#include "runtime/cuda/runs.h"
#include "runtime/execute/process_links.h"
#include "runtime/transport/narrow.h"
#include "tests/runtime/cuda/host_machine.h"
#include "tests/runtime/execute/far_device.h"

namespace partita::cuda {

/// What a member brings to a collective.
struct Brought {
  CollectiveCall call;
  std::vector<int> group;  ///< the call's
  std::vector<std::byte> data, send;
};

/// Member `me`'s data after NCCL's calls.
inline std::vector<std::byte> after_steps(const std::vector<const Brought*>& all, std::size_t me) {
  const CollectiveCall& call = all[me]->call;
  const auto width = static_cast<std::size_t>(call.element_bytes);
  std::vector<std::vector<NcclStep>> steps;
  for (const Brought* b : all) steps.push_back(nccl_steps(b->call));
  std::vector<std::byte> result = all[me]->data;
  const auto place = [&](std::int64_t element) {
    return static_cast<std::size_t>(element) * width;
  };
  const auto put = [&](std::int64_t to, const std::vector<std::byte>& from, std::int64_t at,
                       std::int64_t count) {
    PARTITA_ASSERT(place(at + count) <= from.size() && place(to + count) <= result.size(),
                   "a call outside its buffers");
    std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(place(at)), place(count),
                result.begin() + static_cast<std::ptrdiff_t>(place(to)));
  };
  /// Of all members, in their order: the same on each.
  const auto reduce = [&](std::int64_t to, std::int64_t at, std::int64_t count) {
    put(to, all[0]->data, at, count);
    for (std::size_t m = 1; m < all.size(); ++m) {
      std::byte* sum = result.data() + place(to);
      const std::byte* other = all[m]->data.data() + place(at);
      if (call.reduction == Reduction::sum) {
        add_numbers(call.type, sum, other, count);
        continue;
      }
      for (std::int64_t k = 0; k < count; ++k) {
        float &a = reinterpret_cast<float*>(sum)[k], b = reinterpret_cast<const float*>(other)[k];
        a = std::max(a, b);
      }
    }
  };
  const auto mine = static_cast<int>(me);
  std::map<int, std::size_t> taken;
  for (std::size_t k = 0; k < steps[me].size(); ++k) {
    const NcclStep& s = steps[me][k];
    switch (s.kind) {
      case NcclStep::Kind::all_reduce:
        reduce(s.to, s.from, s.count);
        break;
      case NcclStep::Kind::reduce:
        if (s.peer == mine) reduce(s.to, s.from, s.count);
        break;
      case NcclStep::Kind::reduce_scatter:
        reduce(s.to, s.from + static_cast<std::int64_t>(me) * s.count, s.count);
        break;
      case NcclStep::Kind::all_gather:
        for (std::size_t m = 0; m < all.size(); ++m)
          put(s.to + static_cast<std::int64_t>(m) * s.count, all[m]->data, steps[m].at(k).from,
              s.count);
        break;
      case NcclStep::Kind::broadcast: {
        const auto root = static_cast<std::size_t>(s.peer);
        put(s.to, all[root]->data, steps[root].at(k).from, s.count);
        break;
      }
      case NcclStep::Kind::send:
        break;
      case NcclStep::Kind::receive: {
        // The peer's sends to me, in order.
        std::size_t skip = taken[s.peer]++;
        const auto peer = static_cast<std::size_t>(s.peer);
        for (const NcclStep& t : steps[peer]) {
          if (t.kind != NcclStep::Kind::send || t.peer != mine || skip-- > 0) continue;
          PARTITA_ASSERT(t.count == s.count,
                         fmt::format("{} sends {} for a {} that receives {}",
                                     partita::name(all[peer]->call.kind), t.count,
                                     partita::name(call.kind), s.count));
          put(s.to, t.from_send ? all[peer]->send : all[peer]->data, t.from, t.count);
          break;
        }
        break;
      }
    }
  }
  return result;
}

/// Where the devices of a run meet.
class FarHub {
 public:
  struct Meeting {
    std::vector<std::shared_ptr<Brought>> brought;
    std::size_t left = 0;
  };
  int refuses = -1;  ///< a rank that has no links
  std::mutex guard;
  std::map<std::pair<execute::Channel, std::int64_t>, Meeting> meetings;
  /// Taken: null, until the sender knows.
  std::map<std::pair<execute::Channel, std::int64_t>, std::unique_ptr<std::vector<std::byte>>>
      letters;
};

class FarLinks : public execute::Links {
 public:
  FarLinks(execute::FarDevice& device, std::shared_ptr<FarHub> hub)
      : device_(device), hub_(std::move(hub)) {}
  std::string name() const override { return "far links"; }
  std::string open(Transport& control) override {
    return control.rank() == hub_->refuses ? "far links refuse this rank" : "";
  }
  void leave() override { left_ = true; }
  void meet(Transport& control, const std::vector<execute::Channel>& channels) override {
    rank_ = control.rank();
    known_.insert(channels.begin(), channels.end());
  }
  void collective(const execute::Channel& channel, const CollectiveCall& call) override {
    EXPECT_EQ(known_.count(channel), 1u) << "a channel that nobody announced";
    EXPECT_FALSE(left_);
    const auto turn = turns_[channel]++;
    const auto n = channel.group.size();
    const auto me = static_cast<std::size_t>(call.me);
    auto mine = std::make_shared<Brought>();
    mine->call = call;
    mine->group = channel.group;
    mine->call.group = &mine->group;
    std::byte* data = execute::FarDevice::near(call.data);
    const std::byte* send = execute::FarDevice::near(call.send);
    const auto bytes = [&](const std::vector<std::int64_t>& bounds) {
      return bounds.empty() ? 0 : static_cast<std::size_t>(bounds.back()) * call.element_bytes;
    };
    const std::size_t in = bytes(call.offsets),
                      out = send == nullptr ? 0 : bytes(call.send_offsets);
    const std::pair key{channel, turn};
    device_.push([=, hub = hub_] {
      mine->data.assign(data, data + in);
      if (out > 0) mine->send.assign(send, send + out);
      const std::lock_guard lock(hub->guard);
      auto& meeting = hub->meetings[key];
      meeting.brought.resize(n);
      meeting.brought[me] = mine;
    });
    device_.push_when(
        [=, hub = hub_] {
          const std::lock_guard lock(hub->guard);
          const auto& all = hub->meetings[key].brought;
          return std::all_of(all.begin(), all.end(), [](const auto& b) { return b != nullptr; });
        },
        [=, hub = hub_] {
          std::vector<std::shared_ptr<Brought>> all;
          {
            const std::lock_guard lock(hub->guard);
            FarHub::Meeting& meeting = hub->meetings[key];
            all = meeting.brought;
            if (++meeting.left == n) hub->meetings.erase(key);
          }
          std::vector<const Brought*> pointers;
          for (const auto& b : all) pointers.push_back(b.get());
          const auto result = after_steps(pointers, me);
          std::copy(result.begin(), result.end(), data);
        });
    count_call(call, traffic_);
  }
  void send(const execute::Channel& channel, int, const std::byte* from,
            std::int64_t bytes) override {
    EXPECT_EQ(known_.count(channel), 1u);
    const std::pair key{channel, turns_[channel]++};
    // As NCCL's: it ends when the other has come for it.
    device_.push([=, hub = hub_, from = execute::FarDevice::near(from)] {
      const std::lock_guard lock(hub->guard);
      hub->letters[key] = std::make_unique<std::vector<std::byte>>(from, from + bytes);
    });
    device_.push_when(
        [=, hub = hub_] {
          const std::lock_guard lock(hub->guard);
          return hub->letters.at(key) == nullptr;
        },
        [=, hub = hub_] {
          const std::lock_guard lock(hub->guard);
          hub->letters.erase(key);
        });
    ++traffic_.sends;
    traffic_.send_bytes += bytes;
  }
  void receive(const execute::Channel& channel, int, std::byte* to, std::int64_t bytes) override {
    const std::pair key{channel, turns_[channel]++};
    device_.push_when(
        [=, hub = hub_] {
          const std::lock_guard lock(hub->guard);
          const auto it = hub->letters.find(key);
          return it != hub->letters.end() && it->second != nullptr;
        },
        [=, hub = hub_, to = execute::FarDevice::near(to)] {
          const std::lock_guard lock(hub->guard);
          auto& letter = hub->letters.at(key);
          EXPECT_EQ(std::ssize(*letter), bytes);
          std::copy(letter->begin(), letter->end(), to);
          letter = nullptr;
        });
  }

 private:
  execute::FarDevice& device_;
  std::shared_ptr<FarHub> hub_;
  bool left_ = false;
  int rank_ = 0;
  std::set<execute::Channel> known_;
  std::map<execute::Channel, std::int64_t> turns_;
};

/// Kernels by the CUDA text where it has one.
class FarGpu : public execute::FarDevice {
 public:
  /// Without a hub ranks of one process may copy from each other's memory.
  FarGpu(execute::FarOptions o, std::shared_ptr<FarHub> hub, bool in_process = false)
      : FarDevice(o) {
    if (hub) links_ = std::make_unique<FarLinks>(*this, std::move(hub));
    if (in_process) links_ = execute::process_links(*this, 20);
  }
  std::string name() const override { return "far gpu"; }
  execute::Links* links() override { return links_.get(); }
  std::unique_ptr<execute::OperatorKernel> kernel(reference::Context context) override;
  void plain(const PlainCall& call) override {
    const Kernel k = call.instruction->kernel;
    const bool own =
        k != Kernel::loss_scale && ((k != Kernel::compress && k != Kernel::decompress) ||
                                    call.program->compression.kind == CompressionKind::cast);
    if (!own) {
      FarDevice::plain(call);
      return;
    }
    PlainCall here = call;
    for (auto* list : {&here.reads, &here.outputs, &here.statistics, &here.extras, &here.writes}) {
      for (auto& o : *list) o.data = near(o.data);
    }
    push([here = std::move(here)] {
      HostMachine m;
      EXPECT_TRUE(run_plain(m, here)) << partita::name(here.instruction->kernel);
    });
  }
  void draw(std::byte* to, ElementType type, std::int64_t n, float mean, float deviation,
            std::uint64_t seed) override {
    push([=, to = near(to)] {
      HostMachine m;
      draw_values(m, {to, type}, n, mean, deviation, seed);
    });
  }
  void unpack_add(const execute::RunList& list, ElementType type, const std::byte* from,
                  std::byte* to) override {
    push([=, runs = list.runs, from = near(from), to = near(to)] {
      HostMachine m;
      add_runs(m, table(runs, 1), type, from, to);
    });
  }
  void pack(const execute::RunList& list, std::int64_t word, const std::byte* from,
            std::byte* to) override {
    move(list, word, from, to, false);
  }
  void unpack(const execute::RunList& list, std::int64_t word, const std::byte* from,
              std::byte* to) override {
    move(list, word, from, to, true);
  }

 private:
  static RunTable table(const std::vector<execute::Run>& runs, std::int64_t words) {
    static thread_local RunNumbers n;
    n = numbers_of(runs, words);
    return n.at(n.numbers.data());
  }
  void move(const execute::RunList& list, std::int64_t word, const std::byte* from, std::byte* to,
            bool unpacks) {
    push([=, runs = list.runs, from = near(from), to = near(to)] {
      HostMachine m;
      const bool wide = whole(runs, 16 / word) &&
                        reinterpret_cast<std::uintptr_t>(from) % 16 == 0 &&
                        reinterpret_cast<std::uintptr_t>(to) % 16 == 0;
      move_runs(m, table(runs, wide ? 16 / word : 1), wide ? 16 : word, from, to, unpacks);
    });
  }
  std::unique_ptr<execute::Links> links_;
};

class FarGpuKernel : public execute::OperatorKernel {
 public:
  FarGpuKernel(FarGpu& gpu, const reference::Context& context)
      : gpu_(gpu), context_(context), visiting_(execute::visiting_kernel(gpu, context)) {}
  const reference::Context& context() const override { return context_; }
  void set_step(std::int64_t step, std::int64_t first_sample) override {
    context_.step = step;
    context_.first_sample = first_sample;
    visiting_->set_step(step, first_sample);
  }
  void run(execute::Work work, std::size_t statistic, const cpu::Arguments& a) override {
    routed.clear();
    const bool rows = any_rows(a) || of_experts(*context_.operation);
    // Whose kernels ask for memory on the way are run at once, when all before is done.
    if (rows) gpu_.host_waits(gpu_.record());
    // A GPU's kernels know their indices when they are queued, its addresses when they run.
    auto lists = std::make_shared<std::deque<std::vector<cpu::Indices>>>();
    auto here = std::make_shared<cpu::Arguments>(a);
    for (auto* list :
         {&here->inputs, &here->parameters, &here->outputs, &here->output_gradients,
          &here->statistics, &here->backward_statistics, &here->extras, &here->results}) {
      for (cpu::Tensor& t : *list) {
        if (!t) continue;
        t.index = &lists->emplace_back(*t.index);
        t.values = execute::FarDevice::near(t.values);
        t.ids = execute::FarDevice::near(t.ids);
      }
    }
    if (a.place) {
      here->place = [this, place = a.place](std::size_t k,
                                            const std::vector<reference::Row>& list) {
        float* at = execute::FarDevice::near(place(k, list));
        gpu_.host_waits(gpu_.record());
        return at;
      };
    }
    if (rows) {
      HostMachine m;
      const bool done = work == execute::Work::forward ? run_forward(m, context_, *here)
                        : work == execute::Work::backward_data
                            ? run_backward_data(m, context_, *here)
                            : run_backward_weight(m, context_, *here);
      if (done) return;
      visiting_->run(work, statistic, a);
      routed = std::move(visiting_->routed);
      return;
    }
    gpu_.push([=, context = context_] {
      (void)lists;
      KernelOnHostMachine kernel(context);
      kernel.set_step(context.step, context.first_sample);
      switch (work) {
        case execute::Work::forward_statistic:
          return kernel.forward_statistic(statistic, *here);
        case execute::Work::forward:
          return kernel.forward(*here);
        case execute::Work::backward_statistic:
          return kernel.backward_statistic(statistic, *here);
        case execute::Work::backward_data:
          return kernel.backward_data(*here);
        case execute::Work::backward_weight:
          return kernel.backward_weight(*here);
        case execute::Work::attend_part:
          return kernel.attend_part(*here);
        case execute::Work::attend_part_backward:
          return kernel.attend_part_backward(*here);
      }
    });
  }

 private:
  FarGpu& gpu_;
  reference::Context context_;
  std::unique_ptr<execute::OperatorKernel> visiting_;
};

inline std::unique_ptr<execute::OperatorKernel> FarGpu::kernel(reference::Context context) {
  return std::make_unique<FarGpuKernel>(*this, context);
}

}  // namespace partita::cuda
