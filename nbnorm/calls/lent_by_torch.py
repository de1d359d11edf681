"""torch's CPU tensors as NumPy arrays of the same memory, so that a call on them finds its plan.

All of a call's are lent, or none. A plan takes arrays in C order alone; any other call goes the long way, on its tensors.
"""

import functools
import sys
from typing import Any

from numpy import ndarray

from nbnorm.calls import arrays


def lent(*given: Any) -> list | None:
    """A call's arrays, x first, as NumPy arrays, None for what is absent; None for all where x is not torch's."""
    torch: Any = sys.modules.get("torch")
    # while another thread imports it, it has no names yet
    if not hasattr(torch, "nn") or not hasattr(torch, "compiler"):
        return None
    # from now on: to look up its names at each call would take a twentieth of it
    globals()["lent"] = lend = _lender(torch)
    return lend(*given)


def _lender(torch):
    tensor, parameter, bfloat16, int16 = torch.Tensor, torch.nn.Parameter, torch.bfloat16, torch.int16
    is_grad_enabled, forward_ad = torch.is_grad_enabled, torch.autograd.forward_ad
    is_transformed, is_traced = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
    modes = torch._C._len_torch_dispatch_stack

    def lent(*given):
        x = given[0]
        if (type(x) is not tensor and type(x) is not parameter) or not x.is_cpu:
            return None
        # whatever records, batches or imitates
        if is_transformed() or modes() or is_traced() is not None or forward_ad._current_level >= 0:
            return None
        if x.dtype is bfloat16:
            return with_care(given)
        try:
            views = []
            for array in given:
                if type(array) is tensor:
                    view = array.numpy()
                    # a program may have freed the storage
                    if array.storage_offset() or array.untyped_storage().nbytes() < view.nbytes:
                        return with_care(given)
                    views.append(view)
                elif array is None or type(array) is ndarray:
                    views.append(array)
                else:
                    return with_care(given)
            return views
        except Exception:
            return with_care(given)

    def with_care(given):
        """The same of parameters, of slices, of bfloat16, and of what requires grad where none is recorded."""
        views = []
        try:
            for array in given:
                if array is not None and type(array) is not ndarray:
                    if type(array) is not tensor and type(array) is not parameter:
                        return None
                    array = view_of(array)
                    if array is None:
                        return None
                views.append(array)
        except Exception:
            # of what has no memory of its own; the long way says what it is
            return None
        return views

    def view_of(array):
        if array.requires_grad:
            if is_grad_enabled():
                return None
            array = array.detach()
        is_bfloat16 = array.dtype is bfloat16
        view = (array.view(int16) if is_bfloat16 else array).numpy()
        if array.storage_offset() * view.itemsize + view.nbytes > array.untyped_storage().nbytes():
            return None
        return view.view(numpys_bfloat16()) if is_bfloat16 else view

    return lent


@functools.cache
def numpys_bfloat16():
    return arrays.bfloat16()


def of_backward(inputs, out):
    """The same of a backward, with its `out`, None or a tuple, behind the inputs."""
    if out is None:
        views = lent(*inputs)
        return None if views is None else (*views, None)
    if type(out) is not tuple:
        return None
    views = lent(*inputs, *out)
    if views is None or not may_be_written(*out):
        return None
    return *views[: len(inputs)], tuple(views[len(inputs) :])


def may_be_written(*outs):
    """Whether torch lets those of the given arrays be written to that are tensors."""
    return all(out is None or type(out) is ndarray or arrays.may_be_written(out) for out in outs)


def given_back(results, out):
    """A call's results as tensors, or as what they were written to."""
    if type(results) is ndarray:
        if out is None:
            return arrays.give_back(results, None, "torch")
        arrays.mark_written(out)
        return out
    outs = (None,) * 3 if out is None else out if type(out) is tuple else (out, None, None)
    return [None if result is None else given_back(result, to) for result, to in zip(results, outs, strict=False)]
