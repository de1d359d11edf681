"""A call in blocks of rows: who works on them, and on which.

Blocks may be copied to and from buffers, which takes longer than a kernel. So our threads work on whole blocks, each with
buffers of its own: none waits for another at the end of a block, as Numba's threads would. Where the order of the blocks
matters, they follow each other, and who works is asked again for each.
"""

from collections import deque
from functools import partial
from time import perf_counter

from nbnorm.cpu import choice, sizes
from nbnorm.cpu.staging import row_blocks
from nbnorm.cpu.workers import parallel, threads
from nbnorm.cpu.workers.parallel import NUMBAS, ONE, OURS

# below this many elements a second thread costs more than it saves
ELEMENTS = 1 << 17
# elements of all threads' buffers for an operand, together
BUFFERS_ELEMENTS = 1 << 21
# long rows for each thread from which on ours are as fast as Numba's, which share each of them: the last ones leave a thread
# without work
LONG_ROWS = 8


def run(problem, order, limit, has_sums, chosen, share, new_buffers, work):
    """Call `work(kernel, buffers, index, rows, last)` for all rows, in blocks of at most `limit`.

    `chosen` is the kernel, of `choice`, `share` its function in `threads`, and `new_buffers(limit)` makes
    buffers for so many rows. With `has_sums`, kernels add to sums of blocks of `sizes.block_rows`, each of which is one
    thread's; where no call was told that it is the `last`, they are still to be added up. Returns who worked, and with which
    kernel, or None for it where our threads have shared the blocks.
    """
    is_copied = limit < problem.rows
    is_long = problem.cols > sizes.LONG_ROW
    elements = problem.rows * problem.cols
    # the sums of a long row's elements go over all rows
    can_be_shared = not (is_long and has_sums)
    if is_long and not is_copied and can_be_shared:
        # the rows that a kernel works on together: a stall in one of its calls is noticed before the next
        limit = min(problem.rows, max(1, sizes.LONG_GROUP_ELEMENTS // problem.cols))
    count = 1
    if can_be_shared and limit < problem.rows and order in (0, None):
        count = _sharers(problem, limit, is_copied)
    if count == 1:
        buffers = new_buffers(limit)
        for index, rows in row_blocks(problem.batch, limit, order):
            workers = parallel.workers(elements)
            kernel = kernel_for(workers, chosen, share if can_be_shared else None)
            work(kernel, buffers, index, rows, rows.stop == problem.rows)
        return workers, kernel

    kernel = kernel_for(ONE, chosen, None)
    kind = parallel.kind_of(limit, problem.cols)
    if not is_copied:
        limit = max(1, threads.PIECE_ELEMENTS // problem.cols)
    unused = deque(new_buffers(limit) for _ in range(count))

    def work_on(blocks):
        buffers = unused.pop()
        for index, rows in blocks:
            work(kernel, buffers, index, rows, False)
        unused.append(buffers)

    if has_sums:
        step = sizes.block_rows(problem.rows, problem.cols)
        step *= max(1, limit // step)
        spans = [slice(start, min(start + step, problem.rows)) for start in range(0, problem.rows, step)]
        pieces = [(row_blocks(problem.batch, limit, span=span),) for span in spans]
    else:
        pieces = [([block],) for block in row_blocks(problem.batch, limit)]
    start = perf_counter()
    threads.share(work_on, pieces, count)
    if not is_copied:
        parallel.keep(parallel.shortest_without(chosen), kind, (perf_counter() - start) / elements)
    return OURS, None


def kernel_for(workers, chosen, share):
    """A kernel for who works; `share` is None where it has no pieces for our threads."""
    kernel = choice.ready(chosen, workers == NUMBAS)
    if workers == NUMBAS:
        return parallel.watched(chosen, kernel)
    if workers == OURS:
        return partial(parallel.timed, parallel.shortest_without(chosen), partial(share, kernel) if share else kernel)
    return kernel


def _sharers(problem, limit, is_copied):
    """How many of our threads share the blocks, 1 where they are worked on one after another."""
    elements = problem.rows * problem.cols
    if elements < max(ELEMENTS, parallel.from_elements):
        return 1
    count = parallel.our_threads()
    if is_copied:
        return max(1, min(count, BUFFERS_ELEMENTS // (limit * problem.cols)))
    return count if problem.rows >= LONG_ROWS * count or parallel.workers(elements) == OURS else 1
