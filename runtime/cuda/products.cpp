// Products by cuBLASLt, scratch memory and index lists of a stream.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <string_view>
#include <tuple>
#include <utility>

#include "runtime/cuda/convolutions.h"
#include "runtime/cuda/cuda_machine.h"
#include "runtime/cuda/fused_attention.h"
#include "runtime/cuda/kernels.h"

namespace partita::cuda {
namespace {

cudaDataType_t type_of(ElementType t) {
  return t == ElementType::bf16 ? CUDA_R_16BF : t == ElementType::fp16 ? CUDA_R_16F : CUDA_R_32F;
}

int alignment(const Numbers& p) {
  const auto at = reinterpret_cast<std::uintptr_t>(p.data());
  int n = 256;
  while (n > 2 && at % static_cast<std::uintptr_t>(n) != 0) n /= 2;
  return n;
}

/// cuBLASLt's matrices lie column after column: ours is its transpose.
cublasLtMatrixLayout_t layout_of(const Matrix& m, std::int64_t rows, std::int64_t columns,
                                 std::int64_t batch) {
  if (m.transposed) std::swap(rows, columns);
  cublasLtMatrixLayout_t layout = nullptr;
  check(cublasLtMatrixLayoutCreate(
            &layout, type_of(m.at.type()), static_cast<std::uint64_t>(columns),
            static_cast<std::uint64_t>(rows), std::max<std::int64_t>(m.stride, columns)),
        "a matrix's layout");
  if (batch > 1) {
    const auto count = static_cast<std::int32_t>(batch);
    check(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                           sizeof count),
          "a batch's size");
    check(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                           &m.step, sizeof m.step),
          "a batch's stride");
  }
  return layout;
}

/// Of c, rows x columns, from its first number to its last.
std::size_t bytes_of(const Matrix& c, std::int64_t rows, std::int64_t columns, std::int64_t batch) {
  if (c.transposed) std::swap(rows, columns);
  const std::int64_t numbers =
      (batch - 1) * c.step + (rows - 1) * std::max(c.stride, columns) + columns;
  return static_cast<std::size_t>(numbers) * (c.at.narrow() ? 2 : 4);
}

std::size_t bytes_of(const Eights& e) { return static_cast<std::size_t>(e.padded * e.stride); }

std::string in_words(const Product& p) {
  return fmt::format("{} product of {} x {} x {}, batch {}{}{}", name(p.a.at.type()), p.m, p.n, p.k,
                     p.batch, p.a.transposed ? ", a transposed" : "",
                     p.b.transposed ? ", b transposed" : "");
}

struct Preference {
  cublasLtMatmulPreference_t at = nullptr;
  Preference() = default;
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;
  ~Preference() {
    if (at != nullptr) cublasLtMatmulPreferenceDestroy(at);
  }
};

}  // namespace

ProductDescription::~ProductDescription() {
  for (const auto layout : {a, b, c}) {
    if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
  }
  if (product != nullptr) cublasLtMatmulDescDestroy(product);
}

DeviceBlock::DeviceBlock(std::size_t n, const std::function<void()>& make_room) : bytes(n) {
  void* p = nullptr;
  cudaError_t e = cudaMalloc(&p, n);
  if (e == cudaErrorMemoryAllocation && make_room) {
    static_cast<void>(cudaGetLastError());
    make_room();
    e = cudaMalloc(&p, n);
  }
  if (e == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    throw MachineError(
        fmt::format("the GPU has no {} bytes left for kernels to work in; use fewer ranks on it, a "
                    "smaller micro-batch or more sharding",
                    n));
  }
  check(e, fmt::format("{} bytes to work in", n));
  at = static_cast<std::byte*>(p);
}
std::unique_ptr<DeviceBlock> DeviceBlock::where_there_is_room(std::size_t n) {
  void* p = nullptr;
  if (const cudaError_t e = cudaMalloc(&p, n); e != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    if (e != cudaErrorMemoryAllocation) check(e, fmt::format("{} bytes to work in", n));
    return nullptr;
  }
  std::unique_ptr<DeviceBlock> block(new DeviceBlock);
  block->at = static_cast<std::byte*>(p);
  block->bytes = n;
  return block;
}
// The driver may be gone when a process ends.
DeviceBlock::~DeviceBlock() { static_cast<void>(cudaFree(at)); }

