"""How each library is asked for the norm of x + residual, and for that sum, which is the total of both."""

from typing import NamedTuple

import numpy as np
import residual_limits
from contestants import EPS, onnx_feed, onnx_session, tensor, widened

import nbnorm
from nbnorm import reference


class Arrays(NamedTuple):
    """What forward reads and writes. Backward reads the first three as dy, dtotal and total, and writes dx to the fourth."""

    x: np.ndarray
    residual: np.ndarray
    total: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def make_arrays(dtype, rows, cols):
    """Operands with float32 parameters, or float64 ones for float64."""
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    large = (rng.standard_normal((rows, cols), np.float32).astype(dtype) for _ in range(4))
    return Arrays(*large, *rng.standard_normal((2, cols), np.float32).astype(np.promote_types(dtype, np.float32)))


def bytes_moved(pass_, arrays):
    """Both passes move four arrays; the parameters are small beside them."""
    return 4 * arrays.x.nbytes


def forward(arrays, peers, threads, is_rms):
    """The name of each contestant and its call, which returns y and total; the limit returns None."""
    x, residual, total, y, weight, bias = arrays
    parameters = (weight,) if is_rms else (weight, bias)
    operands = x, residual, x.shape[1], *parameters, EPS
    fused = nbnorm.add_rms_norm if is_rms else nbnorm.add_layer_norm
    norm = nbnorm.rms_norm if is_rms else nbnorm.layer_norm

    def two_steps():
        residual_limits.add(x, residual, total)
        return norm(total, x.shape[1], *parameters, EPS, out=y), total

    calls = {
        "limit": lambda: residual_limits.forward(x, residual, total, y),
        "nbnorm out=": lambda: fused(*operands, out=y, total_out=total),
        "two steps": two_steps,
        "nbnorm": lambda: fused(*operands),
        "NumPy": lambda: numpy_forward(x, residual, parameters),
    }
    if "torch" in peers:
        calls["torch"] = torch_forward(arrays, is_rms)
    # which has no kernels for bfloat16 on a CPU, and none of float64 for a sum
    if "ONNX Runtime" in peers and x.dtype in (np.float16, np.float32):
        calls["ONNX Runtime"] = onnx_forward(arrays, threads, is_rms)
    return calls


def backward(arrays, peers, threads, is_rms):
    """The name of each contestant and its call, which returns dx, dweight and, but of an RMS norm, dbias."""
    dy, dtotal, total, dx, weight, bias = arrays
    operands = total, total.shape[1], weight, EPS
    fused = nbnorm.add_rms_norm_backward if is_rms else nbnorm.add_layer_norm_backward
    norm = nbnorm.rms_norm_backward if is_rms else nbnorm.layer_norm_backward
    out = (dx, *(np.empty_like(parameter) for parameter in ((weight,) if is_rms else (weight, bias))))

    def two_steps():
        grads = norm(dy, *operands, out=out)
        residual_limits.add(dx, dtotal, dx)
        return grads

    calls = {
        "limit": lambda: residual_limits.backward(dy, dtotal, total, dx),
        "nbnorm out=": lambda: fused(dy, dtotal, *operands, out=out),
        "two steps": two_steps,
        "nbnorm": lambda: fused(dy, dtotal, *operands),
        "NumPy": lambda: numpy_backward(dy, dtotal, total, weight, is_rms),
    }
    if "torch" in peers:
        calls["torch"] = torch_backward(arrays, is_rms)
    return calls


def numpy_forward(x, residual, parameters):
    """The sum of 16-bit numbers is rounded before it is normalised, as everybody does."""
    total = (widened(x) + widened(residual)).astype(x.dtype, copy=False)
    norm = reference.rms_norm if len(parameters) == 1 else reference.layer_norm
    return norm(widened(total), 1, *parameters, EPS)[0].astype(x.dtype, copy=False), total


def numpy_backward(dy, dtotal, total, weight, is_rms):
    norm = reference.rms_norm_backward if is_rms else reference.layer_norm_backward
    dx, *sums = norm(widened(dy), widened(total), 1, weight, EPS)
    return (dx + widened(dtotal)).astype(total.dtype, copy=False), *sums


def torch_forward(arrays, is_rms):
    import torch

    x, residual, weight, bias = map(tensor, (arrays.x, arrays.residual, arrays.weight, arrays.bias))
    norm, parameters = torch.nn.functional.layer_norm, (weight, bias)
    if is_rms:
        # see rms_contestants
        norm, parameters = torch.nn.functional.rms_norm, (weight.to(x.dtype),)

    def call():
        total = x + residual
        return norm(total, x.shape[1:], *parameters, EPS), total

    return call


def torch_backward(arrays, is_rms):
    """torch's gradient of the norm, as in `contestants` and `rms_contestants`, and a sum."""
    import torch
    from contestants import torch_backward as layer_norm_backward
    from rms_contestants import torch_backward as rms_norm_backward

    dtotal = tensor(arrays.residual)
    norms = Operands(arrays.x, arrays.total, arrays.weight, arrays.bias)
    if is_rms:
        gradients = rms_norm_backward(norms)
    else:
        _, mean, rstd = nbnorm.layer_norm(arrays.total, arrays.total.shape[1], eps=EPS, return_stats=True)
        gradients = layer_norm_backward(norms, mean, rstd)

    def call():
        dx, *sums = gradients()
        return torch.add(dx, dtotal), *sums

    return call


class Operands(NamedTuple):
    """What a backward of torch reads, by the names of `contestants.Arrays`."""

    dy: np.ndarray
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def onnx_forward(arrays, threads, is_rms):
    operands = {"x": arrays.x, "residual": arrays.residual, "w": arrays.weight}
    if not is_rms:
        operands["b"] = arrays.bias
    feed = onnx_feed(operands, arrays.x.dtype)
    session = onnx_session(arrays.x.dtype, threads, f"Skip{'Simplified' if is_rms else ''}LayerNormalization")
    return lambda: tuple(session.run(["y", "total"], feed))
