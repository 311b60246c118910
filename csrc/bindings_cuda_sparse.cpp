// fusedadapt._core.sparse_cuda: device addresses and counts from fusedadapt/ops/sparse_cuda.py, which has checked them. Launches are
// asynchronous; the caller keeps everything alive until the stream has passed.
#include "bindings.h"

#if defined(FA_WITH_CUDA)
#include "cuda/sparse.h"

namespace py = pybind11;

namespace fa {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

struct At {  // where to run: the last two arguments of every function
  int device;
  uintptr_t stream;
  operator cuda::Place() const { return {device, at<void>(stream)}; }
};

cuda::Selection selection(uintptr_t items, int64_t count, int64_t tiles, int score, bool nan_lowest) {
  return {at<cuda::SparseItem>(items), count, tiles, score, nan_lowest ? 0u : ~0u};
}

void bind_selection(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "histogram",
      [](uintptr_t items, int64_t count, int64_t tiles, int score, bool nan_lowest, int shift, int bits, uintptr_t prefix, int native,
         uintptr_t counts, int most_shared, int device, uintptr_t stream) {
        cuda::histogram(selection(items, count, tiles, score, nan_lowest), {shift, bits, at<int64_t>(prefix), native}, at<int64_t>(counts),
                        most_shared, At{device, stream});
      },
      no_gil);
  m.def(
      "find_bin",
      [](uintptr_t counts, int shift, int bits, int native, int64_t k, bool first, bool last, int ties, uintptr_t search, int device,
         uintptr_t stream) {
        cuda::find_bin(at<int64_t>(counts), {shift, bits, nullptr, native}, k, first, last, ties, at<cuda::Search>(search),
                       At{device, stream});
      },
      no_gil);
  m.def(
      "mark",
      [](uintptr_t items, int64_t count, int64_t tiles, int score, bool nan_lowest, uintptr_t threshold, uintptr_t equal, uintptr_t same,
         uintptr_t scratch, int device, uintptr_t stream) {
        cuda::mark(selection(items, count, tiles, score, nan_lowest), at<int64_t>(threshold), at<int64_t>(equal), at<int64_t>(same),
                   at<uint64_t>(scratch), At{device, stream});
      },
      no_gil);
  m.def(
      "rows",
      [](uintptr_t items, int64_t count, int64_t tiles, int score, bool nan_lowest, int64_t runs, int64_t length, int64_t k, int ties,
         int dtype, bool aligned, uintptr_t words, int64_t bytes, int most_shared, int device, uintptr_t stream) {
        cuda::rows(selection(items, count, tiles, score, nan_lowest), {runs, length, k, ties, dtype, aligned, at<uint32_t>(words), bytes},
                   most_shared, At{device, stream});
      },
      no_gil);
}

void bind_statistics(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "energy",
      [](uintptr_t items, int64_t count, int64_t tiles, int score, bool nan_lowest, uintptr_t totals, int device, uintptr_t stream) {
        cuda::energy(selection(items, count, tiles, score, nan_lowest), at<int64_t>(totals), At{device, stream});
      },
      no_gil);
  m.def(
      "column_squares",
      [](uintptr_t x, int dtype, int64_t rows, int64_t columns, int64_t slices, uintptr_t sums, uintptr_t out, int device,
         uintptr_t stream) {
        cuda::column_squares(at<void>(x), dtype, rows, columns, slices, at<double>(sums), at<float>(out), At{device, stream});
      },
      no_gil);
}

void bind_masks(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "pack",
      [](uintptr_t mask, int64_t n, uintptr_t words, int device, uintptr_t stream) {
        cuda::pack(at<uint8_t>(mask), n, at<uint32_t>(words), At{device, stream});
      },
      no_gil);
  m.def(
      "unpack",
      [](uintptr_t words, int64_t n, uintptr_t mask, int device, uintptr_t stream) {
        cuda::unpack(at<uint32_t>(words), n, at<uint8_t>(mask), At{device, stream});
      },
      no_gil);
  m.def("prefix_scratch", &cuda::prefix_scratch);
  m.def(
      "prefix",
      [](uintptr_t words, int64_t n, uintptr_t out, uintptr_t scratch, int device, uintptr_t stream) {
        cuda::prefix_counts(at<uint32_t>(words), n, at<int64_t>(out), at<uint64_t>(scratch), At{device, stream});
      },
      no_gil);
  m.def(
      "indices",
      [](uintptr_t words, int64_t n, uintptr_t prefix, uintptr_t out, bool wide, int device, uintptr_t stream) {
        cuda::list_indices(at<uint32_t>(words), n, at<int64_t>(prefix), at<void>(out), wide, At{device, stream});
      },
      no_gil);
  m.def(
      "check_indices",
      [](uintptr_t index, int64_t count, bool wide, int64_t n, bool ordered, uintptr_t bad, int device, uintptr_t stream) {
        cuda::check_indices(at<void>(index), count, wide, n, ordered, at<int32_t>(bad), At{device, stream});
      },
      no_gil);
  m.def(
      "set_indices",
      [](uintptr_t index, int64_t count, bool wide, int64_t words_n, uintptr_t words, int device, uintptr_t stream) {
        cuda::set_indices(at<void>(index), count, wide, words_n, at<uint32_t>(words), At{device, stream});
      },
      no_gil);
  m.def(
      "move",
      [](int op, uintptr_t items, int64_t count, int64_t groups, double alpha, int device, uintptr_t stream) {
        cuda::move(cuda::Move(op), at<cuda::MoveItem>(items), count, groups, float(alpha), At{device, stream});
      },
      no_gil);
}

}  // namespace

void bind_cuda_sparse(py::module_& parent) {
  py::module_ m = parent.def_submodule("sparse_cuda", "masks and selection on a GPU");
  m.attr("TILE") = cuda::kTile;
  m.attr("MOVE_GROUP") = cuda::kMoveGroup;
  bind_selection(m);
  bind_statistics(m);
  bind_masks(m);
}

}  // namespace fa
#endif
