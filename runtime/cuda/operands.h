// runtime/cuda/operands.h: what operators' kernels read and write, and what they share.
#pragma once

#include <cmath>
#include <cstdint>
#include <variant>

#include "runtime/cpu/kernels.h"
#include "runtime/cuda/machine.h"

namespace partita::cuda {

using cpu::Arguments;
using cpu::Indices;
using cpu::Tensor;
using reference::Context;

/// By octets of a row where rows are whole octets, else by element: f(row, first, count).
template <class M, class F>
void each_of_rows(M& m, std::int64_t rows, std::int64_t n, F f) {
  const std::int64_t step = n % Octet::kSize == 0 ? Octet::kSize : 1, pieces = n / step;
  m.each(rows * pieces, RowPieces<F>{pieces, step, f});
}
inline std::int64_t extent(const Tensor& t, std::size_t first, std::size_t last) {
  std::int64_t n = 1;
  for (std::size_t d = first; d < last; ++d) n *= static_cast<std::int64_t>((*t.index)[d].size());
  return n;
}
inline Numbers numbers(const Tensor& t) { return {t.values, t.type}; }
inline bool wanted(const Arguments& a, std::size_t k) {
  return k < a.results.size() && static_cast<bool>(a.results[k]);
}
inline std::int64_t at_least_1(std::int64_t n) { return n > 1 ? n : 1; }
inline bool any_rows(const Arguments& a) {
  for (const auto* list : {&a.inputs, &a.outputs, &a.output_gradients, &a.results}) {
    for (const Tensor& t : *list) {
      if (t && t.rows != nullptr) return true;
    }
  }
  return false;
}

/// Do the forward and the backward by data make their statistics themselves, in one kernel, where
/// nobody else has a part of them?
inline bool makes_statistics(const Context& c) {
  if (std::holds_alternative<CrossEntropy>(*c.operation)) return true;
  const auto* n = std::get_if<Normalize>(c.operation);
  if (n == nullptr || (n->kind != Normalize::Kind::layer && n->kind != Normalize::Kind::rms))
    return false;
  const Operand& x = c.signature->inputs[0];
  if (x.routed) return false;
  const std::int64_t last = std::ssize(reference::touched(c, x, x.shape.size() - 1));
  return last > 0 && (n->group == 0 || last % n->group == 0);
}

/// Of `type`, as scratch.
template <class M>
Numbers scratch(M& m, std::int64_t n, ElementType type) {
  return {m.scratch(type == ElementType::fp32 ? n : (n + 1) / 2), type};
}

template <class M>
void copy_values(M& m, Numbers from, Numbers to, std::int64_t n) {
  map_one(
      m, n, from, to, PARTITA_KERNEL(float v) { return v; });
}
template <bool kApart>
struct Fill {
  Numbers to;
  std::int64_t n;
  float value;
  PARTITA_LANE void operator()(std::int64_t number) const {
    Octet o;
    for (int k = 0; k < Octet::kSize; ++k) o.v[k] = value;
    EightOf<kApart>::put(to, number, n, o);
  }
};
template <class M>
void fill_values(M& m, Numbers to, std::int64_t n, float value) {
  if (any_wide(to)) {
    m.each(EightOf<true>::count(n), Fill<true>{to, n, value});
  } else {
    m.each(EightOf<false>::count(n), Fill<false>{to, n, value});
  }
}

/// kTensors' rows of one place and length, as the lanes of a row look at them more than once: what
/// a lane takes first stays in registers, all of it on its way before any is looked at. Only what
/// is beyond (where rows() has no lanes for more) is read again. `kWhole`: by whole_rows;
/// `kNarrow`: all of 16 bits.
template <int kTensors, bool kWhole, bool kNarrow = false>
struct KeptRows {
  static constexpr int kKept = 4;
  using Kept = std::conditional_t<kNarrow, NarrowRaw, Raw>;
  const Numbers (&from)[kTensors];
  std::int64_t start, length, lane, lanes;
  Kept kept[kTensors][kKept];

