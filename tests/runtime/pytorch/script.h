// tests/runtime/pytorch/script.h: a Python that has PyTorch, what operators are called there, and
// how the scripts beside this file are asked.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "models/graph.h"

namespace partita::pytorch {

using Json = nlohmann::json;

/// The first interpreter that can import torch: PARTITA_PYTORCH names the only one to try; else
/// .cache/pytorch in the source folder, then /usr/bin/python3.
struct Interpreter {
  std::string python;   ///< empty: none
  std::string missing;  ///< why a test must be skipped
  std::string version;  ///< of torch
  int major = 0, minor = 0;
  explicit operator bool() const { return !python.empty(); }
  bool at_least(int wanted_major, int wanted_minor) const {
    return major != wanted_major ? major > wanted_major : minor >= wanted_minor;
  }
};
const Interpreter& interpreter();

/// An operator's options, as the scripts read them; "op" is its kind.
Json describe(const Operation& op);
Json operators_of(const Graph& graph);
std::vector<std::int64_t> extents(const Shape& shape);

/// What `script` prints about the request; throws std::runtime_error with its output when it fails.
std::string ask(const std::string& script, const Json& request);

/// One line of results, appended to operators.csv, networks.csv or steps.csv in the folder that
/// PARTITA_PYTORCH_RESULTS names; nothing without it. `difference` and `bound` are of the result
/// that comes nearest its bound.
void record_operator(const std::string& kind, const std::string& pass, const std::string& precision,
                     int results, double difference, double bound);
void record_network(const std::string& test, const std::string& item, double difference,
                    double bound);
void record_times(const std::string& network, int ranks, const std::string& whose,
                  std::size_t steps, double median_s, double low_s, double high_s);

}  // namespace partita::pytorch
