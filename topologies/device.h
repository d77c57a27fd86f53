// topologies/device.h: what one device can do, as its maker publishes it.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/element_type.h"
#include "base/outside_memory.h"
#include "base/units.h"
#include "base/yaml.h"
#include "topologies/measured.h"

namespace partita {

struct Rate {
  FlopsPerSecond peak;
  std::string source;
  double efficiency = 0;  ///< sustained fraction of peak; 0: the device's matrix_efficiency
  double fast_efficiency =
      0;  ///< of products that sum in the matrix units alone; 0: as `efficiency`
};

/// A device file (schema partita.device/1). Every figure has an entry in `sources` under its YAML
/// key, or in its Rate. Peaks are dense: structured sparsity is never counted.
struct DeviceProfile {
  std::string name;  ///< "h100-sxm"
  std::vector<std::string> aliases;
  Bytes memory;         ///< Physical.
  Bytes usable_memory;  ///< What a framework can allocate: memory less ECC reserve and context.
  /// Beside what a framework allocates, measured (docs/calibration.md, "Memory"). Of it
  /// `usable_memory` is without the context alone. Empty: not measured.
  std::optional<OutsideMemory> outside;
  BytesPerSecond memory_bandwidth;
  std::map<ElementType, Rate> matrix_rates;  ///< Dense, no sparsity.
  FlopsPerSecond vector_rate;                ///< fp32, outside the matrix units.
  double matrix_efficiency = 1;              ///< Sustained fraction of peak of large problems.
  double memory_efficiency = 1;
  /// Clock that long work of the matrix units keeps under the power limit, over the clock of short
  /// kernels, at which measured points were taken (docs/cost.md, "Clocks").
  double sustained_clock = 1;
  /// The same of flash attention, whose other instructions draw less, where its efficiencies are of
  /// short kernels; 1: they are of long ones.
  double attention_clock = 1;
  /// Standard deviation of the speeds of devices of this name, relative (docs/simulation.md).
  double speed_spread = 0;
  Seconds kernel_latency;  ///< Fixed time per kernel.
  int multiprocessors = 0;
  /// Of these, what a running collective or transfer keeps for itself; 0: none.
  int communication_multiprocessors = 0;
  int compute_capability = 0;  ///< 90 for sm90; 0 where the device has none (a CPU).
  /// False: communication does not run beside compute, all instructions of a rank follow each
  /// other.
  bool concurrent_streams = true;
  /// > 0: all devices of a node are ranks on this many cores.
  int host_cores = 0;
  /// Share of the smaller of a transfer and a computation that runs beside the other; measured.
  double overlap = 0;
  Seconds dispatch;  ///< Host time between two instructions of a rank.
  /// Our own runtime's on a device beside the host: until the host has queued an instruction, where
  /// a plan has no launch times; 0: not known.
  Seconds launch;
  /// Likewise, more for each row of experts that the host lists.
  Seconds list_row;
  /// As `dispatch`, of instructions that were captured in a CUDA graph; none: `dispatch`.
  std::optional<Seconds> dispatch_in_graph;
  /// That a process has the device for, of several in turns: a spinning kernel's peer answered
  /// after 1, 2, 4, 6 or 8 times this on an RTX 5090 (nccl-eBPF, docs/tmp, NCCL 2.29.7).
  Seconds time_slice{2.18e-3};
  CollectiveTable collectives;  ///< Measured by neighbouring devices of one node.
  std::string collectives_on;   ///< The catalogue's node that they were measured on; or not known.
  KernelTable kernels;          ///< Measured by our runtime, all of them; empty for a GPU.
  SlowdownTable slowdown;       ///< Measured of kernels and transfers at once; empty: derived.
  /// Fractions of peak that the inner loops of flash attention reach, the products counted that it
  /// does: 2 forward, 5 backward.
  double attention_forward_efficiency = 0.6, attention_backward_efficiency = 0.5;
  /// The same of FlashAttention-2, written for Ampere, where a newer device has kernels of its own;
  /// 0: the figures above are FlashAttention-2's.
  double flash2_forward_efficiency = 0, flash2_backward_efficiency = 0;
  /// Measured products and attentions: what a price differs by from its model is taken from those
  /// nearby (docs/cost.md, "Products").
  std::vector<ProductTable> products;
  std::vector<AttentionTable> attention;
  /// Not null: this device has no points of its own and differs from its model as that one does.
  std::shared_ptr<const DeviceProfile> like;
  std::map<std::string, std::string> sources;

  /// Throws InputError that lists the types the device has.
  FlopsPerSecond matrix_rate(ElementType type) const;
  /// Of large products at the clock of short kernels: peak times the type's efficiency, else the
  /// device's; `fast_sums`: of products that need not add up elsewhere now and then. Throws
  /// likewise.
  FlopsPerSecond sustained_rate(ElementType type, bool fast_sums = false) const;
};

/// A catalogue name or alias ("h100-sxm"), or the path of a .yaml file. InputError otherwise.
DeviceProfile load_device(const std::string& name_or_file, const std::vector<YamlEdit>& edits = {});

/// From a file's text; `file` is used in messages.
DeviceProfile parse_device(const std::string& text, const std::string& file);

/// Names of the device catalogue, sorted.
std::vector<std::string> device_catalogue();

}  // namespace partita
