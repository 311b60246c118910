// Low-bit weights by address; fusedadapt/ops/quant_cpp.py is the one caller and says in which order the numbers of a weight and of an encoding come.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <memory>

#include "bindings.h"
#include "core/dtypes.h"
#include "cpu/quant.h"
#include "looks.h"

namespace py = pybind11;

namespace fa {
namespace {

namespace qt = cpu::quant;
using WeightSpec = std::array<int64_t, 19>;
using EncodingSpec = std::array<int64_t, 24>;

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}

int32_t float_type(int64_t code) {
  if (code != kF32 && code != kBF16 && code != kF16)
    throw std::invalid_argument("quant: dtype codes 1 (fp32), 2 (bf16), 3 (fp16) expected");
  return int32_t(code);
}

int32_t width(int64_t bits) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) throw std::invalid_argument("quant: codes of 2, 3, 4 or 8 bits expected");
  return int32_t(bits);
}

float float8(int exponent, int code) {
  const int mantissa = 7 - exponent, e = (code & 127) >> mantissa, m = code & ((1 << mantissa) - 1), bias = (1 << (exponent - 1)) - 1;
  const float value = std::ldexp(float(e ? (1 << mantissa) + m : m), (e ? e : 1) - bias - mantissa);
  const bool no_number = exponent == 4 ? (code & 127) == 127 : e == 31;
  const float magnitude = !no_number ? value : exponent == 5 && m == 0 ? HUGE_VALF : std::nanf("");
  return code & 128 ? -magnitude : magnitude;
}

bool is_float8(const float* values, int exponent) {
  for (int i = 0; i < 256; ++i) {
    const float v = float8(exponent, i);
    if (v == v ? as_bits(v) != as_bits(values[i]) : values[i] == values[i]) return false;
  }
  return true;
}

// Which values need no table.
qt::Values kind_of(const float* values, int bits) {
  bool counts = true, is_signed = bits == 8;
  for (int i = 0; i < 1 << bits; ++i) {
    counts &= values[i] == values[0] + float(i);
    is_signed &= values[i] == float(int8_t(i));
  }
  if (counts || is_signed) return counts ? qt::Values::kUnsigned : qt::Values::kSigned;
  if (bits != 8) return qt::Values::kTable;
  return is_float8(values, 4) ? qt::Values::kE4M3 : is_float8(values, 5) ? qt::Values::kE5M2 : qt::Values::kTable;
}

// Whether the cuts round magnitudes to the nearest of these floats, ties to even, saturating.
bool rounds_to(const qt::Encoding& e, int exponent) {
  if (e.bits != 8 || !e.magnitude || !e.sign_bit || e.cut_count != (exponent == 4 ? 126 : 123)) return false;
  for (int i = 0; i < e.cut_count; ++i) {
    const float middle = (float8(exponent, i) + float8(exponent, i + 1)) * 0.5f;
    if (e.order[i] != i || e.cuts[i] != (i % 2 ? std::nextafter(middle, 0.f) : middle)) return false;
  }
  return e.order[e.cut_count] == e.cut_count;
}

qt::Weight weight(const WeightSpec& s) {
  qt::Weight w;
  w.codes = at<const uint8_t>(s[0]);
  w.n = s[1], w.k = s[2], w.row_bytes = s[3];
  w.bits = width(s[4]);
  w.flat = s[5] != 0;
  w.grid = {s[6], s[7], s[8]};
  w.values = at<const float>(s[9]);
  w.zero = at<const void>(s[10]);
  w.zero_dtype = int32_t(s[11]);
  if (s[12] < 0 || s[12] > 2) throw std::invalid_argument("quant: scale codings 0 (plain), 1 (powers), 2 (table) expected");
  w.scales.coding = qt::Coding(s[12]);
  w.scales.data = at<const void>(s[13]);
  w.scales.dtype = w.scales.coding == qt::Coding::kPlain ? float_type(s[14]) : 0;
  w.scales.table = at<const float>(s[15]);
  w.scales.above = at<const float>(s[16]);
  w.scales.offset = at<const float>(s[17]);
  w.scales.block = s[18];
  if (w.zero_dtype != kNone && w.zero_dtype != kU8 && w.zero_dtype != kF32)
    throw std::invalid_argument("quant: zeros as uint8 or fp32 expected");
  if (w.flat && w.bits != 4 && w.bits != 8) throw std::invalid_argument("quant: flat codes of 4 or 8 bits expected");
  w.kind = kind_of(w.values, w.bits);
  return w;
}

qt::Encoding encoding(const EncodingSpec& s) {
  qt::Encoding e;
  e.w = at<const void>(s[0]);
  e.dtype = float_type(s[1]);
  e.n = s[2], e.k = s[3], e.row_bytes = s[4];
  e.bits = width(s[5]);
  e.flat = s[6] != 0;
  e.grid = {s[7], s[8], s[9]};
  e.factor = at<const float>(s[10]);
  e.zero = at<const float>(s[11]);
  e.divide = s[12] != 0, e.round_last = s[13] != 0, e.magnitude = s[14] != 0, e.sign_bit = s[15] != 0;
  e.low = int32_t(s[16]), e.high = int32_t(s[17]), e.bias = int32_t(s[18]);
  e.cut_count = int32_t(s[19]);
  if (e.cut_count < 0 || e.cut_count > 255) throw std::invalid_argument("quant: at most 255 cuts expected");
  e.cuts = at<const float>(s[20]);
  e.order = at<const uint8_t>(s[21]);
  e.pad = int32_t(s[22]);
  e.out = at<uint8_t>(s[23]);
  e.kind = rounds_to(e, 4) ? qt::Values::kE4M3 : rounds_to(e, 5) ? qt::Values::kE5M2 : qt::Values::kTable;
  return e;
}

