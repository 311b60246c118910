#pragma once
#include <pybind11/pybind11.h>

namespace fa {
void bind_cuda(pybind11::module_& m);  // csrc/bindings_cuda.cpp: only in builds with CUDA kernels, real or emulated
void bind_lowrank(pybind11::module_& m);  // csrc/bindings_lowrank.cpp
}  // namespace fa
