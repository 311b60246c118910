// The kernels of test_emulator.cpp: right ones, wrong ones (each breaks a GPU), and three to time.
#pragma once
#include "core/launch.h"

namespace {

// --- kernels that are right ---

FA_DEVICE float block_sum(float v) {
  FA_SHARED(float, partial, [32]);
  FA_UNROLL
  for (unsigned d = 16; d; d /= 2) v += fa::shfl_xor(v, d);
  fa::syncthreads();  // the previous call may still be read
  if (fa::lane_id() == 0) partial[threadIdx.x / fa::kWarp] = v;
  fa::syncthreads();
  v = threadIdx.x < blockDim.x / fa::kWarp ? partial[threadIdx.x] : 0.f;
  if (threadIdx.x < fa::kWarp)
    for (unsigned d = 16; d; d /= 2) v += fa::shfl_down(v, d);
  return v;
}

__global__ void __launch_bounds__(256) sum_rows(const float* x, float* out, int columns) {
  float v = 0;
  for (int i = int(threadIdx.x); i < columns; i += int(blockDim.x)) v += x[size_t(blockIdx.x) * columns + i];
  v = block_sum(v);
  const float again = block_sum(threadIdx.x ? 0.f : v);
  if (threadIdx.x == 0) out[blockIdx.x] = again;
}

__global__ void coordinates(uint32_t* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  fa::atomic_add(&out[block * (blockDim.x * blockDim.y * blockDim.z) + thread], 1u);
}

template <class T>
__global__ void transpose(const T* x, T* out, int rows, int columns) {
  T* tile = fa::dynamic_shared<T>();
  const int i = int(threadIdx.y), j = int(threadIdx.x), n = int(blockDim.x);
  const int row = int(blockIdx.y) * n + i, column = int(blockIdx.x) * n + j;
  if (row < rows && column < columns) tile[i * (n + 1) + j] = x[row * columns + column];
  fa::syncthreads();
  const int to_row = int(blockIdx.x) * n + i, to_column = int(blockIdx.y) * n + j;
  if (to_row < columns && to_column < rows) out[to_row * rows + to_column] = tile[j * (n + 1) + i];
}

__global__ void warp_operations(uint32_t* out) {
  const uint32_t me = threadIdx.x, lane = fa::lane_id();
  bool ok = fa::shfl(me, 5) == me - lane + 5 && fa::shfl_xor(me, 3) == (me ^ 3);
  ok &= fa::shfl_down(me, 4) == (lane + 4 < 32 ? me + 4 : me) && fa::shfl_up(me, 4) == (lane >= 4 ? me - 4 : me);
  ok &= fa::shfl_xor(uint64_t(me) << 33, 1) == uint64_t(me ^ 1) << 33 && fa::shfl(double(lane), 31) == 31.0;
  ok &= fa::ballot(lane % 2 == 0) == 0x55555555u && fa::any(lane == 7) && !fa::any(lane == 99) && fa::all(lane < 32) && !fa::all(lane < 31);
  ok &= fa::syncthreads_count(me % 3 == 0) == 22 && fa::syncthreads_or(me == 63) && !fa::syncthreads_or(false);
  if (lane < 16)  // the halves diverge, each with its own mask
    ok &= fa::shfl_xor(me, 8, 0x0000ffffu) == (me ^ 8);
  else
    ok &= fa::all(true, 0xffff0000u);
  fa::syncwarp();
  out[me] = ok;
}

struct alignas(16) Four {
  float v[4];
};

__global__ void scale4(float* x, float by) {
  Four f = fa::vec_load<Four>(x + 4 * threadIdx.x);
  for (float& v : f.v) v *= by;
  fa::vec_store(x + 4 * threadIdx.x, f);
}

__global__ void count_blocks(int* ticket, int* last) {  // "the last block to finish does the rest"
  FA_SHARED(int, mine);
  if (threadIdx.x == 0) mine = fa::atomic_add(ticket, 1);
  fa::syncthreads();
  if (threadIdx.x == 0 && mine == int(gridDim.x) - 1) *last = int(blockIdx.x);
}

// --- kernels that are wrong ---

__global__ void missing_barrier(float* x) {
  FA_SHARED(float, s, [64]);
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[63 - threadIdx.x];
}

__global__ void missing_second_barrier(float* x) {
  FA_SHARED(float, s, [64]);
  for (int turn = 0; turn < 2; ++turn) {
    s[threadIdx.x] = x[threadIdx.x];
    fa::syncthreads();
    x[threadIdx.x] = s[63 - threadIdx.x];
  }
}

__global__ void missing_syncwarp(float* x) {
  FA_SHARED(float, s, [64]);
  s[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void uninitialised_shared(float* out) {
  FA_SHARED(float, total);
  if (out[threadIdx.x] > 0) total = 0;  // the input has no such element
  fa::syncthreads();
  out[threadIdx.x] = total + 1;
}

__global__ void stale_shared(float* out) {  // block 0's value would still be there, were the memory not poisoned for every block
  FA_SHARED(float, seen);
  if (blockIdx.x == 0 && threadIdx.x == 0) seen = 1;
  fa::syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = seen;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 32)
    fa::syncthreads();
  else
    fa::syncthreads();
}

__global__ void barrier_of_two_kinds() { threadIdx.x < 32 ? fa::syncthreads() : fa::syncwarp(); }

__global__ void barrier_after_exit() {
  if (threadIdx.x >= 60) return;
  fa::syncthreads();
}

__global__ void barrier_in_uneven_loop() {
  for (unsigned i = threadIdx.x; i < 70; i += 64) fa::syncthreads();
}

__global__ void shuffle_after_exit(float* x) {
  if (threadIdx.x == 40) return;
  x[threadIdx.x] = fa::shfl_xor(x[threadIdx.x], 1);
}

__global__ void shuffle_in_branches(float* x) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 2)
    v = fa::shfl_xor(v, 1);
  else
    v = fa::shfl_xor(v, 1);
  x[threadIdx.x] = v;
}

