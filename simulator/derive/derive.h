// simulator/derive/derive.h: from shardings of iteration dimensions to layouts, partial sums,
// reshards.
//
// One rule gives every case (docs/derivation.md): an operand is split by the cuts of the iteration
// dimensions that index it, and replicated over the other cuts. A value computed by the operator -
// an output, or the gradient of an operand - is partial over every cut of an iteration dimension
// that does not index it.
#pragma once

#include <span>
#include <vector>

#include "simulator/plan/plan.h"

namespace partita {

struct OperatorLayouts {
  Signature signature;         ///< at one global micro-batch
  std::vector<DimSplit> cuts;  ///< per iteration dimension
  /// Attention whose keys and values go round a ring: inputs 1 and 2 stay cut, parts pass by.
  bool ring = false;
  AtomMask root = 0;                        ///< runs only where these coordinates are 0
  std::vector<Layout> inputs;               ///< required
  std::vector<Layout> parameters;           ///< required
  std::vector<Layout> outputs;              ///< as computed, partial sums included
  std::vector<Layout> output_gradients;     ///< required
  std::vector<Layout> input_gradients;      ///< as computed
  std::vector<Layout> parameter_gradients;  ///< as computed
  std::vector<Layout> extras;
};

/// Which iteration dimensions of one operator are cut, by the plan's rules in order.
/// `head_word`: what messages call attention's heads.
Feasible<std::vector<DimSplit>> cuts_of(const Plan& plan, const Operator& op, const Signature& s,
                                        const std::string& head_word);

/// `before`: of the operators before `op`, in order. What all summands of an Add owe alike, made in
/// its own layer, is not repaired before it: a sum of sums is a sum.
Feasible<OperatorLayouts> derive(const Graph& graph, const Plan& plan, OpId op,
                                 std::int64_t samples, std::span<const OperatorLayouts> before);

struct ReshardStep {
  bool slice = false;  ///< local; else `collective` over `atoms`
  CollectiveKind collective = CollectiveKind::all_reduce;
  AtomMask atoms = 0;
  Layout to;
};

/// Turns what ranks hold as `from` into `to`: undo halos, cut what is replicated, scatter and
/// reduce partial sums, move cuts between dimensions (all-to-all), gather, add halos - in this
/// order, which never moves more bytes than reducing and gathering everything would. `to.partial`
/// must be within `from.partial`.
std::vector<ReshardStep> reshard(const Layout& from, const Layout& to);

/// `layout` with nothing owed.
Layout without_partial(Layout layout);
/// Same tensor with windows turned into the block splits they come from.
Layout without_windows(Layout layout);

}  // namespace partita
