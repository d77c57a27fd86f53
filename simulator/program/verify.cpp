#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>

#include "simulator/program/program.h"

namespace partita {
namespace {

/// Checks one collective's buffers against its kind: what the layouts must differ by.
std::string layout_error(const Program& p, const Instruction& i, const Buffer& from,
                         const Buffer& to) {
  const Layout &a = from.layout, &b = to.layout;
  const AtomMask atoms = i.atoms;
  const auto say = [&](const std::string& rule) {
    return fmt::format("{} of {} {}: {} -> {}", name(i.collective), from.name, rule,
                       text(p.mesh, a, from.shape), text(p.mesh, b, to.shape));
  };
  if (elements(from.shape) != elements(to.shape)) return say("changes the shape");
  const AtomMask split_a = split_atoms(a), split_b = split_atoms(b);
  switch (i.collective) {
    case CollectiveKind::all_reduce:
      if (i.tie >= 0) return a == b ? "" : say("over tied stages must keep the layout");
      if ((a.partial & atoms) != atoms || b.partial != (a.partial & ~atoms))
        return say("must pay exactly what is owed");
      if (split_a != split_b) return say("must keep the cuts");
      return "";
    case CollectiveKind::all_gather:
      if ((split_a & atoms) != atoms || split_b != (split_a & ~atoms))
        return say("must undo exactly the cuts of its group");
      return a.partial == b.partial ? "" : say("must not touch what is owed");
    case CollectiveKind::reduce_scatter:
      if ((a.partial & atoms) != atoms || b.partial != (a.partial & ~atoms))
        return say("must pay exactly what is owed");
      return split_b == (split_a | atoms) ? "" : say("must add exactly the cuts of its group");
    case CollectiveKind::all_to_all:
      return split_a == split_b && (split_a & atoms) == atoms && a.partial == b.partial
                 ? ""
                 : say("must move cuts");
    case CollectiveKind::halo_exchange:
      return split_a == split_b && a.partial == b.partial ? "" : say("must keep the cuts");
    case CollectiveKind::shift: {
      Layout next = a;
      for (DimSplit& d : next.dims) {
        if (const auto before = atoms_before(d.atoms, atoms)) {
          d.shift = (d.shift + 1) % static_cast<std::int32_t>(p.mesh.size(atoms));
          d.fixed = d.shift == 0 ? 0 : *before;
        }
      }
      return !(next == a) && next == b ? "" : say("must pass every part to the next rank");
    }
    // With a root: one rank of the group has, or gets, what `root` says.
    case CollectiveKind::broadcast:
      return (a.root & atoms) == atoms && b.root == (a.root & ~atoms) && split_a == split_b &&
                     a.partial == b.partial
                 ? ""
                 : say("must give all what the first has");
    case CollectiveKind::reduce:
      return (a.partial & atoms) == atoms && b.partial == (a.partial & ~atoms) &&
                     b.root == (a.root | atoms) && split_a == split_b
                 ? ""
                 : say("must pay to the first what is owed");
    case CollectiveKind::scatter:
      return (a.root & atoms) == atoms && b.root == (a.root & ~atoms) &&
                     split_b == (split_a | atoms) && a.partial == b.partial
                 ? ""
                 : say("must give each its cut of what the first has");
    case CollectiveKind::gather:
      return (split_a & atoms) == atoms && split_b == (split_a & ~atoms) &&
                     b.root == (a.root | atoms) && a.partial == b.partial
                 ? ""
                 : say("must bring all cuts to the first");
  }
  return "";
}

/// Checks one operand against its operator: cut as the operator's loops are, nothing owed but
/// `passed_on`, what a sum of sums owes.
std::string operand_error(const Program& p, const ProgramOperator& op, const Operand& operand,
                          BufferId id, bool part, AtomMask passed_on = 0) {
  const bool ring = part && std::holds_alternative<Attention>(op.operation);
  if (!id.valid()) return "";
  const Buffer& b = p.buffer(id);
  if (b.layout.partial != 0 && passed_on == 0)
    return fmt::format("reads {}, a sum that is still owed", b.name);
  if (b.layout.partial != passed_on)
    return fmt::format("adds {}, which does not owe what the sum owes", b.name);
  for (std::size_t d = 0; d < operand.dims.size() && d < b.layout.dims.size(); ++d) {
    const DimSplit none;
    const auto dim = static_cast<std::size_t>(operand.dims[d]);
    // Keys of a ring are cut as the queries are, and pass by.
    const bool rings =
        ring && operand.dims[d] >= 0 && op.signature.dims[dim].dim == Dim::key_sequence;
    const DimSplit& cut = operand.dims[d] < 0 ? none
                          : rings
                              ? op.cuts[static_cast<std::size_t>(op.signature.find(Dim::sequence))]
                              : op.cuts[dim];
    // A product with parts of the sequence gets them one by one.
    if (part && !ring && b.shape[d].dim == Dim::sequence) continue;
    if (b.layout.dims[d].atoms != cut.atoms || b.layout.dims[d].zigzag != cut.zigzag) {
      return fmt::format("takes {} as {}, which is not how {} is cut", b.name,
                         text(p.mesh, b.layout, b.shape), op.name);
    }
  }
  return "";
}

struct Walker {
  const Program& p;
  std::vector<std::string> errors;

