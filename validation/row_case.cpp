#include "validation/row_case.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <regex>
#include <set>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"
#include "validation/row_flags.h"
#include "validation/row_settings.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

struct SchemaColumns {
  RowSchema schema;
  std::string_view name;
  std::vector<std::string_view> mark;  ///< columns that it has
  std::vector<std::string_view> any;   ///< and at least one of these
  std::vector<std::string_view> configuration;
  std::vector<std::string_view> others;  ///< measured values and what is said of the row
};

const std::vector<SchemaColumns>& schemas() {
  static const std::vector<SchemaColumns> all{
      {RowSchema::training,
       "llm_training",
       {"seq_len_tokens"},
       {"iteration_time_s", "tokens_per_s_per_gpu", "samples_per_s_total", "tflops_per_gpu",
        "mfu_pct", "status"},
       {"model",
        "params_billion",
        "num_layers",
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "ffn_hidden_size",
        "vocab_size",
        "num_experts",
        "moe_topk",
        "moe_ffn_hidden_size",
        "seq_len_tokens",
        "gpu",
        "gpu_memory_gb",
        "num_gpus",
        "gpus_per_node",
        "intra_node_interconnect",
        "inter_node_interconnect",
        "framework",
        "tp",
        "sequence_parallel",
        "pp",
        "virtual_stages_per_gpu",
        "cp",
        "ep",
        "etp",
        "dp",
        "zero_or_fsdp",
        "micro_batch_per_dp_rank",
        "global_batch_seqs",
        "recompute",
        "precision",
        "attention_kernel",
        "overlap_and_other_settings"},
       {"iteration_time_s", "tokens_per_s_per_gpu", "samples_per_s_total", "tflops_per_gpu",
        "mfu_pct", "hfu_pct", "flop_formula", "peak_mem_per_gpu_gib", "peak_mem_definition",
        "status"}},
      {RowSchema::memory,
       "memory",
       {"quantity", "value", "unit"},
       {},
       {"model",
        "num_layers",
        "hidden_size",
        "num_heads",
        "seq_len_tokens",
        "gpu",
        "num_gpus",
        "tp",
        "sequence_parallel",
        "pp",
        "virtual_stages_per_gpu",
        "cp",
        "ep",
        "dp",
        "zero_or_fsdp",
        "micro_batch_per_dp_rank",
        "global_batch_seqs",
        "recompute",
        "precision",
        "quantity"},
       {"value", "unit"}},
      {RowSchema::convolution,
       "cnn_training",
       {"batch_per_gpu"},
       {"images_or_samples_per_s_total", "images_or_samples_per_s_per_gpu", "step_time_s"},
       {"model", "framework", "gpu", "gpu_memory_gb", "num_gpus", "gpus_per_node", "interconnect",
        "precision", "batch_per_gpu", "accumulation_steps", "global_batch", "parallelism"},
       {"images_or_samples_per_s_total", "images_or_samples_per_s_per_gpu",
        "scaling_factor_vs_1gpu", "step_time_s"}},
      {RowSchema::collectives,
       "collectives",
       {"collective", "size_bytes"},
       {"time_us", "algbw_gb_per_s", "busbw_gb_per_s"},
       {"collective", "gpu", "num_gpus", "num_nodes", "gpus_per_node", "intra_node_interconnect",
        "inter_node_interconnect", "library", "size_bytes", "count_elements", "dtype", "redop"},
       {"time_us", "algbw_gb_per_s", "busbw_gb_per_s", "inplace_time_us",
        "inplace_busbw_gb_per_s"}},
      {RowSchema::products,
       "gemm",
       {"kernel", "m", "n", "k"},
       {"tflops", "time_s", "efficiency_fraction"},
       {"kernel", "gpu", "precision", "m", "n", "k", "batch_or_groups", "layout", "extra"},
       {"peak_tflops_used", "efficiency_fraction", "tflops", "time_s"}}};
  return all;
}

const SchemaColumns& columns_of(RowSchema schema) {
  for (const auto& s : schemas()) {
    if (s.schema == schema) return s;
  }
  throw InternalError("a schema without columns");
}

bool has(std::string_view text, std::string_view word) {
  return text.find(word) != std::string_view::npos;
}

/// "NVIDIA A100 PCIe 80GB (x)", "8x DGX A100 PCIe" -> "a100-pcie": the memory is read by itself.
std::string device_word(const std::string& gpu) {
  std::string s = plain_text(gpu);
  for (const char* word :
       {"nvidia ", "tesla ", "tensor core ", "gpus", "gpu", "dgx-", "dgx ", "hgx-", "hgx "}) {
    for (auto at = s.find(word); at != std::string::npos; at = s.find(word))
      s.erase(at, std::string_view(word).size());
  }
  // "8x H100"; "-80gb", "80 GB", "HBM2e", "500W", "NVL72" behind the name.
  static const std::regex many(R"(^\d+ ?x ?|^\d+ (?=[a-z]))"),
      rest(R"([ ,/-]+(\d+[ -]?(gb|gib|g)|\d+w|hbm\w*|nvl72)(?=[ ,/-]|$))"), between("[ ,/-]+");
  s = std::regex_replace(s, many, "");
  s = std::regex_replace(s, rest, "");
  s = std::regex_replace(s, between, "-");
  while (!s.empty() && s.back() == '-') s.pop_back();
  return s;
}

/// Without what says only that it is the card on a board: "gb200-sxm" -> "gb200".
std::string without_form(std::string word) {
  if (const auto at = word.find("-sxm"); at != std::string::npos) word.resize(at);
  return word;
}

bool is_pcie(std::string_view name) { return has(name, "pcie"); }

}  // namespace

std::string_view name(RowSchema schema) { return columns_of(schema).name; }

RowSchema recognise(const CsvTable& table) {
  const std::set<std::string_view> there(table.header.begin(), table.header.end());
  for (const auto& s : schemas()) {
    const bool fits = std::all_of(s.mark.begin(), s.mark.end(),
                                  [&](std::string_view c) { return there.count(c) > 0; });
    const bool measured =
        s.any.empty() || std::any_of(s.any.begin(), s.any.end(),
                                     [&](std::string_view c) { return there.count(c) > 0; });
    if (!fits || !measured) continue;
    for (const std::string_view needed : {"id", "gpu"}) {
      if (there.count(needed) == 0)
        throw InputError(table.file, fmt::format("looks like {} but has no column '{}'; add it",
                                                 s.name, needed));
    }
    return s.schema;
  }
  std::vector<std::string> known;
  for (const auto& s : schemas())
    known.push_back(fmt::format("{} ({}{}{})", s.name, fmt::join(s.mark, ", "),
                                s.any.empty() ? "" : ", and one of ", fmt::join(s.any, ", ")));
  throw InputError(
      fmt::format("{}:1", table.file),
      fmt::format("the columns are those of no known table; there are {}", fmt::join(known, "; ")));
}

std::vector<UnreadColumn> unread_columns(const CsvTable& table) {
  // Other names that frameworks and tables have for columns; of several columns the first that the
  // schema has.
  struct Names {
    std::string_view column;
    std::vector<std::string_view> others;
  };
  static const std::vector<Names> usual{
      {"batch_per_gpu", {"batch_size", "batch"}},
      {"time_us", {"time"}},
      {"time_s", {"time"}},
      {"iteration_time_s", {"step_time", "step_time_s", "iteration_time", "time_s", "time"}},
      {"step_time_s", {"step_time"}},
      {"tp", {"tensor_parallel", "tensor_parallel_size", "tensor_model_parallel_size", "tp_size"}},
      {"pp",
       {"pipeline_parallel", "pipeline_parallel_size", "pipeline_model_parallel_size", "pp_size",
        "stages"}},
      {"virtual_stages_per_gpu", {"vpp", "virtual_stages", "interleaving"}},
      {"cp", {"context_parallel", "context_parallel_size", "cp_size"}},
      {"ep", {"expert_parallel", "expert_parallel_size", "expert_model_parallel_size", "ep_size"}},
      {"dp", {"data_parallel", "data_parallel_size", "dp_size"}},
      {"parallelism", {"data_parallel"}},
      {"sequence_parallel", {"sp"}},
      {"zero_or_fsdp", {"zero", "zero_stage", "fsdp", "sharding", "distributed_optimizer"}},
      {"micro_batch_per_dp_rank", {"mbs", "micro_batch", "micro_batch_size"}},
      {"global_batch_seqs", {"gbs", "global_batch", "global_batch_size", "batch_size", "batch"}},
      {"global_batch", {"gbs", "global_batch_size"}},
      {"seq_len_tokens", {"seq", "seq_len", "seq_length", "sequence_length"}},
      {"num_layers", {"layers"}},
      {"hidden_size", {"hidden"}},
      {"num_heads", {"heads", "num_attention_heads"}},
      {"num_kv_heads", {"kv_heads", "num_query_groups"}},
      {"ffn_hidden_size", {"ffn"}},
      {"num_experts", {"experts"}},
      {"moe_topk", {"top_k", "topk"}},
      {"params_billion", {"params", "parameters"}},
      {"num_gpus", {"devices", "gpus", "n_gpus", "world_size", "ranks", "nodes"}},
      {"num_nodes", {"nodes"}},
      {"gpu", {"device", "accelerator", "gpu_type"}},
      {"inter_node_interconnect", {"network", "interconnect"}},
      {"interconnect", {"network"}},
      {"recompute", {"recomputation", "activation_checkpointing", "checkpointing"}},
      {"precision", {"dtype"}},
      {"attention_kernel", {"attention"}},
      {"overlap_and_other_settings", {"settings", "flags"}},
      {"tokens_per_s_per_gpu", {"tokens_per_s"}},
      {"tflops_per_gpu", {"tflops"}},
      {"mfu_pct", {"mfu"}},
      {"peak_mem_per_gpu_gib", {"peak_memory"}},
      {"size_bytes", {"bytes", "size"}},
  };
  const SchemaColumns& schema = columns_of(recognise(table));
  std::vector<std::string> known{"id", "family", "from_memory", "source", "notes"};
  for (const auto* list : {&schema.configuration, &schema.others})
    known.insert(known.end(), list->begin(), list->end());
  const auto in = [](const std::vector<std::string>& list, std::string_view name) {
    return std::find(list.begin(), list.end(), name) != list.end();
  };
  std::vector<std::string> missing;
  for (const std::string& name : known)
    if (!in(table.header, name)) missing.push_back(name);
  std::vector<UnreadColumn> unread;
  for (const std::string& column : table.header) {
    if (in(known, column)) continue;
    UnreadColumn u{column, ""};
    std::string plain = lower(column);
    for (char& c : plain)
      if (c == ' ' || c == '-') c = '_';
    if (in(known, plain)) u.meant = plain;
    for (const auto& [name, others] : usual) {
      const bool other = std::find(others.begin(), others.end(), plain) != others.end();
      if (u.meant.empty() && other && in(known, std::string(name))) u.meant = name;
    }
    if (u.meant.empty() && plain.size() > 3) u.meant = nearest_of(plain, missing);
    unread.push_back(std::move(u));
  }
  return unread;
}

