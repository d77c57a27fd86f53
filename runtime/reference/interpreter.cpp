#include "runtime/reference/interpreter.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>

#include "base/error.h"
#include "runtime/reference/compression.h"
#include "runtime/reference/ring_attention.h"

namespace partita::reference {
namespace {

using Key = std::pair<std::int32_t, std::int32_t>;  // buffer, micro-batch (-1: step)

/// Row-major walk over index lists, giving the linear index in the whole tensor of `shape`.
template <class F>
void for_each_global(const std::vector<std::vector<std::int64_t>>& index, const Shape& shape, F f) {
  std::vector<std::size_t> at(index.size(), 0);
  for (const auto& list : index) {
    if (list.empty()) return;
  }
  for (std::size_t k = 0;; ++k) {
    std::int64_t global = 0;
    for (std::size_t d = 0; d < index.size(); ++d)
      global = global * shape[d].extent + index[d][at[d]];
    f(k, global);
    std::size_t d = index.size();
    while (d > 0 && ++at[d - 1] == index[d - 1].size()) at[--d] = 0;
    if (d == 0) return;
  }
}

class Machine {
 public:
  Machine(const Program& p, const RunOptions& o)
      : p_(p), o_(o), values_(static_cast<std::size_t>(p.ranks())) {
    for (std::int64_t r = 0; r < p.ranks(); ++r) on_stage_.emplace(p.stage_of(r), r);
  }

  RunResult run() {
    const auto replicas = static_cast<std::size_t>(p_.mesh.size(p_.replicas));
    if (!p_.startup) load_parameters();
    for (step_ = 0; step_ < o_.steps; ++step_) {
      result_.losses.emplace_back(replicas, 0.0);
      result_.gradients.assign(replicas, {});
      seen_.assign(replicas, {});
      for (std::size_t k = 0; k < replicas; ++k) {
        result_.gradients[k].resize(p_.parameters.size());
        seen_[k].resize(p_.parameters.size());
      }
      run_step();
    }
    collect_parameters(replicas);
    return std::move(result_);
  }

 private:
  std::vector<std::int64_t> ranks_of(int stage) const {
    std::vector<std::int64_t> all;
    const auto [a, b] = on_stage_.equal_range(stage);
    for (auto it = a; it != b; ++it) all.push_back(it->second);
    return all;
  }
  std::size_t replica(std::int64_t rank) const {
    AtomList list;
    for (std::size_t i = 0; i < p_.mesh.atoms.size(); ++i) {
      if (has(p_.replicas, static_cast<AtomId>(i))) list.push_back(static_cast<AtomId>(i));
    }
    return static_cast<std::size_t>(p_.mesh.coordinate(p_.place_of(rank), list));
  }

  /// Index lists of what `rank` holds of `b`, before flattening.
  std::vector<std::vector<std::int64_t>> indices(const Buffer& b, std::int64_t rank) const {
    std::vector<std::vector<std::int64_t>> all;
    for (std::size_t d = 0; d < b.shape.size(); ++d) {
      const std::int64_t extent =
          b.routed && b.shape[d].dim == Dim::expert ? b.experts : b.shape[d].extent;
      all.push_back(local_indices(p_.mesh, b.layout.dims[d], extent, p_.place_of(rank)));
    }
    return all;
  }
  std::int64_t dense_size(const Buffer& b, std::int64_t rank) const {
    std::int64_t n = 1;
    for (const auto& list : indices(b, rank)) n *= static_cast<std::int64_t>(list.size());
    return n;
  }
  Range flat_range(const Buffer& b, std::int64_t rank) const {
    Range r{0, dense_size(b, rank)};
    for (const AtomId a : b.layout.flat) {
      const Range q = part(r.size(), p_.mesh.atoms[a].size, p_.mesh.coordinate(rank, a));
      r = {r.begin + q.begin, r.begin + q.end};
    }
    return r;
  }
  bool is_first(AtomMask root, std::int64_t rank) const {
    const std::int64_t place = p_.place_of(rank);
    return p_.mesh.group_root(place, root) == place;
  }
  bool holds(BufferId id, std::int64_t rank) const {
    return is_first(p_.buffer(id).layout.root, rank);
  }
  Piece blank(const Buffer& b, std::int64_t rank) const {
    Piece piece;
    if (!b.layout.flat.empty()) {
      const Range r = flat_range(b, rank);
      piece.index.emplace_back();
      for (std::int64_t i = r.begin; i < r.end; ++i) piece.index[0].push_back(i);
      piece.values.assign(static_cast<std::size_t>(r.size()), 0.0);
      return piece;
    }
    return zeros(indices(b, rank));
  }

  Key key(BufferId id) const {
    return {id.value, p_.buffer(id).scope == Scope::step ? -1 : micro_batch_};
  }
  Piece& store(std::int64_t rank, BufferId id) {
    return values_[static_cast<std::size_t>(rank)][key(id)];
  }
  const Piece& load(std::int64_t rank, BufferId id) const {
    const auto& mine = values_[static_cast<std::size_t>(rank)];
    const auto it = mine.find(key(id));
    PARTITA_ASSERT(it != mine.end(),
                   fmt::format("rank {} reads {} before it is written", rank, p_.buffer(id).name));
    return it->second;
  }
  const Piece* optional(std::int64_t rank, BufferId id) const {
    return id.valid() ? &load(rank, id) : nullptr;
  }

  // ---- precision -----------------------------------------------------------------------------
  void round(BufferId id, Piece& piece) const {
    const Buffer& b = p_.buffer(id);
    // Buffers with a width of their own hold whole numbers, masks, or fp32 log-sum-exps.
    if (!o_.round || b.whole_numbers || (b.element_bytes != 0 && b.element_bytes != 4)) return;
    round_values(b.element_bytes == 4 ? ElementType::fp32 : b.type, piece.values.data(),
                 piece.values.size());
  }
  /// Do products of this operator take operands in their compute type? The 8- and 4-bit types are
  /// used for products with weights only, as Transformer Engine does.
  static bool casts(const ProgramOperator& op) {
    const bool narrow = bits(op.compute) <= 8;
    return narrow ? std::holds_alternative<Linear>(op.operation) ||
                        std::holds_alternative<GroupedProduct>(op.operation)
                  : is_product(op.operation);
  }

