#include "validation/row_settings.h"

#include <algorithm>
#include <cstdint>
#include <regex>

#include "validation/row_flags.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

struct Clause {
  std::string text;          ///< as written
  bool in_brackets = false;  ///< of another
};

void trim(std::string& s) {
  const auto from = s.find_first_not_of(" \t\"'");
  if (from == std::string::npos) {
    s.clear();
    return;
  }
  s = s.substr(from, s.find_last_not_of(" \t\"'") - from + 1);
}

std::vector<Clause> clauses_of(std::string_view text) {
  std::vector<Clause> all;
  Clause outer, inner{"", true};
  int depth = 0;
  const auto end = [&](Clause& c) {
    trim(c.text);
    if (!c.text.empty()) all.push_back(c);
    c.text.clear();
  };
  for (std::size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    // "TP overlap + DP overlap", "A and B", "DP overlap without TP overlap".
    std::string_view joint;
    for (const std::string_view word : {" + ", " and ", " but "}) {
      if (text.substr(at, word.size()) == word) joint = word;
    }
    // A list of modules is one clause.
    const bool list = lower(outer.text).find("recompute") != std::string::npos;
    if (depth == 0 && !joint.empty() && !list) {
      end(outer);
      at += joint.size() - 1;
      continue;
    }
    if (depth == 0 && c == ' ' && text.substr(at + 1, 8) == "without ") {
      end(outer);
      continue;
    }
    if (c == '{' || c == '}' || (depth == 0 && (c == ';' || c == ',' || c == '\n'))) {
      end(outer);
    } else if (c == '(' || c == '[') {
      if (++depth == 1) outer.text += c;
    } else if ((c == ')' || c == ']') && depth > 0) {
      if (--depth > 0) continue;
      // Both what the brackets say by themselves and the clause with them.
      outer.text += c;
      end(inner);
    } else if (depth > 0) {
      outer.text += c;
      if (c == ',' || c == ';')
        end(inner);
      else
        inner.text += c;
    } else {
      outer.text += c;
    }
  }
  end(inner);
  end(outer);
  return all;
}

/// Small, "_" and "-" as spaces, without quotes.
std::string plain_clause(std::string_view text) {
  std::string s;
  for (const char c : lower(text)) {
    if (c == '"' || c == '\'') continue;
    const char x = c == '_' || c == '-' ? ' ' : c;
    if (x != ' ' || (!s.empty() && s.back() != ' ')) s += x;
  }
  return s;
}

bool is_off(std::string_view clause) {
  for (const std::string_view no : {"no ", "without ", "not ", "disable "}) {
    if (clause.rfind(no, 0) == 0) return true;
  }
  const std::string_view value = clause.substr(0, clause.find_first_of("(["));
  for (const std::string_view off :
       {"off", "false", "disabled", "not used", "not enabled", "unused"}) {
    if (has_word(value, off)) return true;
  }
  // "TP overlap (off)"; what else brackets say is a clause of its own.
  for (const std::string_view off : {"(off)", "(disabled)", "(no)", "(not used)"}) {
    if (clause.find(off) != std::string_view::npos) return true;
  }
  // "=none", ": no", "=0".
  const auto last = value.find_last_not_of(' ');
  const auto before = value.find_last_of(":=", last);
  if (last == std::string_view::npos || before == std::string_view::npos) return false;
  const auto start = value.find_first_not_of(" :=", before);
  const std::string_view word = value.substr(std::min(start, last + 1), last + 1 - start);
  return word == "none" || word == "no" || word == "n" || word == "0";
}

/// "4 layers" -> 4; 0 where there is none.
std::int64_t layers_of(std::string_view text) {
  static const std::regex layers(R"((\d{1,3}) ?(?:layer|block))");
  std::match_results<std::string_view::const_iterator> found;
  if (!std::regex_search(text.begin(), text.end(), found, layers)) return 0;
  return std::stol(found[1].str());
}

/// A clause with a word of each set is this setting; the first that it is.
struct Rule {
  std::vector<std::vector<std::string_view>> words;
  void (*set)(Settings& s, bool on, std::string_view clause);
};

