// NCCL between processes of one machine, through files of a folder that rank 0 makes under TMPDIR.
// Communicators that do not block take their time: until somebody has asked how they are, nothing
// that was called is in a stream, and a split has given nothing.
#include <fmt/format.h>
#include <nccl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <vector>

#include "runtime/cuda/machine.h"
#include "tests/runtime/cuda/emulated/gpu.h"

namespace {

using emulated::refuse;
using partita::ElementType;
using partita::cuda::Numbers;
namespace fs = std::filesystem;

enum class Kind { all_reduce, all_gather, reduce_scatter, broadcast, reduce, send, receive };
const char* name_of(Kind k) {
  constexpr const char* names[] = {"AllReduce", "AllGather", "ReduceScatter", "Broadcast",
                                   "Reduce",    "Send",      "Recv"};
  return names[static_cast<int>(k)];
}

struct Operation {
  Kind kind;
  const std::byte* from;
  std::byte* to;
  std::size_t count;
  ncclDataType_t type;
  ncclRedOp_t reduction;
  int peer;  ///< root, or the other
  cudaStream_t stream;
};

/// A communicator; what is queued shares it.
struct State {
  fs::path folder;
  int rank = 0, ranks = 0, device = 0;
  bool blocking = true, aborted = false, ended = false;
  ncclResult_t result = ncclSuccess;
  std::string last;
  /// What a call has left to do; whoever asks how the communicator is has it done. True: done.
  std::function<bool()> rest;
  std::int64_t collectives = 0, splits = 0;
  int held = 0;     ///< graphs' calls that are not destroyed
  int running = 0;  ///< kernels in streams
  std::map<int, std::int64_t> sent, received;
  std::int64_t calls = 0;  ///< a group is one
  std::map<std::int64_t, std::vector<fs::path>>
      mine;  ///< by call: files that others may still read
  std::map<int, pid_t> pids;
};

}  // namespace

struct ncclComm {
  std::shared_ptr<State> state;
};

namespace {

thread_local int depth = 0;
thread_local std::vector<std::shared_ptr<State>> ending;  ///< by aborts of the group
std::vector<std::weak_ptr<State>> all_states;
thread_local std::vector<std::pair<ncclComm_t, Operation>> grouped;
thread_local std::string last_error;

ncclResult_t fail(ncclResult_t r, const std::string& why, State* s = nullptr) {
  last_error = why;
  if (s != nullptr) s->result = r, s->last = why;
  return refuse(r, why);
}

void write(const fs::path& to, const void* data, std::size_t bytes) {
  const fs::path part = to.string() + ".part";
  std::ofstream out(part, std::ios::binary);
  out.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  out.close();
  fs::rename(part, to);
}
std::vector<std::byte> read(const fs::path& from) {
  std::ifstream in(from, std::ios::binary);
  std::vector<std::byte> all(fs::file_size(from));
  in.read(reinterpret_cast<char*>(all.data()), static_cast<std::streamsize>(all.size()));
  return all;
}

std::size_t width(ncclDataType_t t) { return t == ncclInt8 ? 1 : t == ncclFloat32 ? 4 : 2; }
bool sums(Kind k) {
  return k == Kind::all_reduce || k == Kind::reduce_scatter || k == Kind::reduce;
}

/// What a rank says beside its data; all ranks' must agree.
struct Header {
  std::int32_t kind, type, reduction, root;
  std::uint64_t count;
  friend bool operator==(const Header&, const Header&) = default;
};

std::string parted(const fs::path& folder, const std::string& what, std::int64_t number, int rank) {
  return (folder / fmt::format("{}{}.{}", what, number, rank)).string();
}

/// Bytes of its own that a rank gives.
std::size_t given(const State& s, const Operation& o) {
  switch (o.kind) {
    case Kind::reduce_scatter:
      return o.count * static_cast<std::size_t>(s.ranks) * width(o.type);
    case Kind::broadcast:
      return o.peer == s.rank ? o.count * width(o.type) : 0;
    case Kind::receive:
      return 0;
    default:
      return o.count * width(o.type);
  }
}
std::size_t taken(const State& s, const Operation& o) {
  switch (o.kind) {
    case Kind::all_gather:
      return o.count * static_cast<std::size_t>(s.ranks) * width(o.type);
    case Kind::reduce:
      return o.peer == s.rank ? o.count * width(o.type) : 0;
    case Kind::send:
      return 0;
    default:
      return o.count * width(o.type);
  }
}

void add(std::vector<std::byte>& to, const std::byte* from, std::size_t count, ncclDataType_t type,
         ncclRedOp_t reduction) {
  const ElementType t = type == ncclBfloat16  ? ElementType::bf16
                        : type == ncclFloat16 ? ElementType::fp16
                                              : ElementType::fp32;
  const Numbers a(to.data(), t), b(const_cast<std::byte*>(from), t);
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(count); ++i) {
    const float x = a[i], y = b[i];
    a[i] = reduction == ncclMax ? std::max(x, y) : x + y;
  }
}

