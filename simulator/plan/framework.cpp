#include "simulator/plan/framework.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "base/error.h"
#include "base/yaml.h"

namespace partita {
namespace {

constexpr const char* kFolder = "simulator/plan/frameworks";

}  // namespace

FrameworkProfile parse_framework(const std::string& text, const std::string& file) {
  const YamlNode root = YamlNode::load_text(text, file, "partita.framework/1");
  FrameworkProfile f;
  // Its settings; whose rows they are, and what single rows have, is each file's own.
  if (const auto like = root.find("like")) {
    f = load_framework(like->as_string(), like->place());
    if (!f.like.empty())
      throw InputError(like->place(),
                       fmt::format("'{}' is itself like {}; name that", like->as_string(), f.like));
    f.like = like->as_string();
    f.aliases = f.networks = f.precisions = f.devices = {};
    f.early = false;
    f.uncompiled = {};
    f.recipes = {};
    f.workloads = {};
  }
  f.name = root.get("name").as_string();
  if (const auto aliases = root.find("aliases")) f.aliases = aliases->as_strings();
  if (const auto networks = root.find("networks")) f.networks = networks->as_strings();
  if (const auto precisions = root.find("precisions")) f.precisions = precisions->as_strings();
  if (const auto devices = root.find("devices")) f.devices = devices->as_strings();
  std::string file_source;
  if (const auto source = root.find("source")) file_source = source->as_string();
  // `{value: ..., source: ...}`, or a plain value that takes the file's own `source`.
  const auto setting = [&](const YamlNode& parent, const char* key, const auto& read) {
    const auto node = parent.find(key);
    if (!node) return;
    std::string source = file_source;
    if (node->is_map()) {
      if (const auto own = node->find("source")) source = own->as_string();
      read(node->get("value"));
      node->reject_unknown_keys();
    } else {
      read(*node);
    }
    if (source.empty())
      throw InputError(node->place(),
                       "every setting needs a source; write {value: ..., source: 'document, line "
                       "of code, or assumed'}, or one source: for the whole file");
    f.sources[key] = source;
  };
  const auto boolean = [&](const YamlNode& parent, const char* key, bool& to) {
    setting(parent, key, [&](const YamlNode& n) { to = n.as_bool(); });
  };
  const auto word = [&](const YamlNode& parent, const char* key, std::string& to) {
    setting(parent, key, [&](const YamlNode& n) { to = n.as_string(); });
  };
  boolean(root, "early", f.early);
  word(root, "uncompiled", f.uncompiled);
  const YamlNode plan = root.get("plan");
  setting(plan, "pad_vocabulary",
          [&](const YamlNode& n) { f.pad_vocabulary = n.as_int(0, 1'000'000); });
  setting(plan, "gradients", [&](const YamlNode& n) {
    const std::string type = n.as_string();
    if (type != "fp32" && type != "parameters")
      throw InputError(n.place(),
                       fmt::format("'{}' is no type of gradients; use fp32, or parameters for "
                                   "the parameters' type",
                                   type));
    f.fp32_gradients = type == "fp32";
  });
  plan.get("bucket");
  setting(plan, "bucket", [&](const YamlNode& n) { f.bucket = n.as_bytes(); });
  boolean(plan, "overlap_gradients", f.overlap_gradients);
  if (const auto launch = plan.find("launch")) {
    const auto time = [&](const char* key, Seconds& to) {
      setting(*launch, key, [&](const YamlNode& n) { to = n.as_seconds(); });
    };
    time("kernel", f.launches.kernel);
    time("product", f.launches.product);
    time("loop", f.launches.loop);
    time("transfer", f.launches.transfer);
    time("step", f.launches.step);
    boolean(*launch, "graphs", f.launches.graphs);
    boolean(*launch, "graphs_beside_experts", f.launches.graphs_beside_experts);
    setting(*launch, "graphs_of", [&](const YamlNode& n) { f.launches.graphs_of = n.as_string(); });
    boolean(*launch, "waits_for_counts", f.launches.waits_for_counts);
    boolean(*launch, "waits_for_messages", f.launches.waits_for_messages);
    boolean(*launch, "blocking", f.launches.blocking);
    launch->reject_unknown_keys();
  }
  setting(plan, "wait_for_sends", [&](const YamlNode& n) {
    const std::string when = n.as_string();
    if (when == "never") {
      f.send_wait = SendWait::never;
    } else if (when == "not-interleaved") {
      f.send_wait = SendWait::not_interleaved;
    } else if (when == "always") {
      f.send_wait = SendWait::always;
    } else {
      throw InputError(n.place(),
                       fmt::format("'{}' does not say when a stage waits for its sends; use "
                                   "never, not-interleaved or always",
                                   when));
    }
  });
  boolean(plan, "scatter_messages", f.scatter_messages);
  boolean(plan, "sums_in_turn", f.sums_in_turn);
  boolean(plan, "sums_copies_last", f.sums_copies_last);
  setting(plan, "overlap_multiprocessors", [&](const YamlNode& n) {
    f.overlap_multiprocessors = static_cast<int>(n.as_int(1, 1'000));
  });
  setting(plan, "scatter_multiprocessors", [&](const YamlNode& n) {
    f.scatter_multiprocessors = static_cast<int>(n.as_int(1, 1'000));
  });
  boolean(plan, "save_gathered", f.save_gathered);
  boolean(plan, "regathers_recomputed", f.regathers_recomputed);
  boolean(plan, "reduces_units", f.reduces_units);
  boolean(plan, "ring_context", f.ring_context);
  boolean(plan, "fp32_loss", f.allocations.fp32_loss);
  boolean(plan, "attention_dropout", f.allocations.attention_dropout);
  setting(plan, "weight_gradients", [&](const YamlNode& n) {
    using WeightGradients = Allocations::WeightGradients;
    const std::string where = n.as_string();
    if (where == "in_place") {
      f.allocations.weight_gradients = WeightGradients::in_place;
    } else if (where == "apart") {
      f.allocations.weight_gradients = WeightGradients::apart;
    } else if (where == "placeholders") {
      f.allocations.weight_gradients = WeightGradients::placeholders;
    } else if (where == "beside") {
      f.allocations.weight_gradients = WeightGradients::beside;
    } else {
      throw InputError(n.place(), fmt::format("'{}' is no place of weights' gradients; use "
                                              "in_place, apart, placeholders or beside",
                                              where));
    }
  });
  setting(plan, "workspace", [&](const YamlNode& n) {
    f.allocations.workspace = f.allocations.workspace_hopper = n.as_bytes();
  });
  const auto bytes = [&](const char* key, Bytes& to) {
    setting(plan, key, [&](const YamlNode& n) { to = n.as_bytes(); });
  };
  bytes("workspace_hopper", f.allocations.workspace_hopper);
  bytes("workspace_grouped", f.allocations.workspace_grouped);
  bytes("workspace_grouped_hopper", f.allocations.workspace_grouped_hopper);
  bytes("loss_forward", f.allocations.loss_forward);
  bytes("loss_backward", f.allocations.loss_backward);
  bytes("reduce_buffer", f.allocations.reduce_buffer);
  bytes("context", f.allocations.context);
  boolean(plan, "flat_gradients", f.allocations.flat_gradients);
  boolean(plan, "gradient_buckets", f.allocations.gradient_buckets);
  boolean(plan, "clears_gradients", f.allocations.clears_gradients);
  boolean(plan, "copies_gathered", f.allocations.copies_gathered);
  boolean(plan, "stage_copies", f.allocations.stage_copies);
  boolean(plan, "keeps_inputs", f.allocations.keeps_inputs);
  boolean(plan, "fp32_shards", f.allocations.fp32_shards);
  boolean(plan, "weighted_activations", f.allocations.weighted_activations);
  boolean(plan, "gathered_rows", f.allocations.gathered_rows);
  boolean(plan, "narrow_inputs", f.allocations.narrow_inputs);
  boolean(plan, "narrow_weights", f.allocations.narrow_weights);
  boolean(plan, "gate_apart", f.allocations.gate_apart);
  boolean(plan, "attention_copied", f.allocations.attention_copied);
  boolean(plan, "expandable_segments", f.allocations.expandable_segments);
  bytes("loss_forward_fused", f.loss_forward_fused);
  bytes("workspace_deterministic", f.workspace_deterministic);
  bytes("workspace_local", f.workspace_local);
  boolean(plan, "rows_once", f.rows_once);
  boolean(plan, "narrow_gathers", f.narrow_gathers);
  setting(plan, "clip", [&](const YamlNode& n) {
    f.clip = n.as_double();
    if (!(f.clip >= 0)) throw InputError(n.place(), "a norm to clip to is above 0, or 0 for none");
  });
  setting(plan, "fp8_format",
          [&](const YamlNode& n) { f.fp8_format = parse_fp8_format(n.as_string(), n.place()); });
  boolean(plan, "expert_bias_apart", f.expert_bias_apart);
  boolean(plan, "channels_first", f.channels_first);
  boolean(plan, "fuses_normalise", f.fuses_normalise);
  boolean(plan, "joins_projections", f.joins_projections);
  boolean(plan, "recompute_stops_early", f.recompute_stops_early);
  setting(plan, "stays_gathered", [&](const YamlNode& n) {
    f.stays_gathered = parse_stays_gathered(n.as_string(), n.place());
  });
  const auto passes = [&](const char* key, int& to) {
    setting(plan, key, [&](const YamlNode& n) { to = static_cast<int>(n.as_int(1, 100)); });
  };
  passes("score_passes_forward", f.score_passes_forward);
  passes("score_passes_backward", f.score_passes_backward);
  plan.reject_unknown_keys();
  if (const auto kernels = root.find("kernels")) {
    setting(*kernels, "flash",
            [&](const YamlNode& n) { f.kernels.flash = static_cast<int>(n.as_int(1, 2)); });
    const auto traffic = [&](const char* key, double& to) {
      setting(*kernels, key,
              [&](const YamlNode& n) { to = static_cast<double>(n.as_bytes().count); });
    };
    traffic("score_forward", f.kernels.score_forward);
    traffic("score_backward", f.kernels.score_backward);
    traffic("score_forward_unfused", f.kernels.score_forward_unfused);
    traffic("score_backward_unfused", f.kernels.score_backward_unfused);
    const auto limit = [&](const char* key, int& to) {
      setting(*kernels, key,
              [&](const YamlNode& n) { to = static_cast<int>(n.as_int(1, 1'000'000)); });
    };
    limit("fused_batches", f.kernels.fused_batches);
    limit("fused_keys", f.kernels.fused_keys);
    traffic("score_fp32_forward", f.kernels.score_fp32_forward);
    traffic("score_fp32_backward", f.kernels.score_fp32_backward);
    traffic("padding_forward", f.kernels.padding_forward);
    traffic("padding_backward", f.kernels.padding_backward);
    traffic("logit_forward", f.kernels.logit_forward);
    traffic("logit_backward", f.kernels.logit_backward);
    const auto share = [&](const char* key, double& to) {
      setting(*kernels, key, [&](const YamlNode& n) {
        to = n.as_double();
        if (!(to > 0 && to <= 1))
          throw InputError(n.place(),
                           fmt::format("{} is {}; a share of memory's bandwidth is above 0 and at "
                                       "most 1",
                                       key, to));
      });
    };
    share("logit_share_forward", f.kernels.logit_share_forward);
    share("logit_share_backward", f.kernels.logit_share_backward);
    traffic("logit_forward_fused", f.logit_forward_fused);
    traffic("logit_backward_fused", f.logit_backward_fused);
    if ((f.logit_forward_fused > 0) != (f.logit_backward_fused > 0))
      throw InputError(kernels->place(),
                       "logit_forward_fused and logit_backward_fused come together");
    share("normalize_share_forward", f.kernels.normalize_share_forward);
    share("normalize_share_backward", f.kernels.normalize_share_backward);
    traffic("normalize_forward", f.kernels.normalize_forward);
    traffic("normalize_backward", f.kernels.normalize_backward);
    traffic("rms_forward", f.kernels.rms_forward);
    traffic("rms_backward", f.kernels.rms_backward);
    traffic("gated_forward", f.kernels.gated_forward);
    traffic("gated_backward", f.kernels.gated_backward);
    traffic("rotary_forward", f.kernels.rotary_forward);
    traffic("rotary_backward", f.kernels.rotary_backward);
    traffic("dropout_forward", f.kernels.dropout_forward);
    traffic("dropout_backward", f.kernels.dropout_backward);
    traffic("optimizer", f.kernels.optimizer);
    traffic("optimizer_mixed", f.kernels.optimizer_mixed);
    traffic("accumulation", f.kernels.accumulation);
    traffic("accumulation_mixed", f.kernels.accumulation_mixed);
    const auto count = [&](const char* key, double& to) {
      setting(*kernels, key,
              [&](const YamlNode& n) { to = static_cast<double>(n.as_int(1, 1000)); });
    };
    count("head_passes_forward", f.kernels.head_passes_forward);
    count("head_passes_backward", f.kernels.head_passes_backward);
    count("table_passes", f.kernels.table_passes);
    count("gradient_passes", f.kernels.gradient_passes);
    count("met_gradient_passes", f.kernels.met_gradient_passes);
    const auto launched = [&](const char* key, int& to) {
      setting(*kernels, key, [&](const YamlNode& n) { to = static_cast<int>(n.as_int(1, 1000)); });
    };
    launched("optimizer_kernels", f.kernels.optimizer_kernels);
    launched("optimizer_tensors", f.kernels.optimizer_tensors);
    launched("activation_passes_forward", f.kernels.activation_passes_forward);
    launched("activation_passes_backward", f.kernels.activation_passes_backward);
    launched("routing_forward", f.kernels.routing_forward);
    launched("routing_backward", f.kernels.routing_backward);
    launched("rows_forward", f.kernels.rows_forward);
    launched("rows_backward", f.kernels.rows_backward);
    traffic("limit_forward", f.kernels.limit_forward);
    traffic("limit_backward", f.kernels.limit_backward);
    boolean(*kernels, "sorts_rows", f.kernels.sorts_rows);
    share("rows_share", f.kernels.rows_share);
    boolean(*kernels, "pads_rows", f.kernels.pads_rows);
    boolean(*kernels, "shard_views", f.kernels.shard_views);
    boolean(*kernels, "finds_scales", f.kernels.finds_scales);
    boolean(*kernels, "bias_sums", f.kernels.bias_sums);
    boolean(*kernels, "mamba_ssm", f.kernels.mamba_ssm);
    boolean(*kernels, "mamba_gates_in_scan", f.kernels.mamba_gates_in_scan);
    boolean(*kernels, "fused_experts", f.kernels.fused_experts);
    boolean(*kernels, "position_product", f.kernels.position_product);
    kernels->reject_unknown_keys();
  }
  if (const auto defaults = root.find("defaults")) {
    word(*defaults, "precision", f.precision);
    setting(*defaults, "zero",
            [&](const YamlNode& n) { f.zero = static_cast<int>(n.as_int(0, 3)); });
    setting(*defaults, "zero_highest",
            [&](const YamlNode& n) { f.zero_highest = static_cast<int>(n.as_int(0, 3)); });
    setting(*defaults, "zero_pipelined",
            [&](const YamlNode& n) { f.zero_pipelined = static_cast<int>(n.as_int(0, 3)); });
    boolean(*defaults, "reshard_after_forward", f.reshard_after_forward);
    boolean(*defaults, "splits_batch", f.splits_batch);
    boolean(*defaults, "sequence_parallel", f.sequence_parallel);
    boolean(*defaults, "overlap_tensor_parallel", f.overlap_tensor_parallel);
    boolean(*defaults, "flash_attention", f.flash_attention);
    setting(*defaults, "flash_capability",
            [&](const YamlNode& n) { f.flash_capability = static_cast<int>(n.as_int(1, 1000)); });
    setting(*defaults, "dropout", [&](const YamlNode& n) {
      f.dropout = n.as_double();
      if (f.dropout < 0 || f.dropout >= 1)
        throw InputError(
            n.place(), fmt::format("dropout is {}; it must be at least 0 and below 1", f.dropout));
    });
    word(*defaults, "recompute", f.recompute);
    setting(*defaults, "selective", [&](const YamlNode& n) {
      f.selective = n.as_string();
      if (f.selective == "selective")
        throw InputError(n.place(),
                         "'selective' says itself; use attention, full, first:N or "
                         "operator patterns");
    });
    boolean(*defaults, "mtp", f.mtp);
    boolean(*defaults, "logs_first_stage", f.logs_first_stage);
    boolean(*defaults, "logs_hardware_flops", f.logs_hardware_flops);
    setting(*defaults, "logs_memory", [&](const YamlNode& n) {
      f.logs_memory = n.as_string();
      if (f.logs_memory != "device" && f.logs_memory != "reserved" && f.logs_memory != "allocated")
        throw InputError(n.place(), fmt::format("'{}' is no memory of a log; there are device "
                                                "(nvidia-smi's), reserved and allocated",
                                                f.logs_memory));
    });
    word(*defaults, "model", f.model);
    setting(*defaults, "vocabulary",
            [&](const YamlNode& n) { f.vocabulary = n.as_int(1, 100'000'000); });
    setting(*defaults, "mean_of_512", [&](const YamlNode& n) { f.mean_of_512 = n.as_int(1, 512); });
    defaults->reject_unknown_keys();
  }
  if (const auto recipes = root.find("recipes")) {
    const auto cells = [](const YamlNode& from, std::initializer_list<const char*> columns) {
      std::map<std::string, std::string> all;
      for (const char* column : columns) {
        if (const auto cell = from.find(column)) all[column] = cell->as_string();
      }
      from.reject_unknown_keys();
      return all;
    };
    for (const auto& [name, node] : recipes->members()) {
      const auto source = node.find("source");
      if (!source && file_source.empty())
        throw InputError(node.place(), "every recipe needs a source");
      f.sources[name] = source ? source->as_string() : file_source;
      Recipe& r = f.recipes[name];
      if (const auto n = node.find("frameworks")) r.frameworks = n->as_strings();
      if (const auto n = node.find("when")) {
        r.when = cells(*n, {"num_layers", "hidden_size", "num_gpus", "tp", "pp"});
        if (r.when.size() < 2)
          throw InputError(n->place(), "says too little; give two sizes of the network at least");
      }
      r.sets = cells(
          node, {"tp", "pp", "virtual_stages_per_gpu", "cp", "ep", "etp", "micro_batch_per_dp_rank",
                 "global_batch_seqs", "recompute", "precision", "sequence_parallel"});
    }
  }
  if (const auto workloads = root.find("workloads")) {
    for (const YamlNode& node : workloads->items()) {
      Workload w;
      const auto list = [&](const char* key, std::vector<std::string>& to) {
        if (const auto n = node.find(key)) to = n->as_strings();
      };
      const auto flag = [&](const char* key, std::optional<bool>& to) {
        if (const auto n = node.find(key)) to = n->as_bool();
      };
      list("frameworks", w.frameworks);
      list("networks", w.networks);
      list("rows", w.rows);
      list("devices", w.devices);
      list("precisions", w.precisions);
      list("between_nodes", w.between_nodes);
      if (const auto n = node.find("gpus")) w.gpus = n->as_int(1, 1'000'000);
      if (const auto n = node.find("zero")) w.zero = n->as_int(0, 3);
      if (const auto n = node.find("recompute")) w.recompute = n->as_string();
      if (const auto n = node.find("graphs_of")) w.graphs_of = n->as_string();
      if (const auto n = node.find("offload_blocks")) w.offload_blocks = n->as_int(1, 1'000'000);
      if (const auto n = node.find("packed")) w.packed = n->as_int(1, 1'000'000);
      if (const auto n = node.find("zero_group")) w.zero_group = n->as_int(1, 1'000'000);
      const auto count = [&](const char* key, int& to) {
        if (const auto n = node.find(key)) to = static_cast<int>(n->as_int(1, 1000));
      };
      count("activation_passes_forward", w.activation_passes_forward);
      count("activation_passes_backward", w.activation_passes_backward);
      flag("rows_once", w.rows_once);
      flag("graphs", w.graphs);
      flag("graphs_beside_experts", w.graphs_beside_experts);
      flag("fused_experts", w.fused_experts);
      flag("overlaps_experts", w.overlaps_experts);
      flag("overlaps_tensor_parallel", w.overlaps_tensor_parallel);
      flag("lora", w.lora);
      flag("recompute_stops_early", w.recompute_stops_early);
      flag("blocking", w.blocking);
      flag("narrow_gradients", w.narrow_gradients);
      const auto source = node.find("source");
      w.source = source ? source->as_string() : file_source;
      if (w.source.empty()) throw InputError(node.place(), "every workload needs a source");
      node.reject_unknown_keys();
      f.workloads.push_back(w);
    }
  }
  root.reject_unknown_keys();
  return f;
}

StaysGathered parse_stays_gathered(std::string_view word, const std::string& place) {
  if (word == "nothing") return {};
  if (word == "last") return {StaysGathered::last, 0};
  if (word == "root") return {StaysGathered::root, 0};
  StaysGathered s;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), s.elements);
  if (error != std::errc() || end != word.data() + word.size() || s.elements < 0)
    throw InputError(
        place, fmt::format("'{}' says nothing of what stays gathered; use nothing, last, root, "
                           "or a number of elements (DeepSpeed's stage3_max_reuse_distance)",
                           word));
  return s;
}
std::string name(const StaysGathered& s) {
  return s.kind == StaysGathered::last   ? "last"
         : s.kind == StaysGathered::root ? "root"
         : s.elements == 0               ? "nothing"
                                         : std::to_string(s.elements);
}

std::vector<std::string> frameworks() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(data_folder(kFolder), error)) {
    if (entry.path().extension() == ".yaml") names.push_back(entry.path().stem().string());
  }
  if (error)
    throw InputError(
        data_folder(kFolder),
        fmt::format("cannot be read; set PARTITA_DATA to the folder that holds {}", kFolder));
  std::sort(names.begin(), names.end());
  return names;
}

FrameworkProfile load_framework(std::string_view name, const std::string& place) {
  const auto known = frameworks();
  if (!std::binary_search(known.begin(), known.end(), name))
    throw InputError(place, fmt::format("'{}' is no framework profile{}; there are {}", name,
                                        did_you_mean(name, known), fmt::join(known, ", ")));
  const std::string file = fmt::format("{}/{}.yaml", data_folder(kFolder), name);
  return parse_framework(read_file(file), file);
}

}  // namespace partita
