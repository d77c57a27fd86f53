#include "runtime/cuda/nccl.h"

#include <cstdlib>
#include <string>

#ifdef PARTITA_NCCL
#  include <cuda_runtime_api.h>
#  include <fmt/format.h>
#  include <nccl.h>
#  include <unistd.h>

#  include <algorithm>
#  include <array>
#  include <chrono>
#  include <compare>
#  include <cstring>
#  include <exception>
#  include <map>
#  include <memory>
#  include <set>
#  include <thread>
#  include <vector>

#  include "base/error.h"
#  include "runtime/cuda/nccl_plan.h"
#endif

namespace partita::cuda {

#ifdef PARTITA_NCCL
namespace {

using execute::Channel;
constexpr std::int64_t kIdTag = 3;  // the progress's: between steps, never at once

std::string in_words(ncclResult_t r, ncclComm_t comm) {
  const char* last = ncclGetLastError(comm);
  return fmt::format("{}{}{}", ncclGetErrorString(r), last != nullptr && *last != '\0' ? ": " : "",
                     last != nullptr ? last : "");
}

ncclDataType_t type_of(const CollectiveCall& c, bool reduces) {
  if (!reduces) return ncclInt8;
  if (c.type == ElementType::bf16) return ncclBfloat16;
  return c.type == ElementType::fp16 ? ncclFloat16 : ncclFloat32;
}
bool reduces(CollectiveKind k) {
  return k == CollectiveKind::all_reduce || k == CollectiveKind::reduce_scatter ||
         k == CollectiveKind::reduce;
}

class Nccl : public NcclLinks {
 public:
  Nccl(const NcclOptions& o, std::function<void*()> stream) : o_(o), stream_(std::move(stream)) {}
  ~Nccl() override {
    // After a failure a communicator's end would wait for its peers.
    if (std::uncaught_exceptions() > 0) abort();
    if (aborted_) return;
    for (auto& [channel, comm] : comms_) static_cast<void>(ncclCommDestroy(comm));
    if (world_ != nullptr) static_cast<void>(ncclCommDestroy(world_));
  }

  std::string name() const override { return "NCCL " + nccl_version(); }
  double timeout_s() const override { return o_.timeout_s; }

  /// NCCL may refuse ranks that share a GPU; of ranks with one each that is an error.
  std::string open(Transport& control) override {
    if (!refused_.empty()) return refused_;
    if (world_ != nullptr) return {};
    rank_ = control.rank();
    const std::int64_t before = left();
    if (o_.shared_gpu) share_one_gpu(rank_);
    try {
      make_world(control);
    } catch (const MachineError& e) {
      if (!o_.shared_gpu) throw;
      refused_ = e.what();
    } catch (const PeerError& e) {
      if (!o_.shared_gpu) throw;
      refused_ = e.what();
    }
    others_ += std::max<std::int64_t>(0, before - left());
    return refused_;
  }
  void leave() override {
    if (refused_.empty()) refused_ = "NCCL: another rank has none";
    abort();
  }

  void meet(Transport& control, const std::vector<Channel>& channels) override {
    rank_ = control.rank();
    std::int64_t before = left();
    const auto went = [&] {
      const std::int64_t now = left(), n = std::max<std::int64_t>(0, before - now);
      before = now;
      return n;
    };
    // Channels without a common rank are made by one split. All ranks find the same sets.
    std::vector<std::vector<const Channel*>> splits;
    std::vector<std::set<int>> taken;
    for (const Channel& c : channels) {
      if (known_.count(c) > 0) continue;
      known_.insert(c);
      std::size_t s = 0;
      const auto meets = [&](std::size_t k) {
        for (const int r : c.group) {
          if (taken[k].count(r) > 0) return true;
        }
        return false;
      };
      while (s < splits.size() && meets(s)) ++s;
      if (s == splits.size()) splits.emplace_back(), taken.emplace_back();
      splits[s].push_back(&c);
      taken[s].insert(c.group.begin(), c.group.end());
    }
    for (const auto& split : splits) {
      int color = NCCL_SPLIT_NOCOLOR;
      for (std::size_t k = 0; k < split.size(); ++k) {
        for (const int r : split[k]->group) {
          if (r == rank_) color = static_cast<int>(k);
        }
      }
      ncclConfig_t config = configuration();
      // NCCL may fill it in later, from a thread of its own.
      ncclComm_t& comm =
          color == NCCL_SPLIT_NOCOLOR ? none_ : comms_[*split[static_cast<std::size_t>(color)]];
      comm = nullptr;
      settle(ncclCommSplit(world_, color, rank_, &comm, &config), world_,
             "the split of its communicator");
      if (color == NCCL_SPLIT_NOCOLOR) continue;
      PARTITA_ASSERT(comm != nullptr, "NCCL split a communicator and gave none");
      settle(ncclInProgress, comm, "a communicator of some ranks");
      bytes_[*split[static_cast<std::size_t>(color)]] += went();
    }
    went();
    connect();
    others_ += went();
    control.barrier();
  }

