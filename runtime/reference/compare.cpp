#include "runtime/reference/compare.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <set>

#include "runtime/reference/compression.h"
#include "runtime/reference/serial.h"

namespace partita::reference {
namespace {

double largest_of(const std::vector<double>& values) {
  double largest = 0;
  for (const double x : values) largest = std::max(largest, std::abs(x));
  return largest;
}

/// What differences of each parameter are relative to: the largest value among the parameters of
/// its operator, at least a millionth of the largest of all. One operator's gradients are sums of
/// the same terms; where they cancel (a key's bias has no effect, so its gradient is zero in exact
/// arithmetic), what is left is rounding of terms as large as the weight's.
std::vector<double> scales_of(const Graph& graph, const std::vector<std::vector<double>>& values,
                              RelativeTo scale) {
  std::map<std::string, double> by_operator;
  double all = 1e-300;
  const auto owner = [&](std::size_t q) {
    const std::string& name = graph.parameters[q].name;
    return scale == RelativeTo::tensor ? name : name.substr(0, name.rfind('.'));
  };
  for (std::size_t q = 0; q < values.size(); ++q) {
    double& largest = by_operator[owner(q)];
    largest = std::max(largest, largest_of(values[q]));
    all = std::max(all, largest);
  }
  std::vector<double> scales;
  for (std::size_t q = 0; q < values.size(); ++q)
    scales.push_back(std::max(by_operator[owner(q)], 1e-6 * all));
  return scales;
}

double error_of(const std::vector<double>& got, const std::vector<double>& expected, double scale) {
  if (got.size() != expected.size()) return INFINITY;
  double worst = 0;
  for (std::size_t k = 0; k < got.size(); ++k) {
    const double d = std::abs(got[k] - expected[k]);
    worst = std::max(worst, std::isnan(d) ? INFINITY : d);
  }
  return worst / scale;
}

}  // namespace

namespace {

/// The serial algorithm of plans whose data-parallel ranks compress gradients
/// (docs/compression.md): each replica of a parameter, or of a shard of it, has its own samples'
/// gradient and its own rest.
class CompressedGradients {
 public:
  explicit CompressedGradients(const Program& p) : p_(p) {
    for (std::size_t s = 0; s < p.stages.size(); ++s) {
      std::set<BlockId> blocks;
      for (const BlockCall& call : p.stages[s]) blocks.insert(call.block);
      for (const BlockId b : blocks) {
        for (const Instruction& i : p.blocks[b.index()].instructions) {
          if (i.kind == Kind::compute && i.kernel == Kernel::compress && i.index == 0)
            add(i, static_cast<int>(s));
        }
      }
    }
  }

  int groups() const { return static_cast<int>(p_.mesh.size(mask_of(p_.data_parallel))); }

  /// What the optimizer gets of every group's gradients; losses add.
  SerialResult meet(const std::vector<SerialResult>& groups) {
    SerialResult sum = groups[0];
    for (std::size_t g = 1; g < groups.size(); ++g) {
      sum.loss += groups[g].loss;
      for (std::size_t q = 0; q < sum.parameter_gradients.size(); ++q) {
        auto& to = sum.parameter_gradients[q].values;
        for (std::size_t k = 0; k < to.size(); ++k)
          to[k] += groups[g].parameter_gradients[q].values[k];
      }
    }
    for (auto& [key, shard] : shards_) {
      const auto q = static_cast<std::size_t>(shard.parameter);
      std::vector<std::vector<double>> by_replica(
          static_cast<std::size_t>(p_.mesh.size(shard.members)),
          std::vector<double>(shard.at.size(), 0.0));
      for (std::size_t g = 0; g < groups.size(); ++g) {
        auto& to = by_replica[replica_of(shard, static_cast<std::int64_t>(g))];
        const auto& from = groups[g].parameter_gradients[q].values;
        for (std::size_t k = 0; k < to.size(); ++k)
          to[k] += from[static_cast<std::size_t>(shard.at[k])];
      }
      const auto together =
          exchange(p_.compression, shard.shape, shard.parameter, by_replica, shard.state);
      auto& to = sum.parameter_gradients[q].values;
      for (std::size_t k = 0; k < together.size(); ++k)
        to[static_cast<std::size_t>(shard.at[k])] = together[k];
    }
    return sum;
  }

