// Compact entries: a chosen element's states are contiguous, its parameter and gradient are not. A block of them is gathered, updated by
// the ordinary sweep as if it were a small tensor of its own, and scattered back.
// Bytes per element at low density: a cache line each of p (read, written) and g (read), and the states; the reads are prefetched.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../core/dtypes.h"
#include "optim.h"
#include "prefetch.h"

namespace fa::cpu {
namespace {

// At 1 % of 33 M, reading p alone at the positions, in the plainest loop, takes 0.8 of the step with a compact gradient (Zen 3, where blocks of 32 to 128
// elements and prefetches 16 to 48 ahead are within 6 % of each other). Zen 5 wants more of them in flight, and none that asks for a line in order to
// write it: 0.88 ms with 48 and such, 0.75 with 128, 0.63 without. Into L2, because fewer can be under way to L1: 1.63 ms with a dense gradient for 1.70.
constexpr int kBlock = 64;  // small: the lines of p are in L1 when they are written, and the next blocks' arrive while this one is computed
constexpr int kAhead = 128;  // elements between a prefetch and its use
// Positions taken from a mask at a time: moving what is left of them at every block waits for what was just written.
constexpr int kDecoded = 512;

// The chosen elements of p and, unless it is null, of g, side by side: their cache misses overlap (one array after the other took 40 % longer). `left`:
// how many positions may be read from `at` on.
template <class P, class G, class Index>
void gather(void* p_to, const void* p_from, void* g_to, const void* g_from, const Index* at, int n, int64_t left) {
  const P* p = static_cast<const P*>(p_from);
  const G* g = static_cast<const G*>(g_from);
  P* __restrict p_out = static_cast<P*>(p_to);
  G* __restrict g_out = static_cast<G*>(g_to);
  const auto both = [&](auto with_g) {
    const int ahead = int(std::max<int64_t>(std::min<int64_t>(n, left - kAhead), 0));
    for (int i = 0; i < n; ++i) {
      if (i < ahead) {
        prefetch_line<0, 2>(p + at[i + kAhead]);
        if constexpr (with_g.value) prefetch_line<0, 2>(g + at[i + kAhead]);
      }
      p_out[i] = p[at[i]];
      if constexpr (with_g.value) g_out[i] = g[at[i]];
    }
  };
  g ? both(std::true_type{}) : both(std::false_type{});
}

template <class Index>
void gather(void* p_to, const TensorDesc& t, void* g_to, const Index* at, int n, int64_t left) {
  const void* g = t.compact_grad ? nullptr : t.grad;
  const bool wide_p = dtype_size(t.param_dtype) == 4, wide_g = dtype_size(t.grad_dtype) == 4;
  const auto run = wide_p ? (wide_g ? gather<uint32_t, uint32_t, Index> : gather<uint32_t, uint16_t, Index>)
                          : (wide_g ? gather<uint16_t, uint32_t, Index> : gather<uint16_t, uint16_t, Index>);
  run(p_to, t.param, g_to, g, at, n, left);
}

template <class P, class Index>
void scatter(void* base, const void* values, const Index* at, int n) {
  P* out = static_cast<P*>(base);
  const P* in = static_cast<const P*>(values);
  for (int i = 0; i < n; ++i) out[at[i]] = in[i];
}

// Where a piece's entries lie, block by block: a list in memory. `end`: up to where it may be read.
template <class Index>
struct List {
  static constexpr DType kType = sizeof(Index) == 8 ? kI64 : kI32;
  const Index* index;
  const int64_t end;
  List(const Kernels&, const Piece& w) : index(static_cast<const Index*>(w.tensor->index)), end(w.tensor->numel) {}
  const Index* at(int64_t offset, int) const { return index + offset; }
};

// The words of a mask, 64 bits at a time, from a piece's first entry on.
class Words {
 public:
  explicit Words(const Piece& w) : mask_(w.tensor->mask), words_((w.tensor->index_inner + 31) / 32) {
    const auto* before = static_cast<const int64_t*>(w.tensor->index);
    const int64_t group = std::upper_bound(before, before + (words_ + 31) / 32, w.begin) - before - 1;
    next_ = 16 * group;
    int64_t skip = w.begin - before[group];
    for (int n; (n = __builtin_popcountll(word(next_))) <= skip; ++next_) skip -= n;
    uint64_t rest = word(next_);
    for (; skip > 0; --skip) rest &= rest - 1;
    passed_ = word(next_) & ~rest;
  }
  int64_t next() const { return next_; }
  uint64_t take() {
    const uint64_t bits = word(next_++) & ~passed_;
    passed_ = 0;
    return bits;
  }

 private:
  uint64_t word(int64_t i) const {
    if (2 * i >= words_)
      throw std::runtime_error("step: expected as many bits in the mask as it had; it was changed in place; use grow_prune");
    const uint64_t high = 2 * i + 1 < words_ ? mask_[2 * i + 1] : 0;
    return high << 32 | mask_[2 * i];
  }

  const uint32_t* mask_;
  const int64_t words_;
  int64_t next_;
  uint64_t passed_;  // bits of the next word that lie before the piece
};

// Likewise out of a mask, decoded a word at a time into L1: the positions of a block, and those to prefetch.
struct Bits {
  static constexpr DType kType = kI64;
  const int64_t end;

