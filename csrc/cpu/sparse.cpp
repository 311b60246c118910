// Selection over a list of arrays: pieces are handed to threads, counts are integers, so the result does not depend on who did what.
#include "sparse.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>

#include "../core/dtypes.h"
#include "optim.h"
#include "pool.h"

namespace fa::cpu {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements handed out at a time: a multiple of 32
constexpr uint32_t kSign = 0x80000000u;

struct Part {
  size_t item;
  int64_t begin, end;
};

std::vector<Part> parts_of(const std::vector<Source>& items, int64_t size = kPiece) {
  std::vector<Part> parts;
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t b = 0; b < items[i].n; b += size) parts.push_back({i, b, std::min(b + size, items[i].n)});
  return parts;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Zeroed = std::unique_ptr<T[], Free>;
template <class T>
Zeroed<T> zeroed(size_t n) {
  void* p = std::calloc(n, sizeof(T));
  if (!p) throw std::bad_alloc();
  return Zeroed<T>(static_cast<T*>(p));
}

// body(part) until none is left, on up to `threads` threads; make() gives each of them what it keeps between parts, done(it) takes it back
// (one at a time).
template <class Make, class Body, class Done>
void share_out(size_t parts, int threads, Make make, Body body, Done done) {
  std::atomic<size_t> next{0};
  std::mutex merging;
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), int64_t(parts));
  parallel_for(workers, 1, int(workers), [&](int64_t, int64_t) {
    size_t part = next++;
    if (part >= parts) return;
    auto mine = make();
    for (; part < parts; part = next++) body(mine, part);
    std::lock_guard<std::mutex> lock(merging);
    done(mine);
  });
}

int32_t signed_key(int64_t key) { return int32_t(uint32_t(key) ^ kSign); }

// A run too long for a buffer.
void long_row(const Source& run, const Rows32& job, int threads, uint32_t* words) {
  const int64_t k = std::min(job.k, run.n);
  if (k <= 0) return mark({run}, 0xffffffff, 0, {words}, threads);
  const Kth at = kth_key({run}, k, threads);
  const int64_t all = job.ties == kInclusive || at.above + at.same <= k ? at.same : 0;
  mark({run}, at.key, job.ties == kLowestIndex ? k - at.above : all, {words}, threads);
}

void long_rows(const Rows32& job, int threads) {
  const int64_t per_row = (job.length + 31) / 32, count = job.source.n / job.length, size = dtype_size(job.source.dtype);
  const bool straight = job.aligned || job.length % 32 == 0;
  std::vector<uint32_t> apart(straight ? 0 : size_t(per_row));
  if (!straight) std::memset(job.words, 0, size_t((job.source.n + 31) / 32) * 4);
  for (int64_t row = 0; row < count; ++row) {
    Source run = job.source;
    const int64_t first = row * job.length;
    run.n = job.length;
    run.x = static_cast<const char*>(run.x) + first * size;
    // A run is a whole number of rows of x, or a part of one.
    if (run.score == kAbsScaled)
      run.first_column = first % run.columns;
    else if (run.other)
      run.other = static_cast<const char*>(run.other) + first * dtype_size(run.other_dtype);
    long_row(run, job, threads, straight ? job.words + row * per_row : apart.data());
    for (int64_t w = 0; w < per_row && !straight; ++w) {
      const int64_t bit = first + 32 * w;
      job.words[bit / 32] |= apart[size_t(w)] << bit % 32;
      if (bit % 32 && apart[size_t(w)] >> (32 - bit % 32)) job.words[bit / 32 + 1] |= apart[size_t(w)] >> (32 - bit % 32);
    }
  }
}

}  // namespace

const SparseKernels& sparse_kernels() {
#if defined(__x86_64__)
  if (!std::strcmp(kernels().name, "avx512")) return sparse_avx512;
  if (!std::strcmp(kernels().name, "avx2")) return sparse_avx2;
#endif
  return sparse_base;
}

void histogram(const std::vector<Source>& items, int shift, int bits, int64_t prefix, int threads, int64_t* out) {
  const size_t bins = size_t(1) << bits;
  std::memset(out, 0, bins * sizeof(int64_t));
  const bool whole = shift + bits >= 32;  // no higher bits: the only prefix is 0
  if (prefix > 0 && (whole || prefix >> (32 - shift - bits))) return;
  const bool filtered = prefix >= 0 && !whole;
  const int32_t wanted = filtered ? signed_key(prefix << (shift + bits)) : 0;
  const std::vector<Part> parts = parts_of(items);
  const SparseKernels& k = sparse_kernels();
  struct Counters {
    Zeroed<uint32_t> counts;
    int64_t counted = 0;
  };
  const auto flush = [&](Counters& c) {
    for (size_t b = 0; b < bins; ++b)
      for (int copy = 0; copy < kCopies; ++copy) out[b] += c.counts[b * kCopies + copy];
  };
  std::mutex overflow;
  share_out(
      parts.size(), threads, [&] { return Counters{zeroed<uint32_t>((bins + 1) * kCopies)}; },
      [&](Counters& c, size_t p) {
        k.histogram(items[parts[p].item], parts[p].begin, parts[p].end, shift, bits, filtered, wanted, c.counts.get());
        c.counted += kPiece;
        if (c.counted < int64_t(1) << 31) return;
        std::lock_guard<std::mutex> lock(overflow);  // 32-bit counters: emptied before they are full
        flush(c);
        c = Counters{zeroed<uint32_t>((bins + 1) * kCopies)};
      },
      [&](Counters& c) {
        std::lock_guard<std::mutex> lock(overflow);
        flush(c);
      });
}

