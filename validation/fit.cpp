#include "validation/fit.h"

#include <fmt/format.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "base/error.h"

namespace partita::validation {
namespace {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;

constexpr double kKnee = 1.5;  // Huber's
constexpr double kConfidence = 0.9;
constexpr int kSteps = 40, kNoiseRounds = 8;

double huber_weight(double x) { return std::abs(x) <= kKnee ? 1 : kKnee / std::abs(x); }
double huber(double x) {
  return std::abs(x) <= kKnee ? x * x : 2 * kKnee * std::abs(x) - kKnee * kKnee;
}

class Fitter {
 public:
  explicit Fitter(const FitProblem& problem) : problem_(problem) {
    const auto n = static_cast<Eigen::Index>(problem.parameters.size());
    prior_.resize(n), low_.resize(n), high_.resize(n), believed_.resize(n);
    for (Eigen::Index k = 0; k < n; ++k) {
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
    Matrix jacobian = jacobian_at(phi, times);
    double noise = problem_.fixed_noise;
    if (noise == 0) noise = std::max(problem_.smallest_noise, spread(times - log_measured_, 0));
    for (int round = 0; round < kNoiseRounds; ++round) {
      solve(phi, times, jacobian, noise);
      if (problem_.fixed_noise > 0) break;
      const Matrix h = curvature(jacobian, times - log_measured_, noise);
      const double next =
          std::max(problem_.smallest_noise, spread(times - log_measured_, determined(h.inverse())));
      const bool still = std::abs(next - noise) <= 1e-3 * noise;
      noise = next;
      if (still) break;
    }
    if (stale_) {
      jacobian = jacobian_at(phi, times);
      stale_ = false;
      solve(phi, times, jacobian, noise);
    }
    const Matrix covariance = curvature(jacobian, times - log_measured_, noise).inverse();

    const auto n = static_cast<std::size_t>(phi.size());
    for (std::size_t k = 0; k < n; ++k) {
      const auto x = static_cast<Eigen::Index>(k);
      FittedParameter p;
      p.value = outer(problem_.parameters[k], phi[x]);
      p.standard_error = std::sqrt(covariance(x, x));
      p.determined = p.standard_error < believed_[x] / 2;
      p.at_bound = phi[x] <= low_[x] || phi[x] >= high_[x];
      out.parameters.push_back(p);
    }
    out.noise = noise;
    out.covariance.assign(covariance.data(), covariance.data() + covariance.size());
    for (Eigen::Index i = 0; i < times.size(); ++i) {
      out.unfitted.push_back(std::exp(unfitted[i]));
      out.fitted.push_back(std::exp(times[i]));
      for (Eigen::Index k = 0; k < phi.size(); ++k) out.sensitivity.push_back(jacobian(i, k));
    }
    hold_out(phi, times, jacobian, noise, covariance, out);
    out.predictions = predictions_;
    return out;
  }

  std::vector<double> sensitivities(const std::vector<double>& values, std::size_t count) {
    Vector phi(prior_.size());
    for (Eigen::Index k = 0; k < phi.size(); ++k) {
      const auto x = static_cast<std::size_t>(k);
      phi[k] = inner(problem_.parameters[x], values[x]);
    }
    std::vector<std::size_t> rows(count);
    std::iota(rows.begin(), rows.end(), std::size_t{0});
    const Matrix j = jacobian_at(phi, log_times(phi, rows), rows);
    std::vector<double> all;
    for (Eigen::Index i = 0; i < j.rows(); ++i) {
      for (Eigen::Index k = 0; k < j.cols(); ++k) all.push_back(j(i, k));
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

  Vector log_times(const Vector& phi, const std::vector<std::size_t>& rows) {
    std::vector<double> values;
    for (Eigen::Index k = 0; k < phi.size(); ++k)
      values.push_back(outer(problem_.parameters[static_cast<std::size_t>(k)], phi[k]));
    const auto times = problem_.predict(values, rows);
    PARTITA_ASSERT(times.size() == rows.size(), "a time for each row");
    predictions_ += rows.size();
    Vector logs(static_cast<Eigen::Index>(times.size()));
    for (std::size_t i = 0; i < times.size(); ++i) {
      PARTITA_ASSERT(times[i] > 0 && std::isfinite(times[i]),
                     fmt::format("row {} is predicted to take {} s", rows[i], times[i]));
      logs[static_cast<Eigen::Index>(i)] = std::log(times[i]);
    }
    return logs;
  }

  /// Forward differences, away from the bound that is nearer.
  Matrix jacobian_at(const Vector& phi, const Vector& times) {
    return jacobian_at(phi, times, all_);
  }
  Matrix jacobian_at(const Vector& phi, const Vector& times, const std::vector<std::size_t>& rows) {
    Matrix j(times.size(), phi.size());
    for (Eigen::Index k = 0; k < phi.size(); ++k) {
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

  /// H: rows, by their weights, and priors.
  Matrix curvature(const Matrix& j, const Vector& residual, double noise,
                   const std::vector<char>& out = {}) const {
    Matrix h = believed_.array().square().inverse().matrix().asDiagonal();
    for (Eigen::Index i = 0; i < j.rows(); ++i) {
      if (!out.empty() && out[static_cast<std::size_t>(i)] != 0) continue;
      h += j.row(i).transpose() * j.row(i) * (huber_weight(residual[i] / noise) / (noise * noise));
    }
    return h;
  }
  Vector gradient(const Matrix& j, const Vector& residual, double noise, const Vector& phi,
                  const std::vector<char>& out = {}) const {
    Vector g = ((phi - prior_).array() / believed_.array().square()).matrix();
    for (Eigen::Index i = 0; i < j.rows(); ++i) {
      if (!out.empty() && out[static_cast<std::size_t>(i)] != 0) continue;
      g += j.row(i).transpose() *
           (huber_weight(residual[i] / noise) * residual[i] / (noise * noise));
    }
    return g;
  }
  double cost(const Vector& phi, const Vector& times, double noise) const {
    double sum = ((phi - prior_).array() / believed_.array()).square().sum();
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
      const Vector d = step(curvature(jacobian, residual, noise),
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
        const Vector scaled = (d.array() / believed_.array().square()).matrix();
        jacobian += (next_times - times - jacobian * d) * (scaled.transpose() / d.dot(scaled));
        stale_ = true;
      }
      phi = next, times = next_times, now = then;
      damping = std::max(1e-6, damping / 10);
      if (!problem_.quick) jacobian = jacobian_at(phi, times);
      if (little) return;
    }
  }

  double determined(const Matrix& covariance) const {
    double count = 0;
    for (Eigen::Index k = 0; k < covariance.rows(); ++k)
      count += std::sqrt(covariance(k, k)) < believed_[k] / 2 ? 1 : 0;
    return count;
  }
  /// Root mean square over the degrees of freedom that are left; rows beyond the knee count as at
  /// it.
  static double spread(const Vector& residual, double used) {
    std::vector<double> sizes;
    for (Eigen::Index i = 0; i < residual.size(); ++i) sizes.push_back(std::abs(residual[i]));
    auto sorted = sizes;
    std::nth_element(sorted.begin(),
                     sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2), sorted.end());
    // 1.4826 medians are a standard deviation of normal residuals.
    const double knee = kKnee * 1.4826 * sorted[sorted.size() / 2];
    double sum = 0;
    for (const double x : sizes) sum += std::pow(knee > 0 ? std::min(x, knee) : x, 2);
    return std::sqrt(sum / std::max(1.0, static_cast<double>(sizes.size()) - used));
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
          const Vector d = step(curvature(j, residual, noise, held),
                                gradient(j, residual, noise, at, held), at, 0);
          at += d;
          if ((d.array() / believed_.array()).abs().maxCoeff() < 1e-6) break;
        }
        const Matrix without =
            curvature(j, times + j * (at - phi) - log_measured_, noise, held).inverse();
        const Vector predicted = log_times(at, rows);
        for (std::size_t x = 0; x < rows.size(); ++x) {
          const auto i = static_cast<Eigen::Index>(rows[x]);
          const double log_time = predicted[static_cast<Eigen::Index>(x)];
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
        const double q = quantile_of_sizes(std::move(others));
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
    out.quantile = quantile_of_sizes(std::move(scaled));
  }

  const FitProblem& problem_;
  Vector prior_, low_, high_, believed_, log_measured_;
  std::vector<std::size_t> all_;
  std::size_t predictions_ = 0;
  bool stale_ = false;  ///< the Jacobian has been updated since its differences were taken
};

}  // namespace

double quantile_of_sizes(std::vector<double> sizes) {
  std::sort(sizes.begin(), sizes.end());
  const auto rank = static_cast<std::size_t>(
      std::ceil(kConfidence * static_cast<double>(sizes.size() + 1) - 1e-9));
  return sizes[std::min(rank, sizes.size()) - 1];
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
