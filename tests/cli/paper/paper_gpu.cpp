// tests/cli/paper/paper_gpu.cpp: a library with the entry of the GPU backend whose one GPU is
// paper. Its memory is addresses that nobody can follow, of 80 GiB; what comes back from it is 0;
// its kernels are over at once and take, by the clock of their stream, the time of a law: those
// that multiply twice as long while a stand-in runs.
//
// With PARTITA_PAPER_LAUNCH_NS in the environment it keeps a time of its own: its host queues a
// call in so long, a kernel begins PARTITA_PAPER_GAP_NS after the one before it, in a graph half of
// that; its host lists a row of experts in 20 ns; it writes down what kernels take. With
// PARTITA_PAPER_TILES its products of matrices are made in tiles, of the size that is fastest, and
// waves of them, experts' one after the other, and tokens choose experts by a fair draw.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "base/error.h"
#include "runtime/cuda/plugin.h"

namespace partita::cuda {
namespace {

using execute::PlainCall;
using execute::RunList;
using execute::Work;

double nanoseconds_of(const char* variable) {
  const char* text = std::getenv(variable);
  return text != nullptr ? std::atof(text) * 1e-9 : 0;
}

bool tiles() { return std::getenv("PARTITA_PAPER_TILES") != nullptr; }

/// What the multiprocessors take for a result of so many rows and columns, at best.
double tiled(double rows, double columns, double sum) {
  constexpr double kRate = 800e12, kMultiprocessors = 132, kBegins = 1e-6;
  struct Tile {
    double rows, columns, share;
  };
  double least = HUGE_VAL;
  for (const Tile& t : {Tile{128, 256, 1}, {256, 128, 1}, {128, 128, 0.9}, {64, 128, 0.7}}) {
    const double waves =
        std::ceil(std::ceil(rows / t.rows) * std::ceil(columns / t.columns) / kMultiprocessors);
    least = std::min(least, waves * (kBegins + 2 * t.rows * t.columns * sum * kMultiprocessors /
                                                   (t.share * kRate)));
  }
  return least;
}
/// A token's choices, as of routers that know nothing.
std::vector<std::int64_t> drawn_experts(std::int64_t token, std::int64_t top_k,
                                        std::int64_t experts) {
  std::mt19937_64 rng(static_cast<std::uint64_t>(token) * 0x9e3779b97f4a7c15u);
  std::vector<std::int64_t> all;
  while (std::ssize(all) < top_k) {
    const auto e = static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(experts));
    if (std::find(all.begin(), all.end(), e) == all.end()) all.push_back(e);
  }
  return all;
}

constexpr std::int64_t kMemory = std::int64_t{80} << 30, kLibraries = 100 << 20;

class Paper : public CudaDevice {
 public:
  explicit Paper(int candidates)
      : candidates_(candidates),
        launch_(nanoseconds_of("PARTITA_PAPER_LAUNCH_NS")),
        gap_(nanoseconds_of("PARTITA_PAPER_GAP_NS")) {}
  std::string name() const override { return "GPU 0"; }
  std::byte* allocate(std::int64_t bytes) override {
    if (used_ + bytes > kMemory) return nullptr;
    auto* at = reinterpret_cast<std::byte*>(next_);
    next_ += static_cast<std::uintptr_t>((bytes + 255) / 256 * 256);
    blocks_[at] = bytes;
    used_ += bytes;
    return at;
  }
  std::int64_t taken() override { return used_ + kLibraries; }
  OutsideMemory outside() override {
    OutsideMemory m;
    m.context = 400_MiB, m.libraries = 30_MiB, m.workspace = 32_MiB;
    return m;
  }
  void release(std::byte* block) override {
    used_ -= blocks_.at(block);
    blocks_.erase(block);
  }
  void to_device(std::byte*, const void*, std::int64_t bytes) override { move(bytes, 50e9); }
  void to_host(void* to, const std::byte*, std::int64_t bytes) override {
    std::memset(to, 0, static_cast<std::size_t>(bytes));
  }
  void to_host_later(void* to, const std::byte*, std::int64_t bytes) override {
    std::memset(to, 0, static_cast<std::size_t>(bytes));
  }
  void copy(std::byte*, const std::byte*, std::int64_t bytes) override { move(2 * bytes, 4e12); }
  void fill(std::byte*, std::int64_t count, float) override { move(4 * count, 4e12); }
  void draw(std::byte*, ElementType, std::int64_t, float, float, std::uint64_t) override {}
  void pack(const RunList& runs, std::int64_t word, const std::byte*, std::byte*) override {
    move(2 * word * execute::count(runs.runs), 4e12);
  }
  void unpack(const RunList& runs, std::int64_t word, const std::byte*, std::byte*) override {
    move(2 * word * execute::count(runs.runs), 4e12);
  }
  void unpack_add(const RunList& runs, ElementType type, const std::byte*, std::byte*) override {
    move(3 * storage(type, execute::count(runs.runs)).count, 4e12);
  }
  std::unique_ptr<execute::OperatorKernel> kernel(reference::Context context) override;
  void plain(const PlainCall& call) override {
    std::int64_t bytes = 0;
    for (const auto* list :
         {&call.reads, &call.outputs, &call.statistics, &call.extras, &call.writes}) {
      for (const auto& o : *list) bytes += o.bytes;
    }
    move(bytes, 4e12);
  }

