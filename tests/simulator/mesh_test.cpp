// What ranks hold: laws over random meshes, with counterexamples made small by RapidCheck.
#include "simulator/program/mesh.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <set>
#include <vector>

namespace partita {
namespace {

Mesh random_mesh() {
  Mesh m;
  const int atoms = *rc::gen::inRange(1, 4);
  for (int a = 0; a < atoms; ++a)
    m.atoms.push_back(
        {std::string(1, static_cast<char>('a' + a)), *rc::gen::inRange<std::int64_t>(1, 5)});
  return m;
}

/// Cuts over some of the atoms, in any order.
DimSplit random_split(const Mesh& m) {
  DimSplit s;
  std::vector<AtomId> order;
  for (std::size_t a = 0; a < m.atoms.size(); ++a) {
    if (*rc::gen::arbitrary<bool>())
      order.insert(order.begin() + *rc::gen::inRange<std::ptrdiff_t>(
                                       0, static_cast<std::ptrdiff_t>(order.size()) + 1),
                   static_cast<AtomId>(a));
  }
  for (const AtomId a : order) s.atoms.push_back(a);
  s.zigzag = static_cast<std::uint8_t>(*rc::gen::inRange(0, static_cast<int>(order.size()) + 1));
  return s;
}

TEST(Mesh, TheRanksOfAGroupHoldEveryIndexOnce) {
  EXPECT_TRUE(rc::check("cuts partition", [] {
    const Mesh m = random_mesh();
    const DimSplit s = random_split(m);
    const auto extent = *rc::gen::inRange<std::int64_t>(0, 40);
    std::vector<std::int64_t> all;
    for (const std::int64_t rank : m.group(0, mask_of(s.atoms))) {
      const auto mine = local_indices(m, s, extent, rank);
      RC_ASSERT(std::is_sorted(mine.begin(), mine.end()));
      RC_ASSERT(static_cast<std::int64_t>(mine.size()) == local_extent(m, s, extent, rank));
      all.insert(all.end(), mine.begin(), mine.end());
    }
    std::sort(all.begin(), all.end());
    RC_ASSERT(static_cast<std::int64_t>(all.size()) == extent);
    for (std::int64_t i = 0; i < extent; ++i) RC_ASSERT(all[static_cast<std::size_t>(i)] == i);
  }));
}

TEST(Mesh, PartsDifferByAtMostOneLargerFirst) {
  EXPECT_TRUE(rc::check("even parts", [] {
    const auto extent = *rc::gen::inRange<std::int64_t>(0, 1000);
    const auto parts = *rc::gen::inRange<std::int64_t>(1, 40);
    std::int64_t end = 0, before = extent;
    for (std::int64_t c = 0; c < parts; ++c) {
      const Range r = part(extent, parts, c);
      RC_ASSERT(r.begin == end);
      RC_ASSERT(r.size() <= before && r.size() >= extent / parts);
      before = r.size();
      end = r.end;
    }
    RC_ASSERT(end == extent);
  }));
}

TEST(Mesh, GroupsPartitionTheRanks) {
  EXPECT_TRUE(rc::check("groups", [] {
    const Mesh m = random_mesh();
    const auto mask = static_cast<AtomMask>(*rc::gen::inRange(0, 1 << m.atoms.size()));
    std::set<std::int64_t> seen;
    for (std::int64_t r = 0; r < m.ranks(); ++r) {
      const auto group = m.group(r, mask);
      RC_ASSERT(static_cast<std::int64_t>(group.size()) == m.size(mask));
      RC_ASSERT(std::find(group.begin(), group.end(), r) != group.end());
      RC_ASSERT(group.front() == m.group_root(r, mask));
      if (r == m.group_root(r, mask)) {
        for (const std::int64_t g : group) RC_ASSERT(seen.insert(g).second);
      }
    }
    RC_ASSERT(static_cast<std::int64_t>(seen.size()) == m.ranks());
  }));
}

}  // namespace
}  // namespace partita
