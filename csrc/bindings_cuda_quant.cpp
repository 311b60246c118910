// fusedadapt._core.quant_cuda: a weight and a product as tuples of numbers, written by fusedadapt/ops/quant_cuda.py, which has checked them.
// Launches are asynchronous; the caller keeps everything alive until the stream has passed.
#include "bindings.h"

#if defined(FA_WITH_CUDA)
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "core/dtypes.h"
#include "cuda/quant.h"

namespace py = pybind11;

namespace fa {
namespace {

using WeightSpec = std::array<int64_t, 20>;
using ProductSpec = std::array<int64_t, 7>;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}

int32_t within(int64_t value, int64_t low, int64_t high, const char* what) {
  if (value < low || value > high)
    throw std::invalid_argument("quant_cuda.gemv: expected " + std::string(what) + " in " + std::to_string(low) + ".." +
                                std::to_string(high) + "; got " + std::to_string(value) + "; see csrc/cuda/quant.h");
  return int32_t(value);
}

cuda::QuantWeight weight(const WeightSpec& s) {
  cuda::QuantWeight w{};
  w.codes = at<uint8_t>(s[0]), w.values = at<float>(s[1]), w.scale = at<void>(s[2]), w.dynamic = at<float>(s[3]);
  w.above = at<float>(s[4]), w.offset = at<float>(s[5]), w.zero = at<void>(s[6]);
  w.n = s[7], w.k = s[8], w.row_bytes = s[9];
  w.rows = s[10], w.columns = s[11], w.wide = s[12];
  w.bits = within(s[13], 1, 8, "bits of a code");
  w.value = within(s[14], cuda::kCounted, cuda::kE5M2, "a kind of value");
  w.coding = within(s[15], cuda::kStored, cuda::kRowPower, "a coding of scales");
  w.scale_dtype = within(s[16], kNone, kF16, "a scale's dtype");
  w.zero_dtype = within(s[17], kNone, kU8, "a zero's dtype");
  w.flip = s[18] < 0 ? 0x80808080u : 0u;
  w.first = s[18] < 0 ? -128.f : -float(s[18]);
  w.flat = s[19] != 0;
  return w;
}

void gemv(const WeightSpec& spec, const ProductSpec& s, int device, uintptr_t stream) {
  const cuda::QuantWeight w = weight(spec);
  cuda::QuantProduct p{};
  p.x = at<void>(s[0]), p.bias = at<void>(s[1]), p.y = at<void>(s[2]);
  p.t = within(s[3], 1, cuda::kMostTokens, "tokens");
  p.stride = s[4];
  p.dtype = within(s[5], kF32, kF16, "x's dtype"), p.bias_dtype = within(s[6], kNone, kF16, "the bias's dtype");
  within(w.n, 1, 0x7fffffff, "rows of the weight");
  py::gil_scoped_release release;
  cuda::gemv(w, p, {device, at<void>(int64_t(stream))});
}

}  // namespace

void bind_cuda_quant(py::module_& parent) {
  py::module_ m = parent.def_submodule("quant_cuda", "products with low-bit weights on a GPU");
  m.attr("MOST_TOKENS") = cuda::kMostTokens;
  m.def("gemv", &gemv);
}

}  // namespace fa
#endif
