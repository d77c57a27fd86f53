#include "cli/fault.h"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"

namespace partita::cli {

std::function<void(int, std::int64_t, std::size_t)> test_fault(std::int64_t program) {
  const char* text = std::getenv("PARTITA_TEST_FAULT");
  if (text == nullptr) return nullptr;
  std::vector<std::string> words{""};
  for (const char* c = text; *c != '\0'; ++c) {
    if (*c == ':') {
      words.emplace_back();
    } else {
      words.back() += *c;
    }
  }
  if (words.size() == 4) words.emplace_back("0");
  std::array<std::int64_t, 5> at{};
  bool good =
      words.size() == at.size() && (words[3] == "kill" || words[3] == "stop" ||
                                    words[3] == "exit" || words[3] == "say" || words[3] == "full");
  for (std::size_t k = 0; good && k < at.size(); ++k) {
    if (k == 3) continue;
    const auto [end, error] =
        std::from_chars(words[k].data(), words[k].data() + words[k].size(), at[k]);
    good = error == std::errc{} && end == words[k].data() + words[k].size() && at[k] >= 0;
  }
  if (!good)
    throw InputError(
        "PARTITA_TEST_FAULT",
        fmt::format("'{}' is not RANK:STEP:INSTRUCTION:kill, stop, exit, say or full, and "
                    ":PROGRAM where there are several",
                    text));
  if (at[4] != program) return nullptr;
  return [at, what = words[3]](int rank, std::int64_t step, std::size_t instruction) {
    if (rank != at[0] || step != at[1] || static_cast<std::int64_t>(instruction) < at[2]) return;
    if (what == "say") std::fputs("a library's last words\n", stderr);
    if (what == "exit" || what == "say") std::_Exit(7);
    if (what == "full") throw MachineError("cannot write a file: the disk is full");
    std::raise(what == "kill" ? SIGKILL : SIGSTOP);
  };
}

}  // namespace partita::cli