  // ---- state ---------------------------------------------------------------------------------
  void load_parameters() {
    for (std::int64_t rank = 0; rank < p_.ranks(); ++rank) {
      const int stage = p_.stage_of(rank);
      for (const BlockCall& call : p_.stages[static_cast<std::size_t>(stage)]) {
        for (const Instruction& i : p_.blocks[call.block.index()].instructions) {
          const auto fill = [&](BufferId id) {
            const Buffer& b = p_.buffer(id);
            if (b.category != Category::parameters || b.parameter < 0 || b.alias >= 0) return;
            if (!holds(id, rank)) return;
            auto& slot = values_[static_cast<std::size_t>(rank)][{id.value, -1}];
            if (slot.index.empty()) slot = initial(id, rank);
          };
          for_each_read(i, fill);
          for_each_write(i, fill);
        }
      }
    }
  }

  /// A rank's piece of a parameter's initial values.
  Piece initial(BufferId id, std::int64_t rank) const {
    const Buffer& b = p_.buffer(id);
    const Piece& whole = o_.parameters.at(replica(rank)).at(static_cast<std::size_t>(b.parameter));
    Piece piece = zeros(indices(b, rank));
    for_each_global(piece.index, b.shape, [&](std::size_t k, std::int64_t g) {
      piece.values[k] = whole.values[static_cast<std::size_t>(g)];
    });
    if (!b.layout.flat.empty()) {
      Piece shard = blank(b, rank);
      for (std::size_t k = 0; k < shard.values.size(); ++k)
        shard.values[k] = piece.values[static_cast<std::size_t>(shard.index[0][k])];
      piece = std::move(shard);
    }
    round(id, piece);
    return piece;
  }

  /// Writes a rank's piece of a whole value; copies on several ranks must agree.
  void merge(std::vector<double>& whole, std::vector<char>& seen, const Buffer& b,
             const Piece& piece, std::int64_t rank) {
    const auto n = static_cast<std::size_t>(elements(b.shape));
    whole.resize(n);
    seen.resize(n, 0);
    const auto put = [&](std::int64_t g, double v) {
      const auto at = static_cast<std::size_t>(g);
      if (seen[at]) {
        const double scale = std::max({std::abs(v), std::abs(whole[at]), 1e-12});
        result_.copies_differ = std::max(result_.copies_differ, std::abs(v - whole[at]) / scale);
      }
      whole[at] = v;
      seen[at] = 1;
    };
    if (b.layout.flat.empty()) {
      for_each_global(piece.index, b.shape,
                      [&](std::size_t k, std::int64_t g) { put(g, piece.values[k]); });
      return;
    }
    const Range r = flat_range(b, rank);
    for_each_global(indices(b, rank), b.shape, [&](std::size_t k, std::int64_t g) {
      const auto at = static_cast<std::int64_t>(k);
      if (at >= r.begin && at < r.end) put(g, piece.values[static_cast<std::size_t>(at - r.begin)]);
    });
  }

  void collect_parameters(std::size_t replicas) {
    result_.parameters.assign(replicas, std::vector<std::vector<double>>(p_.parameters.size()));
    std::vector<std::vector<std::vector<char>>> seen(
        replicas, std::vector<std::vector<char>>(p_.parameters.size()));
    for (std::int64_t rank = 0; rank < p_.ranks(); ++rank) {
      for (const auto& [k, piece] : values_[static_cast<std::size_t>(rank)]) {
        const Buffer& b = p_.buffers[static_cast<std::size_t>(k.first)];
        if (b.category != Category::parameters || b.parameter < 0 || b.alias >= 0) continue;
        const auto q = static_cast<std::size_t>(b.parameter);
        const std::size_t r = replica(rank);
        merge(result_.parameters[r][q], seen[r][q], b, piece, rank);
      }
    }
  }

  // ---- one step --------------------------------------------------------------------------------
  void run_step() {
    struct At {
      std::size_t call = 0, instruction = 0;
    };
    std::vector<At> at(p_.stages.size());
    mail_.clear();
    posted_.clear();
    bool moved = true;
    while (moved) {
      moved = false;
      for (std::size_t s = 0; s < p_.stages.size(); ++s) {
        const auto ranks = ranks_of(static_cast<int>(s));
        while (at[s].call < p_.stages[s].size()) {
          const BlockCall& call = p_.stages[s][at[s].call];
          const Block& block = p_.blocks[call.block.index()];
          if (at[s].instruction == block.instructions.size()) {
            at[s] = {at[s].call + 1, 0};
            continue;
          }
          micro_batch_ = call.micro_batch;
          if (!execute(block.instructions[at[s].instruction], static_cast<int>(s), ranks)) break;
          ++at[s].instruction;
          moved = true;
        }
      }
    }
    for (std::size_t s = 0; s < p_.stages.size(); ++s) {
      PARTITA_ASSERT(at[s].call == p_.stages[s].size(), fmt::format("stage {} waits forever", s));
    }
  }

