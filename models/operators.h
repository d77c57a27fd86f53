// models/operators.h: the closed set of operators, and what each one says about itself.
//
// An operator runs over named iteration dimensions. Each of its operands is indexed by a subset of
// them. From that alone the derivation (simulator/derive) finds, for any sharding, what every rank
// holds, what is partial and which collective repairs it. See docs/operators.md.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/units.h"
#include "models/dims.h"

namespace partita {

/// y[batch, out] = sum over `contracted` trailing dimensions of x · w[out, in] (+ b[out]).
struct Linear {
  int contracted = 1;
  Shape out;
  bool bias = false;
  friend bool operator==(const Linear&, const Linear&) = default;
};

/// y = x + b along the last dimension. Kept apart from Linear where the product's input side may be
/// cut: the bias is added once, after the partial sums have met.
struct AddBias {
  friend bool operator==(const AddBias&, const AddBias&) = default;
};

/// y[..., feature] = table[ids[...], feature].
struct Embedding {
  std::int64_t vocabulary = 0;
  std::int64_t feature = 0;
  Dim rows = Dim::vocabulary;  ///< what they stand for; Dim::classes: token types
  friend bool operator==(const Embedding&, const Embedding&) = default;
};

/// y[sample, sequence, feature] = x + table[position of sequence, feature].
struct PositionEmbedding {
  std::int64_t positions = 0;
  friend bool operator==(const PositionEmbedding&, const PositionEmbedding&) = default;
};

/// Layer norm and RMS norm run over the last dimension; batch norm over everything but `feature`;
/// local response normalisation (https://papers.nips.cc/paper/4824, section 3.3) over `window`
/// neighbouring features: y = x / (offset + alpha/window · sum of squares)^beta, without
/// parameters.
struct Normalize {
  enum class Kind : std::uint8_t { layer, rms, batch, local };
  Kind kind = Kind::layer;
  double epsilon = 1e-5;
  bool scale = true;
  bool bias = true;
  /// Batch norm only: statistics over all ranks (true) or over each rank's own samples.
  bool synchronised = false;
  /// Layer and RMS norm: > 0 normalises each run of this many values of the last dimension by
  /// itself, with one scale of that length for all runs (a norm of each head's query or key).
  std::int64_t group = 0;
  /// Local response normalisation only.
  std::int64_t window = 0;
  double alpha = 1e-4;
  double beta = 0.75;
  double offset = 1;
  friend bool operator==(const Normalize&, const Normalize&) = default;
};

enum class ActivationKind : std::uint8_t {
  relu,
  squared_relu,
  gelu,
  gelu_tanh,
  silu,
  sigmoid,
  tanh
};

struct Activation {
  ActivationKind kind = ActivationKind::relu;
  friend bool operator==(const Activation&, const Activation&) = default;
};

/// y = kind(gate) · up. SwiGLU is kind silu.
struct GatedActivation {
  ActivationKind kind = ActivationKind::silu;
  /// The network limits both inputs first (GPT-OSS): priced (docs/cost.md), not executed.
  bool limited = false;
  friend bool operator==(const GatedActivation&, const GatedActivation&) = default;
};

struct Add {
  friend bool operator==(const Add&, const Add&) = default;
};
struct Multiply {
  friend bool operator==(const Multiply&, const Multiply&) = default;
};

/// y = x · keep / (1 - probability); the mask comes from a counter keyed by (step, tensor, index).
struct Dropout {
  double probability = 0.1;
  friend bool operator==(const Dropout&, const Dropout&) = default;
};

/// Rotary position embedding on the last `rotated` of head_feature's `head_dim` values of each
/// head; the tensor holds a whole number of heads along head_feature. Pairs (i, i + rotated/2), as
/// Hugging Face's rotate_half: https://arxiv.org/abs/2104.09864.
struct Rotary {
  std::int64_t head_dim = 0;
  std::int64_t rotated = 0;
  double base = 10000;
  friend bool operator==(const Rotary&, const Rotary&) = default;
};

/// softmax(q kᵀ · scale + mask) v.
///   q [sample, sequence, head, queries_per_head · qk_dim]
///   k [sample, key_sequence, head, qk_dim]   v [sample, key_sequence, head, v_dim]
///   y [sample, sequence, head, queries_per_head · v_dim]
/// `head` counts key/value heads: multi-head attention has queries_per_head 1, grouped-query more.
struct Attention {
  std::int64_t queries_per_head = 1;
  std::int64_t qk_dim = 0;
  std::int64_t v_dim = 0;
  double scale = 0;  ///< 0: 1/sqrt(qk_dim)
  bool causal = true;
  std::int64_t window = 0;    ///< > 0: a query sees the last `window` keys only
  bool sinks = false;         ///< one learned logit per query head joins the softmax's denominator
  bool materialised = false;  ///< true: the sequence × sequence probabilities go through memory
  friend bool operator==(const Attention&, const Attention&) = default;
};

/// y[batch, m, n] = a[batch, m, k] · b[batch, k, n] with `batch` leading dimensions shared.
struct BatchedProduct {
  int batch = 1;
  friend bool operator==(const BatchedProduct&, const BatchedProduct&) = default;
};

/// Softmax over the last dimension.
struct Softmax {
  friend bool operator==(const Softmax&, const Softmax&) = default;
};

/// Mean over all labels of -log softmax(logits)[label]; logits [..., vocabulary], labels [...].
struct CrossEntropy {
  friend bool operator==(const CrossEntropy&, const CrossEntropy&) = default;
};

/// Mean over all elements of (prediction - target)².
struct MeanSquaredError {
  friend bool operator==(const MeanSquaredError&, const MeanSquaredError&) = default;
};

struct Window {
  std::int64_t kernel = 1;
  std::int64_t stride = 1;
  std::int64_t pad_before = 0;
  std::int64_t pad_after = 0;
  std::int64_t dilation = 1;
  friend bool operator==(const Window&, const Window&) = default;
};
/// Output positions of a window over `extent` inputs (floor, as PyTorch and ONNX do by default).
std::int64_t window_outputs(const Window& w, std::int64_t extent);

/// x [sample, feature, height, width] -> [sample, out, height, width].
struct Convolution {
  std::int64_t out = 0;
  Window height, width;
  std::int64_t groups = 1;
  bool bias = false;
  friend bool operator==(const Convolution&, const Convolution&) = default;
};

struct Pool {
  bool maximum = true;
  Window height, width;
  bool count_padding = true;  ///< average only: divide by the kernel's size even at the border
  friend bool operator==(const Pool&, const Pool&) = default;
};

/// [sample, feature, height, width] -> [sample, feature]: mean over the plane.
struct GlobalAveragePool {
  friend bool operator==(const GlobalAveragePool&, const GlobalAveragePool&) = default;
};

/// [sample, feature, height, width] -> [sample, sequence = height · width, feature].
struct ToSequence {
  friend bool operator==(const ToSequence&, const ToSequence&) = default;
};
/// A learned token before the first: [sample, s, feature] -> [sample, s + 1, feature].
struct PrependToken {
  friend bool operator==(const PrependToken&, const PrependToken&) = default;
};
/// [sample, sequence, feature] -> [sample, feature] at one position.
struct SelectToken {
  std::int64_t index = 0;
  friend bool operator==(const SelectToken&, const SelectToken&) = default;
};

/// Inputs joined along their last (`last` true) or second dimension.
struct Concat {
  bool last = true;
  friend bool operator==(const Concat&, const Concat&) = default;
};

/// a [sample, sequence, head, n] with b [sample, sequence, r] appended to every head:
/// multi-head latent attention's key.
struct AppendToHeads {
  friend bool operator==(const AppendToHeads&, const AppendToHeads&) = default;
};

/// logits [sample, sequence, expert] -> gates of the same shape, zero but for the best `top_k`.
struct Router {
  std::int64_t top_k = 2;
  bool sigmoid = false;   ///< score by sigmoid instead of softmax (DeepSeek-V3)
  bool normalise = true;  ///< the chosen gates sum to 1
  double scale = 1;
  /// > 1: experts e·groups/E of one group stand together, and a token's are of its `top_groups`
  /// best ones: those whose `group_best` best scores sum to most (of equal sums the lower group).
  std::int64_t groups = 1, top_groups = 1, group_best = 1;
  friend bool operator==(const Router&, const Router&) = default;
};

/// x [sample, sequence, feature], gates -> routed rows [sample, sequence, expert, feature]: one row
/// per (token, chosen expert). A routed tensor's `expert` extent is top_k, its rows carry their
/// expert.
struct Dispatch {
  std::int64_t experts = 0;
  std::int64_t top_k = 2;
  friend bool operator==(const Dispatch&, const Dispatch&) = default;
};

/// rows · w[expert of row, out, in] (+ b[expert, out]).
struct GroupedProduct {
  std::int64_t experts = 0;
  NamedExtent out;
  bool bias = false;
  friend bool operator==(const GroupedProduct&, const GroupedProduct&) = default;
};

/// rows, gates -> y[token] = sum over its rows of gate · row.
struct Combine {
  std::int64_t experts = 0;
  friend bool operator==(const Combine&, const Combine&) = default;
};

/// Depthwise over the sequence, and causal, then SiLU (https://arxiv.org/abs/2405.21060, section
/// 7.1; Dao's causal_conv1d, which keeps its input only):
///   y[t, c] = silu(b[c] + sum over k of w[c, k] · x[t - (kernel - 1) + k, c]), x before 0 being 0.
/// x [sample, sequence, head, head_feature]; w [head, head_feature, kernel], b [head, head_feature].
struct CausalConvolution {
  std::int64_t kernel = 4;
  bool bias = true;
  friend bool operator==(const CausalConvolution&, const CausalConvolution&) = default;
};

/// Mamba-2's state space model (https://arxiv.org/abs/2405.21060, equation (16) and section 6):
/// per head a state S [head_dim, state], zero before the first token,
///   d = softplus(step + step_bias)    a = exp(-d · exp(decay))
///   S_t = a S_{t-1} + d x_t B_tᵀ      y_t = S_t C_t + skip · x_t
/// `head` counts groups of heads that share B and C.
///   x [sample, sequence, head, heads_per_group · head_dim + 2 · state]: x of each head, B, C
///   step [sample, sequence, head, heads_per_group]
///   decay, skip, step_bias [head, heads_per_group]
///   y [sample, sequence, head, heads_per_group · head_dim]
/// Computed in chunks of `chunk` tokens: products inside them, states between them.
struct StateSpace {
  std::int64_t heads_per_group = 1;
  std::int64_t head_dim = 64;
  std::int64_t state = 128;
  std::int64_t chunk = 128;
  friend bool operator==(const StateSpace&, const StateSpace&) = default;
};

/// y = w · rms(x · silu(gate)), each group (`head`) normalised by itself: Mamba-2's norm before its
/// last product. x, gate [sample, sequence, head, head_feature]; w [head, head_feature].
struct GatedNorm {
  double epsilon = 1e-5;
  friend bool operator==(const GatedNorm&, const GatedNorm&) = default;
};

/// y = x · gate, each feature's plane by its own value: squeeze and excitation's last step
/// (https://arxiv.org/abs/1709.01507, eq. 4). x [sample, feature, height, width]; gate [sample,
/// feature].
struct ScaleFeatures {
  friend bool operator==(const ScaleFeatures&, const ScaleFeatures&) = default;
};

using Operation =
    std::variant<Linear, AddBias, Embedding, PositionEmbedding, Normalize, Activation,
                 GatedActivation, Add, Multiply, Dropout, Rotary, Attention, BatchedProduct,
                 Softmax, CrossEntropy, MeanSquaredError, Convolution, Pool, GlobalAveragePool,
                 ToSequence, PrependToken, SelectToken, Concat, AppendToHeads, Router, Dispatch,
                 GroupedProduct, Combine, CausalConvolution, StateSpace, GatedNorm, ScaleFeatures>;

/// "linear", "attention", ...: what breakdowns and patterns call it.
std::string_view kind_name(const Operation& op);

/// How a dimension may be cut across ranks, and what cutting it costs.
enum class DimUse : std::uint8_t {
  parallel,   ///< results of different indices are independent
  sum,        ///< the output is a sum over it: a cut leaves the output partial
  statistic,  ///< a cut needs small all-reduces inside the operator (see Statistic)
  window,     ///< parallel, but each index reads its neighbours: a cut needs halos
  whole,      ///< cannot be cut
};

struct IterationDim {
  Dim dim = Dim::sample;
  std::int64_t extent = 0;
  DimUse use = DimUse::parallel;
};

struct Operand {
  Shape shape;
  /// Iteration dimension that indexes each tensor dimension; -1: none, held whole.
  std::vector<int> dims;
  /// Per tensor dimension: reads a window of the iteration dimension (kernel > 0 entries only).
  std::vector<Window> windows;
  bool differentiable = true;     ///< token ids, labels: false
  bool saved_for_data = false;    ///< inputs and outputs: the backward by data reads it
  bool saved_for_weight = false;  ///< the backward by weight reads it; of parameters too
  bool routed = false;            ///< rows of (token, expert): see Dispatch
};

enum class Reduction : std::uint8_t { sum, max };

/// A small intermediate that is complete only after a reduction over the operator's `statistic`
/// dimensions. An operator with k statistics in a pass is k + 1 kernels when they are cut, one if
/// not.
struct Statistic {
  Reduction reduction = Reduction::sum;
  std::vector<int> dims;   ///< iteration dimensions that index it
  std::int64_t width = 1;  ///< values per index
};

/// Something the forward leaves for the backward besides its operands and statistics: a mask, the
/// softmax of a materialised attention. Counted as memory; kernels may recompute its values.
struct Extra {
  Operand operand;
  int element_bytes = 0;  ///< 0: the activations' type
};

/// Everything the rest of the system knows about one operator at given input shapes.
struct Signature {
  std::vector<IterationDim> dims;
  std::vector<Operand> inputs;
  std::vector<Operand> parameters;
  std::vector<Operand> outputs;
  std::vector<Statistic> forward_statistics;
  std::vector<Statistic> backward_statistics;
  std::vector<Extra> extras;

  int find(Dim dim) const;  ///< index into dims, or -1
};

/// Throws InputError{place} when the shapes don't suit the operation.
Signature signature(const Operation& op, const std::vector<Shape>& inputs,
                    const std::string& place);

enum class Pass : std::uint8_t { forward, backward_data, backward_weight };

/// Tokens of a chunk of a state space model, and how many chunks there are, of `tokens`.
struct Chunks {
  std::int64_t tokens = 0;
  std::int64_t count = 0;
};
Chunks chunks_of(const StateSpace& op, std::int64_t tokens);

/// Work of one pass over a local problem: `extents` are the local extents of signature.dims.
/// Multiply-accumulate counts as 2. Products are exact; element-wise work is counted per element
/// with the factors in docs/operators.md. Causal attention counts the whole square (`attended` = 1)
/// unless the caller passes the fraction of query-key pairs that are computed.
Flops flops(const Operation& op, const Signature& s, const std::vector<std::int64_t>& extents,
            Pass pass, double attended = 1.0);

/// True for products that a matrix unit executes (linear, attention, convolution, grouped and
/// batched).
bool is_product(const Operation& op);

}  // namespace partita
