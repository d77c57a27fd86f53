#include "runtime/reference/kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>

#include "base/error.h"

namespace partita::reference {
namespace {

using Indices = std::vector<std::int64_t>;
using Positions = std::vector<std::size_t>;
using Pieces = std::vector<Piece>;
constexpr std::size_t kAbsent = static_cast<std::size_t>(-1);
constexpr double kPi = 3.14159265358979323846;

std::size_t unsigned_of(std::int64_t i) { return static_cast<std::size_t>(i); }

Indices all(std::int64_t extent) {
  Indices list(unsigned_of(extent));
  std::iota(list.begin(), list.end(), 0);
  return list;
}

/// Where a global index lies in a piece's ascending list, or kAbsent.
class Lookup {
 public:
  explicit Lookup(const Indices& held)
      : held_(&held),
        dense_(!held.empty() &&
               held.back() - held.front() + 1 == static_cast<std::int64_t>(held.size())) {}
  std::size_t operator()(std::int64_t global) const {
    if (held_->empty() || global < held_->front() || global > held_->back()) return kAbsent;
    if (dense_) return unsigned_of(global - held_->front());
    const auto it = std::lower_bound(held_->begin(), held_->end(), global);
    return *it == global ? unsigned_of(it - held_->begin()) : kAbsent;
  }
  /// The same where absence would be a bug of the caller.
  std::size_t held(std::int64_t global) const {
    const std::size_t at = (*this)(global);
    PARTITA_ASSERT(at != kAbsent,
                   fmt::format("index {} is not among the {} held", global, held_->size()));
    return at;
  }

 private:
  const Indices* held_;
  bool dense_;
};

/// Elements of dimensions [first, last) of a piece's index lists.
std::size_t count(const std::vector<Indices>& index, std::size_t first, std::size_t last) {
  std::size_t n = 1;
  for (std::size_t d = first; d < last; ++d) n *= index[d].size();
  return n;
}

/// f(position, local position per dimension) for every element, row-major.
template <class F>
void for_each(const std::vector<Indices>& index, F f) {
  Positions local(index.size(), 0);
  const std::size_t n = count(index, 0, index.size());
  for (std::size_t position = 0; position < n; ++position) {
    f(position, local);
    for (std::size_t d = index.size(); d-- > 0;) {
      if (++local[d] < index[d].size()) break;
      local[d] = 0;
    }
  }
}

std::vector<Indices> indices_of(const Context& c, const Operand& operand) {
  std::vector<Indices> index;
  for (std::size_t d = 0; d < operand.shape.size(); ++d) index.push_back(touched(c, operand, d));
  return index;
}

/// Zeros with the indices and rows of `p`.
Piece like(const Piece& p) {
  Piece z = p;
  std::fill(z.values.begin(), z.values.end(), 0.0);
  return z;
}

/// A routed piece of zeros with the rows of `p` and other features.
Piece with_rows_of(const Piece& p, Indices features) {
  Piece z;
  z.index = p.index;
  z.rows = p.rows;
  z.routed = true;
  z.values.assign(z.rows.size() * features.size(), 0);
  z.index[3] = std::move(features);
  return z;
}

/// An operand that a pass reads, checked to hold just what the local problem touches.
const Piece& checked(const Context& c, const std::vector<const Piece*>& pieces,
                     const std::vector<Operand>& operands, std::size_t i) {
  PARTITA_ASSERT(i < pieces.size() && pieces[i] != nullptr,
                 fmt::format("{} needs operand {}", kind_name(*c.operation), i));
  const Piece& p = *pieces[i];
  const Operand& operand = operands[i];
  PARTITA_ASSERT(p.index.size() == operand.shape.size(),
                 fmt::format("{}: operand {} has {} dimensions, not {}", kind_name(*c.operation), i,
                             p.index.size(), operand.shape.size()));
  for (std::size_t d = p.routed ? 3 : 0; d < p.index.size(); ++d) {
    // A rank that works on some queries may be given any keys.
    if (operand.dims[d] >= 0 && operand.shape.size() == 4 &&
        std::holds_alternative<Attention>(*c.operation) && i > 0 && d == 1) {
      continue;
    }
    PARTITA_ASSERT(p.index[d] == touched(c, operand, d),
                   fmt::format("{}: operand {} holds other indices of dimension {} than the local "
                               "problem touches",
                               kind_name(*c.operation), i, d));
  }
  const std::size_t n =
      p.routed ? p.rows.size() * p.index[3].size() : count(p.index, 0, p.index.size());
  PARTITA_ASSERT(p.values.size() == n, fmt::format("{}: operand {} has {} values for {} elements",
                                                   kind_name(*c.operation), i, p.values.size(), n));
  return p;
}

const Piece& input(const Context& c, const Operands& o, std::size_t i = 0) {
  return checked(c, o.inputs, c.signature->inputs, i);
}
const Piece& parameter(const Context& c, const Operands& o, std::size_t i = 0) {
  return checked(c, o.parameters, c.signature->parameters, i);
}
const Piece& gradient(const Context& c, const Operands& o) {
  return checked(c, o.output_gradients, c.signature->outputs, 0);
}
const Piece& saved_output(const Context& c, const Operands& o) {
  return checked(c, o.outputs, c.signature->outputs, 0);
}
const Piece& statistic(const std::vector<const Piece*>& list, std::size_t k) {
  PARTITA_ASSERT(k < list.size() && list[k] != nullptr, fmt::format("statistic {} is missing", k));
  return *list[k];
}

Piece output_zeros(const Context& c) { return zeros(indices_of(c, c.signature->outputs[0])); }
Piece input_zeros(const Context& c, std::size_t i = 0) {
  return zeros(indices_of(c, c.signature->inputs[i]));
}
Piece parameter_zeros(const Context& c, std::size_t i = 0) {
  return zeros(indices_of(c, c.signature->parameters[i]));
}
Piece statistic_zeros(const Context& c, const Statistic& s) {
  std::vector<Indices> index;
  for (const int d : s.dims) index.push_back(c.indices[static_cast<std::size_t>(d)]);
  index.push_back(all(s.width));
  return zeros(std::move(index));
}

template <class F>
Piece map(const Piece& x, F f) {
  Piece y = x;
  for (double& v : y.values) v = f(v);
  return y;
}
/// f of corresponding elements of two pieces with the same indices.
template <class F>
Piece zip(const Piece& a, const Piece& b, F f) {
  PARTITA_ASSERT(a.values.size() == b.values.size() && a.rows == b.rows,
                 fmt::format("{} and {} elements", a.values.size(), b.values.size()));
  Piece y = a;
  for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] = f(a.values[i], b.values[i]);
  return y;
}

/// A matrix in memory: element (i, j) at data[i · row + j · column].
struct Matrix {
  const double* data;
  std::size_t row, column;
};
/// y[m, n] += a[m, k] · b[k, n], y row-major.
void add_product(std::size_t m, std::size_t n, std::size_t k, Matrix a, Matrix b, double* y) {
  for (std::size_t i = 0; i < m; ++i) {
    for (std::size_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::size_t l = 0; l < k; ++l) {
        sum += a.data[i * a.row + l * a.column] * b.data[l * b.row + j * b.column];
      }
      y[i * n + j] += sum;
    }
  }
}

/// bias[j] += sum over rows of y[row, j].
void add_columns(const Piece& y, Piece& bias) {
  const std::size_t n = bias.values.size();
  for (std::size_t i = 0; i < y.values.size(); ++i) bias.values[i % n] += y.values[i];
}

// ---------------------------------------------------------------------------------------- linear

struct LinearExtents {
  std::size_t batch, in, out;
};
LinearExtents extents_of(const Linear& op, const Context& c) {
  const auto x = indices_of(c, c.signature->inputs[0]), y = indices_of(c, c.signature->outputs[0]);
  const std::size_t batch = x.size() - static_cast<std::size_t>(op.contracted);
  return {count(x, 0, batch), count(x, batch, x.size()), count(y, batch, y.size())};
}

Pieces forward_of(const Linear& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &w = parameter(c, o);
  const auto [batch, in, out] = extents_of(op, c);
  Piece y = output_zeros(c);
  add_product(batch, out, in, {x.values.data(), in, 1}, {w.values.data(), 1, in}, y.values.data());
  if (op.bias && c.adds_bias) {
    const Piece& b = parameter(c, o, 1);
    for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] += b.values[i % out];
  }
  return {std::move(y)};
}
Pieces data_of(const Linear& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &w = parameter(c, o);
  const auto [batch, in, out] = extents_of(op, c);
  Piece dx = input_zeros(c);
  add_product(batch, in, out, {dy.values.data(), out, 1}, {w.values.data(), in, 1},
              dx.values.data());
  return {std::move(dx)};
}
Pieces weight_of(const Linear& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &x = input(c, o);
  const auto [batch, in, out] = extents_of(op, c);
  Pieces all_of{parameter_zeros(c)};
  add_product(out, in, batch, {dy.values.data(), 1, out}, {x.values.data(), in, 1},
              all_of[0].values.data());
  if (op.bias) {
    all_of.push_back(parameter_zeros(c, 1));
    if (c.adds_bias) add_columns(dy, all_of[1]);
  }
  return all_of;
}

Pieces forward_of(const AddBias&, const Context& c, const Operands& o) {
  Piece y = input(c, o);
  const Piece& b = parameter(c, o);
  for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] += b.values[i % b.values.size()];
  return {std::move(y)};
}
Pieces data_of(const AddBias&, const Context& c, const Operands& o) { return {gradient(c, o)}; }
Pieces weight_of(const AddBias&, const Context& c, const Operands& o) {
  Piece db = parameter_zeros(c);
  add_columns(gradient(c, o), db);
  return {std::move(db)};
}

// ------------------------------------------------------------------------------------ embeddings

/// f(table position, output position) for every element whose table row is held.
template <class F>
void for_each_embedded(const Piece& ids, const std::vector<Indices>& table, F f) {
  const Lookup row(table[0]);
  const std::size_t features = table[1].size();
  for (std::size_t i = 0; i < ids.values.size(); ++i) {
    const std::size_t r = row(std::llround(ids.values[i]));
    if (r == kAbsent) continue;
    for (std::size_t j = 0; j < features; ++j) f(r * features + j, i * features + j);
  }
}

