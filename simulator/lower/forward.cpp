#include <fmt/format.h>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

std::vector<BufferId> Lowering::statistics(Block& block, OpId id,
                                           const std::vector<Statistic>& list, Kernel kernel,
                                           const Instruction& proto, AtomMask cut) {
  std::vector<BufferId> complete;
  const OperatorLayouts& l = layouts_[id.index()];
  for (std::size_t k = 0; k < list.size(); ++k) {
    Shape shape;
    Layout layout;
    for (const int d : list[k].dims) {
      const auto at = static_cast<std::size_t>(d);
      shape.push_back({l.signature.dims[at].dim, l.signature.dims[at].extent});
      layout.dims.push_back(l.cuts[at]);
    }
    shape.push_back({Dim::head_feature, list[k].width});
    layout.dims.emplace_back();
    layout.root = l.root;
    const std::string label =
        fmt::format("{}.{}{}", graph_.op(id).name,
                    kernel == Kernel::forward_statistic ? "statistic" : "backward_statistic", k);
    const BufferId whole =
        buffer(label, Category::activations, Scope::micro_batch, shape, layout, ElementType::fp32);
    if (cut != 0) {
      layout.partial = cut;
      layout.reduction = list[k].reduction;
      const BufferId local =
          buffer(label, Category::workspace, Scope::micro_batch, shape, layout, ElementType::fp32);
      Instruction i = proto;
      i.kernel = kernel;
      i.index = static_cast<std::int32_t>(k);
      i.inline_statistics = false;
      (kernel == Kernel::forward_statistic ? i.statistics : i.backward_statistics) = complete;
      i.writes = {local};
      block.instructions.push_back(std::move(i));
      Instruction reduce;
      reduce.kind = Kind::collective;
      reduce.collective = CollectiveKind::all_reduce;
      reduce.atoms = cut;
      reduce.stream = group_stream(cut);
      reduce.reads = {local};
      reduce.writes = {whole};
      block.instructions.push_back(std::move(reduce));
    }
    complete.push_back(whole);
  }
  return complete;
}

AtomMask Lowering::statistic_cut(OpId id) const {
  const OperatorLayouts& l = layouts_[id.index()];
  AtomMask cut = 0;
  for (std::size_t d = 0; d < l.cuts.size(); ++d) {
    if (l.signature.dims[d].use == DimUse::statistic)
      cut = static_cast<AtomMask>(cut | mask_of(l.cuts[d].atoms));
  }
  return cut;
}

Record Lowering::emit_forward(Block& block, OpId id, Versions& results, Gathered& gathered,
                              const std::vector<int>& units, bool recomputed,
                              const std::function<BufferId(TensorId, const Layout&)>& input) {
  const Operator& op = graph_.op(id);
  const OperatorLayouts& l = layouts_[id.index()];
  Instruction i;
  i.kind = Kind::compute;
  i.kernel = Kernel::forward;
  i.op = id.value;
  i.recomputed = recomputed;
  for (std::size_t k = 0; k < op.inputs.size(); ++k)
    i.reads.push_back(input(op.inputs[k], l.inputs[k]));
  for (const ParameterId q : op.parameters)
    i.parameters.push_back(parameter_for(block, gathered, units, q));
  Record record;
  const AtomMask cut = statistic_cut(id);
  record.statistics =
      statistics(block, id, l.signature.forward_statistics, Kernel::forward_statistic, i, cut);
  i.statistics = record.statistics;
  i.inline_statistics = cut == 0 && !record.statistics.empty();
  for (std::size_t k = 0; k < op.outputs.size(); ++k) {
    const BufferId b = tensor_buffer(op.outputs[k], l.outputs[k]);
    record.outputs.push_back(b);
    i.writes.push_back(b);
    results[op.outputs[k]].push_back({l.outputs[k], b, -1});
  }
  for (std::size_t k = 0; k < l.signature.extras.size(); ++k) {
    const Extra& e = l.signature.extras[k];
    const BufferId b = buffer(op.name + ".saved", Category::activations, Scope::micro_batch,
                              e.operand.shape, l.extras[k], plan_.precision.activations);
    p_.buffers[b.index()].element_bytes = e.element_bytes;
    record.extras.push_back(b);
  }
  if (std::holds_alternative<CrossEntropy>(op.operation) && plan_.allocations.fp32_loss &&
      bits(plan_.precision.activations) < 32) {
    // What a softmax in fp32 takes beyond the logits, which our kernel reads again instead.
    Buffer softmax = p_.buffer(i.reads.at(0));
    softmax.name = op.name + ".softmax";
    softmax.category = Category::activations;
    softmax.tensor = softmax.alias = -1;
    softmax.element_bytes = 4 - static_cast<int>(bits(plan_.precision.activations) / 8);
    p_.buffers.push_back(std::move(softmax));
    record.extras.push_back(BufferId{p_.buffers.size() - 1});
  }
  if (const auto* core = std::get_if<Attention>(&op.operation);
      core != nullptr && core->materialised && !l.ring && plan_.allocations.attention_dropout &&
      drops_) {
    // Beside the probabilities, first of the extras: one byte of mask and a dropped copy each.
    Buffer copy = p_.buffer(record.extras.at(0));
    copy.name = op.name + ".dropped";
    copy.element_bytes = 1 + static_cast<int>(bits(plan_.precision.activations) / 8);
    p_.buffers.push_back(std::move(copy));
    record.extras.push_back(BufferId{p_.buffers.size() - 1});
  }
  const auto keep_another = [&](const char* what) {
    Buffer another = p_.buffer(record.outputs.at(0));
    another.name = op.name + what;
    another.tensor = -1;
    p_.buffers.push_back(std::move(another));
    record.extras.push_back(BufferId{p_.buffers.size() - 1});
  };
  // A squared ReLU and its weighting are one kernel (use_fused_weighted_squared_relu of all
  // recipes with such experts).
  if (const auto* a = std::get_if<Activation>(&op.operation);
      a != nullptr && a->kind != ActivationKind::squared_relu &&
      p_.buffer(record.outputs.at(0)).routed && plan_.allocations.weighted_activations)
    keep_another(".unweighted");
  if (std::holds_alternative<GatedActivation>(op.operation) && plan_.allocations.gate_apart)
    keep_another(".activated");
  if (std::holds_alternative<Attention>(op.operation) && !l.ring &&
      plan_.allocations.attention_copied)
    keep_another(".copied");
  if (std::holds_alternative<GatedNorm>(op.operation) && plan_.kernels.mamba_gates_in_scan)
    keep_another(".gated");
  i.extras = record.extras;
  if (l.ring) {
    ring_forward(block, i);
  } else {
    block.instructions.push_back(std::move(i));
  }
  return record;
}

