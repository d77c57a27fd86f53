#include "base/element_type.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

}  // namespace
}  // namespace partita