  /// False: must wait for another stage.
  bool execute(const Instruction& i, int stage, const std::vector<std::int64_t>& ranks) {
    if ((step_ + 1) % i.every != 0) return true;
    switch (i.kind) {
      case Kind::allocate:
        return true;
      case Kind::free:
        for (const std::int64_t r : ranks) {
          for (const BufferId id : i.reads) values_[static_cast<std::size_t>(r)].erase(key(id));
        }
        return true;
      case Kind::load:
        for (const std::int64_t r : ranks) load_input(i, r);
        return true;
      case Kind::send:
        for (const std::int64_t r : ranks) {
          if (!holds(i.reads[0], r)) continue;
          mail_[{i.index, p_.instance_of(i, micro_batch_), r, p_.peer_of(i, r)}] =
              load(r, i.reads[0]);
        }
        return true;
      case Kind::receive:
        for (const std::int64_t r : ranks) {
          if (holds(i.writes[0], r) &&
              mail_.count({i.index, p_.instance_of(i, micro_batch_), p_.peer_of(i, r), r}) == 0)
            return false;
        }
        for (const std::int64_t r : ranks) {
          if (!holds(i.writes[0], r)) continue;
          const auto it =
              mail_.find({i.index, p_.instance_of(i, micro_batch_), p_.peer_of(i, r), r});
          store(r, i.writes[0]) = std::move(it->second);
          mail_.erase(it);
        }
        return true;
      case Kind::slice:
        for (const std::int64_t r : ranks)
          redistribute({r}, i.reads[0], i.writes[0], false, Mode::first, r);
        commit();
        return true;
      case Kind::copy:
        for (const std::int64_t r : ranks) {
          if (holds(i.reads[0], r)) store(r, i.writes[0]) = load(r, i.reads[0]);
        }
        return true;
      case Kind::collective:
        return collective(i, stage, ranks);
      case Kind::compute:
        for (const std::int64_t r : ranks) compute(i, r);
        return true;
    }
    return true;
  }

  void load_input(const Instruction& i, std::int64_t rank) {
    if (!holds(i.writes[0], rank)) return;
    const Buffer& b = p_.buffer(i.writes[0]);
    Piece piece = blank(b, rank);
    const std::int64_t per_sample = elements(b.shape) / b.shape[0].extent;
    const auto first = static_cast<std::int64_t>(replica(rank)) * p_.micro_batches * p_.samples +
                       static_cast<std::int64_t>(micro_batch_) * p_.samples;
    for_each_global(piece.index, b.shape, [&](std::size_t k, std::int64_t g) {
      piece.values[k] = o_.input(static_cast<std::size_t>(i.index), step_, first + g / per_sample,
                                 g % per_sample);
    });
    round(i.writes[0], piece);
    store(rank, i.writes[0]) = std::move(piece);
  }

  // ---- collectives
  // -------------------------------------------------------------------------------
  enum class Mode { first, sum, maximum };

  static double combine(Mode mode, double a, double b) {
    return mode == Mode::sum ? a + b : mode == Mode::maximum ? std::max(a, b) : a;
  }

  /// Gives `reader` its part of `to` from what `members` hold of `from`.
  void redistribute(const std::vector<std::int64_t>& members, BufferId from, BufferId to,
                    bool accumulate, Mode mode, std::int64_t reader) {
    if (!holds(to, reader)) return;
    const Buffer &a = p_.buffer(from), &b = p_.buffer(to);
    Piece out = blank(b, reader);
    if (a.routed) {
      std::map<Row, std::map<std::int64_t, double>> whole;
      for (const std::int64_t m : members) {
        if (!holds(from, m)) continue;
        const Piece& piece = load(m, from);
        const auto& features = piece.index[3];
        for (std::size_t r = 0; r < piece.rows.size(); ++r) {
          auto& row = whole[piece.rows[r]];
          for (std::size_t f = 0; f < features.size(); ++f) {
            const double v = piece.values[r * features.size() + f];
            const auto [it, fresh] = row.emplace(features[f], v);
            if (!fresh) it->second = combine(mode, it->second, v);
          }
        }
      }
      const auto lists = indices(b, reader);
      const auto holds = [&](std::size_t d, std::int64_t x) {
        return std::binary_search(lists[d].begin(), lists[d].end(), x);
      };
      out = Piece{};
      out.index = lists;
      out.routed = true;
      for (const auto& [row, values] : whole) {
        if (!holds(0, row.sample) || !holds(1, row.sequence) || !holds(2, row.expert)) continue;
        out.rows.push_back(row);
      }
      std::sort(out.rows.begin(), out.rows.end(), [](const Row& x, const Row& y) {
        return std::tuple{x.expert, x.sample, x.sequence} <
               std::tuple{y.expert, y.sample, y.sequence};
      });
      for (const Row& row : out.rows) {
        for (const std::int64_t f : lists[3]) out.values.push_back(whole.at(row).at(f));
      }
    } else if (a.layout.flat.empty() && b.layout.flat.empty()) {
      std::vector<double> whole(static_cast<std::size_t>(elements(a.shape)), 0.0);
      // What no window reads gets no gradient.
      const bool windows =
          std::any_of(a.layout.dims.begin(), a.layout.dims.end(),
                      [](const DimSplit& d) { return d.kind == SplitKind::window; });
      std::vector<char> held(whole.size(), windows && mode == Mode::sum ? 1 : 0);
      for (const std::int64_t m : members) {
        if (!holds(from, m)) continue;
        const Piece& piece = load(m, from);
        for_each_global(piece.index, a.shape, [&](std::size_t k, std::int64_t g) {
          const auto at = static_cast<std::size_t>(g);
          whole[at] = held[at] ? combine(mode, whole[at], piece.values[k]) : piece.values[k];
          held[at] = 1;
        });
      }
      for_each_global(out.index, b.shape, [&](std::size_t k, std::int64_t g) {
        PARTITA_ASSERT(held[static_cast<std::size_t>(g)],
                       fmt::format("element {} of {} is on no member of the group", g, b.name));
        out.values[k] = whole[static_cast<std::size_t>(g)];
      });
    } else {
      // Flat shards: positions in what the rank would hold whole; equal for all members.
      std::vector<double> whole(static_cast<std::size_t>(dense_size(b, reader)), 0.0);
      // What no window reads gets no gradient.
      const bool windows =
          std::any_of(a.layout.dims.begin(), a.layout.dims.end(),
                      [](const DimSplit& d) { return d.kind == SplitKind::window; });
      std::vector<char> held(whole.size(), windows && mode == Mode::sum ? 1 : 0);
      for (const std::int64_t m : members) {
        if (!holds(from, m)) continue;
        const Piece& piece = load(m, from);
        for (std::size_t k = 0; k < piece.values.size(); ++k) {
          const std::size_t at =
              a.layout.flat.empty() ? k : static_cast<std::size_t>(piece.index[0][k]);
          whole[at] = held[at] ? combine(mode, whole[at], piece.values[k]) : piece.values[k];
          held[at] = 1;
        }
      }
      for (std::size_t k = 0; k < out.values.size(); ++k) {
        const std::size_t at =
            b.layout.flat.empty() ? k : static_cast<std::size_t>(out.index[0][k]);
        PARTITA_ASSERT(held[at],
                       fmt::format("element {} of {} is on no member of the group", at, b.name));
        out.values[k] = whole[at];
      }
    }
    pending_.push_back({reader, to, std::move(out), accumulate});
  }

