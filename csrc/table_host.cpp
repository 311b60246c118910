#include "table_host.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/dtypes.h"

namespace py = pybind11;

namespace fa {
namespace {

int dtype_code(const dlpack::DataType& t) {
  if (t.lanes != 1) return kNone;
  const int key = t.code * 256 + t.bits;
  switch (key) {
    case 2 * 256 + 32: return kF32;
    case 4 * 256 + 16: return kBF16;
    case 2 * 256 + 16: return kF16;
    case 2 * 256 + 64: return kF64;
    case 0 * 256 + 16: return kI16;
    case 0 * 256 + 32: return kI32;
    case 0 * 256 + 64: return kI64;
    case 0 * 256 + 8: return kI8;
    case 1 * 256 + 8: return kU8;
    case 6 * 256 + 8: return kBool;
    default: return kNone;
  }
}

// Some permutation of the dimensions is contiguous: the tensor fills a gap-free range of memory, each element once.
bool dense(const Layout& l) {
  const size_t n = l.dims.size() / 2;
  std::vector<std::pair<int64_t, int64_t>> order;
  for (size_t d = 0; d < n; ++d)
    if (l.dims[d] != 1) order.push_back({l.dims[n + d], l.dims[d]});
  std::sort(order.begin(), order.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : order) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_shape(const Layout& a, const Layout& b) {
  return a.dims.size() == b.dims.size() && std::equal(a.dims.begin(), a.dims.begin() + a.dims.size() / 2, b.dims.begin());
}

bool same_order(const Layout& a, const Layout& b) {
  const size_t n = a.dims.size() / 2;
  for (size_t d = 0; d < n; ++d)
    if (a.dims[d] > 1 && a.dims[n + d] != b.dims[n + d]) return false;
  return true;
}

}  // namespace

// Whether memory holds the negatives of a tensor's values (the imaginary part of a conjugate, say).
bool Table::negated(PyObject* tensor) const {
  const py::object answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, negated_name_.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

Table::Table(py::object exchange, py::object reader, std::vector<std::string> states, std::vector<std::string> aux, std::string extra,
             int device_type, int device_id, std::vector<int> maps)
    : reader_(std::move(reader)),
      maps_(std::move(maps)),
      n_states_(states.size()),
      n_aux_(aux.size()),
      device_type_(device_type),
      device_id_(device_id) {
  if (states.size() > size_t(kMaxStates) || aux.size() > 2) throw std::invalid_argument("Table: at most 4 states and 2 scalars");
  maps_.resize(states.size(), kNone);
  if (!exchange.is_none()) {
    auto* api = static_cast<dlpack::ExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->header.version.major == 1 && api->tensor_from_object) api_ = api;
  }
  const auto intern = [](const std::string& s) { return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(s.c_str())); };
  grad_name_ = intern("grad");
  local_name_ = intern("_local_tensor");
  negated_name_ = intern("is_neg");
  for (const std::string& s : states) slots_.push_back({intern(s), true, true});
  for (const std::string& s : aux) slots_.push_back({intern(s), true, false});
  slots_.push_back({intern("step"), true, false});
  slots_.push_back({intern(extra.empty() ? "master" : extra), false, true});
  slots_.push_back({intern("mask"), false, false});
  slots_.push_back({intern("index"), false, false});
  slots_.push_back({intern("anchor"), false, true});
  slots_.push_back({intern("cohorts"), false, false});
  slots_.push_back({intern("prefix"), false, false});
  for (const std::string& s : states) slots_.push_back({intern(s + "_scale"), false, false});
  compact_name_ = intern("compact_grad");
}

void Table::add(py::object param, py::object state, int group, int64_t ordinal, int64_t base, int64_t inner, int64_t outer, bool compact) {
  Entry e;
  e.compact = compact;
  e.wrapped = py::hasattr(param, local_name_);
  e.param = std::move(param);
  e.state = std::move(state);
  e.group = group;
  e.ordinal = ordinal;
  e.base = base;
  e.inner = inner;
  e.outer = outer;
  e.objects.resize(slots_.size());
  e.layouts.resize(slots_.size());
  // The type's own getter, without the attribute look-up around it; a type that overrides `grad` keeps the look-up.
  const py::object descriptor = py::getattr(py::type::of(e.param), grad_name_, py::none());
  if (Py_TYPE(descriptor.ptr()) == &PyGetSetDescr_Type) e.getter = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
  Warm w;
  w.param = e.param.ptr();
  w.state = e.state.ptr();
  w.direct = plain(e);
  warm_.push_back(w);
  entries_.push_back(std::move(e));
}

void Table::read_slow(PyObject* object, Layout& now) {
  const py::tuple t = reader_(py::reinterpret_borrow<py::object>(object));
  now.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
  now.dtype = t[1].cast<int>();
  now.device = {t[2].cast<int>(), t[3].cast<int>()};
  now.dims = t[4].cast<std::vector<int64_t>>();
  const auto strides = t[5].cast<std::vector<int64_t>>();
  now.dims.insert(now.dims.end(), strides.begin(), strides.end());
}

// Refreshes `cached`; true when anything but the address changed.
bool Table::read(PyObject* object, Layout& cached, int64_t index, const char* what) {
  if (!api_) {
    Layout now;
    read_slow(object, now);
    const bool changed =
        now.dtype != cached.dtype || now.dims != cached.dims || now.device.type != cached.device.type || now.device.id != cached.device.id;
    now.numel = 1;
    for (size_t d = 0; d < now.dims.size() / 2; ++d) now.numel *= now.dims[d];
    cached = std::move(now);
    return changed;
  }
  dlpack::Tensor t;
  if (api_->tensor_from_object(object, &t) != 0) {
    PyErr_Clear();
    throw TableError(index, std::string("read:") + what);
  }
  const size_t n = size_t(t.ndim);
  const int dtype = dtype_code(t.dtype);
  cached.data = static_cast<char*>(t.data) + t.byte_offset;
  if (cached.dims.size() == 2 * n && cached.dtype == dtype && cached.device.type == t.device.type && cached.device.id == t.device.id &&
      !memcmp(cached.dims.data(), t.shape, n * 8) && !memcmp(cached.dims.data() + n, t.strides, n * 8))
    return false;
  cached.dtype = dtype;
  cached.device = t.device;
  cached.dims.assign(t.shape, t.shape + n);
  cached.dims.insert(cached.dims.end(), t.strides, t.strides + n);
  cached.numel = 1;
  for (size_t d = 0; d < n; ++d) cached.numel *= t.shape[d];
  return true;
}

int Table::scan(int threads) {
  missing.clear();
  strided.clear();
  const uint64_t before = version;
  version = 0;  // an exception below leaves descriptors half updated: the next scan then rebuilds them
  bool changed = before == 0;
  look_at_all(threads);
  for (size_t i = 0; i < entries_.size(); ++i) {
    changed |= verdicts_[i] == kMoved;
    if (verdicts_[i] == kRead) read_entry(i, &changed);
  }
  if (!missing.empty()) return kMissingState;
  if (!strided.empty()) return kStridedGradient;
  version = changed ? ++versions_ : before;
  if (changed) refresh();
  return kReady;
}

// One entry that look_at_all left to Python.
void Table::read_entry(size_t i, bool* changed) {
  const bool overridden = std::exchange(warm_[i].overridden, false), was = entries_[i].compact_grad;
  const py::object grad = py::reinterpret_steal<py::object>(gradient(entries_[i]));
  const bool live = !grad.is_none();
  if (entries_[i].compact_grad != was) warm_[i].sound = entries_[i].sound = false;  // what was checked was a gradient of the other kind
  *changed |= live != warm_[i].live;
  warm_[i].live = live;
  if (!live) return;
  const Verdict verdict = warm_[i].direct || overridden ? kRead : compare(i, grad.ptr());
  *changed |= verdict == kMoved;
  if (verdict != kRead) return;
  scan_entry(int64_t(i), entries_[i], grad.ptr(), changed);
  if (overridden) warm_[i].sound = false;  // says nothing about the gradient that will be there next time
}

// Gathers the descriptors of the tensors that have a gradient.
void Table::refresh() {
  std::vector<int64_t> now;
  for (size_t i = 0; i < entries_.size(); ++i)
    if (warm_[i].live) now.push_back(int64_t(i));
  bool resized = structure == 0;
  if (now != active) {
    resized = true;
    active = std::move(now);
    active_params = py::list();
    for (int64_t i : active) active_params.append(entries_[i].param);
  }
  size_t n = 0;
  for (int64_t i : active) {
    const Entry& e = entries_[i];
    for (size_t c = 0; c < std::max<size_t>(e.cohorts.size(), 1); ++c, ++n) {
      if (n == tensors.size()) tensors.emplace_back(), owners.push_back(i);
      const TensorDesc now_here = e.cohorts.empty() ? e.desc : cohort(e, c);
      resized |= tensors[n].numel != now_here.numel || tensors[n].grad_numel != now_here.grad_numel || owners[n] != i;
      tensors[n] = now_here;
      owners[n] = i;
    }
  }
  resized |= n != tensors.size();
  tensors.resize(n);
  owners.resize(n);
  handles.clear();
  const auto serves = [&](int64_t i) { return warm_[size_t(i)].direct && entries_[size_t(i)].desc.numel > 0; };
  if (shim_ && std::all_of(active.begin(), active.end(), serves))
    for (int64_t i : active) handles.push_back(shim_->of(warm_[size_t(i)].param));
  if (resized) structure = version;
}

// Reads one parameter with its gradient and states; notes in `missing` or `strided` what Python has to mend first.
void Table::scan_entry(int64_t index, Entry& e, PyObject* grad, bool* moved) {
  py::object held_p, held_g, held;
  const auto local = [&](PyObject* o, py::object& hold) {
    if (!e.wrapped) return o;
    hold = py::reinterpret_steal<py::object>(PyObject_GetAttr(o, local_name_.ptr()));
    if (hold) return hold.ptr();
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();  // a plain tensor beside a sharded parameter (its step count, say)
    return o;
  };
  warm_[size_t(index)].sound = false;
  // The last reading was refused half way (or is the first): what it left in the cache proves nothing.
  const bool torn = !std::exchange(e.sound, false);
  void *old_p = e.p.data, *old_g = e.g.data;
  PyObject *const own = local(e.param.ptr(), held_p), *const given = local(grad, held_g);
  if (negated(own)) throw TableError(index, "negated:param");
  const bool laid_out_anew = read(own, e.p, index, "param");
  const bool changed_g = read(given, e.g, index, "grad");
  bool changed = laid_out_anew || changed_g;
  bool shifted = old_p != e.p.data || old_g != e.g.data;
  placement += old_p != e.p.data || laid_out_anew;
  bool freed = (!e.p.data && e.p.numel) || (!e.g.data && e.g.numel);
  for (size_t k = 0; k < slots_.size(); ++k) {
    const bool which = k == optional(kIndex) || k == optional(kCohorts) || k == optional(kPrefix);
    if (!e.compact && which) continue;
    PyObject* o = PyDict_GetItemWithError(e.state.ptr(), slots_[k].key.ptr());
    if (o == Py_None) o = nullptr;
    if (!o && (slots_[k].required || (k == optional(kPrefix) && by_mask(e)))) return missing.push_back(index);
    if (o != e.objects[k].ptr()) {
      e.objects[k] = o ? py::reinterpret_borrow<py::object>(o) : py::object();
      changed = true;
      if (!o) e.layouts[k] = Layout{};
    }
    if (!o) continue;
    void* old = e.layouts[k].data;
    changed |= read(e.wrapped ? local(o, held) : o, e.layouts[k], index, PyUnicode_AsUTF8(slots_[k].key.ptr()));
    shifted |= old != e.layouts[k].data;
    freed |= !e.layouts[k].data && e.layouts[k].numel;
  }
  if (changed || torn || freed) validate(index, e);
  if (e.p.numel && (negated(given) || (!e.compact_grad && !same_order(e.p, e.g)))) return strided.push_back(index);
  if (changed || shifted || torn) {
    fill(e);
    *moved = true;
  }
  e.sound = true;
  remember(size_t(index), grad);
}

void Table::validate(int64_t index, Entry& e) {
  const auto fail = [&](const std::string& what) {
    e.p = e.g = Layout{};  // validate again next time
    throw TableError(index, what);
  };
  const auto floating = [](int d) { return d == kF32 || d == kBF16 || d == kF16; };
  if (e.p.device.type != device_type_ || e.p.device.id != device_id_) fail("device:param");
  if (!floating(e.p.dtype)) fail("dtype:param");
  if (!dense(e.p) && e.p.numel) fail("strides:param");
  if (!e.p.data && e.p.numel) fail("null:param");
  if (e.g.device.type != device_type_ || e.g.device.id != device_id_) fail("device:grad");
  if (!floating(e.g.dtype)) fail("dtype:grad");
  if (!e.compact_grad && !same_shape(e.p, e.g)) fail("shape:grad");
  if (!e.g.data && e.g.numel) fail("null:grad");
  e.cohorts.clear();
  for (size_t k = 0; k < slots_.size(); ++k) {
    if (!e.objects[k]) continue;
    const Layout& l = e.layouts[k];
    const std::string name = PyUnicode_AsUTF8(slots_[k].key.ptr());
    const bool mask = k == optional(kMask), extra = k == optional(kExtra);
    if (k == optional(kIndex) || k == optional(kCohorts) || k == optional(kPrefix)) continue;
    const bool bytes = k < n_states_ && l.dtype == kU8 && e.objects[scale_of(k)];
    if (l.device.type != device_type_ || l.device.id != device_id_) fail("device:" + name);
    if (!l.data && l.numel) fail("null:" + name);
    if (slots_[k].same_layout) {
      if (!e.compact && !same_shape(e.p, l)) fail("shape:" + name);
      if (!e.compact && !same_order(e.p, l) && e.p.numel) fail("strides:" + name);
      if (extra ? l.dtype != kF32 && l.dtype != kI16 : !floating(l.dtype) && !bytes) fail("dtype:" + name);
      if (extra && l.dtype == kI16 && e.p.dtype != kBF16) fail("dtype:" + name);
    } else if (mask) {
      if (l.dtype != kI32 || l.numel != (e.p.numel + 31) / 32) fail("shape:" + name);
    } else if (k >= scale_of(0)) {
      if (l.dtype != kF32) fail("dtype:" + name);
    } else if ((!e.compact && l.numel != 1) || l.dtype != (k < n_states_ + n_aux_ ? kF64 : kF32)) {
      fail("dtype:" + name);
    }
  }
  if (e.compact) validate_compact(index, e);
  validate_coded(index, e);
}

// Of a compact entry only compact arrays are read in their own order.
void Table::set_gradient(Entry& e, void* data) {
  e.desc.grad = data;
  e.desc.aligned = (e.other_addresses | (e.compact && !e.compact_grad ? 0 : uintptr_t(data))) % 16 == 0;
}

void Table::fill(Entry& e) {
  TensorDesc d{};
  d.param = e.p.data;
  d.param_dtype = uint8_t(e.p.dtype);
  d.grad_dtype = uint8_t(e.g.dtype);
  uintptr_t bits = e.compact ? 0 : uintptr_t(d.param);
  for (size_t k = 0; k < n_states_; ++k) {
    d.state[k] = e.layouts[k].data;
    d.state_dtype[k] = uint8_t(e.layouts[k].dtype);
    bits |= uintptr_t(d.state[k]);
    if (!coded(e, k)) continue;
    d.scale[k] = static_cast<float*>(e.layouts[scale_of(k)].data);
    d.state_dtype[k] = uint8_t(e.layouts[scale_of(k)].dims.size() == 2 ? maps_[k] : int(kF8X));
  }
  for (size_t k = 0; k < n_aux_; ++k) d.aux[k] = static_cast<double*>(e.layouts[n_states_ + k].data);
  const auto value = [&](Optional which) -> const Layout& { return e.layouts[optional(which)]; };
  d.step = static_cast<float*>(e.layouts[n_states_ + n_aux_].data);
  d.extra = value(kExtra).data;
  d.extra_dtype = uint8_t(value(kExtra).dtype);
  d.anchor = value(kAnchor).data;
  d.anchor_dtype = uint8_t(value(kAnchor).dtype);
  bits |= uintptr_t(d.extra) | uintptr_t(d.anchor);
  d.numel = d.grad_numel = e.p.numel;
  if (e.compact) {
    const bool masked = by_mask(e);
    d.index = value(masked ? kPrefix : kIndex).data;
    d.index_dtype = uint8_t(masked ? int(kBits) : value(kIndex).dtype);
    if (masked) d.mask = static_cast<const uint32_t*>(value(kMask).data);
    d.compact_grad = e.compact_grad;
    d.numel = chosen(e);
    bits |= uintptr_t(d.index);
    if (e.compact_grad) d.grad_numel = d.numel;
  } else {
    d.mask = static_cast<const uint32_t*>(value(kMask).data);
  }
  e.other_addresses = bits;
  d.block_log2 = uint8_t(e.block_log2);
  d.group = e.group;
  d.ordinal = e.ordinal;
  d.index_base = e.base;
  d.index_inner = e.inner > 0 ? e.inner : e.p.numel;
  d.index_outer = e.outer;
  e.desc = d;
  set_gradient(e, e.g.data);
}

void Table::check_overlap() const {
  std::vector<std::pair<std::pair<uintptr_t, uintptr_t>, int64_t>> spans;
  for (int64_t i : active) {
    const Layout& p = entries_[i].p;
    if (p.numel) spans.push_back({{uintptr_t(p.data), uintptr_t(p.data) + uintptr_t(p.numel * dtype_size(p.dtype))}, i});
  }
  std::sort(spans.begin(), spans.end());
  for (size_t k = 1; k < spans.size(); ++k)
    if (spans[k].first.first < spans[k - 1].first.second)
      throw TableError(spans[k].second, "overlap:" + std::to_string(spans[k - 1].second));
}

}  // namespace fa