  PARTITA_INLINE KeptRows(const Numbers (&tensors)[kTensors], std::int64_t first, std::int64_t n,
                          const Lanes& of)
      : from(tensors), start(first), length(n), lane(of.lane()), lanes(of.count()) {
    PARTITA_UNROLL
    for (int k = 0; k < kKept; ++k) {
      const std::int64_t e = (lane + k * lanes) * Octet::kSize;
      if (e >= length) break;
      PARTITA_UNROLL
      for (int t = 0; t < kTensors; ++t) kept[t][k] = raw(t, e);
    }
  }
  PARTITA_INLINE Kept raw(int t, std::int64_t e) const {
    if constexpr (kNarrow)
      return raw_narrow<kWhole>(from[t], start + e, length - e);
    else
      return raw_octet<kWhole>(from[t], start + e, length - e);
  }
  /// f(element, how many, one octet of each tensor).
  template <class F>
  PARTITA_INLINE void each(F f) const {
    PARTITA_UNROLL
    for (int k = 0; k < kKept; ++k) {
      const std::int64_t e = (lane + k * lanes) * Octet::kSize;
      if (e >= length) break;
      Octet o[kTensors];
      PARTITA_UNROLL
      for (int t = 0; t < kTensors; ++t) o[t] = octet_of(kept[t][k], from[t].type());
      f(e, kWhole ? Octet::kSize : length - e, o);
    }
    for (std::int64_t e = (lane + kKept * lanes) * Octet::kSize; e < length;
         e += lanes * Octet::kSize) {
      Octet o[kTensors];
      PARTITA_UNROLL
      for (int t = 0; t < kTensors; ++t) o[t] = octet_of(raw(t, e), from[t].type());
      f(e, kWhole ? Octet::kSize : length - e, o);
    }
  }
};
/// Of rows of n elements that are kept, as rows() takes it.
inline std::int64_t kept_width(std::int64_t n) { return octets(n); }
/// Of rows that are looked at once: at most 256 lanes, so that another block's loads are on their
/// way while one sums up.
inline std::int64_t once_width(std::int64_t n) { return octets(n) < 1024 ? octets(n) : 1024; }
/// f(first, how many, octet) of a row of less than 2^30 that is looked at once, wherever it begins:
/// what lies before the first multiple of 16 bytes is a piece of its own. Four of a lane's are on
/// their way at a time; where all have 16 bits (`kNarrow`) the next four while f has these.
template <bool kWhole = false, bool kNarrow = false, class F>
PARTITA_INLINE void each_octet(const Numbers& row, std::int64_t n, const Lanes& lanes, F f) {
  constexpr int kAtOnce = 4, kSize = Octet::kSize;
  using Kept = std::conditional_t<kNarrow, NarrowRaw, Raw>;
  const int bytes = static_cast<int>(reinterpret_cast<std::uintptr_t>(row.data()) % 16),
            before = kWhole ? 0 : (16 - bytes) % 16 / (kNarrow || row.narrow() ? 2 : 4),
            size = static_cast<int>(n), head = before < size ? before : size,
            // The first piece ends with the head, where there is one.
      begin = head > 0 ? head - kSize : 0, pieces = (size - begin + kSize - 1) / kSize,
            lane = static_cast<int>(lanes.lane()), count = static_cast<int>(lanes.count());
  const auto fetch = [&](Kept(&to)[kAtOnce], int p) {
    PARTITA_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = begin + (p + k * count) * kSize;
      if (at >= size) break;
      if constexpr (kNarrow) {
        to[k] = raw_narrow<kWhole>(row, at < 0 ? 0 : at, at < 0 ? head : size - at);
      } else {
        to[k] = raw_octet<kWhole>(row, at < 0 ? 0 : at, at < 0 ? head : size - at);
      }
    }
  };
  Kept next[kAtOnce];
  if constexpr (kNarrow) fetch(next, lane);
  for (int p = lane; p < pieces; p += kAtOnce * count) {
    Kept raw[kAtOnce];
    if constexpr (kNarrow) {
      PARTITA_UNROLL
      for (int k = 0; k < kAtOnce; ++k) raw[k] = next[k];
      fetch(next, p + kAtOnce * count);
    } else {
      fetch(raw, p);
    }
    PARTITA_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = begin + (p + k * count) * kSize;
      if (at >= size) break;
      f(at < 0 ? 0 : at, kWhole ? kSize : at < 0 ? head : size - at, octet_of(raw[k], row.type()));
    }
  }
}
/// Sums of an octet are in fp32, of a row in double.
PARTITA_LANE float sum_of(const Octet& o) {
  float sum = 0;
  for (int k = 0; k < Octet::kSize; ++k) sum += o.v[k];
  return sum;
}
/// Of what a lane has met of a row: the largest number, and the sum of e to the others less it, in
/// one look. Of numbers of -infinity alone the sum is 0.
struct SumOfPowers {
  float top = -INFINITY;
  double sum = 0;
  PARTITA_LANE void add(std::int64_t count, Octet o) {
    // Numbers that are not there add e to -infinity, 0: no branch stands between the others.
    for (int k = 0; k < Octet::kSize; ++k) o.v[k] = k < count ? o.v[k] : -INFINITY;
    float high = top;
    for (int k = 0; k < Octet::kSize; ++k) high = fmaxf(high, o.v[k]);
    const float less = high == -INFINITY ? 0.0f : high;
    float part = 0;
    for (int k = 0; k < Octet::kSize; ++k) part += quick_power(o.v[k] - less);
    if (high > top) sum *= static_cast<double>(quick_power(top - high));
    top = high;
    sum += static_cast<double>(part);
  }
  /// Of all lanes, for each of them.
  PARTITA_LANE void join(const Lanes& lanes) {
    const float high = lanes.max(top);
    sum = lanes.sum(high > top ? sum * static_cast<double>(quick_power(top - high)) : sum);
    top = high;
  }
};

