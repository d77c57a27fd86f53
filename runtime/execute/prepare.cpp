#include <fmt/format.h>

#include <cstring>
#include <set>
#include <variant>

#include "runtime/execute/rank.h"
#include "runtime/transport/narrow.h"

namespace partita::execute {

const Box& Executor::box(BufferId id) {
  auto& b = boxes_[id.index()];
  if (!b) b = std::make_unique<Box>(box_of(p_, id, rank_));
  return *b;
}

void Executor::prepare() {
  std::set<BlockId> blocks;
  for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)])
    blocks.insert(call.block);
  kernels_.resize(p_.blocks.size());
  collectives_.resize(p_.blocks.size());
  std::vector<char> state(p_.buffers.size(), 0);
  for (const BlockId id : blocks) {
    const Block& block = p_.blocks[id.index()];
    kernels_[id.index()].resize(block.instructions.size());
    collectives_[id.index()].resize(block.instructions.size());
    for (std::size_t k = 0; k < block.instructions.size(); ++k) {
      const Instruction& i = block.instructions[k];
      const auto note = [&](BufferId b) { prepare_buffer(b, state); };
      for_each_read(i, note);
      for_each_write(i, note);
      if (i.kind == Kind::compute && i.op >= 0) {
        const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
        if (bits(op.compute) < 16 && op.compute != ElementType::fp8)
          throw InputError("precision",
                           fmt::format("{} computes in {}, which is predicted, not executed; use "
                                       "--precision fp8, bf16, fp16, tf32 or fp32",
                                       op.name, name(op.compute)));
        if (p_.mesh.group_root(rank_, op.root) == rank_) {
          auto context = reference::context_of(
              p_, i.op, o_.operator_seed ? o_.operator_seed(i.op) : o_.seed, rank_);
          if (of_sequence_part(i))
            context.indices[static_cast<std::size_t>(op.signature.find(Dim::sequence))] =
                part_positions(p_, i, rank_);
          // As the interpreter rounds them: of products with weights alone.
          if (op.compute == ElementType::fp8 &&
              (std::holds_alternative<Linear>(op.operation) ||
               std::holds_alternative<GroupedProduct>(op.operation)))
            context.compute = op.compute;
          kernels_[id.index()][k] = device_.kernel(std::move(context));
        }
      }
      if (i.kind == Kind::collective || i.kind == Kind::slice)
        collectives_[id.index()][k] = prepare_collective(i);
    }
  }
  for (const BufferId id : to_draw_) initialise(id);
  // Whatever stream comes first finds it done.
  device_.finish();
}

void Executor::prepare_buffer(BufferId id, std::vector<char>& seen) {
  if (seen[id.index()]) return;
  seen[id.index()] = 1;
  const Buffer& b = p_.buffer(id);
  if (b.element_bytes == 0 && b.type != ElementType::fp32 && b.type != ElementType::bf16 &&
      b.type != ElementType::fp16) {
    throw InputError("precision",
                     fmt::format("{} is stored as {}, which is predicted, not executed; use "
                                 "--precision bf16, fp16 or fp32",
                                 b.name, name(b.type)));
  }
  if (slots_[id.index()].empty()) {
    slots_[id.index()].resize(
        b.scope == Scope::step ? 1 : static_cast<std::size_t>(p_.micro_batches) + 1);
  }
  const BufferId root = p_.memory_of(id);
  if (root != id) {
    prepare_buffer(root, seen);
    // A shard lies where it belongs in the whole that it is a part of.
    if (!b.layout.flat.empty() && p_.buffer(root).layout.flat.empty() && box(id).held)
      offset_[id.index()] = box(id).range.begin * b.width();
    return;
  }
  if (b.scope == Scope::step && b.category != Category::workspace) {
    Instance& instance = slots_[id.index()][0];
    take(id, instance, box(id).elements() * b.width());
    zero(b, instance);
    if (b.category == Category::parameters && b.parameter >= 0 && !p_.startup) {
      to_draw_.push_back(id);
      if (box(id).held) elements_to_draw_ += box(id).elements();
    }
  }
}

void Executor::zero(const Buffer& b, const Instance& instance) {
  if (b.host) {
    std::fill_n(instance.data, instance.bytes, std::byte{0});
  } else {
    // Whole words; blocks are a multiple of 64 bytes.
    device_.fill(instance.data, (instance.bytes + 3) / 4, 0);
  }
}

