// runtime/cpu/fast.h: the kernels of the operators that training spends its time in. Each returns
// false where it does not know the case; the caller then converts and asks the reference kernel.
#pragma once

#include <memory>
#include <vector>

#include "runtime/cpu/kernels.h"

namespace partita::cpu {

/// What a kernel keeps between calls: tables, descriptors of a library, space to work in.
struct Kept {
  std::vector<float> space, table;
  std::shared_ptr<void> library;     ///< oneDNN primitives of this convolution
  std::vector<RoutedResult> routed;  ///< results whose rows the kernel has found
};

bool fast_forward(const reference::Context& c, const Arguments& a, Kept& kept);
bool fast_backward_data(const reference::Context& c, const Arguments& a, Kept& kept);
bool fast_backward_weight(const reference::Context& c, const Arguments& a, Kept& kept);
bool fast_forward_statistic(const reference::Context& c, std::size_t k, const Arguments& a);
bool fast_backward_statistic(const reference::Context& c, std::size_t k, const Arguments& a);

/// Attention of one part of the keys of a ring.
void attend_part(const reference::Context& c, const Arguments& a);
void attend_part_backward(const reference::Context& c, const Arguments& a);

/// Convolutions by oneDNN.
enum class ConvolutionPass { forward, data, weight };
bool convolve(const reference::Context& c, const Arguments& a, Kept& kept, ConvolutionPass pass);

}  // namespace partita::cpu
