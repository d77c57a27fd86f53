#include "simulator/search/step_load.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace partita {
namespace {

/// What instructions of one kind send in a step, of one rank.
struct Sent {
  double bytes = 0, hops = 0;
  std::string axis;
};

/// By kind. A stage's first rank that takes part speaks for all.
std::map<TransferKind, Sent> sent_by_kind(const Program& p, Communication& communication) {
  std::map<TransferKind, Sent> all;
  for (int s = 0; s < p.stage_count(); ++s) {
    std::int64_t first = 0;
    while (p.stage_of(first) != s) ++first;
    std::map<BlockId, std::int64_t> calls;
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(s)]) ++calls[call.block];
    for (const auto& [b, n] : calls) {
      for (const Instruction& i : p.blocks[b.index()].instructions) {
        if (i.kind != Kind::collective && i.kind != Kind::send && i.kind != Kind::copy) continue;
        const TransferKind kind = transfer_kind(p, i, first, communication);
        if (i.kind == Kind::copy && kind.host == 0) continue;
        Sent& sent = all[kind];
        const double times = static_cast<double>(n) / i.every;
        double bytes = 0, hops = 1;
        if (i.kind == Kind::collective) {
          const auto group = p.group(i, first);
          const WireCount wire =
              wire_count(i.collective, static_cast<std::int64_t>(group.size()),
                         communication.travelling(p, i, payload(p, i, first), group));
          bytes = static_cast<double>(wire.bytes.count), hops = static_cast<double>(wire.steps);
          sent.axis = axis_name(p, i);
        } else if (i.kind == Kind::send) {
          std::int64_t r = first;
          while (p.stage_of(r) != s || !p.holds(i.reads[0], r)) ++r;
          bytes = static_cast<double>(message_bytes(p, i.reads[0], r).count);
          sent.axis = "pipeline";
        } else {
          bytes = static_cast<double>(local_bytes(p, i.writes[0], first).count);
          sent.axis = "host";
        }
        sent.bytes += times * bytes;
        sent.hops += times * hops;
      }
    }
  }
  return all;
}

}  // namespace

bool StepLoad::Value::better_than(const Value& other) const {
  constexpr double kRounding = 1e-9;
  if (time < other.time * (1 - kRounding)) return true;
  return time <= other.time * (1 + kRounding) && squares < other.squares * (1 - kRounding);
}

StepLoad::StepLoad(const Program& program, const Topology& topology, ElementType compute,
                   const Timeline& played, std::vector<std::int32_t> device)
    : program_(program), communication_(topology), device_(std::move(device)) {
  const auto sent = sent_by_kind(program, communication_);
  std::map<std::string, int> axis;
  for (const auto& [kind, s] : sent) {
    if (axis.emplace(s.axis, static_cast<int>(axes_.size())).second) axes_.push_back(s.axis);
  }
  const Breakdown& last = played.breakdown[static_cast<std::size_t>(played.last_class)];
  for (const std::string& name : axes_) {
    const auto it = last.exposed.find(name);
    // What waits for a pipeline's messages is in its bubble.
    exposed_.push_back(name == "pipeline"         ? to_seconds(last.bubble).count
                       : it == last.exposed.end() ? 0
                                                  : to_seconds(it->second).count);
  }
  of_rank_.resize(static_cast<std::size_t>(program.ranks()));
  std::map<AtomMask, std::pair<std::string, std::map<std::int64_t, std::int32_t>>> rings;
  for_each_transfer(program, communication_,
                    [&](const TransferKind& kind, const Instruction& i,
                        const std::vector<std::int64_t>& members) {
                      const Sent& s = sent.at(kind);
                      Transfer t;
                      t.kind = kind, t.axis = axis.at(s.axis), t.members = members;
                      t.bytes = s.bytes, t.hops = s.hops;
                      const auto number = static_cast<std::int32_t>(transfers_.size());
                      for (const std::int64_t m : members)
                        of_rank_[static_cast<std::size_t>(m)].push_back(number);
                      if (i.kind == Kind::collective && i.tie < 0 && kind.lay != Lay::pairs &&
                          members.size() > 2 && axis_atoms(program.mesh, s.axis) == kind.atoms) {
                        auto& [name, by_root] = rings[kind.atoms];
                        name = s.axis;
                        by_root[members.front()] = number;
                      }
                      transfers_.push_back(std::move(t));
                    });
  for (const auto& [atoms, named] : rings) {
    RingAxis& a = ring_axes_[named.first];
    a.size = program.mesh.size(atoms);
    for (std::int64_t r = 0; r < program.mesh.ranks(); ++r) {
      if (program.mesh.group_root(r, atoms) != r) continue;
      const auto it = named.second.find(r);
      a.rings.push_back(it == named.second.end() ? -1 : static_cast<std::int32_t>(ring_of_.size()));
      if (it != named.second.end()) ring_of_.push_back(it->second);
    }
  }

  const std::size_t devices = topology.rank_count();
  const auto& state = topology.state();
  std::vector<std::size_t> of_profile(topology.profile_count(), 0);
  for (std::size_t d = 0; d < devices; ++d) {
    rate_.push_back(topology.device(DeviceId{d}).matrix_rate(compute).count *
                    topology.speed(DeviceId{d}));
    even_ = even_ && rate_[d] == rate_[0];
    ++of_profile[topology.profile_index(DeviceId{d})];
  }
  const auto most = static_cast<std::size_t>(
      std::max_element(of_profile.begin(), of_profile.end()) - of_profile.begin());
  std::set<std::size_t> odd_nodes;
  for (const auto& [l, speed] : state.link_speed) {
    for (const std::int32_t v : {topology.link(l).from, topology.link(l).to})
      odd_nodes.insert(topology.node_of_vertex(v));
  }
  for (const auto& [l, rate] : state.background) {
    for (const std::int32_t v : {topology.link(l).from, topology.link(l).to})
      odd_nodes.insert(topology.node_of_vertex(v));
  }
  for (std::size_t d = 0; d < devices; ++d)
    odd_.push_back(topology.speed(DeviceId{d}) != 1 ||
                   topology.profile_index(DeviceId{d}) != most ||
                   odd_nodes.count(topology.node_of(DeviceId{d})) > 0);
  work_.assign(static_cast<std::size_t>(program.stage_count()), 0);
  for (std::size_t c = 0; c < played.classes.size(); ++c) {
    const Breakdown& b = played.breakdown[c];
    Ticks busy = b.optimizer + b.other;
    for (const auto& [name, ticks] : b.compute) busy += ticks;
    double& work = work_[static_cast<std::size_t>(played.classes[c].stage)];
    const auto on = static_cast<std::size_t>(
        device_[static_cast<std::size_t>(played.classes[c].representative)]);
    work = std::max(work, to_seconds(busy).count * rate_[on]);
  }

  dense_.assign(topology.link_count(), -1);
  load_.resize(axes_.size());
  touched_.assign(transfers_.size(), 0);
  for (Transfer& t : transfers_) {
    route(t);
    add(t, 1);
  }
  routes_of_all_ = routes_;
  busy_before_.assign(axes_.size(), 0);
  for (const AxisBusy& a : busiest())
    busy_before_[static_cast<std::size_t>(axis.at(a.axis))] = a.busy.count;
  value_ = weigh();
}

