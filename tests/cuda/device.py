"""What the CUDA tests run on; the way there and back, also of bfloat16, which Numba itself does not copy; what is tried."""

import os

import ml_dtypes
import numba
import numpy as np
import pytest

from nbnorm.calls import arrays

# the compute capability of the device that is not there, whose PTX runs on the CPU: "9.0"
PTX = os.environ.get("NBNORM_TEST_PTX")
LEVEL = "simulator" if numba.config.ENABLE_CUDASIM else "ptx" if PTX else "device"

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

# (rows, cols) and what there is one of: a single element; a team of two; rows that share warps, the last one not full; a
# team of a whole warp; odd rows, read one by one; two warps, an odd one, three and a rest; a segment and a rest
SHAPES = [(1, 1), (3, 5), (70, 9), (5, 64), (3, 1000), (2, 1001), (2, 2052), (2, 2500), (1, 4100)]


def large(*values):
    """These as a parameter of tests that are run as PTX too: the simulator leaves blocks of so many threads to that."""
    return pytest.param(*values, marks=pytest.mark.large)


def normal(rng, shape, dtype):
    with np.errstate(under="ignore"):
        return rng.standard_normal(shape).astype(dtype)


def to_device(array):
    return arrays.on_device(array, "cuda")


def to_host(array):
    return arrays.read(array)
