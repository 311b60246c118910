#include "looks.h"

#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "bindings.h"

namespace py = pybind11;

namespace fa {
namespace {

const Shim* shim_in_use = nullptr;
std::vector<PyTypeObject*> plain_types;

}  // namespace

void Looks::use(const Shim* shim, std::vector<PyTypeObject*> types) {
  shim_in_use = shim;
  plain_types = std::move(types);
}

bool Looks::at(PyObject* object, Look* look) {
  *look = Look{};
  if (object == Py_None) return true;
  if (std::find(plain_types.begin(), plain_types.end(), Py_TYPE(object)) == plain_types.end()) return false;
  return shim_in_use->read(shim_in_use->of(object), &look->data, &look->signature) && look->data;
}

Kept::Kept(py::object tensor) : tensor_(std::move(tensor)) {
  if (!Looks::at(tensor_.ptr(), &look_)) throw std::invalid_argument("Kept: a plain tensor with memory, or None, expected");
}

bool Kept::is(PyObject* object) const { return object == tensor_.ptr() && unchanged(); }

bool Kept::unchanged() const {
  Look now;
  return Looks::at(tensor_.ptr(), &now) && now.data == look_.data && now.signature == look_.signature;
}

namespace {

constexpr char kAll[] = "fusedadapt.kept";

PyObject* all_are(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto& kept = *static_cast<const std::vector<Kept>*>(PyCapsule_GetPointer(self, kAll));
  bool same = size_t(count) == kept.size();
  for (size_t i = 0; same && i < kept.size(); ++i) same = kept[i].is(args[i]);
  return PyBool_FromLong(same);
}

// all_are for these tensors
py::object keep(const py::args& tensors) {
  auto kept = std::make_unique<std::vector<Kept>>();
  for (const py::handle tensor : tensors) kept->emplace_back(py::reinterpret_borrow<py::object>(tensor));
  return bound<std::vector<Kept>, &all_are>(std::move(kept), kAll);
}

// One number for what all of them look like, None included; 0 if one cannot be looked at.
PyObject* look(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    uint64_t h = uint64_t(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      Look one;
      if (!Looks::at(args[i], &one)) return PyLong_FromLong(0);
      h = mix(h, int64_t(one.signature), i);
    }
    return PyLong_FromUnsignedLongLong(h | 1);
  });
}

struct None {};

// What torch's dispatcher goes by in a thread, the two words of its local key set, and whether a function mode is on: as one number that is the same
// wherever these are.
struct Calls {
  void* library;
  bool (*function_mode)();
};
constexpr char kCalls[] = "fusedadapt.calls", kKeys[] = "_ZN3c104impl26raw_local_dispatch_key_setE",
               kFunctionMode[] = "_ZN2at4impl27torch_function_mode_enabledEv";

const uint64_t* keys_of_thread(void* library) { return static_cast<const uint64_t*>(dlsym(library, kKeys)); }

PyObject* call_state(PyObject* self, PyObject* const*, Py_ssize_t) {
  const auto& c = *static_cast<const Calls*>(PyCapsule_GetPointer(self, kCalls));
  thread_local const uint64_t* const keys = keys_of_thread(c.library);
  const uint64_t h = mix(c.function_mode(), int64_t(keys[0]), int64_t(keys[1]));
  return PyLong_FromUnsignedLongLong(h | 1);
}

// call_state through torch's library, or None where this torch has other names for these.
py::object calls_through(uintptr_t handle) {
  auto calls = std::make_unique<Calls>();
  calls->library = reinterpret_cast<void*>(handle);
  calls->function_mode = reinterpret_cast<bool (*)()>(dlsym(calls->library, kFunctionMode));
  if (!calls->function_mode || !keys_of_thread(calls->library)) return py::none();
  return bound<Calls, &call_state>(std::move(calls), kCalls);
}

}  // namespace

void bind_looks(py::module_& m) {
  // The shim must live as long as the module does.
  m.def("look_through", [](const Shim* shim, const py::args& types) {
    std::vector<PyTypeObject*> found;
    for (const py::handle type : types) found.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
    Looks::use(shim, std::move(found));
  });
  m.def("keep", &keep);
  m.def("calls_through", &calls_through);
  m.attr("look") = bound<None, &look>(std::make_unique<None>(), "fusedadapt.look");
}

}  // namespace fa
