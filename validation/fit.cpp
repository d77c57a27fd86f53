#include "validation/fit.h"

#include <fmt/format.h>

#include <Eigen/Dense>
#include <algorithm>
#include <boost/math/distributions/students_t.hpp>
#include <cmath>
#include <map>
#include <numeric>
#include <optional>
#include <set>

#include "base/error.h"

namespace partita::validation {
namespace {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;

constexpr double kKnee = 1.5;  // Huber's
constexpr double kConfidence = 0.9;
constexpr std::size_t kEnough = 9;  // witnesses of which nine tenths are one but the largest
constexpr int kSteps = 40, kNoiseRounds = 20;
constexpr double kFar = 1e3;        // no bound of an offset
constexpr double kTogether = 1e-4;  // below which groups are not off together

double huber_weight(double x) { return std::abs(x) <= kKnee ? 1 : kKnee / std::abs(x); }
double huber(double x) {
  return std::abs(x) <= kKnee ? x * x : 2 * kKnee * std::abs(x) - kKnee * kKnee;
}

class Fitter {
 public:
  explicit Fitter(const FitProblem& problem) : problem_(problem) {
    physical_ = static_cast<Eigen::Index>(problem.parameters.size());
    find_offsets();
    const auto n = physical_ + offsets_;
    prior_.resize(n), low_.resize(n), high_.resize(n), believed_.resize(n);
    prior_.tail(offsets_).setZero();
    low_.tail(offsets_).setConstant(-kFar), high_.tail(offsets_).setConstant(kFar);
    for (Eigen::Index k = 0; k < physical_; ++k) {
      const FitParameter& p = problem.parameters[static_cast<std::size_t>(k)];
      PARTITA_ASSERT(p.lowest <= p.prior && p.prior <= p.highest && p.believed > 0 &&
                         (!p.positive || p.lowest > 0),
                     fmt::format("{}: {} in {} to {}", p.name, p.prior, p.lowest, p.highest));
      prior_[k] = inner(p, p.prior), low_[k] = inner(p, p.lowest), high_[k] = inner(p, p.highest);
      believed_[k] = p.believed;
    }
    all_.resize(problem.measured.size());
    std::iota(all_.begin(), all_.end(), std::size_t{0});
    log_measured_.resize(static_cast<Eigen::Index>(all_.size()));
    for (std::size_t i = 0; i < all_.size(); ++i)
      log_measured_[static_cast<Eigen::Index>(i)] = std::log(problem.measured[i]);
  }

  Fit run() {
    Fit out;
    const Vector unfitted = log_times(prior_, all_);
    Vector phi = prior_, times = unfitted;
    double noise = problem_.fixed_noise;
    if (noise == 0) noise = std::max(problem_.smallest_noise, spread(times - log_measured_, 0));
    believed_.tail(offsets_).setConstant(noise);
    Matrix jacobian = jacobian_at(phi, times);
    for (int round = 0; round < kNoiseRounds; ++round) {
      solve(phi, times, jacobian, noise);
      if (problem_.fixed_noise > 0) break;
      const Matrix c = curvature(jacobian, times - log_measured_, noise, phi).inverse();
      const double next =
          std::max(problem_.smallest_noise, spread(times - log_measured_, determined(c)));
      const double shared = together(phi, c);
      const bool still = std::abs(next - noise) <= 1e-3 * noise &&
                         std::abs(shared - together_) <= 1e-3 * together_;
      noise = next;
      together_ = shared;
      believed_.tail(offsets_).setConstant(shared);
      if (still) break;
    }
    if (stale_) {
      jacobian = jacobian_at(phi, times);
      stale_ = false;
      solve(phi, times, jacobian, noise);
    }
    const Matrix whole = curvature(jacobian, times - log_measured_, noise, phi).inverse();
    const Matrix covariance = whole.topLeftCorner(physical_, physical_);

    for (std::size_t k = 0; k < problem_.parameters.size(); ++k) {
      const auto x = static_cast<Eigen::Index>(k);
      FittedParameter p;
      p.value = outer(problem_.parameters[k], phi[x]);
      p.standard_error = std::sqrt(covariance(x, x));
      p.determined = p.standard_error < believed_[x] / 2;
      p.at_bound = phi[x] <= low_[x] || phi[x] >= high_[x];
      out.parameters.push_back(p);
    }
    // Of a group that comes anew.
    out.noise = offsets_ > 0 ? std::hypot(noise, together_) : noise;
    out.noise_within = noise;
    out.covariance.assign(covariance.data(), covariance.data() + covariance.size());
    for (std::size_t i = 0; i < all_.size(); ++i) {
      const auto x = static_cast<Eigen::Index>(i);
      out.unfitted.push_back(std::exp(unfitted[x]));
      out.fitted.push_back(std::exp(times[x] - offset(phi, i)));
      for (Eigen::Index k = 0; k < physical_; ++k) out.sensitivity.push_back(jacobian(x, k));
    }
    hold_out(phi, times, jacobian, noise, covariance, out);
    out.predictions = predictions_;
    return out;
  }

