"""Is y right, and written where it belongs, for CUDA arrays of any strides and alignment, and any `out`?"""

import ml_dtypes
import numba
import numpy as np
import pytest
from numba import cuda

import nbnorm
from device import to_device, to_host
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
    if numba.config.ENABLE_CUDASIM:
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
    monkeypatch.delattr("nbnorm.cuda.strided.enqueue")
    nbnorm.layer_norm(device[:, :COLS], COLS, out=device[:, COLS:])
    whole[:, COLS:] = expected(whole[:, :COLS], COLS)
    np.testing.assert_array_equal(to_host(device), whole)


def test_rows_with_a_pitch_are_read_where_they_lie(rng, monkeypatch):
    whole = rng.standard_normal((4, 2 * COLS)).astype(np.float32)
    monkeypatch.delattr("nbnorm.cuda.strided.enqueue")
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
        batch, normalized_shape = shape[:batch_ndim], shape[batch_ndim:]
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
