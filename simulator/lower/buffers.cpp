#include <limits>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

int Lowering::stage_of_chunk(int chunk) const {
  return partita::stage_of_chunk(plan_.schedule, chunk, stages_);
}

BufferId Lowering::buffer(std::string name, Category category, Scope scope, Shape shape,
                          Layout layout, ElementType type) {
  Buffer b;
  b.name = std::move(name);
  b.category = category;
  b.scope = scope;
  b.shape = std::move(shape);
  b.layout = std::move(layout);
  b.type = type;
  p_.buffers.push_back(std::move(b));
  return BufferId{p_.buffers.size() - 1};
}

BufferId Lowering::tensor_buffer(TensorId t, const Layout& layout, Category category) {
  const Tensor& tensor = graph_.tensor(t);
  const BufferId id =
      buffer(tensor.name, category, Scope::micro_batch, with_samples(tensor.shape, p_.samples),
             layout, plan_.precision.activations);
  Buffer& b = p_.buffers[id.index()];
  b.tensor = t.value;
  b.routed = tensor.routed;
  if (b.routed) b.experts = experts_of(graph_, t);
  if (const Router* r = b.routed ? router_of(graph_, t) : nullptr)
    b.groups = r->groups, b.top_groups = r->top_groups;
  if (!tensor.producer.valid()) {
    for (const auto& in : p_.inputs) {
      if (in.tensor == t.value && in.values > 0)
        b.element_bytes = 8;  // int64, as PyTorch's token ids
    }
  }
  if (t == graph_.loss) b.type = ElementType::fp32;
  return id;
}

Stream Lowering::stream(const std::string& name) {
  for (std::size_t i = 0; i < p_.streams.size(); ++i) {
    if (p_.streams[i] == name) return static_cast<Stream>(i);
  }
  p_.streams.push_back(name);
  PARTITA_ASSERT(p_.streams.size() < 256, "too many streams");
  return static_cast<Stream>(p_.streams.size() - 1);
}

std::string Lowering::label_of(AtomMask atoms) const {
  std::string label;
  for (std::size_t i = 0; i < p_.mesh.atoms.size(); ++i) {
    if (has(atoms, static_cast<AtomId>(i)))
      label += (label.empty() ? "" : "*") + p_.mesh.atoms[i].name;
  }
  return label;
}

Stream Lowering::state_stream(AtomMask atoms) {
  const AtomMask inside = mask_of(plan_.axes.at("tp")),
                 rows = static_cast<AtomMask>(mask_of(plan_.axes.at("cp")) |
                                              mask_of(plan_.axes.at("ep")) | inside);
  const bool both = (atoms & ~rows) == 0 && (atoms & ~inside) != 0;
  return both ? stream(label_of(atoms) + " state") : group_stream(atoms);
}

BufferId Lowering::emit_reshard(Block& block, BufferId source, const Layout& to,
                                const std::function<void(BufferId, const ReshardStep&)>& made) {
  const Layout from = p_.buffers[source.index()].layout;
  BufferId at = source;
  for (const ReshardStep& step : reshard(from, to)) {
    Buffer b = p_.buffers[at.index()];
    b.layout = step.to;
    b.scope = Scope::micro_batch;
    b.alias = -1;
    p_.buffers.push_back(b);
    const BufferId next{p_.buffers.size() - 1};
    Instruction i;
    i.reads = {at};
    i.writes = {next};
    if (step.slice) {
      i.kind = Kind::slice;
    } else {
      i.kind = Kind::collective;
      i.collective = step.collective;
      i.atoms = step.atoms;
      i.stream = group_stream(step.atoms);
      if (step.collective == CollectiveKind::all_reduce) p_.buffers[next.index()].alias = at.value;
    }
    block.instructions.push_back(std::move(i));
    made(next, step);
    at = next;
  }
  return at;
}

std::int64_t Lowering::reshard_volume(BufferId source, const Layout& to) const {
  const Buffer& b = p_.buffers[source.index()];
  std::int64_t volume = 0;
  Layout at = b.layout;
  for (const ReshardStep& step : reshard(b.layout, to)) {
    if (!step.slice) {
      volume += std::max(local_elements(p_.mesh, at, b.shape, b.routed, b.experts, 0),
                         local_elements(p_.mesh, step.to, b.shape, b.routed, b.experts, 0)) +
                1;
    }
    at = step.to;
  }
  return volume;
}

BufferId Lowering::get(Block& block, Versions& versions, TensorId t, const Layout& layout) {
  auto& have = versions[t];
  for (const Version& v : have) {
    if (v.layout == layout) return v.buffer;
  }
  if (!graph_.tensor(t).producer.valid() && plan_.loader) {
    if (have.empty()) from_loader(block, have, t);
    for (const Version& v : have) {
      if (v.layout == layout) return v.buffer;
    }
  } else if (!graph_.tensor(t).producer.valid()) {
    const BufferId b = tensor_buffer(t, layout);
    Instruction i;
    i.kind = Kind::load;
    if (plan_.sharded_storage) i.stream = stream("storage");
    i.writes = {b};
    for (std::size_t k = 0; k < p_.inputs.size(); ++k) {
      if (p_.inputs[k].tensor == t.value) i.index = static_cast<std::int32_t>(k);
    }
    block.instructions.push_back(std::move(i));
    have.push_back({layout, b, -1});
    return b;
  }
  PARTITA_ASSERT(!have.empty(), "tensor " + graph_.tensor(t).name + " is read before it is made");
  std::size_t best = have.size();
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::size_t k = 0; k < have.size(); ++k) {
    if (!(have[k].layout == without_windows(have[k].layout))) continue;
    if ((layout.partial & ~have[k].layout.partial) != 0) continue;
    const std::int64_t volume = reshard_volume(have[k].buffer, layout);
    if (volume < least) least = volume, best = k;
  }
  PARTITA_ASSERT(best < have.size(), "no source for " + graph_.tensor(t).name);
  int at = static_cast<int>(best);
  return emit_reshard(
      block, have[best].buffer, layout, [&](BufferId made, const ReshardStep& step) {
        const bool gathered = !step.slice && step.collective == CollectiveKind::all_gather;
        have.push_back({step.to, made, gathered ? at : -1});
        at = static_cast<int>(have.size()) - 1;
      });
}

}  // namespace partita::lowering
