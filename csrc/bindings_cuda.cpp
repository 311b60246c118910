// Python's door to csrc/cuda/optim.h: addresses as integers (0 = null). Launches are asynchronous; the caller keeps everything alive
// until the stream has passed.
#include "bindings.h"

// Without CUDA kernels in this build there is nothing to bind; the build scripts compile every csrc/*.cpp.
#if defined(FA_WITH_CUDA)
#include <stdexcept>
#include <string>

#include "cpu/sweep.h"
#include "cuda/optim.h"
#if defined(FA_EMULATE)
#include "core/launch.h"
#endif

namespace py = pybind11;

namespace fa {

void bind_cuda_sparse(py::module_& m);  // csrc/bindings_cuda_sparse.cpp
void bind_cuda_quant(py::module_& m);  // csrc/bindings_cuda_quant.cpp

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
T* needed(uintptr_t address, int64_t count, const char* op, const char* name) {
  if (!address && count)
    throw std::invalid_argument(std::string(op) + ": expected the address of " + std::to_string(count) + " " + name +
                                "; got 0; pass a device pointer");
  return at<T>(address);
}

void check_rule(int rule, const char* op) {
  if (rule < 0 || rule >= kRuleCount)
    throw std::invalid_argument(std::string(op) + ": expected a rule number below " + std::to_string(kRuleCount) + "; got " +
                                std::to_string(rule) + "; take it from RULES");
}

void check_counts(int64_t n, int64_t chunk, const char* op) {
  if (n < 0) throw std::invalid_argument(std::string(op) + ": expected a count; got " + std::to_string(n));
  if (chunk < 1 || chunk > 1 << 30)
    throw std::invalid_argument(std::string(op) + ": expected 1 to 2^30 elements per chunk; got " + std::to_string(chunk) +
                                "; use Table.chunk_for");
}

void cuda_sweep(int rule, uintptr_t desc, int64_t n_tensors, uintptr_t chunks, int64_t n_chunks, int64_t chunk, uintptr_t rows,
                uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip, uint64_t seed, bool stochastic, int device, uintptr_t stream,
                int path) {
  const char* op = "cuda_sweep";
  check_rule(rule, op);
  check_counts(n_tensors, chunk, op);
  check_counts(n_chunks, chunk, op);
  const Globals globals{at<float>(grad_scale), at<float>(found_inf), at<float>(clip), seed, stochastic, int32_t(chunk)};
  constexpr decltype(&cuda::sweep) launches[] = {&cuda::sweep, &cuda::sweep_scattered, &cuda::sweep_coded};
  if (path < 0 || path > 2)
    throw std::invalid_argument(std::string(op) + ": expected path 0, 1 or 2; got " + std::to_string(path) + "; see csrc/cuda/optim.h");
  const auto launch = launches[path];
  launch(rule, needed<TensorDesc>(desc, n_chunks, op, "descriptors"), needed<Chunk>(chunks, n_chunks, op, "chunks"), n_chunks,
         needed<Row>(rows, n_chunks, op, "rows"), globals, {device, at<void>(stream)});
}

void cuda_squares(uintptr_t desc, uintptr_t chunks, int64_t n_chunks, int64_t chunk, uintptr_t partial, uintptr_t grad_scale, int device,
                  uintptr_t stream) {
  const char* op = "cuda_squares";
  check_counts(n_chunks, chunk, op);
  cuda::squares(needed<TensorDesc>(desc, n_chunks, op, "descriptors"), needed<Chunk>(chunks, n_chunks, op, "chunks"), n_chunks,
                int32_t(chunk), needed<double>(partial, n_chunks, op, "partial sums"), at<float>(grad_scale), {device, at<void>(stream)});
}

void cuda_prologue(int rule, uintptr_t desc, int64_t n, uintptr_t hypers, uintptr_t rows, uintptr_t clocks, uintptr_t found_inf, int device,
                   uintptr_t stream) {
  const char* op = "cuda_prologue";
  check_rule(rule, op);
  check_counts(n, 1, op);
  cuda::prologue(rule, needed<TensorDesc>(desc, n, op, "descriptors"), n, needed<Hyper>(hypers, n, op, "hyper-parameters"),
                 needed<Row>(rows, n, op, "rows"), needed<Clock>(clocks, n, op, "clocks"), at<float>(found_inf),
                 {device, at<void>(stream)});
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_cuda_sparse(m);
  bind_cuda_quant(m);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  using namespace py::literals;
  m.def("cuda_sweep", &cuda_sweep, no_gil, "rule"_a, "desc_ptr"_a, "n_tensors"_a, "chunks_ptr"_a, "n_chunks"_a, "chunk"_a, "rows_ptr"_a,
        "grad_scale_ptr"_a, "found_inf_ptr"_a, "clip_ptr"_a, "seed"_a, "stochastic"_a, "device"_a, "stream"_a, "path"_a = 0,
        "Updates every tensor: descriptors, chunks and fp32[24] rows on the device (see core/table.h). `path`: 0 for plain entries, 1 "
        "also for compact ones and anchors, 2 for any, coded states included.");
  m.def("cuda_squares", &cuda_squares, no_gil, "desc_ptr"_a, "chunks_ptr"_a, "n_chunks"_a, "chunk"_a, "partial_ptr"_a, "grad_scale_ptr"_a,
        "device"_a, "stream"_a, "partial (fp64[n_chunks]) = sum of squares of gradient / scale per chunk, in a fixed order.");
  m.def("cuda_prologue", &cuda_prologue, no_gil, "rule"_a, "desc_ptr"_a, "n"_a, "hypers_ptr"_a, "rows_ptr"_a, "clocks_ptr"_a,
        "found_inf_ptr"_a, "device"_a, "stream"_a,
        "Advances step counts and writes one fp32[24] row per tensor; hypers: fp64 per group; clocks: scratch fp64[n, 3].");
#if defined(FA_EMULATE)
  m.def("emulator_seed", &emulator::set_seed, "seed"_a, "Chooses the random order in which blocks and threads run.");
#endif
}

}  // namespace fa
#endif
