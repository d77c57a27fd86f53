// The CPU's kernels against the reference's: every operator and option, whole and in blocks.
#include <gtest/gtest.h>

#include "tests/runtime/cpu/passes.h"

namespace partita::cpu {
namespace {

using reference::Piece;
using reference::Problem;

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
  std::vector<reference::Part> one{std::move(part)};
  reference::run(one);
  const reference::Part& want = one[0];
  PassesOnCpu passes(p, want);
  const auto compare = [&](const std::vector<std::vector<float>>& got,
                           const std::vector<Piece>& expected, double start,
                           const std::string& what) {
    for (std::size_t k = 0; k < expected.size(); ++k)
      expect_close(got[k], expected[k], start, what);
  };
  compare(passes.forward(), want.outputs, 0, "forward");
  passes.prepare_backward();
  compare(passes.backward_data(), want.input_gradients, 0, "backward by data");
  if (p.signature.parameters.empty()) return;
  for (const bool accumulates : {false, true})
    compare(passes.backward_weight(accumulates), want.parameter_gradients, accumulates ? 0.5 : 0,
            "backward by weight");
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
