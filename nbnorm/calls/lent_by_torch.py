"""The memory of torch's CPU tensors: by its address, or as NumPy arrays, so that a call on them finds its plan.

All of a call's are lent, or none. What a tensor may lose from one call to the next, such as its memory, is asked each time.
"""

import sys
from typing import Any

from numpy import ndarray

from nbnorm.calls import arrays


def is_plain(x):
    """Whether x is a tensor of the CPU's, and nothing records, batches or imitates what is done with it."""
    torch: Any = sys.modules.get("torch")
    # while another thread imports it, it has no names yet
    if not hasattr(torch, "nn") or not hasattr(torch, "compiler"):
        return False
    # from now on: to look up its names at each call would take a tenth of it
    globals()["is_plain"], globals()["address"] = _readers(torch)
    return is_plain(x)


def address(array):
    """What `is_plain` puts in its place, once there is a torch."""
    raise TypeError


def _readers(torch):
    tensor, parameter, is_grad_enabled = torch.Tensor, torch.nn.Parameter, torch.is_grad_enabled
    is_transformed, is_traced = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
    modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    forward_ad = torch.autograd.forward_ad

    def is_plain(x):
        # asked at once, or on an AMD EPYC the host takes 18 us for a call on a GPU's tensors, not 15
        if (type(x) is not tensor and type(x) is not parameter) or not x.is_cpu:
            return False
        is_seen = is_transformed() or modes() or function_modes() or is_traced() is not None
        return not is_seen and forward_ad._current_level < 0

    def address(array):
        """Where a tensor's elements begin, which follow each other in memory; an error where there is no such place."""
        if type(array) is not tensor and type(array) is not parameter:
            raise TypeError
        place, storage = array.data_ptr(), array.untyped_storage()
        # a program may have freed the storage
        if not place or place + array.nbytes > storage.data_ptr() + storage.nbytes() or not array.is_cpu:
            raise TypeError
        if not array.is_contiguous() or array.is_neg() or (array.requires_grad and is_grad_enabled()):
            raise TypeError
        return place

    return is_plain, address


def lent(call, names):
    """Views of a call's arrays of these names; None where x is none of torch's, or one is not to be lent."""
    if not is_plain(call.x):
        return None
    views: list = []
    try:
        for name in names:
            array = getattr(call, name)
            # a backward's `out`
            views.append(tuple(map(_written_view, array)) if type(array) is tuple else WAYS.get(name, _view)(array))
    except Exception:
        # of what has no memory of its own; the long way says what it is
        return None
    return views


def _view(array):
    if array is None or array is False or type(array) is ndarray:
        return array
    address(array)
    return arrays.to_numpy(array, "torch")


def _written_view(array):
    view = _view(array)
    if view is not array and not arrays.may_be_written(array):
        raise TypeError
    return view


WAYS = {"out": _written_view, "total_out": _written_view}


def given_back(results, outs):
    """As tensors, or as what they were written to; None for what is absent."""
    return [_given_back(result, out) for result, out in zip(results, outs, strict=True)]


def _given_back(result, out):
    if result is None or out is None or out is False:
        return arrays.give_back(result, None, "torch")
    arrays.mark_written(out)
    return out
