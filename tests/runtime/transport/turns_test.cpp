// More threads than cores: at most as many run as there are cores, and nobody is forgotten.
#include "runtime/transport/turns.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

namespace partita {
namespace {

constexpr std::chrono::seconds kLong{60};

TEST(Turns, AtMostAsManyRunAsThereAreCores) {
  constexpr int kRanks = 6, kCores = 2, kRounds = 200;
  Turns turns(kRanks, {0, 1});
  std::atomic<int> running{0}, most{0}, done{0};
  std::atomic<bool> patient{true};
  std::vector<std::thread> all;
  for (int r = 0; r < kRanks; ++r) {
    all.emplace_back([&, r] {
      for (int k = 0; k < kRounds; ++k) {
        const auto start = std::chrono::steady_clock::now();
        ASSERT_TRUE(turns.wait(r, kLong));
        // Who waits long for a core runs without one: on a busy machine that may happen.
        if (std::chrono::steady_clock::now() - start >= Turns::kPatience) patient = false;
        const int now = ++running;
        for (int m = most; m < now && !most.compare_exchange_weak(m, now);) {
        }
        --running;
        ++done;
      }
      turns.leave(r);
    });
  }
  for (int k = 1; k <= kRounds; ++k) {
    for (int r = 0; r < kRanks; ++r) turns.ready(r);
    while (done < k * kRanks) std::this_thread::yield();
  }
  for (auto& t : all) t.join();
  EXPECT_EQ(done, kRanks * kRounds);
  if (patient) {
    EXPECT_LE(most, kCores);
  }
}

TEST(Turns, ReadyBeforeWaitingIsNotLost) {
  Turns turns(2, {0});
  turns.ready(0);
  EXPECT_TRUE(turns.wait(0, kLong));
  EXPECT_FALSE(turns.wait(0, std::chrono::milliseconds(5))) << "once for each";
}

TEST(Turns, WhoGetsNoCoreRunsWithoutOne) {
  Turns turns(2, {0});
  turns.enter(0);  // and never leaves: it computes, or hangs
  std::atomic<bool> ran{false};
  std::thread other([&] { ran = turns.wait(1, kLong); });
  turns.ready(1);
  other.join();
  EXPECT_TRUE(ran);
}

TEST(Turns, StoppingEndsAllWaits) {
  Turns turns(2, {0});
  std::atomic<bool> came{true};
  std::thread other([&] { came = turns.wait(1, kLong); });
  turns.stop();
  other.join();
  EXPECT_FALSE(came);
}

}  // namespace
}  // namespace partita
