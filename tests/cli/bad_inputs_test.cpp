// tests/cli/bad_inputs_test.cpp: each wrong input gets exactly its message, exit code 2, no output.
//
// tests/data/cli/bad_inputs.txt: "$ partita ARGUMENTS", then the message; `[...]` stands for a list
// that grows with the catalogue. After a wanted change run with PARTITA_UPDATE_GOLDENS=1 and review
// the difference.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "tests/cli/run.h"

namespace partita::test {
namespace {

struct Case {
  std::string arguments, message;
};

const std::string kPrompt = "$ partita ";

std::vector<Case> cases() {
  std::vector<Case> all;
  std::istringstream lines(read(PARTITA_TEST_DATA "/cli/bad_inputs.txt"));
  std::string line;
  while (std::getline(lines, line)) {
    if (line.rfind(kPrompt, 0) == 0)
      all.push_back({line.substr(kPrompt.size()), ""});
    else if (!line.empty() && line[0] != '#')
      all.at(all.size() - 1).message += line + "\n";
  }
  return all;
}

/// Equal but for what each `[...]` of the pattern stands for.
bool agrees(const std::string& pattern, const std::string& text) {
  const std::string any = "[...]";
  std::size_t from = 0, at = pattern.find(any);
  if (at == std::string::npos) return pattern == text;
  if (text.compare(0, at, pattern, 0, at) != 0) return false;
  from = at;
  for (std::size_t next; at != std::string::npos; at = next) {
    const std::size_t start = at + any.size();
    next = pattern.find(any, start);
    const std::string piece =
        pattern.substr(start, next == std::string::npos ? next : next - start);
    const std::size_t found = next == std::string::npos && text.size() >= piece.size()
                                  ? text.size() - piece.size()
                                  : text.find(piece, from);
    if (found == std::string::npos || found < from || text.compare(found, piece.size(), piece) != 0)
      return false;
    from = found + piece.size();
  }
  return true;
}

TEST(BadInputs, GiveTheirMessageExitCode2AndNoOutput) {
  const auto all = cases();
  EXPECT_GE(all.size(), 60u);
  std::string now =
      "# Wrong inputs and what the command says. [...] stands for a list that grows.\n";
  for (const Case& c : all) {
    SCOPED_TRACE("partita " + c.arguments);
    const Ran r = run(c.arguments);
    EXPECT_EQ(r.code, 2) << r.err;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err.rfind("partita: ", 0), 0u) << r.err;
    const bool good = agrees(c.message, r.err);
    EXPECT_TRUE(good || updating()) << "says    " << r.err << "instead " << c.message;
    now += fmt::format("\n{}{}\n{}", kPrompt, c.arguments, good ? c.message : r.err);
  }
  if (updating()) write(PARTITA_TEST_DATA "/cli/bad_inputs.txt", now);
}

TEST(BadInputs, AFolderOfDataThatIsNotThereIsNamedByEveryCommand) {
  for (const char* command : {"", "simulate gpt2 dgx-h100:1", "plan --help"}) {
    const Ran r = run(command, "env PARTITA_DATA=/nowhere");
    EXPECT_EQ(r.code, 2) << command;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err,
              "partita: /nowhere/simulator/plan/frameworks: cannot be read; set PARTITA_DATA to "
              "the folder that holds simulator/plan/frameworks\n");
  }
}

TEST(BadInputs, TheMatcherMatchesNoMoreThanItSays) {
  EXPECT_TRUE(agrees("a [...] b [...] c", "a 1, 2 b 3 c"));
  EXPECT_TRUE(agrees("there are [...]\n", "there are x, y\n"));
  EXPECT_FALSE(agrees("there are [...]; ok\n", "there are x, y\n"));
  EXPECT_FALSE(agrees("there are [...]\n", "there is x\n"));
  EXPECT_FALSE(agrees("a", "a b"));
  EXPECT_FALSE(agrees("[...] ab", "b"));
}

}  // namespace
}  // namespace partita::test
