#include "simulator/engine/sharing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

namespace partita {
namespace {

// docs/sharing.md, "What is solved".
TEST(Sharing, ThePagesExample) {
  Sharing s;
  const ResourceId a = s.add(10), b = s.add(4);
  const Demand on_a[] = {{a}}, both[] = {{a}, {b}}, on_b[] = {{b}};
  const ActivityId one = s.start(on_a), two = s.start(both), three = s.start(on_b);
  EXPECT_EQ(s.solve().size(), 3u);
  EXPECT_DOUBLE_EQ(s.rate(one), 8);
  EXPECT_DOUBLE_EQ(s.rate(two), 2);
  EXPECT_DOUBLE_EQ(s.rate(three), 2);
  EXPECT_EQ(s.bottleneck(two), b);
  s.stop(three);
  EXPECT_EQ(s.solve().size(), 2u);
  EXPECT_DOUBLE_EQ(s.rate(one), 6);
  EXPECT_DOUBLE_EQ(s.rate(two), 4);
  s.stop(two);
  const ActivityId heavy = s.start(both, 2), light = s.start(on_b);
  s.solve();
  EXPECT_DOUBLE_EQ(s.rate(heavy), 8.0 / 3);
  EXPECT_DOUBLE_EQ(s.rate(light), 4.0 / 3);
  EXPECT_DOUBLE_EQ(s.rate(one), 10 - 8.0 / 3);
}

TEST(Sharing, CapsAmountsAndFailedLinks) {
  Sharing s;
  const ResourceId link = s.add(12);
  const Demand plain[] = {{link}}, twice[] = {{link, 2}};
  const ActivityId capped = s.start(plain, 1, 3), free = s.start(plain), wide = s.start(twice);
  s.solve();
  // 3 + x + 2 x = 12.
  EXPECT_DOUBLE_EQ(s.rate(capped), 3);
  EXPECT_DOUBLE_EQ(s.rate(free), 3);
  EXPECT_DOUBLE_EQ(s.rate(wide), 3);
  s.set_cap(capped, 1);
  s.solve();
  EXPECT_DOUBLE_EQ(s.rate(free), 11.0 / 3);
  EXPECT_FALSE(s.bottleneck(capped).valid());
  s.set_capacity(link, 0);
  EXPECT_EQ(s.solve().size(), 3u);
  EXPECT_EQ(s.rate(free), 0);
  EXPECT_EQ(s.rate(capped), 0);
}

/// A random set of activities on random resources, as data.
struct Case {
  std::vector<double> capacity;
  struct One {
    std::vector<Demand> demands;
    double weight = 1, cap = Sharing::kUnbound;
  };
  std::vector<One> activities;
};

Case random_case(std::mt19937_64& rng, bool weighted) {
  Case c;
  const auto pick = [&](int lo, int hi) { return std::uniform_int_distribution<int>(lo, hi)(rng); };
  const auto real = [&](double lo, double hi) {
    return std::exp(std::uniform_real_distribution<double>(std::log(lo), std::log(hi))(rng));
  };
  // Few distinct capacities: ties are the rule in clusters.
  const int resources = pick(1, 12);
  for (int r = 0; r < resources; ++r)
    c.capacity.push_back(pick(0, 2) ? 25.0 * pick(1, 4) : real(1, 1000));
  const int activities = pick(1, 30);
  for (int a = 0; a < activities; ++a) {
    Case::One one;
    std::vector<int> order(static_cast<std::size_t>(resources));
    for (int r = 0; r < resources; ++r) order[static_cast<std::size_t>(r)] = r;
    std::shuffle(order.begin(), order.end(), rng);
    const int uses = pick(1, std::min(5, resources));
    for (int u = 0; u < uses; ++u) {
      Demand d{ResourceId{static_cast<std::size_t>(order[static_cast<std::size_t>(u)])}};
      if (weighted && pick(0, 3) == 0) d.amount = real(0.1, 10);
      if (pick(0, 3) == 0) d.count = pick(1, 4);
      one.demands.push_back(d);
    }
    if (weighted && pick(0, 2) == 0) one.weight = real(0.1, 10);
    if (pick(0, 3) == 0) one.cap = real(1, 100);
    c.activities.push_back(one);
  }
  return c;
}

std::vector<double> rates_of(const Case& c, bool from_scratch = false) {
  Sharing s(from_scratch);
  for (const double x : c.capacity) s.add(x);
  std::vector<ActivityId> ids;
  for (const auto& a : c.activities) ids.push_back(s.start(a.demands, a.weight, a.cap));
  s.solve();
  std::vector<double> rates;
  for (const ActivityId id : ids) rates.push_back(s.rate(id));
  return rates;
}

/// Oracle: raise all levels together; what reaches its cap or a full resource stops.
std::vector<double> filled(const Case& c) {
  const std::size_t n = c.activities.size();
  std::vector<double> level(n, -1);
  std::vector<double> left = c.capacity;
  for (std::size_t fixed = 0; fixed < n;) {
    double least = Sharing::kUnbound;
    std::vector<double> slope(c.capacity.size(), 0);
    for (std::size_t i = 0; i < n; ++i) {
      if (level[i] >= 0) continue;
      least = std::min(least, c.activities[i].cap / c.activities[i].weight);
      for (const Demand& d : c.activities[i].demands)
        slope[d.resource.index()] +=
            d.amount * static_cast<double>(d.count) * c.activities[i].weight;
    }
    for (std::size_t r = 0; r < slope.size(); ++r) {
      if (slope[r] > 0) least = std::min(least, left[r] / slope[r]);
    }
    std::vector<char> full(c.capacity.size(), 0);
    for (std::size_t r = 0; r < slope.size(); ++r)
      full[r] = slope[r] > 0 && left[r] / slope[r] <= least * (1 + 1e-12);
    for (std::size_t i = 0; i < n; ++i) {
      if (level[i] >= 0) continue;
      bool stops = c.activities[i].cap / c.activities[i].weight <= least * (1 + 1e-12);
      for (const Demand& d : c.activities[i].demands) stops = stops || full[d.resource.index()];
      if (!stops) continue;
      level[i] = least;
      ++fixed;
      for (const Demand& d : c.activities[i].demands)
        left[d.resource.index()] -=
            d.amount * static_cast<double>(d.count) * c.activities[i].weight * least;
    }
  }
  for (std::size_t i = 0; i < n; ++i) level[i] *= c.activities[i].weight;
  return level;
}

TEST(Sharing, EqualsProgressiveFilling) {
  std::mt19937_64 rng{1};
  for (int k = 0; k < 5000; ++k) {
    SCOPED_TRACE(k);
    const Case c = random_case(rng, true);
    const auto got = rates_of(c), want = filled(c);
    for (std::size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], 1e-9 * want[i]);
  }
}

TEST(Sharing, IsFairAndWastesNothing) {
  std::mt19937_64 rng{2};
  for (int k = 0; k < 3000; ++k) {
    SCOPED_TRACE(k);
    const Case c = random_case(rng, true);
    Sharing s;
    for (const double x : c.capacity) s.add(x);
    std::vector<ActivityId> ids;
    for (const auto& a : c.activities) ids.push_back(s.start(a.demands, a.weight, a.cap));
    s.solve();
    for (std::size_t r = 0; r < c.capacity.size(); ++r)
      EXPECT_LE(s.used(ResourceId{r}), c.capacity[r] * (1 + 1e-12));
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const auto& a = c.activities[i];
      if (s.rate(ids[i]) >= a.cap * (1 - 1e-12)) continue;
      // Some resource of it is full, and nobody there has a higher level.
      const ResourceId r = s.bottleneck(ids[i]);
      ASSERT_TRUE(r.valid());
      EXPECT_NEAR(s.used(r), s.capacity(r), 1e-9 * s.capacity(r));
      for (std::size_t j = 0; j < ids.size(); ++j) {
        for (const Demand& d : c.activities[j].demands) {
          if (d.resource != r) continue;
          EXPECT_LE(s.rate(ids[j]) / c.activities[j].weight,
                    s.rate(ids[i]) / a.weight * (1 + 1e-12));
        }
      }
    }
  }
}

