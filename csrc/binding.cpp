// The Python face of the waist, and the only file that knows Python; l2t/_native.pyi says what each argument is.
// Tensors come as their framework's own objects and are read through DLPack (dlpack.h), which costs less than
// asking for a pointer, a shape and a dtype in Python; nothing here knows the framework itself. Each tensor is
// checked against the logits before the core sees it. The GIL is released while the core works.
//
// The ops are plain C functions of Python rather than pybind11's: they borrow their arguments and own
// nothing. Python before 3.14 ends a thread that comes back to an interpreter which is shutting down by
// unwinding its C++ stack, and a destructor there (a lock's, a reference's) would take the process down or
// touch an object without the GIL.
#include "l2t.h"

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "dlpack.h"
#include "status.h"

namespace {

namespace dlpack = l2t::dlpack;

const dlpack::ExchangeApi* exchange = nullptr;  // set once, by `use_exchange_api`

constexpr dlpack::DataType kTypes[] = {{dlpack::kFloat, 32, 1},
                                       {dlpack::kFloat, 64, 1},
                                       {dlpack::kBfloat, 16, 1},
                                       {dlpack::kFloat, 16, 1}};  // by l2t_dtype
constexpr dlpack::DataType kInt64 = {dlpack::kInt, 64, 1}, kByte = {dlpack::kUInt, 8, 1};

bool same(dlpack::DataType a, dlpack::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// The l2t_dtype of a tensor, or -1.
int dtype_of(const dlpack::Tensor& x) {
  for (int dtype = L2T_FLOAT32; dtype <= L2T_FLOAT16; ++dtype)
    if (same(x.dtype, kTypes[dtype])) return dtype;
  return -1;
}

dlpack::DataType arithmetic_of(int dtype) { return kTypes[dtype == L2T_FLOAT64 ? L2T_FLOAT64 : L2T_FLOAT32]; }

// One call: its arguments, read one after another in the order of l2t/_native.pyi, and what they amount to.
// Once something is refused, with a Python error set, nothing more is read.
class Call {
 public:
  l2t_rows rows{};
  l2t_tensors inputs{};
  void *workspace = nullptr, *stream = nullptr;

  // `more`: how many arguments follow the common ones.
  Call(const char* op, PyObject* const* args, Py_ssize_t count, Py_ssize_t more) : args_(args) {
    if (count != kCommon + more) {
      PyErr_Format(PyExc_TypeError, "l2t._native.%s takes %zd arguments, got %zd.", op, kCommon + more,
                   count);
      refused_ = true;
      return;
    }
    next_ = kConstants;
    rows.link = static_cast<int>(number());
    rows.ignore_index = number();
    rows.groups = number();
    const int64_t reduction = number(), segments = number();
    next_ = 0;
    rows.threads = static_cast<int>(number());
    rows.atomics = static_cast<int>(number());
    PyObject* workspace_object = next();
    read_logits();
    rows.mean = reduction == kMean;
    rows.losses = reduction == kNone ? rows.n : segments;
    rows.target = static_cast<const int64_t*>(tensor("target", kInt64, {rows.n}));
    read_weight();
    inputs.bias = tensor("bias", arithmetic_, {classes_});
    inputs.scale = tensor("scale", arithmetic_, {classes_});
    if (cuda() && !refused_) prepare_cuda(workspace_object);
    next_ = kCommon;
  }

  bool cuda() const { return device_.type == dlpack::kCUDA; }

  // stats [N, 3]
  void* stats() { return tensor("stats", arithmetic_, {rows.n, 3}); }
  // A number a loss: loss, its cotangent, its tangent.
  void* losses(const char* name) { return tensor(name, arithmetic_, {rows.losses}, true); }
  // [N, C] of the logits' dtype.
  void* like_logits(const char* name) { return tensor(name, kTypes[rows.dtype], {rows.n, rows.c}); }

  // Directions or outputs that correspond to logits and coefficients.
  template <class Tensors>
  void logits_and_coefficients(Tensors& tensors) {
    tensors.logits = like_logits("a direction or output of logits");
    tensors.weight = rows.structure == L2T_FULL ? tensor(kPart, arithmetic_, {classes_, rows.c})
                                                : tensor(kPart, arithmetic_, {classes_});
    tensors.left = tensor(kPart, arithmetic_, {classes_, rows.rank});
    tensors.right = tensor(kPart, arithmetic_, {classes_, rows.rank});
    tensors.bias = tensor(kPart, arithmetic_, {classes_});
    tensors.scale = tensor(kPart, arithmetic_, {classes_});
  }

  static void set_error(l2t_status status) {
    if (status == L2T_OUT_OF_MEMORY) {
      PyErr_SetString(PyExc_MemoryError, l2t::sentence(status));
    } else if (status == L2T_CUDA_FAILED) {
      PyErr_Format(PyExc_RuntimeError, "%s %s.", l2t::sentence(status), l2t_cuda_error());
    } else {
      PyErr_SetString(PyExc_ValueError, l2t::sentence(status));
    }
  }

  // op(on the CPU) or op(on CUDA), without the GIL; the result of a Python function.
  template <class Cpu, class Cuda>
  PyObject* run(const Cpu& on_cpu, const Cuda& on_cuda) {
    if (refused_) return nullptr;
    PyThreadState* thread = PyEval_SaveThread();
    const l2t_status status = cuda() ? on_cuda() : on_cpu();
    PyEval_RestoreThread(thread);
    if (status == L2T_OK) Py_RETURN_NONE;
    set_error(status);
    return nullptr;
  }

 private:
  static constexpr int kNone = 0, kMean = 1;       // reduction
  static constexpr Py_ssize_t kConstants = 3 + 7;  // behind threads, atomics, workspace and seven tensors
  static constexpr Py_ssize_t kCommon = kConstants + 5;
  static constexpr const char* kPart = "a direction or output of a coefficient";

  PyObject* next() { return refused_ ? Py_None : args_[next_++]; }

  int64_t number() {
    if (refused_) return 0;
    const int64_t value = PyLong_AsLongLong(next());
    refused_ = value == -1 && PyErr_Occurred() != nullptr;
    return value;
  }

  void refuse(const char* name) {
    if (!refused_) PyErr_Format(PyExc_ValueError, l2t::kMisfit, name);
    refused_ = true;
  }

  // False where there is no tensor: absent, or refused.
  bool view(PyObject* object, dlpack::Tensor& x) {
    if (refused_ || object == Py_None) return false;
    refused_ = exchange->tensor_from_object(object, &x) != 0;
    x.data = static_cast<char*>(x.data) + x.byte_offset;
    return !refused_;
  }

  // The memory of the next argument, null for None; contiguous, of this dtype and shape, where the logits are.
  // A line of one number may be 0-dimensional where that is said.
  void* tensor(const char* name, dlpack::DataType dtype, std::initializer_list<int64_t> shape,
               bool or_scalar = false) {
    dlpack::Tensor x;
    if (!view(next(), x)) return nullptr;
    const bool scalar = or_scalar && x.dims == 0 && *shape.begin() == 1;
    bool fits = same(x.dtype, dtype) && x.device.type == device_.type && x.device.id == device_.id &&
                (scalar || x.dims == static_cast<int32_t>(shape.size()));
    int64_t count = 1;
    bool dense = true;
    for (int32_t d = x.dims - 1; fits && d >= 0; --d) {
      fits = x.shape[d] == shape.begin()[d];
      dense &= x.shape[d] == 1 || x.strides[d] == count;
      count *= x.shape[d];
    }
    fits &= dense || count == 0;
    if (!fits || (x.data == nullptr && count > 0))
      refuse(name);  // without memory: a tensor of promised zeros
    return x.data;
  }

  void read_logits() {
    dlpack::Tensor z;
    if (!view(next(), z)) return refuse("logits");
    rows.dtype = dtype_of(z);
    device_ = z.device;
    const bool here = device_.type == dlpack::kCPU || device_.type == dlpack::kCUDA;
    if (!here || rows.dtype < 0 || z.dims != 2) return refuse("logits");
    const bool empty = z.shape[0] == 0 || z.shape[1] == 0;
    if (!empty && (z.data == nullptr || (z.shape[1] > 1 && z.strides[1] != 1))) return refuse("logits");
    rows.n = z.shape[0];
    rows.c = z.shape[1];
    rows.logits_stride = z.shape[0] > 1 ? z.strides[0] : z.shape[1];
    classes_ = rows.groups * rows.c;
    arithmetic_ = arithmetic_of(rows.dtype);
    inputs.logits = z.data;
  }

  // weight, left, right, of which those that are there say what structure it is.
  void read_weight() {
    if (refused_) return;
    PyObject *weight = args_[next_], *left = args_[next_ + 1];
    dlpack::Tensor x;
    rows.structure = L2T_DIAGONAL;
    if (view(left, x)) {
      rows.structure = L2T_LOW_RANK;
      if (x.dims != 2) return refuse("left");
      rows.rank = x.shape[1];
    } else if (view(weight, x) && x.dims == 2) {
      rows.structure = L2T_FULL;
    }
    inputs.weight = rows.structure == L2T_FULL ? tensor("weight", arithmetic_, {classes_, rows.c})
                                               : tensor("weight", arithmetic_, {classes_});
    inputs.left = tensor("left", arithmetic_, {classes_, rows.rank});
    inputs.right = tensor("right", arithmetic_, {classes_, rows.rank});
  }

  void prepare_cuda(PyObject* object) {
    dlpack::Tensor x;
    if (!view(object, x) || !same(x.dtype, kByte) || x.dims != 1 || x.shape[0] < l2t_cuda_workspace(&rows) ||
        x.device.type != device_.type || x.device.id != device_.id)
      return refuse("workspace");
    workspace = x.data;
    refused_ = exchange->current_stream(device_.type, device_.id, &stream) != 0;
  }

  PyObject* const* args_;
  Py_ssize_t next_ = 0;
  bool refused_ = exchange == nullptr;  // the module is never without it: l2t.ops brings it at import
  dlpack::Device device_{dlpack::kCPU, 0};
  dlpack::DataType arithmetic_{};
  int64_t classes_ = 0;
};

PyObject* value(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call("value", args, count, 3);
  const l2t_rows* rows = &call.rows;
  void *loss = call.losses("loss"), *stats = call.stats(), *d_logits = call.like_logits("d_logits");
  return call.run(
      [&] { return l2t_cpu_value(rows, &call.inputs, loss, stats, d_logits); },
      [&] { return l2t_cuda_value(rows, &call.inputs, loss, stats, d_logits, call.workspace, call.stream); });
}

PyObject* grad(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call("grad", args, count, 8);
  const l2t_rows* rows = &call.rows;
  l2t_outputs out{};
  const void* stats = call.stats();
  call.inputs.v_loss = call.losses("v_loss");
  call.logits_and_coefficients(out);
  return call.run(
      [&] { return l2t_cpu_grad(rows, &call.inputs, stats, &out); },
      [&] { return l2t_cuda_grad(rows, &call.inputs, stats, &out, call.workspace, call.stream); });
}

PyObject* grad_vjp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call("grad_vjp", args, count, 15);
  const l2t_rows* rows = &call.rows;
  l2t_tensors x{};
  l2t_outputs out{};
  const void* stats = call.stats();
  call.inputs.v_loss = call.losses("v_loss");
  call.logits_and_coefficients(x);
  out.v_loss = call.losses("d_v_loss");
  call.logits_and_coefficients(out);
  return call.run(
      [&] { return l2t_cpu_grad_vjp(rows, &call.inputs, stats, &x, &out); },
      [&] { return l2t_cuda_grad_vjp(rows, &call.inputs, stats, &x, &out, call.workspace, call.stream); });
}

PyObject* grad_jvp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Call call("grad_jvp", args, count, 15);
  const l2t_rows* rows = &call.rows;
  l2t_tensors t{};
  l2t_outputs out{};
  const void* stats = call.stats();
  call.inputs.v_loss = call.losses("v_loss");
  t.v_loss = call.losses("t_v_loss");
  call.logits_and_coefficients(t);
  call.logits_and_coefficients(out);
  return call.run(
      [&] { return l2t_cpu_grad_jvp(rows, &call.inputs, stats, &t, &out); },
      [&] { return l2t_cuda_grad_jvp(rows, &call.inputs, stats, &t, &out, call.workspace, call.stream); });
}

