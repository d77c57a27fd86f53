#include "simulator/program/routing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "base/yaml.h"

namespace partita {
namespace {

constexpr const char* kSchema = "partita.routing/1";

AtomList list_of(AtomMask mask) {
  AtomList list;
  for (AtomId a = 0; a < 16; ++a) {
    if (has(mask, a)) list.push_back(a);
  }
  return list;
}

/// Row counts of what both lists hold, along one dimension of `b`.
std::vector<std::int64_t> indices(const Program& p, const Buffer& b, std::size_t d,
                                  std::int64_t rank) {
  const std::int64_t extent = b.shape[d].dim == Dim::expert ? b.experts : b.shape[d].extent;
  return local_indices(p.mesh, b.layout.dims[d], extent, p.place_of(rank));
}

std::vector<std::int64_t> both(const std::vector<std::int64_t>& a,
                               const std::vector<std::int64_t>& b) {
  std::vector<std::int64_t> all;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(all));
  return all;
}

std::int64_t rows_of(const Program& p, const RowCounts& c, std::int64_t rank,
                     const std::vector<std::int64_t>& samples,
                     const std::vector<std::int64_t>& sequence,
                     const std::vector<std::int64_t>& experts) {
  const auto pieces = static_cast<std::int64_t>(c.positions.size()) - 1;
  std::vector<std::int64_t> held;
  for (std::int64_t k = 0; k < pieces; ++k) {
    const auto begin = c.positions[static_cast<std::size_t>(k)];
    const auto end = c.positions[static_cast<std::size_t>(k) + 1];
    const auto first = std::lower_bound(sequence.begin(), sequence.end(), begin);
    const auto n = std::lower_bound(first, sequence.end(), end) - first;
    PARTITA_ASSERT(n == 0 || n == end - begin,
                   fmt::format("{} positions of a piece of {}", n, end - begin));
    if (n > 0) held.push_back(k);
  }
  const std::int64_t replica = p.mesh.coordinate(p.place_of(rank), list_of(p.replicas));
  std::int64_t sum = 0;
  for (const std::int64_t s : samples) {
    const std::int64_t row = c.per_replica == 0 ? 0 : c.first + replica * c.per_replica + s;
    for (const std::int64_t k : held) {
      const auto at = static_cast<std::size_t>((row * pieces + k) * c.experts);
      for (const std::int64_t e : experts) sum += c.counts[at + static_cast<std::size_t>(e)];
    }
  }
  return sum;
}

/// `tokens` tokens' rows by Zipf's law: floors first, the largest remainders get one more.
std::vector<std::int64_t> zipf_rows(std::int64_t tokens, std::int64_t experts, std::int64_t top_k,
                                    double s) {
  // An expert takes a token once: what is above its share of 1 / top_k goes to the others.
  std::vector<double> share(static_cast<std::size_t>(experts));
  std::size_t full = 0;
  for (;; ++full) {
    double rest = 0;
    for (std::size_t e = full; e < share.size(); ++e)
      rest += std::pow(static_cast<double>(e + 1), -s);
    const double left = 1 - static_cast<double>(full) / static_cast<double>(top_k);
    for (std::size_t e = 0; e < share.size(); ++e) {
      share[e] = e < full ? 1 / static_cast<double>(top_k)
                          : left * std::pow(static_cast<double>(e + 1), -s) / rest;
    }
    if (full + 1 >= share.size() || share[full] * static_cast<double>(top_k) <= 1) break;
  }
  std::vector<std::int64_t> rows;
  std::vector<std::pair<double, std::size_t>> remainders;
  std::int64_t left = tokens * top_k;
  for (std::size_t e = 0; e < share.size(); ++e) {
    const double exact = share[e] * static_cast<double>(tokens * top_k);
    const auto n = std::min(tokens, static_cast<std::int64_t>(std::floor(exact + 1e-9)));
    rows.push_back(n);
    left -= n;
    if (n < tokens) remainders.emplace_back(static_cast<double>(n) - exact, e);
  }
  std::sort(remainders.begin(), remainders.end());
  for (std::size_t k = 0; k < remainders.size() && left > 0; ++k, --left)
    ++rows[remainders[k].second];
  return rows;
}

/// Union of the routed buffers that an instruction reads and writes: they have the same rows.
class Sets {
 public:
  explicit Sets(std::size_t n) : parent_(n) { std::iota(parent_.begin(), parent_.end(), 0u); }
  std::size_t find(std::size_t x) {
    while (parent_[x] != x) x = parent_[x] = parent_[parent_[x]];
    return x;
  }
  void join(std::size_t a, std::size_t b) { parent_[find(a)] = find(b); }

