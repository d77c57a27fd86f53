// runtime/cuda/product_choice.h: which of cuBLASLt's algorithms a product is computed by.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/element_type.h"

namespace partita::cuda {

struct ProductOptions {
  bool tf32 = false;  ///< fp32 products in TF32
  /// So many of the heuristic's candidates are timed after the first step, in which its first is
  /// taken, as it is for good where this is 1.
  int candidates = 4;
};

/// All that the choice depends on.
struct ProductKey {
  std::int64_t m = 0, n = 0, k = 0, batch = 0, a_stride = 0, b_stride = 0, c_stride = 0, a_step = 0,
               b_step = 0, c_step = 0;
  ElementType type = ElementType::fp32, sum = ElementType::fp32;   ///< of a and b; of c
  EightBits a_eight = EightBits::e4m3, b_eight = EightBits::e4m3;  ///< of type fp8
  bool a_transposed = false, b_transposed = false, adds = false, biased = false;
  /// Bytes, at most 256; without a bias its is 0.
  int a_alignment = 0, b_alignment = 0, c_alignment = 0, bias_alignment = 0;
  friend auto operator<=>(const ProductKey&, const ProductKey&) = default;
};

/// The same but for how operands are aligned, which is each rank's own.
struct ProductKind : ProductKey {
  explicit ProductKind(const ProductKey& key) : ProductKey(key) {
    a_alignment = b_alignment = c_alignment = bias_alignment = 0;
  }
};
/// An algorithm for operands aligned as `least` says does for those of `key`.
inline bool as_aligned(const ProductKey& key, const ProductKey& least) {
  return key.a_alignment >= least.a_alignment && key.b_alignment >= least.b_alignment &&
         key.c_alignment >= least.c_alignment && key.bias_alignment >= least.bias_alignment;
}

/// The same product, each operand aligned as in the one where it is less so.
ProductKey least_aligned(ProductKey one, const ProductKey& other);

struct ProductChoice {
  cublasLtMatmulAlgo_t algorithm;
  std::size_t workspace = 0;
  int id = -1, candidates = 0, taken = 0;  ///< cuBLASLt's number; how many were timed, which it was
  double seconds = 0;                      ///< as timed; 0: not
  double seconds_of_usual = 0;             ///< of the fastest of the first kUsual
  static constexpr int kUsual = 4;
};
using ProductChoices = std::map<ProductKey, ProductChoice>;

/// What ranks agreed on: for operands aligned as `least`, or better.
struct AgreedChoice {
  ProductKey least;
  ProductChoice choice;
};
using AgreedChoices = std::map<ProductKind, AgreedChoice>;

/// As text that another process reads; `library`: its version and its GPU.
std::string told(const std::string& library, const ProductChoices& choices);
/// Of what the ranks told, in their order, what all of them can take, told alike: of products that
/// differ in alignment alone the first that was timed with the least alignment of all. Empty where
/// their libraries or GPUs are not the same.
std::string common(const std::vector<std::string>& of_ranks);
AgreedChoices agreed_choices(const std::string& told);

}  // namespace partita::cuda
