// runtime/cuda/plain.h: kernels of plain buffers over any machine (operators.h). False: the host's.
#pragma once

#include "runtime/cuda/operators.h"
#include "runtime/execute/device.h"

namespace partita::cuda {

using execute::PlainCall;

inline Numbers numbers(const PlainCall::Operand& o) { return {o.data, o.type}; }

// nvcc is told -fmad=false: no product is fused into a sum, as on the host, so that equal inputs
// give equal bits.

/// As reference::clip_factor.
PARTITA_BOTH double clip_factor(double clip, double square_sum) {
  const double factor = clip / (sqrt(square_sum) + 1e-6);
  return factor < 1 ? factor : 1;
}

/// to = the sum of all, in their order. A pass takes several: the sum itself is read again by each
/// but the first.
struct Terms {
  static constexpr int kMost = 4;
  Numbers at[kMost];
  int count = 0;
};
template <bool kApart>
struct SumOfTerms {
  using Eight = EightOf<kApart>;
  Terms t;
  Numbers to;
  std::int64_t n;
  PARTITA_LANE void operator()(std::int64_t number) const {
    Raw raw[Terms::kMost];
    PARTITA_UNROLL
    for (int k = 0; k < Terms::kMost; ++k) {
      if (k >= t.count) break;
      raw[k] = Eight::raw(t.at[k], number, n);
    }
    Octet sum = octet_of(raw[0], t.at[0].type());
    PARTITA_UNROLL
    for (int k = 1; k < Terms::kMost; ++k) {
      if (k >= t.count) break;
      const Octet o = octet_of(raw[k], t.at[k].type());
      for (int e = 0; e < Octet::kSize; ++e) sum.v[e] += o.v[e];
    }
    Eight::put(to, number, n, sum);
  }
};
template <class M>
void sum_values(M& m, const std::vector<PlainCall::Operand>& all, Numbers to, std::int64_t n) {
  for (std::size_t next = 0; next < all.size();) {
    Terms t;
    if (next > 0) t.at[t.count++] = to;
    while (t.count < Terms::kMost && next < all.size()) t.at[t.count++] = numbers(all[next++]);
    if (any_wide(t.at[0], to)) {
      m.each(EightOf<true>::count(n), SumOfTerms<true>{t, to, n});
    } else {
      m.each(EightOf<false>::count(n), SumOfTerms<false>{t, to, n});
    }
  }
}
template <class M>
void divide_values(M& m, Numbers from, Numbers to, std::int64_t n, float by) {
  map_one(
      m, n, from, to, PARTITA_KERNEL(float v) { return v / by; });
}
/// Several buffers as one, by pieces of so many numbers: one kernel for all, where a launch each
/// would take longer than most.
struct Joined {
  /// Of most kernels: eight numbers of 32 threads (EightOf).
  static constexpr std::int64_t kThreads = 32, kPiece = kThreads * Octet::kSize;
  IndexList list;  ///< of all their first piece, then address, number of elements, type
  std::int64_t buffers = 0, pieces = 0;
  struct Place {
    Numbers of;
    std::int64_t first = 0, size = 0;  ///< of the piece in it, and its own
  };
  PARTITA_BOTH Place place(std::int64_t piece, std::int64_t numbers) const {
    std::int64_t low = 0, high = buffers;
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      if (list.at(middle) <= piece) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return {Numbers(reinterpret_cast<void*>(list.at(buffers + low)),
                    static_cast<ElementType>(list.at(3 * buffers + low))),
            (piece - list.at(low)) * numbers, list.at(2 * buffers + low)};
  }
};
template <class M>
Joined joined(M& m, const std::vector<PlainCall::Operand>& all, std::int64_t numbers) {
  Joined j;
  std::vector<std::int64_t> first, at, count, type;
  for (const auto& o : all) {
    if (o.elements == 0) continue;
    first.push_back(j.pieces);
    at.push_back(static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(o.data)));
    count.push_back(o.elements);
    type.push_back(static_cast<std::int64_t>(o.type));
    j.pieces += (o.elements + numbers - 1) / numbers;
  }
  j.buffers = std::ssize(first);
  if (j.buffers == 0) return j;
  for (const auto* list : {&at, &count, &type})
    first.insert(first.end(), list->begin(), list->end());
  j.list = m.upload(first);
  return j;
}

