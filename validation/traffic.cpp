#include "validation/traffic.h"

#include <algorithm>
#include <iterator>

#include "simulator/cost/cost.h"
#include "simulator/program/expansion.h"
#include "simulator/program/routing.h"

namespace partita::validation {
namespace {

constexpr std::int64_t kCount = 8, kKey = 24;  // bytes

/// Rows are exchanged by three calls, of counts, keys and values; a reduce-scatter's members know
/// the rows. The own part counts as payload, as in any all-to-all.
void routed_calls(const Program& p, const Instruction& i, std::int64_t rank, Traffic& t) {
  const BufferId from = i.reads[0], to = i.writes[0];
  const auto features = [&](BufferId id, std::int64_t r) {
    const Buffer& b = p.buffer(id);
    return local_indices(p.mesh, b.layout.dims[3], b.shape[3].extent, p.place_of(r));
  };
  const auto mine = features(from, rank);
  std::int64_t rows = 0, values = 0;
  const auto group = p.group(i, rank);
  for (const std::int64_t member : group) {
    const auto theirs = features(to, member);
    std::vector<std::int64_t> shared;
    std::set_intersection(mine.begin(), mine.end(), theirs.begin(), theirs.end(),
                          std::back_inserter(shared));
    if (shared.empty()) continue;
    const std::int64_t n = common_rows(p, from, rank, to, member);
    rows += n;
    values += n * static_cast<std::int64_t>(shared.size());
  }
  if (i.collective == CollectiveKind::reduce_scatter) {
    auto& c = t.collectives[i.collective];
    ++c.calls;
    c.payload_bytes += 4 * values;
    return;
  }
  auto& c = t.collectives[CollectiveKind::all_to_all];
  c.calls += 3;
  c.payload_bytes += kCount * static_cast<std::int64_t>(group.size()) + kKey * rows + 4 * values;
}

/// Rows that this rank sends to others; how many it gets may differ at the edges.
std::int64_t halo_bytes(const Program& p, const Instruction& i, std::int64_t rank) {
  std::int64_t bytes = 0;
  for (std::size_t k = 0; k < i.reads.size(); ++k) {
    const Buffer& b = p.buffer(i.reads[k]);
    const std::int64_t width = b.element_bytes > 0 ? b.element_bytes : storage(b.type, 1).count;
    for (const std::int64_t member : p.group(i, rank)) {
      if (member != rank)
        bytes += width * common_elements(p, i.reads[k], rank, i.writes[k], member);
    }
  }
  return bytes;
}

}  // namespace

std::optional<std::vector<Traffic>> predicted_traffic(const Program& p, std::int64_t step,
                                                      bool by_steps) {
  if (p.routings.empty() &&
      std::any_of(p.buffers.begin(), p.buffers.end(), [](const Buffer& b) { return b.routed; }))
    return std::nullopt;
  std::vector<Traffic> all(static_cast<std::size_t>(p.ranks()));
  if (by_steps) {
    for (const auto& [pair, bytes] : step_traffic(p, step)) {
      if (bytes > 0)
        all[static_cast<std::size_t>(pair.first)].bytes_to[static_cast<int>(pair.second)] = bytes;
    }
    return all;
  }
  for (std::int64_t rank = 0; rank < p.ranks(); ++rank) {
    Traffic& t = all[static_cast<std::size_t>(rank)];
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(p.stage_of(rank))]) {
      for (const Instruction& i : p.blocks[call.block.index()].instructions) {
        if ((step + 1) % i.every != 0) continue;
        if (i.kind == Kind::send) {
          const Bytes n = local_bytes(p, i.reads[0], rank);
          if (p.buffer(i.reads[0]).routed && p.holds(i.reads[0], rank)) {
            t.sends += 3;  // how many rows, their keys, their values
            t.send_bytes += kCount + routed_rows(p, i.reads[0], rank) * kKey + n.count;
            continue;
          }
          if (n.count == 0) continue;
          ++t.sends;
          t.send_bytes += n.count;
        } else if (i.kind == Kind::collective && p.group(i, rank).size() > 1) {
          if (p.buffer(i.reads[0]).routed && i.collective != CollectiveKind::all_reduce) {
            routed_calls(p, i, rank, t);
            continue;
          }
          auto& c = t.collectives[i.collective];
          ++c.calls;
          c.payload_bytes += i.collective == CollectiveKind::halo_exchange
                                 ? halo_bytes(p, i, rank)
                                 : payload(p, i, rank).count;
        }
      }
    }
  }
  return all;
}

}  // namespace partita::validation
