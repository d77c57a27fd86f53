// --backend: what the command says where it cannot have it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/cli/run.h"

namespace partita {
namespace {

TEST(Backend, WithoutAGpuTheCommandSaysSoInOneLine) {
  const test::Ran r = test::run("run mnist-linear --backend cuda --steps 1 --no-check");
  if (r.code == 0) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ(r.code, 2);
  EXPECT_EQ(r.out, "");
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_THAT(r.err, ::testing::StartsWith("partita: --backend: "));
  // Not built, or not there: what to do.
  EXPECT_THAT(r.err, ::testing::ContainsRegex("use (--backend )?cpu"));
  EXPECT_EQ(test::run("validate --backend cuda").code, 2);
}

TEST(Backend, SharedGpusAreCudas) {
  const test::Ran r = test::run("run mnist-linear --share-gpu");
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.err, ::testing::HasSubstr("--share-gpu: is for --backend cuda"));
}

}  // namespace
}  // namespace partita
