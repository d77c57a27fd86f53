#include "validation/row_flags.h"

#include <algorithm>
#include <array>
#include <cctype>

#include "validation/row_text.h"

namespace partita::validation {
namespace {

constexpr std::string_view kSpace = " \t\n";

bool is_flag(std::string_view word) {
  return word.size() > 2 && word[0] == '-' && word[1] == '-' &&
         std::isalpha(static_cast<unsigned char>(word[2])) != 0;
}

/// Flags whose value is a column's cell.
struct Column {
  std::string_view flag, column;
};
constexpr std::array kColumns{
    Column{"tensor-model-parallel-size", "tp"},
    Column{"tensor-parallel-degree", "tp"},
    Column{"pipeline-model-parallel-size", "pp"},
    Column{"pipeline-parallel-degree", "pp"},
    Column{"context-parallel-size", "cp"},
    Column{"context-parallel-degree", "cp"},
    Column{"expert-model-parallel-size", "ep"},
    Column{"expert-parallel-degree", "ep"},
    Column{"expert-tensor-parallel-size", "etp"},
    Column{"expert-tensor-parallel-degree", "etp"},
    Column{"num-virtual-stages-per-pipeline-rank", "virtual_stages_per_gpu"},
    Column{"micro-batch-size", "micro_batch_per_dp_rank"},
    Column{"global-batch-size", "global_batch_seqs"},
    Column{"seq-length", "seq_len_tokens"},
    Column{"seq-len", "seq_len_tokens"},
    Column{"num-layers", "num_layers"},
    Column{"hidden-size", "hidden_size"},
    Column{"num-attention-heads", "num_heads"},
    Column{"num-query-groups", "num_kv_heads"},
    Column{"ffn-hidden-size", "ffn_hidden_size"},
    Column{"num-experts", "num_experts"},
    Column{"moe-router-topk", "moe_topk"},
    Column{"moe-ffn-hidden-size", "moe_ffn_hidden_size"},
};
/// Flags that say a cell by being there.
struct Switch {
  std::string_view flag, column, cell;
};
constexpr std::array kSwitches{
    Switch{"sequence-parallel", "sequence_parallel", "yes"},
    Switch{"use-distributed-optimizer", "zero_or_fsdp", "distributed optimizer"},
    Switch{"use-torch-fsdp2", "zero_or_fsdp", "FSDP2"},
    Switch{"recompute-activations", "recompute", "selective"},
    Switch{"checkpoint-activations", "recompute", "full"},
    Switch{"bf16", "precision", "bf16"},
    Switch{"fp16", "precision", "fp16"},
};
/// Flags of several that are one cell together.
constexpr std::array<std::string_view, 12> kTogether{"recompute-granularity",
                                                     "recompute-method",
                                                     "recompute-num-layers",
                                                     "recompute-modules",
                                                     "activation-checkpoint.mode",
                                                     "fp8-format",
                                                     "fp8-recipe",
                                                     "fp4-format",
                                                     "fp4-recipe",
                                                     "num-layers-per-virtual-pipeline-stage",
                                                     "zero-stage",
                                                     "data-parallel-sharding-strategy"};

/// Of the network: megatron_flags() reads what matters of these.
constexpr std::array<std::string_view, 16> kArchitecture{"swiglu",
                                                         "untie-embeddings-and-output-weights",
                                                         "disable-bias-linear",
                                                         "position-embedding-type",
                                                         "multi-latent-attention",
                                                         "group-query-attention",
                                                         "transformer-impl",
                                                         "attention-backend",
                                                         "use-flash-attn",
                                                         "normalization",
                                                         "attention-dropout",
                                                         "hidden-dropout",
                                                         "max-position-embeddings",
                                                         "apply-layernorm-1p",
                                                         "moe-grouped-gemm",
                                                         "cross-entropy-loss-fusion"};
/// Switches: none of them takes a value.
constexpr std::array<std::string_view, 14> kNoValue{"swiglu",
                                                    "untie-embeddings-and-output-weights",
                                                    "disable-bias-linear",
                                                    "multi-latent-attention",
                                                    "group-query-attention",
                                                    "use-flash-attn",
                                                    "moe-grouped-gemm",
                                                    "cross-entropy-loss-fusion",
                                                    "overlap-grad-reduce",
                                                    "overlap-param-gather",
                                                    "tp-comm-overlap",
                                                    "use-mcore-models",
                                                    "overlap-moe-expert-parallel-comm",
                                                    "moe-pad-expert-input-to-capacity"};
/// Beginnings of names of flags that change neither time nor memory.
constexpr std::array<std::string_view, 42> kNoCost{"log-",
                                                   "save",
                                                   "load",
                                                   "no-load",
                                                   "no-save",
                                                   "data-path",
                                                   "data-cache",
                                                   "tokenizer",
                                                   "vocab-",
                                                   "merge-file",
                                                   "lr",
                                                   "min-lr",
                                                   "weight-decay",
                                                   "adam-",
                                                   "clip-grad",
                                                   "init-method",
                                                   "train-",
                                                   "eval-",
                                                   "exit-",
                                                   "split",
                                                   "seed",
                                                   "use-mcore-models",
                                                   "distributed-backend",
                                                   "distributed-timeout",
                                                   "ckpt",
                                                   "dist-ckpt",
                                                   "auto-detect-ckpt",
                                                   "tensorboard",
                                                   "wandb",
                                                   "timing",
                                                   "test-mode",
                                                   "mock-data",
                                                   "num-workers",
                                                   "attention-softmax-in-fp32",
                                                   "norm-epsilon",
                                                   "rotary-",
                                                   "use-rotary",
                                                   "override-opt",
                                                   "rampup",
                                                   "manual-gc",
                                                   "dataloader",
                                                   "moe-aux-loss"};

template <class Names>
bool among(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

std::string value_of(const std::vector<Flag>& flags, std::string_view name) {
  std::string value;
  for (const Flag& f : flags)
    if (f.name == name) value = f.value;  // the last is the program's
  return value;
}
bool given(const std::vector<Flag>& flags, std::string_view name) {
  return std::any_of(flags.begin(), flags.end(), [&](const Flag& f) { return f.name == name; });
}

Flag named(std::string_view written) {
  Flag f;
  f.written = written;
  const auto equals = written.find('=');
  if (equals != std::string_view::npos) f.value = written.substr(equals + 1);
  std::string_view name = written.substr(2, std::min(equals, written.size()) - 2);
  // torchtitan's groups; modes have the group's name with them.
  if (const auto point = name.rfind('.');
      point != std::string_view::npos && name.substr(point) != ".mode")
    name = name.substr(point + 1);
  f.name = lower(name);
  std::replace(f.name.begin(), f.name.end(), '_', '-');
  return f;
}

}  // namespace

CommandLine command_line(std::string_view text) {
  CommandLine line;
  bool takes = false, list = false;  // the last flag more words
  for (std::size_t at = 0; at < text.size();) {
    const auto from = text.find_first_not_of(kSpace, at);
    const std::size_t begin = std::min(from, text.size());
    const auto end = std::min(text.find_first_of(kSpace, begin), text.size());
    std::string_view word = text.substr(begin, end - begin);
    const bool flag = is_flag(word);
    if (!flag && !takes) {
      line.words += text.substr(at, end - at);
      at = end;
      continue;
    }
    at = end;
    const bool ends = !word.empty() && (word.back() == ',' || word.back() == ';');
    if (ends) word.remove_suffix(1);
    if (flag) {
      line.flags.push_back(named(word));
      const Flag& f = line.flags.back();
      list = f.name == "recompute-modules" || f.name == "cuda-graph-scope";
      takes = !ends && !among(kNoValue, f.name) && (f.value.empty() || list) &&
              std::none_of(kSwitches.begin(), kSwitches.end(),
                           [&](const Switch& s) { return s.flag == f.name; });
      // Clauses on both sides of it stay apart.
      if (!line.words.empty() && line.words.back() != ';') line.words += ';';
    } else if (!word.empty()) {
      Flag& f = line.flags.back();
      f.value += (f.value.empty() ? "" : " ") + std::string(word);
      f.written += " " + std::string(word);
      takes = list && !ends;
    }
  }
  if (line.flags.empty()) line.words = text;
  return line;
}

std::map<std::string, std::string> cells_of(const std::vector<Flag>& flags) {
  std::map<std::string, std::string> cells;
  for (const Flag& f : flags) {
    for (const Column& c : kColumns)
      if (f.name == c.flag && !f.value.empty()) cells[std::string(c.column)] = f.value;
    for (const Switch& s : kSwitches)
      if (f.name == s.flag && f.value != "false") cells[std::string(s.column)] = s.cell;
  }
  if (given(flags, "fp8-format"))
    cells["precision"] = lower(value_of(flags, "fp8-recipe")) == "mxfp8" ? "mxfp8" : "fp8";
  if (given(flags, "fp4-format")) cells["precision"] = "nvfp4";
  const std::string how = value_of(flags, "recompute-granularity");
  const std::string method = value_of(flags, "recompute-method");
  const std::string layers = value_of(flags, "recompute-num-layers");
  const std::string modules = value_of(flags, "recompute-modules");
  if (how == "full" && method == "block" && !layers.empty())
    cells["recompute"] = "full (block, " + layers + " layers)";
  else if (how == "full")
    cells["recompute"] = method.empty() ? "full" : "full (" + method + ")";
  else if (how == "selective")
    cells["recompute"] = modules.empty() ? "selective" : "selective (" + modules + ")";
  if (const std::string mode = value_of(flags, "activation-checkpoint.mode"); !mode.empty())
    cells["recompute"] = mode;
  if (const std::string stage = value_of(flags, "zero-stage"); !stage.empty())
    cells["zero_or_fsdp"] = "ZeRO-" + stage;
  if (const std::string s = value_of(flags, "data-parallel-sharding-strategy"); !s.empty())
    cells["zero_or_fsdp"] = s == "optim_grads_params" ? "ZeRO-3"
                            : s == "optim_grads"      ? "ZeRO-2"
                            : s == "optim"            ? "ZeRO-1"
                                                      : "none";
  return cells;
}

bool is_read_elsewhere(const Flag& flag) {
  const std::string& name = flag.name;
  if (among(kTogether, name) || among(kArchitecture, name)) return true;
  if (std::any_of(kColumns.begin(), kColumns.end(),
                  [&](const Column& c) { return c.flag == name; }) ||
      std::any_of(kSwitches.begin(), kSwitches.end(),
                  [&](const Switch& s) { return s.flag == name; }))
    return true;
  return std::any_of(kNoCost.begin(), kNoCost.end(),
                     [&](std::string_view begin) { return name.rfind(begin, 0) == 0; });
}

MegatronFlags megatron_flags(std::string_view text) {
  MegatronFlags f;
  f.any = is_flag(text.substr(0, text.find_first_of(kSpace)));
  const auto flags = command_line(text).flags;
  const auto says = [&](std::string_view name) { return given(flags, name); };
  const auto is = [&](std::string_view name, std::string_view value) {
    return value_of(flags, name) == value;
  };
  f.gated = says("swiglu");
  f.untied = says("untie-embeddings-and-output-weights");
  f.no_bias = says("disable-bias-linear");
  f.rope = is("position-embedding-type", "rope");
  f.latent = says("multi-latent-attention");
  f.architecture = f.gated || f.untied || f.no_bias || f.latent || says("position-embedding-type");
  if (const auto n = number(value_of(flags, "num-layers-per-virtual-pipeline-stage"));
      n && *n >= 1 && *n < 1e6)
    f.chunk_layers = static_cast<std::int64_t>(*n);
  f.overlap_gradients = says("overlap-grad-reduce");
  f.fused_loss = says("cross-entropy-loss-fusion");
  f.grouped_product = says("moe-grouped-gemm");
  f.local = is("transformer-impl", "local");
  f.overlap_tensor_parallel = says("tp-comm-overlap");
  f.flex_dispatcher = is("moe-token-dispatcher-type", "flex");
  const auto dropout = number(value_of(flags, "hidden-dropout"));
  f.no_dropout = dropout && *dropout == 0;
  f.attention = says("use-flash-attn") ? "flash" : value_of(flags, "attention-backend");
  return f;
}

}  // namespace partita::validation
