// runtime/cuda/cuda_machine.h: one stream of a GPU as a machine that the operators' kernels run on.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "runtime/cuda/check.h"
#include "runtime/cuda/flash.h"
#include "runtime/cuda/product_choice.h"

namespace partita::cuda {

/// Memory of a GPU that is not the allocator's: counted, for reserved() is without it.
class DeviceBlock {
 public:
  /// `make_room`: what gives back kept memory where there is no more; null: nobody keeps any.
  explicit DeviceBlock(std::size_t bytes, const std::function<void()>& make_room = nullptr);
  /// Null where there is no more.
  static std::unique_ptr<DeviceBlock> where_there_is_room(std::size_t bytes);
  ~DeviceBlock();
  DeviceBlock(const DeviceBlock&) = delete;
  DeviceBlock& operator=(const DeviceBlock&) = delete;
  std::byte* at = nullptr;
  std::size_t bytes = 0;

 private:
  DeviceBlock() = default;
};

class Convolutions;
class FusedAttention;

/// What cuBLASLt describes by opaque handles, destroyed with it.
struct ProductDescription {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  ProductDescription() = default;
  ProductDescription(const ProductDescription&) = delete;
  ProductDescription& operator=(const ProductDescription&) = delete;
  ~ProductDescription();
};

/// A product as cuBLASLt takes it: c += a · b, column after column.
struct ProductCall {
  std::shared_ptr<ProductDescription> of;
  const void *a = nullptr, *b = nullptr;
  void* c = nullptr;
  /// From the first number to the last.
  std::size_t a_bytes = 0, b_bytes = 0, c_bytes = 0;
  float alpha = 1, beta = 0;
  bool passing = false;
};

/// What is to be timed once nothing else is on its way, on operands of its own.
struct OpenProduct {
  ProductCall call;
  std::string words;
};

/// What all streams of a rank share.
struct Libraries {
  explicit Libraries(const ProductOptions& options);
  ~Libraries();
  Libraries(const Libraries&) = delete;
  Libraries& operator=(const Libraries&) = delete;

  cublasLtHandle_t blas = nullptr;
  /// Waits on the host for a stream, as whoever may wait for peers does.
  std::function<void(cudaStream_t, const std::string&)> come;
  /// Gives back memory that others keep for their next request.
  std::function<void()> make_room;
  /// Scratch of operators that grew: streams may still use it.
  std::vector<std::unique_ptr<DeviceBlock>> retired;
  /// Of a step that is captured: memory of the GPU that each launch fills for its step. Null: none
  /// is.
  std::function<void*(std::size_t bytes, std::function<void(std::int64_t step, void* to)> fill)>
      stepped;
  /// Pinned memory of the host that nobody else gets until the device has finished.
  std::function<void*(std::size_t bytes)> staging;
  ProductOptions options;
  ProductChoices products;
  /// What is not timed yet, and what the ranks agreed on.
  std::map<ProductKey, OpenProduct> open;
  std::set<ProductKey> refused;  ///< biases that cuBLASLt does not add
  AgreedChoices agreed;
  bool agree = false;  ///< they have
  /// Null: nothing, or nothing for operands aligned so.
  const ProductChoice* agreed_on(const ProductKey& key) const;
  /// The GPU has mma of 16 bits and copies to shared memory; PARTITA_CUDA_FLASH=0 in the
  /// environment leaves attention to products.
  bool flash = false;
  bool eights = false;                         ///< products in 8 bits
  std::unique_ptr<FusedAttention> attention;   ///< null: our own kernels
  std::unique_ptr<Convolutions> convolutions;  ///< null: this build or machine has no cuDNN
  std::map<std::vector<std::int64_t>, std::unique_ptr<DeviceBlock>> lists, tables;
};

class CudaMachine {
 public:
  CudaMachine(Libraries& libraries, cudaStream_t stream);

  /// Defined where nvcc compiles them (launch.cuh).
  template <class F>
  void each(std::int64_t n, F f);
  template <class F>
  void rows(std::int64_t n, std::int64_t width, F f);

  /// False where cuBLASLt does not add such a bias: nothing was done.
  bool product(const Product& p);
  /// The GPU multiplies 8 bits: of compute capability 8.9 and later.
  bool has_eights() const { return libraries_.eights; }
  void product(const EightProduct& p);
  /// Times what is open on operands beside the step's, where there is room for them; nothing else
  /// is queued.
  ProductChoices time_open_products();
  float* scratch(std::int64_t floats);
  std::int64_t scores() const { return 64 << 20; }
  bool has_flash() const { return libraries_.flash; }
  bool flash(const FlashCall& call, FlashPass pass);
  IndexList list(const std::vector<std::int64_t>& indices);
  const float* table(const std::vector<std::int64_t>& key,
                     const std::function<std::vector<float>()>& make);
  IndexList upload(const std::vector<std::int64_t>& numbers);
  std::vector<float> read(const Numbers& at, std::int64_t n);
  /// f(step), of whichever step it turns out to be.
  template <class F>
  auto stepped(std::int64_t step, F f) {
    using T = decltype(f(step));
    static_assert(std::is_trivially_copyable_v<T>);
    Stepped<T> s{nullptr, f(step)};
    if (libraries_.stepped)
      s.at = static_cast<const T*>(libraries_.stepped(sizeof(T), [f](std::int64_t k, void* to) {
        const T value = f(k);
        std::memcpy(to, &value, sizeof value);
      }));
    return s;
  }
  bool convolve(const ConvolutionShape& shape, ConvolutionPass pass, Numbers x, Numbers w,
                Numbers y, bool adds);
  /// The operator has queued all it has: its scratch is the next one's.
  void end();

  cudaStream_t stream() const { return stream_; }
  /// Of the GPU's memory: its workspace and scratch.
  std::int64_t held() const {
    std::size_t n = workspace_ ? workspace_->bytes : 0;
    for (const auto& b : blocks_) n += b->bytes;
    return static_cast<std::int64_t>(n);
  }
  std::byte* workspace();  ///< of kWorkspace bytes, for libraries

  static constexpr std::size_t kWorkspace = 32 << 20;

 private:
  void own_flash(const FlashCall& call, FlashPass pass);  ///< flash.cu
  /// False where cuBLASLt does not add the bias: nothing was done.
  bool multiply(const ProductCall& p, const ProductKey& key, const std::string& words);
  /// Of the heuristic's choices.
  ProductChoice fastest(const ProductCall& p, const std::vector<ProductChoice>& choices,
                        const std::string& words);
  Libraries& libraries_;
  cudaStream_t stream_;
  std::vector<std::unique_ptr<DeviceBlock>> blocks_;  ///< the last is filled
  std::size_t used_ = 0;
  std::unique_ptr<DeviceBlock> workspace_;
};

}  // namespace partita::cuda
