#include "simulator/cost/measured.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/cost/product_trend.h"

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

/// The same of a GPU, whose kernels take a start and so many bytes a second: that line, by least
/// squares of relative errors, times what the points are off it, linear in the logarithm between
/// two, beyond the ends the end's. One point's line begins at `start`.
double affine(const std::vector<std::pair<double, double>>& points, double x, double start) {
  const auto [first, least] = points.front();
  if (points.size() == 1) {
    if (start < least) return start + (least - start) * x / first;
    return x <= first ? least : least * x / first;
  }
  double ones = 0, mixed = 0, squares = 0, one = 0, slope = 0;
  for (const auto& [at, t] : points) {
    ones += 1 / (t * t), mixed += at / (t * t), squares += at * at / (t * t);
    one += 1 / t, slope += at / t;
  }
  const double determinant = ones * squares - mixed * mixed;
  double a = 0, b = slope / squares;
  if (determinant > 1e-12 * ones * squares) {
    const double begins = (one * squares - slope * mixed) / determinant,
                 grows = (slope * ones - one * mixed) / determinant;
    if (begins >= 0 && grows >= 0) a = begins, b = grows;
    if (grows < 0) a = one / ones, b = 0;
  }
  const auto off = [&](const std::pair<double, double>& p) {
    return std::log(p.second / (a + b * p.first));
  };
  const auto high =
      std::upper_bound(points.begin(), points.end(), std::pair<double, double>{x, INFINITY});
  double residual = 0;
  if (high == points.begin()) {
    residual = off(points.front());
  } else if (high == points.end()) {
    residual = off(points.back());
  } else {
    const auto low = high - 1;
    const double share = std::log(x / low->first) / std::log(high->first / low->first);
    residual = (1 - share) * off(*low) + share * off(*high);
  }
  return (a + b * x) * std::exp(residual);
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

/// The nearest curve in the logarithm that never falls: neighbours that do are pooled.
std::vector<std::pair<double, double>> rising(std::vector<std::pair<double, double>> points) {
  struct Pool {
    double sum = 0;
    std::size_t count = 0;
    double mean() const { return sum / static_cast<double>(count); }
  };
  std::vector<Pool> pools;
  for (const auto& [x, y] : points) {
    pools.push_back({std::log(y), 1});
    while (pools.size() > 1 && pools[pools.size() - 2].mean() > pools.back().mean()) {
      pools[pools.size() - 2].sum += pools.back().sum;
      pools[pools.size() - 2].count += pools.back().count;
      pools.pop_back();
    }
  }
  std::size_t i = 0;
  for (const Pool& pool : pools) {
    for (std::size_t k = 0; k < pool.count; ++k) points[i++].second = std::exp(pool.mean());
  }
  return points;
}

/// Each way to compress is a kernel of its own, PowerSGD's second factor too. Its bytes are the
/// passes that it makes over the gradient: one for each column of a factor, each member's signs.
void compression_shape(const Program& p, const Instruction& i, std::int64_t rank, KernelShape& s) {
  const Compression& c = p.compression;
  s.kernel += fmt::format(" {}", name(c.kind));
  if (i.kernel == Kernel::compress && i.index == 1) s.kernel += " right";
  const BufferId gradient = i.kernel == Kernel::decompress ? i.writes[0]
                            : i.index == 1                 ? i.outputs[0]
                                                           : i.reads[0];
  double passes = 1;
  if (c.kind == CompressionKind::power_sgd) passes = static_cast<double>(c.rank);
  if (c.kind == CompressionKind::one_bit && i.kernel == Kernel::decompress)
    passes = static_cast<double>(p.mesh.size(i.atoms));
  s.bytes = passes * static_cast<double>(local_bytes(p, gradient, rank).count);
}

/// " bf16": of the operands, where it isn't fp32; a product's is what it multiplies in.
std::string type_word(const Program& p, const Instruction& i) {
  ElementType type = ElementType::fp32;
  if (i.op >= 0 && is_product(p.operators[static_cast<std::size_t>(i.op)].operation)) {
    type = p.operators[static_cast<std::size_t>(i.op)].compute;
  } else {
    const auto look = [&](const std::vector<BufferId>& list) {
      for (const BufferId id : list) {
        if (id.valid() && p.buffer(id).element_bytes == 0 && type == ElementType::fp32)
          type = p.buffer(id).type;
      }
    };
    look(i.reads);
    look(i.gradients);
    look(i.writes);
  }
  return type == ElementType::fp32 ? "" : fmt::format(" {}", name(type));
}

/// What a product of 16 or 8 bits is told apart by: a bias is a kernel of its own beside it, and
/// rows that do not begin at multiples of 16 bytes are moved a number at a time.
std::string operand_words(const ProgramOperator& op, const Instruction& i, const KernelShape& s) {
  const bool narrow = bits(op.compute) <= 16, adds = i.kernel != Kernel::backward_data;
  if (!narrow) return "";
  const auto* linear = std::get_if<Linear>(&op.operation);
  const auto* convolution = std::get_if<Convolution>(&op.operation);
  const auto* grouped = std::get_if<GroupedProduct>(&op.operation);
  std::string words;
  if (adds && ((linear && linear->bias) || (convolution && convolution->bias) ||
               (grouped && grouped->bias)))
    words += " with bias";
  constexpr double kWhole = 8;  // numbers of two bytes
  if ((linear || grouped) && (std::fmod(s.n, kWhole) != 0 || std::fmod(s.k, kWhole) != 0))
    words += " unaligned";
  return words;
}

/// The same kernel with a bias, where this one has none, and the other way around; "": none.
std::string with_the_other_bias(std::string kernel) {
  constexpr std::string_view kBias = " with bias";
  if (const std::size_t at = kernel.find(kBias); at != std::string::npos)
    return kernel.erase(at, kBias.size());
  const std::size_t pass = kernel.find(' ');
  if (pass == std::string::npos) return "";
  return kernel.insert(std::min(kernel.find(' ', pass + 1), kernel.size()), kBias);
}

/// The table's points of a kernel, or of the nearest that it has.
const KernelTable::value_type* points_of(const KernelTable& table, const std::string& kernel) {
  const auto find = [&](const std::string& name) {
    const auto found = table.find(name);
    return found == table.end() ? nullptr : &*found;
  };
  const auto without = [](std::string name, std::string_view words) {
    const std::size_t at = name.find(words);
    return at == std::string::npos ? name : name.erase(at, words.size());
  };
  const std::string aligned = without(kernel, " unaligned");
  for (const std::string& name :
       {kernel, aligned, without(kernel, " with bias"), without(aligned, " with bias")}) {
    if (const auto* points = find(name)) return points;
  }
  return nullptr;
}

}  // namespace

