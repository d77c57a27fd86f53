#include "runtime/transport/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "base/error.h"

namespace partita {

using Clock = std::chrono::steady_clock;

SocketTime after(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}
int milliseconds_to(SocketTime end) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
  return static_cast<int>(std::clamp<std::int64_t>(left.count() + 1, 0, 1'000'000));
}
std::string error_text(int error) { return std::generic_category().message(error); }

void File::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

void set_blocking(int fd, bool blocking) {
  const int flags = ::fcntl(fd, F_GETFL);
  ::fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

bool read_all(int fd, void* data, std::size_t bytes, SocketTime end) {
  auto* to = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::recv(fd, to, bytes, 0);
    if (n > 0) {
      to += n;
      bytes -= static_cast<std::size_t>(n);
      continue;
    }
    if (n == 0 || (errno != EAGAIN && errno != EINTR)) return false;
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, milliseconds_to(end)) == 0 && Clock::now() >= end) return false;
  }
  return true;
}
bool write_all(int fd, const void* data, std::size_t bytes, SocketTime end) {
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::send(fd, from, bytes, MSG_NOSIGNAL);
    if (n > 0) {
      from += n;
      bytes -= static_cast<std::size_t>(n);
      continue;
    }
    if (errno != EAGAIN && errno != EINTR) return false;
    pollfd p{fd, POLLOUT, 0};
    if (::poll(&p, 1, milliseconds_to(end)) == 0 && Clock::now() >= end) return false;
  }
  return true;
}

int port_of(const Address& a) {
  return ntohs(a.storage.ss_family == AF_INET6
                   ? reinterpret_cast<const sockaddr_in6*>(&a.storage)->sin6_port
                   : reinterpret_cast<const sockaddr_in*>(&a.storage)->sin_port);
}
void set_port(Address& a, int port) {
  (a.storage.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&a.storage)->sin6_port
                                   : reinterpret_cast<sockaddr_in*>(&a.storage)->sin_port) =
      htons(static_cast<std::uint16_t>(port));
}
bool is_loopback(const Address& a) {
  if (a.storage.ss_family == AF_INET6)
    return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(&a.storage)->sin6_addr);
  return ntohl(reinterpret_cast<const sockaddr_in*>(&a.storage)->sin_addr.s_addr) >> 24 == 127;
}
std::string ip_of(const Address& a) {
  char text[NI_MAXHOST] = "?";
  ::getnameinfo(a.get(), a.size, text, sizeof text, nullptr, 0, NI_NUMERICHOST);
  return text;
}
Address own_address(int fd) {
  Address a;
  a.size = sizeof a.storage;
  ::getsockname(fd, a.get(), &a.size);
  return a;
}
Address peer_address(int fd) {
  Address a;
  a.size = sizeof a.storage;
  ::getpeername(fd, a.get(), &a.size);
  return a;
}
Address loopback_address() {
  Address a = any_address(AF_INET);
  reinterpret_cast<sockaddr_in*>(&a.storage)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return a;
}
Address any_address(int family) {
  Address a;
  a.storage.ss_family = static_cast<sa_family_t>(family);
  a.size = family == AF_INET6 ? sizeof(sockaddr_in6) : sizeof(sockaddr_in);
  return a;
}

std::vector<Address> resolve(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_family = AF_UNSPEC;
  addrinfo* list = nullptr;
  const int error = ::getaddrinfo(host.c_str(), nullptr, &hints, &list);
  if (error != 0) {
    throw InputError("MASTER_ADDR",
                     fmt::format("'{}' is no host that this machine knows ({}); give rank 0's name "
                                 "or address",
                                 host, ::gai_strerror(error)));
  }
  std::vector<Address> all;
  for (const addrinfo* i = list; i != nullptr; i = i->ai_next) {
    Address a;
    std::memcpy(&a.storage, i->ai_addr, i->ai_addrlen);
    a.size = i->ai_addrlen;
    set_port(a, port);
    all.push_back(a);
  }
  ::freeaddrinfo(list);
  return all;
}

File listen_on(const Address& a, int backlog, int& error) {
  File f(::socket(a.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  const int yes = 1;
  if (f.good()) ::setsockopt(f.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (!f.good() || ::bind(f.get(), a.get(), a.size) != 0 || ::listen(f.get(), backlog) != 0) {
    error = errno;
    return File();
  }
  return f;
}

File connect_to(const Address& a, SocketTime end, int& error) {
  File f(::socket(a.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  // To a port that nobody listens at, a socket may by chance connect from that very port: to
  // itself.
  const auto checked = [&](File made) {
    const Address mine = own_address(made.get()), its = peer_address(made.get());
    if (port_of(mine) != port_of(its) || ip_of(mine) != ip_of(its)) return made;
    error = ECONNREFUSED;
    return File();
  };
  if (f.good() && ::connect(f.get(), a.get(), a.size) == 0) return checked(std::move(f));
  error = errno;
  if (!f.good() || error != EINPROGRESS) return File();
  pollfd p{f.get(), POLLOUT, 0};
  if (::poll(&p, 1, milliseconds_to(end)) <= 0) {
    error = ETIMEDOUT;
    return File();
  }
  socklen_t size = sizeof error;
  ::getsockopt(f.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  return error == 0 ? checked(std::move(f)) : File();
}

}  // namespace partita
