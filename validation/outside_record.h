// validation/outside_record.h: OutsideMemory in journals and records, as JSON.
#pragma once

#include <string>

#include "base/outside_memory.h"

namespace partita::validation {

std::string record_of(const OutsideMemory& m);
OutsideMemory outside_memory_of(const std::string& record);

}  // namespace partita::validation
