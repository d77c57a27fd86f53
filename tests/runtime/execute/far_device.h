// tests/runtime/execute/far_device.h: a device of the host's that behaves as a GPU may: the host
// faults when it follows an address, and streams run late, in any order that events allow.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "base/error.h"
#include "runtime/execute/device.h"
#include "runtime/execute/threads.h"

namespace partita::execute {

struct FarOptions {
  std::uint64_t seed = 1;
  /// Of all kernels, how many in 100 the device has not.
  int visits = 30;
  bool forgets_waits = false;  ///< what an executor without events would get
};

class FarDevice : public Device {
 public:
  explicit FarDevice(FarOptions o) : o_(o), rng_(o.seed), host_(host_device()) {}
  ~FarDevice() override {
    for (std::byte* b : blocks_) std::free(b);
  }

  std::string name() const override { return "far"; }
  std::byte* allocate(std::int64_t bytes) override {
    std::byte* block = host_->allocate_on_host(bytes);
    // What nobody wrote is no number.
    std::memset(block, 0xff, static_cast<std::size_t>(bytes));
    blocks_.insert(block);
    return block + kFar;
  }
  void release(std::byte* block) override {
    blocks_.erase(near(block));
    std::free(near(block));
  }

  void to_device(std::byte* to, const void* from, std::int64_t bytes) override {
    const auto* at = static_cast<const std::byte*>(from);
    push([to = near(to), copy = std::vector<std::byte>(at, at + bytes)] {
      std::copy(copy.begin(), copy.end(), to);
    });
  }
  void to_host(void* to, const std::byte* from, std::int64_t bytes) override {
    push([=, from = near(from)] { std::memcpy(to, from, static_cast<std::size_t>(bytes)); });
    host_waits(record());
  }
  void to_host_later(void* to, const std::byte* from, std::int64_t bytes) override {
    push([=, from = near(from)] { std::memcpy(to, from, static_cast<std::size_t>(bytes)); });
  }
  void copy(std::byte* to, const std::byte* from, std::int64_t bytes) override {
    push([this, bytes, to = near(to), from = near(from)] { host_->copy(to, from, bytes); });
  }
  void fill(std::byte* to, std::int64_t count, float value) override {
    push([=, this, to = near(to)] { host_->fill(to, count, value); });
  }
  void pack(const RunList& runs, std::int64_t word, const std::byte* from, std::byte* to) override {
    push([=, this, from = near(from), to = near(to)] { host_->pack(runs, word, from, to); });
  }
  void unpack(const RunList& runs, std::int64_t word, const std::byte* from,
              std::byte* to) override {
    push([=, this, from = near(from), to = near(to)] { host_->unpack(runs, word, from, to); });
  }
  void unpack_add(const RunList& runs, ElementType type, const std::byte* from,
                  std::byte* to) override {
    push([=, this, from = near(from), to = near(to)] { host_->unpack_add(runs, type, from, to); });
  }

  std::unique_ptr<OperatorKernel> kernel(reference::Context context) override;
  void plain(const PlainCall& call) override {
    if (has_not(std::string(partita::name(call.instruction->kernel)))) {
      plain_by_visit(*this, call);
      return;
    }
    PlainCall here = call;
    for (auto* list : {&here.reads, &here.outputs, &here.statistics, &here.extras, &here.writes}) {
      for (PlainCall::Operand& operand : *list) operand.data = near(operand.data);
    }
    push([here = std::move(here)] { plain_on_host(here); });
  }

  void on(DeviceStream s) override { current_ = s; }
  Event record() override {
    const Event e = ++events_;
    streams_[current_].push_back({{}, e, 0, {}});
    waiting_.insert(e);
    return e;
  }
  void wait(Event e) override {
    if (!past(e) && !o_.forgets_waits) streams_[current_].push_back({{}, 0, e, {}});
  }
  bool reached(Event e) override { return past(e); }
  void host_waits(Event e) override {
    run_until([&] { return past(e); });
  }
  void finish() override {
    run_until([&] {
      return std::all_of(streams_.begin(), streams_.end(),
                         [](const auto& s) { return s.second.empty(); });
    });
  }

  void begin_marks() override { marks_.assign(1, ticks_); }
  std::int64_t mark() override {
    const auto at = marks_.size();
    marks_.push_back(-1);
    push([this, at] { marks_[at] = ++ticks_; });
    return static_cast<std::int64_t>(at);
  }
  std::int64_t nanoseconds(std::int64_t mark) override {
    const std::int64_t at = marks_.at(static_cast<std::size_t>(mark));
    EXPECT_GE(at, 0) << "asked for before finish()";
    return at - marks_[0];
  }

  bool has_not(const std::string& kernel) {
    if (static_cast<int>(rng_() % 100) >= o_.visits) return false;
    count_fallback(kernel);
    return true;
  }
  void push(std::function<void()> work) {
    streams_[current_].push_back({std::move(work), 0, 0, {}});
  }
  /// The stream waits until another rank makes it ready.
  void push_when(std::function<bool()> ready, std::function<void()> work) {
    streams_[current_].push_back({std::move(work), 0, 0, std::move(ready)});
  }
  template <class T>
  static T* near(T* p) {
    auto at = reinterpret_cast<std::uintptr_t>(p);
    return at < kFar ? p : reinterpret_cast<T*>(at - kFar);
  }

