#include "runtime/cuda/fused_attention.h"

#include <atomic>

#ifdef PARTITA_CUDNN_FRONTEND
// Our JSON is another version than the one that comes with it.
#  define CUDNN_FRONTEND_SKIP_JSON_LIB
#  include <cudnn_frontend.h>
#  include <fmt/format.h>

#  include <algorithm>
#  include <cstdio>
#  include <cstdlib>
#  include <map>
#  include <mutex>
#  include <set>
#  include <string>
#  include <string_view>
#  include <tuple>
#  include <unordered_map>

#  include "runtime/cuda/cuda_machine.h"
#endif

namespace partita::cuda {
namespace {
std::atomic<std::int64_t> calls = 0;
}  // namespace

std::int64_t fused_attention_calls() { return calls; }

#ifdef PARTITA_CUDNN_FRONTEND
namespace {

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Place : std::int64_t { kQ = 1, kK, kV, kY, kStats, kDy, kDq, kDk, kDv };

/// All that a plan depends on.
using Key = std::tuple<bool, ElementType, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       std::int64_t, std::int64_t, float, bool>;

/// Log-sum-exps, for the backward; older headers ask the other way round.
template <class A>
void keep_stats(A& how) {
  if constexpr (requires { how.set_generate_stats(true); }) {
    how.set_generate_stats(true);
  } else {
    how.set_is_inference(false);
  }
}

struct Plan {
  std::shared_ptr<fe::graph::Graph> graph;  ///< null: cuDNN has none
  std::int64_t workspace = 0;
};

/// A GPU's plans, of all runs of this process: cuDNN takes some tenths of a second to build one.
/// Never ended, as the libraries may be gone before this is.
struct Plans {
  // Ranks may be threads: one builds while another, by the other handle, executes.
  std::mutex guard, building;
  cudnnHandle_t handle = nullptr, builder = nullptr;
  std::int64_t handle_bytes = 0;  ///< both, of the GPU's memory
  std::map<Key, Plan> of;
  std::set<std::string> said;
};
Plans& plans_of(int device) {
  static std::mutex guard;
  static auto& all = *new std::map<int, Plans>;
  const std::lock_guard lock(guard);
  return all[device];
}
std::int64_t left() {
  std::size_t available = 0, all = 0;
  return cudaMemGetInfo(&available, &all) == cudaSuccess ? static_cast<std::int64_t>(available) : 0;
}

class CudnnAttention : public FusedAttention {
 public:
  CudnnAttention(Plans& plans, std::int64_t before) : plans_(plans), before_(before) {}
  std::int64_t taken_before() const override { return before_; }

  bool run(CudaMachine& m, const FlashCall& c, bool backward) override {
    const Heads& h = c.h;
    const bool whole = h.query_at.list == nullptr && h.key_at.list == nullptr &&
                       (!h.causal || (h.query_at.first == h.key_at.first && h.queries == h.keys));
    if (c.part || h.window > 0 || !(c.sinks == nullptr) || c.lse == nullptr || !whole) return false;
    const Key key{backward,  c.type,  h.samples, h.queries, h.keys,  h.heads, h.group, h.width,
                  h.v_width, h.q_row, h.k_row,   h.v_row,   h.y_row, h.scale, h.causal};
    if (failed_.count(key) > 0) return false;
    const Plan plan = plan_of(key, c, backward);
    if (!plan.graph) return false;
    void* room = nullptr;
    try {
      if (plan.workspace > 0) room = m.scratch((plan.workspace + 3) / 4);
    } catch (const MachineError& e) {
      complain(e.what());  // ours work in less
      return false;
    }
    const std::lock_guard lock(plans_.guard);
    if (cudnnSetStream(plans_.handle, m.stream()) != CUDNN_STATUS_SUCCESS) return false;
    std::unordered_map<std::int64_t, void*> at{
        {kQ, place(c.q)}, {kK, place(c.k)}, {kV, place(c.v)}, {kY, c.y}, {kStats, c.lse}};
    if (backward) {
      at[kDy] = place(c.dy);
      at[kDq] = c.dq, at[kDk] = c.dk, at[kDv] = c.dv;
    }
    fe::error_t e = plan.graph->execute(plans_.handle, at, room);
    if (e.is_good()) {
      ++calls;
      return true;
    }
    say(e.get_message());
    failed_.insert(key);
    return false;
  }

 private:
  static void* place(const std::uint16_t* p) { return const_cast<std::uint16_t*>(p); }

