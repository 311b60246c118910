// What the low-rank walks are made of: register-tiled products and dropout masks. Only for *_isa.cpp files: everything is in an unnamed namespace, so
// that the linker cannot merge one instruction set's copy into another's.
#pragma once
#include <type_traits>

#include "lowrank.h"
#include "lowrank_vector.h"
#include "prefetch.h"

namespace fa::cpu::lowrank {
namespace {

constexpr int64_t kStride = kBlockCols + 16;  // of a block in L1; not a power of two, so that a column of it is spread over all sets
constexpr int64_t kMaskRows = 8, kMaskStride = 192;

FA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- what comes next ----

// The blocks of rows [t0, t1), columns [k0, k1), row by row.
class Walk {
 public:
  Walk(int64_t t0, int64_t t1, int64_t k0, int64_t k1) : t_(k0 < k1 ? t0 : t1), k_(k0), t1_(t1), k0_(k0), k1_(k1) {}
  bool more() const { return t_ < t1_; }
  void next() {
    k_ += kBlockCols;
    if (k_ >= k1_) k_ = k0_, t_ += kBlockRows;
  }
  int64_t t() const { return t_; }
  int64_t k() const { return k_; }
  int64_t rows() const { return least(kBlockRows, t1_ - t_); }
  int64_t columns() const { return least(kBlockCols, k1_ - k_); }
  bool ends() const { return k_ + kBlockCols >= k1_; }  // its rows

 private:
  int64_t t_, k_, t1_, k0_, k1_;
};

// The block that is read next, fetched line by line between the products of this one: its rows are too short for the hardware to see them
// coming (3072 x 1536 fp32, two EPYC cores: bwd_x 1.63 ms, so 1.40; bwd_dy 2.71 and 2.19).
class Ahead {
 public:
  Ahead(const Matrix& x, Walk at) {
    at.next();
    if (!at.more()) return;
    const int64_t size = x.dtype == kF32 ? 4 : 2;
    at_ = static_cast<const char*>(x.data) + (at.t() * x.stride + at.k()) * size;
    rows_ = at.rows();
    stride_ = x.stride * size;
    bytes_ = at.columns() * size;
  }
  void fetch(int64_t rows) {
    for (; rows > 0 && rows_ > 0; --rows, --rows_, at_ += stride_)
      for (int64_t i = 0; i < bytes_; i += 64) prefetch_line<0, 2>(at_ + i);
  }

  // One line.
  inline __attribute__((always_inline)) void step() {
    if (rows_ <= 0) return;
    prefetch_line<0, 2>(at_ + line_);
    line_ += 64;
    if (line_ >= bytes_) line_ = 0, at_ += stride_, --rows_;
  }

 private:
  const char* at_ = nullptr;
  int64_t line_ = 0;
  int64_t rows_ = 0, stride_ = 0, bytes_ = 0;
};

// ---- products ----

struct Product {
  const float* a;
  int64_t a_m, a_p;  // steps of a along m and p
  const float* b;
  int64_t b_p, depth;
  int64_t c_m;
  bool add;
  const float* start = nullptr;  // what each row of c begins with; none: zeros
};

// Twelve sums hide the latency of the multiply-add: 6 x 2 vectors, 12 x 1 where one vector is all there is.
#if defined(__AVX512F__)
constexpr int kTall = 12;
#else
constexpr int kTall = 6;
#endif
// Tiles of every height from 1 to 12; beyond kTall, which no caller asks for, the lowest.
#define FA_HEIGHT(M) ((M) <= kTall ? (M) : 1)
#define FA_TILES(T) nullptr, T(1), T(2), T(3), T(4), T(5), T(6), T(7), T(8), T(9), T(10), T(11), T(12)
template <int M, int V>
FA_INLINE void multiply(const Product& g, const float* a, F (&sum)[M][V]) {
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[m][v] = g.start ? load<F>(g.start + v * kLanes) : F{};
  const float* b = g.b;
  const int64_t a_m = g.a_m, a_p = g.a_p, b_p = g.b_p;
#pragma GCC unroll 2
  for (int64_t p = g.depth; p > 0; --p, a += a_p, b += b_p) {
    F right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) right[v] = load<F>(b + v * kLanes);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const F left = splat(a[m * a_m]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = fma(left, right[v], sum[m][v]);
    }
  }
}

// c = the sums, or c +=.
template <int M, int V>
FA_INLINE void leave(const Product& g, const F (&sum)[M][V], float* c) {
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + m * g.c_m + v * kLanes;
      store(to, g.add ? load<F>(to) + sum[m][v] : sum[m][v]);
    }
}