 private:
  std::vector<std::size_t> parent_;
};

template <class F>
void for_each_buffer(Instruction& i, F f) {
  for (auto* list : {&i.reads, &i.parameters, &i.outputs, &i.gradients, &i.statistics,
                     &i.backward_statistics, &i.extras, &i.writes}) {
    for (BufferId& id : *list) {
      if (id.valid()) f(id);
    }
  }
}

/// The recording's layer of every Dispatch operator; checks that it is one of this program.
std::map<std::int32_t, std::size_t> layers_of(const Program& p, const Routing& r,
                                              const std::vector<std::int32_t>& dispatch) {
  std::map<std::int32_t, std::size_t> layer;
  for (const std::int32_t op : dispatch) {
    if (op < 0 || layer.count(op) > 0) continue;
    const ProgramOperator& o = p.operators[static_cast<std::size_t>(op)];
    const auto it = std::find_if(r.layers.begin(), r.layers.end(),
                                 [&](const Routing::Layer& l) { return l.name == o.name; });
    if (it == r.layers.end()) {
      throw InputError("--routing", fmt::format("the recording of {} has no layer {}; record one "
                                                "of this network with partita run --routing-out",
                                                r.model, o.name));
    }
    const auto experts = std::get<Dispatch>(o.operation).experts;
    if (it->experts != experts) {
      throw InputError("--routing", fmt::format("{} has {} experts in the recording and {} here; "
                                                "record this network",
                                                o.name, it->experts, experts));
    }
    layer[op] = static_cast<std::size_t>(it - r.layers.begin());
  }
  return layer;
}

}  // namespace

std::int64_t routed_rows(const Program& p, BufferId id, std::int64_t rank) {
  if (!p.holds(id, rank)) return 0;
  const Buffer& b = p.buffer(id);
  return rows_of(p, p.routings[static_cast<std::size_t>(b.routing)], rank, indices(p, b, 0, rank),
                 indices(p, b, 1, rank), indices(p, b, 2, rank));
}

std::int64_t common_rows(const Program& p, BufferId a, std::int64_t x, BufferId b, std::int64_t y) {
  if (!p.holds(a, x) || !p.holds(b, y)) return 0;
  const Buffer &from = p.buffer(a), &to = p.buffer(b);
  if (from.routing < 0) {
    std::int64_t rows = from.shape[2].extent;
    for (const std::size_t d : {0u, 1u, 2u})
      rows *= static_cast<std::int64_t>(both(indices(p, from, d, x), indices(p, to, d, y)).size());
    return ceil_div(rows, from.experts);
  }
  return rows_of(p, p.routings[static_cast<std::size_t>(from.routing)], x,
                 both(indices(p, from, 0, x), indices(p, to, 0, y)),
                 both(indices(p, from, 1, x), indices(p, to, 1, y)),
                 both(indices(p, from, 2, x), indices(p, to, 2, y)));
}

