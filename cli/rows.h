// cli/rows.h: `partita validate rows`, `partita validate published` and `partita fit`.
#pragma once

#include <string>
#include <vector>

#include "validation/csv.h"

namespace CLI {
class App;
}

namespace partita::cli {

/// Adds both to `validate`; their callbacks set `code`.
void add_rows(CLI::App& validate, int& code);
void add_fit(CLI::App& app);

/// The published tables of a folder, or one file; "": of the folder where they usually are.
/// InputError{"--data"}.
std::vector<validation::CsvTable> tables_of(const std::string& data);

}  // namespace partita::cli
