// Kernels of plain buffers on the host: gradients' sums, scales and norms, compression, the
// optimizer.
#include <algorithm>
#include <cmath>

#include "runtime/execute/device.h"
#include "runtime/reference/compression.h"
#include "runtime/reference/interpreter.h"
#include "runtime/transport/narrow.h"

namespace partita::execute {
namespace {

using Operand = PlainCall::Operand;

reference::PowerShape power_shape(const PlainCall& call, const Operand& kept) {
  const auto& index = kept.box->index;
  reference::PowerShape s{static_cast<std::int64_t>(index[0].size()), 1,
                          call.program->compression.rank};
  for (std::size_t d = 1; d < index.size(); ++d)
    s.cols *= static_cast<std::int64_t>(index[d].size());
  return s;
}

void compress(const PlainCall& call) {
  const Compression& c = call.program->compression;
  const Operand& gradients = call.reads[0];
  const Operand& to = call.writes[0];
  if (call.instruction->index == 1) {
    const reference::PowerShape s = power_shape(call, call.outputs[0]);
    const float* sums = gradients.values();
    std::vector<float> left(sums, sums + s.rows * s.rank);
    reference::orthonormalise(s, left.data());
    reference::power_right(s, call.outputs[0].values(), left.data(), to.values());
    return;
  }
  const std::int64_t n = gradients.elements;
  const float* gradient = gradients.values();
  float* kept = call.outputs.empty() ? nullptr : call.outputs[0].values();
  std::vector<float> alone, sent;
  if (kept == nullptr) alone.assign(gradient, gradient + n);
  float* p = kept == nullptr ? alone.data() : kept;
  if (kept != nullptr) {
    // What was kept and the gradient, where the rest of both will be kept.
    for (std::int64_t k = 0; k < n; ++k) p[k] = (c.error_feedback ? p[k] : 0) + gradient[k];
  }
  switch (c.kind) {
    case CompressionKind::none:
      return;
    case CompressionKind::cast:
      narrow(c.type, p, to.data, n);
      sent.resize(static_cast<std::size_t>(n));
      widen(c.type, to.data, sent.data(), n);
      for (std::int64_t k = 0; k < n; ++k) p[k] -= sent[static_cast<std::size_t>(k)];
      return;
    case CompressionKind::top_k: {
      const auto at = reference::top_positions(p, n, to.elements);
      float* top = to.values();
      auto* where = reinterpret_cast<std::uint32_t*>(call.writes[1].data);
      for (std::size_t k = 0; k < at.size(); ++k) {
        top[k] = p[at[k]];
        where[k] = at[k];
        p[at[k]] = 0;
      }
      return;
    }
    case CompressionKind::one_bit: {
      const float scale = reference::mean_magnitude(p, n);
      call.writes[1].values()[0] = scale;
      auto* words = reinterpret_cast<std::uint32_t*>(to.data);
      for (std::int64_t w = 0; w < to.elements; ++w) words[w] = reference::sign_word(p, n, w);
      for (std::int64_t k = 0; k < n; ++k) p[k] -= p[k] < 0 ? -scale : scale;
      return;
    }
    case CompressionKind::power_sgd: {
      const reference::PowerShape s = power_shape(call, call.outputs[0]);
      float* start = call.outputs[1].values();
      if (call.step == 0) {
        const std::int32_t parameter = call.program->buffer(call.instruction->outputs[1]).parameter;
        for (std::int64_t k = 0; k < s.cols * s.rank; ++k)
          start[k] = static_cast<float>(reference::power_start(parameter, k));
      }
      reference::power_left(s, p, start, to.values());
      return;
    }
  }
}

void decompress(const PlainCall& call) {
  const Compression& c = call.program->compression;
  const std::int64_t n = call.writes[0].elements;
  const std::int64_t members = call.program->mesh.size(call.instruction->atoms);
  const Operand& from = call.reads[0];
  float* sum = call.writes[0].values();
  switch (c.kind) {
    case CompressionKind::none:
      return;
    case CompressionKind::cast:
      widen(c.type, from.data, sum, n);
      return;
    case CompressionKind::top_k: {
      std::fill_n(sum, n, 0.0f);
      const float* top = from.values();
      const auto* where = reinterpret_cast<const std::uint32_t*>(call.reads[1].data);
      for (std::int64_t k = 0; k < from.elements; ++k) sum[where[k]] += top[k];
      return;
    }
    case CompressionKind::one_bit: {
      std::fill_n(sum, n, 0.0f);
      const auto* words = reinterpret_cast<const std::uint32_t*>(from.data);
      const float* scales = call.reads[1].values();
      const std::int64_t each = from.elements / members;
      for (std::int64_t m = 0; m < members; ++m) {
        for (std::int64_t k = 0; k < n; ++k)
          sum[k] += (words[m * each + k / 32] >> (k % 32) & 1u) != 0 ? -scales[m] : scales[m];
      }
      return;
    }
    case CompressionKind::power_sgd: {
      const reference::PowerShape s = power_shape(call, call.outputs[0]);
      const float *sums = from.values(), *right = call.reads[1].values();
      std::vector<float> left(sums, sums + s.rows * s.rank);
      reference::orthonormalise(s, left.data());
      reference::power_product(s, left.data(), right, sum);
      float* kept = call.outputs[0].values();
      for (std::int64_t k = 0; k < n; ++k)
        kept[k] = c.error_feedback ? kept[k] - sum[k] / static_cast<float>(members) : 0;
      std::copy_n(right, s.cols * s.rank, call.outputs[1].values());
      return;
    }
  }
}

void optimizer(const PlainCall& call) {
  const Operand& to = call.writes[0];
  if (to.elements == 0) return;
  const auto n = static_cast<std::size_t>(to.elements);
  const float* gradient = call.reads[0].values();
  std::int64_t updates = call.step;
  if (!call.statistics.empty()) {
    // Gradients that overflowed are not used.
    if (call.program->loss_scale.dynamic && call.statistics[0].values()[0] != 0) return;
    updates = std::llround(static_cast<double>(call.statistics[1].values()[2]));
  }
  float* w = to.values();
  if (!call.extras.empty()) {
    // The update goes to the master copy; the parameter is its rounded image.
    float* master = call.extras[0].values();
    if (call.step == 0) std::copy_n(w, n, master);
    w = master;
  }
  const auto show = [&] {
    if (w != to.values()) std::copy_n(w, n, to.values());
  };
  const Optimizer& o = call.optimizer;
  float* first = call.outputs.empty() ? nullptr : call.outputs[0].values();
  if (o.kind == OptimizerKind::sgd) {
    const auto rate = static_cast<float>(o.learning_rate),
               momentum = static_cast<float>(o.momentum);
    for (std::size_t k = 0; k < n; ++k) {
      float slope = gradient[k];
      if (first != nullptr) slope = first[k] = momentum * first[k] + slope;
      w[k] -= rate * slope;
    }
    show();
    return;
  }
  float* second = call.outputs[1].values();
  const AdamStep a = adam_step(o, updates);
  for (std::size_t k = 0; k < n; ++k) {
    const float g = gradient[k];
    first[k] = a.beta1 * first[k] + (1 - a.beta1) * g;
    second[k] = a.beta2 * second[k] + (1 - a.beta2) * g * g;
    w[k] = w[k] * a.keep - a.rate * first[k] / (std::sqrt(second[k]) * a.scale + a.epsilon);
  }
  show();
}

/// False where all operands are fp32; else carried out on widened copies.
bool on_wide_copies(const PlainCall& call) {
  PlainCall wide = call;
  bool narrow = false;
  for (const auto* list :
       {&call.reads, &call.outputs, &call.statistics, &call.extras, &call.writes}) {
    for (const Operand& o : *list) narrow |= o.type != ElementType::fp32;
  }
  if (!narrow) return false;
  const auto host = host_device();
  Visits visits(*host);
  const auto visit = [&](std::vector<Operand>& list, bool written) {
    for (Operand& o : list) {
      o.data = reinterpret_cast<std::byte*>(visits.floats(o.data, o.type, o.elements, written));
      if (o.type != ElementType::fp32) o.bytes = o.elements * 4;
      o.type = ElementType::fp32;
    }
  };
  visit(wide.reads, false);
  visit(wide.outputs, true);
  visit(wide.statistics, false);
  visit(wide.extras, true);
  visit(wide.writes, true);
  plain_on_host(wide);
  visits.give_back();
  return true;
}

}  // namespace

AdamStep adam_step(const Optimizer& o, std::int64_t updates) {
  const auto t = static_cast<double>(updates + 1);
  const double correct1 = 1 - std::pow(o.beta1, t), correct2 = 1 - std::pow(o.beta2, t);
  return {static_cast<float>(o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(1 - o.learning_rate * o.weight_decay),
          static_cast<float>(o.learning_rate / correct1),
          static_cast<float>(1 / std::sqrt(correct2)),
          static_cast<float>(o.epsilon)};
}

void plain_on_host(const PlainCall& call) {
  if (on_wide_copies(call)) return;
  const auto scale_all = [&](float factor) {
    for (const Operand& o : call.writes) {
      for (std::int64_t k = 0; k < o.elements; ++k) o.values()[k] *= factor;
    }
  };
  switch (call.instruction->kernel) {
    case Kernel::zero:
      for (const Operand& o : call.writes) std::fill_n(o.values(), o.elements, 0.0f);
      return;
    case Kernel::add: {
      const std::int64_t n = call.writes[0].elements;
      float* sum = call.writes[0].values();
      std::copy_n(call.reads[0].values(), n, sum);
      for (std::size_t r = 1; r < call.reads.size(); ++r) {
        const float* c = call.reads[r].values();
        for (std::int64_t k = 0; k < n; ++k) sum[k] += c[k];
      }
      return;
    }
    case Kernel::optimizer:
      optimizer(call);
      return;
    case Kernel::scale: {
      const float* from = call.reads[0].values();
      float* to = call.writes[0].values();
      const auto n = static_cast<float>(call.program->mesh.size(call.instruction->atoms));
      for (std::int64_t k = 0; k < call.writes[0].elements; ++k) to[k] = from[k] / n;
      return;
    }
    case Kernel::square_sum: {
      double sum = 0;
      for (const Operand& o : call.reads) {
        const float* v = o.values();
        for (std::int64_t k = 0; k < o.elements; ++k)
          sum += static_cast<double>(v[k]) * static_cast<double>(v[k]);
      }
      call.writes[0].values()[0] = static_cast<float>(sum);
      return;
    }
    case Kernel::loss_scale: {
      float* state = call.outputs[0].values();
      if (call.instruction->index == 0) {
        if (state[0] == 0) state[0] = static_cast<float>(call.program->loss_scale.initial);
        call.writes[0].values()[0] = state[0];
      } else {
        reference::adapt_loss_scale(call.program->loss_scale, call.reads[0].values()[0] != 0,
                                    state);
      }
      return;
    }
    case Kernel::unscale:
      scale_all(1 / call.reads[0].values()[0]);
      return;
    case Kernel::clip:
      scale_all(static_cast<float>(reference::clip_factor(
          call.program->optimizer, static_cast<double>(call.reads[0].values()[0]))));
      return;
    case Kernel::not_finite: {
      float flag = 0;
      for (const Operand& o : call.reads) {
        const float* v = o.values();
        for (std::int64_t k = 0; k < o.elements; ++k)
          if (!std::isfinite(v[k])) flag = 1;
      }
      call.writes[0].values()[0] = flag;
      return;
    }
    case Kernel::compress:
      compress(call);
      return;
    case Kernel::decompress:
      decompress(call);
      return;
    case Kernel::dequeue:
    case Kernel::enqueue: {
      const Operand& queue = call.outputs[0];
      const auto length = static_cast<std::int64_t>(queue.box->index[0].size());
      const std::int64_t n = queue.elements / length;
      float* at = queue.values() + n * (call.step % length);
      if (call.instruction->kernel == Kernel::enqueue) {
        std::copy_n(call.reads[0].values(), n, at);
      } else {
        std::copy_n(at, n, call.writes[0].values());
      }
      return;
    }
    case Kernel::forward_statistic:
    case Kernel::forward:
    case Kernel::backward_statistic:
    case Kernel::backward_data:
    case Kernel::backward_weight:
    case Kernel::initialise:
    case Kernel::read:
      return;
  }
}

}  // namespace partita::execute
