#include "simulator/cost/nccl.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace partita::nccl {
namespace {

// Tables of NCCL 2.28.9, src/graph/tuning.cc.

using Triple = std::array<double, 3>;

/// By protocol; NCCL's NCCL_ALGO_* order (tuning.cc:148-155).
constexpr Triple kBase[kAlgorithms] = {{6.8, 14, 8.4}, {6.6, 14, 8.4}, {0, 0, 0}, {0, 0, 0},
                                       {0, 0, 0},      {0, 0, 0},      {8, 8, 8}};

/// Of one hop, by protocol (tuning.cc:163-186).
struct Hops {
  Triple of[kAlgorithms];
};
constexpr Hops kNvlink = {
    {{.6, 1.25, 4}, {.6, 1.9, 3.4}, {0, 0, 3.7}, {0, 0, 2.8}, {0, 0, 25}, {0, 0, 25}, {0, 0, 4}}};
constexpr Hops kPci = {
    {{1, 1.9, 4}, {1, 2.5, 5.7}, {0, 0, 3.7}, {0, 0, 2.8}, {0, 0, 0}, {0, 0, 0}, {0, 0, 4}}};
constexpr Hops kNet = {
    {{5, 8.5, 14}, {2.7, 4, 14}, {0, 0, 31}, {0, 0, 30}, {0, 0, 18}, {0, 0, 20.9}, {0, 0, 14}}};

/// By generation (Volta, Ampere, Hopper, Blackwell), then 1, 2, more nodes (tuning.cc:189-233).
constexpr Triple kLl[] = {{39, 39, 20.4}, {87.7, 22.5, 19}, {141, 45, 35}, {282, 90, 70}};
constexpr Triple kNvlsTree[] = {{26.5, 18.5, 10}, {24, 23.6, 17.8}, {0, 57.7, 45.5}, {0, 96, 43.8}};
constexpr Triple kRingLl128[] = {
    {20, 20, 20}, {20, 20, 20}, {36.7, 36.7, 36.7}, {73.4, 34.6, 73.4}};
constexpr Triple kTreeLl128[] = {{20, 20, 20}, {20, 20, 20}, {36.7, 36.7, 29}, {55.6, 31.67, 20}};
constexpr Triple kTree[] = {{26.5, 18.5, 10}, {24, 23.6, 17.8}, {38.7, 41.4, 36}, {70, 42.8, 24}};
constexpr double kNvlsEfficiency[] = {0, 0, .85, .74};
/// Public logs of 8 H100: "24 coll channels, 16 nvls channels".
constexpr int kNvlsChannels = 16;

/// What 2.30.7 changes.
constexpr Triple kRingLl128Blackwell_2_30 = {40, 40, 40};
constexpr double kNvlsTreeBlackwell_2_30 = 80;  // more than two nodes

/// Share of the bandwidth that a tree reaches, by floor(log2(bytes / 64)) (tuning.cc:567-576).
constexpr std::array<double, 23> kTreeShare[kProtocols] = {
    {1, 1, 1, 1, .9, .8, .7, .7, .7, .7, .6, .5, .4, .4, .5, .6, .7, .8, .9, 1, 1, 1, 1},
    {1, 1, 1, 1, 1, .9, .8, .8, .8, .7, .6, .6, .6, .6, .6, .6, .8, .9, .9, .9, .9, 1, 1},
    {.9, .9, .9, .9, .9, .9, .9, .8, .7, .6, .6, .5, .5, .5, .5, .6, .7, .8, .7, .7, .8, .9, .9}};

std::size_t generation(int capability) {
  return capability < 80 ? 0 : capability < 90 ? 1 : capability < 100 ? 2 : 3;
}
std::size_t at(Protocol p) { return static_cast<std::size_t>(p); }
std::size_t at(Algorithm a) { return static_cast<std::size_t>(a); }
bool collnet(Algorithm a) {
  return a == Algorithm::collnet_direct || a == Algorithm::collnet_chain;
}
bool scatters(Collective w) {
  return w == Collective::all_gather || w == Collective::reduce_scatter;
}

bool exists(Collective w, Algorithm a, Protocol p) {
  if (a != Algorithm::ring && a != Algorithm::tree && p != Protocol::simple) return false;
  switch (w) {
    case Collective::broadcast:
    case Collective::reduce:
      return a == Algorithm::ring;
    case Collective::all_gather:
    case Collective::reduce_scatter:
      return a == Algorithm::ring || a == Algorithm::nvls || a == Algorithm::collnet_direct ||
             a == Algorithm::pat;
    case Collective::all_reduce:
      return a != Algorithm::pat;
  }
  return false;
}

std::int64_t steps(Collective w, std::int64_t ranks) {
  switch (w) {
    case Collective::all_reduce:
      return 2 * (ranks - 1);
    case Collective::all_gather:
    case Collective::reduce_scatter:
      return ranks - 1;
    case Collective::broadcast:
    case Collective::reduce:
      return ranks;
  }
  return ranks;
}

/// Of all channels together, in bytes of the bus (tuning.cc:285-334).
double bus(const Communicator& c, const Graph& g, Collective w, Algorithm a, Protocol p) {
  const std::size_t cc = generation(c.compute_capability);
  const std::size_t span = static_cast<std::size_t>(std::min<std::int64_t>(c.nodes, 3)) - 1;
  const bool blackwell_2_30 = c.version == Version::v2_30_7 && cc == 3;
  const double n = g.channels;
  double speed = c.nodes <= 2 || collnet(a) ? g.intra_GBps : g.inter_GBps;
  if (a == Algorithm::nvls || a == Algorithm::nvls_tree) {
    double intra = g.intra_GBps * kNvlsEfficiency[cc] * (n - 1) / n;
    intra *= w == Collective::all_reduce ? 2 : (c.per_node() - 1) / c.per_node();
    const double inter = g.inter_GBps * (a == Algorithm::nvls_tree && c.nodes <= 2 ? 2 : 1);
    speed = std::min(intra, inter);
    if (a == Algorithm::nvls_tree)
      speed = std::min(speed,
                       blackwell_2_30 && span == 2 ? kNvlsTreeBlackwell_2_30 : kNvlsTree[cc][span]);
  }
  double all = n * speed;
  const std::size_t row = c.nodes == 1 ? cc : c.cpu == Cpu::amd ? 1 : 0;
  const double ll = kLl[row][span];
  if (a == Algorithm::ring && p == Protocol::ll) all = std::min(ll, all / 2);
  if (a == Algorithm::ring && p == Protocol::ll128) {
    const Triple& most = blackwell_2_30 ? kRingLl128Blackwell_2_30 : kRingLl128[cc];
    all = std::min(.92 * all, n * most[span]);
  }
  if (a == Algorithm::tree) {
    all = std::min(.92 * all, n * kTree[cc][span]);
    if (p == Protocol::ll) all = std::min(all / 3.8, ll);
    if (p == Protocol::ll128)
      all = std::min(c.nodes == 1 ? all * 7 / 9 : all * 120 / 128, n * kTreeLl128[cc][span]);
    if (c.plain_tree) all *= .85;
  }
  if (a == Algorithm::pat) all *= .75;
  if (a == Algorithm::collnet_direct && p == Protocol::simple) {
    if (scatters(w)) {
      all = c.per_node() * std::min(g.intra_GBps, .9 * g.inter_GBps);
    } else {
      const double r = c.per_node() / n;
      all /= r - (r - 1) / 2;
      if (c.compute_capability >= 90) all *= .85;
    }
  }
  return all;
}

double latency(const Communicator& c, const Graph& g, Collective w, Algorithm a, Protocol p) {
  const Hops& inside = g.nvlink ? kNvlink : kPci;
  const double intra = inside.of[at(a)][at(p)];
  const double net = c.net_latency_us * (p == Protocol::simple ? 2 : 1);  // Simple flushes
  const double inter = kNet.of[at(c.ranks == c.nodes ? Algorithm::tree : a)][at(p)] + net;
  const double base = kBase[at(a)][at(p)];
  const double others = c.per_node() - 1, depth = std::floor(std::log2(c.nodes));
  switch (a) {
    case Algorithm::ring: {
      const auto n = static_cast<double>(steps(w, c.ranks));
      if (w == Collective::broadcast || w == Collective::reduce) {
        const Hops& h = c.nodes > 1 ? kNet : inside;
        if (g.same_channels) return base + h.of[at(a)][at(p)];
        return base + n * h.of[at(p == Protocol::simple ? Algorithm::tree : a)][at(p)];
      }
      const double crossing =
          static_cast<double>(c.nodes - 1) * (w == Collective::all_reduce ? 2 : 1);
      double overhead = c.nodes == 1 ? 0 : c.cpu == Cpu::amd ? 2 : 1;
      if (p == Protocol::simple) overhead *= 3;
      return base + (n - crossing) * std::max(intra, overhead) + crossing * inter;
    }
    case Algorithm::tree:
      return base + 2 * (others * intra + depth * inter);
    case Algorithm::collnet_direct:
      return base + 2 * (std::min(1.0, others) * intra + .4 * others) + inter;
    case Algorithm::collnet_chain:
      return base + 2 * others * intra + inter;
    case Algorithm::nvls:
      return intra + (c.nodes > 1 ? inter : 0);
    case Algorithm::nvls_tree:
      return base + intra + 2 * depth * inter;
    case Algorithm::pat:
      return base + depth * inter / 3.5 + 2.8 * static_cast<double>(c.ranks);
  }
  return base;
}

}  // namespace

