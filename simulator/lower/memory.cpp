#include <limits>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

BufferId Lowering::on_host(BufferId id, const char* suffix, Category category) {
  Buffer b = p_.buffer(id);
  b.name += suffix;
  b.category = category;
  b.host = true;
  b.alias = -1;
  b.parameter = -1;
  p_.buffers.push_back(std::move(b));
  return BufferId{p_.buffers.size() - 1};
}

Instruction Lowering::copy(BufferId from, BufferId to) {
  Instruction i;
  i.kind = Kind::copy;
  i.reads = {from};
  i.writes = {to};
  const bool a = p_.buffer(from).host, b = p_.buffer(to).host;
  i.stream = stream(a && b ? "host" : b ? "device to host" : "host to device");
  return i;
}

void Lowering::offload_activations() {
  struct Uses {
    std::set<std::size_t> forward, backward;  ///< blocks
    bool elsewhere = false;
  };
  std::vector<Uses> uses(p_.buffers.size());
  std::vector<char> shares(p_.buffers.size(), 0), stays(p_.buffers.size(), 0);
  for (std::size_t b = 0; b < p_.buffers.size(); ++b) {
    if (p_.buffers[b].alias < 0) continue;
    shares[b] = shares[static_cast<std::size_t>(p_.buffers[b].alias)] = 1;
  }
  for (std::size_t at = 0; at < p_.blocks.size(); ++at) {
    const Block& block = p_.blocks[at];
    std::int64_t layer = 0;
    for (const Instruction& i : block.instructions) {
      if (i.op >= 0) layer = graph_.operators[static_cast<std::size_t>(i.op)].layer;
      if (block.kind == BlockKind::forward && plan_.offload_blocks > 0 &&
          layer >= plan_.offload_blocks)
        for_each_write(i, [&](BufferId id) { stays[id.index()] = 1; });
      const auto note = [&](BufferId id) {
        Uses& u = uses[id.index()];
        const bool back =
            block.kind == BlockKind::backward || block.kind == BlockKind::backward_weight;
        if (block.kind == BlockKind::forward) u.forward.insert(at);
        if (back) u.backward.insert(at);
        u.elsewhere |= !back && block.kind != BlockKind::forward;
      };
      for_each_read(i, note);
      for_each_write(i, note);
    }
  }
  std::map<std::size_t, std::map<BufferId, BufferId>> out;   // by block: buffer -> host
  std::map<std::size_t, std::map<BufferId, BufferId>> back;  // by block: buffer -> its return
  std::map<BufferId, BufferId> host_of;                      // return -> host
  for (std::size_t b = 0; b < uses.size(); ++b) {
    const Buffer& buffer = p_.buffers[b];
    if (buffer.scope != Scope::micro_batch || buffer.category != Category::activations ||
        buffer.routed || buffer.host || shares[b] || stays[b] || uses[b].elsewhere ||
        uses[b].forward.size() != 1 || uses[b].backward.empty())
      continue;
    const BufferId id{b};
    const BufferId host = on_host(id, ".host", Category::activations);
    Buffer again = p_.buffer(id);
    again.name += ".back";
    p_.buffers.push_back(std::move(again));
    const BufferId returned{p_.buffers.size() - 1};
    out[*uses[b].forward.begin()][id] = host;
    for (const std::size_t block : uses[b].backward) back[block][id] = returned;
    host_of[returned] = host;
  }
  for (const auto& [at, list] : out) copy_out(p_.blocks[at], list);
  for (const auto& [at, list] : back) copy_back(p_.blocks[at], list, host_of);
}

void Lowering::copy_out(Block& block, const std::map<BufferId, BufferId>& list) {
  std::map<std::size_t, std::vector<BufferId>> after;
  std::map<BufferId, std::size_t> last;
  for (std::size_t k = 0; k < block.instructions.size(); ++k) {
    const auto note = [&](BufferId id) {
      if (list.count(id)) last[id] = k;
    };
    for_each_read(block.instructions[k], note);
    for_each_write(block.instructions[k], note);
  }
  for (const auto& [id, k] : last) after[k].push_back(id);
  std::vector<Instruction> merged;
  for (std::size_t k = 0; k < block.instructions.size(); ++k) {
    merged.push_back(std::move(block.instructions[k]));
    for (const BufferId id : after[k]) {
      merged.push_back(copy(id, list.at(id)));
      merged.back().after_compute = true;
    }
  }
  block.instructions = std::move(merged);
}