void Executor::take(BufferId id, Instance& instance, std::int64_t bytes) {
  instance.data = memory_of(id).take(p_.buffer(id).category, bytes);
  instance.bytes = bytes;
}

void Executor::initialise(BufferId id) {
  const Buffer& b = p_.buffer(id);
  const Box& mine = box(id);
  if (!mine.held) return;
  if (slots_[id.index()][0].data == nullptr) return;
  if (o_.drawn && !b.host) {
    const ProgramParameter& parameter = p_.parameters[static_cast<std::size_t>(b.parameter)];
    device_.draw(data(id), type_of(id), mine.elements(),
                 static_cast<float>(parameter.initial_value),
                 static_cast<float>(parameter.initial_deviation), o_.seed + id.index());
    return;
  }
  Visits visits(device_);
  float* values = floats(visits, id, mine.elements(), true);
  for_each_global(mine, b, [&](std::int64_t k, std::int64_t global) {
    values[k] =
        static_cast<float>(o_.initial(replica(), static_cast<std::size_t>(b.parameter), global));
    if (o_.drawing && ++drawn_ % 65536 == 0) o_.drawing(rank_, drawn_, elements_to_draw_);
  });
  visits.give_back();
}

std::byte* Executor::visit(Visits& visits, BufferId id, std::int64_t bytes, bool written) {
  if (!p_.buffer(id).host) return visits.host(data(id), bytes, written);
  device_.host_waits(device_.record());
  return data(id);
}

float* Executor::floats(Visits& visits, BufferId id, std::int64_t n, bool written) {
  const bool host = p_.buffer(id).host;
  if (host) device_.host_waits(device_.record());
  return visits.floats(data(id), type_of(id), n, written, host);
}

ElementType Executor::type_of(BufferId id) const {
  const Buffer& b = p_.buffer(id);
  return b.element_bytes == 0 ? b.type : ElementType::fp32;
}

void Executor::read(BufferId id) {
  if (!o_.read) {
    initialise(id);
    return;
  }
  const Buffer& b = p_.buffer(id);
  if (!box(id).held) return;
  Visits visits(device_);
  float* to = floats(visits, id, box(id).elements(), true);
  std::int64_t at = 0, first = 0, count = 0;
  const auto flush = [&] {
    if (count > 0) o_.read(replica(), static_cast<std::size_t>(b.parameter), first, count, to + at);
  };
  for_each_global(box(id), b, [&](std::int64_t k, std::int64_t global) {
    if (count > 0 && global == first + count) {
      ++count;
      return;
    }
    flush();
    at = k, first = global, count = 1;
  });
  flush();
  visits.give_back();
}

void Executor::make_inputs() {
  if (o_.drawn && step_ > 0 && !p_.sharded_storage) return;
  inputs_.clear();
  shard_.rewind();
  std::int64_t index = -1;
  for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage_)]) {
    for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
      ++index;
      if (i.kind != Kind::load || !box(i.writes[0]).held) continue;
      const Buffer& b = p_.buffer(i.writes[0]);
      std::int64_t per_sample = 1;
      for (std::size_t d = 1; d < b.shape.size(); ++d) per_sample *= b.shape[d].extent;
      const auto first = static_cast<std::int64_t>(replica()) * p_.micro_batches * p_.samples +
                         static_cast<std::int64_t>(call.micro_batch) * p_.samples;
      std::vector<std::byte> made(
          static_cast<std::size_t>(box(i.writes[0]).elements() * b.width()));
      for_each_global(box(i.writes[0]), b, [&](std::int64_t k, std::int64_t g) {
        const double v = o_.input(static_cast<std::size_t>(i.index), step_, first + g / per_sample,
                                  g % per_sample);
        if (b.element_bytes == 8) {
          reinterpret_cast<std::int64_t*>(made.data())[k] = std::llround(v);
        } else {
          const auto value = static_cast<float>(v);
          narrow(type_of(i.writes[0]), &value, made.data() + k * b.width(), 1);
        }
      });
      auto& input = inputs_[{i.writes[0], call.micro_batch}];
      if (p_.sharded_storage) {
        come_to(index);
        input.at = shard_.append(o_.storage, rank_, made.data(), made.size());
        input.bytes = made.size();
      } else {
        input.size = std::ssize(made);
        if (device_.is_host() || made.empty()) {
          input.values = std::move(made);
        } else {
          input.pinned = Spare(inputs_memory_, input.size);
          std::memcpy(input.pinned.at, made.data(), made.size());
        }
      }
    }
  }
}

}  // namespace partita::execute
