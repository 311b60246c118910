// The low-rank functions: adapters into panels, rows to threads, sums of slots in a fixed order. How rows are cut depends on shapes alone, never on
// the number of threads, so neither do the results.
#include "lowrank_host.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <utility>

#include "../core/dtypes.h"
#include "optim.h"
#include "pool.h"
#include "sweep.h"

namespace fa::cpu::lowrank {
namespace {

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

void find_masks(std::vector<Segment>& segments, uint64_t seed, int64_t last_row, int64_t columns) {
  const auto same = [](const Segment& a, const Segment& b) { return a.threshold == b.threshold && a.stream == b.stream; };
  const std::vector<Segment> wanted = masked(segments);
  if (wanted.empty() || seed != drawn.seed || columns != drawn.columns || last_row > drawn.rows) return;
  if (!std::equal(wanted.begin(), wanted.end(), drawn.segments.begin(), drawn.segments.end(), same)) return;
  place_bits(segments, reinterpret_cast<uint8_t*>(memory().masks.get(0)), drawn.rows * drawn.stride, drawn.stride, true);
}

// A right factor of `depth` x n into panels `size` floats apart.
void pack(const Kernels& k, const Matrix& source, int64_t step_p, int64_t step_n, int64_t depth, int64_t n, float scale, float* out,
          int64_t size, int threads) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (depth * k.width));
  parallel_for(ceil_div(n, k.width), grain, threads,
               [&](int64_t first, int64_t last) { k.pack(source, step_p, step_n, depth, n, scale, out, size, first, last); });
}

void read_rows(const Kernels& k, const Reading& r, int threads) {
  const int64_t blocks = ceil_div(r.x.rows, kBlockRows);
  parallel_for(blocks, grain_of(blocks, threads), threads, [&](int64_t first, int64_t last) {
    k.read(r, first * kBlockRows, std::min(last * kBlockRows, r.x.rows), 0, r.x.columns, Partial{}, rows_scratch(k, r));
  });
}

void read_sums(const Kernels& k, const Reading& r, const Slots& slots, int threads) {
  const bool apart = slots.apart(threads);
  parallel_for(apart ? slots.units() : slots.count, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) apart ? slots.read_unit(k, r, i) : slots.read_slot(k, r, i);
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
  if (const Matrix b = transposed(a); few_to_write(w.y, b, segments))
    return few_write(w.y, w.kind == Write::kAdd, w.bias, u, 1.f, b, threads);
  const Kernels& k = kernels();
  const Trim trim;
  std::vector<Segment> list = joined(segments);
  if (!w.origin.total) w.origin.total = w.y.columns;
  find_masks(list, seed, w.origin.row + w.y.rows, w.origin.total);
  w.segments = view(list, seed);
  w.u = u;
  w.rank = a.rows;
  pack_expand(k, w, a, memory().panels, threads);
  write_all(k, w, threads);
}

#if defined(__x86_64__)
bool has_fma() { return __builtin_cpu_supports("fma"); }
#endif

}  // namespace

Memory& memory() {
  thread_local Memory mine;
  return mine;
}

Segments view(const std::vector<Segment>& s, uint64_t seed) { return {s.data(), int(s.size()), seed}; }

Drawn keep_masks(std::vector<Segment>& segments, uint64_t seed, int64_t rows, int64_t columns) {
  const int64_t stride = ceil_div(columns, 128) * 16;
  Drawn out = {seed, rows, columns, stride, masked(segments)};
  const int64_t floats = ceil_div(int64_t(out.segments.size()) * rows * stride, 4);
  drawn = {};
  if (floats == 0 || floats > Scratch::kKept) return {};
  place_bits(segments, reinterpret_cast<uint8_t*>(memory().masks.get(floats)), rows * stride, stride, false);
  return out;
}

void remember(Drawn masks) { drawn = std::move(masks); }

void pack_shrink(const Kernels& k, Reading& r, std::vector<Segment>& segments, Matrix source, int64_t step_p, int64_t step_n, int threads) {
  r.panel_count = 0;
  for (Segment& s : segments) {
    s.panel = r.panel_count;
    r.panel_count += ceil_div(s.rank, k.width);
  }
  const int64_t depth = r.x.columns;
  float* panels = memory().panels.get(r.panel_count * k.width * depth);
  r.panels = panels;
  char* base = static_cast<char*>(source.data);
  for (const Segment& s : segments) {
    source.data = base + s.first * step_n * dtype_size(source.dtype);
    pack(k, source, step_p, step_n, depth, s.rank, scale_of(s.threshold), panels + s.panel * k.width * depth, k.width * depth, threads);
  }
}

void pack_expand(const Kernels& k, Writing& w, Matrix a, Scratch& memory, int threads) {
  const int64_t size = k.width * w.rank;
  float* panels = memory.get(ceil_div(w.y.columns, k.width) * size);
  w.panels = panels;
  char* base = static_cast<char*>(a.data);
  for (int i = 0; i < w.segments.count; ++i) {
    const Segment& s = w.segments.list[i];
    a.data = base + s.first * a.stride * dtype_size(a.dtype);
    pack(k, a, a.stride, a.step, s.rank, w.y.columns, scale_of(s.threshold), panels + s.first * k.width, size, threads);
  }
}

