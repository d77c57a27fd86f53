// runtime/cuda/operators/elementwise.h: activations, sums, dropout, rotary embedding
// (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "runtime/cuda/operands.h"

namespace partita::cuda {

// What becomes of a number's curve c: `x` has the number and those beside it, `y` takes the
// results.
struct ValueOf {
  PARTITA_BOTH static void of(const Curve& c, const float (&)[1], float (&y)[1]) { y[0] = c.value; }
};
struct SlopeOf {  ///< of (x, dy)
  PARTITA_BOTH static void of(const Curve& c, const float (&x)[2], float (&y)[1]) {
    y[0] = x[1] * c.slope;
  }
};
struct GatedValueOf {  ///< of (x, up)
  PARTITA_BOTH static void of(const Curve& c, const float (&x)[2], float (&y)[1]) {
    y[0] = c.value * x[1];
  }
};
struct GatedSlopesOf {  ///< of (x, up, dy)
  PARTITA_BOTH static void of(const Curve& c, const float (&x)[3], float (&y)[2]) {
    y[0] = x[2] * x[1] * c.slope;
    y[1] = x[2] * c.value;
  }
};
template <class M>
bool forward(M& m, const Activation& op, const Context&, const Arguments& a) {
  const std::int64_t n = a.inputs[0].size();
  map_curves<ValueOf>(m, Curved<1, 1>{op.kind, {numbers(a.inputs[0])}, {numbers(a.results[0])}, n});
  return true;
}
template <class M>
bool data(M& m, const Activation& op, const Context&, const Arguments& a) {
  const Tensor& x = op.kind == ActivationKind::relu ? a.outputs[0] : a.inputs[0];
  const std::int64_t n = x.size();
  map_curves<SlopeOf>(
      m, Curved<2, 1>{
             op.kind, {numbers(x), numbers(a.output_gradients[0])}, {numbers(a.results[0])}, n});
  return true;
}
template <class M>
bool forward(M& m, const GatedActivation& op, const Context&, const Arguments& a) {
  const std::int64_t n = a.inputs[0].size();
  map_curves<GatedValueOf>(
      m, Curved<2, 1>{
             op.kind, {numbers(a.inputs[0]), numbers(a.inputs[1])}, {numbers(a.results[0])}, n});
  return true;
}
template <class M>
bool data(M& m, const GatedActivation& op, const Context&, const Arguments& a) {
  if (!wanted(a, 0) || !wanted(a, 1)) return false;
  const std::int64_t n = a.inputs[0].size();
  map_curves<GatedSlopesOf>(
      m, Curved<3, 2>{op.kind,
                      {numbers(a.inputs[0]), numbers(a.inputs[1]), numbers(a.output_gradients[0])},
                      {numbers(a.results[0]), numbers(a.results[1])},
                      n});
  return true;
}
/// Sums pass their gradient on.
template <class M>
bool copied(M& m, const Arguments& a) {
  const Tensor& dy = a.output_gradients[0];
  for (const Tensor& t : a.results) {
    if (t) copy_values(m, numbers(dy), numbers(t), dy.size());
  }
  return true;
}
template <class M>
bool data(M& m, const AddBias&, const Context&, const Arguments& a) {
  return copied(m, a);
}
template <class M>
bool data(M& m, const PositionEmbedding&, const Context&, const Arguments& a) {
  return copied(m, a);
}
template <class M>
bool data(M& m, const Add&, const Context&, const Arguments& a) {
  return copied(m, a);
}
template <class M>
bool forward(M& m, const Add&, const Context&, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), z = numbers(a.inputs[1]);
  const Numbers y = numbers(a.results[0]);
  map_two(
      m, a.inputs[0].size(), x, z, y, PARTITA_KERNEL(float v, float w) { return v + w; });
  return true;
}
template <class M>
bool forward(M& m, const Multiply&, const Context&, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), z = numbers(a.inputs[1]);
  const Numbers y = numbers(a.results[0]);
  map_two(
      m, a.inputs[0].size(), x, z, y, PARTITA_KERNEL(float v, float w) { return v * w; });
  return true;
}
template <class M>
bool data(M& m, const Multiply&, const Context&, const Arguments& a) {
  const Numbers dy = numbers(a.output_gradients[0]);
  for (std::size_t k = 0; k < 2; ++k) {
    if (!wanted(a, k)) continue;
    const Numbers other = numbers(a.inputs[1 - k]);
    const Numbers dx = numbers(a.results[k]);
    map_two(
        m, a.output_gradients[0].size(), dy, other, dx,
        PARTITA_KERNEL(float d, float v) { return d * v; });
  }
  return true;
}

