// What the sanitized tests share: failures counted, reproducible numbers, memory that ends where it says. Each test is one translation unit.
#pragma once
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace {

int failures = 0;
void require(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

uint64_t state = 1;
uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 32);
}
float uniform() { return float(random_bits()) * 0x1p-31f - 1.f; }

// Exactly as long as it says, unlike a vector's memory.
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Exact(int64_t n) : data(new T[size_t(n)]), size(n) {}
  T* get() const { return data.get(); }
  T& operator[](int64_t i) const { return data[size_t(i)]; }
};

}  // namespace