Slots::Slots(const Kernels& k, const Reading& r)
    : rows(r.x.rows), columns(r.x.columns), rank(r.left ? r.left_rank : 0), sums(r.column_sums || r.y0.dtype) {
  constexpr int64_t kBlocks = 16, kMost = 16;  // of a slot at least; slots
  blocks = ceil_div(rows, kBlockRows);
  for (count = 1; count < kMost && blocks >= 2 * count * kBlocks;) count *= 2;  // even shares for most numbers of threads
  strips = ceil_div(columns, kBlockCols);
  stride = ceil_div(columns, k.width) * k.width;
  size = (rank + (sums ? 2 : 0)) * stride;
}

void Slots::read_slot(const Kernels& k, const Reading& r, int64_t slot) const {
  k.read(r, start(slot), start(slot + 1), 0, columns, at(slot), rows_scratch(k, r));
}

void Slots::read_unit(const Kernels& k, const Reading& r, int64_t unit) const {
  const int64_t slot = unit / strips, c = unit % strips * kBlockCols;
  k.read(r, start(slot), start(slot + 1), c, std::min(c + kBlockCols, columns), at(slot), nullptr);
}

Partial Slots::at(int64_t slot) const {
  float* m = base + slot * size;
  return {m, m + rank * stride, m + (rank + 1) * stride, stride};
}

void Slots::reduce(int64_t row, int64_t first, int64_t last, float scale, float* out) const {
  const float* in = base + row * stride;
  for (int64_t j = first; j < last; ++j) out[j - first] = in[j];
  for (int64_t s = 1; s < count; ++s) {
    const float* more = in + s * size;
    for (int64_t j = first; j < last; ++j) out[j - first] += more[j];
  }
  if (scale != 1.f)
    for (int64_t j = first; j < last; ++j) out[j - first] *= scale;
}

void Slots::reduce_rows(const Segment& g, int64_t first, int64_t last, int64_t columns, float* m) const {
  for (int64_t i = g.first + first; i < g.first + last; ++i) reduce(i, 0, columns, scale_of(g.threshold), m + i * columns);
}

void Slots::reduce_columns(int64_t from, int64_t to, float* m) const {
  float row[kColumns];
  for (int64_t i = 0; i < rank; ++i) {
    reduce(i, from, to, 1.f, row);
    for (int64_t j = from; j < to; ++j) m[j * rank + i] = row[j - from];
  }
}

const Kernels& kernels() {
#if defined(__x86_64__)
  const char* name = cpu::kernels().name;
  if (!strcmp(name, "avx512")) return kernels_avx512;
  if (!strcmp(name, "avx2") && has_fma()) return kernels_avx2;
#endif
  return kernels_base;
}

void shrink(const Matrix& x, const Matrix& a, float* u, std::vector<Segment> segments, uint64_t seed, int threads) {
  const Trim trim;
  if (few_to_shrink(x, a, segments)) return few_shrink(x, a, u, threads);
  const Kernels& k = kernels();
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
  Slots slots(k, r);
  slots.base = memory().sums.get(slots.floats());
  read_sums(k, r, slots, threads);
  remember(std::move(drawing));
  for (const Segment& s : list)
    parallel_for(s.rank, std::max<int64_t>(1, 2048 / x.columns), threads,
                 [&](int64_t first, int64_t last) { slots.reduce_rows(s, first, last, x.columns, m); });
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
  if (v) pack_expand(k, w, a, memory().panels, threads);
  write_all(k, w, threads);
}

// dy is read once, or twice if its columns are read apart: dV has need of all of them.
void bwd_dy(const BwdDy& g, int threads) {
  const Kernels& k = kernels();
  const Trim trim;
  std::vector<Segment> of_dv = whole(g.b.columns), of_v = whole(g.rank);
  Reading up, r;
  up.x = g.dy;
  up.col_scale = g.row_scale;
  r = up;
  if (g.b.dtype) {
    up.rank = g.b.columns;
    up.u = g.dv;
    pack_shrink(k, up, of_dv, g.b, g.b.stride, g.b.step, threads);
  }
  r.left = g.v;
  r.left_rank = g.rank;
  r.column_sums = g.db != nullptr;
  r.y0 = g.y0;
  r.scaled = g.scaled;
  Slots slots(k, r);
  slots.base = memory().sums.get(slots.floats());
  if (g.b.dtype && slots.apart(threads)) {
    up.segments = view(of_dv, 0);
    read_rows(k, up, threads);
  } else if (g.b.dtype) {
    r.panels = up.panels, r.panel_count = up.panel_count, r.rank = up.rank, r.u = up.u;
  }
  r.segments = view(r.panels ? of_dv : of_v, 0);
  if (r.panels || r.left || r.column_sums || r.y0.dtype || r.scaled.dtype) read_sums(k, r, slots, threads);
  constexpr int64_t kColumns = Slots::kColumns;
  parallel_for(ceil_div(g.dy.columns, kColumns), 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t from = c * kColumns, to = std::min(from + kColumns, g.dy.columns);
      if (slots.rank) slots.reduce_columns(from, to, g.mb);
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
  pack_expand(k, g, a, memory().panels, threads);
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
