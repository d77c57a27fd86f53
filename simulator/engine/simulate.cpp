#include "simulator/engine/simulate.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <deque>
#include <numeric>
#include <queue>
#include <set>
#include <tuple>
#include <unordered_map>

#include "base/hash.h"
#include "simulator/cost/measured.h"
#include "simulator/engine/step_graph.h"

namespace partita {
namespace {

constexpr std::int64_t kLastTick = 9'200'000'000'000'000'000;

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

/// What of an adjustment stretches a time.
enum class Stretch : std::uint8_t { nothing, products, memory, optimizer, inside, between };
constexpr std::size_t kStretches = 6;

/// What a step takes as the profiles have it: stretched, `time` and `then` one after the other at
/// the device's `speed`, and `beside`.
struct Price {
  Stretch of_time = Stretch::nothing, of_then = Stretch::nothing;
  Seconds time{0}, then{0};
  double speed = 1;
  std::int64_t beside = 0;  ///< ticks
  std::int64_t every = 1;   ///< its share of each step, of what runs in one of so many
  Seconds launch{0};        ///< of the host's time
};

/// An instruction as the engine needs it: few numbers, no vectors.
struct Step {
  Kind kind = Kind::compute;
  Stream stream = 0;
  bool after_compute = false;
  bool meets = false;       ///< members of several classes
  bool host_waits = false;  ///< for the compute stream, before it launches this
  std::int32_t instruction = 0;
  std::int64_t ticks = 0;
  std::int64_t launch = 0;                 ///< of the host's time
  std::int32_t first_wait = 0, waits = 0;  ///< into Compiled::slots: buffers made on other streams
  std::int32_t first_mark = 0, marks = 0;  ///< slots this makes
  std::int32_t label = 0;                  ///< for the breakdown
  std::int32_t message = -1;
  bool of_step = false;  ///< the message goes once a step, not once a micro-batch
  std::int32_t peer_class = -1;
  std::int64_t beside = 0;   ///< from a send's start until its receiver may take the message
  double share_of_core = 1;  ///< of `ticks`, where ranks share cores
};

struct Mark {
  std::int32_t slot = 0;  ///< encoded: negative for step-scoped buffers
  std::int32_t micro_batch = 0;
  std::int64_t ready = 0;
};

/// What a block call does when started with the compute stream at time 0 and everything else as its
/// key says.
struct Replay {
  std::vector<std::int64_t> free;  ///< of the block's streams, at its end
  std::int64_t host = 0;  ///< at its end; where it is ahead, how much later than at the start
  std::vector<std::int32_t> stream_labels;
  std::vector<std::pair<std::int32_t, std::int64_t>> spent;  ///< label, ticks
  struct Made {
    std::int32_t slot;
    std::int64_t ready, begin;
    std::int32_t label, before;
  };
  std::vector<Made> marks;
  std::vector<std::tuple<std::int32_t, std::int32_t, bool, std::int64_t>>
      messages;  ///< id, to class, once a step?, start
};

struct Compiled {
  std::vector<Step> steps;
  std::vector<Price> prices;  ///< of steps
  std::vector<std::int32_t> slots;
  std::int64_t host_net = 0, host_rise = 0;
  std::int64_t net = 0, rise = 0;  ///< memory: change over the block, highest point above its start
  std::int64_t net_saved = 0;      ///< of `net`: activations
  // Blocks repeat once per micro-batch, mostly from the same relative state: then so does what they
  // do.
  bool repeats = false;  ///< every step is ordered after the compute stream's position at the start
  std::size_t receives = 0;            ///< leading steps, played each time
  std::int64_t launch = 0;             ///< of all steps after the receives
  bool host_waits = false;             ///< in one of them
  std::vector<Stream> streams;         ///< used after the receives, compute first
  std::vector<std::int32_t> arrives;   ///< slots that the receives make
  std::vector<std::int32_t> external;  ///< other slots read before the block makes them, sorted
  std::map<std::vector<std::int64_t>, Replay> replays;
};

struct Meeting {
  std::size_t arrived = 0;
  std::int64_t start = 0;
};

}  // namespace

Ticks Breakdown::total() const {
  Ticks t = bubble + optimizer + other;
  for (const auto& [name, part] : compute) t += part;
  for (const auto& [name, part] : exposed) t += part;
  return t;
}

RankClasses classify(const Program& p, Communication& communication) {
  const std::int64_t n = p.ranks();
  const Topology& t = communication.topology();
  PARTITA_ASSERT(static_cast<std::size_t>(n) <= t.device_count(),
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
                                            static_cast<double>(t.device_count(node))));
    }
    if (hosts) {
      const std::size_t node = t.node_of(DeviceId{static_cast<std::size_t>(r)});
      h = mix(h, static_cast<std::uint64_t>(t.host_memory_bandwidth(node).count /
                                            static_cast<double>(t.device_count(node))));
    }
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

namespace {

class Engine {
 public:
  Engine(const Program& p, Communication& communication, const SimulateOptions& options)
      : p_(p), communication_(communication), options_(options) {}

  /// All that prices do not decide; what steps take as profiles have it.
  void prepare() {
    const Topology& t = communication_.topology();
    std::int64_t at_work = 0;
    for (std::int64_t r = 0; r < p_.ranks(); ++r)
      at_work += t.node_of(DeviceId{static_cast<std::size_t>(r)}) == 0 ? 1 : 0;
    communication_.set_at_work(at_work);
    // Whose turn it is depends on every rank of a host.
    if (options_.unfolded || share_cores()) {
      for (std::int64_t r = 0; r < p_.ranks(); ++r) {
        classes_.classes.push_back({p_.stage_of(r), r, 1});
        classes_.of_rank.push_back(static_cast<int>(r));
      }
    } else if (options_.network == Network::idle) {
      classes_ = classify(p_, communication_);
    }
    if (options_.network == Network::flows) {
      links_ = share_links(p_, communication_, options_.unfolded);
      classes_ = links_.ranks;
    }
    assign_slots();
    const std::size_t n = classes_.classes.size();
    timeline_.classes = classes_.classes;
    timeline_.breakdown.resize(n);
    timeline_.memory.resize(n);
    timeline_.flops.resize(n);
    compiled_.resize(n);
    must_mark_.resize(n);
    for (std::size_t c = 0; c < n; ++c) compile(static_cast<int>(c));
    for (std::size_t c = 0; c < n; ++c) memory(static_cast<int>(c));
  }

