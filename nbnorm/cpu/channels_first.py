"""Norms over axes that are not the last: as `last_axes`, of rows that lie beside each other.

What is before the axes, the axes and what is behind them are three dimensions for the kernels. Where an array is not
contiguous, or its elements are not what kernels take, pieces of all are copied through buffers.
"""

import math
from functools import partial
from typing import NamedTuple

import numpy as np

from nbnorm.calls.arrays import convert
from nbnorm.calls.problem import given_dtype, wide_dtype
from nbnorm.cpu import choice, sizes
from nbnorm.cpu.memory import LINE_BYTES
from nbnorm.cpu.operands import flat, is_streamed
from nbnorm.cpu.staging import BUFFER_ELEMENTS, beside, is_ready, row_blocks, storage
from nbnorm.cpu.workers import parallel, threads
from nbnorm.cpu.workers.parallel import NUMBAS, OURS


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
    width = sizes.rows_abreast(behind, problem.cols, sizes.buffer_elements(dtype, 1))
    weight_row, bias_row = flat(weight, dtype, y, total), flat(bias, dtype, y, total)
    all_written = [result for result in (y, total) if result is not None]
    # what is written to a buffer is read again
    streaming = _are_ready(x, residual, *all_written) and all(is_streamed(result, x, residual) for result in all_written)
    residual_dtype = None if residual is None else residual.dtype
    lead = y.ctypes.data // y.itemsize % (LINE_BYTES // y.itemsize) if streaming else 0
    chosen = choice.forward(problem, weight is not None, bias is not None, residual_dtype, given.with_total)
    run = _runner(problem, chosen, 1)
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
    width = sizes.rows_abreast(behind, problem.cols, sizes.buffer_elements(problem.compute_dtype, 2))
    blocks = problem.rows // behind * -(-behind // width)
    sum_blocks = sizes.blocks_abreast(blocks, problem.cols)
    sums = np.empty((with_dweight + with_dbias, -(-blocks // sum_blocks), problem.cols))
    absent_dx = np.empty((0, problem.cols, 0), storage(x.dtype))

    dtotal_dtype = None if dtotal is None else dtotal.dtype
    chosen = choice.backward(problem, dy.dtype, weight is not None, given_statistics, output_mask, dtotal_dtype)
    run = _runner(problem, chosen, sum_blocks)
    for piece in _pieces(problem, width, 0, (dy, dtotal, x, dx)):
        gradients = beside(*(_read(array, problem, piece) for array in (dy, dtotal)))
        dx_rows = _written(dx, problem, piece) if with_dx else absent_dx
        run(
            piece.blocks, gradients, _read(x, problem, piece), weight_row, problem.eps, mean_row[piece.rows],
            rstd_row[piece.rows], piece.first_block, sum_blocks, False, streaming, dx_rows, sums, dweight_row, dbias_row,
            width,
        )  # fmt: skip
        if with_dx:
            _deliver(dx_rows, dx, problem, piece)

    if with_dweight or with_dbias:
        # no rows, only the sums of the blocks
        choice.ready(chosen, False)(
            beside(*(None if array is None else _no_rows(problem, array.dtype) for array in (dy, dtotal))),
            _no_rows(problem, x.dtype), weight_row, problem.eps, mean_row[:0], rstd_row[:0], 0, sum_blocks, True, False,
            absent_dx, sums, dweight_row, dbias_row, width, 0, 0,
        )  # fmt: skip
    return sums


def _no_rows(problem, dtype):
    return np.empty((0, problem.cols, 0), storage(dtype))


def _runner(problem, chosen, step):
    """What calls a kernel with arguments for so many blocks, of which multiples of `step` are one thread's."""
    elements = problem.rows * problem.cols

    def run(blocks, *arguments):
        workers = parallel.workers(elements)
        kernel = choice.ready(chosen, workers == NUMBAS)
        if workers == NUMBAS:
            kernel = parallel.watched(chosen, kernel)
        elif workers == OURS:
            kernel = partial(parallel.timed, parallel.shortest_without(chosen), partial(threads.blocks, kernel, step))
        kernel(*arguments, 0, blocks)

    return run


def _are_ready(*arrays):
    return all(array is None or is_ready(array) for array in arrays)


def _pieces(problem, width, lead, arrays):
    """All rows, where kernels can use all arrays as they are; else as many as buffers hold."""
    behind = math.prod(problem.behind)
    blocks = -(-behind // width)
    if _are_ready(*arrays):
        yield Piece(None, slice(0, behind), slice(0, problem.rows), 0, problem.rows // behind * -(-(behind + lead) // width))
        return
    step = max(1, BUFFER_ELEMENTS // (problem.cols * width)) * width
    for outer, index in enumerate(np.ndindex(problem.batch)):
        for start in range(0, behind, step):
            stop = min(start + step, behind)
            rows = slice(outer * behind + start, outer * behind + stop)
            yield Piece(index, slice(start, stop), rows, outer * blocks + start // width, -(-stop // width) - start // width)


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
