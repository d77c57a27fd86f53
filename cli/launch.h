// cli/launch.h: the command starts its own ranks.
#pragma once

#include <memory>
#include <string>

#include "runtime/transport/board.h"

namespace partita::cli {

/// How the ranks ended.
struct Launched {
  int code = 0;
  std::string reason;    ///< one sentence; empty where nothing went wrong
  std::string output{};  ///< of ranks that failed after they had shown their figures
};

struct Patience {
  /// mpirun: within which all ranks must have come. Ranks over sockets see to that themselves.
  double start_s = 30;
  std::string longer;  ///< the flag for that, if there is one
  /// A rank that is stopped for as long is given up.
  double stopped_s = 8;
};

/// Runs this command line again as so many processes as the board has ranks, under mpirun or on
/// loopback, until all have ended: no process is left behind. On ^C they are ended too (code 130).
/// `describe` puts what a dead rank was doing in words. Without mpirun InputError, without room for
/// its files MachineError.
Launched launch_mpi(const Board& board, const Describe& describe, const Patience& patience);
Launched launch_tcp(const Board& board, const Describe& describe, const Patience& patience);

/// Is there a program of this name on the PATH?
bool on_path(const std::string& program);

/// What the ranks of an own launch find in their environment.
inline constexpr const char* kBoardVariable = "PARTITA_BOARD";
inline constexpr const char* kListenerVariable = "PARTITA_LISTENER";
inline constexpr const char* kJournalVariable = "PARTITA_JOURNAL";

/// In a rank of an own launch: ends the process with whoever started it. Under mpirun that is not
/// this command, and an mpirun that is killed while its ranks start tells them nothing.
void end_with_starter();

}  // namespace partita::cli
