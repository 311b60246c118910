// The host side of a CPU step: rows, passes over all tensors, clocks.
#pragma once
#include <vector>

#include "../core/table.h"

namespace fa {

struct RuleInfo {
  const char* name;
  int states, stored;
  void (*row)(const Hyper&, Clock&, Row&);
};
extern const RuleInfo kRuleTable[];
extern const int kRuleCount;
int rule_index(const char* name);  // -1 when there is none

namespace cpu {

// One row per distinct (group, clock); sets each tensor's row index and remembers the advanced clocks.
struct Rows {
  std::vector<Row> rows;
  std::vector<Clock> clocks;
  void build(int rule, std::vector<TensorDesc>& tensors, const std::vector<Hyper>& hypers);
  void commit(const std::vector<TensorDesc>& tensors) const;
};

// `by_gradient`: over the elements that count in the gradient norm.
std::vector<Chunk> make_chunks(const std::vector<TensorDesc>& tensors, int64_t chunk, bool by_gradient = false);
// Sum of squares of every tensor's gradient / scale: partial sums per chunk, added in order.
std::vector<double> squares(const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, float scale, int threads);
void sweep(int rule, const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, const Rows& rows, const Globals& globals,
           int threads);

}  // namespace cpu
}  // namespace fa
