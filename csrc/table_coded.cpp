// Coded states of the table: which they are, and the size of their blocks.
#include <algorithm>

#include "core/dtypes.h"
#include "table_host.h"

namespace fa {
namespace {

constexpr int kLeastLog2 = 5, kMostLog2 = 11;  // words of a mask; the smallest chunk

}  // namespace

bool Table::coded(const Entry& e, size_t state) const { return e.layouts[state].dtype == kU8 && e.objects[scale_of(state)]; }

// Blocks of the first `cohorts` cohorts: each starts a block of its own.
int64_t Table::blocks(const Entry& e, size_t cohorts, int log2) const {
  const int64_t n = chosen(e);
  const int64_t size = int64_t(1) << log2;
  if (e.cohorts.empty()) return cohorts ? (n + size - 1) / size : 0;
  int64_t total = 0;
  for (size_t c = 0; c < cohorts; ++c) {
    const int64_t end = c + 1 < e.cohorts.size() ? e.cohorts[c + 1] : n;
    total += (end - e.cohorts[c] + size - 1) / size;
  }
  return total;
}

// The block size is the power of two that gives as many blocks as there are scales. (Where several do, every block is a whole cohort in all.)
void Table::validate_coded(int64_t number, Entry& e) {
  e.block_log2 = 0;
  for (size_t k = 0; k < n_states_; ++k) {
    const auto require = [&](bool good) {
      if (good) return;
      e.p = e.g = Layout{};  // validate again next time
      throw TableError(number, std::string("scale:") + PyUnicode_AsUTF8(slots_[scale_of(k)].key.ptr()));
    };
    if (!e.objects[scale_of(k)]) continue;
    const Layout& scale = e.layouts[scale_of(k)];
    require(e.layouts[k].dtype == kU8 && maps_[k] != kNone);
    const size_t n = scale.dims.size() / 2;
    require(n == 1 || n == 2);
    const int64_t wide = n == 2 ? 2 : 1, count = scale.dims[0];
    require((count <= 1 || scale.dims[n] == wide) && (n == 1 || (scale.dims[1] == 2 && scale.dims[3] == 1)));
    int log2 = kLeastLog2;
    while (log2 <= kMostLog2 && blocks(e, std::max<size_t>(e.cohorts.size(), 1), log2) != count) ++log2;
    require(log2 <= kMostLog2 && (e.block_log2 == 0 || e.block_log2 == log2));
    e.block_log2 = log2;
  }
}

}  // namespace fa
