#include "simulator/cost/cost.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <tuple>
#include <unordered_map>

#include "base/hash.h"
#include "simulator/cost/measured.h"
#include "simulator/cost/nccl_time.h"
#include "simulator/cost/state_space.h"

namespace partita {
namespace {

Bytes bytes_of(const Program& p, const std::vector<BufferId>& list, std::int64_t rank) {
  Bytes n{0};
  for (const BufferId id : list) {
    if (id.valid()) n += local_bytes(p, id, rank);
  }
  return n;
}

std::vector<std::int64_t> extents_of(const Program& p, const ProgramOperator& op,
                                     std::int64_t rank) {
  std::vector<std::int64_t> all;
  for (std::size_t d = 0; d < op.cuts.size(); ++d) {
    all.push_back(local_extent(p.mesh, op.cuts[d], op.signature.dims[d].extent, rank));
  }
  return all;
}

/// The same for an instruction, which may do one part of the sequence only.
std::vector<std::int64_t> extents_of(const Program& p, const Instruction& i,
                                     const ProgramOperator& op, std::int64_t rank) {
  auto all = extents_of(p, op, rank);
  if (i.part < 0 || std::holds_alternative<Attention>(op.operation)) return all;
  all[static_cast<std::size_t>(op.signature.find(Dim::sequence))] = part_size(p, i, rank);
  return all;
}

/// What crosses in a halo exchange: the part of the window layout that the block layout does not
/// hold. (A window with a stride may also leave rows of its own block unread.)
Bytes crossing_bytes(const Program& p, const Buffer& from, const Buffer& to, std::int64_t rank) {
  const auto windows = [](const Buffer& b) {
    return std::any_of(b.layout.dims.begin(), b.layout.dims.end(),
                       [](const DimSplit& d) { return d.kind == SplitKind::window; });
  };
  const Buffer& wide = windows(to) ? to : from;
  const Buffer& block = windows(to) ? from : to;
  std::int64_t all = 1, own = 1;
  for (std::size_t d = 0; d < wide.shape.size(); ++d) {
    const std::int64_t extent = wide.shape[d].extent;
    if (wide.layout.dims[d] == block.layout.dims[d]) {
      const std::int64_t n = local_extent(p.mesh, wide.layout.dims[d], extent, rank);
      all *= n;
      own *= n;
      continue;
    }
    const auto a = local_indices(p.mesh, wide.layout.dims[d], extent, rank);
    const auto b = local_indices(p.mesh, block.layout.dims[d], extent, rank);
    all *= static_cast<std::int64_t>(a.size());
    own *= std::count_if(a.begin(), a.end(), [&](std::int64_t x) {
      return std::find(b.begin(), b.end(), x) != b.end();
    });
  }
  const std::int64_t crossing = all - own;
  return wide.element_bytes > 0 ? Bytes{crossing * wide.element_bytes}
                                : storage(wide.type, crossing);
}

Pass pass_of(Kernel k) {
  switch (k) {
    case Kernel::backward_data:
    case Kernel::backward_statistic:
      return Pass::backward_data;
    case Kernel::backward_weight:
      return Pass::backward_weight;
    case Kernel::forward:
    case Kernel::forward_statistic:
    case Kernel::zero:
    case Kernel::add:
    case Kernel::optimizer:
    case Kernel::scale:
    case Kernel::square_sum:
    case Kernel::clip:
    case Kernel::loss_scale:
    case Kernel::unscale:
    case Kernel::not_finite:
    case Kernel::compress:
    case Kernel::decompress:
    case Kernel::dequeue:
    case Kernel::enqueue:
    case Kernel::initialise:
    case Kernel::read:
      return Pass::forward;
  }
  return Pass::forward;
}

}  // namespace

namespace {

/// Sum over x in [begin, end) of x + shift, but at least 0 and at most `most`.
double sum_clamped(std::int64_t begin, std::int64_t end, std::int64_t shift, std::int64_t most) {
  const std::int64_t rising = std::clamp(-shift, begin, end),
                     full = std::clamp(most - shift, rising, end);
  return static_cast<double>(full - rising) * static_cast<double>(rising + full - 1 + 2 * shift) /
             2 +
         static_cast<double>(end - full) * static_cast<double>(most);
}
std::int64_t size_of(const std::vector<Range>& ranges) {
  std::int64_t n = 0;
  for (const Range& r : ranges) n += r.size();
  return n;
}

}  // namespace

double attended_fraction(const Program& p, const ProgramOperator& op, std::int64_t rank) {
  const auto* a = std::get_if<Attention>(&op.operation);
  if (a == nullptr || (!a->causal && a->window == 0)) return 1;
  const int query = op.signature.find(Dim::sequence);
  const auto at = static_cast<std::size_t>(query);
  const std::int64_t keys =
      op.signature.dims[static_cast<std::size_t>(op.signature.find(Dim::key_sequence))].extent;
  const std::int64_t extent = op.signature.dims[at].extent;
  if (op.cuts[at].atoms.empty() && a->window == 0) {
    return (static_cast<double>(extent) + 1) / (2 * static_cast<double>(keys));
  }
  // A query sees the keys up to its own, or all, but of a window no more than that.
  const std::int64_t most = a->window > 0 ? std::min(a->window, keys) : keys;
  double pairs = 0;
  const auto mine = local_ranges(p.mesh, op.cuts[at], extent, rank);
  for (const Range& q : mine)
    pairs += a->causal ? sum_clamped(q.begin, q.end, 1, most)
                       : static_cast<double>(q.size()) * static_cast<double>(most);
  return pairs / (static_cast<double>(size_of(mine)) * static_cast<double>(keys));
}

namespace {

/// Attention of this rank's queries with the part of the keys that is passing by.
Flops ring_flops(const Program& p, const Instruction& i, const ProgramOperator& op,
                 std::int64_t rank) {
  const auto& a = std::get<Attention>(op.operation);
  const Buffer& keys = p.buffer(i.reads[1]);
  const auto mine =
      local_ranges(p.mesh, op.cuts[static_cast<std::size_t>(op.signature.find(Dim::sequence))],
                   op.signature.dims[1].extent, rank);
  const auto passing = local_ranges(p.mesh, keys.layout.dims[1], keys.shape[1].extent, rank);
  auto extents = extents_of(p, op, rank);
  extents[static_cast<std::size_t>(op.signature.find(Dim::key_sequence))] = size_of(passing);
  double attended = 1;
  if (a.causal || a.window > 0) {
    double pairs = 0;
    for (const Range& q : mine) {
      for (const Range& k : passing) {
        // Keys up to the query (or all), less those too far before it.
        pairs += a.causal ? sum_clamped(q.begin, q.end, 1 - k.begin, k.size())
                          : static_cast<double>(q.size()) * static_cast<double>(k.size());
        if (a.window > 0) pairs -= sum_clamped(q.begin, q.end, 1 - k.begin - a.window, k.size());
      }
    }
    attended = pairs / (static_cast<double>(size_of(mine)) * static_cast<double>(size_of(passing)));
  }
  return flops(op.operation, op.signature, extents, pass_of(i.kernel), attended);
}

}  // namespace

Flops mathematical_flops(const Program& p, const Instruction& i, std::int64_t rank) {
  if (i.kind != Kind::compute || i.op < 0) return Flops{0};
  if (p.mesh.group_root(rank, p.operators[static_cast<std::size_t>(i.op)].root) != rank)
    return Flops{0};
  if (i.kernel != Kernel::forward && i.kernel != Kernel::backward_data &&
      i.kernel != Kernel::backward_weight)
    return Flops{0};
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  if (i.part >= 0 && std::holds_alternative<Attention>(op.operation))
    return ring_flops(p, i, op, rank);
  const Flops balanced = flops(op.operation, op.signature, extents_of(p, i, op, rank),
                               pass_of(i.kernel), attended_fraction(p, op, rank));
  return Flops{balanced.count * load_of_experts(p, i, rank)};
}

double load_of_experts(const Program& p, const Instruction& i, std::int64_t rank) {
  if (p.routings.empty()) return 1;
  for (const auto* list : {&i.reads, &i.gradients, &i.outputs, &i.writes}) {
    for (const BufferId id : *list) {
      if (!id.valid() || p.buffer(id).routing < 0) continue;
      const Buffer& b = p.buffer(id);
      double balanced = static_cast<double>(b.shape[2].extent) / static_cast<double>(b.experts);
      for (const std::size_t d : {0u, 1u, 2u})
        balanced *= static_cast<double>(
            local_extent(p.mesh, b.layout.dims[d], d == 2 ? b.experts : b.shape[d].extent, rank));
      return balanced > 0 ? static_cast<double>(routed_rows(p, id, rank)) / balanced : 1;
    }
  }
  return 1;
}

namespace {

Product product(double m, double n, double k, double count, ElementType type,
                ProductLayout layout) {
  Product one;
  one.m = m, one.n = n, one.k = k, one.count = count;
  one.type = one.out = type;
  one.layout = layout;
  one.bytes = one.operand_bytes();
  return one;
}

/// What Transformer-XL's code computes beside attention with the content (relative_positions in
/// arXiv 1901.02860, appendix B): queries with keys of the positions, the same for all samples;
/// those keys; and queries of the memory too, as one product gives queries, keys and values of all
/// that is seen. Rows are as wide as the heads together.
void add_positions(const FlashAttention& a, Work& w) {
  const double rows = a.batch * a.queries, width = a.heads * a.qk;
  const double memory = a.batch * (a.keys - a.queries);
  const auto add = [&](double m, double n, double k, double count, ProductLayout layout) {
    if (m > 0 && n > 0 && k > 0) w.products.push_back(product(m, n, k, count, a.type, layout));
  };
  if (!a.backward) {
    add(rows, a.keys, a.qk, a.heads, ProductLayout::tn);
    add(a.keys, width, width, 1, ProductLayout::tn);
    add(memory, width, width, 1, ProductLayout::tn);
  } else {
    add(rows, a.qk, a.keys, a.heads, ProductLayout::nn);  // gradient of the queries
    add(a.keys, a.qk, rows, a.heads, ProductLayout::nt);  // of the positions' keys
    add(width, width, a.keys, 1, ProductLayout::nt);      // of their weight
    add(memory, width, width, 1, ProductLayout::nn);
    add(width, width, memory, 1, ProductLayout::nt);
  }
}

/// Products q·k and probabilities · v with the scores going through memory, as frameworks without
/// flash attention run them: the whole square, whatever the mask.
void materialise(const Program& p, const FlashAttention& a, Work& w) {
  const double count = a.batch * a.heads, m = a.queries, n = a.keys;
  const auto add = [&](double rows, double columns, double depth, ProductLayout layout) {
    w.products.push_back(product(rows, columns, depth, count, a.type, layout));
  };
  if (!a.backward) {
    add(m, n, a.qk, ProductLayout::tn);  // scores
    add(m, a.v, n, ProductLayout::nn);   // output
  } else {
    add(n, a.v, m, ProductLayout::nt);   // gradient of v
    add(m, n, a.v, ProductLayout::tn);   // of probabilities
    add(m, a.qk, n, ProductLayout::nn);  // of q
    add(n, a.qk, m, ProductLayout::nt);  // of k
  }
  const auto scores = static_cast<std::int64_t>(count * m * n);
  // At least the softmax's: it reads scores and writes probabilities; backward reads both and
  // writes one.
  const int passes = a.backward ? p.score_passes_backward : p.score_passes_forward;
  w.streamed = Bytes{passes * storage(a.type, scores).count};
  const FrameworkKernels& kernels = p.kernels;
  double each = a.backward ? kernels.score_backward : kernels.score_forward;
  const bool fused = std::fmod(count, kernels.fused_batches) == 0 &&
                     (kernels.fused_keys == 0 || n <= kernels.fused_keys);
  if (!fused && kernels.score_forward_unfused > 0)
    each = a.backward ? kernels.score_backward_unfused : kernels.score_forward_unfused;
  if (each > 0) w.streamed = Bytes{std::llround(each * static_cast<double>(scores))};
  const double wide = a.backward ? kernels.score_fp32_backward : kernels.score_fp32_forward;
  w.streamed += Bytes{std::llround(wide * static_cast<double>(scores))};
  const double turns = a.backward ? kernels.head_passes_backward : kernels.head_passes_forward;
  const auto queries = static_cast<std::int64_t>(count * m * a.qk);
  w.streamed += Bytes{std::llround(turns * static_cast<double>(storage(a.type, queries).count))};
  if (kernels.position_product) add_positions(a, w);
  w.kernels = static_cast<double>(w.products.size()) + 1;
}

/// Does cuDNN compute it from 4 × 4 tiles of its input? (CUDNN_CONVOLUTION_*_ALGO_WINOGRAD: 3 × 3,
/// stride and dilation 1; not on tensor cores.)
bool winograd(const Convolution& c, const ProgramOperator& op) {
  const auto suits = [](const Window& w) {
    return w.kernel == 3 && w.stride == 1 && w.dilation == 1;
  };
  return op.compute == ElementType::fp32 && c.groups == 1 && suits(c.height) && suits(c.width);
}

/// F(2 × 2, 3 × 3): of each 2 × 2 results 16 products over the channels instead of 36
/// (https://arxiv.org/abs/1509.09308, section 4.1); transforms are part of the kernel.
Product winograd_products(Product direct, Kernel kernel) {
  const bool weight = kernel == Kernel::backward_weight;
  (weight ? direct.k : direct.m) /= 4;
  (weight ? direct.n : direct.k) /= 9;
  direct.count *= 16;
  return direct;
}

/// Does the product before it, fused with the activation, store this product's operand converted?
bool cast_in_epilogue(const Program& p, const ProgramOperator& op, bool forward) {
  const auto* g = std::get_if<GroupedProduct>(&op.operation);
  return g != nullptr && p.kernels.fused_experts && (g->out.dim == Dim::feature) == forward;
}

/// Columns of a product and of those that are joined to it, over its own.
double with_joined(const Program& p, const ProgramOperator& op, std::int64_t rank) {
  if (op.joined.empty()) return 1;
  const double own = product_shape(p, op, rank).n;
  double all = own;
  for (const int other : op.joined)
    all += product_shape(p, p.operators[static_cast<std::size_t>(other)], rank).n;
  return own > 0 ? all / own : 1;
}

/// Of one tensor's scale: its largest value zeroed, found, made a scale.
constexpr int kScaleKernels = 3;

/// How often a tensor is read whose scale is found before it is converted. Columns of NVFP4 are
/// rotated (Hadamard) and converted by a kernel of their own (Transformer Engine,
/// pytorch/csrc/quantizer.cpp, NVFP4Quantizer::quantize_impl).
int scaled_reads(ElementType type) { return type == ElementType::nvfp4 ? 3 : 2; }

/// What an instruction of a product or an attention computes, by shape.
void add_shapes(const Program& p, const Instruction& i, const ProgramOperator& op,
                std::int64_t rank, Work& w) {
  const bool forward = i.kernel == Kernel::forward, data = i.kernel == Kernel::backward_data;
  if (!forward && !data && i.kernel != Kernel::backward_weight) return;
  if (const auto* scan = std::get_if<StateSpace>(&op.operation)) {
    if (!forward && !data) return;
    const auto extents = extents_of(p, op, rank);
    const Chunks chunks = chunks_of(*scan, extents[1]);
    const auto samples = static_cast<double>(extents[0]);
    ScanProblem all;
    all.tokens = samples * static_cast<double>(extents[1]);
    all.chunks = samples * static_cast<double>(chunks.count);
    all.groups = static_cast<double>(extents[2]);
    all.chunk = static_cast<double>(chunks.tokens);
    all.type = op.compute;
    const ScanKernels kernels = scan_kernels(*scan, all, data);
    w.products = kernels.products;
    w.streamed = kernels.streamed;
    w.kernels = kernels.kernels;
    return;
  }
  ProductShape s = product_shape(p, i, rank);
  const double joined = with_joined(p, op, rank);
  s.n *= joined;
  if (!(s.m > 0 && s.n > 0 && s.k > 0 && s.count > 0)) return;
  if (i.part >= 0 && std::holds_alternative<Linear>(op.operation)) {
    const auto d = static_cast<std::size_t>(op.signature.find(Dim::sequence));
    w.parts = static_cast<double>(extents_of(p, op, rank)[d]) /
              static_cast<double>(extents_of(p, i, op, rank)[d]);
    s.m *= w.parts;
  }
  if (const auto* attention = std::get_if<Attention>(&op.operation)) {
    FlashAttention a;
    const double per_head = static_cast<double>(attention->queries_per_head);
    a.queries = s.m, a.keys = s.n;
    a.heads = s.heads * per_head;
    a.batch = s.count / a.heads;
    a.qk = static_cast<double>(attention->qk_dim), a.v = static_cast<double>(attention->v_dim);
    a.backward = data;
    a.flash = p.kernels.flash;
    a.type = op.compute;
    a.bytes = w.bytes;
    const double all = a.flops().count;  // attended is 1
    a.attended = all > 0 ? std::clamp(w.flops.count / all, 1 / (a.queries * a.keys), 1.0) : 1;
    if (attention->materialised) {
      materialise(p, a, w);
    } else {
      w.attention = a;
      const double each = forward ? p.kernels.padding_forward : p.kernels.padding_backward;
      w.streamed = Bytes{std::llround(each * a.batch * a.queries * a.heads * a.qk)};
    }
    return;
  }
  const auto out_of = [&](const std::vector<BufferId>& list) {
    for (const BufferId id : list) {
      if (id.valid() && p.buffer(id).element_bytes == 0) return p.buffer(id).type;
    }
    return op.compute;
  };
  Product one = product(s.m, s.n, s.k, s.count, op.compute, ProductLayout::any);
  one.grouped = std::holds_alternative<GroupedProduct>(op.operation);
  if (const auto* c = std::get_if<Convolution>(&op.operation)) one.convolution = c->groups > 1;
  const bool plain = std::holds_alternative<Linear>(op.operation) || one.grouped;
  if (data) {
    // dx [m, k] = dy [m, n] · w [n, k]; a convolution's window goes over dy.
    one.n = s.k / s.window, one.k = s.n * s.window;
    if (plain) one.layout = ProductLayout::nn;
  } else if (!forward) {
    one.m = s.n, one.n = s.k, one.k = s.m;
    if (plain) one.layout = ProductLayout::nt;
    one.accumulate = i.accumulate && !added_apart(p, i, i.writes[0]);
  } else if (plain) {
    one.layout = ProductLayout::tn;
  }
  one.out = out_of(i.writes);
  if (i.accumulate && !one.accumulate && !forward && !data) one.out = p.allocations.parameters;
  const bool narrow = bits(op.compute) <= 8;
  // Gradients' products add up in fp32 beside the matrix units (Transformer Engine, module/base.py:
  // _2X_ACC_FPROP, _DGRAD, _WGRAD; openxla/xla, pull request 6599).
  one.fast_sums = forward && op.compute == ElementType::fp8;
  one.bytes = narrow || w.parts > 1 ? one.operand_bytes() : w.bytes;
  if (i.casts && !cast_in_epilogue(p, op, forward)) {
    // Read once, written once for this product and once turned, for the other pass.
    const auto& operands = forward ? i.reads : i.gradients;
    const std::int64_t elements = local_elements(p, operands[0], rank);
    const bool found = p.kernels.finds_scales && has_tensor_scale(op.compute);
    const double each =
        (found ? scaled_reads(op.compute) : 1) * bits(p.buffer(operands[0]).type) / 8.0 +
        2 * bits(op.compute) / 8.0;
    // What comes round in parts comes narrow, and is only turned.
    const double moved = i.part > 0 ? 2 * bits(op.compute) / 8.0 : each;
    w.streamed =
        Bytes{std::llround(moved * static_cast<double>(elements) * (forward ? 1 : joined))};
    w.kernels = i.part > 0 ? 1 : 2;
    if (found && i.part <= 0)
      w.kernels += kScaleKernels * (one.grouped ? static_cast<int>(s.count) : 1);
  }
  if (one.grouped) {
    // Transformer Engine multiplies and converts expert by expert
    // (pytorch/module/grouped_linear.py).
    w.groups = static_cast<int>(s.count) - 1;
    if (i.casts && !cast_in_epilogue(p, op, forward)) w.kernels += w.groups;
  }
  if (const auto* g = std::get_if<GroupedProduct>(&op.operation);
      g != nullptr && g->out.dim == Dim::feature && (forward || data) && !p.rows_once) {
    // Rows that came, and rows that go back; backward likewise.
    const BufferId rows = forward ? i.writes[0] : i.gradients[0];
    const int passes = (p.kernels.sorts_rows && s.count > 1 && cut_by_expert(p, rows) ? 2 : 0) +
                       (p.kernels.pads_rows && narrow ? 2 : 0);
    w.ordered = Bytes{2 * passes * local_bytes(p, rows, rank).count};
    w.share = p.kernels.rows_share;
    w.kernels += passes;
  }
  if (const auto* g = std::get_if<GroupedProduct>(&op.operation);
      g != nullptr && g->bias && g->out.dim == Dim::feature && p.expert_bias_apart &&
      (forward || data)) {
    // Expert by expert a bias times its row's probability, added, in fp32; then joined and cast:
    // 4 + 10 + 8 + 6 B an element. Backward cast 6, cast of each part 6, joined 4, gradients of
    // bias and probability 12 each (Megatron-Core, moe/experts.py, TEGroupedMLP._apply_bias).
    const std::int64_t elements = local_elements(p, forward ? i.writes[0] : i.gradients[0], rank);
    w.streamed += Bytes{(forward ? 28 : 40) * elements};
    w.kernels += (forward ? 2 : 5) * static_cast<int>(s.count) + 2;
  }
  if (data && std::holds_alternative<BatchedProduct>(op.operation)) {
    // Of both operands: da [m, k] = dy · bᵀ, db [k, n] = aᵀ · dy.
    Product other = one;
    other.m = s.k, other.n = s.n, other.k = s.m;
    one.bytes = one.operand_bytes(), other.bytes = other.operand_bytes();
    w.products = {one, other};
    w.kernels = 2;
    return;
  }
  if (const auto* c = std::get_if<Convolution>(&op.operation); c != nullptr && winograd(*c, op))
    one = winograd_products(one, i.kernel);
  w.products = {one};
}

/// Weights' gradients that are tensors of their own before they are added.
struct Apart {
  Bytes made;         ///< written by the kernel that makes them
  Bytes accumulated;  ///< what a kernel that adds in place reads and writes instead
  Bytes added;        ///< read and written by the kernels that add
  int kernels = 0;
};
Apart gradients_apart(const Program& p, const Instruction& i, std::int64_t rank) {
  Apart apart;
  if (i.kernel != Kernel::backward_weight) return apart;
  for (const BufferId g : i.writes) {
    if (!added_apart(p, i, g)) continue;
    const Bytes made = as_parameters(p, g, rank), sum = local_bytes(p, g, rank);
    apart.made += made;
    apart.accumulated += 2 * sum;
    // The first one of the right type is what the others are added to.
    const std::int64_t first = p.buffer(g).type == p.allocations.parameters ? 1 : 0,
                       all = std::max(p.micro_batches, 1);
    const bool mixed = bits(p.allocations.parameters) < 32;
    const double each = mixed ? p.kernels.accumulation_mixed : p.kernels.accumulation;
    if (each > 0 && all > 1)
      apart.added +=
          Bytes{std::llround(each * static_cast<double>(local_elements(p, g, rank)))};
    else
      apart.added += Bytes{(made + 2 * sum).count * (all - first) / all};
    ++apart.kernels;
  }
  return apart;
}

/// What a framework's kernels around experts do beyond one pass over each tensor
/// (FrameworkKernels).
void add_routing(const Program& p, const Instruction& i, const ProgramOperator& op,
                 std::int64_t rank, Work& w) {
  const FrameworkKernels& k = p.kernels;
  const bool forward = i.kernel == Kernel::forward;
  if (!forward && i.kernel != Kernel::backward_data) return;
  if (std::holds_alternative<Router>(op.operation))
    w.kernels += forward ? k.routing_forward : k.routing_backward;
  if (std::holds_alternative<Dispatch>(op.operation))
    w.kernels += forward ? k.rows_forward : k.rows_backward;
  if (std::holds_alternative<Dispatch>(op.operation) ||
      std::holds_alternative<Combine>(op.operation))
    w.share = k.rows_share;
  const auto* gated = std::get_if<GatedActivation>(&op.operation);
  if (gated == nullptr) return;
  if (k.fused_experts && of_experts(p, i)) {
    // What the products' epilogues store beside their own results: both copies for the next, of one
    // tensor forward, of two gradients backward.
    const std::int64_t n = local_elements(p, forward ? i.writes[0] : i.gradients[0], rank);
    w.kernels = 0;
    w.bytes = Bytes{(forward ? 2 : 4) * n};
  } else if (gated->limited) {
    const std::int64_t n = local_elements(p, forward ? i.writes[0] : i.gradients[0], rank);
    w.bytes += Bytes{
        std::llround((forward ? k.limit_forward : k.limit_backward) * static_cast<double>(n))};
  }
}

/// Does the kernel of its gradients by data make those of the parameters too?
bool all_gradients_at_once(const Program& p, const ProgramOperator& op) {
  return p.kernels.mamba_ssm && (std::holds_alternative<CausalConvolution>(op.operation) ||
                                 std::holds_alternative<StateSpace>(op.operation) ||
                                 std::holds_alternative<GatedNorm>(op.operation));
}

/// What Megatron's Mamba layers move beside mamba_ssm's kernels with the norm in them
/// (FrameworkKernels::mamba_gates_in_scan).
void add_gate(const Program& p, const Instruction& i, const ProgramOperator& op, std::int64_t rank,
              Work& w) {
  const bool forward = i.kernel == Kernel::forward;
  if (!p.kernels.mamba_gates_in_scan || (!forward && i.kernel != Kernel::backward_data)) return;
  if (std::holds_alternative<GatedNorm>(op.operation)) {
    // The scan reads the gate and writes y twice, gated too; the norm reads and writes. Backward
    // the norm reads two and writes one; a kernel reads x, gate, y and its gradient, and writes the
    // gate's gradient and y's.
    const Bytes each = local_bytes(p, forward ? i.writes[0] : i.gradients[0], rank);
    w.bytes = (forward ? 4 : 9) * each;
    if (!forward) ++w.kernels;
  }
  if (std::holds_alternative<StateSpace>(op.operation)) {
    // Contiguous along each sample, where there are several: all that the layer's first product
    // made (x, B, C and steps; the gate, as wide as the result), and the result.
    const BufferId result = forward ? i.writes[0] : i.gradients[0];
    if (local_extent(p.mesh, op.cuts[0], op.signature.dims[0].extent, rank) < 2) return;
    const Bytes turned = bytes_of(p, forward ? i.reads : i.writes, rank);
    w.streamed += 2 * (turned + 2 * local_bytes(p, result, rank));
    w.kernels += 2;
  }
}

Seconds streaming_time(Bytes bytes, const DeviceProfile& device) {
  return Seconds{static_cast<double>(bytes.count) /
                 (device.memory_bandwidth.count * device.memory_efficiency)};
}

/// What `bytes` take at the share of the bandwidth that was measured; 0: none was.
Seconds at_share(Bytes bytes, const Work& w, const DeviceProfile& device) {
  if (!(w.share > 0)) return {};
  return Seconds{static_cast<double>(bytes.count) / (w.share * device.memory_bandwidth.count)};
}

/// The framework's bytes of an update, which have the norm and the clipping in them; 0: none said.
double update_bytes(const Program& p, bool narrow) {
  if (p.optimizer.kind != OptimizerKind::adam) return 0;
  return narrow ? p.kernels.optimizer_mixed : p.kernels.optimizer;
}

bool narrow_parameters(const Program& p) {
  return std::any_of(p.buffers.begin(), p.buffers.end(), [](const Buffer& b) {
    return b.category == Category::parameters && bits(b.type) < 32;
  });
}

bool updates_on_host(const Program& p) {
  return std::any_of(p.buffers.begin(), p.buffers.end(),
                     [](const Buffer& b) { return b.category == Category::optimizer && b.host; });
}

}  // namespace

Bytes gradient_passes(const Program& p, const Instruction& i, std::int64_t rank) {
  if (i.kind != Kind::compute || i.kernel != Kernel::optimizer) return {};
  const double passes =
      std::max(1, i.index) * p.kernels.gradient_passes + i.index * p.kernels.met_gradient_passes;
  if (!(passes > 0)) return {};
  const double all = static_cast<double>(local_elements(p, i.writes[0], rank)) *
                     static_cast<double>(p.mesh.size(i.atoms));  // not its shard alone
  return Bytes{std::llround(passes * all * bits(p.buffer(i.reads[0]).type) / 8)};
}

Work work_of(const Program& p, const Instruction& i, std::int64_t rank) {
  Work w;
  if (i.op >= 0 &&
      p.mesh.group_root(rank, p.operators[static_cast<std::size_t>(i.op)].root) != rank) {
    w.kernels = 0;  // runs on another rank only
    return w;
  }
  if (i.kind == Kind::slice || i.kind == Kind::copy) {
    w.bytes = Bytes{2 * local_bytes(p, i.writes[0], rank).count};
    const Buffer& to = p.buffer(i.writes[0]);
    if (p.kernels.shard_views && i.kind == Kind::slice && to.category == Category::parameters &&
        to.alias == i.reads[0].value) {
      w.bytes = Bytes{};
      w.kernels = 0;
    }
    if (i.index > 1) w.kernels /= i.index;  // one kernel for so many tensors
    return w;
  }
  if (i.kind == Kind::load) {
    w.kernels = 0;  // the input pipeline is another stream's affair
    return w;
  }
  PARTITA_ASSERT(i.kind == Kind::compute, std::string(name(i.kind)));
  if (i.kernel == Kernel::optimizer) {
    const Bytes state = bytes_of(p, i.outputs, rank) + bytes_of(p, i.extras, rank);
    w.bytes = bytes_of(p, i.reads, rank) + Bytes{2 * state.count} + bytes_of(p, i.writes, rank);
    if (i.extras.empty()) w.bytes += bytes_of(p, i.writes, rank);
    const double n = static_cast<double>(local_elements(p, i.writes[0], rank));
    w.flops = Flops{(p.optimizer.kind == OptimizerKind::adam ? 12 : 4) * n};
    const bool narrow = bits(p.buffer(i.writes[0]).type) < 32;
    // The framework's kernels are the device's; on the host the update is one loop.
    if (const double each = update_bytes(p, narrow); each > 0 && !on_host(p, i))
      w.bytes = Bytes{std::llround(each * n)};
    // Gradients whose optimizer runs on the host pass on the device before they leave it.
    if (!on_host(p, i)) w.bytes += gradient_passes(p, i, rank);
    if (p.kernels.optimizer_tensors > 0 && p.optimizer.kind == OptimizerKind::adam)
      w.kernels = 1.0 / p.kernels.optimizer_tensors;
    if (p.kernels.optimizer_kernels > 0) {
      w.kernels = p.kernels.optimizer_kernels;
      w.launched = w.kernels * p.launches.kernel;
    }
    return w;
  }
  if (i.kernel == Kernel::initialise) {
    // Philox4x32-10 (Salmon et al., SC 2011): ten rounds of two products and four exclusive ors
    // give two normal numbers, their logarithms and cosines included about 60 operations each.
    w.flops = Flops{60 * static_cast<double>(local_elements(p, i.writes[0], rank))};
    w.bytes = bytes_of(p, i.writes, rank);
    return w;
  }
  if (i.kernel == Kernel::zero || i.kernel == Kernel::read) {
    w.bytes = bytes_of(p, i.writes, rank);
    return w;
  }
  if ((i.kernel == Kernel::square_sum || i.kernel == Kernel::clip) &&
      update_bytes(p, narrow_parameters(p)) > 0 && !updates_on_host(p))
    return w;
  const bool part =
      i.part >= 0 && i.op >= 0 &&
      !std::holds_alternative<Attention>(p.operators[static_cast<std::size_t>(i.op)].operation);
  const auto positions = part ? part_size(p, i, rank) : std::int64_t{0};
  const auto touch = [&](BufferId id) {
    Bytes bytes = local_bytes(p, id, rank);
    const Buffer& b = p.buffer(id);
    if (const int d = part ? sequence_dim(b) : -1; d >= 0) {
      // Of the whole sequence only the part's rows move.
      const auto at = static_cast<std::size_t>(d);
      const std::int64_t all = local_extent(p.mesh, b.layout.dims[at], b.shape[at].extent, rank);
      bytes = Bytes{bytes.count / std::max<std::int64_t>(1, all) * positions};
    }
    w.bytes += bytes;
  };
  for_each_read(i, touch);
  for_each_write(i, touch);
  if (i.kernel == Kernel::add && i.multiprocessors > 0) {
    // Parts that peers copied here are summed by one kernel, which reads n and writes one.
    const auto n = static_cast<double>(p.mesh.size(i.atoms));
    w.bytes = Bytes{std::llround(static_cast<double>(w.bytes.count) * (n + 1) / (3 * (n - 1)))};
  }
  if (i.op < 0) return w;
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  const Apart apart = gradients_apart(p, i, rank);
  w.bytes += apart.made - apart.accumulated;
  w.matrix = is_product(op.operation);
  w.type = op.compute;
  w.flops = mathematical_flops(p, i, rank);
  if (i.kernel == Kernel::forward_statistic || i.kernel == Kernel::backward_statistic) {
    w.flops = Flops{static_cast<double>(local_elements(p, i.reads[0], rank))};
  }
  if (const auto* a = std::get_if<Attention>(&op.operation);
      a != nullptr && i.kernel == Kernel::backward_data) {
    // Flash attention computes q·k again: 5 products instead of 4 (arXiv 2205.14135, algorithm 4).
    const auto d = static_cast<double>(a->qk_dim), v = static_cast<double>(a->v_dim);
    if (!a->materialised) w.flops = Flops{w.flops.count * (3 * d + 2 * v) / (2 * d + 2 * v)};
  }
  if (op.in_other) {
    w.kernels = 0;
    w.flops = Flops{0};
    w.bytes = Bytes{0};
    return w;
  }
  const double joined = with_joined(p, op, rank);
  if (joined > 1) {
    // Everything but the shared input, or its gradient, grows with the columns.
    const BufferId shared = i.kernel == Kernel::backward_data ? i.writes[0] : i.reads[0];
    const auto once = static_cast<double>(local_bytes(p, shared, rank).count);
    w.bytes = Bytes{
        std::llround(once + joined * std::max(0.0, static_cast<double>(w.bytes.count) - once))};
    w.flops = Flops{w.flops.count * joined};
  }
  if (op.in_normalise) {
    // What the batch norm's kernel moves more: a residual's other operand. Its own backward reads
    // the gradient that the activation lets through; what passed is kept as bits.
    w.kernels = 0;
    w.flops = Flops{0};
    w.bytes = Bytes{0};
    if (std::holds_alternative<Add>(op.operation) && i.kernel == Kernel::forward)
      w.bytes = local_bytes(p, i.reads[0], rank);
    return w;
  }
  if (i.kernel == Kernel::backward_weight && all_gradients_at_once(p, op)) {
    w.kernels = 0;
    w.flops = Flops{0};
    w.bytes = bytes_of(p, i.writes, rank);
  }
  if (w.matrix) add_shapes(p, i, op, rank, w);
  if (p.kernels.bias_sums && i.kernel == Kernel::backward_weight &&
      std::holds_alternative<Linear>(op.operation) && op.signature.parameters.size() > 1) {
    const auto columns = static_cast<double>(bytes_of(p, i.gradients, rank).count);
    w.streamed += Bytes{std::llround(joined * columns)};
    ++w.kernels;
  }
  w.kernels += apart.kernels;
  // Parts of a sequence make one gradient, which is added once.
  (w.products.empty() ? w.bytes : w.streamed) +=
      Bytes{std::llround(joined * static_cast<double>(apart.added.count) / w.parts)};
  if (p.channels_first && op.compute == ElementType::tf32 &&
      std::holds_alternative<Convolution>(op.operation)) {
    // cuDNN turns the images that a kernel of tensor cores reads and writes, a pass each.
    const auto turned = [&](BufferId id) {
      if (id.valid() && p.buffer(id).shape.size() == 4 && p.buffer(id).parameter < 0)
        w.streamed += Bytes{2 * local_bytes(p, id, rank).count}, ++w.kernels;
    };
    for_each_read(i, turned);
    for_each_write(i, turned);
  }
  const auto passed = [&](int forward, int backward) {
    if (forward == 0 || i.kernel == Kernel::backward_weight) return;
    const bool ahead = i.kernel == Kernel::forward;
    const Bytes one = local_bytes(p, ahead ? i.writes[0] : i.gradients[0], rank);
    w.bytes = (ahead ? forward : backward) * one;
  };
  if (const auto* n = std::get_if<Normalize>(&op.operation);
      n != nullptr && n->kind == Normalize::Kind::batch && i.kernel == Kernel::forward &&
      i.inline_statistics) {
    // Statistics are over all images, so what is normalised is read once more. (Backward the sums
    // are the gradients of scale and bias, an instruction of their own.)
    w.again = local_bytes(p, i.reads[0], rank);
  }
  if (std::holds_alternative<Embedding>(op.operation) ||
      std::holds_alternative<PositionEmbedding>(op.operation)) {
    // Only the rows looked up move, not the table.
    const bool forward = i.kernel == Kernel::forward;
    w.bytes = Bytes{2 * bytes_of(p, forward ? i.writes : i.gradients, rank).count};
    if (i.kernel == Kernel::backward_weight && std::holds_alternative<Embedding>(op.operation))
      w.bytes += Bytes{std::llround(p.kernels.table_passes *
                                    static_cast<double>(bytes_of(p, i.writes, rank).count))};
    // What is stored begins as zeros everywhere.
    if (i.kernel == Kernel::backward_weight && !i.accumulate && p.kernels.table_passes == 0)
      w.bytes += bytes_of(p, i.writes, rank);
  }
  const auto unfused = [&](double forward, double backward) {
    if (forward == 0 || i.kernel == Kernel::backward_weight) return;
    const bool ahead = i.kernel == Kernel::forward;
    const std::int64_t n = local_elements(p, ahead ? i.writes[0] : i.gradients[0], rank);
    w.bytes = Bytes{std::llround((ahead ? forward : backward) * static_cast<double>(n))};
  };
  if (const auto* n = std::get_if<Normalize>(&op.operation);
      n != nullptr && n->kind == Normalize::Kind::layer)
    unfused(p.kernels.normalize_forward, p.kernels.normalize_backward);
  else if (n != nullptr && n->kind == Normalize::Kind::rms)
    unfused(p.kernels.rms_forward, p.kernels.rms_backward);
  if (std::holds_alternative<GatedActivation>(op.operation))
    unfused(p.kernels.gated_forward, p.kernels.gated_backward);
  if (std::holds_alternative<Rotary>(op.operation))
    unfused(p.kernels.rotary_forward, p.kernels.rotary_backward);
  if (const auto* n = std::get_if<Normalize>(&op.operation);
      n != nullptr && (n->kind == Normalize::Kind::layer || n->kind == Normalize::Kind::rms)) {
    const bool ahead = i.kernel == Kernel::forward;
    w.share = ahead ? p.kernels.normalize_share_forward : p.kernels.normalize_share_backward;
    const bool counted = n->kind == Normalize::Kind::layer && p.kernels.normalize_backward > 0;
    if (i.kernel == Kernel::backward_weight && (w.share > 0 || counted)) w.bytes = Bytes{};
  }
  if (i.casts && std::holds_alternative<Normalize>(op.operation)) {
    // Converted after it: read for the scale and again, written once and once turned.
    const ElementType to = i.cast_type;
    const std::int64_t n = local_elements(p, i.writes[0], rank);
    w.bytes +=
        Bytes{scaled_reads(to) * local_bytes(p, i.writes[0], rank).count + n * 2 * bits(to) / 8};
    w.kernels += kScaleKernels + 1;
  }
  if (std::holds_alternative<Dropout>(op.operation))
    unfused(p.kernels.dropout_forward, p.kernels.dropout_backward);
  if (std::holds_alternative<Activation>(op.operation))
    passed(p.kernels.activation_passes_forward, p.kernels.activation_passes_backward);
  add_routing(p, i, op, rank, w);
  add_gate(p, i, op, rank, w);
  if (std::holds_alternative<CrossEntropy>(op.operation) && p.kernels.logit_forward > 0) {
    // Maximum and sum, kernels of their own where the vocabulary is cut, are among the passes.
    const bool statistic = i.kernel == Kernel::forward_statistic;
    const double each =
        i.kernel == Kernel::forward ? p.kernels.logit_forward : p.kernels.logit_backward;
    const auto logits = static_cast<double>(local_elements(p, i.reads[0], rank));
    w.bytes = Bytes{statistic ? 0 : std::llround(each * logits)};
    w.share = i.kernel == Kernel::forward ? p.kernels.logit_share_forward
                                          : p.kernels.logit_share_backward;
  }
  return w;
}

KernelParts kernel_parts(const Work& w, const DeviceProfile& device, ShapePrices& prices) {
  KernelParts all;
  if ((w.products.empty() && !w.attention) || device.compute_capability == 0) {
    const double rate = w.matrix ? device.sustained_rate(w.type).count : device.vector_rate.count;
    all.units = Seconds{w.flops.count > 0 ? w.flops.count / rate : 0};
    all.memory = streaming_time(w.bytes + w.again, device);
    // Beside products the share is of `ordered` alone.
    const Seconds slow = w.products.empty() ? at_share(w.bytes + w.again, w, device) : Seconds{};
    all.work = std::max({all.units, all.memory, w.launched, slow});
    all.beside_transfers = static_cast<double>(device.multiprocessors) /
                           (device.multiprocessors - device.communication_multiprocessors);
    return all;
  }
  double beside = 0;
  const auto add = [&](const KernelParts& one) {
    all.units += one.units;
    all.memory += one.memory;
    all.work += one.work;
    beside += one.work.count * one.beside_transfers;
  };
  if (w.attention) add(prices.of(*w.attention));
  for (const Product& p : w.products) {
    KernelParts one = prices.of(p);
    for (Seconds* t : {&one.units, &one.memory, &one.work}) t->count /= w.parts;
    add(one);
  }
  if (w.streamed.count > 0) {
    const Seconds t = streaming_time(w.streamed, device);
    add({Seconds{0}, t, t});
  }
  if (w.ordered.count > 0) {
    const Seconds t = streaming_time(w.ordered, device);
    add({Seconds{0}, t, std::max(t, at_share(w.ordered, w, device))});
  }
  if (all.work.count > 0) all.beside_transfers = beside / all.work.count;
  return all;
}

Seconds kernel_time(const Work& w, const DeviceProfile& device, ShapePrices& prices) {
  return Seconds{w.kernels * device.kernel_latency.count +
                 kernel_parts(w, device, prices).work.count};
}

WireCount wire_count(CollectiveKind kind, std::int64_t n, Bytes bytes) {
  if (n <= 1 || bytes.count == 0) return {};
  const Bytes chunk = ceil_div(bytes, n);
  switch (kind) {
    case CollectiveKind::all_reduce:
      return {2 * (n - 1), Bytes{2 * (n - 1) * chunk.count}};
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::all_to_all:
      return {n - 1, Bytes{(n - 1) * chunk.count}};
    case CollectiveKind::shift:
    case CollectiveKind::halo_exchange:
      return {1, bytes};
    case CollectiveKind::broadcast:
    case CollectiveKind::reduce:
      return {n - 1, bytes};
    case CollectiveKind::scatter:
    case CollectiveKind::gather:
      return {n - 1, Bytes{(n - 1) * chunk.count}};
  }
  return {};
}

Bytes message_bytes(const Program& p, BufferId buffer, std::int64_t rank) {
  const Bytes all = local_bytes(p, buffer, rank);
  const Layout& layout = p.buffer(buffer).layout;
  if (p.scattered_messages == 0 || (split_atoms(layout) & p.scattered_messages) != 0 ||
      layout.partial != 0)
    return all;
  return ceil_div(all, p.mesh.size(p.scattered_messages));
}

Bytes payload(const Program& p, const Instruction& i, std::int64_t rank) {
  switch (i.collective) {
    case CollectiveKind::all_gather:
    case CollectiveKind::broadcast:
    case CollectiveKind::gather:
      return bytes_of(p, i.writes, rank);
    case CollectiveKind::halo_exchange: {
      Bytes n{0};
      for (std::size_t k = 0; k < i.reads.size(); ++k) {
        n += crossing_bytes(p, p.buffer(i.reads[k]), p.buffer(i.writes[k]), rank);
      }
      return n;
    }
    case CollectiveKind::all_reduce:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::all_to_all:
    case CollectiveKind::shift:
    case CollectiveKind::reduce:
    case CollectiveKind::scatter:
      return bytes_of(p, i.reads, rank);
  }
  return Bytes{0};
}

double exposed_in_twos(Seconds compute, Seconds exchanges, double paired, double taken) {
  if (!(exchanges.count > 0)) return 1;
  return 1 - paired * std::min(1.0, compute / exchanges) * (1 - taken);
}

double rows_once_fraction(std::int64_t experts, std::int64_t top_k, std::int64_t parts,
                          std::int64_t groups, std::int64_t top_groups) {
  PARTITA_ASSERT(experts >= top_k && top_k >= 1 && parts >= 1,
                 fmt::format("top {} of {} experts in {} parts", top_k, experts, parts));
  // Parts of groups, or groups of parts; else groups say nothing that is simple.
  if (groups < 1 || (parts % groups != 0 && groups % parts != 0)) groups = top_groups = 1;
  const auto all = static_cast<double>(experts), of = static_cast<double>(groups),
             opened = static_cast<double>(top_groups), p = static_cast<double>(parts);
  const double open = all * opened / of;  // experts that a token may have
  const auto missed = [&](double mine) {  // none of so many of these is wanted
    double none = 1;
    for (std::int64_t k = 0; k < top_k; ++k)
      none *= std::max(0.0, open - mine - static_cast<double>(k)) / (open - static_cast<double>(k));
    return none;
  };
  double none = 0;  // of a part's experts is wanted
  if (parts >= groups) {
    none = 1 - opened / of + opened / of * missed(all / p);
  } else {
    // Of a part's groups j are open: hypergeometric.
    const std::int64_t here = groups / parts;
    const auto ways = [](std::int64_t n, std::int64_t k) {
      double w = k < 0 || k > n ? 0 : 1;
      for (std::int64_t i = 0; i < k && w > 0; ++i)
        w *= static_cast<double>(n - i) / static_cast<double>(i + 1);
      return w;
    };
    for (std::int64_t j = 0; j <= here; ++j)
      none += ways(here, j) * ways(groups - here, top_groups - j) / ways(groups, top_groups) *
              missed(static_cast<double>(j) * all / of);
  }
  return std::min(1.0, p * (1 - none) / static_cast<double>(top_k));
}

Bytes key_bytes(const Program& p, const Instruction& i, std::int64_t rank) {
  constexpr std::int64_t kKey = 24;
  const Buffer& b = p.buffer(i.reads[0]);
  if (!p.packs_collectives || !b.routed || i.collective == CollectiveKind::all_reduce ||
      i.collective == CollectiveKind::reduce_scatter)
    return Bytes{0};
  const std::int64_t features =
      local_extent(p.mesh, b.layout.dims[3], b.shape[3].extent, p.place_of(rank));
  return Bytes{features > 0 ? local_elements(p, i.reads[0], rank) / features * kKey : 0};
}

namespace {

std::optional<nccl::Collective> nccl_collective(CollectiveKind kind) {
  switch (kind) {
    case CollectiveKind::all_reduce:
      return nccl::Collective::all_reduce;
    case CollectiveKind::all_gather:
      return nccl::Collective::all_gather;
    case CollectiveKind::reduce_scatter:
      return nccl::Collective::reduce_scatter;
    case CollectiveKind::broadcast:
      return nccl::Collective::broadcast;
    case CollectiveKind::reduce:
      return nccl::Collective::reduce;
    case CollectiveKind::all_to_all:
    case CollectiveKind::shift:
    case CollectiveKind::halo_exchange:
    case CollectiveKind::scatter:
    case CollectiveKind::gather:
      return {};  // sends and receives
  }
  return {};
}

}  // namespace

struct Communication::Group {
  nccl::Communicator communicator;
  std::map<nccl::Collective, nccl::Times> times;
};

struct Communication::State {
  Topology topology;
  bool nccl = false;  ///< all devices are GPUs
  bool curves = true;
  std::vector<std::int64_t> last_asked;
  std::uint64_t last_pattern = 0;  ///< of these
  std::unordered_map<std::uint64_t, Group> groups;
  std::unordered_map<std::uint64_t, Way> ways;       ///< by pattern and lay
  std::unordered_map<std::size_t, Way> host_links;   ///< by device and direction
  std::vector<std::unique_ptr<ShapePrices>> shapes;  ///< by profile
  int at_work = 0;
  Adjustment adjustment{};
  /// With links as built, and as NCCL sees them, where some are otherwise.
  std::unique_ptr<Communication> intact, seen;
  /// With the links that collectives were measured on, by catalogue name; "": before edits.
  std::map<std::string, std::unique_ptr<Communication>> measured;
};

Communication::Communication(Topology topology)
    : state_(
          new State{std::move(topology), false, true, {}, 0, {}, {}, {}, {}, 0, {}, {}, {}, {}}) {
  // NCCL takes no two ranks of a device into one group.
  state_->nccl = state_->topology.state().ranks_per_device == 1;
  for (std::size_t i = 0; i < state_->topology.profile_count(); ++i)
    state_->nccl = state_->nccl && nccl::serves(state_->topology.profile(i));
}
Communication::~Communication() = default;
const Topology& Communication::topology() const { return state_->topology; }
void Communication::set_adjustment(const Adjustment& a) { state_->adjustment = a; }
const Adjustment& Communication::adjustment() const { return state_->adjustment; }
void Communication::leave_out_curves() { state_->curves = false; }
ShapePrices& Communication::shapes(std::int64_t rank) {
  const std::size_t k = state_->topology.profile_index(DeviceId{static_cast<std::size_t>(rank)});
  if (state_->shapes.size() <= k) state_->shapes.resize(k + 1);
  if (state_->shapes[k] == nullptr)
    state_->shapes[k] = std::make_unique<ShapePrices>(state_->topology.profile(k));
  return *state_->shapes[k];
}
void Communication::set_at_work(std::int64_t ranks) { state_->at_work = static_cast<int>(ranks); }

bool Communication::uses_nccl() const { return state_->nccl; }

bool Communication::measured_together() const {
  return !state_->nccl && !state_->topology.collectives().empty();
}

std::optional<Seconds> Communication::held(Bytes bytes, bool sender) const {
  if (!measured_together()) return {};
  return measured_time(state_->topology.collectives(), sender ? "send_held" : "receive_held", 2,
                       bytes, state_->at_work);
}

int Communication::measured_at_work(const std::string& kind, int ranks) const {
  if (!measured_together()) return 0;
  return partita::measured_at_work(state_->topology.collectives(), kind, ranks, state_->at_work);
}

std::uint64_t Communication::pattern(const std::vector<std::int64_t>& ranks) const {
  // Questions about one group come in a row.
  if (ranks != state_->last_asked) {
    state_->last_pattern = found_pattern(ranks);
    state_->last_asked = ranks;
  }
  return state_->last_pattern;
}

std::uint64_t Communication::found_pattern(const std::vector<std::int64_t>& ranks) const {
  const Topology& t = state_->topology;
  std::uint64_t h = ranks.size();
  if (ranks.empty()) return h;
  if (const std::int64_t stride = ring_stride(t, ranks); stride != 1)
    h = mix(h, static_cast<std::uint64_t>(stride));
  if (!t.state().link_speed.empty()) {
    // No two groups need have equal links.
    for (const std::int64_t r : ranks) h = mix(h, static_cast<std::uint64_t>(r));
    return h;
  }
  // Numbers in the order of first appearance: nodes by themselves, domains, units.
  struct Numbers {
    std::size_t last = SIZE_MAX;
    std::uint64_t count = 0, now = 0;
    std::unordered_map<std::size_t, std::uint64_t> known;
    void see(std::size_t x) {
      if (x == last) return;
      last = x;
      const auto [it, fresh] = known.try_emplace(x, count + 1);
      count += fresh;
      now = it->second;
    }
  } nodes, domains, units;
  const std::size_t origin = t.node_of(DeviceId{static_cast<std::size_t>(ranks[0])});
  for (const std::int64_t r : ranks) {
    const DeviceId d{static_cast<std::size_t>(r)};
    const std::size_t node = t.node_of(d);
    if (node != nodes.last) {
      nodes.see(node);
      domains.see(t.domain_of(node));
      units.see(t.unit_of(node));
      h = mix(h, t.offset_of(node, origin));
    }
    const auto local = static_cast<std::uint64_t>(t.local_index(d));
    h = mix(mix(h, units.now),
            nodes.now << 40 | domains.now << 20 | local << 4 | t.profile_index(d));
  }
  return h;
}

namespace {

/// At which a rank's bytes move where all links of the transfer are its own.
Communication::Way alone(const Topology& t, const LinkFlows& all) {
  double of_nodes = INFINITY, of_fabric = INFINITY;
  for (const auto& [link, n] : all.flows) {
    double& least = t.node_of_link(link) < t.node_count() ? of_nodes : of_fabric;
    least = std::min(least, t.link(link).bandwidth.count / (static_cast<double>(n) * all.share));
  }
  return {BytesPerSecond{std::min(of_nodes, of_fabric)}, all.latency, BytesPerSecond{of_nodes},
          BytesPerSecond{of_fabric}};
}

}  // namespace

const Communication::Way& Communication::way(Lay lay, const std::vector<std::int64_t>& ranks) {
  const std::uint64_t key = mix(pattern(ranks), static_cast<std::uint64_t>(lay));
  if (const auto it = state_->ways.find(key); it != state_->ways.end()) return it->second;
  return state_->ways[key] = alone(state_->topology, lay_out(state_->topology, lay, ranks));
}

namespace {

/// Of an algorithm of NCCL's that the communicator may choose.
Lay lay_of(nccl::Algorithm a, nccl::Collective what, bool one_domain) {
  using A = nccl::Algorithm;
  const bool gathers = what == nccl::Collective::all_gather,
             sums = what == nccl::Collective::reduce_scatter;
  switch (a) {
    case A::tree:
    case A::collnet_chain:
      return Lay::trees;
    case A::nvls:
    case A::collnet_direct:
      return gathers      ? Lay::switches_gather
             : sums       ? Lay::switches_sum
             : one_domain ? Lay::switches
                          : Lay::switch_trees;
    case A::nvls_tree:
      return Lay::switch_trees;
    case A::pat:
      return sums ? Lay::near_sums : Lay::near_trees;
    case A::ring:
      return Lay::rings;
  }
  return Lay::rings;
}

}  // namespace

Lay Communication::lay(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks) {
  if (kind == CollectiveKind::all_to_all) return Lay::pairs;
  const auto what = nccl_collective(kind);
  if (!state_->nccl || !what || ranks.size() < 2) return Lay::rings;
  const nccl::Communicator& c = group(ranks).communicator;
  const auto a = nccl::choose(c, *what, static_cast<double>(bytes.count)).algorithm;
  return lay_of(a, *what, c.nodes == 1);
}

std::uint64_t Communication::price_class(const std::vector<std::int64_t>& ranks, bool exchanges) {
  const auto bits_of = [](double x) {
    std::uint64_t b;
    static_assert(sizeof b == sizeof x);
    std::memcpy(&b, &x, sizeof b);
    return b;
  };
  std::uint64_t h = ranks.size();
  const auto add = [&](const Way& w) {
    h = mix(mix(h, bits_of(w.bandwidth.count)), bits_of(w.latency.count));
  };
  add(ring(ranks));
  if (exchanges) add(way(Lay::pairs, ranks));
  // A ring of two is as slow as its slower direction; a message has one of them.
  if (ranks.size() == 2 && !state_->topology.state().link_speed.empty()) {
    add(alone(state_->topology, message_flows(state_->topology, ranks[0], ranks[1])));
    add(alone(state_->topology, message_flows(state_->topology, ranks[1], ranks[0])));
  }
  if (state_->nccl && ranks.size() > 1) {
    const nccl::Communicator& c = group(ranks).communicator;
    h = mix(h, static_cast<std::uint64_t>(c.nodes));
    for (const double x : {c.nvlink_GBps, c.network_GBps, c.network_share, c.route_latency_us})
      h = mix(h, bits_of(x));
    unsigned lays = 0;  // that it may take
    for (std::size_t a = 0; a < c.graphs.size(); ++a) {
      const auto& g = c.graphs[a];
      if (!g) continue;
      h = mix(mix(mix(h, static_cast<std::uint64_t>(g->channels)), bits_of(g->intra_GBps)),
              bits_of(g->inter_GBps));
      for (const auto what : {nccl::Collective::all_reduce, nccl::Collective::all_gather,
                              nccl::Collective::reduce_scatter})
        lays |= 1u << static_cast<unsigned>(
                    lay_of(static_cast<nccl::Algorithm>(a), what, c.nodes == 1));
    }
    for (unsigned k = 0; lays >> k != 0; ++k) {
      if ((lays >> k & 1) != 0) add(way(static_cast<Lay>(k), ranks));
    }
  }
  return h;
}

Communication& Communication::as_built() {
  const ClusterState& now = state_->topology.state();
  if (now.link_speed.empty()) return *this;
  ClusterState whole = now;
  whole.link_speed.clear();
  return in_state(state_->intact, std::move(whole));
}

bool Communication::lost_links() const {
  const auto& speeds = state_->topology.state().link_speed;
  return std::any_of(speeds.begin(), speeds.end(), [&](const auto& link) {
    return link.second == 0 &&
           state_->topology.node_of_link(link.first) < state_->topology.node_count();
  });
}

Communication& Communication::as_nccl_sees_it() {
  const ClusterState& now = state_->topology.state();
  ClusterState seen = now;
  seen.link_speed.clear();
  for (const auto& [link, speed] : now.link_speed) {
    // A fabric's links are not its business, and a worn link tells it its rated speed.
    if (speed == 0 && state_->topology.node_of_link(link) < state_->topology.node_count())
      seen.link_speed.emplace(link, 0);
  }
  if (seen.link_speed.size() == now.link_speed.size()) return *this;
  return in_state(state_->seen, std::move(seen));
}

Communication& Communication::in_state(std::unique_ptr<Communication>& kept, ClusterState state) {
  if (!kept) kept = std::make_unique<Communication>(state_->topology.in_state(std::move(state)));
  kept->state_->at_work = state_->at_work;
  kept->state_->curves = state_->curves;
  return *kept;
}

Communication::Group& Communication::group(const std::vector<std::int64_t>& ranks) {
  const auto [it, is_new] = state_->groups.try_emplace(pattern(ranks));
  if (is_new) it->second.communicator = nccl::communicator(as_nccl_sees_it().topology(), ranks);
  return it->second;
}

Communication* Communication::measured_on(const std::string& catalogue) {
  const Topology* changed = state_->topology.measured_on();
  if (catalogue.empty() && changed == nullptr) return nullptr;
  auto& there = state_->measured[catalogue];
  if (there) return there.get();
  if (!catalogue.empty()) {
    there = std::make_unique<Communication>(load_topology(catalogue + ":1"));
  } else if (changed->rank_count() == state_->topology.rank_count()) {
    // The same ranks where they are placed.
    ClusterState state = state_->topology.state();
    state.link_speed.clear();
    there = std::make_unique<Communication>(changed->in_state(std::move(state)));
  }
  return there.get();
}

Seconds Communication::nccl_time(CollectiveKind kind, Bytes bytes,
                                 const std::vector<std::int64_t>& ranks) {
  Group& g = group(ranks);
  const nccl::Communicator& c = g.communicator;
  const auto what = nccl_collective(kind);
  const auto size = static_cast<double>(bytes.count);
  if (!what) {
    const auto w = wire_count(kind, c.ranks, bytes);
    const Way& all = way(lay(kind, bytes, ranks), ranks);
    return Seconds{1e-6 * nccl::exchange_us(c, w.steps, static_cast<double>(w.bytes.count),
                                            all.bandwidth.count * 1e-9)};
  }
  const Topology& t = state_->topology;
  if (lost_links()) {
    // Measured or not: as much longer as its model says that what is left takes.
    Communication& built = as_built();
    Group& whole = built.group(ranks);
    const auto before = whole.times.try_emplace(*what, whole.communicator, *what).first;
    const auto now = g.times.try_emplace(*what, c, *what).first;
    const double longer = now->second.time_us(size) / before->second.time_us(size);
    return Seconds{built.nccl_time(kind, bytes, ranks).count * std::max(1.0, longer)};
  }
  const auto times = g.times.try_emplace(*what, c, *what).first;
  const auto model = [&](double b) { return 1e-6 * times->second.time_us(b); };
  const std::string key(name(kind));
  const auto n = static_cast<int>(c.ranks), nodes = static_cast<int>(c.nodes);
  // A curve is of the links that it was measured on: on others what NCCL's model says takes as much
  // longer, or less long.
  const auto measured = [&](const CollectiveTable& table, Communication* there,
                            const std::vector<std::int64_t>& those) -> std::optional<Seconds> {
    if (there == nullptr ||
        there->topology().rank_count() <= static_cast<std::size_t>(those.back()))
      return measured_time(table, key, n, nodes, size, model);
    Group& then = there->group(those);
    const auto before = then.times.try_emplace(*what, then.communicator, *what).first;
    const auto as_measured = [&](double b) { return 1e-6 * before->second.time_us(b); };
    auto x = measured_time(table, key, n, nodes, size, as_measured);
    if (x) x->count *= model(size) / as_measured(size);
    return x;
  };
  if (state_->curves) {
    if (const auto x = measured(t.collectives(), measured_on(""), ranks)) return *x;
  }
  const DeviceProfile& device = t.device(DeviceId{static_cast<std::size_t>(ranks[0])});
  if (nodes == 1 && !device.collectives.empty()) {
    std::vector<std::int64_t> neighbours(ranks.size());
    std::iota(neighbours.begin(), neighbours.end(), 0);
    const bool known = !device.collectives_on.empty();
    if (const auto x = measured(device.collectives, measured_on(device.collectives_on),
                                known ? neighbours : ranks))
      return *x;
  }
  return Seconds{model(size)};
}

/// NCCL's model and measured times know nodes as built, and no limit between switches. Where links
/// of nodes are slow or have failed, or those between switches are oversubscribed, what moves bytes
/// takes as much longer as they carry less than that time would have them carry.
Seconds Communication::over_links(CollectiveKind kind, Bytes bytes,
                                  const std::vector<std::int64_t>& ranks, Seconds time) {
  const Lay laid = lay(kind, bytes, ranks);
  const Way& all = way(laid, ranks);
  const double wire = static_cast<double>(
      wire_count(kind, static_cast<std::int64_t>(ranks.size()), bytes).bytes.count);
  const Seconds least{wire / all.of_fabric.count};  // whatever the price says
  if (state_->topology.state().link_speed.empty() && all.of_nodes == all.bandwidth)
    return std::max(time, least);
  const double fixed = nccl_time(kind, Bytes{1}, ranks).count, work = time.count - fixed;
  if (!(work > 0)) return time;
  const double rate = std::min(wire / work, as_nccl_sees_it().way(laid, ranks).of_nodes.count);
  return std::max(least, Seconds{fixed + work * std::max(1.0, rate / all.bandwidth.count)});
}

int Communication::channels(CollectiveKind kind, Bytes bytes,
                            const std::vector<std::int64_t>& ranks) {
  const auto what = nccl_collective(kind);
  if (!state_->nccl || !what || ranks.size() < 2) return 0;
  return nccl::choose(group(ranks).communicator, *what, static_cast<double>(bytes.count)).channels;
}

Bytes Communication::communicator_memory(const std::vector<std::int64_t>& ranks) {
  if (!state_->nccl || ranks.size() < 2) return Bytes{0};
  // src/init.cc computeBuffSizes: one buffer of each protocol for every connection that receives.
  constexpr std::int64_t kSimple = 4 << 20, kLl128 = 120 * 640 * 8 * 8, kLl = 8 * 512 * 8 * 16;
  const nccl::Communicator& c = group(ranks).communicator;
  const auto channels = [&](nccl::Algorithm a) {
    const auto& graph = c.graph(a);
    return graph ? graph->channels : 0;
  };
  // In a ring a rank has one neighbour that sends to it; in a tree a parent and a child.
  const std::int64_t connections =
      channels(nccl::Algorithm::ring) + 2 * channels(nccl::Algorithm::tree);
  return Bytes{connections * (kSimple + kLl128 + kLl)};
}

Bytes Communication::travelling(const Program& p, const Instruction& i, Bytes payload,
                                const std::vector<std::int64_t>& ranks) const {
  if (i.sent_bits > 0) return Bytes{payload.count * i.sent_bits / bits(p.buffer(i.reads[0]).type)};
  if (!p.rows_once || i.collective != CollectiveKind::all_to_all) return payload;
  const Buffer& b = p.buffer(i.reads[0]);
  if (!b.routed) return payload;
  std::set<std::size_t> domains;
  for (const std::int64_t r : ranks) {
    const DeviceId d{static_cast<std::size_t>(r)};
    domains.insert(state_->topology.domain_of(state_->topology.node_of(d)));
  }
  const std::size_t parts = domains.size() > 1 ? domains.size() : ranks.size();
  const auto top_k = b.shape[2].extent;
  const double fraction = rows_once_fraction(b.experts, top_k, static_cast<std::int64_t>(parts),
                                             b.groups, b.top_groups);
  return Bytes{std::llround(fraction * static_cast<double>(payload.count))};
}

Seconds Communication::peer_copy(Bytes bytes, const std::vector<std::int64_t>& ranks) {
  constexpr CollectiveKind kind = CollectiveKind::shift;
  const Seconds through_nccl = collective(kind, bytes, ranks);
  if (!state_->nccl || ranks.size() < 2 || bytes.count == 0 || lost_links()) return through_nccl;
  const nccl::Communicator& c = group(ranks).communicator;
  if (c.nodes > 1 || !(c.nvlink_GBps > 0)) return through_nccl;
  const Way& all = way(lay(kind, bytes, ranks), ranks);
  // A copy, a kernel that tells the peer, and the peer's that waits for it.
  const Seconds kernel =
      state_->topology.device(DeviceId{static_cast<std::size_t>(ranks[0])}).kernel_latency;
  const double copy =
      1e-6 * nccl::peer_copy_us(c, static_cast<double>(bytes.count), all.bandwidth.count * 1e-9);
  return std::min(through_nccl, Seconds{2 * kernel.count + copy});
}

Seconds Communication::collective(CollectiveKind kind, Bytes bytes,
                                  const std::vector<std::int64_t>& ranks) {
  const auto n = static_cast<std::int64_t>(ranks.size());
  if (n <= 1 || bytes.count == 0) return Seconds{0};
  if (state_->nccl) return over_links(kind, bytes, ranks, nccl_time(kind, bytes, ranks));
  const CollectiveTable& measured = state_->topology.collectives();
  if (!measured.empty()) {
    if (const auto t = measured_time(measured, std::string(name(kind)), static_cast<int>(n), bytes,
                                     state_->at_work))
      return *t;
  }
  const double launch =
      state_->topology.device(DeviceId{static_cast<std::size_t>(ranks[0])}).kernel_latency.count;
  const WireCount w = wire_count(kind, n, bytes);
  if (kind == CollectiveKind::all_to_all) {
    const Way& all = way(Lay::pairs, ranks);
    return Seconds{launch + all.latency.count +
                   static_cast<double>(w.bytes.count) / all.bandwidth.count};
  }
  const Way& r = ring(ranks);
  const double move = static_cast<double>(w.bytes.count) / r.bandwidth.count;
  const double ring_time = static_cast<double>(w.steps) * r.latency.count + move;
  if (kind == CollectiveKind::all_reduce || kind == CollectiveKind::broadcast ||
      kind == CollectiveKind::reduce) {
    // A pipelined tree pays the depth instead of the length: 2 log2 n hops, 2 S on each link.
    const double depth = std::ceil(std::log2(static_cast<double>(n)));
    const double both = kind == CollectiveKind::all_reduce ? 2 : 1;
    const double tree =
        both * (depth * r.latency.count + static_cast<double>(bytes.count) / r.bandwidth.count);
    return Seconds{launch + std::min(ring_time, tree)};
  }
  return Seconds{launch + ring_time};
}

bool on_host(const Program& p, const Instruction& i) {
  if (i.kind == Kind::copy) return true;
  return i.kind == Kind::compute && i.kernel == Kernel::optimizer && p.buffer(i.writes[0]).host;
}

bool from_storage(const Program& p, const Instruction& i) {
  return (i.kind == Kind::load && p.sharded_storage) ||
         (i.kind == Kind::compute && i.kernel == Kernel::read);
}

Seconds Communication::storage_time(const Program& p, const Instruction& i, std::int64_t rank) {
  const Topology& t = state_->topology;
  const std::size_t node = t.node_of(DeviceId{static_cast<std::size_t>(rank)});
  const BytesPerSecond all = t.storage_bandwidth(node);
  if (!(all.count > 0)) {
    throw InputError(kStorage, fmt::format("{} does not say how fast its nodes read from storage; "
                                           "add storage_bandwidth to its nodes",
                                           t.name()));
  }
  return Seconds{static_cast<double>(local_bytes(p, i.writes[0], rank).count) *
                 static_cast<double>(t.rank_count(node)) / all.count};
}

Seconds Communication::host_time(const Program& p, const Instruction& i, std::int64_t rank) {
  const Topology& t = state_->topology;
  const DeviceId d{static_cast<std::size_t>(rank)};
  const bool crosses =
      i.kind == Kind::copy && p.buffer(i.reads[0]).host != p.buffer(i.writes[0]).host;
  if (!crosses) {
    // Ranks of one host share its memory.
    const std::size_t node = t.node_of(d);
    const BytesPerSecond all = t.host_memory_bandwidth(node);
    if (!(all.count > 0)) {
      throw InputError("offload", fmt::format("{} does not say how fast its hosts' memory is; add "
                                              "host_memory_bandwidth to its nodes",
                                              t.name()));
    }
    const Work w = work_of(p, i, rank);
    return Seconds{static_cast<double>(w.bytes.count) * static_cast<double>(t.rank_count(node)) /
                   all.count};
  }
  const bool up = p.buffer(i.writes[0]).host;
  auto& link = state_->host_links[2 * d.index() + (up ? 1 : 0)];
  if (!(link.bandwidth.count > 0)) {
    std::tie(link.bandwidth, link.latency) = t.host_way(d, up);
    if (!(link.bandwidth.count > 0)) {
      throw InputError("offload",
                       fmt::format("{} has no PCIe or C2C link between its devices and their host; "
                                   "add one to its nodes",
                                   t.name()));
    }
  }
  return Seconds{t.device(d).kernel_latency.count + link.latency.count +
                 static_cast<double>(local_bytes(p, i.writes[0], rank).count) /
                     link.bandwidth.count};
}

Seconds Communication::point_to_point(Bytes bytes, std::int64_t from, std::int64_t to) {
  if (from == to) return Seconds{0};
  const CollectiveTable& measured = state_->topology.collectives();
  if (measured_together()) {
    if (const auto t = measured_time(measured, "send", 2, bytes, state_->at_work)) return *t;
  }
  const Way way = alone(state_->topology, message_flows(state_->topology, from, to));
  if (state_->nccl)
    return Seconds{1e-6 * nccl::exchange_us(group({from, to}).communicator, 0,
                                            static_cast<double>(bytes.count),
                                            way.bandwidth.count * 1e-9)};
  const double launch =
      state_->topology.device(DeviceId{static_cast<std::size_t>(from)}).kernel_latency.count;
  return Seconds{launch + way.latency.count +
                 static_cast<double>(bytes.count) / way.bandwidth.count};
}

Communication::Moving Communication::moving(CollectiveKind kind, Bytes bytes,
                                            const std::vector<std::int64_t>& ranks, bool copies) {
  const auto n = static_cast<std::int64_t>(ranks.size());
  if (n <= 1 || bytes.count == 0) return {};
  const Way& laid = way(lay(kind, bytes, ranks), ranks);
  const auto time_of = [&](Bytes b) {
    return (copies ? peer_copy(b, ranks) : collective(kind, b, ranks)).count;
  };
  const double all = time_of(bytes);
  // What is not latency moves bytes; a measured time's latency is what its smallest payload takes.
  const bool measured = state_->nccl || measured_together();
  double fixed = measured ? time_of(Bytes{1}) : 0;
  const double wire = static_cast<double>(wire_count(kind, n, bytes).bytes.count);
  if (!measured) fixed = all - std::min(all, wire / laid.bandwidth.count);
  const double time = std::max(0.0, all - fixed);
  return {Seconds{time},
          BytesPerSecond{time > 0 ? std::min(laid.bandwidth.count, wire / time) : 0}};
}

Communication::Moving Communication::moving(Bytes bytes, std::int64_t from, std::int64_t to) {
  if (from == to || bytes.count == 0) return {};
  const Way way = alone(state_->topology, message_flows(state_->topology, from, to));
  const double all = point_to_point(bytes, from, to).count;
  double time = static_cast<double>(bytes.count) / way.bandwidth.count;
  if (state_->nccl || measured_together())
    time = all - std::min(all, point_to_point(Bytes{1}, from, to).count);
  time = std::min(time, all);
  return {Seconds{time}, BytesPerSecond{time > 0 ? std::min(way.bandwidth.count,
                                                            static_cast<double>(bytes.count) / time)
                                                 : 0}};
}

std::vector<LinkId> Communication::host_route(std::int64_t rank, bool towards_host) const {
  return state_->topology.host_route(DeviceId{static_cast<std::size_t>(rank)}, towards_host);
}

}  // namespace partita