std::vector<std::int32_t> dispatch_of_buffers(const Program& p) {
  Sets sets(p.buffers.size());
  std::map<std::int32_t, std::size_t> messages;  // a routed buffer of each message
  std::vector<std::pair<std::size_t, std::int32_t>> sources;
  for (const Block& b : p.blocks) {
    for (Instruction i : b.instructions) {
      if (i.kind == Kind::allocate || i.kind == Kind::free) continue;
      std::vector<std::size_t> routed;
      for_each_buffer(i, [&](BufferId id) {
        if (p.buffer(id).routed) routed.push_back(id.index());
      });
      if (routed.empty()) continue;
      if (i.kind == Kind::collective) {
        for (std::size_t k = 0; k < i.reads.size(); ++k)
          sets.join(i.reads[k].index(), i.writes[k].index());
        continue;
      }
      for (const std::size_t r : routed) sets.join(r, routed[0]);
      if (i.kind == Kind::send || i.kind == Kind::receive) {
        const auto [it, fresh] = messages.emplace(i.index, routed[0]);
        sets.join(it->second, routed[0]);
      }
      if (i.kind == Kind::compute && i.op >= 0 &&
          std::holds_alternative<Dispatch>(p.operators[static_cast<std::size_t>(i.op)].operation))
        sources.emplace_back(routed[0], i.op);
    }
  }
  for (std::size_t b = 0; b < p.buffers.size(); ++b) {
    if (p.buffers[b].alias >= 0 && p.buffers[b].routed)
      sets.join(b, static_cast<std::size_t>(p.buffers[b].alias));
  }
  std::map<std::size_t, std::int32_t> op;
  for (const auto& [buffer, source] : sources) {
    const auto [it, fresh] = op.emplace(sets.find(buffer), source);
    PARTITA_ASSERT(it->second == source, "rows of two layers meet");
  }
  std::vector<std::int32_t> all(p.buffers.size(), -1);
  for (std::size_t b = 0; b < p.buffers.size(); ++b) {
    if (!p.buffers[b].routed) continue;
    if (const auto it = op.find(sets.find(b)); it != op.end()) all[b] = it->second;
  }
  return all;
}

std::vector<std::int64_t> routed_positions(const Program& p) {
  std::set<std::int64_t> bounds{0};
  std::vector<DimSplit> seen;
  for (const Buffer& b : p.buffers) {
    if (!b.routed) continue;
    bounds.insert(b.shape[1].extent);
    const DimSplit& cut = b.layout.dims[1];
    if (cut.atoms.empty() || std::find(seen.begin(), seen.end(), cut) != seen.end()) continue;
    seen.push_back(cut);
    for (std::int64_t rank = 0; rank < p.mesh.ranks(); ++rank) {
      const auto mine = local_indices(p.mesh, cut, b.shape[1].extent, rank);
      for (std::size_t k = 0; k < mine.size(); ++k) {
        if (k == 0 || mine[k - 1] + 1 != mine[k]) bounds.insert(mine[k]);
        if (k + 1 == mine.size() || mine[k] + 1 != mine[k + 1]) bounds.insert(mine[k] + 1);
      }
    }
  }
  return {bounds.begin(), bounds.end()};
}