Pieces forward_of(const Embedding&, const Context& c, const Operands& o) {
  const Piece& table = parameter(c, o);
  Piece y = output_zeros(c);
  for_each_embedded(input(c, o), table.index,
                    [&](std::size_t t, std::size_t i) { y.values[i] = table.values[t]; });
  return {std::move(y)};
}
Pieces data_of(const Embedding&, const Context&, const Operands&) { return Pieces(1); }
Pieces weight_of(const Embedding&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dt = parameter_zeros(c);
  for_each_embedded(input(c, o), dt.index,
                    [&](std::size_t t, std::size_t i) { dt.values[t] += dy.values[i]; });
  return {std::move(dt)};
}

/// f(element of [sample, sequence, feature], element of the table).
template <class F>
void for_each_placed(const std::vector<Indices>& x, const std::vector<Indices>& table, F f) {
  const Lookup row(table[0]);
  for_each(x, [&](std::size_t i, const Positions& at) {
    f(i, row.held(x[1][at[1]]) * x[2].size() + at[2]);
  });
}

Pieces forward_of(const PositionEmbedding&, const Context& c, const Operands& o) {
  Piece y = input(c, o);
  const Piece& table = parameter(c, o);
  for_each_placed(y.index, table.index,
                  [&](std::size_t i, std::size_t t) { y.values[i] += table.values[t]; });
  return {std::move(y)};
}
Pieces data_of(const PositionEmbedding&, const Context& c, const Operands& o) {
  return {gradient(c, o)};
}
Pieces weight_of(const PositionEmbedding&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dt = parameter_zeros(c);
  for_each_placed(dy.index, dt.index,
                  [&](std::size_t i, std::size_t t) { dt.values[t] += dy.values[i]; });
  return {std::move(dt)};
}

// --------------------------------------------------------------------------------- normalisation

/// Which statistic and which parameter every element of x belongs to.
struct Groups {
  Positions group, affine;
  double members = 1;     ///< elements that share a statistic, over all ranks that reduce it
  std::size_t width = 1;  ///< values per group
};

Groups groups_of(const Normalize& op, const Context& c) {
  const Signature& s = *c.signature;
  const Operand& x = s.inputs[0];
  const bool batch = op.kind == Normalize::Kind::batch;
  const std::size_t scaled = batch ? 1 : x.shape.size() - 1;
  const auto reduced = [&](std::size_t d) { return (d != scaled) == batch; };
  const auto index = indices_of(c, x);
  Groups g;
  g.width = op.kind == Normalize::Kind::rms ? 1 : 2;
  std::size_t hidden_extent = 1, segments = 1;
  for (std::size_t d = 0; d < index.size(); ++d) {
    if (!reduced(d)) {
      if (x.dims[d] < 0) hidden_extent *= index[d].size();
      continue;
    }
    const bool own = x.dims[d] >= 0 && s.dims[unsigned_of(x.dims[d])].use == DimUse::parallel;
    g.members *=
        own ? static_cast<double>(index[d].size()) : static_cast<double>(x.shape[d].extent);
  }
  if (op.group > 0) {
    segments = unsigned_of(x.shape[scaled].extent / op.group);
    g.members = static_cast<double>(op.group);
  }
  for_each(index, [&](std::size_t, const Positions& at) {
    std::size_t kept = 0, hidden = 0, segment = 0;
    for (std::size_t d = 0; d < at.size(); ++d) {
      if (reduced(d)) continue;
      auto& into = x.dims[d] < 0 ? hidden : kept;
      into = into * index[d].size() + at[d];
    }
    const std::int64_t feature = index[scaled][at[scaled]];
    if (op.group > 0) segment = unsigned_of(feature / op.group);
    g.group.push_back((kept * hidden_extent + hidden) * segments + segment);
    g.affine.push_back(op.group > 0 ? unsigned_of(feature % op.group) : at[scaled]);
  });
  return g;
}

struct Moments {
  std::vector<double> mean, inverse;  ///< of each group; inverse standard deviation
};
Moments moments_of(const Normalize& op, const Groups& g, const Operands& o) {
  const auto& sums = statistic(o.statistics, 0).values;
  Moments m;
  for (std::size_t i = 0; i < sums.size(); i += g.width) {
    const double mean = g.width == 2 ? sums[i] / g.members : 0;
    const double square = sums[i + g.width - 1] / g.members;
    m.mean.push_back(mean);
    m.inverse.push_back(1 / std::sqrt(std::max(0.0, square - mean * mean) + op.epsilon));
  }
  return m;
}

/// f(element, its group, normalised value) for every element of x.
template <class F>
void for_each_normalised(const Groups& g, const Moments& m, const Piece& x, F f) {
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    const std::size_t k = g.group[i];
    f(i, k, (x.values[i] - m.mean[k]) * m.inverse[k]);
  }
}

Piece statistic_of(const Normalize& op, const Context& c, std::size_t k, const Operands& o) {
  const Piece& x = input(c, o);
  const Groups g = groups_of(op, c);
  Piece sums = statistic_zeros(c, c.signature->forward_statistics[k]);
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    double* at = sums.values.data() + g.group[i] * g.width;
    if (g.width == 2) at[0] += x.values[i];
    at[g.width - 1] += x.values[i] * x.values[i];
  }
  return sums;
}

/// Gradient of the normalised value.
double scaled_gradient(const Normalize& op, const Groups& g, const Piece& dy, const Piece* scale,
                       std::size_t i) {
  return op.scale ? dy.values[i] * scale->values[g.affine[i]] : dy.values[i];
}

Piece backward_statistic_of(const Normalize& op, const Context& c, std::size_t k,
                            const Operands& o) {
  const Piece &x = input(c, o), &dy = gradient(c, o);
  const Piece* scale = op.scale ? &parameter(c, o) : nullptr;
  const Groups g = groups_of(op, c);
  Piece sums = statistic_zeros(c, c.signature->backward_statistics[k]);
  for_each_normalised(g, moments_of(op, g, o), x, [&](std::size_t i, std::size_t at, double hat) {
    const double d = scaled_gradient(op, g, dy, scale, i);
    double* sum = sums.values.data() + at * g.width;
    if (g.width == 2) sum[0] += d;
    sum[g.width - 1] += d * hat;
  });
  return sums;
}

/// Local response normalisation: f(element, divisor's base, neighbours' first and last feature,
/// stride) for every element of x. Of an even window the longer side lies before, as in PyTorch.
template <class F>
void for_each_local(const Normalize& op, const Piece& x, F f) {
  const std::size_t features = x.index[1].size(), stride = count(x.index, 2, x.index.size());
  const std::size_t before = unsigned_of(op.window / 2), after = unsigned_of((op.window - 1) / 2);
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    const std::size_t feature = i / stride % features;
    const std::size_t first = i - std::min(before, feature) * stride;
    const std::size_t last = i + std::min(after, features - 1 - feature) * stride;
    double squares = 0;
    for (std::size_t j = first; j <= last; j += stride) squares += x.values[j] * x.values[j];
    f(i, op.offset + op.alpha / static_cast<double>(op.window) * squares, first, last, stride);
  }
}

Pieces forward_of(const Normalize& op, const Context& c, const Operands& o) {
  if (op.kind == Normalize::Kind::local) {
    Piece y = input(c, o);
    for_each_local(op, input(c, o),
                   [&](std::size_t i, double base, std::size_t, std::size_t, std::size_t) {
                     y.values[i] *= std::pow(base, -op.beta);
                   });
    return {std::move(y)};
  }
  const Groups g = groups_of(op, c);
  const Piece& x = input(c, o);
  const Piece* scale = op.scale ? &parameter(c, o) : nullptr;
  const Piece* bias = op.bias ? &parameter(c, o, op.scale ? 1 : 0) : nullptr;
  Piece y = like(x);
  for_each_normalised(g, moments_of(op, g, o), x, [&](std::size_t i, std::size_t, double hat) {
    y.values[i] = (op.scale ? hat * scale->values[g.affine[i]] : hat) +
                  (op.bias ? bias->values[g.affine[i]] : 0);
  });
  return {std::move(y)};
}
Pieces data_of(const Normalize& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &dy = gradient(c, o);
  if (op.kind == Normalize::Kind::local) {
    Piece d = like(x);
    const double slope = 2 * op.beta * op.alpha / static_cast<double>(op.window);
    for_each_local(
        op, x,
        [&](std::size_t i, double base, std::size_t first, std::size_t last, std::size_t stride) {
          const double scaled = dy.values[i] * std::pow(base, -op.beta);
          d.values[i] += scaled;
          for (std::size_t j = first; j <= last; j += stride) {
            d.values[j] -= slope * scaled * x.values[i] / base * x.values[j];
          }
        });
    return {std::move(d)};
  }
  const Groups g = groups_of(op, c);
  const Piece* scale = op.scale ? &parameter(c, o) : nullptr;
  const Moments m = moments_of(op, g, o);
  const auto& sums = statistic(o.backward_statistics, 0).values;
  Piece dx = like(x);
  for_each_normalised(g, m, x, [&](std::size_t i, std::size_t k, double hat) {
    const double mean = g.width == 2 ? sums[k * g.width] / g.members : 0;
    const double along = sums[k * g.width + g.width - 1] / g.members;
    const double d = scaled_gradient(op, g, dy, scale, i);
    dx.values[i] = m.inverse[k] * (d - mean - hat * along);
  });
  return {std::move(dx)};
}
Pieces weight_of(const Normalize& op, const Context& c, const Operands& o) {
  const Groups g = groups_of(op, c);
  const Piece &x = input(c, o), &dy = gradient(c, o);
  Pieces d;
  for (std::size_t i = 0; i < c.signature->parameters.size(); ++i) {
    d.push_back(parameter_zeros(c, i));
  }
  for_each_normalised(g, moments_of(op, g, o), x, [&](std::size_t i, std::size_t, double hat) {
    if (op.scale) d.front().values[g.affine[i]] += dy.values[i] * hat;
    if (op.bias) d.back().values[g.affine[i]] += dy.values[i];
  });
  return d;
}

