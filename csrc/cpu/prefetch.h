// __builtin_prefetch that stays: GCC takes a function that does nothing else for one without effects and drops its calls (12.2 did so with four of
// ours). The empty asm is an effect.
#pragma once

namespace fa {

template <int kWrite = 0, int kLocality = 3>
inline __attribute__((always_inline)) void prefetch_line(const void* line) {
  __builtin_prefetch(line, kWrite, kLocality);
  asm volatile("" : : "r"(line));
}

}  // namespace fa
