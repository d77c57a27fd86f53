// Any layout is turned into any other: the steps of a reshard, carried out element by element,
// reach the goal.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "simulator/derive/derive.h"

namespace partita {
namespace {

/// What every rank holds of one tensor: value by row-major index. Whole numbers, so that sums are
/// exact in any order.
using Held = std::vector<std::map<std::int64_t, std::int64_t>>;

/// Calls f(index) for all elements that `rank` holds.
template <class F>
void for_each_local(const Mesh& mesh, const Layout& layout, const Shape& shape, std::int64_t rank,
                    F f) {
  std::vector<std::int64_t> linear{0};
  for (std::size_t d = 0; d < shape.size(); ++d) {
    std::vector<std::int64_t> next;
    for (const std::int64_t base : linear) {
      for (const std::int64_t i : local_indices(mesh, layout.dims[d], shape[d].extent, rank))
        next.push_back(base * shape[d].extent + i);
    }
    linear = std::move(next);
  }
  for (const std::int64_t x : linear) f(x);
}

std::int64_t value_of(std::int64_t index) { return 1000 + 7 * index; }

bool windowed(const Layout& l) {
  return std::any_of(l.dims.begin(), l.dims.end(),
                     [](const DimSplit& d) { return d.kind == SplitKind::window; });
}
AtomMask window_atoms(const Layout& l) {
  AtomMask mask = 0;
  for (const DimSplit& d : l.dims) {
    if (d.kind == SplitKind::window) mask = static_cast<AtomMask>(mask | mask_of(d.atoms));
  }
  return mask;
}

/// Ranks start with summands of value_of along atoms where a sum is owed, and where windows of
/// gradients overlap; copies elsewhere are equal.
Held start(const Mesh& mesh, const Layout& layout, const Shape& shape, std::mt19937& rng) {
  const AtomMask summed = static_cast<AtomMask>(layout.partial | window_atoms(layout));
  std::map<std::int64_t, std::set<std::int64_t>> parts;  // element -> coordinates along `summed`
  const auto coordinate = [&](std::int64_t rank) {
    return rank - mesh.group_root(rank, summed);  // distinct for distinct coordinates
  };
  const auto n = static_cast<std::size_t>(mesh.ranks());
  for (std::int64_t r = 0; r < mesh.ranks(); ++r)
    for_each_local(mesh, layout, shape, r, [&](std::int64_t x) { parts[x].insert(coordinate(r)); });
  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> summand;
  for (const auto& [x, all] : parts) {
    std::int64_t rest = value_of(x);
    for (const std::int64_t c : all) {
      const auto v = static_cast<std::int64_t>(rng() % 100);
      summand[{x, c}] = c == *all.rbegin() ? rest : v;
      rest -= v;
    }
  }
  Held held(n);
  for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
    for_each_local(mesh, layout, shape, r, [&](std::int64_t x) {
      held[static_cast<std::size_t>(r)][x] = summand.at({x, coordinate(r)});
    });
  }
  return held;
}

/// One step: what each rank may use is what its group holds. Copies in a gather must be equal.
Held carry_out(const Mesh& mesh, const ReshardStep& step, const Layout& from, const Shape& shape,
               const Held& before) {
  const bool sums =
      !step.slice && (step.collective == CollectiveKind::all_reduce ||
                      step.collective == CollectiveKind::reduce_scatter ||
                      (step.collective == CollectiveKind::halo_exchange && windowed(from)));
  Held after(before.size());
  for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
    std::map<std::int64_t, std::int64_t> available;
    for (const std::int64_t m : mesh.group(r, step.slice ? AtomMask{0} : step.atoms)) {
      for (const auto& [x, v] : before[static_cast<std::size_t>(m)]) {
        const auto [it, fresh] = available.emplace(x, v);
        if (fresh) continue;
        if (sums) {
          it->second += v;
        } else {
          EXPECT_EQ(it->second, v) << "two members hold different values of " << x;
        }
      }
    }
    for_each_local(mesh, step.to, shape, r, [&](std::int64_t x) {
      const auto it = available.find(x);
      // Elements that no window covered have had no gradient.
      const bool nothing = sums && windowed(from);
      EXPECT_TRUE(nothing || it != available.end()) << "no member holds element " << x;
      after[static_cast<std::size_t>(r)][x] = it == available.end() ? 0 : it->second;
    });
  }
  return after;
}

