#include "runtime/cpu/fast.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <unsupported/Eigen/SpecialFunctions>

#include "runtime/cpu/normalisation.h"

namespace partita::cpu {
namespace {

using reference::Context;
using Index = Eigen::Index;
using RowMatrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using In = Eigen::Map<const RowMatrix>;
using Out = Eigen::Map<RowMatrix>;
using Stride = Eigen::OuterStride<>;
using StridedIn = Eigen::Map<const RowMatrix, 0, Stride>;
using StridedOut = Eigen::Map<RowMatrix, 0, Stride>;
using ArrayIn = Eigen::Map<const Eigen::ArrayXf>;
using ArrayOut = Eigen::Map<Eigen::ArrayXf>;

Index extent(const Tensor& t, std::size_t first, std::size_t last) {
  Index n = 1;
  for (std::size_t d = first; d < last; ++d) n *= static_cast<Index>((*t.index)[d].size());
  return n;
}
Index size(const Tensor& t) { return static_cast<Index>(t.size()); }
bool wanted(const Arguments& a, std::size_t k) {
  return k < a.results.size() && static_cast<bool>(a.results[k]);
}

// ---------------------------------------------------------------------------------------- linear

/// Rows, inputs and outputs of the local product.
struct Product {
  Index rows, in, out;
};
Product product_of(const Linear& op, const Tensor& x, const Tensor& w) {
  const std::size_t batch = x.index->size() - static_cast<std::size_t>(op.contracted);
  const Index in = extent(x, batch, x.index->size());
  return {extent(x, 0, batch), in, in == 0 ? 0 : size(w) / in};
}

bool forward(const Linear& op, const Context& c, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &w = a.parameters[0];
  const Product p = product_of(op, x, w);
  Out y(a.results[0].values, p.rows, p.out);
  y.noalias() = In(x.values, p.rows, p.in) * In(w.values, p.out, p.in).transpose();
  if (op.bias && c.adds_bias)
    y.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(a.parameters[1].values, p.out);
  return true;
}
bool data(const Linear&, const Context&, const Arguments& a, Kept&) {
  const Tensor &dy = a.output_gradients[0], &w = a.parameters[0], &dx = a.results[0];
  // dy [rows, out]: everything by division, since the input itself need not be kept.
  const Index weights = size(w), all = size(dx), grads = size(dy);
  if (weights == 0 || all == 0) return false;
  // rows · in = all, rows · out = grads, in · out = weights.
  const auto rows = static_cast<Index>(std::llround(std::sqrt(
      static_cast<double>(all) * static_cast<double>(grads) / static_cast<double>(weights))));
  const Index in = all / rows, out = grads / rows;
  Out y(dx.values, rows, in);
  if (a.accumulate) {
    y.noalias() += In(dy.values, rows, out) * In(w.values, out, in);
  } else {
    y.noalias() = In(dy.values, rows, out) * In(w.values, out, in);
  }
  return true;
}
void add_columns(const float* y, Index rows, Index columns, const Tensor& to, bool accumulate) {
  Eigen::Map<Eigen::RowVectorXf> b(to.values, columns);
  if (!accumulate) b.setZero();
  b += In(y, rows, columns).colwise().sum();
}
bool weight(const Linear& op, const Context& c, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0];
  const std::size_t batch = x.index->size() - static_cast<std::size_t>(op.contracted);
  const Index rows = extent(x, 0, batch), in = extent(x, batch, x.index->size());
  if (rows == 0 || in == 0) return false;
  const Index out = size(dy) / rows;
  if (wanted(a, 0)) {
    Out w(a.results[0].values, out, in);
    if (a.accumulate) {
      w.noalias() += In(dy.values, rows, out).transpose() * In(x.values, rows, in);
    } else {
      w.noalias() = In(dy.values, rows, out).transpose() * In(x.values, rows, in);
    }
  }
  if (op.bias && wanted(a, 1)) {
    if (c.adds_bias) {
      add_columns(dy.values, rows, out, a.results[1], a.accumulate);
    } else if (!a.accumulate) {
      std::fill_n(a.results[1].values, out, 0.0f);
    }
  }
  return true;
}

bool forward(const AddBias&, const Context&, const Arguments& a, Kept&) {
  const Index n = size(a.parameters[0]), rows = size(a.inputs[0]) / std::max<Index>(n, 1);
  Out(a.results[0].values, rows, n) =
      In(a.inputs[0].values, rows, n).rowwise() +
      Eigen::Map<const Eigen::RowVectorXf>(a.parameters[0].values, n);
  return true;
}
bool weight(const AddBias&, const Context&, const Arguments& a, Kept&) {
  const Index n = size(a.results[0]);
  if (n > 0)
    add_columns(a.output_gradients[0].values, size(a.output_gradients[0]) / n, n, a.results[0],
                a.accumulate);
  return true;
}

// ------------------------------------------------------------------------------------ embeddings

/// Position of a global index in a contiguous list; -1 where it is not held.
Index held(const Indices& list, std::int64_t global) {
  if (list.empty() || global < list.front() || global > list.back()) return -1;
  const auto it = std::lower_bound(list.begin(), list.end(), global);
  return *it == global ? it - list.begin() : -1;
}

bool forward(const Embedding&, const Context&, const Arguments& a, Kept&) {
  const Tensor &ids = a.inputs[0], &table = a.parameters[0];
  const Index n = extent(table, 1, 2);
  for (Index i = 0; i < size(ids); ++i) {
    const Index row = held((*table.index)[0], ids.ids[i]);
    float* to = a.results[0].values + i * n;
    if (row < 0) {
      std::fill_n(to, n, 0.0f);
    } else {
      std::copy_n(table.values + row * n, n, to);
    }
  }
  return true;
}
bool weight(const Embedding&, const Context&, const Arguments& a, Kept&) {
  const Tensor &ids = a.inputs[0], &table = a.results[0];
  const Index n = extent(table, 1, 2);
  if (!a.accumulate) std::fill_n(table.values, size(table), 0.0f);
  for (Index i = 0; i < size(ids); ++i) {
    const Index row = held((*table.index)[0], ids.ids[i]);
    if (row < 0) continue;
    ArrayOut(table.values + row * n, n) += ArrayIn(a.output_gradients[0].values + i * n, n);
  }
  return true;
}
bool forward(const PositionEmbedding&, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &table = a.parameters[0];
  const Index n = extent(x, 2, 3), tokens = extent(x, 1, 2);
  for (Index i = 0; i < size(x) / std::max<Index>(n, 1); ++i) {
    const Index row = held((*table.index)[0], (*x.index)[1][static_cast<std::size_t>(i % tokens)]);
    ArrayOut(a.results[0].values + i * n, n) =
        ArrayIn(x.values + i * n, n) + ArrayIn(table.values + row * n, n);
  }
  return true;
}
bool weight(const PositionEmbedding&, const Context&, const Arguments& a, Kept&) {
  const Tensor &dy = a.output_gradients[0], &table = a.results[0];
  const Index n = extent(dy, 2, 3), tokens = extent(dy, 1, 2);
  if (!a.accumulate) std::fill_n(table.values, size(table), 0.0f);
  for (Index i = 0; i < size(dy) / std::max<Index>(n, 1); ++i) {
    const Index row = held((*table.index)[0], (*dy.index)[1][static_cast<std::size_t>(i % tokens)]);
    ArrayOut(table.values + row * n, n) += ArrayIn(dy.values + i * n, n);
  }
  return true;
}

// --------------------------------------------------------------------------------- normalisation

struct Runs : NormalisedRuns {
  /// Offset of repeat r of group g.
  Index at(Index g, Index r) const { return (batch ? r * groups + g : g) * length; }
};

/// Sums of x and x² of every group, in double.
void sums_of(const Runs& r, const float* x, float* sums) {
  for (Index g = 0; g < r.groups; ++g) {
    double sum = 0, square = 0;
    for (Index k = 0; k < r.repeats; ++k) {
      const ArrayIn v(x + r.at(g, k), r.length);
      if (r.width == 2) sum += v.sum();
      square += v.square().sum();
    }
    float* to = sums + g * r.width;
    if (r.width == 2) to[0] = static_cast<float>(sum);
    to[r.width - 1] = static_cast<float>(square);
  }
}

struct Moments {
  float mean, inverse;
};
/// Mean and inverse deviation of every group, the variance from differences to the mean.
void finished_moments(const Normalize& op, const Runs& r, const float* x, float* to) {
  for (Index g = 0; g < r.groups; ++g) {
    double sum = 0, square = 0;
    if (r.width == 2) {
      for (Index k = 0; k < r.repeats; ++k) sum += ArrayIn(x + r.at(g, k), r.length).sum();
    }
    const auto mean = static_cast<float>(sum / r.members);
    for (Index k = 0; k < r.repeats; ++k)
      square += (ArrayIn(x + r.at(g, k), r.length) - mean).square().sum();
    if (r.width == 2) to[g * 2] = mean;
    to[g * r.width + r.width - 1] =
        static_cast<float>(1 / std::sqrt(square / r.members + op.epsilon));
  }
}
Moments moments_of(const Normalize& op, const Runs& r, const Arguments& a, Index g) {
  const float* sums = a.statistics[0].values;
  if (a.whole_statistics) return {r.width == 2 ? sums[g * 2] : 0, sums[g * r.width + r.width - 1]};
  const double mean = r.width == 2 ? static_cast<double>(sums[g * r.width]) / r.members : 0;
  const double square = static_cast<double>(sums[g * r.width + r.width - 1]) / r.members;
  return {static_cast<float>(mean),
          static_cast<float>(1 / std::sqrt(std::max(0.0, square - mean * mean) + op.epsilon))};
}

bool statistic(const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  if (a.whole_statistics) {
    finished_moments(op, r, a.inputs[0].values, a.results[0].values);
  } else {
    sums_of(r, a.inputs[0].values, a.results[0].values);
  }
  return true;
}

bool forward(const Normalize& op, const Context& c, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  Runs r;
  if (!runs_of(op, c, x, r)) return false;
  const float* scale = op.scale ? a.parameters[0].values : nullptr;
  const float* bias = op.bias ? a.parameters[op.scale ? 1 : 0].values : nullptr;
  for (Index g = 0; g < r.groups; ++g) {
    const Moments m = moments_of(op, r, a, g);
    for (Index k = 0; k < r.repeats; ++k) {
      const ArrayIn v(x.values + r.at(g, k), r.length);
      ArrayOut y(a.results[0].values + r.at(g, k), r.length);
      if (r.batch) {
        const float s = scale != nullptr ? scale[g] * m.inverse : m.inverse;
        y = (v - m.mean) * s + (bias != nullptr ? bias[g] : 0.0f);
        continue;
      }
      y = (v - m.mean) * m.inverse;
      if (scale != nullptr) y *= ArrayIn(scale, r.length);
      if (bias != nullptr) y += ArrayIn(bias, r.length);
    }
  }
  return true;
}

bool backward_statistic(const Normalize& op, const Context& c, const Arguments& a) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0];
  Runs r;
  if (!runs_of(op, c, x, r)) return false;
  const float* scale = op.scale ? a.parameters[0].values : nullptr;
  for (Index g = 0; g < r.groups; ++g) {
    const Moments m = moments_of(op, r, a, g);
    double sum = 0, along = 0;
    for (Index k = 0; k < r.repeats; ++k) {
      const ArrayIn v(x.values + r.at(g, k), r.length), d(dy.values + r.at(g, k), r.length);
      if (scale != nullptr && !r.batch) {
        const auto scaled = d * ArrayIn(scale, r.length);
        if (r.width == 2) sum += scaled.sum();
        along += (scaled * (v - m.mean)).sum();
      } else {
        if (r.width == 2) sum += d.sum();
        along += (d * (v - m.mean)).sum();
      }
    }
    const double factor = scale != nullptr && r.batch ? static_cast<double>(scale[g]) : 1;
    float* to = a.results[0].values + g * r.width;
    if (r.width == 2) to[0] = static_cast<float>(sum * factor);
    to[r.width - 1] = static_cast<float>(along * static_cast<double>(m.inverse) * factor);
  }
  return true;
}

