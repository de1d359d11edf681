"""Every check of user input, with `options`, `axes`, `operands`, `state`, and those of `commands`; no raise elsewhere.

All are before a kernel runs. TypeError is for a wrong kind of object, dtype or device, ValueError for a wrong shape, eps,
mask or layout. A message begins with the argument's name and says what came and what was expected.
"""

import functools
import importlib.util
import math
import re
import sys
from typing import Any

import numpy as np

from nbnorm.calls import arrays, axes, operands, options
from nbnorm.calls.operands import CPU, CUDA
from nbnorm.calls.problem import BackwardArrays, ForwardArrays, Problem, wide_dtype
from nbnorm.calls.shown import described, is_sequence, shown, type_name

# how many gradients layer norm has, and RMS norm, which has no bias
LAYER_GRADIENTS, RMS_GRADIENTS = (3, "three", "dx, dweight and dbias"), (2, "two", "dx and dweight")
# the exact answer can take exponential time for contrived strides
OVERLAP_WORK: Any = 1_000_000


def forward(call):
    """The problem of a `ForwardCall`, and its arrays as NumPy arrays, or as views of CUDA arrays."""
    options.flag("return_stats", call.return_stats)
    x, dtype, device = _x("x", call.x, call.stream)
    residual, residual_dtype = operands.operand("residual", call.residual, device) if call.is_added else (None, None)
    weight, weight_dtype = operands.optional("weight", call.weight, device)
    bias, bias_dtype = operands.optional("bias", call.bias, device)
    problem = _problem("x", x, call, dtype, weight_dtype, (bias_dtype, residual_dtype))
    operands.shape("residual", residual, problem.shape, "the shape of x")
    operands.shape("weight", weight, problem.normalized_shape, "normalized_shape")
    operands.shape("bias", bias, problem.normalized_shape, "normalized_shape")
    out = operands.out("out", call.out, problem.shape, dtype, device)
    with_total = call.is_added and call.total_out is not False
    total_out = operands.out("total_out", call.total_out, problem.shape, dtype, device) if with_total else None
    if out is not None and total_out is not None and _shares_memory(out, total_out):
        raise ValueError("total_out: shares memory with out; expected arrays that do not overlap")
    return problem, ForwardArrays(x, residual, weight, bias, out, total_out, with_total)


def backward(call):
    """The same of a `BackwardCall`."""
    x_name = "total" if call.is_added else "x"
    x, dtype, device = _x(x_name, call.x, call.stream)
    dy, dy_dtype = operands.operand("dy", call.dy, device)
    dtotal, dtotal_dtype = operands.optional("dtotal", call.dtotal, device)
    weight, weight_dtype = operands.optional("weight", call.weight, device)
    mean, _ = operands.optional("mean", call.mean, device)
    rstd, _ = operands.optional("rstd", call.rstd, device)
    problem = _problem(x_name, x, call, dtype, weight_dtype, (dy_dtype, dtotal_dtype))
    operands.shape("dy", dy, problem.shape, f"the shape of {x_name}")
    operands.shape("dtotal", dtotal, problem.shape, f"the shape of {x_name}")
    operands.shape("weight", weight, problem.normalized_shape, "normalized_shape")
    if not call.is_rms and (mean is None) != (rstd is None):
        absent, given = ("mean", "rstd") if mean is None else ("rstd", "mean")
        raise ValueError(f"{absent}: None, but {given} is given; expected both, or neither to have them recomputed")
    for name, array in (("mean", mean), ("rstd", rstd)):
        operands.shape(name, array, problem.statistics_shape, f"{x_name}'s, with 1 for each normalized dimension")
    gradients = RMS_GRADIENTS if call.is_rms else LAYER_GRADIENTS
    mask = _mask(call.output_mask, gradients)
    outs = _outs(call.out, problem, mask, device, gradients)
    return problem, BackwardArrays(dy, dtotal, x, weight, mean, rstd, mask, outs)


def device(name):
    """The device of a layer, "cpu" also for None, and the number of a CUDA device, None for the current one."""
    if name is None or str(name) in ("cpu", "cpu:0"):
        return "cpu", None
    match = re.fullmatch(r"cuda(?::([0-9]+))?", str(name))
    if match is None:
        raise TypeError(f"device: {shown(name)}; expected 'cpu', 'cuda', 'cuda:1' or the like, or None")
    cuda_is_supported(f"device: {shown(name)}")
    from numba import cuda

    number = None if match[1] is None else int(match[1])
    if number is not None and number >= len(cuda.gpus):
        raise TypeError(f"device: {shown(name)}; expected one of the {len(cuda.gpus)} CUDA devices, which count from 0")
    return str(name), number


