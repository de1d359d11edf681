"""The way to a device and back, also of bfloat16, which Numba itself does not copy, and what is tried there."""

import ml_dtypes
import numpy as np

from nbnorm import arrays

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

# (rows, cols) and what there is one of: a single element; a team of two; rows that share warps, the last one not full; a
# team of a whole warp; odd rows, read one by one; two warps, an odd one, three and a rest; a segment and a rest
SHAPES = [(1, 1), (3, 5), (70, 9), (5, 64), (3, 1000), (2, 1001), (2, 2052), (2, 2500), (1, 4100)]


def normal(rng, shape, dtype):
    with np.errstate(under="ignore"):
        return rng.standard_normal(shape).astype(dtype)


def to_device(array):
    return arrays.on_device(array, "cuda")


def to_host(array):
    return arrays.read(array)
