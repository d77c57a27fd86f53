// runtime/cuda/machine.h: what kernels are written in, so that one text runs on a GPU and, slowly,
// on the host, where it is tested (docs/cuda.md, "Kernels").
//
// A kernel is a lambda of plain numbers and pointers for each element, or for each row with lanes
// that share it. Everything here is compiled by nvcc and by the host's compiler.
#pragma once

#include <cmath>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/element_type.h"

#ifdef PARTITA_EMULATED_LANES
// Of who runs blocks of many lanes on the host.
namespace emulated {
std::int64_t lane();
std::int64_t lanes();
double reduce(double v, bool maximum);
}  // namespace emulated
#endif
#ifdef __CUDACC__
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  include <cuda_fp8.h>
#  define PARTITA_BOTH __host__ __device__ inline
#  define PARTITA_LANE __device__ inline
#  define PARTITA_KERNEL [=] __device__
/// What is indexed ends in registers only where loops are written out and functions inside.
#  define PARTITA_UNROLL _Pragma("unroll")
#  define PARTITA_INLINE __device__ __forceinline__
#else
#  define PARTITA_BOTH inline
#  define PARTITA_LANE inline
#  define PARTITA_KERNEL [=]
#  define PARTITA_UNROLL
#  define PARTITA_INLINE inline
#endif

