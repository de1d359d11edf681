"""Kernels for short rows, as factories with the arguments and signatures of those in `kernels`.

Sixteen rows at a time go through each step. `kernels` gives the same bits for rows of any length, but not of 16 bits.
"""

import numpy as np
from numba import prange

from nbnorm.cpu.kernels import whole_rows
from nbnorm.cpu.kernels.rescaled import row_gradients_rescaled, row_rescaled
from nbnorm.cpu.kernels.rows import (
    DIFF_OF_SQUARES,
    DIFF_OF_SQUARES_64,
    FLOAT32_SUMS,
    FLOAT64_SUMS,
    FLOAT64_SUMS_64,
    TWO_SWEEPS,
    add_blocks,
    clear,
    gradients_of_rows,
    normalise,
    rest_of,
    split,
)
from nbnorm.cpu.kernels.sixteen_rows import (
    ROWS,
    SUMS_SIZE,
    compensated_of_rows,
    means_of_rows,
    normalise_rows,
    statistics_of_rows,
)
from nbnorm.cpu.kernels.whole_rows import AHEAD, GROUP_ROWS, STREAMED_TASK_ELEMENTS, TASK_ELEMENTS
from nbnorm.cpu.lanes.meaning import fence, larger, pointer, restore_mode, scratch, smaller, standard_mode, until_aligned
from nbnorm.cpu.sizes import STREAMED_BYTES


def sums_of(mode, x_dtype, dtype):
    """The type of the sums for statistics, and what `statistics_of_rows` is told of them.

    With 16-bit rows, float32 sums make a forward 1.1 to 1.4 times as fast. float32 rows would gain in the caches alone, and
    lose the last bit of rstd.
    """
    if x_dtype.itemsize == 2 and dtype == np.float32:
        return np.float32, None if mode == DIFF_OF_SQUARES else True, FLOAT32_SUMS
    return np.float64, None, {DIFF_OF_SQUARES: FLOAT64_SUMS, DIFF_OF_SQUARES_64: FLOAT64_SUMS_64}.get(mode)


