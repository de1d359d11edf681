"""Every check of user input, and every raise in the package: all of them before a kernel runs.

TypeError is for a wrong kind of object, dtype or device, ValueError for a wrong shape, eps, mask or layout. A message
begins with the argument's name and says what came and what was expected.
"""

import functools
import importlib.util
import io
import math
import numbers
import operator
import os
import re
import stat
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbnorm import arrays
from nbnorm.problem import Problem, wide_dtype

# where the operands of a call must lie: in CPU memory, on any CUDA device, or on the one with this number
CPU = "CPU"
CUDA = "CUDA"
FLOATS = ("float16", "bfloat16", "float32", "float64")
MAX_NDIM = 64
# NumPy takes headers of 10,000 characters
NPY_HEADER_BYTES = 1 << 14
NPY_VERSIONS = ((1, 0), (2, 0), (3, 0))
# np.dtype.name takes microseconds
NUMPY_FLOATS = (np.float16, np.float32, np.float64)
# the exact answer can take exponential time for contrived strides
OVERLAP_WORK: Any = 1_000_000


def forward(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats, stream):
    """The problem, and x, weight, bias and out as NumPy arrays, or as views of CUDA arrays, or None where absent."""
    flag("return_stats", return_stats)
    x_array, dtype, device = _x(x, stream)
    weight_array, weight_dtype = _optional("weight", weight, device)
    bias_array, bias_dtype = _optional("bias", bias, device)
    problem = _problem(x_array, normalized_shape, eps, use_diff_of_squares, dtype, (weight_dtype, bias_dtype))
    _shape("weight", weight_array, problem.normalized_shape, "normalized_shape")
    _shape("bias", bias_array, problem.normalized_shape, "normalized_shape")
    return problem, x_array, weight_array, bias_array, _out("out", out, problem.shape, dtype, device)


def backward(dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out, stream):
    """The problem, the operands as in `forward` or None, output_mask as bools, and out as three of them or None."""
    x_array, dtype, device = _x(x, stream)
    dy_array, dy_dtype = _operand("dy", dy, device)
    weight_array, weight_dtype = _optional("weight", weight, device)
    mean_array, _ = _optional("mean", mean, device)
    rstd_array, _ = _optional("rstd", rstd, device)
    problem = _problem(x_array, normalized_shape, eps, use_diff_of_squares, dtype, (weight_dtype, dy_dtype))
    _shape("dy", dy_array, problem.shape, "the shape of x")
    _shape("weight", weight_array, problem.normalized_shape, "normalized_shape")
    if (mean is None) != (rstd is None):
        absent, given = ("mean", "rstd") if mean is None else ("rstd", "mean")
        raise ValueError(f"{absent}: None, but {given} is given; expected both, or neither to have them recomputed")
    _shape("mean", mean_array, problem.statistics_shape, "x's, with 1 for each normalized dimension")
    _shape("rstd", rstd_array, problem.statistics_shape, "x's, with 1 for each normalized dimension")
    mask = _mask(output_mask)
    outs = _outs(out, problem, mask, device)
    return problem, dy_array, x_array, weight_array, mean_array, rstd_array, mask, outs


def shape(normalized_shape):
    """normalized_shape as a tuple of ints."""
    is_sequence = isinstance(normalized_shape, Sequence) or getattr(normalized_shape, "ndim", 0) > 0
    sizes = normalized_shape if is_sequence and not isinstance(normalized_shape, str | bytes) else (normalized_shape,)
    try:
        result = tuple(operator.index(size) for size in sizes)
    except TypeError:
        result = None
    if result is None or any(isinstance(size, bool) for size in sizes):
        raise TypeError(f"normalized_shape: {_shown(normalized_shape)}; expected an int or a sequence of ints")
    if not result or min(result) < 0:
        raise ValueError(f"normalized_shape: {_shown(normalized_shape)}; expected at least one dimension, none negative")
    if math.prod(max(1, size) for size in result) > sys.maxsize or len(result) > MAX_NDIM:
        raise ValueError(f"normalized_shape: {_shown(normalized_shape)}; expected one that an array can have")
    return result