namespace partita::cuda {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

/// 2^x, of -inf 0.
PARTITA_BOTH float power_of_2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
/// e^x in two instructions, off by a part of some 1e-7 (1 + |x|).
PARTITA_BOTH float quick_power(float x) { return power_of_2(x * kLog2E); }
/// 1/x but for the last bit.
PARTITA_BOTH float quick_inverse(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

/// Those who share a row: on a GPU the threads of a block, or a part of a warp's where rows are
/// short; on the host one. Every lane calls sum() and max() the same number of times.
class Lanes {
 public:
  static constexpr unsigned kWarp = 32;
  /// All of a block, or so many of a warp, a power of two.
  PARTITA_BOTH explicit Lanes(unsigned of_warp = 0) : of_warp_(of_warp) {}
  PARTITA_BOTH std::int64_t lane() const {
#if defined(__CUDA_ARCH__)
    return of_warp_ > 0 ? threadIdx.x % of_warp_ : threadIdx.x;
#elif defined(PARTITA_EMULATED_LANES)
    return emulated::lane();
#else
    return 0;
#endif
  }
  PARTITA_BOTH std::int64_t count() const {
#if defined(__CUDA_ARCH__)
    return of_warp_ > 0 ? of_warp_ : blockDim.x;
#elif defined(PARTITA_EMULATED_LANES)
    return emulated::lanes();
#else
    return 1;
#endif
  }
  PARTITA_BOTH double sum(double v) const { return reduce(v, false); }
  PARTITA_BOTH double max(double v) const { return reduce(v, true); }
  PARTITA_BOTH float max(float v) const {
#if defined(__CUDA_ARCH__)
    float all[1] = {v};
    join(all, [](float x, float y) { return fmaxf(x, y); });
    return all[0];
#else
    return static_cast<float>(reduce(static_cast<double>(v), true));
#endif
  }
  /// Both at once: one wait for the other lanes.
  PARTITA_BOTH void sum(double& a, double& b) const {
#if defined(__CUDA_ARCH__)
    double all[2] = {a, b};
    join(all, [](double x, double y) { return x + y; });
    a = all[0], b = all[1];
#else
    a = reduce(a, false);
    b = reduce(b, false);
#endif
  }

 private:
#if defined(__CUDA_ARCH__)
  /// Each of the values joined over all lanes, for each of them. A block is a whole number of
  /// warps.
  template <int kValues, class T, class F>
  __device__ __forceinline__ void join(T (&v)[kValues], F f) const {
    // Other rows of the warp may be elsewhere.
    const unsigned mask = of_warp_ > 0 && of_warp_ < kWarp
                              ? ((1u << of_warp_) - 1)
                                    << (threadIdx.x % kWarp / of_warp_ * of_warp_)
                              : 0xffffffffu;
    for (unsigned d = (of_warp_ > 0 ? of_warp_ : kWarp) / 2; d > 0; d /= 2) {
      for (int k = 0; k < kValues; ++k)
        v[k] = f(v[k], __shfl_xor_sync(mask, v[k], static_cast<int>(d)));
    }
    if (of_warp_ > 0) {
      __syncwarp(mask);  // what a lane has read before, another may write now
      return;
    }
    __shared__ T parts[32][kValues];
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int k = 0; k < kValues && lane == 0; ++k) parts[warp][k] = v[k];
    __syncthreads();
    for (int k = 0; k < kValues; ++k) v[k] = parts[0][k];
    for (unsigned w = 1; w < warps; ++w) {
      for (int k = 0; k < kValues; ++k) v[k] = f(v[k], parts[w][k]);
    }
    // Nobody writes the next sum's parts while another still reads these.
    __syncthreads();
  }
#endif
  PARTITA_BOTH double reduce(double v, bool maximum) const {
#if defined(__CUDA_ARCH__)
    double all[1] = {v};
    join(all, [maximum](double x, double y) { return maximum ? fmax(x, y) : x + y; });
    return all[0];
#elif defined(PARTITA_EMULATED_LANES)
    static_cast<void>(of_warp_);
    return emulated::reduce(v, maximum);
#else
    static_cast<void>(of_warp_), static_cast<void>(maximum);
    return v;
#endif
  }
  unsigned of_warp_;
};

/// Position of the first of an ascending list of n that is not below `value`.
template <class T>
PARTITA_BOTH std::int64_t not_below(const T* list, std::int64_t n, T value) {
  std::int64_t low = 0;
  while (low < n) {
    const std::int64_t middle = (low + n) / 2;
    if (list[middle] < value) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

/// Ascending global indices along one dimension, as a kernel sees them.
struct IndexList {
  const std::int64_t* list = nullptr;  ///< null: first, first + 1, ...
  std::int64_t first = 0, size = 0;

  PARTITA_BOTH std::int64_t at(std::int64_t i) const {
    return list != nullptr ? list[i] : first + i;
  }
  /// How many are below `global`.
  PARTITA_BOTH std::int64_t below(std::int64_t global) const {
    if (list == nullptr) {
      const std::int64_t n = global - first;
      return n < 0 ? 0 : n > size ? size : n;
    }
    return not_below(list, size, global);
  }
  /// Position of `global`; -1 where it is not held.
  PARTITA_BOTH std::int64_t find(std::int64_t global) const {
    const std::int64_t i = below(global);
    return i < size && at(i) == global ? i : -1;
  }
};

// ------------------------------------------------------------------------------- 16-bit numbers

PARTITA_BOTH std::uint32_t bits_of(float x) {
  std::uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
PARTITA_BOTH float float_of(std::uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}
/// Ties to even; a number that is none stays one.
PARTITA_BOTH std::uint16_t to_bf16(float x) {
#ifdef __CUDA_ARCH__
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const std::uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(u >> 16 | 0x40u);
  return static_cast<std::uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
#endif
}
PARTITA_BOTH float from_bf16(std::uint16_t h) {
  return float_of(static_cast<std::uint32_t>(h) << 16);
}
PARTITA_BOTH std::uint16_t to_fp16(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  const std::uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u;
  std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (a >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65536 and more
  if (a < 0x38800000u) {                                                    // below 2^-14
    // Subnormal: a sum that has its last bit where the result has it.
    const float rounded = float_of(a) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of(rounded) - bits_of(0.5f)));
  }
  a += 0xc8000fffu + (a >> 13 & 1u);  // exponent - 112, and half a unit less what ties need
  return static_cast<std::uint16_t>(sign | a >> 13);
#endif
}
PARTITA_BOTH float from_fp16(std::uint16_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(h));
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16, e = h >> 10 & 31u,
                      m = h & 0x3ffu;
  if (e == 31) return float_of(sign | 0x7f800000u | m << 13);
  if (e > 0) return float_of(sign | (e + 112) << 23 | m << 13);
  const float small = static_cast<float>(m) * 0x1p-24f;
  return sign != 0 ? -small : small;
#endif
}

/// Elements in memory, of a type that the kernel learns when it runs; computed with in fp32.
class Numbers {
 public:
  /// Reads as a float; what is written is rounded to the type.
  class Element {
   public:
    PARTITA_BOTH Element(void* at, ElementType type, std::int64_t i)
        : at_(at), i_(i), type_(type) {}
    PARTITA_BOTH operator float() const {  // NOLINT: implicit by design
      if (type_ == ElementType::fp32) return static_cast<const float*>(at_)[i_];
      const std::uint16_t h = static_cast<const std::uint16_t*>(at_)[i_];
      return type_ == ElementType::bf16 ? from_bf16(h) : from_fp16(h);
    }
    PARTITA_BOTH const Element& operator=(float v) const {
      if (type_ == ElementType::fp32) {
        static_cast<float*>(at_)[i_] = v;
      } else {
        static_cast<std::uint16_t*>(at_)[i_] = type_ == ElementType::bf16 ? to_bf16(v) : to_fp16(v);
      }
      return *this;
    }
    Element(const Element&) = default;
    PARTITA_BOTH const Element& operator=(const Element& o) const {
      return *this = static_cast<float>(o);
    }
    PARTITA_BOTH void operator+=(float v) const { *this = static_cast<float>(*this) + v; }
    PARTITA_BOTH void operator-=(float v) const { *this = static_cast<float>(*this) - v; }
    PARTITA_BOTH void operator*=(float v) const { *this = static_cast<float>(*this) * v; }
    PARTITA_BOTH void operator/=(float v) const { *this = static_cast<float>(*this) / v; }

   private:
    void* at_;
    std::int64_t i_;
    ElementType type_;
  };

  PARTITA_BOTH Numbers(std::nullptr_t = nullptr) {}  // NOLINT: implicit by design
  PARTITA_BOTH Numbers(float* p) : at_(p) {}         // NOLINT: implicit by design
  PARTITA_BOTH Numbers(void* p, ElementType type) : at_(p), type_(type) {}

  PARTITA_BOTH Element operator[](std::int64_t i) const { return {at_, type_, i}; }
  PARTITA_BOTH Numbers operator+(std::int64_t n) const {
    const std::int64_t width = type_ == ElementType::fp32 ? 4 : 2;
    return {static_cast<std::byte*>(at_) + n * width, type_};
  }
  PARTITA_BOTH void* data() const { return at_; }
  PARTITA_BOTH ElementType type() const { return type_; }
  PARTITA_BOTH bool narrow() const { return type_ != ElementType::fp32; }
  PARTITA_BOTH friend bool operator==(const Numbers& n, std::nullptr_t) { return n.at_ == nullptr; }

 private:
  void* at_ = nullptr;
  ElementType type_ = ElementType::fp32;
};

/// Numbers that lie together, as one thread takes them at a time: one by one too little would be on
/// its way from memory to keep it busy.
struct Octet {
  static constexpr std::int64_t kSize = 8;
  float v[kSize];
};
/// 16 bytes at once.
struct Sixteen {
  std::uint32_t w[4];
};
PARTITA_BOTH Sixteen load_sixteen(const void* p) {
  Sixteen s;
#ifdef __CUDA_ARCH__
  const uint4 q = *static_cast<const uint4*>(p);
  s.w[0] = q.x, s.w[1] = q.y, s.w[2] = q.z, s.w[3] = q.w;
#else
  memcpy(&s, p, sizeof s);
#endif
  return s;
}
PARTITA_BOTH void store_sixteen(void* p, const Sixteen& s) {
#ifdef __CUDA_ARCH__
  *static_cast<uint4*>(p) = make_uint4(s.w[0], s.w[1], s.w[2], s.w[3]);
#else
  memcpy(p, &s, sizeof s);
#endif
}
PARTITA_BOTH void load_eight(const void* p, std::uint32_t* to) {
#ifdef __CUDA_ARCH__
  const uint2 q = *static_cast<const uint2*>(p);
  to[0] = q.x, to[1] = q.y;
#else
  memcpy(to, p, 8);
#endif
}
PARTITA_BOTH void store_eight(void* p, const std::uint32_t* from) {
#ifdef __CUDA_ARCH__
  *static_cast<uint2*>(p) = make_uint2(from[0], from[1]);
#else
  memcpy(p, from, 8);
#endif
}
/// 8 bytes at once, the lowest first.
PARTITA_BOTH void store_bytes(std::uint8_t* p, std::uint64_t bytes) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<std::uint64_t*>(p) = bytes;
#else
  memcpy(p, &bytes, sizeof bytes);
#endif
}
/// May all eight from there on be moved at once?
PARTITA_BOTH bool together(const Numbers& at, std::int64_t count) {
  return count >= Octet::kSize && reinterpret_cast<std::uintptr_t>(at.data()) % 16 == 0;
}
/// An octet as it lies in memory: where a thread takes several, all are on their way before the
/// first is looked at.
struct Raw {
  Sixteen low, high;  ///< the second of fp32 alone
};
/// The first `count` of x[first], ...; beyond them 0. `kWhole`: there are eight, and they may be
/// moved at once.
template <bool kWhole = false>
PARTITA_BOTH Raw raw_octet(const Numbers& x, std::int64_t first, std::int64_t count) {
  const Numbers at = x + first;
  Raw r{};
  if (kWhole || together(at, count)) {
    const auto* p = static_cast<const std::byte*>(at.data());
    r.low = load_sixteen(p);
    if (!x.narrow()) r.high = load_sixteen(p + 16);
  } else if (x.narrow()) {
    const auto* p = static_cast<const std::uint16_t*>(at.data());
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t a = 2 * k < count ? p[2 * k] : 0u,
                          b = 2 * k + 1 < count ? p[2 * k + 1] : 0u;
      r.low.w[k] = a | b << 16;
    }
  } else {
    const auto* p = static_cast<const float*>(at.data());
    for (int k = 0; k < 4; ++k) {
      r.low.w[k] = k < count ? bits_of(p[k]) : 0u;
      r.high.w[k] = 4 + k < count ? bits_of(p[4 + k]) : 0u;
    }
  }
  return r;
}
/// The same of 16-bit numbers alone: half the registers.
struct NarrowRaw {
  Sixteen low;
};
template <bool kWhole = false>
PARTITA_BOTH NarrowRaw raw_narrow(const Numbers& x, std::int64_t first, std::int64_t count) {
  const Numbers at = x + first;
  if (kWhole || together(at, count))
    return {load_sixteen(static_cast<const std::byte*>(at.data()))};
  const auto* p = static_cast<const std::uint16_t*>(at.data());
  NarrowRaw r{};
  for (int k = 0; k < 4; ++k) {
    const std::uint32_t a = 2 * k < count ? p[2 * k] : 0u,
                        b = 2 * k + 1 < count ? p[2 * k + 1] : 0u;
    r.low.w[k] = a | b << 16;
  }
  return r;
}
PARTITA_BOTH std::uint16_t low_half(std::uint32_t w) {
  return static_cast<std::uint16_t>(w & 0xffffu);
}
PARTITA_BOTH std::uint16_t high_half(std::uint32_t w) {
  return static_cast<std::uint16_t>(w >> 16);
}
/// The type is asked for once, not for each number.
PARTITA_BOTH Octet octet_of(const NarrowRaw& r, ElementType type) {
  Octet o;
  if (type == ElementType::bf16) {
    for (int k = 0; k < 4; ++k) {
      o.v[2 * k] = from_bf16(low_half(r.low.w[k]));
      o.v[2 * k + 1] = float_of(r.low.w[k] & 0xffff0000u);
    }
  } else {
    for (int k = 0; k < 4; ++k) {
      o.v[2 * k] = from_fp16(low_half(r.low.w[k]));
      o.v[2 * k + 1] = from_fp16(high_half(r.low.w[k]));
    }
  }
  return o;
}
PARTITA_BOTH Octet octet_of(const Raw& r, ElementType type) {
  if (type != ElementType::fp32) return octet_of(NarrowRaw{r.low}, type);
  Octet o;
  for (int k = 0; k < 4; ++k) o.v[k] = float_of(r.low.w[k]), o.v[4 + k] = float_of(r.high.w[k]);
  return o;
}
template <bool kWhole = false>
PARTITA_BOTH Octet octet(const Numbers& x, std::int64_t first, std::int64_t count) {
  return octet_of(raw_octet<kWhole>(x, first, count), x.type());
}
/// Two of them, rounded by one instruction.
PARTITA_BOTH std::uint32_t pair_bf16(float a, float b) {
#ifdef __CUDA_ARCH__
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  std::uint32_t w;
  memcpy(&w, &pair, sizeof w);
  return w;
#else
  return to_bf16(a) | static_cast<std::uint32_t>(to_bf16(b)) << 16;
#endif
}
PARTITA_BOTH std::uint32_t pair_fp16(float a, float b) {
#ifdef __CUDA_ARCH__
  const __half2 pair = __floats2half2_rn(a, b);
  std::uint32_t w;
  memcpy(&w, &pair, sizeof w);
  return w;
#else
  return to_fp16(a) | static_cast<std::uint32_t>(to_fp16(b)) << 16;
#endif
}
/// As it is stored.
PARTITA_BOTH Raw raw_of(const Octet& o, ElementType type) {
  Raw r{};
  if (type == ElementType::fp32) {
    for (int k = 0; k < 4; ++k) r.low.w[k] = bits_of(o.v[k]), r.high.w[k] = bits_of(o.v[4 + k]);
  } else if (type == ElementType::bf16) {
    for (int k = 0; k < 4; ++k) r.low.w[k] = pair_bf16(o.v[2 * k], o.v[2 * k + 1]);
  } else {
    for (int k = 0; k < 4; ++k) r.low.w[k] = pair_fp16(o.v[2 * k], o.v[2 * k + 1]);
  }
  return r;
}
template <bool kWhole = false>
PARTITA_BOTH void put(const Numbers& y, std::int64_t first, std::int64_t count, const Octet& o) {
  const Numbers at = y + first;
  if (!kWhole && !together(at, count)) {
    for (std::int64_t k = 0; k < Octet::kSize && k < count; ++k) at[k] = o.v[k];
    return;
  }
  auto* p = static_cast<std::byte*>(at.data());
  const Raw r = raw_of(o, y.type());
  store_sixteen(p, r.low);
  if (!y.narrow()) store_sixteen(p + 16, r.high);
}
/// How many octets n numbers are, the last maybe in part.
PARTITA_BOTH std::int64_t octets(std::int64_t n) { return (n + Octet::kSize - 1) / Octet::kSize; }