  void say(const Block& block, std::size_t at, const std::string& what) {
    if (errors.size() < 20)
      errors.push_back(fmt::format("{}, instruction {}: {}", block.name, at, what));
  }

  bool ids_in_range() {
    const auto n = static_cast<std::int32_t>(p.buffers.size());
    for (std::size_t s = 0; s < p.stages.size(); ++s) {
      for (const BlockCall& call : p.stages[s]) {
        if (call.block.value < 0 || call.block.index() >= p.blocks.size() ||
            call.micro_batch < -1 || call.micro_batch >= p.micro_batches) {
          errors.push_back(fmt::format("stage {} calls block {} for micro-batch {}", s,
                                       call.block.value, call.micro_batch));
        }
      }
    }
    for (const Buffer& b : p.buffers) {
      if (b.alias >= n) errors.push_back(fmt::format("buffer {} lives nowhere", b.name));
      if (b.layout.dims.size() != b.shape.size()) {
        errors.push_back(fmt::format("buffer {}: {} cuts for {} dimensions", b.name,
                                     b.layout.dims.size(), b.shape.size()));
      }
    }
    for (const Block& b : p.blocks) {
      for (std::size_t k = 0; k < b.instructions.size(); ++k) {
        const Instruction& i = b.instructions[k];
        bool good = i.op >= -1 && i.op < static_cast<std::int32_t>(p.operators.size());
        good &= i.stream < p.streams.size();
        good &= i.tie >= -1 && i.tie < static_cast<std::int32_t>(p.ties.size());
        const auto check = [&](const std::vector<BufferId>& list) {
          for (const BufferId id : list) good &= id.value >= -1 && id.value < n;
        };
        check(i.reads), check(i.parameters), check(i.outputs), check(i.gradients),
            check(i.statistics);
        check(i.backward_statistics), check(i.extras), check(i.writes);
        good &= i.kind != Kind::compute || i.op >= 0 || !of_operator(i.kernel);
        if (!good) say(b, k, "an id is out of range");
        if (good && i.kind == Kind::compute) operands(b, k, i);
        if (i.kind == Kind::collective) {
          if (i.reads.size() != i.writes.size() || i.reads.empty()) {
            say(b, k, "a collective needs as many sources as results");
            continue;
          }
          if (i.tie < 0 && p.mesh.size(i.atoms) < 2) say(b, k, "a collective over one rank");
          if (i.tie < 0 && (i.atoms & mask_of(p.pipeline)) != 0)
            say(b, k, "a collective across stages, which run different programs");
          if (!good) continue;
          for (std::size_t x = 0; x < i.reads.size(); ++x) {
            const std::string e = layout_error(p, i, p.buffer(i.reads[x]), p.buffer(i.writes[x]));
            if (!e.empty()) say(b, k, e);
          }
        }
        if ((i.kind == Kind::send || i.kind == Kind::receive) &&
            (i.stage < 0 || i.stage >= p.stage_count())) {
          say(b, k, fmt::format("stage {} does not exist", i.stage));
          good = false;
        }
        if (good && i.kind == Kind::copy) {
          const Buffer &from = p.buffer(i.reads[0]), &to = p.buffer(i.writes[0]);
          if (!(from.layout == to.layout) || from.shape != to.shape)
            say(b, k, fmt::format("copies {} as another layout", from.name));
          if (!from.host && !to.host)
            say(b, k, fmt::format("copies {} from device to device", from.name));
        }
        if (good && i.kind == Kind::slice) {
          const Layout &from = p.buffer(i.reads[0]).layout, &to = p.buffer(i.writes[0]).layout;
          if ((split_atoms(from) & ~split_atoms(to)) != 0 || from.partial != to.partial)
            say(b, k, "a slice can only cut");
        }
      }
    }
    return errors.empty();
  }

