// validation/profiled.h: a job's own profiler trace as terms of a step, beside the prediction's
// (docs/compare.md).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/units.h"
#include "simulator/engine/simulate.h"

namespace partita::validation {

/// What one GPU ran, and its steps; times in whole nanoseconds of the trace's clock.
struct ProfilerTrace {
  struct Event {
    std::int64_t start = 0, end = 0;
    std::int64_t stream = 0;
    std::int32_t name = 0;    ///< index into `names`
    std::int32_t group = -1;  ///< index into `groups`; -1: none is printed
  };
  /// Ranks that a communication kernel is of, as PyTorch prints them: long lists are cut.
  struct Group {
    std::int64_t size = 0;
    std::vector<std::int64_t> ranks;  ///< ascending; of a cut list those it has
    friend auto operator<=>(const Group&, const Group&) = default;
  };
  struct Step {
    std::int64_t start = 0, end = 0;
  };
  std::string file;
  std::int64_t device = 0;
  std::optional<std::int64_t> ranks;  ///< of the job, where the trace says
  std::optional<std::int64_t> rank;   ///< whose trace it is, where it says so
  std::string gpu;                    ///< "NVIDIA H100 80GB HBM3", where the trace names it
  std::vector<std::string> names;
  std::vector<Group> groups;
  std::vector<Event> events;  ///< as in the file
  std::vector<Step> steps;    ///< "ProfilerStep#N", by start
  bool steps_of_gpu = false;  ///< as the GPU ran them: the host was ahead of it
};

/// Kineto's Chrome trace events. `device`: whose; empty: the one there is. InputError{file}:
/// compressed, cut off, no JSON, no kernels, a time that is none, several devices.
ProfilerTrace parse_profiler_trace(const std::string& text, const std::string& file,
                                   std::optional<std::int64_t> device);

/// In the order of docs/compare.md's groups.
enum class TermGroup : std::uint8_t { product, kernel, optimizer, communication, host, idle };
inline constexpr int kTermGroups = 6;
/// "products", "other kernels", ...
std::string_view name(TermGroup group);

/// What a kernel's name says it is.
struct KernelKind {
  TermGroup group = TermGroup::kernel;
  std::string kind;  ///< "linear", "all_reduce", "unknown"
  std::vector<std::string> patterns;
};
/// validation/kernel_kinds.yaml, schema partita.kernel_kinds/1.
std::vector<KernelKind> load_kernel_kinds(const std::string& file);
/// The first entry that knows the name; null: none does.
const KernelKind* kind_of_kernel(const std::vector<KernelKind>& kinds, const std::string& name);

struct ProfiledTerm {
  TermGroup group = TermGroup::kernel;
  std::string kind;            ///< "" of idle
  std::int64_t ns = 0;         ///< its instants
  std::int64_t kernel_ns = 0;  ///< of its kernels, whatever ran beside
  std::int64_t kernels = 0;
};
struct UnknownKernel {
  std::string name;
  std::int64_t ns = 0;  ///< as kernel_ns
  std::int64_t count = 0;
};

/// One step of the trace; its terms' instants sum to it.
struct ProfiledStep {
  std::int64_t ns = 0;
  std::int64_t steps = 0;              ///< it is the median of; 0: the whole trace
  std::int64_t low = 0, high = 0;      ///< the shortest and the longest of them
  double later = 0;                    ///< the part of all kernels' time after the last mark's end
  std::vector<ProfiledTerm> terms;     ///< by group, then most instants first
  std::vector<UnknownKernel> unknown;  ///< most time first
};
/// `axes`: of each of the trace's groups the plan's axis by the kernel's collective ("" in it: of
/// every other), as the breakdown names axes; a communication kernel's kind is its axis where it
/// has one, else its collective.
using GroupAxes = std::map<std::string, std::string>;
ProfiledStep profiled_step(const ProfilerTrace& trace, const std::vector<KernelKind>& kinds,
                           const std::vector<GroupAxes>& axes = {});

/// Axes along which `rank` of the program meets exactly the ranks of each group.
std::vector<GroupAxes> axes_of(const Program& program, std::int64_t rank,
                               const std::vector<ProfilerTrace::Group>& groups);

/// One line of the comparison: a group's sum (`kind` empty) or one of its kinds, seconds; absent:
/// that side does not know the term.
struct TermRow {
  TermGroup group = TermGroup::kernel;
  std::string kind;
  std::optional<Seconds> measured, predicted, kernels;
};
/// Each group's sum, then its kinds; groups that neither side has are left out.
std::vector<TermRow> compare_terms(const ProfiledStep& measured, const Breakdown& predicted);

}  // namespace partita::validation
