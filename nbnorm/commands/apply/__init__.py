"""A norm of an array on disk, in blocks of rows: memory does not grow with the file."""

import math
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from nbnorm import reference
from nbnorm.calls import checks, options
from nbnorm.calls.problem import ForwardCall, Problem, wide_dtype
from nbnorm.commands.apply import chunked, files, inputs, outputs
from nbnorm.cpu.staging import row_blocks
from nbnorm.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm

BLOCK_BYTES = 1 << 23
# rows of a Fortran-ordered file are all over it: the larger the blocks, the fewer reads
FORTRAN_BLOCK_BYTES = 1 << 24
# of each block; the reference takes about six times as many longdouble numbers
CHECKED_ROWS = 16
CHECKED_ELEMENTS = 1 << 19
# between two signs of life, on a terminal and in a log
TERMINAL_SECONDS = 0.5
LOG_SECONDS = 30.0
ARRAYS = ("x", "weight", "bias", "residual")
# of which a block has its own part
BLOCKWISE = ("x", "residual")


class Applied(NamedTuple):
    """What was written, and how far the rows that were checked are from the reference, in eps of the result's dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checked_rows: int
    largest_error: float
    # inputs whose elements NumPy has no name for
    taken_as_bfloat16: tuple[str, ...]


def apply(call, dtype=None, scheduler=None, interrupted=lambda: False):
    """Write the norm of an array in a file to another file, which appears when it is complete.

    `call` is a `ForwardCall` with FILE or FILE:NAME in the place of each array. Computes in the wider of the dtype of x and
    `dtype`, and compares the first rows of each block with the reference, where they are finite and not too long for memory.
    A `scheduler`, the address of a Dask cluster's, has its workers do so.
    Where `interrupted` says True after a block, raises KeyboardInterrupt.
    """
    given = {name: text for name in ARRAYS if (text := getattr(call, name)) is not None}
    sources = [files.located(text)[0] for text in given.values()]
    wanted = {"y": call.out} | ({"total": call.total_out} if call.total_out else {})
    destinations = files.different([files.destination(text, sources, name) for name, text in wanted.items()])
    names = given | {name: f"--{name.replace('_', '-')}" for name in ("normalized_shape", "axis", "eps", "dtype")}
    with ExitStack() as stack:
        scratch = destinations[0].path.parent
        opened = {
            name: stack.enter_context(inputs.opened(text, None if scheduler and name in BLOCKWISE else scratch))
            for name, text in given.items()
        }
        stand_ins = {name: array.stand_in() for name, array in opened.items()}
        with files.named(names):
            problem = checks.forward(call._replace(out=None, total_out=False, **stand_ins))[0]
            result_dtype = problem.dtype if dtype is None else options.float_dtype(dtype)
        # read where they are known to be as long as a row, which x has
        parameters = [opened[name].read() if name in opened else None for name in ("weight", "bias")]
        norm = Norm(call, problem, result_dtype, *parameters)
        arrays = [opened[name] for name in BLOCKWISE if name in opened]
        computed = stack.enter_context(_on_cluster(scheduler, interrupted)) if scheduler else _here
        checked_rows, largest_error = _write(norm, arrays, destinations, computed, interrupted)
        taken = [array.name for array in opened.values() if array.taken_as_bfloat16]
    return Applied(problem.shape, result_dtype, checked_rows, largest_error, tuple(taken))


class Norm(NamedTuple):
    """What is done to each block: a call that was checked, the dtype of what is written, and the parameters."""

    call: ForwardCall
    problem: Problem
    dtype: np.dtype
    weight: Any
    bias: Any

    @property
    def compute_dtype(self):
        dtype = self.problem.dtype
        return dtype if dtype == self.dtype else np.result_type(wide_dtype(dtype), wide_dtype(self.dtype))

    def block(self, x, residual=None):
        """What is written of a block, y and maybe the total, how many of its rows were compared, and their largest error."""
        y, total = self.of(x.astype(self.compute_dtype, copy=False), residual)
        with np.errstate(over="ignore", under="ignore"):
            results = [array.astype(self.dtype, copy=False) for array in ((y, total) if self.call.total_out else (y,))]
        return results, *self.largest_error(results[0], total)

    def of(self, x, residual=None):
        """y, and the total, which is x itself where nothing is added to it."""
        row, weight, bias, eps = self.problem.normalized_shape, self.weight, self.bias, self.problem.eps
        use_diff_of_squares = self.call.use_diff_of_squares
        # a block has all axes of the whole
        first = -len(row) - len(self.problem.behind)
        axis: dict[str, Any] = {"axis": tuple(range(first, first + len(row)))} if self.problem.behind else {}
        if self.call.is_rms:
            added = None if residual is None else add_rms_norm(x, residual, row, weight, eps, **axis)
            return added or (rms_norm(x, row, weight, eps, **axis), x)
        if residual is None:
            return layer_norm(x, row, weight, bias, eps, use_diff_of_squares, **axis), x
        return add_layer_norm(x, residual, row, weight, bias, eps, use_diff_of_squares, **axis)

    def largest_error(self, y, total):
        """How many of a block's first rows were compared with the reference, and the largest error of these."""
        y, total = (self._first_rows(array) for array in (y, total))
        finite = np.isfinite(y).all(axis=1)
        if not finite.any():
            return 0, 0.0
        weight, bias = (
            None if a is None else a.reshape(-1).astype(wide_dtype(a.dtype), copy=False) for a in (self.weight, self.bias)
        )
        exact = total[finite].astype(np.longdouble)
        error = reference.error_of_y(y[finite], exact, 1, weight, bias, self.problem.eps, self.call.is_rms)
        return int(finite.sum()), error

    def _first_rows(self, array):
        """Those that are compared, each one behind the other."""
        cols, behind = self.problem.cols, math.prod(self.problem.behind)
        count = min(CHECKED_ROWS, CHECKED_ELEMENTS // cols)
        entries = array.reshape(-1, cols, behind)[: -(-count // behind), :, :count]
        return entries.transpose(0, 2, 1).reshape(-1, cols)[:count]


def _write(norm, arrays, destinations, computed, interrupted):
    """Returns the number of rows that were compared with the reference, and the largest error of these."""
    problem = norm.problem
    limit = _entries_of_a_block(problem, arrays, norm.compute_dtype.itemsize)
    checked_rows, largest_error = 0, 0.0
    with (
        outputs.created(destinations, problem.shape, norm.dtype, _block_shape(problem, limit)) as writers,
        _progress(problem.rows) as advance,
    ):
        for index, entries, (results, count, error) in computed(norm, arrays, limit):
            for write, result in zip(writers, results, strict=True):
                write(index, result)
            checked_rows += count
            largest_error = max(largest_error, error)
            # before the next block is made, not after
            del results, result
            advance((entries.stop - entries.start) * math.prod(problem.behind))
            if interrupted():
                raise KeyboardInterrupt
    return checked_rows, largest_error


def _here(norm, arrays, limit):
    """Yields the index and the rows of each block of the arrays, and what the norm makes of it."""
    read = [chunked.reader(array, norm.problem.batch, limit) for array in arrays]
    for index, rows in _blocks(norm.problem, limit):
        yield index, rows, norm.block(*(block(index, rows) for block in read))


@contextmanager
def _on_cluster(scheduler, interrupted):
    """The same of a Dask cluster, which is known by the address of its scheduler."""
    try:
        from nbnorm.commands.apply import cluster
    except ModuleNotFoundError as error:
        fault = f"--scheduler: {scheduler}: a Dask cluster, which needs the package distributed"
        raise TypeError(f"{fault}: pip install distributed") from error
    with cluster.connected(scheduler) as client:
        yield lambda norm, arrays, limit: cluster.computed(client, norm, arrays, _blocks(norm.problem, limit), interrupted)


def _blocks(problem, limit):
    return row_blocks(problem.batch, limit) if math.prod(problem.shape) else ()


def _entries_of_a_block(problem, arrays, itemsize):
    """An entry of the batch is a row, or where axes are behind it, as many as there are positions in these."""
    most = FORTRAN_BLOCK_BYTES if any(array.fortran_order for array in arrays) else BLOCK_BYTES
    limit = max(1, most // max(1, math.prod(problem.shape[len(problem.batch) :]) * itemsize))
    unit = chunked.rows_of_a_chunk(arrays[0], problem.batch)
    return limit if unit > limit else limit // unit * unit


def _block_shape(problem, limit):
    index = next((index for index, _ in row_blocks(problem.batch, limit)), ()) if math.prod(problem.batch) else ()
    return tuple(1 if isinstance(i, int) else i.stop - i.start for i in index) + problem.shape[len(index) :]


@contextmanager
def _progress(rows):
    """A function that takes the number of rows done: on stderr, a line that changes, or in a log one now and then."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    seconds = TERMINAL_SECONDS if is_terminal else LOG_SECONDS
    done = 0
    # rows and the clock after the first block, for which a kernel may be compiled, and the clock when a sign was last given
    first, start, given = 0, 0.0, 0.0

    def show(text):
        # a terminal that has gone is no reason to stop
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                print(f"\r{text:<70}\r" if is_terminal else f"{text}\n", end="", file=sys.stderr, flush=True)

    def advance(count):
        nonlocal done, first, start, given
        done += count
        now = time.monotonic()
        if first == 0:
            first, start, given = done, now, now
        elif now - given >= seconds:
            given = now
            left = (now - start) * (rows - done) / (done - first)
            show(f"nbnorm: {done:,} of {rows:,} rows, {done / rows:.0%}; {left:,.0f} s left")

    if is_terminal:
        show(f"nbnorm: 0 of {rows:,} rows")
    try:
        yield advance
    finally:
        if is_terminal:
            show("")
