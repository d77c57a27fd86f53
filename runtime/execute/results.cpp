#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>
#include <tuple>

#include "runtime/execute/rank.h"
#include "runtime/transport/narrow.h"
#include "simulator/program/routing.h"

namespace partita::execute {

void Executor::keep_gradient(const Instruction& i) {
  const BufferId id = i.reads[0];
  if (!box(i.writes[0]).held) return;
  auto& kept = gradients_[id];
  kept.resize(static_cast<std::size_t>(box(i.writes[0]).elements()));
  Visits visits(device_);
  const float* from = floats(visits, id, std::ssize(kept), false);
  std::copy_n(from, kept.size(), kept.data());
}

void Executor::note_loss(BufferId id) {
  const Buffer& b = p_.buffer(id);
  if (!reference::counts_loss(p_, b, rank_)) return;
  if (device_.is_host()) {
    float value = 0;
    widen(type_of(id), data(id), &value, 1);
    losses_.back() += static_cast<double>(value);
    return;
  }
  // A deque: those before stay where they are.
  Loss& loss = step_losses_.emplace_back();
  loss.type = type_of(id);
  device_.to_host_later(loss.stored, data(id), b.width());
}

std::vector<Executor::Wanted> Executor::wanted_of(int stage) const {
  std::vector<Wanted> all;
  if (!o_.collect) return all;
  std::set<BufferId> blocks_seen;
  const auto add = [&](BufferId id, std::int32_t parameter, bool gradient) {
    if (blocks_seen.insert(id).second)
      all.push_back({id, static_cast<std::size_t>(parameter), gradient});
  };
  std::set<BlockId> blocks;
  for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage)])
    blocks.insert(call.block);
  for (const BlockId block : blocks) {
    for (const Instruction& i : p_.blocks[block.index()].instructions) {
      const auto note = [&](BufferId id) {
        const Buffer& b = p_.buffer(id);
        if (b.category == Category::parameters && b.parameter >= 0 && b.alias < 0 &&
            b.scope == Scope::step)
          add(id, b.parameter, false);
      };
      for_each_read(i, note);
      for_each_write(i, note);
      if (i.kind == Kind::compute && i.kernel == Kernel::optimizer)
        add(i.reads[0], p_.buffer(i.writes[0]).parameter, true);
    }
  }
  return all;
}

std::size_t Executor::replica_of(int rank) const {
  AtomList list;
  for (std::size_t i = 0; i < p_.mesh.atoms.size(); ++i) {
    if (has(p_.replicas, static_cast<AtomId>(i))) list.push_back(static_cast<AtomId>(i));
  }
  return static_cast<std::size_t>(p_.mesh.coordinate(p_.place_of(rank), list));
}

void Executor::collect() {
  transport_.doing("the collection of results");
  std::vector<float> all;
  for (const Wanted& w : wanted_of(stage_)) {
    if (!box(w.buffer).held) continue;
    const auto n = static_cast<std::size_t>(box(w.buffer).elements());
    if (w.gradient) {
      const auto& kept = gradients_.at(w.buffer);
      all.insert(all.end(), kept.begin(), kept.end());
      continue;
    }
    Visits visits(device_);
    const float* from = floats(visits, w.buffer, static_cast<std::int64_t>(n), false);
    all.insert(all.end(), from, from + n);
  }
  if (rank_ != 0) {
    transport_.send(0, kResultTag, losses_.data(), losses_.size() * sizeof(double));
    transport_.send(0, kResultTag, all.data(), all.size() * sizeof(float));
    transport_.barrier();
    return;
  }
  auto& result = result_.values;
  const auto replicas = static_cast<std::size_t>(p_.mesh.size(p_.replicas));
  result.losses.assign(losses_.size(), std::vector<double>(replicas, 0.0));
  result.gradients.assign(replicas, std::vector<std::vector<double>>(p_.parameters.size()));
  result.parameters = result.gradients;
  std::map<std::tuple<std::size_t, std::size_t, bool>, std::vector<char>> seen;
  for (int from = 0; from < transport_.size(); ++from) {
    const std::size_t r = replica_of(from);
    std::vector<std::pair<Wanted, Box>> pieces;
    std::size_t count = 0;
    for (const Wanted& w : wanted_of(p_.stage_of(from))) {
      Box b = box_of(p_, w.buffer, from);
      count += static_cast<std::size_t>(b.elements());
      if (b.held) pieces.emplace_back(w, std::move(b));
    }
    if (from != 0) {
      all.resize(count);
      transport_.receive(from, kResultTag, losses_.data(), losses_.size() * sizeof(double));
      transport_.receive(from, kResultTag, all.data(), all.size() * sizeof(float));
    }
    for (std::size_t s = 0; s < losses_.size(); ++s) result.losses[s][r] += losses_[s];
    std::size_t at = 0;
    for (const auto& [w, b] : pieces) {
      auto& to = (w.gradient ? result.gradients : result.parameters)[r][w.parameter];
      auto& have = seen[{r, w.parameter, w.gradient}];
      std::int64_t n = 1;
      for (const auto& d : p_.parameters[w.parameter].shape) n *= d.extent;
      to.resize(static_cast<std::size_t>(n));
      have.resize(to.size(), 0);
      for_each_global(b, p_.buffer(w.buffer), [&](std::int64_t k, std::int64_t g) {
        const auto v = static_cast<double>(all[at + static_cast<std::size_t>(k)]);
        auto& old = to[static_cast<std::size_t>(g)];
        if (have[static_cast<std::size_t>(g)] && old != v) {
          const double scale = std::max({std::abs(v), std::abs(old), 1e-12});
          result.copies_differ = std::max(result.copies_differ, std::abs(v - old) / scale);
        }
        old = v;
        have[static_cast<std::size_t>(g)] = 1;
      });
      at += static_cast<std::size_t>(b.elements());
    }
  }
  transport_.barrier();
}

