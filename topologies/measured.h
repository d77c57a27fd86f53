// topologies/measured.h: what calibration measured on a device and between devices; data of
// profiles.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/element_type.h"
#include "base/units.h"

namespace partita {

/// One kernel at one local shape. Products have m, n, k (2 m n k FLOP each, `count` of them);
/// others the bytes that they read and write.
struct KernelPoint {
  int ranks = 1;  ///< that ran the same at once on the host
  double m = 0, n = 0, k = 0, count = 1;
  double bytes = 0;
  Seconds time;       ///< median
  double spread = 0;  ///< half the distance of the quartiles over the median
};
/// By kernel: "linear forward", "normalize data", "optimizer".
using KernelTable = std::map<std::string, std::vector<KernelPoint>>;

/// How the operands of a product [m, n] = [m, k] · [k, n] lie, as BLAS names it: TN a layer's
/// forward (rows of inputs, rows of weights), NN its backward by data, NT its backward by weight.
enum class ProductLayout : std::uint8_t { any, nn, nt, tn };
std::string_view name(ProductLayout layout);

/// Products of one kind on a GPU, one after the other: 2 m n k FLOP each, `count` of them at once.
struct ProductTable {
  ElementType type = ElementType::bf16;  ///< of the operands
  ElementType out = ElementType::bf16;
  ProductLayout layout = ProductLayout::any;
  bool accumulate = false;    ///< adds to what is there
  bool grouped = false;       ///< `count` groups, launched one by one
  bool mixed_clocks = false;  ///< some points ran at the sustained clock, others were too short
  bool replaces_nearby = false;  ///< other tables' points less than an octave away do not count
  double clock = 1;           ///< all ran at this share of the clock of short kernels
  double spread = 0;          ///< equal work measured again differs by so much, relative
  std::string source;
  struct Point {
    double m = 0, n = 0, k = 0, count = 1;
    Seconds time;
  };
  std::vector<Point> points;
};

/// Flash attention of one kind on a GPU.
struct AttentionTable {
  ElementType type = ElementType::bf16;
  bool backward = false;
  bool causal = false;
  bool mixed_clocks = false;  ///< as of products
  double spread = 0;
  std::string source;
  struct Point {
    double batch = 1, queries = 0, keys = 0, heads = 0, qk = 0, v = 0;
    Seconds time;
  };
  std::vector<Point> points;
};

/// A collective among `ranks` neighbouring devices; bytes as nccl-tests counts them.
struct CollectivePoint {
  int ranks = 2;
  Bytes bytes;
  Seconds time;
  double spread = 0;
  /// On the host at once, in groups like this one: where they are more than cores, who is waited
  /// for may wait for a core. 0: `ranks`, one group.
  int at_work = 0;
  /// Between GPUs: hosts, or NVLink domains, that they are on; 0: whatever it is.
  int nodes = 0;
  int working() const { return at_work > 0 ? at_work : ranks; }
};
/// By kind: "all_reduce"; of hosts also "send" and "receive".
using CollectiveTable = std::map<std::string, std::vector<CollectivePoint>>;

/// Kernels that transfers slow alike: by their products, flash attention, all others.
enum class KernelFamily : std::uint8_t { product, attention, memory };
inline constexpr int kKernelFamilies = 3;
std::string_view name(KernelFamily family);

/// A kernel that holds multiprocessors and copies as a transfer does, where there is no transfer.
inline constexpr const char* kStandIn = "stand_in";
/// What SlowdownPoint::beside may be: collectives by kind, "send", kStandIn.
const std::vector<std::string_view>& transfers_beside();

/// Kernels and a transfer that run at once: what either takes, over its time alone
/// (docs/calibration.md, "Slowdown").
struct SlowdownPoint {
  KernelFamily kernel = KernelFamily::product;
  std::string beside;
  int ranks = 1;            ///< of the transfer
  int multiprocessors = 0;  ///< that a stand-in holds; 0: it is none
  Bytes bytes;              ///< as nccl-tests counts them; of a stand-in, that it copies
  double of_kernel = 1, of_transfer = 1;
  double spread = 0;
};
using SlowdownTable = std::vector<SlowdownPoint>;
/// Slower than this is no sharing: a kernel or transfer that waits for the other to end.
inline constexpr double kMostSlowdown = 20;

}  // namespace partita
