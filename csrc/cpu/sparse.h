// Exact selection and bitmasks on a CPU: interface between the instruction-set specific part (sparse_isa.cpp), the host side and the bindings.
// The truth is fusedadapt/reference/sparse.py. Words: 32 elements each, row-major, lowest bit first, spare bits 0.
#pragma once
#include <cstdint>
#include <vector>

namespace fa::cpu {

enum Score : int32_t { kAbs, kAbsDiff, kAbsScaled, kAbsProduct, kGiven };
enum Ties : int32_t { kLowestIndex, kInclusive, kExclusive };

// Elements and what their scores are made of. Keys are kept signed (key ^ 2^31): SIMD compares signed numbers.
struct Source {
  const void* x;
  const void* other;  // null for kAbs and kGiven; kAbsScaled: one fp32 factor per column
  int64_t n, columns;
  int32_t dtype, other_dtype;
  int32_t score;
  int32_t nan_key;  // the signed key of NaN: the largest or the smallest
  int64_t first_column = 0;  // of element 0
};

struct Rows32 {
  Source source;
  int64_t k, length;  // keeps k of every run of `length`
  int32_t ties;
  bool aligned;  // every run starts on a new word
  uint32_t* words;
};

constexpr int kCopies = 4;  // of every counter, side by side: equal keys in a row would wait for one counter
constexpr int64_t kLongRow = 1 << 16;  // longer runs are selected by histogram, all threads on one run
constexpr int kEnergyBits = 11;
constexpr int64_t kEnergyPiece = 1 << 16;  // squares of 24 bits: as many as 64 bits hold the sum of
constexpr int64_t kPrefixWords = 32;  // words per entry of a mask's prefix

struct SparseKernels {
  // Adds [begin, end) to counts[(2^bits + 1) * kCopies] by `bits` bits of the key from `shift` up; filtered: only keys whose higher bits
  // are those of the signed key `prefix`.
  void (*histogram)(const Source&, int64_t begin, int64_t end, int shift, int bits, bool filtered, int32_t prefix, uint32_t* counts);
  // Words of the keys above `threshold` (begin is a multiple of 32; words are those of the whole source); returns how many equal it.
  int64_t (*mark)(const Source&, int64_t begin, int64_t end, int32_t threshold, uint32_t* words);
  // Adds the first `budget` keys equal to `threshold`.
  void (*mark_equal)(const Source&, int64_t begin, int64_t end, int32_t threshold, int64_t budget, uint32_t* words);
  // Runs [first, last) of at most kLongRow elements; unless aligned, first * length is a multiple of 32. keys: row_scratch(length) numbers.
  void (*rows)(const Rows32&, int64_t first, int64_t last, int32_t* keys);
  // Adds at most kEnergyPiece elements to sums[4 << kEnergyBits]: of each bin how many, their significands, those squared, nothing.
  void (*energy)(const Source&, int64_t begin, int64_t end, uint64_t* sums);
  void (*pack)(const uint8_t* mask, int64_t n, uint32_t* words);
  int64_t (*popcount)(const uint32_t* words, int64_t n);
  // acc[c - c0] += the squares of column c over rows [t0, t1).
  void (*colstat)(const void* x, int dtype, int64_t columns, int64_t t0, int64_t t1, int64_t c0, int64_t c1, double* acc);
};
extern const SparseKernels sparse_base;
#if defined(__x86_64__)
extern const SparseKernels sparse_avx2, sparse_avx512;
#endif
const SparseKernels& sparse_kernels();  // of the set that kernels() chose

constexpr int64_t row_scratch(int64_t length) { return (length < 1024 ? 1024 : length) + 1152; }

// sparse.cpp. Results do not depend on `threads`.
void histogram(const std::vector<Source>& items, int shift, int bits, int64_t prefix, int threads, int64_t* out);  // prefix -1: all keys
struct Kth {
  int64_t key, above, same;  // how many keys are above it, how many equal it
};
Kth kth_key(const std::vector<Source>& items, int64_t k, int threads);  // k in 1..n
void mark(const std::vector<Source>& items, int64_t threshold, int64_t equal, const std::vector<uint32_t*>& words, int threads);
void rows(const Rows32& job, int threads);
// parts: [4][1 << kEnergyBits] as reference/sparse.py, energy_parts. Integers: exact in any order.
void energy(const std::vector<Source>& items, int threads, int64_t* parts);
void colstat(const void* x, int dtype, int64_t rows, int64_t columns, int64_t slices, int threads, float* out);

// sparse_mask.cpp: masks in their three forms.
void pack(const uint8_t* mask, int64_t n, uint32_t* words, int threads);
void unpack(const uint32_t* words, int64_t n, uint8_t* mask, int threads);
void prefix_counts(const uint32_t* words, int64_t words_n, int64_t* out, int threads);
template <class Index>
void list_indices(const uint32_t* words, int64_t words_n, const int64_t* prefix, Index* out, int threads);
// Whether all are in [0, n) and, if `ordered`, each is above the one before.
template <class Index>
bool valid_indices(const Index* index, int64_t count, int64_t n, bool ordered, int threads);
template <class Index>
void set_indices(const Index* index, int64_t count, int64_t words_n, uint32_t* words, int threads);

// sparse_move.cpp: between a dense array and the compact array of its chosen elements.
enum Move : int32_t { kGather, kScatter, kAdd, kSwap };  // kAdd: x = round(x + alpha * value)
struct MoveJob {
  void* x;
  void* values;
  const void* index;
  int64_t count;
  int32_t dtype, value_dtype;  // equal for kGather and kSwap
  bool wide;  // 64-bit positions
};
void move_all(Move what, const std::vector<MoveJob>& jobs, float alpha, int threads);  // the threads share the elements of all jobs

}  // namespace fa::cpu
