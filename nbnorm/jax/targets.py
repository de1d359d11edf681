"""The handlers in this process: registered with XLA, with the kernels that they may call, and what Python does for them."""

import atexit
import ctypes
import functools
import itertools
import logging
import re
import threading
from pathlib import Path
from time import sleep
from typing import Any

import jax
import numpy as np
from numba.core import config

from nbnorm.calls.arrays import bfloat16
from nbnorm.calls.problem import Problem, wide_dtype
from nbnorm.cpu import choice, sizes
from nbnorm.cpu.staging import storage
from nbnorm.cpu.workers import parallel, threads
from nbnorm.jax import handlers, samples
from nbnorm.nopython import entries, sharing
from nbnorm.nopython.instructions import ENTRY

# versions of the interface, with the major version that is read. Minor ones add to the ends of structs, and XLA takes
# handlers of older ones for a year, so that of a newer one than was tried this one is said
MAJOR, OLDEST_MINOR, NEWEST_MINOR = 0, 1, 3
NAMES = {"forward": "nbnorm_forward_1", "backward": "nbnorm_backward_1"}
FLOATS = ("float16", "bfloat16", "float32", "float64")
WIDE = ("float32", "float64")
VARIANCES = ("centred", "diff_of_squares", "mean_square")
BOTH = (False, True)
# a table's number is in compiled programs, which may be kept: other choices need other NAMES. Forward: the dtypes of x and
# of the arithmetic, weight, bias; backward: these dtypes and weight's, weight, and which gradients
PRODUCTS = {
    "forward": itertools.product(FLOATS, WIDE, BOTH, BOTH, VARIANCES),
    "backward": itertools.product(
        FLOATS, WIDE, FLOATS, BOTH, VARIANCES, [(True, *sums) for sums in itertools.product(BOTH, BOTH)]
    ),
}
NUMBERS: dict[str, Any] = {
    function: {choices: i for i, choices in enumerate(product)} for function, product in PRODUCTS.items()
}
DTYPES = {handlers.F16: "float16", handlers.F32: "float32", handlers.F64: "float64", handlers.BF16: "bfloat16"}
INTERNAL = 13

# for ever: compiled code has their addresses
_words = {function: np.zeros(handlers.TABLES + len(numbers), np.int64) for function, numbers in NUMBERS.items()}
_tables: dict = {}
_lock = threading.Lock()
_callbacks: list = []
_logger = logging.getLogger("nbnorm")


def are_registered():
    """Whether XLA calls the handlers: it has an interface that they know, and they could be made."""
    # programs may be traced in several threads, and XLA takes a name once
    with _lock:
        return _registered()


@functools.cache
def _registered():
    minor = _minor_version()
    if minor is None or config.DISABLE_JIT:
        _logger.info("JAX's programs call nbnorm by jax.pure_callback: no handler for XLA's interface, or no compiler")
        return False
    try:
        for function, name in NAMES.items():
            _register(function, name, minor)
    except Exception as error:
        # whatever XLA has against them
        _logger.info("JAX's programs call nbnorm by jax.pure_callback, since XLA refuses its handlers: %s", error)
        return False
    atexit.register(_leave_python)
    return True


def number(function, *choices, cols):
    """The number of the table for calls of these choices, with the kernel for so many columns in it."""
    index = NUMBERS[function][choices]
    kernel, entry = WANTED[function](cols, *choices)
    key = kernel, entry
    if key not in _tables:
        kernel_address = entries.address(choice.ready(kernel, False))
        if cols <= sizes.LONG_ROW:
            table = _tables.setdefault((function, index), np.zeros(sharing.WORDS, np.int64))
            table[sharing.NATIVE] = ctypes.addressof(parallel.native)
            is_short = sizes.is_short(cols, storage(_dtype(choices[0])).itemsize)
            table[entries.kernel_at(is_short, False)] = kernel_address
            table[ENTRY] = entries.ready(*entry)
            _words[function][handlers.TABLES + index] = table.ctypes.data
        _tables[key] = True
    return np.int64(index)


