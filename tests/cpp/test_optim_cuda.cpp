// The CUDA sweep (on the emulator) against the CPU sweep: the same tensors, the same bits, for every rule, storage, size and option.
// Run under AddressSanitizer: every array ends where its allocation ends, so reading one element too far is an error as well.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target test_optim_cuda
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>
#include "core/dtypes.h"
#include "core/launch.h"
#include "core/rules.h"
#include "cpu/sweep.h"
#include "cuda/optim.h"
#include "hypers.h"

namespace {

int failures = 0;
void require(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  float normal() {
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += float(next()) * 0x1p-32f - 0.5f;
    return sum * 1.7f;
  }
};

constexpr unsigned char kGuard = 0xA5;

// n elements; misaligned: one element after a 16-byte boundary, the gap filled with guard bytes.
class Array {
 public:
  Array(int dtype, int64_t n, bool misaligned)
      : size_(size_t(fa::dtype_size(dtype))), n_(size_t(n)), gap_(misaligned ? size_ : 0), dtype_(dtype) {
    memory_ = static_cast<unsigned char*>(std::malloc(gap_ + n_ * size_));
    std::memset(memory_, kGuard, gap_);
  }
  Array(Array&& o) noexcept : memory_(o.memory_), size_(o.size_), n_(o.n_), gap_(o.gap_), dtype_(o.dtype_) { o.memory_ = nullptr; }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(memory_); }

  void* data() const { return memory_ + gap_; }
  uint32_t bits(size_t i) const {
    uint32_t u = 0;
    std::memcpy(&u, memory_ + gap_ + i * size_, size_);
    return u;
  }
  void set(size_t i, uint32_t u) { std::memcpy(memory_ + gap_ + i * size_, &u, size_); }
  void fill(size_t i, float f) {
    set(i, dtype_ == fa::kBF16 ? fa::float_to_bf16(f) : dtype_ == fa::kF16 ? fa::float_to_half(f) : fa::as_bits(f));
  }
  bool nan(size_t i) const {
    const uint32_t u = bits(i);
    return dtype_ == fa::kF32    ? (u & 0x7fffffffu) > 0x7f800000u
           : dtype_ == fa::kBF16 ? (u & 0x7fffu) > 0x7f80u
                                 : dtype_ == fa::kF16 && (u & 0x7fffu) > 0x7c00u;
  }
  std::vector<unsigned char> bytes() const { return {memory_ + gap_, memory_ + gap_ + n_ * size_}; }
  bool guarded() const {
    return std::all_of(memory_, memory_ + gap_, [](unsigned char c) { return c == kGuard; });
  }
  size_t size() const { return size_; }

 private:
  unsigned char* memory_;
  size_t size_, n_, gap_;
  int dtype_;
};

struct Case {
  int64_t n;
  int param, grad, state[3], extra;
  bool masked, misaligned;
  int number;
};

// One parameter with everything that belongs to it; the same case gives the same bits.
struct Tensor {
  Case c;
  std::vector<Array> arrays;  // param, grad, states, extra
  std::vector<uint32_t> mask;
  float step;
  double aux[2] = {0.7, 1e-3};
  fa::TensorDesc desc{};

  Tensor(const Case& c_, int states) : c(c_), step(float(c_.number % 3 == 0 ? 0 : c_.number % 3 == 1 ? 3 : 200)) {
    Random random{uint64_t(c.number) * 77 + 5};
    arrays.reserve(8);
    arrays.emplace_back(c.param, c.n, c.misaligned);
    arrays.emplace_back(c.grad, c.n, c.misaligned);
    for (int k = 0; k < states; ++k) arrays.emplace_back(c.state[k], c.n, c.misaligned);
    if (c.extra) arrays.emplace_back(c.extra, c.n, c.misaligned);
    const float inf = std::numeric_limits<float>::infinity();
    const float hostile[] = {inf, -inf, std::nanf(""), -0.f, 1e-40f, 3e38f, -7e4f, 1e-30f};
    for (size_t i = 0; i < size_t(c.n); ++i) {
      const bool odd = c.number % 4 == 0 && random.next() % 16 == 0;
      arrays[0].fill(i, odd ? hostile[random.next() % 8] : random.normal());
      arrays[1].fill(i, odd ? hostile[random.next() % 8] : random.normal() * 0.3f);
      for (int k = 0; k < states; ++k) arrays[size_t(2 + k)].fill(i, std::fabs(random.normal()) * 0.1f);
      if (c.extra == fa::kI16) arrays.back().set(i, arrays[0].nan(i) ? 0 : random.next() & 0xffffu);
      if (c.extra == fa::kF32) arrays.back().fill(i, random.normal());
      // a signalling NaN where nothing may be written: it survives only as bits
      if (c.masked && c.param != fa::kF32 && i % 5 == 0) arrays[0].set(i, c.param == fa::kBF16 ? 0x7f81u : 0x7c01u);
    }
    if (c.masked)
      for (int64_t w = 0; w < (c.n + 31) / 32; ++w) mask.push_back(w % 7 == 3 ? 0u : w % 7 == 5 ? ~0u : random.next());
    describe(states);
  }

