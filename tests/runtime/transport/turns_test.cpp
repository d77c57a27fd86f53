// More threads than cores: at most as many run as there are cores, and nobody is forgotten.
#include "runtime/transport/turns.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <mutex>
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

/// One core, three ranks that wait: each runs when the one before has left, in the order in which
/// they could.
TEST(Turns, WhoCouldRunFirstRunsFirstAndAlone) {
  for (int attempt = 0; attempt < 20; ++attempt) {
    Turns turns(3, {0});
    std::mutex guard;
    std::vector<int> order;
    std::atomic<int> running{0}, most{0};
    std::vector<std::thread> all;
    for (int r = 0; r < 3; ++r) {
      all.emplace_back([&, r] {
        ASSERT_TRUE(turns.wait(r, kLong));
        most = std::max(most.load(), ++running);
        {
          const std::lock_guard<std::mutex> lock(guard);
          order.push_back(r);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        --running;
        turns.leave(r);
      });
    }
    while (turns.waiting() < 3) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    for (const int r : {1, 2, 0}) turns.ready(r);
    for (auto& t : all) t.join();
    // On a busy machine somebody may have lost patience.
    const bool patient = std::chrono::steady_clock::now() - start < Turns::kPatience;
    if (!patient) continue;
    EXPECT_EQ(order, (std::vector<int>{1, 2, 0}));
    EXPECT_EQ(most, 1);
    return;
  }
  GTEST_SKIP() << "the machine is too busy: 20 attempts took longer than anybody waits for a core";
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
