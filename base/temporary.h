// base/temporary.h: where temporary files go.
#pragma once

#include <string>

namespace partita {

/// The folder, and what it comes from ("TMPDIR").
struct TemporaryPlace {
  std::string folder, variable;  ///< no variable: the system's /tmp
  /// "TMPDIR: /x", or "/tmp".
  std::string name() const { return variable.empty() ? folder : variable + ": " + folder; }
};

/// TMPDIR, TEMP or TMP, else /tmp: the first that is set, as Open MPI looks for it. InputError
/// where a variable names no folder that can be written, MachineError where /tmp is none.
TemporaryPlace temporary_place();

/// Its folder alone.
std::string temporary_folder();

}  // namespace partita
