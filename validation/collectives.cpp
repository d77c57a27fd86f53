#include "validation/collectives.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "base/error.h"
#include "simulator/cost/cost.h"
#include "validation/row_case.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

double number_or(const std::string& text, double otherwise) {
  try {
    return text.empty() ? otherwise : std::stod(text);
  } catch (const std::exception&) {
    return otherwise;
  }
}

struct Kind {
  const char* name;
  std::optional<nccl::Collective> what;
};
const Kind kKinds[] = {{"all_reduce", nccl::Collective::all_reduce},
                       {"all_gather", nccl::Collective::all_gather},
                       {"reduce_scatter", nccl::Collective::reduce_scatter},
                       {"broadcast", nccl::Collective::broadcast},
                       {"reduce", nccl::Collective::reduce},
                       {"all_to_all", {}},
                       {"all2all", {}},
                       {"sendrecv", {}},
                       {"p2p", {}}};

bool is_exchange(const std::string& kind) { return kind == "all_to_all" || kind == "all2all"; }

/// Bytes that a rank sends, for one of the row's.
double wire_share(const std::string& kind, double n) {
  if (kind == "all_reduce") return 2 * (n - 1) / n;
  if (kind == "all_gather" || kind == "reduce_scatter" || is_exchange(kind)) return (n - 1) / n;
  return 1;
}

/// Least `objective` by steps of single coordinates, relative, which shrink.
void descend(const std::vector<double*>& at, const std::function<double()>& objective) {
  double best = objective(), step = .2;
  constexpr int kRounds = 4;
  for (int round = 0; round < kRounds; ++round, step /= 2) {
    for (double* x : at) {
      for (const double sign : {1.0, -1.0}) {
        for (;;) {
          const double before = *x;
          *x = before * (1 + sign * step);
          const double now = objective();
          if (now < best - 1e-6) {
            best = now;
            continue;
          }
          *x = before;
          break;
        }
      }
    }
  }
}

/// The figures that curves decide; the others are assumed.
std::vector<double*> fitted(CollectiveConstants& k) {
  return {&k.harness.xla_per_rank_us,
          &k.harness.xla_efficiency,
          &k.harness.torch_us,
          &k.nccl.nvls_hopper,
          &k.nccl.nvls_blackwell,
          &k.nccl.nvls_domain,
          &k.nccl.nvls_ramp,
          &k.nccl.ring_GBps_per_nvlink,
          &k.nccl.ring_ramp,
          &k.nccl.network,
          &k.nccl.network_ramp,
          &k.nccl.network_ring_ramp,
          &k.nccl.exchange,
          &k.nccl.exchange_ramp,
          &k.nccl.peer_us};
}

double weight_of(const CollectiveCurve& c, double bytes) {
  return c.harness == Harness::xla && bytes < 2 << 20 ? .3 : 1;
}

}  // namespace

std::string CollectiveCurve::name() const {
  return fmt::format("{} {} {}{}{}, {}", kind, gpu, ranks,
                     nodes > 1 ? fmt::format(" ({} nodes)", nodes) : "",
                     only ? fmt::format(" {}", nccl::name(*only)) : "", source);
}

