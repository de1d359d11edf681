"""How each library is asked for layer norm: functions without arguments, each over the same arrays.

A library is imported only where it is called, so that any may be absent.
"""

import importlib.util
import os
from typing import NamedTuple

import limits
import ml_dtypes
import numba
import numpy as np

import nbnorm
from nbnorm import reference
from nbnorm.calls.arrays import give_back

EPS = 1e-5
MODULES = {"torch": ["torch"], "ONNX Runtime": ["onnxruntime", "onnx"], "JAX": ["jax"]}
# ONNX Runtime's operators: the domain, inputs and outputs of each
OPERATORS = {
    "LayerNormalization": ("", ["x", "w", "b"], ["y"]),
    "SimplifiedLayerNormalization": ("", ["x", "w"], ["y"]),
    "SkipLayerNormalization": ("com.microsoft", ["x", "residual", "w", "b"], ["y", "", "", "total"]),
    "SkipSimplifiedLayerNormalization": ("com.microsoft", ["x", "residual", "w"], ["y", "", "", "total"]),
}


class Arrays(NamedTuple):
    """dy, x and out are the first rows * cols elements of the flat arrays that the limits move."""

    dy: np.ndarray
    x: np.ndarray
    out: np.ndarray
    weight: np.ndarray
    bias: np.ndarray
    flat: tuple[np.ndarray, np.ndarray, np.ndarray]


def make_arrays(dtype, rows, cols):
    """Operands with float32 parameters, or float64 ones for float64.

    A parameter counts as further elements of each flat array: forward reads weight and bias besides reading x and writing y,
    backward reads weight and writes dweight and dbias besides reading dy and x and writing dx. The limit is computed in the
    memory of the others, since copies of 64 MiB took from 2.0 to 3.4 ms depending on the pages that they were given.
    """
    rng = np.random.default_rng(0)
    dtype = np.dtype(dtype)
    parameter_dtype = np.promote_types(dtype, np.float32)
    extra = cols * parameter_dtype.itemsize // dtype.itemsize
    flat = tuple(rng.standard_normal(rows * cols + extra, np.float32).astype(dtype) for _ in range(3))
    dy, x, out = (array[: rows * cols].reshape(rows, cols) for array in flat)
    weight, bias = rng.standard_normal((2, cols), np.float32).astype(parameter_dtype)
    return Arrays(dy, x, out, weight, bias, flat)


def bytes_moved(pass_, arrays):
    return (2 if pass_ == "forward" else 3) * arrays.flat[0].nbytes


def installed(needed=MODULES):
    """The names of the libraries beside NumPy that are there, with all modules that they need."""
    return [name for name, modules in needed.items() if all(importlib.util.find_spec(module) for module in modules)]


def prepare(peers, threads):
    """Give every library the same number of threads. JAX reads its number when it starts, from the environment.

    Every library has a pool of its own, even torch and Numba, which load a libgomp each. Idle threads that spin take a core
    from the next contestant. ONNX Runtime's do so to an effect: at (4096, 1024) on two cores torch took 5 times as long
    directly after it as after itself, and Numba's copy 3 times. With its spinning off it is 1.4 and 1.8 times, not far from
    what it is after JAX, 1.3 and 2.4. OpenMP's threads spin too, but a copy took as long after torch as after nothing, so
    that OMP_WAIT_POLICY and KMP_BLOCKTIME are left as a user has them: with a passive wait a copy of (128, 768) takes 20 us
    instead of 5. Pauses between the contestants let cores fall asleep, and the same copy then takes 70 us or more. Each
    turn begins with an untimed call instead: see `timing`.
    """
    numba.set_num_threads(threads)
    os.environ["PJRT_NPROC"] = str(threads)
    if "torch" in peers:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)


def forward(arrays, peers, threads):
    """The name of each contestant and its call, which returns y; the limit returns None."""
    _, x, out, weight, bias, flat = arrays
    cols = x.shape[1]
    source, destination = moved(flat[1]), moved(flat[2])
    calls = {
        "limit": lambda: limits.copy(source, destination),
        "nbnorm out=": lambda: nbnorm.layer_norm(x, cols, weight, bias, out=out),
        "difference of squares": lambda: nbnorm.layer_norm(x, cols, weight, bias, use_diff_of_squares=True, out=out),
        "nbnorm": lambda: nbnorm.layer_norm(x, cols, weight, bias),
        "NumPy": lambda: reference.layer_norm(widened(x), 1, weight, bias)[0].astype(x.dtype, copy=False),
    }
    if "torch" in peers:
        calls["torch"] = torch_forward(arrays)
    # which has no kernel for bfloat16 on a CPU
    if "ONNX Runtime" in peers and x.dtype != ml_dtypes.bfloat16:
        calls["ONNX Runtime"] = onnx_forward(arrays, threads)
    if "JAX" in peers:
        calls["JAX"] = jax_forward(arrays)
    return calls


