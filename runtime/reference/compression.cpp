#include "runtime/reference/compression.h"

#include "runtime/reference/kernels.h"

namespace partita::reference {

double power_start(std::int32_t parameter, std::int64_t linear) {
  constexpr std::uint64_t kPower = 0x706f7765;
  return normal(kPower, static_cast<std::uint64_t>(parameter), static_cast<std::uint64_t>(linear));
}

std::vector<double> exchange(const Compression& c, const PowerShape& shape, std::int32_t parameter,
                             const std::vector<std::vector<double>>& gradients, Exchange& state) {
  const std::size_t replicas = gradients.size(), n = gradients[0].size();
  state.kept.resize(replicas, std::vector<double>(n, 0.0));
  std::vector<std::vector<double>> p = gradients;
  for (std::size_t r = 0; r < replicas; ++r) {
    for (std::size_t i = 0; i < n; ++i) p[r][i] += state.kept[r][i];
  }
  std::vector<double> sum(n, 0.0);
  std::vector<std::vector<double>> sent(replicas, std::vector<double>(n, 0.0));
  switch (c.kind) {
    case CompressionKind::none:
      sent = p;
      break;
    case CompressionKind::cast:
      sent = p;
      for (auto& s : sent) round_values(c.type, s.data(), n);
      break;
    case CompressionKind::top_k:
      for (std::size_t r = 0; r < replicas; ++r) {
        const auto count = static_cast<std::int64_t>(n);
        for (const std::uint32_t i : top_positions(p[r].data(), count, kept_values(c, count)))
          sent[r][i] = p[r][i];
      }
      break;
    case CompressionKind::one_bit:
      for (std::size_t r = 0; r < replicas; ++r) {
        const double scale = mean_magnitude(p[r].data(), static_cast<std::int64_t>(n));
        for (std::size_t i = 0; i < n; ++i) sent[r][i] = p[r][i] < 0 ? -scale : scale;
      }
      break;
    case CompressionKind::power_sgd: {
      if (state.right.empty()) {
        for (std::int64_t i = 0; i < shape.cols * shape.rank; ++i)
          state.right.push_back(power_start(parameter, i));
      }
      std::vector<double> m(n, 0.0), left(static_cast<std::size_t>(shape.rows * shape.rank));
      for (const auto& one : p) {
        for (std::size_t i = 0; i < n; ++i) m[i] += one[i];
      }
      power_left(shape, m.data(), state.right.data(), left.data());
      orthonormalise(shape, left.data());
      power_right(shape, m.data(), left.data(), state.right.data());
      power_product(shape, left.data(), state.right.data(), sum.data());
      for (auto& s : sent) {
        for (std::size_t i = 0; i < n; ++i) s[i] = sum[i] / static_cast<double>(replicas);
      }
      break;
    }
  }
  std::fill(sum.begin(), sum.end(), 0.0);
  for (std::size_t r = 0; r < replicas; ++r) {
    for (std::size_t i = 0; i < n; ++i) {
      sum[i] += sent[r][i];
      state.kept[r][i] = c.error_feedback ? p[r][i] - sent[r][i] : 0;
    }
  }
  return sum;
}

}  // namespace partita::reference
