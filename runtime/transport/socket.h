// runtime/transport/socket.h: what the rendezvous and the mesh need of sockets.
#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace partita {

using SocketTime = std::chrono::steady_clock::time_point;

SocketTime after(double seconds);
/// For poll(): at least 0, rounded up.
int milliseconds_to(SocketTime end);
std::string error_text(int error);

/// Owns a file descriptor.
class File {
 public:
  explicit File(int fd = -1) : fd_(fd) {}
  ~File() { reset(); }
  File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  File& operator=(File&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  int get() const { return fd_; }
  bool good() const { return fd_ >= 0; }
  void reset();

 private:
  int fd_;
};

void set_blocking(int fd, bool blocking);

/// Of a socket that does not block: all `bytes` before `end`, or false.
bool read_all(int fd, void* data, std::size_t bytes, SocketTime end);
bool write_all(int fd, const void* data, std::size_t bytes, SocketTime end);

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};
int port_of(const Address& a);
void set_port(Address& a, int port);
bool is_loopback(const Address& a);
std::string ip_of(const Address& a);
Address own_address(int fd);
Address peer_address(int fd);
Address any_address(int family);
Address loopback_address();

/// Addresses of a host's name; InputError{MASTER_ADDR} if it has none.
std::vector<Address> resolve(const std::string& host, int port);

/// Listens there; an errno in `error` if it cannot. Sockets do not block and end with the process
/// image.
File listen_on(const Address& a, int backlog, int& error);
/// Connects before `end`; an errno in `error` if it cannot.
File connect_to(const Address& a, SocketTime end, int& error);

}  // namespace partita
