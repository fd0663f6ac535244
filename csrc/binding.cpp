// The Python face of the waist, and the only file that knows Python. Tensors come as data pointers (int, 0 =
// absent), since nothing here knows a framework; l2t/_native.pyi says what each argument is. The GIL is
// released while the core works.
//
// The ops are plain C functions of Python rather than pybind11's: they borrow their arguments and own
// nothing. Python before 3.14 ends a thread that comes back to an interpreter which is shutting down by
// unwinding its C++ stack, and a destructor there (a lock's, a reference's) would take the process down or
// touch an object without the GIL.
#include "l2t.h"

#include <pybind11/pybind11.h>

#include "status.h"

namespace {

// Reads arguments one after another: the rows, the inputs, then what an op adds. Errors are looked at once,
// by `done`.
class Reader {
 public:
  Reader(PyObject* const* args, Py_ssize_t count) : args_(args), count_(count) {}

  int64_t number() {
    const Py_ssize_t at = next_++;
    if (failed_ || at >= count_) return 0;
    const int64_t value = PyLong_AsLongLong(args_[at]);
    failed_ = value == -1 && PyErr_Occurred() != nullptr;
    return value;
  }

  template <class T = void>
  T* pointer() {
    return reinterpret_cast<T*>(number());
  }

  l2t_rows rows_then(l2t_tensors& inputs) {
    l2t_rows rows{};
    rows.dtype = static_cast<int>(number());
    rows.link = static_cast<int>(number());
    rows.structure = static_cast<int>(number());
    rows.threads = static_cast<int>(number());
    rows.n = number();
    rows.c = number();
    rows.groups = number();
    rows.rank = number();
    rows.ignore_index = number();
    inputs.logits = pointer();
    rows.logits_stride = number();
    rows.target = pointer<const int64_t>();
    coefficients(inputs);
    return rows;
  }

  // Of inputs, directions and outputs alike.
  template <class Tensors>
  void coefficients(Tensors& tensors) {
    tensors.weight = pointer();
    tensors.left = pointer();
    tensors.right = pointer();
    tensors.bias = pointer();
    tensors.scale = pointer();
  }

  template <class Tensors>
  void logits_and_coefficients(Tensors& tensors) {
    tensors.logits = pointer();
    coefficients(tensors);
  }

  // False, with a Python error set, if the arguments were not whole numbers or not as many as have been asked
  // for.
  bool done(const char* op) const {
    if (!failed_ && next_ == count_) return true;
    if (!failed_)
      PyErr_Format(PyExc_TypeError, "l2t._native.%s takes %zd arguments, got %zd.", op, next_, count_);
    return false;
  }

 private:
  PyObject* const* args_;
  Py_ssize_t count_, next_ = 0;
  bool failed_ = false;
};

template <class F>
PyObject* without_gil(const F& op) {
  PyThreadState* thread = PyEval_SaveThread();
  const l2t_status status = op();
  PyEval_RestoreThread(thread);
  if (status == L2T_OK) Py_RETURN_NONE;
  PyErr_SetString(status == L2T_OUT_OF_MEMORY ? PyExc_MemoryError : PyExc_ValueError, l2t::sentence(status));
  return nullptr;
}

PyObject* value(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader read(args, count);
  l2t_tensors inputs{};
  const l2t_rows rows = read.rows_then(inputs);
  void* loss = read.pointer();
  void* stats = read.pointer();
  if (!read.done("value")) return nullptr;
  return without_gil([&] { return l2t_cpu_value(&rows, &inputs, loss, stats); });
}

PyObject* grad(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader read(args, count);
  l2t_tensors inputs{};
  l2t_outputs outputs{};
  const l2t_rows rows = read.rows_then(inputs);
  const void* stats = read.pointer();
  inputs.v_loss = read.pointer();
  read.logits_and_coefficients(outputs);
  if (!read.done("grad")) return nullptr;
  return without_gil([&] { return l2t_cpu_grad(&rows, &inputs, stats, &outputs); });
}

PyObject* grad_vjp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader read(args, count);
  l2t_tensors inputs{}, cotangents{};
  l2t_outputs outputs{};
  const l2t_rows rows = read.rows_then(inputs);
  const void* stats = read.pointer();
  inputs.v_loss = read.pointer();
  read.logits_and_coefficients(cotangents);
  outputs.v_loss = read.pointer();
  read.logits_and_coefficients(outputs);
  if (!read.done("grad_vjp")) return nullptr;
  return without_gil([&] { return l2t_cpu_grad_vjp(&rows, &inputs, stats, &cotangents, &outputs); });
}

PyObject* grad_jvp(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader read(args, count);
  l2t_tensors inputs{}, tangents{};
  l2t_outputs outputs{};
  const l2t_rows rows = read.rows_then(inputs);
  const void* stats = read.pointer();
  inputs.v_loss = read.pointer();
  tangents.v_loss = read.pointer();
  read.logits_and_coefficients(tangents);
  read.logits_and_coefficients(outputs);
  if (!read.done("grad_jvp")) return nullptr;
  return without_gil([&] { return l2t_cpu_grad_jvp(&rows, &inputs, stats, &tangents, &outputs); });
}

PyObject* check_target(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Reader read(args, count);
  const int64_t n = read.number(), table_rows = read.number(), ignore_index = read.number();
  const int64_t* target = read.pointer<const int64_t>();
  if (!read.done("check_target")) return nullptr;
  return PyLong_FromLongLong(l2t_check_target(n, table_rows, ignore_index, target));
}

template <class F>
PyMethodDef method(const char* name, F function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          nullptr};
}

// What the compiler was told to use; the best of it is always the machine's own minimum.
const char* instruction_set() {
#if defined(__AVX512F__)
  return "avx512f";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__x86_64__)
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = L2T_VERSION;
  info["compiler"] = L2T_COMPILER;
  info["build_type"] = L2T_BUILD_TYPE;
  info["instruction_set"] = instruction_set();
  info["cuda"] = false;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The compiled core of l2t. Only l2t.ops calls it; see l2t/_native.pyi.";
  m.attr("FLOAT32") = static_cast<int>(L2T_FLOAT32);
  m.attr("FLOAT64") = static_cast<int>(L2T_FLOAT64);
  m.attr("SIGMOID") = static_cast<int>(L2T_SIGMOID);
  m.attr("IDENTITY") = static_cast<int>(L2T_IDENTITY);
  m.attr("LOG_SIGMOID") = static_cast<int>(L2T_LOG_SIGMOID);
  m.attr("FULL") = static_cast<int>(L2T_FULL);
  m.attr("DIAGONAL") = static_cast<int>(L2T_DIAGONAL);
  m.attr("LOW_RANK") = static_cast<int>(L2T_LOW_RANK);
  m.def("build_info", &build_info);
  static PyMethodDef methods[] = {
      method("check_target", &check_target), method("value", &value),       method("grad", &grad),
      method("grad_vjp", &grad_vjp),         method("grad_jvp", &grad_jvp), {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw pybind11::error_already_set();
}
