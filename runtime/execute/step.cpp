#include <algorithm>

#include "runtime/execute/rank.h"
#include "runtime/transport/narrow.h"
#include "simulator/program/routing.h"

namespace partita::execute {

Instance& Executor::slot(BufferId id) {
  auto& all = slots_[id.index()];
  return all[p_.buffer(id).scope == Scope::step ? 0 : static_cast<std::size_t>(micro_batch_ + 1)];
}

std::byte* Executor::data(BufferId id) {
  Instance& instance = slot(p_.memory_of(id));
  return instance.data == nullptr ? nullptr : instance.data + offset_[id.index()];
}

Tensor Executor::tensor(BufferId id) {
  Tensor t;
  if (!id.valid() || !box(id).held) return t;
  const Buffer& b = p_.buffer(id);
  t.index = &box(id).index;
  if (b.element_bytes == 8) {
    t.ids = reinterpret_cast<const std::int64_t*>(data(id));
  } else if (b.element_bytes != 0 && b.element_bytes != 4) {
    t.bytes = data(id);
  } else {
    t.values = values(id);
    t.type = type_of(id);
  }
  if (b.routed) t.rows = &rows_of(id).rows;
  return t;
}

Clock::time_point Executor::now() const {
  if (o_.clock) return Clock::time_point(std::chrono::nanoseconds(o_.clock(rank_)));
  const std::int64_t own = device_.own_time();
  return own >= 0 ? Clock::time_point(std::chrono::nanoseconds(own)) : Clock::now();
}

void Executor::tell_progress(double took) {
  const double mine[] = {losses_.back(), took};
  std::vector<double> losses(static_cast<std::size_t>(p_.mesh.size(p_.replicas)), 0.0);
  double slowest = took;
  if (rank_ != 0) {
    transport_.send(0, kProgressTag, mine, sizeof mine);
    losses.push_back(0);
    transport_.receive(0, kProgressTag, losses.data(), losses.size() * sizeof(double));
    slowest = losses.back();
    losses.pop_back();
    o_.progress(rank_, losses, slowest);
    return;
  }
  losses[replica_of(0)] += mine[0];
  for (int from = 1; from < transport_.size(); ++from) {
    double its[2];
    transport_.receive(from, kProgressTag, its, sizeof its);
    losses[replica_of(from)] += its[0];
    slowest = std::max(slowest, its[1]);
  }
  losses.push_back(slowest);
  for (int to = 1; to < transport_.size(); ++to)
    transport_.send(to, kProgressTag, losses.data(), losses.size() * sizeof(double));
  losses.pop_back();
  o_.progress(rank_, losses, slowest);
}

void Executor::one_step() {
  std::size_t index = 0;
  for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
    const Block& block = p_.blocks[call.block.index()];
    micro_batch_ = call.micro_batch;
    for (std::size_t k = 0; k < block.instructions.size(); ++k, ++index) {
      const Instruction& i = block.instructions[k];
      come_to(static_cast<std::int64_t>(index));
      if (o_.before) o_.before(rank_, step_, index);
      const bool rests = (step_ + 1) % i.every != 0;
      const bool works = i.kind != Kind::allocate && i.kind != Kind::free;
      const bool timed = o_.record && step_ >= first_timed_ && !untimed_ && works;
      begin(i);
      if (o_.balanced_rows) give_gates(i);
      if (tag_ >= 0 && works) device_.belongs_to(tag_++);
      const std::int64_t start = timed ? mark() : 0;
      if (!rests) execute(block, call.block, k, i);
      if (timed) {
        const std::int64_t end = mark();
        result_.measured.samples.back().push_back(
            {call.block.value, static_cast<std::int32_t>(k), call.micro_batch, start, end});
      }
      order_.end();
    }
  }
}

void Executor::resolve_marks() {
  if (device_.is_host()) return;
  for (Sample& s : result_.measured.samples.back()) {
    s.start = device_.nanoseconds(s.start);
    s.end = device_.nanoseconds(s.end);
  }
}

void Executor::finish() {
  device_.finish();
  order_.forget();
  for (const Loss& loss : captured_ ? captured_losses_ : step_losses_) {
    float value = 0;
    widen(loss.type, loss.stored, &value, 1);
    losses_.back() += static_cast<double>(value);
  }
  step_losses_.clear();
  captured_ = false;
}

void Executor::begin(const Instruction& i) {
  // What is sent is first copied, on its program's stream.
  const bool copied = links_ != nullptr && i.kind == Kind::send;
  order_.begin(o_.alone ? kComputeStream : copied ? i.stream : stream_of(i), i.after_compute);
  if (device_.is_host() || i.kind == Kind::allocate || i.kind == Kind::free) return;
  const auto block = [&](BufferId id) { return slot(p_.memory_of(id)).data; };
  for_each_read(i, [&](BufferId id) { order_.read(block(id)); });
  for_each_write(i, [&](BufferId id) { order_.write(block(id)); });
  if (i.kind != Kind::compute) return;
  // State of kernels of plain buffers, and what a part of attention adds to.
  for (const auto* list : {&i.outputs, &i.extras}) {
    if (list == &i.outputs && of_operator(i.kernel)) continue;
    for (const BufferId id : *list) {
      if (id.valid()) order_.write(block(id));
    }
  }
}

void Executor::execute(const Block& block, BlockId id, std::size_t k, const Instruction& i) {
  switch (i.kind) {
    case Kind::allocate:
      for (const BufferId b : i.writes) {
        // How many rows a routed buffer has is known when it is written.
        if (!p_.buffer(b).routed) take(b, slot(b), box(b).elements() * p_.buffer(b).width());
      }
      return;
    case Kind::free:
      for (const BufferId b : i.reads) {
        Instance& instance = slot(b);
        give_back(b, instance);
        instance = {};
      }
      return;
    case Kind::load:
      load(i);
      return;
    case Kind::send:
    case Kind::receive:
      message(block, i);
      return;
    case Kind::copy:
      if (box(i.reads[0]).held) {
        const std::int64_t bytes = box(i.reads[0]).elements() * p_.buffer(i.reads[0]).width();
        if (i.multiprocessors > 0) {
          device_.stand_in(data(i.writes[0]), data(i.reads[0]), bytes, i.multiprocessors);
        } else {
          device_.copy(data(i.writes[0]), data(i.reads[0]), bytes);
        }
      }
      return;
    case Kind::slice:
    case Kind::collective:
      collective(block, i, *collectives_[id.index()][k]);
      return;
    case Kind::compute:
      compute(i, kernels_[id.index()][k].get());
      return;
  }
}

void Executor::give_back(BufferId id, Instance& instance) {
  if (instance.data == nullptr) return;
  Memory& memory = memory_of(id);
  const Buffer& b = p_.buffer(id);
  memory.count(b.category, -instance.bytes);
  memory.give_back_spare(instance.data, b.routed ? Memory::roomy(instance.bytes) : instance.bytes);
}

void Executor::load(const Instruction& i) {
  if (!box(i.writes[0]).held) return;
  const auto& made = inputs_.at({i.writes[0], micro_batch_});
  if (p_.sharded_storage) {
    Visits visits(device_);
    shard_.read(made.at,
                visits.host(data(i.writes[0]), static_cast<std::int64_t>(made.bytes), true),
                made.bytes);
    visits.give_back();
  } else {
    device_.bring(data(i.writes[0]), made.data(), made.size);
  }
}

}  // namespace partita::execute
