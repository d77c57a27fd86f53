#include "simulator/cost/nccl_time.h"

#include <algorithm>
#include <cmath>

namespace partita::nccl {
namespace {

/// What filling and draining pipelines costs: their chunks grow with the payload up to a size.
double ramp_us(double us_per_root_mb, double full_mb, double bytes) {
  const double mb = bytes * 1e-6;
  return us_per_root_mb * std::sqrt(mb * full_mb / (mb + full_mb));
}
constexpr double kFullRing = 15'000, kFullNvls = 6'000, kFullNetwork = 140, kFullExchange = 2'000;
constexpr double kLl128Ramp = .3;

double nvls_bandwidth(const Communicator& c, const Constants& k) {
  constexpr double kTray = 8;  // GPUs of one host at most
  const double of = c.per_node() > kTray          ? k.nvls_domain
                    : c.compute_capability >= 100 ? k.nvls_blackwell
                                                  : k.nvls_hopper;
  return c.nvlink_GBps * of * c.per_node() / (c.per_node() + k.nvls_members);
}

/// Bytes on the bus for one of the caller's.
double wire_share(Collective w, std::int64_t ranks) {
  const auto n = static_cast<double>(ranks);
  switch (w) {
    case Collective::all_reduce:
      return 2 * (n - 1) / n;
    case Collective::all_gather:
    case Collective::reduce_scatter:
      return (n - 1) / n;
    case Collective::broadcast:
    case Collective::reduce:
      return 1;
  }
  return 1;
}

/// Times that a ring's blocks touch a chunk, for each time that it crosses a link: a rank copies
/// what it starts or ends with too (docs/nccl.md).
double touches(Collective w, std::int64_t ranks) {
  const auto n = static_cast<double>(ranks);
  switch (w) {
    case Collective::all_reduce:
      return (2 * n - 1) / (2 * n - 2);
    case Collective::reduce_scatter:
      return n / (n - 1);
    case Collective::all_gather:
      return (n - .5) / (n - 1);
    case Collective::broadcast:
    case Collective::reduce:
      return 1;
  }
  return 1;
}

double inside_us(const Communicator& c, Collective w, const Choice& x, const Price& plan,
                 double bytes, const Constants& k) {
  const double wire = bytes * wire_share(w, c.ranks);
  const double at_plan = bytes / (1000 * plan.bandwidth_GBps);
  if (x.protocol != Protocol::simple) {
    const double ramp =
        x.protocol == Protocol::ll128 ? kLl128Ramp * ramp_us(k.ring_ramp, kFullRing, wire) : 0;
    return k.ll_latency * plan.latency_us + at_plan + ramp;
  }
  if (x.algorithm == Algorithm::nvls) {
    const double move =
        w == Collective::all_reduce ? bytes / (1000 * nvls_bandwidth(c, k)) : at_plan;
    return plan.latency_us + move / k.efficiency + ramp_us(k.nvls_ramp, kFullNvls, bytes);
  }
  if (x.algorithm != Algorithm::ring)
    return plan.latency_us + at_plan + ramp_us(k.ring_ramp, kFullRing, wire);
  const double share = wire_share(w, c.ranks);
  double bus = plan.bandwidth_GBps * share;
  if (c.nvlink_GBps > 0)
    bus = std::min(bus, c.nvlink_GBps * k.ring_GBps_per_nvlink / touches(w, c.ranks));
  else
    bus *= k.pcie;
  const double latency = std::min(
      plan.latency_us, k.simple_latency_us * std::max(1.0, static_cast<double>(c.ranks) / 8));
  return latency + wire / (1000 * bus * k.efficiency) + ramp_us(k.ring_ramp, kFullRing, wire);
}

double between_us(const Communicator& c, Collective w, const Choice& x, const Price& plan,
                  double bytes, const Constants& k) {
  const double depth = std::floor(std::log2(c.nodes));
  const bool ring = x.algorithm == Algorithm::ring;
  // Into the network and out of it once, where its switches sum.
  const bool summed = x.algorithm == Algorithm::nvls || x.algorithm == Algorithm::collnet_chain ||
                      x.algorithm == Algorithm::collnet_direct;
  const double crossings =
      summed  ? 2
      : !ring ? 2 * depth
              : static_cast<double>(c.nodes - 1) * (w == Collective::all_reduce ? 2 : 1);
  const double latency = plan.latency_us + c.route_latency_us * crossings;
  const double ramp = ramp_us(ring ? k.network_ring_ramp : k.network_ramp, kFullNetwork, bytes);
  if (x.protocol != Protocol::simple)
    return latency + bytes / (1000 * plan.bandwidth_GBps * c.network_share) + kLl128Ramp * ramp;
  const double network = k.network * c.network_share;
  double bandwidth = plan.bandwidth_GBps * network;
  if (x.algorithm == Algorithm::nvls_tree) {
    // Of a double tree each node sends all bytes up and all down; two nodes halve them.
    const double out = c.network_GBps * network / (c.nodes > 2 ? 2 : 1);
    bandwidth = std::min(nvls_bandwidth(c, k), out);
  }
  if (x.algorithm == Algorithm::nvls)
    bandwidth = std::min(nvls_bandwidth(c, k), c.network_GBps * network);
  return latency + bytes / (1000 * bandwidth) + ramp;
}

}  // namespace

double time_us(const Communicator& c, Collective w, const Choice& x, double bytes,
               const Constants& k) {
  if (c.ranks <= 1) return 0;
  const Price plan = price(c, w, x.algorithm, x.protocol).value();
  return c.nodes == 1 ? inside_us(c, w, x, plan, bytes, k) : between_us(c, w, x, plan, bytes, k);
}

namespace {

constexpr double kNvlinkHop = 3.4;

/// What NCCL reaches of NVLink's nominal rate (nccl_search.cpp).
double nvlink_share(const Communicator& c) {
  return c.compute_capability >= 100 ? .802 : c.compute_capability >= 90 ? .824 : .8;
}

}  // namespace

double peer_copy_us(const Communicator& c, double bytes, double links_GBps, const Constants& k) {
  return kNvlinkHop + bytes / (1000 * links_GBps * k.exchange * nvlink_share(c));
}

double exchange_us(const Communicator& c, std::int64_t peers, double bytes, double links_GBps,
                   const Constants& k) {
  // A ring's base and one hop in Simple: what a block needs to start and meet another.
  constexpr double kStart = 8.4, kPciHop = 5.7, kNetHop = 14;
  const double hop = c.nodes > 1         ? kNetHop + c.route_latency_us
                     : c.nvlink_GBps > 0 ? kNvlinkHop
                                         : kPciHop;
  double bandwidth = links_GBps;
  if (c.nodes > 1)
    bandwidth *= k.network;
  else if (c.nvlink_GBps > 0)
    bandwidth *= k.exchange * nvlink_share(c);
  else
    bandwidth *= k.pcie * 12 / 15.75;
  return kStart + hop + k.peer_us * static_cast<double>(peers) + bytes / (1000 * bandwidth) +
         ramp_us(k.exchange_ramp, kFullExchange, bytes);
}

Times::Times(const Communicator& c, Collective what, const Constants& k,
             std::optional<Algorithm> only)
    : c_(c), what_(what), k_(k) {
  constexpr int kDoublings = 45;
  Choice low = choose(c_, what_, 1, only);
  pieces_.push_back({0, low, 0});
  for (int i = 0; i < kDoublings; ++i) {
    // Within a doubling NCCL's estimates are straight lines: one that is least at both ends is
    // least between.
    const double from = std::exp2(i), to = std::exp2(i + 1) - 1;
    const Choice first = choose(c_, what_, from, only), last = choose(c_, what_, to, only);
    if (!(first == pieces_.back().choice)) pieces_.push_back({from, first, 0});
    split(from, first, to, last, only);
  }
  for (std::size_t i = 1; i < pieces_.size(); ++i) {
    Piece& p = pieces_[i];
    const Piece& before = pieces_[i - 1];
    p.least_us = std::max(before.least_us, nccl::time_us(c_, what_, before.choice, p.from - 1, k_));
  }
}

void Times::split(double low, const Choice& at_low, double high, const Choice& at_high,
                  std::optional<Algorithm> only) {
  if (at_low == at_high) return;
  if (high - low <= 1) {
    pieces_.push_back({high, at_high, 0});
    return;
  }
  const double middle = std::floor((low + high) / 2);
  const Choice at_middle = choose(c_, what_, middle, only);
  split(low, at_low, middle, at_middle, only);
  split(middle, at_middle, high, at_high, only);
}

const Times::Piece& Times::piece(double bytes) const {
  const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), bytes,
                                      [](double b, const Piece& p) { return b < p.from; });
  return *(after - 1);
}

double Times::time_us(double bytes) const {
  const Piece& p = piece(bytes);
  return std::max(p.least_us, nccl::time_us(c_, what_, p.choice, bytes, k_));
}

const Choice& Times::choice(double bytes) const { return piece(bytes).choice; }

}  // namespace partita::nccl
