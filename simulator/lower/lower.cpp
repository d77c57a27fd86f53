#include "simulator/lower/lower.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <set>

namespace partita {
namespace {

/// One layout in which a tensor is at hand.
struct Version {
  Layout layout;
  BufferId buffer;
  int gathered_from = -1;  ///< index of the version this one was all-gathered from
};
using Versions = std::map<TensorId, std::vector<Version>>;

/// What one forward execution of an operator leaves for its backward.
struct Record {
  std::vector<BufferId> outputs, statistics, extras;
};

/// One summand of a tensor's gradient.
struct Contribution {
  Layout layout;
  BufferId buffer;
  bool owned = false;  ///< nobody else reads it: later summands may be added in place
};

struct ParameterOnStage {
  BufferId value;          ///< whole local parameter; ZeRO-3: the flat shard
  Layout layout;           ///< required by its readers
  Layout gradient_layout;  ///< as computed, with what is owed
  BufferId gradient;       ///< accumulated over micro-batches, as computed
  BufferId shard;          ///< ZeRO-2, -3: what every micro-batch's gradients are scattered into
  BufferId reduced;     ///< gradient as far as it is synchronised; at last what the optimizer reads
  Layout state_layout;  ///< of optimizer state
  AtomMask scattered = 0;  ///< atoms that the state is cut over
  std::int64_t order = 0;  ///< when its gradient is ready, in the backward
  int unit = 0;            ///< parameters gathered together (ZeRO-3)
  int chunks = 0;          ///< of this stage that read it
  int last_chunk = -1;     ///< of those, while they are counted
};

class Lowering {
 public:
  Lowering(const Graph& graph, const Plan& plan)
      : graph_(graph),
        plan_(plan),
        drops_(std::any_of(graph.operators.begin(), graph.operators.end(), [](const Operator& op) {
          return std::holds_alternative<Dropout>(op.operation);
        })) {}

