// What the low-rank functions share on the host: adapters in panels, masks that are kept, rows in slots.
#pragma once
#include <algorithm>
#include <vector>

#include "lowrank.h"
#include "scratch.h"

namespace fa::cpu::lowrank {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.columns, m.rows, m.step, m.stride}; }

// `panels`, `others` (of right factors), `sums`, `masks`, `dv`, `v`: of the caller, read by all threads. `rows`, `scaled`: of the thread that works.
struct Memory {
  Scratch panels, others, sums, masks, dv, v, rows, scaled;
};
Memory& memory();

struct Trim {
  ~Trim() {
    memory().panels.trim();
    memory().others.trim();
    memory().sums.trim();
    memory().dv.trim();
    memory().v.trim();
  }
};

Segments view(const std::vector<Segment>& s, uint64_t seed);

// Panels for U = drop(x) A^T, one row of panels per segment; element (p, n) of the factor is source[p * step_p + n * step_n].
void pack_shrink(const Kernels& k, Reading& r, std::vector<Segment>& segments, Matrix source, int64_t step_p, int64_t step_n, int threads);
// Panels for drop(u a): all segments one below the other in each.
void pack_expand(const Kernels& k, Writing& w, Matrix a, Scratch& panels, int threads);

// Whether rows are so few that adapters are better read where they lie (1024 x 1024, rank 16, one row: 13 us for 26, rank 256: 22 us for 186); no
// dropout. Columns of b are `rank`: every element of y is a sum of so few products that panels pay off sooner.
bool few_to_shrink(const Matrix& x, const Matrix& a, const std::vector<Segment>& segments);
bool few_to_write(const Matrix& y, const Matrix& b, const std::vector<Segment>& segments);
// U = x a^T. a: R x K, K side by side.
void few_shrink(const Matrix& x, const Matrix& a, float* u, int threads);
// y = bias + scale u b^T, or that added to y. b: N x R, R side by side.
void few_write(const Matrix& y, bool adds, const float* bias, const float* u, float scale, const Matrix& b, int threads);

inline float* rows_scratch(const Kernels& k, const Reading& r) { return memory().rows.get(kBlockRows * r.panel_count * k.width); }

// Blocks of rows that a thread takes at a time: more than one, because what lies ahead is fetched within them only; few, because the last one is
// waited for.
inline int64_t grain_of(int64_t blocks, int threads) { return std::clamp<int64_t>(blocks / (4 * std::max(threads, 1)), 1, 2); }

// The masks that bwd_x drew last: what is added to dx next has the same ones, and drawing them is most of what dropout costs (2048 x 1024, two EPYC
// cores: 0.45 ms; reading the bits: 0.06). Masks are a function of what is kept here beside them, so it does not matter who asks.
struct Drawn {
  uint64_t seed = 0;
  int64_t rows = 0, columns = 0, stride = 0;
  std::vector<Segment> segments;  // those with a mask
};
// Room for the masks that are drawn in `segments`; others may find them once they are `remember`ed. Those too large to be kept are drawn again.
Drawn keep_masks(std::vector<Segment>& segments, uint64_t seed, int64_t rows, int64_t columns);
void remember(Drawn drawn);

// Rows are cut into slots with sums of their own, the fewer the better, for sums are fetched and added up; how many depends on shapes alone. Threads
// take a slot each or, if they are more, strips of kBlockCols columns of it: the same sums.
struct Slots {
  int64_t count = 0, blocks = 0, rows = 0, columns = 0, strips = 0, size = 0, stride = 0, rank = 0;
  bool sums = false;
  float* base = nullptr;

  // `base` is for the caller to set, to `floats()` floats.
  Slots(const Kernels& k, const Reading& r);
  int64_t floats() const { return count * size; }
  bool apart(int threads) const { return threads > count; }  // strips of slots
  int64_t units() const { return count * strips; }
  // One slot, all of its columns; one strip of one: neighbours share rows.
  void read_slot(const Kernels& k, const Reading& r, int64_t slot) const;
  void read_unit(const Kernels& k, const Reading& r, int64_t unit) const;
  // The first row of a slot; of the one behind the last, the number of rows.
  int64_t start(int64_t slot) const { return std::min(blocks * slot / count * kBlockRows, rows); }
  Partial at(int64_t slot) const;
  // out[j] = scale * sum over the slots of row `row`, columns [first, last)
  void reduce(int64_t row, int64_t first, int64_t last, float scale, float* out) const;
  // Rows [first, last) of a segment, of `columns` each: m is ranks x columns.
  void reduce_rows(const Segment& segment, int64_t first, int64_t last, int64_t columns, float* m) const;
  // At most kColumns of them, all ranks: m is columns x ranks.
  void reduce_columns(int64_t from, int64_t to, float* m) const;
  static constexpr int64_t kColumns = 64;
};
}  // namespace fa::cpu::lowrank
