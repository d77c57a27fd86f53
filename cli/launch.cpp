#include "cli/launch.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <functional>
#include <regex>
#include <sstream>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/temporary.h"
#include "base/unit_text.h"
#include "runtime/transport/tcp.h"

namespace partita::cli {
namespace {

using Clock = std::chrono::steady_clock;

/// What this process was started with.
std::vector<std::string> command_line() {
  std::ifstream in("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(in, word, '\0');) words.push_back(word);
  PARTITA_ASSERT(!words.empty(), "/proc/self/cmdline is empty");
  std::array<char, 4096> self{};
  const ssize_t length = ::readlink("/proc/self/exe", self.data(), self.size() - 1);
  if (length > 0) words[0] = std::string(self.data(), static_cast<std::size_t>(length));
  return words;
}

/// Calls `use` with each whole line from `at` on; returns where they end.
std::size_t each_line(const std::string& text, std::size_t at,
                      const std::function<void(const std::string&)>& use) {
  for (std::size_t end; (end = text.find('\n', at)) != std::string::npos; at = end + 1)
    use(text.substr(at, end - at));
  return at;
}

/// A process as /proc shows it: its id may become another's, with another start.
struct Seen {
  ::pid_t process = 0, parent = 0;
  std::string state;
  unsigned long long start = 0;
  bool same(const Seen& other) const { return process == other.process && start == other.start; }
};

std::vector<Seen> all_processes() {
  std::vector<Seen> all;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", error)) {
    Seen p;
    p.process = std::atoi(entry.path().filename().c_str());
    std::ifstream in(entry.path() / "stat");
    std::string text;
    if (p.process <= 0 || !std::getline(in, text)) continue;
    // "ID (NAME) STATE PARENT ...", the start 18 fields after the parent, and NAME anything.
    std::istringstream fields(text.substr(std::min(text.size(), text.rfind(')') + 1)));
    std::string skipped;
    fields >> p.state >> p.parent;
    for (int k = 0; k < 17; ++k) fields >> skipped;
    if (fields >> p.start) all.push_back(p);
  }
  return all;
}

/// Children, their children and so on.
std::vector<Seen> descendants(::pid_t of) {
  const auto all = all_processes();
  std::vector<Seen> found;
  std::vector<::pid_t> parents{of};
  for (std::size_t k = 0; k < parents.size(); ++k) {
    for (const Seen& p : all) {
      if (p.parent == parents[k]) found.push_back(p), parents.push_back(p.process);
    }
  }
  return found;
}

struct Child {
  ::pid_t process = 0;
  bool over = false, ended_by_us = false;
  int status = 0;
  bool failed() const {
    return over && !ended_by_us && !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
};

/// Starts and watches processes; ends with them, they with it.
class Nursery {
 public:
  Nursery() {
    for (Pipe* p : {&errors_, &output_}) {
      if (::pipe2(p->ends.data(), O_CLOEXEC) != 0) throw InternalError("no pipe");
      ::fcntl(p->ends[0], F_SETFL, O_NONBLOCK);
    }
    sigset_t watched;
    sigemptyset(&watched);
    for (const int s : {SIGCHLD, SIGINT, SIGTERM, SIGHUP}) sigaddset(&watched, s);
    // Signals are read from a descriptor: no handlers, no state of the whole process.
    ::sigprocmask(SIG_BLOCK, &watched, &before_);
    signals_ = ::signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals_ < 0) throw InternalError("no descriptor for signals");
  }
  ~Nursery() {
    for (const int fd :
         {errors_.ends[0], errors_.ends[1], output_.ends[0], output_.ends[1], signals_}) {
      if (fd >= 0) ::close(fd);
    }
    ::sigprocmask(SIG_SETMASK, &before_, nullptr);
  }
  Nursery(const Nursery&) = delete;
  Nursery& operator=(const Nursery&) = delete;

