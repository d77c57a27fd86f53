// cli/wheels.h: NVIDIA's libraries where Python's wheels keep them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace partita::cli {

/// Folders nvidia/*/lib of the Python environments at hand, the active one's first: VIRTUAL_ENV,
/// CONDA_PREFIX, that of the python3 on the PATH, /usr/local, the user's own, /usr.
std::vector<std::filesystem::path> wheel_folders();

/// dlopen; a library that it needs and the system does not find is opened from a wheel before, and
/// CUPTI, which is looked for by name later, with them. Null, and `why`, where that is not enough.
void* open_with_wheels(const std::filesystem::path& library, std::string& why);

}  // namespace partita::cli
