// The one pybind11 module. Torch-free: it is given addresses, shapes and streams, so one binary serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>

#include "bindings.h"
#include "core/dtypes.h"
#include "core/philox.h"
#include "cpu/optim.h"
#include "cpu/prefetch.h"
#include "cpu/sweep.h"
#include "table_host.h"

#ifndef FA_MODULE_NAME
#define FA_MODULE_NAME _core
#endif

namespace py = pybind11;

namespace fa {
namespace {

template <class T>
const T* address(uintptr_t a) {
  return reinterpret_cast<const T*>(a);
}

// A table with what the CPU step keeps warm beside it.
struct CpuPlan {
  std::vector<Hyper> hypers;
  std::vector<Chunk> chunks, gradient_chunks;
  uint64_t structure = 0, version = 0;
  int64_t chunk = 0;
  size_t groups = 0;  // hyper-parameters the tensors need
  cpu::Rows rows;
};

// Advances the versions of parameters where the sweep comes by: a pass of its own finds them gone from the cache.
class Versions : public cpu::Watch {
 public:
  explicit Versions(const Table& table) : table_(table) {}
  void near(int64_t k) override { prefetch_line<1>(table_.shim()->version(table_.handles[size_t(k)])); }
  void start(int64_t k) override {
    try {
      table_.shim()->bump_version(table_.handles[size_t(k)]);
    } catch (const std::exception&) {
      refused = true;  // an inference tensor, which has no version: torch's own function skips it
    }
  }
  std::atomic<bool> refused{false};

 private:
  const Table& table_;
};

class BoundTable : public Table {
 public:
  using Table::Table;
  CpuPlan plan;

  void set_hypers(const std::vector<std::vector<double>>& groups) {
    std::vector<Hyper> out;
    for (const auto& g : groups) {
      if (g.size() * sizeof(double) != sizeof(Hyper)) throw std::invalid_argument("set_hypers: one value per hyper field expected");
      Hyper h;
      memcpy(&h, g.data(), sizeof h);
      out.push_back(h);
    }
    plan.hypers = std::move(out);
  }

  // Power of two near total / (workers * 8), so that small totals still occupy every worker.
  // `by_gradient`: for sums of squares, so that a compact state does not change the order in which a gradient is added up.
  int64_t chunk_for(int workers, bool by_gradient) const {
    int64_t total = 0, chunk = 2048;
    for (const TensorDesc& t : tensors) total += by_gradient ? t.grad_numel : t.numel;
    while (chunk < 65536 && chunk * workers * 8 < total) chunk *= 2;
    return chunk;
  }

  const std::vector<Chunk>& chunks_for_step() {
    if (plan.structure != structure || plan.chunk == 0) {
      plan.chunk = chunk_for(16, false);
      plan.chunks = cpu::make_chunks(tensors, plan.chunk, false);
      plan.gradient_chunks.clear();
      plan.structure = structure;
    }
    return plan.chunks;
  }

  // 0: found_inf, nothing changed. 1: the caller has to advance the versions. 2: that is done.
  int cpu_step(int rule, int threads, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip, uint64_t seed, bool stochastic) {
    if (rule < 0 || rule >= kRuleCount) throw std::invalid_argument("cpu_step: unknown rule");
    if (plan.version != version) {
      plan.groups = 0;
      for (const TensorDesc& t : tensors) plan.groups = std::max(plan.groups, t.group < 0 ? SIZE_MAX : size_t(t.group) + 1);
      plan.rows.attach(tensors);
      plan.version = version;
    }
    if (plan.groups > plan.hypers.size()) throw std::invalid_argument("cpu_step: set_hypers first");
    if (found_inf && *address<float>(found_inf) != 0.f) return 0;
    const auto& chunks = chunks_for_step();
    const Globals globals{address<float>(grad_scale), nullptr, address<float>(clip), seed, stochastic, int32_t(plan.chunk)};
    py::gil_scoped_release release;
    plan.rows.build(rule, tensors, plan.hypers);
    Versions versions(*this);
    cpu::sweep(rule, tensors, chunks, plan.rows, globals, threads, handles.empty() ? nullptr : &versions);
    plan.rows.commit();
    return handles.empty() || versions.refused ? 1 : 2;
  }