__global__ void shuffle_without_self() { fa::shfl_xor(1.f, 1, 0xfffffffeu); }
__global__ void shuffle_from_outside() {
  if (threadIdx.x % 32 < 16) fa::shfl_xor(1.f, 16, 0xffffu);
}
__global__ void shuffle_in_part_warp() { fa::shfl_xor(1.f, 1); }
__global__ void vote_against_barrier() { threadIdx.x < 20 ? fa::syncthreads() : void(fa::any(true)); }
__global__ void write_at(float* x, int i) { x[i] = 1; }
__global__ void shared_overrun(float* x) {
  FA_SHARED(float, a, [8]);
  FA_SHARED(float, b, [8]);
  volatile int past = 8;
  a[0] = b[0] = x[0];
  (&a[0])[past] = 1;
}
__global__ void too_much_shared(float* x) {
  FA_SHARED(float, a, [8192]);
  FA_SHARED(float, b, [8192]);
  x[0] = a[0] = b[0] = 1;
}
__global__ void deep_stack(volatile float* x, int n) {
  struct {
    volatile float v[1000];
  } frame;
  frame.v[n % 1000] = x[0];
  fa::syncthreads();
  x[0] = frame.v[n % 1000];
}

// --- kernels to time ---

__global__ void add_one(float* x) { x[blockIdx.x * blockDim.x + threadIdx.x] += 1; }
__global__ void three_barriers(float* x) {
  for (int i = 0; i < 3; ++i) fa::syncthreads();
  x[blockIdx.x * blockDim.x + threadIdx.x] += 1;
}
__global__ void five_shuffles(float* x) {
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned d = 16; d; d /= 2) v += fa::shfl_xor(v, d);
  x[blockIdx.x * blockDim.x + threadIdx.x] = v;
}

}  // namespace
