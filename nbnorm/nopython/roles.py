"""What the operands of a call in compiled code are, and which types they may have: every TypingError.

Types decide what is compiled, so that what depends on a value, shapes for one, is for `served` to check.
"""

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.np.numpy_support import as_dtype

# x; what has its shape, and what has it or is None; its trailing dimensions; its shape with 1 in their place; options.
# ROW and STATISTICS may be None too
X, LIKE_X, BESIDE, ROW, STATISTICS, SHAPE, EPS, FLAG = "x", "like x", "beside", "row", "statistics", "shape", "eps", "flag"
# RMS norm has a default of eps that depends on the dtype
USUAL_EPS = "eps, or None"
ARRAYS = X, LIKE_X, BESIDE, ROW, STATISTICS
OPTIONAL = BESIDE, ROW, STATISTICS, USUAL_EPS
FLOATS = types.float32, types.float64


def is_absent(kind):
    """Whether the operand of this type is None."""
    return kind is None or isinstance(kind, types.NoneType) or (isinstance(kind, types.Omitted) and kind.value is None)


def dimensions(kind):
    """Of a row, by the type of normalized_shape."""
    return len(kind) if isinstance(kind, types.BaseTuple) else 1


def options(call):
    """Of the options that are numbers, the roles."""
    return {"eps": USUAL_EPS if call.is_rms else EPS, "use_diff_of_squares": FLAG}


def usual_eps(x):
    """RMS norm's, for x of this type."""
    return float(np.finfo(as_dtype(x.dtype)).eps)


def check(roles, call):
    """Raise where an operand of the call, whose `roles` are by name, is of a type that compiled code can't take."""
    kinds = {name: getattr(call, "x" if role == X else name) for name, role in roles.items()}
    for name, role in roles.items():
        if role not in OPTIONAL or not is_absent(kinds[name]):
            _check_kind(name, role, kinds[name])
    ((x, ndim),) = ((name, kinds[name].ndim) for name, role in roles.items() if role == X)
    row_ndim = dimensions(call.normalized_shape)
    if ndim < row_ndim:
        raise TypingError(f"{x}: {ndim} dimensions; expected at least the {row_ndim} of normalized_shape")
    for name, role in roles.items():
        if role in ARRAYS and not is_absent(kinds[name]):
            _check_ndim(name, kinds[name], row_ndim if role == ROW else ndim)


def _check_kind(name, role, kind):
    if role == SHAPE:
        _check_shape(name, kind)
    elif role in ARRAYS:
        _check_array(name, kind, "np.ascontiguousarray({})")
    else:
        expected = (types.Boolean, bool) if role == FLAG else (types.Integer, types.Float, int, float)
        if not isinstance(kind.value if isinstance(kind, types.Omitted) else kind, expected):
            raise TypingError(f"{name}: {kind}; expected {'a bool' if role == FLAG else 'a real number'}")


def check_both(mean, rstd):
    if is_absent(mean) != is_absent(rstd):
        absent, given = ("mean", "rstd") if is_absent(mean) else ("rstd", "mean")
        raise TypingError(f"{absent}: None, but {given} is given; expected both, or neither to have them recomputed")


def check_out(name, kind, ndim, dtype, is_wanted=True):
    """Raise where a result can't be written to what is given for it."""
    if is_absent(kind):
        return
    if not is_wanted:
        raise TypingError(f"{name}: {kind}; expected None, since output_mask has False there")
    _check_array(name, kind, "a contiguous array")
    if not kind.mutable:
        raise TypingError(f"{name}: a read-only array; expected a writable one")
    if kind.dtype != dtype:
        raise TypingError(f"{name}: dtype {kind.dtype}; expected {dtype}, the dtype of the result")
    _check_ndim(name, kind, ndim)


def check_stream(kind):
    if not is_absent(kind):
        raise TypingError(f"stream: {kind}; expected None, since the arrays of compiled code have no streams")


def known(name, kind):
    """The value of an option that decides what is returned."""
    value = kind.value if isinstance(kind, types.Omitted) else getattr(kind, "literal_value", kind)
    if not isinstance(value, bool):
        # which takes tuples of constants out of the loop, and forgets their values
        way = "; in a loop of prange, call a function that has the mask" if "mask" in name else ""
        raise TypingError(f"{name}: {kind}; expected True or False, written in the call: it decides what is returned{way}")
    return value


def is_wanted(total_out):
    """Whether the sum is, by the type of what is given for it; a variable does not say so."""
    value = total_out.value if isinstance(total_out, types.Omitted) else getattr(total_out, "literal_value", total_out)
    if value is True or isinstance(value, types.Boolean):
        raise TypingError(f"total_out: {total_out}; expected an array, None, or False, written in the call")
    return value is not False


def each(name, kind, gradients):
    """The entries of a tuple with one for each of the gradients."""
    number, word, names = gradients
    if is_absent(kind):
        return (None,) * number
    entries = kind.value if isinstance(kind, types.Omitted) else getattr(kind, "types", kind)
    if not isinstance(entries, tuple) or len(entries) != number:
        raise TypingError(f"{name}: {kind}; expected a tuple of {word}, for {names}")
    return entries


def _check_array(name, kind, contiguous):
    if isinstance(kind, types.Optional):
        raise TypingError(
            f"{name}: None or an array, which is known only when the call is made; expected one of them: "
            f"write a call for each, in the branches of `if {name} is None`"
        )
    if not isinstance(kind, types.Array):
        raise TypingError(f"{name}: {kind}; expected an array, in compiled code")
    if kind.dtype not in FLOATS:
        way = f"pass {name}.astype(np.float64)" if isinstance(kind.dtype, types.Integer | types.Boolean) else ""
        way = way or "call nbnorm outside of compiled code"
        raise TypingError(f"{name}: dtype {kind.dtype}; in compiled code, supported are float32 and float64: {way}")
    if kind.layout != "C":
        raise TypingError(
            f"{name}: an array that may have any strides, by its type {kind}; expected {contiguous.format(name)}"
        )


def _check_ndim(name, kind, ndim):
    if kind.ndim != ndim:
        raise TypingError(f"{name}: {kind.ndim} dimensions; expected {ndim}")


def _check_shape(name, kind):
    sizes = getattr(kind, "types", (kind,))
    if not sizes or not all(isinstance(size, types.Integer) for size in sizes):
        raise TypingError(f"{name}: {kind}; expected an int or a tuple of ints, in compiled code")
