// simulator/engine/links.h: which links a program's transfers share, folded.
//
// Ranks, transfers and links that behave alike form classes: the coarsest partition, not coarser
// than classify()'s, in which all links of a class are crossed by as many flows of each class of
// transfers, and all devices of a class have as many ranks of each class (docs/sharing.md, "A
// training step").
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/classes.h"
#include "simulator/program/program.h"

namespace partita {

/// Transfers of ranks of one stage that use links alike: groups of a collective, partners of a
/// send, copies between devices and hosts.
struct TransferKind {
  int stage = 0;
  AtomMask atoms = 0;
  int tie = -1;
  int peer_stage = -1, peer = 0;  ///< of a send
  AtomMask root = 0;              ///< of a send: only one rank of these has the buffer
  Lay lay = Lay::rings;           ///< of a collective
  int host = 0;                   ///< a copy: 1 to the host, 2 from it
  friend auto operator<=>(const TransferKind&, const TransferKind&) = default;
};
/// Of a collective, a send or a copy of the stage whose first rank this is; a receive's is its
/// send's.
TransferKind transfer_kind(const Program& program, const Instruction& instruction,
                           std::int64_t first_of_stage, Communication& communication);
/// By stage.
std::vector<std::int64_t> first_ranks(const Program& program);

/// Calls `visit` for each group, pair and copy of the program, once for all instructions of a kind:
/// with that kind, one of these, and the members (of a send: from, to).
void for_each_transfer(const Program& program, Communication& communication,
                       const std::function<void(const TransferKind&, const Instruction&,
                                                const std::vector<std::int64_t>& members)>& visit);
/// Links of one of them whose members lie on these devices, in a ring's order; none where nothing
/// moves.
LinkFlows transfer_links(const TransferKind& kind, const std::vector<std::int64_t>& members,
                         const Communication& communication);

struct SharedLinks {
  RankClasses ranks;
  struct LinkClass {
    LinkId representative;
    std::int64_t count = 0;
    double capacity = 0;  ///< bytes per second, of each
  };
  std::vector<LinkClass> links;
  struct Crossing {
    std::int32_t link_class = 0;
    std::int64_t flows = 0;  ///< of all transfers of the class over one link of the class
  };
  /// Transfers of one class: those that start and end together because their ranks behave alike.
  struct TransferClass {
    double share = 1;  ///< of the bytes that a rank sends, what one flow carries
    std::vector<Crossing> crossings;
  };
  std::vector<TransferClass> transfers;
  /// The device of a rank of a class: its class, and how many of the class it has.
  struct Seat {
    std::int32_t device_class = 0;
    std::int64_t ranks = 1;
  };
  std::vector<Seat> seats;  ///< by class of ranks
  std::size_t device_classes = 0;
  /// By kind, by class of ranks: index into transfers; -1: uses no link.
  std::map<TransferKind, std::vector<std::int32_t>> of_class;
};

/// `unfolded`: every rank and link its own class.
SharedLinks share_links(const Program& program, Communication& communication,
                        bool unfolded = false);

}  // namespace partita
