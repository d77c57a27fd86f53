// tests/cli/goldens_test.cpp: whole commands and what they print, to the byte.
//
// tests/data/cli/NAME.golden: the arguments on the first line, then the output. After a wanted
// change run with PARTITA_UPDATE_GOLDENS=1 and review the difference.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <filesystem>
#include <regex>
#include <string>
#include <vector>

#include "tests/cli/run.h"

namespace partita::test {
namespace {

/// The one value that may differ from run to run.
std::string masked(const std::string& out) {
  static const std::regex table(R"(searched in [0-9.]+ s\n)"), json(R"("search_time_s": [^,]+,)");
  return std::regex_replace(std::regex_replace(out, table, "searched in # s\n"), json,
                            "\"search_time_s\": 0,");
}

TEST(Goldens, EveryCommandPrintsWhatItsFileSays) {
  std::vector<std::filesystem::path> files;
  for (const auto& e : std::filesystem::directory_iterator(PARTITA_TEST_DATA "/cli")) {
    if (e.path().extension() == ".golden") files.push_back(e.path());
  }
  std::sort(files.begin(), files.end());
  EXPECT_GE(files.size(), 10u);
  for (const auto& file : files) {
    const std::string text = read(file.string());
    const std::string arguments = text.substr(0, text.find('\n'));
    SCOPED_TRACE(file.filename().string() + ": partita " + arguments);
    const Ran r = run(arguments);
    EXPECT_EQ(r.code, 0);
    EXPECT_EQ(without_progress(r.err), "");
    const std::string now = arguments + "\n" + masked(r.out);
    if (updating())
      write(file.string(), now);
    else
      EXPECT_EQ(now, text);
  }
}

/// What the pages quote of goldens' step times is what these say.
TEST(Goldens, PagesQuoteThem) {
  const auto captured = [](const std::string& text, const char* pattern) {
    std::smatch m;
    return std::regex_search(text, m, std::regex(pattern)) ? m[1].str() : "none";
  };
  const auto golden = [](const char* name) {
    return read(std::string(PARTITA_TEST_DATA "/cli/") + name + ".golden");
  };
  const std::string step = R"(step time +([0-9.]+ ms))";
  EXPECT_EQ(captured(read(PARTITA_SOURCE "/docs/sharing.md"), R"(sprayed, \*\*([0-9.]+ ms)\*\*)"),
            captured(golden("simulate-ecmp"), step.c_str()));
  const std::string topologies = read(PARTITA_SOURCE "/docs/topologies.md"),
                    placement = golden("simulate-placement");
  EXPECT_EQ(captured(topologies, R"(takes \*\*([0-9.]+ ms)\*\* by default)"),
            captured(placement, R"(([0-9.]+ ms)  default)"));
  EXPECT_EQ(captured(topologies, R"(the step takes \*\*([0-9.]+ ms)\*\*)"),
            captured(placement, step.c_str()));
}

TEST(Goldens, TheNumberOfThreadsChangesNothing) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  ASSERT_EQ(::sched_getaffinity(0, sizeof cpus, &cpus), 0);
  int first = 0;
  while (!CPU_ISSET(first, &cpus)) ++first;
  if (CPU_COUNT(&cpus) == 1) GTEST_SKIP() << "one processor: one thread either way";
  const std::string command = "plan gpt2 cpu-host --layers 2 --seq 64 --global-batch 8 --json";
  const Ran many = run(command), one = run(command, fmt::format("taskset -c {}", first));
  EXPECT_EQ(many.code, 0) << many.err;
  EXPECT_EQ(masked(one.out), masked(many.out));
}

TEST(Goldens, HelpAndVersionGoToStdout) {
  for (const char* arguments :
       {"--help", "--version", "simulate --help", "plan --help", "collective --help"}) {
    const Ran r = run(arguments);
    EXPECT_EQ(r.code, 0) << arguments;
    EXPECT_EQ(without_progress(r.err), "") << arguments;
    EXPECT_NE(r.out, "") << arguments;
  }
}

}  // namespace
}  // namespace partita::test
