// The command and its backend for GPUs, on GPUs that each process emulates (docs/cuda.md, "An
// emulated GPU"): ranks, launchers, NCCL's calls, faults, traces.
#include <gmock/gmock.h>

#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <vector>

#include "tests/cli/gpu_command.h"

namespace partita {
namespace {

using Json = nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kGpt = PARTITA_SOURCE "/validation/gpu/gpt-small.yaml",
                  kExperts = PARTITA_SOURCE "/tests/data/cli/tiny-moe.yaml",
                  kSmall = " --steps 2 --backend cuda --json";

class EmulatedGpu : public GpuCommand {
 protected:
  EmulatedGpu() : GpuCommand(PARTITA_EMULATED_BACKEND) {
    // The library of emulated GPUs is CUPTI's, too.
    std::filesystem::create_symlink(PARTITA_EMULATED_GPU, folder_ / "libcupti.so");
    for (const char* number : {".12", ".13", ".14"})
      std::filesystem::create_symlink(PARTITA_EMULATED_GPU,
                                      folder_ / (std::string("libcupti.so") + number));
  }
  /// A run whose loss, gradients and parameters met the serial network's.
  void expect_equal(const std::string& arguments, const std::string& variables = "") {
    SCOPED_TRACE(arguments);
    const Json j =
        Json::parse(run("run " + arguments + kSmall, 0, false, with(variables)), nullptr, false);
    ASSERT_FALSE(j.is_discarded()) << err();
    if (j.at("equal_to_serial").is_null()) {
      // Rounding may send rows to other experts: the bound on gradients says nothing then.
      EXPECT_GE(j.at("tolerance").get<double>(), 1);
      EXPECT_LT(j.at("loss_error").get<double>(), 1e-3);
      EXPECT_LT(j.at("parameter_error").get<double>(), 0.02);
    } else {
      EXPECT_EQ(j.at("equal_to_serial"), true);
    }
    EXPECT_FALSE(j.contains("no_links"));
    EXPECT_THAT(err() + said(), Not(HasSubstr("emulated GPU")));
  }
  /// Steps that are one graph each are steps as others: losses and values to the bit those of a run
  /// without graphs.
  void expect_captured(const std::string& arguments) {
    SCOPED_TRACE(arguments);
    const auto result = [&](const std::string& more) {
      return Json::parse(
          run("run " + arguments + " --backend cuda --json " + more, 0, false, with("")), nullptr,
          false);
    };
    const Json graphs = result("--steps 2 --warm-up 1 --set launch.graphs=true"),
               none = result("--steps 5");
    ASSERT_FALSE(graphs.is_discarded() || none.is_discarded()) << err();
    EXPECT_EQ(graphs.at("graph").at("steps"), 2) << graphs.at("graph");
    EXPECT_GT(graphs.at("graph").at("kernel_by_kernel_s").get<double>(), 0);
    EXPECT_FALSE(none.contains("graph"));
    EXPECT_NE(graphs.at("equal_to_serial"), false);
    EXPECT_EQ(graphs.at("loss"), none.at("loss"));
    for (const char* error : {"gradient_error", "parameter_error"})
      EXPECT_EQ(graphs.at(error), none.at(error)) << error;
    EXPECT_EQ(graphs.at("memory_bytes").at("total"), none.at("memory_bytes").at("total"));
    EXPECT_THAT(err() + said(), Not(HasSubstr("emulated GPU")));
  }
  /// Why a plan's steps are not one graph each; they are trained all the same.
  std::string why_not_captured(const std::string& arguments) {
    const Json j = Json::parse(
        run("run " + arguments + " --backend cuda --json --steps 2 --set launch.graphs=true", 0,
            false, with("")),
        nullptr, false);
    if (j.is_discarded() || j.at("graph").at("steps") != 0 || j.at("equal_to_serial") != true ||
        j.at("loss").size() != 5)
      return "no: " + err();
    return j.at("graph").at("why_not");
  }
  /// Every case of the suite on four ranks that share a GPU.
  void expect_suite_equal(const std::string& transport) {
    const Json j = Json::parse(run(
        fmt::format("validate --backend cuda --share-gpu --ranks 4 --transport {} --calibrate-only "
                    "collectives --rounds 1 --steps 1 --json --out '{}/{}'",
                    transport, folder_.string(), transport),
        0, true, with("")));
    EXPECT_GE(j.at("suite").at("cases").size(), 13u);
    for (const auto& c : j.at("suite").at("cases"))
      EXPECT_EQ(c.at("equal_to_reference"), true) << c.at("name");
    EXPECT_EQ(said(), "");
  }
  /// Each run has another order of what no event orders.
  /// Kernels on one lane, but where `variables` say otherwise: emulated_gpu_test has them on many.
  std::string with(const std::string& variables) {
    return fmt::format(
        "env LD_LIBRARY_PATH='{0}' TMPDIR='{0}' PARTITA_EMULATED_LOG='{0}/log' "
        "PARTITA_EMULATED_LANES=0 PARTITA_EMULATED_SEED={1} {2}",
        folder_.string(), ++seed_, variables);
  }
  std::pair<std::string, std::string> by_torchrun(const std::string& arguments,
                                                  const std::string& variables = "",
                                                  const std::string& of_rank_1 = "",
                                                  const std::string& local_rank = "$r");
  /// By ranks whose stderr nobody sees.
  std::string said() const { return text_of(folder_ / "log"); }

