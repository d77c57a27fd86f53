// simulator/cost/state_space.h: a Mamba-2 scan as mamba_ssm's kernels run it (docs/cost.md, "State
// space models").
#pragma once

#include <vector>

#include "models/operators.h"
#include "simulator/cost/kernels.h"

namespace partita {

/// A rank's tokens of all its samples, in chunks, and its groups of heads.
struct ScanProblem {
  double tokens = 0, chunks = 0, groups = 0;
  double chunk = 0;  ///< tokens of a full one
  ElementType type = ElementType::bf16;
};

/// What a pass runs, kernel by kernel: products, and kernels that only move bytes.
struct ScanKernels {
  std::vector<Product> products;
  Bytes streamed;
  int kernels = 0;
};

/// By state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py: _mamba_chunk_scan_combined_fwd and
/// _bwd, which makes the chunks' states again. States are in fp32, in `type` where a kernel only
/// multiplies by them; the products inside a chunk compute blocks of 64 on and below the diagonal.
ScanKernels scan_kernels(const StateSpace& op, const ScanProblem& problem, bool backward);

}  // namespace partita
