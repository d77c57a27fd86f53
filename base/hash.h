// base/hash.h: hashes for colours: equal things hash alike on every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

namespace partita {

/// Order matters; for multisets add mixed values up.
inline std::uint64_t mix(std::uint64_t h, std::uint64_t x) {
  h ^= x + 0x9e3779b97f4a7c15ull + (h << 6) + (h >> 2);
  h *= 0xff51afd7ed558ccdull;
  return h ^ (h >> 33);
}

/// Numbers equal hashes alike, densely and in the order of first appearance; returns how many there
/// are.
inline std::size_t number_densely(const std::vector<std::uint64_t>& hashes,
                                  std::vector<std::int32_t>& into) {
  std::unordered_map<std::uint64_t, std::int32_t> known;
  into.resize(hashes.size());
  for (std::size_t k = 0; k < hashes.size(); ++k)
    into[k] = known.try_emplace(hashes[k], static_cast<std::int32_t>(known.size())).first->second;
  return known.size();
}

}  // namespace partita