  std::vector<double> sensitivities(const std::vector<double>& values, std::size_t count) {
    Vector phi = prior_;
    for (Eigen::Index k = 0; k < physical_; ++k) {
      const auto x = static_cast<std::size_t>(k);
      phi[k] = inner(problem_.parameters[x], values[x]);
    }
    std::vector<std::size_t> rows(count);
    std::iota(rows.begin(), rows.end(), std::size_t{0});
    const Matrix j = jacobian_at(phi, log_times(phi, rows), rows);
    std::vector<double> all;
    for (Eigen::Index i = 0; i < j.rows(); ++i) {
      for (Eigen::Index k = 0; k < physical_; ++k) all.push_back(j(i, k));
    }
    return all;
  }

 private:
  static double inner(const FitParameter& p, double value) {
    return p.positive ? std::log(value) : value;
  }
  static double outer(const FitParameter& p, double phi) {
    return p.positive ? std::exp(phi) : phi;
  }

  /// A group with several rows may be off as a whole: one more parameter, of prior 0.
  void find_offsets() {
    offset_of_.assign(problem_.measured.size(), -1);
    if (!problem_.groups_off_together || problem_.fixed_noise > 0) return;
    std::map<std::size_t, std::vector<std::size_t>> rows;
    for (std::size_t i = 0; i < problem_.group.size(); ++i) rows[problem_.group[i]].push_back(i);
    // Else what groups have in common can't be told from what is each row's own.
    if (rows.size() < 3 || problem_.group.size() < 3 * rows.size()) return;
    for (const auto& [id, of_group] : rows) {
      for (const std::size_t i : of_group) offset_of_[i] = offsets_;
      ++offsets_;
    }
  }
  Eigen::Index offset_index(std::size_t row) const {
    return row < offset_of_.size() ? offset_of_[row] : -1;
  }
  double offset(const Vector& phi, std::size_t row) const {
    const Eigen::Index k = offset_index(row);
    return k < 0 ? 0 : phi[physical_ + k];
  }
  /// How far groups are off, from how far these are and how much their rows say of it (MacKay,
  /// Neural Computation 4, 1992: the evidence's maximum).
  double together(const Vector& phi, const Matrix& covariance) const {
    if (offsets_ == 0) return 0;
    double said = 0;
    for (Eigen::Index k = physical_; k < phi.size(); ++k)
      said += std::max(0.0, 1 - covariance(k, k) / (believed_[k] * believed_[k]));
    const auto count = static_cast<double>(offsets_);
    return std::max(kTogether, spread(phi.tail(offsets_), count - said, 1e-9));
  }

  Vector log_times(const Vector& phi, const std::vector<std::size_t>& rows) {
    std::vector<double> values;
    for (Eigen::Index k = 0; k < physical_; ++k)
      values.push_back(outer(problem_.parameters[static_cast<std::size_t>(k)], phi[k]));
    const auto times = problem_.predict(values, rows);
    PARTITA_ASSERT(times.size() == rows.size(), "a time for each row");
    predictions_ += rows.size();
    Vector logs(static_cast<Eigen::Index>(times.size()));
    for (std::size_t i = 0; i < times.size(); ++i) {
      PARTITA_ASSERT(times[i] > 0 && std::isfinite(times[i]),
                     fmt::format("row {} is predicted to take {} s", rows[i], times[i]));
      logs[static_cast<Eigen::Index>(i)] = std::log(times[i]) + offset(phi, rows[i]);
    }
    return logs;
  }

