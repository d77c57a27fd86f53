#include "base/yaml.h"

#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>

#include "base/error.h"
#include "base/unit_text.h"

namespace partita {

struct YamlNode::Impl {
  YAML::Node node;
  std::string file;
  std::string path;
  std::shared_ptr<std::set<std::string>> asked = std::make_shared<std::set<std::string>>();
};

namespace {

std::shared_ptr<const YamlNode::Impl> make(const YAML::Node& node, std::string file,
                                           std::string path) {
  auto impl = std::make_shared<YamlNode::Impl>();
  impl->node = node;
  impl->file = std::move(file);
  impl->path = std::move(path);
  return impl;
}

std::string joined(const std::string& path, std::string_view key) {
  return path.empty() ? std::string(key) : path + "." + std::string(key);
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row.back();
}

}  // namespace

std::string nearest_of(std::string_view word, const std::vector<std::string>& known) {
  const auto small = [](std::string_view text) {
    std::string s(text);
    for (char& c : s) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return s;
  };
  // "TP" is "tp", and no nearer to "cp" than that.
  const std::string meant = small(word);
  std::string best;
  std::size_t least = 3;
  for (const auto& candidate : known) {
    if (const auto d = edit_distance(meant, small(candidate)); d < least) {
      least = d;
      best = candidate;
    }
  }
  return best;
}

std::string did_you_mean(std::string_view word, const std::vector<std::string>& known) {
  const std::string best = nearest_of(word, known);
  return best.empty() ? "" : fmt::format("; did you mean '{}'?", best);
}

YamlNode::YamlNode(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}

namespace {

/// Where text is not UTF-8; its size where all of it is. Overlong forms pass, as they do no harm.
std::size_t not_utf8(std::string_view text) {
  for (std::size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    const std::size_t more = first < 0x80             ? 0
                             : (first & 0xe0) == 0xc0 ? 1
                             : (first & 0xf0) == 0xe0 ? 2
                             : (first & 0xf8) == 0xf0 ? 3
                                                      : 4;
    if (more == 4 || i + more >= text.size()) return i;
    for (std::size_t k = 1; k <= more; ++k) {
      if ((static_cast<unsigned char>(text[i + k]) & 0xc0) != 0x80) return i;
    }
    i += more + 1;
  }
  return text.size();
}

}  // namespace

std::string read_file(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    throw InputError(path, "is a folder; name a file");
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) throw InputError(path, "cannot be read; check that the file exists and is readable");
  std::ostringstream all;
  all << in.rdbuf();
  return all.str();
}

YamlNode YamlNode::load_file(const std::string& file, std::string_view schema) {
  return load_text(read_file(file), file, schema);
}

YamlNode YamlNode::load_text(const std::string& body, const std::string& file,
                             std::string_view schema) {
  if (const std::size_t at = not_utf8(body); at < body.size()) {
    const auto end = body.begin() + static_cast<std::ptrdiff_t>(at);
    throw InputError(fmt::format("{}:{}", file, std::count(body.begin(), end, '\n') + 1),
                     fmt::format("has the byte 0x{:02x}, which is not UTF-8; save it as such",
                                 static_cast<unsigned char>(body[at])));
  }
  YAML::Node root;
  try {
    root = YAML::Load(body);
  } catch (const YAML::Exception& e) {
    throw InputError(fmt::format("{}:{}", file, e.mark.line + 1), "is not YAML: " + e.msg);
  }
  YamlNode node(make(root, file, ""));
  if (!root.IsMap()) {
    throw InputError(file, fmt::format("must be a map that begins with 'schema: {}'", schema));
  }
  const std::string found = node.has("schema") ? node.get("schema").as_string() : "";
  if (found != schema) {
    throw InputError(node.has("schema") ? node.get("schema").place() : file,
                     found.empty() ? fmt::format("has no schema; add the line 'schema: {}'", schema)
                                   : fmt::format("schema is '{}'; this reads '{}'", found, schema));
  }
  return node;
}

std::string YamlNode::place() const {
  const auto mark = impl_->node.Mark();
  std::string where = impl_->file;
  if (mark.line >= 0) where += fmt::format(":{}", mark.line + 1);
  if (!impl_->path.empty()) where += ": " + impl_->path;
  return where;
}
std::string YamlNode::file() const { return impl_->file; }

bool YamlNode::is_map() const { return impl_->node.IsMap(); }
bool YamlNode::is_list() const { return impl_->node.IsSequence(); }
bool YamlNode::is_scalar() const { return impl_->node.IsScalar(); }

std::optional<YamlNode> YamlNode::find(std::string_view key) const {
  if (!is_map()) {
    throw InputError(place(), fmt::format("must be a map with key '{}'", key));
  }
  impl_->asked->insert(std::string(key));
  const YAML::Node child = impl_->node[std::string(key)];
  if (!child.IsDefined() || child.IsNull()) return std::nullopt;
  return YamlNode(make(child, impl_->file, joined(impl_->path, key)));
}

