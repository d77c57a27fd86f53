// simulator/search/step_load.h: how long a step's transfers keep links busy, rank by device.
//
// What a search of placements weighs mappings by (docs/topologies.md, "Placements"): much cheaper
// than a simulation, and changed mapping by mapping only where ranks have moved.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/links.h"
#include "simulator/engine/simulate.h"
#include "simulator/plan/placement.h"
#include "simulator/program/program.h"

namespace partita {

/// The busiest link of one axis' transfers.
struct AxisBusy {
  std::string axis;  ///< "dp", "tp", "pipeline", "tied", "host"
  Seconds busy;      ///< per step: bytes over bandwidth, and latencies
  LinkId link;       ///< invalid: the axis crosses none
};

class StepLoad {
 public:
  /// Ranks on devices as numbered; `topology` in a state without placement or rings. `played`: the
  /// step on `device`, whose exposed times and computing say what counts; the load there is what
  /// others are compared with.
  StepLoad(const Program& program, const Topology& topology, ElementType compute,
           const Timeline& played, std::vector<std::int32_t> device);

  /// Seconds that the step takes by these loads, less what no mapping changes; at equal ones, how
  /// evenly links are loaded: the sum of their squares.
  struct Value {
    double time = 0, squares = 0;
    /// By more than rounding?
    bool better_than(const Value& other) const;
  };
  const Value& value() const { return value_; }
  const std::vector<std::int32_t>& device() const { return device_; }

  /// Ranks that move, and strides of rings that change. Once proposed, kept or taken back.
  struct Change {
    std::vector<std::pair<std::int64_t, std::int32_t>> moves;    ///< rank, device
    std::vector<std::pair<std::int32_t, std::int64_t>> strides;  ///< ring, stride
  };
  Value propose(const Change& change);
  void keep();
  void take_back();
  /// Everything as `device` and `strides` (by ring) say.
  void set(const std::vector<std::int32_t>& device, const std::vector<std::int64_t>& strides);

  /// Rings of one axis, by group (strides_by_group()).
  struct RingAxis {
    std::int64_t size = 0;
    std::vector<std::int32_t> rings;
  };
  const std::map<std::string, RingAxis>& ring_axes() const { return ring_axes_; }
  std::vector<std::int64_t> strides() const;
  std::int64_t ring_count() const { return static_cast<std::int64_t>(ring_of_.size()); }

  /// Can no mapping be better: nothing is exposed, and devices are equal?
  bool at_its_best() const;
  /// Is the device slow, or of another kind than most, or one of its links?
  bool odd(std::int32_t device) const { return odd_[static_cast<std::size_t>(device)] != 0; }
  std::vector<AxisBusy> busiest() const;
  std::int64_t mappings() const { return mappings_; }
  /// Routes asked for so far, and looks through loads counted as such; routes of all transfers
  /// once.
  std::int64_t routes() const { return routes_; }
  std::int64_t routes_of_all() const { return routes_of_all_; }

 private:
  struct Transfer {
    TransferKind kind;
    int axis = 0;
    std::vector<std::int64_t> members;
    double bytes = 0, hops = 0;  ///< of a rank and step; latencies that follow each other
    std::int64_t stride = 1;
    std::vector<std::pair<std::int32_t, double>> loads;  ///< dense link, seconds
    double latency = 0;
  };
  void route(Transfer& t);
  void add(const Transfer& t, double sign);
  Value weigh() const;
  double computing() const;

  const Program& program_;
  Communication communication_;
  std::vector<std::int32_t> device_;
  std::vector<Transfer> transfers_;
  std::vector<std::vector<std::int32_t>> of_rank_;  ///< transfers
  std::vector<std::int32_t> ring_of_;               ///< ring -> transfer
  std::map<std::string, RingAxis> ring_axes_;
  std::vector<std::string> axes_;
  std::vector<double> exposed_, busy_before_;  ///< by axis
  std::vector<std::int32_t> dense_;            ///< by link
  std::vector<LinkId> link_;
  std::vector<double> capacity_;
  std::vector<std::vector<double>> load_;  ///< [axis][dense link], seconds
  std::vector<double> work_, rate_;        ///< by stage; by device
  std::vector<char> odd_;
  bool even_ = true;  ///< all devices are as fast
  Value value_;
  std::int64_t mappings_ = 0, routes_ = 0, routes_of_all_ = 0;
  // What take_back() needs.
  std::vector<std::pair<std::int32_t, Transfer>> before_;
  std::vector<std::pair<std::int64_t, std::int32_t>> moved_;
  std::vector<char> touched_;
  Value proposed_;
};

}  // namespace partita
