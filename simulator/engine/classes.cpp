#include "simulator/engine/classes.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>
#include <variant>

#include "base/error.h"
#include "base/hash.h"

namespace partita {
namespace {

/// One kind of group that ranks of a stage belong to.
struct GroupKind {
  AtomMask atoms = 0;
  int tie = -1;
  int peer_stage = -1;  ///< point to point
  bool exchanges = false;
  int peer = 0;  ///< coordinate along `atoms` of a role's partner
  friend auto operator<=>(const GroupKind&, const GroupKind&) = default;
};

std::vector<GroupKind> group_kinds(const Program& p, int stage) {
  std::set<GroupKind> all;
  std::set<BlockId> blocks;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      if (i.kind == Kind::collective) {
        all.insert({i.tie >= 0 ? AtomMask{0} : i.atoms, i.tie, -1,
                    i.collective == CollectiveKind::all_to_all});
      }
      if (i.kind == Kind::send || i.kind == Kind::receive)
        all.insert({i.atoms, -1, i.stage, false, i.peer});
    }
  }
  return {all.begin(), all.end()};
}

std::int64_t partner(const Program& p, const GroupKind& k, std::int64_t rank) {
  Instruction i;
  i.stage = k.peer_stage;
  i.atoms = k.atoms;
  i.peer = k.peer;
  return p.peer_of(i, rank);
}

std::vector<std::int64_t> members(const Program& p, const GroupKind& k, std::int64_t rank) {
  if (k.peer_stage >= 0) return {rank, partner(p, k, rank)};
  if (k.tie >= 0) {
    std::vector<std::int64_t> all;
    for (const int s : p.ties[static_cast<std::size_t>(k.tie)])
      all.push_back(p.rank_on_stage(rank, s));
    std::sort(all.begin(), all.end());
    return all;
  }
  return p.mesh.group(rank, k.atoms);
}

/// What makes ranks of one stage differ in work: uneven cuts, by what they leave a rank; state and
/// operators of one rank of a group, by being that one; causal attention over blocks of the
/// sequence, by coordinate.
struct Unevenness {
  std::vector<std::pair<DimSplit, std::int64_t>> cuts;  ///< split, extent
  std::vector<BufferId> flat;                           ///< one of each layout and shape
  std::set<AtomMask> roots;
  std::vector<const Instruction*> halos;  ///< packed for as many neighbours as want them
  AtomMask coordinates = 0;
};

