"""The kernels, each made by a factory with the arguments of those in `whole_rows`.

They have the formulas of those, and operands of three dimensions. Of blocks of `width` rows, a call works on those from
`begin` to `end`. `lead` rows less are in the first block behind each index before the axis, so that the others begin with a
cache line of y: written past the caches, parts of lines take 1.2 to 1.35 times as long. A backward has none, since the bits
of dweight and dbias would depend on it.
"""

import functools

from numba import prange

from nbnorm.cpu.kernels.channels_first.blocks import (
    Layout,
    are_all_ordinary,
    block_of,
    gather,
    ordinary_until,
    part_from,
    room_for_known,
    room_for_sums,
)
from nbnorm.cpu.kernels.channels_first.gradients import gradients_of_mixed, gradients_of_part
from nbnorm.cpu.kernels.channels_first.means import find_means, take_statistics
from nbnorm.cpu.kernels.channels_first.normalise import normalise_mixed, normalise_part
from nbnorm.cpu.kernels.channels_first.statistics import finds_statistics, store_all_statistics
from nbnorm.cpu.kernels.gradients import BackwardOperands, Columns, Results, add_blocks, clear
from nbnorm.cpu.kernels.modes import VARIANCE_BOUNDS, are_given, is_centred, mode_of
from nbnorm.cpu.kernels.normalise import ForwardOperands
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
    scratch,
    shape_of,
    smaller,
    standard_mode,
)
from nbnorm.cpu.sizes import STREAMED_TASK_ELEMENTS, TASK_ELEMENTS, buffer_elements


