// The CPU low-rank functions against plain loops in double, under AddressSanitizer and UBSan: every array ends where its allocation ends, every output
// starts as NaN. Element indexes beyond 2^32 are reached through rows that all lie in one place (row stride 0).
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target lowrank_cpu
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>
#include "core/dtypes.h"
#include "core/philox.h"
#include "cpu/lowrank.h"
#include "cpu/optim.h"
#include "exact.h"

namespace {

namespace lr = fa::cpu::lowrank;
using Doubles = std::vector<double>;

// rows x columns, `stride` elements apart; nothing after the last element.
struct Array {
  void* memory;
  lr::Matrix m;
  Array(int dtype, int64_t rows, int64_t columns, int64_t gap, bool poison) {
    const int64_t stride = columns + gap, n = (rows - 1) * stride + columns;
    memory = std::malloc(size_t(n * fa::dtype_size(dtype)));
    m = {memory, dtype, rows, columns, stride, 1};
    for (int64_t i = 0; i < n; ++i) set(i, poison ? std::numeric_limits<float>::quiet_NaN() : uniform());
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(memory); }

  void set(int64_t i, float f) {
    const uint16_t h = m.dtype == fa::kBF16 ? fa::float_to_bf16(f) : fa::float_to_half(f);
    if (m.dtype == fa::kF32)
      static_cast<float*>(memory)[i] = f;
    else
      static_cast<uint16_t*>(memory)[i] = h;
  }
  double operator()(int64_t row, int64_t column) const {
    const int64_t i = row * m.stride + column;
    if (m.dtype == fa::kF32) return double(static_cast<const float*>(memory)[i]);
    const uint16_t h = static_cast<const uint16_t*>(memory)[i];
    return double(m.dtype == fa::kBF16 ? fa::bf16_to_float(h) : fa::half_to_float(h));
  }
  float* floats() { return static_cast<float*>(memory); }
};

constexpr uint64_t kSeed = 0x123456789abcdef0u;

double kept(int64_t element, const lr::Segment& s) {
  if (s.threshold == 0) return 1.0;
  return fa::random16(kSeed, uint64_t(element), s.stream, 0) >= s.threshold ? 65536.0 / (65536 - s.threshold) : 0.0;
}

void close(const Array& got, const Doubles& want, double slack, const std::string& what) {
  double error = 0, size = 0;
  for (int64_t i = 0; i < got.m.rows; ++i)
    for (int64_t j = 0; j < got.m.columns; ++j) {
      const double w = want[size_t(i * got.m.columns + j)], d = got(i, j) - w;
      error += d * d;
      size += w * w;
    }
  const double rounding = got.m.dtype == fa::kF32 ? 0x1p-21 : got.m.dtype == fa::kBF16 ? 0x1p-8 : 0x1p-11;
  require(std::sqrt(error) <= rounding * std::sqrt(size) + slack, what);
}

struct Shape {
  int64_t t, k;
  std::vector<lr::Segment> segments;
  int dtype, adapters;
};

// sum over j of the product f(j), for each (i, n)
template <class Function>
Doubles table(int64_t rows, int64_t columns, int64_t depth, Function f) {
  Doubles out(size_t(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t j = 0; j < depth; ++j) out[size_t(i * columns + n)] += f(i, n, j);
  return out;
}

void check(const Shape& c, const std::string& isa) {
  const auto& last = c.segments.back();
  const int64_t rank = last.first + last.rank, t = c.t, k = c.k;
  const auto segment = [&](int64_t r) -> const lr::Segment& {
    for (const lr::Segment& s : c.segments)
      if (r < s.first + s.rank) return s;
    std::abort();
  };
  const std::string what =
      isa + " T=" + std::to_string(t) + " K=" + std::to_string(k) + " R=" + std::to_string(rank) + " dtype " + std::to_string(c.dtype);
  const double slack = 1e-6 * std::sqrt(double(t * k * rank));
  Array x(c.dtype, t, k, 3, false), a(c.adapters, rank, k, 0, false), u(fa::kF32, t, rank, 0, false);
  Array got_u(fa::kF32, t, rank, 0, true), got_m(fa::kF32, rank, k, 0, true), got_c(fa::kF32, t, rank, 0, true);
  Array squares(fa::kF32, 1, t, 0, true), scale(fa::kF32, 1, k, 0, false), y0(c.dtype, t, k, 1, false);
  const auto x_of = [&](int64_t i, int64_t j, int64_t r) { return x(i, j) * kept(i * k + j, segment(r)); };

  lr::shrink(x.m, a.m, got_u.floats(), c.segments, kSeed, 2);
  close(got_u, table(t, rank, k, [&](int64_t i, int64_t r, int64_t j) { return x_of(i, j, r) * a(r, j); }), slack, "shrink " + what);
  lr::bwd_x(x.m, u.floats(), got_m.floats(), c.segments, kSeed, 2);
  close(got_m, table(rank, k, t, [&](int64_t r, int64_t j, int64_t i) { return u(i, r) * x_of(i, j, r); }), slack, "bwd_x " + what);
  lr::skinny_w(x.m, a.m, got_c.floats(), squares.floats(), 2);
  close(got_c, table(t, rank, k, [&](int64_t i, int64_t r, int64_t j) { return x(i, j) * a(r, j); }), slack, "skinny_w " + what);
  close(squares, table(1, t, k, [&](int64_t, int64_t i, int64_t j) { return x(i, j) * x(i, j); }), slack, "squares " + what);

  lr::BwdDy g;
  Array scaled(c.dtype, t, k, 0, true), dv(fa::kF32, t, rank, 0, true), mb(fa::kF32, k, rank, 0, true);
  Array db(fa::kF32, 1, k, 0, true), dg(fa::kF32, 1, k, 0, true);
  g.dy = x.m;
  g.b = {a.m.data, a.m.dtype, k, rank, 1, a.m.stride};
  g.y0 = y0.m;
  g.scaled = scaled.m;
  g.v = u.floats();
  g.rank = rank;
  g.row_scale = scale.floats();
  g.dv = dv.floats(), g.mb = mb.floats(), g.db = db.floats(), g.dg = dg.floats();
  lr::bwd_dy(g, 2);
  const auto d = [&](int64_t i, int64_t j) { return x(i, j) * scale(0, j); };
  close(scaled, table(t, k, 1, [&](int64_t i, int64_t j, int64_t) { return d(i, j); }), slack, "dY0 " + what);
  close(dv, table(t, rank, k, [&](int64_t i, int64_t r, int64_t j) { return d(i, j) * a(r, j); }), slack, "dV " + what);
  close(mb, table(k, rank, t, [&](int64_t j, int64_t r, int64_t i) { return d(i, j) * u(i, r); }), slack, "M_B " + what);
  close(db, table(1, k, t, [&](int64_t, int64_t j, int64_t i) { return x(i, j); }), slack, "db " + what);
  close(dg, table(1, k, t, [&](int64_t, int64_t j, int64_t i) { return x(i, j) * y0(i, j); }), slack, "dg " + what);

  Doubles sum = table(t, k, rank, [&](int64_t i, int64_t j, int64_t r) { return u(i, r) * a(r, j) * kept(i * k + j, segment(r)); });
  Doubles plain = table(t, k, rank, [&](int64_t i, int64_t j, int64_t r) { return u(i, r) * a(r, j); });
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < k; ++j) {
      sum[size_t(i * k + j)] += x(i, j);
      plain[size_t(i * k + j)] = (plain[size_t(i * k + j)] + y0(i, j)) * scale(0, j);
    }
  Array out(c.dtype, t, k, 0, true);
  lr::scale_add(y0.m, u.floats(), a.m, scale.floats(), nullptr, out.m, 2);
  close(out, plain, slack, "scale_add " + what);
  lr::add(x.m, u.floats(), a.m, c.segments, kSeed, 2);
  close(x, sum, slack, "add " + what);
  Array tile(fa::kF32, t, k, 3, true);
  lr::fill(tile.m, scale.floats(), {}, u.floats(), a.m, c.segments, kSeed, 2);
  close(
      tile,
      table(t, k, rank,
            [&](int64_t i, int64_t j, int64_t r) { return u(i, r) * a(r, j) * kept(i * k + j, segment(r)) + scale(0, j) / double(rank); }),
      slack, "fill " + what);
  Doubles merged = table(t, k, rank, [&](int64_t i, int64_t j, int64_t r) { return u(i, r) * a(r, j); });
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < k; ++j) merged[size_t(i * k + j)] += x(i, j);
  double stats[2] = {-1, -1};
  lr::merge(x.m, u.floats(), a.m, nullptr, stats, 2);
  close(x, merged, slack, "merge " + what);
  require(stats[1] >= 0 && std::isfinite(stats[0]), "merge statistics " + what);
}

