#include "simulator/lower/lowering.h"

namespace partita::lowering {

std::vector<Lowering::Bucket> Lowering::buckets(const Backward& b) {
  std::vector<std::pair<std::size_t, ParameterId>> order;
  for (const auto& [q, at] : b.ready_at) order.emplace_back(at, q);
  std::sort(order.begin(), order.end());
  std::vector<Bucket> done;
  const bool by_unit = plan_.reduces_units && plan_.zero == 3;
  std::map<std::tuple<AtomMask, AtomMask, bool, int>, Bucket> open;
  for (const auto& [at, q] : order) {
    const ParameterOnStage& v = on_stage(b.block.stage).at(q);
    if (v.scattered == 0 && v.gradient_layout.partial == 0) continue;
    if (reduced_late(b.block.stage, q)) continue;
    const auto key =
        std::tuple{v.scattered, v.gradient_layout.partial, has_ties(q), by_unit ? v.unit : 0};
    Bucket& bucket = open[key];
    bucket.parameters.push_back(q);
    bucket.ready = at;
    bucket.bytes +=
        storage(plan_.precision.gradient_communication,
                local_elements(p_.mesh, v.layout, graph_.parameter(q).shape, false, 0, 0));
    if (!by_unit && bucket.bytes >= plan_.bucket) {
      done.push_back(bucket);
      open.erase(key);
    }
  }
  for (auto& [key, bucket] : open) done.push_back(bucket);
  std::stable_sort(done.begin(), done.end(),
                   [](const Bucket& x, const Bucket& y) { return x.ready < y.ready; });
  return done;
}

bool Lowering::reduced_late(int stage, ParameterId q) const {
  return plan_.zero < 2 && on_stage(stage).at(q).chunks > 1;
}

bool Lowering::has_ties(ParameterId q) const {
  int stages = 0;
  for (const auto& here : on_stage_) stages += here.count(q) > 0 ? 1 : 0;
  return stages > 1;
}

std::vector<Instruction> Lowering::synchronise(int stage, const Bucket& bucket,
                                               const std::function<BufferId(ParameterId)>& source) {
  std::vector<Instruction> all;
  const ParameterOnStage& first = on_stage(stage).at(bucket.parameters[0]);
  const AtomMask scattered = first.scattered;
  const AtomMask owed = static_cast<AtomMask>(first.gradient_layout.partial & ~scattered);
  std::vector<BufferId> at;
  for (const ParameterId q : bucket.parameters) at.push_back(source(q));
  if (scattered != 0) {
    Instruction i;
    i.kind = Kind::collective;
    i.collective = plan_.root_state != 0 ? CollectiveKind::reduce : CollectiveKind::reduce_scatter;
    i.atoms = scattered;
    i.stream = state_stream(scattered);
    i.accumulate = plan_.zero >= 2;
    i.reads = at;
    for (std::size_t k = 0; k < at.size(); ++k) {
      ParameterOnStage& v = on_stage(stage).at(bucket.parameters[k]);
      if (plan_.zero < 2) v.reduced = shard_buffer(bucket.parameters[k], v, ".grad_shard", owed);
      i.writes.push_back(v.reduced);
      at[k] = v.reduced;
    }
    all.push_back(std::move(i));
  }
  if (owed != 0 && plan_.zero < 2) {
    if (plan_.servers > 0) {
      push(all, stage, bucket.parameters, owed);
      return all;
    }
    std::vector<ParameterId> plain, shortened;
    for (const ParameterId q : bucket.parameters)
      (compresses(q, owed) ? shortened : plain).push_back(q);
    if (!plain.empty()) append_owed(all, stage, plain, owed);
    if (!shortened.empty()) append_compressed(all, stage, shortened, owed);
  }
  return all;
}

Instruction Lowering::reduction(AtomMask atoms, CollectiveKind kind) {
  Instruction i;
  i.kind = Kind::collective;
  i.collective = kind;
  i.atoms = atoms;
  i.stream = state_stream(atoms);
  return i;
}

BufferId Lowering::shard_buffer(ParameterId q, const ParameterOnStage& v, const char* suffix,
                                AtomMask partial) {
  Layout l = v.state_layout;
  l.partial = partial;
  const BufferId b = buffer(graph_.parameter(q).name + suffix, Category::gradients, Scope::step,
                            graph_.parameter(q).shape, l, plan_.precision.gradients);
  p_.buffers[b.index()].alias = v.reduced.value;
  p_.buffers[b.index()].parameter = q.value;
  return b;
}

AtomMask Lowering::owed(const ParameterOnStage& v) {
  return static_cast<AtomMask>(v.gradient_layout.partial & ~v.scattered);
}

void Lowering::append_owed(std::vector<Instruction>& all, int stage,
                           const std::vector<ParameterId>& list, AtomMask owed) {
  Instruction i;
  i.kind = Kind::collective;
  i.collective = CollectiveKind::all_reduce;
  i.atoms = owed;
  i.stream = state_stream(owed);
  for (const ParameterId q : list) {
    ParameterOnStage& v = on_stage(stage).at(q);
    i.reads.push_back(v.reduced);
    const AtomMask before = p_.buffer(v.reduced).layout.partial;
    v.reduced = shard_buffer(q, v, ".grad_sum", static_cast<AtomMask>(before & ~owed));
    i.writes.push_back(v.reduced);
  }
  all.push_back(std::move(i));
}

void Lowering::finish_backward(Backward b) {
  const int stage = b.block.stage;
  const auto all = buckets(b);
  std::vector<std::vector<Instruction>> calls;
  for (const Bucket& bucket : all) {
    calls.push_back(synchronise(stage, bucket, [&](ParameterId q) {
      const auto it = b.micro_batch_gradients.find(q);
      return it != b.micro_batch_gradients.end() ? it->second : on_stage(stage).at(q).gradient;
    }));
    if (plan_.zero < 2) continue;
    // A shard is whole after the last micro-batch's scatter, unless other chunks add to it.
    std::map<AtomMask, std::vector<ParameterId>> by_owed;
    for (const ParameterId q : bucket.parameters) {
      const ParameterOnStage& v = on_stage(stage).at(q);
      if (!plan_.overlap_gradients || plan_.sums_copies_last || v.chunks > 1)
        late_owed_[stage].insert(q);
      else if (const AtomMask rest = owed(v); rest != 0)
        by_owed[rest].push_back(q);
    }
    for (const auto& [rest, list] : by_owed) append_owed(calls.back(), stage, list, rest);
  }
  // The block whose end completes the gradients; its last call in a step reduces them.
  Block& sums = weights(b);
  Block last = sums;
  const auto insert = [&](Block& block, bool scatters_only) {
    std::vector<Instruction> merged;
    std::size_t next = 0;
    for (std::size_t k = 0; k <= block.instructions.size(); ++k) {
      for (; next < all.size() && all[next].ready <= k; ++next) {
        for (const Instruction& i : calls[next]) {
          // Every micro-batch scatters under ZeRO-2 and -3; other sums are paid after the last
          // one.
          if (scatters_only &&
              !(plan_.zero >= 2 && (i.collective == CollectiveKind::reduce_scatter ||
                                    i.collective == CollectiveKind::reduce)))
            continue;
          merged.push_back(i);
        }
      }
      if (k < block.instructions.size()) merged.push_back(std::move(block.instructions[k]));
    }
    block.instructions = std::move(merged);
  };
  insert(sums, true);
  const auto chunk = static_cast<std::size_t>(sums.chunk);
  const auto keep = [&](std::vector<BlockId>& list, Block block) {
    list[chunk] = BlockId{p_.blocks.size()};
    p_.blocks.push_back(std::move(block));
  };
  if (splits_backward(plan_.schedule)) keep(data_of_, std::move(b.block));
  keep(backward_of_, std::move(sums));
  if (plan_.overlap_gradients) {
    insert(last, false);
    last.name += " last";
  } else {
    insert(last, true);
    for (auto& c : calls) {
      if (plan_.zero >= 2) continue;
      for (auto& i : c) {
        // Called when the backward is over, on a stream that waits for what was launched before.
        i.after_compute = i.stream != kComputeStream;
        late_calls_[stage].push_back(std::move(i));
      }
    }
  }
  keep(last_backward_of_, std::move(last));
}

}  // namespace partita::lowering
