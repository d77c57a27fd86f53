#include "tests/runtime/pytorch/script.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace partita::pytorch {
namespace {

std::string output_of(const std::string& command, int& code) {
  std::FILE* pipe = ::popen((command + " 2>&1").c_str(), "r");
  std::string all;
  std::array<char, 4096> piece{};
  while (const std::size_t n = std::fread(piece.data(), 1, piece.size(), pipe))
    all.append(piece.data(), n);
  code = ::pclose(pipe);
  return all;
}

Interpreter find_interpreter() {
  const char* wish = std::getenv("PARTITA_PYTORCH");
  std::vector<std::string> candidates{PARTITA_PYTORCH_CACHE "/bin/python", "/usr/bin/python3"};
  if (wish != nullptr) candidates = {wish};
  Interpreter found;
  for (const std::string& python : candidates) {
    int code = 0;
    const std::string version =
        output_of("'" + python + "' -c 'import torch; print(torch.__version__)'", code);
    if (code != 0 || std::sscanf(version.c_str(), "%d.%d", &found.major, &found.minor) != 2)
      continue;
    found.python = python;
    found.version = version.substr(0, version.find_first_of(" \n"));
    return found;
  }
  found.missing = fmt::format(
      "no torch in {}; install python3-torch, or set PARTITA_PYTORCH to a Python that has it",
      fmt::join(candidates, " or "));
  return found;
}

Json window(const Window& w) {
  return {{"kernel", w.kernel},
          {"stride", w.stride},
          {"before", w.pad_before},
          {"after", w.pad_after},
          {"dilation", w.dilation}};
}
const char* name_of(ActivationKind k) {
  constexpr std::array names{"relu", "squared_relu", "gelu", "gelu_tanh",
                             "silu", "sigmoid",      "tanh"};
  return names.at(static_cast<std::size_t>(k));
}

struct Describe {
  Json operator()(const Linear& o) { return {{"contracted", o.contracted}, {"bias", o.bias}}; }
  Json operator()(const Normalize& o) {
    constexpr std::array kinds{"layer", "rms", "batch", "local"};
    return {{"kind", kinds.at(static_cast<std::size_t>(o.kind))},
            {"epsilon", o.epsilon},
            {"scale", o.scale},
            {"bias", o.bias},
            {"group", o.group},
            {"window", o.window},
            {"alpha", o.alpha},
            {"beta", o.beta},
            {"offset", o.offset}};
  }
  Json operator()(const Activation& o) { return {{"kind", name_of(o.kind)}}; }
  Json operator()(const GatedActivation& o) { return {{"kind", name_of(o.kind)}}; }
  /// As it is drawn: of 16 bits.
  Json operator()(const Dropout& o) {
    return {{"probability", std::round(o.probability * 0x1p16) * 0x1p-16}};
  }
  Json operator()(const Rotary& o) {
    return {{"head_dim", o.head_dim}, {"rotated", o.rotated}, {"base", o.base}};
  }
  Json operator()(const Attention& o) {
    return {{"queries_per_head", o.queries_per_head},
            {"qk_dim", o.qk_dim},
            {"v_dim", o.v_dim},
            {"scale", o.scale},
            {"causal", o.causal},
            {"window", o.window},
            {"sinks", o.sinks}};
  }
  Json operator()(const Convolution& o) {
    return {{"height", window(o.height)},
            {"width", window(o.width)},
            {"groups", o.groups},
            {"bias", o.bias}};
  }
  Json operator()(const Pool& o) {
    return {{"maximum", o.maximum},
            {"height", window(o.height)},
            {"width", window(o.width)},
            {"count_padding", o.count_padding}};
  }
  Json operator()(const SelectToken& o) { return {{"index", o.index}}; }
  Json operator()(const Concat& o) { return {{"last", o.last}}; }
  Json operator()(const Router& o) {
    return {{"top_k", o.top_k},          {"sigmoid", o.sigmoid}, {"normalise", o.normalise},
            {"scale", o.scale},          {"groups", o.groups},   {"top_groups", o.top_groups},
            {"group_best", o.group_best}};
  }
  Json operator()(const Dispatch& o) { return {{"experts", o.experts}}; }
  Json operator()(const GroupedProduct& o) { return {{"bias", o.bias}}; }
  Json operator()(const CausalConvolution& o) { return {{"kernel", o.kernel}, {"bias", o.bias}}; }
  Json operator()(const StateSpace& o) {
    return {{"heads_per_group", o.heads_per_group}, {"head_dim", o.head_dim}, {"state", o.state}};
  }
  Json operator()(const GatedNorm& o) { return {{"epsilon", o.epsilon}}; }
  template <class Other>
  Json operator()(const Other&) {
    return Json::object();
  }
};

/// `line` and what it was measured with, below `header` if the file is new.
void append(const std::string& name, const std::string& header, const std::string& line) {
  const char* folder = std::getenv("PARTITA_PYTORCH_RESULTS");
  if (folder == nullptr) return;
  const auto file = std::filesystem::path(folder) / name;
  const bool fresh = !std::filesystem::exists(file);
  std::ofstream out(file, std::ios::app);
  if (fresh) out << header << ",torch,date\n";
  const std::time_t now = std::time(nullptr);
  std::array<char, 16> date{};
  std::strftime(date.data(), date.size(), "%Y-%m-%d", std::gmtime(&now));
  out << line << ',' << interpreter().version << ',' << date.data() << '\n';
}

}  // namespace

