"""Calls whose arrays all lie against memory that kills a process that touches it; test_bounds runs them in one of their own.

Each array ends, or begins, at a page without any access, and so does what the package allocates itself. The rest of its last
page holds NaN in every dtype: reading it would change the results, which are compared bit for bit, and writing it is seen.
After what kernels allocate for themselves NumPy looks, where they run as plain Python: they know arrays by their elements
alone, so that Numba has no index to check.
"""

import ctypes
import itertools
import mmap
import sys
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import ml_dtypes
import numpy as np
from numba import njit

import nbnorm
from nbnorm.cpu import plans, sizes, staging
from nbnorm.cpu.kernels import long_rows
from nbnorm.cpu.lanes import lowering, meaning  # noqa: F401
from nbnorm.cpu.workers import parallel

PAGE = mmap.PAGESIZE
NAN = 0xFF
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
# around 16 and 128 elements; more rows than are summed at once, and than a group of the backward
SHAPES = [(1, 1), (1, 15), (2, 16), (3, 17), (5, 31), (3, 33), (2, 127), (2, 128), (3, 131), (37, 24), (1, 1000)]
LONG_SHAPES = [(1, sizes.LONG_ROW + 17), (3, long_rows.SEGMENT + 5)]


class Guard:
    """Where arrays begin ("first") or end ("last") at a page that must not be touched."""

    def __init__(self, at):
        self.at = at
        self.rests = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def empty(self, shape, dtype=float):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        inside = max(PAGE, -(-size // PAGE) * PAGE)
        memory = np.frombuffer(mmap.mmap(-1, inside + 2 * PAGE), np.uint8)
        memory[PAGE:-PAGE] = NAN
        for address in (memory.ctypes.data, memory.ctypes.data + PAGE + inside):
            if self.libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = PAGE if self.at == "first" else PAGE + inside - size
        self.rests += [memory[PAGE:start], memory[start + size : PAGE + inside]]
        return memory[start : start + size].view(dtype).reshape(shape)

    def copy(self, array):
        if array is None:
            return None
        result = self.empty(array.shape, array.dtype)
        result[...] = array
        return result

    def assert_untouched(self):
        assert all((rest == NAN).all() for rest in self.rests)
        self.rests.clear()


def assert_same_bits(results, expected):
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint8), b.view(np.uint8))


def operands(rng, shape, dtype):
    """x, dy, weight and bias; the second row has squares beyond float32, the third is constant, the fourth has NaN."""
    x, dy = rng.standard_normal((2, *shape))
    x[1:2] *= 1e34 if np.dtype(dtype).itemsize > 2 else 100
    x[2:3] = 1
    x[3:4, :1] = np.nan
    weight, bias = rng.standard_normal((2, shape[1]), np.float32)
    return x.astype(dtype), dy.astype(dtype), weight, bias


@contextmanager
def allocated_by(guard):
    """What the package allocates, but for what compiled kernels do."""
    with patch.object(np, "empty", guard.empty), patch.object(plans, "empty", guard.empty):
        yield


def check(guard, shape, dtype, has_parameters, use_diff_of_squares):
    """All ways of a call on arrays of one shape and dtype give what they give on ordinary ones."""
    # what ways change is no part of what a plan is known by
    plans.LAYER_NORM.clear()
    plans.LAYER_NORM_BACKWARD.clear()
    x, dy, weight, bias = operands(np.random.default_rng(0), shape, dtype)
    if not has_parameters:
        weight = bias = None
    mode = 1e-5, use_diff_of_squares
    y, mean, rstd = nbnorm.layer_norm(x, shape[1], weight, bias, *mode, return_stats=True)
    grads = nbnorm.layer_norm_backward(dy, x, shape[1], weight, *mode)
    statistics = mean.astype(np.float64), rstd.astype(np.float64)
    given = nbnorm.layer_norm_backward(dy, x, shape[1], weight, *mode, mean=statistics[0], rstd=statistics[1])

    gx, gdy, gweight, gbias, gmean, grstd = map(guard.copy, (x, dy, weight, bias, *statistics))
    # what a buffer holds of each row
    strided_x, strided_dy = (guard.empty((shape[0], shape[1] + 1), dtype)[:, 1:] for _ in range(2))
    strided_x[...], strided_dy[...] = x, dy
    with allocated_by(guard):
        # the second time by a plan
        for _ in range(2):
            out = guard.empty(shape, dtype)
            assert_same_bits([nbnorm.layer_norm(gx, shape[1], gweight, gbias, *mode, out=out)], [y])
            for array in (gx, strided_x):
                assert_same_bits(
                    nbnorm.layer_norm(array, shape[1], gweight, gbias, *mode, return_stats=True), [y, mean, rstd]
                )
            outs = guard.empty(shape, dtype), *(guard.empty(grad.shape, grad.dtype) for grad in grads[1:])
            assert_same_bits(nbnorm.layer_norm_backward(gdy, gx, shape[1], gweight, *mode, out=outs), grads)
            assert_same_bits(nbnorm.layer_norm_backward(strided_dy, strided_x, shape[1], gweight, *mode), grads)
            results = nbnorm.layer_norm_backward(gdy, gx, shape[1], gweight, *mode, mean=gmean, rstd=grstd)
            assert_same_bits(results, given)
    assert_same_bits([gx, gdy, strided_x, strided_dy, gmean, grstd], [x, dy, x, dy, *statistics])
    guard.assert_untouched()


