#include "simulator/lower/lower.h"

#include <fmt/format.h>

#include <limits>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

Feasible<Program> Lowering::run() {
  if (auto why = assign_chunks(); !why.reason.empty()) return why;
  if (auto why = derive_layouts(); !why.reason.empty()) return why;
  declare_inputs_and_parameters();
  if (auto why = place_parameters(); !why.reason.empty()) return why;
  find_segments();
  for (direction_ = 0; direction_ < directions(plan_.schedule); ++direction_) {
    const int first = direction_ * network_chunks_;
    for (int c = first; c < first + network_chunks_; ++c) forward_block(c);
    for (int c = first + network_chunks_; c-- > first;) backward_block(c);
  }
  for (int s = 0; s < stages_; ++s) start_and_step(s);
  order_blocks();
  loader_blocks();
  server_blocks();
  if ((plan_.sums_in_turn || plan_.tensor_parallel_in_turn) && plan_.replicas == 0) sum_in_turn();
  if (plan_.tensor_parallel_in_turn && plan_.replicas == 0) gather_in_turn();
  if (plan_.overlap_tensor_parallel) split_products();
  if (plan_.message_queue) broker_blocks();
  if (plan_.offload_activations) offload_activations();
  mark_casts();
  if (plan_.allocations.narrow_inputs) keep_narrow();
  if (plan_.narrow_gathers) gather_narrow();
  place_memory();
  return std::move(p_);
}

Infeasible Lowering::assign_chunks() {
  auto chunk = chunk_of_operators(graph_, plan_);
  if (!chunk) return chunk.why();
  chunk_of_ = std::move(*chunk);
  network_chunks_ = static_cast<int>(plan_.chunks());
  chunks_ = network_chunks_ * directions(plan_.schedule);
  stages_ = static_cast<int>(plan_.pp);
  ops_of_chunk_.resize(static_cast<std::size_t>(chunks_));
  for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
    for (int c = chunk_of_[i]; c < chunks_; c += network_chunks_)
      ops_of_chunk_[static_cast<std::size_t>(c)].push_back(OpId{i});
  }
  for (auto* list : {&data_of_, &backward_of_, &last_backward_of_})
    list->resize(static_cast<std::size_t>(chunks_));
  consumers_.resize(graph_.tensors.size());
  for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
    for (const TensorId t : graph_.operators[i].inputs) consumers_[t.index()].push_back(OpId{i});
  }
  needs_gradient_ = needs_gradient(graph_);
  p_.mesh = plan_.mesh;
  p_.pipeline = plan_.pipeline;
  p_.replicas = plan_.replicas;
  p_.micro_batches = static_cast<int>(plan_.micro_batches());
  p_.samples = plan_.strategy == "replicas" ? plan_.micro_batch : plan_.micro_batch * plan_.dp;
  p_.optimizer = plan_.optimizer;
  p_.staleness = static_cast<int>(plan_.staleness);
  p_.loss_scale = plan_.loss_scale;
  p_.compression = plan_.compression;
  p_.fp8_format = plan_.fp8_format;
  p_.launches = plan_.launches;
  p_.launches.waits_for_messages = plan_.launches.waits_for_messages && waits_for_sends();
  p_.kernels = plan_.kernels;
  if (plan_.scatter_messages && plan_.replicas == 0) {
    for (const int atom : plan_.axes.at("tp"))
      p_.scattered_messages |= static_cast<AtomMask>(AtomMask{1} << atom);
  }
  p_.allocations = plan_.allocations;
  p_.allocations.parameters = plan_.precision.parameters;
  p_.rows_once = plan_.rows_once;
  p_.overlap_experts = plan_.exchanges_beside_blocks();
  p_.expert_bias_apart = plan_.expert_bias_apart;
  if (plan_.replicas == 0) p_.data_parallel = plan_.axes.at("dp");
  p_.loss_tensor = graph_.loss.value;
  p_.average_every = plan_.replicas != 0 ? static_cast<int>(plan_.average_every) : 0;
  p_.packs_collectives = plan_.framework == "partita";
  p_.channels_first = plan_.channels_first;
  p_.score_passes_forward = plan_.score_passes_forward;
  p_.score_passes_backward = plan_.score_passes_backward;
  p_.sharded_storage = plan_.sharded_storage;
  p_.stages.resize(static_cast<std::size_t>(stages_));
  p_.streams = {"compute"};
  return {};
}

