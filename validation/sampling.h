// validation/sampling.h: what to measure next, and what to leave for judging the rest
// (docs/calibration.md, "GPUs").
#pragma once

#include <string>
#include <vector>

#include "simulator/cost/measured.h"
#include "simulator/program/program.h"

namespace partita::validation {

/// Distinct kernels of the program's first rank.
std::vector<KernelShape> shapes_of(const Program& program);

/// How little the points say of a shape, in factors of two of its time: what the nearest one
/// changes, and 1/20 for each factor of two that it lies apart. 0 where the shape was measured; 1
/// where the table has no such kernel.
double doubt(const KernelTable& table, const KernelShape& shape, int multiprocessors,
             int ranks = 1);

/// Of candidates, each with its kernels, the one whose mean doubt is largest; the first of equals.
/// Requires one at least.
std::size_t next_candidate(const KernelTable& table,
                           const std::vector<std::vector<KernelShape>>& candidates,
                           int multiprocessors);

/// Takes the points out that are for judging prediction alone: of each kernel every second shape by
/// size (a product's FLOPs, else bytes), the last but one where the turn is the largest's, since
/// beyond the largest nothing is known. By shape, whatever the times; none of copies, by which
/// memory and links are rated. Half of all, rounded down.
KernelTable take_held_out(KernelTable& table);

/// Held out points of one kernel against the others' prediction.
struct Judged {
  std::string kernel;
  std::size_t points = 0;
  double mean = 0;  ///< of |predicted - measured| / measured
  double bias = 0;  ///< of the same with its sign
  double most = 0;
};
/// By kernel; the last is all together. Kernels without any other point are left out.
std::vector<Judged> judge(const KernelTable& table, const KernelTable& held, int multiprocessors,
                          int ranks = 1);
/// The mean error that is asked for of all together.
constexpr double kHeldOutBound = 0.05;
/// Is it more?
bool missed(const std::vector<Judged>& held);

}  // namespace partita::validation
