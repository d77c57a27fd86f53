// runtime/transport/rendezvous.h: the ranks of a run over sockets find each other.
#pragma once

#include <memory>
#include <vector>

#include "runtime/transport/socket.h"
#include "runtime/transport/tcp.h"

namespace partita {

struct Met {
  std::vector<File> sockets;     ///< by rank, not blocking; none for the own rank
  std::shared_ptr<Board> board;  ///< the launch's, else rank 0's; null on other hosts than its
};

/// Errors as of tcp_transport().
Met meet(const TcpOptions& options);

}  // namespace partita
