#include <algorithm>
#include <cstring>
#include <map>

#include "base/error.h"
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

void count_call(const CollectiveCall& c, Traffic& traffic) {
  auto& note = traffic.collectives[c.kind];
  ++note.calls;
  const auto bytes = [&](std::int64_t elements) {
    return elements * static_cast<std::int64_t>(c.element_bytes);
  };
  switch (c.kind) {
    case CollectiveKind::all_reduce:
    case CollectiveKind::broadcast:
    case CollectiveKind::reduce:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::all_gather:
      note.payload_bytes += bytes(c.offsets.back());
      return;
    case CollectiveKind::gather:
    case CollectiveKind::scatter:
      if (c.me == 0) note.payload_bytes += bytes(c.offsets.back());
      return;
    case CollectiveKind::halo_exchange: {
      // The rows that cross, not those that stay.
      const auto own = static_cast<std::size_t>(c.me);
      note.payload_bytes -= bytes(c.send_offsets[own + 1] - c.send_offsets[own]);
      [[fallthrough]];
    }
    case CollectiveKind::all_to_all:
    case CollectiveKind::shift:
      note.payload_bytes += bytes(c.send_offsets.back());
      return;
  }
}

void execute_steps(Transport& transport, const CollectiveCall& call, const Expansion& expansion) {
  const auto n = static_cast<std::int32_t>(call.group->size());
  PARTITA_ASSERT(expansion.switches == 0, "no switch of a transport adds");
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

  // Where a chunk of one member for another lies with a third, which passes it on.
  std::map<std::int32_t, std::vector<std::byte>> passing;
  struct Piece {
    std::byte* data;
    std::size_t bytes;
  };
  const auto piece = [&](std::byte* base, const std::vector<std::int64_t>& offsets,
                         std::int32_t chunk) {
    const auto c = static_cast<std::size_t>(chunk);
    return Piece{base + static_cast<std::size_t>(offsets[c]) * width,
                 static_cast<std::size_t>(offsets[c + 1] - offsets[c]) * width};
  };
  // What is sent is never written to.
  auto* const send = const_cast<std::byte*>(call.send);
  const auto find = [&](std::int32_t chunk, bool sends) {
    if (shift) {
      return Piece{
          sends ? send : call.data,
          static_cast<std::size_t>(sends ? call.send_offsets.back() : bounds.back()) * width};
    }
    if (!exchange) return piece(call.data, bounds, chunk);
    if (sends && chunk / n == call.me) return piece(send, call.send_offsets, chunk % n);
    if (!sends && chunk % n == call.me) return piece(call.data, bounds, chunk / n);
    PARTITA_ASSERT(!call.sizes.empty(), "members pass on chunks whose sizes nobody told them");
    auto& there = passing[chunk];
    there.resize(static_cast<std::size_t>(call.sizes[static_cast<std::size_t>(chunk)]) * width);
    return Piece{there.data(), there.size()};
  };
  std::vector<Piece> pieces;
  // A message's pieces of memory, in order, neighbours joined; how many bytes they are.
  const auto gather = [&](const Message& m, bool sends) {
    pieces.clear();
    std::size_t bytes = 0;
    for (std::int32_t k = 0; k < m.chunks(); ++k) {
      const Piece one = find(m.chunk(k), sends);
      if (one.bytes == 0) continue;
      bytes += one.bytes;
      if (!pieces.empty() && pieces.back().data + pieces.back().bytes == one.data)
        pieces.back().bytes += one.bytes;
      else
        pieces.push_back(one);
    }
    return bytes;
  };

  std::vector<std::byte> packed;
  for (const auto& step : expansion.steps) {
    for (const Message& m : step) {
      if (m.from != call.me) continue;
      const std::size_t bytes = gather(m, true);
      if (bytes == 0) continue;
      const int to = (*call.group)[static_cast<std::size_t>(m.to)];
      if (pieces.size() == 1) {
        transport.send(to, call.tag, pieces[0].data, bytes);
        continue;
      }
      packed.clear();
      for (const Piece& p : pieces) packed.insert(packed.end(), p.data, p.data + p.bytes);
      transport.send(to, call.tag, packed.data(), bytes);
    }
    for (const Message& m : step) {
      if (m.to != call.me) continue;
      const std::size_t bytes = gather(m, false);
      if (bytes == 0) continue;
      const int from = (*call.group)[static_cast<std::size_t>(m.from)];
      if (!m.reduces && pieces.size() == 1) {
        transport.receive(from, call.tag, pieces[0].data, bytes);
        continue;
      }
      packed.resize(bytes);
      transport.receive(from, call.tag, packed.data(), bytes);
      const std::byte* next = packed.data();
      for (const Piece& p : pieces) {
        if (m.reduces)
          combine(call, p.data, next, static_cast<std::int64_t>(p.bytes / width));
        else
          std::memcpy(p.data, next, p.bytes);
        next += p.bytes;
      }
    }
  }
}

}  // namespace partita