  Bits(const Kernels& kernels, const Piece& w) : end(w.end), positions_(*kernels.positions), words_(w), first_(w.begin) {}

  const int64_t* at(int64_t offset, int n) {
    if (offset - first_ + std::min<int64_t>(n + kAhead, end - offset) > have_) {
      drop(int(offset - first_));
      first_ = offset;
      while (have_ < kDecoded && first_ + have_ < end) {
        const int64_t base = 64 * words_.next();
        have_ += positions_(words_.take(), base, ring_ + have_);
      }
    }
    return ring_ + (offset - first_);
  }

 private:
  void drop(int n) {
    have_ -= n;
    memmove(ring_, ring_ + n, size_t(have_) * sizeof *ring_);
  }

  const PositionsFn positions_;
  Words words_;
  int64_t first_;  // the entry whose position is ring_[0]
  int have_ = 0;
  int64_t ring_[kDecoded + 72];
};

// A piece's block: its parameter is in scratch, and what lies one an entry is moved along.
class Block {
 public:
  Block(const Piece& w, void* p) : entry(*w.tensor), part_(w), all_(*w.tensor) {
    entry.param = p;
    entry.mask = nullptr;
    part_.tensor = &entry;
    part_.begin = 0;
  }
  Block(const Block&) = delete;

  // n entries from `offset` on; `index`: their positions, which only random bits ask for; `g`: their gradients, unless these are compact, too.
  void update(UpdateFn function, int64_t offset, int n, const void* index, void* g) {
    const auto shifted = [&](auto* base, int dtype) {
      return base ? reinterpret_cast<decltype(base)>(uintptr_t(base) + uintptr_t(offset * dtype_size(dtype))) : base;
    };
    for (int k = 0; k < kMaxStates; ++k) entry.state[k] = shifted(all_.state[k], all_.state_dtype[k]);
    entry.extra = shifted(all_.extra, all_.extra_dtype);
    entry.anchor = shifted(all_.anchor, all_.anchor_dtype);
    entry.index = index;
    entry.grad = all_.compact_grad ? shifted(all_.grad, all_.grad_dtype) : g;
    entry.numel = part_.end = n;
    function(part_);
  }

  TensorDesc entry;

 private:
  Piece part_;
  const TensorDesc& all_;
};

template <class Positions>
void run(const Kernels& kernels, UpdateFn update, const Piece& w) {
  const TensorDesc& t = *w.tensor;
  alignas(64) uint32_t p[kBlock], g[kBlock];
  const bool wide = dtype_size(t.param_dtype) == 4;
  Positions positions(kernels, w);
  Block block(w, p);
  block.entry.index_dtype = Positions::kType;
  for (int64_t offset = w.begin; offset < w.end; offset += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, w.end - offset));
    const auto* at = positions.at(offset, n);
    gather(p, t, g, at, n, positions.end - offset);
    block.update(update, offset, n, at, g);
    wide ? scatter<uint32_t>(t.param, p, at, n) : scatter<uint16_t>(t.param, p, at, n);
  }
}

// A mask whose words move the elements themselves, for updates that do not ask where these are. All of p and g is read, so it pays where most of their
// lines hold an entry (Zen 5, two threads, 33 M: 4 % in 6.8 ms for 5.2, 10 % in 5.4 for 6.3, 20 % in 7.7 for 9.3, half in 6.9 for 13.3).
constexpr int64_t kDense = 12;  // elements an entry at most
void run_words(const Kernels& kernels, UpdateFn update, const Piece& w) {
  constexpr int kMost = 256, kWords = 16;
  const TensorDesc& t = *w.tensor;
  alignas(64) uint32_t p[kMost + kPackedSlack], g[kMost + kPackedSlack];
  const int p_size = int(dtype_size(t.param_dtype)), g_size = int(dtype_size(t.grad_dtype));
  Words words(w);
  Block block(w, p);
  uint64_t bits[kWords];
  for (int64_t offset = w.begin; offset < w.end;) {
    const int64_t first = 64 * words.next();
    int n = 0, count = 0;
    for (; count < kWords && n + 64 <= kMost && offset + n < w.end; ++count) {
      uint64_t word = words.take();
      n += __builtin_popcountll(word);
      for (; offset + n > w.end; --n) word &= ~(uint64_t(1) << (63 - __builtin_clzll(word)));
      bits[count] = word;
    }
    if (n == 0) continue;
    char* const at = static_cast<char*>(t.param) + first * p_size;
    const int whole = int(std::min<int64_t>(count, (t.index_inner - first) / 64));
    kernels.words->pick(bits, count, whole, at, p_size, p);
    if (!t.compact_grad) kernels.words->pick(bits, count, whole, static_cast<const char*>(t.grad) + first * g_size, g_size, g);
    block.update(update, offset, n, nullptr, g);
    kernels.words->put(bits, count, at, p_size, p);
    offset += n;
  }
}

}  // namespace

void update_compact(const Kernels& kernels, UpdateFn update, const Piece& piece) {
  const int type = piece.tensor->index_dtype;
  if (type == kBits && kernels.words->pick && kDense * piece.tensor->numel >= piece.tensor->index_inner && !piece.stochastic)
    return run_words(kernels, update, piece);
  const auto function = type == kBits ? run<Bits> : type == kI64 ? run<List<int64_t>> : run<List<int32_t>>;
  function(kernels, update, piece);
}

}  // namespace fa::cpu
