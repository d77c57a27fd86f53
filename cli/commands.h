// cli/commands.h: one function per command; each registers its flags and what runs.
#pragma once

namespace CLI {
class App;
}

namespace partita::cli {

/// Adds model, topo, collective, simulate, plan, whatif, reference and run; their callbacks set
/// `code`.
void add_commands(CLI::App& app, int& code);

void add_collective(CLI::App& app);
void add_compare(CLI::App& app);
void add_replay(CLI::App& app);
void add_reference(CLI::App& app, int& code);
void add_startup(CLI::App& app, int& code);
void add_whatif(CLI::App& app, int& code);
void add_run(CLI::App& app, int& code);
/// calibrate and validate.
void add_validate(CLI::App& app, int& code);

}  // namespace partita::cli
