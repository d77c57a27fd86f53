#include "simulator/program/expansion.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "simulator/program/routing.h"

namespace partita {
namespace {

/// Members that hold a power-of-two group's data in recursive halving: with n = p + r the first 2 r
/// members pair up and the even ones act for both (Thakur, Rabenseifner, Gropp, IJHPCA 19(1),
/// 2005).
struct Paired {
  std::int32_t power = 1, extra = 0;
  explicit Paired(std::int32_t n) {
    while (power * 2 <= n) power *= 2;
    extra = n - power;
  }
  std::int32_t member(std::int32_t actor) const {
    return actor < extra ? 2 * actor : actor + extra;
  }
};

/// Members r, r + stride, ... of each block of n * stride members form a ring. Its k-th piece,
/// which ends or begins at its k-th member, is all chunks of those places: what the rings at
/// smaller strides have left to it, or will bring to the others.
void ring(Rhythm& e, std::int32_t n, std::int32_t stride, bool reduces) {
  if (n == 1) return;
  Beat b;
  b.repeat = n - 1;
  b.turn = -1;
  b.cycle = n;
  b.unit = stride;
  const std::int32_t count = e.members / (n * stride);
  for (std::int32_t r = 0; r < e.members; ++r) {
    const std::int32_t place = r / stride % n;
    const std::int32_t next = r + ((place + 1) % n - place) * stride;
    const std::int32_t piece = reduces ? (place + n - 1) % n : place;
    b.messages.push_back(
        {r, next, r % stride + piece * stride, count, reduces, count == 1 ? 1 : n * stride});
  }
  e.beats.push_back(std::move(b));
}

/// In rings within each unit, then among equal places of the next level's units, and so on: of what
/// a unit sums only 1 / (its members) leaves a member for the next level. From level `lowest` on.
void reduce_scatter_in_rings(Rhythm& e, const std::vector<std::int32_t>& levels,
                             std::size_t lowest = 0) {
  std::int32_t stride = 1;
  for (std::size_t l = 0; l < levels.size(); stride *= levels[l++]) {
    if (l >= lowest) ring(e, levels[l], stride, true);
  }
}
/// The other way: outermost level first.
void all_gather_in_rings(Rhythm& e, const std::vector<std::int32_t>& levels,
                         std::size_t lowest = 0) {
  std::int32_t stride = e.members;
  for (std::size_t l = levels.size(); l-- > lowest;) {
    stride /= levels[l];
    ring(e, levels[l], stride, false);
  }
}

/// Level by level, innermost first, each member sends to the others of its unit, one after the
/// other, what it holds for their places: the chunks of all members that it has met so far, for all
/// members at that place of their units.
void all_to_all_in_levels(Rhythm& e, const std::vector<std::int32_t>& levels) {
  const std::int32_t n = e.members;
  std::int32_t met = 1;
  for (const std::int32_t l : levels) {
    const std::int32_t next = met * l;
    for (std::int32_t s = 1; s < l; ++s) {
      auto& step = e.beats.emplace_back().messages;
      for (std::int32_t r = 0; r < n; ++r) {
        const std::int32_t place = r / met % l, theirs = (place + s) % l;
        Message m{r, r + (theirs - place) * met, r / met * met * n + r % met + theirs * met,
                  n / next, false};
        if (m.count > 1) m.stride = next;
        if (met > 1) m.rows = met, m.row_stride = n;
        step.push_back(m);
      }
    }
    met = next;
  }
}

void all_to_all_at_once(Rhythm& e) {
  const std::int32_t n = e.members;
  if (n == 1) return;
  auto& step = e.beats.emplace_back().messages;
  for (std::int32_t r = 0; r < n; ++r) {
    for (std::int32_t to = 0; to < n; ++to) {
      if (to != r) step.push_back({r, to, r * n + to, 1, false});
    }
  }
}

/// Chunks of place q among `unit` members to a switch: all of `unit` strided sets, or of as many
/// contiguous ones (`contiguous`).
Message of_place(std::int32_t from, std::int32_t to, std::int32_t q, const Rhythm& e,
                 std::int32_t unit, bool contiguous, bool reduces) {
  const std::int32_t count = e.chunks / unit;
  if (contiguous || count == 1) return {from, to, q * count, count, reduces};
  return {from, to, q, count, reduces, unit};
}

/// NVLink SHARP: every member's chunks of place q go up once, their sum down to member q.
void reduce_scatter_in_switches(Rhythm& e, std::int32_t unit, bool contiguous = false) {
  if (unit == 1) return;
  e.switches = e.members / unit;
  auto& step = e.beats.emplace_back().messages;
  for (std::int32_t r = 0; r < e.members; ++r) {
    const std::int32_t at = e.members + r / unit;
    for (std::int32_t q = 0; q < unit; ++q)
      step.push_back(of_place(r, at, q, e, unit, contiguous, true));
    step.push_back(of_place(at, r, r % unit, e, unit, contiguous, false));
  }
}
/// Each member's chunks go up once and down to all, itself too: a multicast excepts nobody.
void all_gather_in_switches(Rhythm& e, std::int32_t unit, bool contiguous = false) {
  if (unit == 1) return;
  e.switches = e.members / unit;
  auto& step = e.beats.emplace_back().messages;
  for (std::int32_t r = 0; r < e.members; ++r) {
    const std::int32_t at = e.members + r / unit;
    step.push_back(of_place(r, at, r % unit, e, unit, contiguous, false));
    for (std::int32_t q = 0; q < unit; ++q)
      step.push_back(of_place(at, r, q, e, unit, contiguous, false));
  }
}

/// Two binary trees over the members in order, one chunk each: who is a leaf of the one is an inner
/// member of the other (Sanders, Speck, Traff, Parallel Computing 35(12), 2009; as NCCL numbers
/// them). With units of several members as many pairs of trees over the units, one of each place.
void double_trees(Rhythm& e, std::int32_t unit = 1) {
  const std::int32_t n = e.members / unit;
  e.chunks = 2 * unit;
  const auto parent = binary_tree_parents(n);
  std::vector<std::int32_t> height(static_cast<std::size_t>(n), 0), depth = height;
  // In-order trees are log n deep: so many rounds settle the heights.
  for (bool moved = true; moved;) {
    moved = false;
    for (std::int32_t r = 1; r < n; ++r) {
      const auto at = static_cast<std::size_t>(r), up = static_cast<std::size_t>(parent[at]);
      if (height[up] <= height[at]) height[up] = height[at] + 1, moved = true;
      if (depth[at] != depth[up] + 1) depth[at] = depth[up] + 1, moved = true;
    }
  }
  const auto step = [&](const std::vector<std::int32_t>& order, std::int32_t at, bool up) {
    std::vector<Message> one;  // between units
    for (const std::int32_t chunk : {0, 1}) {
      for (std::int32_t r = 1; r < n; ++r) {
        if (order[static_cast<std::size_t>(r)] != at) continue;
        std::int32_t from = r, to = parent[static_cast<std::size_t>(r)];
        if (chunk == 1) from = in_other_tree(from, n), to = in_other_tree(to, n);
        if (!up) std::swap(from, to);
        const auto same = std::find_if(
            one.begin(), one.end(), [&](const Message& m) { return m.from == from && m.to == to; });
        if (same != one.end())
          same->count = 2;  // both trees over one link: one message
        else
          one.push_back({from, to, chunk, 1, up});
      }
    }
    if (one.empty()) return;
    Beat b;
    for (std::int32_t place = 0; place < unit; ++place) {
      for (const Message& m : one)
        b.messages.push_back(
            {m.from * unit + place, m.to * unit + place, 2 * place + m.first, m.count, m.reduces});
    }
    e.beats.push_back(std::move(b));
  };
  for (std::int32_t h = 0; h < height[0]; ++h) step(height, h, true);
  const std::int32_t deepest = *std::max_element(depth.begin(), depth.end());
  for (std::int32_t d = 1; d <= deepest; ++d) step(depth, d, false);
}

std::vector<std::int32_t> prime_factors(std::int32_t n) {
  std::vector<std::int32_t> all;
  for (std::int32_t p = 2; p <= n; ++p) {
    for (; n % p == 0; n /= p) all.push_back(p);
  }
  return all;
}

/// Binomial trees: distances halve from the root outwards, or double towards it.
void tree_broadcast(Rhythm& e, std::int32_t n, std::int32_t chunks) {
  std::int32_t distance = 1;
  while (distance < n) distance *= 2;
  for (distance /= 2; distance >= 1; distance /= 2) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t r = 0; r + distance < n; r += 2 * distance)
      step.push_back({r, r + distance, 0, chunks, false});
  }
}
void tree_reduce(Rhythm& e, std::int32_t n, std::int32_t chunks) {
  for (std::int32_t distance = 1; distance < n; distance *= 2) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t r = 0; r + distance < n; r += 2 * distance)
      step.push_back({r + distance, r, 0, chunks, true});
  }
}

