#include "models/operators.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/yaml.h"

namespace partita {
namespace {

constexpr std::array<std::string_view, kDimCount> kDimNames{
    "sample", "sequence",  "key_sequence", "position", "head",   "head_feature", "feature",
    "ffn",    "reduction", "vocabulary",   "classes",  "expert", "height",       "width"};

template <class... F>
struct Overload : F... {
  using F::operator()...;
};
template <class... F>
Overload(F...) -> Overload<F...>;

/// Collects a signature; operands are given as lists of iteration dimensions.
struct Maker {
  Signature s;
  const std::vector<Shape>& in;
  const std::string& place;

  Maker(const std::vector<Shape>& inputs, const std::string& where) : in(inputs), place(where) {}

  void need_inputs(std::size_t n, const char* what) const {
    if (in.size() != n) {
      throw InputError(place, fmt::format("{} takes {} inputs, got {}", what, n, in.size()));
    }
  }
  void need_rank(std::size_t input, std::size_t rank, const char* what) const {
    if (in[input].size() != rank) {
      throw InputError(place, fmt::format("{} needs {} dimensions in input {}, got {}", what, rank,
                                          input, text(in[input])));
    }
  }
  void need_rank_at_least(std::size_t input, std::size_t rank, const char* what) const {
    if (in[input].size() < rank) {
      throw InputError(place, fmt::format("{} needs at least {} dimensions in input {}, got {}",
                                          what, rank, input, text(in[input])));
    }
  }
  void need_same(std::size_t a, std::size_t b) const {
    if (in[a].size() != in[b].size() ||
        !std::equal(in[a].begin(), in[a].end(), in[b].begin(),
                    [](const auto& x, const auto& y) { return x.extent == y.extent; })) {
      throw InputError(place, fmt::format("inputs must have one shape, got {} and {}", text(in[a]),
                                          text(in[b])));
    }
  }

