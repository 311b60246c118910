// The warm path of the table: has anything changed since the last full reading? Hot loops over Python objects live here.
#include "table_host.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/pool.h"
#include "cpu/prefetch.h"

namespace py = pybind11;

namespace fa {

constexpr size_t kAhead = 8;  // entries between a prefetch and its use

// Another number after every change of the dict, 0 where this Python has none: saves the walk through the dict's keys.
static uint64_t dict_version(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000 && !defined(PYPY_VERSION)
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return (void)dict, 0;
#endif
}

PyObject* Table::gradient(Entry& e) {
  e.compact_grad = false;
  if (e.override_grad) return std::exchange(e.override_grad, py::object()).release().ptr();
  if (e.compact) {
    const py::object own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(e.param.ptr(), nullptr));
    if (!own) throw py::error_already_set();
    PyObject* given = PyDict_GetItemWithError(own.ptr(), compact_name_.ptr());
    if (given && given != Py_None) {
      e.compact_grad = true;
      return py::reinterpret_borrow<py::object>(given).release().ptr();
    }
  }
  PyObject* g = e.getter ? e.getter->get(e.param.ptr(), e.getter->closure) : PyObject_GetAttr(e.param.ptr(), grad_name_.ptr());
  if (!g) throw py::error_already_set();
  return g;
}

// Whether the shim may read this parameter: a type that changes what its tensor functions or its `grad` mean may hide the memory elsewhere.
bool Table::plain(const Entry& e) const {
  if (!shim_ || e.wrapped || e.compact || !e.getter) return false;
  const py::object type = py::type::of(e.param), tensor = py::module_::import("torch").attr("Tensor");
  const py::object plain = py::module_::import("torch._C").attr("_disabled_torch_function_impl");
  const auto attribute = [](const py::object& o, const char* name) { return py::object(o.attr(name)); };
  return (type.is(tensor) || attribute(type, "__torch_function__").is(plain)) && attribute(type, "grad").is(attribute(tensor, "grad")) &&
         shim_->holds(e.param);
}

bool Table::glance(const Warm& w, const void* tensor, Seen* now) const {
  if (w.direct) return shim_->read(tensor, &now->data, &now->signature);
  dlpack::Tensor t;
  if (api_->tensor_from_object(const_cast<void*>(tensor), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  uint64_t h = uint64_t(t.dtype.code) << 8 ^ uint64_t(t.dtype.bits) << 16 ^ uint64_t(t.device.type) << 32 ^ uint64_t(t.device.id) << 40 ^
               uint64_t(t.ndim);
  for (int d = 0; d < t.ndim; ++d) h = mix(h, t.shape[d], t.strides[d]);
  *now = {static_cast<char*>(t.data) + t.byte_offset, h | 1};
  return !negated(static_cast<PyObject*>(const_cast<void*>(tensor)));
}

// Whether the state dict holds the very objects it held. Walking it costs a quarter of looking its keys up.
bool Table::same_values(const Warm& w) {
  if (const uint64_t version = dict_version(w.state)) return version == w.state_version;
  Py_ssize_t at = 0;
  int n = 0;
  for (PyObject *key, *value; PyDict_Next(w.state, &at, &key, &value); ++n)
    if (n == w.n_values || value != w.values[n].object) return false;
  return n == w.n_values;
}

// The warm path: kSame or kMoved if nothing changed but, perhaps, the gradient's address. Everything else goes through scan_entry.
Table::Verdict Table::compare(size_t i, const void* grad) {
  Warm& w = warm_[i];
  if (!w.sound) return kRead;
  Seen p, g, now;
  if (!glance(w, reference(w, w.param), &p) || !(p == w.p)) return kRead;
  if (!same_values(w)) return kRead;
  for (int k = 0; k < w.n_values; ++k) {
    const Held& h = w.values[k];
    if (h.seen.signature && (!glance(w, reference(w, h.object), &now) || !(now == h.seen))) return kRead;
  }
  if (!glance(w, grad, &g) || g.signature != w.g.signature) return kRead;
  if (g.data == w.g.data) return kSame;
  Entry& e = entries_[i];
  if (!g.data && e.p.numel) return kRead;
  w.g.data = e.g.data = g.data;
  if (w.direct) w.g_place = shim_->place(grad);
  set_gradient(e, g.data);
  return kMoved;
}

// What can be said of an entry without Python's help; any thread may ask while the caller holds the interpreter.
Table::Verdict Table::look(size_t i) {
  Warm& w = warm_[i];
  if (!w.direct || w.overridden) return kRead;
  const void* grad = shim_->grad(shim_->of(w.param));
  if (grad) return w.live ? compare(i, grad) : kRead;
  return std::exchange(w.live, false) ? kMoved : kSame;
}

// States lie where nothing but the step looks: with cold caches they are what reading the table waits for (5,000 tensors of 256, two threads, a last-level
// cache full of the neighbours' data: 4.0 ms without this, 1.8 with it).
void Table::fetch(size_t i) const {
  if (i + kAhead < warm_.size())
    for (size_t byte = 0; byte < offsetof(Warm, values[4]); byte += 64)
      prefetch_line(reinterpret_cast<const char*>(&warm_[i + kAhead]) + byte);
  const Warm& w = warm_[i];
  if (!w.direct) return;
  prefetch_line(shim_->of(w.param));
  prefetch_line(w.gradient);
  shim_->fetch(w.p_place);
  shim_->fetch(w.g_place);
  prefetch_line(w.state);
  for (int k = 0; k < w.n_values; ++k) {
    if (!w.values[k].place.body) continue;
    prefetch_line(shim_->of(w.values[k].object));
    shim_->fetch(w.values[k].place);
  }
}

void Table::look_at_all(int threads) {
  verdicts_.assign(entries_.size(), kRead);
  if (!shim_) return;
#if defined(Py_GIL_DISABLED)
  threads = 1;  // a dict may only be walked by one thread that Python knows
#endif
  cpu::parallel_for(int64_t(entries_.size()), 256, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first, next = first; i < last; ++i) {
      for (; next < std::min(last, i + 1 + int64_t(kAhead)); ++next) fetch(size_t(next));
      verdicts_[size_t(i)] = look(size_t(i));
    }
  });
}

