#include <fmt/format.h>

#include "simulator/lower/lowering.h"

namespace partita::lowering {

void Lowering::from_loader(Block& block, std::vector<Version>& have, TensorId t) {
  const AtomList& dp = plan_.axes.at("dp");
  Layout layout;
  layout.dims.resize(graph_.tensor(t).shape.size());
  layout.dims[0].atoms = dp;  // samples come first
  for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
    const AtomMask atom = bit(static_cast<AtomId>(a));
    if ((atom & (mask_of(dp) | mask_of(p_.pipeline))) == 0)
      layout.root = static_cast<AtomMask>(layout.root | atom);
  }
  if (plan_.replicas != 0) layout.dims[0].atoms.clear();  // every replica has all its samples
  const BufferId b = tensor_buffer(t, layout);
  const int id = message(t, block.chunk, false);
  transfer(block, Kind::receive, b, stages_, id, false);
  from_loader_[block.chunk].push_back({t, layout, id});
  have.push_back({layout, b, -1});
}

void Lowering::loader_blocks() {
  if (!plan_.loader) return;
  p_.roles.push_back({"loader", plan_.axes.at("dp")});
  std::vector<BlockId> blocks;
  for (const auto& [chunk, list] : from_loader_) {
    Block block;
    block.name = fmt::format("load {}", chunk);
    block.kind = BlockKind::forward;
    block.chunk = chunk;
    block.stage = stages_;
    for (const FromLoader& f : list) {
      Instruction i;
      i.kind = Kind::load;
      if (plan_.sharded_storage) i.stream = stream("storage");
      i.writes = {tensor_buffer(f.tensor, f.layout)};
      for (std::size_t k = 0; k < p_.inputs.size(); ++k) {
        if (p_.inputs[k].tensor == f.tensor.value) i.index = static_cast<std::int32_t>(k);
      }
      const BufferId made = i.writes[0];
      block.instructions.push_back(std::move(i));
      transfer(block, Kind::send, made, stage_of_chunk(chunk), f.message, false);
    }
    blocks.push_back(BlockId{p_.blocks.size()});
    p_.blocks.push_back(std::move(block));
  }
  auto& calls = p_.stages.emplace_back();
  const int copies = directions(plan_.schedule), each = p_.micro_batches / copies;
  for (int m = 0; m < each; ++m) {
    for (const BlockId b : blocks) {
      const int copy = p_.blocks[b.index()].chunk / network_chunks_;
      calls.push_back({b, copy * each + m});
    }
  }
}

void Lowering::through_queue(Block& block, Instruction i) {
  const bool sends = i.kind == Kind::send;
  const BufferId device = sends ? i.reads[0] : i.writes[0];
  const BufferId host = on_host(device, ".host", Category::buffers);
  const BufferId packed = on_host(device, ".message", Category::buffers);
  const int broker = stages_ + (plan_.loader ? 1 : 0) + static_cast<int>(plan_.servers);
  Relay& relay = relays_[i.index];
  (sends ? relay.from : relay.to) = block.stage;
  relay.message = packed;
  if (relay.out < 0) relay.out = new_message();
  if (sends) {
    block.instructions.push_back(copy(device, host));
    block.instructions.back().after_compute = true;
    block.instructions.push_back(copy(host, packed));
    i.reads = {packed};
    i.stage = broker;
    i.after_compute = false;
    block.instructions.push_back(std::move(i));
    return;
  }
  i.index = relay.out;
  i.stage = broker;
  i.writes = {packed};
  block.instructions.push_back(std::move(i));
  block.instructions.push_back(copy(packed, host));
  block.instructions.push_back(copy(host, device));
}