  int dim(Dim d, std::int64_t extent, DimUse use = DimUse::parallel) {
    s.dims.push_back({d, extent, use});
    return static_cast<int>(s.dims.size()) - 1;
  }
  /// One parallel iteration dimension per dimension of `shape`, heads' inner features held whole.
  std::vector<int> dims_of(const Shape& shape) {
    std::vector<int> all;
    for (const auto& [d, extent] : shape) {
      all.push_back(d == Dim::head_feature ? -1 : dim(d, extent));
    }
    return all;
  }
  Operand operand(const Shape& shape, std::vector<int> dims) const {
    Operand o;
    o.shape = shape;
    o.dims = std::move(dims);
    o.windows.assign(o.shape.size(), Window{});
    return o;
  }
  Operand& input(std::size_t i, std::vector<int> dims) {
    s.inputs.push_back(operand(in[i], std::move(dims)));
    return s.inputs.back();
  }
  Operand& parameter(Shape shape, std::vector<int> dims) {
    s.parameters.push_back(operand(shape, std::move(dims)));
    return s.parameters.back();
  }
  Operand& output(Shape shape, std::vector<int> dims) {
    s.outputs.push_back(operand(shape, std::move(dims)));
    return s.outputs.back();
  }
};

void element_wise(Maker& m, std::size_t inputs, const char* what) {
  m.need_inputs(inputs, what);
  for (std::size_t i = 1; i < inputs; ++i) m.need_same(0, i);
  const auto d = m.dims_of(m.in[0]);
  // Between dispatch and combine: rows, not a dense tensor.
  const bool routed = m.in[0].size() == 4 && m.in[0][2].dim == Dim::expert;
  for (std::size_t i = 0; i < inputs; ++i) m.input(i, d).routed = routed;
  m.output(m.in[0], d).routed = routed;
}

void make(Maker& m, const Linear& op) {
  m.need_inputs(1, "linear");
  const Shape& x = m.in[0];
  const auto contracted = static_cast<std::size_t>(op.contracted);
  if (op.contracted < 1 || contracted >= x.size() || op.out.empty()) {
    throw InputError(m.place, fmt::format("a linear operator cannot contract {} dimensions of {}",
                                          op.contracted, text(x)));
  }
  const std::size_t batch = x.size() - contracted;
  std::vector<int> x_dims, y_dims, w_dims, b_dims;
  Shape y, w;
  for (std::size_t i = 0; i < batch; ++i) {
    const int d = x[i].dim == Dim::head_feature ? -1 : m.dim(x[i].dim, x[i].extent);
    x_dims.push_back(d);
    y_dims.push_back(d);
    y.push_back(x[i]);
  }
  for (const auto& out : op.out) {
    const int d = out.dim == Dim::head_feature ? -1 : m.dim(out.dim, out.extent);
    y_dims.push_back(d);
    w_dims.push_back(d);
    b_dims.push_back(d);
    y.push_back(out);
    w.push_back(out);
  }
  for (std::size_t i = batch; i < x.size(); ++i) {
    // Two dimensions of one operator need two names: the summed side of feature -> feature.
    Dim label = x[i].dim;
    const bool taken = m.s.find(label) >= 0 || label == Dim::feature;
    if (taken) label = Dim::reduction;
    const int d = x[i].dim == Dim::head_feature ? -1 : m.dim(label, x[i].extent, DimUse::sum);
    x_dims.push_back(d);
    w_dims.push_back(d);
    w.push_back(x[i]);
  }
  auto& input = m.input(0, x_dims);
  input.saved_for_weight = true;
  m.parameter(w, w_dims);
  if (op.bias) m.parameter(op.out, b_dims);
  m.output(y, y_dims);
}

void make(Maker& m, const AddBias&) {
  element_wise(m, 1, "bias");
  m.need_rank_at_least(0, 1, "bias");
  m.parameter({m.in[0].back()}, {m.s.inputs[0].dims.back()});
}

void make(Maker& m, const Embedding& op) {
  m.need_inputs(1, "embedding");
  auto d = m.dims_of(m.in[0]);
  const int v = m.dim(op.rows, op.vocabulary, DimUse::sum);
  const int f = m.dim(Dim::feature, op.feature);
  auto& ids = m.input(0, d);
  ids.differentiable = false;
  ids.saved_for_weight = true;
  m.parameter({{op.rows, op.vocabulary}, {Dim::feature, op.feature}}, {v, f});
  Shape y = m.in[0];
  y.push_back({Dim::feature, op.feature});
  d.push_back(f);
  m.output(y, d);
}

void make(Maker& m, const PositionEmbedding& op) {
  m.need_inputs(1, "position embedding");
  m.need_rank(0, 3, "position embedding");
  if (m.in[0][1].extent > op.positions) {
    throw InputError(m.place,
                     fmt::format("{} tokens need as many learned positions, the table has {}; "
                                 "use a sequence of at most {}",
                                 m.in[0][1].extent, op.positions, op.positions));
  }
  const auto d = m.dims_of(m.in[0]);
  const int p = m.dim(Dim::position, op.positions, DimUse::whole);
  m.input(0, d);
  m.parameter({{Dim::position, op.positions}, m.in[0][2]}, {p, d[2]});
  m.output(m.in[0], d);
}

void make_local(Maker& m, const Normalize& op) {
  const Shape& x = m.in[0];
  if (x.size() < 2 || x[1].dim != Dim::feature || op.window < 1 || op.scale || op.bias) {
    throw InputError(m.place, fmt::format("cannot normalise {} over {} neighbouring features",
                                          text(x), op.window));
  }
  std::vector<int> d;
  for (std::size_t i = 0; i < x.size(); ++i) {
    d.push_back(m.dim(x[i].dim, x[i].extent, i == 1 ? DimUse::whole : DimUse::parallel));
  }
  m.input(0, d).saved_for_data = true;
  m.output(x, d);
}

void make(Maker& m, const Normalize& op) {
  m.need_inputs(1, "normalisation");
  const Shape& x = m.in[0];
  const bool batch = op.kind == Normalize::Kind::batch;
  if (op.kind == Normalize::Kind::local) return make_local(m, op);
  if (x.size() < 2 || (batch && x[1].dim != Dim::feature)) {
    throw InputError(m.place, fmt::format("cannot normalise {}", text(x)));
  }
  if (op.group < 0 || (op.group > 0 && (batch || x.back().extent % op.group != 0))) {
    throw InputError(m.place,
                     fmt::format("cannot normalise {} in groups of {}", text(x), op.group));
  }
  std::vector<int> d;
  std::vector<int> kept;
  const std::size_t scaled = batch ? 1 : x.size() - 1;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const bool reduced = batch ? i != 1 : i == x.size() - 1;
    // Local batch norm is over a rank's own samples, but over whole images however they are cut.
    const bool own = batch && !op.synchronised && x[i].dim == Dim::sample;
    const DimUse use = reduced && op.group > 0 ? DimUse::whole
                       : reduced && !own       ? DimUse::statistic
                                               : DimUse::parallel;
    d.push_back(x[i].dim == Dim::head_feature ? -1 : m.dim(x[i].dim, x[i].extent, use));
    if (!reduced) kept.push_back(d.back());
  }
  auto& input = m.input(0, d);
  input.saved_for_data = input.saved_for_weight = true;
  Shape affine{x[scaled]};
  int affine_dim = d[scaled];
  if (op.group > 0) {
    affine[0].extent = op.group;
    affine_dim = -1;
  }
  if (op.scale) m.parameter(affine, {affine_dim});
  if (op.bias) m.parameter(affine, {affine_dim});
  m.output(x, d);
  // Layer and batch norm: sum and sum of squares; RMS norm: sum of squares. Backward: sums of the
  // gradient and of gradient times normalised value.
  std::int64_t width = op.kind == Normalize::Kind::rms ? 1 : 2;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const bool reduced = batch ? i != 1 : i == x.size() - 1;
    if (!reduced && d[i] < 0) width *= x[i].extent;  // heads' features, held whole
  }
  if (op.group > 0) width *= x.back().extent / op.group;
  kept.erase(std::remove(kept.begin(), kept.end(), -1), kept.end());
  m.s.forward_statistics.push_back({Reduction::sum, kept, width});
  m.s.backward_statistics.push_back({Reduction::sum, kept, width});
}

