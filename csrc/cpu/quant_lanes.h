// Codes where products take them from: a vector of words, whose j-th codes make a vector of numbers. Only for *_isa.cpp files: everything is in an
// unnamed namespace.
//
// Lane d of a block of kLanes words holds `per` neighbouring codes, so x is brought into that order once (`arrange`) and no code is ever moved to
// another lane. A unit is a run of blocks under one scale, or one block whose lanes have scales of their own.
#pragma once
#include "prefetch.h"
#include "quant_decode.h"

namespace fa::cpu::quant {
namespace {

FA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Stays in its register: compilers load a vector anew for every use of it, as if memory cost nothing.
template <class V>
FA_INLINE void keep([[maybe_unused]] V& word) {
#if defined(__AVX512F__)
  asm("" : "+v"(word));
#elif defined(__AVX2__)
  asm("" : "+x"(word));
#endif
}

#if defined(__AVX512F__)
constexpr bool kWoven = false, kIntegersAsTable = true;
#elif defined(__AVX2__)
constexpr bool kWoven = true, kIntegersAsTable = false;
#else
constexpr bool kWoven = false, kIntegersAsTable = false;
#endif
constexpr int64_t kWidest = 512;  // columns of a unit at most
constexpr int64_t kFew = 2;  // rows of x for which codes are summed, and the sums scaled

struct Layout {
  bool direct;  // else rows are decoded into L1, in their own order
  bool running;  // groups of a flat weight go on from row to row
  bool wide;  // one scale per unit
  bool table;  // codes are looked up, integers too where that is one instruction
  bool woven;  // numbers in the order of Planes, ByteRun or FloatLane: lanes of 32 columns must share a scale
  int64_t per, block, unit, units;  // columns; number of units
  int64_t most;  // blocks of a unit
  int64_t granule;  // columns of a number in the arrays of scales and zeros, unless they hold one a group
  bool by_group;  // numbers of a block's groups lie side by side, and a shuffle brings them to the lanes: units are blocks of whole groups
  int64_t step;  // numbers of a block, if not wide
  I place;  // of a lane's number among them
  int64_t side;  // columns of a group
  bool zeros;
  bool sixteenfold;  // the lanes' `raw` gives codes in odd places sixteen times too large, so even places of x are made so, too

  int64_t padded() const { return units * unit; }
  int64_t granules() const { return unit / granule; }
};

// `tokens`: for which a code becomes a number once.
Layout layout_of(const Weight& w, int64_t tokens = 1) {
  Layout a = {};
  a.running = w.flat && w.k % w.grid.columns != 0;
  const bool one_group = !w.flat && w.grid.columns >= w.k;
  a.per = w.bits == 3 ? 8 : 32 / w.bits;
  const bool rows_apart = !w.flat || (w.k * w.bits % 8 == 0 && (!a.running || w.k % a.per == 0));
  a.direct = !w.decoded && rows_apart && (one_group || w.grid.columns % a.per == 0);
  a.block = a.direct ? a.per * kLanes : kLanes;
  a.side = one_group ? int64_t(1) << 40 : w.grid.columns;
  a.wide = a.side % a.block == 0 && !a.running;
  a.unit = a.block;
  while (a.direct && a.wide && a.unit * 2 <= kWidest && a.side % (a.unit * 2) == 0 && a.unit < w.k) a.unit *= 2;
  a.most = a.unit / a.block;
  a.granule = a.wide ? a.unit : a.per;
  a.units = ceil_div(w.k, a.unit);
  const bool floats = w.kind == Values::kE4M3 || w.kind == Values::kE5M2;
  a.woven = kWoven && a.direct && a.side % 32 == 0 && (!a.running || w.k % 32 == 0) && ((w.bits > 3 && w.kind == Values::kTable) || floats);
  a.table = w.kind == Values::kTable || w.bits == 3 || (kIntegersAsTable && w.bits < 8);
  const bool off = !a.table && w.kind == Values::kUnsigned && w.values[0] != 0.f;
  a.sixteenfold = !a.table && a.direct && w.bits == 4 && w.kind == Values::kUnsigned && tokens <= kFew;
  a.zeros = w.zero_dtype || off;
  a.by_group = kLanes > 4 && a.direct && !a.wide && !a.running && a.block % a.side == 0;
  a.step = a.by_group ? a.block / a.side : kLanes;
  for (int i = 0; i < kLanes; ++i) a.place[i] = a.by_group ? int32_t(i * a.per / a.side) : i;
  return a;
}

// Which column of a block of W stands at each place of an operand's block.
struct Places {
  int32_t column[16 * kLanes];