bool data(const Normalize& op, const Context& c, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0];
  Runs r;
  if (!runs_of(op, c, x, r)) return false;
  const float* scale = op.scale ? a.parameters[0].values : nullptr;
  const float* sums = a.backward_statistics[0].values;
  for (Index g = 0; g < r.groups; ++g) {
    const Moments m = moments_of(op, r, a, g);
    const auto mean = r.width == 2
                          ? static_cast<float>(static_cast<double>(sums[g * r.width]) / r.members)
                          : 0.0f;
    const auto along =
        static_cast<float>(static_cast<double>(sums[g * r.width + r.width - 1]) / r.members);
    for (Index k = 0; k < r.repeats; ++k) {
      const ArrayIn v(x.values + r.at(g, k), r.length), d(dy.values + r.at(g, k), r.length);
      ArrayOut dx(a.results[0].values + r.at(g, k), r.length);
      const auto hat = (v - m.mean) * m.inverse;
      if (scale == nullptr) {
        dx = m.inverse * (d - mean - hat * along);
      } else if (r.batch) {
        dx = m.inverse * (d * scale[g] - mean - hat * along);
      } else {
        dx = m.inverse * (d * ArrayIn(scale, r.length) - mean - hat * along);
      }
    }
  }
  return true;
}

bool weight(const Normalize& op, const Context& c, const Arguments& a, Kept& kept) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0];
  Runs r;
  if (!runs_of(op, c, x, r)) return false;
  const Index n = r.batch ? r.groups : r.length;
  kept.space.assign(static_cast<std::size_t>(2 * n), 0.0f);
  ArrayOut d_scale(kept.space.data(), n), d_bias(kept.space.data() + n, n);
  for (Index g = 0; g < r.groups; ++g) {
    const Moments m = moments_of(op, r, a, g);
    for (Index k = 0; k < r.repeats; ++k) {
      const ArrayIn v(x.values + r.at(g, k), r.length), d(dy.values + r.at(g, k), r.length);
      if (r.batch) {
        d_scale[g] += (d * (v - m.mean)).sum() * m.inverse;
        d_bias[g] += d.sum();
      } else {
        d_scale += d * (v - m.mean) * m.inverse;
        d_bias += d;
      }
    }
  }
  const auto put = [&](const ArrayOut& from, std::size_t k) {
    if (!wanted(a, k)) return;
    ArrayOut to(a.results[k].values, n);
    if (a.accumulate) {
      to += from;
    } else {
      to = from;
    }
  };
  if (op.scale) put(d_scale, 0);
  if (op.bias) put(d_bias, op.scale ? 1 : 0);
  return true;
}

// ---------------------------------------------------------------------------------- element-wise

constexpr float kRoot2 = 1.41421356237309505f, kInverseRoot2Pi = 0.39894228040143268f,
                kRoot2OverPi = 0.79788456080286536f;

/// Value and slope of an activation over a piece of an array that stays in the cache.
struct Curve {
  Eigen::ArrayXf value, slope;
};
constexpr Index kPiece = 1024;

void curve(ActivationKind kind, const ArrayIn& x, Curve& c) {
  using Eigen::ArrayXf;
  switch (kind) {
    case ActivationKind::relu:
      c.value = x.max(0.0f);
      c.slope = (x > 0).cast<float>();
      return;
    case ActivationKind::squared_relu:
      c.value = x.max(0.0f).square();
      c.slope = 2 * x.max(0.0f);
      return;
    case ActivationKind::gelu:
      c.slope = 0.5f * (1 + (x / kRoot2).erf());
      c.value = x * c.slope;
      c.slope += x * (-0.5f * x.square()).exp() * kInverseRoot2Pi;
      return;
    case ActivationKind::gelu_tanh: {
      const ArrayXf t = (kRoot2OverPi * (x + 0.044715f * x.cube())).tanh();
      c.value = 0.5f * x * (1 + t);
      c.slope = 0.5f * (1 + t) +
                0.5f * x * (1 - t.square()) * kRoot2OverPi * (1 + 3 * 0.044715f * x.square());
      return;
    }
    case ActivationKind::silu: {
      const ArrayXf s = (1 + (-x).exp()).inverse();
      c.value = x * s;
      c.slope = s * (1 + x * (1 - s));
      return;
    }
    case ActivationKind::sigmoid:
      c.value = (1 + (-x).exp()).inverse();
      c.slope = c.value * (1 - c.value);
      return;
    case ActivationKind::tanh:
      c.value = x.tanh();
      c.slope = 1 - c.value.square();
      return;
  }
}
/// f(offset, length, curve of that piece).
template <class F>
void for_each_piece(ActivationKind kind, const float* x, Index n, F f) {
  Curve c;
  for (Index at = 0; at < n; at += kPiece) {
    const Index length = std::min(kPiece, n - at);
    curve(kind, ArrayIn(x + at, length), c);
    f(at, length, c);
  }
}

