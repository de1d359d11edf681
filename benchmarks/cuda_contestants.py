"""How each library is asked for layer norm on a CUDA device: functions of a set of arrays.

A library is imported only where it is called, so that any may be absent. torch's, torch.compile's and Triton's calls are on
torch's arrays, where torch holds them.
"""

import math
from typing import Any, NamedTuple

import numpy as np

import nbnorm

EPS = 1e-5
MODULES = {"torch": ["torch"], "torch.compile": ["torch", "triton"], "Triton": ["torch", "triton"], "CuPy": ["cupy"]}
# row lengths that torch.compile is asked for: each takes it seconds
COMPILED_COLS = (1024, 4096, 32768)
# x is at least this large, several times the L2 of any GPU: of an H200's 60 MB
BYTES = 1 << 28
SETS = 16


class Set(NamedTuple):
    x: Any
    weight: Any
    bias: Any
    out: Any


def host_arrays(dtype, rows, cols):
    """x, weight and bias, all of one dtype, since torch's kernel takes no others. Beyond 4M elements x repeats itself."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    block = rng.standard_normal(min(rows * cols, (1 << 22) + 1), np.float32).astype(dtype)
    weight, bias = rng.standard_normal((2, cols), np.float32).astype(dtype)
    return np.resize(block, (rows, cols)), weight, bias


def sets(library, hosts, total=BYTES):
    """As many as are needed for x to be `total` bytes in all, up to a limit: a single one would stay in the L2."""
    x, weight, bias = hosts
    parameters = library.array(weight), library.array(bias)
    result = []
    for _ in range(min(SETS, math.ceil(total / x.nbytes))):
        array = library.array(x)
        result.append(Set(array, *parameters, library.empty_like(array)))
    return result


def forward(library, dtype, cols, peers):
    """The name of each contestant and its call, which takes a set and returns y; the limit returns None."""
    calls = {
        "limit": lambda s: library.copy(s.x, s.out),
        "nbnorm out=": lambda s: nbnorm.layer_norm(s.x, cols, s.weight, s.bias, out=s.out),
        "difference of squares": lambda s: nbnorm.layer_norm(s.x, cols, s.weight, s.bias, EPS, True, out=s.out),
        "nbnorm": lambda s: nbnorm.layer_norm(s.x, cols, s.weight, s.bias),
    }
    if "torch" in peers and "torch" in library.modules:
        calls["torch"] = torch_forward(cols)
        if "torch.compile" in peers and cols in COMPILED_COLS:
            calls["torch.compile"] = compiled_forward(cols)
        if "Triton" in peers:
            triton_forward(dtype, cols, calls)
    if "CuPy" in peers and dtype != "bfloat16":
        calls["CuPy"] = cupy_forward()
    return calls


def torch_forward(cols):
    import torch

    return lambda s: torch.nn.functional.layer_norm(s.x, (cols,), s.weight, s.bias, EPS)


def compiled_forward(cols):
    import torch

    # what was compiled for another shape is not to be made general
    torch._dynamo.reset()
    compiled = torch.compile(torch.nn.functional.layer_norm, dynamic=False)
    return lambda s: compiled(s.x, (cols,), s.weight, s.bias, EPS)


def triton_forward(dtype, cols, calls):
    """Adds the call where the kernel takes rows of this length."""
    import torch
    import triton_layer_norm

    if cols * np.dtype(dtype).itemsize <= triton_layer_norm.MAX_ROW_BYTES:
        calls["Triton"] = lambda s: triton_layer_norm.layer_norm(s.x, s.weight, s.bias, torch.empty_like(s.x), EPS)


def cupy_forward():
    """The formula as one writes it, in float32; on the default stream, as all others."""
    import cupy

    def layer_norm(s):
        x, weight, bias = (cupy.asarray(array) for array in (s.x, s.weight, s.bias))
        wide = x.astype(cupy.float32, copy=False)
        deviations = wide - wide.mean(-1, keepdims=True)
        rstd = 1 / cupy.sqrt((deviations * deviations).mean(-1, keepdims=True) + cupy.float32(EPS))
        return (deviations * rstd * weight + bias).astype(x.dtype, copy=False)

    return layer_norm
