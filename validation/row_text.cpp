#include "validation/row_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <regex>
#include <utility>

namespace partita::validation {
namespace {

bool digit(char c) { return c >= '0' && c <= '9'; }
bool letter(char c) { return c >= 'a' && c <= 'z'; }

bool has(std::string_view text, std::string_view word) {
  return text.find(word) != std::string_view::npos;
}

/// The number whose last digit is text[end - 1]; empty without one. `start` becomes its first.
std::optional<double> number_before(std::string_view text, std::size_t end, std::size_t& start) {
  start = end;
  while (start > 0 && (digit(text[start - 1]) || text[start - 1] == '.')) --start;
  return number(text.substr(start, end - start));
}

struct Rate {
  double bytes = 0;
  std::size_t start = 0, end = 0;
  bool counted = false;  ///< "8 x 200 Gb/s"
};

/// Every rate of the text with its factor "N x" in front, which other words may follow.
std::vector<Rate> rates_of(std::string_view s) {
  struct Unit {
    std::string_view text;
    double bytes;
  };
  // Case decides between bits and bytes.
  constexpr std::array kUnits{
      Unit{"Gb/s", 1e9 / 8},   Unit{"Gbps", 1e9 / 8},  Unit{"Gbit/s", 1e9 / 8},
      Unit{"Gb/sec", 1e9 / 8}, Unit{"GB/s", 1e9},      Unit{"GBps", 1e9},
      Unit{"Tb/s", 1e12 / 8},  Unit{"Tbps", 1e12 / 8}, Unit{"TB/s", 1e12},
      Unit{"MB/s", 1e6},       Unit{"Mb/s", 1e6 / 8},  Unit{"Gbit", 1e9 / 8},
      Unit{"GbE", 1e9 / 8},    Unit{"G", 1e9 / 8}};
  std::vector<Rate> all;
  std::size_t after = 0;  // behind the last rate
  for (std::size_t i = 0; i < s.size(); ++i) {
    if (!digit(s[i]) || (i > 0 && (digit(s[i - 1]) || s[i - 1] == '.'))) continue;
    std::size_t end = i;
    while (end < s.size() && (digit(s[end]) || s[end] == '.')) ++end;
    const auto value = number(s.substr(i, end - i));
    std::size_t unit = end;
    while (unit < s.size() && s[unit] == ' ') ++unit;
    const Unit* found = nullptr;
    for (const Unit& u : kUnits) {
      if (s.substr(unit, u.text.size()) != u.text) continue;
      // "8x400G IB", but no "80GB".
      if (u.text == "G" && (unit != end || (unit + 1 < s.size() && letter(s[unit + 1])))) continue;
      if (found == nullptr || u.text.size() > found->text.size()) found = &u;
    }
    if (!value || found == nullptr) continue;
    Rate r{*value * found->bytes, i, unit + found->text.size()};
    // "8x200", "4x Omni-Path 100", "32 x 100": the last count since the rate before.
    for (std::size_t x = i; x-- > after;) {
      if (s[x] != 'x') continue;
      std::size_t n = x, start = 0;
      while (n > after && s[n - 1] == ' ') --n;
      // "8 NICs x 400".
      const std::string before = lower(s.substr(after, n - after));
      for (const std::string_view word : {"nics", "nic", "hcas", "cards", "ports", "rails"}) {
        if (before.size() < word.size() ||
            before.compare(before.size() - word.size(), word.size(), word) != 0)
          continue;
        n -= word.size();
        while (n > after && s[n - 1] == ' ') --n;
        break;
      }
      const auto count = number_before(s, n, start);
      if (!count || *count < 1 || (x + 1 < s.size() && letter(s[x + 1]))) continue;
      r.bytes *= *count, r.counted = true;
      break;
    }
    // "400 Gb/s x 8".
    std::size_t x = r.end;
    while (x < s.size() && s[x] == ' ') ++x;
    if (x < s.size() && s[x] == 'x') {
      std::size_t first = x + 1;
      while (first < s.size() && s[first] == ' ') ++first;
      std::size_t last = first;
      while (last < s.size() && digit(s[last])) ++last;
      const auto count = number(s.substr(first, last - first));
      // A rate may begin there: "8x400".
      std::size_t next = last;
      while (next < s.size() && s[next] == ' ') ++next;
      const bool rate = std::any_of(kUnits.begin(), kUnits.end(), [&](const Unit& u) {
        return s.substr(next, u.text.size()) == u.text;
      });
      if (count && *count >= 1 && !rate) r.bytes *= *count, r.end = last, r.counted = true;
    }
    after = r.end;
    all.push_back(r);
    i = r.end - 1;
  }
  return all;
}

}  // namespace

bool has_word(std::string_view text, std::string_view word) {
  for (std::size_t at = text.find(word); at != std::string_view::npos;
       at = text.find(word, at + 1)) {
    const auto part = [&](std::size_t i) {
      return i < text.size() && (letter(text[i]) || digit(text[i]) || text[i] == '_');
    };
    if ((at == 0 || !part(at - 1)) && !part(at + word.size())) return true;
  }
  return false;
}

std::string lower(std::string_view text) {
  std::string s(text);
  for (char& c : s) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return s;
}

std::string plain_text(std::string_view text) {
  std::string s;
  int depth = 0;
  for (const char c : lower(text)) {
    if (c == '(' || c == '[') ++depth;
    if (depth == 0) {
      const bool space = c == ' ' || c == '\t' || c == '\n' || c == '\r';
      if (!space)
        s += c;
      else if (!s.empty() && s.back() != ' ')
        s += ' ';
    }
    if ((c == ')' || c == ']') && depth > 0) --depth;
  }
  while (!s.empty() && s.back() == ' ') s.pop_back();
  return s;
}

std::string squeezed(std::string_view text) {
  const std::string plain = plain_text(text);
  std::string s;
  for (std::size_t i = 0; i < plain.size(); ++i) {
    const char c = plain[i];
    const bool point = c == '.' && !s.empty() && digit(s.back()) && i + 1 < plain.size() &&
                       (digit(plain[i + 1]) || plain[i + 1] == 'x');
    if (letter(c) || digit(c) || point) s += c;
  }
  return s;
}

std::optional<double> number(std::string_view text) {
  double n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (text.empty() || error != std::errc{} || end != text.data() + text.size() ||
      !std::isfinite(n) || n < 0)
    return std::nullopt;
  return n;
}

namespace {

/// 8 of "8 HCAs per node", "(8 per node)" and "8 NICs of 200 Gb/s": how many a node has.
std::optional<double> cards_of_a_node(const std::string& text) {
  static const std::regex each(
      R"((?:^|[^\d.])(\d{1,2}) ?(?:nics?|hcas?|cards?|ports?|adapters?|rails?)? ?(?:per|/) ?(?:node|server|host))");
  static const std::regex of(
      R"((?:^|[^\d.])(\d{1,2}) (?:nics|hcas|cards|ports|adapters) (?:of|at|@) )");
  std::smatch found;
  if (!std::regex_search(text, found, each) && !std::regex_search(text, found, of))
    return std::nullopt;
  const auto n = number(found[1].str());
  return n && *n >= 1 ? n : std::nullopt;
}

}  // namespace

std::optional<NetworkRate> network_rate(std::string_view text) {
  if (const auto at = lower(text).rfind("inter:"); at != std::string::npos)
    text.remove_prefix(at + 6);
  // What stands in brackets says where the row's author knows it from, or of what the rate is.
  std::string s, bracket;
  int depth = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (text.substr(i, 2) == "\u00d7") c = 'x', ++i;  // "8×400"
    depth += c == '(' || c == '[' ? 1 : 0;
    (depth == 0 ? s : bracket) += c;
    if ((c == ')' || c == ']') && depth > 0 && --depth == 0) {
      const std::string l = lower(bracket);
      if (cards_of_a_node(l)) {
        s += bracket;
      } else if (has(l, "per gpu") || has(l, "per nic") || has(l, "per node"))
        s += " " +
             l.substr(l.find("per "), l.find_first_of(")],;", l.find("per ")) - l.find("per "));
      for (const char* other : {"storage", "management"})
        if (has(l, other)) s += std::string(" ") + other;
      bracket.clear();
    }
  }
  std::vector<std::string> clauses;
  for (std::size_t at = 0; at <= s.size();) {
    const std::size_t end = std::min(s.find_first_of(",;+", at), s.size());
    clauses.push_back(s.substr(at, end - at));
    at = end + 1;
  }
  const auto chosen = [&](const std::string& c) -> std::optional<NetworkRate> {
    const auto rates = rates_of(c);
    if (rates.empty()) return std::nullopt;
    const std::string l = lower(c);
    const auto gpu = std::min(l.find("per gpu"), l.find("/gpu"));
    const auto node = std::min(l.find("per node"), l.find("/node"));
    const auto card =
        std::min({l.find("per nic"), l.find("/nic"), l.find("per card"), l.find("per hca"),
                  l.find("/hca"), l.find("per port"), l.find("/port"), l.find("per adapter")});
    const std::size_t said = std::min({gpu, node, card});
    const Rate* r = &rates.front();
    for (const Rate& other : rates) {
      if (said != std::string::npos && other.end <= said) r = &other;
    }
    if (!r->counted && gpu == std::string::npos) {
      // "200 Gb/s HDR InfiniBand (8 per node)".
      if (const auto cards = cards_of_a_node(lower(s)))
        return NetworkRate{BytesPerSecond{r->bytes * *cards}, false, false, false};
    }
    // A card by its name is one of them, but where the text counts them.
    const bool alone = said == std::string::npos && !r->counted;
    const bool named = alone && (has(l, "connectx") || has(l, "cx-") || has(l, "cx7"));
    return NetworkRate{BytesPerSecond{r->bytes}, gpu < std::min(node, card),
                       named || card < std::min(node, gpu), alone && !named};
  };
  std::optional<NetworkRate> first;
  for (const std::string& c : clauses) {
    const std::string l = lower(c);
    if (has(l, "storage") || has(l, "management")) continue;
    if (has(l, "nvlink") || has(l, "nvswitch")) continue;  // inside a node
    const auto r = chosen(c);
    if (r && has(l, "compute")) return r;
    if (!first) first = r;
  }
  if (first) return first;
  // InfiniBand's generations, 4 lanes: "HDR InfiniBand", "ib ndr400".
  std::string words;
  for (const std::string& c : clauses)
    if (const std::string l = lower(c); !has(l, "storage") && !has(l, "management"))
      words += l + ";";
  struct Generation {
    std::string_view name;
    double gbps;
  };
  for (const auto& [name, gbps] :
       {Generation{"xdr", 800}, Generation{"ndr200", 200}, Generation{"ndr", 400},
        Generation{"hdr100", 100}, Generation{"hdr", 200}, Generation{"edr", 100},
        Generation{"fdr", 56}}) {
    for (auto at = words.find(name); at != std::string::npos; at = words.find(name, at + 1)) {
      const std::size_t end = at + name.size();
      if ((at > 0 && letter(words[at - 1])) || (end < words.size() && letter(words[end]))) continue;
      return NetworkRate{BytesPerSecond{gbps * 1e9 / 8}, false, true};
    }
  }
  return first;
}