void StepLoad::route(Transfer& t) {
  std::vector<std::int64_t> on;
  const bool ring = t.kind.peer_stage < 0 && t.kind.host == 0 && t.kind.lay != Lay::pairs;
  for (const std::int64_t m : ring ? in_ring_order(t.members, t.stride) : t.members)
    on.push_back(device_[static_cast<std::size_t>(m)]);
  // Whichever algorithm it is, mappings are weighed by rings: trees change shape with who is first.
  TransferKind kind = t.kind;
  if (ring) kind.lay = Lay::rings;
  const auto flows = transfer_links(kind, on, communication_);
  routes_ += static_cast<std::int64_t>(on.size());
  const Topology& topology = communication_.topology();
  t.loads.clear();
  for (const auto& [link, n] : flows.flows) {
    std::int32_t& number = dense_[link.index()];
    if (number < 0) {
      number = static_cast<std::int32_t>(link_.size());
      link_.push_back(link);
      const double built = topology.link(link).bandwidth.count;
      const auto busy = topology.state().background.find(link);
      // One flow more, which gets no more than half beside one of ours.
      capacity_.push_back(busy == topology.state().background.end()
                              ? built
                              : std::max(built - busy->second.count, built / 2));
    }
    t.loads.emplace_back(number, static_cast<double>(n) * flows.share * t.bytes /
                                     capacity_[static_cast<std::size_t>(number)]);
  }
  t.latency = t.hops * flows.latency.count;
}

void StepLoad::add(const Transfer& t, double sign) {
  auto& load = load_[static_cast<std::size_t>(t.axis)];
  if (load.size() < link_.size()) load.resize(link_.size(), 0);
  for (const auto& [l, seconds] : t.loads) load[static_cast<std::size_t>(l)] += sign * seconds;
}

double StepLoad::computing() const {
  std::vector<double> slowest(work_.size(), INFINITY);
  for (std::size_t r = 0; r < device_.size(); ++r) {
    double& least =
        slowest[static_cast<std::size_t>(program_.stage_of(static_cast<std::int64_t>(r)))];
    least = std::min(least, rate_[static_cast<std::size_t>(device_[r])]);
  }
  // A pipeline goes at its slowest stage's pace; the others fill and drain it.
  double most = 0, sum = 0;
  for (std::size_t s = 0; s < work_.size(); ++s) {
    const double time = work_[s] / slowest[s];
    most = std::max(most, time), sum += time;
  }
  return most + (sum - most) / static_cast<double>(std::max(1, program_.micro_batches));
}