Program with_routing(Program p, const RoutingSource& source) {
  if (source.balanced()) return p;
  const auto dispatch = dispatch_of_buffers(p);
  if (std::all_of(dispatch.begin(), dispatch.end(), [](std::int32_t op) { return op < 0; }))
    throw InputError("--routing", "the network routes nothing to experts; leave it out");
  const auto top_k = [&](std::int32_t op) {
    return p.operators[static_cast<std::size_t>(op)].signature.outputs[0].shape[2].extent;
  };
  if (source.zipf) {
    const auto positions = routed_positions(p);
    std::map<std::pair<std::int64_t, std::int64_t>, std::int32_t> known;  // experts, top k
    for (std::size_t b = 0; b < p.buffers.size(); ++b) {
      if (dispatch[b] < 0) continue;
      const std::int64_t experts = p.buffers[b].experts, k = top_k(dispatch[b]);
      const auto [it, fresh] =
          known.emplace(std::pair{experts, k}, static_cast<std::int32_t>(p.routings.size()));
      p.buffers[b].routing = it->second;
      if (!fresh) continue;
      RowCounts c;
      c.experts = experts;
      c.positions = positions;
      for (std::size_t piece = 0; piece + 1 < positions.size(); ++piece) {
        const auto rows =
            zipf_rows(positions[piece + 1] - positions[piece], experts, k, *source.zipf);
        c.counts.insert(c.counts.end(), rows.begin(), rows.end());
      }
      p.routings.push_back(std::move(c));
    }
    return p;
  }

  const Routing& r = *source.recorded;
  const auto layer = layers_of(p, r, dispatch);
  const std::int64_t replicas = p.mesh.size(p.replicas), step = p.samples * p.micro_batches;
  if (r.samples != replicas * step) {
    throw InputError("--routing", fmt::format("the recording is of {} samples a step and the plan "
                                              "has {}; use --global-batch {} or record this one",
                                              r.samples, replicas * step, r.samples / replicas));
  }
  for (const std::int64_t bound : routed_positions(p)) {
    if (!std::binary_search(r.positions.begin(), r.positions.end(), bound)) {
      throw InputError(
          "--routing",
          fmt::format("the plan cuts sequences at {} and the recording counts rows between {} "
                      "only; record a run of a plan that cuts sequences like this one",
                      bound, fmt::join(r.positions, ", ")));
    }
  }
  // One set of counts per layer and micro-batch.
  std::map<std::pair<std::int32_t, std::int32_t>, std::int32_t> counts_of;
  for (const auto& [op, at] : layer) {
    for (std::int32_t m = 0; m < p.micro_batches; ++m) {
      counts_of[{op, m}] = static_cast<std::int32_t>(p.routings.size());
      RowCounts c;
      c.experts = r.layers[at].experts;
      c.positions = r.positions;
      c.counts = r.steps.back().counts[at];
      c.first = m * p.samples;
      c.per_replica = step;
      p.routings.push_back(std::move(c));
    }
  }
  std::map<std::pair<BufferId, std::int32_t>, BufferId> copies;
  const auto copy = [&](auto&& self, BufferId id, std::int32_t m) -> BufferId {
    if (dispatch[id.index()] < 0) return id;
    if (const auto it = copies.find({id, m}); it != copies.end()) return it->second;
    Buffer b = p.buffers[id.index()];
    b.routing = counts_of.at({dispatch[id.index()], m});
    if (b.alias >= 0) b.alias = self(self, BufferId{static_cast<std::size_t>(b.alias)}, m).value;
    p.buffers.push_back(std::move(b));
    return copies[{id, m}] = BufferId{p.buffers.size() - 1};
  };
  for (auto& calls : p.stages) {
    for (BlockCall& call : calls) {
      if (call.micro_batch < 0) continue;
      Block b = p.blocks[call.block.index()];
      b.copy_of = call.block.value;
      for (Instruction& i : b.instructions)
        for_each_buffer(i, [&](BufferId& id) { id = copy(copy, id, call.micro_batch); });
      call.block = BlockId{p.blocks.size()};
      p.blocks.push_back(std::move(b));
    }
  }
  return p;
}

RoutingSource routing_source(const std::string& text, const std::string& place) {
  RoutingSource s;
  if (text == "balanced") return s;
  if (text.rfind("zipf:", 0) == 0) {
    char* end = nullptr;
    const double exponent = std::strtod(text.c_str() + 5, &end);
    if (text.size() == 5 || *end != '\0' || !(exponent >= 0 && exponent <= 10))
      throw InputError(place,
                       fmt::format("'{}' has no exponent in 0 to 10; zipf:1 is usual", text));
    s.zipf = exponent;
    return s;
  }
  if (text.rfind("zipf", 0) == 0)
    throw InputError(place, fmt::format("'{}' has no exponent; write zipf:1", text));
  s.recorded = load_routing(text);
  return s;
}