  /// `setup` runs in the child; then the words are executed.
  void start(std::vector<std::string> words, const std::function<void()>& setup, int end_signal) {
    const ::pid_t parent = ::getpid(), child = ::fork();
    if (child < 0) {
      end(SIGKILL);
      throw InternalError(fmt::format("cannot fork: {}", std::strerror(errno)));
    }
    if (child == 0) {
      ::prctl(PR_SET_PDEATHSIG, end_signal);
      if (::getppid() != parent) ::_exit(3);
      ::sigprocmask(SIG_SETMASK, &before_, nullptr);
      ::dup2(errors_.ends[1], STDERR_FILENO);
      ::dup2(output_.ends[1], STDOUT_FILENO);
      setup();
      std::vector<char*> arguments;
      for (std::string& w : words) arguments.push_back(w.data());
      arguments.push_back(nullptr);
      ::execvp(arguments[0], arguments.data());
      ::_exit(errno == ENOENT ? 127 : 126);
    }
    children.push_back({child, false, false, 0});
  }

  /// Until all have ended. After the first failure the others have `grace` to end by themselves;
  /// then, on a signal to us, and once `given_up` says why, they get `end_signal`, and five seconds
  /// later SIGKILL.
  void watch(std::chrono::milliseconds grace, int end_signal,
             const std::function<std::string()>& given_up) {
    for (Pipe* p : {&errors_, &output_}) ::close(std::exchange(p->ends[1], -1));
    constexpr auto kNever = Clock::time_point::max();
    auto end_at = kNever, kill_at = kNever;
    while (!all_over()) {
      // A closed pipe would wake us for ever.
      std::array<pollfd, 3> polls{{{errors_.closed ? -1 : errors_.ends[0], POLLIN, 0},
                                   {output_.closed ? -1 : output_.ends[0], POLLIN, 0},
                                   {signals_, POLLIN, 0}}};
      ::poll(polls.data(), polls.size(), std::min(end_at, kill_at) < kNever ? 50 : 1000);
      errors_.read();
      output_.read();
      tell_progress();
      signalfd_siginfo info;
      while (::read(signals_, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGCHLD || interrupted != 0) continue;
        interrupted = static_cast<int>(info.ssi_signo);
        end_at = Clock::now();
      }
      reap();
      const bool failed = first_failed >= 0;
      if (reason.empty() && !failed && interrupted == 0 && !all_over() &&
          !(reason = given_up()).empty())
        end_at = Clock::now();
      if (failed && std::min(end_at, kill_at) == kNever) end_at = Clock::now() + grace;
      // A stopped process ends by nothing else.
      if (failed && end_at < kNever && only_stopped()) end_at = Clock::now();
      if (Clock::now() >= end_at) {
        end(end_signal);
        end_at = kNever;
        kill_at = Clock::now() + std::chrono::seconds(5);
      }
      if (Clock::now() >= kill_at) end(SIGKILL);
    }
    end_orphans();
    errors_.read();
    output_.read();
    tell_progress();
  }
  /// Without the lines of progress, which have been told.
  std::string errors_left() const {
    std::string left;
    const std::size_t end = each_line(errors_.text, 0, [&](const std::string& line) {
      if (!is_progress(line)) left += line + "\n";
    });
    return left + errors_.text.substr(end);
  }
  /// What a library of a rank that died has said, the last of it; not the ranks' own reports.
  void tell_last_words() const {
    constexpr std::size_t kMost = 20;
    const std::string left = errors_left();
    std::deque<std::string> last;
    const auto keep = [&](const std::string& line) {
      if (line.empty() || line.rfind("partita: ", 0) == 0) return;
      last.push_back(line);
      if (last.size() > kMost) last.pop_front();
    };
    const std::size_t end = each_line(left, 0, keep);
    keep(left.substr(end));
    for (const std::string& line : last) std::fputs((line + "\n").c_str(), stderr);
  }
  const std::string& errors() const { return errors_.text; }
  const std::string& output() const { return output_.text; }

