"""Array kinds: told apart without importing their libraries, viewed as NumPy arrays, and given back as what they were."""

import sys
from contextlib import nullcontext
from typing import Any

import numpy as np
from array_api_compat import is_cupy_array, is_dask_array, is_jax_array, is_torch_array

# XLA takes a NumPy array over without a copy from this alignment on
JAX_ALIGNMENT = 64


def kind(array):
    """The kind of an array: "numpy", "torch", "jax", "cuda", "dlpack", or "other" for what `numpy.asarray` may take."""
    if isinstance(array, np.ndarray):
        return "numpy"
    if isinstance(array, type):
        return "other"
    if is_torch_array(array):
        return "torch"
    try:
        if is_jax_array(array):
            return "jax"
        # an object that stands for any other has every attribute, but no dictionary there
        if getattr(array, "__cuda_ndarray__", False) is True or _has_cuda_interface(array):
            return "cuda"
        if hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            return "dlpack"
    except Exception:
        # as attributes of what is closed or deleted may raise; NumPy will say what is wrong
        return "other"
    return "other"


def is_cuda(array):
    """Whether the array lies in the memory of a CUDA device, and is of a library whose arrays are taken there."""
    if isinstance(array, (np.ndarray, type)):
        return False
    if is_torch_array(array):
        return array.device.type == "cuda"
    # CuPy and Numba make what `kind` asks for anew each time, in 1 to 2 us
    return is_cupy_array(array) or kind(array) == "cuda"


def is_dask(array):
    """Whether it is a Dask array, which has no values yet."""
    return not isinstance(array, np.ndarray) and is_dask_array(array)


def _has_cuda_interface(array):
    return isinstance(getattr(array, "__cuda_array_interface__", None), dict)


def device(array, array_kind):
    """The name of the device that the array lies on, "cpu" for CPU memory."""
    if array_kind == "torch":
        return "cpu" if array.device.type == "cpu" else str(array.device)
    if array_kind == "jax":
        devices = array.devices()
        return "cpu" if len(devices) == 1 and all(d.platform == "cpu" for d in devices) else f"the devices {devices}"
    if array_kind == "dlpack":
        device_type, device_id = array.__dlpack_device__()
        return "cpu" if device_type == 1 else f"DLPack device {int(device_type)}:{device_id}"
    return "a CUDA device" if array_kind == "cuda" else "cpu"


def records_gradients(tensor):
    """Whether torch would record gradients of what comes of a tensor: backwards where that is on, forwards anywhere."""
    torch = sys.modules["torch"]
    is_recorded = tensor.requires_grad and torch.is_grad_enabled()
    return is_recorded or torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def is_recording():
    """Whether torch records gradients at all, backwards."""
    return sys.modules["torch"].is_grad_enabled()


def may_be_written(tensor):
    """Whether torch lets a tensor be written to, which it does to one of inference mode there alone."""
    return not tensor.is_inference() or sys.modules["torch"].is_inference_mode_enabled()


def mark_written(array):
    """Tell the library of an array that its memory was written: torch's autograd refuses to use overwritten tensors."""
    if is_torch_array(array):
        sys.modules["torch"].autograd.graph.increment_version(array)


def varying_axes(array):
    """The axes of a mesh over which an array of JAX differs within shard_map, where JAX keeps account of them."""
    jax = sys.modules["jax"]
    kind: Any = jax.typeof(array) if hasattr(jax, "typeof") else None
    kind = getattr(kind, "manual_axis_type", getattr(kind, "vma", ()))
    return sorted(getattr(kind, "varying", kind))


def namespace(array):
    """The module whose `from_dlpack` makes arrays of this library."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]


def bfloat16():
    """NumPy has no bfloat16 of its own; ml_dtypes is imported by those alone who use it."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def to_numpy(array, array_kind):
    """The array as a numpy.ndarray, or a subclass, that shares its memory; lists and scalars become float64."""
    if array_kind == "torch":
        torch = sys.modules["torch"]
        if array.requires_grad:
            array = array.detach()
        if array._is_zerotensor():
            # torch's for a gradient of zeros, which has no memory
            array = array.clone()
        if array.dtype == torch.bfloat16:
            return array.view(torch.int16).numpy().view(bfloat16())
        return array.numpy()
    if array_kind == "dlpack":
        return np.from_dlpack(array)
    result = np.asanyarray(array)
    # a longdouble stays one, to be refused
    if isinstance(array, list | tuple | int | float) and result.dtype.kind in "biuf" and result.dtype.itemsize <= 8:
        converted = np.empty(result.shape, np.float64)
        convert(result, converted)
        return converted
    return result


def empty(shape, dtype, like_kind):
    """A new NumPy array that `give_back` can hand to the library of this kind without a copy; None where any can be."""
    if like_kind != "jax":
        return None
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + JAX_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % JAX_ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def convert(source, destination):
    """Copy with a cast: a value beyond the range of a narrower dtype becomes Inf, without a warning."""
    # which is built on this file
    from nbnorm.cpu import mode

    with np.errstate(all="ignore"), nullcontext() if source.dtype.type is destination.dtype.type else mode.standard():
        np.copyto(destination, source, casting="unsafe")


def read(array):
    """The values of a CUDA array, in CPU memory."""
    if is_torch_array(array):
        return to_numpy(array.cpu(), "torch")
    if is_cupy_array(array):
        return array.get()
    from numba import cuda

    array = array if hasattr(array, "copy_to_host") else cuda.as_cuda_array(array)
    return array.view(np.uint8).copy_to_host().view(array.dtype) if _is_bfloat16(array) else array.copy_to_host()


def on_device(array, device, number=None):
    """A NumPy array as it is for "cpu", else in a Numba device array on this CUDA device, for None the current one."""
    if array is None or device == "cpu":
        return array
    from numba import cuda

    with nullcontext() if number is None else cuda.gpus[number]:
        return cuda.to_device(array.view(np.uint8)).view(array.dtype) if _is_bfloat16(array) else cuda.to_device(array)


def _is_bfloat16(array):
    """For which Numba has no copies between device and host; it has them for bytes."""
    return array.dtype.name == "bfloat16"


def write(source, destination):
    """Copy a NumPy array, with a cast, into an array of any library and device."""
    if not is_cuda(destination):
        convert(source, destination)
    elif is_torch_array(destination):
        destination.detach().copy_(give_back(source, None, "torch"))
    else:
        cast = np.empty(source.shape, destination.dtype)
        convert(source, cast)
        if is_cupy_array(destination):
            destination.set(cast)
        elif _is_bfloat16(destination):
            destination.view(np.uint8).copy_to_device(cast.view(np.uint8))
        else:
            destination.copy_to_device(cast)


def give_back(result, like, like_kind):
    """A NumPy array as an array of the library that `like` came from."""
    if result is None:
        return None
    if like_kind == "torch":
        torch = sys.modules["torch"]
        # bfloat16, whose name NumPy takes a microsecond to find
        if result.dtype.kind == "V":
            return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(result)
    if like_kind == "jax":
        # a committed result could not be combined with arrays on other devices, as one of an uncommitted x can be
        return sys.modules["jax"].device_put(result, like.sharding if like.committed else None)
    if like_kind == "dlpack":
        return namespace(like).from_dlpack(result)
    return result
