#include "cli/options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cctype>
#include <charconv>
#include <climits>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>
#include <thread>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"

namespace partita::cli {

void PlanFlags::add_to(CLI::App& app) {
  app.add_option("--plan", file, "plan file (schema partita.plan/1); flags override it");
  app.add_option("--tp,--tensor-parallel", tp, "tensor parallel size");
  app.add_option("--pp,--pipeline-parallel", pp, "pipeline parallel size");
  app.add_option("--dp,--data-parallel", dp,
                 "data parallel size (default: what the other sizes leave)");
  app.add_option("--cp,--context-parallel", cp, "context parallel size");
  app.add_option("--ep,--expert-parallel", ep, "expert parallel size");
  app.add_option("--etp,--expert-tensor-parallel", etp, "tensor parallel size inside experts");
  app.add_option("--virtual-stages", virtual_stages, "chunks per pipeline stage");
  app.add_option("--micro-batch,--micro-batch-size", micro_batch,
                 "samples per data-parallel rank and micro-batch");
  app.add_option("--zero", zero,
                 "sharded state: 0 none, 1 optimizer, 2 and gradients, 3 and parameters");
  app.add_option("--zero-group", zero_group, "ranks that share one copy of the state (HSDP)");
  app.add_flag("--sequence-parallel", sequence_parallel,
               "cut sequences over tp between the products");
  app.add_flag("--no-sequence-parallel", no_sequence_parallel, "the opposite");
  app.add_flag("--loader", loader,
               "batches come from ranks of their own, one for each data-parallel rank");
  app.add_option("--schedule", schedule, "naive, gpipe, 1f1b, interleaved, zb-h1 or dualpipe");
  app.add_option(
      "--recompute", recompute,
      "none, attention, selective: as the framework does, full, first:N, or operator patterns");
  app.add_option("--cuts", cuts, "blocks per pipeline chunk, like 10,11,11,10");
  app.add_option("--strategy", strategy, fmt::format("{}", fmt::join(strategies(), ", ")));
  app.add_option("--context-exchange", context_exchange, "all_gather, all_to_all or ring");
  app.add_option("--global-batch,--global-batch-size", global_batch, "samples per step");
  app.add_option("--precision", precision, "fp32, tf32, bf16, fp16, fp8, mxfp8 or nvfp4");
  app.add_option("--framework", framework, fmt::format("{}", fmt::join(frameworks(), ", ")));
  app.add_option("--set", set,
                 "a key of plan files, like compression.kind=top_k; repeatable (docs/formats.md)")
      ->allow_extra_args(false);
  app.add_option("--seq,--sequence-length", sequence, "tokens per sample");
  app.add_option("--layers", layers, "this many blocks: its first ones, or more of the same");
  app.add_option("--vocabulary", vocabulary, "size of the vocabulary");
  app.add_flag("--materialised-attention", materialised_attention,
               "attention whose probabilities go through memory");
  app.add_option("--dropout", dropout, "dropout probability");
  app.add_option("--freeze", freeze, "parameters (a pattern) that are not trained; repeatable")
      ->allow_extra_args(false);
  app.add_option("--lora", lora,
                 "linear operators (a pattern) that get adapters; all else is frozen; repeatable")
      ->allow_extra_args(false);
  app.add_option("--lora-rank", lora_rank, "rank of the adapters (default: 16)");
}

void PlanFlags::add_framework_defaults(CLI::App& app) {
  app.add_flag("--framework-defaults", framework_defaults,
               "what the framework does of itself, and sets for this network on such devices");
}

void PlanFlags::add_network(CLI::App& app) {
  app.add_option(
      "--network", network,
      "flows: what runs at once shares links, memory and multiprocessors; beside: each transfer "
      "alone on its links, kernels get what their rank's leave of its device; idle: all alone");
}

std::optional<validation::FitProfile> fit_of(const PlanFlags& flags) {
  if (flags.profile.empty()) return std::nullopt;
  if (flags.placement == "search")
    throw InputError("--profile", "contradicts --placement search; give the axes");
  return std::optional<validation::FitProfile>(std::in_place, flags.profile);
}

void PlanFlags::add_profile(CLI::App& app) {
  app.add_option("--profile", profile,
                 "a fit of partita fit: times adjusted to measured steps, with an interval");
}

void PlanFlags::add_placement(CLI::App& app) {
  app.add_option(
      "--placement", placement,
      "axes of the mesh as they lie on the devices, innermost first, like tp,dp,pp or tp=4,dp,tp; "
      "devices of ranks 0, 1, ..., like 0-7,16-23,8-15, or a file of them; search: the mapping "
      "that "
      "is fastest");
}

void PlanFlags::add_routing(CLI::App& app) {
  app.add_option("--routing", routing,
                 "which experts tokens go to: balanced, zipf:S, or a file of partita run "
                 "--routing-out");
}

namespace {

/// What --placement says, or the file that it names: devices between commas, spaces or ends of
/// lines; # begins a comment.
std::string placement_words(const std::string& given) {
  // Neither axes nor devices have one of these.
  if (given.find_first_of("./") == std::string::npos) return given;
  std::ifstream in(given);
  if (!in || std::filesystem::is_directory(given))
    throw InputError("--placement",
                     fmt::format("cannot read {}; give axes like tp,dp,pp, devices like 0-7,8-15, "
                                 "search, or a file of devices",
                                 given));
  std::string words;
  for (std::string line; std::getline(in, line);) {
    line.erase(std::min(line.find('#'), line.size()));
    std::replace(line.begin(), line.end(), ',', ' ');
    std::istringstream list(line);
    for (std::string word; list >> word;) words += (words.empty() ? "" : ",") + word;
  }
  if (words.empty() || std::isdigit(static_cast<unsigned char>(words[0])) == 0)
    throw InputError("--placement", fmt::format("{} names no devices; write the device of rank 0, "
                                                "1, ..., like 0-7 16-23",
                                                given));
  return words;
}

}  // namespace

Plan plan_from(const PlanFlags& f, const std::string& default_framework,
               const std::vector<GivenKey>& more) {
  std::vector<GivenKey> keys;
  for (const std::string& item : f.set) {
    const auto at = item.find('=');
    if (at == std::string::npos || at == 0)
      throw InputError("--set",
                       fmt::format("'{}' is no KEY=VALUE, like compression.kind=top_k", item));
    const std::string key = item.substr(0, at);
    for (const GivenKey& k : keys) {
      if (k.key == key)
        throw InputError("--set", fmt::format("{} is given twice, as {} and {}; keep one", key,
                                              k.value, item.substr(at + 1)));
    }
    keys.push_back({key, item.substr(at + 1), "--set"});
  }
  keys.insert(keys.end(), more.begin(), more.end());
  GivenKey framework{"framework", f.framework, "--framework"};
  for (const GivenKey& k : keys) {
    if (k.key == framework.key) framework = k;
  }
  std::erase_if(keys, [&](const GivenKey& k) { return k.key == framework.key; });
  Plan p;
  p.dp = 0;
  set_framework(p, default_framework, "");
  if (!f.file.empty()) {
    p = load_plan(f.file, default_framework, framework.value, framework.flag);
  } else if (!framework.value.empty()) {
    set_framework(p, framework.value, framework.flag);
  }
  const auto number = [](const std::optional<std::int64_t>& from, std::int64_t& to,
                         const char* flag, std::int64_t lowest) {
    if (!from) return;
    if (*from < lowest)
      throw InputError(flag, fmt::format("{} is too small; at least {}", *from, lowest));
    if (*from > 1'000'000'000)
      throw InputError(flag, fmt::format("{} is too large; at most 1,000,000,000", *from));
    to = *from;
  };
  if (!f.placement.empty() && f.placement != "search")
    set_key(p, "placement", '[' + placement_words(f.placement) + ']', "--placement");
  number(f.tp, p.tp, "--tp", 1);
  number(f.pp, p.pp, "--pp", 1);
  number(f.dp, p.dp, "--dp", 1);
  number(f.cp, p.cp, "--cp", 1);
  number(f.ep, p.ep, "--ep", 1);
  number(f.etp, p.etp, "--etp", 1);
  number(f.virtual_stages, p.virtual_stages, "--virtual-stages", 1);
  number(f.micro_batch, p.micro_batch, "--micro-batch", 1);
  number(f.global_batch, p.global_batch, "--global-batch", 1);
  number(f.zero_group, p.zero_group, "--zero-group", 1);
  std::int64_t zero = p.zero;
  number(f.zero, zero, "--zero", 0);
  if (zero > 3)
    throw InputError("--zero", fmt::format("{} is no ZeRO stage; use 0, 1, 2 or 3", zero));
  p.zero = static_cast<int>(zero);
  const FrameworkProfile own = load_framework(p.framework, "--framework");
  // What shards everything is no data parallelism of whole copies.
  const bool zero_given =
      f.zero || in_plan(f, "zero") ||
      std::any_of(more.begin(), more.end(), [](const GivenKey& k) { return k.key == "zero"; });
  if (!zero_given && own.zero == 3) p.zero = 3;
  if (f.sequence_parallel && f.no_sequence_parallel) {
    throw InputError("--no-sequence-parallel", "contradicts --sequence-parallel; give one of them");
  }
  if (f.sequence_parallel) p.sequence_parallel = true;
  if (f.no_sequence_parallel) p.sequence_parallel = false;
  if (f.loader) p.loader = true;
  if (!f.schedule.empty())
    p.schedule = parse_schedule(f.schedule, "--schedule"), p.schedule_given = true;
  if (!f.recompute.empty()) p.recompute = parse_recompute(f.recompute, "--recompute");
  if (!f.precision.empty()) set_precision(p, f.precision, "--precision");
  if (!f.strategy.empty()) {
    const auto known = strategies();
    if (std::find(known.begin(), known.end(), f.strategy) == known.end()) {
      throw InputError("--strategy",
                       fmt::format("'{}' is no strategy{}; there are {}", f.strategy,
                                   did_you_mean(f.strategy, known), fmt::join(known, ", ")));
    }
    p.strategy = f.strategy;
  }
  if (!f.context_exchange.empty()) {
    p.context = parse_context_exchange(f.context_exchange, "--context-exchange");
    p.context_given = true;
  }
  if (!f.cuts.empty()) {
    p.cuts.clear();
    for (std::size_t at = 0; at <= f.cuts.size();) {
      const auto comma = std::min(f.cuts.find(',', at), f.cuts.size());
      std::int64_t n = -1;
      const auto [end, error] = std::from_chars(f.cuts.data() + at, f.cuts.data() + comma, n);
      if (error != std::errc{} || end != f.cuts.data() + comma || n < 0) {
        throw InputError(
            "--cuts", fmt::format("'{}' is not a list of block counts like 10,11,11,10", f.cuts));
      }
      p.cuts.push_back(n);
      at = comma + 1;
    }
  }
  if (!network_named(f.network)) {
    throw InputError(
        "--network",
        fmt::format("'{}' is no network model; there are flows: what runs at once shares, "
                    "beside: kernels give way to their rank's transfers, and idle: each alone",
                    f.network));
  }
  for (const GivenKey& k : keys) set_key(p, k.key, k.value, k.flag);
  set_trained(p, f);
  return p;
}

void set_trained(Plan& p, const PlanFlags& f) {
  const std::vector<std::string> none{"none"};
  if (!f.freeze.empty()) p.freeze = f.freeze == none ? std::vector<std::string>{} : f.freeze;
  if (f.lora == none)
    p.lora.clear(), p.lora_rank = 0;
  else if (!f.lora.empty())
    p.lora = f.lora;
  if (!f.lora_rank) return;
  if (*f.lora_rank < 1 || *f.lora_rank > 65536)
    throw InputError("--lora-rank", fmt::format("{} is not in 1 to 65,536", *f.lora_rank));
  p.lora_rank = *f.lora_rank;
}

void set_key(Plan& plan, const std::string& key, const std::string& value,
             const std::string& flag) {
  try {
    set(plan, key, value, flag);
  } catch (const InputError& e) {
    throw InputError(flag == "--set" ? fmt::format("--set {}", key) : flag, e.message());
  }
}

namespace {
bool in_plan_file(const PlanFlags& f, const std::string& key) {
  return !f.file.empty() && YamlNode::load_file(f.file, "partita.plan/1").has(key);
}
/// Is the key, or one within it, set by one of these?
bool within(const std::string& key, const std::vector<std::string>& all) {
  return std::any_of(all.begin(), all.end(), [&](const std::string& one) {
    return one.substr(0, one.find_first_of(".=")) == key;
  });
}
}  // namespace

bool in_plan(const PlanFlags& f, const std::string& key) {
  return in_plan_file(f, key) || within(key, f.set);
}

void restrict_space(SearchSpace& s, const PlanFlags& f, const Plan& given) {
  const auto fix = [&](const char* key, bool flag, auto& values, auto value) {
    if (flag || in_plan(f, key)) values = {value};
  };
  fix("tp", f.tp.has_value(), s.tp, given.tp);
  fix("pp", f.pp.has_value(), s.pp, given.pp);
  fix("dp", f.dp.has_value(), s.dp, given.dp);
  fix("cp", f.cp.has_value(), s.cp, given.cp);
  fix("ep", f.ep.has_value(), s.ep, given.ep);
  fix("micro_batch", f.micro_batch.has_value(), s.micro_batch, given.micro_batch);
  fix("virtual_stages", f.virtual_stages.has_value(), s.virtual_stages, given.virtual_stages);
  fix("zero", f.zero.has_value(), s.zero, given.zero);
  if (s.zero.size() == 1) s.zero_pipelined = 3;
  fix("etp", f.etp.has_value(), s.etp, given.etp);
  fix("recompute", !f.recompute.empty(), s.recompute, given.recompute);
  fix("schedule", !f.schedule.empty(), s.schedules, given.schedule);
  fix("sequence_parallel", f.sequence_parallel || f.no_sequence_parallel, s.sequence_parallel,
      static_cast<char>(given.sequence_parallel));
}

std::vector<std::string> assumptions(const PlanFlags& f, const Plan& plan, const Graph& graph,
                                     const std::vector<std::string>& given) {
  const auto open = [&](const std::string& key, bool flag) {
    return !flag && !in_plan(f, key) && std::find(given.begin(), given.end(), key) == given.end();
  };
  std::vector<std::string> list;
  if (open("framework", !f.framework.empty())) list.push_back("framework " + plan.framework);
  if (open("precision", !f.precision.empty())) list.push_back("precision " + plan.precision_name);
  if (open("zero", f.zero.has_value()) && plan.zero == 3 && plan.strategy != "dataparallel")
    list.push_back("ZeRO 3 of " + plan.framework);
  if (plan.recompute.kind == Recompute::selective && plan.selective.kind != Recompute::attention)
    list.push_back("selective recompute as " + plan.framework);
  if (open("global_batch", f.global_batch.has_value()))
    list.push_back(fmt::format("global batch {}", plan.global_batch));
  if (graph.sequence > 0 && open("sequence", f.sequence.has_value()))
    list.push_back(fmt::format("sequence {}", graph.sequence));
  const auto scans = [](const Operator& op) {
    return std::holds_alternative<StateSpace>(op.operation);
  };
  if (open("micro_batch", f.micro_batch.has_value()) &&
      plan.global_batch > plan.micro_batch * plan.dp)
    list.push_back(fmt::format("micro-batch {}", plan.micro_batch));
  if (plan.zero >= 2 && plan.pp > 1 && plan.global_batch > plan.micro_batch * plan.dp &&
      plan.zero > load_framework(plan.framework, "framework").zero_pipelined)
    list.push_back(fmt::format(
        "ZeRO {} {} for each micro-batch (frameworks keep {} whole under a pipeline: "
        "--zero 1)",
        plan.zero,
        plan.zero == 3 ? "gathers parameters and scatters gradients" : "scatters gradients",
        plan.zero == 3 ? "both" : "them"));
  const auto left =
      std::find_if(graph.operators.begin(), graph.operators.end(), [&](const Operator& op) {
        return std::holds_alternative<GroupedProduct>(op.operation) &&
               std::any_of(plan.lora.begin(), plan.lora.end(),
                           [&](const std::string& pattern) { return matches(pattern, op.name); });
      });
  if (left != graph.operators.end())
    list.push_back(fmt::format("no adapters of experts' products, like {}", left->name));
  if (std::any_of(graph.operators.begin(), graph.operators.end(), scans))
    list.emplace_back("what Mamba's kernels take, which no device has measured");
  return list;
}

Topology load_cluster(const std::string& text, const TopologyEdits& edits) {
  const auto models = model_catalogue();
  if (std::find(models.begin(), models.end(), text) != models.end()) {
    throw InputError("TOPOLOGY", fmt::format("'{}' is a network; the order is MODEL TOPOLOGY, like "
                                             "{} dgx-h100:1",
                                             text, text));
  }
  return load_topology(text, edits);
}

std::string this_machine() {
  std::string model = "unknown processor";
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("model name", 0) == 0) {
      model = line.substr(line.find(':') + 2);
      break;
    }
  }
  // It is written into quoted texts.
  std::replace(model.begin(), model.end(), '\'', ' ');
  return fmt::format("{} cores of {}", std::thread::hardware_concurrency(), model);
}

