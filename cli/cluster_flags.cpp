#include "cli/cluster_flags.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "base/error.h"
#include "base/unit_text.h"

namespace partita::cli {
namespace {

/// "NAME=VALUE".
std::pair<std::string, std::string> halves(const std::string& text, const std::string& flag,
                                           const std::string& example) {
  const auto at = text.rfind('=');
  if (at == std::string::npos || at == 0 || at + 1 == text.size())
    throw InputError(flag, fmt::format("'{}' is not NAME=VALUE, like {}", text, example));
  return {text.substr(0, at), text.substr(at + 1)};
}

/// Each part of a cluster has one state.
template <class Parts, class Part, class Value>
void note(Parts& parts, Part part, Value value, const std::string& name, const std::string& flag) {
  if (!parts.emplace(part, value).second)
    throw InputError(flag, fmt::format("'{}' is there twice; keep one", name));
}

double fraction(const std::string& text, const std::string& flag) {
  char* end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || *end != 0 || !(x > 0) || !(x <= 1))
    throw InputError(flag,
                     fmt::format("'{}' is no speed; give a fraction above 0 and up to 1", text));
  return x;
}

SpineRouting routing_of(const std::string& text) {
  if (text == "spray") return {};
  SpineRouting routing{true, 0};
  if (text == "ecmp") return routing;
  const std::string seed = text.substr(std::min(text.size(), std::size_t{5}));
  const auto [end, error] = std::from_chars(seed.data(), seed.data() + seed.size(), routing.seed);
  if (text.rfind("ecmp:", 0) != 0 || error != std::errc{} || end != seed.data() + seed.size())
    throw InputError("--spines", fmt::format("'{}' is not spray, ecmp or ecmp:SEED with a whole "
                                             "number for seed, like ecmp:7",
                                             text));
  return routing;
}

}  // namespace

void ClusterFlags::add_to(CLI::App& app) {
  app.add_option("--spines", spines,
                 "how traffic spreads over the spines: spray (evenly, ideal), or ecmp[:SEED], each "
                 "pair of devices on one by hash");
  app.add_option("--slow", slow,
                 "a device at a fraction of its speed, like node3.gpu1=0.8; repeatable")
      ->allow_extra_args(false);
  app.add_option("--degrade", degrade,
                 "a link at a fraction of its bandwidth, like 'node3.nic0->rail0=0.5'; repeatable")
      ->allow_extra_args(false);
  app.add_option("--fail", fail, "a link that has failed, like 'node3.nic0->rail0'; repeatable")
      ->allow_extra_args(false);
  app.add_option("--background", background,
                 "what others send over a link, like 'node3.nic0->rail0=10 GB/s'; repeatable")
      ->allow_extra_args(false);
  app.add_option("--ranks-per-device", ranks_per_device,
                 "how many ranks share each device (default: 1)")
      ->check(CLI::Range(1, 64));
  app.add_flag("--mps", mps, "they run beside each other under NVIDIA's MPS, not in turns");
}

std::vector<std::string> state_assumptions(const Topology& t, Network network) {
  std::vector<std::string> assumed = t.assumed();
  if (!t.state().background.empty() && network != Network::flows)
    assumed.push_back(
        fmt::format("no background: --network {} has each transfer alone", name(network)));
  if (t.in_turns())
    assumed.push_back(fmt::format("{} ranks have each device in turns of {:.3g} ms",
                                  t.state().ranks_per_device,
                                  1e3 * t.device(DeviceId{std::size_t{0}}).time_slice.count));
  if (t.node_count() > 1 && t.spines() > 1 && !t.routing().ecmp)
    assumed.push_back(fmt::format("traffic sprayed evenly over {} spines", t.spines()));
  if (t.goes_around()) assumed.emplace_back("shortest routes around failed links");
  return assumed;
}

Topology ClusterFlags::in_state(const Topology& built) const {
  const Topology t = spines.empty() ? built : built.with_routing(routing_of(spines), "--spines");
  if (mps && ranks_per_device == 1) throw InputError("--mps", "needs --ranks-per-device 2 or more");
  if (slow.empty() && degrade.empty() && fail.empty() && background.empty() &&
      ranks_per_device == 1)
    return t;
  ClusterState state;
  state.ranks_per_device = ranks_per_device;
  state.mps = mps;
  for (const std::string& text : slow) {
    const auto [name, value] = halves(text, "--slow", "node0.gpu1=0.8");
    note(state.device_speed, t.find_device(name, "--slow"), fraction(value, "--slow"), name,
         "--slow");
  }
  for (const std::string& text : degrade) {
    const auto [name, value] = halves(text, "--degrade", "'node0.nic0->rail0=0.5'");
    note(state.link_speed, t.find_link(name, "--degrade"), fraction(value, "--degrade"), name,
         "--degrade");
  }
  for (const std::string& name : fail)
    note(state.link_speed, t.find_link(name, "--fail"), 0.0, name, "--fail");
  for (const std::string& text : background) {
    const auto [name, value] = halves(text, "--background", "'node0.nic0->rail0=10 GB/s'");
    const LinkId link = t.find_link(name, "--background");
    const BytesPerSecond rate = parse_byte_rate(value, "--background");
    if (rate > t.link(link).bandwidth)
      throw InputError("--background",
                       fmt::format("{} is more than {} carries; it is a link of {:.4g} GB/s", value,
                                   name, t.link(link).bandwidth.count * 1e-9));
    note(state.background, link, rate, name, "--background");
  }
  return t.in_state(std::move(state));
}

}  // namespace partita::cli
