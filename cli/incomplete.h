// cli/incomplete.h: what is left of a suite whose ranks have failed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simulator/program/measurement.h"

namespace partita::cli {

struct IncompleteSuite {
  std::string backend, transport, reason;
  std::int64_t rounds = 0;   ///< that were asked for
  std::size_t measured = 0;  ///< programs, calibration's too
  bool goes_on = false;      ///< the same command again does
  struct Case {
    std::string name;
    std::int64_t ranks = 0;
    bool checked = false, equal = false;                                  ///< against its reference
    std::vector<const std::vector<RankMeasurement>*> measured;            ///< by round
  };
  std::vector<Case> cases;
};

/// Without the whole calibration there is no prediction: mathematics and measured times.
std::string to_json(const IncompleteSuite& suite);
std::string to_text(const IncompleteSuite& suite);

}  // namespace partita::cli
