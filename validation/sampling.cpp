#include "validation/sampling.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>

#include "base/error.h"

namespace partita::validation {
namespace {

KernelShape shape_of(const std::string& kernel, const KernelPoint& p) {
  return {kernel, p.m, p.n, p.k, p.count, p.bytes};
}

/// In factors of two.
double distance(const KernelShape& s, const KernelPoint& p) {
  const auto apart = [](double a, double b) {
    return std::abs(std::log2(std::max(a, 1.0) / std::max(b, 1.0)));
  };
  if (!s.product()) return apart(s.bytes, p.bytes);
  return apart(s.m, p.m) + apart(s.n, p.n) + apart(s.k, p.k) + apart(s.count, p.count) / 2;
}

}  // namespace

std::vector<KernelShape> shapes_of(const Program& p) {
  std::set<std::tuple<std::string, double, double, double, double, double>> seen;
  std::vector<KernelShape> all;
  for (const BlockCall& call : p.stages.at(0)) {
    for (const Instruction& i : p.blocks[call.block.index()].instructions) {
      if (i.kind != Kind::compute && i.kind != Kind::slice) continue;
      const KernelShape s = partita::shape_of(p, i, 0);
      if (!s.kernel.empty() && seen.insert({s.kernel, s.m, s.n, s.k, s.count, s.bytes}).second)
        all.push_back(s);
    }
  }
  return all;
}

double doubt(const KernelTable& table, const KernelShape& s, int multiprocessors, int ranks) {
  const auto found = table.find(s.kernel);
  if (found == table.end() || found->second.empty()) return 1;
  const auto& points = found->second;
  std::size_t nearest = 0;
  for (std::size_t k = 1; k < points.size(); ++k) {
    if (distance(s, points[k]) < distance(s, points[nearest])) nearest = k;
  }
  const double apart = distance(s, points[nearest]);
  if (apart == 0) return 0;
  double changes = 0;
  if (points.size() > 1) {
    KernelTable without{{s.kernel, points}};
    auto& rest = without.begin()->second;
    rest.erase(rest.begin() + static_cast<std::ptrdiff_t>(nearest));
    const auto with = measured_time(table, s, ranks, multiprocessors),
               less = measured_time(without, s, ranks, multiprocessors);
    if (with && less) changes = std::abs(std::log2(with->count / less->count));
  }
  return changes + apart / 20;
}

std::size_t next_candidate(const KernelTable& table,
                           const std::vector<std::vector<KernelShape>>& candidates,
                           int multiprocessors) {
  PARTITA_ASSERT(!candidates.empty(), "nothing to choose from");
  std::size_t best = 0;
  double most = -1;
  for (std::size_t c = 0; c < candidates.size(); ++c) {
    double sum = 0;
    for (const KernelShape& s : candidates[c]) sum += doubt(table, s, multiprocessors);
    const double mean = candidates[c].empty() ? 0 : sum / static_cast<double>(candidates[c].size());
    if (mean > most) most = mean, best = c;
  }
  return best;
}

KernelTable take_held_out(KernelTable& table) {
  KernelTable held;
  for (auto& [kernel, points] : table) {
    if (kernel.rfind("copy", 0) == 0) continue;
    const auto shape = [](const KernelPoint& p) {
      const double size = p.m > 0 ? p.m * p.n * p.k * p.count : p.bytes;
      return std::tuple{size, p.m, p.n, p.k, p.count, p.bytes};
    };
    std::set<decltype(shape(points[0]))> shapes;
    for (const KernelPoint& p : points) shapes.insert(shape(p));
    std::set<decltype(shape(points[0]))> out;
    std::size_t k = 0;
    for (const auto& s : shapes) {
      // Where the largest's turn is, it is the one's before.
      const bool last = k + 1 == shapes.size(), before_last = k + 2 == shapes.size();
      if (k % 2 == 1 ? !last : before_last) out.insert(s);
      ++k;
    }
    const auto rest =
        std::stable_partition(points.begin(), points.end(),
                              [&](const KernelPoint& p) { return !out.contains(shape(p)); });
    if (rest != points.end()) held[kernel].assign(rest, points.end());
    points.erase(rest, points.end());
  }
  return held;
}

std::vector<Judged> judge(const KernelTable& table, const KernelTable& held, int multiprocessors,
                          int ranks) {
  std::vector<Judged> all;
  Judged whole;
  whole.kernel = "all";
  const auto add = [](Judged& h, double error) {
    ++h.points;
    h.mean += std::abs(error);
    h.bias += error;
    h.most = std::max(h.most, std::abs(error));
  };
  const auto settle = [](Judged& h) {
    h.mean /= static_cast<double>(h.points);
    h.bias /= static_cast<double>(h.points);
  };
  for (const auto& [kernel, points] : held) {
    Judged one;
    one.kernel = kernel;
    for (const KernelPoint& p : points) {
      const auto predicted = measured_time(table, shape_of(kernel, p), ranks, multiprocessors);
      if (!predicted) continue;
      const double error = (predicted->count - p.time.count) / p.time.count;
      add(one, error);
      add(whole, error);
    }
    if (one.points == 0) continue;
    settle(one);
    all.push_back(one);
  }
  if (whole.points > 0) settle(whole);
  all.push_back(whole);
  return all;
}

bool missed(const std::vector<Judged>& held) {
  return !held.empty() && held.back().points > 0 && held.back().mean > kHeldOutBound;
}

}  // namespace partita::validation
