// The low-rank family by address; fusedadapt/ops/lowrank_cpp.py is the one caller. A matrix is (address, dtype code, rows, columns, row stride, column
// stride), with address 0 for an absent one; other addresses are 0 where absent.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "bindings.h"
#include "core/dtypes.h"
#include "cpu/lowrank.h"
#include "looks.h"

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

// A branch that has been checked. It runs for tensors that look as those did; a gradient of y looks as y does. One that is not asked for is None.
// Results are the caller's own, made a moment ago: in inference mode they look otherwise.
struct Checked {
  enum Tensor { kX, kA, kB, kBias, kU, kY, kDa, kDb, kDx, kTensors };
  uint64_t signature[kTensors] = {};
  int64_t t = 0, k = 0, n = 0, rank = 0;
  int data = 0, adapters = 0;

  lr::Matrix matrix(Tensor which, void* at) const {
    const bool small = which == kA || which == kB;
    const int64_t rows = which == kA ? rank : which == kB ? n : t, columns = which == kB ? rank : which == kY ? n : k;
    return at ? lr::Matrix{at, small ? adapters : data, rows, columns, columns, 1} : lr::Matrix{};
  }
};

constexpr char kChecked[] = "fusedadapt.lr_checked";

// What the arguments hold, if they are what a checked call takes: tensors in this order, a seed or None, scaling, threshold, threads.
struct Given {
  const Checked* call = nullptr;
  void* at[Checked::kTensors] = {};
  lr::Branch branch;
  int threads = 1;

  // The last `results` of the tensors are written.
  template <size_t count>
  bool read(PyObject* self, PyObject* const* args, Py_ssize_t given, const Checked::Tensor (&order)[count], size_t results) {
    call = static_cast<const Checked*>(PyCapsule_GetPointer(self, kChecked));
    if (given != Py_ssize_t(count) + 4) return false;
    Look look;
    for (size_t i = 0; i < count; ++i) {
      const Checked::Tensor which = order[i];
      if (!Looks::at(args[i], &look)) return false;
      const bool absent = args[i] == Py_None, read = i + results < count;
      if (absent && which != Checked::kDx && which != Checked::kBias) return false;
      if (!absent && read && look.signature != call->signature[which]) return false;
      at[which] = look.data;
    }
    if (!Looks::at(args[count], &look)) return false;
    branch = {call->matrix(Checked::kA, at[Checked::kA]), call->matrix(Checked::kB, at[Checked::kB]),
              float(PyFloat_AsDouble(args[count + 1])), uint32_t(PyLong_AsLong(args[count + 2])),
              look.data ? *static_cast<const uint64_t*>(look.data) : 0};
    threads = int(PyLong_AsLong(args[count + 3]));
    return branch.threshold <= 65535;
  }
  lr::Matrix matrix(Checked::Tensor which) const { return call->matrix(which, at[which]); }
  float* floats(Checked::Tensor which) const { return static_cast<float*>(at[which]); }
};

// (x, a, b, bias, u, y, ...) -> whether u and y were written
PyObject* checked_start(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    using C = Checked;
    Given g;
    if (!g.read(self, args, count, {C::kX, C::kA, C::kB, C::kBias, C::kU, C::kY}, 2)) Py_RETURN_FALSE;
    {
      py::gil_scoped_release release;
      lr::branch_start(g.matrix(C::kX), g.branch, g.floats(C::kBias), g.floats(C::kU), g.matrix(C::kY), g.threads);
    }
    Py_RETURN_TRUE;
  });
}

// (dy, x, a, b, u, da, db, dx, ...) -> whether da, db and dx were written
PyObject* checked_back(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    using C = Checked;
    Given g;
    if (!g.read(self, args, count, {C::kY, C::kX, C::kA, C::kB, C::kU, C::kDa, C::kDb, C::kDx}, 3)) Py_RETURN_FALSE;
    {
      py::gil_scoped_release release;
      lr::branch_back(g.matrix(C::kY), g.matrix(C::kX), g.branch, g.floats(C::kU), g.floats(C::kDa), g.floats(C::kDb), g.matrix(C::kDx),
                      g.threads);
    }
    Py_RETURN_TRUE;
  });
}

// (start, back) for (x, a, b, bias, u, y, da, db, dx); (T, K, N, rank), dtype codes of data and adapters.
py::tuple checked(const py::args& tensors, const std::array<int64_t, 4>& sizes, int data, int adapters) {
  Checked c;
  if (tensors.size() != Checked::kTensors) throw std::invalid_argument("lr_checked: nine tensors expected");
  for (size_t i = 0; i < Checked::kTensors; ++i) {
    Look look;
    if (!Looks::at(py::handle(tensors[i]).ptr(), &look)) throw std::invalid_argument("lr_checked: plain tensors with memory expected");
    c.signature[i] = look.signature;
  }
  c.t = sizes[0], c.k = sizes[1], c.n = sizes[2], c.rank = sizes[3];
  c.data = data, c.adapters = adapters;
  return py::make_tuple(bound<Checked, &checked_start>(std::make_unique<Checked>(c), kChecked),
                        bound<Checked, &checked_back>(std::make_unique<Checked>(c), kChecked));
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
  m.def("lr_checked", &checked, py::kw_only(), py::arg("sizes"), py::arg("data"), py::arg("adapters"));
  // For tests: the keep flags (16 bits each) of n elements from `first` on, wherever in the element index that is.
  m.def("lr_mask", [](int64_t keep, uint64_t first, int64_t n, uint64_t seed, uint32_t stream, uint32_t threshold) {
    lr::kernels().mask(at<uint16_t>(keep), first, n, seed, stream, threshold);
  });
  m.def("lr_isa", [] { return lr::kernels().name; });
}

}  // namespace fa