void Lowering::broker_blocks() {
  AtomList lanes;
  for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
    const auto atom = static_cast<AtomId>(a);
    if (!has(mask_of(p_.pipeline), atom)) lanes.push_back(atom);
  }
  const int stage = stages_ + static_cast<int>(p_.roles.size());
  p_.roles.push_back({"broker", lanes});
  std::map<int, BlockId> block_of;
  std::map<int, int> in_of;  // message behind the broker -> before it
  for (const auto& [in, relay] : relays_) {
    Block block;
    block.name = fmt::format("relay {}", p_.buffer(relay.message).name);
    block.kind = BlockKind::forward;
    block.stage = stage;
    block.chunk = -1;
    Instruction i;
    i.kind = Kind::receive;
    i.stage = relay.from;
    i.index = in;
    i.stream = stream("receive");
    i.writes = {on_host(relay.message, "", Category::buffers)};
    Instruction o = i;
    o.kind = Kind::send;
    o.stage = relay.to;
    o.index = relay.out;
    o.stream = stream("send");
    std::swap(o.reads, o.writes);
    block.instructions.push_back(std::move(i));
    block.instructions.push_back(std::move(o));
    block_of[in] = BlockId{p_.blocks.size()};
    in_of[relay.out] = in;
    p_.blocks.push_back(std::move(block));
  }
  std::vector<BlockCall> calls;
  std::set<std::pair<int, int>> relayed;
  std::vector<std::pair<std::size_t, std::size_t>> at(static_cast<std::size_t>(stages_));
  for (bool moved = true; moved;) {
    moved = false;
    for (std::size_t s = 0; s < at.size(); ++s) {
      auto& [call, k] = at[s];
      for (bool waits = false; !waits && call < p_.stages[s].size();) {
        const BlockCall& c = p_.stages[s][call];
        const auto& list = p_.blocks[c.block.index()].instructions;
        if (k == list.size()) {
          ++call, k = 0;
          continue;
        }
        const Instruction& i = list[k];
        if (i.kind == Kind::send && i.stage == stage) {
          calls.push_back({block_of.at(i.index), c.micro_batch});
          relayed.insert({i.index, c.micro_batch});
        } else if (i.kind == Kind::receive && i.stage == stage &&
                   relayed.count({in_of.at(i.index), c.micro_batch}) == 0) {
          waits = true;
          continue;
        }
        ++k;
        moved = true;
      }
    }
  }
  p_.stages.push_back(std::move(calls));
}

int Lowering::server_of(ParameterId q) {
  if (server_of_.empty()) {
    std::vector<std::int64_t> load(static_cast<std::size_t>(plan_.servers), 0);
    for (const Parameter& parameter : graph_.parameters) {
      const auto least = std::min_element(load.begin(), load.end());
      *least += elements(parameter.shape);
      server_of_.push_back(static_cast<int>(least - load.begin()));
    }
  }
  return server_of_[q.index()];
}

Instruction Lowering::message(Kind kind, BufferId b, int stage, int id, const char* stream_name) {
  Instruction i;
  i.kind = kind;
  i.stage = stage;
  i.index = id;
  i.after_compute = true;
  i.stream = stream(stream_name);
  (kind == Kind::send ? i.reads : i.writes) = {b};
  return i;
}

void Lowering::push(std::vector<Instruction>& all, int stage, const std::vector<ParameterId>& list,
                    AtomMask owed) {
  const AtomMask rest = owed & static_cast<AtomMask>(~data_parallel());
  if (rest != 0) append_owed(all, stage, list, rest);
  for (const ParameterId q : list) {
    const ParameterOnStage& v = on_stage(stage).at(q);
    const int server = server_of(q), sent = new_message();
    served_[server][q].push_back({stage, sent, new_message()});
    all.push_back(message(Kind::send, v.reduced, server_stage(server), sent, "push"));
  }
}

