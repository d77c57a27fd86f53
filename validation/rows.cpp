#include "validation/rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/parallel.h"
#include "base/yaml.h"
#include "simulator/cost/cost.h"
#include "simulator/search/predict.h"
#include "validation/row_kernels.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

using Kind = Figure::Kind;

/// What a step's prediction leaves for its figures.
struct Outcome {
  std::string why;  ///< not empty: no prediction
  RowKey key;
  double step = 0;
  double layer = 0;  ///< s: of RowCase::layer
  double ideal = 0;  ///< s: model FLOPs of the step at all devices' peak
  double peak = 0;   ///< FLOP/s of one device in the plan's type
  double sequence = 0, samples = 0, ranks = 0, parameters = 0, layers = 0;
  Bytes allocated, reserved, device;
  bool fits = false;
  std::vector<StageMemory> stages;
  std::map<std::string, double> shares;
  std::int64_t ranks_of_stage = 1;
  std::shared_ptr<const RowStep> again;
  std::optional<double> half_width;
  bool logs_first_stage = false;
  std::string logs_memory;
};

Outcome outcome_of(const RowCase& c, const Topology& topology, const RowsOptions& options) {
  Outcome o;
  o.key = {topology.device(DeviceId{0}).name, c.plan.framework,
           c.cluster.topology.substr(0, c.cluster.topology.find(':'))};
  const Graph graph = graph_of(c);
  auto communication = std::make_unique<Communication>(topology);
  if (options.adjust) communication->set_adjustment(options.adjust(o.key));
  const bool again = options.keep_steps || options.half_width;
  Program program;
  Timeline recorded;
  const auto p = predict(graph, c.plan, *communication, c.layer ? &recorded : nullptr,
                         again || c.layer ? &program : nullptr, false, nullptr, options.network);
  if (!p) {
    o.why = p.reason();
    return o;
  }
  o.step = p->step_time.count;
  o.ideal = p->mfu * o.step;
  o.peak = topology.device(DeviceId{0}).matrix_rate(p->plan.precision.compute).count;
  o.sequence = static_cast<double>(graph.sequence);
  o.samples = static_cast<double>(p->plan.global_batch);
  o.ranks = static_cast<double>(p->devices);
  o.parameters = static_cast<double>(parameter_count(graph));
  o.layers = graph.layers;
  o.allocated = p->peak_allocated;
  o.reserved = p->peak_reserved;
  o.device = p->peak_device;
  o.fits = p->fits;
  o.stages = p->memory_by_stage;
  o.logs_first_stage = c.logs_first_stage;
  o.logs_memory = c.logs_memory;
  o.ranks_of_stage = std::max<std::int64_t>(1, p->devices / p->plan.pp);
  const double total = static_cast<double>(std::max<std::int64_t>(1, p->breakdown.total().count));
  const auto share = [&](const std::string& term, Ticks t) {
    if (t.count > 0) o.shares[term] += static_cast<double>(t.count) / total;
  };
  for (const auto& [kind, t] : p->breakdown.compute) share(kind, t);
  for (const auto& [axis, t] : p->breakdown.exposed) share("exposed " + axis, t);
  share("bubble", p->breakdown.bubble);
  share("optimizer", p->breakdown.optimizer);
  share("other", p->breakdown.other);
  if (!std::isfinite(o.step) || !(o.step > 0)) o.why = "the prediction is no finite time";
  if (c.layer && o.why.empty()) {
    if (const auto t = layer_time(*c.layer, program, recorded))
      o.layer = t->count;
    else
      o.why = "quantity: no layer of this network has such a part";
  }
  if (again && o.why.empty()) {
    PARTITA_ASSERT(p->plan.as_ranked(), "rows place rank r on device r");
    auto step = std::make_shared<const RowStep>(std::move(communication), std::move(program),
                                                options.network);
    if (options.half_width) o.half_width = options.half_width(o.key, o.parameters, *step);
    if (options.keep_steps) o.again = std::move(step);
  }
  return o;
}

