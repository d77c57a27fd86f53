// RFC 4180 as tables use it; errors name the line.
#include "validation/csv.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include "base/error.h"

namespace partita::validation {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(Csv, QuotesHoldCommasLineEndsAndQuotes) {
  const CsvTable t = parse_csv("\xEF\xBB\xBFid,text\r\n1,\"a, \"\"b\"\"\nc\"\n\n2,\n3,d", "f.csv");
  EXPECT_THAT(t.header, ElementsAre("id", "text"));
  ASSERT_EQ(t.records.size(), 3u);
  EXPECT_THAT(t.records[0].fields, ElementsAre("1", "a, \"b\"\nc"));
  EXPECT_EQ(t.records[0].line, 2);
  EXPECT_THAT(t.records[1].fields, ElementsAre("2", ""));
  EXPECT_EQ(t.records[1].line, 5);
  EXPECT_THAT(t.records[2].fields, ElementsAre("3", "d"));
}

TEST(Csv, MistakesAreFoundWhereTheyAre) {
  const auto expect = [](const char* text, const char* message) {
    EXPECT_THAT([&] { parse_csv(text, "f.csv"); }, ThrowsMessage<InputError>(HasSubstr(message)))
        << text;
  };
  expect("", "f.csv: is empty");
  expect("\n\r\n", "f.csv: is empty");
  expect(
      "\xFF\xFE"
      "a",
      "f.csv: is UTF-16; save it as UTF-8");
  expect(
      "\xFE\xFF"
      "a",
      "f.csv: is UTF-16; save it as UTF-8");
  expect("a;b\n1;2\n", "f.csv:1: columns are separated by semicolons; save it with commas");
  expect("\n\na\tb\n", "f.csv:3: columns are separated by tabs; save it with commas");
  expect("a,b,a\n", "f.csv:1: column 'a' is named twice");
  expect("a,b\n1,2\n3\n", "f.csv:3: 1 fields, but 2 columns");
  expect("a,b\n1,2,3\n", "f.csv:2: 3 fields, but 2 columns");
  expect("a,b\n1,\"2\n3\n", "f.csv:2: a quoted field does not end");
  expect("a,b\n1,2\"3\n", "f.csv:2: a quote inside a field without quotes");
  expect("a,b\n\"1\"x,2\n", "f.csv:2: 'x' behind a closing quote");
}

/// What is written so comes back so.
RC_GTEST_PROP(Csv, AnyFieldsComeBack, ()) {
  const auto field =
      rc::gen::container<std::string>(rc::gen::elementOf(std::string("ab01,\"\n\r ;")));
  const auto columns = *rc::gen::inRange<std::size_t>(1, 5);
  const auto records = *rc::gen::container<std::vector<std::vector<std::string>>>(
      rc::gen::container<std::vector<std::string>>(columns, field));
  std::string text;
  const auto write = [&](const std::vector<std::string>& fields) {
    for (std::size_t i = 0; i < fields.size(); ++i) {
      text += i == 0 ? "\"" : ",\"";
      for (const char c : fields[i]) text += c == '"' ? std::string("\"\"") : std::string(1, c);
      text += '"';
    }
    text += "\r\n";
  };
  std::vector<std::string> header;
  for (std::size_t i = 0; i < columns; ++i) header.push_back("column " + std::to_string(i));
  write(header);
  for (const auto& r : records) write(r);
  const CsvTable t = parse_csv(text, "f.csv");
  RC_ASSERT(t.header == header);
  RC_ASSERT(t.records.size() == records.size());
  for (std::size_t i = 0; i < records.size(); ++i) RC_ASSERT(t.records[i].fields == records[i]);
}

}  // namespace
}  // namespace partita::validation
