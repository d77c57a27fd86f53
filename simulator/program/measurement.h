// simulator/program/measurement.h: what a run of a Program measured. The runtime fills it in;
// whoever compares it with a prediction needs to know nothing else of the runtime.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/outside_memory.h"
#include "simulator/program/program.h"

namespace partita {

/// One instruction of one step; nanoseconds since rank 0's start of the step, on rank 0's clock.
struct Sample {
  std::int32_t block = 0, instruction = 0, micro_batch = 0;
  std::int64_t start = 0, end = 0;
};

/// What a rank has sent in one step.
struct Traffic {
  std::map<int, std::int64_t> bytes_to;  ///< by receiver; transports that send step by step only
  std::int64_t messages = 0;
  struct Calls {
    std::int64_t calls = 0, payload_bytes = 0;
  };
  /// Collectives made as one call, by kind; payload in the convention of docs/cost.md.
  std::map<CollectiveKind, Calls> collectives;
  std::int64_t sends = 0, send_bytes = 0;
};

/// What the library that links devices expects of a collective: of one pair of its algorithms and
/// protocols, or, of empty names, of the pair that it takes.
struct LinkEstimate {
  CollectiveKind kind = CollectiveKind::all_reduce;
  std::string algorithm, protocol;  ///< as NCCL spells them
  std::int64_t bytes = 0;           ///< all-gather and reduce-scatter: of all ranks together
  double us = 0;
};

struct RankMeasurement {
  int rank = 0;
  std::vector<double> step_s;                ///< by timed step
  std::vector<std::vector<Sample>> samples;  ///< by timed step, in program order, if recorded
  double clock_uncertainty_s = 0;            ///< how far the samples may be off rank 0's clock
  Bytes peak;                                ///< over all timed steps
  std::array<Bytes, kCategoryCount> at_peak{};
  Bytes last_peak;  ///< of the last step: rows routed to experts differ between steps
  std::array<Bytes, kCategoryCount> last_at_peak{};
  Bytes host_peak{};  ///< of what a device would keep in its host's memory
  Traffic traffic;    ///< of the last step
  Bytes reserved{};   ///< of its device, by its allocator: in use or kept
  OutsideMemory outside;
  /// Of a device: steps between whose instructions it was not asked for the time, which costs some.
  std::vector<double> plain_s;
  /// Of the same steps, until the host had queued all of it; none where it waited on its way.
  std::vector<double> queued_s;
  std::vector<double> captured_s;  ///< steps that were launched as one graph
  /// By recorded step, for each of a step's samples: nanoseconds that its kernels and copies had
  /// the device, by the device's own records, with what passes between two of them; 0: not known.
  std::vector<std::vector<std::int64_t>> kernel_ns;
  std::string no_kernel_ns;        ///< why there are none; empty: there are, or nobody asked
  std::vector<double> recorded_s;  ///< by recorded step: all of it, with what recording costs
};

}  // namespace partita
