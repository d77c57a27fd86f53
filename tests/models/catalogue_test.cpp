#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "models/models.h"

namespace partita {
namespace {

TEST(Catalogue, EveryNameLoads) {
  for (const auto& name : model_catalogue()) {
    SCOPED_TRACE(name);
    const Graph g = load_model(name, {});
    EXPECT_TRUE(g.loss.valid());
    std::printf("%s %lld %d\n", name.c_str(), (long long)parameter_count(g), g.layers);
  }
}

}  // namespace
}  // namespace partita
