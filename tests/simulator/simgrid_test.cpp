// Our flows against SimGrid's CM02, which solves the same sharing with weights 1 / latency: random
// trees, fat trees, tori and shared NICs. SimGrid's engine is one to a process, so all cases run in
// it side by side, each in a zone of its own.
#include <gtest/gtest.h>

#include "simulator/engine/flows.h"

#if PARTITA_HAVE_SIMGRID
#  include <fmt/format.h>

#  include <simgrid/s4u.hpp>
#endif

#include <algorithm>
#include <cmath>
#include <random>

namespace partita {
namespace {

#if PARTITA_HAVE_SIMGRID

struct Case {
  std::string name;
  std::vector<double> capacity;
  std::vector<NetworkRoute> routes;  ///< one to a message
  std::vector<TimedMessage> messages;
};

int pick(std::mt19937_64& rng, int lo, int hi) {
  return std::uniform_int_distribution<int>(lo, hi)(rng);
}
double real(std::mt19937_64& rng, double lo, double hi) {
  return std::exp(std::uniform_real_distribution<double>(std::log(lo), std::log(hi))(rng));
}

/// Hosts under leaves under a core; as many cores as make it a fat tree, one of them by hash.
struct FatTree {
  int per_leaf, leaves, cores;
  int up(int host) const { return 2 * host; }
  int leaf_up(int leaf, int core) const {
    return 2 * per_leaf * leaves + 2 * (leaf * cores + core);
  }
  int links() const { return 2 * per_leaf * leaves + 2 * leaves * cores; }
  std::vector<std::int32_t> route(int a, int b, int core) const {
    std::vector<std::int32_t> r{up(a)};
    if (a / per_leaf != b / per_leaf) {
      r.push_back(leaf_up(a / per_leaf, core));
      r.push_back(leaf_up(b / per_leaf, core) + 1);
    }
    r.push_back(up(b) + 1);
    return r;
  }
};

/// Links to the next and the previous node of each dimension; routes dimension by dimension.
struct Torus {
  std::vector<int> sides;
  int hosts() const {
    int n = 1;
    for (const int s : sides) n *= s;
    return n;
  }
  int links() const { return 2 * hosts() * static_cast<int>(sides.size()); }
  std::vector<std::int32_t> route(int a, int b) const {
    std::vector<std::int32_t> r;
    int stride = 1;
    for (std::size_t d = 0; d < sides.size(); ++d) {
      const int n = sides[d];
      while (a / stride % n != b / stride % n) {
        const int x = a / stride % n, forward = (b / stride % n - x + n) % n;
        const bool back = forward > n - forward;
        r.push_back(2 * (static_cast<int>(d) * hosts() + a) + (back ? 1 : 0));
        a += ((x + (back ? n - 1 : 1)) % n - x) * stride;
      }
      stride *= n;
    }
    return r;
  }
};

Case random_case(std::mt19937_64& rng, bool mixed) {
  Case c;
  const int shape = pick(rng, 0, 3);
  int hosts = 0;
  FatTree tree{};
  Torus torus;
  if (shape <= 2) {
    tree.per_leaf = pick(rng, 2, 16);
    tree.leaves = pick(rng, 2, 16);
    tree.cores = shape == 1 ? pick(rng, 2, 8) : 1;
    if (shape == 2) tree.leaves = 1;  // hosts that share NICs, on one switch
    hosts = tree.per_leaf * tree.leaves;
    for (int l = 0; l < tree.links(); ++l) {
      const bool host_link = l < 2 * hosts;
      c.capacity.push_back(host_link ? 1e8 : 1e8 * tree.per_leaf / tree.cores / pick(rng, 1, 4));
    }
    c.name = shape == 0 ? "tree" : shape == 1 ? "fat tree" : "shared NICs";
  } else {
    const int dimensions = pick(rng, 2, 3);
    for (int d = 0; d < dimensions; ++d)
      torus.sides.push_back(pick(rng, 2, dimensions == 2 ? 16 : 6));
    hosts = torus.hosts();
    for (int l = 0; l < torus.links(); ++l) c.capacity.push_back(1e8);
    c.name = "torus";
  }
  if (pick(rng, 0, 1)) {
    for (double& x : c.capacity) x *= real(rng, 0.5, 2);
  }
  // Flows that share a link have the same start, or a random one.
  const int messages = pick(rng, 10, 120);
  const bool together = pick(rng, 0, 1);
  const double latency = real(rng, 1e-3, 2e-2);
  for (int m = 0; m < messages; ++m) {
    const int a = pick(rng, 0, hosts - 1);
    int b = pick(rng, 0, hosts - 2);
    if (b >= a) ++b;
    NetworkRoute r;
    r.links = shape <= 2 ? tree.route(a, b, pick(rng, 0, tree.cores - 1)) : torus.route(a, b);
    const double seconds = mixed ? real(rng, 1e-3, 2e-2) : latency;
    r.latency = Ticks{static_cast<std::int64_t>(seconds * 1e12)};
    if (mixed) r.weight = 1 / seconds;
    c.routes.push_back(r);
    c.messages.push_back(
        {Ticks{together ? 0 : static_cast<std::int64_t>(real(rng, 1e-2, 3) * 1e12)}, m,
         Bytes{static_cast<std::int64_t>(real(rng, 1e6, 3e8))}});
  }
  return c;
}

/// The same in SimGrid. A message has hosts of its own; its latency is that of a link of its own
/// that is never narrow.
std::vector<std::vector<double>> simgrid_ends(const std::vector<Case>& cases) {
  namespace sg4 = simgrid::s4u;
  const char* words[] = {"simgrid_test",
                         "--cfg=network/model:CM02",
                         "--cfg=network/crosstraffic:0",
                         "--cfg=network/weight-S:0",
                         "--cfg=network/latency-factor:1",
                         "--cfg=network/bandwidth-factor:1",
                         "--cfg=network/TCP-gamma:1e18",
                         "--cfg=contexts/stack-size:64",
                         "--cfg=maxmin/precision:1e-9",
                         "--log=root.thres:critical"};
  int count = static_cast<int>(std::size(words));
  std::vector<char*> arguments;
  for (const char* w : words) arguments.push_back(const_cast<char*>(w));
  arguments.push_back(nullptr);
  sg4::Engine engine(&count, arguments.data());
  auto* root = sg4::create_full_zone("root");
  std::vector<std::vector<double>> ends(cases.size());
  std::vector<std::vector<std::pair<sg4::Host*, sg4::Host*>>> hosts(cases.size());
  for (std::size_t k = 0; k < cases.size(); ++k) {
    const Case& c = cases[k];
    auto* zone = sg4::create_full_zone(fmt::format("zone{}", k));
    zone->set_parent(root);
    std::vector<sg4::Link*> links;
    for (std::size_t l = 0; l < c.capacity.size(); ++l)
      links.push_back(
          zone->create_link(fmt::format("l{}_{}", k, l), c.capacity[l])->set_latency(0.0)->seal());
    for (std::size_t m = 0; m < c.messages.size(); ++m) {
      auto* from = zone->create_host(fmt::format("a{}_{}", k, m), 1e9)->seal();
      auto* to = zone->create_host(fmt::format("b{}_{}", k, m), 1e9)->seal();
      const NetworkRoute& r = c.routes[m];
      std::vector<sg4::LinkInRoute> way;
      way.emplace_back(zone->create_link(fmt::format("w{}_{}", k, m), 1e15)
                           ->set_latency(static_cast<double>(r.latency.count) * 1e-12)
                           ->seal());
      for (const std::int32_t l : r.links) way.emplace_back(links[static_cast<std::size_t>(l)]);
      zone->add_route(from->get_netpoint(), to->get_netpoint(), nullptr, nullptr, way, false);
      hosts[k].emplace_back(from, to);
    }
    zone->seal();
    ends[k].resize(c.messages.size());
  }
  root->seal();
  constexpr double kApart = 1000;  // seconds between cases
  for (std::size_t k = 0; k < cases.size(); ++k) {
    for (std::size_t m = 0; m < cases[k].messages.size(); ++m) {
      const TimedMessage message = cases[k].messages[m];
      double* end = &ends[k][m];
      const auto [from, to] = hosts[k][m];
      auto* a = from;
      auto* b = to;
      const double offset = kApart * static_cast<double>(k);
      sg4::Actor::create("sender", from, [=] {
        sg4::this_actor::sleep_until(offset + static_cast<double>(message.start.count) * 1e-12);
        sg4::Comm::sendto(a, b, static_cast<std::uint64_t>(message.bytes.count));
        *end = sg4::Engine::get_clock() - offset;
      });
    }
  }
  engine.run();
  return ends;
}

TEST(SimGrid, FlowsEndWhenSimGridsDo) {
  std::mt19937_64 rng{2026};
  std::vector<Case> cases;
  for (int k = 0; k < 60; ++k) cases.push_back(random_case(rng, k >= 30));
  const auto theirs = simgrid_ends(cases);
  double worst[2] = {0, 0};
  for (std::size_t k = 0; k < cases.size(); ++k) {
    SCOPED_TRACE(
        fmt::format("case {}: {}, {} messages", k, cases[k].name, cases[k].messages.size()));
    const bool mixed = k >= 30;
    const auto ours = ends_of(cases[k].capacity, cases[k].routes, cases[k].messages);
    for (std::size_t m = 0; m < ours.size(); ++m) {
      const double start = static_cast<double>(cases[k].messages[m].start.count) * 1e-12;
      const double us = static_cast<double>(ours[m].count) * 1e-12 - start;
      const double them = theirs[k][m] - start;
      EXPECT_NEAR(us, them, (mixed ? 1e-2 : 1e-3) * them) << "message " << m;
      worst[mixed] = std::max(worst[mixed], std::abs(us - them) / them);
    }
  }
  fmt::print("worst difference: equal latencies {:.2e}, mixed {:.2e}\n", worst[0], worst[1]);
}

#else

TEST(SimGrid, FlowsEndWhenSimGridsDo) {
  GTEST_SKIP() << "built without SimGrid (Debian: libsimgrid-dev)";
}

#endif

}  // namespace
}  // namespace partita
