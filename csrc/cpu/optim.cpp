#include "optim.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../core/dtypes.h"
#include "../core/rules.h"
#include "pool.h"
#include "prefetch.h"
#include "sweep.h"

namespace fa {

const RuleInfo kRuleTable[] = {
#define X(name, type) {#name, type::kStates, type::kStored, type::row},
    FA_RULES(X)
#undef X
};
const int kRuleCount = int(sizeof(kRuleTable) / sizeof(kRuleTable[0]));

int rule_index(const char* name) {
  for (int i = 0; i < kRuleCount; ++i)
    if (!strcmp(kRuleTable[i].name, name)) return i;
  return -1;
}

namespace cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
#endif

}  // namespace

bool has_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

namespace {

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  if (!strcmp(name, "avx512")) return has_avx512() ? &kernels_avx512 : nullptr;
  if (!strcmp(name, "avx2")) return has_avx2() ? &kernels_avx2 : nullptr;
#endif
  return strcmp(name, "base") ? nullptr : &kernels_base;
}

const Kernels* best() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* k = find(name)) return k;
  return &kernels_base;
}

std::atomic<const Kernels*> chosen{nullptr};

// Chunks per work item: small tensors are handed out in batches so that an item is worth its hand-out, but every thread should get several. A sample of
// the chunks tells their size.
int64_t grain_of(const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, int threads) {
  constexpr size_t kSample = 64;
  const size_t stride = chunks.size() / kSample + 1;
  int64_t total = 0, seen = 0;
  for (size_t c = 0; c < chunks.size(); c += stride, ++seen) {
    const bool ends = c + 1 == chunks.size() || chunks[c + 1].tensor != chunks[c].tensor;
    total += (ends ? tensors[chunks[c].tensor].numel : chunks[c + 1].offset) - chunks[c].offset;
  }
  const int64_t worth = 65536 / std::max<int64_t>(total / std::max<int64_t>(seen, 1), 1);
  return std::max<int64_t>(1, std::min(worth, int64_t(chunks.size()) / (8 * std::max(threads, 1))));
}

// The first lines of a chunk's arrays: a small tensor is over before the hardware has noticed that it is read in order.
void prefetch_array(const TensorDesc& t, const void* base, int dtype, int64_t offset) {
  if (!base) return;
  const char* p = static_cast<const char*>(base) + offset * dtype_size(dtype);
  const int64_t bytes = std::min<int64_t>((t.numel - offset) * dtype_size(dtype), 512);
  for (int64_t line = 0; line < bytes; line += 64) prefetch_line<0, 2>(p + line);
}

void prefetch_chunk(const TensorDesc& t, int64_t offset, int states) {
  if (!t.index) prefetch_array(t, t.param, t.param_dtype, offset);
  if (!t.index || t.compact_grad) prefetch_array(t, t.grad, t.grad_dtype, offset);
  for (int k = 0; k < states; ++k) prefetch_array(t, t.state[k], t.state_dtype[k], offset);
  prefetch_array(t, t.extra, t.extra_dtype, offset);
  if (t.mask) prefetch_line(t.mask + offset / 32);
}

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load();
  if (!k) chosen = k = best();
  return *k;
}

bool use_isa(const char* name) {
  const Kernels* k = find(name);
  if (k) chosen = k;
  return k != nullptr;
}

void Rows::attach(const std::vector<TensorDesc>& tensors) {
  meters_.clear();
  for (const TensorDesc& t : tensors) meters_.push_back({t.step, {t.aux[0], t.aux[1]}, t.group, t.row});
}

void Rows::build(int rule, std::vector<TensorDesc>& tensors, const std::vector<Hyper>& hypers) {
  rows.clear();
  clocks.clear();
  std::vector<int> last(hypers.size(), -1);  // most tensors of a group share its last row
  std::vector<std::pair<int, Clock>> keys;
  for (size_t i = 0; i < meters_.size(); ++i) {
    Meter& t = meters_[i];
    const Clock before{double(*t.step), {t.aux[0] ? *t.aux[0] : 0.0, t.aux[1] ? *t.aux[1] : 0.0}};
    const auto same = [&](const std::pair<int, Clock>& k) {
      return k.first == t.group && k.second.step == before.step && k.second.aux[0] == before.aux[0] && k.second.aux[1] == before.aux[1];
    };
    int found = last[t.group] >= 0 && same(keys[last[t.group]]) ? last[t.group] : -1;
    for (size_t k = keys.size(); found < 0 && k-- > 0 && keys.size() < 64;) found = same(keys[k]) ? int(k) : -1;
    if (found < 0) {
      found = int(keys.size());
      keys.push_back({t.group, before});
      Clock now = before;
      now.step += 1.0;
      Row row;
      kRuleTable[rule].row(hypers[t.group], now, row);
      rows.push_back(row);
      clocks.push_back(now);
    }
    last[t.group] = found;
    if (t.row != found) t.row = tensors[i].row = found;
  }
}

