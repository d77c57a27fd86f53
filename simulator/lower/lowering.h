// simulator/lower/lowering.h: what the passes of lower() share; the passes themselves are this
// folder's other files.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "simulator/lower/lower.h"

namespace partita::lowering {

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
  Feasible<Program> run();

 private:
  // ---- pass 1: chunks (lower.cpp)
  Infeasible assign_chunks();

  /// 8- and 4-bit types multiply by weights inside the blocks only, as Transformer Engine does:
  /// attention, the head and a router stay in the parameters' type.
  ElementType compute_type(const Operation& op) const;

  /// Is it the residual's sum or the activation behind a batch norm?
  bool follows_normalise(const Operator& op) const;

  /// The attention, gated activation or gated norm that takes a product's result, normalised,
  /// turned or scanned at most.
  OpId taker_of(const Operator& op) const;

  /// Products of one input for one attention, gated activation or gated norm become one.
  void join_projections();

  // ---- pass 2: layouts (lower.cpp)
  Infeasible derive_layouts();
  void declare_inputs_and_parameters();

  // ---- pass 3: parameters on stages (lower.cpp)
  /// Is a shard in this layout of its state what the framework has of a parameter, in fp32?
  bool shards_masters(const Layout& state) const;
  Infeasible place_parameters();
  Infeasible place_parameters(int chunk);

  // ---- pass 4: recomputed segments (lower.cpp)
  void find_segments();

  /// Does a backward need what the last operator of a segment makes, or another segment that runs
  /// again?
  bool needed_again(OpId id) const;

  // ---- small helpers (buffers.cpp)
  int stage_of_chunk(int chunk) const;
  /// The chunk of an operator in the copy that is being lowered.
  int chunk_of(OpId id) const { return chunk_of_[id.index()] + direction_ * network_chunks_; }
  BufferId buffer(std::string name, Category category, Scope scope, Shape shape, Layout layout,
                  ElementType type);
  BufferId tensor_buffer(TensorId t, const Layout& layout,
                         Category category = Category::activations);
  Stream stream(const std::string& name);
  std::string label_of(AtomMask atoms) const;
  /// One communicator per group of ranks: its collectives follow each other, as NCCL's do.
  Stream group_stream(AtomMask atoms) { return stream(label_of(atoms)); }
  /// Of gradients and parameters. Where context or expert parallelism is over the same ranks it has
  /// a communicator of its own (Megatron-Core, parallel_state.py: groups for context, for experts,
  /// and for data with context parallelism; PyTorch makes one for each dimension of a mesh).
  Stream state_stream(AtomMask atoms);

  /// Emits the steps that turn `from` into layout `to`; returns the last buffer. Every intermediate
  /// result is reported to `made`.
  BufferId emit_reshard(Block& block, BufferId source, const Layout& to,
                        const std::function<void(BufferId, const ReshardStep&)>& made);

  /// Elements that the communicating steps from one layout to another touch on rank 0: to choose a
  /// source.
  std::int64_t reshard_volume(BufferId source, const Layout& to) const;

  /// A buffer that holds tensor t as `layout`, resharded from what `versions` has.
  BufferId get(Block& block, Versions& versions, TensorId t, const Layout& layout);

  // ---- the loader's role (roles.cpp)
  struct FromLoader {
    TensorId tensor;
    Layout layout;
    int message;
  };
  /// A network input arrives from the loader of this data-parallel rank, at one rank of those that
  /// share its samples; resharding passes it on.
  void from_loader(Block& block, std::vector<Version>& have, TensorId t);
  void loader_blocks();

  // ---- ZeRO-3: parameters gathered for use (gathers.cpp)
  struct Gathered {
    std::map<ParameterId, BufferId> whole;
    std::vector<int> units;  ///< in order of use
    /// By unit: what was gathered for parameters that are not copied out of it yet.
    std::map<int, std::vector<std::pair<BufferId, BufferId>>> copies;
  };

