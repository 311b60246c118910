// The CPU codec and products against plain loops, under AddressSanitizer and UBSan: every array ends where its allocation ends, every output starts as NaN.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target quant_cpu
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>
#include "core/dtypes.h"
#include "cpu/optim.h"
#include "cpu/quant.h"
#include "exact.h"
#include "quant_case.h"

namespace {

namespace qt = fa::cpu::quant;

qt::Weight weight(const Case& c) {
  qt::Weight w;
  w.codes = c.codes.get(), w.n = c.n, w.k = c.k, w.row_bytes = c.row_bytes, w.bits = c.l.bits, w.flat = c.l.flat, w.grid = c.grid;
  w.values = c.values.get();
  w.zero = c.zero.get(), w.zero_dtype = fa::kU8;
  w.kind = c.l.exponent ? c.l.exponent == 4 ? qt::Values::kE4M3 : qt::Values::kE5M2
           : c.l.counts ? qt::Values::kUnsigned
                        : qt::Values::kTable;
  w.scales.data = c.scale.get(), w.scales.dtype = fa::kF32;
  return w;
}

void poison(const Exact<float>& f) {
  for (int64_t i = 0; i < f.size; ++i) f[i] = std::numeric_limits<float>::quiet_NaN();
}

void check_decode(const Case& c) {
  const int64_t first = c.n / 3;
  const Exact<float> out((c.n - first) * c.k);
  poison(out);
  qt::dequantize(weight(c), first, c.n, fa::kF32, out.get(), 2);
  for (int64_t i = 0; i < out.size; ++i) require(out[i] == c.at(first + i / c.k, i % c.k), "decode " + c.name());
}

// Numbers that stand for codes are encoded to those codes.
void check_encode(const Case& c) {
  const Exact<float> w(c.n * c.k), lo(c.groups), hi(c.groups);
  for (int64_t i = 0; i < w.size; ++i) w[i] = uniform() * 20;
  const Case back(c.l, c.n, c.k);
  qt::Encoding e;
  e.w = w.get(), e.n = c.n, e.k = c.k, e.row_bytes = c.row_bytes, e.dtype = fa::kF32, e.bits = c.l.bits, e.grid = c.grid, e.flat = c.l.flat;
  e.factor = c.factor.get(), e.high = (1 << c.l.bits) - 1, e.bias = 1, e.out = back.codes.get();
  qt::encode(e, 2);
  for (int64_t i = 0; i < w.size; ++i) {
    const int64_t row = i / c.k, column = i % c.k;
    const int64_t g = c.l.flat ? i / c.l.columns : row / c.l.rows * c.grid.wide + column / c.l.columns;
    const float code = std::fmin(std::fmax(std::nearbyint(w[i] * c.factor[g]) + 1, 0.f), float(e.high));
    require(back.code(row, column) == int(code), "encode " + c.name());
  }
  poison(lo), poison(hi);
  qt::stats({w.get(), c.l.flat ? 1 : c.n, c.l.flat ? c.n * c.k : c.k, fa::kF32, c.grid}, lo.get(), hi.get(), 2);
  for (int64_t i = 0; i < c.groups; ++i) require(lo[i] <= hi[i] && std::fabs(lo[i]) <= 20 && std::fabs(hi[i]) <= 20, "stats " + c.name());
}

// Ascending cuts, many of them, and those of 8-bit floats.
void check_cuts(int64_t n, int exponent) {
  const int count = exponent ? exponent == 4 ? 126 : 123 : 200;
  const Exact<float> cuts(count), w(n), factor(1);
  const Exact<uint8_t> order(count + 1), out(n);
  for (int i = 0; i < count; ++i) {
    const float middle = exponent ? (float8(exponent, i) + float8(exponent, i + 1)) / 2 : float(i - 90) / 64;
    cuts[i] = exponent && i % 2 ? std::nextafter(middle, 0.f) : middle;
  }
  for (int i = 0; i <= count; ++i) order[i] = uint8_t(i);
  for (int64_t i = 0; i < n; ++i) w[i] = exponent ? std::ldexp(uniform(), int(random_bits() % 24) - 14) : uniform() * 2;
  factor[0] = 1;
  qt::Encoding e;
  e.w = w.get(), e.n = 1, e.k = e.row_bytes = n, e.dtype = fa::kF32, e.bits = 8, e.grid = {1, n, 1}, e.factor = factor.get();
  e.magnitude = e.sign_bit = exponent != 0, e.cut_count = count, e.cuts = cuts.get(), e.order = order.get(), e.out = out.get();
  e.kind = exponent == 4 ? qt::Values::kE4M3 : exponent == 5 ? qt::Values::kE5M2 : qt::Values::kTable;
  qt::encode(e, 2);
  for (int64_t i = 0; i < n; ++i) {
    const float v = exponent ? std::fabs(w[i]) : w[i];
    int passed = 0;
    while (passed < count && cuts[passed] < v) ++passed;
    require(out[i] == (passed | (exponent && std::signbit(w[i]) ? 128 : 0)), "cuts " + std::to_string(exponent));
  }
}

void check_products(const Case& c, int64_t t) {
  for (const bool transposed : {false, true}) {
    const int64_t inner = transposed ? c.n : c.k, width = transposed ? c.k : c.n, stride = inner + 3;
    const Exact<float> x((t - 1) * stride + inner), y(t * width);
    for (int64_t i = 0; i < x.size; ++i) x[i] = uniform();
    poison(y);
    qt::Product p;
    p.x = x.get(), p.t = t, p.stride = stride, p.dtype = fa::kF32, p.y = y.get();
    transposed ? qt::linear_dx(weight(c), p, 2) : qt::linear(weight(c), p, 2);
    for (int64_t r = 0; r < t; ++r)
      for (int64_t j = 0; j < width; ++j) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < inner; ++i) {
          const double term = double(x[r * stride + i]) * double(transposed ? c.at(i, j) : c.at(j, i));
          sum += term, size += std::fabs(term) + double(std::fabs(x[r * stride + i])) * (1 << c.l.bits);
        }
        require(std::fabs(double(y[r * width + j]) - sum) <= 1e-6 * size + 1e-30, (transposed ? "dx " : "linear ") + c.name());
      }
  }
}

}  // namespace

