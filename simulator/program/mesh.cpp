#include "simulator/program/mesh.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <utility>

namespace partita {

std::int64_t Mesh::ranks() const {
  std::int64_t n = 1;
  for (const auto& atom : atoms) n *= atom.size;
  return n;
}

std::int64_t Mesh::size(AtomMask mask) const {
  std::int64_t n = 1;
  for (std::size_t i = 0; i < atoms.size(); ++i) {
    if (has(mask, static_cast<AtomId>(i))) n *= atoms[i].size;
  }
  return n;
}

std::int64_t Mesh::size(const AtomList& list) const {
  std::int64_t n = 1;
  for (const AtomId a : list) n *= atoms[a].size;
  return n;
}

std::int64_t Mesh::stride(AtomId atom) const {
  std::int64_t n = 1;
  for (std::size_t i = atom + 1u; i < atoms.size(); ++i) n *= atoms[i].size;
  return n;
}

std::int64_t Mesh::coordinate(std::int64_t rank, AtomId atom) const {
  return rank / stride(atom) % atoms[atom].size;
}

std::int64_t Mesh::coordinate(std::int64_t rank, const AtomList& list) const {
  std::int64_t c = 0;
  for (const AtomId a : list) c = c * atoms[a].size + coordinate(rank, a);
  return c;
}

std::int64_t Mesh::group_root(std::int64_t rank, AtomMask mask) const {
  for (std::size_t i = 0; i < atoms.size(); ++i) {
    const auto a = static_cast<AtomId>(i);
    if (has(mask, a)) rank -= coordinate(rank, a) * stride(a);
  }
  return rank;
}

std::vector<std::int64_t> Mesh::group(std::int64_t rank, AtomMask mask) const {
  std::vector<std::int64_t> members{group_root(rank, mask)};
  // Outermost atom first and repeats appended in order, so the result ascends only after a sort.
  for (std::size_t i = 0; i < atoms.size(); ++i) {
    const auto a = static_cast<AtomId>(i);
    if (!has(mask, a)) continue;
    const std::size_t n = members.size();
    for (std::int64_t c = 1; c < atoms[i].size; ++c) {
      for (std::size_t k = 0; k < n; ++k) members.push_back(members[k] + c * stride(a));
    }
  }
  std::sort(members.begin(), members.end());
  return members;
}

AtomMask mask_of(const AtomList& list) {
  AtomMask mask = 0;
  for (const AtomId a : list) mask = static_cast<AtomMask>(mask | bit(a));
  return mask;
}

Range part(std::int64_t extent, std::int64_t parts, std::int64_t c) {
  const std::int64_t q = extent / parts, r = extent % parts;
  const std::int64_t begin = c * q + std::min(c, r);
  return {begin, begin + q + (c < r ? 1 : 0)};
}

namespace {

/// Atom by atom, so that a gather over the last atoms yields exactly the split over the first ones.
Range block(const Mesh& mesh, const AtomList& atoms, std::size_t first, std::int64_t extent,
            std::int64_t rank) {
  Range r{0, extent};
  for (std::size_t i = first; i < atoms.size(); ++i) {
    const AtomId a = atoms[i];
    const Range p = part(r.size(), mesh.atoms[a].size, mesh.coordinate(rank, a));
    r = {r.begin + p.begin, r.begin + p.end};
  }
  return r;
}

/// The two chunks of a zigzag over the split's leading atoms.
std::pair<Range, Range> zigzag_chunks(const Mesh& mesh, const DimSplit& split, std::int64_t extent,
                                      std::int64_t rank) {
  const AtomList leading(split.atoms.begin(), split.atoms.begin() + split.zigzag);
  const std::int64_t p = mesh.size(leading), c = mesh.coordinate(rank, leading);
  return {part(extent, 2 * p, c), part(extent, 2 * p, 2 * p - 1 - c)};
}

Range window_range(const DimSplit& s, Range out, std::int64_t extent) {
  if (out.size() == 0) return {0, 0};
  const std::int64_t begin = out.begin * s.window.stride - s.window.pad_before;
  const std::int64_t end = (out.end - 1) * s.window.stride - s.window.pad_before +
                           s.window.dilation * (s.window.kernel - 1) + 1;
  const std::int64_t low = std::clamp<std::int64_t>(begin, 0, extent);
  return {low, std::clamp(end, low, extent)};
}

}  // namespace

namespace {

/// The rank whose part `rank` holds: itself unless a ring has shifted the parts.
std::int64_t origin(const Mesh& mesh, const DimSplit& split, std::int64_t rank) {
  if (split.shift == 0) return rank;
  const AtomList ring(split.atoms.begin() + split.fixed, split.atoms.end());
  const std::int64_t p = mesh.size(ring);
  std::int64_t c = ((mesh.coordinate(rank, ring) - split.shift) % p + p) % p;
  std::int64_t at = mesh.group_root(rank, mask_of(ring));
  for (std::size_t i = ring.size(); i-- > 0;) {
    const AtomId a = ring[i];
    at += c % mesh.atoms[a].size * mesh.stride(a);
    c /= mesh.atoms[a].size;
  }
  return at;
}

}  // namespace

std::optional<std::uint8_t> atoms_before(const AtomList& list, AtomMask mask) {
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (mask_of(AtomList(list.begin() + i, list.end())) == mask)
      return static_cast<std::uint8_t>(i);
  }
  return std::nullopt;
}