std::optional<PrecisionText> precision_of(std::string_view text) {
  std::string whole = lower(text);
  // "bf16, no float8".
  for (const char* no : {"no f", "without f", "not f"})
    if (const auto at = whole.find(no); at != std::string::npos && at > 0) whole.resize(at);
  PrecisionText p;
  p.fp32_gradients = has(whole, "fp32 grad");
  // Brackets add to what stands before them; they speak where that says nothing.
  for (const std::string& s : {plain_text(whole), whole}) {
    if (has(s, "fp4"))
      p.name = "nvfp4";
    else if (has(s, "fp8") || has(s, "float8") || has(s, "e4m3") || has(s, "e5m2"))
      p.name = has(s, "mx") ? "mxfp8" : "fp8", p.fp32_beside = s.rfind("fp32 + ", 0) == 0;
    else if (has(s, "bf16") || has(s, "bfloat16"))
      p.name = "bf16";
    else if (has(s, "fp16") || has(s, "float16") || has(s, "half") || has_word(s, "amp") ||
             has_word(s, "f16") || has(s, "mixed precision") || has(s, "mixed-precision"))
      p.name = "fp16";
    else if (has(s, "tf32"))
      p.name = "tf32";
    else if (has(s, "fp32") || has(s, "float32"))
      p.name = "fp32";
    else
      continue;
    return p;
  }
  return std::nullopt;
}

