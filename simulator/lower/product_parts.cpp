#include "simulator/lower/lowering.h"

namespace partita::lowering {

void Lowering::sum_in_turn() {
  const AtomMask tp = mask_of(plan_.axes.at("tp"));
  for (Block& block : p_.blocks) {
    if (block.kind != BlockKind::backward) continue;
    for (Instruction& i : block.instructions) {
      const bool sums = i.collective == CollectiveKind::all_reduce ||
                        i.collective == CollectiveKind::reduce_scatter;
      if (i.kind == Kind::collective && sums && i.atoms == tp && i.tie < 0) i.after_compute = true;
    }
  }
}

void Lowering::gather_in_turn() {
  const AtomMask tp = mask_of(plan_.axes.at("tp"));
  for (Block& block : p_.blocks) {
    if (block.kind != BlockKind::backward) continue;
    auto& all = block.instructions;
    for (std::size_t k = all.size(); k-- > 0;) {
      const Instruction& i = all[k];
      if (i.kind != Kind::collective || i.collective != CollectiveKind::all_gather ||
          i.atoms != tp || i.tie >= 0)
        continue;
      const auto meets = [&](const Instruction& x) {
        bool found = false;
        for_each_read(x, [&](BufferId id) { found = found || id == i.writes[0]; });
        for_each_write(x, [&](BufferId id) { found = found || id == i.reads[0]; });
        return found;
      };
      const auto from = all.begin() + static_cast<std::ptrdiff_t>(k);
      const auto to = std::find_if(from + 1, all.end(), meets);
      if (to == all.end()) continue;  // for a block of weights' gradients
      from->after_compute = true;
      std::rotate(from, from + 1, to);
    }
  }
}

void Lowering::split_products() {
  // Buffers that every block which uses them makes itself. (A chunk's backward is there twice:
  // for the last micro-batch and the others.)
  std::vector<std::set<std::size_t>> used(p_.buffers.size()), made(p_.buffers.size());
  for (std::size_t at = 0; at < p_.blocks.size(); ++at) {
    for (const Instruction& i : p_.blocks[at].instructions) {
      for_each_read(i, [&](BufferId id) { used[id.index()].insert(at); });
      for_each_write(i, [&](BufferId id) { made[id.index()].insert(at); });
    }
  }
  const auto local = [&](BufferId id) {
    return std::includes(made[id.index()].begin(), made[id.index()].end(), used[id.index()].begin(),
                         used[id.index()].end());
  };
  for (Block& block : p_.blocks) {
    if (block.kind == BlockKind::start || block.kind == BlockKind::step) continue;
    std::map<std::size_t, std::vector<Instruction>> instead;
    for (std::size_t k = 0; k < block.instructions.size(); ++k) {
      const Instruction& i = block.instructions[k];
      if (i.kind != Kind::collective || i.reads.size() != 1 || i.tie >= 0) continue;
      if (i.collective == CollectiveKind::all_gather && crosses_sequence(i, i.reads[0]) &&
          local(i.writes[0])) {
        gather_in_parts(block, k, instead);
      } else if (i.collective == CollectiveKind::reduce_scatter &&
                 crosses_sequence(i, i.writes[0]) && local(i.reads[0])) {
        scatter_in_parts(block, k, instead);
      }
    }
    std::vector<Instruction> merged;
    for (std::size_t k = 0; k < block.instructions.size(); ++k) {
      const auto it = instead.find(k);
      if (it == instead.end()) {
        merged.push_back(std::move(block.instructions[k]));
        continue;
      }
      for (Instruction& i : it->second) merged.push_back(std::move(i));
    }
    block.instructions = std::move(merged);
  }
}

bool Lowering::crosses_sequence(const Instruction& i, BufferId cut) const {
  const Buffer& b = p_.buffer(cut);
  const int d = sequence_dim(b);
  if (d < 0 || b.routed || i.atoms != mask_of(plan_.axes.at("tp"))) return false;
  const DimSplit& s = b.layout.dims[static_cast<std::size_t>(d)];
  const auto before = atoms_before(s.atoms, i.atoms);
  return before && s.zigzag <= *before && s.shift == 0 && s.kind == SplitKind::block;
}

bool Lowering::is_product(const Instruction& i) const {
  return i.kind == Kind::compute && i.op >= 0 && i.part < 0 &&
         (i.kernel == Kernel::forward || i.kernel == Kernel::backward_data ||
          i.kernel == Kernel::backward_weight) &&
         std::holds_alternative<Linear>(p_.operators[static_cast<std::size_t>(i.op)].operation);
}

BufferId Lowering::shifted(BufferId id, std::int32_t shift, AtomMask ring) {
  Buffer b = p_.buffer(id);
  DimSplit& s = b.layout.dims[static_cast<std::size_t>(sequence_dim(b))];
  s.shift = shift % static_cast<std::int32_t>(p_.mesh.size(ring));
  s.fixed = s.shift == 0 ? std::uint8_t{0} : *atoms_before(s.atoms, ring);
  b.alias = -1;
  p_.buffers.push_back(std::move(b));
  return BufferId{p_.buffers.size() - 1};
}

Instruction Lowering::pass(BufferId from, BufferId to, AtomMask atoms, std::int32_t part) {
  Instruction i = reduction(atoms, CollectiveKind::shift);
  i.part = part;
  i.reads = {from};
  i.writes = {to};
  i.multiprocessors = plan_.overlap_multiprocessors;
  return i;
}

void Lowering::gather_in_parts(const Block& block, std::size_t at,
                               std::map<std::size_t, std::vector<Instruction>>& instead) {
  const Instruction& gather = block.instructions[at];
  const BufferId whole = gather.writes[0];
  std::vector<std::size_t> readers;
  for (std::size_t k = at + 1; k < block.instructions.size(); ++k) {
    const Instruction& i = block.instructions[k];
    bool reads = false;
    for_each_read(i, [&](BufferId id) { reads |= id == whole; });
    if (!reads) continue;
    if (!is_product(i) || instead.count(k)) return;
    readers.push_back(k);
  }
  if (readers.empty()) return;
  const auto n = static_cast<std::int32_t>(p_.mesh.size(gather.atoms));
  std::vector<BufferId> parts{gather.reads[0]};
  for (std::int32_t t = 1; t < n; ++t) parts.push_back(shifted(gather.reads[0], t, gather.atoms));
  instead[at] = {};
  for (const std::size_t k : readers) {
    auto& list = instead[k];
    for (std::int32_t t = 0; t < n; ++t) {
      const auto x = static_cast<std::size_t>(t);
      if (k == readers[0] && t + 1 < n)
        list.push_back(pass(parts[x], parts[x + 1], gather.atoms, t + 1));
      Instruction i = block.instructions[k];
      i.part = t;
      i.accumulate |= t > 0 && i.kernel == Kernel::backward_weight;
      for (auto* ids : {&i.reads, &i.gradients}) {
        for (BufferId& id : *ids) {
          if (id == whole) id = parts[x];
        }
      }
      list.push_back(std::move(i));
    }
  }
}

void Lowering::scatter_in_parts(const Block& block, std::size_t at,
                                std::map<std::size_t, std::vector<Instruction>>& instead) {
  const Instruction& scatter = block.instructions[at];
  const BufferId whole = scatter.reads[0];
  std::size_t writer = at, touched = 0;
  for (std::size_t k = 0; k < block.instructions.size(); ++k) {
    const Instruction& i = block.instructions[k];
    bool uses = false;
    for_each_read(i, [&](BufferId id) { uses |= id == whole; });
    for_each_write(i, [&](BufferId id) { uses |= id == whole; });
    if (!uses || k == at) continue;
    ++touched;
    if (is_product(i) && !i.accumulate && i.writes.size() == 1 && i.writes[0] == whole) writer = k;
  }
  if (writer == at || touched != 1 || instead.count(writer)) return;
  const auto n = static_cast<std::int32_t>(p_.mesh.size(scatter.atoms));
  std::vector<Instruction> list;
  BufferId sum;
  for (std::int32_t t = 0; t < n; ++t) {
    Instruction i = block.instructions[writer];
    i.part = t;
    const BufferId made = shifted(scatter.writes[0], t + 1, scatter.atoms);
    i.writes = {made};
    list.push_back(std::move(i));
    if (t > 0) {
      const BufferId arrived = shifted(scatter.writes[0], t + 1, scatter.atoms);
      // It went off before this part was computed.
      Instruction on = pass(sum, arrived, scatter.atoms, t);
      if (list[0].kernel == Kernel::forward && plan_.scatter_multiprocessors > 0 &&
          bits(p_.operators[static_cast<std::size_t>(list[0].op)].compute) > 8)
        on.multiprocessors = plan_.scatter_multiprocessors;
      list.insert(list.end() - 1, std::move(on));
      Instruction add;
      add.kind = Kind::compute;
      add.kernel = Kernel::add;
      add.part = t;
      add.atoms = scatter.atoms;
      add.multiprocessors = plan_.overlap_multiprocessors;
      add.reads = {arrived, made};
      add.writes = {t + 1 == n ? scatter.writes[0]
                               : shifted(scatter.writes[0], t + 1, scatter.atoms)};
      sum = add.writes[0];
      list.push_back(std::move(add));
    } else {
      sum = made;
    }
  }
  instead[writer] = std::move(list);
  instead[at] = {};
}

}  // namespace partita::lowering
