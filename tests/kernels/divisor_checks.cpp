// Divisor beside the compiler's own division: every small divisor, those around powers of two and
// the largest, by the quotients' edges of the whole range.
#define GEMMA4_EMULATION divisor_checks
#include "common/indices.cuh"

#include <cstdio>

int main() {
  constexpr int64_t kLargest = INT32_MAX;
  int64_t wrong = 0, tried = 0;
  const auto check = [&](int64_t divisor) {
    const gemma4::Divisor by(static_cast<int>(divisor));
    const auto divide = [&](int64_t n) {
      if (n < 0 || n > kLargest) return;
      const int x = static_cast<int>(n), d = static_cast<int>(divisor);
      tried++;
      wrong += x / by != x / d || x % by != x % d;
    };
    for (int64_t n = 0; n < 500; n++) divide(n), divide(kLargest - n);
    const int64_t most = kLargest / divisor;
    for (int64_t k = 1; k <= most && k < 500; k++)
      for (int64_t quotient : {k, most - k + 1})
        for (int64_t off : {-1, 0, 1}) divide(quotient * divisor + off);
  };
  for (int64_t divisor = 1; divisor < 4000; divisor++) check(divisor);
  for (int64_t power = 1; power <= kLargest; power *= 2)
    for (int64_t off = -3; off <= 3; off++)
      if (power + off > 0 && power + off <= kLargest) check(power + off);
  check(kLargest);
  check(1431655765);
  std::printf("%lld wrong of %lld\n", static_cast<long long>(wrong), static_cast<long long>(tried));
  return wrong != 0;
}
