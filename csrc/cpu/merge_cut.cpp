// The k-th largest |x - base| of each model, exactly, in one pass over memory: a sample says between which two keys it lies, the pass counts what is
// above and collects what is between (3 % or less), and the answer is among those. A sample that was wrong costs two passes more, never the answer.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>

#include "../core/dtypes.h"
#include "merge.h"
#include "optim.h"
#include "pool.h"
#include "sparse.h"

namespace fa::cpu {
namespace {

constexpr int kGroup = 16;  // neighbours sampled together: half a cache line of bf16
constexpr int64_t kAll = 1 << 15;  // tensors up to here are their own sample
constexpr int64_t kRoom = 6 << 20;  // keys collected at a time over all models: 24 MiB

struct Piece {
  BandCounts counts{};
  std::vector<int32_t> keys;
};

struct Search {
  const CutJob* job;
  Band band;
  std::vector<Piece> pieces;
  std::atomic<bool> full{false};
};

int64_t pieces_of(int64_t n) { return (n + kMergePiece - 1) / kMergePiece; }

uint64_t mixed(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

int64_t groups_of(int64_t n) { return std::clamp<int64_t>(n / 128, 1 << 15, n >> 28 ? 1 << 20 : 1 << 18) / kGroup; }

// How far from its expected rank in the sample the k-th may lie. Neighbours are alike, so that a sample counts for less than its size.
int64_t margin(int64_t n, int64_t k) {
  const double m = double(groups_of(n) * kGroup), p = double(k) / double(n);
  return int64_t(8 * std::sqrt(m * p * (1 - p))) + 2 * kGroup;
}

int64_t expected_between(const CutJob& j) {
  return j.n <= kAll ? j.n : int64_t(2.0 * double(margin(j.n, j.k)) / double(groups_of(j.n) * kGroup) * double(j.n));
}

// Puts low and high around the k-th: keys of the sample well below and well above it. One group from each of equal stretches, at a place in it that
// follows no period a tensor may have.
void bracket(const CutJob& job, Band& band) {
  band.low = -1;
  band.high = INT32_MAX;
  if (job.n <= kAll) return;
  const int64_t groups = groups_of(job.n), m = groups * kGroup, off = margin(job.n, job.k);
  std::vector<int32_t> sample(static_cast<size_t>(m));
  const BandKernels& k = band_kernels();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * (job.n / groups), room = job.n / groups - kGroup + 1;
    const int64_t at = first + int64_t(mixed(uint64_t(g) + 0x9e3779b97f4a7c15ull) % uint64_t(room));
    k.keys(band, at, at + kGroup, &sample[size_t(g * kGroup)]);
  }
  const int64_t rank = int64_t(double(job.k) / double(job.n) * double(m)), upper = rank - off, lower = rank + off;
  auto begin = sample.begin();
  if (upper > 0) {
    std::nth_element(begin, begin + upper, sample.end(), std::greater<int32_t>());
    begin += upper;
    band.high = *begin;
  }
  if (lower < m) {
    std::nth_element(begin, sample.begin() + lower, sample.end(), std::greater<int32_t>());
    band.low = sample[size_t(lower)];
  }
}

void scan(Search& s, int64_t p, int32_t* buffer, std::atomic<int64_t>& stored) {
  const int64_t begin = p * kMergePiece, end = std::min(begin + kMergePiece, s.job->n);
  Piece& piece = s.pieces[size_t(p)];
  piece.counts = band_kernels().band(s.band, begin, end, buffer);
  if (s.full || (stored += piece.counts.between) > 2 * kRoom) {
    s.full = true;
    return;
  }
  piece.keys.assign(buffer, buffer + piece.counts.between);
}

void scan_all(std::vector<Search*> searches, int threads) {
  if (searches.empty()) return;
  const int64_t count = int64_t(searches.size()), pieces = pieces_of(searches[0]->job->n);
  for (Search* s : searches) {
    s->pieces.assign(size_t(pieces), Piece{});
    s->full = false;
  }
  std::atomic<int64_t> stored{0};
  // The models of one piece follow each other: the base's part of it stays in the cache.
  std::atomic<int64_t> next{0};
  const int64_t workers = std::clamp<int64_t>(threads, 1, count * pieces);
  parallel_for(workers, 1, int(workers), [&](int64_t, int64_t) {
    const std::unique_ptr<int32_t[]> buffer(new int32_t[kMergePiece + 16]);
    for (int64_t i = next++; i < count * pieces; i = next++) scan(*searches[size_t(i % count)], i / count, buffer.get(), stored);
  });
}

// The rank-th largest (from 1) of the keys between low and high: counts of 4,096 ranges of keys, then what is in one of them.
int32_t select_between(const Search& s, int64_t rank) {
  int shift = 0;
  while (((int64_t(s.band.high) - s.band.low) >> shift) >= 4096) ++shift;
  const auto bin = [&](int32_t key) { return size_t((int64_t(key) - s.band.low) >> shift); };
  std::vector<int64_t> counts(4097);
  for (const Piece& p : s.pieces)
    for (int32_t key : p.keys) ++counts[bin(key)];
  size_t at = 4096;
  while (counts[at] < rank) rank -= counts[at--];
  std::vector<int32_t> few;
  few.reserve(size_t(counts[at]));
  for (const Piece& p : s.pieces)
    for (int32_t key : p.keys)
      if (bin(key) == at) few.push_back(key);
  std::nth_element(few.begin(), few.begin() + (rank - 1), few.end(), std::greater<int32_t>());
  return few[size_t(rank - 1)];
}

int64_t equal_in(const Search& s, const Piece& p, int32_t key) {
  if (key == s.band.high) return p.counts.high;
  if (key == s.band.low) return p.counts.low;
  return std::count(p.keys.begin(), p.keys.end(), key);
}

// The place of the count-th element (from 1) whose key this is.
int64_t place_of(const Search& s, int32_t key, int64_t count) {
  for (size_t p = 0; p < s.pieces.size(); ++p) {
    const int64_t here = equal_in(s, s.pieces[p], key);
    if (count > here) {
      count -= here;
      continue;
    }
    const int64_t begin = int64_t(p) * kMergePiece, end = std::min(begin + kMergePiece, s.job->n);
    std::vector<int32_t> keys(static_cast<size_t>(end - begin));
    band_kernels().keys(s.band, begin, end, keys.data());
    for (size_t i = 0; i < keys.size(); ++i)
      if (keys[i] == key && --count == 0) return begin + int64_t(i);
  }
  return s.job->n - 1;
}

// False if the k-th is not where the sample said.
bool resolve(const Search& s, Cut& cut) {
  if (s.full) return false;
  BandCounts sum{};
  for (const Piece& p : s.pieces) {
    sum.above += p.counts.above;
    sum.high += p.counts.high;
    sum.low += s.band.low == s.band.high ? 0 : p.counts.low;
    sum.between += p.counts.between;
  }
  int64_t left = s.job->k - sum.above, same = sum.high;
  if (left <= 0) return false;
  if (left <= sum.high) {
    cut.key = s.band.high;
  } else if ((left -= sum.high) <= sum.between) {
    cut.key = select_between(s, left);
    same = 0;
    for (const Piece& p : s.pieces) {
      for (int32_t key : p.keys) left -= key > cut.key;
      same += equal_in(s, p, cut.key);
    }
  } else if ((left -= sum.between) <= sum.low) {
    cut.key = s.band.low;
    same = sum.low;
  } else {
    return false;
  }
  cut.last = left == same ? s.job->n - 1 : place_of(s, cut.key, left);
  return true;
}

// The k-th by two histograms of all keys: the band becomes that one key.
void search_again(Search& s, int threads) {
  Source source{};
  source.x = s.band.x;
  source.other = s.band.base;
  source.n = s.job->n;
  source.columns = 1;
  source.dtype = s.band.dtype;
  source.other_dtype = s.band.base_dtype;
  source.score = s.band.base ? kAbsDiff : kAbs;
  source.nan_key = INT32_MAX;
  std::vector<int64_t> counts(1 << 16);
  int64_t prefix = -1, above = 0;
  for (int shift = 16; shift >= 0; shift -= 16) {
    histogram({source}, shift, 16, prefix, threads, counts.data());
    int64_t bin = 0xffff;
    while (above + counts[size_t(bin)] < s.job->k) above += counts[size_t(bin--)];
    prefix = std::max<int64_t>(prefix, 0) << 16 | bin;
  }
  s.band.low = s.band.high = int32_t(uint32_t(prefix) ^ 0x80000000u);
  scan_all({&s}, threads);
}

void cut_some(const CutJob* jobs, size_t count, int threads, Cut* cuts) {
  std::vector<Search> searches(count);
  std::vector<Search*> all;
  for (size_t i = 0; i < count; ++i) {
    searches[i].job = &jobs[i];
    searches[i].band = jobs[i].band;
    all.push_back(&searches[i]);
  }
  parallel_for(int64_t(count), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) bracket(jobs[i], searches[size_t(i)].band);
  });
  scan_all(all, threads);
  std::vector<char> found(count);
  parallel_for(int64_t(count), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) found[size_t(i)] = resolve(searches[size_t(i)], cuts[i]);
  });
  for (size_t i = 0; i < count; ++i) {
    if (found[i]) continue;
    search_again(searches[i], threads);
    resolve(searches[i], cuts[i]);
  }
}

}  // namespace

const BandKernels& band_kernels() {
#if defined(__x86_64__)
  if (!std::strcmp(kernels().name, "avx512")) return band_avx512;
  if (!std::strcmp(kernels().name, "avx2")) return band_avx2;
#endif
  return band_base;
}

std::vector<Cut> merge_cuts(const std::vector<CutJob>& jobs, int threads) {
  std::vector<Cut> cuts(jobs.size());
  for (size_t first = 0; first < jobs.size();) {
    size_t last = first + 1;
    for (int64_t room = kRoom - expected_between(jobs[first]); last < jobs.size(); ++last)
      if ((room -= expected_between(jobs[last])) < 0) break;
    cut_some(&jobs[first], last - first, threads, &cuts[first]);
    first = last;
  }
  return cuts;
}

}  // namespace fa::cpu
