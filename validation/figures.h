// validation/figures.h: what a suite of measured cases says of the predictions, as a whole
// (docs/calibration.md, "What is compared").
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace partita::validation {

/// One case, measured and predicted; noise and errors as fractions, times in seconds.
struct CaseFigures {
  std::string name, network;
  std::int64_t ranks = 1;
  double predicted = 0, measured = 0, noise = 0;
  double flops = 0;  ///< of the rank that has most
  /// Of compute instructions alone; 0 where ranks meet.
  double compute_predicted = 0, compute_measured = 0, compute_noise = 0;
  double error() const { return (predicted - measured) / measured; }
};

/// Cases under one bound.
struct GroupFigures {
  std::string name;
  int cases = 0;
  double mean_error = 0;  ///< of the errors' sizes
  double bias = 0;        ///< of the errors
  double noise = 0;       ///< mean
  double bound = 0, bias_bound = 0;  ///< of the bias; 0: none
  /// Mean error of the dullest prediction: FLOPs at one rate, fitted to these very cases (the
  /// geometric mean of theirs).
  double baseline = 0;
  bool biased() const { return bias_bound > 0 && (bias > bias_bound || bias < -bias_bound); }
  bool missed() const { return mean_error > bound || biased(); }
};
/// Of a host: compute alone on one rank (bound 7 %); steps on one and two ranks (the larger of 10 %
/// and twice the noise); steps on more (of 25 % and three times the noise). Of a GPU, whose ranks
/// have no host's cores to share: compute alone and steps on one rank (3 %, bias within 1 %); steps
/// on more as a host's. Groups without cases are left out.
std::vector<GroupFigures> groups_of(const std::vector<CaseFigures>& cases, bool gpu = false);

/// Kendall's tau of plans that can stand for each other: of one network.
struct OrderFigures {
  std::string network;  ///< empty: all cases
  int cases = 0;
  std::int64_t pairs = 0;  ///< further apart than their noise
  double tau = 1;          ///< 1 where there are none
};
/// One for each network with two cases or more, in the order of the cases; all cases together last.
std::vector<OrderFigures> orders_of(const std::vector<CaseFigures>& cases);

/// Of a quantity that was measured in several rounds, each with its noise within: the median round,
/// and as noise the median within, or half of how far the rounds are apart where that is more.
std::pair<double, double> over_rounds(const std::vector<double>& rounds,
                                      const std::vector<double>& within);

/// Share of concordant minus discordant pairs among those whose measured times differ by more than
/// the larger of their noises (Kendall's tau); 1 if there is none.
double kendall_tau(const std::vector<double>& predicted, const std::vector<double>& measured,
                   const std::vector<double>& noise);

/// Cases by index that are predicted in the wrong order: the first was faster. Those that lie
/// furthest apart first.
std::vector<std::pair<std::size_t, std::size_t>> discordant(const std::vector<CaseFigures>& cases);

}  // namespace partita::validation