void make(Maker& m, const Activation& op) {
  element_wise(m, 1, "activation");
  // Where a ReLU's result is positive its input was: the result is what the next operator keeps.
  (op.kind == ActivationKind::relu ? m.s.outputs[0] : m.s.inputs[0]).saved_for_data = true;
}
void make(Maker& m, const GatedActivation&) {
  element_wise(m, 2, "gated activation");
  m.s.inputs[0].saved_for_data = m.s.inputs[1].saved_for_data = true;
}
void make(Maker& m, const Add&) { element_wise(m, 2, "addition"); }
void make(Maker& m, const Multiply&) {
  element_wise(m, 2, "multiplication");
  m.s.inputs[0].saved_for_data = m.s.inputs[1].saved_for_data = true;
}
void make(Maker& m, const Dropout&) {
  element_wise(m, 1, "dropout");
  m.s.extras.push_back({m.s.outputs[0], 1});
}
void make(Maker& m, const Rotary& op) {
  element_wise(m, 1, "rotary embedding");
  const Shape& x = m.in[0];
  if (x.size() < 3 || x[1].dim != Dim::sequence || op.head_dim < 1 || op.rotated % 2 != 0 ||
      op.rotated > op.head_dim || x.back().extent % op.head_dim != 0) {
    throw InputError(m.place, fmt::format("cannot rotate {} of {} values per head in {}",
                                          op.rotated, op.head_dim, text(x)));
  }
}

void make(Maker& m, const Attention& op) {
  m.need_inputs(3, "attention");
  for (std::size_t i = 0; i < 3; ++i) m.need_rank(i, 4, "attention");
  const Shape &q = m.in[0], &k = m.in[1], &v = m.in[2];
  if (q[2].extent != k[2].extent || k[2].extent != v[2].extent || k[1].extent != v[1].extent ||
      q[3].extent != op.queries_per_head * op.qk_dim || k[3].extent != op.qk_dim ||
      v[3].extent != op.v_dim) {
    throw InputError(m.place,
                     fmt::format("attention's query {}, key {} and value {} do not fit together",
                                 text(q), text(k), text(v)));
  }
  if (op.causal && q[1].extent != k[1].extent) {
    throw InputError(m.place, "causal attention needs as many keys as queries");
  }
  const int sample = m.dim(Dim::sample, q[0].extent);
  const int query = m.dim(Dim::sequence, q[1].extent);
  const int key = m.dim(Dim::key_sequence, k[1].extent, DimUse::whole);
  const int head = m.dim(Dim::head, q[2].extent);
  m.input(0, {sample, query, head, -1});
  m.input(1, {sample, key, head, -1});
  m.input(2, {sample, key, head, -1});
  for (auto& input : m.s.inputs) input.saved_for_data = true;
  if (op.sinks) {
    for (auto& input : m.s.inputs) input.saved_for_weight = true;
    m.parameter({{Dim::head, q[2].extent}, {Dim::head_feature, op.queries_per_head}}, {head, -1});
    m.s.parameters.back().saved_for_weight = true;  // a sink's gradient depends on its own weight
  }
  auto& y = m.output({q[0], q[1], q[2], {Dim::head_feature, op.queries_per_head * op.v_dim}},
                     {sample, query, head, -1});
  const std::int64_t queries = op.queries_per_head;
  if (op.materialised) {
    m.s.extras.push_back(
        {m.operand(
             {q[0], q[2], {Dim::head_feature, queries}, q[1], {Dim::key_sequence, k[1].extent}},
             {sample, head, -1, query, key}),
         0});
  } else {
    y.saved_for_data = true;
    m.s.extras.push_back(
        {m.operand({q[0], q[2], {Dim::head_feature, queries}, q[1]}, {sample, head, -1, query}),
         4});
  }
}

void make(Maker& m, const BatchedProduct& op) {
  m.need_inputs(2, "batched product");
  const auto batch = static_cast<std::size_t>(op.batch);
  m.need_rank(0, batch + 2, "batched product");
  m.need_rank(1, batch + 2, "batched product");
  std::vector<int> a, b, y;
  Shape out;
  for (std::size_t i = 0; i < batch; ++i) {
    if (m.in[0][i].extent != m.in[1][i].extent) {
      throw InputError(m.place,
                       fmt::format("batched product of {} and {}", text(m.in[0]), text(m.in[1])));
    }
    const int d =
        m.in[0][i].dim == Dim::head_feature ? -1 : m.dim(m.in[0][i].dim, m.in[0][i].extent);
    a.push_back(d);
    out.push_back(m.in[0][i]);
  }
  b = y = a;
  if (m.in[0][batch + 1].extent != m.in[1][batch].extent) {
    throw InputError(m.place, fmt::format("batched product of {} and {}: inner extents differ",
                                          text(m.in[0]), text(m.in[1])));
  }
  const auto fresh = [&](const NamedExtent& e, DimUse use) {
    if (e.dim == Dim::head_feature || m.s.find(e.dim) >= 0) {
      if (use == DimUse::sum || e.dim == Dim::head_feature || m.s.find(Dim::key_sequence) >= 0)
        return -1;
      return m.dim(Dim::key_sequence, e.extent, use);
    }
    return m.dim(e.dim, e.extent, use);
  };
  const int rows = fresh(m.in[0][batch], DimUse::parallel);
  const int inner = fresh(m.in[0][batch + 1], DimUse::sum);
  const int columns = fresh(m.in[1][batch + 1], DimUse::parallel);
  a.push_back(rows), a.push_back(inner);
  b.push_back(inner), b.push_back(columns);
  y.push_back(rows), y.push_back(columns);
  out.push_back(m.in[0][batch]), out.push_back(m.in[1][batch + 1]);
  m.input(0, a);
  m.input(1, b);
  m.s.inputs[0].saved_for_data = m.s.inputs[1].saved_for_data = true;
  m.output(out, y);
}

