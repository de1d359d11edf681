"""JAX's CPU arrays as NumPy arrays of the same memory, so that a call on them finds its plan; and results as JAX's."""

import sys

import numpy as np
from numpy import ndarray

from nbnorm.calls import arrays

# a smaller result JAX copies, in less time than it takes memory over
COPIED_BYTES = 1 << 16


def lent(call, names):
    """The call with its arrays of these names lent; None where x is no array of JAX, or another is not to be lent."""
    kind = type(call.x)
    # tracers are of other types
    if kind.__name__ != "ArrayImpl" or call.out is not None:
        return None
    total_out = getattr(call, "total_out", None)
    if total_out is not None and total_out is not False:
        return None
    views = {}
    try:
        for name in names:
            array = getattr(call, name)
            if type(array) is kind:
                if getattr(array.device, "platform", None) != "cpu":
                    return None
                views[name] = np.asarray(array)
            elif array is not None and array is not False and type(array) is not ndarray:
                return None
    except Exception:
        # of a deleted array; the long way says what it is
        return None
    return call._replace(**views)


def memory_for(x):
    """An array like this one, whose memory JAX takes over as it is; None where it may copy."""
    if x.nbytes < COPIED_BYTES or x.dtype.kind in "biu":
        return None
    return arrays.empty(x.shape, x.dtype, "jax")


def given_back(results, x):
    """As arrays of JAX, on the device of x; None for what is absent."""
    jax = sys.modules["jax"]
    sharding, asarray = x.sharding if x.committed else None, jax.numpy.asarray
    return [
        None
        if result is None
        # which copies, in half the time of the other
        else asarray(result)
        if sharding is None and result.nbytes < COPIED_BYTES
        else jax.device_put(result, sharding)
        for result in results
    ]