  /// Once, of a prepared engine or a copy of one.
  Timeline play(const Adjustment& adjustment) {
    for (const MemoryUse& use : timeline_.memory) {
      if (use.peak > options_.memory_limit) return std::move(timeline_);
    }
    stretch(adjustment);
    const std::size_t n = classes_.classes.size();
    spent_.assign(n, std::vector<std::int64_t>(1024, 0));
    state_.resize(n);
    for (std::size_t c = 0; c < n; ++c) {
      state_[c].free.assign(p_.streams.size(), 0);
      state_[c].label.assign(p_.streams.size(), -1);
      state_[c].slots.assign(slots_on_stage_[static_cast<std::size_t>(classes_.classes[c].stage)] *
                                 static_cast<std::size_t>(p_.micro_batches + 1),
                             Slot{});
    }
    if (options_.network == Network::flows && all_beside()) contend();
    if (share_cores()) {
      take_turns();
    } else {
      for (bool moved = true; moved;) {
        moved = false;
        for (std::size_t c = 0; c < n; ++c) moved |= advance(static_cast<int>(c));
      }
    }
    std::int64_t end = 0;
    for (std::size_t c = 0; c < n; ++c) {
      const State& s = state_[c];
      const auto& calls = p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)];
      PARTITA_ASSERT(s.call == calls.size(),
                     fmt::format("rank {} waits forever", classes_.classes[c].representative));
      for (const std::int64_t f : s.free) {
        if (f > end) end = f, timeline_.last_class = static_cast<int>(c);
      }
    }
    const std::int64_t beside = to_ticks(adjustment.step).count + to_ticks(p_.launches.step).count;
    timeline_.step = Ticks{end + beside};
    for (std::size_t c = 0; c < n; ++c) {
      finish_breakdown(static_cast<int>(c), end);
      timeline_.breakdown[c].other += Ticks{beside};
    }
    return std::move(timeline_);
  }

 private:
  struct Slot {
    std::int64_t ready = 0;
    std::int32_t label = -1;   ///< who made it: what a waiter's gap is charged to
    std::int32_t before = -1;  ///< what the maker itself waited for, until `begin`
    std::int64_t begin = 0;
  };
  struct State {
    std::size_t call = 0, step = 0;
    std::size_t instance = 0;         ///< instructions played so far
    std::vector<std::int64_t> free;   ///< per stream
    std::int64_t host = 0;            ///< when it has launched what was played so far
    std::vector<std::int32_t> label;  ///< per stream: what ran last
    std::vector<Slot> slots;
    std::vector<Mark> late;  ///< made by earlier calls, ready after the compute stream's position
  };

  std::int32_t label(const std::string& name) {
    const auto [it, fresh] = labels_.emplace(name, static_cast<std::int32_t>(label_names_.size()));
    if (fresh) label_names_.push_back(name);
    PARTITA_ASSERT(label_names_.size() < 1024, "too many labels");
    return it->second;
  }

  /// Buffers through which two streams meet get a slot for the time they are ready.
  void assign_slots() {
    std::vector<std::uint64_t> writers(p_.buffers.size() * 4, 0), users(p_.buffers.size() * 4, 0);
    const auto set = [](std::vector<std::uint64_t>& v, BufferId b, Stream s) {
      v[b.index() * 4 + s / 64u] |= 1ull << (s % 64u);
    };
    std::vector<int> stage_of(p_.buffers.size(), 0);
    for (const Block& b : p_.blocks) {
      for (const Instruction& i : b.instructions) {
        if (i.kind == Kind::allocate || i.kind == Kind::free) continue;
        for_each_write(i, [&](BufferId id) {
          set(writers, id, i.stream), set(users, id, i.stream);
          stage_of[id.index()] = b.stage;
        });
        for_each_read(i, [&](BufferId id) { set(users, id, i.stream); });
      }
    }
    slots_on_stage_.assign(p_.stages.size(), 0);
    slot_of_.assign(p_.buffers.size(), -1);
    for (std::size_t b = 0; b < p_.buffers.size(); ++b) {
      int streams = 0;
      bool written = false;
      for (std::size_t k = 0; k < 4; ++k) {
        streams += __builtin_popcountll(users[b * 4 + k]);
        written |= writers[b * 4 + k] != 0;
      }
      if (written && streams > 1) {
        slot_of_[b] =
            static_cast<std::int32_t>(slots_on_stage_[static_cast<std::size_t>(stage_of[b])]++);
      }
    }
  }

  std::string axis(const Instruction& i) const {
    std::string s;
    if (i.tie >= 0) return "tied";
    for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
      if (!has(i.atoms, static_cast<AtomId>(a))) continue;
      std::string atom = p_.mesh.atoms[a].name;
      // Ranks of an axis that also hold different experts exchange tokens along it.
      if (i.collective == CollectiveKind::all_to_all && atom.size() > 3 &&
          atom.compare(atom.size() - 3, 3, "_ep") == 0) {
        atom = "ep";
      }
      const std::string axis_name = atom.substr(0, atom.find('_'));
      if (s.find(axis_name) == std::string::npos) s += (s.empty() ? "" : "+") + axis_name;
    }
    return s;
  }

  /// "server 3" is a server.
  static std::string word(const std::string& name) { return name.substr(0, name.find(' ')); }

  /// Ranks of this one's host, itself included.
  std::int64_t ranks_beside(std::int64_t rank) const {
    const Topology& t = communication_.topology();
    const auto here = t.node_of(DeviceId{static_cast<std::size_t>(rank)});
    std::int64_t ranks = 0;
    for (std::int64_t r = 0; r < p_.ranks(); ++r)
      ranks += t.node_of(DeviceId{static_cast<std::size_t>(r)}) == here ? 1 : 0;
    return ranks;
  }
  const DeviceProfile& device_of(std::int64_t rank) const {
    return communication_.topology().device(DeviceId{static_cast<std::size_t>(rank)});
  }
  /// Communication that was measured with more ranks at work than cores took as much longer as they
  /// shared these: of that time a rank's work is only its share.
  double share_of_core(const std::string& kind, std::size_t ranks, std::int64_t rank,
                       int one_of) const {
    const int cores = device_of(rank).host_cores;
    if (cores == 0) return 1;
    const int working = communication_.measured_at_work(kind, static_cast<int>(ranks));
    return working == 0 ? 1 : std::min(1.0, static_cast<double>(cores * one_of) / working);
  }
  /// Has a host more ranks than cores?
  bool share_cores() const {
    std::map<std::size_t, std::int64_t> ranks;
    bool crowded = false;
    for (std::int64_t r = 0; r < p_.ranks(); ++r) {
      const DeviceProfile& d = device_of(r);
      if (d.concurrent_streams) return false;
      const auto node = communication_.topology().node_of(DeviceId{static_cast<std::size_t>(r)});
      crowded |= ++ranks[node] > d.host_cores && d.host_cores > 0;
    }
    return crowded;
  }

  /// What stretches a transfer among these ranks.
  Stretch stretch_of(const std::vector<std::int64_t>& ranks) const {
    const Topology& t = communication_.topology();
    const auto domain = [&](std::int64_t r) {
      return t.domain_of(t.node_of(DeviceId{static_cast<std::size_t>(r)}));
    };
    for (const std::int64_t r : ranks) {
      if (domain(r) != domain(ranks[0])) return Stretch::between;
    }
    return Stretch::inside;
  }

  /// A kernel's time, measured where the device has been measured, and the host's time to start it.
  void price(const Instruction& i, std::int64_t rank, const DeviceProfile& device,
             Price& out) const {
    out.speed = communication_.topology().speed(DeviceId{static_cast<std::size_t>(rank)});
    if (from_storage(p_, i) && device.kernels.empty()) {
      out.time = communication_.storage_time(p_, i, rank);
      return;
    }
    if (!device.kernels.empty()) {
      const KernelShape shape = shape_of(p_, i, rank);
      if (shape.kernel.empty()) return;
      // Ranks of one host share its memory, and those of one core its caches.
      if (const auto t =
              measured_time(device.kernels, shape, static_cast<int>(ranks_beside(rank)))) {
        out.time = *t + device.dispatch;
        return;
      }
      if (from_storage(p_, i)) {
        out.time = communication_.storage_time(p_, i, rank);
        return;
      }
    }
    // A processor that is its own host copies in its own memory.
    if (on_host(p_, i) && device.compute_capability > 0) {
      out.time = communication_.host_time(p_, i, rank);
      return;
    }
    const Work w = work_of(p_, i, rank);
    out.of_time = w.matrix                                                   ? Stretch::products
                  : i.kind == Kind::compute && i.kernel == Kernel::optimizer ? Stretch::optimizer
                                                                             : Stretch::memory;
    out.time = kernel_time(w, device, communication_.shapes(rank));
    out.then = device.dispatch;
  }

  /// What steps take and the host needs to launch them, as `a` says.
  void stretch(const Adjustment& a) {
    // Who meets waits for the slowest, relative to the mean.
    const double slowest = a.spread > 0 ? 1 + a.spread * expected_maximum(p_.ranks()) : 1;
    std::array<double, kStretches> by{};
    const auto set = [&](Stretch s, double x) { by[static_cast<std::size_t>(s)] = x; };
    set(Stretch::nothing, 1);
    set(Stretch::products, a.product_time * slowest);
    set(Stretch::memory, a.memory_time * slowest);
    set(Stretch::optimizer, a.optimizer_time * slowest);
    set(Stretch::inside, a.inside_time);
    set(Stretch::between, a.between_time);
    for (auto& blocks : compiled_) {
      for (Compiled& block : blocks) {
        for (std::size_t k = 0; k < block.steps.size(); ++k) {
          const Price& x = block.prices[k];
          Step& s = block.steps[k];
          const Seconds taken = by[static_cast<std::size_t>(x.of_time)] * x.time +
                                by[static_cast<std::size_t>(x.of_then)] * x.then;
          s.ticks = ceil_div(to_ticks(Seconds{taken.count / x.speed}).count + x.beside, x.every);
          s.launch = ceil_div(to_ticks(a.launch_time * x.launch).count, x.every);
          if (k >= block.receives) block.launch += s.launch;
        }
      }
    }
  }

  /// What one rank sends of a message whose copies it shares with others; all of a message that the
  /// ranks cut or that goes alone.
  Bytes message_part(BufferId buffer, Bytes all) const {
    const Layout& layout = p_.buffer(buffer).layout;
    if (p_.scattered_messages == 0 || (split_atoms(layout) & p_.scattered_messages) != 0 ||
        layout.partial != 0)
      return all;
    return ceil_div(all, p_.mesh.size(p_.scattered_messages));
  }

  /// What the host does before the device may begin a step. `captured`: an earlier one has started
  /// the block's graph.
  void launch(Step& s, Price& price, const Instruction& i, std::int64_t rank,
              const DeviceProfile& device, bool& captured) const {
    const Launches& l = p_.launches;
    if (!l.any() || !device.concurrent_streams) return;
    s.host_waits = l.waits_for_counts && brings_rows(p_, i);
    if (s.host_waits) captured = false;
    Seconds time{0};
    switch (i.kind) {
      case Kind::compute:
        time = work_of(p_, i, rank).kernels * l.kernel;
        break;
      case Kind::slice:
      case Kind::copy:
        time = l.kernel;
        break;
      case Kind::collective:
        if (p_.group(i, rank).size() > 1) time = l.transfer;
        break;
      case Kind::send:
      case Kind::receive:
        time = l.transfer;
        break;
      case Kind::load:
      case Kind::allocate:
      case Kind::free:
        break;
    }
    if (l.graphs && time.count > 0) time = captured ? Seconds{0} : l.kernel;
    captured = captured || time.count > 0;
    price.launch = time;
  }

  void compile(int c) {
    const RankClass& rc = classes_.classes[static_cast<std::size_t>(c)];
    const std::int64_t rank = rc.representative;
    const DeviceProfile& device =
        communication_.topology().device(DeviceId{static_cast<std::size_t>(rank)});
    auto& mine = compiled_[static_cast<std::size_t>(c)];
    mine.resize(p_.blocks.size());
    std::vector<char> needed(p_.blocks.size(), 0);
    std::vector<std::int64_t> calls(p_.blocks.size(), 0);
    for (const BlockCall& call : p_.stages[static_cast<std::size_t>(rc.stage)])
      needed[call.block.index()] = 1, ++calls[call.block.index()];
    Flops total{0};
    std::map<std::pair<AtomMask, int>, std::vector<std::int64_t>> groups;
    std::unordered_map<std::uint64_t, std::int64_t> prices;
    for (std::size_t b = 0; b < p_.blocks.size(); ++b) {
      if (!needed[b]) continue;
      Compiled& out = mine[b];
      std::int64_t level = 0;
      bool captured = false;
      for (std::size_t k = 0; k < p_.blocks[b].instructions.size(); ++k) {
        const Instruction& i = p_.blocks[b].instructions[k];
        if (i.kind == Kind::allocate || i.kind == Kind::free) {
          for (const BufferId id : i.kind == Kind::allocate ? i.writes : i.reads) {
            const int sign = i.kind == Kind::allocate ? 1 : -1;
            const std::int64_t bytes = sign * device_bytes(p_, id, rank).count;
            level += bytes;
            if (p_.buffer(id).category == Category::activations) out.net_saved += bytes;
            out.host_net += sign * host_bytes(p_, id, rank).count;
          }
          out.rise = std::max(out.rise, level);
          out.host_rise = std::max(out.host_rise, out.host_net);
          continue;
        }
        // Where one rank of a group has the buffer, only that one sends or receives it.
        if ((i.kind == Kind::send && !p_.holds(i.reads[0], rank)) ||
            (i.kind == Kind::receive && !p_.holds(i.writes[0], rank)))
          continue;
        Step s;
        Price priced;
        s.kind = i.kind;
        priced.every = i.every;
        // Without streams beside each other everything follows in program order.
        s.stream = device.concurrent_streams ? i.stream : kComputeStream;
        s.after_compute = i.after_compute;
        s.instruction = static_cast<std::int32_t>(k);
        out.rise = std::max(out.rise, level + transient_bytes(p_, i, rank).count);
        switch (i.kind) {
          case Kind::compute:
          case Kind::slice:
          case Kind::copy:
          case Kind::load: {
            price(i, rank, device, priced);
            if (i.kind == Kind::compute && i.kernel == Kernel::optimizer) {
              s.label = label("optimizer");
            } else if (i.kind == Kind::copy) {
              s.label = label("exposed:host");
            } else if (i.kind != Kind::compute || i.op < 0) {
              s.label = label("other");
            } else {
              s.label = label(
                  "compute:" +
                  std::string(kind_name(p_.operators[static_cast<std::size_t>(i.op)].operation)));
            }
            total += Flops{mathematical_flops(p_, i, rank).count * static_cast<double>(calls[b])};
            break;
          }
          case Kind::collective: {
            auto& group = groups[{i.tie >= 0 ? AtomMask{0} : i.atoms, i.tie}];
            if (group.empty()) group = p_.group(i, rank);
            // The largest member's payload decides: uneven parts are padded.
            Bytes bytes{0}, keys{0};
            std::set<int> seen;
            for (const std::int64_t m : group) {
              if (seen.insert(classes_.of_rank[static_cast<std::size_t>(m)]).second) {
                bytes = std::max(bytes, payload(p_, i, m));
                keys = std::max(keys, key_bytes(p_, i, m));
              }
            }
            bytes = communication_.travelling(p_, i, bytes, group);
            s.meets = seen.size() > 1;
            priced.time = communication_.collective(i.collective, bytes, group);
            priced.of_time = stretch_of(group);
            priced.beside = group.size() > 1 ? to_ticks(device.dispatch).count : 0;
            if (keys.count > 0) {
              // Counts of 8 bytes for each member and keys go ahead of the values.
              const Bytes counts{8 * static_cast<std::int64_t>(group.size())};
              for (const Bytes ahead : {counts, keys})
                priced.beside +=
                    to_ticks(communication_.collective(CollectiveKind::all_to_all, ahead, group))
                        .count;
            }
            s.label = label("exposed:" + axis(i));
            s.share_of_core = share_of_core(std::string(name(i.collective)), group.size(), rank, 1);
            break;
          }
          case Kind::send:
          case Kind::receive: {
            const std::int64_t peer = p_.peer_of(i, rank);
            s.message = i.index;
            s.of_step = p_.instance_of(i, 0) < 0;
            s.peer_class = classes_.of_rank[static_cast<std::size_t>(peer)];
            const bool sends = i.kind == Kind::send;
            const BufferId buffer = sends ? i.reads[0] : i.writes[0];
            const Bytes all = local_bytes(p_, buffer, rank), sent = message_part(buffer, all);
            const Seconds whole =
                communication_.point_to_point(sent, sends ? rank : peer, sends ? peer : rank);
            priced.time = whole;
            priced.of_time = stretch_of({rank, peer});
            if (sent != all && !sends) {
              const auto holders = p_.mesh.group(rank, p_.scattered_messages);
              priced.then = communication_.collective(CollectiveKind::all_gather, all, holders);
              priced.of_then = stretch_of(holders);
            }
            // On one stream each side is held for its part; without a figure for that, for what
            // does not hide behind work.
            if (!device.concurrent_streams) {
              const Seconds part = (1 - device.overlap) * whole;
              const Bytes bytes = local_bytes(p_, buffer, rank);
              const auto sender = communication_.held(bytes, true),
                         receiver = communication_.held(bytes, false);
              const bool known = sender && receiver;
              const Seconds taking = known ? *receiver : part;
              const Seconds held = !known ? part : sends ? *sender : *receiver;
              priced = Price{};
              priced.time = held;
              priced.every = i.every;
              s.beside = std::max<std::int64_t>(known ? to_ticks(held).count : 0,
                                                to_ticks(whole - taking).count);
              // Of two that exchange messages one is at work at a time.
              if (!known) s.share_of_core = share_of_core("send", 2, rank, 2);
            }
            // Waiting for a role is waiting for its service, not for a neighbour of the pipeline.
            const int role = std::max(i.stage, rc.stage) - p_.pipeline_stages();
            s.label = role < 0
                          ? label("bubble")
                          : label("exposed:" + word(p_.roles[static_cast<std::size_t>(role)].name));
            break;
          }
          case Kind::allocate:
          case Kind::free:
            break;
        }
        launch(s, priced, i, rank, device, captured);
        s.first_wait = static_cast<std::int32_t>(out.slots.size());
        const auto slot = [&](BufferId id) {
          const std::int32_t x = slot_of_[id.index()];
          if (x < 0) return;
          // Step-scoped buffers have one instance, others one per micro-batch: encoded in the sign.
          out.slots.push_back(p_.buffer(id).scope == Scope::step ? -1 - x : x);
        };
        for_each_read(i, slot);
        for_each_write(i, slot);  // never before what was there
        s.waits = static_cast<std::int32_t>(out.slots.size()) - s.first_wait;
        s.first_mark = static_cast<std::int32_t>(out.slots.size());
        for_each_write(i, slot);
        s.marks = static_cast<std::int32_t>(out.slots.size()) - s.first_mark;
        out.steps.push_back(s);
        out.prices.push_back(priced);
      }
      out.net = level;
      find_repetition(out);
    }
    timeline_.flops[static_cast<std::size_t>(c)] = total;
    // What other streams read without passing the compute stream must be marked in every replay.
    std::set<std::int32_t> must;
    for (const Compiled& block : mine) {
      std::set<std::int32_t> made;
      for (const Step& step : block.steps) {
        for (std::int32_t w = 0; w < step.waits; ++w) {
          const std::int32_t x = block.slots[static_cast<std::size_t>(step.first_wait + w)];
          if (step.stream != kComputeStream && made.count(x) == 0) must.insert(x);
        }
        for (std::int32_t m = 0; m < step.marks; ++m) {
          made.insert(block.slots[static_cast<std::size_t>(step.first_mark + m)]);
        }
      }
    }
    must_mark_[static_cast<std::size_t>(c)].assign(must.begin(), must.end());
  }

  /// A block repeats itself if nothing in it can start before the compute stream's position at its
  /// start: then only what is later than that position matters, and that is its key.
  void find_repetition(Compiled& block) const {
    std::size_t k = 0;
    std::set<std::int32_t> made;
    for (; k < block.steps.size() && block.steps[k].kind == Kind::receive; ++k) {
      const Step& step = block.steps[k];
      for (std::int32_t m = 0; m < step.marks; ++m) {
        block.arrives.push_back(block.slots[static_cast<std::size_t>(step.first_mark + m)]);
      }
    }
    block.receives = k;
    block.repeats = k < block.steps.size();
    std::set<Stream> ordered{kComputeStream}, used{kComputeStream};
    std::set<std::int32_t> external;
    for (; k < block.steps.size(); ++k) {
      const Step& step = block.steps[k];
      if (step.meets || step.kind == Kind::receive) block.repeats = false;
      bool after = step.after_compute || ordered.count(step.stream) > 0;
      for (std::int32_t w = 0; w < step.waits; ++w) {
        const std::int32_t x = block.slots[static_cast<std::size_t>(step.first_wait + w)];
        if (made.count(x) > 0) {
          after = true;
        } else if (std::find(block.arrives.begin(), block.arrives.end(), x) ==
                   block.arrives.end()) {
          external.insert(x);
        }
      }
      if (!after) block.repeats = false;
      ordered.insert(step.stream);
      used.insert(step.stream);
      for (std::int32_t m = 0; m < step.marks; ++m) {
        made.insert(block.slots[static_cast<std::size_t>(step.first_mark + m)]);
      }
    }
    for (std::size_t x = block.receives; x < block.steps.size(); ++x) {
      block.host_waits = block.host_waits || block.steps[x].host_waits;
    }
    block.streams.assign(used.begin(), used.end());
    block.external.assign(external.begin(), external.end());
  }

  std::size_t slot_index(const State& s, std::int32_t encoded, std::int32_t micro_batch) const {
    const std::size_t row = encoded < 0 ? 0 : static_cast<std::size_t>(micro_batch + 1);
    const auto x = static_cast<std::size_t>(encoded < 0 ? -1 - encoded : encoded);
    return row * (s.slots.size() / static_cast<std::size_t>(p_.micro_batches + 1)) + x;
  }
  Slot& slot(State& s, std::int32_t encoded, std::int32_t micro_batch) {
    return s.slots[slot_index(s, encoded, micro_batch)];
  }

  bool advance(int c) {
    State& s = state_[static_cast<std::size_t>(c)];
    const RankClass& rc = classes_.classes[static_cast<std::size_t>(c)];
    const auto& calls = p_.stages[static_cast<std::size_t>(rc.stage)];
    bool moved = false;
    while (s.call < calls.size()) {
      const BlockCall call = calls[s.call];
      Compiled& block = compiled_[static_cast<std::size_t>(c)][call.block.index()];
      while (s.step < block.steps.size()) {
        if (s.step == block.receives && block.repeats && !options_.record && options_.replay &&
            ticks_.empty()) {
          play(c, s, block, call);
          moved = true;
          break;
        }
        if (!run_step(c, s, block, block.steps[s.step], call, nullptr)) return moved;
        ++s.step;
        moved = true;
      }
      s.step = 0;
      ++s.call;
    }
    return moved;
  }

  /// The rest of a block call: from an earlier call that began alike, or step by step.
  void play(int c, State& s, Compiled& block, const BlockCall& call) {
    const std::int64_t now = s.free[kComputeStream];
    s.late.erase(
        std::remove_if(s.late.begin(), s.late.end(), [&](const Mark& m) { return m.ready <= now; }),
        s.late.end());
    bool plain = true;  // nothing late that this call reads, but what its receives brought
    for (const Mark& m : s.late) {
      if (m.slot >= 0 && m.micro_batch != call.micro_batch) continue;
      plain &= !std::binary_search(block.external.begin(), block.external.end(), m.slot);
    }
    const auto run_all = [&](std::vector<Replay::Made>* marks) {
      for (; s.step < block.steps.size(); ++s.step) {
        const bool done = run_step(c, s, block, block.steps[s.step], call, marks);
        PARTITA_ASSERT(done, "a step of a repeating block waited");
      }
    };
    if (!plain) {
      run_all(nullptr);
      return;
    }
    std::vector<std::int64_t> key;
    for (const Stream x : block.streams) key.push_back(std::max<std::int64_t>(0, s.free[x] - now));
    for (const std::int32_t x : block.arrives) {
      key.push_back(std::max<std::int64_t>(0, slot(s, x, call.micro_batch).ready - now));
    }
    // A host that is further ahead than the whole block takes to launch is in nobody's way.
    const bool ahead = s.host - now <= -block.launch;
    key.push_back(std::max(s.host - now, -block.launch));
    const std::int64_t host_from = ahead && !block.host_waits ? s.host : now;
    auto& spent = spent_[static_cast<std::size_t>(c)];
    const auto known = block.replays.find(key);
    if (known != block.replays.end()) {
      const Replay& r = known->second;
      s.host = host_from + r.host;
      for (std::size_t k = 0; k < block.streams.size(); ++k) {
        s.free[block.streams[k]] = now + r.free[k];
        s.label[block.streams[k]] = r.stream_labels[k];
      }
      for (const auto& [x, ticks] : r.spent) spent[static_cast<std::size_t>(x)] += ticks;
      for (const auto& m : r.marks) {
        slot(s, m.slot, call.micro_batch) = {now + m.ready, m.label, m.before, now + m.begin};
        if (m.ready > r.free[0]) s.late.push_back({m.slot, call.micro_batch, now + m.ready});
      }
      for (const auto& [id, to, of_step, start] : r.messages) {
        messages_[message_key(id, of_step ? -1 : call.micro_batch, c, to)] = now + start;
      }
      timeline_.instructions += static_cast<std::int64_t>(block.steps.size() - block.receives);
      return;
    }
    const std::vector<std::int64_t> before(
        spent.begin(), spent.begin() + static_cast<std::ptrdiff_t>(label_names_.size()));
    std::vector<Replay::Made> marks;
    run_all(&marks);
    Replay r;
    r.host = s.host - host_from;
    for (const Stream x : block.streams) {
      r.free.push_back(s.free[x] - now);
      r.stream_labels.push_back(s.label[x]);
    }
    for (std::size_t x = 0; x < label_names_.size(); ++x) {
      const std::int64_t was = x < before.size() ? before[x] : 0;
      if (spent[x] != was) r.spent.emplace_back(static_cast<std::int32_t>(x), spent[x] - was);
    }
    const auto& must = must_mark_[static_cast<std::size_t>(c)];
    for (Replay::Made& m : marks) {
      const bool late = m.ready > s.free[kComputeStream];
      if (late) s.late.push_back({m.slot, call.micro_batch, m.ready});
      if (!late && m.slot >= 0 && !std::binary_search(must.begin(), must.end(), m.slot))
        continue;  // nobody can still wait for it
      m.ready -= now;
      m.begin -= now;
      r.marks.push_back(m);
    }
    for (std::size_t k = block.receives; k < block.steps.size(); ++k) {
      const Step& step = block.steps[k];
      if (step.kind != Kind::send) continue;
      r.messages.emplace_back(
          step.message, step.peer_class, step.of_step,
          messages_.at(
              message_key(step.message, step.of_step ? -1 : call.micro_batch, c, step.peer_class)) -
              now);
    }
    block.replays.emplace(std::move(key), std::move(r));
  }

  /// Plays one step; false if it must wait for another class.
  bool run_step(int c, State& s, const Compiled& block, const Step& step, const BlockCall& call,
                std::vector<Replay::Made>* marks) {
    auto& spent = spent_[static_cast<std::size_t>(c)];
    const std::int64_t ticks =
        ticks_.empty() ? step.ticks : ticks_[static_cast<std::size_t>(c)][s.instance];
    std::int64_t start = s.free[step.stream];
    const Slot* cause = nullptr;
    if (step.after_compute) start = std::max(start, s.free[kComputeStream]);
    const std::int64_t launched =
        (step.host_waits ? std::max(s.host, s.free[kComputeStream]) : s.host) + step.launch;
    Slot host;
    if (launched > start) {
      const std::int32_t x = label("exposed:launch");
      host = {launched, x, x, 0};
      start = launched, cause = &host;
    }
    for (std::int32_t w = 0; w < step.waits; ++w) {
      const Slot& ready =
          slot(s, block.slots[static_cast<std::size_t>(step.first_wait + w)], call.micro_batch);
      if (ready.ready > start) start = ready.ready, cause = &ready;
    }
    if (step.kind == Kind::receive) {
      const auto it = messages_.find(
          message_key(step.message, step.of_step ? -1 : call.micro_batch, step.peer_class, c));
      if (it == messages_.end()) return false;
      // Waiting for others is this step's own wait, not its last operand's.
      if (it->second > start) start = it->second, cause = nullptr;
    } else if (step.kind == Kind::collective && step.meets) {
      const Instruction& i =
          p_.blocks[call.block.index()].instructions[static_cast<std::size_t>(step.instruction)];
      const Meeting* m = meet(c, s, step, i, start);
      if (m == nullptr) return false;
      if (m->start > start) start = m->start, cause = nullptr;
    } else if (step.kind == Kind::send) {
      messages_[message_key(step.message, step.of_step ? -1 : call.micro_batch, c,
                            step.peer_class)] = start + step.beside;
    }
    if (start > kLastTick - ticks) {
      throw InputError("time",
                       "the step would take longer than the 106 days of event time; use fewer "
                       "micro-batches or a faster device");
    }
    s.host = launched;
    const std::int64_t end = start + ticks;
    if (step.stream == kComputeStream) {
      if (start > s.free[kComputeStream]) charge(spent, cause, s.free[kComputeStream], start);
      spent[static_cast<std::size_t>(step.label)] += end - start;
    }
    const Slot made{end, step.label, cause != nullptr ? cause->label : step.label, start};
    s.free[step.stream] = end;
    s.label[step.stream] = step.label;
    for (std::int32_t m = 0; m < step.marks; ++m) {
      const std::int32_t x = block.slots[static_cast<std::size_t>(step.first_mark + m)];
      slot(s, x, call.micro_batch) = made;
      if (marks != nullptr) marks->push_back({x, made.ready, made.begin, made.label, made.before});
    }
    if (marks == nullptr && step.marks > 0 && step.stream != kComputeStream) {
      for (std::int32_t m = 0; m < step.marks; ++m) {
        s.late.push_back(
            {block.slots[static_cast<std::size_t>(step.first_mark + m)], call.micro_batch, end});
      }
    }
    ++s.instance;
    ++timeline_.instructions;
    if (options_.record) {
      Entry e{c, call.block.value, step.instruction, call.micro_batch, Ticks{start}, Ticks{end}};
      if (!losses_.empty()) note_loss(c, static_cast<std::int32_t>(s.instance) - 1, e);
      timeline_.entries.push_back(e);
    }
    return true;
  }

  /// Does every device run transfers beside its kernels? Of others what contends was measured.
  bool all_beside() const {
    return std::all_of(classes_.classes.begin(), classes_.classes.end(), [&](const RankClass& c) {
      return device_of(c.representative).concurrent_streams;
    });
  }

  /// How long each instruction takes with all that runs beside it.
  void contend() {
    Usages usages(p_, communication_, links_);
    const std::size_t n = classes_.classes.size();
    std::vector<std::size_t> slots;
    for (const State& s : state_) slots.push_back(s.slots.size());
    StepGraph graph(n, p_.streams.size(), slots);
    std::vector<std::vector<std::int32_t>> label_of(n);
    for (std::size_t c = 0; c < n; ++c) {
      auto& blocks = compiled_[c];
      std::vector<std::vector<Task>> tasks(blocks.size());
      for (std::size_t b = 0; b < blocks.size(); ++b)
        tasks[b] = tasks_of(static_cast<int>(c), b, usages);
      State& s = state_[c];
      std::vector<std::size_t> waits, marks;
      for (const BlockCall& call : p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)]) {
        const Compiled& block = blocks[call.block.index()];
        for (std::size_t k = 0; k < block.steps.size(); ++k) {
          const Step& step = block.steps[k];
          waits.clear(), marks.clear();
          for (std::int32_t w = 0; w < step.waits; ++w)
            waits.push_back(slot_index(
                s, block.slots[static_cast<std::size_t>(step.first_wait + w)], call.micro_batch));
          for (std::int32_t m = 0; m < step.marks; ++m)
            marks.push_back(slot_index(
                s, block.slots[static_cast<std::size_t>(step.first_mark + m)], call.micro_batch));
          const StepGraph::Instance x{tasks[call.block.index()][k],
                                      step.stream,
                                      step.after_compute,
                                      waits,
                                      marks,
                                      step.launch,
                                      step.host_waits};
          label_of[c].push_back(step.label);
          const auto message = [&](int from, int to) {
            return message_key(step.message, step.of_step ? -1 : call.micro_batch, from, to);
          };
          const int me = static_cast<int>(c);
          if (step.kind == Kind::send) {
            graph.send(me, x, message(me, step.peer_class));
          } else if (step.kind == Kind::receive) {
            graph.receive(me, x, message(step.peer_class, me));
          } else if (step.kind == Kind::collective && step.meets) {
            const Instruction& i = p_.blocks[call.block.index()]
                                       .instructions[static_cast<std::size_t>(step.instruction)];
            const auto at = static_cast<std::size_t>(
                &call - p_.stages[static_cast<std::size_t>(classes_.classes[c].stage)].data());
            std::vector<std::int64_t> key{i.tie, i.tie >= 0 ? 0 : static_cast<std::int64_t>(at),
                                          i.tie >= 0 ? 0 : step.instruction};
            const auto involved = classes_in(p_.group(i, classes_.classes[c].representative));
            key.insert(key.end(), involved.begin(), involved.end());
            graph.meet(me, x, key);
          } else {
            graph.step(me, x);
          }
        }
      }
    }
    auto played = graph.play(usages.sharing(), usages.all());
    ticks_ = std::move(played.ticks);
    if (options_.record) {
      for (const auto& list : played.losses) {
        for (const Loss& l : list)
          resource_names_.try_emplace(l.resource.value, usages.resource_name(l.resource));
      }
      losses_ = played.losses;
      next_loss_.assign(n, 0);
    }
    std::map<std::tuple<int, std::int32_t, std::int32_t>, std::int64_t> lost;
    for (std::size_t c = 0; c < n; ++c) {
      for (const Loss& l : played.losses[c])
        lost[{static_cast<int>(c), label_of[c][static_cast<std::size_t>(l.task)],
              l.resource.value}] += l.ticks;
    }
    for (const auto& [key, ticks] : lost) {
      const auto& [c, x, resource] = key;
      timeline_.contended.push_back(
          {c, label_names_[static_cast<std::size_t>(x)],
           usages.resource_name(ResourceId{static_cast<std::size_t>(resource)}), Ticks{ticks}});
    }
    std::stable_sort(timeline_.contended.begin(), timeline_.contended.end(),
                     [](const Contended& a, const Contended& b) { return b.lost < a.lost; });
  }

  /// What an instance lost, and over what most of it.
  void note_loss(int c, std::int32_t instance, Entry& e) {
    auto& list = losses_[static_cast<std::size_t>(c)];
    auto& at = next_loss_[static_cast<std::size_t>(c)];
    std::int64_t most = 0;
    for (; at < list.size() && list[at].task <= instance; ++at) {
      if (list[at].task < instance) continue;
      e.lost += Ticks{list[at].ticks};
      if (list[at].ticks <= most) continue;
      most = list[at].ticks;
      const auto [it, fresh] =
          resource_of_.try_emplace(resource_names_.at(list[at].resource.value),
                                   static_cast<std::int32_t>(timeline_.resources.size()));
      if (fresh) timeline_.resources.push_back(it->first);
      e.over = it->second;
    }
  }

  /// A block's instructions as tasks: what of their time is fixed, what sharing stretches, what
  /// they use.
  std::vector<Task> tasks_of(int c, std::size_t b, Usages& usages) {
    const Compiled& block = compiled_[static_cast<std::size_t>(c)][b];
    const std::int64_t rank = classes_.classes[static_cast<std::size_t>(c)].representative;
    // Where nothing runs beside the compute stream, its kernels have the device to themselves.
    bool beside = false;
    for (const Compiled& any : compiled_[static_cast<std::size_t>(c)]) {
      for (const Step& s : any.steps) beside = beside || s.stream != kComputeStream;
    }
    std::vector<Task> tasks;
    for (const Step& s : block.steps) {
      const Instruction& i = p_.blocks[b].instructions[static_cast<std::size_t>(s.instruction)];
      Task t;
      Seconds work{0};
      switch (s.kind) {
        case Kind::compute:
        case Kind::slice:
          if (!beside || from_storage(p_, i) || on_host(p_, i)) break;
          t.usage = usages.kernel(i, c);
          if (t.usage >= 0) work = usages.work_of_kernel(i, rank);
          break;
        case Kind::copy:
          work = to_seconds(Ticks{s.ticks});
          t.usage = usages.copy(i, rank, local_bytes(p_, i.writes[0], rank), work);
          break;
        case Kind::collective: {
          const auto group = p_.group(i, rank);
          Bytes bytes{0};
          const auto involved = classes_in(group);
          for (const int m : involved)
            bytes = std::max(
                bytes,
                payload(p_, i, classes_.classes[static_cast<std::size_t>(m)].representative));
          t.usage = usages.collective(i, group, involved, bytes, work);
          break;
        }
        case Kind::send:
          t.usage =
              usages.send(i, rank, p_.peer_of(i, rank), local_bytes(p_, i.reads[0], rank), work);
          break;
        default:
          break;
      }
      if (t.usage >= 0) {
        // Compared as numbers first: all of a time may be far more than ticks can count.
        const double all = static_cast<double>(s.ticks),
                     share = work.count * 1e12 / static_cast<double>(i.every);
        t.work = share >= all ? s.ticks
                              : to_ticks(Seconds{work.count / static_cast<double>(i.every)}).count;
        t.work = std::min(t.work, s.ticks);
      }
      t.fixed = s.ticks - t.work;
      tasks.push_back(t);
    }
    return tasks;
  }

  std::vector<int> classes_in(const std::vector<std::int64_t>& group) const {
    std::set<int> all;
    for (const std::int64_t m : group) all.insert(classes_.of_rank[static_cast<std::size_t>(m)]);
    return {all.begin(), all.end()};
  }

  // ---- more ranks than cores ----------------------------------------------------------------
  struct Waiter {
    bool came = false, works = false;
    std::int64_t start = 0;  ///< when it first had a core for its step
    std::size_t meeting = 0;
  };
  struct Gathering {
    std::vector<int> members;  ///< there
    std::size_t wanted = 0, done = 0;
  };

  /// Ranks of a host run in the order in which they could, as many as it has cores; who waits for
  /// another, or has reached its end, gives its core to the next (docs/simulation.md).
  void take_turns() {
    const std::size_t n = classes_.classes.size();
    const Topology& t = communication_.topology();
    turn_.assign(n, {});
    node_of_.resize(n);
    for (std::size_t c = 0; c < n; ++c) {
      const std::int64_t rank = classes_.classes[c].representative;
      node_of_[c] = t.node_of(DeviceId{static_cast<std::size_t>(rank)});
      const int cores = device_of(rank).host_cores;
      hosts_.try_emplace(node_of_[c], Host{cores > 0 ? cores : static_cast<int>(n), {}});
    }
    for (std::size_t c = 0; c < n; ++c) ready(static_cast<int>(c), 0);
    while (!events_.empty()) {
      const Event e = events_.top();
      events_.pop();
      if (e.becomes_ready) {
        ready(e.rank, e.time);
      } else {
        end_of_work(e.rank, e.time);
      }
    }
  }

  struct Event {
    std::int64_t time = 0, order = 0;
    int rank = 0;
    bool becomes_ready = false;
    bool operator<(const Event& o) const {
      return std::tie(o.time, o.order) < std::tie(time, order);
    }
  };
  struct Host {
    int idle = 0;
    std::deque<int> queue;
  };

  void ready(int c, std::int64_t now) {
    Host& h = hosts_.at(node_of_[static_cast<std::size_t>(c)]);
    if (h.idle == 0) {
      h.queue.push_back(c);
      return;
    }
    --h.idle;
    go_on(c, now);
  }
  void give_up_core(int c, std::int64_t now) {
    Host& h = hosts_.at(node_of_[static_cast<std::size_t>(c)]);
    if (h.queue.empty()) {
      ++h.idle;
      return;
    }
    const int next = h.queue.front();
    h.queue.pop_front();
    go_on(next, now);
  }
  void event(int c, std::int64_t time, bool becomes_ready) {
    events_.push({time, static_cast<std::int64_t>(event_count_++), c, becomes_ready});
  }

  /// The step that a rank is at; null at its end.
  const Step* current(int c, BlockCall& call) {
    State& s = state_[static_cast<std::size_t>(c)];
    const auto& calls =
        p_.stages[static_cast<std::size_t>(classes_.classes[static_cast<std::size_t>(c)].stage)];
    for (; s.call < calls.size(); ++s.call, s.step = 0) {
      call = calls[s.call];
      const Compiled& block = compiled_[static_cast<std::size_t>(c)][call.block.index()];
      if (s.step < block.steps.size()) return &block.steps[s.step];
    }
    return nullptr;
  }

  /// A rank that has a core: begins its next step, or goes on with the one it waited in.
  void go_on(int c, std::int64_t now) {
    BlockCall call;
    const Step* step = current(c, call);
    if (step == nullptr) {
      give_up_core(c, now);
      return;
    }
    Waiter& w = turn_[static_cast<std::size_t>(c)];
    State& s = state_[static_cast<std::size_t>(c)];
    if (!w.came) w.start = now, w.came = true;
    if (!w.works) {
      if (step->kind == Kind::receive) {
        const auto key =
            message_key(step->message, step->of_step ? -1 : call.micro_batch, step->peer_class, c);
        const auto it = messages_.find(key);
        if (it == messages_.end()) {
          waits_for_[key] = c;
          give_up_core(c, now);
          return;
        }
        if (it->second > now) {
          event(c, it->second, true);
          give_up_core(c, now);
          return;
        }
      } else if (step->kind == Kind::collective && step->meets) {
        if (!gathered(c, s, call, *step)) {
          give_up_core(c, now);
          return;
        }
        for (const int m : gatherings_[w.meeting].members) {
          turn_[static_cast<std::size_t>(m)].works = true;
          if (m != c) event(m, now, true);
        }
      }
      w.works = true;
    } else if (step->kind == Kind::collective && step->meets &&
               gatherings_[w.meeting].done == gatherings_[w.meeting].wanted) {
      end_step(c, s, call, *step, now);
      return;
    }
    if (step->kind == Kind::send) {
      const auto key =
          message_key(step->message, step->of_step ? -1 : call.micro_batch, c, step->peer_class);
      messages_[key] = now + step->beside;
      if (const auto it = waits_for_.find(key); it != waits_for_.end()) {
        event(it->second, now + step->beside, true);
        waits_for_.erase(it);
      }
    }
    const auto work = static_cast<std::int64_t>(
        std::ceil(static_cast<double>(step->ticks) * step->share_of_core));
    if (now > kLastTick - work) {
      throw InputError("time",
                       "the step would take longer than the 106 days of event time; use fewer "
                       "micro-batches or a faster device");
    }
    event(c, now + work, false);
  }

  /// Notes that rank `c` is at a collective; true for the last one.
  bool gathered(int c, const State& s, const BlockCall& call, const Step& step) {
    const Instruction& i =
        p_.blocks[call.block.index()].instructions[static_cast<std::size_t>(step.instruction)];
    const auto group = p_.group(i, classes_.classes[static_cast<std::size_t>(c)].representative);
    const auto key = std::tuple{i.tie, i.tie >= 0 ? std::size_t{0} : s.call,
                                i.tie >= 0 ? 0 : step.instruction, group};
    const auto [it, fresh] = gathering_of_.emplace(key, gatherings_.size());
    if (fresh) gatherings_.push_back({{}, group.size(), 0});
    Gathering& g = gatherings_[it->second];
    turn_[static_cast<std::size_t>(c)].meeting = it->second;
    g.members.push_back(c);
    return g.members.size() == g.wanted;
  }

  void end_of_work(int c, std::int64_t now) {
    BlockCall call;
    const Step* step = current(c, call);
    State& s = state_[static_cast<std::size_t>(c)];
    if (step->kind == Kind::collective && step->meets) {
      // It ends for all at once.
      Gathering& g = gatherings_[turn_[static_cast<std::size_t>(c)].meeting];
      if (++g.done < g.wanted) {
        give_up_core(c, now);
        return;
      }
      for (const int m : g.members) {
        if (m != c) event(m, now, true);
      }
    }
    end_step(c, s, call, *step, now);
  }

  void end_step(int c, State& s, const BlockCall& call, const Step& step, std::int64_t now) {
    Waiter& w = turn_[static_cast<std::size_t>(c)];
    auto& spent = spent_[static_cast<std::size_t>(c)];
    // Until it had a core it was neither at work nor waiting for another rank.
    spent[static_cast<std::size_t>(label("other"))] += w.start - s.free[kComputeStream];
    spent[static_cast<std::size_t>(step.label)] += now - w.start;
    s.free[kComputeStream] = now;
    s.label[kComputeStream] = step.label;
    ++timeline_.instructions;
    if (options_.record)
      timeline_.entries.push_back(
          {c, call.block.value, step.instruction, call.micro_batch, Ticks{w.start}, Ticks{now}});
    w = {};
    ++s.step;
    go_on(c, now);
  }

  static std::int64_t last_end_of(const State& s) {
    return *std::max_element(s.free.begin(), s.free.end());
  }

  /// The compute stream stood still from `from` to `to` for what `cause` made: while the maker
  /// worked it is the maker's, before that it belongs to what the maker waited for.
  void charge(std::vector<std::int64_t>& spent, const Slot* cause, std::int64_t from,
              std::int64_t to) {
    if (cause == nullptr) {
      spent[static_cast<std::size_t>(label("other"))] += to - from;
      return;
    }
    const std::int64_t begin = std::clamp(cause->begin, from, to);
    spent[static_cast<std::size_t>(cause->label)] += to - begin;
    spent[static_cast<std::size_t>(cause->before)] += begin - from;
  }

  /// Joins a collective whose members are of several classes; null until all are there.
  Meeting* meet(int c, const State& s, const Step& step, const Instruction& i, std::int64_t ready) {
    const std::int64_t rank = classes_.classes[static_cast<std::size_t>(c)].representative;
    const auto group = p_.group(i, rank);
    std::set<int> involved;
    for (const std::int64_t m : group)
      involved.insert(classes_.of_rank[static_cast<std::size_t>(m)]);
    // Classes of one group kind meet in program order: the n-th such meeting of each.
    const auto key = std::tuple{i.tie, i.tie >= 0 ? 0 : static_cast<int>(s.call),
                                i.tie >= 0 ? 0 : step.instruction,
                                std::vector<int>(involved.begin(), involved.end())};
    auto& m = meetings_[key];
    if (arrivals_.insert({c, &m}).second) {
      ++m.arrived;
      m.start = std::max(m.start, ready);
    }
    return m.arrived == involved.size() ? &m : nullptr;
  }

  std::uint64_t message_key(std::int32_t message, std::int32_t micro_batch, int from,
                            int to) const {
    return (static_cast<std::uint64_t>(message) * static_cast<std::uint64_t>(p_.micro_batches + 1) +
            static_cast<std::uint64_t>(micro_batch + 1)) *
               classes_.classes.size() * classes_.classes.size() +
           static_cast<std::uint64_t>(from) * classes_.classes.size() +
           static_cast<std::uint64_t>(to);
  }

  void memory(int c) {
    const RankClass& rc = classes_.classes[static_cast<std::size_t>(c)];
    const auto& calls = p_.stages[static_cast<std::size_t>(rc.stage)];
    MemoryUse& use = timeline_.memory[static_cast<std::size_t>(c)];
    std::array<std::int64_t, kCategoryCount> now{};
    std::int64_t host = 0;
    // State is there all the time.
    std::vector<char> counted(p_.buffers.size(), 0);
    std::set<BlockId> blocks;
    for (const BlockCall& call : calls) blocks.insert(call.block);
    for (const BlockId b : blocks) {
      for (const Instruction& i : p_.blocks[b.index()].instructions) {
        const auto note = [&](BufferId id) {
          const Buffer& buffer = p_.buffer(id);
          if (counted[id.index()] || buffer.alias >= 0 || buffer.scope != Scope::step ||
              buffer.category == Category::workspace)
            return;
          counted[id.index()] = 1;
          now[static_cast<std::size_t>(buffer.category)] +=
              device_bytes(p_, id, rc.representative).count;
          host += host_bytes(p_, id, rc.representative).count;
        };
        for_each_read(i, note);
        for_each_write(i, note);
      }
    }
    use.resident = resident_bytes(p_, rc.stage, rc.representative,
                                  communication_.topology()
                                      .device(DeviceId{static_cast<std::size_t>(rc.representative)})
                                      .compute_capability);
    now[static_cast<std::size_t>(Category::workspace)] += use.resident.count;
    const std::int64_t base = std::accumulate(now.begin(), now.end(), std::int64_t{0});
    const auto held = step_bytes(p_, rc.stage, rc.representative);
    const std::int64_t step =
        std::accumulate(held.begin(), held.end(), Bytes{0}, [](Bytes a, Bytes b) {
          return a + b;
        }).count;
    const auto copies = stage_copies(p_, rc.stage, rc.representative);
    std::int64_t level = base, peak = -1;
    std::size_t at = 0;
    bool stepping = false;
    std::int64_t saved = 0;
    for (std::size_t k = 0; k < calls.size(); ++k) {
      const Compiled& block = compiled_[static_cast<std::size_t>(c)][calls[k].block.index()];
      if (level + block.rise > peak) peak = level + block.rise, at = k, stepping = false;
      if (p_.blocks[calls[k].block.index()].kind == BlockKind::step && level + step > peak)
        peak = level + step, at = k, stepping = true;
      level += block.net + copies[calls[k].block.index()];
      saved += block.net_saved;
      use.saved = std::max(use.saved, Bytes{saved});
      use.host_peak = std::max(use.host_peak, Bytes{host + block.host_rise});
      host += block.host_net;
    }
    // Which buffers are alive at the peak: once more up to it, by category.
    std::int64_t running = base;
    bool reached = running == peak;
    std::array<std::int64_t, kCategoryCount> snapshot = now;
    std::vector<std::array<std::int64_t, kCategoryCount>> net(p_.blocks.size());
    std::vector<char> known(p_.blocks.size(), 0);
    for (std::size_t k = 0; k < calls.size() && !reached; ++k) {
      const std::size_t b = calls[k].block.index();
      if (k != at && known[b]) {
        for (std::size_t x = 0; x < kCategoryCount; ++x) now[x] += net[b][x];
        running += compiled_[static_cast<std::size_t>(c)][b].net + copies[b];
        continue;
      }
      const auto before = now;
      if (k == at && stepping) {
        snapshot = now;
        snapshot[static_cast<std::size_t>(Category::workspace)] += step;
        break;
      }
      for (const Instruction& i : p_.blocks[b].instructions) {
        const std::int64_t transient = transient_bytes(p_, i, rc.representative).count;
        if (k == at && transient > 0 && running + transient == peak) {
          snapshot = now;
          snapshot[static_cast<std::size_t>(Category::workspace)] += transient;
          reached = true;
          break;
        }
        if (i.kind != Kind::allocate && i.kind != Kind::free) continue;
        for (const BufferId id : i.kind == Kind::allocate ? i.writes : i.reads) {
          const std::int64_t bytes =
              (i.kind == Kind::allocate ? 1 : -1) * device_bytes(p_, id, rc.representative).count;
          now[static_cast<std::size_t>(p_.buffer(id).category)] += bytes;
          running += bytes;
        }
        if (k == at && running == peak) {
          snapshot = now;
          reached = true;
          break;
        }
      }
      now[static_cast<std::size_t>(Category::workspace)] += copies[b];
      running += copies[b];
      for (std::size_t x = 0; x < kCategoryCount; ++x) net[b][x] = now[x] - before[x];
      known[b] = 1;
    }
    use.peak = Bytes{peak};
    use.peak_block = calls[at].block.value;
    use.peak_micro_batch = calls[at].micro_batch;
    for (std::size_t x = 0; x < kCategoryCount; ++x) use.at_peak[x] = Bytes{snapshot[x]};
  }

  void finish_breakdown(int c, std::int64_t end) {
    const State& s = state_[static_cast<std::size_t>(c)];
    auto& spent = spent_[static_cast<std::size_t>(c)];
    // After the last kernel: its own trailing communication, then the wait for others.
    const std::int64_t own = last_end_of(s);
    if (own > s.free[kComputeStream]) {
      const auto last =
          static_cast<std::size_t>(std::max_element(s.free.begin(), s.free.end()) - s.free.begin());
      spent[static_cast<std::size_t>(s.label[last])] += own - s.free[kComputeStream];
    }
    Breakdown& b = timeline_.breakdown[static_cast<std::size_t>(c)];
    b.bubble += Ticks{end - own};
    for (std::size_t x = 0; x < label_names_.size(); ++x) {
      if (spent[x] == 0) continue;
      const std::string& n = label_names_[x];
      const Ticks t{spent[x]};
      if (n == "optimizer") {
        b.optimizer += t;
      } else if (n == "bubble") {
        b.bubble += t;
      } else if (n.rfind("compute:", 0) == 0) {
        b.compute[n.substr(8)] += t;
      } else if (n.rfind("exposed:", 0) == 0) {
        b.exposed[n.substr(8)] += t;
      } else {
        b.other += t;
      }
    }
  }

  const Program& p_;
  Communication& communication_;
  SimulateOptions options_;
  Timeline timeline_;
  RankClasses classes_;
  SharedLinks links_;
  std::vector<std::vector<Loss>> losses_;  ///< by class, if recorded
  std::vector<std::size_t> next_loss_;
  std::map<std::int32_t, std::string> resource_names_;
  std::map<std::string, std::int32_t> resource_of_;
  std::vector<std::vector<std::int64_t>> ticks_;      ///< by class and instance, where they contend
  std::vector<std::vector<Compiled>> compiled_;       ///< [class][block]
  std::vector<std::vector<std::int32_t>> must_mark_;  ///< by class, encoded slots, sorted
  std::vector<State> state_;
  std::vector<std::vector<std::int64_t>> spent_;  ///< [class][label], picoseconds
  std::vector<std::int32_t> slot_of_;
  std::vector<std::size_t> slots_on_stage_;
  std::map<std::string, std::int32_t> labels_;
  std::vector<std::string> label_names_;
  std::unordered_map<std::uint64_t, std::int64_t> messages_;
  std::map<std::tuple<int, int, int, std::vector<int>>, Meeting> meetings_;
  std::set<std::pair<int, const Meeting*>> arrivals_;
  // Where ranks share cores:
  std::vector<Waiter> turn_;
  std::vector<std::size_t> node_of_;
  std::map<std::size_t, Host> hosts_;
  std::priority_queue<Event> events_;
  std::size_t event_count_ = 0;
  std::vector<Gathering> gatherings_;
  std::map<std::tuple<int, std::size_t, std::int32_t, std::vector<std::int64_t>>, std::size_t>
      gathering_of_;
  std::unordered_map<std::uint64_t, int> waits_for_;
};

}  // namespace

