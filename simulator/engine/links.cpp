#include "simulator/engine/links.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/hash.h"

namespace partita {
namespace {

/// One group, one pair or one copy.
struct Transfer {
  std::int32_t kind = 0;
  double share = 1;
  std::size_t first_rank = 0, ranks = 0;  ///< into Incidence::ranks
  std::size_t first_link = 0, links = 0;  ///< into Incidence::links
};

struct Incidence {
  std::vector<TransferKind> kinds;
  std::vector<std::vector<std::int32_t>> transfer_of_rank;  ///< [kind][rank], -1: none
  std::vector<Transfer> transfers;
  std::vector<std::int64_t> ranks;
  std::vector<std::pair<std::int32_t, std::int64_t>> links;  ///< dense link, flows
  std::vector<LinkId> link;                                  ///< dense -> the topology's
};

bool uses_links(const Instruction& i) {
  return i.kind == Kind::collective || i.kind == Kind::send || i.kind == Kind::copy;
}

/// As that of the stage's first rank lies; its other groups have as many members and bytes.
Lay lay_on_stage(const Program& p, const Instruction& i, std::int64_t first,
                 Communication& communication) {
  if (i.collective == CollectiveKind::all_to_all) return Lay::pairs;
  if (!communication.uses_nccl()) return Lay::rings;
  const auto group = p.group(i, first);
  return communication.lay(i.collective,
                           communication.travelling(p, i, payload(p, i, first), group), group);
}

Incidence incidence_of(const Program& p, Communication& communication) {
  Incidence all;
  std::vector<std::int32_t> dense(communication.topology().link_count(), -1);
  for_each_transfer(p, communication,
                    [&](const TransferKind& kind, const Instruction& i,
                        const std::vector<std::int64_t>& members) {
                      if (all.kinds.empty() || all.kinds.back() != kind) {
                        all.kinds.push_back(kind);
                        all.transfer_of_rank.emplace_back(static_cast<std::size_t>(p.ranks()), -1);
                      }
                      auto& of_rank = all.transfer_of_rank.back();
                      const auto flows = transfer_links(kind, members, communication);
                      Transfer t{static_cast<std::int32_t>(all.kinds.size() - 1),
                                 flows.share,
                                 all.ranks.size(),
                                 members.size(),
                                 all.links.size(),
                                 flows.flows.size()};
                      for (const auto& [link, n] : flows.flows) {
                        std::int32_t& number = dense[link.index()];
                        if (number < 0) {
                          number = static_cast<std::int32_t>(all.link.size());
                          all.link.push_back(link);
                        }
                        all.links.emplace_back(number, n);
                      }
                      for (std::size_t m = 0; m < members.size(); ++m) {
                        // A pair belongs to its sender; members of a tied group lie on several
                        // stages.
                        if (i.kind != Kind::send || m == 0)
                          of_rank[static_cast<std::size_t>(members[m])] =
                              static_cast<std::int32_t>(all.transfers.size());
                        all.ranks.push_back(members[m]);
                      }
                      all.transfers.push_back(t);
                    });
  return all;
}

}  // namespace

std::vector<std::int64_t> first_ranks(const Program& p) {
  std::vector<std::int64_t> first(static_cast<std::size_t>(p.stage_count()), -1);
  for (std::int64_t r = p.ranks(); r-- > 0;) first[static_cast<std::size_t>(p.stage_of(r))] = r;
  return first;
}

TransferKind transfer_kind(const Program& p, const Instruction& i, std::int64_t first,
                           Communication& communication) {
  TransferKind k;
  k.stage = p.stage_of(first);
  switch (i.kind) {
    case Kind::collective:
      k.atoms = i.tie >= 0 ? AtomMask{0} : i.atoms;
      k.tie = i.tie;
      k.lay = lay_on_stage(p, i, first, communication);
      break;
    case Kind::send:
      k.atoms = i.atoms;
      k.peer_stage = i.stage;
      k.peer = i.peer;
      k.root = p.buffer(i.reads[0]).layout.root;
      break;
    case Kind::copy: {
      const bool from = p.buffer(i.reads[0]).host, to = p.buffer(i.writes[0]).host;
      k.host = from == to ? 0 : to ? 1 : 2;
      break;
    }
    default:
      PARTITA_ASSERT(false, fmt::format("{} uses no links", name(i.kind)));
  }
  return k;
}

void for_each_transfer(const Program& p, Communication& communication,
                       const std::function<void(const TransferKind&, const Instruction&,
                                                const std::vector<std::int64_t>& members)>& visit) {
  // An instruction of each kind speaks for it.
  std::map<TransferKind, const Instruction*> kinds;
  const auto first = first_ranks(p);
  for (int s = 0; s < p.stage_count(); ++s) {
    std::set<BlockId> blocks;
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(s)]) blocks.insert(call.block);
    for (const BlockId b : blocks) {
      for (const Instruction& i : p.blocks[b.index()].instructions) {
        if (!uses_links(i)) continue;
        const TransferKind k =
            transfer_kind(p, i, first[static_cast<std::size_t>(s)], communication);
        if (i.kind != Kind::copy || k.host != 0) kinds.emplace(k, &i);
      }
    }
  }
  std::vector<std::int64_t> members;
  for (const auto& [kind, instruction] : kinds) {
    const Instruction& i = *instruction;
    std::vector<char> seen(static_cast<std::size_t>(p.ranks()), 0);
    for (std::int64_t r = 0; r < p.ranks(); ++r) {
      if (p.stage_of(r) != kind.stage || seen[static_cast<std::size_t>(r)]) continue;
      if (i.kind == Kind::collective) {
        members = p.group(i, r);
        for (const std::int64_t m : members) seen[static_cast<std::size_t>(m)] = 1;
      } else if (i.kind == Kind::send) {
        if (!p.holds(i.reads[0], r)) continue;
        members = {r, p.peer_of(i, r)};
      } else {
        members = {r};
      }
      visit(kind, i, members);
    }
  }
}

