// CPU sweep, interface between the instruction-set specific part (optim_isa.cpp, compiled once per set) and the rest.
#pragma once
#include <cstdint>

#include "../core/table.h"

namespace fa::cpu {

// Updates elements [begin, end) of one tensor. `clip` and `scale` are values by now (1 when absent).
struct Piece {
  const TensorDesc* tensor;
  const Row* row;
  int64_t begin, end;
  float scale, clip;
  uint64_t seed;
  bool stochastic;
};
using UpdateFn = void (*)(const Piece&);
// Elements [begin, end) of a gradient; no tensor: none.
struct GradSpan {
  const TensorDesc* tensor = nullptr;
  int64_t begin = 0, end = 0;
};
// Sums of squares of (gradient / scale) over `count` of kStreams spans, in double, each in a fixed order that does not depend on the others.
// `following`: what the next call will read; tensor null: nothing.
constexpr int kStreams = 4;
using SquaresFn = void (*)(const GradSpan* spans, const GradSpan* following, int count, float scale, double* out);

// Positions of the set bits of a word that starts at `base`, in order; returns how many. `out` has room for 72.
using PositionsFn = int (*)(uint64_t word, int64_t base, int64_t* out);
// The elements of `from` (2 or 4 bytes each) whose bits are set in `count` words of a mask, side by side, and back to their places, where nothing else is
// written. The first `whole` words stand for 64 elements that exist. `packed` has room for kPackedSlack elements more. Null where a loop over positions
// does as well.
struct WordsFns {
  void (*pick)(const uint64_t* words, int count, int whole, const void* from, int size, void* packed);
  void (*put)(const uint64_t* words, int count, void* to, int size, const void* packed);
};
constexpr int kPackedSlack = 16;

struct Codec;

struct Kernels {
  const char* name;
  const UpdateFn* update;  // [rule]
  SquaresFn squares;
  const Codec* codec;
  const PositionsFn* positions;
  const WordsFns* words;
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif
// A piece of a compact entry: its elements gathered block by block, updated by the ordinary `update`, scattered back.
void update_compact(const Kernels& kernels, UpdateFn update, const Piece& piece);
// A piece of an entry with coded states (lowbit.h): decoded run by run, updated, encoded.
void update_coded(const Kernels& kernels, int rule, int states, int stored, const Piece& piece);
const Kernels& kernels();                  // the best set this processor has, or the one chosen by use_isa
bool has_bf16();                          // whether the processor has AVX512_BF16
bool use_isa(const char* name);            // "base", "avx2", "avx512"; false when this processor or build lacks it

}  // namespace fa::cpu