Row::Row(const CsvTable& table, std::size_t record)
    : table_(&table), record_(&table.records[record]) {}

const std::string& Row::operator[](std::string_view column) const {
  static const std::string nothing;
  for (std::size_t i = 0; i < table_->header.size(); ++i) {
    if (table_->header[i] == column) return record_->fields[i];
  }
  return nothing;
}

const std::vector<std::string_view>& Configuration::columns(RowSchema schema) {
  return columns_of(schema).configuration;
}

Configuration::Configuration(RowSchema schema, const Row& row) {
  for (const std::string_view column : columns(schema)) {
    const std::string& cell = row[column];
    const std::string plain = lower(cell);
    // What tables write where nothing is known.
    const bool nothing = plain == "-" || plain == "?" || plain == "n/a" || plain == "na" ||
                         plain == "nan" || plain == "unknown";
    if (!cell.empty() && !nothing) cells_.emplace(std::string(column), cell);
  }
}

const std::string& Configuration::operator[](std::string_view column) const {
  static const std::string nothing;
  const auto found = cells_.find(column);
  return found == cells_.end() ? nothing : found->second;
}

bool Configuration::fill(const std::string& column, const std::string& cell) {
  return cells_.emplace(column, cell).second;
}

void Configuration::replace(const std::string& column, const std::string& cell,
                            const std::string& why) {
  if (cell.empty()) {
    cells_.erase(column);
    return;
  }
  cells_.insert_or_assign(column, cell);
  replaced_.push_back(fmt::format("{} {} ({})", column, cell, why));
}

std::vector<RowSettings> load_settings(const std::string& file) {
  std::vector<RowSettings> all;
  const YamlNode root = YamlNode::load_file(file, "partita.settings/1");
  for (const YamlNode& n : root.get("settings").items()) {
    RowSettings s;
    s.rows = n.get("rows").as_strings();
    if (const auto precisions = n.find("precisions")) s.precisions = precisions->as_strings();
    s.reason = n.get("reason").as_string();
    for (const auto& [column, cell] : n.get("cells").members()) {
      const std::string& name = column;  // clang 14 captures no bindings
      const bool setting = std::any_of(schemas().begin(), schemas().end(), [&](const auto& schema) {
        const auto& names = schema.configuration;
        return std::find(names.begin(), names.end(), name) != names.end();
      });
      if (!setting)
        throw InputError(cell.place(), fmt::format("'{}' is no column of settings", column));
      s.cells[column] = cell.as_string();
    }
    n.reject_unknown_keys();
    all.push_back(std::move(s));
  }
  root.reject_unknown_keys();
  return all;
}

void apply_settings(const std::vector<RowSettings>& settings, const std::string& id,
                    Configuration& row) {
  const auto any = [](const std::vector<std::string>& patterns, const std::string& text) {
    return std::any_of(patterns.begin(), patterns.end(),
                       [&](const std::string& p) { return matches(p, text); });
  };
  for (const RowSettings& s : settings) {
    if (!any(s.rows, id)) continue;
    if (!s.precisions.empty() && !any(s.precisions, row["precision"])) continue;
    for (const auto& [column, cell] : s.cells) row.replace(column, cell, s.reason);
  }
}

std::optional<std::int64_t> Configuration::whole(std::string_view column, std::int64_t least,
                                                 std::int64_t most) const {
  const std::string& cell = (*this)[column];
  if (cell.empty()) return std::nullopt;
  const auto n = number(cell);
  if (!n || *n != std::floor(*n))
    throw InputError(std::string(column), fmt::format("'{}' is no whole number", cell));
  if (*n < static_cast<double>(least) || *n > static_cast<double>(most))
    throw InputError(std::string(column),
                     fmt::format("{} is not in {} to {}", cell, least, grouped(most)));
  return static_cast<std::int64_t>(*n);
}

std::string Configuration::key() const {
  std::string s;
  for (const auto& [column, cell] : cells_) s += fmt::format("{}={}\n", column, cell);
  return s;
}

ClusterShape cluster_shape(const std::string& name_or_file) {
  const auto known = topology_catalogue();
  const bool of_catalogue = std::binary_search(known.begin(), known.end(), name_or_file);
  // A fabric of a file's own may need all of its nodes.
  const Topology t = load_topology(of_catalogue ? name_or_file + ":1" : name_or_file);
  ClusterShape s;
  s.name = name_or_file;
  s.device = t.device(DeviceId{0}).name;
  s.devices_per_node = static_cast<std::int64_t>(t.device_count(0));
  s.nics_per_node = static_cast<std::int64_t>(t.nic_count(0));
  s.file = of_catalogue
               ? fmt::format("{}/{}.yaml", data_folder("topologies/catalogue"), name_or_file)
               : name_or_file;
  const YamlNode file = YamlNode::load_file(s.file, "partita.topology/1");
  if (const auto aliases = file.find("aliases")) s.aliases = aliases->as_strings();
  if (const auto network = file.find("network")) s.network = network->as_string();
  const auto fabric = file.find("fabric");
  s.may_sum = fabric && fabric->find("sharp");
  const YamlNode nodes = file.get("nodes").items().at(0);
  if (const auto domain = nodes.find("domain"))
    s.nodes_per_domain = domain->get("nodes").as_int(1, 1'000'000);
  for (const auto& [key, vertex] : nodes.get("vertices").members()) {
    const std::string kind = vertex.get("kind").as_string();
    if (kind == "device") s.device_key = key;
    if (kind != "nic") continue;
    s.nic_key = key;
    if (const auto latency = vertex.find("latency")) s.nic_latency = latency->as_string();
    s.nic_efficiency = vertex.find("efficiency").has_value();
  }
  return s;
}

Catalogue load_catalogue() {
  Catalogue c;
  c.models = known_models();
  for (const auto& n : device_catalogue()) c.devices.push_back(load_device(n));
  for (const auto& n : frameworks()) c.frameworks.push_back(load_framework(n, "framework"));
  c.settings = load_settings(data_folder("validation/settings.yaml"));
  for (const auto& n : topology_catalogue()) c.clusters.push_back(cluster_shape(n));
  return c;
}

std::string ClusterChoice::key() const {
  std::string s = topology;
  for (const auto& e : edits.cluster) s += fmt::format("|{}={}", e.path, e.value);
  for (const auto& e : edits.device) s += fmt::format("|device.{}={}", e.path, e.value);
  return s;
}

const DeviceProfile& device_of(const Catalogue& catalogue, const std::string& gpu,
                               const std::string& memory, const std::string& intra) {
  const std::string word = device_word(gpu);
  if (word.empty()) throw InputError("gpu", "is not printed");
  const bool pcie = is_pcie(word) || is_pcie(lower(intra));
  // "40", "40 GB"; else what the card's name says.
  auto printed = number(memory);
  if (!printed) printed = gigabytes(memory.empty() ? gpu : memory);
  if (printed && *printed > 4096) printed = *printed / 1024;  // MiB, as nvidia-smi says it
  const auto names = [](const DeviceProfile& d) {
    auto all = d.aliases;
    all.push_back(d.name);
    return all;
  };
  const DeviceProfile* best = nullptr;
  int best_score = 0;
  for (const DeviceProfile& d : catalogue.devices) {
    int score = 0;
    for (const std::string& n : names(d)) {
      if (n == word)
        score = std::max(score, 4);
      else if (n == without_form(word) || n.rfind(without_form(word) + "-sxm", 0) == 0)
        score = std::max(score, 3);
      else if (n.rfind(word + "-", 0) == 0 && (is_pcie(d.name) == pcie || word.size() > 5))
        score = std::max(score, 2);
    }
    if (score == 0) continue;
    // The memory decides between cards of one name; the slot where its text does.
    const double gib = static_cast<double>(d.memory.count) / (1 << 30);
    if (printed && std::abs(gib - *printed) <= 0.06 * gib) score += 8;
    if (pcie == is_pcie(d.name)) score += 3;
    if (score > best_score) best_score = score, best = &d;
  }
  if (best == nullptr) {
    std::vector<std::string> known;
    for (const DeviceProfile& d : catalogue.devices) known.push_back(d.name);
    throw InputError("gpu", fmt::format("'{}' has no device profile; there are {}", gpu,
                                        fmt::join(known, ", ")));
  }
  return *best;
}

ClusterChoice cluster_of(const Catalogue& catalogue, const std::string& gpu,
                         const std::string& memory, std::int64_t gpus,
                         std::optional<std::int64_t> per_node, const std::string& intra,
                         const std::string& inter, std::vector<std::string>& assumed) {
  const DeviceProfile& device = device_of(catalogue, gpu, memory, intra);
  const std::string inside = lower(intra);
  for (const char* without : {"no nvlink", "without nvlink", "nvlink off", "nvlink disabled"}) {
    if (has(inside, without) && !is_pcie(device.name) && gpus > 1)
      throw InputError(
          "intra_node_interconnect",
          fmt::format("'{}': nodes of {} have NVLink in every cluster of the catalogue; "
                      "write a topology file without it and use partita simulate",
                      intra, device.name));
  }
  if (has(inside, "bridge") && is_pcie(device.name) && gpus > 1)
    assumed.push_back("transfers in a node by PCIe: NVLink bridges are in no cluster");
  const std::string generation = device.name.substr(0, device.name.find('-'));
  const ClusterShape* best = nullptr;
  int best_score = -1;
  for (const ClusterShape& c : catalogue.clusters) {
    const bool same = c.device == device.name;
    const bool kin = c.device.substr(0, c.device.find('-')) == generation &&
                     is_pcie(c.device) == is_pcie(device.name);
    if (!same && !kin) continue;
    // Nodes of 72 are trays of one domain.
    const bool fits = per_node && c.devices_per_node == *per_node;
    const bool named = std::any_of(c.aliases.begin(), c.aliases.end(), [&](const auto& alias) {
      return matches(lower(alias), lower(intra)) || matches(lower(alias), lower(inter));
    });
    // A machine of a name of its own only where it is named.
    if (!named && !c.aliases.empty()) continue;
    const int score =
        (named ? 8 : 0) + (fits ? 4 : 0) + (same ? 2 : 0) + (c.devices_per_node == 8 ? 1 : 0);
    if (score > best_score) best_score = score, best = &c;
  }
  if (best == nullptr)
    throw InputError("gpu", fmt::format("no cluster of the catalogue has {}", device.name));
  ClusterChoice choice;
  choice.topology = fmt::format("{}:{} gpus", best->name, gpus);
  choice.devices_per_node = best->devices_per_node;
  // Some of each node's GPUs: the rest of a node is there all the same.
  if (per_node && *per_node < best->devices_per_node && gpus > *per_node && gpus % *per_node == 0 &&
      best->nodes_per_domain == 1) {
    choice.topology = fmt::format("{}:{} nodes of {}", best->name, gpus / *per_node, *per_node);
    choice.devices_per_node = *per_node;
  }
  if (!per_node && gpus > 1)
    assumed.push_back(fmt::format("{} GPUs per node ({})", best->devices_per_node, best->name));
  if (per_node && *per_node != best->devices_per_node &&
      gpus > std::min(*per_node, best->devices_per_node))
    assumed.push_back(
        fmt::format("nodes of {} for {} of {} GPUs", best->name, device.name, *per_node));
  if (best->device != device.name)
    choice.edits.cluster.push_back(
        {fmt::format("nodes[0].vertices.{}.device", best->device_key), device.name});
  const std::int64_t nodes = ceil_div(gpus, choice.devices_per_node);
  if (best->nodes_per_domain > 1) {
    const std::int64_t each = nodes_of_each_domain(nodes, best->nodes_per_domain);
    if (each != best->nodes_per_domain)
      assumed.push_back(fmt::format("{} nodes of each NVLink domain", each));
  }
  if (nodes > 1 && best->nics_per_node > 0) {
    const std::string words = " " + lower(inter);
    // A transport in software takes as long as on the cluster of the catalogue that has it.
    const ClusterShape* alike = nullptr;
    for (const ClusterShape& c : catalogue.clusters) {
      if (!c.network.empty() && !c.nic_efficiency && matches(c.network, words) &&
          (alike == nullptr || c.network.size() > alike->network.size()))
        alike = &c;
    }
    if (alike != nullptr && best->network.empty()) {
      choice.edits.cluster.push_back(
          {fmt::format("nodes[0].vertices.{}.latency", best->nic_key), alike->nic_latency});
      assumed.push_back(fmt::format("a card's latency {} ({})", alike->nic_latency, alike->name));
    }
    const bool sums = has(words, "sharp") && !has(words, "no sharp") &&
                      !has(words, "without sharp") && !has(words, "sharp off");
    if (best->may_sum && sums) choice.edits.cluster.push_back({"fabric.sharp", "true"});
    if (const auto rate = network_rate(inter)) {
      // All of a node's rate goes through the cards of the GPUs that run.
      const auto gpus_of_node = static_cast<double>(choice.devices_per_node);
      const double cards = std::min(static_cast<double>(best->nics_per_node), gpus_of_node);
      if (rate->bare) assumed.push_back(fmt::format("{} a node", text(rate->rate)));
      const double node = rate->rate.count * (rate->per_gpu    ? gpus_of_node
                                              : rate->per_card ? cards
                                                               : 1);
      // What the cluster's own cards reach is not what another network's do.
      if (best->nic_efficiency && !matches(best->network, words))
        choice.edits.cluster.push_back(
            {fmt::format("nodes[0].vertices.{}.efficiency", best->nic_key), "1"});
      choice.edits.cluster.push_back({fmt::format("nodes[0].vertices.{}.bandwidth", best->nic_key),
                                      exact_text(BytesPerSecond{node / cards})});
    } else {
      assumed.push_back(fmt::format("network of {}", best->name));
    }
  }
  return choice;
}

