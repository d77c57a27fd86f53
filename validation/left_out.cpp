#include "validation/left_out.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "simulator/cost/kernels.h"

namespace partita::validation {
namespace {

using Key = std::vector<double>;

/// One measured point, whichever table it is from.
struct Sample {
  bool attention = false;
  std::size_t table = 0, point = 0;
  Key problem, pair;
  double depth = 0, rows = 0;
  double measured = 0, flops = 0, bytes = 0;
};

Product product_of(const ProductTable& t, const ProductTable::Point& x) {
  Product p{x.m, x.n, x.k, x.count, t.type, t.out, t.layout, t.accumulate, t.grouped, {}};
  p.bytes = p.operand_bytes();
  return p;
}
FlashAttention attention_of(const AttentionTable& t, const AttentionTable::Point& x) {
  FlashAttention a{x.batch, x.queries, x.keys, x.heads, x.qk, x.v, 1, t.backward, t.type, {}};
  if (t.causal) a.attended = (x.queries + 1) / (2 * x.keys);
  return a;
}

std::vector<Sample> samples_of(const DeviceProfile& d) {
  std::vector<Sample> all;
  for (std::size_t t = 0; t < d.products.size(); ++t) {
    for (std::size_t k = 0; k < d.products[t].points.size(); ++k) {
      const auto& x = d.products[t].points[k];
      const Product p = product_of(d.products[t], x);
      Sample s{false,           t, k, {x.m, x.n, x.k}, {x.n, x.k}, x.k, x.m, x.time.count,
               p.flops().count, 0};
      std::sort(s.problem.begin(), s.problem.end());
      s.bytes = static_cast<double>(p.bytes.count);
      all.push_back(std::move(s));
    }
  }
  for (std::size_t t = 0; t < d.attention.size(); ++t) {
    for (std::size_t k = 0; k < d.attention[t].points.size(); ++k) {
      const auto& x = d.attention[t].points[k];
      const FlashAttention a = attention_of(d.attention[t], x);
      all.push_back({true,
                     t,
                     k,
                     {x.batch, x.queries, x.keys, x.heads, x.qk, x.v},
                     {x.heads, x.qk, x.v},
                     x.keys,
                     x.heads,
                     x.time.count,
                     a.flops().count,
                     0});
    }
  }
  return all;
}

/// Sets of samples to leave out, one after the other. Products and attentions have their own, side
/// by side.
std::vector<std::vector<char>> draws_of(const std::vector<Sample>& all, LeftOut rule) {
  const auto key = [&](const Sample& s) {
    switch (rule) {
      case LeftOut::half:
        return s.problem;
      case LeftOut::pairs:
        return s.pair;
      case LeftOut::depth:
        return Key{s.depth};
      case LeftOut::rows:
        return Key{s.rows};
    }
    return Key{};
  };
  std::vector<std::vector<char>> draws;
  for (const bool attention : {false, true}) {
    std::set<Key> distinct;
    for (const Sample& s : all)
      if (s.attention == attention) distinct.insert(key(s));
    if (distinct.size() < 2) continue;  // nothing would be left
    std::vector<Key> keys(distinct.begin(), distinct.end());
    const std::size_t rounds = rule == LeftOut::half || rule == LeftOut::pairs ? 8 : keys.size();
    std::mt19937_64 random(1);
    const auto shuffle = [&] {
      for (std::size_t i = keys.size(); i > 1; --i) std::swap(keys[i - 1], keys[random() % i]);
    };
    if (rule == LeftOut::pairs) shuffle();
    for (std::size_t r = 0; r < rounds; ++r) {
      std::set<Key> out;
      if (rule == LeftOut::half) {
        shuffle();
        out.insert(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(keys.size() / 2));
      } else {
        for (std::size_t i = r; i < keys.size(); i += rounds) out.insert(keys[i]);
      }
      std::vector<char> draw(all.size(), 0);
      for (std::size_t i = 0; i < all.size(); ++i)
        draw[i] = all[i].attention == attention && out.count(key(all[i])) > 0;
      draws.push_back(std::move(draw));
    }
  }
  return draws;
}

double median_of(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

ShapeErrors figures_of(std::vector<double> errors) {
  if (errors.empty()) return {};
  std::sort(errors.begin(), errors.end());
  double sum = 0;
  for (const double e : errors) sum += e;
  const auto n = errors.size();
  return {errors[n / 2], sum / static_cast<double>(n),
          errors[std::min(n - 1, static_cast<std::size_t>(0.95 * static_cast<double>(n)))]};
}

double steps_of_calculon(double flops, double bytes, double peak, double bandwidth) {
  const auto step = [](double x, std::array<std::pair<double, double>, 4> steps) {
    for (const auto& [from, efficiency] : steps)
      if (x >= from) return efficiency;
    return steps.back().second;
  };
  const double units = step(flops / 1e9, {{{128, 0.95}, {16, 0.9}, {1, 0.6}, {0, 0.1}}});
  const double memory = step(bytes / 1e6, {{{100, 0.9}, {10, 0.75}, {1, 0.6}, {0, 0.3}}});
  return flops / (peak * units) + bytes / (bandwidth * memory);
}

std::string kernel_of(const DeviceProfile& d, const Sample& s) {
  if (s.attention)
    return d.attention[s.table].backward ? "attention backward" : "attention forward";
  const ProductTable& t = d.products[s.table];
  return fmt::format("{} {}{}{}", name(t.type), name(t.layout),
                     t.accumulate ? fmt::format(" + {}", name(t.out)) : "",
                     t.grouped ? " grouped" : "");
}

struct Errors {
  std::set<std::size_t> points;
  std::vector<double> price, model, steps, one_rate;
};

}  // namespace

std::string_view name(LeftOut rule) {
  switch (rule) {
    case LeftOut::half:
      return "half";
    case LeftOut::pairs:
      return "pairs";
    case LeftOut::depth:
      return "depth";
    case LeftOut::rows:
      return "rows";
  }
  return "";
}

std::vector<LeftOutFigures> left_out(const DeviceProfile& device, LeftOut rule) {
  const std::vector<Sample> all = samples_of(device);
  std::vector<std::string> order;
  std::map<std::string, Errors> by_kernel;
  for (const bool attention : {false, true}) {
    for (const Sample& s : all) {
      if (s.attention != attention) continue;
      const std::string kernel = kernel_of(device, s);
      if (by_kernel.try_emplace(kernel).second) order.push_back(kernel);
    }
  }
  const double launch = device.kernel_latency.count;
  const auto model_of = [&](const Sample& s) {
    const KernelParts parts =
        s.attention ? attention_model(attention_of(device.attention[s.table],
                                                   device.attention[s.table].points[s.point]),
                                      device, device.multiprocessors)
                    : product_model(product_of(device.products[s.table],
                                               device.products[s.table].points[s.point]),
                                    device, device.multiprocessors);
    return launch + parts.work.count;
  };
  for (const auto& draw : draws_of(all, rule)) {
    DeviceProfile kept = device;
    for (auto& t : kept.products) t.points.clear();
    for (auto& t : kept.attention) t.points.clear();
    std::map<std::string, std::vector<double>> rates, levels;
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (draw[i]) continue;
      const Sample& s = all[i];
      const std::string kernel = kernel_of(device, s);
      rates[kernel].push_back(s.flops / s.measured);
      levels[kernel].push_back(s.measured / model_of(s));
      if (s.attention) {
        kept.attention[s.table].points.push_back(device.attention[s.table].points[s.point]);
      } else {
        kept.products[s.table].points.push_back(device.products[s.table].points[s.point]);
      }
    }
    ShapePrices prices(kept, Clock::brief);
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (!draw[i]) continue;
      const Sample& s = all[i];
      const std::string kernel = kernel_of(device, s);
      if (rates[kernel].empty()) continue;
      const KernelParts parts =
          s.attention ? prices.of(attention_of(device.attention[s.table],
                                               device.attention[s.table].points[s.point]))
                      : prices.of(product_of(device.products[s.table],
                                             device.products[s.table].points[s.point]));
      const ElementType type =
          s.attention ? device.attention[s.table].type : device.products[s.table].type;
      Errors& e = by_kernel[kernel];
      e.points.insert(i);
      const auto error = [&](double t) { return std::abs(t / s.measured - 1); };
      e.price.push_back(error(launch + parts.work.count));
      e.model.push_back(error(model_of(s) * median_of(levels[kernel])));
      e.steps.push_back(error(steps_of_calculon(s.flops, s.bytes, device.matrix_rate(type).count,
                                                device.memory_bandwidth.count)));
      e.one_rate.push_back(error(s.flops / median_of(rates[kernel])));
    }
  }
  std::vector<LeftOutFigures> out;
  const auto add = [&](const std::string& kernel, const Errors& e) {
    if (!e.points.empty())
      out.push_back({kernel, e.points.size(), figures_of(e.price), figures_of(e.model),
                     figures_of(e.steps), figures_of(e.one_rate)});
  };
  for (const auto& kernel : order) add(kernel, by_kernel[kernel]);
  for (const bool attention : {false, true}) {
    Errors sum;
    for (const auto& [kernel, e] : by_kernel) {
      if (kernel.starts_with("attention") != attention) continue;
      sum.points.insert(e.points.begin(), e.points.end());
      for (auto [from, to] :
           {std::pair{&e.price, &sum.price}, std::pair{&e.model, &sum.model},
            std::pair{&e.steps, &sum.steps}, std::pair{&e.one_rate, &sum.one_rate}})
        to->insert(to->end(), from->begin(), from->end());
    }
    add(attention ? "all attention" : "all products", sum);
  }
  return out;
}

}  // namespace partita::validation
