#include <fmt/format.h>

#include <numeric>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

void Lowering::start_and_step(int stage) {
  Block start, step;
  start.name = fmt::format("start {}", stage);
  step.name = fmt::format("step {}", stage);
  start.kind = BlockKind::start;
  step.kind = BlockKind::step;
  start.stage = step.stage = stage;
  start.chunk = step.chunk = -1;
  Instruction zero;
  zero.kind = Kind::compute;
  zero.kernel = Kernel::zero;
  for (const auto& [q, v] : on_stage(stage)) {
    if (!graph_.parameter(q).trainable) continue;
    if (v.gradient.valid() && stored_.count(v.gradient) == 0) zero.writes.push_back(v.gradient);
    if (v.shard.valid()) zero.writes.push_back(v.shard);
  }
  if (!zero.writes.empty()) start.instructions.push_back(std::move(zero));
  if (plan_.loss_scale.initial > 0) {
    Instruction begin;
    begin.kind = Kind::compute;
    begin.kernel = Kernel::loss_scale;
    begin.outputs = {loss_scale_state(stage)};
    begin.writes = {loss_scale(stage)};
    start.instructions.push_back(std::move(begin));
  }
  for (auto& i : late_calls_[stage]) step.instructions.push_back(std::move(i));
  for (const auto& [q, v] : on_stage(stage)) {
    if (!graph_.parameter(q).trainable || !reduced_late(stage, q)) continue;
    Bucket one;
    one.parameters = {q};
    const BufferId gradient = v.gradient;
    for (auto& i : synchronise(stage, one, [gradient](ParameterId) { return gradient; }))
      step.instructions.push_back(std::move(i));
  }
  if (!late_owed_[stage].empty()) {
    std::map<AtomMask, std::vector<ParameterId>> by_owed;
    for (const ParameterId q : late_owed_[stage]) {
      if (const AtomMask rest = owed(on_stage(stage).at(q)); rest != 0) by_owed[rest].push_back(q);
    }
    for (const auto& [rest, list] : by_owed) append_owed(step.instructions, stage, list, rest);
  }
  for (auto& i : decoding_[stage]) step.instructions.push_back(std::move(i));
  // Tied parameters: the readers' gradients are summands of one.
  for (const auto& [q, here] : on_stage(stage)) {
    if (!has_ties(q) || !graph_.parameter(q).trainable || plan_.servers > 0) continue;
    std::vector<int> stages;
    for (int s = 0; s < stages_; ++s) {
      if (on_stage(s).count(q)) stages.push_back(s);
    }
    Instruction i;
    i.kind = Kind::collective;
    i.collective = CollectiveKind::all_reduce;
    i.tie = tie(stages);
    i.stream = stream("tied parameters");
    ParameterOnStage& v = on_stage(stage).at(q);
    i.reads = {v.reduced};
    v.reduced = shard_buffer(q, v, ".grad_tied", 0);
    i.writes = {v.reduced};
    step.instructions.push_back(std::move(i));
  }
  const BufferId skip = plan_.loss_scale.initial > 0 ? unscale_gradients(step, stage) : BufferId{};
  if (plan_.optimizer.clip > 0) clip_gradients(step, stage);
  std::map<AtomMask, Instruction> gathers;
  for (auto& [q, v] : on_stage(stage)) {
    const Parameter& parameter = graph_.parameter(q);
    if (!parameter.trainable || plan_.servers > 0) continue;
    const bool shard_in_place = plan_.zero == 3 || v.scattered == 0;
    BufferId target = v.value;
    if (!shard_in_place) {
      target = buffer(parameter.name + ".shard", Category::parameters, Scope::step, parameter.shape,
                      v.state_layout, plan_.precision.parameters);
      p_.buffers[target.index()].parameter = q.value;
      p_.buffers[target.index()].alias = v.value.value;
      Instruction i;
      i.kind = Kind::slice;
      i.reads = {v.value};
      i.writes = {target};
      step.instructions.push_back(std::move(i));
    }
    Instruction i = update_of(q, v.reduced, target, v.state_layout);
    i.atoms = v.scattered;
    if ((v.scattered | v.gradient_layout.partial) != 0)
      i.index = plan_.zero >= 2 ? p_.micro_batches : 1;
    if (skip.valid()) i.statistics = {skip, loss_scale_state(stage)};
    if (plan_.offload_optimizer) {
      update_on_host(step, q, std::move(i));
    } else {
      step.instructions.push_back(std::move(i));
    }
    if (!shard_in_place) {
      Instruction& g = gathers[v.scattered];
      g.kind = Kind::collective;
      g.collective = CollectiveKind::all_gather;
      g.atoms = v.scattered;
      g.stream = state_stream(v.scattered);
      g.reads.push_back(target);
      g.writes.push_back(v.value);
    }
  }
  for (auto& [atoms, g] : gathers) step.instructions.push_back(std::move(g));
  if (skip.valid()) {
    Instruction adapt;
    adapt.kind = Kind::compute;
    adapt.kernel = Kernel::loss_scale;
    adapt.index = 1;
    adapt.reads = {skip};
    adapt.outputs = {loss_scale_state(stage)};
    step.instructions.push_back(std::move(adapt));
  }
  if (plan_.servers > 0) pull(step, stage);
  if (plan_.average_every > 0 && plan_.replicas != 0) average_parameters(step, stage);
  start_of_.push_back(BlockId{p_.blocks.size()});
  p_.blocks.push_back(std::move(start));
  step_of_.push_back(BlockId{p_.blocks.size()});
  p_.blocks.push_back(std::move(step));
}

