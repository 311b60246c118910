// The warm path of the table: has anything changed since the last full reading? Hot loops over Python objects live here.
#include "table_host.h"

#include <utility>

namespace py = pybind11;

namespace fa {

PyObject* Table::gradient(Entry& e) {
  if (e.override_grad) return std::exchange(e.override_grad, py::object()).release().ptr();
  PyObject* g = e.getter ? e.getter->get(e.param.ptr(), e.getter->closure) : PyObject_GetAttr(e.param.ptr(), grad_name_.ptr());
  if (!g) throw py::error_already_set();
  return g;
}

// A tensor as the last full reading saw it. The signature stands for dtype, device, shape and strides.
Table::Seen Table::glance(PyObject* object, bool* ok) const {
  dlpack::Tensor t;
  if (api_->tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    *ok = false;
    return {};
  }
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15ull;
  uint64_t h = uint64_t(t.dtype.code) << 8 ^ uint64_t(t.dtype.bits) << 16 ^ uint64_t(t.device.type) << 32 ^ uint64_t(t.device.id) << 40 ^
               uint64_t(t.ndim);
  for (int d = 0; d < t.ndim; ++d) {
    h = (h ^ uint64_t(t.shape[d])) * kPrime;
    h = ((h ^ h >> 29) ^ uint64_t(t.strides[d])) * kPrime;
    h ^= h >> 31;
  }
  return {object, static_cast<char*>(t.data) + t.byte_offset, t.shape, h};
}

// Whether the state dict holds the very objects it held. Walking it costs a quarter of looking its keys up.
bool Table::same_values(const Entry& e) const {
  Py_ssize_t at = 0;
  int n = 0;
  for (PyObject *key, *value; PyDict_Next(e.state.ptr(), &at, &key, &value); ++n)
    if (n == e.n_values || value != e.values[n]) return false;
  return n == e.n_values;
}

// The warm path: true if nothing changed but, perhaps, the gradient's address. Everything else goes through scan_entry.
bool Table::unchanged(Entry& e, PyObject* grad, bool* moved) {
  if (!e.warm || !api_ || e.wrapped) return false;
  bool ok = true;
  const Seen p = glance(e.param.ptr(), &ok), g = glance(grad, &ok);
  ok &= p.data == e.seen_p.data && p.signature == e.seen_p.signature && g.signature == e.seen_g.signature;
  ok &= same_values(e);
  // Scalars and masks are ours, and whoever moves them to another device moves the parameter too: their identity is enough.
  for (size_t k = 0; ok && k <= n_states_; ++k) {
    const Seen& before = k < n_states_ ? e.seen[k] : e.seen[slots_.size() - n_optional_];
    if (!before.object) continue;
    const Seen now = glance(before.object, &ok);
    ok &= now.data == before.data && now.signature == before.signature;
  }
  if (!ok) return false;
  e.seen_g.object = g.object;
  e.seen_g.shape = g.shape;
  if (g.data != e.seen_g.data) {
    if (!g.data && e.p.numel) return false;
    e.seen_g.data = e.g.data = g.data;
    e.desc.grad = g.data;
    e.desc.aligned = (e.other_addresses | uintptr_t(g.data)) % 16 == 0;
    *moved = true;
  }
  return true;
}

void Table::remember(Entry& e, PyObject* grad) {
  e.warm = false;
  if (!api_ || e.wrapped) return;
  bool ok = true;
  e.seen_p = glance(e.param.ptr(), &ok);
  e.seen_g = glance(grad, &ok);
  for (size_t k = 0; k < slots_.size(); ++k) e.seen[k] = e.objects[k] ? glance(e.objects[k].ptr(), &ok) : Seen{};
  Py_ssize_t at = 0;
  e.n_values = 0;
  for (PyObject *key, *value; ok && PyDict_Next(e.state.ptr(), &at, &key, &value);) {
    ok = e.n_values < kMaxValues;
    if (ok) e.values[e.n_values++] = value;
  }
  e.warm = ok;
}

// A step comes after a backward pass: nothing of this is in the caches, and each tensor is a chain of misses. Fetching a few entries ahead
// overlaps them. The addresses are only prefetched, never read: a stale one costs time, nothing else.
void Table::prefetch(size_t i) const {
  const auto fetch = [](const void* p, int from, int to) {
    for (int line = from; line <= to; line += 64) __builtin_prefetch(static_cast<const char*>(p) + line);
  };
  const auto tensor = [&](const Seen& s) {
    fetch(s.object, 0, 0);
    fetch(s.shape, -128, 64);  // the sizes lie inside torch's tensor record
  };
  constexpr size_t kEntry = 12, kTensors = 6;
  if (i + kEntry < entries_.size()) {
    fetch(&entries_[i + kEntry], 0, int(sizeof(Entry)) - 1);
    fetch(entries_[i + kEntry].state.ptr(), 0, 0);
  }
  if (i + kTensors < entries_.size() && entries_[i + kTensors].warm) {
    const Entry& e = entries_[i + kTensors];
    tensor(e.seen_p);
    tensor(e.seen_g);
    for (size_t k = 0; k < n_states_; ++k) tensor(e.seen[k]);
    if (e.seen[slots_.size() - n_optional_].object) tensor(e.seen[slots_.size() - n_optional_]);
  }
}

}  // namespace fa
