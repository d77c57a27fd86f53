// tests/cli/faults_test.cpp: ranks as real processes: started by the command or by hand as torchrun
// and srun do; killed, stopped, missing, interrupted; full disks.

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <thread>

#include "tests/cli/run.h"

namespace partita::test {
namespace {

using Json = nlohmann::json;
using Clock = std::chrono::steady_clock;
using ::testing::AllOf;
using ::testing::HasSubstr;
using Environment = std::map<std::string, std::string>;

/// Sanitizers slow everything down.
constexpr int kPatience = PARTITA_SECONDS > 10 ? 4 : 1;

/// The command in the background, in an environment of its own: no launcher's variables leak in.
class Process {
 public:
  Process(const std::string& arguments, const Environment& environment) {
    std::vector<std::string> words{PARTITA_COMMAND}, variables;
    std::istringstream in(arguments);
    for (std::string w; in >> w;) words.push_back(w);
    for (const char* name : {"PATH", "HOME", "TMPDIR", "ASAN_OPTIONS", "LD_LIBRARY_PATH"}) {
      if (environment.count(name) > 0) continue;
      if (const char* v = std::getenv(name)) variables.push_back(fmt::format("{}={}", name, v));
    }
    for (const auto& [name, v] : environment) variables.push_back(name + "=" + v);
    const std::string out = folder_.path() + "/out", err = folder_.path() + "/err";
    process_ = ::fork();
    if (process_ == 0) {
      ::setpgid(0, 0);
      if (::chdir(PARTITA_TEST_DATA "/cli/bad") != 0) ::_exit(99);
      ::dup2(::open("/dev/null", O_RDONLY), 0);
      ::dup2(::open(out.c_str(), O_WRONLY | O_CREAT, 0600), 1);
      ::dup2(::open(err.c_str(), O_WRONLY | O_CREAT, 0600), 2);
      std::vector<char*> argv, env;
      for (auto& w : words) argv.push_back(w.data());
      for (auto& v : variables) env.push_back(v.data());
      argv.push_back(nullptr);
      env.push_back(nullptr);
      ::execve(argv[0], argv.data(), env.data());
      ::_exit(98);
    }
  }
  ~Process() {
    if (process_ > 0) {
      ::kill(process_, SIGKILL);
      ::waitpid(process_, nullptr, 0);
    }
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  ::pid_t id() const { return process_; }
  /// Code 124 where it does not end within the seconds; then it is killed.
  Ran wait(int seconds = 30) {
    Ran r;
    int status = 0;
    const auto end = Clock::now() + std::chrono::seconds(seconds * kPatience);
    while (::waitpid(process_, &status, WNOHANG) == 0) {
      if (Clock::now() > end) {
        ::kill(process_, SIGKILL);
        ::waitpid(process_, nullptr, 0);
        process_ = 0;
        r.code = 124;
        return r;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    process_ = 0;
    r.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    r.out = read(folder_.path() + "/out");
    r.err = read(folder_.path() + "/err");
    return r;
  }

 private:
  TemporaryFolder folder_;
  ::pid_t process_ = 0;
};

bool has_mpi() {
  static const bool has = Process("run mnist-linear --ranks 1 --transport mpi --steps 1", {})
                              .wait()
                              .err.find("this build has no MPI") == std::string::npos;
  return has;
}
std::vector<std::string> launches() {
  return has_mpi() ? std::vector<std::string>{"tcp", "mpi"} : std::vector<std::string>{"tcp"};
}

int free_port() {
  const int s = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof a;
  ::bind(s, reinterpret_cast<const sockaddr*>(&a), sizeof a);
  ::getsockname(s, reinterpret_cast<sockaddr*>(&a), &size);
  ::close(s);
  return ntohs(a.sin_port);
}

Environment torchrun(int rank, int size, int port) {
  return {{"RANK", std::to_string(rank)},
          {"WORLD_SIZE", std::to_string(size)},
          {"MASTER_ADDR", "127.0.0.1"},
          {"MASTER_PORT", std::to_string(port)}};
}

/// One line, and it is ours.
void expect_one_message(const std::string& err) {
  EXPECT_EQ(err.rfind("partita: ", 0), 0u) << err;
  EXPECT_EQ(std::count(err.begin(), err.end(), '\n'), 1) << err;
}

/// Steps that were completed are there, with the losses of a run that nothing happens to.
void expect_kept(const std::string& out, std::size_t steps, const Json& whole) {
  const Json j = Json::parse(out, nullptr, false);
  ASSERT_FALSE(j.is_discarded()) << out;
  EXPECT_EQ(j.at("complete"), false);
  EXPECT_THAT(j.at("reason").get<std::string>(), HasSubstr("rank "));
  ASSERT_EQ(j.at("loss").size(), steps);
  EXPECT_EQ(j.at("step_s").size(), steps);
  for (std::size_t k = 0; k < steps; ++k)
    EXPECT_NEAR(j.at("loss")[k].get<double>(), whole.at("loss")[k].get<double>(), 1e-6);
}

const std::string kPipeline = "run ../tiny.yaml --pp 2 --tp 2 --global-batch 4 --steps 4 --json ";

unsigned draw(std::mt19937& rng, unsigned below) { return static_cast<unsigned>(rng()) % below; }

/// The command with TMPDIR a file system of its own, so large and so mounted; nothing of it is
/// left.
class Mounted {
 public:
  /// Needs the right to mount.
  static bool possible() {
    const TemporaryFolder folder;
    const std::string line = fmt::format("{} sh -c 'mount -t tmpfs tmpfs {}' >/dev/null 2>&1",
                                         kNamespace, folder.path());
    static const bool can = std::system(line.c_str()) == 0;
    return can;
  }
  Ran run(const std::string& options, const std::string& arguments, int patience = 3) const {
    return test::run(arguments,
                     fmt::format("{0} sh -c 'mount -t tmpfs -o {1} tmpfs {2} && TMPDIR={2} exec "
                                 "\"$@\"' sh",
                                 kNamespace, options, folder_.path()),
                     patience);
  }
  const std::string& path() const { return folder_.path(); }

 private:
  static inline const std::string kNamespace = ::geteuid() == 0 ? "unshare -m" : "unshare -rm";
  TemporaryFolder folder_;
};
const char* const kNoMount = "file systems cannot be mounted here: not root, and no namespaces";

/// Rank, cause and instruction, in the one message.
void expect_names(const std::string& err, unsigned rank, unsigned step, const std::string& cause) {
  EXPECT_THAT(err, ::testing::ContainsRegex(fmt::format(
                       "rank {}(, which)? ({}).* step {}, .* in block ", rank, cause, step)));
}

TEST(Faults, ARankThatDiesOrStopsAtARandomInstructionIsNamedAndNothingIsLeft) {
  std::mt19937 rng(20261126);
  auto transports = launches();
  transports.push_back("threads");
  for (const std::string& transport : transports) {
    const Json whole =
        Json::parse(Process(kPipeline + "--transport " + transport, {}).wait().out, nullptr, false);
    ASSERT_FALSE(whole.is_discarded());
    EXPECT_EQ(whole.at("complete"), true);
    for (unsigned k = 0; k < 12; ++k) {
      const std::string what = std::vector<std::string>{"kill", "exit", "stop", "full"}[k % 4];
      // The others would end the process that all threads share.
      if (transport == "threads" && what != "full") continue;
      const unsigned rank = draw(rng, 4), step = draw(rng, 4), instruction = draw(rng, 150);
      const std::string fault = fmt::format("{}:{}:{}:{}", rank, step, instruction, what);
      SCOPED_TRACE(transport + " " + fault);
      const std::string mark = fmt::format("--seed 1 --timeout 1.{}{}", ::getpid(), k);
      const Ran r =
          Process(kPipeline + mark + " --transport " + transport, {{"PARTITA_TEST_FAULT", fault}})
              .wait();
      EXPECT_EQ(r.code, 3) << r.err;
      expect_one_message(r.err);
      expect_names(r.err, rank, step,
                   what == "kill"   ? "was ended by signal 9 .Killed. in"
                   : what == "exit" ? "ended with exit code 7 in"
                   : what == "full" ? "in"
                                    : "does not answer for|was stopped in");
      if (what == "full") {
        EXPECT_THAT(r.err, HasSubstr(": cannot write a file: the disk is full"));
      }
      expect_kept(r.out, step, whole);
      expect_nobody_left(fmt::format("1.{}{}", ::getpid(), k));
    }
  }
}

/// A rank whose mpirun vanishes hears nothing from it: it must notice by itself.
TEST(Faults, ARankEndsWithItsStarter) {
  const std::string seed = fmt::format("77{}", ::getpid());
  const std::string line = fmt::format(
      "env PARTITA_BOARD=/nowhere '{}' run mnist-linear --ranks 1 --transport threads --steps "
      "1000000 "
      "--no-check --seed {} >/dev/null 2>&1 & sleep 1",
      PARTITA_COMMAND, seed);
  ASSERT_EQ(std::system(line.c_str()), 0);  // the shell that started it has ended
  expect_nobody_left(seed);
}

TEST(Faults, TheInstructionIsTheVeryOne) {
  for (const std::string& transport : launches()) {
    const Ran r = Process("run mnist-linear --dp 4 --ranks 4 --steps 5 --transport " + transport,
                          {{"PARTITA_TEST_FAULT", "2:3:3:kill"}})
                      .wait();
    EXPECT_EQ(r.code, 3);
    EXPECT_EQ(r.err,
              "partita: rank 2 was ended by signal 9 (Killed) in step 3, forward of "
              "layers.0.linear in block forward 0, micro-batch 0; the others were stopped\n");
    EXPECT_THAT(r.out, HasSubstr("INCOMPLETE: 3 of 5 steps"));
  }
}

/// What a library says when it ends its process stands before what the launcher says of that.
TEST(Faults, ALibrarysLastWordsAreTold) {
  const Ran r = Process("run mnist-linear --dp 4 --ranks 4 --steps 5 --transport tcp",
                        {{"PARTITA_TEST_FAULT", "2:3:3:say"}})
                    .wait();
  EXPECT_EQ(r.code, 3);
  EXPECT_EQ(r.err,
            "a library's last words\npartita: rank 2 ended with exit code 7 in step 3, forward of "
            "layers.0.linear in block forward 0, micro-batch 0; the others were stopped\n");
}

std::vector<std::string> lines_of(const std::string& file) {
  std::istringstream in(read(file));
  std::vector<std::string> lines;
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

/// A small suite, killed at random, shows what it had, and goes on from there.
TEST(Faults, ASuiteNamesRankInstructionAndCaseAndGoesOn) {
  std::mt19937 rng(20261128);
  auto transports = launches();
  transports.push_back("threads");
  for (const std::string& transport : transports) {
    const TemporaryFolder whole_folder;
    const std::string line =
        "validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only ZeRO-1 --calibrate-only gpt "
        "--json "
        "--timeout 2 --transport " +
        transport + " --out ";
    const Ran whole = Process(line + whole_folder.path(), {}).wait(120);
    ASSERT_TRUE(whole.code == 0 || whole.code == 1) << whole.err;
    const auto all = lines_of(whole_folder.path() + "/suite.jsonl").size() - 1;
    ASSERT_GT(all, 5u);
    const std::vector<std::string> faults{"kill", "exit", "stop", "full", "kill", "stop"};
    for (std::size_t k = 0; k < faults.size(); ++k) {
      const std::string& what = faults[k];
      if (transport == "threads" && what != "full") continue;
      // The first in the first program, the second in one of the last, which are cases of the
      // suite.
      const unsigned program = k == 0   ? 0
                               : k == 1 ? static_cast<unsigned>(all) - 1
                                        : draw(rng, static_cast<unsigned>(all));
      const unsigned rank = draw(rng, 2), step = draw(rng, 2);
      const std::string fault =
          fmt::format("{}:{}:{}:{}:{}", rank, step, draw(rng, 3), what, program);
      SCOPED_TRACE(transport + " " + fault);
      const TemporaryFolder folder;
      const Ran r = Process(line + folder.path(), {{"PARTITA_TEST_FAULT", fault}}).wait(60);
      EXPECT_EQ(r.code, 3) << r.err;
      const std::string said = without_progress(r.err);
      expect_one_message(said);
      EXPECT_THAT(said, ::testing::ContainsRegex(
                            fmt::format("rank {}(, which)? ({}).* step {}, .* in block ", rank,
                                        what == "kill"   ? "was ended by signal 9 .Killed. in"
                                        : what == "exit" ? "ended with exit code 7 in"
                                        : what == "full" ? "in"
                                                         : "does not answer for|was stopped in",
                                        step)));
      EXPECT_THAT(said, ::testing::ContainsRegex(" of case '|on 2 ranks"));
      expect_nobody_left(folder.path());
      const Json j = Json::parse(r.out, nullptr, false);
      ASSERT_FALSE(j.is_discarded()) << r.out;
      EXPECT_EQ(j.at("complete"), false);
      EXPECT_EQ(j.at("reason").get<std::string>() + "\n", said.substr(9));
      // A unit may be several programs.
      const auto before = lines_of(folder.path() + "/suite-journal.jsonl");
      EXPECT_EQ(j.at("measurements").get<std::size_t>(), before.size() - 1);
      EXPECT_LE(before.size() - 1, program);
      EXPECT_GE(before.size() + 3, std::min<std::size_t>(program, all));
      std::size_t of_cases = 0;
      for (const Json& c : j.at("suite").at("cases")) {
        of_cases +=
            (c.at("equal_to_reference").is_null() ? 0 : 1) + c.at("rounds").get<std::size_t>();
        EXPECT_EQ(c.at("measured_s").is_null(), c.at("rounds") == 0);
      }
      EXPECT_LE(of_cases, before.size() - 1);
      if (k > 1) continue;
      const Ran again = Process(line + folder.path(), {}).wait(120);
      EXPECT_TRUE(again.code == 0 || again.code == 1) << again.err;
      EXPECT_EQ(without_progress(again.err), "");
      if (before.size() > 1) {
        EXPECT_THAT(again.err, HasSubstr(fmt::format("progress: {} of the last validation's "
                                                     "measurements are kept\n",
                                                     before.size() - 1)));
      }
      const auto after = lines_of(folder.path() + "/suite.jsonl");
      EXPECT_EQ(after.size() - 1, all);
      for (std::size_t l = 0; l < before.size(); ++l) EXPECT_EQ(after[l], before[l]);
      const Json w = Json::parse(whole.out), a = Json::parse(again.out);
      EXPECT_EQ(a.at("suite").at("cases").size(), w.at("suite").at("cases").size());
      for (std::size_t n = 0; n < a.at("suite").at("cases").size(); ++n) {
        const Json& x = j.at("suite").at("cases").at(n);
        const Json& y = a.at("suite").at("cases").at(n);
        if (x.at("rounds") == 1) {
          EXPECT_DOUBLE_EQ(x.at("measured_s").get<double>(), y.at("measured_s").get<double>());
        }
        EXPECT_EQ(y.at("memory_error"), w.at("suite").at("cases").at(n).at("memory_error"));
      }
      if (k == 1) {
        EXPECT_EQ(of_cases + 1, 2 * j.at("suite").at("cases").size()) << "all but the last";
      }
      for (const Json& c : a.at("suite").at("cases"))
        EXPECT_TRUE(c.at("equal_to_reference").get<bool>());
    }
  }
}

/// Without a folder too: the ranks' journal is memory that the command shares with them.
TEST(Faults, ASuiteWithoutAFolderShowsWhatItHad) {
  for (const std::string& transport : launches()) {
    const Ran r = Process(
                      "validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only ZeRO-1 "
                      "--calibrate-only gpt "
                      "--transport " +
                          transport,
                      {{"PARTITA_TEST_FAULT", "1:1:0:kill:3"}})
                      .wait(60);
    EXPECT_EQ(r.code, 3) << r.err;
    expect_one_message(without_progress(r.err));
    EXPECT_THAT(r.out, AllOf(HasSubstr("INCOMPLETE: 3 measurements\n"), HasSubstr("ZeRO-1"),
                             HasSubstr("equal")));
  }
}

/// As torchrun and srun start them: nobody watches but the ranks themselves.
TEST(Faults, SurvivorsOnTheirOwnEndWithOneMessage) {
  std::mt19937 rng(20261127);
  const Json whole =
      Json::parse(Process(kPipeline + "--transport tcp", {}).wait().out, nullptr, false);
  ASSERT_FALSE(whole.is_discarded());
  for (unsigned k = 0; k < 12; ++k) {
    const std::string what = std::vector<std::string>{"kill", "exit", "stop", "full"}[k % 4];
    const unsigned victim = k < 4 ? 0 : draw(rng, 4);
    const unsigned step = draw(rng, 4), instruction = draw(rng, 150);
    const std::string fault = fmt::format("{}:{}:{}:{}", victim, step, instruction, what);
    SCOPED_TRACE(fault);
    const int port = free_port();
    std::vector<std::unique_ptr<Process>> ranks;
    for (int r = 0; r < 4; ++r) {
      Environment e = torchrun(r, 4, port);
      e["PARTITA_TEST_FAULT"] = fault;
      ranks.push_back(std::make_unique<Process>(kPipeline + "--timeout 1", e));
    }
    std::string said;
    // With rank 0 gone the next shows what was done.
    const unsigned shows = victim == 0 && what != "full" ? 1 : 0;
    for (unsigned r = 0; r < 4; ++r) {
      if (r == victim && what != "full") continue;
      const Ran ran = ranks[r]->wait();
      EXPECT_EQ(ran.code, 3) << "rank " << r << ": " << ran.err;
      said += ran.err;
      if (r == shows) {
        expect_kept(ran.out, step, whole);
      } else {
        EXPECT_EQ(ran.out, "") << "only one prints";
      }
    }
    expect_one_message(said);
    expect_names(said, victim, step,
                 what == "stop"   ? "does not answer for"
                 : what == "full" ? "in"
                                  : "died in");
  }
}

TEST(Launch, RanksOfTorchrunAndSrunMeetAndOnlyRankZeroPrints) {
  const std::string line = "run mnist-linear --dp 3 --ranks 3 --steps 5 --json";
  for (const bool slurm : {false, true}) {
    const int port = free_port();
    std::vector<std::unique_ptr<Process>> ranks;
    for (int r = 2; r >= 0; --r) {
      Environment e = torchrun(r, 3, port);
      if (slurm) {
        e = {{"SLURM_PROCID", std::to_string(r)},
             {"SLURM_NTASKS", "3"},
             {"SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"},
             {"SLURM_JOB_ID", std::to_string(port)}};
      }
      ranks.push_back(std::make_unique<Process>(line, e));
      // Rank 0 comes last: the others wait for it.
      if (r == 1) std::this_thread::sleep_for(std::chrono::milliseconds(200));
    }
    for (int r = 2; r >= 0; --r) {
      const Ran ran = ranks[static_cast<std::size_t>(2 - r)]->wait();
      EXPECT_EQ(ran.code, 0) << ran.err;
      EXPECT_EQ(without_progress(ran.err), "");
      if (r > 0) {
        EXPECT_EQ(ran.out, "");
        continue;
      }
      const Json j = Json::parse(ran.out, nullptr, false);
      ASSERT_FALSE(j.is_discarded());
      EXPECT_EQ(j.at("transport"), "tcp");
      EXPECT_TRUE(j.at("equal_to_serial").get<bool>());
      EXPECT_GT(j.at("clock_uncertainty_s").get<double>(), 0);
    }
  }
}

/// A suite too can be started by torchrun; with a folder its ranks' death loses nothing.
TEST(Launch, RanksOfTorchrunMeasureASuite) {
  const TemporaryFolder folder;
  const std::string line =
      "validate --backend cpu --ranks 2 --rounds 1 --steps 1 --only ZeRO-1 --calibrate-only gpt "
      "--json --timeout 2 "
      "--out " +
      folder.path();
  for (const std::string& fault : {std::string("0:1:0:kill:5"), std::string("1:1:0:kill:9"),
                                   std::string("1:1:0:full:0"), std::string("9:0:0:kill:0")}) {
    SCOPED_TRACE(fault);
    const int port = free_port();
    Environment e0 = torchrun(0, 2, port), e1 = torchrun(1, 2, port);
    e0["PARTITA_TEST_FAULT"] = e1["PARTITA_TEST_FAULT"] = fault;
    Process one(line, e1), zero(line, e0);
    const Ran r = zero.wait(60), q = one.wait(60);
    EXPECT_EQ(q.out, "");
    if (fault[0] == '9') {
      EXPECT_TRUE(r.code == 0 || r.code == 1) << r.err;
      EXPECT_EQ(q.code, 0) << q.err;
      EXPECT_EQ(Json::parse(r.out).at("transport"), "tcp");
      continue;
    }
    const bool zero_lives = fault[0] == '1';
    const std::string said = without_progress(zero_lives ? r.err : q.err);
    EXPECT_EQ(zero_lives ? r.code : q.code, 3) << r.err << q.err;
    expect_one_message(said);
    EXPECT_THAT(said, ::testing::ContainsRegex(
                          fmt::format("rank {} .*step 1, .*(on 2 ranks|of case)", fault[0])));
    EXPECT_EQ(without_progress(zero_lives ? q.err : r.err), "");
    if (zero_lives) {
      EXPECT_EQ(Json::parse(r.out).at("complete"), false);
    }
    EXPECT_GE(lines_of(folder.path() + "/suite-journal.jsonl").size(), 5u) << "nothing is lost";
  }
}

TEST(Launch, MissingAndForeignRanks) {
  int port = free_port();
  const std::string line = "run mnist-linear --dp 4 --ranks 4 --steps 2 --rendezvous-timeout 1";
  {
    Process zero(line, torchrun(0, 4, port)), one(line, torchrun(1, 4, port)),
        two(line, torchrun(2, 4, port));
    const Ran r = zero.wait(), q = one.wait(), p = two.wait();
    EXPECT_EQ(r.code, 3);
    EXPECT_EQ(r.err, fmt::format("partita: rank 3 of 4 did not come to the rendezvous at "
                                 "127.0.0.1:{} within 1 s; start it with the same MASTER_ADDR and "
                                 "MASTER_PORT\n",
                                 port));
    EXPECT_EQ(q.code, 3);
    EXPECT_EQ(p.code, 3);
    EXPECT_EQ(q.err + p.err + r.out + q.out + p.out, "");
  }
  port = free_port();
  const std::string two = "run mnist-linear --ranks 2 --rendezvous-timeout 20 --dp 2 --steps ";
  Process zero(two + "2", torchrun(0, 2, port)), one(two + "3", torchrun(1, 2, port));
  const Ran r = zero.wait(), q = one.wait();
  EXPECT_EQ(r.code, 2);
  EXPECT_EQ(r.err,
            "partita: rendezvous: rank 1 is to run steps 3, and rank 0 steps 2; start all with the "
            "same arguments\n");
  EXPECT_EQ(q.code, 2);
  EXPECT_EQ(without_progress(q.err), "");
}

TEST(Launch, EnvironmentsThatCannotBeAreTheUsersMistake) {
  const auto refused = [](const std::string& arguments, const Environment& e) {
    const Ran r = Process("run mnist-linear " + arguments, e).wait();
    EXPECT_EQ(r.code, 2) << r.err;
    EXPECT_EQ(r.out, "");
    expect_one_message(r.err);
    return r.err;
  };
  Environment e = torchrun(5, 4, 29500);
  EXPECT_EQ(refused("--ranks 4", e),
            "partita: RANK: 5 is no rank of WORLD_SIZE = 4; ranks are 0 to 3\n");
  e["RANK"] = "first";
  EXPECT_THAT(refused("--ranks 4", e), HasSubstr("partita: RANK: 'first' is not a whole number"));
  e["RANK"] = "1";
  e.erase("MASTER_PORT");
  EXPECT_THAT(refused("--ranks 4", e), HasSubstr("partita: MASTER_PORT: is not set, but RANK is"));
  EXPECT_EQ(refused("--ranks 2", torchrun(1, 4, 29500)),
            "partita: --ranks: the plan has 2, but by RANK and WORLD_SIZE 4 were started; start as "
            "many, or change the plan\n");
  EXPECT_THAT(refused("--ranks 2 --transport udp", {}),
              HasSubstr("'udp' is unknown; use threads, mpi or tcp"));
  EXPECT_THAT(
      refused("--ranks 2", {{"PARTITA_TEST_FAULT", "1:2:kill"}}),
      HasSubstr("'1:2:kill' is not RANK:STEP:INSTRUCTION:kill, stop, exit, say or full, and "));
  Environment nowhere = torchrun(0, 2, 29500);
  nowhere["MASTER_ADDR"] = "no-such-host.invalid";
  EXPECT_THAT(refused("--ranks 2", nowhere), HasSubstr("MASTER_ADDR: 'no-such-host.invalid'"));
  if (!has_mpi()) return;
  EXPECT_THAT(refused("--ranks 2 --transport mpi", torchrun(1, 2, 29500)),
              HasSubstr("--transport: is mpi, but by RANK and WORLD_SIZE another launcher"));
  EXPECT_THAT(refused("--ranks 2 --transport tcp", {{"OMPI_COMM_WORLD_SIZE", "2"}}),
              HasSubstr("--transport: is tcp, but OMPI_COMM_WORLD_SIZE is set"));
}

TEST(Launch, InterruptedOrKilledItLeavesNobody) {
  for (const std::string& transport : launches()) {
    for (const int signal : {SIGINT, SIGTERM, SIGKILL}) {
      SCOPED_TRACE(fmt::format("{} signal {}", transport, signal));
      const std::string mark = fmt::format("1{}{}", ::getpid(), signal);
      Process p("run mnist-linear --dp 3 --ranks 3 --steps 1000000 --no-check --seed " + mark +
                    " --transport " + transport,
                {});
      // The command and its ranks.
      for (int k = 0; k < 100 && processes_with(mark).size() < 4; ++k)
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      EXPECT_GE(processes_with(mark).size(), 4u);
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      ::kill(p.id(), signal);
      const Ran r = p.wait();
      EXPECT_EQ(r.code, 128 + signal) << r.err;
      if (signal != SIGKILL) expect_one_message(r.err);
      expect_nobody_left(mark);
    }
  }
}

/// Nobody is left to notice but who has started them.
TEST(Launch, RanksThatAreAllStoppedAreEnded) {
  for (const std::string& transport : launches()) {
    SCOPED_TRACE(transport);
    const std::string mark = fmt::format("2{}", ::getpid());
    Process p(
        "run mnist-linear --dp 2 --ranks 2 --steps 1000000 --no-check --timeout 1 --json --seed " +
            mark + " --transport " + transport,
        {});
    const auto ranks = [&] {
      std::vector<int> list;
      for (const int id : processes_with(mark)) {
        if (id != p.id() && read(fmt::format("/proc/{}/cmdline", id)).rfind("mpirun", 0) != 0)
          list.push_back(id);
      }
      return list;
    };
    // On a busy machine a second passes before their first step.
    const auto worked = [](int id) {
      std::istringstream stat(read(fmt::format("/proc/{}/stat", id)));
      std::string word;
      std::int64_t ticks = 0;
      for (int field = 1; field <= 15 && stat >> word; ++field) {
        if (field >= 14) ticks += std::atoll(word.c_str());
      }
      return ticks >= ::sysconf(_SC_CLK_TCK);
    };
    const auto all_worked = [&] {
      const auto list = ranks();
      return list.size() == 2 && worked(list[0]) && worked(list[1]);
    };
    for (int k = 0; k < 1200 && !all_worked(); ++k)
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const auto them = ranks();
    ASSERT_EQ(them.size(), 2u);
    for (const int id : them) ::kill(id, SIGSTOP);
    const Ran r = p.wait();
    EXPECT_EQ(r.code, 3);
    expect_one_message(r.err);
    EXPECT_THAT(r.err,
                ::testing::MatchesRegex("partita: rank 0 was stopped in .*step [0-9]+.* for 5 s; "
                                        "the others were ended\n"));
    const Json j = Json::parse(r.out, nullptr, false);
    ASSERT_FALSE(j.is_discarded());
    EXPECT_GT(j.at("loss").size(), 0u);
    expect_nobody_left(mark);
  }
}

TEST(Files, AFullDiskIsSaidNeverSilence) {
  std::vector<std::string> lines{"model gpt2",
                                 "topo dgx-h100:1 --json",
                                 "simulate gpt2 dgx-h100:1 --json",
                                 "run mnist-linear --ranks 1 --steps 1 --transport threads --json",
                                 "whatif gpt2 dgx-h100:1 --vary plan.tp=1,2 --csv",
                                 "--help"};
  for (const std::string& t : launches())
    lines.push_back("run mnist-linear --dp 2 --ranks 2 --steps 1 --json --transport " + t);
  for (const std::string& line : lines) {
    const Ran r = run(line + " >/dev/full");
    EXPECT_EQ(r.code, 3) << line;
    EXPECT_EQ(r.err,
              "partita: the output cannot be written; is the disk full, or the reader gone?\n")
        << line;
  }
  lines = {"simulate gpt2 dgx-h100:1 --trace /dev/full",
           "run mnist-linear --ranks 2 --dp 2 --steps 1 --transport threads --trace /dev/full"};
  for (const std::string& t : launches())
    lines.push_back("run mnist-linear --dp 2 --ranks 2 --steps 1 --trace /dev/full --transport " +
                    t);
  for (const std::string& line : lines) {
    const Ran r = run(line);
    // The figures are there all the same.
    EXPECT_EQ(r.code, 3) << line;
    EXPECT_EQ(r.err, "partita: --trace: writing /dev/full failed; is the disk full?\n") << line;
    EXPECT_NE(r.out.find("step time"), std::string::npos) << line;
  }
  const Ran save =
      run("plan gpt2 dgx-h100:1 --layers 2 --seq 128 --global-batch 8 --save /dev/full");
  EXPECT_EQ(save.code, 2);
  EXPECT_THAT(save.err, HasSubstr("--save: cannot write /dev/full"));
  // A profile is larger than the file may become.
  const TemporaryFolder folder;
  const Ran profile =
      run("calibrate --backend cpu --ranks 1 --rounds 1 --steps 1 --only gpt --out '" +
              folder.path() + "'",
          "sh -c 'trap \"\" XFSZ; ulimit -f 8; exec \"$@\"' sh");
  EXPECT_EQ(profile.code, 3) << profile.err;
  EXPECT_THAT(profile.err,
              AllOf(HasSubstr("--out: cannot write "),
                    HasSubstr("File too large; make room and start again: what is in it is kept")));
  EXPECT_FALSE(std::filesystem::exists(folder.path() + "/device.yaml")) << "no half a profile";
}

const std::string kShards =
    "run mnist-linear --dp 2 --loader --set sharded_storage=true --steps 2 ";

TEST(Files, ADiskThatShardsFillNamesRankAndInstruction) {
  if (!Mounted::possible()) GTEST_SKIP() << kNoMount;
  auto transports = launches();
  transports.push_back("threads");
  for (const std::string& transport : transports) {
    SCOPED_TRACE(transport);
    const Mounted disk;
    // mpirun needs 9 MiB of it first, and keeps 8.1; two shards of 1.5 MiB do not fit in the rest.
    const std::string size = transport == "mpi" ? "size=9400k" : "size=1m";
    const std::string line = kShards + "--micro-batch 512 --json --transport " + transport;
    const Ran fits = disk.run("size=30m", line);
    EXPECT_EQ(fits.code, 0) << fits.err;
    const Ran r = disk.run(size, line);
    EXPECT_EQ(r.code, 3) << r.err;
    expect_one_message(r.err);
    EXPECT_THAT(r.err, ::testing::MatchesRegex(
                           "partita: rank [0-3] in step 0, load of [^:]* in block [^:]*: "
                           "cannot write a shard of [0-9]+ more bytes in TMPDIR: " +
                           disk.path() +
                           ": the disk is full; make room, or set TMPDIR to a folder "
                           "with room\n"));
    expect_kept(r.out, 0, {});
  }
  const Mounted disk;
  const Ran startup =
      disk.run("size=64k", "startup gpt2 'cpu-host:2 devices' --measure --repeats 1");
  EXPECT_EQ(startup.code, 3);
  EXPECT_EQ(startup.err, "partita: TMPDIR: " + disk.path() +
                             ": cannot write the parameters' file: the disk is full; make room, or "
                             "set TMPDIR to a folder with room for it\n");
}

TEST(Files, AFolderForTemporaryFilesThatIsNone) {
  std::vector<std::string> lines{kShards + "--transport threads", kShards + "--transport tcp",
                                 "startup ../tiny.yaml cpu-host:2 --measure --repeats 1",
                                 "validate --backend cpu"};
  if (has_mpi()) lines.push_back("run mnist-linear --dp 2 --ranks 2 --steps 1 --transport mpi");
  const TemporaryFolder folder;
  write(folder.path() + "/file", "");
  for (const std::string& line : lines) {
    for (const auto& [place, why] : std::vector<std::pair<std::string, std::string>>{
             {folder.path() + "/none", "No such file or directory"},
             {folder.path() + "/file", "Not a directory"}}) {
      SCOPED_TRACE(line + " in " + place);
      const Ran r = Process(line, {{"TMPDIR", place}}).wait();
      EXPECT_EQ(r.code, 2);
      expect_one_message(r.err);
      EXPECT_THAT(r.err, HasSubstr("TMPDIR: " + place +
                                   ": temporary files cannot be written there: " + why +
                                   "; set TMPDIR to a folder that can be written\n"));
    }
    const Ran r = Process(line, {{"TMPDIR", ""}}).wait();
    EXPECT_EQ(r.code, 2);
    EXPECT_THAT(r.err, HasSubstr("TMPDIR: is set, but empty; set it to a folder, or unset it\n"));
  }
  if (!Mounted::possible()) GTEST_SKIP() << kNoMount;
  for (const std::string& line : lines) {
    const Mounted disk;
    const Ran r = disk.run("ro", line);
    EXPECT_EQ(r.code, 2) << line;
    expect_one_message(r.err);
    EXPECT_THAT(r.err, HasSubstr(disk.path() + ": temporary files cannot be written there: "
                                               "Read-only file system; set TMPDIR to"));
  }
}

TEST(Launch, MpirunWithoutRoomForItsFilesIsNotStarted) {
  if (!has_mpi()) GTEST_SKIP() << "this build has no MPI";
  if (!Mounted::possible()) GTEST_SKIP() << kNoMount;
  for (const auto& [options, has] : std::vector<std::pair<std::string, std::string>>{
           {"size=64k", "64 KiB"},
           {"size=5m", "5 MiB"},
           {"size=20m,nr_inodes=20", "no room for more files"}}) {
    const Mounted disk;
    const Ran r = disk.run(options, "run mnist-linear --dp 2 --ranks 2 --steps 1 --transport mpi");
    EXPECT_EQ(r.code, 3);
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err,
              fmt::format("partita: TMPDIR: {}: the disk is full: it has {}, and mpirun needs "
                          "9.016 MiB for 2 ranks; make room, set TMPDIR to another folder, or "
                          "use --transport tcp or threads\n",
                          disk.path(), has));
  }
  // What is asked for is enough.
  const Mounted disk;
  const Ran r =
      disk.run("size=9248k", "run mnist-linear --dp 2 --ranks 2 --steps 1 --transport mpi");
  EXPECT_EQ(r.code, 0) << r.err;
}

TEST(Launch, AnMpirunThatHangsIsEnded) {
  if (!has_mpi()) GTEST_SKIP() << "this build has no MPI";
  const std::string mark = fmt::format("1000.{}", ::getpid());
  const std::string path = std::getenv("PATH");
  const auto with = [&](const std::string& script, const std::string& arguments) {
    const TemporaryFolder folder;
    write(folder.path() + "/mpirun", "#!/bin/sh\n" + script);
    std::filesystem::permissions(folder.path() + "/mpirun", std::filesystem::perms::owner_all);
    const Ran r =
        Process("run mnist-linear --dp 2 --ranks 2 --steps 1 --transport mpi " + arguments,
                {{"PATH", folder.path() + ":" + path}})
            .wait();
    expect_nobody_left(mark);
    return r;
  };
  const std::string wait = "--rendezvous-timeout 0.5 ";
  // It brings nobody forth and does not even end when it is asked to.
  const Ran r = with("echo it has lost its way >&2\ntrap '' TERM\nexec sleep " + mark, wait);
  EXPECT_EQ(r.code, 3);
  EXPECT_THAT(r.err,
              ::testing::MatchesRegex(
                  "partita: mpirun has started no rank within [0-9.]+ s; it says 'it has lost "
                  "its way'; wait longer by --rendezvous-timeout, or use --transport tcp or "
                  "threads\n"));
  EXPECT_EQ(with("exec sleep " + mark, wait).code, 3);
  // Its ranks end, and it does not: what 4.1 does when it has no room.
  const Ran left = with("sleep 2 &\necho no room >&2\nexec sleep " + mark, "--timeout 1 ");
  EXPECT_EQ(left.code, 3);
  EXPECT_EQ(left.err,
            "partita: mpirun has not ended for 5 s after its ranks have; it says 'no room'; use "
            "--transport tcp or threads\n");
}

TEST(Files, TooFewRanksAndForeignProfiles) {
  const Ran few = run("run mnist-linear --ranks 4 --dp 2 --tp 4");
  EXPECT_EQ(few.code, 2);
  expect_one_message(few.err);
  const TemporaryFolder folder;
  write(folder.path() + "/old.yaml", "schema: partita.topology/99\nname: x\n");
  for (const std::string& t : {std::string("threads"), std::string("tcp")}) {
    const Ran r = run("run mnist-linear --ranks 2 --dp 2 --steps 1 --transport " + t +
                      " --topology '" + folder.path() + "/old.yaml'");
    EXPECT_EQ(r.code, 2);
    EXPECT_THAT(r.err, HasSubstr("partita.topology/99"));
    expect_one_message(r.err);
  }
  // A profile that was measured elsewhere.
  write(folder.path() + "/cluster.yaml",
        "schema: partita.topology/1\nname: elsewhere\nsource: s\nnodes:\n  - count: 1\n"
        "    cpu_vendor: other\n    vertices:\n      'rank[0-1]': {kind: device, device: "
        "device.yaml}\n      memory: {kind: cpu}\n    links:\n      - {from: 'rank[0-1]', to: "
        "memory, kind: other, bandwidth: 10 GB/s, latency: 1 us}\n");
  const auto profile = [&](const std::string& machine) {
    write(folder.path() + "/device.yaml",
          "schema: partita.device/1\nname: cpu\nsource: 'measured by partita calibrate 0.1.0, "
          "2026-11-24, " +
              machine +
              ", Linux 6.1, ranks as threads'\nmemory: 4 GiB\n"
              "usable_memory: 3 GiB\nmemory_bandwidth: 10 GB/s\nmatrix_rates: {fp32: 80 GFLOP/s, "
              "bf16: "
              "80 GFLOP/s, fp16: 80 GFLOP/s}\nvector_rate: 20 GFLOP/s\nmatrix_efficiency: 0.6\n"
              "memory_efficiency: 0.8\nkernel_latency: 1 us\nmultiprocessors: 2\n");
    return run("run mnist-linear --ranks 2 --dp 2 --steps 1 --transport threads --topology '" +
               folder.path() + "/cluster.yaml'");
  };
  const Ran foreign = profile("3 cores of Zilog Z80 CPU @ 4 MHz");
  EXPECT_EQ(foreign.code, 2) << foreign.err;
  EXPECT_THAT(foreign.err, HasSubstr("was measured on another machine (3 cores of Zilog Z80 CPU @ "
                                     "4 MHz) than this ("));
  const auto here = foreign.err.find("than this (") + 11;
  const Ran own = profile(foreign.err.substr(here, foreign.err.rfind(");") - here));
  EXPECT_EQ(own.code, 0) << own.err;
  if (!has_mpi()) return;
  // By mpirun itself, two ranks for a plan of four.
  const Ran r = run("run mnist-linear --dp 4 --ranks 4 --steps 1",
                    "env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
                    "OMPI_MCA_rmaps_base_oversubscribe=1 mpirun -n 2");
  EXPECT_EQ(r.code, 2) << r.err;
  EXPECT_THAT(r.err,
              HasSubstr("partita: --ranks: the launcher started 2 ranks and the plan has 4"));
}

/// What is sent is what the program says: every byte on every link over sockets, every call and its
/// payload over MPI.
TEST(Traffic, IsThatOfTheProgram) {
  const std::vector<std::string> plans{"tiny.yaml --dp 2 --zero 1",
                                       "tiny.yaml --dp 2 --zero 2 --global-batch 4",
                                       "tiny.yaml --dp 3 --zero 3",
                                       "tiny.yaml --tp 2",
                                       "tiny.yaml --tp 2 --sequence-parallel",
                                       "tiny.yaml --tp 2 --dp 2 --sequence-parallel --zero 1",
                                       "tiny.yaml --pp 2 --global-batch 4",
                                       "tiny.yaml --pp 2 --tp 2 --global-batch 4",
                                       "tiny.yaml --pp 2 --global-batch 4 --schedule zb-h1",
                                       "tiny.yaml --pp 2 --virtual-stages 2 --global-batch 4",
                                       "tiny.yaml --cp 2 --context-exchange ring",
                                       "tiny.yaml --cp 2 --context-exchange all_to_all",
                                       "tiny.yaml --cp 2 --context-exchange all_gather",
                                       "tiny.yaml --dp 2 --tp 2 --loader --recompute full",
                                       "tiny.yaml --dp 2 --strategy dataparallel"};
  if (!has_mpi()) std::fprintf(stderr, "over tcp only: this build has no MPI\n");
  for (const std::string& transport : launches()) {
    std::int64_t counted = 0;
    for (const std::string& plan : plans) {
      SCOPED_TRACE(transport + " " + plan);
      const Ran r = run("run ../" + plan + " --steps 2 --no-check --json --transport " + transport);
      ASSERT_EQ(r.code, 0) << r.err;
      const Json j = Json::parse(r.out, nullptr, false);
      ASSERT_FALSE(j.is_discarded());
      for (const auto& rank : j.at("traffic")) {
        EXPECT_EQ(rank.at("measured"), rank.at("predicted")) << "rank " << rank.at("rank");
        for (const auto& [to, bytes] : rank.at("measured").at("bytes_to").items())
          counted += bytes.get<std::int64_t>();
        counted += rank.at("measured").at("send_bytes").get<std::int64_t>();
        for (const auto& [kind, c] : rank.at("measured").at("collectives").items())
          counted += c.at("payload_bytes").get<std::int64_t>();
      }
    }
    EXPECT_GT(counted, 100'000) << "something was sent";
  }
}

}  // namespace
}  // namespace partita::test
