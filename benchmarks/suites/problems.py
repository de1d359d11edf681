"""The calls that the suites measure, over arrays that are made once a process, since asv calls `setup` before every sample.

Nothing is imported before it is needed, so that what a machine cannot do is skipped in a fifth of a second. asv skips where
`setup` raises NotImplementedError: so it is where there is no such device, and for what an older commit lacks.
"""

import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# a transformer's activations, short rows, and rows beyond the caches, which have kernels of their own
LARGE = ((8192, 768), (524288, 32), (16, 1 << 20))
EPS = 1e-5
PASSES = ("forward", "backward")
# of nbnorm, beside layer_norm and layer_norm_backward
OTHERS = ("rms_norm", "add_layer_norm", "add_rms_norm")
DTYPES = ("float32", "float64", "float16", "bfloat16")
# use_diff_of_squares
MODES = (False, True)
DEVICES = ("cpu", "cuda")


class Problem(NamedTuple):
    """A call of nbnorm, and one that moves the bytes which this must move; on a CUDA device `wait` waits for either."""

    call: Callable
    move: Callable
    wait: Callable
    # a result as a NumPy array
    read: Callable
    # the operands as NumPy arrays
    hosts: Any


@functools.cache
def problem(pass_, shape, dtype, use_diff_of_squares, device, has_out=True, mean=0):
    """A pass with weight and bias, into arrays that are there already or into new ones. It is compiled."""
    check(pass_, device)
    import numpy as np

    import nbnorm

    hosts = module_beside("contestants").make_arrays(dtype, *shape)
    hosts.x[...] += hosts.x.dtype.type(mean)
    library = CPU() if device == "cpu" else module_beside("cuda_arrays").Numba()
    flat = [library.array(array) for array in hosts.flat]
    dy, x, out = (array[: hosts.x.size].reshape(shape) for array in flat)
    parameters = hosts.weight, hosts.bias, *np.empty_like([hosts.weight, hosts.bias])
    weight, bias, dweight, dbias = map(library.array, parameters)
    if pass_ == "forward":
        function, operands, outs = nbnorm.layer_norm, (x, shape[1], weight, bias), out
        move = functools.partial(library.copy, *flat[1:])
    else:
        function, operands, outs = nbnorm.layer_norm_backward, (dy, x, shape[1], weight), (out, dweight, dbias)
        move = functools.partial(library.add, *flat)
    call = functools.partial(function, *operands, EPS, use_diff_of_squares, out=outs if has_out else None)
    made = Problem(call, move, waiting(device), lambda array: library.read(array, slice(None)), hosts)
    made.call()
    made.move()
    made.wait()
    return made


@functools.cache
def other(name, pass_, shape, dtype):
    """A call of another norm on the CPU, into arrays that are there already. It is compiled."""
    import numpy as np

    import nbnorm

    if not hasattr(nbnorm, name):
        raise NotImplementedError(f"this commit has no {name}")
    x, residual, total, y, weight, bias = module_beside("residual_contestants").make_arrays(dtype, *shape)
    parameters = (weight, bias) if "layer" in name else (weight,)
    added = (residual,) if "add" in name else ()
    if pass_ == "forward":
        function, operands = getattr(nbnorm, name), (x, *added, shape[1], *parameters, EPS)
        outs = {"out": y, "total_out": total} if added else {"out": y}
    else:
        # x is dy here, and the residual is dtotal
        function, operands = getattr(nbnorm, f"{name}_backward"), (x, *added, total, shape[1], weight, EPS)
        outs = {"out": (y, *map(np.empty_like, parameters))}
    call = functools.partial(function, *operands, **outs)
    call()
    return call


@functools.cache
def channels_first(pass_, shape, dtype):
    """A call over axis 1 on the CPU, into arrays that are there already. It is compiled."""
    import inspect

    import numpy as np

    import nbnorm

    if "axis" not in inspect.signature(nbnorm.layer_norm).parameters:
        raise NotImplementedError("this commit has no axis")
    dy, x, out, weight, bias = module_beside("channels_first").make_arrays(dtype, shape)
    if pass_ == "forward":
        call = functools.partial(nbnorm.layer_norm, x, shape[1], weight, bias, axis=1, out=out)
    else:
        outs = out, np.empty_like(weight), np.empty_like(bias)
        call = functools.partial(nbnorm.layer_norm_backward, dy, x, shape[1], weight, axis=1, out=outs)
    call()
    return call


class CPU:
    """What cuda_arrays.Numba does, for CPU memory."""

    def __init__(self):
        self.limits = module_beside("limits")
        self.moved = module_beside("contestants").moved

    def array(self, host):
        return host

    def copy(self, source, destination):
        self.limits.copy(self.moved(source), self.moved(destination))

    def add(self, dy, x, dx):
        self.limits.add(self.moved(dy), self.moved(x), self.moved(dx))

    def read(self, array, rows):
        return array[rows]


def waiting(device):
    if device == "cpu":
        return lambda: None
    from numba import cuda

    return cuda.synchronize


def check(pass_, device):
    """Raise NotImplementedError where there is no such device, or nothing for it yet."""
    if device == "cpu":
        return
    if importlib.util.find_spec("numba_cuda") is None:
        raise NotImplementedError("numba-cuda is not installed")
    from numba import cuda

    if not cuda.is_available():
        raise NotImplementedError("there is no CUDA device")
    if importlib.util.find_spec("nbnorm.cuda") is None or not hasattr(importlib.import_module("nbnorm.cuda"), pass_):
        raise NotImplementedError(f"this commit has no {pass_} on CUDA")


def module_beside(name):
    """A module of benchmarks/, some of which use parts of the package that are not public."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not (error.name or "").startswith("nbnorm."):
            raise
        raise NotImplementedError(f"this commit lacks what benchmarks/{name}.py needs: {error}") from error


def use_threads(count=None):
    """As many as this from here on, by default all of them."""
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    if count is not None and count > most:
        raise NotImplementedError(f"there are {most} threads")
    numba.set_num_threads(count or most)


@functools.cache
def run_once(code):
    """In a process of its own, which leaves its kernels in the cache on disk."""
    subprocess.run([sys.executable, "-c", code], check=True)
