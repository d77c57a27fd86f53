#include <fmt/format.h>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

bool Lowering::stores_gradients(Backward& b, const Operator& op) {
  using Gradients = Allocations::WeightGradients;
  const Allocations& a = plan_.allocations;
  const bool apart = a.weight_gradients != Gradients::in_place;
  // What autograd makes of another type is added to a sum of the right one.
  const bool cast_apart = apart && plan_.precision.gradients != plan_.precision.parameters;
  // FSDP1 clears nothing either, but casts, divides and adds shards at every micro-batch, which
  // no price knows: on 8 ranks as many bytes. Both go together or not at all.
  const bool each_stored = !apart || a.copies_gathered;
  bool stores = true;
  for (const ParameterId q : op.parameters) {
    if (!graph_.parameter(q).trainable) continue;
    const ParameterOnStage& v = on_stage(b.block.stage).at(q);
    stores &= b.begun.insert(q).second;
    if (!v.gradient.valid())
      stores &= each_stored;
    else
      stores &= !a.clears_gradients && !cast_apart && p_.micro_batches == 1 && v.chunks == 1 &&
                b.writes_left.at(q) == 1;
  }
  return stores;
}

BufferId Lowering::saved(Backward& b, TensorId t, const Layout& layout) {
  const BufferId made =
      made_before(b, forward_versions_[static_cast<std::size_t>(b.block.chunk)].at(t), t, layout,
                  plan_.save_gathered);
  if (!made.valid()) throw InternalError("nothing saved of " + graph_.tensor(t).name);
  return made;
}

BufferId Lowering::made_before(Backward& b, const std::vector<Version>& have, TensorId t,
                               const Layout& layout, bool keeps_gathered) {
  for (const Version& v : have) {
    if (!(v.layout == layout)) continue;
    if (keeps_gathered || v.gathered_from < 0 ||
        (plan_.allocations.gathered_rows && p_.buffer(v.buffer).routed))
      return v.buffer;
    auto& again = b.regathered[t];
    const Version& source = have[static_cast<std::size_t>(v.gathered_from)];
    if (source.layout.partial != 0 && again.empty()) return v.buffer;
    const bool known = std::any_of(again.begin(), again.end(),
                                   [&](const Version& w) { return w.buffer == source.buffer; });
    if (!known) again.push_back({source.layout, source.buffer, -1});
    return get(b.block, b.regathered, t, layout);
  }
  return BufferId{};
}

BufferId Lowering::operand(Backward& b, OpId reader, TensorId t, const Layout& layout, bool again) {
  const OpId from = graph_.tensor(t).producer;
  const int segment = from.valid() ? segment_[from.index()] : -1;
  // What a segment forgets is made again for every reader; else readers outside have it kept.
  if (segment >= 0 &&
      (segment == segment_[reader.index()] ||
       (forgets_[static_cast<std::size_t>(segment)] && chunk_of(from) == b.block.chunk))) {
    recompute(b, segment);
    if (plan_.regathers_recomputed && !again) {
      if (const auto have = b.recomputed.find(t); have != b.recomputed.end()) {
        const BufferId made = made_before(b, have->second, t, layout, plan_.save_gathered);
        if (made.valid()) return made;
      }
    }
    return get(b.block, b.recomputed, t, layout);
  }
  return saved(b, t, layout);
}

void Lowering::recompute(Backward& b, int segment) {
  if (b.segment_done[segment]) return;
  b.segment_done[segment] = true;
  for (const OpId id : ops_of_segment_[static_cast<std::size_t>(segment)]) {
    b.records[id] =
        emit_forward(b.block, id, b.recomputed, b.gathered, b.units, true,
                     [&](TensorId t, const Layout& l) { return operand(b, id, t, l, true); });
  }
}

void Lowering::contribute(Backward& b, TensorId t, const Layout& layout, BufferId buffer,
                          bool owned) {
  b.contributions[t].push_back({layout, buffer, owned});
}

BufferId Lowering::gradient(Backward& b, TensorId t, const Layout& layout) {
  const auto it = b.contributions.find(t);
  if (it == b.contributions.end()) return BufferId{};
  // Summands of one layout first, so that a sum owed is paid once.
  std::vector<std::pair<Layout, std::vector<BufferId>>> groups;
  for (const Contribution& c : it->second) {
    auto g = std::find_if(groups.begin(), groups.end(),
                          [&](const auto& x) { return x.first == c.layout; });
    if (g == groups.end()) g = groups.insert(groups.end(), {c.layout, {}});
    g->second.push_back(c.buffer);
  }
  std::vector<BufferId> parts;
  for (const auto& [from, buffers] : groups) {
    const BufferId sum = add(b, buffers);
    parts.push_back(emit_reshard(b.block, sum, layout, [](BufferId, const ReshardStep&) {}));
  }
  return add(b, parts);
}

