"""The tables of this process, and what Python does for calls in compiled code: the checks, and all that is not plain.

A table is asked for by functions that may have been on disk for years. So what a request has, and the arguments of what the
words of a table lead to, stay as they are, or VERSION becomes another one.
"""

import ctypes
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbnorm import functional
from nbnorm.calls import checks
from nbnorm.calls.problem import BackwardCall, Description, ForwardCall, wide_dtype
from nbnorm.cpu import choice, sizes
from nbnorm.cpu.workers import parallel
from nbnorm.nopython import entries, sharing
from nbnorm.nopython.instructions import CHECK, ENTRY, FINE, INTERRUPT, MEMORY, OTHER, RUN, VALUE
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
        self.words = np.zeros(sharing.WORDS, np.int64)
        self.functions = partial(_told, check), partial(_told, partial(run, self)), self.watch
        self.words[[CHECK, RUN, sharing.WATCH]] = list(map(id, self.functions))
        self.words[sharing.NATIVE], self.words[sharing.CLOCK] = ctypes.addressof(parallel.native), sharing.clock_address()
        # of the parallel builds, by their places
        self.stalls: dict = {}

    def workers(self, x, normalized_shape, use_diff_of_squares, has_lock):
        """Who works on a call of Python's, as a context; where a kernel takes calls like it, later ones go there at once."""
        cols = math.prod(normalized_shape) if isinstance(normalized_shape, tuple) else normalized_shape
        is_plain = self.entry is not None and 0 < x.size < entries.MOST_ELEMENTS and cols <= sizes.LONG_ROW
        is_shared = has_lock and x.size >= entries.MANY_ELEMENTS
        if is_plain and (not is_shared or self._is_open(x.size)):
            place = entries.kernel_at(sizes.is_short(cols, x.itemsize), use_diff_of_squares)
            self._load(place, self.kernel_for(cols, use_diff_of_squares), is_shared)
        # without Python's lock, this may be one of the threads of a parallel region
        return nullcontext() if has_lock and (is_shared or not is_plain) else parallel.alone()

    def watch(self, place, seconds, rows, cols):
        """Be told of a call that was long, by a parallel build."""
        if seconds <= parallel.STALL_SECONDS or not self.stalls[place](seconds, rows, cols):
            parallel.native.worked += seconds

    def _is_open(self, elements):
        """Whether Numba's threads may work on such calls from now on."""
        if self.words[sharing.CLOCK] and parallel.workers(elements) == parallel.NUMBAS:
            parallel.native.is_open = 1
        return parallel.native.is_open

    def _load(self, place, kernel, is_shared):
        place += sharing.BUILDS if is_shared else 0
        if self.words[place]:
            return
        if is_shared:
            self.stalls[place] = parallel.watch(kernel)
        self.words[place] = _with_a_large_stack(lambda: entries.address(choice.ready(kernel, is_shared)))
        self.words[ENTRY] = _with_a_large_stack(lambda: entries.ready(*self.entry))


class Norm(NamedTuple):
    """A public function, by its name: `is_added` is one of x plus a residual."""

    name: str
    is_rms: bool = False
    is_added: bool = False

    @property
    def function(self):
        return getattr(functional, self.name)