 private:
  struct Shard {
    std::int32_t parameter = -1;
    std::vector<std::int64_t> at;  ///< linear indices in the whole parameter
    AtomMask members = 0;
    PowerShape shape;
    Exchange state;
  };

  /// Which of the ranks along `shard.members` has this group of samples: its data-parallel
  /// coordinate, as far as these atoms make it.
  std::size_t replica_of(const Shard& shard, std::int64_t group) const {
    std::int64_t replica = 0, outer = groups();
    for (const AtomId a : p_.data_parallel) {
      const std::int64_t size = p_.mesh.atoms[a].size;
      outer /= size;
      if (has(shard.members, a)) replica = replica * size + group / outer % size;
    }
    return static_cast<std::size_t>(replica);
  }

  void add(const Instruction& i, int stage) {
    const Buffer& b = p_.buffer(i.reads[0]);
    for (std::int64_t rank = 0; rank < p_.mesh.ranks(); ++rank) {
      if (p_.stage_of(rank) != stage) continue;
      std::vector<std::vector<std::int64_t>> lists;
      for (std::size_t d = 0; d < b.shape.size(); ++d)
        lists.push_back(local_indices(p_.mesh, b.layout.dims[d], b.shape[d].extent, rank));
      Shard shard;
      shard.members = i.atoms;
      shard.parameter = b.parameter;
      shard.at = {0};
      for (std::size_t d = 0; d < lists.size(); ++d) {
        std::vector<std::int64_t> next;
        for (const std::int64_t outer : shard.at) {
          for (const std::int64_t x : lists[d]) next.push_back(outer * b.shape[d].extent + x);
        }
        shard.at = std::move(next);
      }
      shard.shape = {lists.empty() ? 1 : static_cast<std::int64_t>(lists[0].size()), 1,
                     p_.compression.rank};
      for (std::size_t d = 1; d < lists.size(); ++d)
        shard.shape.cols *= static_cast<std::int64_t>(lists[d].size());
      shards_.emplace(std::pair{shard.parameter, shard.at}, std::move(shard));
    }
  }