namespace {
/// May it have run there? `device` empty: unknown.
bool of_device(const FrameworkProfile& f, const std::string& device) {
  return f.devices.empty() || device.empty() ||
         std::any_of(f.devices.begin(), f.devices.end(),
                     [&](const std::string& pattern) { return matches(pattern, device); });
}
}  // namespace

const FrameworkProfile* framework_of(const Catalogue& catalogue, const std::string& text,
                                     const std::string& model, const std::string& precision,
                                     const std::string& device, bool later) {
  const std::string word = lower(text);
  const auto any = [](const std::vector<std::string>& patterns, const std::string& what) {
    return std::any_of(patterns.begin(), patterns.end(),
                       [&](const auto& pattern) { return matches(lower(pattern), lower(what)); });
  };
  const FrameworkProfile* best = nullptr;
  std::size_t best_score = 0;
  for (const FrameworkProfile& f : catalogue.frameworks) {
    const bool own = any(f.networks, model);
    if (!own && !f.networks.empty()) continue;
    if (!f.precisions.empty() && !any(f.precisions, precision)) continue;
    if (!of_device(f, device) || (later && f.early)) continue;
    auto all = f.aliases;
    all.push_back(f.name);
    for (const std::string& alias : all) {
      if (!matches(lower(alias), word)) continue;
      // Whole names before patterns, long patterns before short ones, then code of this network.
      const bool pattern = has(alias, "*") || has(alias, "?");
      const auto stars = static_cast<std::size_t>(std::count(alias.begin(), alias.end(), '*'));
      const std::size_t score = 2 * (2 * (alias.size() - stars) + (pattern ? 0 : 1) + 1) + own;
      if (score > best_score) best_score = score, best = &f;
    }
  }
  return best;
}

const KnownModel* model_of(const Catalogue& catalogue, const std::string& text,
                           std::string* besides) {
  // Folders before the name: "Classification/ConvNets/resnet50v1.5 (...)"; none is "ViT-B/16".
  const auto slash = text.rfind('/', text.find('('));
  const bool folder = slash != std::string::npos &&
                      (slash + 1 == text.size() || text[slash + 1] < '0' || text[slash + 1] > '9');
  std::string last = folder ? text.substr(slash + 1) : text;
  if (lower(last).rfind("meta-llama", 0) == 0 || lower(last).rfind("meta llama", 0) == 0)
    last.erase(0, 5);
  std::string with_brackets;
  for (const char c : last) with_brackets += c == '(' || c == ')' ? ' ' : c;
  const KnownModel* best = nullptr;
  std::size_t longest = 0;
  for (const std::string& form : {plain_text(last), plain_text(with_brackets)}) {
    // Prefixes of the text that end where a word may end: "llama-3-8b" is no beginning of
    // "llama-3-80b", "qwen-3" none of "qwen-3.8", but "deepseek-v2" one of "deepseek_v2 4 layers".
    std::set<std::string> beginnings;
    for (std::size_t i = 1; i <= form.size(); ++i) {
      const auto digit = [&](std::size_t at) {
        return at < form.size() && form[at] >= '0' && form[at] <= '9';
      };
      // "gpt2-xl" is another one than "gpt2".
      static const std::regex of_size(
          R"(^[ _-]*(xxl|xl|large|medium|small|base|tiny|mini|huge|giant)(?![a-z0-9])(?! batch))");
      if (i < form.size() &&
          std::regex_search(form.begin() + static_cast<std::ptrdiff_t>(i), form.end(), of_size))
        continue;
      const bool point = i + 1 < form.size() && form[i] == '.' && digit(i + 1);
      if (form[i - 1] == '.' && digit(i)) continue;
      if (digit(i - 1) && (digit(i) || point || (i < form.size() && form[i] == 'b'))) continue;
      beginnings.insert(squeezed(form.substr(0, i)));
    }
    for (const KnownModel& m : catalogue.models) {
      std::map<std::string, std::string> all = m.stands_in_for;
      all.emplace(m.name, "");
      for (const std::string& alias : m.aliases) all.emplace(alias, "");
      for (const auto& [alias, note] : all) {
        const std::string a = squeezed(alias);
        if (a.size() <= longest || beginnings.count(a) == 0) continue;
        longest = a.size();
        best = &m;
        if (besides != nullptr) *besides = note;
      }
    }
  }
  return best;
}

std::string RowCase::key() const {
  std::string s = model + "|";
  if (transformer) {
    const TransformerConfig& c = *transformer;
    std::string windowed;
    for (const char w : c.windowed_layers) windowed += w != 0 ? '1' : '0';
    s += fmt::format("{} {} {} {} {} {} {} {} ", c.layers, c.hidden, c.heads, c.kv_heads,
                     c.head_dim, c.ffn, c.vocabulary, c.sequence);
    s += fmt::format("{} {} {} {} {} {} {} {} {} {} ", static_cast<int>(c.norm),
                     static_cast<int>(c.norm_position), c.qk_norm, c.positions, c.rotary_dim,
                     static_cast<int>(c.activation), c.gated, c.qkv_bias, c.attention_output_bias,
                     c.mlp_bias);
    s += fmt::format("{} {} {} ", c.norm_bias, static_cast<int>(c.residual), c.head_bias);
    s += fmt::format("{} {} {} {} {} {} {} {} ", c.causal, c.window, windowed, c.sinks,
                     c.limited_activation, c.tied, static_cast<int>(c.head), c.mtp_layers);
    s += fmt::format("{} {} {} {} {} ", c.latent.query_rank, c.latent.key_value_rank,
                     c.latent.nope_dim, c.latent.rope_dim, c.latent.value_dim);
    s += fmt::format("{} {} {} {} {} {} {} {} {} {} {} ", c.moe.experts, c.moe.top_k, c.moe.ffn,
                     c.moe.shared_ffn, c.moe.first_dense, c.moe.every,
                     fmt::join(c.moe.dense_layers, ","), c.moe.sigmoid, c.moe.normalise,
                     c.moe.router_bias, c.moe.expert_bias);
    s += fmt::format("{} {} {} ", c.moe.groups, c.moe.top_groups, c.moe.group_best);
    s += fmt::format("{} {} {} {} ", c.classes, c.predicted, c.embedding_rows, c.memory);
    s += fmt::format("{} {} {} {} ", c.generator.hidden, c.generator.heads, c.generator.ffn,
                     c.generator.predicted);
    s += fmt::format("{} {} {} {} {} {}", c.token_types, c.embedding_norm, c.image, c.patch,
                     c.dropout, c.flash_attention);
    s += fmt::format(" {} {} {} {} {} {} {} {} {}", c.pattern, c.mtp_pattern, c.mtp_shared,
                     c.mamba.heads, c.mamba.head_dim, c.mamba.groups, c.mamba.state, c.mamba.chunk,
                     c.moe.latent);
  }
  s += fmt::format("|{}|{}|{}|{} {} {} {} {} {} {} {}", fmt::join(lora, ","), cluster.key(),
                   to_yaml(plan), plan.allocations.fp32_loss, plan.allocations.score_buffer,
                   plan.allocations.attention_dropout, plan.allocations.loss_forward.count,
                   plan.allocations.workspace.count, plan.allocations.workspace_hopper.count,
                   plan.allocations.workspace_grouped.count, plan.kernels.fused_experts);
  s += fmt::format(" {} {} {} {} {} {}", plan.kernels.activation_passes_forward,
                   plan.kernels.activation_passes_backward, plan.kernels.logit_forward,
                   plan.kernels.flash, static_cast<int>(plan.precision.gradients),
                   static_cast<int>(plan.precision.gradient_communication));
  if (layer)
    s += fmt::format(" {} {}", static_cast<int>(layer->part), static_cast<int>(layer->pass));
  return s;
}

namespace {

/// Builds a RowCase from one row, step by step; each step may add to `assumed`.
class CaseBuilder {
 public:
  CaseBuilder(RowSchema schema, const Configuration& row, const Catalogue& catalogue)
      : schema_(schema),
        row_(row),
        catalogue_(catalogue),
        flags_(megatron_flags(row["overlap_and_other_settings"])),
        settings_(settings_of(row["overlap_and_other_settings"])) {
    // Tests of Megatron's own layers, which know no context parallelism, leave Transformer Engine
    // out of their names.
    constexpr std::string_view kTests = "gpt3_mcore_";
    const std::string& name = row["model"];
    if (!flags_.any && name.rfind(kTests, 0) == 0 && name.compare(kTests.size(), 3, "te_") != 0 &&
        row_.whole("cp").value_or(1) == 1)
      flags_.local = true;
  }

