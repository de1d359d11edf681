"""Are the longest rows that a block holds right, the first that none does, and those of very many groups?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import LEVEL, normal, to_device, to_host
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, assert_grads, assert_statistics, assert_y

pytestmark = pytest.mark.hardware

# 1024 threads forward and 512 backward, which hold all that they can; and one element more
FORWARD = [(np.float32, 32768), (np.float32, 32769), (ml_dtypes.bfloat16, 32768), (np.float64, 8192), (np.float64, 8193)]
BACKWARD = [(np.float32, 8192), (np.float32, 8193), (ml_dtypes.bfloat16, 8192), (np.float64, 2048), (np.float64, 2049)]
# of odd rows a thread holds fewer
BACKWARD += [(np.float32, 6143), (np.float32, 6145)]
# which thread is first, and which way an approximate instruction is off
CHANCES = list(itertools.product(("forward", "reverse", "random"), (1, -1))) if LEVEL == "ptx" else [None]


@pytest.fixture(params=CHANCES, ids=str)
def chance(request, monkeypatch):
    if request.param is not None:
        import ptx_device

        for name, value in zip(("order", "rounding"), request.param, strict=True):
            monkeypatch.setattr(ptx_device, name, value)


def assert_forward(rng, dtype, rows, cols):
    # a mean that drifts, which the segments have each their own of
    x = normal(rng, (rows, cols), dtype) + np.linspace(0, 9, cols).astype(dtype)
    weight, bias = normal(rng, (2, cols), dtype)
    results = nbnorm.layer_norm(*map(to_device, (x,)), cols, *map(to_device, (weight, bias)), return_stats=True)
    y, mean, rstd = map(to_host, results)
    sums = "float64" if dtype == np.float64 else "float32"
    assert_y(y, x, 1, weight, bias, y_eps=1 if dtype == ml_dtypes.bfloat16 else CUDA_Y_EPS, sums=sums)
    assert_statistics(mean, rstd, x, 1, statistics_eps=CUDA_STATISTICS_EPS, sums=sums)


def assert_backward(rng, dtype, rows, cols):
    drift = np.linspace(0, 5, cols).astype(dtype)
    dy, x = normal(rng, (rows, cols), dtype) + drift, normal(rng, (rows, cols), dtype) + drift
    weight = normal(rng, cols, dtype)
    results = nbnorm.layer_norm_backward(to_device(dy), to_device(x), cols, to_device(weight))
    grads = nbnorm.functional.LayerNormGrads(*map(to_host, results))
    sums = "float64" if dtype == np.float64 else "float32"
    assert_grads(grads, dy, x, 1, weight, gradient_eps=CUDA_GRADIENT_EPS, sums=sums)


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(("dtype", "cols"), FORWARD)
def test_forward(rng, dtype, cols, rows):
    assert_forward(rng, dtype, rows, cols)


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(("dtype", "cols"), BACKWARD)
def test_backward(rng, dtype, cols, rows):
    assert_backward(rng, dtype, rows, cols)


@pytest.mark.parametrize("cols", [5, 1000, 4096])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_forward_by_chance(rng, chance, dtype, cols):
    assert_forward(rng, dtype, 37 if cols < 4096 else 2, cols)


@pytest.mark.parametrize("cols", [5, 500, 2048])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_backward_by_chance(rng, chance, dtype, cols):
    assert_backward(rng, dtype, 37 if cols < 2048 else 2, cols)


# rows of a warp's eighth, of a warp, of a block: the sums are of as many groups as there are
@pytest.mark.parametrize(("rows", "cols"), [(9000, 5), (1100, 64), (300, 500), (150, 2048)])
def test_many_groups(rng, rows, cols):
    assert_backward(rng, np.float32, rows, cols)


# as many rows as blocks have teams; fewer, so that teams of a warp are left without one, or whole warps; and 97 rows, of
# which some groups have two turns and some warps one
@pytest.mark.parametrize(
    ("rows", "cols"), [(32, 64), (21, 64), (97, 64), (8, 500), (5, 500), (97, 500), (3, 2048), (3, 4096)]
)
def test_in_place(rng, rows, cols):
    dy, x = normal(rng, (2, rows, cols), np.float32)
    weight = normal(rng, cols, np.float32)
    out = to_device(x)
    assert nbnorm.layer_norm(out, cols, to_device(weight), out=out) is out
    assert_y(to_host(out), x, 1, weight, y_eps=CUDA_Y_EPS)
    for which in range(2):
        operands = [to_device(dy), to_device(x)]
        out = operands[which], None, None
        results = nbnorm.layer_norm_backward(*operands, cols, to_device(weight), out=out)
        grads = nbnorm.functional.LayerNormGrads(*map(to_host, results))
        assert_grads(grads, dy, x, 1, weight, gradient_eps=CUDA_GRADIENT_EPS)
