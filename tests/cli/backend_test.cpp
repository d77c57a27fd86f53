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

// A node that was brought the command alone.
TEST(Backend, WithoutMpirunRanksTalkOverSockets) {
  const test::Ran r = test::run("run mnist-linear --dp 2 --steps 1 --json", "env PATH=/nowhere");
  EXPECT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, ::testing::HasSubstr("\"transport\": \"tcp\""));
  EXPECT_EQ(
      test::run("run mnist-linear --dp 2 --steps 1 --transport mpi", "env PATH=/nowhere").code, 2);
}

}  // namespace
}  // namespace partita
