// cli/main.cpp: the `partita` command: parses, connects, prints.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "base/error.h"
#include "cli/commands.h"

int main(int argc, char** argv) {
  using namespace partita;
  CLI::App app{
      "Plans and predicts distributed training of neural networks, and checks its own answers."};
  app.require_subcommand(1);
  app.set_version_flag("--version", "partita 0.1.0");
  app.footer(
      "MODEL: a catalogue name, a Hugging Face config.json, .yaml or .onnx.\n"
      "TOPOLOGY: a catalogue name with :nodes (dgx-h100:8), .yaml, NCCL .xml or nvidia-smi topo -m "
      "output.\n"
      "Exit codes: 0 done; 1 nothing fits or a bound is missed; 2 your input; 3 a bug of ours.");
  int code = 0;
  cli::add_commands(app, code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForAllHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForVersion& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    fmt::print(stderr, "partita: {}\nTry partita --help or partita COMMAND --help.\n", e.what());
    return 2;
  } catch (const InputError& e) {
    fmt::print(stderr, "partita: {}\n", e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "partita: out of memory\n");
    return 3;
  } catch (const std::exception& e) {
    fmt::print(stderr,
               "partita: {}\nThis is a bug of Partita; please report it with the command.\n",
               e.what());
    return 3;
  }
  return code;
}