/// A measured value that waits for its prediction.
struct Wanted {
  Figure figure;
  std::string column;     ///< of a time: which one
  double value = 0;       ///< as printed, in the column's unit
  MemoryQuantity memory;  ///< of a memory figure
  std::optional<FlopFormula> formula;
};

struct PendingRow {
  RowSchema schema = RowSchema::training;
  std::size_t family = 0;
  std::string id, why;
  std::shared_ptr<const Configuration> configuration;  ///< as printed
  std::shared_ptr<const Configuration> as_run;  ///< and with what its run has besides; or none
  std::vector<Wanted> wanted;
  std::optional<RowCase> row_case;
  std::size_t outcome = 0;             ///< of row_case
  std::optional<std::size_t> other;    ///< what a ratio is against
  std::optional<KernelFigure> kernel;  ///< collectives and products: predicted at once
  std::string repeat_key;              ///< configuration and value of a memory figure
  bool repeats = false;                ///< at first: may repeat
};

/// A measured cell's number above 0; 0 where it is empty, and, with `why`, where it says something
/// else.
double positive(const Row& row, std::string_view column, std::string& why) {
  const std::string& cell = row[column];
  const auto value = number(cell);
  if (value && *value > 0 && std::isfinite(*value)) return *value;
  if (!cell.empty() && why.empty())
    why = fmt::format("{}: '{}' is no number above 0", column, cell);
  return 0;
}

Wanted wanted(const Row& row, Kind kind, const std::string& quantity) {
  Wanted w;
  w.figure.id = row["id"];
  w.figure.kind = kind;
  w.figure.quantity = quantity;
  w.figure.model = row["model"];
  w.figure.from_memory = row["from_memory"] == "yes";
  w.figure.group =
      fmt::format("{}|{}|{}|{}|{}|{}|{}", row["model"], row["num_layers"], row["hidden_size"],
                  row["seq_len_tokens"], row["gpu"], row["gpu_memory_gb"], row["num_gpus"]);
  return w;
}

/// Values that a training row prints. One time: of the columns that are there the first in this
/// order, since the later ones are derived from it.
void read_training(const Row& row, PendingRow& p) {
  const std::string status = lower(row["status"]);
  const bool oom = status == "oom" || status.find("out of memory") != std::string::npos;
  if (!oom) {
    for (const char* column : {"iteration_time_s", "tokens_per_s_per_gpu", "samples_per_s_total",
                               "tflops_per_gpu", "mfu_pct"}) {
      const double value = positive(row, column, p.why);
      if (!(value > 0)) continue;
      const std::string name = column;
      Wanted w = wanted(row, Kind::time, name);
      w.column = name;
      w.value = value;
      w.formula = flop_formula(row["flop_formula"]);
      p.wanted.push_back(std::move(w));
      break;
    }
  }
  if (const double gib = oom ? 0 : positive(row, "peak_mem_per_gpu_gib", p.why); gib > 0) {
    Wanted w = wanted(row, Kind::memory, row["peak_mem_definition"]);
    if (const auto q = memory_quantity(row["peak_mem_definition"])) w.memory = *q;
    w.figure.measured = gib * (1 << 30);
    p.wanted.push_back(std::move(w));
  }
  if (oom || !p.wanted.empty()) {
    Wanted w = wanted(row, Kind::fits, oom ? "out of memory" : "runs");
    w.figure.measured = oom ? 0 : 1;
    p.wanted.push_back(std::move(w));
  }
}

