// The low-rank walks, compiled once per instruction set (FA_ISA; the avx2 one with FMA). lowrank.h says what they compute.
//
// A product of a block is c[m][n] (+)= sum_p a[m, p] b[p][n]: a is broadcast element by element, b is read kWidth columns at a time, and a tile of c stays
// in registers. Sums are taken block by block (kBlockCols columns or kBlockRows rows), which keeps their rounding error below that of one long sum.
#include "lowrank_parts.h"
#include "optim.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)
#define FA_STR2(a) #a
#define FA_STR(a) FA_STR2(a)

namespace fa::cpu::lowrank {
namespace {

// ---- reading ----

// x[t.., k..] as fp32 in L1, dropped elements zero (their scale is in the adapters or the sums), zeros up to the next multiple of kLanes columns.
template <class Format, bool drops>
FA_INLINE void fill_row(const Matrix& x, int64_t t, int64_t k, int64_t columns, const uint16_t* keep, float* to) {
  using E = typename Format::E;
  const E* row = static_cast<const E*>(x.data) + t * x.stride + k;
  const auto put = [&](int64_t j, F f) { store(to + j, drops ? masked(f, load<S>(keep + j)) : f); };
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
    F left, right;
    Format::load_pair(row + j, &left, &right);
    put(j, left), put(j + kLanes, right);
  }
  for (; j < columns; j += kLanes) put(j, widen_at<Format>(row + j, columns - j));
}

void fill(const Matrix& x, int64_t t, int64_t k, int64_t rows, int64_t columns, uint64_t seed, const Segment& s, float* block) {
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    if (!s.threshold)
      for (int64_t i = 0; i < rows; ++i) fill_row<Format, false>(x, t + i, k, columns, nullptr, block + i * kStride);
    else
      for_masked_rows(t, k, rows, columns, x.columns, seed, s,
                      [&](int64_t i, const uint16_t* keep) { fill_row<Format, true>(x, t + i, k, columns, keep, block + i * kStride); });
  });
}

void sum_columns(const float* block, const float* other, int64_t rows, int64_t columns, bool add, float* sums) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    F sum = {};
    for (int64_t i = 0; i < rows; ++i) {
      const F f = load<F>(block + i * kStride + j);
      sum += other ? f * load<F>(other + i * kStride + j) : f;
    }
    store(sums + j, add ? load<F>(sums + j) + sum : sum);
  }
}

void scale_columns(const Reading& r, int64_t t, int64_t k, int64_t rows, int64_t columns, float* block) {
  const auto each = [&](auto leave) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes) {
        const F f = load<F>(block + i * kStride + j) * widen_at<F32>(r.col_scale + k + j, columns - j);
        store(block + i * kStride + j, f);
        leave(i, j, f);
      }
  };
  if (!r.scaled.dtype) return each([](int64_t, int64_t, F) {});
  with_format(r.scaled.dtype, [&](auto format) {
    using Format = decltype(format);
    auto* const out = static_cast<typename Format::E*>(r.scaled.data) + t * r.scaled.stride + k;
    each([&](int64_t i, int64_t j, F f) { narrow_at<Format>(out + i * r.scaled.stride + j, f, columns - j); });
  });
}

void square_rows(const float* block, int64_t rows, int64_t columns, bool add, float* sums) {
  for (int64_t i = 0; i < rows; ++i) {
    F sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) {
      const F f = load<F>(block + i * kStride + j);
      sum = fma(f, f, sum);
    }
    float total = 0;
    for (int j = 0; j < kLanes; ++j) total += sum[j];
    sums[i] = add ? sums[i] + total : total;
  }
}

// What is neither product: sums, squares and the scaled copy.
void side_results(const Reading& r, const Partial& part, int64_t t, int64_t k, int64_t rows, int64_t columns, bool fresh, float* block) {
  if (r.row_squares) square_rows(block, rows, columns, k > 0, r.row_squares + t);
  if (r.column_sums) sum_columns(block, nullptr, rows, columns, !fresh, part.sums + k);
  if (r.y0.dtype) {
    alignas(64) float other[kBlockRows * kStride];
    fill(r.y0, t, k, rows, columns, 0, Segment{}, other);
    sum_columns(block, other, rows, columns, !fresh, part.products + k);
  }
  if (r.col_scale) scale_columns(r, t, k, rows, columns, block);
}

