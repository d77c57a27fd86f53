#include "runtime/reference/serial.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace partita::reference {
namespace {

constexpr std::uint64_t kInitial = 0x696e6974, kInput = 0x696e7075, kOperator = 0x6f706572;

std::vector<std::int64_t> range(std::int64_t first, std::int64_t last) {
  std::vector<std::int64_t> list(static_cast<std::size_t>(last - first));
  std::iota(list.begin(), list.end(), first);
  return list;
}

Piece whole(const Shape& shape) {
  std::vector<std::vector<std::int64_t>> index;
  for (const auto& d : shape) index.push_back(range(0, d.extent));
  return zeros(std::move(index));
}

/// FNV-1a: names must give the same numbers with every compiler.
std::uint64_t hash(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325U;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return h;
}

/// Vocabulary of a token or label input; 0 for real numbers.
std::int64_t vocabulary_of(const Graph& graph, TensorId input) {
  for (const Operator& op : graph.operators) {
    if (const auto* e = std::get_if<Embedding>(&op.operation);
        e != nullptr && op.inputs[0] == input) {
      return e->vocabulary;
    }
    if (std::holds_alternative<CrossEntropy>(op.operation) && op.inputs[1] == input) {
      return graph.tensor(op.inputs[0]).shape.back().extent;
    }
  }
  return 0;
}

/// Samples [first, last) of a piece whose first dimension is the sample.
Piece samples_of(const Piece& p, std::int64_t first, std::int64_t last) {
  PARTITA_ASSERT(!p.index.empty() && !p.routed && p.index[0].front() == 0,
                 "samples can be taken from a whole dense tensor only");
  const std::int64_t each = p.size() / static_cast<std::int64_t>(p.index[0].size());
  Piece part;
  part.index = p.index;
  part.index[0] = range(first, last);
  part.values.assign(p.values.begin() + first * each, p.values.begin() + last * each);
  return part;
}

void add(Piece& into, const Piece& from) {
  if (into.values.empty()) {
    into = from;
    return;
  }
  PARTITA_ASSERT(into.values.size() == from.values.size() && into.rows == from.rows,
                 fmt::format("sum of {} and {} elements", into.size(), from.size()));
  for (std::size_t i = 0; i < into.values.size(); ++i) into.values[i] += from.values[i];
}

std::vector<const Piece*> pointers(const std::vector<Piece>& pieces) {
  std::vector<const Piece*> list;
  for (const Piece& p : pieces) list.push_back(&p);
  return list;
}

/// One operator at work on one micro-batch: on all samples, or on the samples of one group.
struct Work {
  Context context;
  std::vector<Piece> inputs, parameters, statistics;

  Operands operands() const {
    Operands o;
    o.inputs = pointers(inputs);
    o.parameters = pointers(parameters);
    o.statistics = pointers(statistics);
    return o;
  }
};

/// Forward and backward of one micro-batch.
class MicroBatch {
 public:
  MicroBatch(const Graph& graph, const std::vector<Piece>& parameters, std::int64_t samples,
             int batch_norm_groups)
      : graph_(graph),
        parameters_(parameters),
        samples_(samples),
        groups_(batch_norm_groups),
        needed_(needs_gradient(graph)),
        values_(graph.tensors.size()) {
    for (std::size_t i = 0; i < graph.operators.size(); ++i) {
      signatures_.push_back(signature(graph, OpId{i}, samples));
    }
  }

  double forward(const Inputs& inputs, std::uint64_t seed, std::int64_t step,
                 std::int64_t first_sample, std::int64_t all_samples) {
    for (std::size_t i = 0; i < graph_.inputs.size(); ++i) {
      values_[graph_.inputs[i].index()] = inputs.by_tensor[i];
    }
    for (std::size_t i = 0; i < graph_.operators.size(); ++i) {
      const Operator& op = graph_.operators[i];
      work_.push_back(works_of(OpId{i}));
      for (Work& w : work_.back()) {
        Context& c = w.context;
        c.loss_scale = loss_scale(graph_, OpId{i}, all_samples);
        c.seed = operator_seed(seed, OpId{i});
        c.step = step;
        c.first_sample = first_sample;
        for (std::size_t k = 0; k < signatures_[i].forward_statistics.size(); ++k) {
          w.statistics.push_back(forward_statistic(c, k, w.operands()));
        }
        const auto outputs = reference::forward(c, w.operands());
        for (std::size_t k = 0; k < outputs.size(); ++k) {
          append(values_[op.outputs[k].index()], outputs[k]);
        }
      }
    }
    return graph_.loss.valid() ? values_[graph_.loss.index()].values.at(0) : 0;
  }