void halving_all_reduce(Rhythm& e, std::int32_t n) {
  const Paired p(n);
  e.chunks = p.power;
  if (p.extra > 0) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t i = 0; i < p.extra; ++i) step.push_back({2 * i + 1, 2 * i, 0, p.power, true});
  }
  // Actor a keeps the half of its range that its bit of `distance` names.
  for (std::int32_t distance = p.power / 2; distance >= 1; distance /= 2) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t a = 0; a < p.power; ++a) {
      const std::int32_t other = a ^ distance;
      step.push_back({p.member(a), p.member(other), other / distance * distance, distance, true});
    }
  }
  for (std::int32_t distance = 1; distance < p.power; distance *= 2) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t a = 0; a < p.power; ++a) {
      const std::int32_t other = a ^ distance;
      step.push_back({p.member(a), p.member(other), a / distance * distance, distance, false});
    }
  }
  if (p.extra > 0) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t i = 0; i < p.extra; ++i)
      step.push_back({2 * i, 2 * i + 1, 0, p.power, false});
  }
}

/// Chunks of the actors [first, first + count): each acts for its own, a paired one for its
/// partner's too.
Message of_actors(std::int32_t from, std::int32_t to, const Paired& p, std::int32_t n,
                  std::int32_t first, std::int32_t count, bool reduces) {
  const auto chunk = [&](std::int32_t a) { return a == p.power ? n : p.member(a); };
  return {from, to, chunk(first), chunk(first + count) - chunk(first), reduces};
}
void halving_reduce_scatter(Rhythm& e, std::int32_t n) {
  const Paired p(n);
  if (p.extra > 0) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t i = 0; i < p.extra; ++i) step.push_back({2 * i + 1, 2 * i, 0, n, true});
  }
  for (std::int32_t distance = p.power / 2; distance >= 1; distance /= 2) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t a = 0; a < p.power; ++a) {
      const std::int32_t other = a ^ distance;
      step.push_back(of_actors(p.member(a), p.member(other), p, n, other / distance * distance,
                               distance, true));
    }
  }
  if (p.extra > 0) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t i = 0; i < p.extra; ++i)
      step.push_back({2 * i, 2 * i + 1, 2 * i + 1, 1, false});
  }
}
/// Recursive doubling.
void doubling_all_gather(Rhythm& e, std::int32_t n) {
  const Paired p(n);
  if (p.extra > 0) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t i = 0; i < p.extra; ++i)
      step.push_back({2 * i + 1, 2 * i, 2 * i + 1, 1, false});
  }
  for (std::int32_t distance = 1; distance < p.power; distance *= 2) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t a = 0; a < p.power; ++a) {
      step.push_back(of_actors(p.member(a), p.member(a ^ distance), p, n, a / distance * distance,
                               distance, false));
    }
  }
  if (p.extra > 0) {
    auto& step = e.beats.emplace_back().messages;
    for (std::int32_t i = 0; i < p.extra; ++i) step.push_back({2 * i, 2 * i + 1, 0, n, false});
  }
}

}  // namespace

