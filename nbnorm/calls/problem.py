"""What a call asks for: as it came, and as the checks leave it."""

from typing import Any, NamedTuple

import numpy as np


class ForwardCall(NamedTuple):
    """The arguments of a forward, as they came. With `is_rms` it is RMS norm; `is_added` is one of x plus a residual."""

    x: Any
    normalized_shape: Any
    weight: Any = None
    bias: Any = None
    eps: Any = 1e-5
    use_diff_of_squares: Any = False
    out: Any = None
    return_stats: Any = False
    stream: Any = None
    residual: Any = None
    total_out: Any = False
    is_rms: bool = False
    is_added: bool = False
    axis: Any = None


class BackwardCall(NamedTuple):
    """The same of a backward, of which x is the total where `is_added`."""

    dy: Any
    x: Any
    normalized_shape: Any
    weight: Any = None
    eps: Any = 1e-5
    use_diff_of_squares: Any = False
    mean: Any = None
    rstd: Any = None
    output_mask: Any = (True, True, True)
    out: Any = None
    stream: Any = None
    dtotal: Any = None
    is_rms: bool = False
    is_added: bool = False
    axis: Any = None


class Description(NamedTuple):
    """Calls whose kernels are compiled ahead, with a dtype in the place of each array; as `nbnorm.compile` has it."""

    x: Any
    normalized_shape: Any
    weight: Any = None
    bias: Any = None
    use_diff_of_squares: Any = False
    backward: Any = True
    dy: Any = None
    mean: Any = None
    rstd: Any = None
    output_mask: Any = None
    rows: Any = None
    is_rms: Any = False
    residual: Any = None
    total_out: Any = True
    axis: Any = None


class ForwardArrays(NamedTuple):
    """The arrays of a forward that was checked, None for what is absent; `with_total`: x + residual is written."""

    x: Any
    residual: Any
    weight: Any
    bias: Any
    out: Any
    total_out: Any
    with_total: bool


class BackwardArrays(NamedTuple):
    """The same of a backward; output_mask and out are of dx, dweight and dbias."""

    dy: Any
    dtotal: Any
    x: Any
    weight: Any
    mean: Any
    rstd: Any
    output_mask: tuple[bool, ...]
    out: tuple


class Problem(NamedTuple):
    """A norm over the `normalized_shape` of operands of shape `batch + normalized_shape + behind`.

    `behind` is empty unless the axes are not the last. That is `rows` rows of `cols` elements. What they are normalised by
    is the `variance`: "centred" or "diff_of_squares", which are two ways to find that about the mean, or "mean_square",
    about 0, with the mean left alone. `dtype` is that of y and dx, `weight_dtype` that of dweight and dbias.
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
    behind: tuple[int, ...] = ()

    @property
    def shape(self):
        return self.batch + self.normalized_shape + self.behind

    @property
    def statistics_shape(self):
        return self.batch + (1,) * len(self.normalized_shape) + self.behind

    @property
    def statistics_dtype(self):
        return wide_dtype(self.dtype)

    @property
    def at_end(self):
        """The problem of views with the axes behind all other dimensions; statistics have the same order in memory."""
        return self._replace(batch=self.batch + self.behind, behind=())


def wide_dtype(dtype):
    """What operands of `dtype` alone are computed in, and their statistics returned in: float32 or float64.

    Integers and booleans are taken as float64.
    """
    return np.dtype(np.float32 if dtype.itemsize < 8 and dtype.kind not in "biu" else np.float64)


def given_dtype(mean, rstd):
    """What a backward takes given statistics in, of which RMS norm has no mean; None where there are none."""
    dtypes = [wide_dtype(array.dtype) for array in (mean, rstd) if array is not None]
    return np.result_type(*dtypes) if dtypes else None
