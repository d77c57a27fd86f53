// cli/checkpoint.h: parameters to be read from storage.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/temporary.h"
#include "models/graph.h"
#include "runtime/reference/serial.h"

namespace partita::cli {

/// All parameters in a file, row-major and one after the other: what a checkpoint is to a reader.
class Checkpoint {
 public:
  /// Drawn from the seed. MachineError where there is no room for them.
  Checkpoint(const Graph& graph, std::uint64_t seed) {
    const TemporaryPlace place = temporary_place();
    place_ = place.name();
    std::string name = place.folder + "/partita-parameters-XXXXXX";
    file_ = ::mkstemp(name.data());
    if (file_ < 0) {
      const int why = errno;
      if (why == ENOSPC || why == EDQUOT) throw full(why);
      throw InputError(place_, fmt::format("cannot write the parameters' file there: {}; set "
                                           "TMPDIR to another folder",
                                           std::strerror(why)));
    }
    ::unlink(name.c_str());
    std::int64_t at = 0;
    for (const Parameter& q : graph.parameters) {
      begin_.push_back(at);
      std::vector<float> values(static_cast<std::size_t>(elements(q.shape)));
      for (std::size_t k = 0; k < values.size(); ++k)
        values[k] =
            static_cast<float>(reference::initial_value(q, seed, static_cast<std::int64_t>(k)));
      write(values, at);
      at += static_cast<std::int64_t>(values.size() * sizeof(float));
    }
  }
  ~Checkpoint() { ::close(file_); }
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  void read(std::size_t parameter, std::int64_t first, std::int64_t count, float* to) const {
    const auto bytes = static_cast<std::size_t>(count) * sizeof(float);
    const std::int64_t at = begin_[parameter] + first * static_cast<std::int64_t>(sizeof(float));
    if (::pread(file_, to, bytes, at) != static_cast<ssize_t>(bytes))
      throw MachineError(fmt::format("cannot read the parameters' file in {}", place_));
  }

 private:
  void write(const std::vector<float>& values, std::int64_t at) const {
    const auto* data = reinterpret_cast<const char*>(values.data());
    const std::size_t bytes = values.size() * sizeof(float);
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t n = ::pwrite(file_, data + done, bytes - done, at + static_cast<off_t>(done));
      if (n <= 0) throw full(n == 0 ? ENOSPC : errno);
      done += static_cast<std::size_t>(n);
    }
  }
  MachineError full(int error) const {
    return MachineError(fmt::format(
        "{}: cannot write the parameters' file: {}; make room, or set TMPDIR to a folder with room "
        "for it",
        place_, error == ENOSPC ? "the disk is full" : std::strerror(error)));
  }
  std::string place_;
  int file_ = -1;
  std::vector<std::int64_t> begin_;
};

}  // namespace partita::cli
