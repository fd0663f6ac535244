// The part of DLPack that the binding needs: a tensor as its framework hands it over in C, and the table of
// functions that does so (DLPack 1.x, "C exchange API"; the ABI is fixed by its specification). PyTorch has it
// since 2.11 as torch.Tensor.__dlpack_c_exchange_api__.
//
// Deliberately not here: owning tensors, making tensors.
#ifndef L2T_DLPACK_H
#define L2T_DLPACK_H

#include <stdint.h>

namespace l2t::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;  // the framework's own, in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  struct {
    uint32_t major, minor;
  } version;
  ExchangeApi* older;
  void (*allocate)(), (*managed_from_object)(), (*managed_to_object)();
  int (*tensor_from_object)(void* object, Tensor*);  // not 0: a Python error is set
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace l2t::dlpack
#endif
