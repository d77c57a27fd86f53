// validation/evidence.h: what users have measured themselves, as tables of a device file
// (docs/calibration.md, "From logs").
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "topologies/measured.h"
#include "validation/csv.h"
#include "validation/row_case.h"

namespace partita::validation {

/// One run of nccl-tests.
struct NcclTestsLog {
  std::string file;
  std::string kind;  ///< "all_reduce", "all_to_all", ... of CollectivePoint
  std::string type;  ///< "float", "bfloat16"
  int ranks = 0, nodes = 0;
  std::string fullest;  ///< the host with most ranks
  int ranks_of_fullest = 0;
  std::string device;  ///< as the driver calls the first rank's: "NVIDIA H100 80GB HBM3"; may be ""
  /// Bytes as nccl-tests counts them, ascending; in place of an all-reduce, out of place of the
  /// others, as frameworks call them. Of a size that it has more than once the median.
  std::vector<std::pair<Bytes, Seconds>> times;
  bool ended = false;  ///< with what nccl-tests prints behind the last size
};

/// Is it one? By the line that names its columns.
bool is_nccl_tests(const std::string& text);

/// Text output of all_reduce_perf and its like, of one run. InputError with file and line: no
/// operation named in text or file name, one that is priced without curves, no ranks listed or one
/// only, a row that is cut off, values that were wrong, no row at all.
NcclTestsLog parse_nccl_tests(const std::string& text, const std::string& file);

/// InputError{file} where the log is of GPUs of another generation than `device`, a name of the
/// catalogue. What the catalogue does not know is let through.
void check_device(const NcclTestsLog& log, const std::string& device, const Catalogue& catalogue);

/// InputError{file} where the log has more ranks on a host than the cluster's nodes have devices:
/// no group of its ranks would be the log's.
void check_hosts(const NcclTestsLog& log, const ClusterShape& cluster);

/// InputError{file} where the log's largest message (of 1 MiB and more) takes less than a fifth or
/// more than fifty times as long as NCCL's model says of these nodes: a unit, or a cluster, that is
/// another one. `topology`: as many nodes as the log's.
void check_times(const NcclTestsLog& log, const Topology& topology);

/// Columns m, n, k, type and one of tflops (10¹² FLOP/s), time_us, time_ms, time_s; if there are
/// also count (1), layout (NN, NT, TN), out (as type). One table for each type, output and layout.
/// InputError with file and line for a cell that is no positive number or no such word.
std::vector<ProductTable> parse_products(const CsvTable& table);

/// At which share of the clock of short kernels did these run, one run of one program? Between 1
/// and the device's sustained clock: what its prices at the two say of the products of 50 us and
/// more, in the median.
double clock_of(const std::vector<ProductTable>& tables, const DeviceProfile& device);

/// A device file with these points before its own, or those of the one it is like. InputError:
/// {source} for a point that is faster than the device's peak, and
/// one of 0.1 ms at the peak and more that is a hundredth of it.
std::string with_products(std::string device_yaml, const std::string& file,
                          const std::vector<ProductTable>& products);

/// A topology file with these curves before its own, and its device of this name in `device_file`.
/// Hosts of one NVLink domain, `per_domain` of them, count as one node. InputError{file} where it
/// has no such device.
std::string with_curves(std::string topology_yaml, const std::string& file,
                        const std::string& device, const std::string& device_file,
                        std::int64_t per_domain, const std::vector<NcclTestsLog>& logs);

}  // namespace partita::validation
