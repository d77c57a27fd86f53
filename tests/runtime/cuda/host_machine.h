// tests/runtime/cuda/host_machine.h: the CUDA kernels' text run on the host, one element after the
// other.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <vector>

#include "runtime/cuda/plain.h"

namespace partita::cuda {

/// One block of a flash kernel: its warps go one after the other, their lanes together, with PTX's
/// fragments. Copies come when they are waited for, or at once: what reads too early and what
/// overwrites too early is found.
class HostBlock {
 public:
  static constexpr int kLanes = 32;
  HostBlock(int warps, int words, bool late)
      : warps_(warps), late_(late), memory_(static_cast<std::size_t>(words) + 8, 0x7fc1) {}
  int lane(int s) const { return s; }
  template <class S, class F>
  std::vector<S> kept(F f) {
    std::vector<S> all(static_cast<std::size_t>(warps_));
    for (S& s : all) f(s);
    return all;
  }
  template <class S, class F>
  void warps(std::vector<S>& states, F f) {
    for (int w = 0; w < warps_; ++w) f(w, states[static_cast<std::size_t>(w)]);
  }
  template <class F>
  void threads(int n, F f) {
    for (int i = 0; i < n; ++i) f(i);
  }
  std::uint16_t* shared() {
    return memory_.data() + (16 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 16) % 16 / 2;
  }
  void copy(void* to, const void* from, int bytes, int size) {
    auto* at = static_cast<std::byte*>(to);
    PARTITA_ASSERT(
        reinterpret_cast<std::uintptr_t>(to) % static_cast<std::uintptr_t>(size) == 0 &&
            reinterpret_cast<std::uintptr_t>(from) % static_cast<std::uintptr_t>(size) == 0,
        "a copy that is not aligned");
    PARTITA_ASSERT(at >= reinterpret_cast<std::byte*>(shared()) &&
                       at + size <= reinterpret_cast<std::byte*>(memory_.data() + memory_.size()),
                   "a copy outside shared memory");
    open_.push_back([=] {
      std::memset(to, 0, static_cast<std::size_t>(size));
      std::memcpy(to, from, static_cast<std::size_t>(bytes));
    });
    if (!late_) open_.back()(), open_.pop_back();
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  template <int kGroups>
  void wait() {
    while (groups_.size() > static_cast<std::size_t>(kGroups)) {
      for (const auto& c : groups_.front()) c();
      groups_.pop_front();
    }
  }
  void sync() {}
  void warp_sync() {}

  template <class F>
  void load(flash::Factors<HostBlock>& f, F at) {
    for (int t = 0; t < 32; ++t) {
      for (int m = 0; m < 4; ++m) std::memcpy(&f.v[t][m], at(8 * m + t / 4) + t % 4 * 2, 4);
    }
  }
  template <class F>
  void load_turned(flash::Factors<HostBlock>& f, F at) {
    for (int t = 0; t < 32; ++t) {
      for (int m = 0; m < 4; ++m) {
        const std::uint32_t low = at(8 * m + t % 4 * 2)[t / 4],
                            high = at(8 * m + t % 4 * 2 + 1)[t / 4];
        f.v[t][m] = low | high << 16;
      }
    }
  }
  template <ElementType kType>
  void multiply(flash::Sums<HostBlock>& c, const flash::Factors<HostBlock>& a,
                const flash::Factors<HostBlock>& b, int half) {
    const auto number = [](std::uint32_t pair, int which) {
      return flash::number<kType>(static_cast<std::uint16_t>(which == 0 ? pair : pair >> 16));
    };
    float left[16][16], right[8][16];
    for (int t = 0; t < 32; ++t) {
      for (int e = 0; e < 8; ++e)
        left[t / 4 + e / 2 % 2 * 8][t % 4 * 2 + e % 2 + e / 4 * 8] = number(a.v[t][e / 2], e % 2);
      for (int e = 0; e < 4; ++e)
        right[t / 4][t % 4 * 2 + e % 2 + e / 2 * 8] = number(b.v[t][half + e / 2], e % 2);
    }
    for (int t = 0; t < 32; ++t) {
      for (int e = 0; e < 4; ++e) {
        const float *l = left[t / 4 + e / 2 * 8], *r = right[t % 4 * 2 + e % 2];
        float sum = c.v[t][e];
        for (int k = 0; k < 16; ++k) sum += l[k] * r[k];
        c.v[t][e] = sum;
      }
    }
  }
  void quad_max(float (&v)[32]) {
    for (int q = 0; q < 32; q += 4) {
      const float top = std::max({v[q], v[q + 1], v[q + 2], v[q + 3]});
      std::fill_n(v + q, 4, top);
    }
  }
  void quad_sum(float (&v)[32]) {
    for (int q = 0; q < 32; q += 4) {
      const float sum = v[q] + v[q + 1] + v[q + 2] + v[q + 3];
      std::fill_n(v + q, 4, sum);
    }
  }

 private:
  int warps_;
  bool late_;
  std::vector<std::uint16_t> memory_;  ///< no numbers at first
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};

class HostMachine {
 public:
  template <class F>
  auto stepped(std::int64_t step, F f) {
    return Stepped<decltype(f(step))>{nullptr, f(step)};
  }
  bool has_flash() const { return true; }
  int flashes = 0;  ///< calls
  bool flash(const FlashCall& call, FlashPass pass) {
    if (pass == FlashPass::backward) return false;
    ++flashes;
    with_flash_kernel(call, pass, [&](const auto& kernel) {
      using K = std::decay_t<decltype(kernel)>;
      for (std::int64_t n = 0; n < kernel.blocks(); ++n) {
        HostBlock block(K::kWarps, K::kWords, n % 2 == 0);
        kernel(block, n);
      }
    });
    return true;
  }
  template <class F>
  void each(std::int64_t n, F f) {
    for (std::int64_t i = 0; i < n; ++i) f(i);
  }
  template <class F>
  void rows(std::int64_t n, std::int64_t, F f) {
    for (std::int64_t i = 0; i < n; ++i) f(i, Lanes{});
  }
  /// As cuBLASLt, it adds no bias to a single column, nor to products of single numbers.
  bool product(const Product& p) {
    if (p.bias != nullptr && (p.n == 1 || p.k == 1)) return false;
    PARTITA_ASSERT(
        p.a.at.type() == p.b.at.type() && (!p.c.at.narrow() || p.c.at.type() == p.a.at.type()),
        "a product that cuBLASLt has not");
    const auto element = [](const Matrix& m, std::int64_t b, std::int64_t i, std::int64_t j) {
      return static_cast<double>(
          m.at[b * m.step + (m.transposed ? j * m.stride + i : i * m.stride + j)]);
    };
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t i = 0; i < p.m; ++i) {
        for (std::int64_t j = 0; j < p.n; ++j) {
          double sum = 0;
          for (std::int64_t k = 0; k < p.k; ++k)
            sum += element(p.a, b, i, k) * element(p.b, b, k, j);
          const auto to = p.c.at[b * p.c.step + i * p.c.stride + j];
          if (p.bias != nullptr) sum += static_cast<double>(static_cast<float>(p.bias[j]));
          const auto v = static_cast<float>(static_cast<double>(p.alpha) * sum);
          to = p.beta == 0 ? v : v + p.beta * to;
        }
      }
    }
    return true;
  }
  bool has_eights() const { return true; }
  void product(const EightProduct& p) {
    PARTITA_ASSERT(p.a.stride % 16 == 0 && p.a.stride == p.b.stride && p.b.padded % 16 == 0 &&
                       p.a.padded == p.a.rows &&
                       (p.a.format == EightBits::e4m3 || p.b.format == EightBits::e4m3),
                   "an 8-bit product that cuBLASLt has not");
    for (std::int64_t i = 0; i < p.a.rows; ++i) {
      for (std::int64_t j = 0; j < p.b.padded; ++j) {
        double sum = 0;
        for (std::int64_t k = 0; k < p.a.stride; ++k)
          sum += static_cast<double>(from_eight(p.a.format, p.a.at[i * p.a.stride + k])) *
                 static_cast<double>(from_eight(p.b.format, p.b.at[j * p.b.stride + k]));
        const auto to = p.c.at[i * p.c.stride + j];
        const auto v = static_cast<float>(sum * static_cast<double>(*p.a.inverse) *
                                          static_cast<double>(*p.b.inverse));
        to = p.beta == 0 ? v : v + p.beta * to;
      }
    }
  }
  /// What nobody wrote is no number.
  float* scratch(std::int64_t floats) {
    return scratch_
        .emplace_back(static_cast<std::size_t>(floats) + 2, std::numeric_limits<float>::quiet_NaN())
        .data();
  }
  /// Few: sometimes a query's at a time.
  std::int64_t scores() { return ++asked_ % 40; }
  IndexList list(const cpu::Indices& indices) {
    const auto n = static_cast<std::int64_t>(indices.size());
    // Both forms where both are right.
    if (n > 0 && indices.back() - indices.front() == n - 1 && ++lists_ % 2 == 0)
      return {nullptr, indices.front(), n};
    return {indices.data(), 0, n};
  }
  template <class F>
  const float* table(const std::vector<std::int64_t>& key, F make) {
    const auto [it, fresh] = tables_.try_emplace(key);
    if (fresh) it->second = make();
    return it->second.data();
  }
  /// Always in memory: what is not there is not what follows from the first.
  IndexList upload(const std::vector<std::int64_t>& numbers) {
    const auto& kept = uploads_.emplace_back(numbers);
    return {kept.data(), 0, std::ssize(kept)};
  }
  std::vector<float> read(const Numbers& at, std::int64_t n) {
    std::vector<float> v;
    for (std::int64_t i = 0; i < n; ++i) v.push_back(at[i]);
    return v;
  }
  bool convolve(const ConvolutionShape& s, ConvolutionPass pass, Numbers to_x, Numbers to_w,
                Numbers to_y, bool adds) {
    for (const Numbers& n : {to_x, to_w, to_y}) PARTITA_ASSERT(n.type() == s.type, "types differ");
    // Sums are in fp32.
    const std::int64_t weights = s.out * (s.in / s.groups) * s.window_height * s.window_width,
                       pixels = s.samples * s.in * s.height * s.width,
                       results = s.samples * s.out * s.out_height * s.out_width;
    const auto wide = [](Numbers from, std::int64_t n) {
      std::vector<float> v(static_cast<std::size_t>(n));
      for (std::int64_t i = 0; i < n; ++i) v[static_cast<std::size_t>(i)] = from[i];
      return v;
    };
    const auto back = [](const std::vector<float>& v, Numbers to) {
      for (std::size_t i = 0; i < v.size(); ++i) to[static_cast<std::int64_t>(i)] = v[i];
    };
    auto x = wide(to_x, pixels), w = wide(to_w, weights), y = wide(to_y, results);
    convolve_wide(s, pass, x.data(), w.data(), y.data(), adds);
    back(pass == ConvolutionPass::forward ? y
         : pass == ConvolutionPass::data  ? x
                                          : w,
         pass == ConvolutionPass::forward ? to_y
         : pass == ConvolutionPass::data  ? to_x
                                          : to_w);
    return true;
  }
  static void convolve_wide(const ConvolutionShape& s, ConvolutionPass pass, float* x, float* w,
                            float* y, bool adds) {
    const std::int64_t in = s.in / s.groups, out = s.out / s.groups;
    const auto zero = [](float* p, std::int64_t n) { std::fill_n(p, n, 0.0f); };
    if (pass == ConvolutionPass::forward) zero(y, s.samples * s.out * s.out_height * s.out_width);
    if (pass == ConvolutionPass::data) zero(x, s.samples * s.in * s.height * s.width);
    if (pass == ConvolutionPass::weight && !adds)
      zero(w, s.out * in * s.window_height * s.window_width);
    for (std::int64_t n = 0; n < s.samples; ++n) {
      for (std::int64_t o = 0; o < s.out; ++o) {
        for (std::int64_t e = 0; e < s.out_height * s.out_width; ++e) {
          float& to = y[(n * s.out + o) * s.out_height * s.out_width + e];
          for (std::int64_t k = 0; k < in * s.window_height * s.window_width; ++k) {
            const std::int64_t row = e / s.out_width * s.stride_height - s.pad_height +
                                     k / s.window_width % s.window_height * s.dilation_height,
                               column = e % s.out_width * s.stride_width - s.pad_width +
                                        k % s.window_width * s.dilation_width,
                               plane =
                                   n * s.in + o / out * in + k / (s.window_height * s.window_width);
            if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
            float& from = x[(plane * s.height + row) * s.width + column];
            float& by = w[o * in * s.window_height * s.window_width + k];
            if (pass == ConvolutionPass::forward) to += from * by;
            if (pass == ConvolutionPass::data) from += to * by;
            if (pass == ConvolutionPass::weight) by += to * from;
          }
        }
      }
    }
  }
  void end() { scratch_.clear(), uploads_.clear(); }

