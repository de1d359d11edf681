"""What this machine can do: layer norm on real-sized arrays, checked against float64 and timed beside NumPy and a copy."""

import hashlib
import logging
import math
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numba
import numpy as np
from numba.core import config

import nbnorm
from nbnorm import reference
from nbnorm.calls import checks
from nbnorm.cpu.workers import parallel
from nbnorm.functional import LayerNormGrads

# (shape, normalized_shape): a transformer's activations, a large one's, and a batch of images. The second is just large
# enough to be written past the caches; more would only take memory
SHAPES = [((4096, 768), (768,)), ((1024, 4096), (4096,)), ((32, 64, 28, 28), (28, 28))]
# (is backward, use_diff_of_squares): both passes and both modes with the fewest kernels. Backward takes the other mode's
# statistics as forward does
CALLS = [(False, False), (False, True), (True, False)]
REPEATS = 5
# how far a result may be from the reference, in eps of float32: see the functions that measure it
ALLOWED = {"forward": 4, "backward": 8}
# CUDA kernels compute float32 rows in float32 throughout
ALLOWED_ON_CUDA = 16
# calls between two events, so that the host is ahead of the device
CUDA_CALLS = 20
# NumPy works on so many elements at a time, so that its intermediates stay in a core's cache and take little memory
BLOCK_ELEMENTS = 1 << 16
# one other process on two processors leaves 0.67 to 0.8 of them
IDLE_SHARE = 0.9
# hashed in some 10 ms, without the interpreter: several of a scheduler's slices, of a few ms each, need more than one
HASHED = bytes(1 << 24)
HASHINGS = 4


def report():
    """Print the machine and a line for each check; returns whether all of them passed."""
    with compilations_shown():
        return _report()


def _report():
    print(f"nbnorm {nbnorm.__version__}, numba {numba.__version__}, NumPy {np.__version__}, ", end="")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"CPU:  {config.NUMBA_NUM_THREADS} threads, {os.cpu_count()} processors, ", end="")
    print(f"threading layer {threading_layer()}")
    print()
    print("float32. error, limit: the largest error against float64, and what is allowed, in eps.")
    print("nbnorm, NumPy, copy: medians in ms. NumPy works on blocks of rows; the copy moves as many bytes.")
    print()
    print(f"{'shape':<17} {'over':<9} {'pass':<9} {'variance':<16} ", end="")
    print(f"{'error':>6} {'limit':>6} {'nbnorm':>9} {'NumPy':>9} {'copy':>9}", flush=True)
    shares: list[float] = []
    passed = [check(shares, *case) for case in cases()]
    print()
    # after the others, since numba-cuda takes 40 MB
    print(f"CUDA: {cuda_devices()}")
    if cuda_fault() is None:
        print("On the CUDA device, by its clock:", flush=True)
        passed += [check_on_cuda(*case) for case in cases()]
    print()
    share = statistics.mean(shares)
    if share < IDLE_SHARE:
        print(f"This machine is busy: a thread for each processor gets {share:.0%} of its time, beside other processes or")
        print("within a quota. The times above are longer than on an idle machine, and vary.")
    print(f"{sum(passed)} of {len(passed)} checks passed")
    return all(passed)