/// A thread's eight of n numbers in a row: an octet, or (`kApart`) four and four. Of fp32 an octet
/// is 32 bytes, a sector of memory, that two stores would write by halves; 32 threads' fours lie
/// together, and the others 128 numbers on.
/// `kSure`: of what it moves nothing is asked; all is in fp32 (`kApart`) or in 16 bits, and in one
/// piece (sure()).
template <bool kApart, bool kSure = false>
struct EightOf {
  static constexpr std::int64_t kFour = 4, kBeside = 32, kStep = kFour * kBeside;
  static constexpr bool kKnownWide = kApart && kSure;
  static std::int64_t count(std::int64_t n) {
    return kApart ? (n + 2 * kStep - 1) / (2 * kStep) * kBeside : octets(n);
  }
  PARTITA_BOTH static std::int64_t first(std::int64_t number) {
    return kApart ? number / kBeside * 2 * kStep + number % kBeside * kFour : number * Octet::kSize;
  }
  /// May both fours be moved at once?
  PARTITA_BOTH static bool whole(const Numbers& at, std::int64_t left) {
    return left >= kStep + kFour &&
           reinterpret_cast<std::uintptr_t>(at.data()) % (at.narrow() ? 8 : 16) == 0;
  }
  /// Of n numbers, where their type is for the kernel to know.
  static bool sure(std::int64_t n, const Numbers& at) {
    return !(at == nullptr) && at.narrow() != kApart &&
           n % (kApart ? 2 * kStep : std::int64_t{Octet::kSize}) == 0 &&
           reinterpret_cast<std::uintptr_t>(at.data()) % 16 == 0;
  }
  PARTITA_BOTH static Octet octet_of(const Raw& r, const Numbers& x) {
    if constexpr (kSure && kApart) return cuda::octet_of(r, ElementType::fp32);
    if constexpr (kSure) return cuda::octet_of(NarrowRaw{r.low}, x.type());
    return cuda::octet_of(r, x.type());
  }
  PARTITA_BOTH static Raw raw(const Numbers& x, std::int64_t number, std::int64_t n) {
    const std::int64_t from = first(number), left = n - from;
    if constexpr (kSure) {
      const auto* p = static_cast<const std::byte*>((x + from).data());
      Raw r{};
      r.low = load_sixteen(p);
      if constexpr (kApart) r.high = load_sixteen(p + kStep * 4);
      return r;
    }
    if constexpr (!kApart) return raw_octet(x, from, left);
    const Numbers at = x + from;
    if (!whole(at, left)) {
      const Raw low = raw_octet(x, from, left < kFour ? left : kFour),
                high = raw_octet(x, from + kStep, left - kStep < kFour ? left - kStep : kFour);
      if (!x.narrow()) return {low.low, high.low};
      return {{low.low.w[0], low.low.w[1], high.low.w[0], high.low.w[1]}, {}};
    }
    const auto* p = static_cast<const std::byte*>(at.data());
    Raw r{};
    if (x.narrow()) {
      load_eight(p, r.low.w);
      load_eight(p + kStep * 2, r.low.w + 2);
    } else {
      r.low = load_sixteen(p);
      r.high = load_sixteen(p + kStep * 4);
    }
    return r;
  }
  PARTITA_BOTH static Octet octet(const Numbers& x, std::int64_t number, std::int64_t n) {
    return octet_of(raw(x, number, n), x);
  }
  PARTITA_BOTH static void put(const Numbers& y, std::int64_t number, std::int64_t n,
                               const Octet& o) {
    const std::int64_t to = first(number), left = n - to;
    if constexpr (kSure) {
      auto* p = static_cast<std::byte*>((y + to).data());
      const Raw r = raw_of(o, kApart ? ElementType::fp32 : y.type());
      store_sixteen(p, r.low);
      if constexpr (kApart) store_sixteen(p + kStep * 4, r.high);
      return;
    }
    if constexpr (!kApart) {
      cuda::put(y, to, left, o);
      return;
    }
    const Numbers at = y + to;
    if (!whole(at, left)) {
      for (std::int64_t k = 0; k < kFour && k < left; ++k) at[k] = o.v[k];
      for (std::int64_t k = 0; k < kFour && kStep + k < left; ++k) at[kStep + k] = o.v[kFour + k];
      return;
    }
    auto* p = static_cast<std::byte*>(at.data());
    const Raw r = raw_of(o, y.type());
    if (y.narrow()) {
      store_eight(p, r.low.w);
      store_eight(p + kStep * 2, r.low.w + 2);
    } else {
      store_sixteen(p, r.low);
      store_sixteen(p + kStep * 4, r.high);
    }
  }
};
/// Is any of fp32?
template <class... N>
bool any_wide(const N&... n) {
  return (... || (!(n == nullptr) && !n.narrow()));
}

