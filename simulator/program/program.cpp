#include "simulator/program/program.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <set>

#include "simulator/program/routing.h"

namespace partita {

std::string_view name(Category c) {
  constexpr std::array<std::string_view, kCategoryCount> names{
      "parameters", "gradients", "optimizer", "activations", "workspace", "buffers"};
  return names[static_cast<std::size_t>(c)];
}
std::string_view name(Kind k) {
  constexpr std::array<std::string_view, 9> names{
      "load", "compute", "collective", "send", "receive", "slice", "copy", "allocate", "free"};
  return names[static_cast<std::size_t>(k)];
}
std::string_view name(Kernel k) {
  constexpr std::array<std::string_view, 20> names{"forward_statistic",
                                                   "forward",
                                                   "backward_statistic",
                                                   "backward_data",
                                                   "backward_weight",
                                                   "zero",
                                                   "add",
                                                   "optimizer",
                                                   "scale",
                                                   "square_sum",
                                                   "clip",
                                                   "loss_scale",
                                                   "unscale",
                                                   "not_finite",
                                                   "compress",
                                                   "decompress",
                                                   "dequeue",
                                                   "enqueue",
                                                   "initialise",
                                                   "read"};
  return names[static_cast<std::size_t>(k)];
}
std::string_view name(CompressionKind k) {
  constexpr std::array<std::string_view, 5> names{"none", "cast", "top_k", "power_sgd", "one_bit"};
  return names[static_cast<std::size_t>(k)];
}
std::string_view name(CollectiveKind k) {
  constexpr std::array<std::string_view, kCollectiveKinds> names{
      "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "halo_exchange",
      "shift",      "broadcast",  "reduce",         "scatter",    "gather"};
  return names[static_cast<std::size_t>(k)];
}
std::string_view name(BlockKind k) {
  constexpr std::array<std::string_view, 5> names{"start", "forward", "backward", "backward_weight",
                                                  "step"};
  return names[static_cast<std::size_t>(k)];
}

std::int64_t kept_values(const Compression& c, std::int64_t elements) {
  const auto wanted = static_cast<std::int64_t>(std::ceil(c.ratio * static_cast<double>(elements)));
  return std::min(elements, std::max<std::int64_t>(1, wanted));
}

std::int64_t Program::ranks() const {
  std::int64_t n = mesh.ranks();
  for (const Role& r : roles) n += mesh.size(r.atoms);
  return n;
}

namespace {

/// The role of a rank beyond the mesh, and its number in it.
std::pair<std::size_t, std::int64_t> role_of(const Program& p, std::int64_t rank) {
  rank -= p.mesh.ranks();
  for (std::size_t r = 0; r < p.roles.size(); ++r) {
    const std::int64_t n = p.mesh.size(p.roles[r].atoms);
    if (rank < n) return {r, rank};
    rank -= n;
  }
  throw InternalError(fmt::format("rank {} is in no role", rank));
}

/// `rank` with coordinate `index` along `atoms` (the first the slowest).
std::int64_t moved(const Mesh& mesh, std::int64_t rank, const AtomList& atoms, std::int64_t index) {
  std::int64_t r = mesh.group_root(rank, mask_of(atoms));
  for (std::size_t i = atoms.size(); i-- > 0;) {
    const AtomId a = atoms[i];
    r += index % mesh.atoms[a].size * mesh.stride(a);
    index /= mesh.atoms[a].size;
  }
  return r;
}

}  // namespace

int Program::stage_of(std::int64_t rank) const {
  if (rank < mesh.ranks()) return static_cast<int>(mesh.coordinate(rank, pipeline));
  return pipeline_stages() + static_cast<int>(role_of(*this, rank).first);
}

std::int64_t Program::place_of(std::int64_t rank) const {
  if (rank < mesh.ranks()) return rank;
  const auto [role, index] = role_of(*this, rank);
  return moved(mesh, 0, roles[role].atoms, index);
}

std::int64_t Program::rank_on_stage(std::int64_t rank, int stage) const {
  const std::int64_t place = place_of(rank);
  if (stage < pipeline_stages()) return moved(mesh, place, pipeline, stage);
  std::int64_t first = mesh.ranks();
  const auto role = static_cast<std::size_t>(stage - pipeline_stages());
  for (std::size_t r = 0; r < role; ++r) first += mesh.size(roles[r].atoms);
  return first + mesh.coordinate(place, roles[role].atoms);
}

std::int64_t Program::peer_of(const Instruction& i, std::int64_t rank) const {
  const std::int64_t peer = rank_on_stage(rank, i.stage);
  if (i.atoms == 0) return peer;
  AtomList list;
  for (std::size_t a = 0; a < mesh.atoms.size(); ++a) {
    if (has(i.atoms, static_cast<AtomId>(a))) list.push_back(static_cast<AtomId>(a));
  }
  return moved(mesh, peer, list, i.peer);
}

std::vector<std::int64_t> Program::group(const Instruction& i, std::int64_t rank) const {
  if (i.tie < 0) return mesh.group(rank, i.atoms);
  std::vector<std::int64_t> members;
  for (const int s : ties[static_cast<std::size_t>(i.tie)])
    members.push_back(rank_on_stage(rank, s));
  std::sort(members.begin(), members.end());
  return members;
}

std::int64_t local_elements(const Program& program, BufferId id, std::int64_t rank) {
  const Buffer& b = program.buffer(id);
  if (b.routing >= 0) {
    return routed_rows(program, id, rank) *
           local_extent(program.mesh, b.layout.dims[3], b.shape[3].extent, program.place_of(rank));
  }
  return local_elements(program.mesh, b.layout, b.shape, b.routed, b.experts,
                        program.place_of(rank));
}

Bytes local_bytes(const Program& program, BufferId id, std::int64_t rank) {
  const Buffer& b = program.buffer(id);
  const std::int64_t n = local_elements(program, id, rank);
  return b.element_bytes > 0 ? Bytes{n * b.element_bytes} : storage(b.type, n);
}

Bytes device_bytes(const Program& p, BufferId id, std::int64_t rank) {
  const Buffer& b = p.buffer(id);
  if (b.host) return Bytes{0};
  if (b.kept_bits < 0) return Bytes{0};
  if (b.kept_bits > 0) return Bytes{ceil_div(local_elements(p, id, rank) * b.kept_bits, 8)};
  return local_bytes(p, id, rank);
}
Bytes host_bytes(const Program& p, BufferId id, std::int64_t rank) {
  return p.buffer(id).host ? local_bytes(p, id, rank) : Bytes{0};
}

int sequence_dim(const Buffer& b) {
  for (std::size_t d = 0; d < b.shape.size(); ++d) {
    if (b.shape[d].dim == Dim::sequence) return static_cast<int>(d);
  }
  return -1;
}

namespace {

/// Calls f(buffer, dimension) for the sequence of all that a part reads, and of what it writes.
template <class F>
void for_each_sequence(const Program& p, const Instruction& i, F&& f) {
  for (const auto* list : {&i.reads, &i.gradients, &i.writes}) {
    for (const BufferId id : *list) {
      if (!id.valid()) continue;
      const Buffer& b = p.buffer(id);
      if (const int d = sequence_dim(b); d >= 0) f(b, static_cast<std::size_t>(d));
    }
  }
}

}  // namespace

std::vector<std::int64_t> part_positions(const Program& p, const Instruction& i,
                                         std::int64_t rank) {
  std::vector<std::int64_t> least;
  bool any = false;
  for_each_sequence(p, i, [&](const Buffer& b, std::size_t d) {
    auto mine = local_indices(p.mesh, b.layout.dims[d], b.shape[d].extent, rank);
    if (!any || mine.size() < least.size()) least = std::move(mine);
    any = true;
  });
  return least;
}

std::int64_t part_size(const Program& p, const Instruction& i, std::int64_t rank) {
  std::int64_t least = -1;
  for_each_sequence(p, i, [&](const Buffer& b, std::size_t d) {
    const std::int64_t mine = local_extent(p.mesh, b.layout.dims[d], b.shape[d].extent, rank);
    if (least < 0 || mine < least) least = mine;
  });
  return std::max<std::int64_t>(least, 0);
}

std::int64_t common_elements(const Program& p, BufferId from, std::int64_t a, BufferId to,
                             std::int64_t b) {
  const Buffer &x = p.buffer(from), &y = p.buffer(to);
  if (p.mesh.group_root(a, x.layout.root) != a || p.mesh.group_root(b, y.layout.root) != b)
    return 0;
  std::int64_t n = 1;
  for (std::size_t d = 0; d < x.shape.size(); ++d) {
    const auto mine = local_indices(p.mesh, x.layout.dims[d], x.shape[d].extent, a);
    const auto theirs = local_indices(p.mesh, y.layout.dims[d], y.shape[d].extent, b);
    std::vector<std::int64_t> both;
    std::set_intersection(mine.begin(), mine.end(), theirs.begin(), theirs.end(),
                          std::back_inserter(both));
    n *= static_cast<std::int64_t>(both.size());
  }
  return n;
}

namespace {

/// Rows on their way: each with its key of 24 bytes, what goes out beside what comes in.
Bytes routed_payload(const Program& p, const Instruction& i, std::int64_t rank) {
  constexpr std::int64_t kKey = 24;
  if (i.kind == Kind::collective && i.collective == CollectiveKind::all_reduce) return Bytes{0};
  const BufferId from = i.reads[0], to = i.writes[0];
  const auto features = [&](BufferId id, std::int64_t r) {
    const Buffer& b = p.buffer(id);
    return local_indices(p.mesh, b.layout.dims[3], b.shape[3].extent, p.place_of(r));
  };
  const bool both_ways = i.kind == Kind::slice || i.collective != CollectiveKind::reduce_scatter;
  std::vector<std::int64_t> group{rank};
  if (i.kind == Kind::collective) group = p.group(i, rank);
  std::int64_t bytes = 0;
  const auto add = [&](std::int64_t sender, std::int64_t receiver) {
    std::vector<std::int64_t> shared;
    const auto mine = features(from, sender), theirs = features(to, receiver);
    std::set_intersection(mine.begin(), mine.end(), theirs.begin(), theirs.end(),
                          std::back_inserter(shared));
    if (shared.empty()) return;
    bytes += common_rows(p, from, sender, to, receiver) *
             (kKey + p.buffer(from).width() * static_cast<std::int64_t>(shared.size()));
  };
  for (const std::int64_t member : group) {
    add(rank, member);
    if (both_ways) add(member, rank);
  }
  return Bytes{bytes};
}

}  // namespace

bool brings_rows(const Program& p, const Instruction& i) {
  if (i.kind != Kind::collective || i.collective != CollectiveKind::all_to_all) return false;
  return p.buffer(i.reads[0]).routed && !cut_by_expert(p, i.reads[0]) &&
         cut_by_expert(p, i.writes[0]);
}

bool cut_by_expert(const Program& p, BufferId id) {
  const Buffer& b = p.buffer(id);
  for (std::size_t d = 0; d < b.shape.size(); ++d) {
    if (b.shape[d].dim == Dim::expert) return !b.layout.dims[d].atoms.empty();
  }
  return false;
}

bool of_experts(const Program& p, const Instruction& i) {
  const auto routed = [&](const std::vector<BufferId>& list) {
    return std::any_of(list.begin(), list.end(),
                       [&](BufferId id) { return id.valid() && p.buffer(id).routed; });
  };
  return routed(i.reads) || routed(i.gradients) || routed(i.writes);
}

bool of_graph(const Program& p, const Instruction& i) {
  const Launches& l = p.launches;
  return l.graphs || (l.graphs_beside_experts && !of_experts(p, i)) ||
         (i.op >= 0 && p.operators[static_cast<std::size_t>(i.op)].captured);
}

namespace {

bool of_a_layer(const ProgramOperator& op) { return op.name.rfind("layers.", 0) == 0; }

/// Is it a product of a layer, whose gradient is added in place where placeholders stand for it?
bool layer_product(const Program& p, const Instruction& i) {
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  return of_a_layer(op) && (std::holds_alternative<Linear>(op.operation) ||
                            std::holds_alternative<GroupedProduct>(op.operation));
}

}  // namespace

Bytes as_parameters(const Program& p, BufferId gradient, std::int64_t rank) {
  return Bytes{ceil_div(local_elements(p, gradient, rank) * bits(p.allocations.parameters), 8)};
}

namespace {

/// Does it take memory of its own while its kernel runs?
bool apart(const Program& p, const Instruction& i, BufferId g) {
  using WeightGradients = Allocations::WeightGradients;
  const WeightGradients how = p.allocations.weight_gradients;
  if (i.kernel != Kernel::backward_weight || i.op < 0 || how == WeightGradients::in_place ||
      !g.valid() || p.buffer(g).scope != Scope::step)
    return false;
  if (how == WeightGradients::placeholders) return !layer_product(p, i);
  // Without anything to add to, the first gradient of the right type stays.
  return p.micro_batches > 1 || p.buffer(g).type != p.allocations.parameters;
}

}  // namespace

namespace {

/// Does a gradient of the parameters' type stay beside the accumulated one?
bool stays_beside(const Program& p, BufferId gradient) {
  return p.allocations.weight_gradients == Allocations::WeightGradients::beside &&
         p.buffer(gradient).type != p.allocations.parameters;
}

/// Gradients apart of one call: of parameters that are accumulated over the step.
Bytes gradients_apart(const Program& p, const Instruction& i, std::int64_t rank) {
  Bytes sum{0};
  for (const BufferId g : i.writes) {
    if (apart(p, i, g) && !stays_beside(p, g)) sum += as_parameters(p, g, rank);
  }
  return sum;
}

/// Is this the loss's forward or backward?
bool is_loss(const Program& p, const Instruction& i, Kernel pass = Kernel::forward) {
  return i.kind == Kind::compute && i.kernel == pass && i.op >= 0 &&
         std::holds_alternative<CrossEntropy>(
             p.operators[static_cast<std::size_t>(i.op)].operation);
}

/// What the loss takes while it runs.
Bytes loss_bytes(const Program& p, const Instruction& i, std::int64_t rank) {
  const Allocations& a = p.allocations;
  if (a.loss_forward != Bytes{0} && is_loss(p, i, Kernel::forward))
    return Bytes{local_elements(p, i.reads.at(0), rank) * a.loss_forward.count};
  if (a.loss_backward != Bytes{0} && is_loss(p, i, Kernel::backward_data))
    return Bytes{local_elements(p, i.writes.at(0), rank) * a.loss_backward.count};
  return Bytes{0};
}

}  // namespace

bool added_apart(const Program& p, const Instruction& i, BufferId g) {
  // The output layer, too, adds in place, and hands on a tensor that stands for its gradient.
  return apart(p, i, g) &&
         (p.allocations.weight_gradients != Allocations::WeightGradients::placeholders ||
          !is_product(p.operators[static_cast<std::size_t>(i.op)].operation));
}

int optimizer_states(const Optimizer& o) {
  if (o.kind == OptimizerKind::adam) return 2;
  return o.momentum != 0 ? 1 : 0;
}

Bytes resident_bytes(const Program& p, int stage, std::int64_t rank, int compute_capability) {
  const Allocations& a = p.allocations;
  if (stage >= p.pipeline_stages()) return Bytes{0};
  const bool hopper = compute_capability >= 90;
  Bytes sum = hopper ? a.workspace_hopper : a.workspace;
  Bytes scores{0}, outputs{0};
  bool grouped = false;
  std::set<BufferId> beside;
  std::map<BufferId, int> narrow;  // their types' bits
  std::set<BlockId> blocks;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      if (i.kind != Kind::compute || i.op < 0) continue;
      const auto& operation = p.operators[static_cast<std::size_t>(i.op)].operation;
      grouped |= std::holds_alternative<GroupedProduct>(operation);
      const int width = bits(p.operators[static_cast<std::size_t>(i.op)].compute);
      if (a.narrow_weights && width <= 8 && i.kernel == Kernel::forward && layer_product(p, i) &&
          p.buffer(i.parameters.at(0)).scope == Scope::step)
        narrow.emplace(i.parameters[0], width);
      const auto* core = std::get_if<Attention>(&operation);
      if (a.score_buffer && core != nullptr && core->materialised && !i.extras.empty())
        scores = std::max(scores, local_bytes(p, i.extras[0], rank));
      // Of two buffers that the last stage takes turns in, the other's outputs.
      if (a.stage_copies && p.micro_batches > 1 && is_loss(p, i))
        outputs = std::max(outputs, local_bytes(p, i.reads.at(0), rank));
    }
    for (const BufferId g : gradients_beside(p, p.blocks[b.index()])) beside.insert(g);
  }
  if (a.gradient_buckets) {
    std::set<BufferId> summed;
    for (const BlockId b : blocks) {
      for (const Instruction& i : p.blocks[b.index()].instructions) {
        if (i.kind != Kind::collective) continue;
        for (const BufferId g : i.reads) {
          if (g.valid() && p.buffer(g).category == Category::gradients &&
              p.buffer(g).parameter >= 0)
            summed.insert(g);
        }
      }
    }
    for (const BufferId g : summed) sum += local_bytes(p, g, rank);
  }
  if (grouped) sum += hopper ? a.workspace_grouped_hopper : a.workspace_grouped;
  sum += scores + outputs;
  for (const BufferId g : beside) sum += as_parameters(p, g, rank);
  for (const auto& [w, width] : narrow)
    sum += Bytes{2 * ceil_div(local_elements(p, w, rank) * width, 8)};
  if (a.weight_gradients != Allocations::WeightGradients::placeholders) return sum;
  // Products of one input are one product there (query, key and value; gate and up); experts' are
  // of one shape.
  using Weight = std::pair<std::vector<std::int64_t>, std::int64_t>;  // shape, local bytes
  std::set<std::vector<Weight>> shapes;
  for (const BlockId b : blocks) {
    std::map<BufferId, std::vector<Weight>> by_input;
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      if (i.kind != Kind::compute || i.kernel != Kernel::backward_weight || i.op < 0 ||
          i.writes.empty() || !i.writes[0].valid() || !layer_product(p, i))
        continue;
      const Buffer& gradient = p.buffer(i.writes[0]);
      Weight w{{}, as_parameters(p, i.writes[0], rank).count};
      for (std::size_t d = 0; d < gradient.shape.size(); ++d) {
        if (gradient.shape[d].dim == Dim::expert) {
          w.second /=
              std::max<std::int64_t>(1, local_extent(p.mesh, gradient.layout.dims[d],
                                                     gradient.shape[d].extent, p.place_of(rank)));
        } else {
          w.first.push_back(gradient.shape[d].extent);
        }
      }
      by_input[i.reads[0]].push_back(std::move(w));
    }
    for (auto& [input, weights] : by_input) shapes.insert(std::move(weights));
  }
  for (const auto& weights : shapes) {
    for (const Weight& w : weights) sum += Bytes{w.second};
  }
  return sum;
}

