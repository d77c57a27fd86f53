#include "tests/cli/run.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

namespace partita::test {
namespace {

std::string without_place(std::string text) {
  const std::string source = PARTITA_SOURCE;
  for (auto at = text.find(source); at != std::string::npos; at = text.find(source, at))
    text.replace(at, source.size(), "$SOURCE");
  return text;
}

}  // namespace

std::string without_progress(const std::string& err) {
  std::istringstream in(err);
  std::string left;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind("progress: ", 0) != 0) left += line + "\n";
  }
  return left;
}

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

/// Processes, but this one, whose command line has `text`.
std::vector<int> processes_with(const std::string& text) {
  std::vector<int> list;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const int id = std::atoi(entry.path().filename().c_str());
    if (id <= 0 || id == ::getpid()) continue;
    try {
      if (read(entry.path().string() + "/cmdline").find(text) != std::string::npos &&
          read(entry.path().string() + "/stat").find(") Z") == std::string::npos)
        list.push_back(id);
    } catch (const std::exception&) {  // it has ended meanwhile
    }
  }
  return list;
}
void expect_nobody_left(const std::string& text) {
  for (int k = 0; k < 10 * PARTITA_SECONDS && !processes_with(text).empty(); ++k)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const auto left = processes_with(text);
  EXPECT_TRUE(left.empty()) << left.size() << " processes outlive their launch";
  for (const int id : left) ::kill(id, SIGKILL);
}

}  // namespace partita::test
