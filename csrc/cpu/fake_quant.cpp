// Fake quantization over threads: who does which piece is chance, what a piece is and the order in which sums are added up is not.
#include "fake_quant.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "optim.h"
#include "pool.h"

namespace fa::cpu {
namespace {

const FakeKernels& fake_kernels() {
#if defined(__x86_64__)
  if (!std::strcmp(kernels().name, "avx512")) return fake_avx512;
  if (!std::strcmp(kernels().name, "avx2")) return fake_avx2;
#endif
  return fake_base;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs shorter than a vector are not gone through one by one: neighbouring channels are worked on side by side.
bool by_columns(const FakeQuant& job) { return job.run < 16 && job.run == job.line && job.groups > 1; }

struct Span {
  int64_t begin, end, group;
};

// Pieces of runs: piece p of run r is number r * pieces + p.
struct Pieces {
  const FakeQuant& job;
  int64_t pieces, count;

  explicit Pieces(const FakeQuant& j) : job(j), pieces(ceil_div(j.run, kFakePiece)), count(j.runs() * pieces) {}

  Span at(int64_t number) const {
    const int64_t r = number / pieces, per_line = job.runs_per_line(), within = r % per_line * job.run;
    const int64_t start = r / per_line * job.line, last = start + std::min(within + job.run, job.line);
    const int64_t begin = std::min(start + within + number % pieces * kFakePiece, last);
    return {begin, std::min(begin + kFakePiece, last), r % job.groups};
  }

  template <class Body>
  void each(int threads, Body body) const {
    parallel_for(count, std::max<int64_t>(1, kFakePiece / job.run), threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i, at(i));
    });
  }
};

// Blocks of a matrix of groups * run columns.
struct Blocks {
  int64_t rows, columns, row_blocks, column_blocks;

  explicit Blocks(const FakeQuant& job)
      : rows(job.n / (job.groups * job.run)),
        columns(job.groups * job.run),
        row_blocks(ceil_div(rows, kFakeRows)),
        column_blocks(ceil_div(columns, kFakeColumns)) {}

  // body(row block, first and last row, first and last column)
  template <class Body>
  void each(int threads, Body body) const {
    parallel_for(row_blocks * column_blocks, 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t r = i / column_blocks, row = r * kFakeRows, c = i % column_blocks * kFakeColumns;
        body(r, row, std::min(row + kFakeRows, rows), c, std::min(c + kFakeColumns, columns));
      }
    });
  }
};

// d[g] = sum over i, j of part(i, g, j), in that order.
template <class Part>
void add_up(int64_t outer, int64_t groups, int64_t inner, float* d_scale, float* d_offset, int threads, Part part) {
  parallel_for(groups, std::max<int64_t>(1, 4096 / (outer * inner)), threads, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g) {
      FakeSums total{0, 0};
      for (int64_t i = 0; i < outer; ++i)
        for (int64_t j = 0; j < inner; ++j) {
          const FakeSums& s = part(i, g, j);
          total.scale += s.scale;
          total.outside += s.outside;
        }
      d_scale[g] = float(total.scale);
      d_offset[g] = float(total.outside);
    }
  });
}

}  // namespace

void fake_quant(const FakeQuant& job, void* y, int threads) {
  const FakeKernels& k = fake_kernels();
  if (by_columns(job))
    Blocks(job).each(threads,
                     [&](int64_t, int64_t row0, int64_t row1, int64_t c0, int64_t c1) { k.forward_columns(job, y, row0, row1, c0, c1); });
  else
    Pieces(job).each(threads, [&](int64_t, const Span& s) { k.forward(job, y, s.group, s.begin, s.end); });
}

void fake_quant_backward(const FakeQuant& job, const void* dy, void* dx, float* d_scale, float* d_offset, int threads) {
  const FakeKernels& k = fake_kernels();
  std::vector<FakeSums> sums;
  const bool wanted = d_scale != nullptr;
  if (by_columns(job)) {
    const Blocks blocks(job);
    const int64_t columns = blocks.columns;
    if (wanted) sums.resize(size_t(blocks.row_blocks * columns));
    blocks.each(threads, [&](int64_t r, int64_t row0, int64_t row1, int64_t c0, int64_t c1) {
      k.backward_columns(job, dy, dx, row0, row1, c0, c1, wanted ? &sums[size_t(r * columns + c0)] : nullptr);
    });
    if (wanted)
      add_up(blocks.row_blocks, job.groups, job.run, d_scale, d_offset, threads,
             [&](int64_t r, int64_t g, int64_t j) -> const FakeSums& { return sums[size_t(r * columns + g * job.run + j)]; });
    return;
  }
  const Pieces pieces(job);
  if (wanted) sums.resize(size_t(pieces.count));
  pieces.each(threads,
              [&](int64_t i, const Span& s) { k.backward(job, dy, dx, s.group, s.begin, s.end, wanted ? &sums[size_t(i)] : nullptr); });
  if (wanted)
    add_up(job.runs() / job.groups, job.groups, pieces.pieces, d_scale, d_offset, threads,
           [&](int64_t a, int64_t g, int64_t p) -> const FakeSums& { return sums[size_t((a * job.groups + g) * pieces.pieces + p)]; });
}

}  // namespace fa::cpu
