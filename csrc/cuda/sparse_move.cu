// Between dense tensors and their chosen elements: x[chosen] into or out of a short list of values, any number of tensors in one launch.
//
// Bytes per chosen element at low density: a 32-byte sector of x read and one written (gather: read), its value, its position. Positions are
// without repeats where x is written, so no two threads meet.
#include "sparse_keys.cuh"

namespace fa::cuda {
namespace {

constexpr int kWarps = kThreads / int(kWarp);

struct Job {
  char* x;
  char* values;
  int x_dtype, v_dtype;
  float alpha;
};

FA_DEVICE uint32_t read(const char* p, int dtype, int64_t i) {
  p = in_global(p);
  return dtype == kF32 ? vec_load<uint32_t>(p + i * 4) : uint32_t(vec_load<uint16_t>(p + i * 2));
}

FA_DEVICE void write(char* p, int dtype, int64_t i, uint32_t bits) {
  p = in_global(p);
  if (dtype == kF32)
    vec_store(p + i * 4, bits);
  else
    vec_store(p + i * 2, uint16_t(bits));
}

FA_DEVICE float number(uint32_t bits, int dtype) {
  return dtype == kF32 ? as_float(bits) : dtype == kBF16 ? bf16_to_float(uint16_t(bits)) : half_to_float(uint16_t(bits));
}

FA_DEVICE uint32_t rounded(float f, int dtype) {
  return dtype == kF32 ? as_bits(f) : dtype == kBF16 ? uint32_t(float_to_bf16(f)) : uint32_t(float_to_half(f));
}

template <Move op>
FA_DEVICE void move_one(const Job& job, int64_t at, int64_t value) {
  if (op == kGather) {
    write(job.values, job.v_dtype, value, read(job.x, job.x_dtype, at));
  } else if (op == kSwap) {
    const uint32_t old = read(job.x, job.x_dtype, at), now = read(job.values, job.v_dtype, value);
    write(job.x, job.x_dtype, at, now);
    write(job.values, job.v_dtype, value, old);
  } else if (op == kScatter) {
    const uint32_t bits = read(job.values, job.v_dtype, value);
    write(job.x, job.x_dtype, at, job.x_dtype == job.v_dtype ? bits : rounded(number(bits, job.v_dtype), job.x_dtype));
  } else {
    const float by = job.alpha * number(read(job.values, job.v_dtype, value), job.v_dtype);
    write(job.x, job.x_dtype, at, rounded(number(read(job.x, job.x_dtype, at), job.x_dtype) + by, job.x_dtype));
  }
}

// Eight positions a lane.
template <Move op>
FA_DEVICE void move_positions(const Job& job, const MoveItem& item, int64_t group) {
  const bool wide = item.dtypes >> 16 & 1;
  FA_UNROLL
  for (int j = 0; j < int(kMoveGroup / kWarp); ++j) {
    const int64_t i = group * kMoveGroup + j * int(kWarp) + lane_id();
    if (i >= item.count) break;
    const int64_t at =
        wide ? in_global(static_cast<const int64_t*>(item.positions))[i] : in_global(static_cast<const int32_t*>(item.positions))[i];
    if (at >= 0 && at < item.n) move_one<op>(job, at, i);
  }
}

template <Move op>
__global__ void __launch_bounds__(kThreads) move_kernel(const MoveItem* items, int64_t count, int64_t groups, float alpha) {
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (group >= groups) return;
  const MoveItem item = items[find_item(items, count, group)];
  const Job job{static_cast<char*>(item.x), static_cast<char*>(item.values), int(item.dtypes & 0xff), int(item.dtypes >> 8 & 0xff), alpha};
  move_positions<op>(job, item, group - item.first);
}

}  // namespace

void move(Move op, const MoveItem* items, int64_t count, int64_t groups, float alpha, Place place) {
  if (!groups) return;
  const DeviceGuard guard(place.device, "sparse.move");
  const auto kernel = op == kGather    ? move_kernel<kGather>
                      : op == kScatter ? move_kernel<kScatter>
                      : op == kAdd     ? move_kernel<kAdd>
                                       : move_kernel<kSwap>;
  FA_LAUNCH(kernel, blocks_for((groups + kWarps - 1) / kWarps), kThreads, 0, static_cast<cudaStream_t>(place.stream), items, count, groups,
            alpha);
  check(cudaGetLastError(), "sparse.move");
}

}  // namespace fa::cuda
