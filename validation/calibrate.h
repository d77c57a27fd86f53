// validation/calibrate.h: measures what a prediction for this machine rests on, and validates it.
//
// The runtime is reached through `Measure` only: the command connects the two.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "models/graph.h"
#include "simulator/plan/plan.h"
#include "simulator/program/measurement.h"
#include "topologies/measured.h"
#include "validation/journal.h"

namespace partita::validation {

/// Runs the program on real ranks, `warm_up` steps untimed, then `steps` timed and recorded ones.
using Measure = std::function<std::vector<RankMeasurement>(const Graph&, const Program&,
                                                           int warm_up, int steps)>;

/// A network and a plan that is run for its kernels only: shapes of no validation case.
struct CalibrationRun {
  std::string name;
  Graph graph;
  Plan plan;             ///< for as many ranks as work at once
  bool startup = false;  ///< its start-up programs are run, not its training
};
/// For hosts on which `ranks` work at once.
std::vector<CalibrationRun> calibration_runs(int ranks);

/// The same for a GPU: shapes that fill it, in bf16 mostly, none of a network of the GPU suite.
/// `eights`: it multiplies 8 bits.
std::vector<CalibrationRun> gpu_calibration_runs(bool eights = true);
/// So many more, drawn from a fixed seed, in bf16: for time that is left, of which those are
/// measured whose kernels the points say least of. None of the suite's products.
std::vector<CalibrationRun> more_gpu_calibration_runs(std::size_t count);

/// A network of kernels of some 20 us: short, so that what passes between them shows, and longer
/// than their launches.
CalibrationRun dispatch_run();
/// A small network whose step is measured as one CUDA graph, too.
CalibrationRun graph_run();

/// One layer whose kernels are measured beside transfers: of a GPU large, in bf16.
CalibrationRun layer_run(bool gpu);

/// Kernel points of one calibration run: medians over steps and ranks, equal shapes joined.
void harvest(const Program& program, const std::vector<RankMeasurement>& ranks, KernelTable& into);

/// What a step takes beyond its instructions, per instruction: on a host its own time between two,
/// on a GPU what passes from one to the next (docs/cuda.md, "Launch and dispatch"). None where a
/// GPU waited for its host.
std::optional<Seconds> dispatch_of(const std::vector<RankMeasurement>& ranks);
/// Of steps that were one graph each; none: there were none.
std::optional<Seconds> dispatch_in_graph_of(const std::vector<RankMeasurement>& ranks);
/// Until the host has queued an instruction of a GPU's; none where its queue may have been full.
std::optional<Seconds> launch_of(const std::vector<RankMeasurement>& ranks);

/// What the host takes for a row of experts that it lists: what the instruction takes between
/// events beyond its kernels. None without records, or such instructions.
std::optional<Seconds> list_row_of(const Program& program,
                                   const std::vector<RankMeasurement>& ranks);

/// Adds a buffer of one step that no operator owns. `layout`: uncut where it has no dimensions.
BufferId add_buffer(Program& program, Shape shape, Layout layout = {});

/// A program of nothing but collectives (and, on an even number of ranks, one of transfers) of many
/// sizes, 64 B to `largest`: executed as any other, so that packing is measured too.
std::vector<Program> collective_programs(int ranks, std::int64_t largest = 4 << 20);
/// Their points, medians over steps: of a collective from its last member's arrival to its end,
/// with more ranks than `cores` from the last end of the one before to its own last end; of a
/// transfer half the way there and back.
void harvest_collectives(const Program& program, const std::vector<RankMeasurement>& ranks,
                         int cores, CollectiveTable& into);

/// Copies of 4 KiB to `largest` by `ranks` ranks at once: what memory gives each, in caches and
/// beyond.
Program copy_program(int ranks, std::int64_t largest = 16 << 20);
/// Their points, under "copy"; bytes count reading and writing.
void harvest_copies(const Program& program, const std::vector<RankMeasurement>& ranks,
                    KernelTable& into);
/// Copies of 4 KiB to `largest` from a GPU to its host's memory, and back.
Program host_copy_program(std::int64_t largest);
/// Their points, under "copy to host" and "copy from host"; bytes are those that move.
void harvest_host_copies(const Program& program, const std::vector<RankMeasurement>& ranks,
                         KernelTable& into);

/// Two ranks: a transfer, then arithmetic on the sender's side and before it on the receiver's; the
/// transfer alone; the arithmetic alone.
enum class OverlapPart : std::uint8_t { both, transfer, compute };
Program overlap_program(OverlapPart part);
/// (t_compute + t_transfer - t_both) / min(t_compute, t_transfer) of median steps: 0 one after the
/// other, 1 the smaller one hidden.
double overlap_of(const std::vector<RankMeasurement>& both,
                  const std::vector<RankMeasurement>& transfer,
                  const std::vector<RankMeasurement>& compute);

/// What a GPU says of itself.
struct GpuFacts {
  std::string name;
  Bytes memory;
  int multiprocessors = 0, compute_capability = 0;
  Bytes usable;  ///< free beside a context and what libraries keep; 0: not known
};

struct Profile {
  std::string provenance;  ///< host, date, versions: the `source` of every figure
  KernelTable kernels;
  CollectiveTable collectives;
  SlowdownTable slowdown;
  Seconds dispatch, launch, in_graph, list_row;  ///< 0 of a GPU's: not measured
  double dispatch_spread = 0, launch_spread = 0, in_graph_spread = 0, list_row_spread = 0;
  double overlap = 0, overlap_spread = 0;
  bool dispatch_measured = false, overlap_measured = false;
  int cores = 1;
  std::optional<GpuFacts> gpu;  ///< whose profile it is; else a host's
  OutsideMemory outside;        ///< of the units' devices; of a communicator its medians
  /// Of units that measured a GPU's kernels: those with its own records and what these cost of a
  /// step, the median; those without, and why.
  std::size_t recorded = 0, unrecorded = 0;
  double recording = 0;
  std::string no_records;
  std::size_t strayed = 0;  ///< units left out for their clock (off_clock)
};
/// Numbers of units that are no measurement: a clock more than 1 % off the median of all rounds of
/// the same unit, or held down by heat, a slowdown or a power brake. A power cap is the GPU's own
/// way.
std::vector<std::size_t> off_clock(const std::vector<Unit>& units);
/// Medians, of kernels the most: once loaded they stay.
OutsideMemory joined(const std::vector<OutsideMemory>& units);
/// All rounds' units joined, but for those with a record: medians, and how far the rounds are
/// apart.
Profile joined(const std::vector<Unit>& units);

/// Device and cluster files for the profile: partita.device/1 and partita.topology/1.
std::string device_yaml(const Profile& profile);
std::string cluster_yaml(const Profile& profile, const std::string& device_file, int devices);

/// One case of the suite.
struct SuiteCase {
  std::string name;
  Graph graph;
  Plan plan;
  std::int64_t ranks = 1;
};
/// Networks times plans on 1, 2 and 4 ranks, small enough for the reference.
std::vector<SuiteCase> suite();
/// Networks that people train, whole or a few layers, on one GPU in bf16: for time and memory, too
/// large for the reference. No calibration run has their shapes.
std::vector<SuiteCase> gpu_suite();

}  // namespace partita::validation
