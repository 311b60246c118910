// Positions of the set bits of a mask. Compiled once per instruction set for its count of bits: without the instruction that is a call.
#include "optim.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

// Some positions more than there are are written, in steps: a loop over the very number of bits mispredicts its end in every word (3 of 12 ms, 10 %
// of 33 M).
int positions(uint64_t word, int64_t base, int64_t* out) {
  const int n = __builtin_popcountll(word);
  const auto some = [&](int from, int to) {
    for (int j = from; j < to; ++j, word &= word - 1) out[j] = base + __builtin_ctzll(word | uint64_t(1) << 63);
  };
  some(0, 4);
  if (n > 4) some(4, 8);
  if (n > 8) some(8, 16);
  if (n > 16) some(16, n);
  return n;
}

}  // namespace

extern const PositionsFn FA_CAT(positions_, FA_ISA);
const PositionsFn FA_CAT(positions_, FA_ISA) = positions;

}  // namespace fa::cpu