  void collective(const Channel& channel, const CollectiveCall& call) override {
    const ncclComm_t comm = comm_of(channel);
    const bool sums = reduces(call.kind);
    const ncclDataType_t type = type_of(call, sums);
    const auto width = static_cast<std::int64_t>(call.element_bytes);
    const std::int64_t each = sums ? 1 : width;
    const ncclRedOp_t op = call.reduction == Reduction::max ? ncclMax : ncclSum;
    auto* stream = static_cast<cudaStream_t>(stream_());
    // Its buffers come with the first call.
    const std::vector<NcclStep> steps = nccl_steps(call);
    const bool first = !steps.empty() && called_.insert(channel).second;
    const std::int64_t before = first ? left() : 0;
    const bool group = steps.size() > 1;
    if (group) settle(ncclGroupStart(), comm, "the start of a group");
    for (const NcclStep& s : steps) {
      const std::byte* from = (s.from_send ? call.send : call.data) + s.from * width;
      std::byte* to = call.data + s.to * width;
      const auto count = static_cast<std::size_t>(s.count * each);
      ncclResult_t r = ncclSuccess;
      switch (s.kind) {
        case NcclStep::Kind::all_reduce:
          r = ncclAllReduce(from, to, count, type, op, comm, stream);
          break;
        case NcclStep::Kind::all_gather:
          r = ncclAllGather(from, to, count, type, comm, stream);
          break;
        case NcclStep::Kind::reduce_scatter:
          r = ncclReduceScatter(from, to, count, type, op, comm, stream);
          break;
        case NcclStep::Kind::broadcast:
          r = ncclBroadcast(from, to, count, type, s.peer, comm, stream);
          break;
        case NcclStep::Kind::reduce:
          r = ncclReduce(from, to, count, type, op, s.peer, comm, stream);
          break;
        case NcclStep::Kind::send:
          r = ncclSend(from, count, type, s.peer, comm, stream);
          break;
        case NcclStep::Kind::receive:
          r = ncclRecv(to, count, type, s.peer, comm, stream);
          break;
      }
      const std::string what = std::string(partita::name(call.kind));
      if (group) {
        if (r != ncclSuccess && r != ncclInProgress) {
          // An abort within a group would wait for its end.
          static_cast<void>(ncclGroupEnd());
          fail(r, comm, what);
        }
      } else {
        settle(r, comm, what);
      }
    }
    if (group) settle(ncclGroupEnd(), comm, std::string(partita::name(call.kind)));
    if (first) bytes_[channel] += std::max<std::int64_t>(0, before - left());
    count_call(call, traffic_);
  }
  /// By ncclGroupSimulateEnd. NCCL reads which algorithm and protocol are allowed when it makes a
  /// communicator: each pair gets one.
  std::vector<LinkEstimate> estimates() override {
    std::vector<LinkEstimate> all;
    if (world_ == nullptr) return all;
    int ranks = 0;
    settle(ncclCommCount(world_, &ranks), world_, "the number of ranks");
    const std::pair<std::string, std::string> before{variable("NCCL_ALGO"), variable("NCCL_PROTO")};
    const auto pairs = estimated_pairs();
    for (const auto& [algorithm, protocol] : pairs) {
      for (const CollectiveKind kind : kEstimated) {
        if (!estimated(kind, algorithm)) continue;
        set_variable("NCCL_ALGO", algorithm);
        set_variable("NCCL_PROTO", protocol);
        estimate(kind, algorithm, protocol, ranks, all);
      }
    }
    set_variable("NCCL_ALGO", before.first);
    set_variable("NCCL_PROTO", before.second);
    return all;
  }
  void send(const Channel& channel, int to, const std::byte* from, std::int64_t bytes) override {
    const ncclComm_t comm = comm_of(channel);
    settle(ncclSend(from, static_cast<std::size_t>(bytes), ncclInt8, to > rank_ ? 1 : 0, comm,
                    static_cast<cudaStream_t>(stream_())),
           comm, fmt::format("a send to rank {}", to));
    ++traffic_.sends;
    traffic_.send_bytes += bytes;
  }
  void receive(const Channel& channel, int from, std::byte* to, std::int64_t bytes) override {
    const ncclComm_t comm = comm_of(channel);
    settle(ncclRecv(to, static_cast<std::size_t>(bytes), ncclInt8, from > rank_ ? 1 : 0, comm,
                    static_cast<cudaStream_t>(stream_())),
           comm, fmt::format("a receive from rank {}", from));
  }