std::vector<bool> read_by_layers(const Program& p) {
  std::vector<bool> all(p.buffers.size(), false);
  for (const Block& block : p.blocks) {
    if (block.kind != BlockKind::backward && block.kind != BlockKind::backward_weight) continue;
    // From the end, so that what is gathered again for them counts too.
    for (auto i = block.instructions.rbegin(); i != block.instructions.rend(); ++i) {
      bool wanted = i->op >= 0 && of_a_layer(p.operators[static_cast<std::size_t>(i->op)]);
      if (i->kind != Kind::compute)
        for_each_write(*i, [&](BufferId id) { wanted |= all[id.index()]; });
      if (wanted && i->kind != Kind::allocate && i->kind != Kind::free)
        for_each_read(*i, [&](BufferId id) { all[id.index()] = true; });
    }
  }
  return all;
}

std::vector<BufferId> gradients_beside(const Program& p, const Block& block) {
  std::vector<BufferId> all;
  if (p.allocations.weight_gradients != Allocations::WeightGradients::beside) return all;
  for (const Instruction& i : block.instructions) {
    if (i.kind != Kind::compute || i.kernel != Kernel::backward_weight) continue;
    for (const BufferId g : i.writes) {
      if (g.valid() && p.buffer(g).scope == Scope::step && stays_beside(p, g) &&
          std::find(all.begin(), all.end(), g) == all.end())
        all.push_back(g);
    }
  }
  return all;
}

