// p', s' = rule(p, g, s): one pass over memory for any rule, storage type and option. Compiled once per instruction set (FA_ISA).
// Bytes per fp32 Adam parameter: reads p, g, m, v (16), writes p, m, v (12). Memory bound: expect the machine's copy rate.
//
// Work goes tile by tile: a tile of a 16-bit array is widened into an L1 buffer, an fp32 array is used in place, the rule runs over
// the tile in fp32 (vectorised), and what was widened is rounded back once.
#include "../core/dtypes.h"
#include "../core/philox.h"
#include "../core/rules.h"
#include "optim.h"
#include "optim_pairs.h"
#include "prefetch.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)
#define FA_STR2(a) #a
#define FA_STR(a) FA_STR2(a)

namespace fa::cpu {
namespace {

using Keep = uint32_t;  // all ones: trainable, zero: frozen

template <class To, class From, class Convert>
FA_HD void convert(To* __restrict out, const From* __restrict in, int n, Convert f) {
  for (int i = 0; i < n; ++i) out[i] = f(in[i]);
}

// Chosen bit by bit: a conditional store becomes a masked one, which costs AMD processors 20 cycles and more.
FA_HD float choose(Keep keep, float fresh, float old) { return as_float((as_bits(fresh) & keep) | (as_bits(old) & ~keep)); }
FA_HD float choose(bool keep, float fresh, float old) { return keep ? fresh : old; }  // of values that have both been read
FA_HD uint16_t choose(Keep keep, uint16_t fresh, uint16_t old) { return uint16_t((fresh & keep) | (old & ~keep)); }

// Rounded stores write frozen elements' own bits back.
template <class To, class Convert>
FA_HD void store_kept(To* __restrict out, const float* __restrict in, const Keep* keep, int n, Convert f) {
  if (!keep) return convert(out, in, n, f);
  for (int i = 0; i < n; ++i) out[i] = choose(keep[i], f(in[i]), out[i]);
}

#if defined(__F16C__)
// GCC does not vectorise the scalar conversions.
void widen_half(float* out, const uint16_t* in, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = half_to_float(in[i]);
}
void narrow_half(uint16_t* out, const float* in, const Keep* keep, int n) {
  int i = 0;
  for (; !keep && i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
  store_kept(out + i, in + i, keep ? keep + i : nullptr, n - i, [](float f) { return float_to_half(f); });
}
#else
void narrow_half(uint16_t* out, const float* in, const Keep* keep, int n) {
  store_kept(out, in, keep, n, [](float f) { return float_to_half(f); });
}
void widen_half(float* out, const uint16_t* in, int n) {
  convert(out, in, n, [](uint16_t h) { return half_to_float(h); });
}
#endif

// A tile of an array as fp32: the array itself, or the buffer it was widened into.
float* load_tile(void* base, int dtype, int64_t offset, int n, float* buffer) {
  if (dtype == kF32) return static_cast<float*>(base) + offset;
  const uint16_t* in = static_cast<const uint16_t*>(base) + offset;
  if (dtype == kBF16) convert(buffer, in, n, [](uint16_t h) { return bf16_to_float(h); });
  if (dtype == kF16) widen_half(buffer, in, n);
  return buffer;
}

void store_tile(void* base, int dtype, int64_t offset, int n, const float* tile, const Keep* keep) {
  if (dtype == kF32) {
    float* out = static_cast<float*>(base) + offset;
    if (out != tile) store_kept(out, tile, keep, n, [](float f) { return f; });
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(base) + offset;
  if (dtype == kBF16) store_kept(out, tile, keep, n, [](float f) { return float_to_bf16(f); });
  if (dtype == kF16) narrow_half(out, tile, keep, n);
}

// Philox for many counters, in arrays so that the rounds vectorise.
constexpr int kBlocks = kTile / 8;
struct alignas(64) Counters {
  uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
};

template <class CounterOf>
void random_rounds(Counters& counters, uint64_t seed, uint32_t tensor, uint32_t step, CounterOf counter) {
  auto& [c0, c1, c2, c3] = counters;
  for (int b = 0; b < kBlocks; ++b) {
    const uint64_t c = counter(b);
    c0[b] = uint32_t(c);
    c1[b] = uint32_t(c >> 32);
    c2[b] = tensor;
    c3[b] = step;
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int b = 0; b < kBlocks; ++b) {
      const uint64_t x = uint64_t(0xD2511F53u) * c0[b], y = uint64_t(0xCD9E8D57u) * c2[b];
      c0[b] = uint32_t(y >> 32) ^ c1[b] ^ k0;
      c2[b] = uint32_t(x >> 32) ^ c3[b] ^ k1;
      c1[b] = uint32_t(y);
      c3[b] = uint32_t(x);
    }
}

// Consecutive blocks, eight random halves each.
void random_blocks(uint32_t* out, uint64_t seed, uint64_t first, int blocks, uint32_t tensor, uint32_t step) {
  Counters c;
  random_rounds(c, seed, tensor, step, [&](int b) { return first + uint64_t(b); });
  for (int b = 0; b < blocks; ++b) {
    const uint32_t words[4] = {c.c0[b], c.c1[b], c.c2[b], c.c3[b]};
    for (int k = 0; k < 4; ++k) {
      out[8 * b + 2 * k] = words[k] & 0xffffu;
      out[8 * b + 2 * k + 1] = words[k] >> 16;
    }
  }
}

// 16 random bits for each element of a tile.
void random_tile(uint32_t* out, const Piece& w, int64_t offset, int n) {
  const TensorDesc& t = *w.tensor;
  const uint32_t tensor = uint32_t(t.ordinal), step = uint32_t(w.row->step);
  const uint64_t inner = uint64_t(t.index_inner), first = uint64_t(t.index_base + offset);
  if (!t.index && inner == uint64_t(t.numel) && first % 8 == 0) return random_blocks(out, w.seed, first / 8, (n + 7) / 8, tensor, step);
  // A shard whose rows lie apart in the global tensor, or scattered elements.
  const auto element = [&](int i) {
    const int64_t at = offset + i;
    const auto local = uint64_t(!t.index                ? at
                                : t.index_dtype == kI64 ? static_cast<const int64_t*>(t.index)[at]
                                                        : static_cast<const int32_t*>(t.index)[at]);
    return uint64_t(t.index_base) + (local < inner ? local : local / inner * uint64_t(t.index_outer) + local % inner);
  };
  for (int i = 0; i < n; i += kBlocks) {
    Counters c;
    const int m = n - i < kBlocks ? n - i : kBlocks;
    uint64_t elements[kBlocks];
    for (int b = 0; b < kBlocks; ++b) elements[b] = element(i + (b < m ? b : m - 1));
    random_rounds(c, w.seed, tensor, step, [&](int b) { return elements[b] >> 3; });
    for (int b = 0; b < m; ++b) {
      const uint32_t low = elements[b] & 2 ? c.c1[b] : c.c0[b], high = elements[b] & 2 ? c.c3[b] : c.c2[b];
      out[i + b] = (elements[b] & 4 ? high : low) >> (elements[b] & 1 ? 16 : 0) & 0xffffu;
    }
  }
}

void store_stochastic(uint16_t* __restrict out, const float* __restrict tile, const Keep* keep, const Piece& w, int64_t offset, int n) {
  alignas(64) uint32_t random[kTile];
  random_tile(random, w, offset, n);
  if (!keep)
    for (int i = 0; i < n; ++i) out[i] = float_to_bf16_stochastic(tile[i], random[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = choose(keep[i], float_to_bf16_stochastic(tile[i], random[i]), out[i]);
}

// The parameter may live in a master copy: fp32, or split into the bf16 parameter and a 16-bit remainder.
float* load_param(const TensorDesc& t, int64_t offset, int n, float* buffer) {
  if (t.extra_dtype == kF32) return static_cast<float*>(t.extra) + offset;
  if (t.extra_dtype != kI16) return load_tile(t.param, t.param_dtype, offset, n, buffer);
  const uint16_t* high = static_cast<const uint16_t*>(t.param) + offset;
  const int16_t* low = static_cast<const int16_t*>(t.extra) + offset;
  for (int i = 0; i < n; ++i) buffer[i] = join_split(high[i], low[i]);
  return buffer;
}

void store_param(const Piece& w, int64_t offset, int n, const float* tile, const Keep* keep) {
  const TensorDesc& t = *w.tensor;
  if (t.extra_dtype == kI16) {
    uint16_t* high = static_cast<uint16_t*>(t.param) + offset;
    int16_t* low = static_cast<int16_t*>(t.extra) + offset;
    for (int i = 0; i < n; ++i)
      if (!keep || keep[i]) split(tile[i], high + i, low + i);
  } else if (w.stochastic && t.param_dtype == kBF16) {
    store_stochastic(static_cast<uint16_t*>(t.param) + offset, tile, keep, w, offset, n);
  } else {
    store_tile(t.param, t.param_dtype, offset, n, tile, keep);
  }
}

enum class Kept { kNone, kSome, kAll };

// Tiles start at multiples of 32, so each word of the mask fills 32 lanes; only the odd element that the bf16 pairs leave over does not.
Kept expand_mask(const uint32_t* mask, int64_t offset, int n, Keep* keep) {
  if (offset % 32) {
    keep[0] = 0u - (mask[offset / 32] >> offset % 32 & 1u);
    return keep[0] ? Kept::kAll : Kept::kNone;
  }
  uint32_t any = 0, all = ~0u;
  const uint32_t* words = mask + offset / 32;
  for (int k = 0; 32 * k < n; ++k) {
    const uint32_t word = words[k], beyond = n - 32 * k < 32 ? ~0u << (n - 32 * k) : 0u;
    any |= word & ~beyond;
    all &= word | beyond;
    for (int j = 0; j < 32; ++j) keep[32 * k + j] = 0u - (word >> j & 1u);
  }
  return any == 0 ? Kept::kNone : all == ~0u ? Kept::kAll : Kept::kSome;
}

// Gradient as the rule sees it: unscaled, clipped, negated for maximize, with the coupled decay added (towards the anchor `a`, if any). Where a factor
// is all of it, that is left to the rule's own loop.
const float* prepare_gradient(const Piece& w, const Row& r, const float* g, const float* p, const float* a, int n, float* buffer,
                              float* left) {
  const float scale = w.scale, factor = w.clip, sign = r.sign, l2 = r.l2;
  *left = scale == 1.f && l2 == 0.f ? factor * sign : 1.f;
  if (scale == 1.f && l2 == 0.f) return g;
  if (l2 == 0.f)
    for (int i = 0; i < n; ++i) buffer[i] = g[i] / scale * factor * sign;
  else if (a)
    for (int i = 0; i < n; ++i) buffer[i] = g[i] / scale * factor * sign + l2 * (p[i] - a[i]);
  else
    for (int i = 0; i < n; ++i) buffer[i] = g[i] / scale * factor * sign + l2 * p[i];
  return buffer;
}

// Decoupled decay towards the anchor, where p lies (frozen elements keep their bits): the rule's own factor is 1 then.
void decay_to_anchor(float* __restrict p, const float* __restrict a, const Keep* keep, float share, int n) {
  if (share == 0.f) return;
  for (int i = 0; i < n; ++i) {
    const float moved = p[i] - share * (p[i] - a[i]);
    p[i] = keep ? choose(keep[i], moved, p[i]) : moved;
  }
}

// Elements 0 ... n of p, g and states; `keep(i)` where some are frozen.
template <class Rule, bool kMasked, class Keeps>
FA_HD void run(float* __restrict p, const float* g, float factor, float* __restrict s0, float* __restrict s1, float* __restrict s2,
               float* __restrict s3, int n, const Row& r, Keeps keep) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    float st[kMaxStates];
    if (Rule::kStates > 0) st[0] = s0[i];
    if (Rule::kStates > 1) st[1] = s1[i];
    if (Rule::kStates > 2) st[2] = s2[i];
    if (Rule::kStates > 3) st[3] = s3[i];
    const float old = p[i], fresh = Rule::step(old * r.decay, g[i] * factor, st, r);
    p[i] = kMasked ? choose(keep(i), fresh, old) : fresh;
    if (Rule::kStored > 0) s0[i] = kMasked ? choose(keep(i), st[0], s0[i]) : st[0];
    if (Rule::kStored > 1) s1[i] = kMasked ? choose(keep(i), st[1], s1[i]) : st[1];
    if (Rule::kStored > 2) s2[i] = kMasked ? choose(keep(i), st[2], s2[i]) : st[2];
    if (Rule::kStored > 3) s3[i] = kMasked ? choose(keep(i), st[3], s3[i]) : st[3];
  }
}

template <class Rule, bool kMasked>
void run_tile(float* p, const float* g, float factor, float* const* s, const Keep* keep, int n, const Row& row) {
  const Row r = row;
  run<Rule, kMasked>(p, g, factor, s[0], s[1], s[2], s[3], n, r, [keep](int i) { return keep[i]; });
}

bool all_are(DType dtype, const TensorDesc& t, int states) {
  bool same = t.param_dtype == dtype && t.grad_dtype == dtype && !t.extra && !t.anchor;
  for (int k = 0; k < states; ++k) same &= t.state_dtype[k] == dtype;
  return same;
}

bool direct_bf16(const Piece& w, const Row& r, int states) {
  return all_are(kBF16, *w.tensor, states) && !w.stochastic && w.scale == 1.f && r.l2 == 0.f;
}

// Everything fp32 and nothing to widen or prepare: without a mask, the piece is one tile.
bool in_place(const Piece& w, const Row& r, int states) { return all_are(kF32, *w.tensor, states) && w.scale == 1.f && r.l2 == 0.f; }

// Everything fp32 and some frozen: a word of the mask is spread where it is used, because a pass of its own leaves the memory idle meanwhile. Returns
// where the last, incomplete word begins.
template <class Rule>
int64_t update_words(const Piece& w, const Row& row) {
  const TensorDesc& t = *w.tensor;
  const Row r = row;
  const float factor = w.clip * r.sign;
  float *p = static_cast<float*>(t.param), *s[kMaxStates] = {};
  const float* g = static_cast<const float*>(t.grad);
  const int64_t end = w.end / 32 * 32;
  for (int64_t at = w.begin; at < end; at += 32) {
    const uint32_t word = t.mask[at / 32];
    if (!word) continue;
    for (int k = 0; k < Rule::kStates; ++k) s[k] = static_cast<float*>(t.state[k]) + at;
    run<Rule, true>(p + at, g + at, factor, s[0], s[1], s[2], s[3], 32, r, [word](int i) { return int32_t(word << (31 - i)) < 0; });
  }
  return end > w.begin ? end : w.begin;
}

template <class Rule>
void update(const Piece& w) {
  const TensorDesc& t = *w.tensor;
  const bool fp32 = in_place(w, *w.row, Rule::kStates);
  const int64_t rest = direct_bf16(w, *w.row, Rule::kStates) ? update_bf16<Rule>(w, *w.row)
                       : fp32 && t.mask                      ? update_words<Rule>(w, *w.row)
                                                             : w.begin;
  Row r = *w.row;
  alignas(64) float pb[kTile], gb[kTile], ub[kTile], ab[kTile], sb[kMaxStates][kTile];
  alignas(64) Keep kb[kTile];
  const int64_t tile = fp32 && !t.mask ? w.end - w.begin : kTile;
  for (int64_t offset = rest; offset < w.end; offset += tile) {
    const int n = int(w.end - offset < tile ? w.end - offset : tile);
    const Kept kept = t.mask ? expand_mask(t.mask, offset, n, kb) : Kept::kAll;
    if (kept == Kept::kNone) continue;
    const Keep* keep = kept == Kept::kSome ? kb : nullptr;
    float* p = load_param(t, offset, n, pb);
    const float* g = load_tile(const_cast<void*>(t.grad), t.grad_dtype, offset, n, gb);
    const float* a = t.anchor ? load_tile(const_cast<void*>(t.anchor), t.anchor_dtype, offset, n, ab) : nullptr;
    float factor;
    g = prepare_gradient(w, *w.row, g, p, a, n, ub, &factor);
    if (a) {
      decay_to_anchor(p, a, keep, w.row->pull, n);
      r.decay = 1.f;
    }
    float* s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) s[k] = load_tile(t.state[k], t.state_dtype[k], offset, n, sb[k]);
    if (keep)
      run_tile<Rule, true>(p, g, factor, s, keep, n, r);
    else
      run_tile<Rule, false>(p, g, factor, s, nullptr, n, r);
    for (int k = 0; k < Rule::kStored; ++k) store_tile(t.state[k], t.state_dtype[k], offset, n, s[k], keep);
    store_param(w, offset, n, p, keep);
  }
}

// Sixteen running sums: a fixed order that still vectorises.
constexpr int kLanes = 16;
void add_squares(double* __restrict sum, const float* __restrict g, int n) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sum[j] += double(g[i + j]) * double(g[i + j]);
  for (int j = 0; i + j < n; ++j) sum[j] += double(g[i + j]) * double(g[i + j]);
}

// One stream per thread does not fill the memory bus: spans are read side by side, in turns so short that each stays within the hardware's reach, and
// what the hardware does not foresee, the span that follows, is asked for kAhead bytes early. 5,000 gradients of 4,096 in places of their own, two EPYC
// cores: one span after the other 17 GB/s, side by side 29.5, with lines asked for 32; out of one array 34.5.
constexpr int kTurn = 64;
constexpr int64_t kAhead = 1024;

struct Stream {
  const char *at, *end, *next;  // next: of next_bytes, what the stream reads after this
  int64_t next_bytes;
};

// Where the lines lie that a stream needs kAhead bytes from now; where it ends before, lines it has.
const char* ahead(const Stream& s) {
  const int64_t rest = s.end - s.at;
  return rest > kAhead ? s.at + kAhead : kAhead - rest < s.next_bytes ? s.next + (kAhead - rest) : s.at;
}

// (One function: taken apart, it reads a tenth slower.)
void squares(const GradSpan* spans, const GradSpan* following, int count, float scale, double* out) {
  alignas(64) float gb[kTurn], ub[kTurn];
  alignas(64) double sums[kStreams][kLanes] = {};
  Stream streams[kStreams];
  const auto address = [](const GradSpan& s, int64_t element) {
    return s.tensor ? static_cast<const char*>(s.tensor->grad) + element * dtype_size(s.tensor->grad_dtype) : nullptr;
  };
  for (int k = 0; k < count; ++k) {
    const GradSpan &now = spans[k], &next = following[k];
    streams[k] = {address(now, now.begin), address(now, now.end), address(next, next.begin),
                  address(next, next.end) - address(next, next.begin)};
  }
  for (int left = count; left > 0;) {
    left = 0;
    for (int k = 0; k < count; ++k) {
      Stream& s = streams[k];
      const int64_t rest = s.end - s.at;
      if (rest <= 0) continue;
      const int dtype = spans[k].tensor->grad_dtype, size = dtype == kF32 ? 4 : 2;
      const int n = int(rest < kTurn * size ? rest / size : kTurn);
      left += rest > kTurn * size;
      const char* lines = ahead(s);
      for (int b = 0; b < kTurn * size; b += 64) prefetch_line(lines + b);
      const float* g = load_tile(const_cast<char*>(s.at), dtype, 0, n, gb);
      s.at += kTurn * size;
      if (scale != 1.f) {
        for (int i = 0; i < n; ++i) ub[i] = g[i] / scale;
        g = ub;
      }
      add_squares(sums[k], g, n);
    }
  }
  for (int k = 0; k < count; ++k) {
    out[k] = 0;
    for (int j = 0; j < kLanes; ++j) out[k] += sums[k][j];
  }
}

const UpdateFn table[] = {
#define X(name, type) update<type>,
    FA_RULES(X)
#undef X
};

}  // namespace

extern const Codec FA_CAT(codec_, FA_ISA);            // lowbit_isa.cpp
extern const PositionsFn FA_CAT(positions_, FA_ISA);  // positions_isa.cpp
extern const WordsFns FA_CAT(words_, FA_ISA);         // likewise
extern const Kernels FA_CAT(kernels_, FA_ISA);
const Kernels FA_CAT(kernels_, FA_ISA) = {FA_STR(FA_ISA),         table, squares, &FA_CAT(codec_, FA_ISA), &FA_CAT(positions_, FA_ISA),
                                          &FA_CAT(words_, FA_ISA)};

}  // namespace fa::cpu
