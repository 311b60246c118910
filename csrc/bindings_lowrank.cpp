// The low-rank family by address; fusedadapt/ops/lowrank_cpp.py is the one caller. A matrix is (address, dtype code, rows, columns, row stride, column
// stride), with address 0 for an absent one; other addresses are 0 where absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "core/dtypes.h"
#include "cpu/lowrank.h"

namespace py = pybind11;

namespace fa {
namespace {

namespace lr = cpu::lowrank;
using Spec = std::array<int64_t, 6>;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}

lr::Matrix matrix(const Spec& s) {
  if (s[0] == 0) return {};
  if (s[1] != kF32 && s[1] != kBF16 && s[1] != kF16)
    throw std::invalid_argument("lowrank: dtype codes 1 (fp32), 2 (bf16), 3 (fp16) expected");
  return {at<void>(s[0]), int(s[1]), s[2], s[3], s[4], s[5]};
}

std::vector<lr::Segment> segments(const std::vector<int64_t>& thresholds, const std::vector<int64_t>& ranks, int64_t total) {
  if (thresholds.size() != ranks.size() || ranks.empty()) throw std::invalid_argument("lowrank: one threshold per rank expected");
  std::vector<lr::Segment> out;
  int64_t first = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (thresholds[i] < 0 || thresholds[i] > 65535) throw std::invalid_argument("lowrank: thresholds in 0 .. 65535 expected");
    if (ranks[i] < 1) throw std::invalid_argument("lowrank: ranks of at least 1 expected");
    out.push_back({first, ranks[i], uint32_t(thresholds[i]), uint32_t(i), 0});
    first += ranks[i];
  }
  if (first != total) throw std::invalid_argument("lowrank: ranks that add up to the adapter's height expected");
  return out;
}

using List = std::vector<int64_t>;

void shrink(const Spec& x, const Spec& a, int64_t u, uint64_t seed, const List& thresholds, const List& ranks, int threads) {
  const auto list = segments(thresholds, ranks, a[2]);
  py::gil_scoped_release release;
  lr::shrink(matrix(x), matrix(a), at<float>(u), list, seed, threads);
}

void bwd_x(const Spec& x, int64_t u, int64_t rank, int64_t m, uint64_t seed, const List& thresholds, const List& ranks, int threads) {
  const auto list = segments(thresholds, ranks, rank);
  py::gil_scoped_release release;
  lr::bwd_x(matrix(x), at<float>(u), at<float>(m), list, seed, threads);
}

void add(const Spec& y, int64_t u, const Spec& a, uint64_t seed, const List& thresholds, const List& ranks, int threads) {
  const auto list = segments(thresholds, ranks, a[2]);
  py::gil_scoped_release release;
  lr::add(matrix(y), at<float>(u), matrix(a), list, seed, threads);
}

void fill(const Spec& y, int64_t bias, const std::array<int64_t, 3>& origin, int64_t u, const Spec& a, uint64_t seed,
          const List& thresholds, const List& ranks, int threads) {
  const auto list = segments(thresholds, ranks, a[2]);
  if (y[1] != kF32) throw std::invalid_argument("lowrank: a product starts from fp32");
  py::gil_scoped_release release;
  lr::fill(matrix(y), at<float>(bias), {origin[0], origin[1], origin[2]}, at<float>(u), matrix(a), list, seed, threads);
}

void scale_add(const Spec& y0, int64_t v, const Spec& a, int64_t row_scale, int64_t bias, const Spec& y, int threads) {
  py::gil_scoped_release release;
  lr::scale_add(matrix(y0), at<float>(v), matrix(a), at<float>(row_scale), at<float>(bias), matrix(y), threads);
}

void bwd_dy(const Spec& dy, int64_t v, int64_t rank, const Spec& b, int64_t row_scale, const Spec& y0, const Spec& scaled,
            const std::array<int64_t, 4>& out, int threads) {
  py::gil_scoped_release release;
  lr::BwdDy g;
  g.dy = matrix(dy);
  g.b = matrix(b);
  g.y0 = matrix(y0);
  g.scaled = matrix(scaled);
  g.v = at<float>(v);
  g.rank = rank;
  g.row_scale = at<float>(row_scale);
  g.dv = at<float>(out[0]);
  g.mb = at<float>(out[1]);
  g.db = at<float>(out[2]);
  g.dg = at<float>(out[3]);
  lr::bwd_dy(g, threads);
}

void skinny_w(const Spec& w, const Spec& a, int64_t c, int64_t row_squares, int threads) {
  py::gil_scoped_release release;
  lr::skinny_w(matrix(w), matrix(a), at<float>(c), at<float>(row_squares), threads);
}

void merge(const Spec& w, int64_t v, const Spec& a, int64_t row_scale, int64_t stats, int threads) {
  py::gil_scoped_release release;
  lr::merge(matrix(w), at<float>(v), matrix(a), at<float>(row_scale), at<double>(stats), threads);
}

void dropout(const Spec& x, const Spec& out, uint64_t seed, uint32_t threshold, int threads) {
  py::gil_scoped_release release;
  lr::dropout(matrix(x), matrix(out), seed, threshold, threads);
}

lr::Branch branch(const Spec& a, const Spec& b, double scaling, uint32_t threshold, uint64_t seed) {
  if (threshold > 65535) throw std::invalid_argument("lowrank: thresholds in 0 .. 65535 expected");
  return {matrix(a), matrix(b), float(scaling), threshold, seed};
}

void branch_start(const Spec& x, const Spec& a, const Spec& b, double scaling, uint32_t threshold, uint64_t seed, int64_t bias, int64_t u,
                  const Spec& y, int threads) {
  const lr::Branch given = branch(a, b, scaling, threshold, seed);
  py::gil_scoped_release release;
  lr::branch_start(matrix(x), given, at<float>(bias), at<float>(u), matrix(y), threads);
}

void branch_back(const Spec& dy, const Spec& x, const Spec& a, const Spec& b, double scaling, uint32_t threshold, uint64_t seed, int64_t u,
                 int64_t da, int64_t db, const Spec& dx, int threads) {
  const lr::Branch given = branch(a, b, scaling, threshold, seed);
  py::gil_scoped_release release;
  lr::branch_back(matrix(dy), matrix(x), given, at<float>(u), at<float>(da), at<float>(db), matrix(dx), threads);
}

}  // namespace

void bind_lowrank(py::module_& m) {
  m.def("lr_shrink", &shrink);
  m.def("lr_bwd_x", &bwd_x);
  m.def("lr_add", &add);
  m.def("lr_fill", &fill);
  m.def("lr_scale_add", &scale_add);
  m.def("lr_bwd_dy", &bwd_dy);
  m.def("lr_skinny_w", &skinny_w);
  m.def("lr_merge", &merge);
  m.def("lr_dropout", &dropout);
  m.def("lr_branch_start", &branch_start);
  m.def("lr_branch_back", &branch_back);
  // For tests: the keep flags (16 bits each) of n elements from `first` on, wherever in the element index that is.
  m.def("lr_mask", [](int64_t keep, uint64_t first, int64_t n, uint64_t seed, uint32_t stream, uint32_t threshold) {
    lr::kernels().mask(at<uint16_t>(keep), first, n, seed, stream, threshold);
  });
  m.def("lr_isa", [] { return lr::kernels().name; });
}

}  // namespace fa
