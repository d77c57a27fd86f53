#include "simulator/cost/measured.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "simulator/cost/cost.h"

namespace partita {
namespace {

double extent_of(const Program& p, const ProgramOperator& op, const Operand& operand, std::size_t d,
                 std::int64_t rank) {
  const int dim = operand.dims[d];
  if (dim < 0) return static_cast<double>(operand.shape[d].extent);
  const auto at = static_cast<std::size_t>(dim);
  return static_cast<double>(local_extent(p.mesh, op.cuts[at], op.signature.dims[at].extent, rank));
}
double elements_of(const Program& p, const ProgramOperator& op, const Operand& operand,
                   std::size_t first, std::size_t last, std::int64_t rank) {
  double n = 1;
  for (std::size_t d = first; d < last; ++d) n *= extent_of(p, op, operand, d, rank);
  return n;
}

void product_shape(const Program& p, const ProgramOperator& op, std::int64_t rank, KernelShape& s) {
  const Signature& g = op.signature;
  const auto all = [&](const Operand& o) { return elements_of(p, op, o, 0, o.shape.size(), rank); };
  const auto dim = [&](Dim d) {
    const int at = g.find(d);
    if (at < 0) return 1.0;
    return static_cast<double>(local_extent(p.mesh, op.cuts[static_cast<std::size_t>(at)],
                                            g.dims[static_cast<std::size_t>(at)].extent, rank));
  };
  if (const auto* l = std::get_if<Linear>(&op.operation)) {
    const Operand& x = g.inputs[0];
    const std::size_t batch = x.shape.size() - static_cast<std::size_t>(l->contracted);
    s.m = elements_of(p, op, x, 0, batch, rank);
    s.k = elements_of(p, op, x, batch, x.shape.size(), rank);
    s.n = all(g.parameters[0]) / std::max(1.0, s.k);
  } else if (const auto* a = std::get_if<Attention>(&op.operation)) {
    s.m = dim(Dim::sequence);
    s.n = dim(Dim::key_sequence);
    s.k = static_cast<double>(a->qk_dim);
    s.count = dim(Dim::sample) * dim(Dim::head) * static_cast<double>(a->queries_per_head);
  } else if (const auto* c = std::get_if<Convolution>(&op.operation)) {
    const Operand& y = g.outputs[0];
    const Operand& w = g.parameters[0];
    s.m = extent_of(p, op, y, 0, rank) * elements_of(p, op, y, 2, 4, rank);
    s.n = extent_of(p, op, y, 1, rank) / static_cast<double>(c->groups);
    s.k = elements_of(p, op, w, 1, 4, rank);
    s.count = static_cast<double>(c->groups);
  } else if (std::holds_alternative<GroupedProduct>(op.operation)) {
    const Operand& w = g.parameters[0];
    s.count = extent_of(p, op, w, 0, rank);
    s.n = extent_of(p, op, w, 1, rank);
    s.k = extent_of(p, op, w, 2, rank);
    const Operand& x = g.inputs[0];
    // Rows are (token, choice), shared evenly by the experts.
    const double rows = elements_of(p, op, x, 0, 2, rank) * static_cast<double>(x.shape[2].extent) *
                        s.count /
                        static_cast<double>(std::get<GroupedProduct>(op.operation).experts);
    s.m = std::max(1.0, rows / std::max(1.0, s.count));
  } else if (const auto* b = std::get_if<BatchedProduct>(&op.operation)) {
    const auto at = static_cast<std::size_t>(b->batch);
    s.count = elements_of(p, op, g.inputs[0], 0, at, rank);
    s.m = extent_of(p, op, g.inputs[0], at, rank);
    s.k = extent_of(p, op, g.inputs[0], at + 1, rank);
    s.n = extent_of(p, op, g.inputs[1], at + 1, rank);
  }
}

/// y at x of points sorted by x, linear in the logarithms.
double interpolate(const std::vector<std::pair<double, double>>& points, double x) {
  if (x <= points.front().first) return points.front().second;
  if (x >= points.back().first)
    return points.back().second * x / std::max(points.back().first, 1.0);
  const auto above =
      std::upper_bound(points.begin(), points.end(), std::pair<double, double>{x, INFINITY});
  const auto below = above - 1;
  const double share = std::log(x / below->first) / std::log(above->first / below->first);
  return std::exp((1 - share) * std::log(below->second) + share * std::log(above->second));
}

/// The number of ranks among the points that is nearest to `ranks`, the larger of two.
template <class Point>
int nearest_ranks(const std::vector<Point>& points, int ranks) {
  int best = points.front().ranks;
  for (const Point& p : points) {
    const int d = std::abs(p.ranks - ranks), e = std::abs(best - ranks);
    if (d < e || (d == e && p.ranks > best)) best = p.ranks;
  }
  return best;
}

/// Several measurements at one x become their median.
std::vector<std::pair<double, double>> curve(std::vector<std::pair<double, double>> points) {
  std::sort(points.begin(), points.end());
  std::vector<std::pair<double, double>> out;
  for (std::size_t i = 0; i < points.size();) {
    std::size_t end = i;
    while (end < points.size() && points[end].first == points[i].first) ++end;
    out.emplace_back(points[i].first, points[i + (end - i) / 2].second);
    i = end;
  }
  return out;
}

}  // namespace

KernelShape shape_of(const Program& p, const Instruction& i, std::int64_t rank) {
  KernelShape s;
  const Work w = work_of(p, i, rank);
  if (i.kind == Kind::load) {
    s.kernel = "load";
    s.bytes = 2 * static_cast<double>(local_bytes(p, i.writes[0], rank).count);
    return s;
  }
  if (w.kernels == 0) return s;
  s.bytes = static_cast<double>(w.bytes.count);
  if (i.kind == Kind::slice || i.kind == Kind::copy) {
    s.kernel = "slice";
    return s;
  }
  if (i.op < 0) {
    s.kernel = std::string(name(i.kernel));
    if (i.kernel == Kernel::optimizer)
      s.kernel += p.optimizer.kind == OptimizerKind::adam ? " adam" : " sgd";
    return s;
  }
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  const auto pass = i.kernel == Kernel::forward           ? "forward"
                    : i.kernel == Kernel::backward_data   ? "data"
                    : i.kernel == Kernel::backward_weight ? "weight"
                                                          : "statistic";
  s.kernel = fmt::format("{} {}", kind_name(op.operation), pass);
  if (i.part >= 0 && std::holds_alternative<Attention>(op.operation)) s.kernel += " part";
  const auto routed = [&](const std::vector<BufferId>& list) {
    return std::any_of(list.begin(), list.end(),
                       [&](BufferId id) { return id.valid() && p.buffer(id).routed; });
  };
  if (routed(i.reads) || routed(i.gradients)) s.kernel += " of rows";
  const bool has_statistics = i.kernel == Kernel::forward ? !i.statistics.empty()
                              : i.kernel == Kernel::backward_data
                                  ? !op.signature.backward_statistics.empty()
                                  : false;
  if (has_statistics && !i.inline_statistics) s.kernel += " given statistics";
  if (const auto* n = std::get_if<Normalize>(&op.operation)) {
    constexpr const char* kinds[] = {"layer", "rms", "batch", "local"};
    s.kernel += fmt::format(" {}", kinds[static_cast<std::size_t>(n->kind)]);
  }
  if (const auto* a = std::get_if<Activation>(&op.operation))
    s.kernel += fmt::format(" {}", static_cast<int>(a->kind));
  if (is_product(op.operation)) product_shape(p, op, rank, s);
  if (std::holds_alternative<GroupedProduct>(op.operation))
    s.m = std::max(0.5, s.m * load_of_experts(p, i, rank));
  return s;
}

std::optional<Seconds> measured_time(const KernelTable& table, const KernelShape& s, int ranks) {
  const auto found = table.find(s.kernel);
  if (found == table.end()) return {};
  const std::vector<KernelPoint>& all = found->second;
  const int at = nearest_ranks(all, ranks);
  if (!s.product()) {
    std::vector<std::pair<double, double>> points;
    for (const KernelPoint& p : all) {
      if (p.ranks == at && p.bytes > 0) points.emplace_back(p.bytes, p.time.count);
    }
    if (points.empty()) return {};
    return Seconds{interpolate(curve(std::move(points)), std::max(1.0, s.bytes))};
  }
  struct Near {
    double distance, log_rate;
  };
  std::vector<Near> near;
  for (const KernelPoint& p : all) {
    if (p.ranks != at || p.m <= 0) continue;
    const double dm = std::log2(s.m / p.m), dn = std::log2(s.n / p.n), dk = std::log2(s.k / p.k),
                 dc = 0.5 * std::log2(s.count / p.count);
    near.push_back({std::sqrt(dm * dm + dn * dn + dk * dk + dc * dc),
                    std::log(2 * p.m * p.n * p.k * p.count / p.time.count)});
  }
  if (near.empty()) return {};
  std::sort(near.begin(), near.end(),
            [](const Near& a, const Near& b) { return a.distance < b.distance; });
  if (near.size() > 6) near.resize(6);
  double weight = 0, sum = 0;
  for (const Near& x : near) {
    const double w = 1 / (std::pow(x.distance, 3) + 1e-6);
    weight += w;
    sum += w * x.log_rate;
  }
  return Seconds{2 * s.m * s.n * s.k * s.count / std::exp(sum / weight)};
}

std::optional<Seconds> measured_time(const CollectiveTable& table, const std::string& kind,
                                     int ranks, Bytes bytes, int at_work) {
  const auto found = table.find(kind);
  if (found == table.end()) return {};
  const int at = nearest_ranks(found->second, ranks);
  int working = 0;
  const int wanted = at_work > 0 ? at_work : ranks;
  for (const CollectivePoint& p : found->second) {
    if (p.ranks == at &&
        (working == 0 || std::abs(p.working() - wanted) < std::abs(working - wanted)))
      working = p.working();
  }
  std::vector<std::pair<double, double>> points;
  for (const CollectivePoint& p : found->second) {
    if (p.ranks == at && p.working() == working)
      points.emplace_back(std::max<double>(1, static_cast<double>(p.bytes.count)), p.time.count);
  }
  return Seconds{
      interpolate(curve(std::move(points)), std::max<double>(1, static_cast<double>(bytes.count)))};
}

}  // namespace partita
