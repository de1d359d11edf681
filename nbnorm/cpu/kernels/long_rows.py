"""Kernels for rows that do not fit a core's cache, as factories with the arguments and signatures of those in `kernels`.

A row is split into segments, which all cores share. The statistics of a segment are found while it is in the cache, and
merged into the row's in the order of the segments. The second sweep then reads the row again from where it is.
"""

import numpy as np
from numba import prange

from nbnorm.cpu.kernels import whole_rows
from nbnorm.cpu.kernels.rescaled import gradient_means_rescaled, gradients_rescaled, normalise_rescaled, rescaled
from nbnorm.cpu.kernels.rows import (
    HI,
    LO,
    PARTS,
    PROJECTED,
    SUM_G,
    TWO_SWEEPS,
    VARIANCE,
    add_blocks,
    clear,
    compensated,
    first_gradient,
    gradient_sums,
    gradients,
    merged,
    normalise,
    remember,
    rest_of,
    split,
    statistics,
    statistics_and_sums,
    usable,
)
from nbnorm.cpu.kernels.whole_rows import AHEAD, GROUP_ROWS, STREAMED_TASK_ELEMENTS
from nbnorm.cpu.lanes.meaning import fence, larger, pointer, restore_mode, smaller, standard_mode
from nbnorm.cpu.sizes import LONG_GROUP_ELEMENTS

SEGMENT = 1 << 14
# what is kept of a row that is rescaled, beside HI and LO; FACTOR is 0 for the others
RSTD, G_HI, G_LO, FACTOR, SCALED_RSTD, MEAN_GX, RESCALED = range(2, 9)
# columns whose dweight and dbias a thread sums over all rows: their float64 sums take 32 KiB of the first-level cache, and a
# backward at (16, 2^20) 0.9 of the time that it takes with twice as many
COLUMNS = 1 << 11


