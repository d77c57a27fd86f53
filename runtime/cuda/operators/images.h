// runtime/cuda/operators/images.h: convolutions and pooling (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "runtime/cuda/operands.h"
#include "runtime/cuda/operators/normalisation.h"

namespace partita::cuda {

/// The local window along one dimension: input positions of output o are first + o · stride + k ·
/// dilation, those outside [0, inputs) are padding.
struct LocalWindow {
  std::int64_t outputs, inputs, first, kernel, stride, dilation;
  PARTITA_BOTH std::int64_t input(std::int64_t out, std::int64_t k) const {
    return first + out * stride + k * dilation;
  }
  PARTITA_BOTH bool inside(std::int64_t in) const { return in >= 0 && in < inputs; }
};
inline LocalWindow local_window(const Window& w, const Indices& x, const Indices& y) {
  return {static_cast<std::int64_t>(y.size()),
          static_cast<std::int64_t>(x.size()),
          y.empty() || x.empty() ? 0 : y.front() * w.stride - w.pad_before - x.front(),
          w.kernel,
          w.stride,
          w.dilation};
}
/// Pads or crops: to[plane, i, j] = from[plane, i + top, j + left], 0 outside.
template <class M>
void shift_planes(M& m, Numbers from, Numbers to, std::int64_t planes, std::int64_t from_rows,
                  std::int64_t from_columns, std::int64_t rows, std::int64_t columns,
                  std::int64_t top, std::int64_t left) {
  m.each(
      planes * rows * columns, PARTITA_KERNEL(std::int64_t e) {
        const std::int64_t plane = e / (rows * columns), i = e / columns % rows + top,
                           j = e % columns + left;
        const bool inside = i >= 0 && i < from_rows && j >= 0 && j < from_columns;
        to[e] = inside ? from[(plane * from_rows + i) * from_columns + j] : 0.0f;
      });
}

/// Which plane of `area` numbers a number is in, and those after it: divided once for all.
struct PlaneOf {
  std::int64_t plane, within, area;
  PARTITA_BOTH PlaneOf(std::int64_t number, std::int64_t of)
      : plane(number / of), within(number - plane * of), area(of) {}
  PARTITA_BOTH void step() {
    if (++within == area) within = 0, ++plane;
  }
};
/// to[channel] (+)= sum of y over samples and places.
template <class M>
void sum_channels(M& m, const ConvolutionShape& s, Numbers y, Numbers to, bool accumulate) {
  Runs r;
  r.batch = true;
  r.groups = s.out, r.repeats = s.samples, r.length = s.out_height * s.out_width;
  sum_by_parts(
      m, r,
      PARTITA_KERNEL(std::int64_t g, const Lanes& lanes, std::int64_t part, std::int64_t parts,
                     double& sum, double&) {
        r.each(
            lanes, g, y,
            [&](std::int64_t, std::int64_t, std::int64_t, const Octet& o) {
              sum += static_cast<double>(sum_of(o));
            },
            part, parts);
      },
      PARTITA_KERNEL(std::int64_t g, double sum, double) {
        to[g] = static_cast<float>(sum) + (accumulate ? to[g] : 0.0f);
      });
}
/// Libraries pad alike on both sides: where the local window does not, the input is padded by a
/// copy.
template <class M>
bool convolution(M& m, const Convolution& op, const Context& c, const Arguments& a,
                 ConvolutionPass pass) {
  const Signature& s = *c.signature;
  std::vector<Indices> xi, wi, yi;
  for (std::size_t d = 0; d < 4; ++d) {
    xi.push_back(reference::touched(c, s.inputs[0], d));
    wi.push_back(reference::touched(c, s.parameters[0], d));
    yi.push_back(reference::touched(c, s.outputs[0], d));
  }
  for (const Indices* list : {&xi[2], &xi[3], &yi[2], &yi[3]}) {
    if (list->empty() ||
        list->back() - list->front() + 1 != static_cast<std::int64_t>(list->size()))
      return false;
  }
  const auto length = [](const Indices& list) { return static_cast<std::int64_t>(list.size()); };
  const LocalWindow h = local_window(op.height, xi[2], yi[2]),
                    w = local_window(op.width, xi[3], yi[3]);
  ConvolutionShape shape{length(xi[0]), length(xi[1]), h.inputs,   w.inputs,  length(yi[1]),
                         op.groups,     h.kernel,      w.kernel,   h.outputs, w.outputs,
                         h.stride,      w.stride,      h.dilation, w.dilation};
  if (shape.samples * shape.in * shape.out == 0 || shape.out % op.groups != 0) return false;
  // Whatever the pass reads is of one type, which the library computes in.
  const Tensor& one = pass == ConvolutionPass::data ? a.output_gradients[0] : a.inputs[0];
  const Tensor& other = pass == ConvolutionPass::weight ? a.output_gradients[0] : a.parameters[0];
  if (one.type != other.type) return false;
  shape.type = one.type;
  const auto needs = [](const LocalWindow& l) {
    return (l.outputs - 1) * l.stride + l.dilation * (l.kernel - 1) + 1;
  };
  const auto alike = [&](const LocalWindow& l) {
    const std::int64_t pad = -l.first;
    return pad >= 0 && l.inputs + 2 * pad >= needs(l) && l.inputs + 2 * pad < needs(l) + l.stride;
  };
  const std::int64_t planes = shape.samples * shape.in, columns = w.inputs, rows = h.inputs;
  const bool direct = alike(h) && alike(w);
  Numbers padded;
  if (direct) {
    shape.pad_height = -h.first;
    shape.pad_width = -w.first;
  } else {
    shape.height = needs(h);
    shape.width = needs(w);
    padded = scratch(m, planes * shape.height * shape.width, shape.type);
    if (pass != ConvolutionPass::data)
      shift_planes(m, numbers(a.inputs[0]), padded, planes, rows, columns, shape.height,
                   shape.width, h.first, w.first);
  }
  const bool bias = op.bias && c.adds_bias;
  const std::int64_t area = shape.out_height * shape.out_width, out = shape.out;
  if (pass == ConvolutionPass::forward) {
    const Numbers y = numbers(a.results[0]);
    if (!m.convolve(shape, pass, direct ? numbers(a.inputs[0]) : padded, numbers(a.parameters[0]),
                    y, false))
      return false;
    if (bias) {
      const Numbers b = numbers(a.parameters[1]);
      const std::int64_t n = shape.samples * out * area;
      m.each(
          octets(n), PARTITA_KERNEL(std::int64_t number) {
            const std::int64_t first = number * Octet::kSize, count = n - first;
            Octet o = octet(y, first, count);
            PlaneOf at(first, area);
            for (int k = 0; k < Octet::kSize && k < count; ++k, at.step())
              o.v[k] += b[at.plane % out];
            put(y, first, count, o);
          });
    }
    return true;
  }
  const Numbers dy = numbers(a.output_gradients[0]);
  if (pass == ConvolutionPass::data) {
    const Numbers dx = numbers(a.results[0]);
    if (!m.convolve(shape, pass, direct ? dx : padded, numbers(a.parameters[0]), dy, false))
      return false;
    if (!direct)
      shift_planes(m, padded, dx, planes, shape.height, shape.width, rows, columns, -h.first,
                   -w.first);
    return true;
  }
  if (!wanted(a, 0)) return false;
  const Numbers dw = numbers(a.results[0]);
  const std::int64_t weights = a.results[0].size();
  const bool apart = dw.type() != shape.type, accumulates = a.accumulate;
  const Numbers made = apart ? scratch(m, weights, shape.type) : dw;
  if (!m.convolve(shape, pass, direct ? numbers(a.inputs[0]) : padded, made, dy,
                  accumulates && !apart))
    return false;
  if (apart) {
    m.each(
        weights, PARTITA_KERNEL(std::int64_t i) {
          dw[i] = accumulates ? dw[i] + made[i] : static_cast<float>(made[i]);
        });
  }
  if (op.bias && wanted(a, 1)) {
    const Numbers to = numbers(a.results[1]);
    if (bias) {
      sum_channels(m, shape, dy, to, a.accumulate);
    } else if (!a.accumulate) {
      fill_values(m, to, out, 0);
    }
  }
  return true;
}
template <class M>
bool forward(M& m, const Convolution& op, const Context& c, const Arguments& a) {
  return convolution(m, op, c, a, ConvolutionPass::forward);
}
template <class M>
bool data(M& m, const Convolution& op, const Context& c, const Arguments& a) {
  return convolution(m, op, c, a, ConvolutionPass::data);
}
template <class M>
bool weight(M& m, const Convolution& op, const Context& c, const Arguments& a) {
  return convolution(m, op, c, a, ConvolutionPass::weight);
}

/// A local window of a pool, in numbers that a GPU divides fast.
struct PoolWindow {
  int outputs, inputs, first, kernel, stride, dilation;
  explicit PoolWindow(const LocalWindow& w)
      : outputs(static_cast<int>(w.outputs)),
        inputs(static_cast<int>(w.inputs)),
        first(static_cast<int>(w.first)),
        kernel(static_cast<int>(w.kernel)),
        stride(static_cast<int>(w.stride)),
        dilation(static_cast<int>(w.dilation)) {}
  PARTITA_BOTH int steps(int distance) const {  ///< rounded up; of no distance none
    return distance <= 0 ? 0 : dilation == 1 ? distance : (distance + dilation - 1) / dilation;
  }
  /// Elements [low, high) of an output's window are no padding.
  PARTITA_BOTH int low(int out) const { return steps(-(first + out * stride)); }
  PARTITA_BOTH int high(int out) const {
    const int n = steps(inputs - (first + out * stride));
    return n < kernel ? n : kernel;
  }
  PARTITA_BOTH int inside(int out) const {
    const int n = high(out) - low(out);
    return n > 0 ? n : 0;
  }
  /// Outputs [from, to) are those whose windows may have an input: if they reach it.
  PARTITA_BOTH int from(int in) const {
    const int distance = in - first - (kernel - 1) * dilation;
    return distance <= 0 ? 0 : (distance + stride - 1) / stride;
  }
  PARTITA_BOTH int to(int in) const {
    const int distance = in - first, n = distance < 0 ? 0 : distance / stride + 1;
    return n < outputs ? n : outputs;
  }
  PARTITA_BOTH bool reaches(int out, int in) const {
    return dilation == 1 || (in - first - out * stride) % dilation == 0;
  }
};
struct PoolWindows {
  PoolWindow h, w;
  bool padding;
  PARTITA_BOTH std::int64_t inputs() const { return std::int64_t{h.inputs} * w.inputs; }
  PARTITA_BOTH std::int64_t outputs() const { return std::int64_t{h.outputs} * w.outputs; }
  PARTITA_BOTH float divisor(int i, int j) const {
    const int n = padding ? h.kernel * w.kernel : h.inside(i) * w.inside(j);
    return static_cast<float>(n > 0 ? n : 1);
  }
  /// f(position, number) of what output (i, j) reads of a plane, row by row.
  template <class F>
  PARTITA_LANE void each(const Numbers& plane, int i, int j, F f) const {
    const int first = w.low(j), end = w.high(j);
    for (int r = h.low(i); r < h.high(i); ++r) {
      int at = (h.first + i * h.stride + r * h.dilation) * w.inputs + w.first + j * w.stride +
               first * w.dilation;
      for (int s = first; s < end; ++s, at += w.dilation) f(at, static_cast<float>(plane[at]));
    }
  }
};
inline PoolWindows pool_windows(const Pool& op, const Tensor& x, const Tensor& y) {
  return {PoolWindow(local_window(op.height, (*x.index)[2], (*y.index)[2])),
          PoolWindow(local_window(op.width, (*x.index)[3], (*y.index)[3])), op.count_padding};
}
/// Position of the first of the largest numbers; -1 where all is padding.
struct Largest {
  int at = -1;
  float v = -INFINITY;
  PARTITA_LANE void see(int position, float x) {
    if (at < 0 || x > v) at = position, v = x;
  }
};
template <class M>
bool forward(M& m, const Pool& op, const Context&, const Arguments& a) {
  const Tensor &x = a.inputs[0], &y = a.results[0];
  const PoolWindows p = pool_windows(op, x, y);
  const Numbers from = numbers(x);
  const Numbers to = numbers(y);
  const bool maximum = op.maximum;
  m.each(
      y.size(), PARTITA_KERNEL(std::int64_t e) {
        const PlaneOf of(e, p.outputs());
        const int at = static_cast<int>(of.within), i = at / p.w.outputs, j = at - i * p.w.outputs;
        const Numbers plane = from + of.plane * p.inputs();
        if (maximum) {
          Largest top;
          p.each(plane, i, j, [&](int position, float v) { top.see(position, v); });
          to[e] = top.v;
        } else {
          float sum = 0;
          p.each(plane, i, j, [&](int, float v) { sum += v; });
          to[e] = sum / p.divisor(i, j);
        }
      });
  return true;
}
/// Each input adds up what it gets from the outputs that read it; of a maximum only where it was
/// the first, which is looked for once.
template <class M>
bool data(M& m, const Pool& op, const Context&, const Arguments& a) {
  const Tensor &dy = a.output_gradients[0], &dx = a.results[0];
  const PoolWindows p = pool_windows(op, dx, dy);
  const Numbers d = numbers(dy), to = numbers(dx);
  std::int32_t* const largest =
      op.maximum ? reinterpret_cast<std::int32_t*>(m.scratch(dy.size())) : nullptr;
  if (op.maximum) {
    const Numbers from = numbers(a.inputs[0]);
    m.each(
        dy.size(), PARTITA_KERNEL(std::int64_t e) {
          const PlaneOf of(e, p.outputs());
          const int at = static_cast<int>(of.within), i = at / p.w.outputs,
                    j = at - i * p.w.outputs;
          Largest top;
          p.each(from + of.plane * p.inputs(), i, j,
                 [&](int position, float v) { top.see(position, v); });
          largest[e] = top.at;
        });
  }
  m.each(
      dx.size(), PARTITA_KERNEL(std::int64_t e) {
        const PlaneOf of(e, p.inputs());
        const int at = static_cast<int>(of.within), y = at / p.w.inputs, x = at - y * p.w.inputs;
        const std::int64_t plane = of.plane * p.outputs();
        const int first = p.w.from(x), end = p.w.to(x);
        float sum = 0;
        for (int i = p.h.from(y); i < p.h.to(y); ++i) {
          if (!p.h.reaches(i, y)) continue;
          for (int j = first; j < end; ++j) {
            const std::int64_t output = plane + i * p.w.outputs + j;
            if (largest != nullptr) {
              if (largest[output] == at) sum += d[output];
            } else if (p.w.reaches(j, x)) {
              sum += d[output] / p.divisor(i, j);
            }
          }
        }
        to[e] = sum;
      });
  return true;
}

template <class M>
bool forward(M& m, const GlobalAveragePool&, const Context& c, const Arguments& a) {
  const Tensor& x = a.inputs[0];
  const Shape& whole = c.signature->inputs[0].shape;
  const auto all = static_cast<float>(whole[2].extent * whole[3].extent);
  const std::int64_t plane = extent(x, 2, 4);
  const Numbers from = numbers(x);
  const Numbers y = numbers(a.results[0]);
  m.rows(
      extent(x, 0, 2), plane, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t e = lanes.lane(); e < plane; e += lanes.count())
          sum += static_cast<double>(from[i * plane + e]);
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) y[i] = static_cast<float>(sum) / all;
      });
  return true;
}
template <class M>
bool data(M& m, const GlobalAveragePool&, const Context& c, const Arguments& a) {
  const Tensor& dx = a.results[0];
  const Shape& whole = c.signature->inputs[0].shape;
  const auto all = static_cast<float>(whole[2].extent * whole[3].extent);
  const std::int64_t plane = extent(dx, 2, 4);
  const Numbers dy = numbers(a.output_gradients[0]);
  const Numbers to = numbers(dx);
  const std::int64_t n = dx.size();
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        const std::int64_t first = number * Octet::kSize, count = n - first;
        PlaneOf at(first, plane);
        Octet o;
        for (int k = 0; k < Octet::kSize && k < count; ++k, at.step()) o.v[k] = dy[at.plane] / all;
        put(to, first, count, o);
      });
  return true;
}

