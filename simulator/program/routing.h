// simulator/program/routing.h: which experts tokens go to, as data (docs/routing.md).
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "simulator/program/program.h"

namespace partita {

/// Rows per expert as a run has counted them.
struct Routing {
  struct Layer {
    std::string name;  ///< of its Dispatch operator
    std::int64_t experts = 0, top_k = 0;
  };
  struct Step {
    std::int64_t step = 0;
    /// [layer][(sample · pieces + piece) · experts + expert]
    std::vector<std::vector<std::int64_t>> counts;
  };
  std::string model;
  std::int64_t samples = 0;             ///< of a step: all micro-batches, all replicas
  std::vector<std::int64_t> positions;  ///< bounds of the sequence's pieces: 0 … its length
  std::vector<Layer> layers;
  std::vector<Step> steps;
};

/// InputError names place, value and remedy.
Routing load_routing(const std::string& file);
std::string to_json(const Routing& routing);

/// balanced, zipf:S or a recording.
struct RoutingSource {
  std::optional<double> zipf;
  std::optional<Routing> recorded;
  bool balanced() const { return !zipf && !recorded; }
};
/// InputError{place} on text that is none of these.
RoutingSource routing_source(const std::string& text, const std::string& place);

/// For each routed buffer the Dispatch operator that its rows come from; -1 for others.
std::vector<std::int32_t> dispatch_of_buffers(const Program& program);

/// Bounds at which some rank's part of a routed buffer's sequence begins or ends.
std::vector<std::int64_t> routed_positions(const Program& program);

/// The program with its routed buffers' rows known. With a recording, every call of a block becomes
/// a block of its own (`Block::copy_of`) after the original ones, which are called no more; they
/// keep their numbers, so that measurements of the original program can be looked up in it.
/// InputError where the recording is of another network, other samples or other cuts.
Program with_routing(Program program, const RoutingSource& source);

/// Rows of routed buffer `a` on rank `x` that are also of `b` on rank `y`; `a`'s routing.
std::int64_t common_rows(const Program& program, BufferId a, std::int64_t x, BufferId b,
                         std::int64_t y);

}  // namespace partita
