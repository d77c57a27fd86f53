#include "runtime/transport/mpi.h"

#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "runtime/transport/narrow.h"

#ifdef __SANITIZE_ADDRESS__
/// Open MPI 4.1 does not free all that its plug-ins take and unloads them at the end, so there is
/// no name left that a suppression could have. Over sockets and on threads leaks of ours are found.
extern "C" int __lsan_is_turned_off();
extern "C" int __lsan_is_turned_off() {
  int started = 0;
  MPI_Initialized(&started);
  return started;
}
#endif

namespace partita {
namespace {

using Clock = std::chrono::steady_clock;

int count_of(std::int64_t n) {
  if (n > std::numeric_limits<int>::max()) {
    throw InputError("mpi", fmt::format("a message of {} elements is more than MPI 3 takes; use a "
                                        "smaller micro-batch or bucket",
                                        n));
  }
  return static_cast<int>(n);
}

template <ElementType type>
void add_narrow(void* from, void* to, int* count, MPI_Datatype*) {
  add_numbers(type, static_cast<std::byte*>(to), static_cast<const std::byte*>(from), *count);
}

class MpiTransport final : public Transport {
 public:
  explicit MpiTransport(const MpiOptions& o)
      : timeout_(o.timeout_s), describe_(o.describe), world_(MPI_COMM_WORLD) {
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    begin();
    board_ = board_of_rank_0(o.board);
    if (board_) state_ = &board_->rank(rank_);
    state_->process = ::getpid();
  }
  /// The first `ranks` of the run.
  MpiTransport(const MpiTransport& all, double timeout_s, int ranks)
      : timeout_(timeout_s), describe_(all.describe_), board_(all.board_), world_(first(ranks)) {
    begin();
    state_ = all.state_;
  }
  ~MpiTransport() override {
    for (Pending& p : pending_) MPI_Wait(&p.request, MPI_STATUS_IGNORE);
    for (auto& [group, communicator] : communicators_) MPI_Comm_free(&communicator);
    MPI_Op_free(&bf16_sum_);
    MPI_Op_free(&fp16_sum_);
    if (world_ == MPI_COMM_WORLD) {
      MPI_Finalize();
    } else {
      MPI_Comm_free(&world_);
    }
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "mpi"; }

  void send(int to, std::int64_t tag, const void* data, std::size_t bytes) override {
    sweep();
    ++traffic_.sends;
    traffic_.send_bytes += static_cast<std::int64_t>(bytes);
    Pending p;
    p.data.resize(bytes);
    std::memcpy(p.data.data(), data, bytes);
    pending_.push_back(std::move(p));
    Pending& kept = pending_.back();
    check(MPI_Isend(kept.data.data(), count_of(static_cast<std::int64_t>(bytes)), MPI_BYTE, to,
                    tag_of(tag), world_, &kept.request),
          to);
  }

  void receive(int from, std::int64_t tag, void* data, std::size_t bytes) override {
    MPI_Request request;
    check(MPI_Irecv(data, count_of(static_cast<std::int64_t>(bytes)), MPI_BYTE, from, tag_of(tag),
                    world_, &request),
          from);
    wait(request, from);
  }