  Places(const Weight& w, const Layout& a) {
    const int swap = w.flat && w.bits == 4 ? 1 : 0;
    for (int i = 0; i < int(a.block); ++i) {
      const int j = i / kLanes, lane = i % kLanes;
      if (a.woven)
        column[i] = w.bits == 8 ? lane / 8 * 32 + j * 8 + lane % 8 : (lane % 4 + j % 4 * 4 + lane / 4 * 16) * 2 + (j / 4 ^ swap);
      else
        column[i] = a.direct ? lane * int(a.per) + (j ^ swap) : i;
    }
  }
};

// The words of a block of D::kBytes: of 32 bits, or of 24, whose codes are of 3.
template <class D>
FA_INLINE U words_at(const uint8_t* p) {
  if constexpr (D::kBytes == 4 * kLanes) return load<U>(p);
#if defined(__AVX512BW__)
  // Three dwords for each quarter, then three bytes for each word.
  const __m512i dwords = _mm512_inserti32x4(_mm512_castsi256_si512(load<__m256i>(p)), load<__m128i>(p + 32), 2);
  const __m512i quarters =
      _mm512_maskz_permutexvar_epi32(0xffff, _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), dwords);
  return U(_mm512_maskz_shuffle_epi8(0x7777777777777777, quarters, _mm512_set4_epi32(0x000b0a09, 0x00080706, 0x00050403, 0x00020100)));
#elif defined(__AVX2__)
  const __m256i halves = _mm256_set_m128i(load<__m128i>(p + 8), load<__m128i>(p));
  return U(_mm256_shuffle_epi8(
      halves, _mm256_setr_epi32(0x80020100, 0x80050403, 0x80080706, 0x800b0a09, 0x80060504, 0x80090807, 0x800c0b0a, 0x800f0e0d)));
#else
  return U{eight<3>(p), eight<3>(p + 3), eight<3>(p + 6), eight<3>(p + 9)};
#endif
}

// How words become numbers, kStep vectors at a time. `raw`: see Layout::sixteenfold; half of the shifts are saved.
template <Values kind, int bits>
struct Lane {
  static constexpr int kPer = bits == 3 ? 8 : 32 / bits, kStep = 1, kBytes = kPer * bits / 8 * kLanes;
  Lookup<bits> table;

  FA_INLINE void set(Lane& d, const Weight& w) {
    if constexpr (kind == Values::kTable) Lookup<bits>::set(d.table, w.values);
  }
  FA_INLINE F at(const Lane& d, U word, int j) {
    if constexpr (kind == Values::kTable) return Lookup<bits>::at(d.table, word >> (bits * j));
    if constexpr (kind == Values::kSigned) return __builtin_convertvector(I(word << (24 - 8 * j)) >> 24, F);
    return __builtin_convertvector(I((word >> (bits * j)) & ((1u << bits) - 1)), F);
  }
  FA_INLINE void part(const Lane& d, U word, int j, F* v) { *v = at(d, word, j); }
  FA_INLINE void raw(const Lane& d, U word, int j, F* v) {
    if constexpr (kind == Values::kUnsigned && bits == 4) {
      *v = __builtin_convertvector(I((word >> (j / 2 * 8)) & (j % 2 ? 0xf0u : 0x0fu)), F);
    } else {
      *v = at(d, word, j);
    }
  }
};

// 16 values byte by byte, which AVX2 looks up 32 at a time: half the work of its lookups of whole numbers. The bytes are woven into numbers within
// 128-bit halves, so a half must have one scale.
#if defined(__AVX2__) && !defined(__AVX512F__)
struct Planes {
  static constexpr int kPer = 8, kStep = 4, kBytes = 4 * kLanes;
  __m256i bytes[4];

