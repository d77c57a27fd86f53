// cuBLASLt: products of fp32, bf16, fp16 and 8-bit matrices, with what its documentation asks of
// them.
#include <cublasLt.h>
#include <fmt/format.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "runtime/cuda/machine.h"
#include "tests/runtime/cuda/emulated/gpu.h"

namespace {

using emulated::refuse;
using emulated::the;
using partita::EightBits;
using partita::ElementType;

struct Layout {
  cudaDataType type;
  std::uint64_t rows, columns;
  std::int64_t stride, step = 0;
  std::int32_t batch = 1;
};
struct Description {
  cublasComputeType_t compute;
  cublasOperation_t a = CUBLAS_OP_N, b = CUBLAS_OP_N;
  const void *a_scale = nullptr, *b_scale = nullptr;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
};
struct Preference {
  std::uint64_t workspace = 0;
  std::uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_MASK;
  std::map<int, std::uint32_t> alignments;
};
/// What cublasLtMatmulAlgo_t holds: a choice is good for one problem.
struct Choice {
  std::uint64_t problem, workspace;
  std::uint32_t alignment[4];
  std::int32_t id;
};
static_assert(sizeof(Choice) <= sizeof(cublasLtMatmulAlgo_t));

std::uint64_t problem_of(const Description& d, const Layout& a, const Layout& b, const Layout& c) {
  std::uint64_t h = 1;
  const auto add = [&](auto v) { h = partita::cuda::splitmix(h ^ static_cast<std::uint64_t>(v)); };
  add(d.compute), add(d.a), add(d.b), add(d.a_scale != nullptr), add(d.b_scale != nullptr);
  add(d.epilogue);
  for (const Layout* l : {&a, &b, &c})
    add(l->type), add(l->rows), add(l->columns), add(l->stride), add(l->step), add(l->batch);
  return h;
}
bool eight(cudaDataType t) { return t == CUDA_R_8F_E4M3 || t == CUDA_R_8F_E5M2; }
int width(cudaDataType t) { return t == CUDA_R_32F ? 4 : eight(t) ? 1 : 2; }

/// Why cuBLASLt has no such product; empty: it has.
std::string wrong(const Description& d, const Layout& a, const Layout& b, const Layout& c) {
  const std::uint64_t m = d.a == CUBLAS_OP_N ? a.rows : a.columns,
                      k = d.a == CUBLAS_OP_N ? a.columns : a.rows,
                      n = d.b == CUBLAS_OP_N ? b.columns : b.rows,
                      also_k = d.b == CUBLAS_OP_N ? b.rows : b.columns;
  if (k != also_k || c.rows != m || c.columns != n)
    return fmt::format("a product of {} x {} and {} x {} that is {} x {}", m, k, also_k, n, c.rows,
                       c.columns);
  if (m == 0 || n == 0 || k == 0) return "a product of nothing";
  for (const Layout* l : {&a, &b, &c}) {
    if (l->stride < static_cast<std::int64_t>(l->rows)) return "columns that overlap";
    if (l->batch != c.batch) return "batches that differ";
  }
  const auto extent =
      static_cast<std::int64_t>((c.columns - 1)) * c.stride + static_cast<std::int64_t>(c.rows);
  // Matrices of a batch may lie between each other's columns; they may not be one.
  if (c.batch > 1 && c.step == 0 && extent > 0) return "a batch's results in one place";
  if (d.epilogue != CUBLASLT_EPILOGUE_DEFAULT &&
      (d.epilogue != CUBLASLT_EPILOGUE_BIAS || d.bias == nullptr || c.batch > 1 || eight(a.type) ||
       c.type == CUDA_R_32F))
    return "an epilogue other than a bias of 16 bits";
  if (eight(a.type) || eight(b.type)) {
    if (!eight(a.type) || !eight(b.type)) return "one operand of 8 bits";
    if (a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2) return "E5M2 by E5M2";
    if (d.a != CUBLAS_OP_T || d.b != CUBLAS_OP_N) return "8 bits not TN";
    if (m % 16 != 0 || k % 16 != 0 || a.stride % 16 != 0 || b.stride % 16 != 0 ||
        c.stride * width(c.type) % 16 != 0)
      return "8 bits of sizes that are no multiples of 16";
    if (d.compute != CUBLAS_COMPUTE_32F) return "8 bits not summed in fp32";
    return c.type == CUDA_R_16BF || c.type == CUDA_R_16F || c.type == CUDA_R_32F ? ""
                                                                                 : "a type of c";
  }
  if (d.a_scale != nullptr || d.b_scale != nullptr) return "scales of what is not 8 bits";
  if (a.type != b.type) return "operands of two types";
  if (c.type != a.type && c.type != CUDA_R_32F) return "a result of another type";
  if (d.compute == CUBLAS_COMPUTE_32F_FAST_TF32 && a.type != CUDA_R_32F) return "TF32 of 16 bits";
  return "";
}

float at(const Layout& l, const std::byte* p, std::int64_t i) {
  using namespace partita::cuda;
  switch (l.type) {
    case CUDA_R_32F:
      return reinterpret_cast<const float*>(p)[i];
    case CUDA_R_16BF:
      return from_bf16(reinterpret_cast<const std::uint16_t*>(p)[i]);
    case CUDA_R_16F:
      return from_fp16(reinterpret_cast<const std::uint16_t*>(p)[i]);
    default:
      return from_eight(l.type == CUDA_R_8F_E4M3 ? EightBits::e4m3 : EightBits::e5m2,
                        reinterpret_cast<const std::uint8_t*>(p)[i]);
  }
}
void put(const Layout& l, std::byte* p, std::int64_t i, float v) {
  using namespace partita::cuda;
  if (l.type == CUDA_R_32F) {
    reinterpret_cast<float*>(p)[i] = v;
  } else {
    reinterpret_cast<std::uint16_t*>(p)[i] = l.type == CUDA_R_16BF ? to_bf16(v) : to_fp16(v);
  }
}
/// Ten digits after the first, ties away from 0 as the tensor cores' conversion has them.
float tf32(float v) {
  if (!partita::cuda::finite(v)) return v;
  return partita::cuda::float_of((partita::cuda::bits_of(v) + 0x1000u) & 0xffffe000u);
}

void multiply(const Description& d, const Layout& la, const std::byte* a, const Layout& lb,
              const std::byte* b, const Layout& lc, std::byte* c, float alpha, float beta) {
  const auto matrix = [&](const Layout& l, const std::byte* p, bool turned) {
    Eigen::MatrixXf m(static_cast<Eigen::Index>(l.rows), static_cast<Eigen::Index>(l.columns));
    for (Eigen::Index j = 0; j < m.cols(); ++j) {
      for (Eigen::Index i = 0; i < m.rows(); ++i) m(i, j) = at(l, p, j * l.stride + i);
    }
    if (d.compute == CUBLAS_COMPUTE_32F_FAST_TF32) m = m.unaryExpr(&tf32).eval();
    if (turned) m.transposeInPlace();
    return m;
  };
  float scale = alpha;
  for (const void* s : {d.a_scale, d.b_scale}) {
    if (s != nullptr) scale *= *static_cast<const float*>(s);
  }
  for (std::int32_t n = 0; n < lc.batch; ++n) {
    const auto a_n = matrix(la, a + n * la.step * width(la.type), d.a == CUBLAS_OP_T),
               b_n = matrix(lb, b + n * lb.step * width(lb.type), d.b == CUBLAS_OP_T);
    const Eigen::MatrixXf product = a_n * b_n;
    std::byte* to = c + n * lc.step * width(lc.type);
    for (Eigen::Index j = 0; j < product.cols(); ++j) {
      for (Eigen::Index i = 0; i < product.rows(); ++i) {
        const std::int64_t e = j * lc.stride + i;
        // A column of c' has a bias for each of its rows.
        const float bias = d.bias != nullptr ? at(lc, static_cast<const std::byte*>(d.bias), i) : 0;
        put(lc, to, e, scale * product(i, j) + (beta == 0 ? 0 : beta * at(lc, to, e)) + bias);
      }
    }
  }
}

std::size_t span(const Layout& l) {
  const auto last = static_cast<std::int64_t>(l.columns - 1) * l.stride +
                    static_cast<std::int64_t>(l.rows) + (l.batch - 1) * l.step;
  return static_cast<std::size_t>(last * width(l.type));
}

/// An attribute of `size` bytes.
template <class T>
cublasStatus_t take(T& to, const void* from, std::size_t size) {
  if (size != sizeof(T) || from == nullptr)
    return refuse(CUBLAS_STATUS_INVALID_VALUE,
                  fmt::format("an attribute of {} bytes, not {}", size, sizeof(T)));
  std::memcpy(&to, from, size);
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

size_t CUBLASWINAPI cublasLtGetVersion() { return CUBLAS_VERSION; }
const char* CUBLASWINAPI cublasLtGetStatusString(cublasStatus_t s) {
  return s == CUBLAS_STATUS_SUCCESS         ? "success"
         : s == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported"
         : s == CUBLAS_STATUS_INVALID_VALUE ? "invalid value"
                                            : "a refusal";
}
cublasStatus_t CUBLASWINAPI cublasLtCreate(cublasLtHandle_t* to) {
  *to = the<cublasLtContext>(new int);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtDestroy(cublasLtHandle_t h) {
  delete the<int>(h);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t CUBLASWINAPI cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* to,
                                                     cublasComputeType_t compute,
                                                     cudaDataType_t scale) {
  if (scale != CUDA_R_32F) return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "alpha not in fp32");
  auto* d = new Description;
  d->compute = compute;
  *to = the<cublasLtMatmulDescOpaque_t>(d);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
  delete the<Description>(d);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t of,
                                                           cublasLtMatmulDescAttributes_t attribute,
                                                           const void* value, size_t size) {
  auto& d = *the<Description>(of);
  std::int8_t fast = 0;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return take(d.a, value, size);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return take(d.b, value, size);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
      return take(d.a_scale, value, size);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
      return take(d.b_scale, value, size);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
      return take(fast, value, size);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return take(d.epilogue, value, size);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return take(d.bias, value, size);
    default:
      return refuse(CUBLAS_STATUS_INVALID_VALUE,
                    fmt::format("attribute {} of a product", static_cast<int>(attribute)));
  }
}
cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* to,
                                                       cudaDataType type, uint64_t rows,
                                                       uint64_t columns, int64_t stride) {
  if (type != CUDA_R_32F && type != CUDA_R_16BF && type != CUDA_R_16F && !eight(type))
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a type of matrix");
  *to = the<cublasLtMatrixLayoutOpaque_t>(new Layout{type, rows, columns, stride});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
  delete the<Layout>(l);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatrixLayoutSetAttribute(
    cublasLtMatrixLayout_t of, cublasLtMatrixLayoutAttribute_t attribute, const void* value,
    size_t size) {
  auto& l = *the<Layout>(of);
  if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) return take(l.batch, value, size);
  if (attribute == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) return take(l.step, value, size);
  return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of a matrix");
}
cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* to) {
  *to = the<cublasLtMatmulPreferenceOpaque_t>(new Preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
  delete the<Preference>(p);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t of, cublasLtMatmulPreferenceAttributes_t attribute,
    const void* value, size_t size) {
  auto& p = *the<Preference>(of);
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return take(p.workspace, value, size);
  if (attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
      attribute <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
    return take(p.alignments[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, size);
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) return take(p.schemes, value, size);
  return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of a preference");
}

/// Ten: the later, the more memory to work in. The third cannot be used.
cublasStatus_t CUBLASWINAPI cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t product, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t found[],
    int* count) {
  *count = 0;
  const auto& p = *the<const Description>(product);
  const auto &la = *the<const Layout>(a), &lb = *the<const Layout>(b), &lc = *the<const Layout>(c),
             &ld = *the<const Layout>(d);
  if (std::string why = wrong(p, la, lb, lc); !why.empty())
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why);
  if (problem_of(p, la, lb, lc) != problem_of(p, la, lb, ld))
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "c and d differ");
  // Whoever wants such a bias must expect that no algorithm adds it.
  if (p.epilogue == CUBLASLT_EPILOGUE_BIAS &&
      (lc.rows == 1 || (p.a == CUBLAS_OP_N ? la.columns : la.rows) == 1))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  auto& prefer = *the<Preference>(preference);
  const bool in_16_bits = ld.type == CUDA_R_16BF || ld.type == CUDA_R_16F;
  if (in_16_bits && (prefer.schemes & ~std::uint32_t{CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE}) != 0)
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "parts of a sum may be added in 16 bits");
  for (int i = 0; i < std::min(wanted, 10); ++i) {
    Choice choice{};
    choice.problem = problem_of(p, la, lb, lc);
    choice.workspace = static_cast<std::uint64_t>(i) << 20;
    choice.id = 20 + i;
    for (int k = 0; k < 4; ++k) {
      const auto it = prefer.alignments.find(k);
      choice.alignment[k] = it != prefer.alignments.end() ? it->second : 256;
    }
    if (choice.workspace > prefer.workspace) break;
    auto& r = found[(*count)++];
    std::memcpy(&r.algo, &choice, sizeof choice);
    r.workspaceSize = choice.workspace;
    r.state = i == 2 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
  }
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t CUBLASWINAPI cublasLtMatmulAlgoConfigGetAttribute(
    const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute,
    void* value, size_t size, size_t*) {
  if (attribute != CUBLASLT_ALGO_CONFIG_ID || size != sizeof(std::int32_t))
    return refuse(CUBLAS_STATUS_INVALID_VALUE, "an attribute of an algorithm");
  std::memcpy(value, &the<const Choice>(algorithm)->id, size);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t CUBLASWINAPI cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product,
                                           const void* alpha, const void* a,
                                           cublasLtMatrixLayout_t a_layout, const void* b,
                                           cublasLtMatrixLayout_t b_layout, const void* beta,
                                           const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                           cublasLtMatrixLayout_t d_layout,
                                           const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                           size_t workspace_bytes, cudaStream_t stream) {
  const auto p = *the<const Description>(product);
  const auto la = *the<const Layout>(a_layout), lb = *the<const Layout>(b_layout),
             lc = *the<const Layout>(c_layout), ld = *the<const Layout>(d_layout);
  if (std::string why = wrong(p, la, lb, lc); !why.empty())
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, why);
  if (c != d || problem_of(p, la, lb, lc) != problem_of(p, la, lb, ld))
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "c and d differ");
  Choice choice{};
  std::memcpy(&choice, algorithm, sizeof choice);
  if (choice.problem != problem_of(p, la, lb, lc) || choice.id == 22)
    return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "an algorithm for another product");
  if (workspace_bytes < choice.workspace || !emulated::reachable(workspace, workspace_bytes))
    return refuse(CUBLAS_STATUS_INVALID_VALUE, "a product without the memory it works in");
  const void* addresses[] = {a, b, c, d};
  const Layout* layouts[] = {&la, &lb, &lc, &ld};
  for (int k = 0; k < 4; ++k) {
    if (reinterpret_cast<std::uintptr_t>(addresses[k]) % choice.alignment[k] != 0)
      return refuse(CUBLAS_STATUS_INVALID_VALUE,
                    "an operand that is not aligned as it was said to be");
    if (!emulated::on_gpu(addresses[k]) || !emulated::reachable(addresses[k], span(*layouts[k])))
      return refuse(CUBLAS_STATUS_INVALID_VALUE,
                    fmt::format("operand {} of {} bytes is not all in the GPU's memory", k,
                                span(*layouts[k])));
  }
  if (p.bias != nullptr &&
      !emulated::reachable(p.bias, lc.rows * static_cast<std::size_t>(width(lc.type))))
    return refuse(CUBLAS_STATUS_INVALID_VALUE, "a bias that is not all in the GPU's memory");
  if (eight(la.type)) {
    for (const void* s : {p.a_scale, p.b_scale}) {
      if (s != nullptr && !emulated::on_gpu(s))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "a scale that is not the GPU's");
    }
    for (const void* x : {a, b, static_cast<const void*>(d)}) {
      if (reinterpret_cast<std::uintptr_t>(x) % 16 != 0)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "8 bits not aligned to 16 bytes");
    }
  }
  const float x = *static_cast<const float*>(alpha), y = *static_cast<const float*>(beta);
  const cudaError_t e =
      emulated::launch(stream, fmt::format("product of {} x {}", lc.rows, lc.columns), [=] {
        emulated::spoil(workspace, choice.workspace);
        multiply(p, la, static_cast<const std::byte*>(a), lb, static_cast<const std::byte*>(b), lc,
                 static_cast<std::byte*>(d), x, y);
      });
  return e == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // extern "C"