template <int M, int V>
void tile(const Product& g, const float* a, float* c) {
  F sum[M][V];
  multiply<M, V>(g, a, sum);
  leave<M, V>(g, sum, c);
}

#if defined(__AVX512BW__)
// A tile whose right factor lies in 16 bits, kWidth columns of it, rows b_p elements apart: a shuffle widens a vector on its way into the product.
template <class Format, int M>
void tile_from(const Product& g, const float* a, const typename Format::E* b, float* c, Ahead& next) {
  Ahead ahead = next;
  F sum[M][2] = {};
  const int64_t a_m = g.a_m, a_p = g.a_p, b_p = g.b_p;
#pragma GCC unroll 2
  for (int64_t p = g.depth; p > 0; --p, a += a_p, b += b_p) {
    F left, right;
    ahead.step();
    Format::load_pair(b, &left, &right);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const F factor = splat(a[m * a_m]);
      sum[m][0] = fma(factor, left, sum[m][0]);
      sum[m][1] = fma(factor, right, sum[m][1]);
    }
  }
  next = ahead;
  leave<M, 2>(g, sum, c);
}

// A tile whose left factor lies in bf16: each pair of its elements is broadcast as one word, whose halves are the numbers but for a shift and a mask.
// `depth` is even, rows of a lie a_m elements apart.
struct __attribute__((packed, may_alias)) Pair {
  uint32_t word;
};
template <int M, int V>
void tile_of_pairs(const Product& g, const uint16_t* a, float* c, Ahead& next) {
  Ahead ahead = next;
  F sum[M][V] = {};
  const float* b = g.b;
  const int64_t a_m = g.a_m, b_p = g.b_p;
  const U upper = U{} + 0xffff0000u;
  for (int64_t p = 0; p < g.depth; p += 2, b += 2 * b_p) {
    F even[V], odd[V];
    ahead.step();
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) even[v] = load<F>(b + v * kLanes), odd[v] = load<F>(b + b_p + v * kLanes);
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const uint16_t* pair = a + m * a_m + p;
      F first, second;  // in assembly, because GCC shifts and masks the word before it broadcasts it, through a register of the wrong kind
      I word;
      asm("vpbroadcastd %1, %0" : "=v"(word) : "m"(*reinterpret_cast<const Pair*>(pair)));
      first = F(word << 16), second = F(U(word) & upper);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[m][v] = fma(second, odd[v], fma(first, even[v], sum[m][v]));
    }
  }
  next = ahead;
  leave<M, V>(g, sum, c);
}

FA_INLINE void product_of_pairs(const Product& g, const uint16_t* a, int64_t rows, int64_t columns, float* c, Ahead& ahead) {
  using OfPairs = void (*)(const Product&, const uint16_t*, float*, Ahead&);
#define FA_NARROW_PAIRS(M) tile_of_pairs<M, 1>
#define FA_WIDE_PAIRS(M) tile_of_pairs<M, 2>
  static constexpr OfPairs kOfPairs[2][13] = {{FA_TILES(FA_NARROW_PAIRS)}, {FA_TILES(FA_WIDE_PAIRS)}};
  for (int64_t m = 0; m < rows; m += 12) kOfPairs[columns > kLanes][least(12, rows - m)](g, a + m * g.a_m, c + m * g.c_m, ahead);
}

template <class Format>
FA_INLINE void product_from(const Product& g, const typename Format::E* b, int64_t rows, float* c, Ahead& ahead) {
  using From = void (*)(const Product&, const float*, const typename Format::E*, float*, Ahead&);
#define FA_FROM(M) tile_from<Format, M>
  static constexpr From kFrom[] = {FA_TILES(FA_FROM)};
  for (int64_t m = 0; m < rows; m += 12) kFrom[least(12, rows - m)](g, g.a + m * g.a_m, b, c + m * g.c_m, ahead);
}
#endif