Libraries::Libraries(const ProductOptions& o) : options(o) {
  check(cublasLtCreate(&blas), "its start");
  convolutions = make_convolutions(o.tf32);
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "the current GPU");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "the GPU's compute capability");
  const char* wanted = std::getenv("PARTITA_CUDA_FLASH");
  const std::string_view word = wanted != nullptr ? wanted : "";
  if (wanted != nullptr && word != "0" && word != "own" && word != "cudnn")
    throw InputError(
        "PARTITA_CUDA_FLASH",
        fmt::format("'{}' is unknown; use 0, products around a softmax, own, kernels of "
                    "Partita's, or cudnn, or unset it",
                    word));
  int minor = 0;
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "the GPU's compute capability");
  eights = 10 * major + minor >= 89;
  flash = major >= 8 && word != "0";
  if (flash) attention = make_fused_attention();
  if (word == "cudnn" && !attention)
    throw InputError("PARTITA_CUDA_FLASH",
                     "is cudnn, but this build has no cudnn_frontend, or this GPU no cuDNN; build "
                     "with CUDNN_FRONTEND_ROOT, or unset it");
}
Libraries::~Libraries() {
  attention.reset();
  convolutions.reset();
  if (blas != nullptr) cublasLtDestroy(blas);
}

const ProductChoice* Libraries::agreed_on(const ProductKey& key) const {
  const auto it = agreed.find(ProductKind(key));
  return it != agreed.end() && as_aligned(key, it->second.least) ? &it->second.choice : nullptr;
}

CudaMachine::CudaMachine(Libraries& libraries, cudaStream_t stream)
    : libraries_(libraries), stream_(stream) {}

std::byte* CudaMachine::workspace() {
  if (!workspace_) workspace_ = std::make_unique<DeviceBlock>(kWorkspace, libraries_.make_room);
  return workspace_->at;
}

float* CudaMachine::scratch(std::int64_t floats) {
  constexpr std::size_t kGrain = 256, kLeast = 4 << 20;
  const std::size_t bytes =
      (static_cast<std::size_t>(floats) * sizeof(float) + kGrain - 1) / kGrain * kGrain;
  if (blocks_.empty() || used_ + bytes > blocks_.back()->bytes) {
    // Blocks before this one stay until the operator ends.
    blocks_.push_back(std::make_unique<DeviceBlock>(std::max(bytes, kLeast), libraries_.make_room));
    used_ = 0;
  }
  auto* at = reinterpret_cast<float*>(blocks_.back()->at + used_);
  used_ += bytes;
  return at;
}

void CudaMachine::end() {
  used_ = 0;
  if (blocks_.size() < 2) return;
  // One for all next time. These go when all streams are done: to give memory back waits for the
  // whole GPU, on which a send may wait for a peer.
  std::size_t bytes = 0;
  for (auto& b : blocks_) {
    bytes += b->bytes;
    libraries_.retired.push_back(std::move(b));
  }
  blocks_.clear();
  blocks_.push_back(std::make_unique<DeviceBlock>(bytes, libraries_.make_room));
}

IndexList CudaMachine::list(const std::vector<std::int64_t>& indices) {
  const auto n = static_cast<std::int64_t>(indices.size());
  if (n == 0) return {};
  if (indices.back() - indices.front() == n - 1) return {nullptr, indices.front(), n};
  auto& block = libraries_.lists[indices];
  if (!block) {
    const std::size_t bytes = indices.size() * sizeof(std::int64_t);
    block = std::make_unique<DeviceBlock>(bytes, libraries_.make_room);
    check(copy_now(block->at, indices.data(), bytes), "a list of indices");
  }
  return {reinterpret_cast<const std::int64_t*>(block->at), 0, n};
}

const float* CudaMachine::table(const std::vector<std::int64_t>& key,
                                const std::function<std::vector<float>()>& make) {
  auto& block = libraries_.tables[key];
  if (!block) {
    const std::vector<float> values = make();
    if (values.empty()) return nullptr;
    const std::size_t bytes = values.size() * sizeof(float);
    block = std::make_unique<DeviceBlock>(bytes, libraries_.make_room);
    check(copy_now(block->at, values.data(), bytes), "a table");
  }
  return reinterpret_cast<const float*>(block->at);
}

