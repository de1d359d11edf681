"""What is wrong for each argument of a call that is right otherwise."""

import math
from decimal import Decimal

import numpy as np


def another_shape(array):
    return array[..., None]


def unsupported(array):
    """What is no array of a supported dtype, instead of this one."""
    return [
        array.astype(complex),
        array.astype(object),
        array.astype(np.longdouble),
        np.ma.masked_array(array, array > 0),
        np.zeros(array.shape, [("a", "f4")]),
        np.zeros(array.shape, "M8[s]"),
        "text",
        object(),
        {},
        Unreadable(),
    ]


class Unreadable:
    """As some library's tensor, to which NumPy does not know the way."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise IndexError("tuple index out of range")

    def __array__(self, dtype=None, copy=None):
        raise IndexError("tuple index out of range")


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def wrong_outs(out):
    """What cannot be written to instead of this."""
    return [
        another_shape(out),
        out.astype(np.float32 if out.dtype == np.float64 else np.float64),
        out.astype(np.int32),
        np.ma.masked_array(out),
        read_only(out),
        np.lib.stride_tricks.as_strided(out, out.shape, (0,) * out.ndim),
        out.tolist(),
        "text",
        3.0,
    ]


NUMBERS = [-1e-9, -1, math.nan, math.inf, np.float32("nan"), 10**5000, "1", None, 1j, True, [1e-5], np.ones(1)]
NUMBERS += [np.array(-1.0), np.array("1"), np.array(True), np.array(1j), np.timedelta64(1, "s"), Decimal("NaN"), Decimal(-1)]
FLAGS = [1, None, "yes", np.array(True), [], 10**5000]
SHAPES = [
    (),
    [],
    -1,
    4.0,
    "4",
    b"4",
    None,
    True,
    {4},
    np.array(4.0),
    [[4]],
    2**70,
    (2**32, 2**32),
    10**5000,
    [1] * 65,
    (7, 7, 7),
]
WRONG_MASKS = [
    True,
    (True, True),
    (1, 0, 1),
    "yes",
    None,
    np.array(True),
    [True, [False], True],
    b"\1\1\1",
    {},
    10**5000,
    (True,) * 6,
]


def wrong_values(arguments):
    """Pairs of an argument of a right call, and a value that is wrong for it."""
    values = {
        "eps": NUMBERS,
        "use_diff_of_squares": FLAGS,
        "stream": [0, object()],
        "normalized_shape": [*SHAPES, (*arguments["x"].shape, 1), (*arguments["normalized_shape"][:-1], 7)],
    }
    for name in ("x", "dy", "weight", "bias", "mean", "rstd"):
        if name in arguments:
            values[name] = [*unsupported(arguments[name]), another_shape(arguments[name])]
    if "rstd" in arguments:
        values["mean"].append(None)
        values["rstd"].append(None)
    if "dy" in arguments:
        values["dy"].append(None)
        values["output_mask"] = WRONG_MASKS
        dx, dweight, dbias = outs = arguments["out"]
        values["out"] = [dx, outs[:2], outs * 2, "text", 3.0, {}]
        for i, out in enumerate(outs):
            values["out"] += [(*outs[:i], wrong, *outs[i + 1 :]) for wrong in wrong_outs(out)]
        values["out"] += [(dx, dweight, dweight), (dx, dx.reshape(-1)[: dbias.size].reshape(dbias.shape), dbias)]
    else:
        values["return_stats"] = FLAGS
        values["out"] = wrong_outs(arguments["out"])
    return [(name, value) for name, wrong in values.items() for value in wrong]
