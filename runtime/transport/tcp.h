// runtime/transport/tcp.h: ranks as processes on any machines, over a mesh of sockets
// (docs/transports.md).
#pragma once

#include <memory>
#include <string>

#include "runtime/transport/board.h"
#include "runtime/transport/transport.h"

namespace partita {

struct TcpOptions {
  int rank = 0, size = 1;
  std::string host = "127.0.0.1";  ///< where rank 0 listens
  int port = 0;
  int listener = -1;         ///< rank 0: a socket that listens there already; taken over
  std::string key;           ///< in words: what all ranks must agree on
  double timeout_s = 10;     ///< of a receive
  double rendezvous_s = 30;  ///< until all have come
  std::shared_ptr<Board> board;
  Describe describe;  ///< instructions in words; null: their numbers
  std::function<Algorithm(CollectiveKind, int members)> algorithm;  ///< null: the defaults
  /// The process is this rank's alone: if its main thread does not end in time after a failure, the
  /// reader thread ends the process with exit code 3.
  bool own_process = false;
};

/// Meets the others. PeerError: a rank is missing or cannot be reached; InputError: the ranks were
/// started for different runs, or the address is wrong. ToldElsewhere: one of these, and rank 0
/// says it.
std::unique_ptr<Transport> tcp_transport(const TcpOptions& options);

/// The first `ranks` ranks of a run that tcp_transport has made, which must outlive it.
std::unique_ptr<Transport> tcp_part(Transport& world, double timeout_s, int ranks);

/// A socket that listens on loopback, at a port that was free. For own launches.
struct Listening {
  int socket = -1;
  int port = 0;
};
Listening listen_on_loopback(int backlog);

}  // namespace partita