void Executor::collect_measurements() {
  RankMeasurement& m = result_.measured;
  if (rank_ != 0) {
    std::vector<std::int64_t> words{m.peak.count, m.last_peak.count, m.host_peak.count,
                                    m.reserved.count};
    const OutsideMemory& o = m.outside;
    for (const Bytes b : {o.context, o.kernels, o.libraries, o.workspace, o.communicators})
      words.push_back(b.count);
    words.push_back(static_cast<std::int64_t>(o.by_ranks.size()));
    for (const auto& [n, bytes] : o.by_ranks) words.insert(words.end(), {n, bytes.count});
    for (const Bytes b : m.at_peak) words.push_back(b.count);
    for (const Bytes b : m.last_at_peak) words.push_back(b.count);
    const auto real = [](double v) {
      std::int64_t word;
      std::memcpy(&word, &v, sizeof word);
      return word;
    };
    words.push_back(real(m.clock_uncertainty_s));
    words.push_back(static_cast<std::int64_t>(m.step_s.size()));
    for (const double s : m.step_s) words.push_back(real(s));
    for (const auto* list : {&m.plain_s, &m.queued_s, &m.captured_s}) {
      words.push_back(static_cast<std::int64_t>(list->size()));
      for (const double s : *list) words.push_back(real(s));
    }
    words.push_back(static_cast<std::int64_t>(m.samples.size()));
    for (const auto& step : m.samples) {
      words.push_back(static_cast<std::int64_t>(step.size()));
      for (const Sample& s : step)
        words.insert(words.end(), {s.block, s.instruction, s.micro_batch, s.start, s.end});
    }
    const Traffic& t = m.traffic;
    words.insert(words.end(),
                 {t.messages, t.sends, t.send_bytes, static_cast<std::int64_t>(t.bytes_to.size())});
    for (const auto& [to, bytes] : t.bytes_to) words.insert(words.end(), {to, bytes});
    words.push_back(static_cast<std::int64_t>(t.collectives.size()));
    for (const auto& [kind, c] : t.collectives)
      words.insert(words.end(), {static_cast<std::int64_t>(kind), c.calls, c.payload_bytes});
    const auto n = static_cast<std::int64_t>(words.size());
    transport_.send(0, kResultTag, &n, sizeof n);
    transport_.send(0, kResultTag, words.data(), words.size() * sizeof(std::int64_t));
    transport_.barrier();
    return;
  }
  result_.ranks = {m};
  for (int from = 1; from < transport_.size(); ++from) {
    std::int64_t n = 0;
    transport_.receive(from, kResultTag, &n, sizeof n);
    std::vector<std::int64_t> words(static_cast<std::size_t>(n));
    transport_.receive(from, kResultTag, words.data(), words.size() * sizeof(std::int64_t));
    std::size_t at = 0;
    const auto next = [&] { return words.at(at++); };
    RankMeasurement r;
    r.rank = from;
    r.peak = Bytes{next()};
    r.last_peak = Bytes{next()};
    r.host_peak = Bytes{next()};
    r.reserved = Bytes{next()};
    OutsideMemory& o = r.outside;
    for (Bytes* b : {&o.context, &o.kernels, &o.libraries, &o.workspace, &o.communicators})
      *b = Bytes{next()};
    for (std::int64_t k = next(); k > 0; --k) {
      const auto ranks = static_cast<int>(next());
      o.by_ranks[ranks] = Bytes{next()};
    }
    for (Bytes& b : r.at_peak) b = Bytes{next()};
    for (Bytes& b : r.last_at_peak) b = Bytes{next()};
    const std::int64_t uncertainty = next();
    std::memcpy(&r.clock_uncertainty_s, &uncertainty, sizeof uncertainty);
    for (auto* list : {&r.step_s, &r.plain_s, &r.queued_s, &r.captured_s}) {
      list->resize(static_cast<std::size_t>(next()));
      for (double& s : *list) {
        const std::int64_t word = next();
        std::memcpy(&s, &word, sizeof s);
      }
    }
    r.samples.resize(static_cast<std::size_t>(next()));
    for (auto& step : r.samples) {
      step.resize(static_cast<std::size_t>(next()));
      for (Sample& s : step) {
        s.block = static_cast<std::int32_t>(next());
        s.instruction = static_cast<std::int32_t>(next());
        s.micro_batch = static_cast<std::int32_t>(next());
        s.start = next();
        s.end = next();
      }
    }
    Traffic& t = r.traffic;
    t.messages = next(), t.sends = next(), t.send_bytes = next();
    for (std::int64_t k = next(); k > 0; --k) {
      const auto to = static_cast<int>(next());
      t.bytes_to[to] = next();
    }
    for (std::int64_t k = next(); k > 0; --k) {
      auto& c = t.collectives[static_cast<CollectiveKind>(next())];
      c.calls = next();
      c.payload_bytes = next();
    }
    result_.ranks.push_back(std::move(r));
  }
  transport_.barrier();
}

