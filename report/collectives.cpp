#include "report/collectives.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include "base/unit_text.h"
#include "report/report.h"

namespace partita {

std::string collective_json(CollectiveKind kind, Bytes payload,
                            const std::vector<std::int64_t>& ranks, const Topology& topology,
                            const CollectiveTimes& times) {
  using Json = nlohmann::ordered_json;
  Json j;
  j["schema"] = "partita.collective/1";
  j["collective"] = name(kind);
  j["topology"] = topology.name();
  j["ranks"] = ranks;
  j["payload_bytes"] = payload.count;
  j["levels"] = Json::array();
  for (const PortLevel& l : times.ports) {
    Json level{{"members", l.members}, {"latency_s", nullptr}, {"bandwidth_bytes_per_s", nullptr}};
    if (l.members > 1) {
      level["latency_s"] = to_seconds(l.latency).count;
      level["bandwidth_bytes_per_s"] = l.rate.count;
    }
    j["levels"].push_back(level);
  }
  j["algorithms"] = Json::array();
  j["left_out"] = Json::array();
  for (const CollectiveTime& t : times.algorithms) {
    if (!t.why_not.empty()) {
      j["left_out"].push_back({{"algorithm", name(t.algorithm)}, {"why", t.why_not}});
      continue;
    }
    const Json most = t.form.most ? Json(to_seconds(*t.form.most).count) : Json(nullptr);
    Json row{{"algorithm", name(t.algorithm)},
             {"steps", t.steps},
             {"sent_bytes", t.sent.count},
             {"closed_form_s", Json::array({to_seconds(t.form.least).count, most})},
             {"time_s", to_seconds(t.time).count},
             {"bus_bandwidth_bytes_per_s", t.bus_bandwidth.count},
             {"busiest_link", nullptr},
             {"busy", t.busy}};
    if (t.busiest.valid()) row["busiest_link"] = topology.link_name(t.busiest);
    j["algorithms"].push_back(row);
  }
  return j.dump(2) + "\n";
}

std::string collective_table(CollectiveKind kind, Bytes payload,
                             const std::vector<std::int64_t>& ranks, const Topology& topology,
                             const CollectiveTimes& times) {
  const auto device = [&](std::int64_t r) {
    return topology.device_name(DeviceId{static_cast<std::size_t>(r)});
  };
  std::string out =
      fmt::format("{} of {} among {} ranks of {}: {}{}\n", name(kind), text(payload),
                  grouped(static_cast<std::int64_t>(ranks.size())), topology.name(),
                  device(ranks[0]), ranks.size() > 1 ? " ... " + device(ranks.back()) : "");
  std::vector<std::string> levels;
  for (const PortLevel& l : times.ports) {
    levels.push_back(l.members > 1 ? fmt::format("{} at {}, {}", l.members, text(l.rate),
                                                 text(to_seconds(l.latency)))
                                   : std::string("1"));
  }
  out += fmt::format("levels: {}\n\n", fmt::join(levels, "; "));
  std::vector<std::vector<std::string>> rows{{"algorithm", "steps", "a rank sends", "own ports",
                                              "time", "bus bandwidth", "busiest link", "busy"}};
  std::string notes;
  for (const CollectiveTime& t : times.algorithms) {
    const std::string label{name(t.algorithm)};
    if (!t.why_not.empty()) {
      notes += fmt::format("{}: {}\n", label, t.why_not);
      continue;
    }
    rows.push_back({label, grouped(t.steps), text(t.sent),
                    (t.form.most ? "" : ">= ") + text(to_seconds(t.form.least)),
                    text(to_seconds(t.time)),
                    t.bus_bandwidth.count > 0 ? text(t.bus_bandwidth) : "-",
                    t.busiest.valid() ? topology.link_name(t.busiest) : "-",
                    fmt::format("{:.1f}%", 100 * t.busy)});
  }
  if (rows.size() > 1) out += align(rows);
  if (!notes.empty()) out += (rows.size() > 1 ? "\n" : "") + notes;
  return out;
}

}  // namespace partita
