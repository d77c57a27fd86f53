#include "validation/program_check.h"

#include <fmt/format.h>

#include <map>

#include "base/unit_text.h"
#include "validation/compare.h"
#include "validation/traffic.h"

namespace partita::validation {
namespace {

using Counts = std::map<std::string, std::int64_t>;

/// The first key at which two counts differ, in words: "12 linear forward, simulated 13".
std::string difference(const Counts& executed, const Counts& simulated) {
  Counts all = executed;
  all.insert(simulated.begin(), simulated.end());
  for (const auto& [what, ignored] : all) {
    const auto count = [&key = what](const Counts& c) {
      const auto it = c.find(key);
      return it == c.end() ? std::int64_t{0} : it->second;
    };
    if (count(executed) != count(simulated))
      return fmt::format("{} {}, simulated {}", count(executed), what, count(simulated));
  }
  return "";
}

Counts instructions_of(const Program& p, const std::vector<Sample>& samples, int rank) {
  Counts c;
  for (const Sample& x : samples) {
    const Instruction& i = p.blocks[static_cast<std::size_t>(x.block)]
                               .instructions[static_cast<std::size_t>(x.instruction)];
    // Where one rank of a group has the buffer, the others pass this by.
    if ((i.kind == Kind::send && !p.holds(i.reads[0], rank)) ||
        (i.kind == Kind::receive && !p.holds(i.writes[0], rank)))
      continue;
    ++c[kind_of(p, i)];
  }
  return c;
}

Counts counts_of(const Traffic& t, bool by_steps) {
  Counts c;
  if (by_steps) {
    for (const auto& [to, bytes] : t.bytes_to) {
      if (bytes > 0) c[fmt::format("bytes to rank {}", to)] = bytes;
    }
    return c;
  }
  if (t.sends > 0) c["messages"] = t.sends;
  if (t.send_bytes > 0) c["bytes of messages"] = t.send_bytes;
  for (const auto& [kind, calls] : t.collectives) {
    c[fmt::format("calls of {}", name(kind))] = calls.calls;
    c[fmt::format("bytes of {}", name(kind))] = calls.payload_bytes;
  }
  return c;
}

Counts counts_of(const std::array<Bytes, kCategoryCount>& at_peak, Bytes host) {
  Counts c;
  for (std::size_t k = 0; k < kCategoryCount; ++k)
    c[fmt::format("bytes of {}", name(static_cast<Category>(k)))] = at_peak[k].count;
  c["bytes in the host's memory"] = host.count;
  return c;
}

}  // namespace

ProgramCheck check_program(const Program& p, const Timeline& timeline,
                           const std::vector<RankMeasurement>& ranks, std::int64_t step,
                           bool by_steps) {
  ProgramCheck check;
  std::vector<Counts> simulated(ranks.size());
  for (const Entry& e : timeline.entries)
    ++simulated[static_cast<std::size_t>(e.rank_class)]
               [kind_of(p, p.blocks[static_cast<std::size_t>(e.block)]
                               .instructions[static_cast<std::size_t>(e.instruction)])];
  const auto traffic = predicted_traffic(p, step, by_steps);
  if (traffic) check.traffic = true;
  // With rows fed back the simulated memory is the last step's.
  const bool last = !p.routings.empty();
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const RankMeasurement& m = ranks[r];
    const auto compare = [&](const std::string& verb, const Counts& mine, const Counts& theirs) {
      const std::string d = difference(mine, theirs);
      if (!d.empty() && check.difference.empty())
        check.difference = fmt::format("rank {} {} {}", m.rank, verb, d);
      return d.empty();
    };
    if (!m.samples.empty())
      check.instructions &=
          compare("executed", instructions_of(p, m.samples.back(), m.rank), simulated[r]);
    if (traffic)
      *check.traffic &=
          compare("sent", counts_of(m.traffic, by_steps), counts_of((*traffic)[r], by_steps));
    const MemoryUse& use = timeline.memory[r];
    check.memory &=
        compare("held at its peak", counts_of(last ? m.last_at_peak : m.at_peak, m.host_peak),
                counts_of(use.at_peak, use.host_peak));
  }
  return check;
}

}  // namespace partita::validation