IndexList CudaMachine::upload(const std::vector<std::int64_t>& numbers) {
  if (numbers.empty()) return {};
  const auto n = static_cast<std::int64_t>(numbers.size());
  auto* at = reinterpret_cast<std::int64_t*>(scratch(2 * n));
  // Of memory that is not pinned a copy may wait for the stream.
  const std::size_t bytes = numbers.size() * sizeof(std::int64_t);
  void* pinned = libraries_.staging(bytes);
  std::memcpy(pinned, numbers.data(), bytes);
  check(cudaMemcpyAsync(at, pinned, bytes, cudaMemcpyHostToDevice, stream_), "a list of rows");
  return {at, 0, n};
}

std::vector<float> CudaMachine::read(const Numbers& at, std::int64_t n) {
  const auto count = static_cast<std::size_t>(n);
  std::vector<float> values(count);
  std::vector<std::uint16_t> words(at.narrow() ? count : 0);
  if (n == 0) return values;
  // A stream may wait for a peer who is gone: the copy, which the host waits for, comes after.
  libraries_.come(stream_, "what a router chose");
  void* to = at.narrow() ? static_cast<void*>(words.data()) : values.data();
  check(cudaMemcpyAsync(to, at.data(), count * (at.narrow() ? 2 : 4), cudaMemcpyDeviceToHost,
                        stream_),
        "what a router chose");
  check(cudaStreamSynchronize(stream_), "what a router chose");
  const Numbers here(words.data(), at.type());
  for (std::int64_t i = 0; i < n && at.narrow(); ++i) values[static_cast<std::size_t>(i)] = here[i];
  return values;
}

bool CudaMachine::convolve(const ConvolutionShape& shape, ConvolutionPass pass, Numbers x,
                           Numbers w, Numbers y, bool adds) {
  return libraries_.convolutions && libraries_.convolutions->run(*this, shape, pass, x, w, y, adds);
}

bool CudaMachine::flash(const FlashCall& call, FlashPass pass) {
  if (!has_flash()) return false;
  const bool backward = pass == FlashPass::backward;
  if (libraries_.attention && (backward || pass == FlashPass::forward) &&
      libraries_.attention->run(*this, call, backward))
    return true;
  if (backward) return false;
  own_flash(call, pass);
  return true;
}

bool CudaMachine::product(const Product& p) {
  if (p.m * p.n * p.batch == 0) return true;
  PARTITA_ASSERT(p.k > 0 && p.a.at.type() == p.b.at.type() &&
                     (!p.c.at.narrow() || p.c.at.type() == p.a.at.type()),
                 in_words(p));
  const auto of = std::make_shared<ProductDescription>();
  ProductDescription& d = *of;
  const cublasComputeType_t type = libraries_.options.tf32 && !p.a.at.narrow()
                                       ? CUBLAS_COMPUTE_32F_FAST_TF32
                                       : CUBLAS_COMPUTE_32F;
  check(cublasLtMatmulDescCreate(&d.product, type, CUDA_R_32F), in_words(p));
  // c' = b' a', each primed one the transpose that cuBLASLt sees.
  const auto operation = [&](const Matrix& m, cublasLtMatmulDescAttributes_t attribute) {
    const cublasOperation_t op = m.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    check(cublasLtMatmulDescSetAttribute(d.product, attribute, &op, sizeof op), in_words(p));
  };
  operation(p.b, CUBLASLT_MATMUL_DESC_TRANSA);
  operation(p.a, CUBLASLT_MATMUL_DESC_TRANSB);
  if (p.bias != nullptr) {
    // Along the columns of c', which are c's rows. Of c's type, as it is unless it is said.
    PARTITA_ASSERT(p.c.at.narrow() && p.bias.type() == p.c.at.type() && p.batch == 1, in_words(p));
    const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    const void* bias = p.bias.data();
    check(cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                         sizeof epilogue),
          in_words(p));
    check(cublasLtMatmulDescSetAttribute(d.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                         sizeof bias),
          in_words(p));
  }
  d.a = layout_of(p.b, p.k, p.n, p.batch);
  d.b = layout_of(p.a, p.m, p.k, p.batch);
  d.c = layout_of(p.c, p.m, p.n, p.batch);

  const ProductKey key{p.m,
                       p.n,
                       p.k,
                       p.batch,
                       p.a.stride,
                       p.b.stride,
                       p.c.stride,
                       p.a.step,
                       p.b.step,
                       p.c.step,
                       p.a.at.type(),
                       p.c.at.type(),
                       EightBits::e4m3,
                       EightBits::e4m3,
                       p.a.transposed,
                       p.b.transposed,
                       p.beta != 0,
                       p.bias != nullptr,
                       alignment(p.a.at),
                       alignment(p.b.at),
                       alignment(p.c.at),
                       p.bias != nullptr ? alignment(p.bias) : 0};
  return multiply({of, p.b.at.data(), p.a.at.data(), p.c.at.data(),
                   bytes_of(p.b, p.k, p.n, p.batch), bytes_of(p.a, p.m, p.k, p.batch),
                   bytes_of(p.c, p.m, p.n, p.batch), p.alpha, p.beta, p.passing},
                  key, in_words(p));
}