const Interpreter& interpreter() {
  static const Interpreter found = find_interpreter();
  return found;
}

Json describe(const Operation& op) {
  Json o = std::visit(Describe{}, op);
  o["op"] = kind_name(op);
  return o;
}

std::vector<std::int64_t> extents(const Shape& shape) {
  std::vector<std::int64_t> all;
  for (const auto& d : shape) all.push_back(d.extent);
  return all;
}

Json operators_of(const Graph& g) {
  Json list = Json::array();
  for (const Operator& op : g.operators) {
    Json o = describe(op.operation);
    o["inputs"] = Json::array();
    o["parameters"] = Json::array();
    for (const TensorId t : op.inputs) o["inputs"].push_back(t.value);
    for (const ParameterId q : op.parameters) o["parameters"].push_back(q.value);
    o["output"] = op.outputs[0].value;
    list.push_back(std::move(o));
  }
  return list;
}

std::string ask(const std::string& script, const Json& request) {
  static int number = 0;
  const auto file = std::filesystem::temp_directory_path() /
                    fmt::format("partita-pytorch-{}-{}.json", ::getpid(), number++);
  std::ofstream(file) << request.dump();
  int code = 0;
  std::string said = output_of(fmt::format("'{}' '{}/{}' '{}'", interpreter().python,
                                           PARTITA_PYTORCH_SCRIPTS, script, file.string()),
                               code);
  std::filesystem::remove(file);
  if (code != 0) throw std::runtime_error(script + " failed: " + said);
  return said;
}

void record_operator(const std::string& kind, const std::string& pass, const std::string& precision,
                     int results, double difference, double bound) {
  append(
      "operators.csv", "operator,pass,precision,results,difference,bound",
      fmt::format("{},{},{},{},{:.3g},{:.3g}", kind, pass, precision, results, difference, bound));
}
void record_network(const std::string& test, const std::string& item, double difference,
                    double bound) {
  append("networks.csv", "test,network,difference,bound",
         fmt::format("\"{}\",\"{}\",{:.3g},{:.3g}", test, item, difference, bound));
}
void record_times(const std::string& network, int ranks, const std::string& whose,
                  std::size_t steps, double median_s, double low_s, double high_s) {
  append("steps.csv", "network,ranks,whose,steps,median_ms,quartile_1_ms,quartile_3_ms",
         fmt::format("{},{},{},{},{:.3f},{:.3f},{:.3f}", network, ranks, whose, steps,
                     1e3 * median_s, 1e3 * low_s, 1e3 * high_s));
}

}  // namespace partita::pytorch