std::optional<std::string> recompute_of(std::string_view text) {
  const std::string s = lower(text);
  const std::string plain = plain_text(text);
  const auto begins = [&](std::string_view word) { return plain.rfind(word, 0) == 0; };
  if (begins("none") || (begins("off") && !begins("offload")) || begins("no ") ||
      begins("without") || plain == "no" || plain == "false" || plain == "disabled" ||
      has(plain, "checkpointing off") || has(plain, "no recompute") ||
      has(plain, "recompute off") || plain == "sequence parallelism")
    return "none";
  // "activation checkpointing: no", "AC=False", "recompute none", "w/o activation checkpointing".
  static const std::regex off(R"((^|[ :=])(no|none|off|false|disabled)$|[:=] ?(n|0)$)");
  if (begins("w/o ") || begins("not ") || std::regex_search(plain, off)) return "none";
  // Which blocks of the network: recomputed_blocks() says it or nobody.
  if ((has(s, "full") && has(s, "selective") && !has(s, "granularity")) || has_word(s, "only") ||
      has_word(s, "stage") || has_word(s, "first"))
    return std::nullopt;
  if (has(s, "full") || plain == "on" || plain == "yes" || plain == "true" ||
      (!has(s, "selective") &&
       (has(s, "activation checkpointing") || has(s, "gradient checkpointing"))))
    return "full";
  // Megatron-Core's CheckpointWithoutOutput forgets results: norms, experts' activations, MLA's
  // projections up (transformer/transformer_layer.py, moe/experts.py, multi_latent_attention.py).
  std::string patterns;
  const auto add = [&](std::string_view p) {
    if (!has(patterns, p)) patterns += fmt::format("{}{}", patterns.empty() ? "" : ",", p);
  };
  const bool attention =
      has(s, "core_attn") || has(s, "attention core") || has(s, "core attention");
  if (has(s, "layernorm") || has(s, "rmsnorm")) add("~*attention_norm"), add("~*mlp_norm");
  if (has(s, "moe_act")) add("~*moe.activation");
  if (has_word(s, "mlp")) add("*.mlp.*");
  if (has_word(s, "moe")) add("*.moe.*");
  if (has(s, "shared_expert") || has(s, "shared expert"))
    add("*.moe.shared.gate"), add("*.moe.shared.up"), add("*.moe.shared.activation");
  if (has(s, "mla_up_proj") || has(s, "mla up") || has(s, "mla_up"))
    add("~*attention.query_up"), add("~*attention.key_up"), add("~*attention.value_up");
  if (!patterns.empty()) {
    if (attention) add("*attention.core");
    return patterns;
  }
  if (!attention && !has(plain, "selective") && !has_word(plain, "sac")) return std::nullopt;
  return attention || has(s, "core") || has(s, "attn") || has(s, "attention") ? "attention"
                                                                              : "selective";
}

