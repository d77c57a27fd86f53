#include "tests/cli/run.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace partita::test {
namespace {

std::string without_place(std::string text) {
  const std::string source = PARTITA_SOURCE;
  for (auto at = text.find(source); at != std::string::npos; at = text.find(source, at))
    text.replace(at, source.size(), "$SOURCE");
  return text;
}

}  // namespace

Ran run(const std::string& arguments, const std::string& before, int patience) {
  const TemporaryFolder folder;
  const std::string errors = folder.path() + "/stderr";
  const std::string line = fmt::format(
      "cd '{}/cli/bad' && exec timeout {} {} '{}' {} 2>'{}' </dev/null", PARTITA_TEST_DATA,
      patience * PARTITA_SECONDS, before, PARTITA_COMMAND, arguments, errors);
  std::FILE* pipe = ::popen(line.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error("cannot run " + line);
  Ran r;
  std::array<char, 4096> piece;
  while (const std::size_t n = std::fread(piece.data(), 1, piece.size(), pipe))
    r.out.append(piece.data(), n);
  const int status = ::pclose(pipe);
  r.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  r.out = without_place(r.out);
  r.err = without_place(read(errors));
  return r;
}

bool updating() {
  const char* wish = std::getenv("PARTITA_UPDATE_GOLDENS");
  return wish != nullptr && std::string(wish) == "1";
}

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void write(const std::string& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  if (!out.flush()) throw std::runtime_error("cannot write " + path);
}

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "partita-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace partita::test
