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

/// One line of validation/results/cpu/pytorch.csv, appended to the file that
/// PARTITA_PYTORCH_RESULTS names; nothing without it.
void record(const std::string& test, const std::string& item, double difference, double bound,
            const std::string& unit);

}  // namespace partita::pytorch
