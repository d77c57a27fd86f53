#include "runtime/cuda/kernel_trace.h"

#include <cxxabi.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>

namespace partita::cuda {
namespace {

std::string in_json(const std::string& text) {
  std::string s;
  for (const char c : text) {
    if (c == '"' || c == '\\') s.push_back('\\');
    s.push_back(static_cast<unsigned char>(c) < 0x20 ? ' ' : c);
  }
  return s;
}

}  // namespace

std::string short_name(const std::string& mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> plain(
      abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status), std::free);
  if (status != 0 || plain == nullptr) return mangled;
  // "void a::(anonymous namespace)::name<...>(...)": what stands outside all brackets.
  std::string text = plain.get(), outside;
  for (std::size_t at = text.find("(anonymous namespace)"); at != std::string::npos;
       at = text.find("(anonymous namespace)"))
    text.erase(at, 21);
  int depth = 0;
  for (const char c : text) {
    if (c == '<' || c == '(') ++depth;
    if (depth == 0) outside.push_back(c);
    if (c == '>' || c == ')') --depth;
  }
  outside.erase(outside.find_last_not_of(' ') + 1);
  const std::size_t word = outside.find_last_of(" :");
  return word == std::string::npos ? outside : outside.substr(word + 1);
}

std::map<std::string, TracedTime> by_caller(const std::vector<KernelRecord>& records) {
  std::map<std::string, TracedTime> all;
  for (const KernelRecord& r : records) {
    TracedTime& t = all[r.called_for.empty() ? short_name(r.name) : r.called_for];
    if (t.count == 0) t.first = r.start, t.last = r.end;
    ++t.count;
    t.nanoseconds += r.end - r.start;
    t.first = std::min(t.first, r.start);
    t.last = std::max(t.last, r.end);
  }
  return all;
}

std::string chrome_trace(const std::vector<KernelRecord>& records) {
  std::int64_t first = std::numeric_limits<std::int64_t>::max();
  for (const KernelRecord& r : records) first = std::min(first, r.start);
  std::string s = "{\"traceEvents\": [";
  for (std::size_t k = 0; k < records.size(); ++k) {
    const KernelRecord& r = records[k];
    s += fmt::format(
        "{}\n{{\"name\": \"{}\", \"ph\": \"X\", \"pid\": 0, \"tid\": {}, \"ts\": {:.3f}, \"dur\": "
        "{:.3f}, \"args\": {{\"called for\": \"{}\", \"kernel\": \"{}\"}}}}",
        k > 0 ? "," : "", in_json(short_name(r.name)), r.stream,
        static_cast<double>(r.start - first) * 1e-3, static_cast<double>(r.end - r.start) * 1e-3,
        in_json(r.called_for), in_json(r.name));
  }
  return s + "\n], \"displayTimeUnit\": \"ns\"}\n";
}

}  // namespace partita::cuda
