#include "simulator/engine/step_graph.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "base/error.h"

namespace partita {
namespace {

/// Rounding must not make a transfer wait for a link that it has to itself: demands are a part in
/// 2^30 less than they are.
constexpr double kAlone = 1 - 0x1p-30;

/// Kernels take what transfers leave: a collective's blocks are there to stay and its requests are
/// few, a kernel's fill the rest. Any weight far below that of flows (seconds per byte) will do.
constexpr double kKernelWeight = 0x1p-46;

}  // namespace

Usages::Usages(const Program& program, Communication& communication, const SharedLinks& links)
    : program_(program),
      communication_(communication),
      links_(links),
      first_of_stage_(first_ranks(program)) {
  for (const auto& l : links.links) sharing_.add(l.capacity);
  for (std::size_t l = 0; l < links.links.size(); ++l) {
    // Others' traffic is one flow more, that wants no more than it sends.
    const auto& busy = communication.topology().state().background;
    if (const auto it = busy.find(links.links[l].representative);
        it != busy.end() && it->second.count > 0) {
      const Demand on{ResourceId{l}};
      sharing_.start({&on, 1}, 1, it->second.count);
    }
  }
  first_units_ = ResourceId{sharing_.resource_count()};
  for (std::size_t d = 0; d < links.device_classes; ++d) sharing_.add(1);
  first_memory_ = ResourceId{sharing_.resource_count()};
  for (std::size_t d = 0; d < links.device_classes; ++d) sharing_.add(1);
  first_at_once_ = ResourceId{sharing_.resource_count()};
  const bool measured =
      std::any_of(links.ranks.classes.begin(), links.ranks.classes.end(), [&](const RankClass& c) {
        return !communication.topology()
                    .device(DeviceId{static_cast<std::size_t>(c.representative)})
                    .slowdown.empty();
      });
  if (!measured) return;
  std::set<Stream> lanes;
  for (const Block& b : program.blocks) {
    for (const Instruction& i : b.instructions) {
      if (i.kind == Kind::collective || i.kind == Kind::send) lanes.insert(i.stream);
    }
  }
  lanes_.assign(lanes.begin(), lanes.end());
  const std::size_t all = links.device_classes * 2 * lanes_.size() * kKernelFamilies * 2;
  for (std::size_t k = 0; k < all; ++k) sharing_.add(1);
}

std::size_t Usages::lane_of(const Instruction& i, bool arrives) const {
  const auto at = static_cast<std::size_t>(
      std::lower_bound(lanes_.begin(), lanes_.end(), i.stream) - lanes_.begin());
  return at + (arrives ? lanes_.size() : 0);
}

ResourceId Usages::at_once(std::int32_t device_class, std::size_t lane, int family,
                           bool back) const {
  const std::size_t at =
      (static_cast<std::size_t>(device_class) * 2 * lanes_.size() + lane) * kKernelFamilies +
      static_cast<std::size_t>(family);
  return ResourceId{first_at_once_.index() + 2 * at + (back ? 1 : 0)};
}

double Usages::most_slowdown(std::int32_t c, int family) const {
  const std::int64_t rank = links_.ranks.classes[static_cast<std::size_t>(c)].representative;
  double most = 1;
  for (const SlowdownPoint& p :
       communication_.topology().device(DeviceId{static_cast<std::size_t>(rank)}).slowdown) {
    if (static_cast<int>(p.kernel) == family) most = std::max(most, p.of_transfer);
  }
  return most;
}

TransferKind Usages::kind_of(const Instruction& i, std::int32_t rank_class) {
  const int stage = links_.ranks.classes[static_cast<std::size_t>(rank_class)].stage;
  return transfer_kind(program_, i, first_of_stage_[static_cast<std::size_t>(stage)],
                       communication_);
}

std::int32_t Usages::keep(Usage usage) {
  usages_.push_back(std::move(usage));
  return static_cast<std::int32_t>(usages_.size()) - 1;
}

std::int32_t Usages::kernel(const Instruction& i, std::int32_t c, Seconds& work) {
  const DeviceUse use =
      kernel_use(program_, i, links_.ranks.classes[static_cast<std::size_t>(c)].representative,
                 communication_);
  work = use.work;
  if (!(work.count > 0)) return -1;
  Usage u;
  u.weight = kKernelWeight;
  const auto& seat = links_.seats[static_cast<std::size_t>(c)];
  const auto at = static_cast<std::size_t>(seat.device_class);
  if (use.family >= 0) {
    const double most = most_slowdown(c, use.family);
    for (std::size_t lane = 0; lane < 2 * lanes_.size(); ++lane) {
      u.demands.push_back({at_once(seat.device_class, lane, use.family, false), kAlone});
      if (most > 1)
        u.held.emplace_back(at_once(seat.device_class, lane, use.family, true), 1 - 1 / most);
    }
    return keep(std::move(u));
  }
  const bool in_turns = communication_.topology().in_turns();
  if (in_turns || use.units > 0)
    u.demands.push_back(
        {ResourceId{first_units_.index() + at}, kAlone * (in_turns ? 1 : use.units), seat.ranks});
  if (use.memory > 0)
    u.demands.push_back({ResourceId{first_memory_.index() + at}, kAlone * use.memory, seat.ranks});
  return keep(std::move(u));
}

/// Links of the class's transfer, each flow at `rate` times its share.
void Usages::cross(Usage& u, const TransferKind& kind, std::int32_t c, double rate) {
  const auto it = links_.of_class.find(kind);
  if (it == links_.of_class.end()) return;
  const std::int32_t t = it->second[static_cast<std::size_t>(c)];
  if (t < 0) return;
  const auto& transfer = links_.transfers[static_cast<std::size_t>(t)];
  const double flow = rate * transfer.share;
  if (!(flow > 0)) return;
  // Max-min over flows: a level is a flow's bytes per second.
  u.weight = 1 / flow;
  for (const auto& x : transfer.crossings)
    u.demands.push_back(
        {ResourceId{static_cast<std::size_t>(x.link_class)}, flow * kAlone, x.flows});
}

void Usages::occupy(Usage& u, std::int32_t c, const DeviceUse& use, std::size_t lane) {
  const auto& seat = links_.seats[static_cast<std::size_t>(c)];
  const auto at = static_cast<std::size_t>(seat.device_class);
  if (use.memory > 0)
    u.demands.push_back({ResourceId{first_memory_.index() + at}, use.memory * kAlone, seat.ranks});
  double held = use.units * static_cast<double>(seat.ranks);
  // In its slices.
  if (communication_.topology().in_turns())
    held /= communication_.topology().state().ranks_per_device;
  if (held > 0) u.held.emplace_back(ResourceId{first_units_.index() + at}, held);
  for (int f = 0; f < kKernelFamilies; ++f) {
    const Slowdown& slows = use.slows[static_cast<std::size_t>(f)];
    if (slows.of_kernel > 1)
      u.held.emplace_back(at_once(seat.device_class, lane, f, false), 1 - 1 / slows.of_kernel);
    if (slows.of_transfer > 1)
      u.demands.push_back({at_once(seat.device_class, lane, f, true),
                           kAlone * slows.of_transfer / most_slowdown(c, f)});
  }
}

std::int32_t Usages::collective(const Instruction& i, const std::vector<std::int64_t>& group,
                                const std::vector<int>& members, Bytes bytes, Seconds& work) {
  work = Seconds{0};
  // Measured with as many ranks at work: what they share is in the figure.
  if (communication_.measured_together()) return -1;
  bytes = communication_.travelling(program_, i, bytes, group);
  const auto moving = communication_.moving(i.collective, bytes, group, i.multiprocessors > 0);
  work = moving.time;
  if (!(moving.time.count > 0)) return -1;
  Usage u;
  const auto c = static_cast<std::int32_t>(members[0]);
  cross(u, kind_of(i, c), c, moving.rate.count);
  for (const int m : members)
    occupy(u, m,
           collective_use(i, group, bytes,
                          links_.ranks.classes[static_cast<std::size_t>(m)].representative,
                          communication_),
           lane_of(i, false));
  return keep(std::move(u));
}

std::int32_t Usages::send(const Instruction& i, std::int64_t rank, std::int64_t peer, Bytes bytes,
                          Seconds& work) {
  work = Seconds{0};
  if (communication_.measured_together()) return -1;
  const auto moving = communication_.moving(bytes, rank, peer);
  work = moving.time;
  if (!(moving.time.count > 0)) return -1;
  Usage u;
  const int from = links_.ranks.of_rank[static_cast<std::size_t>(rank)],
            to = links_.ranks.of_rank[static_cast<std::size_t>(peer)];
  cross(u, kind_of(i, from), from, moving.rate.count);
  occupy(u, from, message_use(rank, peer, bytes, rank, communication_), lane_of(i, false));
  if (to != from)
    occupy(u, to, message_use(rank, peer, bytes, peer, communication_), lane_of(i, true));
  return keep(std::move(u));
}

std::int32_t Usages::copy(const Instruction& i, std::int64_t rank, Bytes bytes, Seconds time) {
  if (!(time.count > 0)) return -1;
  const int c = links_.ranks.of_rank[static_cast<std::size_t>(rank)];
  Usage u;
  cross(u, kind_of(i, c), c, static_cast<double>(bytes.count) / time.count);
  return u.demands.empty() ? -1 : keep(std::move(u));
}

std::string Usages::resource_name(ResourceId r) const {
  if (r >= first_at_once_)
    return (r.index() - first_at_once_.index()) % 2 == 0 ? "transfers at once" : "kernels at once";
  if (r >= first_memory_) return "memory";
  if (r >= first_units_) return "multiprocessors";
  const auto& l = links_.links[r.index()];
  const std::string one = communication_.topology().link_name(l.representative);
  return l.count == 1 ? one : fmt::format("{} and {} like it", one, l.count - 1);
}

StepGraph::StepGraph(std::size_t classes, std::size_t streams,
                     const std::vector<std::size_t>& slots)
    : streams_(streams), classes_(classes), hosts_(classes) {
  for (std::size_t c = 0; c < classes; ++c) {
    classes_[c].last_on.resize(streams);
    classes_[c].made_by.resize(slots[c]);
  }
}

void StepGraph::launch(int rank_class, const Instance& x, std::int32_t task) {
  Host& h = hosts_[static_cast<std::size_t>(rank_class)];
  if (h.task < 0 && !x.host_waits) {
    h.at += x.launch;
    tasks_.not_before(task, h.at);
    return;
  }
  if (x.host_waits || x.launch > 0) {
    const std::int32_t next = tasks_.add({x.launch, 0, -1, h.task < 0 ? h.at : 0});
    if (h.task >= 0) tasks_.order(h.task, next, Precedence::end_to_start);
    const Class& c = classes_[static_cast<std::size_t>(rank_class)];
    const std::int32_t kernel = c.last_on[kComputeStream].node;
    if (x.host_waits) {
      std::set<std::int32_t> nodes{kernel};
      for (const auto slot : x.waits) {
        const Place p = c.made_by[slot];
        if (p.node >= 0 && p.part + 1 == c.nodes[static_cast<std::size_t>(p.node)].parts)
          nodes.insert(p.node);
      }
      for (const std::int32_t node : nodes) {
        if (node >= 0)
          tasks_.order(c.nodes[static_cast<std::size_t>(node)].task, next,
                       Precedence::end_to_start);
      }
    }
    h.task = next;
  }
  tasks_.order(h.task, task, Precedence::end_to_start);
}

/// Has it ended when those have that `ended` names?
bool StepGraph::over(const Class& c, Place place, const std::vector<std::int32_t>& ended) const {
  return place.node < 0 ||
         ended[c.nodes[static_cast<std::size_t>(place.node)].stream] >= place.node;
}

void StepGraph::begin_node(Class& c) {
  ended_.assign(streams_, -1);
  waits_.clear();
  c.ended.resize((c.nodes.size() + 1) * streams_);
}

void StepGraph::wait(Place place) {
  if (place.node < 0) return;
  for (Place& known : waits_) {
    if (known.node == place.node) {
      known.part = std::max(known.part, place.part);
      return;
    }
  }
  waits_.push_back(place);
}

/// Orders the node after what it waits for.
void StepGraph::end_node(int rank_class, const Node& node) {
  Class& c = classes_[static_cast<std::size_t>(rank_class)];
  const auto whole = [&](Place p) {
    return p.part + 1 == c.nodes[static_cast<std::size_t>(p.node)].parts;
  };
  for (const Place p : waits_) {
    if (!whole(p)) continue;
    const std::int32_t* before = &c.ended[static_cast<std::size_t>(p.node) * streams_];
    for (std::size_t s = 0; s < streams_; ++s) ended_[s] = std::max(ended_[s], before[s]);
  }
  for (const Place p : waits_) {
    const Node& other = c.nodes[static_cast<std::size_t>(p.node)];
    if (whole(p)) {
      if (other.task != node.task) tasks_.order(other.task, node.task, Precedence::end_to_start);
    } else if (!over(c, p, ended_)) {
      cuts_.push_back({rank_class, other.first + p.part});
    }
  }
  std::copy(ended_.begin(), ended_.end(),
            c.ended.begin() + static_cast<std::ptrdiff_t>(c.nodes.size() * streams_));
  c.nodes.push_back(node);
  c.instances += node.parts;
}

/// What the task waits for on its own class, and what it makes.
void StepGraph::follow(int rank_class, const Instance& x, std::int32_t task) {
  Class& c = classes_[static_cast<std::size_t>(rank_class)];
  launch(rank_class, x, task);
  begin_node(c);
  wait(c.last_on[x.stream]);
  if (x.after_compute) wait(c.last_on[kComputeStream]);
  for (const std::size_t s : x.waits) wait(c.made_by[s]);
  const Place place{static_cast<std::int32_t>(c.nodes.size()), 0};
  end_node(rank_class, {task, c.instances, 1, x.task.fixed + x.task.work, x.stream});
  c.ended[static_cast<std::size_t>(place.node) * streams_ + x.stream] = place.node;
  c.last_on[x.stream] = place;
  for (const std::size_t s : x.marks) c.made_by[s] = place;
}

bool StepGraph::joins(int rank_class, std::int64_t launch) const {
  return hosts_[static_cast<std::size_t>(rank_class)].task < 0 || launch <= 0;
}

std::int32_t StepGraph::joinable(int rank_class, const Run& run) const {
  const Class& c = classes_[static_cast<std::size_t>(rank_class)];
  if (!joins(rank_class, run.launch)) return 0;
  const auto place = [&](const Link& l) {
    return l.slot >= 0 ? c.made_by[static_cast<std::size_t>(l.slot)] : c.last_on[l.stream];
  };
  std::vector<std::int32_t> ended(streams_, -1);
  std::size_t k = 0;
  for (; k < run.waits.size() && run.waits[k].part == 0; ++k) {
    const Place p = place(run.waits[k]);
    if (p.node < 0 || p.part + 1 != c.nodes[static_cast<std::size_t>(p.node)].parts) continue;
    const std::int32_t* before = &c.ended[static_cast<std::size_t>(p.node) * streams_];
    for (std::size_t s = 0; s < streams_; ++s) ended[s] = std::max(ended[s], before[s]);
  }
  for (; k < run.waits.size(); ++k) {
    if (!over(c, place(run.waits[k]), ended)) return run.waits[k].part;
  }
  return run.parts;
}

void StepGraph::run(int rank_class, const Run& run) {
  Class& c = classes_[static_cast<std::size_t>(rank_class)];
  Host& h = hosts_[static_cast<std::size_t>(rank_class)];
  Task t;
  t.chain = run.chain;
  t.earliest = h.task < 0 ? h.at : 0;
  const std::int32_t task = tasks_.add(t);
  if (h.task < 0) {
    h.at += run.launch;
  } else {
    tasks_.order(h.task, task, Precedence::end_to_start);
  }
  begin_node(c);
  for (const Link& l : run.waits) {
    if (l.part > 0) break;
    wait(l.slot >= 0 ? c.made_by[static_cast<std::size_t>(l.slot)] : c.last_on[l.stream]);
  }
  const auto node = static_cast<std::int32_t>(c.nodes.size());
  end_node(rank_class, {task, c.instances, run.parts, -1, run.stream});
  for (const Link& l : run.makes) {
    if (l.slot >= 0) {
      c.made_by[static_cast<std::size_t>(l.slot)] = {node, l.part};
    } else {
      c.last_on[l.stream] = {node, l.part};
      c.ended[static_cast<std::size_t>(node) * streams_ + l.stream] = node;
    }
  }
}

void StepGraph::step(int c, const Instance& x) { follow(c, x, tasks_.add(x.task)); }

void StepGraph::meet(int c, const Instance& x, const MeetingKey& key) {
  const auto [it, fresh] = meetings_.try_emplace(key, 0);
  if (fresh) it->second = tasks_.add(x.task);
  follow(c, x, it->second);
}

void StepGraph::send(int c, const Instance& x, std::uint64_t message) {
  const std::int32_t task = tasks_.add(x.task);
  sends_[message] = task;
  follow(c, x, task);
}

void StepGraph::receive(int c, const Instance& x, std::uint64_t message) {
  const std::int32_t task = tasks_.add(x.task);
  receives_.push_back({task, message});
  follow(c, x, task);
  if (!x.host_joins) return;
  Host& h = hosts_[static_cast<std::size_t>(c)];
  const std::int32_t there = tasks_.add({0, 0, -1, h.task < 0 ? h.at : 0});
  if (h.task >= 0) tasks_.order(h.task, there, Precedence::end_to_start);
  tasks_.order(task, there, Precedence::end_to_start);
  const Class& mine = classes_[static_cast<std::size_t>(c)];
  if (const std::int32_t kernel = mine.last_on[kComputeStream].node; kernel >= 0)
    tasks_.order(mine.nodes[static_cast<std::size_t>(kernel)].task, there,
                 Precedence::end_to_start);
  h.task = there;
}

StepGraph::Played StepGraph::play(Sharing& sharing, const std::vector<Usage>& usages) {
  for (const Receive& r : receives_) {
    const auto it = sends_.find(r.message);
    PARTITA_ASSERT(it != sends_.end(), "a receive without its send");
    tasks_.order(it->second, r.task, Precedence::start_to_start);
    tasks_.order(it->second, r.task, Precedence::end_to_end);
  }
  receives_.clear();
  const Contention::Result result = tasks_.play(sharing, usages);
  Played played;
  played.events = result.events;
  // Losses and stretched parts by task.
  auto stretched = result.stretched;
  std::sort(stretched.begin(), stretched.end(), [](const auto& a, const auto& b) {
    return std::tie(a.task, a.part) < std::tie(b.task, b.part);
  });
  const auto of_task = [](const auto& list, std::int32_t task) {
    return std::lower_bound(list.begin(), list.end(), task,
                            [](const auto& x, std::int32_t t) { return x.task < t; });
  };
  for (const Class& c : classes_) {
    auto& times = played.stretched.emplace_back();
    auto& losses = played.losses.emplace_back();
    for (const Node& n : c.nodes) {
      const auto t = static_cast<std::size_t>(n.task);
      if (n.parts == 1 && n.alone >= 0) {
        if (const std::int64_t took = result.end[t] - result.start[t]; took != n.alone)
          times.push_back({n.first, took});
      }
      for (auto at = of_task(stretched, n.task); at != stretched.end() && at->task == n.task; ++at)
        times.push_back({n.first + at->part, at->ticks});
      for (auto at = of_task(result.losses, n.task);
           at != result.losses.end() && at->task == n.task; ++at)
        losses.push_back({n.first + at->part, 0, at->resource, at->ticks});
    }
  }
  return played;
}

}  // namespace partita
