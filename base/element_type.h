// base/element_type.h: the number formats of tensors and of matrix units.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>

#include "base/units.h"

namespace partita {

/// tf32 is a format of matrix units only: it is stored as fp32. mxfp8 and nvfp4 are block formats
/// whose elements share a scale (OCP Microscaling v1.0; NVIDIA's NVFP4).
enum class ElementType { fp32, tf32, bf16, fp16, fp8, mxfp8, nvfp4, int8 };

inline constexpr std::array<ElementType, 8> kElementTypes = {
    ElementType::fp32, ElementType::tf32,  ElementType::bf16,  ElementType::fp16,
    ElementType::fp8,  ElementType::mxfp8, ElementType::nvfp4, ElementType::int8};

/// "bf16": the name in files and flags.
std::string_view name(ElementType type);

/// Throws InputError{place, ...} with the known names. Accepts "float32", "bfloat16", "half" too.
ElementType parse_element_type(std::string_view text, const std::string& place);
/// The same; a message offers `choices` only.
ElementType parse_element_type(std::string_view text, const std::string& place,
                               std::span<const ElementType> choices);

/// Bits of one stored element, without its share of a block's scale.
int bits(ElementType type);

/// Has a tensor a scale, beside any that its blocks have?
inline bool has_tensor_scale(ElementType type) {
  return type == ElementType::fp8 || type == ElementType::nvfp4;
}

/// Storage of `elements` elements, rounded up to whole bytes, scales included: mxfp8 one byte per
/// 32 elements, nvfp4 one byte per 16 (its scale per tensor is not counted). Requires elements >=
/// 0.
Bytes storage(ElementType type, std::int64_t elements);

/// Distance from 1 to the next number of the format, 2^-23 for fp32: twice the largest relative
/// error of rounding to nearest.
double spacing(ElementType type);

/// Rounds values to the format, ties to even. fp32, tf32, bf16, fp16: as they are, overflow to
/// infinity. fp8: round_eights of E4M3. int8: scaled so that the largest of the `count` values
/// fits. mxfp8: E4M3 with a power-of-two scale per 32 values (OCP Microscaling v1.0, section 6.3);
/// nvfp4: E2M1 with an E4M3 scale per 16 values and one fp32 scale for all.
void round_values(ElementType type, double* values, std::size_t count);

/// The 8-bit binary formats (OCP 8-bit Floating Point Specification v1.0): 4 bits of exponent and 3
/// digits after the first, without infinities; 5 and 2, fp16's upper half.
enum class EightBits : std::uint8_t { e4m3, e5m2 };
constexpr float largest(EightBits format) { return format == EightBits::e4m3 ? 448 : 57344; }
/// Twice the largest relative error of what is rounded to a normal number.
constexpr double spacing(EightBits format) { return format == EightBits::e4m3 ? 0x1p-3 : 0x1p-2; }
/// What a tensor whose largest size is `amax` is multiplied by, in fp32, before it is rounded: its
/// largest becomes the format's. 1 where that is 0 or infinite. (Transformer Engine's current
/// scaling: common/recipe/recipe_common.cuh, compute_scale_from_amax, and current_scaling.cu.)
constexpr float scale_of(EightBits format, float amax) {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (!(amax > 0 && amax <= kMost)) return 1;
  const float scale = largest(format) / amax;
  return scale <= kMost ? scale : kMost;
}
/// Rounds each value times scale_of the largest, a product in fp32, ties to even, beyond the
/// format's largest to that, and divides by the scale (times its fp32 inverse). What is no number
/// stays none, and is no largest. The values are read as fp32.
void round_eights(EightBits format, double* values, std::size_t count);

/// What products in fp8 take operands in (Transformer Engine, common/recipe, Format): E4M3, output
/// gradients in E5M2; or E4M3 all.
enum class Fp8Format : std::uint8_t { hybrid, e4m3 };
inline constexpr std::array<Fp8Format, 2> kFp8Formats = {Fp8Format::hybrid, Fp8Format::e4m3};
/// "hybrid": the name in files.
std::string_view name(Fp8Format format);
/// Throws InputError{place, ...} with the known names.
Fp8Format parse_fp8_format(std::string_view text, const std::string& place);
constexpr EightBits of_gradients(Fp8Format format) {
  return format == Fp8Format::hybrid ? EightBits::e5m2 : EightBits::e4m3;
}

}  // namespace partita
