#include "simulator/engine/device_use.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace partita {
namespace {

/// Bytes that pass through a member's memory for each byte that it sends: read, and written where
/// they arrive; a sum reads its own operand too.
double memory_passes(CollectiveKind kind) {
  switch (kind) {
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::reduce:
      return 3;
    case CollectiveKind::all_reduce:
      return 2.5;
    default:
      return 2;
  }
}

/// Does what was measured of kernels and transfers at once count? Not where ranks share a device.
bool measured_at_once(const DeviceProfile& device, const Communication& communication) {
  return !device.slowdown.empty() && communication.topology().state().ranks_per_device == 1;
}

/// `kind`: as SlowdownPoint::beside.
DeviceUse transfer_use(Seconds work, double memory_rate, int multiprocessors,
                       const std::string& kind, std::size_t ranks, Bytes bytes,
                       const DeviceProfile& device, const Communication& communication) {
  DeviceUse use;
  use.work = work;
  const double memory = device.memory_bandwidth.count * device.memory_efficiency;
  if (memory_rate > 0) use.memory = std::min(1.0, memory_rate / memory);
  if (multiprocessors == 0) multiprocessors = device.communication_multiprocessors;
  multiprocessors = std::min(multiprocessors, device.multiprocessors - 1);
  if (multiprocessors > 0)
    use.units = static_cast<double>(multiprocessors) / device.multiprocessors;
  if (measured_at_once(device, communication)) {
    for (int f = 0; f < kKernelFamilies; ++f)
      use.slows[static_cast<std::size_t>(f)] =
          measured_slowdown(device.slowdown, static_cast<KernelFamily>(f), kind,
                            static_cast<int>(ranks), bytes, multiprocessors);
  }
  return use;
}

const DeviceProfile& device_of(std::int64_t rank, const Communication& communication) {
  return communication.topology().device(DeviceId{static_cast<std::size_t>(rank)});
}

KernelFamily family_of(const Work& w) {
  return w.attention                       ? KernelFamily::attention
         : w.matrix || !w.products.empty() ? KernelFamily::product
                                           : KernelFamily::memory;
}

}  // namespace

DeviceUse kernel_use(const Program& program, const Instruction& i, std::int64_t rank,
                     Communication& communication) {
  const DeviceProfile& device = device_of(rank, communication);
  // Measured: as if its units were what it takes, all of it.
  KernelParts parts{Seconds{1}, Seconds{0}, Seconds{1}};
  DeviceUse use;
  use.work = Seconds{1e9};
  if (device.kernels.empty()) {
    parts = kernel_parts(work_of(program, i, rank), device, communication.shapes(rank));
    use.work = Seconds{parts.work.count /
                       communication.topology().speed(DeviceId{static_cast<std::size_t>(rank)})};
  }
  const double longest = parts.work.count;
  if (!(longest > 0)) return {};
  // With the multiprocessors that a transfer leaves it takes `beside_transfers` times as long, in
  // whole waves; alone no longer than alone.
  use.units = parts.units.count / longest;
  if (device.communication_multiprocessors > 0)
    use.units *= std::min(1.0, parts.beside_transfers *
                                   (1 - static_cast<double>(device.communication_multiprocessors) /
                                            device.multiprocessors));
  use.memory = parts.memory.count / longest;
  if (measured_at_once(device, communication)) {
    const KernelFamily family = family_of(work_of(program, i, rank));
    const bool known = std::any_of(device.slowdown.begin(), device.slowdown.end(),
                                   [&](const SlowdownPoint& p) { return p.kernel == family; });
    if (known) use.family = static_cast<int>(family);
  }
  return use;
}

DeviceUse collective_use(const Instruction& i, const std::vector<std::int64_t>& group, Bytes bytes,
                         std::int64_t rank, Communication& communication) {
  const auto moving = communication.moving(i.collective, bytes, group, i.multiprocessors > 0);
  if (!(moving.time.count > 0)) return {};
  return transfer_use(moving.time, moving.rate.count * memory_passes(i.collective),
                      i.multiprocessors > 0 ? i.multiprocessors
                                            : communication.channels(i.collective, bytes, group),
                      std::string(name(i.collective)), group.size(), bytes,
                      device_of(rank, communication), communication);
}