std::vector<BufferId> Lowering::pass_on(Block& block, const std::vector<BufferId>& from) {
  Instruction i;
  i.kind = Kind::collective;
  i.collective = CollectiveKind::shift;
  for (const BufferId id : from) {
    Buffer b = p_.buffers[id.index()];
    DimSplit& d = b.layout.dims[1];
    d.shift = (d.shift + 1) % static_cast<std::int32_t>(p_.mesh.size(d.atoms));
    i.atoms = mask_of(d.atoms);
    b.alias = -1;
    p_.buffers.push_back(std::move(b));
    i.reads.push_back(id);
    i.writes.push_back(BufferId{p_.buffers.size() - 1});
  }
  i.stream = group_stream(i.atoms);
  std::vector<BufferId> made = i.writes;
  block.instructions.push_back(std::move(i));
  return made;
}

int Lowering::ring_parts(const Instruction& i) const {
  return static_cast<int>(p_.mesh.size(p_.buffer(i.reads[1]).layout.dims[1].atoms));
}

void Lowering::ring_forward(Block& block, Instruction i) {
  const int parts = ring_parts(i);
  for (int t = 0; t < parts; ++t) {
    std::vector<BufferId> next;
    if (t + 1 < parts) next = pass_on(block, {i.reads[1], i.reads[2]});
    i.part = t;
    i.accumulate = t > 0;
    block.instructions.push_back(i);
    if (t + 1 < parts) i.reads[1] = next[0], i.reads[2] = next[1];
  }
}

std::vector<BufferId> Lowering::ring_backward(Block& block, Instruction i) {
  const int parts = ring_parts(i);
  std::vector<BufferId> sums = i.writes;
  for (int t = 0; t < parts; ++t) {
    std::vector<BufferId> next;
    if (t + 1 < parts) next = pass_on(block, {i.reads[1], i.reads[2]});
    i.part = t;
    i.writes = sums;
    for (BufferId& made : i.writes) {
      if (t == 0) break;
      Buffer b = p_.buffers[made.index()];
      b.alias = -1;
      b.name += ".part";
      p_.buffers.push_back(std::move(b));
      made = BufferId{p_.buffers.size() - 1};
    }
    block.instructions.push_back(i);
    for (std::size_t k = 0; t > 0 && k < sums.size(); ++k) {
      Instruction add;
      add.kind = Kind::compute;
      add.kernel = Kernel::add;
      add.reads = {sums[k], i.writes[k]};
      add.writes = {sums[k]};
      block.instructions.push_back(std::move(add));
    }
    const std::vector<BufferId> onwards = pass_on(block, {sums[1], sums[2]});
    sums[1] = onwards[0], sums[2] = onwards[1];
    if (t + 1 < parts) i.reads[1] = next[0], i.reads[2] = next[1];
  }
  return {sums[1], sums[2]};
}

