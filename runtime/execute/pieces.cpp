#include "runtime/execute/pieces.h"

#include <algorithm>

namespace partita::execute {

std::int64_t Box::dense() const {
  std::int64_t n = 1;
  for (const auto& list : index) n *= static_cast<std::int64_t>(list.size());
  return n;
}
std::int64_t Box::elements() const { return !held ? 0 : flat ? range.size() : dense(); }

Box box_of(const Program& program, BufferId id, std::int64_t rank) {
  const Buffer& b = program.buffer(id);
  rank = program.place_of(rank);
  Box box;
  for (std::size_t d = 0; d < b.shape.size(); ++d) {
    const std::int64_t extent =
        b.routed && b.shape[d].dim == Dim::expert ? b.experts : b.shape[d].extent;
    box.index.push_back(local_indices(program.mesh, b.layout.dims[d], extent, rank));
  }
  box.flat = !b.layout.flat.empty();
  box.range = {0, box.dense()};
  for (const AtomId a : b.layout.flat) {
    const Range q =
        part(box.range.size(), program.mesh.atoms[a].size, program.mesh.coordinate(rank, a));
    box.range = {box.range.begin + q.begin, box.range.begin + q.end};
  }
  box.held = program.mesh.group_root(rank, b.layout.root) == rank;
  return box;
}

std::vector<Run> section(const Box& piece, const Box& wanted) {
  if (!piece.held || !wanted.held) return {};
  if (piece.flat || wanted.flat) {
    const std::int64_t begin = piece.flat ? piece.range.begin : 0;
    const std::int64_t end = piece.flat ? piece.range.end : piece.dense();
    const std::int64_t first = std::max(begin, wanted.flat ? wanted.range.begin : 0);
    const std::int64_t last = std::min(end, wanted.flat ? wanted.range.end : wanted.dense());
    if (first >= last) return {};
    return {{first - begin, last - first}};
  }
  // Positions of the common indices, by dimension.
  const std::size_t dims = piece.index.size();
  std::vector<std::vector<std::int64_t>> at(dims);
  for (std::size_t d = 0; d < dims; ++d) {
    const auto& mine = piece.index[d];
    const auto& theirs = wanted.index[d];
    for (std::size_t i = 0, j = 0; i < mine.size() && j < theirs.size();) {
      if (mine[i] < theirs[j]) {
        ++i;
      } else if (theirs[j] < mine[i]) {
        ++j;
      } else {
        at[d].push_back(static_cast<std::int64_t>(i));
        ++i, ++j;
      }
    }
    if (at[d].empty()) return {};
  }
  // Trailing dimensions taken whole are one run with the last one that is not.
  std::size_t last = dims;
  std::int64_t inner = 1;
  while (last > 0 && at[last - 1].size() == piece.index[last - 1].size()) {
    inner *= static_cast<std::int64_t>(piece.index[--last].size());
  }
  if (last == 0) return {{0, inner}};
  std::vector<std::int64_t> stride(last);
  std::int64_t step = inner;
  for (std::size_t d = last; d-- > 0;) {
    stride[d] = step;
    step *= static_cast<std::int64_t>(piece.index[d].size());
  }
  std::vector<Run> runs;
  std::vector<std::size_t> walk(last, 0);
  for (;;) {
    std::int64_t offset = 0;
    for (std::size_t d = 0; d < last; ++d) offset += at[d][walk[d]] * stride[d];
    if (!runs.empty() && runs.back().offset + runs.back().count == offset) {
      runs.back().count += inner;
    } else {
      runs.push_back({offset, inner});
    }
    std::size_t d = last;
    while (d > 0 && ++walk[d - 1] == at[d - 1].size()) walk[--d] = 0;
    if (d == 0) return runs;
  }
}

std::int64_t count(const std::vector<Run>& runs) {
  std::int64_t n = 0;
  for (const Run& r : runs) n += r.count;
  return n;
}

}  // namespace partita::execute