// ---------------------------------------------------------------------------------- element-wise

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Curve {
  double value, slope;
};
Curve curve(ActivationKind kind, double x) {
  switch (kind) {
    case ActivationKind::relu:
      return x > 0 ? Curve{x, 1} : Curve{0, 0};
    case ActivationKind::squared_relu:
      return x > 0 ? Curve{x * x, 2 * x} : Curve{0, 0};
    case ActivationKind::gelu: {
      const double below = 0.5 * (1 + std::erf(x / std::sqrt(2.0)));
      return {x * below, below + x * std::exp(-0.5 * x * x) / std::sqrt(2 * kPi)};
    }
    case ActivationKind::gelu_tanh: {
      // https://arxiv.org/abs/1606.08415, section 2.
      const double k = std::sqrt(2 / kPi);
      const double t = std::tanh(k * (x + 0.044715 * x * x * x));
      return {0.5 * x * (1 + t),
              0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)};
    }
    case ActivationKind::silu: {
      const double s = sigmoid(x);
      return {x * s, s * (1 + x * (1 - s))};
    }
    case ActivationKind::sigmoid: {
      const double s = sigmoid(x);
      return {s, s * (1 - s)};
    }
    case ActivationKind::tanh: {
      const double t = std::tanh(x);
      return {t, 1 - t * t};
    }
  }
  return {0, 0};
}

Pieces forward_of(const Activation& op, const Context& c, const Operands& o) {
  return {map(input(c, o), [&](double x) { return curve(op.kind, x).value; })};
}
Pieces data_of(const Activation& op, const Context& c, const Operands& o) {
  return {zip(op.kind == ActivationKind::relu ? saved_output(c, o) : input(c, o), gradient(c, o),
              [&](double x, double dy) { return dy * curve(op.kind, x).slope; })};
}

Pieces forward_of(const GatedActivation& op, const Context& c, const Operands& o) {
  return {zip(input(c, o, 0), input(c, o, 1),
              [&](double gate, double up) { return curve(op.kind, gate).value * up; })};
}
Pieces data_of(const GatedActivation& op, const Context& c, const Operands& o) {
  const Piece &gate = input(c, o, 0), &up = input(c, o, 1), &dy = gradient(c, o);
  Piece d_gate = zip(dy, up, [](double d, double u) { return d * u; });
  d_gate = zip(d_gate, gate, [&](double d, double g) { return d * curve(op.kind, g).slope; });
  Piece d_up = zip(dy, gate, [&](double d, double g) { return d * curve(op.kind, g).value; });
  return {std::move(d_gate), std::move(d_up)};
}

Pieces forward_of(const Add&, const Context& c, const Operands& o) {
  return {zip(input(c, o, 0), input(c, o, 1), [](double a, double b) { return a + b; })};
}
Pieces data_of(const Add&, const Context& c, const Operands& o) {
  return {gradient(c, o), gradient(c, o)};
}

Pieces forward_of(const Multiply&, const Context& c, const Operands& o) {
  return {zip(input(c, o, 0), input(c, o, 1), [](double a, double b) { return a * b; })};
}
Pieces data_of(const Multiply&, const Context& c, const Operands& o) {
  const auto times = [](double a, double b) { return a * b; };
  const Piece& dy = gradient(c, o);
  return {zip(dy, input(c, o, 1), times), zip(dy, input(c, o, 0), times)};
}

