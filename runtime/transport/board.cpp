#include "runtime/transport/board.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <random>
#include <tuple>

#include "base/error.h"

namespace partita {

static_assert(std::atomic<std::int64_t>::is_always_lock_free, "atomics are shared by processes");

struct Board::Header {
  static constexpr std::int64_t kMagic = 0x31647261'6f425450;
  std::int64_t magic, ranks, steps, replicas;
  std::uint64_t identity;
  std::atomic<std::int64_t> done;
};

namespace {
/// One cache line a rank, so that noting an instruction disturbs nobody.
constexpr std::size_t kSlot = 128, kHeader = 128;
static_assert(sizeof(RankState) <= kSlot);
}  // namespace

std::shared_ptr<Board> Board::create(int ranks, std::int64_t steps, int replicas) {
  const int file = ::memfd_create("partita-board", MFD_CLOEXEC);
  // Only pages that are written take memory.
  const std::size_t bytes =
      kHeader + kSlot * static_cast<std::size_t>(ranks) +
      sizeof(double) * static_cast<std::size_t>(steps) * (1 + static_cast<std::size_t>(replicas));
  if (file < 0 || ::ftruncate(file, static_cast<off_t>(bytes)) != 0)
    throw InternalError("no shared memory for the ranks' board");
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) throw InternalError("the ranks' board cannot be mapped");
  std::shared_ptr<Board> board(new Board(file, memory, bytes));
  for (int r = 0; r < ranks; ++r)
    new (static_cast<std::byte*>(memory) + kHeader + kSlot * static_cast<std::size_t>(r)) RankState;
  std::random_device random;
  const std::uint64_t identity = (std::uint64_t{random()} << 32) | random();
  new (memory) Header{Header::kMagic, ranks, steps, replicas, identity, {0}};
  return board;
}

std::shared_ptr<Board> Board::open(const std::string& path, int ranks) {
  const int file = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (file < 0) return nullptr;
  struct stat info {};
  const bool sized =
      ::fstat(file, &info) == 0 &&
      info.st_size >=
          static_cast<off_t>(kHeader + kSlot * static_cast<std::size_t>(std::max(ranks, 1)));
  const auto bytes = static_cast<std::size_t>(info.st_size);
  void* memory =
      sized ? ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
  if (memory == MAP_FAILED) {
    ::close(file);
    return nullptr;
  }
  std::shared_ptr<Board> board(new Board(file, memory, bytes));
  const Header& h = board->header();
  return h.magic == Header::kMagic && h.ranks == ranks ? board : nullptr;
}

Board::~Board() {
  ::munmap(memory_, bytes_);
  ::close(file_);
}

std::string Board::path() const { return fmt::format("/proc/{}/fd/{}", ::getpid(), file_); }
Board::Header& Board::header() const { return *static_cast<Header*>(memory_); }
std::uint64_t Board::identity() const { return header().identity; }
int Board::ranks() const { return static_cast<int>(header().ranks); }
RankState& Board::rank(int r) const {
  return *reinterpret_cast<RankState*>(static_cast<std::byte*>(memory_) + kHeader +
                                       kSlot * static_cast<std::size_t>(r));
}
double* Board::record(std::int64_t step) const {
  auto* first = reinterpret_cast<double*>(static_cast<std::byte*>(memory_) + kHeader +
                                          kSlot * static_cast<std::size_t>(header().ranks));
  return first + step * (1 + header().replicas);
}

void Board::note_step(const std::vector<double>& losses, double seconds) {
  Header& h = header();
  const std::int64_t step = h.done.load();
  if (step >= h.steps || static_cast<std::int64_t>(losses.size()) != h.replicas) return;
  double* to = record(step);
  *to++ = seconds;
  for (const double l : losses) *to++ = l;
  h.done.store(step + 1);
}
std::int64_t Board::steps_done() const { return header().done.load(); }
std::vector<double> Board::losses(std::int64_t step) const {
  const double* from = record(step);
  return {from + 1, from + 1 + header().replicas};
}
double Board::seconds(std::int64_t step) const { return *record(step); }

int Board::culprit(int me, int among) const {
  // Stopped or gone before at work before furthest behind.
  using Rating = std::tuple<int, std::int64_t, std::int64_t>;
  int worst = -1;
  Rating best;
  for (int r = 0; r < std::min(among, ranks()); ++r) {
    if (r == me) continue;
    const RankState& s = rank(r);
    const char state = s.process == 0 ? 'R' : process_state(s.process);
    const bool gone = state == 0 || state == 'T' || state == 't' || state == 'Z' || state == 'X';
    const Rating rating{gone                                ? 0
                        : s.waits_for == RankState::kNobody ? 1
                                                            : 2,
                        s.step, s.instruction};
    if (worst < 0 || rating < best) worst = r, best = rating;
  }
  return worst;
}

char process_state(std::int64_t process) {
  std::ifstream in(fmt::format("/proc/{}/stat", process));
  std::string all;
  if (!std::getline(in, all)) return 0;
  // "PID (name) S ...", and the name may have anything in it.
  const auto end = all.rfind(')');
  return end == std::string::npos || end + 2 >= all.size() ? char{0} : all[end + 2];
}

}  // namespace partita
