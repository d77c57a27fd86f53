// simulator/engine/step_graph.h: the instructions of every class of ranks as tasks that contend.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "simulator/cost/cost.h"
#include "simulator/engine/contend.h"
#include "simulator/engine/device_use.h"
#include "simulator/engine/links.h"
#include "simulator/engine/progress.h"
#include "simulator/program/program.h"

namespace partita {

/// Resources of a folded cluster, and what an instruction uses of them (docs/sharing.md, "A
/// training step"): links by class of links; multiprocessors and memory bandwidth by class of
/// devices, as fractions of one. Where a device was measured with kernels and transfers at once
/// ("Kernels and transfers at once, as measured"): for each of its streams with transfers and each
/// family of kernels what a transfer leaves kernels, and what a kernel leaves transfers.
class Usages {
 public:
  Usages(const Program& program, Communication& communication, const SharedLinks& links);

  /// A kernel beside which transfers may run; -1 for one whose time says nothing of what it uses.
  /// `work`: of its time, what sharing stretches.
  std::int32_t kernel(const Instruction& instruction, std::int32_t rank_class, Seconds& work);
  /// A collective of ranks of the classes `members`, or a send to class `members[1]`; `work`: of
  /// the time that it takes alone, what sharing stretches.
  std::int32_t collective(const Instruction& instruction, const std::vector<std::int64_t>& group,
                          const std::vector<int>& members, Bytes bytes, Seconds& work);
  std::int32_t send(const Instruction& instruction, std::int64_t rank, std::int64_t peer,
                    Bytes bytes, Seconds& work);
  std::int32_t copy(const Instruction& instruction, std::int64_t rank, Bytes bytes, Seconds time);
  Sharing& sharing() { return sharing_; }
  const std::vector<Usage>& all() const { return usages_; }
  /// "node0.nic0->rail0 and 63 like it", "multiprocessors", "memory".
  std::string resource_name(ResourceId r) const;

 private:
  void cross(Usage& usage, const TransferKind& kind, std::int32_t rank_class, double rate);
  /// `lane`: of the transfer's stream, of those that the device sends on, or receives on.
  void occupy(Usage& usage, std::int32_t rank_class, const DeviceUse& use, std::size_t lane);
  std::size_t lane_of(const Instruction& transfer, bool arrives) const;
  /// What kernels of a family need all of and transfers hold a part of; or, `back`, the other way
  /// round.
  ResourceId at_once(std::int32_t device_class, std::size_t lane, int family, bool back) const;
  /// The largest of_transfer that the device of the class's ranks was measured with.
  double most_slowdown(std::int32_t rank_class, int family) const;
  std::int32_t keep(Usage usage);
  TransferKind kind_of(const Instruction& instruction, std::int32_t rank_class);

  const Program& program_;
  Communication& communication_;
  const SharedLinks& links_;
  std::vector<std::int64_t> first_of_stage_;
  Sharing sharing_;
  ResourceId first_units_, first_memory_, first_at_once_;
  std::vector<Stream> lanes_;  ///< streams with transfers, where devices were measured at once
  std::vector<Usage> usages_;
};

/// Built by walking every class's instructions in program order; then played. What starts when is
/// as in docs/simulation.md; how long it takes depends on what else runs.
class StepGraph {
 public:
  StepGraph(std::size_t classes, std::size_t streams, const std::vector<std::size_t>& slots);

  struct Instance {
    Task task;
    Stream stream = 0;
    bool after_compute = false;
    std::span<const std::size_t> waits, marks;  ///< slots of the class
    std::int64_t launch = 0;                    ///< of the host's time, before it may start
    bool host_waits = false;                    ///< before it launches, as Step
    bool host_joins = false;                    ///< of a receive: waits until it is there
  };
  void step(int rank_class, const Instance& instance);
  /// One task for all classes that name the same key.
  void meet(int rank_class, const Instance& instance, const MeetingKey& key);
  /// A transfer is one interval on both sides.
  void send(int rank_class, const Instance& instance, std::uint64_t message);
  void receive(int rank_class, const Instance& instance, std::uint64_t message);

  /// Instructions each of which waits for the one before; what any of them waits for or makes
  /// outside, by where it stands among them.
  struct Link {
    std::int32_t part = 0;
    Stream stream = 0;       ///< that it waits for, or is the last one of
    std::int64_t slot = -1;  ///< not a stream but a buffer, of the class
  };
  struct Run {
    std::int32_t chain = 0, parts = 0;
    Stream stream = 0;                   ///< of the last
    std::int64_t launch = 0;             ///< of all
    std::span<const Link> waits, makes;  ///< waits by part
  };
  /// Can instructions that the host starts in so much time be one task? After a wait of the host's
  /// each launch is one.
  bool joins(int rank_class, std::int64_t launch) const;
  /// How many of the run's first instructions may be one task; 0: none. What the others wait for
  /// may end after the first began.
  std::int32_t joinable(int rank_class, const Run& run) const;
  /// All of them as one task.
  void run(int rank_class, const Run& run);
  std::int32_t add_chain(std::vector<Task> parts) { return tasks_.add_chain(std::move(parts)); }

  /// Instructions inside runs that others wait for without waiting for the run's end: by class and
  /// instance. Runs must be cut after them and the graph built again.
  struct Cut {
    int rank_class = 0;
    std::int32_t instance = 0;
  };
  const std::vector<Cut>& cuts() const { return cuts_; }

  struct Stretched {
    std::int32_t instance = 0;
    std::int64_t ticks = 0;
  };
  struct Played {
    std::vector<std::vector<Stretched>> stretched;  ///< by class: what took another time than alone
    std::vector<std::vector<Loss>> losses;          ///< by class; `task` is the instance
    std::int64_t events = 0;
  };
  Played play(Sharing& sharing, const std::vector<Usage>& usages);

 private:
  /// A place in a class's program: node, and the instruction in it.
  struct Place {
    std::int32_t node = -1, part = 0;
  };
  struct Node {
    std::int32_t task = 0, first = 0, parts = 1;  ///< first: instance
    std::int64_t alone = -1;                      ///< ticks, of one that is no run
    Stream stream = 0;                            ///< of its last part
  };
  struct Class {
    std::vector<Node> nodes;
    std::vector<Place> last_on;  ///< by stream
    std::vector<Place> made_by;  ///< by slot
    /// By node and stream: the last node that has ended when this one has; streams are in order.
    std::vector<std::int32_t> ended;
    std::int32_t instances = 0;
  };
  bool over(const Class& c, Place place, const std::vector<std::int32_t>& ended) const;
  void wait(Place place);
  void begin_node(Class& c);
  void end_node(int rank_class, const Node& node);
  void follow(int rank_class, const Instance& instance, std::int32_t task);
  void launch(int rank_class, const Instance& instance, std::int32_t task);

  std::size_t streams_;
  Contention tasks_;
  std::vector<Class> classes_;
  std::vector<std::int32_t> ended_;  ///< of the node being added, when it begins
  std::vector<Place> waits_;         ///< its own
  std::vector<Cut> cuts_;
  std::unordered_map<MeetingKey, std::int32_t, MeetingKey::Hash> meetings_;
  std::unordered_map<std::uint64_t, std::int32_t> sends_;
  /// Until it first waits for its device, a host's launches end at times that nothing changes.
  struct Host {
    std::int64_t at = 0;
    std::int32_t task = -1;  ///< its last launch, since it has waited
  };
  std::vector<Host> hosts_;  ///< by class
  struct Receive {
    std::int32_t task = 0;
    std::uint64_t message = 0;
  };
  std::vector<Receive> receives_;
};

}  // namespace partita
