#include "validation/slowdown.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/unit_text.h"
#include "models/models.h"
#include "simulator/cost/cost.h"
#include "simulator/lower/lower.h"
#include "validation/calibrate.h"
#include "validation/compare.h"

namespace partita::validation {
namespace {

/// Of each of its multiprocessors: 2 ms, in which some kernels begin and end.
constexpr std::int64_t kStandInBytes = 30 << 20;

/// Kernels back to back: those of a GPU take some milliseconds in all.
int kernels_of(KernelFamily family, bool gpu) {
  if (!gpu) return 4;
  return family == KernelFamily::product ? 6 : family == KernelFamily::attention ? 12 : 48;
}

/// The first forward kernel of the family in the network's largest shape of it.
const Instruction& kernel_of(const Program& p, KernelFamily family) {
  const Instruction* largest = nullptr;
  double most = 0;
  for (const Block& b : p.blocks) {
    for (const Instruction& i : b.instructions) {
      if (i.kind != Kind::compute || i.op < 0 || i.kernel != Kernel::forward) continue;
      const Operation& op = p.operators[static_cast<std::size_t>(i.op)].operation;
      const bool wanted = family == KernelFamily::product ? std::holds_alternative<Linear>(op)
                          : family == KernelFamily::attention
                              ? std::holds_alternative<Attention>(op)
                              : std::holds_alternative<Activation>(op);
      const Work w = work_of(p, i, 0);
      const double size =
          family == KernelFamily::memory ? static_cast<double>(w.bytes.count) : w.flops.count;
      if (wanted && size > most) most = size, largest = &i;
    }
  }
  PARTITA_ASSERT(largest != nullptr, "a layer without such a kernel");
  return *largest;
}

/// Of a layer's kernel, `count` times, every operand a buffer of the step.
void add_kernels(Program& p, const Program& layer, KernelFamily family, int count) {
  const Instruction& i = kernel_of(layer, family);
  std::int32_t drawn = 0;
  while (p.parameters[static_cast<std::size_t>(drawn)].initial_deviation <= 0) ++drawn;
  const auto keep = [&](BufferId id, bool filled) {
    if (!id.valid()) return;
    Buffer& b = p.buffers[id.index()];
    b.scope = Scope::step;
    b.alias = -1;
    b.category = filled ? Category::parameters : Category::buffers;
    b.parameter = filled ? drawn : -1;
  };
  for_each_write(i, [&](BufferId id) { keep(id, false); });
  for (const BufferId id : i.extras) keep(id, false);
  for (const auto* list : {&i.reads, &i.parameters}) {
    for (const BufferId id : *list) keep(id, true);
  }
  for (int k = 0; k < count; ++k) p.blocks[0].instructions.push_back(i);
}

void add_transfer(Program& p, const TransferBeside& t) {
  Instruction i;
  i.stream = 1;
  // Bytes as nccl-tests counts them: of an all-to-all what one rank holds, else the whole.
  const std::int64_t n = t.ranks,
                     whole_bytes =
                         t.bytes.count * (t.kind == name(CollectiveKind::all_to_all) ? n : 1),
                     piece = std::max<std::int64_t>(1, whole_bytes / 4 / n / n);
  // Of several dimensions: interpreters write each one's indices out.
  const std::int64_t wide = std::min<std::int64_t>(piece, 1024);
  const Shape shape{
      {Dim::sample, n}, {Dim::feature, n}, {Dim::height, piece / wide}, {Dim::width, wide}};
  if (t.kind == kStandIn) {
    i.kind = Kind::copy;
    i.multiprocessors = t.multiprocessors;
    i.reads = {add_buffer(p, shape, {})};
    i.writes = {add_buffer(p, shape, {})};
    p.blocks[0].instructions.push_back(std::move(i));
    return;
  }
  i.kind = Kind::collective;
  i.atoms = bit(0);
  DimSplit cut;
  cut.atoms = {0};
  Layout whole, owed, rows, columns;
  whole.dims.resize(shape.size());
  owed = rows = columns = whole;
  owed.partial = i.atoms;
  rows.dims[0] = cut;
  columns.dims[1] = cut;
  const auto between = [&](CollectiveKind kind, const Layout& from, const Layout& to) {
    i.collective = kind;
    i.reads = {add_buffer(p, shape, from)};
    i.writes = {add_buffer(p, shape, to)};
  };
  if (t.kind == name(CollectiveKind::all_reduce)) {
    between(CollectiveKind::all_reduce, owed, whole);
    p.buffers[i.writes[0].index()].alias = i.reads[0].value;
  } else if (t.kind == name(CollectiveKind::all_gather)) {
    between(CollectiveKind::all_gather, rows, whole);
  } else if (t.kind == name(CollectiveKind::reduce_scatter)) {
    between(CollectiveKind::reduce_scatter, owed, rows);
  } else {
    PARTITA_ASSERT(t.kind == name(CollectiveKind::all_to_all), t.kind);
    between(CollectiveKind::all_to_all, rows, columns);
  }
  p.blocks[0].instructions.push_back(std::move(i));
}

struct Interval {
  double start = 0, end = 0;
  double length() const { return end - start; }
};
Interval interval_of(const Sample& s) {
  return {static_cast<double>(s.start) * 1e-9, static_cast<double>(s.end) * 1e-9};
}

/// One step of one rank. In the program that has both the transfer comes first.
struct Seen {
  std::vector<Interval> kernels;
  std::optional<Interval> transfer;
};
Seen seen(const std::vector<Sample>& samples, AtOnce part) {
  Seen all;
  for (std::size_t k = 0; k < samples.size(); ++k) {
    const Interval one = interval_of(samples[k]);
    if (part != AtOnce::kernels && k == 0)
      all.transfer = one;
    else
      all.kernels.push_back(one);
  }
  return all;
}

/// The shortest of the ranks' times of the transfer: who came last waited for nobody.
std::size_t last_to_come(const std::vector<RankMeasurement>& ranks, std::size_t step) {
  std::size_t at = 0;
  for (std::size_t r = 1; r < ranks.size(); ++r) {
    if (interval_of(ranks[r].samples[step][0]).length() <
        interval_of(ranks[at].samples[step][0]).length())
      at = r;
  }
  return at;
}

struct Middle {
  double median = 0, spread = 0;
};
Middle middle_of(std::vector<double> list) {
  std::sort(list.begin(), list.end());
  return {median(list), (list[list.size() * 3 / 4] - list[list.size() / 4]) / 2};
}

}  // namespace

std::string TransferBeside::name() const {
  return kind == kStandIn ? fmt::format("stand-in of {} multiprocessors", multiprocessors)
                          : fmt::format("{} of {}", kind, text(bytes));
}

std::vector<TransferBeside> transfers_to_measure(int ranks, bool gpu) {
  std::vector<TransferBeside> all;
  if (!gpu && ranks != 2) return all;
  if (ranks == 1) {
    for (const int held : {24, 8, 32})
      all.push_back({kStandIn, 1, held, Bytes{held * kStandInBytes}});
    return all;
  }
  const std::vector<std::int64_t> sizes =
      gpu ? std::vector<std::int64_t>{128 << 20, 8 << 20} : std::vector<std::int64_t>{256 << 10};
  for (const std::int64_t bytes : sizes) {
    for (const char* kind : {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"})
      all.push_back({kind, ranks, 0, Bytes{bytes}});
  }
  return all;
}

Program at_once_program(KernelFamily family, const TransferBeside& t, AtOnce part, bool gpu) {
  const CalibrationRun run = layer_run(gpu);
  const auto plan = complete(run.graph, run.plan);
  PARTITA_ASSERT(static_cast<bool>(plan), plan.reason());
  const auto layer = lower(run.graph, executable(*plan));
  PARTITA_ASSERT(static_cast<bool>(layer), layer.reason());
  Program p = *layer;
  if (t.ranks > 1) p.mesh = Mesh{{{"r", t.ranks}}};
  p.streams = {"compute", "transfer"};
  p.blocks.assign(1, {});
  p.blocks[0].name = fmt::format("{} kernels and {}", name(family), t.name());
  p.blocks[0].kind = BlockKind::step;
  p.stages = {{{BlockId{0}, -1}}};
  // First, so that it has its multiprocessors before the kernels ask for all.
  if (part != AtOnce::kernels) add_transfer(p, t);
  if (part != AtOnce::transfer) add_kernels(p, *layer, family, kernels_of(family, gpu));
  return p;
}

void harvest_slowdown(KernelFamily family, const TransferBeside& transfer,
                      const std::vector<RankMeasurement>& both,
                      const std::vector<RankMeasurement>& kernels,
                      const std::vector<RankMeasurement>& alone, bool serial, SlowdownTable& into) {
  std::vector<double> of_one, of_transfer, slow_kernels, slow_transfers;
  for (const auto& r : kernels) {
    for (const auto& step : r.samples) {
      for (const Interval& k : seen(step, AtOnce::kernels).kernels) of_one.push_back(k.length());
    }
  }
  for (std::size_t s = 0; s < alone.at(0).samples.size(); ++s)
    of_transfer.push_back(interval_of(alone[last_to_come(alone, s)].samples[s].at(0)).length());
  const double t = median(of_one), all = median(of_transfer);
  if (!(t > 0 && all > 0)) return;
  for (std::size_t s = 0; s < both.at(0).samples.size(); ++s) {
    double shared = 0, alike = 0;
    for (std::size_t r = 0; r < both.size(); ++r) {
      const Seen now = seen(both[r].samples[s], AtOnce::both);
      const Interval& x = *now.transfer;
      double mine = 0;
      for (const Interval& k : now.kernels) {
        const double both_run =
            serial ? k.length()
                   : std::max(0.0, std::min(k.end, x.end) - std::max(k.start, x.start));
        if (both_run <= 0) continue;
        mine += both_run;
        alike += t - (k.length() - both_run);
      }
      shared += mine;
      if (r != last_to_come(both, s)) continue;
      if (serial) {
        slow_transfers.push_back(x.length() / all);
      } else if (mine >= x.length() / 10 && all > x.length() - mine) {
        slow_transfers.push_back(mine / (all - (x.length() - mine)));
      }
    }
    if (alike > 0) slow_kernels.push_back(shared / alike);
  }
  if (slow_kernels.empty() || slow_transfers.empty()) return;
  const Middle k = middle_of(std::move(slow_kernels)), x = middle_of(std::move(slow_transfers));
  SlowdownPoint p;
  p.kernel = family;
  p.beside = transfer.kind;
  p.ranks = transfer.ranks;
  p.multiprocessors = transfer.multiprocessors;
  p.bytes = transfer.bytes;
  p.of_kernel = std::clamp(k.median, 1.0, kMostSlowdown);
  p.of_transfer = std::clamp(x.median, 1.0, kMostSlowdown);
  p.spread = std::max(k.spread / p.of_kernel, x.spread / p.of_transfer);
  into.push_back(p);
}

}  // namespace partita::validation