def epsilon(eps):
    is_number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not is_number:
        raise TypeError(f"eps: {_shown(eps)} of type {_type_name(eps)}; expected a real number")
    try:
        result = float(eps)
    except OverflowError:
        result = math.inf
    if not (eps >= 0 and result < math.inf):
        raise ValueError(f"eps: {_shown(eps)}; expected a finite number that is not negative")
    return result


def flag(name, value):
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: {_shown(value)} of type {_type_name(value)}; expected a bool")
    return bool(value)


def device(name):
    """The device of a layer, "cpu" also for None, and the number of a CUDA device, None for the current one."""
    if name is None or str(name) in ("cpu", "cpu:0"):
        return "cpu", None
    match = re.fullmatch(r"cuda(?::([0-9]+))?", str(name))
    if match is None:
        raise TypeError(f"device: {name!r}; expected 'cpu', 'cuda', 'cuda:1' or the like, or None")
    cuda_is_supported(f"device: {name!r}")
    from numba import cuda

    number = None if match[1] is None else int(match[1])
    if number is not None and number >= len(cuda.gpus):
        raise TypeError(f"device: {name!r}; expected one of the {len(cuda.gpus)} CUDA devices, which count from 0")
    return str(name), number


def description(x, normalized_shape, weight, bias, use_diff_of_squares, backward, dy, mean, rstd, output_mask, rows):
    """The problems of a forward and a backward that are described by dtypes; dy's dtype, the statistics', and the mask."""
    if x is None:
        raise TypeError("x: None; expected a dtype, such as 'float32'")
    names = {"x": x, "weight": weight, "bias": bias, "dy": x if dy is None else dy, "mean": mean, "rstd": rstd}
    dtypes: dict[str, Any] = {name: None if dtype is None else float_dtype(dtype, name) for name, dtype in names.items()}
    if (mean is None) != (rstd is None):
        raise ValueError("mean and rstd: only one is given; expected both, or neither to have them recomputed")
    if rows is not None and (not isinstance(rows, numbers.Integral) or isinstance(rows, bool)):
        raise TypeError(f"rows: {_shown(rows)} of type {_type_name(rows)}; expected an int, or None for any number")
    if rows is not None and rows < 0:
        raise ValueError(f"rows: {rows}; expected a number that is not negative")
    flag("backward", backward)
    normalized_shape = shape(normalized_shape)
    problems = [
        Problem(
            batch=(),
            normalized_shape=normalized_shape,
            rows=1,
            cols=math.prod(normalized_shape),
            eps=0.0,
            variance="diff_of_squares" if flag("use_diff_of_squares", use_diff_of_squares) else "centred",
            dtype=dtypes["x"],
            weight_dtype=dtypes["weight"] or dtypes["x"],
            compute_dtype=np.result_type(*(wide_dtype(dtypes[name]) for name in operands if dtypes[name])),
        )
        for operands in (("x", "weight", "bias"), ("x", "weight", "dy"))
    ]
    statistics_dtype = None if mean is None else np.result_type(wide_dtype(dtypes["mean"]), wide_dtype(dtypes["rstd"]))
    return *problems, dtypes["dy"], statistics_dtype, _mask(output_mask)


def float_dtype(dtype, argument="dtype"):
    """A dtype, from NumPy's, torch's or JAX's name for it; float32 for None."""
    if dtype is None:
        return np.dtype(np.float32)
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        return _bfloat16(argument)
    try:
        result = np.dtype(name if name in FLOATS else dtype)
    except (TypeError, ValueError):
        result = None
    if result is None or result.name not in FLOATS:
        raise TypeError(f"{argument}: {_shown(dtype)}; expected one of {', '.join(FLOATS)}")
    return result.newbyteorder("=")