  std::vector<Child> children;
  int first_failed = -1;
  int interrupted = 0;
  std::string reason;  ///< why they were given up

 private:
  struct Pipe {
    std::array<int, 2> ends{-1, -1};
    std::string text;
    bool closed = false;
    void read() {
      std::array<char, 4096> piece;
      ssize_t n;
      while ((n = ::read(ends[0], piece.data(), piece.size())) > 0)
        text.append(piece.data(), static_cast<std::size_t>(n));
      closed = closed || n == 0;
    }
  };
  static bool is_progress(const std::string& line) { return line.rfind("progress: ", 0) == 0; }
  /// How far a long run is, is told at once; all else once it is over.
  void tell_progress() {
    told_ = each_line(errors_.text, told_, [](const std::string& line) {
      if (is_progress(line)) std::fputs((line + "\n").c_str(), stderr);
    });
  }
  bool all_over() const {
    for (const Child& c : children) {
      if (!c.over) return false;
    }
    return true;
  }
  bool only_stopped() const {
    for (const Child& c : children) {
      if (!c.over && process_state(c.process) != 'T') return false;
    }
    return true;
  }
  void end(int signal) {
    for (Child& c : children) {
      if (c.over) continue;
      c.ended_by_us = true;
      for (const Seen& p : descendants(c.process)) {
        if (std::none_of(theirs_.begin(), theirs_.end(), [&](const Seen& x) { return x.same(p); }))
          theirs_.push_back(p);
      }
      ::kill(c.process, signal);
    }
  }
  /// What an mpirun that had to be killed has left behind.
  void end_orphans() const {
    if (theirs_.empty()) return;
    for (const Seen& now : all_processes()) {
      for (const Seen& p : theirs_) {
        if (p.same(now)) ::kill(p.process, SIGKILL);
      }
    }
  }
  void reap() {
    // In the order in which they died, as far as the kernel tells: the signalled before those who
    // heard of it.
    std::vector<std::size_t> now;
    for (std::size_t k = 0; k < children.size(); ++k) {
      Child& c = children[k];
      if (c.over || ::waitpid(c.process, &c.status, WNOHANG) != c.process) continue;
      c.over = true;
      now.push_back(k);
    }
    for (const bool by_signal : {true, false}) {
      for (const std::size_t k : now) {
        if (first_failed < 0 && children[k].failed() &&
            WIFSIGNALED(children[k].status) == by_signal)
          first_failed = static_cast<int>(k);
      }
    }
  }

