// Users' own logs and tables as points of profiles: docs/calibration.md, "From logs".
#include "validation/evidence.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "base/error.h"
#include "base/yaml.h"
#include "simulator/cost/cost.h"
#include "topologies/device.h"
#include "topologies/topology.h"

namespace partita::validation {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::string log_text(const std::string& program = "all_reduce_perf", int ranks = 16,
                     int hosts = 2) {
  std::string s = "$ mpirun -np 16 ./build/" + program +
                  " -b 1M -e 2M\n# nThread 1 nGpus 1 minBytes 1048576 maxBytes 2097152 step: "
                  "2(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1 graph: 0\n#\n"
                  "# Using devices\n";
  for (int r = 0; r < ranks; ++r)
    s +=
        fmt::format("#  Rank {:2} Group  0 Pid {} on  host{} device {:2} [0x07] NVIDIA H100 80GB\n",
                    r, 4000 + r, r * hosts / ranks, r % 8);
  s += "#\n"
       "#                                                              out-of-place          "
       "             in-place\n"
       "#       size         count      type   redop    root     time   algbw   busbw #wrong   "
       "  time   algbw   busbw #wrong\n"
       "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)          "
       "  (us)  (GB/s)  (GB/s)\n"
       "host0: NCCL INFO said something here\n"
       "     1048576        262144     float     sum      -1    90.10   11.64   21.82      0    "
       "88.50   11.85   22.21      0\n"
       "     2097152        524288     float     sum      -1    120.0   17.48   32.77      0    "
       "118.0   17.77   33.32    N/A\n"
       "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 27.5\n";
  return s;
}

TEST(NcclTestsLogs, WhatLaunchersPutBeforeLinesIsTakenOff) {
  const NcclTestsLog plain = parse_nccl_tests(log_text(), "run.log");
  for (const char* tag : {"[1,0]<stdout>:", "[1,12]<stdout>: ", "0: ", " 7: "}) {
    std::istringstream in(log_text());
    std::string tagged;
    for (std::string line; std::getline(in, line);) tagged += tag + line + "\n";
    EXPECT_TRUE(is_nccl_tests(tagged)) << tag;
    const NcclTestsLog log = parse_nccl_tests(tagged, "run.log");
    EXPECT_EQ(log.ranks, plain.ranks) << tag;
    EXPECT_EQ(log.nodes, plain.nodes) << tag;
    EXPECT_EQ(log.times, plain.times) << tag;
  }
}

TEST(NcclTestsLogs, ARunThatFailedSaysNothing) {
  for (const char* line : {"host0: Test NCCL failure common.cu:958 'unhandled system error'\n",
                           " .. host0 pid 4711: Test failure common.cu:1080\n"})
    EXPECT_THAT([&] { parse_nccl_tests(log_text() + line, "run.log"); },
                ThrowsMessage<InputError>(HasSubstr("the run failed here; give the log of one")));
}

TEST(NcclTestsLogs, OneThatWasCutBetweenLinesDoesNotEnd) {
  EXPECT_TRUE(parse_nccl_tests(log_text(), "run.log").ended);
  const std::string whole = log_text();
  const std::string cut = whole.substr(0, whole.rfind("     2097152"));
  const NcclTestsLog log = parse_nccl_tests(cut, "run.log");
  EXPECT_EQ(log.times.size(), 1u);
  EXPECT_FALSE(log.ended);
}

TEST(NcclTestsLogs, TheExampleOfThePage) {
  EXPECT_TRUE(is_nccl_tests(log_text()));
  const NcclTestsLog log = parse_nccl_tests(log_text(), "run.log");
  EXPECT_EQ(log.kind, "all_reduce");
  EXPECT_EQ(log.type, "float");
  EXPECT_EQ(log.ranks, 16);
  EXPECT_EQ(log.nodes, 2);
  ASSERT_EQ(log.times.size(), 2u);
  EXPECT_EQ(log.times[0].first, Bytes{1 << 20});
  EXPECT_DOUBLE_EQ(log.times[0].second.count, 88.5e-6);  // in place
  EXPECT_DOUBLE_EQ(parse_nccl_tests(log_text("all_gather_perf"), "run.log").times[0].second.count,
                   90.1e-6);
}

TEST(NcclTestsLogs, TheOperationIsThatOfTheTextElseOfTheName) {
  EXPECT_EQ(parse_nccl_tests(log_text("reduce_scatter_perf"), "x").kind, "reduce_scatter");
  EXPECT_EQ(parse_nccl_tests(log_text("reduce_perf"), "x").kind, "reduce");
  EXPECT_EQ(parse_nccl_tests(log_text("it"), "broadcast_perf.txt").kind, "broadcast");
  EXPECT_EQ(parse_nccl_tests(log_text("it"), "h100_all_reduce_perf.log").kind, "all_reduce");
  EXPECT_EQ(parse_nccl_tests(log_text("it"), "h100_reduce_perf.log").kind, "reduce");
  EXPECT_EQ(parse_nccl_tests(log_text("it"), "small_all_reduce_perf.log").kind, "all_reduce");
  EXPECT_THAT([] { parse_nccl_tests(log_text("it"), "x.log"); },
              ThrowsMessage<InputError>(HasSubstr("x.log: neither the log nor its name says")));
  EXPECT_THAT([] { parse_nccl_tests(log_text("alltoall_perf"), "x.log"); },
              ThrowsMessage<InputError>(HasSubstr("exchanges are priced from links")));
}

/// A log that names its GPUs is of the cluster it is taken for; one that names none, or a GPU that
/// the catalogue does not know, is let through.
TEST(NcclTestsLogs, AreOfTheDevicesThatTheyAreTakenFor) {
  const auto catalogue = load_catalogue();
  NcclTestsLog log = parse_nccl_tests(log_text(), "run.log");
  EXPECT_EQ(log.device, "NVIDIA H100 80GB");
  check_device(log, "h100-sxm", catalogue);
  EXPECT_THAT([&] { check_device(log, "a100-sxm-80gb", catalogue); },
              ThrowsMessage<InputError>(HasSubstr(
                  "run.log: was measured on NVIDIA H100 80GB, but the cluster's devices are "
                  "a100-sxm-80gb; name the cluster that was measured with --topology")));
  for (const auto& [name, device] :
       std::vector<std::pair<std::string, std::string>>{{"NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"},
                                                        {"NVIDIA A100 80GB PCIe", "a100-pcie-80gb"},
                                                        {"Tesla V100-SXM2-32GB", "v100-sxm-32gb"},
                                                        {"NVIDIA GB200", "gb200"},
                                                        {"NVIDIA B200", "b200"}}) {
    log.device = name;
    check_device(log, device, catalogue);
    EXPECT_THROW(check_device(log, "h100-sxm", catalogue), InputError) << name;
  }
  for (const char* unknown : {"", "NVIDIA", "NVIDIA Rubin R100", "AMD Instinct MI300X"}) {
    log.device = unknown;
    check_device(log, "h100-sxm", catalogue);
  }
}

TEST(NcclTestsLogs, AreOfNodesThatHaveAsManyDevices) {
  ClusterShape cluster;
  cluster.name = "dgx-h100", cluster.devices_per_node = 8;
  EXPECT_NO_THROW(check_hosts(parse_nccl_tests(log_text(), "run.log"), cluster));
  // 12 ranks of 2 hosts are 6 and 6, of 64 on 4 each has 16.
  EXPECT_NO_THROW(check_hosts(parse_nccl_tests(log_text("it", 12, 2), "all_reduce_perf"), cluster));
  const NcclTestsLog many = parse_nccl_tests(log_text("all_reduce_perf", 64, 4), "run.log");
  EXPECT_THAT([&] { check_hosts(many, cluster); },
              ThrowsMessage<InputError>(HasSubstr(
                  "run.log: has 16 ranks on host0, but a node of dgx-h100 has 8 devices; name the "
                  "cluster that was measured with --topology")));
}

TEST(NcclTestsLogs, OfASizeThatIsThereOftenTheMedianCounts) {
  std::string s = log_text();
  const std::size_t at = s.find("     2097152");
  for (const char* us : {"300.0", "88.00"})
    s.insert(at,
             fmt::format("     1048576        262144     float     sum      -1    90.10   11.64 "
                         "  21.82      0    {}   11.85   22.21      0\n",
                         us));
  const NcclTestsLog log = parse_nccl_tests(s, "run.log");
  ASSERT_EQ(log.times.size(), 2u);
  EXPECT_EQ(log.times[0].first, Bytes{1 << 20});
  EXPECT_DOUBLE_EQ(log.times[0].second.count, 88.5e-6);  // of 88, 88.5 and 300
  EXPECT_DOUBLE_EQ(log.times[1].second.count, 118e-6);
}

TEST(NcclTestsLogs, BadOnesAreRefusedWithTheLine) {
  const auto with = [](const std::string& from, const std::string& to) {
    std::string s = log_text();
    const std::size_t at = s.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return s.replace(at, from.size(), to);
  };
  const auto refused = [](const std::string& text, const std::string& what) {
    EXPECT_THAT([&] { parse_nccl_tests(text, "x.log"); },
                ThrowsMessage<InputError>(HasSubstr(what)));
  };
  // 4 lines, 16 ranks, 5 lines; then rows.
  refused(with("118.0   17.77   33.32    N/A", "118.0"),
          "x.log:27: a row of 10 columns where the head has 13");
  refused(with("88.50", "-"), "x.log:26: '-' is no time in us of 1048576 bytes");
  refused(with("88.50", "0"), "x.log:26: '0' is no time in us");
  refused(log_text("all_reduce_perf", 1, 1),
          "x.log: is of 1 rank, between which nothing passes; give a log of 2 or more");
  refused(with("21.82      0", "21.82      3"), "x.log:26: 3 values came out wrong");
  refused(log_text() + log_text(), "x.log:52: a second run begins here");
  refused(log_text("all_reduce_perf", 0), "x.log: lists no ranks");
  refused(with(" on  host0", ""), "x.log:5: names no host of the rank");
  refused(log_text().substr(0, log_text().find("     1048576")), "x.log: has no rows");
  refused("all_reduce_perf\n", "x.log: has no line that names columns");
  EXPECT_FALSE(is_nccl_tests("m,n,k,type,tflops\n"));
}

TEST(ProductTables, TheExampleOfThePage) {
  const auto tables =
      parse_products(parse_csv("m,n,k,type,tflops,layout\n4096,4096,4096,bf16,550,TN\n"
                               "8,16,32,bf16,0.5,TN\n8,16,32,fp8,1,\n",
                               "g.csv"));
  ASSERT_EQ(tables.size(), 2u);
  const ProductTable& t = tables[0].type == ElementType::bf16 ? tables[0] : tables[1];
  EXPECT_EQ(t.layout, ProductLayout::tn);
  ASSERT_EQ(t.points.size(), 2u);
  EXPECT_NEAR(t.points[0].time.count, 249.9e-6, 0.05e-6);
  EXPECT_NEAR(t.points[1].time.count, 2.0 * 8 * 16 * 32 / 0.5e12, 1e-18);
  // As others write it.
  for (const char* text : {"M,N,K,dtype,Time (us)\n4096,4096,4096,torch.bfloat16,250\n",
                           "m,n,k,precision,time_ms\n4096,4096,4096,BF16,0.25\n",
                           "M,N,K,Type,TFLOP/s\n4096,4096,4096,bf16,549.755813888\n"}) {
    const auto theirs = parse_products(parse_csv(text, "t.csv"));
    ASSERT_EQ(theirs.size(), 1u) << text;
    EXPECT_EQ(theirs[0].type, ElementType::bf16) << text;
    EXPECT_NEAR(theirs[0].points.at(0).time.count, 250e-6, 1e-12) << text;
  }
  EXPECT_EQ(parse_products(parse_csv("m,n,k,type,time_us\n8,8,8,torch.float8_e4m3fn,5\n", "t.csv"))
                .at(0)
                .type,
            ElementType::fp8);
  const auto timed = parse_products(
      parse_csv("m,n,k,type,time_ms,count,out\n8,16,32,bf16,0.25,4,fp32\n", "g.csv"));
  EXPECT_DOUBLE_EQ(timed[0].points[0].time.count, 0.25e-3);
  EXPECT_EQ(timed[0].points[0].count, 4);
  EXPECT_EQ(timed[0].out, ElementType::fp32);
}

TEST(ProductTables, BadOnesAreRefusedWithTheLine) {
  const auto refused = [](const std::string& text, const std::string& what) {
    EXPECT_THAT([&] { parse_products(parse_csv(text, "g.csv")); },
                ThrowsMessage<InputError>(HasSubstr(what)));
  };
  refused("m,n,type,tflops\n1,1,bf16,1\n", "g.csv:1: has no column k");
  refused("m,n,k,type\n1,1,1,bf16\n", "g.csv:1: has no column of what was measured");
  refused("m,n,k,type,tflops\n1,1,1,bf16,1\n0,1,1,bf16,1\n",
          "g.csv:3: m: '0' is no number above 0");
  refused("m,n,k,type,tflops\n1,1,1,bf16,fast\n", "g.csv:2: tflops: 'fast' is no number above 0");
  refused("m,n,k,type,tflops\n1,1,1,complex,1\n", "g.csv:2");
  refused("m,n,k,type,tflops,layout\n1,1,1,bf16,1,TT\n", "g.csv:2: layout: 'TT' is unknown");
  refused("m,n,k,type,tflops\n", "g.csv: has no rows");
  refused("m,n,k,type,tflops,time_us\n4096,4096,4096,bf16,550,999\n",
          "g.csv:2: time_us says 137.6 TFLOP/s, tflops 550");
  EXPECT_NO_THROW(parse_products(
      parse_csv("m,n,k,type,tflops,time_us\n4096,4096,4096,bf16,550,250\n", "g.csv")));
}

/// Tables without a layout are of each: prices stay near what was measured, in every layout.
TEST(ProductTables, OfNoLayoutAreOfEach) {
  std::mt19937 random(7);
  const auto sizes = std::array{1024.0, 2048.0, 4096.0, 5120.0, 8192.0, 14336.0};
  for (const char* of : {"a100-sxm-80gb", "h100-sxm", "b200"}) {
    const std::string file = data_folder(fmt::format("topologies/devices/{}.yaml", of));
    const double peak = load_device(of).matrix_rate(ElementType::bf16).count;
    for (int k = 0; k < 6; ++k) {
      ProductTable t;
      t.source = "mine";
      for (int i = 0; i < 12; ++i) {
        const auto one = [&] { return sizes[random() % sizes.size()]; };
        ProductTable::Point x{one(), one(), one(), 1, {}};
        const double share = 0.5 + 0.3 * std::uniform_real_distribution()(random);
        x.time = Seconds{2 * x.m * x.n * x.k / (share * peak)};
        t.points.push_back(x);
      }
      ShapePrices prices(parse_device(with_products(read_file(file), file, {t}), file));
      for (const ProductTable::Point& x : t.points) {
        for (const auto layout : {ProductLayout::nn, ProductLayout::nt, ProductLayout::tn}) {
          Product p{x.m,   x.n,   x.k, 1,    ElementType::bf16, ElementType::bf16, layout,
                    false, false, {},  false};
          p.bytes = p.operand_bytes();
          const double ratio = prices.of(p).work.count / x.time.count;
          EXPECT_GT(ratio, 0.5) << of;
          EXPECT_LT(ratio, 2) << of;
        }
      }
    }
  }
}

/// What was measured counts before what the catalogue has of shapes nearby: a product that takes
/// half as long again does so in every layout.
TEST(ProductTables, GoBeforeTheCataloguesPoints) {
  for (const char* of : {"a100-sxm-80gb", "a100-pcie-80gb", "h100-sxm"}) {
    const std::string file = data_folder(fmt::format("topologies/devices/{}.yaml", of));
    for (const auto layout : {ProductLayout::nn, ProductLayout::nt, ProductLayout::tn}) {
      Product p{4096,  4096,  4096, 1,    ElementType::bf16, ElementType::bf16, layout,
                false, false, {},   false};
      p.bytes = p.operand_bytes();
      ShapePrices own(load_device(of));
      ProductTable t;
      t.source = "mine";
      t.clock = load_device(of).sustained_clock;
      t.points.push_back({4096, 4096, 4096, 1, 1.5 * own.of(p).work});
      ShapePrices prices(parse_device(with_products(read_file(file), file, {t}), file));
      EXPECT_NEAR(prices.of(p).work / own.of(p).work, 1.5, 0.2) << of << " " << name(layout);
    }
  }
}

/// What was measured is what a collective costs.
TEST(Evidence, PricesAreThoseOfTheLogs) {
  const std::string folder = ::testing::TempDir() + fmt::format("partita-evidence-{}", ::getpid());
  std::filesystem::create_directories(folder);
  const std::string device = data_folder("topologies/devices/h100-sxm.yaml"),
                    cluster = data_folder("topologies/catalogue/dgx-h100.yaml");
  const auto products =
      parse_products(parse_csv("m,n,k,type,tflops,layout\n1000,3000,5000,bf16,100,TN\n", "g'.csv"));
  std::ofstream(folder + "/device.yaml") << with_products(read_file(device), device, products);
  const auto at_rate = [&](const char* tflops) {
    return with_products(
        read_file(device), device,
        parse_products(parse_csv(fmt::format("m,n,k,type,tflops\n8192,8192,8192,bf16,{}\n", tflops),
                                 "g.csv")));
  };
  EXPECT_NO_THROW(at_rate("1000"));  // boosted a little above the sheet's 989
  EXPECT_THAT([&] { at_rate("62000"); },
              ThrowsMessage<InputError>(HasSubstr("g.csv: 8192 x 8192 x 8192 of bf16 would run at "
                                                  "62000 TFLOP/s where h100-sxm has 989")));
  EXPECT_NO_THROW(at_rate("10"));
  EXPECT_THAT([&] { at_rate("0.6"); },
              ThrowsMessage<InputError>(HasSubstr("g.csv: 8192 x 8192 x 8192 of bf16 would run at "
                                                  "0.6 TFLOP/s where h100-sxm has 989 at most")));
  // Of two nodes 88.5 us for 1 MiB; a thousand times as many, or as few, are another unit's.
  const Topology two = load_topology("dgx-h100:2");
  NcclTestsLog log = parse_nccl_tests(log_text(), "a.log");
  EXPECT_NO_THROW(check_times(log, two));
  for (const double unit : {1e-3, 1e3}) {
    NcclTestsLog other = log;
    for (auto& [bytes, time] : other.times) time = unit * time;
    EXPECT_THAT([&] { check_times(other, two); },
                ThrowsMessage<InputError>(HasSubstr("where 16 ranks of dgx-h100 need about")));
  }
  const std::vector<NcclTestsLog> logs{
      parse_nccl_tests(log_text(), "a.log"),
      parse_nccl_tests(log_text("all_gather_perf", 8, 1), "b.log"),
      parse_nccl_tests(log_text("all_reduce_perf", 8, 1), "c.log")};
  std::ofstream(folder + "/cluster.yaml")
      << with_curves(read_file(cluster), cluster, "h100-sxm", "device.yaml", 1, logs);
  const Topology t = load_topology(folder + "/cluster.yaml:2");
  Communication c(t);
  std::vector<std::int64_t> all(16), node(8);
  for (std::size_t r = 0; r < 16; ++r) all[r] = static_cast<std::int64_t>(r);
  for (std::size_t r = 0; r < 8; ++r) node[r] = static_cast<std::int64_t>(r);
  EXPECT_NEAR(c.collective(CollectiveKind::all_reduce, Bytes{1 << 20}, all).count, 88.5e-6, 1e-9);
  EXPECT_NEAR(c.collective(CollectiveKind::all_reduce, Bytes{2 << 20}, node).count, 118e-6, 1e-9);
  EXPECT_NEAR(c.collective(CollectiveKind::all_gather, Bytes{2 << 20}, node).count, 120e-6, 1e-9);
  const DeviceProfile& d = t.device(DeviceId{0});
  ASSERT_FALSE(d.products.empty());
  EXPECT_EQ(d.products[0].source, "g'.csv");
  EXPECT_EQ(d.products[0].points[0].n, 3000);
  EXPECT_GT(d.products.size(), 1u);  // the catalogue's are still there
  EXPECT_EQ(d.name, "h100-sxm");
  EXPECT_EQ(t.name(), "dgx-h100");
  std::filesystem::remove_all(folder);
  // Racks of 18 hosts that are one NVLink domain each.
  EXPECT_THAT(with_curves("device: x\n", "f", "x", "y.yaml", 2, {logs[0]}), HasSubstr("nodes: 1"));
  EXPECT_THAT([] { with_curves("device: xy\n", "f", "x", "y.yaml", 1, {}); },
              ThrowsMessage<InputError>(HasSubstr("f: has no device: x")));
  // Of a device that is like another the points go before that one's.
  const std::string like = data_folder("topologies/devices/a100-sxm-80gb.yaml");
  const DeviceProfile added =
      parse_device(with_products(read_file(like), like, products), "d.yaml");
  EXPECT_EQ(added.products.size(), products.size());
  EXPECT_NE(added.like, nullptr);
}

TEST(Evidence, ALoopOfProductsIsNotSlowedDownAgain) {
  // What the catalogue's H100 reaches in a step, and what one kernel reaches on one that rested.
  const auto table = [](double tflops) {
    ProductTable t;
    t.source = "mine";
    for (const auto& [m, n, k] :
         {std::array{8192.0, 8192.0, 8192.0}, std::array{8192.0, 14336.0, 4096.0}})
      t.points.push_back({m, n, k, 1, Seconds{2 * m * n * k / (tflops * 1e12)}});
    return t;
  };
  const DeviceProfile h100 = load_device("h100-sxm");
  EXPECT_EQ(clock_of({table(617)}, h100), h100.sustained_clock);
  EXPECT_EQ(clock_of({table(830)}, h100), 1);
  EXPECT_EQ(clock_of({table(250)}, load_device("a100-sxm-80gb")), 1) << "one clock";
  const DeviceProfile b200 = load_device("b200");
  EXPECT_EQ(clock_of({table(1400)}, b200), b200.sustained_clock) << "its points tell none apart";
  // One run of one program has one clock.
  EXPECT_NEAR(clock_of({table(617), table(617), table(830)}, h100), h100.sustained_clock, 0.02);
  const std::string file = data_folder("topologies/devices/h100-sxm.yaml");
  const auto in_a_step = [&](double tflops, double clock) {
    ProductTable t = table(tflops);
    t.clock = clock;
    ShapePrices prices(parse_device(with_products(read_file(file), file, {t}), file));
    Product p{8192,  8192,  8192, 1,    ElementType::bf16, ElementType::bf16, ProductLayout::any,
              false, false, {},   false};
    p.bytes = p.operand_bytes();
    return 2 * 8192.0 * 8192 * 8192 / prices.of(p).work.count / 1e12;
  };
  // Points of a loop are a step's prices; of short kernels the clock goes off. The catalogue's own
  // points nearby have a word too.
  EXPECT_NEAR(in_a_step(650, h100.sustained_clock), 650, 0.04 * 650);
  EXPECT_NEAR(in_a_step(650, 1), 650 * 0.76, 0.05 * 650);
  // A slower product makes no device faster.
  double before = 1e9;
  for (double tflops = 900; tflops > 400; tflops -= 10) {
    const double now = in_a_step(tflops, clock_of({table(tflops)}, h100));
    EXPECT_LT(now, 1.002 * before) << tflops;
    before = now;
  }
  EXPECT_LT(before, 450);
}

}  // namespace
}  // namespace partita::validation
