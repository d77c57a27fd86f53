// Ranks over sockets. The rendezvous is blocking with deadlines; after it one reader thread of each
// rank moves all bytes in, and out where the sender would have had to wait.
#include "runtime/transport/tcp.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "base/error.h"

namespace partita {
namespace {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using Letter = std::vector<std::byte>;

constexpr std::uint64_t kMagic = 0x3170'6374'7470'6170;  // changes with the protocol
constexpr std::uint32_t kLongestText = 1 << 20;

Time after(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}
int milliseconds_to(Time end) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
  return static_cast<int>(std::clamp<std::int64_t>(left.count() + 1, 0, 1'000'000));
}
std::string error_text(int error) { return std::generic_category().message(error); }

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
  void reset() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

void set_blocking(int fd, bool blocking) {
  const int flags = ::fcntl(fd, F_GETFL);
  ::fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

/// Of a socket that does not block: all `bytes` before `end`, or false.
bool read_all(int fd, void* data, std::size_t bytes, Time end) {
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
bool write_all(int fd, const void* data, std::size_t bytes, Time end) {
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

// ---- addresses ---------------------------------------------------------------------------------

struct Address {
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

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

/// Listens there; an errno in `error` if it cannot.
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

/// Connects before `end`; an errno in `error` if it cannot.
File connect_to(const Address& a, Time end, int& error) {
  File f(::socket(a.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (f.good() && ::connect(f.get(), a.get(), a.size) == 0) return f;
  error = errno;
  if (!f.good() || error != EINPROGRESS) return File();
  pollfd p{f.get(), POLLOUT, 0};
  if (::poll(&p, 1, milliseconds_to(end)) <= 0) {
    error = ETIMEDOUT;
    return File();
  }
  socklen_t size = sizeof error;
  ::getsockopt(f.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  return error == 0 ? std::move(f) : File();
}

// ---- rendezvous --------------------------------------------------------------------------------

struct Hello {
  std::uint64_t magic = kMagic;
  std::int32_t rank = 0, size = 0, port = 0;
  std::uint32_t key_bytes = 0;
};
struct Welcome {
  std::uint64_t magic = kMagic, session = 0;
  std::int32_t code = 0;  ///< exit code of a refusal
  std::uint32_t text_bytes = 0;
};
struct Greeting {
  std::uint64_t session = 0;
  std::int64_t rank = 0;
};

struct Guest {
  File file;
  std::string got;  ///< hello and key
  std::string ip;
};

struct Problem {
  std::string text;
  int code = 0;
};

[[noreturn]] void raise(const Problem& p) {
  if (p.code == 2) throw InputError("rendezvous", p.text);
  throw PeerError(p.text);
}

class Rendezvous {
 public:
  explicit Rendezvous(const TcpOptions& o) : o_(o), end_(after(o.rendezvous_s)), board_(o.board) {}

  /// Sockets by rank; none for the own one.
  std::vector<File> meet() {
    files_.resize(static_cast<std::size_t>(o_.size));
    if (o_.size == 1) return std::move(files_);
    if (o_.rank == 0) {
      host_all();
    } else {
      join();
      mesh();
    }
    for (const File& f : files_) {
      const int yes = 1;
      if (f.good()) ::setsockopt(f.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    }
    return std::move(files_);
  }
  /// The launch's, else rank 0's, where this rank is on its host.
  std::shared_ptr<Board> board() const { return board_; }

 private:
  std::string place() const { return fmt::format("{}:{}", o_.host, o_.port); }
  File& file(int rank) { return files_[static_cast<std::size_t>(rank)]; }

  File listener() const {
    if (o_.listener >= 0) {
      set_blocking(o_.listener, false);
      return File(o_.listener);
    }
    Address a = resolve(o_.host, o_.port)[0];
    // A host's own name may stand for loopback on itself, where nobody else finds it.
    in6_addr literal6{};
    in_addr literal{};
    const bool local = o_.host == "localhost" ||
                       (is_loopback(a) && (::inet_pton(AF_INET, o_.host.c_str(), &literal) == 1 ||
                                           ::inet_pton(AF_INET6, o_.host.c_str(), &literal6) == 1));
    if (!local) {
      a = any_address(a.storage.ss_family);
      set_port(a, o_.port);
    }
    int error = 0;
    File f = listen_on(a, o_.size, error);
    if (!f.good()) {
      throw InputError("MASTER_PORT",
                       fmt::format("rank 0 cannot listen at {}: {}; choose another port", place(),
                                   error_text(error)));
    }
    return f;
  }

  // ---- rank 0 ----
  void host_all() {
    const File door = listener();
    std::vector<Guest> guests;  // not known yet, or refused
    std::vector<std::string> addresses(static_cast<std::size_t>(o_.size));
    std::optional<Problem> problem;
    int missing = o_.size - 1;
    Time end = end_;
    const auto complain = [&](std::string text, int code) {
      if (problem) return;
      problem = Problem{std::move(text), code};
      // Others may come and want to hear it, too.
      end = std::min(end, after(2));
    };
    while (missing > 0 && Clock::now() < end) {
      std::vector<pollfd> polls{{door.get(), POLLIN, 0}};
      for (const Guest& g : guests) polls.push_back({g.file.get(), POLLIN, 0});
      std::vector<int> known;
      for (int r = 1; r < o_.size; ++r) {
        if (!file(r).good()) continue;
        known.push_back(r);
        polls.push_back({file(r).get(), POLLIN, 0});
      }
      if (::poll(polls.data(), polls.size(), milliseconds_to(end)) <= 0) continue;
      // Those that have come have nothing to say before they are answered.
      for (std::size_t k = 0; k < known.size(); ++k) {
        if (polls[1 + guests.size() + k].revents == 0) continue;
        complain(fmt::format("rank {} ended during the rendezvous", known[k]), 3);
        file(known[k]).reset();
      }
      const std::size_t old = guests.size();
      for (;;) {
        Address from;
        from.size = sizeof from.storage;
        File f(::accept4(door.get(), from.get(), &from.size, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (!f.good()) break;
        guests.push_back({std::move(f), "", is_loopback(from) ? "-" : ip_of(from)});
      }
      for (std::size_t k = 0; k < old; ++k) {
        if (polls[1 + k].revents == 0) continue;
        Guest& g = guests[k];
        if (!hear(g)) continue;
        Hello h;
        std::memcpy(&h, g.got.data(), sizeof h);
        if (const std::string wrong = objection(h, g); !wrong.empty()) {
          complain(wrong, 2);
          refused_.push_back(std::move(g.file));
          --missing;  // as many as can be expected are here then
          continue;
        }
        addresses[static_cast<std::size_t>(h.rank)] = fmt::format("{} {}", g.ip, h.port);
        file(h.rank) = std::move(g.file);
        --missing;
      }
      std::erase_if(guests, [](const Guest& g) { return !g.file.good(); });
    }
    if (!problem && missing > 0) problem = Problem{who_is_missing(), 3};
    Welcome w;
    std::random_device random;
    w.session = (std::uint64_t{random()} << 32) | random();
    std::string text;
    if (problem) {
      w.code = problem->code;
      text = problem->text;
    } else {
      if (!board_) board_ = Board::create(o_.size, 0, 0);
      addresses[0] = fmt::format("{} {}", board_->path(), board_->identity());
      for (const std::string& a : addresses) text += a + "\n";
    }
    w.text_bytes = static_cast<std::uint32_t>(text.size());
    const std::string frame = std::string(reinterpret_cast<const char*>(&w), sizeof w) + text;
    for (const auto* list : {&files_, &refused_}) {
      for (const File& f : *list) {
        if (f.good()) write_all(f.get(), frame.data(), frame.size(), after(2));
      }
    }
    if (problem) raise(*problem);
  }

  /// Reads what a guest says; true when its hello is complete. Strangers are shown out.
  static bool hear(Guest& g) {
    for (;;) {
      std::size_t want = sizeof(Hello);
      if (g.got.size() >= sizeof(Hello)) {
        Hello h;
        std::memcpy(&h, g.got.data(), sizeof h);
        if (h.magic != kMagic || h.key_bytes > kLongestText) {
          g.file.reset();
          return false;
        }
        want += h.key_bytes;
      }
      if (g.got.size() == want && want > sizeof(Hello)) return true;
      std::string piece(want - g.got.size(), '\0');
      const ssize_t n = ::recv(g.file.get(), piece.data(), piece.size(), 0);
      if (n <= 0) {
        if (n == 0 || (errno != EAGAIN && errno != EINTR)) g.file.reset();
        return false;
      }
      g.got.append(piece.data(), static_cast<std::size_t>(n));
    }
  }

  std::string objection(const Hello& h, const Guest& g) {
    if (h.size != o_.size) {
      return fmt::format(
          "rank {} was started as one of {} ranks, rank 0 as one of {}; start all "
          "with the same number",
          h.rank, h.size, o_.size);
    }
    if (h.rank < 1 || h.rank >= o_.size)
      return fmt::format("a process says that it is rank {} of {}", h.rank, o_.size);
    if (file(h.rank).good()) {
      return fmt::format("two processes say that they are rank {}; give each its own rank", h.rank);
    }
    const std::string key = g.got.substr(sizeof h);
    if (key != o_.key) {
      return fmt::format("rank {} is to run {}, and rank 0 {}; start all with the same arguments",
                         h.rank, part(key, o_.key), part(o_.key, key));
    }
    return "";
  }

  /// What a key has that the other has not: keys are lists of "name value;".
  static std::string part(const std::string& key, const std::string& other) {
    std::set<std::string> there;
    std::istringstream all(other);
    for (std::string s; std::getline(all, s, ';');) there.insert(s);
    std::string list;
    std::istringstream mine(key);
    for (std::string s; std::getline(mine, s, ';');) {
      if (there.count(s) > 0 || list.size() > 200) continue;
      const auto start = s.find_first_not_of(' ');
      if (start != std::string::npos) list += (list.empty() ? "" : ", ") + s.substr(start);
    }
    return list.empty() ? "less" : list;
  }

  std::string who_is_missing() {
    std::vector<int> list;
    for (int r = 1; r < o_.size; ++r) {
      if (!file(r).good()) list.push_back(r);
    }
    const bool one = list.size() == 1;
    std::string names = fmt::format("{}", fmt::join(list, ", "));
    if (list.size() > 8) {
      names = fmt::format("{}, ... ({} of them)",
                          fmt::join(std::vector<int>(list.begin(), list.begin() + 8), ", "),
                          list.size());
    }
    return fmt::format(
        "{} {} of {} did not come to the rendezvous at {} within {:.3g} s; start {} "
        "with the same MASTER_ADDR and MASTER_PORT",
        one ? "rank" : "ranks", names, o_.size, place(), o_.rendezvous_s, one ? "it" : "them");
  }

  // ---- the others ----
  void join() {
    int error = ECONNREFUSED;
    for (auto wait = std::chrono::milliseconds(10);;
         wait = std::min(2 * wait, std::chrono::milliseconds(200))) {
      for (const Address& a : resolve(o_.host, o_.port)) {
        file(0) = connect_to(a, std::min(end_, after(5)), error);
        if (file(0).good()) break;
      }
      if (file(0).good()) break;
      if (Clock::now() + wait >= end_) {
        throw PeerError(
            fmt::format("rank {} of {} finds no rank 0 at {} within {:.3g} s ({}); start rank 0, "
                        "and give all ranks the same MASTER_ADDR and MASTER_PORT",
                        o_.rank, o_.size, place(), o_.rendezvous_s, error_text(error)));
      }
      std::this_thread::sleep_for(wait);
    }
    const Address mine = own_address(file(0).get());
    Address a = is_loopback(mine) ? mine : any_address(mine.storage.ss_family);
    set_port(a, 0);
    door_ = listen_on(a, o_.size, error);
    if (!door_.good()) {
      throw PeerError(
          fmt::format("rank {} cannot listen at {}: {}", o_.rank, ip_of(a), error_text(error)));
    }
    Hello h;
    h.rank = o_.rank;
    h.size = o_.size;
    h.port = port_of(own_address(door_.get()));
    h.key_bytes = static_cast<std::uint32_t>(o_.key.size());
    const std::string frame = std::string(reinterpret_cast<const char*>(&h), sizeof h) + o_.key;
    Welcome w;
    // Rank 0 waits as long for the last one, and began earlier or later.
    const Time end = std::max(end_, after(o_.rendezvous_s)) + std::chrono::seconds(5);
    std::string text;
    bool good = write_all(file(0).get(), frame.data(), frame.size(), end) &&
                read_all(file(0).get(), &w, sizeof w, end);
    if (good && (w.magic != kMagic || w.text_bytes > kLongestText)) {
      throw InputError("MASTER_PORT", fmt::format("what answers at {} is no rank 0; choose another "
                                                  "port",
                                                  place()));
    }
    if (good) {
      text.resize(w.text_bytes);
      good = read_all(file(0).get(), text.data(), text.size(), end);
    }
    if (!good) {
      throw PeerError(
          fmt::format("rank {} lost rank 0 at {} during the rendezvous", o_.rank, place()));
    }
    if (w.code != 0) throw ToldElsewhere(w.code, text);
    session_ = w.session;
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) table_.push_back(line);
    PARTITA_ASSERT(table_.size() == files_.size(), "a wrong table of addresses");
    if (board_) return;
    // Found only on rank 0's host; elsewhere ranks know of each other what messages say.
    const auto space = table_[0].find(' ');
    const auto board = Board::open(table_[0].substr(0, space), o_.size);
    if (board && std::to_string(board->identity()) == table_[0].substr(space + 1)) board_ = board;
  }

  void mesh() {
    const std::string of_host = ip_of(peer_address(file(0).get()));
    for (int r = 1; r < o_.rank; ++r) {
      const std::string& line = table_[static_cast<std::size_t>(r)];
      const auto space = line.find(' ');
      const std::string ip = line.substr(0, space) == "-" ? of_host : line.substr(0, space);
      const int port = std::stoi(line.substr(space + 1));
      int error = 0;
      File f = connect_to(resolve(ip, port)[0], end_, error);
      const Greeting g{session_, o_.rank};
      if (!f.good() || !write_all(f.get(), &g, sizeof g, end_)) {
        throw PeerError(
            fmt::format("rank {} cannot reach rank {} at {}:{}: {}; is there a "
                        "firewall between them?",
                        o_.rank, r, ip, port, error_text(error)));
      }
      file(r) = std::move(f);
    }
    for (int missing = o_.size - 1 - o_.rank; missing > 0;) {
      pollfd p{door_.get(), POLLIN, 0};
      if (::poll(&p, 1, milliseconds_to(end_)) <= 0 && Clock::now() >= end_) {
        int r = o_.rank + 1;
        while (r + 1 < o_.size && file(r).good()) ++r;
        throw PeerError(fmt::format("rank {} of {} did not connect to rank {} within {:.3g} s", r,
                                    o_.size, o_.rank, o_.rendezvous_s));
      }
      File f(::accept4(door_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      Greeting g;
      if (!f.good() || !read_all(f.get(), &g, sizeof g, std::min(end_, after(2)))) continue;
      if (g.session != session_ || g.rank <= o_.rank || g.rank >= o_.size) continue;
      File& to = file(static_cast<int>(g.rank));
      if (!to.good()) --missing;
      to = std::move(f);
    }
  }

  const TcpOptions& o_;
  Time end_;
  std::vector<File> files_, refused_;
  File door_;
  std::shared_ptr<Board> board_;
  std::uint64_t session_ = 0;
  std::vector<std::string> table_;
};

// ---- the transport -----------------------------------------------------------------------------

enum class Frame : std::uint32_t { data, ask, answer, abort, bye };

struct Header {
  Frame kind = Frame::data;
  std::uint32_t unused = 0;
  std::int64_t tag = 0;  ///< of an answer: whom the sender waits for
  std::int64_t bytes = 0;
  std::int64_t step = -1, instruction = -1;
};

struct Abort {
  std::int32_t code = 3, culprit = 0, gave_up = 0, died = 0;
  std::int64_t step = -1, instruction = -1;  ///< where the culprit was last seen
};

struct Failure {
  std::string reason;
  int code = 3, culprit = 0;
  bool gave_up = false;  ///< the culprit itself says so, so it can speak
  bool died = false;     ///< the reason is worded when it is told: others may know more
  bool speaks = false;   ///< it is this rank that tells it
};

struct Peer {
  File file;
  std::mutex guard;  ///< of what goes out
  std::deque<Letter> out;
  std::size_t out_at = 0;
  // The reader's own.
  Header header;
  Letter body;
  std::size_t have = 0;  ///< bytes of header and body
  // Read by both.
  std::atomic<bool> open{true}, bye{false};
  std::atomic<std::int64_t> step{-1}, instruction{-1}, waits_for{RankState::kNobody}, answers{0};
};

constexpr std::int64_t kBarrier = -1;

class TcpTransport final : public Transport {
 public:
  TcpTransport(const TcpOptions& o, std::vector<File> files)
      : o_(o), wake_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (o.board) state_ = &o.board->rank(o.rank);
    state_->process = ::getpid();
    for (File& f : files) {
      peers_.push_back(std::make_unique<Peer>());
      peers_.back()->open = f.good();
      peers_.back()->file = std::move(f);
    }
    reader_ = std::thread([this] { read_guarded(); });
  }
  ~TcpTransport() override {
    leave();
    stop_ = true;
    wake();
    reader_.join();
  }

  int rank() const override { return o_.rank; }
  int size() const override { return o_.size; }
  std::string name() const override { return "tcp"; }

  void send(int to, std::int64_t tag, const void* data, std::size_t bytes) override {
    traffic_.bytes_to[to] += static_cast<std::int64_t>(bytes);
    ++traffic_.messages;
    put(to, tag, data, bytes);
  }
  void receive(int from, std::int64_t tag, void* data, std::size_t bytes) override {
    const Letter letter = take(from, tag);
    PARTITA_ASSERT(letter.size() == bytes, fmt::format("rank {} wants {} bytes of rank {}, got {}",
                                                       o_.rank, bytes, from, letter.size()));
    if (bytes > 0) std::memcpy(data, letter.data(), bytes);
  }
  void collective(const CollectiveCall& call) override {
    const int n = static_cast<int>(call.group->size());
    const Algorithm a = o_.algorithm ? o_.algorithm(call.kind, n) : default_algorithm(call.kind);
    auto& e = expansions_[{call.kind, a, n}];
    if (!e) e = std::make_unique<Expansion>(expand(call.kind, a, n));
    execute_steps(*this, call, *e);
  }
  void barrier() override {
    if (o_.rank != 0) {
      put(0, kBarrier, nullptr, 0);
      take(0, kBarrier);
      return;
    }
    for (int r = 1; r < o_.size; ++r) take(r, kBarrier);
    for (int r = 1; r < o_.size; ++r) put(r, kBarrier, nullptr, 0);
  }
  void abort(const std::string& reason, int code) override {
    Failure f{reason, code, o_.rank, true};
    {
      const std::lock_guard<std::mutex> lock(guard_);
      if (failure_) return;  // the others know
      fail_locked(f);
      thrown_ = true;
    }
    f.reason = fmt::format("rank {}: {}", o_.rank, reason);
    tell(f);
  }
  void doing(const std::string& what) override { doing_ = what; }
  bool speaks() override {
    const std::lock_guard<std::mutex> lock(guard_);
    return !failure_ || failure_->speaks;
  }
  void leave() override {
    if (left_.exchange(true)) return;
    bool failed;
    {
      const std::lock_guard<std::mutex> lock(guard_);
      failed = failure_.has_value();
    }
    for (int r = 0; r < o_.size; ++r) {
      // After a failure a closed socket says enough; and it must not look like a good end.
      if (r != o_.rank && !failed) frame(r, Frame::bye, 0, nullptr, 0);
    }
  }

 private:
  Peer& peer(int r) { return *peers_[static_cast<std::size_t>(r)]; }
  void wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = ::write(wake_.get(), &one, sizeof one);
  }

  // ---- out -----
  /// Never waits: what the socket does not take now the reader sends later.
  void frame(int to, Frame kind, std::int64_t tag, const void* data, std::size_t bytes) {
    Header h;
    h.kind = kind;
    h.tag = tag;
    h.bytes = static_cast<std::int64_t>(bytes);
    h.step = state_->step.load(std::memory_order_relaxed);
    h.instruction = state_->instruction.load(std::memory_order_relaxed);
    Peer& p = peer(to);
    if (!p.open) return;  // the reader has noted why
    std::size_t sent = 0;
    const std::lock_guard<std::mutex> lock(p.guard);
    if (p.out.empty()) {
      iovec parts[2] = {{&h, sizeof h}, {const_cast<void*>(data), bytes}};
      msghdr message{};
      message.msg_iov = parts;
      message.msg_iovlen = bytes > 0 ? 2 : 1;
      const ssize_t n = ::sendmsg(p.file.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0 && errno != EAGAIN && errno != EINTR) return;  // the reader will see it
      sent = n < 0 ? 0 : static_cast<std::size_t>(n);
      if (sent == sizeof h + bytes) return;
    }
    Letter rest(sizeof h + bytes - sent);
    const auto* body = static_cast<const std::byte*>(data);
    if (sent < sizeof h) {
      std::memcpy(rest.data(), reinterpret_cast<const std::byte*>(&h) + sent, sizeof h - sent);
      if (bytes > 0) std::memcpy(rest.data() + (sizeof h - sent), body, bytes);
    } else {
      std::memcpy(rest.data(), body + (sent - sizeof h), rest.size());
    }
    p.out.push_back(std::move(rest));
    wake();
  }
  void put(int to, std::int64_t tag, const void* data, std::size_t bytes) {
    PARTITA_ASSERT(to != o_.rank && to >= 0 && to < o_.size, fmt::format("a message to {}", to));
    frame(to, Frame::data, tag, data, bytes);
  }
  /// Sends what waits; false when the socket is gone.
  static bool flush(Peer& p) {
    const std::lock_guard<std::mutex> lock(p.guard);
    while (!p.out.empty()) {
      const Letter& l = p.out.front();
      const ssize_t n = ::send(p.file.get(), l.data() + p.out_at, l.size() - p.out_at,
                               MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) return errno == EAGAIN || errno == EINTR;
      p.out_at += static_cast<std::size_t>(n);
      if (p.out_at < l.size()) return true;
      p.out.pop_front();
      p.out_at = 0;
    }
    return true;
  }
  static bool waits_to_send(Peer& p) {
    const std::lock_guard<std::mutex> lock(p.guard);
    return !p.out.empty();
  }

  // ---- in: the reader thread -----
  void read_guarded() {
    try {
      read_loop();
    } catch (const std::exception& e) {
      note({fmt::format("rank {} cannot read any more: {}", o_.rank, e.what()), 3, o_.rank, true});
    }
  }
  void read_loop() {
    std::optional<Time> end;
    std::vector<pollfd> polls;
    std::vector<int> who;
    for (;;) {
      polls.assign(1, {wake_.get(), POLLIN, 0});
      who.assign(1, -1);
      bool full = false;
      for (int r = 0; r < o_.size; ++r) {
        if (r == o_.rank || !peer(r).open) continue;
        const bool more = waits_to_send(peer(r));
        full = full || more;
        polls.push_back({peer(r).file.get(), static_cast<short>(POLLIN | (more ? POLLOUT : 0)), 0});
        who.push_back(r);
      }
      if (stop_) {
        if (!end) end = after(2);
        if (!full || Clock::now() >= *end) return;
      }
      ::poll(polls.data(), polls.size(), 100);
      if (polls[0].revents != 0) {
        std::uint64_t n;
        [[maybe_unused]] const ssize_t got = ::read(wake_.get(), &n, sizeof n);
      }
      for (std::size_t k = 1; k < polls.size(); ++k) {
        Peer& p = peer(who[k]);
        if ((polls[k].revents & POLLOUT) != 0) flush(p);
        if ((polls[k].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && !read_some(who[k], p))
          closed(who[k], p);
      }
      watch();
    }
  }
  /// False when the peer has closed.
  bool read_some(int r, Peer& p) {
    for (;;) {
      std::byte* to;
      std::size_t want;
      if (p.have < sizeof p.header) {
        to = reinterpret_cast<std::byte*>(&p.header) + p.have;
        want = sizeof p.header - p.have;
      } else {
        to = p.body.data() + (p.have - sizeof p.header);
        want = p.body.size() - (p.have - sizeof p.header);
      }
      if (want > 0) {
        const ssize_t n = ::recv(p.file.get(), to, want, MSG_DONTWAIT);
        if (n == 0) return false;
        if (n < 0) return errno == EAGAIN || errno == EINTR;
        p.have += static_cast<std::size_t>(n);
        if (p.have == sizeof p.header) p.body.resize(static_cast<std::size_t>(p.header.bytes));
      }
      if (p.have == sizeof p.header + p.body.size() && p.have >= sizeof p.header) {
        arrived(r, p);
        p.have = 0;
        p.body = {};
      }
    }
  }
  void arrived(int r, Peer& p) {
    p.step = p.header.step;
    p.instruction = p.header.instruction;
    switch (p.header.kind) {
      case Frame::data: {
        const std::lock_guard<std::mutex> lock(guard_);
        letters_[{r, p.header.tag}].push_back(std::move(p.body));
        break;
      }
      case Frame::ask:
        frame(r, Frame::answer, state_->waits_for, nullptr, 0);
        return;
      case Frame::answer: {
        const std::lock_guard<std::mutex> lock(guard_);
        p.waits_for = p.header.tag;
        ++p.answers;
        break;
      }
      case Frame::abort: {
        Abort a;
        PARTITA_ASSERT(p.body.size() >= sizeof a, "a short frame");
        std::memcpy(&a, p.body.data(), sizeof a);
        if (a.culprit != o_.rank && a.culprit >= 0 && a.culprit < o_.size) {
          Peer& c = peer(a.culprit);
          if (std::pair(a.step, a.instruction) > std::pair(c.step.load(), c.instruction.load()))
            c.step = a.step, c.instruction = a.instruction;
        }
        note({std::string(reinterpret_cast<const char*>(p.body.data()) + sizeof a,
                          p.body.size() - sizeof a),
              a.code, a.culprit, a.gave_up != 0, a.died != 0});
        return;
      }
      case Frame::bye:
        p.bye = true;
        return;
    }
    came_.notify_all();
  }
  void closed(int r, Peer& p) {
    p.open = false;
    if (!p.bye) note({died(r), 3, r, false, true});
    came_.notify_all();
  }
  void note(const Failure& f) {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      if (left_ || failure_) return;
      fail_locked(f);
    }
    came_.notify_all();
  }
  /// A main thread that never comes back to the transport must not outlive the others.
  void watch() {
    if (!o_.own_process || left_) return;
    const std::lock_guard<std::mutex> lock(guard_);
    if (!failure_ || thrown_ || Clock::now() < failed_at_ + std::chrono::seconds(5)) return;
    if (failure_->speaks) std::fprintf(stderr, "partita: %s\n", failure_->reason.c_str());
    ::_exit(failure_->code);
  }

  // ---- waiting -----
  Letter take(int from, std::int64_t tag) {
    std::unique_lock<std::mutex> lock(guard_);
    auto& queue = letters_[{from, tag}];
    state_->waits_for.store(from, std::memory_order_relaxed);
    const auto ready = [&] { return !queue.empty() || failure_ || !peer(from).open; };
    if (!came_.wait_for(lock, std::chrono::duration<double>(o_.timeout_s), ready)) {
      lock.unlock();
      ask_all(from, tag);
      lock.lock();
    }
    if (queue.empty()) {
      if (!failure_ && !peer(from).open && peer(from).bye)
        fail_locked({fmt::format("rank {} ended its run while rank {} waits for it in {}", from,
                                 o_.rank, place()),
                     3, from});
      // Closed, and the reader is about to say so.
      came_.wait_for(lock, std::chrono::seconds(1), [&] { return failure_.has_value(); });
      if (!failure_) fail_locked({died(from), 3, from, false, true});
      if (failure_->died && failure_->culprit != o_.rank)
        failure_->reason = died(failure_->culprit);
      const Failure f = *failure_;
      thrown_ = true;
      lock.unlock();
      tell(f);
      if (f.speaks) throw PeerError(f.reason);
      throw ToldElsewhere(f.code, f.reason);
    }
    state_->waits_for.store(RankState::kNobody, std::memory_order_relaxed);
    Letter letter = std::move(queue.front());
    queue.pop_front();
    return letter;
  }

  /// After a time-out: everyone says whom it waits for, and the failure names who holds up all.
  void ask_all(int from, std::int64_t tag) {
    std::vector<std::int64_t> before;
    for (const auto& p : peers_) before.push_back(p->answers);
    for (int r = 0; r < o_.size; ++r) {
      if (r != o_.rank) frame(r, Frame::ask, 0, nullptr, 0);
    }
    std::unique_lock<std::mutex> lock(guard_);
    const auto answered = [&](int r) {
      return peer(r).answers > before[static_cast<std::size_t>(r)];
    };
    const auto& queue = letters_[{from, tag}];
    came_.wait_for(lock, std::chrono::seconds(2), [&] {
      if (!queue.empty() || failure_) return true;
      for (int r = 0; r < o_.size; ++r) {
        if (r != o_.rank && peer(r).open && !answered(r)) return false;
      }
      return true;
    });
    if (!queue.empty() || failure_) return;
    int culprit = from;
    std::set<int> seen{o_.rank};
    while (seen.insert(culprit).second && answered(culprit) && peer(culprit).waits_for >= 0)
      culprit = static_cast<int>(peer(culprit).waits_for);
    // A ring of waiting ranks: the one furthest behind.
    if (culprit == o_.rank || (answered(culprit) && peer(culprit).waits_for >= 0)) {
      culprit = from;
      for (const int r : seen) {
        if (r != o_.rank &&
            std::pair(peer(r).step.load(), peer(r).instruction.load()) <
                std::pair(peer(culprit).step.load(), peer(culprit).instruction.load()))
          culprit = r;
      }
    }
    const std::string link = culprit == from
                                 ? fmt::format("rank {}, which", from)
                                 : fmt::format("rank {}, which waits too; rank {}", from, culprit);
    const std::string what =
        answered(culprit)
            ? fmt::format("has been in {} for {:.3g} s", place_of(culprit), o_.timeout_s)
            : fmt::format(
                  "does not answer for {:.3g} s and was last in {}: it is stopped, or its "
                  "machine cannot be reached",
                  o_.timeout_s, place_of(culprit));
    fail_locked(
        {fmt::format("rank {} waits in {} for {} {}", o_.rank, place(), link, what), 3, culprit});
  }

  void tell(const Failure& f) {
    Abort a{f.code, f.culprit, f.gave_up, f.died};
    if (f.culprit != o_.rank)
      a.step = peer(f.culprit).step, a.instruction = peer(f.culprit).instruction;
    const std::string body = std::string(reinterpret_cast<const char*>(&a), sizeof a) + f.reason;
    for (int r = 0; r < o_.size; ++r) {
      if (r != o_.rank) frame(r, Frame::abort, 0, body.data(), body.size());
    }
  }
  /// The lowest rank that can tells a failure. Settled when it is noted: later others are gone, and
  /// have said it.
  void fail_locked(Failure f) {
    f.speaks = f.culprit != o_.rank || f.gave_up;
    for (int r = 0; r < o_.rank; ++r) {
      const bool culprit = f.culprit == r && !f.gave_up;
      const bool gone = !peer(r).open && !peer(r).bye;
      if (!culprit && !gone) f.speaks = false;
    }
    failure_ = std::move(f);
    failed_at_ = Clock::now();
  }

  std::string in_words(int r, std::int64_t step, std::int64_t instruction) const {
    if (o_.describe) return o_.describe(r, step, instruction);
    return step < 0 ? std::string("the start")
                    : fmt::format("instruction {} of step {}", instruction, step);
  }
  std::string place() const {
    return o_.describe ? in_words(o_.rank, state_->step, state_->instruction) : doing_;
  }
  bool on_board(int r) const { return o_.board && o_.board->rank(r).process != 0; }
  std::string died(int r) {
    return fmt::format("rank {} died{} in {}: its connection closed", r,
                       on_board(r) ? "" : ", last heard of", place_of(r));
  }
  std::string place_of(int r) {
    if (on_board(r)) return in_words(r, o_.board->rank(r).step, o_.board->rank(r).instruction);
    return in_words(r, peer(r).step, peer(r).instruction);
  }

  const TcpOptions o_;
  File wake_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::mutex guard_;  ///< of all below
  std::condition_variable came_;
  std::map<std::pair<int, std::int64_t>, std::deque<Letter>> letters_;  // by sender and tag
  std::optional<Failure> failure_;
  bool thrown_ = false;
  Time failed_at_;
  std::atomic<bool> left_{false}, stop_{false};
  std::string doing_ = "the start";
  std::map<std::tuple<CollectiveKind, Algorithm, int>, std::unique_ptr<Expansion>> expansions_;
  std::thread reader_;
};

}  // namespace

std::unique_ptr<Transport> tcp_transport(const TcpOptions& options) {
  PARTITA_ASSERT(options.rank >= 0 && options.rank < options.size,
                 fmt::format("rank {} of {}", options.rank, options.size));
  PARTITA_ASSERT(!options.key.empty() && options.key.size() < kLongestText, "a key of the run");
  Rendezvous rendezvous(options);
  std::vector<File> files = rendezvous.meet();
  TcpOptions all = options;
  all.board = rendezvous.board();
  return std::make_unique<TcpTransport>(all, std::move(files));
}

Listening listen_on_loopback(int backlog) {
  Address a;
  auto* in = reinterpret_cast<sockaddr_in*>(&a.storage);
  in->sin_family = AF_INET;
  in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  a.size = sizeof *in;
  int error = 0;
  File f = listen_on(a, backlog, error);
  if (!f.good()) throw PeerError(fmt::format("no socket on loopback: {}", error_text(error)));
  Listening l;
  l.port = port_of(own_address(f.get()));
  l.socket = ::dup(f.get());  // without close-on-exec: a child takes it over
  return l;
}

}  // namespace partita
