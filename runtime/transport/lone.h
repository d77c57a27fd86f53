// runtime/transport/lone.h: a rank whose peers are not there (docs/replay.md).
#pragma once

#include <memory>

#include "runtime/transport/transport.h"

namespace partita {

/// Sends go nowhere, nothing comes, nobody is waited for.
std::unique_ptr<Transport> lone_transport(int rank, int size);

}  // namespace partita
