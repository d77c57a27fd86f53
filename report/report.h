// report/report.h: predictions for people (tables), for programs (JSON) and for Perfetto (traces).
#pragma once

#include <string>
#include <vector>

#include "models/graph.h"
#include "simulator/cost/axes.h"
#include "simulator/search/placement.h"
#include "simulator/search/predict.h"
#include "simulator/search/refine.h"
#include "topologies/topology.h"

namespace partita {

/// The keys of docs/formats.md, one JSON object with a newline. Bytes and seconds are numbers,
/// fractions not percent. Equal inputs give equal text. `assumed`: what the user left open and what
/// stands in for it ("precision bf16"). `placed`: what a search of placements found, or null.
std::string prediction_json(const Graph& graph, const Topology& topology, const Prediction& p,
                            const std::vector<std::string>& assumed = {},
                            const Placements* placed = nullptr);
std::string prediction_table(const Graph& graph, const Topology& topology, const Prediction& p,
                             const std::vector<std::string>& assumed = {},
                             const Placements* placed = nullptr);

/// `beyond`: of a result whose first plan may be a refined one.
std::string search_json(const Graph& graph, const Topology& topology, const SearchResult& r,
                        const std::vector<std::string>& assumed = {}, const Beyond& beyond = {});
std::string search_table(const Graph& graph, const Topology& topology, const SearchResult& r,
                         const std::vector<std::string>& assumed = {}, const Beyond& beyond = {});

/// `operators`: of model_json and model_table, each operator too.
std::string model_json(const Graph& graph, bool operators = false);
/// The names of a catalogue; `what` is the key that lists them.
std::string catalogue_json(const std::string& what, const std::vector<std::string>& names);
std::string model_table(const Graph& graph, bool operators);
/// What of a topology to show beside its parts.
struct TopologyViews {
  std::vector<AxisCrossing> axes;                     ///< what the axes of a mesh cross
  std::vector<std::pair<DeviceId, DeviceId>> routes;  ///< empty: the first ones
  std::vector<LinkId> links;                          ///< one by one; all are there by kind
};
std::string topology_json(const Topology& topology, const TopologyViews& views = {});
std::string topology_table(const Topology& topology, const TopologyViews& views = {});
/// Links of a vertex, or of all whose names begin with `name` and a dot. InputError at `place` for
/// a name that is none, or more than 10,000 links.
std::vector<LinkId> links_of(const Topology& topology, const std::string& name,
                             const std::string& place);

/// Chrome trace events (ui.perfetto.dev): one process per rank class, one thread per stream. Times
/// in microseconds with picosecond digits. Writes the file; InputError if it can't.
void write_trace(const std::string& file, const Program& program, const Timeline& timeline);

/// "tp 8 pp 4 dp 2, micro-batch 1, 1f1b, full recompute, ZeRO-1": a plan in one line.
std::string plan_line(const Plan& plan);
/// Why model FLOPs count more than is computed, in words, where windows of attention slide or
/// utilisation by them passes 1; else "".
std::string mfu_remark(const Graph& graph, const Prediction& prediction);

/// "innermost first tp,dp, rings of dp by 1, 2": where ranks lie and how rings go; "" as ranked.
std::string placement_line(const Plan& plan);

/// Left-aligned first column, right-aligned others, two blanks between.
std::string align(const std::vector<std::vector<std::string>>& rows);

}  // namespace partita
