"""What a call asks for, apart from the data: the result of the checks, and all that a device needs to choose a kernel."""

from typing import NamedTuple

import numpy as np


class Problem(NamedTuple):
    """Layer norm over the trailing `normalized_shape` of operands of shape `batch + normalized_shape`.

    That is `rows` rows of `cols` elements. `dtype` is that of y and dx, `weight_dtype` that of dweight and dbias.
    `compute_dtype` is float64 where an operand is wider than float32, else float32.
    """

    batch: tuple[int, ...]
    normalized_shape: tuple[int, ...]
    rows: int
    cols: int
    eps: float
    variance: str
    dtype: np.dtype
    weight_dtype: np.dtype
    compute_dtype: np.dtype

    @property
    def shape(self):
        return self.batch + self.normalized_shape

    @property
    def statistics_shape(self):
        return self.batch + (1,) * len(self.normalized_shape)

    @property
    def statistics_dtype(self):
        return wide_dtype(self.dtype)


def wide_dtype(dtype):
    """What operands of `dtype` alone are computed in, and their statistics returned in: float32 or float64.

    Integers and booleans are taken as float64.
    """
    return np.dtype(np.float32 if dtype.itemsize < 8 and dtype.kind not in "biu" else np.float64)


def given_dtype(mean, rstd):
    """What a backward takes given statistics in; None where there are none."""
    return None if mean is None else np.result_type(wide_dtype(mean.dtype), wide_dtype(rstd.dtype))
