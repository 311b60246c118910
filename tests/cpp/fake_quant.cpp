// The CPU's fake quantization under AddressSanitizer and UBSan: every array ends where its allocation ends; values and sums against plain loops.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target fake_quant
#include "cpu/fake_quant.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "core/dtypes.h"
#include "cpu/optim.h"

namespace {

using namespace fa::cpu;

int failures = 0;
void require(bool ok, const char* what, const FakeQuant& job) {
  if (!ok && ++failures <= 20)
    std::printf("FAIL %s: n %lld, line %lld, run %lld, dtype %d, inside %d, %s\n", what, (long long)job.n, (long long)job.line,
                (long long)job.run, job.dtype, job.inside, kernels().name);
}

uint32_t state = 1;
uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }

// Numbers that bf16 and fp16 hold exactly, with half steps among them.
std::vector<float> numbers(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = float(int(next() % 65) - 32) / 8.f;
  return x;
}

struct Array {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  int dtype;

  Array(const std::vector<float>& x, int code) : wide(x), dtype(code) {
    for (float v : x) narrow.push_back(code == fa::kBF16 ? fa::float_to_bf16(v) : fa::float_to_half(v));
  }
  void* data() { return dtype == fa::kF32 ? static_cast<void*>(wide.data()) : narrow.data(); }
  float at(int64_t i) const {
    const uint16_t h = narrow[size_t(i)];
    return dtype == fa::kF32 ? wide[size_t(i)] : dtype == fa::kBF16 ? fa::bf16_to_float(h) : fa::half_to_float(h);
  }
};

void test(int64_t lines, int64_t line, int64_t run, int64_t groups, int dtype, int inside) {
  const int64_t n = lines * line, per_line = (line + run - 1) / run;
  std::vector<float> scale(size_t(groups), 0.25f), zero(size_t(groups), 2.f), offset(1, 0.5f), low(1, -8.f), high(1, 7.f);
  for (size_t g = 0; g < scale.size(); ++g) scale[g] = g % 2 ? 0.25f : 0.5f;
  Array x(numbers(n), dtype), dy(numbers(n), dtype), y(std::vector<float>(size_t(n)), dtype), dx = y;
  const FakeQuant job{x.data(),    n, line, run, groups, scale.data(), zero.data(),    offset.data(), low.data(),
                      high.data(), 1, 0,    0,   -999.f, 999.f,        int32_t(dtype), inside,        inside == kRound};
  std::vector<float> d_scale(scale.size()), d_offset(scale.size());
  fake_quant(job, y.data(), 2);
  fake_quant_backward(job, dy.data(), dx.data(), d_scale.data(), d_offset.data(), 2);
  std::vector<double> by_scale(scale.size()), outside(scale.size());
  bool values = true, masks = true, sums = true;
  for (int64_t i = 0; i < n; ++i) {
    const size_t g = size_t((i / line * per_line + i % line / run) % groups);
    const float u = (x.at(i) - 0.5f) / scale[g], q = std::nearbyint(std::fmin(std::fmax(u, -10.f), 5.f)), r = std::nearbyint(u);
    const bool in = inside == kIdentity || (inside == kClamp ? u >= -10.f && u <= 5.f : r >= -10.f && r <= 5.f);
    values &= y.at(i) == q * scale[g] + 0.5f;
    masks &= dx.at(i) == (in ? dy.at(i) : 0.f);
    by_scale[g] += double(dy.at(i)) * double(q - (in ? u : 0.f));
    outside[g] += in ? 0.0 : double(dy.at(i));
  }
  // small binary fractions: sums are exact
  for (size_t g = 0; g < scale.size(); ++g) sums &= double(d_scale[g]) == by_scale[g] && double(d_offset[g]) == outside[g];
  require(values, "values", job);
  require(masks, "masks", job);
  require(sums, "sums", job);
  Array again = dx;
  fake_quant_backward(job, dy.data(), again.data(), nullptr, nullptr, 1);
  require(again.wide == dx.wide && again.narrow == dx.narrow, "without sums", job);
}

}  // namespace

int main() {
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!use_isa(isa)) continue;
    for (int dtype : {fa::kF32, fa::kBF16, fa::kF16})
      for (int inside : {kClamp, kRound, kIdentity}) {
        for (int64_t n : {1, 7, 16, 31, 513, 16384, 40000}) test(1, n, n, 1, dtype, inside);
        for (int64_t run : {1, 3, 15, 16, 17, 70}) {
          test(6, run, run, 3, dtype, inside);
          test(600, run, run, 200, dtype, inside);
          test(5, 101, run, 5 * ((101 + run - 1) / run), dtype, inside);
        }
        test(530, 1, 1, 2, dtype, inside);
        test(700, 1, 1, 700, dtype, inside);
      }
  }
  if (!failures) std::printf("ok\n");
  return failures != 0;
}
