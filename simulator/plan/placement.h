// simulator/plan/placement.h: which rank lies on which device, and how rings go through groups.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "simulator/program/mesh.h"

namespace partita {

/// Axes of a mesh (what its atoms are named after), innermost first: neighbours along the first are
/// neighbours in the cluster.
std::vector<std::string> axis_order(const Mesh& mesh);

/// Atoms of an axis, or of several like "dp+cp"; 0 where the mesh has not all of them.
AtomMask axis_atoms(const Mesh& mesh, const std::string& axes);

/// Why {"tp=4", "dp", "tp"} does not nest the axes of the mesh; "" where it does: every axis whole,
/// or in parts with sizes of which one may be left out.
std::string placement_fault(const Mesh& mesh, const std::vector<std::string>& innermost_first);

/// Device of every rank of the mesh when its axes, or their parts, are nested in this order,
/// innermost first. InputError{place} with placement_fault().
std::vector<std::int32_t> placement(const Mesh& mesh,
                                    const std::vector<std::string>& innermost_first,
                                    const std::string& place);

/// Device of rank 0, 1, ... from items like "5" and "8-15". InputError{place}.
std::vector<std::int32_t> parse_devices(const std::vector<std::string>& items,
                                        const std::string& place);
/// The inverse: "0-7, 16-23, 5".
std::string devices_text(const std::vector<std::int32_t>& devices);
/// Why these are no devices of `ranks` ranks; "" where they are: as many, each once.
std::string devices_fault(const std::vector<std::int32_t>& devices, std::int64_t ranks);
/// All `count` devices: those given, then the others ascending.
std::vector<std::int32_t> with_spares(std::vector<std::int32_t> devices, std::int64_t count);

/// Strides of rings by axes: group k, by its lowest rank, has number k modulo their number.
using RingStrides = std::map<std::string, std::vector<std::int64_t>>;
/// Why these are no strides on this mesh; "" where they are.
std::string rings_fault(const Mesh& mesh, const RingStrides& rings);
/// By lowest rank, highest rank and size of a group (ClusterState::ring_strides).
std::map<std::array<std::int64_t, 3>, std::int64_t> strides_by_group(const Mesh& mesh,
                                                                     const RingStrides& rings);

}  // namespace partita
