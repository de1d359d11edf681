"""Threads of our own that share the rows of a call, each running the serial kernel on some: for strided calls and many long
rows, and where Numba's may not run.

The caller and a few daemon threads take pieces of the work, one after another, until there are none. The caller needs no
one: it does all of it where no thread comes, and waits only for those that have begun. So a thread that cannot be started,
that the system lets wait, or that a fork did not bring along costs time at most.
"""

import os
import sys
import threading
from collections import deque
from queue import SimpleQueue

from nbnorm.cpu.workers import parallel

# below this many elements a second thread costs more than it saves, and with smaller pieces the threads wait too often for
# each other's use of the interpreter. On two cores of an AMD EPYC, float32 forward and backward take, in us, one thread,
# two, and two with pieces of 2^14: 52, 74 and 80, 153, 126 and 162 at (512, 768); 106, 90 and 117, 306, 231 and 231 at
# (1024, 768)
ELEMENTS = 1 << 19
PIECE_ELEMENTS = 1 << 18
# pieces of a large call for each thread, so that one which is late leaves most of its share to the others
PIECES = 8

_lock = threading.Lock()
_threads = 0
# the calls that ask for help, each as often as it wants threads
_calls: SimpleQueue = SimpleQueue()


def forward(kernel, x, weight, bias, eps, streaming, y, mean, rstd):
    """`kernel` of a factory `forward`, its rows shared by the threads."""
    rows, cols = parallel.shape_of(x)
    parallel.end_pause()
    if rows * cols < ELEMENTS:
        kernel(x, weight, bias, eps, streaming, y, mean, rstd)
        return
    threads = parallel.our_threads()
    pieces = [
        (_rows(x, piece), weight, bias, eps, streaming, _rows(y, piece), mean[piece], rstd[piece])
        for piece in _pieces(rows, 1, cols, threads)
    ]
    share(kernel, pieces, threads)


def backward(kernel, dy, x, weight, eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias):
    """`kernel` of a factory `backward`, of that in `long_rows` for dx alone, its rows shared by the threads."""
    rows, cols = x.shape
    parallel.end_pause()
    if rows * cols < ELEMENTS:
        kernel(dy, x, weight, eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias)
        return
    threads = parallel.our_threads()
    # a block's sums are one thread's; the first block may have begun in an earlier call
    step = block_rows if len(sums) else 1
    begun = first % step
    spans = _pieces(rows + begun, step, cols, threads)
    pieces = []
    for span in spans:
        piece = slice(max(span.start - begun, 0), span.stop - begun)
        pieces.append(
            (
                _rows(dy, piece), x[piece], weight, eps, mean[piece], rstd[piece], first + piece.start, block_rows, False,
                streaming, dx[piece], sums, dweight, dbias,
            )
        )  # fmt: skip
    share(kernel, pieces, threads)
    if last and len(sums):
        # no rows, only the sums of the blocks
        kernel(
            _rows(dy, slice(0)), x[:0], weight, eps, mean[:0], rstd[:0], 0, block_rows, True, streaming, dx[:0], sums,
            dweight, dbias,
        )  # fmt: skip


def forward_blocks(kernel, *arguments):
    """`kernel` of the factory `forward` of `channels_first`, its blocks shared by the threads."""
    *same, begin, end = arguments
    _share_blocks(kernel, same, range(begin, end), 0, 1)


def backward_blocks(kernel, *arguments):
    """`kernel` of its factory `backward`, of which blocks that are summed together are one thread's."""
    *operands, first, sum_blocks, last, streaming, dx, sums, dweight, dbias, width, begin, end = arguments
    results = streaming, dx, sums, dweight, dbias, width
    _share_blocks(kernel, (*operands, first, sum_blocks, False, *results), range(begin, end), first, sum_blocks)
    if last and len(sums):
        # no blocks, only their sums
        kernel(*operands, 0, sum_blocks, True, *results, 0, 0)


def _share_blocks(kernel, same, blocks, first, step):
    """Share blocks, of which `first` are before block 0, in pieces that begin with a multiple of `step` of all of them."""
    threads = parallel.our_threads()
    # the first piece may have begun in an earlier call
    start = blocks.start - (first + blocks.start) % step
    size = -(-(blocks.stop - start) // (step * threads * PIECES)) * step
    starts = range(start, blocks.stop, size)
    share(kernel, [(*same, max(at, blocks.start), min(at + size, blocks.stop)) for at in starts], threads)


def _rows(arrays, piece):
    """A piece of an array, or of both in a tuple."""
    return tuple(array[piece] for array in arrays) if isinstance(arrays, tuple) else arrays[piece]


def _pieces(rows, step, cols, threads):
    """The rows as slices, each of a multiple of `step` but for the last."""
    if threads == 1:
        return [slice(0, rows)]
    size = max(1, PIECE_ELEMENTS // (cols * step), -(-rows // (step * threads * PIECES))) * step
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def share(kernel, pieces, threads):
    """Call the kernel with the arguments that each piece is, in so many threads at most; end when all calls have."""
    if len(pieces) == 1:
        kernel(*pieces[0])
        return
    call = _Call(kernel, pieces)
    try:
        _ask(min(threads, len(pieces)) - 1, call)
        call.take_part()
        call.wait()
    except BaseException:
        # what a signal's handler raises, say: no thread may write to the arrays after this, whatever further signals come
        while True:
            try:
                call.give_up()
                break
            except BaseException:
                continue
        raise
    if call.errors:
        raise call.errors[0]


class _Call:
    """Pieces of work, and who has come to help with them and left.

    Every step is one atomic operation of a list, a deque or a queue: there is no lock for a fork to leave taken.
    """

    def __init__(self, kernel, pieces):
        self.kernel = kernel
        self.pieces = deque(pieces)
        self.came: list[None] = []
        self.left: list[None] = []
        self.errors: list[BaseException] = []
        self._leavings: SimpleQueue = SimpleQueue()
        # of the process where helpers come from
        self._calls = _calls

    def take_part(self):
        while True:
            try:
                piece = self.pieces.popleft()
            except IndexError:
                return
            self.kernel(*piece)

    def help(self):
        # before the first piece is taken: the caller, who looks after the last one is, waits for all who came until then
        self.came.append(None)
        try:
            self.take_part()
        except BaseException as error:
            self.pieces.clear()
            self.errors.append(error)
        finally:
            self.left.append(None)
            self._leavings.put(None)

    def give_up(self):
        self.pieces.clear()
        self.wait()

    def wait(self):
        # a handler of signals may have forked: the child has no helpers
        while self._calls is _calls and len(self.left) < len(self.came):
            self._leavings.get()


def _ask(helpers, call):
    """Ask so many threads for help, and start those that there are not yet."""
    global _threads
    # at its end an interpreter starts none, and one that is being started must not be waited for: this may be a handler of
    # signals that interrupted it
    if _threads < helpers and not sys.is_finalizing() and _lock.acquire(blocking=False):
        try:
            while _threads < helpers:
                threading.Thread(target=_serve, args=(_calls,), name="nbnorm", daemon=True).start()
                _threads += 1
        except (RuntimeError, MemoryError):
            # no more threads in this process
            pass
        finally:
            _lock.release()
    for _ in range(min(helpers, _threads)):
        _calls.put(call)


def _serve(calls):
    while True:
        # no name for the call: it would keep its arrays until the next one
        calls.get().help()


def _in_child():
    """A forked child has none of its parent's threads, and perhaps their locks, taken."""
    global _lock, _threads, _calls
    _lock = threading.Lock()
    _threads = 0
    _calls = SimpleQueue()


# Windows has no forks
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
