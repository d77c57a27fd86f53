// simulator/program/expansion.h: collectives as steps of messages between the members of a group.
//
// One expansion feeds three readers: the in-process transport executes it, the flow network moves
// it, tests count it. A message names chunks of the payload; what a chunk is follows from the kind
// (docs/execution.md, "What a collective exchanges").
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "simulator/program/program.h"

namespace partita {

enum class Algorithm : std::uint8_t {
  ring,
  tree,
  halving,
  direct,
  pairwise,
  double_tree,
  hierarchical
};
std::string_view name(Algorithm a);

/// Chunks [first, first + count) go from member `from` to member `to`; the receiver adds them to
/// what it has (or takes the maximum) if `reduces`, else replaces it. Members are positions in the
/// group.
struct Message {
  std::int32_t from = 0, to = 0;
  std::int32_t first = 0, count = 1;
  bool reduces = false;
  friend bool operator==(const Message&, const Message&) = default;
};

struct Expansion {
  /// The payload is cut in this many chunks: of all-reduce, broadcast and reduce in even parts, of
  /// the others by what each member holds or wants; of all-to-all and halo exchange n · n, chunk
  /// a · n + b goes from a to b.
  std::int32_t chunks = 1;
  /// Messages of one step carry what their senders had at its start.
  std::vector<std::vector<Message>> steps;
};

/// Steps that follow each other with the same messages but for their chunks: in repetition k a
/// message's `count` chunks are those k * turn places further in a cycle of `cycle` such places.
struct Beat {
  std::vector<Message> messages;
  std::int32_t repeat = 1, turn = 0, cycle = 1;
  Message at(const Message& m, std::int32_t repetition) const;
};

/// An expansion before it is written out: a ring over 1,024 members is two beats.
struct Rhythm {
  std::int32_t chunks = 1;
  std::vector<Beat> beats;
  std::int64_t steps() const;
};

struct AlgorithmRow {
  CollectiveKind kind;
  Algorithm algorithm;
};
/// Every algorithm there is, the default of each kind first. One row, one case in expand(), one
/// closed form in cost/: nothing else must know a new one.
inline constexpr std::array kAlgorithms{
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::ring},
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::tree},
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::halving},
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::double_tree},
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::hierarchical},
    AlgorithmRow{CollectiveKind::all_gather, Algorithm::ring},
    AlgorithmRow{CollectiveKind::reduce_scatter, Algorithm::ring},
    AlgorithmRow{CollectiveKind::all_to_all, Algorithm::pairwise},
    AlgorithmRow{CollectiveKind::halo_exchange, Algorithm::direct},
    AlgorithmRow{CollectiveKind::shift, Algorithm::direct},
    AlgorithmRow{CollectiveKind::broadcast, Algorithm::tree},
    AlgorithmRow{CollectiveKind::broadcast, Algorithm::ring},
    AlgorithmRow{CollectiveKind::reduce, Algorithm::tree},
    AlgorithmRow{CollectiveKind::reduce, Algorithm::ring},
    AlgorithmRow{CollectiveKind::scatter, Algorithm::direct},
    AlgorithmRow{CollectiveKind::gather, Algorithm::direct},
};
Algorithm default_algorithm(CollectiveKind kind);

/// The steps of `kind` over n >= 1 members; the root of a rooted kind is member 0. One member: no
/// steps. `levels`, for hierarchical algorithms: members of a unit, units of the next one, ...,
/// innermost first; their product is n. Empty: the prime factors of n. InternalError for a pair
/// that is no row of kAlgorithms.
Rhythm rhythm(CollectiveKind kind, Algorithm algorithm, std::int32_t n,
              const std::vector<std::int32_t>& levels = {});
Expansion expand(CollectiveKind kind, Algorithm algorithm, std::int32_t n,
                 const std::vector<std::int32_t>& levels = {});

/// Bytes that each ordered pair of ranks (from, to) exchanges in step `step`, with the default
/// algorithms: what the in-process transport counts. Routed buffers without a routing are left out:
/// their rows are data.
std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> step_traffic(const Program& program,
                                                                           std::int64_t step);

/// Chunk boundaries (chunks + 1 of them) of a payload of `total` values in even parts, larger
/// first.
std::vector<std::int64_t> even_chunks(std::int64_t total, std::int32_t chunks);

}  // namespace partita