void write_text(const std::string& flag, const std::string& file, const std::string& text) {
  std::FILE* f = std::fopen(file.c_str(), "w");
  const bool good = f != nullptr && std::fwrite(text.data(), 1, text.size(), f) == text.size();
  if ((f != nullptr && std::fclose(f) != 0) || !good)
    throw InputError(flag, fmt::format("cannot write {}; check its permissions", file));
}

void reject_repeats(const std::string& flag, const std::vector<std::string>& files) {
  for (std::size_t i = 0; i < files.size(); ++i) {
    for (std::size_t k = 0; k < i; ++k) {
      std::error_code absent;
      if (std::filesystem::equivalent(files[i], files[k], absent))
        throw InputError(
            flag, fmt::format("'{}' is given twice; its figures would count double", files[i]));
    }
  }
}

void check_writable(const std::string& flag, const std::string& file,
                    const std::vector<std::pair<std::string, std::string>>& others) {
  if (file.empty()) return;
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path path(file);
  for (const auto& [what, other] : others) {
    if (other.empty() || fs::weakly_canonical(other, error) != fs::weakly_canonical(path, error))
      continue;
    throw InputError(
        flag, fmt::format("{} is {} too, and would be overwritten; name another file", file, what));
  }
  if (fs::is_directory(path, error))
    throw InputError(flag, fmt::format("{} is a folder; name a file", file));
  const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, error)) {
    throw InputError(flag, fmt::format("cannot write {}: there is no folder {}; create it or name "
                                       "another",
                                       file, folder.string()));
  }
  // What is there stays as it is; what was not is taken away again.
  const bool there = fs::exists(path, error);
  if (std::FILE* f = std::fopen(file.c_str(), "a"); f != nullptr) {
    std::fclose(f);
    if (!there) fs::remove(path, error);
  } else {
    throw InputError(flag,
                     fmt::format("cannot write {}; check the folder and its permissions", file));
  }
}