/// What a step's dropout leaves out, as reference::Dropped.
struct Mask {
  Stepped<std::uint64_t> key;
  std::uint32_t below = 0;
  float scale = 1;

  PARTITA_INLINE std::uint64_t word(std::uint64_t of) const { return splitmix(key() ^ of); }
  PARTITA_INLINE float kept(float v, std::uint64_t bits) const {
    return (static_cast<std::uint32_t>(bits) & 0xffff) < below ? 0.0f : v * scale;
  }
  /// Of elements whose numbers follow one another.
  template <int kCount>
  PARTITA_INLINE void take(float* v, std::uint64_t number) const {
    static_assert(kCount % 4 == 0);
    const int begin = static_cast<int>(number & 3) * 16;
    std::uint64_t next = word(number >> 2);
    PARTITA_UNROLL
    for (int k = 0; k < kCount; k += 4) {
      std::uint64_t bits = next >> begin;
      if (begin > 0 || k + 4 < kCount)
        next = word((number >> 2) + static_cast<unsigned>(k / 4) + 1);
      if (begin > 0) bits |= next << (64 - begin);
      PARTITA_UNROLL
      for (int e = 0; e < 4; ++e) v[k + e] = kept(v[k + e], bits >> 16 * e);
    }
  }
  PARTITA_LANE float take(float v, std::uint64_t number) const {
    return kept(v, word(number >> 2) >> 16 * (number & 3));
  }
  /// Of a row whose first feature, were it here, has a number.
  PARTITA_LANE void take(Octet& o, std::uint64_t row, const IndexList& features, std::int64_t first,
                         std::int64_t count) const {
    if (features.list == nullptr && count >= Octet::kSize)
      return take<Octet::kSize>(o.v, row + static_cast<std::uint64_t>(features.at(first)));
    PARTITA_UNROLL
    for (int k = 0; k < Octet::kSize; ++k) {
      if (k < count)
        o.v[k] = take(o.v[k], row + static_cast<std::uint64_t>(features.at(first + k)));
    }
  }
};
template <class M>
Mask mask_of(M& m, const Dropout& op, const Context& c) {
  const reference::Dropped now(op, c);
  return {m.stepped(c.step, [seed = c.seed](
                                std::int64_t step) { return reference::dropout_key(seed, step); }),
          static_cast<std::uint32_t>(now.below), static_cast<float>(now.scale)};
}
/// Rows of experts: each by its token and expert.
template <class M>
bool dropped_rows(M& m, const Dropout& op, const Context& c, const Tensor& x, Numbers to) {
  std::vector<std::int64_t> rows;
  for (const reference::Row& r : *x.rows)
    rows.push_back(static_cast<std::int64_t>(reference::number_of_row(c, r)));
  const IndexList number = m.upload(rows), feature = m.list((*x.index)[3]);
  const Numbers from = numbers(x);
  const Mask mask = mask_of(m, op, c);
  const std::int64_t n = feature.size;
  each_of_rows(
      m, std::ssize(*x.rows), n,
      PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        Octet o = octet(from, row * n + first, count);
        mask.take(o, static_cast<std::uint64_t>(number.at(row)), feature, first, count);
        put(to, row * n + first, count, o);
      });
  return true;
}
/// A tensor's dimensions, as dropout numbers its elements: sample after sample.
struct Places {
  static constexpr int kMost = 6;
  IndexList list[kMost];
  std::int64_t stride[kMost];  ///< from a global index's elements to the next one's
  int dims = 0;
  std::int64_t first_sample = 0;  ///< its number