def check_masks(guard):
    x, dy, weight, _ = operands(np.random.default_rng(0), (37, 24), np.float32)
    full = nbnorm.layer_norm_backward(dy, x, 24, weight)
    gx, gdy, gweight = map(guard.copy, (x, dy, weight))
    for mask in itertools.product([True, False], repeat=3):
        # compiled before
        nbnorm.layer_norm_backward(dy, x, 24, weight, output_mask=mask)
        wanted = [i for i in range(3) if mask[i]]
        for _ in range(2):
            with allocated_by(guard):
                grads = nbnorm.layer_norm_backward(gdy, gx, 24, gweight, output_mask=mask)
            assert_same_bits([grads[i] for i in wanted], [full[i] for i in wanted])
    guard.assert_untouched()


WAYS = [
    {},
    {(sizes, "STREAMED_BYTES"): 0},
    {(sizes, "LONG_ROW"): 0, (sizes, "STREAMED_BYTES"): 0},
    {(sizes, "SHORT_ROW"): 0},
    {(sizes, "SHORT_ROW"): 0, (sizes, "STREAMED_BYTES"): 0},
    {(staging, "BUFFER_ELEMENTS"): 1},
]


def run(dtypes=DTYPES, whose=(parallel.ONE, parallel.NUMBAS), modes=(False, True)):
    """Every check, which prints how many there were."""
    count = 0
    for workers, at in itertools.product(whose, ("first", "last")):
        is_parallel = workers == parallel.NUMBAS
        guard = Guard(at)
        elements = 0 if is_parallel else float("inf")
        with patch.multiple(parallel, from_elements=elements, many=workers, _is_decided=True, STALL_SECONDS=float("inf")):
            for dtype, way, has_parameters, mode in itertools.product(dtypes, WAYS, (True, False), modes):
                # these kernels, and the parallel ones, are of the same source for all
                if dtype != np.float32 and (is_parallel or {(sizes, "LONG_ROW"), (sizes, "SHORT_ROW")} & way.keys()):
                    continue
                with ExitStack() as stack:
                    for (module, name), value in way.items():
                        stack.enter_context(patch.object(module, name, value))
                    for shape in SHAPES if way or dtype != np.float32 else SHAPES + LONG_SHAPES:
                        check(guard, shape, dtype, has_parameters, mode)
                        count += 1
            check_masks(guard)
    print(count, "checked")


def run_bfloat16():
    """What 16 bits change where a processor lacks AVX-512's masks."""
    run([ml_dtypes.bfloat16], (parallel.ONE,), (False,))


@njit
def read_and_write(array, k, start):
    meaning.store(meaning.pointer(array), start, meaning.load(meaning.pointer(array), k))


def touch(at, k, start):
    """Read sixteen elements of an array of 32 from k on, and write them from `start` on."""
    read_and_write(Guard(at).copy(np.zeros(32, np.float32)), int(k), int(start))


if __name__ == "__main__":
    {"run": run, "run_bfloat16": run_bfloat16, "touch": touch}[sys.argv[1]](*sys.argv[2:])
