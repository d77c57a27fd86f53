// runtime/data/digits.h: the founding example's data: images of digits, 28 x 28.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace partita {

struct Digits {
  std::string source;                ///< for people: where they come from
  std::vector<std::uint8_t> pixels;  ///< count x 784, 0 to 255
  std::vector<std::uint8_t> labels;  ///< 0 to 9
  std::int64_t count() const { return static_cast<std::int64_t>(labels.size()); }
};

/// MNIST's training set in IDX files (yann.lecun.com's format): train-images-idx3-ubyte and
/// train-labels-idx1-ubyte in `folder`, unpacked. InputError names file, what it holds and the
/// remedy.
Digits load_mnist(const std::string& folder);

/// A set that can be learned: ten blurred prototypes and noise, `count` of them.
Digits generated_digits(std::int64_t count, std::uint64_t seed);

}  // namespace partita
