#include "runtime/cuda/nccl_plan.h"

namespace partita::cuda {

std::vector<NcclStep> nccl_steps(const CollectiveCall& call) {
  using Kind = NcclStep::Kind;
  const auto n = static_cast<int>(call.group->size());
  const auto chunk = [](const std::vector<std::int64_t>& bounds, int m) {
    const auto k = static_cast<std::size_t>(m);
    return bounds[k + 1] - bounds[k];
  };
  const auto at = [](const std::vector<std::int64_t>& bounds, int m) {
    return bounds[static_cast<std::size_t>(m)];
  };
  const auto& bounds = call.offsets;
  const auto equal = [&] {
    for (int m = 1; m < n; ++m) {
      if (chunk(bounds, m) != chunk(bounds, 0)) return false;
    }
    return true;
  };
  std::vector<NcclStep> steps;
  const auto add = [&](NcclStep s) {
    if (s.count > 0) steps.push_back(s);
  };
  switch (call.kind) {
    case CollectiveKind::all_reduce:
      add({Kind::all_reduce, bounds[0], bounds[0], bounds.back() - bounds[0]});
      break;
    case CollectiveKind::broadcast:
      add({Kind::broadcast, bounds[0], bounds[0], bounds.back() - bounds[0], 0});
      break;
    case CollectiveKind::reduce:
      add({Kind::reduce, bounds[0], bounds[0], bounds.back() - bounds[0], 0});
      break;
    case CollectiveKind::reduce_scatter:
      if (equal()) {
        add({Kind::reduce_scatter, bounds[0], at(bounds, call.me), chunk(bounds, call.me)});
        break;
      }
      for (int m = 0; m < n; ++m)
        add({Kind::reduce, at(bounds, m), at(bounds, m), chunk(bounds, m), m});
      break;
    case CollectiveKind::all_gather:
      if (equal()) {
        add({Kind::all_gather, at(bounds, call.me), bounds[0], chunk(bounds, call.me)});
        break;
      }
      for (int m = 0; m < n; ++m)
        add({Kind::broadcast, at(bounds, m), at(bounds, m), chunk(bounds, m), m});
      break;
    case CollectiveKind::scatter:
      if (call.me != 0) {
        add({Kind::receive, 0, at(bounds, call.me), chunk(bounds, call.me), 0});
        break;
      }
      for (int m = 1; m < n; ++m) add({Kind::send, at(bounds, m), 0, chunk(bounds, m), m});
      break;
    case CollectiveKind::gather:
      if (call.me != 0) {
        add({Kind::send, at(bounds, call.me), 0, chunk(bounds, call.me), 0});
        break;
      }
      for (int m = 1; m < n; ++m) add({Kind::receive, 0, at(bounds, m), chunk(bounds, m), m});
      break;
    case CollectiveKind::all_to_all:
    case CollectiveKind::halo_exchange:
      // What stays is in its place already.
      for (int m = 0; m < n; ++m) {
        if (m == call.me) continue;
        add({Kind::send, at(call.send_offsets, m), 0, chunk(call.send_offsets, m), m, true});
        add({Kind::receive, 0, at(bounds, m), chunk(bounds, m), m});
      }
      break;
    case CollectiveKind::shift:
      add({Kind::send, call.send_offsets[0], 0, call.send_offsets.back() - call.send_offsets[0],
           (call.me + 1) % n, true});
      add({Kind::receive, 0, bounds[0], bounds.back() - bounds[0], (call.me + n - 1) % n});
      break;
  }
  return steps;
}

std::vector<std::pair<std::string, std::string>> estimated_pairs() {
  return {{"", ""},          {"Ring", "LL"},        {"Ring", "LL128"},  {"Ring", "Simple"},
          {"Tree", "LL"},    {"Tree", "LL128"},     {"Tree", "Simple"}, {"NVLS", "Simple"},
          {"PAT", "Simple"}, {"NVLSTree", "Simple"}};
}

bool estimated(CollectiveKind kind, const std::string& algorithm) {
  if (algorithm.empty() || algorithm == "Ring") return true;
  const bool all_reduce = kind == CollectiveKind::all_reduce;
  const bool halves = kind == CollectiveKind::all_gather || kind == CollectiveKind::reduce_scatter;
  if (algorithm == "PAT") return halves;
  if (algorithm == "NVLS") return all_reduce || halves;
  return all_reduce;
}

}  // namespace partita::cuda
