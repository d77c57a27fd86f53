#include "base/element_type.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <limits>
#include <vector>

#include "base/error.h"
#include "base/yaml.h"

namespace partita {

std::string_view name(ElementType type) {
  switch (type) {
    case ElementType::fp32:
      return "fp32";
    case ElementType::tf32:
      return "tf32";
    case ElementType::bf16:
      return "bf16";
    case ElementType::fp16:
      return "fp16";
    case ElementType::fp8:
      return "fp8";
    case ElementType::mxfp8:
      return "mxfp8";
    case ElementType::nvfp4:
      return "nvfp4";
    case ElementType::int8:
      return "int8";
  }
  PARTITA_ASSERT(false, fmt::format("element type {}", static_cast<int>(type)));
}

ElementType parse_element_type(std::string_view text, const std::string& place) {
  return parse_element_type(text, place, kElementTypes);
}

ElementType parse_element_type(std::string_view text, const std::string& place,
                               std::span<const ElementType> choices) {
  std::string word(text);
  std::transform(word.begin(), word.end(), word.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (word == "float32" || word == "float") return ElementType::fp32;
  if (word == "bfloat16") return ElementType::bf16;
  if (word == "float16" || word == "half") return ElementType::fp16;
  for (const ElementType type : kElementTypes) {
    if (word == name(type)) return type;
  }
  std::vector<std::string> known;
  for (const ElementType type : choices) known.emplace_back(name(type));
  throw InputError(place, fmt::format("unknown element type '{}'; use one of {}{}", text,
                                      fmt::join(known, ", "), did_you_mean(word, known)));
}

int bits(ElementType type) {
  switch (type) {
    case ElementType::fp32:
    case ElementType::tf32:
      return 32;
    case ElementType::bf16:
    case ElementType::fp16:
      return 16;
    case ElementType::fp8:
    case ElementType::mxfp8:
    case ElementType::int8:
      return 8;
    case ElementType::nvfp4:
      return 4;
  }
  PARTITA_ASSERT(false, fmt::format("element type {}", static_cast<int>(type)));
}

Bytes storage(ElementType type, std::int64_t elements) {
  PARTITA_ASSERT(elements >= 0, fmt::format("{} elements", elements));
  std::int64_t bytes = type == ElementType::nvfp4 ? ceil_div(elements, std::int64_t{2})
                                                  : elements * (bits(type) / 8);
  if (type == ElementType::mxfp8) bytes += ceil_div(elements, std::int64_t{32});
  if (type == ElementType::nvfp4) bytes += ceil_div(elements, std::int64_t{16});
  return Bytes{bytes};
}

namespace {

/// A binary format: digits of the significand, smallest normal exponent, largest value.
struct Format {
  int digits, lowest;
  double largest;
};
constexpr Format kFp32{24, -126, 0x1.fffffep127}, kTf32{11, -126, 0x1.ffcp127},
    kBf16{8, -126, 0x1.fep127}, kFp16{11, -14, 65504}, kE4M3{4, -6, 448}, kE5M2{3, -14, 57344},
    kE2M1{2, 0, 6};

double rounded(const Format& f, double x, bool saturates) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), f.lowest);
  const double step = std::ldexp(1.0, exponent - f.digits + 1);
  const double y = std::nearbyint(x / step) * step;
  if (std::abs(y) <= f.largest) return y;
  return std::copysign(saturates ? f.largest : std::numeric_limits<double>::infinity(), x);
}

double largest_of(const double* values, std::size_t count) {
  double m = 0;
  for (std::size_t i = 0; i < count; ++i) m = std::max(m, std::abs(values[i]));
  return m;
}

void round_scaled(const Format& f, double scale, double* values, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) values[i] = rounded(f, values[i] / scale, true) * scale;
}

}  // namespace

double spacing(ElementType type) {
  switch (type) {
    case ElementType::fp32:
      return 0x1p-23;
    case ElementType::tf32:
    case ElementType::fp16:
      return 0x1p-10;
    case ElementType::bf16:
      return 0x1p-7;
    case ElementType::fp8:
    case ElementType::mxfp8:
      return 0x1p-3;
    case ElementType::nvfp4:
      return 0x1p-1;
    case ElementType::int8:
      return 1.0 / 127;
  }
  PARTITA_ASSERT(false, fmt::format("element type {}", static_cast<int>(type)));
}

void round_values(ElementType type, double* values, std::size_t count) {
  const auto plain = [&](const Format& f) {
    for (std::size_t i = 0; i < count; ++i) values[i] = rounded(f, values[i], false);
  };
  const double all = largest_of(values, count);
  if (all == 0 || (!std::isfinite(all) && type != ElementType::fp8)) return;
  switch (type) {
    case ElementType::fp32:
      return plain(kFp32);
    case ElementType::tf32:
      return plain(kTf32);
    case ElementType::bf16:
      return plain(kBf16);
    case ElementType::fp16:
      return plain(kFp16);
    case ElementType::fp8:
      return round_eights(EightBits::e4m3, values, count);
    case ElementType::int8:
      for (std::size_t i = 0; i < count; ++i)
        values[i] = std::nearbyint(values[i] / all * 127) * all / 127;
      return;
    case ElementType::mxfp8:
      for (std::size_t i = 0; i < count; i += 32) {
        const std::size_t n = std::min<std::size_t>(32, count - i);
        const double m = largest_of(values + i, n);
        if (m > 0) round_scaled(kE4M3, std::ldexp(1.0, std::ilogb(m) - 8), values + i, n);
      }
      return;
    case ElementType::nvfp4: {
      const double whole = all / (kE2M1.largest * kE4M3.largest);
      for (std::size_t i = 0; i < count; i += 16) {
        const std::size_t n = std::min<std::size_t>(16, count - i);
        const double m = largest_of(values + i, n);
        const double scale = rounded(kE4M3, m / kE2M1.largest / whole, true) * whole;
        if (scale > 0) {
          round_scaled(kE2M1, scale, values + i, n);
        } else {
          std::fill(values + i, values + i + n, 0.0);
        }
      }
      return;
    }
  }
}

void round_eights(EightBits format, double* values, std::size_t count) {
  const Format& f = format == EightBits::e4m3 ? kE4M3 : kE5M2;
  const float scale = scale_of(format, static_cast<float>(largest_of(values, count)));
  const float inverse = 1 / scale;
  for (std::size_t i = 0; i < count; ++i) {
    const auto scaled = static_cast<double>(static_cast<float>(values[i]) * scale);
    const double code =
        std::isinf(scaled) ? std::copysign(f.largest, scaled) : rounded(f, scaled, true);
    values[i] = code * static_cast<double>(inverse);
  }
}

std::string_view name(Fp8Format format) {
  switch (format) {
    case Fp8Format::hybrid:
      return "hybrid";
    case Fp8Format::e4m3:
      return "e4m3";
  }
  PARTITA_ASSERT(false, fmt::format("fp8 format {}", static_cast<int>(format)));
}

Fp8Format parse_fp8_format(std::string_view text, const std::string& place) {
  std::vector<std::string> known;
  for (const Fp8Format format : kFp8Formats) {
    if (text == name(format)) return format;
    known.emplace_back(name(format));
  }
  throw InputError(place, fmt::format("'{}' is no format of products in fp8{}; use hybrid (E4M3, "
                                      "output gradients in E5M2) or e4m3",
                                      text, did_you_mean(std::string(text), known)));
}

}  // namespace partita