std::vector<CollectiveCurve> collective_curves(const CsvTable& table) {
  std::map<std::string, std::size_t> columns;
  for (std::size_t i = 0; i < table.header.size(); ++i) columns[table.header[i]] = i;
  for (const char* needed : {"id", "collective", "gpu", "num_gpus", "num_nodes", "gpus_per_node",
                             "intra_node_interconnect", "inter_node_interconnect", "library",
                             "size_bytes", "time_us", "busbw_gb_per_s", "from_memory", "source"}) {
    if (columns.count(needed) == 0)
      throw InputError(table.file,
                       fmt::format("there is no column {}; collectives.csv has one", needed));
  }
  const Catalogue catalogue = load_catalogue();
  std::vector<CollectiveCurve> curves;
  std::map<std::string, std::size_t> known;
  std::set<std::string> seen;  // some figures stand in two tables of their source
  for (const auto& r : table.records) {
    const auto cell = [&](const char* name) -> const std::string& {
      return r.fields[columns.at(name)];
    };
    const double size = number_or(cell("size_bytes"), 0);
    const std::string& network = cell("inter_node_interconnect");
    const bool networked = !network.empty() && network != "none";
    if (size < 1 || cell("from_memory") == "yes" || (cell("num_nodes").empty() && networked))
      continue;
    const auto nodes = static_cast<std::int64_t>(number_or(cell("num_nodes"), 1));
    const auto ranks = static_cast<std::int64_t>(number_or(
        cell("num_gpus"), static_cast<double>(nodes) * number_or(cell("gpus_per_node"), 0)));
    const auto kind = std::find_if(std::begin(kKinds), std::end(kKinds),
                                   [&](const Kind& k) { return cell("collective") == k.name; });
    if (ranks < 2 || kind == std::end(kKinds)) continue;
    double us = number_or(cell("time_us"), 0);
    if (us == 0 && number_or(cell("busbw_gb_per_s"), 0) > 0)
      us = size * wire_share(kind->name, static_cast<double>(ranks)) /
           (1000 * number_or(cell("busbw_gb_per_s"), 0));
    if (!(us > 0)) continue;
    const std::string key = fmt::format("{}|{}|{}|{}|{}|{}|{}|{}",
                                        cell("source").substr(0, cell("source").find(" line")),
                                        cell("collective"), cell("gpu"), ranks, nodes,
                                        cell("library"), cell("intra_node_interconnect"), network);
    if (!seen.insert(fmt::format("{}|{}|{}|{}|{}|{}|{}",
                                 cell("source").substr(0, cell("source").find(':')),
                                 cell("collective"), cell("gpu"), ranks,
                                 has(cell("library"), "Ring"), size, us))
             .second)
      continue;
    const auto [at, is_new] = known.try_emplace(key, curves.size());
    if (is_new) {
      std::vector<std::string> assumed;
      const auto per_node = number(cell("gpus_per_node"));
      ClusterChoice cluster;
      try {
        cluster = cluster_of(
            catalogue, cell("gpu"), "", ranks,
            per_node ? std::optional(static_cast<std::int64_t>(*per_node)) : std::nullopt,
            cell("intra_node_interconnect"), networked ? network : "", assumed);
      } catch (const InputError&) {
        known.erase(at);
        continue;  // a device that the catalogue does not have
      }
      CollectiveCurve c = curve_on(load_topology(cluster.topology, cluster.edits), kind->name,
                                   ranks, nodes, cell("library"), cell("intra_node_interconnect"));
      c.source = cell("source").substr(0, cell("source").find(':'));
      c.gpu = cell("gpu");
      c.id = cell("id");
      c.cluster = cluster.topology;
      curves.push_back(std::move(c));
    }
    curves[at->second].points.emplace_back(size, us);
  }
  for (auto& c : curves) std::sort(c.points.begin(), c.points.end());
  return curves;
}

CollectiveCurve curve_on(const Topology& t, const std::string& kind, std::int64_t ranks,
                         std::int64_t nodes, const std::string& library,
                         const std::string& interconnect) {
  const auto known = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& k) {
    return squeezed(kind) == squeezed(k.name);
  });
  if (known == std::end(kKinds))
    throw InputError("collective", fmt::format("'{}' is unknown", kind));
  CollectiveCurve c;
  c.kind = known->name;
  c.what = known->what;
  c.library = library;
  c.ranks = ranks;
  c.nodes = nodes;
  if (has(library, "XLA")) c.harness = Harness::xla;
  if (has(library, "bench.py")) c.harness = Harness::torch;
  // "algo Ring", "NCCL_ALGO=Tree".
  const std::string text = squeezed(library);
  const auto only = [&](const char* word) { return has(text, std::string("algo") + word); };
  if (only("ring") || has(interconnect, " ring")) c.only = nccl::Algorithm::ring;
  if (only("tree")) c.only = nccl::Algorithm::tree;
  if (only("nvls")) c.only = nccl::Algorithm::nvls;
  if (only("nvlstree")) c.only = nccl::Algorithm::nvls_tree;
  std::vector<std::int64_t> all(static_cast<std::size_t>(ranks));
  std::iota(all.begin(), all.end(), 0);
  if (ranks % nodes == 0 && static_cast<std::size_t>(nodes) <= t.node_count()) {
    // As many on each node, where nodes are not full.
    const auto per = static_cast<std::size_t>(ranks / nodes);
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i] = t.first_device(i / per).value + static_cast<std::int64_t>(i % per);
  }
  c.communicator = nccl::communicator(t, all);
  const std::string whole = lower(library + " " + interconnect);
  for (const char* off : {"nvls off", "no nvls", "without nvls", "nvls disabled", "nvls_enable=0"})
    if (has(whole, off)) c.communicator.nvls = false;
  if (!c.what) {
    Communication links(t);
    // Everyone to the next (sendrecv): one pair crosses from node to node, over its own card.
    std::vector<std::int64_t> crossing;
    for (std::size_t i = 1; i < all.size() && crossing.empty() && !is_exchange(c.kind); ++i) {
      const auto node = [&](std::int64_t r) {
        return t.node_of(DeviceId{static_cast<std::size_t>(r)});
      };
      if (node(all[i - 1]) != node(all[i])) crossing = {all[i - 1], all[i]};
    }
    c.links_GBps =
        1e-9 *
        links.way(is_exchange(c.kind) ? Lay::pairs : Lay::rings, crossing.empty() ? all : crossing)
            .bandwidth.count;
  }
  return c;
}