  // `out`: where one double per tensor goes.
  void cpu_squares(int threads, uintptr_t grad_scale, uintptr_t out) {
    chunks_for_step();
    // not by the number of threads: sums are added chunk by chunk, in an order no setting may change
    if (plan.gradient_chunks.empty()) plan.gradient_chunks = cpu::make_chunks(tensors, chunk_for(16, true), true);
    const float scale = grad_scale ? *address<float>(grad_scale) : 1.f;
    py::gil_scoped_release release;
    cpu::squares(tensors, plan.gradient_chunks, scale, threads, reinterpret_cast<double*>(out));
  }

  // With one row per tensor (device rows) the k-th descriptor reads row k; otherwise the rows of the last cpu_step.
  py::bytes descriptors(bool row_per_tensor) const {
    std::vector<TensorDesc> out = tensors;
    for (size_t k = 0; row_per_tensor && k < out.size(); ++k) out[k].row = int32_t(k);
    return py::bytes(reinterpret_cast<const char*>(out.data()), out.size() * sizeof(TensorDesc));
  }
  py::bytes chunk_list(int64_t chunk, bool by_gradient) const {
    const auto list = cpu::make_chunks(tensors, chunk, by_gradient);
    return py::bytes(reinterpret_cast<const char*>(list.data()), list.size() * sizeof(Chunk));
  }
};

py::tuple make_row(int rule, const std::vector<double>& hyper, double step, std::vector<double> aux) {
  if (hyper.size() * sizeof(double) != sizeof(Hyper)) throw std::invalid_argument("make_row: one value per hyper field expected");
  Hyper h;
  memcpy(&h, hyper.data(), sizeof h);
  aux.resize(2);
  Clock c{step, {aux[0], aux[1]}};
  Row r;
  kRuleTable[rule].row(h, c, r);
  std::vector<float> out(sizeof(Row) / sizeof(float));
  memcpy(out.data(), &r, sizeof r);
  return py::make_tuple(out, std::vector<double>{c.aux[0], c.aux[1]});
}

// The identities of all parameters in all groups, and of all their states, in order: changes when one is added, removed or replaced.
uint64_t fingerprint(const py::list& param_groups, const py::dict& state) {
  static PyObject* key = PyUnicode_InternFromString("params");
  uint64_t h = 1469598103934665603ull;
  for (py::handle group : param_groups) {
    PyObject* params = PyDict_GetItemWithError(group.ptr(), key);
    if (!params || !(PyList_Check(params) || PyTuple_Check(params))) {
      throw std::invalid_argument("fingerprint: every param group needs a list or tuple 'params'");
    }
    const Py_ssize_t n = PySequence_Fast_GET_SIZE(params);
    PyObject** items = PySequence_Fast_ITEMS(params);
    h = (h ^ uint64_t(n)) * 1099511628211ull;
    for (Py_ssize_t i = 0; i < n; ++i) h = (h ^ uint64_t(uintptr_t(items[i]))) * 1099511628211ull;
  }
  PyObject *param, *of_param;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &of_param);) h = (h ^ uint64_t(uintptr_t(of_param))) * 1099511628211ull;
  return h;
}

