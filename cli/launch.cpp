#include "cli/launch.h"

#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <regex>
#include <vector>

#include "base/error.h"

namespace partita::cli {
namespace {

/// What this process was started with.
std::vector<std::string> command_line() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(in, word, '\0');) words.push_back(word);
  PARTITA_ASSERT(!words.empty(), "/proc/self/cmdline is empty");
  return words;
}

/// One line for what mpirun says in twenty.
std::string cause(const std::string& text) {
  std::smatch m;
  if (std::regex_search(
          text, m,
          std::regex(R"(process rank (\d+) with PID \d+ on node \S+ exited on signal (\d+))")))
    return fmt::format("rank {} was ended by signal {}; the others were stopped", m[1].str(),
                       m[2].str());
  if (std::regex_search(text, m, std::regex(R"(not enough slots available)")))
    return "mpirun has too few slots for the ranks; use fewer or a larger machine file";
  const auto end = text.find('\n');
  return "mpirun: " + text.substr(0, end);
}

}  // namespace

int launch_mpi(int ranks) {
  const std::vector<std::string> mine = command_line();
  std::array<int, 2> pipe_ends{};
  if (::pipe(pipe_ends.data()) != 0) throw InternalError("no pipe");
  std::array<char, 4096> self{};
  const ssize_t length = ::readlink("/proc/self/exe", self.data(), self.size() - 1);
  const std::string program =
      length > 0 ? std::string(self.data(), static_cast<std::size_t>(length)) : mine[0];
  const ::pid_t child = ::fork();
  if (child < 0) throw InternalError("cannot fork");
  if (child == 0) {
    // Root and more ranks than cores are this tool's ordinary use; mpirun asks to be told.
    ::setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
    ::setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    ::setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 0);
    // Sixteen ranks on two cores must not spin at each other.
    ::setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    ::setenv("OMPI_MCA_btl_base_warn_component_unused", "0", 0);
    // The ranks end with the command, however it ends.
    ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    ::dup2(pipe_ends[1], STDERR_FILENO);
    ::close(pipe_ends[0]);
    ::close(pipe_ends[1]);
    std::vector<std::string> words{"mpirun", "-n", std::to_string(ranks), program};
    words.insert(words.end(), mine.begin() + 1, mine.end());
    std::vector<char*> arguments;
    for (std::string& w : words) arguments.push_back(w.data());
    arguments.push_back(nullptr);
    ::execvp("mpirun", arguments.data());
    ::_exit(errno == ENOENT ? 127 : 126);
  }
  ::close(pipe_ends[1]);
  std::string text;
  std::array<char, 4096> piece{};
  std::size_t told = 0;
  for (ssize_t n; (n = ::read(pipe_ends[0], piece.data(), piece.size())) > 0;) {
    text.append(piece.data(), static_cast<std::size_t>(n));
    // How far a long run is, is told at once; all else once it is over.
    for (std::size_t end; (end = text.find('\n', told)) != std::string::npos; told = end + 1) {
      if (text.compare(told, 10, "progress: ") == 0)
        fmt::print(stderr, "{}\n", text.substr(told, end - told));
    }
  }
  ::close(pipe_ends[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (code == 127) {
    throw InputError("--transport",
                     "mpi needs mpirun, which is not on the PATH; install openmpi-bin or "
                     "use --transport threads");
  }
  if (code == 0) return 0;
  // Our own ranks have said it in one line; else mpirun's essay is cut down to its point.
  bool said = false;
  for (std::size_t at = 0; at < text.size() && !said;) {
    std::size_t end = text.find('\n', at);
    if (end == std::string::npos) end = text.size();
    const std::string line = text.substr(at, end - at);
    if (line.rfind("partita: ", 0) == 0) fmt::print(stderr, "{}\n", line), said = true;
    at = end + 1;
  }
  if (!said && code != 1) fmt::print(stderr, "partita: {}\n", cause(text));
  return code == 2 || code == 1 ? code : 3;
}

}  // namespace partita::cli