  void add_memory(OutsideMemory& to) const override {
    to.communicators += Bytes{others_};
    for (const auto& [channel, bytes] : bytes_) {
      to.communicators += Bytes{bytes};
      if (called_.count(channel) == 0) continue;
      Bytes& most = to.by_ranks[static_cast<int>(channel.group.size())];
      most = std::max(most, Bytes{bytes});
    }
  }

  void poll() override {
    const auto look = [&](ncclComm_t comm) {
      ncclResult_t state = ncclSuccess;
      const ncclResult_t r = ncclCommGetAsyncError(comm, &state);
      if (r != ncclSuccess) fail(r, comm, "a look for errors");
      if (state != ncclSuccess && state != ncclInProgress) fail(state, comm, "a peer");
    };
    if (aborted_ || world_ == nullptr) return;
    look(world_);
    for (const auto& [channel, comm] : comms_) look(comm);
  }
  void abort() override {
    if (std::exchange(aborted_, true)) return;
    if (before_abort) before_abort();
    // As one: the end of each may wait for all kernels of the GPU, those of the others too
    // (https://github.com/pytorch/pytorch/issues/119797).
    static_cast<void>(ncclGroupStart());
    for (auto& [channel, comm] : comms_) static_cast<void>(ncclCommAbort(comm));
    if (world_ != nullptr) static_cast<void>(ncclCommAbort(world_));
    static_cast<void>(ncclGroupEnd());
  }

