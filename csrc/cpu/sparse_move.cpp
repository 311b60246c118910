// Between a dense array and the compact array of its chosen elements. Bound by the cache lines of x that hold one.
#include <algorithm>

#include "../core/dtypes.h"
#include "pool.h"
#include "prefetch.h"
#include "sparse.h"

namespace fa::cpu {
namespace {

struct F32 {
  using Bits = uint32_t;
  static float load(Bits b) { return as_float(b); }
  static Bits store(float f) { return as_bits(f); }
};
struct BF16 {
  using Bits = uint16_t;
  static float load(Bits b) { return bf16_to_float(b); }
  static Bits store(float f) { return float_to_bf16(f); }
};
struct F16 {
  using Bits = uint16_t;
  static float load(Bits b) { return half_to_float(b); }
  static Bits store(float f) { return float_to_half(f); }
};

// One element of x and its slot. Bits, not numbers, are moved: a NaN's payload survives.
template <Move what, class X, class V>
FA_HD void move_one(typename X::Bits* x, typename V::Bits* v, float alpha) {
  constexpr bool same = std::is_same<X, V>::value;
  if constexpr (what == kGather) *v = typename V::Bits(*x);
  if constexpr (what == kScatter && same) *x = *v;
  if constexpr (what == kScatter && !same) *x = X::store(V::load(*v));
  if constexpr (what == kAdd) *x = X::store(X::load(*x) + alpha * V::load(*v));
  if constexpr (what == kSwap) {
    const typename X::Bits old = *x;
    *x = typename X::Bits(*v);
    *v = typename V::Bits(old);
  }
}

template <Move what, class X, class V, class Index>
void move_piece(const MoveJob& job, float alpha, const Index* index, int64_t first, int64_t last) {
  constexpr int64_t kAhead = 16;  // positions whose lines are asked for early
  auto* x = static_cast<typename X::Bits*>(job.x);
  auto* v = static_cast<typename V::Bits*>(job.values);
  for (int64_t i = first; i < last; ++i) {
    if (i + kAhead < last) prefetch_line<what != kGather>(x + index[i + kAhead]);
    move_one<what, X, V>(x + index[i], v + i, alpha);
  }
}

// call(X{}, V{}) for two storage codes.
template <class Call>
void with_type(int code, Call call) {
  if (code == kF32) call(F32{});
  if (code == kBF16) call(BF16{});
  if (code == kF16) call(F16{});
}

template <class Run>
void dispatch(Move what, const MoveJob& job, Run run) {
  with_type(job.dtype, [&](auto x) {
    using X = decltype(x);
    if (what == kGather) run(std::integral_constant<Move, kGather>{}, x, x);
    if (what == kSwap) run(std::integral_constant<Move, kSwap>{}, x, x);
    if (what == kGather || what == kSwap) return;
    with_type(job.value_dtype, [&](auto v) {
      if (what == kScatter) run(std::integral_constant<Move, kScatter>{}, X{}, v);
      if (what == kAdd) run(std::integral_constant<Move, kAdd>{}, X{}, v);
    });
  });
}

}  // namespace

void move_all(Move what, const std::vector<MoveJob>& jobs, float alpha, int threads) {
  constexpr int64_t kPiece = 1 << 14;
  struct Piece {
    const MoveJob* job;
    int64_t first, last;
  };
  std::vector<Piece> pieces;
  for (const MoveJob& job : jobs)
    for (int64_t i = 0; i < job.count; i += kPiece) pieces.push_back({&job, i, std::min(i + kPiece, job.count)});
  parallel_for(int64_t(pieces.size()), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
      const Piece& piece = pieces[size_t(p)];
      const MoveJob& job = *piece.job;
      const auto run = [&](const auto* index) {
        dispatch(what, job, [&](auto op, auto x, auto v) {
          move_piece<op.value, decltype(x), decltype(v)>(job, alpha, index, piece.first, piece.last);
        });
      };
      job.wide ? run(static_cast<const int64_t*>(job.index)) : run(static_cast<const int32_t*>(job.index));
    }
  });
}

}  // namespace fa::cpu
