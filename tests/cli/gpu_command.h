// tests/cli/gpu_command.h: the command beside a library that has the entry of the GPU backend.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

namespace partita {

/// In a folder of its own, with the command and the library it looks for.
class GpuCommand : public ::testing::Test {
 protected:
  explicit GpuCommand(const std::string& library) {
    folder_ = std::filesystem::temp_directory_path() /
              fmt::format("partita-gpu-{}", static_cast<int>(::getpid()));
    std::filesystem::create_directories(folder_);
    std::filesystem::copy_file(PARTITA_COMMAND, folder_ / "partita");
    std::filesystem::copy_file(library, folder_ / "libpartita_cuda.so");
  }
  ~GpuCommand() override { std::filesystem::remove_all(folder_); }

  /// `or_missed`: or 1, which says that a bound is missed. `before`: "env A=1", "mpirun -n 2".
  std::string run(const std::string& arguments, int expected, bool or_missed = false,
                  const std::string& before = "") const {
    const std::string command =
        fmt::format("timeout 100 {} '{}' {} 2>'{}'", before, (folder_ / "partita").string(),
                    arguments, (folder_ / "err").string());
    std::string out;
    std::FILE* pipe = ::popen(command.c_str(), "r");
    std::array<char, 4096> some{};
    while (const std::size_t n = std::fread(some.data(), 1, some.size(), pipe))
      out.append(some.data(), n);
    const int status = ::pclose(pipe);
    const int code = WEXITSTATUS(status);
    EXPECT_EQ(or_missed && code == 1 ? expected : code, expected) << command << "\n"
                                                                  << out << err();
    return out;
  }
  std::string err() const { return text_of(folder_ / "err"); }
  static std::string text_of(const std::filesystem::path& file) {
    std::ifstream in(file);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  std::filesystem::path folder_;
};

}  // namespace partita
