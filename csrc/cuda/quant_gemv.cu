// y[t, n] = sum_k x[t, k] (value[code[n, k]] - zero[g]) S[g] + bias[n]     for at most 8 tokens t, sums in fp32
//
// Bytes: the packed weight once, N K bits / 8; x comes from the cache, once for every few rows. Bound by bandwidth for one or two tokens: expect
// eight tenths of the read bandwidth of integers, less of tables of 4 bits (a shared-memory access a weight) and for many tokens (a multiply-add a
// weight and token). All of it reasoned for an H100, not measured.
//
// A block takes a few rows; a thread takes 16 bytes of codes of each at a time (of 3-bit codes 12), a *chunk*, as *pieces* of eight. The sum over a
// piece is taken before it is multiplied by S, so a group must hold whole pieces: any number of columns that is a power of two from 8 up, or a whole
// row. Other groups, and rows or addresses that 16-byte accesses do not fit, go element by element (`any_kernel`).
//
// No atomics, and the shapes decide the order of every sum: the same call gives the same bits.
#include "quant_parts.cuh"

namespace fa::cuda {
namespace {

constexpr int kPiece = 8;

template <int kBits>
constexpr int kPieces = kBits == 3 ? 4 : 16 / kBits;  // of a chunk

constexpr int kRows = 4;  // of a block; more would share x better, but spill

FA_DEVICE int64_t row_at(const QuantWeight& w, int64_t row) { return row < w.n ? row : w.n - 1; }

template <int kBits>
FA_DEVICE Words load_chunk(const QuantWeight& w, int64_t row, int64_t chunk) {
  const uint8_t* p = in_global(w.codes + row * w.row_bytes + chunk * (kPieces<kBits> * kBits));
  if constexpr (kBits == 3) return {{vec_load<uint32_t>(p), vec_load<uint32_t>(p + 4), vec_load<uint32_t>(p + 8), 0u}};
  return vec_load<Words>(p);
}

template <int kBits>
FA_DEVICE void load_chunks(Words (&q)[kRows], const QuantWeight& w, int64_t row0, int64_t chunk) {
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) q[r] = load_chunk<kBits>(w, row_at(w, row0 + r), chunk);
}

FA_DEVICE uint32_t funnel(uint32_t low, uint32_t high, int by) {  // 0 < by < 32
  return low >> by | high << (32 - by);
}

// Piece `first` of the chunk comes to the front, the others behind it in a circle. Lanes begin with different pieces, so that eight neighbours,
// whose chunks are 16 * kPieces bytes of 16-bit x apart, read from all banks at once and not from every second, fourth or eighth.
template <int kBits>
FA_DEVICE void rotate(Words& q, int first) {
  if constexpr (kBits == 3) return;
  const auto turn = [&](bool on, const Words& to) {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) q.v[i] = on ? to.v[i] : q.v[i];
  };
  turn(first & (kPieces<kBits> / 2), {{q.v[2], q.v[3], q.v[0], q.v[1]}});
  if constexpr (kBits <= 4) turn(first & (kPieces<kBits> / 4), {{q.v[1], q.v[2], q.v[3], q.v[0]}});
  if constexpr (kBits == 2)
    turn(first & 1, {{funnel(q.v[0], q.v[1], 16), funnel(q.v[1], q.v[2], 16), funnel(q.v[2], q.v[3], 16), funnel(q.v[3], q.v[0], 16)}});
}

template <int kBits>
FA_DEVICE int first_piece() {
  return kBits == 3 ? 0 : int(lane_id()) / (8 / kPieces<kBits>) % kPieces<kBits>;
}

// Eight codes, read from the front; the next piece comes there.
template <int kBits>
FA_DEVICE void take(uint32_t (&code)[kPiece], Words& q) {
  FA_UNROLL
  for (int j = 0; j < kPiece; ++j) code[j] = q.v[j * kBits / 32] >> j * kBits % 32 & ((1u << kBits) - 1u);
  constexpr int kWords = kBits / 4, kRest = kBits * kPiece % 32;
  if constexpr (kWords > 0) {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) q.v[i] = i + kWords < 4 ? q.v[i + kWords] : 0u;
  } else {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) q.v[i] = i < 3 ? funnel(q.v[i], q.v[i + 1], kRest) : q.v[i] >> kRest;
  }
}