def state(state_dict, parameters, normalized_shape):
    """Pairs of arrays: a layer's parameter, of {name: array}, and a copy of what the state dict has for it."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: {_type_name(state_dict)}; expected a mapping of names to arrays")
    if set(state_dict) != set(parameters):
        raise ValueError(f"state_dict: has {sorted(map(str, state_dict))}; expected {sorted(parameters)}")
    result = []
    for name, parameter in parameters.items():
        source = _host_array(name, state_dict[name])
        _shape(name, source, normalized_shape, "normalized_shape")
        own = f"the layer's {name}"
        place = CUDA if arrays.is_cuda(parameter) else CPU
        _, dtype = _operand(own, parameter, place)
        destination = _out(own, parameter, normalized_shape, dtype, place)
        result.append((parameter if place == CUDA else destination, source))
    return result


def _host_array(name, value):
    """A copy of the values in CPU memory, of an array on any device."""
    if arrays.is_cuda(value):
        _operand(name, value, CUDA)
        return arrays.read(value)
    return np.array(_operand(name, value)[0])


def files(source, destination, others):
    """The paths of `nbnorm apply`: the destination as the file to replace, which must be none of those that are read."""
    destination = Path(os.path.realpath(destination))
    if not destination.parent.is_dir():
        raise ValueError(f"{destination}: no such directory as {destination.parent}")
    if destination.is_symlink():
        raise ValueError(f"{destination}: a symbolic link that leads back to itself; expected a name for a file")
    if destination.exists() and not destination.is_file():
        raise ValueError(f"{destination}: not a regular file; expected a name for a new file, or a file to replace")
    if not os.access(destination.parent, os.W_OK):
        raise ValueError(f"{destination}: no permission to write in {destination.parent}")
    for path in (source, *others):
        if destination.exists() and Path(path).samefile(destination):
            raise ValueError(f"{destination}: is also an input; expected another file to write to")
    return destination


def regular_file(path):
    """Of what may be opened: a FIFO would wait for its other end."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path}: not a regular file; expected an array in NumPy's .npy format")


def npy_header(path, file):
    """What the header of an open .npy file says: where the elements begin, the shape, the dtype, and if in Fortran order."""
    # NumPy would read all of the 4 GB that a header can say it has
    head = io.BytesIO(file.read(NPY_HEADER_BYTES))
    try:
        # NumPy warns of what Python 2 wrote
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(head)
            if version not in NPY_VERSIONS:
                raise ValueError(f"version {version}; expected one of {NPY_VERSIONS}")
            # 3.0 has another encoding than 2.0 for the names of fields, which no array here has
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(head)
            # and refuses sizes that no array can have
            np.broadcast_to(np.empty((), dtype), shape)
    # a hostile header may raise anything in there
    except Exception as error:
        raise ValueError(f"{path}: not an array in NumPy's .npy format: {error!s:.200}") from error
    # pickles, and numbers in structures or arrays of their own
    if dtype.kind in "OV":
        raise TypeError(f"{path}: elements of dtype {dtype!s:.200}; expected floats, integers or booleans")
    offset = head.tell()
    expected = offset + math.prod(shape) * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
    if size < expected:
        raise ValueError(f"{path}: {size} bytes; expected {expected}, for the shape and dtype that its header says")
    return offset, shape, dtype, fortran_order


def unchanged_file(path, is_unchanged):
    if not is_unchanged:
        raise ValueError(f"{path}: changed while it was read")


def _problem(x, normalized_shape, eps, use_diff_of_squares, dtype, other_dtypes):
    normalized_shape = shape(normalized_shape)
    batch_ndim = x.ndim - len(normalized_shape)
    if batch_ndim < 0 or x.shape[batch_ndim:] != normalized_shape:
        raise ValueError(f"x: shape {x.shape}; expected one that ends in normalized_shape, {normalized_shape}")
    batch = x.shape[:batch_ndim]
    if math.prod(x.shape) * dtype.itemsize > sys.maxsize:
        raise ValueError(f"x: shape {x.shape}; expected one that a result of {dtype} can have")
    return Problem(
        batch=batch,
        normalized_shape=normalized_shape,
        rows=math.prod(batch),
        cols=math.prod(normalized_shape),
        eps=epsilon(eps),
        variance="diff_of_squares" if flag("use_diff_of_squares", use_diff_of_squares) else "centred",
        dtype=dtype,
        weight_dtype=other_dtypes[0] or dtype,
        compute_dtype=np.result_type(*map(wide_dtype, filter(None, (dtype, *other_dtypes)))),
    )