  void describe(int states) {
    static const int64_t places[4][3] = {
        {0, 0, 0}, {48, 0, 0}, {5, 0, 0}, {(int64_t(1) << 33) + 3, 7, 20}};  // how a shard lies in its whole
    const int64_t* place = places[c.number / 2 % 4];
    desc.grad_numel = c.n;
    desc.param = arrays[0].data();
    desc.grad = arrays[1].data();
    uintptr_t all = uintptr_t(desc.param) | uintptr_t(desc.grad);
    for (int k = 0; k < states; ++k) {
      desc.state[k] = arrays[size_t(2 + k)].data();
      desc.state_dtype[k] = uint8_t(c.state[k]);
      all |= uintptr_t(desc.state[k]);
    }
    if (c.extra) all |= uintptr_t(desc.extra = arrays.back().data());
    desc.mask = mask.empty() ? nullptr : mask.data();
    desc.step = &step;
    desc.aux[0] = aux;
    desc.aux[1] = aux + 1;
    desc.numel = c.n;
    desc.group = c.number % 3;
    desc.param_dtype = uint8_t(c.param);
    desc.grad_dtype = uint8_t(c.grad);
    desc.extra_dtype = uint8_t(c.extra);
    desc.aligned = all % 16 == 0;
    desc.ordinal = 7 + c.number;
    desc.index_base = place[0];
    desc.index_inner = place[1] ? place[1] : c.n;
    desc.index_outer = place[2];
  }
  bool trainable(size_t i) const { return mask.empty() || (mask[i / 32] >> (i % 32) & 1u); }
};

struct Fleet {
  std::vector<Tensor> tensors;
  std::vector<fa::TensorDesc> table;
  Fleet(const std::vector<Case>& cases, int states) {
    tensors.reserve(cases.size());
    for (const Case& c : cases) tensors.emplace_back(c, states).describe(states);
    for (size_t i = 0; i < tensors.size(); ++i) {
      tensors[i].describe(states);
      tensors[i].desc.row = int32_t(i);
      table.push_back(tensors[i].desc);
    }
  }
};

void compare(const Fleet& gpu, const Fleet& cpu, const std::vector<std::vector<std::vector<unsigned char>>>& before,
             const std::string& name) {
  for (size_t t = 0; t < gpu.tensors.size(); ++t) {
    const Tensor &a = gpu.tensors[t], &b = cpu.tensors[t];
    const std::string what = name + " tensor " + std::to_string(t) + " n=" + std::to_string(a.c.n);
    require(a.step == b.step && !std::memcmp(a.aux, b.aux, sizeof a.aux), what + ": clock");
    for (size_t k = 0; k < a.arrays.size(); ++k) {
      require(a.arrays[k].guarded(), what + ": wrote before array " + std::to_string(k));
      if (k != 1 && a.arrays[k].bytes() == b.arrays[k].bytes() && !a.c.masked) continue;
      for (size_t i = 0; i < size_t(a.c.n); ++i) {
        const size_t size = a.arrays[k].size();
        uint32_t old = 0;
        std::memcpy(&old, before[t][k].data() + i * size, size);
        const bool fixed = k == 1 || !a.trainable(i),
                   same = a.arrays[k].bits(i) == b.arrays[k].bits(i) || (a.arrays[k].nan(i) && b.arrays[k].nan(i));
        if (fixed ? a.arrays[k].bits(i) != old : !same)
          return require(false,
                         what + " array " + std::to_string(k) + " element " + std::to_string(i) + (fixed ? ": changed" : ": differs"));
      }
    }
  }
}

void run(int rule, const std::vector<Case>& cases, const std::string& name, int32_t chunk = 2048) {
  const fa::RuleInfo& info = fa::kRuleTable[rule];
  Fleet gpu(cases, info.states), cpu(cases, info.states);
  const std::vector<fa::Hyper> h = hypers();
  const std::vector<fa::Chunk> chunks = fa::cpu::make_chunks(gpu.table, chunk);
  const int64_t n = int64_t(cases.size());
  std::vector<fa::Row> rows(cases.size());
  std::vector<fa::Clock> clocks(cases.size());
  const float scale = 3.f, clip = 0.7f, overflow = 1.f, fine = 0.f;
  for (int launch = 0; launch < 3; ++launch) {
    const bool plain = launch == 0, skipped = launch == 2;
    std::vector<std::vector<std::vector<unsigned char>>> before;
    for (const Tensor& t : gpu.tensors) {
      before.emplace_back();
      for (const Array& a : t.arrays) before.back().push_back(a.bytes());
    }
    const fa::Globals g{plain ? nullptr : &scale,
                        plain     ? nullptr
                        : skipped ? &overflow
                                  : &fine,
                        plain ? nullptr : &clip,
                        0x9E3779B97F4A7C15u + unsigned(launch),
                        !plain,
                        chunk};
    fa::emulator::set_seed(uint64_t(rule * 3 + launch));
    fa::cuda::prologue(rule, gpu.table.data(), n, h.data(), rows.data(), clocks.data(), g.found_inf, {0, nullptr});
    fa::cuda::sweep(rule, gpu.table.data(), chunks.data(), int64_t(chunks.size()), rows.data(), g, {0, nullptr});
    if (!skipped) {
      fa::cpu::Rows cpu_rows;
      cpu_rows.attach(cpu.table);
      cpu_rows.build(rule, cpu.table, h);
      for (size_t t = 0; t < cases.size(); ++t)
        require(!std::memcmp(&rows[t], &cpu_rows.rows[size_t(cpu.table[t].row)], sizeof(fa::Row)), name + " row " + std::to_string(t));
      fa::cpu::sweep(rule, cpu.table, fa::cpu::make_chunks(cpu.table, 4096), cpu_rows, g, 1);
      cpu_rows.commit();
    }
    compare(gpu, cpu, before, name + " launch " + std::to_string(launch));
  }
}

