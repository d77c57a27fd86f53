#include "validation/layer_time.h"

#include <gtest/gtest.h>

#include "models/operators.h"

namespace partita::validation {
namespace {

/// Two layers of a norm, a product with the sum over ranks behind it, and one backward block:
/// docs/published.md, "A layer's time".
struct Small {
  Program program;
  Timeline recorded;

  Small() {
    for (const char* name : {"layers.0.attention_norm", "layers.0.attention.output",
                             "layers.1.attention_norm", "layers.1.attention.output", "head"}) {
      ProgramOperator op;
      op.name = name;
      program.operators.push_back(op);
    }
    for (const char* name : {"layers.0.attention.output", "layers.1.attention.output",
                             "layers.0.attention_norm.weight"}) {
      Buffer b;
      b.name = name;
      program.buffers.push_back(b);
    }
    program.buffers[2].parameter = 0;
    Block forward, backward;
    for (const int op : {0, 1}) forward.instructions.push_back(kernel(op, Kernel::forward));
    forward.instructions.push_back(sum(0));
    for (const int op : {2, 3}) forward.instructions.push_back(kernel(op, Kernel::forward));
    forward.instructions.push_back(sum(1));
    forward.instructions.push_back(kernel(4, Kernel::forward));
    backward.kind = BlockKind::backward;
    for (const int op : {4, 3, 2, 1, 0})
      backward.instructions.push_back(kernel(op, Kernel::backward_data));
    backward.instructions.push_back(sum(2));
    program.blocks = {forward, backward};
    recorded.classes.resize(1);
    // Layer 0: from 0 to 30, layer 1: from 30, when the sum was there, to 62; the head from 65.
    play(0, {{0, 5}, {5, 20}, {20, 30}, {30, 36}, {36, 50}, {50, 62}, {65, 70}});
    // Layer 1 from the head's end at 80 to 130, layer 0 to 190; a weight's sum is no layer's.
    play(1, {{70, 80}, {80, 110}, {110, 130}, {130, 170}, {170, 190}, {190, 250}});
  }

  static Instruction kernel(int op, Kernel k) {
    Instruction i;
    i.op = op;
    i.kernel = k;
    return i;
  }
  static Instruction sum(std::size_t buffer) {
    Instruction i;
    i.kind = Kind::collective;
    i.stream = 1;
    i.reads = {BufferId{buffer}};
    return i;
  }
  void play(int block, const std::vector<std::pair<int, int>>& times) {
    for (std::size_t k = 0; k < times.size(); ++k) {
      Entry e;
      e.block = block;
      e.instruction = static_cast<std::int32_t>(k);
      e.start = Ticks{times[k].first * 1'000'000};
      e.end = Ticks{times[k].second * 1'000'000};
      recorded.entries.push_back(e);
    }
  }
  double us(LayerQuantity q) const {
    const auto t = layer_time(q, program, recorded);
    return t ? t->count * 1e6 : -1;
  }
};

TEST(LayerTime, ByHand) {
  using Part = LayerQuantity::Part;
  using Pass = LayerQuantity::Pass;
  const Small s;
  // The upper of two is the median here.
  EXPECT_NEAR(s.us({Part::all, Pass::forward}), 32, 1e-9) << "30 and 32";
  EXPECT_NEAR(s.us({Part::all, Pass::backward}), 60, 1e-9) << "50 and 60";
  EXPECT_NEAR(s.us({Part::all, Pass::both}), 90, 1e-9) << "32 + 50 and 30 + 60";
  // From the norm's end, or where it began to wait, to the end of the sum.
  EXPECT_NEAR(s.us({Part::attention, Pass::forward}), 26, 1e-9) << "25 and 26";
  EXPECT_NEAR(s.us({Part::attention, Pass::backward}), 40, 1e-9) << "30 and 40";
  EXPECT_EQ(s.us({Part::experts, Pass::forward}), -1);
}

TEST(LayerTime, OfTheClassWithMostLayers) {
  Small s;
  s.recorded.classes.resize(2);
  Entry e;
  e.rank_class = 1;
  e.end = Ticks{400'000'000};
  s.recorded.entries.push_back(e);
  EXPECT_NEAR(s.us({LayerQuantity::Part::all, LayerQuantity::Pass::forward}), 32, 1e-9);
  for (auto& x : s.recorded.entries) x.micro_batch = -1;
  EXPECT_EQ(s.us({LayerQuantity::Part::all, LayerQuantity::Pass::forward}), -1)
      << "of no micro-batch";
}

}  // namespace
}  // namespace partita::validation
