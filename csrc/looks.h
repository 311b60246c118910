// Calls that are handed tensors as they are, for the short ways in: what Python would ask a tensor before a kernel may have its address, a look at
// the words of it that the shim knows answers. A call whose tensors look as they did when they were checked needs no second check.
// Where a call repeats after other work, every object that Python touches on the way is fetched from memory again, at 0.1 us each and hundreds of them.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "torch_shim.h"

namespace fa {

struct Look {
  void* data = nullptr;
  uint64_t signature = 0;  // of dtype, device, shape and strides; 0: None
};

class Looks {
 public:
  // `types`: whose instances are read; all others are somebody's subclasses, with ideas of their own.
  static void use(const Shim* shim, std::vector<PyTypeObject*> types);
  // False for what is neither None nor a tensor of these types with memory.
  static bool at(PyObject* object, Look* look);
};

// A tensor that must not have changed or moved.
class Kept {
 public:
  explicit Kept(pybind11::object tensor);
  bool unchanged() const;
  bool is(PyObject* object) const;  // this very tensor, unchanged

 private:
  pybind11::object tensor_;
  Look look_;
};

// What an exception of C++ is to Python. For functions that Python calls without pybind11 in between, which takes 10 us where caches are cold.
template <class Function>
PyObject* guarded(Function f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

// The function as a Python callable that owns `state`, which it finds under `name` in the capsule it gets as self.
template <class State, PyObject* (*function)(PyObject* self, PyObject* const* args, Py_ssize_t count)>
pybind11::object bound(std::unique_ptr<State> state, const char* name) {
  static PyMethodDef method = {"bound", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
  const pybind11::capsule self(state.get(), name,
                               [](PyObject* o) { delete static_cast<State*>(PyCapsule_GetPointer(o, PyCapsule_GetName(o))); });
  state.release();
  PyObject* made = PyCFunction_NewEx(&method, self.ptr(), nullptr);
  if (!made) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(made);
}

}  // namespace fa