std::string_view name(Algorithm a) {
  constexpr std::string_view names[] = {
      "tree", "ring", "collnet direct", "collnet chain", "nvls", "nvls tree", "pat"};
  return names[at(a)];
}
std::string_view name(Protocol p) {
  constexpr std::string_view names[] = {"LL", "LL128", "Simple"};
  return names[at(p)];
}

std::optional<Price> price(const Communicator& c, Collective w, Algorithm a, Protocol p) {
  const auto& g = c.graph(a);
  if (!g || !exists(w, a, p)) return {};
  if ((a == Algorithm::nvls || a == Algorithm::nvls_tree) && g->channels < 2) return {};
  double bandwidth = bus(c, *g, w, a, p);
  // To bytes of the caller (tuning.cc:345-352).
  if (a == Algorithm::ring || !scatters(w)) {
    const bool by_steps = a == Algorithm::ring || a == Algorithm::nvls || a == Algorithm::nvls_tree;
    bandwidth *=
        by_steps ? static_cast<double>(c.ranks) / static_cast<double>(steps(w, c.ranks)) : .5;
  }
  return Price{latency(c, *g, w, a, p), bandwidth};
}

bool enabled(const Communicator& c, Collective w, Algorithm a, Protocol p) {
  const auto one = price(c, w, a, p);
  if (!one || !(one->bandwidth_GBps > 0)) return false;
  if (p == Protocol::ll128 && !c.ll128) return false;
  switch (a) {
    case Algorithm::tree:
    case Algorithm::ring:
      return true;
    case Algorithm::collnet_direct:
    case Algorithm::collnet_chain:
      // All-gather and reduce-scatter over a collective network need a plugin that does them,
      // which none of ours has.
      return c.collective_network && c.nodes > 1 && w == Collective::all_reduce;
    case Algorithm::nvls:
      return c.nvls && (c.nodes == 1 || (c.collective_network && w == Collective::all_reduce));
    case Algorithm::nvls_tree:
      return c.nvls && c.nodes > 1;
    case Algorithm::pat:
      return c.ranks == c.nodes;
  }
  return false;
}

