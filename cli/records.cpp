#include "cli/records.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "validation/outside_record.h"

namespace partita::cli {
namespace {

using Json = nlohmann::json;

Json json_of(const Traffic& t) {
  Json j{{"messages", t.messages}, {"sends", t.sends}, {"send_bytes", t.send_bytes}};
  for (const auto& [to, bytes] : t.bytes_to) j["bytes_to"].push_back({to, bytes});
  for (const auto& [kind, c] : t.collectives)
    j["collectives"].push_back({static_cast<int>(kind), c.calls, c.payload_bytes});
  return j;
}

Traffic traffic_of(const Json& j) {
  Traffic t;
  t.messages = j.at("messages").get<std::int64_t>();
  t.sends = j.at("sends").get<std::int64_t>();
  t.send_bytes = j.at("send_bytes").get<std::int64_t>();
  for (const Json& x : j.value("bytes_to", Json::array()))
    t.bytes_to[x.at(0).get<int>()] = x.at(1).get<std::int64_t>();
  for (const Json& x : j.value("collectives", Json::array())) {
    const int kind = x.at(0).get<int>();
    if (kind < 0 || kind >= kCollectiveKinds) throw InputError("record", "no such collective");
    t.collectives[static_cast<CollectiveKind>(kind)] = {x.at(1).get<std::int64_t>(),
                                                        x.at(2).get<std::int64_t>()};
  }
  return t;
}

Json json_of(const std::array<Bytes, kCategoryCount>& list) {
  Json j = Json::array();
  for (const Bytes b : list) j.push_back(b.count);
  return j;
}
void read(const Json& j, std::array<Bytes, kCategoryCount>& list) {
  for (std::size_t k = 0; k < list.size(); ++k) list[k] = Bytes{j.at(k).get<std::int64_t>()};
}

Json json_of(const RankMeasurement& m) {
  Json j{{"rank", m.rank},
         {"step_s", m.step_s},
         {"uncertainty", m.clock_uncertainty_s},
         {"peak", m.peak.count},
         {"at_peak", json_of(m.at_peak)},
         {"last_peak", m.last_peak.count},
         {"last_at_peak", json_of(m.last_at_peak)},
         {"host_peak", m.host_peak.count},
         {"reserved", m.reserved.count},
         {"outside", Json::parse(validation::record_of(m.outside))},
         {"traffic", json_of(m.traffic)},
         {"samples", Json::array()}};
  for (const auto& step : m.samples) {
    Json list = Json::array();
    for (const Sample& s : step)
      list.push_back({s.block, s.instruction, s.micro_batch, s.start, s.end});
    j["samples"].push_back(std::move(list));
  }
  if (!m.plain_s.empty()) j["plain_s"] = m.plain_s;
  if (!m.queued_s.empty()) j["queued_s"] = m.queued_s;
  if (!m.captured_s.empty()) j["captured_s"] = m.captured_s;
  if (!m.kernel_ns.empty()) j["kernel_ns"] = m.kernel_ns;
  if (!m.recorded_s.empty()) j["recorded_s"] = m.recorded_s;
  if (!m.no_kernel_ns.empty()) j["no_kernel_ns"] = m.no_kernel_ns;
  return j;
}

RankMeasurement measurement_of(const Json& j) {
  RankMeasurement m;
  m.rank = j.at("rank").get<int>();
  m.step_s = j.at("step_s").get<std::vector<double>>();
  m.clock_uncertainty_s = j.at("uncertainty").get<double>();
  m.peak = Bytes{j.at("peak").get<std::int64_t>()};
  read(j.at("at_peak"), m.at_peak);
  m.last_peak = Bytes{j.at("last_peak").get<std::int64_t>()};
  read(j.at("last_at_peak"), m.last_at_peak);
  m.host_peak = Bytes{j.at("host_peak").get<std::int64_t>()};
  m.reserved = Bytes{j.at("reserved").get<std::int64_t>()};
  m.outside = validation::outside_memory_of(j.at("outside").dump());
  m.traffic = traffic_of(j.at("traffic"));
  for (const Json& step : j.at("samples")) {
    m.samples.emplace_back();
    for (const Json& s : step)
      m.samples.back().push_back({s.at(0).get<std::int32_t>(), s.at(1).get<std::int32_t>(),
                                  s.at(2).get<std::int32_t>(), s.at(3).get<std::int64_t>(),
                                  s.at(4).get<std::int64_t>()});
  }
  m.plain_s = j.value("plain_s", m.plain_s);
  m.queued_s = j.value("queued_s", m.queued_s);
  m.captured_s = j.value("captured_s", m.captured_s);
  m.kernel_ns = j.value("kernel_ns", m.kernel_ns);
  m.recorded_s = j.value("recorded_s", m.recorded_s);
  m.no_kernel_ns = j.value("no_kernel_ns", m.no_kernel_ns);
  return m;
}

Json json_of(const Routing& r) {
  Json j{{"model", r.model},
         {"samples", r.samples},
         {"positions", r.positions},
         {"layers", Json::array()},
         {"steps", Json::array()}};
  for (const auto& l : r.layers) j["layers"].push_back({l.name, l.experts, l.top_k});
  for (const auto& s : r.steps) j["steps"].push_back({s.step, s.counts});
  return j;
}

Routing routing_of(const Json& j) {
  Routing r;
  r.model = j.at("model").get<std::string>();
  r.samples = j.at("samples").get<std::int64_t>();
  r.positions = j.at("positions").get<std::vector<std::int64_t>>();
  for (const Json& l : j.at("layers"))
    r.layers.push_back(
        {l.at(0).get<std::string>(), l.at(1).get<std::int64_t>(), l.at(2).get<std::int64_t>()});
  for (const Json& s : j.at("steps"))
    r.steps.push_back(
        {s.at(0).get<std::int64_t>(), s.at(1).get<std::vector<std::vector<std::int64_t>>>()});
  return r;
}

template <class Use>
auto parsed(const std::string& text, const Use& use) {
  try {
    return use(Json::parse(text));
  } catch (const Json::exception& e) {
    throw InputError("record", fmt::format("is damaged: {}; remove the journal", e.what()));
  }
}

}  // namespace

std::string to_record(const CaseRecord& measured) {
  Json j{{"ranks", Json::array()}, {"routing", json_of(measured.routing)}};
  for (const RankMeasurement& m : measured.ranks) j["ranks"].push_back(json_of(m));
  return j.dump();
}

CaseRecord case_record(const std::string& text) {
  return parsed(text, [](const Json& j) {
    CaseRecord c;
    for (const Json& m : j.at("ranks")) c.ranks.push_back(measurement_of(m));
    c.routing = routing_of(j.at("routing"));
    return c;
  });
}

std::string to_record(const reference::Comparison& c) {
  Json j{{"loss_error", c.loss_error},
         {"gradient_error", c.gradient_error},
         {"parameter_error", c.parameter_error},
         {"worst_gradient", c.worst_gradient},
         {"worst_parameter", c.worst_parameter},
         {"tolerance", c.tolerance},
         {"equal", c.equal},
         {"steps", Json::array()}};
  for (const auto& s : c.steps) j["steps"].push_back({s.plan_loss, s.serial_loss});
  return j.dump();
}

reference::Comparison comparison_record(const std::string& text) {
  return parsed(text, [](const Json& j) {
    // A figure that is no number is written as null.
    const auto number = [](const Json& x) {
      return x.is_null() ? std::numeric_limits<double>::quiet_NaN() : x.get<double>();
    };
    reference::Comparison c;
    c.loss_error = number(j.at("loss_error"));
    c.gradient_error = number(j.at("gradient_error"));
    c.parameter_error = number(j.at("parameter_error"));
    c.worst_gradient = j.at("worst_gradient").get<std::string>();
    c.worst_parameter = j.at("worst_parameter").get<std::string>();
    c.tolerance = number(j.at("tolerance"));
    c.equal = j.at("equal").get<bool>();
    for (const Json& s : j.at("steps")) c.steps.push_back({number(s.at(0)), number(s.at(1))});
    return c;
  });
}

}  // namespace partita::cli
