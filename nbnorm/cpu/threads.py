"""Threads of our own that share the rows of a call, each running the serial kernel on some: where Numba's may not run.

The caller and a few daemon threads take pieces of the work, one after another, until there are none. The caller needs no
one: it does all of it where no thread comes, and waits only for those that have begun. So a thread that cannot be started,
that the system lets wait, or that a fork did not bring along costs time at most.
"""

import os
import threading
from collections import deque
from queue import SimpleQueue

from nbnorm.cpu import parallel

# below this many elements a second thread costs more than it saves
ELEMENTS = 1 << 17
# pieces for each thread, so that one which is late leaves most of its share to the others, and elements of a piece, which
# costs the interpreter 3 us. A streamed piece ends in a fence, which waits for the memory
PIECES = 8
PIECE_ELEMENTS = 1 << 14
STREAMED_PIECE_ELEMENTS = 1 << 16

_lock = threading.Lock()
_threads = 0
# the calls that ask for help, each as often as it wants threads
_calls: SimpleQueue = SimpleQueue()


def forward(kernel, x, weight, bias, eps, streaming, y, mean, rstd):
    """`kernel` of `kernels.forward` or `long_rows.forward`, its rows shared by the threads."""
    rows, cols = x.shape
    threads = parallel.our_threads()
    pieces = [
        (x[piece], weight, bias, eps, streaming, y[piece], mean[piece], rstd[piece])
        for piece in _pieces(rows, 1, cols, threads, streaming)
    ]
    share(kernel, pieces, threads)


def backward(kernel, dy, x, weight, eps, mean, rstd, first, block_rows, last, streaming, dx, sums, dweight, dbias):
    """`kernel` of `kernels.backward`, or of `long_rows.backward` for dx alone, its rows shared by the threads."""
    rows, cols = x.shape
    threads = parallel.our_threads()
    # a block's sums are one thread's; the first block may have begun in an earlier call
    step = block_rows if len(sums) else 1
    begun = first % step
    spans = _pieces(rows + begun, step, cols, threads, streaming)
    pieces = []
    for span in spans:
        piece = slice(max(span.start - begun, 0), span.stop - begun)
        pieces.append(
            (
                dy[piece], x[piece], weight, eps, mean[piece], rstd[piece], first + piece.start, block_rows, False,
                streaming, dx[piece], sums, dweight, dbias,
            )
        )  # fmt: skip
    share(kernel, pieces, threads)
    if last and len(sums):
        # no rows, only the sums of the blocks
        kernel(
            dy[:0], x[:0], weight, eps, mean[:0], rstd[:0], 0, block_rows, True, streaming, dx[:0], sums, dweight, dbias
        )  # fmt: skip


def _pieces(rows, step, cols, threads, streaming):
    """The rows as slices, each of a multiple of `step` but for the last."""
    if threads == 1 or rows * cols < ELEMENTS:
        return [slice(0, rows)]
    least = (STREAMED_PIECE_ELEMENTS if streaming else PIECE_ELEMENTS) // cols
    size = max(1, least // step, -(-rows // (step * threads * PIECES))) * step
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def share(kernel, pieces, threads):
    """Call the kernel with the arguments that each piece is, in so many threads at most; end when all calls have."""
    parallel.end_pause()
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
            self.errors.append(error)
            self.pieces.clear()
        self.left.append(None)
        self._leavings.put(None)

    def give_up(self):
        self.pieces.clear()
        self.wait()

    def wait(self):
        while len(self.left) < len(self.came):
            self._leavings.get()


def _ask(helpers, call):
    """Ask so many threads for help, and start those that there are not yet."""
    global _threads
    if _threads < helpers:
        with _lock:
            while _threads < helpers:
                thread = threading.Thread(target=_serve, args=(_calls,), name="nbnorm", daemon=True)
                try:
                    thread.start()
                except (RuntimeError, MemoryError):
                    # no more threads in this process, or at its end none at all
                    break
                _threads += 1
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
