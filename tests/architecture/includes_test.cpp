// tests/architecture/includes_test.cpp: who may include whom, read from the sources themselves.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace partita {
namespace {

namespace fs = std::filesystem;
using Targets = std::set<std::string>;

/// The design's table. "May include" is transitive, so each row lists only what is direct.
const std::map<std::string, Targets>& table() {
  static const std::map<std::string, Targets> rows{
      {"base", {}},
      {"operators", {"base"}},
      {"models", {"base", "operators"}},
      {"topologies", {"base"}},
      {"program", {"base", "operators"}},
      // Deviation: mesh and layouts are the Program's vocabulary, and a plan is written in it.
      {"plan", {"base", "models", "topologies", "program"}},
      {"derive", {"plan"}},
      {"lower", {"derive", "plan", "program"}},
      {"cost", {"base", "operators", "topologies", "program"}},
      {"engine", {"cost", "program", "topologies"}},
      {"estimate", {"derive", "plan", "cost"}},
      {"search", {"lower", "engine", "estimate"}},
      {"runtime", {"base", "program", "operators"}},
      // Deviation: the serial network is a model, and the comparison knows both sides.
      {"reference_serial", {"runtime", "models"}},
      {"validation", {"search", "models", "topologies"}},
      {"report", {"search", "models", "topologies"}},
      {"cli", {"report", "validation", "reference_serial", "search", "runtime"}},
  };
  return rows;
}

Targets closure(const std::string& target) {
  Targets all{target};
  for (const auto& next : table().at(target)) {
    for (const auto& t : closure(next)) all.insert(t);
  }
  return all;
}

/// The target that a file of the project belongs to; empty for what is none of ours.
std::string target_of(const std::string& path) {
  if (path.rfind("models/operators.", 0) == 0 || path == "models/dims.h") return "operators";
  for (const char* file : {"runtime/reference/serial.", "runtime/reference/compare."}) {
    if (path.rfind(file, 0) == 0) return "reference_serial";
  }
  const auto slash = path.find('/');
  if (slash == std::string::npos) return "";
  std::string folder = path.substr(0, slash);
  if (folder == "simulator") folder = path.substr(slash + 1, path.find('/', slash + 1) - slash - 1);
  return table().count(folder) > 0 ? folder : "";
}

struct Include {
  int line = 0;
  std::string path;
  bool quoted = false;
};

std::vector<Include> includes_of(const std::string& text) {
  static const std::regex pattern(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  std::vector<Include> all;
  std::istringstream lines(text);
  std::string line;
  for (int n = 1; std::getline(lines, line); ++n) {
    std::smatch m;
    if (std::regex_search(line, m, pattern)) all.push_back({n, m[2], m[1] == "\""});
  }
  return all;
}

/// Every breach of the rules in one file: "path:line: what".
std::vector<std::string> breaches(const std::string& path, const std::string& text) {
  std::vector<std::string> found;
  const std::string target = target_of(path);
  if (target.empty()) return {path + ": belongs to no target of the table"};
  const Targets may = closure(target);
  const bool header = path.size() > 2 && path.compare(path.size() - 2, 2, ".h") == 0;
  for (const Include& i : includes_of(text)) {
    if (i.quoted) {
      const std::string other = target_of(i.path);
      if (other.empty())
        found.push_back(
            fmt::format("{}:{}: \"{}\" is not written from the root", path, i.line, i.path));
      else if (may.count(other) == 0)
        found.push_back(fmt::format("{}:{}: {} may not include {}", path, i.line, target, other));
    } else if (header) {
      for (const char* heavy : {"boost/", "yaml-cpp/", "nlohmann/", "onnx", "CLI/", "Eigen/",
                                "google/protobuf/", "pugixml", "tbb/", "oneapi/", "mpi.h"}) {
        if (i.path.rfind(heavy, 0) == 0)
          found.push_back(fmt::format("{}:{}: heavy <{}> in a header", path, i.line, i.path));
      }
    }
  }
  if (header) {
    if (text.rfind("// " + path + ": ", 0) != 0)
      found.push_back(fmt::format("{}:1: begins without '// {}: what it is'", path, path));
    if (std::regex_search(text, std::regex(R"((^|\n)\s*using\s+namespace\s)")))
      found.push_back(path + ": 'using namespace' in a header");
    if (text.find("#pragma once") == std::string::npos) found.push_back(path + ": no #pragma once");
  }
  return found;
}

std::vector<std::string> sources() {
  std::vector<std::string> all;
  for (const char* folder :
       {"base", "models", "topologies", "simulator", "runtime", "validation", "report", "cli"}) {
    if (!fs::exists(fs::path(PARTITA_SOURCE) / folder)) continue;
    for (const auto& e : fs::recursive_directory_iterator(fs::path(PARTITA_SOURCE) / folder)) {
      const auto type = e.path().extension();
      if (type == ".h" || type == ".cpp" || type == ".cu")
        all.push_back(fs::relative(e.path(), PARTITA_SOURCE).generic_string());
    }
  }
  return all;
}

TEST(Includes, FollowTheTableOfTargets) {
  const auto files = sources();
  EXPECT_GT(files.size(), 40u);
  for (const auto& path : files) {
    std::ifstream in(fs::path(PARTITA_SOURCE) / path);
    std::ostringstream text;
    text << in.rdbuf();
    for (const auto& b : breaches(path, text.str())) ADD_FAILURE() << b;
  }
}

TEST(Includes, TheTableHasNoCycle) {
  // closure() would not end on one; and the design's arrows point down only.
  for (const auto& [target, direct] : table()) {
    for (const auto& t : direct) EXPECT_EQ(closure(t).count(target), 0u) << target << ", " << t;
  }
}

TEST(Includes, TheCheckerFindsEachBreach) {
  const auto one = [](const std::string& path, const std::string& text) {
    const auto b = breaches(path, text);
    return b.size() == 1 ? b[0] : fmt::format("{} breaches", b.size());
  };
  EXPECT_EQ(one("models/graph.cpp", "#include \"topologies/topology.h\"\n"),
            "models/graph.cpp:1: models may not include topologies");
  EXPECT_EQ(one("models/operators.cpp", "\n# include \"models/graph.h\"\n"),
            "models/operators.cpp:2: operators may not include models");
  EXPECT_EQ(one("simulator/cost/cost.cpp", "#include \"simulator/plan/plan.h\"\n"),
            "simulator/cost/cost.cpp:1: cost may not include plan");
  EXPECT_EQ(one("runtime/reference/interpreter.cpp", "#include \"models/graph.h\"\n"),
            "runtime/reference/interpreter.cpp:1: runtime may not include models");
  EXPECT_EQ(one("runtime/reference/serial.cpp", "#include \"models/graph.h\"\n"), "0 breaches");
  EXPECT_EQ(one("simulator/plan/plan.cpp", "#include \"simulator/program/mesh.h\"\n"),
            "0 breaches");
  EXPECT_EQ(one("base/x.cpp", "#include \"y.h\"\n"),
            "base/x.cpp:1: \"y.h\" is not written from the root");
  const std::string head = "// base/x.h: an x.\n#pragma once\n";
  EXPECT_EQ(one("base/x.h", head), "0 breaches");
  EXPECT_EQ(one("base/x.h", head + "#include <yaml-cpp/yaml.h>\n"),
            "base/x.h:3: heavy <yaml-cpp/yaml.h> in a header");
  EXPECT_EQ(one("base/x.h", head + "using namespace std;\n"),
            "base/x.h: 'using namespace' in a header");
  EXPECT_EQ(one("base/x.h", "#pragma once\n"),
            "base/x.h:1: begins without '// base/x.h: what it is'");
}

}  // namespace
}  // namespace partita