  void stand_in(std::byte*, const std::byte*, std::int64_t bytes, int multiprocessors) override {
    now_[stream_] += static_cast<double>(bytes) / (multiprocessors * kStandInRate);
    held_until_ = now_[stream_];
  }

  void on(execute::DeviceStream s) override { stream_ = s; }
  Event record() override {
    past_[++events_] = now_[stream_];
    return events_;
  }
  void wait(Event e) override {
    const auto at = past_.find(e);
    if (at != past_.end()) now_[stream_] = std::max(now_[stream_], at->second);
  }

  void begin_marks() override {
    if (!timed()) now_.clear();
    past_.clear();
    held_until_ = 0;
    marks_.assign(1, timed() ? host_ : 0);
  }
  std::int64_t mark() override {
    marks_.push_back(std::max(now_[stream_], host_));
    return std::ssize(marks_) - 1;
  }
  std::int64_t nanoseconds(std::int64_t mark) override {
    return std::llround(1e9 * (marks_.at(static_cast<std::size_t>(mark)) - marks_[0]));
  }
  std::int64_t own_time() const override { return timed() ? std::llround(1e9 * host_) : -1; }
  void finish() override {
    if (!timed()) return;
    for (const auto& [s, now] : now_) host_ = std::max(host_, now);
    waited_before_ = std::exchange(waited_, false);
  }
  /// The host has waited, and done something before it goes on.
  void host_works(double seconds) {
    if (!timed()) return;
    host_ = std::max(host_, now_[stream_]) + seconds;
    waited_ = true;
  }

  std::string record_kernels(bool on) override {
    return timed() ? "" : execute::Device::record_kernels(on);
  }
  void belongs_to(std::int64_t tag) override { tag_ = tag; }
  std::map<std::int64_t, std::int64_t> recorded() override {
    std::map<std::int64_t, std::int64_t> all;
    for (const auto& [tag, span] : kernel_s_)
      all[tag] = std::llround(1e9 * (span.second - span.first));
    kernel_s_.clear();
    tag_ = -1;
    return all;
  }

  std::string not_captured() override {
    return !timed() ? execute::Device::not_captured() : waited_before_ ? "its host waits" : "";
  }
  void begin_capture() override {
    captured_.clear();
    capturing_ = true;
  }
  void end_capture() override { capturing_ = false; }
  bool has_capture() const override { return !captured_.empty(); }
  void launch_captured(std::int64_t, const std::vector<const void*>&) override {
    host_ += launch_;
    double& now = now_[kComputeStream];
    now = std::max(now, host_);
    for (const double kernel : captured_) now += gap_ / 2 + kernel;
  }
  CudaMachine& machine() override { throw MachineError("paper has no streams"); }
  int number() const override { return 0; }
  std::vector<execute::ProductAlgorithm> products() const override {
    return {{64, 32, 16, 1, "NT", ElementType::bf16, 21, candidates_, 2, 1.5e-6, ElementType::fp32,
             false, 1.56e-6},
            {64, 32, 16, 1, "TN", ElementType::bf16, 21, candidates_, 2, 1.5e-6, ElementType::fp32,
             true, 1.56e-6}};
  }