double predicted_us(const CollectiveCurve& c, double bytes, const CollectiveConstants& k) {
  const auto n = static_cast<double>(c.ranks);
  double t = 0;
  if (!c.what) {
    const double share = wire_share(c.kind, n);
    t = nccl::exchange_us(c.communicator, is_exchange(c.kind) ? c.ranks - 1 : 0, bytes * share,
                          c.links_GBps, k.nccl);
  } else {
    nccl::Constants of = k.nccl;
    const auto choice = nccl::choose(c.communicator, *c.what, bytes, c.only);
    if (c.harness == Harness::xla && choice.protocol == nccl::Protocol::simple) {
      of.efficiency *= k.harness.xla_efficiency;
    }
    t = nccl::time_us(c.communicator, *c.what, choice, bytes, of);
  }
  if (c.harness == Harness::xla) t += k.harness.xla_per_rank_us * n;
  if (c.harness == Harness::torch) t += k.harness.torch_us;
  return t;
}

CollectiveConstants fit_constants(const std::vector<const CollectiveCurve*>& curves,
                                  const CollectiveConstants& start, double least_bytes) {
  CollectiveConstants k = start, origin = start;
  const auto at = fitted(k), from = fitted(origin);
  constexpr double kPrior = .1;
  descend(at, [&] {
    double sum = 0, weights = 0, prior = 0;
    for (const CollectiveCurve* c : curves) {
      for (const auto& [bytes, us] : c->points) {
        if (bytes < least_bytes) continue;
        const double w = weight_of(*c, bytes);
        // A point that is off by more than e says nothing of by how much.
        sum += w * std::min(1.0, std::abs(std::log(predicted_us(*c, bytes, k) / us)));
        weights += w;
      }
    }
    for (std::size_t i = 0; i < at.size(); ++i) prior += std::pow(std::log(*at[i] / *from[i]), 2);
    return sum / std::max(weights, 1.0) + kPrior * prior;
  });
  return k;
}

std::vector<CollectiveError> collective_errors(const std::vector<CollectiveCurve>& curves,
                                               double least_bytes) {
  const CollectiveConstants k;
  std::map<std::string, CollectiveConstants> by_source;
  std::vector<CollectiveError> all;
  for (const CollectiveCurve& c : curves) {
    std::vector<const CollectiveCurve*> others, elsewhere;
    for (const CollectiveCurve& o : curves) {
      if (&o != &c) others.push_back(&o);
      if (o.source != c.source) elsewhere.push_back(&o);
    }
    if (by_source.count(c.source) == 0)
      by_source[c.source] = fit_constants(elsewhere, k, least_bytes);
    const CollectiveConstants& foreign = by_source.at(c.source);
    const CollectiveConstants left = fit_constants(others, k, least_bytes);
    double latency = 20, rate = 300;
    descend({&latency, &rate}, [&] {
      double sum = 0;
      for (const CollectiveCurve* o : others) {
        if ((o->nodes > 1) != (c.nodes > 1)) continue;
        for (const auto& [bytes, us] : o->points) {
          if (bytes < least_bytes) continue;
          const double wire = bytes * wire_share(o->kind, static_cast<double>(o->ranks));
          sum += std::abs(std::log((latency + wire / (1000 * rate)) / us));
        }
      }
      return sum;
    });
    for (const auto& [bytes, us] : c.points) {
      if (bytes < least_bytes) continue;
      const auto error = [us = us](double predicted) { return predicted / us - 1; };
      CollectiveError e;
      e.curve = &c;
      e.bytes = bytes;
      e.in_sample = error(predicted_us(c, bytes, k));
      e.without_curve = error(predicted_us(c, bytes, left));
      e.without_source = error(predicted_us(c, bytes, foreign));
      const double wire = bytes * wire_share(c.kind, static_cast<double>(c.ranks));
      e.estimate = error(c.what ? nccl::choose(c.communicator, *c.what, bytes, c.only).time_us
                                : wire / (1000 * c.links_GBps));
      e.alpha_beta = error(latency + wire / (1000 * rate));
      all.push_back(e);
    }
  }
  return all;
}

