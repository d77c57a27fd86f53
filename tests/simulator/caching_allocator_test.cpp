#include "simulator/engine/caching_allocator.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace partita {
namespace {

TEST(CachingAllocator, PlaysThePagesExamples) {
  CachingAllocator a;
  const auto one = a.allocate(12_MiB), two = a.allocate(12_MiB);
  a.free(one);
  a.free(two);
  a.allocate(13_MiB);
  EXPECT_EQ(a.reserved(), 38_MiB);
  EXPECT_EQ(a.allocated(), 14_MiB);  // 1 MiB is not split off

  CachingAllocator b;
  const auto first = b.allocate(3_MiB);
  b.allocate(3_MiB);
  b.free(first);
  b.allocate(4_MiB);
  EXPECT_EQ(b.reserved(), 20_MiB);
  EXPECT_EQ(b.allocated(), 7_MiB);
}

/// docs/simulation.md, "Memory".
TEST(BlocksBySize, AreTakenAgainByRequestsOfTheirSizeAlone) {
  BlocksBySize a;
  const auto one = a.allocate(100_B), two = a.allocate(128_B);
  EXPECT_EQ(a.peak_reserved(), 256_B) << "both are blocks of 128 B";
  a.free(one);
  a.allocate(65_B);
  EXPECT_EQ(a.peak_reserved(), 256_B);
  a.free(two);
  a.allocate(64_B);
  EXPECT_EQ(a.peak_reserved(), 320_B) << "of another size";
  a.allocate(128_B);
  EXPECT_EQ(a.peak_reserved(), 320_B);
  a.allocate(129_B);
  EXPECT_EQ(a.peak_reserved(), 512_B);
}

TEST(CachingAllocator, CutsSegmentsBySize) {
  const auto reserved = [](Bytes n) {
    CachingAllocator a;
    a.allocate(n);
    return a.reserved();
  };
  EXPECT_EQ(reserved(1_B), 2_MiB);
  EXPECT_EQ(reserved(1_MiB), 2_MiB);
  EXPECT_EQ(reserved(1_MiB + 1_B), 20_MiB);
  EXPECT_EQ(reserved(10_MiB - 512_B), 20_MiB);
  EXPECT_EQ(reserved(10_MiB), 10_MiB);
  EXPECT_EQ(reserved(10_MiB + 1_B), 12_MiB);
  CachingAllocator a;
  a.allocate(1_B);
  EXPECT_EQ(a.allocated(), 512_B);
  a.allocate(513_B);
  EXPECT_EQ(a.allocated(), 1536_B);
}

TEST(CachingAllocator, KeepsWhatIsTooSmallToSplitOff) {
  // A freed 12 MiB serves 11 MiB whole: 1 MiB is not more than 1 MiB; of 10 MiB 2 MiB are left.
  CachingAllocator a;
  a.free(a.allocate(12_MiB));
  const auto whole = a.allocate(11_MiB);
  EXPECT_EQ(a.allocated(), 12_MiB);
  a.free(whole);
  a.allocate(10_MiB);
  EXPECT_EQ(a.allocated(), 10_MiB);
  EXPECT_EQ(a.reserved(), 12_MiB);
}

TEST(CachingAllocator, TakesTheSmallestBlockThatIsLargeEnough) {
  CachingAllocator a;
  const auto large = a.allocate(40_MiB), medium = a.allocate(20_MiB);
  a.free(large);
  a.free(medium);
  a.allocate(20_MiB);  // the medium one, so that the large one is still whole
  a.allocate(40_MiB);
  EXPECT_EQ(a.reserved(), 60_MiB);
}

TEST(CachingAllocator, MergesNeighboursInAnyOrder) {
  for (const bool forwards : {true, false}) {
    CachingAllocator a;
    std::vector<CachingAllocator::Handle> parts;
    a.free(a.allocate(30_MiB));
    for (int i = 0; i < 3; ++i) parts.push_back(a.allocate(10_MiB));
    EXPECT_EQ(a.reserved(), 30_MiB);
    a.free(parts[1]);
    a.free(parts[forwards ? 0 : 2]);
    a.free(parts[forwards ? 2 : 0]);
    a.allocate(30_MiB);
    EXPECT_EQ(a.reserved(), 30_MiB);
  }
}

TEST(CachingAllocator, ReturnsWholeSegmentsWhenTheDeviceIsFull) {
  CachingAllocator a(50_MiB);
  a.free(a.allocate(30_MiB));
  a.allocate(40_MiB);
  EXPECT_EQ(a.reserved(), 40_MiB);
  EXPECT_EQ(a.peak_reserved(), 40_MiB);
  EXPECT_TRUE(a.fits());
  // A segment with anything in it stays.
  CachingAllocator b(50_MiB);
  b.free(b.allocate(30_MiB));
  b.allocate(12_MiB);
  b.allocate(40_MiB);
  EXPECT_EQ(b.peak_reserved(), 70_MiB);
  EXPECT_FALSE(b.fits());
}

TEST(CachingAllocator, ObeysItsLawsOnRandomSequences) {
  std::mt19937 rng{20261127};
  for (int round = 0; round < 200; ++round) {
    CachingAllocator a;
    std::vector<CachingAllocator::Handle> alive;
    std::int64_t most = 0;
    for (int step = 0; step < 400; ++step) {
      if (!alive.empty() && rng() % 5 < 2) {
        const std::size_t at = rng() % alive.size();
        a.free(alive[at]);
        alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(at));
      } else {
        alive.push_back(
            a.allocate(Bytes{1 + static_cast<std::int64_t>(rng() % (1u << (rng() % 27)))}));
      }
      most = std::max(most, a.allocated().count);
      ASSERT_GE(a.reserved(), a.allocated());
      ASSERT_EQ(a.reserved().count % (2 << 20), 0);
      ASSERT_EQ(a.reserved(), a.peak_reserved());  // without a limit nothing goes back
    }
    for (const auto h : alive) a.free(h);
    EXPECT_EQ(a.allocated(), 0_B);
    EXPECT_GE(a.peak_reserved().count, most);
  }
}

}  // namespace
}  // namespace partita
