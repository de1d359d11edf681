"""Kernels for short rows, as factories with the arguments and signatures of those in `whole_rows`.

Sixteen rows at a time go through each step. `whole_rows` gives the same bits for rows of any length, but not of 16 bits.
"""

import functools

import numpy as np

from nbnorm.cpu.kernels import loops
from nbnorm.cpu.kernels.gradients import GROUP_ROWS, gradients_of_rows
from nbnorm.cpu.kernels.modes import (
    MEAN_SQUARE_COMPENSATED,
    TWO_SWEEPS,
    VARIANCE_BOUNDS,
    are_given,
    in_one_sweep,
    is_centred,
)
from nbnorm.cpu.kernels.normalise import normalise, normalise_rows, store_statistics
from nbnorm.cpu.kernels.rescaled import row_gradients_rescaled, row_rescaled
from nbnorm.cpu.kernels.row import Placed, Rows, given_moments, is_ordinary, kept_statistics, store_row, with_rstd
from nbnorm.cpu.kernels.sixteen_rows import (
    KNOWN_SIZE,
    ROWS,
    SUMS_SIZE,
    Group,
    SumsOf,
    compensated_of_rows,
    means_of_rows,
    sixteen_in,
    statistics_of_rows,
    sums_of,
)
from nbnorm.cpu.kernels.statistics import AHEAD, finds_moments
from nbnorm.cpu.kernels.sums import norms_of_sums
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import scratch, smaller, until_aligned
from nbnorm.cpu.sizes import STREAMED_BYTES


def forward(x_dtype, dtype, has_weight, has_bias, variance, residual_dtype=None, with_total=False):
    """One iteration owns some rows, of which it takes sixteen at a time."""
    rows_from = _forward(x_dtype, dtype, variance)
    if residual_dtype is not None:
        rows_from = norms_of_sums(rows_from, x_dtype, ROWS)
    return loops.forward(rows_from, dtype.type, has_weight, has_bias, is_centred(variance))


def backward(
    dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask, dtotal_dtype=None
):
    """One iteration owns a block of rows, of which it takes sixteen at a time, and adds to the block's own sums."""
    rows_from = _backward(x_dtype, dtype, statistics_from, output_mask)
    return loops.backward(rows_from, dtype.type, has_weight, output_mask, is_centred(statistics_from))


