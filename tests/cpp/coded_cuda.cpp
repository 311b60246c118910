// The CUDA sweep over coded states (on the emulator) against the CPU's: the same bits of parameters, codes and scales, for every rule that may have
// them, every size of block, dense and compact. Under AddressSanitizer and UBSan: every array ends where its allocation ends.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target coded_cuda
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/dtypes.h"
#include "core/launch.h"
#include "core/rules.h"
#include "cpu/lowbit.h"
#include "cpu/optim.h"
#include "cpu/sweep.h"
#include "cuda/optim.h"
#include "exact.h"
#include "hypers.h"

namespace {

constexpr uint8_t kGuard = 0xA5;
constexpr int kChunk = 2048;

// n elements behind `gap` bytes that nobody may touch.
struct Array {
  int dtype;
  int64_t n, gap;
  Exact<uint8_t> bytes;

  Array(int dtype_, int64_t n_, bool misaligned)
      : dtype(dtype_), n(n_), gap(misaligned ? fa::dtype_size(dtype_) : 0), bytes(n_ * fa::dtype_size(dtype_) + gap) {
    std::memset(bytes.get(), kGuard, size_t(bytes.size));
  }
  void* data() const { return bytes.get() + gap; }
  uint32_t bits(int64_t i) const {
    uint32_t u = 0;
    std::memcpy(&u, bytes.get() + gap + i * fa::dtype_size(dtype), size_t(fa::dtype_size(dtype)));
    return u;
  }
  void fill(int64_t i, float f) {
    const uint32_t u = dtype == fa::kBF16 ? fa::float_to_bf16(f) : dtype == fa::kF16 ? fa::float_to_half(f) : fa::as_bits(f);
    std::memcpy(bytes.get() + gap + i * fa::dtype_size(dtype), &u, size_t(fa::dtype_size(dtype)));
  }
  bool same(const Array& o) const {
    for (int64_t i = 0; i < gap; ++i)
      if (bytes[i] != kGuard) return false;
    for (int64_t i = 0; i < n; ++i)
      if (bits(i) != o.bits(i) && !(nan(i) && o.nan(i))) return false;
    return true;
  }
  bool nan(int64_t i) const {
    const uint32_t u = bits(i);
    return dtype == fa::kF32    ? (u & 0x7fffffffu) > 0x7f800000u
           : dtype == fa::kBF16 ? (u & 0x7fffu) > 0x7f80u
                                : dtype == fa::kF16 && (u & 0x7fffu) > 0x7c00u;
  }
};

struct Case {
  int64_t n;
  int log2, kinds, number;  // kinds: which row of kStates
  bool masked, misaligned, compact, hostile;
};

constexpr int kStates[5][fa::kMaxStates] = {{fa::kD8S, fa::kD8U, fa::kD8U, fa::kD8U},
                                            {fa::kF8X, fa::kF8X, fa::kF8X, fa::kF8X},
                                            {fa::kD8S, fa::kD8S, fa::kD8U, fa::kD8S},
                                            {fa::kF32, fa::kD8U, fa::kF8X, fa::kBF16},
                                            {fa::kD8U, fa::kF8X, fa::kBF16, fa::kD8S}};
constexpr int kStorage[4][3] = {
    {fa::kF32, fa::kF32, fa::kNone}, {fa::kBF16, fa::kBF16, fa::kNone}, {fa::kBF16, fa::kF16, fa::kF32}, {fa::kBF16, fa::kBF16, fa::kI16}};

bool coded(int dtype) { return dtype >= fa::kD8S; }

// One entry with all that belongs to it; the same case gives the same bits.
struct Tensor {
  Case c;
  std::vector<Array> arrays;  // parameter, gradient, states, scales, extra
  Exact<uint32_t> mask;
  Exact<int32_t> index;
  float step = 3;
  double aux[2] = {0.7, 1e-3};
  fa::TensorDesc desc{};