std::vector<std::int32_t> binary_tree_parents(std::int32_t n) {
  std::vector<std::int32_t> parent(static_cast<std::size_t>(n), -1);
  for (std::int32_t r = 1; r < n; ++r) {
    const std::int32_t bit = r & -r;
    const std::int32_t up = (r ^ bit) | (bit << 1);
    parent[static_cast<std::size_t>(r)] = up < n ? up : r ^ bit;
  }
  return parent;
}

std::int32_t in_other_tree(std::int32_t member, std::int32_t n) {
  return n % 2 == 0 ? n - 1 - member : (member + 1) % n;
}

std::string_view name(Algorithm a) {
  constexpr std::array<std::string_view, 9> names{"ring",         "tree",     "halving",
                                                  "direct",       "pairwise", "double tree",
                                                  "hierarchical", "nvls",     "nvls tree"};
  return names[static_cast<std::size_t>(a)];
}

Algorithm default_algorithm(CollectiveKind kind) {
  for (const AlgorithmRow& row : kAlgorithms) {
    if (row.kind == kind) return row.algorithm;
  }
  throw InternalError(fmt::format("{} has no algorithm", name(kind)));
}

Message Beat::at(const Message& m, std::int32_t repetition) const {
  if (cycle == 1) return m;
  const std::int32_t place = m.first / unit % cycle;
  const std::int64_t there = place + std::int64_t{repetition} * turn;
  Message moved = m;
  moved.first += (static_cast<std::int32_t>((there % cycle + cycle) % cycle) - place) * unit;
  return moved;
}

