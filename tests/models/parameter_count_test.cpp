// Parameter counts against those that the libraries give to the same networks built without
// weights; tests/models/record_parameter_counts.py recorded them.
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "models/models.h"
#include "tests/models/temporary_file.h"

namespace partita {
namespace {

nlohmann::json recorded() {
  std::ifstream in(PARTITA_TEST_DATA "/models/parameter_counts.json");
  return nlohmann::json::parse(in);
}

TEST(ParameterCount, OfEveryImportedConfigurationEqualsTheLibrarys) {
  const auto record = recorded();
  ASSERT_GE(record["configurations"].size(), 40u);
  for (const auto& row : record["configurations"]) {
    SCOPED_TRACE(row["name"].get<std::string>());
    const TemporaryFile file("config.json", row["config"].dump());
    EXPECT_EQ(parameter_count(load_model(file.path(), {})), row["parameters"].get<std::int64_t>());
  }
}

TEST(ParameterCount, OfTheConvolutionalNetworksEqualsTorchvisions) {
  const auto record = recorded();
  ASSERT_EQ(record["networks"].size(), 11u);
  for (const auto& row : record["networks"]) {
    const auto name = row["name"].get<std::string>();
    EXPECT_EQ(parameter_count(load_model(name, {})), row["parameters"].get<std::int64_t>()) << name;
  }
}

struct Published {
  const char* name;
  std::int64_t parameters;
};

// Sums of the tensors in the published checkpoints.
constexpr Published kExact[] = {
    {"llama-2-7b", 6'738'415'616},    {"llama-3-8b", 8'030'261'248},
    {"llama-3-70b", 70'553'706'496},  {"llama-3.1-405b", 405'853'388'800},
    {"mixtral-8x7b", 46'702'792'704}, {"gpt2", 124'439'808},
    {"deepseek-v2", 235'741'434'880}, {"deepseek-v3", 671'026'404'352},
    {"bert-large", 335'174'458},      {"vit-b-16", 86'567'656},
    {"resnet-50", 25'557'032},        {"vgg-16", 138'357'544},
    {"alexnet", 61'100'840},          {"mnist-linear", 7'850},
    // As the library counts the published configurations.
    {"nemotron-h-8b", 8'100'852'736}, {"nemotron-3-nano-30b-a3b", 31'577'937'344},
    {"nemotron-3-super-120b-a12b", 120'668'687'360},
    {"nemotron-3-nano-4b", 3'973'556'832},
};

TEST(ParameterCount, OfTheCatalogueEqualsThePublished) {
  for (const auto& [name, parameters] : kExact) {
    EXPECT_EQ(parameter_count(load_model(name, {})), parameters) << name;
  }
}

// Billions as printed in Narayanan et al. SC'21, table 1, and Brown et al. 2020, table 2.1.
struct Printed {
  const char* name;
  double billions;
};
constexpr Printed kPrinted[] = {
    {"megatron-1.7b", 1.7},   {"megatron-3.6b", 3.6},   {"megatron-7.5b", 7.5},
    {"megatron-18b", 18.4},   {"megatron-39b", 39.1},   {"megatron-76b", 76.1},
    {"megatron-145b", 145.6}, {"megatron-310b", 310.1}, {"megatron-530b", 529.6},
    {"megatron-1t", 1008.0},  {"gpt3-175b", 174.6},
};

TEST(ParameterCount, OfTheMegatronSizesRoundsToThePrinted) {
  for (const auto& [name, billions] : kPrinted) {
    const Graph g = load_model(name, {});
    // One decimal is printed: half of its last place, or the place itself where it was cut off.
    EXPECT_NEAR(static_cast<double>(parameter_count(g)) * 1e-9, billions, 0.1) << name;
  }
}

TEST(ParameterCount, OfGptFollowsTheClosedForm) {
  // Narayanan et al. SC'21, equation (2): P = 12 l h² (1 + 13/(12h) + (V + s)/(12 l h)), which
  // leaves out the final layer norm (2h).
  for (const char* name : {"gpt2", "gpt3-175b", "megatron-22b", "megatron-1t"}) {
    const Graph g = load_model(name, {});
    const std::int64_t l = g.layers, s = g.sequence;
    const std::int64_t h = g.tensor(g.operators.front().outputs[0]).shape[2].extent;
    const std::int64_t v = g.parameter(g.operators.front().parameters[0]).shape[0].extent;
    EXPECT_EQ(parameter_count(g), 12 * l * h * h + 13 * l * h + (v + s) * h + 2 * h) << name;
  }
}

TEST(ParameterCount, OfMultiTokenPredictionIsThePapers) {
  // arXiv 2412.19437, section 2.2, with DeepSeek-V3's numbers: one block with experts, two norms, a
  // projection of 2h x h, the final norm; embedding and head are shared.
  const TemporaryFile with("mtp.yaml", [] {
    std::ifstream in(data_file("models/catalogue/deepseek-v3.yaml"));
    std::string body((std::istreambuf_iterator<char>(in)), {});
    const auto at = body.find("mtp_layers: 0");
    return body.replace(at, 13, "mtp_layers: 1");
  }());
  const std::int64_t base = parameter_count(load_model("deepseek-v3", {}));
  const std::int64_t more = parameter_count(load_model(with.path(), {})) - base;
  const std::int64_t h = 7168;
  ModelOptions one_more;
  one_more.layers = 62;
  const std::int64_t block = parameter_count(load_model("deepseek-v3", one_more)) - base;
  EXPECT_EQ(more, block + 2 * h + 2 * h * h + h);
}

}  // namespace
}  // namespace partita
