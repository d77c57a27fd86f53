#include "base/element_type.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
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
  constexpr std::array kOffered{ElementType::bf16, ElementType::fp8};
  EXPECT_THAT([&] { parse_element_type("int4", "--precision", kOffered); },
              ThrowsMessage<InputError>(::testing::EndsWith("use one of bf16, fp8")));
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
    // A scale in fp32 and its inverse make 1 only so far.
    EXPECT_NEAR(one(type, -1.5), -1.5, type == ElementType::fp8 ? 0x1p-23 : 0) << name(type);
  }
}

// ---- 8-bit formats

/// What a code stands for, from the definition (OCP 8-bit Floating Point Specification v1.0, table
/// 2): (-1)^s 2^(e - bias) (1 + m / 2^digits), subnormal below e = 1.
double value_of(EightBits format, int code) {
  const int digits = format == EightBits::e4m3 ? 3 : 2, bias = format == EightBits::e4m3 ? 7 : 15;
  const int m = code & ((1 << digits) - 1), e = (code & 0x7f) >> digits;
  const double sign = (code & 0x80) != 0 ? -1 : 1, part = m / std::ldexp(1, digits);
  if (format == EightBits::e4m3 && e == 15 && m == 7) return NAN;
  if (format == EightBits::e5m2 && e == 31) return m == 0 ? sign * INFINITY : NAN;
  return sign * (e == 0 ? std::ldexp(part, 1 - bias) : std::ldexp(1 + part, e - bias));
}
/// The finite values from 0, in order of their codes.
std::vector<double> values_of(EightBits format) {
  std::vector<double> all;
  for (int code = 0; code < 0x80; ++code) {
    const double v = value_of(format, code);
    if (std::isfinite(v)) all.push_back(v);
  }
  return all;
}
/// Beside the largest of its format, so that the scale is 1.
double one_eight(EightBits format, double x) {
  double pair[] = {x, static_cast<double>(largest(format))};
  round_eights(format, pair, 2);
  return pair[0];
}

TEST(EightBits, FormatsAreTheSpecifications) {
  // Table 2: largest 448 and 57,344, smallest normal 2^-6 and 2^-14, smallest 2^-9 and 2^-16.
  const auto e4m3 = values_of(EightBits::e4m3), e5m2 = values_of(EightBits::e5m2);
  ASSERT_EQ(e4m3.size(), 127u);
  ASSERT_EQ(e5m2.size(), 124u);
  EXPECT_EQ(e4m3.back(), 448);
  EXPECT_EQ(e5m2.back(), 57344);
  EXPECT_EQ(e4m3[1], 0x1p-9);
  EXPECT_EQ(e5m2[1], 0x1p-16);
  EXPECT_EQ(e4m3[8], 0x1p-6);
  EXPECT_EQ(e5m2[4], 0x1p-14);
}

TEST(EightBits, EveryValueOfAFormatStays) {
  for (const EightBits f : {EightBits::e4m3, EightBits::e5m2}) {
    for (const double v : values_of(f)) {
      EXPECT_EQ(one_eight(f, v), v);
      EXPECT_EQ(one_eight(f, -v), -v);
      EXPECT_EQ(std::signbit(one_eight(f, -v)), true) << v;
    }
  }
}

/// To the nearest of all values, ties to the even code, in every interval between two.
TEST(EightBits, RoundToTheNearestAndTiesToEven) {
  std::mt19937_64 rng{20261130};
  for (const EightBits f : {EightBits::e4m3, EightBits::e5m2}) {
    const auto all = values_of(f);
    for (std::size_t k = 0; k + 1 < all.size(); ++k) {
      const double low = all[k], high = all[k + 1], middle = (low + high) / 2;
      const double even = k % 2 == 0 ? low : high;
      EXPECT_EQ(one_eight(f, middle), even) << middle;
      EXPECT_EQ(one_eight(f, -middle), -even) << middle;
      const auto next = [&](double to) {
        return static_cast<double>(
            std::nextafter(static_cast<float>(middle), static_cast<float>(to)));
      };
      EXPECT_EQ(one_eight(f, next(low)), low) << middle;
      EXPECT_EQ(one_eight(f, next(high)), high) << middle;
      for (int n = 0; n < 4; ++n) {
        const double x = static_cast<double>(static_cast<float>(
            low + (high - low) * std::uniform_real_distribution<double>{0, 1}(rng)));
        if (x == middle) continue;
        EXPECT_EQ(one_eight(f, x), x < middle ? low : high) << x;
        EXPECT_LE(std::abs(one_eight(f, x) - x), std::max(x * spacing(f) / 2, all[1] / 2)) << x;
      }
    }
  }
}