void Lowering::copy_back(Block& block, const std::map<BufferId, BufferId>& list,
                         std::map<BufferId, BufferId>& host_of) {
  // Where each layer's work begins, and the layer before it in this block.
  std::vector<std::size_t> starts;
  int layer = std::numeric_limits<int>::min();
  for (std::size_t k = 0; k < block.instructions.size(); ++k) {
    const Instruction& i = block.instructions[k];
    if (i.op < 0) continue;
    const int here = graph_.operators[static_cast<std::size_t>(i.op)].layer;
    if (here != layer) starts.push_back(k);
    layer = here;
  }
  std::map<std::size_t, std::vector<BufferId>> before;
  std::set<BufferId> seen;
  for (std::size_t k = 0; k < block.instructions.size(); ++k) {
    const auto change = [&](std::vector<BufferId>& ids) {
      for (BufferId& id : ids) {
        const auto it = list.find(id);
        if (it == list.end()) continue;
        id = it->second;
        // Blocks of one backward share what came back first.
        if (host_of.count(id) == 0 || !seen.insert(id).second) continue;
        const auto next = std::upper_bound(starts.begin(), starts.end(), k);
        const auto n = next - starts.begin();
        before[n >= 2 ? starts[static_cast<std::size_t>(n) - 2] : 0].push_back(id);
      }
    };
    Instruction& i = block.instructions[k];
    for (auto* ids : {&i.reads, &i.parameters, &i.outputs, &i.gradients, &i.statistics,
                      &i.backward_statistics, &i.extras, &i.writes})
      change(*ids);
  }
  std::vector<Instruction> merged;
  for (std::size_t k = 0; k <= block.instructions.size(); ++k) {
    for (const BufferId id : before[k]) {
      merged.push_back(copy(host_of.at(id), id));
      merged.back().after_compute = true;
    }
    if (k < block.instructions.size()) merged.push_back(std::move(block.instructions[k]));
  }
  block.instructions = std::move(merged);
  if (block.kind == BlockKind::backward && splits_backward(plan_.schedule)) {
    for (const BufferId id : seen) host_of.erase(id);
  }
}

void Lowering::place_memory() {
  const auto rank_of = [&](const Block& b) {
    switch (b.kind) {
      case BlockKind::start:
        return -1;
      case BlockKind::forward:
        return b.chunk;
      case BlockKind::backward:
        return chunks_ + 2 * (chunks_ - b.chunk);
      case BlockKind::backward_weight:  // some time after its backward
        return chunks_ + 2 * (chunks_ - b.chunk) + 1;
      case BlockKind::step:
        return 4 * chunks_ + 2;
    }
    return 0;
  };
  std::vector<int> last(p_.buffers.size(), -2),
      first(p_.buffers.size(), std::numeric_limits<int>::max());
  const auto persistent = [&](BufferId id) {
    const Buffer& b = p_.buffers[id.index()];
    return b.scope == Scope::step && b.category != Category::workspace;
  };
  // What lives in another buffer's memory keeps that one alive.
  std::vector<BufferId> root(p_.buffers.size());
  for (std::size_t i = 0; i < root.size(); ++i) root[i] = p_.memory_of(BufferId{i});
  for (const Block& b : p_.blocks) {
    const int r = rank_of(b);
    for (const Instruction& i : b.instructions) {
      const auto note = [&](BufferId used) {
        const BufferId id = root[used.index()];
        last[id.index()] = std::max(last[id.index()], r);
        first[id.index()] = std::min(first[id.index()], r);
      };
      for_each_read(i, note);
      for_each_write(i, note);
    }
  }
  for (Block& b : p_.blocks) {
    const int r = rank_of(b);
    std::map<BufferId, std::size_t> first_at, last_at;
    for (std::size_t k = 0; k < b.instructions.size(); ++k) {
      const auto note = [&](BufferId used) {
        const BufferId id = root[used.index()];
        if (persistent(id)) return;
        if (first[id.index()] == r) first_at.emplace(id, k);
        if (last[id.index()] == r) last_at[id] = k;
      };
      for_each_read(b.instructions[k], note);
      for_each_write(b.instructions[k], note);
    }
    std::vector<std::vector<BufferId>> before(b.instructions.size()), after(b.instructions.size());
    for (const auto& [id, k] : first_at) before[k].push_back(id);
    for (const auto& [id, k] : last_at) after[k].push_back(id);
    std::vector<Instruction> merged;
    merged.reserve(b.instructions.size() * 2);
    for (std::size_t k = 0; k < b.instructions.size(); ++k) {
      if (!before[k].empty()) {
        Instruction i;
        i.kind = Kind::allocate;
        i.writes = before[k];
        merged.push_back(std::move(i));
      }
      merged.push_back(std::move(b.instructions[k]));
      if (!after[k].empty()) {
        Instruction i;
        i.kind = Kind::free;
        i.reads = after[k];
        merged.push_back(std::move(i));
      }
    }
    b.instructions = std::move(merged);
  }
}

}  // namespace partita::lowering