// Values less zeros. `zero`: of counted codes with zeros of uint8 or none, 2^23 - first + zero, which is exact.
template <int kBits, bool kTable>
FA_DEVICE void decode(float (&v)[kPiece], const uint32_t (&code)[kPiece], const QuantWeight& w, const float* table, float zero) {
  if (!kTable) {
    const bool apart = w.zero_dtype == kF32;
    const float base = apart ? kTwo23 - w.first : zero;
    FA_UNROLL
    for (int j = 0; j < kPiece; ++j) v[j] = as_float(0x4b000000u | code[j]) - base;
    if (!apart) return;
  } else if (kBits == 8 && w.value == kE4M3) {
    FA_UNROLL
    for (int j = 0; j < kPiece; ++j) v[j] = e4m3(code[j]);
  } else if (kBits == 8 && w.value == kE5M2) {
    FA_UNROLL
    for (int j = 0; j < kPiece; ++j) v[j] = e5m2(code[j]);
  } else {
    FA_UNROLL
    for (int j = 0; j < kPiece; ++j) v[j] = table[code[j]];
  }
  if (w.zero_dtype == kNone) return;
  FA_UNROLL
  for (int j = 0; j < kPiece; ++j) v[j] -= zero;
}

// Where the numbers of row r's groups begin, times a group's columns: g = (start + k) >> shift.
FA_DEVICE int64_t group_start(const QuantWeight& w, int64_t row, int shift) {
  return w.flat ? row * w.k : (row / w.rows * w.wide) << shift;
}

struct Groups {
  int64_t start[kRows];
  float scale[kRows], zero[kRows];
};

template <bool kTable>
FA_DEVICE void load_groups(Groups& groups, const QuantWeight& w, int64_t k, int shift) {
  int64_t g[kRows];
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) g[r] = (groups.start[r] + k) >> shift;
  load_numbers(groups.scale, groups.zero, w, g);
  const float base = kTable || w.zero_dtype == kF32 ? 0.f : kTwo23 - w.first;
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) groups.zero[r] += base;
}

// Eight columns from k on of a block's rows, times every token.
template <int kTokens, int kBits, bool kTable>
FA_DEVICE void multiply(float (&sum)[kRows * kTokens], Words (&q)[kRows], const Groups& groups, const QuantWeight& w, const QuantProduct& p,
                        const float* table, int64_t k) {
  float v[kRows][kPiece];
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    uint32_t code[kPiece];
    take<kBits>(code, q[r]);
    decode<kBits, kTable>(v[r], code, w, table, groups.zero[r]);
  }
  FA_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    if (t >= p.t) break;
    Raw raw;
    float x[kPiece];
    const Eight at{t * p.stride + k, 0xffu, true};
    load(raw, p.x, p.dtype == kF32, at, 0xffu);
    widen(x, raw, p.dtype, true);
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float part = v[r][0] * x[0];
      FA_UNROLL
      for (int j = 1; j < kPiece; ++j) part = fmaf(v[r][j], x[j], part);
      sum[r * kTokens + t] = fmaf(groups.scale[r], part, sum[r * kTokens + t]);
    }
  }
}

template <int kTokens, int kBits, bool kTable>
__global__ void __launch_bounds__(kThreads, 2) gemv_kernel(QuantWeight w, QuantProduct p, int shift) {
  constexpr int kColumns = kPieces<kBits> * kPiece;
  FA_SHARED(float, table, [kTable ? 1 << kBits : 1]);
  const int64_t row0 = int64_t(blockIdx.x) * kRows, chunks = w.k / kColumns;
  int64_t chunk = threadIdx.x;
  Words q[kRows];
  if (chunk < chunks) load_chunks<kBits>(q, w, row0, chunk);  // under way while the table is filled
  if constexpr (kTable) {
    for (int i = int(threadIdx.x); i < 1 << kBits; i += int(blockDim.x)) table[i] = in_global(w.values)[i];
    syncthreads();
  }
  Groups groups;
  FA_UNROLL
  for (int r = 0; r < kRows; ++r) groups.start[r] = group_start(w, row_at(w, row0 + r), shift);
  float sum[kRows * kTokens] = {};
  const int first = first_piece<kBits>();
  const bool one_group = 1ll << shift >= kColumns;
  while (chunk < chunks) {
    const int64_t column = chunk * kColumns;
    if (one_group) load_groups<kTable>(groups, w, column, shift);  // before anything waits for the codes
    FA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (kBits == 4 && w.flat) q[r].v[i] = (q[r].v[i] & 0x0f0f0f0fu) << 4 | (q[r].v[i] >> 4 & 0x0f0f0f0fu);
        if (kBits == 8 && !kTable) q[r].v[i] ^= w.flip;
      }
      rotate<kBits>(q[r], first);
    }
    const auto piece = [&](int i) {
      const int64_t k = column + (i + first) % kPieces<kBits> * kPiece;
      if (!one_group) load_groups<kTable>(groups, w, k, shift);
      multiply<kTokens, kBits, kTable>(sum, q, groups, w, p, table, k);
    };
    if constexpr (kTokens <= 2 && kBits > 2) {
      FA_UNROLL
      for (int i = 0; i < kPieces<kBits>; ++i) piece(i);
    } else {  // the body is long enough to hide what a turn costs
      FA_NO_UNROLL
      for (int i = 0; i < kPieces<kBits>; ++i) piece(i);
    }
    chunk += blockDim.x;
    if (chunk < chunks) load_chunks<kBits>(q, w, row0, chunk);
  }
  finish<kRows, kTokens>(w, p, row0, sum);
}