TEST(EightBits, ATensorIsScaledByItsLargestAsTransformerEngineDoes) {
  EXPECT_EQ(scale_of(EightBits::e4m3, 2), 224);
  EXPECT_EQ(scale_of(EightBits::e5m2, 2), 28672);
  EXPECT_EQ(scale_of(EightBits::e5m2, 3), 57344.0f / 3.0f);
  // Nothing, what no scale brings down, and what no scale brings up.
  EXPECT_EQ(scale_of(EightBits::e4m3, 0), 1);
  EXPECT_EQ(scale_of(EightBits::e4m3, INFINITY), 1);
  EXPECT_EQ(scale_of(EightBits::e4m3, NAN), 1);
  EXPECT_EQ(scale_of(EightBits::e4m3, 0x1p-149f), std::numeric_limits<float>::max());
  EXPECT_EQ(scale_of(EightBits::e5m2, std::numeric_limits<float>::max()),
            57344.0f / std::numeric_limits<float>::max());
  // docs/execution.md, "Products in fp8".
  double x[] = {1, 0.4}, g[] = {1, 0.4};
  round_eights(EightBits::e4m3, x, 2);
  round_eights(EightBits::e5m2, g, 2);
  EXPECT_NEAR(x[1], 176.0 / 448, 1e-7);
  EXPECT_NEAR(g[1], 24576.0 / 57344, 1e-7);
  EXPECT_NEAR(x[1] + g[1], 0.8214, 5e-5);
}

TEST(EightBits, WhatIsNoNumberStaysNoneAndInfinitiesSaturate) {
  for (const EightBits f : {EightBits::e4m3, EightBits::e5m2}) {
    double x[] = {NAN, 1, -2, 0};
    round_eights(f, x, 4);
    EXPECT_TRUE(std::isnan(x[0]));
    EXPECT_NEAR(x[1], 1, 1e-6) << "NaN is no largest";
    EXPECT_NEAR(x[2], -2, 1e-6);
    EXPECT_EQ(x[3], 0);
    // With an infinity the scale is 1, and what is beyond the format's largest becomes that.
    double y[] = {INFINITY, -INFINITY, 1e6, 1};
    round_eights(f, y, 4);
    const auto most = static_cast<double>(largest(f));
    EXPECT_EQ(y[0], most);
    EXPECT_EQ(y[1], -most);
    EXPECT_EQ(y[2], most);
    EXPECT_EQ(y[3], 1);
    double none[] = {0.0, -0.0};
    round_eights(f, none, 2);
    EXPECT_EQ(none[0], 0);
    EXPECT_EQ(none[1], 0);
    round_eights(f, none, 0);
  }
}

TEST(EightBits, FormatsOfProductsHaveNames) {
  for (const Fp8Format f : kFp8Formats) EXPECT_EQ(parse_fp8_format(name(f), "test"), f);
  EXPECT_EQ(of_gradients(Fp8Format::hybrid), EightBits::e5m2);
  EXPECT_EQ(of_gradients(Fp8Format::e4m3), EightBits::e4m3);
  EXPECT_THAT([] { parse_fp8_format("e5m2", "plan.fp8_format"); },
              ThrowsMessage<InputError>(
                  HasSubstr("plan.fp8_format: 'e5m2' is no format of products in fp8")));
  EXPECT_THAT([] { parse_fp8_format("e4m2", ""); },
              ThrowsMessage<InputError>(HasSubstr("did you mean 'e4m3'?")));
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