void read_memory(const Row& row, PendingRow& p) {
  const std::string& unit = row["unit"];
  const auto q = memory_quantity(row["quantity"]);
  const bool oom = row["value"] == "OOM" || (q && q->what == MemoryQuantity::What::fits);
  if (oom) {
    Wanted w = wanted(row, Kind::fits, row["quantity"]);
    w.figure.measured = 0;
    p.wanted.push_back(std::move(w));
    return;
  }
  const double value = positive(row, "value", p.why);
  if (!(value > 0)) return;
  Wanted w = wanted(row, q ? Kind::memory : Kind::time, row["quantity"]);
  if (!q && layer_quantity(row["quantity"])) {
    const double scale = unit == "ms" ? 1e-3 : unit == "us" ? 1e-6 : unit == "s" ? 1 : 0;
    if (scale == 0) p.why = fmt::format("unit: '{}' is no unit of time; use s, ms or us", unit);
    w.column = "layer";
    w.value = value * scale;
  } else if (!q) {
    p.why = fmt::format("quantity: '{}' is neither a step's or layer's time nor a rank's memory",
                        row["quantity"]);
  } else {
    w.memory = *q;
    const bool ratio = q->what == MemoryQuantity::What::activations_ratio;
    double scale = 0;
    if (ratio && unit == "%")
      scale = 0.01;
    else if (unit.rfind("GiB", 0) == 0)
      scale = 1 << 30;
    else if (unit.rfind("GB", 0) == 0)
      scale = 1e9;
    else if (unit.rfind("MiB", 0) == 0)
      scale = 1 << 20;
    else if (unit.rfind("MB", 0) == 0)
      scale = 1e6;
    else if (unit == "B" || unit.rfind("byte", 0) == 0)
      scale = 1;
    if (scale == 0) p.why = fmt::format("unit: '{}' is no unit of memory", unit);
    w.figure.measured = value * scale;
  }
  p.wanted.push_back(std::move(w));
}

void read_convolution(const Row& row, PendingRow& p) {
  for (const char* column :
       {"images_or_samples_per_s_total", "images_or_samples_per_s_per_gpu", "step_time_s"}) {
    const double value = positive(row, column, p.why);
    if (!(value > 0)) continue;
    Wanted w = wanted(row, Kind::time, column);
    w.column = column;
    w.value = value;
    p.wanted.push_back(std::move(w));
    break;
  }
  const double scaling = positive(row, "scaling_factor_vs_1gpu", p.why);
  if (scaling > 0 && number(row["num_gpus"]).value_or(0) > 1) {
    Wanted w = wanted(row, Kind::scaling, "scaling_factor_vs_1gpu");
    w.figure.measured = scaling;
    p.wanted.push_back(std::move(w));
  }
}

/// Seconds of a step that printed speed means, from what the plan and the network make of it.
std::optional<double> measured_seconds(const Wanted& w, const RowCase& c, const Outcome& o) {
  const double samples = o.samples, tokens = samples * o.sequence;
  if (w.column == "iteration_time_s" || w.column == "step_time_s") return w.value;
  if (w.column == "tokens_per_s_per_gpu") return tokens / (w.value * o.ranks);
  const double counted = c.counts_tokens ? tokens : samples;
  if (w.column == "samples_per_s_total") return samples / w.value;
  if (w.column == "images_or_samples_per_s_total") return counted / w.value;
  if (w.column == "images_or_samples_per_s_per_gpu") return counted / (w.value * o.ranks);
  if (w.column == "mfu_pct") return o.ideal / (w.value / 100);
  if (w.column != "tflops_per_gpu" || !c.transformer) return std::nullopt;
  const TransformerConfig& t = *c.transformer;
  const double l = t.layers, h = static_cast<double>(t.hidden), s = o.sequence,
               v = static_cast<double>(t.vocabulary);
  double flops = 0;
  // Without a formula: the model's, or what is computed, as Megatron printed it first.
  const bool full = c.plan.recomputed().kind == Recompute::full && c.logs_hardware_flops;
  switch (w.formula.value_or(full ? FlopFormula::hardware_4x : FlopFormula::model_3x)) {
    case FlopFormula::hardware_4x:
      flops = 96 * samples * s * l * h * h * (1 + s / (6 * h) + v / (16 * l * h));
      break;
    case FlopFormula::model_3x:
    case FlopFormula::six_n:
      flops = o.ideal * o.peak * o.ranks;
      break;
    case FlopFormula::six_n_alone:
      flops = 6 * o.parameters * tokens;
      break;
    case FlopFormula::eight_n:
      flops = 8 * o.parameters * tokens;
      break;
  }
  return flops / (w.value * 1e12 * o.ranks);
}