void Lowering::server_blocks() {
  if (plan_.servers == 0) return;
  AtomList others;
  for (std::size_t a = 0; a < p_.mesh.atoms.size(); ++a) {
    const AtomMask atom = bit(static_cast<AtomId>(a));
    if ((atom & (data_parallel() | mask_of(p_.pipeline))) == 0)
      others.push_back(static_cast<AtomId>(a));
  }
  for (int server = 0; server < static_cast<int>(plan_.servers); ++server) {
    p_.roles.push_back({fmt::format("server {}", server), others});
    Block block;
    block.name = fmt::format("serve {}", server);
    block.kind = BlockKind::step;
    block.stage = server_stage(server);
    block.chunk = -1;
    std::vector<Instruction> update, collect;
    for (const auto& [q, list] : served_[server]) serve(update, collect, q, list);
    auto& first = plan_.staleness > 0 ? update : collect;
    auto& second = plan_.staleness > 0 ? collect : update;
    for (auto* part : {&first, &second}) {
      for (Instruction& i : *part) block.instructions.push_back(std::move(i));
    }
    p_.stages.push_back({{BlockId{p_.blocks.size()}, -1}});
    p_.blocks.push_back(std::move(block));
  }
}

void Lowering::serve(std::vector<Instruction>& update, std::vector<Instruction>& collect,
                     ParameterId q, const std::vector<Served>& list) {
  const Parameter& parameter = graph_.parameter(q);
  const ParameterOnStage& worker = on_stage(list[0].stage).at(q);
  const Buffer pushed = p_.buffer(worker.reduced);
  const auto workers = static_cast<int>(plan_.dp);
  const auto like = [&](const char* suffix, Category category, Layout l) {
    return buffer(parameter.name + suffix, category, Scope::step, parameter.shape, std::move(l),
                  pushed.type);
  };
  Layout summed = pushed.layout;
  summed.partial = 0;
  Instruction sum;
  sum.kind = Kind::compute;
  sum.kernel = Kernel::add;
  for (const Served& from : list) {
    for (int w = 0; w < workers; ++w) {
      sum.reads.push_back(like(".grad_of_worker", Category::workspace, pushed.layout));
      collect.push_back(
          message(Kind::receive, sum.reads.back(), from.stage, from.push, "receive gradient"));
      collect.back().atoms = data_parallel();
      collect.back().peer = w;
    }
  }
  BufferId gradient = like(".grad", Category::workspace, summed);
  sum.writes = {gradient};
  collect.push_back(std::move(sum));
  if (plan_.staleness > 0) {
    Shape shape{{Dim::sample, plan_.staleness}};
    shape.insert(shape.end(), parameter.shape.begin(), parameter.shape.end());
    Layout l = summed;
    l.dims.insert(l.dims.begin(), 1, DimSplit{});
    const BufferId queue =
        buffer(parameter.name + ".queue", Category::optimizer, Scope::step, shape, l, pushed.type);
    Instruction i;
    i.kind = Kind::compute;
    i.outputs = {queue};
    i.kernel = Kernel::enqueue;
    i.reads = {gradient};
    collect.push_back(i);
    gradient = like(".old_grad", Category::workspace, summed);
    i.kernel = Kernel::dequeue;
    i.reads.clear();
    i.writes = {gradient};
    update.push_back(std::move(i));
  }
  const BufferId value = buffer(parameter.name, Category::parameters, Scope::step, parameter.shape,
                                worker.layout, plan_.precision.parameters);
  p_.buffers[value.index()].parameter = q.value;
  update.push_back(update_of(q, gradient, value, worker.layout));
  for (const Served& to : list) {
    for (int w = 0; w < workers; ++w) {
      update.push_back(message(Kind::send, value, to.stage, to.pull, "send parameters"));
      update.back().atoms = data_parallel();
      update.back().peer = w;
    }
  }
}

void Lowering::pull(Block& step, int stage) {
  for (const auto& [server, of_server] : served_) {
    for (const auto& [q, list] : of_server) {
      for (const Served& x : list) {
        if (x.stage == stage)
          step.instructions.push_back(message(Kind::receive, on_stage(stage).at(q).value,
                                              server_stage(server), x.pull, "pull"));
      }
    }
  }
}

}  // namespace partita::lowering
