#include "runtime/cuda/fused_attention.h"

#ifdef PARTITA_CUDNN_FRONTEND
// Our JSON is another version than the one that comes with it.
#  define CUDNN_FRONTEND_SKIP_JSON_LIB
#  include <cudnn_frontend.h>
#  include <fmt/format.h>

#  include <cstdio>
#  include <cstdlib>
#  include <map>
#  include <set>
#  include <string>
#  include <string_view>
#  include <tuple>
#  include <unordered_map>

#  include "runtime/cuda/cuda_machine.h"
#endif

namespace partita::cuda {

#ifdef PARTITA_CUDNN_FRONTEND
namespace {

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

enum Place : std::int64_t { kQ = 1, kK, kV, kY, kStats, kDy, kDq, kDk, kDv };

/// All that a plan depends on.
using Key = std::tuple<bool, ElementType, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                       std::int64_t, std::int64_t, std::int64_t, float, bool>;

/// Log-sum-exps, for the backward; older headers ask the other way round.
template <class A>
void keep_stats(A& how) {
  if constexpr (requires { how.set_generate_stats(true); }) {
    how.set_generate_stats(true);
  } else {
    how.set_is_inference(false);
  }
}

class CudnnAttention : public FusedAttention {
 public:
  explicit CudnnAttention(cudnnHandle_t handle) : handle_(handle) {}
  ~CudnnAttention() override {
    plans_.clear();
    cudnnDestroy(handle_);
  }

  bool run(CudaMachine& m, const FlashCall& c, bool backward) override {
    const Heads& h = c.h;
    const bool whole = h.query_at.list == nullptr && h.key_at.list == nullptr &&
                       (!h.causal || (h.query_at.first == h.key_at.first && h.queries == h.keys));
    if (c.part || h.window > 0 || !(c.sinks == nullptr) || c.lse == nullptr || !whole) return false;
    const Key key{backward, c.type,  h.samples, h.queries, h.keys,  h.heads,
                  h.group,  h.width, h.v_width, h.scale,   h.causal};
    auto known = plans_.find(key);
    if (known == plans_.end()) known = plans_.emplace(key, build(c, backward)).first;
    Plan& plan = known->second;
    if (!plan.graph) return false;
    if (cudnnSetStream(handle_, m.stream()) != CUDNN_STATUS_SUCCESS) return false;
    std::unordered_map<std::int64_t, void*> at{
        {kQ, place(c.q)}, {kK, place(c.k)}, {kV, place(c.v)}, {kY, c.y}, {kStats, c.lse}};
    if (backward) {
      at[kDy] = place(c.dy);
      at[kDq] = c.dq, at[kDk] = c.dk, at[kDv] = c.dv;
    }
    void* room = plan.workspace > 0 ? m.scratch((plan.workspace + 3) / 4) : nullptr;
    fe::error_t e = plan.graph->execute(handle_, at, room);
    if (e.is_good()) return true;
    complain(e.get_message());
    plan.graph = nullptr;
    return false;
  }

 private:
  struct Plan {
    std::shared_ptr<fe::graph::Graph> graph;  ///< null: cuDNN has none
    std::int64_t workspace = 0;
  };
  static void* place(const std::uint16_t* p) { return const_cast<std::uint16_t*>(p); }

  void complain(const std::string& why) {
    if (said_.insert(why).second)
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
        plan = {graph, bytes};
      } else {
        complain(e.is_good() ? "it does not say how much memory it works in" : e.get_message());
      }
    } catch (const std::exception& e) {
      complain(e.what());
    }
    return plan;
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
      // Sums in one order: replicas of one value hold the same bits.
      auto how = fe::graph::SDPA_backward_attributes();
      how.set_name("gradients of attention")
          .set_attn_scale(h.scale)
          .set_deterministic_algorithm(true);
      if (h.causal) how.set_causal_mask(true);
      const auto [dq, dk, dv] = g.sdpa_backward(q, k, v, y, dy, stats, how);
      result(dq, kDq, heads, h.queries, h.width, h.q_row);
      result(dk, kDk, h.heads, h.keys, h.width, h.k_row);
      result(dv, kDv, h.heads, h.keys, h.v_width, h.v_row);
    }
    return g.build(handle_, {fe::HeurMode_t::A});
  }

  cudnnHandle_t handle_;
  std::map<Key, Plan> plans_;
  std::set<std::string> said_;
};

}  // namespace

std::unique_ptr<FusedAttention> make_fused_attention() {
  const char* wanted = std::getenv("PARTITA_CUDA_FLASH");
  if (wanted != nullptr && std::string_view(wanted) == "own") return nullptr;
  cudnnHandle_t handle = nullptr;
  if (cudnnCreate(&handle) != CUDNN_STATUS_SUCCESS) return nullptr;
  return std::make_unique<CudnnAttention>(handle);
}
#else
std::unique_ptr<FusedAttention> make_fused_attention() { return nullptr; }
#endif

}  // namespace partita::cuda