def forward(x_dtype, dtype, has_weight, has_bias, variance):
    """One iteration owns some rows, of which it takes sixteen at a time."""
    element = dtype.type
    mode = whole_rows.mode_of(variance, x_dtype, dtype)
    sum_type, is_near, limits = sums_of(mode, x_dtype, dtype)
    smallest, largest = whole_rows.VARIANCE_BOUNDS[dtype.name]

    def kernel(x, weight, bias, given_eps, streaming, y, mean, rstd):
        rows, row_size = x.shape
        weight_or_none = pointer(weight) if has_weight else None
        bias_or_none = pointer(bias) if has_bias else None
        operands = pointer(x), pointer(y), weight_or_none, bias_or_none, row_size, given_eps
        ahead = row_size * -(-AHEAD // row_size)
        task_rows = larger(1, (STREAMED_TASK_ELEMENTS if streaming else TASK_ELEMENTS) // row_size)
        # column by column, a line that leaves the caches leaves in pieces, unless a row is one column of lanes: in pairs, a
        # call takes 0.65 of the time there
        is_by_columns = row_size <= 16 or not (streaming or y.size * y.itemsize >= STREAMED_BYTES)
        for task in prange(-(-rows // task_rows)):
            thread_mode, (x_, y_, weight_, bias_, cols, eps) = standard_mode(operands)
            scratch_sums = scratch(SUMS_SIZE, np.float64)
            means, variances = scratch(ROWS, np.float64), scratch(ROWS, np.float64)
            his, rests, rstds = scratch(ROWS, element), scratch(ROWS, element), scratch(ROWS, element)
            stop = smaller((task + 1) * task_rows, rows)
            for r in range(task * task_rows, stop, ROWS):
                # statistics of the rows of a group
                at = r * cols
                count = smaller(ROWS, stop - r)
                if mode == TWO_SWEEPS:
                    compensated_of_rows(x_, at, count, cols, element, eps, ahead, (his, rests, rstds), means, variances)
                else:
                    statistics_of_rows(
                        None, x_, at, count, cols, None, element, mode, sum_type, is_near, limits, eps, ahead,
                        scratch_sums, (his, rests, rstds), means, variances, None,
                    )  # fmt: skip

                # normalise and store
                end = 0
                while end < count:
                    begin = end
                    # NaN fails the comparison too
                    while end < count and smallest <= variances[end] + eps <= largest:
                        end += 1
                    alone = begin if is_by_columns else end - ((end - begin) & 1)
                    for i in range(begin, alone, 2):
                        pair = (
                            (at + i * cols, his[i], rests[i], rstds[i]),
                            (at + (i + 1) * cols, his[i + 1], rests[i + 1], rstds[i + 1]),
                        )
                        normalise(x_, pair, cols, weight_, bias_, 0, element, streaming, y_)
                    normalise_rows(x_, at, alone, end, cols, (his, rests, rstds), weight_, bias_, element, streaming, y_)
                    if mean.size > 0:
                        for i in range(begin, end):
                            mean[r + i] = means[i]
                            rstd[r + i] = rstds[i]
                    if end < count:
                        row_mean, row_rstd = row_rescaled(x_, at + end * cols, cols, eps, weight_, bias_, y_)
                        if mean.size > 0:
                            mean[r + end] = row_mean
                            rstd[r + end] = row_rstd
                        end += 1
            restore_mode(thread_mode)
            if streaming:
                fence()

    return kernel


def backward(dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask):
    """One iteration owns a block of rows, of which it takes sixteen at a time, and adds to the block's own sums."""
    element = dtype.type
    is_given = statistics_from == "given"
    mode = whole_rows.mode_of(statistics_from, x_dtype, dtype)
    sum_type, is_near, limits = sums_of(mode, x_dtype, dtype)
    smallest, largest = whole_rows.VARIANCE_BOUNDS[dtype.name]
    with_dx, with_dweight, with_dbias = output_mask
    needs_statistics = with_dx or with_dweight
    in_one_sweep = with_dx and not is_given and dtype == np.float32
    # sixteen elements are a line
    has_lines = x_dtype.itemsize == 4
    has_sums = with_dweight or with_dbias

    def kernel(dy, x, weight, given_eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias):
        rows, row_size = x.shape
        blocks = sums.shape[1]
        weight_or_none = pointer(weight) if has_weight else None
        dx_or_none = pointer(dx) if with_dx else None
        dweight_sums_or_none = pointer(sums[0]) if with_dweight else None
        dbias_sums_or_none = pointer(sums[-1]) if with_dbias else None
        operands = (
            pointer(dy), pointer(x), weight_or_none, dx_or_none, dweight_sums_or_none, dbias_sums_or_none,
            row_size, given_eps,
        )  # fmt: skip
        # as forward, but fewer rows column by column: it takes 0.8 to 0.9 of the time. Two where each line has the end of
        # one sixteen and the beginning of another: only so many lines wait for their second part, and four rows of 32 to
        # 112 take 0.9 to 2 times as long
        has_split_lines = has_lines and row_size % 16 == 0 and until_aligned(dx_or_none, 0) > 0
        together = (2 if has_split_lines else GROUP_ROWS) if streaming and row_size > 16 else ROWS
        ahead = row_size * -(-AHEAD // row_size)
        for b in prange(first // block_rows, -(-(first + rows) // block_rows)):
            thread_mode, (dy_, x_, weight_, dx_, dweight_sums, dbias_sums, cols, eps) = standard_mode(operands)
            scratch_sums = scratch(SUMS_SIZE, np.float64)
            means, variances = scratch(ROWS, np.float64), scratch(ROWS, np.float64)
            his, rests, rstds = scratch(ROWS, element), scratch(ROWS, element), scratch(ROWS, element)
            g_his, g_rests, slopes = scratch(ROWS, element), scratch(ROWS, element), scratch(ROWS, element)
            if b * block_rows >= first:
                clear(dweight_sums, b * cols, cols)
                clear(dbias_sums, b * cols, cols)
            stop = smaller((b + 1) * block_rows - first, rows)
            for r in range(larger(b * block_rows - first, 0), stop, ROWS):
                # statistics of the rows of a group
                at = r * cols
                count = smaller(ROWS, stop - r)
                if needs_statistics and is_given:
                    for i in range(count):
                        hi, lo = split(np.float64(mean[r + i]), 0.0, element)
                        scale = element(rstd[r + i])
                        his[i], rests[i], rstds[i] = hi, rest_of(lo, scale), scale
                elif needs_statistics and mode == TWO_SWEEPS:
                    compensated_of_rows(x_, at, count, cols, element, eps, ahead, (his, rests, rstds), means, variances)
                elif needs_statistics:
                    statistics_of_rows(
                        dy_ if in_one_sweep else None, x_, at, count, cols, weight_, element, mode, sum_type, is_near,
                        limits, eps, ahead, scratch_sums, (his, rests, rstds), means, variances, (g_his, g_rests, slopes),
                    )  # fmt: skip

                # their means
                if with_dx and not in_one_sweep:
                    means_of_rows(
                        dy_, x_, at, count, cols, (his, rests, rstds), is_given, weight_, element, ahead,
                        scratch_sums, (g_his, g_rests, slopes),
                    )  # fmt: skip

                # the gradients of the rows up to one that needs another arithmetic, then of that
                end = 0
                while end < count:
                    begin = end
                    while end < count and (is_given or not needs_statistics or smallest <= variances[end] + eps <= largest):
                        end += 1
                    for i in range(begin, end, together):
                        gradients_of_rows(
                            dy_, x_, at, cols, i, smaller(i + together, end), cols, 0, 0, None, (his, rests, rstds),
                            (g_his, g_rests, slopes), weight_, 0, element, streaming,
                            dx_, dweight_sums, dbias_sums, b * cols,
                        )  # fmt: skip
                    if end < count:
                        row_gradients_rescaled(
                            dy_, x_, at + end * cols, cols, eps, weight_, dx_, dweight_sums, dbias_sums, b * cols
                        )
                        end += 1
            restore_mode(thread_mode)
            if streaming:
                fence()

        # the blocks' sums
        if has_sums and last:
            results = dweight_sums_or_none, dbias_sums_or_none, pointer(dweight), pointer(dbias), row_size
            for c in prange(-(-row_size // 16)):
                thread_mode, (dweight_sums, dbias_sums, dweight_, dbias_, cols) = standard_mode(results)
                j = 16 * c
                add_blocks(dweight_sums, j, blocks, cols, False, dweight_, j, cols - j)
                add_blocks(dbias_sums, j, blocks, cols, False, dbias_, j, cols - j)
                restore_mode(thread_mode)

    return kernel
