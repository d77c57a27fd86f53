#include "simulator/cost/closed_form.h"

#include <algorithm>
#include <bit>
#include <optional>

namespace partita {
namespace {

ClosedForm both(Ticks t) { return {t, t}; }
ClosedForm operator+(const ClosedForm& a, const ClosedForm& b) {
  return {a.least + b.least, *a.most + *b.most};
}
bool power_of_two(std::int32_t n) { return std::has_single_bit(static_cast<std::uint32_t>(n)); }
std::int32_t log2_up(std::int32_t n) {
  return static_cast<std::int32_t>(std::bit_width(static_cast<std::uint32_t>(n - 1)));
}

/// The formulas' terms for one collective.
struct Terms {
  std::int32_t n;
  Bytes payload;
  const std::vector<PortLevel>& levels;
  Rhythm rhythm;
  EvenCut cut;

  /// A message's time where its port carries `sharing` of its size at once; nothing is not sent.
  Ticks hop(std::size_t level, Bytes bytes, std::int32_t sharing = 1) const {
    const PortLevel& l = levels[level];
    if (bytes.count == 0) return Ticks{0};
    return l.latency + to_ticks(bytes / BytesPerSecond{l.rate.count / sharing});
  }
  Ticks hop(Bytes bytes) const { return hop(0, bytes); }
  /// Members of a unit of the level.
  std::int32_t within(std::size_t level) const {
    std::int32_t all = 1;
    for (std::size_t l = 0; l <= level; ++l) all *= levels[l].members;
    return all;
  }
  /// The largest piece of a level's rings: the chunks of place 0 there and below.
  Bytes piece(std::size_t level) const {
    const std::int32_t w = within(level);
    return cut.of({0, 0, 0, n / w, false, w});
  }
  /// One round of rings on each level from `lowest` on.
  Ticks rings(std::size_t lowest = 0) const {
    Ticks t{0};
    for (std::size_t l = lowest; l < levels.size(); ++l)
      t += (levels[l].members - 1) * hop(l, piece(l));
    return t;
  }
  /// Chunks [0, 1), [0, 2), [0, 4), ... of halves.
  Ticks halves() const {
    Ticks t{0};
    for (std::int32_t d = 1; d < n; d *= 2) t += hop(cut.of({0, 0, 0, d}));
    return t;
  }
  /// Up two binary trees and down again, over a power of two of units: on all steps but the two at
  /// the root a port carries the messages of two children.
  Ticks double_trees(std::size_t level, std::int32_t units, Bytes chunk) const {
    if (units == 1) return Ticks{0};
    const std::int64_t inner = log2_up(units) - 1;
    return 2 * (inner * hop(level, chunk, 2) + hop(level, chunk));
  }
  /// Every member's `bytes` cross its port in equal parts; parts that differ by a byte end one
  /// after the other, each up to a picosecond late.
  ClosedForm at_once(std::int32_t parts, Bytes largest, Bytes bytes) const {
    if (bytes.count == parts * largest.count) return both(hop(0, largest, parts));
    const Ticks t = hop(0, bytes);
    return {t, t + Ticks{1}};
  }
  /// What all members of a unit send goes up once and their sums down, or the other way round.
  ClosedForm meetings() const {
    const std::int32_t unit = levels[0].members;
    if (unit == 1) return both(Ticks{0});
    return at_once(unit, cut.of({0, 0, 0, rhythm.chunks / unit, false, stride}), payload);
  }
  /// Do all members come to their switches in one instant? Not after steps of uneven parts.
  bool meets_at_once(CollectiveKind kind) const {
    return levels.size() == 1 || cut.equal() || kind == CollectiveKind::reduce_scatter;
  }
  std::int32_t stride = 1;  ///< between the chunks of a member's place in its unit

