// Quantized activations on a CPU (equations: fusedadapt/reference/quant_act.py): codes and scales of x in one pass, and the int8 product
//   y[t, n] = (sum_k x[t, k] w[n, k]) * w_scale[n] * x_scale[t] + bias[n]
// with exact int32 sums over at most kChunk columns, added up in fp32 beyond. Both operands are row-major with k innermost: no packing, from one
// token to thousands.
#pragma once
#include <cstdint>

namespace fa::cpu::quant_act {

enum Codes : int { kInt8 = 0, kE4M3 = 1 };

// x: rows x columns, `stride` elements apart, unit step inside a row; a group is `block` neighbours of a row, the last one may be short.
struct Activations {
  const void* x;
  int dtype;
  int64_t rows, columns, stride, block;
  int codes;
  uint8_t* q;  // rows x columns
  float* scale;  // rows x ceil(columns / block)
};

// 127 * 128 * kChunk < 2^31: exact even for weights that hold the code -128.
constexpr int64_t kChunk = 1 << 17;

struct Int8Product {
  const int8_t *x, *w;  // t x k, n x k
  const float *x_scale, *w_scale, *bias;  // t, n, n; bias may be null
  void* y;  // t x n
  int dtype;
  int64_t t, n, k;
};

// A piece of y that one thread computes at a time. kDepth columns of its rows of w stay in L2 for all its tokens, those of four rows of x in L1.
constexpr int64_t kTokens = 48, kOutputs = 64, kDepth = 3072;

struct Kernels {
  const char* name;
  void (*quantize)(const Activations&, int64_t first, int64_t last);  // rows
  void (*product)(const Int8Product&, int64_t t0, int64_t t1, int64_t n0, int64_t n1);  // at most kTokens x kOutputs
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512, kernels_vnni;
#endif
const Kernels& kernels();  // of the set that cpu::kernels() chose; vnni: avx512 on a processor that has it

void quantize(const Activations&, int threads);
void product(const Int8Product&, int threads);

}  // namespace fa::cpu::quant_act
