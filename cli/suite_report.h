// cli/suite_report.h: what `partita validate` says, as a table and as JSON.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cli/device_memory.h"
#include "validation/compare.h"
#include "validation/figures.h"
#include "validation/nccl_estimates.h"
#include "validation/program_check.h"
#include "validation/sampling.h"

namespace partita::cli {

struct SuiteRow {
  validation::CaseFigures figures;
  bool checked = true;  ///< against the reference
  bool equal = true;    ///< to it
  bool timed = true;    ///< false: too small for its time to say anything, of the figures its name
  std::size_t strayed = 0;  ///< timed runs that were left out for their clock
  std::optional<validation::ProgramCheck> program;  ///< empty: nothing was compared
  double memory_error = 0;
  /// By Category, of the ranks with the highest peaks.
  std::array<Bytes, kCategoryCount> memory_measured{}, memory_predicted{};
  std::vector<DeviceMemoryRow> device_memory;  ///< of a GPU
};

/// One kind of instruction over all cases.
struct SuiteKind {
  validation::KindRow sum;       ///< over cases and rounds
  std::vector<double> by_round;  ///< measured seconds, all cases together
  double noise() const { return validation::over_rounds(by_round, {0}).second; }
};

struct SuiteReport {
  std::string backend, transport, provenance;
  std::vector<SuiteRow> rows;
  std::vector<SuiteKind> kinds;
  std::vector<std::string> outliers;
  std::optional<validation::EstimateComparison> estimates;  ///< of NCCL itself
  std::string no_estimates;                                 ///< why there are none, if asked for
  std::vector<validation::Judged> held_out;  ///< calibration's points that were not fitted
  std::size_t strayed = 0, strayed_of_suite = 0;  ///< runs left out: calibration's, the suite's
  std::vector<std::string> no_figures;            ///< timed cases all of whose runs were
  bool gpu() const { return backend == "cuda"; }
};

/// By collective and pair of algorithm and protocol: sizes, mean and largest error.
std::string estimate_table(const validation::EstimateComparison& comparison);

/// 1 where a case differs from its reference, executes another program than the simulator plays,
/// has no run that is a measurement, or a bound is missed, else 0.
int exit_code(const SuiteReport& report);
/// Of calibration's points that were not fitted, by kernel; the bound is that of all together.
std::string held_out_table(const std::vector<validation::Judged>& held);
void print(const SuiteReport& report);
void print_json(const SuiteReport& report);

}  // namespace partita::cli
