// What ranks agree on: which of cuBLASLt's algorithms all take (docs/cuda.md).
#include "runtime/cuda/product_choice.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/error.h"

namespace partita::cuda {
namespace {

// cuBLASLt's algorithms may be kept as their bytes and taken again, by the same version of it.
static_assert(std::is_trivially_copyable_v<ProductKey> &&
              std::is_trivially_copyable_v<ProductChoice>);
constexpr std::size_t kEntry = sizeof(ProductKey) + sizeof(ProductChoice);

struct Told {
  std::string library;
  std::vector<std::pair<ProductKey, ProductChoice>> choices;
};

Told read(const std::string& text) {
  Told t;
  const std::size_t end = text.find('\n');
  PARTITA_ASSERT(end != std::string::npos && (text.size() - end - 1) % kEntry == 0,
                 "what a rank told of its products");
  t.library = text.substr(0, end);
  for (std::size_t at = end + 1; at < text.size(); at += kEntry) {
    auto& [key, choice] = t.choices.emplace_back();
    std::memcpy(static_cast<void*>(&key), text.data() + at, sizeof key);
    std::memcpy(static_cast<void*>(&choice), text.data() + at + sizeof key, sizeof choice);
  }
  return t;
}

}  // namespace

ProductKey least_aligned(ProductKey one, const ProductKey& other) {
  one.a_alignment = std::min(one.a_alignment, other.a_alignment);
  one.b_alignment = std::min(one.b_alignment, other.b_alignment);
  one.c_alignment = std::min(one.c_alignment, other.c_alignment);
  one.bias_alignment = std::min(one.bias_alignment, other.bias_alignment);
  return one;
}

std::string told(const std::string& library, const ProductChoices& choices) {
  std::string text = library + '\n';
  for (const auto& [key, choice] : choices) {
    text.append(reinterpret_cast<const char*>(&key), sizeof key);
    text.append(reinterpret_cast<const char*>(&choice), sizeof choice);
  }
  return text;
}

std::string common(const std::vector<std::string>& of_ranks) {
  std::vector<Told> all;
  for (const std::string& text : of_ranks) {
    if (!text.empty()) all.push_back(read(text));
    if (all.size() > 1 && all.back().library != all.front().library) return {};
  }
  std::map<ProductKind, ProductKey> least;
  for (const Told& t : all) {
    for (const auto& [key, choice] : t.choices) {
      ProductKey& l = least.try_emplace(ProductKind(key), key).first->second;
      l = least_aligned(l, key);
    }
  }
  ProductChoices taken;
  for (const Told& t : all) {
    for (const auto& [key, choice] : t.choices) {
      if (choice.candidates > 1 && key == least.at(ProductKind(key))) taken.emplace(key, choice);
    }
  }
  return all.empty() ? std::string() : told(all.front().library, taken);
}

AgreedChoices agreed_choices(const std::string& told) {
  AgreedChoices all;
  if (told.empty()) return all;
  for (const auto& [key, choice] : read(told).choices)
    all.insert_or_assign(ProductKind(key), AgreedChoice{key, choice});
  return all;
}

}  // namespace partita::cuda
