// Quantized activations: rows and pieces to threads. No sum crosses a piece, so results do not depend on how many threads there are.
#include "quant_act.h"

#include <algorithm>
#include <cstring>

#include "optim.h"
#include "pool.h"
#include "sweep.h"

namespace fa::cpu::quant_act {

const Kernels& kernels() {
#if defined(__x86_64__)
  const char* name = cpu::kernels().name;
  if (!std::strcmp(name, "avx512")) {
    static const bool vnni = __builtin_cpu_supports("avx512vnni");
    return vnni ? kernels_vnni : kernels_avx512;
  }
  if (!std::strcmp(name, "avx2")) return kernels_avx2;
#endif
  return kernels_base;
}

void quantize(const Activations& a, int threads) {
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / a.columns);
  parallel_for(a.rows, grain, threads, [&](int64_t first, int64_t last) { k.quantize(a, first, last); });
}

void product(const Int8Product& p, int threads) {
  const Kernels& k = kernels();
  const int64_t wide = (p.n + kOutputs - 1) / kOutputs, tall = (p.t + kTokens - 1) / kTokens;
  // Pieces below one another share rows of w, the larger operand of the two for few tokens: they are neighbours.
  parallel_for(wide * tall, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i % tall * kTokens, n = i / tall * kOutputs;
      k.product(p, t, std::min(t + kTokens, p.t), n, std::min(n + kOutputs, p.n));
    }
  });
}

}  // namespace fa::cpu::quant_act
