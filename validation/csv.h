// validation/csv.h: tables of comma-separated values (RFC 4180).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace partita::validation {

struct CsvTable {
  struct Record {
    int line = 0;  ///< where it starts, from 1
    std::vector<std::string> fields;
  };
  std::string file;  ///< for messages
  std::vector<std::string> header;
  std::vector<Record> records;
};

/// Fields may be quoted; inside quotes commas and line ends are text and "" is one quote. Lines end
/// with LF or CRLF, the last may not end. A byte order mark and empty lines are skipped. InputError
/// with file and line: no header, a name twice in it, a record with more or fewer fields than it, a
/// quote that does not close or stands inside an unquoted field, text behind a closing quote.
CsvTable parse_csv(std::string_view text, const std::string& file);

}  // namespace partita::validation
