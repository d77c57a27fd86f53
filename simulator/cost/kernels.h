// simulator/cost/kernels.h: what products and attention take by their shape (docs/cost.md,
// "Products", "Attention").
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/units.h"
#include "topologies/device.h"

namespace partita {

/// `count` products [m, n] = [m, k] · [k, n] of one rank; k is what is summed over.
struct Product {
  double m = 0, n = 0, k = 0, count = 1;
  ElementType type = ElementType::fp32;  ///< of the operands, and of the matrix units
  ElementType out = ElementType::fp32;
  ProductLayout layout = ProductLayout::any;
  bool accumulate = false;  ///< adds to what is there
  bool grouped = false;     ///< `count` groups, launched one by one
  Bytes bytes;              ///< read and written in device memory
  bool fast_sums = false;   ///< an 8-bit forward's: sums stay in the matrix units
  bool convolution = false;  ///< groups of one: of a channel each, kernels without matrix units

  Flops flops() const { return Flops{2 * m * n * k * count}; }
  /// Operands and result, once each.
  Bytes operand_bytes() const;
  friend bool operator==(const Product&, const Product&) = default;
};

/// Flash attention of one rank.
struct FlashAttention {
  double batch = 1, queries = 0, keys = 0, heads = 0;  ///< heads of queries
  double qk = 0, v = 0;                                ///< values inside a head
  /// Pairs of query and key that are seen, of all; a kernel computes whole blocks around them.
  double attended = 1;
  bool backward = false;
  ElementType type = ElementType::bf16;
  Bytes bytes;
  int flash = 0;  ///< FlashAttention's kernel of this version, 1 or 2; 0: the device's best

  /// 2 products forward; 5 backward, q·k again among them (arXiv 2205.14135, algorithm 4).
  Flops flops() const;
  friend bool operator==(const FlashAttention&, const FlashAttention&) = default;
};

/// A kernel's time beside its launch, and the shares of it for which units and memory are busy.
struct KernelParts {
  Seconds units, memory;
  Seconds work;  ///< at least either
  /// Time of the units on the multiprocessors that a running transfer leaves, over that on all of
  /// them: waves counted again.
  double beside_transfers = 1;
};

/// The model: physics and the device's figures, no measured point. InputError where the device has
/// no rate for the type. `multiprocessors`: of the device's, how many are free. `clock`: over that
/// of short kernels.
KernelParts product_model(const Product& product, const DeviceProfile& device, int multiprocessors,
                          double clock = 1);
KernelParts attention_model(const FlashAttention& attention, const DeviceProfile& device,
                            int multiprocessors, double clock = 1);

/// Which clock a price is for: of one kernel on a rested device, or of work that goes on.
enum class Clock { brief, sustained };

/// Prices of one device: the model times what measured points nearby differ from theirs. The price
/// of a local problem is computed once. Not thread-safe.
class ShapePrices {
 public:
  explicit ShapePrices(const DeviceProfile& device, Clock clock = Clock::sustained);
  ~ShapePrices();
  ShapePrices(ShapePrices&&) noexcept;

  const KernelParts& of(const Product& product);
  const KernelParts& of(const FlashAttention& attention);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace partita
