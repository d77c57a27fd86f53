// simulator/cost/nccl_time.h: what NCCL's collectives take (docs/nccl.md, "Time"): the algorithm
// and protocol that NCCL picks, with latencies, plateaus and ramps as measured instead of those
// that NCCL plans with.
#pragma once

#include <vector>

#include "simulator/cost/nccl.h"

namespace partita::nccl {

/// The figures that measurements decide; docs/nccl.md names the curves behind each.
struct Constants {
  double ll_latency = 1.1;             ///< of NCCL's estimate, for LL and LL128 inside a node
  double simple_latency_us = 28;       ///< most of a ring in Simple inside a node
  double ring_GBps_per_nvlink = 1.25;  ///< a ring's copies, over NVLink's rate
  double pcie = .85;                   ///< of the search's bandwidth over PCIe
  double nvls_hopper = .80, nvls_blackwell = .72;  ///< of NVLink, many members
  double nvls_domain = .585;                       ///< the same over a domain of several hosts
  double nvls_members = .55;  ///< what is lost to a head's own traffic: n / (n + this)
  double nvls_ramp = 8;       ///< us per square root of a MB
  double ring_ramp = 4;
  double network = .93;  ///< of the search's bandwidth between nodes
  double network_ramp = 25, network_ring_ramp = 5;
  double exchange = .925;  ///< of NVLink, all-to-all and send
  double exchange_ramp = 6;
  double peer_us = 3;     ///< of an all-to-all, for each peer
  double efficiency = 1;  ///< of the bandwidths inside a node, in Simple
};

/// Time of a pair that was chosen. Grows with the bytes.
double time_us(const Communicator& c, Collective what, const Choice& choice, double bytes,
               const Constants& k = {});
/// Of a message between two ranks (`peers` 1), or an all-to-all with `peers` others: `bytes` that
/// leave a rank, at `links_GBps`, the nominal rate of the busiest link.
double exchange_us(const Communicator& c, std::int64_t peers, double bytes, double links_GBps,
                   const Constants& k = {});

/// Of a copy into a peer's memory over NVLink, by a copy engine or a kernel of its own: a hop, and
/// the rate of an exchange without its start and ramp. (On H100s copies reach 371 to 377 of 450
/// GB/s, NVIDIA/nccl issue 1264; here 343, which sharing of links counts as well.)
double peer_copy_us(const Communicator& c, double bytes, double links_GBps,
                    const Constants& k = {});

/// All sizes of one collective on one communicator: where NCCL changes its choice, and the time,
/// which never falls as bytes grow (docs/nccl.md, "More bytes").
class Times {
 public:
  Times(const Communicator& c, Collective what, const Constants& k = {},
        std::optional<Algorithm> only = {});
  double time_us(double bytes) const;
  const Choice& choice(double bytes) const;

 private:
  struct Piece {
    double from = 0;
    Choice choice;
    double least_us = 0;  ///< what smaller payloads took
  };
  const Piece& piece(double bytes) const;
  void split(double low, const Choice& at_low, double high, const Choice& at_high,
             std::optional<Algorithm> only);
  Communicator c_;
  Collective what_;
  Constants k_;
  std::vector<Piece> pieces_;
};

}  // namespace partita::nccl
