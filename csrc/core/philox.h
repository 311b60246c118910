// Philox4x32-10 (Salmon et al., SC 2011): random bits as a pure function of (seed, step, tensor, element).
#pragma once
#include <cstdint>

#include "macros.h"

namespace fa {

struct Philox4 {
  uint32_t v[4];
};

FA_HD Philox4 philox(uint64_t seed, uint64_t block, uint32_t tensor, uint32_t step) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = tensor, c3 = step;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c1 = uint32_t(b);
    c3 = uint32_t(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 16 random bits of one element: eight elements share a Philox block.
FA_HD uint32_t random16(uint64_t seed, uint64_t element, uint32_t tensor, uint32_t step) {
  const Philox4 r = philox(seed, element >> 3, tensor, step);
  return r.v[(element >> 1) & 3] >> (element & 1 ? 16 : 0) & 0xffffu;
}

}  // namespace fa
