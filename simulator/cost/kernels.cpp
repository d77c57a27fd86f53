#include "simulator/cost/kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/hash.h"

namespace partita {
namespace {

// ---- Model -------------------------------------------------------------------------------------

/// Rows and columns of the result that one block computes, and parts into which the sum is split.
/// cuBLAS and CUTLASS have these and shapes between them; the fastest is taken.
struct Tiling {
  double rows, columns;
};
constexpr std::array<Tiling, 6> kTilings = {
    {{128, 256}, {256, 128}, {128, 128}, {64, 128}, {128, 64}, {64, 64}}};
constexpr std::array<int, 4> kSplits = {1, 2, 4, 8};

/// Filling the pipeline before a block's loop and storing its result behind it; of each wave, and
/// of the first, whose operands no cache holds, once more.
constexpr double kWaveLatency = 1.5e-6, kFirstWave = 1.2e-6;
/// A block of r × c loads r + c numbers for r · c sums: its loop takes 1 + kLoads · (1/r + 1/c) of
/// what arithmetic alone would. Both are a fit to 234 bf16 products on an H100 (docs/cost.md).
constexpr double kLoads = 8;
/// Rows that do not start at multiples of 16 bytes are read number by number (assumed).
constexpr double kUnaligned = 0.5;
/// Of batches in 16 bits on Ampere it was measured: 384 products of 1024 x 1024 by 1024 x 140 run
/// at 53.89 TFLOP/s in fp16 and at 12.21 in bf16, for which cuBLAS of CUDA 11.6 leaves the matrix
/// units (PyTorch, issue 83272).
constexpr double kUnalignedHalves = 0.333, kUnalignedBrains = 0.072;
/// Of the vector units' rate, what a kernel reaches that convolves without matrix units (assumed).
constexpr double kDirect = 0.5;
/// The host starts one product of a group after the other (a fit to grouped products on a B200).
constexpr double kGroupLaunch = 9e-6;
/// A device is not full while its last blocks of attention end: of the longest, this share (a fit
/// to an A100 and a B200).
constexpr double kForwardTail = 0.8, kBackwardTail = 0.3;
/// Width of the heads that attention's efficiencies are of.
constexpr double kHead = 128;
/// FlashAttention-2 is around twice as fast as FlashAttention (arXiv 2307.08691, section 4.1).
constexpr double kFlash1 = 2;

double bytes_each(ElementType type) { return bits(type) / 8.0; }

/// Loop steps are 128 bytes deep.
double padded_depth(double k, ElementType type) {
  const double step = 128 / bytes_each(type);
  return std::ceil(k / step) * step;
}

bool aligned(double extent, ElementType type) {
  return std::fmod(extent * bytes_each(type), 16) == 0;
}

/// Does every operand and the result start each row at a multiple of 16 bytes?
bool aligned(const Product& p) {
  const bool m = aligned(p.m, p.type), n = aligned(p.n, p.type), k = aligned(p.k, p.type);
  if (!aligned(p.n, p.out)) return false;
  switch (p.layout) {
    case ProductLayout::tn:
      return k;
    case ProductLayout::nn:
      return k && n;
    case ProductLayout::nt:
      return m && n;
    case ProductLayout::any:
      return true;
  }
  return true;
}

/// Share of the rate that is left where rows do not start at multiples of 16 bytes.
double vectors(const Product& p, const DeviceProfile& device) {
  if (aligned(p)) return 1;
  const bool batch = p.count > 1 && !p.grouped && !p.convolution && device.compute_capability == 80;
  if (batch && p.type == ElementType::fp16) return kUnalignedHalves;
  if (batch && p.type == ElementType::bf16) return kUnalignedBrains;
  return kUnaligned;
}

/// What the units take for `count` products at once.
double units_of(const Product& p, const DeviceProfile& device, double count, int multiprocessors,
                double clock) {
  const double rate = clock * device.sustained_rate(p.type, p.fast_sums).count /
                      device.multiprocessors * vectors(p, device);
  constexpr double kBest = 1 + kLoads * (1 / kTilings[0].rows + 1 / kTilings[0].columns);
  double best = INFINITY;
  for (const Tiling& t : kTilings) {
    const double tiles = std::ceil(p.m / t.rows) * std::ceil(p.n / t.columns) * count;
    const double loads = (1 + kLoads * (1 / t.rows + 1 / t.columns)) / kBest;
    for (const int split : kSplits) {
      const double waves = std::ceil(tiles * split / multiprocessors);
      const double depth = padded_depth(p.k / split, p.type);
      double time = waves * (2 * t.rows * t.columns * depth / rate * loads + kWaveLatency);
      // Partial sums are written and read once more, through a cache at twice memory's bandwidth.
      if (split > 1)
        time += kWaveLatency + split * p.m * p.n * count * 8 / (2 * device.memory_bandwidth.count);
      best = std::min(best, time);
    }
  }
  return best + kFirstWave;
}

/// Volta's and later kernels for matrix units are tiled so; a processor or an older GPU takes FLOPs
/// at the sustained rate.
bool has_tiles(const DeviceProfile& device) { return device.compute_capability >= 70; }

double memory_time(Bytes bytes, const DeviceProfile& device) {
  return static_cast<double>(bytes.count) /
         (device.memory_bandwidth.count * device.memory_efficiency);
}

// ---- Points ------------------------------------------------------------------------------------

/// Where a shape lies: log2 of its sizes, and what kind of kernel it is.
struct Place {
  static constexpr std::size_t kSizes = 6, kKinds = 4;
  std::array<double, kSizes> size{};
  std::array<int, kKinds> kind{};
};

/// 16-bit types run alike.
int class_of(ElementType type) {
  return static_cast<int>(type == ElementType::fp16 ? ElementType::bf16 : type);
}

Place place_of(const Product& p) {
  Place at;
  at.size = {std::log2(p.m * p.n * p.count),
             std::log2(p.k),
             std::log2(p.m),
             std::log2(p.n),
             std::log2(p.count),
             p.count > 1 ? 1.0 : 0.0};
  at.kind = {static_cast<int>(p.layout), p.grouped ? 1 : 0, p.accumulate ? 1 + class_of(p.out) : 0,
             class_of(p.type)};
  return at;
}
Place place_of(const FlashAttention& a) {
  Place at;
  const double rows = a.batch * a.heads * a.queries;
  at.size = {
      std::log2(rows),       std::log2(a.keys * a.attended), std::log2(rows * a.keys * a.attended),
      std::log2(a.qk + a.v), std::log2(a.qk / a.v),          0};
  at.kind = {a.qk == a.v ? 1 : 2, a.backward ? 1 : 0, 0, class_of(a.type)};
  return at;
}

/// Matérn's correlation of order 3/2: 1 at distance 0, 0.48 at 1, 0.14 at 2.
double matern(double squared) {
  const double r = std::sqrt(3 * squared);
  return (1 + r) * std::exp(-r);
}

double square(double x) { return x * x; }

// Prior of log(measured / model): the device's own level, a smooth part over work and depth, and a
// finer one over the whole shape; standard deviations and, in octaves, lengths (docs/cost.md).
constexpr double kLevel = 0.3, kCoarse = 0.1, kFine = 0.06, kNoise = 0.03;
/// Distances of two layouts, of grouped and plain, of what is accumulated, of two types.
constexpr std::array<double, Place::kKinds> kKindApart = {1, 2.0 / 3, 2.0 / 3, 2};

/// Of two layouts, squared. Where one of a point and a product that is asked for is not known it is
/// the other's (Residuals); a point's beside other points' lies in the middle of the three, who are
/// 1 apart, so that all points are places in one space: else their covariances would be none.
double layouts_apart(int a, int b) { return a == b ? 0 : a == 0 || b == 0 ? 1.0 / 3 : 1; }

/// With layouts in the places of what the two say.
double covariance(const Place& a, const Place& b, int layout_a, int layout_b) {
  double apart = square(kKindApart[0]) * layouts_apart(layout_a, layout_b);
  for (std::size_t i = 1; i < Place::kKinds; ++i)
    if (a.kind[i] != b.kind[i]) apart += square(kKindApart[i]);
  const auto d = [&](std::size_t i, double length) {
    return square((a.size[i] - b.size[i]) / length);
  };
  apart += d(5, 1.1);
  return square(kLevel) + square(kCoarse) * matern(apart + d(0, 1.5) + d(1, 2.2)) +
         square(kFine) * matern(apart + d(2, 1.1) + d(3, 1.1) + d(1, 2.5) + d(4, 1));
}

/// Of one kind, its layout too where both are known, and less than an octave apart in all sizes
/// together?
bool within_an_octave(const Place& a, const Place& b) {
  double apart = 0;
  for (const std::size_t i : {std::size_t{1}, std::size_t{2}, std::size_t{3}, std::size_t{4}})
    apart += square(a.size[i] - b.size[i]);
  const bool layout = a.kind[0] == b.kind[0] || a.kind[0] == 0 || b.kind[0] == 0;
  return layout && apart < 1 && std::equal(a.kind.begin() + 1, a.kind.end(), b.kind.begin() + 1);
}

/// log(measured / model) of points, and what follows for a place between or beyond them.
class Residuals {
 public:
  void add(const Place& at, double value, double spread) {
    points_.push_back({at, value, square(kNoise) + square(spread)});
  }