std::uint64_t splitmix(std::uint64_t x) {
  // https://prng.di.unimi.it/splitmix64.c
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}
/// In [0, 1), from the upper 53 bits.
double unit(std::uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

Piece dropped(const Dropout& op, const Context& c, Piece x) {
  const Shape& shape = c.signature->outputs[0].shape;
  const Dropped left_out(op, c);
  const auto apply = [&](double& v, std::uint64_t number) {
    v = left_out(number) ? 0 : v * left_out.scale;
  };
  if (x.routed) {
    const std::size_t features = x.index[3].size();
    for (std::size_t i = 0; i < x.values.size(); ++i)
      apply(x.values[i], number_of_row(c, x.rows[i / features]) +
                             static_cast<std::uint64_t>(x.index[3][i % features]));
    return x;
  }
  for_each(x.index, [&](std::size_t i, const Positions& at) {
    std::int64_t sample = c.first_sample, place = 0, of_sample = 1;
    for (std::size_t d = 0; d < at.size(); ++d) {
      const std::int64_t global = x.index[d][at[d]];
      if (shape[d].dim == Dim::sample) {
        sample += global;
      } else {
        place = place * shape[d].extent + global;
        of_sample *= shape[d].extent;
      }
    }
    apply(x.values[i], static_cast<std::uint64_t>(sample * of_sample + place));
  });
  return x;
}
Pieces forward_of(const Dropout& op, const Context& c, const Operands& o) {
  return {dropped(op, c, input(c, o))};
}
Pieces data_of(const Dropout& op, const Context& c, const Operands& o) {
  return {dropped(op, c, gradient(c, o))};
}

/// Turns each pair by `direction` times its angle.
Piece rotated(const Rotary& op, const Piece& x, double direction) {
  Piece y = x;
  const Indices& last = x.index.back();
  const Lookup at(last);
  const std::int64_t half = op.rotated / 2;
  const std::size_t inner = count(x.index, 2, x.index.size() - 1) * last.size();
  for (std::size_t j = 0; j < last.size(); ++j) {
    const std::int64_t r = last[j] % op.head_dim - (op.head_dim - op.rotated);
    if (r < 0 || r >= half) continue;
    const std::size_t other = at.held(last[j] + half);
    const double turn = direction * std::pow(op.base, -2 * static_cast<double>(r) /
                                                          static_cast<double>(op.rotated));
    for (std::size_t i = j; i < x.values.size(); i += last.size()) {
      const double angle = turn * static_cast<double>(x.index[1][i / inner % x.index[1].size()]);
      const double a = x.values[i], b = x.values[i - j + other];
      y.values[i] = a * std::cos(angle) - b * std::sin(angle);
      y.values[i - j + other] = b * std::cos(angle) + a * std::sin(angle);
    }
  }
  return y;
}
Pieces forward_of(const Rotary& op, const Context& c, const Operands& o) {
  return {rotated(op, input(c, o), 1)};
}
Pieces data_of(const Rotary& op, const Context& c, const Operands& o) {
  return {rotated(op, gradient(c, o), -1)};
}

// ------------------------------------------------------------------------------------- attention

/// One query of one head: where its operands lie, and its softmax over the held keys.
struct Query {
  std::size_t q, y;  ///< offsets of its vector in q and in y
  std::size_t sample, head;
  std::size_t sink;  ///< element of the sinks
  std::vector<double> weights;
  double sink_weight = 0;
};

double attention_scale(const Attention& op) {
  return op.scale != 0 ? op.scale : 1 / std::sqrt(static_cast<double>(op.qk_dim));
}

/// f(query) for every query of the piece; keys are visible by their global positions.
template <class F>
void for_each_query(const Attention& op, const Context& c, const Operands& o, F f) {
  const Piece &q = input(c, o, 0), &k = input(c, o, 1);
  const double* sinks = op.sinks ? parameter(c, o).values.data() : nullptr;
  const std::size_t heads = q.index[2].size();
  const std::size_t keys = k.index[1].size(), group = unsigned_of(op.queries_per_head);
  const std::size_t width = unsigned_of(op.qk_dim);
  const double scale = attention_scale(op);
  for_each({q.index[0], q.index[1], q.index[2], all(op.queries_per_head)},
           [&](std::size_t i, const Positions& at) {
             Query one{i * width, i * unsigned_of(op.v_dim), at[0],
                       at[2],     at[2] * group + at[3],     {}};
             const std::int64_t here = q.index[1][at[1]];
             std::vector<double> logits(keys, -std::numeric_limits<double>::infinity());
             double top = sinks != nullptr ? sinks[one.sink] : logits.empty() ? 0 : logits[0];
             for (std::size_t t = 0; t < keys; ++t) {
               const std::int64_t there = k.index[1][t];
               if (op.causal && there > here) continue;
               if (op.window > 0 && there <= here - op.window) continue;
               const double* key = k.values.data() + ((at[0] * keys + t) * heads + at[2]) * width;
               double dot = 0;
               for (std::size_t d = 0; d < width; ++d) dot += q.values[one.q + d] * key[d];
               logits[t] = dot * scale;
               top = std::max(top, logits[t]);
             }
             if (std::isinf(top)) top = 0;  // no key is visible: all weights are zero
             double total = 0;
             for (double& l : logits) total += l = std::exp(l - top);
             if (sinks != nullptr) total += one.sink_weight = std::exp(sinks[one.sink] - top);
             if (total > 0) {
               if (c.narrow_log_sums) {
                 const double log_sum = top + std::log(total);
                 total *= std::exp(static_cast<double>(static_cast<float>(log_sum)) - log_sum);
               }
               for (double& l : logits) l /= total;
               one.sink_weight /= total;
             }
             one.weights = std::move(logits);
             f(one);
           });
}

/// f(key, its weight, offset of its vector in k, in v) for the keys that a query sees.
template <class F>
void for_each_key(const Attention& op, const Piece& k, const Query& query, F f) {
  for (std::size_t t = 0; t < query.weights.size(); ++t) {
    if (query.weights[t] == 0) continue;
    const std::size_t at = (query.sample * k.index[1].size() + t) * k.index[2].size() + query.head;
    f(t, query.weights[t], at * unsigned_of(op.qk_dim), at * unsigned_of(op.v_dim));
  }
}

Pieces forward_of(const Attention& op, const Context& c, const Operands& o) {
  const Piece &k = input(c, o, 1), &v = input(c, o, 2);
  Piece y = output_zeros(c);
  for_each_query(op, c, o, [&](const Query& query) {
    for_each_key(op, k, query, [&](std::size_t, double p, std::size_t, std::size_t at) {
      for (std::size_t d = 0; d < unsigned_of(op.v_dim); ++d) {
        y.values[query.y + d] += p * v.values[at + d];
      }
    });
  });
  return {std::move(y)};
}

/// Gradient of the loss by each weight of a query, and their mean under the weights (= dy · y).
double weight_gradients(const Attention& op, const Piece& k, const Piece& v, const Piece& dy,
                        const Query& query, std::vector<double>& d_weights) {
  d_weights.assign(query.weights.size(), 0);
  double mean = 0;
  for_each_key(op, k, query, [&](std::size_t t, double p, std::size_t, std::size_t at) {
    for (std::size_t d = 0; d < unsigned_of(op.v_dim); ++d) {
      d_weights[t] += dy.values[query.y + d] * v.values[at + d];
    }
    mean += p * d_weights[t];
  });
  return mean;
}

Pieces data_of(const Attention& op, const Context& c, const Operands& o) {
  const Piece &q = input(c, o, 0), &k = input(c, o, 1), &v = input(c, o, 2), &dy = gradient(c, o);
  Piece dq = like(q), dk = like(k), dv = like(v);
  const double scale = attention_scale(op);
  std::vector<double> d_weights;
  for_each_query(op, c, o, [&](const Query& query) {
    const double mean = weight_gradients(op, k, v, dy, query, d_weights);
    for_each_key(op, k, query, [&](std::size_t t, double p, std::size_t k_at, std::size_t v_at) {
      const double d_logit = scale * p * (d_weights[t] - mean);
      for (std::size_t d = 0; d < unsigned_of(op.qk_dim); ++d) {
        dq.values[query.q + d] += d_logit * k.values[k_at + d];
        dk.values[k_at + d] += d_logit * q.values[query.q + d];
      }
      for (std::size_t d = 0; d < unsigned_of(op.v_dim); ++d) {
        dv.values[v_at + d] += p * dy.values[query.y + d];
      }
    });
  });
  return {std::move(dq), std::move(dk), std::move(dv)};
}
/// Of the sinks, the only parameter.
Pieces weight_of(const Attention& op, const Context& c, const Operands& o) {
  const Piece &k = input(c, o, 1), &v = input(c, o, 2), &dy = gradient(c, o);
  Piece d = parameter_zeros(c);
  std::vector<double> d_weights;
  for_each_query(op, c, o, [&](const Query& query) {
    // The sink's own value is zero, so only the mean pulls on its weight.
    const double mean = weight_gradients(op, k, v, dy, query, d_weights);
    d.values[query.sink] -= query.sink_weight * mean;
  });
  return {std::move(d)};
}

// ------------------------------------------------------------- products, softmax, losses

struct BatchedExtents {
  std::size_t batch, m, n, k;
};
BatchedExtents extents_of(const BatchedProduct& op, const Context& c) {
  const auto a = indices_of(c, c.signature->inputs[0]), b = indices_of(c, c.signature->inputs[1]);
  const auto at = static_cast<std::size_t>(op.batch);
  return {count(a, 0, at), a[at].size(), b[at + 1].size(), a[at + 1].size()};
}

Pieces forward_of(const BatchedProduct& op, const Context& c, const Operands& o) {
  const Piece &a = input(c, o, 0), &b = input(c, o, 1);
  const auto [batch, m, n, k] = extents_of(op, c);
  Piece y = output_zeros(c);
  for (std::size_t i = 0; i < batch; ++i) {
    add_product(m, n, k, {a.values.data() + i * m * k, k, 1}, {b.values.data() + i * k * n, n, 1},
                y.values.data() + i * m * n);
  }
  return {std::move(y)};
}
Pieces data_of(const BatchedProduct& op, const Context& c, const Operands& o) {
  const Piece &a = input(c, o, 0), &b = input(c, o, 1), &dy = gradient(c, o);
  const auto [batch, m, n, k] = extents_of(op, c);
  Piece da = like(a), db = like(b);
  for (std::size_t i = 0; i < batch; ++i) {
    const double* d = dy.values.data() + i * m * n;
    add_product(m, k, n, {d, n, 1}, {b.values.data() + i * k * n, 1, n},
                da.values.data() + i * m * k);
    add_product(k, n, m, {a.values.data() + i * m * k, 1, k}, {d, n, 1},
                db.values.data() + i * k * n);
  }
  return {std::move(da), std::move(db)};
}

/// f(first element, one past the last) of every row along the last dimension.
template <class F>
void for_each_line(const Piece& p, F f) {
  const std::size_t n = p.index.back().size();
  for (std::size_t i = 0; n > 0 && i < p.values.size(); i += n) f(i, i + n);
}

void softmax_in_place(double* first, double* last) {
  const double top = *std::max_element(first, last);
  double total = 0;
  for (double* v = first; v != last; ++v) total += * v = std::exp(*v - top);
  for (double* v = first; v != last; ++v) *v /= total;
}

Pieces forward_of(const Softmax&, const Context& c, const Operands& o) {
  Piece y = input(c, o);
  for_each_line(y, [&](std::size_t i, std::size_t end) {
    softmax_in_place(y.values.data() + i, y.values.data() + end);
  });
  return {std::move(y)};
}
Pieces data_of(const Softmax&, const Context& c, const Operands& o) {
  const Piece &y = saved_output(c, o), &dy = gradient(c, o);
  Piece dx = like(y);
  for_each_line(y, [&](std::size_t i, std::size_t end) {
    double mean = 0;
    for (std::size_t j = i; j < end; ++j) mean += y.values[j] * dy.values[j];
    for (std::size_t j = i; j < end; ++j) dx.values[j] = y.values[j] * (dy.values[j] - mean);
  });
  return {std::move(dx)};
}

/// Element of the logits that row `row`'s label names, or kAbsent.
std::size_t label_at(const Piece& logits, const Piece& labels, std::size_t row) {
  const std::size_t at = Lookup(logits.index.back())(std::llround(labels.values[row]));
  return at == kAbsent ? kAbsent : row * logits.index.back().size() + at;
}

Piece statistic_of(const CrossEntropy&, const Context& c, std::size_t k, const Operands& o) {
  const Piece &x = input(c, o, 0), &labels = input(c, o, 1);
  Piece s = statistic_zeros(c, c.signature->forward_statistics[k]);
  const std::size_t n = x.index.back().size();
  for (std::size_t row = 0; row < labels.values.size(); ++row) {
    const double* line = x.values.data() + row * n;
    if (k == 0) {
      double top = -std::numeric_limits<double>::infinity();
      for (std::size_t j = 0; j < n; ++j) top = std::max(top, line[j]);
      s.values[row] = top;
      continue;
    }
    const double top = statistic(o.statistics, 0).values[row];
    for (std::size_t j = 0; j < n; ++j) s.values[2 * row] += std::exp(line[j] - top);
    const std::size_t at = label_at(x, labels, row);
    s.values[2 * row + 1] = at == kAbsent ? 0 : x.values[at];
  }
  return s;
}

Piece scalar(double value) {
  Piece p = zeros({});
  p.values[0] = value;
  return p;
}

Pieces forward_of(const CrossEntropy&, const Context& c, const Operands& o) {
  const auto &top = statistic(o.statistics, 0).values, &sums = statistic(o.statistics, 1).values;
  double loss = 0;
  for (std::size_t row = 0; row < top.size(); ++row) {
    loss += std::log(sums[2 * row]) + top[row] - sums[2 * row + 1];
  }
  return {scalar(loss * c.loss_scale)};
}
Pieces data_of(const CrossEntropy&, const Context& c, const Operands& o) {
  const Piece &x = input(c, o, 0), &labels = input(c, o, 1);
  const auto &top = statistic(o.statistics, 0).values, &sums = statistic(o.statistics, 1).values;
  const double d = gradient(c, o).values[0] * c.loss_scale;
  const std::size_t n = x.index.back().size();
  Piece dx = like(x);
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    dx.values[i] = d * std::exp(x.values[i] - top[i / n]) / sums[2 * (i / n)];
  }
  for (std::size_t row = 0; row < labels.values.size(); ++row) {
    if (const std::size_t at = label_at(x, labels, row); at != kAbsent) dx.values[at] -= d;
  }
  return {std::move(dx), Piece{}};
}

Pieces forward_of(const MeanSquaredError&, const Context& c, const Operands& o) {
  double loss = 0;
  const Piece e = zip(input(c, o, 0), input(c, o, 1), [](double a, double b) { return a - b; });
  for (const double v : e.values) loss += v * v;
  return {scalar(loss * c.loss_scale)};
}
Pieces data_of(const MeanSquaredError&, const Context& c, const Operands& o) {
  const double d = 2 * gradient(c, o).values[0] * c.loss_scale;
  return {zip(input(c, o, 0), input(c, o, 1), [&](double a, double b) { return d * (a - b); }),
          Piece{}};
}

// ---------------------------------------------------------------------------------------- images

/// One product of a windowed plane: positions inside the output's, input's and kernel's plane.
struct Tap {
  std::size_t out, in, kernel;
};
/// All taps that lie inside the image, by output, then by kernel position; the rest is padding.
std::vector<Tap> taps_of(const Window& h, const Window& w, const Shape& image,
                         const std::vector<Indices>& x, const std::vector<Indices>& y) {
  struct Step {
    std::size_t in, kernel;
  };
  const auto along = [&](const Window& window, std::size_t d, std::int64_t out) {
    std::vector<Step> steps;
    const Lookup held(x[d]);
    for (std::int64_t k = 0; k < window.kernel; ++k) {
      const std::int64_t in = out * window.stride - window.pad_before + k * window.dilation;
      if (in >= 0 && in < image[d].extent) steps.push_back({held.held(in), unsigned_of(k)});
    }
    return steps;
  };
  std::vector<Tap> taps;
  std::size_t out = 0;
  for (const std::int64_t row : y[2]) {
    for (const std::int64_t column : y[3]) {
      for (const Step& a : along(h, 2, row)) {
        for (const Step& b : along(w, 3, column)) {
          taps.push_back(
              {out, a.in * x[3].size() + b.in, a.kernel * unsigned_of(w.kernel) + b.kernel});
        }
      }
      ++out;
    }
  }
  return taps;
}

