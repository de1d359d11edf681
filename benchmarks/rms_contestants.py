"""How each library is asked for RMS norm, over the arrays of `contestants`, of which bias is not used.

Its limits are those of layer norm, whose bias and dbias, a row each, they move too.
"""

import limits
import ml_dtypes
import numpy as np
from contestants import EPS, bytes_moved, make_arrays, moved, onnx_feed, onnx_session, tensor, widened

import nbnorm
from nbnorm import reference

__all__ = ["backward", "bytes_moved", "forward", "make_arrays"]


def forward(arrays, peers, threads):
    """The name of each contestant and its call, which returns y; the limit returns None."""
    x, out, weight = arrays.x, arrays.out, arrays.weight
    cols = x.shape[1]
    source, destination = map(moved, arrays.flat[1:])
    calls = {
        "limit": lambda: limits.copy(source, destination),
        "nbnorm out=": lambda: nbnorm.rms_norm(x, cols, weight, EPS, out=out),
        "nbnorm": lambda: nbnorm.rms_norm(x, cols, weight, EPS),
        "NumPy": lambda: reference.rms_norm(widened(x), 1, weight, EPS)[0].astype(x.dtype, copy=False),
    }
    if "torch" in peers:
        calls["torch"] = torch_forward(arrays)
    # which has no kernel for bfloat16 on a CPU
    if "ONNX Runtime" in peers and x.dtype != ml_dtypes.bfloat16:
        feed = onnx_feed({"x": x, "w": weight}, x.dtype)
        session = onnx_session(x.dtype, threads, "SimplifiedLayerNormalization")
        calls["ONNX Runtime"] = lambda: session.run(None, feed)[0]
    return calls


def backward(arrays, peers, threads):
    """The name of each contestant and its call, which returns dx and dweight; the limit returns None."""
    dy, x, dx, weight = arrays.dy, arrays.x, arrays.out, arrays.weight
    cols = x.shape[1]
    out = (dx, np.empty_like(weight))
    _, rstd = nbnorm.rms_norm(x, cols, None, EPS, return_stats=True)
    flat = tuple(map(moved, arrays.flat))
    calls = {
        "limit": lambda: limits.add(*flat),
        "nbnorm out=": lambda: nbnorm.rms_norm_backward(dy, x, cols, weight, EPS, out=out),
        "given statistics": lambda: nbnorm.rms_norm_backward(dy, x, cols, weight, EPS, rstd=rstd, out=out),
        "nbnorm": lambda: nbnorm.rms_norm_backward(dy, x, cols, weight, EPS),
        "NumPy": lambda: numpy_backward(dy, x, weight),
    }
    if "torch" in peers:
        calls["torch"] = torch_backward(arrays)
    return calls


def numpy_backward(dy, x, weight):
    dx, dweight = reference.rms_norm_backward(widened(dy), widened(x), 1, weight, EPS)
    return dx.astype(x.dtype, copy=False), dweight


def torch_forward(arrays):
    """Its fused kernel wants a weight of x's dtype."""
    import torch

    x, weight = map(tensor, (arrays.x, arrays.weight.astype(arrays.x.dtype, copy=False)))
    return lambda: torch.nn.functional.rms_norm(x, x.shape[1:], weight, EPS)


def torch_backward(arrays):
    """By autograd, whose graph is made once, and kept."""
    import torch

    dy, x, weight = map(tensor, (arrays.dy, arrays.x, arrays.weight.astype(arrays.x.dtype, copy=False)))
    with torch.enable_grad():
        operands = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = torch.nn.functional.rms_norm(operands[0], x.shape[1:], operands[1], EPS)
    return lambda: torch.autograd.grad(y, operands, dy, retain_graph=True)