std::int64_t Rhythm::steps() const {
  std::int64_t n = 0;
  for (const Beat& b : beats) n += b.repeat;
  return n;
}

Expansion expand(CollectiveKind kind, Algorithm algorithm, std::int32_t n,
                 const std::vector<std::int32_t>& levels) {
  const Rhythm r = rhythm(kind, algorithm, n, levels);
  Expansion e;
  e.members = r.members;
  e.switches = r.switches;
  e.chunks = r.chunks;
  for (const Beat& b : r.beats) {
    for (std::int32_t k = 0; k < b.repeat; ++k) {
      auto& step = e.steps.emplace_back();
      step.reserve(b.messages.size());
      for (const Message& m : b.messages) step.push_back(b.at(m, k));
    }
  }
  return e;
}

Rhythm rhythm(CollectiveKind kind, Algorithm algorithm, std::int32_t n,
              const std::vector<std::int32_t>& levels) {
  const bool known = std::any_of(kAlgorithms.begin(), kAlgorithms.end(), [&](const auto& row) {
    return row.kind == kind && row.algorithm == algorithm;
  });
  PARTITA_ASSERT(known && n >= 1, fmt::format("{} by {} over {}", name(kind), name(algorithm), n));
  Rhythm e;
  e.members = n;
  e.chunks = n;
  std::vector<std::int32_t> units{n};
  if (levelled(algorithm)) {
    if (!levels.empty())
      units = levels;
    else if (algorithm == Algorithm::hierarchical)
      units = prime_factors(n);
    std::int64_t product = 1;
    for (const std::int32_t l : units) product *= l;
    PARTITA_ASSERT(product == n, fmt::format("levels of {} members for {}", product, n));
  }
  switch (kind) {
    case CollectiveKind::all_reduce:
      if (algorithm == Algorithm::ring || algorithm == Algorithm::hierarchical) {
        reduce_scatter_in_rings(e, units);
        all_gather_in_rings(e, units);
      } else if (algorithm == Algorithm::tree) {
        e.chunks = 1;
        tree_reduce(e, n, 1);
        tree_broadcast(e, n, 1);
      } else if (algorithm == Algorithm::double_tree) {
        double_trees(e);
      } else if (algorithm == Algorithm::nvls && units[0] == n) {
        // All chunks are summed and copied in one pass.
        e.chunks = 1;
        if (n == 1) break;
        e.switches = 1;
        auto& step = e.beats.emplace_back().messages;
        for (std::int32_t r = 0; r < n; ++r)
          step.push_back({r, n, 0, 1, true}), step.push_back({n, r, 0, 1, false});
      } else if (algorithm == Algorithm::nvls) {
        reduce_scatter_in_switches(e, units[0]);
        reduce_scatter_in_rings(e, units, 1);
        all_gather_in_rings(e, units, 1);
        all_gather_in_switches(e, units[0]);
      } else if (algorithm == Algorithm::nvls_tree) {
        e.chunks = 2 * units[0];
        reduce_scatter_in_switches(e, units[0], true);
        double_trees(e, units[0]);
        all_gather_in_switches(e, units[0], true);
      } else {
        halving_all_reduce(e, n);
      }
      break;
    case CollectiveKind::all_gather:
      if (algorithm == Algorithm::halving) {
        doubling_all_gather(e, n);
      } else if (algorithm == Algorithm::nvls) {
        all_gather_in_rings(e, units, 1);
        all_gather_in_switches(e, units[0]);
      } else {
        all_gather_in_rings(e, units);
      }
      break;
    case CollectiveKind::reduce_scatter:
      if (algorithm == Algorithm::halving) {
        halving_reduce_scatter(e, n);
      } else if (algorithm == Algorithm::nvls) {
        reduce_scatter_in_switches(e, units[0]);
        reduce_scatter_in_rings(e, units, 1);
      } else {
        reduce_scatter_in_rings(e, units);
      }
      break;
    case CollectiveKind::all_to_all:
      e.chunks = n * n;
      if (algorithm == Algorithm::direct)
        all_to_all_at_once(e);
      else
        all_to_all_in_levels(e, units);
      break;
    case CollectiveKind::halo_exchange:
      e.chunks = n * n;
      all_to_all_at_once(e);
      break;
    case CollectiveKind::shift:
      if (n > 1) e.beats.emplace_back();
      for (std::int32_t r = 0; n > 1 && r < n; ++r)
        e.beats[0].messages.push_back({r, (r + 1) % n, r, 1, false});
      break;
    case CollectiveKind::broadcast:
      e.chunks = 1;
      if (algorithm == Algorithm::tree) {
        tree_broadcast(e, n, 1);
      } else {
        for (std::int32_t r = 0; r + 1 < n; ++r) e.beats.push_back({{{r, r + 1, 0, 1, false}}});
      }
      break;
    case CollectiveKind::reduce:
      e.chunks = 1;
      if (algorithm == Algorithm::tree) {
        tree_reduce(e, n, 1);
      } else {
        for (std::int32_t r = n; r-- > 1;) e.beats.push_back({{{r, r - 1, 0, 1, true}}});
      }
      break;
    case CollectiveKind::scatter:
      for (std::int32_t r = 1; r < n; ++r) e.beats.push_back({{{0, r, r, 1, false}}});
      break;
    case CollectiveKind::gather:
      for (std::int32_t r = 1; r < n; ++r) e.beats.push_back({{{r, 0, r, 1, false}}});
      break;
  }
  return e;
}