/// y[i] = f(x[i]), by eights.
template <class F, bool kApart>
struct MapOne {
  using Eight = EightOf<kApart>;
  Numbers x, y;
  std::int64_t n;
  F f;
  PARTITA_LANE void operator()(std::int64_t number) const {
    const Octet a = Eight::octet(x, number, n);
    Octet r;
    for (int k = 0; k < Octet::kSize; ++k) r.v[k] = f(a.v[k]);
    Eight::put(y, number, n, r);
  }
};
/// y[i] = f(x[i], z[i]).
template <class F, bool kApart>
struct MapTwo {
  using Eight = EightOf<kApart>;
  Numbers x, z, y;
  std::int64_t n;
  F f;
  PARTITA_LANE void operator()(std::int64_t number) const {
    const Raw first = Eight::raw(x, number, n), second = Eight::raw(z, number, n);
    const Octet a = octet_of(first, x.type()), b = octet_of(second, z.type());
    Octet r;
    for (int k = 0; k < Octet::kSize; ++k) r.v[k] = f(a.v[k], b.v[k]);
    Eight::put(y, number, n, r);
  }
};
template <class M, class F>
void map_one(M& m, std::int64_t n, Numbers x, Numbers y, F f) {
  if (any_wide(x, y)) {
    m.each(EightOf<true>::count(n), MapOne<F, true>{x, y, n, f});
  } else {
    m.each(EightOf<false>::count(n), MapOne<F, false>{x, y, n, f});
  }
}
template <class M, class F>
void map_two(M& m, std::int64_t n, Numbers x, Numbers z, Numbers y, F f) {
  if (any_wide(x, z, y)) {
    m.each(EightOf<true>::count(n), MapTwo<F, true>{x, z, y, n, f});
  } else {
    m.each(EightOf<false>::count(n), MapTwo<F, false>{x, z, y, n, f});
  }
}