@functools.cache
def _forward(x_dtype, dtype, variance):
    element = dtype.type
    itemsize, has_mean = x_dtype.itemsize, is_centred(variance)
    find_statistics = _find_statistics(x_dtype, dtype, variance, False)
    ordinary_from = _ordinary_from(VARIANCE_BOUNDS[dtype.name])

    @inlined
    def rows_from(operands, begin, end, streaming):
        cols = operands.cols
        ahead = cols * -(-AHEAD // cols)
        # column by column, a line that leaves the caches leaves in pieces, unless a row is one column of lanes: in pairs, a
        # call takes 0.65 of the time there
        is_by_columns = cols <= 16 or not (streaming or operands.rows * cols * itemsize >= STREAMED_BYTES)
        sixteen = sixteen_in(scratch(SUMS_SIZE, np.float64), scratch(KNOWN_SIZE, element))
        for r in range(begin, end, ROWS):
            # statistics of the rows of a group
            group = Group(r * cols, smaller(ROWS, end - r), cols)
            find_statistics(operands, group, ahead, sixteen)

            # normalise and store the rows up to one that needs another arithmetic, then that
            i = 0
            while i < group.count:
                stop = ordinary_from(i, group, operands.eps, sixteen)
                normalise_ordinary(
                    operands, Rows(group.at, cols, i, stop), sixteen.known.statistics, is_by_columns, streaming
                )
                for k in range(i, stop):
                    store_statistics(operands, r + k, sixteen.means[k], sixteen.known.statistics.rstd[k])
                i = stop
                if i < group.count:
                    row_mean, row_rstd = row_rescaled(operands, group.at + i * cols, has_mean)
                    store_statistics(operands, r + i, row_mean, row_rstd)
                    i += 1

    return rows_from


@functools.cache
def _ordinary_from(bounds):
    @inlined
    def ordinary_from(begin, group, eps, sixteen):
        """Where the rows of a group from `begin` on end that need no other arithmetic."""
        end = begin
        while end < group.count and is_ordinary(sixteen.variances[end], eps, bounds):
            end += 1
        return end

    return ordinary_from


@inlined
def normalise_ordinary(operands, rows, statistics, is_by_columns, streaming):
    """Column by column, or two rows after two."""
    alone = rows.begin if is_by_columns else rows.end - ((rows.end - rows.begin) & 1)
    for i in range(rows.begin, alone, 2):
        first = Placed(rows.at + i * rows.pitch, kept_statistics(statistics, i))
        second = Placed(rows.at + (i + 1) * rows.pitch, kept_statistics(statistics, i + 1))
        normalise(operands, (first, second), 0, operands.cols, streaming)
    normalise_rows(operands, Rows(rows.at, rows.pitch, alone, rows.end), statistics, streaming)


@functools.cache
def _find_statistics(x_dtype, dtype, statistics_from, has_sums):
    """What finds the statistics of a group, and with `has_sums` their means."""
    mode, find, _ = finds_moments(statistics_from, x_dtype, dtype)
    sum_type, is_near, limits = sums_of(mode, x_dtype, dtype)
    is_compensated = mode == TWO_SWEEPS or mode == MEAN_SQUARE_COMPENSATED

    @inlined
    def find_statistics(operands, group, ahead, sixteen):
        if is_compensated:
            compensated_of_rows(find, operands.x, group, operands.eps, ahead, sixteen)
        else:
            dy = operands.dy if has_sums else None
            statistics_of_rows(operands, dy, group, SumsOf(sum_type, is_near, limits), mode, ahead, sixteen)

    return find_statistics


@functools.cache
def _backward(x_dtype, dtype, statistics_from, output_mask):
    element = dtype.type
    is_given, has_mean = are_given(statistics_from), is_centred(statistics_from)
    with_dx, with_dweight, _ = output_mask
    needs_statistics = with_dx or with_dweight
    has_sums = in_one_sweep(statistics_from, dtype, output_mask)
    find_statistics = _find_statistics(x_dtype, dtype, statistics_from, has_sums)
    ordinary_from = _ordinary_from(VARIANCE_BOUNDS[dtype.name])
    # sixteen elements are a line
    has_lines = x_dtype.itemsize == 4

    @inlined
    def rows_from(operands, begin, end, columns, streaming):
        cols = operands.cols
        ahead = cols * -(-AHEAD // cols)
        # as forward, but fewer rows column by column: it takes 0.8 to 0.9 of the time. Two where each line has the end of
        # one sixteen and the beginning of another: only so many lines wait for their second part, and four rows of 32 to
        # 112 take 0.9 to 2 times as long
        has_split_lines = has_lines and cols % 16 == 0 and until_aligned(operands.dx, 0) > 0
        together = (2 if has_split_lines else GROUP_ROWS) if streaming and cols > 16 else ROWS
        sixteen = sixteen_in(scratch(SUMS_SIZE, np.float64), scratch(KNOWN_SIZE, element))
        for r in range(begin, end, ROWS):
            # statistics of the rows of a group
            group = Group(r * cols, smaller(ROWS, end - r), cols)
            if needs_statistics and is_given:
                for i in range(group.count):
                    row = given_moments(operands.mean, r + i, element)
                    store_row(sixteen.known.statistics, i, with_rstd(row, element(operands.rstd[r + i])))
            elif needs_statistics:
                find_statistics(operands, group, ahead, sixteen)

            # their means
            if with_dx and not has_sums:
                means_of_rows(operands, group, has_mean, is_given, ahead, sixteen)

            # the gradients of the rows up to one that needs another arithmetic, then of that
            i = 0
            while i < group.count:
                stop = group.count
                if needs_statistics and not is_given:
                    stop = ordinary_from(i, group, operands.eps, sixteen)
                for k in range(i, stop, together):
                    rows = Rows(group.at, cols, k, smaller(k + together, stop))
                    gradients_of_rows(operands, rows, columns, sixteen.known, None, streaming, 0, 0)
                i = stop
                if i < group.count:
                    row_gradients_rescaled(operands, group.at + i * cols, columns, has_mean)
                    i += 1

    return rows_from