std::vector<Unevenness> unevenness(const Program& p) {
  std::vector<Unevenness> by_stage(p.stages.size());
  const auto even = [&](const DimSplit& s, std::int64_t extent) {
    const std::int64_t grain = p.mesh.size(s.atoms) * (s.zigzag > 0 ? 2 : 1);
    return s.atoms.empty() || (s.kind != SplitKind::window && extent % grain == 0);
  };
  const auto note = [&](Unevenness& u, const DimSplit& s, std::int64_t extent) {
    if (even(s, extent)) return;
    const std::pair entry{s, extent};
    if (std::find(u.cuts.begin(), u.cuts.end(), entry) == u.cuts.end()) u.cuts.push_back(entry);
  };
  std::vector<char> seen(p.buffers.size(), 0);
  for (std::size_t s = 0; s < p.stages.size(); ++s) {
    Unevenness& u = by_stage[s];
    std::set<BlockId> blocks;
    for (const BlockCall& call : p.stages[s]) blocks.insert(call.block);
    for (const BlockId b : blocks) {
      for (const Instruction& i : p.blocks[b.index()].instructions) {
        const auto buffer = [&](BufferId id) {
          if (seen[id.index()]) return;
          seen[id.index()] = 1;
          const Buffer& buf = p.buffer(id);
          if (buf.routing >= 0) {
            // Rows differ as the routing says.
            const bool known = std::any_of(u.flat.begin(), u.flat.end(), [&](BufferId other) {
              const Buffer& o = p.buffer(other);
              return o.routing == buf.routing && o.layout == buf.layout && o.shape == buf.shape;
            });
            if (!known) u.flat.push_back(id);
            return;
          }
          for (std::size_t d = 0; d < buf.shape.size(); ++d) {
            const bool experts = buf.routed && buf.shape[d].dim == Dim::expert;
            note(u, buf.layout.dims[d], experts ? buf.experts : buf.shape[d].extent);
          }
          if (buf.layout.root != 0) u.roots.insert(buf.layout.root);
          if (buf.layout.flat.empty()) return;
          // What is flattened differs between ranks where its dimensions are cut unevenly: then one
          // rank's remainder says nothing of another's.
          Layout whole = buf.layout;
          whole.flat.clear();
          whole.root = 0;
          bool equal = !buf.routed && local_elements(p.mesh, whole, buf.shape, false, 0, 0) %
                                              p.mesh.size(buf.layout.flat) ==
                                          0;
          for (std::size_t d = 0; d < buf.shape.size(); ++d)
            equal = equal && even(buf.layout.dims[d], buf.shape[d].extent);
          if (equal) return;
          const bool known = std::any_of(u.flat.begin(), u.flat.end(), [&](BufferId other) {
            return p.buffer(other).layout == buf.layout && p.buffer(other).shape == buf.shape;
          });
          if (!known) u.flat.push_back(id);
        };
        for_each_read(i, buffer);
        for_each_write(i, buffer);
        if (i.kind == Kind::collective && i.collective == CollectiveKind::halo_exchange &&
            p.packs_collectives)
          u.halos.push_back(&i);
        // A role serves its partners one after the other.
        if ((i.kind == Kind::send || i.kind == Kind::receive) && i.atoms != 0) {
          AtomMask& all = by_stage[static_cast<std::size_t>(i.stage)].coordinates;
          all = static_cast<AtomMask>(all | i.atoms);
        }
        if (i.kind != Kind::compute || i.op < 0) continue;
        const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
        for (std::size_t d = 0; d < op.cuts.size(); ++d) {
          note(u, op.cuts[d], op.signature.dims[d].extent);
        }
        if (op.root != 0) u.roots.insert(op.root);
        const auto* a = std::get_if<Attention>(&op.operation);
        if (a == nullptr || (!a->causal && a->window == 0)) continue;
        const auto& cut = op.cuts[static_cast<std::size_t>(op.signature.find(Dim::sequence))];
        if (!cut.atoms.empty() && (cut.zigzag == 0 || a->window > 0)) {
          u.coordinates = static_cast<AtomMask>(u.coordinates | mask_of(cut.atoms));
        }
      }
    }
  }
  return by_stage;
}

}  // namespace

