// One adapter with nothing between A and B, forward and backward, but for the products with W: the kernels of lowrank.cpp in the order in which
// fusedadapt/lowrank/function.py calls them, on the same numbers, and so the same bits. For fusedadapt/lowrank/plain.py, which says why.
#include <memory>

#include "../core/dtypes.h"
#include "lowrank.h"

namespace fa::cpu::lowrank {
namespace {

std::vector<Segment> masked_by(const Branch& branch) { return {Segment{0, branch.a.rows, branch.threshold, 0, 0}}; }

Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.columns, m.rows, m.step, m.stride}; }

// s * values; the values themselves if s is 1.
class Scaled {
 public:
  Scaled(const float* values, float s, int64_t count) : values_(values) {
    if (s == 1.f) return;
    own_.reset(new float[size_t(count)]);
    for (int64_t i = 0; i < count; ++i) own_[size_t(i)] = values[i] * s;
    values_ = own_.get();
  }
  const float* get() const { return values_; }

 private:
  const float* values_;
  std::unique_ptr<float[]> own_;
};

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
  const int64_t rank = branch.a.rows;
  shrink(x, branch.a, u, masked_by(branch), branch.seed, threads);
  const Scaled v(u, branch.scaling, x.rows * rank);
  put(y, bias, v.get(), transposed(branch.b), {Segment{0, rank, 0, 0, 0}}, 0, threads);
}

void branch_back(const Matrix& dy, const Matrix& x, const Branch& branch, const float* u, float* da, float* db, const Matrix& dx,
                 int threads) {
  const int64_t rank = branch.a.rows, count = x.rows * rank;
  const std::unique_ptr<float[]> dv(new float[size_t(count)]);
  {
    const Scaled v(u, branch.scaling, count);
    BwdDy g;
    g.dy = dy;
    g.b = branch.b;
    g.v = v.get();
    g.rank = rank;
    g.dv = dv.get();
    g.mb = db;
    bwd_dy(g, threads);
  }
  const Scaled du(dv.get(), branch.scaling, count);
  const std::vector<Segment> segments = masked_by(branch);
  bwd_x(x, du.get(), da, segments, branch.seed, threads);
  if (dx.dtype) put(dx, nullptr, du.get(), branch.a, segments, branch.seed, threads);
}

}  // namespace fa::cpu::lowrank
