"""What the operands of a call in compiled code are, and which types they may have: every TypingError.

Types decide what is compiled, so that what depends on a value, shapes for one, is for `served` to check.
"""

from numba import types
from numba.core.errors import TypingError

# x; what has its shape; its trailing dimensions; its shape with 1 in their place; options; what is made for the call
X, LIKE_X, ROW, STATISTICS, SHAPE, EPS, FLAG, FRESH = "x", "like x", "row", "statistics", "shape", "eps", "flag", "fresh"
OPTIONS = {"eps": EPS, "use_diff_of_squares": FLAG}
FLOATS = types.float32, types.float64


def is_absent(kind):
    """Whether the operand of this type is None."""
    return kind is None or isinstance(kind, types.NoneType) or (isinstance(kind, types.Omitted) and kind.value is None)


def dimensions(kind):
    """Of a row, by the type of normalized_shape."""
    return len(kind) if isinstance(kind, types.BaseTuple) else 1


def check(roles, kinds):
    """Raise where an operand, of those that `roles` has by name, is of a type that compiled code can't take."""
    for (name, role), kind in zip(roles.items(), kinds, strict=True):
        if role == SHAPE:
            _check_shape(name, kind)
        elif role in (EPS, FLAG):
            expected = (types.Boolean, bool) if role == FLAG else (types.Integer, types.Float, int, float)
            if not isinstance(kind.value if isinstance(kind, types.Omitted) else kind, expected):
                raise TypingError(f"{name}: {kind}; expected {'a bool' if role == FLAG else 'a real number'}")
        elif role not in (ROW, STATISTICS) or not is_absent(kind):
            _check_array(name, kind, "np.ascontiguousarray({})")
    by_role = dict(zip(roles.values(), kinds, strict=True))
    ndim, row_ndim = by_role[X].ndim, dimensions(by_role[SHAPE])
    if ndim < row_ndim:
        raise TypingError(f"x: {ndim} dimensions; expected at least the {row_ndim} of normalized_shape")
    for (name, role), kind in zip(roles.items(), kinds, strict=True):
        if role in (LIKE_X, STATISTICS, ROW) and not is_absent(kind):
            _check_ndim(name, kind, row_ndim if role == ROW else ndim)


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


def three(name, kind):
    """The entries of a tuple of three."""
    if is_absent(kind):
        return None, None, None
    entries = kind.value if isinstance(kind, types.Omitted) else getattr(kind, "types", kind)
    if not isinstance(entries, tuple) or len(entries) != 3:
        raise TypingError(f"{name}: {kind}; expected a tuple of three, for dx, dweight and dbias")
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
