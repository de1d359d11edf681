"""Do the device functions of `nbnorm.cuda.device` compute in people's own kernels what this package's kernels do?"""

from functools import cache

import numpy as np
import pytest
from numba import cuda

import oracle
import pages
import users
from device import large, normal
from magnitudes import EPSILONS, rows
from nbnorm import LayerNormGrads
from nbnorm.cuda import device
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, EPS, assert_grads, assert_statistics, assert_y

pytestmark = pytest.mark.hardware

# columns, threads of a row and of a block, neighbouring columns of a thread. A single element; parts of a warp; a warp, its
# last elements beyond the row's end; a warp in the middle of a block; all of a row in one vector a thread; two warps and
# three; most threads without any element; and as many threads as there can be
TEAMS = [
    (1, 1, 32, 1), (9, 4, 64, 1), (10, 8, 32, 2), (100, 32, 32, 1), (64, 32, 96, 1), (128, 16, 32, 8), (300, 64, 64, 1),
    (384, 96, 96, 4), (5, 64, 64, 1), large(2049, 1024, 1024, 1),
]  # fmt: skip
# the kernels of a user's own have so many blocks, which go on to other rows
BLOCKS = 2


@cache
def forward_kernel(cols, threads, block, width, dtype, eps, is_rms):
    make = device.rms_norm if is_rms else device.layer_norm
    normalise = make(cols, threads, eps, dtype=dtype, width=width)
    teams, held, step = block // threads, -(-cols // (threads * width)), threads * width
    size, element = held * width, getattr(np, dtype)

    @cuda.jit
    def kernel(x, y, mean, rstd):
        thread, team = cuda.threadIdx.x % threads, cuda.threadIdx.x // threads
        values = cuda.local.array(size, element)
        for begin in range(cuda.blockIdx.x * teams, x.shape[0], BLOCKS * teams):
            # those without a row take part
            row = min(begin + team, x.shape[0] - 1)
            for i in range(held):
                for j in range(width):
                    column = i * step + thread * width + j
                    if column < cols:
                        values[i * width + j] = x[row, column]
            found = normalise(values)
            if begin + team < x.shape[0]:
                if thread == 0:
                    if is_rms:
                        rstd[row] = found
                    else:
                        mean[row], rstd[row] = found
                for i in range(held):
                    for j in range(width):
                        column = i * step + thread * width + j
                        if column < cols:
                            y[row, column] = values[i * width + j]

    return kernel


@cache
def backward_kernel(cols, threads, block, width, dtype, eps, is_rms):
    make = device.rms_norm_backward if is_rms else device.layer_norm_backward
    gradients = make(cols, threads, eps, dtype=dtype, width=width)
    teams, held, step = block // threads, -(-cols // (threads * width)), threads * width
    size, element = held * width, getattr(np, dtype)

    @cuda.jit
    def kernel(dy, x, weight, dx, x_hat):
        thread, team = cuda.threadIdx.x % threads, cuda.threadIdx.x // threads
        values, g = cuda.local.array(size, element), cuda.local.array(size, element)
        for begin in range(cuda.blockIdx.x * teams, x.shape[0], BLOCKS * teams):
            row = min(begin + team, x.shape[0] - 1)
            for i in range(held):
                for j in range(width):
                    column = i * step + thread * width + j
                    if column < cols:
                        values[i * width + j] = x[row, column]
                        g[i * width + j] = dy[row, column] * weight[column]
            gradients(values, g)
            if begin + team < x.shape[0]:
                for i in range(held):
                    for j in range(width):
                        column = i * step + thread * width + j
                        if column < cols:
                            dx[row, column] = g[i * width + j]
                            x_hat[row, column] = values[i * width + j]

    return kernel


def forward(x, threads, block, width, eps=1e-5, is_rms=False):
    kernel = forward_kernel(x.shape[1], threads, block, width, x.dtype.name, eps, is_rms)
    y, mean, rstd = np.empty_like(x), np.zeros(len(x), x.dtype), np.empty(len(x), x.dtype)
    users.launch(kernel, BLOCKS, block, x, y, mean, rstd)
    return y, mean[:, None], rstd[:, None]


def backward(dy, x, weight, threads, block, width, eps=1e-5, is_rms=False):
    """dx and x_hat."""
    kernel = backward_kernel(x.shape[1], threads, block, width, x.dtype.name, eps, is_rms)
    dx, x_hat = np.empty_like(x), np.empty_like(x)
    users.launch(kernel, BLOCKS, block, dy, x, weight, dx, x_hat)
    return dx, x_hat


def assert_forward(y, mean, rstd, x, eps=1e-5, is_rms=False):
    assert_y(y, x, 1, None, None, eps, y_eps=CUDA_Y_EPS, is_rms=is_rms)
    assert_statistics(mean, rstd, x, 1, eps, statistics_eps=CUDA_STATISTICS_EPS, is_rms=is_rms)