Bytes state_of(const StageMemory& s, const MemoryQuantity& q) {
  Bytes all{0};
  if (q.parameters) all += s.by_category[static_cast<std::size_t>(Category::parameters)];
  if (q.gradients) all += s.by_category[static_cast<std::size_t>(Category::gradients)];
  if (q.optimizer) all += s.by_category[static_cast<std::size_t>(Category::optimizer)];
  return all;
}

/// The memory that a quantity names; `base`: of the plan that a ratio is against.
double memory_of(const MemoryQuantity& q, const Outcome& o, const Outcome* base) {
  using What = MemoryQuantity::What;
  using Who = MemoryQuantity::Who;
  const auto stage = [&](const Outcome& of) -> const StageMemory& {
    std::size_t at = 0;
    if (q.who == Who::logging || q.who == Who::first || q.who == Who::last) {
      at = q.who == Who::first || (q.who == Who::logging && of.logs_first_stage)
               ? 0
               : of.stages.size() - 1;
    } else if (q.who == Who::rank) {
      at = std::min(static_cast<std::size_t>(q.rank / of.ranks_of_stage), of.stages.size() - 1);
    } else {
      for (std::size_t i = 1; i < of.stages.size(); ++i) {
        if (of.stages[i].total > of.stages[at].total) at = i;
      }
    }
    return of.stages[at];
  };
  const double context = static_cast<double>(o.device.count - o.reserved.count);
  const double total = static_cast<double>(stage(o).total.count);
  const double reserved = static_cast<double>(stage(o).reserved.count);
  switch (q.what) {
    case What::allocated:
      return total;
    case What::reserved:
      return reserved;
    case What::printed:
      return o.logs_memory == "allocated"  ? total
             : o.logs_memory == "reserved" ? reserved
                                           : reserved + context;
    case What::device:
    case What::fits:
      return reserved + context;
    case What::state: {
      if (q.who != Who::most) return static_cast<double>(state_of(stage(o), q).count);
      double sum = 0;
      for (const StageMemory& s : o.stages) sum += static_cast<double>(state_of(s, q).count);
      return sum / static_cast<double>(o.stages.size());
    }
    case What::after_step:
      return static_cast<double>(
          (state_of(stage(o), q) + stage(o).resident + stage(o).kept_inputs).count);
    case What::activations:
      return static_cast<double>(stage(o).saved.count);
    case What::activations_layer:
      return base == nullptr || !(base->layers > 0)
                 ? 0
                 : static_cast<double>(base->stages[0].saved_by_layers.count) / base->layers;
    case What::activations_ratio:
      return base == nullptr ? 0
                             : static_cast<double>(stage(o).saved_by_layers.count) /
                                   static_cast<double>(stage(*base).saved_by_layers.count);
  }
  return 0;
}

/// What both tables say of a run in numbers.
template <class Cells>
std::string run_key(const Cells& row) {
  std::string s;
  for (const char* column :
       {"num_layers", "hidden_size", "seq_len_tokens", "gpu", "num_gpus", "tp", "pp",
        "virtual_stages_per_gpu", "cp", "ep", "dp", "micro_batch_per_dp_rank", "global_batch_seqs"})
    s += row[column] + "|";
  return s;
}

/// Configuration and value, by which a memory row repeats a training row.
std::string repeat_key(const Row& row, double bytes) {
  return run_key(row) + fmt::format("{:.3e}", bytes);
}

/// The same for a network's: the first word of its name, too.
std::string network_key(const Configuration& c) {
  const std::string& name = c["model"];
  return run_key(c) + c["num_heads"] + "|" + name.substr(0, name.find(' '));
}

class RowsPrediction {
 public:
  RowsPrediction(const std::vector<CsvTable>& tables, const Catalogue& catalogue,
                 const RowsOptions& options)
      : tables_(tables), catalogue_(catalogue), options_(options) {}