/// y[i] = x[i] * by[i / area].
template <class M>
void scale_planes(M& m, Numbers x, Numbers by, Numbers y, std::int64_t n, std::int64_t area) {
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        const std::int64_t first = number * Octet::kSize, count = n - first;
        Octet o = octet(x, first, count);
        PlaneOf at(first, area);
        for (int k = 0; k < Octet::kSize && k < count; ++k, at.step()) o.v[k] *= by[at.plane];
        put(y, first, count, o);
      });
}
template <class M>
bool forward(M& m, const ScaleFeatures&, const Context&, const Arguments& a) {
  const std::int64_t plane = extent(a.inputs[0], 2, 4);
  const Numbers x = numbers(a.inputs[0]), gate = numbers(a.inputs[1]);
  const Numbers y = numbers(a.results[0]);
  scale_planes(m, x, gate, y, a.inputs[0].size(), plane);
  return true;
}
template <class M>
bool data(M& m, const ScaleFeatures&, const Context&, const Arguments& a) {
  const std::int64_t plane = extent(a.inputs[0], 2, 4);
  const Numbers x = numbers(a.inputs[0]), gate = numbers(a.inputs[1]);
  const Numbers dy = numbers(a.output_gradients[0]);
  if (wanted(a, 0)) {
    const Numbers dx = numbers(a.results[0]);
    scale_planes(m, dy, gate, dx, a.inputs[0].size(), plane);
  }
  if (wanted(a, 1)) {
    const Numbers dg = numbers(a.results[1]);
    m.rows(
        extent(a.inputs[0], 0, 2), plane, PARTITA_KERNEL(std::int64_t i, const Lanes& lanes) {
          double sum = 0;
          for (std::int64_t e = lanes.lane(); e < plane; e += lanes.count())
            sum += static_cast<double>(dy[i * plane + e]) * static_cast<double>(x[i * plane + e]);
          sum = lanes.sum(sum);
          if (lanes.lane() == 0) dg[i] = static_cast<float>(sum);
        });
  }
  return true;
}

}  // namespace partita::cuda
