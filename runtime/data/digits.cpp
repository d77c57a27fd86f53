#include "runtime/data/digits.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "runtime/reference/kernels.h"

namespace partita {
namespace {

constexpr std::int64_t kSide = 28, kPixels = kSide * kSide;

std::uint32_t big_endian(const std::vector<std::uint8_t>& file, std::size_t at) {
  return static_cast<std::uint32_t>(file[at]) << 24 |
         static_cast<std::uint32_t>(file[at + 1]) << 16 |
         static_cast<std::uint32_t>(file[at + 2]) << 8 | file[at + 3];
}

/// The bytes after the header of an IDX file whose dimensions after the first are `inner`.
std::vector<std::uint8_t> read_idx(const std::string& folder, const std::string& name,
                                   const std::string& other_name,
                                   const std::vector<std::uint32_t>& inner) {
  std::string path = folder + "/" + name;
  if (!std::filesystem::exists(path)) path = folder + "/" + other_name;
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    const bool packed = std::filesystem::exists(folder + "/" + name + ".gz");
    throw InputError("--data", fmt::format("{}/{} {}", folder, name,
                                           packed ? "is still packed; run gunzip on its .gz"
                                                  : "cannot be read; name the folder with MNIST's "
                                                    "IDX files, or leave --data out for a "
                                                    "generated set"));
  }
  const std::vector<std::uint8_t> file((std::istreambuf_iterator<char>(in)),
                                       std::istreambuf_iterator<char>());
  const std::size_t header = 4 * (2 + inner.size());
  const auto refuse = [&](const std::string& why) {
    throw InputError(path, why + "; download it again");
  };
  if (file.size() < header || big_endian(file, 0) != 0x800 + 1 + inner.size())
    refuse(fmt::format("is no IDX file of bytes with {} dimensions", 1 + inner.size()));
  std::size_t each = 1;
  for (std::size_t d = 0; d < inner.size(); ++d) {
    if (big_endian(file, 8 + 4 * d) != inner[d])
      refuse(fmt::format("has dimension {} of {}, not {}", d + 1, big_endian(file, 8 + 4 * d),
                         inner[d]));
    each *= inner[d];
  }
  const std::size_t wanted = header + big_endian(file, 4) * each;
  if (file.size() != wanted)
    refuse(fmt::format("has {} bytes, its header says {}", file.size(), wanted));
  return {file.begin() + static_cast<std::ptrdiff_t>(header), file.end()};
}

}  // namespace

Digits load_mnist(const std::string& folder) {
  Digits d;
  d.source = "MNIST in " + folder;
  d.pixels = read_idx(folder, "train-images-idx3-ubyte", "train-images.idx3-ubyte", {28, 28});
  d.labels = read_idx(folder, "train-labels-idx1-ubyte", "train-labels.idx1-ubyte", {});
  if (d.pixels.size() != d.labels.size() * kPixels) {
    throw InputError("--data", fmt::format("{} has {} images and {} labels; download both again",
                                           folder, d.pixels.size() / kPixels, d.labels.size()));
  }
  if (d.labels.empty()) throw InputError("--data", folder + " has no images; download them again");
  for (const std::uint8_t label : d.labels) {
    if (label > 9)
      throw InputError("--data",
                       fmt::format("{} has a label {}; MNIST's are 0 to 9", folder, label));
  }
  return d;
}

Digits generated_digits(std::int64_t count, std::uint64_t seed) {
  Digits d;
  d.source = fmt::format("generated: {} images of ten prototypes and noise", count);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto label = static_cast<std::uint8_t>(
        reference::uniform(seed, 0x6c616265, static_cast<std::uint64_t>(i)) * 10);
    d.labels.push_back(label);
    for (std::int64_t p = 0; p < kPixels; ++p) {
      // A prototype is constant over 4 x 4 pixels.
      const std::int64_t cell = p / kSide / 4 * 7 + p % kSide / 4;
      const double prototype = reference::uniform(seed, label, static_cast<std::uint64_t>(cell));
      const double noise = reference::normal(seed, static_cast<std::uint64_t>(i) + 16,
                                             static_cast<std::uint64_t>(p));
      d.pixels.push_back(
          static_cast<std::uint8_t>(std::clamp(200 * prototype + 40 * noise, 0.0, 255.0)));
    }
  }
  return d;
}

}  // namespace partita
