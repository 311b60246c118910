// Merging models element by element on a CPU: interface between the instruction-set specific part (merge_isa.cpp), the host side and the bindings.
// The truth is fusedadapt/reference/merge.py.
#pragma once
#include <cstdint>
#include <vector>

namespace fa::cpu {

enum Combine : int32_t { kSum, kPaper, kPeft, kMergekit };

constexpr int kMergeTile = 512;
constexpr int64_t kMergePiece = 1 << 16;  // elements handed out at a time; `norms` adds within them, so the truth knows this number

// One model's share of one tensor.
struct MergePart {
  const void* x;
  const uint32_t* words;  // bits of the elements kept; null: all
  int64_t last;  // of the elements whose key is `cut`, those up to here are kept
  float weight, factor;
  int32_t dtype;
  int32_t cut;  // elements whose key is above are kept; -1: all
  int32_t chance;  // elements with 16 random bits below are kept; -1: all
  uint32_t model;
};

struct MergeJob {
  void* out;
  const void* base;  // null: the deltas are the models themselves, and nothing is added
  int64_t n;
  const MergePart* parts;
  int32_t count;
  int32_t out_dtype, base_dtype;
  int32_t combine;
  bool normalize, zero_is_positive, by_count;  // by_count: the sign most voters have is elected, not the one of their sum
  float lambda, divisor;  // divisor: what kSum with normalize divides by
  uint64_t seed;
  uint32_t stream;
};

// Elements of |x - base| around a threshold. Keys: their bits as int32, NaN as INT32_MAX.
struct Band {
  const void* x;
  const void* base;
  int32_t dtype, base_dtype;
  int32_t low, high;
};
struct BandCounts {
  int64_t above, high, low, between;
};

struct MergeKernels {
  // scratch: (count + 4) tiles. begin: a multiple of kMergeTile.
  void (*merge)(const MergeJob&, int64_t begin, int64_t end, float* scratch);
  int64_t (*votes)(const MergeJob&, int64_t begin, int64_t end, float* scratch);
  // One model: sums of |d| over one piece, of all elements and of those kept.
  void (*norms)(const MergeJob&, int64_t begin, int64_t end, double* every, double* some);
};
struct BandKernels {
  // found: the keys strictly between low and high, in order; room for end - begin + 16.
  BandCounts (*band)(const Band&, int64_t begin, int64_t end, int32_t* found);
  void (*keys)(const Band&, int64_t begin, int64_t end, int32_t* out);
};
extern const MergeKernels merge_base;
extern const BandKernels band_base;
#if defined(__x86_64__)
extern const MergeKernels merge_avx2, merge_avx512;
extern const BandKernels band_avx2, band_avx512;
#endif
const MergeKernels& merge_kernels();  // of the set that kernels() chose
const BandKernels& band_kernels();

// merge.cpp. Results do not depend on `threads`.
void merge(const MergeJob& job, int threads);
int64_t merge_votes(const MergeJob& job, int threads);
void merge_norms(const MergeJob& job, int threads, double* every, double* some);

// Where a selection of the k largest |x - base| cuts: keys above `key` are kept, and those equal to it up to element `last`.
struct Cut {
  int32_t key;
  int64_t last;
};
struct CutJob {
  Band band;  // low and high are not read
  int64_t n, k;
};
std::vector<Cut> merge_cuts(const std::vector<CutJob>& jobs, int threads);  // merge_cut.cpp; all of one length

}  // namespace fa::cpu
