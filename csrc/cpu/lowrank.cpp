// The low-rank functions: adapters into panels, rows to threads, sums of slots in a fixed order. How rows are cut depends on shapes alone, never on
// the number of threads, so neither do the results.
#include "lowrank.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>

#include "../core/dtypes.h"
#include "optim.h"
#include "pool.h"
#include "sweep.h"

namespace fa::cpu::lowrank {
namespace {

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Memory that stays with its thread between calls: fresh pages fault, one by one. What is larger than kKept goes back.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (size_t(floats) * sizeof(float) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }
  void trim() {
    if (size_ > kKept) memory_.reset(), size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 4 << 20;
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// `panels`, `sums`: of the caller, read by all threads. `rows`: of the thread that works.
struct Memory {
  Scratch panels, sums, rows;
};
thread_local Memory memory;

struct Trim {
  ~Trim() {
    memory.panels.trim();
    memory.sums.trim();
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Neighbours without dropout become one: a product of their joint height.
std::vector<Segment> joined(const std::vector<Segment>& segments) {
  std::vector<Segment> out;
  for (const Segment& s : segments) {
    if (!out.empty() && !s.threshold && !out.back().threshold)
      out.back().rank += s.rank;
    else
      out.push_back(s);
  }
  return out;
}

std::vector<Segment> whole(int64_t rank) { return {Segment{0, rank, 0, 0, 0}}; }

Segments view(const std::vector<Segment>& s, uint64_t seed) { return {s.data(), int(s.size()), seed}; }

// A right factor of `depth` x n into panels `size` floats apart.
void pack(const Kernels& k, const Matrix& source, int64_t step_p, int64_t step_n, int64_t depth, int64_t n, float scale, float* out,
          int64_t size, int threads) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (depth * k.width));
  parallel_for(ceil_div(n, k.width), grain, threads,
               [&](int64_t first, int64_t last) { k.pack(source, step_p, step_n, depth, n, scale, out, size, first, last); });
}

// Panels for U = drop(x) A^T, one row of panels per segment; element (p, n) of the factor is source[p * step_p + n * step_n].
void pack_shrink(const Kernels& k, Reading& r, std::vector<Segment>& segments, Matrix source, int64_t step_p, int64_t step_n, int threads) {
  r.panel_count = 0;
  for (Segment& s : segments) {
    s.panel = r.panel_count;
    r.panel_count += ceil_div(s.rank, k.width);
  }
  const int64_t depth = r.x.columns;
  float* panels = memory.panels.get(r.panel_count * k.width * depth);
  r.panels = panels;
  char* base = static_cast<char*>(source.data);
  for (const Segment& s : segments) {
    source.data = base + s.first * step_n * dtype_size(source.dtype);
    pack(k, source, step_p, step_n, depth, s.rank, scale_of(s.threshold), panels + s.panel * k.width * depth, k.width * depth, threads);
  }
}

// Panels for drop(u a): all segments one below the other in each.
void pack_expand(const Kernels& k, Writing& w, Matrix a, int threads) {
  const int64_t size = k.width * w.rank;
  float* panels = memory.panels.get(ceil_div(w.y.columns, k.width) * size);
  w.panels = panels;
  char* base = static_cast<char*>(a.data);
  for (int i = 0; i < w.segments.count; ++i) {
    const Segment& s = w.segments.list[i];
    a.data = base + s.first * a.stride * dtype_size(a.dtype);
    pack(k, a, a.stride, a.step, s.rank, w.y.columns, scale_of(s.threshold), panels + s.first * k.width, size, threads);
  }
}

float* rows_scratch(const Kernels& k, const Reading& r) { return memory.rows.get(kBlockRows * r.panel_count * k.width); }

void read_rows(const Kernels& k, const Reading& r, int threads) {
  parallel_for(ceil_div(r.x.rows, kBlockRows), 1, threads, [&](int64_t first, int64_t last) {
    k.read(r, first * kBlockRows, std::min(last * kBlockRows, r.x.rows), Partial{}, rows_scratch(k, r));
  });
}

// Rows are cut into at most 16 slots, each with sums of its own.
struct Slots {
  int64_t count = 0, rows = 0, size = 0, stride = 0, rank = 0;
  bool sums = false;
  float* base = nullptr;

  Slots(const Kernels& k, const Reading& r) : rank(r.left ? r.left_rank : 0), sums(r.column_sums || r.y0.dtype) {
    const int64_t blocks = ceil_div(r.x.rows, kBlockRows);
    rows = ceil_div(blocks, std::min<int64_t>(16, ceil_div(blocks, 2))) * kBlockRows;
    count = ceil_div(r.x.rows, rows);
    stride = ceil_div(r.x.columns, k.width) * k.width;
    size = (rank + (sums ? 2 : 0)) * stride;
    base = memory.sums.get(count * size);
  }
  Partial at(int64_t slot) const {
    float* m = base + slot * size;
    return {m, m + rank * stride, m + (rank + 1) * stride, stride};
  }
  // out[j] = scale * sum over the slots of row `row`, columns [first, last)
  void reduce(int64_t row, int64_t first, int64_t last, float scale, float* out) const {
    const float* in = base + row * stride;
    for (int64_t j = first; j < last; ++j) out[j - first] = in[j];
    for (int64_t s = 1; s < count; ++s) {
      const float* more = in + s * size;
      for (int64_t j = first; j < last; ++j) out[j - first] += more[j];
    }
    if (scale != 1.f)
      for (int64_t j = first; j < last; ++j) out[j - first] *= scale;
  }
};

void read_slots(const Kernels& k, const Reading& r, const Slots& slots, int threads) {
  parallel_for(slots.count, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      k.read(r, s * slots.rows, std::min((s + 1) * slots.rows, r.x.rows), slots.at(s), rows_scratch(k, r));
  });
}

void write_all(const Kernels& k, const Writing& w, int threads) {
  const int64_t pieces = ceil_div(w.y.columns, kPiece);
  parallel_for(ceil_div(w.y.rows, kBlockRows) * pieces, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i / pieces * kBlockRows, c = i % pieces * kPiece;
      k.write(w, t, std::min(t + kBlockRows, w.y.rows), c, std::min(c + kPiece, w.y.columns), nullptr);
    }
  });
}

