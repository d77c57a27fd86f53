#include "validation/traffic.h"

#include <algorithm>

#include "simulator/cost/cost.h"
#include "simulator/program/expansion.h"

namespace partita::validation {

std::optional<std::vector<Traffic>> predicted_traffic(const Program& p, std::int64_t step,
                                                      bool by_steps) {
  if (std::any_of(p.buffers.begin(), p.buffers.end(), [](const Buffer& b) { return b.routed; }))
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
          if (n.count == 0) continue;
          ++t.sends;
          t.send_bytes += n.count;
        } else if (i.kind == Kind::collective && p.group(i, rank).size() > 1) {
          auto& c = t.collectives[i.collective];
          ++c.calls;
          c.payload_bytes += payload(p, i, rank).count;
        }
      }
    }
  }
  return all;
}

}  // namespace partita::validation