void settle_ranks(Plan& p, std::int64_t ranks, const std::string& where) {
  for (const auto& [flag, size] : {std::pair{"--tp", p.tp}, {"--pp", p.pp}, {"--cp", p.cp}}) {
    // Also keeps the product below within its type.
    if (size > ranks) {
      throw InputError(flag,
                       fmt::format("{} is more than the {} devices of {}; use a divisor of {}, or "
                                   "more nodes",
                                   size, ranks, where, ranks));
    }
  }
  // Each data-parallel rank is tp x pp x cp ranks, and a loader's where there are loaders; servers
  // are beside them.
  const std::int64_t servers = p.servers * p.tp;
  if (servers >= ranks) {
    throw InputError(
        "servers",
        fmt::format("{} servers x tp {} leave none of the {} devices of {} for training; "
                    "use fewer, or more devices",
                    p.servers, p.tp, ranks, where));
  }
  const std::int64_t others = p.ranks_of_replica(), left = ranks - servers;
  const std::string beside = servers > 0 ? fmt::format(" less {} servers", servers) : "";
  if (p.loader && !p.message_queue && left % others != 0) {
    throw InputError(
        "--loader",
        fmt::format(
            "tp {} x pp {} x cp {} ranks and their loader are {}, which does not divide the {} "
            "devices of {}{}; choose other sizes or another number of devices",
            p.tp, p.pp, p.cp, others, ranks, where, beside));
  }
  if (left % others != 0) {
    throw InputError(
        "--tp, --pp, --cp",
        fmt::format("tp {} x pp {} x cp {}{} = {} does not divide the {} devices of {}{}; "
                    "choose sizes whose product divides {}, or another number of nodes",
                    p.tp, p.pp, p.cp, p.message_queue ? " and their brokers" : "", others, ranks,
                    where, beside, left));
  }
  if (p.dp == 0) p.dp = left / others;
  if (p.dp * others != left) {
    throw InputError(
        "--dp",
        fmt::format(
            "dp {} x tp {} x pp {} x cp {}{}{} = {} ranks, but {} has {} devices; leave --dp "
            "out or use {}",
            p.dp, p.tp, p.pp, p.cp,
            (p.loader ? fmt::format(" and {} loaders", p.dp) : "") +
                (p.message_queue ? fmt::format(" and {} brokers", p.dp * p.tp * p.cp) : ""),
            servers > 0 ? fmt::format(" and {} servers", servers) : "", p.dp * others + servers,
            where, ranks, left / others));
  }
}