std::vector<Meeting> meetings(const std::vector<Message>& step, std::int32_t members) {
  std::vector<Meeting> all;
  std::map<std::pair<std::int32_t, std::int32_t>, std::size_t> known;  // by switch and chunk
  for (const Message& m : step) {
    if (m.from < members && m.to < members) continue;
    const auto at = known.try_emplace({std::max(m.from, m.to), m.first}, all.size()).first->second;
    if (at == all.size()) all.emplace_back();
    (m.to >= members ? all[at].in : all[at].out).push_back(m);
  }
  return all;
}

Expansion on_members(const Expansion& e) {
  if (e.switches == 0) return e;
  Expansion on;
  on.members = e.members;
  on.chunks = e.chunks;
  for (const auto& step : e.steps) {
    std::vector<Message> up, down;
    for (const Message& m : step) {
      if (m.from < e.members && m.to < e.members) up.push_back(m);
    }
    for (const Meeting& meeting : meetings(step, e.members)) {
      const std::int32_t who = meeting.out.size() == 1 ? meeting.out[0].to : meeting.in[0].from;
      for (Message m : meeting.in) {
        m.to = who;
        if (m.from != who) up.push_back(m);
      }
      for (Message m : meeting.out) {
        m.from = who;
        if (m.to != who) down.push_back(m);
      }
    }
    for (auto* part : {&up, &down}) {
      if (!part->empty()) on.steps.push_back(std::move(*part));
    }
  }
  return on;
}