// d_logits [N, C] and v_loss [L], on CUDA
PyObject* cuda_scale(PyObject*, PyObject* const* args, Py_ssize_t count) {
  dlpack::Tensor d_logits, v_loss;
  if (count != 2)
    return PyErr_Format(PyExc_TypeError, "l2t._native.cuda_scale takes 2 arguments, got %zd.", count);
  if (exchange == nullptr || exchange->tensor_from_object(args[0], &d_logits) != 0 ||
      exchange->tensor_from_object(args[1], &v_loss) != 0)
    return nullptr;
  l2t_rows rows{};
  rows.dtype = dtype_of(d_logits);
  const bool fits = rows.dtype >= 0 && d_logits.dims == 2 && v_loss.dims <= 1 &&
                    same(v_loss.dtype, arithmetic_of(rows.dtype)) && d_logits.device.type == dlpack::kCUDA &&
                    v_loss.device.type == dlpack::kCUDA && d_logits.device.id == v_loss.device.id;
  if (!fits) return PyErr_Format(PyExc_ValueError, l2t::kMisfit, "v_loss");
  rows.n = d_logits.shape[0];
  rows.c = d_logits.shape[1];
  rows.losses = v_loss.dims == 0 ? 1 : v_loss.shape[0];
  void* stream = nullptr;
  if (exchange->current_stream(d_logits.device.type, d_logits.device.id, &stream) != 0) return nullptr;
  const l2t_status status = l2t_cuda_scale(&rows, static_cast<char*>(v_loss.data) + v_loss.byte_offset,
                                           static_cast<char*>(d_logits.data) + d_logits.byte_offset, stream);
  if (status == L2T_OK) Py_RETURN_NONE;
  Call::set_error(status);
  return nullptr;
}