ProductShape product_shape(const Program& p, const ProgramOperator& op, std::int64_t rank) {
  ProductShape s;
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
    s.heads = dim(Dim::head);
    s.count = dim(Dim::sample) * s.heads * static_cast<double>(a->queries_per_head);
  } else if (const auto* c = std::get_if<Convolution>(&op.operation)) {
    const Operand& y = g.outputs[0];
    const Operand& w = g.parameters[0];
    s.m = extent_of(p, op, y, 0, rank) * elements_of(p, op, y, 2, 4, rank);
    s.n = extent_of(p, op, y, 1, rank) / static_cast<double>(c->groups);
    s.k = elements_of(p, op, w, 1, 4, rank);
    s.window = elements_of(p, op, w, 2, 4, rank);
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
  return s;
}

ProductShape product_shape(const Program& p, const Instruction& i, std::int64_t rank) {
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  ProductShape s = product_shape(p, op, rank);
  if (const int d = op.signature.find(Dim::sequence);
      i.part >= 0 && d >= 0 && !std::holds_alternative<Attention>(op.operation)) {
    // One part of the sequence; the rest is another instruction's.
    const auto at = static_cast<std::size_t>(d);
    s.m *= static_cast<double>(part_size(p, i, rank)) /
           std::max<double>(1, static_cast<double>(local_extent(
                                   p.mesh, op.cuts[at], op.signature.dims[at].extent, rank)));
  }
  if (std::holds_alternative<GroupedProduct>(op.operation))
    s.m = std::max(0.5, s.m * load_of_experts(p, i, rank));
  return s;
}

bool lists_rows(const Program& p, const Instruction& i) {
  return i.kind == Kind::compute && i.kernel == Kernel::forward && i.op >= 0 &&
         std::holds_alternative<Dispatch>(p.operators[static_cast<std::size_t>(i.op)].operation);
}
double rows_listed(const Program& p, const Instruction& i, std::int64_t rank) {
  const Buffer& b = p.buffer(i.writes[0]);
  const std::int64_t features =
      local_extent(p.mesh, b.layout.dims[3], b.shape[3].extent, p.place_of(rank));
  return static_cast<double>(local_elements(p, i.writes[0], rank)) /
         static_cast<double>(std::max<std::int64_t>(1, features));
}

