// Attention without scores in memory, on tensor cores (flash.h).
#include "runtime/cuda/cuda_machine.h"

namespace partita::cuda {
namespace {

/// A block of threads on a GPU; each is one lane.
class GpuBlock {
 public:
  static constexpr int kLanes = 1;
  __device__ __forceinline__ int lane(int) const { return static_cast<int>(threadIdx.x) % 32; }
  template <class S, class F>
  __device__ __forceinline__ S kept(F f) {
    S s;
    f(s);
    return s;
  }
  template <class S, class F>
  __device__ __forceinline__ void warps(S& state, F f) {
    f(static_cast<int>(threadIdx.x) / 32, state);
  }
  template <class F>
  __device__ __forceinline__ void threads(int n, F f) {
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) f(i);
  }
  __device__ __forceinline__ std::uint16_t* shared() const {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<std::uint16_t*>(memory);
  }
  __device__ __forceinline__ void copy(void* to, const void* from, int bytes, int size) {
    if (size == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place(to)), "l"(from),
                   "r"(bytes)
                   : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(place(to)), "l"(from),
                   "r"(bytes)
                   : "memory");
    }
  }
  __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kGroups>
  __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
  }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void warp_sync() { __syncwarp(); }

  template <class F>
  __device__ __forceinline__ void load(flash::Factors<GpuBlock>& f, F at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.v[0][0]), "=r"(f.v[0][1]), "=r"(f.v[0][2]), "=r"(f.v[0][3])
                 : "r"(place(at(lane(0))))
                 : "memory");
  }
  template <class F>
  __device__ __forceinline__ void load_turned(flash::Factors<GpuBlock>& f, F at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.v[0][0]), "=r"(f.v[0][1]), "=r"(f.v[0][2]), "=r"(f.v[0][3])
                 : "r"(place(at(lane(0))))
                 : "memory");
  }
  template <ElementType kType>
  __device__ __forceinline__ void multiply(flash::Sums<GpuBlock>& c,
                                           const flash::Factors<GpuBlock>& a,
                                           const flash::Factors<GpuBlock>& b, int half) {
    float* s = c.v[0];
    const std::uint32_t *l = a.v[0], *r = b.v[0] + half;
    if constexpr (kType == ElementType::bf16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
          : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
          "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
          : "r"(l[0]), "r"(l[1]), "r"(l[2]), "r"(l[3]), "r"(r[0]), "r"(r[1]));
    }
  }
  __device__ __forceinline__ void quad_max(float (&v)[1]) {
    v[0] = fmaxf(v[0], __shfl_xor_sync(0xffffffffu, v[0], 1));
    v[0] = fmaxf(v[0], __shfl_xor_sync(0xffffffffu, v[0], 2));
  }
  __device__ __forceinline__ void quad_sum(float (&v)[1]) {
    v[0] += __shfl_xor_sync(0xffffffffu, v[0], 1);
    v[0] += __shfl_xor_sync(0xffffffffu, v[0], 2);
  }

 private:
  static __device__ __forceinline__ std::uint32_t place(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
  }
};

/// 255 registers a thread, two blocks of a multiprocessor: one computes while the other waits.
template <class K>
__global__ __launch_bounds__(32 * K::kWarps,
                             2) void flash_kernel(const __grid_constant__ K kernel) {
  GpuBlock block;
  kernel(block, static_cast<std::int64_t>(blockIdx.x));
}

}  // namespace

void CudaMachine::own_flash(const FlashCall& call, FlashPass pass) {
  with_flash_kernel(call, pass, [&](const auto& kernel) {
    using K = std::decay_t<decltype(kernel)>;
    constexpr int kBytes = 2 * K::kWords;
    check(
        cudaFuncSetAttribute(flash_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "shared memory of attention");
    flash_kernel<K>
        <<<static_cast<unsigned>(kernel.blocks()), 32 * K::kWarps, kBytes, stream_>>>(kernel);
    check(cudaGetLastError(), "start of attention");
  });
}

}  // namespace partita::cuda