  /// Nothing that may wait for a peer is done under the lock, which that peer may want.
  Plan plan_of(const Key& key, const FlashCall& c, bool backward) {
    {
      const std::lock_guard lock(plans_.guard);
      if (const auto known = plans_.of.find(key); known != plans_.of.end()) return known->second;
    }
    const std::lock_guard alone(plans_.building);
    {
      // Another rank has built it meanwhile.
      const std::lock_guard lock(plans_.guard);
      if (const auto known = plans_.of.find(key); known != plans_.of.end()) return known->second;
    }
    Plan made = build(c, backward);
    const std::lock_guard lock(plans_.guard);
    return plans_.of.try_emplace(key, std::move(made)).first->second;
  }
  void complain(const std::string& why) {
    const std::lock_guard lock(plans_.guard);
    say(why);
  }
  void say(const std::string& why) {
    if (plans_.said.insert(why).second)
      std::fputs(fmt::format("note: attention is our own kernels', not cuDNN's: {}\n", why).c_str(),
                 stderr);
  }
  Plan build(const FlashCall& c, bool backward) {
    Plan plan;
    try {
      auto graph = std::make_shared<fe::graph::Graph>();
      fe::error_t e = describe(*graph, c, backward);
      std::int64_t bytes = 0;
      if (e.is_good() && graph->get_workspace_size(bytes).is_good()) {
        if (bytes <= most_workspace(c.h)) {
          plan = {graph, bytes};
        } else {
          complain(fmt::format("it works in {} bytes, more than grows with the tokens", bytes));
        }
      } else {
        complain(e.is_good() ? "it does not say how much memory it works in" : e.get_message());
      }
    } catch (const std::exception& e) {
      complain(e.what());
    }
    return plan;
  }
  /// Twice what gradients of queries, keys and values of every head take in fp32: some algorithms
  /// keep a matrix of all scores.
  static std::int64_t most_workspace(const Heads& h) {
    const std::int64_t numbers =
        h.samples * h.heads * h.group * (h.queries * h.width + h.keys * (h.width + h.v_width));
    return 2 * 4 * numbers + (std::int64_t{64} << 20);
  }
  fe::error_t describe(fe::graph::Graph& g, const FlashCall& c, bool backward) {
    const Heads& h = c.h;
    const fe::DataType_t type =
        c.type == ElementType::bf16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
    g.set_io_data_type(type)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const std::int64_t heads = h.heads * h.group;
    using Sizes = std::vector<std::int64_t>;
    // [sample, head, token, number], whose tokens are rows in memory.
    const auto sizes = [&](std::int64_t count, std::int64_t rows, std::int64_t width) {
      return Sizes{h.samples, count, rows, width};
    };
    const auto strides = [&](std::int64_t rows, std::int64_t width, std::int64_t row) {
      return Sizes{rows * row, width, row, 1};
    };
    const auto operand = [&](const char* name, Place at, std::int64_t count, std::int64_t rows,
                             std::int64_t width, std::int64_t row) {
      return g.tensor(fe::graph::Tensor_attributes()
                          .set_name(name)
                          .set_uid(at)
                          .set_dim(sizes(count, rows, width))
                          .set_stride(strides(rows, width, row)));
    };
    const auto result = [&](const Tensor& t, Place at, std::int64_t count, std::int64_t rows,
                            std::int64_t width, std::int64_t row) {
      t->set_output(true)
          .set_uid(at)
          .set_dim(sizes(count, rows, width))
          .set_stride(strides(rows, width, row));
    };
    const Sizes lines{h.samples, heads, h.queries, 1},
        line_strides{heads * h.queries, h.queries, 1, 1};
    const Tensor q = operand("q", kQ, heads, h.queries, h.width, h.q_row),
                 k = operand("k", kK, h.heads, h.keys, h.width, h.k_row),
                 v = operand("v", kV, h.heads, h.keys, h.v_width, h.v_row);
    if (!backward) {
      auto how = fe::graph::SDPA_attributes();
      how.set_name("attention").set_attn_scale(h.scale);
      keep_stats(how);
      if (h.causal) how.set_causal_mask(true);
      const auto [y, stats] = g.sdpa(q, k, v, how);
      result(y, kY, heads, h.queries, h.v_width, h.y_row);
      stats->set_output(true)
          .set_uid(kStats)
          .set_data_type(fe::DataType_t::FLOAT)
          .set_dim(lines)
          .set_stride(line_strides);
    } else {
      const Tensor y = operand("y", kY, heads, h.queries, h.v_width, h.y_row),
                   dy = operand("dy", kDy, heads, h.queries, h.v_width, h.y_row);
      const Tensor stats = g.tensor(fe::graph::Tensor_attributes()
                                        .set_name("stats")
                                        .set_uid(kStats)
                                        .set_data_type(fe::DataType_t::FLOAT)
                                        .set_dim(lines)
                                        .set_stride(line_strides));
      // Not its deterministic algorithm: on Hopper that works in a matrix of all scores (before
      // cuDNN 9.25), and nobody else trains with it. No two ranks make the same heads' gradients.
      auto how = fe::graph::SDPA_backward_attributes();
      how.set_name("gradients of attention").set_attn_scale(h.scale);
      if (h.causal) how.set_causal_mask(true);
      const auto [dq, dk, dv] = g.sdpa_backward(q, k, v, y, dy, stats, how);
      result(dq, kDq, heads, h.queries, h.width, h.q_row);
      result(dk, kDk, h.heads, h.keys, h.width, h.k_row);
      result(dv, kDv, h.heads, h.keys, h.v_width, h.v_row);
    }
    return g.build(plans_.builder, {fe::HeurMode_t::A});
  }

  Plans& plans_;
  std::int64_t before_;
  std::set<Key> failed_;  ///< in this run
};

}  // namespace

std::unique_ptr<FusedAttention> make_fused_attention() {
  const char* wanted = std::getenv("PARTITA_CUDA_FLASH");
  if (wanted != nullptr && std::string_view(wanted) == "own") return nullptr;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return nullptr;
  Plans& plans = plans_of(device);
  const std::lock_guard lock(plans.guard);
  if (plans.handle != nullptr) return std::make_unique<CudnnAttention>(plans, plans.handle_bytes);
  const std::int64_t before = left();
  if (cudnnCreate(&plans.builder) != CUDNN_STATUS_SUCCESS) return nullptr;
  if (cudnnCreate(&plans.handle) != CUDNN_STATUS_SUCCESS) {
    cudnnDestroy(plans.builder);
    plans.handle = nullptr;
    return nullptr;
  }
  plans.handle_bytes = std::max<std::int64_t>(0, before - left());
  return std::make_unique<CudnnAttention>(plans, 0);
}
#else
std::unique_ptr<FusedAttention> make_fused_attention() { return nullptr; }
#endif

}  // namespace partita::cuda
