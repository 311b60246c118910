// The CUDA product with low-bit weights (on the emulator) against sums in double: every width, layout, coding of scales and zeros, dtype and number of
// tokens, under AddressSanitizer and UBSan. Every array ends where its allocation ends.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target quant_cuda
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/dtypes.h"
#include "core/launch.h"
#include "cuda/quant.h"
#include "exact.h"
#include "quant_case.h"

namespace {

namespace gpu = fa::cuda;

// n numbers of a dtype behind `gap` bytes.
struct Numbers {
  int dtype;
  Exact<uint8_t> bytes;
  int64_t gap;

  Numbers(int dtype_, int64_t n, int64_t gap_ = 0) : dtype(dtype_), bytes(n * fa::dtype_size(dtype_) + gap_), gap(gap_) {}
  void* data() const { return bytes.get() + gap; }
  void set(int64_t i, float f) {
    const uint32_t u = dtype == fa::kBF16 ? fa::float_to_bf16(f) : dtype == fa::kF16 ? fa::float_to_half(f) : fa::as_bits(f);
    std::memcpy(bytes.get() + gap + i * fa::dtype_size(dtype), &u, size_t(fa::dtype_size(dtype)));
  }
  float at(int64_t i) const {
    uint32_t u = 0;
    std::memcpy(&u, bytes.get() + gap + i * fa::dtype_size(dtype), size_t(fa::dtype_size(dtype)));
    return dtype == fa::kBF16 ? fa::bf16_to_float(uint16_t(u)) : dtype == fa::kF16 ? fa::half_to_float(uint16_t(u)) : fa::as_float(u);
  }
};

// How the numbers of a Case's groups are stored; the Case's own ones are set to what that says.
struct Stored {
  int coding, scale_dtype, zero_dtype;
  bool sign;  // counted codes of 8 bits: two's complement
};

struct Weight {
  Case c;
  Stored how;
  Numbers scale, zero;
  Exact<float> dynamic, above, offset;

  Weight(const Layout& l, const Stored& given, int64_t n, int64_t k)
      : c(l, n, k),
        how(given),
        scale(given.coding == gpu::kStored ? given.scale_dtype : int(fa::kU8), c.groups),
        zero(given.zero_dtype == fa::kNone ? int(fa::kU8) : given.zero_dtype, c.groups),
        dynamic(given.coding == gpu::kNestedScale ? 256 : 0),
        above(given.coding == gpu::kNestedScale ? (c.groups + 255) / 256 : given.coding == gpu::kSmallFloat),
        offset(given.coding == gpu::kNestedScale) {
    for (int64_t i = 0; i < dynamic.size; ++i) dynamic[i] = uniform();
    for (int64_t i = 0; i < above.size; ++i) above[i] = 1 + uniform() / 2;
    if (offset.size) offset[0] = 0.25f;
    for (int64_t g = 0; g < c.groups; ++g) set_group(g);
    if (how.sign)
      for (int i = 0; i < 256; ++i) c.values[i] = float(int8_t(uint8_t(i)));
  }

  void set_group(int64_t g) {
    if (how.coding == gpu::kStored) {
      scale.set(g, c.scale[g]);
      c.scale[g] = scale.at(g);
    } else {
      const int byte = how.coding == gpu::kPower ? 120 + int(random_bits() % 12) : int(random_bits() & 0xbf);  // below 2
      scale.bytes[g] = uint8_t(byte);
      c.scale[g] = how.coding == gpu::kPower        ? std::ldexp(1.f, byte - 127)
                   : how.coding == gpu::kSmallFloat ? float8(4, byte) * above[0]
                                                    : dynamic[byte] * above[g / 256] + offset[0];
    }
    if (how.zero_dtype == fa::kNone) c.zero[g] = 0;
    if (how.zero_dtype == fa::kF32)
      zero.set(g, float(c.zero[g]));
    else
      zero.bytes[g] = c.zero[g];
  }

