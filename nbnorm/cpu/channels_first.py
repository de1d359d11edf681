"""Norms over axes that are not the last: as `last_axes`, of rows that lie beside each other.

What is before the axes, the axes and what is behind them are three dimensions for the kernels. Where an array is not
contiguous, or its elements are not what kernels take, pieces of all are copied through buffers.
"""

import math
from typing import NamedTuple

import numpy as np

from nbnorm.calls.arrays import convert
from nbnorm.calls.problem import given_dtype, wide_dtype
from nbnorm.cpu import choice, sizes
from nbnorm.cpu.memory import LINE_BYTES
from nbnorm.cpu.operands import flat, is_streamed
from nbnorm.cpu.staging import BUFFER_ELEMENTS, beside, is_ready, row_blocks, storage
from nbnorm.cpu.workers import blocks, parallel, threads


class Piece(NamedTuple):
    """Some rows: their index before the axes, None for all; which they are behind them, and of all; and their blocks."""

    outer: tuple | None
    behind: slice
    rows: slice
    first_block: int
    blocks: int


def normalise(problem, order, given, results):
    """As in `last_axes`."""
    x, residual, weight, bias, *_ = given
    y, total, mean, rstd = results
    dtype, behind = problem.compute_dtype, math.prod(problem.behind)
    width, _ = blocks_of((problem.rows // behind, problem.cols, behind), dtype, 1)
    weight_row, bias_row = flat(weight, dtype, y, total), flat(bias, dtype, y, total)
    all_written = [result for result in (y, total) if result is not None]
    # what is written to a buffer is read again
    streaming = _are_ready(x, residual, *all_written) and all(is_streamed(result, x, residual) for result in all_written)
    residual_dtype = None if residual is None else residual.dtype
    lead = y.ctypes.data // y.itemsize % (LINE_BYTES // y.itemsize) if streaming else 0
    chosen = choice.forward(problem, weight is not None, bias is not None, residual_dtype, given.with_total)
    run = _runner(problem, chosen, threads.forward_blocks)
    for piece in _pieces(problem, width, lead, (x, residual, y, total)):
        inputs = beside(*(_read(array, problem, piece) for array in (x, residual)))
        written = [_written(array, problem, piece) for array in (y, total)]
        run(
            piece.blocks, inputs, weight_row, bias_row, problem.eps, streaming, beside(*written), mean[piece.rows],
            rstd[piece.rows], width, lead,
        )  # fmt: skip
        for array, rows in zip((y, total), written, strict=True):
            _deliver(rows, array, problem, piece)


def gradients(problem, order, given, results, keeps_sums=False):
    """As in `last_axes`; the sums are always kept."""
    dy, dtotal, x, weight, mean, rstd, output_mask, _ = given
    dx, dweight, dbias = results
    with_dx, with_dweight, with_dbias = output_mask
    dtotal = dtotal if with_dx else None
    given_statistics = given_dtype(mean, rstd)
    statistics_dtype = given_statistics or wide_dtype(x.dtype)
    weight_row = flat(weight, problem.compute_dtype, dx)
    mean_row, rstd_row = flat(mean, statistics_dtype, dx), flat(rstd, statistics_dtype, dx)
    dweight_row, dbias_row = (array.reshape(-1).view(storage(problem.weight_dtype)) for array in (dweight, dbias))
    streaming = with_dx and _are_ready(dy, dtotal, x, dx) and is_streamed(dx, dy, dtotal, x)
    behind = math.prod(problem.behind)
    width, count = blocks_of((problem.rows // behind, problem.cols, behind), problem.compute_dtype, 2)
    sum_blocks, sums_shape = sums_of(count, problem.cols, with_dweight + with_dbias)
    sums = np.empty(sums_shape)
    absent_dx = np.empty((0, problem.cols, 0), storage(x.dtype))

    dtotal_dtype = None if dtotal is None else dtotal.dtype
    chosen = choice.backward(problem, dy.dtype, weight is not None, given_statistics, output_mask, dtotal_dtype)
    run = _runner(problem, chosen, threads.backward_blocks)
    for piece in _pieces(problem, width, 0, (dy, dtotal, x, dx)):
        gradients = beside(*(_read(array, problem, piece) for array in (dy, dtotal)))
        dx_rows = _written(dx, problem, piece) if with_dx else absent_dx
        run(
            piece.blocks, gradients, _read(x, problem, piece), weight_row, problem.eps, mean_row[piece.rows],
            rstd_row[piece.rows], piece.first_block, sum_blocks, piece.rows.stop == problem.rows, streaming, dx_rows, sums,
            dweight_row, dbias_row, width,
        )  # fmt: skip
        if with_dx:
            _deliver(dx_rows, dx, problem, piece)
    return sums


def all_blocks(shape, dtype):
    """What a forward's kernel is told beside its operands, where it works on all rows and writes none past the caches."""
    width, count = blocks_of(shape, dtype, 1)
    return width, 0, 0, count


def all_summed(shape, dtype, results):
    """The same of a backward, behind the blocks that are summed in one go, and the shape of the sums."""
    width, count = blocks_of(shape, dtype, 2)
    return *sums_of(count, shape[1], results), (width, 0, count)


def blocks_of(shape, dtype, buffers):
    """How many rows a block has, of rows in an array of these three dimensions, and how many blocks that are."""
    outer, cols, behind = shape
    width = sizes.rows_abreast(behind, cols, sizes.buffer_elements(dtype, buffers))
    return width, outer * -(-behind // width)


def sums_of(blocks, cols, results):
    """Of how many blocks dweight and dbias are summed in one go, and the shape of the sums of so many results."""
    sum_blocks = sizes.blocks_abreast(blocks, cols)
    return sum_blocks, (results, -(-blocks // sum_blocks), cols)


def _runner(problem, chosen, share):
    """What calls a kernel with arguments for so many blocks; `share` is its function in `threads`."""
    elements = problem.rows * problem.cols

    def run(count, *arguments):
        kernel = blocks.kernel_for(parallel.workers(elements), chosen, share)
        kernel(*arguments, 0, count)

    return run


def _are_ready(*arrays):
    return all(array is None or is_ready(array) for array in arrays)


def _pieces(problem, width, lead, arrays):
    """All rows, where kernels can use all arrays as they are; else as many as buffers hold."""
    behind = math.prod(problem.behind)
    count = -(-behind // width)
    if _are_ready(*arrays):
        yield Piece(None, slice(0, behind), slice(0, problem.rows), 0, problem.rows // behind * -(-(behind + lead) // width))
        return
    step = max(1, BUFFER_ELEMENTS // (problem.cols * width)) * width
    for outer, index in enumerate(np.ndindex(problem.batch)):
        for start in range(0, behind, step):
            stop = min(start + step, behind)
            rows = slice(outer * behind + start, outer * behind + stop)
            yield Piece(index, slice(start, stop), rows, outer * count + start // width, -(-stop // width) - start // width)


def _read(array, problem, piece):
    """What a kernel reads of an array: a view of all of it, or a buffer with a piece's values."""
    rows = _written(array, problem, piece)
    if array is not None and piece.outer is not None:
        for part, place in _parts(rows, array, problem, piece):
            convert(part, place)
    return rows


def _written(array, problem, piece):
    """What a kernel writes of an array: a view of all of it, or an empty buffer."""
    if array is None:
        return None
    if piece.outer is not None:
        return np.empty((1, problem.cols, piece.behind.stop - piece.behind.start), storage(array.dtype))
    rows = array.reshape(-1, problem.cols, piece.behind.stop)
    return rows.view(storage(rows.dtype)) if rows.itemsize == 2 else rows


def _deliver(rows, array, problem, piece):
    """Copy to its place what a kernel wrote to a buffer."""
    if array is not None and piece.outer is not None:
        for part, place in _parts(rows, array, problem, piece):
            convert(place, part)


def _parts(rows, array, problem, piece):
    """The parts of an array that a buffer holds, each with its place in that."""
    axes = (slice(None),) * len(problem.normalized_shape)
    values = rows[0] if array.dtype.kind in "biu" else rows[0].view(array.dtype.newbyteorder("="))
    start = piece.behind.start
    for index, behind in row_blocks(problem.behind, piece.behind.stop - start, span=piece.behind):
        part = array[(*piece.outer, *axes, *index)]
        yield part, values[:, behind.start - start : behind.stop - start].reshape(part.shape)