std::vector<Case> grid(const std::vector<int64_t>& sizes, int shift) {
  using namespace fa;
  static const int storage[][6] = {
      {kF32, kF32, kF32, kF32, kF32, kNone},   {kBF16, kBF16, kBF16, kBF16, kBF16, kNone}, {kF16, kF16, kF16, kF16, kF16, kNone},
      {kBF16, kBF16, kF32, kF32, kF32, kNone}, {kF32, kBF16, kBF16, kF32, kF16, kNone},    {kBF16, kF32, kF32, kBF16, kF16, kF32},
      {kF16, kF16, kF32, kF32, kF32, kF32},    {kBF16, kBF16, kF32, kF16, kBF16, kI16},    {kF32, kF32, kF32, kF32, kF32, kF32}};
  std::vector<Case> out;
  for (int64_t n : sizes)
    for (const auto& s : storage)
      for (int way = 0; way < 4; ++way) {
        if (n > 17 && (way + shift) % 2) continue;  // the larger sizes take turns
        out.push_back({n, s[0], s[1], {s[2], s[3], s[4]}, s[5], (way & 1) != 0, (way & 2) != 0, int(out.size()) + shift});
      }
  return out;
}

void check_squares() {
  const std::vector<Case> cases =
      grid({0, 1, 7, 8, 9, 1000, 4096, 65537}, 1);  // number % 4 == 0: hostile values, compared only between seeds
  Fleet fleet(cases, 0);
  const std::vector<fa::Chunk> chunks = fa::cpu::make_chunks(fleet.table, 2048);
  const float scale = 3.f;
  std::vector<double> first;
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    std::vector<double> partial(chunks.size(), -1);
    fa::emulator::set_seed(seed);
    fa::cuda::squares(fleet.table.data(), chunks.data(), int64_t(chunks.size()), 2048, partial.data(), &scale, {0, nullptr});
    if (seed == 1) first = partial;
    require(!std::memcmp(first.data(), partial.data(), partial.size() * 8), "squares: another order of the threads, other bits");
  }
  std::vector<double> cpu(fleet.table.size());
  fa::cpu::squares(fleet.table, chunks, scale, 1, cpu.data());
  std::vector<double> total(cases.size(), 0.0);
  for (size_t c = 0; c < chunks.size(); ++c) total[size_t(chunks[c].tensor)] += first[c];
  for (size_t t = 0; t < cases.size(); ++t)
    require(cases[t].number % 4 == 0 || std::fabs(total[t] - cpu[t]) <= 1e-13 * cpu[t], "squares of tensor " + std::to_string(t));
}

void check_edges() {
  fa::cuda::sweep(0, nullptr, nullptr, 0, nullptr, fa::Globals{}, {0, nullptr});
  fa::cuda::squares(nullptr, nullptr, 0, 1, nullptr, nullptr, {0, nullptr});
  fa::cuda::prologue(0, nullptr, 0, nullptr, nullptr, nullptr, nullptr, {0, nullptr});
  bool said = false;
  try {
    const fa::Chunk c{};
    fa::cuda::sweep(0, nullptr, &c, 1, nullptr, fa::Globals{}, {7, nullptr});
  } catch (const std::runtime_error& e) {
    said = std::string(e.what()).find("cuda_sweep") == 0;
  }
  require(said, "a device that is not there: an error that names the op");
  run(fa::rule_index("adam"), grid({1, 9, 17, 1000}, 3), "odd chunk", 13);  // chunks off the eight-element grid take the strided way
}

}  // namespace

int main() {
  for (int rule = 0; rule < fa::kRuleCount; ++rule)
    run(rule, grid({0, 1, 3, 7, 8, 9, 15, 16, 17, 1000, 4096}, rule), fa::kRuleTable[rule].name);
  for (const char* name : {"adam", "lion", "adabelief"}) run(fa::rule_index(name), grid({65537}, 2), std::string(name) + " large");
  check_squares();
  check_edges();
  std::printf("%d rules, %d failures\n", fa::kRuleCount, failures);
  return failures != 0;
}
