#include "simulator/plan/placement.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "base/error.h"

namespace partita {
namespace {

std::string axis_of(const Mesh::Atom& atom) { return atom.name.substr(0, atom.name.find('_')); }

}  // namespace

std::vector<std::string> axis_order(const Mesh& mesh) {
  std::vector<std::string> order;
  for (std::size_t a = mesh.atoms.size(); a-- > 0;) {
    const std::string axis = axis_of(mesh.atoms[a]);
    if (std::find(order.begin(), order.end(), axis) == order.end()) order.push_back(axis);
  }
  return order;
}

std::vector<std::int32_t> placement(const Mesh& mesh, const std::vector<std::string>& order,
                                    const std::string& place) {
  std::vector<std::string> wanted = axis_order(mesh), given = order;
  const std::string legal = fmt::format("{}", fmt::join(wanted, ","));
  std::sort(wanted.begin(), wanted.end());
  std::sort(given.begin(), given.end());
  if (wanted != given) {
    throw InputError(place,
                     fmt::format("'{}' does not name each axis of the mesh once; name, innermost "
                                 "first, {} in the order you want",
                                 fmt::join(order, ","), legal.empty() ? "none" : legal));
  }
  // Atoms of one axis keep their order among themselves.
  std::vector<std::int64_t> stride(mesh.atoms.size(), 0);
  std::int64_t next = 1;
  for (const std::string& axis : order) {
    for (std::size_t a = mesh.atoms.size(); a-- > 0;) {
      if (axis_of(mesh.atoms[a]) != axis) continue;
      stride[a] = next;
      next *= mesh.atoms[a].size;
    }
  }
  std::vector<std::int32_t> device(static_cast<std::size_t>(mesh.ranks()));
  for (std::int64_t r = 0; r < mesh.ranks(); ++r) {
    std::int64_t d = 0;
    for (std::size_t a = 0; a < stride.size(); ++a)
      d += mesh.coordinate(r, static_cast<AtomId>(a)) * stride[a];
    device[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(d);
  }
  return device;
}

}  // namespace partita