// Whether u of a segment is summed where it belongs; else beside it, for whole vectors are written.
FA_INLINE bool in_place(const Segment& g) { return g.rank % kLanes == 0; }

void copy_u(const Reading& r, int64_t t, int64_t rows, const float* wide) {
  for (int s = 0; s < r.segments.count; ++s) {
    const Segment& g = r.segments.list[s];
    for (int64_t i = 0; !in_place(g) && i < rows; ++i)
      memcpy(r.u + (t + i) * r.rank + g.first, wide + i * r.panel_count * kWidth + g.panel * kWidth, size_t(g.rank) * sizeof(float));
  }
}

// Where a block's u of one segment is summed.
struct Sums {
  float* at;
  int64_t stride;
};

#if defined(__AVX512BW__)
// The products of a block straight from its elements: nothing is widened into L1 first.
void products_of_bf16(const Reading& r, const Partial& part, const Segment& g, int64_t t, int64_t k, int64_t rows, int64_t columns,
                      bool add, const Sums& u, Ahead& ahead) {
  const auto* x = static_cast<const uint16_t*>(r.x.data) + t * r.x.stride + k;
  const int64_t total = r.x.columns;
  for (int64_t n = 0; r.panels && n < g.rank; n += kWidth) {
    const Product p = {nullptr, r.x.stride, 1, r.panels + ((g.panel + n / kWidth) * total + k) * kWidth, kWidth, columns, u.stride, k > 0};
    for (int64_t i = 0; i < rows; i += kTall) {
      product_of_pairs(p, x + i * r.x.stride, least(kTall, rows - i), least(kWidth, g.rank - n), u.at + i * u.stride + n, ahead);
    }
  }
  for (int64_t j = 0; r.left && j < columns; j += kWidth) {
    const float* left = r.left + (t - r.left_row) * r.left_rank + g.first;
    product_from<BF16>({left, 1, r.left_rank, nullptr, r.x.stride, rows, part.stride, add}, x + j, r.panels ? r.left_rank : g.rank,
                       part.m + g.first * part.stride + k + j, ahead);
  }
}
#endif

void read(const Reading& r, int64_t t0, int64_t t1, int64_t k0, int64_t k1, const Partial& part, float* scratch) {
  alignas(64) float block[kBlockRows * kStride];
  const int64_t wide = r.panel_count * kWidth, total = r.x.columns;
  const bool sides = r.row_squares || r.column_sums || r.y0.dtype || r.col_scale;
  // A block of fp32 is multiplied where it lies, unless columns of it would be read first and its rows share their sets of the cache.
  const bool readable = r.x.dtype == kF32 && !sides && (r.panels ? r.panel_count == 1 : r.x.stride % 1024 != 0);
  for (Walk at(t0, t1, k0, k1); at.more(); at.next()) {
    const int64_t t = at.t(), k = at.k(), rows = at.rows(), columns = at.columns();
    Ahead ahead(r.x, at);
    for (int s = 0; s < r.segments.count; ++s) {
      const Segment& g = r.segments.list[s];
      const bool direct = readable && !g.threshold && (!r.left || columns % kLanes == 0);
      const float* from = direct ? static_cast<const float*>(r.x.data) + t * r.x.stride + k : block;
      const int64_t step = direct ? r.x.stride : kStride;
      const Sums u = in_place(g) ? Sums{r.u + t * r.rank + g.first, r.rank} : Sums{scratch + g.panel * kWidth, wide};
#if defined(__AVX512BW__)
      if (r.x.dtype == kBF16 && !sides && !g.threshold && columns % kWidth == 0) {
        products_of_bf16(r, part, g, t, k, rows, columns, t > t0, u, ahead);
        continue;
      }
#endif
      if (!direct) fill(r.x, t, k, rows, columns, r.segments.seed, g, block);
      if (sides) side_results(r, part, t, k, rows, columns, t == t0, block);
      for (int64_t n = 0; r.panels && n < g.rank; n += kWidth) {
        const Product p = {from, step, 1, r.panels + ((g.panel + n / kWidth) * total + k) * kWidth, kWidth, columns, u.stride, k > 0};
        for (int64_t i = 0; i < rows; i += kTall) {
          ahead.fetch(r.left ? 0 : kTall);
          product(p, least(kTall, rows - i), least(kWidth, g.rank - n), u.at + i * u.stride + n, i);
        }
      }
      for (int64_t j = 0; r.left && j < columns; j += kWidth) {
        const Product p = {r.left + (t - r.left_row) * r.left_rank + g.first, 1, r.left_rank, from + j, step, rows, part.stride, t > t0};
        ahead.fetch(kBlockRows * kWidth / kBlockCols);
        product(p, r.panels ? r.left_rank : g.rank, least(kWidth, columns - j), part.m + g.first * part.stride + k + j);
      }
    }
    if (r.panels && at.ends()) copy_u(r, t, rows, scratch);
  }
}

