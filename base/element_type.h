// base/element_type.h: the number formats of tensors and of matrix units.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
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
/// infinity. fp8 (E4M3) and int8: scaled so that the largest of the `count` values fits. mxfp8:
/// E4M3 with a power-of-two scale per 32 values (OCP Microscaling v1.0, section 6.3); nvfp4: E2M1
/// with an E4M3 scale per 16 values and one fp32 scale for all.
void round_values(ElementType type, double* values, std::size_t count);

}  // namespace partita