/// By 1 / by[0], or by the factor that clips a norm of square by[0].
template <class M>
void scale_all(M& m, const std::vector<PlainCall::Operand>& all, Numbers by, double clip,
               bool clips) {
  const Joined j = joined(m, all, Joined::kPiece);
  if (j.pieces == 0) return;
  float* const factor = m.scratch(1);
  m.each(
      1, PARTITA_KERNEL(std::int64_t) {
        *factor =
            clips ? static_cast<float>(clip_factor(clip, static_cast<double>(by[0]))) : 1 / by[0];
      });
  m.each(
      j.pieces * Joined::kThreads, PARTITA_KERNEL(std::int64_t i) {
        const Joined::Place p = j.place(i / Joined::kThreads, Joined::kPiece);
        const Numbers at = p.of + p.first;
        const std::int64_t number = i % Joined::kThreads, n = p.size - p.first;
        if (EightOf<true>::first(number) >= n) return;
        Octet o = EightOf<true>::octet(at, number, n);
        for (int k = 0; k < Octet::kSize; ++k) o.v[k] *= *factor;
        EightOf<true>::put(at, number, n, o);
      });
}

/// As execute::Device::draw.
template <class M>
void draw_values(M& m, Numbers to, std::int64_t n, float mean, float deviation,
                 std::uint64_t seed) {
  m.each(
      n, PARTITA_KERNEL(std::int64_t i) {
        to[i] =
            mean + deviation * static_cast<float>(normal(seed, 0, static_cast<std::uint64_t>(i)));
      });
}

/// Of all operands, in an order that does not depend on the machine: a partial sum a chunk, then of
/// so many of those. `counts`: how many are not finite, as 0 or 1.
template <class M>
bool square_sum(M& m, const PlainCall& call, bool counts) {
  constexpr std::int64_t kChunk = 1 << 15, kParts = 1024;
  const Joined j = joined(m, call.reads, kChunk);
  double* parts = reinterpret_cast<double*>(m.scratch(2 * j.pieces + 2));
  std::int64_t n = j.pieces;
  m.rows(
      n, once_width(kChunk), PARTITA_KERNEL(std::int64_t piece, const Lanes& lanes) {
        const Joined::Place p = j.place(piece, kChunk);
        const std::int64_t left = p.size - p.first;
        double sum = 0;
        each_octet(p.of + p.first, left < kChunk ? left : kChunk, lanes,
                   [&](std::int64_t, std::int64_t count, const Octet& o) {
                     for (int k = 0; k < Octet::kSize; ++k) {
                       if (k >= count) break;
                       const auto x = static_cast<double>(o.v[k]);
                       sum += counts ? (finite(x) ? 0.0 : 1.0) : x * x;
                     }
                   });
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) parts[piece] = sum;
      });
  while (n > kParts) {
    const std::int64_t from_n = n;
    const double* const from = parts;
    n = (n + kParts - 1) / kParts;
    double* const to = parts = reinterpret_cast<double*>(m.scratch(2 * n));
    m.rows(
        n, kParts, PARTITA_KERNEL(std::int64_t row, const Lanes& lanes) {
          const std::int64_t end = (row + 1) * kParts < from_n ? (row + 1) * kParts : from_n;
          double sum = 0;
          for (std::int64_t i = row * kParts + lanes.lane(); i < end; i += lanes.count())
            sum += from[i];
          sum = lanes.sum(sum);
          if (lanes.lane() == 0) to[row] = sum;
        });
  }
  const Numbers to = numbers(call.writes[0]);
  const double* const from = parts;
  m.rows(
      1, n, PARTITA_KERNEL(std::int64_t, const Lanes& lanes) {
        double sum = 0;
        for (std::int64_t i = lanes.lane(); i < n; i += lanes.count()) sum += from[i];
        sum = lanes.sum(sum);
        if (lanes.lane() == 0) to[0] = counts ? (sum > 0 ? 1.0f : 0.0f) : static_cast<float>(sum);
      });
  return true;
}

/// Of Adam's update, AdamStep's.
struct Corrections {
  float rate, scale;
};

