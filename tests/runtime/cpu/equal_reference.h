// tests/runtime/cpu/equal_reference.h: kernels of a type with cpu::Kernel's functions against the
// reference's: every operator and option, and parts of a ring.
#pragma once

#include <gtest/gtest.h>

#include "runtime/reference/ring_attention.h"
#include "tests/runtime/cpu/passes.h"

namespace partita::cpu {

using reference::Piece;
using reference::Problem;

/// fp32 on small problems, relative to a tensor's largest value.
inline constexpr double kSingleBound = 2e-4;

inline void expect_close(const std::vector<float>& got, const Piece& want, double start,
                         const std::string& what, double bound = kSingleBound) {
  ASSERT_EQ(got.size(), want.values.size()) << what;
  double size = 1;
  for (const double v : want.values) size = std::max(size, std::abs(v));
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_NEAR(static_cast<double>(got[i]), want.values[i] + start, bound * size)
        << what << ", element " << i;
}

/// All passes of one rank's problem, by the reference's kernels and by K's. `look` sees K after
/// them.
template <class K, class F>
void expect_same(const Problem& p, reference::Part part, F look, double bound = kSingleBound) {
  std::vector<reference::Part> one{std::move(part)};
  reference::run(one);
  const reference::Part& want = one[0];
  PassesBy<K> passes(p, want);
  const auto compare = [&](const std::vector<std::vector<float>>& got,
                           const std::vector<Piece>& expected, double start,
                           const std::string& what) {
    for (std::size_t k = 0; k < expected.size(); ++k)
      expect_close(got[k], expected[k], start, what, bound);
  };
  compare(passes.forward(), want.outputs, 0, "forward");
  passes.prepare_backward();
  compare(passes.backward_data(), want.input_gradients, 0, "backward by data");
  if (!p.signature.parameters.empty()) {
    for (const bool accumulates : {false, true})
      compare(passes.backward_weight(accumulates), want.parameter_gradients, accumulates ? 0.5 : 0,
              "backward by weight");
  }
  look(passes.kernel());
}

/// A piece's positions along its second dimension, and their values.
inline Piece positions_of(const Piece& whole, const std::vector<std::int64_t>& at) {
  Piece part = whole;
  part.index[1] = at;
  part.values.clear();
  const std::size_t inner = whole.index[2].size() * whole.index[3].size();
  for (std::size_t b = 0; b < whole.index[0].size(); ++b) {
    for (const std::int64_t p : at) {
      const auto* from =
          &whole.values[(b * whole.index[1].size() + static_cast<std::size_t>(p)) * inner];
      part.values.insert(part.values.end(), from, from + inner);
    }
  }
  return part;
}

/// Random rings: two parts of the keys met one after the other.
template <class K>
void expect_parts_equal() {
  std::mt19937_64 rng(20261127);
  const auto n = [&](std::int64_t low, std::int64_t high) {
    return reference::pick(rng, low, high);
  };
  for (int round = 0; round < 40; ++round) {
    Attention op;
    op.queries_per_head = n(1, 3);
    op.qk_dim = n(1, 4);
    op.v_dim = n(1, 4);
    op.causal = round % 2 == 0;
    op.window = round % 3 == 0 ? n(1, 5) : 0;
    // More queries than one tile has, sometimes.
    const NamedExtent sample{Dim::sample, n(1, 2)}, head{Dim::head, n(1, 2)},
        sequence{Dim::sequence, round % 10 == 0 ? 70 : n(2, 9)};
    const Problem p = reference::make_problem(
        "ring", op,
        {{sample, sequence, head, {Dim::head_feature, op.queries_per_head * op.qk_dim}},
         {sample, sequence, head, {Dim::head_feature, op.qk_dim}},
         {sample, sequence, head, {Dim::head_feature, op.v_dim}}},
        rng);
    SCOPED_TRACE(round);
    // Two parts of the keys, contiguous or by turns, met one after the other by queries that are a
    // part themselves.
    std::vector<std::vector<std::int64_t>> parts(2);
    for (std::int64_t i = 0; i < sequence.extent; ++i)
      parts[static_cast<std::size_t>(round % 4 < 2 ? i * 2 / sequence.extent : i % 2)].push_back(i);
    const auto& mine = parts[static_cast<std::size_t>(round % 2)];
    const Piece q = positions_of(p.inputs[0], mine), dy = positions_of(p.output_gradient, mine);
    Piece y = reference::zeros(dy.index), dq = reference::zeros(q.index);
    Piece lse = reference::zeros(
        {q.index[0], q.index[2], reference::range(op.queries_per_head), q.index[1]});
    std::fill(lse.values.begin(), lse.values.end(), -INFINITY);
    Held fast_q = held(&q), fast_dy = held(&dy), fast_y = held(&y), fast_lse = held(&lse),
         fast_dq = held(&dq);
    K kernel(reference::whole_context(p));
    std::vector<Piece> keys, values;
    for (const auto& part : parts) {
      keys.push_back(positions_of(p.inputs[1], part));
      values.push_back(positions_of(p.inputs[2], part));
      reference::attend_part(op, q, keys.back(), values.back(), y, lse);
      Held k = held(&keys.back()), v = held(&values.back());
      Arguments a;
      a.inputs = {fast_q.tensor(), k.tensor(), v.tensor()};
      a.extras = {fast_lse.tensor()};
      a.results = {fast_y.tensor()};
      kernel.attend_part(a);
    }
    expect_close(fast_y.values, y, 0, "output");
    for (std::size_t i = 0; i < lse.values.size(); ++i) {
      if (std::isinf(lse.values[i])) {
        EXPECT_EQ(fast_lse.values[i], -INFINITY);
      } else {
        EXPECT_NEAR(static_cast<double>(fast_lse.values[i]), lse.values[i], 2e-5);
      }
    }
    for (std::size_t s = 0; s < parts.size(); ++s) {
      Piece dk = reference::zeros(keys[s].index), dv = reference::zeros(values[s].index);
      // On top of what is there.
      std::fill(dk.values.begin(), dk.values.end(), 0.5);
      Held k = held(&keys[s]), v = held(&values[s]), fast_dk = held(&dk), fast_dv = held(&dv);
      reference::attend_part_backward(op, q, keys[s], values[s], y, lse, dy, dq, dk, dv);
      Arguments a;
      a.inputs = {fast_q.tensor(), k.tensor(), v.tensor()};
      a.outputs = {fast_y.tensor()};
      a.output_gradients = {fast_dy.tensor()};
      a.extras = {fast_lse.tensor()};
      a.results = {fast_dq.tensor(), fast_dk.tensor(), fast_dv.tensor()};
      kernel.attend_part_backward(a);
      expect_close(fast_dk.values, dk, 0, "keys");
      expect_close(fast_dv.values, dv, 0, "values");
    }
    expect_close(fast_dq.values, dq, 0, "queries");
    if (::testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace partita::cpu
