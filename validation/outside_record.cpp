#include "validation/outside_record.h"

#include <cstdint>
#include <nlohmann/json.hpp>

namespace partita::validation {

std::string record_of(const OutsideMemory& m) {
  nlohmann::json j{{"context", m.context.count},
                   {"kernels", m.kernels.count},
                   {"libraries", m.libraries.count},
                   {"workspace", m.workspace.count},
                   {"communicators", m.communicators.count},
                   {"by_ranks", nlohmann::json::array()}};
  for (const auto& [ranks, bytes] : m.by_ranks) j["by_ranks"].push_back({ranks, bytes.count});
  return j.dump();
}
OutsideMemory outside_memory_of(const std::string& record) {
  const auto j = nlohmann::json::parse(record);
  const auto bytes = [&](const char* key) { return Bytes{j.at(key).get<std::int64_t>()}; };
  OutsideMemory m;
  m.context = bytes("context"), m.kernels = bytes("kernels"), m.libraries = bytes("libraries");
  m.workspace = bytes("workspace"), m.communicators = bytes("communicators");
  for (const auto& x : j.at("by_ranks"))
    m.by_ranks[x.at(0).get<int>()] = Bytes{x.at(1).get<std::int64_t>()};
  return m;
}

}  // namespace partita::validation
