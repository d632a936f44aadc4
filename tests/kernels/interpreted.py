"""Triton's interpreter, made fit for the kernels' tests: bfloat16 products, and less work around every operation.

The interpreter stores bfloat16 as 16-bit integers and multiplies those as numbers (3.6 to 3.9); it patches the language anew for every
call of a device function; and it computes every integer operation twice, in 64 bits, to look for overflows. Import it before a kernel.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'fffsweep[gpu]'")

tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    left, right = (_floats(each) for each in (a, b))
    return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _floats(operand):
    if operand.dtype.scalar != tl.bfloat16:
        return operand.data
    return (operand.data.astype(np.uint32) << 16).view(np.float32)


_patched_modules = set()


def _call_device_function(self, *args, **kwargs):
    if self.fn.__module__ not in _patched_modules:
        _patched_modules.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpretedFunction.__call__ = _call_device_function
interpreter.interpreter_builder.options = type(interpreter.interpreter_builder.options)(sanitize_overflow=False)
