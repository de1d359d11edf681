"""How each library is asked for layer norm on a CUDA device: functions of a set of arrays.

A library is imported only where it is called, so that any may be absent. The calls of torch, torch.compile, Triton and Liger
are on torch's arrays, where torch holds them. Backward, all peers are given the statistics, and the limit is the library's
sum of dy and x, which reads and writes as many bytes; with Numba alone it is copies of as many.
"""

import functools
import math
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy knows the name bfloat16 by it
import numpy as np

import nbnorm
from nbnorm import reference

EPS = 1e-5
MODULES = {
    "torch": ["torch"],
    "torch.compile": ["torch", "triton"],
    "Triton": ["torch", "triton"],
    "Liger": ["torch", "triton", "liger_kernel"],
    "CuPy": ["cupy"],
}
# row lengths that torch.compile is asked for: each takes it seconds
COMPILED_COLS = (1024, 4096, 32768)
# the tutorial of Triton refuses longer rows
TRITON_ROW_BYTES = 1 << 16
# and Liger does
LIGER_COLS = 1 << 16
# x is at least this large, several times the L2 of any GPU: of an H200's 60 MB
BYTES = 1 << 28
SETS = 16
# elements of x, about, after which it repeats itself
DISTINCT = 1 << 22


class Hosts(NamedTuple):
    """Operands, all of one dtype, since torch's kernel takes no others, and statistics as `layer_norm` returns them."""

    dy: np.ndarray
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    rstd: np.ndarray


class Set(NamedTuple):
    """The operands on the device, and where results are written: y or dx into `out`."""

    dy: Any
    x: Any
    weight: Any
    bias: Any
    mean: Any
    rstd: Any
    out: Any
    dweight: Any
    dbias: Any


def host_arrays(dtype, rows, cols):
    """The statistics are the reference's, so that no contestant depends on what another one made."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    dy, x = rng.standard_normal((2, distinct_rows(rows, cols), cols), np.float32).astype(dtype)
    weight, bias = rng.standard_normal((2, cols), np.float32).astype(dtype)
    _, *statistics = reference.layer_norm(x.astype(np.float64), 1, eps=EPS)
    mean, rstd = (np.resize(array.astype(np.promote_types(dtype, np.float32)), (rows, 1)) for array in statistics)
    return Hosts(np.resize(dy, (rows, cols)), np.resize(x, (rows, cols)), weight, bias, mean, rstd)


def distinct_rows(rows, cols):
    """After so many they repeat themselves: an odd number, so that what a kernel takes together is never twice the same."""
    return min(rows, DISTINCT // cols | 1)


def sets(library, hosts, total=BYTES):
    """As many as are needed for x to be `total` bytes in all, up to a limit: a single one would stay in the L2."""
    parameters = [library.array(array) for array in hosts[2:]]
    result = []
    for _ in range(min(SETS, math.ceil(total / hosts.x.nbytes))):
        dy, x = library.array(hosts.dy), library.array(hosts.x)
        outs = (library.empty_like(array) for array in (x, *parameters[:2]))
        result.append(Set(dy, x, *parameters, *outs))
    return result


def forward(library, dtype, cols, peers):
    """The name of each contestant and its call, which takes a set and returns y; the limit returns None."""
    calls = {
        "limit": lambda s: library.copy(s.x, s.out),
        "nbnorm out=": lambda s: nbnorm.layer_norm(s.x, cols, s.weight, s.bias, out=s.out),
        "difference of squares": lambda s: nbnorm.layer_norm(s.x, cols, s.weight, s.bias, EPS, True, out=s.out),
        "nbnorm": lambda s: nbnorm.layer_norm(s.x, cols, s.weight, s.bias),
    }
    of_peers = {
        "torch": torch_forward,
        "torch.compile": compiled_forward,
        "Triton": triton_forward,
        "Liger": liger_forward,
        "CuPy": cupy_forward,
    }
    return calls | {name: of_peers[name] for name in able(library, dtype, cols, peers)}


def backward(library, dtype, cols, peers):
    """The name of each contestant and its call, which returns dx, dweight and dbias; the limit returns None."""

    def given(s):
        out = (s.out, s.dweight, s.dbias)
        return nbnorm.layer_norm_backward(s.dy, s.x, cols, s.weight, mean=s.mean, rstd=s.rstd, out=out)

    calls = {
        "limit": lambda s: library.add(s.dy, s.x, s.out),
        "nbnorm out=": lambda s: nbnorm.layer_norm_backward(s.dy, s.x, cols, s.weight, out=(s.out, s.dweight, s.dbias)),
        "given statistics": given,
        "nbnorm": lambda s: nbnorm.layer_norm_backward(s.dy, s.x, cols, s.weight),
    }
    of_peers = {
        "torch": torch_backward,
        "torch.compile": compiled_backward,
        "Triton": triton_backward,
        "Liger": liger_backward,
        "CuPy": cupy_backward,
    }
    return calls | {name: of_peers[name] for name in able(library, dtype, cols, peers)}


def able(library, dtype, cols, peers):
    """The peers that take arrays of this library, and rows of this dtype and length."""
    has_tensors = "torch" in library.modules
    is_able = {
        "torch": has_tensors,
        "torch.compile": has_tensors and cols in COMPILED_COLS,
        "Triton": has_tensors and cols * np.dtype(dtype).itemsize <= TRITON_ROW_BYTES,
        "Liger": has_tensors and cols <= LIGER_COLS,
        "CuPy": dtype != "bfloat16",
    }
    return [name for name in peers if is_able[name]]


def torch_forward(s):
    import torch

    return torch.nn.functional.layer_norm(s.x, s.x.shape[1:], s.weight, s.bias, EPS)


def torch_backward(s):
    """torch's own kernel, without what autograd adds."""
    return torch_gradients(s.dy, s.x, s.mean, s.rstd, s.weight, s.bias)


