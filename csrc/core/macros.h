// Words that mean the same to nvcc, g++ and the emulator.
#pragma once
#if defined(__CUDACC__)
#define FA_HD __host__ __device__ __forceinline__
#else
// always_inline: the optimizer sweep is compiled once per instruction set, and an out-of-line copy of a shared
// function built for AVX must never be picked by the linker for the baseline build.
#define FA_HD inline __attribute__((always_inline))
#endif