  /// The buffer with the whole local parameter in this block; gathers its unit, and the next one
  /// ahead.
  BufferId parameter_for(Block& block, Gathered& gathered, const std::vector<int>& unit_order,
                         ParameterId q);
  /// Parameters of a unit that was gathered as one are copied out of it before its first kernel.
  void copy_out(Block& block, Gathered& gathered, int unit);
  void prefetch_after(Block& block, Gathered& gathered, const std::vector<int>& unit_order,
                      int unit);
  void gather_unit(Block& block, Gathered& gathered, int unit, bool ahead);
  /// Of what the forward gathered, what the backward need not gather again.
  Gathered stays_gathered(int chunk) const;
  bool used_in_chunk(ParameterId q, int chunk) const;
  std::vector<int> units_of_chunk(int chunk) const;
  std::map<ParameterId, ParameterOnStage>& on_stage(int s);
  const std::map<ParameterId, ParameterOnStage>& on_stage(int s) const;

  // ---- forward of one operator (also when recomputed) (forward.cpp)
  /// Statistic buffers of one pass; when a statistic's dimensions are cut, emits the local part and
  /// its all-reduce for each and returns the complete ones. `proto` carries the operator's
  /// operands.
  std::vector<BufferId> statistics(Block& block, OpId id, const std::vector<Statistic>& list,
                                   Kernel kernel, const Instruction& proto, AtomMask cut);
  AtomMask statistic_cut(OpId id) const;
  Record emit_forward(Block& block, OpId id, Versions& results, Gathered& gathered,
                      const std::vector<int>& units, bool recomputed,
                      const std::function<BufferId(TensorId, const Layout&)>& input);

  /// Passes buffers on to the next rank of the ring along dimension 1.
  std::vector<BufferId> pass_on(Block& block, const std::vector<BufferId>& from);
  int ring_parts(const Instruction& i) const;

  /// Attention over each part of the keys as it passes by; the next part travels meanwhile.
  void ring_forward(Block& block, Instruction i);

  /// The same walk backwards in time: gradients of keys and values travel one place behind their
  /// parts and are home after as many steps as there are ranks. Returns them. What a part gives is
  /// made while they travel, and added when they have come.
  std::vector<BufferId> ring_backward(Block& block, Instruction i);

  // ---- pass 5: forward blocks (forward.cpp)
  /// Chunks (other than its producer's) that read tensor t, ascending.
  std::vector<int> reader_chunks(TensorId t) const;

  /// The layout in which a tensor travels to another chunk: what its first reader there needs.
  Layout boundary_layout(TensorId t, int chunk) const;
  int new_message();
  int message(TensorId t, int chunk, bool backward);
  bool waits_for_sends() const;
  void transfer(Block& block, Kind kind, BufferId b, int other_stage, int id, bool backward);
  void forward_block(int chunk);

  // ---- operands that become narrow (narrow.cpp)
  /// A product in an 8- or 4-bit type converts what it reads of activations and gradients. Products
  /// of one block that read the same share the copies; what a norm makes comes converted
  /// (Transformer Engine, pytorch/module/layernorm_linear.py), after it where scales are found
  /// first.
  void mark_casts();

  /// What forward passes leave for gradients of narrow products' weights alone is kept as their
  /// narrow copy; what other backward passes read too, beside it.
  void keep_narrow();

  /// What narrow products alone read was converted before it is gathered (Transformer Engine,
  /// pytorch/distributed.py, gather_along_first_dim with a quantizer). Types with a scale a block
  /// of the sum travel once for each side that they are summed along: a gradient that data's and
  /// weights' products read, twice.
  void gather_narrow();

  // ---- products in parts, beside the sequence's way (docs/policies.md) (product_parts.cpp)
  void split_products();

  /// Is the sequence, cut in `cut` by the collective's group last, what it gathers or scatters?
  bool crosses_sequence(const Instruction& i, BufferId cut) const;
  bool is_product(const Instruction& i) const;
  /// The buffer as the ring passes it: `shift` places on.
  BufferId shifted(BufferId id, std::int32_t shift, AtomMask ring);
  Instruction pass(BufferId from, BufferId to, AtomMask atoms, std::int32_t part);

