// runtime/cpu/normalisation.h: which elements a normalisation takes together.
#pragma once

#include <cstdint>

#include "runtime/cpu/kernels.h"

namespace partita::cpu {

/// Groups of elements that share a statistic, as runs in memory: layer and RMS norm have one run a
/// group, batch norm one run per sample and channel.
struct NormalisedRuns {
  std::int64_t groups = 0, repeats = 0, length = 0;
  double members = 1;      ///< of a group, over all ranks that reduce it
  std::int64_t width = 1;  ///< sums of a group
  bool batch = false;
};

/// False for the local kind, and where heads are cut.
inline bool runs_of(const Normalize& op, const reference::Context& c, const Tensor& x,
                    NormalisedRuns& r) {
  if (op.kind == Normalize::Kind::local) return false;
  const std::size_t dims = x.index->size();
  const Signature& s = *c.signature;
  r.width = op.kind == Normalize::Kind::rms ? 1 : 2;
  const auto extent = [&](std::size_t first, std::size_t last) {
    std::int64_t n = 1;
    for (std::size_t d = first; d < last; ++d) n *= static_cast<std::int64_t>((*x.index)[d].size());
    return n;
  };
  const auto local_or_whole = [&](std::size_t d) {
    const int dim = s.inputs[0].dims[d];
    const bool own = dim >= 0 && s.dims[static_cast<std::size_t>(dim)].use == DimUse::parallel;
    return static_cast<double>(own ? extent(d, d + 1) : s.inputs[0].shape[d].extent);
  };
  if (op.kind == Normalize::Kind::batch) {
    r.batch = true;
    r.groups = extent(1, 2);
    r.repeats = extent(0, 1);
    r.length = extent(2, dims);
    for (std::size_t d = 0; d < dims; ++d) {
      if (d != 1) r.members *= local_or_whole(d);
    }
    return true;
  }
  const std::int64_t last = extent(dims - 1, dims);
  r.repeats = 1;
  r.length = op.group > 0 ? op.group : last;
  if (op.group > 0 && last % op.group != 0) return false;
  r.groups = r.length == 0 ? 0 : extent(0, dims) / r.length;
  r.members = op.group > 0 ? static_cast<double>(op.group) : local_or_whole(dims - 1);
  return true;
}

}  // namespace partita::cpu