 private:
  std::map<std::vector<std::int64_t>, std::vector<float>> tables_;
  std::deque<std::vector<float>> scratch_;
  std::deque<std::vector<std::int64_t>> uploads_;
  int lists_ = 0;
  static inline std::int64_t asked_ = 0;
};

/// The contract of cpu::Kernel, by the CUDA kernels' text.
class KernelOnHostMachine {
  using Row = reference::Row;

 public:
  explicit KernelOnHostMachine(const reference::Context& context)
      : context_(context), host_(execute::host_device()->kernel(context)) {}
  void set_step(std::int64_t step, std::int64_t first_sample) {
    context_.step = step;
    context_.first_sample = first_sample;
    host_->set_step(step, first_sample);
  }
  void forward_statistic(std::size_t k, const cpu::Arguments& a) {
    run(run_forward_statistic(m_, context_, k, a), execute::Work::forward_statistic, k, a);
  }
  void forward(const cpu::Arguments& a) {
    const cpu::Arguments here = placing(a);
    run(run_forward(m_, context_, here), execute::Work::forward, 0, here);
  }
  void backward_statistic(std::size_t k, const cpu::Arguments& a) {
    run(run_backward_statistic(m_, context_, a), execute::Work::backward_statistic, k, a);
  }
  void backward_data(const cpu::Arguments& a) {
    const cpu::Arguments here = placing(a);
    run(run_backward_data(m_, context_, here), execute::Work::backward_data, 0, here);
  }
  void backward_weight(const cpu::Arguments& a) {
    run(run_backward_weight(m_, context_, a), execute::Work::backward_weight, 0, a);
  }
  void attend_part(const cpu::Arguments& a) {
    run(run_attend_part(m_, context_, a), execute::Work::attend_part, 0, a);
  }
  void attend_part_backward(const cpu::Arguments& a) {
    run(run_attend_part_backward(m_, context_, a), execute::Work::attend_part_backward, 0, a);
  }
  bool makes_statistics() const { return cuda::makes_statistics(context_); }
  std::vector<cpu::RoutedResult> routed;
  int own = 0, others = 0;  ///< calls of kernels here, and of the host's
  int flashes() const { return m_.flashes; }