int main() {
  const Layout layouts[] = {
      {4, true, false, 1, 32},     {4, false, false, 1, 32},         {4, false, true, 1, 16},        {4, false, true, 3, 64},
      {4, false, false, 1, 20},    {4, false, true, 7, 1},           {3, false, true, 1, 32},        {3, false, false, 2, 5},
      {2, false, true, 1, 48},     {2, false, false, 1, 32},         {8, true, false, 1, 32},        {8, false, true, 1, 1 << 20},
      {8, false, false, 1, 4},     {8, false, true, 4, 6},           {4, false, false, 9, 128},      {2, false, true, 1 << 20, 1 << 20},
      {8, false, false, 1, 32, 4}, {8, false, false, 1, 1 << 20, 5}, {8, false, false, 128, 128, 4}, {8, false, false, 1, 7, 5}};
  const int64_t shapes[][2] = {{1, 1}, {3, 7}, {2, 33}, {5, 64}, {4, 129}, {17, 96}, {2, 1100}, {33, 40}};
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!fa::cpu::use_isa(isa)) continue;
    for (const int exponent : {0, 4, 5})
      for (const int64_t n : {1, 7, 64, 2500}) check_cuts(n, exponent);
    for (const Layout& l : layouts)
      for (const auto& s : shapes) {
        const Case c(l, s[0], s[1]);
        check_decode(c);
        check_encode(c);
        check_products(c, 1 + (s[0] + s[1]) % 6);
      }
  }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