/// f(row, first, count) of a row's octets (step 8), or of its elements (step 1).
template <class F>
struct RowPieces {
  std::int64_t pieces, step;
  F f;
  PARTITA_LANE void operator()(std::int64_t i) const { f(i / pieces, i % pieces * step, step); }
};

/// What a kernel takes of a step: by value, or, in a step that is captured, from memory where each
/// launch puts it.
template <class T>
struct Stepped {
  const T* at = nullptr;
  T value{};
  PARTITA_BOTH T operator()() const { return at != nullptr ? *at : value; }
};

/// A matrix in memory, row after row.
struct Matrix {
  Numbers at;
  std::int64_t stride = 0;  ///< from a row to the next
  std::int64_t step = 0;    ///< from a matrix of a batch to the next
  bool transposed = false;  ///< stands for its transpose
};

/// c[m, n] = alpha · a[m, k] · b[k, n] + beta · c, of each matrix of a batch. With beta 0 what c
/// held is not read. a and b are of one type, c is of theirs or fp32; sums are in fp32. `bias`, n
/// numbers of c's type, is added to each row before it is rounded; null: none.
struct Product {
  std::int64_t m = 0, n = 0, k = 0;
  Matrix a, b, c;
  std::int64_t batch = 1;
  float alpha = 1, beta = 0;
  /// Its shape is of this step alone: nothing is timed or kept for the next time.
  bool passing = false;
  Numbers bias = nullptr;
};