  FA_INLINE void set(Planes& d, const Weight& w) {
    for (int b = 0; b < 4; ++b) {
      uint8_t plane[32];
      for (int i = 0; i < 32; ++i) plane[i] = uint8_t(as_bits(w.values[i % 16]) >> (8 * b));
      d.bytes[b] = load<__m256i>(plane);
    }
  }
  // Low nibbles, then high ones.
  FA_INLINE void part(const Planes& d, U word, int h, F* v) {
    const __m256i index = __m256i((h ? word >> 4 : word) & 0x0f0f0f0fu);
    __m256i p[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) p[b] = _mm256_shuffle_epi8(d.bytes[b], index);
    const __m256i low0 = _mm256_unpacklo_epi8(p[0], p[1]), high0 = _mm256_unpacklo_epi8(p[2], p[3]);
    const __m256i low1 = _mm256_unpackhi_epi8(p[0], p[1]), high1 = _mm256_unpackhi_epi8(p[2], p[3]);
    v[0] = F(_mm256_unpacklo_epi16(low0, high0));
    v[1] = F(_mm256_unpackhi_epi16(low0, high0));
    v[2] = F(_mm256_unpacklo_epi16(low1, high1));
    v[3] = F(_mm256_unpackhi_epi16(low1, high1));
  }
  FA_INLINE void raw(const Planes& d, U word, int h, F* v) { part(d, word, h, v); }
};
#endif

// 256 values.
struct ByteLane {
#if defined(__AVX512BW__)
  static constexpr int kPer = 4, kStep = 4, kBytes = 4 * kLanes;
  Table256 table;

  FA_INLINE void set(ByteLane& d, const Weight& w) { Table256::set(d.table, w.values); }
  FA_INLINE void part(const ByteLane& d, U word, int, F* v) {
    Table256::at(d.table, __m512i(word), &v[0], &v[2]);
    Table256::at(d.table, __m512i(word >> 8), &v[1], &v[3]);
  }
#else
  static constexpr int kPer = 4, kStep = 1, kBytes = 4 * kLanes;
  const float* values;

  FA_INLINE void set(ByteLane& d, const Weight& w) { d.values = w.values; }
  FA_INLINE void part(const ByteLane& d, U word, int j, F* v) { *v = picked(d.values, (word >> (8 * j)) & 255u); }
#endif
  FA_INLINE void raw(const ByteLane& d, U word, int j, F* v) { part(d, word, j, v); }
};

#if defined(__AVX512BW__)
struct Float8Lane {
  static constexpr int kPer = 4, kStep = 4, kBytes = 4 * kLanes;
  Float8Table table;

  FA_INLINE void set(Float8Lane& d, const Weight& w) { Float8Table::set(d.table, w.values); }
  FA_INLINE void part(const Float8Lane& d, U word, int, F* v) {
    const U even = U(Float8Table::at(d.table, __m512i(word), __m512i(word << 8))),
            odd = U(Float8Table::at(d.table, __m512i(word >> 8), __m512i(word)));
    v[0] = F(even << 16), v[1] = F(odd << 16), v[2] = F(even & 0xffff0000u), v[3] = F(odd & 0xffff0000u);
  }
  FA_INLINE void raw(const Float8Lane& d, U word, int h, F* v) { part(d, word, h, v); }
};
#elif defined(__AVX2__)
// The same, in the bytes' own order.
struct ByteRun {
  static constexpr int kPer = 4, kStep = 4, kBytes = 4 * kLanes;
  const float* values;

  FA_INLINE void set(ByteRun& d, const Weight& w) { d.values = w.values; }
  FA_INLINE void part(const ByteRun& d, U word, int, F* v) {
    typedef uint64_t Eights __attribute__((vector_size(4 * kLanes)));
    const Eights eights = Eights(word);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) v[i] = picked_eight(d.values, eights[i]);
  }
  FA_INLINE void raw(const ByteRun& d, U word, int h, F* v) { part(d, word, h, v); }
};

template <int exponent>
struct FloatLane {
  static constexpr int kPer = 4, kStep = 4, kBytes = 4 * kLanes;
  using Code = Float8<exponent>;

