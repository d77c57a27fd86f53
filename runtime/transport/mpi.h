// runtime/transport/mpi.h: ranks as processes under MPI. Present where CMake found MPI.
#pragma once

#include <memory>
#include <string>

#include "runtime/transport/transport.h"

namespace partita {

/// Was this process started by an MPI launcher (mpirun, srun)? Reads the environment only.
bool under_mpi_launcher();

/// Starts MPI for this process. `timeout_s`: without an answer of a peer. The transport ends MPI
/// when it goes; after abort() the process ends with exit code 3.
std::unique_ptr<Transport> mpi_transport(double timeout_s);

/// The first `ranks` ranks of a run that mpi_transport has started and still holds; for these to
/// call, all of them.
std::unique_ptr<Transport> mpi_part(double timeout_s, int ranks);

/// "Open MPI v4.1.4".
std::string mpi_version();

}  // namespace partita