  RowCase build() {
    c_.assumed = row_.replaced();
    if (schema_ == RowSchema::memory) c_.layer = layer_quantity(row_["quantity"]);
    for (const auto& [column, cell] :
         cells_of(command_line(row_["overlap_and_other_settings"]).flags))
      row_.fill(column, cell);
    if (has(lower(row_["recompute"]), "sequence parallel")) row_.fill("sequence_parallel", "yes");
    find_framework();
    // "DeepSpeed ZeRO-3".
    if (row_["zero_or_fsdp"].empty() && has(lower(row_["framework"]), "zero") &&
        row_.fill("zero_or_fsdp", row_["framework"]))
      assume("sharding of the framework's name");
    read_recipes();
    find_network();
    find_ranks();
    find_batch();
    find_settings();
    check_size();
    return std::move(c_);
  }

 private:
  template <class... Args>
  void assume(fmt::format_string<Args...> form, Args&&... args) {
    c_.assumed.push_back(fmt::format(form, std::forward<Args>(args)...));
  }

  /// Has the network what those of 2022 had not?
  bool later_network() const {
    const auto size = [&](const char* column) { return number(row_[column]).value_or(0); };
    const KnownModel* known = model_of(catalogue_, row_["model"]);
    if (size("num_experts") > 1 ||
        (size("num_kv_heads") > 0 && size("num_kv_heads") < size("num_heads")))
      return true;
    if (known == nullptr || !known->transformer) return false;
    const TransformerConfig& t = *known->transformer;
    return t.gated || t.norm == TransformerConfig::Norm::rms || t.moe.experts > 0 ||
           (t.kv_heads > 0 && t.kv_heads < t.heads);
  }

  void find_framework() {
    const std::string& text = row_["framework"];
    std::string device;
    try {
      device = device_of(catalogue_, row_["gpu"], memory_text(), row_["interconnect"]).name;
    } catch (const InputError&) {  // find_ranks says it
    }
    const auto sharding = sharding_of(row_["zero_or_fsdp"]);
    framework_ = framework_of(catalogue_, text, row_["model"], row_["precision"], device,
                              (sharding && sharding->zero.value_or(0) > 0) || later_network());
    // A quantity may have the name that one framework logs it under, a precision a recipe's.
    if (text.empty() && schema_ == RowSchema::memory) {
      framework_ = framework_of(catalogue_, row_["quantity"], row_["model"], "");
      if (framework_ != nullptr) {
        assume("framework {}, by its name of the quantity", framework_->name);
        return;
      }
      framework_ = framework_of(catalogue_, row_["precision"], row_["model"], "");
      if (framework_ != nullptr) {
        assume("framework {}, by its name of the precision", framework_->name);
        return;
      }
    }
    const auto profile = [&](const std::string& name) {
      for (const FrameworkProfile& f : catalogue_.frameworks)
        if (f.name == name) return &f;
      throw InternalError("no framework " + name);
    };
    // Whole copies for each GPU are not what a trainer over PyTorch has that shards.
    if (framework_ != nullptr && framework_->name == "pytorch-ddp" && !has(lower(text), "ddp")) {
      const char* shards = has(lower(row_["zero_or_fsdp"]), "fsdp")     ? "pytorch-fsdp"
                           : sharding && sharding->zero.value_or(0) > 0 ? "deepspeed"
                                                                        : nullptr;
      if (shards != nullptr) {
        framework_ = profile(shards);
        assume("framework {}, by the sharding", framework_->name);
      }
    }
    // torchao's products in 8 bits are worth nothing uncompiled, as its README says.
    if (framework_ == nullptr || framework_->uncompiled.empty()) {
      if (settings_.compiled.value_or(false)) settings_.unread.emplace_back("torch.compile");
    } else {
      const auto type = precision_of(row_["precision"]);
      const bool narrow = settings_.precision == "fp8" || (type && type->name.find("fp8") == 0);
      if (!settings_.compiled.value_or(narrow || has(lower(text), "compile"))) {
        framework_ = profile(framework_->uncompiled);
        assume("not compiled (framework {})", framework_->name);
      }
    }
    if (framework_ != nullptr && !text.empty()) return;
    // Without one: what the sharding says, what the model was published with, the usual one.
    const KnownModel* known = model_of(catalogue_, row_["model"]);
    const std::string fallback = schema_ == RowSchema::convolution          ? "pytorch-ddp"
                                 : has(lower(row_["zero_or_fsdp"]), "fsdp") ? "pytorch-fsdp"
                                 : known != nullptr && text.empty() && !known->framework.empty()
                                     ? known->framework
                                     : "megatron-core";
    framework_ = profile(fallback);
    if (!of_device(*framework_, device)) framework_ = profile("megatron-core");
    assume("framework {}", framework_->name);
  }

  /// Configurations of the framework fill the cells that the row leaves empty: the one that its
  /// settings name ("recipe NAME"), and that of a network of its sizes.
  void read_recipes() {
    const std::string& text = row_["overlap_and_other_settings"];
    constexpr std::string_view kWord = "recipe ";
    std::string named;
    if (text.rfind(kWord, 0) == 0)
      named = text.substr(kWord.size(), text.find(' ', kWord.size()) - kWord.size());
    if (framework_->recipes.count(named) == 0) unknown_recipe_ = named;
    if (!settings_.context_parallel.empty()) row_.fill("cp", settings_.context_parallel);
    if (!settings_.sharding.empty()) row_.fill("zero_or_fsdp", settings_.sharding);
    if (recompute_of(settings_.recompute) || recomputed_blocks(settings_.recompute)) {
      row_.fill("recompute", settings_.recompute);
    } else if (!settings_.recompute.empty()) {
      settings_.unread.push_back(settings_.recompute);
    }
    for (const auto& [name, recipe] : framework_->recipes) {
      if (name != named && !of_its_sizes(recipe)) continue;
      for (const auto& [column, cell] : recipe.sets) {
        if (row_.fill(column, cell)) assume("{} {} (recipe)", column, cell);
      }
    }
  }
  bool of_its_sizes(const Recipe& recipe) const {
    if (recipe.when.empty()) return false;
    const bool version = recipe.frameworks.empty() ||
                         std::any_of(recipe.frameworks.begin(), recipe.frameworks.end(),
                                     [&](const std::string& pattern) {
                                       return matches(pattern, lower(row_["framework"]));
                                     });
    int printed = 0;
    const bool alike = std::all_of(recipe.when.begin(), recipe.when.end(), [&](const auto& cell) {
      const std::string& said = row_[cell.first];
      printed += said.empty() ? 0 : 1;
      return said.empty() || said == cell.second;
    });
    return version && alike && printed >= 2;
  }

  /// What a recipe that no profile knows sets is no matter of assumption.
  void need(const char* column) const {
    if (unknown_recipe_.empty() || !row_[column].empty()) return;
    throw InputError(column, fmt::format("is not printed, and the recipe '{}' is in no profile",
                                         unknown_recipe_));
  }

  // ---- the network -----------------------------------------------------------------------------
  const KnownModel& named(const std::string& name) const {
    for (const KnownModel& m : catalogue_.models) {
      if (m.name == name) return m;
    }
    throw InternalError("no model " + name);
  }

