#include <algorithm>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>

#include "base/error.h"
#include "runtime/cpu/fast.h"

/// oneDNN shares its loops among OpenMP's threads. A rank is one core, so its part is one thread;
/// the setting is the calling thread's own.
extern "C" void omp_set_num_threads(int threads);

namespace partita::cpu {
namespace {

using dnnl::memory;

/// Primitives of one convolution at one local shape; one per rank, so no locks.
struct Primitives {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  struct One {
    dnnl::primitive primitive;
    memory::desc x, w, y;  ///< as the primitive wants them
  };
  std::map<int, One> passes;
  memory::desc x, w, y, b;  ///< as they lie in memory
};

memory::dims dims_of(const std::vector<Indices>& index) {
  memory::dims d;
  for (const auto& list : index) d.push_back(static_cast<memory::dim>(list.size()));
  return d;
}

/// Padding of the local window: what the outputs read before and after the inputs that are held.
struct Padding {
  memory::dim before, after;
};
Padding padding(const Window& w, const Indices& x, const Indices& y) {
  const std::int64_t first = y.front() * w.stride - w.pad_before;
  const std::int64_t last = y.back() * w.stride - w.pad_before + w.dilation * (w.kernel - 1);
  return {std::max<std::int64_t>(0, x.front() - first), std::max<std::int64_t>(0, last - x.back())};
}

bool contiguous(const Indices& list) {
  return !list.empty() && list.back() - list.front() + 1 == static_cast<std::int64_t>(list.size());
}

}  // namespace

bool convolve(const reference::Context& c, const Arguments& a, Kept& kept, ConvolutionPass pass) {
  const auto& op = std::get<Convolution>(*c.operation);
  const Signature& s = *c.signature;
  // Filters and channels that a rank holds must be whole groups.
  if (op.groups > 1) {
    for (const IterationDim& d : s.dims) {
      if (d.dim == Dim::feature && c.indices[static_cast<std::size_t>(&d - s.dims.data())].size() !=
                                       static_cast<std::size_t>(d.extent))
        return false;
    }
  }
  std::vector<Indices> xi, wi, yi;
  for (std::size_t d = 0; d < 4; ++d) {
    xi.push_back(reference::touched(c, s.inputs[0], d));
    wi.push_back(reference::touched(c, s.parameters[0], d));
    yi.push_back(reference::touched(c, s.outputs[0], d));
  }
  for (const auto* list : {&xi[2], &xi[3], &yi[2], &yi[3]}) {
    if (!contiguous(*list)) return false;
  }
  if (xi[0].empty() || xi[1].empty() || yi[1].empty()) return false;
  // Gradients: what no window reads, or reads before the first held row, would not come out.
  const Padding ph = padding(op.height, xi[2], yi[2]), pw = padding(op.width, xi[3], yi[3]);
  if (yi[2].front() * op.height.stride - op.height.pad_before > xi[2].front() ||
      yi[3].front() * op.width.stride - op.width.pad_before > xi[3].front())
    return false;

  omp_set_num_threads(1);
  if (!kept.library) kept.library = std::make_shared<Primitives>();
  auto& p = *static_cast<Primitives*>(kept.library.get());
  const auto f32 = memory::data_type::f32;
  if (p.passes.empty()) {
    memory::dims w = dims_of(wi);
    auto tag = memory::format_tag::oihw;
    if (op.groups > 1) {
      w = {op.groups, w[0] / op.groups, w[1], w[2], w[3]};
      tag = memory::format_tag::goihw;
    }
    p.x = memory::desc(dims_of(xi), f32, memory::format_tag::nchw);
    p.w = memory::desc(w, f32, tag);
    p.y = memory::desc(dims_of(yi), f32, memory::format_tag::nchw);
    p.b = memory::desc({static_cast<memory::dim>(yi[1].size())}, f32, memory::format_tag::x);
  }
  const bool bias = op.bias && c.adds_bias;
  const memory::dims strides{op.height.stride, op.width.stride},
      dilates{op.height.dilation - 1, op.width.dilation - 1}, before{ph.before, pw.before},
      after{ph.after, pw.after};
  const auto any = [&](const memory::desc& d) {
    return memory::desc(d.dims(), f32, memory::format_tag::any);
  };
  try {
    const auto known = p.passes.find(static_cast<int>(pass));
    if (known == p.passes.end()) {
      using namespace dnnl;
      const auto direct = algorithm::convolution_direct;
      const auto hint = [&] {
        const auto d =
            convolution_forward::desc(prop_kind::forward_training, direct, any(p.x), any(p.w),
                                      any(p.y), strides, dilates, before, after);
        return convolution_forward::primitive_desc(d, p.engine);
      };
      Primitives::One one;
      switch (pass) {
        case ConvolutionPass::forward: {
          const auto d =
              bias ? convolution_forward::desc(prop_kind::forward_training, direct, any(p.x),
                                               any(p.w), p.b, any(p.y), strides, dilates, before,
                                               after)
                   : convolution_forward::desc(prop_kind::forward_training, direct, any(p.x),
                                               any(p.w), any(p.y), strides, dilates, before, after);
          const convolution_forward::primitive_desc pd(d, p.engine);
          one = {convolution_forward(pd), pd.src_desc(), pd.weights_desc(), pd.dst_desc()};
          break;
        }
        case ConvolutionPass::data: {
          const convolution_backward_data::desc d(direct, any(p.x), any(p.w), any(p.y), strides,
                                                  dilates, before, after);
          const convolution_backward_data::primitive_desc pd(d, p.engine, hint());
          one = {convolution_backward_data(pd), pd.diff_src_desc(), pd.weights_desc(),
                 pd.diff_dst_desc()};
          break;
        }
        case ConvolutionPass::weight: {
          const auto d =
              bias ? convolution_backward_weights::desc(direct, any(p.x), any(p.w), p.b, any(p.y),
                                                        strides, dilates, before, after)
                   : convolution_backward_weights::desc(direct, any(p.x), any(p.w), any(p.y),
                                                        strides, dilates, before, after);
          const convolution_backward_weights::primitive_desc pd(d, p.engine, hint());
          one = {convolution_backward_weights(pd), pd.src_desc(), pd.diff_weights_desc(),
                 pd.diff_dst_desc()};
          break;
        }
      }
      p.passes.emplace(static_cast<int>(pass), one);
    }
    const Primitives::One& one = p.passes.at(static_cast<int>(pass));
    // Operands in the layout that the primitive likes best.
    std::vector<memory> alive;
    const auto operand = [&](float* data, const memory::desc& have, const memory::desc& want) {
      memory m(have, p.engine, data);
      if (have == want) return m;
      memory other(want, p.engine);
      dnnl::reorder(m, other).execute(p.stream, m, other);
      return other;
    };
    const auto result = [&](float* data, const memory::desc& have, const memory::desc& want) {
      return have == want ? memory(have, p.engine, data) : memory(want, p.engine);
    };
    const auto finish = [&](memory& m, float* data, const memory::desc& have) {
      if (m.get_desc() == have) return;
      memory to(have, p.engine, data);
      dnnl::reorder(m, to).execute(p.stream, m, to);
    };
    const auto mutable_of = [](const Tensor& t) { return t.values; };
    if (pass == ConvolutionPass::forward) {
      memory x = operand(mutable_of(a.inputs[0]), p.x, one.x),
             w = operand(mutable_of(a.parameters[0]), p.w, one.w),
             y = result(a.results[0].values, p.y, one.y);
      std::unordered_map<int, memory> args{
          {DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, w}, {DNNL_ARG_DST, y}};
      if (bias) args.emplace(DNNL_ARG_BIAS, memory(p.b, p.engine, a.parameters[1].values));
      one.primitive.execute(p.stream, args);
      finish(y, a.results[0].values, p.y);
    } else if (pass == ConvolutionPass::data) {
      memory w = operand(mutable_of(a.parameters[0]), p.w, one.w),
             dy = operand(mutable_of(a.output_gradients[0]), p.y, one.y),
             dx = result(a.results[0].values, p.x, one.x);
      one.primitive.execute(
          p.stream, {{DNNL_ARG_DIFF_DST, dy}, {DNNL_ARG_WEIGHTS, w}, {DNNL_ARG_DIFF_SRC, dx}});
      finish(dx, a.results[0].values, p.x);
    } else {
      if (a.results.empty() || !a.results[0]) return false;
      memory x = operand(mutable_of(a.inputs[0]), p.x, one.x),
             dy = operand(mutable_of(a.output_gradients[0]), p.y, one.y);
      // Gradients add up over micro-batches, which the primitive does not do.
      const std::size_t n = static_cast<std::size_t>(a.results[0].size());
      const std::size_t nb = yi[1].size();
      kept.space.resize(n + nb);
      float *fresh = kept.space.data(), *fresh_bias = fresh + n;
      memory dw = result(fresh, p.w, one.w);
      std::unordered_map<int, memory> args{
          {DNNL_ARG_SRC, x}, {DNNL_ARG_DIFF_DST, dy}, {DNNL_ARG_DIFF_WEIGHTS, dw}};
      if (bias) args.emplace(DNNL_ARG_DIFF_BIAS, memory(p.b, p.engine, fresh_bias));
      one.primitive.execute(p.stream, args);
      finish(dw, fresh, p.w);
      p.stream.wait();
      const auto put = [&](const float* from, const Tensor& to, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i)
          to.values[i] = a.accumulate ? to.values[i] + from[i] : from[i];
      };
      put(fresh, a.results[0], n);
      if (op.bias && a.results.size() > 1 && a.results[1]) {
        if (!bias) std::fill_n(fresh_bias, nb, 0.0f);
        put(fresh_bias, a.results[1], nb);
      }
    }
    p.stream.wait();
  } catch (const dnnl::error& e) {
    throw InternalError(std::string("oneDNN: ") + e.what());
  }
  return true;
}

}  // namespace partita::cpu