void bind_table(py::module_& m) {
  static py::exception<TableError> error(m, "TableError");
  // Local: _core and the emulated build may both be loaded, each with an error of its own.
  py::register_local_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const TableError& e) {
      const py::tuple args = py::make_tuple(e.index, e.what());
      PyErr_SetObject(error.ptr(), args.ptr());
    }
  });
  py::class_<Shim>(m, "Shim", py::module_local())
      .def(py::init<const std::vector<uintptr_t>&, const py::object&>())
      .def_static("soil", &Shim::soil)
      .def("learn", &Shim::learn);
  m.attr("SHIM_NAMES") = py::tuple(py::cast(Shim::kNames));
  py::class_<BoundTable>(m, "Table")
      .def(py::init<py::object, py::object, std::vector<std::string>, std::vector<std::string>, std::string, int, int, std::vector<int>>(),
           py::arg("exchange"), py::arg("reader"), py::arg("states"), py::arg("aux"), py::arg("extra"), py::arg("device_type"),
           py::arg("device_id"), py::arg("maps") = std::vector<int>())
      .def("add", &BoundTable::add, py::arg("param"), py::arg("state"), py::arg("group"), py::arg("ordinal"), py::arg("base"),
           py::arg("inner"), py::arg("outer"), py::arg("compact") = false)
      .def("use_shim", &BoundTable::use_shim, py::keep_alive<1, 2>())
      .def("scan", &BoundTable::scan, py::arg("threads") = 1)
      .def("bump_versions", &BoundTable::bump_versions)
      .def("use_gradient", &BoundTable::use_gradient)
      .def("check_overlap", &BoundTable::check_overlap)
      .def_readonly("missing", &BoundTable::missing)
      .def_readonly("strided", &BoundTable::strided)
      .def_readonly("active", &BoundTable::active)
      .def_readonly("owners", &BoundTable::owners)
      .def_property_readonly("count", [](const BoundTable& t) { return t.tensors.size(); })  // without a list of them
      .def_readonly("active_params", &BoundTable::active_params)
      .def_readonly("version", &BoundTable::version)
      .def_readonly("structure", &BoundTable::structure)
      .def_readonly("placement", &BoundTable::placement)
      .def("set_hypers", &BoundTable::set_hypers)
      .def("chunk_for", &BoundTable::chunk_for, py::arg("workers"), py::arg("by_gradient") = false)
      .def("chunk_list", &BoundTable::chunk_list, py::arg("chunk"), py::arg("by_gradient") = false)
      .def("descriptors", &BoundTable::descriptors, py::arg("row_per_tensor") = false)
      .def("cpu_step", &BoundTable::cpu_step)
      .def("cpu_squares", &BoundTable::cpu_squares);
}

// Element helpers, exposed so that tests can hold every backend against the same bits.
void bind_elements(py::module_& m) {
  m.def("philox", [](uint64_t seed, uint64_t block, uint32_t tensor, uint32_t step) {
    const Philox4 r = philox(seed, block, tensor, step);
    return py::make_tuple(r.v[0], r.v[1], r.v[2], r.v[3]);
  });
  m.def("random16", &random16);
  m.def("float_to_bf16", [](float f) { return float_to_bf16(f); });
  m.def("float_to_bf16_stochastic", [](float f, uint32_t r) { return float_to_bf16_stochastic(f, r); });
  m.def("float_to_half", [](float f) { return float_to_half(f); });
  m.def("half_to_float", [](uint16_t h) { return half_to_float(h); });
}

}  // namespace

PYBIND11_MODULE(FA_MODULE_NAME, m) {
  m.doc() = "fusedadapt's compiled core";
  py::list rules;
  for (int i = 0; i < kRuleCount; ++i) rules.append(py::make_tuple(kRuleTable[i].name, kRuleTable[i].states, kRuleTable[i].stored));
  m.attr("RULES") = rules;
#define X(name) names.append(#name);
  py::list names;
  FA_HYPER_FIELDS(X) m.attr("HYPER_FIELDS") = py::tuple(names);
  names = py::list();
  FA_ROW_FIELDS(X) m.attr("ROW_FIELDS") = py::tuple(names);
#undef X
  m.attr("DESC_WORDS") = int(sizeof(TensorDesc) / 8);
  m.def("make_row", &make_row);
  m.def("fingerprint", &fingerprint);
  m.def("isa", [] { return cpu::kernels().name; });
  m.def("use_isa", &cpu::use_isa);
  m.def("has_bf16", &cpu::has_bf16);
  m.def("is_amd", [] {
#if defined(__x86_64__)
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
  });
  bind_table(m);
  bind_looks(m);
  bind_elements(m);
  bind_sparse(m);
  bind_merge(m);
  bind_lowrank(m);
  bind_fake_quant(m);
  bind_quant_act(m);
  bind_quant(m);
#if defined(FA_WITH_CUDA)
  bind_cuda(m);
  m.attr("CUDA") = true;
#else
  m.attr("CUDA") = false;
#endif
}

}  // namespace fa