  /// Of a row of the last dimension.
  PARTITA_LANE std::uint64_t row(std::int64_t row) const {
    std::int64_t number = first_sample;
    for (int d = dims - 2; d >= 0; --d) {
      number += list[d].at(row % list[d].size) * stride[d];
      row /= list[d].size;
    }
    return static_cast<std::uint64_t>(number);
  }
  /// Do the numbers of all that is here follow one another?
  bool in_order() const {
    std::int64_t inner = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (list[d].size == 1) continue;
      if (list[d].list != nullptr || stride[d] != inner) return false;
      inner *= list[d].size;
    }
    return true;
  }
};
/// All of a tensor whose numbers follow one another.
template <bool kApart>
struct MaskedInOrder {
  using Eight = EightOf<kApart>;
  Mask mask;
  std::uint64_t begin;
  Numbers from, to;
  std::int64_t n;
  PARTITA_LANE void operator()(std::int64_t number) const {
    const std::int64_t first = Eight::first(number);
    if (first >= n) return;
    Octet o = Eight::octet_of(Eight::raw(from, number, n), from);
    const std::uint64_t at = begin + static_cast<std::uint64_t>(first);
    if constexpr (kApart) {
      mask.take<4>(o.v, at);
      mask.take<4>(o.v + 4, at + Eight::kStep);
    } else {
      mask.take<Octet::kSize>(o.v, at);
    }
    Eight::put(to, number, n, o);
  }
};
template <class M>
bool dropped(M& m, const Dropout& op, const Context& c, const Tensor& x, Numbers from, Numbers to) {
  if (x.rows != nullptr) return dropped_rows(m, op, c, x, to);
  const Shape& shape = c.signature->outputs[0].shape;
  Places p;
  p.dims = static_cast<int>(shape.size());
  if (p.dims > Places::kMost || shape.back().dim == Dim::sample) return false;
  std::int64_t stride = 1, sample = -1;
  for (int d = p.dims - 1; d >= 0; --d) {
    const auto k = static_cast<std::size_t>(d);
    p.list[d] = m.list((*x.index)[k]);
    p.stride[d] = stride;
    if (shape[k].dim == Dim::sample) {
      sample = d;
    } else {
      stride *= shape[k].extent;
    }
  }
  if (sample >= 0) p.stride[sample] = stride;
  p.first_sample = c.first_sample * stride;
  const Mask mask = mask_of(m, op, c);
  const IndexList features = p.list[p.dims - 1];
  const std::int64_t n = features.size;
  if (p.in_order()) {
    std::int64_t begin = p.first_sample;
    for (int d = 0; d < p.dims; ++d) begin += p.list[d].at(0) * p.stride[d];
    const auto go = [&]<bool kApart>() {
      m.each(EightOf<kApart>::count(x.size()),
             MaskedInOrder<kApart>{mask, static_cast<std::uint64_t>(begin), from, to, x.size()});
    };
    if (any_wide(from, to)) {
      go.template operator()<true>();
    } else {
      go.template operator()<false>();
    }
    return true;
  }
  each_of_rows(
      m, x.size() / n, n, PARTITA_KERNEL(std::int64_t row, std::int64_t first, std::int64_t count) {
        Octet o = octet(from, row * n + first, count);
        mask.take(o, p.row(row), features, first, count);
        put(to, row * n + first, count, o);
      });
  return true;
}
template <class M>
bool forward(M& m, const Dropout& op, const Context& c, const Arguments& a) {
  return dropped(m, op, c, a.inputs[0], numbers(a.inputs[0]), numbers(a.results[0]));
}
template <class M>
bool data(M& m, const Dropout& op, const Context& c, const Arguments& a) {
  const Tensor& dy = a.output_gradients[0];
  return dropped(m, op, c, dy, numbers(dy), numbers(a.results[0]));
}