def description(calls):
    """The problems of a forward and a backward of a `Description`, its dtypes by name, and the mask of three."""
    if calls.x is None:
        raise TypeError("x: None; expected a dtype, such as 'float32'")
    names = ("x", "weight", "bias", "dy", "mean", "rstd", "residual")
    given = {name: getattr(calls, name) for name in names}
    dtypes: dict[str, Any] = {
        name: None if dtype is None else options.float_dtype(dtype, name) for name, dtype in given.items()
    }
    dtypes["dy"] = dtypes["dy"] or dtypes["x"]
    rms = options.flag("rms", calls.is_rms)
    if not rms and (calls.mean is None) != (calls.rstd is None):
        raise ValueError("mean and rstd: only one is given; expected both, or neither to have them recomputed")
    for name in ("bias", "mean") if rms else ():
        if given[name] is not None:
            raise ValueError(f"{name}: {shown(given[name])}; expected None, since RMS norm has none")
    _rows(calls.rows)
    options.flag("backward", calls.backward)
    options.flag("total_out", calls.total_out)
    variance = _variance(rms, calls.use_diff_of_squares)
    normalized_shape = options.shape(calls.normalized_shape)
    axis = axes.of_layer(calls.axis, normalized_shape)
    problems = [
        Problem(
            batch=(),
            normalized_shape=normalized_shape,
            rows=1,
            cols=math.prod(normalized_shape),
            eps=0.0,
            variance=variance,
            dtype=dtypes["x"],
            weight_dtype=dtypes["weight"] or dtypes["x"],
            compute_dtype=np.result_type(*(wide_dtype(dtypes[name]) for name in names if dtypes[name])),
            behind=() if axis is None or np.max(axis) == -1 else (1,),
        )
        for names in (("x", "weight", "bias", "residual"), ("x", "weight", "dy"))
    ]
    gradients = RMS_GRADIENTS if rms else LAYER_GRADIENTS
    mask = (True, True, not rms) if calls.output_mask is None else _mask(calls.output_mask, gradients)
    return *problems, dtypes, mask


def _rows(rows):
    if rows is not None and (not isinstance(rows, int | np.integer) or isinstance(rows, bool)):
        raise TypeError(f"rows: {described(rows)}; expected an int, or None for any number")
    if rows is not None and rows < 0:
        raise ValueError(f"rows: {rows}; expected a number that is not negative")


def _x(name, x, stream):
    """As `operands.operand`, and where the other operands must lie."""
    device = CUDA if arrays.is_cuda(x) else CPU
    _stream(stream, device)
    array, dtype = operands.operand(name, x, device)
    if device == CUDA:
        return array, dtype, array.device
    operands.can_be_given_back(name, x)
    return array, dtype, device


def _problem(x_name, x, call, dtype, weight_dtype, other_dtypes):
    normalized_shape = options.shape(call.normalized_shape, options.ORDER)
    batch_ndim = x.ndim - len(normalized_shape)
    if call.axis is not None:
        batch_ndim = axes.first_of(call.axis, normalized_shape, x_name, x)
    elif batch_ndim < 0 or x.shape[batch_ndim:] != normalized_shape:
        raise ValueError(f"{x_name}: shape {x.shape}; expected one that ends in normalized_shape, {normalized_shape}")
    batch, behind = x.shape[:batch_ndim], x.shape[batch_ndim + len(normalized_shape) :]
    if math.prod(x.shape) * dtype.itemsize > sys.maxsize:
        raise ValueError(f"{x_name}: shape {x.shape}; expected one that a result of {dtype} can have")
    return Problem(
        batch=batch,
        normalized_shape=normalized_shape,
        rows=math.prod(batch) * math.prod(behind),
        cols=math.prod(normalized_shape),
        eps=_default_eps(dtype) if call.is_rms and call.eps is None else options.epsilon(call.eps),
        variance=_variance(call.is_rms, call.use_diff_of_squares),
        dtype=dtype,
        weight_dtype=weight_dtype or dtype,
        compute_dtype=np.result_type(*map(wide_dtype, filter(None, (dtype, weight_dtype, *other_dtypes)))),
        behind=behind,
    )


