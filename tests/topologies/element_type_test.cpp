#include "base/element_type.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "base/error.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(ElementType, EveryNameParsesBackToItsType) {
  for (const ElementType type : kElementTypes)
    EXPECT_EQ(parse_element_type(name(type), "test"), type);
  EXPECT_EQ(parse_element_type("bfloat16", "test"), ElementType::bf16);
  EXPECT_EQ(parse_element_type("FP32", "test"), ElementType::fp32);
}

TEST(ElementType, AnUnknownNameGetsASuggestion) {
  EXPECT_THAT([] { parse_element_type("bf6", "--precision"); },
              ThrowsMessage<InputError>(HasSubstr("--precision: unknown element type 'bf6'")));
  EXPECT_THAT([] { parse_element_type("bf6", "--precision"); },
              ThrowsMessage<InputError>(HasSubstr("did you mean 'bf16'?")));
}

TEST(ElementType, StorageCountsTheScalesOfBlockFormats) {
  EXPECT_EQ(storage(ElementType::fp32, 64), 256_B);
  EXPECT_EQ(storage(ElementType::tf32, 64), 256_B);
  EXPECT_EQ(storage(ElementType::bf16, 64), 128_B);
  EXPECT_EQ(storage(ElementType::fp8, 64), 64_B);
  EXPECT_EQ(storage(ElementType::mxfp8, 64), 66_B);  // 64 + 64/32
  EXPECT_EQ(storage(ElementType::nvfp4, 64), 36_B);  // 64/2 + 64/16
  EXPECT_EQ(storage(ElementType::nvfp4, 17), 11_B);  // 9 + 2
  EXPECT_EQ(storage(ElementType::nvfp4, 0), 0_B);
}

TEST(Rounding, KeepsWhatTheFormatCanHold) {
  const auto one = [](ElementType type, double x) {
    round_values(type, &x, 1);
    return x;
  };
  EXPECT_EQ(one(ElementType::bf16, 1 + 0x1p-8), 1) << "half-way, to even";
  EXPECT_EQ(one(ElementType::bf16, 1 + 3 * 0x1p-8), 1 + 0x1p-6);
  EXPECT_EQ(one(ElementType::fp16, 65519), 65504);
  EXPECT_EQ(one(ElementType::fp16, 65520), INFINITY);
  EXPECT_EQ(one(ElementType::fp16, 0x1p-25), 0) << "half the smallest, to even";
  EXPECT_EQ(one(ElementType::fp16, 3 * 0x1p-25), 0x1p-23);
  EXPECT_EQ(one(ElementType::tf32, 1 + 0x1p-11), 1);
  EXPECT_EQ(one(ElementType::fp32, 1 + 0x1p-24), 1);
  for (const ElementType type : kElementTypes) {
    EXPECT_EQ(one(type, 0), 0);
    if (type == ElementType::int8) continue;
    EXPECT_EQ(one(type, -1.5), -1.5) << name(type);
  }
}

TEST(Rounding, IsWithinHalfASpacingOfEveryFormat) {
  std::mt19937_64 rng{5};
  std::normal_distribution<double> normal;
  for (const ElementType type : kElementTypes) {
    std::vector<double> x(96), y;
    for (double& v : x) v = normal(rng);
    y = x;
    round_values(type, y.data(), y.size());
    double largest = 0;
    for (const double v : x) largest = std::max(largest, std::abs(v));
    const bool blocks = bits(type) <= 8;
    for (std::size_t i = 0; i < x.size(); ++i) {
      // Whole numbers are equally far apart; small values of a block have the block's scale.
      const double scale = type == ElementType::int8 ? largest
                           : blocks                  ? std::max(std::abs(x[i]), largest / 4)
                                                     : std::abs(x[i]);
      EXPECT_LE(std::abs(x[i] - y[i]), spacing(type) / 2 * scale * 1.26)
          << name(type) << " " << x[i];
    }
    auto again = y;
    round_values(type, again.data(), again.size());
    if (blocks) continue;
    EXPECT_EQ(again, y) << name(type);
  }
}

}  // namespace
}  // namespace partita