std::vector<Alive> alive_at_peak(const Program& p, const RankClass& rank_class,
                                 const MemoryUse& use) {
  std::map<std::pair<Category, std::string>, Alive> all;
  const auto add = [&](BufferId id, std::int64_t sign) {
    const Buffer& b = p.buffer(id);
    // "layers.3.attention.query" belongs to block 3.
    std::string owner = b.name;
    constexpr std::string_view kBlocks = "layers.";
    if (owner.compare(0, kBlocks.size(), kBlocks) == 0) {
      owner = owner.substr(0, owner.find('.', kBlocks.size()));
    }
    Alive& a = all[{b.category, owner}];
    a.category = b.category;
    a.owner = owner;
    a.bytes += Bytes{sign * device_bytes(p, id, rank_class.representative).count};
    a.buffers += sign;
  };
  const auto& calls = p.stages[static_cast<std::size_t>(rank_class.stage)];
  std::set<BlockId> blocks;
  for (const BlockCall& call : calls) blocks.insert(call.block);
  std::vector<char> counted(p.buffers.size(), 0);
  Bytes level = use.resident;
  if (level.count > 0) {
    Alive& a = all[{Category::workspace, "framework"}];
    a = {Category::workspace, "framework", level, 1};
  }
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      const auto note = [&](BufferId id) {
        const Buffer& buffer = p.buffer(id);
        if (counted[id.index()] || buffer.alias >= 0 || buffer.scope != Scope::step ||
            buffer.category == Category::workspace) {
          return;
        }
        counted[id.index()] = 1;
        add(id, 1);
        level += device_bytes(p, id, rank_class.representative);
      };
      for_each_read(i, note);
      for_each_write(i, note);
    }
  }
  const auto reached = [&](const BlockCall& call) {
    return level == use.peak && call.block.value == use.peak_block &&
           call.micro_batch == use.peak_micro_batch;
  };
  bool done = false;
  const auto copies = stage_copies(p, rank_class.stage, rank_class.representative);
  Bytes step{0};
  for (const Bytes b : step_bytes(p, rank_class.stage, rank_class.representative)) step += b;
  for (std::size_t c = 0; c < calls.size() && !done; ++c) {
    if (step.count > 0 && p.blocks[calls[c].block.index()].kind == BlockKind::step &&
        calls[c].block.value == use.peak_block && level + step == use.peak) {
      all[{Category::workspace, "gradients of the step"}] = {Category::workspace,
                                                             "gradients of the step", step, 1};
      break;
    }
    for (const Instruction& i : p.blocks[calls[c].block.index()].instructions) {
      if (done = done || reached(calls[c]); done) break;
      if (const Bytes t = transient_bytes(p, i, rank_class.representative);
          t.count > 0 && calls[c].block.value == use.peak_block &&
          calls[c].micro_batch == use.peak_micro_batch && level + t == use.peak) {
        const char* what = i.kind == Kind::compute ? "gradient of a weight" : "packed payload";
        Alive& a = all[{Category::workspace, what}];
        a.category = Category::workspace;
        a.owner = what;
        a.bytes += t;
        a.buffers += 1;
        done = true;
        break;
      }
      if (i.kind != Kind::allocate && i.kind != Kind::free) continue;
      const std::int64_t sign = i.kind == Kind::allocate ? 1 : -1;
      for (const BufferId id : i.kind == Kind::allocate ? i.writes : i.reads) {
        add(id, sign);
        level += Bytes{sign * device_bytes(p, id, rank_class.representative).count};
      }
    }
    if (const std::int64_t n = copies[calls[c].block.index()]; n != 0 && !done) {
      Alive& a = all[{Category::workspace, "copies of a stage's messages"}];
      a.category = Category::workspace;
      a.owner = "copies of a stage's messages";
      a.bytes += Bytes{n};
      a.buffers += n > 0 ? 1 : -1;
      level += Bytes{n};
    }
  }
  std::vector<Alive> list;
  for (auto& [key, a] : all) {
    if (a.bytes.count > 0) list.push_back(std::move(a));
  }
  std::stable_sort(list.begin(), list.end(),
                   [](const Alive& a, const Alive& b) { return b.bytes < a.bytes; });
  return list;
}

Timeline simulate(const Program& program, Communication& communication,
                  const SimulateOptions& options) {
  Engine engine(program, communication, options);
  engine.prepare();
  return engine.play(communication.adjustment());
}

struct Rehearsal::State {
  Engine prepared;
};

Rehearsal::Rehearsal(const Program& program, Communication& communication,
                     const SimulateOptions& options)
    : state_(new State{Engine(program, communication, options)}) {
  state_->prepared.prepare();
}
Rehearsal::Rehearsal(Rehearsal&&) noexcept = default;
Rehearsal& Rehearsal::operator=(Rehearsal&&) noexcept = default;
Rehearsal::~Rehearsal() = default;

Timeline Rehearsal::play(const Adjustment& adjustment) const {
  Engine copy = state_->prepared;
  return copy.play(adjustment);
}

}  // namespace partita