  gpu::QuantWeight spec() const {
    gpu::QuantWeight w{};
    w.codes = c.codes.get(), w.values = c.values.get(), w.scale = scale.data();
    w.dynamic = dynamic.get(), w.above = above.get(), w.offset = offset.get();
    w.zero = how.zero_dtype == fa::kNone ? nullptr : zero.data(), w.zero_dtype = how.zero_dtype;
    w.n = c.n, w.k = c.k, w.row_bytes = c.row_bytes, w.rows = c.grid.rows, w.columns = c.grid.columns, w.wide = c.grid.wide;
    w.bits = c.l.bits, w.flat = c.l.flat, w.coding = how.coding, w.scale_dtype = how.coding == gpu::kStored ? how.scale_dtype : 0;
    w.value = c.l.exponent == 4 ? gpu::kE4M3 : c.l.exponent == 5 ? gpu::kE5M2 : c.l.counts ? gpu::kCounted : gpu::kLookedUp;
    w.first = how.sign ? -128.f : c.values[0], w.flip = how.sign ? 0x80808080u : 0u;
    return w;
  }
};

void check(const Weight& w, int t, int dtype, int bias_dtype, int64_t apart, bool misaligned) {
  const Case& c = w.c;
  const int64_t stride = c.k + apart;
  Numbers x(dtype, (t - 1) * stride + c.k, misaligned ? fa::dtype_size(dtype) : 0), y(dtype, t * c.n),
      bias(bias_dtype ? bias_dtype : fa::kF32, c.n);
  for (int64_t i = 0; i < (t - 1) * stride + c.k; ++i) x.set(i, uniform());
  for (int64_t i = 0; i < c.n; ++i) bias.set(i, uniform());
  const gpu::QuantProduct p{x.data(), bias_dtype ? bias.data() : nullptr, y.data(), t, stride, dtype, bias_dtype};
  std::vector<uint8_t> first;
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    std::memset(y.bytes.get(), 0xff, size_t(y.bytes.size));
    fa::emulator::set_seed(seed);
    gpu::gemv(w.spec(), p, {0, nullptr});
    const std::vector<uint8_t> now(y.bytes.get(), y.bytes.get() + y.bytes.size);
    if (seed == 1) first = now;
    require(now == first, "another order of the threads, other bits: " + c.name());
  }
  const double eps = dtype == fa::kF32 ? 0 : dtype == fa::kBF16 ? 0x1p-8 : 0x1p-11;
  for (int64_t r = 0; r < t; ++r)
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = bias_dtype ? double(bias.at(j)) : 0, size = std::fabs(sum);
      for (int64_t i = 0; i < c.k; ++i) {
        const double term = double(x.at(r * stride + i)) * double(c.at(j, i));
        sum += term, size += std::fabs(term);
      }
      require(std::fabs(double(y.at(r * c.n + j)) - sum) <= 1e-6 * size + eps * std::fabs(sum) + 1e-7,
              c.name() + ", tokens " + std::to_string(t) + ", dtype " + std::to_string(dtype) + ", coding " + std::to_string(w.how.coding));
    }
}

}  // namespace

int main() {
  const Layout layouts[] = {
      {4, true, false, 1, 64},       {4, true, false, 1, 7},      {4, false, false, 1, 16},    {4, false, true, 1, 32},
      {4, false, true, 3, 64},       {4, false, true, 7, 1},      {4, false, false, 1, 20},    {3, false, true, 1, 32},
      {3, false, true, 2, 5},        {2, false, true, 1, 64},     {2, false, true, 999, 9999}, {2, false, true, 1, 8},
      {8, true, false, 1, 256},      {8, false, true, 1, 9999},   {8, false, true, 4, 6},      {8, false, false, 1, 32, 4},
      {8, false, false, 1, 9999, 5}, {8, false, false, 2, 16, 4}, {8, false, false, 1, 8},     {1, false, true, 1, 3},
      {8, false, true, 1, 8},        {4, false, false, 2, 64}};
  const Stored stored[] = {{gpu::kStored, fa::kF32, fa::kU8, false}, {gpu::kPower, 0, fa::kNone, false},
                           {gpu::kNestedScale, 0, fa::kNone, false}, {gpu::kStored, fa::kBF16, fa::kF32, false},
                           {gpu::kSmallFloat, 0, fa::kNone, false},  {gpu::kStored, fa::kF16, fa::kNone, false},
                           {gpu::kNestedScale, 0, fa::kU8, false},   {gpu::kStored, fa::kF32, fa::kF32, false}};
  const int64_t shapes[][2] = {{1, 1}, {3, 7}, {2, 33}, {5, 64}, {4, 130}, {9, 256}, {2, 1088}, {6, 192}};
  const int dtypes[] = {fa::kF32, fa::kBF16, fa::kF16};
  int number = 0;
  for (const Layout& l : layouts)
    for (const auto& s : shapes)
      for (const Stored& how : stored) {
        ++number;
        const int t = 1 + number % 8, dtype = dtypes[number % 3], bias = number % 2 ? dtypes[number / 2 % 3] : int(fa::kNone);
        const bool sign = l.counts && l.bits == 8 && number % 2 == 0;
        check(Weight(l, {how.coding, how.scale_dtype, how.zero_dtype, sign}, s[0], s[1]), t, dtype, bias, number % 3 ? 0 : 8,
              number % 7 == 0);
      }
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