/// Are rows of n numbers octets that may be moved at once, in all operands? Then kernels leave out
/// what moves parts of them.
inline bool whole_rows(std::int64_t n, const Arguments& a) {
  bool whole = n % Octet::kSize == 0;
  for (const auto* list : {&a.inputs, &a.parameters, &a.output_gradients, &a.results}) {
    for (const Tensor& t : *list) whole &= !t || together(numbers(t), Octet::kSize);
  }
  return whole;
}

/// Calls f with <kWhole, kNarrow>, as rows are.
template <class F>
void by_rows(bool whole, bool narrow, F f) {
  if (narrow) {
    if (whole) {
      f.template operator()<true, true>();
    } else {
      f.template operator()<false, true>();
    }
  } else if (whole) {
    f.template operator()<true, false>();
  } else {
    f.template operator()<false, false>();
  }
}

/// What stage after stage of sums over rows leaves: [sum, row, column], in fp32.
template <int kSums>
struct PartialSums {
  float* at = nullptr;
  std::int64_t rows = 0, columns = 0;
  /// Of rows [first, end) of one column; eight are on their way at a time.
  PARTITA_LANE void add(std::int64_t first, std::int64_t end, std::int64_t column,
                        float (&sums)[kSums]) const {
    constexpr int kAtOnce = 8;
    for (std::int64_t r = first; r < end; r += kAtOnce) {
      float v[kSums][kAtOnce];
      PARTITA_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const std::int64_t row = r + k < end ? r + k : end - 1;
        PARTITA_UNROLL
        for (int s = 0; s < kSums; ++s) v[s][k] = at[(s * rows + row) * columns + column];
      }
      PARTITA_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        if (r + k >= end) break;
        PARTITA_UNROLL
        for (int s = 0; s < kSums; ++s) sums[s] += v[s][k];
      }
    }
  }
};
/// The first stage, octet after octet of a chunk of rows: f.load(row, first, count) takes what
/// f.add(loaded, sums) adds; four rows are on their way at a time.
template <class F>
struct ChunkSums {
  F f;
  std::int64_t rows, chunk;
  PartialSums<F::kSums> to;
  PARTITA_LANE void operator()(std::int64_t number, std::int64_t first, std::int64_t count) const {
    constexpr int kAtOnce = 4;
    const std::int64_t begin = number * chunk, end = begin + chunk < rows ? begin + chunk : rows;
    Octet sums[F::kSums]{};
    for (std::int64_t r = begin; r < end; r += kAtOnce) {
      typename F::Loaded loaded[kAtOnce];
      PARTITA_UNROLL
      for (int k = 0; k < kAtOnce; ++k)
        loaded[k] = f.load(r + k < end ? r + k : end - 1, first, count);
      PARTITA_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        if (r + k >= end) break;
        f.add(loaded[k], sums);
      }
    }
    PARTITA_UNROLL
    for (int s = 0; s < F::kSums; ++s)
      put(to.at, (s * to.rows + number) * to.columns + first, count, sums[s]);
  }
};
/// then(column, sums) of sums over rows, in stages so that their order is fixed and each has many
/// threads.
template <class M, class F, class Then>
void sum_rows(M& m, F f, std::int64_t rows, std::int64_t columns, Then then) {
  constexpr int kSums = F::kSums;
  constexpr std::int64_t kThreads = 1 << 16, kLeast = 16, kMost = 64, kParts = 32;
  const std::int64_t wanted = rows * octets(columns) / kThreads, chunk = wanted < kLeast  ? kLeast
                                                                         : wanted < kMost ? wanted
                                                                                          : kMost;
  const auto parts_of = [&](std::int64_t n) {
    return PartialSums<kSums>{m.scratch(kSums * n * columns), n, columns};
  };
  PartialSums<kSums> from = parts_of((rows + chunk - 1) / chunk);
  each_of_rows(m, from.rows, columns, ChunkSums<F>{f, rows, chunk, from});
  while (from.rows > kParts) {
    const PartialSums<kSums> to = parts_of((from.rows + kParts - 1) / kParts);
    m.each(
        to.rows * columns, PARTITA_KERNEL(std::int64_t i) {
          const std::int64_t first = i / columns * kParts;
          float sums[kSums]{};
          from.add(first, first + kParts < from.rows ? first + kParts : from.rows, i % columns,
                   sums);
          for (int s = 0; s < kSums; ++s) to.at[s * to.rows * columns + i] = sums[s];
        });
    from = to;
  }
  m.each(
      columns, PARTITA_KERNEL(std::int64_t column) {
        float sums[kSums]{};
        from.add(0, from.rows, column, sums);
        then(column, sums);
      });
}
/// A row's numbers themselves.
struct Addend {
  static constexpr int kSums = 1;
  using Loaded = Raw;
  Numbers y;
  std::int64_t columns;
  PARTITA_LANE Raw load(std::int64_t row, std::int64_t first, std::int64_t count) const {
    return raw_octet(y, row * columns + first, count);
  }
  PARTITA_LANE void add(const Raw& r, Octet (&sums)[1]) const {
    const Octet o = octet_of(r, y.type());
    for (int e = 0; e < Octet::kSize; ++e) sums[0].v[e] += o.v[e];
  }
};
/// to[column] (+)= sum over rows of y[row, column].
template <class M>
void sum_columns(M& m, Numbers y, std::int64_t rows, std::int64_t columns, Numbers to,
                 bool accumulate) {
  sum_rows(
      m, Addend{y, columns}, rows, columns,
      PARTITA_KERNEL(std::int64_t column, const float(&sums)[1]) {
        to[column] = accumulate ? to[column] + sums[0] : sums[0];
      });
}