/// The steps as a program, so that the verifier judges every collective.
std::vector<std::string> verified(const Mesh& mesh, const Shape& shape, const Layout& from,
                                  const std::vector<ReshardStep>& steps) {
  Program p;
  p.mesh = mesh;
  p.streams = {"compute"};
  p.inputs.push_back({"x", shape, 0, 0});
  p.stages = {{{BlockId{std::size_t{0}}, 0}}};
  const auto add_buffer = [&](const Layout& layout) {
    Buffer b;
    b.name = "x";
    b.shape = shape;
    b.layout = layout;
    p.buffers.push_back(b);
    return BufferId{p.buffers.size() - 1};
  };
  Block block;
  Instruction load;
  load.kind = Kind::load;
  load.writes = {add_buffer(from)};
  block.instructions = {load};
  for (const ReshardStep& step : steps) {
    Instruction i;
    i.kind = step.slice ? Kind::slice : Kind::collective;
    i.collective = step.collective;
    i.atoms = step.atoms;
    i.reads = {BufferId{p.buffers.size() - 1}};
    i.writes = {add_buffer(step.to)};
    block.instructions.push_back(i);
  }
  Instruction all;
  for (std::size_t b = 0; b < p.buffers.size(); ++b) all.writes.push_back(BufferId{b});
  all.kind = Kind::allocate;
  block.instructions.insert(block.instructions.begin(), all);
  std::swap(all.reads, all.writes);
  all.kind = Kind::free;
  block.instructions.push_back(all);
  p.blocks.push_back(block);
  return verify(p);
}

/// Steps from one layout to another, carried out; returns them.
std::vector<ReshardStep> expect_reaches(const Mesh& mesh, const Shape& shape, const Layout& from,
                                        const Layout& to, std::mt19937& rng) {
  SCOPED_TRACE(text(mesh, from, shape) + " -> " + text(mesh, to, shape));
  const auto steps = reshard(from, to);
  std::set<std::int64_t> covered;  // by any window of a gradient
  Held held = start(mesh, from, shape, rng);
  for (const auto& mine : held) {
    for (const auto& [x, v] : mine) covered.insert(x);
  }
  Layout at = from;
  for (const ReshardStep& step : steps) {
    held = carry_out(mesh, step, at, shape, held);
    at = step.to;
  }
  EXPECT_EQ(at, to);
  // Sums that may stay owed are completed here: over the goal's partial atoms.
  for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
    std::int64_t elements = 0;
    for_each_local(mesh, to, shape, r, [&](std::int64_t x) {
      ++elements;
      std::int64_t sum = 0;
      for (const std::int64_t m : mesh.group(r, to.partial))
        sum += held[static_cast<std::size_t>(m)].at(x);
      EXPECT_EQ(sum, covered.count(x) > 0 ? value_of(x) : 0) << "element " << x << " on rank " << r;
    });
    EXPECT_EQ(elements, static_cast<std::int64_t>(held[static_cast<std::size_t>(r)].size()));
  }
  for (const auto& e : verified(mesh, shape, from, steps)) ADD_FAILURE() << e;
  return steps;
}

struct RandomCase {
  Mesh mesh;
  Shape shape;
  Layout from, to;
};

