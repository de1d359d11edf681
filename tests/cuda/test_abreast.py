"""Are rows right that lie abreast: sums over a block's warps, extreme rows, many rows, any batch?"""

from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from axis import assert_backward, assert_forward, at_end
from device import LEVEL, normal, to_device, to_host
from nbnorm.cuda import plans, sizes
from tolerances import CUDA_GRADIENT_EPS, CUDA_Y_EPS, assert_grads, assert_y
from variants import ABREAST

pytestmark = pytest.mark.hardware


@pytest.fixture
def small_blocks(monkeypatch):
    """Of two warps at most, which the simulator is through with sooner; and backward, blocks that take many rows each."""
    for known in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(plans, known, {})
    if LEVEL == "simulator":
        monkeypatch.setattr(sizes, "MODERATE_TEAM", 64)
    if LEVEL != "device":
        monkeypatch.setattr(sizes, "MULTIPROCESSORS", 1)


# in small blocks: 32 rows abreast, 16, 8, and too long to lie so
@pytest.mark.parametrize(("cols", "abreast"), [(40, 32), (100, 16), (200, 8), (600, None)])
@pytest.mark.parametrize("is_rms", [False, True])
def test_so_many_rows_abreast(rng, order, small_blocks, is_rms, cols, abreast):
    if LEVEL == "simulator":
        tile = sizes.tile_abreast(cols, 4, 4, "forward")
        assert (tile and tile.abreast) == abreast
    # the last block has rows for a part of its threads, and blocks take images of other numbers of rows
    dy, x = normal(rng, (2, 3 if abreast else 1, cols, 7), np.float32)
    x *= np.float32(3)
    weight = normal(rng, cols, np.float32)
    operands = to_device(x), cols, to_device(weight)
    if is_rms:
        results = nbnorm.rms_norm(*operands, 1e-5, return_stats=True, axis=1)
        grads = nbnorm.rms_norm_backward(to_device(dy), *operands, 1e-5, axis=1)
    else:
        results = nbnorm.layer_norm(*operands, return_stats=True, axis=1)
        grads = nbnorm.layer_norm_backward(to_device(dy), *operands, axis=1)
    assert_forward(results, x, 1, weight, None, is_rms=is_rms)
    assert_backward(grads, dy, x, 1, weight, is_rms=is_rms)


@pytest.mark.skipif(LEVEL != "simulator", reason="it looks at what the simulator's threads read")
def test_a_warp_reads_neighbouring_elements(rng, monkeypatch):
    from nbnorm.cuda.kernels import rows
    from simulator import getcurrent

    load, read = rows.load, defaultdict(list)

    def noted(values, k, memory, at, width, access):
        thread = getcurrent()
        read[thread.block.number, thread.number // 32, k].append(memory.address + at * 4)
        load(values, k, memory, at, width, access)

    monkeypatch.setattr(rows, "load", noted)
    nbnorm.layer_norm(to_device(normal(rng, (2, 40, 64), np.float32)), 40, axis=1)
    # k is 0 also of a row's first element, which each thread reads
    of_warps = [addresses for (_, _, k), addresses in read.items() if k > 0]
    # ten elements a thread, but for the last of 40
    assert len(of_warps) == 4 * 4 * 9
    for addresses in of_warps:
        assert np.diff(sorted(addresses)).tolist() == [4] * 31


def test_many_rows_of_a_block(rng, small_blocks):
    """Sums of more rows than are added up one after another, of which those of float32 would drift."""
    shape = (40, 3, 64 if LEVEL == "simulator" else 640)
    dy, x = normal(rng, (2, *shape), np.float32)
    dy += np.float32(1)
    grads = nbnorm.layer_norm_backward(to_device(dy), to_device(x), 3, axis=1)
    assert_backward(grads, dy, x, 1, None)


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e30])
@pytest.mark.parametrize("is_squares", [False, True])
def test_magnitudes(rng, is_squares, scale):
    """Of single rows, beside ordinary ones, equal ones, and one of zeros; in threads of several warps."""
    x = normal(rng, (2, 40, 5), np.float32)
    x[0, :, 1] *= np.float32(scale)
    x[1, :, 2] = np.float32(scale) * (1 + np.arange(40) % 2).astype(np.float32)
    x[1, :, 3], x[1, :, 4] = np.float32(scale), 0
    dy = normal(rng, x.shape, np.float32)
    eps = 1e-5 if scale > 1 else 1e-300
    y = at_end(nbnorm.layer_norm(to_device(x), 40, None, None, eps, is_squares, axis=1), 1)
    assert_y(y, at_end(x, 1), 1, None, None, eps, is_squares, CUDA_Y_EPS, "float32")
    np.testing.assert_array_equal(y[1, 3:], 0)
    grads = nbnorm.layer_norm_backward(to_device(dy), to_device(x), 40, None, eps, is_squares, axis=1)
    grads = nbnorm.functional.LayerNormGrads(at_end(grads.dx, 1)[:, :3], None, None)
    of_rows = [at_end(array, 1)[:, :3] for array in (dy, x)]
    assert_grads(grads, *of_rows, 1, None, eps, is_squares, gradient_eps=CUDA_GRADIENT_EPS, sums="float32")


