#include "simulator/lower/startup.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>

#include "base/error.h"

namespace partita {
namespace {

constexpr std::array kForms{Startup::each, Startup::broadcast, Startup::sharded_read};

/// State of a stage that training expects to be there: parameters, not what lives in their memory.
std::vector<BufferId> parameters_of(const Program& p, std::size_t stage) {
  std::set<BufferId> found;
  std::set<BlockId> blocks;
  for (const BlockCall& call : p.stages[stage]) blocks.insert(call.block);
  for (const BlockId b : blocks) {
    for (const Instruction& i : p.blocks[b.index()].instructions) {
      const auto note = [&](BufferId id) {
        const Buffer& x = p.buffer(id);
        if (x.category == Category::parameters && x.parameter >= 0 && x.alias < 0 &&
            x.scope == Scope::step)
          found.insert(id);
      };
      for_each_read(i, note);
      for_each_write(i, note);
    }
  }
  return {found.begin(), found.end()};
}

class Writer {
 public:
  Writer(Program& p, Block& block) : p_(p), block_(block) {}

  BufferId working(BufferId like, Layout layout) {
    Buffer b = p_.buffer(like);
    b.category = Category::workspace;
    b.layout = std::move(layout);
    b.parameter = p_.buffer(like).parameter;
    p_.buffers.push_back(std::move(b));
    const BufferId id{p_.buffers.size() - 1};
    allocated_.push_back(id);
    Instruction i;
    i.kind = Kind::allocate;
    i.writes = {id};
    block_.instructions.push_back(std::move(i));
    return id;
  }
  void kernel(Kernel k, BufferId to) {
    Instruction i;
    i.kind = Kind::compute;
    i.kernel = k;
    i.writes = {to};
    block_.instructions.push_back(std::move(i));
  }
  void collective(CollectiveKind kind, AtomMask atoms, BufferId from, BufferId to) {
    Instruction i;
    i.kind = Kind::collective;
    i.collective = kind;
    i.atoms = atoms;
    i.stream = 1;
    i.reads = {from};
    i.writes = {to};
    block_.instructions.push_back(std::move(i));
  }
  void slice(BufferId from, BufferId to) {
    Instruction i;
    i.kind = Kind::slice;
    i.reads = {from};
    i.writes = {to};
    block_.instructions.push_back(std::move(i));
  }
  void free() {
    if (allocated_.empty()) return;
    Instruction i;
    i.kind = Kind::free;
    i.reads = std::move(allocated_);
    allocated_.clear();
    block_.instructions.push_back(std::move(i));
  }

 private:
  Program& p_;
  Block& block_;
  std::vector<BufferId> allocated_;
};

}  // namespace

std::string_view name(Startup form) {
  constexpr std::array<std::string_view, 3> names{"each", "broadcast", "sharded-read"};
  return names[static_cast<std::size_t>(form)];
}

Startup parse_startup(std::string_view text, const std::string& place) {
  for (const Startup form : kForms) {
    if (name(form) == text) return form;
  }
  throw InputError(
      place, fmt::format("'{}' is no form of start-up; use each, broadcast or sharded-read", text));
}

Program startup_program(const Program& training, Startup form) {
  Program p = training;
  p.startup = true;
  p.blocks.clear();
  p.operators.clear();
  p.ties.clear();
  p.loss_tensor = -1;
  p.micro_batches = 1;
  p.streams = {"compute", "start"};
  AtomMask all = 0;  // ranks of a stage that train one model
  for (std::size_t a = 0; a < p.mesh.atoms.size(); ++a) {
    const AtomMask atom = bit(static_cast<AtomId>(a));
    if ((atom & (p.replicas | mask_of(p.pipeline))) == 0) all = static_cast<AtomMask>(all | atom);
  }
  for (std::size_t stage = 0; stage < p.stages.size(); ++stage) {
    Block block;
    block.name = fmt::format("start-up {}", stage);
    block.kind = BlockKind::start;
    block.stage = static_cast<int>(stage);
    block.chunk = -1;
    const bool role = static_cast<int>(stage) >= p.pipeline_stages();
    for (const BufferId to : parameters_of(training, stage)) {
      const Layout layout = p.buffer(to).layout;
      const bool alone = role || layout.root != 0 || p.buffer(to).host;
      Writer w(p, block);
      const AtomMask copies = static_cast<AtomMask>(all & ~split_atoms(layout));
      if (form == Startup::broadcast && !alone && p.mesh.size(all) > 1) {
        Layout one, whole;
        one.dims.resize(layout.dims.size());
        whole.dims.resize(layout.dims.size());
        one.root = all;
        const BufferId first = w.working(to, one);
        w.kernel(Kernel::initialise, first);
        if (layout == whole) {
          w.collective(CollectiveKind::broadcast, all, first, to);
        } else {
          BufferId at = w.working(to, whole);
          w.collective(CollectiveKind::broadcast, all, first, at);
          Layout cut = layout;
          cut.flat = {};
          if (!layout.flat.empty() && !(cut == whole)) {
            const BufferId local = w.working(to, cut);
            w.slice(at, local);
            at = local;
          }
          w.slice(at, to);
        }
      } else if (form == Startup::sharded_read && !alone && p.mesh.size(copies) > 1) {
        Layout part = layout;
        for (std::size_t a = 0; a < p.mesh.atoms.size(); ++a) {
          if (has(copies, static_cast<AtomId>(a))) part.flat.push_back(static_cast<AtomId>(a));
        }
        const BufferId own = w.working(to, part);
        w.kernel(Kernel::read, own);
        w.collective(CollectiveKind::all_gather, copies, own, to);
      } else {
        w.kernel(form == Startup::sharded_read ? Kernel::read : Kernel::initialise, to);
      }
      w.free();
    }
    p.stages[stage] = {{BlockId{p.blocks.size()}, -1}};
    p.blocks.push_back(std::move(block));
  }
  return p;
}

}  // namespace partita
