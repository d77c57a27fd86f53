// tests/runtime/cpu/passes.h: a problem's passes by the CPU's kernels, or those of a type with its
// functions, as the executor asks for them.
#pragma once

#include <functional>
#include <vector>

#include "runtime/cpu/kernels.h"
#include "tests/runtime/reference/problems.h"

namespace partita::cpu {

/// A piece in fp32 memory, as the executor holds it.
struct Held {
  std::vector<Indices> index;
  std::vector<float> values;
  std::vector<std::int64_t> ids;
  std::vector<Row> rows;
  bool routed = false, present = false;
  Tensor tensor() {
    Tensor t;
    if (!present) return t;
    t.index = &index;
    t.values = ids.empty() ? values.data() : nullptr;
    t.ids = ids.empty() ? nullptr : ids.data();
    if (routed) t.rows = &rows;
    return t;
  }
};
inline Held held(const reference::Piece* p, bool ids = false) {
  Held h;
  if (p == nullptr) return h;
  h.present = true;
  h.index = p->index;
  h.rows = p->rows;
  h.routed = p->routed;
  h.values.assign(p->values.begin(), p->values.end());
  if (ids) {
    for (const double v : p->values) h.ids.push_back(std::llround(v));
  }
  return h;
}
inline std::vector<Held> held(const std::vector<reference::Piece>& pieces) {
  std::vector<Held> all;
  for (const reference::Piece& p : pieces) all.push_back(held(&p));
  return all;
}
inline std::vector<Tensor> tensors(std::vector<Held>& list) {
  std::vector<Tensor> all;
  for (Held& h : list) all.push_back(h.tensor());
  return all;
}

/// One rank's problem beside the reference's results (`want` has run all its passes): statistics
/// are the CPU's own, gradients above the problem's.
template <class K>
class PassesBy {
 public:
  PassesBy(const reference::Problem& p, const reference::Part& want)
      : want_(want), kernel_(want.context) {
    kernel_.set_step(want.context.step, want.context.first_sample);
    const bool ids = std::holds_alternative<Embedding>(p.operation);
    const bool labels = std::holds_alternative<CrossEntropy>(p.operation);
    parameters_ = held(want.parameters), outputs_ = held(want.outputs);
    gradients_ = held(want.output_gradients);
    for (std::size_t i = 0; i < want.inputs.size(); ++i)
      inputs_.push_back(held(&want.inputs[i], (ids && i == 0) || (labels && i == 1)));
    // Extras: masks and log-sum-exps, written by the forward.
    for (const Extra& e : p.signature.extras) {
      reference::Piece z;
      for (std::size_t d = 0; d < e.operand.shape.size(); ++d)
        z.index.push_back(reference::touched(want.context, e.operand, d));
      extras_.push_back(held(&z));
      std::size_t n = 1;
      for (const auto& list : z.index) n *= list.size();
      extras_.back().values.resize(n);
    }
    base_.inputs = tensors(inputs_);
    base_.parameters = tensors(parameters_);
    base_.extras = tensors(extras_);
    base_.whole_statistics = true;
    statistics_ = held(want.statistics);
    for (std::size_t k = 0; k < statistics_.size(); ++k) {
      Arguments a = base_;
      for (std::size_t j = 0; j < k; ++j) a.statistics.push_back(statistics_[j].tensor());
      a.results = {statistics_[k].tensor()};
      kernel_.forward_statistic(k, a);
    }
    base_.statistics = tensors(statistics_);
  }

  /// Values by result, in the order of the reference's; empty where there is none.
  std::vector<std::vector<float>> forward() {
    return run(want_.outputs, false, [&](const Arguments& a) { kernel_.forward(a); });
  }
  /// After `forward`.
  void prepare_backward() {
    base_.outputs = tensors(outputs_);
    base_.output_gradients = tensors(gradients_);
    backward_ = held(want_.backward_statistics);
    for (std::size_t k = 0; k < backward_.size(); ++k) {
      Arguments a = base_;
      a.results = {backward_[k].tensor()};
      kernel_.backward_statistic(k, a);
    }
    base_.backward_statistics = tensors(backward_);
  }
  std::vector<std::vector<float>> backward_data() {
    return run(want_.input_gradients, false, [&](const Arguments& a) { kernel_.backward_data(a); });
  }
  /// `accumulates`: on top of 0.5 everywhere.
  std::vector<std::vector<float>> backward_weight(bool accumulates) {
    return run(want_.parameter_gradients, accumulates,
               [&](const Arguments& a) { kernel_.backward_weight(a); });
  }
  const K& kernel() const { return kernel_; }

 private:
  std::vector<std::vector<float>> run(const std::vector<reference::Piece>& expected,
                                      bool accumulates,
                                      const std::function<void(const Arguments&)>& pass) {
    std::vector<Held> results;
    for (const reference::Piece& e : expected) {
      results.push_back(held(e.index.empty() && e.values.empty() ? nullptr : &e));
      std::fill(results.back().values.begin(), results.back().values.end(),
                accumulates ? 0.5f : NAN);
    }
    Arguments a = base_;
    a.results = tensors(results);
    a.accumulate = accumulates;
    kernel_.routed.clear();
    pass(a);
    std::vector<std::vector<float>> values;
    for (std::size_t k = 0; k < expected.size(); ++k) {
      if (results[k].present && expected[k].routed) {
        EXPECT_EQ(kernel_.routed.at(k).rows, expected[k].rows);
        values.push_back(kernel_.routed[k].values);
      } else {
        values.push_back(results[k].present ? results[k].values : std::vector<float>{});
      }
    }
    return values;
  }

  const reference::Part& want_;
  K kernel_;
  std::vector<Held> inputs_, parameters_, outputs_, gradients_, extras_, statistics_, backward_;
  Arguments base_;
};
using PassesOnCpu = PassesBy<Kernel>;

}  // namespace partita::cpu