  /// Adds to `parameter_gradients` of the trainable parameters.
  void backward(std::vector<Piece>& parameter_gradients) const {
    std::vector<Piece> gradients(graph_.tensors.size());
    gradients[graph_.loss.index()] = zeros({});
    gradients[graph_.loss.index()].values[0] = 1;
    for (std::size_t i = graph_.operators.size(); i-- > 0;) {
      const Operator& op = graph_.operators[i];
      // An operator that no loss follows has no gradient to pass on.
      if (gradients[op.outputs[0].index()].values.empty()) continue;
      const bool data = std::any_of(op.inputs.begin(), op.inputs.end(),
                                    [&](TensorId t) { return needed_[t.index()] != 0; });
      const bool weight = std::any_of(op.parameters.begin(), op.parameters.end(),
                                      [&](ParameterId p) { return graph_.parameter(p).trainable; });
      std::vector<Piece> by_input(op.inputs.size());
      for (const Work& w : work_[i]) {
        const bool group = work_[i].size() > 1;
        std::vector<Piece> output_gradients, outputs, statistics;
        for (const TensorId t : op.outputs) {
          output_gradients.push_back(group ? part(gradients[t.index()], w) : gradients[t.index()]);
          outputs.push_back(group ? part(values_[t.index()], w) : values_[t.index()]);
        }
        Operands o = w.operands();
        o.outputs = pointers(outputs);
        o.output_gradients = pointers(output_gradients);
        if (data) {
          for (std::size_t k = 0; k < signatures_[i].backward_statistics.size(); ++k) {
            statistics.push_back(backward_statistic(w.context, k, o));
            o.backward_statistics = pointers(statistics);
          }
          const auto d = backward_data(w.context, o);
          for (std::size_t k = 0; k < d.size(); ++k) append(by_input[k], d[k]);
        }
        if (!weight) continue;
        const auto d = backward_weight(w.context, o);
        for (std::size_t k = 0; k < d.size(); ++k) {
          if (!graph_.parameter(op.parameters[k]).trainable) continue;
          Piece& sum = parameter_gradients[op.parameters[k].index()];
          for (std::size_t j = 0; j < d[k].values.size(); ++j) sum.values[j] += d[k].values[j];
        }
      }
      for (std::size_t k = 0; k < op.inputs.size(); ++k) {
        const std::size_t t = op.inputs[k].index();
        if (needed_[t] != 0 && !by_input[k].values.empty()) add(gradients[t], by_input[k]);
      }
    }
  }

 private:
  /// The whole problem; local batch norm once for each group of samples.
  std::vector<Work> works_of(OpId id) const {
    const Operator& op = graph_.op(id);
    const Signature& s = signatures_[id.index()];
    Work all;
    all.context.operation = &op.operation;
    all.context.signature = &s;
    for (const auto& d : s.dims) all.context.indices.push_back(range(0, d.extent));
    for (const TensorId t : op.inputs) all.inputs.push_back(values_[t.index()]);
    for (std::size_t i = 0; i < op.parameters.size(); ++i) {
      // Readers of a shared parameter may see it in shapes of their own.
      all.parameters.push_back(whole(s.parameters[i].shape));
      all.parameters.back().values = parameters_[op.parameters[i].index()].values;
    }
    const auto* n = std::get_if<Normalize>(&op.operation);
    if (n == nullptr || n->kind != Normalize::Kind::batch || n->synchronised || groups_ == 1) {
      return {std::move(all)};
    }
    std::vector<Work> groups;
    for (std::int64_t g = 0; g < groups_; ++g) {
      Work one = all;
      const std::int64_t first = g * samples_ / groups_, last = (g + 1) * samples_ / groups_;
      one.context.indices[static_cast<std::size_t>(s.inputs[0].dims[0])] = range(first, last);
      one.inputs[0] = samples_of(one.inputs[0], first, last);
      groups.push_back(std::move(one));
    }
    return groups;
  }

  Piece part(const Piece& p, const Work& w) const {
    const auto& samples = w.inputs[0].index[0];
    return samples.empty() ? samples_of(p, 0, 0)
                           : samples_of(p, samples.front(), samples.back() + 1);
  }

  /// Joins the groups' pieces along the sample.
  static void append(Piece& into, const Piece& from) {
    if (into.index.empty()) {
      into = from;
      return;
    }
    into.index[0].insert(into.index[0].end(), from.index[0].begin(), from.index[0].end());
    into.values.insert(into.values.end(), from.values.begin(), from.values.end());
  }

  const Graph& graph_;
  const std::vector<Piece>& parameters_;
  std::int64_t samples_;
  int groups_;
  std::vector<char> needed_;
  std::vector<Signature> signatures_;
  std::vector<Piece> values_;            ///< by TensorId
  std::vector<std::vector<Work>> work_;  ///< by OpId
};

}  // namespace

SerialResult serial_step(const Graph& graph, const std::vector<Piece>& parameters,
                         const Inputs& inputs, int micro_batches,
                         std::int64_t samples_per_micro_batch, std::uint64_t seed,
                         std::int64_t step, int batch_norm_groups) {
  SerialResult result;
  for (const Parameter& p : graph.parameters) {
    result.parameter_gradients.push_back(p.trainable ? whole(p.shape) : Piece{});
  }
  for (int m = 0; m < micro_batches; ++m) {
    Inputs slices;
    for (const Piece& p : inputs.by_tensor) {
      slices.by_tensor.push_back(input_slice(p, m, samples_per_micro_batch));
    }
    MicroBatch batch(graph, parameters, samples_per_micro_batch, batch_norm_groups);
    result.loss += batch.forward(slices, seed, step, m * samples_per_micro_batch,
                                 micro_batches * samples_per_micro_batch);
    if (graph.loss.valid()) batch.backward(result.parameter_gradients);
  }
  return result;
}

