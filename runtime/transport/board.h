// runtime/transport/board.h: memory that the processes of one launch on one host share, so that
// whoever is left can say where another was and what had been measured.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "runtime/transport/transport.h"

namespace partita {

class Board {
 public:
  /// `path` is good for open() in other processes while this one lives.
  static std::shared_ptr<Board> create(int ranks, std::int64_t steps, int replicas);
  /// Null if there is none, or of another shape.
  static std::shared_ptr<Board> open(const std::string& path, int ranks);
  ~Board();
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  std::string path() const;
  /// Another board at the same path, of another time or machine, has another.
  std::uint64_t identity() const;
  int ranks() const;
  RankState& rank(int r) const;
  /// The loss by replica and the slowest rank's time of the next step, all ranks having done it.
  void note_step(const std::vector<double>& losses, double seconds);
  std::int64_t steps_done() const;
  std::vector<double> losses(std::int64_t step) const;
  double seconds(std::int64_t step) const;
  /// Who holds up the others, `me` having waited too long: a rank whose process is stopped or gone,
  /// else one that waits for nobody, else the one furthest behind. Of the first `among` ranks.
  int culprit(int me, int among) const;

 private:
  struct Header;
  Board(int file, void* memory, std::size_t bytes) : file_(file), memory_(memory), bytes_(bytes) {}
  Header& header() const;
  double* record(std::int64_t step) const;
  int file_;
  void* memory_;
  std::size_t bytes_;
};

/// 'R', 'S', 'T' (stopped), 'Z', ... of /proc; 0 if there is no such process.
char process_state(std::int64_t process);

}  // namespace partita
