// runtime/reference/kernels.h: every operator's mathematics on one rank's piece of its tensors, in
// double.
//
// A Piece says which GLOBAL indices it holds along each dimension, so a kernel needs to know
// nothing of meshes or plans: causal masks, vocabulary look-ups, dropout masks and padding follow
// from the indices. Clarity over speed: these kernels are what everything else is checked against.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/element_type.h"
#include "models/operators.h"

namespace partita::reference {

/// One row of a routed tensor.
struct Row {
  std::int64_t sample = 0, sequence = 0, expert = 0;
  friend bool operator==(const Row&, const Row&) = default;
  friend auto operator<=>(const Row&, const Row&) = default;
};

struct Piece {
  /// Global indices held along each tensor dimension (strictly ascending, not always contiguous).
  /// Of a routed tensor [sample, sequence, expert, feature] only index[3] is used; see `rows`.
  std::vector<std::vector<std::int64_t>> index;
  /// Row-major over the index lists; of a routed tensor rows.size() x index[3].size().
  std::vector<double> values;
  bool routed = false;
  std::vector<Row> rows;

  std::int64_t size() const { return static_cast<std::int64_t>(values.size()); }
};

/// A piece of zeros over these indices.
Piece zeros(std::vector<std::vector<std::int64_t>> index);

struct Context {
  const Operation* operation = nullptr;
  /// At the extents of the whole (global micro-batch) problem.
  const Signature* signature = nullptr;
  /// Iteration-dimension indices this rank works on, per signature dimension. Tensor dimensions
  /// that no iteration dimension indexes are held whole.
  std::vector<std::vector<std::int64_t>> indices;
  /// 1 / (number of labels or elements in the whole batch, over all micro-batches): the loss
  /// operators return sum · loss_scale.
  double loss_scale = 1;
  /// Of the ranks that hold partial sums of one output, exactly one adds the bias (and owns its
  /// gradient).
  bool adds_bias = true;
  /// Key of counter-based random numbers: dropout masks depend on (seed, step, sample, indices)
  /// only.
  std::uint64_t seed = 0;
  std::int64_t step = 0;
  std::int64_t first_sample = 0;  ///< global number of sample index 0 (earlier micro-batches)
  /// What a product's operands are rounded to before (round_operand); fp32: nothing. Executors do
  /// that: the kernels here do not.
  ElementType compute = ElementType::fp32;
  Fp8Format fp8_format = Fp8Format::hybrid;
  /// Attention that recomputes its probabilities does so from log-sum-exps in fp32.
  bool narrow_log_sums = false;
};

/// Rounds what a product multiplies to the context's type. Of a grouped product each expert's rows
/// (those of one expert follow each other in `rows`) and each of `experts` weights (`rows` null)
/// are a tensor with a scale of its own; else the operand is one. `gradient`: it is the output's.
void round_operand(const Context& c, bool gradient, const std::vector<Row>* rows,
                   std::size_t experts, std::vector<double>& values);

/// What a kernel reads; entries that the signature does not mark as saved may be empty in backward
/// passes.
struct Operands {
  std::vector<const Piece*> inputs, parameters, outputs, output_gradients;
  std::vector<const Piece*> statistics;           ///< forward ones, complete
  std::vector<const Piece*> backward_statistics;  ///< complete
};

/// Local part of forward statistic k (index lists: its iteration dimensions' local indices, then
/// 0..width-1), given complete statistics 0..k-1. With cut dimensions the caller reduces it over
/// ranks.
Piece forward_statistic(const Context& c, std::size_t k, const Operands& o);
/// Outputs, over the local indices of the outputs' iteration dimensions; partial when a `sum`
/// dimension is cut.
std::vector<Piece> forward(const Context& c, const Operands& o);
Piece backward_statistic(const Context& c, std::size_t k, const Operands& o);
/// Gradient of each input that is differentiable (an empty Piece otherwise), over the input's local
/// indices (windowed inputs: all indices that the local outputs read). Partial over every cut of an
/// iteration dimension that does not index the input.
std::vector<Piece> backward_data(const Context& c, const Operands& o);
/// Gradient of each parameter, likewise.
std::vector<Piece> backward_weight(const Context& c, const Operands& o);

/// Global indices of tensor dimension `d` of an operand that the local problem touches: the
/// iteration dimension's indices, all input positions inside [0, extent) that a window reads, or
/// all when uncut.
std::vector<std::int64_t> touched(const Context& c, const Operand& operand, std::size_t d);

/// Well-mixed bits of three words: keys of the numbers below.
std::uint64_t random_bits(std::uint64_t seed, std::uint64_t a, std::uint64_t b);
/// Counter-based uniform number in [0, 1) (splitmix64 of the mixed words): the same on every
/// partition.
double uniform(std::uint64_t seed, std::uint64_t a, std::uint64_t b);
/// What an operator's dropout leaves out in one step: the same on every partition, and in both
/// passes. Elements are numbered sample after sample; each has 16 bits, four one word: words for
/// each would take a GPU longer than the memory that dropout reads and writes. So probabilities are
/// multiples of 2^-16.
struct Dropped {
  Dropped(const Dropout& op, const Context& c);
  bool operator()(std::uint64_t number) const;
  std::uint64_t key;
  std::uint64_t below;  ///< of 2^16 numbers so many are left out
  double scale;         ///< of what is kept
};
std::uint64_t dropout_key(std::uint64_t seed, std::int64_t step);
/// First number of a routed row: those of its features follow.
std::uint64_t number_of_row(const Context& c, const Row& row);
double normal(std::uint64_t seed, std::uint64_t a, std::uint64_t b);

}  // namespace partita::reference