BufferId Lowering::add(Backward& b, const std::vector<BufferId>& summands) {
  if (summands.size() == 1) return summands[0];
  Buffer copy = p_.buffers[summands[0].index()];
  copy.alias = -1;
  p_.buffers.push_back(copy);
  const BufferId sum{p_.buffers.size() - 1};
  Instruction i;
  i.kind = Kind::compute;
  i.kernel = Kernel::add;
  i.reads = summands;
  i.writes = {sum};
  b.block.instructions.push_back(std::move(i));
  return sum;
}

BufferId Lowering::gradient_buffer(TensorId t, const Layout& layout) {
  const BufferId g = tensor_buffer(t, layout);
  Buffer& b = p_.buffers[g.index()];
  b.name += ".grad";
  b.element_bytes = 0;
  return g;
}

void Lowering::backward_block(int chunk) {
  Backward b;
  b.block.name = fmt::format("backward {}", chunk);
  b.block.kind = BlockKind::backward;
  b.block.chunk = chunk;
  b.block.stage = stage_of_chunk(chunk);
  b.weight = b.block;
  b.weight.name = fmt::format("backward weight {}", chunk);
  b.weight.kind = BlockKind::backward_weight;
  b.units = units_of_chunk(chunk);
  std::reverse(b.units.begin(), b.units.end());
  b.gathered = stays_gathered(chunk);
  const auto& ops = ops_of_chunk_[static_cast<std::size_t>(chunk)];
  // Gradients from later chunks.
  for (const OpId id : ops) {
    for (const TensorId t : graph_.op(id).outputs) {
      if (!needs_gradient_[t.index()]) continue;
      for (const int reader : reader_chunks(t)) {
        const Layout layout = boundary_layout(t, reader);
        if (stage_of_chunk(reader) == b.block.stage) {
          const auto sent = boundary_gradient_.find({t, reader});
          if (sent != boundary_gradient_.end()) contribute(b, t, layout, sent->second, false);
          continue;
        }
        const BufferId g = gradient_buffer(t, layout);
        transfer(b.block, Kind::receive, g, stage_of_chunk(reader), message(t, reader, true), true);
        contribute(b, t, layout, g, true);
      }
    }
  }
  for (const OpId id : ops) {
    for (const ParameterId q : graph_.op(id).parameters) b.writes_left[q]++;
  }
  for (std::size_t k = ops.size(); k-- > 0;) backward_of(b, ops[k]);
  // Gradients for earlier chunks.
  std::set<TensorId> sent;
  for (const OpId id : ops) {
    for (const TensorId t : graph_.op(id).inputs) {
      const OpId from = graph_.tensor(t).producer;
      if (!from.valid() || chunk_of(from) == chunk || !needs_gradient_[t.index()] ||
          !sent.insert(t).second) {
        continue;
      }
      const BufferId g = gradient(b, t, boundary_layout(t, chunk));
      PARTITA_ASSERT(g.valid(), "no gradient for " + graph_.tensor(t).name);
      boundary_gradient_[{t, chunk}] = g;
      const int other = stage_of_chunk(chunk_of(from));
      if (other != b.block.stage)
        transfer(b.block, Kind::send, g, other, message(t, chunk, true), true);
    }
  }
  finish_backward(std::move(b));
}