  FA_INLINE void set(FloatLane&, const Weight&) {}
  // Bytes of one half of every 32, woven with zeros, make a vector.
  FA_INLINE void part(const FloatLane&, U word, int, F* v) {
    typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
    const auto low = __m256i(Code::halves(Shorts(_mm256_unpacklo_epi8(__m256i{}, __m256i(word)))));
    const auto high = __m256i(Code::halves(Shorts(_mm256_unpackhi_epi8(__m256i{}, __m256i(word)))));
    v[0] = Code::numbers(H(_mm256_castsi256_si128(low)));
    v[1] = Code::numbers(H(_mm256_castsi256_si128(high)));
    v[2] = Code::numbers(H(_mm256_extracti128_si256(low, 1)));
    v[3] = Code::numbers(H(_mm256_extracti128_si256(high, 1)));
  }
  FA_INLINE void raw(const FloatLane& d, U word, int h, F* v) { part(d, word, h, v); }
};
#endif

// Calls f(a reader of this weight's words).
template <class Function>
FA_INLINE void with_lane(const Weight& w, const Layout& a, Function f) {
#if defined(__AVX512BW__)
  if (w.kind == Values::kE4M3 || w.kind == Values::kE5M2) return f(Float8Lane{});
#elif defined(__AVX2__)
  if (a.woven && w.kind == Values::kE4M3) return f(FloatLane<4>{});
  if (a.woven && w.kind == Values::kE5M2) return f(FloatLane<5>{});
  if (a.woven) return w.bits == 8 ? f(ByteRun{}) : f(Planes{});
#endif
  if (w.bits == 4 && a.table) return f(Lane<Values::kTable, 4>{});
  if (w.bits == 3) return f(Lane<Values::kTable, 3>{});
  if (w.bits == 4) return f(Lane<Values::kUnsigned, 4>{});
  if (w.bits == 2) return a.table ? f(Lane<Values::kTable, 2>{}) : f(Lane<Values::kUnsigned, 2>{});
  if (w.kind == Values::kSigned) return f(Lane<Values::kSigned, 8>{});
  return w.kind == Values::kUnsigned ? f(Lane<Values::kUnsigned, 8>{}) : f(ByteLane{});
}

constexpr int64_t kChunk = 4096;  // columns at most: x stays in L1 while rows of W go by

// Columns [c0, end) of W, a whole number of units before the last: what its rows have in common. Divisions are dear, so that none is left to them.
struct Span {
  int64_t c0, end, blocks;
  int64_t first, count, row_groups;  // groups; of a row in flat formats
  int64_t side;  // columns of a group if they run on from row to row, else 0
  int64_t start, given, all;  // granules before c0; in a row; with those that fill up the last block
  int64_t apart;  // granules of a group
  bool whole, direct;  // ends with a block; scales are read where they lie

  Span(const Weight& w, const Layout& a, int64_t from, int64_t to)
      : c0(from),
        end(least(to, w.k)),
        blocks(ceil_div(end - c0, a.block)),
        first(c0 / a.side),
        count((end - 1) / a.side - first + 1),
        row_groups(w.k / a.side),
        side(a.running ? a.side : 0),
        start(c0 / a.granule),
        all(blocks * (a.wide ? 1 : a.step)),
        apart(a.by_group ? 1 : a.side / a.granule),
        whole((end - c0) % a.block == 0) {
    // Woven lanes stand for all of its 32 columns, also where the row ends among them.
    const int64_t granules = a.woven && !a.wide ? ceil_div(end - c0, 32) * (32 / a.per) : ceil_div(end - c0, a.granule);
    given = a.by_group ? count : granules;
    direct = a.wide && apart == 1 && w.scales.coding == Coding::kPlain && w.scales.dtype == kF32;
  }

  // The groups of a row here: the first one, their number, and the granule of a group with which the row begins.
  struct Groups {
    int64_t first, count, start;
  };
  Groups groups(const Weight& w, int64_t row) const {
    if (side) {
      const int64_t from = row * w.k + c0, g = from / side;
      return {g, (from + end - c0 - 1) / side - g + 1, from % side * apart / side};
    }
    const int64_t line = w.flat ? row * row_groups : (w.grid.rows == 1 ? row : row / w.grid.rows) * w.grid.wide;
    return {line + first, count, start};
  }

  // Asks for a row's scales and zeros: a stream of them that the hardware follows ends with every page.
  void prefetch(const Weight& w, int64_t row) const {
    const Groups g = groups(w, row);
    const auto lines = [&](const void* numbers, int64_t size) {
      const char* p = static_cast<const char*>(numbers) + g.first * size;
      for (int64_t i = 0; i < g.count * size; i += 64) prefetch_line(p + i);
    };
    lines(w.scales.data, w.scales.coding == Coding::kPlain ? dtype_size(w.scales.dtype) : 1);
    if (w.zero_dtype) lines(w.zero, dtype_size(w.zero_dtype));
  }
};