def _default_eps(dtype):
    """RMS norm's, as torch has it: that of the type that 16-bit numbers are computed in."""
    return float(np.finfo(wide_dtype(dtype)).eps)


def _variance(is_rms, use_diff_of_squares):
    is_diff_of_squares = options.flag("use_diff_of_squares", use_diff_of_squares)
    if is_rms:
        return "mean_square"
    return "diff_of_squares" if is_diff_of_squares else "centred"


def cuda_is_supported(what):
    """Raise where there is nothing to run kernels with."""
    numba_cuda_is_there(what)
    fault = cuda_fault()
    if fault is not None:
        raise TypeError(f"{what}; Numba finds no device that it can use: {fault}")


def numba_cuda_is_there(what):
    """Raise where there is nothing to compile kernels with."""
    if not (has_numba_cuda() or in_simulator()):
        raise TypeError(
            f"{what}; nbnorm needs the package numba-cuda for it: pip install 'nbnorm[cuda13]', or 'nbnorm[cuda12]' for a "
            "driver older than CUDA 13"
        )


@functools.cache
def has_numba_cuda():
    return importlib.util.find_spec("numba_cuda") is not None


def in_simulator():
    """Whether Numba's own simulator runs what is decorated by `cuda.jit`."""
    from numba import cuda
    from numba.core import config

    return bool(config.ENABLE_CUDASIM) and not hasattr(cuda, "shfl_xor_sync")


# asked for at each call on CUDA arrays
@functools.cache
def cuda_fault():
    """What keeps Numba from using a CUDA device; None where nothing does."""
    from numba import cuda

    if in_simulator():
        return (
            "NUMBA_ENABLE_CUDASIM=1 puts its simulator in the place of devices, which has no shuffles and votes of a warp "
            "and no accesses of 16 bytes, as nbnorm's kernels need them; unset it where there is a GPU, or pass NumPy "
            "arrays, such as x.copy_to_host(), which the CPU's kernels take"
        )
    return None if cuda.is_available() else " ".join(str(cuda.cuda_error() or "no device").split())


def _outs(out, problem, mask, device, gradients):
    """Three, None for what is not given."""
    if out is None:
        return None, None, None
    number, word, names = gradients
    if not isinstance(out, tuple | list):
        raise TypeError(f"out: {type_name(out)}; expected a tuple of arrays or None for {names}")
    if len(out) != number:
        raise ValueError(f"out: {len(out)} entries; expected {word}, arrays or None for {names}")
    dtypes = (problem.dtype, problem.weight_dtype, problem.weight_dtype)
    shapes = (problem.shape, problem.normalized_shape, problem.normalized_shape)
    given = (*out, None)[:3]
    for i, wanted in enumerate(mask):
        if given[i] is not None and not wanted:
            raise ValueError(f"out[{i}]: {type_name(given[i])}; expected None, since output_mask[{i}] is False")
    result = tuple(operands.out(f"out[{i}]", given[i], shapes[i], dtypes[i], device) for i in range(3))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if result[i] is not None and result[j] is not None and _shares_memory(result[i], result[j]):
            raise ValueError(f"out[{j}]: shares memory with out[{i}]; expected arrays that do not overlap")
    return result


def _shares_memory(a, b):
    try:
        return np.shares_memory(a, b, max_work=OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _mask(output_mask, gradients):
    """Of three; in the place of a bias that there is not, nothing is asked for."""
    number, word, names = gradients
    if not is_sequence(output_mask) or isinstance(output_mask, str):
        raise TypeError(f"output_mask: {shown(output_mask)}; expected {word} bools, for {names}")
    if len(output_mask) != number:
        raise ValueError(f"output_mask: {shown(output_mask)}; expected {word} bools, for {names}")
    mask = tuple(options.flag(f"output_mask[{i}]", wanted) for i, wanted in enumerate(output_mask))
    return (*mask, False)[:3]


def _stream(stream, device):
    if stream is None:
        return
    if device == CPU:
        raise ValueError(f"stream: {shown(stream)}; expected None, since CPU arrays have no streams")
    from nbnorm.cuda.arrays import handle_of

    if handle_of(stream) is None:
        raise TypeError(f"stream: {described(stream)}; expected a stream, or its address")
