#include "models/graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "base/error.h"
#include "base/yaml.h"

namespace partita {
namespace {

std::vector<std::int64_t> full_extents(const Signature& s) {
  std::vector<std::int64_t> all;
  for (const auto& d : s.dims) all.push_back(d.extent);
  return all;
}

/// Names of an operator's parameters, in the order its signature lists them.
std::vector<std::string> parameter_names(const Operation& op, std::size_t count) {
  if (std::holds_alternative<Attention>(op)) return {"sinks"};
  if (std::holds_alternative<PrependToken>(op)) return {"token"};
  if (const auto* n = std::get_if<Normalize>(&op); n != nullptr && !n->scale) return {"bias"};
  if (std::holds_alternative<AddBias>(op)) return {"bias"};
  if (std::holds_alternative<StateSpace>(op)) return {"decay", "skip", "bias"};
  std::vector<std::string> names{"weight", "bias"};
  names.resize(count);
  return names;
}

}  // namespace

Shape with_samples(Shape shape, std::int64_t samples) {
  for (auto& d : shape) {
    if (d.dim == Dim::sample) d.extent *= samples;
  }
  return shape;
}

Signature signature(const Graph& graph, OpId id, std::int64_t samples) {
  const Operator& op = graph.op(id);
  std::vector<Shape> shapes;
  for (const TensorId t : op.inputs) shapes.push_back(with_samples(graph.tensor(t).shape, samples));
  Signature s = signature(op.operation, shapes, op.name);
  // Element-wise operators see top_k rows per token; which experts there are, only the dispatch
  // says.
  const auto routed = std::find_if(op.inputs.begin(), op.inputs.end(),
                                   [&](TensorId t) { return graph.tensor(t).routed; });
  if (routed != op.inputs.end()) {
    s.dims[static_cast<std::size_t>(s.find(Dim::expert))].extent = experts_of(graph, *routed);
  }
  return s;
}

std::int64_t experts_of(const Graph& graph, TensorId routed) {
  for (TensorId at = routed; graph.tensor(at).producer.valid();) {
    const Operator& op = graph.op(graph.tensor(at).producer);
    if (const auto* d = std::get_if<Dispatch>(&op.operation)) return d->experts;
    at = op.inputs[0];
  }
  throw InternalError("routed tensor " + graph.tensor(routed).name + " comes from no dispatch");
}

const Router* router_of(const Graph& graph, TensorId routed) {
  for (TensorId at = routed; graph.tensor(at).producer.valid();) {
    const Operator& op = graph.op(graph.tensor(at).producer);
    if (std::holds_alternative<Dispatch>(op.operation)) {
      const OpId gates = graph.tensor(op.inputs[1]).producer;
      return gates.valid() ? std::get_if<Router>(&graph.op(gates).operation) : nullptr;
    }
    at = op.inputs[0];
  }
  return nullptr;
}

std::int64_t vocabulary_of(const Graph& graph) {
  std::int64_t most = 0;
  for (const Operator& op : graph.operators) {
    if (!std::holds_alternative<CrossEntropy>(op.operation)) continue;
    most = std::max(most, graph.tensor(op.inputs[0]).shape.back().extent);
  }
  return most;
}

std::int64_t parameter_count(const Graph& graph) {
  std::int64_t n = 0;
  for (const auto& p : graph.parameters) n += elements(p.shape);
  return n;
}

std::int64_t trainable_parameter_count(const Graph& graph) {
  std::int64_t n = 0;
  for (const auto& p : graph.parameters) n += p.trainable ? elements(p.shape) : 0;
  return n;
}

std::vector<char> needs_gradient(const Graph& graph) {
  std::vector<char> needed(graph.tensors.size(), 0);
  for (std::size_t i = 0; i < graph.operators.size(); ++i) {
    const Operator& op = graph.operators[i];
    bool any = false;
    for (const ParameterId p : op.parameters) any |= graph.parameter(p).trainable;
    for (const TensorId t : op.inputs) any |= needed[t.index()] != 0;
    for (const TensorId t : op.outputs) needed[t.index()] = any && graph.tensor(t).differentiable;
  }
  return needed;
}

NetworkFlops network_flops(const Graph& graph) {
  NetworkFlops total;
  const auto needed = needs_gradient(graph);
  for (std::size_t i = 0; i < graph.operators.size(); ++i) {
    const Operator& op = graph.operators[i];
    const Signature s = signature(graph, OpId{i}, 1);
    const auto extents = full_extents(s);
    total.forward += flops(op.operation, s, extents, Pass::forward);
    bool data = false, weight = false;
    for (std::size_t k = 0; k < op.inputs.size(); ++k) {
      data |= s.inputs[k].differentiable && needed[op.inputs[k].index()] != 0;
    }
    for (const ParameterId p : op.parameters) weight |= graph.parameter(p).trainable;
    if (data) total.backward_data += flops(op.operation, s, extents, Pass::backward_data);
    if (weight) total.backward_weight += flops(op.operation, s, extents, Pass::backward_weight);
  }
  return total;
}

Graph with_padded_vocabulary(Graph graph, std::int64_t multiple) {
  const auto pad = [&](Shape& shape) {
    for (auto& d : shape) {
      if (d.dim == Dim::vocabulary) d.extent = ceil_div(d.extent, multiple) * multiple;
    }
  };
  for (auto& t : graph.tensors) pad(t.shape);
  for (auto& p : graph.parameters) pad(p.shape);
  for (auto& op : graph.operators) {
    if (auto* l = std::get_if<Linear>(&op.operation)) pad(l->out);
    if (auto* e = std::get_if<Embedding>(&op.operation);
        e != nullptr && e->rows == Dim::vocabulary) {
      e->vocabulary = ceil_div(e->vocabulary, multiple) * multiple;
    }
  }
  return graph;
}

bool matches(std::string_view pattern, std::string_view word) {
  std::size_t p = 0, w = 0, star = std::string_view::npos, resume = 0;
  while (w < word.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == word[w])) {
      ++p, ++w;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = w;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      w = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

namespace {

/// What a pattern that matches none of the names may have meant.
std::string near(const std::string& pattern, const std::vector<std::string>& names) {
  if (names.empty()) return "; there are none";
  std::string part = pattern;
  part.erase(std::remove_if(part.begin(), part.end(), [](char c) { return c == '*' || c == '?'; }),
             part.end());
  const auto with = std::find_if(names.begin(), names.end(), [&](const std::string& name) {
    return !part.empty() && name.find(part) != std::string::npos;
  });
  if (with != names.end()) return fmt::format("; '*{}*' would match {}", part, *with);
  const std::string meant = did_you_mean(pattern, names);
  return meant.empty() ? fmt::format("; names look like '{}'", names.front()) : meant;
}

}  // namespace

void freeze(Graph& graph, const std::vector<std::string>& patterns) {
  for (const auto& pattern : patterns) {
    bool any = false;
    for (auto& p : graph.parameters) {
      if (!matches(pattern, p.name)) continue;
      p.trainable = false;
      any = true;
    }
    if (!any) {
      std::vector<std::string> names;
      for (const auto& p : graph.parameters) names.push_back(p.name);
      throw InputError("freeze", fmt::format("pattern '{}' matches no parameter of {}{}", pattern,
                                             graph.name, near(pattern, names)));
    }
  }
}

void add_lora(Graph& graph, const std::vector<std::string>& patterns, std::int64_t rank) {
  if (rank < 1) throw InputError("lora", fmt::format("rank {} must be at least 1", rank));
  std::vector<char> chosen(graph.operators.size(), 0);
  for (const auto& pattern : patterns) {
    bool any = false;
    for (std::size_t i = 0; i < graph.operators.size(); ++i) {
      if (!std::holds_alternative<Linear>(graph.operators[i].operation)) continue;
      if (!matches(pattern, graph.operators[i].name)) continue;
      chosen[i] = 1;
      any = true;
    }
    if (!any) {
      std::vector<std::string> names;
      for (const auto& op : graph.operators) {
        if (std::holds_alternative<Linear>(op.operation)) names.push_back(op.name);
      }
      throw InputError("lora", fmt::format("pattern '{}' matches no linear operator of {}{}",
                                           pattern, graph.name, near(pattern, names)));
    }
  }
  for (auto& p : graph.parameters) p.trainable = false;

  // Rebuilt in order: each chosen y = xW becomes base, down, up, add, and readers of y read the
  // sum.
  std::vector<Operator> old = std::move(graph.operators);
  graph.operators.clear();
  std::map<TensorId, TensorId> replaced;
  const auto tensor = [&](std::string label, Shape shape) {
    Tensor t;
    t.name = std::move(label);
    t.shape = std::move(shape);
    t.producer = OpId{graph.operators.size()};
    graph.tensors.push_back(std::move(t));
    return TensorId{graph.tensors.size() - 1};
  };
  for (std::size_t i = 0; i < old.size(); ++i) {
    Operator op = old[i];
    for (auto& t : op.inputs) {
      if (const auto it = replaced.find(t); it != replaced.end()) t = it->second;
    }
    for (const TensorId t : op.outputs)
      graph.tensors[t.index()].producer = OpId{graph.operators.size()};
    graph.operators.push_back(op);
    if (!chosen[i]) continue;
    const Linear base = std::get<Linear>(op.operation);
    TensorId from = op.inputs[0];
    for (int half = 0; half < 2; ++half) {
      Operator part;
      part.name = op.name + (half == 0 ? ".lora_a" : ".lora_b");
      part.layer = op.layer;
      Linear linear;
      linear.contracted = half == 0 ? base.contracted : 1;
      linear.out = half == 0 ? Shape{{Dim::head_feature, rank}} : base.out;
      part.operation = linear;
      part.inputs = {from};
      const Signature s = signature(part.operation, {graph.tensor(from).shape}, part.name);
      Parameter p;
      p.name = part.name + ".weight";
      p.shape = s.parameters[0].shape;
      p.initial_deviation = half == 0 ? 0.02 : 0.0;
      graph.parameters.push_back(p);
      part.parameters = {ParameterId{graph.parameters.size() - 1}};
      from = tensor(part.name, s.outputs[0].shape);
      part.outputs = {from};
      graph.operators.push_back(part);
    }
    Operator sum;
    sum.name = op.name + ".lora_add";
    sum.layer = op.layer;
    sum.operation = Add{};
    sum.inputs = {op.outputs[0], from};
    const TensorId y = tensor(sum.name, graph.tensor(op.outputs[0]).shape);
    sum.outputs = {y};
    graph.operators.push_back(sum);
    replaced[op.outputs[0]] = y;
  }
}

GraphBuilder::GraphBuilder(std::string name) { graph_.name = std::move(name); }

TensorId GraphBuilder::input(const std::string& tensor_name, Shape shape, bool differentiable) {
  Tensor t;
  t.name = tensor_name;
  t.shape = std::move(shape);
  t.differentiable = differentiable;
  graph_.tensors.push_back(std::move(t));
  const TensorId id{graph_.tensors.size() - 1};
  graph_.inputs.push_back(id);
  return id;
}

TensorId GraphBuilder::add(const std::string& op_name, Operation operation,
                           std::vector<TensorId> inputs, const std::vector<ParameterId>& shared) {
  Operator op;
  op.name = scope_ + op_name;
  op.operation = std::move(operation);
  op.inputs = std::move(inputs);
  op.layer = layer_;
  std::vector<Shape> shapes;
  for (const TensorId t : op.inputs) shapes.push_back(graph_.tensor(t).shape);
  const Signature s = signature(op.operation, shapes, op.name);
  const auto names = parameter_names(op.operation, s.parameters.size());
  for (std::size_t i = 0; i < s.parameters.size(); ++i) {
    if (i < shared.size()) {
      const Shape& have = graph_.parameter(shared[i]).shape;
      if (elements(have) != elements(s.parameters[i].shape)) {
        throw InputError(op.name, fmt::format("cannot share a parameter of shape {} as {}",
                                              text(have), text(s.parameters[i].shape)));
      }
      op.parameters.push_back(shared[i]);
      continue;
    }
    Parameter p;
    p.name = op.name + "." + names[i];
    p.shape = s.parameters[i].shape;
    if (names[i] == "bias") p.initial_deviation = 0;
    const bool scale = std::holds_alternative<Normalize>(op.operation) ||
                       std::holds_alternative<GatedNorm>(op.operation);
    if ((scale && names[i] == "weight") || names[i] == "skip") {
      p.initial_deviation = 0;
      p.initial_value = 1;
    }
    if (names[i] == "decay") p.initial_deviation = 0;  // of 1 a unit of time
    graph_.parameters.push_back(std::move(p));
    op.parameters.push_back(ParameterId{graph_.parameters.size() - 1});
  }
  for (std::size_t i = 0; i < s.outputs.size(); ++i) {
    Tensor t;
    t.name = i == 0 ? op.name : fmt::format("{}#{}", op.name, i);
    t.shape = s.outputs[i].shape;
    t.producer = OpId{graph_.operators.size()};
    t.routed = s.outputs[i].routed;
    t.differentiable = s.outputs[i].differentiable;
    graph_.tensors.push_back(std::move(t));
    op.outputs.push_back(TensorId{graph_.tensors.size() - 1});
  }
  const TensorId first = op.outputs.at(0);
  graph_.operators.push_back(std::move(op));
  return first;
}

OpId GraphBuilder::last() const { return OpId{graph_.operators.size() - 1}; }
const Shape& GraphBuilder::shape(TensorId t) const { return graph_.tensor(t).shape; }
Parameter& GraphBuilder::parameter(ParameterId p) { return graph_.parameters[p.index()]; }
const Operator& GraphBuilder::op(OpId id) const { return graph_.op(id); }

Graph GraphBuilder::finish(TensorId loss, int layers, std::int64_t sequence) {
  graph_.loss = loss;
  graph_.layers = layers;
  graph_.sequence = sequence;
  // More than any count here holds to the last one.
  constexpr double kMost = 9e15;
  double all = 0;
  for (const Parameter& p : graph_.parameters) {
    double n = 1;
    for (const NamedExtent& d : p.shape) n *= static_cast<double>(d.extent);
    all += n;
  }
  if (all > kMost)
    throw InputError(graph_.name,
                     fmt::format("has {:.2g} parameters, and networks of up to {:.0e} are counted; "
                                 "check its sizes",
                                 all, kMost));
  return std::move(graph_);
}

}  // namespace partita