std::optional<RecomputedBlocks> recomputed_blocks(std::string_view text) {
  const std::string s = lower(text);
  std::smatch found;
  // torchtitan's selective_ac_option and llm-foundry's and others' words.
  static const std::regex every(R"((?:every|option|layer)[ =:]*(\d{1,3})(?![\d.]))");
  if (has(s, "every other") || has(s, "every second")) return RecomputedBlocks{2, 0};
  if (!has(s, "block") && std::regex_search(s, found, every)) {
    const std::int64_t n = std::stol(found[1]);
    if (n > 1) return RecomputedBlocks{n, 0};
  }
  // "4 of 32 layers": of the whole network.
  static const std::regex of_all(
      R"((\d{1,3}) (?:of|out of) (?:the )?\d{1,3} (?:layer|block)|first (\d{1,3}) (?:layer|block))");
  if (!has(s, "selective") && std::regex_search(s, found, of_all)) {
    const std::int64_t n = std::stol(found[found[1].matched ? 1 : 2]);
    if (n > 0) return RecomputedBlocks{1, 0, n};
  }
  // Megatron's recompute_method block and recompute_num_layers; uniform cuts all blocks.
  static const std::regex first(
      R"((?:block|num[_ -]layers|recompute[_ -]layers)[^\d]{0,24}(\d{1,3})(?!\d)|(\d{1,3}) ?(?:layers|blocks))");
  if (has(s, "block") && !has(s, "uniform") && std::regex_search(s, found, first)) {
    const std::int64_t n = std::stol(found[found[1].matched ? 1 : 2]);
    if (n > 0) return RecomputedBlocks{1, n};
  }
  return std::nullopt;
}

