// A mask as bools, as words, as sorted positions: conversions between them.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool.h"
#include "sparse.h"

namespace fa::cpu {
namespace {

constexpr int64_t kWords = 2048;  // words handed out at a time: a multiple of kPrefixWords

// Eight bits to eight bytes of 0 or 1.
uint64_t spread(uint32_t byte) {
  const uint64_t each = (uint64_t(byte) * 0x0101010101010101u) & 0x8040201008040201u;  // byte i keeps bit i
  return ((each + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

}  // namespace

void pack(const uint8_t* mask, int64_t n, uint32_t* words, int threads) {
  const SparseKernels& k = sparse_kernels();
  parallel_for((n + 31) / 32, kWords, threads,
               [&](int64_t first, int64_t last) { k.pack(mask + 32 * first, std::min(32 * last, n) - 32 * first, words + first); });
}

void unpack(const uint32_t* words, int64_t n, uint8_t* mask, int threads) {
  parallel_for((n + 31) / 32, kWords, threads, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      uint64_t bytes[4];
      for (int b = 0; b < 4; ++b) bytes[b] = spread(words[w] >> 8 * b & 0xff);
      if (32 * w + 32 <= n)
        std::memcpy(mask + 32 * w, bytes, 32);
      else
        std::memcpy(mask + 32 * w, bytes, size_t(n - 32 * w));
    }
  });
}

void prefix_counts(const uint32_t* words, int64_t words_n, int64_t* out, int threads) {
  const SparseKernels& k = sparse_kernels();
  const int64_t blocks = (words_n + kPrefixWords - 1) / kPrefixWords;
  parallel_for(blocks, 256, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      out[b] = k.popcount(words + b * kPrefixWords, std::min((b + 1) * kPrefixWords, words_n) - b * kPrefixWords);
  });
  int64_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t count = out[b];
    out[b] = total;
    total += count;
  }
  out[blocks] = total;
}

template <class Index>
void list_indices(const uint32_t* words, int64_t words_n, const int64_t* prefix, Index* out, int threads) {
  parallel_for(words_n, kWords, threads, [&](int64_t first, int64_t last) {
    Index* to = out + prefix[first / kPrefixWords];
    for (int64_t w = first; w < last; ++w)
      for (uint32_t rest = words[w]; rest; rest &= rest - 1) *to++ = Index(32 * w + __builtin_ctz(rest));
  });
}

template <class Index>
bool valid_indices(const Index* index, int64_t count, int64_t n, bool ordered, int threads) {
  std::atomic<bool> valid{true};
  parallel_for(count, 1 << 15, threads, [&](int64_t first, int64_t last) {
    bool bad = false;
    for (int64_t i = first; i < last; ++i) bad |= (index[i] < 0) | (int64_t(index[i]) >= n);
    if (ordered)
      for (int64_t i = std::max<int64_t>(first, 1); i < last; ++i) bad |= index[i] <= index[i - 1];
    if (bad) valid = false;
  });
  return valid;
}

template <class Index>
void set_indices(const Index* index, int64_t count, int64_t words_n, uint32_t* words, int threads) {
  parallel_for(words_n, 1 << 14, threads, [&](int64_t first, int64_t last) {
    // Threads own words, not positions: no word has two writers.
    std::memset(words + first, 0, size_t(last - first) * 4);
    const Index* at = std::lower_bound(index, index + count, 32 * first, [](Index a, int64_t b) { return int64_t(a) < b; });
    for (; at != index + count && int64_t(*at) < 32 * last; ++at) words[*at / 32] |= 1u << (*at % 32);
  });
}

template void list_indices(const uint32_t*, int64_t, const int64_t*, int32_t*, int);
template void list_indices(const uint32_t*, int64_t, const int64_t*, int64_t*, int);
template bool valid_indices(const int32_t*, int64_t, int64_t, bool, int);
template bool valid_indices(const int64_t*, int64_t, int64_t, bool, int);
template void set_indices(const int32_t*, int64_t, int64_t, uint32_t*, int);
template void set_indices(const int64_t*, int64_t, int64_t, uint32_t*, int);

}  // namespace fa::cpu
