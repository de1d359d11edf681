"""The CPU kernels, each made by a factory for one set of compile-time choices.

`choice` says which one a call needs, and has it compiled, for one pinned signature: C-contiguous arrays, inputs declared
read-only, which both writable and read-only arrays match. `dtype` is what a kernel computes in, the widest of all operands,
and what weight and bias have; the rows may be narrower. What a kernel does not need (`has_weight=False`, say) it takes as an
empty array.

The parallel build of a kernel gives the bits of the serial one: what is split, and where, depends on the shape alone.

The floating-point mode is a thread's own, and may be any. So all arithmetic, in a `prange` and between two, comes after a
`standard_mode`, on the operands that it gives, and before a `restore_mode`; nothing between them raises.
"""

import numpy as np
from numba import prange

from nbnorm.cpu.kernels.rescaled import row_gradients_rescaled, row_rescaled
from nbnorm.cpu.kernels.rows import (
    DIFF_OF_SQUARES,
    DIFF_OF_SQUARES_64,
    ONE_SWEEP,
    ONE_SWEEP_64,
    TWO_SWEEPS,
    add_blocks,
    clear,
    compensated,
    first_gradient,
    gradient_sums,
    gradients,
    normalise,
    remember,
    rest_of,
    split,
    statistics,
    statistics_and_sums,
    usable,
)
from nbnorm.cpu.lanes import lowering  # noqa: F401  teaches Numba the operations on lanes
from nbnorm.cpu.lanes.meaning import fence, larger, pointer, restore_mode, scratch, smaller, standard_mode

# where the variance is outside these bounds, a square or a deviation may be 0 or Inf in the type that the kernel computes in
VARIANCE_BOUNDS = {"float32": (2.0**-220, 2.0**210), "float64": (2.0**-960, 2.0**960)}

# elements that are shared out to the threads in one piece; more where the piece ends in a fence, which waits for the memory:
# with 2^12 a streamed copy of 64 MiB takes 1.3 times as long as with 2^16
TASK_ELEMENTS = 1 << 12
STREAMED_TASK_ELEMENTS = 1 << 16
# rows of at most so many elements are normalised in pairs, which read weight and bias once. Of longer ones, a pair's results
# would not be fetched ahead: float16 at (8192, 768) takes 1.15 to 1.3 times as long
PAIRED_COLS = 1 << 8
# how many elements ahead of the statistics memory is read: at least so many, at (4096, 4096) 512 takes 1.1 times as long
AHEAD = 2048
# rows whose dweight and dbias are summed in registers: as many as fit the first-level cache, at most so many
GROUP_ROWS = 4
GROUP_ELEMENTS = 1 << 14


def mode_of(variance, x_dtype, dtype):
    is_diff_of_squares = variance == "diff_of_squares"
    if x_dtype == np.float64:
        return DIFF_OF_SQUARES_64 if is_diff_of_squares else TWO_SWEEPS
    if dtype == np.float64:
        # so much wider than its elements, one sweep is as good as the squares of all
        return ONE_SWEEP_64
    return DIFF_OF_SQUARES if is_diff_of_squares else ONE_SWEEP