// Rows far down a matrix whose rows share one place.
void check_far(const std::string& isa) {
  const int64_t columns = 33;
  Array x(fa::kF32, 1, columns, 0, false), out(fa::kF32, 1, columns, 0, true);
  x.m.stride = out.m.stride = 0;
  x.m.rows = out.m.rows = int64_t(1) << 40;
  const lr::Segment s = {0, 1, 6554, 0, 0};
  for (const int64_t t : {int64_t(0), int64_t(130150524), (int64_t(1) << 32) / 33, (int64_t(1) << 35) / 33, (int64_t(1) << 39) + 5}) {
    lr::kernels().dropout(x.m, out.m, t, t + 1, kSeed, s.threshold);
    for (int64_t j = 0; j < columns; ++j) {
      const float want = kept(t * columns + j, s) > 0 ? x.floats()[j] * fa::cpu::lowrank::scale_of(s.threshold) : 0.f;
      require(out.floats()[j] == want, isa + " dropout of row " + std::to_string(t) + " column " + std::to_string(j));
    }
  }
}

}  // namespace

int main() {
  const std::vector<Shape> shapes = {
      {1, 1, {{0, 1, 0, 0, 0}}, fa::kF32, fa::kF32},
      {2, 7, {{0, 3, 6554, 0, 0}}, fa::kBF16, fa::kF32},
      {17, 16, {{0, 8, 0, 0, 0}, {8, 1, 0, 1, 0}}, fa::kF16, fa::kF16},
      {49, 33, {{0, 16, 0, 0, 0}}, fa::kF32, fa::kBF16},
      {50, 129, {{0, 17, 32768, 0, 0}, {17, 8, 0, 1, 0}, {25, 3, 58982, 2, 0}}, fa::kBF16, fa::kBF16},
      {97, 130, {{0, 24, 0, 0, 0}}, fa::kBF16, fa::kF32},
      {131, 257, {{0, 5, 6554, 0, 0}, {5, 9, 6554, 1, 0}}, fa::kF32, fa::kF32},
      {5, 1025, {{0, 40, 0, 0, 0}}, fa::kF32, fa::kF32},
  };
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!fa::cpu::use_isa(isa)) continue;
    for (const Shape& c : shapes) check(c, isa);
    check_far(isa);
  }
  std::printf("lowrank on the CPU: %d failures\n", failures);
  return failures != 0;
}
