"""How a message shows what came: briefly, and of an array what it is, not what is in it."""

import re
import reprlib
from collections.abc import Sequence


class _Brief(reprlib.Repr):
    """Python's own words, shortened, arrays within lists by their shape, and nothing by its address."""

    def __init__(self):
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxarray = 8
        self.maxlevel = 3
        self.maxstring = self.maxlong = self.maxother = 80

    def repr1(self, x, level):
        # by their types' names, reprlib would take another library's for Python's own
        return super().repr1(x, level) if type(x).__module__ == "builtins" else self.repr_instance(x, level)

    def repr_int(self, x, level):
        # Python refuses to show thousands of digits, for which reprlib has an address since Python 3.14
        repr(x)
        return super().repr_int(x, level)

    def repr_instance(self, x, level):
        if is_array(x):
            return f"{type_name(x)} of shape {tuple(x.shape)} and dtype {x.dtype!s:.80}"
        if type(x).__repr__ is object.__repr__:
            return f"an object of type {type_name(x)}"
        try:
            text = repr(x)
        except Exception:
            return f"an object of type {type_name(x)}"
        text = " ".join(re.sub(r" at 0x[0-9A-Fa-f]+", "", text).split())
        return text if len(text) <= self.maxother else f"{text[: self.maxother - 3]}..."


_brief = _Brief()


def shown(value):
    """The value, or what kind of array it is."""
    try:
        return _brief.repr(value)
    except ValueError:
        # as Python says of an int of thousands of digits
        return "a number too long to show"


def described(value):
    """The same, with its type."""
    return shown(value) if is_array(value) else f"{shown(value)} of type {type_name(value)}"


def names(keys):
    """The keys of a mapping, not all of them where they are many."""
    keys = sorted(map(str, keys))
    return f"{keys}" if len(keys) <= 8 else f"{keys[:8]} and {len(keys) - 8} more"


def is_array(value):
    """Whether it is like an array, of any library, of one or more dimensions."""
    try:
        return (
            not isinstance(value, type)
            and isinstance(value.shape, tuple)
            and len(value.shape) > 0
            and hasattr(value, "dtype")
        )
    except Exception:
        return False


def type_name(value):
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def is_sequence(value):
    """Whether it is one, or an array of one or more dimensions."""
    ndim = getattr(value, "ndim", 0)
    return isinstance(value, Sequence) or (isinstance(ndim, int) and ndim > 0)
