#include "base/unit_text.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.h"

namespace partita {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(UnitText, ReadsDecimalAndBinaryPrefixes) {
  EXPECT_EQ(parse_bytes("80 GiB", ""), 80_GiB);
  EXPECT_EQ(parse_bytes("80GB", ""), 80_GB);
  // Whole, though the product in doubles is not.
  for (std::int64_t n = 1; n < 10'000; ++n) {
    const std::string text = fmt::format("{}.{:02}", n / 100, n % 100);
    EXPECT_EQ(parse_bytes(text + " GB", ""), Bytes{n * 10'000'000}) << text;
    EXPECT_EQ(parse_bytes(text + " MB", ""), Bytes{n * 10'000}) << text;
  }
  EXPECT_EQ(parse_byte_rate("450 GB/s", ""), 450.0_GBps);
  EXPECT_EQ(parse_byte_rate("400 Gb/s", ""), 50.0_GBps);
  EXPECT_EQ(parse_seconds("1.5 us", ""), 1.5_us);
  EXPECT_EQ(parse_flop_rate("989.4 TFLOP/s", ""), 989.4_TFLOPps);
}

TEST(UnitText, RefusesWithPlaceValueAndRemedy) {
  EXPECT_THAT([] { parse_byte_rate("450", "a.yaml:3"); },
              ThrowsMessage<InputError>(HasSubstr("a.yaml:3: '450' has no unit")));
  EXPECT_THAT([] { parse_byte_rate("450 Gbps", ""); },
              ThrowsMessage<InputError>(HasSubstr("unknown unit 'Gbps'")));
  EXPECT_THAT([] { parse_bytes("much", ""); },
              ThrowsMessage<InputError>(HasSubstr("like \"80 GiB\"")));
  EXPECT_THAT([] { parse_byte_rate("0 GB/s", ""); },
              ThrowsMessage<InputError>(HasSubstr("must be > 0")));
  EXPECT_THAT([] { parse_seconds("-1 s", ""); },
              ThrowsMessage<InputError>(HasSubstr("must be >= 0")));
  EXPECT_THAT([] { parse_bytes("0.5 B", ""); },
              ThrowsMessage<InputError>(HasSubstr("whole number")));
  EXPECT_THAT([] { parse_bytes("nan GiB", ""); },
              ThrowsMessage<InputError>(HasSubstr("is not a size")));
  EXPECT_THAT([] { parse_bytes("20000 PB", ""); },
              ThrowsMessage<InputError>(HasSubstr("too large")));
}

TEST(UnitText, ExactTextParsesBackToTheSameQuantity) {
  std::mt19937_64 rng{7};
  for (int i = 0; i < 1000; ++i) {
    const double x = std::exp(std::uniform_real_distribution{-20.0, 30.0}(rng));
    EXPECT_EQ(parse_seconds(exact_text(Seconds{x}), ""), Seconds{x});
    EXPECT_EQ(parse_byte_rate(exact_text(BytesPerSecond{x}), ""), BytesPerSecond{x});
  }
}

TEST(UnitText, IsReadable) {
  EXPECT_EQ(text(85'899'345'920_B), "80 GiB");
  EXPECT_EQ(text(Seconds{0.0012345}), "1.234 ms");
  EXPECT_EQ(text(450.0_GBps), "450 GB/s");
  EXPECT_EQ(grouped(70553706496), "70,553,706,496");
  EXPECT_EQ(grouped(-1000), "-1,000");
  EXPECT_EQ(grouped(999), "999");
}

}  // namespace
}  // namespace partita