  std::vector<FamilyFigures> run() {
    for (const CsvTable& table : tables_) read(table);
    if (!options_.family.empty() && families_.empty()) {
      const std::vector<std::string> known(others_.begin(), others_.end());
      throw InputError("--family",
                       fmt::format("no row is of family '{}'{}; there are {}", options_.family,
                                   did_you_mean(options_.family, known), fmt::join(known, ", ")));
    }
    for (PendingRow& p : rows_) take_from_runs(p);
    for (PendingRow& p : rows_) {
      p.repeats = p.repeats && !p.repeat_key.empty() && trained_.count(p.repeat_key) > 0;
      if (p.why.empty() && !p.kernel && !p.repeats) find_case(p);
    }
    predict_all();
    for (PendingRow& p : rows_) deliver(p);
    return std::move(families_);
  }

 private:
  std::size_t family(const std::string& name, RowSchema schema) {
    for (std::size_t i = 0; i < families_.size(); ++i) {
      if (families_[i].family == name) return i;
    }
    FamilyFigures f;
    f.family = name;
    f.schema = std::string(partita::validation::name(schema));
    families_.push_back(std::move(f));
    return families_.size() - 1;
  }

  void read(const CsvTable& table) {
    const RowSchema schema = recognise(table);
    for (std::size_t i = 0; i < table.records.size(); ++i) {
      const Row row(table, i);
      std::string family_name = row["family"];
      if (family_name.empty()) {
        family_name = schema == RowSchema::collectives   ? "collectives"
                      : schema == RowSchema::products    ? "gemm"
                      : schema == RowSchema::convolution ? "cnn"
                                                         : std::string(name(schema));
      }
      if (!options_.family.empty() && family_name != options_.family) {
        others_.insert(family_name);
        continue;
      }
      PendingRow p;
      p.schema = schema;
      p.id = row["id"];
      Configuration cells(schema, row);
      apply_settings(catalogue_.settings, p.id, cells);
      p.configuration = std::make_shared<const Configuration>(std::move(cells));
      p.family = family(family_name, schema);
      switch (schema) {
        case RowSchema::training:
          read_training(row, p);
          break;
        case RowSchema::memory:
          read_memory(row, p);
          break;
        case RowSchema::convolution:
          read_convolution(row, p);
          break;
        case RowSchema::collectives:
        case RowSchema::products:
          read_kernel(schema, row, p);
          break;
      }
      if (p.wanted.empty() && p.why.empty()) continue;  // nothing was measured
      for (const Wanted& w : p.wanted) {
        if (w.figure.kind == Kind::memory) p.repeat_key = repeat_key(row, w.figure.measured);
        if (w.figure.kind == Kind::fits && w.figure.measured < 0.5)
          p.repeat_key = repeat_key(row, 0);
      }
      if (schema == RowSchema::training && !p.repeat_key.empty()) trained_.insert(p.repeat_key);
      if (schema == RowSchema::training)
        runs_[network_key(*p.configuration)].push_back(p.configuration);
      p.repeats = schema == RowSchema::memory;
      rows_.push_back(std::move(p));
    }
  }

  /// Is a rate printed?
  static bool rated(const Row& row, bool collective) {
    const auto positive = [&](const char* column) {
      const auto n = number(row[column]);
      return n && *n > 0;
    };
    return collective ? positive("busbw_gb_per_s") || positive("algbw_gb_per_s")
                      : positive("tflops");
  }

  void read_kernel(RowSchema schema, const Row& row, PendingRow& p) {
    const bool collective = schema == RowSchema::collectives;
    for (const char* column :
         {collective ? "time_us" : "time_s", collective ? "busbw_gb_per_s" : "tflops"}) {
      if (positive(row, column, p.why) > 0) break;
    }
    const double seconds = collective ? measured_collective(row) : measured_product(row);
    if (!(seconds > 0) && p.why.empty() && rated(row, collective))
      p.why = fmt::format("{}: the rate is printed without what it is of",
                          collective ? "size_bytes" : "m");
    if (!(seconds > 0) || !p.why.empty()) return;
    Wanted w = wanted(row, Kind::time,
                      schema == RowSchema::collectives ? row["collective"] : row["kernel"]);
    w.figure.group.clear();
    w.figure.measured = seconds;
    try {
      p.kernel = schema == RowSchema::collectives ? collective_figure(*p.configuration, catalogue_)
                                                  : product_figure(*p.configuration, catalogue_);
    } catch (const InputError& e) {
      p.why = e.what();
    }
    p.wanted.push_back(std::move(w));
  }

