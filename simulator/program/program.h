// simulator/program/program.h: the lowered plan as plain data. Simulator, reference interpreter and
// executor are three interpreters of it.
//
// All ranks of a pipeline stage run one instruction list (single program, multiple data): an
// instruction names layouts and mesh atoms, and a rank's coordinates say what that means for it.
// Work that repeats per micro-batch is written once, as a Block, and called with the micro-batch's
// number.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/element_type.h"
#include "base/ids.h"
#include "models/operators.h"
#include "simulator/program/mesh.h"

namespace partita {

using BufferId = Id<struct BufferTag>;
using BlockId = Id<struct BlockTag>;

/// An operator at the extents of one global micro-batch (all ranks of a stage together).
struct ProgramOperator {
  std::string name;
  Operation operation;
  Signature signature;
  std::vector<DimSplit> cuts;               ///< per iteration dimension
  AtomMask root = 0;                        ///< executed only where these coordinates are 0
  ElementType compute = ElementType::fp32;  ///< of its products
  bool has_loss = false;
  /// Its framework's kernel for the batch norm before it does its work too; ours runs it alone.
  bool in_normalise = false;
  /// Products that its framework runs as part of this one, their weights in one tensor; ours runs
  /// each alone.
  std::vector<int> joined;
  bool in_other = false;  ///< is `joined` to another
  bool captured = false;  ///< Launches' graphs_of matches it
};

enum class Category : std::uint8_t {
  parameters,
  gradients,
  optimizer,
  activations,
  workspace,
  buffers
};
inline constexpr int kCategoryCount = 6;
std::string_view name(Category c);

/// Who a buffer belongs to: the step (one instance) or each micro-batch in flight.
enum class Scope : std::uint8_t { step, micro_batch };

struct Buffer {
  std::string name;
  Category category = Category::activations;
  Scope scope = Scope::micro_batch;
  Shape shape;
  Layout layout;
  ElementType type = ElementType::fp32;
  int element_bytes = 0;  ///< > 0: overrides `type` (masks, indices)
  /// Not 0: what an element takes of memory (Allocations::narrow_inputs, fp32_shards); -1: nothing.
  int kept_bits = 0;
  /// >= 0: lives in the memory of that buffer (an all-reduce in place, a shard of a parameter).
  std::int32_t alias = -1;
  bool routed = false;
  bool host = false;           ///< in the host's memory, not the device's
  bool whole_numbers = false;  ///< 4-byte words that are no fp32: indices, packed signs
  std::int64_t experts = 0;    ///< of a routed buffer
  std::int64_t groups = 1, top_groups = 1;  ///< Router's, of its rows
  std::int32_t routing = -1;  ///< of a routed buffer: into Program::routings; -1: balanced
  /// What the values are, for interpreters; -1: nothing that the graph names.
  std::int32_t tensor = -1;
  std::int32_t parameter = -1;

