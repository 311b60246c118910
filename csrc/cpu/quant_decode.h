// (value - zero) * S for a run of one row, rounded once. Only for *_isa.cpp files: everything is in an unnamed namespace.
#pragma once
#include "../core/dtypes.h"
#include "quant_vector.h"

namespace fa::cpu::quant {
namespace {

// Group numbers for at most kPiece columns, one an element or one a group.
struct Piece {
  alignas(64) float groups[kPiece + kLanes], s[kPiece + kLanes], z[kPiece + kLanes];
};

// First group of the piece; their number in `count`.
FA_INLINE int64_t groups_of(const Grid& g, int64_t row, int64_t c0, int64_t c1, int64_t* count) {
  *count = (c1 - 1) / g.columns - c0 / g.columns + 1;
  return row / g.rows * g.wide + c0 / g.columns;
}

FA_INLINE const uint8_t* row_of(const Weight& w, int64_t row) { return w.codes + row * w.row_bytes; }

template <Values kind, int bits, bool high_first>
struct Decoder {
  Lookup<bits> table;
  float first;

  FA_INLINE void set(Decoder& d, const Weight& w) {
    d.first = w.values[0];
    if constexpr (kind == Values::kTable) Lookup<bits>::set(d.table, w.values);
  }
  FA_INLINE F at(const Decoder& d, const uint8_t* row, int64_t i) {
    if constexpr (kind == Values::kTable) return Lookup<bits>::at(d.table, codes_at<bits, high_first, false>(row, i));
    if constexpr (kind == Values::kSigned) return __builtin_convertvector(load_signed(row + i), F);
    return __builtin_convertvector(I(codes_at<bits, high_first, true>(row, i)), F) + splat(d.first);
  }
};

// 256 values.
struct Bytes {
  const float* values;
#if defined(__AVX512BW__)
  Table256 table;
  FA_INLINE void set(Bytes& d, const Weight& w) { d.values = w.values, Table256::set(d.table, w.values); }
#else
  FA_INLINE void set(Bytes& d, const Weight& w) { d.values = w.values; }
#endif
  FA_INLINE F at(const Bytes& d, const uint8_t* row, int64_t i) { return picked_bytes(d.values, row + i); }
};

template <int exponent>
struct Floats {
#if defined(__AVX512BW__)
  Float8Table table;
  FA_INLINE void set(Floats& d, const Weight& w) { Float8Table::set(d.table, w.values); }
#else
  FA_INLINE void set(Floats&, const Weight&) {}
#endif
  FA_INLINE F at(const Floats&, const uint8_t* row, int64_t i) {
    return Float8<exponent>::numbers(H(Float8<exponent>::halves(load_high(row + i))));
  }
};

// Columns [c0, c1), c0 a multiple of 8, whole vectors of codes; the group numbers of each element lie ready.
template <class D, class Format>
void decode_each(const D& d, const uint8_t* row, int64_t c0, int64_t c1, const Piece& p, typename Format::E* out) {
  for (int64_t c = c0; c < c1; c += kLanes) {
    const F f = (D::at(d, row, c) - load<F>(p.z + c - c0)) * load<F>(p.s + c - c0);
    store(out + c - c0, Format::narrow(f));
  }
}

// The same by groups of whole vectors.
template <class D, class Format>
void decode_runs(const D& d, int64_t side, const uint8_t* row, int64_t c0, int64_t c1, const Piece& p, typename Format::E* out) {
  if (side == kLanes) {
    int64_t c = c0, g = 0;
    const auto at = [&](int64_t c, int64_t g) { return (D::at(d, row, c) - splat(p.z[g])) * splat(p.s[g]); };
    for (; c + 2 * kLanes <= c1; c += 2 * kLanes, g += 2) Format::store_pair(out + c - c0, at(c, g), at(c + kLanes, g + 1));
    if (c < c1) store(out + c - c0, Format::narrow(at(c, g)));
    return;
  }
  for (int64_t c = c0, g = 0, next = (c0 / side + 1) * side; c < c1; ++g, next += side) {
    const int64_t end = least(next, c1);
    const F z = splat(p.z[g]), s = splat(p.s[g]);
    for (; c < end; c += kLanes) store(out + c - c0, Format::narrow((D::at(d, row, c) - z) * s));
  }
}

FA_INLINE F as_lanes(F f, F32) { return f; }
template <class Format>
FA_INLINE F as_lanes(F f, Format) {
  return F(__builtin_convertvector(Format::narrow(f), U));
}
FA_INLINE void store_lanes(float* to, F f, F32) { store(to, f); }
template <class Format>
FA_INLINE void store_lanes(uint16_t* to, F f, Format) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i packed = _mm256_packus_epi32(__m256i(f), __m256i(f));
  store(to, H(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08))));
#else
  store(to, __builtin_convertvector(U(f), H));