  std::vector<Seen> theirs_;  ///< children of those that we have ended
  Pipe errors_, output_;
  std::size_t told_ = 0;  ///< of the errors
  int signals_ = -1;
  sigset_t before_{};
};

std::string signal_name(int signal) {
  const char* name = ::sigdescr_np(signal);
  return name == nullptr ? fmt::format("signal {}", signal)
                         : fmt::format("signal {} ({})", signal, name);
}

std::string where(const Board& board, const Describe& describe, int rank) {
  const RankState& s = board.rank(rank);
  return describe(rank, s.step, s.instruction);
}

/// The first line of our own among what the ranks said, without "partita: ".
std::string said(const std::string& text) {
  static const std::string kPrefix = "partita: ";
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = text.find('\n', at);
    if (end == std::string::npos) end = text.size();
    if (text.compare(at, kPrefix.size(), kPrefix) == 0)
      return text.substr(at + kPrefix.size(), end - at - kPrefix.size());
    at = end + 1;
  }
  return "";
}

/// One line for what mpirun says in twenty.
std::string cause(const std::string& text, const Board& board, const Describe& describe) {
  std::smatch m;
  const auto at = [&](const std::string& rank) {
    const int r = std::stoi(rank);
    return r < board.ranks() ? " in " + where(board, describe, r) : std::string();
  };
  if (std::regex_search(
          text, m,
          std::regex(R"(process rank (\d+) with PID \d+ on node \S+ exited on signal (\d+))")))
    return fmt::format("rank {} was ended by {}{}; the others were stopped", m[1].str(),
                       signal_name(std::stoi(m[2].str())), at(m[1].str()));
  if (std::regex_search(text, m,
                        std::regex(R"(Process name: \[\[\d+,\d+\],(\d+)\]\s+Exit code:\s+(\d+))")))
    return fmt::format("rank {} ended with exit code {}{}; the others were stopped", m[1].str(),
                       m[2].str(), at(m[1].str()));
  if (std::regex_search(text, m, std::regex(R"(not enough slots available)")))
    return "mpirun has too few slots for the ranks; use fewer or a larger machine file";
  std::size_t from = text.find_first_not_of("-\n ");
  if (from == std::string::npos) return "mpirun failed without a word";
  return "mpirun: " + text.substr(from, text.find('\n', from) - from);
}

Launched interrupted(int signal) {
  return {128 + signal, fmt::format("ended by {}; all ranks were stopped", signal_name(signal))};
}

/// Looks at the ranks from outside: those that did not come, or can't say that they were stopped.
class Lookout {
 public:
  Lookout(const Board& board, const Describe& describe, const Patience& patience)
      : board_(board),
        describe_(describe),
        patience_(patience),
        since_(static_cast<std::size_t>(board.ranks()), Clock::time_point::max()) {}

  /// Why a stopped rank's run is over; empty: it is not.
  std::string stopped() {
    for (int r = 0; r < board_.ranks(); ++r) {
      auto& since = since_[static_cast<std::size_t>(r)];
      const std::int64_t process = board_.rank(r).process;
      if (process == 0 || process_state(process) != 'T') {
        since = Clock::time_point::max();
      } else if (since == Clock::time_point::max()) {
        since = Clock::now();
      } else if (seconds_since(since) > patience_.stopped_s) {
        return fmt::format("rank {} was stopped in {} for {:.3g} s; the others were ended", r,
                           where(board_, describe_, r), patience_.stopped_s);
      }
    }
    return "";
  }

  /// Why an mpirun that brings no ranks forth, or outlives them, is given up.
  std::string hangs(::pid_t mpirun, const std::string& errors) {
    if (seconds_since(looked_) < 1) return "";
    looked_ = Clock::now();
    const auto theirs = descendants(mpirun);
    const bool alive =
        std::any_of(theirs.begin(), theirs.end(), [](const Seen& p) { return p.state != "Z"; });
    had_ranks_ = had_ranks_ || !theirs.empty();
    if (alive || !had_ranks_) {
      gone_since_ = looked_;
    } else if (seconds_since(gone_since_) > patience_.stopped_s) {
      return fmt::format(
          "mpirun has not ended for {:.3g} s after its ranks have; {}use --transport "
          "tcp or threads",
          patience_.stopped_s, says(errors));
    }
    if (started_ || seconds_since(begin_) < patience_.start_s) return "";
    int missing = -1, came = 0;
    for (int r = 0; r < board_.ranks(); ++r) {
      if (board_.rank(r).process != 0) {
        ++came;
      } else if (missing < 0) {
        missing = r;
      }
    }
    // Ranks on other hosts, which it starts by ssh and the like, cannot reach this one's board.
    std::error_code error;
    const auto own = std::filesystem::read_symlink("/proc/self/exe", error);
    for (const Seen& p : theirs) {
      const auto file =
          std::filesystem::read_symlink(fmt::format("/proc/{}/exe", p.process), error);
      if (!error && file != own) started_ = true;
    }
    started_ = started_ || missing < 0;
    if (started_) return "";
    return fmt::format(
        "mpirun has {} within {:.3g} s; {}{}use --transport tcp or threads",
        came == 0 ? std::string("started no rank")
                  : fmt::format("not brought rank {} to MPI's start", missing),
        patience_.start_s, says(errors),
        patience_.longer.empty() ? "" : fmt::format("wait longer by {}, or ", patience_.longer));
  }