  /// A kernel, or several of a start each.
  void move(std::int64_t bytes, double rate, double flops = 0, double multiplies = 0) {
    const double alone =
        4e-6 + static_cast<double>(bytes) / rate + (multiplies > 0 ? multiplies : flops / 500e12);
    host_ += launch_;
    if (capturing_) return captured_.push_back(alone);
    double& now = now_[stream_];
    if (timed()) now = std::max(now + gap_, host_);
    const double start = now,
                 beside = flops > 0 ? std::clamp(held_until_ - now, 0.0, 2 * alone) : 0;
    now += beside + (alone - beside / 2);
    if (tag_ >= 0) kernel_s_.try_emplace(tag_, start, now).first->second.second = now;
  }

 private:
  bool timed() const { return launch_ > 0; }

  int candidates_;
  double launch_, gap_, host_ = 0;  ///< seconds; of its own time
  bool waited_ = false, waited_before_ = false, capturing_ = false;
  std::vector<double> captured_;
  std::int64_t tag_ = -1;
  std::map<std::int64_t, std::pair<double, double>> kernel_s_;  ///< by tag: first start, last end
  std::uintptr_t next_ = std::uintptr_t{1} << 62;
  std::int64_t used_ = 0;
  std::map<std::byte*, std::int64_t> blocks_;
  execute::DeviceStream stream_ = kComputeStream;
  std::map<execute::DeviceStream, double> now_;
  Event events_ = 0;
  std::map<Event, double> past_;
  double held_until_ = 0;
  std::vector<double> marks_;
};

class PaperKernel : public execute::OperatorKernel {
 public:
  PaperKernel(Paper& paper, reference::Context context)
      : paper_(paper), context_(std::move(context)) {}
  const reference::Context& context() const override { return context_; }
  void set_step(std::int64_t, std::int64_t) override {}
  void run(Work work, std::size_t, const cpu::Arguments& a) override {
    std::int64_t bytes = 0;
    double sizes = 1;
    for (const auto* list : {&a.inputs, &a.parameters, &a.outputs, &a.output_gradients,
                             &a.statistics, &a.extras, &a.results}) {
      for (const cpu::Tensor& t : *list) {
        if (t && t.rows == nullptr) bytes += storage(t.type, t.size()).count;
      }
    }
    // What is added to is read.
    if (a.accumulate && is_product(*context_.operation)) {
      for (const cpu::Tensor& t : a.results) {
        if (t && t.rows == nullptr) bytes += storage(t.type, t.size()).count;
      }
    }
    // Of a table only the rows that are looked up move.
    const bool looks_up = std::holds_alternative<Embedding>(*context_.operation) ||
                          std::holds_alternative<PositionEmbedding>(*context_.operation);
    if (looks_up && !a.parameters.empty() && a.parameters[0])
      bytes -= storage(a.parameters[0].type, a.parameters[0].size()).count;
    if (std::holds_alternative<Embedding>(*context_.operation) && work == Work::backward_weight &&
        a.accumulate)
      bytes -= storage(a.results[0].type, a.results[0].size()).count;
    // Of a product all three are m k, k n and m n.
    const auto first = [](const std::vector<cpu::Tensor>& list) {
      return list.empty() || !list[0] ? 1.0 : static_cast<double>(list[0].size());
    };
    if (std::holds_alternative<Linear>(*context_.operation))
      sizes = first(a.inputs) * first(a.parameters) * first(a.output_gradients) * first(a.results);
    double flops = sizes > 1 ? 2 * std::sqrt(sizes) : 0, multiplies = 0;
    // Rows and columns of the result, and the sum, of which `rows` are a layer's m.
    const auto in_tiles = [&](double m, double n, double k) {
      return work == Work::forward           ? tiled(m, n, k)
             : work == Work::backward_weight ? tiled(n, k, m)
                                             : tiled(m, k, n);
    };
    if (tiles() && flops > 0) {
      const double x = work == Work::backward_data ? first(a.results) : first(a.inputs),
                   y = work == Work::forward ? first(a.results) : first(a.output_gradients),
                   w = work == Work::backward_weight ? first(a.results) : first(a.parameters);
      multiplies = in_tiles(std::sqrt(x * y / w), std::sqrt(y * w / x), std::sqrt(x * w / y));
    }
    if (const auto* t = std::get_if<Attention>(&*context_.operation); t && a.inputs.size() == 3) {
      // Two products of what is seen, backward five.
      const auto keys = static_cast<double>((*a.inputs[1].index)[1].size());
      flops = 2 * first(a.inputs) * keys * (work == Work::forward ? 2 : 5) / (t->causal ? 2 : 1);
    }
    // Experts: choice j of token t is of expert (top_k t + j) mod experts, and rows stay what they
    // are.
    std::vector<reference::Row> rows;
    for (const auto* list : {&a.output_gradients, &a.inputs}) {
      if (!list->empty() && (*list)[0] && (*list)[0].rows != nullptr) rows = *(*list)[0].rows;
    }
    if (const auto* d = std::get_if<Dispatch>(&*context_.operation); d && work == Work::forward) {
      std::int64_t token = 0;
      for (const std::int64_t sample : (*a.inputs[0].index)[0]) {
        for (const std::int64_t position : (*a.inputs[0].index)[1]) {
          const auto chosen =
              tiles() ? drawn_experts(token, d->top_k, d->experts) : std::vector<std::int64_t>{};
          for (std::int64_t j = 0; j < d->top_k; ++j)
            rows.push_back({sample, position,
                            tiles() ? chosen[static_cast<std::size_t>(j)]
                                    : (d->top_k * token + j) % d->experts});
          ++token;
        }
      }
      std::stable_sort(rows.begin(), rows.end(),
                       [](const auto& x, const auto& y) { return x.expert < y.expert; });
    }
    if (std::holds_alternative<GroupedProduct>(*context_.operation)) {
      const auto& w = *(work == Work::backward_weight ? a.results : a.parameters)[0].index;
      flops = 2.0 * static_cast<double>(rows.size() * w[1].size() * w[2].size());
      std::map<std::int64_t, double> of_expert;
      for (const auto& row : rows) of_expert[row.expert] += 1;
      for (const auto& [expert, m] : of_expert) {
        if (tiles())
          multiplies +=
              in_tiles(m, static_cast<double>(w[1].size()), static_cast<double>(w[2].size()));
      }
    }
    for (std::size_t k = 0; k < a.results.size() && a.place; ++k) {
      if (!a.results[k] || a.results[k].rows == nullptr) continue;
      a.place(k, rows);
      bytes += storage(a.results[k].type, std::ssize(rows) * std::ssize(a.results[k].index->at(3)))
                   .count;
    }
    for (const auto* list : {&a.inputs, &a.output_gradients}) {
      for (const cpu::Tensor& t : *list) {
        if (t && t.rows != nullptr) bytes += storage(t.type, t.size()).count;
      }
    }
    if (std::holds_alternative<Dispatch>(*context_.operation) && work == Work::forward)
      paper_.host_works(20e-9 * static_cast<double>(rows.size()));
    paper_.move(bytes, 4e12, flops, multiplies);
    routed.clear();
  }

 private:
  Paper& paper_;
  reference::Context context_;
};

std::unique_ptr<execute::OperatorKernel> Paper::kernel(reference::Context context) {
  return std::make_unique<PaperKernel>(*this, std::move(context));
}

std::string nothing() { return ""; }
int one() { return 1; }
std::string paper_name(int) { return "paper GPU"; }
Facts paper_facts(int) {
  Facts f;
  f.name = "paper GPU";
  f.bus_id = "00000000:0F:00.0";
  f.compute_capability = 90;
  f.multiprocessors = 132;
  f.memory_bytes = f.free_bytes = kMemory;
  f.driver = f.runtime = f.blas = "0";
  return f;
}
std::unique_ptr<CudaDevice> paper(const DeviceOptions& options) {
  return std::make_unique<Paper>(options.candidates);
}

}  // namespace
}  // namespace partita::cuda

extern "C" const partita::cuda::Plugin* partita_cuda_plugin() {
  using namespace partita::cuda;
  static const Plugin plugin{nothing, one, paper_name, paper_facts, nothing, paper};
  return &plugin;
}
