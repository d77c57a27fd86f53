// runtime/cpu/kernels.h: every operator's mathematics on one rank's piece of its tensors, in fp32
// on one core.
//
// The contract is that of runtime/reference/kernels.h, whose results these must equal up to
// rounding; only speed and precision differ. Linear algebra is Eigen's, convolutions are oneDNN's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/element_type.h"
#include "runtime/reference/kernels.h"

namespace partita::cpu {

using reference::Row;
using Indices = std::vector<std::int64_t>;

/// One rank's piece in memory: row-major over the index lists.
struct Tensor {
  const std::vector<Indices>* index = nullptr;  ///< null: the operand is absent
  float* values = nullptr;                      ///< floating-point tensors
  const std::int64_t* ids = nullptr;            ///< token ids, labels
  std::byte* bytes = nullptr;                   ///< masks
  const std::vector<Row>* rows = nullptr;       ///< of a routed tensor
  ElementType type = ElementType::fp32;         ///< of `values`; these kernels take fp32 only
  explicit operator bool() const { return index != nullptr; }
  std::int64_t size() const;
};

/// What the caller knows of a routed result only after the kernel has counted its rows.
struct RoutedResult {
  std::vector<Row> rows;
  std::vector<float> values;
};

struct Arguments {
  std::vector<Tensor> inputs, parameters, outputs, output_gradients;
  std::vector<Tensor> statistics, backward_statistics;
  std::vector<Tensor> extras;
  /// Results in the order of the instruction's `writes`; absent where not wanted.
  std::vector<Tensor> results;
  bool accumulate = false;  ///< add to the results
  /// Takes memory for the rows of result k, which only the kernel knows, and says where; with
  /// `accumulate` that of the rows there are. Empty, or not asked: rows are returned as a
  /// RoutedResult. These kernels do not ask.
  std::function<float*(std::size_t k, const std::vector<Row>& rows)> place = nullptr;
  /// Forward statistics are complete as computed, so norms keep (mean, 1 / deviation) in their
  /// place: from sums, a small variance beside a large mean would be lost.
  bool whole_statistics = false;
  /// The pass makes its statistics itself (a forward leaves them in `statistics`): of kernels that
  /// say that they can. These cannot.
  bool own_statistics = false;
};

/// An operator on one rank: what does not change between steps is worked out once.
class Kernel {
 public:
  /// `context` at the first step of the first micro-batch.
  explicit Kernel(reference::Context context);
  ~Kernel();
  Kernel(Kernel&&) noexcept;

  const reference::Context& context() const { return context_; }
  void set_step(std::int64_t step, std::int64_t first_sample);

  void forward_statistic(std::size_t k, const Arguments& a);
  void forward(const Arguments& a);
  void backward_statistic(std::size_t k, const Arguments& a);
  void backward_data(const Arguments& a);
  void backward_weight(const Arguments& a);
  /// Attention of one part of the keys of a ring (runtime/reference/ring_attention.h).
  void attend_part(const Arguments& a);
  void attend_part_backward(const Arguments& a);

  /// Set by a kernel whose result is routed: taken by the caller, who then owns its memory.
  std::vector<RoutedResult> routed;

 private:
  void take_routed();
  reference::Context context_;
  std::unique_ptr<struct Kept> kept_;
};

}  // namespace partita::cpu
