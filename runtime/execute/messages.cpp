#include <fmt/format.h>

#include <algorithm>

#include "runtime/execute/rank.h"

namespace partita::execute {

std::int64_t Executor::message_tag(const Instruction& i) const {
  return kFirstMessageTag + static_cast<std::int64_t>(i.index) * (p_.micro_batches + 1) +
         p_.instance_of(i, micro_batch_) + 1;
}

void Executor::message(const Block& block, const Instruction& i) {
  const bool sends = i.kind == Kind::send;
  const BufferId b = sends ? i.reads[0] : i.writes[0];
  if (!box(b).held) return;
  const auto peer = static_cast<int>(p_.peer_of(i, rank_));
  transport_.doing(
      fmt::format("{} of {} in block {}", name(i.kind), p_.buffer(b).name, block.name));
  if (o_.alone) {
    if (sends) return;
    std::int64_t n = box(b).elements();
    if (p_.buffer(b).routed) {
      put_rows(b, chosen_rows(b, box(b)));
      n = rows_of(b).bytes / p_.buffer(b).width();
    }
    draw_received(b, data(b), n);
    return;
  }
  if (p_.buffer(b).routed) {
    routed_message(i, b, peer, sends);
    return;
  }
  pass_on(i, b, peer, box(b).elements() * p_.buffer(b).width(), sends);
}

void Executor::pass_on(const Instruction& i, BufferId b, int peer, std::int64_t bytes, bool sends) {
  if (links_ != nullptr) {
    if (bytes == 0) return;  // no rows: both know it
    const Channel channel = channel_of(i, rank_, peer);
    if (sends) {
      send_copy(i, channel, peer, b, bytes);
    } else {
      links_->receive(channel, peer, data(b), bytes);
    }
    return;
  }
  Visits visits(device_);
  std::byte* at = visit(visits, b, bytes, !sends);
  if (sends) {
    transport_.send(peer, message_tag(i), at, static_cast<std::size_t>(bytes));
  } else {
    transport_.receive(peer, message_tag(i), at, static_cast<std::size_t>(bytes));
    visits.give_back();
  }
}

void Executor::draw_received(BufferId id, std::byte* to, std::int64_t n) {
  const Buffer& b = p_.buffer(id);
  if (b.whole_numbers || (b.element_bytes != 0 && b.element_bytes != 4)) {
    device_.fill(to, n * b.width() / 4, 0);
  } else {
    device_.draw(to, type_of(id), n, 0, 1, o_.seed + id.index());
  }
}

void Executor::send_copy(const Instruction& i, const Channel& channel, int peer, BufferId b,
                         std::int64_t bytes) {
  const std::int64_t room = p_.buffer(b).routed ? Memory::roomy(bytes) : bytes;
  auto& copies = copies_[room];
  auto free = std::find_if(copies.begin(), copies.end(),
                           [&](const Copy& c) { return device_.reached(c.sent); });
  if (free == copies.end()) {
    copies.push_back({Spare(memory_, room), 0});
    free = std::prev(copies.end());
    // Another buffer's memory may still be in use.
    order_.write(free->room.at);
  }
  device_.copy(free->room.at, data(b), bytes);
  const Device::Event copied = device_.record();
  device_.on(stream_of(i));
  device_.wait(copied);
  links_->send(channel, peer, free->room.at, bytes);
  free->sent = device_.record();
  device_.on(i.stream);
}

void Executor::routed_message(const Instruction& i, BufferId b, int peer, bool sends) {
  const std::int64_t tag = message_tag(i);
  Instance& instance = rows_of(b);
  std::int64_t n = static_cast<std::int64_t>(instance.rows.size());
  if (sends) {
    transport_.send(peer, tag, &n, sizeof n);
    transport_.send(peer, tag, instance.rows.data(), instance.rows.size() * sizeof(Row));
  } else {
    transport_.receive(peer, tag, &n, sizeof n);
    std::vector<Row> rows(static_cast<std::size_t>(n));
    transport_.receive(peer, tag, rows.data(), rows.size() * sizeof(Row));
    put_rows(b, std::move(rows));
  }
  pass_on(i, b, peer, instance.bytes, sends);
}

}  // namespace partita::execute
