// simulator/engine/device_use.h: what an instruction uses of its device, and how kernels give way
// to their own rank's transfers.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/cost/measured.h"
#include "simulator/program/program.h"

namespace partita {

/// Fractions of a device, at full speed: a kernel's `units` and `memory`, of which it takes less
/// while others have some; of a transfer the multiprocessors that it keeps whatever its rate, and
/// the memory bandwidth that its bytes take (docs/sharing.md, "A training step").
struct DeviceUse {
  double units = 0, memory = 0;
  Seconds work{0};  ///< of the instruction's time, what sharing stretches; 0: nothing is shared
  /// A kernel's KernelFamily where its device was measured beside transfers, which slow it by their
  /// `slows`; else -1, and they do by what they take.
  int family = -1;
  /// Of a transfer, by family of the kernels beside it.
  std::array<Slowdown, kKernelFamilies> slows{};
};

/// Of a kernel. One that was measured takes all units for all of its time.
DeviceUse kernel_use(const Program& program, const Instruction& instruction, std::int64_t rank,
                     Communication& communication);
/// Of a collective of `bytes` that travel among `group`, which `rank` is in.
DeviceUse collective_use(const Instruction& instruction, const std::vector<std::int64_t>& group,
                         Bytes bytes, std::int64_t rank, Communication& communication);
/// Of a message between two ranks, of which `rank` is one.
DeviceUse message_use(std::int64_t from, std::int64_t to, Bytes bytes, std::int64_t rank,
                      Communication& communication);

/// Ticks of `every`-th work within `ticks`, as DeviceUse::work says.
std::int64_t work_ticks(Seconds work, std::int64_t ticks, std::int64_t every);

/// A transfer that has begun.
struct Running {
  std::int64_t from = 0, moves = 0, to = 0;  ///< keeps units from its start, memory as it moves
  double units = 0, memory = 0;
  std::int64_t code = 0;  ///< equal: the same instruction
  std::array<Slowdown, kKernelFamilies> slows{};
};

/// When a kernel ends that starts at `start`, does nothing for `fixed` ticks and then has `work`
/// ticks to do with what `running` leaves:
///
///     rate = min(1, (1 − Σ units) / units, (1 − Σ memory) / memory)
///
/// with sums over what runs, and for memory moves, then; of a kernel with a family
///
///     rate = 1 / max(1, slows[family].of_kernel)      over what runs then
///
/// Rounded up once.
std::int64_t end_beside(std::int64_t start, std::int64_t fixed, std::int64_t work,
                        const DeviceUse& kernel, const std::vector<Running>& running);

/// A kernel that comes on the compute stream.
struct Coming {
  std::int64_t start = 0, fixed = 0, work = 0;
  const DeviceUse* use = nullptr;
};
/// When a transfer ends that starts at `start`, does nothing for `fixed` ticks and then has `work`
/// ticks to move: at 1 / slows[f].of_transfer while a kernel of family f runs. `next(at)`: the
/// kernel after the one that ended at `at`, `free` to begin with; none: nothing more is known, and
/// the rest is as fast as alone. Rounded up once.
std::int64_t end_beside_kernels(std::int64_t start, std::int64_t fixed, std::int64_t work,
                                const DeviceUse& transfer, std::int64_t free,
                                const std::function<std::optional<Coming>(std::int64_t at)>& next,
                                const std::vector<Running>& running);

}  // namespace partita
