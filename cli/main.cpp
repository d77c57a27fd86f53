// cli/main.cpp: the `partita` command: parses, connects, prints.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/yaml.h"
#include "cli/commands.h"
#include "cli/launch.h"
#include "runtime/transport/transport.h"

namespace partita::cli {
namespace {

/// Also where stderr cannot be written.
void complain(const std::string& text) { std::fputs(("partita: " + text + "\n").c_str(), stderr); }

/// Has all that was printed arrived? What is written late fails late.
int finished(int code) {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return code;
  complain("the output cannot be written; is the disk full, or the reader gone?");
  return 3;
}

std::vector<std::string> command_names(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* c : app.get_subcommands([](const CLI::App*) { return true; }))
    names.push_back(c->get_name());
  return names;
}

std::vector<std::string> flag_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* o : command.get_options()) {
    for (const auto& name : o->get_lnames()) names.push_back("--" + name);
  }
  return names;
}

/// "partita simulate MODEL TOPOLOGY"; `name`: with the command it is part of, if any.
std::string usage(const CLI::App& command, const std::string& name) {
  std::string s = "partita " + name;
  for (const CLI::Option* o : command.get_options()) {
    if (o->get_positional()) s += " " + o->get_name();
  }
  return s;
}

/// An empty value is a shell variable that was not set, never what is meant.
void refuse_empty_arguments(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i], before = i > 1 ? argv[i - 1] : "";
    const bool flag =
        word.size() > 3 && word.compare(0, 2, "--") == 0 && word.find('=') == word.size() - 1;
    if (!word.empty() && !flag) continue;
    const std::string place = flag                              ? word.substr(0, word.size() - 1)
                              : before.compare(0, 2, "--") == 0 ? before
                                                                : fmt::format("argument {}", i);
    throw InputError(place, "is empty; give a value or leave it out");
  }
}

/// The message of a wrong command line with place, value and remedy.
[[noreturn]] void refuse(const CLI::App& app, const CLI::ParseError& e, int argc, char** argv) {
  const auto chosen = app.get_subcommands();
  const std::vector<std::string> commands = command_names(app);
  if (chosen.empty()) {
    const std::string word = argc > 1 ? argv[1] : "";
    const std::string there = fmt::format("there are {}", fmt::join(commands, ", "));
    if (word.empty()) throw InputError("command", "is missing; " + there);
    throw InputError("command",
                     fmt::format("'{}' is none{}; {}", word, did_you_mean(word, commands), there));
  }
  // "validate rows" is a command of its own.
  const auto inner = chosen[0]->get_subcommands();
  const CLI::App& command = inner.empty() ? *chosen[0] : *inner[0];
  const std::string name =
      inner.empty() ? command.get_name() : chosen[0]->get_name() + " " + command.get_name();
  const std::string text = e.what();
  if (dynamic_cast<const CLI::ExtrasError*>(&e) != nullptr) {
    const std::vector<std::string> extra = app.remaining(true);
    std::string flag;
    for (const auto& word : extra) {
      if (flag.empty() && word.size() > 1 && word[0] == '-') flag = word.substr(0, word.find('='));
    }
    if (flag.empty()) {
      throw InputError(extra.empty() ? "arguments" : fmt::format("'{}'", extra[0]),
                       fmt::format("is one argument too many; write {}", usage(command, name)));
    }
    const std::string remedy = did_you_mean(flag, flag_names(command));
    throw InputError(flag, fmt::format("is no flag of partita {}{}; partita {} --help lists them",
                                       name, remedy, name));
  }
  if (dynamic_cast<const CLI::RequiredError*>(&e) != nullptr) {
    throw InputError(text.substr(0, text.find(' ')),
                     fmt::format("is missing; write {}", usage(command, name)));
  }
  const auto type_of = [&](const std::string& flag) -> std::string {
    const CLI::Option* o = command.get_option_no_throw(flag);
    const std::string type = o == nullptr ? "" : o->get_type_name();
    return type == "INT" ? "a whole number" : type == "FLOAT" ? "a number" : "a value";
  };
  if (dynamic_cast<const CLI::ConversionError*>(&e) != nullptr) {
    const std::string start = "Could not convert: ", equals = " = ";
    if (const auto at = text.find(equals);
        text.compare(0, start.size(), start) == 0 && at != std::string::npos) {
      const std::string flag = text.substr(start.size(), at - start.size());
      throw InputError(
          flag, fmt::format("'{}' is not {}", text.substr(at + equals.size()), type_of(flag)));
    }
  }
  if (dynamic_cast<const CLI::ArgumentMismatch*>(&e) != nullptr) {
    const std::string flag = text.substr(0, text.find(':'));
    const bool many = text.find("received") != std::string::npos;
    const CLI::Option* o = command.get_option_no_throw(flag);
    if (o != nullptr && o->get_items_expected_min() > 1)
      throw InputError(flag, fmt::format("takes {} values", o->get_items_expected_min()));
    throw InputError(flag, many ? "is given more than once; keep one" : "needs " + type_of(flag));
  }
  if (dynamic_cast<const CLI::ValidationError*>(&e) != nullptr) {
    // "--top: Value 0 not in range 1 to 64"
    const std::string value = ": Value ", range = " not in range ";
    const auto at = text.find(value), then = text.find(range);
    if (at != std::string::npos && then != std::string::npos) {
      const std::string given = text.substr(at + value.size(), then - at - value.size());
      const std::string of = text.substr(then + range.size());
      // What is only at least 0 goes to the largest double.
      throw InputError(text.substr(0, at), of.size() > 60
                                               ? fmt::format("{} is negative; at least 0", given)
                                               : fmt::format("{} is not in {}", given, of));
    }
  }
  throw InputError("partita " + name, text);
}

}  // namespace
}  // namespace partita::cli

int main(int argc, char** argv) {
  using namespace partita;
  cli::end_with_starter();
  CLI::App app{
      "Plans and predicts distributed training of neural networks, and checks its own answers."};
  app.require_subcommand(1);
  app.set_version_flag("--version", "partita 0.1.0");
  app.footer(
      "MODEL: a catalogue name, a Hugging Face config.json, .yaml or .onnx.\n"
      "TOPOLOGY: a catalogue name with :nodes (dgx-h100:8), .yaml, NCCL .xml or nvidia-smi topo -m "
      "output.\n"
      "Exit codes: 0 done; 1 nothing fits or a bound is missed; 2 your input; 3 the machine, a "
      "rank that "
      "died, or a bug of ours.");
  int code = 0;
  try {
    cli::add_commands(app, code);  // reads the profiles' names for its help
    cli::refuse_empty_arguments(argc, argv);
    try {
      app.parse(argc, argv);
    } catch (const CLI::Success& e) {  // --help, --version
      return cli::finished(app.exit(e));
    } catch (const CLI::ParseError& e) {
      cli::refuse(app, e, argc, argv);
    }
  } catch (const InputError& e) {
    cli::complain(e.what());
    return 2;
  } catch (const ToldElsewhere& e) {
    return e.code;
  } catch (const PeerError& e) {
    cli::complain(e.what());
    return 3;
  } catch (const MachineError& e) {
    cli::complain(e.what());
    return 3;
  } catch (const std::bad_alloc&) {
    cli::complain("out of memory");
    return 3;
  } catch (const std::exception& e) {
    if (std::ferror(stdout) != 0) return cli::finished(3);
    cli::complain(
        fmt::format("{}\nThis is a bug of Partita; please report it with the command.", e.what()));
    return 3;
  }
  return cli::finished(code);
}
