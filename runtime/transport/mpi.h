// runtime/transport/mpi.h: ranks as processes under MPI. Present where CMake found MPI.
#pragma once

#include <memory>
#include <string>

#include "runtime/transport/board.h"

namespace partita {

struct MpiOptions {
  double timeout_s = 10;         ///< without an answer of a peer
  std::shared_ptr<Board> board;  ///< of the launch on this host; null: none
  Describe describe;             ///< instructions in words
};

/// Starts MPI for this process. The transport ends MPI when it goes; after abort() the process ends
/// with that exit code.
std::unique_ptr<Transport> mpi_transport(const MpiOptions& options);

/// The first `ranks` ranks of a run that mpi_transport has made, which must outlive it; for these
/// to call, all of them.
std::unique_ptr<Transport> mpi_part(Transport& world, double timeout_s, int ranks);

/// "Open MPI v4.1.4".
std::string mpi_version();

}  // namespace partita