  void find_network() {
    const std::string& text = row_["model"];
    std::string besides;
    const KnownModel* known = model_of(catalogue_, text, &besides);
    if (!besides.empty()) assume("{}: {}", known->name, besides);
    if (known != nullptr) c_.counts_tokens = known->counts_tokens;
    if (known != nullptr && !known->transformer) {
      c_.model = known->name;
      return;
    }
    const auto layers = row_.whole("num_layers"), hidden = row_.whole("hidden_size"),
               heads = row_.whole("num_heads"), experts = printed_experts();
    TransformerConfig t;
    bool architecture = false;  // the named entry has these sizes
    if (known != nullptr) {
      t = *known->transformer;
      c_.model = known->name;
      architecture = hidden ? *hidden == t.hidden : has_parameters(*known, layers);
      if (!architecture && !hidden && t.moe.experts > 0)
        throw InputError("model", fmt::format("'{}' has {} billion parameters, which {} has not; "
                                              "print num_layers and hidden_size",
                                              text, *billions(), known->name));
      if (!architecture) assume("kind of block of {}", known->name);
    } else {
      if (schema_ == RowSchema::convolution)
        throw InputError("model", fmt::format("'{}' is in no catalogue", text));
      if (!(layers && hidden) && experts.value_or(1) <= 1 && names_experts(text))
        throw InputError("model", fmt::format("'{}' is in no catalogue, and the sizes of its "
                                              "experts are not printed",
                                              text));
      t = *named(framework_->model).transformer;
      c_.model = fmt::format("as {}", framework_->model);
      assume("kind of block of {} (framework {})", framework_->model, framework_->name);
    }
    const int known_layers = t.layers;
    if (!architecture) {
      // Sizes follow from those that are printed, not from the entry's.
      // A hybrid keeps its kind of experts; their sizes are printed.
      if (t.pattern.empty()) t.moe = {};
      t.windowed_layers.clear();
      t.kv_heads = t.head_dim = t.ffn = 0;
      // Tests of a known network's kind, smaller, read the other tests' texts (GPT-2's merges).
      if (known == nullptr || framework_->workspace_deterministic.count > 0)
        t.vocabulary = framework_->vocabulary;
      sizes_from_parameters(t, layers, hidden);
    }
    if (layers) t.layers = static_cast<int>(*layers);
    if (hidden) t.hidden = *hidden;
    if (!architecture && t.mamba.heads > 0) {
      // Twice as wide as the network (MambaMixer's expand).
      t.mamba.heads = std::max<std::int64_t>(1, 2 * t.hidden / t.mamba.head_dim / t.mamba.groups) *
                      t.mamba.groups;
      assume("{} heads of Mamba", t.mamba.heads);
    }
    if (architecture && !layers) assume("{} layers ({})", t.layers, c_.model);
    if (heads) {
      if (architecture && *heads != t.heads && t.head_dim == 0) t.kv_heads = 0;
      t.heads = *heads;
    } else if (!architecture) {
      t.heads = heads_of(t.hidden);
      assume("{} heads", t.heads);
    }
    if (const auto kv = row_.whole("num_kv_heads")) {
      if (t.heads % *kv != 0)
        throw InputError("num_kv_heads", fmt::format("{} do not divide {} heads", *kv, t.heads));
      t.kv_heads = *kv;
    } else if (!architecture && schema_ == RowSchema::training)
      assume("as many key/value heads as heads");
    if (t.kv_heads > 0 && t.heads % t.kv_heads != 0) t.kv_heads = 0;
    apply_flags(t);
    t.tied = settings_.tied.value_or(t.tied);
    if (const auto ffn = row_.whole("ffn_hidden_size")) {
      t.ffn = *ffn;
    } else if (t.ffn == 0 && t.moe.experts == 0) {
      t.ffn = t.gated ? (8 * t.hidden / 3 + 63) / 64 * 64 : 4 * t.hidden;
      assume("feed-forward width {}", t.ffn);
    }
    if (const auto v = row_.whole("vocab_size")) {
      t.vocabulary = *v;
    } else {
      // Megatron's tests of speed without experts are of mock data: NullTokenizer, 131,073 and one.
      if (framework_->workspace_deterministic.count > 0 && known == nullptr &&
          has(text, "memory_speed") && experts.value_or(1) <= 1)
        t.vocabulary = 131'074;
      assume("vocabulary {}", t.vocabulary);
    }
    find_experts(t, experts);
    if (known != nullptr && t.moe.experts > 0 && t.moe.first_dense > 0 && t.layers < known_layers) {
      // A part of a network keeps its share of each kind of block, the fewer kind rounded up.
      t.moe.first_dense = static_cast<int>(
          ceil_div(std::int64_t{t.moe.first_dense} * t.layers, std::int64_t{known_layers}));
      assume("{} dense blocks of {}", t.moe.first_dense, t.layers);
    }
    if (const auto s = row_.whole("seq_len_tokens")) {
      t.sequence = *s;
    } else if (const auto in_name = words_number(text, {"seq ", "sequence length "})) {
      t.sequence = *in_name;
    } else {
      if (schema_ == RowSchema::convolution && !c_.counts_tokens) t.sequence = unsaid_sequence(t);
      assume("sequence {}", t.sequence);
    }
    if (schema_ == RowSchema::convolution) find_task(t);
    if (t.positions > 0) t.positions = std::max(t.positions, t.sequence);
    if (t.rotary_dim > 0 && !architecture) t.rotary_dim = t.hidden / t.heads / 2 * 2;
    if (has(lower(text), "w/ mtp")) {
      t.mtp_layers = 1;
    } else if (framework_->mtp && known != nullptr && !has(lower(text), "w/o mtp") &&
               (architecture ? t.layers == known_layers : !t.pattern.empty())) {
      t.mtp_layers = known->mtp_trained;
      if (t.mtp_layers > 0) assume("{} multi-token prediction", t.mtp_layers);
    }
    const std::string kernel =
        plain_text(row_["attention_kernel"].empty() ? flags_.attention : row_["attention_kernel"]);
    const auto says = [&](std::initializer_list<std::string_view> words) {
      return std::any_of(words.begin(), words.end(),
                         [&](std::string_view w) { return has(kernel, w); });
    };
    if (kernel.rfind("non-flash", 0) == 0 || kernel.rfind("no flash", 0) == 0 ||
        kernel.rfind("without flash", 0) == 0 || kernel.rfind("no_flash", 0) == 0 ||
        (says({"unfused", "local", "eager", "naive", "vanilla", "standard", "materiali", "math",
               "softmax", "baddbmm", "bmm"}) &&
         !says({"flash"})) ||
        kernel == "none" || kernel == "torch" || kernel == "attn_impl: torch" ||
        kernel == "native" ||
        (kernel.empty() &&
         (flags_.local || (!flags_.any && deterministic() && row_.whole("cp").value_or(1) == 1)))) {
      t.flash_attention = false;
      if (kernel.empty()) assume("materialised attention");
    } else if (says({"flash", "fused", "sdpa", "triton", "fa1", "fa2", "fa3", "fa4", "fa-", "fa v",
                     "fa_", "cudnn", "xformers", "mem", "flex", "splash", "transformer engine"}) ||
               kernel == "fa" || kernel == "te") {
      t.flash_attention = true;
      flash_version_ = flash_version_of(lower(row_["attention_kernel"]));
    } else if (!kernel.empty() && kernel != "auto") {
      throw InputError("attention_kernel",
                       fmt::format("'{}' is not understood; say flash or unfused", kernel));
    } else {
      t.flash_attention = framework_->flash_attention;
      assume("{} attention", t.flash_attention ? "flash" : "materialised");
    }
    // Networks of Llama's kind and hybrids are trained without.
    const bool llama = flags_.gated && flags_.rope && flags_.no_bias;
    if (t.dropout == 0 && framework_->dropout > 0 && !llama && !flags_.no_dropout &&
        t.pattern.empty()) {
      t.dropout = framework_->dropout;
      assume("dropout {}", t.dropout);
    }
    const std::string plain = lower(text);
    bool adapters = settings_.lora.value_or(has(plain, "lora") || has(plain, "peft"));
    for (const Workload& w : framework_->workloads) {
      if (w.packed > 0 && t.window == 0 && w.packed < t.sequence && concerns(w)) {
        // A token sees half of its sample.
        t.window = (w.packed + 1) / 2;
        assume("samples of {} tokens, packed (workload)", w.packed);
      }
      if (!adapters && !settings_.lora && w.lora.value_or(false) && concerns(w)) {
        adapters = true;
        assume("fine-tuning by adapters (workload)");
      }
    }
    if (adapters) {
      // Latent attention's are projections down and up.
      const bool latent = t.latent.key_value_rank > 0, queries = t.latent.query_rank > 0;
      if (latent && queries) c_.lora = {"*.attention.query_down", "*.attention.query_up"};
      if (!queries) c_.lora = {"*.attention.query"};
      for (const char* name : latent ? std::vector<const char*>{"kv_down", "key_up", "value_up"}
                                     : std::vector<const char*>{"key", "value"})
        c_.lora.push_back(fmt::format("*.attention.{}", name));
      c_.lora.emplace_back("*.attention.output");
      assume("adapters of rank 16 on attention's projections");
    }
    t.name = c_.model;
    c_.transformer = t;
  }

  /// Of patterns of operators those that the network has. Norms that the product behind them holds
  /// (Transformer Engine's LayerNormLinear) are not made again by themselves: those before latent
  /// projections and experts stand alone.
  std::string of_the_network(const std::string& patterns) {
    if (!c_.transformer || patterns.find('*') == std::string::npos) return patterns;
    const Graph graph = build_transformer(*c_.transformer);
    std::string left;
    for (std::size_t at = 0; at <= patterns.size();) {
      const std::size_t end = std::min(patterns.find(',', at), patterns.size());
      const std::string one = patterns.substr(at, end - at);
      at = end + 1;
      if (!flags_.local &&
          ((one == "~*attention_norm" && c_.transformer->latent.key_value_rank == 0) ||
           (one == "~*mlp_norm" && c_.transformer->moe.experts == 0)))
        continue;
      const std::string pattern = one[0] == '~' ? one.substr(1) : one;
      const bool there = std::any_of(graph.operators.begin(), graph.operators.end(),
                                     [&](const Operator& op) { return matches(pattern, op.name); });
      if (there) left += (left.empty() ? "" : ",") + one;
    }
    return left.empty() ? "none" : left;
  }

  /// Is the row's run that of the framework's configuration?
  bool concerns(const Workload& w) const {
    const auto type = precision_of(row_["precision"]);
    return partita::concerns(
        w,
        {lower(row_["framework"]), lower(row_["model"]), lower(row_["inter_node_interconnect"]),
         c_.model, device_of(catalogue_, row_["gpu"], memory_text(), row_["interconnect"]).name,
         type ? type->name : framework_->precision, row_.whole("num_gpus").value_or(0)},
        c_.plan);
  }

  /// As many that each has nearest to 128 values, all alike, and tp divides them; if there are
  /// such, as many that the framework's softmax is fused for one sample: a network has its heads
  /// whatever the micro-batch.
  std::int64_t heads_of(std::int64_t hidden) const {
    const std::int64_t tp = std::max<std::int64_t>(1, row_.whole("tp").value_or(1));
    const auto unfused = [&](std::int64_t heads) {
      return hidden % heads != 0 || heads / tp % framework_->kernels.fused_batches != 0;
    };
    const auto off = [&](std::int64_t heads) { return std::abs(hidden / heads - 128); };
    std::int64_t best = tp;
    for (std::int64_t n = tp; n <= hidden; n += tp) {
      if (hidden % n == 0 && hidden / n % 2 == 0 &&
          (hidden % best != 0 ||
           std::pair(unfused(n), off(n)) < std::pair(unfused(best), off(best))))
        best = n;
    }
    return best;
  }

  /// One sample, or as few more as the framework's softmax is fused for.
  std::int64_t least_micro_batch(const Plan& p, std::optional<std::int64_t> all) const {
    const int fused = framework_->kernels.fused_batches;
    if (!c_.transformer || c_.transformer->flash_attention) return 1;
    for (std::int64_t samples = 1; samples <= fused; ++samples) {
      if (c_.transformer->heads / p.tp * samples % fused == 0 &&
          (!all || *all % (p.dp * samples) == 0))
        return samples;
    }
    return 1;
  }

  /// Billions of parameters: the column's, else of the name ("GPT-2 1.5B", not "8x7B", "A3B").
  std::optional<double> billions() const {
    const auto n = number(row_["params_billion"]);
    return n ? n : billions_of(row_["model"]);
  }

  /// Is the printed number of parameters near that of the entry, or not printed? A name begins the
  /// names of many sizes ("GPT-2-like 52B"). A size in the entry's own names is its: "llama-3.2-1b"
  /// has 1.24 billion, "17B-16E" 109.
  bool has_parameters(const KnownModel& known, std::optional<std::int64_t> layers) const {
    const auto printed = billions();
    if (!printed || layers) return true;
    const auto own = [&](const std::string& name) { return billions_of(name) == printed; };
    if (own(known.name) || std::any_of(known.aliases.begin(), known.aliases.end(), own))
      return true;
    const TransformerConfig& t = *known.transformer;
    const auto all = static_cast<double>(parameter_count(build_transformer(t)));
    return std::abs(all - *printed * 1e9) < 0.15 * all;
  }

  /// Layers and hidden size where only a number of parameters is printed: P = 12 l h² with h = 128
  /// l (the aspect of the GPTs of arXiv 2104.04473), h a multiple of 128.
  void sizes_from_parameters(TransformerConfig& t, std::optional<std::int64_t> layers,
                             std::optional<std::int64_t> hidden) {
    if (layers && hidden) return;
    // Of no known kind of network a number in a name says too little.
    const auto printed =
        c_.model.rfind("as ", 0) == 0 ? number(row_["params_billion"]) : billions();
    const std::string& text = row_["model"];
    if (!printed || *printed <= 0)
      throw InputError(layers ? "hidden_size" : "num_layers",
                       fmt::format("is not printed, and '{}' is in no catalogue", text));
    const double parameters = *printed * 1e9;
    if (hidden) {
      t.hidden = *hidden;
    } else {
      const double h = layers ? std::sqrt(parameters / 12 / static_cast<double>(*layers))
                              : std::cbrt(parameters * 128 / 12);
      t.hidden = std::max<std::int64_t>(128, std::llround(h / 128) * 128);
      assume("hidden size {}", t.hidden);
    }
    if (!layers) {
      const double h = static_cast<double>(t.hidden);
      t.layers = static_cast<int>(std::max(1.0, std::round(parameters / 12 / h / h)));
      assume("{} layers", t.layers);
    }
  }