void CudaMachine::product(const EightProduct& p) {
  if (p.a.rows * p.b.rows == 0) return;
  PARTITA_ASSERT(p.a.stride == p.b.stride && p.a.stride % 16 == 0 && p.b.padded % 16 == 0 &&
                     (p.a.format == EightBits::e4m3 || p.b.format == EightBits::e4m3),
                 "8-bit numbers that cuBLASLt does not multiply");
  const auto type_of_eights = [](const Eights& e) {
    return e.format == EightBits::e4m3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2;
  };
  const auto word = [](const Eights& e) { return e.format == EightBits::e4m3 ? "E4M3" : "E5M2"; };
  const std::string words = fmt::format("{} x {} product of {} x {} x {}", word(p.a), word(p.b),
                                        p.a.rows, p.b.padded, p.a.columns);
  const auto of = std::make_shared<ProductDescription>();
  ProductDescription& d = *of;
  check(cublasLtMatmulDescCreate(&d.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), words);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
    check(cublasLtMatmulDescSetAttribute(d.product, attribute, &value, sizeof value), words);
  };
  // Both operands lie along the sum, which is all that the tensor cores of Hopper take.
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(p.b.inverse));
  set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(p.a.inverse));
  // Partial sums are promoted to fp32 again and again, not kept in the tensor cores' 14 bits.
  set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, std::int8_t{0});
  const auto eights = [&](cublasLtMatrixLayout_t& layout, const Eights& e) {
    check(
        cublasLtMatrixLayoutCreate(&layout, type_of_eights(e), static_cast<std::uint64_t>(e.stride),
                                   static_cast<std::uint64_t>(e.padded), e.stride),
        words);
  };
  eights(d.a, p.b);
  eights(d.b, p.a);
  d.c = layout_of(p.c, p.a.rows, p.b.padded, 1);
  ProductKey key;
  key.m = p.a.rows, key.n = p.b.padded, key.k = p.a.stride, key.batch = 1;
  key.a_stride = key.b_stride = p.a.stride;
  key.c_stride = p.c.stride;
  key.type = ElementType::fp8, key.sum = p.c.at.type();
  key.a_eight = p.a.format, key.b_eight = p.b.format;
  key.b_transposed = true;
  key.adds = p.beta != 0;
  key.a_alignment = key.b_alignment = 256;  // scratch
  key.c_alignment = alignment(p.c.at);
  multiply({of, p.b.at, p.a.at, p.c.at.data(), bytes_of(p.b), bytes_of(p.a),
            bytes_of(p.c, p.a.rows, p.b.padded, 1), 1, p.beta, p.passing},
           key, words);
}

namespace {
cublasStatus_t multiply_by(const Libraries& libraries, const ProductCall& p,
                           const ProductChoice& choice, std::byte* workspace, cudaStream_t stream) {
  return cublasLtMatmul(libraries.blas, p.of->product, &p.alpha, p.a, p.of->a, p.b, p.of->b,
                        &p.beta, p.c, p.of->c, p.c, p.of->c, &choice.algorithm, workspace,
                        choice.workspace, stream);
}

/// At most `wanted`, the heuristic's first one first; none where it does not add such a bias.
std::vector<ProductChoice> choices_for(const Libraries& libraries, const ProductCall& p,
                                       const ProductKey& key, int wanted,
                                       const std::string& words) {
  Preference preference;
  check(cublasLtMatmulPreferenceCreate(&preference.at), words);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference.at, attribute, &value, sizeof value),
          words);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::size_t{CudaMachine::kWorkspace});
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<std::uint32_t>(key.b_alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<std::uint32_t>(key.a_alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<std::uint32_t>(key.c_alignment));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<std::uint32_t>(key.c_alignment));
  // Of a sum that is cut, parts are added in fp32 whatever type the result has.
  if (key.sum != ElementType::fp32)
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
           static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  constexpr int kMost = 64;
  cublasLtMatmulHeuristicResult_t found[kMost] = {};
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      libraries.blas, p.of->product, p.of->a, p.of->b, p.of->c, p.of->c, preference.at,
      std::clamp(wanted, 1, kMost), found, &count);
  if (key.biased && status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
  check(status, words);
  std::vector<ProductChoice> choices;
  for (int i = 0; i < count; ++i) {
    if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
    ProductChoice c;
    c.algorithm = found[i].algo;
    c.workspace = found[i].workspaceSize;
    c.taken = i;
    cublasLtMatmulAlgoConfigGetAttribute(&c.algorithm, CUBLASLT_ALGO_CONFIG_ID, &c.id, sizeof c.id,
                                         nullptr);
    choices.push_back(c);
  }
  if (choices.empty() && !key.biased)
    throw MachineError(fmt::format("cuBLASLt has no algorithm for a {}", words));
  return choices;
}
}  // namespace

