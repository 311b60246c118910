// Activations and optimizer states in 8 bits against plain loops, under AddressSanitizer and UBSan: every array ends where its allocation ends.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target eight_bits
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>

#include "core/dtypes.h"
#include "cpu/lowbit.h"
#include "cpu/optim.h"
#include "cpu/quant_act.h"
#include "exact.h"

namespace {

namespace act = fa::cpu::quant_act;

void check_codes(int64_t rows, int64_t columns, int64_t block, int codes) {
  const int64_t groups = (columns + block - 1) / block, stride = columns + 3;
  const Exact<float> x((rows - 1) * stride + columns), scale(rows * groups);
  const Exact<uint8_t> q(rows * columns);
  for (int64_t i = 0; i < x.size; ++i) x[i] = uniform();
  act::quantize({x.get(), fa::kF32, rows, columns, stride, block, codes, q.get(), scale.get()}, 2);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) {
      const float s = scale[r * groups + c / block], v = x[r * stride + c];
      const int code = q[r * columns + c], e = (code & 127) >> 3, m = code & 7;
      const float magnitude = std::ldexp(float(e ? 8 + m : m), (e ? e : 1) - 10);
      const float back = codes == act::kInt8 ? float(int8_t(code)) : code & 128 ? -magnitude : magnitude;
      const float step = codes == act::kInt8 ? 0.501f : std::fmax(std::fabs(back) / 15, 0x1p-10f);
      require(std::fabs(back * s - v) <= step * s, "codes " + std::to_string(rows) + " x " + std::to_string(columns));
    }
}

void check_int8_product(int64_t t, int64_t n, int64_t k) {
  const Exact<int8_t> x(t * k), w(n * k);
  const Exact<float> x_scale(t), w_scale(n), bias(n), y(t * n);
  for (int64_t i = 0; i < x.size; ++i) x[i] = int8_t(int(random_bits() % 255) - 127);
  for (int64_t i = 0; i < w.size; ++i) w[i] = int8_t(random_bits());
  for (int64_t i = 0; i < t; ++i) x_scale[i] = 1 + uniform() / 2;
  for (int64_t i = 0; i < n; ++i) w_scale[i] = 1 + uniform() / 2, bias[i] = uniform();
  act::product({x.get(), w.get(), x_scale.get(), w_scale.get(), bias.get(), y.get(), fa::kF32, t, n, k}, 2);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < n; ++j) {
      int64_t sum = 0;
      for (int64_t c = 0; c < k; ++c) sum += int64_t(x[i * k + c]) * w[j * k + c];
      require(y[i * n + j] == (float(sum) * w_scale[j]) * x_scale[i] + bias[j], "product " + std::to_string(t));
    }
}

// A block comes back within a share of its largest element; what lies behind its floats may be overwritten, what lies behind its codes not.
void check_states(const fa::cpu::Codec& codec, int n, int kind) {
  const Exact<float> values(n + fa::cpu::kBlockPad), back(n + fa::cpu::kBlockPad), given(n), scale(2);
  const Exact<uint8_t> codes(n);
  for (int i = 0; i < n; ++i) given[i] = values[i] = kind == fa::kD8U ? std::fabs(uniform()) : uniform();
  codec.encode(kind, values.get(), n, codes.get(), scale.get());
  codec.decode(kind, codes.get(), scale.get(), n, back.get());
  for (int i = 0; i < n; ++i) require(std::fabs(back[i] - given[i]) <= 0.07f * std::fabs(scale[0]), "state " + std::to_string(kind));
}

}  // namespace

int main() {
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!fa::cpu::use_isa(isa)) continue;
    for (const int64_t columns : {1, 5, 64, 130, 1031})
      for (const int codes : {int(act::kInt8), int(act::kE4M3)})
        check_codes(3, columns, columns, codes), check_codes(2, columns, 128, codes);
    for (const auto [t, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {1, 70, 129}, {5, 3, 64}, {50, 67, 33}, {3, 65, 200000}})
      check_int8_product(t, n, k);
    for (const int n : {1, 31, 32, 33, 255, 256, 2048})
      for (const int kind : {int(fa::kD8S), int(fa::kD8U), int(fa::kF8X)}) check_states(*fa::cpu::kernels().codec, n, kind);
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
