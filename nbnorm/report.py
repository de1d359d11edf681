"""What this machine can do: layer norm on real-sized arrays, checked against float64 and timed beside NumPy and a copy."""

import os
import platform
import statistics
import time

import numba
import numpy as np
from numba import njit, prange
from numba.core import config

import nbnorm
from nbnorm import checks, reference
from nbnorm.functional import LayerNormGrads

# (shape, normalized_shape): a transformer's activations, a large one's, and a batch of images
SHAPES = [((8192, 768), (768,)), ((4096, 4096), (4096,)), ((32, 64, 28, 28), (28, 28))]
REPEATS = 7
# how far a result may be from the reference, in eps of float32: see the functions that measure it
ALLOWED = {"forward": 4, "backward": 8}
# CUDA kernels compute float32 rows in float32 throughout
ALLOWED_ON_CUDA = 16
# calls between two events, so that the host is ahead of the device
CUDA_CALLS = 20
ROWS_AT_ONCE = 256


@njit(parallel=True)
def copy(source, destination):
    for i in prange(source.size):
        destination[i] = source[i]


def report():
    """Print the machine and a line for each check; returns whether all of them passed."""
    small = np.zeros(1 << 16, np.float32)
    copy(small, np.empty_like(small))
    print(f"nbnorm {nbnorm.__version__}, numba {numba.__version__}, NumPy {np.__version__}, ", end="")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    layer = "none, NUMBA_DISABLE_JIT is set" if config.DISABLE_JIT else numba.threading_layer()  # type: ignore[attr-defined]
    print(f"CPU:  {numba.get_num_threads()} threads, {os.cpu_count()} processors, threading layer {layer}")
    print(f"CUDA: {cuda_devices()}")
    print()
    print(
        "float32; the largest error against float64, in eps, of what is allowed; medians in ms of nbnorm, NumPy and a copy"
    )
    print("of the same bytes")
    print()
    print(f"{'shape':<17} {'over':<9} {'pass':<9} {'variance':<16} {'error':<10} {'nbnorm':>8} {'NumPy':>8} {'copy':>8}")
    passed = [check(*case) for case in cases()]
    if cuda_fault() is None:
        print()
        print("On the CUDA device, by its clock:")
        passed += [check_on_cuda(*case) for case in cases()]
    print()
    print(f"{sum(passed)} of {len(passed)} checks passed")
    return all(passed)


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
    rng = np.random.default_rng(0)
    for shape, normalized_shape in SHAPES:
        x, dy = rng.standard_normal((2, *shape), dtype=np.float32)
        weight, bias = rng.standard_normal((2, *normalized_shape), dtype=np.float32)
        for backward in (False, True):
            for use_diff_of_squares in (False, True):
                yield dy, x, weight, bias, backward, use_diff_of_squares


def check(dy, x, weight, bias, backward, use_diff_of_squares):
    """Print one line; returns whether the result is as close to the reference as it must be."""
    row = weight.shape
    out = np.empty_like(x)

    def ours():
        if backward:
            outs = (out, None, None)
            return nbnorm.layer_norm_backward(dy, x, row, weight, 1e-5, use_diff_of_squares, out=outs)
        return nbnorm.layer_norm(x, row, weight, bias, 1e-5, use_diff_of_squares, out=out)

    def plain():
        if backward:
            return reference.layer_norm_backward(dy, x, len(row), weight, 1e-5, use_diff_of_squares)
        return reference.layer_norm(x, len(row), weight, bias, 1e-5, use_diff_of_squares)

    # forward reads x and writes y, backward reads x and dy and writes dx
    source, destination = np.zeros((2, x.size * 3 // 2 if backward else x.size), np.float32)
    result = ours()
    error = largest_error_of_gradients(result, dy, x, weight) if backward else largest_error_of_y(result, x, weight, bias)
    times = medians(ours, plain, lambda: copy(source, destination))
    name = "backward" if backward else "forward"
    return show(x, row, name, use_diff_of_squares, error, ALLOWED[name], times)


def check_on_cuda(dy, x, weight, bias, backward, use_diff_of_squares):
    """The same on the current CUDA device."""
    from numba import cuda

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
    shown = f"{error:4.2f} of {allowed}"
    print(
        f"{x.shape!s:<17} {row!s:<9} {name:<9} {variance:<16} {shown:<10} "
        + " ".join(f"{'-':>8}" if t is None else f"{1e3 * t:8.{digits}f}" for t in times)
        + ("" if passed else "   FAILED"),
        flush=True,
    )
    return passed


def largest_error_of_y(y, x, weight, bias):
    """In eps of (|normalised part| + |bias| + 1), the largest of all rows."""
    row = weight.shape
    y, x = y.reshape(-1, *row), x.reshape(-1, *row)
    return max(
        reference.error_of_y(y[rows], x[rows].astype(np.float64), len(row), weight, bias) for rows in row_slices(len(x))
    )


def largest_error_of_gradients(grads, dy, x, weight):
    """In eps, of |dx| + the largest |dx| of the row, and of |dweight| or |dbias| + sqrt(rows): the largest of all."""
    row = weight.shape
    dx, dy, x = (a.reshape(-1, *row) for a in (grads.dx, dy, x))
    errors = []
    dweight = np.zeros(row)
    dbias = np.zeros(row)
    for rows in row_slices(len(x)):
        exact = reference.layer_norm_backward(dy[rows].astype(np.float64), x[rows].astype(np.float64), len(row), weight)
        largest = np.abs(exact[0]).max(tuple(range(1, x.ndim)), keepdims=True)
        errors.append(np.max(np.abs(dx[rows] - exact[0]) / (np.abs(exact[0]) + largest)))
        dweight += exact[1]
        dbias += exact[2]
    for value, total in ((grads.dweight, dweight), (grads.dbias, dbias)):
        errors.append(np.max(np.abs(value - total) / (np.abs(total) + np.sqrt(len(x)))))
    return max(errors) / np.finfo(np.float32).eps


def row_slices(rows):
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, rows, ROWS_AT_ONCE))


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
