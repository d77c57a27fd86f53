#include "topologies/measured.h"

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

}  // namespace partita
