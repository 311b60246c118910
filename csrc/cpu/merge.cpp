// Merging over threads: pieces of one tensor, each by one of them.
#include "merge.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "optim.h"
#include "pool.h"

namespace fa::cpu {
namespace {

int64_t pieces_of(int64_t n) { return (n + kMergePiece - 1) / kMergePiece; }

// body(piece, begin, end, scratch)
template <class Body>
void each_piece(const MergeJob& job, int threads, Body body) {
  std::atomic<int64_t> next{0};
  const int64_t pieces = pieces_of(job.n), workers = std::clamp<int64_t>(threads, 1, std::max<int64_t>(pieces, 1));
  parallel_for(workers, 1, int(workers), [&](int64_t, int64_t) {
    std::vector<float> scratch(size_t(job.count + 2) * kMergeTile);
    for (int64_t p = next++; p < pieces; p = next++) body(p, p * kMergePiece, std::min((p + 1) * kMergePiece, job.n), scratch.data());
  });
}

}  // namespace

const MergeKernels& merge_kernels() {
#if defined(__x86_64__)
  if (!std::strcmp(kernels().name, "avx512")) return merge_avx512;
  if (!std::strcmp(kernels().name, "avx2")) return merge_avx2;
#endif
  return merge_base;
}

void merge(const MergeJob& job, int threads) {
  const MergeKernels& k = merge_kernels();
  each_piece(job, threads, [&](int64_t, int64_t begin, int64_t end, float* scratch) { k.merge(job, begin, end, scratch); });
}

int64_t merge_votes(const MergeJob& job, int threads) {
  const MergeKernels& k = merge_kernels();
  std::vector<int64_t> counts(size_t(pieces_of(job.n)));
  each_piece(job, threads,
             [&](int64_t p, int64_t begin, int64_t end, float* scratch) { counts[size_t(p)] = k.votes(job, begin, end, scratch); });
  int64_t total = 0;
  for (int64_t c : counts) total += c;
  return total;
}

void merge_norms(const MergeJob& job, int threads, double* every, double* some) {
  const MergeKernels& k = merge_kernels();
  std::vector<double> sums(size_t(pieces_of(job.n)) * 2);
  each_piece(job, threads, [&](int64_t p, int64_t begin, int64_t end, float*) {
    k.norms(job, begin, end, &sums[size_t(2 * p)], &sums[size_t(2 * p + 1)]);
  });
  *every = *some = 0;
  for (size_t p = 0; p < sums.size(); p += 2) {
    *every += sums[p];
    *some += sums[p + 1];
  }
}

}  // namespace fa::cpu