std::vector<int> Lowering::reader_chunks(TensorId t) const {
  std::set<int> all;
  for (const OpId c : consumers_[t.index()]) all.insert(chunk_of(c));
  if (const OpId from = graph_.tensor(t).producer; from.valid()) all.erase(chunk_of(from));
  return {all.begin(), all.end()};
}

Layout Lowering::boundary_layout(TensorId t, int chunk) const {
  for (const OpId c : consumers_[t.index()]) {
    if (chunk_of(c) != chunk) continue;
    const Operator& op = graph_.op(c);
    for (std::size_t k = 0; k < op.inputs.size(); ++k) {
      if (op.inputs[k] == t) return without_windows(layouts_[c.index()].inputs[k]);
    }
  }
  throw InternalError("no reader of " + graph_.tensor(t).name);
}

int Lowering::new_message() {
  const int id = static_cast<int>(messages_.size());
  messages_.emplace(std::tuple{-1 - id, 0, false}, id);
  return id;
}

int Lowering::message(TensorId t, int chunk, bool backward) {
  const auto key = std::tuple{t.value, chunk, backward};
  const auto [it, fresh] = messages_.emplace(key, static_cast<int>(messages_.size()));
  (void)fresh;
  return it->second;
}

bool Lowering::waits_for_sends() const {
  return plan_.send_wait == SendWait::always ||
         (plan_.send_wait == SendWait::not_interleaved && plan_.virtual_stages == 1);
}

void Lowering::transfer(Block& block, Kind kind, BufferId b, int other_stage, int id,
                        bool backward) {
  Instruction i;
  i.kind = kind;
  i.stage = other_stage;
  i.index = id;
  // Frameworks hand a gradient on when the whole backward of the block is done, not while its
  // last weight gradient is still computed; the schedules' bubbles count on it.
  i.after_compute = kind == Kind::send;
  (kind == Kind::send ? i.reads : i.writes) = {b};
  i.stream = stream(
      fmt::format("{}{}", kind == Kind::send ? "send" : "receive", backward ? " gradient" : ""));
  if (kind == Kind::send && waits_for_sends() && other_stage < stages_ && block.stage < stages_)
    i.stream = kComputeStream;
  if (plan_.message_queue && other_stage < stages_ && block.stage < stages_) {
    through_queue(block, std::move(i));
    return;
  }
  block.instructions.push_back(std::move(i));
}

void Lowering::forward_block(int chunk) {
  Block block;
  block.name = fmt::format("forward {}", chunk);
  block.kind = BlockKind::forward;
  block.chunk = chunk;
  block.stage = stage_of_chunk(chunk);
  forward_versions_.emplace_back();
  Versions& versions = forward_versions_.back();
  // Tensors from earlier chunks.
  std::set<TensorId> arrived;
  for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
    for (const TensorId t : graph_.op(id).inputs) {
      const OpId from = graph_.tensor(t).producer;
      if (!from.valid() || chunk_of(from) == chunk || !arrived.insert(t).second) continue;
      const int source_chunk = chunk_of(from);
      const Layout layout = boundary_layout(t, chunk);
      if (stage_of_chunk(source_chunk) == block.stage) {
        for (const Version& v : forward_versions_[static_cast<std::size_t>(source_chunk)].at(t)) {
          if (v.layout == layout) versions[t].push_back({v.layout, v.buffer, -1});
        }
        continue;
      }
      const BufferId b = tensor_buffer(t, layout);
      transfer(block, Kind::receive, b, stage_of_chunk(source_chunk), message(t, chunk, false),
               false);
      versions[t].push_back({layout, b, -1});
    }
  }
  Gathered gathered;
  const auto units = units_of_chunk(chunk);
  for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
    const Record record =
        emit_forward(block, id, versions, gathered, units, false,
                     [&](TensorId t, const Layout& l) { return get(block, versions, t, l); });
    records_.resize(graph_.operators.size());
    records_[id.index()] = record;
    for (const TensorId t : graph_.op(id).outputs) {
      for (const int reader : reader_chunks(t)) {
        const BufferId b = get(block, versions, t, boundary_layout(t, reader));
        if (stage_of_chunk(reader) == block.stage) continue;
        transfer(block, Kind::send, b, stage_of_chunk(reader), message(t, reader, false), false);
      }
    }
  }
  gathered_forward_.push_back(std::move(gathered));
  forward_of_.push_back(BlockId{p_.blocks.size()});
  p_.blocks.push_back(std::move(block));
}

}  // namespace partita::lowering
