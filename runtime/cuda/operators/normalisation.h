// runtime/cuda/operators/normalisation.h: norms and their statistics (../operators.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "runtime/cpu/normalisation.h"
#include "runtime/cuda/operands.h"

namespace partita::cuda {

/// Local response normalisation over neighbouring features.
struct Neighbours {
  Numbers x;
  std::int64_t features = 0, stride = 0, before = 0, after = 0;
  float offset = 0, alpha = 0;  ///< of one square

  /// The divisor to the power of 1 / beta.
  PARTITA_LANE float base(std::int64_t i) const {
    const std::int64_t f = i / stride % features, down = f < before ? f : before,
                       left = features - 1 - f, up = left < after ? left : after;
    float squares = 0;
    for (std::int64_t k = -down; k <= up; ++k) {
      const float v = x[i + k * stride];
      squares += v * v;
    }
    return offset + alpha * squares;
  }
};
inline Neighbours neighbours_of(const Normalize& op, const Tensor& x) {
  Neighbours n;
  n.x = numbers(x);
  n.features = extent(x, 1, 2), n.stride = extent(x, 2, x.index->size());
  n.before = op.window / 2, n.after = (op.window - 1) / 2;
  n.offset = static_cast<float>(op.offset);
  n.alpha = static_cast<float>(op.alpha / static_cast<double>(op.window));
  return n;
}
template <class M>
bool normalised_locally(M& m, const Normalize& op, const Arguments& a) {
  const Neighbours n = neighbours_of(op, a.inputs[0]);
  const Numbers y = numbers(a.results[0]);
  const auto power = static_cast<float>(-op.beta);
  m.each(
      a.inputs[0].size(),
      PARTITA_KERNEL(std::int64_t i) { y[i] = n.x[i] * powf(n.base(i), power); });
  return true;
}
template <class M>
bool local_data(M& m, const Normalize& op, const Arguments& a) {
  const Neighbours n = neighbours_of(op, a.inputs[0]);
  const Numbers dy = numbers(a.output_gradients[0]), dx = numbers(a.results[0]);
  const std::int64_t size = a.inputs[0].size();
  const auto power = static_cast<float>(-op.beta);
  // What a feature sends to each of those that it was divided by, over theirs.
  float *const own = m.scratch(size), *const sent = m.scratch(size);
  m.each(
      size, PARTITA_KERNEL(std::int64_t i) {
        const float base = n.base(i), scaled = dy[i] * powf(base, power);
        own[i] = scaled;
        sent[i] = scaled * n.x[i] / base;
      });
  const float slope = 2 * static_cast<float>(op.beta) * n.alpha;
  m.each(
      size, PARTITA_KERNEL(std::int64_t i) {
        const std::int64_t f = i / n.stride % n.features, down = f < n.after ? f : n.after,
                           left = n.features - 1 - f, up = left < n.before ? left : n.before;
        float sum = 0;
        for (std::int64_t k = -down; k <= up; ++k) sum += sent[i + k * n.stride];
        dx[i] = own[i] - slope * sum * n.x[i];
      });
  return true;
}

struct Runs : cpu::NormalisedRuns {
  double epsilon = 0;
  PARTITA_BOTH std::int64_t size() const { return repeats * length; }
  /// Where element e of group g lies, and its column.
  PARTITA_BOTH std::int64_t at(std::int64_t g, std::int64_t e) const {
    return batch ? (e / length * groups + g) * length + e % length : g * length + e;
  }
  /// f(where, column, count, numbers there) of the group's octets, each in one run: of those that
  /// are one part's of so many.
  template <class F>
  PARTITA_LANE void each(const Lanes& lanes, std::int64_t g, const Numbers& x, F f,
                         std::int64_t part = 0, std::int64_t parts = 1) const {
    const std::int64_t pieces = (length + Octet::kSize - 1) / Octet::kSize;
    for (std::int64_t p = part * lanes.count() + lanes.lane(); p < repeats * pieces;
         p += parts * lanes.count()) {
      const std::int64_t e = p / pieces * length + p % pieces * Octet::kSize,
                         left = length - p % pieces * Octet::kSize,
                         count = left < Octet::kSize ? left : std::int64_t{Octet::kSize};
      const std::int64_t i = at(g, e);
      f(i, batch ? g : e, count, octet(x, i, count));
    }
  }
  /// Blocks that share a group: of a batch few channels would leave most of a GPU idle.
  std::int64_t parts() const {
    constexpr std::int64_t kBlocks = 1024, kLeast = 8192;
    const std::int64_t wanted = (kBlocks + groups - 1) / groups, most = size() / kLeast;
    return !batch || most < 2 ? 1 : wanted < most ? wanted : most;
  }
  /// Lanes that a group's part keeps busy, as rows() takes them.
  std::int64_t lanes_wanted() const { return (size() / parts() + 1) / 2; }
};

/// f(group, lanes, part, parts, a, b) adds to two sums of a group's part.
template <class F>
struct PartSums {
  std::int64_t parts;
  double* to;
  F f;
  PARTITA_LANE void operator()(std::int64_t q, const Lanes& lanes) const {
    double a = 0, b = 0;
    f(q / parts, lanes, q % parts, parts, a, b);
    a = lanes.sum(a);
    b = lanes.sum(b);
    if (lanes.lane() != 0) return;
    to[2 * q] = a;
    to[2 * q + 1] = b;
  }
};
/// then(group, a, b) of the parts' sums, in their order.
template <class Then>
struct SumsOfParts {
  std::int64_t parts;
  const double* from;
  Then then;
  PARTITA_LANE void operator()(std::int64_t g) const {
    double a = 0, b = 0;
    for (std::int64_t k = g * parts; k < (g + 1) * parts; ++k)
      a += from[2 * k], b += from[2 * k + 1];
    then(g, a, b);
  }
};
template <class M, class F, class Then>
void sum_by_parts(M& m, const Runs& r, F f, Then then) {
  const std::int64_t parts = r.parts();
  // A double takes two floats' room.
  auto* sums = reinterpret_cast<double*>(m.scratch(4 * r.groups * parts));
  m.rows(r.groups * parts, r.lanes_wanted(), PartSums<F>{parts, sums, f});
  m.each(r.groups, SumsOfParts<Then>{parts, sums, then});
}
/// Of the columns from one on; of a batch's group all have one. 1 and 0 where there are none.
PARTITA_BOTH Octet by_column(const Runs& r, const Numbers& list, std::int64_t column,
                             std::int64_t count, float none) {
  if (list != nullptr && !r.batch) return octet(list, column, count);
  Octet o;
  const float v = list != nullptr ? static_cast<float>(list[column]) : none;
  for (int k = 0; k < Octet::kSize; ++k) o.v[k] = v;
  return o;
}
inline bool runs_of(const Normalize& op, const Context& c, const Tensor& x, Runs& r) {
  r.epsilon = op.epsilon;
  return cpu::runs_of(op, c, x, r) && r.length > 0;
}

struct Moments {
  float mean, inverse;
};
/// From sums, or as a forward statistic of the whole left them.
PARTITA_BOTH Moments moments_of(const Runs& r, Numbers sums, bool whole, std::int64_t g) {
  const float last = sums[g * r.width + r.width - 1];
  if (whole) return {r.width == 2 ? sums[g * 2] : 0.0f, last};
  const double mean = r.width == 2 ? static_cast<double>(sums[g * 2]) / r.members : 0;
  const double square = static_cast<double>(last) / r.members - mean * mean;
  return {static_cast<float>(mean),
          static_cast<float>(1 / sqrt((square > 0 ? square : 0) + r.epsilon))};
}

template <class M>
bool statistic(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  const Numbers x = numbers(a.inputs[0]);
  const Numbers to = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  if (r.parts() > 1) {
    sum_by_parts(
        m, r,
        PARTITA_KERNEL(std::int64_t g, const Lanes& lanes, std::int64_t part, std::int64_t parts,
                       double& sum, double& square) {
          r.each(
              lanes, g, x,
              [&](std::int64_t, std::int64_t, std::int64_t count, const Octet& o) {
                for (int k = 0; k < count; ++k) {
                  const auto v = static_cast<double>(o.v[k]);
                  sum += v;
                  square += v * v;
                }
              },
              part, parts);
        },
        PARTITA_KERNEL(std::int64_t g, double sum, double square) {
          const double mean = r.width == 2 ? sum / r.members : 0;
          if (whole) {
            // In doubles the difference of two sums is as good as a second look.
            const double variance = square / r.members - mean * mean;
            sum = mean;
            square = 1 / sqrt((variance > 0 ? variance : 0) + r.epsilon);
          }
          if (r.width == 2) to[2 * g] = static_cast<float>(sum);
          to[g * r.width + r.width - 1] = static_cast<float>(square);
        });
    return true;
  }
  m.rows(
      r.groups, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        double sum = 0, square = 0;
        r.each(lanes, g, x, [&](std::int64_t, std::int64_t, std::int64_t count, const Octet& o) {
          for (int k = 0; k < count; ++k) {
            const auto v = static_cast<double>(o.v[k]);
            sum += v;
            square += v * v;
          }
        });
        sum = r.width == 2 ? lanes.sum(sum) : 0;
        if (whole) {
          const auto mean = static_cast<float>(sum / r.members);
          sum = static_cast<double>(mean);
          square = 0;
          r.each(lanes, g, x, [&](std::int64_t, std::int64_t, std::int64_t count, const Octet& o) {
            for (int k = 0; k < count; ++k) {
              const auto v = static_cast<double>(o.v[k] - mean);
              square += v * v;
            }
          });
        }
        square = lanes.sum(square);
        if (whole) square = 1 / sqrt(square / r.members + r.epsilon);
        if (lanes.lane() != 0) return;
        if (r.width == 2) to[2 * g] = static_cast<float>(sum);
        to[g * r.width + r.width - 1] = static_cast<float>(square);
      });
  return true;
}
/// Rows whose statistics nobody else has a part of: they are made, left in their place and used
/// while the row is in registers.
template <bool kWhole, bool kNarrow, class M>
void normalised_rows(M& m, const Normalize& op, const Runs& r, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), sums = numbers(a.statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers bias = op.bias ? numbers(a.parameters[op.scale ? 1 : 0]) : nullptr;
  const Numbers y = numbers(a.results[0]);
  m.rows(
      r.groups, kept_width(r.length), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        const Numbers from[1] = {x};
        const std::int64_t start = g * r.length;
        const KeptRows<1, kWhole, kNarrow> row(from, start, r.length, lanes);
        // Sums of the differences to one of the lane's own numbers, o, and of their squares: exact
        // where a small variance lies beside a large mean. With c numbers, sum x = c o + s, sum x^2
        // = c o^2 + 2 o s + q, and in doubles the mean's square may be taken off.
        double sum = 0, square = 0;
        float own = 0;
        if (r.width == 2 && lanes.lane() * Octet::kSize < r.length)
          own = octet_of(row.kept[0][0], x.type()).v[0];
        float differences = 0, squares = 0;
        std::int64_t numbers_here = 0;
        row.each([&](std::int64_t, std::int64_t count, const Octet(&o)[1]) {
          float d[Octet::kSize], part = 0, part_of_squares = 0;
          for (int k = 0; k < Octet::kSize; ++k) {
            d[k] = k < count ? o[0].v[k] - own : 0.0f;
            part += d[k];
            part_of_squares += d[k] * d[k];
          }
          differences += part;
          squares += part_of_squares;
          numbers_here += count < Octet::kSize ? count : std::int64_t{Octet::kSize};
        });
        {
          const auto o = static_cast<double>(own), s = static_cast<double>(differences),
                     c = static_cast<double>(numbers_here);
          sum = c * o + s;
          square = c * o * o + 2 * o * s + static_cast<double>(squares);
        }
        float mean = 0;
        if (r.width == 2) {
          lanes.sum(sum, square);
          const double exact = sum / r.members;
          mean = static_cast<float>(exact);
          square -= exact * sum;
          square = square > 0 ? square : 0;
        } else {
          square = lanes.sum(square);
        }
        const auto inverse = static_cast<float>(1 / sqrt(square / r.members + r.epsilon));
        if (lanes.lane() == 0) {
          if (r.width == 2) sums[2 * g] = mean;
          sums[g * r.width + r.width - 1] = inverse;
        }
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&o)[1]) {
          Raw of_scale{}, of_bias{};
          if (scale != nullptr) of_scale = raw_octet<kWhole>(scale, e, count);
          if (bias != nullptr) of_bias = raw_octet<kWhole>(bias, e, count);
          const Octet by = octet_of(of_scale, scale.type()), more = octet_of(of_bias, bias.type());
          Octet to;
          for (int k = 0; k < Octet::kSize; ++k) {
            float v = (o[0].v[k] - mean) * inverse;
            if (scale != nullptr) v *= by.v[k];
            to.v[k] = bias != nullptr ? v + more.v[k] : v;
          }
          put<kWhole>(y, start + e, count, to);
        });
      });
}
/// The same of their gradients, whose sums are nobody else's.
template <bool kWhole, bool kNarrow, class M>
void slopes_of_rows(M& m, const Normalize& op, const Runs& r, const Arguments& a) {
  const Numbers x = numbers(a.inputs[0]), dy = numbers(a.output_gradients[0]),
                sums = numbers(a.statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers dx = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  m.rows(
      r.groups, kept_width(r.length), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        const Numbers from[2] = {x, dy};
        const std::int64_t start = g * r.length;
        const KeptRows<2, kWhole, kNarrow> row(from, start, r.length, lanes);
        const Moments o = moments_of(r, sums, whole, g);
        double sum = 0, along = 0;
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&v)[2]) {
          Octet by{};
          if (scale != nullptr) by = octet<kWhole>(scale, e, count);
          Octet slopes, times;
          for (int k = 0; k < Octet::kSize; ++k) {
            slopes.v[k] = scale != nullptr ? v[1].v[k] * by.v[k] : v[1].v[k];
            times.v[k] = slopes.v[k] * (v[0].v[k] - o.mean);
          }
          sum += static_cast<double>(sum_of(slopes));
          along += static_cast<double>(sum_of(times));
        });
        if (r.width == 2) {
          lanes.sum(sum, along);
        } else {
          along = lanes.sum(along);
        }
        const float mean = r.width == 2 ? static_cast<float>(sum / r.members) : 0.0f;
        const auto by_mean = static_cast<float>(along * static_cast<double>(o.inverse) / r.members);
        row.each([&](std::int64_t e, std::int64_t count, const Octet(&v)[2]) {
          Octet by{};
          if (scale != nullptr) by = octet<kWhole>(scale, e, count);
          Octet to;
          for (int k = 0; k < Octet::kSize; ++k) {
            const float d = scale != nullptr ? v[1].v[k] * by.v[k] : v[1].v[k];
            to.v[k] = o.inverse * (d - mean - (v[0].v[k] - o.mean) * o.inverse * by_mean);
          }
          put<kWhole>(dx, start + e, count, to);
        });
      });
}
template <class M>
bool forward(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  if (op.kind == Normalize::Kind::local) return normalised_locally(m, op, a);
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  if (a.own_statistics) {
    by_rows(whole_rows(r.length, a), numbers(a.inputs[0]).narrow(),
            [&]<bool kWhole, bool kNarrow>() { normalised_rows<kWhole, kNarrow>(m, op, r, a); });
    return true;
  }
  const Numbers x = numbers(a.inputs[0]), sums = numbers(a.statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers bias = op.bias ? numbers(a.parameters[op.scale ? 1 : 0]) : nullptr;
  const Numbers y = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  const std::int64_t parts = r.parts();
  m.rows(
      r.groups * parts, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t q, const Lanes& lanes) {
        const std::int64_t g = q / parts;
        const Moments o = moments_of(r, sums, whole, g);
        r.each(
            lanes, g, x,
            [&](std::int64_t i, std::int64_t column, std::int64_t count, const Octet& from) {
              const Octet by = by_column(r, scale, column, count, 1),
                          more = by_column(r, bias, column, count, 0);
              Octet to;
              for (int k = 0; k < Octet::kSize; ++k) {
                float v = (from.v[k] - o.mean) * o.inverse;
                if (scale != nullptr) v *= by.v[k];
                to.v[k] = bias != nullptr ? v + more.v[k] : v;
              }
              put(y, i, count, to);
            },
            q % parts, parts);
      });
  return true;
}
/// Adds up a group's gradients, and these times what they are gradients of less its mean.
struct SlopeSums {
  Runs r;
  Numbers x, dy, scale, sums;
  bool whole;
  PARTITA_LANE void operator()(std::int64_t g, const Lanes& lanes, std::int64_t part,
                               std::int64_t parts, double& sum, double& along) const {
    const Moments o = moments_of(r, sums, whole, g);
    r.each(
        lanes, g, x,
        [&](std::int64_t i, std::int64_t column, std::int64_t count, const Octet& from) {
          const Octet slopes = octet(dy, i, count), by = by_column(r, scale, column, count, 1);
          for (int k = 0; k < count; ++k) {
            const float d = scale != nullptr ? slopes.v[k] * by.v[k] : slopes.v[k];
            sum += static_cast<double>(d);
            along += static_cast<double>(d * (from.v[k] - o.mean));
          }
        },
        part, parts);
  }
};
template <class M>
bool backward_statistic(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  const Numbers sums = numbers(a.statistics[0]), to = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  const SlopeSums add{r,
                      numbers(a.inputs[0]),
                      numbers(a.output_gradients[0]),
                      op.scale ? numbers(a.parameters[0]) : Numbers(),
                      sums,
                      whole};
  if (r.parts() > 1) {
    sum_by_parts(
        m, r, add, PARTITA_KERNEL(std::int64_t g, double sum, double along) {
          const Moments o = moments_of(r, sums, whole, g);
          if (r.width == 2) to[2 * g] = static_cast<float>(sum);
          to[g * r.width + r.width - 1] =
              static_cast<float>(along * static_cast<double>(o.inverse));
        });
    return true;
  }
  m.rows(
      r.groups, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t g, const Lanes& lanes) {
        double sum = 0, along = 0;
        add(g, lanes, 0, 1, sum, along);
        sum = r.width == 2 ? lanes.sum(sum) : 0;
        along = lanes.sum(along);
        if (lanes.lane() != 0) return;
        if (r.width == 2) to[2 * g] = static_cast<float>(sum);
        to[g * r.width + r.width - 1] =
            static_cast<float>(along * static_cast<double>(moments_of(r, sums, whole, g).inverse));
      });
  return true;
}
template <class M>
bool data(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  if (op.kind == Normalize::Kind::local) return local_data(m, op, a);
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  if (a.own_statistics) {
    by_rows(whole_rows(r.length, a),
            numbers(a.inputs[0]).narrow() && numbers(a.output_gradients[0]).narrow(),
            [&]<bool kWhole, bool kNarrow>() { slopes_of_rows<kWhole, kNarrow>(m, op, r, a); });
    return true;
  }
  const Numbers x = numbers(a.inputs[0]), dy = numbers(a.output_gradients[0]),
                sums = numbers(a.statistics[0]), back = numbers(a.backward_statistics[0]);
  const Numbers scale = op.scale ? numbers(a.parameters[0]) : nullptr;
  const Numbers dx = numbers(a.results[0]);
  const bool whole = a.whole_statistics;
  const std::int64_t parts = r.parts();
  m.rows(
      r.groups * parts, r.lanes_wanted(), PARTITA_KERNEL(std::int64_t q, const Lanes& lanes) {
        const std::int64_t g = q / parts;
        const Moments o = moments_of(r, sums, whole, g);
        const float mean =
            r.width == 2 ? static_cast<float>(static_cast<double>(back[2 * g]) / r.members) : 0.0f;
        const auto along =
            static_cast<float>(static_cast<double>(back[g * r.width + r.width - 1]) / r.members);
        r.each(
            lanes, g, x,
            [&](std::int64_t i, std::int64_t column, std::int64_t count, const Octet& from) {
              const Octet slopes = octet(dy, i, count), by = by_column(r, scale, column, count, 1);
              Octet to;
              for (int k = 0; k < Octet::kSize; ++k) {
                const float d = scale != nullptr ? slopes.v[k] * by.v[k] : slopes.v[k];
                to.v[k] = o.inverse * (d - mean - (from.v[k] - o.mean) * o.inverse * along);
              }
              put(dx, i, count, to);
            },
            q % parts, parts);
      });
  return true;
}
/// Of a row's elements, what scales and biases get.
struct ScaleSlopes {
  static constexpr int kSums = 2;
  struct Loaded {
    Raw x, dy;
    Moments of;
  };
  Runs r;
  Numbers x, dy, sums;
  bool whole;
  PARTITA_LANE Loaded load(std::int64_t g, std::int64_t first, std::int64_t count) const {
    const std::int64_t at = g * r.length + first;
    return {raw_octet(x, at, count), raw_octet(dy, at, count), moments_of(r, sums, whole, g)};
  }
  PARTITA_LANE void add(const Loaded& l, Octet (&to)[2]) const {
    const Octet v = octet_of(l.x, x.type()), d = octet_of(l.dy, dy.type());
    for (int e = 0; e < Octet::kSize; ++e) {
      to[0].v[e] += d.v[e] * (v.v[e] - l.of.mean) * l.of.inverse;
      to[1].v[e] += d.v[e];
    }
  }
};
template <class M>
bool weight(M& m, const Normalize& op, const Context& c, const Arguments& a) {
  Runs r;
  if (!runs_of(op, c, a.inputs[0], r)) return false;
  const Numbers x = numbers(a.inputs[0]), dy = numbers(a.output_gradients[0]),
                sums = numbers(a.statistics[0]);
  const Numbers to_scale = op.scale && wanted(a, 0) ? numbers(a.results[0]) : nullptr;
  const std::size_t second = op.scale ? 1 : 0;
  const Numbers to_bias = op.bias && wanted(a, second) ? numbers(a.results[second]) : nullptr;
  const bool whole = a.whole_statistics, accumulate = a.accumulate;
  if (r.batch) {
    sum_by_parts(
        m, r, SlopeSums{r, x, dy, nullptr, sums, whole},
        PARTITA_KERNEL(std::int64_t g, double sum, double along) {
          along *= static_cast<double>(moments_of(r, sums, whole, g).inverse);
          if (to_scale != nullptr)
            to_scale[g] = static_cast<float>(along) + (accumulate ? to_scale[g] : 0.0f);
          if (to_bias != nullptr)
            to_bias[g] = static_cast<float>(sum) + (accumulate ? to_bias[g] : 0.0f);
        });
    return true;
  }
  // Rows are groups, columns elements.
  sum_rows(
      m, ScaleSlopes{r, x, dy, sums, whole}, r.groups, r.length,
      PARTITA_KERNEL(std::int64_t column, const float(&s)[2]) {
        if (to_scale != nullptr) to_scale[column] = s[0] + (accumulate ? to_scale[column] : 0.0f);
        if (to_bias != nullptr) to_bias[column] = s[1] + (accumulate ? to_bias[column] : 0.0f);
      });
  return true;
}

}  // namespace partita::cuda