ElementType Lowering::compute_type(const Operation& op) const {
  const Precision& p = plan_.precision;
  if (bits(p.compute) > 8 || std::holds_alternative<GroupedProduct>(op)) return p.compute;
  const auto* linear = std::get_if<Linear>(&op);
  const bool block = linear != nullptr && linear->out.back().dim != Dim::vocabulary &&
                     linear->out.back().dim != Dim::expert &&
                     linear->out.back().dim != Dim::classes;
  return block ? p.compute : p.parameters;
}

bool Lowering::follows_normalise(const Operator& op) const {
  const auto* norm = std::get_if<Normalize>(&op.operation);
  if (norm != nullptr) return false;
  const bool sum = std::holds_alternative<Add>(op.operation);
  if (!sum && !std::holds_alternative<Activation>(op.operation)) return false;
  return std::any_of(graph_.operators.begin(), graph_.operators.end(), [&](const Operator& o) {
    if (std::none_of(o.outputs.begin(), o.outputs.end(), [&](TensorId t) {
          return std::find(op.inputs.begin(), op.inputs.end(), t) != op.inputs.end();
        }))
      return false;
    const auto* n = std::get_if<Normalize>(&o.operation);
    if (n != nullptr) return n->kind == Normalize::Kind::batch;
    return !sum && std::holds_alternative<Add>(o.operation) && follows_normalise(o);
  });
}

OpId Lowering::taker_of(const Operator& op) const {
  const TensorId t = op.outputs[0];
  if (consumers_[t.index()].size() != 1) return {};
  const OpId id = consumers_[t.index()][0];
  const Operator& next = graph_.op(id);
  if (std::holds_alternative<Attention>(next.operation) ||
      std::holds_alternative<GatedActivation>(next.operation) ||
      std::holds_alternative<GatedNorm>(next.operation))
    return id;
  if (std::holds_alternative<Normalize>(next.operation) ||
      std::holds_alternative<Rotary>(next.operation) ||
      std::holds_alternative<CausalConvolution>(next.operation) ||
      std::holds_alternative<StateSpace>(next.operation))
    return taker_of(next);
  return {};
}

void Lowering::join_projections() {
  std::map<std::tuple<TensorId, OpId, bool>, std::size_t> first;
  for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
    const Operator& op = graph_.operators[i];
    if (!std::holds_alternative<Linear>(op.operation) &&
        !std::holds_alternative<GroupedProduct>(op.operation))
      continue;
    const OpId taker = taker_of(op);
    if (!taker.valid()) continue;
    const auto key = std::tuple{op.inputs[0], taker, graph_.parameter(op.parameters[0]).trainable};
    const auto [at, is_first] = first.try_emplace(key, i);
    if (is_first) continue;
    p_.operators[at->second].joined.push_back(static_cast<int>(i));
    p_.operators[i].in_other = true;
  }
}

Infeasible Lowering::derive_layouts() {
  for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
    auto l = derive(graph_, plan_, OpId{i}, p_.samples, layouts_);
    if (!l) return l.why();
    const Operator& op = graph_.operators[i];
    ProgramOperator po;
    po.name = op.name;
    po.operation = op.operation;
    po.signature = l->signature;
    po.cuts = l->cuts;
    po.root = l->root;
    po.compute = compute_type(op.operation);
    po.has_loss = graph_.loss.valid() &&
                  std::find(op.outputs.begin(), op.outputs.end(), graph_.loss) != op.outputs.end();
    po.captured = matches(plan_.launches.graphs_of, op.name);
    po.in_normalise = plan_.fuses_normalise && follows_normalise(op);
    p_.operators.push_back(std::move(po));
    layouts_.push_back(std::move(*l));
  }
  if (plan_.joins_projections) join_projections();
  return {};
}

void Lowering::declare_inputs_and_parameters() {
  for (const Parameter& q : graph_.parameters) {
    p_.parameters.push_back({q.name, q.shape, q.initial_deviation, q.initial_value});
  }
  for (const TensorId t : graph_.inputs) {
    ProgramInput in;
    in.name = graph_.tensor(t).name;
    in.shape = with_samples(graph_.tensor(t).shape, p_.samples);
    in.tensor = t.value;
    for (const OpId c : consumers_[t.index()]) {
      const Operator& op = graph_.op(c);
      if (const auto* e = std::get_if<Embedding>(&op.operation)) in.values = e->vocabulary;
      if (std::holds_alternative<CrossEntropy>(op.operation) && op.inputs[1] == t) {
        in.values = graph_.tensor(op.inputs[0]).shape.back().extent;
      }
    }
    p_.inputs.push_back(in);
  }
}