/// Two calls on its stream: one gives what this rank has, one takes when all is there.
struct Halves {
  emulated::Call give, take;
};
Halves halves_of(const std::shared_ptr<State>& s, const Operation& o, std::int64_t call) {
  const bool message = o.kind == Kind::send || o.kind == Kind::receive;
  const std::int64_t number = !message               ? s->collectives++
                              : o.kind == Kind::send ? s->sent[o.peer]++
                                                     : s->received[o.peer]++;
  const Header header{static_cast<std::int32_t>(o.kind), static_cast<std::int32_t>(o.type),
                      sums(o.kind) ? static_cast<std::int32_t>(o.reduction) : 0,
                      o.kind == Kind::broadcast || o.kind == Kind::reduce ? o.peer : 0,
                      static_cast<std::uint64_t>(o.count)};
  const auto file_of = [=](int from, int to) {
    return fs::path(message ? parted(s->folder, fmt::format("m{}to", from), to, 0) +
                                  fmt::format(".{}", number)
                            : parted(s->folder, "c", number, from));
  };
  const std::string name = name_of(o.kind);
  const auto give = [=] {
    if (s->aborted || o.kind == Kind::receive) return;
    std::vector<std::byte> all(sizeof header + given(*s, o));
    std::memcpy(all.data(), &header, sizeof header);
    std::memcpy(all.data() + sizeof header, o.from, given(*s, o));
    write(file_of(s->rank, message ? o.peer : 0), all.data(), all.size());
  };
  const auto ready = [=] {
    if (s->aborted) return true;
    // A send is over when it has been taken.
    if (o.kind == Kind::send) return !fs::exists(file_of(s->rank, o.peer));
    if (o.kind == Kind::receive) return fs::exists(file_of(o.peer, s->rank));
    for (int r = 0; r < s->ranks; ++r) {
      if (!fs::exists(file_of(r, 0))) return false;
    }
    return true;
  };
  const auto take = [=] {
    --s->running;
    if (s->aborted || o.kind == Kind::send) return;
    const auto brought = [&](int r) {
      auto all = read(file_of(r, s->rank));
      Header theirs{};
      std::memcpy(&theirs, all.data(), sizeof theirs);
      Header expected = header;
      if (message) expected.kind = static_cast<std::int32_t>(Kind::send);
      if (theirs != expected) {
        emulated::say(fmt::format("rank {} calls {} of {}, where rank {} calls {} of {}", r,
                                  name_of(static_cast<Kind>(theirs.kind)), theirs.count, s->rank,
                                  name, o.count));
        ::_exit(134);
      }
      all.erase(all.begin(), all.begin() + sizeof theirs);
      return all;
    };
    const std::size_t bytes = o.count * width(o.type);
    if (o.kind == Kind::receive) {
      const auto all = brought(o.peer);
      std::memcpy(o.to, all.data(), bytes);
      fs::remove(file_of(o.peer, s->rank));
      return;
    }
    std::vector<std::vector<std::byte>> all;
    for (int r = 0; r < s->ranks; ++r) all.push_back(brought(r));
    const auto n = static_cast<std::size_t>(s->rank);
    switch (o.kind) {
      case Kind::all_gather:
        for (std::size_t r = 0; r < all.size(); ++r)
          std::memcpy(o.to + r * bytes, all[r].data(), bytes);
        break;
      case Kind::broadcast:
        std::memcpy(o.to, all[static_cast<std::size_t>(o.peer)].data(), bytes);
        break;
      default: {
        if (o.kind == Kind::reduce && o.peer != s->rank) break;
        std::vector<std::byte> sum = all[0];
        for (std::size_t r = 1; r < all.size(); ++r)
          add(sum, all[r].data(), sum.size() / width(o.type), o.type, o.reduction);
        std::memcpy(o.to, sum.data() + (o.kind == Kind::reduce_scatter ? n * bytes : 0), bytes);
      }
    }
    // All have brought to this call, so all have taken of those before; of its own group maybe not.
    while (!s->mine.empty() && s->mine.begin()->first < call) {
      for (const fs::path& f : s->mine.begin()->second) fs::remove(f);
      s->mine.erase(s->mine.begin());
    }
    s->mine[call].push_back(file_of(s->rank, 0));
  };
  return {{name, nullptr, give, emulated::Call::Kind::order, false},
          {"ncclDevKernel_" + name, ready, take, emulated::Call::Kind::kernel, true}};
}
/// All that is given goes first, and who waits for what was sent goes last: a group's calls wait
/// for each other's.
void put(const std::shared_ptr<State>& s, const std::vector<Operation>& operations) {
  const cudaStream_t stream = operations.at(0).stream;
  const bool one = std::all_of(operations.begin(), operations.end(),
                               [&](const Operation& o) { return o.stream == stream; });
  // A graph that has calls of a communicator holds it.
  ++s->held;
  const std::shared_ptr<void> hold(nullptr, [s](void*) { --s->held; });
  if (one && emulated::captured(stream, [=](cudaStream_t again) {
        static_cast<void>(hold);
        auto theirs = operations;
        for (Operation& o : theirs) o.stream = again;
        put(s, theirs);
      }))
    return;
  std::vector<std::pair<const Operation*, Halves>> all;
  const std::int64_t number = s->calls++;
  for (const Operation& o : operations) all.emplace_back(&o, halves_of(s, o, number));
  for (auto& [o, h] : all) emulated::queue(o->stream, std::move(h.give));
  s->running += static_cast<int>(all.size());
  for (const bool sends : {false, true}) {
    for (auto& [o, h] : all) {
      if ((o->kind == Kind::send) == sends) emulated::queue(o->stream, std::move(h.take));
    }
  }
}

