// runtime/transport/narrow.h: 16-bit numbers as they travel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/element_type.h"

namespace partita {

/// to[i] += from[i] for numbers of `type` (fp32, bf16 or fp16), rounded to it, ties to even.
void add_numbers(ElementType type, std::byte* to, const std::byte* from, std::int64_t n);

/// fp32 values as numbers of `type`, ties to even, and back.
void narrow(ElementType type, const float* from, std::byte* to, std::int64_t n);
void widen(ElementType type, const std::byte* from, float* to, std::int64_t n);

}  // namespace partita