/// Where result k goes: the caller's memory, or, beside an operand of rows, rows like its own.
float* result_of(const Arguments& a, std::size_t k, const Tensor& like, Kept& kept) {
  if (like.rows == nullptr) return a.results[k].values;
  if (kept.routed.size() < a.results.size()) kept.routed.resize(a.results.size());
  RoutedResult& r = kept.routed[k];
  r.rows = *like.rows;
  r.values.resize(static_cast<std::size_t>(like.size()));
  return r.values.data();
}

bool forward(const Activation& op, const Context&, const Arguments& a, Kept& kept) {
  const Tensor& x = a.inputs[0];
  float* y = result_of(a, 0, x, kept);
  for_each_piece(op.kind, x.values, size(x),
                 [&](Index at, Index n, const Curve& c) { ArrayOut(y + at, n) = c.value; });
  return true;
}
bool data(const Activation& op, const Context&, const Arguments& a, Kept& kept) {
  const Tensor& x = op.kind == ActivationKind::relu ? a.outputs[0] : a.inputs[0];
  float* dx = result_of(a, 0, x, kept);
  for_each_piece(op.kind, x.values, size(x), [&](Index at, Index n, const Curve& c) {
    ArrayOut(dx + at, n) = ArrayIn(a.output_gradients[0].values + at, n) * c.slope;
  });
  return true;
}
bool forward(const GatedActivation& op, const Context&, const Arguments& a, Kept& kept) {
  const Tensor& x = a.inputs[0];
  float* y = result_of(a, 0, x, kept);
  for_each_piece(op.kind, x.values, size(x), [&](Index at, Index n, const Curve& c) {
    ArrayOut(y + at, n) = c.value * ArrayIn(a.inputs[1].values + at, n);
  });
  return true;
}
bool data(const GatedActivation& op, const Context&, const Arguments& a, Kept& kept) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const Tensor& x = a.inputs[0];
  float *d0 = result_of(a, 0, x, kept), *d1 = result_of(a, 1, x, kept);
  for_each_piece(op.kind, x.values, size(x), [&](Index at, Index n, const Curve& c) {
    const ArrayIn dy(a.output_gradients[0].values + at, n);
    ArrayOut(d0 + at, n) = dy * ArrayIn(a.inputs[1].values + at, n) * c.slope;
    ArrayOut(d1 + at, n) = dy * c.value;
  });
  return true;
}
/// Sums pass their gradient on.
bool copied(const Arguments& a, Kept& kept) {
  const Tensor& dy = a.output_gradients[0];
  for (std::size_t k = 0; k < a.results.size(); ++k) {
    if (a.results[k]) std::copy_n(dy.values, size(dy), result_of(a, k, dy, kept));
  }
  return true;
}
bool data(const AddBias&, const Context&, const Arguments& a, Kept& kept) {
  return copied(a, kept);
}
bool data(const PositionEmbedding&, const Context&, const Arguments& a, Kept& kept) {
  return copied(a, kept);
}
bool data(const Add&, const Context&, const Arguments& a, Kept& kept) { return copied(a, kept); }
bool forward(const Add&, const Context&, const Arguments& a, Kept& kept) {
  const Index n = size(a.inputs[0]);
  ArrayOut(result_of(a, 0, a.inputs[0], kept), n) =
      ArrayIn(a.inputs[0].values, n) + ArrayIn(a.inputs[1].values, n);
  return true;
}
bool forward(const Multiply&, const Context&, const Arguments& a, Kept& kept) {
  const Index n = size(a.inputs[0]);
  ArrayOut(result_of(a, 0, a.inputs[0], kept), n) =
      ArrayIn(a.inputs[0].values, n) * ArrayIn(a.inputs[1].values, n);
  return true;
}
bool data(const Multiply&, const Context&, const Arguments& a, Kept& kept) {
  const Tensor& g = a.output_gradients[0];
  const Index n = size(g);
  const ArrayIn dy(g.values, n);
  for (std::size_t k = 0; k < 2; ++k) {
    if (wanted(a, k))
      ArrayOut(result_of(a, k, g, kept), n) = dy * ArrayIn(a.inputs[1 - k].values, n);
  }
  return true;
}

/// Keeps what the reference keeps.
bool dropped(const Dropout& op, const Context& c, const Tensor& x, const float* from, float* to) {
  const reference::Dropped left_out(op, c);
  const auto scale = static_cast<float>(left_out.scale);
  const Indices& last = x.index->back();
  const auto n = static_cast<Index>(last.size());
  const auto apply = [&](Index line, std::uint64_t first) {
    for (Index j = 0; j < n; ++j) {
      const auto number = first + static_cast<std::uint64_t>(last[static_cast<std::size_t>(j)]);
      to[line * n + j] = left_out(number) ? 0.0f : from[line * n + j] * scale;
    }
  };
  const Index lines = n == 0 ? 0 : size(x) / n;
  if (x.rows != nullptr) {
    for (Index line = 0; line < lines; ++line)
      apply(line, reference::number_of_row(c, (*x.rows)[static_cast<std::size_t>(line)]));
    return true;
  }
  const Shape& shape = c.signature->outputs[0].shape;
  if (shape.back().dim == Dim::sample) return false;
  const std::size_t dims = shape.size();
  for (Index line = 0; line < lines; ++line) {
    std::int64_t sample = c.first_sample, place = 0, of_sample = shape.back().extent;
    Index inner = lines, rest = line;
    for (std::size_t d = 0; d + 1 < dims; ++d) {
      const Indices& list = (*x.index)[d];
      inner /= static_cast<Index>(list.size());
      const std::int64_t global = list[static_cast<std::size_t>(rest / inner)];
      rest %= inner;
      if (shape[d].dim == Dim::sample) {
        sample += global;
      } else {
        place = place * shape[d].extent + global;
        of_sample *= shape[d].extent;
      }
    }
    apply(line, static_cast<std::uint64_t>(sample * of_sample + place * shape.back().extent));
  }
  return true;
}
bool forward(const Dropout& op, const Context& c, const Arguments& a, Kept& kept) {
  const Tensor& x = a.inputs[0];
  return dropped(op, c, x, x.values, result_of(a, 0, x, kept));
}
bool data(const Dropout& op, const Context& c, const Arguments& a, Kept& kept) {
  const Tensor& dy = a.output_gradients[0];
  return dropped(op, c, dy, dy.values, result_of(a, 0, dy, kept));
}

/// Turns each pair by `direction` times its angle; the table holds cosines and sines by position.
bool rotate(const Rotary& op, const float* from, const Tensor& to, float direction, Kept& kept) {
  if (to.rows != nullptr) return false;
  const std::size_t dims = to.index->size();
  const Index tokens = extent(to, 1, 2), width = extent(to, dims - 1, dims);
  const Index inner = extent(to, 2, dims), half = op.rotated / 2;
  if (width % op.head_dim != 0) return false;
  if (kept.table.empty()) {
    kept.table.resize(static_cast<std::size_t>(2 * tokens * half));
    for (Index t = 0; t < tokens; ++t) {
      for (Index r = 0; r < half; ++r) {
        const double angle =
            std::pow(op.base, -2 * static_cast<double>(r) / static_cast<double>(op.rotated)) *
            static_cast<double>((*to.index)[1][static_cast<std::size_t>(t)]);
        kept.table[static_cast<std::size_t>(2 * (t * half + r))] =
            static_cast<float>(std::cos(angle));
        kept.table[static_cast<std::size_t>(2 * (t * half + r) + 1)] =
            static_cast<float>(std::sin(angle));
      }
    }
  }
  const Index heads = inner / op.head_dim, still = op.head_dim - op.rotated;
  for (Index token = 0; token < size(to) / std::max<Index>(inner, 1); ++token) {
    const float* turn = kept.table.data() + 2 * (token % tokens) * half;
    for (Index h = 0; h < heads; ++h) {
      const float* x = from + token * inner + h * op.head_dim;
      float* y = to.values + token * inner + h * op.head_dim;
      std::copy_n(x, still, y);
      for (Index r = 0; r < half; ++r) {
        const float c = turn[2 * r], s = direction * turn[2 * r + 1];
        const float u = x[still + r], v = x[still + r + half];
        y[still + r] = u * c - v * s;
        y[still + r + half] = v * c + u * s;
      }
    }
  }
  return true;
}
bool forward(const Rotary& op, const Context&, const Arguments& a, Kept& kept) {
  return rotate(op, a.inputs[0].values, a.results[0], 1, kept);
}
bool data(const Rotary& op, const Context&, const Arguments& a, Kept& kept) {
  return rotate(op, a.output_gradients[0].values, a.results[0], -1, kept);
}