  /// Forward differences, away from the bound that is nearer.
  Matrix jacobian_at(const Vector& phi, const Vector& times) {
    return jacobian_at(phi, times, all_);
  }
  Matrix jacobian_at(const Vector& phi, const Vector& times, const std::vector<std::size_t>& rows) {
    Matrix j(times.size(), phi.size());
    j.rightCols(offsets_).setZero();
    for (std::size_t i = 0; i < rows.size(); ++i) {
      if (const auto k = offset_index(rows[i]); k >= 0)
        j(static_cast<Eigen::Index>(i), physical_ + k) = 1;
    }
    for (Eigen::Index k = 0; k < physical_; ++k) {
      const double step = 0.05 * std::min(believed_[k], high_[k] - low_[k]);
      if (step == 0) {
        j.col(k).setZero();
        continue;
      }
      Vector moved = phi;
      moved[k] += high_[k] - phi[k] >= step ? step : -step;
      j.col(k) = (log_times(moved, rows) - times) / (moved[k] - phi[k]);
    }
    return j;
  }

  /// Of priors in H: 1 / s², of offsets by their Huber weights.
  Vector prior_weight(const Vector& phi) const {
    Vector w = believed_.array().square().inverse().matrix();
    for (Eigen::Index k = physical_; k < phi.size(); ++k)
      w[k] *= huber_weight(phi[k] / believed_[k]);
    return w;
  }
  /// H: rows, by their weights, and priors.
  Matrix curvature(const Matrix& j, const Vector& residual, double noise, const Vector& phi,
                   const std::vector<char>& out = {}) const {
    Matrix h = prior_weight(phi).asDiagonal();
    for (Eigen::Index i = 0; i < j.rows(); ++i) {
      if (!out.empty() && out[static_cast<std::size_t>(i)] != 0) continue;
      h += j.row(i).transpose() * j.row(i) * (huber_weight(residual[i] / noise) / (noise * noise));
    }
    return h;
  }
  Vector gradient(const Matrix& j, const Vector& residual, double noise, const Vector& phi,
                  const std::vector<char>& out = {}) const {
    Vector g = ((phi - prior_).array() * prior_weight(phi).array()).matrix();
    for (Eigen::Index i = 0; i < j.rows(); ++i) {
      if (!out.empty() && out[static_cast<std::size_t>(i)] != 0) continue;
      g += j.row(i).transpose() *
           (huber_weight(residual[i] / noise) * residual[i] / (noise * noise));
    }
    return g;
  }
  double cost(const Vector& phi, const Vector& times, double noise) const {
    double sum = ((phi - prior_).array() / believed_.array()).square().head(physical_).sum();
    for (Eigen::Index k = physical_; k < phi.size(); ++k) sum += huber(phi[k] / believed_[k]);
    for (Eigen::Index i = 0; i < times.size(); ++i)
      sum += huber((times[i] - log_measured_[i]) / noise);
    return sum;
  }

  /// The step that solves (H + damping · diag H) d = -g, parameters at a bound that want to leave
  /// it held there.
  Vector step(const Matrix& h, const Vector& g, const Vector& phi, double damping) const {
    std::vector<Eigen::Index> free;
    for (Eigen::Index k = 0; k < phi.size(); ++k) {
      const bool stuck = (phi[k] <= low_[k] && g[k] > 0) || (phi[k] >= high_[k] && g[k] < 0);
      if (!stuck) free.push_back(k);
    }
    Vector d = Vector::Zero(phi.size());
    if (free.empty()) return d;
    Matrix a = h(free, free);
    a.diagonal() *= 1 + damping;
    const Vector x = a.ldlt().solve(-g(free));
    for (std::size_t k = 0; k < free.size(); ++k) {
      const Eigen::Index at = free[k];
      d[at] = std::clamp(phi[at] + x[static_cast<Eigen::Index>(k)], low_[at], high_[at]) - phi[at];
    }
    return d;
  }

