// base/error.h: four failures, four mechanisms.
//
//   the user's input     throw InputError: place, value, remedy      exit code 2
//   a plan that can't run    return Infeasible: a value, normal in search
//   the machine          throw MachineError: a full disk, no memory   exit code 3
//   our own bug          PARTITA_ASSERT, on in every build            exit code 3
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>

namespace partita {

/// The user's file, flag or plan is wrong. `place` is where ("plan.yaml:7: stages.cuts", "--tp"),
/// `message` states the rule, the value found and what to do about it.
class InputError : public std::runtime_error {
 public:
  InputError(std::string place, std::string message)
      : std::runtime_error(place.empty() ? message : place + ": " + message),
        place_(std::move(place)),
        message_(std::move(message)) {}
  const std::string& place() const { return place_; }
  const std::string& message() const { return message_; }

 private:
  std::string place_;
  std::string message_;
};

/// The machine gives out: its disk is full, its memory used up. `what()` says where, and what to
/// do.
class MachineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A broken invariant of ours. Never caught except to print it and end with exit code 3.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

/// Why a plan cannot run: the rule, the operator or axis that breaks it, the legal choices.
struct Infeasible {
  std::string reason;
};

/// A value, or the reason why there is none.
template <class T>
class Feasible {
 public:
  Feasible(T value) : state_(std::move(value)) {}       // NOLINT: implicit by design
  Feasible(Infeasible why) : state_(std::move(why)) {}  // NOLINT: implicit by design
  explicit operator bool() const { return std::holds_alternative<T>(state_); }
  T& operator*() { return value(); }
  const T& operator*() const { return const_cast<Feasible*>(this)->value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &const_cast<Feasible*>(this)->value(); }
  const std::string& reason() const { return std::get<Infeasible>(state_).reason; }
  Infeasible why() const { return std::get<Infeasible>(state_); }

 private:
  T& value() {
    if (auto* v = std::get_if<T>(&state_)) return *v;
    throw InternalError("value of an infeasible result used: " + reason());
  }
  std::variant<T, Infeasible> state_;
};

/// Throws InternalError with file, line, the condition's text and `detail`.
[[noreturn]] void assertion_failed(const char* file, int line, const char* condition,
                                   const std::string& detail);

}  // namespace partita

/// Always-on check of our own invariant; `detail` is a std::string with the operands.
#define PARTITA_ASSERT(condition, detail)                                                    \
  do {                                                                                       \
    if (!(condition)) ::partita::assertion_failed(__FILE__, __LINE__, #condition, (detail)); \
  } while (false)