  const Program& p_;
  std::map<std::pair<std::int32_t, std::vector<std::int64_t>>, Shard> shards_;
};

}  // namespace

double serial_work(const Graph& graph, const Program& program) {
  const NetworkFlops f = network_flops(graph);
  return (f.forward + f.backward_data + f.backward_weight).count / 2 *
         static_cast<double>(program.samples) * program.micro_batches;
}

RunOptions options_for(const Graph& graph, const Program& program, int steps, std::uint64_t seed) {
  RunOptions options;
  options.steps = steps;
  options.seed = seed;
  options.input = [&graph, seed](std::size_t input, std::int64_t step, std::int64_t sample,
                                 std::int64_t index) {
    return input_value(graph, input, seed, step, sample, index);
  };
  options.operator_seed = [seed](std::int32_t op) {
    return operator_seed(seed, OpId{static_cast<std::size_t>(op)});
  };
  const auto replicas = static_cast<std::size_t>(program.mesh.size(program.replicas));
  for (std::size_t r = 0; r < replicas; ++r)
    options.parameters.push_back(initial_parameters(graph, seed + r));
  return options;
}

RunResult train_serially(const Graph& graph, const Program& program, const RunOptions& options,
                         int batch_norm_groups) {
  const int steps = options.steps;
  RunResult result;
  const auto replicas = static_cast<std::size_t>(program.mesh.size(program.replicas));
  const std::int64_t all = program.samples * program.micro_batches;
  result.losses.assign(static_cast<std::size_t>(steps), std::vector<double>(replicas, 0.0));
  result.gradients.resize(replicas);
  result.parameters.resize(replicas);
  std::vector<std::vector<Piece>> parameters(
      options.parameters.begin(),
      options.parameters.begin() + static_cast<std::ptrdiff_t>(replicas));
  std::vector<std::vector<std::vector<std::vector<double>>>> states(
      replicas, std::vector<std::vector<std::vector<double>>>(graph.parameters.size()));
  CompressedGradients compressed(program);
  std::vector<std::vector<std::deque<std::vector<double>>>> waiting(
      replicas, std::vector<std::deque<std::vector<double>>>(graph.parameters.size()));
  const bool compresses = program.compression.kind != CompressionKind::none;
  for (int step = 0; step < steps; ++step) {
    for (std::size_t r = 0; r < replicas; ++r) {
      result.gradients[r].resize(graph.parameters.size());
      // Replica r trains on the r-th batch.
      const Inputs inputs =
          make_inputs(graph, static_cast<std::int64_t>(r) * all, all, step, options.input);
      const SerialResult serial =
          compresses ? compressed.meet(serial_step_by_group(
                           graph, parameters[r], inputs, program.micro_batches, program.samples,
                           options.seed, step, compressed.groups()))
                     : serial_step(graph, parameters[r], inputs, program.micro_batches,
                                   program.samples, options.seed, step, batch_norm_groups);
      result.losses[static_cast<std::size_t>(step)][r] = serial.loss;
      double factor = 1;
      if (program.optimizer.clip > 0) {
        double squares = 0;
        for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
          if (!graph.parameters[q].trainable) continue;
          for (const double v : serial.parameter_gradients[q].values) squares += v * v;
        }
        factor = clip_factor(program.optimizer, squares);
      }
      for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
        if (!graph.parameters[q].trainable) continue;
        auto g = serial.parameter_gradients[q].values;
        for (double& v : g) v *= factor;
        if (program.staleness > 0) {
          // The gradient of so many steps ago; none before the first.
          auto& queue = waiting[r][q];
          queue.push_back(g);
          std::fill(g.begin(), g.end(), 0.0);
          if (queue.size() > static_cast<std::size_t>(program.staleness)) {
            g = std::move(queue.front());
            queue.pop_front();
          }
        }
        if (step + 1 == steps) result.gradients[r][q] = g;
        states[r][q].resize(2, std::vector<double>(g.size(), 0.0));
        optimizer_update(program.optimizer, step, parameters[r][q].values, g,
                         {&states[r][q][0], &states[r][q][1]});
      }
    }
    if (program.average_every == 0 || (step + 1) % program.average_every != 0) continue;
    for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
      for (std::size_t k = 0; k < parameters[0][q].values.size(); ++k) {
        double mean = 0;
        for (const auto& p : parameters) mean += p[q].values[k] / static_cast<double>(replicas);
        for (auto& p : parameters) p[q].values[k] = mean;
      }
    }
  }
  for (std::size_t r = 0; r < replicas; ++r) {
    for (Piece& p : parameters[r]) result.parameters[r].push_back(std::move(p.values));
  }
  return result;
}

namespace {

/// Of all gradients as one vector, relative to the length of `want`.
double distance(const std::vector<std::vector<std::vector<double>>>& got,
                const std::vector<std::vector<std::vector<double>>>& want) {
  double apart = 0, norm = 0;
  for (std::size_t r = 0; r < want.size(); ++r) {
    for (std::size_t q = 0; q < want[r].size(); ++q) {
      const auto &x = got[r][q], &y = want[r][q];
      for (std::size_t k = 0; k < std::min(x.size(), y.size()); ++k) {
        apart += (x[k] - y[k]) * (x[k] - y[k]);
        norm += y[k] * y[k];
      }
    }
  }
  return norm > 0 ? std::sqrt(apart / norm) : apart > 0 ? INFINITY : 0;
}

void judge(Comparison& c) {
  // Whatever rounding may do to one tensor: nothing at all is off by 1.
  c.equal = c.loss_error <= std::min(c.tolerance, kMostApart) && c.gradient_error <= c.tolerance &&
            c.parameter_error <= c.tolerance && c.gradient_distance <= kMostApart;
}

}  // namespace

