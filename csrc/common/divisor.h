// Division by a number that the host knows and the compiler does not: a multiplication and a shift,
// where the card would take some 25 instructions.
#pragma once

#include <bit>
#include <cstdint>

namespace gemma4 {

// Divides 0 .. 2³¹ - 1 by 1 .. 2³¹ - 1, as indices.cuh does it. With 2^s >= divisor and magic =
// ⌈2^(31 + s) / divisor⌉, n magic is too large by less than n / 2^(31 + s) of the divisor, which
// lifts no quotient.
struct Divisor {
  int divisor = 0;  // 0: none, and nothing may be divided by it
  uint32_t magic = 0;
  int shift = 0;

  constexpr Divisor() = default;
  constexpr explicit Divisor(int by) : divisor(by) {
    if (by == 0) return;
    shift = 31 + std::bit_width(static_cast<unsigned>(by - 1));
    magic = static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by);
  }
};

}  // namespace gemma4