ErrorFigures figures_of(const std::vector<double>& errors) {
  ErrorFigures f;
  f.points = errors.size();
  if (errors.empty()) return f;
  std::vector<double> sizes;
  for (const double e : errors) sizes.push_back(std::abs(e));
  std::sort(sizes.begin(), sizes.end());
  const std::size_t half = sizes.size() / 2;
  f.median = sizes.size() % 2 == 1 ? sizes[half] : (sizes[half - 1] + sizes[half]) / 2;
  const auto n = static_cast<double>(sizes.size());
  f.ninety = sizes[static_cast<std::size_t>(.9 * (n - 1))];
  f.mean = std::accumulate(sizes.begin(), sizes.end(), 0.0) / n;
  f.bias = std::accumulate(errors.begin(), errors.end(), 0.0) / n;
  return f;
}

std::string collective_report(const std::vector<CollectiveError>& errors) {
  std::string text =
      "median, mean, 90 % of errors' sizes, bias (in %)        points | in sample                 "
      "| "
      "without its curve         | without its source        | NCCL's estimate | alpha-beta\n";
  const auto line = [&](const std::string& name, const auto& keep) {
    std::vector<double> columns[5];
    for (const CollectiveError& e : errors) {
      if (!keep(e)) continue;
      const double values[] = {e.in_sample, e.without_curve, e.without_source, e.estimate,
                               e.alpha_beta};
      for (std::size_t i = 0; i < 5; ++i) columns[i].push_back(values[i]);
    }
    if (columns[0].empty()) return;
    text += fmt::format("{:<56} {:>5}", name, columns[0].size());
    for (std::size_t i = 0; i < 5; ++i) {
      const ErrorFigures f = figures_of(columns[i]);
      text += i < 3 ? fmt::format(" | {:5.1f} {:5.1f} {:5.1f} {:+6.1f}", 100 * f.median,
                                  100 * f.mean, 100 * f.ninety, 100 * f.bias)
                    : fmt::format(" | {:5.1f} {:6.1f}", 100 * f.median, 100 * f.mean);
    }
    text += "\n";
  };
  line("all", [](const CollectiveError&) { return true; });
  line("one node", [](const CollectiveError& e) { return e.curve->communicator.nodes == 1; });
  line("several nodes", [](const CollectiveError& e) { return e.curve->communicator.nodes > 1; });
  std::vector<std::string> kinds, sources;
  const CollectiveCurve* last = nullptr;
  for (const CollectiveError& e : errors) {
    if (std::find(kinds.begin(), kinds.end(), e.curve->kind) == kinds.end())
      kinds.push_back(e.curve->kind);
    if (std::find(sources.begin(), sources.end(), e.curve->source) == sources.end())
      sources.push_back(e.curve->source);
  }
  for (const auto& k : kinds) line(k, [&](const CollectiveError& e) { return e.curve->kind == k; });
  for (const auto& s : sources)
    line(s, [&](const CollectiveError& e) { return e.curve->source == s; });
  for (const CollectiveError& e : errors) {
    if (e.curve == last) continue;
    last = e.curve;
    line("  " + e.curve->name(), [&](const CollectiveError& x) { return x.curve == last; });
  }
  return text;
}

}  // namespace partita::validation