bool Lowering::shards_masters(const Layout& state) const {
  return plan_.allocations.fp32_shards && plan_.zero == 3 && plan_.precision.master_copy &&
         !state.flat.empty();
}

Infeasible Lowering::place_parameters() {
  on_stage_.resize(static_cast<std::size_t>(stages_));
  for (int c = 0; c < chunks_; ++c) {
    if (auto why = place_parameters(c); !why.reason.empty()) return why;
  }
  for (int s = 0; s < stages_; ++s) {
    for (auto& [q, v] : on_stage_[static_cast<std::size_t>(s)]) {
      const Parameter& parameter = graph_.parameter(q);
      v.state_layout = v.layout;
      if (plan_.root_state != 0) {
        v.state_layout.root = plan_.root_state;
      } else if (plan_.zero > 0) {
        for (const AtomId a : plan_.zero_atoms) {
          // State is cut over the ranks that would hold copies of this parameter.
          if (!has(split_atoms(v.layout), a)) v.state_layout.flat.push_back(a);
        }
      }
      v.scattered = static_cast<AtomMask>(mask_of(v.state_layout.flat) | v.state_layout.root);
      const bool sharded = plan_.zero == 3 && v.scattered != 0;
      v.value = buffer(parameter.name, Category::parameters, Scope::step, parameter.shape,
                       sharded ? v.state_layout : v.layout, plan_.precision.parameters);
      p_.buffers[v.value.index()].parameter = q.value;
      if (!parameter.trainable) continue;
      const bool wide = sharded && shards_masters(v.state_layout);
      if (wide) p_.buffers[v.value.index()].kept_bits = 32;
      const bool scatter_each = plan_.zero >= 2 && v.scattered != 0;
      if (!scatter_each) {
        v.gradient = buffer(parameter.name + ".grad", Category::gradients, Scope::step,
                            parameter.shape, v.gradient_layout, plan_.precision.gradients);
        p_.buffers[v.gradient.index()].parameter = q.value;
        v.reduced = v.gradient;
      }
      if (v.scattered != 0 || v.gradient_layout.partial != 0) {
        Layout reduced = v.state_layout;
        reduced.partial = static_cast<AtomMask>(v.gradient_layout.partial & ~v.scattered);
        if (scatter_each) {
          v.shard = buffer(parameter.name + ".grad_shard", Category::gradients, Scope::step,
                           parameter.shape, reduced, plan_.precision.gradients);
          if (wide) p_.buffers[v.shard.index()].kept_bits = 32;
          v.reduced = v.shard;
        }
      }
    }
  }
  return {};
}

Infeasible Lowering::place_parameters(int chunk) {
  for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
    const std::size_t i = id.index();
    const Operator& op = graph_.operators[i];
    for (std::size_t k = 0; k < op.parameters.size(); ++k) {
      const ParameterId q = op.parameters[k];
      auto& here = on_stage_[static_cast<std::size_t>(stage_of_chunk(chunk))];
      auto it = here.find(q);
      if (it == here.end()) {
        ParameterOnStage v;
        v.layout = layouts_[i].parameters[k];
        v.gradient_layout = layouts_[i].parameter_gradients[k];
        v.unit = op.layer;
        it = here.emplace(q, v).first;
      } else if (!(it->second.layout == layouts_[i].parameters[k]) ||
                 !(it->second.gradient_layout == layouts_[i].parameter_gradients[k])) {
        return {fmt::format(
            "parameter {} is read with two shardings, the second by {}; cut both readers alike",
            graph_.parameter(q).name, op.name)};
      }
      if (it->second.last_chunk != chunk) ++it->second.chunks;
      it->second.last_chunk = chunk;
    }
  }
  return {};
}