// target [N], table_rows, ignore_index
PyObject* check_target(PyObject*, PyObject* const* args, Py_ssize_t count) {
  dlpack::Tensor target;
  if (count != 3)
    return PyErr_Format(PyExc_TypeError, "l2t._native.check_target takes 3 arguments, got %zd.", count);
  if (exchange == nullptr || exchange->tensor_from_object(args[0], &target) != 0) return nullptr;
  const int64_t table_rows = PyLong_AsLongLong(args[1]), ignore_index = PyLong_AsLongLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  if (!same(target.dtype, kInt64) || target.device.type != dlpack::kCPU || target.dims != 1 ||
      (target.shape[0] > 1 && target.strides[0] != 1))
    return PyErr_Format(PyExc_ValueError, l2t::kMisfit, "target");
  const auto* first = reinterpret_cast<const int64_t*>(static_cast<char*>(target.data) + target.byte_offset);
  return PyLong_FromLongLong(l2t_check_target(target.shape[0], table_rows, ignore_index, first));
}

template <class F>
PyMethodDef method(const char* name, F function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          nullptr};
}

namespace py = pybind11;

void use_exchange_api(const py::capsule& capsule) {
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != 1) api = api->older;
  if (api == nullptr || api->tensor_from_object == nullptr) throw py::value_error(l2t::kNoExchange);
  exchange = api;
}