// ------------------------------------------------------------------------------------- attention

/// Queries are worked on in tiles of this many: a tile's scores stay in the cache.
constexpr Index kTile = 64;

/// Where the vectors of one (sample, head, query of the group) lie, and which keys a tile sees.
struct Heads {
  Index samples, queries, keys, heads, group, width, v_width;
  float scale;
  const Indices *query_at, *key_at;
};
Heads heads_of(const Attention& op, const Tensor& q, const Tensor& k) {
  Heads h;
  h.samples = extent(q, 0, 1);
  h.queries = extent(q, 1, 2);
  h.keys = extent(k, 1, 2);
  h.heads = extent(q, 2, 3);
  h.group = op.queries_per_head;
  h.width = op.qk_dim;
  h.v_width = op.v_dim;
  h.scale =
      static_cast<float>(op.scale != 0 ? op.scale : 1 / std::sqrt(static_cast<double>(op.qk_dim)));
  h.query_at = &(*q.index)[1];
  h.key_at = &(*k.index)[1];
  return h;
}

/// Keys [first, last) that some query of the tile sees.
std::pair<Index, Index> seen(const Attention& op, const Heads& h, Index tile, Index rows) {
  Index first = 0, last = h.keys;
  const std::int64_t low = (*h.query_at)[static_cast<std::size_t>(tile)],
                     high = (*h.query_at)[static_cast<std::size_t>(tile + rows - 1)];
  if (op.causal)
    last = std::upper_bound(h.key_at->begin(), h.key_at->end(), high) - h.key_at->begin();
  if (op.window > 0)
    first =
        std::upper_bound(h.key_at->begin(), h.key_at->end(), low - op.window) - h.key_at->begin();
  return {std::min(first, last), last};
}

/// Scores that a query does not see become -inf.
void mask(const Attention& op, const Heads& h, Index tile, Index first, RowMatrix& s) {
  if (!op.causal && op.window == 0) return;
  for (Index i = 0; i < s.rows(); ++i) {
    const std::int64_t here = (*h.query_at)[static_cast<std::size_t>(tile + i)];
    for (Index j = 0; j < s.cols(); ++j) {
      const std::int64_t there = (*h.key_at)[static_cast<std::size_t>(first + j)];
      if ((op.causal && there > here) || (op.window > 0 && there <= here - op.window))
        s(i, j) = -std::numeric_limits<float>::infinity();
    }
  }
}

/// f(sample, head, query of the group, tile's first query, rows).
template <class F>
void for_each_tile(const Heads& h, F f) {
  for (Index b = 0; b < h.samples; ++b) {
    for (Index k = 0; k < h.heads; ++k) {
      for (Index g = 0; g < h.group; ++g) {
        for (Index t = 0; t < h.queries; t += kTile) f(b, k, g, t, std::min(kTile, h.queries - t));
      }
    }
  }
}

bool forward(const Attention& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2];
  const Heads h = heads_of(op, q, k);
  const Index q_row = h.heads * h.group * h.width, k_row = h.heads * h.width,
              v_row = h.heads * h.v_width, y_row = h.heads * h.group * h.v_width;
  RowMatrix s;
  for_each_tile(h, [&](Index b, Index head, Index g, Index t, Index rows) {
    const auto [first, last] = seen(op, h, t, rows);
    StridedOut y(
        a.results[0].values + (b * h.queries + t) * y_row + (head * h.group + g) * h.v_width, rows,
        h.v_width, Stride(y_row));
    const StridedIn qs(q.values + (b * h.queries + t) * q_row + (head * h.group + g) * h.width,
                       rows, h.width, Stride(q_row));
    const StridedIn ks(k.values + (b * h.keys + first) * k_row + head * h.width, last - first,
                       h.width, Stride(k_row));
    s.noalias() = h.scale * (qs * ks.transpose());
    mask(op, h, t, first, s);
    for (Index i = 0; i < rows; ++i) {
      auto line = s.row(i).array();
      float top = s.cols() > 0 ? line.maxCoeff() : -std::numeric_limits<float>::infinity();
      const float sink = op.sinks ? a.parameters[0].values[head * h.group + g] : 0;
      if (op.sinks) top = std::max(top, sink);
      if (std::isinf(top)) top = 0;
      line = (line - top).exp();
      float total = line.sum();
      if (op.sinks) total += std::exp(sink - top);
      if (total > 0) line /= total;
      if (!op.materialised && !a.extras.empty() && a.extras[0].values != nullptr) {
        // [sample, head, query of the group, query]
        a.extras[0].values[((b * h.heads + head) * h.group + g) * h.queries + t + i] =
            total > 0 ? top + std::log(total) : -std::numeric_limits<float>::infinity();
      }
    }
    if (op.materialised && !a.extras.empty() && a.extras[0].values != nullptr) {
      Out p(a.extras[0].values + (((b * h.heads + head) * h.group + g) * h.queries + t) * h.keys,
            rows, h.keys);
      p.setZero();
      p.middleCols(first, last - first) = s;
    }
    const StridedIn vs(v.values + (b * h.keys + first) * v_row + head * h.v_width, last - first,
                       h.v_width, Stride(v_row));
    y.noalias() = s * vs;
  });
  return true;
}

bool data(const Attention& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2], &dy = a.output_gradients[0];
  if (a.extras.empty() || a.extras[0].values == nullptr) return false;
  const Heads h = heads_of(op, q, k);
  const Index q_row = h.heads * h.group * h.width, k_row = h.heads * h.width,
              v_row = h.heads * h.v_width, y_row = h.heads * h.group * h.v_width;
  std::vector<float> unwanted;
  const auto result = [&](std::size_t r, const Tensor& like) {
    if (!wanted(a, r)) {
      unwanted.resize(std::max(unwanted.size(), static_cast<std::size_t>(like.size())));
      return unwanted.data();
    }
    std::fill_n(a.results[r].values, size(like), 0.0f);
    return a.results[r].values;
  };
  if (!wanted(a, 0) || !wanted(a, 1) || !wanted(a, 2)) return false;
  float *dq = result(0, q), *dk = result(1, k), *dv = result(2, v);
  RowMatrix p, dp;
  for_each_tile(h, [&](Index b, Index head, Index g, Index t, Index rows) {
    const auto [first, last] = seen(op, h, t, rows);
    if (first == last) return;
    const Index q_at = (b * h.queries + t) * q_row + (head * h.group + g) * h.width;
    const Index y_at = (b * h.queries + t) * y_row + (head * h.group + g) * h.v_width;
    const Index k_at = (b * h.keys + first) * k_row + head * h.width;
    const Index v_at = (b * h.keys + first) * v_row + head * h.v_width;
    const StridedIn qs(q.values + q_at, rows, h.width, Stride(q_row));
    const StridedIn ks(k.values + k_at, last - first, h.width, Stride(k_row));
    const StridedIn vs(v.values + v_at, last - first, h.v_width, Stride(v_row));
    const StridedIn ds(dy.values + y_at, rows, h.v_width, Stride(y_row));
    const Index line = ((b * h.heads + head) * h.group + g) * h.queries + t;
    if (op.materialised) {
      p = In(a.extras[0].values + line * h.keys, rows, h.keys).middleCols(first, last - first);
    } else {
      p.noalias() = h.scale * (qs * ks.transpose());
      mask(op, h, t, first, p);
      for (Index i = 0; i < rows; ++i) {
        const float lse = a.extras[0].values[line + i];
        if (std::isinf(lse)) {
          p.row(i).setZero();
        } else {
          p.row(i).array() = (p.row(i).array() - lse).exp();
        }
      }
    }
    StridedOut(dv + v_at, last - first, h.v_width, Stride(v_row)).noalias() += p.transpose() * ds;
    dp.noalias() = ds * vs.transpose();
    for (Index i = 0; i < rows; ++i) {
      const float mean = (p.row(i).array() * dp.row(i).array()).sum();
      p.row(i).array() *= (dp.row(i).array() - mean) * h.scale;
    }
    StridedOut(dq + q_at, rows, h.width, Stride(q_row)).noalias() = p * ks;
    StridedOut(dk + k_at, last - first, h.width, Stride(k_row)).noalias() += p.transpose() * qs;
  });
  return true;
}

