// One adapter with nothing between A and B, forward and backward, but for the products with W: the kernels of lowrank.cpp in the order in which
// fusedadapt/lowrank/function.py calls them, on the same numbers, and so the same bits. For fusedadapt/lowrank/plain.py, which says why.
#include "../core/dtypes.h"
#include "lowrank.h"
#include "scratch.h"

namespace fa::cpu::lowrank {
namespace {

std::vector<Segment> masked_by(const Branch& branch) { return {Segment{0, branch.a.rows, branch.threshold, 0, 0}}; }

Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.columns, m.rows, m.step, m.stride}; }

// V or dU, and dV, of the call that runs.
struct Memory {
  Scratch scaled, dv;
};
thread_local Memory memory;

struct Trim {
  ~Trim() {
    memory.scaled.trim();
    memory.dv.trim();
  }
};

// s * values; the values themselves if s is 1.
const float* scaled(const float* values, float s, int64_t count) {
  if (s == 1.f) return values;
  float* own = memory.scaled.get(count);
  for (int64_t i = 0; i < count; ++i) own[i] = values[i] * s;
  return own;
}

// fp32 comes before its product, 16 bits after it.
void put(const Matrix& y, const float* bias, const float* u, const Matrix& a, const std::vector<Segment>& segments, uint64_t seed,
         int threads) {
  if (y.dtype == kF32)
    fill(y, bias, {}, u, a, segments, seed, threads);
  else
    add(y, u, a, segments, seed, threads);
}

}  // namespace

void branch_start(const Matrix& x, const Branch& branch, const float* bias, float* u, const Matrix& y, int threads) {
  const Trim trim;
  const int64_t rank = branch.a.rows;
  shrink(x, branch.a, u, masked_by(branch), branch.seed, threads);
  put(y, bias, scaled(u, branch.scaling, x.rows * rank), transposed(branch.b), {Segment{0, rank, 0, 0, 0}}, 0, threads);
}

void branch_back(const Matrix& dy, const Matrix& x, const Branch& branch, const float* u, float* da, float* db, const Matrix& dx,
                 int threads) {
  const Trim trim;
  const int64_t rank = branch.a.rows, count = x.rows * rank;
  BwdDy g;
  g.dy = dy;
  g.b = branch.b;
  g.v = scaled(u, branch.scaling, count);
  g.rank = rank;
  g.dv = memory.dv.get(count);
  g.mb = db;
  bwd_dy(g, threads);
  const float* du = scaled(g.dv, branch.scaling, count);
  const std::vector<Segment> segments = masked_by(branch);
  bwd_x(x, du, da, segments, branch.seed, threads);
  if (dx.dtype) put(dx, nullptr, du, branch.a, segments, branch.seed, threads);
}

}  // namespace fa::cpu::lowrank