  void collective(const CollectiveCall& c) override {
    const MPI_Comm comm = communicator(*c.group);
    const int n = static_cast<int>(c.group->size());
    const bool narrow = c.element_bytes == 2;
    const MPI_Op op = narrow ? (c.type == ElementType::bf16 ? bf16_sum_ : fp16_sum_)
                      : c.reduction == Reduction::max ? MPI_MAX
                                                      : MPI_SUM;
    const auto counts = [&](const std::vector<std::int64_t>& bounds) {
      std::vector<int> all;
      for (std::size_t k = 0; k + 1 < bounds.size(); ++k)
        all.push_back(count_of(bounds[k + 1] - bounds[k]));
      return all;
    };
    const auto starts = [&](const std::vector<std::int64_t>& bounds) {
      std::vector<int> all;
      for (std::size_t k = 0; k + 1 < bounds.size(); ++k) all.push_back(count_of(bounds[k]));
      return all;
    };
    // 16-bit numbers travel as words of their width, so that counts are of elements.
    const MPI_Datatype type = narrow ? MPI_UINT16_T : c.element_bytes == 4 ? MPI_FLOAT : MPI_BYTE;
    const auto width =
        static_cast<std::int64_t>(narrow || c.element_bytes == 4 ? 1 : c.element_bytes);
    const auto scaled = [&](std::vector<std::int64_t> bounds) {
      for (auto& b : bounds) b *= width;
      return bounds;
    };
    const std::vector<std::int64_t> in = scaled(c.offsets), out = scaled(c.send_offsets);
    count_call(c, traffic_);
    const auto bytes = [&](std::int64_t elements) {
      return elements * static_cast<std::int64_t>(c.element_bytes);
    };
    MPI_Request request = MPI_REQUEST_NULL;
    std::vector<std::byte> part;
    std::vector<int> a, b, d, e;  // must live until the call is done
    int code = MPI_SUCCESS;
    switch (c.kind) {
      case CollectiveKind::all_reduce:
        code = MPI_Iallreduce(MPI_IN_PLACE, c.data, count_of(in.back()), type, op, comm, &request);
        break;
      case CollectiveKind::broadcast:
        code = MPI_Ibcast(c.data, count_of(in.back()), type, 0, comm, &request);
        break;
      case CollectiveKind::reduce:
        code = MPI_Ireduce(c.me == 0 ? MPI_IN_PLACE : static_cast<void*>(c.data), c.data,
                           count_of(in.back()), type, op, 0, comm, &request);
        break;
      case CollectiveKind::reduce_scatter:
        a = counts(in);
        part.resize(static_cast<std::size_t>(a[static_cast<std::size_t>(c.me)]) * c.element_bytes);
        code = MPI_Ireduce_scatter(c.data, part.data(), a.data(), type, op, comm, &request);
        break;
      case CollectiveKind::all_gather:
        a = counts(in), b = starts(in);
        code = MPI_Iallgatherv(MPI_IN_PLACE, 0, type, c.data, a.data(), b.data(), type, comm,
                               &request);
        break;
      case CollectiveKind::gather:
        a = counts(in), b = starts(in);
        code = c.me == 0 ? MPI_Igatherv(MPI_IN_PLACE, 0, type, c.data, a.data(), b.data(), type, 0,
                                        comm, &request)
                         : MPI_Igatherv(c.data + bytes(c.offsets[static_cast<std::size_t>(c.me)]),
                                        a[static_cast<std::size_t>(c.me)], type, nullptr, nullptr,
                                        nullptr, type, 0, comm, &request);
        break;
      case CollectiveKind::scatter:
        a = counts(in), b = starts(in);
        code = c.me == 0
                   ? MPI_Iscatterv(c.data, a.data(), b.data(), type, MPI_IN_PLACE, 0, type, 0, comm,
                                   &request)
                   : MPI_Iscatterv(nullptr, nullptr, nullptr, type,
                                   c.data + bytes(c.offsets[static_cast<std::size_t>(c.me)]),
                                   a[static_cast<std::size_t>(c.me)], type, 0, comm, &request);
        break;
      case CollectiveKind::all_to_all:
      case CollectiveKind::halo_exchange:
        a = counts(out), b = starts(out), d = counts(in), e = starts(in);
        code = MPI_Ialltoallv(c.send, a.data(), b.data(), type, c.data, d.data(), e.data(), type,
                              comm, &request);
        break;
      case CollectiveKind::shift: {
        MPI_Request sending;
        check(MPI_Isend(c.send, count_of(out.back()), type, (c.me + 1) % n, 0, comm, &sending),
              (*c.group)[static_cast<std::size_t>((c.me + 1) % n)]);
        check(MPI_Irecv(c.data, count_of(in.back()), type, (c.me + n - 1) % n, 0, comm, &request),
              (*c.group)[static_cast<std::size_t>((c.me + n - 1) % n)]);
        wait(request, (*c.group)[static_cast<std::size_t>((c.me + n - 1) % n)]);
        wait(sending, (*c.group)[static_cast<std::size_t>((c.me + 1) % n)]);
        return;
      }
    }
    check(code, -1);
    wait(request, -1);
    if (c.kind == CollectiveKind::reduce_scatter)
      std::memcpy(c.data + bytes(c.offsets[static_cast<std::size_t>(c.me)]), part.data(),
                  part.size());
  }

  void barrier() override {
    MPI_Request request;
    check(MPI_Ibarrier(world_, &request), -1);
    wait(request, -1);
  }

  void abort(const std::string& reason, int code) override {
    // mpirun says much when a rank aborts; the one line that matters goes first.
    std::fprintf(stderr, "partita: %s\n", reason.c_str());
    std::fflush(nullptr);
    MPI_Abort(MPI_COMM_WORLD, code);
    _exit(code);
  }
  void doing(const std::string& what) override { doing_ = what; }

 private:
  struct Pending {
    std::vector<std::byte> data;
    MPI_Request request = MPI_REQUEST_NULL;
  };