py::list instruction_sets() {
  py::list names;
  for (const char* const* name = l2t_cpu_instruction_sets(); *name != nullptr; ++name) names.append(*name);
  return names;
}

int64_t cuda_workspace(int64_t n, int64_t c, int64_t groups, int64_t rank, int64_t losses, bool wide) {
  l2t_rows rows{};
  rows.dtype = wide ? L2T_FLOAT64 : L2T_FLOAT32;
  rows.structure = rank > 0 ? L2T_LOW_RANK : L2T_FULL;
  rows.n = n, rows.c = c, rows.groups = groups, rows.rank = rank, rows.losses = losses;
  return l2t_cuda_workspace(&rows);
}

py::dict build_info() {
  py::dict info;
  info["version"] = L2T_VERSION;
  info["compiler"] = L2T_COMPILER;
  info["build_type"] = L2T_BUILD_TYPE;
  info["instruction_sets"] = L2T_INSTRUCTION_SETS;
  info["cuda_architectures"] = L2T_CUDA_ARCHITECTURES;  // "" without CUDA
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled core of l2t. Only l2t.ops calls it; see l2t/_native.pyi.";
  m.attr("SIGMOID") = static_cast<int>(L2T_SIGMOID);
  m.attr("IDENTITY") = static_cast<int>(L2T_IDENTITY);
  m.attr("LOG_SIGMOID") = static_cast<int>(L2T_LOG_SIGMOID);
  m.def("use_exchange_api", &use_exchange_api);
  m.def("build_info", &build_info);
  m.def("instruction_sets", &instruction_sets);
  m.def("instruction_set", &l2t_cpu_instruction_set);
  m.def("use_instruction_set", [](const char* name) { return l2t_cpu_use_instruction_set(name) == 0; });
  m.def("cuda_workspace", &cuda_workspace);
  m.def("cuda_devices", &l2t_cuda_devices);
  static PyMethodDef methods[] = {
      method("check_target", &check_target),
      method("cuda_scale", &cuda_scale),
      method("value", &value),
      method("grad", &grad),
      method("grad_vjp", &grad_vjp),
      method("grad_jvp", &grad_jvp),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}
