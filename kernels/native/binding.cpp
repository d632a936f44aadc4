// fffsweep::cmm as a function of Python. Through torch.ops an operator is reached by way of boxed values, which takes as long as the
// walk of a token; here the arguments are unpacked as torch's own functions do it. What is called is the operator, by the dispatcher.
#include <Python.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Cmm = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, int64_t, int64_t, int64_t);

constexpr Py_ssize_t kTensors = 4, kMost = 7;  // x, w_in, b_in, w_out; levels, activation and, if given, isa

// Subclasses of tensors, function modes and whatever does not fit are torch's to deal with.
bool plain(PyObject* const* args, Py_ssize_t count) {
  if (count < kMost - 1 || count > kMost || at::impl::torch_function_mode_enabled()) return false;
  for (Py_ssize_t i = 0; i < kTensors; ++i)
    if (!THPVariable_CheckExact(args[i]) && !(i == 2 && Py_IsNone(args[i]))) return false;
  for (Py_ssize_t i = kTensors; i < count; ++i)
    if (!PyLong_CheckExact(args[i])) return false;
  return true;
}

PyObject* by_torch(PyObject* const* args, Py_ssize_t count) {
  py::object packet = py::module_::import("torch").attr("ops").attr("fffsweep").attr("cmm");
  return PyObject_Vectorcall(packet.ptr(), args, count, nullptr);
}

PyObject* cmm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!plain(args, count)) return by_torch(args, count);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fffsweep::cmm", "").typed<Cmm>();
  int64_t integers[kMost - kTensors] = {0, 0, -1};
  for (Py_ssize_t i = kTensors; i < count; ++i) {
    integers[i - kTensors] = PyLong_AsLongLong(args[i]);
    if (PyErr_Occurred()) return nullptr;
  }
  // copies: another thread may let go of the caller's tensors while this one is without the lock
  const Tensor x = THPVariable_Unpack(args[0]), w_in = THPVariable_Unpack(args[1]), w_out = THPVariable_Unpack(args[3]);
  const OptionalTensor b_in = Py_IsNone(args[2]) ? OptionalTensor() : OptionalTensor(THPVariable_Unpack(args[2]));
  Tensor y;
  {
    py::gil_scoped_release unlocked;
    y = op.call(x, w_in, b_in, w_out, integers[0], integers[1], integers[2]);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {{"cmm", (PyCFunction)(void (*)())cmm, METH_FASTCALL,
                          "Operator fffsweep::cmm: x, w_in, b_in or None, w_out, levels, activation, isa=-1, by position."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_binding", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__binding() { return PyModule_Create(&module); }
