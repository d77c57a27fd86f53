// tests/runtime/cuda/narrowed.h: kernels whose operands are stored in 16 bits, with cpu::Kernel's
// functions for operands in fp32.
#pragma once

#include <deque>
#include <vector>

#include "runtime/transport/narrow.h"
#include "tests/runtime/cpu/equal_reference.h"

namespace partita::cuda {

/// Of K, whose operands but statistics, log-sum-exps and gradients of parameters are of `kType`.
template <class K, ElementType kType>
class Narrowed {
 public:
  explicit Narrowed(const reference::Context& context) : context_(context), kernel_(context) {}
  void set_step(std::int64_t step, std::int64_t first_sample) {
    kernel_.set_step(step, first_sample);
  }
  void forward_statistic(std::size_t k, const cpu::Arguments& a) {
    run(a, false, [&](const cpu::Arguments& n) { kernel_.forward_statistic(k, n); });
  }
  void forward(const cpu::Arguments& a) {
    run(a, true, [&](const cpu::Arguments& n) { kernel_.forward(n); });
  }
  void backward_statistic(std::size_t k, const cpu::Arguments& a) {
    run(a, false, [&](const cpu::Arguments& n) { kernel_.backward_statistic(k, n); });
  }
  void backward_data(const cpu::Arguments& a) {
    run(a, true, [&](const cpu::Arguments& n) { kernel_.backward_data(n); });
  }
  void backward_weight(const cpu::Arguments& a) {
    run(a, false, [&](const cpu::Arguments& n) { kernel_.backward_weight(n); });
  }
  std::vector<cpu::RoutedResult> routed;
  const K& kernel() const { return kernel_; }

 private:
  struct Copy {
    std::vector<std::uint16_t> stored;
    float* wide = nullptr;
    std::byte* bytes() { return reinterpret_cast<std::byte*>(stored.data()); }
  };
  template <class F>
  void run(const cpu::Arguments& a, bool results, F pass) {
    std::deque<Copy> copies;
    cpu::Arguments n = a;
    const auto take = [&](cpu::Tensor& t) {
      if (!t || t.values == nullptr) return;
      Copy& c = copies.emplace_back();
      c.wide = t.values;
      c.stored.resize(static_cast<std::size_t>(t.size()));
      narrow(kType, c.wide, c.bytes(), t.size());
      t.values = reinterpret_cast<float*>(c.stored.data());
      t.type = kType;
    };
    for (auto* list : {&n.inputs, &n.parameters, &n.outputs, &n.output_gradients}) {
      for (cpu::Tensor& t : *list) take(t);
    }
    for (std::size_t k = 0; k < n.extras.size(); ++k) {
      if (context_.signature->extras[k].element_bytes == 0) take(n.extras[k]);
    }
    if (results) {
      for (cpu::Tensor& t : n.results) take(t);
    }
    kernel_.routed.clear();
    pass(n);
    routed = std::move(kernel_.routed);
    for (Copy& c : copies) widen(kType, c.bytes(), c.wide, std::ssize(c.stored));
  }
  reference::Context context_;
  K kernel_;
};

/// All operands representable in the type.
inline reference::Problem rounded(reference::Problem p, ElementType type) {
  for (auto* list : {&p.inputs, &p.parameters}) {
    for (reference::Piece& piece : *list)
      round_values(type, piece.values.data(), piece.values.size());
  }
  round_values(type, p.output_gradient.values.data(), p.output_gradient.values.size());
  return p;
}

/// What is stored is off by half a spacing of its tensor's largest value: the result, and up to
/// seven operands and values on the way (probabilities, their slopes, saved outputs, a padded
/// copy).
template <class K, ElementType kType, class F>
void expect_same_narrow(const reference::Problem& p, F look) {
  const reference::Problem r = rounded(p, kType);
  cpu::expect_same<Narrowed<K, kType>>(r, reference::whole_part(r), look, 4 * spacing(kType));
}

}  // namespace partita::cuda