void make(Maker& m, const Softmax&) {
  element_wise(m, 1, "softmax");
  m.need_rank_at_least(0, 1, "softmax");
  if (const int last = m.s.inputs[0].dims.back(); last >= 0) {
    m.s.dims[static_cast<std::size_t>(last)].use = DimUse::whole;
  }
  m.s.outputs[0].saved_for_data = true;
}

void make(Maker& m, const CrossEntropy&) {
  m.need_inputs(2, "cross entropy");
  m.need_rank_at_least(0, 1, "cross entropy");
  const Shape& logits = m.in[0];
  m.need_rank(1, logits.size() - 1, "cross entropy (labels)");
  std::vector<int> d, kept;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const bool last = i + 1 == logits.size();
    const bool named = !last || logits[i].dim == Dim::classes;
    d.push_back(m.dim(named ? logits[i].dim : Dim::vocabulary, logits[i].extent,
                      last ? DimUse::statistic : DimUse::sum));
    if (!last) kept.push_back(d.back());
  }
  m.input(0, d).saved_for_data = true;
  auto& labels = m.input(1, kept);
  labels.differentiable = false;
  labels.saved_for_data = true;
  m.output({}, {});
  // Row maximum, then sum of exponentials and the label's own logit:
  // https://arxiv.org/abs/1909.08053, section 3.
  m.s.forward_statistics.push_back({Reduction::max, kept, 1});
  m.s.forward_statistics.push_back({Reduction::sum, kept, 2});
}

void make(Maker& m, const MeanSquaredError&) {
  m.need_inputs(2, "mean squared error");
  m.need_same(0, 1);
  std::vector<int> d;
  for (const auto& [label, extent] : m.in[0]) d.push_back(m.dim(label, extent, DimUse::sum));
  m.input(0, d).saved_for_data = true;
  auto& target = m.input(1, d);
  target.differentiable = false;
  target.saved_for_data = true;
  m.output({}, {});
}

bool is_trivial(const Window& w) {
  return w.kernel == 1 && w.stride == 1 && w.pad_before == 0 && w.pad_after == 0;
}

/// Adds the output's height and width; returns {height, width}.
std::array<int, 2> plane(Maker& m, const Window& height, const Window& width, Shape& y) {
  const Shape& x = m.in[0];
  const std::int64_t h = window_outputs(height, x[2].extent);
  const std::int64_t w = window_outputs(width, x[3].extent);
  if (h < 1 || w < 1) {
    throw InputError(m.place, fmt::format("a window of {} x {} does not fit into {}", height.kernel,
                                          width.kernel, text(x)));
  }
  y.push_back({Dim::height, h});
  y.push_back({Dim::width, w});
  return {m.dim(Dim::height, h, is_trivial(height) ? DimUse::parallel : DimUse::window),
          m.dim(Dim::width, w, is_trivial(width) ? DimUse::parallel : DimUse::window)};
}

void make(Maker& m, const Convolution& op) {
  m.need_inputs(1, "convolution");
  m.need_rank(0, 4, "convolution");
  const Shape& x = m.in[0];
  const std::int64_t in = x[1].extent;
  if (op.groups < 1 || in % op.groups != 0 || op.out % op.groups != 0) {
    throw InputError(m.place, fmt::format("{} groups do not divide {} input and {} output channels",
                                          op.groups, in, op.out));
  }
  const int sample = m.dim(Dim::sample, x[0].extent);
  int feature = -1, reduction = -1;
  if (op.groups == 1) {
    feature = m.dim(Dim::feature, op.out);
    reduction = m.dim(Dim::reduction, in, DimUse::sum);
  } else {
    feature = m.dim(Dim::feature, op.out, DimUse::whole);
  }
  Shape y{x[0], {Dim::feature, op.out}};
  const auto hw = plane(m, op.height, op.width, y);
  auto& input = m.input(0, {sample, reduction, hw[0], hw[1]});
  input.windows[2] = op.height;
  input.windows[3] = op.width;
  input.saved_for_weight = true;
  m.parameter({{Dim::feature, op.out},
               {Dim::reduction, in / op.groups},
               {Dim::height, op.height.kernel},
               {Dim::width, op.width.kernel}},
              {feature, reduction, -1, -1});
  if (op.bias) m.parameter({{Dim::feature, op.out}}, {feature});
  m.output(y, {sample, feature, hw[0], hw[1]});
}

void make(Maker& m, const Pool& op) {
  m.need_inputs(1, "pooling");
  m.need_rank(0, 4, "pooling");
  const Shape& x = m.in[0];
  const int sample = m.dim(Dim::sample, x[0].extent);
  const int feature = m.dim(Dim::feature, x[1].extent);
  Shape y{x[0], x[1]};
  const auto hw = plane(m, op.height, op.width, y);
  auto& input = m.input(0, {sample, feature, hw[0], hw[1]});
  input.windows[2] = op.height;
  input.windows[3] = op.width;
  input.saved_for_data = op.maximum;
  m.output(y, {sample, feature, hw[0], hw[1]});
  if (op.maximum) m.s.extras.push_back({m.s.outputs[0], 8});  // indices, int64 in PyTorch
}

void make(Maker& m, const GlobalAveragePool&) {
  m.need_inputs(1, "global average pooling");
  m.need_rank(0, 4, "global average pooling");
  const Shape& x = m.in[0];
  const int sample = m.dim(Dim::sample, x[0].extent), feature = m.dim(Dim::feature, x[1].extent);
  const int h = m.dim(Dim::height, x[2].extent, DimUse::sum);
  const int w = m.dim(Dim::width, x[3].extent, DimUse::sum);
  m.input(0, {sample, feature, h, w});
  m.output({x[0], x[1]}, {sample, feature});
}

