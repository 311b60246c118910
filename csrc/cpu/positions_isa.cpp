// Positions of the set bits of a mask. Compiled once per instruction set for its count of bits: without the instruction that is a call.
#include "optim.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

// Where the set bits of a byte are, and how many; the rest is 0.
struct Bytes {
  uint8_t at[256][8] = {}, n[256] = {};
  constexpr Bytes() {
    for (int b = 0; b < 256; ++b)
      for (int k = 0; k < 8; ++k)
        if (b >> k & 1) at[b][n[b]++] = uint8_t(k);
  }
};
constexpr Bytes kBytes;

// Sparse words bit by bit, in steps: some more positions than there are are written, since a loop over the very number of bits mispredicts its end in
// every word (10 % of 33 M: 3 of 12 ms). Dense ones byte by byte.
int positions(uint64_t word, int64_t base, int64_t* out) {
  const int n = __builtin_popcountll(word);
  if (n > 16) {
    for (int b = 0; b < 8; ++b, base += 8) {
      const int byte = int(word >> 8 * b & 255);
      for (int k = 0; k < 8; ++k) out[k] = base + kBytes.at[byte][k];
      out += kBytes.n[byte];
    }
    return n;
  }
  const auto some = [&](int from, int to) {
    for (int j = from; j < to; ++j, word &= word - 1) out[j] = base + __builtin_ctzll(word | uint64_t(1) << 63);
  };
  some(0, 4);
  if (n > 4) some(4, 8);
  if (n > 8) some(8, 16);
  return n;
}

}  // namespace

extern const PositionsFn FA_CAT(positions_, FA_ISA);
const PositionsFn FA_CAT(positions_, FA_ISA) = positions;

}  // namespace fa::cpu
