#include "runtime/transport/environment.h"

#include <fmt/format.h>

#include <charconv>
#include <cstdint>
#include <optional>

#include "base/error.h"

namespace partita {
namespace {

constexpr int kMostRanks = 1 << 20;

std::optional<std::string> value(const Variables& variables, const char* name) {
  const char* v = variables(name);
  if (v == nullptr || *v == '\0') return std::nullopt;
  return std::string(v);
}

std::int64_t number(const char* name, const std::string& text, std::int64_t low,
                    std::int64_t high) {
  std::int64_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc{} || end != text.data() + text.size() || n < low || n > high) {
    throw InputError(name, fmt::format("'{}' is not a whole number in {} to {}; unset it, or start "
                                       "the ranks with torchrun, srun or mpirun, which set it",
                                       text, low, high));
  }
  return n;
}

std::string needed(const Variables& variables, const char* name, const std::string& beside) {
  const auto v = value(variables, name);
  if (!v) {
    throw InputError(name, fmt::format("is not set, but {} is; set RANK, WORLD_SIZE, MASTER_ADDR "
                                       "and MASTER_PORT, or none of RANK and WORLD_SIZE",
                                       beside));
  }
  return *v;
}

void check_rank(const char* rank_name, std::int64_t rank, const char* size_name,
                std::int64_t size) {
  if (rank >= size) {
    throw InputError(rank_name, fmt::format("{} is no rank of {} = {}; ranks are 0 to {}", rank,
                                            size_name, size, size - 1));
  }
}

Launcher from_torchrun(const Variables& variables) {
  Launcher l;
  l.kind = Launcher::Kind::tcp;
  l.what = "RANK and WORLD_SIZE";
  const std::string one = value(variables, "RANK") ? "RANK" : "WORLD_SIZE";
  const auto rank = number("RANK", needed(variables, "RANK", one), 0, std::int64_t{kMostRanks} - 1);
  const auto size = number("WORLD_SIZE", needed(variables, "WORLD_SIZE", one), 1, kMostRanks);
  check_rank("RANK", rank, "WORLD_SIZE", size);
  l.rank = static_cast<int>(rank);
  l.size = static_cast<int>(size);
  l.host = needed(variables, "MASTER_ADDR", one);
  l.port = static_cast<int>(number("MASTER_PORT", needed(variables, "MASTER_PORT", one), 1, 65535));
  // Then torchrun's own store listens at that port.
  const auto store = value(variables, "TORCHELASTIC_USE_AGENT_STORE");
  if (store && (*store == "True" || *store == "1" || *store == "true"))
    l.port = l.port < 65535 ? l.port + 1 : l.port - 1;
  return l;
}

std::optional<Launcher> from_slurm(const Variables& variables) {
  const auto rank_text = value(variables, "SLURM_PROCID");
  const char* size_name =
      value(variables, "SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
  const auto size_text = value(variables, size_name);
  // A batch script is told of its tasks, too, but is none of them: only srun says where it runs.
  const bool step =
      value(variables, "SLURM_STEP_ID") || value(variables, "SLURM_LAUNCH_NODE_IPADDR");
  if (!rank_text || !size_text || !step) return std::nullopt;
  const auto rank = number("SLURM_PROCID", *rank_text, 0, std::int64_t{kMostRanks} - 1);
  const auto size = number(size_name, *size_text, 1, kMostRanks);
  if (size == 1 && rank == 0) return std::nullopt;
  check_rank("SLURM_PROCID", rank, size_name, size);
  Launcher l;
  l.kind = Launcher::Kind::tcp;
  l.what = "srun";
  l.rank = static_cast<int>(rank);
  l.size = static_cast<int>(size);
  if (const auto host = value(variables, "MASTER_ADDR")) l.host = *host;
  for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"}) {
    if (const auto list = value(variables, name); list && l.host.empty()) {
      l.host = first_host(*list);
      if (l.host.empty()) throw InputError(name, fmt::format("'{}' names no host", *list));
    }
  }
  if (const auto host = value(variables, "SLURM_LAUNCH_NODE_IPADDR"); host && l.host.empty())
    l.host = *host;
  if (l.host.empty()) {
    throw InputError("MASTER_ADDR",
                     "is not set, and neither are SLURM_STEP_NODELIST and "
                     "SLURM_LAUNCH_NODE_IPADDR; set it to rank 0's host");
  }
  if (const auto port = value(variables, "MASTER_PORT")) {
    l.port = static_cast<int>(number("MASTER_PORT", *port, 1, 65535));
  } else {
    std::int64_t sum = 0;
    for (const char* name : {"SLURM_JOB_ID", "SLURM_STEP_ID"}) {
      if (const auto id = value(variables, name)) sum += number(name, *id, 0, INT64_MAX / 4);
    }
    l.port = static_cast<int>(15000 + sum % 10000);
  }
  return l;
}

}  // namespace

std::string first_host(const std::string& list) {
  const auto bracket = list.find('['), comma = list.find(',');
  if (bracket == std::string::npos || (comma != std::string::npos && comma < bracket))
    return list.substr(0, comma);
  const auto close = list.find(']', bracket);
  if (close == std::string::npos) return "";
  const std::string inside = list.substr(bracket + 1, close - bracket - 1);
  // What follows the bracket up to the next comma belongs to the name.
  const std::string after = list.substr(close + 1);
  return list.substr(0, bracket) + inside.substr(0, inside.find_first_of("-,")) +
         after.substr(0, after.find(','));
}

Launcher launcher_of(const Variables& variables, bool mpi) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (!mpi || variables(name) == nullptr) continue;
    Launcher l;
    l.kind = Launcher::Kind::mpi;
    l.what = name;
    return l;
  }
  if (value(variables, "RANK") || value(variables, "WORLD_SIZE")) return from_torchrun(variables);
  if (auto slurm = from_slurm(variables)) return *slurm;
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}) {
    if (const auto n = value(variables, name); n && *n != "1") {
      throw InputError(name,
                       "is set, so an MPI launcher started this process, but this build has "
                       "no MPI; install libopenmpi-dev and build again, or set RANK, "
                       "WORLD_SIZE, MASTER_ADDR and MASTER_PORT");
    }
  }
  return {};
}

}  // namespace partita