  /// A memory row of a training row's configuration is of its network and run: settings and sizes
  /// that it does not print are taken from there, where all such rows agree.
  void take_from_runs(PendingRow& p) {
    if (p.schema != RowSchema::memory) return;
    const auto runs = runs_.find(network_key(*p.configuration));
    if (runs == runs_.end()) return;
    auto filled = std::make_shared<Configuration>(*p.configuration);
    for (const char* column :
         {"framework", "gpu_memory_gb", "overlap_and_other_settings", "num_kv_heads",
          "ffn_hidden_size", "vocab_size", "num_experts", "moe_topk", "moe_ffn_hidden_size"}) {
      const std::string& cell = (*runs->second.front())[column];
      const bool agreed = std::all_of(runs->second.begin(), runs->second.end(),
                                      [&](const auto& c) { return (*c)[column] == cell; });
      if (agreed && !cell.empty()) filled->fill(column, cell);
    }
    p.as_run = std::move(filled);
  }

  void find_case(PendingRow& p) {
    try {
      const Configuration& cells = p.as_run ? *p.as_run : *p.configuration;
      p.row_case = case_of(p.schema, cells, catalogue_);
      leave_out_unmeasured(p);
      p.outcome = slot(*p.row_case);
      for (const Wanted& w : p.wanted) {
        if (w.figure.kind == Kind::memory &&
            w.memory.what == MemoryQuantity::What::activations_ratio) {
          RowCase base = *p.row_case;
          base.plan.recompute = {};
          base.plan.sequence_parallel = false;
          p.other = slot(base);
        }
        if (w.figure.kind == Kind::memory &&
            w.memory.what == MemoryQuantity::What::activations_layer) {
          // All blocks on one rank, one micro-batch in flight.
          RowCase all = *p.row_case;
          Plan& plan = all.plan;
          plan.dp *= plan.pp;
          plan.pp = plan.virtual_stages = 1;
          plan.global_batch = plan.micro_batch * plan.dp;
          plan.cuts.clear();
          plan.schedule = Schedule::one_f_one_b;
          plan.micro_batch_group = 0;
          p.other = slot(all);
        }
        if (w.figure.kind == Kind::scaling) {
          RowCase one = *p.row_case;
          one.plan.global_batch /= one.plan.dp;
          one.plan.dp = 1;
          one.plan.zero = 0;
          p.other = slot(one);
        }
      }
    } catch (const InputError& e) {
      p.why = e.what();
    }
  }

  /// What a state space model's kernels take is measured on no device (docs/cost.md): of a network
  /// with them only memory is predicted.
  static void leave_out_unmeasured(PendingRow& p) {
    if (!p.row_case->transformer || p.row_case->transformer->mamba.heads == 0) return;
    const auto of_memory = [](const Wanted& w) { return w.figure.kind == Kind::memory; };
    if (std::none_of(p.wanted.begin(), p.wanted.end(), of_memory))
      throw InputError("model",
                       "has layers of Mamba, whose kernels are measured on no device: "
                       "its time would rest on a guess");
    std::erase_if(p.wanted, [](const Wanted& w) { return w.figure.kind == Kind::time; });
  }

  std::size_t slot(const RowCase& c) {
    const auto [at, fresh] = slots_.emplace(c.key(), cases_.size());
    if (fresh) {
      cases_.push_back(c);
      topologies_.emplace(c.cluster.key(), c.cluster);
    }
    return at->second;
  }