def torch_gradients(dy, x, mean, rstd, weight, bias):
    import torch

    kernel = torch.ops.aten.native_layer_norm_backward
    return kernel(dy, x, x.shape[1:], mean, rstd, weight, bias, [True, True, True])


def compiled_forward(s):
    import torch

    compiled = compiled_by_torch(torch.nn.functional.layer_norm, s.x.shape, s.x.dtype)
    return compiled(s.x, s.x.shape[1:], s.weight, s.bias, EPS)


def compiled_backward(s):
    """What torch.compile makes of the same operation, which it takes apart."""
    compiled = compiled_by_torch(torch_gradients, s.x.shape, s.x.dtype)
    return compiled(s.dy, s.x, s.mean, s.rstd, s.weight, s.bias)


@functools.lru_cache(maxsize=1)
def compiled_by_torch(function, shape, dtype):
    """For one problem at a time."""
    import torch

    # what was compiled for another shape is not to be made general
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def triton_forward(s):
    import torch
    import triton_layer_norm

    return triton_layer_norm.layer_norm(s.x, s.weight, s.bias, torch.empty_like(s.x), EPS)


def triton_backward(s):
    import triton_layer_norm

    return triton_layer_norm.layer_norm_backward(s.dy, s.x, s.weight, s.mean, s.rstd)


def liger_forward(s):
    from liger_kernel.ops.layer_norm import layer_norm_forward

    return layer_norm_forward(s.x, s.weight, s.bias, EPS)[0]


def liger_backward(s):
    from liger_kernel.ops.layer_norm import layer_norm_backward

    return layer_norm_backward(s.dy, s.x, s.weight, s.bias, s.mean, s.rstd)


def cupy_forward(s):
    """The formula as one writes it, in float32; on the default stream, as all others."""
    import cupy

    x, weight, bias = (cupy.asarray(array) for array in (s.x, s.weight, s.bias))
    wide = x.astype(cupy.float32, copy=False)
    deviations = wide - wide.mean(-1, keepdims=True)
    rstd = 1 / cupy.sqrt((deviations * deviations).mean(-1, keepdims=True) + cupy.float32(EPS))
    return (deviations * rstd * weight + bias).astype(x.dtype, copy=False)


def cupy_backward(s):
    """The same for the gradients."""
    import cupy

    dy, x, weight, mean, rstd = (cupy.asarray(array) for array in (s.dy, s.x, s.weight, s.mean, s.rstd))
    wide = dy.astype(cupy.float32, copy=False)
    x_hat = (x - mean) * rstd
    g = wide * weight
    dx = rstd * (g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True))
    dweight, dbias = (wide * x_hat).sum(0), wide.sum(0)
    return dx.astype(x.dtype, copy=False), dweight.astype(weight.dtype, copy=False), dbias.astype(weight.dtype, copy=False)