// -------------------------------------------------------------------------------- 8-bit numbers

/// Ties to even, beyond the format's largest that; a number that is none stays one.
PARTITA_BOTH std::uint8_t to_eight(EightBits format, float x) {
#ifdef __CUDA_ARCH__
  return format == EightBits::e4m3 ? __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)
                                   : __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
#else
  const bool wide = format == EightBits::e5m2;
  const std::uint32_t u = bits_of(x), digits = wide ? 2 : 3, cut = 23 - digits;
  const std::uint32_t bias = wide ? 15 : 7, last = (wide ? 30u : 15u) << digits | (wide ? 3u : 6u);
  const auto sign = static_cast<std::uint8_t>(u >> 24 & 0x80u);
  const std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<std::uint8_t>(sign | 0x7fu);
  if (a >= bits_of(largest(format))) return static_cast<std::uint8_t>(sign | last);
  if (a < (128 - bias) << 23) {  // subnormal: a sum that has its last bit where the result has it
    const float unit = wide ? 0x1p7f : 0x1p14f;
    return static_cast<std::uint8_t>(sign | (bits_of(float_of(a) + unit) - bits_of(unit)));
  }
  // Half a unit less what ties need.
  const std::uint32_t r = a + (1u << (cut - 1)) - 1 + (a >> cut & 1u);
  return static_cast<std::uint8_t>(sign | ((r >> cut) - ((127 - bias) << digits)));
