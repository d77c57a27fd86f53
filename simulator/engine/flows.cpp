#include "simulator/engine/flows.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <map>
#include <numeric>
#include <unordered_map>

#include "base/error.h"
#include "base/hash.h"
#include "simulator/engine/agenda.h"

namespace partita {
namespace {

/// Messages under way. The owner begins them and is told of each one's end.
class Moves {
 public:
  explicit Moves(const std::vector<double>& capacity, const std::vector<double>& background = {}) {
    for (const double c : capacity) sharing_.add(c);
    for (std::size_t l = 0; l < background.size(); ++l) {
      const Demand on{ResourceId{l}};
      if (background[l] > 0) own(sharing_.start({&on, 1}, 1, background[l]), kOthers);
    }
  }

  struct Message {
    const std::vector<Demand>* demands = nullptr;
    double weight = 1;
    std::int64_t bytes = 0;
    std::int64_t tag = 0;
  };

  /// At `start` >= now; its bytes move after `latency`.
  void begin(std::int64_t start, std::int64_t latency, const Message& message) {
    if (unused_.empty()) {
      unused_.push_back(static_cast<std::int32_t>(moving_.size()));
      moving_.emplace_back();
    }
    const std::int32_t id = unused_.back();
    unused_.pop_back();
    Moving& m = moving_[static_cast<std::size_t>(id)];
    m.message = message;
    m.left = static_cast<double>(message.bytes);
    m.rate = 0;
    m.activity = {};
    ++m.stamp;
    ++under_way_;
    agenda_.add(start + latency, {id, m.stamp});
  }
  /// Tells the owner of `tag` at `time`.
  void remind(std::int64_t time, std::int64_t tag) {
    agenda_.add(time, {-1 - static_cast<std::int32_t>(reminders_.size()), 0}),
        reminders_.push_back(tag);
  }

  /// Plays until nothing moves. `ended(tag, time)` may begin more, at that time or later;
  /// `reminded(tag, time)` likewise.
  template <class Ended, class Reminded>
  void run(Ended ended, Reminded reminded) {
    std::vector<Event> events;
    while (!agenda_.empty()) {
      now_ = agenda_.next();
      // What ends may begin what arrives at once: one instant, and one solution for it.
      while (!agenda_.empty() && agenda_.next() == now_) {
        agenda_.take(events);
        for (const Event& e : events) {
          if (e.id < 0) {
            reminded(reminders_[static_cast<std::size_t>(-1 - e.id)], now_);
            continue;
          }
          Moving& m = moving_[static_cast<std::size_t>(e.id)];
          if (m.stamp != e.stamp) continue;  // its end has moved
          if (!m.activity.valid() && m.message.bytes > 0 && !m.message.demands->empty()) {
            m.activity = sharing_.start(*m.message.demands, m.message.weight);
            own(m.activity, e.id);
            m.since = now_;
            continue;
          }
          if (m.activity.valid()) sharing_.stop(m.activity);
          ++m.stamp;
          --under_way_;
          unused_.push_back(e.id);
          ended(m.message.tag, now_);
        }
      }
      for (const ActivityId a : sharing_.solve()) {
        if (owner_[a.index()] == kOthers) continue;
        Moving& m = moving_[static_cast<std::size_t>(owner_[a.index()])];
        m.left = std::max(0.0, m.left - m.rate * (static_cast<double>(now_ - m.since) * 1e-12));
        m.since = now_;
        m.rate = sharing_.rate(a);
        ++m.stamp;
        if (m.rate > 0)
          agenda_.add(now_ + to_ticks(Seconds{m.left / m.rate}).count,
                      {owner_[a.index()], m.stamp});
      }
    }
    if (under_way_ > 0) {
      throw InputError("network", fmt::format("{} messages need a failed link (capacity 0) and "
                                              "never end; give it a capacity or route around it",
                                              under_way_));
    }
  }