EvenCut::EvenCut(CollectiveKind kind, const Rhythm& rhythm, Bytes payload) {
  switch (kind) {
    case CollectiveKind::all_reduce:
    case CollectiveKind::broadcast:
    case CollectiveKind::reduce:
      parts_ = rhythm.chunks;
      break;
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::scatter:
    case CollectiveKind::gather:
    case CollectiveKind::all_to_all:
    case CollectiveKind::halo_exchange:
      parts_ = rhythm.members;
      break;
    case CollectiveKind::shift:
      break;
  }
  least_ = payload.count / parts_;
  rest_ = payload.count % parts_;
}

Bytes EvenCut::of(const Message& m) const {
  // Of chunk a * n + b part b, of a shift's chunks the one part there is.
  const std::int64_t first = m.first % parts_;
  const std::int64_t larger =
      first < rest_ ? std::min<std::int64_t>(m.count, ceil_div(rest_ - first, m.stride)) : 0;
  return Bytes{m.rows * (m.count * least_ + larger)};
}

namespace {

/// Rows travel as counts (8 B), keys (24 B a row) and values: sends, and exchanges of what every
/// member wants of the others; a reduce-scatter's members know the rows.
void routed_traffic(const Program& p, const Instruction& i, int stage, std::int64_t calls,
                    std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t>& bytes) {
  constexpr std::int64_t kCount = 8, kKey = 24;
  const auto features = [&](BufferId id, std::int64_t rank) {
    const Buffer& b = p.buffer(id);
    return local_indices(p.mesh, b.layout.dims[3], b.shape[3].extent, p.place_of(rank));
  };
  const BufferId from = i.reads[0];
  const std::int64_t width = p.buffer(from).width();
  for (std::int64_t rank = 0; rank < p.ranks(); ++rank) {
    if (p.stage_of(rank) != stage) continue;
    if (i.kind == Kind::send) {
      if (!p.holds(from, rank)) continue;
      const std::int64_t rows = routed_rows(p, from, rank);
      bytes[{rank, p.peer_of(i, rank)}] +=
          calls * (kCount + rows * kKey + local_bytes(p, from, rank).count);
      continue;
    }
    const BufferId to = i.writes[0];
    const auto mine = features(from, rank);
    const auto values = [&](std::int64_t member) {
      std::vector<std::int64_t> shared;
      const auto theirs = features(to, member);
      std::set_intersection(mine.begin(), mine.end(), theirs.begin(), theirs.end(),
                            std::back_inserter(shared));
      const std::int64_t rows = shared.empty() ? 0 : common_rows(p, from, rank, to, member);
      return std::pair{rows, rows * static_cast<std::int64_t>(shared.size())};
    };
    const auto group = p.group(i, rank);
    const auto n = static_cast<std::int32_t>(group.size());
    if (i.collective != CollectiveKind::reduce_scatter) {
      for (const std::int64_t member : group) {
        if (member == rank) continue;
        const auto [rows, elements] = values(member);
        bytes[{rank, member}] += calls * (kCount + rows * kKey + elements * width);
      }
      continue;
    }
    const auto me = std::find(group.begin(), group.end(), rank) - group.begin();
    const Expansion e = expand(i.collective, default_algorithm(i.collective), n);
    for (const auto& step : e.steps) {
      for (const Message& m : step) {
        if (m.from != me) continue;
        std::int64_t elements = 0;
        for (std::int32_t k = 0; k < m.chunks(); ++k)
          elements += values(group[static_cast<std::size_t>(m.chunk(k))]).second;
        if (elements > 0)
          bytes[{rank, group[static_cast<std::size_t>(m.to)]}] += calls * elements * width;
      }
    }
  }
}

}  // namespace