void make(Maker& m, const ScaleFeatures&) {
  m.need_inputs(2, "a scale of features");
  m.need_rank(0, 4, "a scale of features");
  m.need_rank(1, 2, "a scale of features");
  const Shape &x = m.in[0], &gate = m.in[1];
  if (x[0].extent != gate[0].extent || x[1].extent != gate[1].extent)
    throw InputError(m.place,
                     fmt::format("{} has no feature for each of {}'s", text(gate), text(x)));
  const auto d = m.dims_of(x);
  m.input(0, d).saved_for_data = true;
  m.input(1, {d[0], d[1]}).saved_for_data = true;
  m.output(x, d);
}

void make(Maker& m, const ToSequence&) {
  m.need_inputs(1, "to sequence");
  m.need_rank(0, 4, "to sequence");
  const Shape& x = m.in[0];
  const int sample = m.dim(Dim::sample, x[0].extent), feature = m.dim(Dim::feature, x[1].extent);
  m.input(0, {sample, feature, -1, -1});
  m.output({x[0], {Dim::sequence, x[2].extent * x[3].extent}, x[1]}, {sample, -1, feature});
}

void make(Maker& m, const PrependToken&) {
  m.need_inputs(1, "prepend token");
  m.need_rank(0, 3, "prepend token");
  const Shape& x = m.in[0];
  const int sample = m.dim(Dim::sample, x[0].extent), feature = m.dim(x[2].dim, x[2].extent);
  m.input(0, {sample, -1, feature});
  m.parameter({x[2]}, {feature});
  m.output({x[0], {Dim::sequence, x[1].extent + 1}, x[2]}, {sample, -1, feature});
}

void make(Maker& m, const SelectToken& op) {
  m.need_inputs(1, "select token");
  m.need_rank(0, 3, "select token");
  const Shape& x = m.in[0];
  if (op.index < 0 || op.index >= x[1].extent) {
    throw InputError(m.place, fmt::format("token {} is not among {}", op.index, x[1].extent));
  }
  const int sample = m.dim(Dim::sample, x[0].extent);
  const int sequence = m.dim(Dim::sequence, x[1].extent, DimUse::sum);
  const int feature = m.dim(x[2].dim, x[2].extent);
  m.input(0, {sample, sequence, feature});
  m.output({x[0], x[2]}, {sample, feature});
}

void make(Maker& m, const Concat& op) {
  if (m.in.empty()) throw InputError(m.place, "concatenation needs inputs");
  m.need_rank_at_least(0, 2, "concatenation");
  const std::size_t axis = op.last ? m.in[0].size() - 1 : 1;
  Shape y = m.in[0];
  for (std::size_t i = 1; i < m.in.size(); ++i) {
    m.need_rank(i, y.size(), "concatenation");
    for (std::size_t d = 0; d < y.size(); ++d) {
      if (d != axis && m.in[i][d].extent != y[d].extent) {
        throw InputError(m.place,
                         fmt::format("cannot join {} and {}", text(m.in[0]), text(m.in[i])));
      }
    }
    y[axis].extent += m.in[i][axis].extent;
  }
  std::vector<int> d;
  for (std::size_t i = 0; i < y.size(); ++i) {
    d.push_back(i == axis || y[i].dim == Dim::head_feature ? -1 : m.dim(y[i].dim, y[i].extent));
  }
  for (std::size_t i = 0; i < m.in.size(); ++i) m.input(i, d);
  m.output(y, d);
}

void make(Maker& m, const AppendToHeads&) {
  m.need_inputs(2, "append to heads");
  m.need_rank(0, 4, "append to heads");
  m.need_rank(1, 3, "append to heads");
  const Shape &a = m.in[0], &b = m.in[1];
  const int sample = m.dim(Dim::sample, a[0].extent), seq = m.dim(Dim::sequence, a[1].extent);
  const int head = m.dim(Dim::head, a[2].extent);
  m.input(0, {sample, seq, head, -1});
  m.input(1, {sample, seq, -1});
  m.output({a[0], a[1], a[2], {Dim::head_feature, a[3].extent + b[2].extent}},
           {sample, seq, head, -1});
}

void make(Maker& m, const Router& op) {
  m.need_inputs(1, "router");
  m.need_rank(0, 3, "router");
  const Shape& x = m.in[0];
  if (op.top_k < 1 || op.top_k > x[2].extent) {
    throw InputError(m.place, fmt::format("top {} of {} experts", op.top_k, x[2].extent));
  }
  if (op.groups != 1) {
    const std::int64_t each = op.groups > 0 ? x[2].extent / op.groups : 0;
    if (op.groups < 1 || op.groups > 64 || each * op.groups != x[2].extent || op.top_groups < 1 ||
        op.top_groups > op.groups || op.group_best < 1 || op.group_best > each ||
        op.top_groups * each < op.top_k)
      throw InputError(
          m.place, fmt::format("top {} of {} experts in {} of {} groups by the {} best of each: "
                               "at most 64 equal groups, whose chosen ones have enough",
                               op.top_k, x[2].extent, op.top_groups, op.groups, op.group_best));
  }
  const int sample = m.dim(x[0].dim, x[0].extent), seq = m.dim(x[1].dim, x[1].extent);
  const int expert = m.dim(Dim::expert, x[2].extent, DimUse::whole);
  m.input(0, {sample, seq, expert}).saved_for_data = true;
  m.output(x, {sample, seq, expert}).saved_for_data = true;
}

