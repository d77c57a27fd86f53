#include "topologies/importing.h"

#include <utility>

namespace partita {

BytesPerSecond nvlink_rate(int compute_capability) {
  if (compute_capability >= 100) return BytesPerSecond{50e9};
  if (compute_capability == 86) return BytesPerSecond{14e9};
  if (compute_capability >= 70) return BytesPerSecond{25e9};
  return BytesPerSecond{20e9};
}

int most_nvlinks(int compute_capability) {
  if (compute_capability >= 90) return 18;
  if (compute_capability >= 80) return 12;
  if (compute_capability >= 70) return 6;
  return 4;
}

bool has_nvswitch(const DeviceProfile& device) {
  if (device.compute_capability < 80) return false;
  return device.name.find("sxm") != std::string::npos || device.compute_capability >= 100;
}

BytesPerSecond pcie_rate(int compute_capability) {
  if (compute_capability >= 90) return BytesPerSecond{63e9};
  if (compute_capability >= 80) return BytesPerSecond{31.5e9};
  return BytesPerSecond{15.75e9};
}

BytesPerSecond usual_nic_rate(int compute_capability) {
  if (compute_capability >= 90) return BytesPerSecond{50e9};
  if (compute_capability >= 80) return BytesPerSecond{25e9};
  return BytesPerSecond{12.5e9};
}

Seconds assumed_latency(LinkKind kind) {
  switch (kind) {
    case LinkKind::nvlink:
      return Seconds{0.5e-6};
    case LinkKind::pcie:
      return Seconds{0.25e-6};
    case LinkKind::c2c:
      return Seconds{0.4e-6};
    case LinkKind::cpu_interconnect:
      return Seconds{0.2e-6};
    case LinkKind::network:
      return Seconds{0.6e-6};
    case LinkKind::other:
      break;
  }
  return Seconds{0.2e-6};
}

std::string device_of_pci_id(std::string_view id) {
  static constexpr std::pair<std::string_view, const char*> kTable[] = {
      {"0x1db1", "v100-sxm-16gb"}, {"0x1db5", "v100-sxm-32gb"},  {"0x20b0", "a100-sxm-40gb"},
      {"0x20b2", "a100-sxm-80gb"}, {"0x20b5", "a100-pcie-80gb"}, {"0x20f1", "a100-pcie-40gb"},
      {"0x2330", "h100-sxm"},      {"0x2331", "h100-pcie"},      {"0x2335", "h200-sxm"},
      {"0x2901", "b200"},          {"0x2941", "gb200"},          {"0x3182", "b300"},
  };
  for (const auto& [known, name] : kTable)
    if (id == known) return name;
  return "";
}

}  // namespace partita
