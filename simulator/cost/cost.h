// simulator/cost/cost.h: what one instruction takes on idle hardware.
//
// docs/cost.md: products and attention by shape, other kernels by bytes over bandwidth; between
// GPUs NCCL's times (docs/nccl.md), else latency + bytes / bandwidth on the real route.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/units.h"
#include "simulator/cost/adjustment.h"
#include "simulator/cost/kernels.h"
#include "simulator/cost/link_flows.h"
#include "simulator/program/program.h"
#include "topologies/topology.h"

namespace partita {

/// Work and traffic of one compute instruction on one rank.
struct Work {
  Flops flops;
  bool matrix = false;  ///< on the matrix units, in the operator's compute type
  ElementType type = ElementType::fp32;
  Bytes bytes;  ///< read and written in device memory
  double kernels = 1;  ///< a share of one that takes several tensors
  /// By shape, where it is products or flash attention. `streamed` is what kernels beside them
  /// move: the softmax of a materialised attention, the cast of a gradient.
  std::vector<Product> products;
  std::optional<FlashAttention> attention;
  Bytes streamed;
  Bytes ordered;  ///< likewise, of kernels that order rows: at `share`
  Bytes again;  ///< read a second time, besides `bytes`
  /// > 0: the kernel gets its `bytes` at this share of the device's memory bandwidth, though what
  /// streams gets more; memory is busy only as long as that.
  double share = 0;
  /// `products` are of the whole sequence, of which this is one of so many equal parts that run on
  /// streams beside each other: their waves fill up.
  double parts = 1;
  Seconds launched;  ///< in which the host starts the kernels, where that may take longer
  int groups = 0;    ///< kernels more that the host starts, group by group, which are one by shape
};
Work work_of(const Program& program, const Instruction& instruction, std::int64_t rank);
/// What the passes over all gradients before the optimizer move of the device's memory (norms,
/// copies: the framework's `gradient_passes`), part of the optimizer's work unless that runs on the
/// host. No bytes of any other instruction.
Bytes gradient_passes(const Program& program, const Instruction& instruction, std::int64_t rank);

/// t = kernels · launch + work. By shape, one kernel after the other, where `work` has shapes and
/// the device is a GPU (kernels.h); else max(flops / (rate · efficiency), bytes / (bandwidth ·
/// efficiency)). `prices` are those of the device.
Seconds kernel_time(const Work& work, const DeviceProfile& device, ShapePrices& prices);
KernelParts kernel_parts(const Work& work, const DeviceProfile& device, ShapePrices& prices);

/// Work that the network's mathematics asks of this instruction: model and recomputed FLOPs,
/// without what a kernel does twice for its own reasons.
Flops mathematical_flops(const Program& program, const Instruction& instruction, std::int64_t rank);

/// Rows that the routing leaves this rank of the instruction's routed buffers, relative to balanced
/// experts; 1 where nothing is routed.
double load_of_experts(const Program& program, const Instruction& instruction, std::int64_t rank);

/// Fraction of query-key pairs that a causal or windowed attention computes on this rank.
double attended_fraction(const Program& program, const ProgramOperator& op, std::int64_t rank);

/// Steps and bytes on the wire per rank of a ring (or pairwise) algorithm, for `bytes` as
/// nccl-tests counts them: all_reduce and reduce_scatter the input, all_gather the output,
/// all_to_all what one rank holds.
struct WireCount {
  std::int64_t steps = 0;
  Bytes bytes;
};
WireCount wire_count(CollectiveKind kind, std::int64_t ranks, Bytes bytes);

/// Payload of a collective instruction on `rank`, in the convention of wire_count; all buffers of
/// the call.
Bytes payload(const Program& program, const Instruction& instruction, std::int64_t rank);
/// What a rank sends of a buffer that goes to another stage: where it shares copies with others
/// (Program::scattered_messages) its part, else all of it.
Bytes message_bytes(const Program& program, BufferId buffer, std::int64_t rank);

/// Keys of the rows that our runtime sends ahead of a routed exchange's values, after their counts;
/// 0 for other collectives.
Bytes key_bytes(const Program& program, const Instruction& instruction, std::int64_t rank);

/// Copies of a row that leave for `parts` parts, of the top_k that go to experts, where a part gets
/// one whatever number of its experts want it:
///
///     parts · (1 − C(experts − experts / parts, top_k) / C(experts, top_k)) / top_k
///
/// Balanced experts, drawn evenly. 1 for top_k = 1 or as many parts as experts.
double rows_once_fraction(std::int64_t experts, std::int64_t top_k, std::int64_t parts,
                          std::int64_t groups = 1, std::int64_t top_groups = 1);

/// Of the time of exchanges of rows that run beside another micro-batch's blocks, what a rank still
/// waits for or loses: 1 - paired · min(1, compute / exchanges) · (1 - taken). `compute` and
/// `exchanges` are a rank's in all, `paired` is the share of its blocks that run in twos, `taken`
/// that of its multiprocessors that exchanges take meanwhile (docs/cost.md, "In twos").
double exposed_in_twos(Seconds compute, Seconds exchanges, double paired, double taken);

/// Is this a copy to, from or on the host, or a kernel that the host runs?
bool on_host(const Program& program, const Instruction& instruction);

/// Does it read from storage?
bool from_storage(const Program& program, const Instruction& instruction);

/// Place of the message that storage has no speed.
inline constexpr const char* kStorage = "storage";

/// Prices of communication between ranks placed on devices 0, 1, 2, ..., and the caches of kernels'
/// prices on these devices. Caches by group; not thread-safe.
class Communication {
 public:
  explicit Communication(Topology topology);
  ~Communication();
  Seconds collective(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks);
  /// Of a shift that is a copy into the next rank's memory, where all are on one node's NVLink,
  /// with a kernel that tells it and one that waits there (Transformer Engine,
  /// common/comm_gemm_overlap/userbuffers/userbuffers.cu: kuserbuffers_inc,
  /// kuserbuffers_pushrecv); else as collective().
  Seconds peer_copy(Bytes bytes, const std::vector<std::int64_t>& ranks);
  /// Of a collective's payload, what travels: less where rows go once to a domain (`rows_once`).
  Bytes travelling(const Program& program, const Instruction& instruction, Bytes payload,
                   const std::vector<std::int64_t>& ranks) const;
  /// Of a copy between device and host, over the device's link, or of work in the host's memory, of
  /// which every device has its share. InputError where the topology does not say.
  Seconds host_time(const Program& program, const Instruction& instruction, std::int64_t rank);
  /// Of a read from storage, of which every device of a node has its share. InputError{kStorage}
  /// where the topology does not say how fast it is.
  Seconds storage_time(const Program& program, const Instruction& instruction, std::int64_t rank);
  Seconds point_to_point(Bytes bytes, std::int64_t from, std::int64_t to);
  /// How a collective lies on links: by the algorithm that NCCL chooses; where NCCL is not what
  /// runs it in rings, or all pairs.
  Lay lay(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks);
  /// The link that host_time() uses, towards the host or from it; invalid where a copy crosses
  /// none.
  std::vector<LinkId> host_route(std::int64_t rank, bool towards_host) const;
  /// Of the time of collective() or point_to_point() what moves bytes, the part that sharing
  /// stretches, and at which rate it moves a rank's bytes. `copies`: of peer_copy().
  struct Moving {
    Seconds time;
    BytesPerSecond rate;
  };
  Moving moving(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks,
                bool copies = false);
  Moving moving(Bytes bytes, std::int64_t from, std::int64_t to);
  /// Multiprocessors that a collective keeps: NCCL's channels; 0 where NCCL is not what runs it.
  int channels(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks);
  /// Of a member's memory: NCCL's buffers of its connections; 0 where NCCL is not what connects.
  Bytes communicator_memory(const std::vector<std::int64_t>& ranks);
  /// Are all devices GPUs, whose collectives are NCCL's?
  bool uses_nccl() const;
  /// Were prices measured by ranks that share what they use, so that sharing is in them?
  bool measured_together() const;
  /// What of a transfer holds its sender, or its receiver once the message has come; empty where
  /// that was not measured.
  std::optional<Seconds> held(Bytes bytes, bool sender) const;
  /// Kernels' prices of the rank's device.
  ShapePrices& shapes(std::int64_t rank);
  /// Of whoever simulates with these prices: what measured steps say of them.
  void set_adjustment(const Adjustment& adjustment);
  const Adjustment& adjustment() const;
  /// Of collectives between GPUs only the model counts, no measured curve: for checks of it.
  void leave_out_curves();
  /// Ranks of a host that work at once: measured prices are of so many, or the nearest number.
  void set_at_work(std::int64_t ranks);
  /// How many were at work when what prices this kind among so many ranks was measured; 0 where it
  /// was not.
  int measured_at_work(const std::string& kind, int ranks) const;
  /// Equal for groups whose communication costs the same whatever the size; `exchanges`:
  /// all-to-alls too.
  std::uint64_t price_class(const std::vector<std::int64_t>& ranks, bool exchanges);
  struct Way {
    BytesPerSecond bandwidth;  ///< of the whole group, for each rank's bytes in a ring (wire_count)
    Seconds latency;           ///< slowest hop
    BytesPerSecond of_nodes;   ///< the bandwidth if links between switches were no limit
    BytesPerSecond of_fabric;  ///< if only these were one
  };
  const Way& way(Lay lay, const std::vector<std::int64_t>& ranks);
  const Way& ring(const std::vector<std::int64_t>& ranks) { return way(Lay::rings, ranks); }
  const Topology& topology() const;
  /// The same without slow and failed parts; itself where there are none.
  Communication& as_built();

 private:
  struct State;
  /// Positions of the members on their nodes, not the nodes' numbers: groups that agree route
  /// alike.
  std::uint64_t pattern(const std::vector<std::int64_t>& ranks) const;
  std::uint64_t found_pattern(const std::vector<std::int64_t>& ranks) const;
  /// Ranks as NCCL sees them, and their collectives that were priced.
  struct Group;
  Group& group(const std::vector<std::int64_t>& ranks);
  /// Without links that NCCL knows nothing of being slow or failed: those that are worn, all of the
  /// fabric's.
  Communication& as_nccl_sees_it();
  bool lost_links() const;  ///< failed ones of nodes
  /// Null where collectives were measured with the links as they are, as far as is known.
  Communication* measured_on(const std::string& catalogue);
  Communication& in_state(std::unique_ptr<Communication>& kept, ClusterState state);
  Seconds over_links(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks,
                     Seconds time);
  Seconds nccl_time(CollectiveKind kind, Bytes bytes, const std::vector<std::int64_t>& ranks);
  std::unique_ptr<State> state_;
};

}  // namespace partita
