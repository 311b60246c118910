// fusedadapt._core.fake_quant*: addresses and counts from fusedadapt/ops/fake_quant_cpp.py; its op has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cpu/fake_quant.h"

namespace py = pybind11;

namespace fa {
namespace {

// x, dtype, n, line, run, groups, scale, zero, zero step, offset, offset step, low, high, bound step, quant_min, quant_max, divide
using Job = std::array<int64_t, 17>;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}

cpu::FakeQuant job_of(const Job& j, int32_t inside) {
  cpu::FakeQuant job{};
  job.x = at<void>(j[0]);
  job.dtype = int32_t(j[1]);
  job.n = j[2], job.line = j[3], job.run = j[4], job.groups = j[5];
  job.scale = at<float>(j[6]);
  job.zero = at<float>(j[7]), job.zero_step = j[8];
  job.offset = at<float>(j[9]), job.offset_step = j[10];
  job.low = at<float>(j[11]), job.high = at<float>(j[12]), job.bound_step = j[13];
  job.quant_min = float(j[14]), job.quant_max = float(j[15]);
  job.divide = j[16] != 0;
  job.inside = inside;
  return job;
}

}  // namespace

void bind_fake_quant(py::module_& m) {
  m.def("fake_quant", [](const Job& j, int64_t y, int threads) {
    const cpu::FakeQuant job = job_of(j, cpu::kIdentity);
    py::gil_scoped_release release;
    cpu::fake_quant(job, at<void>(y), threads);
  });
  m.def("fake_quant_backward", [](const Job& j, int inside, int64_t dy, int64_t dx, int64_t d_scale, int64_t d_offset, int threads) {
    const cpu::FakeQuant job = job_of(j, inside);
    py::gil_scoped_release release;
    cpu::fake_quant_backward(job, at<void>(dy), at<void>(dx), at<float>(d_scale), at<float>(d_offset), threads);
  });
}

}  // namespace fa
