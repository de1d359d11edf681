"""What the graphs of all calls are made of: arrays that are chunked like x, and functions of their chunks."""

from functools import partial

import dask.array as da
import numpy as np

from nbnorm.calls.arrays import is_dask
from nbnorm.dask.chunks import rounded

# partial sums that are added up at once
FAN_IN = 16


def chunked_like(array, chunks):
    """The array with these chunks; None for None."""
    if array is None:
        return None
    if not is_dask(array):
        # its chunks are in the graph once, whatever tasks need them
        return da.from_array(array, chunks=chunks)
    # where sizes are not known, the checks have seen that there are as many
    return array if any(np.isnan(size) for size in array.shape) else array.rechunk(chunks)


def statistics_chunks(x, batch_ndim):
    """What chunks mean and rstd have."""
    return x.chunks[:batch_ndim] + ((1,),) * (x.ndim - batch_ndim)


def name_of(call):
    """The public function's, which the keys of its tasks begin with."""
    words = (
        "add" if call.is_added else "",
        "rms_norm" if call.is_rms else "layer_norm",
        "backward" if hasattr(call, "dy") else "",
    )
    return "_".join(filter(None, words))


def of_chunks(function, name, operands, dtype):
    """What is chunked like the first operand, each chunk the function's result for those of the operands.

    An operand has the first one's dimensions, or its last ones; None stays None. A chunk may also be a tuple, of which
    `entry` makes an array.
    """
    x = operands[0]
    axes = tuple(range(x.ndim))
    pairs = [(array, None if array is None else axes[x.ndim - array.ndim :]) for array in operands]
    meta = np.empty((0,) * x.ndim, dtype)
    return da.blockwise(
        function, axes, *(part for pair in pairs for part in pair), token=name, dtype=dtype, meta=meta, align_arrays=False
    )


def entry(results, i, dtype, single=()):
    """The array that entry i of each chunk is, which has 1 along the axes `single`."""
    axes = tuple(range(results.ndim))
    meta, adjusted = np.empty((0,) * results.ndim, dtype), dict.fromkeys(single, 1)
    return da.blockwise(
        partial(_entry, i), axes, results, axes, token=results.name.rpartition("-")[0], dtype=dtype, meta=meta,
        adjust_chunks=adjusted, align_arrays=False,
    )  # fmt: skip


def summed(results, i, batch_ndim, dtype):
    """The sum over all chunks' rows of entry i, which is float64 sums over the rows of a chunk; rounded once.

    The order follows from the chunks alone.
    """
    axes = tuple(range(batch_ndim))
    sums = entry(results, i, np.float64, axes)
    meta = np.empty((0,) * (sums.ndim - batch_ndim))
    if axes:
        sums = da.reduction(sums, _sum, _sum, axis=axes, dtype=meta.dtype, split_every=FAN_IN, meta=meta)
    return sums.map_blocks(rounded, dtype, dtype=dtype, meta=meta.astype(dtype))


def _entry(i, results):
    return results[i]


def _sum(sums, axis, keepdims):
    return np.sum(sums, axis=axis, keepdims=keepdims)
