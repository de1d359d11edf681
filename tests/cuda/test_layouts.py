"""Is y right, and written where it belongs, for CUDA arrays of any strides and alignment, and any `out`?"""

import itertools

import ml_dtypes
import numpy as np
import pytest
from numba import cuda

import nbnorm
from device import LEVEL, to_device, to_host
from nbnorm.cuda import layout
from nbnorm.cuda.arrays import View

pytestmark = pytest.mark.hardware

COLS = 24


@pytest.fixture
def x(rng):
    return rng.standard_normal((6, COLS)).astype(np.float32)


def expected(x, *arguments, **options):
    """What contiguous arrays give: the bits do not depend on strides or alignment."""
    results = nbnorm.layer_norm(to_device(np.ascontiguousarray(x)), *arguments, **options)
    return to_host(results)


def expected_grads(dy, x, *arguments, **options):
    operands = (to_device(np.ascontiguousarray(array)) for array in (dy, x))
    return [to_host(grad) for grad in nbnorm.layer_norm_backward(*operands, *arguments, **options)]


def assert_same(grads, expected):
    for grad, wanted in zip(grads, expected, strict=True):
        np.testing.assert_array_equal(to_host(grad), wanted)


# as slices of a contiguous array on the device: rows with a pitch; from an odd element on; with gaps between elements;
# backwards; one column apart
SLICES = [
    (slice(None), slice(0, 16)),
    (slice(None, None, 2), slice(None)),
    (slice(1, 4), slice(1, 18)),
    (slice(None), slice(None, None, 2)),
]