 private:
  /// Who has no memory for rows gets it here, and they are returned.
  struct Placed {
    std::vector<Row> rows;
    std::vector<float> room;  ///< of the result's type
    ElementType type;
  };
  cpu::Arguments placing(const cpu::Arguments& a) {
    cpu::Arguments here = a;
    placed_.clear();
    if (a.place) return here;
    here.place = [this, &a](std::size_t k, const std::vector<Row>& rows) {
      Placed& p = placed_[k];
      p.rows = rows;
      p.type = a.results[k].type;
      p.room.assign(rows.size() * a.results[k].index->at(3).size() + 2,
                    std::numeric_limits<float>::quiet_NaN());
      return p.room.data();
    };
    return here;
  }
  void run(bool done, execute::Work work, std::size_t statistic, const cpu::Arguments& a) {
    ++(done ? own : others);
    m_.end();
    routed.clear();
    if (done) {
      for (auto& [k, p] : placed_) {
        routed.resize(std::max(routed.size(), k + 1));
        routed[k].rows = p.rows;
        const Numbers from(p.room.data(), p.type);
        for (std::size_t i = 0; i + 2 < p.room.size(); ++i)
          routed[k].values.push_back(from[static_cast<std::int64_t>(i)]);
      }
      placed_.clear();
      return;
    }
    PARTITA_ASSERT(placed_.empty(), "rows were placed by a kernel that then gave up");
    host_->run(work, statistic, a);
    routed = std::move(host_->routed);
  }
  HostMachine m_;
  std::map<std::size_t, Placed> placed_;
  reference::Context context_;
  std::unique_ptr<execute::OperatorKernel> host_;
};

}  // namespace partita::cuda
