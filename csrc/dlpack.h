// The part of the DLPack 1.3 C exchange ABI that reading a tensor needs (https://dmlc.github.io/dlpack). Layouts are fixed by that
// standard; a producer with another major version is refused at run time.
#pragma once
#include <cstdint>

namespace fa::dlpack {

constexpr int32_t kCPU = 1;

struct Device {
  int32_t type, id;  // type: 1 CPU, 2 CUDA, 10 ROCm
};
struct DataType {
  uint8_t code, bits;  // code: 0 int, 1 unsigned, 2 float, 4 bfloat, 5 complex, 6 bool
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct Version {
  uint32_t major, minor;
};
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};
struct ExchangeAPI {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows: valid while the object lives
  void* current_stream;
};

}  // namespace fa::dlpack
