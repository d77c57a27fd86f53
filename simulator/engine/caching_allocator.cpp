#include "simulator/engine/caching_allocator.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <type_traits>
#include <unordered_map>

#include "base/error.h"

namespace partita {
namespace {

constexpr std::int64_t kMinimum = 512, kSmall = 1 << 20, kSmallSegment = 2 << 20,
                       kLargeSegment = 20 << 20, kOwnSegment = 10 << 20, kRound = 2 << 20;

std::int64_t rounded(std::int64_t n, std::int64_t to) { return ceil_div(n, to) * to; }

std::int64_t segment_of(std::int64_t size) {
  if (size <= kSmall) return kSmallSegment;
  return size < kOwnSegment ? kLargeSegment : rounded(size, kRound);
}

}  // namespace

CachingAllocator::Handle CachingAllocator::make(Block block) {
  if (unused_.empty()) {
    blocks_.push_back(block);
    return static_cast<Handle>(blocks_.size() - 1);
  }
  const Handle h = unused_.back();
  unused_.pop_back();
  blocks_[index(h)] = block;
  return h;
}

CachingAllocator::Handle CachingAllocator::allocate(Bytes n) {
  PARTITA_ASSERT(n.count > 0, fmt::format("{} B", n.count));
  const std::int64_t size = rounded(n.count, kMinimum);
  const bool small = size <= kSmall;
  Handle h = -1;
  if (const auto best = free_[small].lower_bound({size, -1}); best != free_[small].end()) {
    h = std::get<1>(*best);
    leave(h);
  } else {
    const std::int64_t segment = segment_of(size);
    if (reserved_.count + segment > limit_.count) return_segments();
    h = make({segment, -1, -1, small, false});
    reserved_ += Bytes{segment};
    peak_reserved_ = std::max(peak_reserved_, reserved_);
  }
  const std::int64_t left = blocks_[index(h)].size - size;
  if (small ? left >= kMinimum : left > kSmall) {
    const Handle after = blocks_[index(h)].after;
    const Handle rest = make({left, h, after, small, true});
    if (after >= 0) blocks_[index(after)].before = rest;
    blocks_[index(h)].after = rest;
    blocks_[index(h)].size = size;
    enter(rest);
  }
  blocks_[index(h)].free = false;
  allocated_ += Bytes{blocks_[index(h)].size};
  return h;
}

/// Makes `other`, the free block after `into`, part of it.
void CachingAllocator::absorb(Handle into, Handle other) {
  Block& a = blocks_[index(into)];
  const Block& b = blocks_[index(other)];
  a.size += b.size;
  a.after = b.after;
  if (b.after >= 0) blocks_[index(b.after)].before = into;
  unused_.push_back(other);
}

void CachingAllocator::free(Handle h) {
  PARTITA_ASSERT(!blocks_[index(h)].free, fmt::format("block {}", h));
  allocated_ += Bytes{-blocks_[index(h)].size};
  blocks_[index(h)].free = true;
  if (const Handle after = blocks_[index(h)].after; after >= 0 && blocks_[index(after)].free) {
    leave(after);
    absorb(h, after);
  }
  if (const Handle before = blocks_[index(h)].before; before >= 0 && blocks_[index(before)].free) {
    leave(before);
    absorb(before, h);
    h = before;
  }
  enter(h);
}

void CachingAllocator::return_segments() {
  for (Free& pool : free_) {
    for (auto it = pool.begin(); it != pool.end();) {
      const auto [size, h] = *it;
      const Block& b = blocks_[index(h)];
      if (b.before >= 0 || b.after >= 0) {
        ++it;
        continue;
      }
      reserved_ += Bytes{-size};
      unused_.push_back(h);
      it = pool.erase(it);
    }
  }
}

BlocksBySize::Handle BlocksBySize::allocate(Bytes n) {
  constexpr std::int64_t kGrain = 64;
  const std::int64_t size = ceil_div(n.count, kGrain) * kGrain;
  if (std::int64_t& kept = kept_[size]; kept > 0) {
    --kept;
  } else {
    reserved_ += Bytes{size};
  }
  return size;
}

namespace {

/// What our executor keeps an operator's backward sums in where they need no other rank's.
std::vector<Bytes> inline_sums(const Program& p, const Instruction& i, std::int64_t rank) {
  std::vector<Bytes> sums;
  if (i.kind != Kind::compute || i.kernel != Kernel::backward_data || !i.inline_statistics)
    return sums;
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  if (p.mesh.group_root(rank, op.root) != rank) return sums;
  for (const Statistic& s : op.signature.backward_statistics) {
    std::int64_t n = 4 * s.width;
    for (const int d : s.dims) {
      const auto at = static_cast<std::size_t>(d);
      n *= std::ssize(local_indices(p.mesh, op.cuts[at], op.signature.dims[at].extent, rank));
    }
    if (n > 0) sums.push_back(Bytes{n});
  }
  return sums;
}

/// The state, then every allocation of a step.
template <class Allocator>
Bytes play(Allocator& allocator, const Program& p, const RankClass& rank_class,
           int compute_capability) {
  const std::int64_t rank = rank_class.representative;
  const auto& calls = p.stages[static_cast<std::size_t>(rank_class.stage)];
  std::set<BlockId> blocks;
  for (const BlockCall& call : calls) blocks.insert(call.block);
  std::vector<std::vector<BufferId>> beside(p.blocks.size());
  std::set<BufferId> late;
  for (const BlockId b : blocks) {
    beside[b.index()] = gradients_beside(p, p.blocks[b.index()]);
    late.insert(beside[b.index()].begin(), beside[b.index()].end());
  }
  // Parameters are tensors of their own until one flat copy takes their place, and their memory
  // stays with the allocator.
  std::vector<typename Allocator::Handle> apart;
  for (const BufferId g : late) apart.push_back(allocator.allocate(as_parameters(p, g, rank)));
  std::vector<char> counted(p.buffers.size(), 0);
  // What an instruction allocates and frees, looked up once for all micro-batches.
  struct Turn {
    enum class What : std::uint8_t { allocate, free, transient } what = What::allocate;
    std::int32_t buffer = -1;
    Bytes bytes;
    std::vector<Bytes> together = {};  ///< transient: blocks at once
  };
  std::vector<std::vector<Turn>> turns(p.blocks.size());
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      const auto state = [&](BufferId id) {
        const Buffer& buffer = p.buffer(id);
        if (counted[id.index()] || buffer.alias >= 0 || buffer.scope != Scope::step ||
            buffer.category == Category::workspace)
          return;
        counted[id.index()] = 1;
        if (const Bytes n = device_bytes(p, id, rank); n.count > 0) allocator.allocate(n);
      };
      for_each_read(i, state);
      for_each_write(i, state);
      auto& mine = turns[b.index()];
      if (i.kind == Kind::allocate || i.kind == Kind::free) {
        const bool allocates = i.kind == Kind::allocate;
        for (const BufferId id : allocates ? i.writes : i.reads) {
          if (const Bytes n = device_bytes(p, id, rank); n.count > 0)
            mine.push_back({allocates ? Turn::What::allocate : Turn::What::free, id.value, n});
        }
      } else if (const Bytes n = transient_bytes(p, i, rank); n.count > 0) {
        mine.push_back({Turn::What::transient, -1, n});
      }
      if constexpr (std::is_same_v<Allocator, BlocksBySize>) {
        if (auto sums = inline_sums(p, i, rank); !sums.empty())
          mine.push_back({Turn::What::transient, -1, {}, std::move(sums)});
      }
    }
  }
  for (const auto h : apart) allocator.free(h);
  Bytes resident = resident_bytes(p, rank_class.stage, rank, compute_capability);
  for (const BufferId g : late) resident += Bytes{-as_parameters(p, g, rank).count};
  if (resident.count > 0) allocator.allocate(resident);
  const auto step = step_bytes(p, rank_class.stage, rank);
  const auto copies = stage_copies(p, rank_class.stage, rank);
  std::map<std::pair<int, int>, typename Allocator::Handle> copied;  // by chunk and micro-batch
  std::unordered_map<std::int64_t, typename Allocator::Handle> alive;
  for (const BlockCall& call : calls) {
    std::vector<typename Allocator::Handle> held;
    if (p.blocks[call.block.index()].kind == BlockKind::step) {
      for (const Bytes n : step) held.push_back(allocator.allocate(n));
    }
    for (const Turn& turn : turns[call.block.index()]) {
      if (turn.what == Turn::What::transient) {
        if (turn.bytes.count > 0) allocator.free(allocator.allocate(turn.bytes));
        std::vector<typename Allocator::Handle> at_once;
        for (const Bytes n : turn.together) at_once.push_back(allocator.allocate(n));
        for (const auto h : at_once) allocator.free(h);
        continue;
      }
      const bool per_step = p.buffers[static_cast<std::size_t>(turn.buffer)].scope == Scope::step;
      const std::int64_t key =
          std::int64_t{turn.buffer} * (p.micro_batches + 1) + (per_step ? 0 : call.micro_batch + 1);
      if (turn.what == Turn::What::allocate) {
        alive[key] = allocator.allocate(turn.bytes);
      } else if (const auto found = alive.find(key); found != alive.end()) {
        allocator.free(found->second);
        alive.erase(found);
      }
    }
    for (const auto h : held) allocator.free(h);
    for (const BufferId g : beside[call.block.index()]) {
      if (late.erase(g) > 0) allocator.allocate(as_parameters(p, g, rank));
    }
    const std::int64_t more = copies[call.block.index()];
    const std::pair message{p.blocks[call.block.index()].chunk, call.micro_batch};
    if (more > 0) {
      copied[message] = allocator.allocate(Bytes{more});
    } else if (const auto found = copied.find(message); more < 0 && found != copied.end()) {
      allocator.free(found->second);
      copied.erase(found);
    }
  }
  return allocator.peak_reserved();
}

}  // namespace

Bytes reserved_by(const Program& p, const RankClass& rank_class, int compute_capability,
                  Bytes limit) {
  CachingAllocator allocator(limit);
  return play(allocator, p, rank_class, compute_capability);
}
Bytes reserved_by_us(const Program& p, const RankClass& rank_class) {
  BlocksBySize allocator;
  return play(allocator, p, rank_class, 0);
}

}  // namespace partita
