#include "simulator/plan/placement.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "base/unit_text.h"
#include "base/yaml.h"

namespace partita {
namespace {

/// Of any plan's mesh; one has those of 2 ranks and more.
constexpr std::array<std::string_view, 4> kAxes{"pp", "dp", "cp", "tp"};

std::string axis_of(const Mesh::Atom& atom) { return atom.name.substr(0, atom.name.find('_')); }

/// A whole number that is all of the text.
std::optional<std::int64_t> whole(std::string_view text) {
  std::int64_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return n;
}

struct Part {
  std::string axis;
  std::int64_t size = 0;
};

struct Nesting {
  std::vector<Part> parts;  ///< innermost first
  std::string fault;
};

Nesting nesting_of(const Mesh& mesh, const std::vector<std::string>& order) {
  Nesting n;
  const std::vector<std::string> axes = axis_order(mesh);
  const auto no = [&](std::string why) {
    n.fault = std::move(why);
    return n;
  };
  std::map<std::string, std::int64_t> sizes, sized;  // of the mesh; of the parts with sizes
  std::map<std::string, int> open;                   // parts without
  for (const std::string& axis : axes) sizes[axis] = mesh.size(axis_atoms(mesh, axis));
  bool whole_axes = true;
  for (const std::string& word : order) {
    const auto at = word.find('=');
    Part part{word.substr(0, at), 0};
    if (at != std::string::npos) {
      const auto size = whole(std::string_view(word).substr(at + 1));
      if (!size || *size < 1)
        return no(fmt::format("'{}' is no part of an axis; write NAME=SIZE, like tp=4", word));
      part.size = *size;
    }
    // Of an axis of one rank there is nothing to place.
    if (part.size < 2 && sizes.count(part.axis) == 0 &&
        std::find(kAxes.begin(), kAxes.end(), part.axis) != kAxes.end())
      continue;
    whole_axes = whole_axes && at == std::string::npos && sizes.count(part.axis) > 0;
    auto& product = sized.try_emplace(part.axis, 1).first->second;
    if (part.size > 0) product = part.size > mesh.ranks() / product ? 0 : product * part.size;
    open[part.axis] += part.size == 0;
    n.parts.push_back(std::move(part));
  }
  const bool each = sized.size() == sizes.size() &&
                    std::all_of(sized.begin(), sized.end(),
                                [&](const auto& s) { return sizes.count(s.first) > 0; });
  if (!each || (whole_axes && n.parts.size() != axes.size()))
    return no(fmt::format(
        "placement '{}' does not name each axis of the mesh once; name, "
        "innermost first, {} in the order you want",
        fmt::join(order, ","), axes.empty() ? "none" : fmt::format("{}", fmt::join(axes, ","))));
  for (const auto& [axis, product] : sized) {
    const std::int64_t size = sizes[axis];
    if (open[axis] > 1)
      return no(
          fmt::format("{} parts of {} have no size; give all but one of them sizes, whose "
                      "product divides {}",
                      open[axis], axis, size));
    if (product == 0 || size % product != 0 || (open[axis] == 0 && product != size))
      return no(
          fmt::format("the parts of {} in '{}' are not {}; give sizes whose product is {}, or "
                      "leave out one size",
                      axis, fmt::join(order, ","), size, size));
    for (Part& part : n.parts) {
      if (part.axis == axis && part.size == 0) part.size = size / product;
    }
  }
  return n;
}

}  // namespace

std::vector<std::string> axis_order(const Mesh& mesh) {
  std::vector<std::string> order;
  for (std::size_t a = mesh.atoms.size(); a-- > 0;) {
    const std::string axis = axis_of(mesh.atoms[a]);
    if (std::find(order.begin(), order.end(), axis) == order.end()) order.push_back(axis);
  }
  return order;
}

AtomMask axis_atoms(const Mesh& mesh, const std::string& axes) {
  AtomMask all = 0;
  for (std::size_t at = 0; at <= axes.size();) {
    const std::size_t plus = std::min(axes.find('+', at), axes.size());
    AtomMask mask = 0;
    for (std::size_t a = 0; a < mesh.atoms.size(); ++a) {
      if (axis_of(mesh.atoms[a]) == axes.substr(at, plus - at))
        mask = static_cast<AtomMask>(mask | bit(static_cast<AtomId>(a)));
    }
    if (mask == 0) return 0;
    all = static_cast<AtomMask>(all | mask);
    at = plus + 1;
  }
  return all;
}

std::string placement_fault(const Mesh& mesh, const std::vector<std::string>& order) {
  return nesting_of(mesh, order).fault;
}

std::vector<std::int32_t> placement(const Mesh& mesh, const std::vector<std::string>& order,
                                    const std::string& place) {
  const Nesting nesting = nesting_of(mesh, order);
  if (!nesting.fault.empty()) throw InputError(place, nesting.fault);
  struct Digit {
    AtomList atoms;            ///< of its axis
    std::int64_t below, size;  ///< of the axis's parts that lie further inside; its own
    std::int64_t stride;       ///< on the devices
  };
  std::vector<Digit> digits;
  std::map<std::string, std::int64_t> below;
  std::int64_t next = 1;
  for (const Part& part : nesting.parts) {
    Digit d{{}, below.try_emplace(part.axis, 1).first->second, part.size, next};
    for (std::size_t a = 0; a < mesh.atoms.size(); ++a) {
      if (axis_of(mesh.atoms[a]) == part.axis) d.atoms.push_back(static_cast<AtomId>(a));
    }
    below[part.axis] *= part.size;
    next *= part.size;
    digits.push_back(d);
  }
  std::vector<std::int32_t> device(static_cast<std::size_t>(mesh.ranks()));
  for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
    std::int64_t at = 0;
    for (const Digit& d : digits) at += mesh.coordinate(r, d.atoms) / d.below % d.size * d.stride;
    device[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(at);
  }
  return device;
}

std::vector<std::int32_t> parse_devices(const std::vector<std::string>& items,
                                        const std::string& place) {
  constexpr std::int64_t kMost = 1'000'000;  // devices of a plan
  std::vector<std::int32_t> devices;
  for (const std::string& item : items) {
    const auto dash = item.find('-');
    const auto first = whole(std::string_view(item).substr(0, dash));
    const auto last =
        dash == std::string::npos ? first : whole(std::string_view(item).substr(dash + 1));
    if (!first || !last || *first < 0 || *last < *first || *last >= kMost)
      throw InputError(place, fmt::format("'{}' is no device; write their numbers, like 5, or "
                                          "ascending ranges, like 8-15",
                                          item));
    for (std::int64_t d = *first; d <= *last; ++d) devices.push_back(static_cast<std::int32_t>(d));
    if (static_cast<std::int64_t>(devices.size()) > kMost)
      throw InputError(place, fmt::format("more than {} devices", grouped(kMost)));
  }
  return devices;
}

std::string devices_text(const std::vector<std::int32_t>& devices) {
  std::string text;
  for (std::size_t k = 0; k < devices.size();) {
    std::size_t end = k + 1;
    while (end < devices.size() && devices[end] == devices[end - 1] + 1) ++end;
    if (end - k < 3) end = k + 1;
    if (!text.empty()) text += ", ";
    text += end - k == 1 ? fmt::format("{}", devices[k])
                         : fmt::format("{}-{}", devices[k], devices[end - 1]);
    k = end;
  }
  return text;
}

std::string devices_fault(const std::vector<std::int32_t>& devices, std::int64_t ranks) {
  if (static_cast<std::int64_t>(devices.size()) != ranks)
    return fmt::format("placement names {} devices, the plan has {} ranks; name the device of each",
                       devices.size(), ranks);
  std::vector<std::pair<std::int32_t, std::size_t>> by_device;
  for (std::size_t r = 0; r < devices.size(); ++r) by_device.emplace_back(devices[r], r);
  std::sort(by_device.begin(), by_device.end());
  for (std::size_t k = 1; k < by_device.size(); ++k) {
    if (by_device[k].first == by_device[k - 1].first)
      return fmt::format("placement puts ranks {} and {} on device {}; name each device once",
                         by_device[k - 1].second, by_device[k].second, by_device[k].first);
  }
  return "";
}

std::vector<std::int32_t> with_spares(std::vector<std::int32_t> devices, std::int64_t count) {
  std::vector<char> taken(static_cast<std::size_t>(count), 0);
  for (const std::int32_t d : devices) taken[static_cast<std::size_t>(d)] = 1;
  for (std::int64_t d = 0; d < count; ++d) {
    if (!taken[static_cast<std::size_t>(d)]) devices.push_back(static_cast<std::int32_t>(d));
  }
  return devices;
}

std::string rings_fault(const Mesh& mesh, const RingStrides& rings) {
  for (const auto& [axes, strides] : rings) {
    const AtomMask atoms = axis_atoms(mesh, axes);
    const auto known = axis_order(mesh);
    if (atoms == 0)
      return fmt::format(
          "rings: '{}' is no axis of the mesh{}; there {} {}, and several at once "
          "like dp+cp",
          axes, did_you_mean(axes, known), known.size() == 1 ? "is" : "are",
          known.empty() ? "none" : fmt::format("{}", fmt::join(known, ", ")));
    if (strides.empty())
      return fmt::format("rings: {} has no strides; give at least one, like [1, 2]", axes);
    const std::int64_t n = mesh.size(atoms);
    for (const std::int64_t s : strides) {
      if (s < 1 || s >= n || std::gcd(s, n) != 1)
        return fmt::format(
            "rings: stride {} does not visit all {} ranks of {} once; use 1 to {} "
            "without a factor in common with {}",
            s, n, axes, n - 1, n);
    }
  }
  return "";
}

std::map<std::array<std::int64_t, 3>, std::int64_t> strides_by_group(const Mesh& mesh,
                                                                     const RingStrides& rings) {
  std::map<std::array<std::int64_t, 3>, std::int64_t> all;
  for (const auto& [axes, strides] : rings) {
    const AtomMask atoms = axis_atoms(mesh, axes);
    std::int64_t farthest = 0;  // from a group's lowest rank to its highest
    for (std::size_t a = 0; a < mesh.atoms.size(); ++a) {
      const auto atom = static_cast<AtomId>(a);
      if (has(atoms, atom)) farthest += (mesh.atoms[a].size - 1) * mesh.stride(atom);
    }
    std::size_t group = 0;
    for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
      if (mesh.group_root(r, atoms) != r) continue;
      const std::int64_t stride = strides[group++ % strides.size()];
      if (stride != 1) all[{r, r + farthest, mesh.size(atoms)}] = stride;
    }
  }
  return all;
}

}  // namespace partita
