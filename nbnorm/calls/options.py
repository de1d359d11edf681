"""Checks of options of a call, or of a layer, each by itself; the errors are as in `checks`."""

import math
import operator
import re
import sys

import numpy as np

from nbnorm.calls import arrays, operands
from nbnorm.calls.operands import FLOATS
from nbnorm.calls.shown import described, is_array, is_sequence, shown

MAX_NDIM = 64
ORDER = "; the order of the arguments is x, normalized_shape, weight, bias, or dy, x, normalized_shape, weight"


def shape(normalized_shape, order=""):
    """normalized_shape as a tuple of ints; `order` is what to say of an array that came in its place."""
    is_text = isinstance(normalized_shape, str | bytes)
    sizes = normalized_shape if is_sequence(normalized_shape) and not is_text else (normalized_shape,)
    try:
        result = tuple(operator.index(size) for size in sizes)
    except TypeError:
        result = None
    except Exception:
        # an array on a device, or a stand-in for one, may raise more; what a signal's handler raises is the caller's
        if isinstance(normalized_shape, int | list | tuple):
            raise
        result = None
    if result is None or any(isinstance(size, bool) for size in sizes):
        operands.no_stand_in("normalized_shape", normalized_shape, arrays.kind(normalized_shape))
        hint = order if is_array(normalized_shape) else ""
        raise TypeError(f"normalized_shape: {shown(normalized_shape)}; expected an int or a sequence of ints{hint}")
    if not result or min(result) < 0:
        raise ValueError(f"normalized_shape: {shown(normalized_shape)}; expected at least one dimension, none negative")
    if math.prod(max(1, size) for size in result) > sys.maxsize or len(result) > MAX_NDIM:
        raise ValueError(f"normalized_shape: {shown(normalized_shape)}; expected one that an array can have")
    return result


def epsilon(eps):
    """As a float, of what float() takes but for texts and truth values: a number of any kind, or an array of one."""
    if type(eps) in (float, int):
        try:
            number, is_negative = float(eps), False
        except OverflowError:
            number, is_negative = math.inf, False
    else:
        kind = arrays.kind(eps)
        operands.no_stand_in("eps", eps, kind)
        if not _is_real(eps):
            raise TypeError(f"eps: {described(eps)}; expected a real number")
        operands.no_gradients("eps", eps, kind)
        try:
            number = float(eps.detach() if kind == "torch" else eps)
            # a fraction may be too small for a float
            is_negative = number == 0 and bool(eps < 0)
        except OverflowError:
            number, is_negative = math.inf, False
        except Exception as error:
            raise TypeError(f"eps: {described(eps)}; expected a real number: {error!s:.200}") from error
    if not 0 <= number < math.inf or is_negative:
        raise ValueError(f"eps: {shown(eps)}; expected a finite number that is not negative")
    return number


def _is_real(eps):
    """Whether it is, or holds, a number of a real type, as far as can be told before float() is asked."""
    dtype = getattr(eps, "dtype", None)
    if dtype is None:
        return not isinstance(eps, bool) and (hasattr(type(eps), "__float__") or hasattr(type(eps), "__index__"))
    if isinstance(eps, np.ndarray) and (eps.ndim > 0 or isinstance(eps, np.ma.MaskedArray)):
        return False
    return re.match(r"(torch\.)?(b?float|u?int|longdouble)", str(getattr(dtype, "name", dtype))) is not None


def flag(name, value):
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: {described(value)}; expected a bool")
    return bool(value)


def float_dtype(dtype, argument="dtype"):
    """A dtype, from NumPy's, torch's or JAX's name for it; float32 for None."""
    if dtype is None:
        return np.dtype(np.float32)
    name = str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        return operands.bfloat16(argument)
    try:
        result = np.dtype(name if name in FLOATS else dtype)
    except (TypeError, ValueError):
        result = None
    if result is None or result.name not in FLOATS:
        raise TypeError(f"{argument}: {shown(dtype)}; expected one of {', '.join(FLOATS)}")
    return result.newbyteorder("=")
