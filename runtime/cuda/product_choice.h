// runtime/cuda/product_choice.h: which of cuBLASLt's algorithms a product is computed by.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <string>

#include "base/element_type.h"

namespace partita::cuda {

struct ProductOptions {
  bool tf32 = false;  ///< fp32 products in TF32
  /// Times so many of the heuristic's candidates where a product comes first; 1: takes its first.
  int candidates = 4;
};

/// All that the choice depends on.
struct ProductKey {
  std::int64_t m = 0, n = 0, k = 0, batch = 0, a_stride = 0, b_stride = 0, c_stride = 0, a_step = 0,
               b_step = 0, c_step = 0;
  ElementType type = ElementType::fp32, sum = ElementType::fp32;   ///< of a and b; of c
  EightBits a_eight = EightBits::e4m3, b_eight = EightBits::e4m3;  ///< of type fp8
  bool a_transposed = false, b_transposed = false, adds = false, biased = false;
  int a_alignment = 0, b_alignment = 0, c_alignment = 0;  ///< bytes, at most 256
  friend auto operator<=>(const ProductKey&, const ProductKey&) = default;
};

struct ProductChoice {
  cublasLtMatmulAlgo_t algorithm;
  std::size_t workspace = 0;
  int id = -1, candidates = 0, taken = 0;  ///< cuBLASLt's number; how many were timed, which it was
  double seconds = 0;                      ///< as timed; 0: not
};

}  // namespace partita::cuda