LinkFlows transfer_links(const TransferKind& kind, const std::vector<std::int64_t>& members,
                         const Communication& communication) {
  LinkFlows flows;
  if (kind.host != 0) {
    for (const LinkId l : communication.host_route(members[0], kind.host == 1))
      flows.flows.push_back({l, 1});
    std::sort(flows.flows.begin(), flows.flows.end());
  } else if (kind.peer_stage >= 0) {
    if (members[0] != members[1])
      flows = message_flows(communication.topology(), members[0], members[1]);
  } else if (members.size() > 1) {
    flows = lay_out(communication.topology(), kind.lay, members);
  }
  return flows;
}

SharedLinks share_links(const Program& p, Communication& communication, bool unfolded) {
  const Topology& topology = communication.topology();
  const Incidence all = incidence_of(p, communication);
  SharedLinks result;
  const auto n = static_cast<std::size_t>(p.ranks());
  std::vector<std::int32_t> rank(n), link(all.link.size()), transfer(all.transfers.size());
  std::size_t ranks = 0, links = 0;
  const bool shared = topology.state().ranks_per_device > 1;
  std::vector<std::int32_t> device(shared ? n : 0), device_class;  // by rank; by device
  std::size_t devices = 0;
  if (shared) {
    std::map<std::int32_t, std::int32_t> number;
    for (std::size_t r = 0; r < n; ++r)
      device[r] = number
                      .try_emplace(topology.vertex_of(DeviceId{r}),
                                   static_cast<std::int32_t>(number.size()))
                      .first->second;
    devices = number.size();
    device_class.resize(devices);
    std::iota(device_class.begin(), device_class.end(), 0);
  }
  if (unfolded) {
    for (std::size_t r = 0; r < n; ++r) rank[r] = static_cast<std::int32_t>(r);
    for (std::size_t l = 0; l < link.size(); ++l) link[l] = static_cast<std::int32_t>(l);
    for (std::size_t t = 0; t < transfer.size(); ++t) transfer[t] = static_cast<std::int32_t>(t);
    ranks = n, links = link.size();
  } else {
    const RankClasses plain = classify(p, communication);
    for (std::size_t r = 0; r < n; ++r) rank[r] = plain.of_rank[r];
    ranks = plain.classes.size();
    std::vector<std::uint64_t> of_rank(n), of_link(link.size()), of_transfer(transfer.size());
    const auto& busy = topology.state().background;
    for (std::size_t l = 0; l < link.size(); ++l) {
      of_link[l] = mix(1, std::bit_cast<std::uint64_t>(topology.link(all.link[l]).bandwidth.count));
      if (const auto it = busy.find(all.link[l]); it != busy.end())
        of_link[l] = mix(of_link[l], std::bit_cast<std::uint64_t>(it->second.count));
    }
    links = number_densely(of_link, link);
    for (;;) {
      for (std::size_t t = 0; t < transfer.size(); ++t) {
        const Transfer& x = all.transfers[t];
        std::uint64_t h = mix(static_cast<std::uint64_t>(x.kind), x.ranks), sum = 0;
        for (std::size_t k = 0; k < x.ranks; ++k) {
          const auto c = static_cast<std::uint64_t>(
              rank[static_cast<std::size_t>(all.ranks[x.first_rank + k])]);
          // Of a pair it matters who sends.
          if (all.kinds[static_cast<std::size_t>(x.kind)].peer_stage >= 0)
            h = mix(h, c);
          else
            sum += mix(3, c);
        }
        for (std::size_t k = 0; k < x.links; ++k) {
          const auto& [l, flows] = all.links[x.first_link + k];
          sum += mix(mix(4, static_cast<std::uint64_t>(link[static_cast<std::size_t>(l)])),
                     static_cast<std::uint64_t>(flows));
        }
        of_transfer[t] = mix(h, sum);
      }
      for (std::size_t r = 0; r < n; ++r) of_rank[r] = mix(5, static_cast<std::uint64_t>(rank[r]));
      std::vector<std::uint64_t> sums(std::max(n, link.size()), 0);
      for (std::size_t t = 0; t < transfer.size(); ++t) {
        const Transfer& x = all.transfers[t];
        for (std::size_t k = 0; k < x.ranks; ++k)
          sums[static_cast<std::size_t>(all.ranks[x.first_rank + k])] += mix(
              of_transfer[t], all.kinds[static_cast<std::size_t>(x.kind)].peer_stage >= 0 ? k : 0);
      }
      for (std::size_t r = 0; r < n; ++r) of_rank[r] = mix(of_rank[r], sums[r]);
      if (shared) {
        std::vector<std::uint64_t> of_device(device_class.size(), 7);
        for (std::size_t r = 0; r < n; ++r)
          of_device[static_cast<std::size_t>(device[r])] +=
              mix(8, static_cast<std::uint64_t>(rank[r]));
        devices = number_densely(of_device, device_class);
        for (std::size_t r = 0; r < n; ++r)
          of_rank[r] = mix(of_rank[r], of_device[static_cast<std::size_t>(device[r])]);
      }
      std::fill(sums.begin(), sums.end(), 0);
      for (std::size_t t = 0; t < transfer.size(); ++t) {
        const Transfer& x = all.transfers[t];
        for (std::size_t k = 0; k < x.links; ++k) {
          const auto& [l, flows] = all.links[x.first_link + k];
          sums[static_cast<std::size_t>(l)] +=
              mix(of_transfer[t], static_cast<std::uint64_t>(flows));
        }
      }
      for (std::size_t l = 0; l < link.size(); ++l)
        of_link[l] = mix(mix(6, static_cast<std::uint64_t>(link[l])), sums[l]);
      const std::size_t before = ranks + links;
      ranks = number_densely(of_rank, rank);
      links = number_densely(of_link, link);
      if (ranks + links == before) break;
    }
    number_densely(of_transfer, transfer);
  }

  result.ranks.of_rank.assign(rank.begin(), rank.end());
  result.ranks.classes.resize(ranks);
  for (std::size_t r = n; r-- > 0;) {
    RankClass& c = result.ranks.classes[static_cast<std::size_t>(rank[r])];
    c.stage = p.stage_of(static_cast<std::int64_t>(r));
    c.representative = static_cast<std::int64_t>(r);
    ++c.count;
  }
  if (shared) {
    result.device_classes = devices;
    result.seats.assign(ranks, {0, 0});
    for (std::size_t r = 0; r < n; ++r) {
      const auto c = static_cast<std::size_t>(rank[r]);
      auto& seat = result.seats[c];
      seat.device_class = device_class[static_cast<std::size_t>(device[r])];
      const auto first = static_cast<std::size_t>(result.ranks.classes[c].representative);
      seat.ranks += device[r] == device[first] ? 1 : 0;
    }
  } else {
    result.device_classes = ranks;
    for (std::size_t c = 0; c < ranks; ++c)
      result.seats.push_back({static_cast<std::int32_t>(c), 1});
  }
  result.links.resize(links);
  std::vector<char> speaks(link.size(), 0);  // for its class
  for (std::size_t l = link.size(); l-- > 0;) {
    auto& c = result.links[static_cast<std::size_t>(link[l])];
    ++c.count;
    c.representative = all.link[l];
    c.capacity = topology.link(all.link[l]).bandwidth.count;
  }
  for (std::size_t l = 0; l < link.size(); ++l)
    speaks[l] = result.links[static_cast<std::size_t>(link[l])].representative == all.link[l];
  std::size_t classes = 0;
  for (const std::int32_t t : transfer)
    classes = std::max(classes, static_cast<std::size_t>(t) + 1);
  result.transfers.resize(classes);
  std::vector<std::map<std::int32_t, std::int64_t>> crossings(classes);
  for (std::size_t t = 0; t < transfer.size(); ++t) {
    const Transfer& x = all.transfers[t];
    const auto c = static_cast<std::size_t>(transfer[t]);
    result.transfers[c].share = x.share;
    for (std::size_t k = 0; k < x.links; ++k) {
      const auto& [l, flows] = all.links[x.first_link + k];
      if (speaks[static_cast<std::size_t>(l)])
        crossings[c][link[static_cast<std::size_t>(l)]] += flows;
    }
  }
  for (std::size_t c = 0; c < classes; ++c) {
    for (const auto& [l, flows] : crossings[c]) result.transfers[c].crossings.push_back({l, flows});
  }
  for (std::size_t k = 0; k < all.kinds.size(); ++k) {
    auto& of_class = result.of_class[all.kinds[k]];
    of_class.assign(ranks, -1);
    for (std::size_t r = 0; r < n; ++r) {
      const std::int32_t t = all.transfer_of_rank[k][r];
      if (t >= 0 && all.transfers[static_cast<std::size_t>(t)].links > 0)
        of_class[static_cast<std::size_t>(rank[r])] = transfer[static_cast<std::size_t>(t)];
    }
  }
  return result;
}

}  // namespace partita