void Rows::commit() const {
  for (const Meter& t : meters_) {
    *t.step = float(clocks[t.row].step);
    for (int k = 0; k < 2; ++k)
      if (t.aux[k]) *t.aux[k] = clocks[t.row].aux[k];
  }
}

std::vector<Chunk> make_chunks(const std::vector<TensorDesc>& tensors, int64_t chunk, bool by_gradient) {
  std::vector<Chunk> out;
  for (size_t i = 0; i < tensors.size(); ++i)
    for (int64_t o = 0, n = by_gradient ? tensors[i].grad_numel : tensors[i].numel; o < n; o += chunk) out.push_back({int64_t(i), o});
  return out;
}

void squares(const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, float scale, int threads, double* out) {
  std::vector<double> part(chunks.size());
  const Kernels& k = kernels();
  const auto span = [&](int64_t c, int64_t last) {
    if (c >= last) return GradSpan{};
    const TensorDesc& t = tensors[chunks[c].tensor];
    const bool ends = c + 1 == int64_t(chunks.size()) || chunks[c + 1].tensor != chunks[c].tensor;
    return GradSpan{&t, chunks[c].offset, ends ? t.grad_numel : chunks[c + 1].offset};
  };
  const int64_t grain = (grain_of(tensors, chunks, threads) + kStreams - 1) / kStreams * kStreams;
  parallel_for(int64_t(chunks.size()), grain, threads, [&](int64_t first, int64_t last) {
    GradSpan spans[2 * kStreams];  // those to be read, and those after them
    for (int s = 0; s < kStreams; ++s) spans[kStreams + s] = span(first + s, last);
    for (int64_t c = first; c < last; c += kStreams) {
      const int count = int(std::min<int64_t>(last - c, kStreams));
      for (int s = 0; s < kStreams; ++s) spans[s] = spans[kStreams + s], spans[kStreams + s] = span(c + kStreams + s, last);
      // Out of one array two at a time: the hardware foresees these, and more only compete (33 M elements, Zen 5: 34 GB/s by four, 44 by two).
      const int width = spans[0].tensor == spans[count - 1].tensor ? std::min(2, count) : count;
      for (int s = 0; s < count; s += width)
        k.squares(spans + s, spans + s + width, std::min(width, count - s), scale, &part[size_t(c + s)]);
    }
  });
  std::fill(out, out + tensors.size(), 0.0);
  for (size_t c = 0; c < chunks.size(); ++c) out[chunks[c].tensor] += part[c];
}

void sweep(int rule, const std::vector<TensorDesc>& tensors, const std::vector<Chunk>& chunks, const Rows& rows, const Globals& globals,
           int threads, Watch* watch) {
  const Kernels& chosen_kernels = kernels();
  const UpdateFn update = chosen_kernels.update[rule];
  const float scale = globals.grad_scale ? *globals.grad_scale : 1.f, clip = globals.clip ? *globals.clip : 1.f;
  const int states = kRuleTable[rule].states, stored = kRuleTable[rule].stored;
  const auto n = int64_t(chunks.size());
  parallel_for(n, grain_of(tensors, chunks, threads), threads, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      if (c + 2 < last) prefetch_chunk(tensors[chunks[c + 2].tensor], chunks[c + 2].offset, states);
      if (watch && c + 4 < last) watch->near(chunks[c + 4].tensor);
      if (watch && chunks[c].offset == 0) watch->start(chunks[c].tensor);
      const TensorDesc& t = tensors[chunks[c].tensor];
      const bool ends = c + 1 == n || chunks[c + 1].tensor != chunks[c].tensor;
      const int64_t end = ends ? t.numel : chunks[c + 1].offset;
      const Piece piece{&t, &rows.rows[t.row], chunks[c].offset, end, scale, clip, globals.seed, globals.stochastic != 0};
      if (t.block_log2)
        update_coded(chosen_kernels, rule, states, stored, piece);
      else
        t.index ? update_compact(chosen_kernels, update, piece) : update(piece);
    }
  });
}

}  // namespace cpu
}  // namespace fa
