// cli/rows.h: `partita validate rows`, `partita validate published` and `partita fit`.
#pragma once

namespace CLI {
class App;
}

namespace partita::cli {

/// Adds both to `validate`; their callbacks set `code`.
void add_rows(CLI::App& validate, int& code);
void add_fit(CLI::App& app);

}  // namespace partita::cli