std::vector<Range> local_ranges(const Mesh& mesh, const DimSplit& split, std::int64_t extent,
                                std::int64_t rank) {
  rank = origin(mesh, split, rank);
  std::vector<Range> all;
  const auto append = [&](Range r) {
    if (r.size() <= 0) return;
    if (!all.empty() && all.back().end == r.begin)
      all.back().end = r.end;
    else
      all.push_back(r);
  };
  if (split.atoms.empty()) {
    append({0, extent});
  } else if (split.kind == SplitKind::window) {
    append(window_range(split, block(mesh, split.atoms, 0, split.outputs, rank), extent));
  } else if (split.zigzag > 0) {
    const auto [early, late] = zigzag_chunks(mesh, split, extent, rank);
    // Of both, as they follow each other.
    const Range mine = block(mesh, split.atoms, split.zigzag, early.size() + late.size(), rank);
    const auto shared = [&](Range chunk, std::int64_t before) {
      append({chunk.begin + std::clamp<std::int64_t>(mine.begin - before, 0, chunk.size()),
              chunk.begin + std::clamp<std::int64_t>(mine.end - before, 0, chunk.size())});
    };
    shared(early, 0);
    shared(late, early.size());
  } else {
    append(block(mesh, split.atoms, 0, extent, rank));
  }
  return all;
}

std::vector<std::int64_t> local_indices(const Mesh& mesh, const DimSplit& split,
                                        std::int64_t extent, std::int64_t rank) {
  std::vector<std::int64_t> all;
  for (const Range r : local_ranges(mesh, split, extent, rank)) {
    const std::size_t had = all.size();
    all.resize(had + static_cast<std::size_t>(r.size()));
    std::iota(all.begin() + static_cast<std::ptrdiff_t>(had), all.end(), r.begin);
  }
  return all;
}

std::int64_t local_extent(const Mesh& mesh, const DimSplit& split, std::int64_t extent,
                          std::int64_t rank) {
  rank = origin(mesh, split, rank);
  if (split.atoms.empty()) return extent;
  if (split.kind == SplitKind::window) {
    return window_range(split, block(mesh, split.atoms, 0, split.outputs, rank), extent).size();
  }
  if (split.zigzag > 0) {
    const auto [early, late] = zigzag_chunks(mesh, split, extent, rank);
    return block(mesh, split.atoms, split.zigzag, early.size() + late.size(), rank).size();
  }
  return block(mesh, split.atoms, 0, extent, rank).size();
}

std::int64_t local_elements(const Mesh& mesh, const Layout& layout, const Shape& shape, bool routed,
                            std::int64_t experts, std::int64_t rank) {
  for (std::size_t i = 0; i < mesh.atoms.size(); ++i) {
    const auto a = static_cast<AtomId>(i);
    if (has(layout.root, a) && mesh.coordinate(rank, a) != 0) return 0;
  }
  std::int64_t n = 1, divide = 1;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (routed && shape[d].dim == Dim::expert) {
      n *= shape[d].extent * local_extent(mesh, layout.dims[d], experts, rank);
      divide = experts;
    } else {
      n *= local_extent(mesh, layout.dims[d], shape[d].extent, rank);
    }
  }
  n = ceil_div(n, divide);
  if (!layout.flat.empty()) n = block(mesh, layout.flat, 0, n, rank).size();
  return n;
}

AtomMask split_atoms(const Layout& layout) {
  AtomMask mask = mask_of(layout.flat);
  for (const auto& d : layout.dims) mask = static_cast<AtomMask>(mask | mask_of(d.atoms));
  return mask;
}

std::string text(const Mesh& mesh, const Layout& layout, const Shape& shape) {
  const auto names = [&](const AtomList& list) {
    std::string s;
    for (const AtomId a : list) s += (s.empty() ? "" : "*") + mesh.atoms[a].name;
    return s;
  };
  std::string out = "[";
  for (std::size_t i = 0; i < layout.dims.size(); ++i) {
    if (i > 0) out += ", ";
    out += i < shape.size() ? name(shape[i].dim) : "?";
    const auto& d = layout.dims[i];
    if (d.atoms.empty()) continue;
    out += "/" + names(d.atoms);
    if (d.zigzag > 0) out += " zigzag";
    if (d.kind == SplitKind::window) out += fmt::format(" window {}", d.window.kernel);
  }
  out += "]";
  if (!layout.flat.empty()) out += " flat " + names(layout.flat);
  for (std::size_t i = 0; i < mesh.atoms.size(); ++i) {
    if (has(layout.partial, static_cast<AtomId>(i))) out += " partial " + mesh.atoms[i].name;
    if (has(layout.root, static_cast<AtomId>(i))) out += " root " + mesh.atoms[i].name;
  }
  return out;
}

}  // namespace partita
