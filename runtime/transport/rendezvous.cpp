#include "runtime/transport/rendezvous.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "base/error.h"

namespace partita {
namespace {

using Clock = std::chrono::steady_clock;
using Time = SocketTime;

constexpr std::uint64_t kMagic = 0x3170'6374'7470'6170;  // changes with the protocol
constexpr std::uint32_t kLongestText = 1 << 20;

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

}  // namespace

Met meet(const TcpOptions& options) {
  PARTITA_ASSERT(options.rank >= 0 && options.rank < options.size,
                 fmt::format("rank {} of {}", options.rank, options.size));
  PARTITA_ASSERT(!options.key.empty() && options.key.size() < kLongestText, "a key of the run");
  Rendezvous rendezvous(options);
  std::vector<File> sockets = rendezvous.meet();
  return {std::move(sockets), rendezvous.board()};
}

Listening listen_on_loopback(int backlog) {
  int error = 0;
  File f = listen_on(loopback_address(), backlog, error);
  if (!f.good()) throw PeerError(fmt::format("no socket on loopback: {}", error_text(error)));
  Listening l;
  l.port = port_of(own_address(f.get()));
  l.socket = ::dup(f.get());  // without close-on-exec: a child takes it over
  return l;
}

}  // namespace partita
