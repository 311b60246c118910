// Fake quantization on a CPU: interface between the instruction-set specific part (fake_quant_isa.cpp), the host side and the bindings.
// The truth is fusedadapt/reference/fake_quant.py.
#pragma once
#include <cstdint>

namespace fa::cpu {

enum Inside : int32_t { kClamp, kRound, kIdentity };  // which elements a gradient passes

constexpr int kFakeColumns = 512;  // columns worked on at a time
constexpr int64_t kFakePiece = 1 << 14;  // elements of a run handed out at a time: every sum is of one piece
constexpr int64_t kFakeRows = 256;  // the same where runs are short and their numbers change from column to column

// x is cut into lines, every line into runs; run r takes number r % groups of each array.
struct FakeQuant {
  const void* x;
  int64_t n, line, run, groups;
  const float *scale, *zero, *offset, *low, *high;  // zero, offset null: 0; low, high null: quant_min, quant_max
  int64_t zero_step, offset_step, bound_step;  // 1, or 0 where one number serves every group
  float quant_min, quant_max;
  int32_t dtype, inside;
  bool divide;

  int64_t runs_per_line() const { return (line + run - 1) / run; }
  int64_t runs() const { return n / line * runs_per_line(); }
};

struct FakeSums {
  double scale, outside;  // sums of dy (q - I u) and of dy (1 - I)
};

struct FakeKernels {
  // Elements [begin, end) of the array, all of one run.
  void (*forward)(const FakeQuant&, void* y, int64_t group, int64_t begin, int64_t end);
  void (*backward)(const FakeQuant&, const void* dy, void* dx, int64_t group, int64_t begin, int64_t end, FakeSums* sums);
  // Rows [row0, row1), columns [c0, c1) of x as a matrix of groups * run columns. sums: of each of these columns.
  void (*forward_columns)(const FakeQuant&, void* y, int64_t row0, int64_t row1, int64_t c0, int64_t c1);
  void (*backward_columns)(const FakeQuant&, const void* dy, void* dx, int64_t row0, int64_t row1, int64_t c0, int64_t c1, FakeSums* sums);
};
extern const FakeKernels fake_base;
#if defined(__x86_64__)
extern const FakeKernels fake_avx2, fake_avx512;
#endif

// fake_quant.cpp. Results do not depend on `threads`.
void fake_quant(const FakeQuant& job, void* y, int threads);
// d_scale, d_offset: [groups], or both null.
void fake_quant_backward(const FakeQuant& job, const void* dy, void* dx, float* d_scale, float* d_offset, int threads);

}  // namespace fa::cpu