/// Null, or why not: of a communicator that is at work nothing more is asked.
ncclResult_t usable(ncclComm_t comm) {
  if (comm == nullptr || comm->state->ended || comm->state->aborted)
    return fail(ncclInvalidArgument, "a call to a communicator that is not there");
  if (comm->state->result == ncclInProgress)
    return fail(ncclInvalidArgument, "a call to a communicator whose last call is in progress",
                comm->state.get());
  return ncclSuccess;
}
/// The call is done, or, of one that does not block, will be when somebody asks.
ncclResult_t begun(State& s, std::function<bool()> rest) {
  if (s.blocking) {
    while (!rest()) ::usleep(100);
    return ncclSuccess;
  }
  s.rest = std::move(rest);
  return s.result = ncclInProgress;
}

ncclResult_t call(ncclComm_t comm, const Operation& o) {
  if (const ncclResult_t r = usable(comm); r != ncclSuccess) return r;
  const State& s = *comm->state;
  if (o.peer < 0 || o.peer >= s.ranks)
    return fail(ncclInvalidArgument, fmt::format("rank {} of {}", o.peer, s.ranks));
  if (sums(o.kind) && o.type != ncclFloat32 && o.type != ncclBfloat16 && o.type != ncclFloat16)
    return fail(ncclInvalidArgument, "a type that is not summed here");
  int device = 0;
  cudaGetDevice(&device);
  if (device != s.device) return fail(ncclInvalidUsage, "a communicator of another GPU");
  if (depth > 0) {
    grouped.emplace_back(comm, o);
    return ncclSuccess;
  }
  // Pinned memory of the host will do: kernels reach it (NCCL 2.28.9, misc/argcheck.cc).
  const bool there = (given(s, o) == 0 || emulated::reachable(o.from, given(s, o))) &&
                     (taken(s, o) == 0 || emulated::reachable(o.to, taken(s, o)));
  if (!there)
    return fail(ncclInvalidArgument, std::string(name_of(o.kind)) + " of what no GPU reaches");
  return begun(*comm->state, [s = comm->state, o] {
    put(s, {o});
    return true;
  });
}

/// NCCL would wait for ever.
void not_held(const State& s, const char* call) {
  if (s.held == 0) return;
  emulated::say(fmt::format("{} of a communicator that a graph has {} calls of", call, s.held));
  ::_exit(134);
}

/// The end of a communicator waits for all kernels of its GPU.
void reclaim(const std::vector<std::shared_ptr<State>>& these) {
  for (const auto& weak : all_states) {
    const auto other = weak.lock();
    if (other == nullptr || other->aborted || other->running == 0) continue;
    emulated::say(
        fmt::format("ncclCommAbort waits for {} kernels of another communicator", other->running));
    ::_exit(134);
  }
  for (const auto& s : these) s->ended = true;
}

std::string host_of_this() {
  const char* id = std::getenv("NCCL_HOSTID");
  return id != nullptr ? id : "this host";
}

}  // namespace

