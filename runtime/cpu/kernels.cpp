#include "runtime/cpu/kernels.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "runtime/cpu/fast.h"

namespace partita::cpu {
namespace {

using reference::Operands;
using reference::Piece;

/// The operand as the reference kernels take it.
Piece piece_of(const Tensor& t) {
  Piece p;
  p.index = *t.index;
  if (t.rows != nullptr) {
    p.routed = true;
    p.rows = *t.rows;
  }
  const auto n = static_cast<std::size_t>(t.size());
  if (t.ids != nullptr) {
    p.values.assign(t.ids, t.ids + n);
  } else if (t.values != nullptr) {
    p.values.assign(t.values, t.values + n);
  } else {
    p.values.assign(n, 0.0);
  }
  return p;
}

struct Converted {
  std::vector<Piece> pieces;
  std::vector<const Piece*> pointers;
  explicit Converted(const std::vector<Tensor>& list) {
    pieces.reserve(list.size());
    for (const Tensor& t : list) pieces.push_back(t ? piece_of(t) : Piece{});
    for (std::size_t i = 0; i < list.size(); ++i)
      pointers.push_back(list[i] ? &pieces[i] : nullptr);
  }
};

void write(const std::vector<Piece>& results, const Arguments& a,
           std::vector<RoutedResult>& routed) {
  routed.assign(a.results.size(), {});
  for (std::size_t k = 0; k < a.results.size(); ++k) {
    const Tensor& to = a.results[k];
    if (!to) continue;
    const Piece& from = results[k];
    if (from.routed) {
      routed[k].rows = from.rows;
      routed[k].values.assign(from.values.begin(), from.values.end());
      continue;
    }
    PARTITA_ASSERT(static_cast<std::int64_t>(from.values.size()) == to.size(),
                   fmt::format("{} results for {} elements", from.values.size(), to.size()));
    for (std::size_t i = 0; i < from.values.size(); ++i) {
      const auto v = static_cast<float>(from.values[i]);
      to.values[i] = a.accumulate ? to.values[i] + v : v;
    }
  }
}

/// Runs `kernel` on converted operands.
template <class F>
void by_reference(const Arguments& a, std::vector<RoutedResult>& routed, F kernel) {
  const Converted inputs(a.inputs), parameters(a.parameters), outputs(a.outputs),
      gradients(a.output_gradients), statistics(a.statistics), backward(a.backward_statistics);
  Operands o;
  o.inputs = inputs.pointers;
  o.parameters = parameters.pointers;
  o.outputs = outputs.pointers;
  o.output_gradients = gradients.pointers;
  Piece one;
  one.values = {1.0};
  for (const Piece*& g : o.output_gradients) {
    if (g == nullptr) g = &one;
  }
  o.statistics = statistics.pointers;
  o.backward_statistics = backward.pointers;
  write(kernel(o), a, routed);
}

}  // namespace

std::int64_t Tensor::size() const {
  if (rows != nullptr) return static_cast<std::int64_t>(rows->size() * index->at(3).size());
  std::int64_t n = 1;
  for (const auto& list : *index) n *= static_cast<std::int64_t>(list.size());
  return n;
}

Kernel::Kernel(reference::Context context)
    : context_(std::move(context)), kept_(std::make_unique<Kept>()) {}
Kernel::~Kernel() = default;
Kernel::Kernel(Kernel&&) noexcept = default;

void Kernel::take_routed() {
  routed = std::move(kept_->routed);
  kept_->routed.clear();
}

void Kernel::set_step(std::int64_t step, std::int64_t first_sample) {
  context_.step = step;
  context_.first_sample = first_sample;
}

void Kernel::forward_statistic(std::size_t k, const Arguments& a) {
  if (fast_forward_statistic(context_, k, a)) return;
  PARTITA_ASSERT(!a.whole_statistics || !std::holds_alternative<Normalize>(*context_.operation),
                 "a norm whose moments this kernel does not keep");
  by_reference(a, routed, [&](const Operands& o) {
    return std::vector<Piece>{reference::forward_statistic(context_, k, o)};
  });
}
void Kernel::forward(const Arguments& a) {
  if (fast_forward(context_, a, *kept_)) return take_routed();
  by_reference(a, routed, [&](const Operands& o) { return reference::forward(context_, o); });
}
void Kernel::backward_statistic(std::size_t k, const Arguments& a) {
  if (fast_backward_statistic(context_, k, a)) return;
  by_reference(a, routed, [&](const Operands& o) {
    return std::vector<Piece>{reference::backward_statistic(context_, k, o)};
  });
}
void Kernel::backward_data(const Arguments& a) {
  if (fast_backward_data(context_, a, *kept_)) return take_routed();
  by_reference(a, routed, [&](const Operands& o) { return reference::backward_data(context_, o); });
}
void Kernel::backward_weight(const Arguments& a) {
  if (fast_backward_weight(context_, a, *kept_)) return;
  by_reference(a, routed,
               [&](const Operands& o) { return reference::backward_weight(context_, o); });
}

void Kernel::attend_part(const Arguments& a) { cpu::attend_part(context_, a); }
void Kernel::attend_part_backward(const Arguments& a) { cpu::attend_part_backward(context_, a); }

}  // namespace partita::cpu
