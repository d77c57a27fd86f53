// tests/runtime/cuda/on_device.h: a device's kernels with cpu::Kernel's functions, for operands on
// the host.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "runtime/execute/device.h"
#include "runtime/transport/narrow.h"

namespace partita::cuda {

/// `Make` is a type whose static device() gives the device.
template <class Make>
class KernelOnDevice {
 public:
  explicit KernelOnDevice(const reference::Context& context)
      : kernel_(Make::device().kernel(context)) {}
  ~KernelOnDevice() {
    Make::device().finish();
    for (std::byte* b : blocks_) Make::device().release(b);
  }
  KernelOnDevice(const KernelOnDevice&) = delete;
  KernelOnDevice& operator=(const KernelOnDevice&) = delete;

  void set_step(std::int64_t step, std::int64_t first_sample) {
    kernel_->set_step(step, first_sample);
  }
  void forward_statistic(std::size_t k, const cpu::Arguments& a) {
    run(execute::Work::forward_statistic, k, a);
  }
  void forward(const cpu::Arguments& a) { run(execute::Work::forward, 0, a); }
  void backward_statistic(std::size_t k, const cpu::Arguments& a) {
    run(execute::Work::backward_statistic, k, a);
  }
  void backward_data(const cpu::Arguments& a) { run(execute::Work::backward_data, 0, a); }
  void backward_weight(const cpu::Arguments& a) { run(execute::Work::backward_weight, 0, a); }
  void attend_part(const cpu::Arguments& a) { run(execute::Work::attend_part, 0, a); }
  void attend_part_backward(const cpu::Arguments& a) {
    run(execute::Work::attend_part_backward, 0, a);
  }
  bool makes_statistics() const { return kernel_->makes_statistics(); }
  std::vector<cpu::RoutedResult> routed;

 private:
  void run(execute::Work work, std::size_t statistic, const cpu::Arguments& a) {
    execute::Device& device = Make::device();
    struct Back {
      void* host;
      std::byte* there;
      std::int64_t bytes;
    };
    std::vector<Back> back;
    const auto bring = [&](void* host, std::int64_t bytes) {
      std::byte* there = device.allocate(bytes);
      blocks_.push_back(there);
      device.to_device(there, host, bytes);
      back.push_back({host, there, bytes});
      return there;
    };
    cpu::Arguments here = a;
    for (auto* list : {&here.inputs, &here.parameters, &here.outputs, &here.output_gradients,
                       &here.statistics, &here.backward_statistics, &here.extras, &here.results}) {
      for (cpu::Tensor& t : *list) {
        if (!t || t.size() == 0) continue;
        if (t.values != nullptr)
          t.values = reinterpret_cast<float*>(bring(t.values, storage(t.type, t.size()).count));
        if (t.ids != nullptr)
          t.ids = reinterpret_cast<const std::int64_t*>(
              bring(const_cast<std::int64_t*>(t.ids), t.size() * 8));
      }
    }
    struct Placed {
      std::vector<reference::Row> rows;
      std::byte* there;
      ElementType type;
      std::int64_t count;
    };
    std::map<std::size_t, Placed> placed;
    here.place = [&](std::size_t k, const std::vector<reference::Row>& rows) {
      const cpu::Tensor& t = a.results[k];
      const std::int64_t n = std::ssize(rows) * std::ssize(t.index->at(3)),
                         bytes = storage(t.type, n).count;
      std::byte* there = device.allocate(bytes + 64);
      blocks_.push_back(there);
      placed[k] = {rows, there, t.type, n};
      return reinterpret_cast<float*>(there);
    };
    kernel_->routed.clear();
    kernel_->run(work, statistic, here);
    routed = std::move(kernel_->routed);
    for (const auto& [k, p] : placed) {
      routed.resize(std::max(routed.size(), k + 1));
      std::vector<std::byte> stored(static_cast<std::size_t>(storage(p.type, p.count).count) + 4);
      device.to_host(stored.data(), p.there, storage(p.type, p.count).count);
      routed[k].rows = p.rows;
      routed[k].values.resize(static_cast<std::size_t>(p.count));
      widen(p.type, stored.data(), routed[k].values.data(), p.count);
    }
    // What was only read comes back as it was.
    for (const Back& b : back) device.to_host(b.host, b.there, b.bytes);
  }
  std::unique_ptr<execute::OperatorKernel> kernel_;
  std::vector<std::byte*> blocks_;
};

}  // namespace partita::cuda