  void commit() {
    for (auto& w : pending_) {
      Piece& slot = store(w.rank, w.buffer);
      if (w.accumulate && !slot.index.empty()) {
        add_into(slot, w.piece);
      } else {
        slot = std::move(w.piece);
      }
      round(w.buffer, slot);
    }
    pending_.clear();
  }

  static void add_into(Piece& to, const Piece& from) {
    PARTITA_ASSERT(to.values.size() == from.values.size() && to.rows == from.rows,
                   fmt::format("adding {} to {} values", from.values.size(), to.values.size()));
    for (std::size_t k = 0; k < to.values.size(); ++k) to.values[k] += from.values[k];
  }

  static Mode mode_of(const Instruction& i, const Buffer& from, const Buffer& to) {
    switch (i.collective) {
      case CollectiveKind::all_reduce:
      case CollectiveKind::reduce_scatter:
      case CollectiveKind::reduce:
        return from.layout.reduction == Reduction::max ? Mode::maximum : Mode::sum;
      case CollectiveKind::halo_exchange:
        // From windows back to blocks: overlapping contributions meet.
        for (std::size_t d = 0; d < to.layout.dims.size(); ++d) {
          if (from.layout.dims[d].kind == SplitKind::window &&
              to.layout.dims[d].kind == SplitKind::block)
            return Mode::sum;
        }
        return Mode::first;
      case CollectiveKind::all_gather:
      case CollectiveKind::shift:
      case CollectiveKind::all_to_all:
      case CollectiveKind::broadcast:
      case CollectiveKind::scatter:
      case CollectiveKind::gather:
        return Mode::first;
    }
    return Mode::first;
  }

  bool collective(const Instruction& i, int stage, const std::vector<std::int64_t>& ranks) {
    if (i.tie >= 0) {
      const auto& stages = p_.ties[static_cast<std::size_t>(i.tie)];
      auto& waiting = posted_[{i.tie, p_.buffer(i.reads[0]).name}];
      waiting[stage] = &i;
      if (done_ties_.count({step_, &i}) > 0) return true;
      if (waiting.size() < stages.size()) return false;
      for (const std::int64_t r : ranks) {
        std::vector<double> sum;
        for (const auto& [s, other] : waiting) {
          const Piece& piece = load(p_.rank_on_stage(r, s), other->reads[0]);
          if (sum.empty()) sum.assign(piece.values.size(), 0.0);
          PARTITA_ASSERT(sum.size() == piece.values.size(), "tied parameters differ in layout");
          for (std::size_t k = 0; k < sum.size(); ++k) sum[k] += piece.values[k];
        }
        for (const auto& [s, other] : waiting) {
          const std::int64_t peer = p_.rank_on_stage(r, s);
          Piece piece = load(peer, other->reads[0]);
          piece.values = sum;
          round(other->writes[0], piece);
          store(peer, other->writes[0]) = std::move(piece);
        }
      }
      for (const auto& [s, other] : waiting) done_ties_[{step_, other}] = true;
      return true;
    }
    for (std::size_t k = 0; k < i.reads.size(); ++k) {
      const Mode mode = mode_of(i, p_.buffer(i.reads[k]), p_.buffer(i.writes[k]));
      for (const std::int64_t r : ranks) {
        redistribute(p_.mesh.group(r, i.atoms), i.reads[k], i.writes[k], i.accumulate, mode, r);
      }
    }
    commit();
    return true;
  }

  // ---- kernels
  // -------------------------------------------------------------------------------------
  Context context(const Instruction& i, std::int64_t rank) const {
    Context c = context_of(p_, i.op, o_.operator_seed ? o_.operator_seed(i.op) : o_.seed, rank);
    c.step = step_;
    c.first_sample = static_cast<std::int64_t>(micro_batch_) * p_.samples;
    return c;
  }