/// f(y, x, w): every term y[.] += x[.] · w[.] of a convolution.
template <class F>
void for_each_term(const Convolution& op, const Context& c, F f) {
  const Signature& s = *c.signature;
  const auto x = indices_of(c, s.inputs[0]), w = indices_of(c, s.parameters[0]),
             y = indices_of(c, s.outputs[0]);
  const auto taps = taps_of(op.height, op.width, s.inputs[0].shape, x, y);
  const std::int64_t group_in = s.inputs[0].shape[1].extent / op.groups;
  const std::int64_t group_out = op.out / op.groups;
  const Lookup channel(x[1]);
  for_each({y[0], y[1], w[1]}, [&](std::size_t, const Positions& at) {
    const std::size_t in = channel.held(y[1][at[1]] / group_out * group_in + w[1][at[2]]);
    const std::size_t y_at = (at[0] * y[1].size() + at[1]) * count(y, 2, 4);
    const std::size_t x_at = (at[0] * x[1].size() + in) * count(x, 2, 4);
    const std::size_t w_at = (at[1] * w[1].size() + at[2]) * count(w, 2, 4);
    for (const Tap& t : taps) f(y_at + t.out, x_at + t.in, w_at + t.kernel);
  });
}

/// Output channel of element `i` of y.
std::size_t channel_of(const Piece& y, std::size_t i) {
  return i / count(y.index, 2, 4) % y.index[1].size();
}

Pieces forward_of(const Convolution& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &w = parameter(c, o);
  Piece y = output_zeros(c);
  for_each_term(op, c, [&](std::size_t i, std::size_t j, std::size_t k) {
    y.values[i] += x.values[j] * w.values[k];
  });
  if (op.bias && c.adds_bias) {
    const Piece& b = parameter(c, o, 1);
    for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] += b.values[channel_of(y, i)];
  }
  return {std::move(y)};
}
Pieces data_of(const Convolution& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &w = parameter(c, o);
  Piece dx = input_zeros(c);
  for_each_term(op, c, [&](std::size_t i, std::size_t j, std::size_t k) {
    dx.values[j] += dy.values[i] * w.values[k];
  });
  return {std::move(dx)};
}
Pieces weight_of(const Convolution& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &x = input(c, o);
  Pieces d{parameter_zeros(c)};
  for_each_term(op, c, [&](std::size_t i, std::size_t j, std::size_t k) {
    d[0].values[k] += dy.values[i] * x.values[j];
  });
  if (op.bias) {
    d.push_back(parameter_zeros(c, 1));
    for (std::size_t i = 0; c.adds_bias && i < dy.values.size(); ++i) {
      d[1].values[channel_of(dy, i)] += dy.values[i];
    }
  }
  return d;
}

/// f(taps of one output, y element, offset of the input's plane) for every output element.
template <class F>
void for_each_window(const Pool& op, const Context& c, F f) {
  const Signature& s = *c.signature;
  const auto x = indices_of(c, s.inputs[0]), y = indices_of(c, s.outputs[0]);
  const std::size_t x_plane = count(x, 2, 4), y_plane = count(y, 2, 4);
  std::vector<std::vector<Tap>> windows(y_plane);
  for (const Tap& t : taps_of(op.height, op.width, s.inputs[0].shape, x, y)) {
    windows[t.out].push_back(t);
  }
  for (std::size_t plane = 0; plane < count(y, 0, 2); ++plane) {
    for (std::size_t i = 0; i < y_plane; ++i) f(windows[i], plane * y_plane + i, plane * x_plane);
  }
}

double divisor(const Pool& op, const std::vector<Tap>& window) {
  return op.count_padding ? static_cast<double>(op.height.kernel * op.width.kernel)
                          : static_cast<double>(window.size());
}
/// Input element of the largest value, the first of equal ones; kAbsent where all is padding.
std::size_t largest(const Piece& x, const std::vector<Tap>& window, std::size_t plane) {
  std::size_t best = kAbsent;
  for (const Tap& t : window) {
    if (best == kAbsent || x.values[plane + t.in] > x.values[best]) best = plane + t.in;
  }
  return best;
}

Pieces forward_of(const Pool& op, const Context& c, const Operands& o) {
  const Piece& x = input(c, o);
  Piece y = output_zeros(c);
  for_each_window(op, c, [&](const std::vector<Tap>& window, std::size_t i, std::size_t plane) {
    if (op.maximum) {
      const std::size_t best = largest(x, window, plane);
      y.values[i] = best == kAbsent ? -std::numeric_limits<double>::infinity() : x.values[best];
      return;
    }
    for (const Tap& t : window) y.values[i] += x.values[plane + t.in] / divisor(op, window);
  });
  return {std::move(y)};
}
Pieces data_of(const Pool& op, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  const Piece* x = op.maximum ? &input(c, o) : nullptr;
  Piece dx = input_zeros(c);
  for_each_window(op, c, [&](const std::vector<Tap>& window, std::size_t i, std::size_t plane) {
    if (op.maximum) {
      const std::size_t best = largest(*x, window, plane);
      if (best != kAbsent) dx.values[best] += dy.values[i];
      return;
    }
    for (const Tap& t : window) dx.values[plane + t.in] += dy.values[i] / divisor(op, window);
  });
  return {std::move(dx)};
}

double plane_size(const Context& c) {
  const Shape& x = c.signature->inputs[0].shape;
  return static_cast<double>(x[2].extent * x[3].extent);
}
Pieces forward_of(const GlobalAveragePool&, const Context& c, const Operands& o) {
  const Piece& x = input(c, o);
  const std::size_t plane = count(x.index, 2, 4);
  Piece y = output_zeros(c);
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    y.values[i / plane] += x.values[i] / plane_size(c);
  }
  return {std::move(y)};
}
Pieces data_of(const GlobalAveragePool&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dx = input_zeros(c);
  const std::size_t plane = count(dx.index, 2, 4);
  for (std::size_t i = 0; i < dx.values.size(); ++i) {
    dx.values[i] = dy.values[i / plane] / plane_size(c);
  }
  return {std::move(dx)};
}

Pieces forward_of(const ScaleFeatures&, const Context& c, const Operands& o) {
  Piece y = input(c, o, 0);
  const Piece& gate = input(c, o, 1);
  const std::size_t plane = count(y.index, 2, 4);
  for (std::size_t i = 0; i < y.values.size(); ++i) y.values[i] *= gate.values[i / plane];
  return {std::move(y)};
}
Pieces data_of(const ScaleFeatures&, const Context& c, const Operands& o) {
  const Piece &x = input(c, o, 0), &gate = input(c, o, 1), &dy = gradient(c, o);
  Piece dx = dy, d_gate = input_zeros(c, 1);
  const std::size_t plane = count(x.index, 2, 4);
  for (std::size_t i = 0; i < dx.values.size(); ++i) {
    dx.values[i] *= gate.values[i / plane];
    d_gate.values[i / plane] += dy.values[i] * x.values[i];
  }
  return {std::move(dx), std::move(d_gate)};
}

// ---------------------------------------------------------------------------------------- shapes

/// f(element of [sample, feature, height, width], element of [sample, sequence, feature]).
template <class F>
void for_each_pixel(const std::vector<Indices>& x, F f) {
  const std::size_t features = x[1].size(), plane = count(x, 2, 4);
  for (std::size_t i = 0; i < count(x, 0, 4); ++i) {
    const std::size_t sample = i / (plane * features), feature = i / plane % features;
    f(i, (sample * plane + i % plane) * features + feature);
  }
}
Pieces forward_of(const ToSequence&, const Context& c, const Operands& o) {
  const Piece& x = input(c, o);
  Piece y = output_zeros(c);
  for_each_pixel(x.index, [&](std::size_t i, std::size_t j) { y.values[j] = x.values[i]; });
  return {std::move(y)};
}
Pieces data_of(const ToSequence&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dx = input_zeros(c);
  for_each_pixel(dx.index, [&](std::size_t i, std::size_t j) { dx.values[i] = dy.values[j]; });
  return {std::move(dx)};
}

/// Copies the parts of a joined tensor: f(part, element of the part, element of the whole).
template <class F>
void for_each_part(const std::vector<std::size_t>& parts, std::size_t outer, F f) {
  const std::size_t whole = std::accumulate(parts.begin(), parts.end(), std::size_t{0});
  for (std::size_t i = 0; i < outer; ++i) {
    std::size_t at = i * whole;
    for (std::size_t part = 0; part < parts.size(); ++part) {
      for (std::size_t j = 0; j < parts[part]; ++j) f(part, i * parts[part] + j, at++);
    }
  }
}

Pieces forward_of(const PrependToken&, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &token = parameter(c, o);
  Piece y = output_zeros(c);
  const std::size_t n = token.values.size();
  for_each_part({n, x.index[1].size() * n}, x.index[0].size(),
                [&](std::size_t part, std::size_t i, std::size_t j) {
                  y.values[j] = part == 0 ? token.values[i % n] : x.values[i];
                });
  return {std::move(y)};
}
Pieces data_of(const PrependToken&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dx = input_zeros(c);
  const std::size_t n = dx.index[2].size();
  for_each_part({n, dx.index[1].size() * n}, dx.index[0].size(),
                [&](std::size_t part, std::size_t i, std::size_t j) {
                  if (part == 1) dx.values[i] = dy.values[j];
                });
  return {std::move(dx)};
}
Pieces weight_of(const PrependToken&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece d = parameter_zeros(c);
  const std::size_t n = d.values.size();
  for_each_part({n, (dy.index[1].size() - 1) * n}, dy.index[0].size(),
                [&](std::size_t part, std::size_t i, std::size_t j) {
                  if (part == 0) d.values[i % n] += dy.values[j];
                });
  return {std::move(d)};
}

