// simulator/lower/startup.h: how parameters come to be where training needs them.
#pragma once

#include <string>
#include <string_view>

#include "simulator/program/program.h"

namespace partita {

enum class Startup : std::uint8_t {
  each,          ///< every rank draws its own piece from the counter-based generator
  broadcast,     ///< the first rank of each stage draws whole parameters and broadcasts them
  sharded_read,  ///< ranks that hold copies read a part each from storage, then gather
};
std::string_view name(Startup form);
/// Throws InputError{place, ...} with the names.
Startup parse_startup(std::string_view text, const std::string& place);

/// The program that fills the parameters of `training` (see lower()) before its first step: the
/// same mesh, roles, buffers and layouts, one block for each stage. Roles' ranks and state that one
/// rank has for all draw or read theirs themselves in any form; so does the host's copy of an
/// offloaded parameter.
Program startup_program(const Program& training, Startup form);

}  // namespace partita