const std::vector<Rule>& rules() {
  using S = Settings;
  using Text = std::string_view;
  static const std::vector<std::string_view> overlap{"overlap", "overlaps", "overlapped",
                                                     "overlapping"};
  static const std::vector<std::string_view> graphs{"cuda graph",      "cuda graphs",
                                                    "cudagraph",       "cudagraphs",
                                                    "cuda graph impl", "cuda graph scope"};
  static const std::vector<Rule> all{
      {{{"interleaved", "interleaved1f1b"}}, [](S& s, bool on, Text) { s.interleaved = on; }},
      {{{"overlap paths", "all overlap", "any overlap"}},
       [](S& s, bool on, Text) {
         s.overlap_gradients = s.overlap_tensor_parallel = s.overlap_messages = on;
         s.nothing_overlaps = !on;
       }},
      {{{"async tp", "asynctp", "async tensor parallel", "tp comm overlap"}},
       [](S& s, bool on, Text) { s.overlap_tensor_parallel = on; }},
      {{{"tp", "tensor parallel", "userbuffers", "user buffers"}, overlap},
       [](S& s, bool on, Text) { s.overlap_tensor_parallel = on; }},
      {{{"ep", "moe", "a2a", "expert", "experts"}, overlap},
       [](S& s, bool on, Text) { s.overlap_experts = on; }},
      {{{"p2p", "pipeline", "pp"}, overlap}, [](S& s, bool on, Text) { s.overlap_messages = on; }},
      {{{"bucketing", "overlap comm"}}, [](S& s, bool on, Text) { s.overlap_gradients = on; }},
      {{{"grad", "grads", "gradient", "gradients", "dp", "data parallel", "ddp"}, overlap},
       [](S& s, bool on, Text) { s.overlap_gradients = on; }},
      {{{"deepep", "hybridep", "deep ep", "hybrid ep"}},
       [](S& s, bool on, Text) { s.rows_once = on; }},
      {{{"dispatcher", "dispatcher type"}, {"flex"}},
       [](S& s, bool on, Text) { s.rows_once = on; }},
      {{{"dispatcher", "dispatcher type"}, {"alltoall", "all to all", "a2a", "allgather"}},
       [](S& s, bool, Text) { s.rows_once = false; }},
      {{{"tokendrop", "token drop", "token dropping", "drop and pad",
         "moe pad expert input to capacity", "pad to capacity"}},
       [](S& s, bool on, Text) { s.padded_capacity = on; }},
      {{{"torch.compile", "compile", "compile.enable", "compiled", "inductor", "torchinductor"}},
       [](S& s, bool on, Text) { s.compiled = on; }},
      {{{"eager", "eager mode"}}, [](S& s, bool on, Text) { s.compiled = !on; }},
      {{{"dropless", "token dropless"}}, [](S& s, bool on, Text) { s.padded_capacity = !on; }},
      {{graphs, {"moe router", "moe preprocess"}},
       [](S& s, bool on, Text) { s.graphs = on, s.graphs_of = "beside experts"; }},
      {{graphs, {"attn", "attention"}},
       [](S& s, bool on, Text) { s.graphs = on, s.graphs_of = "attention"; }},
      {{graphs, {"mlp"}}, [](S& s, bool on, Text) { s.graphs = on, s.graphs_of = "mlp"; }},
      {{graphs}, [](S& s, bool on, Text) { s.graphs = on; }},
      {{{"ce fusion", "cross entropy fusion", "cross entropy loss fusion", "fused cross entropy",
         "fused loss"}},
       [](S& s, bool on, Text) { s.fused_loss = on; }},
      {{{"untied", "untie embeddings"}}, [](S& s, bool on, Text) { s.tied = !on; }},
      {{{"tied embeddings", "tie embeddings", "tie word embeddings"}},
       [](S& s, bool on, Text) { s.tied = on; }},
      {{{"lora", "peft"}}, [](S& s, bool on, Text) { s.lora = on; }},
      {{{"cpu offloading num layers"}},
       [](S& s, bool on, Text c) {
         s.offload_activations = on;
         const auto at = std::min(c.find_first_of("0123456789"), c.size());
         s.offload_blocks = static_cast<std::int64_t>(number(c.substr(at)).value_or(0));
       }},
      {{{"cpu offloading"}}, [](S& s, bool on, Text) { s.offload_activations = on; }},
      {{{"activation", "activations"}, {"offload", "offloading", "offloaded"}},
       [](S& s, bool on, Text c) {
         s.offload_activations = on;
         s.offload_blocks = layers_of(c);
       }},
      {{{"optimizer", "adam"}, {"offload", "offloading", "offloaded"}},
       [](S& s, bool on, Text) { s.offload_optimizer = on; }},
      {{{"mixed precision"}, {"pure"}}, [](S& s, bool, Text) { s.fp32_gradients = false; }},
      {{{"grad reduce in fp32", "accumulate allreduce grads in fp32"}},
       [](S& s, bool on, Text) { s.fp32_gradients = on; }},
      {{{"mixed precision"}, {"default"}}, [](S&, bool, Text) {}},
      {{{"gpipe", "afab", "all forward all backward"}},
       [](S& s, bool on, Text) { s.schedule = on ? "gpipe" : ""; }},
      {{{"zero bubble", "zb h1", "zbh1"}},
       [](S& s, bool on, Text) { s.schedule = on ? "zb-h1" : ""; }},
      {{{"dualpipe"}}, [](S& s, bool on, Text) { s.schedule = on ? "dualpipe" : ""; }},
      {{{"cp type", "cp comm type", "context parallel", "cp", "ulysses"},
        {"a2a", "all to all", "alltoall", "ulysses"}},
       [](S& s, bool, Text) { s.context = "all_to_all"; }},
      {{{"cp type", "cp comm type", "context parallel", "cp", "ring attention"},
        {"p2p", "ring", "ring attention"}},
       [](S& s, bool, Text) { s.context = "ring"; }},
      {{{"cp type", "cp comm type", "context parallel", "cp"}, {"all gather", "allgather"}},
       [](S& s, bool, Text) { s.context = "all_gather"; }},
      {{{"context parallel size"}},
       [](S& s, bool, Text c) {
         const auto at = std::min(c.find_first_of("0123456789"), c.size());
         s.context_parallel = c.substr(at, c.find_first_not_of("0123456789", at) - at);
       }},
      // Megatron-FSDP's strategies, as ZeRO's stages.
      {{{"megatron fsdp"}, {"optim grads params"}},
       [](S& s, bool, Text) { s.sharding = "ZeRO-3"; }},
      {{{"megatron fsdp"}, {"optim grads"}}, [](S& s, bool, Text) { s.sharding = "ZeRO-2"; }},
      {{{"megatron fsdp"}, {"optim"}}, [](S& s, bool, Text) { s.sharding = "ZeRO-1"; }},
      // Of products; gathers, sums and states have settings of their own.
      {{{"float8", "fp8"},
        {"tensorwise", "rowwise", "training", "delayed", "current scaling", "linear", "gemm"}},
       [](S& s, bool on, Text) { s.precision = on ? "fp8" : ""; }},
      // Read elsewhere, or what is so anyway.
      {{{"accumulation", "1f1b", "batch size"}}, [](S&, bool, Text) {}},
  };
  return all;
}

