// The warm tensor table: what a step must know of every parameter, gradient and state, read anew from the Python tensors each step
// (a stale address would be a write into freed memory) and compared with what is cached.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/table.h"
#include "dlpack.h"

namespace fa {

struct TableError : std::runtime_error {
  int64_t index;
  TableError(int64_t i, const std::string& what) : std::runtime_error(what), index(i) {}
};

struct Layout {
  void* data = nullptr;
  int dtype = 0;
  dlpack::Device device{0, 0};
  int64_t numel = 0;
  std::vector<int64_t> dims;  // shape, then strides
};

class Table {
 public:
  // `exchange`: torch.Tensor.__dlpack_c_exchange_api__ or None; without it `reader(tensor)` -> (address, dtype code, device type, device id,
  // shape, strides) is called instead. Keys are names in each parameter's state dict: `states` and `aux` must be there, `extra` and "mask" may.
  Table(pybind11::object exchange, pybind11::object reader, std::vector<std::string> states, std::vector<std::string> aux,
        std::string extra, int device_type, int device_id);
  void add(pybind11::object param, pybind11::object state, int group, int64_t ordinal, int64_t base, int64_t inner, int64_t outer);
  // kMissingState: the entries in `missing` have a gradient but no state yet. kStridedGradient: the gradients of the entries in `strided` lie in
  // another memory order than their parameter; use_gradient a copy. Either way: mend and scan again.
  enum Status { kReady = 0, kMissingState = 1, kStridedGradient = 2 };
  int scan();
  void use_gradient(int64_t entry, pybind11::object grad) { entries_[entry].override_grad = std::move(grad); }
  void check_overlap() const;

  std::vector<int64_t> missing, strided, active;  // entry numbers
  std::vector<TensorDesc> tensors;       // of the active entries
  pybind11::list active_params;
  uint64_t version = 0;                  // advances whenever `tensors` changes
  uint64_t placement = 0;                // advances whenever a parameter's memory changes
  uint64_t structure = 0;                // advances whenever the set of tensors or their sizes change

 private:
  struct Slot {
    pybind11::object key;
    bool required = true, same_layout = true;
  };
  static constexpr int kMaxValues = 12;
  static constexpr size_t n_optional_ = 2;  // extra and mask, the last slots
  struct Seen {
    PyObject* object = nullptr;
    void* data = nullptr;
    const void* shape = nullptr;
    uint64_t signature = 0;
  };
  struct Entry {
    pybind11::object param, state, override_grad;
    PyGetSetDef* getter = nullptr;
    bool wrapped = false, live = false, warm = false, sound = false;
    Seen seen_p, seen_g, seen[kMaxStates + 5];
    PyObject* values[kMaxValues];  // what the state dict held, in its order
    int n_values = 0;
    uintptr_t other_addresses = 0;
    int group;
    int64_t ordinal, base, inner, outer;
    Layout p, g;
    std::vector<pybind11::object> objects;
    std::vector<Layout> layouts;
    TensorDesc desc{};
  };
  bool read(PyObject* object, Layout& cached, int64_t index, const char* what);
  void read_slow(PyObject* object, Layout& now);
  void scan_entry(int64_t index, Entry& e, PyObject* grad, bool* moved);
  void refresh();
  PyObject* gradient(Entry& e);
  Seen glance(PyObject* object, bool* ok) const;
  bool unchanged(Entry& e, PyObject* grad, bool* moved);
  bool same_values(const Entry& e) const;
  void remember(Entry& e, PyObject* grad);
  void prefetch(size_t i) const;
  void validate(int64_t index, Entry& e);
  void fill(Entry& e);

  dlpack::ExchangeAPI* api_ = nullptr;
  pybind11::object reader_, grad_name_, local_name_;
  std::vector<Slot> slots_;  // states, aux, step, extra, mask
  size_t n_states_, n_aux_;
  int device_type_, device_id_;
  uint64_t versions_ = 0;
  std::vector<Entry> entries_;
};

}  // namespace fa
