// runtime/cuda/operators.h: the operators' kernels, over any machine (machine.h) that has
//
//   each(n, f)            f(i) for every i below n
//   rows(n, width, f)     f(row, lanes) for every row below n, of about `width` elements
//   product(p)            matrices
//   product(eights)       matrices in 8 bits, where it has_eights()
//   scratch(floats)       memory until the operator ends
//   scores()              of attention that may be in memory at once
//   flash(call, pass)     attention whose scores are in none (flash.h); false where it cannot
//   list(indices)         an IndexList, kept: it comes again
//   table(key, make)      what make() gives on the host, kept likewise by its key
//   upload(numbers)       an IndexList until the operator ends
//   read(numbers, n)      what they are once all before is done, on the host
//   convolve(shape, pass, x, w, y, adds)  fills y, x or w, by pass; `adds`: to w; false where it
//                         cannot
//
// Each returns false where it does not know the case: the caller then asks the host's kernel.
// Formulas are those of runtime/cpu/fast.cpp.
#pragma once

#include <cstddef>
#include <variant>

#include "runtime/cuda/operators/attention.h"
#include "runtime/cuda/operators/elementwise.h"
#include "runtime/cuda/operators/embeddings.h"
#include "runtime/cuda/operators/experts.h"
#include "runtime/cuda/operators/images.h"
#include "runtime/cuda/operators/linear.h"
#include "runtime/cuda/operators/losses.h"
#include "runtime/cuda/operators/normalisation.h"
#include "runtime/cuda/operators/router.h"
#include "runtime/cuda/operators/shapes.h"
#include "runtime/cuda/state_space.h"

namespace partita::cuda {

// What has no kernel here is the host's.
template <class M, class Op>
bool forward(M&, const Op&, const Context&, const Arguments&) {
  return false;
}
template <class M, class Op>
bool data(M&, const Op&, const Context&, const Arguments&) {
  return false;
}
template <class M, class Op>
bool weight(M&, const Op&, const Context&, const Arguments&) {
  return false;
}

/// Element-wise operators take rows as they come: their result's are those of what they read.
inline bool takes_rows(const Operation& op) {
  return std::holds_alternative<Activation>(op) || std::holds_alternative<GatedActivation>(op) ||
         std::holds_alternative<Add>(op) || std::holds_alternative<Multiply>(op) ||
         std::holds_alternative<Dropout>(op);
}
inline bool of_experts(const Operation& op) {
  return std::holds_alternative<Dispatch>(op) || std::holds_alternative<GroupedProduct>(op) ||
         std::holds_alternative<Combine>(op);
}
/// f(arguments) with memory for results that are rows like `like`'s; false: not for rows.
template <class F>
bool with_rows(const Context& c, const Arguments& a, F f) {
  if (of_experts(*c.operation)) return a.place && f(a);
  if (!any_rows(a)) return f(a);
  if (!a.place || a.accumulate || !takes_rows(*c.operation)) return false;
  const Rows* rows = nullptr;
  for (const auto* list : {&a.inputs, &a.output_gradients}) {
    for (const Tensor& t : *list) {
      if (t && t.rows != nullptr) rows = t.rows;
    }
  }
  if (rows == nullptr) return false;
  Arguments here = a;
  for (std::size_t k = 0; k < here.results.size(); ++k) {
    if (!here.results[k]) {
      if (std::holds_alternative<GatedActivation>(*c.operation)) return false;
      continue;
    }
  }
  for (std::size_t k = 0; k < here.results.size(); ++k) {
    Tensor& t = here.results[k];
    if (!t) continue;
    t.values = a.place(k, *rows);
    t.rows = rows;
  }
  return f(here);
}

/// One kernel of an operator; false where it has none for this case.
template <class M>
bool run_forward(M& m, const Context& c, const Arguments& a) {
  if (a.accumulate) return false;
  return with_rows(c, a, [&](const Arguments& here) {
    return std::visit([&](const auto& op) { return forward(m, op, c, here); }, *c.operation);
  });
}
template <class M>
bool run_backward_data(M& m, const Context& c, const Arguments& a) {
  if (a.accumulate && !std::holds_alternative<Linear>(*c.operation) &&
      !std::holds_alternative<GroupedProduct>(*c.operation))
    return false;
  return with_rows(c, a, [&](const Arguments& here) {
    return std::visit([&](const auto& op) { return data(m, op, c, here); }, *c.operation);
  });
}
template <class M>
bool run_backward_weight(M& m, const Context& c, const Arguments& a) {
  if (any_rows(a) && !of_experts(*c.operation)) return false;
  return std::visit([&](const auto& op) { return weight(m, op, c, a); }, *c.operation);
}
template <class M>
bool run_forward_statistic(M& m, const Context& c, std::size_t k, const Arguments& a) {
  if (any_rows(a)) return false;
  if (const auto* n = std::get_if<Normalize>(c.operation)) return statistic(m, *n, c, a);
  if (const auto* e = std::get_if<CrossEntropy>(c.operation)) return statistic(m, *e, k, a);
  return false;
}
template <class M>
bool run_backward_statistic(M& m, const Context& c, const Arguments& a) {
  if (any_rows(a)) return false;
  if (const auto* n = std::get_if<Normalize>(c.operation)) return backward_statistic(m, *n, c, a);
  return false;
}
template <class M>
bool run_attend_part(M& m, const Context& c, const Arguments& a) {
  return attend_part(m, std::get<Attention>(*c.operation), a);
}
template <class M>
bool run_attend_part_backward(M& m, const Context& c, const Arguments& a) {
  return attend_backward(m, std::get<Attention>(*c.operation), a, true);
}

}  // namespace partita::cuda