// ---- writing ----

template <class Format>
FA_INLINE void add_row(const Matrix& y, const float* sum, int64_t t, int64_t k, int64_t columns) {
  auto* at = static_cast<typename Format::E*>(y.data) + t * y.stride + k;
  const auto added = [&](int64_t j) { return widen_at<Format>(at + j, columns - j) + load<F>(sum + j); };
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) Format::store_pair(at + j, added(j), added(j + kLanes));
  for (; j < columns; j += kLanes) narrow_at<Format>(at + j, added(j), columns - j);
}

// y += u a for a block of one segment without a mask, whole panels: each sum meets its element in a register.
template <class Format>
FA_INLINE void add_block(const Writing& w, int64_t t, int64_t k, int64_t rows, int64_t columns, Ahead& ahead) {
  static const bool native = has_bf16();
  const Segment& g = w.segments.list[0];
  for (int64_t i = 0; i < rows; i += kTall) {
    auto* y = static_cast<typename Format::E*>(w.y.data) + (t + i) * w.y.stride + k;
    ahead.fetch(kTall);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const float* panel = w.panels + ((k + j) / kWidth * w.rank + g.first) * kWidth;
      product_onto<Format>({w.u + (t + i - w.u_row) * w.rank + g.first, w.rank, 1, panel, kWidth, g.rank, w.y.stride, false},
                           least(kTall, rows - i), y + j, native);
    }
  }
}

template <class Format>
FA_INLINE void scale_add_row(const Writing& w, const float* sum, int64_t t, int64_t k, int64_t columns) {
  using E = typename Format::E;
  E* y0 = static_cast<E*>(w.y.data) + t * w.y.stride + k;
  E* y = static_cast<E*>(w.out.data) + t * w.out.stride + k;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t left = columns - j;
    F f = widen_at<Format>(y0 + j, left);
    if (w.u) {
      f += load<F>(sum + j);
      narrow_at<Format>(y0 + j, f, left);
    }
    f *= widen_at<F32>(w.row_scale + k + j, left);
    if (w.bias) f += widen_at<F32>(w.bias + k + j, left);
    narrow_at<Format>(y + j, f, left);
  }
}

template <class Format>
FA_INLINE void merge_row(const Writing& w, const float* sum, int64_t t, int64_t k, int64_t columns, double* stats) {
  using E = typename Format::E;
  constexpr int kSums = 8;  // running sums: a fixed order that vectorises
  alignas(64) double wanted[kBlockCols] = {}, got[kBlockCols] = {};
  E* y = static_cast<E*>(w.y.data) + t * w.y.stride + k;
  const double scale = w.row_scale ? double(w.row_scale[t]) : 1.0;
  for (int64_t j = 0; j < columns; ++j) {
    const double before = double(Format::widen_one(y[j])), after = scale * (before + double(sum[j]));
    y[j] = Format::narrow_one(float(after));
    wanted[j] = after - before;
    got[j] = double(Format::widen_one(y[j])) - before;
  }
  double kept[kSums] = {}, asked[kSums] = {};
  for (int64_t j = 0; j < kBlockCols; j += kSums)
    for (int i = 0; i < kSums; ++i) {
      kept[i] += wanted[j + i] * got[j + i];
      asked[i] += wanted[j + i] * wanted[j + i];
    }
  for (int i = 0; i < kSums; ++i) {
    stats[0] += kept[i];
    stats[1] += asked[i];
  }
}

