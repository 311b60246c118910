// The warm tensor table: what a step must know of every parameter, gradient and state, read anew from the Python tensors each step
// (a stale address would be a write into freed memory) and compared with what is cached.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "core/table.h"
#include "dlpack.h"
#include "torch_shim.h"

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
  // shape, strides) is called instead. Keys are names in each parameter's state dict: `states` and `aux` must be there, `extra`, "mask" and
  // "anchor" may; of a compact entry "index" or (where its mask is the index) "prefix" must, and "cohorts" may. A state of bytes needs "<state>_scale" beside it; `maps` says which dynamic
  // map those of one number a block are in (kD8S, kD8U; kNone: no such state may come).
  Table(pybind11::object exchange, pybind11::object reader, std::vector<std::string> states, std::vector<std::string> aux,
        std::string extra, int device_type, int device_id, std::vector<int> maps);
  // `compact`: states are [nnz] in the order of state["index"]; the gradient may be the parameter's attribute "compact_grad", [nnz] likewise.
  void add(pybind11::object param, pybind11::object state, int group, int64_t ordinal, int64_t base, int64_t inner, int64_t outer,
           bool compact);
  // kMissingState: the entries in `missing` have a gradient but no state yet. kStridedGradient: the gradients of the entries in `strided` lie in
  // another memory order than their parameter, or as negatives; use_gradient a copy. Either way: mend and scan again.
  enum Status { kReady = 0, kMissingState = 1, kStridedGradient = 2 };
  int scan(int threads);
  // Before the first `add`. Entries that hold plain tensors are then read through it, by several threads at once.
  void use_shim(const Shim* shim) { shim_ = shim; }
  // at::Tensor* of the parameter of each of `tensors`, for a sweep that advances versions as it goes; none unless that serves them all.
  std::vector<const void*> handles;
  const Shim* shim() const { return shim_; }
  // After a step, for autograd. False, with nothing promised, if a parameter is one that the shim does not read.
  bool bump_versions(int threads) const;
  void use_gradient(int64_t entry, pybind11::object grad) {
    entries_[entry].override_grad = std::move(grad);
    warm_[entry].overridden = true;
  }
  void check_overlap() const;

  std::vector<int64_t> missing, strided, active;  // entry numbers
  std::vector<TensorDesc> tensors;       // of the active entries, one per cohort
  std::vector<int64_t> owners;           // entry number of each of `tensors`
  pybind11::list active_params;
  uint64_t version = 0;                  // advances whenever `tensors` changes
  uint64_t placement = 0;                // advances whenever a parameter's memory, or its order there, changes
  uint64_t structure = 0;                // advances whenever the set of tensors or their sizes change

 private:
  struct Slot {
    pybind11::object key;
    bool required = true, same_layout = true;
  };
  static constexpr int kMaxValues = 12;
  enum Optional : size_t {
    kExtra,
    kMask,
    kIndex,
    kAnchor,
    kCohorts,
    kPrefix,
    kOptional
  };  // slots after the step's; then one scale per state
  // A tensor as the last full reading saw it. The signature stands for dtype, device, shape and strides.
  struct Seen {
    void* data = nullptr;
    uint64_t signature = 0;
    bool operator==(const Seen& o) const { return data == o.data && signature == o.signature; }
  };
  // A value of the state dict. Signature 0: its identity is enough.
  struct Held {
    PyObject* object = nullptr;
    Seen seen;
    Shim::Place place;  // when it was last read: to prefetch
  };
  // What the warm path compares, apart from Entry: two cache lines of a tensor with two states, where an Entry has a dozen.
  struct alignas(64) Warm {
    PyObject *param = nullptr, *state = nullptr;
    Seen p, g;
    Shim::Place p_place, g_place;
    const void* gradient = nullptr;  // where the parameter's bookkeeping holds it: to prefetch
    uint64_t state_version = 0;  // of the state dict, where Python tells
    bool direct = false;  // plain tensors, read through the shim
    bool live = false, sound = false;
    bool overridden = false;  // the entry has an override_grad
    int16_t n_values = 0;
    Held values[kMaxValues];  // what the state dict held, in its order
  };
  struct Entry {
    pybind11::object param, state, override_grad;
    PyGetSetDef* getter = nullptr;
    bool wrapped = false, sound = false, compact = false, compact_grad = false;
    uintptr_t other_addresses = 0;
    int block_log2 = 0;  // of the coded states; 0: there are none
    std::vector<int64_t> cohorts;  // first element of each, where there are several
    int group;
    int64_t ordinal, base, inner, outer;
    Layout p, g;
    std::vector<pybind11::object> objects;
    std::vector<Layout> layouts;
    TensorDesc desc{};
  };
  enum Verdict : uint8_t { kSame, kMoved, kRead };
  bool read(PyObject* object, Layout& cached, int64_t index, const char* what);
  void read_slow(PyObject* object, Layout& now);
  bool negated(PyObject* tensor) const;
  void scan_entry(int64_t index, Entry& e, PyObject* grad, bool* moved);
  void read_entry(size_t i, bool* changed);
  void refresh();
  PyObject* gradient(Entry& e);
  bool plain(const Entry& e) const;
  const void* reference(const Warm& w, PyObject* tensor) const { return w.direct ? shim_->of(tensor) : tensor; }
  bool glance(const Warm& w, const void* tensor, Seen* now) const;
  static bool same_values(const Warm& w);
  Verdict compare(size_t i, const void* grad);
  Verdict look(size_t i);
  void fetch(size_t i) const;
  void look_at_all(int threads);
  void remember(size_t i, PyObject* grad);
  void validate(int64_t index, Entry& e);
  void validate_compact(int64_t index, Entry& e);
  bool by_mask(const Entry& e) const { return e.compact && !e.objects[optional(kIndex)]; }
  // Elements of its states.
  int64_t chosen(const Entry& e) const { return (e.compact ? e.layouts[by_mask(e) ? 0 : optional(kIndex)] : e.p).numel; }
  bool like_param(size_t slot) const { return slot < n_states_ || slot == optional(kExtra) || slot == optional(kAnchor); }
  size_t optional(Optional which) const { return n_states_ + n_aux_ + 1 + which; }
  size_t scale_of(size_t state) const { return optional(kOptional) + state; }
  bool coded(const Entry& e, size_t state) const;
  int64_t blocks(const Entry& e, size_t cohorts, int log2) const;
  void validate_coded(int64_t index, Entry& e);
  void set_gradient(Entry& e, void* data);
  void fill(Entry& e);
  TensorDesc cohort(const Entry& e, size_t number) const;

  dlpack::ExchangeAPI* api_ = nullptr;
  pybind11::object reader_, grad_name_, local_name_, negated_name_, compact_name_;
  std::vector<Slot> slots_;  // states, aux, step, the optional ones, scales
  std::vector<int> maps_;
  size_t n_states_, n_aux_;
  int device_type_, device_id_;
  uint64_t versions_ = 0;
  const Shim* shim_ = nullptr;
  std::vector<Entry> entries_;
  std::vector<Warm> warm_;
  std::vector<Verdict> verdicts_;  // of this scan
};

}  // namespace fa