  /// The mean of a Gaussian process with this prior given the nearest points (kriging; Rasmussen
  /// and Williams, Gaussian Processes for Machine Learning, equation 2.23); 0 without points.
  double at(const Place& x) const {
    if (points_.empty()) return 0;
    const int asked = x.kind[0];
    // Of a point beside others.
    const auto layout_of = [&](const Place& p) { return p.kind[0] != 0 ? p.kind[0] : asked; };
    std::vector<std::pair<double, std::size_t>> near;
    near.reserve(points_.size());
    for (std::size_t i = 0; i < points_.size(); ++i) {
      const Place& p = points_[i].place;
      const int layout = layout_of(p);
      near.emplace_back(-covariance(x, p, asked != 0 ? asked : layout, layout), i);
    }
    constexpr std::size_t kNearest = 24;
    const std::size_t n = std::min(kNearest, near.size());
    std::partial_sort(near.begin(), near.begin() + static_cast<std::ptrdiff_t>(n), near.end());
    // Cholesky's K = L Lᵀ, row by row; then mean = kᵀ K⁻¹ y = (L⁻¹ k) · (L⁻¹ y).
    std::vector<double> l(n * n), u(n), w(n);
    double mean = 0;
    for (std::size_t i = 0; i < n; ++i) {
      const Point& p = points_[near[i].second];
      u[i] = -near[i].first;
      w[i] = p.value;
      for (std::size_t j = 0; j <= i; ++j) {
        const Place& other = points_[near[j].second].place;
        double sum = covariance(p.place, other, layout_of(p.place), layout_of(other)) +
                     (i == j ? p.noise : 0);
        for (std::size_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
        l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
      }
      for (std::size_t k = 0; k < i; ++k) {
        u[i] -= l[i * n + k] * u[k];
        w[i] -= l[i * n + k] * w[k];
      }
      u[i] /= l[i * n + i];
      w[i] /= l[i * n + i];
      mean += u[i] * w[i];
    }
    return mean;
  }

 private:
  struct Point {
    Place place;
    double value, noise;
  };
  std::vector<Point> points_;
};

struct ShapeHash {
  static std::uint64_t bits_of(double x) {
    std::uint64_t b;
    static_assert(sizeof b == sizeof x);
    std::memcpy(&b, &x, sizeof b);
    return b;
  }
  std::size_t operator()(const Product& p) const {
    std::uint64_t h = static_cast<std::uint64_t>(p.layout) << 32 |
                      static_cast<std::uint64_t>(p.type) << 16 | static_cast<std::uint64_t>(p.out);
    h = h << 4 | (p.convolution ? 8u : 0u) | (p.fast_sums ? 4u : 0u) | (p.accumulate ? 2u : 0u) |
        (p.grouped ? 1u : 0u);
    for (const double x : {p.m, p.n, p.k, p.count}) h = mix(h, bits_of(x));
    return mix(h, static_cast<std::uint64_t>(p.bytes.count));
  }
  std::size_t operator()(const FlashAttention& a) const {
    std::uint64_t h = static_cast<std::uint64_t>(a.type) << 3 |
                      static_cast<std::uint64_t>(a.flash) << 1 | (a.backward ? 1u : 0u);
    for (const double x : {a.batch, a.queries, a.keys, a.heads, a.qk, a.v, a.attended})
      h = mix(h, bits_of(x));
    return mix(h, static_cast<std::uint64_t>(a.bytes.count));
  }
};

}  // namespace

Bytes Product::operand_bytes() const {
  const double in = count * (m * k + k * n) * bytes_each(type);
  return Bytes{
      static_cast<std::int64_t>(in + count * m * n * bytes_each(out) * (accumulate ? 2 : 1))};
}

Flops FlashAttention::flops() const {
  const double pairs = batch * heads * queries * keys * attended;
  return Flops{2 * pairs * (backward ? 3 * qk + 2 * v : qk + v)};
}

KernelParts product_model(const Product& p, const DeviceProfile& device, int multiprocessors,
                          double clock) {
  KernelParts parts;
  parts.memory = Seconds{memory_time(p.bytes, device)};
  if (!has_tiles(device)) {
    parts.units = Seconds{p.flops().count / device.sustained_rate(p.type, p.fast_sums).count};
    parts.work = std::max(parts.units, parts.memory);
    return parts;
  }
  if (p.grouped) {
    // Each group starts cold: its operands come before its arithmetic, and half of the shorter of
    // the two hides behind other groups.
    const double groups = std::max(1.0, p.count);
    parts.units = Seconds{groups * units_of(p, device, 1, multiprocessors, clock)};
    parts.work = Seconds{
        std::max(groups * kGroupLaunch, std::max(parts.units, parts.memory).count +
                                            0.5 * std::min(parts.units, parts.memory).count)};
    return parts;
  }
  parts.units = Seconds{units_of(p, device, p.count, multiprocessors, clock)};
  if (p.convolution && std::min(p.m, p.n) <= 1) {
    const double share = clock * multiprocessors / device.multiprocessors;
    parts.units = std::min(parts.units,
                           Seconds{p.flops().count / (kDirect * share * device.vector_rate.count)});
  }
  parts.work = std::max(parts.units, parts.memory);
  return parts;
}

KernelParts attention_model(const FlashAttention& a, const DeviceProfile& device,
                            int multiprocessors, double clock) {
  KernelParts parts;
  parts.memory = Seconds{memory_time(a.bytes, device)};
  if (!has_tiles(device)) {
    parts.units = Seconds{a.flops().count / device.sustained_rate(a.type).count};
    parts.work = std::max(parts.units, parts.memory);
    return parts;
  }
  double efficiency =
      a.backward ? device.attention_backward_efficiency : device.attention_forward_efficiency;
  if (const double older =
          a.backward ? device.flash2_backward_efficiency : device.flash2_forward_efficiency;
      a.flash > 0 && older > 0)
    efficiency = older;
  if (a.flash == 1) {
    efficiency /= kFlash1;
  } else {
    // What is not multiplied, exponentials above all, takes as long for a score of narrow heads.
    const double usual = a.backward ? 5 * kHead : 2 * kHead;
    const double each = a.backward ? 3 * a.qk + 2 * a.v : a.qk + a.v;
    efficiency = 1 / (1 + std::max(1.0, usual / each) * (1 / efficiency - 1));
  }
  const double rate =
      clock * device.matrix_rate(a.type).count / device.multiprocessors * efficiency;
  // Queries of a block, of which Blackwell's take two tiles at once; backward, keys of a block.
  const double rows = device.compute_capability >= 100 && !a.backward ? 256 : 128;
  // Blocks that a mask cuts are computed whole: half a block more on a row's end.
  const double seen = a.keys * a.attended;
  const double computed = std::min(1 + (a.attended < 1 ? rows / 2 / seen : 0), 1 / a.attended);
  const double flops = a.flops().count * computed;
  const double blocks = a.batch * a.heads * std::ceil((a.backward ? a.keys : a.queries) / rows);
  // The longest block sees all keys; under a causal mask that is twice the mean.
  const double longest = std::min(2 * flops, a.flops().count / a.attended) / blocks;
  parts.units = Seconds{(flops / std::min<double>(blocks, multiprocessors) +
                         (a.backward ? kBackwardTail : kForwardTail) * longest) /
                        rate};
  parts.work = std::max(parts.units, parts.memory);
  return parts;
}

namespace {

/// Of points some of which ran at the sustained clock: what their logarithms are above the level at
/// the other clock, 0 where they ran at that one. `slower`: what the sustained clock costs each by
/// the model. The level is the one (to 1 %) that leaves least to explain.
std::vector<double> slowed(const std::vector<double>& logs, const std::vector<double>& slower) {
  double best = INFINITY, level = 0;
  for (int step = -80; step <= 80; ++step) {
    double sum = 0;
    for (std::size_t i = 0; i < logs.size(); ++i) {
      const double e = logs[i] - 0.01 * step;
      sum += std::min(e * e, square(e - slower[i]));
    }
    if (sum < best) best = sum, level = 0.01 * step;
  }
  std::vector<double> result(logs.size(), 0);
  for (std::size_t i = 0; i < logs.size(); ++i)
    if (logs[i] - level > slower[i] / 2) result[i] = slower[i];
  return result;
}

/// The models by one name.
KernelParts model_of(const Product& p, const DeviceProfile& device, int multiprocessors,
                     double clock) {
  return product_model(p, device, multiprocessors, clock);
}
KernelParts model_of(const FlashAttention& a, const DeviceProfile& device, int multiprocessors,
                     double clock) {
  return attention_model(a, device, multiprocessors, clock);
}

/// The clock that long work keeps, over that of short kernels.
double long_clock(const Product&, const DeviceProfile& device) { return device.sustained_clock; }
double long_clock(const FlashAttention&, const DeviceProfile& device) {
  return device.attention_clock;
}

}  // namespace

struct ShapePrices::State {
  DeviceProfile device;
  Clock which;
  Residuals residuals;
  Residuals attention_residuals;
  std::unordered_map<Product, KernelParts, ShapeHash> products;
  std::unordered_map<FlashAttention, KernelParts, ShapeHash> attentions;

