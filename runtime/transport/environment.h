// runtime/transport/environment.h: which launcher started this process, read from the environment.
#pragma once

#include <functional>
#include <string>

namespace partita {

/// docs/transports.md, "Who started this process".
struct Launcher {
  enum class Kind { nobody, mpi, tcp };
  Kind kind = Kind::nobody;
  std::string what;  ///< "RANK and WORLD_SIZE", "srun", "OMPI_COMM_WORLD_SIZE"
  int rank = 0, size = 1;
  std::string host;  ///< where rank 0 listens
  int port = 0;
};

/// The value of an environment variable, or null.
using Variables = std::function<const char*(const char* name)>;

/// InputError, naming the variable, where the environment is incomplete or contradicts itself.
/// `mpi`: this build has it; without it MPI's launchers are passed over.
Launcher launcher_of(const Variables& variables, bool mpi);

/// The first host of Slurm's short form: "gpu[07-09,12],login" is gpu07. Empty for an empty list.
std::string first_host(const std::string& list);

}  // namespace partita
