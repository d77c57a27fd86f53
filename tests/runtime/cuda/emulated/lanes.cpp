#include "tests/runtime/cuda/emulated/lanes.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "tests/runtime/cuda/emulated/gpu.h"

namespace emulated {
namespace {

constexpr std::size_t kStack = 64 << 10;

struct Lane {
  ucontext_t context;
  void* stack = nullptr;
  bool over = false, meets = false;
};
/// Of a thread: one block runs at a time.
struct Block {
  std::vector<Lane> all;
  ucontext_t back;
  const std::function<void()>* body = nullptr;
  int count = 1, at = 0;
  std::vector<double> brought;
  double result = 0;
  bool maximum = false;
  std::mt19937 rng{7};
};
Block& current() {
  static thread_local Block& b = *new Block;
  return b;
}

void enter() {
  Block& b = current();
  (*b.body)();
  b.all[static_cast<std::size_t>(b.at)].over = true;
  ::swapcontext(&b.all[static_cast<std::size_t>(b.at)].context, &b.back);
}

double over_all(const Block& b) {
  const auto join = [&](double x, double y) { return b.maximum ? std::fmax(x, y) : x + y; };
  std::vector<double> warps;
  for (int first = 0; first < b.count; first += 32) {
    std::vector<double> v(b.brought.begin() + first, b.brought.begin() + first + 32);
    for (std::size_t d = 16; d > 0; d /= 2) {
      const std::vector<double> before = v;
      for (std::size_t k = 0; k < 32; ++k) v[k] = join(before[k], before[k ^ d]);
    }
    warps.push_back(v[0]);
  }
  double all = warps[0];
  for (std::size_t w = 1; w < warps.size(); ++w) all = join(all, warps[w]);
  return all;
}

[[noreturn]] void die(const std::string& why) {
  say(why);
  ::_exit(134);
}

}  // namespace

std::int64_t lane() { return current().body != nullptr ? current().at : 0; }
std::int64_t lanes() { return current().body != nullptr ? current().count : 1; }

double reduce(double v, bool maximum) {
  Block& b = current();
  if (b.body == nullptr || b.count == 1) return v;
  Lane& mine = b.all[static_cast<std::size_t>(b.at)];
  b.brought[static_cast<std::size_t>(b.at)] = v;
  b.maximum = maximum;
  mine.meets = true;
  const int me = b.at;
  ::swapcontext(&mine.context, &b.back);
  b.at = me;
  return b.result;
}

void block(int count, const std::function<void()>& body) {
  Block& b = current();
  static const char* const wanted = std::getenv("PARTITA_EMULATED_LANES");
  static const bool one = wanted != nullptr && std::string(wanted) == "0";
  b.body = &body;
  b.count = one ? 1 : count;
  if (b.count == 1) {
    b.at = 0;
    body();
    b.body = nullptr;
    return;
  }
  const auto n = static_cast<std::size_t>(b.count);
  if (b.all.size() < n) b.all.resize(n);
  b.brought.assign(n, 0);
  for (std::size_t k = 0; k < n; ++k) {
    Lane& l = b.all[k];
    if (l.stack == nullptr)
      l.stack = ::mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ::getcontext(&l.context);
    l.context.uc_stack.ss_sp = l.stack;
    l.context.uc_stack.ss_size = kStack;
    l.context.uc_link = nullptr;
    ::makecontext(&l.context, &enter, 0);
    l.over = l.meets = false;
  }
  std::vector<std::size_t> order(n);
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (;;) {
    std::shuffle(order.begin(), order.end(), b.rng);
    std::size_t met = 0, over = 0;
    for (const std::size_t k : order) {
      Lane& l = b.all[k];
      if (l.over) {
        ++over;
        continue;
      }
      l.meets = false;
      b.at = static_cast<int>(k);
      ::swapcontext(&b.back, &l.context);
      met += l.meets ? 1 : 0;
      over += l.over ? 1 : 0;
    }
    if (over == n) break;
    if (met != n) die(fmt::format("{} of {} lanes come to a sum of all", met, n));
    b.result = over_all(b);
  }
  b.body = nullptr;
}

}  // namespace emulated
