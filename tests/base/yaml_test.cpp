#include "base/yaml.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"

namespace partita {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

YamlNode doc(const std::string& body) {
  return YamlNode::load_text("schema: t/1\n" + body, "f.yaml", "t/1");
}

TEST(Yaml, NamesFileLineAndPath) {
  const auto node = doc("a:\n  b: [1, x]\n");
  EXPECT_THAT([&] { node.get("a").get("b").as_ints(); },
              ThrowsMessage<InputError>(HasSubstr("f.yaml:3: a.b[1]: 'x' is not a whole number")));
}

TEST(Yaml, SuggestsTheKeyThatWasMeant) {
  const auto node = doc("bandwith: 3 GB/s\n");
  EXPECT_FALSE(node.has("bandwidth"));
  EXPECT_THAT([&] { node.reject_unknown_keys(); },
              ThrowsMessage<InputError>(
                  AllOf(HasSubstr("f.yaml:2"), HasSubstr("did you mean 'bandwidth'?"))));
}

TEST(Yaml, CapitalsAreNoDistance) {
  EXPECT_EQ(nearest_of("TP", {"cp", "dp", "tp"}), "tp");
  EXPECT_EQ(nearest_of("megatron-core", {"Megatron-Core"}), "Megatron-Core");
  EXPECT_EQ(nearest_of("zzz", {"cp"}), "");
}

TEST(Yaml, AKeyWithoutAValueIsNoDefault) {
  const auto refused = [](const char* body, const char* where) {
    EXPECT_THAT([&] { doc(body).reject_empty_keys(); },
                ThrowsMessage<InputError>(HasSubstr(fmt::format(
                    "f.yaml:{}: has no value; give one, or leave the key out", where))));
  };
  refused("a: 1\nb:\n", "3: b");
  refused("a: {b: 1, c: }\n", "2: a.c");
  refused("a:\n  - {b: 1}\n  - {b: }\n", "4: a.b");
  EXPECT_NO_THROW(doc("a: [1, {b: [2]}]\nc: {d: e}\n").reject_empty_keys());
}

TEST(Yaml, RefusesDuplicateKeysWrongSchemasAndBrokenText) {
  const auto node = doc("a: 1\na: 2\n");
  node.get("a");
  EXPECT_THAT([&] { node.reject_unknown_keys(); },
              ThrowsMessage<InputError>(HasSubstr("given twice")));
  EXPECT_THAT([] { YamlNode::load_text("schema: t/2\n", "f", "t/1"); },
              ThrowsMessage<InputError>(HasSubstr("schema is 't/2'; this reads 't/1'")));
  EXPECT_THAT([] { YamlNode::load_text("a: [", "f", "t/1"); },
              ThrowsMessage<InputError>(HasSubstr("is not YAML")));
  EXPECT_THAT([] { YamlNode::load_text("- 1", "f", "t/1"); },
              ThrowsMessage<InputError>(HasSubstr("must be a map")));
  EXPECT_THAT([] { YamlNode::load_file("/no/such", "t/1"); },
              ThrowsMessage<InputError>(HasSubstr("cannot be read")));
}

TEST(Yaml, AFactorMultipliesWhatIsThereAndKeepsTheUnit) {
  EXPECT_EQ(multiplied("25 GB/s", "x2", "--vary"), "50 GB/s");
  EXPECT_EQ(multiplied("8", "x0.5", "--vary"), "4");
  EXPECT_EQ(multiplied("8", "16", "--vary"), "16");
  for (const char* word : {"x", "xx", "2x", "x2 GB", ""}) EXPECT_FALSE(multiplies(word)) << word;
  EXPECT_EQ(multiplied("8", "xx", "--vary"), "xx");
  EXPECT_THAT(
      [] { multiplied("silu", "x2", "--vary a=x2"); },
      ThrowsMessage<InputError>(HasSubstr("--vary a=x2: 'silu' cannot be multiplied by 2")));
}

TEST(Yaml, BoundsIntegers) {
  EXPECT_THAT([] { doc("n: 0\n").get("n").as_int(1); },
              ThrowsMessage<InputError>(HasSubstr("0 is too small; at least 1")));
  EXPECT_THAT([] { doc("n: 9\n").get("n").as_int(1, 8); },
              ThrowsMessage<InputError>(HasSubstr("9 is too large; at most 8")));
}

}  // namespace
}  // namespace partita
