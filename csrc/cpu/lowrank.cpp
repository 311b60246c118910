// The low-rank functions: adapters into panels, rows to threads, sums of slots in a fixed order. How rows are cut depends on shapes alone, never on
// the number of threads, so neither do the results.
#include "lowrank.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <utility>

#include "../core/dtypes.h"
#include "optim.h"
#include "pool.h"
#include "scratch.h"
#include "sweep.h"

namespace fa::cpu::lowrank {
namespace {

// `panels`, `sums`, `masks`: of the caller, read by all threads. `rows`: of the thread that works.
struct Memory {
  Scratch panels, sums, masks, rows;
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

// The masks that bwd_x drew last: what is added to dx next has the same ones, and drawing them is most of what dropout costs (2048 x 1024, two EPYC
// cores: 0.45 ms; reading the bits: 0.06). Masks are a function of what is kept here beside them, so it does not matter who asks.
struct Drawn {
  uint64_t seed = 0;
  int64_t rows = 0, columns = 0, stride = 0;
  std::vector<Segment> segments;  // those with a mask
};
thread_local Drawn drawn;

// The bits of the masked segments of a matrix, one segment after the other; those of `drawn` if they are its.
void place_bits(std::vector<Segment>& segments, uint8_t* bits, int64_t size, int64_t stride, bool known) {
  for (Segment& s : segments)
    if (s.threshold) s.bits = bits, s.bits_stride = stride, s.known = known, bits += size;
}

std::vector<Segment> masked(const std::vector<Segment>& segments) {
  std::vector<Segment> out;
  std::copy_if(segments.begin(), segments.end(), std::back_inserter(out), [](const Segment& s) { return s.threshold != 0; });
  return out;
}

// Room for the masks that bwd_x draws; they may be found once they are `drawn`. Those too large to be kept are drawn again.
Drawn keep_masks(std::vector<Segment>& segments, uint64_t seed, int64_t rows, int64_t columns) {
  const int64_t stride = ceil_div(columns, 128) * 16;
  Drawn out = {seed, rows, columns, stride, masked(segments)};
  const int64_t floats = ceil_div(int64_t(out.segments.size()) * rows * stride, 4);
  drawn = {};
  if (floats == 0 || floats > Scratch::kKept) return {};
  place_bits(segments, reinterpret_cast<uint8_t*>(memory.masks.get(floats)), rows * stride, stride, false);
  return out;
}

void find_masks(std::vector<Segment>& segments, uint64_t seed, int64_t last_row, int64_t columns) {
  const auto same = [](const Segment& a, const Segment& b) { return a.threshold == b.threshold && a.stream == b.stream; };
  const std::vector<Segment> wanted = masked(segments);
  if (wanted.empty() || seed != drawn.seed || columns != drawn.columns || last_row > drawn.rows) return;
  if (!std::equal(wanted.begin(), wanted.end(), drawn.segments.begin(), drawn.segments.end(), same)) return;
  place_bits(segments, reinterpret_cast<uint8_t*>(memory.masks.get(0)), drawn.rows * drawn.stride, drawn.stride, true);
}

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

// Blocks of rows that a thread takes at a time: more than one, because what lies ahead is fetched within them only; few, because the last one is
// waited for.
int64_t grain_of(int64_t blocks, int threads) { return std::clamp<int64_t>(blocks / (4 * std::max(threads, 1)), 1, 2); }

void read_rows(const Kernels& k, const Reading& r, int threads) {
  const int64_t blocks = ceil_div(r.x.rows, kBlockRows);
  parallel_for(blocks, grain_of(blocks, threads), threads, [&](int64_t first, int64_t last) {
    k.read(r, first * kBlockRows, std::min(last * kBlockRows, r.x.rows), Partial{}, rows_scratch(k, r));
  });
}

// Rows are cut into at most 16 slots, each with sums of its own; the blocks of one are at most one more than another's.
struct Slots {
  int64_t count = 0, blocks = 0, rows = 0, size = 0, stride = 0, rank = 0;
  bool sums = false;
  float* base = nullptr;

  Slots(const Kernels& k, const Reading& r) : rows(r.x.rows), rank(r.left ? r.left_rank : 0), sums(r.column_sums || r.y0.dtype) {
    blocks = ceil_div(rows, kBlockRows);
    count = std::min<int64_t>(16, ceil_div(blocks, 2));
    stride = ceil_div(r.x.columns, k.width) * k.width;
    size = (rank + (sums ? 2 : 0)) * stride;
    base = memory.sums.get(count * size);
  }
  // The first row of a slot; of the one behind the last, the number of rows.
  int64_t start(int64_t slot) const { return std::min(blocks * slot / count * kBlockRows, rows); }
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
    for (int64_t s = first; s < last; ++s) k.read(r, slots.start(s), slots.start(s + 1), slots.at(s), rows_scratch(k, r));
  });
}

void write_all(const Kernels& k, const Writing& w, int threads) {
  const int64_t blocks = ceil_div(w.y.rows, kBlockRows), grain = grain_of(blocks, threads);
  const int64_t pieces = ceil_div(w.y.columns, kPiece), rows = grain * kBlockRows;
  parallel_for(ceil_div(blocks, grain) * pieces, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i / pieces * rows, c = i % pieces * kPiece;
      k.write(w, t, std::min(t + rows, w.y.rows), c, std::min(c + kPiece, w.y.columns), nullptr);
    }
  });
}

void write_branch(Writing w, const float* u, const Matrix& a, const std::vector<Segment>& segments, uint64_t seed, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  std::vector<Segment> list = joined(segments);
  if (!w.origin.total) w.origin.total = w.y.columns;
  find_masks(list, seed, w.origin.row + w.y.rows, w.origin.total);
  w.segments = view(list, seed);
  w.u = u;
  w.rank = a.rows;
  pack_expand(k, w, a, threads);
  write_all(k, w, threads);
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
  std::vector<Segment> list = joined(segments);
  Drawn drawing = keep_masks(list, seed, x.rows, x.columns);
  Reading r;
  r.x = x;
  r.segments = view(list, seed);
  r.left = u;
  r.left_rank = list.back().first + list.back().rank;
  const Slots slots(k, r);
  read_slots(k, r, slots, threads);
  drawn = std::move(drawing);
  for (const Segment& s : list)
    parallel_for(s.rank, std::max<int64_t>(1, 2048 / x.columns), threads, [&](int64_t first, int64_t last) {
      for (int64_t i = s.first + first; i < s.first + last; ++i) slots.reduce(i, 0, x.columns, scale_of(s.threshold), m + i * x.columns);
    });
}

void add(const Matrix& y, const float* u, const Matrix& a, const std::vector<Segment>& segments, uint64_t seed, int threads) {
  Writing w;
  w.y = y;
  write_branch(w, u, a, segments, seed, threads);
}

void fill(const Matrix& y, const float* bias, const Origin& origin, const float* u, const Matrix& a, const std::vector<Segment>& segments,
          uint64_t seed, int threads) {
  Writing w;
  w.kind = Write::kFill;
  w.y = y;
  w.bias = bias;
  w.origin = origin;
  write_branch(w, u, a, segments, seed, threads);
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
  constexpr int64_t kColumns = 64;
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
