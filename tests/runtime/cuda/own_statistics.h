// tests/runtime/cuda/own_statistics.h: kernels that make their statistics themselves, where they
// can, with cpu::Kernel's functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/cpu/kernels.h"

namespace partita::cuda {

/// What asks for a statistic beforehand gets none.
template <class K>
class OwnStatistics {
 public:
  explicit OwnStatistics(const reference::Context& context) : kernel_(context) {}
  void set_step(std::int64_t step, std::int64_t first_sample) {
    kernel_.set_step(step, first_sample);
  }
  void forward_statistic(std::size_t k, const cpu::Arguments& a) {
    if (!left_out(a)) kernel_.forward_statistic(k, a);
  }
  void forward(const cpu::Arguments& a) { kernel_.forward(own(a)), take(); }
  void backward_statistic(std::size_t k, const cpu::Arguments& a) {
    if (!left_out(a)) kernel_.backward_statistic(k, a);
  }
  void backward_data(const cpu::Arguments& a) { kernel_.backward_data(own(a)), take(); }
  void backward_weight(const cpu::Arguments& a) { kernel_.backward_weight(a); }
  std::vector<cpu::RoutedResult> routed;

 private:
  bool left_out(const cpu::Arguments& a) const {
    if (!kernel_.makes_statistics()) return false;
    std::fill_n(a.results[0].values, a.results[0].size(), NAN);
    return true;
  }
  cpu::Arguments own(const cpu::Arguments& a) const {
    cpu::Arguments here = a;
    here.own_statistics = kernel_.makes_statistics();
    return here;
  }
  void take() { routed = std::move(kernel_.routed); }
  K kernel_;
};

}  // namespace partita::cuda