#if defined(__x86_64__)
bool has_fma() { return __builtin_cpu_supports("fma"); }
#endif

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  const char* name = cpu::kernels().name;
  if (!strcmp(name, "avx512")) return kernels_avx512;
  if (!strcmp(name, "avx2") && has_fma()) return kernels_avx2;
#endif
  return kernels_base;
}

void shrink(const Matrix& x, const Matrix& a, float* u, std::vector<Segment> segments, uint64_t seed, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  segments = joined(segments);
  Reading r;
  r.x = x;
  r.rank = a.rows;
  r.u = u;
  pack_shrink(k, r, segments, a, a.step, a.stride, threads);
  r.segments = view(segments, seed);
  read_rows(k, r, threads);
}

void bwd_x(const Matrix& x, const float* u, float* m, const std::vector<Segment>& segments, uint64_t seed, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  const std::vector<Segment> list = joined(segments);
  Reading r;
  r.x = x;
  r.segments = view(list, seed);
  r.left = u;
  r.left_rank = list.back().first + list.back().rank;
  const Slots slots(k, r);
  read_slots(k, r, slots, threads);
  for (const Segment& s : list)
    parallel_for(s.rank, std::max<int64_t>(1, 16384 / x.columns), threads, [&](int64_t first, int64_t last) {
      for (int64_t i = s.first + first; i < s.first + last; ++i) slots.reduce(i, 0, x.columns, scale_of(s.threshold), m + i * x.columns);
    });
}