  void apply_flags(TransformerConfig& t) {
    if (!flags_.any && !flags_.architecture) return;
    if (t.moe.experts > 0 && c_.model.rfind("as ", 0) != 0) return;  // a named architecture
    if (c_.model.rfind("as ", 0) != 0) return;
    t.gated = flags_.gated;
    if (flags_.gated) t.activation = ActivationKind::silu;
    t.tied = !flags_.untied;
    if (flags_.no_bias) t.qkv_bias = t.attention_output_bias = t.mlp_bias = false;
    if (flags_.rope) {
      t.positions = 0;
      t.rotary_dim = t.hidden / t.heads / 2 * 2;
    }
    if (flags_.latent) {
      // Its test's; beside experts DeepSeek-V3's, with smaller ranks in small networks.
      t.latent = {192, 64, 16, 8, 16};
      if (like_deepseek()) {
        t.latent = named("deepseek-v3").transformer->latent;
        if (t.hidden < 1024) t.latent.query_rank = 256, t.latent.key_value_rank = 128;
      }
      t.kv_heads = 0;
      t.positions = 0;
      t.rotary_dim = 0;
      t.qkv_bias = false;
      assume("latent ranks {} and {}, heads of {} + {}", t.latent.query_rank,
             t.latent.key_value_rank, t.latent.nope_dim, t.latent.rope_dim);
    }
  }

  void find_experts(TransformerConfig& t, std::optional<std::int64_t> experts) {
    if (experts && *experts <= 1) t.moe = {};
    if (experts && *experts > 1) {
      const bool fresh = t.moe.experts == 0;
      const std::int64_t width = t.moe.ffn;
      t.moe.experts = *experts;
      if (const auto k = row_.whole("moe_topk")) {
        t.moe.top_k = *k;
      } else if (fresh) {
        assume("top {} of the experts", t.moe.top_k);
      }
      if (const auto f = row_.whole("moe_ffn_hidden_size")) {
        t.moe.ffn = *f;
        if (!fresh && !t.pattern.empty()) t.moe.shared_ffn = t.moe.shared_ffn * *f / width;
      } else if (fresh) {
        t.moe.ffn = t.ffn > 0 ? t.ffn : 4 * t.hidden;
        assume("experts of width {}", t.moe.ffn);
      }
      if (t.moe.top_k > t.moe.experts) t.moe.top_k = t.moe.experts;
      // Groups are of the entry's number of experts, or of another that they divide as well.
      if (t.moe.experts % t.moe.groups != 0 ||
          t.moe.experts / t.moe.groups * t.moe.top_groups < t.moe.top_k ||
          t.moe.experts / t.moe.groups < t.moe.group_best)
        t.moe.groups = t.moe.top_groups = t.moe.group_best = 1;
      if (fresh && flags_.latent) {
        // Latent attention and experts are DeepSeek-V3's kind of network.
        const TransformerConfig& known = *named("deepseek-v3").transformer;
        t.moe.shared_ffn = t.moe.ffn * known.moe.shared_ffn / known.moe.ffn;
        t.moe.first_dense = std::min(known.moe.first_dense, t.layers / 2);
        assume("{} dense blocks of {}, a shared expert of {} (deepseek-v3)", t.moe.first_dense,
               t.layers, t.moe.shared_ffn);
        if (!sharded_parameters() && !has(row_["model"], "no_mtp")) {
          t.mtp_layers = 1;
          assume("1 multi-token prediction");
        }
      }
    }
    if (t.moe.experts > 0 && !experts && schema_ == RowSchema::training)
      assume("{} experts ({})", t.moe.experts, c_.model);
  }

  /// BERT's tasks: SQuAD at 384 tokens, which fine-tuning without another task is, other
  /// fine-tuning at 128, pre-training at 128 and then 512. Benchmarks fill the memory, and 512
  /// tokens of BERT-large, 24 blocks of 1,024, take about 2 GiB a sample under mixed precision and
  /// 3 1/3 in 32 bits, of others in proportion: a batch that fits is of the longer phase. A batch
  /// that could not even fit at 128 tokens is of several passes; the second phase's is half of the
  /// first's, 8,192 samples at 80 GB and 4,096 at 32 (DeepLearningExamples, pretrain_config.sh).
  std::int64_t unsaid_sequence(const TransformerConfig& t) const {
    const std::string s = lower(row_["model"]);
    std::int64_t sequence = 128;
    if (has(s, "squad") || (has(s, "fine-tuning") && !has(s, " for "))) {
      sequence = 384;
    } else if (pretraining(s)) {
      const auto batch = row_.whole("batch_per_gpu");
      const DeviceProfile& d =
          device_of(catalogue_, row_["gpu"], memory_text(), row_["interconnect"]);
      const std::int64_t gib = d.memory.count >> 30;
      const std::int64_t large = 24 * 1024, size = t.layers * t.hidden;
      const auto type = precision_of(row_["precision"]);
      const bool wide = type && (type->name == "fp32" || type->name == "tf32");
      if (batch && (wide ? 10 : 6) * *batch * size <= 3 * gib * large) sequence = 512;
      if (batch && *batch * size > 8 * gib * large && *batch <= 72 * gib) sequence = 512;
    }
    return std::min(t.sequence, sequence);
  }
  /// The column, else "32G" or "32GB" in the name of a table of the samples' schema.
  std::string memory_text() const {
    const std::string& cell = row_["gpu_memory_gb"];
    if (!cell.empty() || schema_ != RowSchema::convolution) return cell;
    const auto named = gigabytes(row_["model"]);
    return named ? fmt::format("{}", *named) : cell;
  }
  static bool pretraining(const std::string& model) {
    return has(model, "pre-training") || has(model, "pretraining") || has(model, "mlperf phase");
  }

  /// What BERT's head computes: in pre-training the masked positions, at most 20 of 128 and 80 of
  /// 512 (google-research/bert: max_predictions_per_seq), in fine-tuning a few classes a token.
  void find_task(TransformerConfig& t) {
    const std::string s = lower(row_["model"]);
    if (t.dropout == 0) {
      t.dropout = 0.1;  // arXiv 1810.04805, appendix A.2; 1901.02860's code
      assume("dropout {}", t.dropout);
    }
    const bool generated = t.head == TransformerConfig::Head::replaced_tokens;
    if (t.head != TransformerConfig::Head::masked_language_model && !generated) return;
    if (has(s, "fine-tuning")) {
      t.head = TransformerConfig::Head::token_classifier;
      t.tied = false;
      t.generator = {};
      assume("{} classes a token", t.classes);
    } else if (pretraining(s)) {
      if (t.sequence == 512 && framework_->mean_of_512 > 0) {
        t.sequence = framework_->mean_of_512;
        assume("{} tokens of 512 in the mean", t.sequence);
      }
      std::int64_t& predicted = generated ? t.generator.predicted : t.predicted;
      predicted = (t.sequence * 5 + 31) / 32;
      assume("{} predicted tokens", predicted);
    }
  }

  /// Megatron's tests of latent attention and experts.
  bool like_deepseek() const { return flags_.latent && printed_experts().value_or(1) > 1; }
  bool sharded_parameters() const {
    const auto z = sharding_of(row_["zero_or_fsdp"]);
    return z && z->zero == 3;
  }

  /// The column's, else of a name like "..._8experts_etp1_ep4".
  std::optional<std::int64_t> printed_experts() const {
    if (const auto n = row_.whole("num_experts", 0)) return n;
    const std::string s = lower(row_["model"]);
    const auto end = s.find("experts");
    if (end == std::string::npos) return std::nullopt;
    std::size_t start = end;
    while (start > 0 && s[start - 1] >= '0' && s[start - 1] <= '9') --start;
    const auto n = number(std::string_view(s).substr(start, end - start));
    if (!n || *n < 1 || *n > 1e5) return std::nullopt;
    return static_cast<std::int64_t>(*n);
  }

  /// "seq 128" in a name -> 128.
  static std::optional<std::int64_t> words_number(const std::string& text,
                                                  std::initializer_list<std::string_view> words) {
    const std::string s = lower(text);
    for (const std::string_view word : words) {
      const auto at = s.find(word);
      if (at == std::string::npos) continue;
      std::size_t end = at + word.size();
      while (end < s.size() && s[end] >= '0' && s[end] <= '9') ++end;
      const auto n = number(std::string_view(s).substr(at + word.size(), end - at - word.size()));
      if (n && *n >= 1 && *n < 1e7) return static_cast<std::int64_t>(*n);
    }
    return std::nullopt;
  }

