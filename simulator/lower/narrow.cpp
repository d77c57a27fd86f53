#include "simulator/lower/lowering.h"

namespace partita::lowering {

void Lowering::mark_casts() {
  for (Block& block : p_.blocks) {
    std::set<BufferId> narrow;
    std::map<BufferId, Instruction*> norms;
    for (Instruction& i : block.instructions) {
      if (i.kind == Kind::collective && i.reads.size() == 1 && i.writes.size() == 1 &&
          i.collective != CollectiveKind::reduce_scatter && narrow.count(i.reads[0]) > 0) {
        narrow.insert(i.writes[0]);
        if (const auto n = norms.find(i.reads[0]); n != norms.end()) norms[i.writes[0]] = n->second;
      }
      if (i.kind != Kind::compute || i.op < 0) continue;
      if (i.kernel == Kernel::forward &&
          std::holds_alternative<Normalize>(
              p_.operators[static_cast<std::size_t>(i.op)].operation)) {
        narrow.insert(i.writes[0]);
        norms[i.writes[0]] = &i;
      }
      const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
      if (bits(op.compute) > 8) continue;
      const bool forward = i.kernel == Kernel::forward;
      if (!forward && i.kernel != Kernel::backward_data && i.kernel != Kernel::backward_weight)
        continue;
      const auto& operands = forward ? i.reads : i.gradients;
      i.casts = !operands.empty() && operands[0].valid() && narrow.insert(operands[0]).second;
      if (operands.empty() || !plan_.kernels.finds_scales || !has_tensor_scale(op.compute))
        continue;
      if (const auto n = norms.find(operands[0]); n != norms.end())
        n->second->casts = true, n->second->cast_type = op.compute;
    }
  }
}

void Lowering::keep_narrow() {
  std::vector<char> made(p_.buffers.size(), 0), wide(made);
  std::vector<int> narrow(p_.buffers.size(), 0);  // bits
  for (const Block& block : p_.blocks) {
    if (block.kind == BlockKind::forward) {
      for (const Instruction& i : block.instructions)
        for_each_write(i, [&](BufferId id) { made[id.index()] = 1; });
    }
    if (block.kind != BlockKind::backward && block.kind != BlockKind::backward_weight) continue;
    // From the end: what is gathered again is wanted as what it is gathered for.
    for (auto i = block.instructions.rbegin(); i != block.instructions.rend(); ++i) {
      int width = 0;
      if (i->kind != Kind::compute) {
        for_each_write(*i, [&](BufferId id) {
          if (wide[id.index()] == 0) width = std::max(width, narrow[id.index()]);
        });
      } else if (i->kernel == Kernel::backward_weight) {
        const int own =
            static_cast<int>(bits(p_.operators[static_cast<std::size_t>(i->op)].compute));
        width = own <= 8 ? own : 0;
      }
      for_each_read(*i, [&](BufferId id) {
        const bool operand = i->kind != Kind::compute ||
                             std::find(i->reads.begin(), i->reads.end(), id) != i->reads.end();
        if (width > 0 && operand)
          narrow[id.index()] = width;
        else
          wide[id.index()] = 1;
      });
    }
  }
  for (std::size_t k = 0; k < p_.buffers.size(); ++k) {
    Buffer& b = p_.buffers[k];
    if (made[k] == 0 || narrow[k] == 0 || b.category != Category::activations ||
        b.scope != Scope::micro_batch || b.alias >= 0 || b.element_bytes > 0)
      continue;
    b.kept_bits = narrow[k] + (wide[k] != 0 ? static_cast<int>(bits(b.type)) : 0);
  }
}

void Lowering::gather_narrow() {
  const AtomMask tp = mask_of(plan_.axes.at("tp"));
  struct Readers {
    int bits = 0, sides = 0;  // sides: 1 rows, 2 columns
    bool wide = false;
    bool operator==(const Readers&) const = default;
  };
  std::vector<Readers> readers(p_.buffers.size());
  const auto passes_on = [](const Instruction& i) {
    return (i.kind == Kind::collective && i.reads.size() == i.writes.size() &&
            (i.collective == CollectiveKind::all_gather ||
             i.collective == CollectiveKind::shift)) ||
           i.kind == Kind::slice;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (auto block = p_.blocks.rbegin(); block != p_.blocks.rend(); ++block) {
      for (auto i = block->instructions.rbegin(); i != block->instructions.rend(); ++i) {
        const auto note = [&](BufferId id, const Readers& by) {
          Readers& r = readers[id.index()];
          const Readers all{std::max(r.bits, by.bits), r.sides | by.sides, r.wide || by.wide};
          changed |= !(all == r);
          r = all;
        };
        if (passes_on(*i)) {
          for (std::size_t k = 0; k < i->reads.size(); ++k)
            note(i->reads[k], readers[i->writes[std::min(k, i->writes.size() - 1)].index()]);
          continue;
        }
        Readers product;
        if (i->kind == Kind::compute && i->op >= 0 &&
            (i->kernel == Kernel::forward || i->kernel == Kernel::backward_data ||
             i->kernel == Kernel::backward_weight)) {
          const int own =
              static_cast<int>(bits(p_.operators[static_cast<std::size_t>(i->op)].compute));
          if (own <= 8) product = {own, i->kernel == Kernel::backward_weight ? 2 : 1, false};
        }
        for_each_read(*i, [&](BufferId id) {
          const auto in = [&](const std::vector<BufferId>& list) {
            return std::find(list.begin(), list.end(), id) != list.end();
          };
          const bool operand = product.bits > 0 && (in(i->reads) || in(i->gradients));
          note(id, operand ? product : Readers{0, 0, true});
        });
      }
    }
  }
  const bool blocks = plan_.precision.compute != ElementType::fp8;
  for (Block& block : p_.blocks) {
    for (Instruction& i : block.instructions) {
      if (i.kind != Kind::collective || !passes_on(i) || (i.atoms & ~tp) != 0) continue;
      Readers all;
      for (const BufferId id : i.writes) {
        const Readers& r = readers[id.index()];
        all = {std::max(all.bits, r.bits), all.sides | r.sides, all.wide || r.wide};
      }
      if (all.wide || all.bits == 0) continue;
      const int sent = all.bits * (blocks && all.sides == 3 ? 2 : 1);
      if (sent < static_cast<int>(bits(p_.buffer(i.reads[0]).type))) i.sent_bits = sent;
    }
  }
}

}  // namespace partita::lowering
