#include "validation/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>

namespace partita::validation {
namespace {

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
}

std::string axis_of(const Program& p, const Instruction& i) {
  if (i.tie >= 0) return "tied";
  std::string s;
  for (std::size_t a = 0; a < p.mesh.atoms.size(); ++a) {
    if (has(i.atoms, static_cast<AtomId>(a))) s += (s.empty() ? "" : "*") + p.mesh.atoms[a].name;
  }
  return s;
}

const Instruction& instruction_of(const Program& p, std::int32_t block, std::int32_t instruction) {
  return p.blocks[static_cast<std::size_t>(block)]
      .instructions[static_cast<std::size_t>(instruction)];
}

/// From the first rank's start to the last one's end. Where they share cores one may begin late and
/// take less by its own count than the step did.
double step_time(const std::vector<RankMeasurement>& ranks, std::size_t s) {
  double slowest = 0;
  std::int64_t first = INT64_MAX, last = INT64_MIN;  // of what was recorded, on one clock
  for (const auto& r : ranks) {
    slowest = std::max(slowest, r.step_s[s]);
    if (s >= r.samples.size() || r.samples[s].empty()) continue;
    first = std::min(first, r.samples[s].front().start);
    last = std::max(last, r.samples[s].back().end);
  }
  return first < last ? std::max(slowest, static_cast<double>(last - first) * 1e-9) : slowest;
}

/// Does every class do one thing at a time?
bool one_after_the_other(const Timeline& timeline) {
  std::vector<Ticks> end(timeline.classes.size());
  for (const Entry& e : timeline.entries) {
    Ticks& last = end[static_cast<std::size_t>(e.rank_class)];
    if (e.start < last) return false;
    last = e.end;
  }
  return true;
}

}  // namespace

double median(std::vector<double> values) { return quantile(std::move(values), 0.5); }

std::string kind_of(const Program& p, const Instruction& i) {
  switch (i.kind) {
    case Kind::collective:
      return fmt::format("{} {}", name(i.collective), axis_of(p, i));
    case Kind::compute:
      break;
    case Kind::load:
    case Kind::send:
    case Kind::receive:
    case Kind::slice:
    case Kind::copy:
    case Kind::allocate:
    case Kind::free:
      return std::string(name(i.kind));
  }
  if (i.op < 0) return std::string(name(i.kernel));
  const auto op = kind_name(p.operators[static_cast<std::size_t>(i.op)].operation);
  switch (i.kernel) {
    case Kernel::forward:
      return fmt::format("{} forward", op);
    case Kernel::backward_data:
      return fmt::format("{} data", op);
    case Kernel::backward_weight:
      return fmt::format("{} weight", op);
    case Kernel::forward_statistic:
    case Kernel::backward_statistic:
      return fmt::format("{} statistic", op);
    case Kernel::zero:
    case Kernel::add:
    case Kernel::optimizer:
    case Kernel::scale:
    case Kernel::square_sum:
    case Kernel::clip:
    case Kernel::loss_scale:
    case Kernel::unscale:
    case Kernel::not_finite:
    case Kernel::compress:
    case Kernel::decompress:
    case Kernel::dequeue:
    case Kernel::enqueue:
    case Kernel::initialise:
    case Kernel::read:
      break;
  }
  return std::string(name(i.kernel));
}

double time_of_sample(const RankMeasurement& r, std::size_t sample, bool* recorded) {
  std::vector<double> steps, records;
  for (const auto& step : r.samples)
    steps.push_back(static_cast<double>(step[sample].end - step[sample].start) * 1e-9);
  for (const auto& step : r.kernel_ns) {
    if (sample < step.size() && step[sample] > 0)
      records.push_back(static_cast<double>(step[sample]) * 1e-9);
  }
  const double whole = median(std::move(steps));
  // Kernels are over within what passes between two events: records that say more are of others'.
  constexpr double kSlack = 2e-6;
  const bool known = !records.empty() && records.size() == r.kernel_ns.size();
  const double own = known ? median(std::move(records)) : 0;
  const bool takes = known && own <= 1.05 * whole + kSlack;
  if (recorded != nullptr) *recorded = takes;
  return takes ? own : whole;
}

std::vector<double> step_times(const std::vector<RankMeasurement>& ranks) {
  std::vector<double> steps;
  // The slowest rank's: all begin at a barrier.
  for (const auto list : {&RankMeasurement::captured_s, &RankMeasurement::plain_s}) {
    for (std::size_t s = 0; s < (ranks.at(0).*list).size(); ++s) {
      double slowest = 0;
      for (const auto& r : ranks) slowest = std::max(slowest, (r.*list).at(s));
      steps.push_back(slowest);
    }
    if (!steps.empty()) return steps;
  }
  for (std::size_t s = 0; s < ranks.at(0).step_s.size(); ++s) steps.push_back(step_time(ranks, s));
  return steps;
}

