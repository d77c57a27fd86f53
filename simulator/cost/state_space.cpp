#include "simulator/cost/state_space.h"

#include <algorithm>
#include <cmath>

namespace partita {
namespace {

/// Rows that a block of a kernel computes at once, for which it meets whole columns.
constexpr double kBlock = 64;

class Kernels {
 public:
  Kernels(const StateSpace& op, const ScanProblem& s)
      : s_(s),
        heads_(s.groups * static_cast<double>(op.heads_per_group)),
        dim_(static_cast<double>(op.head_dim)),
        state_(static_cast<double>(op.state)),
        // Columns that a row of a chunk meets, in the mean.
        seen_(std::min(s.chunk, (s.chunk + kBlock) / 2)),
        e_(bits(s.type) / 8.0),
        x_(e_ * s.tokens * heads_ * dim_),
        b_(e_ * s.tokens * s.groups * state_),
        step_(s.tokens * heads_),
        states_(s.chunks * heads_ * dim_ * state_),
        scores_(4 * s.tokens * s.groups * s.chunk) {}

  ScanKernels forward() {
    cumsum();
    chunk_states();
    pass_states(4, e_);
    scores();
    // Outputs: of the state before, and inside the chunk.
    product(s_.chunk, dim_, state_ + seen_, heads_,
            scores_ + 2 * x_ + b_ + 8 * step_ + e_ * states_);
    return all_;
  }

  ScanKernels backward() {
    cumsum();
    move(2 * e_ * step_);  // the steps' copy
    scores();
    chunk_states();
    pass_states(4, 4);
    product(dim_, state_, s_.chunk, heads_, x_ + b_ + 4 * step_ + 4 * states_);  // of the states
    pass_states(8, 2 * e_);
    // Of x, by its chunk and by its states.
    product(s_.chunk, dim_, state_ + seen_, heads_,
            3 * x_ + b_ + scores_ + e_ * states_ + 12 * step_);
    const double wide = 8 / e_ * b_;  // fp32, written and summed
    product(s_.chunk, state_, dim_, heads_, x_ + e_ * states_ + b_ + wide + 12 * step_);  // of B
    product(s_.chunk, state_, dim_, heads_, x_ + e_ * states_ + b_ + wide + 8 * step_);   // of C
    product(s_.chunk, seen_, dim_, heads_, 2 * x_ + 8 * step_ + scores_);  // of the scores
    for (int i = 0; i < 2; ++i)  // which give the rest of B's and of C's
      product(s_.chunk, state_, s_.chunk, s_.groups, scores_ + 2 * b_ + 4 / e_ * b_);
    // Of the decays: a sum from the end, two additions, its own product, the steps'.
    for (int i = 0; i < 3; ++i) move(8 * step_);
    for (int i = 0; i < 3; ++i) move(12 * step_);
    product(s_.chunk, seen_, dim_, heads_, 2 * x_ + scores_ + 12 * step_);
    move((8 + 2 * e_) * step_);
    all_.kernels += 4;  // sums of parts, of B, C and the parameters
    return all_;
  }

 private:
  void move(double bytes) {
    all_.streamed += Bytes{std::llround(bytes)};
    ++all_.kernels;
  }
  /// One for each chunk and head, or group.
  void product(double m, double n, double k, double each, double bytes) {
    Product p;
    p.m = m, p.n = n, p.k = k, p.count = s_.chunks * each;
    p.type = p.out = s_.type;
    p.bytes = Bytes{std::llround(bytes)};
    all_.products.push_back(p);
    ++all_.kernels;
  }
  void cumsum() { move((e_ + 8) * step_); }
  void chunk_states() {
    product(dim_, state_, s_.chunk, heads_, x_ + b_ + 8 * step_ + 4 * states_);
  }
  void pass_states(double read, double written) { move((read + written) * states_); }
  void scores() { product(s_.chunk, s_.chunk, state_, s_.groups, 2 * b_ + scores_); }

  const ScanProblem s_;
  const double heads_, dim_, state_, seen_;
  const double e_;       ///< bytes of an element
  const double x_, b_;   ///< bytes of x (or y), of B (or C)
  const double step_;    ///< steps
  const double states_;  ///< elements of all chunks' states
  const double scores_;  ///< bytes of B · C inside chunks
  ScanKernels all_;
};

}  // namespace

ScanKernels scan_kernels(const StateSpace& op, const ScanProblem& problem, bool backward) {
  Kernels kernels(op, problem);
  return backward ? kernels.backward() : kernels.forward();
}

}  // namespace partita
