// fusedadapt._core.merge: addresses and numbers from fusedadapt/ops/merge_cpp.py, which has checked them. Every function drops the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings.h"
#include "cpu/merge.h"

namespace py = pybind11;

namespace fa {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// x, dtype, words, key of the cut, last of the cut, chance, model, weight, factor
using Part = std::tuple<uintptr_t, int, uintptr_t, int64_t, int64_t, int, uint32_t, double, double>;
// address or 0, dtype
using Array = std::pair<uintptr_t, int>;
// combine, lambda, normalize, the divisor, zero_is_positive, by_count, seed, stream
using Recipe = std::tuple<int, double, bool, double, bool, bool, uint64_t, uint32_t>;

struct Job {
  std::vector<cpu::MergePart> parts;
  cpu::MergeJob job{};

  Job(Array out, Array base, int64_t n, const std::vector<Part>& given, const Recipe& recipe) {
    for (const auto& [x, dtype, words, key, last, chance, model, weight, factor] : given)
      parts.push_back({at<void>(x), at<uint32_t>(words), last, float(weight), float(factor), dtype, int32_t(key), chance, model});
    job.out = at<void>(out.first);
    job.out_dtype = out.second;
    job.base = at<void>(base.first);
    job.base_dtype = base.second;
    job.n = n;
    job.parts = parts.data();
    job.count = int32_t(parts.size());
    double lambda, divisor;
    std::tie(job.combine, lambda, job.normalize, divisor, job.zero_is_positive, job.by_count, job.seed, job.stream) = recipe;
    job.lambda = float(lambda);
    job.divisor = float(divisor);
  }
};

}  // namespace

void bind_merge(py::module_& parent) {
  py::module_ m = parent.def_submodule("merge", "merging models on the CPU");
  m.attr("PIECE") = cpu::kMergePiece;
  m.attr("TILE") = cpu::kMergeTile;
  m.def("merge", [](Array out, Array base, int64_t n, const std::vector<Part>& parts, const Recipe& recipe, int threads) {
    const Job job(out, base, n, parts, recipe);
    py::gil_scoped_release release;
    cpu::merge(job.job, threads);
  });
  m.def("votes", [](Array base, int64_t n, const std::vector<Part>& parts, const Recipe& recipe, int threads) {
    const Job job({0, 0}, base, n, parts, recipe);
    py::gil_scoped_release release;
    return cpu::merge_votes(job.job, threads);
  });
  m.def("norms", [](Array base, int64_t n, const std::vector<Part>& parts, const Recipe& recipe, int threads) {
    const Job job({0, 0}, base, n, parts, recipe);
    std::pair<double, double> sums;
    py::gil_scoped_release release;
    cpu::merge_norms(job.job, threads, &sums.first, &sums.second);
    return sums;
  });
  // (key, last) for each (model, k), 0 < k < n
  m.def("cuts", [](Array base, int64_t n, const std::vector<std::pair<Array, int64_t>>& models, int threads) {
    std::vector<cpu::CutJob> jobs;
    for (const auto& [x, k] : models) jobs.push_back({{at<void>(x.first), at<void>(base.first), x.second, base.second, 0, 0}, n, k});
    std::vector<std::pair<int64_t, int64_t>> out;
    py::gil_scoped_release release;
    for (const cpu::Cut& cut : cpu::merge_cuts(jobs, threads)) out.emplace_back(cut.key, cut.last);
    return out;
  });
}

}  // namespace fa
