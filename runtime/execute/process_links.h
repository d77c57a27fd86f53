// runtime/execute/process_links.h: devices of ranks that are threads of one process, linked by
// copies in their memory (docs/cuda.md, "Links").
#pragma once

#include <memory>

#include "runtime/execute/device.h"

namespace partita::execute {

/// Whoever calls waits, on the host, for its own stream and for all members to have come; then each
/// copies what it gets from where it lies, and sums with its own kernels, members in their order:
/// the same bits on all. A message is a copy until it is received. So nothing passes through the
/// host, but in the maximum of statistics, and nothing runs beside it: it proves mathematics, not
/// speed. Addresses of one device must be good on the others.
///
/// `device` outlives it. PeerError where a member ends or does not come within `timeout_s`.
std::unique_ptr<Links> process_links(Device& device, double timeout_s);

}  // namespace partita::execute