void make(Maker& m, const Dispatch& op) {
  m.need_inputs(2, "dispatch");
  m.need_rank(0, 3, "dispatch");
  m.need_rank(1, 3, "dispatch (gates)");
  const Shape& x = m.in[0];
  const int sample = m.dim(x[0].dim, x[0].extent), seq = m.dim(x[1].dim, x[1].extent);
  const int expert = m.dim(Dim::expert, op.experts);
  const int feature = m.dim(x[2].dim, x[2].extent);
  m.input(0, {sample, seq, feature});
  auto& gates = m.input(1, {sample, seq, -1});
  gates.differentiable = false;
  gates.saved_for_data = true;
  m.output({x[0], x[1], {Dim::expert, op.top_k}, x[2]}, {sample, seq, expert, feature}).routed =
      true;
}

void make(Maker& m, const GroupedProduct& op) {
  m.need_inputs(1, "grouped product");
  m.need_rank(0, 4, "grouped product");
  const Shape& x = m.in[0];
  const int sample = m.dim(x[0].dim, x[0].extent), seq = m.dim(x[1].dim, x[1].extent);
  const int expert = m.dim(Dim::expert, op.experts);
  const int out = m.dim(op.out.dim, op.out.extent);
  const Dim label = x[3].dim == Dim::feature || x[3].dim == op.out.dim ? Dim::reduction : x[3].dim;
  const int in = m.dim(label, x[3].extent, DimUse::sum);
  auto& rows = m.input(0, {sample, seq, expert, in});
  rows.saved_for_weight = true;
  rows.routed = true;
  m.parameter({{Dim::expert, op.experts}, op.out, x[3]}, {expert, out, in});
  if (op.bias) m.parameter({{Dim::expert, op.experts}, op.out}, {expert, out});
  m.output({x[0], x[1], x[2], op.out}, {sample, seq, expert, out}).routed = true;
}

void make(Maker& m, const Combine& op) {
  m.need_inputs(2, "combine");
  m.need_rank(0, 4, "combine");
  m.need_rank(1, 3, "combine (gates)");
  const Shape& x = m.in[0];
  const int sample = m.dim(x[0].dim, x[0].extent), seq = m.dim(x[1].dim, x[1].extent);
  const int expert = m.dim(Dim::expert, op.experts, DimUse::sum);
  const int feature = m.dim(x[3].dim, x[3].extent);
  auto& rows = m.input(0, {sample, seq, expert, feature});
  rows.routed = true;
  rows.saved_for_data = true;
  m.input(1, {sample, seq, -1}).saved_for_data = true;
  m.output({x[0], x[1], x[3]}, {sample, seq, feature});
}

/// Groups of heads that stay whole along the sequence.
std::array<int, 3> groups(Maker& m, const Shape& x, const char* what) {
  m.need_rank(0, 4, what);
  const int sample = m.dim(x[0].dim, x[0].extent);
  const int sequence = m.dim(Dim::sequence, x[1].extent, DimUse::whole);
  return {sample, sequence, m.dim(Dim::head, x[2].extent)};
}

/// What a backward pass by weight reads of its own parameters.
void needs_parameters(Maker& m) {
  for (auto& p : m.s.parameters) p.saved_for_weight = true;
}

void make(Maker& m, const CausalConvolution& op) {
  m.need_inputs(1, "causal convolution");
  const Shape& x = m.in[0];
  if (op.kernel < 1) {
    throw InputError(m.place, fmt::format("a causal convolution over {} tokens", op.kernel));
  }
  const auto [sample, sequence, head] = groups(m, x, "causal convolution");
  auto& input = m.input(0, {sample, sequence, head, -1});
  input.saved_for_data = input.saved_for_weight = true;
  m.parameter({x[2], x[3], {Dim::head_feature, op.kernel}}, {head, -1, -1});
  if (op.bias) m.parameter({x[2], x[3]}, {head, -1});
  needs_parameters(m);
  m.output(x, {sample, sequence, head, -1});
}

void make(Maker& m, const StateSpace& op) {
  m.need_inputs(2, "state space model");
  m.need_rank(1, 4, "state space model (step)");
  const Shape &x = m.in[0], &step = m.in[1];
  const auto [sample, sequence, head] = groups(m, x, "state space model");
  const std::int64_t width = op.heads_per_group * op.head_dim;
  if (op.heads_per_group < 1 || op.head_dim < 1 || op.state < 1 || op.chunk < 1 ||
      x[3].extent != width + 2 * op.state || step[0].extent != x[0].extent ||
      step[1].extent != x[1].extent || step[2].extent != x[2].extent ||
      step[3].extent != op.heads_per_group) {
    throw InputError(m.place,
                     fmt::format("{} heads of {} with states of {} in chunks of {} do not fit {} "
                                 "and its steps {}",
                                 op.heads_per_group, op.head_dim, op.state, op.chunk, text(x),
                                 text(step)));
  }
  for (std::size_t i = 0; i < 2; ++i) {
    auto& input = m.input(i, {sample, sequence, head, -1});
    input.saved_for_data = input.saved_for_weight = true;
  }
  for (int i = 0; i < 3; ++i)
    m.parameter({x[2], {Dim::head_feature, op.heads_per_group}}, {head, -1});
  needs_parameters(m);
  m.output({x[0], x[1], x[2], {Dim::head_feature, width}}, {sample, sequence, head, -1});
}