@pytest.mark.parametrize("index", SLICES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_strides(rng, dtype, index):
    whole = rng.standard_normal((6, COLS)).astype(np.float32).astype(dtype)
    part = whole[index]
    y = nbnorm.layer_norm(to_device(whole)[index], part.shape[1])
    np.testing.assert_array_equal(to_host(y), expected(part, part.shape[1]))


@pytest.mark.parametrize("first", range(5))
def test_alignment_does_not_change_the_bits(rng, first):
    flat = rng.standard_normal(4 * 64 + 8).astype(np.float32)
    x = flat[first : first + 256].reshape(4, 64)
    weight = flat[3 : 3 + 64]
    device = to_device(flat)
    y = nbnorm.layer_norm(device[first : first + 256].reshape(4, 64), 64, device[3 : 3 + 64])
    np.testing.assert_array_equal(to_host(y), expected(x, 64, to_device(np.ascontiguousarray(weight))))


def test_transposed_batch_and_transposed_rows(rng):
    x = rng.standard_normal((3, 4, 8)).astype(np.float32)
    device = to_device(np.ascontiguousarray(x.transpose(1, 0, 2)))
    # Numba's device arrays transpose in two dimensions only
    view = strided(device, x.shape, (device.strides[1], device.strides[0], 4))
    np.testing.assert_array_equal(to_host(nbnorm.layer_norm(view, 8)), expected(x, 8))
    view = strided(device, (4, 8, 3), (device.strides[0], 4, device.strides[1]))
    y = np.ascontiguousarray(x.transpose(1, 2, 0))
    np.testing.assert_array_equal(to_host(nbnorm.layer_norm(view, (8, 3))), expected(y, (8, 3)))


def test_a_broadcast_row(rng):
    row = rng.standard_normal(COLS).astype(np.float32)
    view = strided(to_device(row), (5, COLS), (0, 4))
    y = to_host(nbnorm.layer_norm(view, COLS))
    np.testing.assert_array_equal(y, expected(np.broadcast_to(row, (5, COLS)), COLS))


def strided(array, shape, strides):
    """A view of the array's memory."""
    if LEVEL != "device":
        return type(array)(np.lib.stride_tricks.as_strided(array._ary, shape, strides))
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    return DeviceNDArray(shape, strides, array.dtype, gpu_data=array.gpu_data)


def test_out_is_written_and_returned(x):
    out = cuda.device_array(x.shape, np.float32)
    assert nbnorm.layer_norm(to_device(x), COLS, out=out) is out
    np.testing.assert_array_equal(to_host(out), expected(x, COLS))


def test_in_place(x):
    device = to_device(x)
    assert nbnorm.layer_norm(device, COLS, out=device) is device
    np.testing.assert_array_equal(to_host(device), expected(x, COLS))


@pytest.mark.parametrize("index", SLICES, ids=str)
def test_a_strided_out(x, index):
    part = np.ascontiguousarray(x[index])
    before = np.full(x.shape, 7, np.float32)
    whole = to_device(before)
    nbnorm.layer_norm(to_device(part), part.shape[1], out=whole[index])
    before[index] = expected(part, part.shape[1])
    np.testing.assert_array_equal(to_host(whole), before)


@pytest.mark.parametrize("distance", [-25, -24, -4, -1, 1, 4, 24, 25])
def test_an_out_that_overlaps_x(rng, distance):
    flat = rng.standard_normal(200).astype(np.float32)
    device = to_device(flat)
    at, out_at = 50, 50 + distance
    x = flat[at : at + 96].reshape(4, COLS).copy()
    nbnorm.layer_norm(device[at : at + 96].reshape(4, COLS), COLS, out=device[out_at : out_at + 96].reshape(4, COLS))
    flat[out_at : out_at + 96] = expected(x, COLS).ravel()
    np.testing.assert_array_equal(to_host(device), flat)


def test_an_out_that_overlaps_weight_and_bias(rng):
    flat = rng.standard_normal(120).astype(np.float32)
    device = to_device(flat)
    x = rng.standard_normal((4, COLS)).astype(np.float32)
    parameters = [to_device(flat[at : at + COLS].copy()) for at in (0, 40)]
    y = expected(x, COLS, *parameters)
    out = device[:96].reshape(4, COLS)
    nbnorm.layer_norm(to_device(x), COLS, device[:COLS], device[40 : 40 + COLS], out=out)
    np.testing.assert_array_equal(to_host(device)[:96].reshape(4, COLS), y)


def test_out_in_other_columns_of_the_same_rows_needs_no_copy(rng, monkeypatch):
    whole = rng.standard_normal((4, 2 * COLS)).astype(np.float32)
    device = to_device(whole)
    monkeypatch.delattr("nbnorm.cuda.kernels.strided.enqueue")
    nbnorm.layer_norm(device[:, :COLS], COLS, out=device[:, COLS:])
    whole[:, COLS:] = expected(whole[:, :COLS], COLS)
    np.testing.assert_array_equal(to_host(device), whole)


def test_rows_with_a_pitch_are_read_where_they_lie(rng, monkeypatch):
    whole = rng.standard_normal((4, 2 * COLS)).astype(np.float32)
    monkeypatch.delattr("nbnorm.cuda.kernels.strided.enqueue")
    y = nbnorm.layer_norm(to_device(whole)[::2, 3 : 3 + COLS], COLS)
    np.testing.assert_array_equal(to_host(y), expected(whole[::2, 3 : 3 + COLS], COLS))


def test_inputs_are_not_modified(x):
    weight = np.full(COLS, 3, np.float32)
    operands = to_device(x), to_device(weight)
    nbnorm.layer_norm(operands[0], COLS, operands[1])
    np.testing.assert_array_equal(to_host(operands[0]), x)
    np.testing.assert_array_equal(to_host(operands[1]), weight)


@pytest.mark.parametrize(
    ("shape", "strides", "batch_ndim", "wanted"),
    [
        ((4, 8), (32, 4), 1, 32),
        ((4, 8), (48, 4), 1, 48),
        ((4, 8), (0, 4), 1, 0),
        ((2, 3, 8), (96, 32, 4), 2, 32),
        ((2, 3, 8), (100, 32, 4), 2, None),
        ((2, 1, 8), (96, 7, 4), 2, 96),
        ((4, 8), (-32, 4), 1, None),
        ((4, 8), (32, 8), 1, None),
        ((4, 2, 3), (24, 12, 4), 1, 24),
        ((4, 2, 3), (48, 24, 4), 1, None),
        ((8,), (4,), 0, 32),
        ((1, 8), (5, 4), 1, 32),
    ],
)
def test_pitch(shape, strides, batch_ndim, wanted):
    class Problem:
        batch, normalized_shape, behind = shape[:batch_ndim], shape[batch_ndim:], ()
        cols = int(np.prod(normalized_shape))

    assert layout.pitch(View(0, shape, strides, np.dtype(np.float32), 0), Problem) == wanted


def test_a_strided_bfloat16_weight_of_other_rows(rng):
    x = rng.standard_normal((3, 8)).astype(np.float32)
    weight = rng.standard_normal(16).astype(ml_dtypes.bfloat16)
    for rows in (x, rng.integers(0, 9, (3, 8))):
        y = nbnorm.layer_norm(to_device(rows), 8, to_device(weight)[::2])
        np.testing.assert_array_equal(to_host(y), expected(rows, 8, to_device(weight[::2].copy())))


def test_more_dimensions_than_a_copy_takes_at_once(rng):
    x = rng.standard_normal((2,) * 11).astype(np.float32)
    device = to_device(x)
    y = nbnorm.layer_norm(strided(device, x.shape, x.strides[::-1]), 2)
    np.testing.assert_array_equal(to_host(y), expected(x.transpose(), 2))


@pytest.mark.parametrize("index", SLICES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_strides_backward(rng, dtype, index):
    dy, x = rng.standard_normal((2, 6, COLS)).astype(np.float32).astype(dtype)
    cols = x[index].shape[1]
    weight = to_device(rng.standard_normal(2 * cols).astype(np.float32))
    packed = to_device(to_host(weight)[::2].copy())
    wanted = expected_grads(dy[index], x[index], cols, packed)
    for operands in itertools.product(*((to_device(np.ascontiguousarray(a[index])), to_device(a)[index]) for a in (dy, x))):
        assert_same(nbnorm.layer_norm_backward(*operands, cols, weight[::2]), wanted)


@pytest.mark.parametrize("first", range(5))
def test_alignment_does_not_change_the_bits_of_gradients(rng, first):
    flat = rng.standard_normal(8 * 64 + 8).astype(np.float32)
    device = to_device(flat)
    for dy_at, x_at in ((first, 256), (0, 256 + first), (first, 256 + first)):
        dy, x = (flat[at : at + 256].reshape(4, 64) for at in (dy_at, x_at))
        weight = flat[first : first + 64].copy()
        operands = (device[at : at + 256].reshape(4, 64) for at in (dy_at, x_at))
        grads = nbnorm.layer_norm_backward(*operands, 64, device[first : first + 64])
        assert_same(grads, expected_grads(dy, x, 64, to_device(weight)))


@pytest.mark.parametrize("which", ["new", "dy", "x"])
def test_gradients_into_out(rng, which):
    dy, x = rng.standard_normal((2, 6, COLS)).astype(np.float32)
    weight = rng.standard_normal(COLS).astype(np.float32)
    wanted = expected_grads(dy, x, COLS, to_device(weight))
    operands = {"dy": to_device(dy), "x": to_device(x)}
    out = operands.get(which, cuda.device_array(x.shape, np.float32)), None, to_device(weight)
    grads = nbnorm.layer_norm_backward(operands["dy"], operands["x"], COLS, to_device(weight), out=out)
    assert grads.dx is out[0]
    assert grads.dbias is out[2]
    assert_same(grads, wanted)


@pytest.mark.parametrize("which", ["dy", "x"])
def test_gradients_of_long_rows_in_place(rng, order, which):
    """Blocks that share a row must not read what another one of them has written over."""
    # in float64 a block holds 2048 elements
    dy, x = rng.standard_normal((2, 3, 2056))
    weight = to_device(rng.standard_normal(2056))
    wanted = expected_grads(dy, x, 2056, weight)
    operands = {"dy": to_device(dy), "x": to_device(x)}
    grads = nbnorm.layer_norm_backward(operands["dy"], operands["x"], 2056, weight, out=(operands[which], None, None))
    assert_same(grads, wanted)


@pytest.mark.parametrize("distance", [-25, -24, -1, 1, 4, 24])
@pytest.mark.parametrize("which", ["dy", "x"])
def test_a_dx_that_overlaps(rng, which, distance):
    host = dict(zip(("dy", "x"), rng.standard_normal((2, 200)).astype(np.float32), strict=True))
    memory = {name: to_device(array) for name, array in host.items()}
    rows = {name: array[50:146].reshape(4, COLS) for name, array in memory.items()}
    wanted = expected_grads(*(host[name][50:146].reshape(4, COLS) for name in ("dy", "x")), COLS)
    at = 50 + distance
    out = memory[which][at : at + 96].reshape(4, COLS)
    grads = nbnorm.layer_norm_backward(rows["dy"], rows["x"], COLS, out=(out, None, None))
    assert grads.dx is out
    assert_same(grads, wanted)
    host[which][at : at + 96] = wanted[0].ravel()
    np.testing.assert_array_equal(to_host(memory[which]), host[which])


def test_gradients_over_the_operands_of_every_row(rng):
    """dx over weight, mean and rstd; dweight over weight; dbias over mean."""
    dy, x = rng.standard_normal((2, 4, COLS)).astype(np.float32)
    weight = rng.standard_normal(COLS).astype(np.float32)
    mean, rstd = x.mean(1, keepdims=True), np.abs(x[:, :1]) + 1
    statistics = {"mean": to_device(mean), "rstd": to_device(rstd)}
    wanted = expected_grads(dy, x, COLS, to_device(weight), **statistics)
    memory = to_device(np.concatenate([weight, mean.ravel(), rstd.ravel(), np.zeros(96 - COLS - 8, np.float32)]))
    shared = {"mean": memory[COLS : COLS + 4].reshape(4, 1), "rstd": memory[COLS + 4 : COLS + 8].reshape(4, 1)}
    out = memory.reshape(4, COLS), None, None
    assert_same(nbnorm.layer_norm_backward(to_device(dy), to_device(x), COLS, memory[:COLS], out=out, **shared), wanted)
    parameters = to_device(weight), to_device(np.resize(mean.ravel(), COLS))
    shared = {"mean": parameters[1][:4].reshape(4, 1), "rstd": to_device(rstd)}
    shared["mean"].copy_to_device(mean)
    grads = nbnorm.layer_norm_backward(to_device(dy), to_device(x), COLS, parameters[0], out=(None, *parameters), **shared)
    assert_same(grads, wanted)


def test_strided_outs_of_gradients(rng):
    dy, x = rng.standard_normal((2, 5, COLS)).astype(np.float32)
    wanted = expected_grads(dy, x, COLS)
    memory = to_device(np.full((5, 2 * COLS), 7, np.float32))
    parameters = to_device(np.full(2 * COLS, 7, np.float32))
    # dweight and dbias take turns in one array
    out = memory[:, ::2], parameters[::2], parameters[1::2]
    assert_same(nbnorm.layer_norm_backward(to_device(dy), to_device(x), COLS, out=out), wanted)
    np.testing.assert_array_equal(to_host(memory)[:, 1::2], 7)
    # and of no rows
    nothing = cuda.device_array((0, COLS), np.float32)
    grads = nbnorm.layer_norm_backward(nothing, nothing, COLS, out=(None, *out[1:]))
    np.testing.assert_array_equal(to_host(grads.dweight), np.zeros(COLS))
    np.testing.assert_array_equal(to_host(parameters), 0)


def test_gradients_do_not_modify_their_operands(rng):
    host = [rng.standard_normal(shape).astype(np.float32) for shape in ((6, COLS), (6, COLS), (COLS,), (6, 1), (6, 1))]
    dy, x, weight, mean, rstd = (to_device(array) for array in host)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd)
    for operand, before in zip((dy, x, weight, mean, rstd), host, strict=True):
        np.testing.assert_array_equal(to_host(operand), before)
