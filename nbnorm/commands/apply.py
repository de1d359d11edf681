"""Layer norm of an array on disk, in blocks of rows: memory does not grow with the file."""

import os
import stat
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nbnorm import reference
from nbnorm.calls import checks
from nbnorm.calls.problem import ForwardCall, wide_dtype
from nbnorm.commands import files, npy
from nbnorm.cpu.staging import row_blocks
from nbnorm.functional import layer_norm

BLOCK_BYTES = 1 << 23
# rows of a Fortran-ordered file are all over it: the larger the blocks, the fewer reads
FORTRAN_BLOCK_BYTES = 1 << 24
# of each block; the reference takes about six times as many longdouble numbers
CHECKED_ROWS = 16
CHECKED_ELEMENTS = 1 << 19
# between two signs of life, on a terminal and in a log
TERMINAL_SECONDS = 0.5
LOG_SECONDS = 30.0


class Applied(NamedTuple):
    """What was written, and how far the rows that were checked are from the reference, in eps of the result's dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checked_rows: int
    largest_error: float
    # inputs whose elements NumPy has no name for
    taken_as_bfloat16: tuple[str, ...]


def apply(
    source,
    destination,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    use_diff_of_squares=False,
    dtype=None,
    interrupted=lambda: False,
):
    """Write layer norm of the .npy file `source` to the .npy file `destination`, which appears when it is complete.

    Computes in the wider of the file's dtype and `dtype`, and compares the first rows of each block with the reference,
    where they are finite and not too long for memory. Where `interrupted` says True after a block, raises KeyboardInterrupt.
    """
    inputs = [path for path in (source, weight, bias) if path is not None]
    destination = files.destination(destination, inputs)
    names = {"x": source, "weight": weight, "bias": bias}
    names |= {name: f"--{name.replace('_', '-')}" for name in ("normalized_shape", "eps", "dtype")}
    checked_rows = 0
    largest_error = 0.0
    with npy.opened(source) as x_file, npy.opened(weight) as weight_file, npy.opened(bias) as bias_file:
        x, weight, bias = (None if file is None else file.stand_in() for file in (x_file, weight_file, bias_file))
        with files.named(names):
            problem = checks.forward(ForwardCall(x, normalized_shape, weight, bias, eps, use_diff_of_squares))[0]
            result_dtype = problem.dtype if dtype is None else checks.float_dtype(dtype)
        # read where they are known to be as long as a row, which x has
        weight, bias = (None if file is None else npy.read(file) for file in (weight_file, bias_file))
        exact_weight, exact_bias = (None if a is None else a.astype(wide_dtype(a.dtype), copy=False) for a in (weight, bias))
        is_same = problem.dtype == result_dtype
        compute_dtype = problem.dtype if is_same else np.result_type(wide_dtype(problem.dtype), wide_dtype(result_dtype))
        block_bytes = FORTRAN_BLOCK_BYTES if x_file.fortran_order else BLOCK_BYTES
        limit = max(1, block_bytes // max(1, problem.cols * compute_dtype.itemsize))
        blocks = row_blocks(problem.batch, limit) if problem.rows * problem.cols else ()
        with _complete_or_absent(destination) as y_file, _progress(problem.rows) as advance:
            header = {"descr": result_dtype.str, "fortran_order": False, "shape": problem.shape}
            np.lib.format.write_array_header_1_0(y_file, header)
            for index, rows in blocks:
                x = npy.read(x_file, index).astype(compute_dtype, copy=False)
                y = layer_norm(x, problem.normalized_shape, weight, bias, problem.eps, use_diff_of_squares)
                with np.errstate(over="ignore", under="ignore"):
                    y = y.astype(result_dtype, copy=False)
                y_file.write(y.reshape(-1).view(np.uint8))
                first = slice(min(CHECKED_ROWS, CHECKED_ELEMENTS // problem.cols))
                x, y = (a.reshape(-1, *problem.normalized_shape)[first] for a in (x, y))
                finite = np.isfinite(y).all(axis=tuple(range(1, y.ndim)))
                if finite.any():
                    exact_x = x[finite].astype(np.longdouble)
                    error = reference.error_of_y(y[finite], exact_x, y.ndim - 1, exact_weight, exact_bias, problem.eps)
                    largest_error = max(largest_error, error)
                    checked_rows += int(finite.sum())
                # before the next block is made, not after
                del x, y
                advance(rows.stop - rows.start)
                if interrupted():
                    raise KeyboardInterrupt
        taken = [str(file.path) for file in (x_file, weight_file, bias_file) if file and file.dtype.name == "bfloat16"]
    return Applied(problem.shape, result_dtype, checked_rows, largest_error, tuple(taken))


@contextmanager
def _complete_or_absent(path):
    """A file to write that takes the name `path` at the end, or is removed where anything is raised."""
    descriptor, temporary = tempfile.mkstemp(prefix=".nbnorm-", suffix=".part", dir=path.parent)
    try:
        with npy.named(path), os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            # a full disk or a lost network drive may show only here
            os.fsync(file.fileno())
        Path(temporary).chmod(_mode(path))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _mode(path):
    """The permissions of the file that is replaced, or those of a new one."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


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