/// y[i] = x[i] + b[i % columns].
template <class M>
void add_columns(M& m, Numbers x, Numbers b, Numbers y, std::int64_t n, std::int64_t columns) {
  const bool whole = columns % Octet::kSize == 0;  // an octet is of one row
  m.each(
      octets(n), PARTITA_KERNEL(std::int64_t number) {
        const std::int64_t first = number * Octet::kSize, count = n - first;
        Octet o = octet(x, first, count);
        if (whole) {
          const Octet c = octet(b, first % columns, Octet::kSize);
          for (int k = 0; k < Octet::kSize; ++k) o.v[k] += c.v[k];
        } else {
          for (std::int64_t k = 0; k < Octet::kSize && k < count; ++k)
            o.v[k] += b[(first + k) % columns];
        }
        put(y, first, count, o);
      });
}

struct Curve {
  float value, slope;
};
/// Of a standard normal number, that it is less than x; and e^(-x^2/2). Both are off by 2e-5 of
/// themselves: a polynomial, fitted to that, of 1 / (1 + 0.35 z) for e^(z^2) erfc(z), z to 6.
struct Normal {
  float below, power;
};
PARTITA_BOTH Normal quick_normal(float x) {
  constexpr float kInverseRoot2 = 0.70710678118654752f;
  const float z = fabsf(x) * kInverseRoot2, t = quick_inverse(fmaf(0.35f, z, 1.0f)),
              power = quick_power(-z * z);
  float p = fmaf(t, 0.54043524f, -0.31461914f);
  p = fmaf(t, p, 0.43690035f);
  p = fmaf(t, p, 0.13349819f);
  p = fmaf(t, p, 0.20379432f);
  const float beyond = 0.5f * t * p * power;  // farther out, on one side
  return {x > 0 ? 1 - beyond : beyond, power};
}
template <bool kQuick>
PARTITA_BOTH float logistic(float x) {
  return kQuick ? quick_inverse(1 + quick_power(-x)) : 1 / (1 + expf(-x));
}