void Lowering::find_segments() {
  segment_.assign(graph_.operators.size(), -1);
  int next = 0, last_layer = std::numeric_limits<int>::min();
  bool open = false, forgot = false;
  const RecomputeSet& set = plan_.recomputed();
  for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
    const Operator& op = graph_.operators[i];
    bool in = op.layer >= 0 && op.layer < graph_.layers, forgets = false;
    switch (set.kind) {
      case Recompute::none:
      case Recompute::selective:
        in = false;
        break;
      case Recompute::full:
        break;
      case Recompute::first:
        in = in && op.layer < set.first;
        break;
      case Recompute::attention:
        in = in && std::holds_alternative<Attention>(op.operation);
        break;
      case Recompute::patterns:
        in = false;
        for (const std::string& pattern : set.patterns) {
          const bool result_too = pattern[0] == '~';
          if (in || !matches(pattern.substr(result_too ? 1 : 0), op.name)) continue;
          in = true;
          forgets = result_too;
        }
        break;
    }
    in |= plan_.kernels.mamba_ssm && (std::holds_alternative<CausalConvolution>(op.operation) ||
                                      std::holds_alternative<StateSpace>(op.operation));
    if (in) {
      if (!open || op.layer != last_layer || forgets != forgot) {
        ++next;
        forgets_.push_back(forgets);
      }
      segment_[i] = next - 1;
    }
    open = in;
    forgot = forgets;
    last_layer = op.layer;
  }
  ops_of_segment_.resize(static_cast<std::size_t>(next));
  for (std::size_t i = 0; i < segment_.size(); ++i) {
    if (segment_[i] >= 0) ops_of_segment_[static_cast<std::size_t>(segment_[i])].push_back(OpId{i});
  }
  again_.assign(graph_.operators.size(), false);
  for (const auto& ops : ops_of_segment_)
    for (const OpId id : ops) again_[id.index()] = true;
  // The last first: what a later segment reads of what an earlier one forgets is needed.
  for (auto ops = ops_of_segment_.rbegin(); ops != ops_of_segment_.rend(); ++ops) {
    const auto drop = [&] { again_[ops->back().index()] = false, ops->pop_back(); };
    // A scan's own backward makes the convolution again, not the scan.
    if (plan_.kernels.mamba_ssm && !ops->empty() &&
        std::holds_alternative<StateSpace>(graph_.op(ops->back()).operation))
      drop();
    while (plan_.recompute_stops_early && !ops->empty() && !needed_again(ops->back())) drop();
  }
}

bool Lowering::needed_again(OpId id) const {
  const Operator& op = graph_.op(id);
  const Signature& s = p_.operators[id.index()].signature;
  const auto saved = [](const Operand& o) { return o.saved_for_data || o.saved_for_weight; };
  if (!s.forward_statistics.empty() || !s.extras.empty() ||
      std::any_of(s.outputs.begin(), s.outputs.end(), saved))
    return true;
  for (const TensorId t : op.outputs) {
    for (const OpId reader : consumers_[t.index()]) {
      const int segment = segment_[id.index()];
      if (segment_[reader.index()] != segment &&
          !(forgets_[static_cast<std::size_t>(segment)] && chunk_of(reader) == chunk_of(id)))
        continue;
      if (segment_[reader.index()] != segment && again_[reader.index()]) return true;
      const Operator& other = graph_.op(reader);
      const Signature& signature = p_.operators[reader.index()].signature;
      for (std::size_t k = 0; k < other.inputs.size(); ++k)
        if (other.inputs[k] == t && saved(signature.inputs[k])) return true;
    }
  }
  return false;
}

void Lowering::order_blocks() {
  const auto order = turns(plan_.schedule, stages_, static_cast<int>(plan_.virtual_stages),
                           p_.micro_batches, static_cast<int>(plan_.micro_batch_group));
  for (int s = 0; s < stages_; ++s) {
    auto& calls = p_.stages[static_cast<std::size_t>(s)];
    const auto& mine = order[static_cast<std::size_t>(s)];
    std::map<int, std::size_t> last;
    const BlockKind sums =
        splits_backward(plan_.schedule) ? BlockKind::backward_weight : BlockKind::backward;
    for (std::size_t k = 0; k < mine.size(); ++k) {
      if (mine[k].kind == sums) last[mine[k].chunk] = k;
    }
    calls.push_back({start_of_[static_cast<std::size_t>(s)], -1});
    for (std::size_t k = 0; k < mine.size(); ++k) {
      const auto chunk = static_cast<std::size_t>(mine[k].chunk);
      const BlockId block = mine[k].kind == BlockKind::forward ? forward_of_[chunk]
                            : mine[k].kind != sums             ? data_of_[chunk]
                            : last.at(mine[k].chunk) == k      ? last_backward_of_[chunk]
                                                               : backward_of_[chunk];
      calls.push_back({block, mine[k].micro_batch});
    }
    calls.push_back({step_of_[static_cast<std::size_t>(s)], -1});
  }
}

}  // namespace partita::lowering

namespace partita {

Feasible<Program> lower(const Graph& graph, const Plan& plan) {
  return lowering::Lowering(graph, plan).run();
}

}  // namespace partita
