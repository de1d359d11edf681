"""Checks of the arrays of a call: each becomes a NumPy array, or a view of a CUDA array's memory, or raises.

The errors are as in `checks`.
"""

import numpy as np

from nbnorm.calls import arrays, stand_ins
from nbnorm.calls.shown import described, type_name

# where the operands of a call must lie: in CPU memory, on any CUDA device, or on the one with this number
CPU = "CPU"
CUDA = "CUDA"
FLOATS = ("float16", "bfloat16", "float32", "float64")
# np.dtype.name takes microseconds
NUMPY_FLOATS = (np.float16, np.float32, np.float64)
# by which libraries give their arrays' values to NumPy, where they do not do so unasked
WAYS = ("numpy", "to_numpy", "toarray", "todense", "collect")


def optional(name, value, device=CPU):
    return (None, None) if value is None else operand(name, value, device)


def operand(name, value, device=CPU, is_copied=False):
    """The value as a NumPy array, or a view of a CUDA array, and the dtype of results that are like it.

    Where values are only copied, no gradient is lost.
    """
    array = _array(name, value, is_copied) if device == CPU else _cuda_array(name, value, device, is_copied)
    dtype = array.dtype
    if dtype.kind in "biu":
        return array, np.dtype(np.float64)
    if dtype.name != "bfloat16" and (dtype.type not in NUMPY_FLOATS or dtype.fields):
        supported = f"supported are {', '.join(FLOATS)}, and integers and booleans as float64"
        raise TypeError(f"{name}: dtype {dtype!s:.200}; {supported}{_way_from(dtype, name, value)}")
    return array, dtype if dtype.isnative else dtype.newbyteorder("=")


