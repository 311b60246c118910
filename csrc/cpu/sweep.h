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
  void attach(const std::vector<TensorDesc>& tensors);  // whenever the tensors have changed
  void build(int rule, std::vector<TensorDesc>& tensors, const std::vector<Hyper>& hypers);
  void commit() const;

 private:
  // What is read of a tensor, by one thread, in a fifth of the cache lines that its descriptor has.
  struct Meter {
    float* step;
    double* aux[2];
    int32_t group, row;
  };
  std::vector<Meter> meters_;
};

// Called by the thread that is about to update a tensor (number k), and a little earlier to prefetch what that call needs.
struct Watch {
  virtual void near(int64_t k) = 0;
  virtual void start(int64_t k) = 0;
};

// `by_gradient`: over the elements that count in the gradient norm.
std::vector<Chunk> make_chunks(const std::vector<TensorDesc>& tensors, int64_t chunk, bool by_gradient = false);
// Sum of squares of every tensor's gradient / scale, one double each: partial sums per chunk, added in order.
void squares(const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, float scale, int threads, double* out);
void sweep(int rule, const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, const Rows& rows, const Globals& globals,
           int threads, Watch* watch = nullptr);

}  // namespace cpu
}  // namespace fa