def forward(x_dtype, dtype, has_weight, has_bias, variance):
    """One iteration owns some rows, and of each writes y[r] and, where these are not empty, mean[r] and rstd[r].

    Formula: Ba, Kiros and Hinton 2016, eq. 4; `variance` is "centred" or "diff_of_squares".
    """
    element = dtype.type
    mode = mode_of(variance, x_dtype, dtype)
    smallest, largest = VARIANCE_BOUNDS[dtype.name]

    def kernel(x, weight, bias, given_eps, streaming, y, mean, rstd):
        rows, row_size = x.shape
        weight_or_none = pointer(weight) if has_weight else None
        bias_or_none = pointer(bias) if has_bias else None
        operands = pointer(x), pointer(y), weight_or_none, bias_or_none, row_size, given_eps
        ahead = row_size * -(-AHEAD // row_size)
        task_rows = larger(1, (STREAMED_TASK_ELEMENTS if streaming else TASK_ELEMENTS) // row_size)
        for task in prange(-(-rows // task_rows)):
            thread_mode, (x_, y_, weight_, bias_, cols, eps) = standard_mode(operands)
            stop = smaller((task + 1) * task_rows, rows)
            # a row that waits for the other of its pair; not yet one, but no literal 0, for which Numba would compile twice
            is_waiting = False
            waiting = rows, element(0), element(0), element(0)
            for r in range(task * task_rows, stop):
                at = r * cols

                # statistics
                if mode == TWO_SWEEPS:
                    hi, lo, var = compensated(x_, at, cols, element, ahead)
                else:
                    hi, lo, var = statistics(x_, at, cols, element, mode, ahead)

                # normalise and store; NaN fails the comparison too
                if smallest <= var + eps <= largest:
                    scale = element(1.0 / np.sqrt(var + eps))
                    row = at, hi, rest_of(lo, scale), scale
                    if is_waiting:
                        normalise(x_, (waiting, row), cols, weight_, bias_, 0, element, streaming, y_)
                    waiting = row
                    is_waiting = not is_waiting
                    row_mean, row_rstd = np.float64(hi) + np.float64(lo), np.float64(scale)
                else:
                    row_mean, row_rstd = row_rescaled(x_, at, cols, eps, weight_, bias_, y_)
                if is_waiting and (cols > PAIRED_COLS or r + 1 == stop):
                    normalise(x_, (waiting,), cols, weight_, bias_, 0, element, streaming, y_)
                    is_waiting = False
                if mean.size > 0:
                    mean[r] = row_mean
                    rstd[r] = row_rstd
            restore_mode(thread_mode)
            if streaming:
                fence()

    return kernel


def backward(dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask):
    """Gradients of layer norm: one iteration owns a block of rows, writes dx of each and adds to the block's own sums.

    `statistics_from` is "given" or the variance to recompute them by. Block b owns rows b * block_rows to
    (b + 1) * block_rows of the whole problem, of which x holds those from `first` on. It adds dy * x_hat to sums[0, b] and
    dy to sums[1, b], of which there is only the one that is asked for where the other is not; the call that has a block's
    first row clears its sums. With `last`, the blocks' sums are added up in their order and written to dweight and dbias.
    Formula: the derivative of eq. 4 of Ba, Kiros and Hinton 2016, as in llm.c's doc/layernorm.
    """
    element = dtype.type
    is_given = statistics_from == "given"
    mode = mode_of(statistics_from, x_dtype, dtype)
    smallest, largest = VARIANCE_BOUNDS[dtype.name]
    with_dx, with_dweight, with_dbias = output_mask
    needs_statistics = with_dx or with_dweight
    # the means of g and g * x_hat are found with the statistics
    in_one_sweep = with_dx and not is_given and dtype == np.float32
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
        group_rows = larger(1, smaller(GROUP_ROWS, GROUP_ELEMENTS // row_size))
        for b in prange(first // block_rows, -(-(first + rows) // block_rows)):
            thread_mode, (dy_, x_, weight_, dx_, dweight_sums, dbias_sums, cols, eps) = standard_mode(operands)
            his, rests, rstds = scratch(GROUP_ROWS, element), scratch(GROUP_ROWS, element), scratch(GROUP_ROWS, element)
            g_his, g_rests, slopes = scratch(GROUP_ROWS, element), scratch(GROUP_ROWS, element), scratch(GROUP_ROWS, element)
            totals, projected = scratch(GROUP_ROWS, np.float64), scratch(GROUP_ROWS, np.float64)
            if b * block_rows >= first:
                clear(dweight_sums, b * cols, cols)
                clear(dbias_sums, b * cols, cols)
            r = larger(b * block_rows - first, 0)
            stop = smaller((b + 1) * block_rows - first, rows)
            while r < stop:
                # statistics of the rows of a group, up to one that needs another arithmetic
                count = 0
                is_ordinary = True
                while is_ordinary and count < group_rows and r + count < stop:
                    if needs_statistics:
                        if is_given:
                            hi, lo = split(np.float64(mean[r + count]), 0.0, element)
                            scale = element(rstd[r + count])
                        else:
                            at = (r + count) * cols
                            if mode == TWO_SWEEPS:
                                hi, lo, var = compensated(x_, at, cols, element, None)
                            elif in_one_sweep:
                                shift = first_gradient(dy_, at, weight_, element)
                                hi, lo, var, sums_of_g = statistics_and_sums(
                                    dy_, x_, at, cols, shift, weight_, -at, element, mode, None
                                )
                                totals[count], projected[count] = sums_of_g
                            else:
                                hi, lo, var = statistics(x_, at, cols, element, mode, None)
                            is_ordinary = smallest <= var + eps <= largest
                            scale = element(1.0 / np.sqrt(var + eps))
                        his[count], rests[count], rstds[count] = hi, rest_of(lo, scale), scale
                    if is_ordinary:
                        count += 1

                # their means, in a loop of its own: a processor works on several rows while they wait for square roots
                for i in range(count if with_dx else 0):
                    at = (r + i) * cols
                    shift = element(0) if is_given else first_gradient(dy_, at, weight_, element)
                    if in_one_sweep:
                        sums_of_g = totals[i], projected[i]
                    else:
                        scale = usable(rstds[i], element)
                        sums_of_g = gradient_sums(
                            dy_, x_, at, cols, his[i], rests[i], scale, shift, weight_, 0, element, None, is_given
                        )
                    remember((g_his, g_rests, slopes), i, rstds[i], shift, sums_of_g, cols, element)

                # the gradients of the group, then of that row; the next group is fetched meanwhile
                gradients(
                    dy_, x_, r * cols, cols, 0, count, cols, (r + count) * cols, (his, rests, rstds),
                    (g_his, g_rests, slopes), weight_, 0, element, streaming,
                    dx_, dweight_sums, dbias_sums, b * cols,
                )  # fmt: skip
                r += count
                if not is_ordinary:
                    row_gradients_rescaled(dy_, x_, r * cols, cols, eps, weight_, dx_, dweight_sums, dbias_sums, b * cols)
                    r += 1
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
