"""JAX's CPU arrays as NumPy arrays of the same memory, so that a call on them finds its plan; and results as JAX's."""

import sys

from numpy import asarray, ndarray

from nbnorm.calls import arrays

# a smaller result JAX copies, in less time than it takes memory over
COPIED_BYTES = 1 << 19


def lent(call, names):
    """Views of a call's arrays of these names; None where x is no array of JAX, or another is not to be lent."""
    x, total_out = call.x, getattr(call, "total_out", None)
    kind = type(x)
    # tracers are of other types, and none of JAX's is written to
    if kind.__name__ != "ArrayImpl" or call.out is not None or not (total_out is None or total_out is False):
        return None
    views: list = []
    try:
        for name in names:
            array = getattr(call, name)
            if type(array) is kind:
                # in half the time of the property `device`
                (device,) = array.devices()
                if device.platform != "cpu":
                    return None
                array = asarray(array)
            elif array is not None and array is not False and type(array) is not ndarray:
                return None
            views.append(array)
    except Exception:
        # of a deleted array, or one on several devices; the long way says what it is
        return None
    return views


def memory_for(x):
    """An array like this one, whose memory JAX takes over as it is; None where it may copy."""
    if x.nbytes < COPIED_BYTES or x.dtype.kind in "biu":
        return None
    return arrays.empty(x.shape, x.dtype, "jax")


def given_back(results, x):
    """As arrays of JAX, on the device of x; None for what is absent."""
    jax = sys.modules["jax"]
    sharding = x.sharding if x.committed else None
    given: list = []
    for result in results:
        if result is None:
            given.append(None)
        elif sharding is None and result.nbytes < COPIED_BYTES:
            # which copies, in half the time of the other
            given.append(jax.numpy.asarray(result))
        else:
            given.append(jax.device_put(result, sharding))
    return given
