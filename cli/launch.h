// cli/launch.h: the command starts its own ranks.
#pragma once

#include <string>

namespace partita::cli {

/// Runs this command line again as `ranks` processes under mpirun; returns the exit code. What
/// mpirun says about a failed rank becomes one message on stderr. InputError without mpirun.
int launch_mpi(int ranks);

}  // namespace partita::cli
