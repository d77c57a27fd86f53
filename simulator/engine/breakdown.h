// simulator/engine/breakdown.h: where the time of a compute stream goes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/units.h"
#include "simulator/program/program.h"

namespace partita {

/// Where one class's compute stream spends the step; every instant in exactly one entry.
struct Breakdown {
  std::map<std::string, Ticks> compute;  ///< by operator kind
  std::map<std::string, Ticks> exposed;  ///< waiting for communication, by axis
  Ticks bubble{0};                       ///< waiting for pipeline neighbours
  Ticks optimizer{0};
  Ticks other{0};
  Ticks total() const;
};

/// What waiting for a collective is charged to: "dp", "dp+cp", "ep", "tied".
std::string axis_name(const Program& program, const Instruction& collective);

/// Names of what instants are charged to: "compute:linear", "exposed:dp", "bubble",
/// of it while a message is on its way "bubble:messages", ...
class Labels {
 public:
  std::int32_t of(const std::string& name);
  const std::string& name(std::int32_t label) const {
    return names_[static_cast<std::size_t>(label)];
  }
  std::size_t size() const { return names_.size(); }

 private:
  std::map<std::string, std::int32_t> number_;
  std::vector<std::string> names_;
};

/// Picoseconds of one compute stream by label.
class Spent {
 public:
  void add(std::int32_t label, std::int64_t ticks) {
    if (ticks_.size() <= static_cast<std::size_t>(label))
      ticks_.resize(static_cast<std::size_t>(label) + 1, 0);
    ticks_[static_cast<std::size_t>(label)] += ticks;
  }
  const std::vector<std::int64_t>& by_label() const { return ticks_; }
  /// `bubble`: what it waits for others after its end.
  Breakdown breakdown(const Labels& labels, Ticks bubble) const;

 private:
  std::vector<std::int64_t> ticks_;
};

}  // namespace partita