/// What every update has: `image` is a master copy's, the parameter where there is none.
struct Updated {
  Numbers overflow, gradient, first, w, image;
  std::int64_t n;
  bool mastered;
  PARTITA_LANE bool skips() const { return overflow != nullptr && overflow[0] != 0; }
  /// What is stored is what is used.
  template <class Eight>
  PARTITA_LANE Octet stored(const Numbers& to, std::int64_t number, const Octet& o) const {
    Eight::put(to, number, n, o);
    return !Eight::kKnownWide && to.narrow() ? Eight::octet(to, number, n) : o;
  }
};
struct Sgd : Updated {
  float rate, momentum;
  template <class Eight, class Image>
  PARTITA_LANE void update(std::int64_t number) const {
    const bool remembers = first != nullptr;
    Raw of_f{};
    if (remembers) of_f = Eight::raw(first, number, n);
    const Raw of_g = Eight::raw(gradient, number, n), of_p = Eight::raw(w, number, n);
    const Octet g = Eight::octet_of(of_g, gradient);
    Octet f = g, p = Eight::octet_of(of_p, w);
    if (remembers) {
      f = Eight::octet_of(of_f, first);
      for (int k = 0; k < Octet::kSize; ++k) f.v[k] = momentum * f.v[k] + g.v[k];
      f = stored<Eight>(first, number, f);
    }
    for (int k = 0; k < Octet::kSize; ++k) p.v[k] -= rate * f.v[k];
    Eight::put(w, number, n, p);
    if (mastered) Image::put(image, number, n, p);
  }
};
struct Adam : Updated {
  Numbers second;
  execute::AdamStep known;
  Stepped<Corrections> of_step;
  const float* corrected;  ///< where only the device knows the number of updates
  template <class Eight, class Image>
  PARTITA_LANE void update(std::int64_t number) const {
    const Corrections here =
        corrected != nullptr ? Corrections{corrected[0], corrected[1]} : of_step();
    const Raw of_g = Eight::raw(gradient, number, n), of_f = Eight::raw(first, number, n),
              of_s = Eight::raw(second, number, n), of_p = Eight::raw(w, number, n);
    const Octet g = Eight::octet_of(of_g, gradient);
    Octet f = Eight::octet_of(of_f, first), s = Eight::octet_of(of_s, second),
          p = Eight::octet_of(of_p, w);
    for (int k = 0; k < Octet::kSize; ++k) {
      f.v[k] = known.beta1 * f.v[k] + (1 - known.beta1) * g.v[k];
      s.v[k] = known.beta2 * s.v[k] + (1 - known.beta2) * g.v[k] * g.v[k];
    }
    f = stored<Eight>(first, number, f);
    s = stored<Eight>(second, number, s);
    for (int k = 0; k < Octet::kSize; ++k)
      p.v[k] =
          p.v[k] * known.keep - here.rate * f.v[k] / (sqrtf(s.v[k]) * here.scale + known.epsilon);
    Eight::put(w, number, n, p);
    if (mastered) Image::put(image, number, n, p);
  }
};
template <class U, bool kApart, bool kSure>
struct Update {
  U u;
  PARTITA_LANE void operator()(std::int64_t number) const {
    if (!u.skips()) u.template update<EightOf<kApart, kSure>, EightOf<kApart>>(number);
  }
};
/// `all`: what it reads. In fp32 and of whole pieces no load waits for another's type.
template <class M, class U, class... N>
void start_update(M& m, const U& u, const N&... all) {
  if ((... && EightOf<true>::sure(u.n, all))) {
    m.each(EightOf<true>::count(u.n), Update<U, true, true>{u});
  } else if (any_wide(all..., u.image)) {
    m.each(EightOf<true>::count(u.n), Update<U, true, false>{u});
  } else {
    m.each(EightOf<false>::count(u.n), Update<U, false, false>{u});
  }
}
template <class M>
bool optimizer(M& m, const PlainCall& call) {
  const std::int64_t n = call.writes[0].elements;
  if (n == 0) return true;
  const Numbers gradient = numbers(call.reads[0]);
  const bool dynamic = call.program->loss_scale.dynamic;
  // Gradients that overflowed are not used; with a loss scale the updates are counted beside it.
  const Numbers overflow =
      dynamic && !call.statistics.empty() ? numbers(call.statistics[0]) : nullptr;
  const Numbers counted = call.statistics.empty() ? nullptr : numbers(call.statistics[1]);
  const Numbers image = numbers(call.writes[0]),
                first = call.outputs.empty() ? nullptr : numbers(call.outputs[0]);
  // Where parameters are narrow the update goes to the master copy; the parameter is its image.
  const bool mastered = !call.extras.empty();
  const Numbers w = mastered ? numbers(call.extras[0]) : image;
  if (mastered && call.step == 0) copy_values(m, image, w, n);
  const Optimizer& o = call.optimizer;
  if (o.kind == OptimizerKind::sgd) {
    const auto rate = static_cast<float>(o.learning_rate),
               momentum = static_cast<float>(o.momentum);
    const Sgd u{{overflow, gradient, first, w, image, n, mastered}, rate, momentum};
    if (first == nullptr) {
      start_update(m, u, gradient, w);
    } else {
      start_update(m, u, gradient, first, w);
    }
    return true;
  }
  const Numbers second = numbers(call.outputs[1]);
  const execute::AdamStep known = execute::adam_step(o, call.step);
  // Of it what differs from step to step.
  const Stepped<Corrections> of_step = m.stepped(call.step, [o](std::int64_t step) {
    const execute::AdamStep a = execute::adam_step(o, step);
    return Corrections{a.rate, a.scale};
  });
  // Where only the device knows the number of updates.
  float* corrected = counted == nullptr ? nullptr : m.scratch(2);
  if (counted != nullptr) {
    const double beta1 = o.beta1, beta2 = o.beta2, learning_rate = o.learning_rate;
    m.each(
        1, PARTITA_KERNEL(std::int64_t) {
          const double t = static_cast<double>(counted[2]) + 1;
          corrected[0] = static_cast<float>(learning_rate / (1 - pow(beta1, t)));
          corrected[1] = static_cast<float>(1 / sqrt(1 - pow(beta2, t)));
        });
  }
  const Adam u{
      {overflow, gradient, first, w, image, n, mastered}, second, known, of_step, corrected};
  start_update(m, u, gradient, first, second, w);
  return true;
}