def forward(x_dtype, dtype, has_weight, has_bias, variance):
    """One iteration owns a segment: of its statistics in the first loop, of y in the second."""
    element = dtype.type
    mode = whole_rows.mode_of(variance, x_dtype, dtype)
    smallest, largest = whole_rows.VARIANCE_BOUNDS[dtype.name]

    def kernel(x, weight, bias, given_eps, streaming, y, mean, rstd):
        rows, row_size = x.shape
        segments = -(-row_size // SEGMENT)
        group_rows = smaller(rows, larger(1, LONG_GROUP_ELEMENTS // row_size))
        weight_or_none = pointer(weight) if has_weight else None
        bias_or_none = pointer(bias) if has_bias else None
        operands = pointer(x), pointer(y), weight_or_none, bias_or_none, row_size, given_eps
        parts = np.empty((group_rows, segments * PARTS))
        state = np.empty((group_rows, RESCALED))
        for first in range(0, rows, group_rows):
            count = smaller(group_rows, rows - first)

            # statistics
            for task in prange(count * segments):
                thread_mode, (x_, y_, weight_, bias_, cols, eps) = standard_mode(operands)
                i, s = task // segments, task % segments
                start = s * SEGMENT
                at = (first + i) * cols + start
                width = smaller(SEGMENT, cols - start)
                if mode == TWO_SWEEPS:
                    hi, lo, var = compensated(x_, at, width, element, AHEAD)
                else:
                    hi, lo, var = statistics(x_, at, width, element, mode, AHEAD)
                parts[i, PARTS * s + HI] = hi
                parts[i, PARTS * s + LO] = lo
                parts[i, PARTS * s + VARIANCE] = var
                restore_mode(thread_mode)
            thread_mode, (x_, y_, weight_, bias_, cols, eps) = standard_mode(operands)
            for i in range(count):
                hi64, lo64, var, _, _ = merged(pointer(parts[i]), SEGMENT, cols)
                # NaN fails the comparison too
                if smallest <= var + eps <= largest:
                    factor, scale64 = 0.0, np.float64(element(1.0 / np.sqrt(var + eps)))
                    row_mean, row_rstd = hi64 + lo64, scale64
                else:
                    factor, hi64, lo64, scale64, row_mean, row_rstd = rescaled(x_, (first + i) * cols, cols, eps)
                state[i, HI], state[i, LO], state[i, RSTD], state[i, FACTOR] = hi64, lo64, scale64, factor
                if mean.size > 0:
                    mean[first + i] = row_mean
                    rstd[first + i] = row_rstd
            restore_mode(thread_mode)

            # normalise and store
            tasks = -(-row_size // STREAMED_TASK_ELEMENTS)
            for task in prange(count * tasks):
                thread_mode, (x_, y_, weight_, bias_, cols, eps) = standard_mode(operands)
                i = task // tasks
                start = task % tasks * STREAMED_TASK_ELEMENTS
                width = smaller(STREAMED_TASK_ELEMENTS, cols - start)
                at = (first + i) * cols + start
                hi64, lo64, scale64, factor = state[i, HI], state[i, LO], state[i, RSTD], state[i, FACTOR]
                if factor == 0.0:
                    hi, lo = split(hi64, lo64, element)
                    scale = element(scale64)
                    row = at, hi, rest_of(lo, scale), scale
                    normalise(x_, (row,), width, weight_, bias_, start, element, streaming, y_)
                else:
                    normalise_rescaled(x_, at, width, factor, hi64, lo64, scale64, weight_, bias_, start, y_)
                restore_mode(thread_mode)
                if streaming:
                    fence()

    return kernel


def backward(dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask):
    """One iteration owns a segment of a row in the first loop, and in the second some columns of all rows.

    Of those it writes dx, and with `last` dweight and dbias. Between calls for rows of the same problem, sums has what they
    are so far, and is begun by the one whose `first` is 0; in a call for all rows it may be empty.
    """
    element = dtype.type
    is_given = statistics_from == "given"
    mode = whole_rows.mode_of(statistics_from, x_dtype, dtype)
    smallest, largest = whole_rows.VARIANCE_BOUNDS[dtype.name]
    with_dx, with_dweight, with_dbias = output_mask
    needs_statistics = with_dx or with_dweight
    in_one_sweep = with_dx and not is_given and dtype == np.float32

    def kernel(dy, x, weight, given_eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias):
        rows, row_size = x.shape
        segments = -(-row_size // SEGMENT)
        group_rows = smaller(rows, larger(1, LONG_GROUP_ELEMENTS // row_size))
        weight_or_none = pointer(weight) if has_weight else None
        dx_or_none = pointer(dx) if with_dx else None
        operands = pointer(dy), pointer(x), weight_or_none, dx_or_none, row_size, given_eps
        parts = np.empty((group_rows, segments * PARTS))
        # what `gradients` takes of each row
        row_statistics = np.empty((3, rows), element)
        row_means = np.empty((3, rows), element)
        rescaled_state = np.empty((rows, RESCALED))

        # statistics and means of each row
        for group in range(0, rows if needs_statistics else 0, group_rows):
            count = smaller(group_rows, rows - group)
            for task in prange(count * segments):
                thread_mode, (dy_, x_, weight_, dx_, cols, eps) = standard_mode(operands)
                i, s = task // segments, task % segments
                start = s * SEGMENT
                width = smaller(SEGMENT, cols - start)
                at = (group + i) * cols + start
                sums_of_g = 0.0, 0.0
                if is_given:
                    hi, lo = split(np.float64(mean[group + i]), 0.0, element)
                    var = 0.0
                elif mode == TWO_SWEEPS:
                    hi, lo, var = compensated(x_, at, width, element, AHEAD)
                elif in_one_sweep:
                    shift = first_gradient(dy_, at - start, weight_, element)
                    hi, lo, var, sums_of_g = statistics_and_sums(
                        dy_, x_, at, width, shift, weight_, start - at, element, mode, AHEAD
                    )
                else:
                    hi, lo, var = statistics(x_, at, width, element, mode, AHEAD)
                if with_dx and not in_one_sweep:
                    shift = element(0) if is_given else first_gradient(dy_, at - start, weight_, element)
                    # a segment may be constant where its row is not
                    near_one = usable(element(rstd[group + i] if is_given else 1.0 / np.sqrt(var + eps)), element)
                    rest = rest_of(lo, near_one)
                    sums_of_g = gradient_sums(
                        dy_, x_, at, width, hi, rest, near_one, shift, weight_, start, element, AHEAD, is_given
                    )
                parts[i, PARTS * s + HI] = hi
                parts[i, PARTS * s + LO] = lo
                parts[i, PARTS * s + VARIANCE] = var
                parts[i, PARTS * s + SUM_G], parts[i, PARTS * s + PROJECTED] = sums_of_g
                restore_mode(thread_mode)
            thread_mode, (dy_, x_, weight_, dx_, cols, eps) = standard_mode(operands)
            for i in range(count):
                r = group + i
                hi64, lo64, var, sum_g, projected = merged(pointer(parts[i]), SEGMENT, cols)
                hi, lo = split(hi64, lo64, element)
                scale = element(rstd[r]) if is_given else element(1.0 / np.sqrt(var + eps))
                if is_given or smallest <= var + eps <= largest:
                    row_statistics[0, r], row_statistics[1, r], row_statistics[2, r] = hi, rest_of(lo, scale), scale
                    if with_dx:
                        shift = element(0) if is_given else first_gradient(dy_, r * cols, weight_, element)
                        remember(
                            (row_means[0], row_means[1], row_means[2]), r, scale, shift, (sum_g, projected), cols, element
                        )
                    rescaled_state[r, FACTOR] = 0.0
                else:
                    at = r * cols
                    factor, hi64, lo64, scale64, _, rstd64 = rescaled(x_, at, cols, eps)
                    g_hi, g_lo, mean_gx = gradient_means_rescaled(dy_, x_, at, cols, factor, hi64, lo64, scale64, weight_)
                    rescaled_state[r, FACTOR] = factor
                    rescaled_state[r, HI] = hi64
                    rescaled_state[r, LO] = lo64
                    rescaled_state[r, SCALED_RSTD] = scale64
                    rescaled_state[r, RSTD] = rstd64
                    rescaled_state[r, G_HI] = g_hi
                    rescaled_state[r, G_LO] = g_lo
                    rescaled_state[r, MEAN_GX] = mean_gx
            restore_mode(thread_mode)

        # the gradients of some columns
        task_cols = COLUMNS * larger(1, STREAMED_TASK_ELEMENTS // (COLUMNS * rows))
        for task in prange(-(-row_size // task_cols)):
            statistics_ = pointer(row_statistics[0]), pointer(row_statistics[1]), pointer(row_statistics[2])
            means_ = pointer(row_means[0]), pointer(row_means[1]), pointer(row_means[2])
            # which may raise
            own_sums = np.empty(0 if sums.size > 0 else 2 * COLUMNS)
            thread_mode, (dy_, x_, weight_, dx_, cols, eps) = standard_mode(operands)
            for start in range(task * task_cols, smaller((task + 1) * task_cols, cols), COLUMNS):
                width = smaller(COLUMNS, cols - start)
                if sums.size > 0:
                    dweight_room, dbias_room, sums_at = pointer(sums[0]), pointer(sums[-1]), start
                else:
                    dweight_room, dbias_room, sums_at = pointer(own_sums), pointer(own_sums[COLUMNS:]), 0
                dweight_sums = dweight_room if with_dweight else None
                dbias_sums = dbias_room if with_dbias else None
                if first == 0:
                    clear(dweight_sums, sums_at, width)
                    clear(dbias_sums, sums_at, width)
                # no literal 0, for which Numba would compile `gradients` twice
                r = rows - rows
                while r < rows:
                    at = r * cols + start
                    if needs_statistics and rescaled_state[r, FACTOR] != 0.0:
                        row = rescaled_state[r]
                        gradients_rescaled(
                            dy_, x_, at, width, row[FACTOR], row[HI], row[LO], row[SCALED_RSTD],
                            row[RSTD], row[G_HI], row[G_LO], row[MEAN_GX], weight_, start,
                            dx_, dweight_sums, dbias_sums, sums_at,
                        )  # fmt: skip
                        r += 1
                        continue
                    count = 1
                    while count < GROUP_ROWS and r + count < rows:
                        if needs_statistics and rescaled_state[r + count, FACTOR] != 0.0:
                            break
                        count += 1
                    gradients(
                        dy_, x_, start, cols, r, r + count, width, None, statistics_, means_, weight_, start, element,
                        streaming, dx_, dweight_sums, dbias_sums, sums_at,
                    )  # fmt: skip
                    r += count
                if last:
                    for j in range(0, width, 16):
                        add_blocks(dweight_sums, sums_at + j, 1, 0, streaming, pointer(dweight), start + j, width - j)
                        add_blocks(dbias_sums, sums_at + j, 1, 0, streaming, pointer(dbias), start + j, width - j)
            restore_mode(thread_mode)
            if streaming:
                fence()

    return kernel