std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> step_traffic(
    const Program& p, std::int64_t step_number) {
  std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> bytes;
  std::vector<std::int64_t> calls(p.blocks.size(), 0);
  for (const auto& stage : p.stages) {
    for (const BlockCall& call : stage) ++calls[call.block.index()];
  }
  const auto width = [&](BufferId id) { return p.buffer(id).width(); };
  for (std::size_t block = 0; block < p.blocks.size(); ++block) {
    if (calls[block] == 0) continue;
    for (const Instruction& i : p.blocks[block].instructions) {
      const bool sends = i.kind == Kind::send;
      if (!sends && i.kind != Kind::collective) continue;
      if ((step_number + 1) % i.every != 0) continue;
      const Buffer& first = p.buffer(i.reads[0]);
      if (first.routed && first.routing < 0) continue;
      if (first.routed && (sends || i.collective != CollectiveKind::all_reduce)) {
        routed_traffic(p, i, p.blocks[block].stage, calls[block], bytes);
        continue;
      }
      for (std::int64_t rank = 0; rank < p.ranks(); ++rank) {
        if (p.stage_of(rank) != p.blocks[block].stage) continue;
        if (sends) {
          if (const std::int64_t n = local_bytes(p, i.reads[0], rank).count; n > 0)
            bytes[{rank, p.peer_of(i, rank)}] += calls[block] * n;
          continue;
        }
        const auto group = p.group(i, rank);
        const auto n = static_cast<std::int32_t>(group.size());
        const auto me =
            static_cast<std::int32_t>(std::find(group.begin(), group.end(), rank) - group.begin());
        const Expansion e = expand(i.collective, default_algorithm(i.collective), n);
        // Elements of chunk c, all buffers of the call together.
        const auto chunk = [&](std::int32_t c) {
          std::int64_t sum = 0;
          for (std::size_t k = 0; k < i.reads.size(); ++k) {
            const BufferId from = i.reads[k], to = i.writes[k];
            const auto member = [&](std::int32_t m) { return group[static_cast<std::size_t>(m)]; };
            switch (i.collective) {
              case CollectiveKind::all_reduce:
              case CollectiveKind::broadcast:
              case CollectiveKind::reduce:
                break;
              case CollectiveKind::reduce_scatter:
              case CollectiveKind::scatter:
                sum += local_elements(p, to, member(c));
                break;
              case CollectiveKind::all_gather:
              case CollectiveKind::gather:
                sum += local_elements(p, from, member(c));
                break;
              case CollectiveKind::shift:
                sum += local_elements(p, from, member(c));
                break;
              case CollectiveKind::all_to_all:
              case CollectiveKind::halo_exchange:
                sum += common_elements(p, from, member(c / n), to, member(c % n));
                break;
            }
          }
          return sum;
        };
        std::vector<std::int64_t> even;
        if (i.collective == CollectiveKind::all_reduce ||
            i.collective == CollectiveKind::broadcast || i.collective == CollectiveKind::reduce) {
          std::int64_t total = 0;
          for (std::size_t k = 0; k < i.reads.size(); ++k) {
            total += std::max(local_elements(p, i.reads[k], group[0]),
                              local_elements(p, i.writes[k], group[0]));
          }
          even = even_chunks(total, e.chunks);
        }
        for (const auto& step : e.steps) {
          for (const Message& m : step) {
            if (m.from != me) continue;
            std::int64_t elements = 0;
            for (std::int32_t k = 0; k < m.chunks(); ++k) {
              const std::int32_t c = m.chunk(k);
              elements += even.empty() ? chunk(c)
                                       : even[static_cast<std::size_t>(c) + 1] -
                                             even[static_cast<std::size_t>(c)];
            }
            if (elements > 0)
              bytes[{rank, group[static_cast<std::size_t>(m.to)]}] +=
                  calls[block] * elements * width(i.reads[0]);
          }
        }
      }
    }
  }
  return bytes;
}

std::vector<std::int64_t> even_chunks(std::int64_t total, std::int32_t chunks) {
  std::vector<std::int64_t> bounds{0};
  for (std::int32_t c = 0; c < chunks; ++c) bounds.push_back(part(total, chunks, c).end);
  return bounds;
}

}  // namespace partita
