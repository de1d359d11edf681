"""The loops over rows that a kernel is, for rows that fit a core's cache: whole ones and short ones differ in an iteration.

`choice` says which kernel a call needs, and has it compiled, for one pinned signature: C-contiguous arrays, inputs declared
read-only, which both writable and read-only arrays match. `dtype` is what a kernel computes in, the widest of all operands,
and what weight and bias have; the rows may be narrower. What a kernel does not need (`has_weight=False`, say) it takes as an
empty array. For x plus a residual, x is a tuple of both, and y one of y and the total where that is written; dy is one of dy
and dtotal where dx has that added.

The parallel build of a kernel gives the bits of the serial one: what is split, and where, depends on the shape alone. What
one iteration does is a function of its own, of the same compile-time choices, which both builds share: it is typed and
lowered once.

The floating-point mode is a thread's own, and may be any. So all arithmetic, in a `prange` and between two, comes after a
`standard_mode`, on the operands that it gives, and before a `restore_mode`; nothing between them raises.
"""

from numba import prange

from nbnorm.cpu.kernels.gradients import BackwardOperands, Columns, Results, add_blocks, clear
from nbnorm.cpu.kernels.normalise import ForwardOperands
from nbnorm.cpu.lanes import lowering  # noqa: F401  teaches Numba the operations on lanes
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
)
from nbnorm.cpu.sizes import STREAMED_TASK_ELEMENTS, TASK_ELEMENTS


def forward(rows_from, element, has_weight, has_bias, has_mean):
    """One iteration owns some rows, for which it calls `rows_from(operands, begin, end, streaming)`."""

    def kernel(x, weight, bias, eps, streaming, y, mean, rstd):
        rows, cols = shape_of(x)
        weight_or_none = pointer(weight) if has_weight else None
        bias_or_none = pointer(bias) if has_bias else None
        mean_or_none = pointer(mean) if has_mean else None
        operands = ForwardOperands(
            added(operand(x, element), operand_beside(x, element)), weight_or_none, bias_or_none, pointer(y),
            pointer_beside(y), mean_or_none, pointer(rstd), rstd.size > 0, rows, cols, eps,
        )  # fmt: skip
        task_rows = larger(1, (STREAMED_TASK_ELEMENTS if streaming else TASK_ELEMENTS) // cols)
        for task in prange(-(-rows // task_rows)):
            thread_mode, pinned = standard_mode(operands)
            rows_from(pinned, task * task_rows, smaller((task + 1) * task_rows, rows), streaming)
            restore_mode(thread_mode)
            if streaming:
                fence()

    return kernel


def backward(rows_from, element, has_weight, output_mask, has_mean):
    """One iteration owns a block of rows, for which it calls `rows_from(operands, begin, end, columns, streaming)`.

    Block b owns rows b * block_rows to (b + 1) * block_rows of the whole problem, of which x holds those from `first` on. It
    adds dy * x_hat to sums[0, b] and dy to sums[1, b], of which there is only the one that is asked for where the other is
    not; the call that has a block's first row clears its sums. With `last`, the blocks' sums are added up in their order and
    written to dweight and dbias.
    """
    with_dx, with_dweight, with_dbias = output_mask
    has_sums = with_dweight or with_dbias

    def kernel(dy, x, weight, eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias):
        rows, cols = x.shape
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
        for b in prange(first // block_rows, -(-(first + rows) // block_rows)):
            thread_mode, pinned = standard_mode(operands)
            columns = Columns(0, pinned.cols, b * pinned.cols)
            begin, end = b * block_rows - first, (b + 1) * block_rows - first
            if begin >= 0:
                clear(pinned, columns)
            rows_from(pinned, larger(begin, 0), smaller(end, rows), columns, streaming)
            restore_mode(thread_mode)
            if streaming:
                fence()

        # the blocks' sums
        if has_sums and last:
            results = Results(dweight_sums, dbias_sums, pointer(dweight), pointer(dbias), cols)
            for c in prange(-(-cols // 16)):
                thread_mode, pinned_results = standard_mode(results)
                add_blocks(pinned_results, blocks, 16 * c)
                restore_mode(thread_mode)

    return kernel