std::optional<ShardingText> sharding_of(std::string_view text) {
  const std::string s = lower(text);
  ShardingText z;
  // Of DeepSpeed ZeRO-Infinity and of FSDP CPU offloading take the parameters too; ZeRO's the
  // optimizer.
  const bool infinity = has(s, "infinity"), fsdp = has(s, "fsdp");
  const bool offload = has(s, "offload") && !has(s, "no offload") && !has(s, "without offload");
  z.offload_parameters =
      infinity || (offload && (has(s, "param offload") || has(s, "full offload") ||
                               has(s, "parameter offload") || has(s, "offload param") || fsdp));
  z.offload_optimizer =
      infinity || (offload && (!z.offload_parameters || fsdp || has(s, "full offload") ||
                               has(s, "opt offload") || has(s, "optimizer offload") ||
                               has(s, "offload optimizer")));
  const auto number_after = [&](std::string_view word) -> std::optional<double> {
    const auto at = s.find(word);
    if (at == std::string::npos) return std::nullopt;
    std::size_t end = at + word.size();
    while (end < s.size() && digit(s[end])) ++end;
    return number(std::string_view(s).substr(at + word.size(), end - at - word.size()));
  };
  const auto group = number_after("dp_shard=") ? number_after("dp_shard=") : number_after("group=");
  const auto ways = number_after("fsdp=");
  if (group) z.group = static_cast<std::int64_t>(*group);
  if (ways && *ways > 0 && !has(s, "ddp (")) z.group = static_cast<std::int64_t>(*ways);
  if (s.rfind("ddp", 0) == 0 || s == "data parallel") {
    z.group = 0;
    return z;
  }
  static const std::regex denied(
      R"(\b(no|not|without|w/o|disable)[ _-]*(zero\b|shard|distributed[ _-]optimizer|fsdp|state)|(zero|fsdp|optimizer|sharding)[ :=]+(off|false|no|none|disabled|0)$)");
  if (has(s, "no_shard") || (std::regex_search(s, denied) && !has(s, "no reshard"))) {
    z.zero = 0;
    return z;
  }
  z.hybrid = has(s, "hsdp") || has(s, "hybrid");
  if (has(s, "shard_grad_op") || has(s, "no reshard") || has(s, "hybrid_shard_zero2") ||
      has(s, "reshard_after_forward=false")) {
    z.zero = 3;
    z.reshard = false;
    return z;
  }
  // "ZeRO-2", "zero stage=3", "Stage 1+2": the last is all of them.
  static const std::regex stage(
      R"((?:zero|stage)[ _=-]*(?:stage)?[ _=-]*([0-3])(?:[+/&]([0-3]))?(?!\d))");
  if (std::smatch found; std::regex_search(s, found, stage)) {
    z.zero = std::stoi(found[found[2].matched ? 2 : 1]);
    return z;
  }
  if (s == "1" || s == "2" || s == "3" || has(s, "zero++")) {  // ZeRO++ is of stage 3
    z.zero = s.size() == 1 ? s[0] - '0' : 3;
    return z;
  }
  if (infinity || has(s, "zero-offload") || has(s, "zero offload")) {
    z.zero = infinity ? 3 : 2;
    return z;
  }
  if (z.hybrid || has(s, "fsdp") || has(s, "full_shard") || has(s, "fully_shard") ||
      has(s, "optim_grads_params")) {
    z.zero = 3;
    return z;
  }
  if (has(s, "distributed optimizer") || has(s, "distributed_optimizer") ||
      has(s, "distributed-optimizer")) {
    z.zero = 1;
    return z;
  }
  if (has(s, "zero")) return z;  // some stage
  if (s == "none" || s == "off" || s == "no" || s == "false" || s == "0") {
    z.zero = 0;
    return z;
  }
  return std::nullopt;
}

