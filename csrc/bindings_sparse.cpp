// fusedadapt._core.sparse: addresses and counts from fusedadapt/ops/sparse_cpp.py, which has checked them. Every function drops the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bindings.h"
#include "cpu/sparse.h"

namespace py = pybind11;

namespace fa {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Item = std::array<int64_t, 6>;  // x, other, elements, columns, dtype, other's dtype

int find(const char* what, const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* n : names) {
    if (name == n) return i;
    ++i;
  }
  throw std::invalid_argument(std::string("sparse: unknown ") + what + " '" + name + "'");
}

cpu::Source source_of(const Item& item, const std::string& score, const std::string& nan) {
  cpu::Source s{};
  s.x = at<void>(uintptr_t(item[0]));
  s.other = at<void>(uintptr_t(item[1]));
  s.n = item[2];
  s.columns = item[3];
  s.dtype = int32_t(item[4]);
  s.other_dtype = int32_t(item[5]);
  s.score = find("score", score, {"abs", "abs_diff", "abs_scaled", "abs_product", "given"});
  s.nan_key = find("nan", nan, {"highest", "lowest"}) ? INT32_MIN : INT32_MAX;
  return s;
}

std::vector<cpu::Source> sources_of(const std::vector<Item>& items, const std::string& score, const std::string& nan) {
  std::vector<cpu::Source> out;
  for (const Item& item : items) out.push_back(source_of(item, score, nan));
  return out;
}

void bind_selection(py::module_& m) {
  m.def("histogram", [](const std::vector<Item>& items, const std::string& score, const std::string& nan, int shift, int bits,
                        int64_t prefix, uintptr_t out, int threads) {
    const auto sources = sources_of(items, score, nan);
    py::gil_scoped_release release;
    cpu::histogram(sources, shift, bits, prefix, threads, at<int64_t>(out));
  });
  m.def("kth_key", [](const std::vector<Item>& items, const std::string& score, const std::string& nan, int64_t k, int threads) {
    const auto sources = sources_of(items, score, nan);
    cpu::Kth found;
    {
      py::gil_scoped_release release;
      found = cpu::kth_key(sources, k, threads);
    }
    return py::make_tuple(found.key, found.above, found.same);
  });
  m.def("mark", [](const std::vector<Item>& items, const std::string& score, const std::string& nan, int64_t threshold, int64_t equal,
                   const std::vector<uintptr_t>& words, int threads) {
    const auto sources = sources_of(items, score, nan);
    std::vector<uint32_t*> out;
    for (uintptr_t w : words) out.push_back(at<uint32_t>(w));
    py::gil_scoped_release release;
    cpu::mark(sources, threshold, equal, out, threads);
  });
  m.def("rows", [](const Item& item, const std::string& score, const std::string& nan, int64_t k, int64_t length, const std::string& ties,
                   bool aligned, uintptr_t words, int threads) {
    const int tie = find("ties", ties, {"lowest_index", "inclusive", "exclusive"});
    const cpu::Rows32 job{source_of(item, score, nan), k, length, tie, aligned, at<uint32_t>(words)};
    py::gil_scoped_release release;
    cpu::rows(job, threads);
  });
  m.def("energy", [](const std::vector<Item>& items, const std::string& score, uintptr_t parts, int threads) {
    const auto sources = sources_of(items, score, "lowest");
    py::gil_scoped_release release;
    cpu::energy(sources, threads, at<int64_t>(parts));
  });
  m.def("colstat", [](uintptr_t x, int dtype, int64_t rows, int64_t columns, int64_t slices, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    cpu::colstat(at<void>(x), dtype, rows, columns, slices, threads, at<float>(out));
  });
}

void bind_masks(py::module_& m) {
  m.def("pack", [](uintptr_t mask, int64_t n, uintptr_t words, int threads) {
    py::gil_scoped_release release;
    cpu::pack(at<uint8_t>(mask), n, at<uint32_t>(words), threads);
  });
  m.def("unpack", [](uintptr_t words, int64_t n, uintptr_t mask, int threads) {
    py::gil_scoped_release release;
    cpu::unpack(at<uint32_t>(words), n, at<uint8_t>(mask), threads);
  });
  m.def("prefix", [](uintptr_t words, int64_t n, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    cpu::prefix_counts(at<uint32_t>(words), n, at<int64_t>(out), threads);
  });
  m.def("indices", [](uintptr_t words, int64_t n, uintptr_t prefix, uintptr_t out, bool wide, int threads) {
    py::gil_scoped_release release;
    if (wide)
      cpu::list_indices(at<uint32_t>(words), n, at<int64_t>(prefix), at<int64_t>(out), threads);
    else
      cpu::list_indices(at<uint32_t>(words), n, at<int64_t>(prefix), at<int32_t>(out), threads);
  });
  m.def("valid_indices", [](uintptr_t index, int64_t count, bool wide, int64_t n, bool ordered, int threads) {
    py::gil_scoped_release release;
    return wide ? cpu::valid_indices(at<int64_t>(index), count, n, ordered, threads)
                : cpu::valid_indices(at<int32_t>(index), count, n, ordered, threads);
  });
  m.def("set_indices", [](uintptr_t index, int64_t count, bool wide, int64_t words_n, uintptr_t words, int threads) {
    py::gil_scoped_release release;
    if (wide)
      cpu::set_indices(at<int64_t>(index), count, words_n, at<uint32_t>(words), threads);
    else
      cpu::set_indices(at<int32_t>(index), count, words_n, at<uint32_t>(words), threads);
  });
}

void bind_moves(py::module_& m) {
  // (x, its dtype, values, their dtype, positions, how many, whether 64-bit)
  using Job = std::tuple<uintptr_t, int, uintptr_t, int, uintptr_t, int64_t, bool>;
  m.def("move_all", [](const std::string& what, const std::vector<Job>& given, double alpha, int threads) {
    const auto op = cpu::Move(find("move", what, {"gather", "scatter", "add", "swap"}));
    std::vector<cpu::MoveJob> jobs;
    for (const auto& [x, dtype, values, value_dtype, index, count, wide] : given)
      jobs.push_back({at<void>(x), at<void>(values), at<void>(index), count, dtype, value_dtype, wide});
    py::gil_scoped_release release;
    cpu::move_all(op, jobs, float(alpha), threads);
  });
}

}  // namespace

void bind_sparse(py::module_& parent) {
  py::module_ m = parent.def_submodule("sparse", "masks and selection on the CPU");
  bind_selection(m);
  bind_masks(m);
  bind_moves(m);
}

}  // namespace fa
