"""Kernels for rows that do not fit a core's cache, as factories with the arguments and signatures of those in `whole_rows`.

A row is split into segments, which all cores share. The statistics of a segment are found while it is in the cache, and
merged into the row's in the order of the segments. The second sweep then reads the row again from where it is.
"""

import functools

import numpy as np
from numba import prange

from nbnorm.cpu.kernels.gradients import (
    GROUP_ROWS,
    BackwardOperands,
    Columns,
    clear,
    first_gradient,
    gradient_sums,
    gradients,
    store_total,
    with_sums,
)
from nbnorm.cpu.kernels.modes import are_given, in_one_sweep, is_centred
from nbnorm.cpu.kernels.normalise import ForwardOperands, normalise, store_statistics
from nbnorm.cpu.kernels.rescaled import (
    KEPT,
    NOT_RESCALED,
    Rescaled,
    gradients_rescaled,
    kept_rescaled,
    kept_rescaled_means,
    means_rescaled,
    normalise_rescaled,
    rescaled,
    store_rescaled,
    store_rescaled_means,
)
from nbnorm.cpu.kernels.row import (
    KNOWN_NUMBERS,
    Placed,
    Rows,
    Span,
    Sums,
    given_moments,
    is_ordinary,
    known_in,
    means_of,
    moments_of,
    rstd_of,
    store_row,
    usable,
    with_rstd,
)
from nbnorm.cpu.kernels.segments import SEGMENT_NUMBERS, merged, segments_in, store_segment
from nbnorm.cpu.kernels.statistics import AHEAD, finds_both, finds_moments
from nbnorm.cpu.lanes import lowering  # noqa: F401  teaches Numba the operations on lanes
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    added,
    fence,
    larger,
    operand,
    operand_beside,
    pointer,
    pointer_beside,
    restore_mode,
    shape_of,
    smaller,
    standard_mode,
    store,
    widen,
)
from nbnorm.cpu.sizes import LONG_GROUP_ELEMENTS, STREAMED_TASK_ELEMENTS

SEGMENT = 1 << 14
# columns whose dweight and dbias a thread sums over all rows: their float64 sums take 32 KiB of the first-level cache, and a
# backward at (16, 2^20) 0.9 of the time that it takes with twice as many
COLUMNS = 1 << 11


