// Products with low-bit weights on a GPU, as the bindings see them (equation and formats: fusedadapt/reference/quant.py). No CUDA types: g++
// compiles the bindings. All pointers are device pointers; a launch is asynchronous; what CUDA refuses is thrown as std::runtime_error.
#pragma once
#include <cstdint>

#include "optim.h"

namespace fa::cuda {

// What a code is worth: the code as an integer plus `first`; an entry of `values`; the small floats of 8 bits by arithmetic.
enum Value : int32_t { kCounted = 0, kLookedUp, kE4M3, kE5M2 };
// Scales: fp32, fp16 or bf16; E8M0; E4M3 times *above; dynamic[byte] * above[g / 256] + *offset; E8M0 times above[g / wide], the row's number.
enum ScaleCoding : int32_t { kStored = 0, kPower, kSmallFloat, kNestedScale, kRowPower };

struct QuantWeight {
  const uint8_t* codes;
  const float* values;  // 2^bits, whatever `value` is
  const void* scale;
  const float* dynamic;
  const float* above;
  const float* offset;
  const void* zero;  // of zero_dtype: kU8, kF32; kNone: absent
  int64_t n, k, row_bytes;
  int64_t rows, columns, wide;  // sides of a group, groups side by side
  int32_t bits;  // of a code, 1 to 8
  int32_t value, coding, scale_dtype, zero_dtype;
  float first;
  uint32_t flip;  // 0x80808080: codes are two's complement of 8 bits, and `first` is -128
  bool flat;  // groups run on from row to row, and of two 4-bit codes in a byte the first one is the high one
};

constexpr int kMostTokens = 8;

// y = x W^T + bias. x: t rows, `stride` elements apart; y: contiguous, of x's dtype; bias may be absent.
struct QuantProduct {
  const void* x;
  const void* bias;
  void* y;
  int64_t t, stride;  // 0 < t <= kMostTokens
  int32_t dtype, bias_dtype;
};

// Sums in fp32 in an order that the shapes alone decide.
void gemv(const QuantWeight& w, const QuantProduct& p, Place place);

}  // namespace fa::cuda