  /// Bytes of an element in memory that is executed on.
  std::int64_t width() const { return element_bytes > 0 ? element_bytes : storage(type, 1).count; }
};

enum class Kind : std::uint8_t {
  load,        ///< fill `writes[0]` with this rank's piece of network input `index`
  compute,     ///< one kernel
  collective,  ///< over the group along `atoms` (or the tie of stages)
  send,        ///< buffer reads[0] to the same coordinates on `stage`
  receive,     ///< buffer writes[0] from the same coordinates on `stage`
  slice,       ///< keep this rank's part of reads[0] as writes[0]; no communication
  copy,        ///< reads[0] to writes[0], one of them or both on the host
  allocate,    ///< memory of writes
  free,        ///< memory of reads
};
std::string_view name(Kind k);

enum class Kernel : std::uint8_t {
  forward_statistic,  ///< statistic `index` of operator `op`, local part
  forward,            ///< with `inline_statistics`: computes all statistics first
  backward_statistic,
  backward_data,    ///< gradients of inputs
  backward_weight,  ///< gradients of parameters
  zero,             ///< writes[0] = 0
  add,              ///< writes[0] (+)= sum of reads
  optimizer,        ///< one update of parameter writes[0] from gradient reads[0], state `state`;
                    ///< that met others' `index` times a step, scattered along `atoms`
  scale,            ///< writes[0] = reads[0] / number of ranks along `atoms`
  square_sum,       ///< writes[0] = sum of the squares of all reads
  clip,  ///< writes ·= min(1, Optimizer::clip / sqrt(reads[0])): the norm of all gradients is
         ///< clipped
  loss_scale,  ///< LossScale: `index` 0 begins a step (writes[0] = outputs[0]'s scale), 1 adapts
               ///< outputs[0] to the flag reads[0]
  unscale,     ///< writes /= reads[0]
  not_finite,  ///< writes[0] = 1 if any value of reads is infinite or no number, else 0
  compress,    ///< Compression: reads[0] and what outputs[0] keeps of earlier steps as writes
  decompress,  ///< writes[0] = sum of what reads[0...] stand for
  dequeue,     ///< writes[0] = what outputs[0], a queue of steps, got longest ago; zeros at first
  enqueue,     ///< reads[0] takes that place
  initialise,  ///< writes[0] = initial values of its parameter, drawn by this rank
  read,        ///< the same from storage
};
/// Of an operator (`op`), or of plain buffers?
inline bool of_operator(Kernel k) { return k <= Kernel::backward_weight; }
std::string_view name(Kernel k);

enum class CollectiveKind : std::uint8_t {
  all_reduce,
  all_gather,
  reduce_scatter,
  all_to_all,
  halo_exchange,
  shift,  ///< everyone passes its part to the next of the ring
  broadcast,
  reduce,
  scatter,
  gather,
};
inline constexpr int kCollectiveKinds = 10;
std::string_view name(CollectiveKind k);

/// Per rank: instructions of one stream run in order; streams meet through the buffers they share.
/// 0 is the compute stream; every communicator and direction has its own.
using Stream = std::uint8_t;
inline constexpr Stream kComputeStream = 0;

/// Bytes a second of one multiprocessor of a stand-in: a channel of NCCL over NVLink 4, of which 24
/// make 360 GB/s (topologies/devices/h100-sxm.yaml).
inline constexpr double kStandInRate = 15e9;

struct Instruction {
  Kind kind = Kind::compute;
  Stream stream = kComputeStream;
  // compute
  Kernel kernel = Kernel::forward;
  std::int32_t op = -1;
  std::int32_t index = 0;  ///< statistic, network input
  /// >= 0: attention of one part of keys out of a ring, in this order; a product with one part of
  /// the sequence, the smallest that an operand or the result holds, and what passes that part on
  /// or adds it up in the same call.
  std::int32_t part = -1;
  bool inline_statistics = false;  ///< statistics are not cut: computed inside
  bool casts = false;              ///< a product's activation or gradient to its narrow type
  ElementType cast_type = ElementType::fp8;  ///< of a norm that casts its result after it
  bool recomputed = false;                   ///< forward work done again for the backward
  bool accumulate = false;                   ///< adds to writes instead of overwriting them
  /// Issued in program order: not before the compute stream gets here (a prefetch ahead of its
  /// need, a send at the end of its block).
  bool after_compute = false;
  std::int32_t every = 1;  ///< runs in every so many-th step only
  // collective
  CollectiveKind collective = CollectiveKind::all_reduce;
  AtomMask atoms = 0;
  /// That it keeps; 0: as many as its library takes. Of a copy: it stands in for a transfer, each
  /// of so many moves kStandInRate.
  std::int32_t multiprocessors = 0;
  std::int32_t sent_bits = 0;  ///< > 0: an element as it travels (Plan::narrow_gathers); a price
  std::int32_t tie =
      -1;  ///< >= 0: the group is the same coordinates on Program::ties[tie]'s stages
  std::int32_t stage = -1;  ///< send, receive: the other stage
  /// send, receive of a role that meets several ranks of a stage: the one with this coordinate
  /// along `atoms`.
  std::int32_t peer = 0;
  /// compute: operands by role; -1 where an entry is not needed.
  /// collective: reads[i] becomes writes[i], bucketed as one call.
  std::vector<BufferId> reads;  ///< inputs (forward operands), or sources
  std::vector<BufferId> parameters;
  std::vector<BufferId> outputs;     ///< saved outputs, read by the backward
  std::vector<BufferId> gradients;   ///< gradients of outputs, read by the backward
  std::vector<BufferId> statistics;  ///< forward statistics: written inline or read
  std::vector<BufferId> backward_statistics;
  std::vector<BufferId> extras;  ///< masks, log-sum-exps: written by forward, read by backward
  std::vector<BufferId> writes;
};

enum class BlockKind : std::uint8_t { start, forward, backward, backward_weight, step };
std::string_view name(BlockKind k);

struct Block {
  std::string name;
  BlockKind kind = BlockKind::forward;
  int stage = 0;
  int chunk = 0;  ///< virtual stage over the whole pipeline: 0 holds the first layers
  std::vector<Instruction> instructions;
  std::int32_t copy_of = -1;  ///< >= 0: one micro-batch's copy of that block (with_routing)
};

struct BlockCall {
  BlockId block;
  std::int32_t micro_batch = 0;  ///< -1: start and step blocks
  friend bool operator==(const BlockCall&, const BlockCall&) = default;
};

enum class OptimizerKind : std::uint8_t { sgd, adam };
struct Optimizer;
/// Tensors of state for each parameter: Adam's two moments, SGD's momentum if it has one.
int optimizer_states(const Optimizer& o);

struct Optimizer {
  OptimizerKind kind = OptimizerKind::adam;
  double learning_rate = 0.01, momentum = 0.9;                          // sgd
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;  // adam(w)
  double clip = 0;  ///< > 0: gradients are scaled down to this norm, of all of them together
};

/// Losses are multiplied by `initial` (a power of two keeps every bit) and gradients divided by it
/// before they are used, so that small ones are not lost in fp16. `dynamic`: a step whose gradients
/// are not all finite is skipped and the scale halved; after `growth_interval` good ones in a row
/// it doubles (torch.cuda.amp.GradScaler).
struct LossScale {
  double initial = 0;  ///< 0: none
  bool dynamic = false;
  int growth_interval = 2000;
  friend bool operator==(const LossScale&, const LossScale&) = default;
};

/// How data-parallel ranks shorten what they send of a gradient, and what they do about the rest.
enum class CompressionKind : std::uint8_t { none, cast, top_k, power_sgd, one_bit };
std::string_view name(CompressionKind k);
struct Compression {
  CompressionKind kind = CompressionKind::none;
  ElementType type = ElementType::bf16;  ///< cast
  double ratio = 0.01;                   ///< top_k: of the elements, those of largest magnitude
  std::int64_t rank = 2;                 ///< power_sgd
  bool error_feedback = true;            ///< what was not sent is added to the next step's gradient
  friend bool operator==(const Compression&, const Compression&) = default;
};

/// Values that top_k sends of `elements`.
std::int64_t kept_values(const Compression& compression, std::int64_t elements);

/// What starting instructions keeps a rank's host thread busy for, where it launches kernels on a
/// device that works beside it (docs/simulation.md, "Host").
struct Launches {
  Seconds kernel{0};    ///< one kernel
  Seconds transfer{0};  ///< a collective, a send or a receive
  Seconds step{0};      ///< between two steps, while devices wait: the loss read back, a log line
  bool graphs = false;  ///< every block was captured (a CUDA graph): one launch starts all of it
  /// The host learns how many rows each expert gets before it goes on: it waits for the kernels
  /// before the rows' exchange.
  bool waits_for_counts = false;
  /// Where a stage waits for its sends, its host waits for what comes, too, and launches nothing
  /// before it is there.
  bool waits_for_messages = false;
  bool graphs_beside_experts = false;  ///< what touches no rows of experts was captured
  std::string graphs_of;  ///< operators that were captured: a pattern of names; empty: none
  bool blocking = false;  ///< the host waits for each kernel before it launches the next
  Seconds product{0};     ///< the first kernel of a call of a layer of products; 0: as others
  /// What follows it from the same call, expert by expert or part by part, with the transfers and
  /// sums of the parts; 0: as others.
  Seconds loop{0};
  bool any() const { return kernel.count > 0 || transfer.count > 0; }
  friend bool operator==(const Launches&, const Launches&) = default;
};

/// What a framework's own kernels and messages take beyond one pass over each tensor: priced, not
/// executed (docs/plan.md, "Kernels").
struct FrameworkKernels {
  int flash = 0;  ///< attention by FlashAttention of this version, 1 or 2; 0: the device's best
  /// Bytes for each element of the queries that copies around a flash attention move: taking
  /// padding out of queries, keys and values and putting it back.
  double padding_forward = 0, padding_backward = 0;
  /// Bytes for each score that mask, softmax and dropout of materialised attention move; 0: one
  /// pass over each tensor.
  double score_forward = 0, score_backward = 0;
  /// The same where the softmax is not fused with scale and mask: its kernel takes sequences times
  /// heads of a rank that `fused_batches` divides, of at most `fused_keys` keys. 0: it always is.
  double score_forward_unfused = 0, score_backward_unfused = 0;
  int fused_batches = 1, fused_keys = 0;  ///< of keys 0: any
  /// Bytes for each score beside those or the passes, of tensors that are fp32 whatever the type.
  double score_fp32_forward = 0, score_fp32_backward = 0;
  /// Bytes for each logit that a cross entropy moves; 0: likewise.
  double logit_forward = 0, logit_backward = 0;
  /// > 0: at this share of the device's memory bandwidth, as measured; 0: as what streams does.
  double logit_share_forward = 0, logit_share_backward = 0;
  /// Bytes for each element of a dropout and of a layer norm, gradients of its scale and bias among
  /// them, whose every operation is a kernel.
  double dropout_forward = 0, dropout_backward = 0;
  double normalize_forward = 0, normalize_backward = 0;
  /// The same of an RMS norm, of a gated activation's result, and of what is rotated.
  double rms_forward = 0, rms_backward = 0;
  double gated_forward = 0, gated_backward = 0;
  double rotary_forward = 0, rotary_backward = 0;
  /// > 0: a layer or RMS norm moves its tensors (input and result; backward input and both
  /// gradients, for those of scale and bias too) at this share of the device's memory bandwidth.
  double normalize_share_forward = 0, normalize_share_backward = 0;
  /// Passes over an activation without a gate of which the same holds: reads or writes of a tensor
  /// of its size and type.
  int activation_passes_forward = 0, activation_passes_backward = 0;
  /// Passes over the queries in which materialised attention cuts rows into heads and turns them.
  double head_passes_forward = 0, head_passes_backward = 0;
  /// Materialised attention has Transformer-XL's second product, of queries with keys of relative
  /// positions, that positions' projection, and queries of the memory, which are thrown away.
  bool position_product = false;
  /// Bytes for each parameter that clipping and an update by Adam or LAMB move; where the
  /// parameters are narrow, with the loss scale's and the master copy's. 0: one pass over each
  /// tensor.
  double optimizer = 0, optimizer_mixed = 0;
  /// Bytes for each parameter that a micro-batch's gradients move where they are not an update's
  /// only ones: casts, the loss scale, checks, clipping and the sum. 0: only the sum.
  double accumulation = 0, accumulation_mixed = 0;
  /// A product's bias gets its gradient from a kernel that reads the output's once more.
  bool bias_sums = false;
  /// Passes over a rank's gradients before they meet others': always; where there are others.
  double gradient_passes = 0, met_gradient_passes = 0;
  /// Kernels of a tensor's clipping and update, launched after the host has read the step's loss:
  /// it is not ahead of them, so they take their launches at least. 0: one, launched in advance.
  int optimizer_kernels = 0;
  /// Tensors to one kernel of an update by Adam or LAMB. 0: one.
  int optimizer_tensors = 0;
  /// A rank's shard of a parameter that it holds whole is a view of it, not a copy.
  bool shard_views = false;
  /// Passes over an embedding's whole gradient, beside its rows.
  double table_passes = 0;
  /// Bytes for each element of a limited gated activation that limiting its inputs moves.
  double limit_forward = 0, limit_backward = 0;
  /// Small kernels of choosing experts and counting rows, and of ordering and exchanging rows,
  /// beside those that compute.
  int routing_forward = 0, routing_backward = 0, rows_forward = 0, rows_backward = 0;
  /// After and before an exchange of rows a rank orders them by expert, where it has several and a
  /// row did not come once for all of them (Program::rows_once): a pass over all rows each time.
  bool sorts_rows = false;
  /// > 0: rows are gathered, scattered and ordered at this share of the device's memory bandwidth.
  double rows_share = 0;
  /// Likewise it pads experts' rows to what narrow types need, and takes that out again.
  bool pads_rows = false;
  /// What becomes fp8 or NVFP4 is read for its scale first: a tensor's largest value is zeroed,
  /// found and made a scale, a kernel each. What a norm makes is converted by a kernel of its own.
  bool finds_scales = false;
  /// Mamba-2 layers run mamba_ssm's fused function: what the convolution makes is not kept but made
  /// again, and each backward kernel makes the gradients of its parameters too.
  bool mamba_ssm = false;
  /// Its scan applies the gate, before a norm of its own whose input is kept too; batches of
  /// several samples are turned before it and after it.
  bool mamba_gates_in_scan = false;
  /// Experts' products apply their activation and biases and convert what they store.
  bool fused_experts = false;
  friend bool operator==(const FrameworkKernels&, const FrameworkKernels&) = default;
};

/// What a foreign framework allocates beside a program's buffers (docs/simulation.md, "Memory"):
/// priced, never executed.
struct Allocations {
  enum class WeightGradients : std::uint8_t {
    in_place,      ///< kernels add to the accumulated gradient
    apart,         ///< each is a tensor of its own, of the parameters' type, then added
    placeholders,  ///< as `apart`, but a layer's products add in place and leave a tensor of each
                   ///< shape of weight, of the parameters' type, for good (Transformer Engine)
    beside         ///< as `apart`, but where they are accumulated in another type each stays
  } weight_gradients = WeightGradients::in_place;
  /// The loss keeps a softmax of the logits in fp32 for its backward, not the logits.
  bool fp32_loss = false;
  /// Dropout of materialised attention's probabilities: the mask and what it left are kept too.
  bool attention_dropout = false;
  /// Rows are weighted between their experts' activation and its product, not when they are
  /// combined: no output of an expert is kept and, where no kernel does it with the activation (a
  /// gate's, a squared ReLU's), the activation before it.
  bool weighted_activations = false;
  /// Rows that ranks of one expert gather are kept for the backward, not gathered again.
  bool gathered_rows = false;
  /// Of what a product in an 8- or 4-bit type reads, the backward keeps the narrow copy.
  bool narrow_inputs = false;
  /// A layer's weight that products in an 8- or 4-bit type read is kept by rows and by columns in
  /// that type from a step's first micro-batch on, beside the parameter.
  bool narrow_weights = false;
  /// A gated activation is two kernels: what the first, the activation, makes is kept too.
  bool gate_apart = false;
  /// Attention's product after the heads reads a copy that is laid out anew: both are kept.
  bool attention_copied = false;
  /// A tensor of materialised attention's scores stays (Megatron's global memory buffer).
  bool score_buffer = false;
  /// For each logit, while the loss's forward runs, beside the logits and what it keeps.
  Bytes loss_forward;
  /// The same while its backward runs, beside the logits' gradient.
  Bytes loss_backward;
  Bytes workspace;         ///< of its libraries, for good
  Bytes workspace_hopper;  ///< the same, on devices of compute capability 9.0 and later
  /// More of both where a stage has products of experts.
  Bytes workspace_grouped, workspace_grouped_hopper;
  /// What ranks sum lies in buckets beside the gradients, for good.
  bool gradient_buckets = false;
  /// Gradients are set to zero before a step; else one that a single call makes is stored.
  bool clears_gradients = false;
  /// ZeRO-3: a unit's parameters are gathered as one tensor and copied out of it.
  bool copies_gathered = false;
  /// While the step's own blocks run: what gradients are copied into to be reduced (those that stay
  /// beside accumulated ones: a copy of all of those in the parameters' type), and, where they are
  /// no fp32, one tensor of all that the optimizer reads in their type and one in fp32.
  Bytes reduce_buffer;
  bool flat_gradients = false;
  /// Until a micro-batch's backward its stage keeps copies of what it received and of what it sent;
  /// the last keeps the logits, and those of the micro-batch before.
  bool stage_copies = false;
  /// A chunk keeps what it last received, and its gradient, even between steps.
  bool keeps_inputs = false;
  /// What ZeRO-3 shards of a parameter that has a master copy, and of its gradient, is fp32, and no
  /// other copy is beside it: the parameters' type is that of what is gathered alone.
  bool fp32_shards = false;
  bool expandable_segments =
      false;                ///< the allocator's segments grow, so that nothing is left over
  Bytes context = 512_MiB;  ///< of CUDA and its libraries' kernels, outside the allocator
  ElementType parameters = ElementType::fp32;
  friend bool operator==(const Allocations&, const Allocations&) = default;
};

struct ProgramParameter {
  std::string name;
  Shape shape;
  double initial_deviation = 0, initial_value = 0;
};
struct ProgramInput {
  std::string name;
  Shape shape;  ///< one global micro-batch
  std::int32_t tensor = -1;
  std::int64_t values = 0;  ///< > 0: whole numbers below it (token ids, labels); 0: real numbers
};

/// Ranks outside the mesh: data loaders, servers, brokers. One for every combination of coordinates
/// along `atoms`; it stands where the mesh's rank with these coordinates and zeros elsewhere
/// stands, and exchanges messages with that rank of each stage. Roles' ranks follow the mesh's, in
/// order.
struct Role {
  std::string name;
  AtomList atoms;
};

/// Rows per expert of one layer's tokens (docs/routing.md).
struct RowCounts {
  std::int64_t experts = 0;
  std::vector<std::int64_t> positions;  ///< bounds of the sequence's pieces
  /// Of replica r's sample s: counts[((first + r * per_replica + s) * pieces + piece) * experts +
  /// e]. per_replica 0: the same for every sample.
  std::vector<std::int64_t> counts;
  std::int64_t first = 0, per_replica = 0;
};

struct Program {
  Mesh mesh;
  AtomList pipeline;        ///< atoms of the pp axis; empty: one stage
  std::vector<Role> roles;  ///< role r runs stages[pipeline_stages() + r]
  AtomMask replicas = 0;    ///< independent models along these atoms
  int average_every = 0;    ///< > 0: the replicas' parameters are averaged every so many steps
  std::vector<ProgramOperator> operators;
  std::vector<ProgramParameter> parameters;
  std::vector<ProgramInput> inputs;
  std::vector<Buffer> buffers;
  std::vector<RowCounts> routings;  ///< of routed buffers; empty: balanced experts
  std::vector<Block> blocks;
  std::vector<std::vector<BlockCall>> stages;  ///< per stage, in order
  std::vector<std::vector<int>> ties;          ///< groups of stages that share a parameter
  std::vector<std::string> streams;            ///< names, index = Stream
  Optimizer optimizer;
  int staleness = 0;  ///< steps that a gradient waits in its server's queue
  LossScale loss_scale;
  Compression compression;
  Launches launches;
  FrameworkKernels kernels;
  /// Copies of a message along these atoms go in parts, one from each, and are gathered on arrival.
  AtomMask scattered_messages = 0;
  Allocations allocations;
  bool rows_once = false;          ///< Plan::rows_once
  bool overlap_experts = false;    ///< Plan::overlap_experts
  bool expert_bias_apart = false;  ///< Plan::expert_bias_apart
  AtomList data_parallel;          ///< cut a micro-batch's samples, in order
  int micro_batches = 1;
  std::int64_t samples = 1;  ///< per global micro-batch
  std::int32_t loss_tensor = -1;
  /// The runtime packs a collective's buffers into one payload (ours does); else they lie in place.
  bool packs_collectives = false;
  Fp8Format fp8_format = Fp8Format::hybrid;  ///< Plan's: what is executed
  // Plan's, priced only.
  bool channels_first = false;
  int score_passes_forward = 2, score_passes_backward = 3;
  bool startup = false;  ///< fills the parameters, which otherwise are there from the start
  /// Batches are read from storage, each rank's samples from a shard of its own.
  bool sharded_storage = false;