 private:
  static double seconds_since(Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  }
  /// Its first line, quoted.
  static std::string says(const std::string& errors) {
    const std::size_t from = errors.find_first_not_of("-\n ");
    if (from == std::string::npos) return "";
    return fmt::format("it says '{}'; ", errors.substr(from, errors.find('\n', from) - from));
  }
  const Board& board_;
  const Describe& describe_;
  const Patience patience_;
  std::vector<Clock::time_point> since_;
  Clock::time_point begin_ = Clock::now(), looked_ = begin_, gone_since_ = begin_;
  bool started_ = false, had_ranks_ = false;
};

/// Without room for the files of its session mpirun 4.1 hangs once its ranks have failed. They are
/// 8.1 MiB and 4 KiB for each rank.
void check_session_room(int ranks) {
  const char* own = std::getenv("OMPI_MCA_orte_tmpdir_base");
  const TemporaryPlace place =
      own == nullptr ? temporary_place() : TemporaryPlace{own, "OMPI_MCA_orte_tmpdir_base"};
  const std::int64_t needed = (std::int64_t{9} << 20) + ranks * (std::int64_t{8} << 10);
  struct statvfs disk {};
  if (::statvfs(place.folder.c_str(), &disk) != 0) return;  // what is wrong mpirun will say
  const auto free =
      static_cast<std::int64_t>(disk.f_bavail) * static_cast<std::int64_t>(disk.f_frsize);
  const bool files = disk.f_files == 0 || disk.f_favail >= 100;
  if (free >= needed && files) return;
  throw MachineError(fmt::format(
      "{}: the disk is full: it has {}, and mpirun needs {} for {} ranks; make room, set {} to "
      "another folder, or use --transport tcp or threads",
      place.name(), files ? text(Bytes{free}) : "no room for more files", text(Bytes{needed}),
      ranks, own == nullptr ? "TMPDIR" : place.variable));
}

}  // namespace

bool on_path(const std::string& program) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path != nullptr ? path : "");
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string file = (folder.empty() ? "." : folder) + "/" + program;
    if (::access(file.c_str(), X_OK) == 0) return true;
  }
  return false;
}

Launched launch_mpi(const Board& board, const Describe& describe, const Patience& patience) {
  check_session_room(board.ranks());
  std::vector<std::string> words{"mpirun", "-n", std::to_string(board.ranks())};
  for (const std::string& w : command_line()) words.push_back(w);
  const std::string path = board.path();
  Nursery nursery;
  nursery.start(
      words,
      [&] {
        // Root and more ranks than cores are this tool's ordinary use; mpirun asks to be told.
        ::setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
        ::setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
        ::setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 0);
        // Sixteen ranks on two cores must not spin at each other.
        ::setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
        ::setenv("OMPI_MCA_btl_base_warn_component_unused", "0", 0);
        ::setenv(kBoardVariable, path.c_str(), 1);
      },
      SIGTERM);
  Lookout lookout(board, describe, patience);
  nursery.watch(std::chrono::milliseconds(0), SIGTERM, [&] {
    const std::string reason = lookout.stopped();
    return reason.empty() ? lookout.hangs(nursery.children[0].process, nursery.errors()) : reason;
  });
  if (nursery.interrupted != 0) return interrupted(nursery.interrupted);
  if (!nursery.reason.empty()) return {3, nursery.reason};
  const int status = nursery.children[0].status;
  const int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (code == 127) {
    throw InputError("--transport",
                     "mpi needs mpirun, which is not on the PATH; install openmpi-bin or "
                     "use --transport tcp or threads");
  }
  if (code == 0) {
    fmt::print("{}", nursery.output());
    return {};
  }
  // Our own ranks have said it in one line; else mpirun's essay is cut down to its point.
  const std::string own = said(nursery.errors());
  if (!own.empty()) return {code == 2 ? 2 : 3, own, nursery.output()};
  // Rank 0: not the serial network's loss, which it has printed. mpirun's own failures are 1 too.
  if (code == 1 && !nursery.output().empty()) {
    fmt::print("{}", nursery.output());
    return {1, ""};
  }
  return {3, cause(nursery.errors(), board, describe)};
}

