#include "base/units.h"

#include <gtest/gtest.h>

#include <type_traits>

#include "base/error.h"

namespace partita {
namespace {

// One hand-computed fact per operator.
static_assert(64_GB / 16.0_GBps == 4.0_s);
static_assert(64_GB / 4.0_s == 16.0_GBps);
static_assert(Flops{2e12} / 4.0_TFLOPps == Seconds{0.5});
static_assert(Flops{2e12} / Seconds{0.5} == 4.0_TFLOPps);
static_assert(ceil_div(10_B, 4) == 3_B && ceil_div(8_B, 4) == 2_B && ceil_div(0_B, 4) == 0_B);
static_assert(1_KiB == 1024_B && 1_MiB == 1048576_B && 1_GiB == 1073741824_B &&
              1_GB == 1000000000_B);

template <class A, class B>
concept Multiplies = requires(A a, B b) {
  a* b;
};
template <class A, class B>
concept Adds = requires(A a, B b) {
  a + b;
};
static_assert(!Adds<Bytes, Seconds> && !Adds<Seconds, Ticks> && !Multiplies<Bytes, Bytes>);
static_assert(!std::is_convertible_v<double, Seconds> && !std::is_convertible_v<Seconds, double>);

TEST(Ticks, RoundUpToWholePicoseconds) {
  EXPECT_EQ(to_ticks(Seconds{0}), Ticks{0});
  EXPECT_EQ(to_ticks(Seconds{1.2e-12}), Ticks{2});
  EXPECT_EQ(to_ticks(Seconds{1}), Ticks{1'000'000'000'000});
}

TEST(Ticks, RefuseTimesThatOverflow) {
  EXPECT_THROW(to_ticks(Seconds{-1e-12}), InternalError);
  EXPECT_THROW(to_ticks(Seconds{1e7}), InputError);
  EXPECT_NO_THROW(to_ticks(Seconds{9e6}));
}

}  // namespace
}  // namespace partita