  // ---- ranks and batch -------------------------------------------------------------------------
  std::int64_t degree(std::string_view column, const char* what, bool say = true) {
    // No virtual stages, no groups of experts: 0 is 1.
    const bool none = column == "virtual_stages_per_gpu" || column == "ep";
    if (const auto n = row_.whole(column, none ? 0 : 1, 100'000))
      return std::max<std::int64_t>(1, *n);
    if (say && schema_ != RowSchema::convolution) assume("{} 1", what);
    return 1;
  }

  void find_ranks() {
    Plan& p = c_.plan;
    need("seq_len_tokens");
    need("global_batch_seqs");
    if (c_.transformer && c_.transformer->moe.experts > 0) need("ep");
    p.cp = degree("cp", "context parallel", false);
    split_model();
    p.ep = degree("ep", "expert parallel", false);
    if (row_["virtual_stages_per_gpu"].empty() && flags_.chunk_layers && c_.transformer) {
      // L / (p n) chunks of n layers a stage.
      const double chunks = static_cast<double>(c_.transformer->layers) /
                            static_cast<double>(p.pp * *flags_.chunk_layers);
      p.virtual_stages = std::max<std::int64_t>(1, std::llround(chunks));
    } else if (row_["virtual_stages_per_gpu"].empty() && like_deepseek() && p.pp > 1) {
      const std::int64_t layers = c_.transformer->layers;
      p.virtual_stages = std::max<std::int64_t>(1, (layers + p.pp) / (2 * p.pp));
      assume("virtual stages {}, of two blocks", p.virtual_stages);
    } else {
      const bool interleaved = row_["virtual_stages_per_gpu"].empty() && framework_->splits_batch &&
                               settings_.interleaved;
      if (interleaved) assume("virtual stages 2, as interleaved");
      p.virtual_stages =
          interleaved ? 2 : degree("virtual_stages_per_gpu", "virtual stages", p.pp > 1);
    }
    if (p.pp == 1) p.virtual_stages = 1;
    if (const auto n = row_.whole("etp", 0, 100'000); n && *n > 0 && p.ep > 1) p.etp = *n;
    if (p.etp == 0 && p.ep > 1) p.etp = words_number(row_["model"], {"_etp"}).value_or(0);
    const std::int64_t model = p.tp * p.pp * p.cp;
    const auto dp = row_.whole("dp", 1, 100'000), gpus = row_.whole("num_gpus", 1, 1'000'000);
    const auto per_node = row_.whole("gpus_per_node", 1, 1000);
    std::int64_t ranks = 0;
    if (gpus) {
      ranks = *gpus;
      if (ranks % model != 0)
        throw InputError("num_gpus", fmt::format("{} GPUs are no multiple of tp {} x pp {} x cp {}",
                                                 ranks, p.tp, p.pp, p.cp));
      p.dp = ranks / model;
      // A printed dp that counts context parallel ranks as well is the same plan.
      if (dp && *dp != p.dp && *dp != p.dp * p.cp)
        throw InputError("dp", fmt::format("{} x tp {} x pp {} x cp {} is not {} GPUs", *dp, p.tp,
                                           p.pp, p.cp, ranks));
    } else if (dp) {
      p.dp = *dp;
      ranks = p.dp * model;
    } else {
      // Nothing but the shape of a node is known: the fewest whole nodes with whole expert groups.
      const std::int64_t node = per_node.value_or(8);
      p.dp = std::max<std::int64_t>(1, node / model);
      while (p.dp < 4096 &&
             (p.dp * model % std::min(node, p.dp * model) != 0 || p.dp * p.cp * p.tp % p.ep != 0))
        ++p.dp;
      ranks = p.dp * model;
      assume("{} GPUs", ranks);
    }
    if (p.ep > 1 && p.etp == 0 && p.tp > 1 && p.dp * p.cp % p.ep != 0 &&
        p.dp * p.cp * p.tp % p.ep == 0) {
      p.etp = 1;  // there is no other place for so many groups
      assume("expert tensor parallel 1");
    }
    const std::string& interconnect = row_["interconnect"];
    c_.cluster = cluster_of(catalogue_, row_["gpu"], memory_text(), ranks, per_node,
                            interconnect.empty() ? row_["intra_node_interconnect"] : interconnect,
                            interconnect.empty() ? row_["inter_node_interconnect"] : interconnect,
                            c_.assumed);
    if (!c_.layer || !c_.layer->alone) return;
    // Nothing runs before and after a layer alone for long enough to slow the device down.
    const DeviceProfile& device =
        device_of(catalogue_, row_["gpu"], memory_text(), row_["intra_node_interconnect"]);
    if (device.sustained_clock < 1) {
      c_.cluster.edits.device.push_back({"sustained_clock.value", "1"});
      assume("the clock of short kernels: a single layer");
    }
  }

  /// tp and pp. Where only dp and the GPUs are printed a replica has GPUs / dp of them, and tensor
  /// parallelism as many as a node holds (arXiv 2104.04473, section 3.2, takeaway 1).
  void split_model() {
    Plan& p = c_.plan;
    const auto dp = row_.whole("dp", 1, 100'000), gpus = row_.whole("num_gpus", 1, 1'000'000);
    const bool tp = !row_["tp"].empty(), pp = !row_["pp"].empty();
    const std::int64_t each = dp && gpus && *gpus % (*dp * p.cp) == 0 ? *gpus / *dp / p.cp : 1;
    if (each > 1 && !tp && !pp) {
      const std::int64_t node = row_.whole("gpus_per_node", 1, 1000).value_or(8);
      p.tp = 1;
      while (2 * p.tp <= node && each % (2 * p.tp) == 0) p.tp *= 2;
      p.pp = each / p.tp;
      assume("tensor parallel {}, pipeline parallel {} ({} GPUs a replica)", p.tp, p.pp, each);
      return;
    }
    p.tp = degree("tp", "tensor parallel", pp || each == 1);
    p.pp = degree("pp", "pipeline parallel", tp || each == 1);
  }

  void find_batch() {
    Plan& p = c_.plan;
    if (schema_ == RowSchema::convolution) {
      const auto each = row_.whole("batch_per_gpu"), all = row_.whole("global_batch");
      if (!each && !all) throw InputError("batch_per_gpu", "is not printed");
      const std::string& how = row_["parallelism"];
      const std::string plain = squeezed(how);
      const bool data = how.empty() || plain == "dp" || plain == "ddp" || plain == "dataparallel" ||
                        plain == "dataparallelism" || plain == "distributeddataparallel";
      if (!data || has(how, "spatial") || has(how, "model split"))
        throw InputError("parallelism", fmt::format("'{}' is not read; use data parallel", how));
      const std::int64_t passes = row_.whole("accumulation_steps", 1, 1'000'000).value_or(1);
      if (!each && *all % (p.dp * passes) != 0)
        throw InputError("global_batch", fmt::format("{} is no multiple of {} GPUs and {} passes",
                                                     *all, p.dp, passes));
      p.micro_batch = each ? *each : *all / p.dp / passes;
      p.global_batch = all ? *all : p.micro_batch * p.dp * passes;
      if (p.micro_batch < 1 || p.global_batch < 1)
        throw InputError("batch_per_gpu", "is less than one sample");
      return;
    }
    const auto micro = row_.whole("micro_batch_per_dp_rank"), all = row_.whole("global_batch_seqs");
    const auto accumulation = accumulation_of(row_["overlap_and_other_settings"]);
    if (micro && framework_->splits_batch && p.pp > 1 && (!all || *all == *micro * p.dp)) {
      // What is printed is a rank's batch, of which the pipeline makes micro-batches.
      p.micro_batch = 1;
      p.global_batch = *micro * p.dp;
      assume("micro-batch 1, global batch {}", p.global_batch);
      return;
    }
    if (micro) {
      p.micro_batch = *micro;
    } else if (all && accumulation && *all % (p.dp * *accumulation) == 0) {
      p.micro_batch = *all / p.dp / *accumulation;
    } else {
      p.micro_batch = least_micro_batch(p, all);
      assume("micro-batch {}", p.micro_batch);
    }
    if (all) {
      p.global_batch = *all;
    } else {
      // Bubbles were found negligible from four micro-batches a stage on (arXiv 1811.06965,
      // section 2.3): who pays for a pipeline fills it.
      const std::int64_t turns = accumulation.value_or(p.pp > 1 ? 4 * p.pp : 1);
      p.global_batch = p.micro_batch * p.dp * turns;
      assume("global batch {}", p.global_batch);
    }
    if (p.micro_batch < 1 || p.global_batch < 1)
      throw InputError("global_batch_seqs", "is less than one sample");
  }

  // ---- settings --------------------------------------------------------------------------------
  void find_settings() {
    Plan& p = c_.plan;
    const FrameworkProfile& f = *framework_;
    const std::string& precision = row_["precision"];
    std::optional<PrecisionText> type;
    if (precision.empty()) {
      type = PrecisionText{f.precision};
      assume("precision {}", f.precision);
    } else {
      type = precision_of(precision);
      if (!type) throw InputError("precision", fmt::format("'{}' is not understood", precision));
    }
    if (!settings_.precision.empty() && (type->name == "bf16" || type->name == "fp16"))
      type->name = settings_.precision;
    set_precision(p, type->name, "precision");
    set_framework(p, f.name, "framework");
    if (flash_version_) p.kernels.flash = *flash_version_;
    if (type->fp32_beside) {
      p.precision.parameters = p.precision.activations = ElementType::fp32;
      p.precision.master_copy = false;
      p.precision_roles = true;
    }
    if (type->fp32_gradients || !p.precision.master_copy)
      p.precision.gradients = p.precision.gradient_communication = ElementType::fp32;
    set_sharding();
    const std::string& sp = row_["sequence_parallel"];
    if (const auto on = switch_of(sp)) {
      p.sequence_parallel = *on && p.tp > 1;
    } else if (!sp.empty()) {
      throw InputError("sequence_parallel", fmt::format("'{}' is not understood", sp));
    } else {
      // Megatron trains experts beside tensor parallelism with sequence parallelism only.
      p.sequence_parallel = (f.sequence_parallel || p.ep > 1) && p.tp > 1;
      if (p.tp > 1) assume("sequence parallel {}", p.sequence_parallel ? "on" : "off");
    }
    const std::string& recompute = row_["recompute"];
    if (recompute.empty()) {
      p.recompute = parse_recompute(
          c_.transformer || f.recompute != "selective" ? f.recompute : "none", "recompute");
      if (c_.transformer) assume("recompute {}", f.recompute);
    } else if (c_.transformer && recomputed_blocks(recompute)) {
      p.recompute = {Recompute::full};  // recompute_blocks leaves some out
    } else if (const auto how = recompute_of(recompute)) {
      // What goes to the host is as little there as what is computed again.
      const bool offloads = has(row_["model"], "fine_grained_offloading") && *how != "selective";
      p.recompute = parse_recompute(offloads ? (*how == "attention" ? "" : *how + ",") +
                                                   "*attention.core,*moe.dispatch,*moe.gate,*moe.up"
                                             : of_the_network(*how),
                                    "recompute");
    } else {
      throw InputError("recompute", fmt::format("'{}' is not understood", recompute));
    }
    if (p.recompute.kind == Recompute::selective && p.selective.kind != Recompute::attention)
      assume("selective recompute is {}", f.selective);
    c_.logs_first_stage = f.logs_first_stage;
    c_.logs_memory = f.logs_memory;
    c_.logs_hardware_flops = f.logs_hardware_flops;
    if (settings_.fused_loss.value_or(false)) {
      p.allocations.fp32_loss = false;
      fuse_loss();
    }
    set_allocations();
    bool overlaps_tensor_parallel = f.overlap_tensor_parallel;
    for (const Workload& w : f.workloads) {
      if (!concerns(w)) continue;
      const auto open = [&](std::string_view key) {
        return key != "recompute" || recompute.empty();
      };
      for (const std::string& said : apply(w, p, open, overlaps_tensor_parallel))
        assume("{} (workload)", said);
    }
    if (flags_.any) {
      p.overlap_gradients = flags_.overlap_gradients;
      p.overlap_tensor_parallel = flags_.overlap_tensor_parallel && p.sequence_parallel;
      p.rows_once = flags_.flex_dispatcher;
    } else if (p.dp > 1 && !settings_.overlap_gradients) {
      assume("gradient overlap {}", f.overlap_gradients ? "on" : "off");
    }
    if (overlaps_tensor_parallel && !flags_.any && !settings_.overlap_tensor_parallel &&
        p.sequence_parallel && c_.transformer && c_.transformer->moe.experts == 0) {
      p.overlap_tensor_parallel = true;
      assume("tensor-parallel overlap on");
    }
    apply_settings();
    if (!c_.transformer) {
      p.optimizer.kind = OptimizerKind::sgd;
      p.optimizer.momentum = 0.9;
      assume("SGD with momentum");
    }
    if (c_.transformer && p.pp > 1) cut_pipeline();
    if (c_.transformer) recompute_blocks();
    if (like_deepseek() && f.workspace_deterministic.count > 0)
      p.pad_vocabulary = sharded_parameters() ? 64 : 3232;
    p.lora_rank = c_.lora.empty() ? 0 : 16;
    p.lora = c_.lora;
  }

  /// What the row says in words, whatever the framework does by itself.
  void apply_settings() {
    Plan& p = c_.plan;
    const Settings& s = settings_;
    const auto set = [](std::optional<bool> said, bool& in) { in = said.value_or(in); };
    set(s.overlap_gradients, p.overlap_gradients);
    if (s.overlap_tensor_parallel)
      p.overlap_tensor_parallel = *s.overlap_tensor_parallel && p.sequence_parallel;
    p.tensor_parallel_in_turn = p.tensor_parallel_in_turn || s.nothing_overlaps;
    if (s.overlap_experts) p.overlap_experts = s.overlap_experts;
    if (s.overlap_messages && p.pp > 1)
      p.send_wait = *s.overlap_messages ? SendWait::never : SendWait::always;
    set(s.rows_once, p.rows_once);
    if (s.graphs) {
      p.launches.graphs = *s.graphs && s.graphs_of.empty();
      p.launches.graphs_beside_experts = *s.graphs && s.graphs_of == "beside experts";
      p.launches.graphs_of = !*s.graphs                   ? ""
                             : s.graphs_of == "attention" ? "*.attention*"
                             : s.graphs_of == "mlp"       ? "*.mlp*"
                                                          : "";
      if (p.launches.graphs) p.launches.waits_for_counts = false;
    }
    // Megatron-Core's "(tokendrop)" in the name of a network is moe_pad_expert_input_to_capacity.
    const std::string model = lower(row_["model"]);
    if (p.launches.waits_for_counts && c_.transformer && c_.transformer->moe.experts > 0 &&
        s.padded_capacity.value_or(has(model, "tokendrop") || has(model, "token drop"))) {
      p.launches.waits_for_counts = false;
      assume("rows of experts padded to capacities: no wait for counts");
    }
    set(s.offload_activations, p.offload_activations);
    if (s.offload_blocks > 0 && p.offload_activations) p.offload_blocks = s.offload_blocks;
    set(s.offload_optimizer, p.offload_optimizer);
    if (s.fp32_gradients)
      p.precision.gradients = p.precision.gradient_communication =
          *s.fp32_gradients ? ElementType::fp32 : p.precision.parameters;
    if (!s.context.empty())
      p.context = parse_context_exchange(s.context, "overlap_and_other_settings"),
      p.context_given = true;
    if (!s.schedule.empty()) {
      set_schedule(s.schedule);
    } else if (has(lower(row_["framework"]), "dualpipe") && p.pp > 1 && p.pp % 2 == 0 &&
               p.virtual_stages == 1 && p.global_batch % (2 * p.micro_batch * p.dp) == 0 &&
               p.global_batch >= 2 * p.pp * p.micro_batch * p.dp) {
      set_schedule("dualpipe");
      assume("schedule DualPipe");
    }
    for (const std::string& clause : s.unread) assume("not read: {}", clause);
  }
  void set_schedule(const std::string& name) {
    c_.plan.schedule = parse_schedule(name, "overlap_and_other_settings");
    c_.plan.schedule_given = true;
  }

  /// Where the row recomputes some blocks, not all.
  void recompute_blocks() {
    Plan& p = c_.plan;
    const auto some = recomputed_blocks(row_["recompute"]);
    if (!some) return;
    const std::int64_t layers = c_.transformer->layers;
    auto chunks = p.cuts;
    if (chunks.empty() && p.chunks() <= layers) chunks = blocks_per_chunk(layers, p.chunks());
    std::string patterns;
    std::int64_t block = 0, again = 0;
    const auto count = static_cast<std::int64_t>(std::max<std::size_t>(1, chunks.size()));
    const std::int64_t first = some->in_all > 0 ? (some->in_all + count - 1) / count : some->first;
    if (some->in_all > 0 && count > 1) assume("{} blocks of each chunk recomputed", first);
    for (const std::int64_t of_chunk : chunks) {
      for (std::int64_t k = 0; k < of_chunk; ++k, ++block) {
        if (first > 0 ? k >= first : (block + 1) % some->every != 0) continue;
        patterns += fmt::format("{}layers.{}.*", patterns.empty() ? "" : ",", block);
        ++again;
      }
    }
    if (again < layers)
      p.recompute = parse_recompute(patterns.empty() ? "none" : patterns, "recompute");
  }

  /// Of blocks that are not cut evenly.
  void cut_pipeline() {
    Plan& p = c_.plan;
    const std::int64_t layers = c_.transformer->layers, chunks = p.chunks();
    if (has(row_["model"], "uneven_pipeline") && chunks == p.pp && chunks > 2 && layers > 4 &&
        (layers - 4) % (chunks - 2) == 0) {
      p.cuts.assign(static_cast<std::size_t>(chunks), (layers - 4) / (chunks - 2));
      p.cuts.front() = p.cuts.back() = 2;
      assume("two blocks in the first and in the last stage");
    } else if (like_deepseek() && framework_->workspace_deterministic.count > 0 &&
               row_["virtual_stages_per_gpu"].empty()) {
      // The dense blocks stand in the first chunk, the loss's has what is left: a layout of the
      // tests, Et*3|(tt|)*.
      std::int64_t left = layers;
      for (std::int64_t k = 0; k < chunks; ++k) {
        const std::int64_t most =
            k == 0 ? std::max<std::int64_t>(2, c_.transformer->moe.first_dense) : 2;
        p.cuts.push_back(k + 1 < chunks ? std::min(left, most) : left);
        left -= p.cuts.back();
      }
    } else if (layers % chunks != 0 && (layers + 2) % chunks == 0) {
      // account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split.
      p.cuts.assign(static_cast<std::size_t>(chunks), (layers + 2) / chunks);
      --p.cuts.front(), --p.cuts.back();
      assume("embedding and loss count as a block each");
    } else if (layers % chunks != 0 && c_.transformer->mtp_layers > 0) {
      // Megatron's layouts of DeepSeek-V3: equal chunks until none are left; what predicts
      // further and the loss stand beside the last's rest.
      const std::int64_t most = ceil_div(layers, chunks);
      for (std::int64_t k = 0; k < chunks; ++k)
        p.cuts.push_back(std::clamp(layers - k * most, std::int64_t{0}, most));
      assume("equal chunks of {} blocks, the last with what is left", most);
    }
  }

  /// A slip of the row's author must not keep everybody waiting.
  void check_size() const {
    const auto most = [](const char* column, std::int64_t n, std::int64_t limit) {
      if (n > limit)
        throw InputError(column, fmt::format("{} is more than any run had ({})", n, limit));
    };
    const Plan& p = c_.plan;
    if (c_.transformer) {
      const TransformerConfig& t = *c_.transformer;
      most("num_layers", t.layers, 1000);
      most("hidden_size", t.hidden, 1'000'000);
      most("num_heads", t.heads, 100'000);
      most("ffn_hidden_size", t.ffn, 10'000'000);
      most("vocab_size", t.vocabulary, 100'000'000);
      most("seq_len_tokens", t.sequence, 100'000'000);
      most("num_experts", t.moe.experts, 100'000);
    }
    most("num_gpus", p.tp * p.pp * p.cp * p.dp, 200'000);
    most("virtual_stages_per_gpu", p.virtual_stages, 1000);
    most("micro_batch_per_dp_rank", p.micro_batch, 10'000'000);
    most("global_batch_seqs", p.global_batch / p.micro_batch / p.dp, 100'000);
  }

  bool fused_loss() const {
    return flags_.fused_loss || has(row_["model"], "cross_entropy_loss_fusion") ||
           (like_deepseek() && c_.transformer && c_.transformer->mtp_layers > 0);
  }
  void fuse_loss() {
    FrameworkKernels& k = c_.plan.kernels;
    if (framework_->logit_forward_fused == 0) return;
    k.logit_forward = framework_->logit_forward_fused;
    k.logit_backward = framework_->logit_backward_fused;
    k.logit_share_forward = k.logit_share_backward = 0;
  }
  /// Megatron's tests run so where their names do not say otherwise, but for those of flash
  /// attention without experts, which the context parallel ones use; its fused loss refuses to.
  bool deterministic() const {
    if (framework_->workspace_deterministic.count == 0) return false;
    const std::string& name = row_["model"];
    if (has(name, "nondeterministic") || has(name, "release") || fused_loss()) return false;
    if (flags_.local || flags_.attention == "unfused" || printed_experts().value_or(1) > 1)
      return true;
    return flags_.attention.empty() && row_.whole("cp").value_or(1) == 1;
  }

  void set_allocations() {
    const FrameworkProfile& f = *framework_;
    Allocations& a = c_.plan.allocations;
    // Its routers multiply by Transformer Engine where that is installed.
    if (flags_.local && f.workspace_local.count > 0 && printed_experts().value_or(1) <= 1) {
      a.workspace = a.workspace_hopper = f.workspace_local;
    } else if (deterministic()) {
      a.workspace = f.workspace_deterministic;
    }
    if (f.workspace_deterministic.count > 0 && !flags_.grouped_product &&
        !has(row_["model"], "groupedGEMM"))
      a.workspace_grouped = a.workspace_grouped_hopper = Bytes{0};
    if (fused_loss()) {
      if (f.loss_forward_fused.count > 0) a.loss_forward = f.loss_forward_fused;
      fuse_loss();
    }
    a.score_buffer = flags_.local;
  }

  void set_sharding() {
    Plan& p = c_.plan;
    const std::string& text = row_["zero_or_fsdp"];
    std::optional<ShardingText> z;
    if (!text.empty()) {
      z = sharding_of(text);
      if (!z) throw InputError("zero_or_fsdp", fmt::format("'{}' is not understood", text));
    }
    if (z && z->zero) {
      p.zero = *z->zero;
      p.reshard_after_forward = z->reshard;
    } else {
      // "DDP" of a framework that shards all only where it is told to.
      const bool whole = lower(text).rfind("ddp", 0) == 0 && framework_->zero == 3;
      p.zero = whole ? 0 : framework_->zero;
      p.reshard_after_forward = framework_->reshard_after_forward;
      if (p.dp * p.cp > 1 && c_.transformer) assume("ZeRO {}", p.zero);
    }
    if (p.pp > 1 && p.zero > framework_->zero_pipelined) {
      p.zero = framework_->zero_pipelined;
      p.reshard_after_forward = true;
      assume("ZeRO {} under a pipeline: parameters and gradients stay whole between micro-batches",
             p.zero);
    }
    if (z && z->group > 1 && p.zero > 0 && z->group < p.dp) p.zero_group = z->group;
    const std::int64_t of_node =
        c_.cluster.devices_per_node / std::min(c_.cluster.devices_per_node, p.tp * p.cp);
    if (z && z->hybrid && z->group <= 1 && p.zero > 0 && of_node > 1 && of_node < p.dp &&
        p.dp % of_node == 0) {
      p.zero_group = of_node;
      assume("{} ranks of a node share a copy of the state", of_node);
    }
    if (has(row_["model"], "multi_dist_optimizer_instances") && p.zero > 0 && p.dp % 2 == 0 &&
        p.dp > 2) {
      p.zero_group = p.dp * p.cp / 2;
      assume("two instances of the optimizer");
    }
    if (z) {
      p.offload_optimizer = z->offload_optimizer;
      if (z->offload_parameters) assume("parameters stay on the device");
    }
    if (p.zero > 0 && p.dp * p.cp == 1) p.zero = 0;
  }

  const RowSchema schema_;
  Configuration row_;  ///< with what a recipe adds
  const Catalogue& catalogue_;
  MegatronFlags flags_;
  Settings settings_;
  const FrameworkProfile* framework_ = nullptr;
  std::string unknown_recipe_;  ///< that the row names
  std::optional<int> flash_version_;  ///< FrameworkKernels::flash, where the row says it
  RowCase c_;
};

}  // namespace

RowCase case_of(RowSchema schema, const Configuration& row, const Catalogue& catalogue) {
  return CaseBuilder(schema, row, catalogue).build();
}

}  // namespace partita::validation
