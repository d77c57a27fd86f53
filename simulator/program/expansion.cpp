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

/// Members r, r + stride, ... of each block of n * stride members form a ring. Piece k of the range
/// that starts at `base(r)` is summed at the ring's k-th member.
template <class Base>
void ring(Rhythm& e, std::int32_t members, std::int32_t n, std::int32_t stride, std::int32_t size,
          bool reduces, Base base) {
  if (n == 1) return;
  Beat b;
  b.repeat = n - 1;
  b.turn = -1;
  b.cycle = n;
  for (std::int32_t r = 0; r < members; ++r) {
    const std::int32_t place = r / stride % n;
    const std::int32_t next = r + ((place + 1) % n - place) * stride;
    const std::int32_t piece = reduces ? (place + n - 1) % n : place;
    b.messages.push_back({r, next, base(r) + piece * size, size, reduces});
  }
  e.beats.push_back(std::move(b));
}
void ring_reduce_scatter(Rhythm& e, std::int32_t n) {
  ring(e, n, n, 1, 1, true, [](std::int32_t) { return 0; });
}
void ring_all_gather(Rhythm& e, std::int32_t n) {
  ring(e, n, n, 1, 1, false, [](std::int32_t) { return 0; });
}

/// Reduce-scatter in rings within each unit, then of what is left among equal places of the next
/// level's units, and so on; all-gathers back. Only 1 / (members of a unit) of the payload leaves
/// it.
void hierarchical_all_reduce(Rhythm& e, std::int32_t n, const std::vector<std::int32_t>& levels) {
  const auto base = [&](std::size_t level) {
    // What the levels below have left to a member: a part of a part of ...
    return [&, level](std::int32_t r) {
      std::int32_t first = 0, size = n;
      for (std::size_t l = 0; l < level; ++l) {
        size /= levels[l];
        first += r % levels[l] * size;
        r /= levels[l];
      }
      return first;
    };
  };
  std::int32_t stride = 1, size = n;
  for (std::size_t l = 0; l < levels.size(); ++l) {
    size /= levels[l];
    ring(e, n, levels[l], stride, size, true, base(l));
    stride *= levels[l];
  }
  for (std::size_t l = levels.size(); l-- > 0;) {
    stride /= levels[l];
    ring(e, n, levels[l], stride, size, false, base(l));
    size *= levels[l];
  }
}

/// Two binary trees over the members in order, one chunk each: who is a leaf of the one is an inner
/// member of the other (Sanders, Speck, Traff, Parallel Computing 35(12), 2009; as NCCL numbers
/// them).
void double_tree_all_reduce(Rhythm& e, std::int32_t n) {
  e.chunks = 2;
  std::vector<std::int32_t> parent(static_cast<std::size_t>(n), -1);
  for (std::int32_t r = 1; r < n; ++r) {
    const std::int32_t bit = r & -r;
    const std::int32_t up = (r ^ bit) | (bit << 1);
    parent[static_cast<std::size_t>(r)] = up < n ? up : r ^ bit;
  }
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
  const auto other = [&](std::int32_t r) { return n % 2 == 0 ? n - 1 - r : (r + 1) % n; };
  const auto step = [&](const std::vector<std::int32_t>& order, std::int32_t at, bool up) {
    Beat b;
    for (const std::int32_t chunk : {0, 1}) {
      for (std::int32_t r = 1; r < n; ++r) {
        if (order[static_cast<std::size_t>(r)] != at) continue;
        std::int32_t from = r, to = parent[static_cast<std::size_t>(r)];
        if (chunk == 1) from = other(from), to = other(to);
        if (!up) std::swap(from, to);
        const auto same = std::find_if(b.messages.begin(), b.messages.end(), [&](const Message& m) {
          return m.from == from && m.to == to;
        });
        if (same != b.messages.end())
          same->count = 2;  // both trees over one link: one message
        else
          b.messages.push_back({from, to, chunk, 1, up});
      }
    }
    if (!b.messages.empty()) e.beats.push_back(std::move(b));
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

}  // namespace

std::string_view name(Algorithm a) {
  constexpr std::array<std::string_view, 7> names{
      "ring", "tree", "halving", "direct", "pairwise", "double tree", "hierarchical"};
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
  const std::int32_t range = m.count * cycle, base = m.first / range * range;
  const std::int64_t place = (m.first - base) / m.count + std::int64_t{repetition} * turn;
  Message moved = m;
  moved.first = base + static_cast<std::int32_t>((place % cycle + cycle) % cycle) * m.count;
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
  e.chunks = n;
  switch (kind) {
    case CollectiveKind::all_reduce:
      if (algorithm == Algorithm::ring) {
        ring_reduce_scatter(e, n);
        ring_all_gather(e, n);
      } else if (algorithm == Algorithm::tree) {
        e.chunks = 1;
        tree_reduce(e, n, 1);
        tree_broadcast(e, n, 1);
      } else if (algorithm == Algorithm::double_tree) {
        double_tree_all_reduce(e, n);
      } else if (algorithm == Algorithm::hierarchical) {
        const auto units = levels.empty() ? prime_factors(n) : levels;
        std::int64_t product = 1;
        for (const std::int32_t l : units) product *= l;
        PARTITA_ASSERT(product == n, fmt::format("levels of {} members for {}", product, n));
        hierarchical_all_reduce(e, n, units);
      } else {
        halving_all_reduce(e, n);
      }
      break;
    case CollectiveKind::all_gather:
      ring_all_gather(e, n);
      break;
    case CollectiveKind::reduce_scatter:
      ring_reduce_scatter(e, n);
      break;
    case CollectiveKind::all_to_all:
      e.chunks = n * n;
      for (std::int32_t s = 1; s < n; ++s) {
        auto& step = e.beats.emplace_back().messages;
        for (std::int32_t r = 0; r < n; ++r) {
          const std::int32_t to = (r + s) % n;
          step.push_back({r, to, r * n + to, 1, false});
        }
      }
      break;
    case CollectiveKind::halo_exchange:
      e.chunks = n * n;
      if (n > 1) e.beats.emplace_back();
      for (std::int32_t r = 0; r < n; ++r) {
        for (std::int32_t to = 0; to < n; ++to) {
          if (to != r) e.beats[0].messages.push_back({r, to, r * n + to, 1, false});
        }
      }
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
        bytes[{rank, member}] += calls * (kCount + rows * kKey + elements * 4);
      }
      continue;
    }
    const auto me = std::find(group.begin(), group.end(), rank) - group.begin();
    const Expansion e = expand(i.collective, default_algorithm(i.collective), n);
    for (const auto& step : e.steps) {
      for (const Message& m : step) {
        if (m.from != me) continue;
        std::int64_t elements = 0;
        for (std::int32_t c = m.first; c < m.first + m.count; ++c)
          elements += values(group[static_cast<std::size_t>(c)]).second;
        if (elements > 0)
          bytes[{rank, group[static_cast<std::size_t>(m.to)]}] += calls * elements * 4;
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
  const auto width = [&](BufferId id) {
    const Buffer& b = p.buffer(id);
    return b.element_bytes > 0 ? std::int64_t{b.element_bytes} : storage(b.type, 1).count;
  };
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
            for (std::int32_t c = m.first; c < m.first + m.count; ++c) {
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