// c (+)= u a for one segment and block, a few rows at a time: the block's panels stay in L1, and c is walked along its rows. `start`: kBlockCols
// numbers that every row of c begins with instead of zeros, or null.
void expand_segment(const Writing& w, const Segment& g, int64_t t, int64_t k, int64_t rows, int64_t columns, bool add, const float* start,
                    float* c, int64_t c_m, Ahead& ahead) {
  for (int64_t i = 0; i < rows; i += kTall) {
    const float* u = w.u + (t + i - w.u_row) * w.rank + g.first;
    const int64_t height = least(kTall, rows - i);
    ahead.fetch(kTall);
    for (int64_t j = 0; j < columns; j += kWidth) {
      const float* panel = w.panels + ((k + j) / kWidth * w.rank + g.first) * kWidth;
      const Product p = {u, w.rank, 1, panel, kWidth, g.rank, c_m, add, start ? start + j : nullptr};
      product(p, height, least(kWidth, columns - j), c + i * c_m + j);
    }
  }
}

// sum[i * stride + j] = start[j] + drop(u a) for a block, all segments together.
void expand(const Writing& w, int64_t t, int64_t k, int64_t rows, int64_t columns, const float* start, float* sum, int64_t stride,
            Ahead ahead) {
  alignas(64) float own[kBlockRows * kStride];
  for (int s = 0; s < w.segments.count; ++s) {
    const Segment& g = w.segments.list[s];
    const bool apart = s > 0 && g.threshold;
    float* to = apart ? own : sum;
    const int64_t step = apart ? kStride : stride;
    expand_segment(w, g, t, k, rows, columns, s > 0 && !g.threshold, s > 0 || g.threshold ? nullptr : start, to, step, ahead);
    if (!g.threshold) continue;
    const Origin& o = w.origin;
    for_masked_rows(t + o.row, k + o.column, rows, columns, o.total, w.segments.seed, g, [&](int64_t i, const uint16_t* keep) {
      float *row = sum + i * stride, *mine = to + i * step;
      const float* under = s > 0 ? row : start;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const F f = masked(load<F>(mine + j), load<S>(keep + j));
        store(row + j, under ? load<F>(under + j) + f : f);
      }
    });
  }
}

// y = bias + drop(u a) for a block of an fp32 matrix.
void fill_block(const Writing& w, int64_t t, int64_t k, int64_t rows, int64_t columns, Ahead ahead, float* sum) {
  alignas(64) float start[kBlockCols] = {};
  if (w.bias) memcpy(start, w.bias + k, size_t(columns) * sizeof(float));
  float* y = static_cast<float*>(w.y.data) + t * w.y.stride + k;
  if (columns % kLanes == 0) return expand(w, t, k, rows, columns, w.bias ? start : nullptr, y, w.y.stride, ahead);
  expand(w, t, k, rows, columns, w.bias ? start : nullptr, sum, kStride, ahead);
  for (int64_t i = 0; i < rows; ++i) memcpy(y + i * w.y.stride, sum + i * kStride, size_t(columns) * sizeof(float));
}