  /// What any algorithm with these messages takes at least: its busiest port.
  Ticks busiest_port() const {
    const auto ports = static_cast<std::size_t>(2 * n);
    std::vector<std::int64_t> bytes(levels.size() * ports, 0);
    for (const Beat& b : rhythm.beats) {
      const std::int32_t turns = cut.equal() ? 1 : b.repeat;  // else all carry the same
      for (std::int32_t k = 0; k < turns; ++k) {
        for (const Message& still : b.messages) {
          const Message m = b.at(still, k);
          std::size_t level = 0;
          if (m.from < n && m.to < n) {
            for (std::int32_t unit = levels[0].members; m.from / unit != m.to / unit;)
              unit *= levels[++level].members;
          }
          const std::int64_t there = b.repeat / turns * cut.of(m).count;
          if (m.from < n) bytes[level * ports + static_cast<std::size_t>(m.from)] += there;
          if (m.to < n) bytes[level * ports + static_cast<std::size_t>(n + m.to)] += there;
        }
      }
    }
    Ticks longest{0};
    for (std::size_t p = 0; p < bytes.size(); ++p)
      longest = std::max(longest, hop(p / ports, Bytes{bytes[p]}));
    return longest;
  }
};

std::optional<ClosedForm> formula(CollectiveKind kind, Algorithm algorithm, const Terms& t) {
  const std::int32_t n = t.n;
  const std::size_t outer = 1;
  switch (algorithm) {
    case Algorithm::ring:
      switch (kind) {
        case CollectiveKind::all_reduce:
          return both(2 * t.rings());
        case CollectiveKind::all_gather:
        case CollectiveKind::reduce_scatter:
          return both(t.rings());
        default:  // broadcast, reduce: from one to the next
          return both((n - 1) * t.hop(t.payload));
      }
    case Algorithm::hierarchical:
      if (kind == CollectiveKind::all_reduce) return both(2 * t.rings());
      if (kind != CollectiveKind::all_to_all) return both(t.rings());
      [[fallthrough]];
    case Algorithm::pairwise: {
      // A message of a level: n / (its members) chunks.
      Ticks sum{0};
      for (std::size_t l = 0; l < t.levels.size(); ++l) {
        const std::int32_t members = t.levels[l].members;
        sum += (members - 1) * t.hop(l, Bytes{n / members * (t.payload.count / n)});
      }
      if (t.payload.count % n == 0) return both(sum);
      return std::nullopt;
    }
    case Algorithm::tree:
      // Towards the root early messages of some share its port with late ones of others.
      if (kind == CollectiveKind::broadcast) return both(log2_up(n) * t.hop(t.payload));
      if (!power_of_two(n)) return std::nullopt;
      return both((kind == CollectiveKind::all_reduce ? 2 : 1) * log2_up(n) * t.hop(t.payload));
    case Algorithm::halving:
      if (!power_of_two(n)) return std::nullopt;
      return both((kind == CollectiveKind::all_reduce ? 2 : 1) * t.halves());
    case Algorithm::double_tree:
      if (!power_of_two(n)) return std::nullopt;
      return both(t.double_trees(0, n, t.cut.of({0, 0, 0})));
    case Algorithm::nvls:
      if (!t.meets_at_once(kind)) return std::nullopt;
      if (kind != CollectiveKind::all_reduce) return t.meetings() + both(t.rings(outer));
      if (t.levels[0].members == n) return both(t.hop(t.payload));
      return t.meetings() + both(2 * t.rings(outer)) + t.meetings();
    case Algorithm::nvls_tree: {
      const std::int32_t units = n / t.levels[0].members;
      if (t.levels.size() > 2 || !power_of_two(units) || !t.meets_at_once(kind))
        return std::nullopt;
      return t.meetings() + both(t.double_trees(t.levels.size() - 1, units, t.cut.of({0, 0, 0}))) +
             t.meetings();
    }
    case Algorithm::direct: {
      const Bytes largest = t.cut.of({0, 0, 0});
      switch (kind) {
        case CollectiveKind::shift:
          return both(t.hop(t.payload));
        case CollectiveKind::scatter: {
          // The root sends to one after the other, but all others send to it at once.
          Ticks sum{0};
          for (std::int32_t r = 1; r < n; ++r) sum += t.hop(t.cut.of({0, r, r}));
          return both(sum);
        }
        case CollectiveKind::gather:
          return t.at_once(n - 1, t.cut.of({1, 0, 1}), t.payload - largest);
        default:  // all-to-all, halo exchange: all others' largest chunks into one port
          return both(t.hop(0, largest, n - 1));
      }
    }
  }
  return std::nullopt;
}

}  // namespace

ClosedForm closed_form(CollectiveKind kind, Algorithm algorithm, Bytes payload,
                       const std::vector<PortLevel>& all) {
  std::vector<PortLevel> levels = all;
  // Units of one member are no level to an algorithm that asks for none.
  if (!levelled(algorithm))
    std::erase_if(levels, [](const PortLevel& l) { return l.members == 1; });
  std::vector<std::int32_t> members;
  std::int32_t n = 1;
  for (const PortLevel& l : levels) members.push_back(l.members), n *= l.members;
  const Rhythm r = rhythm(kind, algorithm, n, levelled(algorithm) ? members : std::vector{n});
  if (n == 1 || payload.count == 0) return both(Ticks{0});
  const Terms terms{n,
                    payload,
                    levels,
                    r,
                    EvenCut(kind, r, payload),
                    algorithm == Algorithm::nvls_tree ? 1 : levels[0].members};
  if (levels.size() == 1 || levelled(algorithm)) {
    if (const auto form = formula(kind, algorithm, terms)) return *form;
  }
  return {terms.busiest_port(), std::nullopt};
}

}  // namespace partita
