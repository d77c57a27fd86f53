// validation/collectives.h: published times of NCCL's collectives beside simulator/cost/nccl_time
// (docs/nccl.md, "Beside measurements").
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "simulator/cost/nccl_time.h"
#include "topologies/topology.h"
#include "validation/csv.h"

namespace partita::validation {

/// Two harnesses whose own time curves show: XLA's table generator starts all ranks from one host
/// and reaches less of the bandwidth; torch's benchmark includes a launch from Python.
struct HarnessConstants {
  double xla_per_rank_us = 2, xla_efficiency = .88, torch_us = 20;
};
enum class Harness { nccl_tests, xla, torch };

/// Rows that differ in size only.
struct CollectiveCurve {
  std::string source;  ///< repository
  std::string kind, gpu, library, cluster;
  std::string id;  ///< of its first row
  std::int64_t ranks = 0, nodes = 0;
  Harness harness = Harness::nccl_tests;
  std::optional<nccl::Algorithm> only;  ///< that the run was told to use
  nccl::Communicator communicator;
  std::optional<nccl::Collective> what;           ///< empty: all-to-all, or send and receive
  double links_GBps = 0;                          ///< nominal rate of the busiest link of these
  std::vector<std::pair<double, double>> points;  ///< bytes, measured us; sorted

  std::string name() const;  ///< "all_reduce H100 16 (2 nodes) aws-samples"
};
/// Rows of collectives.csv that print a size, a time or bus bandwidth and the number of GPUs, on
/// machines that the catalogue has. Rows recalled from memory are left out; a row without its nodes
/// but with a network between them too.
std::vector<CollectiveCurve> collective_curves(const CsvTable& table);
/// Without points: a collective of `ranks` on `nodes` of a cluster. `library` and `interconnect` as
/// a row prints them: harness, an algorithm that was forced. InputError for an unknown kind.
CollectiveCurve curve_on(const Topology& cluster, const std::string& kind, std::int64_t ranks,
                         std::int64_t nodes, const std::string& library,
                         const std::string& interconnect);

struct CollectiveConstants {
  nccl::Constants nccl;
  HarnessConstants harness;
};
double predicted_us(const CollectiveCurve& curve, double bytes, const CollectiveConstants& k);

/// The constants of least mean |ln(predicted / measured)|, each held towards its start by 0.1 times
/// its squared logarithm; coordinate descent. Points below `least_bytes` don't count; XLA's below 2
/// MiB count 0.3, for they scatter.
CollectiveConstants fit_constants(const std::vector<const CollectiveCurve*>& curves,
                                  const CollectiveConstants& start, double least_bytes);

/// Of one point, (predicted - measured) / measured.
struct CollectiveError {
  const CollectiveCurve* curve = nullptr;
  double bytes = 0;
  double in_sample = 0;       ///< constants as they stand in the simulator
  double without_curve = 0;   ///< constants fitted to all curves but this
  double without_source = 0;  ///< to all curves of other sources
  double estimate = 0;        ///< NCCL's own
  double alpha_beta = 0;  ///< latency + bytes on the wire / bandwidth, fitted to all other curves
                          ///< of one node, or of several
};
std::vector<CollectiveError> collective_errors(const std::vector<CollectiveCurve>& curves,
                                               double least_bytes = 65536);

struct ErrorFigures {
  std::size_t points = 0;
  double median = 0, mean = 0, ninety = 0;  ///< of the errors' sizes
  double bias = 0;
};
ErrorFigures figures_of(const std::vector<double>& errors);

/// The figures as a table: all, one node, several, then by curve.
std::string collective_report(const std::vector<CollectiveError>& errors);

}  // namespace partita::validation