def _forward(cols, x, dtype, has_weight, has_bias, variance):
    x, dtype = _dtype(x), _dtype(dtype)
    problem = Problem((), (cols,), 1, cols, 0.0, variance, x, dtype, dtype)
    return choice.forward(problem, has_weight, has_bias), ("forward", storage(x), dtype, None, False)


def _backward(cols, x, dtype, weight, has_weight, variance, mask):
    x, dtype, weight = map(_dtype, (x, dtype, weight))
    problem = Problem((), (cols,), 1, cols, 0.0, variance, x, weight, dtype)
    kernel = choice.backward(problem, x, has_weight, wide_dtype(x), mask)
    return kernel, ("backward", *kernel.choices[:5], None, sum(mask[1:]))


WANTED: dict[str, Any] = {"forward": _forward, "backward": _backward}


def _dtype(name):
    return bfloat16() if name == "bfloat16" else np.dtype(name)


def _minor_version():
    """Of the interface of this jaxlib, as its header says; None where it is not one that the handlers know."""
    try:
        header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
        major, minor = (int(re.findall(rf"define XLA_FFI_API_{part} (\d+)", header)[0]) for part in ("MAJOR", "MINOR"))
    except Exception:
        # no such file, or of another form
        return None
    return min(minor, NEWEST_MINOR) if major == MAJOR and minor >= OLDEST_MINOR else None


def _register(function, name, minor):
    address = handlers.address(function)
    words = _words[function]
    python = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(functools.partial(_answer, function))
    _callbacks.append(python)
    words[handlers.VERSION] = MAJOR | minor << 32
    words[handlers.MANY] = threads.ELEMENTS
    words[handlers.PYTHON] = ctypes.cast(python, ctypes.c_void_p).value or 0
    ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(words.ctypes.data + 1)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(ctypes.c_void_p(address)), platform="cpu")


def _leave_python():
    """Wait for the calls that Python makes, and let it make no more: JAX waits for XLA next, and keeps Python's lock."""
    for words in _words.values():
        words[handlers.MANY] = np.iinfo(np.int64).max
        words[handlers.ENDED] = ctypes.addressof(_ENDED)
        while words[handlers.INSIDE]:
            sleep(1e-3)


def _answer(function, frame):
    """Make the call of a frame; returns 0, or the address of XLA's error."""
    try:
        _make(function, frame)
    except BaseException as error:
        # nothing can be raised into XLA, whose thread this is
        return _error(frame, f"nbnorm: {type(error).__name__}: {error}")
    return 0


def _make(function, frame):
    minor_and_major = _word(_word(frame, handlers.API), handlers.API_VERSION)
    if _word(frame, handlers.FRAME_SIZE) < handlers.FRAME_BYTES or minor_and_major & 0xFFFFFFFF != MAJOR:
        raise RuntimeError("called by another version of XLA's interface than it was registered for")
    args, rets, attrs = (_word(frame, at) for at in (handlers.ARGS, handlers.RETS, handlers.ATTRS))
    eps, variance = (_word(_word(attrs, at), handlers.VALUE) for at in (handlers.EPS, handlers.VARIANCE))
    make, operands, results = samples.CALLS[function]
    make(
        VARIANCES[_word(variance, 0)],
        ctypes.c_double.from_address(eps).value,
        [_array(_word(args, i)) for i in range(operands)],
        [_array(_word(rets, i)) for i in range(results)],
    )


def _array(buffer):
    """A buffer's memory as a NumPy array."""
    dims = _word(buffer, handlers.DIMS)
    shape = [_word(dims, i) for i in range(_word(buffer, handlers.RANK))]
    dtype = _dtype(DTYPES[_word(buffer, handlers.DTYPE) & 0xFFFFFFFF])
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size == 0:
        return np.empty(shape, dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(_word(buffer, handlers.DATA)), dtype).reshape(shape)


def _word(address, index):
    return ctypes.c_int64.from_address(address + 8 * index).value


class _Error(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.c_void_p),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )

    def __init__(self, message):
        super().__init__(28, None, message.encode(), INTERNAL)


_ENDED = _Error("nbnorm: Python has ended, and this call needs it")


def _error(frame, message):
    arguments = _Error(message)
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_word(_word(frame, handlers.API), handlers.ERROR_CREATE))
    return create(ctypes.addressof(arguments))