def test_nan_and_inf_stay_in_their_rows(rng):
    x = normal(rng, (2, 40, 5), np.float32)
    expected = to_host(nbnorm.layer_norm(to_device(x), 40, axis=1))
    x[0, 0, 1], x[0, 39, 3], x[1, 17, 0] = np.nan, np.inf, -np.inf
    y = to_host(nbnorm.layer_norm(to_device(x), 40, axis=1))
    for where in ((0, 1), (0, 3), (1, 0)):
        assert np.isnan(y[where[0], :, where[1]]).all()
        expected[where[0], :, where[1]] = np.nan
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("cols", [5, 96])
def test_a_row_is_the_same_in_any_batch(rng, order, cols):
    """And wherever it lies: in an image of its own, or beside others."""
    dy, x = normal(rng, (2, 3, cols, 13), np.float32)
    # extreme ones must not change their neighbours
    x[1, :, 4] *= np.float32(1e30)
    weight, bias = map(to_device, normal(rng, (2, cols), np.float32))

    def results(part):
        y, mean, rstd = nbnorm.layer_norm(to_device(x[part].copy()), cols, weight, bias, return_stats=True, axis=1)
        operands = (to_device(array[part].copy()) for array in (dy, x))
        dx, *_ = nbnorm.layer_norm_backward(*operands, cols, weight, axis=1)
        return [to_host(array) for array in (y, mean, rstd, dx)]

    whole = results(np.s_[:])
    for part in np.s_[1:2], np.s_[1:, :, 4:5], np.s_[:, :, 3:]:
        for alone, array in zip(results(part), whole, strict=True):
            np.testing.assert_array_equal(alone, array[part])


@pytest.mark.skipif(LEVEL != "ptx", reason="a device has no account of the kernels that have run")
@pytest.mark.parametrize("variant", ABREAST, ids=str)
def test_what_is_compiled(rng, variant):
    import offline
    import ptx_device

    dtype, cols = getattr(ml_dtypes, variant.x_dtype, variant.x_dtype), variant.cols
    x, beside = normal(rng, (2, 2, cols, 9), np.dtype(dtype))
    weight, bias = normal(rng, (2, cols), x.dtype)
    parameters = cols, to_device(weight), to_device(bias)
    summands = [x] if variant.beside is None else [x, beside]
    exact = x if variant.beside is None else (x.astype(np.float32) + beside.astype(np.float32)).astype(x.dtype)
    if variant.direction == "forward":
        norm = nbnorm.layer_norm if variant.beside is None else nbnorm.add_layer_norm
        results = norm(*map(to_device, summands), *parameters, return_stats=True, axis=1)
        assert_forward(results, exact, 1, weight, bias)
    else:
        dy = normal(rng, x.shape, x.dtype)
        norm = nbnorm.layer_norm_backward if variant.beside is None else nbnorm.add_layer_norm_backward
        # of nothing that is added
        others = [np.zeros_like(x)] * (variant.beside is not None)
        grads = norm(*map(to_device, (dy, *others, x)), *parameters[:2], axis=1)
        assert_backward(grads, dy, x, 1, weight)
    kernel, _ = offline.source(ptx_device.capability, variant)
    assert any(launch[0] is kernel for launch in ptx_device.launches)
