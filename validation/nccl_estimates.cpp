#include "validation/nccl_estimates.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <optional>
#include <set>
#include <string_view>
namespace partita::validation {
namespace {

using nccl::Algorithm;
using nccl::Protocol;

std::optional<nccl::Collective> collective_of(CollectiveKind k) {
  switch (k) {
    case CollectiveKind::all_reduce:
      return nccl::Collective::all_reduce;
    case CollectiveKind::all_gather:
      return nccl::Collective::all_gather;
    case CollectiveKind::reduce_scatter:
      return nccl::Collective::reduce_scatter;
    case CollectiveKind::broadcast:
      return nccl::Collective::broadcast;
    case CollectiveKind::reduce:
      return nccl::Collective::reduce;
    default:
      return std::nullopt;
  }
}
/// Spellings differ in case and hyphens only.
bool same(std::string_view a, std::string_view b) {
  const auto letters = [](std::string_view s) {
    std::string plain;
    for (const char c : s) {
      if (std::isalnum(static_cast<unsigned char>(c)) != 0)
        plain.push_back(static_cast<char>(std::tolower(static_cast<unsigned char>(c))));
    }
    return plain;
  };
  return letters(a) == letters(b);
}
template <class T>
std::optional<T> by_name(const std::string& text, std::size_t count) {
  for (std::size_t k = 0; k < count; ++k) {
    if (same(text, nccl::name(static_cast<T>(k)))) return static_cast<T>(k);
  }
  return std::nullopt;
}

}  // namespace

EstimateComparison compare_estimates(const nccl::Communicator& c,
                                     const std::vector<LinkEstimate>& theirs) {
  EstimateComparison all;
  std::set<std::string> unpriced;
  for (const LinkEstimate& e : theirs) {
    const auto what = collective_of(e.kind);
    EstimateRow row{std::string(name(e.kind)),    e.algorithm, e.protocol, "",
                    static_cast<double>(e.bytes), e.us,        0};
    if (what && e.algorithm.empty()) {
      const nccl::Choice choice = nccl::choose(c, *what, row.bytes);
      row.ours = fmt::format("{} {}", nccl::name(choice.algorithm), nccl::name(choice.protocol));
      row.ours_us = choice.time_us;
    } else {
      const auto a = by_name<Algorithm>(e.algorithm, nccl::kAlgorithms);
      const auto p = by_name<Protocol>(e.protocol, nccl::kProtocols);
      if (!what || !a || !p || !nccl::price(c, *what, *a, *p)) {
        unpriced.insert(fmt::format("{} {} {}", row.collective, e.algorithm, e.protocol));
        continue;
      }
      row.ours_us = nccl::estimate_us(c, *what, *a, *p, row.bytes);
    }
    const double off = std::abs(row.error());
    all.equal += off < 1e-4 ? 1 : 0;
    all.mean += off;
    all.most = std::max(all.most, off);
    all.rows.push_back(std::move(row));
  }
  if (!all.rows.empty()) all.mean /= static_cast<double>(all.rows.size());
  all.unpriced.assign(unpriced.begin(), unpriced.end());
  return all;
}

}  // namespace partita::validation