void write(const Writing& w, int64_t t0, int64_t t1, int64_t k0, int64_t k1, double* stats) {
  alignas(64) float sum[kBlockRows * kStride];
  const bool alone = w.kind == Write::kAdd && w.segments.count == 1 && !w.segments.list[0].threshold, direct = alone && w.y.dtype == kF32;
  for (Walk at(t0, t1, k0, k1); at.more(); at.next()) {
    const int64_t t = at.t(), k = at.k(), rows = at.rows(), columns = at.columns();
    Ahead ahead(w.y, at);
    if (w.kind == Write::kFill) {
      fill_block(w, t, k, rows, columns, ahead, sum);
      continue;
    }
    if (direct && columns == kBlockCols) {
      float* y = static_cast<float*>(w.y.data) + t * w.y.stride;
      expand_segment(w, w.segments.list[0], t, k, rows, columns, true, nullptr, y + k, w.y.stride, ahead);
      continue;
    }
    if (alone && !direct && columns % kWidth == 0) {
      with_format(w.y.dtype, [&](auto format) { add_block<decltype(format)>(w, t, k, rows, columns, ahead); });
      continue;
    }
    if (w.u) expand(w, t, k, rows, columns, nullptr, sum, kStride, ahead);
    with_format(w.y.dtype, [&](auto format) {
      using Format = decltype(format);
      for (int64_t i = 0; i < rows; ++i) {
        const float* row = sum + i * kStride;
        if (w.kind == Write::kAdd) add_row<Format>(w.y, row, t + i, k, columns);
        if (w.kind == Write::kScaleAdd) scale_add_row<Format>(w, row, t + i, k, columns);
        if (w.kind == Write::kMerge) merge_row<Format>(w, row, t + i, k, columns, stats);
      }
    });
  }
}

// ---- adapters, dropout alone, masks ----

void pack(const Matrix& source, int64_t step_p, int64_t step_n, int64_t depth, int64_t n, float scale, float* out, int64_t panel_size,
          int64_t first, int64_t last) {
  with_format(source.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::E*>(source.data);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t columns = least(kWidth, n - panel * kWidth);
      float* to = out + panel * panel_size;
      for (int64_t p = 0; p < depth; p += kWidth)
        pack_square<Format>(from + p * step_p + panel * kWidth * step_n, step_p, step_n, least(kWidth, depth - p), columns, scale,
                            to + p * kWidth);
    }
  });
}

void dropout(const Matrix& x, const Matrix& out, int64_t t0, int64_t t1, uint64_t seed, uint32_t threshold) {
  const Segment s = {0, 0, threshold, 0, 0};
  const F scale = splat(scale_of(threshold));
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    using E = typename Format::E;
    for (int64_t t = t0; t < t1; t += kBlockRows)
      for (int64_t k = 0; k < x.columns; k += kBlockCols) {
        const int64_t rows = least(kBlockRows, t1 - t), columns = least(kBlockCols, x.columns - k);
        for_masked_rows(t, k, rows, columns, x.columns, seed, s, [&](int64_t i, const uint16_t* keep) {
          const E* from = static_cast<const E*>(x.data) + (t + i) * x.stride;
          E* to = static_cast<E*>(out.data) + (t + i) * out.stride + k;
          for (int64_t j = 0; j < columns; j += kLanes) {
            const F f = widen_at<Format>(from + k + j, columns - j) * scale;
            narrow_at<Format>(to + j, masked(f, load<S>(keep + j)), columns - j);
          }
        });
      }
  });
}

void mask(uint16_t* keep, uint64_t first, int64_t n, uint64_t seed, uint32_t stream, uint32_t threshold) {
  const Segment s = {0, 0, threshold, stream, 0};
  alignas(64) uint16_t row[kMaskStride];
  for (int64_t i = 0; i < n; i += kBlockCols) {
    const int64_t columns = least(kBlockCols, n - i);
    const uint64_t e = first + uint64_t(i);
    draw(row, e, 0, 1, columns, seed, s);
    memcpy(keep + i, row + e % 8, size_t(columns) * sizeof(uint16_t));
  }
}

}  // namespace

extern const Kernels FA_CAT(kernels_, FA_ISA);
const Kernels FA_CAT(kernels_, FA_ISA) = {FA_STR(FA_ISA), kWidth, pack, read, write, dropout, mask};

}  // namespace fa::cpu::lowrank
