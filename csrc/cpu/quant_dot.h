// x W^T with a low-bit weight for some rows of x: sums over the columns of rows of W, a vector for every row of x. Only for *_isa.cpp files: everything is
// in an unnamed namespace.
#pragma once
#include "quant_lanes.h"

namespace fa::cpu::quant {
namespace {

// Rows of x for which a code becomes a number once: p.t of them in turns of the same size. Their vectors lie alternately, so that one pointer reads
// them all.
constexpr int64_t kTokens = 8;
struct Turns {
  int64_t tokens;
  explicit Turns(const Product& p) : tokens(ceil_div(p.t, ceil_div(p.t, kTokens))) {}
  int64_t count(const Product& p, int64_t first) const { return least(tokens, p.t - first); }
};

constexpr int64_t kRows = 16;  // of W that pass by a chunk of x
// Bytes of codes that memory is asked for in advance, of half of the rows at most: the hardware stops where pages end.
constexpr int64_t kAhead = 4096;

// Rows of W that a vector of x is multiplied with once it is in a register: two where there are registers for their sums.
constexpr int high(int64_t tokens) { return kLanes == 16 && tokens > kFew ? 2 : 1; }

// Some rows of W, codes to ask memory for, and the rows' sums; columns from a unit on.
struct Rows {
  const Chunk* chunk[2];
  const uint8_t* later;
  int64_t row_bytes;
  F* to;
  int64_t stride;
  int64_t unit, in_chunk, blocks;  // unit: of the whole row, and of the chunk
};

// to[t] += W[row, chunk] . x[t, chunk] for T <= kFew rows of x: codes are summed, and scales applied to the sums of a unit.
template <class D, int T, bool wide>
__attribute__((noinline)) void dot_codes(const D& reader, const Layout& a, const Rows& row, const Operand& o, int64_t t0) {
  constexpr int kChains = T == 1 ? 4 : 2;  // additions in flight for each
  const D d = reader;  // and the like: what is read through a reference is read again after every store
  const int64_t most = wide ? a.most : 1, step = a.step, x_step = o.sums_stride;
  const I on = I{} + int(step);
  I place = a.place;
  const bool zeros = a.zeros;
  const float *s_of = row.chunk[0]->s, *z_of = row.chunk[0]->z;
  const uint8_t *codes = row.chunk[0]->codes, *later = row.later;
  const float* x = o.x + t0 * o.stride + row.unit * a.unit * T;
  const float* x_sums = o.sums + t0 * o.sums_stride + row.unit * kLanes;
  F total[T];
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) total[t] = row.to[t];
  for (int64_t u = 0, left = row.blocks; left > 0; ++u, left -= most, x_sums += kLanes) {
    F sum[T][kChains] = {};
    for (int64_t b = wide ? least(most, left) : 1; b > 0; --b, codes += D::kBytes, later += D::kBytes, x += D::kPer * kLanes * T) {
      prefetch_line(later);
      U word = words_at<D>(codes);
      keep(word);
#pragma GCC unroll 16
      for (int part = 0; part < D::kPer / D::kStep; ++part) {
        F v[D::kStep];
        D::raw(d, word, part, v);
#pragma GCC unroll 4
        for (int i = 0; i < D::kStep; ++i) {
          const int j = part * D::kStep + i;
#pragma GCC unroll 2
          for (int t = 0; t < T; ++t) sum[t][j % kChains] = fma(v[i], load<F>(x + (j * T + t) * kLanes), sum[t][j % kChains]);
        }
      }
    }
    const F s = granules_at<wide>(s_of, u, step, place), z = zeros ? granules_at<wide>(z_of, u, step, place) : F{};
    place += on;
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      const F even = kChains == 4 ? sum[t][0] + sum[t][2 % kChains] : sum[t][0];
      const F odd = kChains == 4 ? sum[t][1] + sum[t][3 % kChains] : sum[t][1];
      F all = even + odd;
      if (zeros) all = fma(-z, load<F>(x_sums + t * x_step), all);
      total[t] = fma(s, all, total[t]);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) row.to[t] = total[t];
}

// The same for more: codes become numbers first, which costs as much for many rows of x as for one.
template <class D, int T, bool wide>
__attribute__((noinline)) void dot_values(const D& reader, const Layout& a, const Rows& rows, const Operand& o, int64_t t0) {
  constexpr int kHigh = high(T), kChains = T * kHigh < 8 ? 2 : 1;
  const D d = reader;
  const int64_t most = wide ? a.most : 1, step = a.step, row_bytes = rows.row_bytes;
  const I on = I{} + int(step);
  I place = a.place + int(rows.in_chunk * step);
  const Chunk *const one = rows.chunk[0], *const other = rows.chunk[kHigh - 1];
  const float *const s_of[2] = {one->s, other->s}, *const z_of[2] = {one->z, other->z};
  const int64_t behind = rows.in_chunk * a.most * D::kBytes;
  const uint8_t *codes[2] = {one->codes + behind, other->codes + behind}, *later = rows.later;
  const float* x = o.x + t0 * o.stride + rows.unit * a.unit * T;
  F sum[kHigh][T][kChains] = {};
  for (int64_t u = rows.in_chunk, left = rows.blocks; left > 0; ++u, left -= most, place += on) {
    F s[kHigh], z[kHigh];
#pragma GCC unroll 2
    for (int r = 0; r < kHigh; ++r)
      s[r] = granules_at<wide>(s_of[r], u, step, place), z[r] = a.zeros ? granules_at<wide>(z_of[r], u, step, place) : F{};
    for (int64_t b = wide ? least(most, left) : 1; b > 0; --b, later += D::kBytes, x += D::kPer * kLanes * T) {
      U word[kHigh];
#pragma GCC unroll 2
      for (int r = 0; r < kHigh; ++r) {
        prefetch_line(later + r * row_bytes);
        word[r] = words_at<D>(codes[r]);
        keep(word[r]);
        codes[r] += D::kBytes;
      }
#pragma GCC unroll 16
      for (int part = 0; part < D::kPer / D::kStep; ++part) {
        F v[kHigh][D::kStep];
#pragma GCC unroll 2
        for (int r = 0; r < kHigh; ++r) {
          D::part(d, word[r], part, v[r]);
#pragma GCC unroll 4
          for (int i = 0; i < D::kStep; ++i) v[r][i] = (v[r][i] - z[r]) * s[r];
        }
#pragma GCC unroll 4
        for (int i = 0; i < D::kStep; ++i) {
          const int j = part * D::kStep + i;
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            F x_t = load<F>(x + (j * T + t) * kLanes);
            if (kHigh > 1) keep(x_t);
#pragma GCC unroll 2
            for (int r = 0; r < kHigh; ++r) sum[r][t][j % kChains] = fma(v[r][i], x_t, sum[r][t][j % kChains]);
          }
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kHigh; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int j = 0; j < kChains; ++j) rows.to[r * rows.stride + t] += sum[r][t][j];
}

// Where to ask for codes while those of row n are multiplied: the same columns some rows on; near the end the next columns of the first rows, or the
// first ones of the rows after these. [c, end): of a row of W; rows [n0, n1).
FA_INLINE const uint8_t* later_codes(const Weight& w, int64_t n0, int64_t n1, int64_t n, int64_t c, int64_t end) {
  const int64_t first = c * w.bits / 8, bytes = ceil_div((end - c) * w.bits, 8);
  const int64_t ahead = n + least(ceil_div(kAhead, bytes), ceil_div(n1 - n0, 2));
  if (ahead < n1) return row_of(w, ahead) + first;
  return end < w.k ? row_of(w, ahead - (n1 - n0)) + first + bytes : row_of(w, ahead);
}

template <class D>
using Dot = void (*)(const D&, const Layout&, const Rows&, const Operand&, int64_t);

// Rows [n0, n1), at most kRows; p.t <= kFew sums each, by dots[p.t - 1]. A row is read before the one before it is multiplied: numbers that were just
// stored would be waited for, and codes of later rows meanwhile not be asked for (int4 in groups of 64 with zeros, caches cold: 0.39 ms for 0.30).
template <class D>
void linear_few(const Dot<D>* dots, const Weight& w, const Layout& a, const Product& p, const Operand& o, int64_t n0, int64_t n1, F* to) {
  D d;
  D::set(d, w);
  Chunk chunks[2];
  for (int64_t c = 0; c < w.k; c += kChunk) {
    const Span span(w, a, c, c + kChunk);
    chunks[n0 % 2].read(w, a, span, n0);
    for (int64_t n = n0; n < n1; ++n) {
      span.prefetch(w, n + 2);
      if (n + 1 < n1) chunks[(n + 1) % 2].read(w, a, span, n + 1);
      const Chunk* const chunk = &chunks[n % 2];
      const Rows row = {{chunk, chunk}, later_codes(w, n0, n1, n, c, span.end), w.row_bytes, to + (n - n0) * p.t, p.t, c / a.unit, 0,
                        span.blocks};
      dots[p.t - 1](d, a, row, o, 0);
    }
  }
}

// The same for more rows of x, by dots[their number in a turn - 1], `tall` rows of W at a time: all of these are read first. `bytes`: of a number of x.
template <class D>
void linear_many(const Dot<D>* dots, int64_t tall, int64_t bytes, const Weight& w, const Layout& a, const Product& p, const Operand& o,
                 int64_t n0, int64_t n1, F* to) {
  D d;
  D::set(d, w);
  const Turns turns(p);
  const int64_t step = kChunk / bytes / (turns.tokens <= 4 ? 1 : 2), rows = n1 - n0;
  Chunk chunks[kRows];
  if (rows % 2) chunks[rows].clear();
  for (int64_t c = 0; c < w.k; c += kChunk) {
    const Span span(w, a, c, c + kChunk);
    for (int64_t r = 0; r < rows; ++r) {
      span.prefetch(w, n1 + r);
      chunks[r].read(w, a, span, n0 + r);
    }
    for (int64_t part = c; part < span.end; part += step) {
      const int64_t end = least(part + step, span.end), blocks = ceil_div(end - part, a.block);
      for (int64_t t = 0; t < p.t; t += turns.tokens)
        for (int64_t r = 0; r < rows; r += tall) {
          const Rows these = {{&chunks[r], &chunks[r + 1]},
                              later_codes(w, n0, n1, n0 + r, part, end),
                              w.row_bytes,
                              to + r * p.t + t,
                              p.t,
                              part / a.unit,
                              (part - c) / a.unit,
                              blocks};
          dots[turns.count(p, t) - 1](d, a, these, o, t);
        }
    }
  }
}

template <class D, bool wide>
void linear_as(const Weight& w, const Layout& a, const Product& p, const Operand& o, int64_t n0, int64_t n1, F* to) {
  static constexpr Dot<D> kDots[kTokens] = {dot_codes<D, 1, wide>,  dot_codes<D, 2, wide>,  dot_values<D, 3, wide>, dot_values<D, 4, wide>,
                                            dot_values<D, 5, wide>, dot_values<D, 6, wide>, dot_values<D, 7, wide>, dot_values<D, 8, wide>};
  const int64_t tokens = Turns(p).tokens;
  if (tokens <= kFew) return linear_few(kDots, w, a, p, o, n0, n1, to);
  linear_many(kDots, high(tokens), sizeof(float), w, a, p, o, n0, n1, to);
}

// to[t] += row . x[t] for T rows of x
template <int T>
void dot_numbers(const float* row, int64_t count, const float* x, F* to) {
  constexpr int kChains = T == 1 ? 4 : T <= 4 ? 2 : 1;
  F sum[T][kChains] = {};
  for (int64_t i = 0; i < count; i += kChains * kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) {
      if (j && i + j * kLanes >= count) break;
      const F v = load<F>(row + i + j * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[t][j] = fma(v, load<F>(x + (i + j * kLanes) * T + t * kLanes), sum[t][j]);
    }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
    for (int j = 0; j < kChains; ++j) to[t] += sum[t][j];
}

void linear_decoded(const Weight& w, const Product& p, const Operand& o, int64_t n0, int64_t n1, F* to) {
  constexpr void (*kOf[kTokens])(const float*, int64_t, const float*, F*) = {
      dot_numbers<1>, dot_numbers<2>, dot_numbers<3>, dot_numbers<4>, dot_numbers<5>, dot_numbers<6>, dot_numbers<7>, dot_numbers<8>};
  Numbers numbers;
  const Turns turns(p);
  for (int64_t c = 0; c < w.k; c += kDecoded) {
    const int64_t end = least(c + kDecoded, w.k);
    for (int64_t n = n0; n < n1; ++n) {
      const float* const row = numbers.read(w, n, c, end);
      for (int64_t t = 0; t < p.t; t += turns.tokens) {
        const int64_t count = turns.count(p, t);
        kOf[count - 1](row, end - c, o.x + t * o.stride + c * count, to + (n - n0) * p.t + t);
      }
    }
  }
}

}  // namespace
}  // namespace fa::cpu::quant