#endif
}

#if defined(__AVX512BW__)
// 32 elements from c on: every 16-bit lane takes the two bytes its code stands in, moves it down and looks it up. `values`: 16-bit numbers, twice over.
template <int bits, bool high_first>
FA_INLINE __m512i look_up_words(__m512i values, const uint8_t* row, int64_t c) {
  typedef uint16_t Shifts __attribute__((vector_size(64)));
  typedef uint8_t Places __attribute__((vector_size(64)));
  Shifts shift;
  Places place;  // within a 128-bit lane
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) {
    const int bit = (high_first ? i ^ 1 : i) * bits;
    shift[i] = uint16_t(bit % 8);
    place[2 * i] = uint8_t(bit / 8), place[2 * i + 1] = uint8_t(bit / 8 + 1);
  }
  const uint8_t* p = row + c / 8 * bits;
  __m128i some = bits == 4 ? load<__m128i>(p) : _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if constexpr (bits == 3) some = _mm_insert_epi32(some, load<int32_t>(p + 8), 2);
  const __m512i codes = _mm512_maskz_broadcast_i32x4(0xffff, some);
  const __m512i words = _mm512_maskz_shuffle_epi8(~0ull, codes, __m512i(place));
  return _mm512_maskz_permutexvar_epi16(~0u, _mm512_maskz_srlv_epi16(~0u, words, __m512i(shift)), values);
}
#endif

#if defined(__AVX512BW__)
template <Values kind, bool high_first>
FA_INLINE void pair_at(const Decoder<kind, 8, high_first>& d, const uint8_t* p, F* a, F* b) {
  *a = d.at(d, p, 0), *b = d.at(d, p, kLanes);
}
FA_INLINE void pair_at(const Bytes& d, const uint8_t* p, F* a, F* b) { Table256::in_order(d.table, load_wide(p), a, b); }
template <int exponent>
FA_INLINE void pair_at(const Floats<exponent>& d, const uint8_t* p, F* a, F* b) {
  Float8Table::in_order(d.table, load_wide(p), a, b);
}

// Bytes, 32 at a time; a long group's values are rounded in a table, and elements are only looked up. Same bits.
template <class D, class Format>
void decode_pairs(const D& d, const Weight& w, const uint8_t* row, int64_t c0, int64_t c1, const Piece& p, typename Format::E* out) {
  constexpr int64_t kLong = 512;
  const int64_t side = w.grid.columns;
  for (int64_t c = c0, g = 0, next = (c0 / side + 1) * side; c < c1; ++g, next += side) {
    const int64_t end = least(next, c1);
    const F z = splat(p.z[g]), s = splat(p.s[g]);
    if constexpr (sizeof(typename Format::E) == 2) {
      if (end - c >= kLong) {
        alignas(64) uint16_t values[256];
        for (int i = 0; i < 256; i += kLanes) store(values + i, Format::narrow((load<F>(w.values + i) - z) * s));
        Words<256> rounded;
        Words<256>::set(rounded, values);
        for (; c + 32 <= end; c += 32) store(out + c - c0, Words<256>::at(rounded, load_wide(row + c)));
      }
    }
    for (; c + 32 <= end; c += 32) {
      F first, second;
      pair_at(d, row + c, &first, &second);
      Format::store_pair(out + c - c0, (first - z) * s, (second - z) * s);
    }
    for (; c < end; c += kLanes) store(out + c - c0, Format::narrow((D::at(d, row, c) - z) * s));
  }
}
#endif

// With up to 16 values a group they are rounded in the table, and elements are only looked up. Same bits.
template <int bits, bool high_first, class Format>
void decode_groups(const Weight& w, const uint8_t* row, int64_t c0, int64_t c1, const Piece& p, typename Format::E* out) {
  Lookup<bits> values;
  Lookup<bits>::set(values, w.values);
  const int64_t side = w.grid.columns;
  for (int64_t c = c0, g = 0, next = (c0 / side + 1) * side; c < c1; ++g, next += side) {
    const int64_t end = least(next, c1);
    const F z = splat(p.z[g]), s = splat(p.s[g]);
    const auto rounded = Lookup<bits>::map(values, [&](F v) { return as_lanes((v - z) * s, Format{}); });
#if defined(__AVX512BW__)
    if constexpr (sizeof(typename Format::E) == 2) {
      const H half = __builtin_convertvector(U(rounded.low), H);
      const __m512i both = _mm512_maskz_broadcast_i64x4(0xff, __m256i(half));
      for (; c + 32 <= end; c += 32) store(out + c - c0, look_up_words<bits, high_first>(both, row, c));
    }
#endif
    for (; c < end; c += kLanes) store_lanes(out + c - c0, Lookup<bits>::at(rounded, codes_at<bits, high_first, false>(row, c)), Format{});
  }
}

