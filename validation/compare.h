// validation/compare.h: a measured run beside its prediction, by kind of instruction and category
// of memory.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "simulator/engine/simulate.h"
#include "simulator/program/measurement.h"

namespace partita::validation {

/// All instructions of one kind in a step, averaged over ranks. An instruction's time begins where
/// the rank's one before ended, measured and predicted (there where nothing runs beside): waiting
/// for others is in it.
struct KindRow {
  std::string kind;  ///< "linear weight", "all_reduce dp", "send", "optimizer"
  double count = 0;
  Seconds measured, predicted;
};

struct StepComparison {
  Seconds measured;   ///< median over the steps, each from the first start to the last end
  Seconds low, high;  ///< quartiles
  double noise = 0;   ///< half the distance of the quartiles, relative to the median
  Seconds predicted;
  /// Of compute instructions alone, of one rank; 0 with several.
  Seconds compute_measured, compute_predicted;
  double compute_noise = 0;
  double error() const { return (predicted.count - measured.count) / measured.count; }
  std::vector<KindRow> kinds;  ///< largest measured first; empty if no samples were recorded
  std::array<Bytes, kCategoryCount> measured_memory{}, predicted_memory{};  ///< of the worst rank
  Bytes measured_peak, predicted_peak;
};

/// `timeline`: recorded. `ranks`: one entry per rank, at least one timed step.
StepComparison compare(const Program& program, const Timeline& timeline,
                       const std::vector<RankMeasurement>& ranks);

std::string kind_of(const Program& program, const Instruction& instruction);

/// The measured steps as a timeline: every rank a class, each instruction its median start and end,
/// all on one clock.
Timeline measured_timeline(const Program& program, const std::vector<RankMeasurement>& ranks);

double median(std::vector<double> values);

/// Seconds that a sample took, the median over steps: by the device's own records where it has
/// them, else between its two marks. `recorded`: which. Records that say more than the marks are of
/// others' kernels: not taken.
double time_of_sample(const RankMeasurement& rank, std::size_t sample, bool* recorded = nullptr);

/// Seconds of every step, each from the first rank's start to the last one's end.
std::vector<double> step_times(const std::vector<RankMeasurement>& ranks);

}  // namespace partita::validation