/// f(element of x, element of y) for the chosen token, where it is held.
template <class F>
void for_each_selected(const SelectToken& op, const std::vector<Indices>& x, F f) {
  const std::size_t token = Lookup(x[1])(op.index), n = x[2].size();
  if (token == kAbsent) return;
  for (std::size_t i = 0; i < x[0].size() * n; ++i) {
    f((i / n * x[1].size() + token) * n + i % n, i);
  }
}
Pieces forward_of(const SelectToken& op, const Context& c, const Operands& o) {
  const Piece& x = input(c, o);
  Piece y = output_zeros(c);
  for_each_selected(op, x.index, [&](std::size_t i, std::size_t j) { y.values[j] = x.values[i]; });
  return {std::move(y)};
}
Pieces data_of(const SelectToken& op, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dx = input_zeros(c);
  for_each_selected(op, dx.index,
                    [&](std::size_t i, std::size_t j) { dx.values[i] = dy.values[j]; });
  return {std::move(dx)};
}

/// f(input, its element, element of y) for every element of a concatenation.
template <class F>
void for_each_joined(const Concat& op, const Context& c, F f) {
  std::vector<std::size_t> parts;
  std::size_t outer = 1;
  for (const Operand& operand : c.signature->inputs) {
    const auto x = indices_of(c, operand);
    const std::size_t axis = op.last ? x.size() - 1 : 1;
    parts.push_back(count(x, axis, x.size()));
    outer = count(x, 0, axis);
  }
  for_each_part(parts, outer, f);
}
Pieces forward_of(const Concat& op, const Context& c, const Operands& o) {
  std::vector<const Piece*> x;
  for (std::size_t i = 0; i < c.signature->inputs.size(); ++i) x.push_back(&input(c, o, i));
  Piece y = output_zeros(c);
  for_each_joined(op, c, [&](std::size_t part, std::size_t i, std::size_t j) {
    y.values[j] = x[part]->values[i];
  });
  return {std::move(y)};
}
Pieces data_of(const Concat& op, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Pieces d;
  for (std::size_t i = 0; i < c.signature->inputs.size(); ++i) d.push_back(input_zeros(c, i));
  for_each_joined(op, c, [&](std::size_t part, std::size_t i, std::size_t j) {
    d[part].values[i] = dy.values[j];
  });
  return d;
}

/// f(part 0 or 1, element of a or b, element of y): b is repeated for every head.
template <class F>
void for_each_appended(const std::vector<Indices>& a, const std::vector<Indices>& b, F f) {
  const std::size_t heads = a[2].size(), n = b[2].size();
  for_each_part({a[3].size(), n}, count(a, 0, 3),
                [&](std::size_t part, std::size_t i, std::size_t j) {
                  f(part, part == 0 ? i : i / (heads * n) * n + i % n, j);
                });
}
Pieces forward_of(const AppendToHeads&, const Context& c, const Operands& o) {
  const Piece &a = input(c, o, 0), &b = input(c, o, 1);
  Piece y = output_zeros(c);
  for_each_appended(a.index, b.index, [&](std::size_t part, std::size_t i, std::size_t j) {
    y.values[j] = (part == 0 ? a : b).values[i];
  });
  return {std::move(y)};
}
Pieces data_of(const AppendToHeads&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece da = input_zeros(c, 0), db = input_zeros(c, 1);
  for_each_appended(da.index, db.index, [&](std::size_t part, std::size_t i, std::size_t j) {
    (part == 0 ? da : db).values[i] += dy.values[j];
  });
  return {std::move(da), std::move(db)};
}

// --------------------------------------------------------------------------- state space models

/// f(element, its channel, of each token in reach: element of x, element of the channel's weights).
template <class F>
void for_each_sum(const CausalConvolution& op, const Piece& x, F f) {
  const std::size_t tokens = x.index[1].size(), channels = count(x.index, 2, 4),
                    kernel = unsigned_of(op.kernel);
  std::vector<std::pair<std::size_t, std::size_t>> reach;
  for (std::size_t i = 0; i < x.values.size(); ++i) {
    const std::size_t channel = i % channels, t = i / channels % tokens;
    reach.clear();
    for (std::size_t back = 0; back < kernel && back <= t; ++back)
      reach.emplace_back(i - back * channels, channel * kernel + kernel - 1 - back);
    f(i, channel, reach);
  }
}
/// The curve at each sum.
template <class F>
void for_each_sum(const CausalConvolution& op, const Context& c, const Operands& o, F f) {
  const Piece &x = input(c, o), &w = parameter(c, o);
  const Piece* b = op.bias ? &parameter(c, o, 1) : nullptr;
  for_each_sum(op, x, [&](std::size_t i, std::size_t channel, const auto& reach) {
    double sum = b != nullptr ? b->values[channel] : 0;
    for (const auto& [from, weight] : reach) sum += w.values[weight] * x.values[from];
    f(i, channel, reach, curve(ActivationKind::silu, sum));
  });
}

Pieces forward_of(const CausalConvolution& op, const Context& c, const Operands& o) {
  Piece y = output_zeros(c);
  for_each_sum(op, c, o, [&](std::size_t i, std::size_t, const auto&, const Curve& at) {
    y.values[i] = at.value;
  });
  return {std::move(y)};
}
Pieces data_of(const CausalConvolution& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &w = parameter(c, o);
  Piece dx = input_zeros(c);
  for_each_sum(op, c, o, [&](std::size_t i, std::size_t, const auto& reach, const Curve& at) {
    for (const auto& [from, weight] : reach)
      dx.values[from] += dy.values[i] * at.slope * w.values[weight];
  });
  return {std::move(dx)};
}
Pieces weight_of(const CausalConvolution& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &x = input(c, o);
  Pieces d{parameter_zeros(c)};
  if (op.bias) d.push_back(parameter_zeros(c, 1));
  for_each_sum(op, c, o,
               [&](std::size_t i, std::size_t channel, const auto& reach, const Curve& at) {
                 const double slope = dy.values[i] * at.slope;
                 for (const auto& [from, weight] : reach)
                   d[0].values[weight] += slope * x.values[from];
                 if (op.bias) d[1].values[channel] += slope;
               });
  return d;
}

/// One head over the whole sequence, token by token.
struct Scan {
  std::size_t tokens = 0, dim = 0, state = 0;
  std::size_t head = 0;             ///< element of the head's parameters
  std::size_t x = 0, b = 0, c = 0;  ///< elements of the first token
  std::size_t step = 0, y = 0;
  std::size_t x_row = 0, step_row = 0, y_row = 0;  ///< from token to token
};

template <class F>
void for_each_scan(const StateSpace& op, const Context& c, F f) {
  const auto x = indices_of(c, c.signature->inputs[0]), y = indices_of(c, c.signature->outputs[0]);
  const std::size_t groups = x[2].size(), width = x[3].size(),
                    heads = unsigned_of(op.heads_per_group);
  Scan s;
  s.tokens = x[1].size(), s.dim = unsigned_of(op.head_dim), s.state = unsigned_of(op.state);
  s.x_row = groups * width, s.step_row = groups * heads, s.y_row = groups * heads * s.dim;
  for (std::size_t sample = 0; sample < x[0].size(); ++sample) {
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t first = sample * s.tokens * s.x_row + g * width;
      s.b = first + heads * s.dim, s.c = s.b + s.state;
      for (std::size_t h = 0; h < heads; ++h) {
        s.head = g * heads + h;
        s.x = first + h * s.dim;
        s.step = sample * s.tokens * s.step_row + s.head;
        s.y = sample * s.tokens * s.y_row + s.head * s.dim;
        f(s);
      }
    }
  }
}

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

/// What a token's step says, and the states after every token, after those before the first.
struct Steps {
  std::vector<double> raw, length, kept;  ///< raw: before the softplus; kept: of the state
  double decay = 0;
  std::vector<double> states;  ///< (tokens + 1) · dim · state
};
Steps steps_of(const Scan& s, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &step = input(c, o, 1);
  Steps all;
  all.decay = std::exp(parameter(c, o).values[s.head]);
  const std::size_t n = s.dim * s.state;
  all.states.assign((s.tokens + 1) * n, 0);
  for (std::size_t t = 0; t < s.tokens; ++t) {
    all.raw.push_back(step.values[s.step + t * s.step_row] + parameter(c, o, 2).values[s.head]);
    all.length.push_back(softplus(all.raw[t]));
    all.kept.push_back(std::exp(-all.length[t] * all.decay));
    const double* before = &all.states[t * n];
    double* after = &all.states[(t + 1) * n];
    for (std::size_t i = 0; i < n; ++i) {
      after[i] = all.kept[t] * before[i] + all.length[t] *
                                               x.values[s.x + t * s.x_row + i / s.state] *
                                               x.values[s.b + t * s.x_row + i % s.state];
    }
  }
  return all;
}

Pieces forward_of(const StateSpace& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &skip = parameter(c, o, 1);
  Piece y = output_zeros(c);
  for_each_scan(op, c, [&](const Scan& s) {
    const Steps steps = steps_of(s, c, o);
    for (std::size_t t = 0; t < s.tokens; ++t) {
      const double* state = &steps.states[(t + 1) * s.dim * s.state];
      for (std::size_t p = 0; p < s.dim; ++p) {
        double sum = skip.values[s.head] * x.values[s.x + t * s.x_row + p];
        for (std::size_t n = 0; n < s.state; ++n)
          sum += state[p * s.state + n] * x.values[s.c + t * s.x_row + n];
        y.values[s.y + t * s.y_row + p] = sum;
      }
    }
  });
  return {std::move(y)};
}

