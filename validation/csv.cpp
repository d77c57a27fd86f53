#include "validation/csv.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace partita::validation {
namespace {

class Reader {
 public:
  Reader(std::string_view text, const std::string& file) : text_(text), file_(file) {}

  bool more() {
    while (at_ < text_.size() && line_end() > 0) skip_line_end();
    return at_ < text_.size();
  }

  CsvTable::Record record() {
    CsvTable::Record r;
    r.line = line_;
    for (;;) {
      r.fields.push_back(at_ < text_.size() && text_[at_] == '"' ? quoted() : plain());
      if (at_ == text_.size()) return r;
      if (line_end() > 0) {
        skip_line_end();
        return r;
      }
      ++at_;  // the comma
    }
  }

  [[noreturn]] void fail(int line, const std::string& what) const {
    throw InputError(fmt::format("{}:{}", file_, line), what);
  }

 private:
  std::size_t line_end() const {
    if (text_[at_] == '\n') return 1;
    return text_.substr(at_, 2) == "\r\n" ? 2 : 0;
  }
  void skip_line_end() {
    at_ += line_end();
    ++line_;
  }

  std::string plain() {
    const std::size_t start = at_;
    while (at_ < text_.size() && text_[at_] != ',' && line_end() == 0) {
      if (text_[at_] == '"')
        fail(line_, "a quote inside a field without quotes; quote the field and double the quote");
      ++at_;
    }
    return std::string(text_.substr(start, at_ - start));
  }

  std::string quoted() {
    const int first = line_;
    std::string field;
    for (++at_; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '\n') ++line_;
      if (c != '"') {
        field += c;
        continue;
      }
      if (++at_ < text_.size() && text_[at_] == '"') {
        field += '"';
        continue;
      }
      if (at_ < text_.size() && text_[at_] != ',' && line_end() == 0)
        fail(line_, fmt::format("'{}' behind a closing quote; a comma or the line's end follows",
                                text_[at_]));
      return field;
    }
    fail(first, "a quoted field does not end; close it with a quote");
  }

  std::string_view text_;
  const std::string& file_;
  std::size_t at_ = 0;
  int line_ = 1;
};

}  // namespace

CsvTable parse_csv(std::string_view text, const std::string& file) {
  constexpr std::string_view kMark = "\xEF\xBB\xBF";
  if (text.substr(0, kMark.size()) == kMark) text.remove_prefix(kMark.size());
  if (text.starts_with("\xFF\xFE") || text.starts_with("\xFE\xFF"))
    throw InputError(file, "is UTF-16; save it as UTF-8");
  CsvTable table;
  table.file = file;
  Reader reader(text, file);
  if (!reader.more()) throw InputError(file, "is empty; a table starts with its column names");
  CsvTable::Record header = reader.record();
  table.header = std::move(header.fields);
  if (table.header.size() == 1)
    for (const auto& [separator, name] : {std::pair(';', "semicolons"), std::pair('\t', "tabs")})
      if (table.header[0].find(separator) != std::string::npos)
        reader.fail(header.line,
                    fmt::format("columns are separated by {}; save it with commas", name));
  auto sorted = table.header;
  std::sort(sorted.begin(), sorted.end());
  if (const auto twice = std::adjacent_find(sorted.begin(), sorted.end()); twice != sorted.end())
    reader.fail(header.line, fmt::format("column '{}' is named twice", *twice));
  while (reader.more()) {
    CsvTable::Record r = reader.record();
    if (r.fields.size() != table.header.size())
      reader.fail(r.line, fmt::format("{} fields, but {} columns; a comma inside a field needs "
                                      "quotes around the field",
                                      r.fields.size(), table.header.size()));
    table.records.push_back(std::move(r));
  }
  return table;
}

}  // namespace partita::validation