Routing load_routing(const std::string& file) {
  const YamlNode root = YamlNode::load_file(file, kSchema);
  Routing r;
  if (const auto model = root.find("model")) r.model = model->as_string();
  r.samples = root.get("samples").as_int(1, 1 << 24);
  const YamlNode sequence = root.get("sequence");
  r.positions = sequence.as_ints();
  for (std::size_t k = 0; k < r.positions.size(); ++k) {
    if (r.positions.size() < 2 || r.positions[0] != 0 ||
        (k > 0 && r.positions[k] <= r.positions[k - 1]))
      throw InputError(sequence.place(),
                       "bounds of pieces must begin with 0 and rise, like [0, 16, 32]");
  }
  if (r.positions.size() < 2)
    throw InputError(sequence.place(), "has no piece; write its bounds, like [0, 32]");
  for (const YamlNode& l : root.get("layers").items()) {
    Routing::Layer layer;
    layer.name = l.get("name").as_string();
    layer.experts = l.get("experts").as_int(1, 1 << 20);
    layer.top_k = l.get("top_k").as_int(1, layer.experts);
    l.reject_unknown_keys();
    r.layers.push_back(std::move(layer));
  }
  const auto pieces = r.positions.size() - 1;
  const YamlNode steps = root.get("steps");
  for (const YamlNode& s : steps.items()) {
    Routing::Step step;
    step.step = s.get("step").as_int(0);
    const YamlNode counts = s.get("counts");
    const auto layers = counts.items();
    if (layers.size() != r.layers.size())
      throw InputError(counts.place(), fmt::format("has {} matrices for {} layers", layers.size(),
                                                   r.layers.size()));
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const auto rows = layers[l].items();
      const std::size_t wanted = static_cast<std::size_t>(r.samples) * pieces;
      if (rows.size() != wanted) {
        throw InputError(layers[l].place(),
                         fmt::format("has {} rows; {} samples of {} pieces are {}", rows.size(),
                                     r.samples, pieces, wanted));
      }
      step.counts.emplace_back();
      for (std::size_t k = 0; k < rows.size(); ++k) {
        const std::int64_t tokens = r.positions[k % pieces + 1] - r.positions[k % pieces];
        const auto numbers = rows[k].items();
        if (static_cast<std::int64_t>(numbers.size()) != r.layers[l].experts) {
          throw InputError(rows[k].place(),
                           fmt::format("has {} counts; {} has {} experts", numbers.size(),
                                       r.layers[l].name, r.layers[l].experts));
        }
        std::int64_t sum = 0;
        for (const YamlNode& n : numbers) {
          step.counts.back().push_back(n.as_int(0, tokens));
          sum += step.counts.back().back();
        }
        if (sum > tokens * r.layers[l].top_k) {
          throw InputError(rows[k].place(),
                           fmt::format("has {} rows of {} tokens; each has at most {}", sum, tokens,
                                       r.layers[l].top_k));
        }
      }
    }
    s.reject_unknown_keys();
    r.steps.push_back(std::move(step));
  }
  if (r.steps.empty()) throw InputError(steps.place(), "has no step; at least one is needed");
  root.reject_unknown_keys();
  return r;
}

std::string to_json(const Routing& r) {
  const auto pieces = r.positions.size() - 1;
  std::string s = fmt::format(
      "{{\"schema\": \"{}\", \"model\": \"{}\", \"samples\": {}, \"sequence\": [{}],\n"
      " \"layers\": [",
      kSchema, r.model, r.samples, fmt::join(r.positions, ", "));
  for (std::size_t l = 0; l < r.layers.size(); ++l) {
    s +=
        fmt::format("{}{{\"name\": \"{}\", \"experts\": {}, \"top_k\": {}}}", l == 0 ? "" : ",\n  ",
                    r.layers[l].name, r.layers[l].experts, r.layers[l].top_k);
  }
  s += "],\n \"steps\": [";
  for (std::size_t k = 0; k < r.steps.size(); ++k) {
    s += fmt::format("{}\n  {{\"step\": {}, \"counts\": [", k == 0 ? "" : ",", r.steps[k].step);
    for (std::size_t l = 0; l < r.layers.size(); ++l) {
      s += l == 0 ? "\n   [" : ",\n   [";
      const auto experts = static_cast<std::size_t>(r.layers[l].experts);
      const auto& counts = r.steps[k].counts[l];
      for (std::size_t row = 0; row < static_cast<std::size_t>(r.samples) * pieces; ++row) {
        const auto first = counts.begin() + static_cast<std::ptrdiff_t>(row * experts);
        s += fmt::format("{}[{}]", row == 0 ? "" : ", ",
                         fmt::join(first, first + static_cast<std::ptrdiff_t>(experts), ", "));
      }
      s += "]";
    }
    s += "]}";
  }
  return s + "]}\n";
}

}  // namespace partita