  void predict_all() {
    std::vector<std::string> keys;
    std::vector<ClusterChoice> choices;
    for (const auto& [key, choice] : topologies_) keys.push_back(key), choices.push_back(choice);
    std::vector<std::optional<Topology>> topologies(choices.size());
    std::vector<std::string> failures(choices.size());
    parallel_for(choices.size(), options_.workers, [&](std::size_t, std::size_t i) {
      try {
        topologies[i] = load_topology(choices[i].topology, choices[i].edits);
      } catch (const InputError& e) {
        failures[i] = e.what();
      }
    });
    outcomes_.resize(cases_.size());
    parallel_for(cases_.size(), options_.workers, [&](std::size_t, std::size_t i) {
      const auto at = static_cast<std::size_t>(
          std::lower_bound(keys.begin(), keys.end(), cases_[i].cluster.key()) - keys.begin());
      if (!topologies[at]) {
        outcomes_[i].why = failures[at];
        return;
      }
      try {
        outcomes_[i] = outcome_of(cases_[i], *topologies[at], options_);
      } catch (const InputError& e) {
        outcomes_[i].why = e.what();
      } catch (const InternalError& e) {
        // One row's accident does not take the others' predictions along.
        outcomes_[i].why = fmt::format("a bug of Partita: {}", e.what());
      }
    });
  }

  void deliver(PendingRow& p) {
    FamilyFigures& f = families_[p.family];
    if (p.repeats) {
      ++f.repeats;
      return;
    }
    ++f.rows;
    std::size_t given = 0;
    for (Wanted& w : p.wanted) {
      if (!p.why.empty()) break;
      Figure& figure = w.figure;
      figure.configuration = p.configuration;
      if (p.kernel) {
        figure.predicted = p.kernel->seconds;
        figure.assumed = p.kernel->assumed;
        figure.ideal = p.kernel->ideal;
        figure.model = figure.quantity;
      } else {
        const Outcome& o = outcomes_[p.outcome];
        const Outcome* other = p.other ? &outcomes_[*p.other] : nullptr;
        p.why = o.why;
        if (p.why.empty() && other != nullptr &&
            (figure.kind == Kind::scaling || figure.kind == Kind::memory))
          p.why = other->why;
        if (!p.why.empty()) break;
        figure.assumed = p.row_case->assumed;
        if (!fill(w, *p.row_case, o, other)) continue;
      }
      if (!std::isfinite(figure.predicted) ||
          (figure.kind != Kind::fits && !(figure.predicted > 0 && figure.measured > 0)))
        continue;
      ++given;
      f.figures.push_back(std::move(figure));
    }
    if (given > 0) {
      ++f.covered;
      return;
    }
    if (p.why.empty()) p.why = "what was measured follows from no prediction";
    f.uncovered.push_back({p.id, p.why, p.configuration});
  }

  bool fill(Wanted& w, const RowCase& c, const Outcome& o, const Outcome* other) const {
    Figure& figure = w.figure;
    switch (figure.kind) {
      case Kind::time: {
        if (c.layer) {
          figure.measured = w.value;
          figure.predicted = o.layer;
          figure.key = o.key;
          return true;
        }
        const auto seconds = measured_seconds(w, c, o);
        if (!seconds) return false;
        figure.measured = *seconds;
        figure.predicted = o.step;
        figure.key = o.key;
        if (o.half_width) {
          figure.lo = o.step * std::exp(-*o.half_width);
          figure.hi = o.step * std::exp(*o.half_width);
        }
        figure.samples = o.samples;
        figure.ideal = o.ideal;
        figure.parameters = o.parameters;
        figure.shares = o.shares;
        figure.step = o.again;
        return true;
      }
      case Kind::memory:
        figure.predicted = memory_of(w.memory, o, other);
        return true;
      case Kind::fits:
        figure.predicted = o.fits ? 1 : 0;
        return true;
      case Kind::scaling:
        if (other == nullptr) return false;
        figure.predicted = (o.samples / o.step) / (other->samples / other->step);
        return true;
    }
    return false;
  }

