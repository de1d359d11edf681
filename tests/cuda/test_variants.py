"""Is what every kernel that is compiled computes right? Each is run by a call that chooses it, on PTX alone."""

import ml_dtypes
import numpy as np
import pytest
from numba import cuda

import mean_square
import nbnorm
import offline
import oracle
import ptx_device
from device import normal, to_device, to_host
from nbnorm.cuda import sizes
from tolerances import (
    CUDA_GRADIENT_EPS,
    CUDA_STATISTICS_EPS,
    CUDA_Y_EPS,
    EPS,
    SMALLEST,
    assert_grads,
    assert_statistics,
    assert_y,
)
from variants import PROBLEMS

pytestmark = pytest.mark.hardware


def shortened(variant):
    """As its call is, which of a long row has several kernels, the same as where a row is just too long for a block."""
    longest = longest_whole(variant)
    if variant.cols <= longest:
        return variant
    call = variant._replace(step="whole", cols=longest + (1 if variant.cols % 2 else 8))
    assert call.tile == variant.tile
    return call


def longest_whole(variant):
    return sizes.longest_whole(variant.cols, offline.itemsize(variant.dtype), variant.direction)


# by whether there is a mean, and whether something is added
FUNCTIONS = {
    (True, False): (nbnorm.layer_norm, nbnorm.layer_norm_backward),
    (False, False): (nbnorm.rms_norm, nbnorm.rms_norm_backward),
    (True, True): (nbnorm.add_layer_norm, nbnorm.add_layer_norm_backward),
    (False, True): (nbnorm.add_rms_norm, nbnorm.add_rms_norm_backward),
}
CALLS = list(dict.fromkeys(shortened(v) for c, v in PROBLEMS if c == ptx_device.capability))
# of which the squares overflow in what is computed in
EXTREME = {"float32": 1e30, "bfloat16": 1e30, "float64": 1e200}


@pytest.fixture(autouse=True)
def few_groups(monkeypatch):
    """Blocks take several rows each."""
    monkeypatch.setattr(sizes, "MULTIPROCESSORS", 1)


@pytest.mark.parametrize("variant", [v for v in CALLS if v.direction == "forward"], ids=str)
def test_forward(rng, variant):
    x, weight, bias = operands(rng, variant)
    _, access, parameter_access, added_access = variant.accesses
    # an access is the widest that x and y allow, or weight and bias
    on_device = [placed(x, access), *(placed(array, parameter_access) for array in (weight, bias))]
    options = {"return_stats": True}
    if variant.has_mean and variant.beside is None:
        options["use_diff_of_squares"] = is_squares = variant.variance == "diff_of_squares"
    else:
        is_squares = False
    if variant.beside is not None:
        residual = normal(rng, x.shape, dtype_of(variant.beside))
        on_device.insert(1, placed(residual, added_access))
        options |= {} if variant.with_total else {"total_out": False}
        x = (x.astype(variant.dtype) + residual.astype(variant.dtype)).astype(x.dtype)
    on_device.insert(-2, variant.cols)
    function = FUNCTIONS[variant.has_mean, variant.beside is not None][0]
    # RMS norm has no bias
    results = function(*on_device[: None if variant.has_mean else -1], eps=1e-5, **options)
    assert_ran(variant)
    if variant.with_total:
        np.testing.assert_array_equal(to_host(results.total), x)
    y, rstd = to_host(results.y), to_host(results.rstd)
    if not variant.has_mean:
        mean_square.assert_y(y, rstd, x, weight, 1e-5)
        return
    y_eps = CUDA_Y_EPS if variant.x_dtype in ("float32", "float64") else 1
    assert_y(y, x, 1, weight, bias, 1e-5, is_squares, y_eps, variant.dtype)
    assert_statistics(to_host(results.mean), rstd, x, 1, 1e-5, is_squares, CUDA_STATISTICS_EPS, variant.dtype)