Instruction Lowering::update_of(ParameterId q, BufferId gradient, BufferId target,
                                const Layout& state) {
  const Parameter& parameter = graph_.parameter(q);
  Instruction i;
  i.kind = Kind::compute;
  i.kernel = Kernel::optimizer;
  i.reads = {gradient};
  const int states = optimizer_states(plan_.optimizer);
  for (int k = 0; k < states; ++k) {
    i.outputs.push_back(buffer(fmt::format("{}.state{}", parameter.name, k), Category::optimizer,
                               Scope::step, parameter.shape, state, plan_.precision.optimizer));
  }
  if (plan_.precision.master_copy) {
    i.extras.push_back(buffer(parameter.name + ".master", Category::optimizer, Scope::step,
                              parameter.shape, state, ElementType::fp32));
    // The parameter's shard is it.
    if (shards_masters(state)) p_.buffers[i.extras.back().index()].kept_bits = -1;
  }
  i.writes = {target};
  i.accumulate = true;
  return i;
}

void Lowering::update_on_host(Block& step, ParameterId q, Instruction i) {
  const BufferId target = i.writes[0];
  for (auto* list : {&i.outputs, &i.extras}) {
    for (const BufferId id : *list) p_.buffers[id.index()].host = true;
  }
  const BufferId gradient = on_host(i.reads[0], ".host", Category::gradients);
  const BufferId value = on_host(target, ".host", Category::parameters);
  p_.buffers[value.index()].parameter = q.value;
  step.instructions.push_back(copy(i.reads[0], gradient));
  step.instructions.back().after_compute = true;
  i.reads[0] = gradient;
  i.writes[0] = value;
  i.stream = stream("host");
  step.instructions.push_back(std::move(i));
  step.instructions.push_back(copy(value, target));
}

void Lowering::average_parameters(Block& step, int stage) {
  const AtomMask atoms = plan_.replicas;
  const auto every = static_cast<std::int32_t>(plan_.average_every);
  for (const auto& [q, v] : on_stage(stage)) {
    const Parameter& parameter = graph_.parameter(q);
    if (!parameter.trainable) continue;
    Layout owed = p_.buffers[v.value.index()].layout;
    owed.partial = atoms;
    Layout whole = owed;
    whole.partial = 0;
    const auto working = [&](const char* suffix, const Layout& l) {
      return buffer(parameter.name + suffix, Category::workspace, Scope::step, parameter.shape, l,
                    plan_.precision.parameters);
    };
    Instruction share;
    share.kind = Kind::compute;
    share.kernel = Kernel::scale;
    share.atoms = atoms;
    share.every = every;
    share.reads = {v.value};
    share.writes = {working(".share", owed)};
    Instruction sum;
    sum.kind = Kind::collective;
    sum.collective = CollectiveKind::all_reduce;
    sum.atoms = atoms;
    sum.every = every;
    sum.stream = state_stream(atoms);
    sum.reads = share.writes;
    sum.writes = {working(".average", whole)};
    Instruction copy;
    copy.kind = Kind::compute;
    copy.kernel = Kernel::add;
    copy.every = every;
    copy.reads = sum.writes;
    copy.writes = {v.value};
    step.instructions.push_back(std::move(share));
    step.instructions.push_back(std::move(sum));
    step.instructions.push_back(std::move(copy));
  }
}