  const std::vector<CsvTable>& tables_;
  const Catalogue& catalogue_;
  const RowsOptions& options_;
  std::vector<FamilyFigures> families_;
  std::set<std::string> others_;
  std::vector<PendingRow> rows_;
  std::set<std::string> trained_;
  /// Of training rows, by what memory rows say of theirs too.
  std::map<std::string, std::vector<std::shared_ptr<const Configuration>>> runs_;
  std::map<std::string, std::size_t> slots_;
  std::vector<RowCase> cases_;
  std::map<std::string, ClusterChoice> topologies_;
  std::vector<Outcome> outcomes_;
};

}  // namespace

RowStep::RowStep(std::unique_ptr<Communication> communication, Program program, Network network)
    : communication_(std::move(communication)),
      program_(std::make_unique<const Program>(std::move(program))),
      rehearsal_(*program_, *communication_, {.network = network}) {}

Seconds RowStep::time(const Adjustment& adjustment) const {
  return to_seconds(rehearsal_.play(adjustment).step);
}

std::vector<FamilyFigures> predict_rows(const std::vector<CsvTable>& tables,
                                        const Catalogue& catalogue, const RowsOptions& options) {
  return RowsPrediction(tables, catalogue, options).run();
}

Graph graph_of(const RowCase& c, std::optional<std::int64_t> layers) {
  Graph g;
  if (c.transformer) {
    TransformerConfig t = *c.transformer;
    if (layers) t.layers = static_cast<int>(*layers);
    g = build_transformer(t);
  } else {
    ModelOptions options;
    if (layers) options.layers = static_cast<int>(*layers);
    g = load_model(c.model, options);
  }
  if (!c.lora.empty()) add_lora(g, c.lora, c.plan.lora_rank);
  return g;
}

RowRun run_of_row(const std::vector<CsvTable>& tables, const std::string& text,
                  const Catalogue& catalogue, const RowsOptions& options) {
  // The row itself, else those that have the text in their ids.
  std::vector<std::pair<const CsvTable*, std::size_t>> found;
  std::vector<std::string> ids;
  for (const bool whole : {true, false}) {
    for (const CsvTable& table : tables) {
      const RowSchema schema = recognise(table);
      if (schema != RowSchema::training && schema != RowSchema::convolution) continue;
      for (std::size_t i = 0; i < table.records.size(); ++i) {
        const std::string& id = Row(table, i)["id"];
        if (whole ? id != text : id.find(text) == std::string::npos) continue;
        found.emplace_back(&table, i);
        ids.push_back(id);
      }
    }
    if (!found.empty()) break;
  }
  if (found.empty())
    throw InputError("--row",
                     fmt::format("no row of a step's time has '{}' in its id; partita validate "
                                 "rows FILE --json lists them",
                                 text));
  if (found.size() > 1) {
    const std::size_t all = ids.size();
    if (ids.size() > 5) ids.resize(5);
    throw InputError("--row", fmt::format("'{}' is in the ids of {} rows: {}{}", text, all,
                                          fmt::join(ids, ", "), all > 5 ? ", ..." : ""));
  }
  const auto [table, at] = found.front();
  CsvTable one{table->file, table->header, {table->records[at]}};
  const Row row(one, 0);
  RowRun run;
  run.id = row["id"];
  run.family = row["family"];
  run.framework = row["framework"];
  const std::vector<CsvTable> alone{std::move(one)};
  RowsOptions all = options;
  all.family.clear();
  for (const FamilyFigures& f : predict_rows(alone, catalogue, all)) {
    for (const UncoveredRow& u : f.uncovered)
      throw InputError("--row", fmt::format("{}: {}", u.id, u.why));
    for (const Figure& x : f.figures) {
      if (x.kind != Figure::Kind::time) continue;
      run.published = Seconds{x.measured};
      run.predicted = Seconds{x.predicted};
      run.quantity = x.quantity;
      run.row_case = case_of(recognise(alone[0]), *x.configuration, catalogue);
      if (run.row_case.layer)
        throw InputError("--row", fmt::format("{} is a part of a layer, not a step", run.id));
      return run;
    }
  }
  throw InputError("--row", fmt::format("{} says no step's time", run.id));
}

}  // namespace partita::validation
