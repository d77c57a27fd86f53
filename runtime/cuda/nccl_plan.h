// runtime/cuda/nccl_plan.h: a collective as NCCL's calls; plain arithmetic, tested without NCCL.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "runtime/transport/transport.h"

namespace partita::cuda {

/// One call of NCCL. Addresses are given as offsets, in elements, into the call's `data`, or of
/// `from` into `send` where `from_send`.
struct NcclStep {
  enum class Kind { all_reduce, all_gather, reduce_scatter, broadcast, reduce, send, receive };
  Kind kind = Kind::all_reduce;
  std::int64_t from = 0, to = 0, count = 0;  ///< of the own part
  int peer = 0;                              ///< root, or whom to send to or receive from
  bool from_send = false;
  friend bool operator==(const NcclStep&, const NcclStep&) = default;
};

/// What member `call.me` calls, as one group of NCCL's. NCCL's own all-gather and reduce-scatter
/// have chunks of one size; of others each is a broadcast or a reduction by itself.
std::vector<NcclStep> nccl_steps(const CollectiveCall& call);

/// Of which NCCL is asked for its estimates: its own choice (empty names), then each pair.
std::vector<std::pair<std::string, std::string>> estimated_pairs();
inline constexpr CollectiveKind kEstimated[] = {
    CollectiveKind::all_reduce, CollectiveKind::all_gather, CollectiveKind::reduce_scatter,
    CollectiveKind::broadcast, CollectiveKind::reduce};
/// Does NCCL have the algorithm for this collective?
bool estimated(CollectiveKind kind, const std::string& algorithm);

}  // namespace partita::cuda
