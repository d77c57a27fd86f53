// tests/cli/run.h: runs the built command as a user's shell would.
#pragma once

#include <string>
#include <vector>

namespace partita::test {

struct Ran {
  std::string out, err;
  int code = -1;  ///< 124: it did not end in time
};

/// `arguments` as typed in a shell, in tests/data/cli/bad. The path of the sources reads $SOURCE in
/// what comes back, so that texts do not depend on where the checkout lies. `before`: "taskset -c
/// 0". `patience`: how many times the usual time-out.
Ran run(const std::string& arguments, const std::string& before = "", int patience = 1);

/// `err` without the lines that say how far something long is: a busy machine has more of them.
std::string without_progress(const std::string& err);

/// Processes, but this one, whose command line has `text`; the second ends them and fails if some
/// are left after a while.
std::vector<int> processes_with(const std::string& text);
void expect_nobody_left(const std::string& text);

/// A file of the test data, and its replacement when PARTITA_UPDATE_GOLDENS=1.
bool updating();
std::string read(const std::string& path);
void write(const std::string& path, const std::string& text);

/// A new empty folder that ends with the object.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace partita::test