void add(const Matrix& y, const Matrix& out, const Origin& origin, const float* u, const Matrix& a, const std::vector<Segment>& segments,
         uint64_t seed, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  const std::vector<Segment> list = joined(segments);
  Writing w;
  w.y = y;
  w.out = out;
  w.origin = origin;
  if (!origin.total) w.origin.total = y.columns;
  w.segments = view(list, seed);
  w.u = u;
  w.rank = a.rows;
  pack_expand(k, w, a, threads);
  write_all(k, w, threads);
}

void scale_add(const Matrix& y0, const float* v, const Matrix& a, const float* row_scale, const float* bias, const Matrix& y, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  const std::vector<Segment> list = whole(a.rows);
  Writing w;
  w.kind = Write::kScaleAdd;
  w.y = y0;
  w.segments = view(list, 0);
  w.u = v;
  w.rank = a.rows;
  w.row_scale = row_scale;
  w.bias = bias;
  w.out = y;
  if (v) pack_expand(k, w, a, threads);
  write_all(k, w, threads);
}

void bwd_dy(const BwdDy& g, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  std::vector<Segment> list = whole(g.b.dtype ? g.b.columns : g.rank);
  Reading r;
  r.x = g.dy;
  r.left = g.v;
  r.left_rank = g.rank;
  r.column_sums = g.db != nullptr;
  r.y0 = g.y0;
  r.col_scale = g.row_scale;
  r.scaled = g.scaled;
  if (g.b.dtype) {
    r.rank = g.b.columns;
    r.u = g.dv;
    pack_shrink(k, r, list, g.b, g.b.stride, g.b.step, threads);
  }
  r.segments = view(list, 0);
  const Slots slots(k, r);
  read_slots(k, r, slots, threads);
  constexpr int64_t kColumns = 128;
  parallel_for(ceil_div(g.dy.columns, kColumns), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t from = c * kColumns, to = std::min(from + kColumns, g.dy.columns);
      float row[kColumns];
      for (int64_t i = 0; i < slots.rank; ++i) {
        slots.reduce(i, from, to, 1.f, row);
        for (int64_t j = from; j < to; ++j) g.mb[j * g.rank + i] = row[j - from];
      }
      if (g.db) slots.reduce(slots.rank, from, to, 1.f, g.db + from);
      if (g.dg) slots.reduce(slots.rank + 1, from, to, 1.f, g.dg + from);
    }
  });
}

void skinny_w(const Matrix& w, const Matrix& a, float* c, float* row_squares, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  std::vector<Segment> list = whole(a.rows);
  Reading r;
  r.x = w;
  r.rank = a.rows;
  r.u = c;
  r.row_squares = row_squares;
  pack_shrink(k, r, list, a, a.step, a.stride, threads);
  r.segments = view(list, 0);
  read_rows(k, r, threads);
}

void merge(const Matrix& w, const float* v, const Matrix& a, const float* row_scale, double* stats, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  const std::vector<Segment> list = whole(a.rows);
  Writing g;
  g.kind = Write::kMerge;
  g.y = w;
  g.segments = view(list, 0);
  g.u = v;
  g.rank = a.rows;
  g.row_scale = row_scale;
  pack_expand(k, g, a, threads);
  const int64_t blocks = ceil_div(w.rows, kBlockRows);
  std::vector<double> parts(size_t(2 * blocks), 0.0);
  parallel_for(blocks, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      k.write(g, i * kBlockRows, std::min((i + 1) * kBlockRows, w.rows), 0, w.columns, parts.data() + 2 * i);
  });
  stats[0] = stats[1] = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    stats[0] += parts[size_t(2 * i)];
    stats[1] += parts[size_t(2 * i + 1)];
  }
}

void dropout(const Matrix& x, const Matrix& out, uint64_t seed, uint32_t threshold, int threads) {
  const Kernels& k = kernels();
  parallel_for(ceil_div(x.rows, kBlockRows), 1, threads, [&](int64_t first, int64_t last) {
    k.dropout(x, out, first * kBlockRows, std::min(last * kBlockRows, x.rows), seed, threshold);
  });
}

}  // namespace fa::cpu::lowrank
