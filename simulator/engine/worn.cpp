#include "simulator/engine/worn.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <tuple>

namespace partita {
namespace {

/// The link that carries its bytes longest, and in which state it is.
std::string slowest(const Topology& t, const LinkFlows& all) {
  double least = INFINITY;
  LinkId binds;
  for (const auto& [link, n] : all.flows) {
    const double rate = t.link(link).bandwidth.count / static_cast<double>(n);
    if (rate < least) least = rate, binds = link;
  }
  const auto& speeds = t.state().link_speed;
  if (const auto it = speeds.find(binds); it != speeds.end())
    return fmt::format("{} at {:.4g} of its bandwidth", t.link_name(binds), it->second);
  const auto failed =
      std::find_if(speeds.begin(), speeds.end(), [](const auto& link) { return link.second == 0; });
  return failed == speeds.end()
             ? t.link_name(binds)
             : fmt::format("{}, as {} has failed", t.link_name(binds), t.link_name(failed->first));
}

}  // namespace

std::vector<Contended> worn_parts(const Program& p, Communication& communication,
                                  const RankClasses& classes, const Compiled& compiled,
                                  const Labels& labels) {
  const Topology& t = communication.topology();
  const bool links = !t.state().link_speed.empty();
  if (!links && t.state().device_speed.empty()) return {};
  Communication& built = communication.as_built();
  std::map<std::tuple<int, std::int32_t, std::string>, double> lost;  // seconds
  for (std::size_t c = 0; c < classes.classes.size(); ++c) {
    const RankClass& rc = classes.classes[c];
    const std::int64_t rank = rc.representative;
    const DeviceId device{static_cast<std::size_t>(rank)};
    const double speed = t.speed(device);
    std::map<std::int32_t, std::int64_t> calls;
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(rc.stage)])
      ++calls[call.block.value];
    for (const auto& [block, times] : calls) {
      const auto b = static_cast<std::size_t>(block);
      for (const Step& s : compiled.blocks[c][b].steps) {
        const Instruction& i = p.blocks[b].instructions[static_cast<std::size_t>(s.instruction)];
        double more = 0;
        std::string over;
        if (links && s.kind == Kind::collective) {
          const auto group = p.group(i, rank);
          const Bytes bytes = communication.travelling(p, i, payload(p, i, rank), group);
          more = communication.collective(i.collective, bytes, group).count -
                 built.collective(i.collective, bytes, group).count;
          if (more > 0)
            over = slowest(t, lay_out(t, communication.lay(i.collective, bytes, group), group));
        } else if (links && s.kind == Kind::send && p.peer_of(i, rank) != rank) {
          const std::int64_t peer = p.peer_of(i, rank);
          const Bytes bytes = message_bytes(p, i.reads[0], rank);
          more = communication.point_to_point(bytes, rank, peer).count -
                 built.point_to_point(bytes, rank, peer).count;
          if (more > 0) over = slowest(t, message_flows(t, rank, peer));
        } else if (s.kind == Kind::compute && speed < 1) {
          more = to_seconds(Ticks{s.ticks}).count * (1 - speed);
          over = fmt::format("{} at {:.4g} of its speed", t.device_name(device), speed);
        }
        if (more > 0)
          lost[{static_cast<int>(c), s.label, over}] +=
              more * static_cast<double>(times) / static_cast<double>(i.every);
      }
    }
  }
  std::vector<Contended> all;
  for (const auto& [key, seconds] : lost) {
    const auto& [c, label, over] = key;
    all.push_back({c, labels.name(label), over, to_ticks(Seconds{seconds}), {}, true});
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Contended& a, const Contended& b) { return b.lost < a.lost; });
  return all;
}

}  // namespace partita
