#include "validation/replay.h"

#include <algorithm>
#include <map>
#include <set>

#include "simulator/cost/measured.h"
#include "validation/calibrate.h"
#include "validation/compare.h"

namespace partita::validation {
namespace {

const Instruction& instruction_of(const Program& p, std::int32_t block, std::int32_t i) {
  return p.blocks[static_cast<std::size_t>(block)].instructions[static_cast<std::size_t>(i)];
}

/// Is it a kernel? What moves between host and device or from storage is the topology's.
bool is_kernel(const Instruction& i) { return i.kind == Kind::compute || i.kind == Kind::slice; }

std::size_t class_of(const Program& p, Communication& communication, std::int64_t rank) {
  return static_cast<std::size_t>(
      classify(p, communication).of_rank.at(static_cast<std::size_t>(rank)));
}

}  // namespace

MemoryUse memory_of_rank(const Program& p, const Topology& topology, std::int64_t rank) {
  Communication communication(topology);
  SimulateOptions memory_only;
  memory_only.memory_limit = Bytes{0};
  return simulate(p, communication, memory_only).memory.at(class_of(p, communication, rank));
}

Replayed replayed(const Program& whole, const Program& part, const Topology& topology,
                  const RankMeasurement& run, const SimulateOptions& options) {
  Replayed r;
  // Medians over steps, instruction by instruction.
  std::map<std::string, ReplayKind> kinds;
  RankMeasurement kernels;  // those alone
  kernels.rank = run.rank;
  kernels.samples.resize(run.samples.size());
  kernels.kernel_ns.resize(run.kernel_ns.size());
  // Kernels by the device's records and a whole step: what passes between them is theirs.
  if (!run.plain_s.empty() && !run.kernel_ns.empty()) {
    double busy = 0;
    std::int64_t count = 0;
    for (std::size_t k = 0; k < run.samples.at(0).size(); ++k) {
      const Sample& x = run.samples[0][k];
      busy += time_of_sample(run, k);
      count += is_kernel(instruction_of(part, x.block, x.instruction)) ? 1 : 0;
    }
    const double rest = median(run.captured_s.empty() ? run.plain_s : run.captured_s) - busy;
    if (count > 0 && rest > 0) r.between = Seconds{rest / static_cast<double>(count)};
  }
  const auto between_ns = static_cast<std::int64_t>(r.between.count * 1e9);
  for (std::size_t k = 0; k < run.samples.at(0).size(); ++k) {
    const Sample& x = run.samples[0][k];
    const Instruction& i = instruction_of(part, x.block, x.instruction);
    if (!is_kernel(i)) continue;
    for (std::size_t s = 0; s < run.samples.size(); ++s)
      kernels.samples[s].push_back(run.samples[s][k]);
    bool recorded = false;
    const double took = time_of_sample(run, k, &recorded) + r.between.count;
    for (std::size_t s = 0; s < run.kernel_ns.size(); ++s) {
      const std::int64_t ns = run.kernel_ns[s].at(k);
      kernels.kernel_ns[s].push_back(ns > 0 ? ns + between_ns : 0);
    }
    for (auto& step : kernels.samples) step.back().end += between_ns;
    r.recorded += recorded ? 1 : 0;
    ++r.kernels;
    ReplayKind& kind = kinds[kind_of(part, i)];
    ++kind.count;
    const Seconds t{took};
    kind.measured += t;
    r.compute_measured += t;
  }
  KernelTable table;
  harvest(part, {kernels}, table);

  SimulateOptions recorded = options;
  recorded.record = true;
  {
    Communication communication(topology);
    const Timeline t = simulate(part, communication, recorded);
    const auto mine = static_cast<std::int32_t>(class_of(part, communication, run.rank));
    for (const Entry& e : t.entries) {
      const Instruction& i = instruction_of(part, e.block, e.instruction);
      if (e.rank_class != mine || !is_kernel(i)) continue;
      const Seconds took = to_seconds(e.end - e.start);
      r.compute_predicted += took;
      kinds[kind_of(part, i)].predicted += took;
    }
    const MemoryUse& m = t.memory.at(static_cast<std::size_t>(mine));
    r.peak_predicted = m.peak;
    r.at_peak_predicted = m.at_peak;
    r.ranks_alike = t.classes.at(static_cast<std::size_t>(mine)).count;
  }
  r.peak_measured = run.last_peak;
  r.at_peak_measured = run.last_at_peak;
  Communication before(topology);
  r.step_predicted = to_seconds(simulate(whole, before, options).step);
  const Topology measured = topology.with_kernels(table);
  Communication after(measured);
  r.step_replayed = to_seconds(simulate(whole, after, options).step);
  std::set<std::string> not_run;
  for (const BlockCall& call : whole.stages[static_cast<std::size_t>(whole.stage_of(run.rank))]) {
    for (const Instruction& i : whole.blocks[call.block.index()].instructions) {
      if (!is_kernel(i)) continue;
      const std::string kernel = shape_of(whole, i, run.rank).kernel;
      if (!kernel.empty() && table.count(kernel) == 0) not_run.insert(kind_of(whole, i));
    }
  }
  r.not_run.assign(not_run.begin(), not_run.end());
  for (auto& [name, kind] : kinds) {
    kind.kind = name;
    r.kinds.push_back(kind);
  }
  std::sort(r.kinds.begin(), r.kinds.end(),
            [](const ReplayKind& a, const ReplayKind& b) { return a.measured > b.measured; });
  return r;
}

}  // namespace partita::validation
