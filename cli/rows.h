// cli/rows.h: `partita validate rows` and `partita validate published`.
#pragma once

namespace CLI {
class App;
}

namespace partita::cli {

/// Adds both to `validate`; their callbacks set `code`.
void add_rows(CLI::App& validate, int& code);

}  // namespace partita::cli
