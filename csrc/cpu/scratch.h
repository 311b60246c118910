// Memory that stays with its thread between calls: fresh pages fault, one by one. What is larger than kKept goes back.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fa::cpu {

class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (size_t(floats) * sizeof(float) + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }
  void trim() {
    if (size_ > kKept) memory_.reset(), size_ = 0;
  }
  static constexpr int64_t kKept = 4 << 20;

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace fa::cpu
