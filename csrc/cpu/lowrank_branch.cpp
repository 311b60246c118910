// One adapter with nothing between A and B, forward and backward, but for the products with W: the kernels of lowrank.cpp on the same numbers as
// fusedadapt/lowrank/function.py has them called, and so the same bits. Here a thread goes through all of them with the rows it has taken, whose u
// and du it finds in its cache, and threads meet twice instead of seven times (3072 x 384 -> 384, two cores with AVX-512: hot 0.73 ms, so 0.69).
// For fusedadapt/lowrank/plain.py.
#include "../core/dtypes.h"
#include "lowrank_host.h"
#include "pool.h"

namespace fa::cpu::lowrank {
namespace {

std::vector<Segment> masked_by(const Branch& branch) { return {Segment{0, branch.a.rows, branch.threshold, 0, 0}}; }

// Rows [t0, t1) of a matrix of `rank` columns times s.
void scale_rows(const float* matrix, int64_t rank, float s, int64_t t0, int64_t t1, float* out) {
  for (int64_t i = t0 * rank; i < t1 * rank; ++i) out[i - t0 * rank] = matrix[i] * s;
}

// The same in memory of this thread until it asks for the next; the matrix itself if s is 1.
struct Rows {
  const float* data;
  int64_t first;
};
Rows scaled(const float* matrix, int64_t rank, float s, int64_t t0, int64_t t1) {
  if (s == 1.f) return {matrix, 0};
  float* own = memory().scaled.get((t1 - t0) * rank);
  scale_rows(matrix, rank, s, t0, t1, own);
  return {own, t0};
}

// fp32 comes before its product, 16 bits after it.
Writing onto(const Matrix& y, const float* bias, int64_t rank) {
  Writing w;
  w.kind = y.dtype == kF32 ? Write::kFill : Write::kAdd;
  w.y = y;
  w.bias = bias;
  w.rank = rank;
  w.origin.total = y.columns;
  return w;
}

void write_rows(const Kernels& k, Writing w, const Rows& u, int64_t t0, int64_t t1) {
  w.u = u.data;
  w.u_row = u.first;
  for (int64_t c = 0; c < w.y.columns; c += kPiece) k.write(w, t0, t1, c, std::min(c + kPiece, w.y.columns), nullptr);
}

// All rows, a few blocks at a time.
template <class Function>
void over_rows(int64_t rows, int threads, Function f) {
  const int64_t blocks = ceil_div(rows, kBlockRows);
  parallel_for(blocks, grain_of(blocks, threads), threads,
               [&](int64_t first, int64_t last) { f(first * kBlockRows, std::min(last * kBlockRows, rows)); });
}

// db (columns x rank) and da (rank x columns) from their slots.
void add_up(const Slots& of_b, float* db, const Slots& of_a, const Segment& segment, float* da, int threads) {
  const int64_t rank = of_b.rank, n = of_b.columns, chunks = ceil_div(n, Slots::kColumns);
  // Few sums are not worth a meeting of threads.
  const int64_t grain = std::max<int64_t>(1, 16384 / (of_b.count * std::max(Slots::kColumns * rank, of_a.columns)));
  parallel_for(chunks + rank, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (i < chunks)
        of_b.reduce_columns(i * Slots::kColumns, std::min((i + 1) * Slots::kColumns, n), db);
      else
        of_a.reduce_rows(segment, i - chunks, i - chunks + 1, of_a.columns, da);
    }
  });
}

}  // namespace

