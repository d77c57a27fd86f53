// base/ids.h: strong ids, dense from 0, that index vectors.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace partita {

template <class Tag>
struct Id {
  std::int32_t value = -1;

  constexpr Id() = default;
  constexpr explicit Id(std::size_t index) : value(static_cast<std::int32_t>(index)) {}
  constexpr std::size_t index() const { return static_cast<std::size_t>(value); }
  constexpr bool valid() const { return value >= 0; }
  friend constexpr auto operator<=>(const Id&, const Id&) = default;
};

}  // namespace partita

template <class Tag>
struct std::hash<partita::Id<Tag>> {
  std::size_t operator()(const partita::Id<Tag>& id) const noexcept {
    return std::hash<std::int32_t>{}(id.value);
  }
};