#endif
}
PARTITA_BOTH float from_eight(EightBits format, std::uint8_t h) {
  // E5M2 is fp16's upper half.
  if (format == EightBits::e5m2) return from_fp16(static_cast<std::uint16_t>(h << 8));
  const std::uint32_t e = h >> 3 & 15u, m = h & 7u;
  const float size = e == 15 && m == 7 ? NAN
                     : e > 0           ? float_of((e + 120) << 23 | m << 20)
                                       : static_cast<float>(m) * 0x1p-9f;
  return (h & 0x80u) != 0 ? -size : size;
}

/// A matrix [rows, columns] in 8 bits, row after row of `stride` bytes, zeros beyond the columns
/// and in the rows that make `padded` of them; each number stands for itself times *inverse.
struct Eights {
  EightBits format = EightBits::e4m3;
  std::uint8_t* at = nullptr;
  const float* inverse = nullptr;
  std::int64_t rows = 0, padded = 0, columns = 0, stride = 0;
};
/// c[m, n] = a[m, k] · b[n, k]ᵀ + beta · c, sums in fp32; b's padded rows make columns of c. Not
/// both operands are E5M2.
struct EightProduct {
  Eights a, b;
  Matrix c;
  float beta = 0;
  bool passing = false;
};

enum class ConvolutionPass { forward, data, weight };