ncclResult_t ncclGetVersion(int* v) {
  *v = NCCL_VERSION_CODE;
  return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t r) {
  switch (r) {
    case ncclInvalidUsage:
      return "invalid usage";
    case ncclInvalidArgument:
      return "invalid argument";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    default:
      return r == ncclSuccess ? "no error" : "error";
  }
}
const char* ncclGetLastError(ncclComm_t comm) {
  if (comm != nullptr) last_error = comm->state->last;
  return last_error.c_str();
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  std::string folder = (fs::temp_directory_path() / "emulated-nccl-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr || folder.size() >= sizeof *id) return ncclSystemError;
  std::memset(id, 0, sizeof *id);
  std::memcpy(id->internal, folder.data(), folder.size());
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* to, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config->magic != 0xcafebeef || rank < 0 || rank >= ranks)
    return fail(ncclInvalidArgument, "a communicator's start");
  auto s = std::make_shared<State>();
  s->folder = id.internal;
  s->rank = rank;
  s->ranks = ranks;
  s->blocking = config->blocking != 0;
  int device = 0;
  cudaGetDevice(&device);
  s->device = device;
  *to = new ncclComm{s};
  all_states.push_back(s);
  char bus[32] = {};
  cudaDeviceGetPCIBusId(bus, sizeof bus, device);
  // As of a machine whose one way out is its loopback.
  if (const char* file = std::getenv("NCCL_TOPO_DUMP_FILE"); file != nullptr && rank == 0) {
    std::ofstream(file) << fmt::format(R"(<system version="1">
  <cpu host_hash="0x1" numaid="-1" affinity="0000ffff" arch="x86_64" vendor="GenuineIntel" familyid="6" modelid="143">
    <pci busid="{}" class="0x030200" vendor="0x10de" device="0x2335" link_speed="32.0 GT/s PCIe" link_width="16">
      <gpu dev="0" sm="90" rank="0" gdr="0"/>
    </pci>
    <nic>
      <net name="lo" dev="0" latency="0" speed="10000" port="0" guid="0x0" maxconn="65536" gdr="0"/>
    </nic>
  </cpu>
</system>
)",
                                       bus);
  }
  const std::string hello = fmt::format("{} {}|{}", ::getpid(), host_of_this(), bus);
  write(parted(s->folder, "hello", 0, rank), hello.data(), hello.size());
  return begun(*s, [p = s.get()] {
    std::set<std::string> known;
    for (int r = 0; r < p->ranks; ++r) {
      const fs::path file = parted(p->folder, "hello", 0, r);
      if (!fs::exists(file)) return false;
      const auto bytes = read(file);
      const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      p->pids[r] = std::atoi(text.c_str());
      if (!known.insert(text.substr(text.find(' ') + 1)).second) {
        fail(ncclInvalidUsage,
             fmt::format(
                 "Duplicate GPU detected : rank {} is on one that another rank of its host has", r),
             p);
        return true;
      }
    }
    // Its buffers.
    return true;
  });
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* to,
                           ncclConfig_t* config) {
  if (const ncclResult_t r = usable(comm); r != ncclSuccess) return r;
  const auto parent = comm->state;
  const std::int64_t number = parent->splits++;
  const int said[2] = {color, key};
  write(parted(parent->folder, "split", number, parent->rank), said, sizeof said);
  const bool blocks = config != nullptr && config->blocking == 1;
  const bool was = std::exchange(parent->blocking, blocks);
  const ncclResult_t r = begun(*parent, [=] {
    std::vector<std::pair<int, int>> members;  // key, rank
    for (int k = 0; k < parent->ranks; ++k) {
      const fs::path file = parted(parent->folder, "split", number, k);
      if (!fs::exists(file)) return false;
      const auto bytes = read(file);
      int theirs[2] = {};
      std::memcpy(theirs, bytes.data(), sizeof theirs);
      if (theirs[0] == color) members.emplace_back(theirs[1], k);
    }
    *to = nullptr;
    if (color == NCCL_SPLIT_NOCOLOR) return true;
    std::sort(members.begin(), members.end());
    auto s = std::make_shared<State>();
    s->folder = parent->folder / fmt::format("{}of{}", color, number);
    fs::create_directories(s->folder);
    s->ranks = static_cast<int>(members.size());
    s->device = parent->device;
    s->blocking = blocks;
    for (int k = 0; k < s->ranks; ++k) {
      const int at = members[static_cast<std::size_t>(k)].second;
      if (at == parent->rank) s->rank = k;
      s->pids[k] = parent->pids[at];
    }
    *to = new ncclComm{s};
    all_states.push_back(s);
    // It has a start of its own.
    if (!blocks) begun(*s, [] { return true; });
    return true;
  });
  parent->blocking = was;
  return r;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  if (comm == nullptr || comm->state->ended) return ncclInvalidArgument;
  State& s = *comm->state;
  if (s.result == ncclInProgress && s.rest && s.rest()) {
    s.rest = nullptr;
    if (s.result == ncclInProgress) s.result = ncclSuccess;
  }
  for (const auto& [rank, pid] : s.pids) {
    if (rank == s.rank || ::kill(pid, 0) == 0 || fs::exists(parted(s.folder, "left", 0, rank)))
      continue;
    fail(ncclRemoteError, fmt::format("rank {} is gone", rank), &s);
  }
  *state = s.result;
  return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t comm, int* count) {
  *count = comm->state->ranks;
  return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  if (const ncclResult_t r = usable(comm); r != ncclSuccess) return r;
  State& s = *comm->state;
  not_held(s, "ncclCommDestroy");
  s.ended = true;
  std::error_code ignored;
  write(parted(s.folder, "left", 0, s.rank), "", 0);
  for (int r = 0; r < s.ranks; ++r) {
    if (!fs::exists(parted(s.folder, "left", 0, r))) return ncclSuccess;
  }
  fs::remove_all(s.folder, ignored);
  return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
  if (comm == nullptr || comm->state->ended)
    return fail(ncclInvalidArgument, "an abort of what is not there");
  not_held(*comm->state, "ncclCommAbort");
  comm->state->aborted = true;
  ending.push_back(comm->state);
  if (depth == 0) reclaim(std::exchange(ending, {}));
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++depth;
  return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
  if (depth == 0) return fail(ncclInvalidUsage, "a group's end without its start");
  if (--depth > 0) return ncclSuccess;
  if (!ending.empty()) {
    grouped.clear();
    reclaim(std::exchange(ending, {}));
    return ncclSuccess;
  }
  std::map<ncclComm_t, std::vector<Operation>> by_comm;
  for (const auto& [comm, o] : grouped) by_comm[comm].push_back(o);
  grouped.clear();
  ncclResult_t result = ncclSuccess;
  for (const auto& [comm, operations] : by_comm) {
    for (const Operation& o : operations) {
      const State& s = *comm->state;
      if ((given(s, o) > 0 && !emulated::reachable(o.from, given(s, o))) ||
          (taken(s, o) > 0 && !emulated::reachable(o.to, taken(s, o))))
        return fail(ncclInvalidArgument, std::string(name_of(o.kind)) + " of what no GPU reaches");
    }
    const ncclResult_t r = begun(*comm->state, [s = comm->state, all = operations] {
      put(s, all);
      return true;
    });
    if (r != ncclSuccess) result = r;
  }
  return result;
}
/// Nothing is carried out. Microseconds: by a law of bytes.
ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t* info) {
  if (depth != 1 || info->magic != 0x74685283) return fail(ncclInvalidUsage, "a simulated group");
  --depth;
  double bytes = 0;
  for (const auto& [comm, o] : grouped)
    bytes += static_cast<double>(std::max(given(*comm->state, o), taken(*comm->state, o)));
  grouped.clear();
  info->estimatedTime = static_cast<float>(10 + bytes / 1e4);
  return ncclSuccess;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return call(comm, {Kind::all_reduce, static_cast<const std::byte*>(from),
                     static_cast<std::byte*>(to), count, type, op, 0, stream});
}
ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
  return call(comm, {Kind::all_gather, static_cast<const std::byte*>(from),
                     static_cast<std::byte*>(to), count, type, ncclSum, 0, stream});
}
ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return call(comm, {Kind::reduce_scatter, static_cast<const std::byte*>(from),
                     static_cast<std::byte*>(to), count, type, op, 0, stream});
}
ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
  return call(comm, {Kind::broadcast, static_cast<const std::byte*>(from),
                     static_cast<std::byte*>(to), count, type, ncclSum, root, stream});
}
ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                        ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
  return call(comm, {Kind::reduce, static_cast<const std::byte*>(from), static_cast<std::byte*>(to),
                     count, type, op, root, stream});
}
ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream) {
  return call(comm, {Kind::send, static_cast<const std::byte*>(from), nullptr, count, type, ncclSum,
                     peer, stream});
}
ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return call(comm, {Kind::receive, nullptr, static_cast<std::byte*>(to), count, type, ncclSum,
                     peer, stream});
}
