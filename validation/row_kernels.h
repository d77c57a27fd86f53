// validation/row_kernels.h: rows of collectives.csv and gemm.csv, priced one by one.
#pragma once

#include <string>
#include <vector>

#include "validation/row_case.h"

namespace partita::validation {

struct KernelFigure {
  double seconds = 0;
  double ideal = 0;  ///< s: its FLOPs at peak; 0 for collectives
  std::vector<std::string> assumed;
};

/// Seconds that a row prints, 0 where it prints none: time, else from the bus bandwidth as
/// nccl-tests defines it.
double measured_collective(const Row& row);
/// Time, else from FLOP/s: products 2 b m n k, attention 4 b h s² d forward and 2.5 times that
/// backward, the whole square counted.
double measured_product(const Row& row);

/// InputError{column, why} where a row does not say enough, or there is no device or cluster.
KernelFigure collective_figure(const Configuration& row, const Catalogue& catalogue);
KernelFigure product_figure(const Configuration& row, const Catalogue& catalogue);

}  // namespace partita::validation
