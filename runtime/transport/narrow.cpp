#include "runtime/transport/narrow.h"

#include <Eigen/Core>
#include <type_traits>

#include "base/error.h"

namespace partita {
namespace {

/// Calls f(T{}) with the C++ type of `type`.
template <class F>
void with_type(ElementType type, F f) {
  if (type == ElementType::bf16) {
    f(Eigen::bfloat16{});
  } else if (type == ElementType::fp16) {
    f(Eigen::half{});
  } else {
    PARTITA_ASSERT(type == ElementType::fp32, std::string(name(type)));
    f(float{});
  }
}

}  // namespace

void add_numbers(ElementType type, std::byte* to, const std::byte* from, std::int64_t n) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    auto* a = reinterpret_cast<T*>(to);
    const auto* b = reinterpret_cast<const T*>(from);
    for (std::int64_t i = 0; i < n; ++i)
      a[i] = static_cast<T>(static_cast<float>(a[i]) + static_cast<float>(b[i]));
  });
}

void narrow(ElementType type, const float* from, std::byte* to, std::int64_t n) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    auto* out = reinterpret_cast<T*>(to);
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[i]);
  });
}

void widen(ElementType type, const std::byte* from, float* to, std::int64_t n) {
  with_type(type, [&](auto zero) {
    const auto* in = reinterpret_cast<const decltype(zero)*>(from);
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(in[i]);
  });
}

}  // namespace partita