  int stage_count() const { return static_cast<int>(stages.size()); }  ///< roles included
  int pipeline_stages() const { return stage_count() - static_cast<int>(roles.size()); }
  /// Of mesh and roles.
  std::int64_t ranks() const;
  int stage_of(std::int64_t rank) const;
  /// The mesh's rank whose coordinates say what `rank` holds: itself, but for a role's.
  std::int64_t place_of(std::int64_t rank) const;
  /// Whom `rank` exchanges messages with on another stage, a role's included.
  std::int64_t rank_on_stage(std::int64_t rank, int stage) const;
  /// Whom a send of `rank` goes to, a receive comes from.
  std::int64_t peer_of(const Instruction& i, std::int64_t rank) const;
  /// Which instance of a message a call's send or receive is: what a step has once goes once.
  std::int32_t instance_of(const Instruction& i, std::int32_t micro_batch) const {
    const BufferId id = i.kind == Kind::send ? i.reads[0] : i.writes[0];
    return buffer(id).scope == Scope::step ? -1 : micro_batch;
  }
  /// Does the layout's root leave `rank` anything of this buffer?
  bool holds(BufferId id, std::int64_t rank) const {
    const std::int64_t place = place_of(rank);
    return mesh.group_root(place, buffer(id).layout.root) == place;
  }
  /// Members of an instruction's group that `rank` belongs to.
  std::vector<std::int64_t> group(const Instruction& i, std::int64_t rank) const;
  const Buffer& buffer(BufferId id) const { return buffers[id.index()]; }
  /// The buffer whose memory `id` lives in.
  BufferId memory_of(BufferId id) const {
    while (buffers[id.index()].alias >= 0)
      id = BufferId{static_cast<std::size_t>(buffers[id.index()].alias)};
    return id;
  }
};

/// Elements and bytes of `buffer` that `rank` holds; a routed buffer's rows are those of its
/// routing.
std::int64_t local_elements(const Program& program, BufferId buffer, std::int64_t rank);
Bytes local_bytes(const Program& program, BufferId buffer, std::int64_t rank);
/// The same in the device's memory (0 for what lies on the host), and on the host.
Bytes device_bytes(const Program& program, BufferId buffer, std::int64_t rank);
Bytes host_bytes(const Program& program, BufferId buffer, std::int64_t rank);

/// Of a product with one part of the sequence (Instruction::part): which positions.
std::vector<std::int64_t> part_positions(const Program& program, const Instruction& instruction,
                                         std::int64_t rank);
/// How many they are.
std::int64_t part_size(const Program& program, const Instruction& instruction, std::int64_t rank);
/// Dimension of the buffer that is the sequence; -1: none.
int sequence_dim(const Buffer& buffer);

/// Elements that rank `a` holds of `from` and rank `b` wants of `to`, of dense buffers of one
/// shape.
std::int64_t common_elements(const Program& program, BufferId from, std::int64_t a, BufferId to,
                             std::int64_t b);

/// Is this the exchange that brings rows to their experts?
bool brings_rows(const Program& program, const Instruction& instruction);
/// Are the buffer's rows, or the parameter's experts, those of some ranks?
bool cut_by_expert(const Program& program, BufferId buffer);
/// Does it touch rows of experts?
bool of_experts(const Program& program, const Instruction& instruction);

/// Was it captured? One launch starts all of a block's that stand together.
bool of_graph(const Program& program, const Instruction& instruction);

/// Rows of a routed buffer with a routing that `rank` holds.
std::int64_t routed_rows(const Program& program, BufferId buffer, std::int64_t rank);

/// Memory that `rank` needs only while the instruction runs: the packed payload of a collective, a
/// weight's gradient apart, copies of logits.
Bytes transient_bytes(const Program& program, const Instruction& instruction, std::int64_t rank);

/// What the framework allocates on `rank` of `stage` for the time of a step block, in order.
std::vector<Bytes> step_bytes(const Program& program, int stage, std::int64_t rank);

/// By block, what the framework keeps more on `rank` of `stage` after a call (Allocations::
/// stage_copies): of forward blocks, and as much less after the chunk's last backward one.
std::vector<std::int64_t> stage_copies(const Program& program, int stage, std::int64_t rank);

/// What chunks on `rank` of `stage` last received, and its gradients (Allocations::keeps_inputs).
Bytes kept_inputs(const Program& program, int stage, std::int64_t rank);

/// By buffer: do backward passes of layers (operators of "layers.N") read it?
std::vector<bool> read_by_layers(const Program& program);

/// Is what this call makes of the gradient a tensor of its own, of the parameters' type, that a
/// kernel more then adds?
bool added_apart(const Program& program, const Instruction& instruction, BufferId gradient);

/// Gradients of the parameters' type that stay beside accumulated ones, in the order in which
/// backward blocks first write them.
std::vector<BufferId> gradients_beside(const Program& program, const Block& block);
/// A gradient in the parameters' type instead of its own.
Bytes as_parameters(const Program& program, BufferId gradient, std::int64_t rank);

/// What the framework holds for good on `rank` of `stage`, on a device of this compute capability:
/// workspaces, gradients and placeholders that stay, a buffer of scores.
Bytes resident_bytes(const Program& program, int stage, std::int64_t rank, int compute_capability);

/// Instructions that take time, over one rank of every stage: events of a step folded to one class
/// per stage, at least.
std::int64_t timed_instructions(const Program& program);

/// What is wrong with the program, one line each; empty for a program that can run:
/// every buffer is written before it is read and freed once or kept, layouts of collectives fit
/// their kind, operands are cut as their operator is and owe nothing, every send has its receive
/// and all ranks can finish (no deadlock), ids are in range. See docs/program.md.
std::vector<std::string> verify(const Program& program);

/// Calls `f(BufferId)` for everything the instruction reads / writes.
template <class F>
void for_each_read(const Instruction& i, F f) {
  const bool forward = i.kind == Kind::compute && i.kernel == Kernel::forward;
  if (i.kind == Kind::allocate) return;
  for (const BufferId b : i.reads) {
    if (b.valid()) f(b);
  }
  for (const BufferId b : i.parameters) {
    if (b.valid()) f(b);
  }
  for (const BufferId b : i.outputs) {
    if (b.valid()) f(b);
  }
  for (const BufferId b : i.gradients) {
    if (b.valid()) f(b);
  }
  if (!(forward && i.inline_statistics)) {
    for (const BufferId b : i.statistics) {
      if (b.valid()) f(b);
    }
  }
  if (!i.inline_statistics || forward) {
    for (const BufferId b : i.backward_statistics) {
      if (b.valid()) f(b);
    }
  }
  if (!forward) {
    for (const BufferId b : i.extras) {
      if (b.valid()) f(b);
    }
  }
  if (i.accumulate) {
    for (const BufferId b : i.writes) {
      if (b.valid()) f(b);
    }
  }
}
template <class F>
void for_each_write(const Instruction& i, F f) {
  const bool forward = i.kind == Kind::compute && i.kernel == Kernel::forward;
  if (i.kind == Kind::allocate || i.kind == Kind::free) return;
  for (const BufferId b : i.writes) {
    if (b.valid()) f(b);
  }
  if (forward) {
    if (i.inline_statistics) {
      for (const BufferId b : i.statistics) {
        if (b.valid()) f(b);
      }
    }
    for (const BufferId b : i.extras) {
      if (b.valid()) f(b);
    }
  }
}

}  // namespace partita