/// Gradients of both inputs and of the three parameters.
Pieces gradients_of(const StateSpace& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &skip = parameter(c, o, 1), &dy = gradient(c, o);
  Pieces d{input_zeros(c), input_zeros(c, 1), parameter_zeros(c), parameter_zeros(c, 1),
           parameter_zeros(c, 2)};
  for_each_scan(op, c, [&](const Scan& s) {
    const Steps steps = steps_of(s, c, o);
    std::vector<double> later(s.dim * s.state, 0);  // gradient of the state after the token
    for (std::size_t t = s.tokens; t-- > 0;) {
      const double *before = &steps.states[t * later.size()], *after = before + later.size();
      const std::size_t x0 = s.x + t * s.x_row, b0 = s.b + t * s.x_row, c0 = s.c + t * s.x_row;
      double of_length = 0, of_kept = 0;
      for (std::size_t p = 0; p < s.dim; ++p) {
        const double dout = dy.values[s.y + t * s.y_row + p], xp = x.values[x0 + p];
        d[0].values[x0 + p] += skip.values[s.head] * dout;
        d[3].values[s.head] += dout * xp;
        for (std::size_t n = 0; n < s.state; ++n) {
          const std::size_t i = p * s.state + n;
          const double bn = x.values[b0 + n];
          later[i] += dout * x.values[c0 + n];
          d[0].values[c0 + n] += dout * after[i];
          d[0].values[x0 + p] += steps.length[t] * later[i] * bn;
          d[0].values[b0 + n] += steps.length[t] * later[i] * xp;
          of_length += later[i] * xp * bn;
          of_kept += later[i] * before[i];
          later[i] *= steps.kept[t];
        }
      }
      of_kept *= steps.kept[t];
      of_length -= of_kept * steps.decay;
      d[2].values[s.head] -= of_kept * steps.length[t] * steps.decay;
      const double of_raw = of_length * sigmoid(steps.raw[t]);
      d[1].values[s.step + t * s.step_row] += of_raw;
      d[4].values[s.head] += of_raw;
    }
  });
  return d;
}
Pieces data_of(const StateSpace& op, const Context& c, const Operands& o) {
  Pieces d = gradients_of(op, c, o);
  d.resize(2);
  return d;
}
Pieces weight_of(const StateSpace& op, const Context& c, const Operands& o) {
  Pieces d = gradients_of(op, c, o);
  d.erase(d.begin(), d.begin() + 2);
  return d;
}

/// f(first element of the group, of its weights, inverse deviation of x · silu(gate)).
template <class F>
void for_each_gated(const GatedNorm& op, const Piece& x, const Piece& gate, F f) {
  const std::size_t n = x.index[3].size(), groups = x.index[2].size();
  for (std::size_t first = 0; first < x.values.size(); first += n) {
    double square = 0;
    for (std::size_t i = first; i < first + n; ++i) {
      const double v = x.values[i] * curve(ActivationKind::silu, gate.values[i]).value;
      square += v * v;
    }
    f(first, first / n % groups * n, 1 / std::sqrt(square / static_cast<double>(n) + op.epsilon));
  }
}
Pieces forward_of(const GatedNorm& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &gate = input(c, o, 1), &w = parameter(c, o);
  Piece y = output_zeros(c);
  const std::size_t n = x.index[3].size();
  for_each_gated(op, x, gate, [&](std::size_t first, std::size_t weight, double inverse) {
    for (std::size_t i = 0; i < n; ++i) {
      y.values[first + i] = x.values[first + i] *
                            curve(ActivationKind::silu, gate.values[first + i]).value * inverse *
                            w.values[weight + i];
    }
  });
  return {std::move(y)};
}
Pieces data_of(const GatedNorm& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &gate = input(c, o, 1), &w = parameter(c, o), &dy = gradient(c, o);
  Piece dx = input_zeros(c), d_gate = input_zeros(c, 1);
  const std::size_t n = x.index[3].size();
  for_each_gated(op, x, gate, [&](std::size_t first, std::size_t weight, double inverse) {
    const auto at = [&](std::size_t i) {
      return curve(ActivationKind::silu, gate.values[first + i]);
    };
    double mean = 0;  // of gradient times normalised value
    for (std::size_t i = 0; i < n; ++i)
      mean += dy.values[first + i] * w.values[weight + i] * x.values[first + i] * at(i).value;
    mean *= inverse / static_cast<double>(n);
    for (std::size_t i = 0; i < n; ++i) {
      const Curve g = at(i);
      const double xi = x.values[first + i];
      const double d =
          (dy.values[first + i] * w.values[weight + i] - xi * g.value * inverse * mean) * inverse;
      dx.values[first + i] = d * g.value;
      d_gate.values[first + i] = d * xi * g.slope;
    }
  });
  return {std::move(dx), std::move(d_gate)};
}
Pieces weight_of(const GatedNorm& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &gate = input(c, o, 1), &dy = gradient(c, o);
  Piece dw = parameter_zeros(c);
  const std::size_t n = x.index[3].size();
  for_each_gated(op, x, gate, [&](std::size_t first, std::size_t weight, double inverse) {
    for (std::size_t i = 0; i < n; ++i) {
      dw.values[weight + i] += dy.values[first + i] * inverse * x.values[first + i] *
                               curve(ActivationKind::silu, gate.values[first + i]).value;
    }
  });
  return {std::move(dw)};
}

// --------------------------------------------------------------------------------------- experts

/// Scores of one token's experts and the chosen ones, best first; of equal scores the lower index.
struct Choice {
  std::vector<double> score;
  Positions chosen;
  double total = 0;  ///< of the chosen scores
};
Choice choose(const Router& op, const double* logits, std::size_t experts) {
  Choice one;
  one.score.assign(logits, logits + experts);
  if (op.sigmoid) {
    for (double& s : one.score) s = sigmoid(s);
  } else {
    softmax_in_place(one.score.data(), one.score.data() + experts);
  }
  one.chosen.resize(experts);
  std::iota(one.chosen.begin(), one.chosen.end(), std::size_t{0});
  if (op.groups > 1) {
    const std::size_t each = experts / unsigned_of(op.groups);
    std::vector<double> sums;
    for (std::size_t g = 0; g < unsigned_of(op.groups); ++g) {
      std::vector<double> of(one.score.begin() + static_cast<std::ptrdiff_t>(g * each),
                             one.score.begin() + static_cast<std::ptrdiff_t>((g + 1) * each));
      for (double& s : of) s = s >= 0 ? s : 0;
      std::sort(of.begin(), of.end(), std::greater<>());
      sums.push_back(std::accumulate(of.begin(),
                                     of.begin() + static_cast<std::ptrdiff_t>(op.group_best), 0.0));
    }
    Positions groups(sums.size());
    std::iota(groups.begin(), groups.end(), std::size_t{0});
    std::stable_sort(groups.begin(), groups.end(),
                     [&](std::size_t a, std::size_t b) { return sums[a] > sums[b]; });
    groups.resize(unsigned_of(op.top_groups));
    std::erase_if(one.chosen, [&](std::size_t e) {
      return std::find(groups.begin(), groups.end(), e / each) == groups.end();
    });
  }
  // By logits: scores that round to one value must not change the choice. What is no number is
  // behind all others.
  const auto ordered = [&](std::size_t e) {
    return std::isnan(logits[e]) ? -std::numeric_limits<double>::infinity() : logits[e];
  };
  std::stable_sort(one.chosen.begin(), one.chosen.end(),
                   [&](std::size_t a, std::size_t b) { return ordered(a) > ordered(b); });
  one.chosen.resize(unsigned_of(op.top_k));
  for (const std::size_t e : one.chosen) one.total += one.score[e];
  return one;
}

Pieces forward_of(const Router& op, const Context& c, const Operands& o) {
  const Piece& x = input(c, o);
  Piece y = like(x);
  for_each_line(x, [&](std::size_t i, std::size_t end) {
    const Choice one = choose(op, x.values.data() + i, end - i);
    for (const std::size_t e : one.chosen) {
      y.values[i + e] = op.scale * one.score[e] / (op.normalise ? one.total : 1);
    }
  });
  return {std::move(y)};
}
Pieces data_of(const Router& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &dy = gradient(c, o);
  Piece dx = like(x);
  for_each_line(x, [&](std::size_t i, std::size_t end) {
    const Choice one = choose(op, x.values.data() + i, end - i);
    double* d = dx.values.data() + i;  // first by the score, then by the logit
    double mean = 0;
    for (const std::size_t e : one.chosen) mean += dy.values[i + e] * one.score[e] / one.total;
    double along = 0;
    for (const std::size_t e : one.chosen) {
      d[e] = op.scale * (op.normalise ? (dy.values[i + e] - mean) / one.total : dy.values[i + e]);
      along += one.score[e] * d[e];
    }
    for (std::size_t e = 0; e < end - i; ++e) {
      const double s = one.score[e];
      d[e] = op.sigmoid ? d[e] * s * (1 - s) : s * (d[e] - along);
    }
  });
  return {std::move(dx)};
}

/// f(row, token's position in [sample, sequence]) for every row.
template <class F>
void for_each_routed(const Piece& rows, const Indices& samples, const Indices& sequence, F f) {
  const Lookup sample(samples), token(sequence);
  for (std::size_t r = 0; r < rows.rows.size(); ++r) {
    const Row& row = rows.rows[r];
    f(r, sample.held(row.sample) * sequence.size() + token.held(row.sequence));
  }
}

Pieces forward_of(const Dispatch&, const Context& c, const Operands& o) {
  const Piece &x = input(c, o, 0), &gates = input(c, o, 1);
  Piece y;
  y.routed = true;
  y.index = indices_of(c, c.signature->outputs[0]);
  // c.indices, not the output's `expert` dimension, which counts choices.
  const Indices& experts = c.indices[unsigned_of(c.signature->find(Dim::expert))];
  y.index[2] = experts;
  const Lookup column(gates.index[2]);
  for (const std::int64_t e : experts) {
    for_each({x.index[0], x.index[1]}, [&](std::size_t token, const Positions& at) {
      if (gates.values[token * gates.index[2].size() + column.held(e)] != 0) {
        y.rows.push_back({x.index[0][at[0]], x.index[1][at[1]], e});
      }
    });
  }
  std::sort(y.rows.begin(), y.rows.end(), [](const Row& a, const Row& b) {
    return std::tie(a.expert, a.sample, a.sequence) < std::tie(b.expert, b.sample, b.sequence);
  });
  const std::size_t n = x.index[2].size();
  for_each_routed(y, x.index[0], x.index[1], [&](std::size_t, std::size_t token) {
    for (std::size_t j = 0; j < n; ++j) y.values.push_back(x.values[token * n + j]);
  });
  return {std::move(y)};
}
Pieces data_of(const Dispatch&, const Context& c, const Operands& o) {
  const Piece& dy = gradient(c, o);
  Piece dx = input_zeros(c);
  const std::size_t n = dx.index[2].size();
  for_each_routed(dy, dx.index[0], dx.index[1], [&](std::size_t r, std::size_t token) {
    for (std::size_t j = 0; j < n; ++j) dx.values[token * n + j] += dy.values[r * n + j];
  });
  return {std::move(dx), Piece{}};
}

