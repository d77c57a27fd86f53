// cli/fault.h: ranks that fail on purpose, for tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace partita::cli {

/// PARTITA_TEST_FAULT=RANK:STEP:INSTRUCTION:WHAT[:PROGRAM] makes a rank fail (docs/transports.md);
/// null: it is not set. `program`: the how-manyth of those that this run carries out. InputError
/// where it is not understood.
std::function<void(int rank, std::int64_t step, std::size_t instruction)> test_fault(
    std::int64_t program);

}  // namespace partita::cli