std::vector<SerialResult> serial_step_by_group(const Graph& graph,
                                               const std::vector<Piece>& parameters,
                                               const Inputs& inputs, int micro_batches,
                                               std::int64_t samples_per_micro_batch,
                                               std::uint64_t seed, std::int64_t step, int groups) {
  std::vector<SerialResult> results(static_cast<std::size_t>(groups));
  const std::int64_t each = samples_per_micro_batch / groups;
  for (int g = 0; g < groups; ++g) {
    SerialResult& result = results[static_cast<std::size_t>(g)];
    for (const Parameter& p : graph.parameters)
      result.parameter_gradients.push_back(p.trainable ? whole(p.shape) : Piece{});
    for (int m = 0; m < micro_batches; ++m) {
      Inputs slices;
      for (const Piece& p : inputs.by_tensor)
        slices.by_tensor.push_back(input_slice(p, m * groups + g, each));
      MicroBatch batch(graph, parameters, each, 1);
      result.loss += batch.forward(slices, seed, step, m * samples_per_micro_batch + g * each,
                                   micro_batches * samples_per_micro_batch);
      if (graph.loss.valid()) batch.backward(result.parameter_gradients);
    }
  }
  return results;
}

double initial_value(const Parameter& p, std::uint64_t seed, std::int64_t linear) {
  if (p.initial_deviation == 0) return p.initial_value;
  return normal(random_bits(seed, kInitial, 0), hash(p.name), static_cast<std::uint64_t>(linear)) *
             p.initial_deviation +
         p.initial_value;
}

std::vector<Piece> initial_parameters(const Graph& graph, std::uint64_t seed) {
  std::vector<Piece> all;
  for (const Parameter& p : graph.parameters) {
    all.push_back(whole(p.shape));
    for (std::int64_t i = 0; i < all.back().size(); ++i) {
      all.back().values[static_cast<std::size_t>(i)] = initial_value(p, seed, i);
    }
  }
  return all;
}

double input_value(const Graph& graph, std::size_t input, std::uint64_t seed, std::int64_t step,
                   std::int64_t global_sample, std::int64_t linear) {
  const std::uint64_t key =
      random_bits(random_bits(seed, kInput, static_cast<std::uint64_t>(step)), input, 0);
  const auto a = static_cast<std::uint64_t>(global_sample), b = static_cast<std::uint64_t>(linear);
  const std::int64_t vocabulary = vocabulary_of(graph, graph.inputs[input]);
  if (vocabulary == 0) return normal(key, a, b);
  return std::floor(uniform(key, a, b) * static_cast<double>(vocabulary));
}

Inputs make_inputs(const Graph& graph, std::int64_t first_sample, std::int64_t samples,
                   std::int64_t step, const InputValue& value) {
  Inputs inputs;
  for (std::size_t i = 0; i < graph.inputs.size(); ++i) {
    const Shape& shape = graph.tensor(graph.inputs[i]).shape;
    PARTITA_ASSERT(!shape.empty() && shape[0] == (NamedExtent{Dim::sample, 1}),
                   fmt::format("input {} begins with no sample dimension", text(shape)));
    Piece p = whole(with_samples(shape, samples));
    const std::int64_t each = elements(shape);
    for (std::int64_t j = 0; j < p.size(); ++j)
      p.values[static_cast<std::size_t>(j)] = value(i, step, first_sample + j / each, j % each);
    inputs.by_tensor.push_back(std::move(p));
  }
  return inputs;
}

Inputs make_inputs(const Graph& graph, std::int64_t samples, std::uint64_t seed,
                   std::int64_t step) {
  return make_inputs(
      graph, 0, samples, step,
      [&](std::size_t input, std::int64_t at, std::int64_t sample, std::int64_t linear) {
        return input_value(graph, input, seed, at, sample, linear);
      });
}

Piece input_slice(const Piece& p, int micro_batch, std::int64_t samples_per_micro_batch) {
  Piece part = samples_of(p, micro_batch * samples_per_micro_batch,
                          (micro_batch + 1) * samples_per_micro_batch);
  part.index[0] = range(0, samples_per_micro_batch);
  return part;
}

std::uint64_t operator_seed(std::uint64_t seed, OpId op) {
  return random_bits(seed, kOperator, op.index());
}

double loss_scale(const Graph& graph, OpId id, std::int64_t samples) {
  const Operator& op = graph.op(id);
  const bool labels = std::holds_alternative<CrossEntropy>(op.operation);
  if (!labels && !std::holds_alternative<MeanSquaredError>(op.operation)) return 1;
  return 1 / static_cast<double>(elements(with_samples(graph.tensor(op.inputs[1]).shape, samples)));
}

}  // namespace partita::reference
