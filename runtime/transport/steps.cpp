#include <algorithm>
#include <cstring>

#include "runtime/transport/narrow.h"
#include "runtime/transport/transport.h"

namespace partita {
namespace {

void combine(const CollectiveCall& call, std::byte* to, const std::byte* from, std::int64_t n) {
  if (call.reduction == Reduction::sum) {
    add_numbers(call.type, to, from, n);
    return;
  }
  auto* a = reinterpret_cast<float*>(to);
  const auto* b = reinterpret_cast<const float*>(from);
  for (std::int64_t i = 0; i < n; ++i) a[i] = std::max(a[i], b[i]);
}

}  // namespace

void execute_steps(Transport& transport, const CollectiveCall& call, const Expansion& expansion) {
  const auto n = static_cast<std::int32_t>(call.group->size());
  const std::size_t width = call.element_bytes;
  const bool exchange =
      call.kind == CollectiveKind::all_to_all || call.kind == CollectiveKind::halo_exchange;
  const bool shift = call.kind == CollectiveKind::shift;
  // Kinds without chunks of their own are cut as the algorithm wants.
  std::vector<std::int64_t> cut;
  const bool whole = call.kind == CollectiveKind::all_reduce ||
                     call.kind == CollectiveKind::broadcast || call.kind == CollectiveKind::reduce;
  if (whole) cut = even_chunks(call.offsets.back(), expansion.chunks);
  const std::vector<std::int64_t>& bounds = whole ? cut : call.offsets;

  const auto out = [&](const Message& m) {
    if (exchange) {
      const auto to = static_cast<std::size_t>(m.first % n);
      return std::pair{call.send + static_cast<std::size_t>(call.send_offsets[to]) * width,
                       call.send_offsets[to + 1] - call.send_offsets[to]};
    }
    if (shift) return std::pair{call.send, call.send_offsets.back()};
    const auto first = static_cast<std::size_t>(m.first),
               last = first + static_cast<std::size_t>(m.count);
    return std::pair{
        static_cast<const std::byte*>(call.data) + static_cast<std::size_t>(bounds[first]) * width,
        bounds[last] - bounds[first]};
  };
  const auto in = [&](const Message& m) {
    if (exchange) {
      const auto from = static_cast<std::size_t>(m.first / n);
      return std::pair{call.data + static_cast<std::size_t>(bounds[from]) * width,
                       bounds[from + 1] - bounds[from]};
    }
    if (shift) return std::pair{call.data, bounds.back()};
    const auto first = static_cast<std::size_t>(m.first),
               last = first + static_cast<std::size_t>(m.count);
    return std::pair{call.data + static_cast<std::size_t>(bounds[first]) * width,
                     bounds[last] - bounds[first]};
  };

  std::vector<std::byte> arrived;
  for (const auto& step : expansion.steps) {
    for (const Message& m : step) {
      if (m.from != call.me) continue;
      const auto [data, count] = out(m);
      if (count == 0) continue;
      transport.send((*call.group)[static_cast<std::size_t>(m.to)], call.tag, data,
                     static_cast<std::size_t>(count) * width);
    }
    for (const Message& m : step) {
      if (m.to != call.me) continue;
      const auto [data, count] = in(m);
      if (count == 0) continue;
      const int from = (*call.group)[static_cast<std::size_t>(m.from)];
      if (!m.reduces) {
        transport.receive(from, call.tag, data, static_cast<std::size_t>(count) * width);
        continue;
      }
      arrived.resize(static_cast<std::size_t>(count) * width);
      transport.receive(from, call.tag, arrived.data(), arrived.size());
      combine(call, data, arrived.data(), count);
    }
  }
}

}  // namespace partita