 private:
  /// Bytes of the GPU; 0 where other ranks take of it meanwhile.
  std::int64_t left() const {
    std::size_t available = 0, all = 0;
    return !o_.shared_gpu && cudaMemGetInfo(&available, &all) == cudaSuccess
               ? static_cast<std::int64_t>(available)
               : 0;
  }
  /// A GPU among all machines', in fixed size.
  struct Place {
    std::array<char, 256> host{};
    std::array<char, 32> bus{};
    friend auto operator<=>(const Place&, const Place&) = default;
  };
  static Place place() {
    Place p;
    int device = 0;
    if (::gethostname(p.host.data(), p.host.size() - 1) != 0) p.host[0] = '?';
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetPCIBusId(p.bus.data(), static_cast<int>(p.bus.size()), device) != cudaSuccess)
      static_cast<void>(cudaGetLastError());
    return p;
  }
  static std::string variable(const char* name) {
    const char* value = std::getenv(name);
    return value != nullptr ? value : "";
  }
  /// Empty: is not set.
  static void set_variable(const char* name, const std::string& value) {
    if (value.empty()) {
      ::unsetenv(name);
    } else {
      ::setenv(name, value.c_str(), 1);
    }
  }
  /// All sizes of one kind on a communicator of their own; one that NCCL cannot simulate ends it:
  /// its communicator is of no further use, ours are.
  void estimate(CollectiveKind kind, const std::string& algorithm, const std::string& protocol,
                int ranks, std::vector<LinkEstimate>& all) {
    ncclConfig_t config = configuration();
    // Of a call that goes on by itself nobody would get the estimate.
    config.blocking = 1;
    ncclComm_t comm = nullptr;
    settle(ncclCommSplit(world_, 0, rank_, &comm, &config), world_,
           "the split of its communicator");
    if (comm == nullptr) return;
    settle(ncclInProgress, comm, "a communicator for estimates");
    ncclResult_t r = ncclSuccess;
    auto* stream = static_cast<cudaStream_t>(stream_());
    constexpr std::int64_t kLeast = 1 << 10, kMost = 1 << 30;
    // Nothing is carried out, but addresses must be a GPU's.
    void* memory = nullptr;
    if (cudaMalloc(&memory, 1 << 20) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      static_cast<void>(ncclCommDestroy(comm));
      return;
    }
    for (std::int64_t bytes = kLeast; bytes <= kMost; bytes *= 4) {
      const auto whole = static_cast<std::size_t>(bytes / 4),
                 each = std::max<std::size_t>(1, whole / static_cast<std::size_t>(ranks));
      if (ncclGroupStart() != ncclSuccess) break;
      switch (kind) {
        case CollectiveKind::all_reduce:
          r = ncclAllReduce(memory, memory, whole, ncclFloat32, ncclSum, comm, stream);
          break;
        case CollectiveKind::all_gather:
          r = ncclAllGather(memory, memory, each, ncclFloat32, comm, stream);
          break;
        case CollectiveKind::reduce_scatter:
          r = ncclReduceScatter(memory, memory, each, ncclFloat32, ncclSum, comm, stream);
          break;
        case CollectiveKind::broadcast:
          r = ncclBroadcast(memory, memory, whole, ncclFloat32, 0, comm, stream);
          break;
        default:
          r = ncclReduce(memory, memory, whole, ncclFloat32, ncclSum, 0, comm, stream);
          break;
      }
      ncclSimInfo_t info = NCCL_SIM_INFO_INITIALIZER;
      const ncclResult_t ended = ncclGroupSimulateEnd(&info);
      if (r != ncclSuccess || ended != ncclSuccess) break;
      if (info.estimatedTime > 0)
        all.push_back({kind, algorithm, protocol, bytes, static_cast<double>(info.estimatedTime)});
    }
    static_cast<void>(cudaFree(memory));
    static_cast<void>(ncclCommAbort(comm));
  }
  ncclConfig_t configuration() const {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    // A call that cannot go on returns, so that we can give up.
    config.blocking = 0;
    if (o_.shared_gpu) config.maxCTAs = 4;
    return config;
  }
  void make_world(Transport& control) {
    ncclUniqueId id = {};
    struct Letter {
      ncclUniqueId id;
      std::int32_t code, first, second;  ///< ranks of one GPU, where there are such
    } letter = {};
    const Place mine = place();
    if (rank_ == 0) {
      std::map<Place, int> ranks{{mine, 0}};
      for (int r = 1; r < control.size(); ++r) {
        Place theirs;
        control.receive(r, kIdTag, &theirs, sizeof theirs);
        const auto [known, fresh] = ranks.try_emplace(theirs, r);
        if (!fresh && letter.second == 0) letter.first = known->second, letter.second = r;
      }
      letter.code = ncclGetUniqueId(&letter.id);
      for (int r = 1; r < control.size(); ++r) control.send(r, kIdTag, &letter, sizeof letter);
    } else {
      control.send(0, kIdTag, &mine, sizeof mine);
      control.receive(0, kIdTag, &letter, sizeof letter);
    }
    // NCCL would refuse them in words of its own.
    if (letter.second > 0 && !o_.shared_gpu)
      throw InputError(
          "--backend",
          fmt::format("ranks {} and {} are on one GPU; start no more ranks on a machine "
                      "than it has GPUs, or use --share-gpu, which proves mathematics "
                      "and not speed",
                      letter.first, letter.second));
    id = letter.id;
    const auto code = static_cast<ncclResult_t>(letter.code);
    if (code != ncclSuccess)
      throw MachineError(
          fmt::format("NCCL on rank 0 opens no port to meet at: {}; set "
                      "NCCL_SOCKET_IFNAME to a network interface",
                      ncclGetErrorString(code)));
    ncclConfig_t config = configuration();
    // On its own: world_ is filled in by the call, and arguments come in any order.
    const ncclResult_t begun = ncclCommInitRankConfig(&world_, control.size(), id, rank_, &config);
    settle(begun, world_, fmt::format("the communicator of all {} ranks", control.size()));
  }
  /// NCCL connects two ranks when they first call, and the host waits for that; so each message's
  /// ranks call once now, in the order of channels, which is the same on all. Later they come in
  /// orders of their own.
  void connect() {
    constexpr std::size_t kApart = 256;
    void* memory = nullptr;
    if (const cudaError_t e = cudaMalloc(&memory, 2 * kApart); e != cudaSuccess)
      throw MachineError(fmt::format("CUDA: {} bytes: {}", 2 * kApart, cudaGetErrorString(e)));
    const std::unique_ptr<void, void (*)(void*)> held(
        memory, [](void* p) { static_cast<void>(cudaFree(p)); });
    auto* at = static_cast<std::byte*>(memory);
    auto* stream = static_cast<cudaStream_t>(stream_());
    for (const auto& [channel, comm] : comms_) {
      if (!execute::is_message(channel)) continue;
      const int peer = channel.group[0] == rank_ ? 1 : 0;
      const std::string what =
          fmt::format("the connection with rank {}", channel.group[static_cast<std::size_t>(peer)]);
      settle(ncclGroupStart(), comm, what);
      const ncclResult_t sent = ncclSend(at, 1, ncclInt8, peer, comm, stream);
      const ncclResult_t got = ncclRecv(at + kApart, 1, ncclInt8, peer, comm, stream);
      settle(ncclGroupEnd(), comm, what);
      for (const ncclResult_t r : {sent, got}) {
        if (r != ncclSuccess && r != ncclInProgress) fail(r, comm, what);
      }
    }
    const auto start = std::chrono::steady_clock::now();
    for (cudaError_t e = cudaErrorNotReady; e != cudaSuccess;) {
      e = cudaStreamQuery(stream);
      if (e != cudaSuccess && e != cudaErrorNotReady)
        throw MachineError(fmt::format("CUDA: first messages: {}", cudaGetErrorString(e)));
      poll();
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (waited.count() > o_.timeout_s) {
        abort();
        throw PeerError(
            fmt::format("NCCL: first messages between the ranks did not come within "
                        "{:g} s",
                        o_.timeout_s));
      }
    }
  }
  ncclComm_t comm_of(const Channel& channel) const {
    const auto it = comms_.find(channel);
    PARTITA_ASSERT(it != comms_.end(), fmt::format("no communicator of {} ranks in lane {}",
                                                   channel.group.size(), channel.lane));
    return it->second;
  }
  /// Waits while a call is in progress, on the host.
  void settle(ncclResult_t r, ncclComm_t comm, const std::string& what) {
    const auto start = std::chrono::steady_clock::now();
    while (r == ncclInProgress) {
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = ncclCommGetAsyncError(comm, &state);
      if (asked != ncclSuccess) fail(asked, comm, what);
      r = state;
      const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
      if (r == ncclInProgress && waited.count() > o_.timeout_s) {
        abort();
        throw PeerError(fmt::format("NCCL: {} did not come about within {:g} s; is a rank missing?",
                                    what, o_.timeout_s));
      }
      if (r == ncclInProgress && waited.count() > 1e-3)
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    if (r != ncclSuccess) fail(r, comm, what);
  }
  [[noreturn]] void fail(ncclResult_t r, ncclComm_t comm, const std::string& what) {
    const std::string why = in_words(r, comm);
    abort();
    const std::string text = fmt::format("NCCL: {}: {}", what, why);
    if (r == ncclRemoteError || r == ncclSystemError) throw PeerError(text);
    throw MachineError(text);
  }

  NcclOptions o_;
  std::function<void*()> stream_;
  int rank_ = 0;
  ncclComm_t world_ = nullptr, none_ = nullptr;
  std::string refused_;  ///< why there is no world_
  std::set<Channel> known_;
  std::map<Channel, ncclComm_t> comms_;
  std::map<Channel, std::int64_t> bytes_;  ///< that went with each
  std::int64_t others_ = 0;                ///< with that of all ranks, and first messages
  std::set<Channel> called_;               ///< have run a collective
  bool aborted_ = false;
};

}  // namespace

std::unique_ptr<NcclLinks> nccl_links(const NcclOptions& options, std::function<void*()> stream) {
  // Of blocks that a graph's calls have: they are given back before NCCL would forget them.
  ::setenv("NCCL_GRAPH_REGISTER", "0", 0);
  return std::make_unique<Nccl>(options, std::move(stream));
}
std::string nccl_version() {
  int v = 0;
  if (ncclGetVersion(&v) != ncclSuccess) return "";
  return fmt::format("{}.{}.{}", v / 10000, v / 100 % 100, v % 100);
}
#else
std::unique_ptr<NcclLinks> nccl_links(const NcclOptions&, std::function<void*()>) {
  return nullptr;
}
std::string nccl_version() { return ""; }
#endif

void share_one_gpu(int rank) {
  const auto set = [](const char* name, const std::string& value) {
    ::setenv(name, value.c_str(), 0);
  };
  set("NCCL_HOSTID", "partita-rank-" + std::to_string(rank));
  set("NCCL_SOCKET_IFNAME", "lo");
  set("NCCL_NET", "Socket");
  set("NCCL_IB_DISABLE", "1");
  set("NCCL_MNNVL_ENABLE", "0");
  set("NCCL_NVLS_ENABLE", "0");
  set("NCCL_ALGO", "Ring");
  set("NCCL_PROTO", "Simple");
}

}  // namespace partita::cuda