bool read(std::string_view clause, Settings& s) {
  const bool on = !is_off(clause);
  // A column of its own, as that would say it.
  for (const std::string_view again : {"recompute", "recomputation", "selective recompute",
                                       "full recompute", "no recompute", "activation recompute"}) {
    if (clause.rfind(again, 0) != 0) continue;
    s.recompute = std::string(clause);
    return true;
  }
  if (clause == "float8" || clause == "fp8" || clause == "no float8" || clause == "no fp8") {
    s.precision = on ? "fp8" : "";
    return true;
  }
  if (clause.rfind("recipe ", 0) == 0) return true;
  if (clause == "no overlap" || clause == "overlap off") return read("overlap paths off", s);
  // What it is about stands before its brackets, which are clauses of their own.
  const std::string_view subject = clause.substr(0, clause.find_first_of("(["));
  for (const Rule& rule : rules()) {
    const bool is = std::all_of(rule.words.begin(), rule.words.end(), [&](const auto& words) {
      const std::string_view where = &words == &rule.words.front() ? subject : clause;
      return std::any_of(words.begin(), words.end(),
                         [&](std::string_view word) { return has_word(where, word); });
    });
    if (!is) continue;
    rule.set(s, on, clause);
    return true;
  }
  return false;
}

}  // namespace

Settings settings_of(std::string_view text) {
  Settings s;
  const CommandLine line = command_line(text);
  for (const Clause& clause : clauses_of(line.words)) {
    if (!read(plain_clause(clause.text), s) && !clause.in_brackets) s.unread.push_back(clause.text);
  }
  for (const Flag& flag : line.flags) {
    if (is_read_elsewhere(flag)) continue;
    if (!read(plain_clause(flag.name + "=" + flag.value), s)) s.unread.push_back(flag.written);
  }
  return s;
}

}  // namespace partita::validation
