#include "runtime/cuda/convolutions.h"

#ifdef PARTITA_CUDNN
#  include <cudnn.h>
#  include <fmt/format.h>

#  include <map>
#  include <utility>
#  include <vector>

#  include "runtime/cuda/cuda_machine.h"
#endif

namespace partita::cuda {

#ifdef PARTITA_CUDNN
namespace {

void check(cudnnStatus_t s, const char* what) {
  if (s == CUDNN_STATUS_SUCCESS) return;
  throw MachineError(fmt::format("cuDNN: {}: {}", what, cudnnGetErrorString(s)));
}

/// Categories of cuDNN's results, a thousand each: 3 not supported, 4 an error inside of it.
bool unfit(cudnnStatus_t s) {
  const int category = static_cast<int>(s) / 1000;
  return s == CUDNN_STATUS_NOT_SUPPORTED || category == 3 || category == 4;
}

/// What cuDNN describes by opaque handles.
struct Problem {
  cudnnTensorDescriptor_t x = nullptr, y = nullptr;
  cudnnFilterDescriptor_t w = nullptr;
  cudnnConvolutionDescriptor_t convolution = nullptr;
  struct Algorithm {
    int number;
    std::size_t workspace;
    cudnnMathType_t arithmetic;
  };
  /// Best first; cuDNN takes back what its heuristics said where one is carried out and refused.
  std::vector<Algorithm> algorithms;
  Problem() = default;
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() {
    if (convolution != nullptr) cudnnDestroyConvolutionDescriptor(convolution);
    if (w != nullptr) cudnnDestroyFilterDescriptor(w);
    if (x != nullptr) cudnnDestroyTensorDescriptor(x);
    if (y != nullptr) cudnnDestroyTensorDescriptor(y);
  }
};

class Cudnn : public Convolutions {
 public:
  Cudnn(cudnnHandle_t handle, bool tf32) : handle_(handle), tf32_(tf32) {}
  ~Cudnn() override {
    problems_.clear();
    cudnnDestroy(handle_);
  }
  bool run(CudaMachine& m, const ConvolutionShape& shape, ConvolutionPass pass, Numbers to_x,
           Numbers to_w, Numbers to_y, bool adds) override {
    void *x = to_x.data(), *w = to_w.data(), *y = to_y.data();
    check(cudnnSetStream(handle_, m.stream()), "a stream");
    Problem& p = problems_[{shape, pass}];
    if (p.x == nullptr) describe(p, shape, pass);
    while (!p.algorithms.empty()) {
      const Problem::Algorithm a = p.algorithms.front();
      check(cudnnSetConvolutionMathType(p.convolution, a.arithmetic), "a convolution's arithmetic");
      const cudnnStatus_t s = carry_out(m, p, pass, a, x, w, y, adds);
      if (s == CUDNN_STATUS_SUCCESS) return true;
      // What cannot be done, or not be made by it, another algorithm may do: what runs then has
      // failed for good.
      if (!unfit(s)) check(s, "a convolution");
      p.algorithms.erase(p.algorithms.begin());
    }
    return false;
  }

