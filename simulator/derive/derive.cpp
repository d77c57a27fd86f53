#include "simulator/derive/derive.h"

#include <fmt/format.h>

#include <algorithm>

namespace partita {
namespace {

/// Atoms along which only the first rank runs this operator.
AtomMask root_of(const Plan& plan, const Operator& op) {
  for (const std::string& pattern : plan.root_operators) {
    if (rule_matches({pattern, Dim::sample, "", false, false}, op)) return plan.root_state;
  }
  return 0;
}

/// Dimensions whose parts must be equal: what a rank can't do a fraction of, or what kernels and
/// collectives of every framework require.
bool must_divide(Dim d) { return d != Dim::vocabulary && d != Dim::height && d != Dim::width; }

std::string axis_title(const std::string& axis) {
  if (axis == "tp") return "tensor parallel";
  if (axis == "dp") return "data parallel";
  if (axis == "cp") return "context parallel";
  if (axis == "ep") return "expert parallel";
  if (axis == "etp") return "expert tensor parallel";
  return axis;
}

bool is_trivial(const Window& w) {
  return w.kernel == 1 && w.stride == 1 && w.pad_before == 0 && w.pad_after == 0;
}

/// Layout of an operand under the cuts, partial over cuts of dimensions that do not index it if
/// `computed`.
Layout layout_of(const Signature& s, const std::vector<DimSplit>& cuts, const Operand& operand,
                 bool computed) {
  Layout l;
  AtomMask used = 0;
  for (std::size_t i = 0; i < operand.shape.size(); ++i) {
    DimSplit split;
    const int d = operand.dims[i];
    if (d >= 0) {
      split = cuts[static_cast<std::size_t>(d)];
      used = static_cast<AtomMask>(used | mask_of(split.atoms));
      if (!split.atoms.empty() && !operand.windows.empty() && !is_trivial(operand.windows[i])) {
        split.kind = SplitKind::window;
        split.window = operand.windows[i];
        split.outputs = s.dims[static_cast<std::size_t>(d)].extent;
      }
    }
    l.dims.push_back(std::move(split));
  }
  if (computed) {
    for (const DimSplit& cut : cuts)
      l.partial = static_cast<AtomMask>(l.partial | (mask_of(cut.atoms) & ~used));
  }
  return l;
}

bool same_atoms(const DimSplit& a, const DimSplit& b) {
  return a.atoms == b.atoms && a.zigzag == b.zigzag;
}

/// The first atoms of `want` are exactly `have`.
bool is_prefix(const DimSplit& have, const DimSplit& want) {
  if (have.atoms.size() > want.atoms.size()) return false;
  if (!std::equal(have.atoms.begin(), have.atoms.end(), want.atoms.begin())) return false;
  const std::size_t n = have.atoms.size();
  // A zigzag is one cut: either both have it whole or neither has begun it.
  if (n == 0) return true;
  return have.zigzag == want.zigzag && n >= want.zigzag;
}

/// What every summand of the Add owes as its operator has made it; nothing where one is made
/// elsewhere, as layers may stand on different stages.
AtomMask owed_by_all(const Graph& graph, const Operator& add,
                     std::span<const OperatorLayouts> before) {
  AtomMask owed = static_cast<AtomMask>(~AtomMask{0});
  for (const TensorId t : add.inputs) {
    const OpId from = graph.tensor(t).producer;
    if (!from.valid() || from.index() >= before.size() || graph.op(from).layer != add.layer)
      return 0;
    const auto& outputs = graph.op(from).outputs;
    const auto k = std::find(outputs.begin(), outputs.end(), t) - outputs.begin();
    const Layout& made = before[from.index()].outputs[static_cast<std::size_t>(k)];
    if (made.reduction != Reduction::sum || made.root != 0) return 0;
    owed = static_cast<AtomMask>(owed & made.partial);
  }
  return owed;
}

}  // namespace

Layout without_partial(Layout layout) {
  layout.partial = 0;
  layout.reduction = Reduction::sum;
  return layout;
}

Layout without_windows(Layout layout) {
  for (auto& d : layout.dims) {
    d.kind = SplitKind::block;
    d.window = {};
    d.outputs = 0;
  }
  return layout;
}

Feasible<std::vector<DimSplit>> cuts_of(const Plan& plan, const Operator& op, const Signature& s,
                                        const std::string& head_word) {
  std::vector<DimSplit> cuts(s.dims.size());
  std::vector<std::vector<std::string>> axes_of(s.dims.size());  // "tensor parallel 4"
  AtomMask taken = root_of(plan, op);
  for (const ShardingRule& rule : plan.rules) {
    const int d = s.find(rule.dim);
    if (d < 0 || !rule_matches(rule, op)) continue;
    const auto& axis = plan.axes.at(rule.axis);
    if (axis.empty() || (rule.where_unused && (taken & mask_of(axis)) != 0)) continue;
    auto& cut = cuts[static_cast<std::size_t>(d)];
    const bool fresh = cut.atoms.empty();
    std::size_t added = 0;
    for (const AtomId a : axis) {
      if (has(taken, a)) continue;
      cut.atoms.push_back(a);
      ++added;
    }
    if (added == 0) continue;
    if (fresh && rule.zigzag) cut.zigzag = static_cast<std::uint8_t>(added);
    taken = static_cast<AtomMask>(taken | mask_of(axis));
    const AtomList own(cut.atoms.end() - static_cast<std::ptrdiff_t>(added), cut.atoms.end());
    if (plan.mesh.size(own) > 1)
      axes_of[static_cast<std::size_t>(d)].push_back(
          fmt::format("{} {}", axis_title(rule.axis), plan.mesh.size(own)));
  }
  for (std::size_t d = 0; d < s.dims.size(); ++d) {
    const std::int64_t parts = plan.mesh.size(cuts[d].atoms);
    if (parts == 1) continue;
    const IterationDim& dim = s.dims[d];
    const bool several = axes_of[d].size() > 1;
    const std::string axes = fmt::format("{}", fmt::join(axes_of[d], " x ")) +
                             (several ? fmt::format(" = {}", parts) : "");
    if (dim.use == DimUse::whole) {
      return Infeasible{fmt::format("{} cannot cut the {} of {}", axes.substr(0, axes.rfind(' ')),
                                    name(dim.dim), op.name)};
    }
    const std::int64_t grain = cuts[d].zigzag > 0 ? 2 : 1;
    if (dim.extent < parts * grain || (must_divide(dim.dim) && dim.extent % (parts * grain) != 0)) {
      const std::string what = dim.dim == Dim::head       ? head_word
                               : dim.dim == Dim::expert   ? "experts"
                               : dim.dim == Dim::sample   ? "samples"
                               : dim.dim == Dim::sequence ? "tokens"
                                                          : std::string(name(dim.dim));
      if (!must_divide(dim.dim)) {
        return Infeasible{fmt::format(
            "{} cuts the {} {} of {} into more parts than it has; use at most {}{}", axes, what,
            dim.extent, op.name, dim.extent / grain, several ? " in all" : "")};
      }
      // As `axes` ends in how many there are.
      const std::string pieces =
          grain > 1 ? fmt::format(", {} pieces for each rank of a causal sequence,", grain) : "";
      // What is left uncut needs no pieces; without a whole number of them nothing else goes.
      const bool whole = dim.extent % grain == 0;
      return Infeasible{fmt::format(
          "{}{} does not divide {} {} of {}; use {}{}{}", axes, pieces, dim.extent, what, op.name,
          whole ? divisors_text(dim.extent / grain) : "1", several ? " in all" : "",
          whole ? "" : fmt::format(", or {} that {} divides", what, parts * grain))};
    }
  }
  return cuts;
}

Feasible<OperatorLayouts> derive(const Graph& graph, const Plan& plan, OpId id,
                                 std::int64_t samples, std::span<const OperatorLayouts> before) {
  const Operator& op = graph.op(id);
  OperatorLayouts l;
  l.signature = signature(graph, id, samples);
  // Where several query heads share a key, groups of them are what can be cut.
  const bool grouped =
      std::any_of(graph.operators.begin(), graph.operators.end(), [](const auto& o) {
        const auto* a = std::get_if<Attention>(&o.operation);
        return a != nullptr && a->queries_per_head > 1;
      });
  auto cuts = cuts_of(plan, op, l.signature, grouped ? "key/value heads" : "heads");
  if (!cuts) return cuts.why();
  l.cuts = std::move(*cuts);
  AtomMask owed = 0;
  if (std::holds_alternative<Add>(op.operation)) {
    // Where the sum is cut over what is owed, one reduce-scatter behind it does for both.
    owed = owed_by_all(graph, op, before);
    for (DimSplit& cut : l.cuts) {
      while (cut.atoms.size() > cut.zigzag && has(owed, cut.atoms.back()))
        cut.atoms.resize(cut.atoms.size() - 1);
    }
  }
  const Signature& s = l.signature;
  for (const Operand& o : s.inputs) {
    l.inputs.push_back(layout_of(s, l.cuts, o, false));
    l.input_gradients.push_back(layout_of(s, l.cuts, o, true));
  }
  for (const Operand& o : s.parameters) {
    l.parameters.push_back(layout_of(s, l.cuts, o, false));
    l.parameter_gradients.push_back(layout_of(s, l.cuts, o, true));
  }
  for (const Operand& o : s.outputs) {
    Layout computed = layout_of(s, l.cuts, o, true);
    // A statistic is made whole inside the operator, so a cut of it leaves a result only partial
    // where the dimension is also summed: cross entropy's loss is summed over rows, its vocabulary
    // is not owed.
    for (std::size_t d = 0; d < s.dims.size(); ++d) {
      if (s.dims[d].use == DimUse::statistic) {
        computed.partial = static_cast<AtomMask>(computed.partial & ~mask_of(l.cuts[d].atoms));
      }
    }
    l.outputs.push_back(computed);
    l.output_gradients.push_back(without_partial(computed));
  }
  for (const Extra& e : s.extras) l.extras.push_back(layout_of(s, l.cuts, e.operand, false));
  if (const auto* a = std::get_if<Attention>(&op.operation);
      a != nullptr && plan.context == Plan::ContextExchange::ring) {
    const DimSplit& cut = l.cuts[static_cast<std::size_t>(s.find(Dim::sequence))];
    if (!cut.atoms.empty()) {
      if (a->materialised)
        return Infeasible{fmt::format(
            "{} is materialised, while a ring of keys never has all its probabilities; use "
            "all_gather or all_to_all, or attention that is not materialised",
            op.name)};
      if (a->sinks)
        return Infeasible{fmt::format(
            "{} has sinks, which a ring of keys does not know; use all_gather or all_to_all",
            op.name)};
      l.ring = true;
      // Liu et al., https://arxiv.org/abs/2310.01889: each rank keeps its keys and values; their
      // gradients travel with them and come home complete.
      for (const std::size_t k : {std::size_t{1}, std::size_t{2}}) {
        l.inputs[k].dims[1] = l.input_gradients[k].dims[1] = cut;
        l.input_gradients[k].partial =
            static_cast<AtomMask>(l.input_gradients[k].partial & ~mask_of(cut.atoms));
      }
    }
  }
  for (auto* list : {&l.inputs, &l.outputs}) {
    for (Layout& layout : *list)
      layout.partial = static_cast<AtomMask>(layout.partial | (owed & ~split_atoms(layout)));
  }
  l.root = root_of(plan, op);
  if (l.root != 0) {
    for (auto* list : {&l.inputs, &l.outputs, &l.output_gradients, &l.input_gradients, &l.extras}) {
      for (Layout& layout : *list) layout.root = l.root;
    }
  }
  return l;
}

std::vector<ReshardStep> reshard(const Layout& from, const Layout& to) {
  PARTITA_ASSERT(from.dims.size() == to.dims.size(),
                 fmt::format("reshard of {} to {} dimensions", from.dims.size(), to.dims.size()));
  PARTITA_ASSERT(from.flat.empty() && to.flat.empty() && (to.partial & ~from.partial) == 0,
                 "reshard");
  std::vector<ReshardStep> steps;
  Layout now = from;
  const auto emit = [&](CollectiveKind kind, AtomMask atoms) {
    steps.push_back({false, kind, atoms, now});
  };
  const Layout goal = without_windows(to);
  const std::size_t rank = now.dims.size();
  if (now == to) return steps;

  // Halos of gradients: overlapping contributions are added where they belong.
  AtomMask halo = 0;
  for (std::size_t d = 0; d < rank; ++d) {
    if (now.dims[d].kind == SplitKind::window && !(now.dims[d] == to.dims[d])) {
      halo = static_cast<AtomMask>(halo | mask_of(now.dims[d].atoms));
    }
  }
  if (halo != 0) {
    now = without_windows(now);
    emit(CollectiveKind::halo_exchange, halo);
  }

  // To or from one rank of a group.
  if (now.root != to.root) {
    PARTITA_ASSERT(now.root == 0 || to.root == 0, "reshard between two roots");
    const AtomMask root = static_cast<AtomMask>(now.root | to.root);
    if (now.root != 0) {
      now.root = 0;
      std::size_t d = 0;
      while (d < rank && !(now.dims[d].atoms.empty() && mask_of(goal.dims[d].atoms) == root)) ++d;
      if (d < rank)
        now.dims[d].atoms = goal.dims[d].atoms, now.dims[d].zigzag = goal.dims[d].zigzag;
      emit(d < rank ? CollectiveKind::scatter : CollectiveKind::broadcast, root);
    } else {
      const bool owes = (now.partial & root) == root;
      bool cut = false;
      for (DimSplit& d : now.dims) {
        if (mask_of(d.atoms) != root) continue;
        d = {};
        cut = true;
      }
      now.root = root;
      if (owes) now.partial = static_cast<AtomMask>(now.partial & ~root);
      if (owes || cut) {
        emit(owes ? CollectiveKind::reduce : CollectiveKind::gather, root);
      } else {
        steps.push_back({true, CollectiveKind::all_reduce, 0, now});
      }
    }
  }

  const auto owed = [&] { return static_cast<AtomMask>(now.partial & ~to.partial); };
  const auto used = [&] {
    return static_cast<AtomMask>(split_atoms(now) | now.partial | now.root);
  };
  // Extends the cut of dimension d by the atoms of its goal that satisfy `free`, as many as come
  // next.
  const auto extension = [&](std::size_t d, AtomMask free) {
    AtomList next;
    if (!is_prefix(now.dims[d], goal.dims[d])) return next;
    for (std::size_t i = now.dims[d].atoms.size(); i < goal.dims[d].atoms.size(); ++i) {
      if (!has(free, goal.dims[d].atoms[i])) break;
      next.push_back(goal.dims[d].atoms[i]);
    }
    if (now.dims[d].atoms.empty() && next.size() < goal.dims[d].zigzag) next.clear();
    return next;
  };
  const auto extend = [&](std::size_t d, const AtomList& atoms) {
    if (now.dims[d].atoms.empty()) now.dims[d].zigzag = goal.dims[d].zigzag;
    now.dims[d].atoms.insert(now.dims[d].atoms.end(), atoms.begin(), atoms.end());
  };

  for (bool changed = true; changed;) {
    changed = false;
    for (std::size_t d = 0; d < rank; ++d) {
      if (const auto next = extension(d, static_cast<AtomMask>(~used())); !next.empty()) {
        extend(d, next);
        steps.push_back({true, CollectiveKind::all_reduce, 0, now});
        changed = true;
      }
    }
    for (std::size_t d = 0; d < rank && !changed; ++d) {
      if (const auto next = extension(d, owed()); !next.empty()) {
        extend(d, next);
        now.partial = static_cast<AtomMask>(now.partial & ~mask_of(next));
        emit(CollectiveKind::reduce_scatter, mask_of(next));
        changed = true;
      }
    }
    // Last cuts of one dimension that are the next cuts of another.
    for (std::size_t a = 0; a < rank && !changed; ++a) {
      for (std::size_t b = 0; b < rank && !changed; ++b) {
        if (a == b || now.dims[a].atoms.empty()) continue;
        const auto next = extension(b, mask_of(now.dims[a].atoms));
        if (next.empty() || next.size() > now.dims[a].atoms.size()) continue;
        const std::size_t keep = now.dims[a].atoms.size() - next.size();
        if (!std::equal(next.begin(), next.end(),
                        now.dims[a].atoms.begin() + static_cast<std::ptrdiff_t>(keep)) ||
            (keep < now.dims[a].zigzag && keep > 0)) {
          continue;
        }
        if (is_prefix(now.dims[a], goal.dims[a])) continue;  // a keeps them
        now.dims[a].atoms.resize(keep);
        if (keep == 0) now.dims[a].zigzag = 0;
        extend(b, next);
        emit(CollectiveKind::all_to_all, mask_of(next));
        changed = true;
      }
    }
    if (changed) continue;
    if (owed() != 0) {
      const AtomMask reduced = owed();
      // A partial atom that a goal dimension wants, but cannot take yet, waits for the gather
      // below.
      AtomMask wanted = 0;
      bool blocked = false;
      for (std::size_t d = 0; d < rank; ++d) {
        wanted = static_cast<AtomMask>(wanted | mask_of(goal.dims[d].atoms));
        blocked |= !is_prefix(now.dims[d], goal.dims[d]);
      }
      const AtomMask ready = blocked ? static_cast<AtomMask>(reduced & ~wanted) : reduced;
      if (ready != 0) {
        now.partial = static_cast<AtomMask>(now.partial & ~ready);
        emit(CollectiveKind::all_reduce, ready);
        changed = true;
        continue;
      }
    }
    for (std::size_t d = 0; d < rank && !changed; ++d) {
      if (is_prefix(now.dims[d], goal.dims[d])) continue;
      std::size_t keep = 0;
      while (keep < now.dims[d].atoms.size() && keep < goal.dims[d].atoms.size() &&
             now.dims[d].atoms[keep] == goal.dims[d].atoms[keep]) {
        ++keep;
      }
      if (now.dims[d].zigzag != goal.dims[d].zigzag || keep < now.dims[d].zigzag) keep = 0;
      const AtomList gone(now.dims[d].atoms.begin() + static_cast<std::ptrdiff_t>(keep),
                          now.dims[d].atoms.end());
      now.dims[d].atoms.resize(keep);
      if (keep == 0) now.dims[d].zigzag = 0;
      emit(CollectiveKind::all_gather, mask_of(gone));
      changed = true;
    }
  }
  halo = 0;
  for (std::size_t d = 0; d < rank; ++d) {
    PARTITA_ASSERT(same_atoms(now.dims[d], to.dims[d]), "reshard did not reach its goal");
    if (to.dims[d].kind == SplitKind::window)
      halo = static_cast<AtomMask>(halo | mask_of(to.dims[d].atoms));
  }
  if (halo != 0 && !(now == to)) {
    now = to;
    emit(CollectiveKind::halo_exchange, halo);
  }
  PARTITA_ASSERT(now.partial == to.partial, "reshard leaves a sum owed");
  return steps;
}

}  // namespace partita