/// x [samples, in, height, width], w [out, in / groups, window_height, window_width], y [samples,
/// out, out_height, out_width]; padding is the same before and after.
struct ConvolutionShape {
  std::int64_t samples, in, height, width, out, groups, window_height, window_width, out_height,
      out_width, stride_height, stride_width, dilation_height, dilation_width;
  std::int64_t pad_height = 0, pad_width = 0;
  ElementType type = ElementType::fp32;  ///< of x, w and y
  friend auto operator<=>(const ConvolutionShape&, const ConvolutionShape&) = default;
};

PARTITA_BOTH bool finite(double x) { return x - x == 0; }
PARTITA_BOTH bool infinite(double x) { return x == x && !finite(x); }

// ------------------------------------------------------------------------------- random numbers

/// As runtime/reference/kernels.h, to the bit.
PARTITA_BOTH std::uint64_t splitmix(std::uint64_t x) {
  // https://prng.di.unimi.it/splitmix64.c
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}
PARTITA_BOTH std::uint64_t random_bits(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  return splitmix(splitmix(splitmix(seed) ^ a) ^ b);
}
/// In [0, 1).
PARTITA_BOTH double uniform(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  return static_cast<double>(random_bits(seed, a, b) >> 11) * 0x1p-53;
}
/// As reference::normal, up to the rounding of its functions.
PARTITA_BOTH double normal(std::uint64_t seed, std::uint64_t a, std::uint64_t b) {
  const std::uint64_t bits = random_bits(seed, a, b);
  const double u = static_cast<double>(bits >> 11) * 0x1p-53,
               v = static_cast<double>(splitmix(bits) >> 11) * 0x1p-53;
  return sqrt(-2 * log(1 - u)) * cos(2 * 3.14159265358979323846 * v);
}

}  // namespace partita::cuda