std::optional<bool> switch_of(std::string_view text) {
  const std::string s = plain_text(text);
  const std::string word = s.substr(0, s.find(' '));
  for (const char* on : {"on", "true", "yes", "enabled", "1"})
    if (word == on) return true;
  for (const char* off : {"off", "false", "no", "none", "disabled", "0"})
    if (word == off) return false;
  return std::nullopt;
}

std::optional<double> gigabytes(std::string_view text) {
  const std::string s = lower(text);
  for (std::size_t i = 0; i < s.size(); ++i) {
    if (!digit(s[i]) || (i > 0 && letter(s[i - 1]))) continue;
    std::size_t end = i;
    while (end < s.size() && digit(s[end])) ++end;
    const std::size_t unit = std::min(s.find_first_not_of(" -", end), s.size());
    const std::string_view rest = std::string_view(s).substr(unit);
    if (rest.rfind("gb", 0) == 0 || rest.rfind("gib", 0) == 0 ||
        (rest.rfind('g', 0) == 0 && (rest.size() == 1 || !letter(rest[1]))))
      return number(std::string_view(s).substr(i, end - i));
    i = end;
  }
  return std::nullopt;
}

std::optional<double> billions_of(std::string_view name) {
  const std::string s = lower(name);
  for (const auto& [unit, each] : {std::pair{'b', 1.0}, std::pair{'m', 1e-3}}) {
    for (std::size_t b = 1; b < s.size(); ++b) {
      // "7b1" is 7.1 billion.
      const bool tenths = b + 1 < s.size() && digit(s[b + 1]) &&
                          (b + 2 >= s.size() || !(letter(s[b + 2]) || digit(s[b + 2])));
      if (s[b] != unit || (!tenths && b + 1 < s.size() && (letter(s[b + 1]) || digit(s[b + 1]))))
        continue;
      std::size_t start = b;
      auto n = number_before(s, b, start);
      if (n && tenths) n = *n + 0.1 * (s[b + 1] - '0');
      if (n && *n > 0 && (start == 0 || !letter(s[start - 1]))) return *n * each;
    }
  }
  return std::nullopt;
}

bool names_experts(std::string_view name) {
  const std::string s = lower(name);
  for (std::size_t i = 1; i < s.size(); ++i) {
    if (!digit(s[i]) || digit(s[i - 1])) continue;
    std::size_t end = i;
    while (end < s.size() &&
           (digit(s[end]) || (s[end] == '.' && end + 1 < s.size() && digit(s[end + 1]))))
      ++end;
    if (end == s.size() || (end + 1 < s.size() && letter(s[end + 1]))) continue;
    const char before = s[i - 1];
    const bool active = before == 'a' && (i == 1 || !letter(s[i - 2])),
               times = before == 'x' && i > 1 && digit(s[i - 2]);
    if (s[end] == 'b' && (active || times)) return true;
    if (s[end] == 'e' && (before == 'x' || before == '-' || before == ' ')) return true;
  }
  return false;
}

std::optional<int> flash_version_of(const std::string& kernel) {
  static const std::regex version(
      R"((?:^|[^a-z])(?:fa|flash)[^0-9,;/()]{0,12}?([1-4])(?:\.|[^0-9]|$))");
  if (std::smatch found; std::regex_search(kernel, found, version))
    return found[1] == "1" ? 1 : found[1] == "2" ? 2 : 0;
  if (has(kernel, "cudnn")) return 0;
  return std::nullopt;
}

