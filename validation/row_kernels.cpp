#include "validation/row_kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "simulator/cost/cost.h"
#include "simulator/cost/kernels.h"
#include "validation/collectives.h"
#include "validation/row_text.h"

namespace partita::validation {
namespace {

std::optional<CollectiveKind> collective_kind(const std::string& text) {
  const std::string s = squeezed(text);
  if (s == "allreduce") return CollectiveKind::all_reduce;
  if (s == "allgather") return CollectiveKind::all_gather;
  if (s == "reducescatter") return CollectiveKind::reduce_scatter;
  if (s == "alltoall" || s == "all2all") return CollectiveKind::all_to_all;
  if (s == "broadcast") return CollectiveKind::broadcast;
  if (s == "reduce") return CollectiveKind::reduce;
  return std::nullopt;
}

bool is_transfer(const std::string& text) {
  const std::string s = squeezed(text);
  return s == "p2p" || s == "sendrecv";
}

/// Bus bandwidth over algorithm bandwidth (nccl-tests, doc/PERFORMANCE.md).
double bus_factor(const std::string& collective, double n) {
  const auto kind = collective_kind(collective);
  if (!kind) return 1;
  switch (*kind) {
    case CollectiveKind::all_reduce:
      return 2 * (n - 1) / n;
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::all_to_all:
      return (n - 1) / n;
    default:
      return 1;
  }
}

/// "1,024" -> 1024.
std::optional<double> count(std::string text) {
  if (text.find('.') == std::string::npos) std::erase(text, ',');
  return number(text);
}

/// "head_num=128" in `extra`.
std::optional<double> named(const std::string& extra, const std::string& key) {
  for (auto at = extra.find(key + "="); at != std::string::npos;
       at = extra.find(key + "=", at + 1)) {
    const char before = at == 0 ? ' ' : extra[at - 1];
    if (before != ' ' && before != ',') continue;
    const auto start = at + key.size() + 1;
    return number(extra.substr(start, extra.find_first_of(", ", start) - start));
  }
  return std::nullopt;
}

/// The first of several names for one thing.
std::optional<double> named(const std::string& extra, std::initializer_list<const char*> keys) {
  for (const char* key : keys)
    if (const auto n = named(extra, std::string(key))) return n;
  return std::nullopt;
}

bool is_attention(const std::string& kernel) {
  for (const char* word : {"attention", "flash", "sdpa", "sdp_"})
    if (kernel.find(word) != std::string::npos) return true;
  return false;
}

struct AttentionShape {
  double batch = 0, sequence = 0, heads = 0, kv_heads = 0, qk = 0, v = 0;
  bool backward = false, causal = true;
};

/// `cell(column)` of a row or of its configuration.
template <class Cells>
std::optional<AttentionShape> attention_shape(const Cells& row) {
  const std::string kernel = lower(row["kernel"]);
  const auto says = [&](const char* word) { return kernel.find(word) != std::string::npos; };
  if (!is_attention(kernel)) return std::nullopt;
  const std::string extra = lower(row["extra"]);
  AttentionShape a;
  a.batch = named(extra, {"batch", "batch_size", "b", "bs"}).value_or(0);
  a.sequence = named(extra, {"seq_len", "seqlen", "seq", "sequence", "s"}).value_or(0);
  a.heads = named(extra, {"head_num", "heads", "num_heads", "nheads", "h"}).value_or(0);
  a.kv_heads = named(extra, {"kv_head_num", "kv_heads", "num_kv_heads"}).value_or(a.heads);
  a.qk = named(extra, {"qk_head_dim", "head_dim", "headdim", "hdim", "d"}).value_or(0);
  a.v = named(extra, {"v_head_dim"}).value_or(a.qk);
  a.causal = !(says("non-causal") || says("non causal") || says("bidirectional") ||
               extra.find("causal=false") != std::string::npos ||
               extra.find("causal=0") != std::string::npos ||
               extra.find("non-causal") != std::string::npos);
  a.backward =
      kernel.find("backward") != std::string::npos || kernel.find("bwd") != std::string::npos;
  if (!(a.batch > 0 && a.sequence > 0 && a.heads > 0 && a.qk > 0)) return std::nullopt;
  return a;
}

double whole_square(const AttentionShape& a) {
  return 2 * a.batch * a.heads * a.sequence * a.sequence * (a.qk + a.v) * (a.backward ? 2.5 : 1);
}

struct ProductShape {
  double batch = 1, m = 0, n = 0, k = 0;
};

template <class Cells>
ProductShape product_shape(const Cells& row) {
  ProductShape p;
  p.m = count(row["m"]).value_or(0);
  p.n = count(row["n"]).value_or(0);
  p.k = count(row["k"]).value_or(0);
  p.batch = count(row["batch_or_groups"]).value_or(1);
  return p;
}

ProductLayout layout_of(const std::string& text) {
  const std::string word = lower(text);
  return word == "nn"   ? ProductLayout::nn
         : word == "nt" ? ProductLayout::nt
         : word == "tn" ? ProductLayout::tn
                        : ProductLayout::any;
}

/// The device without the points of this problem, in every layout and type: a price of them would
/// say nothing of the method.
template <class Same>
DeviceProfile without_points(const DeviceProfile& device, std::vector<std::string>& assumed,
                             Same&& erase) {
  DeviceProfile rest = device;
  std::size_t gone = erase(rest);
  if (rest.like != nullptr) {
    auto like = std::make_shared<DeviceProfile>(*rest.like);
    gone += erase(*like);
    rest.like = std::move(like);
  }
  if (gone > 0) assumed.push_back(fmt::format("{} measured points of this problem left out", gone));
  return rest;
}
DeviceProfile without(const DeviceProfile& device, const Product& p,
                      std::vector<std::string>& assumed) {
  const auto sorted = [](double m, double n, double k) {
    std::array<double, 3> all{m, n, k};
    std::sort(all.begin(), all.end());
    return all;
  };
  const auto problem = sorted(p.m, p.n, p.k);
  return without_points(device, assumed, [&](DeviceProfile& d) {
    std::size_t gone = 0;
    for (ProductTable& t : d.products)
      gone +=
          std::erase_if(t.points, [&](const auto& x) { return sorted(x.m, x.n, x.k) == problem; });
    std::erase_if(d.products, [](const ProductTable& t) { return t.points.empty(); });
    return gone;
  });
}
DeviceProfile without(const DeviceProfile& device, const FlashAttention& a,
                      std::vector<std::string>& assumed) {
  return without_points(device, assumed, [&](DeviceProfile& d) {
    std::size_t gone = 0;
    for (AttentionTable& t : d.attention)
      gone += std::erase_if(t.points, [&](const auto& x) {
        return x.batch == a.batch && x.queries == a.queries && x.keys == a.keys &&
               x.heads == a.heads && x.qk == a.qk && x.v == a.v;
      });
    std::erase_if(d.attention, [](const AttentionTable& t) { return t.points.empty(); });
    return gone;
  });
}

}  // namespace

double measured_collective(const Row& row) {
  if (const auto us = number(row["time_us"]); us && *us > 0) return *us * 1e-6;
  const double size = number(row["size_bytes"]).value_or(0);
  const double bus = number(row["busbw_gb_per_s"]).value_or(0);
  double n = number(row["num_gpus"]).value_or(0);
  if (n == 0) n = number(row["num_nodes"]).value_or(1) * number(row["gpus_per_node"]).value_or(0);
  const double algorithm = number(row["algbw_gb_per_s"]).value_or(0);
  if (size > 0 && !(bus > 0) && algorithm > 0) return size / (algorithm * 1e9);
  if (!(size > 0 && bus > 0 && n > 1)) return 0;
  return size * bus_factor(row["collective"], n) / (bus * 1e9);
}

double measured_product(const Row& row) {
  if (const auto s = number(row["time_s"]); s && *s > 0) return *s;
  const double rate = number(row["tflops"]).value_or(0) * 1e12;
  if (!(rate > 0)) return 0;
  if (const auto a = attention_shape(row)) return whole_square(*a) / rate;
  const ProductShape p = product_shape(row);
  return 2 * p.batch * p.m * p.n * p.k / rate;
}

KernelFigure collective_figure(const Configuration& row, const Catalogue& catalogue) {
  KernelFigure f;
  const auto kind = collective_kind(row["collective"]);
  if (!kind && !is_transfer(row["collective"]))
    throw InputError("collective", fmt::format("'{}' is unknown", row["collective"]));
  const auto size = row.whole("size_bytes", 1, 1'000'000'000'000);
  if (!size) throw InputError("size_bytes", "is not printed");
  const auto nodes = row.whole("num_nodes", 1, 100'000),
             per_node = row.whole("gpus_per_node", 1, 1000);
  std::int64_t n = row.whole("num_gpus", 0, 100'000).value_or(0);
  if (n == 0) {
    if (!per_node) throw InputError("num_gpus", "is not printed");
    n = nodes.value_or(1) * *per_node;
    f.assumed.push_back(fmt::format("{} GPUs", n));
  }
  if (n < 2) throw InputError("num_gpus", "a collective has at least 2");
  if (nodes && per_node && *nodes * *per_node < n)
    throw InputError("num_nodes",
                     fmt::format("{} nodes of {} have no {} GPUs", *nodes, *per_node, n));
  for (const char* other : {"gloo", "rccl", "oneccl", "mpi", "mscclpp", "nvshmem"}) {
    if (has_word(lower(row["library"]), other))
      throw InputError("library",
                       fmt::format("'{}' is not NCCL, the one that is modelled", row["library"]));
  }
  std::string inter = row["inter_node_interconnect"];
  if (inter == "none") inter.clear();
  const auto cluster_for = [&](std::int64_t gpus, std::vector<std::string>& assumed) {
    return cluster_of(catalogue, row["gpu"], "", gpus, per_node, row["intra_node_interconnect"],
                      inter, assumed);
  };
  std::vector<std::string> assumed;
  ClusterChoice cluster = cluster_for(n, assumed);
  if (nodes && *nodes > ceil_div(n, cluster.devices_per_node)) {
    // Nodes that are not full.
    assumed.clear();
    cluster = cluster_for(*nodes * cluster.devices_per_node, assumed);
  }
  f.assumed.insert(f.assumed.end(), assumed.begin(), assumed.end());
  const Topology topology = load_topology(cluster.topology, cluster.edits);
  // By the model alone: the clusters' curves may be these very rows.
  const std::int64_t on = nodes.value_or(ceil_div(n, cluster.devices_per_node));
  const CollectiveCurve curve =
      curve_on(topology, row["collective"], n, on, row["library"], row["intra_node_interconnect"]);
  f.seconds = 1e-6 * predicted_us(curve, static_cast<double>(*size), CollectiveConstants{});
  return f;
}

KernelFigure product_figure(const Configuration& row, const Catalogue& catalogue) {
  KernelFigure f;
  const DeviceProfile& device = device_of(catalogue, row["gpu"], "", "");
  const auto type = precision_of(row["precision"]);
  if (!type) throw InputError("precision", fmt::format("'{}' is not understood", row["precision"]));
  const ElementType compute = parse_element_type(type->name, "precision");
  Flops flops{0};
  if (const auto a = attention_shape(row)) {
    // Causal: half of the square is computed, whatever the row's FLOP/s count.
    f.assumed.emplace_back(a->causal ? "causal attention" : "attention of all keys");
    FlashAttention x{a->batch,
                     a->sequence,
                     a->sequence,
                     a->heads,
                     a->qk,
                     a->v,
                     a->causal ? (a->sequence + 1) / (2 * a->sequence) : 1,
                     a->backward,
                     compute,
                     {}};
    const double stored = bits(compute) / 8.0,
                 q = a->batch * a->sequence * a->heads * (a->qk + a->v),
                 kv = a->batch * a->sequence * a->kv_heads * (a->qk + a->v);
    x.bytes = Bytes{std::llround((a->backward ? 2.5 : 1) * stored * (q + kv))};
    const DeviceProfile rest = without(device, x, f.assumed);
    f.seconds = (device.kernel_latency + ShapePrices(rest, Clock::brief).of(x).work).count;
    flops = Flops{whole_square(*a) / (a->causal ? 2 : 1)};
  } else {
    const ProductShape p = product_shape(row);
    const std::string kernel = lower(row["kernel"]);
    for (const char* other : {"conv", "softmax", "norm", "elementwise", "reduce"}) {
      if (kernel.find(other) != std::string::npos)
        throw InputError("kernel",
                         fmt::format("'{}' is neither a product nor attention", row["kernel"]));
    }
    if (!(p.m > 0 && p.n > 0 && p.k > 0))
      throw InputError("m", fmt::format("the shape of '{}' is not printed", row["kernel"]));
    const std::string& extra = row["extra"];
    const auto says = [&](const char* what) { return extra.find(what) != std::string::npos; };
    Product x{p.m, p.n, p.k, p.batch, compute, compute, layout_of(row["layout"]), false, false, {}};
    if (says("out_dtype=fp32")) x.out = ElementType::fp32;
    // Of a linear operator of M rows, K inputs and N outputs: y = x wT, dx = dy w, dw += dyT x.
    if (says("stage=fwd")) {
      x.layout = ProductLayout::tn;
    } else if (says("stage=bwd_grad_act")) {
      x.n = p.k, x.k = p.n, x.layout = ProductLayout::nn;
    } else if (says("stage=bwd_grad_w")) {
      x.m = p.n, x.n = p.k, x.k = p.m, x.layout = ProductLayout::nt;
      if (says("main_grad_dtype=fp32")) x.out = ElementType::fp32;
    }
    x.accumulate = says("accumulate=True");
    x.grouped = lower(row["kernel"]).find("grouped") != std::string::npos;
    x.bytes = x.operand_bytes();
    const DeviceProfile rest = without(device, x, f.assumed);
    f.seconds = (device.kernel_latency + ShapePrices(rest, Clock::brief).of(x).work).count;
    flops = x.flops();
  }
  f.ideal = flops.count / device.matrix_rate(compute).count;
  return f;
}

}  // namespace partita::validation
