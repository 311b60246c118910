// The CUDA side of the sparse family, as the bindings see it. No CUDA types: g++ compiles the bindings.
// All pointers are device pointers; a launch is asynchronous; what CUDA refuses is thrown as std::runtime_error with the op's name.
// Selection has no host in it: the bin search runs on the device, and no kernel waits for a number from the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "optim.h"

namespace fa::cuda {

constexpr int64_t kTile = 8192;  // elements a block takes at a time; a tensor's first tile starts at its first element
enum Score : int32_t { kAbs = 0, kAbsDiff, kAbsScaled, kAbsProduct, kGiven };
enum Ties : int32_t { kLowestIndex = 0, kInclusive, kExclusive };

// One tensor of a list, nine int64 as fusedadapt/ops/sparse_cuda.py writes them.
struct SparseItem {
  const void* x;
  const void* other;   // a value per element, with kAbsScaled one (fp32) per column
  uint8_t* words;      // `mark` only
  int64_t n, columns;  // columns: what `other` repeats after
  int64_t first;       // tiles of the tensors before it
  int64_t dtype, other_dtype;
  int64_t aligned;  // x and `other`: 16-byte accesses
};

struct Selection {
  const SparseItem* items;
  int64_t count, tiles;  // `tiles` in all
  int32_t score;
  uint32_t nan_key;  // ~0u or 0
};

// Which bits of the key a histogram counts by: `bits` (at most 16) from `shift` up, among those whose higher bits are *prefix (null: all).
struct Level {
  int shift, bits;
  const int64_t* prefix;
  int native;  // kBF16 or kF16 if every x is that and the score kAbs: bits are |x|'s own (fp16's are then not those of the fp32 key); else 0
};

// What `find_bin` keeps from level to level.
struct Search {
  int64_t prefix, left, above, same;
  int64_t threshold, equal;  // after the last level: what `mark` takes
};

// counts: int64 [2^bits], overwritten. most_shared: bytes of shared memory to use at most, 0 for what the device has; with less than the
// counters need, x is read several times.
void histogram(const Selection& s, const Level& level, int64_t* counts, int most_shared, Place place);
// The bin that holds the k-th largest (k counts on the first level, afterwards *search knows). last: also fills threshold and equal.
void find_bin(const int64_t* counts, const Level& level, int64_t k, bool first, bool last, int ties, Search* search, Place place);
// Bits of the keys above *threshold and of the first *equal that are equal to it. same: how many are equal in all, or null if unknown.
// scratch: uint64 [tiles + 1].
void mark(const Selection& s, const int64_t* threshold, const int64_t* equal, const int64_t* same, uint64_t* scratch, Place place);

// Runs of `length` (below 2^31) consecutive elements of items[0], each of which keeps its own k (at most length) largest.
struct Rows {
  int64_t count, length, k;
  int32_t ties, dtype;  // dtype: x's
  bool aligned;  // each run begins on a new word
  uint32_t* words;  // items[0]'s, or if `aligned` others
  int64_t bytes;  // of these
};
// most_shared: as above; a row that does not fit is read several times.
void rows(const Selection& s, const Rows& rows, int most_shared, Place place);

// totals: int64 [4][2048] by the top 11 bits of the keys of NaN lowest: elements, the sum of their significands as integers, the sums of the
// lower and of the upper 32 bits of those squared.
void energy(const Selection& s, int64_t* totals, Place place);
// out: fp32 [columns], sums of squares of a matrix's columns, in fp64 in the order of reference.sparse.column_slices. sums: [slices, columns].
void column_squares(const void* x, int dtype, int64_t rows, int64_t columns, int64_t slices, double* sums, float* out, Place place);

void pack(const uint8_t* mask, int64_t n, uint32_t* words, Place place);
void unpack(const uint32_t* words, int64_t n, uint8_t* mask, Place place);
// Exclusive popcounts per 32 words, the total last: out[ceil(n / 32) + 1]. scratch: uint64 [prefix_scratch(n)].
void prefix_counts(const uint32_t* words, int64_t n, int64_t* out, uint64_t* scratch, Place place);
int64_t prefix_scratch(int64_t n);
void list_indices(const uint32_t* words, int64_t n, const int64_t* prefix, void* out, bool wide, Place place);
// *bad becomes 1 if a position is outside [0, n), or with `ordered` not above the one before.
void check_indices(const void* index, int64_t count, bool wide, int64_t n, bool ordered, int32_t* bad, Place place);
// words: zeros. Positions outside [0, words_n * 32) are skipped.
void set_indices(const void* index, int64_t count, bool wide, int64_t words_n, uint32_t* words, Place place);

enum Move : int32_t { kGather = 0, kScatter, kAdd, kSwap };

// One tensor and its chosen elements. Seven int64.
struct MoveItem {
  void* x;
  void* values;
  const void* positions;
  int64_t count;
  int64_t first;  // groups of kMoveGroup positions of the tensors before it
  int64_t dtypes;  // x's | values' << 8 | 64-bit positions << 16
  int64_t n;  // elements of x: positions outside are skipped
};
constexpr int64_t kMoveGroup = 256;

// Any number of tensors in one launch. `groups` in all.
void move(Move op, const MoveItem* items, int64_t count, int64_t groups, float alpha, Place place);

}  // namespace fa::cuda
