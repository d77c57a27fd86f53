#include <algorithm>
#include <cstring>
#include <variant>

#include "runtime/execute/rank.h"
#include "runtime/transport/narrow.h"
#include "simulator/program/routing.h"

namespace partita::execute {

float* Executor::row_values(Visits& visits, BufferId id, bool written) {
  return floats(visits, id, rows_of(id).bytes / p_.buffer(id).width(), written);
}

void Executor::put_rows(BufferId id, std::vector<Row> rows) {
  const BufferId root = p_.memory_of(id);
  Instance& instance = slot(root);
  const std::int64_t bytes =
      static_cast<std::int64_t>(rows.size() * box(id).index[3].size()) * p_.buffer(id).width();
  Memory& memory = memory_of(root);
  const std::int64_t had = Memory::roomy(instance.bytes), room = Memory::roomy(bytes);
  memory.count(p_.buffer(root).category, bytes - instance.bytes);
  instance.bytes = bytes;
  if (room != had || instance.data == nullptr) {
    memory.give_back_spare(instance.data, had);
    instance.data = memory.take_spare(room);
    if (instance.data != nullptr) order_.write(instance.data);
  }
  instance.rows = std::move(rows);
}

bool Executor::holds(const std::vector<std::int64_t>& list, std::int64_t x) {
  return std::binary_search(list.begin(), list.end(), x);
}

bool Executor::wants(const Box& box, const Row& row) {
  return holds(box.index[0], row.sample) && holds(box.index[1], row.sequence) &&
         holds(box.index[2], row.expert);
}

bool Executor::before(const Row& a, const Row& b) {
  return std::tie(a.expert, a.sample, a.sequence) < std::tie(b.expert, b.sample, b.sequence);
}

Executor::Given Executor::given_by(std::int32_t op) const {
  const ProgramOperator& o = p_.operators[static_cast<std::size_t>(op)];
  const Shape& rows = o.signature.outputs[0].shape;
  return {rows[1].extent, std::get<Dispatch>(o.operation).experts, rows[2].extent};
}

std::vector<Row> Executor::chosen_rows(BufferId id, const Box& box, const Box* also) {
  if (dispatch_.empty()) dispatch_ = dispatch_of_buffers(p_);
  const Given given = given_by(dispatch_[id.index()]);
  std::vector<Row> rows;
  for (const std::int64_t e : box.index[2]) {
    if (also != nullptr && !holds(also->index[2], e)) continue;
    for (const std::int64_t s : box.index[0]) {
      for (const std::int64_t t : box.index[1]) {
        const Row row{s, t, e};
        if (given.chooses(s, t, e) && (also == nullptr || wants(*also, row))) rows.push_back(row);
      }
    }
  }
  return rows;
}

void Executor::give_gates(const Instruction& i) {
  if (i.kind != Kind::compute || i.kernel != Kernel::forward || i.op < 0 ||
      !std::holds_alternative<Dispatch>(p_.operators[static_cast<std::size_t>(i.op)].operation))
    return;
  if (tag_ >= 0) device_.belongs_to(-1);
  const BufferId gates = i.reads[1];
  const Box& all = box(gates);
  const std::int64_t bytes = all.elements() * p_.buffer(gates).width();
  auto kept = gates_.find(&i);
  if (kept == gates_.end()) {
    const Given given = given_by(i.op);
    std::vector<float> values;
    for (const std::int64_t s : all.index[0]) {
      for (const std::int64_t t : all.index[1]) {
        for (const std::int64_t e : all.index[2])
          values.push_back(given.chooses(s, t, e) ? 1 / static_cast<float>(given.top_k) : 0);
      }
    }
    std::vector<std::byte> stored(static_cast<std::size_t>(bytes));
    narrow(type_of(gates), values.data(), stored.data(), std::ssize(values));
    kept = gates_.emplace(&i, Spare(memory_, bytes)).first;
    order_.write(kept->second.at);
    device_.to_device(kept->second.at, stored.data(), bytes);
  }
  order_.write(slot(p_.memory_of(gates)).data);
  device_.copy(data(gates), kept->second.at, bytes);
}

void Executor::rows_alone(const Instruction& i, const Prepared& c) {
  const BufferId from = i.reads[0], to = i.writes[0];
  auto it = alone_.find(&i);
  if (it == alone_.end()) {
    const auto shared = [](const Box& a, const Box& b) {
      std::int64_t n = 0;
      for (const std::int64_t f : a.index[3]) n += holds(b.index[3], f) ? 1 : 0;
      return n;
    };
    std::int64_t packed = 0;
    const auto pack = [&](const Box& has, const Box& wants) {
      const std::int64_t columns = shared(has, wants);
      if (columns == 0) return;
      packed += std::ssize(chosen_rows(from, has, &wants)) *
                (static_cast<std::int64_t>(sizeof(Row)) + columns * p_.buffer(from).width());
    };
    const bool reduces =
        i.kind == Kind::collective && i.collective == CollectiveKind::reduce_scatter;
    for (const int member : c.group) {
      pack(box(from), box_of(p_, to, member));
      if (!reduces) pack(box_of(p_, from, member), box(to));
    }
    it = alone_.emplace(&i, std::pair{packed, chosen_rows(to, box(to))}).first;
  }
  const auto& [packed, rows] = it->second;
  memory_.count(Category::workspace, packed);
  put_rows(to, std::vector<Row>(rows));
  draw_received(to, data(to), rows_of(to).bytes / p_.buffer(to).width());
  memory_.count(Category::workspace, -packed);
}

void Executor::routed_collective(const Instruction& i, const Prepared& c) {
  PARTITA_ASSERT(i.reads.size() == 1, "routed buffers travel alone");
  const BufferId from = i.reads[0], to = i.writes[0];
  const std::size_t n = c.group.size(), me = static_cast<std::size_t>(c.me);
  Instance& source = rows_of(from);
  if (i.kind == Kind::collective && i.collective == CollectiveKind::all_reduce) {
    if (rows_of(from).data != rows_of(to).data) {
      put_rows(to, std::vector<Row>(source.rows));
      device_.copy(data(to), data(from), rows_of(to).bytes);
    }
    Prepared whole;
    whole.group = c.group;
    whole.me = c.me;
    whole.type = type_of(to);
    whole.word = p_.buffer(to).width();
    whole.offsets = {0, rows_of(to).bytes / whole.word};
    whole.send_offsets = whole.offsets;
    call(i, whole, data(to), nullptr);
    return;
  }
  if (o_.alone && i.kind == Kind::collective) {
    rows_alone(i, c);
    return;
  }
  // What every member wants of mine: rows by key, and where their columns lie.
  const bool reduces = i.kind == Kind::collective && i.collective == CollectiveKind::reduce_scatter;
  const auto& mine = box(from).index[3];
  const std::int64_t element = p_.buffer(from).width();
  std::vector<std::int64_t> rows_to(n, 0), values_to(n + 1, 0);
  std::vector<Row> keys;
  RunList outgoing;
  outgoing.passing = true;
  const Exchange& plan = exchange_of(i, c, from, to);
  for (std::size_t m = 0; m < n; ++m) {
    const std::vector<Run>& columns = plan.out[m];
    values_to[m + 1] = values_to[m];
    for (std::size_t r = 0; r < source.rows.size() && !columns.empty(); ++r) {
      if (!plan.wants[m].has(source.rows[r])) continue;
      keys.push_back(source.rows[r]);
      ++rows_to[m];
      values_to[m + 1] += add_row(outgoing, r, mine.size(), columns);
    }
  }
  const std::int64_t sent_bytes = values_to[n] * element;
  const auto packed_keys = static_cast<std::int64_t>(keys.size() * sizeof(Row));
  if (reduces) {
    memory_.count(Category::workspace, packed_keys + sent_bytes);
    const Spare sums(memory_, Memory::roomy(sent_bytes));
    order_.write(sums.at);
    device_.pack(outgoing, element, data(from), sums.at);
    Prepared chunks;
    chunks.group = c.group;
    chunks.me = c.me;
    chunks.type = type_of(from);
    chunks.word = element;
    chunks.send_offsets = chunks.offsets = values_to;
    call(i, chunks, sums.at, nullptr);
    std::int64_t first = 0;
    for (std::size_t m = 0; m < me; ++m) first += rows_to[m];
    put_rows(to, {keys.begin() + first, keys.begin() + first + rows_to[me]});
    device_.copy(data(to), sums.at + values_to[me] * element,
                 (values_to[me + 1] - values_to[me]) * element);
    memory_.count(Category::workspace, -packed_keys - sent_bytes);
    return;
  }
  // Counts, keys, values: three exchanges of the same shape. The host knows who has which rows.
  std::vector<std::int64_t> rows_from(n, 0);
  const auto exchange = [&](const void* out, const std::vector<std::int64_t>& out_bounds, void* in,
                            const std::vector<std::int64_t>& in_bounds, std::size_t bytes) {
    const auto* send = static_cast<const std::byte*>(out);
    auto* receive = static_cast<std::byte*>(in);
    const auto at = [&](const std::vector<std::int64_t>& list, std::size_t m) {
      return static_cast<std::size_t>(list[m]) * bytes;
    };
    if (at(out_bounds, me + 1) > at(out_bounds, me))
      std::memcpy(receive + at(in_bounds, me), send + at(out_bounds, me),
                  at(out_bounds, me + 1) - at(out_bounds, me));
    if (n > 1)
      transport_.collective(
          all_to_all(c, receive, send, in_bounds, out_bounds, static_cast<std::int64_t>(bytes)));
  };
  std::vector<std::int64_t> each(n + 1);
  for (std::size_t m = 0; m <= n; ++m) each[m] = static_cast<std::int64_t>(m);
  exchange(rows_to.data(), each, rows_from.data(), each, sizeof(std::int64_t));
  std::vector<std::int64_t> key_out(n + 1, 0), key_in(n + 1, 0), value_in(n + 1, 0);
  for (std::size_t m = 0; m < n; ++m) {
    key_out[m + 1] = key_out[m] + rows_to[m];
    key_in[m + 1] = key_in[m] + rows_from[m];
    value_in[m + 1] = value_in[m] + rows_from[m] * count(plan.in[m]);
  }
  std::vector<Row> keys_in(static_cast<std::size_t>(key_in[n]));
  exchange(keys.data(), key_out, keys_in.data(), key_in, sizeof(Row));
  const std::int64_t received_bytes = value_in[n] * element;
  const std::int64_t packed = packed_keys +
                              static_cast<std::int64_t>(keys_in.size() * sizeof(Row)) + sent_bytes +
                              received_bytes;
  memory_.count(Category::workspace, packed);
  const Spare sent(memory_, Memory::roomy(sent_bytes)),
      received(memory_, Memory::roomy(received_bytes));
  order_.write(sent.at);
  order_.write(received.at);
  device_.pack(outgoing, element, data(from), sent.at);
  device_.copy(received.at + value_in[me] * element, sent.at + values_to[me] * element,
               (values_to[me + 1] - values_to[me]) * element);
  if (n > 1) {
    CollectiveCall values = all_to_all(c, received.at, sent.at, value_in, values_to, element);
    values.type = type_of(from);
    carry_out(values, i, received_bytes, sent_bytes);
  }
  std::vector<Row> rows = keys_in;
  std::sort(rows.begin(), rows.end(), before);
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  RunList incoming;
  incoming.passing = true;
  for (std::size_t m = 0; m < n; ++m) {
    for (std::int64_t r = key_in[m]; r < key_in[m + 1]; ++r) {
      const auto it =
          std::lower_bound(rows.begin(), rows.end(), keys_in[static_cast<std::size_t>(r)], before);
      add_row(incoming, static_cast<std::size_t>(it - rows.begin()), box(to).index[3].size(),
              plan.in[m]);
    }
  }
  put_rows(to, std::move(rows));
  device_.unpack(incoming, element, received.at, data(to));
  memory_.count(Category::workspace, -packed);
}

const Executor::Exchange& Executor::exchange_of(const Instruction& i, const Prepared& c,
                                                BufferId from, BufferId to) {
  const auto it = exchanges_.find(&i);
  if (it != exchanges_.end()) return it->second;
  Exchange e;
  const auto &mine = box(from).index[3], &here = box(to).index[3];
  for (const int member : c.group) {
    const Box theirs = box_of(p_, to, member);
    e.wants.emplace_back(theirs);
    e.out.push_back(shared_columns(mine, theirs.index[3], mine));
    e.in.push_back(shared_columns(box_of(p_, from, member).index[3], here, here));
  }
  return exchanges_.emplace(&i, std::move(e)).first->second;
}

std::vector<Run> Executor::shared_columns(const std::vector<std::int64_t>& a,
                                          const std::vector<std::int64_t>& b,
                                          const std::vector<std::int64_t>& of) {
  std::vector<Run> runs;
  for (std::size_t k = 0; k < of.size(); ++k) {
    if (!holds(a, of[k]) || !holds(b, of[k])) continue;
    const auto at = static_cast<std::int64_t>(k);
    if (!runs.empty() && runs.back().offset + runs.back().count == at) {
      ++runs.back().count;
    } else {
      runs.push_back({at, 1});
    }
  }
  return runs;
}

std::int64_t Executor::add_row(RunList& list, std::size_t row, std::size_t width,
                               const std::vector<Run>& columns) {
  std::int64_t n = 0;
  for (const Run& r : columns) {
    list.runs.push_back({static_cast<std::int64_t>(row * width) + r.offset, r.count});
    n += r.count;
  }
  return n;
}

CollectiveCall Executor::all_to_all(const Prepared& c, std::byte* to, const std::byte* from,
                                    const std::vector<std::int64_t>& bounds,
                                    const std::vector<std::int64_t>& send_bounds,
                                    std::int64_t element) {
  CollectiveCall one;
  one.kind = CollectiveKind::all_to_all;
  one.group = &c.group;
  one.me = c.me;
  one.element_bytes = static_cast<std::size_t>(element);
  one.data = to;
  one.send = from;
  one.offsets = bounds;
  one.send_offsets = send_bounds;
  one.tag = kCollectiveTag;
  return one;
}

}  // namespace partita::execute