  int seed_ = 0;
};

TEST_F(EmulatedGpu, TrainsOnOneRank) {
  for (const char* precision : {"fp32", "bf16", "fp16", "fp8"}) {
    expect_equal(kGpt + " --micro-batch 2 --global-batch 4 --precision " + precision);
    expect_equal(kExperts + " --micro-batch 2 --global-batch 4 --precision " + precision);
  }
  expect_equal(kGpt + " --micro-batch 1 --global-batch 2 --recompute full");
  expect_equal(kGpt + " --micro-batch 1 --global-batch 2 --set offload.optimizer=true");
  expect_equal(kGpt + " --micro-batch 1 --global-batch 2 --set offload.activations=true");
  expect_equal("mnist-linear");
}

TEST_F(EmulatedGpu, LaunchesAStepAsOneGraph) {
  // Adam's corrections and dropout's key are another step's each time, and so are inputs.
  for (const char* plan : {"--optimizer adam --dropout 0.1", "--precision bf16 --optimizer adam",
                           "--precision fp8", "--recompute full --micro-batch 1"})
    expect_captured(kGpt + " --global-batch 2 " + plan);
  expect_captured("mnist-linear");
}

TEST_F(EmulatedGpu, CalibratesWhatPassesInAGraph) {
  const std::string out = folder_.string() + "/graph";
  const std::string said =
      run("calibrate --backend cuda --only 'CUDA graph' --steps 2 --out '" + out + "'", 0, false,
          with("PARTITA_EMULATED_NS=10"));
  EXPECT_THAT(said, HasSubstr("the same in a CUDA graph"));
  EXPECT_THAT(text_of(out + "/device.yaml"), HasSubstr("\ndispatch_in_graph: {value: "));
  EXPECT_THAT(err(), Not(HasSubstr("was not measured")));
}

TEST_F(EmulatedGpu, StepsThatCannotBeOneGraphSayWhy) {
  const std::string one = " --micro-batch 1 --global-batch 2 ";
  EXPECT_THAT(why_not_captured(kExperts + one),
              HasSubstr("the host waits for what a router chose"));
  EXPECT_THAT(why_not_captured(kGpt + one + "--precision fp16 --set loss_scale.dynamic=true"),
              HasSubstr("loss_scale is the host's"));
}

#ifdef PARTITA_NCCL
const std::string kTwo = " --micro-batch 1 --global-batch 4 --share-gpu --transport tcp";

TEST_F(EmulatedGpu, TrainsOnTwoRanksOverNccl) {
  for (const char* plan :
       {"--dp 2", "--dp 2 --zero 1", "--dp 2 --zero 2", "--dp 2 --zero 3 --precision bf16",
        "--tp 2 --precision bf16", "--tp 2 --sequence-parallel", "--pp 2",
        "--pp 2 --schedule zb-h1", "--pp 2 --virtual-stages 2 --layers 4", "--cp 2",
        "--cp 2 --context-exchange ring", "--cp 2 --context-exchange all_to_all",
        "--dp 2 --set compression.kind=top_k", "--tp 2 --precision fp8", "--dp 2 --precision fp16"})
    expect_equal(kGpt + kTwo + " " + plan);
  expect_equal(kExperts + kTwo + " --dp 2 --ep 2");
  expect_equal(kExperts + kTwo + " --tp 2 --precision bf16");
}

TEST_F(EmulatedGpu, TrainsOnFourRanksOverNccl) {
  for (const char* plan : {"--tp 2 --dp 2 --sequence-parallel", "--pp 2 --dp 2 --zero 1",
                           "--dp 4 --zero 3 --zero-group 2", "--cp 2 --tp 2", "--pp 2 --tp 2",
                           "--pp 3 --set message_queue=true --layers 3"})
    expect_equal(kGpt + kTwo + " " + plan);
  expect_equal(kExperts + kTwo + " --dp 4 --ep 2");
}

// Shares that are not equal are calls of one group.
TEST_F(EmulatedGpu, TrainsOnThreeRanksOverNccl) {
  for (const char* plan : {"--zero 1", "--zero 2", "--zero 3"})
    expect_equal(kGpt + " --micro-batch 1 --global-batch 3 --share-gpu --transport tcp --dp 3 " +
                 plan);
}

TEST_F(EmulatedGpu, LaunchesAStepOfSeveralRanksAsOneGraph) {
  for (const char* plan : {"--dp 2 --zero 3", "--tp 2 --sequence-parallel --precision bf16",
                           "--cp 2 --context-exchange ring", "--dp 2 --zero 1 --optimizer adam"})
    expect_captured(kGpt + kTwo + " " + plan);
  expect_captured(kGpt + kTwo + " --tp 2 --dp 2");
  EXPECT_THAT(why_not_captured(kGpt + kTwo + " --pp 2"), HasSubstr("messages of a pipeline"));
  EXPECT_THAT(why_not_captured(kGpt + " --micro-batch 1 --global-batch 4 --dp 2 --share-gpu "
                                      "--transport threads"),
              HasSubstr("the host waits for the device"));
  EXPECT_THAT(why_not_captured(kGpt + kTwo + " --dp 2 --strategy replicas --set average_every=2"),
              HasSubstr("parameters are averaged every 2 steps"));
}

TEST_F(EmulatedGpu, EachRankHasItsGpu) {
  for (const char* transport : {"tcp", "threads", "mpi"}) {
    const std::string arguments = "run " + kGpt +
                                  " --micro-batch 1 --global-batch 4 --tp 2 --pp 2 --transport " +
                                  transport + kSmall;
    const std::string out = run(arguments, 0, false,
                                with("PARTITA_EMULATED_GPUS=4 OMPI_ALLOW_RUN_AS_ROOT=1 "
                                     "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"));
    if (err().find("this build has no MPI") != std::string::npos) continue;
    EXPECT_EQ(Json::parse(out).at("equal_to_serial"), true) << transport;
  }
  // Lists of each GPU are its own.
  EXPECT_EQ(Json::parse(run("run " + kGpt +
                                " --micro-batch 1 --global-batch 2 --dp 2 --zero 3 --transport "
                                "threads" +
                                kSmall,
                            0, false, with("PARTITA_EMULATED_GPUS=2")))
                .at("equal_to_serial"),
            true);
  run("run " + kGpt + " --global-batch 4 --dp 4 --transport tcp" + kSmall, 2, false,
      with("PARTITA_EMULATED_GPUS=3"));
  EXPECT_THAT(err(), HasSubstr("4 ranks, and this machine has 3 GPUs"));
}

/// Two ranks as torchrun starts them: what they said on stderr, and their exit codes as they ended.
std::pair<std::string, std::string> EmulatedGpu::by_torchrun(const std::string& arguments,
                                                             const std::string& variables,
                                                             const std::string& of_rank_1,
                                                             const std::string& local_rank) {
  for (const char* file : {"said", "codes"}) std::filesystem::remove(folder_ / file);
  std::ofstream(folder_ / "ranks.sh") << fmt::format(
      "for r in 0 1; do (fault=A=1; [ $r = 1 ] && fault={}; {} $fault RANK=$r LOCAL_RANK={} "
      "WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={} '{}' {} >/dev/null 2>>'{}'; "
      "echo $? >>'{}') & done; wait",
      of_rank_1.empty() ? "A=1" : of_rank_1, with(variables), local_rank,
      20000 + (::getpid() + seed_) % 20000, (folder_ / "partita").string(),
      arguments.rfind("validate", 0) == 0 ? arguments : "run " + arguments,
      (folder_ / "said").string(), (folder_ / "codes").string());
  EXPECT_EQ(std::system(("timeout 60 sh '" + (folder_ / "ranks.sh").string() + "'").c_str()), 0);
  return {text_of(folder_ / "said"), text_of(folder_ / "codes")};
}

// Ranks that another launcher has started learn from each other where they are.
TEST_F(EmulatedGpu, MoreRanksThanGpusIsOneMessage) {
  const auto [said, codes] = by_torchrun(kGpt + " --global-batch 2 --dp 2 --timeout 20" + kSmall);
  EXPECT_EQ(codes, "2\n2\n");
  EXPECT_EQ(
      said,
      "partita: --backend: ranks 0 and 1 are on one GPU; start no more ranks on a machine than it "
      "has GPUs, or use --share-gpu, which proves mathematics and not speed\n");
}

// A launcher may show each rank one GPU, the same number for all: how many a host has is not asked.
TEST_F(EmulatedGpu, RanksOfALauncherMayValidate) {
  const auto [said, codes] = by_torchrun(
      "validate --backend cuda --ranks 2 --only 'gpt dp 2' --calibrate-only transfers --rounds 1 "
      "--steps 1 --timeout 20");
  EXPECT_THAT(said, Not(HasSubstr("and this machine has 1 GPU")));
  EXPECT_THAT(said, HasSubstr("ranks 0 and 1 are on one GPU")) << "as run finds out";
}

// Whoever shares a GPU waits for its turn, in slices of milliseconds; threads are one process.
TEST_F(EmulatedGpu, ASharedGpuIsPredictedAsOne) {
  const std::string two = "run " + kGpt + " --micro-batch 1 --global-batch 2 --dp 2";
  const auto predicted = [&](const std::string& how, const std::string& variables) {
    return Json::parse(run(two + how + kSmall, 0, false, with(variables)))
        .at("predicted_s")
        .get<double>();
  };
  const double apart = predicted(" --transport tcp", "PARTITA_EMULATED_GPUS=2"),
               turns = predicted(" --share-gpu --transport tcp", ""),
               beside = predicted(" --share-gpu --transport threads", "");
  EXPECT_GT(turns, 3 * apart);
  EXPECT_GT(beside, apart);
  EXPECT_LT(beside, turns);
  // With a GPU each nothing is shared.
  EXPECT_EQ(predicted(" --share-gpu --transport tcp", "PARTITA_EMULATED_GPUS=2"), apart);
}

// NCCL's kernel would wait for good: whoever waits for it looks, and aborts.
// NCCL gives no communicator up while a graph has calls of it.
TEST_F(EmulatedGpu, APeersDeathEndsRanksThatHaveGraphs) {
  for (const char* fault : {"PARTITA_TEST_FAULT=1:1:20:kill", "PARTITA_TEST_FAULT=1:3:20:kill"}) {
    const auto [said, codes] = by_torchrun(
        kGpt + " --global-batch 2 --dp 2 --timeout 20 --set launch.graphs=true" + kSmall,
        "PARTITA_EMULATED_GPUS=2", fault);
    EXPECT_THAT(codes, HasSubstr("3\n")) << said;
    EXPECT_THAT(said + this->said(), Not(HasSubstr("that a graph has"))) << codes;
  }
}

TEST_F(EmulatedGpu, APeersDeathEndsTheOthers) {
  const std::string run = kGpt + " --global-batch 2 --dp 2 --timeout 20" + kSmall;
  EXPECT_EQ(by_torchrun(run, "PARTITA_EMULATED_GPUS=2").second, "0\n0\n");
  const auto [said, codes] =
      by_torchrun(run, "PARTITA_EMULATED_GPUS=2", "PARTITA_TEST_FAULT=1:1:30:kill");
  EXPECT_EQ(codes, "137\n3\n");
  // NCCL has seen it first; the transport knows where.
  EXPECT_THAT(said, HasSubstr("partita: rank 1 died in step 1, "));
}

// The end of one communicator waits for the kernels of another, which wait for the peer.
TEST_F(EmulatedGpu, APeersDeathEndsAllCommunicatorsAtOnce) {
  for (const char* plan : {"--tp 2 --dp 2", "--pp 2 --dp 2", "--dp 4 --zero 3 --zero-group 2"}) {
    run("run " + kGpt + kTwo + " " + plan + " --timeout 20" + kSmall, 3, false,
        with("PARTITA_TEST_FAULT=2:1:9:kill"));
    EXPECT_THAT(err(), HasSubstr("rank 2 ")) << plan;
    EXPECT_THAT(err() + said(), Not(HasSubstr("ncclCommAbort waits"))) << plan;
  }
}

// NCCL says that a peer is gone before that peer's own word comes.
TEST_F(EmulatedGpu, ARanksOwnReasonIsSaid) {
  for (const char* plan : {"--dp 2", "--pp 2"}) {
    run("run " + kGpt + kTwo + " " + plan + " --timeout 10" + kSmall, 3, false,
        with("PARTITA_TEST_FAULT=1:1:40:full"));
    EXPECT_THAT(err(), HasSubstr("rank 1 in step 1, "));
    EXPECT_THAT(err(), HasSubstr("the disk is full"));
  }
}

// A user's own NCCL_HOSTID is kept: NCCL takes the ranks for one machine's.
TEST_F(EmulatedGpu, WhereNcclRefusesMessagesPassThroughTheHost) {
  const Json j = Json::parse(
      run("run " + kGpt + kTwo + " --dp 2" + kSmall, 0, false, with("NCCL_HOSTID=one")));
  EXPECT_EQ(j.at("equal_to_serial"), true);
  EXPECT_THAT(j.at("no_links").get<std::string>(), HasSubstr("Duplicate GPU detected"));
}

TEST_F(EmulatedGpu, ARankThatDiesIsNamed) {
  for (const char* fault : {"1:1:20:kill", "0:1:3:kill", "1:0:9:exit"}) {
    run("run " + kGpt + kTwo + " --dp 2 --timeout 20" + kSmall, 3, false,
        with(std::string("PARTITA_TEST_FAULT=") + fault));
    EXPECT_THAT(err(), HasSubstr(fmt::format("rank {} ", fault[0])));
    EXPECT_THAT(err(), HasSubstr("in step"));
  }
}

TEST_F(EmulatedGpu, NcclsEstimatesStandBesideOurs) {
  const Json j = Json::parse(
      run("validate --backend cuda --share-gpu --ranks 2 --transport tcp --only 'gpt dp 2' "
          "--calibrate-only collectives --no-reference --rounds 1 --steps 1 --json --out '" +
              folder_.string() + "/estimates'",
          0, true, with("")));
  ASSERT_TRUE(j.contains("nccl_estimates")) << j.value("no_nccl_estimates", "") << err();
  EXPECT_GT(j.at("nccl_estimates").at("rows").size(), 200u);
  for (const auto& pair : j.at("nccl_estimates").at("unpriced"))
    EXPECT_THAT(pair.get<std::string>(), HasSubstr("NVLS"));
}

TEST_F(EmulatedGpu, TheSuiteEqualsItsReference) { expect_suite_equal("tcp"); }

// A plan whose ranks hang costs its time-out and no other plan: the tenth program is the last
// case's, and what is left after it has fewer programs than that.
TEST_F(EmulatedGpu, ACaseThatHangsIsGivenUp) {
  const std::string out = folder_.string() + "/hangs";
  const Json j =
      Json::parse(run("validate --backend cuda --share-gpu --ranks 2 --transport tcp --only 'gpt' "
                      "--calibrate-only transfers --rounds 1 --steps 1 --timeout 2 --json --out '" +
                          out + "'",
                      1, false, with("PARTITA_TEST_FAULT=1:0:0:stop:9")));
  std::size_t different = 0;
  for (const auto& c : j.at("suite").at("cases"))
    different += c.at("equal_to_reference").get<bool>() ? 0 : 1;
  EXPECT_EQ(different, 1u) << j;
  EXPECT_THAT(err(), HasSubstr(" is given up, and counts as different: rank 1 was stopped"));
  EXPECT_THAT(text_of(out + "/suite.jsonl"), HasSubstr("was stopped in step 0"));
}
#endif

// Ranks that are threads and share a GPU exchange in its memory, whatever NCCL would say of that.
TEST_F(EmulatedGpu, TheSuiteEqualsItsReferenceInOneProcess) {
  expect_suite_equal("threads");
  const Json one = Json::parse(run("run " + kGpt +
                                       " --micro-batch 1 --global-batch 4 --dp 2 --tp 2 "
                                       "--share-gpu --transport threads" +
                                       kSmall,
                                   0, false, with("")));
  EXPECT_EQ(one.at("equal_to_serial"), true);
  for (const auto& t : one.at("traffic")) EXPECT_EQ(t.at("measured"), t.at("predicted"));
}

// The script of a machine with a GPU, those parts of it that an emulated one has time for; in the
// place of compute-sanitizer what carries its command out.
TEST_F(EmulatedGpu, TheGpusScriptDoesItsParts) {
  const std::filesystem::path tools = folder_ / "tools";
  std::filesystem::create_directories(tools);
  std::ofstream(tools / "compute-sanitizer")
      << "#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift 2; done\nexec \"$@\"\n";
  std::filesystem::permissions(tools / "compute-sanitizer", std::filesystem::perms::owner_all);
  const std::string command = fmt::format(
      "{} PATH='{}':\"$PATH\" PARTITA='{}' GPU_TEST='{}' '{}/validation/gpu/run.sh' '{}/parts' "
      "one-rank records mnist graph memcheck 'memcheck-*' racecheck-fp8 >'{}/said' 2>&1",
      with(""), tools.string(), (folder_ / "partita").string(), PARTITA_EMULATED_TESTS,
      PARTITA_SOURCE, folder_.string(), folder_.string());
  EXPECT_EQ(std::system(command.c_str()), 0) << text_of(folder_ / "said");
  const std::string summary = text_of(folder_ / "parts/summary.txt");
  for (const char* part :
       {"one-rank ", "records ", "mnist ", "graph ", "memcheck ", "memcheck-bf16 ",
        "memcheck-experts ", "memcheck-fp8 ", "memcheck-flash ", "racecheck-fp8 "})
    EXPECT_THAT(summary, HasSubstr(part));
  EXPECT_THAT(summary, HasSubstr(", 0 failed: none"));
  EXPECT_THAT(summary, HasSubstr("0 found no time: none"));
  EXPECT_TRUE(std::filesystem::exists(folder_ / "parts.tgz"));
  // What has no time is left out, and said to be.
  const int late = std::system(
      fmt::format("LIMIT=1 PARTITA='{}' GPU_TEST='{}' '{}/validation/gpu/run.sh' '{}/late' mnist "
                  ">'{}/said' 2>&1",
                  (folder_ / "partita").string(), PARTITA_EMULATED_TESTS, PARTITA_SOURCE,
                  folder_.string(), folder_.string())
          .c_str());
  EXPECT_EQ(WEXITSTATUS(late), 3);
  EXPECT_THAT(text_of(folder_ / "late/summary.txt"), HasSubstr("1 found no time: mnist"));
}

TEST_F(EmulatedGpu, ATraceNamesWhatKernelsWereCalledFor) {
  const std::string file = folder_.string() + "/trace.json";
  run("run " + kGpt + " --micro-batch 2 --global-batch 2" + kSmall, 0, false,
      with("PARTITA_CUDA_TRACE='" + file + "'"));
  EXPECT_EQ(err(), "");
  const Json trace = Json::parse(text_of(file));
  std::size_t products = 0, attention = 0, copies = 0;
  for (const auto& e : trace.at("traceEvents")) {
    EXPECT_GE(e.at("dur").get<double>(), 0.5);
    const std::string for_what = e.at("args").at("called for"), kernel = e.at("args").at("kernel");
    products += for_what == "forward of linear" && kernel.rfind("product", 0) == 0 ? 1 : 0;
    attention += for_what == "forward of attention" ? 1 : 0;
    copies += kernel == "copy" ? 1 : 0;
  }

  // Two layers of six products, and the head.
  EXPECT_GE(products, 13u);
  EXPECT_GT(attention, 0u);
  EXPECT_GT(copies, 0u);
}

// docs/cuda.md, "Kernel times".
TEST_F(EmulatedGpu, KernelsAreTimedByTheGpusOwnRecords) {
  const std::string replay = "replay " + kGpt +
                             " dgx-h100:1 --tp 2 --dp 4 --global-batch 8 --backend cuda "
                             "--precision bf16 --steps 3 --json";
  const Json j = Json::parse(run(replay, 0, false, with("PARTITA_EMULATED_NS=5000")));
  EXPECT_EQ(j.at("kernels"), j.at("kernels_recorded")) << err();
  // Each call takes 5 us by records, 6 between events, and 1 passes between two of an
  // instruction's. What the host's clock has of a plain step beside is shared out, and said.
  const double between = j.at("between_kernels_s");
  for (const Json& k : j.at("kinds")) {
    const double count = k.at("count"), whole = k.at("measured_s").get<double>() - count * between,
                 calls = std::round((whole / 1e-6 + count) / 6);
    EXPECT_GE(calls, count) << k;
    EXPECT_NEAR(whole, (6 * calls - count) * 1e-6, 1e-8) << k;
    if (k.at("kind") != "activation forward") continue;
    EXPECT_EQ(calls, count) << k;
  }
  EXPECT_FALSE(j.contains("no_kernel_times"));
  for (const char* steps : {"plain", "between_marks", "recorded"})
    EXPECT_GT(j.at("steps_s").at(steps).get<double>(), 0) << steps;
  // Another tool has the records.
  const Json traced = Json::parse(
      run(replay, 0, false, with("PARTITA_CUDA_TRACE=" + folder_.string() + "/t.json")));
  EXPECT_EQ(traced.at("no_kernel_times"), "its kernels are being traced already");
  EXPECT_EQ(traced.at("kernels_recorded"), 0);
}

TEST_F(EmulatedGpu, WordsOfTheEnvironmentAreLookedAt) {
  const std::string one = "run " + kGpt + kSmall;
  run(one, 2, false, with("PARTITA_CUDA_FLASH=mine"));
  EXPECT_THAT(err(), HasSubstr("PARTITA_CUDA_FLASH: 'mine' is unknown; use 0"));
  run(one, 2, false, with("PARTITA_CUDA_FLASH=cudnn"));
  EXPECT_THAT(err(), HasSubstr("this build has no cudnn_frontend"));
  run(one, 2, false, with("PARTITA_CUDA_CANDIDATES=many"));
  EXPECT_THAT(err(), HasSubstr("PARTITA_CUDA_CANDIDATES: 'many'"));
  const std::string two = kGpt + " --global-batch 2 --dp 2 --timeout 20" + kSmall;
  for (const char* rank : {"-1", "abc", "2x"}) {
    const auto [said, codes] = by_torchrun(two, "PARTITA_EMULATED_GPUS=2", "", rank);
    EXPECT_EQ(codes, "2\n2\n");
    EXPECT_THAT(said, HasSubstr(fmt::format("LOCAL_RANK: '{}' is no rank of a host", rank)));
  }
  EXPECT_THAT(by_torchrun(two, "PARTITA_EMULATED_GPUS=2", "", "5").first,
              HasSubstr("LOCAL_RANK: rank 5 of this host finds 2 GPUs"));
}

TEST_F(EmulatedGpu, AGpuThatIsNotThereOrIsFullIsSaid) {
  run("run " + kGpt + kSmall, 2, false, with("PARTITA_EMULATED_GPUS=0"));
  EXPECT_THAT(err(), HasSubstr("this machine has no GPU that CUDA"));
  EXPECT_THAT(err(), HasSubstr("--backend cpu"));
  // What is known before is the user's to change.
  run("run gpt2 --layers 4 --micro-batch 1 --global-batch 1 --no-check" + kSmall, 2, false,
      with("PARTITA_EMULATED_MIB=600"));
  EXPECT_THAT(err(), ::testing::ContainsRegex(
                         "gpt2 under this plan needs .* on a GPU; it has .* left: use --layers"));
  // Kernels that work in more than is left.
  run("run " + kGpt + kSmall, 3, false, with("PARTITA_EMULATED_MIB=420"));
  EXPECT_THAT(err(), HasSubstr("rank 0 in step 0, "));
  EXPECT_THAT(err(), HasSubstr("bytes left for kernels to work in; use fewer ranks on it"));
#ifdef PARTITA_NCCL
  run("run " + kGpt + kTwo + " --dp 2" + kSmall, 3, false, with("PARTITA_EMULATED_MIB=401"));
  EXPECT_THAT(
      err(),
      HasSubstr("bytes left; use fewer ranks on it, a smaller micro-batch or more sharding"));
#endif
}

}  // namespace
}  // namespace partita