double estimate_us(const Communicator& c, Collective w, Algorithm a, Protocol p, double bytes) {
  auto one = price(c, w, a, p).value();
  const bool grows = c.version == Version::v2_30_7 && generation(c.compute_capability) == 3 &&
                     a == Algorithm::nvls_tree && c.cpu != Cpu::other;
  if (w == Collective::all_reduce && (a == Algorithm::tree || grows)) {
    const double doublings = std::floor(std::log2(std::max(bytes, 1.0) / 64));
    if (doublings >= 0 && doublings < 23)
      one.bandwidth_GBps *= kTreeShare[at(p)][static_cast<std::size_t>(doublings)];
  }
  if (a == Algorithm::ring && p == Protocol::simple && w == Collective::all_reduce && c.nodes > 1 &&
      bytes / static_cast<double>(2 * c.graph(a)->channels * c.ranks) >= 64)
    one.latency_us *= c.compute_capability < 80 ? 1.9 : 1.4;
  return one.time_us(bytes);
}

int channels(const Communicator& c, Algorithm a, Protocol p, double bytes) {
  const auto& g = c.graph(a);
  if (!g) return 1;
  if (a == Algorithm::nvls || a == Algorithm::nvls_tree)
    return std::min(kNvlsChannels, 2 * std::max(g->channels, 1));
  const bool slow_ring =
      a == Algorithm::ring && p == Protocol::simple && g->channels * g->intra_GBps <= 12;
  const int threads = p == Protocol::ll128 ? 640 : slow_ring ? 256 : 512;
  double threshold = p == Protocol::simple ? 64 : 8;
  if (p == Protocol::ll && a == Algorithm::ring) threshold *= static_cast<double>(c.ranks);
  if (collnet(a)) threshold = 512;
  int n = std::min(64, 2 * g->channels);
  while (n > 1 && bytes < n * threads * threshold) --n;
  return n;
}

Choice choose(const Communicator& c, Collective w, double bytes, std::optional<Algorithm> only) {
  Choice best;
  best.time_us = INFINITY;
  if (c.ranks <= 1) return {Algorithm::ring, Protocol::simple, 0, 1};
  for (std::size_t a = 0; a < kAlgorithms; ++a) {
    for (std::size_t p = 0; p < kProtocols; ++p) {
      const auto algorithm = static_cast<Algorithm>(a);
      const auto protocol = static_cast<Protocol>(p);
      if (only && *only != algorithm) continue;
      if (!enabled(c, w, algorithm, protocol)) continue;
      const double t = estimate_us(c, w, algorithm, protocol, bytes);
      if (t < best.time_us) best = {algorithm, protocol, t, 1};
    }
  }
  if (only && !(best.time_us < INFINITY)) return choose(c, w, bytes);  // NCCL falls back
  PARTITA_ASSERT(best.time_us < INFINITY, "no algorithm");
  best.channels = channels(c, best.algorithm, best.protocol, bytes);
  return best;
}

}  // namespace partita::nccl
