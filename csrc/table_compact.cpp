// Compact entries of the table: what must hold of them, and the descriptors of their cohorts.
#include <algorithm>

#include "core/dtypes.h"
#include "table_host.h"

namespace fa {
namespace {

// Whether `prefix` says how many bits of the mask of n elements are set before each 1,024, and none is set beyond.
bool counts(const uint32_t* words, int64_t n, const int64_t* prefix) {
  int64_t total = 0, last = (n + 31) / 32;
  bool good = n % 32 == 0 || words[last - 1] >> n % 32 == 0;
  for (int64_t w = 0; w < last; ++w) {
    if (w % 32 == 0) good &= prefix[w / 32] == total;
    total += __builtin_popcount(words[w]);
  }
  return good && prefix[(last + 31) / 32] == total;
}

}  // namespace

// The entry of one cohort: elements [first, end) of the compact arrays, with a step and scalars of its own.
TensorDesc Table::cohort(const Entry& e, size_t number) const {
  TensorDesc d = e.desc;
  const int64_t first = e.cohorts[number], end = number + 1 < e.cohorts.size() ? e.cohorts[number + 1] : e.desc.numel;
  const auto shift = [&](auto*& base, int dtype, int64_t by) {
    using Pointer = std::remove_reference_t<decltype(base)>;
    if (base) base = reinterpret_cast<Pointer>(uintptr_t(base) + uintptr_t(by * dtype_size(dtype)));
  };
  uintptr_t bits = 0;
  for (size_t k = 0; k < n_states_; ++k) {
    shift(d.state[k], d.state_dtype[k], first);
    bits |= uintptr_t(d.state[k]);
    if (d.scale[k]) d.scale[k] += blocks(e, number, e.block_log2) * (d.state_dtype[k] == kF8X ? 2 : 1);
  }
  shift(d.extra, d.extra_dtype, first);
  shift(d.anchor, d.anchor_dtype, first);
  shift(d.index, d.index_dtype, first);
  shift(d.step, kF32, int64_t(number));
  for (size_t k = 0; k < n_aux_; ++k) shift(d.aux[k], kF64, int64_t(number));
  if (d.compact_grad) shift(d.grad, d.grad_dtype, first);
  bits |= uintptr_t(d.extra) | uintptr_t(d.anchor) | uintptr_t(d.index) | (d.compact_grad ? uintptr_t(d.grad) : 0);
  d.aligned = bits % 16 == 0;
  d.numel = end - first;
  d.grad_numel = d.compact_grad ? d.numel : number ? 0 : d.grad_numel;
  return d;
}

// Every compact array is a gap-free vector as long as the index; a position beyond the parameter would be a write into foreign memory.
void Table::validate_compact(int64_t number, Entry& e) {
  const auto require = [&](bool good, const std::string& what) {
    if (good) return;
    e.p = e.g = Layout{};  // validate again next time
    throw TableError(number, what);
  };
  const auto vector = [](const Layout& l, int64_t n) { return l.dims.size() == 2 && l.dims[0] == n && (n <= 1 || l.dims[1] == 1); };
  const bool masked = by_mask(e);
  const Layout &index = e.layouts[optional(masked ? kPrefix : kIndex)], &starts = e.layouts[optional(kCohorts)];
  const std::string name = masked ? "prefix" : "index";
  require(!masked || (n_states_ && e.objects[optional(kMask)] && !e.objects[optional(kCohorts)]), "compact:prefix");
  const int64_t n = chosen(e);
  require(index.dtype == kI64 || (index.dtype == kI32 && !masked), "dtype:" + name);
  require(vector(index, masked ? (e.p.numel + 1023) / 1024 + 1 : n) && n <= e.p.numel, "compact:" + name);
  require(index.device.type == device_type_ && index.device.id == device_id_, "device:" + name);
  if (e.compact_grad) require(vector(e.g, n), "compact:compact_grad");
  for (size_t k = 0; k < slots_.size(); ++k)
    if (e.objects[k] && like_param(k)) require(vector(e.layouts[k], n), std::string("compact:") + PyUnicode_AsUTF8(slots_[k].key.ptr()));
  if (e.objects[optional(kCohorts)]) {
    require(starts.dtype == kI64 && starts.device.type == dlpack::kCPU && vector(starts, starts.numel) && starts.numel > 0,
            "compact:cohorts");
    const auto* first = static_cast<const int64_t*>(starts.data);
    e.cohorts.assign(first, first + starts.numel);
    for (size_t c = 0; c < e.cohorts.size(); ++c)
      require(c ? e.cohorts[c] >= e.cohorts[c - 1] && e.cohorts[c] <= n : e.cohorts[c] == 0, "compact:cohorts");
  }
  const auto count = int64_t(std::max<size_t>(e.cohorts.size(), 1));
  for (size_t k = n_states_; k < optional(kExtra); ++k)
    require(count == 1 ? e.layouts[k].numel == 1 : vector(e.layouts[k], count),
            std::string("compact:") + PyUnicode_AsUTF8(slots_[k].key.ptr()));
  if (device_type_ != dlpack::kCPU) return;  // reading it there would wait for the device
  if (masked) {
    const auto* words = static_cast<const uint32_t*>(e.layouts[optional(kMask)].data);
    const auto* before = static_cast<const int64_t*>(index.data);
    return require(counts(words, e.p.numel, before) && before[index.numel - 1] == n, "compact:prefix");
  }
  const auto inside = [&](auto* at) {
    const auto size = uint64_t(e.p.numel);
    bool good = true;
    for (int64_t i = 0; i < n; ++i) good &= uint64_t(int64_t(at[i])) < size;
    return good;
  };
  require(index.dtype == kI32 ? inside(static_cast<const int32_t*>(index.data)) : inside(static_cast<const int64_t*>(index.data)),
          "compact:index");
}

}  // namespace fa
