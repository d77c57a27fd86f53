// The CPU's kernels against the reference's: every operator and option, whole and in blocks.
#include "runtime/cpu/kernels.h"

#include <gtest/gtest.h>

#include "tests/runtime/reference/problems.h"

namespace partita::cpu {
namespace {

using reference::Context;
using reference::Operands;
using reference::Piece;
using reference::Problem;

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
Held held(const Piece* p, bool ids = false) {
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
std::vector<Held> held(const std::vector<Piece>& pieces) {
  std::vector<Held> all;
  for (const Piece& p : pieces) all.push_back(held(&p));
  return all;
}
std::vector<Tensor> tensors(std::vector<Held>& list) {
  std::vector<Tensor> all;
  for (Held& h : list) all.push_back(h.tensor());
  return all;
}

void expect_close(const std::vector<float>& got, const Piece& want, double start,
                  const std::string& what) {
  ASSERT_EQ(got.size(), want.values.size()) << what;
  double size = 1;
  for (const double v : want.values) size = std::max(size, std::abs(v));
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), want.values[i] + start, 2e-4 * size)
        << what << ", element " << i;
}

/// All passes of one rank's problem, by the reference's kernels and by the CPU's.
void expect_same(const Problem& p, reference::Part part) {
  std::vector<reference::Part> one{part};
  reference::run(one);
  const reference::Part& want = one[0];
  const Signature& s = p.signature;
  Kernel kernel(want.context);
  kernel.set_step(want.context.step, want.context.first_sample);
  const bool ids = std::holds_alternative<Embedding>(p.operation);
  const bool labels = std::holds_alternative<CrossEntropy>(p.operation);
  std::vector<Held> inputs, parameters = held(want.parameters), outputs = held(want.outputs),
                            gradients = held(want.output_gradients);
  for (std::size_t i = 0; i < want.inputs.size(); ++i)
    inputs.push_back(held(&want.inputs[i], (ids && i == 0) || (labels && i == 1)));
  // Extras: masks and log-sum-exps, written by the forward.
  std::vector<Held> extras;
  for (const Extra& e : s.extras) {
    Piece z;
    for (std::size_t d = 0; d < e.operand.shape.size(); ++d)
      z.index.push_back(reference::touched(want.context, e.operand, d));
    extras.push_back(held(&z));
    std::size_t n = 1;
    for (const auto& list : z.index) n *= list.size();
    extras.back().values.resize(n);
  }
  Arguments base;
  base.inputs = tensors(inputs);
  base.parameters = tensors(parameters);
  base.extras = tensors(extras);
  base.whole_statistics = true;
  std::vector<Held> statistics = held(want.statistics);
  for (std::size_t k = 0; k < statistics.size(); ++k) {
    Arguments a = base;
    for (std::size_t j = 0; j < k; ++j) a.statistics.push_back(statistics[j].tensor());
    a.results = {statistics[k].tensor()};
    kernel.forward_statistic(k, a);
  }
  base.statistics = tensors(statistics);
  const auto compare = [&](Arguments a, const std::vector<Piece>& expected, const std::string& what,
                           auto pass, bool accumulates) {
    std::vector<Held> results;
    for (const Piece& e : expected) {
      results.push_back(held(e.index.empty() && e.values.empty() ? nullptr : &e));
      std::fill(results.back().values.begin(), results.back().values.end(),
                accumulates ? 0.5f : NAN);
    }
    a.results = tensors(results);
    a.accumulate = accumulates;
    kernel.routed.clear();
    pass(a);
    for (std::size_t k = 0; k < expected.size(); ++k) {
      if (!results[k].present) continue;
      if (expected[k].routed) {
        ASSERT_EQ(kernel.routed.at(k).rows, expected[k].rows) << what;
        expect_close(kernel.routed[k].values, expected[k], 0, what);
      } else {
        expect_close(results[k].values, expected[k], accumulates ? 0.5 : 0, what);
      }
    }
  };
  compare(
      base, want.outputs, "forward", [&](const Arguments& a) { kernel.forward(a); }, false);
  base.outputs = tensors(outputs);
  base.output_gradients = tensors(gradients);
  std::vector<Held> backward = held(want.backward_statistics);
  for (std::size_t k = 0; k < backward.size(); ++k) {
    Arguments a = base;
    a.results = {backward[k].tensor()};
    kernel.backward_statistic(k, a);
  }
  base.backward_statistics = tensors(backward);
  compare(
      base, want.input_gradients, "backward by data",
      [&](const Arguments& a) { kernel.backward_data(a); }, false);
  if (s.parameters.empty()) return;
  for (const bool accumulates : {false, true})
    compare(
        base, want.parameter_gradients, "backward by weight",
        [&](const Arguments& a) { kernel.backward_weight(a); }, accumulates);
}

TEST(CpuKernels, EqualTheReferencesOnWholeProblems) {
  std::mt19937_64 rng(17);
  for (int round = 0; round < 12; ++round) {
    for (const Problem& p : reference::problems(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", round " << round);
      expect_same(p, reference::whole_part(p));
      if (HasFatalFailure()) return;
    }
  }
}

}  // namespace
}  // namespace partita::cpu