/// Adds one part of keys and values to y and its log-sum-exp: runtime/reference/ring_attention.h.
void attend(const Attention& op, const Arguments& a) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2];
  const Heads h = heads_of(op, q, k);
  const Index q_row = h.heads * h.group * h.width, k_row = h.heads * h.width,
              v_row = h.heads * h.v_width, y_row = h.heads * h.group * h.v_width;
  RowMatrix s;
  for_each_tile(h, [&](Index b, Index head, Index g, Index t, Index rows) {
    const auto [first, last] = seen(op, h, t, rows);
    if (first == last) return;
    StridedOut y(
        a.results[0].values + (b * h.queries + t) * y_row + (head * h.group + g) * h.v_width, rows,
        h.v_width, Stride(y_row));
    const StridedIn qs(q.values + (b * h.queries + t) * q_row + (head * h.group + g) * h.width,
                       rows, h.width, Stride(q_row));
    const StridedIn ks(k.values + (b * h.keys + first) * k_row + head * h.width, last - first,
                       h.width, Stride(k_row));
    const StridedIn vs(v.values + (b * h.keys + first) * v_row + head * h.v_width, last - first,
                       h.v_width, Stride(v_row));
    s.noalias() = h.scale * (qs * ks.transpose());
    mask(op, h, t, first, s);
    float* lse = a.extras[0].values + ((b * h.heads + head) * h.group + g) * h.queries + t;
    for (Index i = 0; i < rows; ++i) {
      auto line = s.row(i).array();
      const float top = line.maxCoeff();
      if (std::isinf(top)) {  // sees nothing of this part
        line.setZero();
        continue;
      }
      line = (line - top).exp();
      const float sum = line.sum(), here = top + std::log(sum), before = lse[i];
      const float high = std::max(here, before);
      const float total = high + std::log(std::exp(here - high) + std::exp(before - high));
      line *= std::exp(here - total) / sum;
      y.row(i) *= std::exp(before - total);
      lse[i] = total;
    }
    y.noalias() += s * vs;
  });
}
/// Adds one part's gradients.
void attend_backward(const Attention& op, const Arguments& a) {
  const Tensor &q = a.inputs[0], &k = a.inputs[1], &v = a.inputs[2], &dy = a.output_gradients[0];
  const Heads h = heads_of(op, q, k);
  const Index q_row = h.heads * h.group * h.width, k_row = h.heads * h.width,
              v_row = h.heads * h.v_width, y_row = h.heads * h.group * h.v_width;
  RowMatrix p, dp;
  for_each_tile(h, [&](Index b, Index head, Index g, Index t, Index rows) {
    const auto [first, last] = seen(op, h, t, rows);
    if (first == last) return;
    const Index q_at = (b * h.queries + t) * q_row + (head * h.group + g) * h.width;
    const Index y_at = (b * h.queries + t) * y_row + (head * h.group + g) * h.v_width;
    const Index k_at = (b * h.keys + first) * k_row + head * h.width;
    const Index v_at = (b * h.keys + first) * v_row + head * h.v_width;
    const StridedIn qs(q.values + q_at, rows, h.width, Stride(q_row));
    const StridedIn ks(k.values + k_at, last - first, h.width, Stride(k_row));
    const StridedIn vs(v.values + v_at, last - first, h.v_width, Stride(v_row));
    const StridedIn ds(dy.values + y_at, rows, h.v_width, Stride(y_row));
    const StridedIn y(a.outputs[0].values + y_at, rows, h.v_width, Stride(y_row));
    const float* lse = a.extras[0].values + ((b * h.heads + head) * h.group + g) * h.queries + t;
    p.noalias() = h.scale * (qs * ks.transpose());
    mask(op, h, t, first, p);
    for (Index i = 0; i < rows; ++i) {
      if (std::isinf(lse[i])) {
        p.row(i).setZero();
      } else {
        p.row(i).array() = (p.row(i).array() - lse[i]).exp();
      }
    }
    StridedOut(a.results[2].values + v_at, last - first, h.v_width, Stride(v_row)).noalias() +=
        p.transpose() * ds;
    dp.noalias() = ds * vs.transpose();
    for (Index i = 0; i < rows; ++i) {
      const float along = (ds.row(i).array() * y.row(i).array()).sum();
      p.row(i).array() *= (dp.row(i).array() - along) * h.scale;
    }
    StridedOut(a.results[0].values + q_at, rows, h.width, Stride(q_row)).noalias() += p * ks;
    StridedOut(a.results[1].values + k_at, last - first, h.width, Stride(k_row)).noalias() +=
        p.transpose() * qs;
  });
}

bool forward(const BatchedProduct&, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &w = a.inputs[1];
  const std::size_t dims = x.index->size();
  const Index m = extent(x, dims - 2, dims - 1), k = extent(x, dims - 1, dims),
              n = extent(w, dims - 1, dims);
  for (Index i = 0; i < extent(x, 0, dims - 2); ++i)
    Out(a.results[0].values + i * m * n, m, n).noalias() =
        In(x.values + i * m * k, m, k) * In(w.values + i * k * n, k, n);
  return true;
}
bool data(const BatchedProduct&, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &w = a.inputs[1];
  const std::size_t dims = x.index->size();
  const Index m = extent(x, dims - 2, dims - 1), k = extent(x, dims - 1, dims),
              n = extent(w, dims - 1, dims);
  for (Index i = 0; i < extent(x, 0, dims - 2); ++i) {
    const In dy(a.output_gradients[0].values + i * m * n, m, n);
    if (wanted(a, 0))
      Out(a.results[0].values + i * m * k, m, k).noalias() =
          dy * In(w.values + i * k * n, k, n).transpose();
    if (wanted(a, 1))
      Out(a.results[1].values + i * k * n, k, n).noalias() =
          In(x.values + i * m * k, m, k).transpose() * dy;
  }
  return true;
}

bool forward(const Softmax&, const Context&, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  const Index n = extent(x, x.index->size() - 1, x.index->size());
  for (Index i = 0; n > 0 && i < size(x); i += n) {
    const ArrayIn line(x.values + i, n);
    ArrayOut y(a.results[0].values + i, n);
    y = (line - line.maxCoeff()).exp();
    y /= y.sum();
  }
  return true;
}
bool data(const Softmax&, const Context&, const Arguments& a, Kept&) {
  const Tensor& y = a.outputs[0];
  const Index n = extent(y, y.index->size() - 1, y.index->size());
  for (Index i = 0; n > 0 && i < size(y); i += n) {
    const ArrayIn p(y.values + i, n), dy(a.output_gradients[0].values + i, n);
    ArrayOut(a.results[0].values + i, n) = p * (dy - (p * dy).sum());
  }
  return true;
}

// ---------------------------------------------------------------------------------------- losses

