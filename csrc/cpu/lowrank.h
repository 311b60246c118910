// The low-rank family on a CPU (equations: fusedadapt/reference/lowrank.py). All matrices row-major, T rows of K columns; offsets are 64 bits wide.
//
// Whatever reads a large matrix (shrink, bwd_x, bwd_dy, skinny_w) is one walk, `read`: a block of it is widened, masked or scaled into L1 once, and every
// product that was asked for takes it from there. Whatever updates one (add_, scale_add_, merge_) is `write`: u a for a block in L1, then one pass over y.
#pragma once
#include <cstdint>
#include <vector>

#include "../core/macros.h"

namespace fa::cpu::lowrank {

// Element (i, j) of a matrix lies at i * stride + j * step. Only adapters may have a step other than 1.
struct Matrix {
  void* data = nullptr;
  int dtype = 0;  // kNone: absent
  int64_t rows = 0, columns = 0, stride = 0, step = 1;
};

// Rows [first, first + rank) of A, with a dropout mask of their own. threshold 0: no dropout.
struct Segment {
  int64_t first = 0, rank = 0;
  uint32_t threshold = 0, stream = 0;
  int64_t panel = 0;  // shrink: its first panel
  // Its mask, a bit an element, rows `bits_stride` bytes apart: read if `known`, else written where it is drawn. Null: drawn only.
  uint8_t* bits = nullptr;
  int64_t bits_stride = 0;
  bool known = false;
};

// What is kept is multiplied by this.
FA_HD float scale_of(uint32_t threshold) { return float(65536.0 / double(65536 - threshold)); }

// Plain pointers: code of the standard library has no place in files that are compiled once per instruction set.
struct Segments {
  const Segment* list = nullptr;
  int count = 0;
  uint64_t seed = 0;
};

// Adapters are copied into panels of `width` neighbouring columns, fp32: element (p, n) of the right factor of a product at
// [n / width][p][n % width], zeros beyond n.
struct Reading {
  Matrix x;
  Segments segments;
  // U = drop(x) * panels: T x rank, if panels
  const float* panels = nullptr;
  int64_t panel_count = 0, rank = 0;
  float* u = nullptr;
  // sums over rows, if left (T x left_rank): left^T drop(x)
  const float* left = nullptr;
  int64_t left_rank = 0, left_row = 0;  // left begins with this row
  float* row_squares = nullptr;
  bool column_sums = false;
  Matrix y0;  // column sums of x * y0
  const float* col_scale = nullptr;  // after the column sums, x *= col_scale ...
  Matrix scaled;  // ... which is also stored, if there is one
};

// Sums over the rows of one slot. `m`: left_rank rows of `stride` floats; `sums`, `products`: `stride` floats.
struct Partial {
  float *m = nullptr, *sums = nullptr, *products = nullptr;
  int64_t stride = 0;
};

// Of a tile of a larger matrix of `total` columns: where it starts there, which is what its masks go by. total 0: the matrix is whole.
struct Origin {
  int64_t row = 0, column = 0, total = 0;
};

enum class Write { kAdd, kFill, kScaleAdd, kMerge };

struct Writing {
  Write kind = Write::kAdd;
  Matrix y;
  Segments segments;
  const float* u = nullptr;  // T x rank; none: nothing is added and y stays as it is
  const float* panels = nullptr;
  int64_t rank = 0, u_row = 0;  // u begins with this row
  const float* row_scale = nullptr;  // kMerge: per row of y; kScaleAdd: per column (a row of the weight)
  const float* bias = nullptr;
  Matrix out;  // kScaleAdd: row_scale * y + bias
  Origin origin;
};

// Rows and columns of a block; columns that `write` is given at a time.
constexpr int64_t kBlockRows = 48, kBlockCols = 128, kPiece = 1024;

struct Kernels {
  const char* name;
  int64_t width;
  // Panels [first, last) of a right factor of `depth` x n; element (p, n) is source[p * step_p + n * step_n] * scale.
  void (*pack)(const Matrix& source, int64_t step_p, int64_t step_n, int64_t depth, int64_t n, float scale, float* out, int64_t panel_size,
               int64_t first, int64_t last);
  // Rows [t0, t1), columns [k0, k1), all of them for U; k0 a multiple of kBlockCols. scratch, for U only: kBlockRows * panel_count * width floats.
  void (*read)(const Reading&, int64_t t0, int64_t t1, int64_t k0, int64_t k1, const Partial&, float* scratch);
  // Rows [t0, t1), columns [k0, k1); k0 a multiple of kPiece. stats (kMerge): two sums, added to.
  void (*write)(const Writing&, int64_t t0, int64_t t1, int64_t k0, int64_t k1, double* stats);
  void (*dropout)(const Matrix& x, const Matrix& out, int64_t t0, int64_t t1, uint64_t seed, uint32_t threshold);
  // keep[i] = 0xffff where element first + i of `stream` is kept, else 0
  void (*mask)(uint16_t* keep, uint64_t first, int64_t n, uint64_t seed, uint32_t stream, uint32_t threshold);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif
const Kernels& kernels();  // what cpu::use_isa chose; avx2 needs FMA here

// Products of a few rows with adapters that are read where they lie.
struct FewKernels {
  // fp32, times scale; what is left after whole vectors in the upper lanes of a last one, where `dots` has it, too
  void (*widen)(const Matrix& x, float scale, float* to, int64_t stride);
  // out[t][i - first] = m[i] . x[t] for rows [first, last) of m, whose elements lie side by side
  void (*dots)(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t stride, int64_t rows, float* out, int64_t out_stride);
  // columns [first, last) of y: sums + bias, added to what is there or not
  void (*put)(const Matrix& y, bool adds, const float* bias, int64_t first, int64_t last, const float* sums, int64_t stride);
};
extern const FewKernels few_base;
#if defined(__x86_64__)
extern const FewKernels few_avx2, few_avx512;
#endif
constexpr int64_t kFewRows = 48;

// The functions of the reference. `segments` need first, rank, threshold and stream only.
void shrink(const Matrix& x, const Matrix& a, float* u, std::vector<Segment> segments, uint64_t seed, int threads);
void bwd_x(const Matrix& x, const float* u, float* m, const std::vector<Segment>& segments, uint64_t seed, int threads);
// y += drop(u a)
void add(const Matrix& y, const float* u, const Matrix& a, const std::vector<Segment>& segments, uint64_t seed, int threads);
// y = bias + drop(u a), y fp32: what a product is then added to, which is cheaper than adding to the product. bias: null for none.
void fill(const Matrix& y, const float* bias, const Origin& origin, const float* u, const Matrix& a, const std::vector<Segment>& segments,
          uint64_t seed, int threads);
// v, a: both or none
void scale_add(const Matrix& y0, const float* v, const Matrix& a, const float* row_scale, const float* bias, const Matrix& y, int threads);

struct BwdDy {
  Matrix dy, b, y0, scaled;  // scaled: dY0
  const float* v = nullptr;  // T x rank
  int64_t rank = 0;
  const float* row_scale = nullptr;
  float *dv = nullptr, *mb = nullptr, *db = nullptr, *dg = nullptr;  // null: not asked for
};
void bwd_dy(const BwdDy&, int threads);

void skinny_w(const Matrix& w, const Matrix& a, float* c, float* row_squares, int threads);
void merge(const Matrix& w, const float* v, const Matrix& a, const float* row_scale, double* stats, int threads);
void dropout(const Matrix& x, const Matrix& out, uint64_t seed, uint32_t threshold, int threads);

// Of s drop(x) A^T B^T. a: R x K; b: N x R; threshold 0: no dropout.
struct Branch {
  Matrix a, b;
  float scaling = 1;
  uint32_t threshold = 0;
  uint64_t seed = 0;
};
// u = drop(x) A^T (T x R); fp32 y = bias + s u B^T, which the product is added to, or 16-bit y += s u B^T: `shrink`, and `fill` or `add`.
void branch_start(const Matrix& x, const Branch&, const float* bias, float* u, const Matrix& y, int threads);
// da (R x K), db (N x R), and drop(s dy B A) likewise into dx, if there is one: `bwd_dy`, `bwd_x`, and `fill` or `add`.
void branch_back(const Matrix& dy, const Matrix& x, const Branch&, const float* u, float* da, float* db, const Matrix& dx, int threads);

}  // namespace fa::cpu::lowrank
