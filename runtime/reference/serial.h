// runtime/reference/serial.h: one training step of a whole network in one process.
//
// The reference semantics of every synchronous lossless plan: the gradients that a partitioned run
// must reproduce. Values of parameters and inputs are functions of their global indices, so that a
// rank can make its own piece of them without the rest.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "models/graph.h"
#include "runtime/reference/kernels.h"

namespace partita::reference {

/// One step's inputs, whole global batch, by position in graph.inputs.
struct Inputs {
  std::vector<Piece> by_tensor;
};

struct SerialResult {
  double loss = 0;
  std::vector<Piece> parameter_gradients;  ///< by ParameterId; an empty piece for frozen ones
};

/// Runs `micro_batches` micro-batches of `samples_per_micro_batch` samples one after the other and
/// sums their gradients. `batch_norm_groups`: unsynchronised batch norm takes its statistics over
/// each of this many contiguous groups of a micro-batch's samples, as that many data-parallel ranks
/// do.
SerialResult serial_step(const Graph& graph, const std::vector<Piece>& parameters,
                         const Inputs& inputs, int micro_batches,
                         std::int64_t samples_per_micro_batch, std::uint64_t seed,
                         std::int64_t step, int batch_norm_groups = 1);

/// Gradients of each of `groups` contiguous groups of every micro-batch's samples by themselves, in
/// the scale of the whole batch: they sum to serial_step's. result[group]; the loss is their sum.
std::vector<SerialResult> serial_step_by_group(const Graph& graph,
                                               const std::vector<Piece>& parameters,
                                               const Inputs& inputs, int micro_batches,
                                               std::int64_t samples_per_micro_batch,
                                               std::uint64_t seed, std::int64_t step, int groups);

/// normal(seed, name, index) · deviation + value; `linear` is row-major over the parameter's shape.
double initial_value(const Parameter& parameter, std::uint64_t seed, std::int64_t linear);
std::vector<Piece> initial_parameters(const Graph& graph, std::uint64_t seed);

/// Element of network input `input`: a token id or label in the vocabulary of the operator that
/// reads it, else a normal number. `linear` is row-major over one sample.
double input_value(const Graph& graph, std::size_t input, std::uint64_t seed, std::int64_t step,
                   std::int64_t global_sample, std::int64_t linear);
Inputs make_inputs(const Graph& graph, std::int64_t samples, std::uint64_t seed, std::int64_t step);
/// The same from any source of values: element `linear` (row-major over one sample) of input
/// `input` of sample `first_sample` + j.
using InputValue = std::function<double(std::size_t input, std::int64_t step, std::int64_t sample,
                                        std::int64_t linear)>;
Inputs make_inputs(const Graph& graph, std::int64_t first_sample, std::int64_t samples,
                   std::int64_t step, const InputValue& value);
/// The samples of one micro-batch, numbered from 0.
Piece input_slice(const Piece& whole, int micro_batch, std::int64_t samples_per_micro_batch);

/// Context.seed of an operator: no two share their random numbers.
std::uint64_t operator_seed(std::uint64_t seed, OpId op);
/// Context.loss_scale of a loss operator: 1 / (labels or elements in `samples` samples); else 1.
double loss_scale(const Graph& graph, OpId op, std::int64_t samples);

}  // namespace partita::reference