  void compute(const Instruction& i, std::int64_t rank) {
    if (i.kernel == Kernel::zero) {
      for (const BufferId id : i.writes) {
        if (holds(id, rank)) store(rank, id) = blank(p_.buffer(id), rank);
      }
      return;
    }
    if (i.kernel == Kernel::add) {
      if (!holds(i.writes[0], rank)) return;
      Piece sum = load(rank, i.reads[0]);
      for (std::size_t k = 1; k < i.reads.size(); ++k) add_into(sum, load(rank, i.reads[k]));
      round(i.writes[0], sum);
      store(rank, i.writes[0]) = std::move(sum);
      return;
    }
    if (i.kernel == Kernel::optimizer) {
      optimizer(i, rank);
      return;
    }
    if (i.kernel == Kernel::scale) {
      if (!holds(i.writes[0], rank)) return;
      Piece share = load(rank, i.reads[0]);
      for (double& v : share.values) v /= static_cast<double>(p_.mesh.size(i.atoms));
      round(i.writes[0], share);
      store(rank, i.writes[0]) = std::move(share);
      return;
    }
    if (i.kernel == Kernel::square_sum) {
      Piece sum = zeros({});
      for (const BufferId id : i.reads) {
        for (const double v : load(rank, id).values) sum.values[0] += v * v;
      }
      round(i.writes[0], sum);
      store(rank, i.writes[0]) = std::move(sum);
      return;
    }
    if (i.kernel == Kernel::loss_scale) {
      loss_scale(i, rank);
      return;
    }
    if (i.kernel == Kernel::unscale) {
      const double scale = load(rank, i.reads[0]).values[0];
      for (const BufferId id : i.writes) {
        if (!holds(id, rank)) continue;
        Piece& g = store(rank, id);
        for (double& v : g.values) v /= scale;
        round(id, g);
      }
      return;
    }
    if (i.kernel == Kernel::not_finite) {
      Piece flag = zeros({});
      for (const BufferId id : i.reads) {
        for (const double v : load(rank, id).values) {
          if (!std::isfinite(v)) flag.values[0] = 1;
        }
      }
      store(rank, i.writes[0]) = std::move(flag);
      return;
    }
    if (i.kernel == Kernel::compress) {
      compress(i, rank);
      return;
    }
    if (i.kernel == Kernel::decompress) {
      decompress(i, rank);
      return;
    }
    if (i.kernel == Kernel::initialise || i.kernel == Kernel::read) {
      if (holds(i.writes[0], rank)) store(rank, i.writes[0]) = initial(i.writes[0], rank);
      return;
    }
    if (i.kernel == Kernel::dequeue || i.kernel == Kernel::enqueue) {
      // Entry t mod s of a queue of s steps.
      Piece& queue = kept(rank, i.outputs[0]);
      const auto length = static_cast<std::int64_t>(queue.index[0].size());
      const std::size_t n = queue.values.size() / static_cast<std::size_t>(length);
      const auto at = queue.values.begin() + static_cast<std::ptrdiff_t>(n) * (step_ % length);
      if (i.kernel == Kernel::enqueue) {
        const Piece& in = load(rank, i.reads[0]);
        std::copy(in.values.begin(), in.values.end(), at);
        return;
      }
      Piece out = blank(p_.buffer(i.writes[0]), rank);
      std::copy_n(at, n, out.values.begin());
      store(rank, i.writes[0]) = std::move(out);
      return;
    }
    if (i.kernel == Kernel::clip) {
      const double factor = clip_factor(p_.optimizer, load(rank, i.reads[0]).values[0]);
      for (const BufferId id : i.writes) {
        Piece& g = store(rank, id);
        for (double& v : g.values) v *= factor;
        round(id, g);
      }
      return;
    }
    const ProgramOperator& op = p_.operators[static_cast<std::size_t>(i.op)];
    if (!is_first(op.root, rank)) return;
    if (i.part >= 0 && std::holds_alternative<Attention>(op.operation)) {
      ring_attention(i, op, rank);
      return;
    }
    Context c = context(i, rank);
    Operands o;
    for (const BufferId id : i.reads) o.inputs.push_back(optional(rank, id));
    for (const BufferId id : i.parameters) o.parameters.push_back(optional(rank, id));
    for (const BufferId id : i.outputs) o.outputs.push_back(optional(rank, id));
    Piece one;
    one.values = {1.0};
    for (const BufferId id : i.gradients)
      o.output_gradients.push_back(id.valid() ? &load(rank, id) : &one);
    // A product with one part of the sequence: that part of every operand.
    std::vector<Piece> parts;
    std::vector<std::int64_t> positions;
    if (i.part >= 0) {
      positions = part_positions(p_, i, rank);
      c.indices[static_cast<std::size_t>(op.signature.find(Dim::sequence))] = positions;
      parts.reserve(i.reads.size() + i.gradients.size());
      const auto cut = [&](std::vector<const Piece*>& list, const std::vector<BufferId>& ids) {
        for (std::size_t k = 0; k < ids.size(); ++k) {
          const int d = ids[k].valid() ? sequence_dim(p_.buffer(ids[k])) : -1;
          if (d < 0) continue;
          parts.push_back(positions_of(*list[k], static_cast<std::size_t>(d), positions));
          list[k] = &parts.back();
        }
      };
      cut(o.inputs, i.reads);
      cut(o.output_gradients, i.gradients);
    }
    std::vector<Piece> cast;
    const bool rounds = o_.round && o_.round_operands && casts(op);
    const Operands exact = rounds ? o : Operands{};
    if (rounds) {
      c.compute = op.compute;
      cast.reserve(o.inputs.size() + o.output_gradients.size() + 1);
      const auto round_one = [&](const Piece*& operand, bool gradient) {
        if (operand == nullptr) return;
        Piece& p = cast.emplace_back(*operand);
        const bool routed = p.routed;
        round_operand(c, gradient, routed ? &p.rows : nullptr,
                      p.index.empty() ? 0 : p.index[0].size(), p.values);
        operand = &p;
      };
      for (const Piece*& x : o.inputs) round_one(x, false);
      // What is only added, a bias, is not.
      if (!o.parameters.empty()) round_one(o.parameters[0], false);
      for (const Piece*& g : o.output_gradients) round_one(g, true);
    }
    const bool forward = i.kernel == Kernel::forward;
    if (const auto* a = std::get_if<Attention>(&op.operation))
      c.narrow_log_sums = o_.round && !a->materialised && !forward;
    std::vector<Piece> inline_statistics;
    inline_statistics.reserve(op.signature.forward_statistics.size() +
                              op.signature.backward_statistics.size());
    if (forward && i.inline_statistics) {
      for (std::size_t k = 0; k < op.signature.forward_statistics.size(); ++k) {
        inline_statistics.push_back(forward_statistic(c, k, o));
        o.statistics.push_back(&inline_statistics.back());
      }
    } else {
      for (const BufferId id : i.statistics) o.statistics.push_back(optional(rank, id));
    }
    if (i.kernel == Kernel::backward_data && i.inline_statistics) {
      for (std::size_t k = 0; k < op.signature.backward_statistics.size(); ++k) {
        inline_statistics.push_back(backward_statistic(c, k, o));
        o.backward_statistics.push_back(&inline_statistics.back());
      }
    } else {
      for (const BufferId id : i.backward_statistics)
        o.backward_statistics.push_back(optional(rank, id));
    }
    std::vector<Piece> results;
    switch (i.kernel) {
      case Kernel::forward_statistic:
        results.push_back(forward_statistic(c, static_cast<std::size_t>(i.index), o));
        break;
      case Kernel::backward_statistic:
        results.push_back(backward_statistic(c, static_cast<std::size_t>(i.index), o));
        break;
      case Kernel::forward: {
        results = reference::forward(c, o);
        for (std::size_t k = 0; k < inline_statistics.size(); ++k) {
          round(i.statistics[k], inline_statistics[k]);
          store(rank, i.statistics[k]) = inline_statistics[k];
        }
        for (const BufferId id : i.extras) store(rank, id) = Piece{};
        if (op.has_loss && !i.recomputed) note_loss(p_.buffer(i.writes[0]), results[0], rank);
        break;
      }
      case Kernel::backward_data:
        results = backward_data(c, o);
        break;
      case Kernel::backward_weight:
        results = backward_weight(c, o);
        // A bias's is the sum of gradients that nobody has rounded.
        if (rounds && results.size() > 1) {
          auto sums = backward_weight(c, exact);
          std::move(sums.begin() + 1, sums.end(), results.begin() + 1);
        }
        break;
      case Kernel::zero:
      case Kernel::add:
      case Kernel::optimizer:
      case Kernel::scale:
      case Kernel::square_sum:
      case Kernel::clip:
      case Kernel::loss_scale:
      case Kernel::unscale:
      case Kernel::not_finite:
      case Kernel::compress:
      case Kernel::decompress:
      case Kernel::dequeue:
      case Kernel::enqueue:
      case Kernel::initialise:
      case Kernel::read:
        break;
    }
    for (std::size_t k = 0; k < i.writes.size(); ++k) {
      if (!i.writes[k].valid()) continue;
      Piece& slot = store(rank, i.writes[k]);
      const int d = i.part >= 0 ? sequence_dim(p_.buffer(i.writes[k])) : -1;
      if (d >= 0 &&
          indices(p_.buffer(i.writes[k]), rank)[static_cast<std::size_t>(d)] != positions) {
        if (i.part == 0 && !i.accumulate) slot = blank(p_.buffer(i.writes[k]), rank);
        put_positions(slot, results[k], static_cast<std::size_t>(d), i.accumulate);
      } else if (i.accumulate) {
        add_into(slot, results[k]);
      } else {
        slot = std::move(results[k]);
      }
      round(i.writes[k], slot);
    }
  }

