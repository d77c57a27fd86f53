// runtime/cuda/convolutions.h: convolutions by cuDNN.
#pragma once

#include <memory>
#include <string>

#include "runtime/cuda/machine.h"

namespace partita::cuda {

class CudaMachine;

class Convolutions {
 public:
  virtual ~Convolutions() = default;
  /// Contract of a machine's convolve (operators.h).
  virtual bool run(CudaMachine& m, const ConvolutionShape& shape, ConvolutionPass pass, Numbers x,
                   Numbers w, Numbers y, bool adds) = 0;
};

/// Null where this build or machine has no cuDNN.
std::unique_ptr<Convolutions> make_convolutions(bool tf32);
/// "cuDNN 9.19.0"; empty: none.
std::string cudnn_version();

}  // namespace partita::cuda
