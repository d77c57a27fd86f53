// models/dims.h: names of iteration dimensions, shapes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace partita {

/// What an iteration dimension of an operator, or a dimension of a tensor, runs over. Plans name
/// these: "shard head, ffn and vocabulary over tp" is Megatron's tensor parallelism.
enum class Dim : std::uint8_t {
  sample,
  sequence,      ///< tokens; in attention the query's
  key_sequence,  ///< in attention the key's and value's
  position,      ///< rows of a table of learned positions
  head,          ///< groups of attention heads that share a key and a value
  head_feature,  ///< inside one head; never split
  feature,       ///< hidden size, output channels
  ffn,           ///< width inside a feed-forward block
  reduction,     ///< summed input features or channels
  vocabulary,    ///< tokens of the vocabulary, classes of images
  classes,       ///< token types, classes of tokens: frameworks neither cut nor pad them
  expert,
  height,
  width,
};
inline constexpr int kDimCount = 14;

std::string_view name(Dim dim);
/// The dimension of that name; -1 cast never happens: throws InputError{place} listing all names.
Dim parse_dim(std::string_view text, const std::string& place);

struct NamedExtent {
  Dim dim = Dim::sample;
  std::int64_t extent = 0;
  friend bool operator==(const NamedExtent&, const NamedExtent&) = default;
};

/// Dimensions of a dense row-major tensor, outermost first. A scalar has none.
using Shape = std::vector<NamedExtent>;

std::int64_t elements(const Shape& shape);
std::string text(const Shape& shape);  ///< "[sample 4, sequence 128, feature 64]"

}  // namespace partita