// y += the tile, rounded once: kWidth columns of a matrix in 16 bits, rows `c_m` elements apart. `native`: the processor rounds to bf16 itself.
template <class Format, int M>
void tile_onto(const Product& g, const float* a, typename Format::E* y, [[maybe_unused]] bool native) {
  F sum[M][2];
  const int64_t c_m = g.c_m;
  multiply<M, 2>(g, a, sum);
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) {
    F left, right;
    Format::load_pair(y + m * c_m, &left, &right);
    sum[m][0] += left, sum[m][1] += right;
  }
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<Format, BF16>) {
    __mmask32 tiny = native ? 0 : ~__mmask32{0};
#pragma GCC unroll 32
    for (int m = 0; native && m < M; ++m) tiny |= Format::store_pair_native(y + m * c_m, sum[m][0], sum[m][1]);
    if (!tiny) return;
  }
#endif
#pragma GCC unroll 32
  for (int m = 0; m < M; ++m) Format::store_pair(y + m * c_m, sum[m][0], sum[m][1]);
}

using Tile = void (*)(const Product&, const float*, float*);
#define FA_NARROW(M) tile<M, 1>
#define FA_WIDE(M) tile<FA_HEIGHT(M), 2>
const Tile kNarrow[] = {FA_TILES(FA_NARROW)}, kWide[] = {FA_TILES(FA_WIDE)};

// Rows [first, first + rows) of a. `columns` <= kWidth of c; up to the next multiple of kLanes are written.
void product(const Product& g, int64_t rows, int64_t columns, float* c, int64_t first = 0) {
  const bool wide = columns > kLanes;
  const int64_t tall = wide ? kTall : 12;
  for (int64_t m = 0; m < rows; m += tall) (wide ? kWide : kNarrow)[least(tall, rows - m)](g, g.a + (first + m) * g.a_m, c + m * g.c_m);
}

// kWidth columns of y, `rows` <= kTall of them.
template <class Format>
FA_INLINE void product_onto(const Product& g, int64_t rows, typename Format::E* y, bool native) {
  using Onto = void (*)(const Product&, const float*, typename Format::E*, bool);
#define FA_ONTO(M) tile_onto<Format, FA_HEIGHT(M)>
  static constexpr Onto kOnto[] = {FA_TILES(FA_ONTO)};
  kOnto[rows](g, g.a, y, native);
}

// ---- adapters ----

// `depth` rows of a panel, `n` of its columns and zeros beyond.
template <class Format>
FA_INLINE void pack_square(const typename Format::E* from, int64_t step_p, int64_t step_n, int64_t depth, int64_t n, float scale,
                           float* to) {
  const auto vector = [&](const typename Format::E* at, int64_t left) {
    return left > 0 ? widen_at<Format>(at, left) * splat(scale) : F{};
  };
  if (step_n == 1) {
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t j = 0; j < kWidth; j += kLanes) store(to + p * kWidth + j, vector(from + p * step_p + j, n - j));
  } else if (step_p == 1) {
    for (int64_t j = 0; j < kWidth; j += kLanes)
      for (int64_t p = 0; p < depth; p += kLanes) {
        F square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = vector(from + (j + i) * step_n + p, j + i < n ? depth - p : 0);
        transpose(square);
        for (int i = 0; i < least(kLanes, depth - p); ++i) store(to + (p + i) * kWidth + j, square[i]);
      }
  } else {
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t j = 0; j < kWidth; ++j) to[p * kWidth + j] = j < n ? Format::widen_one(from[p * step_p + j * step_n]) * scale : 0.f;
  }
}

// ---- dropout ----

constexpr int kBatch = 2;  // groups of counters in flight
typedef uint16_t Halves __attribute__((vector_size(8 * kCounters)));

struct Keys {
  W k0[10], k1[10];
};

FA_INLINE void set_keys(Keys& keys, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    keys.k0[round] = W{} + k0;
    keys.k1[round] = W{} + k1;
  }
}

// Where the kCounters blocks from `start` on go.
struct Group {
  uint64_t start;
  uint16_t* to;
};

void draw_batch(const Group* groups, const Keys& keys, uint32_t stream, uint32_t threshold) {
  W c0[kBatch], c1[kBatch], c2[kBatch], c3[kBatch];
#pragma GCC unroll 4
  for (int i = 0; i < kBatch; ++i) {
    c0[i] = counters(groups[i].start);
    c1[i] = c0[i] >> 32;
    c2[i] = W{} + stream;
    c3[i] = W{};
  }
  const W m0 = W{} + 0xD2511F53u, m1 = W{} + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round)
