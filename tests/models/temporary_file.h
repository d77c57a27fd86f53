// tests/models/temporary_file.h: a file that lives as long as the test needs it.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "base/yaml.h"

namespace partita {

/// `name` in a folder of its own, so that tests in parallel don't meet.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& name, const std::string& body) {
    std::string pattern = (std::filesystem::temp_directory_path() / "partita-test-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
    path_ = folder_ + "/" + name;
    std::ofstream(path_, std::ios::binary) << body;
  }
  ~TemporaryFile() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::string& path() const { return path_; }
  const std::string& folder() const { return folder_; }

 private:
  std::string folder_, path_;
};

inline std::string data_file(const std::string& path) { return data_folder(path); }

}  // namespace partita