 private:
  static constexpr std::int32_t kOthers = -1;  ///< owner of what is not ours

  void own(ActivityId activity, std::int32_t id) {
    if (owner_.size() <= activity.index()) owner_.resize(activity.index() + 1, kOthers);
    owner_[activity.index()] = id;
  }

  struct Moving {
    Message message;
    ActivityId activity;
    double left = 0, rate = 0;
    std::int64_t since = 0;
    std::int32_t stamp = 0;
  };
  struct Event {
    std::int32_t id = 0, stamp = 0;
  };

  Sharing sharing_;
  Agenda<Event> agenda_;
  std::vector<Moving> moving_;
  std::vector<std::int32_t> unused_, owner_;
  std::vector<std::int64_t> reminders_;
  std::int64_t now_ = 0, under_way_ = 0;
};

struct Hash {
  std::uint64_t a = 0, b = 0;
  friend bool operator==(const Hash&, const Hash&) = default;
  friend auto operator<=>(const Hash&, const Hash&) = default;
};
void add(Hash& h, std::uint64_t x) {
  h.a = mix(h.a, x);
  h.b = mix(h.b ^ 0x2545f4914f6cdd1dull, x);
}
/// Order does not matter: for multisets.
void join(Hash& h, const Hash& x) {
  h.a += mix(x.a, 1);
  h.b += mix(x.b, 2);
}

/// Colours of members and links: equal ones behave alike.
struct Colours {
  std::vector<std::int32_t> member, link;
  std::int32_t members = 0, links = 0;
};

std::int32_t number(const std::vector<Hash>& hashes, std::vector<std::int32_t>& colours) {
  std::vector<Hash> all = hashes;
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  for (std::size_t k = 0; k < hashes.size(); ++k)
    colours[k] = static_cast<std::int32_t>(std::lower_bound(all.begin(), all.end(), hashes[k]) -
                                           all.begin());
  return static_cast<std::int32_t>(all.size());
}

Hash signature(const NetworkTraffic& t, const Colours& c, std::size_t beat,
               const TrafficMessage& m) {
  Hash h;
  const NetworkRoute& route = t.routes[static_cast<std::size_t>(m.route)];
  add(h, beat);
  add(h, static_cast<std::uint64_t>(c.member[static_cast<std::size_t>(m.from)]));
  add(h, static_cast<std::uint64_t>(c.member[static_cast<std::size_t>(m.to)]));
  add(h, static_cast<std::uint64_t>(m.bytes.count));
  add(h, m.reduces ? 1 : 0);
  add(h, static_cast<std::uint64_t>(route.latency.count));
  add(h, std::bit_cast<std::uint64_t>(route.weight));
  for (const std::int32_t l : route.links)
    add(h, static_cast<std::uint64_t>(c.link[static_cast<std::size_t>(l)]));
  return h;
}

Hash signature(const Colours& c, std::size_t beat, const TrafficMeeting& m) {
  Hash h;
  add(h, beat);
  add(h, static_cast<std::uint64_t>(m.bytes.count));
  add(h, static_cast<std::uint64_t>(m.latency.count));
  const auto several = [&](const std::vector<std::int32_t>& who,
                           const std::vector<std::int32_t>& colour) {
    Hash sum;
    for (const std::int32_t x : who)
      join(sum, {static_cast<std::uint64_t>(colour[static_cast<std::size_t>(x)]), 4});
    add(h, sum.a);
    add(h, sum.b);
  };
  several(m.from, c.member);
  several(m.to, c.member);
  several(m.links, c.link);
  return h;
}

/// Coarsest stable partition of members and links together (colour refinement).
Colours colours_of(const NetworkTraffic& t) {
  Colours c;
  c.member.assign(static_cast<std::size_t>(t.members), 0);
  c.link.assign(t.capacity.size(), 0);
  std::vector<Hash> members(c.member.size()), links(c.link.size());
  for (std::size_t l = 0; l < links.size(); ++l) {
    add(links[l], std::bit_cast<std::uint64_t>(t.capacity[l]));
    if (!t.background.empty()) add(links[l], std::bit_cast<std::uint64_t>(t.background[l]));
  }
  c.members = t.members > 0 ? 1 : 0;
  c.links = number(links, c.link);
  for (;;) {
    for (std::size_t m = 0; m < members.size(); ++m)
      members[m] = {static_cast<std::uint64_t>(c.member[m]), 0};
    for (std::size_t l = 0; l < links.size(); ++l)
      links[l] = {static_cast<std::uint64_t>(c.link[l]), 0};
    for (std::size_t b = 0; b < t.beats.size(); ++b) {
      for (const TrafficMessage& m : t.beats[b].messages) {
        Hash h = signature(t, c, b, m);
        add(h, 1);
        join(members[static_cast<std::size_t>(m.from)], h);
        add(h, 2);
        join(members[static_cast<std::size_t>(m.to)], h);
        for (const std::int32_t l : t.routes[static_cast<std::size_t>(m.route)].links)
          add(h, 3), join(links[static_cast<std::size_t>(l)], h);
      }
      for (const TrafficMeeting& m : t.beats[b].meetings) {
        Hash h = signature(c, b, m);
        add(h, 1);
        for (const std::int32_t x : m.from) join(members[static_cast<std::size_t>(x)], h);
        add(h, 2);
        for (const std::int32_t x : m.to) join(members[static_cast<std::size_t>(x)], h);
        add(h, 3);
        for (const std::int32_t l : m.links) join(links[static_cast<std::size_t>(l)], h);
      }
    }
    // Old colours stay apart: they lead the sums only by chance, so they are mixed in last.
    for (std::size_t m = 0; m < members.size(); ++m)
      add(members[m], static_cast<std::uint64_t>(c.member[m]));
    for (std::size_t l = 0; l < links.size(); ++l)
      add(links[l], static_cast<std::uint64_t>(c.link[l]));
    const std::int32_t before = c.members + c.links;
    c.members = number(members, c.member);
    c.links = number(links, c.link);
    if (c.members + c.links == before) return c;
  }
}

/// Messages, or meetings of messages, of one beat that behave alike.
struct MessageClass {
  struct End {
    std::int32_t members = 0;  ///< a class
    std::int64_t of_one = 0;   ///< messages that one of its members sends, or receives
  };
  std::vector<End> from, to;
  std::int64_t count = 0;
  std::int64_t latency = 0, bytes = 0, reduce = 0;
  double weight = 1;
  std::vector<Demand> demands;
};

}  // namespace

Played play(const NetworkTraffic& t, const PlayOptions& options) {
  Colours c;
  if (options.folded) {
    c = colours_of(t);
  } else {
    c.member.resize(static_cast<std::size_t>(t.members));
    c.link.resize(t.capacity.size());
    std::iota(c.member.begin(), c.member.end(), 0);
    std::iota(c.link.begin(), c.link.end(), 0);
    c.members = t.members;
    c.links = static_cast<std::int32_t>(c.link.size());
  }
  const auto classes = static_cast<std::size_t>(c.members);
  std::vector<std::int64_t> size(classes, 0), links(static_cast<std::size_t>(c.links), 0);
  for (const std::int32_t m : c.member) ++size[static_cast<std::size_t>(m)];
  std::vector<double> capacity(static_cast<std::size_t>(c.links), 0), background;
  if (!t.background.empty()) background.resize(capacity.size());
  for (std::size_t l = 0; l < c.link.size(); ++l) {
    ++links[static_cast<std::size_t>(c.link[l])];
    capacity[static_cast<std::size_t>(c.link[l])] = t.capacity[l];
    if (!background.empty()) background[static_cast<std::size_t>(c.link[l])] = t.background[l];
  }

  // Beat by beat: the messages that each class sends, and how many of a step concern one member.
  std::vector<std::vector<MessageClass>> beats(t.beats.size());
  std::vector<std::vector<std::vector<std::int32_t>>> outgoing(t.beats.size());
  std::vector<std::vector<std::int64_t>> expected(t.beats.size());
  const auto ends = [&](const std::vector<std::int32_t>& members) {
    std::map<std::int32_t, std::int64_t> by_class;
    for (const std::int32_t m : members) ++by_class[c.member[static_cast<std::size_t>(m)]];
    std::vector<MessageClass::End> all;
    for (const auto& [k, n] : by_class) all.push_back({k, n});
    return all;
  };
  const auto demand = [&](MessageClass& m, std::int32_t link) {
    const ResourceId r{static_cast<std::size_t>(c.link[static_cast<std::size_t>(link)])};
    const auto same = std::find_if(m.demands.begin(), m.demands.end(),
                                   [&](const Demand& d) { return d.resource == r; });
    if (same != m.demands.end())
      ++same->count;
    else
      m.demands.push_back({r});
  };
  for (std::size_t b = 0; b < t.beats.size(); ++b) {
    std::map<Hash, std::size_t> known;
    for (const TrafficMessage& m : t.beats[b].messages) {
      const NetworkRoute& route = t.routes[static_cast<std::size_t>(m.route)];
      std::size_t at = beats[b].size();
      if (options.folded) at = known.try_emplace(signature(t, c, b, m), at).first->second;
      if (at == beats[b].size()) {
        MessageClass one;
        one.from = {{c.member[static_cast<std::size_t>(m.from)], 1}};
        one.to = {{c.member[static_cast<std::size_t>(m.to)], 1}};
        one.latency = route.latency.count;
        one.bytes = m.bytes.count;
        one.weight = route.weight;
        if (m.reduces && (t.reduce_latency > 0 || t.reduce_per_byte > 0))
          one.reduce = to_ticks(Seconds{t.reduce_latency +
                                        static_cast<double>(m.bytes.count) * t.reduce_per_byte})
                           .count;
        for (const std::int32_t l : route.links) demand(one, l);
        beats[b].push_back(std::move(one));
      }
      ++beats[b][at].count;
    }
    known.clear();
    for (const TrafficMeeting& m : t.beats[b].meetings) {
      std::size_t at = beats[b].size();
      if (options.folded) at = known.try_emplace(signature(c, b, m), at).first->second;
      if (at == beats[b].size()) {
        MessageClass one;
        one.from = ends(m.from);
        one.to = ends(m.to);
        one.latency = m.latency.count;
        one.bytes = m.bytes.count;
        for (const std::int32_t l : m.links) demand(one, l);
        beats[b].push_back(std::move(one));
      }
      ++beats[b][at].count;
    }
    outgoing[b].resize(classes);
    expected[b].assign(classes, 0);
    for (std::size_t k = 0; k < beats[b].size(); ++k) {
      MessageClass& m = beats[b][k];
      for (auto* side : {&m.from, &m.to}) {
        for (MessageClass::End& e : *side) {
          const auto at = static_cast<std::size_t>(e.members);
          e.of_one = e.of_one * m.count / size[at];
          expected[b][at] += e.of_one;
          if (side == &m.from) outgoing[b][at].push_back(static_cast<std::int32_t>(k));
        }
      }
      for (Demand& d : m.demands) {
        d.count = d.count * m.count / links[d.resource.index()];
        PARTITA_ASSERT(d.count > 0, "messages of a class load some of its links only");
      }
    }
  }
  std::vector<std::int64_t> first_step{0};  // by beat
  for (const TrafficBeat& b : t.beats) first_step.push_back(first_step.back() + b.repeat);
  const std::int64_t steps = first_step.back();

  Played result;
  result.classes = c.members;
  std::vector<std::int64_t> step(classes, 0), end(classes, 0);
  std::vector<std::size_t> beat(classes, 0);
  std::vector<std::int32_t> done(classes * static_cast<std::size_t>(steps), 0);
  Moves moves(capacity, background);
  // A message's tag: its beat, its number there, the step.
  std::vector<std::int64_t> first_message{0};
  for (const auto& b : beats)
    first_message.push_back(first_message.back() + static_cast<std::int64_t>(b.size()));
  const std::int64_t kinds = std::max<std::int64_t>(1, first_message.back());
  std::vector<const MessageClass*> message_of;
  for (const auto& b : beats) {
    for (const MessageClass& m : b) message_of.push_back(&m);
  }
  // Of a meeting: classes that send and have not yet come to its step. None comes to the next
  // before all have: the meeting ends in between.
  std::vector<std::int32_t> missing(message_of.size());
  for (std::size_t k = 0; k < message_of.size(); ++k)
    missing[k] = static_cast<std::int32_t>(message_of[k]->from.size());

  const auto enter = [&](std::size_t k, std::int64_t now) {
    for (; step[k] < steps; ++step[k]) {
      while (step[k] >= first_step[beat[k] + 1]) ++beat[k];
      const std::size_t b = beat[k];
      for (const std::int32_t m : outgoing[b][k]) {
        const MessageClass& one = beats[b][static_cast<std::size_t>(m)];
        if (one.from.size() > 1) {
          auto& others = missing[static_cast<std::size_t>(first_message[b] + m)];
          if (--others > 0) continue;
          others = static_cast<std::int32_t>(one.from.size());
        }
        ++result.messages;
        moves.begin(now, one.latency,
                    {&one.demands, one.weight, one.bytes, step[k] * kinds + first_message[b] + m});
      }
      if (done[k * static_cast<std::size_t>(steps) + static_cast<std::size_t>(step[k])] <
          expected[b][k])
        return;
    }
    end[k] = std::max(end[k], now);
  };
  const auto count = [&](const std::vector<MessageClass::End>& ends_there, std::int64_t s,
                         std::int64_t now) {
    for (const MessageClass::End& e : ends_there) {
      const auto at = static_cast<std::size_t>(e.members);
      auto& d = done[at * static_cast<std::size_t>(steps) + static_cast<std::size_t>(s)];
      d += static_cast<std::int32_t>(e.of_one);
      if (step[at] != s || d < expected[beat[at]][at]) continue;
      ++step[at];
      enter(at, now);
    }
  };
  for (std::size_t k = 0; k < classes; ++k) enter(k, 0);
  moves.run(
      [&](std::int64_t tag, std::int64_t now) {
        const MessageClass& m = *message_of[static_cast<std::size_t>(tag % kinds)];
        count(m.from, tag / kinds, now);
        if (m.reduce > 0)
          moves.remind(now + m.reduce, tag);
        else
          count(m.to, tag / kinds, now);
      },
      [&](std::int64_t tag, std::int64_t now) {
        count(message_of[static_cast<std::size_t>(tag % kinds)]->to, tag / kinds, now);
      });
  for (std::size_t k = 0; k < classes; ++k) {
    PARTITA_ASSERT(step[k] == steps, fmt::format("class {} stands in step {}", k, step[k]));
    result.end = std::max(result.end, Ticks{end[k]});
  }
  for (const std::int32_t m : c.member)
    result.member_end.emplace_back(end[static_cast<std::size_t>(m)]);
  result.link_bytes.assign(t.capacity.size(), 0);
  for (const TrafficBeat& b : t.beats) {
    for (const TrafficMessage& m : b.messages) {
      for (const std::int32_t l : t.routes[static_cast<std::size_t>(m.route)].links)
        result.link_bytes[static_cast<std::size_t>(l)] +=
            static_cast<double>(m.bytes.count) * static_cast<double>(b.repeat);
    }
    for (const TrafficMeeting& m : b.meetings) {
      for (const std::int32_t l : m.links)
        result.link_bytes[static_cast<std::size_t>(l)] +=
            static_cast<double>(m.bytes.count) * static_cast<double>(b.repeat);
    }
  }
  return result;
}

NetworkTraffic lay(const Rhythm& rhythm, const EvenCut& cut, TrafficNetwork network) {
  NetworkTraffic t;
  t.members = rhythm.members;
  std::unordered_map<std::int64_t, std::int32_t> routes;  // by pair of ends
  const auto route = [&](const Message& m) {
    const auto [it, fresh] =
        routes.try_emplace(std::int64_t{m.from} * (t.members + rhythm.switches) + m.to,
                           static_cast<std::int32_t>(t.routes.size()));
    if (fresh) t.routes.push_back(network.route(m.from, m.to));
    return it->second;
  };
  if (!rhythm.beats.empty()) routes.reserve(2 * rhythm.beats[0].messages.size());
  const auto add = [&](const std::vector<Message>& messages, std::int64_t repeat) {
    TrafficBeat beat;
    beat.repeat = repeat;
    beat.messages.reserve(messages.size());
    bool switches = false;
    for (const Message& m : messages) {
      const Bytes bytes = cut.of(m);
      if (bytes.count == 0) continue;
      if (m.from < t.members && m.to < t.members)
        beat.messages.push_back({m.from, m.to, route(m), bytes, m.reduces});
      else
        switches = true;
    }
    if (switches) {
      for (const Meeting& meeting : meetings(messages, t.members)) {
        TrafficMeeting one;
        one.bytes = cut.of(meeting.in[0]);
        if (one.bytes.count == 0) continue;
        for (const auto* way : {&meeting.in, &meeting.out}) {
          Ticks slowest{0};
          for (const Message& m : *way) {
            const NetworkRoute& r = t.routes[static_cast<std::size_t>(route(m))];
            one.links.insert(one.links.end(), r.links.begin(), r.links.end());
            slowest = std::max(slowest, r.latency);
            (way == &meeting.in ? one.from : one.to).push_back(way == &meeting.in ? m.from : m.to);
          }
          one.latency += slowest;
        }
        beat.meetings.push_back(std::move(one));
      }
    }
    if (!beat.messages.empty() || !beat.meetings.empty()) t.beats.push_back(std::move(beat));
  };
  for (const Beat& b : rhythm.beats) {
    if (b.repeat == 1 || cut.equal()) {
      add(b.messages, b.repeat);
      continue;
    }
    std::vector<Message> moved(b.messages.size());
    for (std::int32_t k = 0; k < b.repeat; ++k) {
      for (std::size_t m = 0; m < moved.size(); ++m) moved[m] = b.at(b.messages[m], k);
      add(moved, 1);
    }
  }
  t.capacity = std::move(network.capacity);
  return t;
}

NetworkTraffic traffic_of(const Rhythm& rhythm, const EvenCut& cut,
                          const std::vector<std::int64_t>& ranks, const Topology& topology) {
  const std::int32_t n = rhythm.members;
  PARTITA_ASSERT(static_cast<std::size_t>(n) == ranks.size(),
                 fmt::format("{} ranks for {} members", ranks.size(), n));
  TrafficNetwork network;
  std::vector<LinkId> ids;
  std::unordered_map<std::int32_t, std::int32_t> links;  // the topology's -> ours
  const auto device = [&](std::int32_t member) {
    return DeviceId{static_cast<std::size_t>(ranks[static_cast<std::size_t>(member)])};
  };
  const auto take = [&](NetworkRoute& r, LinkId l) {
    const Link link = topology.link(l);
    const auto [at, fresh] = links.try_emplace(l.value, static_cast<std::int32_t>(ids.size()));
    if (fresh) ids.push_back(l), network.capacity.push_back(link.bandwidth.count);
    r.links.push_back(at->second);
    r.latency += to_ticks(link.latency);
  };
  // A unit's switch: where the way from its first member to its second first meets an NVSwitch.
  const auto switch_of = [&](std::int32_t s) {
    const std::int32_t unit = n / rhythm.switches, first = s * unit;
    for (const LinkId l : topology.route(device(first), device(first + 1))) {
      const std::int32_t v = topology.link(l).to;
      if (topology.vertex_kind(v) == VertexKind::nvswitch) return v;
    }
    throw InputError("algorithm", fmt::format("nvls needs an NVSwitch between {} and {}, there is "
                                              "none; use another algorithm",
                                              topology.device_name(device(first)),
                                              topology.device_name(device(first + 1))));
  };
  std::vector<std::int32_t> switches;
  for (std::int32_t s = 0; s < rhythm.switches; ++s) switches.push_back(switch_of(s));
  const auto to_switch = [&](std::int32_t member, std::int32_t s, bool up) {
    constexpr int kHopper = 90;
    const DeviceId d = device(member);
    if (topology.device(d).compute_capability < kHopper) {
      throw InputError("algorithm",
                       fmt::format("nvls needs switches that add, which came with compute "
                                   "capability 90; {} is {} of {}: use another algorithm",
                                   topology.device_name(d), topology.device(d).name,
                                   topology.device(d).compute_capability));
    }
    // The part of the way to or from another member of the unit that lies on this side of it.
    const std::int32_t at = switches[static_cast<std::size_t>(s)], unit = n / rhythm.switches;
    const DeviceId peer = device(member == s * unit ? member + 1 : s * unit);
    NetworkRoute r;
    bool here = up, met = false;
    for (const LinkId l : up ? topology.route(d, peer) : topology.route(peer, d)) {
      if (here) take(r, l);
      if (topology.link(l).to == at) here = !up, met = true;
      if (met && up) return r;
    }
    if (met) return r;
    throw InputError(
        "algorithm",
        fmt::format("nvls needs {} between {} and {}, which do not meet there; give "
                    "levels whose units share a switch, or use another algorithm",
                    topology.vertex_name(at), topology.device_name(d), topology.device_name(peer)));
  };
  network.route = [&](std::int32_t from, std::int32_t to) {
    if (to >= n) return to_switch(from, to - n, true);
    if (from >= n) return to_switch(to, from - n, false);
    NetworkRoute r;
    for (const LinkId l : topology.route(device(from), device(to))) take(r, l);
    return r;
  };
  // Routes are asked for while the traffic is laid; links are known afterwards.
  NetworkTraffic t = lay(rhythm, cut, {{}, network.route});
  t.capacity = std::move(network.capacity);
  const auto& busy = topology.state().background;
  for (std::size_t l = 0; l < ids.size(); ++l) {
    const auto it = busy.find(ids[l]);
    if (it == busy.end()) continue;
    t.background.resize(ids.size(), 0);
    t.background[l] = it->second.count;
  }
  t.link_ids = std::move(ids);
  return t;
}

std::vector<Ticks> ends_of(const std::vector<double>& capacity,
                           const std::vector<NetworkRoute>& routes,
                           const std::vector<TimedMessage>& messages) {
  Moves moves(capacity);
  std::vector<std::vector<Demand>> demands(routes.size());
  for (std::size_t r = 0; r < routes.size(); ++r) {
    for (const std::int32_t l : routes[r].links)
      demands[r].push_back({ResourceId{static_cast<std::size_t>(l)}});
  }
  for (std::size_t k = 0; k < messages.size(); ++k) {
    const auto r = static_cast<std::size_t>(messages[k].route);
    moves.begin(
        messages[k].start.count, routes[r].latency.count,
        {&demands[r], routes[r].weight, messages[k].bytes.count, static_cast<std::int64_t>(k)});
  }
  std::vector<Ticks> ends(messages.size());
  moves.run(
      [&](std::int64_t tag, std::int64_t now) { ends[static_cast<std::size_t>(tag)] = Ticks{now}; },
      [](std::int64_t, std::int64_t) {});
  return ends;
}

}  // namespace partita
