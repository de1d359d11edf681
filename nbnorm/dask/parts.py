"""Graphs of calls whose rows lie in several chunks each: moments of the parts, merged, then what each chunk makes of them.

Of a row, its parts' moments alone come together, a few numbers for each. Chunks are not rearranged.
"""

from functools import partial

import dask.array as da
import numpy as np

from nbnorm.dask import chunks
from nbnorm.dask.chunks import How
from nbnorm.dask.graphs import FAN_IN, chunked_like, entry, name_of, of_chunks, statistics_chunks, summed

WIDE = np.dtype(np.float64)


def forward(problem, given, call):
    """As `whole.forward`."""
    x, ndim, name, total = given.x, len(problem.batch), name_of(call), None
    if given.residual is not None:
        operands = [x, chunked_like(given.residual, x.chunks)]
        x = total = of_chunks(partial(chunks.total, problem.dtype), f"{name}-total", operands, problem.dtype)
    how = How(ndim, problem.eps, not call.is_rms, problem.compute_dtype == WIDE, problem.dtype)
    rows = _rows(how, of_chunks(partial(chunks.moments, how), f"{name}-moments", [x, None, None], WIDE))
    weight, bias = (chunked_like(array, x.chunks[ndim:]) for array in (given.weight, given.bias))
    y = of_chunks(partial(chunks.normalised, how), name, [x, rows, weight, bias], problem.dtype)
    mean = rstd = None
    if call.return_stats:
        mean = None if call.is_rms else _statistic(rows, "mean", problem.statistics_dtype)
        rstd = _statistic(rows, "rstd", problem.statistics_dtype)
    return y, total if given.with_total else None, mean, rstd


def backward(problem, given, call):
    """As `whole.backward`."""
    x, ndim, mask, name = given.x, len(problem.batch), given.output_mask, name_of(call)
    dy, dtotal = (chunked_like(array, x.chunks) for array in (given.dy, given.dtotal if mask[0] else None))
    mean, rstd = (chunked_like(array, statistics_chunks(x, ndim)) for array in (given.mean, given.rstd))
    weight = chunked_like(given.weight, x.chunks[ndim:])
    how = How(ndim, problem.eps, not call.is_rms, problem.compute_dtype == WIDE, problem.dtype, mask)
    if not (mask[0] or mask[1]):
        rows = None
    elif rstd is None:
        rows = _rows(
            how, of_chunks(partial(chunks.moments, how), f"{name}-moments", [x, dy if mask[0] else None, weight], WIDE)
        )
    else:
        found = of_chunks(partial(chunks.moments_given, how), f"{name}-moments", [x, dy, weight, mean, rstd], WIDE)
        rows = of_chunks(chunks.row_given, f"{name}-rows", [_tree(found, ndim, chunks.merged), mean, rstd], WIDE)
    results = of_chunks(partial(chunks.gradients, how), name, [x, rows, dy, dtotal, weight], problem.dtype)
    dx = entry(results, 0, problem.dtype) if mask[0] else None
    return dx, *(
        summed(results, i, ndim, problem.weight_dtype) if is_wanted else None for i, is_wanted in enumerate(mask[1:], 1)
    )


def _rows(how, found):
    """What is known of rows, from the moments of their parts; it has one chunk where the rows have several."""
    return _tree(found, how.batch_ndim, partial(chunks.row, how.eps))


def _tree(found, batch_ndim, aggregate):
    return da.reduction(
        found, chunks.same, aggregate, axis=tuple(range(batch_ndim, found.ndim)), keepdims=True, combine=chunks.merged,
        concatenate=False, split_every=FAN_IN, dtype=found.dtype, meta=found._meta,
    )  # fmt: skip


def _statistic(rows, name, dtype):
    return of_chunks(partial(chunks.statistic, name, dtype), name, [rows], dtype)
