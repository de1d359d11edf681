"""Layer norm of an array on disk, in blocks of rows: memory does not grow with the file."""

import os
import stat
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nbnorm import checks, reference
from nbnorm.cpu.staging import row_blocks
from nbnorm.functional import layer_norm

BLOCK_BYTES = 1 << 23
# mapped memory that may be touched at once: pages count as this process's memory until they are unmapped
MAPPED_BYTES = 1 << 24
PAGE_BYTES = 1 << 12
# of each block; the reference takes about six times as many longdouble numbers
CHECKED_ROWS = 16
CHECKED_ELEMENTS = 1 << 19


class Applied(NamedTuple):
    """What was written, and how far the rows that were checked are from the reference, in eps of the result's dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype
    checked_rows: int
    largest_error: float


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
    destination = checks.files(source, destination, [path for path in (weight, bias) if path is not None])
    weight, bias = (None if path is None else np.array(checks.npy(path)) for path in (weight, bias))
    mapped = checks.npy(source)
    problem = checks.forward(mapped, normalized_shape, weight, bias, eps, use_diff_of_squares, None, False, None)[0]
    result_dtype = problem.dtype if dtype is None else np.dtype(dtype)
    compute_dtype = np.result_type(problem.dtype, result_dtype)
    identity = checks.file_identity(source)
    del mapped

    checked_rows = 0
    largest_error = 0.0
    limit = max(1, BLOCK_BYTES // max(1, problem.cols * compute_dtype.itemsize))
    blocks = row_blocks(problem.batch, limit) if problem.rows * problem.cols else ()
    with _complete_or_absent(destination) as file, _progress(problem.rows) as advance:
        header = {"descr": result_dtype.str, "fortran_order": False, "shape": problem.shape}
        np.lib.format.write_array_header_1_0(file, header)
        for index, rows in blocks:
            x = _read(source, index).astype(compute_dtype, copy=False)
            y = layer_norm(x, problem.normalized_shape, weight, bias, problem.eps, use_diff_of_squares)
            with np.errstate(over="ignore", under="ignore"):
                y = y.astype(result_dtype, copy=False)
            checks.unchanged_file(source, identity)
            file.write(y)
            first = slice(min(CHECKED_ROWS, CHECKED_ELEMENTS // problem.cols))
            x, y = (a.reshape(-1, *problem.normalized_shape)[first] for a in (x, y))
            finite = np.isfinite(y).all(axis=tuple(range(1, y.ndim)))
            if finite.any():
                exact_x = x[finite].astype(np.longdouble)
                error = reference.error_of_y(y[finite], exact_x, y.ndim - 1, weight, bias, problem.eps)
                largest_error = max(largest_error, error)
                checked_rows += int(finite.sum())
            # before the next block is made, not after
            del x, y
            advance(rows.stop - rows.start)
            if interrupted():
                raise KeyboardInterrupt
    return Applied(problem.shape, result_dtype, checked_rows, largest_error)


def _read(path, index):
    """A block of the array in the file, C-contiguous: mapped where it is so there, else copied in pieces."""
    block = checks.npy(path)[index]
    if block.flags.c_contiguous:
        return block
    result = np.empty(block.shape, block.dtype)
    bounds = tuple((0, size) for size in block.shape)
    for piece in _pieces(bounds, block.strides, block.itemsize):
        # mapped anew, to let go of the pages of the piece before
        block = checks.npy(path)[index]
        result[piece] = block[piece]
    return result


def _pieces(bounds, strides, itemsize):
    """Slices that together cover the bounds (start, stop), each of which touches few enough pages."""
    sizes = [stop - start for start, stop in bounds]
    regions = 1
    span = itemsize
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if stride <= span + PAGE_BYTES:
            span += stride * (size - 1)
        else:
            regions *= size
    if regions * (span + 2 * PAGE_BYTES) <= MAPPED_BYTES or max(sizes) == 1:
        yield tuple(slice(*bound) for bound in bounds)
        return
    axis = max((axis for axis in range(len(sizes)) if sizes[axis] > 1), key=lambda axis: strides[axis])
    start, stop = bounds[axis]
    middle = (start + stop) // 2
    for half in ((start, middle), (middle, stop)):
        yield from _pieces((*bounds[:axis], half, *bounds[axis + 1 :]), strides, itemsize)


@contextmanager
def _complete_or_absent(path):
    """A file to write that takes the name `path` at the end, or is removed where anything is raised."""
    descriptor, temporary = tempfile.mkstemp(prefix=".nbnorm-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            # a full disk or a lost network drive may show only here
            os.fsync(file.fileno())
        Path(temporary).chmod(_mode(path))
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
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
    """A function that takes the number of rows done: a progress bar on a terminal, else nothing."""
    bar: Any = None
    if sys.stderr is not None and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            print("nbnorm: no progress bar without tqdm: pip install 'nbnorm[cli]'", file=sys.stderr)
        else:
            bar = tqdm(total=rows, unit=" rows", unit_scale=True, leave=False)
    try:
        yield bar.update if bar else lambda done: None
    finally:
        if bar:
            bar.close()