// After a full reading. The shim is believed where it agrees with it.
void Table::remember(size_t i, PyObject* grad) {
  Entry& e = entries_[i];
  Warm& w = warm_[i];
  if (!api_ || e.wrapped) return;
  const auto see = [&](PyObject* object, const Layout& l, Seen* seen) {
    const bool held = !w.direct || shim_->holds(py::reinterpret_borrow<py::object>(object));
    return held && glance(w, reference(w, object), seen) && seen->data == l.data;
  };
  bool ok = see(w.param, e.p, &w.p) && see(grad, e.g, &w.g);
  if (w.direct && ok) {
    w.p_place = shim_->place(reference(w, w.param)), w.g_place = shim_->place(reference(w, grad));
    w.gradient = shim_->grad(shim_->of(w.param));
  }
  Py_ssize_t at = 0;
  w.n_values = 0;
  for (PyObject *key, *value; ok && PyDict_Next(w.state, &at, &key, &value);) {
    if (w.n_values == kMaxValues) return;
    Held& h = w.values[w.n_values++];
    h = {value, {}, {}};
    // Scalars and the like are ours, and whoever moves them to another device moves the parameter too: their identity is enough.
    for (size_t k = 0; k < slots_.size(); ++k)
      if (e.objects[k].ptr() == value && (like_param(k) || k >= scale_of(0))) ok &= see(value, e.layouts[k], &h.seen);
    if (w.direct && ok && h.seen.signature) h.place = shim_->place(reference(w, value));
  }
  w.state_version = dict_version(w.state);
  w.sound = ok;
}

bool Table::bump_versions(int threads) const {
  if (!shim_) return false;
  for (int64_t i : active)
    if (!warm_[size_t(i)].direct) return false;
  std::atomic<bool> refused{false};
  cpu::parallel_for(int64_t(active.size()), 1024, threads, [&](int64_t first, int64_t last) {
    try {
      for (int64_t k = first; k < last; ++k) shim_->bump_version(shim_->of(warm_[size_t(active[size_t(k)])].param));
    } catch (const std::exception&) {
      refused = true;  // an inference tensor, which has no version: torch's own function skips it
    }
  });
  return !refused;
}

}  // namespace fa