  /// All readers of what is gathered are products: each takes the parts as they come round.
  void gather_in_parts(const Block& block, std::size_t at,
                       std::map<std::size_t, std::vector<Instruction>>& instead);

  /// The product whose sum is scattered makes each rank's part in turn, the own one last; sums
  /// travel on while the next part is computed.
  void scatter_in_parts(const Block& block, std::size_t at,
                        std::map<std::size_t, std::vector<Instruction>>& instead);

  /// Gradients are summed over tp where the program has them, not beside the kernels before.
  void sum_in_turn();

  /// What a backward gathers over tp it gathers right before the first kernel that reads it.
  void gather_in_turn();

  // ---- messages through a broker (roles.cpp)
  /// A message from stage to stage: the device's buffer, its copy on the host, the serialised
  /// message, the broker's, and back.
  void through_queue(Block& block, Instruction i);

  struct Relay {
    int from = -1, to = -1, out = -1;  ///< stages, and the message behind the broker
    BufferId message;
  };

  /// Brokers hand messages on in an order in which they can come: that of a run in which the stages
  /// take turns.
  void broker_blocks();

  // ---- pass 6: backward blocks (backward.cpp)
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
  bool stores_gradients(Backward& b, const Operator& op);
  /// Where gradients of weights are computed.
  Block& weights(Backward& b) const { return splits_backward(plan_.schedule) ? b.weight : b.block; }

  /// What the forward left of tensor t in `layout`, gathered again if only a part was kept.
  BufferId saved(Backward& b, TensorId t, const Layout& layout);

  /// Of what there is of tensor t, what lies as `layout`, gathered again unless that is kept;
  /// invalid if nothing does.
  BufferId made_before(Backward& b, const std::vector<Version>& have, TensorId t,
                       const Layout& layout, bool keeps_gathered);

  /// `again`: the reader is itself a forward that is recomputed.
  BufferId operand(Backward& b, OpId reader, TensorId t, const Layout& layout, bool again);
  void recompute(Backward& b, int segment);
  void contribute(Backward& b, TensorId t, const Layout& layout, BufferId buffer, bool owned);

  /// The gradient of t, complete, as `layout`; invalid if nothing contributes.
  BufferId gradient(Backward& b, TensorId t, const Layout& layout);
  BufferId add(Backward& b, const std::vector<BufferId>& summands);
  BufferId gradient_buffer(TensorId t, const Layout& layout);
  void backward_block(int chunk);
  void backward_of(Backward& b, OpId id);

  // ---- pass 7: gradients meet (reductions.cpp)
  struct Bucket {
    std::vector<ParameterId> parameters;
    std::size_t ready = 0;  ///< position in the backward's instructions
    Bytes bytes{};
  };

  /// Parameters that become ready in this backward, in buckets of one communication pattern each.
  std::vector<Bucket> buckets(const Backward& b);

  /// Several chunks of the stage add to its gradient: complete only when all have.
  bool reduced_late(int stage, ParameterId q) const;
  bool has_ties(ParameterId q) const;

  /// Reduce, and scatter where state is sharded. Reads the gradients named by `source`.
  std::vector<Instruction> synchronise(int stage, const Bucket& bucket,
                                       const std::function<BufferId(ParameterId)>& source);
  Instruction reduction(AtomMask atoms, CollectiveKind kind);

  /// A later state of a gradient, in the memory of what it was.
  BufferId shard_buffer(ParameterId q, const ParameterOnStage& v, const char* suffix,
                        AtomMask partial);

  /// Axes of a gradient's sum that its scattering leaves.
  static AtomMask owed(const ParameterOnStage& v);

  /// All-reduce of what scattering left owed (sequence-parallel norms over tp, HSDP replicas).
  void append_owed(std::vector<Instruction>& all, int stage, const std::vector<ParameterId>& list,
                   AtomMask owed);
  void finish_backward(Backward b);

  // ---- parameter servers (roles.cpp)
  struct Served {
    int stage, push, pull;  ///< who has the parameter, and the messages
  };
  /// Servers share the parameters, each next one going to the one with fewest elements.
  int server_of(ParameterId q);
  int server_stage(int server) const { return stages_ + (plan_.loader ? 1 : 0) + server; }
  Instruction message(Kind kind, BufferId b, int stage, int id, const char* stream_name);