def _x(x, stream):
    """As `_operand`, and where the other operands must lie."""
    device = CUDA if arrays.is_cuda(x) else CPU
    _stream(stream, device)
    array, dtype = _operand("x", x, device)
    if device == CUDA:
        return array, dtype, array.device
    _can_be_given_back(x)
    return array, dtype, device


def _optional(name, value, device=CPU):
    return (None, None) if value is None else _operand(name, value, device)


def _operand(name, value, device=CPU):
    """The value as a NumPy array, or a view of a CUDA array, and the dtype of results that are like it."""
    array = _array(name, value) if device == CPU else _cuda_array(name, value, device)
    dtype = array.dtype
    if dtype.kind in "biu":
        return array, np.dtype(np.float64)
    if dtype.name != "bfloat16" and (dtype.type not in NUMPY_FLOATS or dtype.fields):
        raise TypeError(f"{name}: dtype {dtype}; supported are {', '.join(FLOATS)}, and integers and booleans as float64")
    return array, dtype if dtype.isnative else dtype.newbyteorder("=")


def _array(name, value):
    """The value as a NumPy array that shares its memory."""
    kind = arrays.kind(value)
    if kind == "jax" and arrays.is_traced(value):
        raise TypeError(f"{name}: a traced JAX array; expected a concrete one, outside jit, grad and vmap")
    device = _ask(name, arrays.device, value, kind)
    if device != "cpu":
        raise TypeError(f"{name}: {_type_name(value)} on {device}; expected an array in CPU memory")
    _no_gradients(name, value, kind)
    if kind == "torch" and str(value.dtype) == "torch.bfloat16":
        _bfloat16(name)
    array = _ask(name, arrays.to_numpy, value, kind)
    # the first time, this imports numpy.ma. Numba would do so as soon as it has compiled, which is when a fork happens that
    # has waited for that: its child would wait for the import for ever
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array; expected one without a mask, such as {name}.filled(0)")
    return np.asarray(array)


def _cuda_array(name, value, device):
    """The value as a view of its memory."""
    if not arrays.is_cuda(value):
        raise TypeError(f"{name}: {_type_name(value)} in CPU memory; expected an array on CUDA device {device}, as x is")
    from nbnorm.cuda.arrays import kind, view

    _no_gradients(name, value, arrays.kind(value))
    array = _ask(name, view, value, kind(value), "cannot be used")
    if device not in (CUDA, array.device):
        raise TypeError(
            f"{name}: {_type_name(value)} on CUDA device {array.device}; expected an array on CUDA device {device}, as x is"
        )
    if array.dtype.name == "bfloat16" and arrays.kind(value) != "torch":
        # of which results are made
        _bfloat16(name)
    if not array.dtype.isnative:
        raise TypeError(f"{name}: dtype {array.dtype} of a CUDA array; expected native byte order")
    if any(number % array.itemsize for number in (array.address, *array.strides)) and array.size:
        raise ValueError(f"{name}: a CUDA array whose elements are not at multiples of their size; expected aligned ones")
    return array


def cuda_is_supported(what):
    """Raise where there is nothing to run kernels with."""
    if not has_numba_cuda():
        raise TypeError(
            f"{what}; nbnorm needs the package numba-cuda for it: pip install 'nbnorm[cuda13]', or 'nbnorm[cuda12]' for a "
            "driver older than CUDA 13"
        )
    fault = cuda_fault()
    if fault is not None:
        raise TypeError(f"{what}; Numba finds no device that it can use: {fault}")


@functools.cache
def has_numba_cuda():
    return importlib.util.find_spec("numba_cuda") is not None


# asked for at each call on CUDA arrays
@functools.cache
def cuda_fault():
    """What keeps Numba from using a CUDA device; None where nothing does."""
    from numba import cuda

    return None if cuda.is_available() else " ".join(str(cuda.cuda_error() or "no device").split())


def _no_gradients(name, value, kind):
    if kind == "torch" and arrays.records_gradients(value):
        raise TypeError(f"{name}: a torch tensor that requires grad, which nbnorm does not record; pass {name}.detach()")