/// Position of every row's expert in the held parameters.
Positions experts_of(const Piece& rows, const Indices& experts) {
  const Lookup at(experts);
  Positions all_of;
  for (const Row& row : rows.rows) all_of.push_back(at.held(row.expert));
  return all_of;
}

Pieces forward_of(const GroupedProduct& op, const Context& c, const Operands& o) {
  const Piece &x = input(c, o), &w = parameter(c, o);
  const Positions expert = experts_of(x, w.index[0]);
  const std::size_t out = w.index[1].size(), in = w.index[2].size();
  Piece y = with_rows_of(x, w.index[1]);
  for (std::size_t r = 0; r < expert.size(); ++r) {
    add_product(1, out, in, {x.values.data() + r * in, in, 1},
                {w.values.data() + expert[r] * out * in, 1, in}, y.values.data() + r * out);
  }
  if (op.bias && c.adds_bias) {
    const Piece& b = parameter(c, o, 1);
    for (std::size_t i = 0; i < y.values.size(); ++i) {
      y.values[i] += b.values[expert[i / out] * out + i % out];
    }
  }
  return {std::move(y)};
}
Pieces data_of(const GroupedProduct&, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &w = parameter(c, o);
  const Positions expert = experts_of(dy, w.index[0]);
  const std::size_t out = w.index[1].size(), in = w.index[2].size();
  Piece dx = with_rows_of(dy, w.index[2]);
  for (std::size_t r = 0; r < expert.size(); ++r) {
    add_product(1, in, out, {dy.values.data() + r * out, out, 1},
                {w.values.data() + expert[r] * out * in, in, 1}, dx.values.data() + r * in);
  }
  return {std::move(dx)};
}
Pieces weight_of(const GroupedProduct& op, const Context& c, const Operands& o) {
  const Piece &dy = gradient(c, o), &x = input(c, o);
  Pieces d{parameter_zeros(c)};
  const Positions expert = experts_of(x, d[0].index[0]);
  const std::size_t out = d[0].index[1].size(), in = d[0].index[2].size();
  for (std::size_t r = 0; r < expert.size(); ++r) {
    add_product(out, in, 1, {dy.values.data() + r * out, 1, out}, {x.values.data() + r * in, in, 1},
                d[0].values.data() + expert[r] * out * in);
  }
  if (op.bias) {
    d.push_back(parameter_zeros(c, 1));
    for (std::size_t i = 0; c.adds_bias && i < dy.values.size(); ++i) {
      d[1].values[expert[i / out] * out + i % out] += dy.values[i];
    }
  }
  return d;
}

/// f(row, token, the row's element of the gates).
template <class F>
void for_each_combined(const Piece& rows, const Piece& gates, F f) {
  const Positions expert = experts_of(rows, gates.index[2]);
  for_each_routed(rows, gates.index[0], gates.index[1], [&](std::size_t r, std::size_t token) {
    f(r, token, token * gates.index[2].size() + expert[r]);
  });
}
Pieces forward_of(const Combine&, const Context& c, const Operands& o) {
  const Piece &x = input(c, o, 0), &gates = input(c, o, 1);
  Piece y = output_zeros(c);
  const std::size_t n = x.index[3].size();
  for_each_combined(x, gates, [&](std::size_t r, std::size_t token, std::size_t gate) {
    for (std::size_t j = 0; j < n; ++j) {
      y.values[token * n + j] += gates.values[gate] * x.values[r * n + j];
    }
  });
  return {std::move(y)};
}
Pieces data_of(const Combine&, const Context& c, const Operands& o) {
  const Piece &x = input(c, o, 0), &gates = input(c, o, 1), &dy = gradient(c, o);
  Piece dx = like(x), d_gates = like(gates);
  const std::size_t n = x.index[3].size();
  for_each_combined(x, gates, [&](std::size_t r, std::size_t token, std::size_t gate) {
    for (std::size_t j = 0; j < n; ++j) {
      const double d = dy.values[token * n + j];
      dx.values[r * n + j] = gates.values[gate] * d;
      d_gates.values[gate] += d * x.values[r * n + j];
    }
  });
  return {std::move(dx), std::move(d_gates)};
}

}  // namespace

Piece zeros(std::vector<std::vector<std::int64_t>> index) {
  Piece p;
  p.values.assign(count(index, 0, index.size()), 0);
  p.index = std::move(index);
  return p;
}

std::vector<std::int64_t> touched(const Context& c, const Operand& operand, std::size_t d) {
  const std::int64_t extent = operand.shape[d].extent;
  if (operand.dims[d] < 0) return all(extent);
  const auto dim = static_cast<std::size_t>(operand.dims[d]);
  const Indices& local = c.indices[dim];
  const Window& w = operand.windows[d];
  if (w.kernel == 1 && w.stride == 1 && w.pad_before == 0 && w.pad_after == 0) return local;
  // Uncut, also the positions that no window reads are held.
  if (static_cast<std::int64_t>(local.size()) == c.signature->dims[dim].extent) return all(extent);
  Indices inputs;
  for (const std::int64_t out : local) {
    for (std::int64_t k = 0; k < w.kernel; ++k) {
      const std::int64_t in = out * w.stride - w.pad_before + k * w.dilation;
      if (in >= 0 && in < extent) inputs.push_back(in);
    }
  }
  std::sort(inputs.begin(), inputs.end());
  inputs.erase(std::unique(inputs.begin(), inputs.end()), inputs.end());
  return inputs;
}

Piece forward_statistic(const Context& c, std::size_t k, const Operands& o) {
  if (const auto* n = std::get_if<Normalize>(c.operation)) return statistic_of(*n, c, k, o);
  const auto* loss = std::get_if<CrossEntropy>(c.operation);
  PARTITA_ASSERT(loss != nullptr, fmt::format("{} has no statistics", kind_name(*c.operation)));
  return statistic_of(*loss, c, k, o);
}

Piece backward_statistic(const Context& c, std::size_t k, const Operands& o) {
  const auto* n = std::get_if<Normalize>(c.operation);
  PARTITA_ASSERT(n != nullptr,
                 fmt::format("{} has no backward statistics", kind_name(*c.operation)));
  return backward_statistic_of(*n, c, k, o);
}

std::vector<Piece> forward(const Context& c, const Operands& o) {
  return std::visit([&](const auto& op) { return forward_of(op, c, o); }, *c.operation);
}

std::vector<Piece> backward_data(const Context& c, const Operands& o) {
  return std::visit([&](const auto& op) { return data_of(op, c, o); }, *c.operation);
}

void round_operand(const Context& c, bool gradient, const std::vector<Row>* rows,
                   std::size_t experts, std::vector<double>& values) {
  if (c.compute != ElementType::fp8) {
    round_values(c.compute, values.data(), values.size());
    return;
  }
  const EightBits format = gradient ? of_gradients(c.fp8_format) : EightBits::e4m3;
  const bool grouped = std::holds_alternative<GroupedProduct>(*c.operation);
  const std::size_t units = !grouped ? 1 : rows != nullptr ? rows->size() : experts;
  if (units == 0) return;
  const std::size_t unit = values.size() / units;
  for (std::size_t first = 0; first < units;) {
    std::size_t end = first + 1;
    while (grouped && rows != nullptr && end < units &&
           (*rows)[end].expert == (*rows)[first].expert)
      ++end;
    round_eights(format, values.data() + first * unit, (end - first) * unit);
    first = end;
  }
}

std::vector<Piece> backward_weight(const Context& c, const Operands& o) {
  if (c.signature->parameters.empty()) return {};
  return std::visit(
      [&](const auto& op) -> Pieces {
        if constexpr (requires { weight_of(op, c, o); }) {
          return weight_of(op, c, o);
        } else {
          throw InternalError(fmt::format("{} has no gradient by weight", kind_name(*c.operation)));
        }
      },
      *c.operation);
}

std::uint64_t random_bits(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  return splitmix(splitmix(splitmix(seed) ^ a) ^ b);
}

double uniform(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  return unit(random_bits(seed, a, b));
}

std::uint64_t dropout_key(std::uint64_t seed, std::int64_t step) {
  constexpr std::uint64_t kDropout = 0x64726f70;
  return random_bits(seed, static_cast<std::uint64_t>(step), kDropout);
}
Dropped::Dropped(const Dropout& op, const Context& c) {
  key = dropout_key(c.seed, c.step);
  // Somebody is always kept.
  below = static_cast<std::uint64_t>(std::min(std::round(op.probability * 0x1p16), 0x1p16 - 1));
  scale = 1 / (1 - static_cast<double>(below) * 0x1p-16);
}
bool Dropped::operator()(std::uint64_t number) const {
  return (splitmix(key ^ number >> 2) >> 16 * (number & 3) & 0xffff) < below;
}
std::uint64_t number_of_row(const Context& c, const Row& row) {
  // Four features that follow one another share a word.
  return random_bits(static_cast<std::uint64_t>(c.first_sample + row.sample),
                     static_cast<std::uint64_t>(row.sequence),
                     static_cast<std::uint64_t>(row.expert)) &
         ~std::uint64_t{3};
}
double normal(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  // Box-Muller; 1 - u lies in (0, 1], where the logarithm is finite.
  const std::uint64_t bits = random_bits(seed, a, b);
  return std::sqrt(-2 * std::log(1 - unit(bits))) * std::cos(2 * kPi * unit(splitmix(bits)));
}

}  // namespace partita::reference