@pytest.mark.parametrize("variant", [v for v in CALLS if v.direction == "backward"], ids=str)
def test_backward(rng, variant):
    dy, x, weight, mean, rstd = operands(rng, variant)
    dy_access, access, parameter_access, added_access = variant.accesses
    on_device = [placed(dy, dy_access), placed(x, access), variant.cols, placed(weight, parameter_access)]
    statistics = {}
    if variant.is_given:
        statistics = {"mean": mean} if variant.has_mean else {}
        statistics["rstd"] = np.abs(rstd)
    options = {name: to_device(array) for name, array in statistics.items()}
    is_squares = variant.variance == "diff_of_squares"
    if is_squares:
        options["use_diff_of_squares"] = True
    dtotal = None
    if variant.beside is not None:
        dtotal = normal(rng, x.shape, dtype_of(variant.beside))
        on_device.insert(1, placed(dtotal, added_access))
    options["output_mask"] = variant.output_mask[: 3 if variant.has_mean else 2]
    grads = FUNCTIONS[variant.has_mean, dtotal is not None][1](*on_device, 1e-5, **options)
    assert_ran(variant)
    grads = type(grads)(*(None if grad is None else to_host(grad) for grad in grads))
    if dtotal is not None:
        exact = oracle.backward(dy, x, 1, weight) if variant.has_mean else mean_square.exact_backward(dy, x, weight)
        assert_sum(grads.dx, exact[0], dtotal)
        grads = grads._replace(dx=None)
    if variant.has_mean:
        tolerance = {"gradient_eps": CUDA_GRADIENT_EPS, "sums": variant.dtype}
        assert_grads(grads, dy, x, 1, weight, 1e-5, is_squares, **tolerance, **statistics)
    else:
        mean_square.assert_grads(grads, dy, x, weight, 1e-5, **statistics)


def assert_sum(dx, exact, dtotal):
    """The tolerance of `assert_grads`, where the row's largest dx is as large as what it is a difference of."""
    largest = np.abs(exact).max(1, keepdims=True)
    exact = exact + dtotal.astype(oracle.WIDE)
    allowed = CUDA_GRADIENT_EPS * EPS[dx.dtype.name] * (np.abs(exact) + 2 * largest) + SMALLEST[dx.dtype.name]
    assert (np.abs(dx.astype(oracle.WIDE) - exact) <= allowed).all()


def operands(rng, variant):
    """As many rows as leave blocks, and teams of the last one, without; of the last row, squares overflow."""
    tile = variant.tile
    rows = tile.teams * (2 * tile.blocks if variant.direction == "backward" else 1) + 1
    if variant.cols > longest_whole(variant):
        rows = 3
    shapes = [(rows, variant.cols), variant.cols, variant.cols]
    if variant.direction == "backward":
        shapes = [(rows, variant.cols), *shapes[:2], (rows, 1), (rows, 1)]
    named = zip(variant.operands, shapes, strict=True)
    arrays = [None if name is None else normal(rng, shape, dtype_of(name)) for name, shape in named]
    x = arrays[0 if variant.direction == "forward" else 1]
    x += x.dtype.type(1)
    if not variant.is_given and variant.x_dtype in EXTREME:
        x[-1] *= x.dtype.type(EXTREME[variant.x_dtype])
    return arrays


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name)).type


def placed(host, access):
    """On the device, at an address that allows accesses of so many elements and no wider ones."""
    if host is None:
        return None
    shift = access if access * host.itemsize < 16 else 0
    memory = cuda.device_array(host.size + shift, host.dtype)
    array = memory[shift:].reshape(host.shape)
    array.copy_to_device(host)
    return array


def assert_ran(variant):
    ran = {id(launch[0]) for launch in ptx_device.launches}
    for step in offline.steps(variant.direction, variant.operands, variant.cols, **choices(variant)):
        is_needed = step.step != "means" or variant.output_mask[0] or (variant.output_mask[1] and not variant.is_given)
        assert id(offline.source(ptx_device.capability, step)[0]) in ran or not is_needed, step


def choices(variant):
    names = ("variance", "output_mask", "access", "dy_access", "parameter_access", "beside", "with_total")
    return {name: getattr(variant, name) for name in names}
