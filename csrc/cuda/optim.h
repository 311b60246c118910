// The CUDA side of an optimizer step, as the bindings see it. No CUDA types: g++ compiles the bindings.
//   prologue   step counts and rows, on the device
//   squares    sums of squares for global-norm clipping
//   sweep      the update itself
// All pointers are device pointers; a launch is asynchronous; what CUDA refuses is thrown as std::runtime_error with the op's name.
#pragma once
#include <cstdint>

#include "../core/table.h"

namespace fa::cuda {

struct Place {
  int device;
  void* stream;
};

// found_inf nonzero: writes nothing. Tensors may share step and aux; each tensor i gets rows[i]; clocks: scratch for n.
void prologue(int rule, const TensorDesc* tensors, int64_t n, const Hyper* hypers, Row* rows, Clock* clocks, const float* found_inf,
              Place place);
// partial[c]: sum of (gradient / *grad_scale)^2 over chunk c, in a fixed order.
void squares(const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, int32_t chunk, double* partial, const float* grad_scale,
             Place place);
// Dense entries that decay towards zero.
void sweep(int rule, const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, const Globals& globals,
           Place place);
// Any entries without coded states: compact ones and those with an anchor, too.
void sweep_scattered(int rule, const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, const Globals& globals,
                     Place place);
// Any entries; a chunk is a multiple of every entry's block, and a block at most 2048 elements.
void sweep_coded(int rule, const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, const Globals& globals,
                 Place place);

}  // namespace fa::cuda