RankClasses classify(const Program& p, Communication& communication) {
  const std::int64_t n = p.ranks();
  const Topology& t = communication.topology();
  PARTITA_ASSERT(static_cast<std::size_t>(n) <= t.rank_count(),
                 fmt::format("{} ranks on {} devices", n, t.device_count()));
  std::vector<std::vector<GroupKind>> kinds;
  for (int s = 0; s < p.stage_count(); ++s) kinds.push_back(group_kinds(p, s));
  const auto uneven = unevenness(p);
  const bool stores = p.startup || p.sharded_storage;
  const bool hosts =
      std::any_of(p.buffers.begin(), p.buffers.end(), [](const Buffer& b) { return b.host; });
  std::vector<std::uint64_t> colour(static_cast<std::size_t>(n));
  // A group's signature is shared by its members: computed once, at its lowest rank.
  std::map<GroupKind, std::unordered_map<std::int64_t, std::uint64_t>> signatures;
  for (std::int64_t r = 0; r < n; ++r) {
    const int stage = p.stage_of(r);
    const std::int64_t place = p.place_of(r);
    std::uint64_t h = mix(static_cast<std::uint64_t>(stage),
                          t.profile_index(DeviceId{static_cast<std::size_t>(r)}));
    if (!t.state().device_speed.empty())
      h = mix(h, std::bit_cast<std::uint64_t>(t.speed(DeviceId{static_cast<std::size_t>(r)})));
    if (stores) {
      const std::size_t node = t.node_of(DeviceId{static_cast<std::size_t>(r)});
      h = mix(h, static_cast<std::uint64_t>(t.storage_bandwidth(node).count /
                                            static_cast<double>(t.rank_count(node))));
    }
    if (hosts) {
      const std::size_t node = t.node_of(DeviceId{static_cast<std::size_t>(r)});
      h = mix(h, static_cast<std::uint64_t>(t.host_memory_bandwidth(node).count /
                                            static_cast<double>(t.rank_count(node))));
      for (const bool up : {false, true}) {
        const auto [bandwidth, latency] = t.host_way(DeviceId{static_cast<std::size_t>(r)}, up);
        h = mix(h, std::bit_cast<std::uint64_t>(bandwidth.count));
        h = mix(h, std::bit_cast<std::uint64_t>(latency.count));
      }
    }
    if (p.launches.any())
      h = mix(h, std::bit_cast<std::uint64_t>(
                     t.launch_time(t.node_of(DeviceId{static_cast<std::size_t>(r)}))));
    const Unevenness& u = uneven[static_cast<std::size_t>(stage)];
    for (const auto& [split, extent] : u.cuts) {
      h = mix(h, static_cast<std::uint64_t>(local_extent(p.mesh, split, extent, place)));
    }
    for (const BufferId id : u.flat)
      h = mix(h, static_cast<std::uint64_t>(local_elements(p, id, r)));
    for (const Instruction* i : u.halos)
      h = mix(h, static_cast<std::uint64_t>(transient_bytes(p, *i, r).count));
    for (const AtomMask root : u.roots) h = mix(h, p.mesh.group_root(place, root) == place ? 1 : 2);
    for (std::size_t a = 0; a < p.mesh.atoms.size(); ++a) {
      const auto atom = static_cast<AtomId>(a);
      if (has(u.coordinates, atom)) {
        h = mix(h, static_cast<std::uint64_t>(p.mesh.coordinate(place, atom)) + 1);
      }
    }
    for (const GroupKind& k : kinds[static_cast<std::size_t>(stage)]) {
      if (k.peer_stage >= 0) {
        h = mix(h, communication.price_class(members(p, k, r), k.exchanges));
        continue;
      }
      const std::int64_t root =
          k.tie >= 0 ? p.mesh.group_root(r, mask_of(p.pipeline)) : p.mesh.group_root(r, k.atoms);
      const auto [it, fresh] = signatures[k].emplace(root, 0);
      if (fresh) it->second = communication.price_class(members(p, k, r), k.exchanges);
      h = mix(h, it->second);
    }
    colour[static_cast<std::size_t>(r)] = h;
  }
  const auto dense = [&](std::vector<int>& of_rank) {
    std::unordered_map<std::uint64_t, int> number;
    of_rank.resize(colour.size());
    for (std::size_t r = 0; r < colour.size(); ++r) {
      of_rank[r] = number.emplace(colour[r], static_cast<int>(number.size())).first->second;
    }
    return number.size();
  };
  RankClasses result;
  std::size_t count = dense(result.of_rank);
  for (;;) {
    std::vector<std::uint64_t> next(colour.size());
    std::map<GroupKind, std::unordered_map<std::int64_t, std::uint64_t>> sums;
    for (std::int64_t r = 0; r < n; ++r) {
      const int stage = p.stage_of(r);
      std::uint64_t h = colour[static_cast<std::size_t>(r)];
      for (const GroupKind& k : kinds[static_cast<std::size_t>(stage)]) {
        if (k.peer_stage >= 0) {
          h = mix(h, colour[static_cast<std::size_t>(partner(p, k, r))]);
          continue;
        }
        const std::int64_t root =
            k.tie >= 0 ? p.mesh.group_root(r, mask_of(p.pipeline)) : p.mesh.group_root(r, k.atoms);
        const auto [it, fresh] = sums[k].emplace(root, 0);
        if (fresh) {
          for (const std::int64_t m : members(p, k, r))
            it->second += mix(1, colour[static_cast<std::size_t>(m)]);
        }
        h = mix(h, it->second);
      }
      next[static_cast<std::size_t>(r)] = h;
    }
    colour = std::move(next);
    const std::size_t finer = dense(result.of_rank);
    if (finer == count) break;
    count = finer;
  }
  result.classes.resize(count);
  for (std::int64_t r = n; r-- > 0;) {
    RankClass& c =
        result.classes[static_cast<std::size_t>(result.of_rank[static_cast<std::size_t>(r)])];
    c.stage = p.stage_of(r);
    c.representative = r;
    ++c.count;
  }
  return result;
}

}  // namespace partita
