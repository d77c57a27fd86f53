#include "validation/layer_time.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "validation/row_text.h"

namespace partita::validation {
namespace {

bool has(std::string_view text, std::string_view word) {
  return text.find(word) != std::string_view::npos;
}

/// "layers.3.moe.down" -> {3, "moe.down"}; empty: of no layer.
struct Place {
  int layer = 0;
  std::string_view within;
};
std::optional<Place> place_of(std::string_view name) {
  constexpr std::string_view kLayers = "layers.";
  if (name.substr(0, kLayers.size()) != kLayers) return std::nullopt;
  name.remove_prefix(kLayers.size());
  const std::size_t dot = name.find('.');
  if (dot == std::string_view::npos) return std::nullopt;
  const auto layer = number(name.substr(0, dot));
  if (!layer) return std::nullopt;
  return Place{static_cast<int>(*layer), name.substr(dot + 1)};
}

bool is_of(LayerQuantity::Part part, std::string_view within) {
  using Part = LayerQuantity::Part;
  const auto begins = [&](std::string_view word) { return within.substr(0, word.size()) == word; };
  switch (part) {
    case Part::all:
      return true;
    case Part::attention:
      return begins("attention.") && !begins("attention.residual");
    case Part::experts:
      return begins("moe.");
    case Part::mlp:
      return begins("moe.") || (begins("mlp.") && !begins("mlp.residual"));
  }
  return false;
}

/// The operator that an instruction computes, or the value that it moves between ranks; "" for what
/// no layer waits for: parameters and their gradients.
std::string_view subject(const Program& program, const Instruction& i) {
  if (i.kind == Kind::compute)
    return of_operator(i.kernel)
               ? std::string_view(program.operators[static_cast<std::size_t>(i.op)].name)
               : std::string_view();
  if (i.kind != Kind::collective || i.reads.empty() || !i.reads.front().valid()) return {};
  const Buffer& b = program.buffers[i.reads.front().index()];
  return b.parameter >= 0 ? std::string_view() : std::string_view(b.name);
}

}  // namespace

std::optional<LayerQuantity> layer_quantity(std::string_view text) {
  using Part = LayerQuantity::Part;
  using Pass = LayerQuantity::Pass;
  const std::string s = lower(text);
  if (!has(s, "layer")) return std::nullopt;
  for (const std::string_view other : {"byte", "memory", "allocated", "reserved", "activations"})
    if (has(s, other)) return std::nullopt;
  const bool forward = has(s, "forward") || has(s, "fwd"),
             backward = has(s, "backward") || has(s, "bwd");
  LayerQuantity q;
  if (forward != backward)
    q.pass = forward ? Pass::forward : Pass::backward;
  else if (!forward && !has(s, "combined"))
    return std::nullopt;
  q.alone = has(s, "single");
  if (has(s, "moe") || has(s, "expert"))
    q.part = Part::experts;
  else if (has(s, "attention"))
    q.part = Part::attention;
  else if (has(s, "mlp"))
    q.part = Part::mlp;
  return q;
}

std::optional<Seconds> layer_time(const LayerQuantity& quantity, const Program& program,
                                  const Timeline& recorded) {
  using Pass = LayerQuantity::Pass;
  struct Run {
    Ticks start, end;
  };
  using Key = std::pair<std::int32_t, std::int32_t>;  // layer, micro-batch
  // Of the class with most layers, by the kind of the block.
  std::map<Key, std::map<BlockKind, Run>> most;
  for (std::size_t c = 0; c < recorded.classes.size(); ++c) {
    std::vector<const Entry*> entries;
    for (const Entry& e : recorded.entries)
      if (static_cast<std::size_t>(e.rank_class) == c) entries.push_back(&e);
    std::stable_sort(entries.begin(), entries.end(),
                     [](const Entry* a, const Entry* b) { return a->start < b->start; });
    std::map<Key, std::map<BlockKind, Run>> runs;
    Ticks done{0};  // when the last kernel, or exchange that a layer waits for, ended
    for (const Entry* e : entries) {
      const Block& block = program.blocks[static_cast<std::size_t>(e->block)];
      const Instruction& i = block.instructions[static_cast<std::size_t>(e->instruction)];
      const auto place = e->micro_batch < 0 ? std::nullopt : place_of(subject(program, i));
      if (place && is_of(quantity.part, place->within)) {
        const auto [at, fresh] = runs[{place->layer, e->micro_batch}].try_emplace(
            block.kind, Run{std::min(done, e->start), e->end});
        at->second.end = std::max(at->second.end, e->end);
      }
      if ((i.kind == Kind::compute && i.stream == kComputeStream) || !subject(program, i).empty())
        done = std::max(done, e->end);
    }
    if (runs.size() > most.size()) most = std::move(runs);
  }
  std::vector<Ticks> wanted;
  for (const auto& [layer, runs] : most) {
    Ticks sum{0};
    for (const auto& [kind, run] : runs)
      if (quantity.pass == Pass::both ||
          (kind == BlockKind::forward) == (quantity.pass == Pass::forward))
        sum += run.end - run.start;
    if (sum > Ticks{0}) wanted.push_back(sum);
  }
  if (wanted.empty()) return std::nullopt;
  const auto middle = wanted.begin() + static_cast<std::ptrdiff_t>(wanted.size() / 2);
  std::nth_element(wanted.begin(), middle, wanted.end());
  return to_seconds(*middle);
}

}  // namespace partita::validation
