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

// 256 values in memory.
struct Bytes {
  const float* values;
  FA_INLINE void set(Bytes& d, const Weight& w) { d.values = w.values; }
  FA_INLINE F at(const Bytes& d, const uint8_t* row, int64_t i) { return picked_bytes(d.values, row + i); }
};

template <int exponent>
struct Floats {
  FA_INLINE void set(Floats&, const Weight&) {}
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
// 32 elements from c on: every 16-bit lane takes the word its code stands in, moves the code down and looks it up. `values`: 16-bit numbers, twice over.
template <int bits, bool high_first>
FA_INLINE __m512i look_up_words(__m512i values, const uint8_t* row, int64_t c) {
  typedef uint16_t Words __attribute__((vector_size(64)));
  typedef uint8_t Places __attribute__((vector_size(64)));
  Words shift;
  Places place;  // within a 128-bit lane
#pragma GCC unroll 32
  for (int i = 0; i < 32; ++i) {
    shift[i] = uint16_t((high_first ? i ^ 1 : i) * bits % 16);
    place[2 * i] = uint8_t(i * bits / 16 * 2), place[2 * i + 1] = uint8_t(place[2 * i] + 1);
  }
  const uint8_t* p = row + c / 8 * bits;
  const __m512i codes =
      bits == 4 ? _mm512_maskz_broadcast_i32x4(0xffff, load<__m128i>(p)) : _mm512_maskz_set1_epi64(0xff, load<int64_t>(p));
  const __m512i words = _mm512_maskz_shuffle_epi8(~0ull, codes, __m512i(place));
  return _mm512_maskz_permutexvar_epi16(~0u, _mm512_maskz_srlv_epi16(~0u, words, __m512i(shift)), values);
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
    if constexpr (sizeof(typename Format::E) == 2 && bits != 3) {
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
void decode_piece(const Weight& w, int64_t r, int64_t c0, int64_t c1, typename Format::E* out) {
  const uint8_t* row = row_of(w, r);
  // Codes are read in eights, and vectors stored whole: up to there.
  constexpr int64_t step = kLanes > 8 ? kLanes : 8;
  const int64_t whole = c0 + (c1 - c0) / step * step;
  Piece p;
  if (whole > c0) {
    int64_t count;
    const int64_t side = w.grid.columns, g = groups_of(w.grid, r, c0, whole, &count);
    const bool by_group = side >= 32 && (side % step == 0 || side >= w.k) && c0 % step == 0;
    scales_of(w.scales, g, count, by_group ? p.s : p.groups);
    if (!by_group) spread(p.groups, c0, whole - c0, side, p.s);
    zeros_of(w, g, count, by_group ? p.z : p.groups);
    if (!by_group) spread(p.groups, c0, whole - c0, side, p.z);
    D d;
    D::set(d, w);
    if (!by_group)
      decode_each<D, Format>(d, row, c0, whole, p, out);
    else if constexpr (bits < 8 && kLanes > 4)
      decode_groups<bits, high_first, Format>(w, row, c0, whole, p, out);
    else
      decode_runs<D, Format>(d, side, row, c0, whole, p, out);
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