  State(const DeviceProfile& d, Clock c) : device(d), which(c) {
    // Points are compared with the model of the device that they were measured on: the one that
    // this is like, besides its own.
    std::vector<Point> points;
    std::vector<Place> replaced;
    for (const DeviceProfile* on = &d; on != nullptr; on = on->like.get()) {
      for (const ProductTable& t : on->products) {
        for (const ProductTable::Point& x : t.points) {
          Product p{x.m,      x.n,          x.k,       x.count, t.type, t.out,
                    t.layout, t.accumulate, t.grouped, {},      false};
          p.bytes = p.operand_bytes();
          if (t.replaces_nearby) replaced.push_back(place_of(p));
          Point at = point(p, *on, x.time, t.spread, t.mixed_clocks, t.clock);
          at.replaceable = !t.replaces_nearby;
          points.push_back(std::move(at));
        }
      }
    }
    std::erase_if(points, [&](const Point& x) {
      return x.replaceable && std::any_of(replaced.begin(), replaced.end(), [&](const Place& by) {
               return within_an_octave(x.place, by);
             });
    });
    add(points, which, residuals);
    points.clear();
    for (const DeviceProfile* on = &d; on != nullptr; on = on->like.get()) {
      for (const AttentionTable& t : on->attention) {
        for (const AttentionTable::Point& x : t.points) {
          FlashAttention a{x.batch, x.queries, x.keys,     x.heads, x.qk,
                           x.v,     1,         t.backward, t.type,  {}};
          if (t.causal) a.attended = (x.queries + 1) / (2 * x.keys);
          points.push_back(point(a, *on, x.time, t.spread, t.mixed_clocks, 1));
        }
      }
    }
    add(points, which, attention_residuals);
  }

