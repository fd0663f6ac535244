// The Python face of the waist, and the only file that knows Python. Tensors come as data pointers (int, 0 =
// absent), since nothing here knows a framework; l2t/_native.pyi says what each argument is. The GIL is
// released while the core works.
//
// Arguments are read one after another by a Reader rather than named four times over: rows, inputs, then what
// the op adds.
#include "l2t.h"

#include <pybind11/pybind11.h>

#include <string>

#include "status.h"

namespace py = pybind11;

namespace {

class Reader {
 public:
  Reader(const char* op, const py::args& args, size_t expected) : args_(args) {
    if (args.size() != expected)
      throw py::type_error("l2t._native." + std::string(op) + " takes " + std::to_string(expected) +
                           " arguments, got " + std::to_string(args.size()) + ".");
  }

  int64_t number() { return args_[next_++].cast<int64_t>(); }

  template <class T = void>
  T* pointer() {
    return reinterpret_cast<T*>(args_[next_++].cast<uintptr_t>());
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

  // weight, left, right, bias, scale, of inputs, directions and outputs alike.
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

 private:
  const py::args& args_;
  size_t next_ = 0;
};

template <class F>
void without_gil(const F& op) {
  l2t_status status;
  {
    py::gil_scoped_release release;
    status = op();
  }
  if (status == L2T_OK) return;
  if (status == L2T_OUT_OF_MEMORY) {
    PyErr_SetString(PyExc_MemoryError, l2t::sentence(status));
    throw py::error_already_set();
  }
  throw py::value_error(l2t::sentence(status));
}

int64_t check_target(int64_t n, int64_t classes_total, int64_t ignore_index, uintptr_t target) {
  return l2t_check_target(n, classes_total, ignore_index, reinterpret_cast<const int64_t*>(target));
}

void value(const py::args& args) {
  Reader read("value", args, 19);
  l2t_tensors inputs{};
  const l2t_rows rows = read.rows_then(inputs);
  void* loss = read.pointer();
  void* stats = read.pointer();
  without_gil([&] { return l2t_cpu_value(&rows, &inputs, loss, stats); });
}

void grad(const py::args& args) {
  Reader read("grad", args, 25);
  l2t_tensors inputs{};
  const l2t_rows rows = read.rows_then(inputs);
  const void* stats = read.pointer();
  inputs.v_loss = read.pointer();
  l2t_outputs outputs{};
  read.logits_and_coefficients(outputs);
  without_gil([&] { return l2t_cpu_grad(&rows, &inputs, stats, &outputs); });
}

void grad_vjp(const py::args& args) {
  Reader read("grad_vjp", args, 32);
  l2t_tensors inputs{}, cotangents{};
  const l2t_rows rows = read.rows_then(inputs);
  const void* stats = read.pointer();
  inputs.v_loss = read.pointer();
  read.logits_and_coefficients(cotangents);
  l2t_outputs outputs{};
  outputs.v_loss = read.pointer();
  read.logits_and_coefficients(outputs);
  without_gil([&] { return l2t_cpu_grad_vjp(&rows, &inputs, stats, &cotangents, &outputs); });
}

void grad_jvp(const py::args& args) {
  Reader read("grad_jvp", args, 32);
  l2t_tensors inputs{}, tangents{};
  const l2t_rows rows = read.rows_then(inputs);
  const void* stats = read.pointer();
  inputs.v_loss = read.pointer();
  tangents.v_loss = read.pointer();
  read.logits_and_coefficients(tangents);
  l2t_outputs outputs{};
  read.logits_and_coefficients(outputs);
  without_gil([&] { return l2t_cpu_grad_jvp(&rows, &inputs, stats, &tangents, &outputs); });
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

py::dict build_info() {
  py::dict info;
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

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.doc() = "The compiled core of l2t. Only l2t.ops calls it; see l2t/_native.pyi.";
  m.attr("FLOAT32") = static_cast<int>(L2T_FLOAT32);
  m.attr("FLOAT64") = static_cast<int>(L2T_FLOAT64);
  m.attr("SIGMOID") = static_cast<int>(L2T_SIGMOID);
  m.attr("IDENTITY") = static_cast<int>(L2T_IDENTITY);
  m.attr("LOG_SIGMOID") = static_cast<int>(L2T_LOG_SIGMOID);
  m.attr("FULL") = static_cast<int>(L2T_FULL);
  m.attr("DIAGONAL") = static_cast<int>(L2T_DIAGONAL);
  m.attr("LOW_RANK") = static_cast<int>(L2T_LOW_RANK);
  m.def("check_target", &check_target);
  m.def("value", &value);
  m.def("grad", &grad);
  m.def("grad_vjp", &grad_vjp);
  m.def("grad_jvp", &grad_jvp);
  m.def("build_info", &build_info);
}
