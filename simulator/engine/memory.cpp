#include "simulator/engine/memory.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <string_view>
#include <utility>

namespace partita {

MemoryUse memory_use(const Program& p, const RankClass& rc,
                     const std::vector<CompiledBlock>& compiled, int compute_capability) {
  const auto& calls = p.stages[static_cast<std::size_t>(rc.stage)];
  MemoryUse use;
  std::array<std::int64_t, kCategoryCount> now{};
  std::int64_t host = 0;
  // State is there all the time.
  std::vector<char> counted(p.buffers.size(), 0);
  std::set<BlockId> blocks;
  for (const BlockCall& call : calls) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      const auto note = [&](BufferId id) {
        const Buffer& buffer = p.buffer(id);
        if (counted[id.index()] || buffer.alias >= 0 || buffer.scope != Scope::step ||
            buffer.category == Category::workspace)
          return;
        counted[id.index()] = 1;
        now[static_cast<std::size_t>(buffer.category)] +=
            device_bytes(p, id, rc.representative).count;
        host += host_bytes(p, id, rc.representative).count;
      };
      for_each_read(i, note);
      for_each_write(i, note);
    }
  }
  use.resident = resident_bytes(p, rc.stage, rc.representative, compute_capability);
  now[static_cast<std::size_t>(Category::workspace)] += use.resident.count;
  const std::int64_t base = std::accumulate(now.begin(), now.end(), std::int64_t{0});
  const auto held = step_bytes(p, rc.stage, rc.representative);
  const std::int64_t step =
      std::accumulate(held.begin(), held.end(), Bytes{0}, [](Bytes a, Bytes b) {
        return a + b;
      }).count;
  const auto copies = stage_copies(p, rc.stage, rc.representative);
  std::int64_t level = base, peak = -1;
  std::size_t at = 0;
  bool stepping = false;
  std::int64_t saved = 0, by_layers = 0;
  for (std::size_t k = 0; k < calls.size(); ++k) {
    const CompiledBlock& block = compiled[calls[k].block.index()];
    if (level + block.rise > peak) peak = level + block.rise, at = k, stepping = false;
    if (p.blocks[calls[k].block.index()].kind == BlockKind::step && level + step > peak)
      peak = level + step, at = k, stepping = true;
    level += block.net + copies[calls[k].block.index()];
    saved += block.net_saved;
    use.saved = std::max(use.saved, Bytes{saved});
    by_layers += block.net_layers;
    use.saved_by_layers = std::max(use.saved_by_layers, Bytes{by_layers});
    use.host_peak = std::max(use.host_peak, Bytes{host + block.host_rise});
    host += block.host_net;
  }
  // Which buffers are alive at the peak: once more up to it, by category.
  std::int64_t running = base;
  bool reached = running == peak;
  std::array<std::int64_t, kCategoryCount> snapshot = now;
  std::vector<std::array<std::int64_t, kCategoryCount>> net(p.blocks.size());
  std::vector<char> known(p.blocks.size(), 0);
  for (std::size_t k = 0; k < calls.size() && !reached; ++k) {
    const std::size_t b = calls[k].block.index();
    if (k != at && known[b]) {
      for (std::size_t x = 0; x < kCategoryCount; ++x) now[x] += net[b][x];
      running += compiled[b].net + copies[b];
      continue;
    }
    const auto before = now;
    if (k == at && stepping) {
      snapshot = now;
      snapshot[static_cast<std::size_t>(Category::workspace)] += step;
      break;
    }
    for (const Instruction& i : p.blocks[b].instructions) {
      const std::int64_t transient = transient_bytes(p, i, rc.representative).count;
      if (k == at && transient > 0 && running + transient == peak) {
        snapshot = now;
        snapshot[static_cast<std::size_t>(Category::workspace)] += transient;
        reached = true;
        break;
      }
      if (i.kind != Kind::allocate && i.kind != Kind::free) continue;
      for (const BufferId id : i.kind == Kind::allocate ? i.writes : i.reads) {
        const std::int64_t bytes =
            (i.kind == Kind::allocate ? 1 : -1) * device_bytes(p, id, rc.representative).count;
        now[static_cast<std::size_t>(p.buffer(id).category)] += bytes;
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
  return use;
}

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
        const bool loss = i.op >= 0 && std::holds_alternative<CrossEntropy>(
                                           p.operators[static_cast<std::size_t>(i.op)].operation);
        const char* what = i.kind != Kind::compute ? "packed payload"
                           : loss                  ? "copies of logits"
                                                   : "gradient of a weight";
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

}  // namespace partita