def forward(x_dtype, dtype, has_weight, has_bias, variance, residual_dtype=None, with_total=False):
    """One iteration owns a segment: of its statistics in the first loop, of y in the second."""
    element = dtype.type
    find_moments, find_statistics, normalise_part = _forward_steps(x_dtype, dtype, variance)
    has_mean = is_centred(variance)

    def kernel(x, weight, bias, eps, streaming, y, mean, rstd):
        rows, cols = shape_of(x)
        segments = -(-cols // SEGMENT)
        group_rows = smaller(rows, larger(1, LONG_GROUP_ELEMENTS // cols))
        weight_or_none = pointer(weight) if has_weight else None
        bias_or_none = pointer(bias) if has_bias else None
        mean_or_none = pointer(mean) if has_mean else None
        operands = ForwardOperands(
            added(operand(x, element), operand_beside(x, element)), weight_or_none, bias_or_none, pointer(y),
            pointer_beside(y), mean_or_none, pointer(rstd), rstd.size > 0, rows, cols, eps,
        )  # fmt: skip
        of_segments = np.empty(SEGMENT_NUMBERS * group_rows * segments)
        of_rows = np.empty(KEPT * group_rows)
        for first in range(0, rows, group_rows):
            count = smaller(group_rows, rows - first)

            # statistics
            for task in prange(count * segments):
                thread_mode, pinned = standard_mode(operands)
                parts = segments_in(pointer(of_segments), group_rows * segments)
                find_moments(pinned, first + task // segments, task % segments * SEGMENT, parts, task)
                restore_mode(thread_mode)
            thread_mode, pinned = standard_mode(operands)
            parts = segments_in(pointer(of_segments), group_rows * segments)
            for i in range(count):
                find_statistics(pinned, first + i, parts, i * segments, pointer(of_rows), i)
            restore_mode(thread_mode)

            # normalise and store
            tasks = -(-cols // STREAMED_TASK_ELEMENTS)
            for task in prange(count * tasks):
                thread_mode, pinned = standard_mode(operands)
                i = task // tasks
                normalise_part(pinned, first + i, task % tasks * STREAMED_TASK_ELEMENTS, pointer(of_rows), i, streaming)
                restore_mode(thread_mode)
                if streaming:
                    fence()

    return kernel


@functools.cache
def _forward_steps(x_dtype, dtype, variance):
    element = dtype.type
    mode, find, bounds = finds_moments(variance, x_dtype, dtype)
    has_mean = is_centred(variance)

    @inlined
    def find_moments(operands, r, start, parts, task):
        """The moments of the segment of row r that starts at the column `start`."""
        span = Span(r * operands.cols + start, start, smaller(SEGMENT, operands.cols - start))
        store_segment(parts, task, find(operands.x, span, mode, AHEAD), Sums(0.0, 0.0))

    @inlined
    def find_statistics(operands, r, parts, first, kept, i):
        """Those of row r, from its segments, of which the first is `first`."""
        found, _ = merged(parts, first, SEGMENT, operands.cols)
        if is_ordinary(found.variance, operands.eps, bounds):
            rstd = widen(rstd_of(found.variance, operands.eps, element))
            row = Rescaled(NOT_RESCALED, found.hi, found.lo, rstd, found.hi + found.lo, rstd)
        else:
            row = rescaled(operands.x, r * operands.cols, operands.cols, operands.eps, has_mean)
        store_rescaled(kept, i, row)
        store_statistics(operands, r, row.mean, row.rstd)

    @inlined
    def normalise_part(operands, r, start, kept, i, streaming):
        """Write y of a part of row r."""
        width = smaller(STREAMED_TASK_ELEMENTS, operands.cols - start)
        at = r * operands.cols + start
        row = kept_rescaled(kept, i)
        if row.factor == NOT_RESCALED:
            statistics = with_rstd(moments_of(row.hi, row.lo, 0.0, element), element(row.rstd))
            normalise(operands, (Placed(at, statistics),), start, width, streaming)
        else:
            normalise_rescaled(operands, Span(at, start, width), row)

    return find_moments, find_statistics, normalise_part


def backward(
    dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask, dtotal_dtype=None
):
    """One iteration owns a segment of a row in the first loop, and in the second some columns of all rows.

    Of those it writes dx, and with `last` dweight and dbias. Between calls for rows of the same problem, sums has what they
    are so far, and is begun by the one whose `first` is 0; in a call for all rows it may be empty.
    """
    element = dtype.type
    with_dx, with_dweight, with_dbias = output_mask
    needs_statistics, has_mean = with_dx or with_dweight, is_centred(statistics_from)
    find_sums, find_known = _statistics_steps(x_dtype, dtype, statistics_from, output_mask)
    find_gradients = _gradients_step(needs_statistics)

    def kernel(dy, x, weight, eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias):
        rows, cols = x.shape
        segments = -(-cols // SEGMENT)
        group_rows = smaller(rows, larger(1, LONG_GROUP_ELEMENTS // cols))
        weight_or_none = pointer(weight) if has_weight else None
        dx_or_none = pointer(dx) if with_dx else None
        mean_or_none = pointer(mean) if has_mean else None
        operands = BackwardOperands(
            operand(dy, element), operand_beside(dy, element), operand(x, element), weight_or_none, dx_or_none, None, None,
            mean_or_none, pointer(rstd), cols, eps,
        )  # fmt: skip
        of_segments = np.empty(SEGMENT_NUMBERS * group_rows * segments)
        of_rows = np.empty(KNOWN_NUMBERS * rows, element)
        of_rescaled = np.empty(KEPT * rows)

        # statistics and means of each row
        for group in range(0, rows if needs_statistics else 0, group_rows):
            count = smaller(group_rows, rows - group)
            for task in prange(count * segments):
                thread_mode, pinned = standard_mode(operands)
                parts = segments_in(pointer(of_segments), group_rows * segments)
                find_sums(pinned, group + task // segments, task % segments * SEGMENT, parts, task)
                restore_mode(thread_mode)
            thread_mode, pinned = standard_mode(operands)
            parts = segments_in(pointer(of_segments), group_rows * segments)
            known = known_in(pointer(of_rows), rows)
            for i in range(count):
                find_known(pinned, group + i, parts, i * segments, known, pointer(of_rescaled))
            restore_mode(thread_mode)

        # the gradients of some columns
        task_cols = COLUMNS * larger(1, STREAMED_TASK_ELEMENTS // (COLUMNS * rows))
        for task in prange(-(-cols // task_cols)):
            # which may raise
            own_sums = np.empty(0 if sums.size > 0 else 2 * COLUMNS)
            thread_mode, pinned = standard_mode(operands)
            known = known_in(pointer(of_rows), rows)
            for start in range(task * task_cols, smaller((task + 1) * task_cols, pinned.cols), COLUMNS):
                # not before this loop: what no statement of it names, Numba frees before it
                if sums.size > 0:
                    dweight_room, dbias_room, sums_at = pointer(sums[0]), pointer(sums[-1]), start
                else:
                    dweight_room, dbias_room, sums_at = pointer(own_sums), pointer(own_sums[COLUMNS:]), 0
                columns = Columns(start, smaller(COLUMNS, pinned.cols - start), sums_at)
                dweight_sums = dweight_room if with_dweight else None
                dbias_sums = dbias_room if with_dbias else None
                summing = with_sums(pinned, dweight_sums, dbias_sums)
                if first == 0:
                    clear(summing, columns)
                find_gradients(summing, rows, columns, known, pointer(of_rescaled), streaming)
                if last:
                    store_sums(summing, columns, pointer(dweight), pointer(dbias), streaming)
            restore_mode(thread_mode)
            if streaming:
                fence()

    return kernel


@inlined
def store_sums(operands, columns, dweight, dbias, streaming):
    """Write the sums of some columns, rounded once."""
    for j in range(0, columns.cols, 16):
        at, k, width = columns.sums_at + j, columns.first + j, columns.cols - j
        store_total(operands.dweight, at, 1, 0, streaming, dweight, k, width)
        store_total(operands.dbias, at, 1, 0, streaming, dbias, k, width)


@functools.cache
def _statistics_steps(x_dtype, dtype, statistics_from, output_mask):
    """What finds the sums of a segment, and what is known of a row from them."""
    element = dtype.type
    is_given, has_mean = are_given(statistics_from), is_centred(statistics_from)
    mode, find, bounds = finds_moments(statistics_from, x_dtype, dtype)
    with_dx = output_mask[0]
    has_sums, find_both = in_one_sweep(statistics_from, dtype, output_mask), finds_both(statistics_from)
    has_shift = has_mean and not is_given

    @inlined
    def shift_of(operands, r):
        return first_gradient(operands.dy, operands.weight, r * operands.cols, element) if has_shift else element(0)

    @inlined
    def find_sums(operands, r, start, parts, task):
        """The moments and the sums of g of the segment of row r that starts at the column `start`."""
        dy, x, weight = operands.dy, operands.x, operands.weight
        span = Span(r * operands.cols + start, start, smaller(SEGMENT, operands.cols - start))
        sums = Sums(0.0, 0.0)
        if is_given:
            found = given_moments(operands.mean, r, element)
            rstd = element(operands.rstd[r])
        elif has_sums:
            found, sums = find_both(dy, x, weight, span, shift_of(operands, r), mode, AHEAD)
        else:
            found = find(x, span, mode, AHEAD)
            rstd = rstd_of(found.variance, operands.eps, element)
        if with_dx and not has_sums:
            # a segment may be constant where its row is not
            near_one = with_rstd(found, usable(rstd, element))
            sums = gradient_sums(dy, x, weight, span, near_one, shift_of(operands, r), AHEAD, is_given)
            sums = Sums(sums.g if has_mean else 0.0, sums.projected)
        store_segment(parts, task, found, sums)

    @inlined
    def find_known(operands, r, parts, first, known, kept):
        """The statistics and the means of row r, from its segments, of which the first is `first`."""
        found, sums = merged(parts, first, SEGMENT, operands.cols)
        if is_given or is_ordinary(found.variance, operands.eps, bounds):
            rstd = element(operands.rstd[r]) if is_given else rstd_of(found.variance, operands.eps, element)
            store_row(known.statistics, r, with_rstd(moments_of(found.hi, found.lo, 0.0, element), rstd))
            if with_dx:
                store_row(known.means, r, means_of(shift_of(operands, r), sums, rstd, operands.cols, element))
            store(kept, r * KEPT, NOT_RESCALED)
        else:
            at = r * operands.cols
            row = rescaled(operands.x, at, operands.cols, operands.eps, has_mean)
            store_rescaled(kept, r, row)
            store_rescaled_means(kept, r, means_rescaled(operands, at, row, has_mean))

    return find_sums, find_known


@functools.cache
def _gradients_step(needs_statistics):
    @inlined
    def is_rescaled(kept, r):
        return needs_statistics and kept[r * KEPT] != NOT_RESCALED

    @inlined
    def find_gradients(operands, rows, columns, known, kept, streaming):
        """Those of some columns of all rows."""
        r = 0
        while r < rows:
            if is_rescaled(kept, r):
                at = r * operands.cols + columns.first
                gradients_rescaled(operands, at, columns, kept_rescaled(kept, r), kept_rescaled_means(kept, r))
                r += 1
            else:
                end = r + 1
                while end - r < GROUP_ROWS and end < rows and not is_rescaled(kept, end):
                    end += 1
                together = Rows(columns.first, operands.cols, r, end)
                gradients(operands, together, columns, known, None, streaming)
                r = end

    return find_gradients
