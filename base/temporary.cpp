#include "base/temporary.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/error.h"

namespace partita {

TemporaryPlace temporary_place() {
  TemporaryPlace place{"/tmp", ""};
  for (const char* name : {"TMPDIR", "TEMP", "TMP"}) {
    const char* value = std::getenv(name);
    if (value == nullptr) continue;
    if (*value == '\0')
      throw InputError(name, "is set, but empty; set it to a folder, or unset it");
    place = {value, name};
    break;
  }
  struct stat info {};
  std::string why;
  if (::stat(place.folder.c_str(), &info) != 0) {
    why = std::strerror(errno);
  } else if (!S_ISDIR(info.st_mode)) {
    why = std::strerror(ENOTDIR);
  } else if (::access(place.folder.c_str(), W_OK | X_OK) != 0) {
    why = std::strerror(errno);
  } else {
    return place;
  }
  const std::string message = fmt::format(
      "temporary files cannot be written there: {}; set TMPDIR to a folder that can be written",
      why);
  if (place.variable.empty()) throw MachineError(fmt::format("{}: {}", place.folder, message));
  throw InputError(place.name(), message);
}

std::string temporary_folder() { return temporary_place().folder; }

}  // namespace partita