  void begin() {
    MPI_Comm_set_errhandler(world_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(world_, &rank_);
    MPI_Comm_size(world_, &size_);
    MPI_Op_create(add_narrow<ElementType::bf16>, 1, &bf16_sum_);
    MPI_Op_create(add_narrow<ElementType::fp16>, 1, &fp16_sum_);
  }

  /// The launch's or one that rank 0 makes; null on other hosts than rank 0's.
  std::shared_ptr<Board> board_of_rank_0(std::shared_ptr<Board> board) const {
    struct {
      char path[64] = "";
      std::uint64_t identity = 0;
    } where;
    if (rank_ == 0) {
      if (!board || board->ranks() != size_) board = Board::create(size_, 0, 0);
      where.identity = board->identity();
      board->path().copy(where.path, sizeof where.path - 1);
    }
    MPI_Bcast(&where, sizeof where, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (rank_ > 0) board = Board::open(where.path, size_);
    return board && board->identity() == where.identity ? board : nullptr;
  }

  static int tag_of(std::int64_t tag) { return static_cast<int>(tag % 30000); }

  void sweep() {
    while (!pending_.empty()) {
      int done = 0;
      MPI_Test(&pending_.front().request, &done, MPI_STATUS_IGNORE);
      if (!done) return;
      pending_.pop_front();
    }
  }

  void check(int code, int peer) const {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw PeerError(fmt::format("rank {} in {}{}: {}", rank_, doing_,
                                peer >= 0 ? fmt::format(" with rank {}", peer) : "",
                                std::string(text, static_cast<std::size_t>(length))));
  }

  void wait(MPI_Request& request, int peer) {
    state_->waits_for.store(peer >= 0 ? peer : RankState::kGroup, std::memory_order_relaxed);
    wait_until(request, peer);
    state_->waits_for.store(RankState::kNobody, std::memory_order_relaxed);
  }
  void wait_until(MPI_Request& request, int peer) {
    const auto start = Clock::now();
    for (int spins = 0;; ++spins) {
      int done = 0;
      check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), peer);
      if (done) return;
      if (spins % 1024 != 1023) continue;
      sweep();
      // More ranks than cores: let the others run; after a long wait, leave the core to them.
      const double waited = std::chrono::duration<double>(Clock::now() - start).count();
      usleep(waited > 0.1 ? 1000 : 0);
      if (waited > timeout_) {
        throw PeerError(late(peer));
      }
    }
  }

  /// Why a wait took too long. The board tells who holds up all; without it, who is waited for.
  std::string late(int peer) const {
    const std::string whom = peer >= 0 ? fmt::format("rank {}", peer) : "its group";
    const int culprit = board_ ? board_->culprit(rank_, size_) : -1;
    if (culprit < 0 || !describe_)
      return fmt::format("rank {} waits in {} for {}, which has not answered for {:.3g} s", rank_,
                         doing_, whom, timeout_);
    const RankState& mine = board_->rank(rank_);
    const RankState& its = board_->rank(culprit);
    const char state = process_state(its.process);
    return fmt::format("rank {} waits in {} for {}; rank {} {} {} for {:.3g} s", rank_,
                       describe_(rank_, mine.step, mine.instruction), whom, culprit,
                       state == 'T'                          ? "was stopped in"
                       : state == 0 || state == 'Z'          ? "died in"
                       : its.waits_for == RankState::kNobody ? "has been in"
                                                             : "is furthest behind, in",
                       describe_(culprit, its.step, its.instruction), timeout_);
  }

  MPI_Comm communicator(const std::vector<int>& group) {
    const auto known = communicators_.find(group);
    if (known != communicators_.end()) return known->second;
    MPI_Comm made = MPI_COMM_NULL;
    check(create(world_, group, made), -1);
    MPI_Comm_set_errhandler(made, MPI_ERRORS_RETURN);
    return communicators_[group] = made;
  }

  static int create(MPI_Comm from, const std::vector<int>& group, MPI_Comm& made) {
    MPI_Group all, mine;
    MPI_Comm_group(from, &all);
    MPI_Group_incl(all, static_cast<int>(group.size()), group.data(), &mine);
    const int code = MPI_Comm_create_group(from, mine, 31000, &made);
    MPI_Group_free(&all);
    MPI_Group_free(&mine);
    return code;
  }
  static MPI_Comm first(int ranks) {
    std::vector<int> group(static_cast<std::size_t>(ranks));
    std::iota(group.begin(), group.end(), 0);
    MPI_Comm made = MPI_COMM_NULL;
    if (create(MPI_COMM_WORLD, group, made) != MPI_SUCCESS)
      throw PeerError(fmt::format("MPI cannot make a group of {} ranks", ranks));
    return made;
  }

  double timeout_;
  Describe describe_;
  std::shared_ptr<Board> board_;
  MPI_Comm world_;  ///< of this transport: all ranks of the run, or the first so many
  int rank_ = 0, size_ = 1;
  MPI_Op bf16_sum_ = MPI_OP_NULL, fp16_sum_ = MPI_OP_NULL;
  std::string doing_ = "the start";
  std::deque<Pending> pending_;
  std::map<std::vector<int>, MPI_Comm> communicators_;
};

}  // namespace

std::unique_ptr<Transport> mpi_transport(const MpiOptions& options) {
  return std::make_unique<MpiTransport>(options);
}

std::unique_ptr<Transport> mpi_part(Transport& world, double timeout_s, int ranks) {
  return std::make_unique<MpiTransport>(dynamic_cast<MpiTransport&>(world), timeout_s, ranks);
}

std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string all(text, static_cast<std::size_t>(length));
  return all.substr(0, all.find(','));
}

}  // namespace partita
