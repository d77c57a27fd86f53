// simulator/engine/progress.h: how far each class of ranks has come, and what it has sent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "base/hash.h"
#include "simulator/engine/breakdown.h"
#include "simulator/engine/classes.h"
#include "simulator/engine/compile.h"
#include "simulator/engine/device_use.h"
#include "simulator/program/program.h"

namespace partita {

constexpr std::int64_t kLastTick = 9'200'000'000'000'000'000;

/// A buffer through which streams meet.
struct Slot {
  std::int64_t ready = 0;
  std::int32_t label = -1;   ///< who made it: what a waiter's gap is charged to
  std::int32_t before = -1;  ///< what the maker itself waited for, until `begin`
  std::int64_t begin = 0;
};

/// Slots of a class: a row of step-scoped ones' places, then one of each micro-batch.
struct Slots {
  std::size_t width = 0;
  std::size_t at(std::int32_t encoded, std::int32_t micro_batch) const {
    const std::size_t row = encoded < 0 ? 0 : static_cast<std::size_t>(micro_batch + 1);
    return row * width + static_cast<std::size_t>(encoded < 0 ? -1 - encoded : encoded);
  }
};

struct Mark {
  std::int32_t slot = 0;  ///< encoded: negative for step-scoped buffers
  std::int32_t micro_batch = 0;
  std::int64_t ready = 0;
};

struct Progress {
  std::size_t call = 0, step = 0;
  std::size_t instance = 0;         ///< instructions played so far
  std::size_t stretched = 0;        ///< of them, those that took another time than alone
  std::vector<std::int64_t> free;   ///< per stream
  std::int64_t host = 0;            ///< when it has launched what was played so far
  Slot joined{};                    ///< what it waited for last, of messages
  std::vector<std::int32_t> label;  ///< per stream: what ran last
  Slots index;
  std::vector<Slot> slots;
  std::vector<Mark> late;  ///< made by earlier calls, ready after the compute stream's position
  std::vector<Running> running;  ///< transfers that kernels may still meet, with Network::beside
  Spent spent;                   ///< by the compute stream
  bool at_meeting = false;       ///< counted there, waits for the others
  std::map<std::int32_t, std::int32_t> met;  ///< how often, by meeting of tied stages

  Slot& slot(std::int32_t encoded, std::int32_t micro_batch) {
    return slots[index.at(encoded, micro_batch)];
  }
};

/// Messages between classes: one for each micro-batch, or one a step.
class MessageKeys {
 public:
  MessageKeys(const Program& program, const RankClasses& classes)
      : micro_batches_(static_cast<std::uint64_t>(program.micro_batches)),
        classes_(classes.classes.size()) {}
  /// micro_batch -1: one a step.
  std::uint64_t operator()(std::int32_t message, std::int32_t micro_batch, int from, int to) const {
    return (static_cast<std::uint64_t>(message) * (micro_batches_ + 1) +
            static_cast<std::uint64_t>(micro_batch + 1)) *
               classes_ * classes_ +
           static_cast<std::uint64_t>(from) * classes_ + static_cast<std::uint64_t>(to);
  }

 private:
  std::uint64_t micro_batches_, classes_;
};
/// One of the times that classes meet. Tied stages meet in different blocks, each time all of them.
struct MeetingKey {
  std::int32_t meeting = 0, instruction = 0;  ///< -1: of tied stages
  std::int64_t nth = 0;                       ///< call, or of tied stages the how manieth
  bool operator==(const MeetingKey&) const = default;
  struct Hash {
    std::size_t operator()(const MeetingKey& k) const {
      return mix(
          mix(static_cast<std::uint64_t>(k.meeting), static_cast<std::uint64_t>(k.instruction)),
          static_cast<std::uint64_t>(k.nth));
    }
  };
};
/// `met`: how often the class has met there.
inline MeetingKey meeting_key(const Compiled& compiled, const Step& step, std::size_t call,
                              std::int32_t met) {
  if (compiled.meetings[static_cast<std::size_t>(step.meeting)].tie >= 0)
    return {step.meeting, -1, met};
  return {step.meeting, step.instruction, static_cast<std::int64_t>(call)};
}

/// When each was sent.
using Messages = std::unordered_map<std::uint64_t, std::int64_t>;

}  // namespace partita