def _can_be_given_back(x):
    if arrays.kind(x) == "dlpack" and not hasattr(arrays.namespace(x), "from_dlpack"):
        raise TypeError(f"x: {_type_name(x)}, whose library has no from_dlpack to give back the result with")


def _ask(name, question, value, kind, fault="has no view as a NumPy array"):
    """What another library answers about its array; an error of its own becomes one that names the argument."""
    try:
        return question(value, kind)
    except (TypeError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: {_type_name(value)} {fault}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {_type_name(value)} {fault}: {error}") from error


def _bfloat16(name):
    """NumPy's dtype for it, which a package of its own has."""
    try:
        return arrays.bfloat16()
    except ModuleNotFoundError as error:
        raise TypeError(f"{name}: bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from error


def _shape(name, array, expected, meaning):
    if array is not None and array.shape != expected:
        raise ValueError(f"{name}: shape {array.shape}; expected {expected}, {meaning}")


def _out(name, out, expected_shape, dtype, device=CPU):
    if out is None:
        return None
    if arrays.kind(out) == "other":
        raise TypeError(f"{name}: {_type_name(out)}; expected an array")
    array = _array(name, out) if device == CPU else _cuda_array(name, out, device)
    _shape(name, array, expected_shape, "the shape of the result")
    if (array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")) != dtype:
        raise ValueError(f"{name}: dtype {array.dtype}; expected {dtype}, the dtype of the result")
    if not array.flags.writeable:
        raise ValueError(f"{name}: a read-only array; expected a writable one")
    if not _is_apart(array):
        raise ValueError(f"{name}: strides {array.strides}; expected an array whose elements each have memory of their own")
    return array


def _is_apart(array):
    """Whether strides alone show that no two elements share memory: each steps over all that the smaller ones span."""
    span = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1 and stride < span and array.size > 0:
            return False
        span += stride * (size - 1)
    return True


def _outs(out, problem, mask, device):
    if out is None:
        return None, None, None
    if not isinstance(out, tuple | list):
        raise TypeError(f"out: {_type_name(out)}; expected a tuple of arrays or None for dx, dweight and dbias")
    if len(out) != 3:
        raise ValueError(f"out: {len(out)} entries; expected three, arrays or None for dx, dweight and dbias")
    dtypes = (problem.dtype, problem.weight_dtype, problem.weight_dtype)
    shapes = (problem.shape, problem.normalized_shape, problem.normalized_shape)
    for i, wanted in enumerate(mask):
        if out[i] is not None and not wanted:
            raise ValueError(f"out[{i}]: {_type_name(out[i])}; expected None, since output_mask[{i}] is False")
    result = tuple(_out(f"out[{i}]", out[i], shapes[i], dtypes[i], device) for i in range(3))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if result[i] is not None and result[j] is not None and _shares_memory(result[i], result[j]):
            raise ValueError(f"out[{j}]: shares memory with out[{i}]; expected arrays that do not overlap")
    return result


def _shares_memory(a, b):
    try:
        return np.shares_memory(a, b, max_work=OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _mask(output_mask):
    is_sequence = isinstance(output_mask, Sequence) or getattr(output_mask, "ndim", 0) > 0
    if not is_sequence or isinstance(output_mask, str):
        raise TypeError(f"output_mask: {_shown(output_mask)}; expected three bools, for dx, dweight and dbias")
    if len(output_mask) != 3:
        raise ValueError(f"output_mask: {_shown(output_mask)}; expected three bools, for dx, dweight and dbias")
    return tuple(flag(f"output_mask[{i}]", wanted) for i, wanted in enumerate(output_mask))


def _stream(stream, device):
    if stream is None:
        return
    if device == CPU:
        raise ValueError(f"stream: {_shown(stream)}; expected None, since CPU arrays have no streams")
    from nbnorm.cuda.arrays import handle_of

    if handle_of(stream) is None:
        raise TypeError(f"stream: {_shown(stream)} of type {_type_name(stream)}; expected a stream, or its address")


def _shown(value):
    try:
        return repr(value)
    except ValueError:
        # as Python says of an int of thousands of digits
        return "a number too long to show"


def _type_name(value):
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