 private:
  cudnnStatus_t carry_out(CudaMachine& m, const Problem& p, ConvolutionPass pass,
                          const Problem::Algorithm& a, void* x, void* w, void* y, bool adds) {
    // Beyond what a stream keeps it is the operator's scratch.
    void* room = a.workspace <= CudaMachine::kWorkspace
                     ? static_cast<void*>(m.workspace())
                     : m.scratch(static_cast<std::int64_t>((a.workspace + 3) / 4));
    const float one = 1, zero = 0, beta = adds ? 1.0f : 0.0f;
    switch (pass) {
      case ConvolutionPass::forward:
        return cudnnConvolutionForward(handle_, &one, p.x, x, p.w, w, p.convolution,
                                       static_cast<cudnnConvolutionFwdAlgo_t>(a.number), room,
                                       a.workspace, &zero, p.y, y);
      case ConvolutionPass::data:
        return cudnnConvolutionBackwardData(handle_, &one, p.w, w, p.y, y, p.convolution,
                                            static_cast<cudnnConvolutionBwdDataAlgo_t>(a.number),
                                            room, a.workspace, &zero, p.x, x);
      case ConvolutionPass::weight:
        return cudnnConvolutionBackwardFilter(
            handle_, &one, p.x, x, p.y, y, p.convolution,
            static_cast<cudnnConvolutionBwdFilterAlgo_t>(a.number), room, a.workspace, &beta, p.w,
            w);
    }
    return CUDNN_STATUS_NOT_SUPPORTED;
  }
  /// Sets its workspace as of the arithmetic that `p` has now; false: it does not have that one, or
  /// is known already.
  bool works_in(const Problem& p, ConvolutionPass pass, Problem::Algorithm& a) const {
    for (const Problem::Algorithm& known : p.algorithms) {
      if (known.number == a.number && known.arithmetic == a.arithmetic) return false;
    }
    cudnnStatus_t s = CUDNN_STATUS_NOT_SUPPORTED;
    switch (pass) {
      case ConvolutionPass::forward:
        s = cudnnGetConvolutionForwardWorkspaceSize(
            handle_, p.x, p.w, p.convolution, p.y, static_cast<cudnnConvolutionFwdAlgo_t>(a.number),
            &a.workspace);
        break;
      case ConvolutionPass::data:
        s = cudnnGetConvolutionBackwardDataWorkspaceSize(
            handle_, p.w, p.y, p.convolution, p.x,
            static_cast<cudnnConvolutionBwdDataAlgo_t>(a.number), &a.workspace);
        break;
      case ConvolutionPass::weight:
        s = cudnnGetConvolutionBackwardFilterWorkspaceSize(
            handle_, p.x, p.y, p.convolution, p.w,
            static_cast<cudnnConvolutionBwdFilterAlgo_t>(a.number), &a.workspace);
        break;
    }
    return s == CUDNN_STATUS_SUCCESS;
  }
  void describe(Problem& p, const ConvolutionShape& s, ConvolutionPass pass) {
    const auto n = [](std::int64_t v) { return static_cast<int>(v); };
    const cudnnDataType_t type = s.type == ElementType::bf16   ? CUDNN_DATA_BFLOAT16
                                 : s.type == ElementType::fp16 ? CUDNN_DATA_HALF
                                                               : CUDNN_DATA_FLOAT;
    check(cudnnCreateTensorDescriptor(&p.x), "a tensor");
    check(cudnnCreateTensorDescriptor(&p.y), "a tensor");
    check(cudnnCreateFilterDescriptor(&p.w), "a filter");
    check(cudnnCreateConvolutionDescriptor(&p.convolution), "a convolution");
    check(cudnnSetTensor4dDescriptor(p.x, CUDNN_TENSOR_NCHW, type, n(s.samples), n(s.in),
                                     n(s.height), n(s.width)),
          "a tensor");
    check(cudnnSetTensor4dDescriptor(p.y, CUDNN_TENSOR_NCHW, type, n(s.samples), n(s.out),
                                     n(s.out_height), n(s.out_width)),
          "a tensor");
    check(cudnnSetFilter4dDescriptor(p.w, type, CUDNN_TENSOR_NCHW, n(s.out), n(s.in / s.groups),
                                     n(s.window_height), n(s.window_width)),
          "a filter");
    check(cudnnSetConvolution2dDescriptor(
              p.convolution, n(s.pad_height), n(s.pad_width), n(s.stride_height), n(s.stride_width),
              n(s.dilation_height), n(s.dilation_width), CUDNN_CROSS_CORRELATION, CUDNN_DATA_FLOAT),
          "a convolution");
    check(cudnnSetConvolutionGroupCount(p.convolution, n(s.groups)), "a convolution's groups");
    // No TF32 unless the plan says so: as our bound of rounding assumes.
    const cudnnMathType_t arithmetic =
        tf32_ || type != CUDNN_DATA_FLOAT ? CUDNN_TENSOR_OP_MATH : CUDNN_FMA_MATH;
    check(cudnnSetConvolutionMathType(p.convolution, arithmetic), "a convolution's arithmetic");
    constexpr int kMost = 8;
    constexpr std::size_t kMostRoom = std::size_t{1} << 30;
    int count = 0;
    const auto take = [&](const auto& found) {
      // Sums have a fixed order, wherever cuDNN has an algorithm of that kind.
      for (int i = 0; i < 2 * count; ++i) {
        const auto& f = found[i % count];
        if (f.status != CUDNN_STATUS_SUCCESS) continue;
        // First those, then the others.
        if ((i < count) != (f.determinism == CUDNN_DETERMINISTIC) || f.memory > kMostRoom) continue;
        // Algorithm, memory and arithmetic were found together, unless the default arithmetic of
        // fp32 would be TF32's.
        Problem::Algorithm a{static_cast<int>(f.algo), f.memory, f.mathType};
        if (arithmetic == CUDNN_FMA_MATH) {
          a.arithmetic = arithmetic;
          if (!works_in(p, pass, a)) continue;
        }
        if (a.workspace <= kMostRoom) p.algorithms.push_back(a);
      }
    };
    // Without an algorithm it is ours to do.
    const auto chosen = [](cudnnStatus_t answer) {
      if (unfit(answer)) return false;
      check(answer, "a choice of algorithm");
      return true;
    };
    switch (pass) {
      case ConvolutionPass::forward: {
        cudnnConvolutionFwdAlgoPerf_t found[kMost] = {};
        if (chosen(cudnnGetConvolutionForwardAlgorithm_v7(handle_, p.x, p.w, p.convolution, p.y,
                                                          kMost, &count, found)))
          take(found);
        return;
      }
      case ConvolutionPass::data: {
        cudnnConvolutionBwdDataAlgoPerf_t found[kMost] = {};
        if (chosen(cudnnGetConvolutionBackwardDataAlgorithm_v7(handle_, p.w, p.y, p.convolution,
                                                               p.x, kMost, &count, found)))
          take(found);
        return;
      }
      case ConvolutionPass::weight: {
        cudnnConvolutionBwdFilterAlgoPerf_t found[kMost] = {};
        if (chosen(cudnnGetConvolutionBackwardFilterAlgorithm_v7(handle_, p.x, p.y, p.convolution,
                                                                 p.w, kMost, &count, found)))
          take(found);
        return;
      }
    }
  }
  cudnnHandle_t handle_;
  bool tf32_;
  std::map<std::pair<ConvolutionShape, ConvolutionPass>, Problem> problems_;
};

}  // namespace

std::unique_ptr<Convolutions> make_convolutions(bool tf32) {
  cudnnHandle_t handle = nullptr;
  if (cudnnCreate(&handle) != CUDNN_STATUS_SUCCESS) return nullptr;
  return std::make_unique<Cudnn>(handle, tf32);
}
std::string cudnn_version() {
  const std::size_t v = cudnnGetVersion();
  return fmt::format("cuDNN {}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}
#else
std::unique_ptr<Convolutions> make_convolutions(bool) { return nullptr; }
std::string cudnn_version() { return ""; }
#endif

}  // namespace partita::cuda