/// The kind is known where it is compiled: what is done for each number asks for nothing. `kQuick`:
/// for results of 16 bits.
template <ActivationKind kKind, bool kQuick = false>
PARTITA_BOTH Curve curve(float x) {
  constexpr float kInverseRoot2 = 0.70710678118654752f, kInverseRoot2Pi = 0.39894228040143268f,
                  kRoot2OverPi = 0.79788456080286536f;
  if constexpr (kKind == ActivationKind::relu) {
    return {x > 0 ? x : 0.0f, x > 0 ? 1.0f : 0.0f};
  } else if constexpr (kKind == ActivationKind::squared_relu) {
    return {x > 0 ? x * x : 0.0f, x > 0 ? 2 * x : 0.0f};
  } else if constexpr (kKind == ActivationKind::gelu) {
    if constexpr (kQuick) {
      const Normal n = quick_normal(x);
      return {x * n.below, fmaf(x * kInverseRoot2Pi, n.power, n.below)};
    } else {
      const float half = 0.5f * (1 + erff(x * kInverseRoot2));
      return {x * half, half + x * expf(-0.5f * x * x) * kInverseRoot2Pi};
    }
  } else if constexpr (kKind == ActivationKind::gelu_tanh) {
    if constexpr (kQuick) {
      // (1 + tanh u) / 2 is the logistic function of 2 u.
      const float square = x * x, u = x * fmaf(kRoot2OverPi * 0.044715f, square, kRoot2OverPi),
                  s = logistic<true>(2 * u);
      return {x * s,
              s + 2 * x * s * (1 - s) * fmaf(kRoot2OverPi * 3 * 0.044715f, square, kRoot2OverPi)};
    } else {
      const float t = tanhf(kRoot2OverPi * (x + 0.044715f * x * x * x));
      return {0.5f * x * (1 + t),
              0.5f * (1 + t) + 0.5f * x * (1 - t * t) * kRoot2OverPi * (1 + 3 * 0.044715f * x * x)};
    }
  } else if constexpr (kKind == ActivationKind::silu) {
    const float s = logistic<kQuick>(x);
    return {x * s, s * (1 + x * (1 - s))};
  } else if constexpr (kKind == ActivationKind::sigmoid) {
    const float s = logistic<kQuick>(x);
    return {s, s * (1 - s)};
  } else {
    static_assert(kKind == ActivationKind::tanh);
    const float t = tanhf(x);
    return {t, 1 - t * t};
  }
}
PARTITA_BOTH Curve silu(float x) { return curve<ActivationKind::silu>(x); }

