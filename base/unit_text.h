// base/unit_text.h: quantities in text. "450 GB/s", "1.5 us", "80 GiB", "989.4 TFLOP/s".
//
// A number without a unit is an error. Decimal prefixes (k, M, G, T, P) are powers of 1000,
// binary ones (Ki, Mi, Gi, Ti) of 1024; "b" is a bit: "400 Gb/s" is 50 GB/s.
#pragma once

#include <string>
#include <string_view>

#include "base/units.h"

namespace partita {

/// Each throws InputError{place, ...} that names the text and the units accepted. Times and sizes
/// must be finite and >= 0; rates must be > 0.
Bytes parse_bytes(std::string_view text, const std::string& place);
Seconds parse_seconds(std::string_view text, const std::string& place);
BytesPerSecond parse_byte_rate(std::string_view text, const std::string& place);
FlopsPerSecond parse_flop_rate(std::string_view text, const std::string& place);

/// For people: three or four significant digits and a unit that suits the size.
std::string text(Bytes n);           ///< binary prefixes: "79.6 GiB"
std::string text(Seconds t);         ///< "1.234 ms"
std::string text(BytesPerSecond r);  ///< "450 GB/s"
std::string text(FlopsPerSecond r);  ///< "989 TFLOP/s"
std::string text(Flops n);           ///< "1.23 TFLOP"

/// For files: text that parses back to exactly the same quantity.
std::string exact_text(Bytes n);
std::string exact_text(Seconds t);
std::string exact_text(BytesPerSecond r);
std::string exact_text(FlopsPerSecond r);

/// "1,234,567": whole numbers as people read them.
std::string grouped(long long n);

}  // namespace partita
