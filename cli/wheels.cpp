#include "cli/wheels.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <sstream>

namespace partita::cli {
namespace {

namespace fs = std::filesystem;

/// What lies in a folder that begins with `prefix`, in order; nothing where it cannot be read.
std::vector<fs::path> in(const fs::path& folder, const std::string& prefix) {
  std::vector<fs::path> all;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (it->path().filename().string().rfind(prefix, 0) == 0) all.push_back(it->path());
  }
  std::sort(all.begin(), all.end());
  return all;
}

/// Prefixes of Python environments: what has lib/python3*/site-packages.
std::vector<fs::path> prefixes() {
  std::vector<fs::path> all;
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value != nullptr ? value : "");
  };
  for (const char* name : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const std::string at = variable(name); !at.empty()) all.emplace_back(at);
  }
  std::istringstream path(variable("PATH"));
  for (std::string folder; std::getline(path, folder, ':');) {
    std::error_code error;
    // Not what it links to: an environment's python3 is the system's.
    if (!folder.empty() && fs::exists(fs::path(folder) / "python3", error)) {
      all.push_back(fs::path(folder).parent_path());
      break;
    }
  }
  all.emplace_back("/usr/local");
  if (const std::string home = variable("HOME"); !home.empty())
    all.push_back(fs::path(home) / ".local");
  all.emplace_back("/usr");
  return all;
}

/// "libcudart.so.13" of "libcudart.so.13: cannot open shared object file: ..."; "": it says else.
std::string missing_library(const std::string& why) {
  const std::size_t colon = why.find(": cannot open shared object file");
  if (colon == std::string::npos) return "";
  const std::string name = why.substr(0, colon);
  return name.find('/') == std::string::npos ? name : "";
}

}  // namespace

std::vector<fs::path> wheel_folders() {
  std::vector<fs::path> all;
  for (const fs::path& prefix : prefixes()) {
    for (const char* lib : {"lib", "lib64"}) {
      for (const fs::path& python : in(prefix / lib, "python3")) {
        for (const char* packages : {"site-packages", "dist-packages"}) {
          for (const fs::path& wheel : in(python / packages / "nvidia", "")) {
            std::error_code error;
            const fs::path folder = wheel / "lib";
            if (fs::is_directory(folder, error) &&
                std::find(all.begin(), all.end(), folder) == all.end())
              all.push_back(folder);
          }
        }
      }
    }
  }
  return all;
}

void* open_with_wheels(const fs::path& library, std::string& why) {
  const auto open = [&](const fs::path& file, int scope) {
    void* opened = ::dlopen(file.c_str(), RTLD_NOW | scope);
    if (opened == nullptr) why = ::dlerror();
    return opened;
  };
  void* opened = open(library, RTLD_LOCAL);
  if (opened != nullptr || missing_library(why).empty()) return opened;
  const std::vector<fs::path> folders = wheel_folders();
  // By need: what a library lacks is opened first, then the library once more.
  std::vector<fs::path> wanted{library};
  std::set<std::string> tried;
  fs::path wheels;  // of one environment they lie side by side
  while (!wanted.empty()) {
    opened = open(wanted.back(), wanted.size() == 1 ? RTLD_LOCAL : RTLD_GLOBAL);
    if (opened != nullptr) {
      wanted.pop_back();
      continue;
    }
    const std::string name = missing_library(why);
    const auto folder = std::find_if(folders.begin(), folders.end(), [&](const fs::path& f) {
      std::error_code error;
      return fs::exists(f / name, error);
    });
    if (name.empty() || !tried.insert(name).second || folder == folders.end()) return nullptr;
    wanted.push_back(*folder / name);
    wheels = folder->parent_path().parent_path();
  }
  for (const fs::path& wheel : in(wheels, "")) {
    for (const fs::path& cupti : in(wheel / "lib", "libcupti.so."))
      static_cast<void>(::dlopen(cupti.c_str(), RTLD_NOW | RTLD_GLOBAL));
  }
  return opened;
}

}  // namespace partita::cli