YamlNode YamlNode::get(std::string_view key) const {
  if (auto child = find(key)) return *child;
  std::vector<std::string> present;
  for (const auto& entry : impl_->node) present.push_back(entry.first.as<std::string>());
  throw InputError(place(), fmt::format("needs the key '{}'{}", key, did_you_mean(key, present)));
}

std::vector<YamlNode> YamlNode::items() const {
  if (!is_list()) throw InputError(place(), "must be a list");
  std::vector<YamlNode> all;
  for (std::size_t i = 0; i < impl_->node.size(); ++i) {
    all.emplace_back(make(impl_->node[i], impl_->file, fmt::format("{}[{}]", impl_->path, i)));
  }
  return all;
}

std::vector<std::pair<std::string, YamlNode>> YamlNode::members() const {
  if (!is_map()) throw InputError(place(), "must be a map");
  std::vector<std::pair<std::string, YamlNode>> all;
  for (const auto& entry : impl_->node) {
    const auto key = entry.first.as<std::string>();
    impl_->asked->insert(key);
    all.emplace_back(key, YamlNode(make(entry.second, impl_->file, joined(impl_->path, key))));
  }
  return all;
}

void YamlNode::reject_unknown_keys() const {
  std::set<std::string> seen;
  for (const auto& entry : impl_->node) {
    const auto key = entry.first.as<std::string>();
    const int line = entry.first.Mark().line + 1;
    if (!seen.insert(key).second) {
      throw InputError(fmt::format("{}:{}: {}", impl_->file, line, joined(impl_->path, key)),
                       "is given twice; keep one");
    }
    if (impl_->asked->count(key)) continue;
    const std::vector<std::string> known(impl_->asked->begin(), impl_->asked->end());
    std::string list;
    for (const auto& k : known) list += (list.empty() ? "" : ", ") + k;
    throw InputError(fmt::format("{}:{}: {}", impl_->file, line, joined(impl_->path, key)),
                     fmt::format("unknown key{}; known here: {}", did_you_mean(key, known), list));
  }
}

void YamlNode::reject_empty_keys() const {
  for (const auto& entry : impl_->node) {
    if (!is_map()) {
      if (entry.IsMap() || entry.IsSequence())
        YamlNode(make(entry, impl_->file, impl_->path)).reject_empty_keys();
      continue;
    }
    const std::string path = joined(impl_->path, entry.first.Scalar());
    if (entry.second.IsNull())
      throw InputError(fmt::format("{}:{}: {}", impl_->file, entry.first.Mark().line + 1, path),
                       "has no value; give one, or leave the key out");
    if (entry.second.IsMap() || entry.second.IsSequence())
      YamlNode(make(entry.second, impl_->file, path)).reject_empty_keys();
  }
}

std::string YamlNode::as_string() const {
  if (!is_scalar()) throw InputError(place(), "must be a single value");
  return impl_->node.Scalar();
}

std::int64_t YamlNode::as_int(std::int64_t lowest, std::int64_t highest) const {
  const std::string s = as_string();
  std::int64_t n = 0;
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), n);
  if (error != std::errc{} || end != s.data() + s.size()) {
    throw InputError(place(), fmt::format("'{}' is not a whole number", s));
  }
  if (n < lowest) throw InputError(place(), fmt::format("{} is too small; at least {}", n, lowest));
  if (n > highest)
    throw InputError(place(), fmt::format("{} is too large; at most {}", n, highest));
  return n;
}

double YamlNode::as_double() const {
  const std::string s = as_string();
  double n = 0;
  const auto [end, error] = std::from_chars(s.data(), s.data() + s.size(), n);
  if (error != std::errc{} || end != s.data() + s.size()) {
    throw InputError(place(), fmt::format("'{}' is not a plain number", s));
  }
  return n;
}

bool YamlNode::as_bool() const {
  const std::string s = as_string();
  if (s == "true" || s == "yes" || s == "on") return true;
  if (s == "false" || s == "no" || s == "off") return false;
  throw InputError(place(), fmt::format("'{}' must be true or false", s));
}

Bytes YamlNode::as_bytes() const { return parse_bytes(as_string(), place()); }
Seconds YamlNode::as_seconds() const { return parse_seconds(as_string(), place()); }
BytesPerSecond YamlNode::as_byte_rate() const { return parse_byte_rate(as_string(), place()); }
FlopsPerSecond YamlNode::as_flop_rate() const { return parse_flop_rate(as_string(), place()); }

std::vector<std::int64_t> YamlNode::as_ints() const {
  std::vector<std::int64_t> all;
  for (const auto& item : items()) all.push_back(item.as_int());
  return all;
}

