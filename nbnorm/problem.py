"""What a call asks for, apart from the data: the result of the checks, and all that a device needs to choose a kernel."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Problem:
    """Layer norm over the trailing `normalized_shape` of operands of shape `batch + normalized_shape`.

    `dtype` is that of y and dx, `weight_dtype` that of dweight and dbias. A kernel reads rows of `kernel_dtype` and
    parameters of `param_dtype`, float32 or float64 both.
    """

    batch: tuple[int, ...]
    normalized_shape: tuple[int, ...]
    eps: float
    variance: str
    dtype: np.dtype
    weight_dtype: np.dtype
    kernel_dtype: np.dtype
    param_dtype: np.dtype

    @property
    def shape(self):
        return self.batch + self.normalized_shape

    @property
    def statistics_shape(self):
        return self.batch + (1,) * len(self.normalized_shape)

    @property
    def rows(self):
        return math.prod(self.batch)

    @property
    def cols(self):
        return math.prod(self.normalized_shape)