RandomCase random_case(std::mt19937& rng) {
  const auto upto = [&](std::size_t n) { return static_cast<std::size_t>(rng() % (n + 1)); };
  RandomCase c;
  const std::size_t atoms = 2 + upto(2);
  for (std::size_t a = 0; a < atoms; ++a)
    c.mesh.atoms.push_back(
        {std::string(1, static_cast<char>('a' + a)), static_cast<std::int64_t>(2 + upto(1))});
  const std::size_t rank = 1 + upto(2);
  const Dim names[] = {Dim::sample, Dim::sequence, Dim::feature};
  for (std::size_t d = 0; d < rank; ++d)
    c.shape.push_back({names[d], static_cast<std::int64_t>(1 + upto(12))});
  // Each atom cuts one dimension, is owed, or replicates.
  const auto layout = [&](AtomMask may_owe, bool windows) {
    Layout l;
    l.dims.resize(rank);
    std::vector<AtomId> order(atoms);
    std::iota(order.begin(), order.end(), AtomId{0});
    std::shuffle(order.begin(), order.end(), rng);
    for (const AtomId a : order) {
      const std::size_t role = upto(rank + 1);
      if (role < rank) {
        l.dims[role].atoms.push_back(a);
      } else if (role == rank && has(may_owe, a)) {
        l.partial = static_cast<AtomMask>(l.partial | bit(a));
      }
    }
    for (DimSplit& d : l.dims) {
      if (d.atoms.empty()) continue;
      if (upto(3) == 0) d.zigzag = static_cast<std::uint8_t>(1 + upto(d.atoms.size() - 1));
    }
    if (windows) {
      for (std::size_t d = 0; d < rank; ++d) {
        DimSplit& s = l.dims[d];
        Window w;
        w.kernel = static_cast<std::int64_t>(1 + upto(3));
        w.stride = static_cast<std::int64_t>(1 + upto(1));
        w.pad_before = w.pad_after = w.kernel / 2;
        const std::int64_t outputs = window_outputs(w, c.shape[d].extent);
        if (s.atoms.empty() || s.zigzag > 0 || outputs < 1 || w == Window{}) continue;
        s.kind = SplitKind::window;
        s.window = w;
        s.outputs = outputs;
      }
    }
    return l;
  };
  // Windows are what a gradient comes from, or what a reader needs; never both.
  const std::size_t halo = upto(3);
  c.from = layout(static_cast<AtomMask>((1 << atoms) - 1), halo == 0);
  c.to = layout(c.from.partial, halo == 1);
  return c;
}

TEST(Reshard, RandomLayoutsOnRandomMeshesReachTheirGoal) {
  std::mt19937 rng{20261201};
  std::map<std::string, int> seen;
  for (int i = 0; i < 3000; ++i) {
    const RandomCase c = random_case(rng);
    SCOPED_TRACE(::testing::Message() << "case " << i);
    const auto steps = expect_reaches(c.mesh, c.shape, c.from, c.to, rng);
    for (const ReshardStep& s : steps) ++seen[s.slice ? "slice" : std::string(name(s.collective))];
    if (::testing::Test::HasFailure()) return;
  }
  for (const char* kind :
       {"slice", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "halo_exchange"})
    EXPECT_GT(seen[kind], 150) << kind;
}

TEST(Reshard, NothingIsDoneWhereNothingIsNeeded) {
  std::mt19937 rng{20261202};
  for (int i = 0; i < 500; ++i) {
    const RandomCase c = random_case(rng);
    EXPECT_TRUE(reshard(c.from, c.from).empty());
  }
}

Layout cut(std::vector<AtomList> dims, AtomMask partial = 0) {
  Layout l;
  for (const AtomList& atoms : dims) l.dims.emplace_back().atoms = atoms;
  l.partial = partial;
  return l;
}

std::string kinds(const Layout& from, const Layout& to) {
  std::string s;
  for (const ReshardStep& step : reshard(from, to))
    s += (s.empty() ? "" : " ") + (step.slice ? "slice" : std::string(name(step.collective)));
  return s;
}

TEST(Reshard, TheCheapestStepIsTaken) {
  const AtomMask t = bit(0);
  EXPECT_EQ(kinds(cut({{}, {}}, t), cut({{}, {}})), "all_reduce");       // row product
  EXPECT_EQ(kinds(cut({{}, {}}, t), cut({{0}, {}})), "reduce_scatter");  // sequence parallel
  EXPECT_EQ(kinds(cut({{0}, {}}), cut({{}, {}})), "all_gather");
  EXPECT_EQ(kinds(cut({{}, {}}), cut({{0}, {}})), "slice");              // no communication
  EXPECT_EQ(kinds(cut({{0}, {}}), cut({{}, {0}})), "all_to_all");        // Ulysses, experts
  EXPECT_EQ(kinds(cut({{1, 0}, {}}), cut({{1}, {0}})), "all_to_all");    // its inner axis only
  EXPECT_EQ(kinds(cut({{0}, {}}, bit(1)), cut({{0}, {}}, bit(1))), "");  // may stay owed
}

}  // namespace
}  // namespace partita
