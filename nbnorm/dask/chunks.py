"""What is done to a chunk that has parts of rows, some rows after others, so that float64 copies of them are small."""

import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from nbnorm.calls.arrays import convert
from nbnorm.calls.problem import wide_dtype
from nbnorm.cpu import mode
from nbnorm.cpu.staging import row_blocks
from nbnorm.dask import moments as of_rows
from nbnorm.dask.moments import widened

# elements that are worked on together: with half as many, NumPy's calls take a tenth more, with an eighth twice as long
BLOCK_ELEMENTS = 1 << 15


class How(NamedTuple):
    """What these functions need to know of a call; `dtype` is that of y and dx, `is_wide` as `moments` has it."""

    batch_ndim: int
    eps: float
    is_centred: bool
    is_wide: bool
    dtype: Any
    output_mask: Any = None


def total(dtype, x, residual):
    """Their sum, rounded once."""
    wide, result = np.empty(x.shape, np.result_type(*map(wide_dtype, (x.dtype, residual.dtype)))), np.empty(x.shape, dtype)
    other = np.empty_like(wide)
    with _arithmetic():
        convert(x, wide)
        convert(residual, other)
        wide += other
        convert(wide, result)
    return result


def moments(how, x, dy, weight):
    """Those of the parts of rows that are in the chunk, with 1 for each normalised dimension."""
    with _arithmetic():
        weight = _flat(weight)
        pieces = _pieces(how, x, dy)
        found = [of_rows.moments(xs, _g(dys, weight), how.is_centred, how.is_wide) for *_, xs, dys in pieces]
        return _joined(how, x, found)


def moments_given(how, x, dy, weight, mean, rstd):
    """The same of g where mean and rstd are given."""
    with _arithmetic():
        weight, row = _flat(weight), of_rows.row_given(_flat(mean), _flat(rstd))
        found = [
            of_rows.moments_about(of_rows.normalised(xs, _at(row, rows), how.is_wide), _g(dys, weight), how.is_centred)
            for _, rows, xs, dys in _pieces(how, x, dy)
        ]
        return _joined(how, x, found)


def same(found, axis, keepdims):
    return found


def merged(found, axis, keepdims):
    """The moments of rows from those of their parts, in lists of lists."""
    with _arithmetic():
        return of_rows.merged(list(_in_order(found)))


def row(eps, found, axis, keepdims):
    """What is known of the rows, from the same."""
    with _arithmetic():
        return of_rows.row_of(of_rows.merged(list(_in_order(found))), eps)


def row_given(found, mean, rstd):
    return of_rows.row_given(widened(mean), widened(rstd), found)


def statistic(name, dtype, row):
    return rounded(getattr(row, name), dtype)


def normalised(how, x, row, weight, bias):
    """The y of the chunk."""
    y = np.empty(x.shape, how.dtype)
    with _arithmetic():
        weight, bias = _flat(weight), _flat(bias)
        for index, rows, xs in _pieces(how, x):
            values = of_rows.normalised(xs, _at(row, rows), how.is_wide)
            if weight is not None:
                values *= weight
            if bias is not None:
                values += bias
            convert(values.reshape(y[index].shape), y[index])
    return y


def gradients(how, x, row, dy, dtotal, weight):
    """The dx of the chunk, and the float64 sums over its rows, with the dimensions of x."""
    with_dx, with_dweight, with_dbias = how.output_mask
    dx: Any = np.empty(x.shape, how.dtype) if with_dx else None
    dweight, dbias = np.zeros((2, math.prod(x.shape[how.batch_ndim :])))
    with _arithmetic():
        weight = _flat(weight)
        for index, rows, xs, dys, dtotals in _pieces(how, x, dy, dtotal):
            dys = widened(dys)
            if with_dbias:
                dbias += dys.sum(axis=0)
            if row is None:
                continue
            known = _at(row, rows)
            x_hats = of_rows.normalised(xs, known, how.is_wide)
            if with_dweight:
                dweight += (dys * x_hats).sum(axis=0)
            if with_dx:
                values = of_rows.gradient(_g(dys, weight), x_hats, known)
                if dtotals is not None:
                    values += widened(dtotals)
                convert(values.reshape(dx[index].shape), dx[index])
    shape = (1,) * how.batch_ndim + x.shape[how.batch_ndim :]
    return dx, dweight.reshape(shape), dbias.reshape(shape)


@contextmanager
def _arithmetic():
    """Float64 arithmetic as kernels have it: in any floating-point mode of the thread, and without warnings."""
    with mode.standard(), np.errstate(all="ignore"):
        yield


def _pieces(how, *arrays):
    """Some rows after others: where they are in the chunk, which of its rows, and the rows of each array, None of None."""
    shape = arrays[0].shape
    cols = math.prod(shape[how.batch_ndim :])
    for index, rows in row_blocks(shape[: how.batch_ndim], max(1, BLOCK_ELEMENTS // max(1, cols))):
        count = rows.stop - rows.start
        yield index, rows, *(None if array is None else array[index].reshape(count, cols) for array in arrays)


def _joined(how, x, pieces):
    """The moments of all of a chunk's rows, from those of some after others."""
    shape = x.shape[: how.batch_ndim] + (1,) * (x.ndim - how.batch_ndim)
    counts, *numbers = zip(*pieces, strict=True)
    return of_rows.Moments(counts[0], *(np.concatenate(parts).reshape(shape) for parts in numbers))


def _at(known, rows):
    """What is known of some of the rows."""
    return of_rows.Row(*(array.reshape(-1)[rows] for array in known))


def _g(dy, weight):
    if dy is None:
        return None
    return widened(dy) if weight is None else widened(dy) * weight


def _flat(array):
    return None if array is None else widened(array.reshape(-1))


def _in_order(found):
    if isinstance(found, list):
        for part in found:
            yield from _in_order(part)
    else:
        yield found


def rounded(values, dtype):
    with _arithmetic():
        result = np.empty(values.shape, dtype)
        convert(values, result)
    return result
