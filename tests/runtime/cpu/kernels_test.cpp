// The CPU's kernels against the reference's: every operator and option, whole and in blocks.
#include "tests/runtime/cpu/equal_reference.h"

namespace partita::cpu {
namespace {

TEST(CpuKernels, EqualTheReferencesOnWholeProblems) {
  std::mt19937_64 rng(17);
  for (int round = 0; round < 12; ++round) {
    for (const Problem& p : reference::problems(rng)) {
      SCOPED_TRACE(::testing::Message() << p.label << ", round " << round);
      expect_same<Kernel>(p, reference::whole_part(p), [](const Kernel&) {});
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CpuKernels, PartsOfARingEqualTheReferences) { expect_parts_equal<Kernel>(); }

}  // namespace
}  // namespace partita::cpu