TEST(Sharing, StartsAndStopsOneByOneGiveTheSameBitsAsAllAtOnce) {
  std::mt19937_64 rng{3};
  for (int k = 0; k < 1500; ++k) {
    SCOPED_TRACE(k);
    const Case c = random_case(rng, k % 2 == 0);
    Sharing s;
    for (const double x : c.capacity) s.add(x);
    std::map<std::size_t, ActivityId> live;
    for (int event = 0; event < 60; ++event) {
      const std::size_t i = rng() % c.activities.size();
      const auto it = live.find(i);
      if (it != live.end()) {
        s.stop(it->second);
        live.erase(it);
      } else {
        const auto& a = c.activities[i];
        live[i] = s.start(a.demands, a.weight, a.cap);
      }
      std::map<std::int32_t, double> before;
      for (const auto& [j, id] : live) before[id.value] = s.rate(id);
      if (rng() % 3 == 0) continue;  // several changes of one instant
      const auto changed = s.solve();
      Case now{c.capacity, {}};
      for (const auto& [j, id] : live) now.activities.push_back(c.activities[j]);
      const auto want = rates_of(now, event % 2 == 0);
      std::size_t at = 0;
      for (const auto& [j, id] : live) EXPECT_EQ(s.rate(id), want[at++]) << "event " << event;
      for (const ActivityId id : changed) EXPECT_TRUE(before.count(id.value) > 0);
    }
  }
}