KernelShape shape_of(const Program& p, const Instruction& i, std::int64_t rank) {
  KernelShape s;
  const Work w = work_of(p, i, rank);
  if (i.kind == Kind::load) {
    s.kernel = p.sharded_storage ? "load shard" : "load";
    s.bytes = 2 * static_cast<double>(local_bytes(p, i.writes[0], rank).count);
    return s;
  }
  if (w.kernels == 0) return s;
  s.bytes = static_cast<double>(w.bytes.count);
  if (i.kind == Kind::slice || i.kind == Kind::copy) {
    s.kernel = std::string(name(i.kind));
    return s;
  }
  if (i.op < 0) {
    s.kernel = std::string(name(i.kernel));
    if (i.kernel == Kernel::optimizer)
      s.kernel += p.optimizer.kind == OptimizerKind::adam ? " adam" : " sgd";
    if (i.kernel == Kernel::compress || i.kernel == Kernel::decompress) {
      compression_shape(p, i, rank, s);
    } else {
      s.kernel += type_word(p, i);
    }
    return s;
  }
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
  const auto pass = i.kernel == Kernel::forward           ? "forward"
                    : i.kernel == Kernel::backward_data   ? "data"
                    : i.kernel == Kernel::backward_weight ? "weight"
                                                          : "statistic";
  s.kernel = fmt::format("{} {}", kind_name(op.operation), pass);
  if (const auto* a = std::get_if<Attention>(&op.operation)) {
    if (i.part >= 0) s.kernel += " part";
    // What is not seen is left out: the plain name is causal attention's.
    if (!a->causal) s.kernel += " of all keys";
    if (a->window > 0) s.kernel += " of a window";
  }
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
  // Our runtime's gradients of a table begin as zeros everywhere; of positions each row is written.
  const bool looked_up = std::holds_alternative<Embedding>(op.operation),
             positions = std::holds_alternative<PositionEmbedding>(op.operation);
  if (i.kernel == Kernel::backward_weight && (looked_up || positions)) {
    const auto table = static_cast<double>(local_bytes(p, i.writes[0], rank).count),
               rows = static_cast<double>(local_bytes(p, i.gradients[0], rank).count);
    s.bytes = positions ? rows + table : 2 * rows + (i.accumulate ? 0 : table);
  }
  if (is_product(op.operation)) {
    const ProductShape shape = product_shape(p, i, rank);
    s.m = shape.m, s.n = shape.n, s.k = shape.k, s.count = shape.count;
    s.kernel += operand_words(op, i, s);
  }
  if (std::holds_alternative<CrossEntropy>(op.operation) && i.kernel != Kernel::forward) {
    const Operand& x = op.signature.inputs[0];
    const std::string type = type_word(p, i);
    if (!type.empty() && std::fmod(extent_of(p, op, x, x.shape.size() - 1, rank), 8) != 0)
      s.kernel += " unaligned";
  }
  if (i.part >= 0 && op.signature.find(Dim::sequence) >= 0 &&
      !std::holds_alternative<Attention>(op.operation))
    s.kernel += " part";
  s.kernel += type_word(p, i);
  return s;
}

std::optional<Seconds> measured_time(const KernelTable& table, const KernelShape& s, int ranks,
                                     int multiprocessors) {
  const auto* found = points_of(table, s.kernel);
  if (found == nullptr) return {};
  const auto& [kernel, all] = *found;
  const int at = nearest_ranks(all, ranks);
  if (!s.product()) {
    std::vector<std::pair<double, double>> points;
    for (const KernelPoint& p : all) {
      if (p.ranks == at && p.bytes > 0) points.emplace_back(p.bytes, p.time.count);
    }
    if (points.empty()) return {};
    const auto c = curve(std::move(points));
    const double x = std::max(1.0, s.bytes);
    if (multiprocessors == 0) return Seconds{interpolate(c, x)};
    // What any kernel takes: the shortest of all.
    double start = c.front().second;
    for (const auto& [name, others] : table) {
      for (const KernelPoint& p : others) start = std::min(start, p.time.count);
    }
    return Seconds{affine(c, x, start)};
  }
  std::vector<ProductPoint> points = product_points(kernel, all, at);
  if (points.empty()) return {};
  if (multiprocessors > 0 && points.size() < kFewPoints) {
    const auto others = table.find(with_the_other_bias(kernel));
    if (others != table.end()) {
      for (ProductPoint& p : product_points(others->first, others->second, at))
        points.push_back(std::move(p));
    }
  }
  return Seconds{measured_product(table, points, s, multiprocessors)};
}

int measured_at_work(const CollectiveTable& table, const std::string& kind, int ranks,
                     int at_work) {
  const auto found = table.find(kind);
  if (found == table.end()) return 0;
  const int at = nearest_ranks(found->second, ranks), wanted = at_work > 0 ? at_work : ranks;
  int working = 0;
  for (const CollectivePoint& p : found->second) {
    if (p.ranks == at &&
        (working == 0 || std::abs(p.working() - wanted) < std::abs(working - wanted)))
      working = p.working();
  }
  return working;
}

