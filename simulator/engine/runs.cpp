#include "simulator/engine/runs.h"

#include <algorithm>
#include <set>
#include <span>

namespace partita {
namespace {

std::span<const std::int32_t> waits_of(const CompiledBlock& block, const Step& s) {
  return {block.slots.data() + s.first_wait, static_cast<std::size_t>(s.waits)};
}
std::span<const std::int32_t> marks_of(const CompiledBlock& block, const Step& s) {
  return {block.slots.data() + s.first_mark, static_cast<std::size_t>(s.marks)};
}

bool waits_for_nobody(const Step& s) {
  return s.kind != Kind::send && s.kind != Kind::receive && s.meeting < 0 && !s.host_waits;
}

}  // namespace

std::vector<char> joined_to_last(const CompiledBlock& block) {
  std::vector<char> joined(block.steps.size(), 0);
  for (std::size_t k = 1; k < block.steps.size(); ++k) {
    const Step &last = block.steps[k - 1], &s = block.steps[k];
    if (!waits_for_nobody(last) || !waits_for_nobody(s)) continue;
    const auto made = marks_of(block, last);
    const auto waits = waits_of(block, s);
    joined[k] = s.stream == last.stream || (s.after_compute && last.stream == kComputeStream) ||
                std::any_of(waits.begin(), waits.end(), [&](std::int32_t x) {
                  return std::find(made.begin(), made.end(), x) != made.end();
                });
  }
  return joined;
}

BlockRun run_of(const CompiledBlock& block, std::int32_t first, std::int32_t parts) {
  BlockRun run;
  run.first = first, run.parts = parts;
  std::set<Stream> streams;      // of earlier parts, or waited for
  std::set<std::int32_t> slots;  // made by earlier parts, or waited for
  for (std::int32_t k = 0; k < parts; ++k) {
    const Step& s = block.steps[static_cast<std::size_t>(first + k)];
    run.launch += s.launch;
    if (s.after_compute && streams.insert(kComputeStream).second)
      run.waits.push_back({k, kComputeStream});
    if (streams.insert(s.stream).second) run.waits.push_back({k, s.stream});
    for (const std::int32_t x : waits_of(block, s)) {
      if (slots.insert(x).second) run.waits.push_back({k, 0, true, x});
    }
    for (const std::int32_t x : marks_of(block, s)) slots.insert(x);
  }
  std::set<Stream> used;
  std::set<std::int32_t> made;
  for (std::int32_t k = parts; k-- > 0;) {
    const Step& s = block.steps[static_cast<std::size_t>(first + k)];
    if (used.insert(s.stream).second) run.makes.push_back({k, s.stream});
    for (const std::int32_t x : marks_of(block, s)) {
      if (made.insert(x).second) run.makes.push_back({k, 0, true, x});
    }
  }
  run.stream = block.steps[static_cast<std::size_t>(first + parts - 1)].stream;
  return run;
}

}  // namespace partita
