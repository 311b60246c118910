#include "torch_shim.h"

#include <algorithm>
#include <stdexcept>

namespace py = pybind11;

namespace fa {

// The last two are C++ (TensorImpl::grad, autograd::impl::bump_version): no C function gives a gradient or advances a version.
const std::vector<const char*> Shim::kNames = {
    "aoti_torch_get_layout",       "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",  "aoti_torch_get_device_index",
    "aoti_torch_get_dim",          "aoti_torch_get_sizes",
    "aoti_torch_get_strides",      "aoti_torch_get_data_ptr",
    "_ZNK3c1010TensorImpl4gradEv", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
};

constexpr size_t kVersionWithin = 64;  // of a TensorImpl, which is three times that

Shim::Shim(const std::vector<uintptr_t>& addresses, const py::object& probe) {
  const auto require = [](bool good, const char* what) {
    if (!good) throw std::invalid_argument(std::string("Shim: ") + what);
  };
  require(addresses.size() == kNames.size(), "one address per name expected");
  size_t at = 0;
  const auto take = [&](auto& function) { function = reinterpret_cast<std::decay_t<decltype(function)>>(addresses[at++]); };
  take(layout_), take(dtype_), take(device_type_), take(device_index_), take(dim_), take(sizes_), take(strides_), take(data_);
  take(grad_), take(bump_);
  const auto basic = size_t(Py_TYPE(probe.ptr())->tp_basicsize);
  const auto expected = reinterpret_cast<const void*>(probe.attr("_cdata").cast<uintptr_t>());
  for (size_t o = sizeof(PyObject); !offset_ && o + sizeof(void*) <= basic; o += sizeof(void*))
    if (impl(reinterpret_cast<const char*>(probe.ptr()) + o) == expected) offset_ = o;
  require(offset_ != 0, "no tensor inside the Python object");
  const void* tensor = of(probe.ptr());
  require(probe.attr("grad").is_none(), "a probe without a gradient expected");
  undefined_ = impl(grad_(expected));
  require(undefined_ != nullptr && layout_(tensor, &strided_) == 0, "cannot read the probe");
  const py::object twin = probe.attr("detach")(), other = probe.attr("clone")();  // one shares the version counter, the other does not
  const auto word = [](const py::object& t, size_t o) {
    return impl(reinterpret_cast<const char*>(t.attr("_cdata").cast<uintptr_t>()) + o);
  };
  const auto storage = reinterpret_cast<const void*>(py::object(probe.attr("untyped_storage")()).attr("_cdata").cast<uintptr_t>());
  for (size_t o = sizeof(void*); !version_ && o <= kVersionWithin; o += sizeof(void*))
    if (word(probe, o) && word(probe, o) != storage && word(probe, o) == word(twin, o) && word(probe, o) != word(other, o)) version_ = o;
  const auto version = probe.attr("_version").cast<int64_t>();
  bump_(tensor);
  require(probe.attr("_version").cast<int64_t>() == version + 1, "cannot advance the probe's version");
}

bool Shim::holds(const py::object& tensor) const {
  const py::object address = py::getattr(tensor, "_cdata", py::none());
  return !address.is_none() && reinterpret_cast<const void*>(address.cast<uintptr_t>()) == impl(of(tensor.ptr()));
}

bool Shim::read(const void* tensor, void** data, uint64_t* signature) const {
  if (look(sketch_, tensor, data, signature)) return true;
  if (!call(tensor, data, signature)) return false;
  const auto* t = static_cast<const uint64_t*>(impl(tensor)) + sketch_.dims;
  *signature = mix(*signature, int64_t(t[kKinds] & sketch_.kinds[0]), int64_t(t[kKinds + 1] & sketch_.kinds[1])) | 1;
  return true;
}

bool Shim::call(const void* tensor, void** data, uint64_t* signature) const {
  int32_t layout, dtype, type, index;
  int64_t dim, *sizes, *strides;
  // The layout first: the functions that follow write to stderr about a sparse tensor.
  if (layout_(tensor, &layout) || layout != strided_) return false;
  if (data_(tensor, data) || dtype_(tensor, &dtype) || dim_(tensor, &dim) || sizes_(tensor, &sizes) || strides_(tensor, &strides) ||
      device_type_(tensor, &type) || device_index_(tensor, &index))
    return false;
  uint64_t h = uint64_t(uint32_t(dtype)) << 8 ^ uint64_t(uint32_t(type)) << 32 ^ uint64_t(uint32_t(index)) << 48 ^ uint64_t(dim);
  for (int64_t d = 0; d < dim; ++d) h = mix(h, sizes[d], strides[d]);
  *signature = h | 1;
  return true;
}

// A changed word always changes the sum, for each is taken one to one; and words that change together (a shape's are made of the same numbers) do not
// make up for each other: keys that are no row of numbers, and every word's upper half folded into its lower.
// What frees the memory is part of it: a lazy copy leaves the address and takes over the freeing, and writing through the address would change both.
// Where the tensor begins in its storage is not: the address says it.
bool Shim::look(const Sketch& sketch, const void* tensor, void** data, uint64_t* signature) const {
  static constexpr Keys keys;
  const auto* t = static_cast<const uint64_t*>(impl(tensor)) + sketch.dims;
  const auto* storage = static_cast<const char* const*>(word(impl(tensor), sketch.storage));
  const uint64_t n = t[0], code = t[kKinds] & 0xFFFF;
  if (n > kRoom || !storage || code >= std::size(sketch.sizes) || !sketch.sizes[code]) return false;
  const uint64_t* key = keys.odd;
  uint64_t h = 0;
  const auto add = [&](uint64_t value) {
    value *= *key++;
    h += value ^ value >> 32;
  };
  add(n);
  add(t[kOffset + 1]);
  add(t[kKinds] & sketch.kinds[0]);
  add(t[kKinds + 1] & sketch.kinds[1]);
  add(uint64_t(storage[sketch.frees]));
  for (uint64_t d = 0; d < n; ++d) add(t[1 + d]), add(t[1 + kRoom + d]);
  const char* base = storage[sketch.data];
  *data = const_cast<char*>(base) + (base ? t[kOffset] * sketch.sizes[code] : 0);
  *signature = h | 1;
  return true;
}

// The first tensor names the words; two words of bookkeeping and a storage's first eight lie before or in them in every torch that has been looked at.
bool Shim::find(const py::list& same, Sketch* sketch) const {
  const auto words = [](const py::handle& t) { return reinterpret_cast<const uint64_t*>(t.attr("_cdata").cast<uintptr_t>()); };
  const py::handle first = same[0];
  const py::object storage = first.attr("untyped_storage")();
  std::vector<uint64_t> shape{uint64_t(kRoom)};
  for (const char* what : {"shape", "stride"})
    for (const py::handle d : py::tuple(what[1] == 'h' ? first.attr(what) : first.attr(what)())) shape.push_back(d.cast<uint64_t>());
  const uint64_t* t = words(first);
  const auto* s = reinterpret_cast<const uint64_t*>(storage.attr("_cdata").cast<uintptr_t>());
  for (int n = 1; n < 8 && !sketch->storage; ++n)
    if (t[n] == uint64_t(uintptr_t(s))) sketch->storage = n;
  for (int n = 5; n < 10 && !sketch->dims; ++n)
    if (std::equal(shape.begin(), shape.end(), t + n)) sketch->dims = n;
  for (int n = 1; n < 6 && !sketch->data; ++n)
    if (s[n] == storage.attr("data_ptr")().cast<uint64_t>()) sketch->data = n;
  if (!sketch->storage || !sketch->dims || !sketch->data || shape.size() != 1 + 2 * kRoom) return false;
  // Behind the address: what it is freed by, and what that is handed, which is torch's own allocations' address again.
  for (int n = sketch->data + 1; n <= sketch->data + 2; ++n)
    if (s[n] != s[sketch->data]) sketch->frees = sketch->frees ? -1 : n;
  if (sketch->frees <= 0) return false;
  std::fill(std::begin(sketch->kinds), std::end(sketch->kinds), ~uint64_t{0});
  for (const py::handle u : same)
    for (int k = 0; k < 2; ++k) sketch->kinds[k] &= ~(words(u)[sketch->dims + kKinds + k] ^ t[sketch->dims + kKinds + k]);
  return true;
}

void Shim::soil(int byte) {
  std::vector<std::vector<unsigned char>> blocks;
  for (size_t size = 8 * (kWords + 1); size <= 512; size += 8)
    for (int i = 0; i < 8; ++i) blocks.emplace_back(size, static_cast<unsigned char>(byte));
}

bool Shim::learn(const py::list& same, const py::list& other) {
  Sketch sketch;
  if (!find(same, &sketch)) return false;
  for (const py::list& group : {same, other})
    for (const py::handle u : group) {
      const auto* t = static_cast<const uint64_t*>(impl(of(u.ptr()))) + sketch.dims;
      const uint64_t code = t[kKinds] & 0xFFFF;
      if (code < std::size(sketch.sizes)) sketch.sizes[code] = uint8_t(u.attr("element_size")().cast<int>());
    }
  void *data, *called;
  uint64_t signature, first, ignored;
  if (!look(sketch, of(same[0].ptr()), &data, &first)) return false;
  for (const py::handle u : same)
    if (!look(sketch, of(u.ptr()), &data, &signature) || signature != first || !call(of(u.ptr()), &called, &ignored) || data != called)
      return false;
  for (const py::handle u : other) {
    if (!look(sketch, of(u.ptr()), &data, &signature)) continue;
    const uint64_t before = signature;  // asking for the address of a lazy copy makes it a real one
    if (before == first || !call(of(u.ptr()), &called, &ignored) || !look(sketch, of(u.ptr()), &data, &signature)) return false;
    if (signature == before && data != called) return false;
  }
  sketch_ = sketch;
  return true;
}

}  // namespace fa