std::optional<Seconds> measured_time(const CollectiveTable& table, const std::string& kind,
                                     int ranks, Bytes bytes, int at_work) {
  const auto found = table.find(kind);
  if (found == table.end()) return {};
  const int at = nearest_ranks(found->second, ranks);
  const int working = measured_at_work(table, kind, ranks, at_work);
  std::vector<std::pair<double, double>> points;
  for (const CollectivePoint& p : found->second) {
    if (p.ranks == at && p.working() == working)
      points.emplace_back(std::max<double>(1, static_cast<double>(p.bytes.count)), p.time.count);
  }
  return Seconds{
      interpolate(curve(std::move(points)), std::max<double>(1, static_cast<double>(bytes.count)))};
}

std::optional<Seconds> measured_time(const CollectiveTable& table, const std::string& kind,
                                     int ranks, int nodes, double bytes,
                                     const std::function<double(double)>& model) {
  const auto found = table.find(kind);
  if (found == table.end()) return {};
  std::vector<std::pair<double, double>> points;
  for (const CollectivePoint& p : found->second) {
    if (p.ranks == ranks && (p.nodes == 0 || p.nodes == nodes) && p.bytes.count > 0)
      points.emplace_back(static_cast<double>(p.bytes.count), p.time.count);
  }
  if (points.empty()) return {};
  points = rising(curve(std::move(points)));
  const auto& [small, first] = points.front();
  const auto& [large, last] = points.back();
  if (bytes < small) return Seconds{model(bytes) * first / model(small)};
  if (bytes > large) return Seconds{model(bytes) * last / model(large)};
  return Seconds{interpolate(points, bytes)};
}

namespace {

/// Between neighbours of (x, slowdown) sorted by x linear, beyond the ends the end's. Points of one
/// x: their mean.
Slowdown between(std::vector<std::pair<double, Slowdown>> points, double x) {
  std::stable_sort(points.begin(), points.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::pair<double, Slowdown>> means;
  for (std::size_t k = 0; k < points.size();) {
    Slowdown sum;
    double n = 0;
    for (const double at = points[k].first; k < points.size() && points[k].first == at; ++k) {
      sum.of_kernel += points[k].second.of_kernel, sum.of_transfer += points[k].second.of_transfer;
      ++n;
    }
    means.push_back({points[k - 1].first, {sum.of_kernel / n, sum.of_transfer / n}});
  }
  if (x <= means.front().first) return means.front().second;
  if (x >= means.back().first) return means.back().second;
  const auto above = std::upper_bound(means.begin(), means.end(), x,
                                      [](double v, const auto& p) { return v < p.first; });
  const auto& [x0, low] = *(above - 1);
  const auto& [x1, high] = *above;
  const double share = (x - x0) / (x1 - x0);
  return {low.of_kernel + share * (high.of_kernel - low.of_kernel),
          low.of_transfer + share * (high.of_transfer - low.of_transfer)};
}

}  // namespace

Slowdown measured_slowdown(const SlowdownTable& table, KernelFamily kernel, const std::string& kind,
                           int ranks, Bytes bytes, int multiprocessors) {
  const auto of = [&](std::string_view beside) {
    std::vector<SlowdownPoint> points;
    for (const SlowdownPoint& p : table) {
      if (p.kernel == kernel && p.beside == beside) points.push_back(p);
    }
    return points;
  };
  const auto by_bytes = [&](const std::vector<SlowdownPoint>& all) {
    const int at = nearest_ranks(all, ranks);
    std::vector<std::pair<double, Slowdown>> points;
    for (const SlowdownPoint& p : all) {
      if (p.ranks == at)
        points.push_back(
            {std::log2(static_cast<double>(p.bytes.count)), {p.of_kernel, p.of_transfer}});
    }
    return between(std::move(points), std::log2(std::max(1.0, static_cast<double>(bytes.count))));
  };
  if (const auto own = of(kind); !own.empty()) return by_bytes(own);
  if (const auto stand_ins = of(kStandIn); !stand_ins.empty()) {
    std::vector<std::pair<double, Slowdown>> points{{0, {1, 1}}};
    for (const SlowdownPoint& p : stand_ins)
      points.push_back({static_cast<double>(p.multiprocessors), {p.of_kernel, p.of_transfer}});
    return between(std::move(points), multiprocessors);
  }
  for (const std::string_view other : transfers_beside()) {
    if (const auto points = of(other); !points.empty()) return by_bytes(points);
  }
  return {};
}

}  // namespace partita