  /// log(measured / model at the clock that it ran at, of most tables that of short kernels), and
  /// what the sustained clock adds to it.
  struct Point {
    Place place;
    double log = 0, slower = 0, spread = 0;
    bool mixed = false;
    bool replaceable = false;
  };
  template <class Shape>
  static Point point(const Shape& shape, const DeviceProfile& measured, Seconds time, double spread,
                     bool mixed, double clock) {
    const auto log_of = [&](double at) {
      return std::log(measured.kernel_latency.count +
                      model_of(shape, measured, measured.multiprocessors, at).work.count);
    };
    const double brief = log_of(clock);
    const double slower = mixed ? log_of(long_clock(shape, measured)) - brief : 0;
    return {place_of(shape), std::log(time.count) - brief, slower, spread, mixed};
  }
  /// For the sustained clock, points that ran at it are taken to the clock of the others.
  static void add(const std::vector<Point>& points, Clock which, Residuals& to) {
    std::vector<double> logs, slower;
    for (const Point& p : points) {
      if (!p.mixed) continue;
      logs.push_back(p.log);
      slower.push_back(p.slower);
    }
    std::vector<double> above(logs.size(), 0);
    if (which == Clock::sustained) above = slowed(logs, slower);
    std::size_t i = 0;
    for (const Point& p : points) to.add(p.place, p.log - (p.mixed ? above[i++] : 0), p.spread);
  }

