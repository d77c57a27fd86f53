#include <fmt/format.h>

#include "runtime/execute/executor.h"

namespace partita::execute {
namespace {

std::string in_words(const Program& p, const Instruction& i) {
  const auto buffer = [&] {
    const auto& list = i.reads.empty() ? i.writes : i.reads;
    return list.empty() ? std::string() : " of " + p.buffer(list[0]).name;
  };
  if (i.kind == Kind::collective) return std::string(name(i.collective)) + buffer();
  if (i.kind != Kind::compute) return std::string(name(i.kind)) + buffer();
  if (i.op < 0) return std::string(name(i.kernel)) + buffer();
  const auto& op = p.operators[static_cast<std::size_t>(i.op)];
  return fmt::format("{} of {}", name(i.kernel), op.name);
}

}  // namespace

std::string place(const Program& p, int rank, std::int64_t step, std::int64_t instruction) {
  if (step < 0) return "the start";
  if (instruction < 0) return fmt::format("the start of step {}", step);
  std::int64_t left = instruction;
  for (const BlockCall& call : p.stages[static_cast<std::size_t>(p.stage_of(rank))]) {
    const Block& block = p.blocks[call.block.index()];
    const auto n = static_cast<std::int64_t>(block.instructions.size());
    if (left >= n) {
      left -= n;
      continue;
    }
    return fmt::format(
        "step {}, {} in block {}{}", step,
        in_words(p, block.instructions[static_cast<std::size_t>(left)]), block.name,
        call.micro_batch >= 0 ? fmt::format(", micro-batch {}", call.micro_batch) : "");
  }
  return fmt::format("the end of step {}", step);
}

}  // namespace partita::execute
