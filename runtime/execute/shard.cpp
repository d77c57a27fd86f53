#include "runtime/execute/shard.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "base/error.h"

namespace partita::execute {

Shard::~Shard() {
  if (file_ >= 0) ::close(file_);
}

std::int64_t Shard::append(const std::string& folder, int rank, const std::byte* data,
                           std::size_t bytes) {
  if (file_ < 0) {
    std::error_code error;
    const std::string where =
        folder.empty() ? std::filesystem::temp_directory_path(error).string() : folder;
    std::string name = fmt::format("{}/partita-shard-{}-XXXXXX", where, rank);
    file_ = ::mkstemp(name.data());
    if (file_ < 0) {
      throw InputError("storage", fmt::format("cannot write a shard in {}: {}; name another folder",
                                              where, std::strerror(errno)));
    }
    ::unlink(name.c_str());
  }
  const std::int64_t at = end_;
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = ::pwrite(file_, data + done, bytes - done, at + static_cast<off_t>(done));
    if (n <= 0) {
      throw InputError("storage", fmt::format("cannot write a shard of {} more bytes: {}", bytes,
                                              n == 0 ? "the disk is full" : std::strerror(errno)));
    }
    done += static_cast<std::size_t>(n);
  }
  end_ += static_cast<std::int64_t>(bytes);
  return at;
}

void Shard::read(std::int64_t at, std::byte* to, std::size_t bytes) const {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t n = ::pread(file_, to + done, bytes - done, at + static_cast<off_t>(done));
    if (n <= 0)
      throw InternalError(fmt::format("cannot read a shard: {}",
                                      n == 0 ? "it is too short" : std::strerror(errno)));
    done += static_cast<std::size_t>(n);
  }
}

}  // namespace partita::execute