/// Cosines of the pairs' angles, then their sines, of position after position; by the host, whose
/// double precision costs nothing where it is needed once.
inline std::vector<float> turns_of(const Rotary& op, const Indices& positions) {
  const std::int64_t half = op.rotated / 2;
  std::vector<double> rates;
  for (std::int64_t r = 0; r < half; ++r)
    rates.push_back(
        std::pow(op.base, -2 * static_cast<double>(r) / static_cast<double>(op.rotated)));
  std::vector<float> turns;
  turns.reserve(positions.size() * 2 * rates.size());
  for (const std::int64_t p : positions) {
    for (const double rate : rates)
      turns.push_back(static_cast<float>(std::cos(rate * static_cast<double>(p))));
    for (const double rate : rates)
      turns.push_back(static_cast<float>(std::sin(rate * static_cast<double>(p))));
  }
  return turns;
}
/// What tells a table of turns from all others.
inline std::vector<std::int64_t> key_of_turns(const Rotary& op, const Indices& positions) {
  std::int64_t base = 0;
  static_assert(sizeof base == sizeof op.base);
  std::memcpy(&base, &op.base, sizeof base);
  const std::int64_t n = std::ssize(positions);
  std::vector<std::int64_t> key{base, op.rotated, n};
  const bool follow = n > 0 && positions.back() - positions.front() == n - 1;
  key.insert(key.end(), positions.begin(), follow ? positions.begin() + 1 : positions.end());
  return key;
}
/// Turns each pair by `direction` times its angle.
template <class M>
bool rotate(M& m, const Rotary& op, Numbers from, const Tensor& to, float direction) {
  const std::size_t dims = to.index->size();
  const std::int64_t tokens = extent(to, 1, 2), inner = extent(to, 2, dims), head = op.head_dim,
                     half = op.rotated / 2, still = op.head_dim - op.rotated;
  if (extent(to, dims - 1, dims) % head != 0) return false;
  const Numbers y = numbers(to);
  // All heads of a token, all samples, layers and steps turn by the same angles.
  const Indices& positions = (*to.index)[1];
  const float* const turns =
      m.table(key_of_turns(op, positions), [&] { return turns_of(op, positions); });
  if (still == 0 && half % Octet::kSize == 0) {
    const std::int64_t pieces = half / Octet::kSize;
    m.each(
        to.size() / head * pieces, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t r = i % pieces * Octet::kSize, first = i / pieces * head + r,
                             token = i / pieces * head / inner % tokens;
          const Numbers table(const_cast<float*>(turns) + token * 2 * half);
          const Raw of_a = raw_octet(from, first, Octet::kSize),
                    of_b = raw_octet(from, first + half, Octet::kSize),
                    of_c = raw_octet(table, r, Octet::kSize),
                    of_s = raw_octet(table, half + r, Octet::kSize);
          const Octet a_half = octet_of(of_a, from.type()), b_half = octet_of(of_b, from.type()),
                      c = octet_of(of_c, ElementType::fp32), s = octet_of(of_s, ElementType::fp32);
          Octet one, other;
          for (int k = 0; k < Octet::kSize; ++k) {
            const float sine = direction * s.v[k];
            one.v[k] = a_half.v[k] * c.v[k] - b_half.v[k] * sine;
            other.v[k] = b_half.v[k] * c.v[k] + a_half.v[k] * sine;
          }
          put(y, first, Octet::kSize, one);
          put(y, first + half, Octet::kSize, other);
        });
    return true;
  }
  m.each(
      to.size(), PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t within = i % inner % head;
        if (within < still || 2 * half + still <= within) {
          y[i] = from[i];
          return;
        }
        const std::int64_t r = (within - still) % half, token = i / inner % tokens;
        const bool second = within - still >= half;
        const float c = turns[token * 2 * half + r],
                    s = direction * turns[token * 2 * half + half + r];
        y[i] = second ? from[i] * c + from[i - half] * s : from[i] * c - from[i + half] * s;
      });
  return true;
}
template <class M>
bool forward(M& m, const Rotary& op, const Context&, const Arguments& a) {
  return rotate(m, op, numbers(a.inputs[0]), a.results[0], 1);
}
template <class M>
bool data(M& m, const Rotary& op, const Context&, const Arguments& a) {
  return rotate(m, op, numbers(a.output_gradients[0]), a.results[0], -1);
}

}  // namespace partita::cuda
