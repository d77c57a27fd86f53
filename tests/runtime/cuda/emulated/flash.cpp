// In the place of runtime/cuda/flash.cu.
#include "runtime/cuda/cuda_machine.h"
#include "tests/runtime/cuda/emulated/gpu.h"
#include "tests/runtime/cuda/host_machine.h"

namespace partita::cuda {

void CudaMachine::own_flash(const FlashCall& call, FlashPass pass) {
  with_flash_kernel(call, pass, [&](const auto& kernel) {
    using K = std::decay_t<decltype(kernel)>;
    check(emulated::launch(stream_, "flash_kernel",
                           [kernel] {
                             for (std::int64_t n = 0; n < kernel.blocks(); ++n) {
                               HostBlock block(K::kWarps, K::kWords, n % 2 == 0);
                               kernel(block, n);
                             }
                           }),
          "start of attention");
  });
}

}  // namespace partita::cuda