// Some units of a row: codes, scales and zeros (less the first value) by granule.
struct Chunk {
  const uint8_t* codes;
  const float *s, *z;
  alignas(64) float own_s[kChunk / 4 + kLanes], own_z[kChunk / 4 + kLanes];
  alignas(64) uint8_t padded[kChunk + 4 * kLanes];

  // One number a granule from those of groups, which `fill` writes.
  template <class Fill>
  FA_INLINE void place(const Span& c, int64_t start, float* to, Fill fill) {
    if (c.apart == 1) {
      fill(to);
    } else {
      alignas(64) float groups[kChunk / 4 + kLanes];
      fill(groups);
      spread(groups, start, c.given, c.apart, to);
    }
    for (int64_t i = c.given; i < c.all; ++i) to[i] = 0;
  }

  __attribute__((noinline)) void read(const Weight& w, const Layout& a, const Span& c, int64_t row) {
    const Span::Groups g = c.groups(w, row);
    s = c.direct ? static_cast<const float*>(w.scales.data) + g.first : own_s;
    if (!c.direct) place(c, g.start, own_s, [&](float* to) { scales_of(w.scales, g.first, g.count, to); });
    z = own_z;
    if (a.zeros)
      place(c, g.start, own_z, [&](float* to) {
        zeros_of(w, g.first, g.count, to);
        for (int64_t i = 0; w.kind == Values::kUnsigned && !a.table && i < g.count; ++i) to[i] -= w.values[0];
      });
    codes = row_of(w, row) + c.c0 * w.bits / 8;
    if (!c.whole) {
      const int64_t bytes = ceil_div((c.end - c.c0) * w.bits, 8);
      memcpy(padded, codes, size_t(bytes));
      memset(padded + bytes, 0, 4 * kLanes);
      codes = padded;
    }
  }

  // A row that adds nothing to a sum, whatever stands in W.
  void clear() {
    memset(own_s, 0, sizeof own_s), memset(own_z, 0, sizeof own_z), memset(padded, 0, sizeof padded);
    s = own_s, z = own_z, codes = padded;
  }
};

// One vector of scales or zeros for unit u of a chunk. `place`: where lanes find theirs, u * step further than in unit 0; of it only the low bits count.
// Whole vectors are read from where whole ones were written, which processors pass on without waiting for memory.
template <bool wide>
FA_INLINE F granules_at(const float* numbers, int64_t u, int64_t step, [[maybe_unused]] I place) {
  if constexpr (wide) return splat(numbers[u]);
  const F f = load<F>(numbers + (u * step & -int64_t(kLanes)));
#if defined(__AVX512F__)
  return F(_mm512_maskz_permutexvar_ps(0xffff, __m512i(place), __m512(f)));
#elif defined(__AVX2__)
  return F(_mm256_permutevar8x32_ps(__m256(f), __m256i(place)));
#else
  return f;
#endif
}

// W[row, c0:c1], in its own order, zeros up to a whole vector: in `own`. Rows of flat weights begin anywhere; whole vectors around them are decoded.
constexpr int64_t kDecoded = kPiece - 2 * kLanes;  // columns at most
struct Numbers {
  alignas(64) float own[kPiece + kLanes];

  float* read(const Weight& w, int64_t row, int64_t c0, int64_t c1) {
    float* const first = own + (w.flat ? decode_flat(w, row * w.k + c0, row * w.k + c1) : 0);
    if (!w.flat) decode_as<F32>(w, row, c0, c1, own);
    for (int64_t i = c1 - c0; i % kLanes; ++i) first[i] = 0;
    return first;
  }

 private:
  // Where the first one stands.
  int64_t decode_flat(const Weight& w, int64_t from, int64_t to) {
    Weight line = w;
    line.k = w.n * w.k, line.n = 1;
    const int64_t start = from / kLanes * kLanes;
    decode_as<F32>(line, 0, start, least(ceil_div(to, kLanes) * kLanes, line.k), own);
    return from - start;
  }
};

}  // namespace
}  // namespace fa::cpu::quant
