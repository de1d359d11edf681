"""Digests of results, which are those of any processor: `python tests/bits.py` writes them into bits.json, for test_bits.py.

What goes into a result is exact on every processor: integers, powers of two, roundings. All NaN are alike to a digest, since
their sign is the processor's.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

import nbnorm
from nbnorm.calls.problem import Description

STORED = Path(__file__).with_suffix(".json")
LONG = 70_001


class Case(NamedTuple):
    """A norm of rows of a dtype and a length, forward and backward: two kernels, or as many others as there are lengths."""

    function: str
    dtype: str
    cols: int
    use_diff_of_squares: bool = False
    is_first: bool = False

    def __str__(self):
        ends = ["squares"] * self.use_diff_of_squares + ["axis-0"] * self.is_first
        return "-".join([self.function, self.dtype, f"{self.cols}", *ends])


# short rows, whole ones and a long one, with tails and without
CASES = [
    *(Case("layer_norm", "float32", cols) for cols in (1, 5, 16, 47, 100, 128, 768, 1000, LONG)),
    *(Case("layer_norm", dtype, cols, True) for dtype in ("float16", "bfloat16", "float64") for cols in (768, 1000)),
    *(Case("rms_norm", "float32", cols) for cols in (768, 1000)),
    Case("layer_norm", "float32", 100, is_first=True),
]
# the one that the parallel build has too
PARALLEL = Case("layer_norm", "float32", 768)


def description(case):
    """What `results` calls, for compiling it ahead."""
    is_rms = case.function == "rms_norm"
    bias = None if is_rms else case.dtype
    axis = 0 if case.is_first else None
    return Description(case.dtype, case.cols, case.dtype, bias, case.use_diff_of_squares, is_rms=is_rms, axis=axis)


def digests(case):
    """Of each result of both passes, by its name."""
    rng = np.random.default_rng(case.cols)
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    x = rows(rng, case, ml_dtypes.finfo(dtype))
    dy = uniform(rng, x.shape)
    weight, bias = uniform(rng, (2, case.cols)).astype(dtype)
    with np.errstate(under="ignore"):
        x, dy = x.astype(dtype), dy.astype(dtype)
    return {name: digest(result) for name, result in results(case, dy, x, weight, bias).items()}


def rows(rng, case, limits):
    """Ordinary ones, and one of each kind that takes another way through a kernel; the last two are not finite."""
    x = uniform(rng, (4 if case.cols == LONG else 37, case.cols))
    x[-1, -1] = np.inf
    x[-2, case.cols // 2] = np.nan
    x[1] *= 2.0 ** (limits.maxexp - 2)
    if case.cols != LONG:
        x[2:4] *= 2.0 ** (limits.minexp - 5)
        x[4] = 0
        x[5] = x[5, 0]
        x[6, case.cols // 3 :] = x[6, 0]
        x[8] += 1024
    return x


def uniform(rng, shape):
    """Multiples of 2**-22 between -2 and 2, which float32 holds."""
    return rng.integers(-(1 << 23), 1 << 23, shape) * 2.0**-22


def results(case, dy, x, weight, bias):
    """Those of the backward are of the finite rows, whose sums are not NaN, and dx of the others."""
    cols, finite, others = case.cols, slice(None, -2), slice(-2, None)
    if case.function == "rms_norm":
        y, rstd = nbnorm.rms_norm(x, cols, weight, return_stats=True)
        dx, dweight = nbnorm.rms_norm_backward(dy[finite], x[finite], cols, weight)
        rest = nbnorm.rms_norm_backward(dy[others], x[others], cols, weight).dx
        return {"y": y, "rstd": rstd, "dx": dx, "dweight": dweight, "dx of NaN": rest}
    options = {"use_diff_of_squares": case.use_diff_of_squares}
    if case.is_first:
        options["axis"] = 0
        dy, x, finite, others = dy.T, x.T, (slice(None), finite), (slice(None), others)
    y, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, **options, return_stats=True)
    dx, dweight, dbias = nbnorm.layer_norm_backward(dy[finite], x[finite], cols, weight, **options)
    rest = nbnorm.layer_norm_backward(dy[others], x[others], cols, weight, **options).dx
    return {"y": y, "mean": mean, "rstd": rstd, "dx": dx, "dweight": dweight, "dbias": dbias, "dx of NaN": rest}


def digest(result):
    result = result.copy()
    result[np.isnan(result)] = np.nan
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


def main():
    stored = {str(case): digests(case) for case in CASES}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