  /// The rows of a dense piece at these positions of dimension d, all of which it holds.
  static Piece positions_of(const Piece& whole, std::size_t d,
                            const std::vector<std::int64_t>& positions) {
    auto index = whole.index;
    index[d] = positions;
    Piece part = zeros(std::move(index));
    walk_positions(whole, part, d,
                   [&](std::size_t w, std::size_t p) { part.values[p] = whole.values[w]; });
    return part;
  }
  static void put_positions(Piece& whole, const Piece& part, std::size_t d, bool add) {
    walk_positions(whole, part, d, [&](std::size_t w, std::size_t p) {
      whole.values[w] = add ? whole.values[w] + part.values[p] : part.values[p];
    });
  }
  /// f(place in whole, place in part) for every element of the part.
  template <class F>
  static void walk_positions(const Piece& whole, const Piece& part, std::size_t d, F f) {
    std::size_t outer = 1, inner = 1;
    for (std::size_t x = 0; x < whole.index.size(); ++x)
      (x < d ? outer : inner) *= x == d ? 1 : whole.index[x].size();
    const auto& all = whole.index[d];
    const auto& some = part.index[d];
    for (std::size_t a = 0; a < outer; ++a) {
      for (std::size_t s = 0; s < some.size(); ++s) {
        const auto it = std::lower_bound(all.begin(), all.end(), some[s]);
        PARTITA_ASSERT(it != all.end() && *it == some[s], "a part lies outside its whole");
        const auto w = static_cast<std::size_t>(it - all.begin());
        for (std::size_t b = 0; b < inner; ++b)
          f((a * all.size() + w) * inner + b, (a * some.size() + s) * inner + b);
      }
    }
  }

  /// One part of the keys of a ring: accumulators are the output so far and its log-sum-exp.
  void ring_attention(const Instruction& i, const ProgramOperator& op, std::int64_t rank) {
    const auto& a = std::get<Attention>(op.operation);
    const Piece &q = load(rank, i.reads[0]), &k = load(rank, i.reads[1]),
                &v = load(rank, i.reads[2]);
    if (i.kernel == Kernel::forward) {
      if (!i.accumulate) {
        store(rank, i.writes[0]) = blank(p_.buffer(i.writes[0]), rank);
        Piece lse = blank(p_.buffer(i.extras[0]), rank);
        std::fill(lse.values.begin(), lse.values.end(), -std::numeric_limits<double>::infinity());
        store(rank, i.extras[0]) = std::move(lse);
      }
      attend_part(a, q, k, v, store(rank, i.writes[0]), store(rank, i.extras[0]));
      round(i.writes[0], store(rank, i.writes[0]));
      round(i.extras[0], store(rank, i.extras[0]));
      return;
    }
    for (std::size_t x = 0; x < 3; ++x) {
      if (!i.accumulate) store(rank, i.writes[x]) = blank(p_.buffer(i.writes[x]), rank);
    }
    attend_part_backward(a, q, k, v, load(rank, i.outputs[0]), load(rank, i.extras[0]),
                         load(rank, i.gradients[0]), store(rank, i.writes[0]),
                         store(rank, i.writes[1]), store(rank, i.writes[2]));
    for (const BufferId id : i.writes) round(id, store(rank, id));
  }

  /// State that lasts from step to step: zeros before the first.
  Piece& kept(std::int64_t rank, BufferId id) {
    Piece& piece = store(rank, id);
    if (piece.values.empty()) piece = blank(p_.buffer(id), rank);
    return piece;
  }

  void loss_scale(const Instruction& i, std::int64_t rank) {
    Piece& state = kept(rank, i.outputs[0]);
    if (i.index == 0) {
      if (state.values[0] == 0) state.values[0] = p_.loss_scale.initial;
      Piece scale = blank(p_.buffer(i.writes[0]), rank);
      scale.values[0] = state.values[0];
      store(rank, i.writes[0]) = std::move(scale);
      return;
    }
    adapt_loss_scale(p_.loss_scale, load(rank, i.reads[0]).values[0] != 0, state.values.data());
  }