  void solve(Vector& phi, Vector& times, Matrix& jacobian, double noise) {
    double damping = 1e-3, now = cost(phi, times, noise);
    for (int k = 0; k < kSteps; ++k) {
      const Vector residual = times - log_measured_;
      const Vector d = step(curvature(jacobian, residual, noise, phi),
                            gradient(jacobian, residual, noise, phi), phi, damping);
      if ((d.array() / believed_.array()).abs().maxCoeff() < 1e-4) return;
      const Vector next = phi + d;
      const Vector next_times = log_times(next, all_);
      const double then = cost(next, next_times, noise);
      if (then >= now) {
        if (problem_.quick && stale_) {
          jacobian = jacobian_at(phi, times);
          stale_ = false;
          continue;
        }
        damping *= 10;
        if (damping > 1e6) return;
        continue;
      }
      const bool little = now - then < (problem_.quick ? 1e-3 : 1e-6) * now;
      if (problem_.quick) {
        // The smallest change, relative to how far parameters are believed, that says of the step
        // what the rows say.
        Vector scaled = (d.array() / believed_.array().square()).matrix();
        scaled.tail(offsets_).setZero();
        if (const double size = d.dot(scaled); size > 0) {
          jacobian += (next_times - times - jacobian * d) * (scaled.transpose() / size);
          stale_ = true;
        }
      }
      phi = next, times = next_times, now = then;
      damping = std::max(1e-6, damping / 10);
      if (!problem_.quick) jacobian = jacobian_at(phi, times);
      if (little) return;
    }
  }

  double determined(const Matrix& covariance) const {
    double count = 0;
    for (Eigen::Index k = 0; k < physical_; ++k)
      count += std::sqrt(covariance(k, k)) < believed_[k] / 2 ? 1 : 0;
    for (Eigen::Index k = physical_; k < covariance.rows(); ++k)
      count += std::max(0.0, 1 - covariance(k, k) / (believed_[k] * believed_[k]));
    return count;
  }
  /// Root mean square over the degrees of freedom that are left; rows beyond the knee count as at
  /// it.
  static double spread(const Vector& residual, double used, double least = 1) {
    std::vector<double> sizes;
    for (Eigen::Index i = 0; i < residual.size(); ++i) sizes.push_back(std::abs(residual[i]));
    auto sorted = sizes;
    std::nth_element(sorted.begin(),
                     sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2), sorted.end());
    // 1.4826 medians are a standard deviation of normal residuals.
    const double knee = kKnee * 1.4826 * sorted[sorted.size() / 2];
    double sum = 0;
    for (const double x : sizes) sum += std::pow(knee > 0 ? std::min(x, knee) : x, 2);
    return std::sqrt(sum / std::max(least, static_cast<double>(sizes.size()) - used));
  }