void make(Maker& m, const GatedNorm&) {
  m.need_rank(0, 4, "gated norm");
  element_wise(m, 2, "gated norm");
  const Shape& x = m.in[0];
  const auto d = m.s.inputs[0].dims;
  for (auto& input : m.s.inputs) input.saved_for_data = input.saved_for_weight = true;
  m.parameter({x[2], x[3]}, {d[2], d[3]});
  // The inverse deviation of each group.
  m.s.extras.push_back({m.operand({x[0], x[1], x[2]}, {d[0], d[1], d[2]}), 4});
}

double product_of(const Signature& s, const std::vector<std::int64_t>& extents, const Operand& o) {
  double n = 1;
  for (std::size_t i = 0; i < o.dims.size(); ++i) {
    const int d = o.dims[i];
    // A routed tensor's expert dimension counts choices per token; a cut shares them evenly.
    if (d >= 0 && o.routed && o.shape[i].dim == Dim::expert) {
      const auto at = static_cast<std::size_t>(d);
      n *= static_cast<double>(o.shape[i].extent) * static_cast<double>(extents[at]) /
           static_cast<double>(s.dims[at].extent);
    } else {
      n *= static_cast<double>(d >= 0 ? extents[static_cast<std::size_t>(d)] : o.shape[i].extent);
    }
  }
  return n;
}

}  // namespace

std::string_view name(Dim dim) { return kDimNames[static_cast<std::size_t>(dim)]; }

Dim parse_dim(std::string_view word, const std::string& place) {
  for (int i = 0; i < kDimCount; ++i) {
    if (kDimNames[static_cast<std::size_t>(i)] == word) return static_cast<Dim>(i);
  }
  const std::vector<std::string> known(kDimNames.begin(), kDimNames.end());
  throw InputError(place, fmt::format("'{}' is no iteration dimension{}; there are {}", word,
                                      did_you_mean(word, known), fmt::join(known, ", ")));
}

std::int64_t elements(const Shape& shape) {
  std::int64_t n = 1;
  for (const auto& d : shape) n *= d.extent;
  return n;
}

std::string text(const Shape& shape) {
  std::string out = "[";
  for (const auto& d : shape) {
    out += fmt::format("{}{} {}", out.size() > 1 ? ", " : "", name(d.dim), d.extent);
  }
  return out + "]";
}

std::int64_t window_outputs(const Window& w, std::int64_t extent) {
  const std::int64_t reach = w.dilation * (w.kernel - 1) + 1;
  const std::int64_t room = extent + w.pad_before + w.pad_after - reach;
  return room < 0 ? 0 : room / w.stride + 1;
}

int Signature::find(Dim dim) const {
  for (std::size_t i = 0; i < dims.size(); ++i) {
    if (dims[i].dim == dim) return static_cast<int>(i);
  }
  return -1;
}

Signature signature(const Operation& op, const std::vector<Shape>& inputs,
                    const std::string& place) {
  Maker m{inputs, place};
  std::visit([&](const auto& o) { make(m, o); }, op);
  return std::move(m.s);
}

std::string_view kind_name(const Operation& op) {
  constexpr std::array<std::string_view, 32> names{"linear",
                                                   "add_bias",
                                                   "embedding",
                                                   "position_embedding",
                                                   "normalize",
                                                   "activation",
                                                   "gated_activation",
                                                   "add",
                                                   "multiply",
                                                   "dropout",
                                                   "rotary",
                                                   "attention",
                                                   "batched_product",
                                                   "softmax",
                                                   "cross_entropy",
                                                   "mean_squared_error",
                                                   "convolution",
                                                   "pool",
                                                   "global_average_pool",
                                                   "to_sequence",
                                                   "prepend_token",
                                                   "select_token",
                                                   "concat",
                                                   "append_to_heads",
                                                   "router",
                                                   "dispatch",
                                                   "grouped_product",
                                                   "combine",
                                                   "causal_convolution",
                                                   "state_space",
                                                   "gated_norm",
                                                   "scale_features"};
  static_assert(names.size() == std::variant_size_v<Operation>);
  return names[op.index()];
}

Chunks chunks_of(const StateSpace& op, std::int64_t tokens) {
  const std::int64_t chunk = std::min(op.chunk, tokens);
  return {chunk, ceil_div(tokens, std::max<std::int64_t>(chunk, 1))};
}

bool is_product(const Operation& op) {
  return std::holds_alternative<Linear>(op) || std::holds_alternative<Attention>(op) ||
         std::holds_alternative<BatchedProduct>(op) || std::holds_alternative<Convolution>(op) ||
         std::holds_alternative<GroupedProduct>(op) || std::holds_alternative<StateSpace>(op);
}