DeviceUse message_use(std::int64_t from, std::int64_t to, Bytes bytes, std::int64_t rank,
                      Communication& communication) {
  const auto moving = communication.moving(bytes, from, to);
  if (!(moving.time.count > 0)) return {};
  return transfer_use(moving.time, moving.rate.count, 0, "send", 2, bytes,
                      device_of(rank, communication), communication);
}

std::int64_t work_ticks(Seconds work, std::int64_t ticks, std::int64_t every) {
  // Compared as numbers first: all of a time may be far more than ticks can count.
  const double share = work.count * 1e12 / static_cast<double>(every);
  if (share >= static_cast<double>(ticks)) return ticks;
  return std::min(to_ticks(Seconds{work.count / static_cast<double>(every)}).count, ticks);
}

std::int64_t end_beside(std::int64_t start, std::int64_t fixed, std::int64_t work,
                        const DeviceUse& kernel, const std::vector<Running>& running) {
  std::int64_t at = start + fixed;
  double left = static_cast<double>(work);
  for (;;) {
    double units = 1, memory = 1, slowest = 1;
    std::int64_t next = std::numeric_limits<std::int64_t>::max();
    for (const Running& r : running) {
      if (r.to <= at) continue;
      next = std::min(next, r.from > at ? r.from : r.moves > at ? r.moves : r.to);
      if (r.from <= at) units -= r.units;
      if (r.moves <= at) memory -= r.memory;
      if (kernel.family >= 0 && r.from <= at)
        slowest = std::max(slowest, r.slows[static_cast<std::size_t>(kernel.family)].of_kernel);
    }
    double rate = 1;
    if (kernel.family >= 0) {
      rate = 1 / slowest;
      units = memory = 1;
    }
    if (kernel.units > 0) rate = std::min(rate, std::max(0.0, units) / kernel.units);
    if (kernel.memory > 0) rate = std::min(rate, std::max(0.0, memory) / kernel.memory);
    const double can = static_cast<double>(next - at) * rate;
    if (left <= can) return at + static_cast<std::int64_t>(std::ceil(left / rate));
    left -= can;
    at = next;
  }
}

std::int64_t end_beside_kernels(std::int64_t start, std::int64_t fixed, std::int64_t work,
                                const DeviceUse& transfer, std::int64_t free,
                                const std::function<std::optional<Coming>(std::int64_t at)>& next,
                                const std::vector<Running>& running) {
  std::int64_t at = start + fixed;
  double left = static_cast<double>(work), most = 1;
  for (const Slowdown& s : transfer.slows) most = std::max(most, s.of_transfer);
  // Among kernels as if it went on as long as it can: what comes after its end is of no interest.
  std::vector<Running> all = running;
  all.push_back({start, at, at + static_cast<std::int64_t>(std::ceil(most * left)), transfer.units,
                 transfer.memory, 0, transfer.slows});
  while (const auto kernel = next(free)) {
    const std::int64_t begins = kernel->start;
    free = kernel->use == nullptr
               ? begins + kernel->fixed + kernel->work
               : end_beside(begins, kernel->fixed, kernel->work, *kernel->use, all);
    if (begins > at) {
      const auto alone = static_cast<double>(begins - at);
      if (left <= alone) break;
      left -= alone;
      at = begins;
    }
    if (free <= at) continue;
    const int family = kernel->use == nullptr ? -1 : kernel->use->family;
    const double slows =
        family < 0 ? 1
                   : std::max(1.0, transfer.slows[static_cast<std::size_t>(family)].of_transfer);
    const double can = static_cast<double>(free - at) / slows;
    if (left <= can) return at + static_cast<std::int64_t>(std::ceil(left * slows));
    left -= can;
    at = free;
  }
  return at + static_cast<std::int64_t>(std::ceil(left));
}

}  // namespace partita