void Lowering::backward_of(Backward& b, OpId id) {
  const Operator& op = graph_.op(id);
  const OperatorLayouts& l = layouts_[id.index()];
  const Signature& s = l.signature;
  bool data = false, weight = false;
  for (std::size_t k = 0; k < op.inputs.size(); ++k) {
    data |= s.inputs[k].differentiable && needs_gradient_[op.inputs[k].index()] != 0;
  }
  for (const ParameterId q : op.parameters) weight |= graph_.parameter(q).trainable;
  if (!data && !weight) return;

  Instruction proto;
  proto.kind = Kind::compute;
  proto.op = id.value;
  bool of_loss = false;  // its gradient is a number
  for (std::size_t k = 0; k < op.outputs.size(); ++k) {
    const bool one = op.outputs[k] == graph_.loss || b.ones.count(op.outputs[k]) > 0;
    proto.gradients.push_back(one ? loss_scale(b.block.stage)
                                  : gradient(b, op.outputs[k], l.output_gradients[k]));
    if (!one && !proto.gradients.back().valid()) return;  // nothing depends on it
    of_loss |= one;
  }
  // Sums pass their gradient on unchanged.
  const bool alias =
      std::holds_alternative<Add>(op.operation) || std::holds_alternative<AddBias>(op.operation);
  if (alias && data) {
    for (std::size_t k = 0; k < op.inputs.size(); ++k) {
      if (!needs_gradient_[op.inputs[k].index()]) continue;
      if (!of_loss) {
        contribute(b, op.inputs[k], l.input_gradients[k], proto.gradients[0], false);
      } else {
        PARTITA_ASSERT(
            b.contributions.count(op.inputs[k]) == 0,
            "a summand of the loss is read elsewhere: " + graph_.tensor(op.inputs[k]).name);
        b.ones.insert(op.inputs[k]);
      }
    }
    data = false;
  }
  if (segment_[id.index()] >= 0) recompute(b, segment_[id.index()]);
  const auto again = b.records.find(id);
  const Record& record = again != b.records.end() ? again->second : records_[id.index()];
  const auto inputs = [&](bool for_data) {
    std::vector<BufferId> all;
    // Where rows are weighted before, their sum's backward needs none.
    const bool weighted =
        plan_.allocations.weighted_activations && std::holds_alternative<Combine>(op.operation);
    for (std::size_t k = 0; k < op.inputs.size(); ++k) {
      const bool wanted = for_data ? s.inputs[k].saved_for_data && !(weighted && k == 0)
                                   : s.inputs[k].saved_for_weight;
      all.push_back(wanted ? operand(b, id, op.inputs[k], l.inputs[k], false) : BufferId{});
    }
    return all;
  };
  for (std::size_t k = 0; k < op.outputs.size(); ++k) {
    proto.outputs.push_back(s.outputs[k].saved_for_data || s.outputs[k].saved_for_weight
                                ? record.outputs[k]
                                : BufferId{});
  }
  proto.statistics = record.statistics;
  const AtomMask cut = statistic_cut(id);
  if (data) {
    Instruction i = proto;
    i.kernel = Kernel::backward_data;
    i.reads = inputs(true);
    i.extras = record.extras;
    for (const ParameterId q : op.parameters)
      i.parameters.push_back(parameter_for(b.block, b.gathered, b.units, q));
    if (cut != 0) {
      i.backward_statistics =
          statistics(b.block, id, s.backward_statistics, Kernel::backward_statistic, i, cut);
    } else {
      i.inline_statistics = !s.backward_statistics.empty();
    }
    for (std::size_t k = 0; k < op.inputs.size(); ++k) {
      if (!s.inputs[k].differentiable || !needs_gradient_[op.inputs[k].index()]) {
        i.writes.push_back(BufferId{});
        continue;
      }
      const BufferId g = gradient_buffer(op.inputs[k], l.input_gradients[k]);
      i.writes.push_back(g);
      contribute(b, op.inputs[k], l.input_gradients[k], g, true);
    }
    if (l.ring) {
      // Frozen keys or values still need a place to put what the kernel computes.
      for (std::size_t k = 0; k < 3; ++k) {
        if (!i.writes[k].valid()) i.writes[k] = gradient_buffer(op.inputs[k], l.input_gradients[k]);
      }
      const auto home = ring_backward(b.block, i);
      for (std::size_t k = 1; k < 3; ++k) {
        for (Contribution& c : b.contributions[op.inputs[k]]) {
          if (c.buffer == i.writes[k]) c.buffer = home[k - 1];
        }
      }
      return;
    }
    // A product adds to the gradient that another product of the same input has begun.
    if (i.writes.size() == 1 && std::holds_alternative<Linear>(op.operation)) {
      auto& all = b.contributions[op.inputs[0]];
      const auto first = std::find_if(all.begin(), all.end() - 1, [&](const Contribution& c) {
        return c.owned && c.layout == all.back().layout;
      });
      if (first != all.end() - 1) {
        i.writes[0] = first->buffer;
        i.accumulate = true;
        all.pop_back();
      }
    }
    b.block.instructions.push_back(std::move(i));
  }
  if (weight) {
    Instruction i = proto;
    i.kernel = Kernel::backward_weight;
    i.reads = inputs(false);
    i.accumulate = !stores_gradients(b, op);
    for (std::size_t k = 0; k < op.parameters.size(); ++k) {
      i.parameters.push_back(s.parameters[k].saved_for_weight
                                 ? parameter_for(b.block, b.gathered, b.units, op.parameters[k])
                                 : BufferId{});
    }
    for (std::size_t k = 0; k < op.parameters.size(); ++k) {
      const ParameterId q = op.parameters[k];
      if (!graph_.parameter(q).trainable) {
        i.writes.push_back(BufferId{});
        continue;
      }
      const ParameterOnStage& v = on_stage(b.block.stage).at(q);
      if (v.gradient.valid()) {
        if (!i.accumulate) stored_.insert(v.gradient);
        i.writes.push_back(v.gradient);
        continue;
      }
      auto& g = b.micro_batch_gradients[q];
      if (!g.valid()) {
        g = buffer(graph_.parameter(q).name + ".grad", Category::gradients, Scope::micro_batch,
                   graph_.parameter(q).shape, v.gradient_layout,
                   plan_.precision.gradient_communication);
        if (i.accumulate) {
          Instruction zero;
          zero.kind = Kind::compute;
          zero.kernel = Kernel::zero;
          zero.writes = {g};
          weights(b).instructions.push_back(std::move(zero));
        }
      }
      i.writes.push_back(g);
    }
    weights(b).instructions.push_back(std::move(i));
  }
  for (const ParameterId q : op.parameters) {
    if (--b.writes_left[q] > 0 || !graph_.parameter(q).trainable) continue;
    b.ready_at[q] = weights(b).instructions.size();
  }
}

}  // namespace partita::lowering