def forward(x_dtype, dtype, has_weight, has_bias, variance, residual_dtype=None, with_total=False):
    """One iteration owns some blocks."""
    buffer = buffer_elements(dtype, 1)
    blocks_from = _forward(x_dtype, dtype, variance, buffer)
    element, has_mean = dtype.type, is_centred(variance)

    def kernel(x, weight, bias, eps, streaming, y, mean, rstd, width, lead, begin, end):
        _, cols, pitch = shape_of(x)
        weight_or_none = pointer(weight) if has_weight else None
        bias_or_none = pointer(bias) if has_bias else None
        mean_or_none = pointer(mean) if has_mean else None
        operands = ForwardOperands(
            added(operand(x, element), operand_beside(x, element)), weight_or_none, bias_or_none, pointer(y),
            pointer_beside(y), mean_or_none, pointer(rstd), rstd.size > 0, pitch, cols, eps,
        )  # fmt: skip
        layout = Layout(cols, pitch, width, buffer // width & -8, lead)
        task_blocks = larger(1, (STREAMED_TASK_ELEMENTS if streaming else TASK_ELEMENTS) // (cols * width))
        for task in prange(-(-(end - begin) // task_blocks)):
            thread_mode, (pinned, pinned_layout) = standard_mode((operands, layout))
            first = begin + task * task_blocks
            blocks_from(pinned, pinned_layout, first, smaller(first + task_blocks, end), streaming)
            restore_mode(thread_mode)
            if streaming:
                fence()

    return kernel


def backward(
    dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask, dtotal_dtype=None
):
    """One iteration owns `sum_blocks` blocks, whose dweight and dbias are summed together, as `loops.backward` has rows.

    Of the blocks of the whole problem, the arrays hold those from `first` on.
    """
    buffer = buffer_elements(dtype, 2)
    blocks_from = _backward(x_dtype, dtype, statistics_from, output_mask, buffer)
    element, has_mean = dtype.type, is_centred(statistics_from)
    with_dx, with_dweight, with_dbias = output_mask
    has_sums = with_dweight or with_dbias

    def kernel(
        dy, x, weight, eps, mean, rstd, first, sum_blocks, last, streaming, dx, sums, dweight, dbias, width, begin, end
    ):  # fmt: skip
        _, cols, pitch = x.shape
        blocks = sums.shape[1]
        weight_or_none = pointer(weight) if has_weight else None
        dx_or_none = pointer(dx) if with_dx else None
        dweight_sums = pointer(sums[0]) if with_dweight else None
        dbias_sums = pointer(sums[-1]) if with_dbias else None
        mean_or_none = pointer(mean) if has_mean else None
        operands = BackwardOperands(
            operand(dy, element), operand_beside(dy, element), operand(x, element), weight_or_none, dx_or_none,
            dweight_sums, dbias_sums, mean_or_none, pointer(rstd), cols, eps,
        )  # fmt: skip
        layout = Layout(cols, pitch, width, buffer // width & -8, 0)
        for s in prange((first + begin) // sum_blocks, -(-(first + end) // sum_blocks)):
            thread_mode, (pinned, pinned_layout) = standard_mode((operands, layout))
            columns = Columns(0, pinned.cols, s * pinned.cols)
            start = s * sum_blocks - first
            if start >= begin:
                clear(pinned, columns)
            blocks_from(pinned, pinned_layout, columns, larger(start, begin), smaller(start + sum_blocks, end), streaming)
            restore_mode(thread_mode)
            if streaming:
                fence()

        # the sums of all blocks
        if has_sums and last:
            results = Results(dweight_sums, dbias_sums, pointer(dweight), pointer(dbias), cols)
            for c in prange(-(-cols // 16)):
                thread_mode, pinned_results = standard_mode(results)
                add_blocks(pinned_results, blocks, 16 * c)
                restore_mode(thread_mode)

    return kernel


@functools.cache
def _forward(x_dtype, dtype, variance, buffer):
    element = dtype.type
    has_mean, bounds = is_centred(variance), VARIANCE_BOUNDS[dtype.name]
    find_statistics = finds_statistics(mode_of(variance, x_dtype, dtype))

    @inlined
    def blocks_from(operands, layout, begin, end, streaming):
        xs = scratch(buffer, element)
        sums, statistics = room_for_sums(), room_for_known(element).statistics
        for b in range(begin, end):
            block = block_of(layout, b)
            find_statistics(operands.x, layout, block, operands.eps, xs, sums, statistics)
            store_all_statistics(operands, block, sums, statistics)

            for c in range(0, layout.cols, layout.held):
                part = part_from(layout, c)
                if layout.held < layout.cols:
                    gather(operands.x, layout, block, part, xs)
                j = 0
                while j < block.count:
                    stop = ordinary_until(j, block, operands.eps, bounds, sums)
                    normalise_part(operands, layout, block, part, (j, stop), xs, statistics, streaming)
                    j = stop + 16

            for j in range(0, block.count, 16):
                if not are_all_ordinary(sums, j, operands.eps, bounds):
                    normalise_mixed(operands, layout, block, j, bounds, has_mean, sums, statistics)

    return blocks_from


@functools.cache
def _backward(x_dtype, dtype, statistics_from, output_mask, buffer):
    element = dtype.type
    is_given, has_mean, bounds = are_given(statistics_from), is_centred(statistics_from), VARIANCE_BOUNDS[dtype.name]
    with_dx, with_dweight, _ = output_mask
    needs_x = with_dx or with_dweight
    is_found = needs_x and not is_given
    find_statistics = finds_statistics(mode_of(statistics_from, x_dtype, dtype))

    @inlined
    def blocks_from(operands, layout, columns, begin, end, streaming):
        xs, dys = scratch(buffer, element), scratch(buffer, element)
        sums, known = room_for_sums(), room_for_known(element)
        for b in range(begin, end):
            block = block_of(layout, b)
            if is_found:
                find_statistics(operands.x, layout, block, operands.eps, xs, sums, known.statistics)
            elif needs_x:
                take_statistics(operands, block, known.statistics)
            if with_dx:
                find_means(operands, layout, block, has_mean, is_given, (xs, dys, sums), known)

            for c in range(0, layout.cols, layout.held):
                part = part_from(layout, c)
                # what the steps before have not left in the buffers
                if not with_dx or layout.held < layout.cols:
                    gather(operands.dy, layout, block, part, dys)
                if needs_x and ((is_given and not with_dx) or layout.held < layout.cols):
                    gather(operands.x, layout, block, part, xs)
                j = 0
                while j < block.count:
                    stop = ordinary_until(j, block, operands.eps, bounds, sums) if is_found else block.count
                    gradients_of_part(operands, layout, block, part, (j, stop), (xs, dys), known, columns, streaming)
                    j = stop + 16

            if is_found:
                for j in range(0, block.count, 16):
                    if not are_all_ordinary(sums, j, operands.eps, bounds):
                        gradients_of_mixed(operands, layout, block, j, bounds, has_mean, (sums, known), columns)

    return blocks_from