Launched launch_tcp(const Board& board, const Describe& describe, const Patience& patience) {
  const std::vector<std::string> words = command_line();
  const int ranks = board.ranks();
  const Listening listening = listen_on_loopback(ranks);
  const std::string path = board.path();
  Nursery nursery;
  for (int r = 0; r < ranks; ++r) {
    nursery.start(
        words,
        [&] {
          ::setenv("RANK", std::to_string(r).c_str(), 1);
          // Which GPU is a rank's: not what a launcher around this command said of the command.
          ::setenv("LOCAL_RANK", std::to_string(r).c_str(), 1);
          ::setenv("WORLD_SIZE", std::to_string(ranks).c_str(), 1);
          ::setenv("MASTER_ADDR", "127.0.0.1", 1);
          ::setenv("MASTER_PORT", std::to_string(listening.port).c_str(), 1);
          ::unsetenv("TORCHELASTIC_USE_AGENT_STORE");
          ::setenv(kBoardVariable, path.c_str(), 1);
          if (r == 0) {
            ::setenv(kListenerVariable, std::to_string(listening.socket).c_str(), 1);
          } else {
            ::close(listening.socket);
          }
        },
        SIGKILL);
  }
  ::close(listening.socket);
  Lookout lookout(board, describe, patience);
  nursery.watch(std::chrono::seconds(3), SIGKILL, [&] { return lookout.stopped(); });
  if (nursery.interrupted != 0) return interrupted(nursery.interrupted);
  if (!nursery.reason.empty()) return {3, nursery.reason};
  if (nursery.first_failed < 0) {
    std::fputs(nursery.errors_left().c_str(), stderr);
    fmt::print("{}", nursery.output());
    return {};
  }
  // A rank that died by itself knows least; what its launcher saw is the cause.
  for (std::size_t k = 0; k < nursery.children.size(); ++k) {
    const Child& c = nursery.children[k];
    if (!c.failed()) continue;
    const int r = static_cast<int>(k);
    const bool by_signal = WIFSIGNALED(c.status);
    // 2 and 3 are a rank's own ways to give up, and 1 rank 0's.
    if (!by_signal && WEXITSTATUS(c.status) <= 3 && (WEXITSTATUS(c.status) != 1 || r == 0))
      continue;
    nursery.tell_last_words();
    if (by_signal)
      return {3, fmt::format("rank {} was ended by {} in {}; the others were stopped", r,
                             signal_name(WTERMSIG(c.status)), where(board, describe, r))};
    return {3, fmt::format("rank {} ended with exit code {} in {}; the others were stopped", r,
                           WEXITSTATUS(c.status), where(board, describe, r))};
  }
  const int code =
      WEXITSTATUS(nursery.children[static_cast<std::size_t>(nursery.first_failed)].status);
  const std::string own = said(nursery.errors());
  if (code == 1 && own.empty()) {
    fmt::print("{}", nursery.output());
    return {1, ""};
  }
  return {code == 2 ? 2 : 3, own.empty() ? "the ranks ended without a word" : own,
          nursery.output()};
}

void end_with_starter() {
  if (std::getenv(kBoardVariable) == nullptr) return;
  const ::pid_t starter = ::getppid();
  if (starter == 1) ::_exit(3);  // gone before we looked
  std::thread([starter] {
    while (::getppid() == starter) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    ::_exit(3);
  }).detach();
}

}  // namespace partita::cli