StepLoad::Value StepLoad::weigh() const {
  Value v;
  std::vector<double> latency(axes_.size(), 0);
  for (const Transfer& t : transfers_) {
    double& longest = latency[static_cast<std::size_t>(t.axis)];
    longest = std::max(longest, t.latency);
  }
  v.time = even_ ? 0 : computing();
  for (std::size_t a = 0; a < axes_.size(); ++a) {
    double most = 0;
    for (const double seconds : load_[a]) {
      most = std::max(most, seconds);
      v.squares += seconds * seconds;
    }
    // What others hid stays hidden.
    v.time += std::max(0.0, exposed_[a] + most + latency[a] - busy_before_[a]);
  }
  return v;
}

StepLoad::Value StepLoad::propose(const Change& change) {
  ++mappings_;
  // Looking through all loads takes time as well, of 256 about that of one route.
  routes_ += static_cast<std::int64_t>(axes_.size() * link_.size() / 256);
  std::vector<std::int32_t> again;
  const auto touch = [&](std::int32_t t) {
    if (touched_[static_cast<std::size_t>(t)]) return;
    touched_[static_cast<std::size_t>(t)] = 1;
    again.push_back(t);
  };
  for (const auto& [rank, to] : change.moves) {
    moved_.emplace_back(rank, device_[static_cast<std::size_t>(rank)]);
    device_[static_cast<std::size_t>(rank)] = to;
    for (const std::int32_t t : of_rank_[static_cast<std::size_t>(rank)]) touch(t);
  }
  for (const auto& [ring, stride] : change.strides) {
    const std::int32_t t = ring_of_[static_cast<std::size_t>(ring)];
    if (transfers_[static_cast<std::size_t>(t)].stride != stride) touch(t);
  }
  for (const std::int32_t t : again) {
    touched_[static_cast<std::size_t>(t)] = 0;
    before_.emplace_back(t, transfers_[static_cast<std::size_t>(t)]);
  }
  for (const auto& [ring, stride] : change.strides)
    transfers_[static_cast<std::size_t>(ring_of_[static_cast<std::size_t>(ring)])].stride = stride;
  for (const std::int32_t t : again) {
    Transfer& x = transfers_[static_cast<std::size_t>(t)];
    add(x, -1);
    route(x);
    add(x, 1);
  }
  return proposed_ = weigh();
}

void StepLoad::keep() {
  before_.clear(), moved_.clear();
  value_ = proposed_;
}

void StepLoad::take_back() {
  for (auto& [t, x] : before_) {
    add(transfers_[static_cast<std::size_t>(t)], -1);
    transfers_[static_cast<std::size_t>(t)] = std::move(x);
    add(transfers_[static_cast<std::size_t>(t)], 1);
  }
  for (auto it = moved_.rbegin(); it != moved_.rend(); ++it)
    device_[static_cast<std::size_t>(it->first)] = it->second;
  before_.clear(), moved_.clear();
}

void StepLoad::set(const std::vector<std::int32_t>& device,
                   const std::vector<std::int64_t>& strides) {
  Change change;
  for (std::size_t r = 0; r < device.size(); ++r) {
    if (device[r] != device_[r]) change.moves.emplace_back(static_cast<std::int64_t>(r), device[r]);
  }
  for (std::size_t k = 0; k < strides.size(); ++k)
    change.strides.emplace_back(static_cast<std::int32_t>(k), strides[k]);
  propose(change);
  keep();
}

std::vector<std::int64_t> StepLoad::strides() const {
  std::vector<std::int64_t> all;
  for (const std::int32_t t : ring_of_)
    all.push_back(transfers_[static_cast<std::size_t>(t)].stride);
  return all;
}

bool StepLoad::at_its_best() const { return even_ && value_.time == 0; }

std::vector<AxisBusy> StepLoad::busiest() const {
  std::vector<AxisBusy> all;
  for (std::size_t a = 0; a < axes_.size(); ++a) {
    AxisBusy x{axes_[a], Seconds{0}, {}};
    for (std::size_t l = 0; l < load_[a].size(); ++l) {
      // Sums of the same in another order differ in their last digits.
      const bool equal = std::abs(load_[a][l] - x.busy.count) <= 1e-9 * x.busy.count;
      if (equal ? load_[a][l] > 0 && link_[l] < x.link : load_[a][l] > x.busy.count)
        x.busy = equal ? x.busy : Seconds{load_[a][l]}, x.link = link_[l];
    }
    double latency = 0;
    for (const Transfer& t : transfers_) {
      if (t.axis == static_cast<int>(a)) latency = std::max(latency, t.latency);
    }
    x.busy = x.busy + Seconds{latency};
    all.push_back(x);
  }
  return all;
}

}  // namespace partita