def out(name, array, expected_shape, dtype, device=CPU, is_copied=False):
    """What a result is written to, as `operand` has it, or None."""
    if array is None:
        return None
    if arrays.kind(array) == "other":
        raise TypeError(f"{name}: {type_name(array)}; expected an array")
    given = array
    array = _array(name, given, is_copied) if device == CPU else _cuda_array(name, given, device, is_copied)
    shape(name, array, expected_shape, "the shape of the result")
    if (array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")) != dtype:
        raise ValueError(f"{name}: dtype {array.dtype}; expected {dtype}, the dtype of the result")
    if not array.flags.writeable:
        raise ValueError(f"{name}: a read-only array; expected a writable one")
    if not _is_apart(array):
        raise ValueError(f"{name}: strides {array.strides}; expected an array whose elements each have memory of their own")
    if arrays.kind(given) == "torch" and not arrays.may_be_written(given):
        raise TypeError(
            f"{name}: a torch tensor of inference mode, which torch lets be written there alone; expected another"
        )
    if arrays.kind(given) == "torch" and given._is_zerotensor():
        raise TypeError(f"{name}: a torch ZeroTensor, which has no memory; expected {name}.clone()")
    return array


def shape(name, array, expected, meaning):
    if array is not None and array.shape != expected:
        raise ValueError(f"{name}: shape {array.shape}; expected {expected}, {meaning}")


def bfloat16(name):
    """NumPy's dtype for it, which a package of its own has."""
    try:
        return arrays.bfloat16()
    except ModuleNotFoundError as error:
        raise TypeError(f"{name}: bfloat16 needs the package ml_dtypes: pip install ml_dtypes") from error


def no_stand_in(name, value, kind):
    fault = stand_ins.fault(name, value, kind)
    if fault is not None:
        raise TypeError(f"{name}: {fault}")


def no_gradients(name, value, kind):
    """Of a torch tensor, none would be lost."""
    if kind != "torch" or not arrays.records_gradients(value):
        return
    way = "train with nbnorm.torch, which docs/howto/torch.md shows"
    if name.startswith("out"):
        way = "call it under torch.no_grad()"
    raise TypeError(
        f"{name}: a torch tensor that requires grad, which nbnorm does not record; pass {name}.detach(), or {way}"
    )


def no_tensor(name, value):
    """Of what nbnorm.torch is given instead of one."""
    raise TypeError(f"{name}: {described(value)}; expected a torch.Tensor: nbnorm's own functions take other arrays")


def no_training(x, layer, parameters):
    """Of a torch tensor that comes to a layer while torch records, the layer's own parameters would get no gradient."""
    if all(parameter is None for parameter in parameters) or arrays.kind(x) != "torch" or not arrays.is_recording():
        return
    raise TypeError(
        f"x: a torch tensor while torch records gradients, of which the parameters of nbnorm.{layer} would get none; train "
        f"with nbnorm.torch.{layer}, as docs/howto/torch.md shows, or call the layer under torch.no_grad()"
    )


def no_varying(name, array):
    """Of an array of JAX: gradients would have to be added up over devices, of which a foreign function knows nothing."""
    axes = [] if array is None else arrays.varying_axes(array)
    if axes:
        named = ", ".join(map(repr, axes))
        raise TypeError(f"{name}: an array that varies over {named} within shard_map; give shard_map check_vma=False")


def can_be_given_back(name, x):
    if arrays.kind(x) == "dlpack" and not hasattr(arrays.namespace(x), "from_dlpack"):
        raise TypeError(f"{name}: {type_name(x)}, whose library has no from_dlpack to give back the result with")


def _array(name, value, is_copied):
    """The value as a NumPy array that shares its memory."""
    kind = arrays.kind(value)
    no_stand_in(name, value, kind)
    if isinstance(value, list | tuple):
        first = value
        while isinstance(first, list | tuple) and first:
            first = first[0]
        no_stand_in(name, first, arrays.kind(first))
    device = _ask(name, arrays.device, value, kind)
    if device != "cpu":
        raise TypeError(f"{name}: {type_name(value)} on {device}; expected an array in CPU memory")
    if not is_copied:
        no_gradients(name, value, kind)
    if kind == "torch" and str(value.dtype) == "torch.bfloat16":
        bfloat16(name)
    array = _ask(name, arrays.to_numpy, value, kind)
    # the first time, this imports numpy.ma. Numba would do so as soon as it has compiled, which is when a fork happens that
    # has waited for that: its child would wait for the import for ever
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array; expected one without a mask{_way_from_a_mask(name, array)}")
    return np.asarray(array)


def _cuda_array(name, value, device, is_copied):
    """The value as a view of its memory."""
    if not arrays.is_cuda(value):
        raise TypeError(f"{name}: {type_name(value)} in CPU memory; expected an array on CUDA device {device}, as x is")
    from nbnorm.cuda.arrays import kind, view

    no_stand_in(name, value, arrays.kind(value))
    if not is_copied:
        no_gradients(name, value, arrays.kind(value))
    array = _ask(name, view, value, kind(value), "cannot be used")
    if device not in (CUDA, array.device):
        raise TypeError(
            f"{name}: {type_name(value)} on CUDA device {array.device}; expected an array on CUDA device {device}, as x is"
        )
    if array.dtype.name == "bfloat16" and arrays.kind(value) != "torch":
        # of which results are made
        bfloat16(name)
    if not array.dtype.isnative:
        raise TypeError(f"{name}: dtype {array.dtype} of a CUDA array; expected native byte order")
    if any(number % array.itemsize for number in (array.address, *array.strides)) and array.size:
        raise ValueError(f"{name}: a CUDA array whose elements are not at multiples of their size; expected aligned ones")
    return array


def _ask(name, question, value, kind, fault="has no view as a NumPy array"):
    """What another library answers about its array; an error of its own becomes one that names the argument."""
    if kind == "numpy":
        # nothing of another library: what is raised here is a signal's, and the caller's
        return question(value, kind)
    try:
        return question(value, kind)
    except MemoryError:
        raise
    except Exception as error:
        # another library's code may raise anything
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        text = f"{name}: {type_name(value)} {fault}: {said:.300}"
        # a list whose rows differ in length, or where an array lies
        if isinstance(error, ValueError) and (kind != "other" or isinstance(value, list | tuple)):
            raise ValueError(text) from error
        way = f"; {_way(name, value)}" if kind == "other" else ""
        raise TypeError(f"{text}{way}") from error


def _way(name, value):
    """What to hand over instead of an object that NumPy makes nothing of."""
    method = next((way for way in WAYS if callable(getattr(type(value), way, None))), None)
    if method is None:
        return "pass its values as a NumPy array"
    # without a dtype, pandas' own types become objects again
    dtype = "'float32'" if type(value).__module__.partition(".")[0] == "pandas" else ""
    return f"pass {name}.{method}({dtype})"


def _way_from(dtype, name, value):
    """The end of a message about a dtype that is not supported."""
    if dtype.kind == "V" and dtype.itemsize == 2 and not dtype.fields and not dtype.subdtype:
        array = name if isinstance(value, np.ndarray) else f"numpy.asarray({name})"
        return f"; two bytes that are a bfloat16 are read with {array}.view(ml_dtypes.bfloat16)"
    if dtype.kind != "O" or value is None or value is ... or isinstance(value, np.ndarray | list | tuple | type):
        return ""
    return f"; NumPy makes no numbers of a {type_name(value)}: {_way(name, value)}"


def _way_from_a_mask(name, array):
    if not np.ma.is_masked(array):
        return f": pass {name}.data, since nothing is masked"
    if name not in ("x", "dy"):
        return ""
    return ": no fill value has the statistics of the rest, and docs/howto/arrays.md shows layer norm of masked data"


def _is_apart(array):
    """Whether strides alone show that no two elements share memory: each steps over all that the smaller ones span."""
    span = array.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1 and stride < span and array.size > 0:
            return False
        span += stride * (size - 1)
    return True
