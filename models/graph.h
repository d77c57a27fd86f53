// models/graph.h: the network as vertices (operators) and edges (tensors). Devices are not
// mentioned.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "models/operators.h"

namespace partita {

using OpId = Id<struct OpTag>;
using TensorId = Id<struct TensorTag>;
using ParameterId = Id<struct ParameterTag>;

struct Tensor {
  std::string name;
  Shape shape;    ///< sample extent 1: one sample
  OpId producer;  ///< invalid: an input of the network
  bool routed = false;
  bool differentiable = true;
};

struct Parameter {
  std::string name;
  Shape shape;
  bool trainable = true;
  /// Standard deviation of the initial normal values; 0 with `initial_value` gives constants.
  double initial_deviation = 0.02;
  double initial_value = 0;
};

struct Operator {
  std::string name;  ///< "layers.3.attention.query"
  Operation operation;
  std::vector<TensorId> inputs;
  std::vector<ParameterId> parameters;
  std::vector<TensorId> outputs;
  int layer = 0;  ///< -1 before the first block, 0..layers-1 the blocks, `layers` after the last
};

/// A network in topological order. The graph describes ONE sample; a batch scales `sample`.
struct Graph {
  std::string name;
  std::vector<Operator> operators;
  std::vector<Tensor> tensors;
  std::vector<Parameter> parameters;
  std::vector<TensorId> inputs;
  TensorId loss;              ///< a scalar; invalid for a network without one
  int layers = 0;             ///< repeated blocks that a pipeline may cut between
  std::int64_t sequence = 0;  ///< tokens per sample; 0 when samples are no sequences

  const Operator& op(OpId id) const { return operators[id.index()]; }
  const Tensor& tensor(TensorId id) const { return tensors[id.index()]; }
  const Parameter& parameter(ParameterId id) const { return parameters[id.index()]; }
};

/// The operator's signature with `samples` samples.
Signature signature(const Graph& graph, OpId op, std::int64_t samples);
/// Number of experts that the rows of a routed tensor are for.
std::int64_t experts_of(const Graph& graph, TensorId routed);
/// The router whose gates its rows were dispatched by; null: other gates.
const Router* router_of(const Graph& graph, TensorId routed);
Shape with_samples(Shape shape, std::int64_t samples);

/// Tokens, or classes, that its loss chooses between; 0: it has no such loss.
std::int64_t vocabulary_of(const Graph& graph);
std::int64_t parameter_count(const Graph& graph);
std::int64_t trainable_parameter_count(const Graph& graph);

/// Work of one sample, whole network: forward, and backward by data and by weight with frozen
/// parameters left out (docs/operators.md).
struct NetworkFlops {
  Flops forward, backward_data, backward_weight;
};
NetworkFlops network_flops(const Graph& graph);

/// Which tensors need a gradient: those that a trainable parameter lies before. Indexed by
/// TensorId.
std::vector<char> needs_gradient(const Graph& graph);

/// The network with its vocabulary (tables, heads, losses) rounded up to a multiple: what Megatron trains, its
/// padded logits taking part in the softmax. Labels stay below the real size.
Graph with_padded_vocabulary(Graph graph, std::int64_t multiple);

/// '*' matches any run of characters, '?' one. Whole-name match.
bool matches(std::string_view pattern, std::string_view name);

/// Marks matching parameters as frozen; InputError when a pattern matches none.
void freeze(Graph& graph, const std::vector<std::string>& patterns);

/// LoRA (https://arxiv.org/abs/2106.09685): every matching Linear gains y += (x A) B · alpha/rank
/// with A normal and B zero, both trainable; all other parameters become frozen.
void add_lora(Graph& graph, const std::vector<std::string>& patterns, std::int64_t rank);

/// Builds a graph operator by operator, inferring shapes. Parameter names are "<operator>.weight"
/// etc.
class GraphBuilder {
 public:
  explicit GraphBuilder(std::string name);
  TensorId input(const std::string& tensor_name, Shape shape, bool differentiable = false);
  void set_layer(int layer) { layer_ = layer; }
  void set_scope(std::string scope) {
    scope_ = std::move(scope);
  }  ///< prefix of names, "layers.3."

  /// Adds an operator; returns its first output. `shared`: existing parameters (tied weights) that
  /// stand for the operator's first ones; their shapes must agree.
  TensorId add(const std::string& op_name, Operation op, std::vector<TensorId> inputs,
               const std::vector<ParameterId>& shared = {});
  OpId last() const;
  const Shape& shape(TensorId t) const;
  Parameter& parameter(ParameterId p);
  const Operator& op(OpId id) const;
  Graph finish(TensorId loss, int layers, std::int64_t sequence);

 private:
  Graph graph_;
  std::string scope_;
  int layer_ = -1;
};

}  // namespace partita