void branch_start(const Matrix& x, const Branch& branch, const float* bias, float* u, const Matrix& y, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  const int64_t rank = branch.a.rows;
  std::vector<Segment> in = masked_by(branch);
  const std::vector<Segment> out = {Segment{0, rank, 0, 0, 0}};
  const bool few = few_to_shrink(x, branch.a, in);
  if (few) {
    few_shrink(x, branch.a, u, threads);
    if (few_to_write(y, branch.b, out)) return few_write(y, y.dtype != kF32, bias, u, branch.scaling, branch.b, threads);
  }
  Reading r;
  r.x = x;
  r.rank = rank;
  r.u = u;
  if (!few) pack_shrink(k, r, in, branch.a, branch.a.step, branch.a.stride, threads);
  r.segments = view(in, branch.seed);
  Writing w = onto(y, bias, rank);
  w.segments = view(out, 0);
  pack_expand(k, w, transposed(branch.b), memory().others, threads);
  over_rows(x.rows, threads, [&](int64_t t0, int64_t t1) {
    if (!few) k.read(r, t0, t1, 0, x.columns, Partial{}, rows_scratch(k, r));
    write_rows(k, w, scaled(u, rank, branch.scaling, t0, t1), t0, t1);
  });
}

void branch_back(const Matrix& dy, const Matrix& x, const Branch& branch, const float* u, float* da, float* db, const Matrix& dx,
                 int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  const int64_t rank = branch.a.rows, rows = x.rows;
  const float s = branch.scaling;
  std::vector<Segment> whole = {Segment{0, rank, 0, 0, 0}}, drawn = masked_by(branch);
  // dV = dY B, and drop(dU A)
  Reading up;
  up.x = dy;
  up.rank = rank;
  float* dv = up.u = memory().dv.get(rows * rank);
  pack_shrink(k, up, whole, branch.b, branch.b.stride, branch.b.step, threads);
  up.segments = view(whole, 0);
  keep_masks(drawn, branch.seed, rows, x.columns);
  Writing w = onto(dx, nullptr, rank);
  w.segments = view(drawn, branch.seed);
  if (dx.dtype) pack_expand(k, w, branch.a, memory().others, threads);
  // dY^T V, and dU^T drop(x), which has the same masks
  Reading of_v, of_du;
  of_v.x = dy;
  of_v.segments = up.segments;
  std::vector<Segment> known = drawn;
  known[0].known = dx.dtype && known[0].bits != nullptr;
  of_du.x = x;
  of_du.segments = view(known, branch.seed);
  of_du.left = dv;
  of_v.left = u;  // until it is scaled
  of_v.left_rank = of_du.left_rank = rank;
  Slots of_b(k, of_v), of_a(k, of_du);
  of_b.base = memory().sums.get(of_b.floats() + of_a.floats());
  of_a.base = of_b.base + of_b.floats();
  const auto make_du = [&](int64_t t0, int64_t t1) {
    if (s != 1.f) scale_rows(dv, rank, s, t0, t1, dv + t0 * rank);
    if (dx.dtype) write_rows(k, w, {dv, 0}, t0, t1);
  };
  if (of_b.apart(threads)) {
    float* v = s == 1.f ? nullptr : memory().v.get(rows * rank);
    over_rows(rows, threads, [&](int64_t t0, int64_t t1) {
      if (v) scale_rows(u, rank, s, t0, t1, v + t0 * rank);
      k.read(up, t0, t1, 0, dy.columns, Partial{}, rows_scratch(k, up));
      make_du(t0, t1);
    });
    of_v.left = v ? v : u;
    parallel_for(of_b.units() + of_a.units(), 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) i < of_b.units() ? of_b.read_unit(k, of_v, i) : of_a.read_unit(k, of_du, i - of_b.units());
    });
  } else {
    parallel_for(of_b.count, 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        const int64_t t0 = of_b.start(slot), t1 = of_b.start(slot + 1);
        const Rows v = scaled(u, rank, s, t0, t1);
        Reading both = up;
        both.left = v.data, both.left_row = v.first, both.left_rank = rank;
        of_b.read_slot(k, both, slot);
        make_du(t0, t1);
        of_a.read_slot(k, of_du, slot);
      }
    });
  }
  add_up(of_b, db, of_a, drawn[0], da, threads);
}

}  // namespace fa::cpu::lowrank