def _forward(norm, x, residual, weight, bias, with_total):
    residual_dtype = None if residual is None else np.dtype(residual)

    def described(cols, use_diff_of_squares):
        calls = Description(x, cols, weight, bias, use_diff_of_squares, False, is_rms=norm.is_rms, residual=residual)
        return checks.description(calls)[0]

    def kernel_for(cols, use_diff_of_squares):
        present = weight is not None, bias is not None
        return choice.forward(described(cols, use_diff_of_squares), *present, residual_dtype, with_total)

    def check(x, residual, normalized_shape, weight, bias, eps, use_diff_of_squares, out, total_out, has_lock):
        call = ForwardCall(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out)
        total_out = total_out if with_total else False
        kind = {"is_rms": norm.is_rms, "is_added": norm.is_added}
        checks.forward(call._replace(residual=residual, total_out=total_out, **kind))

    def run(
        table, x, residual, normalized_shape, weight, bias, eps, use_diff_of_squares, y, total, mean, rstd, has_lock
    ):  # fmt: skip
        operands = (x, residual) if norm.is_added else (x,)
        options = (weight, eps) if norm.is_rms else (weight, bias, eps, use_diff_of_squares)
        outs = {"out": y, "total_out": total if with_total else False} if norm.is_added else {"out": y}
        with table.workers(x, normalized_shape, use_diff_of_squares, has_lock):
            result = norm.function(*operands, normalized_shape, *options, **outs, return_stats=rstd is not None)
            if rstd is not None:
                rstd[:] = result.rstd
            if mean is not None:
                mean[:] = result.mean

    problem = described(1, False)
    entry = ("forward", problem.dtype, problem.compute_dtype, residual_dtype, with_total)
    return Table(entry if {weight, bias} <= {None, problem.compute_dtype.name} else None, kernel_for, check, run)


def _backward(norm, dy, dtotal, x, weight, mean, rstd, output_mask):
    output_mask, gradients = tuple(output_mask), len(output_mask)
    # which only dx has a use for
    added_dtype = None if dtotal is None or not output_mask[0] else np.dtype(dtotal)

    def kernel_for(cols, use_diff_of_squares):
        given = dy, mean, rstd, output_mask
        calls = Description(x, cols, weight, None, use_diff_of_squares, True, *given, is_rms=norm.is_rms)
        _, problem, dtypes, mask = checks.description(calls)
        if dtotal is not None:
            problem = problem._replace(compute_dtype=np.result_type(problem.compute_dtype, dtotal))
        statistics = [wide_dtype(dtypes[name]) for name in ("mean", "rstd") if dtypes[name]]
        statistics_dtype = np.result_type(*statistics) if statistics else None
        return choice.backward(problem, dtypes["dy"], weight is not None, statistics_dtype, mask, added_dtype)

    def check(
        dy, dtotal, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, dx, dweight, dbias, has_lock
    ):  # fmt: skip
        out = None if dx is dweight is dbias is None else (dx, dweight, dbias)[:gradients]
        call = BackwardCall(dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out)
        kind = {"is_rms": norm.is_rms, "is_added": norm.is_added}
        checks.backward(call._replace(dtotal=dtotal, **kind))

    def run(
        table, dy, dtotal, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, dx, dweight, dbias, has_lock
    ):  # fmt: skip
        operands = (dy, dtotal, x) if norm.is_added else (dy, x)
        options = (weight, eps) if norm.is_rms else (weight, eps, use_diff_of_squares)
        statistics = {"rstd": rstd} if norm.is_rms else {"mean": mean, "rstd": rstd}
        out = (dx, dweight, dbias)[:gradients]
        with table.workers(x, normalized_shape, use_diff_of_squares, has_lock):
            norm.function(*operands, normalized_shape, *options, **statistics, output_mask=output_mask, out=out)

    dtypes = kernel_for(1, False).choices[:5]
    is_plain = any(output_mask) and weight in (None, dtypes[2].name) and (norm.is_rms or mean == rstd)
    entry = ("backward", *dtypes, added_dtype, sum(output_mask[1:]))
    return Table(entry if is_plain else None, kernel_for, check, run)


NORMS: dict[Norm, Any] = {
    Norm("layer_norm"): _forward,
    Norm("layer_norm_backward"): _backward,
    Norm("rms_norm", is_rms=True): _forward,
    Norm("rms_norm_backward", is_rms=True): _backward,
    Norm("add_layer_norm", is_added=True): _forward,
    Norm("add_layer_norm_backward", is_added=True): _backward,
    Norm("add_rms_norm", is_rms=True, is_added=True): _forward,
    Norm("add_rms_norm_backward", is_rms=True, is_added=True): _backward,
}
# what makes a table, by the names in requests
FUNCTIONS = {norm.name: partial(make, norm) for norm, make in NORMS.items()}


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