bool statistic(const CrossEntropy&, std::size_t k, const Arguments& a) {
  const Tensor &x = a.inputs[0], &labels = a.inputs[1];
  const Index n = extent(x, x.index->size() - 1, x.index->size());
  float* s = a.results[0].values;
  for (Index row = 0; row < size(labels); ++row) {
    const ArrayIn line(x.values + row * n, n);
    if (k == 0) {
      s[row] = n > 0 ? line.maxCoeff() : -std::numeric_limits<float>::infinity();
      continue;
    }
    s[2 * row] = (line - a.statistics[0].values[row]).exp().sum();
    const Index at = held(x.index->back(), labels.ids[row]);
    s[2 * row + 1] = at < 0 ? 0 : line[at];
  }
  return true;
}
bool forward(const CrossEntropy&, const Context& c, const Arguments& a, Kept&) {
  const float *top = a.statistics[0].values, *sums = a.statistics[1].values;
  double loss = 0;
  for (Index row = 0; row < size(a.inputs[1]); ++row)
    loss += static_cast<double>(std::log(sums[2 * row]) + (top[row] - sums[2 * row + 1]));
  a.results[0].values[0] = static_cast<float>(loss * c.loss_scale);
  return true;
}
/// Gradient of the loss: 1 where it is the end of the network.
float above(const Arguments& a) {
  return a.output_gradients.empty() || !a.output_gradients[0] ? 1 : a.output_gradients[0].values[0];
}
bool data(const CrossEntropy&, const Context& c, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &labels = a.inputs[1];
  const float *top = a.statistics[0].values, *sums = a.statistics[1].values;
  const auto d = static_cast<float>(static_cast<double>(above(a)) * c.loss_scale);
  const Index n = extent(x, x.index->size() - 1, x.index->size());
  for (Index row = 0; row < size(labels); ++row) {
    ArrayOut dx(a.results[0].values + row * n, n);
    dx = (ArrayIn(x.values + row * n, n) - top[row]).exp() * (d / sums[2 * row]);
    const Index at = held(x.index->back(), labels.ids[row]);
    if (at >= 0) dx[at] -= d;
  }
  return true;
}
bool forward(const MeanSquaredError&, const Context& c, const Arguments& a, Kept&) {
  const Index n = size(a.inputs[0]);
  const float sum =
      (ArrayIn(a.inputs[0].values, n) - ArrayIn(a.inputs[1].values, n)).square().sum();
  a.results[0].values[0] = static_cast<float>(static_cast<double>(sum) * c.loss_scale);
  return true;
}
bool data(const MeanSquaredError&, const Context& c, const Arguments& a, Kept&) {
  const Index n = size(a.inputs[0]);
  const auto d = static_cast<float>(2 * static_cast<double>(above(a)) * c.loss_scale);
  ArrayOut(a.results[0].values, n) =
      d * (ArrayIn(a.inputs[0].values, n) - ArrayIn(a.inputs[1].values, n));
  return true;
}

// ---------------------------------------------------------------------------------------- images

bool forward(const Convolution&, const Context& c, const Arguments& a, Kept& kept) {
  return convolve(c, a, kept, ConvolutionPass::forward);
}
bool data(const Convolution&, const Context& c, const Arguments& a, Kept& kept) {
  return convolve(c, a, kept, ConvolutionPass::data);
}
bool weight(const Convolution&, const Context& c, const Arguments& a, Kept& kept) {
  return convolve(c, a, kept, ConvolutionPass::weight);
}

/// The local window: input positions of output o are first + o · stride + k · dilation, those
/// outside [0, inputs) are padding.
struct Local {
  Index outputs, inputs, first, kernel, stride, dilation;
};
Local local_of(const Window& w, const Indices& x, const Indices& y) {
  return {static_cast<Index>(y.size()),
          static_cast<Index>(x.size()),
          y.empty() || x.empty() ? 0 : y.front() * w.stride - w.pad_before - x.front(),
          w.kernel,
          w.stride,
          w.dilation};
}
/// f(input position) for the kernel's positions inside the image.
template <class F>
void inside(const Local& l, Index out, F f) {
  for (Index k = 0; k < l.kernel; ++k) {
    const Index in = l.first + out * l.stride + k * l.dilation;
    if (in >= 0 && in < l.inputs) f(in);
  }
}
template <class F>
void for_each_pool(const Pool& op, const Tensor& x, const Tensor& y, F f) {
  const Local h = local_of(op.height, (*x.index)[2], (*y.index)[2]),
              w = local_of(op.width, (*x.index)[3], (*y.index)[3]);
  const Index x_plane = h.inputs * w.inputs, y_plane = h.outputs * w.outputs;
  for (Index plane = 0; plane < extent(y, 0, 2); ++plane) {
    for (Index i = 0; i < h.outputs; ++i) {
      for (Index j = 0; j < w.outputs; ++j)
        f(h, w, plane * x_plane, i, j, plane * y_plane + i * w.outputs + j);
    }
  }
}
bool forward(const Pool& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &y = a.results[0];
  for_each_pool(
      op, x, y, [&](const Local& h, const Local& w, Index from, Index i, Index j, Index to) {
        float top = -std::numeric_limits<float>::infinity(), sum = 0;
        Index n = 0;
        inside(h, i, [&](Index r) {
          inside(w, j, [&](Index s) {
            const float v = x.values[from + r * w.inputs + s];
            top = std::max(top, v);
            sum += v;
            ++n;
          });
        });
        const Index divisor = op.count_padding ? h.kernel * w.kernel : std::max<Index>(n, 1);
        y.values[to] = op.maximum ? top : sum / static_cast<float>(divisor);
      });
  return true;
}
bool data(const Pool& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &dy = a.output_gradients[0], &dx = a.results[0];
  std::fill_n(dx.values, size(dx), 0.0f);
  for_each_pool(
      op, dx, dy, [&](const Local& h, const Local& w, Index from, Index i, Index j, Index at) {
        Index best = -1, n = 0;
        inside(h, i, [&](Index r) {
          inside(w, j, [&](Index s) {
            const Index here = from + r * w.inputs + s;
            if (op.maximum && (best < 0 || a.inputs[0].values[here] > a.inputs[0].values[best]))
              best = here;
            ++n;
          });
        });
        if (op.maximum) {
          if (best >= 0) dx.values[best] += dy.values[at];
          return;
        }
        const Index divisor = op.count_padding ? h.kernel * w.kernel : std::max<Index>(n, 1);
        const float part = dy.values[at] / static_cast<float>(divisor);
        inside(h, i, [&](Index r) {
          inside(w, j, [&](Index s) { dx.values[from + r * w.inputs + s] += part; });
        });
      });
  return true;
}

bool forward(const GlobalAveragePool&, const Context& c, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  const Shape& whole = c.signature->inputs[0].shape;
  const auto all = static_cast<float>(whole[2].extent * whole[3].extent);
  const Index plane = extent(x, 2, 4);
  for (Index i = 0; i < extent(x, 0, 2); ++i)
    a.results[0].values[i] = ArrayIn(x.values + i * plane, plane).sum() / all;
  return true;
}
bool data(const GlobalAveragePool&, const Context& c, const Arguments& a, Kept&) {
  const Tensor& dx = a.results[0];
  const Shape& whole = c.signature->inputs[0].shape;
  const auto all = static_cast<float>(whole[2].extent * whole[3].extent);
  const Index plane = extent(dx, 2, 4);
  for (Index i = 0; i < extent(dx, 0, 2); ++i)
    std::fill_n(dx.values + i * plane, plane, a.output_gradients[0].values[i] / all);
  return true;
}

bool forward(const ScaleFeatures&, const Context&, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  const Index plane = extent(x, 2, 4);
  for (Index i = 0; i < extent(x, 0, 2); ++i)
    ArrayOut(a.results[0].values + i * plane, plane) =
        ArrayIn(x.values + i * plane, plane) * a.inputs[1].values[i];
  return true;
}
bool data(const ScaleFeatures&, const Context&, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  const Index plane = extent(x, 2, 4);
  for (Index i = 0; i < extent(x, 0, 2); ++i) {
    const ArrayIn dy(a.output_gradients[0].values + i * plane, plane);
    if (wanted(a, 0)) ArrayOut(a.results[0].values + i * plane, plane) = dy * a.inputs[1].values[i];
    if (wanted(a, 1)) a.results[1].values[i] = (dy * ArrayIn(x.values + i * plane, plane)).sum();
  }
  return true;
}

// ---------------------------------------------------------------------------------------- shapes

bool forward(const ToSequence&, const Context&, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  const Index features = extent(x, 1, 2), plane = extent(x, 2, 4), image = features * plane;
  for (Index i = 0; i < extent(x, 0, 1); ++i)
    Out(a.results[0].values + i * image, plane, features) =
        In(x.values + i * image, features, plane).transpose();
  return true;
}
bool data(const ToSequence&, const Context&, const Arguments& a, Kept&) {
  const Tensor& dx = a.results[0];
  const Index features = extent(dx, 1, 2), plane = extent(dx, 2, 4), image = features * plane;
  for (Index i = 0; i < extent(dx, 0, 1); ++i)
    Out(dx.values + i * image, features, plane) =
        In(a.output_gradients[0].values + i * image, plane, features).transpose();
  return true;
}