ProductChoice CudaMachine::fastest(const ProductCall& p, const std::vector<ProductChoice>& choices,
                                   const std::string& words) {
  const auto run = [&](const ProductChoice& choice) {
    return multiply_by(libraries_, p, choice, workspace(), stream_);
  };
  cudaEvent_t before = nullptr, after = nullptr;
  check(cudaEventCreate(&before), "an event");
  check(cudaEventCreate(&after), "an event");
  constexpr double kNever = std::numeric_limits<double>::infinity();
  std::vector<double> least(choices.size(), kNever);
  const auto time = [&](std::size_t i) -> double {
    if (run(choices[i]) != CUBLAS_STATUS_SUCCESS) return kNever;
    constexpr int kTimes = 3;
    check(cudaEventRecord(before, stream_), "an event");
    for (int t = 0; t < kTimes; ++t) check(run(choices[i]), words);
    check(cudaEventRecord(after, stream_), "an event");
    check(cudaEventSynchronize(after), words);
    float ms = 0;
    check(cudaEventElapsedTime(&ms, before, after), "an event's time");
    return static_cast<double>(ms) * 1e-3 / kTimes;
  };
  // There and back: a clock that falls while they are timed favours neither end.
  for (std::size_t i = 0; i < choices.size(); ++i) least[i] = std::min(least[i], time(i));
  for (std::size_t i = choices.size(); i-- > 0;) least[i] = std::min(least[i], time(i));
  const auto best_of = [&](std::ptrdiff_t count) {
    return static_cast<std::size_t>(std::min_element(least.begin(), least.begin() + count) -
                                    least.begin());
  };
  const std::size_t first = best_of(std::ssize(least)),
                    usual =
                        best_of(std::min<std::ptrdiff_t>(ProductChoice::kUsual, std::ssize(least)));
  if (usual != first && least[usual] != kNever) {
    // One between slow ones finds a higher clock than one between fast ones: which of the two it
    // is, and by how much, they show in turn.
    std::vector<double> of_first, of_usual;
    constexpr int kPairs = 8;
    for (int k = 0; k < kPairs; ++k)
      of_usual.push_back(time(usual)), of_first.push_back(time(first));
    for (auto* list : {&of_first, &of_usual}) std::sort(list->begin(), list->end());
    least[first] = of_first[kPairs / 2], least[usual] = of_usual[kPairs / 2];
  }
  check(cudaEventDestroy(before), "an event");
  check(cudaEventDestroy(after), "an event");
  if (least[first] == kNever) return choices[0];
  const std::size_t taken = least[usual] < least[first] ? usual : first;
  ProductChoice best = choices[taken];
  best.candidates = static_cast<int>(choices.size());
  best.seconds = least[taken];
  if (least[usual] != kNever) best.seconds_of_usual = least[usual];
  return best;
}

bool CudaMachine::multiply(const ProductCall& p, const ProductKey& key, const std::string& words) {
  const auto run = [&](const ProductChoice& choice) {
    check(multiply_by(libraries_, p, choice, workspace(), stream_), words);
    return true;
  };
  if (const auto known = libraries_.products.find(key); known != libraries_.products.end())
    return run(known->second);
  if (const ProductChoice* choice = p.passing ? nullptr : libraries_.agreed_on(key)) {
    libraries_.products.emplace(key, *choice);
    return run(*choice);
  }
  if (libraries_.refused.count(key) > 0) return false;
  const std::vector<ProductChoice> first = choices_for(libraries_, p, key, 1, words);
  if (first.empty()) {
    libraries_.refused.insert(key);
    return false;
  }
  if (!p.passing) libraries_.products.emplace(key, first[0]);
  // What comes later, or once, is not timed.
  if (!p.passing && !libraries_.agree) libraries_.open.try_emplace(key, OpenProduct{p, words});
  return run(first[0]);
}

