#include "base/element_type.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
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
  std::string word(text);
  std::transform(word.begin(), word.end(), word.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  if (word == "float32" || word == "float") return ElementType::fp32;
  if (word == "bfloat16") return ElementType::bf16;
  if (word == "float16" || word == "half") return ElementType::fp16;
  std::vector<std::string> known;
  for (const ElementType type : kElementTypes) {
    if (word == name(type)) return type;
    known.emplace_back(name(type));
  }
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

}  // namespace partita
