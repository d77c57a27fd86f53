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
  hierarchical,
  nvls,
  nvls_tree
};
std::string_view name(Algorithm a);

/// Chunks first + row * row_stride + k * stride, row < rows, k < count, go from member `from` to
/// member `to`; the receiver adds them to what it has (or takes the maximum) if `reduces`, else
/// replaces it. Members are positions in the group; the numbers after them are switches that add
/// and copy (Rhythm::switches).
struct Message {
  std::int32_t from = 0, to = 0;
  std::int32_t first = 0, count = 1;
  bool reduces = false;
  std::int32_t stride = 1, rows = 1, row_stride = 0;
  friend bool operator==(const Message&, const Message&) = default;

  std::int32_t chunks() const { return rows * count; }
  /// The i-th of its chunks.
  std::int32_t chunk(std::int32_t i) const {
    return first + i / count * row_stride + i % count * stride;
  }
};

struct Expansion {
  std::int32_t members = 1, switches = 0;
  /// The payload is cut in this many chunks: of all-reduce, broadcast and reduce in even parts, of
  /// the others by what each member holds or wants; of all-to-all and halo exchange n · n, chunk
  /// a · n + b goes from a to b.
  std::int32_t chunks = 1;
  /// Messages of one step carry what their senders had at its start.
  std::vector<std::vector<Message>> steps;
};

/// Steps that follow each other with the same messages but for their chunks: in repetition k a
/// message's chunks are those k * turn places further in a cycle of `cycle` places, `unit` chunks
/// from one to the next.
struct Beat {
  std::vector<Message> messages;
  std::int32_t repeat = 1, turn = 0, cycle = 1, unit = 1;
  Message at(const Message& m, std::int32_t repetition) const;
};

/// An expansion before it is written out: a ring over 1,024 members is two beats.
struct Rhythm {
  std::int32_t members = 1;
  /// Switches members, members + 1, ... of the network, one to a unit of the innermost level. They
  /// keep nothing: what comes to one in a step, summed chunk by chunk, leaves it in the same step.
  std::int32_t switches = 0;
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
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::nvls},
    AlgorithmRow{CollectiveKind::all_reduce, Algorithm::nvls_tree},
    AlgorithmRow{CollectiveKind::all_gather, Algorithm::ring},
    AlgorithmRow{CollectiveKind::all_gather, Algorithm::halving},
    AlgorithmRow{CollectiveKind::all_gather, Algorithm::hierarchical},
    AlgorithmRow{CollectiveKind::all_gather, Algorithm::nvls},
    AlgorithmRow{CollectiveKind::reduce_scatter, Algorithm::ring},
    AlgorithmRow{CollectiveKind::reduce_scatter, Algorithm::halving},
    AlgorithmRow{CollectiveKind::reduce_scatter, Algorithm::hierarchical},
    AlgorithmRow{CollectiveKind::reduce_scatter, Algorithm::nvls},
    AlgorithmRow{CollectiveKind::all_to_all, Algorithm::pairwise},
    AlgorithmRow{CollectiveKind::all_to_all, Algorithm::direct},
    AlgorithmRow{CollectiveKind::all_to_all, Algorithm::hierarchical},
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
/// steps. `levels`, for hierarchical and NVLS algorithms: members of a unit, units of the next one,
/// ..., innermost first; their product is n. Empty: the prime factors of n, of NVLS one switch for
/// all. InternalError for a pair that is no row of kAlgorithms.
Rhythm rhythm(CollectiveKind kind, Algorithm algorithm, std::int32_t n,
              const std::vector<std::int32_t>& levels = {});
Expansion expand(CollectiveKind kind, Algorithm algorithm, std::int32_t n,
                 const std::vector<std::int32_t>& levels = {});

/// Who is above each of n members in a binary tree over them, as NCCL numbers it; -1: the root, 0.
std::vector<std::int32_t> binary_tree_parents(std::int32_t n);
/// Who stands in a member's place in the other tree of two, where leaves are inner members.
std::int32_t in_other_tree(std::int32_t member, std::int32_t n);

/// Does it take levels?
constexpr bool levelled(Algorithm a) {
  return a == Algorithm::hierarchical || a == Algorithm::nvls || a == Algorithm::nvls_tree;
}

/// Messages of one step that meet in a switch: equal chunks in, their sum out.
struct Meeting {
  std::vector<Message> in, out;
};
std::vector<Meeting> meetings(const std::vector<Message>& step, std::int32_t members);

/// The same where no switch adds: the member that gets a sum, else the first that sends, stands in
/// for it, in two steps. What transports execute.
Expansion on_members(const Expansion& expansion);

/// A payload of `bytes`, as nccl-tests counts it (all-reduce, reduce-scatter, broadcast, reduce,
/// scatter: the input; all-gather, gather: the output; all-to-all, halo exchange: what one member
/// holds; shift: what one member sends), in even parts, larger first.
class EvenCut {
 public:
  EvenCut(CollectiveKind kind, const Rhythm& rhythm, Bytes payload);
  Bytes of(const Message& message) const;
  /// Are all chunks of one size?
  bool equal() const { return rest_ == 0; }

 private:
  std::int64_t parts_ = 1, least_ = 0, rest_ = 0;  ///< the first `rest_` parts are a byte larger
};

/// Bytes that each ordered pair of ranks (from, to) exchanges in step `step`, with the default
/// algorithms: what the in-process transport counts. Routed buffers without a routing are left out:
/// their rows are data.
std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> step_traffic(const Program& program,
                                                                           std::int64_t step);

/// Chunk boundaries (chunks + 1 of them) of a payload of `total` values in even parts, larger
/// first.
std::vector<std::int64_t> even_chunks(std::int64_t total, std::int32_t chunks);

}  // namespace partita