ModelOptions model_options(const PlanFlags& f) {
  ModelOptions o;
  const auto number = [](const std::optional<std::int64_t>& given, const char* flag,
                         std::int64_t highest) -> std::int64_t {
    if (!given) return 0;
    if (*given < 1 || *given > highest) {
      throw InputError(flag, fmt::format("{} is not in 1 to {}", *given, grouped(highest)));
    }
    return *given;
  };
  o.sequence = number(f.sequence, "--seq", 100'000'000);
  o.layers = static_cast<int>(number(f.layers, "--layers", 100'000));
  o.vocabulary = number(f.vocabulary, "--vocabulary", 1'000'000'000);
  o.edits = f.model_edits;
  o.flash_attention = !f.materialised_attention;
  if (f.dropout) {
    if (!(*f.dropout >= 0 && *f.dropout < 1))  // also refuses nan
      throw InputError("--dropout", fmt::format("{} is not in [0, 1)", *f.dropout));
    o.dropout = *f.dropout;
  }
  return o;
}

std::vector<std::string> framework_defaults(PlanFlags& flags, Plan& plan, const std::string& model,
                                            const Topology& topology,
                                            const std::vector<std::string>& given) {
  std::vector<std::string> said;
  const FrameworkProfile f = load_framework(plan.framework, "--framework");
  // Whatever else is asked of it, it has no kernel for such a device or type.
  const auto known = known_models();
  const auto at = std::find_if(known.begin(), known.end(),
                               [&](const KnownModel& k) { return k.name == model; });
  const bool attends = at == known.end() || at->transformer;
  if (f.flash_capability > 0 && attends && !flags.materialised_attention) {
    const bool wide = bits(plan.precision.activations) > 16;
    int least = INT_MAX;
    for (std::size_t k = 0; k < topology.profile_count(); ++k)
      least = std::min(least, topology.profile(k).compute_capability);
    if (wide || (least > 0 && least < f.flash_capability)) {
      flags.materialised_attention = true;
      said.push_back(
          wide ? fmt::format("materialised attention: {} has flash kernels of 16 bits", f.name)
               : fmt::format("materialised attention: {}'s flash kernels need compute "
                             "capability {}, not {}",
                             f.name, f.flash_capability, least));
    }
  }
  if (!flags.framework_defaults) return said;
  // A key is given as a whole: `launch` by "launch.graphs".
  const auto open = [&](const std::string& key) {
    const bool flag = key == "sequence_parallel"
                          ? flags.sequence_parallel || flags.no_sequence_parallel
                      : key == "zero"       ? flags.zero.has_value()
                      : key == "zero_group" ? flags.zero_group.has_value()
                      : key == "recompute"  ? !flags.recompute.empty()
                                            : false;
    return !flag && !in_plan(flags, key) && !within(key, given);
  };
  if (!f.flash_attention && !flags.materialised_attention) {
    flags.materialised_attention = true;
    said.emplace_back("materialised attention");
  }
  const bool transformer = attends;
  if (!flags.dropout && f.dropout > 0 && at != known.end() && at->transformer &&
      at->transformer->dropout == 0) {
    flags.dropout = f.dropout;
    said.push_back(fmt::format("dropout {}", f.dropout));
  }
  if (plan.tp > 1 && open("sequence_parallel") && (f.sequence_parallel || plan.ep > 1) &&
      !plan.sequence_parallel) {
    plan.sequence_parallel = true;
    said.emplace_back("sequence parallel on");
  }
  if (open("zero") && plan.zero != f.zero) {
    plan.zero = f.zero;
    said.push_back(fmt::format("ZeRO {}", f.zero));
  }
  if (open("recompute") && transformer && f.recompute != "none") {
    plan.recompute = parse_recompute(f.recompute, "recompute");
    said.push_back("recompute " + f.recompute);
  }
  bool overlaps = f.overlap_tensor_parallel;
  Occasion where;
  where.network = model;
  where.device = topology.device(DeviceId{0}).name;
  where.precision = plan.precision_name;
  where.gpus = static_cast<std::int64_t>(topology.used_ranks());
  for (const Workload& w : f.workloads) {
    if (!concerns(w, where, plan)) continue;
    for (std::string& one : apply(w, plan, open, overlaps)) said.push_back(std::move(one));
  }
  // Of a part of the network all that a framework recomputes of the whole.
  if (open("recompute") && flags.layers)
    plan.recompute.first = std::min(plan.recompute.first, std::max<std::int64_t>(0, *flags.layers));
  const bool experts = at != known.end() && at->transformer && at->transformer->moe.experts > 0;
  if (overlaps && plan.sequence_parallel && !experts && open("overlap_tensor_parallel")) {
    plan.overlap_tensor_parallel = true;
    said.emplace_back("tensor-parallel overlap on");
  }
  for (std::string& one : said) one += " (of " + plan.framework + ")";
  return said;
}

Graph load_graph(const std::string& model, const PlanFlags& flags, Plan& plan) {
  Graph g = load_model(model, model_options(flags));
  if (plan.lora.empty() && plan.lora_rank > 0)
    throw InputError("lora", fmt::format("rank {} is of adapters, and no operators get any; name "
                                         "them: --lora PATTERN",
                                         plan.lora_rank));
  constexpr std::int64_t kRank = 16;
  if (!plan.lora.empty() && plan.lora_rank == 0) plan.lora_rank = kRank;
  if (!plan.lora.empty()) add_lora(g, plan.lora, plan.lora_rank);
  if (!plan.freeze.empty()) freeze(g, plan.freeze);
  if (plan.recompute.kind == Recompute::first && plan.recompute.first > g.layers)
    throw InputError("--recompute", fmt::format("first:{} is more than the {} blocks of {}; use "
                                                "full, or first:N up to {}",
                                                plan.recompute.first, g.layers, g.name, g.layers));
  const auto absent = [&](const std::string& pattern) {
    return std::none_of(g.operators.begin(), g.operators.end(), [&](const Operator& op) {
      return matches(pattern.substr(pattern[0] == '~' ? 1 : 0), op.name);
    });
  };
  for (const std::string& pattern : plan.recompute.patterns) {
    if (absent(pattern)) {
      throw InputError("--recompute",
                       fmt::format("pattern '{}' matches no operator of {}; partita model {} "
                                   "--operators lists them",
                                   pattern, g.name, model));
    }
  }
  return g;
}

void refuse_foreign(const Topology& t, const std::string& file, const std::string& flag) {
  static const std::regex kMachine(
      "partita calibrate [^,]*, [^,]*, (?:[^,]*, )?([0-9]+ cores of .*), Linux ");
  for (std::size_t d = 0; d < t.device_count(); ++d) {
    for (const auto& [figure, source] : t.device(DeviceId{d}).sources) {
      std::smatch m;
      if (!std::regex_search(source, m, kMachine) || m[1].str() == this_machine()) continue;
      throw InputError(flag, fmt::format("{} was measured on another machine ({}) than this ({}); "
                                         "calibrate here, or leave it out",
                                         file, m[1].str(), this_machine()));
    }
  }
}

}  // namespace partita::cli
