// A low-bit weight of random codes, as bytes and as numbers.
#pragma once
#include <cmath>
#include <string>

#include "cpu/quant.h"
#include "exact.h"

namespace {

struct Layout {
  int bits;
  bool flat, counts;
  int64_t rows, columns;  // of a group
  int exponent = 0;  // of 8-bit floats
};

float float8(int exponent, int code) {
  const int mantissa = 7 - exponent, e = (code & 127) >> mantissa, m = code & ((1 << mantissa) - 1), bias = (1 << (exponent - 1)) - 1;
  const float v = std::ldexp(float(e ? (1 << mantissa) + m : m), (e ? e : 1) - bias - mantissa);
  return code & 128 ? -v : v;
}

struct Case {
  Layout l;
  int64_t n, k, row_bytes, groups;
  fa::cpu::quant::Grid grid;
  Exact<float> values, scale, factor;
  Exact<uint8_t> zero, codes;

  Case(Layout layout, int64_t n_, int64_t k_)
      : l(layout), n(n_), k(k_), row_bytes((k_ * l.bits + 7) / 8), groups(0), values(1 << l.bits), scale(0), factor(0), zero(0), codes(0) {
    grid = l.flat ? fa::cpu::quant::Grid{1, l.columns, (n * k + l.columns - 1) / l.columns}
                  : fa::cpu::quant::Grid{l.rows, l.columns, (k + l.columns - 1) / l.columns};
    groups = l.flat ? grid.wide : (n + l.rows - 1) / l.rows * grid.wide;
    scale = Exact<float>(groups), factor = Exact<float>(groups), zero = Exact<uint8_t>(groups);
    codes = Exact<uint8_t>(l.flat && l.bits == 4 ? (n * k + 1) / 2 : n * row_bytes);
    for (int64_t i = 0; i < values.size; ++i) values[i] = l.exponent ? float8(l.exponent, int(i)) : l.counts ? float(i) - 3 : uniform();
    for (int64_t i = 0; i < groups; ++i) scale[i] = 1 + uniform() / 2, factor[i] = 1 / scale[i], zero[i] = uint8_t(random_bits() % 5);
    for (int64_t i = 0; i < codes.size; ++i) codes[i] = uint8_t(random_bits() & (l.exponent ? 0xbf : 0xff));  // no NaN
  }
  int code(int64_t row, int64_t column) const {
    const int64_t first = l.flat ? (row * k + column) * l.bits : column * l.bits;
    const uint8_t* bytes = l.flat ? codes.get() : codes.get() + row * row_bytes;
    int out = 0;
    for (int b = 0; b < l.bits; ++b) {
      const int64_t bit = l.flat && l.bits == 4 ? (first ^ 4) + b : first + b;
      out |= (bytes[bit / 8] >> bit % 8 & 1) << b;
    }
    return out;
  }
  float at(int64_t row, int64_t column) const {
    const int64_t g = l.flat ? (row * k + column) / l.columns : row / l.rows * grid.wide + column / l.columns;
    return (values[code(row, column)] - float(zero[g])) * scale[g];
  }
  std::string name() const {
    return std::to_string(l.bits) + " bits, " + (l.flat ? "flat " : "grid ") + std::to_string(l.rows) + "x" + std::to_string(l.columns) +
           ", " + std::to_string(n) + " x " + std::to_string(k);
  }
};

}  // namespace
