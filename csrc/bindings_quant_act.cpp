// Quantized activations by address; fusedadapt/ops/quant_act_cpp.py is the one caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "bindings.h"
#include "core/dtypes.h"
#include "cpu/quant_act.h"

namespace py = pybind11;

namespace fa {
namespace {

namespace qa = cpu::quant_act;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}

void check_dtype(int dtype) {
  if (dtype != kF32 && dtype != kBF16 && dtype != kF16)
    throw std::invalid_argument("quant_act: dtype codes 1 (fp32), 2 (bf16), 3 (fp16) expected");
}

// x: (address, dtype code, rows, columns, row stride)
void quantize(const std::array<int64_t, 5>& x, int64_t block, int codes, int64_t q, int64_t scale, int threads) {
  check_dtype(int(x[1]));
  if (x[2] < 1 || x[3] < 1 || block < 1 || (codes != qa::kInt8 && codes != qa::kE4M3))
    throw std::invalid_argument("quant_act: unknown codes or no elements");
  py::gil_scoped_release release;
  qa::quantize({at<void>(x[0]), int(x[1]), x[2], x[3], x[4], block, codes, at<uint8_t>(q), at<float>(scale)}, threads);
}

// codes, scales: addresses of x's and w's; y: (address, dtype code); sizes: (tokens, outputs, columns)
void product(const std::array<int64_t, 2>& codes, const std::array<int64_t, 2>& scales, int64_t bias, const std::array<int64_t, 2>& y,
             const std::array<int64_t, 3>& sizes, int threads) {
  check_dtype(int(y[1]));
  qa::Int8Product p;
  p.x = at<int8_t>(codes[0]);
  p.w = at<int8_t>(codes[1]);
  p.x_scale = at<float>(scales[0]);
  p.w_scale = at<float>(scales[1]);
  p.bias = at<float>(bias);
  p.y = at<void>(y[0]);
  p.dtype = int(y[1]);
  p.t = sizes[0];
  p.n = sizes[1];
  p.k = sizes[2];
  py::gil_scoped_release release;
  qa::product(p, threads);
}

}  // namespace

void bind_quant_act(py::module_& m) {
  m.def("qa_quantize", &quantize);
  m.def("qa_int8_product", &product);
  m.def("qa_isa", [] { return qa::kernels().name; });
}

}  // namespace fa
