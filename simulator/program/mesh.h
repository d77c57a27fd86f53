// simulator/program/mesh.h: the ranks as a product of atoms, and what a rank holds of a tensor.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "models/operators.h"

namespace partita {

using AtomId = std::uint8_t;
/// Set of atoms; bit i is atom i. A mesh has at most 16 atoms.
using AtomMask = std::uint16_t;

/// A short list of atoms held in place: layouts are copied by the hundred thousand.
class AtomList {
 public:
  using value_type = AtomId;
  using iterator = AtomId*;
  using const_iterator = const AtomId*;
  AtomList() = default;
  AtomList(std::initializer_list<AtomId> list) { assign(list.begin(), list.end()); }
  template <class It>
  AtomList(It first, It last) {
    assign(first, last);
  }
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  AtomId operator[](std::size_t i) const { return atoms_[i]; }
  AtomId& operator[](std::size_t i) { return atoms_[i]; }
  AtomId back() const { return atoms_[size_ - 1u]; }
  const_iterator begin() const { return atoms_.data(); }
  const_iterator end() const { return atoms_.data() + size_; }
  iterator begin() { return atoms_.data(); }
  iterator end() { return atoms_.data() + size_; }
  void clear() { size_ = 0; }
  void push_back(AtomId a) {
    PARTITA_ASSERT(size_ < atoms_.size(), "more than 15 atoms in one list");
    atoms_[size_++] = a;
  }
  void resize(std::size_t n) {
    PARTITA_ASSERT(n <= size_, "an atom list only shrinks");
    size_ = static_cast<std::uint8_t>(n);
  }
  template <class It>
  void assign(It first, It last) {
    size_ = 0;
    for (; first != last; ++first) push_back(*first);
  }
  template <class It>
  void insert(const_iterator at, It first, It last) {
    PARTITA_ASSERT(at == end(), "an atom list grows at its end");
    for (; first != last; ++first) push_back(*first);
  }
  friend bool operator==(const AtomList& a, const AtomList& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }

 private:
  std::array<AtomId, 15> atoms_{};
  std::uint8_t size_ = 0;
};

/// The finest factorisation of the ranks, outermost (slowest) atom first. A named axis is a list of
/// atoms; different views of the same ranks (dp 8 = edp 2 x ep 4) share atoms.
struct Mesh {
  struct Atom {
    std::string name;
    std::int64_t size = 1;
    friend bool operator==(const Atom&, const Atom&) = default;
  };
  std::vector<Atom> atoms;

  std::int64_t ranks() const;
  std::int64_t size(AtomMask mask) const;
  std::int64_t size(const AtomList& list) const;
  /// Distance in rank numbers between neighbours along an atom.
  std::int64_t stride(AtomId atom) const;
  std::int64_t coordinate(std::int64_t rank, AtomId atom) const;
  /// Mixed-radix index along `list` (first atom slowest).
  std::int64_t coordinate(std::int64_t rank, const AtomList& list) const;
  /// All ranks that differ from `rank` in `mask` only, ascending by rank.
  std::vector<std::int64_t> group(std::int64_t rank, AtomMask mask) const;
  /// `rank` with its coordinates along `mask` set to 0: names its group.
  std::int64_t group_root(std::int64_t rank, AtomMask mask) const;
  friend bool operator==(const Mesh&, const Mesh&) = default;
};

AtomMask mask_of(const AtomList& list);
inline bool has(AtomMask mask, AtomId atom) { return (mask >> atom & 1) != 0; }
inline AtomMask bit(AtomId atom) { return static_cast<AtomMask>(1u << atom); }

enum class SplitKind : std::uint8_t {
  block,   ///< contiguous, as even as whole numbers allow, larger parts first, atom by atom
  window,  ///< what a window over block-split outputs reads: neighbours overlap (halos)
};

/// How one dimension of a tensor is cut.
struct DimSplit {
  AtomList atoms;  ///< slowest first; empty: held whole
  SplitKind kind = SplitKind::block;
  /// The first `zigzag` atoms (p ranks) cut 2p chunks and part c holds chunks c and 2p-1-c, which
  /// balances causal attention; the other atoms cut what that leaves in blocks.
  std::uint8_t zigzag = 0;
  /// The part of the rank `shift` places before along the atoms (cyclic): what a ring has passed on
  /// so far.
  std::int32_t shift = 0;
  /// Of the atoms, the leading ones that the shift leaves where they are; 0 where shift is 0.
  std::uint8_t fixed = 0;
  Window window;             ///< kind window: the reader
  std::int64_t outputs = 0;  ///< kind window: extent of the reader's output
  friend bool operator==(const DimSplit&, const DimSplit&) = default;
};

/// Leading atoms of `list` before those that are just `mask`; empty where it does not end in them.
std::optional<std::uint8_t> atoms_before(const AtomList& list, AtomMask mask);

/// What each rank holds of one tensor. Atoms that appear nowhere replicate it.
struct Layout {
  std::vector<DimSplit> dims;
  /// Ranks along these atoms hold summands (or, for a maximum, candidates) of the value.
  AtomMask partial = 0;
  Reduction reduction = Reduction::sum;
  /// After `dims`, what is left is flattened and cut over these atoms (ZeRO's shards).
  AtomList flat;
  /// Held only where the coordinates along these atoms are 0.
  AtomMask root = 0;
  friend bool operator==(const Layout&, const Layout&) = default;
};

struct Range {
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
};

/// Part `c` of `parts` of [0, extent): sizes differ by at most one, larger first.
Range part(std::int64_t extent, std::int64_t parts, std::int64_t c);

/// Global indices that `rank` holds along a dimension of `extent`: ascending, none twice, ranges
/// that follow each other joined.
std::vector<Range> local_ranges(const Mesh& mesh, const DimSplit& split, std::int64_t extent,
                                std::int64_t rank);
/// The same, one by one.
std::vector<std::int64_t> local_indices(const Mesh& mesh, const DimSplit& split,
                                        std::int64_t extent, std::int64_t rank);
std::int64_t local_extent(const Mesh& mesh, const DimSplit& split, std::int64_t extent,
                          std::int64_t rank);
/// Elements that `rank` holds; 0 where `root` excludes it. A routed tensor counts balanced experts
/// and rounds up to whole rows.
std::int64_t local_elements(const Mesh& mesh, const Layout& layout, const Shape& shape, bool routed,
                            std::int64_t experts, std::int64_t rank);

/// All atoms that `layout` mentions except in `partial`.
AtomMask split_atoms(const Layout& layout);

/// "[sample/dp, sequence/cp*tp zigzag] partial tp": for messages and tests.
std::string text(const Mesh& mesh, const Layout& layout, const Shape& shape);

}  // namespace partita
