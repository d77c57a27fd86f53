#include "simulator/engine/breakdown.h"

namespace partita {

Ticks Breakdown::total() const {
  Ticks t = bubble + optimizer + other;
  for (const auto& [name, part] : compute) t += part;
  for (const auto& [name, part] : exposed) t += part;
  return t;
}

std::int32_t Labels::of(const std::string& name) {
  const auto [it, fresh] = number_.emplace(name, static_cast<std::int32_t>(names_.size()));
  if (fresh) names_.push_back(name);
  return it->second;
}

Breakdown Spent::breakdown(const Labels& labels, Ticks bubble) const {
  Breakdown b;
  b.bubble = bubble;
  for (std::size_t x = 0; x < ticks_.size(); ++x) {
    if (ticks_[x] == 0) continue;
    const std::string& n = labels.name(static_cast<std::int32_t>(x));
    const Ticks t{ticks_[x]};
    if (n == "optimizer") {
      b.optimizer += t;
    } else if (n == "bubble" || n == "bubble:messages") {
      b.bubble += t;
    } else if (n.rfind("compute:", 0) == 0) {
      b.compute[n.substr(8)] += t;
    } else if (n.rfind("exposed:", 0) == 0) {
      b.exposed[n.substr(8)] += t;
    } else {
      b.other += t;
    }
  }
  return b;
}

std::string axis_name(const Program& p, const Instruction& i) {
  std::string s;
  if (i.tie >= 0) return "tied";
  for (std::size_t a = 0; a < p.mesh.atoms.size(); ++a) {
    if (!has(i.atoms, static_cast<AtomId>(a))) continue;
    std::string atom = p.mesh.atoms[a].name;
    // Ranks of an axis that also hold different experts exchange tokens along it.
    if (i.collective == CollectiveKind::all_to_all && atom.size() > 3 &&
        atom.compare(atom.size() - 3, 3, "_ep") == 0) {
      atom = "ep";
    }
    const std::string axis = atom.substr(0, atom.find('_'));
    if (s.find(axis) == std::string::npos) s += (s.empty() ? "" : "+") + axis;
  }
  return s;
}

}  // namespace partita
