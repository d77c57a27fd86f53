#include <fmt/format.h>

#include <algorithm>

#include "runtime/execute/rank.h"

namespace partita::execute {

Prepared Executor::prepare_collective(const Instruction& i) {
  Prepared c;
  std::vector<std::int64_t> members{rank_};
  if (i.kind == Kind::collective) members = p_.group(i, rank_);
  for (const std::int64_t m : members) {
    if (m == rank_) c.me = static_cast<int>(c.group.size());
    c.group.push_back(static_cast<int>(m));
  }
  c.routed = p_.buffer(i.reads[0]).routed;
  const std::size_t n = members.size();
  c.offsets.assign(n + 1, 0);
  c.send_offsets.assign(n + 1, 0);
  const bool tied = i.kind == Kind::collective && i.tie >= 0;
  for (std::size_t k = 0; k < i.reads.size(); ++k) {
    Part part;
    part.from = i.reads[k];
    part.to = i.writes[k];
    std::vector<Box> from, to;
    for (const std::int64_t m : members) {
      // On another stage the tied parameter is another buffer of equal layout.
      from.push_back(tied ? box(part.from) : box_of(p_, part.from, m));
      to.push_back(tied ? box(part.to) : box_of(p_, part.to, m));
    }
    const auto me = static_cast<std::size_t>(c.me);
    part.out.resize(n);
    part.in.resize(n);
    if (i.kind == Kind::slice) {
      part.out[0] = section(from[0], to[0]);
      part.in[0] = section(to[0], from[0]);
      finish_part(c, std::move(part));
      continue;
    }
    switch (i.collective) {
      case CollectiveKind::all_reduce:
        part.out[me] = section(from[me], to[me]);
        part.in[me] = section(to[me], from[me]);
        break;
      case CollectiveKind::broadcast:
        if (c.me == 0) part.out[0] = section(from[0], from[0]);
        part.in[me] = section(to[me], to[me]);
        break;
      case CollectiveKind::reduce:
        part.out[me] = section(from[me], from[me]);
        if (c.me == 0) part.in[0] = section(to[0], to[0]);
        break;
      case CollectiveKind::reduce_scatter:
        for (std::size_t m = 0; m < n; ++m) part.out[m] = section(from[me], to[m]);
        part.in[me] = section(to[me], from[me]);
        break;
      case CollectiveKind::scatter:
        for (std::size_t m = 0; m < n; ++m) part.out[m] = section(from[0], to[m]);
        part.in[me] = section(to[me], to[me]);
        break;
      case CollectiveKind::all_gather:
      case CollectiveKind::gather:
        part.out[me] = section(from[me], from[me]);
        for (std::size_t m = 0; m < n; ++m) {
          part.in[m] = i.collective == CollectiveKind::all_gather ? section(to[me], from[m])
                                                                  : section(from[m], from[m]);
          if (i.collective == CollectiveKind::gather && c.me == 0)
            part.in[m] = section(to[0], from[m]);
        }
        break;
      case CollectiveKind::all_to_all:
      case CollectiveKind::halo_exchange:
        for (std::size_t m = 0; m < n; ++m) {
          part.out[m] = section(from[me], to[m]);
          part.in[m] = section(to[me], from[m]);
        }
        for (std::size_t d = 0; d < p_.buffer(part.to).layout.dims.size(); ++d) {
          part.adds_up |= i.collective == CollectiveKind::halo_exchange &&
                          p_.buffer(part.from).layout.dims[d].kind == SplitKind::window &&
                          p_.buffer(part.to).layout.dims[d].kind == SplitKind::block;
        }
        break;
      case CollectiveKind::shift:
        part.out[me] = section(from[me], from[me]);
        part.in[me] = section(to[me], to[me]);
        break;
    }
    finish_part(c, std::move(part));
  }
  return c;
}

void Executor::finish_part(Prepared& c, Part part) const {
  const Buffer& from = p_.buffer(part.from);
  if (from.width() == 2) c.word = 2, c.type = from.type;
  const std::int64_t words = from.width() / c.word;
  PARTITA_ASSERT(words >= 1 && words * c.word == from.width(),
                 from.name + " has elements that cannot travel in this call");
  for (auto* lists : {&part.out, &part.in}) {
    for (auto& runs : *lists) {
      for (Run& r : runs.runs) r.offset *= words, r.count *= words;
    }
  }
  add_sizes(c, part);
  c.parts.push_back(std::move(part));
}

void Executor::add_sizes(Prepared& c, const Part& part) {
  for (std::size_t m = 0, out = 0, in = 0; m < part.out.size(); ++m) {
    out += static_cast<std::size_t>(count(part.out[m].runs));
    in += static_cast<std::size_t>(count(part.in[m].runs));
    c.send_offsets[m + 1] += static_cast<std::int64_t>(out);
    c.offsets[m + 1] += static_cast<std::int64_t>(in);
  }
}

void Executor::collective(const Block& block, const Instruction& i, const Prepared& c) {
  if (c.group.size() > 1) {
    transport_.doing(fmt::format("{} of {} in block {}", name(i.collective),
                                 p_.buffer(i.reads[0]).name, block.name));
  }
  if (c.routed) {
    routed_collective(i, c);
    return;
  }
  // One buffer that everyone has alike is reduced where it lies.
  if (i.kind == Kind::collective && i.collective == CollectiveKind::all_reduce &&
      c.parts.size() == 1 && data(c.parts[0].from) == data(c.parts[0].to)) {
    call(i, c, data(c.parts[0].from), nullptr);
    return;
  }
  const bool exchange = i.kind == Kind::slice || i.collective == CollectiveKind::all_to_all ||
                        i.collective == CollectiveKind::halo_exchange ||
                        i.collective == CollectiveKind::shift;
  const auto n = c.group.size();
  const auto me = static_cast<std::size_t>(c.me);
  // The payload in chunks; chunk m is the concatenation of all buffers' parts for m.
  const bool split_in =
      i.kind == Kind::collective &&
      (i.collective == CollectiveKind::reduce_scatter || i.collective == CollectiveKind::scatter);
  const std::vector<std::int64_t>& bounds = split_in ? c.send_offsets : c.offsets;
  const std::int64_t total = std::max(bounds.back(), exchange ? 0 : c.send_offsets.back());
  const std::int64_t staged = (total + (exchange ? c.send_offsets.back() : 0)) * c.word;
  // Given back too where a peer's failure ends the call.
  const auto give_back = [&](std::byte* p) { memory_.give_back(Category::workspace, p, staged); };
  const std::unique_ptr<std::byte, decltype(give_back)> held(
      memory_.take(Category::workspace, staged), give_back);
  std::byte* payload = held.get();
  order_.write(payload);
  std::byte* outgoing = exchange ? payload + total * c.word : payload;
  for (std::size_t m = 0; m < n; ++m) {
    const bool own_chunk = !exchange && !split_in;
    // All-gather: the own chunk lies where it will be; others send what they have from the start.
    std::byte* to = outgoing;
    if (exchange || split_in) {
      to += c.send_offsets[m] * c.word;
    } else if (i.collective == CollectiveKind::all_gather ||
               i.collective == CollectiveKind::gather) {
      to += c.offsets[me] * c.word;
    }
    if (own_chunk && m != me) continue;
    if (i.kind == Kind::collective && i.collective == CollectiveKind::scatter && c.me != 0)
      continue;
    for (const Part& part : c.parts) {
      device_.pack(part.out[m], c.word, data(part.from), to);
      to += count(part.out[m].runs) * c.word;
    }
  }
  if (i.kind == Kind::collective) {
    if (exchange && i.collective != CollectiveKind::shift) {
      device_.copy(payload + c.offsets[me] * c.word, outgoing + c.send_offsets[me] * c.word,
                   (c.send_offsets[me + 1] - c.send_offsets[me]) * c.word);
    }
    call(i, c, payload, outgoing);
  } else {
    device_.copy(payload, outgoing, c.send_offsets[1] * c.word);
  }
  for (const Part& part : c.parts) {
    if (part.adds_up && !i.accumulate && box(part.to).held)
      device_.fill(data(part.to), words(part.to), 0);
  }
  const bool gathers = i.kind == Kind::collective && (i.collective == CollectiveKind::all_gather ||
                                                      i.collective == CollectiveKind::gather);
  for (std::size_t m = 0; m < n; ++m) {
    if (!exchange && !gathers && m != me) continue;
    if (i.kind == Kind::collective && i.collective == CollectiveKind::gather && c.me != 0) continue;
    const std::byte* from = payload + (exchange || gathers ? c.offsets[m]
                                       : split_in          ? c.send_offsets[me]
                                                           : 0) *
                                          c.word;
    for (const Part& part : c.parts) {
      if (i.accumulate || part.adds_up) {
        device_.unpack_add(part.in[m], c.type, from, data(part.to));
      } else {
        device_.unpack(part.in[m], c.word, from, data(part.to));
      }
      from += count(part.in[m].runs) * c.word;
    }
  }
}

void Executor::call(const Instruction& i, const Prepared& c, std::byte* payload,
                    const std::byte* outgoing) {
  if (c.group.size() == 1) return;
  CollectiveCall call;
  call.kind = i.collective;
  call.reduction = p_.buffer(i.reads[0]).layout.reduction;
  call.group = &c.group;
  call.me = c.me;
  call.element_bytes = static_cast<std::size_t>(c.word);
  call.type = c.type;
  call.data = payload;
  call.send = outgoing;
  call.tag = i.tie >= 0 ? kTieTag : kCollectiveTag;
  call.send_offsets = c.send_offsets;
  switch (i.collective) {
    case CollectiveKind::all_reduce:
    case CollectiveKind::broadcast:
    case CollectiveKind::reduce:
      call.offsets = {0, std::max(c.offsets.back(), c.send_offsets.back())};
      break;
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::scatter:
      call.offsets = c.send_offsets;
      break;
    case CollectiveKind::all_gather:
    case CollectiveKind::gather:
    case CollectiveKind::all_to_all:
    case CollectiveKind::halo_exchange:
    case CollectiveKind::shift:
      call.offsets = c.offsets;
      break;
  }
  if (o_.alone) {
    const bool sums = i.collective == CollectiveKind::all_reduce ||
                      i.collective == CollectiveKind::reduce ||
                      i.collective == CollectiveKind::reduce_scatter;
    // What is summed stays what it was; numbers of each buffer are packed together.
    if (!sums)
      draw_received(i.reads[0], payload,
                    call.offsets.back() * c.word / p_.buffer(i.reads[0]).width());
    return;
  }
  carry_out(call, i, call.offsets.back() * c.word, c.send_offsets.back() * c.word);
}

void Executor::carry_out(CollectiveCall call, const Instruction& i, std::int64_t bytes,
                         std::int64_t sent_bytes) {
  if (device_.is_host()) {
    transport_.collective(call);
    return;
  }
  if (links_ != nullptr) {
    links_->collective({*call.group, stream_of(i)}, call);
    return;
  }
  Visits visits(device_);
  std::byte* const at = call.data;
  call.data = visits.host(at, bytes, true);
  if (call.send != nullptr && call.send != at)
    call.send = visits.host(const_cast<std::byte*>(call.send), sent_bytes, false);
  transport_.collective(call);
  visits.give_back();
}

}  // namespace partita::execute
