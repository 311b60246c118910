// The codec over threads: pieces of rows of codes, which do not depend on the number of threads.
#include "quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../core/dtypes.h"
#include "optim.h"
#include "pool.h"

namespace fa::cpu::quant {
namespace {

constexpr int64_t kWork = 32768;  // elements that are worth a turn of a thread
constexpr int64_t kSliceRows = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(row, c0, c1) for pieces of at most `size` columns.
template <class Body>
void each_piece(int64_t rows, int64_t columns, int64_t size, int threads, Body body) {
  const int64_t across = ceil_div(columns, size);
  parallel_for(rows * across, std::max<int64_t>(1, kWork / std::min(columns, size)), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) body(i / across, i % across * size, std::min((i % across + 1) * size, columns));
  });
}

template <class T>
T as_one_row(T a) {
  if (a.flat) a.k *= a.n, a.n = 1;
  return a;
}

// What slices of a tile found, as one; a NaN stays.
void join(const std::vector<float>& lows, const std::vector<float>& highs, int64_t first, int64_t step, int64_t count, float* lo,
          float* hi) {
  *lo = lows[first], *hi = highs[first];
  for (int64_t i = 1; i < count; ++i) {
    const float l = lows[first + i * step], h = highs[first + i * step];
    *lo = l < *lo || l != l ? l : *lo;
    *hi = h > *hi || h != h ? h : *hi;
  }
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();

CutIndex index_of(const Encoding& e) {
  CutIndex out;
  const auto passed = [&](float v) { return uint32_t(std::lower_bound(e.cuts, e.cuts + e.cut_count, v) - e.cuts); };
  const auto edge = [](int32_t i) {
    return i == 0 ? 0.f : i == CutIndex::kSize ? kInfinity : as_float(uint32_t(i + CutIndex::kFirst) << CutIndex::kShift);
  };
  for (int32_t i = 0; i < CutIndex::kSize; ++i) {
    const float near = edge(i), far = edge(i + 1), last = i + 1 < CutIndex::kSize ? std::nextafter(far, 0.f) : far;
    out.start[i] = as_float(passed(near));
    out.start[CutIndex::kSize + i] = as_float(passed(-last));
    out.steps = std::max({out.steps, int32_t(passed(last) - passed(near)), int32_t(passed(-near) - passed(-last))});
  }
  return out;
}

}  // namespace

const CodecKernels& codec() {
#if defined(__x86_64__)
  if (!std::strcmp(cpu::kernels().name, "avx512")) return codec_avx512;
  if (!std::strcmp(cpu::kernels().name, "avx2")) return codec_avx2;
#endif
  return codec_base;
}

// Tall tiles are cut into slices of rows, wide rows of tiles into runs of tiles.
void stats(const Statistics& a, float* lo, float* hi, int threads) {
  const CodecKernels& k = codec();
  const Grid& g = a.grid;
  const int64_t rows = std::min(g.rows, a.n), slices = ceil_div(rows, kSliceRows), high = ceil_div(a.n, g.rows);
  const int64_t tiles = std::max<int64_t>(1, kWork / (std::min(rows, kSliceRows) * std::min(g.columns, a.k))),
                runs = ceil_div(g.wide, tiles);
  std::vector<float> lows, highs;
  if (slices > 1) lows.resize(size_t(high * slices * g.wide)), highs.resize(lows.size());
  float *const to_lo = slices > 1 ? lows.data() : lo, *const to_hi = slices > 1 ? highs.data() : hi;
  const int64_t items = high * slices * runs, size = std::min(rows, kSliceRows) * std::min(tiles * g.columns, a.k);
  parallel_for(items, std::max<int64_t>(1, kWork / size), threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t slice = i / runs, tile = i % runs * tiles, at = slice * g.wide + tile;
      const int64_t top = slice / slices * g.rows, row = top + slice % slices * kSliceRows;
      const int64_t bottom = std::min({row + kSliceRows, top + rows, a.n});
      k.stats(a, row, bottom, tile, std::min(tile + tiles, g.wide), to_lo + at, to_hi + at);
    }
  });
  if (slices > 1)
    parallel_for(high * g.wide, kWork / 8, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) join(lows, highs, i / g.wide * slices * g.wide + i % g.wide, g.wide, slices, lo + i, hi + i);
    });
}

void encode(const Encoding& given, int threads) {
  const CodecKernels& k = codec();
  Encoding e = as_one_row(given);
  CutIndex index;
  if (e.cut_count > 15 && e.kind == Values::kTable) index = index_of(e), e.index = &index;
  each_piece(e.n, e.k, kPiece, threads, [&](int64_t row, int64_t c0, int64_t c1) { k.encode(e, row, c0, c1); });
}

void dequantize(const Weight& given, int64_t row0, int64_t row1, int dtype, void* out, int threads) {
  const CodecKernels& k = codec();
  const Weight w = as_one_row(given);
  const int64_t rows = given.flat ? 1 : row1 - row0, columns = given.flat ? (row1 - row0) * given.k : given.k;
  const int64_t row = given.flat ? 0 : row0, column = given.flat ? row0 * given.k : 0;
  char* const to = static_cast<char*>(out);
  each_piece(rows, columns, 16 * kPiece, threads, [&](int64_t r, int64_t c0, int64_t c1) {
    k.decode(w, row + r, column + c0, column + c1, dtype, to + (r * columns + c0) * dtype_size(dtype));
  });
}

}  // namespace fa::cpu::quant