BufferId Lowering::scalar(const std::string& name, AtomMask owed, Category category,
                          std::int64_t n) {
  Layout l;
  l.partial = owed;
  Shape shape;
  if (n > 0) shape.push_back({Dim::feature, n}), l.dims.resize(1);
  return buffer(name, category, Scope::step, shape, l, ElementType::fp32);
}

BufferId Lowering::loss_scale_state(int stage) {
  auto& id = loss_scale_state_[stage];
  if (!id.valid()) id = scalar("loss scale state", 0, Category::optimizer, 3);
  return id;
}

BufferId Lowering::loss_scale(int stage) {
  if (plan_.loss_scale.initial == 0) return BufferId{};
  auto& id = loss_scale_[stage];
  if (!id.valid()) id = scalar("loss scale", 0, Category::gradients);
  return id;
}

BufferId Lowering::unscale_gradients(Block& step, int stage) {
  std::vector<BufferId> all;
  for (const auto& [q, v] : on_stage(stage)) {
    if (graph_.parameter(q).trainable) all.push_back(v.reduced);
  }
  if (!all.empty()) {
    Instruction i;
    i.kind = Kind::compute;
    i.kernel = Kernel::unscale;
    i.accumulate = true;
    i.reads = {loss_scale(stage)};
    i.writes = std::move(all);
    step.instructions.push_back(std::move(i));
  }
  return over_gradients(step, stage, Kernel::not_finite, "overflow");
}

void Lowering::clip_gradients(Block& step, int stage) {
  std::vector<BufferId> all;
  for (const auto& [q, v] : on_stage(stage)) {
    if (graph_.parameter(q).trainable) all.push_back(v.reduced);
  }
  const BufferId total = over_gradients(step, stage, Kernel::square_sum, "gradient norm");
  if (all.empty()) return;
  Instruction i;
  i.kind = Kind::compute;
  i.kernel = Kernel::clip;
  i.accumulate = true;
  i.reads = {total};
  i.writes = std::move(all);
  step.instructions.push_back(std::move(i));
}

BufferId Lowering::over_gradients(Block& step, int stage, Kernel kernel, const std::string& what) {
  std::map<AtomMask, std::vector<BufferId>> by_cut;
  for (const auto& [q, v] : on_stage(stage)) {
    if (!graph_.parameter(q).trainable) continue;
    // A tied parameter's gradient is on all its stages and counts on the first.
    bool earlier = false;
    for (int s = 0; s < stage; ++s) earlier |= on_stage(s).count(q) > 0;
    if (!earlier) by_cut[split_atoms(p_.buffer(v.reduced).layout)].push_back(v.reduced);
  }
  std::vector<BufferId> sums;
  for (auto& [cut, list] : by_cut) {
    Instruction i;
    i.kind = Kind::compute;
    i.kernel = kernel;
    i.reads = std::move(list);
    i.writes = {scalar(what, cut, Category::workspace)};
    sums.push_back(i.writes[0]);
    step.instructions.push_back(std::move(i));
    if (cut == 0) continue;
    Instruction reduce = reduction(cut, CollectiveKind::all_reduce);
    reduce.reads = {sums.back()};
    reduce.writes = {scalar(what, 0, Category::workspace)};
    sums.back() = reduce.writes[0];
    step.instructions.push_back(std::move(reduce));
  }
  BufferId total = sums.empty() ? BufferId{} : sums[0];
  if (sums.size() != 1) {
    Instruction i;
    i.kind = Kind::compute;
    i.kernel = sums.empty() ? Kernel::zero : Kernel::add;
    i.reads = sums;
    total = scalar(what, 0, Category::workspace);
    i.writes = {total};
    step.instructions.push_back(std::move(i));
  }
  if (stages_ > 1) {
    std::vector<int> stages(static_cast<std::size_t>(stages_));
    std::iota(stages.begin(), stages.end(), 0);
    Instruction i;
    i.kind = Kind::collective;
    i.collective = CollectiveKind::all_reduce;
    i.tie = tie(stages);
    i.stream = stream("gradient norm");
    i.reads = {total};
    total = scalar(what, 0, Category::workspace);
    p_.buffers[i.reads[0].index()].name = what + " of a stage";
    i.writes = {total};
    step.instructions.push_back(std::move(i));
  }
  return total;
}

int Lowering::tie(const std::vector<int>& stages) {
  for (std::size_t i = 0; i < p_.ties.size(); ++i) {
    if (p_.ties[i] == stages) return static_cast<int>(i);
  }
  p_.ties.push_back(stages);
  return static_cast<int>(p_.ties.size()) - 1;
}

}  // namespace partita::lowering
