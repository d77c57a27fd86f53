// The commands that measure a GPU, end to end, beside a library whose GPU is paper: all but a real
// one's calls.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "tests/cli/gpu_command.h"

namespace partita {
namespace {

using Json = nlohmann::json;

class PaperGpu : public GpuCommand {
 protected:
  PaperGpu() : GpuCommand(PARTITA_PAPER_GPU) {}
};

TEST_F(PaperGpu, ItsCalibrationIsAProfileAndGoesOnWhereItEnded) {
  const std::string out = (folder_ / "mine").string();
  const std::string said = run("calibrate --backend cuda --steps 2 --out '" + out + "'", 0);
  EXPECT_NE(said.find("points that were not fitted"), std::string::npos) << said;
  EXPECT_NE(said.find("linear forward bf16"), std::string::npos) << said;
  const Json p = Json::parse(run("simulate gpt2 '" + out +
                                     "/cluster.yaml' --framework partita "
                                     "--precision bf16 --json",
                                 0));
  // Of 8-bit products there is a rate, and it is not taken for another type's.
  const auto step = [&](const char* precision) {
    return Json::parse(run(fmt::format("simulate gpt3-1.3b '{}/cluster.yaml' --framework partita "
                                       "--precision {} --json",
                                       out, precision),
                           0))
        .at("step_time_s")
        .get<double>();
  };
  EXPECT_GT(step("fp8"), 0);
  // What paper says that its parts take: all 100 MiB beside its blocks, less those it names.
  const Json parts{{"context", 400 << 20},
                   {"kernels", 38 << 20},
                   {"libraries", 30 << 20},
                   {"workspace", 32 << 20},
                   {"communicators", 0}};
  EXPECT_EQ(p.at("outside_memory_bytes"), parts);
  EXPECT_EQ(p.at("peak_device_bytes").get<std::int64_t>(),
            p.at("peak_reserved_bytes").get<std::int64_t>() + (std::int64_t{500} << 20));
  std::ifstream device_file(out + "/device.yaml");
  const std::string device{std::istreambuf_iterator<char>(device_file), {}};
  EXPECT_NE(device.find("context: {value: 419430400 B, source: "), std::string::npos) << device;
  EXPECT_NE(device.find(": NVML, after the context less before it'}"), std::string::npos) << device;
  // What kernels reach of the copies' rate, as validation/gpu/speed.py reads it: on paper zeroing
  // and norms move as copies do, and a bound that nothing can reach names all.
  const auto shares = [&](const char* bound, int expected) {
    const std::string file = (folder_ / "speed").string();
    const std::string command =
        fmt::format("python3 '{}' memory '{}/device.yaml' --least 6.4e7 --bound {} >'{}'",
                    PARTITA_SPEED_SCRIPT, out, bound, file);
    EXPECT_EQ(WEXITSTATUS(std::system(command.c_str())), expected) << command;
    std::ifstream in(file);
    return Json::parse(in);
  };
  if (std::system("python3 --version >/dev/null 2>&1") == 0) {
    const Json all = shares("0.1", 0), none = shares("9", 1);
    EXPECT_GT(all.at("kernels").size(), 8u) << all;
    EXPECT_EQ(none.at("below").size(), none.at("kernels").size());
    for (const char* kernel : {"zero", "square_sum"})
      EXPECT_NEAR(all.at("kernels").at(kernel).at("share").get<double>(), 1, 0.01) << all;
  }
  // A budget that is over at once: what comes first is measured all the same.
  const std::string some = (folder_ / "some").string();
  run("calibrate --backend cuda --steps 2 --budget 0.001s --out '" + some + "'", 0);
  const auto lines = [](const std::string& file) {
    std::ifstream in(file);
    std::string line;
    int n = 0;
    while (std::getline(in, line)) ++n;
    return n;
  };
  EXPECT_EQ(lines(some + "/measured.jsonl"), 2) << "the header and the copies";
  std::ifstream cluster(out + "/cluster.yaml");
  const std::string text{std::istreambuf_iterator<char>(cluster), {}};
  EXPECT_NE(text.find("kind: pcie, bandwidth: "), std::string::npos) << text;
  EXPECT_GT(lines(out + "/measured.jsonl"), 20);
}

// On paper a product takes twice as long while a stand-in holds any multiprocessor, all else as
// ever: a second wave, which no count of multiprocessors that are left would say.
// Time that is left goes to more shapes, and a longer budget goes on where a shorter one ended.
TEST_F(PaperGpu, ItsBudgetGoesToWhatThePointsSayLeastOf) {
  const std::string out = (folder_ / "mine").string();
  const auto units = [&] {
    std::ifstream in(out + "/measured.jsonl");
    std::vector<Json> all;
    for (std::string line; std::getline(in, line);) all.push_back(Json::parse(line));
    return all;
  };
  const auto calibrate = [&](const std::string& budget) {
    run("calibrate --backend cuda --steps 1 --only ', more' --budget " + budget + " --out '" + out +
            "'",
        0, true);
    return units();
  };
  const auto first = calibrate("1.5s");
  ASSERT_GT(first.size(), 2u) << "a header, and runs";
  for (std::size_t k = 1; k < first.size(); ++k)
    EXPECT_NE(first[k].at("unit").get<std::string>().find(", more"), std::string::npos);
  const auto longer = calibrate("4s");
  EXPECT_NE(err().find("of the last calibration's measurements are kept"), std::string::npos)
      << err();
  ASSERT_GT(longer.size(), first.size());
  EXPECT_TRUE(std::equal(first.begin(), first.end(), longer.begin()));
  const auto again = calibrate("1s");
  EXPECT_LT(again.size(), longer.size()) << "as long as before or shorter: anew";
}

TEST_F(PaperGpu, WhatTransfersDoToItsKernelsIsMeasuredAndPredicted) {
  const std::string out = (folder_ / "mine").string();
  const std::string said =
      run("calibrate --backend cuda --steps 2 --only 'kernels beside' --out '" + out + "'", 0);
  EXPECT_NE(said.find("stand-in of 24"), std::string::npos) << said;
  EXPECT_NE(said.find("1.222"), std::string::npos) << "132 / (132 - 24)\n" << said;
  const auto text_of = [](const std::string& file) {
    std::ifstream in(file);
    return std::string{std::istreambuf_iterator<char>(in), {}};
  };
  const std::string device = text_of(out + "/device.yaml");
  for (const int held : {8, 24, 32}) {
    for (const char* family : {"product", "attention", "memory"}) {
      const std::string line = fmt::format(
          "{{kernel: {}, beside: stand_in, multiprocessors: {}, bytes: {} B, of_kernel: {}, "
          "of_transfer: 1.0000, spread: 0.000}}",
          family, held, held * (30 << 20), *family == 'm' ? "1.0000" : "2.0000");
      EXPECT_NE(device.find(line), std::string::npos) << line << "\n" << device;
    }
  }
  // Two such GPUs behind a switch: gradients are summed while the backward goes on.
  std::ofstream(out + "/two.yaml") << R"(schema: partita.topology/1
name: two
source: made up
nodes:
  - count: 1
    vertices:
      gpu[0-1]: {kind: device, device: device.yaml}
      switch0: {kind: nvswitch}
      cpu0: {kind: cpu}
    links:
      - {from: "gpu[0-1]", to: switch0, kind: nvlink, bandwidth: 450 GB/s, latency: 0.5 us}
      - {from: "gpu[0-1]", to: cpu0, kind: pcie, bandwidth: 63 GB/s, latency: 0.25 us}
)";
  const auto step = [&](const std::string& text, const std::string& network) {
    std::ofstream(out + "/device.yaml") << text;
    return Json::parse(run("simulate gpt2 '" + out +
                               "/two.yaml' --dp 2 --global-batch 8 --micro-batch 4 --json "
                               "--network " +
                               network,
                           0))
        .at("step_time_s")
        .get<double>();
  };
  const auto with = [&](const std::string& of_kernel) {
    std::string text = device;
    for (std::size_t at = 0; (at = text.find("of_kernel: 2.0000", at)) != std::string::npos; ++at)
      text.replace(at, 17, "of_kernel: " + of_kernel);
    return text;
  };
  const std::size_t first = device.find("\nslowdown:"), end = device.find("\nkernels:");
  ASSERT_LT(first, end);
  const std::string derived = device.substr(0, first) + device.substr(end);
  for (const char* network : {"beside", "flows"}) {
    const double idle = step(device, "idle");
    EXPECT_NE(step(device, network), step(derived, network)) << network;
    EXPECT_GT(step(device, network), idle) << network;
    EXPECT_GT(step(with("3.0"), network), step(device, network)) << network;
    EXPECT_DOUBLE_EQ(step(with("1.0"), network), idle) << network;
    EXPECT_GT(step(derived, network), idle) << network;
  }
}

TEST_F(PaperGpu, ItsNetworksTakeWhatIsPredictedFromItsCalibration) {
  // The device's time is a law's, its host's is real: on a busy machine the host binds short steps.
  const Json j =
      Json::parse(run("validate --backend cuda --steps 2 --no-reference --json", 0, true));
  int timed = 0;
  for (const Json& c : j.at("suite").at("cases")) {
    if (c.at("measured_s").is_null()) continue;
    ++timed;
    const double measured = c.at("measured_s").get<double>(),
                 predicted = c.at("predicted_s").get<double>();
    EXPECT_GT(measured, 0) << c;
    EXPECT_GT(predicted, 0) << c;
    EXPECT_EQ(c.at("memory_error"), 0) << c;
    for (const auto& [part, bytes] : c.at("device_memory_bytes").items()) {
      // How many rows experts have differs between steps.
      const bool routed = c.at("name").get<std::string>().find("mixtral") != std::string::npos;
      if (routed && (part == "allocated" || part == "reserved" || part == "device")) continue;
      EXPECT_EQ(bytes.at("measured"), bytes.at("predicted")) << part << " of " << c.at("name");
    }
    EXPECT_EQ(c.at("device_memory_bytes").at("kernels").at("measured"), 38 << 20);
    EXPECT_TRUE(c.at("same_program").at("instructions").get<bool>()) << c;
  }
  EXPECT_EQ(timed, 7);
  EXPECT_LT(j.at("held_out").back().at("mape").get<double>(), 0.2);
}

// On a GPU whose kernels take the time of a law, beside the launches of a host and what passes from
// one to the next, a step is what its profile says: what a measurement has that no prediction
// knows, or the other way around, would be off here as on any GPU.
TEST_F(PaperGpu, StepsTakeWhatTheirKernelsLaunchesAndGapsDo) {
  const auto steps = [&](const std::string& name, int launch_ns, int gap_ns,
                         const char* law = "PARTITA_PAPER_LAW=smooth", double within = 0.02,
                         double bias_within = 0.005) {
    const std::string out = (folder_ / name).string();
    const Json j = Json::parse(run(
        "validate --backend cuda --steps 2 --rounds 1 --no-reference --json --out '" + out + "'", 0,
        true,
        fmt::format("env {} PARTITA_PAPER_LAUNCH_NS={} PARTITA_PAPER_GAP_NS={}", law, launch_ns,
                    gap_ns)));
    double bias = 0;
    int timed = 0;
    for (const auto& c : j.at("suite").at("cases")) {
      if (c.at("measured_s").is_null()) continue;
      const double error = c.at("predicted_s").get<double>() / c.at("measured_s").get<double>() - 1;
      EXPECT_NEAR(error, 0, within) << name << ", " << c.at("name");
      bias += error;
      ++timed;
    }
    EXPECT_EQ(timed, 7);
    EXPECT_NEAR(bias / timed, 0, bias_within) << name;
    return text_of(out + "/device.yaml");
  };
  const std::string quick = steps("quick", 1, 0), usual = steps("usual", 4000, 1500);
  // Products in whole waves of tiles of several sizes, as between no two points: by chance one of
  // them is more off, and experts' rows are no multiples of a tile.
  steps("tiles", 4000, 1500, "PARTITA_PAPER_TILES=1", 0.04, 0.015);
  const auto us = [](const std::string& device, const std::string& key) {
    const std::size_t at = device.find("\n" + key + ": {value: ");
    return at == std::string::npos ? 0 : std::stod(device.substr(at + key.size() + 11));
  };
  for (const char* kernel :
       {"linear forward with bias bf16", "linear weight bf16", "linear forward unaligned bf16",
        "convolution weight with bias bf16", "cross_entropy data unaligned bf16"})
    EXPECT_NE(usual.find(std::string("  '") + kernel + "':"), std::string::npos) << kernel;
  EXPECT_LT(us(quick, "dispatch"), 0.01);
  // A gap of the first kernel less; some instructions are two calls.
  EXPECT_NEAR(us(usual, "dispatch"), 1.5, 0.1);
  EXPECT_NEAR(us(usual, "dispatch_in_graph"), 0.75, 0.1);
  EXPECT_NEAR(us(usual, "launch"), 4.5, 0.5);
  EXPECT_NEAR(us(usual, "list_row"), 0.02, 0.001);
}

// A header, and of each round copies, copies to the host and the network: the seventh line of the
// journal is the network's second run.
TEST_F(PaperGpu, RunsOfANetworkWhoseClockStraysAreNoMeasurement) {
  std::filesystem::copy_file(PARTITA_FAKE_NVML, folder_ / "libnvidia-ml.so.1");
  const std::string clocks = fmt::format("env LD_LIBRARY_PATH='{}'", folder_.string());
  const auto validate = [&](const std::string& out, const std::string& slow,
                            const std::string& rounds = "--rounds 3", bool fails = false) {
    const std::string command = fmt::format(
        "validate --backend cuda --only 'gpt2' --calibrate-only copies --steps 1 "
        "--no-reference --json {} --out '{}/{}'",
        rounds, folder_.string(), out);
    const std::string said =
        run(command, fails ? 1 : 0, !fails,
            clocks + (slow.empty() ? "" : fmt::format(" PARTITA_FAKE_NVML_SLOW='{}'", slow)));
    return Json::parse(said);
  };
  const auto journal = [&](const std::string& out) {
    return fmt::format("{}/{}/suite-journal.jsonl", folder_.string(), out);
  };
  const Json none = validate("none", "99 " + journal("none"));
  EXPECT_EQ(none.at("left_out_for_clock"), (Json{{"calibration", 0}, {"suite", 0}})) << none;
  const Json second = validate("second", "6 " + journal("second"));
  EXPECT_EQ(second.at("left_out_for_clock"), (Json{{"calibration", 0}, {"suite", 1}})) << second;
  EXPECT_EQ(second.at("suite").at("cases")[0].at("left_out_for_clock"), 1);
  // Networks have three rounds beside one of calibration, unless it is said.
  const Json twice = validate("twice", "4 " + journal("twice"), "");
  EXPECT_EQ(twice.at("left_out_for_clock"), (Json{{"calibration", 0}, {"suite", 1}})) << twice;
  EXPECT_EQ(validate("once", "3 " + journal("once"), "--rounds 1").at("left_out_for_clock"),
            (Json{{"calibration", 0}, {"suite", 0}}));
  // Where no power cap explains its clock, a run without another round is beside all runs.
  ::setenv("PARTITA_FAKE_NVML_FREE", "1", 1);
  EXPECT_EQ(validate("free", "3 " + journal("free"), "--rounds 1", true).at("left_out_for_clock"),
            (Json{{"calibration", 0}, {"suite", 1}}));
  EXPECT_EQ(validate("freed", "2 " + journal("freed"), "--rounds 1").at("left_out_for_clock"),
            (Json{{"calibration", 1}, {"suite", 0}}));
  ::unsetenv("PARTITA_FAKE_NVML_FREE");
  const Json copies = validate("copies", "4 " + journal("copies"));
  EXPECT_EQ(copies.at("left_out_for_clock"), (Json{{"calibration", 1}, {"suite", 0}})) << copies;
  // Heat holds all of them down: nothing is shown, and nothing of it is gone on with.
  const Json none_left = validate("hot", "", "--rounds 2", true);
  EXPECT_EQ(none_left.at("left_out_for_clock"), (Json{{"calibration", 4}, {"suite", 2}}));
  EXPECT_EQ(none_left.at("no_figures"), Json::array({"gpt2, 1024 tokens, batch 4"}));
  EXPECT_TRUE(none_left.at("suite").at("cases").empty());
  const std::string out = (folder_ / "mine").string();
  for (const int again : {0, 1}) {
    static_cast<void>(again);
    run("calibrate --backend cuda --only copies --steps 1 --out '" + out + "'", 3, false, clocks);
    EXPECT_NE(err().find("nothing is left of 2 runs: the GPU's clock was held down by heat"),
              std::string::npos)
        << err();
  }
  EXPECT_FALSE(std::filesystem::exists(out + "/device.yaml"));
  EXPECT_FALSE(std::filesystem::exists(out + "/journal.jsonl"));
}

TEST_F(PaperGpu, ARankOfALargeModelIsReplayed) {
  const Json j = Json::parse(
      run("replay llama-3-70b dgx-h100:8 --tp 8 --pp 8 --global-batch 8 --rank 63 --backend cuda "
          "--steps 2 --json",
          0));
  EXPECT_EQ(j.at("layers"), 80);
  EXPECT_EQ(j.at("ranks"), 64);
  for (const auto& [category, bytes] : j.at("memory_bytes").items()) {
    if (category == "reserved") continue;
    if (category == "beside") {
      EXPECT_EQ(bytes.at("measured"), 100 << 20) << "what paper says its libraries take";
      continue;
    }
    EXPECT_EQ(bytes.at("measured"), bytes.at("predicted")) << category;
  }
  EXPECT_GT(j.at("compute_s").at("measured").get<double>(), 0);
  // By which algorithm of its library's products ran, of as many as were asked to be timed.
  const Json product{{"m", 64},
                     {"n", 32},
                     {"k", 16},
                     {"batch", 1},
                     {"transposed", "NT"},
                     {"type", "bf16"},
                     {"out", "fp32"},
                     {"adds", false},
                     {"algorithm", 21},
                     {"candidates", 4},
                     {"taken", 2},
                     {"seconds", 1.5e-6},
                     {"seconds_of_usual", 1.56e-6}};
  Json adds = product;
  adds["transposed"] = "TN";
  adds["adds"] = true;
  EXPECT_EQ(j.at("products"), Json::array({product, adds}));
  // What the driver says of the GPU meanwhile, and what the whole rank needs.
  EXPECT_EQ(j.at("conditions"), nullptr) << "there is no NVML";
  EXPECT_EQ(j.at("whole_rank_bytes").at("predicted"),
            j.at("memory_bytes").at("total").at("predicted"));
  const std::int64_t all = std::int64_t{80} << 30, room = all - (1 << 30) - all / 100;
  EXPECT_EQ(j.at("whole_rank_bytes").at("room"), room);
  std::filesystem::copy_file(PARTITA_FAKE_NVML, folder_ / "libnvidia-ml.so.1");
  const std::string watched =
      fmt::format("env LD_LIBRARY_PATH='{}' PARTITA_FAKE_NVML_SLOW='99 none'", folder_.string());
  const std::string part =
      "replay llama-3-70b dgx-h100:1 --tp 8 --zero 0 --layers 2 --rank 0 --backend cuda --steps 1";
  const Json two = Json::parse(run(part + " --json", 0, false, watched));
  EXPECT_EQ(two.at("conditions").at("clock_mhz"), 1755);
  EXPECT_EQ(two.at("conditions").at("throttled"), "power cap");
  EXPECT_GT(two.at("whole_rank_bytes").at("predicted").get<std::int64_t>(), room);
  const std::string said = run(part, 0, false, watched);
  EXPECT_NE(said.find("\nat 1755 MHz, 698 W, held back by power cap\n"), std::string::npos) << said;
  EXPECT_NE(said.find("the whole rank needs "), std::string::npos) << said;
  EXPECT_NE(said.find(" too little\n"), std::string::npos) << said;
  std::filesystem::remove(folder_ / "libnvidia-ml.so.1");
  // validation/gpu/speed.py reads them, those that add to a gradient among them.
  if (std::system("python3 --version >/dev/null 2>&1") == 0) {
    // On paper the fastest of the usual ones takes 1.56 us, of all 1.5: 1.04.
    for (const auto& [bound, code] : {std::pair{"1.03", 1}, {"1.05", 0}}) {
      const std::string speed =
          fmt::format("python3 '{}' products '{}' --bound {} >'{}'", PARTITA_SPEED_SCRIPT,
                      (folder_ / "partita").string(), bound, (folder_ / "speed").string());
      EXPECT_EQ(WEXITSTATUS(std::system(speed.c_str())), code) << text_of(folder_ / "speed");
    }
    const Json compared = Json::parse(text_of(folder_ / "speed"));
    EXPECT_EQ(compared.at("products").size(), 2u) << compared;
    EXPECT_EQ(compared.at("not timed"), Json::array());
  }
  const std::string small =
      "replay gpt2 dgx-h100:1 --layers 1 --rank 0 --backend cuda --steps 1 --json";
  ::setenv("PARTITA_CUDA_CANDIDATES", "64", 1);
  EXPECT_EQ(Json::parse(run(small, 0)).at("products")[0].at("candidates"), 64);
  ::setenv("PARTITA_CUDA_CANDIDATES", "all", 1);
  run(small, 2);
  EXPECT_NE(err().find("PARTITA_CUDA_CANDIDATES: 'all' is not in 1 to 64"), std::string::npos)
      << err();
  ::unsetenv("PARTITA_CUDA_CANDIDATES");
  // Of a hybrid's first five blocks none attends.
  EXPECT_EQ(Json::parse(run("replay nemotron-h-8b dgx-h100:1 --tp 2 --dp 4 --zero 1 --layers 5 "
                            "--backend cuda --steps 1 --json",
                            0))
                .at("not_run"),
            (Json{"attention data", "attention forward"}));
  // What does not fit is said before anything is run.
  run("replay gpt3-175b dgx-h100:1 --tp 8 --backend cuda", 2);
  EXPECT_NE(err().find("more than this device has to give; --layers "), std::string::npos) << err();
}

// Whatever a framework fuses, what was measured is what is priced: on one device without a network
// the step is its kernels (with nemo's joined projections it was three quarters of them).
TEST_F(PaperGpu, AFrameworksKernelsAreNotTheReplays) {
  for (const char* framework : {"nemo", "torchtitan", "partita"}) {
    const Json j = Json::parse(
        run(fmt::format(
                "replay llama-3.2-1b 'dgx-h100:1 gpus' --seq 2048 --global-batch 1 --network idle "
                "--backend cuda --steps 1 --warm-up 0 --json --framework {}",
                framework),
            0));
    const double compute = j.at("compute_s").at("measured"),
                 step = j.at("step_time_s").at("replayed");
    EXPECT_NEAR(step / compute, 1, 0.01) << framework;
    EXPECT_EQ(j.at("memory_bytes").at("total").at("measured"),
              j.at("memory_bytes").at("total").at("predicted"));
    EXPECT_EQ(j.at("not_run"), Json::array());
  }
}

// A bundle on a node whose CUDA is Python's wheels.
TEST_F(PaperGpu, FindsLibrariesInPythonsWheels) {
  std::filesystem::remove(folder_ / "libpartita_cuda.so");
  std::filesystem::copy_file(PARTITA_PAPER_OF_WHEELS, folder_ / "libpartita_cuda.so");
  const auto place = folder_ / "venv/lib/python3.11/site-packages/nvidia/cu13/lib";
  std::filesystem::create_directories(place);
  const std::string replay =
      "replay gpt2 dgx-h100:1 --layers 1 --rank 0 --backend cuda --steps 1 --json";
  const std::string with = fmt::format("env VIRTUAL_ENV='{}'", (folder_ / "venv").string());
  run(replay, 2, false, with);
  EXPECT_NE(err().find("--backend: cuda needs libpartita_cuda.so, which cannot be loaded "
                       "(libwheel_only.so: cannot open shared object file"),
            std::string::npos)
      << err();
  EXPECT_NE(err().find("activate the Python environment that has NVIDIA's wheels"),
            std::string::npos)
      << err();
  std::filesystem::copy_file(PARTITA_WHEEL_ONLY, place / "libwheel_only.so");
  run(replay, 0, false, with);
  // Of the python3 that is found first, linked as it may be.
  std::filesystem::create_directories(folder_ / "venv/bin");
  std::filesystem::create_symlink("/usr/bin/python3", folder_ / "venv/bin/python3");
  run(replay, 2);
  run(replay, 0, false,
      fmt::format("env PATH='{}:{}'", (folder_ / "venv/bin").string(), std::getenv("PATH")));
}

}  // namespace
}  // namespace partita
