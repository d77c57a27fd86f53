// Our flows against SimGrid's CM02, which solves the same sharing with weights 1 / latency: random
// trees, fat trees, tori, shared NICs, and our own fabrics: tori, whose routes SimGrid finds by
// itself, and spines by hash, whose routes it is told. SimGrid's engine is one to a process, so all
// cases run in it side by side, each in a zone of its own.
#include <gtest/gtest.h>

#include "simulator/engine/flows.h"

#if PARTITA_HAVE_SIMGRID
#  include <fmt/format.h>
#  include <fmt/ranges.h>

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
  std::vector<unsigned long> torus;  ///< sides: SimGrid routes by itself
  double torus_latency = 0;          ///< of one of its links
  std::vector<std::pair<int, int>> ends;
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

constexpr double kTorusRate = 1e8;

/// Nodes of one device whose card is never narrow, on a fabric.
Topology wide_cards(int nodes, const std::string& fabric) {
  return parse_topology(fmt::format(R"(schema: partita.topology/1
name: wide
source: test
nodes:
  - count: {}
    vertices:
      gpu: {{kind: device, device: cpu}}
      nic: {{kind: nic, bandwidth: 1000 TB/s, latency: 0 s}}
    links: [{{from: gpu, to: nic, kind: pcie, bandwidth: 1000 TB/s, latency: 0 s}}]
fabric: {}
)",
                                    nodes, fabric),
                        "wide.yaml");
}

/// Messages between random devices over the routes that the topology gives.
Case routed_case(std::mt19937_64& rng, const Topology& t) {
  Case c;
  for (std::size_t l = 0; l < t.link_count(); ++l)
    c.capacity.push_back(t.link(LinkId{l}).bandwidth.count);
  const bool together = pick(rng, 0, 1);
  const int devices = static_cast<int>(t.device_count());
  for (int m = pick(rng, 10, 160); m > 0; --m) {
    const int a = pick(rng, 0, devices - 1);
    int b = pick(rng, 0, devices - 2);
    if (b >= a) ++b;
    NetworkRoute r;
    for (const LinkId l :
         t.route(DeviceId{static_cast<std::size_t>(a)}, DeviceId{static_cast<std::size_t>(b)})) {
      r.links.push_back(l.value);
      r.latency += to_ticks(t.link(l).latency);
    }
    c.ends.emplace_back(a, b);
    c.messages.push_back(
        {Ticks{together ? 0 : static_cast<std::int64_t>(real(rng, 1e-2, 3) * 1e12)},
         static_cast<std::int32_t>(c.routes.size()),
         Bytes{static_cast<std::int64_t>(real(rng, 1e6, 3e8))}});
    c.routes.push_back(r);
  }
  return c;
}

/// Sides of which SimGrid's routes are ours: it breaks the tie half way round an even side by where
/// it starts.
Case torus_case(std::mt19937_64& rng) {
  std::vector<unsigned long> sides;
  int nodes = 1;
  for (int d = pick(rng, 1, 4); d > 0; --d) {
    constexpr int kSides[] = {2, 3, 5, 7, 9, 15};
    const int side = kSides[pick(rng, 0, 5)];
    if (nodes * side > 256) continue;
    sides.push_back(static_cast<unsigned long>(side));
    nodes *= side;
  }
  const double latency = real(rng, 1e-3, 2e-2);
  const Topology t =
      wide_cards(nodes, fmt::format("{{kind: torus, size: [{}], bandwidth: {} B/s, latency: {} s}}",
                                    fmt::join(sides, ", "), kTorusRate, latency));
  Case c = routed_case(rng, t);
  for (NetworkRoute& r : c.routes) r.weight = 1e12 / static_cast<double>(r.latency.count);
  c.name = fmt::format("torus of {}", fmt::join(sides, " x "));
  c.torus = sides;
  c.torus_latency = latency;
  return c;
}

/// Spines by hash; all messages of one latency, or each of its own.
Case spines_case(std::mt19937_64& rng, bool mixed) {
  const int per_leaf = pick(rng, 2, 16), leaves = pick(rng, 2, 16), spines = pick(rng, 2, 8);
  const Topology t = wide_cards(
      per_leaf * leaves,
      fmt::format("{{kind: fat tree, nodes_per_leaf: {}, spines: {}, routing: ecmp, seed: {}, "
                  "uplink: {} B/s, uplink_latency: 1 us}}",
                  per_leaf, spines, pick(rng, 0, 1'000'000), 1e8 * per_leaf / pick(rng, 1, 4)));
  Case c = routed_case(rng, t);
  const double latency = real(rng, 1e-3, 2e-2);
  for (NetworkRoute& r : c.routes) {
    const double seconds = mixed ? real(rng, 1e-3, 2e-2) : latency;
    r.latency = Ticks{static_cast<std::int64_t>(seconds * 1e12)};
    if (mixed) r.weight = 1 / seconds;
  }
  c.name = fmt::format("{} leaves of {}, {} spines by hash", leaves, per_leaf, spines);
  return c;
}

Case random_case(std::mt19937_64& rng, bool mixed) {
  Case c;
  const int shape = pick(rng, 0, mixed ? 5 : 4);
  if (shape == 5) return torus_case(rng);
  if (shape == 4) return spines_case(rng, mixed);
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
  const char* words[] = {"simgrid_test", "--cfg=network/model:CM02", "--cfg=network/crosstraffic:0",
                         "--cfg=network/weight-S:0", "--cfg=network/latency-factor:1",
                         "--cfg=network/bandwidth-factor:1", "--cfg=network/TCP-gamma:1e18",
                         "--cfg=contexts/stack-size:64", "--cfg=maxmin/precision:1e-9",
                         // Its lazy updates (3.32) miss flows whose latency ends while others wait
                         // for theirs on the same link: up to 20 % off its own full updates.
                         "--cfg=network/optim:Full", "--log=root.thres:critical"};
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
    ends[k].resize(c.messages.size());
    if (!c.torus.empty()) {
      std::vector<sg4::Host*> nodes(c.routes.size() + 256);
      const auto host = [&](sg4::NetZone* zone, const std::vector<unsigned long>&,
                            unsigned long id) {
        nodes.at(id) = zone->create_host(fmt::format("t{}_{}", k, id), 1e9)->seal();
        return std::pair<simgrid::kernel::routing::NetPoint*, simgrid::kernel::routing::NetPoint*>(
            nodes[id]->get_netpoint(), nullptr);
      };
      sg4::create_torus_zone(fmt::format("zone{}", k), root, c.torus, sg4::ClusterCallbacks(host),
                             kTorusRate, c.torus_latency, sg4::Link::SharingPolicy::SPLITDUPLEX)
          ->seal();
      for (const auto& [a, b] : c.ends)
        hosts[k].emplace_back(nodes[static_cast<std::size_t>(a)],
                              nodes[static_cast<std::size_t>(b)]);
      continue;
    }
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
  for (int k = 0; k < 120; ++k) cases.push_back(random_case(rng, k >= 50));
  const auto theirs = simgrid_ends(cases);
  double worst[2] = {0, 0};
  for (std::size_t k = 0; k < cases.size(); ++k) {
    SCOPED_TRACE(
        fmt::format("case {}: {}, {} messages", k, cases[k].name, cases[k].messages.size()));
    const bool mixed = k >= 50;
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