  PowerShape power_shape(BufferId kept, std::int64_t rank) const {
    const auto lists = indices(p_.buffer(kept), rank);
    PowerShape s{static_cast<std::int64_t>(lists[0].size()), 1, p_.compression.rank};
    for (std::size_t d = 1; d < lists.size(); ++d)
      s.cols *= static_cast<std::int64_t>(lists[d].size());
    return s;
  }

  void compress(const Instruction& i, std::int64_t rank) {
    const Compression& c = p_.compression;
    if (i.index == 1) {
      const PowerShape s = power_shape(i.outputs[0], rank);
      std::vector<double> left = load(rank, i.reads[0]).values;
      orthonormalise(s, left.data());
      Piece right = blank(p_.buffer(i.writes[0]), rank);
      power_right(s, load(rank, i.outputs[0]).values.data(), left.data(), right.values.data());
      round(i.writes[0], right);
      store(rank, i.writes[0]) = std::move(right);
      return;
    }
    std::vector<double> p = load(rank, i.reads[0]).values;
    const auto n = static_cast<std::int64_t>(p.size());
    if (c.error_feedback && !i.outputs.empty()) {
      const Piece& error = kept(rank, i.outputs[0]);
      for (std::size_t k = 0; k < p.size(); ++k) p[k] += error.values[k];
    }
    std::vector<Piece> out;
    for (const BufferId id : i.writes) out.push_back(blank(p_.buffer(id), rank));
    std::vector<double> left = p;  // what is not sent
    switch (c.kind) {
      case CompressionKind::none:
        break;
      case CompressionKind::cast:
        out[0].values = p;
        round_values(c.type, out[0].values.data(), out[0].values.size());
        for (std::size_t k = 0; o_.casts_past_ties && k < p.size(); ++k) {
          double& v = out[0].values[k];
          if (v != 0 && v != p[k])
            v += std::copysign(std::ldexp(spacing(c.type), std::ilogb(v)), p[k] - v);
        }
        for (std::size_t k = 0; k < p.size(); ++k) left[k] -= out[0].values[k];
        break;
      case CompressionKind::top_k: {
        const auto at = top_positions(p.data(), n, static_cast<std::int64_t>(out[0].values.size()));
        for (std::size_t k = 0; k < at.size(); ++k) {
          out[0].values[k] = p[at[k]];
          out[1].values[k] = at[k];
          left[at[k]] = 0;
        }
        break;
      }
      case CompressionKind::one_bit: {
        const double scale = mean_magnitude(p.data(), n);
        out[1].values[0] = scale;
        for (std::size_t w = 0; w < out[0].values.size(); ++w)
          out[0].values[w] = sign_word(p.data(), n, static_cast<std::int64_t>(w));
        for (double& v : left) v -= v < 0 ? -scale : scale;
        break;
      }
      case CompressionKind::power_sgd: {
        const PowerShape s = power_shape(i.outputs[0], rank);
        Piece& start = store(rank, i.outputs[1]);
        if (start.values.empty()) {
          start = blank(p_.buffer(i.outputs[1]), rank);
          const std::int32_t parameter = p_.buffer(i.outputs[1]).parameter;
          for (std::size_t k = 0; k < start.values.size(); ++k)
            start.values[k] = power_start(parameter, static_cast<std::int64_t>(k));
          round(i.outputs[1], start);
        }
        power_left(s, p.data(), start.values.data(), out[0].values.data());
        break;
      }
    }
    if (!i.outputs.empty()) {
      kept(rank, i.outputs[0]).values = std::move(left);
      round(i.outputs[0], store(rank, i.outputs[0]));
    }
    for (std::size_t k = 0; k < out.size(); ++k) {
      round(i.writes[k], out[k]);
      store(rank, i.writes[k]) = std::move(out[k]);
    }
  }

  void decompress(const Instruction& i, std::int64_t rank) {
    const Compression& c = p_.compression;
    Piece sum = blank(p_.buffer(i.writes[0]), rank);
    const auto members = static_cast<std::size_t>(p_.mesh.size(i.atoms));
    const std::vector<double>& first = load(rank, i.reads[0]).values;
    switch (c.kind) {
      case CompressionKind::none:
        break;
      case CompressionKind::cast:
        sum.values = first;
        break;
      case CompressionKind::top_k: {
        const std::vector<double>& at = load(rank, i.reads[1]).values;
        for (std::size_t k = 0; k < first.size(); ++k)
          sum.values[static_cast<std::size_t>(at[k])] += first[k];
        break;
      }
      case CompressionKind::one_bit: {
        const std::vector<double>& scales = load(rank, i.reads[1]).values;
        const std::size_t words = first.size() / members;
        for (std::size_t m = 0; m < members; ++m) {
          for (std::size_t k = 0; k < sum.values.size(); ++k) {
            const auto word = static_cast<std::uint32_t>(first[m * words + k / 32]);
            sum.values[k] += (word >> (k % 32) & 1u) != 0 ? -scales[m] : scales[m];
          }
        }
        break;
      }
      case CompressionKind::power_sgd: {
        Piece& error = store(rank, i.outputs[0]);
        const PowerShape s = power_shape(i.outputs[0], rank);
        std::vector<double> left = first;
        orthonormalise(s, left.data());
        const Piece& right = load(rank, i.reads[1]);
        power_product(s, left.data(), right.values.data(), sum.values.data());
        for (std::size_t k = 0; k < error.values.size(); ++k)
          error.values[k] =
              c.error_feedback ? error.values[k] - sum.values[k] / static_cast<double>(members) : 0;
        round(i.outputs[0], error);
        store(rank, i.outputs[1]).values = right.values;
        break;
      }
    }
    round(i.writes[0], sum);
    store(rank, i.writes[0]) = std::move(sum);
  }

  void note_loss(const Buffer& b, const Piece& piece, std::int64_t rank) {
    if (!counts_loss(p_, b, rank)) return;
    result_.losses.back()[replica(rank)] += piece.values[0];
  }