@contextmanager
def compilations_shown():
    """Print what the package logs, which is what it compiles: each kernel takes seconds."""
    handler = logging.Handler()
    # a StreamHandler would report a closed pipe as an error of logging
    handler.emit = lambda record: print(f"  {record.getMessage()}", flush=True)  # type: ignore[method-assign]
    logger = logging.getLogger("nbnorm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def threading_layer():
    """Whose threads Numba's are, or why there are none."""
    if config.DISABLE_JIT:
        return "none, NUMBA_DISABLE_JIT is set"
    try:
        # launches them
        numba.get_num_threads()
        return numba.threading_layer()  # type: ignore[attr-defined]
    except ValueError as error:
        return f"none, {error}"


def cuda_fault():
    """What keeps kernels from a CUDA device; None where nothing does."""
    return checks.cuda_fault() if checks.has_numba_cuda() else "numba-cuda is not installed"


def cuda_devices():
    """The CUDA devices, or why there are none."""
    fault = cuda_fault()
    if fault is not None:
        return f"none, {fault}"
    from numba import cuda

    return ", ".join(device.name for device in cuda.gpus)


def cases():
    """Operands, memory for results, and what to call."""
    rng = np.random.default_rng(0)
    # one piece for all of them: malloc keeps some of what is freed
    memory = np.zeros(max(math.prod(shape) for shape, _ in SHAPES) * 3, np.float32)
    for shape, normalized_shape in SHAPES:
        size = math.prod(shape)
        operands = rng.standard_normal(out=memory[: 2 * size], dtype=np.float32).reshape(2, *shape)
        out = memory[2 * size : 3 * size].reshape(shape)
        weight, bias = rng.standard_normal((2, *normalized_shape), dtype=np.float32)
        for call in CALLS:
            yield operands, out, weight, bias, *call


def check(shares, operands, out, weight, bias, backward, use_diff_of_squares):
    """Print one line, and add to `shares`; returns whether the result is as close to the reference as it must be."""
    dy, x = operands
    row = weight.shape
    # not what an earlier call left
    out.fill(np.nan)

    def ours():
        if backward:
            outs = (out, None, None)
            return nbnorm.layer_norm_backward(dy, x, row, weight, 1e-5, use_diff_of_squares, out=outs)
        return nbnorm.layer_norm(x, row, weight, bias, 1e-5, use_diff_of_squares, out=out)

    def plain():
        dy_rows, x_rows, out_rows = (array.reshape(-1, *row) for array in (dy, x, out))
        dweight, dbias = np.zeros((2, *row), np.float32)
        for rows in blocks(x_rows):
            if backward:
                grads = reference.layer_norm_backward(
                    dy_rows[rows], x_rows[rows], len(row), weight, 1e-5, use_diff_of_squares
                )
                out_rows[rows] = grads[0]
                dweight += grads[1]
                dbias += grads[2]
            else:
                y = reference.layer_norm(x_rows[rows], len(row), weight, bias, 1e-5, use_diff_of_squares)[0]
                out_rows[rows] = y

    result = ours()
    error = largest_error_of_gradients(result, dy, x, weight) if backward else largest_error_of_y(result, x, weight, bias)
    # some threads of OpenMP wait for 0.2 s by spinning, and the reference has taken longer
    shares.append(share_of_processors())
    with ThreadPoolExecutor(parallel.processors()) as pool:
        *times, copy_time = medians(ours, plain, lambda: copy(pool, x.reshape(-1), out.reshape(-1)))
    # forward reads x and writes y, backward reads x and dy and writes dx
    times.append(copy_time * 1.5 if backward else copy_time)
    name = "backward" if backward else "forward"
    return show(x, row, name, use_diff_of_squares, error, ALLOWED[name], times)


def copy(pool, source, destination):
    """By all threads of the pool: NumPy lets go of the interpreter while it copies."""
    threads = pool._max_workers
    list(pool.map(np.copyto, np.array_split(destination, threads), np.array_split(source, threads)))


def share_of_processors():
    """How much of the time that a thread for each processor asks for it gets: less than all where other processes run."""
    with ThreadPoolExecutor(parallel.processors()) as pool:
        times = list(pool.map(time_of_hashing, range(pool._max_workers)))
    return sum(processor for processor, _ in times) / sum(clock for _, clock in times)


def time_of_hashing(_):
    """Seconds of this thread on a processor, and by the clock."""
    clock, processor = time.perf_counter(), time.thread_time()
    for _ in range(HASHINGS):
        hashlib.sha256(HASHED)
    return time.thread_time() - processor, time.perf_counter() - clock


def check_on_cuda(operands, _, weight, bias, backward, use_diff_of_squares):
    """The same on the current CUDA device."""
    from numba import cuda

    dy, x = operands
    row = weight.shape
    dy_there, x_there, weight_there, bias_there = (cuda.to_device(array) for array in (dy, x, weight, bias))
    # not what an earlier call left
    out = [cuda.to_device(np.full_like(array, np.nan)) for array in (x, weight, weight)]
    copied = cuda.device_array(x.size * 3 // 2 if backward else x.size, np.float32)
    destination = cuda.device_array_like(copied)

    def ours():
        if backward:
            nbnorm.layer_norm_backward(dy_there, x_there, row, weight_there, 1e-5, use_diff_of_squares, out=tuple(out))
        else:
            nbnorm.layer_norm(x_there, row, weight_there, bias_there, 1e-5, use_diff_of_squares, out=out[0])

    ours()
    if backward:
        grads = LayerNormGrads(*(array.copy_to_host() for array in out))
        error = largest_error_of_gradients(grads, dy, x, weight)
    else:
        error = largest_error_of_y(out[0].copy_to_host(), x, weight, bias)
    ours_time, copy_time = cuda_medians(ours, lambda: destination.copy_to_device(copied))
    name = "backward" if backward else "forward"
    return show(x, row, name, use_diff_of_squares, error, ALLOWED_ON_CUDA, (ours_time, None, copy_time), digits=3)


def show(x, row, name, use_diff_of_squares, error, allowed, times, digits=2):
    """Print the line of a check; returns whether it is passed."""
    variance = "diff of squares" if use_diff_of_squares else "centred"
    # NaN is not
    passed = bool(error <= allowed)
    print(
        f"{x.shape!s:<17} {row!s:<9} {name:<9} {variance:<16} {error:6.2f} {allowed:6} "
        + " ".join(f"{'-':>9}" if t is None else f"{1e3 * t:9.{digits}f}" for t in times)
        + ("" if passed else "   FAILED"),
        flush=True,
    )
    return passed


def largest_error_of_y(y, x, weight, bias):
    """In eps of (|normalised part| + |bias| + 1), the largest of all rows."""
    row = weight.shape
    y, x = y.reshape(-1, *row), x.reshape(-1, *row)
    return max(reference.error_of_y(y[rows], x[rows].astype(np.float64), len(row), weight, bias) for rows in blocks(x))


def largest_error_of_gradients(grads, dy, x, weight):
    """In eps, of |dx| + the largest |dx| of the row, and of |dweight| or |dbias| + sqrt(rows): the largest of all."""
    row = weight.shape
    dx, dy, x = (a.reshape(-1, *row) for a in (grads.dx, dy, x))
    errors = []
    dweight = np.zeros(row)
    dbias = np.zeros(row)
    for rows in blocks(x):
        exact = reference.layer_norm_backward(dy[rows].astype(np.float64), x[rows].astype(np.float64), len(row), weight)
        largest = np.abs(exact[0]).max(tuple(range(1, x.ndim)), keepdims=True)
        errors.append(np.max(np.abs(dx[rows] - exact[0]) / (np.abs(exact[0]) + largest)))
        dweight += exact[1]
        dbias += exact[2]
    for value, total in ((grads.dweight, dweight), (grads.dbias, dbias)):
        errors.append(np.max(np.abs(value - total) / (np.abs(total) + np.sqrt(len(x)))))
    return max(errors) / np.finfo(np.float32).eps


def blocks(x):
    """Slices of some rows each."""
    step = max(1, BLOCK_ELEMENTS // x[0].size)
    return (slice(start, start + step) for start in range(0, len(x), step))


def medians(*functions):
    """Seconds of each, called in turn so that all of them see the same state of the machine."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def cuda_medians(*functions):
    """Seconds of each by the device's own clock, in turn."""
    from numba import cuda

    times: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, seconds in zip(functions, times, strict=True):
            start, stop = cuda.event(), cuda.event()
            function()
            start.record()
            for _ in range(CUDA_CALLS):
                function()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3 / CUDA_CALLS)
    return [statistics.median(seconds) for seconds in times]