std::vector<std::int64_t> stage_copies(const Program& p, int stage, std::int64_t rank) {
  std::vector<std::int64_t> all(p.blocks.size(), 0);
  if (!p.allocations.stage_copies || stage >= p.pipeline_stages()) return all;
  std::map<int, std::int64_t> of_chunk;
  std::set<BlockId> blocks;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    const Block& block = p.blocks[b.index()];
    if (block.kind != BlockKind::forward) continue;
    for (const Instruction& i : block.instructions) {
      if (i.kind == Kind::send) all[b.index()] += device_bytes(p, i.reads[0], rank).count;
      if (i.kind == Kind::receive) all[b.index()] += device_bytes(p, i.writes[0], rank).count;
      if (is_loss(p, i)) all[b.index()] += local_bytes(p, i.reads.at(0), rank).count;
    }
    of_chunk[block.chunk] = all[b.index()];
  }
  for (const BlockId b : blocks) {
    const Block& block = p.blocks[b.index()];
    if (block.kind == BlockKind::backward) all[b.index()] = -of_chunk[block.chunk];
  }
  return all;
}

Bytes kept_inputs(const Program& p, int stage, std::int64_t rank) {
  Bytes sum{0};
  if (!p.allocations.keeps_inputs || stage >= p.pipeline_stages()) return sum;
  std::set<BlockId> blocks;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    if (p.blocks[b.index()].kind != BlockKind::forward) continue;
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      if (i.kind == Kind::receive) sum += Bytes{2 * device_bytes(p, i.writes[0], rank).count};
    }
  }
  return sum;
}

