// base/units.h: the only place in the project where units meet numbers.
#pragma once

#include <compare>
#include <cstdint>

namespace partita {

/// A number that knows its unit. Values are always in the base unit that the alias names
/// (bytes, seconds, bytes per second); prefixes exist only in literals and in text.
/// Construction is explicit; the operators below are the complete list of products that
/// mean something physically, each checked by a hand-computed case in tests/base.
template <class Unit, class Rep>
struct Quantity {
  Rep count{};

  constexpr Quantity() = default;
  constexpr explicit Quantity(Rep base_units) : count{base_units} {}

  friend constexpr auto operator<=>(const Quantity&, const Quantity&) = default;
  friend constexpr Quantity operator+(Quantity a, Quantity b) {
    return Quantity{a.count + b.count};
  }
  friend constexpr Quantity operator-(Quantity a, Quantity b) {
    return Quantity{a.count - b.count};
  }
  friend constexpr Quantity operator*(Rep k, Quantity q) { return Quantity{k * q.count}; }
  friend constexpr Quantity& operator+=(Quantity& a, Quantity b) { return a = a + b; }
  friend constexpr Quantity& operator-=(Quantity& a, Quantity b) { return a = a - b; }
};

using Bytes = Quantity<struct ByteUnit, std::int64_t>;  ///< Exact; 8 EiB is enough for any rank.
using Flops = Quantity<struct FlopUnit, double>;        ///< Operations; exact up to 2^53.
using Seconds = Quantity<struct SecondUnit, double>;    ///< Cost formulas.
using Ticks = Quantity<struct TickUnit, std::int64_t>;  ///< Picoseconds; event time, ±106 days.
using BytesPerSecond = Quantity<struct ByteRateUnit, double>;
using FlopsPerSecond = Quantity<struct FlopRateUnit, double>;

constexpr Seconds operator/(Bytes n, BytesPerSecond rate) {
  return Seconds{static_cast<double>(n.count) / rate.count};
}
constexpr BytesPerSecond operator/(Bytes n, Seconds t) {
  return BytesPerSecond{static_cast<double>(n.count) / t.count};
}
constexpr Seconds operator/(Flops n, FlopsPerSecond rate) { return Seconds{n.count / rate.count}; }
constexpr FlopsPerSecond operator/(Flops n, Seconds t) { return FlopsPerSecond{n.count / t.count}; }
constexpr double operator/(Seconds a, Seconds b) { return a.count / b.count; }
constexpr double operator/(BytesPerSecond a, BytesPerSecond b) { return a.count / b.count; }
constexpr double operator/(FlopsPerSecond a, FlopsPerSecond b) { return a.count / b.count; }

/// Smallest part size such that `parts` parts cover `n`. Requires n >= 0 and parts >= 1.
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t parts) {
  return n / parts + (n % parts != 0);
}
constexpr Bytes ceil_div(Bytes n, std::int64_t parts) { return Bytes{ceil_div(n.count, parts)}; }

/// Whole picoseconds that cover `t` >= 0, rounded up once; InputError from 106 days on.
Ticks to_ticks(Seconds t);
constexpr Seconds to_seconds(Ticks t) { return Seconds{static_cast<double>(t.count) * 1e-12}; }

inline namespace literals {
consteval Bytes operator""_B(unsigned long long n) { return Bytes{static_cast<std::int64_t>(n)}; }
consteval Bytes operator""_KiB(unsigned long long n) {
  return Bytes{static_cast<std::int64_t>(n) << 10};
}
consteval Bytes operator""_MiB(unsigned long long n) {
  return Bytes{static_cast<std::int64_t>(n) << 20};
}
consteval Bytes operator""_GiB(unsigned long long n) {
  return Bytes{static_cast<std::int64_t>(n) << 30};
}
consteval Bytes operator""_GB(unsigned long long n) {
  return Bytes{static_cast<std::int64_t>(n) * 1'000'000'000};
}
consteval Seconds operator""_s(long double t) { return Seconds{static_cast<double>(t)}; }
consteval Seconds operator""_us(long double t) { return Seconds{static_cast<double>(t * 1e-6L)}; }
consteval BytesPerSecond operator""_GBps(long double r) {
  return BytesPerSecond{static_cast<double>(r * 1e9L)};
}
consteval FlopsPerSecond operator""_TFLOPps(long double r) {
  return FlopsPerSecond{static_cast<double>(r * 1e12L)};
}
}  // namespace literals

}  // namespace partita