 private:
  /// No address of a process: whoever follows it faults.
  static constexpr std::uintptr_t kFar = std::uintptr_t{1} << 62;
  struct Task {
    std::function<void()> work;
    Event sets = 0, waits_for = 0;
    std::function<bool()> ready;
  };
  bool past(Event e) const { return waiting_.count(e) == 0; }
  template <class F>
  void run_until(F done) {
    const auto start = std::chrono::steady_clock::now();
    while (!done()) {
      std::vector<std::deque<Task>*> ready;
      bool others = false;
      for (auto& [s, tasks] : streams_) {
        if (tasks.empty() || !past(tasks.front().waits_for)) continue;
        if (tasks.front().ready && !tasks.front().ready()) {
          others = true;
        } else {
          ready.push_back(&tasks);
        }
      }
      if (ready.empty() && others) {
        PARTITA_ASSERT(std::chrono::steady_clock::now() - start < std::chrono::seconds(20),
                       "another rank does not come");
        std::this_thread::yield();
        continue;
      }
      PARTITA_ASSERT(!ready.empty(), "streams wait for each other");
      // Some runs favour the first streams, some the last, some none.
      const std::size_t pick = o_.seed % 3 == 0   ? 0
                               : o_.seed % 3 == 1 ? ready.size() - 1
                                                  : rng_() % ready.size();
      std::deque<Task>& tasks = *ready[pick];
      const Task task = std::move(tasks.front());
      tasks.pop_front();
      if (task.work) task.work();
      if (task.sets > 0) waiting_.erase(task.sets);
    }
  }

  FarOptions o_;
  std::mt19937_64 rng_;
  std::unique_ptr<Device> host_;
  std::set<std::byte*> blocks_;
  std::map<DeviceStream, std::deque<Task>> streams_;
  std::set<Event> waiting_;  ///< recorded, not reached
  Event events_ = 0;
  DeviceStream current_ = kComputeStream;
  std::int64_t ticks_ = 0;
  std::vector<std::int64_t> marks_;
};

/// The host's kernel, run when its stream gets there; of rows, whose number the host must know, at
/// once.
class FarKernel : public OperatorKernel {
 public:
  FarKernel(FarDevice& device, const reference::Context& context)
      : device_(device),
        far_(host_device()->kernel(context)),
        visiting_(visiting_kernel(device, context)) {}
  const reference::Context& context() const override { return visiting_->context(); }
  void set_step(std::int64_t step, std::int64_t first_sample) override {
    step_ = step;
    first_sample_ = first_sample;
    visiting_->set_step(step, first_sample);
  }
  void run(Work work, std::size_t statistic, const cpu::Arguments& a) override {
    // By value: what the caller's operands point to lives until its stream gets there.
    auto here = std::make_shared<cpu::Arguments>(a);
    auto lists = std::make_shared<std::deque<std::vector<cpu::Indices>>>();
    bool rows = false;
    for (auto* list :
         {&here->inputs, &here->parameters, &here->outputs, &here->output_gradients,
          &here->statistics, &here->backward_statistics, &here->extras, &here->results}) {
      for (cpu::Tensor& t : *list) {
        if (!t) continue;
        rows |= t.rows != nullptr;
        t.index = &lists->emplace_back(*t.index);
        t.values = FarDevice::near(t.values);
        t.ids = FarDevice::near(t.ids);
        t.bytes = FarDevice::near(t.bytes);
      }
    }
    if (rows || device_.has_not(std::string(name(work)))) {
      visiting_->run(work, statistic, a);
      routed = std::move(visiting_->routed);
      return;
    }
    routed.clear();
    device_.push([=, this, step = step_, first = first_sample_] {
      far_->set_step(step, first);
      far_->run(work, statistic, *here);
      (void)lists;
    });
  }

 private:
  FarDevice& device_;
  std::unique_ptr<OperatorKernel> far_, visiting_;
  std::int64_t step_ = 0, first_sample_ = 0;
};

inline std::unique_ptr<OperatorKernel> FarDevice::kernel(reference::Context context) {
  return std::make_unique<FarKernel>(*this, context);
}

/// Far devices on all ranks, each with a seed of its own.
inline Options on_far_devices(Options o, FarOptions far = {}) {
  o.device = [far](int rank) {
    FarOptions mine = far;
    mine.seed += static_cast<std::uint64_t>(rank);
    return std::make_unique<FarDevice>(mine);
  };
  return o;
}

/// On the host, and again on far devices: equal to the bit, with the same memory and traffic.
inline std::vector<RankResult> run_on_both(const Program& program, const Options& options,
                                           const ThreadOptions& threads = {}) {
  static std::uint64_t seed = 0;
  const auto results = run_threads(program, options, threads);
  FarOptions far;
  far.seed = seed++;
  SCOPED_TRACE(::testing::Message() << "far devices from seed " << far.seed);
  const auto far_results = run_threads(program, on_far_devices(options, far), threads);
  EXPECT_TRUE(far_results[0].values.losses == results[0].values.losses) << "losses differ";
  EXPECT_TRUE(far_results[0].values.gradients == results[0].values.gradients) << "gradients differ";
  EXPECT_TRUE(far_results[0].values.parameters == results[0].values.parameters)
      << "parameters differ";
  EXPECT_EQ(far_results[0].values.copies_differ, results[0].values.copies_differ);
  EXPECT_EQ(far_results[0].ranks.size(), results[0].ranks.size());
  for (std::size_t r = 0; r < results[0].ranks.size(); ++r) {
    const RankMeasurement &one = results[0].ranks[r], &other = far_results[0].ranks[r];
    EXPECT_EQ(other.peak, one.peak) << "rank " << r;
    EXPECT_EQ(other.last_at_peak, one.last_at_peak) << "rank " << r;
    EXPECT_EQ(other.host_peak, one.host_peak) << "rank " << r;
    EXPECT_EQ(other.traffic.bytes_to, one.traffic.bytes_to) << "rank " << r;
  }
  return results;
}

}  // namespace partita::execute
