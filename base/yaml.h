// base/yaml.h: reading our YAML files so that every mistake gets a place and a remedy.
//
// yaml-cpp stays behind this interface. A Record knows its file, line and path; asking for a key
// marks it as known, and reject_unknown_keys() names any key that nobody asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/units.h"

namespace partita {

class YamlNode {
 public:
  /// Throw InputError: no such file, not YAML, or a `schema` key that is not `schema`
  /// ("partita.plan/1").
  static YamlNode load_file(const std::string& file, std::string_view schema);
  static YamlNode load_text(const std::string& text, const std::string& file,
                            std::string_view schema);

  /// "file.yaml:12: devices[0].memory"
  std::string place() const;
  std::string file() const;

  bool is_map() const;
  bool is_list() const;
  bool is_scalar() const;

  /// Member of a map. get: InputError if absent. find: empty if absent (or null).
  YamlNode get(std::string_view key) const;
  std::optional<YamlNode> find(std::string_view key) const;
  bool has(std::string_view key) const { return find(key).has_value(); }
  std::vector<YamlNode> items() const;                            ///< Of a list.
  std::vector<std::pair<std::string, YamlNode>> members() const;  ///< Of a map, in file order.

  /// InputError for any key of this map that no get/find/members has asked for.
  void reject_unknown_keys() const;
  /// InputError for any key in here or below that has no value: find() takes it for one that is not
  /// there.
  void reject_empty_keys() const;

  std::string as_string() const;
  std::int64_t as_int(std::int64_t lowest = INT64_MIN, std::int64_t highest = INT64_MAX) const;
  double as_double() const;  ///< A pure number: ratio, efficiency.
  bool as_bool() const;
  Bytes as_bytes() const;
  Seconds as_seconds() const;
  BytesPerSecond as_byte_rate() const;
  FlopsPerSecond as_flop_rate() const;
  std::vector<std::int64_t> as_ints() const;
  std::vector<std::string> as_strings() const;  ///< A list, or one scalar.

  struct Impl;
  explicit YamlNode(std::shared_ptr<const Impl> impl);

 private:
  std::shared_ptr<const Impl> impl_;
};

/// Does this value of a change multiply what is there, as "x0.5" does?
bool multiplies(const std::string& value);
/// "50 GB/s" of "25 GB/s" and "x2"; a value that multiplies nothing as it is. InputError{place}
/// where a number is missing to multiply.
std::string multiplied(const std::string& there, const std::string& value,
                       const std::string& place);

/// One change to a YAML text: `path` like "fabric.oversubscription", "nodes[0].count",
/// "nodes[*].links[kind=nvlink].bandwidth". A selector picks list items by number, all of them, or those
/// with that member; every match changes. Where a map with a `value` stands, its value changes. "x0.5"
/// multiplies the number that is there and keeps its unit.
struct YamlEdit {
  std::string path, value;
};
/// The text with the edits done. A last key that is not there is added where it need not be
/// multiplied. InputError{path} when a path leads nowhere, naming what is there.
std::string yaml_with(const std::string& text, const std::vector<YamlEdit>& edits, const std::string& file);

/// The one of `known` that is within edit distance 2 of `word`, capital or not, the nearest; else
/// "".
std::string nearest_of(std::string_view word, const std::vector<std::string>& known);
/// "; did you mean 'x'?" when one of `known` is within edit distance 2 of `word`, else "".
std::string did_you_mean(std::string_view word, const std::vector<std::string>& known);

/// Where the catalogue's data files live: $PARTITA_DATA, else beside the sources the build came
/// from. `folder` is e.g. "models/catalogue".
std::string data_folder(std::string_view folder);

/// The whole of a file. InputError if it cannot be read.
std::string read_file(const std::string& path);

}  // namespace partita