std::optional<MemoryQuantity> memory_quantity(std::string_view text) {
  using What = MemoryQuantity::What;
  using Who = MemoryQuantity::Who;
  const std::string s = lower(text);
  MemoryQuantity q;
  if (s.rfind("oom", 0) == 0 || has(s, "does not fit")) {
    q.what = What::fits;
    return q;
  }
  if (has(s, "_ms") || has_word(s, "time") || has_word(s, "moe layer")) return std::nullopt;
  if (has(s, "logging rank")) q.who = Who::logging;
  if (const auto at = s.find("on rank "); at != std::string::npos) {
    std::size_t end = at + 8;
    while (end < s.size() && digit(s[end])) ++end;
    if (const auto n = number(std::string_view(s).substr(at + 8, end - at - 8))) {
      q.who = Who::rank;
      q.rank = static_cast<int>(*n);
    }
  }
  static const std::regex first_stage(R"(first (pipeline )?(stage|rank))"),
      last_stage(R"(last (pipeline )?(stage|rank))");
  if (std::regex_search(s, first_stage)) q.who = Who::first;
  if (std::regex_search(s, last_stage)) q.who = Who::last;
  if (has(s, "activation")) {
    q.what = has(s, "% of")                               ? What::activations_ratio
             : has(s, "per layer") || has(s, "per block") ? What::activations_layer
                                                          : What::activations;
    return q;
  }
  const bool optimizer = has(s, "optimizer") || has(s, "adam") || has(s, "moments"),
             gradients = has(s, "grad"), parameters = has(s, "weights") || has(s, "parameter");
  // Megatron's log: mem-allocated-bytes is what is there between steps.
  if ((optimizer && has(s, "allocated")) || s == "mem-allocated-bytes") {
    q.what = What::after_step;
    return q;
  }
  // "optimizer states", "gradient memory", "parameters + gradients"; "model states" are all.
  const auto only = [&] {
    q.what = What::state;
    if (!has(s, "model state"))
      q.parameters = parameters, q.gradients = gradients, q.optimizer = optimizer;
    return q;
  };
  if (optimizer) return only();
  // The first of the words counts: others compare with it.
  struct Word {
    std::string_view word;
    What what;
  };
  std::size_t best = std::string::npos;
  for (const auto& [word, what] :
       {Word{"allocated", What::allocated}, Word{"reserved", What::reserved},
        Word{"cached", What::reserved}, Word{"nvidia-smi", What::device}}) {
    if (const auto at = s.find(word); at < best) best = at, q.what = what;
  }
  if (best < std::string::npos) {
    // "memory allocated (nvidia-smi)".
    if (q.what == What::allocated && has(s, "(nvidia-smi")) q.what = What::device;
    return q;
  }
  if (has(s, "model state") || parameters || gradients) return only();
  q.what = What::printed;
  for (const std::string_view word : {"printed", "peak", "memory", "gb", "gib", "vram", "usage"})
    if (has(s, word)) return q;
  return std::nullopt;
}

std::optional<std::int64_t> accumulation_of(std::string_view text) {
  // "grad accumulation=4", "gradient accumulation steps: 4", "gradient_accumulation_steps 4".
  static const std::regex word(R"(accumulation(?:[ _-]steps)? ?[:=]? ?(\d{1,9})(?![\d.]))");
  const std::string s = lower(text);
  std::smatch found;
  if (!std::regex_search(s, found, word)) return std::nullopt;
  const std::int64_t n = std::stol(found[1]);
  return n > 0 ? std::optional(n) : std::nullopt;
}

std::optional<FlopFormula> flop_formula(std::string_view text) {
  std::string s = lower(text);
  s.erase(std::remove_if(s.begin(), s.end(), [](char c) { return c == ' ' || c == '*'; }), s.end());
  if (has(s, "96bsl") || has(s, "96blsh") || has(s, "4xforward")) return FlopFormula::hardware_4x;
  if (has(s, "72blsh") || has(s, "72bsl") || has(s, "megatron") || has(s, "modelflops"))
    return FlopFormula::model_3x;
  if (has(s, "12l") || has(s, "palm")) return FlopFormula::six_n;
  if (has(s, "6n")) return FlopFormula::six_n_alone;
  if (has(s, "8n") || has(s, "size_b42")) return FlopFormula::eight_n;
  return std::nullopt;
}

}  // namespace partita::validation