template <class Format>
void decode_one(const Weight& w, const uint8_t* row, int64_t r, int64_t c, typename Format::E* out) {
  alignas(64) float s[kLanes] = {}, z[kLanes] = {};
  const int64_t g = r / w.grid.rows * w.grid.wide + c / w.grid.columns;
  scales_of(w.scales, g, 1, s);
  zeros_of(w, g, 1, z);
  *out = Format::narrow_one((w.values[code_at(row, w.bits, w.flat, c)] - z[0]) * s[0]);
}

template <class D, int bits, bool high_first, class Format>
FA_INLINE void decode_by_group(const D& d, const Weight& w, const uint8_t* row, int64_t c0, int64_t c1, const Piece& p,
                               typename Format::E* out) {
  if constexpr (bits < 8 && kLanes > 4)
    if (w.grid.columns >= 32) return decode_groups<bits, high_first, Format>(w, row, c0, c1, p, out);
#if defined(__AVX512BW__)
  if constexpr (bits == 8) return decode_pairs<D, Format>(d, w, row, c0, c1, p, out);
#endif
  decode_runs<D, Format>(d, w.grid.columns, row, c0, c1, p, out);
}

template <class D, int bits, bool high_first, class Format>
void decode_piece(const Weight& w, int64_t r, int64_t c0, int64_t c1, typename Format::E* out) {
  const uint8_t* row = row_of(w, r);
  // Codes are read in eights, and vectors stored whole: up to there.
  constexpr int64_t step = kLanes > 8 ? kLanes : 8;
  const int64_t whole = c0 + (c1 - c0) / step * step;
  Piece p;
  if (whole > c0) {
    int64_t count;
    const int64_t side = w.grid.columns, g = groups_of(w.grid, r, c0, whole, &count);
    const bool by_group = (side % step == 0 || side >= w.k) && side >= 16 && c0 % step == 0;
    scales_of(w.scales, g, count, by_group ? p.s : p.groups);
    if (!by_group) spread(p.groups, c0, whole - c0, side, p.s);
    zeros_of(w, g, count, by_group ? p.z : p.groups);
    if (!by_group) spread(p.groups, c0, whole - c0, side, p.z);
    D d;
    D::set(d, w);
    if (!by_group)
      decode_each<D, Format>(d, row, c0, whole, p, out);
    else
      decode_by_group<D, bits, high_first, Format>(d, w, row, c0, whole, p, out);
  }
  for (int64_t c = whole; c < c1; ++c) decode_one<Format>(w, row, r, c, out + c - c0);
}

template <class D, int bits, bool high_first, class Format>
void decode_row(const Weight& w, int64_t r, int64_t c0, int64_t c1, typename Format::E* out) {
  typename Format::E* const start = out - c0;
  // Only flat weights, read as one row, start elsewhere than at an eight.
  const int64_t step = kLanes > 8 ? kLanes : 8;
  for (; c0 < c1 && c0 % step; ++c0) decode_one<Format>(w, row_of(w, r), r, c0, start + c0);
  for (; c0 < c1; c0 += kPiece) decode_piece<D, bits, high_first, Format>(w, r, c0, least(c0 + kPiece, c1), start + c0);
}

template <Values kind, int bits, bool high_first, class Format>
void decode_packed(const Weight& w, int64_t r, int64_t c0, int64_t c1, typename Format::E* out) {
  decode_row<Decoder<kind, bits, high_first>, bits, high_first, Format>(w, r, c0, c1, out);
}

template <class Format>
void decode_as(const Weight& w, int64_t r, int64_t c0, int64_t c1, typename Format::E* out) {
  if (w.bits == 8) {
    if (w.kind == Values::kSigned) return decode_packed<Values::kSigned, 8, false, Format>(w, r, c0, c1, out);
    if (w.kind == Values::kUnsigned) return decode_packed<Values::kUnsigned, 8, false, Format>(w, r, c0, c1, out);
#if defined(__F16C__) || defined(__AVX512F__)
    if (w.kind == Values::kE4M3) return decode_row<Floats<4>, 8, false, Format>(w, r, c0, c1, out);
    if (w.kind == Values::kE5M2) return decode_row<Floats<5>, 8, false, Format>(w, r, c0, c1, out);
#endif
    return decode_row<Bytes, 8, false, Format>(w, r, c0, c1, out);
  }
  if (w.flat) return decode_packed<Values::kTable, 4, true, Format>(w, r, c0, c1, out);
  if (w.bits == 4) return decode_packed<Values::kTable, 4, false, Format>(w, r, c0, c1, out);
  if (w.bits == 3) return decode_packed<Values::kTable, 3, false, Format>(w, r, c0, c1, out);
  decode_packed<Values::kTable, 2, false, Format>(w, r, c0, c1, out);
}

}  // namespace
}  // namespace fa::cpu::quant
