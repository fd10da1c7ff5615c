// Philox4x32-10: word 0 of ten rounds at counter (index, step, stream, 0) under the key of a task's
// seed.
//
//   integer in [0, upper) = mulhi(word, upper)        float in [0, 1) = (word >> 8) * 2^-24
//
// The twin of fastmeta/rng.py; tests/test_csrc.py compares the two. Salmon et al., SC 2011.
#pragma once

#include "scalar.h"

namespace fastmeta {

enum Stream : uint32_t { kPoints = 0, kJitter = 1 };

FM_HOST_DEVICE uint32_t mulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

FM_HOST_DEVICE uint32_t philox(int64_t seed, uint32_t index, uint32_t step, uint32_t stream) {
  uint32_t k0 = static_cast<uint32_t>(seed),
           k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  uint32_t c0 = index, c1 = step, c2 = stream, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = mulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = mulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

FM_HOST_DEVICE uint32_t draw_integer(int64_t seed, uint32_t index, uint32_t step, Stream stream,
                                     uint32_t upper) {
  return mulhi(philox(seed, index, step, stream), upper);
}

FM_HOST_DEVICE float draw_uniform(int64_t seed, uint32_t index, uint32_t step, Stream stream) {
  return static_cast<float>(philox(seed, index, step, stream) >> 8) * 0x1p-24f;
}

}  // namespace fastmeta
