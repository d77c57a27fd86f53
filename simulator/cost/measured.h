// simulator/cost/measured.h: prices from measured points (docs/cost.md, "Measured").
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "simulator/program/program.h"
#include "topologies/measured.h"

namespace partita {

/// What a kernel's time depends on.
struct KernelShape {
  /// "linear forward"; with the type of its operands where it isn't fp32, "linear forward bf16";
  /// empty for what has no kernel.
  std::string kernel;
  double m = 0, n = 0, k = 0, count = 1;
  double bytes = 0;
  bool product() const { return m > 0; }
};
/// A product's local shape in its forward pass, [m, n] = [m, k] · [k, n], `count` of them;
/// attention's scores, m queries by n keys.
struct ProductShape {
  double m = 0, n = 0, k = 0, count = 1;
  double window = 1;  ///< positions of a convolution's kernel, a factor of k
  double heads = 1;   ///< attention: key heads in count
};
ProductShape product_shape(const Program& program, const ProgramOperator& op, std::int64_t rank);
ProductShape product_shape(const Program& program, const Instruction& instruction,
                           std::int64_t rank);

/// Of a compute, slice or load instruction on `rank`.
KernelShape shape_of(const Program& program, const Instruction& instruction, std::int64_t rank);

/// Does our own runtime's host read which experts tokens go to, and list their rows?
bool lists_rows(const Program& program, const Instruction& instruction);
/// How many, of one that does.
double rows_listed(const Program& program, const Instruction& instruction, std::int64_t rank);

/// Time of a kernel from the table's points for as many concurrent ranks (else the nearest number):
/// products by product_trend.h; others log-log in bytes, beyond the largest point its rate, below
/// the smallest its time. Empty where the table has no such kernel.
/// `multiprocessors`: of a GPU; those others then by straight lines in bytes, beyond both ends too.
/// 0: a host.
std::optional<Seconds> measured_time(const KernelTable& table, const KernelShape& shape, int ranks,
                                     int multiprocessors = 0);

/// Log-log interpolation of a collective's points with this number of ranks, else the nearest
/// number; of those, the ones measured with `at_work` ranks working on the host, else the nearest
/// number. 0: one group alone.
std::optional<Seconds> measured_time(const CollectiveTable& table, const std::string& kind,
                                     int ranks, Bytes bytes, int at_work = 0);
/// The same between GPUs, of the points of a group of just this many ranks on so many nodes (as
/// NCCL counts them); they never fall as bytes grow: where points do, their mean logarithm counts.
/// Beyond them `model`, in seconds, by what it is off at the end. Empty without such points.
std::optional<Seconds> measured_time(const CollectiveTable& table, const std::string& kind,
                                     int ranks, int nodes, double bytes,
                                     const std::function<double(double)>& model);
/// Of a kernel and a transfer at once, either's time over that alone, at least 1; 0: not known.
struct Slowdown {
  double of_kernel = 0, of_transfer = 0;
};
/// A transfer of `kind`, a collective's or "send": of its points with as many ranks (else the
/// nearest number), linear in log bytes between two, the end's beyond. Else of stand-ins, linear in
/// `multiprocessors`, 1 at 0, beyond the largest its; else of the first kind that the table has in
/// the order of transfers_beside(). Unknown where the table has no such kernels.
/// docs/sharing.md, "Kernels and transfers at once, as measured".
Slowdown measured_slowdown(const SlowdownTable& table, KernelFamily kernel, const std::string& kind,
                           int ranks, Bytes bytes, int multiprocessors);
/// The number of ranks at work whose points that takes; 0 where there are none.
int measured_at_work(const CollectiveTable& table, const std::string& kind, int ranks, int at_work);

}  // namespace partita