Comparison compare(const Graph& graph, const RunResult& run, const RunResult& serial,
                   double tolerance, RelativeTo scale) {
  Comparison c;
  c.tolerance = tolerance;
  const auto note = [](double e, double& worst, std::string& name, const std::string& candidate) {
    if (!(e <= worst)) worst = e, name = candidate;
  };
  for (std::size_t s = 0; s < serial.losses.size(); ++s) {
    c.steps.push_back({run.losses[s][0], serial.losses[s][0]});
    for (std::size_t r = 0; r < serial.losses[s].size(); ++r) {
      const double e = std::abs(run.losses[s][r] - serial.losses[s][r]) /
                       std::max(1.0, std::abs(serial.losses[s][r]));
      if (!(e <= c.loss_error)) c.loss_error = e;
    }
  }
  for (std::size_t r = 0; r < serial.parameters.size(); ++r) {
    const auto gradient_scale = scales_of(graph, serial.gradients[r], scale);
    const auto parameter_scale = scales_of(graph, serial.parameters[r], scale);
    for (std::size_t q = 0; q < graph.parameters.size(); ++q) {
      const std::string& name = graph.parameters[q].name;
      note(error_of(run.gradients[r][q], serial.gradients[r][q], gradient_scale[q]),
           c.gradient_error, c.worst_gradient, name);
      note(error_of(run.parameters[r][q], serial.parameters[r][q], parameter_scale[q]),
           c.parameter_error, c.worst_parameter, name);
    }
  }
  c.gradient_distance = distance(run.gradients, serial.gradients);
  judge(c);
  return c;
}

double rounding_allows(double d, double longest, double half_spacing) {
  const double each = (longest + 8) * std::max(d, 0x1p-24);
  if (half_spacing == 0) return each;
  return std::min(each, kNarrowRoundings * std::max(d, half_spacing) +
                            (longest + 8) * std::max(d * 0x1p-24 / half_spacing, 0x1p-24));
}

namespace {

struct Rounding {
  double tolerance = 0;
  RunResult run;  ///< whose stored values and operands are rounded
};

Rounding rounding_of(const Graph& graph, const Program& program, const RunResult& serial,
                     const RunOptions& exact) {
  RunOptions options = exact;
  options.round = true;
  Rounding rounding;
  rounding.run = interpret(program, options);
  const auto effect = [&](const RunResult& run) {
    const Comparison c = compare(graph, run, serial, 0);
    return std::max({c.loss_error, c.gradient_error, c.parameter_error});
  };
  double longest = 1;
  bool eights = false;
  for (const ProgramOperator& op : program.operators) {
    eights |= op.compute == ElementType::fp8;
    for (const IterationDim& d : op.signature.dims)
      longest = std::max(longest, static_cast<double>(d.extent));
  }
  double stored = effect(rounding.run), operands = 0;
  if (program.compression.kind == CompressionKind::cast) {
    options.casts_past_ties = true;
    stored = std::max(stored, effect(interpret(program, options)));
    options.casts_past_ties = false;
  }
  if (eights) {
    const double least = error_of_products(of_gradients(program.fp8_format), EightBits::e4m3);
    operands = 2 * std::max(stored, least);
    options.round_operands = false;
    stored = effect(interpret(program, options));
  }
  // What is stored in 16 bits is made in fp32: only that grows with a sum's length.
  double half_spacing = 0;  // relative, of the coarsest type
  for (const Buffer& b : program.buffers) {
    if (b.element_bytes == 0 && storage(b.type, 1).count == 2)
      half_spacing = std::max(half_spacing, spacing(b.type) / 2);
  }
  rounding.tolerance = rounding_allows(stored, longest, half_spacing) + operands;
  return rounding;
}

}  // namespace

double tolerance_of_rounding(const Graph& graph, const Program& program, const RunResult& serial,
                             const RunOptions& exact) {
  return rounding_of(graph, program, serial, exact).tolerance;
}

Comparison compare_in_own_types(const Graph& graph, const Program& program, const RunResult& run,
                                const RunResult& serial, const RunOptions& options) {
  const Rounding rounding = rounding_of(graph, program, serial, options);
  Comparison c = compare(graph, run, serial, rounding.tolerance);
  if (!c.equal) {
    c.gradient_distance =
        std::min(c.gradient_distance, distance(run.gradients, rounding.run.gradients));
    judge(c);
  }
  return c;
}

}  // namespace partita::reference