  Tensor(const Case& given, int states) : c(given), mask(given.masked ? (given.n + 31) / 32 : 0), index(given.compact ? given.n : 0) {
    state = uint64_t(c.number) * 77 + 5;
    const int* storage = kStorage[c.number % 4];
    const int64_t whole = c.compact ? 2 * c.n : c.n, blocks = (c.n + (int64_t(1) << c.log2) - 1) >> c.log2;
    arrays.reserve(16);
    arrays.emplace_back(storage[0], whole, c.misaligned);
    arrays.emplace_back(storage[1], whole, c.misaligned);
    for (int64_t i = 0; i < whole; ++i) arrays[0].fill(i, uniform()), arrays[1].fill(i, gradient());
    for (int64_t i = 0; i < mask.size; ++i) mask[i] = i / 8 % 3 == 1 ? 0 : random_bits();
    for (int64_t i = 0; i < index.size; ++i) index[i] = int32_t(2 * i + random_bits() % 2);
    for (int k = 0; k < states; ++k) add_state(k, kStates[c.kinds][k], blocks);
    if (storage[2]) {
      arrays.emplace_back(storage[2], c.n, c.misaligned);
      for (int64_t i = 0; i < c.n; ++i) arrays.back().fill(i, storage[2] == fa::kF32 ? uniform() : 0.f);
      desc.extra = arrays.back().data(), desc.extra_dtype = uint8_t(storage[2]);
    }
    describe(storage, whole);
  }

  float gradient() const {
    static const float hostile[] = {std::numeric_limits<float>::infinity(), std::nanf(""), -0.f, 1e-40f, 3e38f, -7e4f, 1e-30f, 0.f};
    if (c.hostile && random_bits() % 512 == 0) return hostile[random_bits() % 8];
    return uniform() * std::ldexp(1.f, -int(random_bits() % 20));
  }

  void add_state(int k, int dtype, int64_t blocks) {
    arrays.emplace_back(coded(dtype) ? int(fa::kU8) : dtype, c.n, c.misaligned);
    desc.state[k] = arrays.back().data(), desc.state_dtype[k] = uint8_t(dtype);
    if (!coded(dtype)) {
      for (int64_t i = 0; i < c.n; ++i) arrays.back().fill(i, std::fabs(uniform()));
      return;
    }
    const int wide = dtype == fa::kF8X ? 2 : 1, side = 1 << c.log2;
    const Array& codes = arrays[arrays.size() - 1];
    auto* bytes = static_cast<uint8_t*>(codes.data());
    arrays.emplace_back(fa::kF32, blocks * wide, false);
    auto* scale = desc.scale[k] = static_cast<float*>(arrays.back().data());
    std::vector<float> values(size_t(side + fa::cpu::kBlockPad));
    for (int64_t b = 0; b < blocks; ++b) {
      for (float& v : values) v = b % 5 == 4 ? 0.f : k == 0 && dtype != fa::kD8U ? uniform() : std::fabs(uniform());
      const int n = int(c.n - b * side < side ? c.n - b * side : side);
      fa::cpu::kernels().codec->encode(dtype, values.data(), n, bytes + b * side, scale + b * wide);
    }
  }