FA_DEVICE uint32_t code_at(const QuantWeight& w, int64_t row, int64_t k) {
  const int64_t bit = w.flat ? (row * w.k + k) * w.bits : k * w.bits, byte = bit / 8 + (w.flat ? 0 : row * w.row_bytes);
  const int low = w.flat && w.bits == 4 ? 4 - int(bit % 8) : int(bit % 8);
  uint32_t word = load_byte(w.codes, byte);
  if (low + w.bits > 8) word |= load_byte(w.codes, byte + 1) << 8;
  return word >> low & ((1u << w.bits) - 1u);
}

// A row a block, element by element: any shape, any group, any alignment.
__global__ void __launch_bounds__(kThreads) any_kernel(QuantWeight w, QuantProduct p) {
  const int64_t row = blockIdx.x, start = row / w.rows * w.wide;
  float sum[kMostTokens] = {};
  for (int64_t k = threadIdx.x; k < w.k; k += blockDim.x) {
    const int64_t g = w.flat ? (row * w.k + k) / w.columns : start + (w.columns == 1 ? k : k / w.columns);
    float scale[1], zero[1];
    load_numbers(scale, zero, w, {g});
    const float v = (in_global(w.values)[code_at(w, row, k)] - zero[0]) * scale[0];
    FA_UNROLL
    for (int t = 0; t < kMostTokens; ++t) {
      if (t >= p.t) break;
      sum[t] = fmaf(v, load_float(p.x, t * p.stride + k, p.dtype), sum[t]);
    }
  }
  finish<1, kMostTokens>(w, p, row, sum);
}

// ---- launch

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Number of bits that (start + k) is shifted by for the group, or -1: not a power of two.
int shift_of(const QuantWeight& w) {
  int shift = 3;
  while (shift < 62 && 1ll << shift < w.columns) ++shift;
  return 1ll << shift == w.columns || (!w.flat && w.columns >= w.k) ? shift : -1;
}

bool by_chunks(const QuantWeight& w, const QuantProduct& p) {
  const bool table = w.value != kCounted;
  if (w.bits != 8 && w.bits != 4 && (table || (w.bits != 3 && w.bits != 2))) return false;
  const int64_t columns = kPiece * (w.bits == 3 ? 4 : 16 / w.bits);
  if (w.k % columns || !aligned(w.codes, w.bits == 3 ? 4 : 16)) return false;
  return aligned(p.x, 16) && p.stride * dtype_size(p.dtype) % 16 == 0 && shift_of(w) >= 0;
}

// A thread a chunk of a row, up to the size at which blocks of other rows fill the chip as well.
unsigned threads_for(int64_t chunks, int64_t n) {
  const unsigned most = n < 2048 ? kThreads : kThreads / 2;
  unsigned threads = kWarp;
  while (threads < most && threads < chunks) threads *= 2;
  return threads;
}

template <int kTokens, int kBits, bool kTable>
void run(const QuantWeight& w, const QuantProduct& p, cudaStream_t stream) {
  const unsigned threads = threads_for(w.k / (kPieces<kBits> * kPiece), w.n);
  FA_LAUNCH((gemv_kernel<kTokens, kBits, kTable>), unsigned((w.n + kRows - 1) / kRows), threads, 0, stream, w, p, shift_of(w));
}

template <int kTokens>
void run_few(const QuantWeight& w, const QuantProduct& p, cudaStream_t stream) {
  if (w.value != kCounted) return w.bits == 8 ? run<kTokens, 8, true>(w, p, stream) : run<kTokens, 4, true>(w, p, stream);
  if (w.bits == 8) return run<kTokens, 8, false>(w, p, stream);
  if (w.bits == 4) return run<kTokens, 4, false>(w, p, stream);
  return w.bits == 3 ? run<kTokens, 3, false>(w, p, stream) : run<kTokens, 2, false>(w, p, stream);
}

}  // namespace

void gemv(const QuantWeight& w, const QuantProduct& p, Place place) {
  const DeviceGuard guard(place.device, "quant.linear");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  if (!by_chunks(w, p))
    FA_LAUNCH(any_kernel, unsigned(w.n), threads_for(w.k, w.n), 0, stream, w, p);
  else
    (p.t == 1 ? run_few<1> : p.t == 2 ? run_few<2> : p.t <= 4 ? run_few<4> : run_few<8>)(w, p, stream);
  check(cudaGetLastError(), "quant.linear");
}

}  // namespace fa::cuda