bool forward(const PrependToken&, const Context&, const Arguments& a, Kept&) {
  const Tensor& x = a.inputs[0];
  const Index n = size(a.parameters[0]), tokens = extent(x, 1, 2) * n;
  for (Index i = 0; i < extent(x, 0, 1); ++i) {
    float* y = a.results[0].values + i * (n + tokens);
    std::copy_n(a.parameters[0].values, n, y);
    std::copy_n(x.values + i * tokens, tokens, y + n);
  }
  return true;
}
bool data(const PrependToken&, const Context&, const Arguments& a, Kept&) {
  const Tensor& dx = a.results[0];
  const Index n = extent(dx, 2, 3), tokens = extent(dx, 1, 2) * n;
  for (Index i = 0; i < extent(dx, 0, 1); ++i)
    std::copy_n(a.output_gradients[0].values + i * (n + tokens) + n, tokens,
                dx.values + i * tokens);
  return true;
}
bool weight(const PrependToken&, const Context&, const Arguments& a, Kept&) {
  const Tensor &dy = a.output_gradients[0], &d = a.results[0];
  const Index n = size(d), sample = extent(dy, 1, 3);
  ArrayOut sum(d.values, n);
  if (!a.accumulate) sum.setZero();
  for (Index i = 0; i < extent(dy, 0, 1); ++i) sum += ArrayIn(dy.values + i * sample, n);
  return true;
}

bool forward(const SelectToken& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &y = a.results[0];
  const Index token = held((*x.index)[1], op.index), n = extent(x, 2, 3), tokens = extent(x, 1, 2);
  if (token < 0) std::fill_n(y.values, size(y), 0.0f);
  for (Index i = 0; token >= 0 && i < extent(x, 0, 1); ++i)
    std::copy_n(x.values + (i * tokens + token) * n, n, y.values + i * n);
  return true;
}
bool data(const SelectToken& op, const Context&, const Arguments& a, Kept&) {
  const Tensor& dx = a.results[0];
  const Index token = held((*dx.index)[1], op.index), n = extent(dx, 2, 3),
              tokens = extent(dx, 1, 2);
  std::fill_n(dx.values, size(dx), 0.0f);
  for (Index i = 0; token >= 0 && i < extent(dx, 0, 1); ++i)
    std::copy_n(a.output_gradients[0].values + i * n, n, dx.values + (i * tokens + token) * n);
  return true;
}

/// f(part, its first element, length) for every run of a concatenation, in order.
template <class F>
void for_each_run(const Concat& op, const std::vector<Tensor>& parts, F f) {
  const std::size_t dims = parts[0].index->size(), axis = op.last ? dims - 1 : 1;
  for (Index i = 0; i < extent(parts[0], 0, axis); ++i) {
    for (std::size_t k = 0; k < parts.size(); ++k) {
      const Index length = extent(parts[k], axis, dims);
      f(k, i * length, length);
    }
  }
}
bool forward(const Concat& op, const Context&, const Arguments& a, Kept&) {
  float* y = a.results[0].values;
  for_each_run(op, a.inputs, [&](std::size_t k, Index first, Index length) {
    y = std::copy_n(a.inputs[k].values + first, length, y);
  });
  return true;
}
bool data(const Concat& op, const Context& c, const Arguments& a, Kept&) {
  for (std::size_t k = 0; k < c.signature->inputs.size(); ++k) {
    if (!wanted(a, k)) return false;
  }
  const float* dy = a.output_gradients[0].values;
  for_each_run(op, a.results, [&](std::size_t k, Index first, Index length) {
    std::copy_n(dy, length, a.results[k].values + first);
    dy += length;
  });
  return true;
}

bool forward(const AppendToHeads&, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &tail = a.inputs[1];
  const Index heads = extent(x, 2, 3), n = extent(x, 3, 4), r = extent(tail, 2, 3);
  float* y = a.results[0].values;
  for (Index i = 0; i < extent(x, 0, 3); ++i) {
    y = std::copy_n(x.values + i * n, n, y);
    y = std::copy_n(tail.values + i / heads * r, r, y);
  }
  return true;
}
bool data(const AppendToHeads&, const Context&, const Arguments& a, Kept&) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const Tensor &dx = a.results[0], &tail = a.results[1];
  const Index heads = extent(dx, 2, 3), n = extent(dx, 3, 4), r = extent(tail, 2, 3);
  std::fill_n(tail.values, size(tail), 0.0f);
  const float* dy = a.output_gradients[0].values;
  for (Index i = 0; i < extent(dx, 0, 3); ++i, dy += n + r) {
    std::copy_n(dy, n, dx.values + i * n);
    ArrayOut(tail.values + i / heads * r, r) += ArrayIn(dy + n, r);
  }
  return true;
}

// --------------------------------------------------------------------------------------- experts

/// Rows of one expert follow each other: f(expert's position, first row, rows).
template <class F>
void for_each_expert(const Tensor& rows, const Indices& experts, F f) {
  const auto& list = *rows.rows;
  for (std::size_t r = 0; r < list.size();) {
    std::size_t end = r;
    while (end < list.size() && list[end].expert == list[r].expert) ++end;
    f(held(experts, list[r].expert), static_cast<Index>(r), static_cast<Index>(end - r));
    r = end;
  }
}
/// Rows like those of `x`, with other features.
float* rows_of(const Arguments& a, const Tensor& x, Index features, Kept& kept) {
  kept.routed.assign(a.results.size(), {});
  kept.routed[0].rows = *x.rows;
  kept.routed[0].values.resize(x.rows->size() * static_cast<std::size_t>(features));
  return kept.routed[0].values.data();
}

/// Scores of one token's experts and the best `top_k` of them; of equal logits the lower expert.
struct Choice {
  std::vector<double> score;
  std::vector<Index> chosen;
  double total = 0;
};
void choose(const Router& op, const float* logits, Index experts, Choice& c) {
  c.score.resize(static_cast<std::size_t>(experts));
  c.chosen.resize(static_cast<std::size_t>(experts));
  double top = logits[0], sum = 0;
  for (Index e = 0; e < experts; ++e) top = std::max(top, static_cast<double>(logits[e]));
  for (Index e = 0; e < experts; ++e) {
    double& s = c.score[static_cast<std::size_t>(e)];
    const double x = logits[e];
    s = op.sigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x - top);
    sum += s;
    c.chosen[static_cast<std::size_t>(e)] = e;
  }
  if (!op.sigmoid) {
    for (double& s : c.score) s /= sum;
  }
  if (op.groups > 1) {
    const Index each = experts / op.groups;
    std::vector<std::pair<double, Index>> sums;
    std::vector<double> of;
    for (Index g = 0; g < op.groups; ++g) {
      of.assign(c.score.begin() + g * each, c.score.begin() + (g + 1) * each);
      for (double& s : of) s = s >= 0 ? s : 0;
      std::sort(of.begin(), of.end(), std::greater<>());
      sums.emplace_back(-std::accumulate(of.begin(), of.begin() + op.group_best, 0.0), g);
    }
    std::sort(sums.begin(), sums.end());
    std::erase_if(c.chosen, [&](Index e) {
      return std::none_of(sums.begin(), sums.begin() + op.top_groups,
                          [&](const auto& s) { return s.second == e / each; });
    });
  }
  // What is no number is behind all others.
  const auto ordered = [&](Index e) {
    return std::isnan(logits[e]) ? -std::numeric_limits<float>::infinity() : logits[e];
  };
  std::partial_sort(
      c.chosen.begin(), c.chosen.begin() + op.top_k, c.chosen.end(),
      [&](Index p, Index q) { return ordered(p) != ordered(q) ? ordered(p) > ordered(q) : p < q; });
  c.chosen.resize(static_cast<std::size_t>(op.top_k));
  c.total = 0;
  for (const Index e : c.chosen) c.total += c.score[static_cast<std::size_t>(e)];
}
bool forward(const Router& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &y = a.results[0];
  const Index experts = extent(x, 2, 3), tokens = extent(x, 0, 2);
  std::fill_n(y.values, size(y), 0.0f);
  Choice c;
  for (Index t = 0; t < tokens; ++t) {
    choose(op, x.values + t * experts, experts, c);
    const double factor = op.scale / (op.normalise ? c.total : 1);
    for (const Index e : c.chosen)
      y.values[t * experts + e] = static_cast<float>(factor * c.score[static_cast<std::size_t>(e)]);
  }
  return true;
}
bool data(const Router& op, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &dx = a.results[0];
  const Index experts = extent(x, 2, 3), tokens = extent(x, 0, 2);
  Choice c;
  std::vector<double> d(static_cast<std::size_t>(experts));
  for (Index t = 0; t < tokens; ++t) {
    choose(op, x.values + t * experts, experts, c);
    const float* dy = a.output_gradients[0].values + t * experts;
    const auto score = [&](Index e) { return c.score[static_cast<std::size_t>(e)]; };
    std::fill(d.begin(), d.end(), 0.0);
    double mean = 0, along = 0;
    for (const Index e : c.chosen) mean += static_cast<double>(dy[e]) * score(e) / c.total;
    for (const Index e : c.chosen) {
      const auto g = static_cast<double>(dy[e]);
      double& to = d[static_cast<std::size_t>(e)];
      to = op.scale * (op.normalise ? (g - mean) / c.total : g);
      along += score(e) * to;
    }
    for (Index e = 0; e < experts; ++e) {
      const double s = score(e), g = d[static_cast<std::size_t>(e)];
      dx.values[t * experts + e] =
          static_cast<float>(op.sigmoid ? g * s * (1 - s) : s * (g - along));
    }
  }
  return true;
}