Kth kth_key(const std::vector<Source>& items, int64_t k, int threads) {
  // |bf16| has no bits below the upper 16, and NaN, whose key has, is alone in its bin.
  const auto short_key = [](const Source& s) { return s.score == kAbs && s.dtype == kBF16; };
  const bool one_level = std::all_of(items.begin(), items.end(), short_key);
  std::vector<int64_t> counts(1 << 16);
  Kth found{-1, 0, 0};
  for (int shift = 16; shift >= (one_level ? 16 : 0); shift -= 16) {
    histogram(items, shift, 16, found.key, threads, counts.data());
    int64_t bin = 0xffff;
    while (bin > 0 && found.above + counts[size_t(bin)] < k) found.above += counts[size_t(bin--)];
    found.same = counts[size_t(bin)];
    found.key = std::max<int64_t>(found.key, 0) << 16 | bin;
  }
  if (one_level) found.key = found.key == 0xffff ? 0xffffffff : found.key << 16;
  return found;
}

void mark(const std::vector<Source>& items, int64_t threshold, int64_t equal, const std::vector<uint32_t*>& words, int threads) {
  if (threshold < 0) return mark(items, 0, INT64_MAX, words, threads);
  if (threshold > 0xffffffff) return mark(items, 0xffffffff, 0, words, threads);
  const std::vector<Part> parts = parts_of(items, kPiece / 2);
  const SparseKernels& k = sparse_kernels();
  const int32_t cut = signed_key(threshold);
  std::vector<int64_t> same(parts.size());
  parallel_for(int64_t(parts.size()), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const Part& part = parts[size_t(p)];
      same[size_t(p)] = k.mark(items[part.item], part.begin, part.end, cut, words[part.item]);
    }
  });
  std::vector<std::pair<size_t, int64_t>> again;  // parts with ties to keep, and how many
  for (size_t p = 0; p < parts.size() && equal > 0; ++p) {
    if (same[p]) again.push_back({p, std::min(same[p], equal)});
    equal -= std::min(same[p], equal);
  }
  parallel_for(int64_t(again.size()), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t a = first; a < last; ++a) {
      const auto [p, budget] = again[size_t(a)];
      const Part& part = parts[p];
      uint32_t* w = words[part.item];
      if (budget == part.end - part.begin) {  // a constant stretch need not be read twice
        std::memset(w + part.begin / 32, 0xff, size_t(budget / 32) * 4);
        if (budget % 32) w[part.end / 32] = (1u << budget % 32) - 1u;
      } else {
        k.mark_equal(items[part.item], part.begin, part.end, cut, budget, w);
      }
    }
  });
}

void rows(const Rows32& job, int threads) {
  if (job.source.n == 0) return;
  if (job.length > kLongRow) return long_rows(job, threads);
  const int64_t count = job.source.n / job.length;
  const int64_t unit = job.aligned ? 1 : 32 / std::gcd<int64_t>(job.length, 32);
  const int64_t grain = std::max<int64_t>(kPiece / job.length / unit, 1) * unit;
  const int64_t batches = (count + grain - 1) / grain;
  const SparseKernels& k = sparse_kernels();
  share_out(
      size_t(batches), threads, [&] { return std::vector<int32_t>(size_t(row_scratch(job.length))); },
      [&](std::vector<int32_t>& keys, size_t batch) {
        k.rows(job, int64_t(batch) * grain, std::min((int64_t(batch) + 1) * grain, count), keys.data());
      },
      [](std::vector<int32_t>&) {});
}

void energy(const std::vector<Source>& items, int threads, int64_t* parts) {
  constexpr size_t kBins = size_t(1) << kEnergyBits;
  static_assert(kPiece <= kEnergyPiece, "squares must not overflow");
  std::memset(parts, 0, 4 * kBins * sizeof(int64_t));
  const std::vector<Part> pieces = parts_of(items);
  const SparseKernels& k = sparse_kernels();
  struct Sums {
    Zeroed<uint64_t> piece, all;
  };
  share_out(
      pieces.size(), threads, [&] { return Sums{zeroed<uint64_t>(4 * kBins), zeroed<uint64_t>(4 * kBins)}; },
      [&](Sums& sums, size_t p) {
        uint64_t *piece = sums.piece.get(), *all = sums.all.get();
        k.energy(items[pieces[p].item], pieces[p].begin, pieces[p].end, piece);
        for (size_t b = 0; b < kBins; ++b, piece += 4) {
          if (!piece[0]) continue;
          all[b] += piece[0];
          all[kBins + b] += piece[1];
          all[2 * kBins + b] += uint32_t(piece[2]);
          all[3 * kBins + b] += piece[2] >> 32;
          piece[0] = piece[1] = piece[2] = 0;
        }
      },
      [&](Sums& sums) {
        for (size_t i = 0; i < 4 * kBins; ++i) parts[i] += int64_t(sums.all[i]);
      });
}

void colstat(const void* x, int dtype, int64_t rows, int64_t columns, int64_t slices, int threads, float* out) {
  constexpr int64_t kStrip = 512;
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  const SparseKernels& k = sparse_kernels();
  std::vector<double> acc(size_t(slices * columns));
  parallel_for(slices * strips, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      const int64_t slice = w / strips, c0 = w % strips * kStrip, c1 = std::min(c0 + kStrip, columns);
      k.colstat(x, dtype, columns, rows * slice / slices, rows * (slice + 1) / slices, c0, c1, &acc[size_t(slice * columns + c0)]);
    }
  });
  for (int64_t c = 0; c < columns; ++c) {
    double total = 0;
    for (int64_t s = 0; s < slices; ++s) total += acc[size_t(s * columns + c)];
    out[c] = float(total);
  }
}

}  // namespace fa::cpu