std::vector<Bytes> step_bytes(const Program& p, int stage, std::int64_t rank) {
  std::vector<Bytes> all;
  if (stage >= p.pipeline_stages()) return all;
  const Allocations& a = p.allocations;
  std::int64_t own = 0, elements = 0;
  std::set<BlockId> blocks;
  std::set<BufferId> beside;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    for (const BufferId g : gradients_beside(p, p.blocks[b.index()])) beside.insert(g);
  }
  // What is accumulated in another type goes as a whole in the parameters'.
  Bytes copy{0};
  for (const BufferId g : beside) copy += as_parameters(p, g, rank);
  if (a.reduce_buffer.count > 0) all.push_back(beside.empty() ? a.reduce_buffer : copy);
  if (!a.flat_gradients) return all;
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      if (i.kind != Kind::compute || i.kernel != Kernel::optimizer) continue;
      const Buffer& gradient = p.buffer(i.reads.at(0));
      if (gradient.type == ElementType::fp32) continue;
      const std::int64_t n = local_elements(p, i.reads[0], rank);
      own += ceil_div(n * bits(gradient.type), 8);
      elements += n;
    }
  }
  if (elements > 0) all.insert(all.end(), {Bytes{own}, Bytes{4 * elements}});
  return all;
}

Bytes transient_bytes(const Program& p, const Instruction& i, std::int64_t rank) {
  if (i.kind == Kind::compute) return gradients_apart(p, i, rank) + loss_bytes(p, i, rank);
  if (!p.packs_collectives || (i.kind != Kind::collective && i.kind != Kind::slice))
    return Bytes{0};
  if (p.buffer(i.reads[0]).routed) return routed_payload(p, i, rank);
  Bytes in{0}, out{0};
  for (const BufferId id : i.reads) {
    out += local_bytes(p, id, rank);
  }
  for (const BufferId id : i.writes) in += local_bytes(p, id, rank);
  if (i.kind == Kind::slice) return Bytes{2 * in.count};
  switch (i.collective) {
    case CollectiveKind::all_reduce:
      // One buffer in place is reduced where it lies.
      return i.reads.size() == 1 && p.memory_of(i.reads[0]) == p.memory_of(i.writes[0]) ? Bytes{0}
                                                                                        : out;
    case CollectiveKind::reduce:
    case CollectiveKind::reduce_scatter:
      return out;
    case CollectiveKind::broadcast:
    case CollectiveKind::all_gather:
      return in;
    case CollectiveKind::scatter:
    case CollectiveKind::gather: {
      // Every member's payload has the place of each chunk, as the root's.
      const std::int64_t root = p.mesh.group_root(p.place_of(rank), i.atoms);
      const bool gathers = i.collective == CollectiveKind::gather;
      Bytes all{0};
      for (const BufferId id : gathers ? i.writes : i.reads) all += local_bytes(p, id, root);
      return all;
    }
    case CollectiveKind::halo_exchange: {
      // A row that two neighbours want is packed for each.
      std::int64_t n = 0;
      for (std::size_t k = 0; k < i.reads.size(); ++k) {
        const Buffer& b = p.buffer(i.reads[k]);
        for (const std::int64_t m : p.group(i, rank))
          n += b.width() * (common_elements(p, i.reads[k], rank, i.writes[k], m) +
                            common_elements(p, i.reads[k], m, i.writes[k], rank));
      }
      return Bytes{n};
    }
    case CollectiveKind::all_to_all:
    case CollectiveKind::shift:
      return in + out;
  }
  return Bytes{0};
}

std::int64_t timed_instructions(const Program& program) {
  std::vector<std::int64_t> in_block;
  for (const Block& b : program.blocks) {
    in_block.push_back(std::count_if(
        b.instructions.begin(), b.instructions.end(),
        [](const Instruction& i) { return i.kind != Kind::allocate && i.kind != Kind::free; }));
  }
  std::int64_t n = 0;
  for (const auto& calls : program.stages) {
    for (const BlockCall& call : calls) n += in_block[call.block.index()];
  }
  return n;
}

}  // namespace partita
