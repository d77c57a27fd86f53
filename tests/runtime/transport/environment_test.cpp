// Who started this process: the table of docs/transports.md, and environments that cannot be.
#include "runtime/transport/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "base/error.h"

namespace partita {
namespace {

using Environment = std::map<std::string, std::string>;

Launcher of(const Environment& e, bool mpi = true) {
  return launcher_of(
      [&](const char* name) {
        const auto found = e.find(name);
        return found == e.end() ? nullptr : found->second.c_str();
      },
      mpi);
}

std::string refusal(const Environment& e, bool mpi = true) {
  try {
    of(e, mpi);
    return "";
  } catch (const InputError& error) {
    return error.what();
  }
}

const Environment kTorchrun{
    {"RANK", "3"}, {"WORLD_SIZE", "4"}, {"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "29500"}};

TEST(Launcher, IsReadFromTheEnvironment) {
  EXPECT_EQ(of({}).kind, Launcher::Kind::nobody);
  EXPECT_EQ(of({{"MASTER_ADDR", "x"}, {"MASTER_PORT", "1"}}).kind, Launcher::Kind::nobody)
      << "an address alone is no launcher";
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    Environment e = kTorchrun;
    e[name] = "4";
    EXPECT_EQ(of(e).kind, Launcher::Kind::mpi) << "MPI's come first";
    EXPECT_EQ(of(e, false).kind, Launcher::Kind::tcp) << "where this build has it";
  }
  const Launcher t = of(kTorchrun);
  EXPECT_EQ(t.kind, Launcher::Kind::tcp);
  EXPECT_EQ(t.rank, 3);
  EXPECT_EQ(t.size, 4);
  EXPECT_EQ(t.host, "10.0.0.1");
  EXPECT_EQ(t.port, 29500);
  Environment store = kTorchrun;
  store["TORCHELASTIC_USE_AGENT_STORE"] = "True";
  EXPECT_EQ(of(store).port, 29501) << "torchrun's own store has the port";
}

TEST(Launcher, OfSlurm) {
  // The page's example.
  const Environment srun{{"SLURM_PROCID", "5"},
                         {"SLURM_NTASKS", "8"},
                         {"SLURM_JOB_ID", "123456"},
                         {"SLURM_STEP_ID", "2"},
                         {"SLURM_STEP_NODELIST", "gpu[07-09,12]"}};
  const Launcher s = of(srun);
  EXPECT_EQ(s.kind, Launcher::Kind::tcp);
  EXPECT_EQ(s.rank, 5);
  EXPECT_EQ(s.size, 8);
  EXPECT_EQ(s.host, "gpu07");
  EXPECT_EQ(s.port, 18458);
  Environment e{
      {"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "4"}, {"SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"}};
  EXPECT_EQ(of(e).host, "127.0.0.1");
  e["SLURM_NODELIST"] = "node3";
  EXPECT_EQ(of(e).host, "node3");
  e["MASTER_ADDR"] = "10.1.1.1";
  e["MASTER_PORT"] = "4321";
  EXPECT_EQ(of(e).host, "10.1.1.1");
  EXPECT_EQ(of(e).port, 4321);
  e["SLURM_STEP_NUM_TASKS"] = "2";
  EXPECT_EQ(of(e).size, 2) << "the step's tasks, not the job's";
  EXPECT_EQ(of({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "7"}}).kind,
            Launcher::Kind::nobody)
      << "a batch script is no task";
  EXPECT_EQ(of({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "1"}, {"SLURM_STEP_ID", "7"}}).kind,
            Launcher::Kind::nobody)
      << "one task starts its ranks itself";
}

TEST(Launcher, FirstHosts) {
  EXPECT_EQ(first_host("a"), "a");
  EXPECT_EQ(first_host("a,b"), "a");
  EXPECT_EQ(first_host("gpu[07-09,12],login"), "gpu07");
  EXPECT_EQ(first_host("gpu[12]"), "gpu12");
  EXPECT_EQ(first_host("rack[1-2]n,x"), "rack1n");
  EXPECT_EQ(first_host("login,gpu[1-2]"), "login");
  EXPECT_EQ(first_host("gpu[1-"), "");
  EXPECT_EQ(first_host(""), "");
}

TEST(Launcher, ContradictionsAreRefused) {
  const auto with = [](const char* name, const char* text) {
    Environment e = kTorchrun;
    e[name] = text;
    return refusal(e);
  };
  const auto without = [](const char* name) {
    Environment e = kTorchrun;
    e.erase(name);
    return refusal(e);
  };
  EXPECT_EQ(with("RANK", "5"), "RANK: 5 is no rank of WORLD_SIZE = 4; ranks are 0 to 3");
  EXPECT_EQ(with("RANK", "4"), "RANK: 4 is no rank of WORLD_SIZE = 4; ranks are 0 to 3");
  for (const char* bad : {"x", "-1", "1.5", " 1", "1 ", "99999999999999999999", "0x1"}) {
    EXPECT_THAT(with("RANK", bad), ::testing::HasSubstr("is not a whole number in 0 to")) << bad;
    EXPECT_THAT(with("WORLD_SIZE", bad), ::testing::HasSubstr("is not a whole number in 1 to"));
    EXPECT_THAT(with("MASTER_PORT", bad), ::testing::HasSubstr("is not a whole number in 1 to"));
  }
  EXPECT_THAT(with("WORLD_SIZE", "0"), ::testing::HasSubstr("'0' is not a whole number"));
  EXPECT_THAT(with("MASTER_PORT", "65536"), ::testing::HasSubstr("in 1 to 65535"));
  for (const char* name : {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}) {
    EXPECT_THAT(without(name), ::testing::StartsWith(std::string(name) + ": is not set, but "));
    EXPECT_THAT(with(name, ""), ::testing::StartsWith(std::string(name) + ": is not set, but "));
  }
  EXPECT_EQ(refusal({{"SLURM_PROCID", "4"}, {"SLURM_NTASKS", "4"}, {"SLURM_STEP_ID", "0"}}),
            "SLURM_PROCID: 4 is no rank of SLURM_NTASKS = 4; ranks are 0 to 3");
  EXPECT_THAT(
      refusal({{"SLURM_PROCID", "1"}, {"SLURM_NTASKS", "4"}, {"SLURM_STEP_ID", "0"}}),
      ::testing::StartsWith("MASTER_ADDR: is not set, and neither are SLURM_STEP_NODELIST"));
  EXPECT_THAT(refusal({{"OMPI_COMM_WORLD_SIZE", "4"}}, false),
              ::testing::HasSubstr("this build has no MPI"));
}

}  // namespace
}  // namespace partita
