// partita collective: one collective on a cluster, algorithm by algorithm.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <set>
#include <sstream>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "cli/cluster_flags.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "report/collectives.h"

namespace partita::cli {
namespace {

/// Catalogue style: "all-reduce", "double-tree"; underscores are as good.
std::string hyphened(std::string_view name) {
  std::string s{name};
  for (char& c : s) {
    if (c == ' ' || c == '_') c = '-';
  }
  return s;
}

CollectiveKind parse_kind(const std::string& text) {
  std::vector<std::string> known;
  for (int k = 0; k < kCollectiveKinds; ++k) {
    known.push_back(hyphened(name(static_cast<CollectiveKind>(k))));
    if (hyphened(text) == known.back()) return static_cast<CollectiveKind>(k);
  }
  throw InputError("COLLECTIVE",
                   fmt::format("'{}' is none{}; there are {}", text,
                               did_you_mean(hyphened(text), known), fmt::join(known, ", ")));
}

Algorithm parse_algorithm(const std::string& text, CollectiveKind kind) {
  std::vector<std::string> known;
  for (const AlgorithmRow& row : kAlgorithms) {
    if (row.kind != kind) continue;
    known.push_back(hyphened(name(row.algorithm)));
    if (hyphened(text) == known.back()) return row.algorithm;
  }
  throw InputError("--algorithm",
                   fmt::format("'{}' is no algorithm of {}{}; there are {}", text, name(kind),
                               did_you_mean(hyphened(text), known), fmt::join(known, ", ")));
}

/// A whole number of digits alone; -1 for anything else.
std::int64_t whole(const std::string& text) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
    return -1;
  return std::stoll(text);
}

/// "0-7,16": ranks in the order of the group.
std::vector<std::int64_t> parse_ranks(const std::string& text, const Topology& t) {
  std::vector<std::int64_t> ranks;
  std::set<std::int64_t> seen;
  std::istringstream words(text);
  const auto devices = static_cast<std::int64_t>(t.rank_count());
  for (std::string word; std::getline(words, word, ',');) {
    const auto dash = word.find('-');
    const std::int64_t first = whole(word.substr(0, dash));
    const std::int64_t last = dash == std::string::npos ? first : whole(word.substr(dash + 1));
    if (first < 0 || last < first)
      throw InputError("--ranks",
                       fmt::format("'{}' is no rank and no range of ranks; write 0-7,16", word));
    if (last >= devices)
      throw InputError("--ranks", fmt::format("{} is none of the {} devices of {}; use 0 to {}",
                                              last, devices, t.name(), devices - 1));
    for (std::int64_t r = first; r <= last; ++r) {
      if (!seen.insert(r).second)
        throw InputError("--ranks", fmt::format("{} is there twice; leave one out", r));
      ranks.push_back(r);
    }
  }
  return ranks;
}

/// "8,2": members of a unit, units.
std::vector<std::int32_t> parse_levels(const std::string& text, std::int64_t ranks) {
  std::vector<std::int32_t> levels;
  std::istringstream words(text);
  double product = 1;
  for (std::string word; std::getline(words, word, ',');) {
    const std::int64_t size = whole(word);
    if (size < 1)
      throw InputError("--levels", fmt::format("'{}' is no number of members; write 8,2 for two "
                                               "units of 8",
                                               word));
    levels.push_back(static_cast<std::int32_t>(size));
    product *= static_cast<double>(size);
  }
  if (product != static_cast<double>(ranks))
    throw InputError("--levels",
                     fmt::format("{} makes {} ranks, the group has {}; give sizes whose "
                                 "product is {}",
                                 text, product, ranks, ranks));
  return levels;
}

}  // namespace

void add_collective(CLI::App& app) {
  struct Options {
    std::string kind, topology, size = "1 GiB", ranks, algorithm, levels;
    ClusterFlags cluster;
    bool json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* c = app.add_subcommand("collective", "time a collective, algorithm by algorithm");
  c->add_option("COLLECTIVE", o->kind, "all-reduce, all-gather, reduce-scatter, all-to-all, ...")
      ->required();
  c->add_option("TOPOLOGY", o->topology, "catalogue name or file")->required();
  c->add_option("--size", o->size, "payload as nccl-tests counts it, like 1GiB");
  c->add_option("--ranks", o->ranks, "members in their order, like 0-7,16; all without it");
  c->add_option("--algorithm", o->algorithm, "this one only, like double-tree");
  c->add_option("--levels", o->levels,
                "members of a unit, units, ... of hierarchical algorithms, innermost first, like "
                "8,2; NVLink networks without it");
  o->cluster.add_to(*c);
  c->add_flag("--json", o->json, "print JSON");
  c->callback([o] {
    const CollectiveKind kind = parse_kind(o->kind);
    const Bytes payload = parse_bytes(o->size, "--size");
    std::optional<Algorithm> algorithm;
    if (!o->algorithm.empty()) algorithm = parse_algorithm(o->algorithm, kind);
    const Topology t = o->cluster.in_state(load_cluster(o->topology));
    const std::vector<std::int64_t> ranks =
        parse_ranks(o->ranks.empty() ? fmt::format("0-{}", t.used_ranks() - 1) : o->ranks, t);
    std::vector<std::int32_t> levels;
    if (!o->levels.empty())
      levels = parse_levels(o->levels, static_cast<std::int64_t>(ranks.size()));
    const CollectiveTimes times =
        time_collective(kind, payload, ranks, t, algorithm, std::move(levels));
    const std::string out = o->json ? collective_json(kind, payload, ranks, t, times)
                                    : collective_table(kind, payload, ranks, t, times);
    std::fwrite(out.data(), 1, out.size(), stdout);
  });
}

}  // namespace partita::cli
