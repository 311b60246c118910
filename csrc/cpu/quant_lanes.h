// Codes where products take them from: a vector of words, whose j-th codes make a vector of numbers. Only for *_isa.cpp files: everything is in an
// unnamed namespace.
//
// Lane d of a block of kLanes words holds `per` neighbouring codes, so x is brought into that order once (`arrange`) and no code is ever moved to
// another lane. A unit is a run of blocks under one scale, or one block whose lanes have scales of their own.
#pragma once
#include "quant_decode.h"

namespace fa::cpu::quant {
namespace {

FA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kWidest = 512;  // columns of a unit at most

struct Layout {
  bool direct;  // else rows are decoded into L1, in their own order
  bool wide;  // one scale per unit
  int64_t per, block, unit, units;  // columns; number of units
  int64_t granule;  // columns of a number in the arrays of scales and zeros
  int64_t side;  // columns of a group
  bool zeros;

  int64_t padded() const { return units * unit; }
  int64_t granules() const { return unit / granule; }
};

Layout layout_of(const Weight& w) {
  Layout a = {};
  const bool rows_apart = !w.flat || (w.k % w.grid.columns == 0 && w.k * w.bits % 8 == 0);
  const bool one_group = !w.flat && w.grid.columns >= w.k;
  a.per = w.bits == 3 ? 1 : 32 / w.bits;
  a.direct = rows_apart && w.bits != 3 && (w.bits != 2 || w.kind == Values::kUnsigned) && (one_group || w.grid.columns % a.per == 0);
  a.block = a.direct ? a.per * kLanes : kLanes;
  a.side = one_group ? int64_t(1) << 40 : w.grid.columns;
  a.wide = a.side % a.block == 0;
  a.unit = a.block;
  while (a.direct && a.wide && a.unit * 2 <= kWidest && a.side % (a.unit * 2) == 0 && a.unit < w.k) a.unit *= 2;
  a.granule = a.wide ? a.unit : a.per;
  a.units = ceil_div(w.k, a.unit);
  a.zeros = w.zero_dtype || (w.kind == Values::kUnsigned && w.values[0] != 0.f);
  return a;
}

// The column of W that stands at place i of an operand's row.
FA_INLINE int64_t column_at(const Weight& w, const Layout& a, int64_t i) {
  if (!a.direct) return i;
  const int64_t j = i % a.block / kLanes, lane = i % kLanes;
  return i / a.block * a.block + lane * a.per + (w.flat && w.bits == 4 ? j ^ 1 : j);
}

template <Values kind, int bits>
struct Lane {
  static constexpr int kPer = 32 / bits;
  // `raw` leaves 4-bit codes in odd places sixteen times too large: half of the shifts are saved.
  static constexpr bool kShifted = kind == Values::kUnsigned && bits == 4;
  Lookup<bits> table;

  FA_INLINE void set(Lane& d, const Weight& w) {
    if constexpr (kind == Values::kTable) Lookup<bits>::set(d.table, w.values);
  }
  FA_INLINE F at(const Lane& d, U word, int j) {
    if constexpr (kind == Values::kTable) {
      const U index = word >> (bits * j);
      return Lookup<bits>::at(d.table, bits == 8 ? index & 255u : index);
    }
    if constexpr (kind == Values::kSigned) return __builtin_convertvector(I(word << (24 - 8 * j)) >> 24, F);
    return __builtin_convertvector(I((word >> (bits * j)) & ((1u << bits) - 1)), F);
  }
  FA_INLINE F raw(const Lane& d, U word, int j) {
    if constexpr (kShifted) return __builtin_convertvector(I((word >> (j / 2 * 8)) & (j % 2 ? 0xf0u : 0x0fu)), F);
    return at(d, word, j);
  }
};

// Calls f(Lane of this weight).
template <class Function>
FA_INLINE void with_lane(const Weight& w, Function f) {
  if (w.bits == 4) return w.kind == Values::kTable ? f(Lane<Values::kTable, 4>{}) : f(Lane<Values::kUnsigned, 4>{});
  if (w.bits == 2) return f(Lane<Values::kUnsigned, 2>{});
  if (w.kind == Values::kTable) return f(Lane<Values::kTable, 8>{});
  return w.kind == Values::kSigned ? f(Lane<Values::kSigned, 8>{}) : f(Lane<Values::kUnsigned, 8>{});
}

constexpr int64_t kChunk = 4096;  // columns at most: x stays in L1 while rows of W go by

// Some units of a row: codes, scales and zeros (less the first value) by granule.
struct Chunk {
  const uint8_t* codes;
  alignas(64) float s[kChunk / 4 + kLanes], z[kChunk / 4 + kLanes];
  alignas(64) uint8_t padded[kChunk + 4 * kLanes];

  void read(const Weight& w, const Layout& a, int64_t row, int64_t c0, int64_t c1) {
    alignas(64) float groups[kChunk / 4 + kLanes];
    const int64_t end = least(c1, w.k), first = c0 / a.side, count = (end - 1) / a.side - first + 1;
    const int64_t g = (w.flat ? row * (w.k / a.side) : row / w.grid.rows * w.grid.wide) + first;
    const int64_t n = ceil_div(end - c0, a.granule), all = ceil_div(end - c0, a.block) * (a.wide ? 1 : kLanes), from = c0 / a.granule;
    scales_of(w.scales, g, count, groups);
    spread(groups, from, n, a.side / a.granule, s);
    if (a.zeros) {
      zeros_of(w, g, count, groups);
      for (int64_t i = 0; w.kind == Values::kUnsigned && i < count; ++i) groups[i] -= w.values[0];
      spread(groups, from, n, a.side / a.granule, z);
    }
    for (int64_t i = n; i < all; ++i) s[i] = z[i] = 0;
    codes = row_of(w, row) + c0 * w.bits / 8;
    if ((end - c0) % a.block) {
      const int64_t bytes = ceil_div((end - c0) * w.bits, 8);
      memcpy(padded, codes, size_t(bytes));
      memset(padded + bytes, 0, 4 * kLanes);
      codes = padded;
    }
  }
};

// One vector of scales or zeros for unit u of a chunk.
template <bool wide>
FA_INLINE F granules_at(const float* numbers, int64_t u) {
  if constexpr (wide) return splat(numbers[u]);
  return load<F>(numbers + u * kLanes);
}

// W[row, c0:c1], in its own order, zeros up to a whole vector.
void decode_floats(const Weight& w, int64_t row, int64_t c0, int64_t c1, float* to) {
  if (w.flat) {
    Weight line = w;
    line.k = w.n * w.k, line.n = 1;
    decode_as<F32>(line, 0, row * w.k + c0, row * w.k + c1, to);
  } else {
    decode_as<F32>(w, row, c0, c1, to);
  }
  for (int64_t i = c1 - c0; i % kLanes; ++i) to[i] = 0;
}

}  // namespace
}  // namespace fa::cpu::quant
