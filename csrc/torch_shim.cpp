#include "torch_shim.h"

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

}  // namespace fa