template <int kFrom, int kTo>
struct Curved {
  ActivationKind kind;
  Numbers from[kFrom], to[kTo];
  std::int64_t n;
};
/// F of eight of each tensor, the kind known to the compiler: once for all of them it is asked for.
/// `kApart`: as EightOf; without, everything has 16 bits.
template <int kFrom, int kTo, class F, bool kApart, bool kSure>
struct OfCurves {
  using Eight = EightOf<kApart, kSure>;
  Curved<kFrom, kTo> of;
  template <ActivationKind kKind>
  PARTITA_INLINE void take(const Octet (&x)[kFrom], Octet (&y)[kTo]) const {
    PARTITA_UNROLL
    for (int k = 0; k < Octet::kSize; ++k) {
      float in[kFrom], out[kTo];
      PARTITA_UNROLL
      for (int t = 0; t < kFrom; ++t) in[t] = x[t].v[k];
      F::of(curve<kKind, !kApart>(in[0]), in, out);
      PARTITA_UNROLL
      for (int t = 0; t < kTo; ++t) y[t].v[k] = out[t];
    }
  }
  PARTITA_INLINE void take(const Octet (&x)[kFrom], Octet (&y)[kTo]) const {
    switch (of.kind) {
      case ActivationKind::relu:
        return take<ActivationKind::relu>(x, y);
      case ActivationKind::squared_relu:
        return take<ActivationKind::squared_relu>(x, y);
      case ActivationKind::gelu:
        return take<ActivationKind::gelu>(x, y);
      case ActivationKind::gelu_tanh:
        return take<ActivationKind::gelu_tanh>(x, y);
      case ActivationKind::silu:
        return take<ActivationKind::silu>(x, y);
      case ActivationKind::sigmoid:
        return take<ActivationKind::sigmoid>(x, y);
      case ActivationKind::tanh:
        return take<ActivationKind::tanh>(x, y);
    }
  }
  PARTITA_LANE void operator()(std::int64_t number) const {
    if (Eight::first(number) >= of.n) return;
    Raw raw[kFrom];
    PARTITA_UNROLL
    for (int t = 0; t < kFrom; ++t) raw[t] = Eight::raw(of.from[t], number, of.n);
    Octet x[kFrom];
    PARTITA_UNROLL
    for (int t = 0; t < kFrom; ++t) x[t] = Eight::octet_of(raw[t], of.from[t]);
    Octet y[kTo];
    take(x, y);
    PARTITA_UNROLL
    for (int t = 0; t < kTo; ++t) Eight::put(of.to[t], number, of.n, y[t]);
  }
};
template <class F, class M, int kFrom, int kTo>
void map_curves(M& m, const Curved<kFrom, kTo>& of) {
  bool wide = false, sure = true;
  for (const auto& x : of.from) wide |= any_wide(x), sure &= EightOf<false>::sure(of.n, x);
  for (const auto& y : of.to) wide |= any_wide(y), sure &= EightOf<false>::sure(of.n, y);
  if (wide) {
    m.each(EightOf<true>::count(of.n), OfCurves<kFrom, kTo, F, true, false>{of});
  } else if (sure) {
    m.each(EightOf<false>::count(of.n), OfCurves<kFrom, kTo, F, false, true>{of});
  } else {
    m.each(EightOf<false>::count(of.n), OfCurves<kFrom, kTo, F, false, false>{of});
  }
}

}  // namespace partita::cuda
