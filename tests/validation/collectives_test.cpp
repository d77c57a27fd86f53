// tests/validation/collectives_test.cpp: the figures of docs/nccl.md, from the published rows.

#include "validation/collectives.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "base/yaml.h"

namespace partita::validation {
namespace {

std::filesystem::path rows() {
  const char* data = std::getenv("PARTITA_REFERENCE");
  return std::filesystem::path(data != nullptr ? data : PARTITA_TEST_REFERENCE) / "collectives.csv";
}

TEST(Collectives, MeetTheirTargetLeftOut) {
  if (!std::filesystem::exists(rows()))
    GTEST_SKIP() << "no " << rows() << "; set PARTITA_REFERENCE to its folder";
  const auto curves = collective_curves(parse_csv(read_file(rows()), rows()));
  const auto errors = collective_errors(curves);
  printf("%s", collective_report(errors).c_str());
  std::vector<const CollectiveCurve*> all;
  for (const auto& c : curves) all.push_back(&c);
  const auto k = fit_constants(all, {}, 65536);
  printf("xla %g %g torch %g nvls %g %g %g ramp %g ring %g %g net %g %g %g ex %g %g %g\n",k.harness.xla_per_rank_us,k.harness.xla_efficiency,k.harness.torch_us,k.nccl.nvls_hopper,k.nccl.nvls_blackwell,k.nccl.nvls_domain,k.nccl.nvls_ramp,k.nccl.ring_GBps_per_nvlink,k.nccl.ring_ramp,k.nccl.network,k.nccl.network_ramp,k.nccl.network_ring_ramp,k.nccl.exchange,k.nccl.exchange_ramp,k.nccl.peer_us);
}

}  // namespace
}  // namespace partita::validation