def backward(arrays, peers, threads):
    """The name of each contestant and its call, which returns dx, dweight and dbias; the limit returns None."""
    dy, x, dx, weight, bias, flat = arrays
    cols = x.shape[1]
    out = (dx, np.empty_like(weight), np.empty_like(bias))
    _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
    moved_dy, moved_x, moved_dx = map(moved, flat)
    calls = {
        "limit": lambda: limits.add(moved_dy, moved_x, moved_dx),
        "nbnorm out=": lambda: nbnorm.layer_norm_backward(dy, x, cols, weight, out=out),
        "given statistics": lambda: nbnorm.layer_norm_backward(dy, x, cols, weight, mean=mean, rstd=rstd, out=out),
        "nbnorm": lambda: nbnorm.layer_norm_backward(dy, x, cols, weight),
        "NumPy": lambda: numpy_backward(dy, x, weight),
    }
    if "torch" in peers:
        calls["torch"] = torch_backward(arrays, mean, rstd)
    if "JAX" in peers:
        calls["JAX"] = jax_backward(arrays)
    return calls


def moved(flat):
    """What a limit moves: 16-bit types as integers, which are moved as fast and added without conversion."""
    return flat.view(np.uint16) if flat.itemsize == 2 else flat


def widened(array):
    """Plain NumPy computes 16-bit types in float32: ml_dtypes sums bfloat16 in bfloat16."""
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


def numpy_backward(dy, x, weight):
    dx, dweight, dbias = reference.layer_norm_backward(widened(dy), widened(x), 1, weight)
    return dx.astype(x.dtype, copy=False), dweight, dbias


def tensor(array):
    """The torch tensor in the memory of an array; torch is imported by then."""
    return give_back(array, None, "torch")


def torch_forward(arrays):
    import torch

    x, weight, bias = map(tensor, (arrays.x, arrays.weight, arrays.bias))
    return lambda: torch.nn.functional.layer_norm(x, x.shape[1:], weight, bias, EPS)


def torch_backward(arrays, mean, rstd):
    """torch's own kernel, without what autograd adds; it needs the statistics."""
    import torch

    dy, x, weight, bias, mean, rstd = map(tensor, (arrays.dy, arrays.x, arrays.weight, arrays.bias, mean, rstd))
    kernel = torch.ops.aten.native_layer_norm_backward
    return lambda: kernel(dy, x, x.shape[1:], mean, rstd, weight, bias, [True, True, True])


def onnx_forward(arrays, threads):
    feed = onnx_feed({"x": arrays.x, "w": arrays.weight, "b": arrays.bias}, arrays.x.dtype)
    session = onnx_session(arrays.x.dtype, threads)
    return lambda: session.run(None, feed)[0]


def onnx_feed(operands, dtype):
    """ONNX Runtime has kernels with parameters of the type of x alone."""
    return {name: array.astype(dtype, copy=False) for name, array in operands.items()}


def onnx_session(dtype, threads, operator="LayerNormalization"):
    import onnx
    import onnxruntime
    from onnx import helper

    domain, inputs, outputs = OPERATORS[operator]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    values = {
        name: helper.make_tensor_value_info(name, element, ["cols"] if name in "wb" else ["rows", "cols"])
        for name in filter(None, (*inputs, *outputs))
    }
    axis = {} if domain else {"axis": -1}
    node = helper.make_node(operator, inputs, outputs, domain=domain, epsilon=EPS, **axis)
    infos = [[values[name] for name in names if name] for names in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "norm", *infos), opset_imports=opsets, ir_version=8)
    # which knows ONNX's own operators
    if operator == "LayerNormalization":
        onnx.checker.check_model(model)

    return onnxruntime.InferenceSession(model.SerializeToString(), onnx_options(threads), providers=["CPUExecutionProvider"])


def onnx_options(threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its idle threads spin otherwise, and slow whoever is next: see `prepare`
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def jax_layer_norm(x, weight, bias):
    import jax

    return (jax.nn.standardize(x.astype(weight.dtype), epsilon=EPS) * weight + bias).astype(x.dtype)


def jax_forward(arrays):
    x, weight, bias = jax_arrays(arrays.x, arrays.weight, arrays.bias)
    import jax

    compiled = jax.jit(jax_layer_norm)
    return lambda: compiled(x, weight, bias).block_until_ready()


def jax_backward(arrays):
    operands = jax_arrays(*arrays[:2], *arrays[3:5])
    import jax

    @jax.jit
    def gradients(dy, x, weight, bias):
        _, pullback = jax.vjp(jax_layer_norm, x, weight, bias)
        return pullback(dy)

    return lambda: jax.block_until_ready(gradients(*operands))


def jax_arrays(*operands):
    import jax

    # without it JAX rounds float64 to float32; float32 stays float32
    jax.config.update("jax_enable_x64", True)
    return [jax.device_put(array) for array in operands]