namespace {
/// What earlier runs of this process have timed on the GPU, of so many candidates.
struct TimedBefore {
  std::mutex guard;  ///< ranks may be threads
  ProductChoices choices;
};
TimedBefore& timed_before(const ProductOptions& options) {
  static std::mutex guard;
  static auto& all = *new std::map<std::tuple<int, int, bool>, TimedBefore>;
  int device = 0;
  check(cudaGetDevice(&device), "the current GPU");
  const std::lock_guard lock(guard);
  return all[{device, options.candidates, options.tf32}];
}
}  // namespace

ProductChoices CudaMachine::time_open_products() {
  ProductChoices found;
  TimedBefore& before = timed_before(libraries_.options);
  // Of products that differ in alignment alone one is timed, for the least of each operand: its
  // choice does for all.
  std::map<ProductKind, std::pair<ProductKey, OpenProduct>> of_kind;
  for (auto& [key, open] : std::exchange(libraries_.open, {})) {
    const auto [it, fresh] = of_kind.try_emplace(ProductKind(key), key, std::move(open));
    if (!fresh) it->second.first = least_aligned(it->second.first, key);
  }
  for (auto& [kind, one] : of_kind) {
    auto& [key, open] = one;
    ProductCall& p = open.call;
    const std::vector<ProductChoice> choices =
        choices_for(libraries_, p, key, libraries_.options.candidates, open.words);
    if (choices.empty()) continue;
    ProductChoice& choice = found[key] = choices[0];
    if (choices.size() == 1) continue;
    {
      const std::lock_guard lock(before.guard);
      if (const auto known = before.choices.find(key); known != before.choices.end()) {
        choice = known->second;
        continue;
      }
    }
    constexpr std::size_t kGrain = 256;
    const auto whole = [](std::size_t n) { return (n + kGrain - 1) / kGrain * kGrain; };
    const bool eights = key.type == ElementType::fp8;
    const std::size_t small = whole(std::max(sizeof(float), static_cast<std::size_t>(key.n) * 4));
    const std::size_t bytes = whole(p.a_bytes) + whole(p.b_bytes) + whole(p.c_bytes) + small;
    std::unique_ptr<DeviceBlock> room = DeviceBlock::where_there_is_room(bytes);
    if (!room && libraries_.make_room) {
      libraries_.make_room();
      room = DeviceBlock::where_there_is_room(bytes);
    }
    if (!room) continue;
    std::byte *a = room->at, *b = a + whole(p.a_bytes), *c = b + whole(p.b_bytes),
              *beside = c + whole(p.c_bytes);
    const auto numbers = [&](std::byte* at, std::size_t n, ElementType type, std::uint64_t seed) {
      // Of 8 bits about a half, whatever its format.
      if (eights && type == ElementType::fp8)
        check(cudaMemsetAsync(at, 0x30, n, stream_), "numbers to multiply");
      else
        draw(*this, {at, type}, static_cast<std::int64_t>(n / (type == ElementType::fp32 ? 4 : 2)),
             0, 1, seed);
    };
    numbers(a, p.a_bytes, key.type, 1);
    numbers(b, p.b_bytes, key.type, 2);
    check(cudaMemsetAsync(c, 0, p.c_bytes + small, stream_), "zeros to add to");
    p.a = a, p.b = b, p.c = c;
    const auto point = [&](cublasLtMatmulDescAttributes_t attribute) {
      const void* to = beside;
      check(cublasLtMatmulDescSetAttribute(p.of->product, attribute, &to, sizeof to), open.words);
    };
    if (key.biased) point(CUBLASLT_MATMUL_DESC_BIAS_POINTER);
    if (eights)
      point(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER), point(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER);
    choice = fastest(p, choices, open.words);
    check(cudaStreamSynchronize(stream_), open.words);
    const std::lock_guard lock(before.guard);
    before.choices.insert_or_assign(key, choice);
  }
  return found;
}

}  // namespace partita::cuda