  void operands(const Block& block, std::size_t at, const Instruction& i) {
    if (i.kernel == Kernel::optimizer) {
      const Buffer& g = p.buffer(i.reads[0]);
      if (g.layout.partial != 0) {
        say(block, at,
            fmt::format("updates {} from {}, a sum that is still owed", p.buffer(i.writes[0]).name,
                        g.name));
      }
    }
    if (i.op < 0) return;
    const ProgramOperator& op = p.operators[static_cast<std::size_t>(i.op)];
    const auto check = [&](const std::vector<BufferId>& list, const std::vector<Operand>& wanted,
                           AtomMask passed_on = 0) {
      for (std::size_t k = 0; k < list.size() && k < wanted.size(); ++k) {
        const std::string e = operand_error(p, op, wanted[k], list[k], i.part >= 0, passed_on);
        if (!e.empty()) say(block, at, e);
      }
    };
    const bool weight = i.kernel == Kernel::backward_weight;
    for (std::size_t k = 0; k < op.signature.parameters.size(); ++k) {
      if ((i.part >= 0 && std::holds_alternative<Attention>(op.operation)) ||
          (weight && !op.signature.parameters[k].saved_for_weight))
        continue;
      if (k >= i.parameters.size() || !i.parameters[k].valid())
        say(block, at, fmt::format("{} of {} lacks parameter {}", name(i.kernel), op.name, k));
    }
    const bool sums = i.kernel == Kernel::forward && std::holds_alternative<Add>(op.operation);
    check(i.reads, op.signature.inputs, sums ? p.buffer(i.writes.at(0)).layout.partial : 0);
    check(i.parameters, op.signature.parameters);
    check(i.outputs, op.signature.outputs);
    check(i.gradients, op.signature.outputs);
  }

  /// Life of every buffer on one stage, in program order.
  void lives(int stage) {
    enum : char { absent, allocated, written };
    std::map<std::pair<BufferId, int>, char> state;
    std::set<std::pair<BufferId, int>> values;
    std::map<std::pair<BufferId, int>, BufferId> holds;  // by memory: whose values are in it
    const auto persistent = [&](BufferId id) {
      const Buffer& b = p.buffer(p.memory_of(id));
      return b.scope == Scope::step && b.category != Category::workspace;
    };
    for (const BlockCall& call : p.stages[static_cast<std::size_t>(stage)]) {
      const Block& block = p.blocks[call.block.index()];
      if (block.stage != stage) say(block, 0, fmt::format("is called on stage {}", stage));
      for (std::size_t k = 0; k < block.instructions.size(); ++k) {
        const Instruction& i = block.instructions[k];
        const auto key = [&](BufferId id) {
          return std::pair{id, p.buffer(id).scope == Scope::step ? -1 : call.micro_batch};
        };
        const auto life = [&](BufferId id) -> char& { return state[key(p.memory_of(id))]; };
        if (i.kind == Kind::allocate) {
          for (const BufferId id : i.writes) {
            if (life(id) != absent)
              say(block, k, fmt::format("allocates {} twice", p.buffer(id).name));
            life(id) = allocated;
          }
          continue;
        }
        if (i.kind == Kind::free) {
          for (const BufferId id : i.reads) {
            if (life(id) == absent)
              say(block, k, fmt::format("frees {} which is not there", p.buffer(id).name));
            life(id) = absent;
          }
          continue;
        }
        for_each_read(i, [&](BufferId id) {
          if (!persistent(id) && life(id) == absent)
            say(block, k, fmt::format("reads {} which is not there", p.buffer(id).name));
          const bool state_value = p.buffer(id).category == Category::parameters ||
                                   p.buffer(id).category == Category::optimizer;
          const bool own = p.buffer(id).alias < 0;
          if (!(persistent(id) && state_value && own) && values.count(key(id)) == 0) {
            say(block, k, fmt::format("reads {} before it is written", p.buffer(id).name));
          }
          const auto holder = holds.find(key(p.memory_of(id)));
          if (holder != holds.end() && holder->second != id) {
            say(block, k,
                fmt::format("reads {}, which {} has overwritten in place", p.buffer(id).name,
                            p.buffer(holder->second).name));
          }
        });
        for_each_write(i, [&](BufferId id) {
          if (!persistent(id) && life(id) == absent)
            say(block, k, fmt::format("writes {} which is not there", p.buffer(id).name));
          values.insert(key(id));
          holds[key(p.memory_of(id))] = id;
        });
      }
    }
    for (const auto& [key, alive] : state) {
      if (alive != absent)
        errors.push_back(
            fmt::format("stage {}: {} is never freed", stage, p.buffer(key.first).name));
      if (errors.size() > 20) return;
    }
  }

