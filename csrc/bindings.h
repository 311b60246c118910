#pragma once
#include <pybind11/pybind11.h>

namespace fa {
void bind_cuda(pybind11::module_& m);  // csrc/bindings_cuda.cpp: only in builds with CUDA kernels, real or emulated
void bind_looks(pybind11::module_& m);  // csrc/looks.cpp; after the table's, which knows the shim
void bind_sparse(pybind11::module_& m);  // csrc/bindings_sparse.cpp
void bind_merge(pybind11::module_& m);  // csrc/bindings_merge.cpp
void bind_lowrank(pybind11::module_& m);  // csrc/bindings_lowrank.cpp
void bind_fake_quant(pybind11::module_& m);  // csrc/bindings_fake_quant.cpp
void bind_quant_act(pybind11::module_& m);  // csrc/bindings_quant_act.cpp
void bind_quant(pybind11::module_& m);  // csrc/bindings_quant.cpp
}  // namespace fa
