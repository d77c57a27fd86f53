#include <limits>
#include <set>
#include <variant>

#include "runtime/execute/rank.h"
#include "runtime/transport/narrow.h"
#include "simulator/program/routing.h"

namespace partita::execute {

void Executor::compute(const Instruction& i, OperatorKernel* kernel) {
  if (i.kernel == Kernel::initialise) {
    initialise(i.writes[0]);
    return;
  }
  if (i.kernel == Kernel::read) {
    read(i.writes[0]);
    return;
  }
  if (!of_operator(i.kernel)) {
    plain(i);
    return;
  }
  if (!kernel) return;
  kernel->set_step(step_, static_cast<std::int64_t>(micro_batch_) * p_.samples);
  Arguments a;
  const auto fill = [&](std::vector<Tensor>& to, const std::vector<BufferId>& from) {
    for (const BufferId id : from) to.push_back(tensor(id));
  };
  fill(a.inputs, i.reads);
  fill(a.parameters, i.parameters);
  fill(a.outputs, i.outputs);
  fill(a.output_gradients, i.gradients);
  fill(a.extras, i.extras);
  a.accumulate = i.accumulate;
  const Signature& s = *kernel->context().signature;
  const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
  a.whole_statistics = true;
  for (std::size_t d = 0; d < op.cuts.size(); ++d)
    a.whole_statistics &= s.dims[d].use != DimUse::statistic || op.cuts[d].atoms.empty();
  if (of_sequence_part(i)) {
    product_part(i, *kernel, a);
    return;
  }
  if (i.part >= 0) {
    fill(a.results, i.writes);
    const bool forward = i.kernel == Kernel::forward;
    if (!i.accumulate) {
      for (const BufferId id : i.writes) device_.fill(data(id), words(id), 0);
      // Log-sum-exps are fp32.
      if (forward)
        device_.fill(data(i.extras[0]), a.extras[0].size(),
                     -std::numeric_limits<float>::infinity());
    }
    kernel->run(forward ? Work::attend_part : Work::attend_part_backward, 0, a);
    return;
  }
  const bool own = i.inline_statistics && a.whole_statistics && kernel->makes_statistics();
  if (i.kernel == Kernel::forward && i.inline_statistics) {
    for (std::size_t k = 0; k < s.forward_statistics.size(); ++k) {
      a.results = {tensor(i.statistics[k])};
      a.accumulate = false;
      if (!own) kernel->run(Work::forward_statistic, k, a);
      a.statistics.push_back(a.results[0]);
    }
    a.accumulate = i.accumulate;
  } else {
    fill(a.statistics, i.statistics);
  }
  std::vector<std::vector<cpu::Indices>> inline_index;
  std::vector<Spare> inline_sums;
  if (i.kernel == Kernel::backward_data && i.inline_statistics) {
    inline_index.reserve(s.backward_statistics.size());
    for (std::size_t k = 0; k < s.backward_statistics.size(); ++k) {
      const Statistic& statistic = s.backward_statistics[k];
      inline_index.emplace_back();
      for (const int d : statistic.dims)
        inline_index.back().push_back(kernel->context().indices[static_cast<std::size_t>(d)]);
      inline_index.back().emplace_back();
      for (std::int64_t w = 0; w < statistic.width; ++w) inline_index.back().back().push_back(w);
      Tensor t;
      t.index = &inline_index.back();
      inline_sums.emplace_back(memory_, t.size() * 4);
      order_.write(inline_sums.back().at);
      t.values = reinterpret_cast<float*>(inline_sums.back().at);
      a.results = {t};
      if (!own) kernel->run(Work::backward_statistic, k, a);
      a.backward_statistics.push_back(t);
    }
  } else {
    fill(a.backward_statistics, i.backward_statistics);
  }
  a.own_statistics = own;
  a.results.clear();
  fill(a.results, i.writes);
  std::set<std::size_t> placed;
  a.place = [&](std::size_t k, const std::vector<Row>& rows) {
    placed.insert(k);
    if (i.accumulate) {
      PARTITA_ASSERT(rows_of(i.writes[k]).rows == rows, "rows to add to differ");
    } else {
      put_rows(i.writes[k], std::vector<Row>(rows));
    }
    return values(i.writes[k]);
  };
  kernel->run(work_of(i.kernel), static_cast<std::size_t>(i.index), a);
  for (std::size_t k = 0; k < i.writes.size(); ++k) {
    if (!i.writes[k].valid() || !p_.buffer(i.writes[k]).routed || placed.count(k) > 0) continue;
    auto& made = kernel->routed[k];
    if (i.accumulate) {
      PARTITA_ASSERT(rows_of(i.writes[k]).rows == made.rows, "rows to add to differ");
      Visits visits(device_);
      float* to = row_values(visits, i.writes[k], true);
      for (std::size_t x = 0; x < made.values.size(); ++x) to[x] += made.values[x];
      visits.give_back();
      continue;
    }
    put_rows(i.writes[k], std::move(made.rows));
    std::vector<std::byte> stored(made.values.size() *
                                  static_cast<std::size_t>(p_.buffer(i.writes[k]).width()));
    narrow(type_of(i.writes[k]), made.values.data(), stored.data(), std::ssize(made.values));
    device_.to_device(data(i.writes[k]), stored.data(), std::ssize(stored));
  }
  if (o_.routing && step_ >= first_timed_ && !untimed_ && i.kernel == Kernel::forward &&
      !i.recomputed && std::holds_alternative<Dispatch>(op.operation)) {
    const auto& rows = rows_of(i.writes[0]).rows;
    routed_.insert(routed_.end(),
                   {step_, i.op, micro_batch_, static_cast<std::int64_t>(rows.size())});
    for (const Row& r : rows) routed_.insert(routed_.end(), {r.sample, r.sequence, r.expert});
  }
  if (i.kernel == Kernel::forward && op.has_loss && !i.recomputed) note_loss(i.writes[0]);
}

bool Executor::of_sequence_part(const Instruction& i) const {
  return i.part >= 0 &&
         !std::holds_alternative<Attention>(p_.operators[static_cast<std::size_t>(i.op)].operation);
}

Executor::Slice Executor::slice_of(const Instruction& i, BufferId id) {
  Slice s;
  s.box = box(id);
  const int d = sequence_dim(p_.buffer(id));
  if (d < 0) return s;
  auto positions = part_positions(p_, i, rank_);
  if (s.box.index[static_cast<std::size_t>(d)] == positions) return s;
  s.box.index[static_cast<std::size_t>(d)] = std::move(positions);
  s.runs = section(box(id), s.box);
  s.word = p_.buffer(id).width();
  s.values = Spare(memory_, s.box.dense() * s.word);
  return s;
}

void Executor::product_part(const Instruction& i, OperatorKernel& kernel, Arguments& a) {
  auto& slices = slices_[&i];
  if (slices.empty()) {
    for (const auto* list : {&i.reads, &i.gradients, &i.writes}) {
      for (const BufferId id : *list) slices.push_back(id.valid() ? slice_of(i, id) : Slice{});
    }
  }
  std::size_t at = 0;
  const auto take = [&](Tensor& t) {
    Slice& s = slices[at++];
    if (!t || s.runs.runs.empty()) return;
    order_.write(s.values.at);
    device_.pack(s.runs, s.word, reinterpret_cast<const std::byte*>(t.values), s.values.at);
    t.index = &s.box.index;
    t.values = s.at();
  };
  for (Tensor& t : a.inputs) take(t);
  for (Tensor& t : a.output_gradients) take(t);
  const std::size_t first = at;
  for (const BufferId id : i.writes) {
    Tensor t = tensor(id);
    Slice& s = slices[at++];
    if (t && !s.runs.runs.empty()) {
      order_.write(s.values.at);
      t.index = &s.box.index;
      t.values = s.at();
      if (i.accumulate) device_.fill(s.values.at, (s.box.dense() * s.word + 3) / 4, 0);
    }
    a.results.push_back(t);
  }
  kernel.run(work_of(i.kernel), 0, a);
  for (std::size_t k = 0; k < i.writes.size(); ++k) {
    Slice& s = slices[first + k];
    if (s.runs.runs.empty() || !i.writes[k].valid()) continue;
    if (i.accumulate) {
      device_.unpack_add(s.runs, type_of(i.writes[k]), s.values.at, data(i.writes[k]));
    } else {
      device_.unpack(s.runs, s.word, s.values.at, data(i.writes[k]));
    }
  }
}

void Executor::plain(const Instruction& i) {
  if (i.kernel == Kernel::add && p_.buffer(i.writes[0]).routed && box(i.writes[0]).held)
    put_rows(i.writes[0], std::vector<Row>(rows_of(i.reads[0]).rows));
  if (i.kernel == Kernel::optimizer && last_step_ && o_.collect) keep_gradient(i);
  PlainCall call;
  call.program = &p_;
  call.instruction = &i;
  call.step = step_;
  call.optimizer = p_.optimizer;
  if (o_.drawn) call.optimizer.learning_rate = 0;
  bool host = false;
  const auto fill = [&](std::vector<PlainCall::Operand>& to, const std::vector<BufferId>& from) {
    for (const BufferId id : from) {
      to.emplace_back();
      if (!id.valid() || !box(id).held) continue;
      const Buffer& b = p_.buffer(id);
      const std::int64_t n = b.routed ? rows_of(id).bytes / b.width() : box(id).elements();
      to.back() = {data(id), n, n * b.width(), &box(id), b.host, type_of(id)};
      host |= b.host;
    }
  };
  fill(call.reads, i.reads);
  fill(call.outputs, i.outputs);
  fill(call.statistics, i.statistics);
  fill(call.extras, i.extras);
  fill(call.writes, i.writes);
  // What compressed gradients travel as is the kernel's own business.
  if (i.kernel == Kernel::compress || i.kernel == Kernel::decompress) {
    for (auto& o : i.kernel == Kernel::compress ? call.writes : call.reads)
      o.type = ElementType::fp32;
  }
  if (host && !device_.is_host()) {
    device_.host_waits(device_.record());
    plain_by_visit(device_, call);
    return;
  }
  device_.plain(call);
}

}  // namespace partita::execute
