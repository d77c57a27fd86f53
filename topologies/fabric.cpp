#include "topologies/fabric.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/hash.h"

namespace partita {

namespace {

bool failed(const Crossing& c, std::size_t link) {
  if (c.state == nullptr || c.state->link_speed.empty()) return false;
  const auto it = c.state->link_speed.find(LinkId{c.first_link + link});
  return it != c.state->link_speed.end() && it->second == 0;
}

bool whole(const Crossing& c, const std::vector<std::size_t>& links) {
  return std::none_of(links.begin(), links.end(), [&](std::size_t l) { return failed(c, l); });
}

PathCost cost_of(const std::vector<std::size_t>& links, const auto& fabric) {
  PathCost cost;
  for (const std::size_t l : links) cost = cost + fabric.hop(l);
  return cost;
}

/// The links of the best way (PathCost) from router to router that has no failed link: level by
/// level, first ports first. Empty if there is none.
std::vector<std::size_t> way_around(const auto& fabric, const Crossing& c) {
  struct Step {
    PathCost cost{kNoPath, 0, 0};
    std::size_t link = kNone, from = kNone;
  };
  const std::size_t start = fabric.switch_of(c.from, c.out), goal = fabric.switch_of(c.to, c.in);
  std::vector<Step> best(fabric.switch_count());
  best[start].cost = {};
  std::vector<std::size_t> level, next;
  const auto leave = [&](std::size_t router, const PathCost& cost, bool first) {
    for (const Port& p : fabric.ports(router, c)) {
      if (failed(c, p.link) || (first && !p.sends) || (p.to == goal && !p.delivers)) continue;
      const Step step{cost + fabric.hop(p.link), p.link, router};
      Step& known = best[p.to];
      if (known.cost.links == kNoPath) next.push_back(p.to);
      if (step.cost < known.cost) known = step;
    }
  };
  leave(start, {}, true);
  while (best[goal].link == kNone && !next.empty()) {
    level.swap(next);
    next.clear();
    for (const std::size_t router : level) leave(router, best[router].cost, false);
  }
  std::vector<std::size_t> links;
  if (best[goal].link == kNone) return links;
  for (std::size_t at = goal; at != start; at = best[at].from) links.push_back(best[at].link);
  std::reverse(links.begin(), links.end());
  return links;
}

PathCost around_cost(const auto& fabric, const Crossing& c) {
  if (fabric.switch_of(c.from, c.out) == fabric.switch_of(c.to, c.in)) return {};
  const auto links = way_around(fabric, c);
  return links.empty() ? PathCost{kNoPath, 0, 0} : cost_of(links, fabric);
}

/// Routers reached from `start`, or that reach it, over whole links.
std::vector<char> reached(const auto& fabric, std::size_t start, bool backward, const Crossing& c) {
  std::vector<char> seen(fabric.switch_count(), 0);
  std::vector<std::size_t> left{start};
  seen[start] = 1;
  while (!left.empty()) {
    const std::size_t router = left.back();
    left.pop_back();
    for (const Port& p : fabric.ports(router, c)) {
      if (seen[p.to] || failed(c, backward ? p.link ^ 1 : p.link)) continue;
      seen[p.to] = 1;
      left.push_back(p.to);
    }
  }
  return seen;
}

}  // namespace

std::optional<CutOff> Fabric::cut_off(std::size_t nodes, const Crossing& c) const {
  const auto find = [&](const auto& fabric) -> std::optional<CutOff> {
    const std::size_t first = fabric.switch_of(0, 0);
    const auto there = reached(fabric, first, false, c), back = reached(fabric, first, true, c);
    for (std::size_t node = 1; node < nodes; ++node) {
      const std::size_t router = fabric.switch_of(node, 0);
      if (!there[router]) return CutOff{0, node};
      if (!back[router]) return CutOff{node, 0};
    }
    return {};
  };
  if (const auto* torus = std::get_if<Torus>(&kind)) return find(*torus);
  if (const auto* fly = std::get_if<Dragonfly>(&kind)) return find(*fly);
  return {};
}

PathCost SwitchTree::link_cost(std::size_t leaf) const {
  return {1, uplink[leaf % leaves_per_unit].count / static_cast<double>(tops()),
          to_ticks(uplink_latency).count};
}

std::size_t SwitchTree::spine_of(const Crossing& c) const {
  const std::size_t up = leaf_of(c.from, c.out) * tops(), down = leaf_of(c.to, c.in) * tops();
  const auto whole = [&](std::size_t s) {
    return !failed(c, 2 * (up + s)) && !failed(c, 2 * (down + s) + 1);
  };
  // Once more than the pair needs: of two rounds neighbours' low bits differ more often than not.
  const std::uint64_t hash =
      routing.ecmp ? mix(mix(mix(routing.seed, c.first), c.last), 0) : std::uint64_t{0};
  if (c.state == nullptr || c.state->link_speed.empty()) return hash % tops();
  std::size_t left = 0;
  for (std::size_t s = 0; s < tops(); ++s) left += whole(s);
  if (left == 0) return kNone;
  std::size_t nth = hash % left;
  for (std::size_t s = 0;; ++s) {
    if (whole(s) && nth-- == 0) return s;
  }
}

PathCost SwitchTree::path_cost(const Crossing& c) const {
  const std::size_t a = leaf_of(c.from, c.out), b = leaf_of(c.to, c.in);
  if (a == b) return {};
  if (!core || spine_of(c) == kNone) return {kNoPath, 0, 0};
  return link_cost(a) + link_cost(b);
}

void SwitchTree::append_path(const Crossing& c, std::vector<LinkId>& out) const {
  const std::size_t a = leaf_of(c.from, c.out), b = leaf_of(c.to, c.in);
  if (a == b) return;
  const std::size_t spine = spine_of(c);
  out.emplace_back(c.first_link + 2 * (a * tops() + spine));
  out.emplace_back(c.first_link + 2 * (b * tops() + spine) + 1);
}

Link SwitchTree::link(std::size_t index) const {
  const std::size_t cable = index / 2;
  const auto leaf = static_cast<std::int32_t>(cable / tops());
  const auto top = static_cast<std::int32_t>(leaf_count + cable % tops());
  const BytesPerSecond rate{uplink[cable / tops() % leaves_per_unit].count /
                            static_cast<double>(tops())};
  return index % 2 == 0 ? Link{leaf, top, LinkKind::network, rate, uplink_latency}
                        : Link{top, leaf, LinkKind::network, rate, uplink_latency};
}

std::string SwitchTree::switch_name(std::size_t index) const {
  if (index >= leaf_count)
    return tops() == 1 ? "spine" : fmt::format("spine{}", index - leaf_count);
  if (leaves_per_unit == 1) return leaf_count == 1 ? "switch" : fmt::format("leaf{}", index);
  if (leaf_count == leaves_per_unit) return fmt::format("rail{}", index);
  return fmt::format("unit{}.rail{}", index / leaves_per_unit, index % leaves_per_unit);
}

std::uint64_t SwitchTree::offset_of(std::size_t node, std::size_t) const {
  // Hashing knows every pair of devices by itself.
  return routing.ecmp ? node + 1 : 0;
}

std::size_t Torus::nodes() const { return stride(sides.size()); }

std::size_t Torus::stride(std::size_t dimension) const {
  std::size_t n = 1;
  for (std::size_t d = 0; d < dimension; ++d) n *= sides[d];
  return n;
}

std::size_t Torus::first_cable(std::size_t dimension) const {
  std::size_t n = 0;
  for (std::size_t d = 0; d < dimension; ++d)
    n += sides[d] > 2 ? nodes() : sides[d] == 2 ? nodes() / 2 : 0;
  return n;
}

std::size_t Torus::next(std::size_t node, std::size_t dimension, bool up) const {
  const std::size_t step = stride(dimension), n = sides[dimension], x = node / step % n;
  return node + ((x + (up ? 1 : n - 1)) % n) * step - x * step;
}

std::size_t Torus::link_from(std::size_t node, std::size_t dimension, bool up) const {
  const std::size_t step = stride(dimension), first = first_cable(dimension);
  if (sides[dimension] == 2) {
    const std::size_t pair = node / (2 * step) * step + node % step;
    return 2 * (first + pair) + node / step % 2;
  }
  return up ? 2 * (first + node) : 2 * (first + next(node, dimension, false)) + 1;
}

std::int64_t Torus::steps(std::size_t from, std::size_t to, std::size_t dimension) const {
  const auto n = static_cast<std::int64_t>(sides[dimension]);
  const std::size_t step = stride(dimension);
  const auto up =
      (static_cast<std::int64_t>(to / step) - static_cast<std::int64_t>(from / step)) % n;
  const std::int64_t forward = up < 0 ? up + n : up;
  return 2 * forward <= n ? forward : forward - n;
}

std::size_t Torus::card(std::size_t dimension, bool up) const {
  // A side of 2 has one cable and uses one card.
  return 2 * dimension + (up || sides[dimension] == 2 ? 0 : 1);
}

std::vector<Port> Torus::ports(std::size_t router, const Crossing& c) const {
  std::vector<Port> all;
  for (std::size_t d = 0; d < sides.size(); ++d) {
    for (const bool up : {true, false}) {
      // A side of 2 has one cable.
      if (sides[d] == 1 || (sides[d] == 2 && !up)) continue;
      all.push_back({next(router, d, up), link_from(router, d, up),
                     !by_direction || card(d, up) == c.out, !by_direction || card(d, !up) == c.in});
    }
  }
  return all;
}

PathCost Torus::path_cost(const Crossing& c) const {
  if (c.around) return around_cost(*this, c);
  std::int64_t hops = 0;
  std::size_t first = kNone, last = kNone;
  for (std::size_t d = 0; d < sides.size(); ++d) {
    const std::int64_t n = steps(c.from, c.to, d);
    if (n == 0) continue;
    hops += n < 0 ? -n : n;
    if (first == kNone) first = card(d, n > 0);
    last = card(d, n < 0);
  }
  if (by_direction && (c.out != first || c.in != last)) return {kNoPath, 0, 0};
  if (c.state != nullptr && !c.state->link_speed.empty()) {
    std::vector<LinkId> links;
    append_path(c, links);
    for (const LinkId l : links) {
      if (failed(c, l.index() - c.first_link)) return {kNoPath, 0, 0};
    }
  }
  return {static_cast<std::int32_t>(hops), bandwidth.count, hops * to_ticks(latency).count};
}

void Torus::append_path(const Crossing& c, std::vector<LinkId>& out) const {
  if (c.around) {
    for (const std::size_t l : way_around(*this, c)) out.emplace_back(c.first_link + l);
    return;
  }
  std::size_t at = c.from;
  for (std::size_t d = 0; d < sides.size(); ++d) {
    const std::int64_t n = steps(c.from, c.to, d);
    for (std::int64_t k = 0; k < (n < 0 ? -n : n); ++k) {
      out.emplace_back(c.first_link + link_from(at, d, n > 0));
      at = next(at, d, n > 0);
    }
  }
}

Link Torus::link(std::size_t index) const {
  std::size_t d = 0;
  while (index / 2 >= first_cable(d + 1)) ++d;
  std::size_t low = index / 2 - first_cable(d);
  if (sides[d] == 2) low = low / stride(d) * 2 * stride(d) + low % stride(d);
  const auto a = static_cast<std::int32_t>(low), b = static_cast<std::int32_t>(next(low, d, true));
  return index % 2 == 0 ? Link{a, b, LinkKind::network, bandwidth, latency}
                        : Link{b, a, LinkKind::network, bandwidth, latency};
}

std::string Torus::switch_name(std::size_t index) const {
  std::string name = "router";
  for (std::size_t d = 0; d < sides.size(); ++d)
    name += fmt::format("{}{}", d == 0 ? "" : ".", index / stride(d) % sides[d]);
  return name;
}

std::uint64_t Torus::offset_of(std::size_t node, std::size_t origin) const {
  std::uint64_t h = 1;
  for (std::size_t d = 0; d < sides.size(); ++d) {
    const std::size_t n = sides[d];
    h = mix(h, (node / stride(d) % n + n - origin / stride(d) % n) % n);
  }
  return h;
}

std::pair<std::size_t, bool> Pairs::number(std::size_t a, std::size_t b) const {
  const std::size_t up = (b + n - a) % n;
  // Half way round both orders have the same offset: the lower one is listed first.
  const bool ahead = 2 * up < n || (2 * up == n && a < b);
  return ahead ? std::pair{(up - 1) * n + a, true} : std::pair{(n - up - 1) * n + b, false};
}

std::pair<std::size_t, std::size_t> Pairs::at(std::size_t number) const {
  const std::size_t a = number % n;
  return {a, (a + number / n + 1) % n};
}

std::size_t Dragonfly::link_count() const {
  return 2 * (groups * Pairs{routers}.count() + Pairs{groups}.count() * cables_between_groups());
}

std::size_t Dragonfly::gateway(std::size_t group, std::size_t other, std::size_t j) const {
  return (j * (groups - 1) + (other + groups - group) % groups - 1) / global_links;
}

std::size_t Dragonfly::local_link(std::size_t from, std::size_t to) const {
  const auto [pair, listed] = Pairs{routers}.number(from % routers, to % routers);
  return 2 * (from / routers * Pairs{routers}.count() + pair) + (listed ? 0 : 1);
}

std::size_t Dragonfly::global_link(std::size_t group, std::size_t other, std::size_t j) const {
  const auto [pair, listed] = Pairs{groups}.number(group, other);
  return 2 * (groups * Pairs{routers}.count() + pair * cables_between_groups() + j) +
         (listed ? 0 : 1);
}

PathCost Dragonfly::hop(std::size_t link) const {
  return link < 2 * groups * Pairs{routers}.count()
             ? PathCost{1, local_bandwidth.count, to_ticks(local_latency).count}
             : PathCost{1, global_bandwidth.count, to_ticks(global_latency).count};
}

std::vector<Port> Dragonfly::ports(std::size_t router, const Crossing&) const {
  std::vector<Port> all;
  const std::size_t group = router / routers, own = router % routers;
  for (std::size_t r = group * routers; r < (group + 1) * routers; ++r) {
    if (r != router) all.push_back({r, local_link(router, r)});
  }
  for (std::size_t k = own * global_links; groups > 1 && k < (own + 1) * global_links; ++k) {
    const std::size_t other = (group + k % (groups - 1) + 1) % groups, j = k / (groups - 1);
    all.push_back({other * routers + gateway(other, group, j), global_link(group, other, j)});
  }
  return all;
}

std::vector<std::size_t> Dragonfly::way(std::size_t from, std::size_t to, std::size_t j) const {
  const std::size_t g = from / routers, h = to / routers;
  if (from == to) return {};
  if (g == h) return {local_link(from, to)};
  const std::size_t leave = g * routers + gateway(g, h, j), enter = h * routers + gateway(h, g, j);
  std::vector<std::size_t> links;
  if (leave != from) links.push_back(local_link(from, leave));
  links.push_back(global_link(g, h, j));
  if (enter != to) links.push_back(local_link(enter, to));
  return links;
}

bool Dragonfly::whole_way(const Crossing& c, std::vector<std::size_t>& links) const {
  const std::size_t a = switch_of(c.from, c.out), b = switch_of(c.to, c.in);
  const std::size_t cables = a / routers == b / routers ? 1 : cables_between_groups();
  // The shortest of them, of several one by the routers' numbers.
  const auto pick = [&](bool any) {
    std::vector<std::vector<std::size_t>> shortest;
    for (std::size_t j = 0; j < cables; ++j) {
      std::vector<std::size_t> w = way(a, b, j);
      if (!any && !whole(c, w)) continue;
      if (!shortest.empty() && w.size() < shortest[0].size()) shortest.clear();
      if (shortest.empty() || w.size() == shortest[0].size()) shortest.push_back(std::move(w));
    }
    if (shortest.empty()) return false;
    links = std::move(shortest[(a % routers + b % routers) % shortest.size()]);
    return true;
  };
  // Others keep theirs when one of them fails.
  return (pick(true) && whole(c, links)) || pick(false);
}

PathCost Dragonfly::path_cost(const Crossing& c) const {
  if (c.around) return around_cost(*this, c);
  std::vector<std::size_t> links;
  return whole_way(c, links) ? cost_of(links, *this) : PathCost{kNoPath, 0, 0};
}

void Dragonfly::append_path(const Crossing& c, std::vector<LinkId>& out) const {
  std::vector<std::size_t> links;
  if (c.around)
    links = way_around(*this, c);
  else
    whole_way(c, links);
  for (const std::size_t l : links) out.emplace_back(c.first_link + l);
}

Link Dragonfly::link(std::size_t index) const {
  const std::size_t cable = index / 2, per_group = Pairs{routers}.count();
  std::size_t a = 0, b = 0;
  const bool local = cable < groups * per_group;
  if (local) {
    const auto [x, y] = Pairs{routers}.at(cable % per_group);
    const std::size_t first = cable / per_group * routers;
    a = first + x, b = first + y;
  } else {
    const std::size_t m = cables_between_groups(), rest = cable - groups * per_group;
    const auto [g, h] = Pairs{groups}.at(rest / m);
    a = g * routers + gateway(g, h, rest % m), b = h * routers + gateway(h, g, rest % m);
  }
  if (index % 2 != 0) std::swap(a, b);
  return {static_cast<std::int32_t>(a), static_cast<std::int32_t>(b), LinkKind::network,
          local ? local_bandwidth : global_bandwidth, local ? local_latency : global_latency};
}

std::string Dragonfly::switch_name(std::size_t index) const {
  return fmt::format("group{}.router{}", index / routers, index % routers);
}

std::uint64_t Dragonfly::offset_of(std::size_t node, std::size_t origin) const {
  // Turning the groups changes nothing; a router keeps its number in its group.
  const std::size_t a = switch_of(origin, 0), b = switch_of(node, 0);
  return 1 + (b / routers + groups - a / routers) % groups * routers + b % routers;
}

}  // namespace partita