  /// The model's parts stretched to what the residual makes of the whole; never faster than peak.
  template <class Shape>
  KernelParts price(const Shape& shape, const Residuals& nearby) const {
    const double clock = which == Clock::sustained ? long_clock(shape, device) : 1;
    KernelParts parts = model_of(shape, device, device.multiprocessors, clock);
    if (!has_tiles(device)) return parts;
    const int free = device.multiprocessors - device.communication_multiprocessors;
    if (parts.work.count > 0)
      parts.beside_transfers = model_of(shape, device, free, clock).work.count / parts.work.count;
    const double launch = device.kernel_latency.count;
    const double least = shape.flops().count / device.matrix_rate(shape.type).count;
    const double all = (launch + parts.work.count) * std::exp(nearby.at(place_of(shape)));
    const double work = std::max(all - launch, least);
    if (!(parts.work.count > 0)) return parts;
    const double stretch = work / parts.work.count;
    parts.units = std::min(Seconds{parts.units.count * stretch}, Seconds{work});
    parts.memory = std::min(parts.memory, Seconds{work});
    parts.work = Seconds{work};
    return parts;
  }
};

ShapePrices::ShapePrices(const DeviceProfile& device, Clock clock)
    : state_(new State(device, clock)) {}
ShapePrices::~ShapePrices() = default;
ShapePrices::ShapePrices(ShapePrices&&) noexcept = default;

const KernelParts& ShapePrices::of(const Product& p) {
  const auto [it, fresh] = state_->products.try_emplace(p);
  if (fresh) it->second = state_->price(p, state_->residuals);
  return it->second;
}

const KernelParts& ShapePrices::of(const FlashAttention& a) {
  const auto [it, fresh] = state_->attentions.try_emplace(a);
  if (fresh) it->second = state_->price(a, state_->attention_residuals);
  return it->second;
}

}  // namespace partita
