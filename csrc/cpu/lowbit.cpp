// Entries with coded states: a few blocks are decoded into L1, updated by the ordinary sweep as the fp32 states they stand for, and encoded again.
// Bytes per fp32 parameter of 8-bit Adam: reads p, g (8) and two codes (2), writes p (4) and two codes (2): 16 of fp32 Adam's 28.
#include "lowbit.h"

#include <algorithm>

#include "optim.h"

namespace fa::cpu {
namespace {

constexpr int kRun = 1024;  // elements decoded at a time, unless a block is longer

bool coded(int dtype) { return dtype == kD8S || dtype == kD8U || dtype == kF8X; }

// Whether the mask lets anything in elements [first, first + n) change; first is a multiple of 32.
bool any_trainable(const uint32_t* mask, int64_t first, int n) {
  uint32_t any = 0;
  for (int i = 0; i < n; i += 32) any |= mask[(first + i) / 32] & (n - i < 32 ? (1u << (n - i)) - 1u : ~0u);
  return any != 0;
}

class Run {
 public:
  Run(const Kernels& kernels, const Piece& piece, int states, int stored)
      : kernels_(kernels),
        codec_(*kernels.codec),
        from_(*piece.tensor),
        entry_(from_),
        mask_(from_.index ? nullptr : from_.mask),
        piece_(piece),
        states_(states),
        stored_(stored) {
    piece_.tensor = &entry_;
    for (int k = 0; k < states; ++k)
      if (coded(from_.state_dtype[k])) entry_.state_dtype[k] = kF32;
  }

  void update(UpdateFn function, int64_t first, int n) {
    if (mask_ && !any_trainable(mask_, first, n)) return;
    for (int k = 0; k < states_; ++k) {
      if (!coded(from_.state_dtype[k])) continue;
      // The sweep adds its own offset to the address of element 0.
      entry_.state[k] = reinterpret_cast<void*>(uintptr_t(scratch_[k]) - uintptr_t(first) * sizeof(float));
      each_block(k, first, n, [&](uint8_t* codes, float* scale, int count, float* values, int64_t) {
        codec_.decode(from_.state_dtype[k], codes, scale, count, values);
      });
    }
    piece_.begin = first;
    piece_.end = first + n;
    from_.index ? update_compact(kernels_, function, piece_) : function(piece_);
    for (int k = 0; k < stored_; ++k) {
      if (!coded(from_.state_dtype[k])) continue;
      each_block(k, first, n, [&](uint8_t* codes, float* scale, int count, float* values, int64_t at) {
        if (!mask_ || any_trainable(mask_, at, count)) codec_.encode(from_.state_dtype[k], values, count, codes, scale);
      });
    }
  }

 private:
  template <class Function>
  void each_block(int k, int64_t first, int n, Function f) {
    const int block = 1 << from_.block_log2;
    const int64_t wide = from_.state_dtype[k] == kF8X ? 2 : 1;
    for (int i = 0; i < n; i += block) {
      const int64_t at = first + i;
      f(static_cast<uint8_t*>(from_.state[k]) + at, from_.scale[k] + (at >> from_.block_log2) * wide, std::min(block, n - i),
        scratch_[k] + i, at);
    }
  }

  const Kernels& kernels_;
  const Codec& codec_;
  const TensorDesc& from_;
  TensorDesc entry_;
  const uint32_t* mask_;  // of frozen elements; the bits of a compact entry are its index
  Piece piece_;
  const int states_, stored_;
  alignas(64) float scratch_[kMaxStates][kLargestBlock + kBlockPad];
};

struct Levels {
  float level[128];
  Levels() {
    for (uint32_t c = 0; c < 128; ++c) level[c] = level_of(c);
  }
};

}  // namespace

// Here and not beside its users: what runs when the library is loaded may not use their instruction sets.
const float* levels() {
  static const Levels made;
  return made.level;
}

void update_coded(const Kernels& kernels, int rule, int states, int stored, const Piece& piece) {
  Run run(kernels, piece, states, stored);
  const int64_t length = std::max(kRun, 1 << piece.tensor->block_log2);
  for (int64_t first = piece.begin; first < piece.end; first += length)
    run.update(kernels.update[rule], first, int(std::min<int64_t>(length, piece.end - first)));
}

}  // namespace fa::cpu
