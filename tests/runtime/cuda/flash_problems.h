// tests/runtime/cuda/flash_problems.h: attention as flash kernels compute it, against the
// reference's.
#pragma once

#include <random>

#include "tests/runtime/cuda/narrowed.h"

namespace partita::cuda {

/// Attention that flash kernels compute: heads of 8 to 128 numbers, tiles that end anywhere,
/// groups, masks, windows, sinks. `look` sees each kernel.
template <class K, ElementType kType, class F>
void expect_flash(F look) {
  std::mt19937_64 rng(21);
  const auto n = [&](std::int64_t low, std::int64_t high) {
    return reference::pick(rng, low, high);
  };
  for (int round = 0; round < 16; ++round) {
    Attention op;
    op.queries_per_head = n(1, 2);
    const bool wide = round % 2 == 0;
    op.qk_dim = 8 * (wide ? n(9, 16) : n(1, 8));
    op.v_dim = 8 * (wide ? n(1, 16) : n(1, 8));
    op.causal = round % 3 != 0;
    op.window = round % 4 == 1 ? n(1, 150) : 0;
    op.sinks = round % 5 == 4;
    const std::int64_t length = round < 4 ? n(1, 40) : n(120, 200);
    const NamedExtent sample{Dim::sample, round % 6 == 2 ? 2 : 1}, head{Dim::head, n(1, 2)},
        queries{Dim::sequence, length}, keys{Dim::sequence, op.causal ? length : n(1, 150)};
    const reference::Problem p = reference::make_problem(
        "flash", op,
        {{sample, queries, head, {Dim::head_feature, op.queries_per_head * op.qk_dim}},
         {sample, keys, head, {Dim::head_feature, op.qk_dim}},
         {sample, keys, head, {Dim::head_feature, op.v_dim}}},
        rng);
    SCOPED_TRACE(::testing::Message() << "round " << round << ", " << op.qk_dim << " and "
                                      << op.v_dim << ", " << length << " queries");
    expect_same_narrow<K, kType>(p, look);
    if (::testing::Test::HasFailure()) return;
  }
}

}  // namespace partita::cuda
