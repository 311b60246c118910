// Reading a tensor through torch's C functions, at its place inside the Python object: a fifth of the cost of the DLPack exchange, and no
// Python call, so that threads may share the reading. The addresses come from Python; nothing here needs torch's headers.
// Where a tensor keeps its shape, strides, dtype and memory is then learnt from examples, and a look at those words instead of eight calls
// decides whether anything has changed (5,000 tensors of 256 with two states, after a step of torch's: 0.85 ms instead of 1.35).
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/prefetch.h"

namespace fa {

class Shim {
 public:
  // kNames: the functions, in the order in which `addresses` gives them. `probe`: any tensor that has no gradient.
  // Raises std::invalid_argument where this torch lays its objects out in another way; tensors are then read through DLPack.
  static const std::vector<const char*> kNames;
  Shim(const std::vector<uintptr_t>& addresses, const pybind11::object& probe);

  // at::Tensor* of a Python tensor. It lies inside the object (nothing is held), so it sees `.data = ...` and swap_tensors.
  const void* of(PyObject* tensor) const { return reinterpret_cast<const char*>(tensor) + offset_; }
  static const void* impl(const void* tensor) { return *static_cast<const void* const*>(tensor); }
  // at::Tensor* of the gradient, null without one.
  const void* grad(const void* tensor) const {
    const void* g = grad_(impl(tensor));
    return impl(g) == undefined_ ? nullptr : g;
  }
  // Whether `of` finds what torch itself says.
  bool holds(const pybind11::object& tensor) const;
  // False for what has no plain memory (sparse, opaque, freed lazily, ...). The signature stands for dtype, device, shape and strides.
  bool read(const void* tensor, void** data, uint64_t* signature) const;
  void bump_version(const void* tensor) const { bump_(tensor); }
  // Leaves this byte in memory that has been freed, for tensors made next to lie in: what of them nobody writes then differs between examples.
  static void soil(int byte);
  // Learns from examples where the words of a tensor are. `same`: tensors of one shape, strides, dtype and device with five dimensions, in every
  // state of bookkeeping (with and without gradient, version, graph, ...); `other`: tensors that differ from them in one of these, or in memory order.
  // False where the words cannot be found or do not tell `other` from `same`: nothing but `of` may then be asked.
  bool learn(const pybind11::list& same, const pybind11::list& other);
  // Where the words are that `read` looks at, of a tensor read before: to prefetch, never to read.
  struct Place {
    const void *body = nullptr, *storage = nullptr;
  };
  Place place(const void* tensor) const { return {impl(tensor), word(impl(tensor), sketch_.storage)}; }
  void fetch(const Place& place) const {
    fetch(place.body, sketch_.storage, sketch_.dims + kWords);
    fetch(place.storage, sketch_.data, sketch_.data + 3);
  }
  // The address of the version counter: to prefetch, never to read.
  const void* version(const void* tensor) const { return version_ ? impl(static_cast<const char*>(impl(tensor)) + version_) : nullptr; }

 private:
  // Word numbers inside a TensorImpl (inside its StorageImpl: data, frees). From `dims` on: the number of dimensions, room for five sizes and five
  // strides, the offset of the first element, the number of elements, two words of dtype, device and flags.
  struct Sketch {
    int storage = 0, dims = 0, data = 0, frees = 0;
    uint64_t kinds[2] = {};  // the bits of the last two that do not change with a tensor's history
    uint8_t sizes[64] = {};  // bytes per element by torch's dtype code; 0: not seen
  };
  // Words of a TensorImpl after the number of dimensions: room for sizes and strides, then the others.
  static constexpr int kRoom = 5, kOffset = 1 + 2 * kRoom, kKinds = kOffset + 2, kWords = kKinds + 2;
  // Odd numbers for the words of a signature: SplitMix64's.
  struct Keys {
    uint64_t odd[5 + 2 * kRoom] = {};
    constexpr Keys() {
      uint64_t state = 0;
      for (uint64_t& key : odd) {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ z >> 27) * 0x94D049BB133111EBull;
        key = (z ^ z >> 31) | 1;
      }
    }
  };
  static const void* word(const void* object, int n) { return static_cast<const void* const*>(object)[n]; }
  // The lines with the words [first, end): an object starts anywhere in a line.
  static void fetch(const void* object, int first, int end) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(object) + 8 * size_t(first),
                    to = reinterpret_cast<uintptr_t>(object) + 8 * size_t(end);
    for (uintptr_t line = from & ~uintptr_t{63}; line < to; line += 64) prefetch_line(reinterpret_cast<const void*>(line));
  }
  bool look(const Sketch& sketch, const void* tensor, void** data, uint64_t* signature) const;
  bool call(const void* tensor, void** data, uint64_t* signature) const;
  bool find(const pybind11::list& same, Sketch* sketch) const;

  template <class T>
  using Getter = int32_t (*)(const void* tensor, T* out);
  Getter<int32_t> layout_, dtype_, device_type_, device_index_;
  Getter<int64_t> dim_;
  Getter<int64_t*> sizes_, strides_;
  Getter<void*> data_;
  const void* (*grad_)(const void* impl);
  void (*bump_)(const void* tensor);
  const void* undefined_ = nullptr;
  size_t offset_ = 0;                  // of the TensorImpl* in the Python object
  size_t version_ = 0;                 // of the version counter* in the TensorImpl; 0: not found
  int32_t strided_ = 0;
  Sketch sketch_;
};

// One step of the hash over a tensor's shape and strides.
inline uint64_t mix(uint64_t h, int64_t size, int64_t stride) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15ull;
  h = (h ^ uint64_t(size)) * kPrime;
  h = ((h ^ h >> 29) ^ uint64_t(stride)) * kPrime;
  return h ^ h >> 31;
}

}  // namespace fa
