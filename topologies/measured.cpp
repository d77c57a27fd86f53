#include "topologies/measured.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "topologies/cluster.h"

namespace partita {

CollectiveTable read_collectives(const YamlNode& table, const std::string& source,
                                 std::map<std::string, std::string>& sources) {
  CollectiveTable all;
  for (const auto& [kind_name, list] : table.members()) {
    const std::string& kind = kind_name;  // clang 14 does not capture a binding
    for (const YamlNode& y : list.items()) {
      CollectivePoint p;
      p.ranks = static_cast<int>(y.get("ranks").as_int(1, 1'000'000));
      if (const auto n = y.find("at_work")) p.at_work = static_cast<int>(n->as_int(1, 1'000'000));
      if (const auto n = y.find("nodes")) p.nodes = static_cast<int>(n->as_int(1, 1'000'000));
      if (const auto n = y.find("spread")) p.spread = n->as_double();
      const auto own = y.find("source");
      const std::string place = y.place(), from = own ? own->as_string() : source;
      if (own) sources[place.substr(place.find(": ") + 2)] = from;
      const auto add = [&](Bytes bytes, const YamlNode& time) {
        p.bytes = bytes;
        p.time = time.as_seconds();
        if (!(p.time.count > 0))
          throw InputError(time.place(), "a measured collective has a time above 0");
        all[kind].push_back(p);
      };
      if (const auto times = y.find("times")) {
        if (y.has("bytes"))
          throw InputError(y.place(), "give either bytes and time of a point or times of a curve");
        for (const auto& [size, time] : times->members())
          add(parse_bytes(size, time.place()), time);
      } else {
        add(y.get("bytes").as_bytes(), y.get("time"));
      }
      y.reject_unknown_keys();
    }
  }
  return all;
}

std::string_view name(KernelFamily family) {
  switch (family) {
    case KernelFamily::product:
      return "product";
    case KernelFamily::attention:
      return "attention";
    case KernelFamily::memory:
      return "memory";
  }
  return "";
}

const std::vector<std::string_view>& transfers_beside() {
  static const std::vector<std::string_view> all{
      "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send",   "halo_exchange",
      "shift",      "broadcast",  "reduce",         "scatter",    "gather", kStandIn};
  return all;
}

SlowdownTable read_slowdowns(const YamlNode& list) {
  SlowdownTable all;
  for (const YamlNode& y : list.items()) {
    SlowdownPoint p;
    const YamlNode kernel = y.get("kernel"), beside = y.get("beside");
    bool known = false;
    for (const auto family : {KernelFamily::product, KernelFamily::attention, KernelFamily::memory})
      if (name(family) == kernel.as_string()) p.kernel = family, known = true;
    if (!known)
      throw InputError(kernel.place(), fmt::format("'{}' is no family of kernels; use product, "
                                                   "attention or memory",
                                                   kernel.as_string()));
    p.beside = beside.as_string();
    const auto& kinds = transfers_beside();
    if (std::find(kinds.begin(), kinds.end(), p.beside) == kinds.end())
      throw InputError(beside.place(), fmt::format("'{}' is no transfer; use one of {}", p.beside,
                                                   fmt::join(kinds, ", ")));
    const bool stands_in = p.beside == kStandIn;
    if (y.has(stands_in ? "ranks" : "multiprocessors"))
      throw InputError(y.place(), stands_in ? "a stand-in has no ranks but multiprocessors that it "
                                              "holds; write multiprocessors"
                                            : "only a stand-in is known by its multiprocessors, a "
                                              "transfer by its ranks; write ranks");
    if (stands_in)
      p.multiprocessors = static_cast<int>(y.get("multiprocessors").as_int(1, 1'000'000));
    else
      p.ranks = static_cast<int>(y.get("ranks").as_int(2, 1'000'000));
    const YamlNode bytes = y.get("bytes");
    p.bytes = bytes.as_bytes();
    if (p.bytes.count == 0) throw InputError(bytes.place(), "a transfer of 0 B takes no time");
    for (const auto& [key, to] :
         {std::pair{"of_kernel", &p.of_kernel}, std::pair{"of_transfer", &p.of_transfer}}) {
      const YamlNode ratio = y.get(key);
      *to = ratio.as_double();
      if (!(*to >= 1 && *to <= kMostSlowdown))
        throw InputError(
            ratio.place(),
            fmt::format("{} is a time beside the other over the time alone, 1 to {:g}; "
                        "{} is given",
                        key, kMostSlowdown, *to));
    }
    if (const auto n = y.find("spread")) {
      p.spread = n->as_double();
      if (!(p.spread >= 0 && std::isfinite(p.spread)))
        throw InputError(n->place(),
                         fmt::format("a spread is a fraction, at least 0; {} is given", p.spread));
    }
    y.reject_unknown_keys();
    all.push_back(p);
  }
  return all;
}

}  // namespace partita
