// tests/runtime/cuda/emulated/lanes.h: a block's threads, each on a stack of its own, one after the
// other in a drawn order from one meeting (a sum or a maximum of all) to the next.
#pragma once

#include <cstdint>
#include <functional>

namespace emulated {

/// Runs `body` on `count` lanes; by PARTITA_EMULATED_LANES=0 in the environment on one.
void block(int count, const std::function<void()>& body);
/// Of the lane that runs; 0 and 1 outside of a block.
std::int64_t lane();
std::int64_t lanes();
/// Of all lanes', as a GPU's: halves of a warp, then warps in their order. All lanes call it, or
/// the process ends with a line that says so.
double reduce(double v, bool maximum);

}  // namespace emulated