/// f(row, its token's position in [sample, sequence]).
template <class F>
void for_each_token(const Tensor& rows, const Tensor& dense, F f) {
  const Indices &samples = (*dense.index)[0], &sequence = (*dense.index)[1];
  const auto wide = static_cast<Index>(sequence.size());
  for (std::size_t r = 0; r < rows.rows->size(); ++r) {
    const Row& row = (*rows.rows)[r];
    f(static_cast<Index>(r), held(samples, row.sample) * wide + held(sequence, row.sequence));
  }
}

bool forward(const Dispatch&, const Context& c, const Arguments& a, Kept& kept) {
  const Tensor &x = a.inputs[0], &gates = a.inputs[1];
  const Index n = extent(x, 2, 3), columns = extent(gates, 2, 3);
  kept.routed.assign(a.results.size(), {});
  RoutedResult& y = kept.routed[0];
  // In the order of rows: by expert, sample, position.
  for (const std::int64_t e : c.indices[static_cast<std::size_t>(c.signature->find(Dim::expert))]) {
    const Index column = held((*gates.index)[2], e);
    Index token = 0;
    for (const std::int64_t sample : (*x.index)[0]) {
      for (const std::int64_t position : (*x.index)[1]) {
        if (gates.values[token * columns + column] != 0) {
          y.rows.push_back({sample, position, e});
          y.values.insert(y.values.end(), x.values + token * n, x.values + (token + 1) * n);
        }
        ++token;
      }
    }
  }
  return true;
}
bool data(const Dispatch&, const Context&, const Arguments& a, Kept&) {
  if (!wanted(a, 0)) return false;
  const Tensor &dy = a.output_gradients[0], &dx = a.results[0];
  const Index n = extent(dx, 2, 3);
  std::fill_n(dx.values, size(dx), 0.0f);
  for_each_token(dy, dx, [&](Index r, Index token) {
    ArrayOut(dx.values + token * n, n) += ArrayIn(dy.values + r * n, n);
  });
  return true;
}

bool forward(const GroupedProduct& op, const Context& c, const Arguments& a, Kept& kept) {
  const Tensor &x = a.inputs[0], &w = a.parameters[0];
  const Index out = extent(w, 1, 2), in = extent(w, 2, 3);
  float* y = rows_of(a, x, out, kept);
  for_each_expert(x, (*w.index)[0], [&](Index e, Index first, Index rows) {
    Out to(y + first * out, rows, out);
    to.noalias() =
        In(x.values + first * in, rows, in) * In(w.values + e * out * in, out, in).transpose();
    if (op.bias && c.adds_bias)
      to.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(a.parameters[1].values + e * out, out);
  });
  return true;
}
bool data(const GroupedProduct&, const Context&, const Arguments& a, Kept& kept) {
  const Tensor &dy = a.output_gradients[0], &w = a.parameters[0];
  const Index out = extent(w, 1, 2), in = extent(w, 2, 3);
  float* dx = rows_of(a, dy, in, kept);
  for_each_expert(dy, (*w.index)[0], [&](Index e, Index first, Index rows) {
    Out(dx + first * in, rows, in).noalias() =
        In(dy.values + first * out, rows, out) * In(w.values + e * out * in, out, in);
  });
  return true;
}

bool forward(const Combine&, const Context&, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &gates = a.inputs[1], &y = a.results[0];
  const Index n = extent(x, 3, 4), columns = extent(gates, 2, 3);
  std::fill_n(y.values, size(y), 0.0f);
  for_each_token(x, gates, [&](Index r, Index token) {
    const Index e = held((*gates.index)[2], (*x.rows)[static_cast<std::size_t>(r)].expert);
    ArrayOut(y.values + token * n, n) +=
        gates.values[token * columns + e] * ArrayIn(x.values + r * n, n);
  });
  return true;
}
bool data(const Combine&, const Context&, const Arguments& a, Kept& kept) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const Tensor &x = a.inputs[0], &gates = a.inputs[1], &dy = a.output_gradients[0];
  const Index n = extent(x, 3, 4), columns = extent(gates, 2, 3);
  float* dx = rows_of(a, x, n, kept);
  float* d_gates = a.results[1].values;
  std::fill_n(d_gates, size(a.results[1]), 0.0f);
  for_each_token(x, gates, [&](Index r, Index token) {
    const Index e = held((*gates.index)[2], (*x.rows)[static_cast<std::size_t>(r)].expert);
    const ArrayIn d(dy.values + token * n, n);
    ArrayOut(dx + r * n, n) = gates.values[token * columns + e] * d;
    d_gates[token * columns + e] += (d * ArrayIn(x.values + r * n, n)).sum();
  });
  return true;
}
bool weight(const GroupedProduct& op, const Context& c, const Arguments& a, Kept&) {
  const Tensor &x = a.inputs[0], &dy = a.output_gradients[0], &w = a.results[0];
  if (!w && !wanted(a, 1)) return false;
  const Index out = extent(dy, 3, 4), in = extent(x, 3, 4);
  if (w && !a.accumulate) std::fill_n(w.values, size(w), 0.0f);
  if (op.bias && wanted(a, 1) && !a.accumulate)
    std::fill_n(a.results[1].values, size(a.results[1]), 0.0f);
  for_each_expert(x, (*(w ? w : a.results[1]).index)[0], [&](Index e, Index first, Index rows) {
    const In d(dy.values + first * out, rows, out);
    if (w)
      Out(w.values + e * out * in, out, in).noalias() +=
          d.transpose() * In(x.values + first * in, rows, in);
    if (op.bias && c.adds_bias && wanted(a, 1))
      Eigen::Map<Eigen::RowVectorXf>(a.results[1].values + e * out, out) += d.colwise().sum();
  });
  return true;
}

// What has no kernel here is the reference's.
template <class Op>
bool forward(const Op&, const Context&, const Arguments&, Kept&) {
  return false;
}
template <class Op>
bool data(const Op&, const Context&, const Arguments&, Kept&) {
  return false;
}
template <class Op>
bool weight(const Op&, const Context&, const Arguments&, Kept&) {
  return false;
}

}  // namespace

bool fast_forward(const Context& c, const Arguments& a, Kept& kept) {
  if (a.accumulate) return false;
  return std::visit([&](const auto& op) { return forward(op, c, a, kept); }, *c.operation);
}
bool fast_backward_data(const Context& c, const Arguments& a, Kept& kept) {
  if (a.accumulate && !std::holds_alternative<Linear>(*c.operation)) return false;
  return std::visit([&](const auto& op) { return data(op, c, a, kept); }, *c.operation);
}
bool fast_backward_weight(const Context& c, const Arguments& a, Kept& kept) {
  return std::visit([&](const auto& op) { return weight(op, c, a, kept); }, *c.operation);
}
void attend_part(const Context& c, const Arguments& a) {
  attend(std::get<Attention>(*c.operation), a);
}
void attend_part_backward(const Context& c, const Arguments& a) {
  attend_backward(std::get<Attention>(*c.operation), a);
}
bool fast_forward_statistic(const Context& c, std::size_t k, const Arguments& a) {
  if (const auto* n = std::get_if<Normalize>(c.operation)) return statistic(*n, c, a);
  if (const auto* e = std::get_if<CrossEntropy>(c.operation)) return statistic(*e, k, a);
  return false;
}
bool fast_backward_statistic(const Context& c, std::size_t, const Arguments& a) {
  if (const auto* n = std::get_if<Normalize>(c.operation)) return backward_statistic(*n, c, a);
  return false;
}

}  // namespace partita::cpu