  /// Runs all stages against each other: every receive finds its send, every tie all its stages.
  void meetings() {
    struct At {
      std::size_t call = 0, instruction = 0;
    };
    std::vector<At> at(p.stages.size());
    std::map<std::tuple<int, int, int, int>, std::deque<BufferId>>
        mail;  // message, micro-batch, from, to
    std::map<std::pair<int, std::int64_t>, std::set<int>> ties;
    std::vector<std::map<int, std::int64_t>> tie_count(p.stages.size());
    for (bool moved = true; moved;) {
      moved = false;
      for (std::size_t s = 0; s < p.stages.size(); ++s) {
        const int stage = static_cast<int>(s);
        for (bool blocked = false; !blocked && at[s].call < p.stages[s].size();) {
          const BlockCall& call = p.stages[s][at[s].call];
          const Block& block = p.blocks[call.block.index()];
          if (at[s].instruction == block.instructions.size()) {
            at[s] = {at[s].call + 1, 0};
            continue;
          }
          const Instruction& i = block.instructions[at[s].instruction];
          // A role's messages with the other ranks of a stage are like those with the first.
          const bool again = (i.kind == Kind::send || i.kind == Kind::receive) && i.peer > 0;
          if (again) {
          } else if (i.kind == Kind::send) {
            mail[{i.index, p.instance_of(i, call.micro_batch), stage, i.stage}].push_back(
                i.reads[0]);
          } else if (i.kind == Kind::receive) {
            auto& box = mail[{i.index, p.instance_of(i, call.micro_batch), i.stage, stage}];
            if (box.empty()) {
              blocked = true;
              continue;
            }
            const Buffer &from = p.buffer(box.front()), &to = p.buffer(i.writes[0]);
            if (!(from.layout == to.layout) || from.shape != to.shape) {
              say(block, at[s].instruction,
                  fmt::format("receives {} as another layout than it was sent", to.name));
            }
            box.pop_front();
          } else if (i.kind == Kind::collective && i.tie >= 0) {
            const auto& members = p.ties[static_cast<std::size_t>(i.tie)];
            if (std::find(members.begin(), members.end(), stage) == members.end()) {
              say(block, at[s].instruction,
                  fmt::format("stage {} reduces a tied parameter of other stages", stage));
              ++at[s].instruction;
              moved = true;
              continue;
            }
            auto& here = ties[{i.tie, tie_count[s][i.tie]}];
            here.insert(stage);
            if (here.size() < members.size()) {
              blocked = true;
              continue;
            }
            ++tie_count[s][i.tie];
          }
          ++at[s].instruction;
          moved = true;
        }
      }
    }
    for (std::size_t s = 0; s < p.stages.size(); ++s) {
      if (at[s].call == p.stages[s].size()) continue;
      const Block& block = p.blocks[p.stages[s][at[s].call].block.index()];
      const Instruction& i = block.instructions[at[s].instruction];
      say(block, at[s].instruction,
          fmt::format("stage {} waits forever for a {} of {}", s, name(i.kind),
                      p.buffer(i.kind == Kind::receive ? i.writes[0] : i.reads[0]).name));
    }
    for (const auto& [key, box] : mail) {
      if (!box.empty())
        errors.push_back(fmt::format("{} is sent from stage {} and never received",
                                     p.buffer(box.front()).name, std::get<2>(key)));
      if (errors.size() > 20) return;
    }
  }
};

}  // namespace

std::vector<std::string> verify(const Program& program) {
  Walker w{program, {}};
  if (!w.ids_in_range()) return w.errors;
  for (int s = 0; s < program.stage_count(); ++s) w.lives(s);
  w.meetings();
  return w.errors;
}

}  // namespace partita