Flops flops(const Operation& op, const Signature& s, const std::vector<std::int64_t>& extents,
            Pass pass, double attended) {
  PARTITA_ASSERT(extents.size() == s.dims.size(),
                 fmt::format("{} extents for {} dimensions", extents.size(), s.dims.size()));
  const bool forward = pass == Pass::forward, weight = pass == Pass::backward_weight;
  const double in = s.inputs.empty() ? 0 : product_of(s, extents, s.inputs[0]);
  const double out = s.outputs.empty() ? 0 : product_of(s, extents, s.outputs[0]);
  // Element-wise work per element of the larger side; only its order of magnitude matters, since
  // bytes bound these operators.
  const auto per_element = [&](double ahead, double back_data, double back_weight) {
    return Flops{(forward ? ahead : weight ? back_weight : back_data) * std::max(in, out)};
  };
  return std::visit(
      Overload{
          [&](const Linear& o) {
            double summed = 1;
            const Operand& w = s.parameters[0];
            for (std::size_t i = o.out.size(); i < w.dims.size(); ++i) {
              summed *=
                  static_cast<double>(w.dims[i] >= 0 ? extents[static_cast<std::size_t>(w.dims[i])]
                                                     : w.shape[i].extent);
            }
            return Flops{2 * out * summed};
          },
          [&](const GroupedProduct&) {
            const int d = s.parameters[0].dims[2];
            return Flops{2 * out * static_cast<double>(extents[static_cast<std::size_t>(d)])};
          },
          [&](const Convolution& o) {
            const Operand& w = s.parameters[0];
            const double channels = static_cast<double>(
                w.dims[1] >= 0 ? extents[static_cast<std::size_t>(w.dims[1])] : w.shape[1].extent);
            return Flops{2 * out * channels *
                         static_cast<double>(o.height.kernel * o.width.kernel)};
          },
          [&](const Attention& o) {
            if (weight) return Flops{0};
            const double pairs = static_cast<double>(extents[0]) * static_cast<double>(extents[1]) *
                                 static_cast<double>(extents[2]) * static_cast<double>(extents[3]) *
                                 static_cast<double>(o.queries_per_head) * attended;
            const auto d = static_cast<double>(o.qk_dim), v = static_cast<double>(o.v_dim);
            // Forward q·k and p·v; backward dp, dv, dq, dk. That flash attention repeats q·k is the
            // kernel's affair and priced there.
            return Flops{(forward ? 2 : 4) * pairs * (d + v)};
          },
          [&](const BatchedProduct&) {
            if (weight) return Flops{0};
            const auto& a = s.inputs[0];
            const int d = a.dims.back();
            const double inner = static_cast<double>(d >= 0 ? extents[static_cast<std::size_t>(d)]
                                                            : a.shape.back().extent);
            return Flops{(forward ? 2 : 4) * out * inner};
          },
          [&](const AddBias&) { return per_element(1, 0, 1); },
          [&](const Embedding&) { return per_element(0, 0, 1); },
          [&](const PositionEmbedding&) { return per_element(1, 0, 1); },
          [&](const Normalize& o) {
            if (o.kind != Normalize::Kind::local) return per_element(5, 8, 3);
            const auto neighbours = 2.0 * static_cast<double>(o.window);
            return per_element(neighbours + 4, neighbours + 8, 0);
          },
          [&](const Activation& o) {
            const bool cheap =
                o.kind == ActivationKind::relu || o.kind == ActivationKind::squared_relu;
            return cheap ? per_element(1, 2, 0) : per_element(8, 13, 0);
          },
          [&](const GatedActivation&) { return per_element(7, 12, 0); },
          [&](const Add&) { return per_element(1, 0, 0); },
          [&](const Multiply&) { return per_element(1, 2, 0); },
          [&](const Dropout&) { return per_element(2, 1, 0); },
          [&](const Rotary&) { return per_element(3, 3, 0); },
          [&](const Softmax&) { return per_element(5, 4, 0); },
          [&](const CrossEntropy&) { return per_element(5, 2, 0); },
          [&](const MeanSquaredError&) { return per_element(3, 2, 0); },
          [&](const Pool& o) {
            const auto k = static_cast<double>(o.height.kernel * o.width.kernel);
            return Flops{(weight ? 0 : k) * out};
          },
          [&](const GlobalAveragePool&) { return per_element(1, 1, 0); },
          [&](const ToSequence&) { return per_element(0, 0, 0); },
          [&](const PrependToken&) { return per_element(0, 0, 0); },
          [&](const SelectToken&) { return per_element(0, 0, 0); },
          [&](const Concat&) { return per_element(0, 0, 0); },
          [&](const AppendToHeads&) { return per_element(0, 1, 0); },
          [&](const Router&) { return per_element(5, 5, 0); },
          [&](const Dispatch&) { return per_element(0, 1, 0); },
          [&](const Combine&) { return per_element(2, 4, 0); },
          [&](const CausalConvolution& o) {
            // The sums; then SiLU, whose slope the backward pass finds from the sums made again.
            const auto sums = 2 * static_cast<double>(o.kernel);
            return per_element(sums + 8, 2 * sums + 13, sums + 13);
          },
          [&](const StateSpace& o) {
            if (weight) return Flops{0};
            const auto batch = static_cast<double>(extents[0]),
                       groups = static_cast<double>(extents[2]),
                       width = static_cast<double>(o.heads_per_group * o.head_dim),
                       state = static_cast<double>(o.state),
                       tokens = static_cast<double>(extents[1]),
                       chunk = static_cast<double>(chunks_of(o, s.dims[1].extent).tokens);
            // States of chunks and their part of the outputs; B·C inside a chunk, and its product
            // with x: the whole square. Each has two gradients.
            const double each = 4 * width * state + 2 * chunk * (state + width);
            return Flops{(forward ? 1 : 2) * batch * tokens * groups * each};
          },
          [&](const GatedNorm&) { return per_element(12, 20, 3); },
          // Backward x's gradient; the gate's product and its sum.
          [&](const ScaleFeatures&) { return per_element(1, 3, 0); },
      },
      op);
}

}  // namespace partita
