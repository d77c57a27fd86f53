// validation/row_case.h: a row of a published table as what can be predicted: a network, a cluster
// and a plan. docs/published.md states the rules.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "models/models.h"
#include "simulator/plan/framework.h"
#include "simulator/plan/plan.h"
#include "topologies/topology.h"
#include "validation/csv.h"
#include "validation/layer_time.h"

namespace partita::validation {

enum class RowSchema : std::uint8_t { training, memory, convolution, collectives, products };
std::string_view name(RowSchema schema);

/// By its column names: each schema has some that no other has. InputError{file} that lists them
/// when none fits, or when a column that the schema rests on is missing.
RowSchema recognise(const CsvTable& table);

/// A column that no prediction and no comparison reads.
struct UnreadColumn {
  std::string column;
  std::string meant;  ///< the schema's column of which it is another usual name, or nearly the name
};
/// In the table's order.
std::vector<UnreadColumn> unread_columns(const CsvTable& table);

/// A row's cells by column name.
class Row {
 public:
  Row(const CsvTable& table, std::size_t record);
  /// "" where the cell is empty or the table has no such column.
  const std::string& operator[](std::string_view column) const;
  int line() const { return record_->line; }
  const std::string& file() const { return table_->file; }

 private:
  const CsvTable* table_;
  const CsvTable::Record* record_;
};

/// A row with its configuration columns only: what a prediction may see.
class Configuration {
 public:
  Configuration(RowSchema schema, const Row& row);
  const std::string& operator[](std::string_view column) const;
  /// Whole numbers; empty cell: nothing. InputError{column} for other text, or out of range.
  std::optional<std::int64_t> whole(std::string_view column, std::int64_t least = 1,
                                    std::int64_t most = 1'000'000'000) const;
  /// Writes an empty cell; true if it was empty.
  bool fill(const std::string& column, const std::string& cell);
  /// Writes a cell over what it has; "" empties it. `why`: of the prediction's `assumed`.
  void replace(const std::string& column, const std::string& cell, const std::string& why);
  const std::vector<std::string>& replaced() const { return replaced_; }
  /// All cells, for equality.
  std::string key() const;
  /// The columns that a schema's predictions may see.
  static const std::vector<std::string_view>& columns(RowSchema schema);

 private:
  std::map<std::string, std::string, std::less<>> cells_;
  std::vector<std::string> replaced_;
};

/// Settings of published rows that only their notes say, or say otherwise than their columns (file
/// validation/settings.yaml, schema partita.settings/1).
struct RowSettings {
  std::vector<std::string> rows;        ///< patterns of ids
  std::vector<std::string> precisions;  ///< patterns of that column; empty: any
  std::map<std::string, std::string> cells;
  std::string reason;
};
/// InputError with file and line for what it does not say, and for a column that is no setting.
std::vector<RowSettings> load_settings(const std::string& file);
/// Those of the row `id`, in the file's order.
void apply_settings(const std::vector<RowSettings>& settings, const std::string& id,
                    Configuration& row);

/// A cluster of the topology catalogue, as far as choosing one needs it.
struct ClusterShape {
  std::string name, device;
  std::string file;
  std::vector<std::string> aliases;  ///< patterns of what a row says of its interconnect
  std::int64_t devices_per_node = 0, nics_per_node = 0;
  std::int64_t nodes_per_domain = 1;  ///< of one NVLink domain
  /// Not empty: what its cards reach (`efficiency`), or how long they take, is of networks that a
  /// row names so: a pattern of the text in small letters behind a space.
  std::string network;
  std::string device_key, nic_key;  ///< of the file's vertices: "gpu[0-7]"
  std::string nic_latency;
  bool nic_efficiency = false;  ///< the file has one
  bool may_sum = false;         ///< the fabric has a `sharp`
};

/// All that names are looked up in. Immutable.
struct Catalogue {
  std::vector<KnownModel> models;
  std::vector<DeviceProfile> devices;
  std::vector<ClusterShape> clusters;
  std::vector<FrameworkProfile> frameworks;
  std::vector<RowSettings> settings;
};
Catalogue load_catalogue();
/// Of a catalogue's cluster, or of a cluster file (YAML).
ClusterShape cluster_shape(const std::string& name_or_file);

/// Where the row's devices stand.
struct ClusterChoice {
  std::string topology;  ///< "dgx-h100:64 gpus"
  TopologyEdits edits;
  std::int64_t devices_per_node = 0;
  std::string key() const;
};

/// What one row asks to be predicted, as far as a step is concerned.
struct RowCase {
  std::optional<TransformerConfig> transformer;  ///< else `model` names a catalogue entry
  std::string model;
  std::vector<std::string> lora;
  bool counts_tokens = false;  ///< its printed speed is in tokens
  ClusterChoice cluster;
  Plan plan;
  bool logs_first_stage = false;     ///< FrameworkProfile's
  std::string logs_memory;           ///< likewise
  bool logs_hardware_flops = false;  ///< likewise
  std::optional<LayerQuantity> layer;  ///< whose time is asked for, not the step's
  std::vector<std::string> assumed;  ///< "vocabulary 50257 (framework megatron-core)"
  std::string key() const;           ///< equal: the same prediction
};

/// InputError{column, why} where the row does not say enough or what it says is unknown.
RowCase case_of(RowSchema schema, const Configuration& row, const Catalogue& catalogue);

/// The cluster of `gpu` text and interconnects. `assumed` is added to.
ClusterChoice cluster_of(const Catalogue& catalogue, const std::string& gpu,
                         const std::string& memory, std::int64_t gpus,
                         std::optional<std::int64_t> per_node, const std::string& intra,
                         const std::string& inter, std::vector<std::string>& assumed);

/// The device a `gpu` text means: memory in GB where it is printed.
const DeviceProfile& device_of(const Catalogue& catalogue, const std::string& gpu,
                               const std::string& memory, const std::string& intra);

/// The profile with the longest matching alias; null: none. `device`: the name of one, or empty;
/// `later`: the row prints what FrameworkProfile::early ones have not.
const FrameworkProfile* framework_of(const Catalogue& catalogue, const std::string& text,
                                     const std::string& model, const std::string& precision,
                                     const std::string& device = "", bool later = false);

/// The catalogue entry that a text names; null: none. `text` may lead with folders and end with
/// remarks: the longest name or alias that it begins with. `besides`: what the text's network has
/// that the entry, standing in for it, has not.
const KnownModel* model_of(const Catalogue& catalogue, const std::string& text,
                           std::string* besides = nullptr);

}  // namespace partita::validation
