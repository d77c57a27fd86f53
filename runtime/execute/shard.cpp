#include "runtime/execute/shard.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/temporary.h"

namespace partita::execute {

Shard::~Shard() {
  if (file_ >= 0) ::close(file_);
}

MachineError Shard::full(const std::string& what, int error) const {
  return MachineError(
      fmt::format("cannot write {} in {}: {}; make room, or set TMPDIR to a folder "
                  "with room",
                  what, place_, error == ENOSPC ? "the disk is full" : std::strerror(error)));
}

std::int64_t Shard::append(const std::string& folder, int rank, const std::byte* data,
                           std::size_t bytes) {
  if (file_ < 0) {
    const TemporaryPlace place =
        folder.empty() ? temporary_place() : TemporaryPlace{folder, "storage"};
    place_ = place.name();
    std::string name = fmt::format("{}/partita-shard-{}-XXXXXX", place.folder, rank);
    file_ = ::mkstemp(name.data());
    const int why = errno;
    if (file_ < 0 && (why == ENOSPC || why == EDQUOT)) throw full("a shard", why);
    if (file_ < 0)
      throw InputError(place_, fmt::format("cannot write a shard there: {}; name another folder",
                                           std::strerror(why)));
    ::unlink(name.c_str());
  }
  const std::int64_t at = end_;
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = ::pwrite(file_, data + done, bytes - done, at + static_cast<off_t>(done));
    if (n <= 0) throw full(fmt::format("a shard of {} more bytes", bytes), n == 0 ? ENOSPC : errno);
    done += static_cast<std::size_t>(n);
  }
  end_ += static_cast<std::int64_t>(bytes);
  return at;
}

void Shard::read(std::int64_t at, std::byte* to, std::size_t bytes) const {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = ::pread(file_, to + done, bytes - done, at + static_cast<off_t>(done));
    if (n <= 0)
      throw MachineError(fmt::format("cannot read a shard in {}: {}", place_,
                                     n == 0 ? "it is too short" : std::strerror(errno)));
    done += static_cast<std::size_t>(n);
  }
}

}  // namespace partita::execute
