#include "validation/statistics.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace partita::validation {
namespace {

using Kind = Figure::Kind;

std::vector<const Figure*> of_kind(const std::vector<Figure>& figures, Kind kind) {
  std::vector<const Figure*> all;
  for (const Figure& f : figures) {
    if (f.kind == kind && !f.from_memory) all.push_back(&f);
  }
  return all;
}

/// Value at a fraction of the sorted values, between neighbours by distance.
double quantile(std::vector<double> values, double fraction) {
  std::sort(values.begin(), values.end());
  const double at = fraction * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const auto above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}

void rank(const std::vector<const Figure*>& figures, bool time, ErrorStatistics& s) {
  std::map<std::string, std::vector<const Figure*>> groups;
  for (const Figure* f : figures) groups[f->group].push_back(f);
  std::int64_t pairs = 0, pairs_apart = 0, score = 0, score_apart = 0, contests = 0;
  double regret = 0;
  const auto predicted = [](const Figure& f) { return f.predicted / f.samples; };
  const auto measured = [](const Figure& f) { return f.measured / f.samples; };
  for (const auto& [name, members] : groups) {
    if (name.empty() || members.size() < 2) continue;
    for (std::size_t i = 0; i < members.size(); ++i) {
      for (std::size_t j = i + 1; j < members.size(); ++j) {
        const double m = measured(*members[i]) - measured(*members[j]);
        const double p = predicted(*members[i]) - predicted(*members[j]);
        if (m == 0) continue;
        const int agree = p == 0 ? 0 : (m > 0) == (p > 0) ? 1 : -1;
        ++pairs;
        score += agree;
        if (std::abs(m) <= 0.05 * std::min(measured(*members[i]), measured(*members[j]))) continue;
        ++pairs_apart;
        score_apart += agree;
      }
    }
    const auto by = [](auto value) {
      return [value](const Figure* a, const Figure* b) { return value(*a) < value(*b); };
    };
    const Figure* chosen = *std::min_element(members.begin(), members.end(), by(predicted));
    const Figure* best = *std::min_element(members.begin(), members.end(), by(measured));
    regret += measured(*chosen) / measured(*best) - 1;
    ++contests;
  }
  if (pairs > 0) s.kendall_tau = static_cast<double>(score) / static_cast<double>(pairs);
  if (pairs_apart > 0)
    s.kendall_tau_apart = static_cast<double>(score_apart) / static_cast<double>(pairs_apart);
  if (time && contests > 0) s.regret = regret / static_cast<double>(contests);
}

/// One efficiency for all: of the figures of other models.
std::optional<double> baseline(const std::vector<const Figure*>& figures) {
  std::map<std::string, std::pair<double, std::int64_t>> logs;  // of one model: sum, count
  double total = 0;
  std::int64_t count = 0;
  for (const Figure* f : figures) {
    if (!(f->ideal > 0)) continue;
    const double l = std::log(f->measured / f->ideal);
    auto& own = logs[f->model];
    own.first += l, ++own.second;
    total += l, ++count;
  }
  double sum = 0;
  std::int64_t predicted = 0;
  for (const Figure* f : figures) {
    if (!(f->ideal > 0)) continue;
    const auto& [own, members] = logs[f->model];
    if (members == count) continue;  // nothing is left to fit on
    const double slowdown = std::exp((total - own) / static_cast<double>(count - members));
    sum += std::abs(f->ideal * slowdown - f->measured) / f->measured;
    ++predicted;
  }
  if (predicted == 0) return std::nullopt;
  return sum / static_cast<double>(predicted);
}

ErrorStatistics errors_of(const std::vector<const Figure*>& figures, bool time) {
  ErrorStatistics s;
  s.count = static_cast<std::int64_t>(figures.size());
  if (figures.empty()) return s;
  double bias = 0, mean = 0, largest = 0;
  std::vector<double> absolute;
  for (const Figure* f : figures) {
    const double e = f->error();
    bias += e;
    mean += std::abs(e);
    largest = std::max(largest, std::abs(e));
    absolute.push_back(std::abs(e));
  }
  const double n = static_cast<double>(figures.size());
  s.bias = bias / n;
  s.mape = mean / n;
  s.max = largest;
  s.median = quantile(absolute, 0.5);
  s.percentile95 = quantile(absolute, 0.95);
  rank(figures, time, s);
  if (time) s.baseline_mape = baseline(figures);
  return s;
}

std::vector<TermResidual> residual_of(const std::vector<const Figure*>& figures) {
  std::map<std::string, TermResidual> terms;
  for (const Figure* f : figures) {
    for (const auto& [term, share] : f->shares) terms[term].term = term;
  }
  std::vector<const Figure*> with;
  for (const Figure* f : figures) {
    if (!f->shares.empty()) with.push_back(f);
  }
  const double n = static_cast<double>(with.size());
  std::vector<TermResidual> all;
  for (auto& [name, t] : terms) {
    double x = 0, y = 0, xx = 0, yy = 0, xy = 0;
    for (const Figure* f : with) {
      const auto found = f->shares.find(name);
      const double share = found == f->shares.end() ? 0 : found->second, e = f->error();
      x += share, y += e, xx += share * share, yy += e * e, xy += share * e;
    }
    t.share = x / n;
    const double vx = xx - x * x / n, vy = yy - y * y / n;
    t.correlation = vx > 1e-12 && vy > 1e-12 ? (xy - x * y / n) / std::sqrt(vx * vy) : 0;
    all.push_back(t);
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const auto& a, const auto& b) { return a.share > b.share; });
  return all;
}

}  // namespace

FamilyStatistics statistics_of(const std::vector<Figure>& figures) {
  FamilyStatistics s;
  const auto time = of_kind(figures, Kind::time);
  s.time = errors_of(time, true);
  s.memory = errors_of(of_kind(figures, Kind::memory), false);
  s.scaling = errors_of(of_kind(figures, Kind::scaling), false);
  for (const Figure* f : of_kind(figures, Kind::fits)) {
    const bool fits = f->predicted > 0.5, did = f->measured > 0.5;
    ++(did    ? fits ? s.fits.true_fits : s.fits.false_oom
       : fits ? s.fits.false_fits
              : s.fits.true_oom);
  }
  s.residual = residual_of(time);
  return s;
}

}  // namespace partita::validation
