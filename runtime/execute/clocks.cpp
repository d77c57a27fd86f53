#include "runtime/execute/clocks.h"

#include <cmath>

namespace partita::execute {
namespace {
constexpr int kQuestions = 16;
}

ClockReading reading_of(std::int64_t asked, std::int64_t answer, std::int64_t read) {
  const std::int64_t half = (read - asked + 1) / 2;
  const std::int64_t middle = asked + (read - asked) / 2;
  return {middle, answer - middle, half};
}

std::int64_t ClockLine::to_rank_0(std::int64_t own) const {
  const auto span = static_cast<double>(after.at - before.at);
  const double drift = span > 0 ? static_cast<double>(after.offset - before.offset) / span : 0;
  // Differences first: a steady clock counts from boot, and a double has 53 bits.
  return own + before.offset + std::llround(drift * static_cast<double>(own - before.at));
}

ClockReading read_clocks(Transport& transport, std::int64_t tag,
                         const std::function<std::int64_t()>& clock) {
  if (transport.one_clock() || transport.size() == 1) return {};
  ClockReading best;
  // One rank after another, so that no answer waits for another's question.
  if (transport.rank() == 0) {
    for (int r = 1; r < transport.size(); ++r) {
      char go = 0;
      transport.send(r, tag, &go, sizeof go);
      for (int k = 0; k < kQuestions; ++k) {
        transport.receive(r, tag, &go, sizeof go);
        const std::int64_t time = clock();
        transport.send(r, tag, &time, sizeof time);
      }
    }
    return best;
  }
  char go = 0;
  transport.receive(0, tag, &go, sizeof go);
  for (int k = 0; k < kQuestions; ++k) {
    std::int64_t answer = 0;
    const std::int64_t asked = clock();
    transport.send(0, tag, &go, sizeof go);
    transport.receive(0, tag, &answer, sizeof answer);
    const ClockReading reading = reading_of(asked, answer, clock());
    if (k == 0 || reading.uncertainty < best.uncertainty) best = reading;
  }
  return best;
}

void put_on_one_clock(Transport& transport, std::int64_t tag, const ClockLine& line,
                      const std::vector<std::int64_t>& starts, RankMeasurement& measured) {
  if (transport.size() == 1) return;
  std::vector<std::int64_t> zero = starts;
  const std::size_t bytes = zero.size() * sizeof(std::int64_t);
  if (transport.rank() == 0) {
    for (int r = 1; r < transport.size(); ++r) transport.send(r, tag, zero.data(), bytes);
    return;
  }
  transport.receive(0, tag, zero.data(), bytes);
  for (std::size_t s = 0; s < measured.samples.size(); ++s) {
    for (Sample& x : measured.samples[s]) {
      x.start = line.to_rank_0(starts[s] + x.start) - zero[s];
      x.end = line.to_rank_0(starts[s] + x.end) - zero[s];
    }
  }
  measured.clock_uncertainty_s = static_cast<double>(line.uncertainty()) * 1e-9;
}

}  // namespace partita::execute