std::vector<std::string> YamlNode::as_strings() const {
  if (is_scalar()) return {as_string()};
  std::vector<std::string> all;
  for (const auto& item : items()) all.push_back(item.as_string());
  return all;
}

namespace {

/// 2 of "x2".
std::optional<double> factor_of(const std::string& value) {
  double factor = 0;
  if (value.size() < 2 || value[0] != 'x') return std::nullopt;
  const auto [end, error] = std::from_chars(value.data() + 1, value.data() + value.size(), factor);
  if (error != std::errc{} || end != value.data() + value.size()) return std::nullopt;
  return factor;
}

}  // namespace

bool multiplies(const std::string& value) { return factor_of(value).has_value(); }

std::string multiplied(const std::string& there, const std::string& value,
                       const std::string& place) {
  const auto factor = factor_of(value);
  if (!factor) return value;
  double number = 0;
  const auto [rest, bad] = std::from_chars(there.data(), there.data() + there.size(), number);
  if (bad != std::errc{})
    throw InputError(place, fmt::format("'{}' cannot be multiplied by {}", there, *factor));
  // 12 x 0.4 is 4.8, not 4.8 and a bit.
  return fmt::format("{:.15g}{}", number * *factor, std::string(rest, there.data() + there.size()));
}

namespace {

void set_at(YAML::Node node, std::string_view rest, const YamlEdit& edit, const std::string& file) {
  const auto here = [&] {
    std::vector<std::string> keys;
    if (node.IsMap()) {
      for (const auto& entry : node) keys.push_back(entry.first.as<std::string>());
    }
    return keys;
  };
  const auto fail = [&](std::string_view word) {
    const auto keys = here();
    throw InputError(
        edit.path,
        fmt::format("'{}' is not in {}{}; there: {}", word, file, did_you_mean(word, keys),
                    node.IsSequence() ? fmt::format("a list of {}", node.size())
                                      : fmt::format("{}", fmt::join(keys, ", "))));
  };
  if (rest.empty()) {
    YAML::Node target = node;
    if (node.IsMap() && node["value"].IsDefined()) target = node["value"];
    if (!target.IsScalar()) fail("value");
    target = multiplied(target.Scalar(), edit.value, edit.path);
    return;
  }
  if (rest[0] == '.') rest.remove_prefix(1);
  if (rest[0] == '[') {
    const auto close = rest.find(']');
    if (close == std::string_view::npos) throw InputError(edit.path, "a '[' without ']'");
    const std::string selector(rest.substr(1, close - 1));
    const std::string_view after = rest.substr(close + 1);
    if (!node.IsSequence()) fail(rest.substr(0, close + 1));
    bool any = false;
    for (std::size_t i = 0; i < node.size(); ++i) {
      const auto equals = selector.find('=');
      bool match = selector == "*" || selector == std::to_string(i);
      if (equals != std::string::npos && node[i].IsMap()) {
        const YAML::Node member = node[i][selector.substr(0, equals)];
        match = member.IsDefined() && member.IsScalar() &&
                member.Scalar() == selector.substr(equals + 1);
      }
      if (!match) continue;
      any = true;
      set_at(node[i], after, edit, file);
    }
    if (!any) fail(rest.substr(0, close + 1));
    return;
  }
  auto stop = rest.find_first_of(".[");
  // A range names vertices: "gpu[0-7]" is one key of its map.
  if (const auto dot = rest.find('.');
      node.IsMap() && stop != dot && node[std::string(rest.substr(0, dot))].IsDefined())
    stop = dot;
  const std::string key(rest.substr(0, stop));
  if (!node.IsMap()) fail(key);
  if (!node[key].IsDefined()) {
    // What the file leaves to its default; whoever reads it says what it does not know.
    if (stop != std::string_view::npos || multiplies(edit.value)) fail(key);
    node[key] = edit.value;
    return;
  }
  set_at(node[key], stop == std::string_view::npos ? std::string_view{} : rest.substr(stop), edit,
         file);
}

}  // namespace

std::string yaml_with(const std::string& body, const std::vector<YamlEdit>& edits,
                      const std::string& file) {
  if (edits.empty()) return body;
  YAML::Node root;
  try {
    root = YAML::Load(body);
  } catch (const YAML::Exception& e) {
    throw InputError(fmt::format("{}:{}", file, e.mark.line + 1), "is not YAML: " + e.msg);
  }
  for (const YamlEdit& edit : edits) set_at(root, edit.path, edit, file);
  return YAML::Dump(root);
}

std::string data_folder(std::string_view folder) {
  const char* chosen = std::getenv("PARTITA_DATA");
  const std::string root = chosen != nullptr && *chosen != '\0' ? chosen : PARTITA_SOURCE_FOLDER;
  return root + "/" + std::string(folder);
}

}  // namespace partita
