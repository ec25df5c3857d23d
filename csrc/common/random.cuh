// Random numbers that are a function of a seed and a counter, the same on every machine.
#pragma once

#include <cmath>

#include "platform.h"

namespace gemma4 {

struct RandomWords {
  uint32_t word[4];
};

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3").
DEVICE RandomWords philox(uint64_t seed, uint32_t low, uint64_t high) {
  uint32_t a = low, b = static_cast<uint32_t>(high), c = static_cast<uint32_t>(high >> 32), d = 0;
  uint32_t key = static_cast<uint32_t>(seed), other_key = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t x = uint64_t{0xd2511f53u} * a, y = uint64_t{0xcd9e8d57u} * c;
    a = static_cast<uint32_t>(y >> 32) ^ b ^ key;
    b = static_cast<uint32_t>(y);
    c = static_cast<uint32_t>(x >> 32) ^ d ^ other_key;
    d = static_cast<uint32_t>(x);
    key += 0x9e3779b9u;
    other_key += 0xbb67ae85u;
  }
  return {{a, b, c, d}};
}

// word[i]; indexed by a variable the words would lie in local memory.
DEVICE uint32_t word_of(const RandomWords& words, int i) {
  const uint32_t low = i == 0 ? words.word[0] : words.word[1];
  const uint32_t high = i == 2 ? words.word[2] : words.word[3];
  return i < 2 ? low : high;
}

// -log(e) of an exponential e: the argmax of x + gumbel draws from softmax(x). The uniform number
// is finest near 0, where the largest results come from.
DEVICE float gumbel(uint32_t bits) {
  const float uniform = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  return -logf(-log1pf(-uniform));
}

}  // namespace gemma4