  /// A worker's gradients go to their servers; what is owed beyond the workers is paid before.
  void push(std::vector<Instruction>& all, int stage, const std::vector<ParameterId>& list,
            AtomMask owed);

  /// In step t a server updates with the gradients of step t - s and hands the parameters out,
  /// before it takes this step's gradients if s > 0, after them if not.
  void server_blocks();
  void serve(std::vector<Instruction>& update, std::vector<Instruction>& collect, ParameterId q,
             const std::vector<Served>& list);

  /// Workers get their parameters when nothing reads the old ones any more.
  void pull(Block& step, int stage);

  // ---- gradients that are compressed (docs/compression.md) (compression.cpp)
  AtomMask data_parallel() const { return mask_of(plan_.axes.at("dp")); }

  /// Rows and columns of a parameter's local matrix, on rank 0.
  std::pair<std::int64_t, std::int64_t> matrix_of(ParameterId q, const Layout& l) const;

  /// Is this parameter's all-reduce over data-parallel ranks a compressed one? Not where several
  /// stages have it, and not where nothing would be saved.
  bool compresses(ParameterId q, AtomMask owed) const;
  const Layout& layout_anywhere(ParameterId q) const;

  /// Each rank shortens its gradient and what it kept, the short forms meet, and every rank works
  /// out their sum. That last part waits in `decoding_` for the end of the backward.
  void append_compressed(std::vector<Instruction>& all, int stage,
                         const std::vector<ParameterId>& list, AtomMask owed);

  // ---- pass 8: start and step blocks (step.cpp)
  void start_and_step(int stage);

  /// The optimizer's step of one parameter, with its state.
  Instruction update_of(ParameterId q, BufferId gradient, BufferId target, const Layout& state);

  /// The host has state and a copy of the parameter: the gradient goes there, the result comes back
  /// (arXiv 2101.06840).
  void update_on_host(Block& step, ParameterId q, Instruction i);

  /// Local SGD: every so many steps each replica's share, its parameters over their number, is
  /// summed over the replicas and replaces the parameters. Momentum stays each replica's own.
  void average_parameters(Block& step, int stage);
  BufferId scalar(const std::string& name, AtomMask owed, Category category, std::int64_t n = 0);

  // ---- loss scaling (step.cpp)
  /// Scale, good steps in a row, updates so far: kept from step to step.
  BufferId loss_scale_state(int stage);
  /// This step's scale: the gradient of the loss. Invalid: 1.
  BufferId loss_scale(int stage);

  /// Divides by the scale and finds out whether any rank has a gradient that is not finite.
  BufferId unscale_gradients(Block& step, int stage);

  /// Scales gradients down to a norm, which is of all parameters.
  void clip_gradients(Block& step, int stage);

  /// A sum over all gradients of what `kernel` makes of some: over each rank's own, then over the
  /// ranks that hold other parts of the same parameters, then over stages.
  BufferId over_gradients(Block& step, int stage, Kernel kernel, const std::string& what);
  int tie(const std::vector<int>& stages);

  // ---- pass 9: order (lower.cpp)
  void order_blocks();

  // ---- pass 10: memory (memory.cpp)
  /// Allocates before the first write and frees after the last use. State (parameters, accumulated
  /// gradients, optimizer) is there all the time. Within one micro-batch blocks run forward by
  /// chunk, then backward by chunk from the last; a buffer is freed in the last block that uses it.
  void place_memory();
  BufferId on_host(BufferId id, const char* suffix, Category category);
  Instruction copy(BufferId from, BufferId to);

  /// What a forward leaves for its backward waits on the host: copied out after its last use in the
  /// forward, back into another buffer one layer ahead of its first use in the backward.
  void offload_activations();
  void copy_out(Block& block, const std::map<BufferId, BufferId>& list);
  void copy_back(Block& block, const std::map<BufferId, BufferId>& list,
                 std::map<BufferId, BufferId>& host_of);

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

}  // namespace partita::lowering