#pragma GCC unroll 4
    for (int i = 0; i < kBatch; ++i) {
      const W x = multiply_low(c0[i], m0), y = multiply_low(c2[i], m1);
      c0[i] = (y >> 32) ^ c1[i] ^ keys.k0[round];
      c2[i] = (x >> 32) ^ c3[i] ^ keys.k1[round];
      c1[i] = y;
      c3[i] = x;
    }
  const Halves bar = Halves{} + uint16_t(threshold);
#pragma GCC unroll 4
  for (int i = 0; i < kBatch; ++i) {
    const W low = W{} + 0xffffffffu;
    W words[2];
    words_in_order((c0[i] & low) | (c1[i] << 32), (c2[i] & low) | (c3[i] << 32), words);
    store(groups[i].to, Halves(Halves(words[0]) >= bar));
    store(groups[i].to + 4 * kCounters, Halves(Halves(words[1]) >= bar));
  }
}

// keep[r * kMaskStride + shift(r) + j] = all ones where element first + r * row_step + j of the segment is kept; shift(r): that first element modulo 8.
void draw(uint16_t* keep, uint64_t first, int64_t row_step, int64_t rows, int64_t columns, uint64_t seed, const Segment& s) {
  constexpr int kMost = int(kMaskStride / (8 * kCounters));
  Group groups[kMaskRows * kMost + kBatch];
  alignas(64) uint16_t nowhere[8 * kCounters];
  int count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t e = first + uint64_t(r * row_step);
    for (uint64_t block = e / 8; block <= (e + uint64_t(columns) - 1) / 8; block += kCounters)
      groups[count++] = {block, keep + r * kMaskStride + int64_t(block - e / 8) * 8};
  }
  while (count % kBatch) groups[count++] = {0, nowhere};
  Keys keys;
  set_keys(keys, seed);
  for (int i = 0; i < count; i += kBatch) draw_batch(groups + i, keys, s.stream, s.threshold);
}

// Flags of 16 columns as bits, and back.
FA_INLINE uint16_t to_bits(const uint16_t* keep) {
#if defined(__x86_64__)
  return uint16_t(_mm_movemask_epi8(_mm_packs_epi16(load<__m128i>(keep), load<__m128i>(keep + 8))));
#else
  uint16_t bits = 0;
  for (int i = 0; i < 16; ++i) bits = uint16_t(bits | (keep[i] & 1) << i);
  return bits;
#endif
}
FA_INLINE void from_bits(uint16_t bits, uint16_t* keep) {
  typedef uint16_t Sixteen __attribute__((vector_size(32)));
  const Sixteen one = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const Sixteen flags = Sixteen(((Sixteen{} + bits) & one) == one);
  memcpy(keep, &flags, sizeof flags);
}

// One block's masks, kMaskRows rows at a time: calls f(row of the block, its keep flags).
template <class Function>
FA_INLINE void for_masked_rows(int64_t t, int64_t k, int64_t rows, int64_t columns, int64_t total, uint64_t seed, const Segment& s,
                               Function f) {
  alignas(64) uint16_t keep[kMaskRows * kMaskStride];
  const bool stored = s.bits && k % 16 == 0;
  for (int64_t r = 0; r < rows; r += kMaskRows) {
    const int64_t n = least(kMaskRows, rows - r);
    const uint64_t first = uint64_t((t + r) * total + k);
    if (!stored || !s.known) draw(keep, first, total, n, columns, seed, s);
    for (int64_t i = 0; i < n; ++i) {
      uint16_t* flags = keep + i * kMaskStride;
      uint8_t* bits = stored ? s.bits + (t + r + i) * s.bits_stride + k / 8 : nullptr;
      if (stored && s.known)
        for (int64_t j = 0; j < columns; j += 16) from_bits(load<uint16_t>(bits + j / 8), flags + j);
      else
        flags += (first + uint64_t(i * total)) % 8;
      if (stored && !s.known)
        for (int64_t j = 0; j < columns; j += 16) store(bits + j / 8, to_bits(flags + j));
      f(r + i, flags);
    }
  }
}

}  // namespace
}  // namespace fa::cpu::lowrank