  void hold_out(const Vector& phi, const Vector& times, const Matrix& j, double noise,
                const Matrix& covariance, Fit& out) {
    std::map<std::size_t, std::vector<std::size_t>> groups;
    for (std::size_t i = 0; i < problem_.group.size(); ++i) groups[problem_.group[i]].push_back(i);
    std::vector<double> scaled;
    if (groups.size() >= 2) {
      out.held_out.resize(all_.size());
      out.held_out_half_width.resize(all_.size());
      std::vector<double> sizes(all_.size());
      for (const auto& [id, rows] : groups) {
        std::vector<char> held(all_.size(), 0);
        for (const std::size_t i : rows) held[i] = 1;
        Vector at = phi;
        for (int k = 0; k < kSteps; ++k) {
          const Vector residual = times + j * (at - phi) - log_measured_;
          const Vector d = step(curvature(j, residual, noise, at, held),
                                gradient(j, residual, noise, at, held), at, 0);
          at += d;
          if ((d.array() / believed_.array()).abs().maxCoeff() < 1e-6) break;
        }
        const Matrix without =
            curvature(j, times + j * (at - phi) - log_measured_, noise, at, held).inverse();
        const Vector predicted = log_times(at, rows);
        for (std::size_t x = 0; x < rows.size(); ++x) {
          const auto i = static_cast<Eigen::Index>(rows[x]);
          const double log_time = predicted[static_cast<Eigen::Index>(x)] - offset(at, rows[x]);
          out.held_out[rows[x]] = std::exp(log_time);
          const double v =
              std::sqrt(noise * noise + (j.row(i) * without * j.row(i).transpose())(0));
          sizes[rows[x]] = std::abs(log_time - log_measured_[i]) / v;
          out.held_out_half_width[rows[x]] = v;
        }
      }
      for (const auto& [id, rows] : groups) {
        std::vector<double> others;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
          if (problem_.group[i] != id) others.push_back(sizes[i]);
        }
        const double q = quantile_of_sizes(std::move(others), witnesses(id));
        for (const std::size_t i : rows) out.held_out_half_width[i] *= q;
      }
      scaled = std::move(sizes);
    } else {
      for (Eigen::Index i = 0; i < times.size(); ++i) {
        const double v =
            std::sqrt(noise * noise + (j.row(i) * covariance * j.row(i).transpose())(0));
        scaled.push_back(std::abs(times[i] - log_measured_[i]) / v);
      }
    }
    out.quantile = quantile_of_sizes(std::move(scaled), witnesses({}));
  }
  /// Configurations that rows of other groups measure.
  std::size_t witnesses(std::optional<std::size_t> but) const {
    std::set<std::size_t> seen;
    for (std::size_t i = 0; i < all_.size(); ++i) {
      if (!but || problem_.group[i] != *but)
        seen.insert(problem_.witness.empty() ? i : problem_.witness[i]);
    }
    return seen.size();
  }

  const FitProblem& problem_;
  Vector prior_, low_, high_, believed_, log_measured_;  ///< parameters, then groups' offsets
  Eigen::Index physical_ = 0, offsets_ = 0;
  std::vector<Eigen::Index> offset_of_;  ///< by row; -1: none
  double together_ = 0;                  ///< standard deviation of offsets
  std::vector<std::size_t> all_;
  std::size_t predictions_ = 0;
  bool stale_ = false;  ///< the Jacobian has been updated since its differences were taken
};

}  // namespace

double quantile_of_sizes(std::vector<double> sizes, std::size_t witnesses) {
  std::sort(sizes.begin(), sizes.end());
  const auto rank = static_cast<std::size_t>(
      std::ceil(kConfidence * static_cast<double>(sizes.size() + 1) - 1e-9));
  const double empirical = sizes[std::min(rank, sizes.size()) - 1];
  if (witnesses >= kEnough) return empirical;
  // Both sides: 90 % lie within the 95th percentiles.
  const boost::math::students_t t(std::max(1.0, static_cast<double>(witnesses) - 1));
  return std::max(empirical, quantile(t, (1 + kConfidence) / 2));
}

double half_width(const std::vector<double>& row, double noise, double quantile,
                  const std::vector<double>& covariance) {
  const std::size_t n = row.size();
  PARTITA_ASSERT(covariance.size() == n * n,
                 fmt::format("{} sensitivities, {} covariances", n, covariance.size()));
  double sum = noise * noise;
  for (std::size_t a = 0; a < n; ++a) {
    for (std::size_t b = 0; b < n; ++b) sum += row[a] * covariance[a * n + b] * row[b];
  }
  return quantile * std::sqrt(sum);
}

double Fit::half_width(const std::vector<double>& row) const {
  return partita::validation::half_width(row, noise, quantile, covariance);
}

std::vector<double> sensitivities(const FitProblem& problem, const std::vector<double>& values,
                                  std::size_t rows) {
  return Fitter(problem).sensitivities(values, rows);
}

Fit fit(const FitProblem& problem) {
  if (problem.measured.empty())
    throw InputError("fit", "there are no measured times; give a row or more");
  for (std::size_t i = 0; i < problem.measured.size(); ++i) {
    if (!(problem.measured[i] > 0) || !std::isfinite(problem.measured[i]))
      throw InputError("fit", fmt::format("measured time {} is {} s; times are positive", i + 1,
                                          problem.measured[i]));
  }
  return Fitter(problem).run();
}

}  // namespace partita::validation
