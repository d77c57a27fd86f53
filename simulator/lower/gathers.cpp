#include "simulator/lower/lowering.h"

namespace partita::lowering {

BufferId Lowering::parameter_for(Block& block, Gathered& gathered,
                                 const std::vector<int>& unit_order, ParameterId q) {
  const ParameterOnStage& v = on_stage(block.stage).at(q);
  if (plan_.zero < 3 || v.scattered == 0) return v.value;
  if (gathered.whole.find(q) == gathered.whole.end()) gather_unit(block, gathered, v.unit, false);
  prefetch_after(block, gathered, unit_order, v.unit);
  copy_out(block, gathered, v.unit);
  return gathered.whole.at(q);
}

void Lowering::copy_out(Block& block, Gathered& gathered, int unit) {
  const auto all = gathered.copies.find(unit);
  if (all == gathered.copies.end()) return;
  for (const auto& [from, to] : all->second) {
    Instruction i;
    i.kind = Kind::slice;
    i.reads = {from};
    i.writes = {to};
    i.index = static_cast<std::int32_t>(all->second.size());
    block.instructions.push_back(std::move(i));
  }
  gathered.copies.erase(all);
}

void Lowering::prefetch_after(Block& block, Gathered& gathered, const std::vector<int>& unit_order,
                              int unit) {
  const auto at = std::find(unit_order.begin(), unit_order.end(), unit);
  if (at == unit_order.end() || at + 1 == unit_order.end()) return;
  if (std::find(gathered.units.begin(), gathered.units.end(), *(at + 1)) == gathered.units.end()) {
    gather_unit(block, gathered, *(at + 1), true);
  }
}

void Lowering::gather_unit(Block& block, Gathered& gathered, int unit, bool ahead) {
  gathered.units.push_back(unit);
  std::map<AtomMask, Instruction> calls;  // one call per group of ranks
  for (const auto& [q, v] : on_stage(block.stage)) {
    if (v.unit != unit || v.scattered == 0) continue;
    // Only what this chunk reads: a stage of an interleaved schedule holds several chunks.
    if (!used_in_chunk(q, block.chunk)) continue;
    const BufferId whole = buffer(graph_.parameter(q).name, Category::buffers, Scope::micro_batch,
                                  graph_.parameter(q).shape, v.layout, plan_.precision.parameters);
    p_.buffers[whole.index()].parameter = q.value;
    gathered.whole[q] = whole;
    BufferId arrives = whole;
    if (plan_.allocations.copies_gathered) {
      arrives =
          buffer(graph_.parameter(q).name + ".gathered", Category::buffers, Scope::micro_batch,
                 graph_.parameter(q).shape, v.layout, plan_.precision.parameters);
      gathered.copies[unit].emplace_back(arrives, whole);
    }
    Instruction& i = calls[v.scattered];
    i.kind = Kind::collective;
    i.collective = plan_.root_state != 0 ? CollectiveKind::broadcast : CollectiveKind::all_gather;
    i.atoms = v.scattered;
    i.stream = state_stream(v.scattered);
    i.after_compute = ahead;
    i.reads.push_back(v.value);
    i.writes.push_back(arrives);
  }
  for (auto& [atoms, i] : calls) block.instructions.push_back(std::move(i));
}

Lowering::Gathered Lowering::stays_gathered(int chunk) const {
  const Gathered& all = gathered_forward_[static_cast<std::size_t>(chunk)];
  if (!plan_.reshard_after_forward) return all;
  Gathered some;
  const auto& here = on_stage(stage_of_chunk(chunk));
  std::vector<int> units = units_of_chunk(chunk);
  std::reverse(units.begin(), units.end());
  const bool ends = chunk % network_chunks_ == network_chunks_ - 1;
  std::int64_t read_again = 0;  // elements of parameters, before the backward wants this unit's
  for (std::size_t k = 0; k < units.size(); ++k) {
    const bool in_block = units[k] >= 0 && units[k] < graph_.layers;
    const StaysGathered& rule = plan_.stays_gathered;
    const bool stays = rule.kind == StaysGathered::last   ? ends && k == 0
                       : rule.kind == StaysGathered::root ? !in_block
                                                          : ends && read_again < rule.elements;
    if (stays) some.units.push_back(units[k]);
    for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
      for (const ParameterId q : graph_.op(id).parameters) {
        const ParameterOnStage& v = here.at(q);
        if (v.unit != units[k]) continue;
        if (const auto it = all.whole.find(q); stays && it != all.whole.end())
          some.whole.insert(*it);
        const int reads = segment_[id.index()] >= 0 ? 3 : 2;
        read_again +=
            reads * local_elements(p_.mesh, v.layout, graph_.parameter(q).shape, false, 0, 0);
      }
    }
  }
  return some;
}

bool Lowering::used_in_chunk(ParameterId q, int chunk) const {
  for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
    const auto& list = graph_.op(id).parameters;
    if (std::find(list.begin(), list.end(), q) != list.end()) return true;
  }
  return false;
}

std::vector<int> Lowering::units_of_chunk(int chunk) const {
  std::vector<int> order;
  for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
    const Operator& op = graph_.op(id);
    for (const ParameterId q : op.parameters) {
      const int unit = on_stage(stage_of_chunk(chunk)).at(q).unit;
      if (std::find(order.begin(), order.end(), unit) == order.end()) order.push_back(unit);
    }
  }
  return order;
}

std::map<ParameterId, ParameterOnStage>& Lowering::on_stage(int s) {
  return on_stage_[static_cast<std::size_t>(s)];
}

const std::map<ParameterId, ParameterOnStage>& Lowering::on_stage(int s) const {
  return on_stage_[static_cast<std::size_t>(s)];
}

}  // namespace partita::lowering
