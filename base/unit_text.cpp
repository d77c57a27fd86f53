#include "base/unit_text.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <span>

#include "base/error.h"

namespace partita {
namespace {

struct UnitName {
  std::string_view name;
  double factor;
};

constexpr std::array kByteUnits{
    UnitName{"B", 1},
    UnitName{"kB", 1e3},
    UnitName{"KB", 1e3},
    UnitName{"MB", 1e6},
    UnitName{"GB", 1e9},
    UnitName{"TB", 1e12},
    UnitName{"PB", 1e15},
    UnitName{"KiB", 1024.0},
    UnitName{"MiB", 1048576.0},
    UnitName{"GiB", 1073741824.0},
    UnitName{"TiB", 1099511627776.0},
};
constexpr std::array kTimeUnits{
    UnitName{"s", 1},     UnitName{"ms", 1e-3},  UnitName{"us", 1e-6}, UnitName{"µs", 1e-6},
    UnitName{"ns", 1e-9}, UnitName{"ps", 1e-12}, UnitName{"min", 60},  UnitName{"h", 3600},
};
constexpr std::array kByteRateUnits{
    UnitName{"B/s", 1},
    UnitName{"kB/s", 1e3},
    UnitName{"MB/s", 1e6},
    UnitName{"GB/s", 1e9},
    UnitName{"TB/s", 1e12},
    UnitName{"KiB/s", 1024.0},
    UnitName{"MiB/s", 1048576.0},
    UnitName{"GiB/s", 1073741824.0},
    UnitName{"TiB/s", 1099511627776.0},
    UnitName{"Mb/s", 1e6 / 8},
    UnitName{"Gb/s", 1e9 / 8},
    UnitName{"Tb/s", 1e12 / 8},
};
constexpr std::array kFlopRateUnits{
    UnitName{"FLOP/s", 1},     UnitName{"MFLOP/s", 1e6},  UnitName{"GFLOP/s", 1e9},
    UnitName{"TFLOP/s", 1e12}, UnitName{"PFLOP/s", 1e15}, UnitName{"EFLOP/s", 1e18},
};

std::string_view trimmed(std::string_view s) {
  const auto first = s.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return s.substr(first, s.find_last_not_of(" \t") - first + 1);
}

std::string names_of(std::span<const UnitName> units) {
  std::string all;
  for (const auto& unit : units) all += (all.empty() ? "" : ", ") + std::string(unit.name);
  return all;
}

double parse(std::string_view whole, std::span<const UnitName> units, const char* what,
             const char* example, bool zero_allowed, const std::string& place) {
  const std::string_view body = trimmed(whole);
  double number = 0;
  const auto [end, error] = std::from_chars(body.data(), body.data() + body.size(), number);
  if (error != std::errc{} || !std::isfinite(number)) {
    throw InputError(place, fmt::format("'{}' is not {}; write a number and a unit, like \"{}\"",
                                        whole, what, example));
  }
  const std::string_view unit = trimmed(body.substr(static_cast<std::size_t>(end - body.data())));
  if (unit.empty()) {
    throw InputError(place, fmt::format("'{}' has no unit; write {} with one of {}, like \"{}\"",
                                        whole, what, names_of(units), example));
  }
  for (const auto& candidate : units) {
    if (candidate.name != unit) continue;
    if (number < 0 || (number == 0 && !zero_allowed)) {
      throw InputError(place, fmt::format("'{}' must be {} 0", whole, zero_allowed ? ">=" : ">"));
    }
    // 1.5 us: dividing by the inverse keeps 1.5e-6 exact where multiplying would not.
    return candidate.factor < 1 ? number / std::round(1 / candidate.factor)
                                : number * candidate.factor;
  }
  throw InputError(place, fmt::format("'{}' has unknown unit '{}'; {} takes {}, like \"{}\"", whole,
                                      unit, what, names_of(units), example));
}

std::string scaled(double value, std::span<const UnitName> ascending) {
  const UnitName* best = &ascending.front();
  for (const auto& unit : ascending) {
    if (std::abs(value) >= unit.factor) best = &unit;
  }
  return fmt::format("{:.4g} {}", value / best->factor, best->name);
}

}  // namespace

Bytes parse_bytes(std::string_view t, const std::string& place) {
  const double n = parse(t, kByteUnits, "a size", "80 GiB", true, place);
  if (n > 9e18) throw InputError(place, fmt::format("'{}' is too large; at most 8 EiB", t));
  // 64.4 MB is 64,400,000 B, though 64.4 * 1e6 rounds past it.
  const double whole = std::round(n);
  if (std::abs(n - whole) > 4e-16 * n)
    throw InputError(place, fmt::format("'{}' is not a whole number of bytes", t));
  return Bytes{static_cast<std::int64_t>(whole)};
}
Seconds parse_seconds(std::string_view t, const std::string& place) {
  return Seconds{parse(t, kTimeUnits, "a time", "1.5 us", true, place)};
}
BytesPerSecond parse_byte_rate(std::string_view t, const std::string& place) {
  return BytesPerSecond{parse(t, kByteRateUnits, "a bandwidth", "450 GB/s", false, place)};
}
FlopsPerSecond parse_flop_rate(std::string_view t, const std::string& place) {
  return FlopsPerSecond{parse(t, kFlopRateUnits, "a compute rate", "989 TFLOP/s", false, place)};
}

std::string text(Bytes n) {
  constexpr std::array units{UnitName{"B", 1}, UnitName{"KiB", 1024.0}, UnitName{"MiB", 1048576.0},
                             UnitName{"GiB", 1073741824.0}, UnitName{"TiB", 1099511627776.0}};
  return scaled(static_cast<double>(n.count), units);
}
std::string text(Seconds t) {
  constexpr std::array units{UnitName{"ps", 1e-12}, UnitName{"ns", 1e-9}, UnitName{"us", 1e-6},
                             UnitName{"ms", 1e-3}, UnitName{"s", 1}};
  return t.count == 0 ? "0 s" : scaled(t.count, units);
}
std::string text(BytesPerSecond r) {
  constexpr std::array units{UnitName{"B/s", 1}, UnitName{"kB/s", 1e3}, UnitName{"MB/s", 1e6},
                             UnitName{"GB/s", 1e9}, UnitName{"TB/s", 1e12}};
  return scaled(r.count, units);
}
std::string text(FlopsPerSecond r) {
  constexpr std::array units{UnitName{"FLOP/s", 1}, UnitName{"MFLOP/s", 1e6},
                             UnitName{"GFLOP/s", 1e9}, UnitName{"TFLOP/s", 1e12},
                             UnitName{"PFLOP/s", 1e15}};
  return scaled(r.count, units);
}
std::string text(Flops n) {
  constexpr std::array units{UnitName{"FLOP", 1},     UnitName{"MFLOP", 1e6},
                             UnitName{"GFLOP", 1e9},  UnitName{"TFLOP", 1e12},
                             UnitName{"PFLOP", 1e15}, UnitName{"EFLOP", 1e18}};
  return scaled(n.count, units);
}

std::string exact_text(Bytes n) { return fmt::format("{} B", n.count); }
std::string exact_text(Seconds t) { return fmt::format("{} s", t.count); }
std::string exact_text(BytesPerSecond r) { return fmt::format("{} B/s", r.count); }
std::string exact_text(FlopsPerSecond r) { return fmt::format("{} FLOP/s", r.count); }

std::string grouped(long long n) {
  std::string digits = fmt::format("{}", n < 0 ? -n : n);
  for (auto at = static_cast<long>(digits.size()) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<std::size_t>(at), ",");
  }
  return n < 0 ? "-" + digits : digits;
}

}  // namespace partita
