// cuDNN: convolutions of its older interface.
#include <cudnn.h>
#include <fmt/format.h>

#include <cstring>
#include <vector>

#include "tests/runtime/cuda/emulated/gpu.h"
#include "tests/runtime/cuda/host_machine.h"

namespace {

using emulated::refuse;
using emulated::the;
using partita::ElementType;
using partita::cuda::ConvolutionPass;
using partita::cuda::ConvolutionShape;
using partita::cuda::Numbers;

struct Four {
  cudnnDataType_t type = CUDNN_DATA_FLOAT;
  int n = 0, c = 0, h = 0, w = 0;
  std::int64_t size() const { return std::int64_t{1} * n * c * h * w; }
};
struct Window {
  int pad_h, pad_w, stride_h, stride_w, dilation_h, dilation_w, groups = 1;
  cudnnMathType_t math = CUDNN_DEFAULT_MATH;
};
struct Handle {
  cudaStream_t stream = nullptr;
};

ElementType type_of(cudnnDataType_t t) {
  return t == CUDNN_DATA_BFLOAT16 ? ElementType::bf16
         : t == CUDNN_DATA_HALF   ? ElementType::fp16
                                  : ElementType::fp32;
}
/// Why there is no such convolution; empty: there is.
std::string shape_of(const Four& x, const Four& w, const Window& c, const Four& y,
                     ConvolutionShape& s) {
  if (x.type != w.type || x.type != y.type) return "a convolution of several types";
  s = {x.n,
       x.c,
       x.h,
       x.w,
       w.n,
       c.groups,
       w.h,
       w.w,
       y.h,
       y.w,
       c.stride_h,
       c.stride_w,
       c.dilation_h,
       c.dilation_w,
       c.pad_h,
       c.pad_w,
       type_of(x.type)};
  const auto size = [](int in, int pad, int window, int dilation, int stride) {
    return (in + 2 * pad - ((window - 1) * dilation + 1)) / stride + 1;
  };
  if (c.groups < 1 || x.c % c.groups != 0 || w.n % c.groups != 0 || w.c != x.c / c.groups)
    return "a convolution's groups";
  if (y.n != x.n || y.c != w.n || y.h != size(x.h, c.pad_h, w.h, c.dilation_h, c.stride_h) ||
      y.w != size(x.w, c.pad_w, w.w, c.dilation_w, c.stride_w))
    return fmt::format("a convolution of {} x {} to {} x {}, which cuDNN has as {} x {}", x.h, x.w,
                       y.h, y.w, size(x.h, c.pad_h, w.h, c.dilation_h, c.stride_h),
                       size(x.w, c.pad_w, w.w, c.dilation_w, c.stride_w));
  return "";
}
/// What each algorithm works in; the second in more than a stream keeps, and in more without
/// tensor cores than a choice of algorithms says.
std::size_t workspace_of(int algorithm, const ConvolutionShape& s, cudnnMathType_t math) {
  const std::size_t least = s.window_height > 1 ? std::size_t{40} << 20 : 1 << 20;
  return algorithm == 1 ? (math == CUDNN_FMA_MATH ? 2 * least : least) : 0;
}
/// First one that does not go, then one whose sums have no order, then one that has and that will
/// be refused after all, then one that is not.
template <class Result, class Algorithm>
cudnnStatus_t choose(const ConvolutionShape& s, int most, int* count, Result* found) {
  *count = 0;
  for (const int a : {2, 0, 3, 1}) {
    if (*count == most) break;
    Result& r = found[(*count)++];
    r.algo = static_cast<Algorithm>(a);
    r.status = a == 2 ? CUDNN_STATUS_NOT_SUPPORTED : CUDNN_STATUS_SUCCESS;
    r.determinism = a == 0 ? CUDNN_NON_DETERMINISTIC : CUDNN_DETERMINISTIC;
    r.memory = workspace_of(a, s, CUDNN_TENSOR_OP_MATH);
    r.mathType = CUDNN_TENSOR_OP_MATH;
  }
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t workspace(const Four& x, const Four& w, const Window& c, const Four& y, int algorithm,
                        std::size_t* bytes) {
  ConvolutionShape s{};
  if (std::string why = shape_of(x, w, c, y, s); !why.empty())
    return refuse(CUDNN_STATUS_BAD_PARAM, why);
  if (algorithm == 2) return CUDNN_STATUS_NOT_SUPPORTED;
  *bytes = workspace_of(algorithm, s, c.math);
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t convolve(cudnnHandle_t handle, ConvolutionPass pass, const Four& x, const void* x_at,
                       const Four& w, const void* w_at, const Window& c, const Four& y,
                       const void* y_at, int algorithm, void* room, std::size_t bytes, float alpha,
                       float beta) {
  ConvolutionShape s{};
  if (std::string why = shape_of(x, w, c, y, s); !why.empty())
    return refuse(CUDNN_STATUS_BAD_PARAM, why);
  if (alpha != 1 || (beta != 0 && (beta != 1 || pass != ConvolutionPass::weight)))
    return refuse(CUDNN_STATUS_NOT_SUPPORTED, "alpha or beta");
  if (algorithm == 3) return CUDNN_STATUS_NOT_SUPPORTED_SHAPE;
  if (algorithm != 1)
    return refuse(CUDNN_STATUS_NOT_SUPPORTED, "an algorithm that nobody should take");
  if (bytes < workspace_of(algorithm, s, c.math) ||
      (bytes > 0 && !emulated::reachable(room, bytes)))
    return refuse(CUDNN_STATUS_BAD_PARAM, "a convolution without the memory it works in");
  const std::size_t width = s.type == ElementType::fp32 ? 4 : 2;
  const void* at[] = {x_at, w_at, y_at};
  const Four* four[] = {&x, &w, &y};
  for (int k = 0; k < 3; ++k) {
    if (!emulated::on_gpu(at[k]) ||
        !emulated::reachable(at[k], static_cast<std::size_t>(four[k]->size()) * width))
      return refuse(CUDNN_STATUS_BAD_PARAM, "a tensor that is not all in the GPU's memory");
  }
  const cudaError_t e = emulated::launch(the<Handle>(handle)->stream, "convolution", [=] {
    emulated::spoil(room, bytes);
    partita::cuda::HostMachine m;
    const auto numbers = [&](const void* p) { return Numbers(const_cast<void*>(p), s.type); };
    m.convolve(s, pass, numbers(x_at), numbers(w_at), numbers(y_at), beta != 0);
  });
  return e == cudaSuccess ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}
float number(const void* p) { return *static_cast<const float*>(p); }

}  // namespace

extern "C" {

size_t CUDNNWINAPI cudnnGetVersion() { return CUDNN_VERSION; }
const char* CUDNNWINAPI cudnnGetErrorString(cudnnStatus_t s) {
  return s == CUDNN_STATUS_SUCCESS ? "success" : "a refusal";
}
cudnnStatus_t CUDNNWINAPI cudnnCreate(cudnnHandle_t* to) {
  *to = the<cudnnContext>(new Handle);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnDestroy(cudnnHandle_t h) {
  delete the<Handle>(h);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnSetStream(cudnnHandle_t h, cudaStream_t s) {
  the<Handle>(h)->stream = s;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* to) {
  *to = the<cudnnTensorStruct>(new Four);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t d) {
  delete the<Four>(d);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t d,
                                                     cudnnTensorFormat_t format,
                                                     cudnnDataType_t type, int n, int c, int h,
                                                     int w) {
  if (format != CUDNN_TENSOR_NCHW || n < 1 || c < 1 || h < 1 || w < 1)
    return refuse(CUDNN_STATUS_BAD_PARAM, "a tensor");
  *the<Four>(d) = {type, n, c, h, w};
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t* to) {
  *to = the<cudnnFilterStruct>(new Four);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t d) {
  delete the<Four>(d);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnSetFilter4dDescriptor(cudnnFilterDescriptor_t d,
                                                     cudnnDataType_t type,
                                                     cudnnTensorFormat_t format, int k, int c,
                                                     int h, int w) {
  if (format != CUDNN_TENSOR_NCHW || k < 1 || c < 1 || h < 1 || w < 1)
    return refuse(CUDNN_STATUS_BAD_PARAM, "a filter");
  *the<Four>(d) = {type, k, c, h, w};
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t* to) {
  *to = the<cudnnConvolutionStruct>(new Window{});
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnDestroyConvolutionDescriptor(cudnnConvolutionDescriptor_t d) {
  delete the<Window>(d);
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnSetConvolution2dDescriptor(cudnnConvolutionDescriptor_t d, int pad_h,
                                                          int pad_w, int stride_h, int stride_w,
                                                          int dilation_h, int dilation_w,
                                                          cudnnConvolutionMode_t mode,
                                                          cudnnDataType_t compute) {
  if (mode != CUDNN_CROSS_CORRELATION || compute != CUDNN_DATA_FLOAT || pad_h < 0 || pad_w < 0 ||
      stride_h < 1 || stride_w < 1 || dilation_h < 1 || dilation_w < 1)
    return refuse(CUDNN_STATUS_BAD_PARAM, "a convolution's window");
  *the<Window>(d) = {pad_h, pad_w, stride_h, stride_w, dilation_h, dilation_w};
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnSetConvolutionGroupCount(cudnnConvolutionDescriptor_t d,
                                                        int groups) {
  the<Window>(d)->groups = groups;
  return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t CUDNNWINAPI cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t d,
                                                      cudnnMathType_t math) {
  the<Window>(d)->math = math;
  return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t CUDNNWINAPI cudnnGetConvolutionForwardAlgorithm_v7(
    cudnnHandle_t, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t y, const int most,
    int* count, cudnnConvolutionFwdAlgoPerf_t* found) {
  ConvolutionShape s{};
  if (std::string why = shape_of(*the<Four>(x), *the<Four>(w), *the<Window>(c), *the<Four>(y), s);
      !why.empty())
    return refuse(CUDNN_STATUS_BAD_PARAM, why);
  return choose<cudnnConvolutionFwdAlgoPerf_t, cudnnConvolutionFwdAlgo_t>(s, most, count, found);
}
cudnnStatus_t CUDNNWINAPI cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t y,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t x, const int most,
    int* count, cudnnConvolutionBwdDataAlgoPerf_t* found) {
  ConvolutionShape s{};
  if (std::string why = shape_of(*the<Four>(x), *the<Four>(w), *the<Window>(c), *the<Four>(y), s);
      !why.empty())
    return refuse(CUDNN_STATUS_BAD_PARAM, why);
  return choose<cudnnConvolutionBwdDataAlgoPerf_t, cudnnConvolutionBwdDataAlgo_t>(s, most, count,
                                                                                  found);
}
cudnnStatus_t CUDNNWINAPI cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    cudnnHandle_t, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t y,
    const cudnnConvolutionDescriptor_t c, const cudnnFilterDescriptor_t w, const int most,
    int* count, cudnnConvolutionBwdFilterAlgoPerf_t* found) {
  ConvolutionShape s{};
  if (std::string why = shape_of(*the<Four>(x), *the<Four>(w), *the<Window>(c), *the<Four>(y), s);
      !why.empty())
    return refuse(CUDNN_STATUS_BAD_PARAM, why);
  return choose<cudnnConvolutionBwdFilterAlgoPerf_t, cudnnConvolutionBwdFilterAlgo_t>(s, most,
                                                                                      count, found);
}

cudnnStatus_t CUDNNWINAPI cudnnGetConvolutionForwardWorkspaceSize(
    cudnnHandle_t, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t y,
    cudnnConvolutionFwdAlgo_t algorithm, size_t* bytes) {
  return workspace(*the<Four>(x), *the<Four>(w), *the<Window>(c), *the<Four>(y), algorithm, bytes);
}
cudnnStatus_t CUDNNWINAPI cudnnGetConvolutionBackwardDataWorkspaceSize(
    cudnnHandle_t, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t y,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t x,
    cudnnConvolutionBwdDataAlgo_t algorithm, size_t* bytes) {
  return workspace(*the<Four>(x), *the<Four>(w), *the<Window>(c), *the<Four>(y), algorithm, bytes);
}
cudnnStatus_t CUDNNWINAPI cudnnGetConvolutionBackwardFilterWorkspaceSize(
    cudnnHandle_t, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t y,
    const cudnnConvolutionDescriptor_t c, const cudnnFilterDescriptor_t w,
    cudnnConvolutionBwdFilterAlgo_t algorithm, size_t* bytes) {
  return workspace(*the<Four>(x), *the<Four>(w), *the<Window>(c), *the<Four>(y), algorithm, bytes);
}

cudnnStatus_t CUDNNWINAPI cudnnConvolutionForward(cudnnHandle_t h, const void* alpha,
                                                  const cudnnTensorDescriptor_t x, const void* x_at,
                                                  const cudnnFilterDescriptor_t w, const void* w_at,
                                                  const cudnnConvolutionDescriptor_t c,
                                                  cudnnConvolutionFwdAlgo_t algorithm, void* room,
                                                  size_t bytes, const void* beta,
                                                  const cudnnTensorDescriptor_t y, void* y_at) {
  return convolve(h, ConvolutionPass::forward, *the<Four>(x), x_at, *the<Four>(w), w_at,
                  *the<Window>(c), *the<Four>(y), y_at, algorithm, room, bytes, number(alpha),
                  number(beta));
}
cudnnStatus_t CUDNNWINAPI cudnnConvolutionBackwardData(
    cudnnHandle_t h, const void* alpha, const cudnnFilterDescriptor_t w, const void* w_at,
    const cudnnTensorDescriptor_t y, const void* y_at, const cudnnConvolutionDescriptor_t c,
    cudnnConvolutionBwdDataAlgo_t algorithm, void* room, size_t bytes, const void* beta,
    const cudnnTensorDescriptor_t x, void* x_at) {
  return convolve(h, ConvolutionPass::data, *the<Four>(x), x_at, *the<Four>(w), w_at,
                  *the<Window>(c), *the<Four>(y), y_at, algorithm, room, bytes, number(alpha),
                  number(beta));
}
cudnnStatus_t CUDNNWINAPI cudnnConvolutionBackwardFilter(
    cudnnHandle_t h, const void* alpha, const cudnnTensorDescriptor_t x, const void* x_at,
    const cudnnTensorDescriptor_t y, const void* y_at, const cudnnConvolutionDescriptor_t c,
    cudnnConvolutionBwdFilterAlgo_t algorithm, void* room, size_t bytes, const void* beta,
    const cudnnFilterDescriptor_t w, void* w_at) {
  return convolve(h, ConvolutionPass::weight, *the<Four>(x), x_at, *the<Four>(w), w_at,
                  *the<Window>(c), *the<Four>(y), y_at, algorithm, room, bytes, number(alpha),
                  number(beta));
}

}  // extern "C"
