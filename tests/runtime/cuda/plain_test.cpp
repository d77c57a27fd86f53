// Kernels of plain buffers: the CUDA text, run on the host, and the host's give equal bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <random>

#include "runtime/cuda/stand_in.h"
#include "tests/runtime/cuda/host_machine.h"

namespace partita::cuda {
namespace {

using execute::Box;

/// One call and its buffers, twice.
struct Case {
  Program program;
  Instruction instruction;
  std::int64_t step = 0;
  std::deque<Box> boxes;
  std::deque<std::vector<float>> reads, outputs, statistics, writes;

  PlainCall call() {
    PlainCall c;
    c.program = &program;
    c.instruction = &instruction;
    c.optimizer = program.optimizer;
    c.step = step;
    const auto fill = [&](std::vector<PlainCall::Operand>& to,
                          std::deque<std::vector<float>>& from) {
      for (auto& v : from) {
        const auto n = std::ssize(v);
        boxes.push_back({{std::vector<std::int64_t>(3)}, false, {}, true});
        to.push_back({reinterpret_cast<std::byte*>(v.data()), n, 4 * n, &boxes.back(), false});
      }
    };
    fill(c.reads, reads);
    fill(c.outputs, outputs);
    fill(c.statistics, statistics);
    fill(c.writes, writes);
    return c;
  }
};

/// `ulps`: of what is a sum in another order.
void expect_equal_bits(const Case& start, const std::string& what, int ulps = 0) {
  Case host = start, ours = start;
  execute::plain_on_host(host.call());
  HostMachine m;
  ASSERT_TRUE(run_plain(m, ours.call())) << what;
  for (const auto list : {&Case::reads, &Case::outputs, &Case::writes}) {
    for (std::size_t b = 0; b < (host.*list).size(); ++b) {
      for (std::size_t k = 0; k < (host.*list)[b].size(); ++k) {
        const float want = (host.*list)[b][k], got = (ours.*list)[b][k];
        if (bits_of(want) == bits_of(got)) continue;
        ASSERT_NEAR(want, got, static_cast<float>(ulps) * 0x1p-23f * std::abs(want))
            << what << ", buffer " << b << ", element " << k;
        ASSERT_GT(ulps, 0) << what;
      }
    }
  }
}

class PlainKernels : public ::testing::Test {
 protected:
  std::vector<float> values(std::size_t n) {
    std::vector<float> v(n);
    for (float& x : v) x = std::normal_distribution<float>()(rng_);
    return v;
  }
  Case of(Kernel k) {
    Case c;
    c.instruction.kind = Kind::compute;
    c.instruction.kernel = k;
    return c;
  }
  std::mt19937 rng_{11};
};

TEST_F(PlainKernels, OptimizersUpdateAlike) {
  for (int round = 0; round < 40; ++round) {
    Case c = of(Kernel::optimizer);
    Optimizer& o = c.program.optimizer;
    o.kind = round % 2 == 0 ? OptimizerKind::sgd : OptimizerKind::adam;
    o.weight_decay = round % 3 == 0 ? 0.01 : 0;
    c.step = round % 7;
    // Whole pieces of fp32, too.
    const std::size_t n = round % 5 == 1 ? 512 : rng_() % 50;
    c.reads = {values(n)};
    c.outputs = {values(n)};
    c.writes = {values(n)};
    if (o.kind == OptimizerKind::sgd && round % 8 == 4) {
      o.momentum = 0;
      c.outputs.clear();
    }
    if (o.kind == OptimizerKind::adam) {
      c.outputs.push_back(values(n));
      for (float& v : c.outputs[1]) v = std::abs(v);
    }
    if (round % 4 > 1) {
      // An overflow, or none, and how many updates there were.
      c.program.loss_scale = {256, round % 8 > 3, 1};
      c.statistics = {{round % 5 == 0 ? 1.0f : 0.0f}, {256, 1, static_cast<float>(round % 6)}};
    }
    expect_equal_bits(c, "round " + std::to_string(round));
    if (HasFatalFailure()) return;
  }
}

TEST_F(PlainKernels, SumsAndScalesAlike) {
  for (int round = 0; round < 30; ++round) {
    const std::size_t n = round % 3 == 0 ? 5000 + rng_() % 5000 : rng_() % 40;
    Case add = of(Kernel::add);
    add.reads = {values(n), values(n), values(n)};
    add.writes = {values(n)};
    expect_equal_bits(add, "add");
    Case zero = of(Kernel::zero);
    zero.writes = {values(n), values(3)};
    expect_equal_bits(zero, "zero");
    Case scale = of(Kernel::scale);
    scale.program.mesh.atoms = {{"a", 3}};
    scale.instruction.atoms = 1;
    scale.reads = {values(n)};
    scale.writes = {values(n)};
    expect_equal_bits(scale, "scale");
    Case unscale = of(Kernel::unscale);
    unscale.reads = {{256}};
    unscale.writes = {values(n), values(7)};
    expect_equal_bits(unscale, "unscale");
    Case clip = of(Kernel::clip);
    clip.program.optimizer.clip = 0.5;
    clip.reads = {{round % 2 == 0 ? 0.01f : 9.0f}};
    clip.writes = {values(n), values(7)};
    expect_equal_bits(clip, "clip");
    Case square = of(Kernel::square_sum);
    square.reads = {values(n), values(1), values(4096), values(4097)};
    square.writes = {{0}};
    expect_equal_bits(square, "square sum", 1);
    Case finite = of(Kernel::not_finite);
    finite.reads = {values(n), values(4100)};
    if (round % 3 > 0) finite.reads[1][rng_() % 4100] = round % 3 == 1 ? INFINITY : NAN;
    finite.writes = {{5}};
    expect_equal_bits(finite, "not finite");
    for (const Kernel k : {Kernel::enqueue, Kernel::dequeue}) {
      Case queue = of(k);
      queue.step = round;
      queue.outputs = {values(3 * n)};
      (k == Kernel::enqueue ? queue.reads : queue.writes) = {values(n)};
      if (n > 0) expect_equal_bits(queue, std::string(name(k)));
    }
    if (HasFatalFailure()) return;
  }
}

/// Of more terms than one pass takes, and of one alone; the sum may be the first of them.
TEST_F(PlainKernels, SumsOfAnyNumberOfTermsAreAlike) {
  for (const std::size_t n : {0u, 1u, 7u, 8u, 9u, 100u}) {
    for (std::size_t terms = 1; terms <= 9; ++terms) {
      Case c = of(Kernel::add);
      for (std::size_t k = 0; k < terms; ++k) c.reads.push_back(values(n));
      c.writes = {values(n)};
      expect_equal_bits(c, std::to_string(terms) + " of " + std::to_string(n));
      Case host = c, ours = c;
      execute::plain_on_host(host.call());
      PlainCall call = ours.call();
      call.writes[0].data = call.reads[0].data;
      HostMachine m;
      ASSERT_TRUE(run_plain(m, call));
      EXPECT_EQ(ours.reads[0], host.writes[0]);
    }
  }
}

/// Of operands of all sizes, of more than one stage takes, and of none.
TEST_F(PlainKernels, ManyOperandsAreOneAlike) {
  for (const std::size_t operands : {0u, 1u, 3u, 1100u}) {
    Case square = of(Kernel::square_sum), unscale = of(Kernel::unscale), zero = of(Kernel::zero);
    for (std::size_t k = 0; k < operands; ++k) {
      const std::size_t n = operands == 3 ? 32767 + k : k % 11;
      square.reads.push_back(values(n));
      unscale.writes.push_back(values(n));
      zero.writes.push_back(values(n));
    }
    square.writes = {{5}};
    expect_equal_bits(square, "square sum", 1);
    unscale.reads = {{256}};
    expect_equal_bits(unscale, "unscale");
    expect_equal_bits(zero, "zero");
    Case finite = square;
    finite.instruction.kernel = Kernel::not_finite;
    expect_equal_bits(finite, "finite");
    if (operands == 0) continue;
    finite.reads.back() = {1, INFINITY};
    expect_equal_bits(finite, "not finite");
  }
}

TEST_F(PlainKernels, GradientsAreCastAlike) {
  for (int round = 0; round < 24; ++round) {
    const std::size_t n = 2 * (1 + rng_() % 40);
    Case c = of(round % 2 == 0 ? Kernel::compress : Kernel::decompress);
    c.program.compression.kind = CompressionKind::cast;
    c.program.compression.type = round % 4 < 2 ? ElementType::bf16 : ElementType::fp16;
    c.program.compression.error_feedback = round % 3 == 0;
    if (c.instruction.kernel == Kernel::compress) {
      c.reads = {values(n)};
      if (round % 8 < 4) c.outputs = {values(n)};
      c.writes = {values(n / 2)};
    } else {
      c.reads = {values(n / 2)};
      // Numbers of 16 bits.
      for (float& v : c.reads[0])
        v = float_of(0x3c003c00u + static_cast<std::uint32_t>(rng_() % 256));
      c.writes = {values(n)};
    }
    expect_equal_bits(c, "round " + std::to_string(round));
    if (HasFatalFailure()) return;
  }
}

// Blocks of a stand-in share the chunks, and none is done with its k-th before that one's time.
TEST(StandIn, CopiesAllAtItsPace) {
  std::mt19937 rng(11);
  for (const std::int64_t bytes : {std::int64_t{0}, std::int64_t{16}, kStandInChunk - 16,
                                   kStandInChunk, 5 * kStandInChunk + 48}) {
    for (const std::int64_t blocks : {1, 2, 4, 7}) {
      for (const std::int64_t lanes : {1, 3}) {
        std::vector<std::byte> from(static_cast<std::size_t>(bytes) + 16),
            to(from.size(), std::byte{0xee});
        for (auto& b : from) b = static_cast<std::byte>(rng());
        StandIn s;
        s.from = from.data();
        s.to = to.data();
        s.bytes = bytes;
        s.blocks = blocks;
        s.nanoseconds = 100;
        for (std::int64_t b = 0; b < blocks; ++b) {
          const std::int64_t chunks = (bytes + kStandInChunk - 1) / kStandInChunk,
                             mine = (chunks - b + blocks - 1) / blocks;
          for (std::int64_t lane = 0; lane < lanes; ++lane) {
            std::int64_t now = 1000;
            s(b, lane, lanes, [&] { return now += 3; });
            const std::int64_t took = now - 1003;
            EXPECT_GE(took, 100 * std::max<std::int64_t>(mine, 0));
            EXPECT_LT(took, 100 * std::max<std::int64_t>(mine, 0) + 3);
          }
        }
        EXPECT_TRUE(std::equal(from.begin(), from.end() - 16, to.begin())) << bytes;
        EXPECT_EQ(std::count(to.end() - 16, to.end(), std::byte{0xee}), 16) << "beyond its end";
      }
    }
  }
}

}  // namespace
}  // namespace partita::cuda
