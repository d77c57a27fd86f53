// What was achieved on the published measurements stays achieved: `partita validate published
// --against achieved`, without its printing.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "base/yaml.h"
#include "validation/published.h"
#include "validation/row_text.h"
#include "validation/rows.h"

namespace partita::validation {
namespace {

TEST(Ratchet, WhatWasAchievedOnPublishedMeasurementsIsAchievedAgain) {
  const char* data = std::getenv("PARTITA_REFERENCE");
  const std::filesystem::path folder(data != nullptr ? data : PARTITA_TEST_REFERENCE);
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "no published tables in " << folder
                 << "; set PARTITA_REFERENCE to their folder";
  std::vector<CsvTable> tables;
  for (const char* name :
       {"llm_training.csv", "memory.csv", "cnn_training.csv", "collectives.csv", "gemm.csv"}) {
    if (std::filesystem::exists(folder / name))
      tables.push_back(parse_csv(read_file(folder / name), folder / name));
  }
  ASSERT_FALSE(tables.empty()) << folder;
  const auto families = predict_rows(tables, load_catalogue(), {});
  int compared = 0;
  for (const PublishedGroup& group : load_published(data_folder("validation/published.yaml"))) {
    const GroupResult result = result_of(group, families);
    if (result.rows == 0) continue;
    for (const Verdict& v : against_achieved(result)) {
      ++compared;
      EXPECT_TRUE(v.met) << fmt::format("{}: {} is {}, was {}", group.name, v.statistic,
                                        v.value.value_or(-1), v.bound);
    }
  }
  EXPECT_GE(compared, 15);
}

}  // namespace
}  // namespace partita::validation