StepComparison compare(const Program& p, const Timeline& timeline,
                       const std::vector<RankMeasurement>& ranks) {
  StepComparison c;
  const std::vector<double> steps = step_times(ranks);
  c.measured = Seconds{median(steps)};
  c.low = Seconds{quantile(steps, 0.25)};
  c.high = Seconds{quantile(steps, 0.75)};
  c.noise = (c.high.count - c.low.count) / 2 / c.measured.count;
  c.predicted = to_seconds(timeline.step);

  std::map<std::string, KindRow> rows;
  const double n = static_cast<double>(ranks.size());
  // By a device's own records, else between marks.
  const bool recorded = ranks.size() == 1 && !ranks[0].kernel_ns.empty();
  std::vector<double> compute(
      ranks.size() == 1 ? (recorded ? ranks[0].kernel_ns.size() : ranks[0].samples.size()) : 0);
  // As predicted kernels have it: what passes from one to the next is a share of each.
  double passes = 0;
  if (recorded && !ranks[0].samples.at(0).empty()) {
    const auto count = ranks[0].samples[0].size();
    for (std::size_t k = 0; k < count; ++k) passes -= time_of_sample(ranks[0], k);
    passes = std::max(0.0, (passes + c.measured.count) / static_cast<double>(count));
  }
  for (const auto& r : ranks) {
    for (std::size_t k = 0; recorded && k < r.samples.at(0).size(); ++k) {
      const Sample& x = r.samples[0][k];
      const Instruction& i = instruction_of(p, x.block, x.instruction);
      bool by_records = false;
      const double t = time_of_sample(r, k, &by_records) + passes;
      KindRow& row = rows[kind_of(p, i)];
      row.count += 1;
      row.measured += Seconds{t};
      for (std::size_t s = 0; i.kind == Kind::compute && s < compute.size(); ++s)
        compute[s] += by_records ? static_cast<double>(r.kernel_ns[s][k]) * 1e-9 + passes : t;
    }
    if (recorded) break;
    std::map<std::string, std::vector<double>> by_kind;  // per step
    for (std::size_t s = 0; s < r.samples.size(); ++s) {
      std::map<std::string, double> sum;
      std::int64_t before = r.samples[s].empty() ? 0 : r.samples[s][0].start;
      for (const Sample& x : r.samples[s]) {
        const Instruction& i = instruction_of(p, x.block, x.instruction);
        const std::string kind = kind_of(p, i);
        const double t = static_cast<double>(x.end - before) * 1e-9;
        sum[kind] += t;
        if (i.kind == Kind::compute && !compute.empty()) compute[s] += t;
        if (s == 0) rows[kind].count += 1 / n;
        before = x.end;
      }
      for (const auto& [kind, t] : sum) by_kind[kind].push_back(t);
    }
    for (auto& [kind, list] : by_kind) rows[kind].measured += Seconds{median(std::move(list)) / n};
  }
  if (!rows.empty()) {
    double total = 0;
    for (const RankClass& k : timeline.classes) total += static_cast<double>(k.count);
    // A rank's step begins when it first has a core.
    std::vector<Ticks> before(timeline.classes.size(), Ticks{-1});
    const bool serial = !recorded && one_after_the_other(timeline);
    for (const Entry& e : timeline.entries) {
      const auto at = static_cast<std::size_t>(e.rank_class);
      const Instruction& i = instruction_of(p, e.block, e.instruction);
      const double share = static_cast<double>(timeline.classes[at].count) / total;
      const bool follows = serial && before[at] >= Ticks{0};
      const Seconds t = to_seconds(e.end - (follows ? before[at] : e.start));
      rows[kind_of(p, i)].predicted += share * t;
      if (i.kind == Kind::compute && !compute.empty()) c.compute_predicted += t;
      before[at] = e.end;
    }
  }
  if (!compute.empty()) {
    c.compute_measured = Seconds{median(compute)};
    c.compute_noise =
        (quantile(compute, 0.75) - quantile(compute, 0.25)) / 2 / c.compute_measured.count;
  }
  for (auto& [kind, row] : rows) {
    row.kind = kind;
    c.kinds.push_back(std::move(row));
  }
  std::stable_sort(c.kinds.begin(), c.kinds.end(),
                   [](const KindRow& a, const KindRow& b) { return b.measured < a.measured; });
  // With rows fed back the prediction is the last step's.
  const bool last = !p.routings.empty();
  for (const auto& r : ranks) {
    const Bytes peak = last ? r.last_peak : r.peak;
    if (peak > c.measured_peak)
      c.measured_peak = peak, c.measured_memory = last ? r.last_at_peak : r.at_peak;
  }
  for (const MemoryUse& use : timeline.memory) {
    if (use.peak > c.predicted_peak) c.predicted_peak = use.peak, c.predicted_memory = use.at_peak;
  }
  return c;
}

Timeline measured_timeline(const Program& p, const std::vector<RankMeasurement>& ranks) {
  Timeline t;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    t.classes.push_back(
        {p.stage_of(static_cast<std::int64_t>(r)), static_cast<std::int64_t>(r), 1});
    const auto& steps = ranks[r].samples;
    if (steps.empty()) continue;
    for (std::size_t k = 0; k < steps[0].size(); ++k) {
      std::vector<double> starts, ends;
      for (const auto& step : steps) {
        starts.push_back(static_cast<double>(step[k].start));
        ends.push_back(static_cast<double>(step[k].end));
      }
      const Sample& x = steps[0][k];
      const auto ticks = [](double ns) { return Ticks{std::llround(ns * 1000)}; };
      t.entries.push_back({static_cast<std::int32_t>(r), x.block, x.instruction, x.micro_batch,
                           ticks(median(std::move(starts))), ticks(median(std::move(ends)))});
    }
  }
  // A rank may begin before rank 0, whose clock it is: time is counted from the first of all.
  Ticks first = t.entries.empty() ? Ticks{} : t.entries[0].start;
  for (const Entry& e : t.entries) first = std::min(first, e.start);
  for (Entry& e : t.entries) {
    e.start = e.start - first;
    e.end = e.end - first;
    t.step = std::max(t.step, e.end);
  }
  return t;
}

}  // namespace partita::validation