template <class M>
bool cast_gradient(M& m, const PlainCall& call) {
  const Compression& c = call.program->compression;
  if (c.type != ElementType::bf16 && c.type != ElementType::fp16) return false;
  const bool bf16 = c.type == ElementType::bf16, feedback = c.error_feedback;
  if (call.instruction->kernel == Kernel::decompress) {
    const auto* from = reinterpret_cast<const std::uint16_t*>(call.reads[0].data);
    const Numbers to = numbers(call.writes[0]);
    m.each(
        call.writes[0].elements,
        PARTITA_KERNEL(std::int64_t k) { to[k] = bf16 ? from_bf16(from[k]) : from_fp16(from[k]); });
    return true;
  }
  const Numbers gradient = numbers(call.reads[0]);
  const Numbers kept = call.outputs.empty() ? nullptr : numbers(call.outputs[0]);
  auto* to = reinterpret_cast<std::uint16_t*>(call.writes[0].data);
  m.each(
      call.reads[0].elements, PARTITA_KERNEL(std::int64_t k) {
        const float v = kept != nullptr && feedback ? kept[k] + gradient[k] : gradient[k];
        to[k] = bf16 ? to_bf16(v) : to_fp16(v);
        if (kept != nullptr) kept[k] = v - (bf16 ? from_bf16(to[k]) : from_fp16(to[k]));
      });
  return true;
}

template <class M>
void zero_all(M& m, const std::vector<PlainCall::Operand>& all) {
  const Joined j = joined(m, all, Joined::kPiece);
  m.each(
      j.pieces * Joined::kThreads, PARTITA_KERNEL(std::int64_t i) {
        const Joined::Place p = j.place(i / Joined::kThreads, Joined::kPiece);
        EightOf<true>::put(p.of + p.first, i % Joined::kThreads, p.size - p.first, Octet{});
      });
}

template <class M>
bool run_plain(M& m, const PlainCall& call) {
  const auto scale = [&](bool clips) {
    scale_all(m, call.writes, numbers(call.reads[0]), call.program->optimizer.clip, clips);
  };
  switch (call.instruction->kernel) {
    case Kernel::zero:
      if (call.writes.size() == 1) {
        fill_values(m, numbers(call.writes[0]), call.writes[0].elements, 0);
      } else {
        zero_all(m, call.writes);
      }
      return true;
    case Kernel::add:
      sum_values(m, call.reads, numbers(call.writes[0]), call.writes[0].elements);
      return true;
    case Kernel::optimizer:
      return optimizer(m, call);
    case Kernel::scale:
      divide_values(m, numbers(call.reads[0]), numbers(call.writes[0]), call.writes[0].elements,
                    static_cast<float>(call.program->mesh.size(call.instruction->atoms)));
      return true;
    case Kernel::square_sum:
      return square_sum(m, call, false);
    case Kernel::not_finite:
      return square_sum(m, call, true);
    case Kernel::unscale:
      scale(false);
      return true;
    case Kernel::clip:
      scale(true);
      return true;
    case Kernel::dequeue:
    case Kernel::enqueue: {
      const auto& queue = call.outputs[0];
      const auto length = static_cast<std::int64_t>(queue.box->index[0].size());
      const std::int64_t n = queue.elements / length;
      const Numbers at = numbers(queue) + n * (call.step % length);
      if (call.instruction->kernel == Kernel::enqueue) {
        copy_values(m, numbers(call.reads[0]), at, n);
      } else {
        copy_values(m, at, numbers(call.writes[0]), n);
      }
      return true;
    }
    case Kernel::compress:
    case Kernel::decompress:
      return call.program->compression.kind == CompressionKind::cast && cast_gradient(m, call);
    case Kernel::loss_scale:
    case Kernel::forward_statistic:
    case Kernel::forward:
    case Kernel::backward_statistic:
    case Kernel::backward_data:
    case Kernel::backward_weight:
    case Kernel::initialise:
    case Kernel::read:
      return false;
  }
  return false;
}

}  // namespace partita::cuda
