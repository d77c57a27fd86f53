// validation/journal.h: what calibration has measured so far, one line of JSON per unit, so that
// it can be interrupted at any time and go on (docs/calibration.md, "Interrupted").
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "base/outside_memory.h"
#include "topologies/measured.h"

namespace partita::validation {

/// A GPU's state as NVML gives it; 0: it says nothing.
struct Conditions {
  double clock_mhz = 0, memory_clock_mhz = 0, power_w = 0, temperature_c = 0;
  std::string throttled;  ///< what keeps its clock down; empty: nothing
  bool known() const { return clock_mhz > 0; }
  friend bool operator==(const Conditions&, const Conditions&) = default;
};

/// One thing measured in one round: a calibration run, the collectives, copies or overlap of one
/// number of ranks.
struct Unit {
  std::int64_t round = 0;
  int ranks = 1;
  std::string name;
  double seconds = 0;  ///< that it took
  KernelTable kernels;
  CollectiveTable collectives;
  SlowdownTable slowdown;
  std::vector<double> dispatch;  ///< seconds between two instructions
  std::vector<double> in_graph;  ///< the same inside a CUDA graph
  std::vector<double> launch;    ///< until the host has queued an instruction
  std::vector<double> list_row;  ///< until it has listed a row of experts
  std::vector<double> overlap;   ///< share of the smaller of transfer and compute
  std::string record;            ///< JSON of who measures something else: no part of a profile
  Conditions conditions;         ///< of the device, when it was measured
  OutsideMemory outside;         ///< of rank 0's device
  /// Of a GPU's kernels: what a step with its own records takes over a plain one, less 1; of those
  /// without, why there are none.
  std::optional<double> recording;
  std::string no_records;
  std::string failed;  ///< why there is no measurement; empty: there is
};

/// What may be joined: the same machine, the same way of measuring.
struct JournalHeader {
  std::string host;      ///< name, processor, kernel
  std::string settings;  ///< transport, ranks, steps, version
  friend bool operator==(const JournalHeader&, const JournalHeader&) = default;
};

/// Appends to `file`; each unit is one write, complete or, as its last line, torn and ignored.
class Journal {
 public:
  /// Without a file: in memory only.
  Journal() = default;
  /// Reads what is there. InputError{--out} where it is another machine's, other settings' or
  /// being written by someone else, with the remedy.
  Journal(const std::string& file, const JournalHeader& header);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  bool has(std::int64_t round, int ranks, const std::string& name) const;
  const Unit* find(std::int64_t round, int ranks, const std::string& name) const;
  void add(Unit unit);
  const std::vector<Unit>& units() const { return units_; }
  /// Seconds spent measuring, before an interruption too.
  double seconds() const;
  /// A journal that was kept as `name` is one again, to be gone on with, if its measurements took
  /// less than `seconds` and are the header's; else it stays what it is.
  static void reopen(const std::string& name, const std::string& file, const JournalHeader& header,
                     double seconds);
  /// The profile is complete: the journal becomes `name` beside it.
  void keep_as(const std::string& name);

 private:
  std::string file_;
  int descriptor_ = -1;
  std::vector<Unit> units_;
  std::set<std::tuple<std::int64_t, int, std::string>> known_;
};

}  // namespace partita::validation