void stats(int64_t w, int64_t dtype, int64_t n, int64_t k, const std::array<int64_t, 3>& grid, int64_t lo, int64_t hi, int threads) {
  const qt::Statistics a = {at<const void>(w), n, k, float_type(dtype), {grid[0], grid[1], grid[2]}};
  py::gil_scoped_release release;
  qt::stats(a, at<float>(lo), at<float>(hi), threads);
}

void encode(const EncodingSpec& spec, int threads) {
  const qt::Encoding e = encoding(spec);
  py::gil_scoped_release release;
  qt::encode(e, threads);
}

void dequantize(const WeightSpec& spec, int64_t row0, int64_t row1, int64_t dtype, int64_t out, int threads) {
  const qt::Weight w = weight(spec);
  float_type(dtype);
  py::gil_scoped_release release;
  qt::dequantize(w, row0, row1, int(dtype), at<void>(out), threads);
}

using MatrixSpec = std::array<int64_t, 4>;  // address, dtype, rows, row stride

qt::Product product(const MatrixSpec& x, int64_t bias, int64_t y) {
  return {at<const void>(x[0]), x[2], x[3], float_type(x[1]), at<const float>(bias), at<void>(y)};
}

void linear(const MatrixSpec& x, const WeightSpec& spec, int64_t bias, int64_t y, int threads) {
  const qt::Weight w = weight(spec);
  const qt::Product p = product(x, bias, y);
  py::gil_scoped_release release;
  qt::linear(w, p, threads);
}

void linear_dx(const MatrixSpec& dy, const WeightSpec& spec, int64_t dx, int threads) {
  const qt::Weight w = weight(spec);
  const qt::Product p = product(dy, 0, dx);
  py::gil_scoped_release release;
  qt::linear_dx(w, p, threads);
}

// A product that has been checked. It is run for tensors that look as those did.
struct Checked {
  qt::Weight w;
  std::vector<Kept> parts;
  Look x, bias;
  int64_t t = 0;
  int32_t dtype = 0, bias_dtype = 0;
};

constexpr char kChecked[] = "fusedadapt.q_checked";

// b as fp32, widened into `own` if it is narrower.
const float* fp32(const void* b, int32_t dtype, int64_t count, std::vector<float>* own) {
  if (dtype == kNone || dtype == kF32) return static_cast<const float*>(b);
  own->resize(size_t(count));
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = static_cast<const uint16_t*>(b)[i];
    (*own)[size_t(i)] = dtype == kBF16 ? bf16_to_float(half) : half_to_float(half);
  }
  return own->data();
}

// (x, bias, y, threads) -> whether y was written: everything looks as it did.
PyObject* run_checked(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    const auto& c = *static_cast<const Checked*>(PyCapsule_GetPointer(self, kChecked));
    Look x, bias, y;
    if (count != 4 || !Looks::at(args[0], &x) || !Looks::at(args[1], &bias) || !Looks::at(args[2], &y)) Py_RETURN_FALSE;
    if (x.signature != c.x.signature || bias.signature != c.bias.signature || !y.data) Py_RETURN_FALSE;
    for (const Kept& part : c.parts)
      if (!part.unchanged()) Py_RETURN_FALSE;
    const int threads = int(PyLong_AsLong(args[3]));
    {
      py::gil_scoped_release release;
      std::vector<float> wide;
      qt::linear(c.w, {x.data, c.t, c.w.k, c.dtype, fp32(bias.data, c.bias_dtype, c.w.n, &wide), y.data}, threads);
    }
    Py_RETURN_TRUE;
  });
}

// x: t x K, contiguous; `parts`: what spec's addresses are of.
py::object checked(const WeightSpec& spec, const py::tuple& parts, const py::object& x, int64_t dtype, int64_t t, const py::object& bias,
                   int64_t bias_dtype) {
  auto c = std::make_unique<Checked>();
  c->w = weight(spec);
  for (const py::handle part : parts) c->parts.emplace_back(py::reinterpret_borrow<py::object>(part));
  if (!Looks::at(x.ptr(), &c->x) || !c->x.data || !Looks::at(bias.ptr(), &c->bias))
    throw std::invalid_argument("q_checked: plain tensors with memory expected");
  c->t = t, c->dtype = float_type(dtype), c->bias_dtype = bias.is_none() ? kNone : float_type(bias_dtype);
  return bound<Checked, &run_checked>(std::move(c), kChecked);
}

}  // namespace

void bind_quant(py::module_& m) {
  m.def("q_stats", &stats);
  m.def("q_encode", &encode);
  m.def("q_dequantize", &dequantize);
  m.def("q_linear", &linear);
  m.def("q_checked", &checked);
  m.def("q_linear_dx", &linear_dx);
  m.def("q_isa", [] { return qt::products().name; });
}

}  // namespace fa