// What a resource is thought to carry must survive an activity that wants far more than there is.
TEST(Sharing, AHugeWishLeavesNoTraceOfItsOwn) {
  Sharing s;
  const ResourceId r = s.add(10);
  const Demand on{r};
  const ActivityId first = s.start({&on, 1}, 1, 9);
  s.solve();
  s.stop(s.start({&on, 1}, 1, 1e25));  // 9 + 1e25 - 1e25 is 0
  const ActivityId second = s.start({&on, 1}, 1, 9);
  s.solve();
  EXPECT_EQ(s.rate(first), 5);
  EXPECT_EQ(s.rate(second), 5);
}

TEST(Sharing, ReportsExactlyWhatChanged) {
  std::mt19937_64 rng{4};
  for (int k = 0; k < 500; ++k) {
    const Case c = random_case(rng, true);
    Sharing s;
    for (const double x : c.capacity) s.add(x);
    std::map<std::size_t, ActivityId> live;
    std::map<std::int32_t, double> known;
    for (int event = 0; event < 40; ++event) {
      const std::size_t i = rng() % c.activities.size();
      if (const auto it = live.find(i); it != live.end()) {
        s.stop(it->second);
        known.erase(it->second.value);
        live.erase(it);
      } else {
        live[i] = s.start(c.activities[i].demands, c.activities[i].weight, c.activities[i].cap);
      }
      for (const ActivityId id : s.solve()) {
        EXPECT_TRUE(known.count(id.value) == 0 || known[id.value] != s.rate(id));
        known[id.value] = s.rate(id);
      }
      for (const auto& [j, id] : live) EXPECT_EQ(known.at(id.value), s.rate(id));
    }
  }
}

TEST(Sharing, RenamingChangesNoBit) {
  std::mt19937_64 rng{5};
  for (int k = 0; k < 2000; ++k) {
    SCOPED_TRACE(k);
    const Case c = random_case(rng, true);
    const std::size_t n = c.activities.size(), m = c.capacity.size();
    std::vector<std::size_t> a(n), r(m);
    for (std::size_t i = 0; i < n; ++i) a[i] = i;
    for (std::size_t i = 0; i < m; ++i) r[i] = i;
    std::shuffle(a.begin(), a.end(), rng);
    std::shuffle(r.begin(), r.end(), rng);
    Case renamed;
    renamed.capacity.resize(m);
    for (std::size_t i = 0; i < m; ++i) renamed.capacity[r[i]] = c.capacity[i];
    for (std::size_t i = 0; i < n; ++i) {
      Case::One one = c.activities[a[i]];
      for (Demand& d : one.demands) d.resource = ResourceId{r[d.resource.index()]};
      std::shuffle(one.demands.begin(), one.demands.end(), rng);
      renamed.activities.push_back(one);
    }
    const auto plain = rates_of(c), other = rates_of(renamed);
    for (std::size_t i = 0; i < n; ++i) EXPECT_EQ(other[i], plain[a[i]]);
  }
}

/// n copies of a network side by side, and copies of activities on the same links: folded they are
/// one network, and one activity with a count.
TEST(Sharing, FoldedIsUnfoldedToTheLastBit) {
  std::mt19937_64 rng{6};
  for (int k = 0; k < 1500; ++k) {
    SCOPED_TRACE(k);
    Case folded = random_case(rng, true);
    // Each resource of the folded network stands for `copies` equal ones. An activity with counts
    // c on its resources becomes c single ones per copy where all its counts are equal.
    for (auto& a : folded.activities) {
      for (Demand& d : a.demands) d.count = a.demands[0].count;
    }
    const int copies = 1 + static_cast<int>(rng() % 3);
    Case unfolded;
    std::vector<std::size_t> origin;
    for (int copy = 0; copy < copies; ++copy) {
      for (std::size_t i = 0; i < folded.activities.size(); ++i) {
        Case::One one = folded.activities[i];
        for (Demand& d : one.demands) {
          d.resource = ResourceId{d.resource.index() +
                                  static_cast<std::size_t>(copy) * folded.capacity.size()};
        }
        const std::int64_t times = one.demands[0].count;
        for (Demand& d : one.demands) d.count = 1;
        for (std::int64_t t = 0; t < times; ++t) {
          unfolded.activities.push_back(one);
          origin.push_back(i);
        }
      }
      unfolded.capacity.insert(unfolded.capacity.end(), folded.capacity.begin(),
                               folded.capacity.end());
    }
    const auto one = rates_of(folded), many = rates_of(unfolded);
    for (std::size_t i = 0; i < many.size(); ++i) EXPECT_EQ(many[i], one[origin[i]]);
  }
}

}  // namespace
}  // namespace partita
