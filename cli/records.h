// cli/records.h: what a suite's case has measured, as text in a journal, and back.
#pragma once

#include <string>
#include <vector>

#include "runtime/reference/compare.h"
#include "simulator/program/measurement.h"
#include "simulator/program/routing.h"

namespace partita::cli {

/// One run of a case: all ranks' measurements, and the rows that experts got.
struct CaseRecord {
  std::vector<RankMeasurement> ranks;
  Routing routing;
};

/// JSON. What comes back equals what went in; InputError on text that is none of them.
std::string to_record(const CaseRecord& measured);
std::string to_record(const reference::Comparison& comparison);
CaseRecord case_record(const std::string& text);
reference::Comparison comparison_record(const std::string& text);

}  // namespace partita::cli