  void optimizer(const Instruction& i, std::int64_t rank) {
    if (!holds(i.writes[0], rank)) return;
    const Buffer& b = p_.buffer(i.reads[0]);
    const Piece& gradient = load(rank, i.reads[0]);
    PARTITA_ASSERT(b.layout.partial == 0,
                   fmt::format("the optimizer reads {}, which is still partial", b.name));
    const auto q = static_cast<std::size_t>(p_.buffer(i.writes[0]).parameter);
    const std::size_t r = replica(rank);
    merge(result_.gradients[r][q], seen_[r][q], b, gradient, rank);
    Piece& parameter = store(rank, i.writes[0]);
    PARTITA_ASSERT(parameter.values.size() == gradient.values.size(),
                   fmt::format("{} gradients for {} parameters of {}", gradient.values.size(),
                               parameter.values.size(), b.name));
    std::int64_t updates = step_;
    if (!i.statistics.empty()) {
      // Gradients that overflowed are not used.
      if (p_.loss_scale.dynamic && load(rank, i.statistics[0]).values[0] != 0) return;
      updates = std::llround(load(rank, i.statistics[1]).values[2]);
    }
    std::vector<std::vector<double>*> states;
    for (const BufferId id : i.outputs) states.push_back(&kept(rank, id).values);
    // The update goes to the master copy where there is one; the parameter is its rounded image.
    Piece* master = nullptr;
    if (!i.extras.empty()) {
      master = &store(rank, i.extras[0]);
      if (master->values.empty()) *master = parameter;
      parameter.values = master->values;
    }
    optimizer_update(p_.optimizer, updates, parameter.values, gradient.values, states);
    for (std::size_t k = 0; k < i.outputs.size(); ++k)
      round(i.outputs[k], store(rank, i.outputs[k]));
    if (master != nullptr) {
      master->values = parameter.values;
      round(i.extras[0], *master);
    }
    round(i.writes[0], parameter);
  }

  struct Write {
    std::int64_t rank;
    BufferId buffer;
    Piece piece;
    bool accumulate;
  };

  const Program& p_;
  const RunOptions& o_;
  RunResult result_;
  std::vector<std::map<Key, Piece>> values_;
  std::multimap<int, std::int64_t> on_stage_;
  std::map<std::tuple<int, int, std::int64_t, std::int64_t>, Piece> mail_;
  std::map<std::pair<int, std::string>, std::map<int, const Instruction*>> posted_;
  std::map<std::pair<std::int64_t, const Instruction*>, bool> done_ties_;
  std::vector<Write> pending_;
  std::vector<std::vector<std::vector<char>>> seen_;
  std::int64_t step_ = 0;
  std::int32_t micro_batch_ = -1;
};

}  // namespace

void optimizer_update(const Optimizer& optimizer, std::int64_t step, std::vector<double>& parameter,
                      const std::vector<double>& gradient,
                      const std::vector<std::vector<double>*>& states) {
  if (optimizer.kind == OptimizerKind::sgd) {
    for (std::size_t k = 0; k < parameter.size(); ++k) {
      double slope = gradient[k];
      if (optimizer.momentum != 0) {
        double& velocity = (*states[0])[k];
        slope = velocity = optimizer.momentum * velocity + slope;
      }
      parameter[k] -= optimizer.learning_rate * slope;
    }
    return;
  }
  const double t = static_cast<double>(step + 1);
  const double correct1 = 1 - std::pow(optimizer.beta1, t),
               correct2 = 1 - std::pow(optimizer.beta2, t);
  auto &first = *states[0], &second = *states[1];
  for (std::size_t k = 0; k < parameter.size(); ++k) {
    parameter[k] *= 1 - optimizer.learning_rate * optimizer.weight_decay;
    first[k] = optimizer.beta1 * first[k] + (1 - optimizer.beta1) * gradient[k];
    second[k] = optimizer.beta2 * second[k] + (1 - optimizer.beta2) * gradient[k] * gradient[k];
    parameter[k] -= optimizer.learning_rate * (first[k] / correct1) /
                    (std::sqrt(second[k] / correct2) + optimizer.epsilon);
  }
}

Context context_of(const Program& p, std::int32_t id, std::uint64_t seed, std::int64_t rank) {
  const ProgramOperator& op = p.operators[static_cast<std::size_t>(id)];
  Context c;
  c.operation = &op.operation;
  c.signature = &op.signature;
  for (std::size_t d = 0; d < op.cuts.size(); ++d) {
    const IterationDim& dim = op.signature.dims[d];
    c.indices.push_back(local_indices(p.mesh, op.cuts[d], dim.extent, rank));
    if (dim.use == DimUse::sum && p.mesh.coordinate(rank, op.cuts[d].atoms) != 0)
      c.adds_bias = false;
  }
  auto labels = static_cast<double>(p.micro_batches);
  if (std::holds_alternative<CrossEntropy>(op.operation)) {
    labels *= static_cast<double>(elements(op.signature.inputs[1].shape));
  } else if (std::holds_alternative<MeanSquaredError>(op.operation)) {
    labels *= static_cast<double>(elements(op.signature.inputs[0].shape));
  }
  c.loss_scale = 1 / labels;
  c.seed = seed;
  c.fp8_format = p.fp8_format;
  return c;
}

bool counts_loss(const Program& p, const Buffer& loss, std::int64_t rank) {
  for (std::size_t a = 0; a < p.mesh.atoms.size(); ++a) {
    const auto atom = static_cast<AtomId>(a);
    const bool counts =
        has(loss.layout.partial, atom) || has(p.replicas, atom) || has(mask_of(p.pipeline), atom);
    if (!counts && p.mesh.coordinate(rank, atom) != 0) return false;
  }
  return true;
}

double clip_factor(const Optimizer& optimizer, double square_sum) {
  // As torch.nn.utils.clip_grad_norm_.
  return std::min(1.0, optimizer.clip / (std::sqrt(square_sum) + 1e-6));
}

RunResult interpret(const Program& program, const RunOptions& options) {
  return Machine(program, options).run();
}

}  // namespace partita::reference