def assert_backward(dx, x_hat, dy, x, weight, eps=1e-5, is_rms=False):
    assert_y(x_hat, x, 1, None, None, eps, y_eps=CUDA_Y_EPS, is_rms=is_rms)
    options = {"gradient_eps": CUDA_GRADIENT_EPS, "is_rms": is_rms}
    # the row's parts of dweight and dbias, which the kernel would add up itself
    dweight = (dy.astype(np.float64) * x_hat).sum(0).astype(x.dtype)
    assert_grads(LayerNormGrads(dx, dweight, dy.sum(0)), dy, x, 1, weight, eps, **options)


@pytest.fixture
def operands(rng):
    """dy, x and weight, with rows whose squares overflow or vanish, one of equal elements and one far from 0."""

    def made(cols, dtype="float32", rows=7):
        dy, x, weight = (normal(rng, shape, dtype) for shape in ((rows, cols), (rows, cols), cols))
        limit = 30 if dtype == "float32" else 200
        x *= np.array([1, 10.0**limit, 1, 10.0**-limit, 1, 1, 1][:rows], dtype)[:, None]
        x[2:3] = dtype_of(dtype)(1 / 3)
        x[4:5] += 1000
        return dy, x, weight

    return made


def dtype_of(name):
    return getattr(np, name)


@pytest.mark.parametrize("is_rms", [False, True])
@pytest.mark.parametrize(("cols", "threads", "block", "width"), TEAMS)
def test_teams(operands, cols, threads, block, width, is_rms):
    dy, x, weight = operands(cols)
    assert_forward(*forward(x, threads, block, width, is_rms=is_rms), x, is_rms=is_rms)
    assert_backward(*backward(dy, x, weight, threads, block, width, is_rms=is_rms), dy, x, weight, is_rms=is_rms)


@pytest.mark.parametrize(("threads", "width"), [(32, 1), (64, 2)])
def test_float64(operands, threads, width):
    dy, x, weight = operands(100, "float64")
    for is_rms in (False, True):
        assert_forward(*forward(x, threads, 64, width, is_rms=is_rms), x, is_rms=is_rms)
        assert_backward(*backward(dy, x, weight, threads, 64, width, is_rms=is_rms), dy, x, weight, is_rms=is_rms)


@pytest.mark.parametrize("eps", [EPSILONS[0], EPSILONS[4], EPSILONS[9]])
def test_magnitudes(rng, eps):
    x = rows(rng, np.float32, 24, eps)
    dy, weight = normal(rng, x.shape, np.float32), np.ones(24, np.float32)
    assert_forward(*forward(x, 32, 64, 1, eps), x, eps)
    assert_backward(*backward(dy, x, weight, 32, 64, 1, eps), dy, x, weight, eps)


def test_nan_and_inf_stay_in_their_rows(operands):
    """Also in those of a warp."""
    dy, x, weight = operands(9)
    expected, (expected_dx, _) = forward(x, 4, 64, 1), backward(dy, x, weight, 4, 64, 1)
    kept = [0, 1, 2, 4, 6]
    x[3, 0], x[5, 8] = np.nan, np.inf
    for result, other in zip(forward(x, 4, 64, 1), expected, strict=True):
        np.testing.assert_array_equal(result[kept], other[kept])
    y, dx = forward(x, 4, 64, 1)[0], backward(dy, x, weight, 4, 64, 1)[0]
    assert np.isnan(y[[3, 5]]).all()
    np.testing.assert_array_equal(dx[kept], expected_dx[kept])


def test_the_bits_of_our_own_kernels(operands):
    """Where a row is shared out as theirs are."""
    import nbnorm
    from device import to_device, to_host
    from nbnorm.cuda import sizes

    for cols in (64, 300):
        _, x, _ = operands(cols)
        tile = sizes.tile(cols, 4, 4, "forward")
        y = forward(x, tile.team, tile.threads, tile.width)[0]
        np.testing.assert_array_equal(y, to_host(nbnorm.layer_norm(to_device(x), cols)))


def test_the_kernels_of_the_page(rng):
    names = {}
    exec(pages.program("docs/howto/numba.md", "Inside your own CUDA kernels").blocks[0].code, names)
    dy, x, residual = normal(rng, (3, 5, names["COLS"]), np.float32)
    weight, bias = normal(rng, (2, names["COLS"]), np.float32)
    total, y, dx = (np.empty_like(x) for _ in range(3))
    dweight, dbias = np.empty((2, 2, names["COLS"]), np.float32)
    users.launch(names["forward"], 5, names["THREADS"], x, residual, weight, bias, total, y)
    users.launch(names["backward"], 2, names["THREADS"], dy, y, total, weight, dx, dweight, dbias)
    np.testing.assert_array_equal(total, x + residual)
    scale = 1 + np.abs(bias) + np.abs(weight) * np.abs(total).max()
    exact = np.maximum(oracle.forward(total, 1, weight, bias)[0], 0)
    assert (np.abs(y - exact) <= CUDA_Y_EPS * EPS["float32"] * scale).all()
    through = np.where(y > 0, dy, np.float32(0))
    grads = LayerNormGrads(dx, dweight.sum(0), dbias.sum(0))
    assert_grads(grads, through, total, 1, weight, gradient_eps=CUDA_GRADIENT_EPS)