void Executor::collect_routing() {
  const auto n = static_cast<std::int64_t>(routed_.size());
  if (rank_ != 0) {
    transport_.send(0, kResultTag, &n, sizeof n);
    transport_.send(0, kResultTag, routed_.data(), routed_.size() * sizeof(std::int64_t));
    transport_.barrier();
    return;
  }
  Routing& r = result_.routing;
  const std::int64_t replicas = p_.mesh.size(p_.replicas), batch = p_.samples * p_.micro_batches;
  r.samples = replicas * batch;
  r.positions = routed_positions(p_);
  const auto pieces = static_cast<std::int64_t>(r.positions.size()) - 1;
  std::map<std::int64_t, std::size_t> layers;
  for (const std::int32_t op : dispatch_of_buffers(p_)) {
    if (op < 0 || !layers.emplace(op, r.layers.size()).second) continue;
    const ProgramOperator& o = p_.operators[static_cast<std::size_t>(op)];
    r.layers.push_back(
        {o.name, std::get<Dispatch>(o.operation).experts, o.signature.outputs[0].shape[2].extent});
  }
  for (int s = 0; s < o_.steps; ++s) {
    r.steps.push_back({first_timed_ + s, {}});
    for (const Routing::Layer& l : r.layers)
      r.steps.back().counts.emplace_back(static_cast<std::size_t>(r.samples * pieces * l.experts),
                                         0);
  }
  std::set<std::array<std::int64_t, 5>> seen;  // step, op, sample, position, expert
  for (int from = 0; from < transport_.size(); ++from) {
    std::vector<std::int64_t> words = routed_;
    if (from != 0) {
      std::int64_t count = 0;
      transport_.receive(from, kResultTag, &count, sizeof count);
      words.resize(static_cast<std::size_t>(count));
      transport_.receive(from, kResultTag, words.data(), words.size() * sizeof(std::int64_t));
    }
    const auto first = static_cast<std::int64_t>(replica_of(from)) * batch;
    for (std::size_t at = 0; at < words.size();) {
      const std::int64_t step = words[at], op = words[at + 1], m = words[at + 2];
      const auto end = at + 4 + static_cast<std::size_t>(3 * words[at + 3]);
      const std::size_t layer = layers.at(op);
      for (at += 4; at < end; at += 3) {
        const std::int64_t sample = first + m * p_.samples + words[at];
        if (!seen.insert({step, op, sample, words[at + 1], words[at + 2]}).second) continue;
        const auto piece = std::upper_bound(r.positions.begin(), r.positions.end(), words[at + 1]) -
                           r.positions.begin() - 1;
        ++r.steps[static_cast<std::size_t>(step - first_timed_)]
              .counts[layer][static_cast<std::size_t>(
                  (sample * pieces + piece) * r.layers[layer].experts + words[at + 2])];
      }
    }
  }
  transport_.barrier();
}

}  // namespace partita::execute
