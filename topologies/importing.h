// topologies/importing.h: what machines' own files leave out, in one place. Private to this folder.
#pragma once

#include <string>
#include <string_view>

#include "topologies/topology.h"

namespace partita {

/// One NVLink, one direction, nominal, by compute capability (NVIDIA's datasheets: NVLink 1 20
/// GB/s, 2 to 4 25 GB/s, 5 50 GB/s).
BytesPerSecond nvlink_rate(int compute_capability);

/// NVLinks of a GPU of this generation: 4, 6, 12 or 18.
int most_nvlinks(int compute_capability);

/// Whether boards of this GPU come with NVSwitch, judging by its name.
bool has_nvswitch(const DeviceProfile& device);

/// PCIe x16, one direction, of this generation of GPU.
BytesPerSecond pcie_rate(int compute_capability);

/// The NIC that is usual beside this generation of GPU.
BytesPerSecond usual_nic_rate(int compute_capability);

Seconds assumed_latency(LinkKind kind);

/// Device catalogue name of a PCI device id ("0x2330"), or "". Source: the public pci.ids list.
std::string device_of_pci_id(std::string_view id);

}  // namespace partita