  Feasible<Program> run() {
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

 private:
  // ---- pass 1: chunks ------------------------------------------------------------------------
  Infeasible assign_chunks() {
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

  /// 8- and 4-bit types multiply by weights inside the blocks only, as Transformer Engine does:
  /// attention, the head and a router stay in the parameters' type.
  ElementType compute_type(const Operation& op) const {
    const Precision& p = plan_.precision;
    if (bits(p.compute) > 8 || std::holds_alternative<GroupedProduct>(op)) return p.compute;
    const auto* linear = std::get_if<Linear>(&op);
    const bool block = linear != nullptr && linear->out.back().dim != Dim::vocabulary &&
                       linear->out.back().dim != Dim::expert;
    return block ? p.compute : p.parameters;
  }

  /// Is it the residual's sum or the activation behind a batch norm?
  bool follows_normalise(const Operator& op) const {
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

  /// The attention, gated activation or gated norm that takes a product's result, normalised,
  /// turned or scanned at most.
  OpId taker_of(const Operator& op) const {
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

  /// Products of one input for one attention, gated activation or gated norm become one.
  void join_projections() {
    std::map<std::tuple<TensorId, OpId, bool>, std::size_t> first;
    for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
      const Operator& op = graph_.operators[i];
      if (!std::holds_alternative<Linear>(op.operation) &&
          !std::holds_alternative<GroupedProduct>(op.operation))
        continue;
      const OpId taker = taker_of(op);
      if (!taker.valid()) continue;
      const auto key =
          std::tuple{op.inputs[0], taker, graph_.parameter(op.parameters[0]).trainable};
      const auto [at, is_first] = first.try_emplace(key, i);
      if (is_first) continue;
      p_.operators[at->second].joined.push_back(static_cast<int>(i));
      p_.operators[i].in_other = true;
    }
  }

  // ---- pass 2: layouts -----------------------------------------------------------------------
  Infeasible derive_layouts() {
    for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
      auto l = derive(graph_, plan_, OpId{i}, p_.samples);
      if (!l) return l.why();
      const Operator& op = graph_.operators[i];
      ProgramOperator po;
      po.name = op.name;
      po.operation = op.operation;
      po.signature = l->signature;
      po.cuts = l->cuts;
      po.root = l->root;
      po.compute = compute_type(op.operation);
      po.has_loss = graph_.loss.valid() && std::find(op.outputs.begin(), op.outputs.end(),
                                                     graph_.loss) != op.outputs.end();
      po.captured = matches(plan_.launches.graphs_of, op.name);
      po.in_normalise = plan_.fuses_normalise && follows_normalise(op);
      p_.operators.push_back(std::move(po));
      layouts_.push_back(std::move(*l));
    }
    if (plan_.joins_projections) join_projections();
    return {};
  }

  void declare_inputs_and_parameters() {
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

  // ---- pass 3: parameters on stages ----------------------------------------------------------
  /// Is a shard in this layout of its state what the framework has of a parameter, in fp32?
  bool shards_masters(const Layout& state) const {
    return plan_.allocations.fp32_shards && plan_.zero == 3 && plan_.precision.master_copy &&
           !state.flat.empty();
  }
  Infeasible place_parameters() {
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

  Infeasible place_parameters(int chunk) {
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

  // ---- pass 4: recomputed segments -----------------------------------------------------------
  void find_segments() {
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
      if (segment_[i] >= 0)
        ops_of_segment_[static_cast<std::size_t>(segment_[i])].push_back(OpId{i});
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

  /// Does a backward need what the last operator of a segment makes, or another segment that runs
  /// again?
  bool needed_again(OpId id) const {
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

  // ---- small helpers -------------------------------------------------------------------------
  int stage_of_chunk(int chunk) const {
    return partita::stage_of_chunk(plan_.schedule, chunk, stages_);
  }
  /// The chunk of an operator in the copy that is being lowered.
  int chunk_of(OpId id) const { return chunk_of_[id.index()] + direction_ * network_chunks_; }

  BufferId buffer(std::string name, Category category, Scope scope, Shape shape, Layout layout,
                  ElementType type) {
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

  BufferId tensor_buffer(TensorId t, const Layout& layout,
                         Category category = Category::activations) {
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

  Stream stream(const std::string& name) {
    for (std::size_t i = 0; i < p_.streams.size(); ++i) {
      if (p_.streams[i] == name) return static_cast<Stream>(i);
    }
    p_.streams.push_back(name);
    PARTITA_ASSERT(p_.streams.size() < 256, "too many streams");
    return static_cast<Stream>(p_.streams.size() - 1);
  }
  std::string label_of(AtomMask atoms) const {
    std::string label;
    for (std::size_t i = 0; i < p_.mesh.atoms.size(); ++i) {
      if (has(atoms, static_cast<AtomId>(i)))
        label += (label.empty() ? "" : "*") + p_.mesh.atoms[i].name;
    }
    return label;
  }
  /// One communicator per group of ranks: its collectives follow each other, as NCCL's do.
  Stream group_stream(AtomMask atoms) { return stream(label_of(atoms)); }
  /// Of gradients and parameters. Where context or expert parallelism is over the same ranks it has
  /// a communicator of its own (Megatron-Core, parallel_state.py: groups for context, for experts,
  /// and for data with context parallelism; PyTorch makes one for each dimension of a mesh).
  Stream state_stream(AtomMask atoms) {
    const AtomMask inside = mask_of(plan_.axes.at("tp")),
                   rows = static_cast<AtomMask>(mask_of(plan_.axes.at("cp")) |
                                                mask_of(plan_.axes.at("ep")) | inside);
    const bool both = (atoms & ~rows) == 0 && (atoms & ~inside) != 0;
    return both ? stream(label_of(atoms) + " state") : group_stream(atoms);
  }

  /// Emits the steps that turn `from` into layout `to`; returns the last buffer. Every intermediate
  /// result is reported to `made`.
  template <class Made>
  BufferId emit_reshard(Block& block, BufferId source, const Layout& to, Made made) {
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
        if (step.collective == CollectiveKind::all_reduce)
          p_.buffers[next.index()].alias = at.value;
      }
      block.instructions.push_back(std::move(i));
      made(next, step);
      at = next;
    }
    return at;
  }

  /// Elements that the communicating steps from one layout to another touch on rank 0: to choose a
  /// source.
  std::int64_t reshard_volume(BufferId source, const Layout& to) const {
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

  /// A buffer that holds tensor t as `layout`, resharded from what `versions` has.
  BufferId get(Block& block, Versions& versions, TensorId t, const Layout& layout) {
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

  // ---- the loader's role
  // --------------------------------------------------------------------------
  struct FromLoader {
    TensorId tensor;
    Layout layout;
    int message;
  };
  /// A network input arrives from the loader of this data-parallel rank, at one rank of those that
  /// share its samples; resharding passes it on.
  void from_loader(Block& block, std::vector<Version>& have, TensorId t) {
    const AtomList& dp = plan_.axes.at("dp");
    Layout layout;
    layout.dims.resize(graph_.tensor(t).shape.size());
    layout.dims[0].atoms = dp;  // samples come first
    for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
      const AtomMask atom = bit(static_cast<AtomId>(a));
      if ((atom & (mask_of(dp) | mask_of(p_.pipeline))) == 0)
        layout.root = static_cast<AtomMask>(layout.root | atom);
    }
    if (plan_.replicas != 0) layout.dims[0].atoms.clear();  // every replica has all its samples
    const BufferId b = tensor_buffer(t, layout);
    const int id = message(t, block.chunk, false);
    transfer(block, Kind::receive, b, stages_, id, false);
    from_loader_[block.chunk].push_back({t, layout, id});
    have.push_back({layout, b, -1});
  }

  void loader_blocks() {
    if (!plan_.loader) return;
    p_.roles.push_back({"loader", plan_.axes.at("dp")});
    std::vector<BlockId> blocks;
    for (const auto& [chunk, list] : from_loader_) {
      Block block;
      block.name = fmt::format("load {}", chunk);
      block.kind = BlockKind::forward;
      block.chunk = chunk;
      block.stage = stages_;
      for (const FromLoader& f : list) {
        Instruction i;
        i.kind = Kind::load;
        if (plan_.sharded_storage) i.stream = stream("storage");
        i.writes = {tensor_buffer(f.tensor, f.layout)};
        for (std::size_t k = 0; k < p_.inputs.size(); ++k) {
          if (p_.inputs[k].tensor == f.tensor.value) i.index = static_cast<std::int32_t>(k);
        }
        const BufferId made = i.writes[0];
        block.instructions.push_back(std::move(i));
        transfer(block, Kind::send, made, stage_of_chunk(chunk), f.message, false);
      }
      blocks.push_back(BlockId{p_.blocks.size()});
      p_.blocks.push_back(std::move(block));
    }
    auto& calls = p_.stages.emplace_back();
    const int copies = directions(plan_.schedule), each = p_.micro_batches / copies;
    for (int m = 0; m < each; ++m) {
      for (const BlockId b : blocks) {
        const int copy = p_.blocks[b.index()].chunk / network_chunks_;
        calls.push_back({b, copy * each + m});
      }
    }
  }

  // ---- ZeRO-3: parameters gathered for use -----------------------------------------------------
  struct Gathered {
    std::map<ParameterId, BufferId> whole;
    std::vector<int> units;  ///< in order of use
    /// By unit: what was gathered for parameters that are not copied out of it yet.
    std::map<int, std::vector<std::pair<BufferId, BufferId>>> copies;
  };

  /// The buffer with the whole local parameter in this block; gathers its unit, and the next one
  /// ahead.
  BufferId parameter_for(Block& block, Gathered& gathered, const std::vector<int>& unit_order,
                         ParameterId q) {
    const ParameterOnStage& v = on_stage(block.stage).at(q);
    if (plan_.zero < 3 || v.scattered == 0) return v.value;
    if (gathered.whole.find(q) == gathered.whole.end()) gather_unit(block, gathered, v.unit, false);
    prefetch_after(block, gathered, unit_order, v.unit);
    copy_out(block, gathered, v.unit);
    return gathered.whole.at(q);
  }
  /// Parameters of a unit that was gathered as one are copied out of it before its first kernel.
  void copy_out(Block& block, Gathered& gathered, int unit) {
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
  void prefetch_after(Block& block, Gathered& gathered, const std::vector<int>& unit_order,
                      int unit) {
    const auto at = std::find(unit_order.begin(), unit_order.end(), unit);
    if (at == unit_order.end() || at + 1 == unit_order.end()) return;
    if (std::find(gathered.units.begin(), gathered.units.end(), *(at + 1)) ==
        gathered.units.end()) {
      gather_unit(block, gathered, *(at + 1), true);
    }
  }
  void gather_unit(Block& block, Gathered& gathered, int unit, bool ahead) {
    gathered.units.push_back(unit);
    std::map<AtomMask, Instruction> calls;  // one call per group of ranks
    for (const auto& [q, v] : on_stage(block.stage)) {
      if (v.unit != unit || v.scattered == 0) continue;
      // Only what this chunk reads: a stage of an interleaved schedule holds several chunks.
      if (!used_in_chunk(q, block.chunk)) continue;
      const BufferId whole =
          buffer(graph_.parameter(q).name, Category::buffers, Scope::micro_batch,
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
  /// Of what the forward gathered, what the backward need not gather again.
  Gathered stays_gathered(int chunk) const {
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
  bool used_in_chunk(ParameterId q, int chunk) const {
    for (const OpId id : ops_of_chunk_[static_cast<std::size_t>(chunk)]) {
      const auto& list = graph_.op(id).parameters;
      if (std::find(list.begin(), list.end(), q) != list.end()) return true;
    }
    return false;
  }
  std::vector<int> units_of_chunk(int chunk) const {
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
  std::map<ParameterId, ParameterOnStage>& on_stage(int s) {
    return on_stage_[static_cast<std::size_t>(s)];
  }
  const std::map<ParameterId, ParameterOnStage>& on_stage(int s) const {
    return on_stage_[static_cast<std::size_t>(s)];
  }

  // ---- forward of one operator (also when recomputed) -----------------------------------------
  /// Statistic buffers of one pass; when a statistic's dimensions are cut, emits the local part and
  /// its all-reduce for each and returns the complete ones. `proto` carries the operator's
  /// operands.
  std::vector<BufferId> statistics(Block& block, OpId id, const std::vector<Statistic>& list,
                                   Kernel kernel, const Instruction& proto, AtomMask cut) {
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
      const BufferId whole = buffer(label, Category::activations, Scope::micro_batch, shape, layout,
                                    ElementType::fp32);
      if (cut != 0) {
        layout.partial = cut;
        layout.reduction = list[k].reduction;
        const BufferId local = buffer(label, Category::workspace, Scope::micro_batch, shape, layout,
                                      ElementType::fp32);
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

  AtomMask statistic_cut(OpId id) const {
    const OperatorLayouts& l = layouts_[id.index()];
    AtomMask cut = 0;
    for (std::size_t d = 0; d < l.cuts.size(); ++d) {
      if (l.signature.dims[d].use == DimUse::statistic)
        cut = static_cast<AtomMask>(cut | mask_of(l.cuts[d].atoms));
    }
    return cut;
  }

  template <class Input>
  Record emit_forward(Block& block, OpId id, Versions& results, Gathered& gathered,
                      const std::vector<int>& units, bool recomputed, Input input) {
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

  /// Passes buffers on to the next rank of the ring along dimension 1.
  std::vector<BufferId> pass_on(Block& block, const std::vector<BufferId>& from) {
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
  int ring_parts(const Instruction& i) const {
    return static_cast<int>(p_.mesh.size(p_.buffer(i.reads[1]).layout.dims[1].atoms));
  }

  /// Attention over each part of the keys as it passes by; the next part travels meanwhile.
  void ring_forward(Block& block, Instruction i) {
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

  /// The same walk backwards in time: gradients of keys and values travel one place behind their
  /// parts and are home after as many steps as there are ranks. Returns them. What a part gives is
  /// made while they travel, and added when they have come.
  std::vector<BufferId> ring_backward(Block& block, Instruction i) {
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

  // ---- pass 5: forward blocks ------------------------------------------------------------------
  /// Chunks (other than its producer's) that read tensor t, ascending.
  std::vector<int> reader_chunks(TensorId t) const {
    std::set<int> all;
    for (const OpId c : consumers_[t.index()]) all.insert(chunk_of(c));
    if (const OpId from = graph_.tensor(t).producer; from.valid()) all.erase(chunk_of(from));
    return {all.begin(), all.end()};
  }

  /// The layout in which a tensor travels to another chunk: what its first reader there needs.
  Layout boundary_layout(TensorId t, int chunk) const {
    for (const OpId c : consumers_[t.index()]) {
      if (chunk_of(c) != chunk) continue;
      const Operator& op = graph_.op(c);
      for (std::size_t k = 0; k < op.inputs.size(); ++k) {
        if (op.inputs[k] == t) return without_windows(layouts_[c.index()].inputs[k]);
      }
    }
    throw InternalError("no reader of " + graph_.tensor(t).name);
  }

  int new_message() {
    const int id = static_cast<int>(messages_.size());
    messages_.emplace(std::tuple{-1 - id, 0, false}, id);
    return id;
  }
  int message(TensorId t, int chunk, bool backward) {
    const auto key = std::tuple{t.value, chunk, backward};
    const auto [it, fresh] = messages_.emplace(key, static_cast<int>(messages_.size()));
    (void)fresh;
    return it->second;
  }

  bool waits_for_sends() const {
    return plan_.send_wait == SendWait::always ||
           (plan_.send_wait == SendWait::not_interleaved && plan_.virtual_stages == 1);
  }

  void transfer(Block& block, Kind kind, BufferId b, int other_stage, int id, bool backward) {
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

  // ---- operands that become narrow -------------------------------------------------------------
  /// A product in an 8- or 4-bit type converts what it reads of activations and gradients. Products
  /// of one block that read the same share the copies; what a norm makes comes converted
  /// (Transformer Engine, pytorch/module/layernorm_linear.py), after it where scales are found
  /// first.
  void mark_casts() {
    for (Block& block : p_.blocks) {
      std::set<BufferId> narrow;
      std::map<BufferId, Instruction*> norms;
      for (Instruction& i : block.instructions) {
        if (i.kind == Kind::collective && i.reads.size() == 1 && i.writes.size() == 1 &&
            i.collective != CollectiveKind::reduce_scatter && narrow.count(i.reads[0]) > 0) {
          narrow.insert(i.writes[0]);
          if (const auto n = norms.find(i.reads[0]); n != norms.end())
            norms[i.writes[0]] = n->second;
        }
        if (i.kind != Kind::compute || i.op < 0) continue;
        if (i.kernel == Kernel::forward &&
            std::holds_alternative<Normalize>(
                p_.operators[static_cast<std::size_t>(i.op)].operation)) {
          narrow.insert(i.writes[0]);
          norms[i.writes[0]] = &i;
        }
        const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
        if (bits(op.compute) > 8) continue;
        const bool forward = i.kernel == Kernel::forward;
        if (!forward && i.kernel != Kernel::backward_data && i.kernel != Kernel::backward_weight)
          continue;
        const auto& operands = forward ? i.reads : i.gradients;
        i.casts = !operands.empty() && operands[0].valid() && narrow.insert(operands[0]).second;
        if (operands.empty() || !plan_.kernels.finds_scales || !has_tensor_scale(op.compute))
          continue;
        if (const auto n = norms.find(operands[0]); n != norms.end())
          n->second->casts = true, n->second->cast_type = op.compute;
      }
    }
  }

  /// What forward passes leave for gradients of narrow products' weights alone is kept as their
  /// narrow copy; what other backward passes read too, beside it.
  void keep_narrow() {
    std::vector<char> made(p_.buffers.size(), 0), wide(made);
    std::vector<int> narrow(p_.buffers.size(), 0);  // bits
    for (const Block& block : p_.blocks) {
      if (block.kind == BlockKind::forward) {
        for (const Instruction& i : block.instructions)
          for_each_write(i, [&](BufferId id) { made[id.index()] = 1; });
      }
      if (block.kind != BlockKind::backward && block.kind != BlockKind::backward_weight) continue;
      // From the end: what is gathered again is wanted as what it is gathered for.
      for (auto i = block.instructions.rbegin(); i != block.instructions.rend(); ++i) {
        int width = 0;
        if (i->kind != Kind::compute) {
          for_each_write(*i, [&](BufferId id) {
            if (wide[id.index()] == 0) width = std::max(width, narrow[id.index()]);
          });
        } else if (i->kernel == Kernel::backward_weight) {
          const int own =
              static_cast<int>(bits(p_.operators[static_cast<std::size_t>(i->op)].compute));
          width = own <= 8 ? own : 0;
        }
        for_each_read(*i, [&](BufferId id) {
          const bool operand = i->kind != Kind::compute ||
                               std::find(i->reads.begin(), i->reads.end(), id) != i->reads.end();
          if (width > 0 && operand)
            narrow[id.index()] = width;
          else
            wide[id.index()] = 1;
        });
      }
    }
    for (std::size_t k = 0; k < p_.buffers.size(); ++k) {
      Buffer& b = p_.buffers[k];
      if (made[k] == 0 || narrow[k] == 0 || b.category != Category::activations ||
          b.scope != Scope::micro_batch || b.alias >= 0 || b.element_bytes > 0)
        continue;
      b.kept_bits = narrow[k] + (wide[k] != 0 ? static_cast<int>(bits(b.type)) : 0);
    }
  }

  /// What narrow products alone read was converted before it is gathered (Transformer Engine,
  /// pytorch/distributed.py, gather_along_first_dim with a quantizer). Types with a scale a block
  /// of the sum travel once for each side that they are summed along: a gradient that data's and
  /// weights' products read, twice.
  void gather_narrow() {
    const AtomMask tp = mask_of(plan_.axes.at("tp"));
    struct Readers {
      int bits = 0, sides = 0;  // sides: 1 rows, 2 columns
      bool wide = false;
      bool operator==(const Readers&) const = default;
    };
    std::vector<Readers> readers(p_.buffers.size());
    const auto passes_on = [](const Instruction& i) {
      return (i.kind == Kind::collective && i.reads.size() == i.writes.size() &&
              (i.collective == CollectiveKind::all_gather ||
               i.collective == CollectiveKind::shift)) ||
             i.kind == Kind::slice;
    };
    for (bool changed = true; changed;) {
      changed = false;
      for (auto block = p_.blocks.rbegin(); block != p_.blocks.rend(); ++block) {
        for (auto i = block->instructions.rbegin(); i != block->instructions.rend(); ++i) {
          const auto note = [&](BufferId id, const Readers& by) {
            Readers& r = readers[id.index()];
            const Readers all{std::max(r.bits, by.bits), r.sides | by.sides, r.wide || by.wide};
            changed |= !(all == r);
            r = all;
          };
          if (passes_on(*i)) {
            for (std::size_t k = 0; k < i->reads.size(); ++k)
              note(i->reads[k], readers[i->writes[std::min(k, i->writes.size() - 1)].index()]);
            continue;
          }
          Readers product;
          if (i->kind == Kind::compute && i->op >= 0 &&
              (i->kernel == Kernel::forward || i->kernel == Kernel::backward_data ||
               i->kernel == Kernel::backward_weight)) {
            const int own =
                static_cast<int>(bits(p_.operators[static_cast<std::size_t>(i->op)].compute));
            if (own <= 8) product = {own, i->kernel == Kernel::backward_weight ? 2 : 1, false};
          }
          for_each_read(*i, [&](BufferId id) {
            const auto in = [&](const std::vector<BufferId>& list) {
              return std::find(list.begin(), list.end(), id) != list.end();
            };
            const bool operand = product.bits > 0 && (in(i->reads) || in(i->gradients));
            note(id, operand ? product : Readers{0, 0, true});
          });
        }
      }
    }
    const bool blocks = plan_.precision.compute != ElementType::fp8;
    for (Block& block : p_.blocks) {
      for (Instruction& i : block.instructions) {
        if (i.kind != Kind::collective || !passes_on(i) || (i.atoms & ~tp) != 0) continue;
        Readers all;
        for (const BufferId id : i.writes) {
          const Readers& r = readers[id.index()];
          all = {std::max(all.bits, r.bits), all.sides | r.sides, all.wide || r.wide};
        }
        if (all.wide || all.bits == 0) continue;
        const int sent = all.bits * (blocks && all.sides == 3 ? 2 : 1);
        if (sent < static_cast<int>(bits(p_.buffer(i.reads[0]).type))) i.sent_bits = sent;
      }
    }
  }

  /// Gradients are summed over tp where the program has them, not beside the kernels before.
  void sum_in_turn() {
    const AtomMask tp = mask_of(plan_.axes.at("tp"));
    for (Block& block : p_.blocks) {
      if (block.kind != BlockKind::backward) continue;
      for (Instruction& i : block.instructions) {
        const bool sums = i.collective == CollectiveKind::all_reduce ||
                          i.collective == CollectiveKind::reduce_scatter;
        if (i.kind == Kind::collective && sums && i.atoms == tp && i.tie < 0)
          i.after_compute = true;
      }
    }
  }

  /// What a backward gathers over tp it gathers right before the first kernel that reads it.
  void gather_in_turn() {
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

  // ---- products in parts, beside the sequence's way (docs/policies.md) -------------------------
  void split_products() {
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
      return std::includes(made[id.index()].begin(), made[id.index()].end(),
                           used[id.index()].begin(), used[id.index()].end());
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

  /// Is the sequence, cut in `cut` by the collective's group last, what it gathers or scatters?
  bool crosses_sequence(const Instruction& i, BufferId cut) const {
    const Buffer& b = p_.buffer(cut);
    const int d = sequence_dim(b);
    if (d < 0 || b.routed || i.atoms != mask_of(plan_.axes.at("tp"))) return false;
    const DimSplit& s = b.layout.dims[static_cast<std::size_t>(d)];
    const auto before = atoms_before(s.atoms, i.atoms);
    return before && s.zigzag <= *before && s.shift == 0 && s.kind == SplitKind::block;
  }
  bool is_product(const Instruction& i) const {
    return i.kind == Kind::compute && i.op >= 0 && i.part < 0 &&
           (i.kernel == Kernel::forward || i.kernel == Kernel::backward_data ||
            i.kernel == Kernel::backward_weight) &&
           std::holds_alternative<Linear>(p_.operators[static_cast<std::size_t>(i.op)].operation);
  }
  /// The buffer as the ring passes it: `shift` places on.
  BufferId shifted(BufferId id, std::int32_t shift, AtomMask ring) {
    Buffer b = p_.buffer(id);
    DimSplit& s = b.layout.dims[static_cast<std::size_t>(sequence_dim(b))];
    s.shift = shift % static_cast<std::int32_t>(p_.mesh.size(ring));
    s.fixed = s.shift == 0 ? std::uint8_t{0} : *atoms_before(s.atoms, ring);
    b.alias = -1;
    p_.buffers.push_back(std::move(b));
    return BufferId{p_.buffers.size() - 1};
  }
  Instruction pass(BufferId from, BufferId to, AtomMask atoms, std::int32_t part) {
    Instruction i = reduction(atoms, CollectiveKind::shift);
    i.part = part;
    i.reads = {from};
    i.writes = {to};
    i.multiprocessors = plan_.overlap_multiprocessors;
    return i;
  }

  /// All readers of what is gathered are products: each takes the parts as they come round.
  void gather_in_parts(const Block& block, std::size_t at,
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

  /// The product whose sum is scattered makes each rank's part in turn, the own one last; sums
  /// travel on while the next part is computed.
  void scatter_in_parts(const Block& block, std::size_t at,
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
      if (is_product(i) && !i.accumulate && i.writes.size() == 1 && i.writes[0] == whole)
        writer = k;
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

  // ---- messages through a broker ---------------------------------------------------------------
  BufferId on_host(BufferId id, const char* suffix, Category category) {
    Buffer b = p_.buffer(id);
    b.name += suffix;
    b.category = category;
    b.host = true;
    b.alias = -1;
    b.parameter = -1;
    p_.buffers.push_back(std::move(b));
    return BufferId{p_.buffers.size() - 1};
  }
  Instruction copy(BufferId from, BufferId to) {
    Instruction i;
    i.kind = Kind::copy;
    i.reads = {from};
    i.writes = {to};
    const bool a = p_.buffer(from).host, b = p_.buffer(to).host;
    i.stream = stream(a && b ? "host" : b ? "device to host" : "host to device");
    return i;
  }

  /// A message from stage to stage: the device's buffer, its copy on the host, the serialised
  /// message, the broker's, and back.
  void through_queue(Block& block, Instruction i) {
    const bool sends = i.kind == Kind::send;
    const BufferId device = sends ? i.reads[0] : i.writes[0];
    const BufferId host = on_host(device, ".host", Category::buffers);
    const BufferId packed = on_host(device, ".message", Category::buffers);
    const int broker = stages_ + (plan_.loader ? 1 : 0) + static_cast<int>(plan_.servers);
    Relay& relay = relays_[i.index];
    (sends ? relay.from : relay.to) = block.stage;
    relay.message = packed;
    if (relay.out < 0) relay.out = new_message();
    if (sends) {
      block.instructions.push_back(copy(device, host));
      block.instructions.back().after_compute = true;
      block.instructions.push_back(copy(host, packed));
      i.reads = {packed};
      i.stage = broker;
      i.after_compute = false;
      block.instructions.push_back(std::move(i));
      return;
    }
    i.index = relay.out;
    i.stage = broker;
    i.writes = {packed};
    block.instructions.push_back(std::move(i));
    block.instructions.push_back(copy(packed, host));
    block.instructions.push_back(copy(host, device));
  }

  struct Relay {
    int from = -1, to = -1, out = -1;  ///< stages, and the message behind the broker
    BufferId message;
  };

  /// Brokers hand messages on in an order in which they can come: that of a run in which the stages
  /// take turns.
  void broker_blocks() {
    AtomList lanes;
    for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
      const auto atom = static_cast<AtomId>(a);
      if (!has(mask_of(p_.pipeline), atom)) lanes.push_back(atom);
    }
    const int stage = stages_ + static_cast<int>(p_.roles.size());
    p_.roles.push_back({"broker", lanes});
    std::map<int, BlockId> block_of;
    std::map<int, int> in_of;  // message behind the broker -> before it
    for (const auto& [in, relay] : relays_) {
      Block block;
      block.name = fmt::format("relay {}", p_.buffer(relay.message).name);
      block.kind = BlockKind::forward;
      block.stage = stage;
      block.chunk = -1;
      Instruction i;
      i.kind = Kind::receive;
      i.stage = relay.from;
      i.index = in;
      i.stream = stream("receive");
      i.writes = {on_host(relay.message, "", Category::buffers)};
      Instruction o = i;
      o.kind = Kind::send;
      o.stage = relay.to;
      o.index = relay.out;
      o.stream = stream("send");
      std::swap(o.reads, o.writes);
      block.instructions.push_back(std::move(i));
      block.instructions.push_back(std::move(o));
      block_of[in] = BlockId{p_.blocks.size()};
      in_of[relay.out] = in;
      p_.blocks.push_back(std::move(block));
    }
    std::vector<BlockCall> calls;
    std::set<std::pair<int, int>> relayed;
    std::vector<std::pair<std::size_t, std::size_t>> at(static_cast<std::size_t>(stages_));
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t s = 0; s < at.size(); ++s) {
        auto& [call, k] = at[s];
        for (bool waits = false; !waits && call < p_.stages[s].size();) {
          const BlockCall& c = p_.stages[s][call];
          const auto& list = p_.blocks[c.block.index()].instructions;
          if (k == list.size()) {
            ++call, k = 0;
            continue;
          }
          const Instruction& i = list[k];
          if (i.kind == Kind::send && i.stage == stage) {
            calls.push_back({block_of.at(i.index), c.micro_batch});
            relayed.insert({i.index, c.micro_batch});
          } else if (i.kind == Kind::receive && i.stage == stage &&
                     relayed.count({in_of.at(i.index), c.micro_batch}) == 0) {
            waits = true;
            continue;
          }
          ++k;
          moved = true;
        }
      }
    }
    p_.stages.push_back(std::move(calls));
  }

  void forward_block(int chunk) {
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

  // ---- pass 6: backward blocks -----------------------------------------------------------------
  struct Backward {
    Block block;
    Block weight;  ///< gradients of weights, where the schedule runs them by themselves
    Versions regathered, recomputed;
    std::map<int, bool> segment_done;
    std::map<OpId, Record> records;  ///< of recomputed operators
    std::map<TensorId, std::vector<Contribution>> contributions;
    std::set<TensorId> ones;  ///< summands of the loss: their gradient is the number 1, no buffer
    Gathered gathered;
    std::vector<int> units;
    std::map<ParameterId, BufferId> micro_batch_gradients;  ///< ZeRO-2, -3
    std::set<ParameterId> begun;  ///< whose gradients some call has written
    std::map<ParameterId, std::size_t> writes_left;
    std::map<ParameterId, std::size_t> ready_at;  ///< instruction after which the gradient is done
  };
  /// Does this call make the first of the gradients that it writes? Then there is nothing to add
  /// to, and nothing to clear: of a micro-batch, or of a step of one to which no other call adds.
  bool stores_gradients(Backward& b, const Operator& op) {
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
  /// Where gradients of weights are computed.
  Block& weights(Backward& b) const { return splits_backward(plan_.schedule) ? b.weight : b.block; }

  /// What the forward left of tensor t in `layout`, gathered again if only a part was kept.
  BufferId saved(Backward& b, TensorId t, const Layout& layout) {
    const BufferId made =
        made_before(b, forward_versions_[static_cast<std::size_t>(b.block.chunk)].at(t), t, layout,
                    plan_.save_gathered);
    if (!made.valid()) throw InternalError("nothing saved of " + graph_.tensor(t).name);
    return made;
  }

  /// Of what there is of tensor t, what lies as `layout`, gathered again unless that is kept;
  /// invalid if nothing does.
  BufferId made_before(Backward& b, const std::vector<Version>& have, TensorId t,
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

  /// `again`: the reader is itself a forward that is recomputed.
  BufferId operand(Backward& b, OpId reader, TensorId t, const Layout& layout, bool again) {
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

  void recompute(Backward& b, int segment) {
    if (b.segment_done[segment]) return;
    b.segment_done[segment] = true;
    for (const OpId id : ops_of_segment_[static_cast<std::size_t>(segment)]) {
      b.records[id] =
          emit_forward(b.block, id, b.recomputed, b.gathered, b.units, true,
                       [&](TensorId t, const Layout& l) { return operand(b, id, t, l, true); });
    }
  }

  void contribute(Backward& b, TensorId t, const Layout& layout, BufferId buffer, bool owned) {
    b.contributions[t].push_back({layout, buffer, owned});
  }

  /// The gradient of t, complete, as `layout`; invalid if nothing contributes.
  BufferId gradient(Backward& b, TensorId t, const Layout& layout) {
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

  BufferId add(Backward& b, const std::vector<BufferId>& summands) {
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

  BufferId gradient_buffer(TensorId t, const Layout& layout) {
    const BufferId g = tensor_buffer(t, layout);
    Buffer& b = p_.buffers[g.index()];
    b.name += ".grad";
    b.element_bytes = 0;
    return g;
  }

  void backward_block(int chunk) {
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
          transfer(b.block, Kind::receive, g, stage_of_chunk(reader), message(t, reader, true),
                   true);
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

  void backward_of(Backward& b, OpId id) {
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
          if (!i.writes[k].valid())
            i.writes[k] = gradient_buffer(op.inputs[k], l.input_gradients[k]);
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

  // ---- pass 7: gradients meet
  // --------------------------------------------------------------------
  struct Bucket {
    std::vector<ParameterId> parameters;
    std::size_t ready = 0;  ///< position in the backward's instructions
    Bytes bytes{};
  };

  /// Parameters that become ready in this backward, in buckets of one communication pattern each.
  std::vector<Bucket> buckets(const Backward& b) {
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

  /// Several chunks of the stage add to its gradient: complete only when all have.
  bool reduced_late(int stage, ParameterId q) const {
    return plan_.zero < 2 && on_stage(stage).at(q).chunks > 1;
  }

  bool has_ties(ParameterId q) const {
    int stages = 0;
    for (const auto& here : on_stage_) stages += here.count(q) > 0 ? 1 : 0;
    return stages > 1;
  }

  /// Reduce, and scatter where state is sharded. Reads the gradients named by `source`.
  template <class Source>
  std::vector<Instruction> synchronise(int stage, const Bucket& bucket, Source source) {
    std::vector<Instruction> all;
    const ParameterOnStage& first = on_stage(stage).at(bucket.parameters[0]);
    const AtomMask scattered = first.scattered;
    const AtomMask owed = static_cast<AtomMask>(first.gradient_layout.partial & ~scattered);
    std::vector<BufferId> at;
    for (const ParameterId q : bucket.parameters) at.push_back(source(q));
    if (scattered != 0) {
      Instruction i;
      i.kind = Kind::collective;
      i.collective =
          plan_.root_state != 0 ? CollectiveKind::reduce : CollectiveKind::reduce_scatter;
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

  // ---- parameter servers -----------------------------------------------------------------------
  struct Served {
    int stage, push, pull;  ///< who has the parameter, and the messages
  };
  /// Servers share the parameters, each next one going to the one with fewest elements.
  int server_of(ParameterId q) {
    if (server_of_.empty()) {
      std::vector<std::int64_t> load(static_cast<std::size_t>(plan_.servers), 0);
      for (const Parameter& parameter : graph_.parameters) {
        const auto least = std::min_element(load.begin(), load.end());
        *least += elements(parameter.shape);
        server_of_.push_back(static_cast<int>(least - load.begin()));
      }
    }
    return server_of_[q.index()];
  }
  int server_stage(int server) const { return stages_ + (plan_.loader ? 1 : 0) + server; }

  Instruction message(Kind kind, BufferId b, int stage, int id, const char* stream_name) {
    Instruction i;
    i.kind = kind;
    i.stage = stage;
    i.index = id;
    i.after_compute = true;
    i.stream = stream(stream_name);
    (kind == Kind::send ? i.reads : i.writes) = {b};
    return i;
  }

  /// A worker's gradients go to their servers; what is owed beyond the workers is paid before.
  void push(std::vector<Instruction>& all, int stage, const std::vector<ParameterId>& list,
            AtomMask owed) {
    const AtomMask rest = owed & static_cast<AtomMask>(~data_parallel());
    if (rest != 0) append_owed(all, stage, list, rest);
    for (const ParameterId q : list) {
      const ParameterOnStage& v = on_stage(stage).at(q);
      const int server = server_of(q), sent = new_message();
      served_[server][q].push_back({stage, sent, new_message()});
      all.push_back(message(Kind::send, v.reduced, server_stage(server), sent, "push"));
    }
  }

  /// In step t a server updates with the gradients of step t - s and hands the parameters out,
  /// before it takes this step's gradients if s > 0, after them if not.
  void server_blocks() {
    if (plan_.servers == 0) return;
    AtomList others;
    for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
      const AtomMask atom = bit(static_cast<AtomId>(a));
      if ((atom & (data_parallel() | mask_of(p_.pipeline))) == 0)
        others.push_back(static_cast<AtomId>(a));
    }
    for (int server = 0; server < static_cast<int>(plan_.servers); ++server) {
      p_.roles.push_back({fmt::format("server {}", server), others});
      Block block;
      block.name = fmt::format("serve {}", server);
      block.kind = BlockKind::step;
      block.stage = server_stage(server);
      block.chunk = -1;
      std::vector<Instruction> update, collect;
      for (const auto& [q, list] : served_[server]) serve(update, collect, q, list);
      auto& first = plan_.staleness > 0 ? update : collect;
      auto& second = plan_.staleness > 0 ? collect : update;
      for (auto* part : {&first, &second}) {
        for (Instruction& i : *part) block.instructions.push_back(std::move(i));
      }
      p_.stages.push_back({{BlockId{p_.blocks.size()}, -1}});
      p_.blocks.push_back(std::move(block));
    }
  }

  void serve(std::vector<Instruction>& update, std::vector<Instruction>& collect, ParameterId q,
             const std::vector<Served>& list) {
    const Parameter& parameter = graph_.parameter(q);
    const ParameterOnStage& worker = on_stage(list[0].stage).at(q);
    const Buffer pushed = p_.buffer(worker.reduced);
    const auto workers = static_cast<int>(plan_.dp);
    const auto like = [&](const char* suffix, Category category, Layout l) {
      return buffer(parameter.name + suffix, category, Scope::step, parameter.shape, std::move(l),
                    pushed.type);
    };
    Layout summed = pushed.layout;
    summed.partial = 0;
    Instruction sum;
    sum.kind = Kind::compute;
    sum.kernel = Kernel::add;
    for (const Served& from : list) {
      for (int w = 0; w < workers; ++w) {
        sum.reads.push_back(like(".grad_of_worker", Category::workspace, pushed.layout));
        collect.push_back(
            message(Kind::receive, sum.reads.back(), from.stage, from.push, "receive gradient"));
        collect.back().atoms = data_parallel();
        collect.back().peer = w;
      }
    }
    BufferId gradient = like(".grad", Category::workspace, summed);
    sum.writes = {gradient};
    collect.push_back(std::move(sum));
    if (plan_.staleness > 0) {
      Shape shape{{Dim::sample, plan_.staleness}};
      shape.insert(shape.end(), parameter.shape.begin(), parameter.shape.end());
      Layout l = summed;
      l.dims.insert(l.dims.begin(), 1, DimSplit{});
      const BufferId queue = buffer(parameter.name + ".queue", Category::optimizer, Scope::step,
                                    shape, l, pushed.type);
      Instruction i;
      i.kind = Kind::compute;
      i.outputs = {queue};
      i.kernel = Kernel::enqueue;
      i.reads = {gradient};
      collect.push_back(i);
      gradient = like(".old_grad", Category::workspace, summed);
      i.kernel = Kernel::dequeue;
      i.reads.clear();
      i.writes = {gradient};
      update.push_back(std::move(i));
    }
    const BufferId value = buffer(parameter.name, Category::parameters, Scope::step,
                                  parameter.shape, worker.layout, plan_.precision.parameters);
    p_.buffers[value.index()].parameter = q.value;
    update.push_back(update_of(q, gradient, value, worker.layout));
    for (const Served& to : list) {
      for (int w = 0; w < workers; ++w) {
        update.push_back(message(Kind::send, value, to.stage, to.pull, "send parameters"));
        update.back().atoms = data_parallel();
        update.back().peer = w;
      }
    }
  }

  /// Workers get their parameters when nothing reads the old ones any more.
  void pull(Block& step, int stage) {
    for (const auto& [server, of_server] : served_) {
      for (const auto& [q, list] : of_server) {
        for (const Served& x : list) {
          if (x.stage == stage)
            step.instructions.push_back(message(Kind::receive, on_stage(stage).at(q).value,
                                                server_stage(server), x.pull, "pull"));
        }
      }
    }
  }

  // ---- gradients that are compressed (docs/compression.md) -------------------------------------
  AtomMask data_parallel() const { return mask_of(plan_.axes.at("dp")); }

  /// Rows and columns of a parameter's local matrix, on rank 0.
  std::pair<std::int64_t, std::int64_t> matrix_of(ParameterId q, const Layout& l) const {
    const Shape& shape = graph_.parameter(q).shape;
    if (shape.size() < 2) return {0, 0};
    const std::int64_t rows = local_extent(p_.mesh, l.dims[0], shape[0].extent, 0);
    return {rows, local_elements(p_.mesh, l, shape, false, 0, 0) / std::max<std::int64_t>(1, rows)};
  }

  /// Is this parameter's all-reduce over data-parallel ranks a compressed one? Not where several
  /// stages have it, and not where nothing would be saved.
  bool compresses(ParameterId q, AtomMask owed) const {
    if (plan_.compression.kind == CompressionKind::none || (owed & data_parallel()) == 0 ||
        has_ties(q))
      return false;
    if (plan_.compression.kind != CompressionKind::power_sgd) return true;
    const auto [rows, columns] = matrix_of(q, layout_anywhere(q));
    return (rows + columns) * plan_.compression.rank < rows * columns;
  }
  const Layout& layout_anywhere(ParameterId q) const {
    for (const auto& here : on_stage_) {
      if (const auto it = here.find(q); it != here.end()) return it->second.layout;
    }
    throw InternalError("parameter " + graph_.parameter(q).name + " is on no stage");
  }

  Instruction reduction(AtomMask atoms, CollectiveKind kind) {
    Instruction i;
    i.kind = Kind::collective;
    i.collective = kind;
    i.atoms = atoms;
    i.stream = state_stream(atoms);
    return i;
  }

  /// Each rank shortens its gradient and what it kept, the short forms meet, and every rank works
  /// out their sum. That last part waits in `decoding_` for the end of the backward.
  void append_compressed(std::vector<Instruction>& all, int stage,
                         const std::vector<ParameterId>& list, AtomMask owed) {
    const AtomMask atoms = owed & data_parallel();
    if (owed != atoms) append_owed(all, stage, list, static_cast<AtomMask>(owed & ~atoms));
    AtomList members;
    for (const AtomId a : plan_.axes.at("dp")) {
      if (has(atoms, a)) members.push_back(a);
    }
    const std::int64_t replicas = p_.mesh.size(members);
    const Compression& c = plan_.compression;
    const bool power = c.kind == CompressionKind::power_sgd;
    const bool narrow = c.kind == CompressionKind::cast;
    // Calls of the whole bucket: short forms (PowerSGD: left factors), further ones.
    std::vector<Instruction> calls{reduction(
        atoms, power || narrow ? CollectiveKind::all_reduce : CollectiveKind::all_gather)};
    std::vector<Instruction> late{};
    Instruction right = reduction(atoms, CollectiveKind::all_reduce);
    for (const ParameterId q : list) {
      ParameterOnStage& v = on_stage(stage).at(q);
      const Parameter& parameter = graph_.parameter(q);
      Layout own = v.layout;
      own.partial = atoms;
      const auto working = [&](const char* what, Shape shape, Layout layout, ElementType type) {
        return buffer(parameter.name + what, Category::workspace, Scope::step, std::move(shape),
                      std::move(layout), type);
      };
      /// One entry for each member, together on all of them afterwards.
      const auto gathered = [&](std::size_t call, const char* what, std::int64_t width,
                                bool whole) {
        Layout each;
        each.dims.resize(2);
        each.dims[0].atoms = members;
        const Shape shape{{Dim::sample, replicas}, {Dim::feature, width}};
        while (calls.size() <= call) calls.push_back(reduction(atoms, CollectiveKind::all_gather));
        Layout together;
        together.dims.resize(2);
        calls[call].reads.push_back(working(what, shape, each, ElementType::fp32));
        calls[call].writes.push_back(working(what, shape, together, ElementType::fp32));
        for (const BufferId id : {calls[call].reads.back(), calls[call].writes.back()})
          p_.buffers[id.index()].whole_numbers = whole;
        return std::pair{calls[call].reads.back(), calls[call].writes.back()};
      };
      Instruction compress;
      compress.kind = Kind::compute;
      compress.kernel = Kernel::compress;
      compress.atoms = atoms;
      compress.reads = {v.reduced};
      if (c.error_feedback || power) {
        compress.outputs = {buffer(parameter.name + ".kept", Category::optimizer, Scope::step,
                                   parameter.shape, own, ElementType::fp32)};
      }
      Instruction decompress = compress;
      decompress.kernel = Kernel::decompress;
      decompress.reads.clear();
      const std::int64_t n = local_elements(p_.mesh, v.layout, parameter.shape, false, 0, 0);
      switch (c.kind) {
        case CompressionKind::none:
          break;
        case CompressionKind::cast: {
          Layout summed = own;
          summed.partial = 0;
          calls[0].reads.push_back(working(".cast", parameter.shape, own, c.type));
          calls[0].writes.push_back(working(".cast", parameter.shape, summed, c.type));
          p_.buffers[calls[0].writes.back().index()].alias = calls[0].reads.back().value;
          compress.writes = {calls[0].reads.back()};
          decompress.reads = {calls[0].writes.back()};
          break;
        }
        case CompressionKind::top_k: {
          const std::int64_t k = kept_values(c, n);
          const auto values = gathered(0, ".top_values", k, false);
          const auto positions = gathered(1, ".top_positions", k, true);
          compress.writes = {values.first, positions.first};
          decompress.reads = {values.second, positions.second};
          break;
        }
        case CompressionKind::one_bit: {
          const auto signs = gathered(0, ".signs", ceil_div(n, std::int64_t{32}), true);
          const auto scale = gathered(1, ".scale", 1, false);
          compress.writes = {signs.first, scale.first};
          decompress.reads = {signs.second, scale.second};
          break;
        }
        case CompressionKind::power_sgd: {
          const auto factor = [&](const char* what, std::size_t first, std::size_t last) {
            Shape shape(parameter.shape.begin() + static_cast<std::ptrdiff_t>(first),
                        parameter.shape.begin() + static_cast<std::ptrdiff_t>(last));
            Layout l;
            l.dims.assign(v.layout.dims.begin() + static_cast<std::ptrdiff_t>(first),
                          v.layout.dims.begin() + static_cast<std::ptrdiff_t>(last));
            shape.push_back({Dim::head_feature, c.rank});
            l.dims.emplace_back();
            l.partial = atoms;
            Layout summed = l;
            summed.partial = 0;
            const auto a = working(what, shape, l, ElementType::fp32);
            const auto b = working(what, shape, summed, ElementType::fp32);
            p_.buffers[b.index()].alias = a.value;
            return std::pair{a, b};
          };
          const auto left_factor = factor(".left", 0, 1);
          const auto right_factor = factor(".right", 1, parameter.shape.size());
          calls[0].reads.push_back(left_factor.first);
          calls[0].writes.push_back(left_factor.second);
          right.reads.push_back(right_factor.first);
          right.writes.push_back(right_factor.second);
          const BufferId start = buffer(parameter.name + ".right_before", Category::optimizer,
                                        Scope::step, p_.buffer(right_factor.second).shape,
                                        p_.buffer(right_factor.second).layout, ElementType::fp32);
          p_.buffers[start.index()].parameter = q.value;
          compress.outputs.push_back(start);
          decompress.outputs.push_back(start);
          compress.writes = {left_factor.first};
          Instruction second = compress;
          second.index = 1;
          second.reads = {left_factor.second};
          second.writes = {right_factor.first};
          late.push_back(std::move(second));
          decompress.reads = {left_factor.second, right_factor.second};
          break;
        }
      }
      v.reduced = shard_buffer(q, v, ".grad_sum", 0);
      decompress.writes = {v.reduced};
      all.push_back(std::move(compress));
      decoding_[stage].push_back(std::move(decompress));
    }
    for (Instruction& i : calls) all.push_back(std::move(i));
    if (!power) return;
    auto& decoding = decoding_[stage];
    const auto first = decoding.end() - static_cast<std::ptrdiff_t>(list.size());
    late.push_back(std::move(right));
    decoding.insert(first, std::make_move_iterator(late.begin()),
                    std::make_move_iterator(late.end()));
  }

  /// A later state of a gradient, in the memory of what it was.
  BufferId shard_buffer(ParameterId q, const ParameterOnStage& v, const char* suffix,
                        AtomMask partial) {
    Layout l = v.state_layout;
    l.partial = partial;
    const BufferId b = buffer(graph_.parameter(q).name + suffix, Category::gradients, Scope::step,
                              graph_.parameter(q).shape, l, plan_.precision.gradients);
    p_.buffers[b.index()].alias = v.reduced.value;
    p_.buffers[b.index()].parameter = q.value;
    return b;
  }

  /// Axes of a gradient's sum that its scattering leaves.
  static AtomMask owed(const ParameterOnStage& v) {
    return static_cast<AtomMask>(v.gradient_layout.partial & ~v.scattered);
  }

  /// All-reduce of what scattering left owed (sequence-parallel norms over tp, HSDP replicas).
  void append_owed(std::vector<Instruction>& all, int stage, const std::vector<ParameterId>& list,
                   AtomMask owed) {
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

  void finish_backward(Backward b) {
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

  // ---- pass 8: start and step blocks
  // -------------------------------------------------------------
  void start_and_step(int stage) {
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
        if (const AtomMask rest = owed(on_stage(stage).at(q)); rest != 0)
          by_owed[rest].push_back(q);
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
    const BufferId skip =
        plan_.loss_scale.initial > 0 ? unscale_gradients(step, stage) : BufferId{};
    if (plan_.optimizer.clip > 0) clip_gradients(step, stage);
    std::map<AtomMask, Instruction> gathers;
    for (auto& [q, v] : on_stage(stage)) {
      const Parameter& parameter = graph_.parameter(q);
      if (!parameter.trainable || plan_.servers > 0) continue;
      const bool shard_in_place = plan_.zero == 3 || v.scattered == 0;
      BufferId target = v.value;
      if (!shard_in_place) {
        target = buffer(parameter.name + ".shard", Category::parameters, Scope::step,
                        parameter.shape, v.state_layout, plan_.precision.parameters);
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

  /// The optimizer's step of one parameter, with its state.
  Instruction update_of(ParameterId q, BufferId gradient, BufferId target, const Layout& state) {
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

  /// The host has state and a copy of the parameter: the gradient goes there, the result comes back
  /// (arXiv 2101.06840).
  void update_on_host(Block& step, ParameterId q, Instruction i) {
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

  /// What a forward leaves for its backward waits on the host: copied out after its last use in the
  /// forward, back into another buffer one layer ahead of its first use in the backward.
  void offload_activations() {
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

  void copy_out(Block& block, const std::map<BufferId, BufferId>& list) {
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

  void copy_back(Block& block, const std::map<BufferId, BufferId>& list,
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

  /// Local SGD: every so many steps each replica's share, its parameters over their number, is
  /// summed over the replicas and replaces the parameters. Momentum stays each replica's own.
  void average_parameters(Block& step, int stage) {
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

  BufferId scalar(const std::string& name, AtomMask owed, Category category, std::int64_t n = 0) {
    Layout l;
    l.partial = owed;
    Shape shape;
    if (n > 0) shape.push_back({Dim::feature, n}), l.dims.resize(1);
    return buffer(name, category, Scope::step, shape, l, ElementType::fp32);
  }

  // ---- loss scaling --------------------------------------------------------------------------
  /// Scale, good steps in a row, updates so far: kept from step to step.
  BufferId loss_scale_state(int stage) {
    auto& id = loss_scale_state_[stage];
    if (!id.valid()) id = scalar("loss scale state", 0, Category::optimizer, 3);
    return id;
  }
  /// This step's scale: the gradient of the loss. Invalid: 1.
  BufferId loss_scale(int stage) {
    if (plan_.loss_scale.initial == 0) return BufferId{};
    auto& id = loss_scale_[stage];
    if (!id.valid()) id = scalar("loss scale", 0, Category::gradients);
    return id;
  }

  /// Divides by the scale and finds out whether any rank has a gradient that is not finite.
  BufferId unscale_gradients(Block& step, int stage) {
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

  /// Scales gradients down to a norm, which is of all parameters.
  void clip_gradients(Block& step, int stage) {
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

  /// A sum over all gradients of what `kernel` makes of some: over each rank's own, then over the
  /// ranks that hold other parts of the same parameters, then over stages.
  BufferId over_gradients(Block& step, int stage, Kernel kernel, const std::string& what) {
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

  int tie(const std::vector<int>& stages) {
    for (std::size_t i = 0; i < p_.ties.size(); ++i) {
      if (p_.ties[i] == stages) return static_cast<int>(i);
    }
    p_.ties.push_back(stages);
    return static_cast<int>(p_.ties.size()) - 1;
  }

  // ---- pass 9: order
  // -------------------------------------------------------------------------------
  void order_blocks() {
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

  // ---- pass 10: memory
  // -------------------------------------------------------------------------------
  /// Allocates before the first write and frees after the last use. State (parameters, accumulated
  /// gradients, optimizer) is there all the time. Within one micro-batch blocks run forward by
  /// chunk, then backward by chunk from the last; a buffer is freed in the last block that uses it.
  void place_memory() {
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
      std::vector<std::vector<BufferId>> before(b.instructions.size()),
          after(b.instructions.size());
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

  const Graph& graph_;
  const Plan& plan_;
  bool drops_;  ///< the network has dropout: its attention, too
  Program p_;
  int network_chunks_ = 1;  ///< of one copy of the network
  int chunks_ = 1, stages_ = 1, direction_ = 0;
  std::vector<int> chunk_of_;  ///< of the first copy
  std::vector<std::vector<OpId>> ops_of_chunk_;
  std::vector<std::vector<OpId>> consumers_;
  std::vector<char> needs_gradient_;
  std::vector<OperatorLayouts> layouts_;
  std::vector<std::map<ParameterId, ParameterOnStage>> on_stage_;
  std::vector<int> segment_;
  std::vector<std::vector<OpId>> ops_of_segment_;
  std::vector<bool> forgets_;  ///< of a segment: its results are made again, too
  std::vector<bool> again_;    ///< of an operator: it runs again
  std::vector<Versions> forward_versions_;
  std::vector<Gathered> gathered_forward_;
  std::set<BufferId> stored_;  ///< gradients of a step that are never added to
  std::vector<Record> records_;
  std::map<std::tuple<std::int32_t, int, bool>, int> messages_;
  std::map<std::pair<TensorId, int>, BufferId> boundary_gradient_;
  std::map<int, std::vector<Instruction>> late_calls_;
  std::map<int, std::vector<Instruction>> decoding_;  ///< by stage: compressed gradients' last part
  std::map<int, BufferId> loss_scale_, loss_scale_state_;  ///< by stage
  std::map<int, std::set<ParameterId>> late_owed_;
  std::map<int, std::vector<FromLoader>> from_loader_;  ///< by chunk
  std::map<int, Relay> relays_;                         ///< by message before the broker
  std::vector<int> server_of_;                          ///< by parameter
  std::map<int, std::map<ParameterId, std::vector<Served>>> served_;  ///< by server
  std::vector<BlockId> data_of_;  ///< backward without weights, where those are by themselves
  std::vector<BlockId> forward_of_, backward_of_, last_backward_of_, start_of_, step_of_;
};

}  // namespace

Feasible<Program> lower(const Graph& graph, const Plan& plan) {
  return Lowering(graph, plan).run();
}

}  // namespace partita
