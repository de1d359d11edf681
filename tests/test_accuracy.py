"""Is every dtype accurate to its last digits on rows that are hard to normalise?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep
from tolerances import assert_grads, assert_y

ROWS = 24
KINDS = {
    "standard normal": lambda z: z,
    "mean 1e3": lambda z: z + 1e3,
    "mean 1e4": lambda z: z + 1e4,
    "mean 1e6": lambda z: z + 1e6,
    "1e-30 times a normal": lambda z: 1e-30 * z,
    "1e30 times a normal": lambda z: 1e30 * z,
    "one outlier of 1e4": lambda z: np.where(np.arange(z.shape[1]) == 3, 1e4, z),
    "an outlier of 1e4 in front": lambda z: np.where(np.arange(z.shape[1]) == 0, 1e4, z),
    "constant": lambda z: np.broadcast_to(z[:, :1] * 100, z.shape),
    "ramp": lambda z: np.arange(z.shape[1]) + z[:, :1],
    "two values": lambda z: 99.0 + (z > 0),
    # whose sums are rounded the same way in every lane
    "runs of equal values": lambda z: np.repeat(np.abs(z[:, ::16]) + 0.3, 16, axis=1)[:, : z.shape[1]],
}


@pytest.fixture(params=[np.float32, np.float64, np.float16, ml_dtypes.bfloat16], ids=["f4", "f8", "f2", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("cols", [100, 768, *deep(5), pytest.param(16384, marks=[pytest.mark.compiled, pytest.mark.deep])])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_hard_rows(rng, dtype, kind, cols):
    with np.errstate(over="ignore", under="ignore"):
        x = kind(rng.standard_normal((ROWS, cols))).astype(dtype)
        dy = rng.standard_normal(x.shape).astype(dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(np.float32 if np.dtype(dtype).itemsize == 2 else dtype)
    assert_y(nbnorm.layer_norm(x, cols, weight, bias), x, 1, weight, bias)
    # without eps, the deviations alone decide; of constant rows, nothing
    if (x != x[:, :1]).any(axis=1).all():
        assert_y(nbnorm.layer_norm(x, cols, eps=0.0), x, 1, eps=0.0)
    assert_grads(nbnorm.layer_norm_backward(dy, x, cols, weight), dy, x, 1, weight)


@pytest.mark.compiled
def test_float64_sums_do_not_grow_with_the_row(rng):
    # plain float64 sums are off by 83 eps here
    x = 99.0 + (rng.standard_normal((2, 50_000)) > 0)
    assert_y(nbnorm.layer_norm(x, 50_000, eps=0.0), x, 1, eps=0.0)
    long = 99.0 + (rng.standard_normal((2, 200_000)) > 0)
    assert_y(nbnorm.layer_norm(long, 200_000, eps=0.0), long, 1, eps=0.0)