  void describe(const int* storage, int64_t whole) {
    uintptr_t all = 0;
    for (const Array& a : arrays) all |= uintptr_t(a.data());
    desc.param = arrays[0].data(), desc.param_dtype = uint8_t(storage[0]);
    desc.grad = arrays[1].data(), desc.grad_dtype = uint8_t(storage[1]);
    desc.mask = c.masked ? mask.get() : nullptr;
    desc.index = c.compact ? index.get() : nullptr, desc.index_dtype = c.compact ? uint8_t(fa::kI32) : uint8_t(fa::kNone);
    desc.step = &step, desc.aux[0] = aux, desc.aux[1] = aux + 1;
    desc.numel = c.n, desc.grad_numel = whole, desc.group = c.number % 3, desc.ordinal = 7 + c.number;
    desc.index_inner = whole, desc.block_log2 = uint8_t(c.log2), desc.aligned = all % 16 == 0;
  }
};

struct Fleet {
  std::vector<Tensor> tensors;
  std::vector<fa::TensorDesc> table;
  Fleet(const std::vector<Case>& cases, int states) {
    tensors.reserve(cases.size());
    for (const Case& c : cases) {
      Tensor& t = tensors.emplace_back(c, states);
      t.desc.row = int32_t(table.size());
      table.push_back(t.desc);
    }
  }
};

void run(int rule, const std::vector<Case>& cases) {
  const fa::RuleInfo& info = fa::kRuleTable[rule];
  Fleet gpu(cases, info.states), cpu(cases, info.states);
  const std::vector<fa::Hyper> h = hypers();
  const std::vector<fa::Chunk> chunks = fa::cpu::make_chunks(gpu.table, kChunk);
  const float scale = 3.f, clip = 0.7f, fine = 0.f;
  for (int launch = 0; launch < 2; ++launch) {
    fa::Globals g{};
    if (launch) g = {&scale, &fine, &clip, 0x9E3779B97F4A7C15u, 1, 0};
    g.chunk = kChunk;
    fa::cpu::Rows rows;
    rows.attach(cpu.table);
    rows.build(rule, cpu.table, h);
    for (size_t t = 0; t < cases.size(); ++t) gpu.table[t].row = cpu.table[t].row;
    fa::emulator::set_seed(uint64_t(rule * 3 + launch));
    fa::cuda::sweep_coded(rule, gpu.table.data(), chunks.data(), int64_t(chunks.size()), rows.rows.data(), g, {0, nullptr});
    fa::cpu::sweep(rule, cpu.table, fa::cpu::make_chunks(cpu.table, 2 * kChunk), rows, g, 1);
    rows.commit();
    for (size_t t = 0; t < cases.size(); ++t)
      for (size_t a = 0; a < gpu.tensors[t].arrays.size(); ++a)
        require(gpu.tensors[t].arrays[a].same(cpu.tensors[t].arrays[a]),
                std::string(info.name) + " launch " + std::to_string(launch) + " n " + std::to_string(cases[t].n) + " block 2^" +
                    std::to_string(cases[t].log2) + " kinds " + std::to_string(cases[t].kinds) + " array " + std::to_string(a) +
                    (cases[t].compact ? " compact" : "") + (cases[t].masked ? " masked" : ""));
  }
}

// Every size with a few of the other choices, which come by turns.
std::vector<Case> grid(int shift) {
  std::vector<Case> out;
  for (const int64_t n : {1, 7, 8, 31, 33, 255, 256, 257, 2047, 2048, 2049, 4500})
    for (int way = 0; way < 2; ++way) {
      const int i = int(out.size()) + shift;
      const bool compact = i % 8 == 6;
      out.push_back({n, 5 + i % 7, i % 5, i, !compact && i % 3 == 1, i % 2 == 1, compact, i % 5 == 2});
    }
  return out;
}

void check_refusals() {
  const fa::Chunk c{};
  for (const char* name : {"sgd", "rmsprop_centered", "rmsprop_centered_momentum"}) {
    bool said = false;
    try {
      fa::cuda::sweep_coded(fa::rule_index(name), nullptr, &c, 1, nullptr, fa::Globals{}, {0, nullptr});
    } catch (const std::invalid_argument& e) {
      said = std::string(e.what()).find("coded states") != std::string::npos;
    }
    require(said, std::string(name) + " has no coded states: an error that says so");
  }
  fa::cuda::sweep_coded(0, nullptr, nullptr, 0, nullptr, fa::Globals{}, {0, nullptr});
}

}  // namespace

int main() {
  for (int rule = 0; rule < fa::kRuleCount; ++rule) {
    const std::string name = fa::kRuleTable[rule].name;
    if (fa::kRuleTable[rule].states && name.find("rmsprop_centered") != 0) run(rule, grid(rule));
  }
  check_refusals();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}
