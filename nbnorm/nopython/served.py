"""The tables of this process, and what Python does for calls in compiled code: the checks, and all that is not plain.

A table is asked for by functions that may have been on disk for years. So what a request has, and the arguments of what the
words of a table lead to, stay as they are, or VERSION becomes another one.
"""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np

from nbnorm import functional
from nbnorm.calls import checks
from nbnorm.calls.problem import BackwardCall, Description, ForwardCall, wide_dtype
from nbnorm.cpu import choice, sizes
from nbnorm.cpu.workers import parallel
from nbnorm.nopython import entries
from nbnorm.nopython.instructions import CHECK, ENTRY, FINE, INTERRUPT, KERNELS, MEMORY, OTHER, RUN, VALUE
from nbnorm.nopython.overloads import VERSION

# for ever: compiled functions have their addresses
_tables: dict = {}


def table(request):
    """The address of a request's table."""
    if request not in _tables:
        asked = json.loads(request)
        version, function = asked.pop("version"), asked.pop("function")
        if version != VERSION or function not in FUNCTIONS:
            raise ImportError(f"this nbnorm does not know what another version of it compiled: {request}")
        _tables.setdefault(request, FUNCTIONS[function](**asked))
    return _tables[request].words.ctypes.data


class Table:
    """The words that compiled code reads.

    `entry` is the name of one in `entries` with its choices, None where Python makes every call; `kernel_for(cols,
    use_diff_of_squares)` says what it calls. `check` and `run` are called with what a call has, and return nothing.
    """

    def __init__(self, entry, kernel_for, check, run):
        self.entry, self.kernel_for = entry, kernel_for
        self.words = np.zeros(KERNELS + 4, np.int64)
        self.functions = partial(_told, check), partial(_told, partial(run, self))
        self.words[CHECK], self.words[RUN] = map(id, self.functions)

    def workers(self, x, normalized_shape, use_diff_of_squares, has_lock):
        """Who works on a call of Python's, as a context; where a kernel takes calls like it, later ones go there at once."""
        cols = math.prod(normalized_shape) if isinstance(normalized_shape, tuple) else normalized_shape
        is_plain = self.entry is not None and 0 < x.size < entries.most(has_lock) and cols <= sizes.LONG_ROW
        index = entries.kernel_at(sizes.is_short(cols, x.itemsize), use_diff_of_squares)
        if is_plain and not self.words[index]:
            kernel = self.kernel_for(cols, use_diff_of_squares)
            self.words[index] = _with_a_large_stack(lambda: entries.address(choice.ready(kernel, False)))
            self.words[ENTRY] = _with_a_large_stack(lambda: entries.ready(*self.entry))
        # without Python's lock, this may be one of the threads of a parallel region
        return nullcontext() if has_lock and not is_plain else parallel.alone()


def _layer_norm(x, weight, bias):
    def described(cols, use_diff_of_squares):
        return checks.description(Description(x, cols, weight, bias, use_diff_of_squares, False))[0]

    def kernel_for(cols, use_diff_of_squares):
        return choice.forward(described(cols, use_diff_of_squares), weight is not None, bias is not None)

    def check(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, has_lock):
        checks.forward(ForwardCall(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out))

    def run(table, x, normalized_shape, weight, bias, eps, use_diff_of_squares, y, mean, rstd, has_lock):
        options = eps, use_diff_of_squares
        with table.workers(x, normalized_shape, use_diff_of_squares, has_lock):
            if mean is None:
                functional.layer_norm(x, normalized_shape, weight, bias, *options, out=y)
            else:
                _, mean[:], rstd[:] = functional.layer_norm(
                    x, normalized_shape, weight, bias, *options, out=y, return_stats=True
                )

    problem = described(1, False)
    entry = ("forward", problem.dtype, problem.compute_dtype)
    return Table(entry if {weight, bias} <= {None, problem.compute_dtype.name} else None, kernel_for, check, run)


def _layer_norm_backward(dy, x, weight, mean, rstd, output_mask):
    def kernel_for(cols, use_diff_of_squares):
        calls = Description(x, cols, weight, None, use_diff_of_squares, True, dy, mean, rstd, output_mask)
        _, problem, dtypes, mask = checks.description(calls)
        given = None if mean is None else np.result_type(wide_dtype(dtypes["mean"]), wide_dtype(dtypes["rstd"]))
        return choice.backward(problem, dtypes["dy"], weight is not None, given, mask)

    def check(dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, dx, dweight, dbias, has_lock):
        out = None if dx is dweight is dbias is None else (dx, dweight, dbias)
        options = eps, use_diff_of_squares, mean, rstd, output_mask, out
        checks.backward(BackwardCall(dy, x, normalized_shape, weight, *options))

    def run(table, dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, dx, dweight, dbias, has_lock):
        with table.workers(x, normalized_shape, use_diff_of_squares, has_lock):
            functional.layer_norm_backward(
                dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean=mean, rstd=rstd, output_mask=output_mask,
                out=(dx, dweight, dbias),
            )  # fmt: skip

    dtypes = kernel_for(1, False).choices[:5]
    is_plain = any(output_mask) and weight in (None, dtypes[2].name) and mean == rstd
    return Table(("backward", *dtypes, sum(output_mask[1:])) if is_plain else None, kernel_for, check, run)


# by their names in requests
FUNCTIONS: dict[str, Any] = {"layer_norm": _layer_norm, "layer_norm_backward": _layer_norm_backward}


def _told(function, *operands):
    """Call it, and say what compiled code is to raise."""
    try:
        function(*operands)
    except ValueError as error:
        return VALUE, str(error)
    except MemoryError as error:
        return MEMORY, str(error)
    except KeyboardInterrupt:
        return INTERRUPT, ""
    except Exception as error:
        return OTHER, f"{type(error).__name__}: {error}"
    return FINE, ""


def _with_a_large_stack(function):
    """Call it where a kernel can be compiled: a thread that is none of Python's may have half a MiB of stack."""
    if not isinstance(threading.current_thread(), threading._DummyThread):
        return function()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()
