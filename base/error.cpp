#include "base/error.h"

#include <fmt/format.h>

#include <cmath>

#include "base/units.h"

namespace partita {

void assertion_failed(const char* file, int line, const char* condition,
                      const std::string& detail) {
  throw InternalError(
      fmt::format("{}:{}: internal error: {} does not hold: {}", file, line, condition, detail));
}

Ticks to_ticks(Seconds t) {
  const double picoseconds = std::ceil(t.count * 1e12);
  PARTITA_ASSERT(picoseconds >= 0, fmt::format("a time of {} s", t.count));
  // 2^63 picoseconds are 106.75 days.
  if (!(picoseconds < 9.2e18)) {
    throw InputError(
        "time", fmt::format("one instruction would take {} s; event time ends at 106 days: use a "
                            "smaller batch or a faster device",
                            t.count));
  }
  return Ticks{static_cast<std::int64_t>(picoseconds)};
}

}  // namespace partita
