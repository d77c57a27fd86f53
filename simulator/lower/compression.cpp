#include "simulator/lower/lowering.h"

namespace partita::lowering {

std::pair<std::int64_t, std::int64_t> Lowering::matrix_of(ParameterId q, const Layout& l) const {
  const Shape& shape = graph_.parameter(q).shape;
  if (shape.size() < 2) return {0, 0};
  const std::int64_t rows = local_extent(p_.mesh, l.dims[0], shape[0].extent, 0);
  return {rows, local_elements(p_.mesh, l, shape, false, 0, 0) / std::max<std::int64_t>(1, rows)};
}

bool Lowering::compresses(ParameterId q, AtomMask owed) const {
  if (plan_.compression.kind == CompressionKind::none || (owed & data_parallel()) == 0 ||
      has_ties(q))
    return false;
  if (plan_.compression.kind != CompressionKind::power_sgd) return true;
  const auto [rows, columns] = matrix_of(q, layout_anywhere(q));
  return (rows + columns) * plan_.compression.rank < rows * columns;
}

const Layout& Lowering::layout_anywhere(ParameterId q) const {
  for (const auto& here : on_stage_) {
    if (const auto it = here.find(q); it != here.end()) return it->second.layout;
  }
  throw InternalError("parameter " + graph_.parameter(q).name + " is on no stage");
}

void Lowering::append_compressed(std::vector<Instruction>& all, int stage,
                                 const std::vector<ParameterId>& list, AtomMask owed) {
  const AtomMask atoms = owed & data_parallel();
  if (owed != atoms) append_owed(all, stage, list, static_cast<AtomMask>(owed & ~atoms));
  AtomList members;
  for (const AtomId a : plan_.axes.at("dp")) {
    if (has(atoms, a)) members.push_back(a);
  }
  const std::int64_t replicas = p_.mesh.size(members);
  const Compression& c = plan_.compression;
  const bool power = c.kind == CompressionKind::power_sgd;
  const bool narrow = c.kind == CompressionKind::cast;
  // Calls of the whole bucket: short forms (PowerSGD: left factors), further ones.
  std::vector<Instruction> calls{
      reduction(atoms, power || narrow ? CollectiveKind::all_reduce : CollectiveKind::all_gather)};
  std::vector<Instruction> late{};
  Instruction right = reduction(atoms, CollectiveKind::all_reduce);
  for (const ParameterId q : list) {
    ParameterOnStage& v = on_stage(stage).at(q);
    const Parameter& parameter = graph_.parameter(q);
    Layout own = v.layout;
    own.partial = atoms;
    const auto working = [&](const char* what, Shape shape, Layout layout, ElementType type) {
      return buffer(parameter.name + what, Category::workspace, Scope::step, std::move(shape),
                    std::move(layout), type);
    };
    /// One entry for each member, together on all of them afterwards.
    const auto gathered = [&](std::size_t call, const char* what, std::int64_t width, bool whole) {
      Layout each;
      each.dims.resize(2);
      each.dims[0].atoms = members;
      const Shape shape{{Dim::sample, replicas}, {Dim::feature, width}};
      while (calls.size() <= call) calls.push_back(reduction(atoms, CollectiveKind::all_gather));
      Layout together;
      together.dims.resize(2);
      calls[call].reads.push_back(working(what, shape, each, ElementType::fp32));
      calls[call].writes.push_back(working(what, shape, together, ElementType::fp32));
      for (const BufferId id : {calls[call].reads.back(), calls[call].writes.back()})
        p_.buffers[id.index()].whole_numbers = whole;
      return std::pair{calls[call].reads.back(), calls[call].writes.back()};
    };
    Instruction compress;
    compress.kind = Kind::compute;
    compress.kernel = Kernel::compress;
    compress.atoms = atoms;
    compress.reads = {v.reduced};
    if (c.error_feedback || power) {
      compress.outputs = {buffer(parameter.name + ".kept", Category::optimizer, Scope::step,
                                 parameter.shape, own, ElementType::fp32)};
    }
    Instruction decompress = compress;
    decompress.kernel = Kernel::decompress;
    decompress.reads.clear();
    const std::int64_t n = local_elements(p_.mesh, v.layout, parameter.shape, false, 0, 0);
    switch (c.kind) {
      case CompressionKind::none:
        break;
      case CompressionKind::cast: {
        Layout summed = own;
        summed.partial = 0;
        calls[0].reads.push_back(working(".cast", parameter.shape, own, c.type));
        calls[0].writes.push_back(working(".cast", parameter.shape, summed, c.type));
        p_.buffers[calls[0].writes.back().index()].alias = calls[0].reads.back().value;
        compress.writes = {calls[0].reads.back()};
        decompress.reads = {calls[0].writes.back()};
        break;
      }
      case CompressionKind::top_k: {
        const std::int64_t k = kept_values(c, n);
        const auto values = gathered(0, ".top_values", k, false);
        const auto positions = gathered(1, ".top_positions", k, true);
        compress.writes = {values.first, positions.first};
        decompress.reads = {values.second, positions.second};
        break;
      }
      case CompressionKind::one_bit: {
        const auto signs = gathered(0, ".signs", ceil_div(n, std::int64_t{32}), true);
        const auto scale = gathered(1, ".scale", 1, false);
        compress.writes = {signs.first, scale.first};
        decompress.reads = {signs.second, scale.second};
        break;
      }
      case CompressionKind::power_sgd: {
        const auto factor = [&](const char* what, std::size_t first, std::size_t last) {
          Shape shape(parameter.shape.begin() + static_cast<std::ptrdiff_t>(first),
                      parameter.shape.begin() + static_cast<std::ptrdiff_t>(last));
          Layout l;
          l.dims.assign(v.layout.dims.begin() + static_cast<std::ptrdiff_t>(first),
                        v.layout.dims.begin() + static_cast<std::ptrdiff_t>(last));
          shape.push_back({Dim::head_feature, c.rank});
          l.dims.emplace_back();
          l.partial = atoms;
          Layout summed = l;
          summed.partial = 0;
          const auto a = working(what, shape, l, ElementType::fp32);
          const auto b = working(what, shape, summed, ElementType::fp32);
          p_.buffers[b.index()].alias = a.value;
          return std::pair{a, b};
        };
        const auto left_factor = factor(".left", 0, 1);
        const auto right_factor = factor(".right", 1, parameter.shape.size());
        calls[0].reads.push_back(left_factor.first);
        calls[0].writes.push_back(left_factor.second);
        right.reads.push_back(right_factor.first);
        right.writes.push_back(right_factor.second);
        const BufferId start = buffer(parameter.name + ".right_before", Category::optimizer,
                                      Scope::step, p_.buffer(right_factor.second).shape,
                                      p_.buffer(right_factor.second).layout, ElementType::fp32);
        p_.buffers[start.index()].parameter = q.value;
        compress.outputs.push_back(start);
        decompress.outputs.push_back(start);
        compress.writes = {left_factor.first};
        Instruction second = compress;
        second.index = 1;
        second.reads = {left_factor.second};
        second.writes = {right_factor.first};
        late.push_back(std::move(second));
        decompress.reads = {left_factor.second, right_factor.second};
        break;
      }
    }
    v.reduced = shard_buffer(q, v, ".grad_sum", 0);
    decompress.writes = {v.reduced};
    all.push_back(std::move(compress));
    decoding_[stage].push_back(std::move(decompress));
  }
  for (Instruction& i : calls) all.push_back(std::move(i));
  if (!power) return;
  auto& decoding = decoding_[stage];
  const auto first = decoding.end() - static_cast<std::ptrdiff_t>(list.size());
  late.push_back(std::move(right));
  decoding.insert(first, std::make_move_iterator(late.begin()),
                  std::make_move_iterator(late.end()));
}

}  // namespace partita::lowering
