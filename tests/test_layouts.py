"""Does the memory layout of an operand change nothing? Strides, byte order, alignment, memmap, lists, empty arrays, out."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import nbnorm
from levels import deep
from nbnorm.cpu import staging
from nbnorm.cpu.workers import parallel, threads
from tolerances import assert_grads, assert_y

# (cols,) of a batch (6, 4); big enough for a vector and a rest
COLS = 19
SHAPE = (6, 4, COLS)


def unaligned(a):
    buffer = np.empty(a.nbytes + 1, np.uint8)[1:]
    result = buffer.view(a.dtype).reshape(a.shape)
    result[...] = a
    assert not result.flags.aligned
    return result


def read_only(a):
    result = a.copy()
    result.flags.writeable = False
    return result


def every_second(a):
    result = np.empty(tuple(2 * n for n in a.shape), a.dtype)[tuple(slice(None, None, 2) for _ in a.shape)]
    result[...] = a
    return result


def reversed_memory(a):
    reverse = tuple(slice(None, None, -1) for _ in a.shape)
    return a[reverse].copy()[reverse]


def swapped_axes(a):
    return np.swapaxes(np.swapaxes(a, 0, -1).copy(), 0, -1)


def row_pitch(a):
    result = np.empty((*a.shape[:-1], a.shape[-1] + 3), a.dtype)[..., : a.shape[-1]]
    result[...] = a
    return result


LAYOUTS = {
    "every second element": every_second,
    "negative strides": reversed_memory,
    "Fortran order": np.asfortranarray,
    "swapped axes": swapped_axes,
    "row pitch": row_pitch,
    "unaligned": unaligned,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder("S")),
    "read-only": read_only,
}


@pytest.fixture(params=[np.float32, *deep(np.float64, np.float16)])
def dtype(request):
    return request.param


@pytest.fixture
def operands(rng, dtype):
    """x, dy, weight, bias, and the results for their plain layouts."""
    x, dy = rng.standard_normal((2, *SHAPE)).astype(dtype)
    weight, bias = rng.standard_normal((2, COLS)).astype(np.float32)
    y = nbnorm.layer_norm(x, COLS, weight, bias)
    assert_y(y, x, 1, weight, bias)
    return x, dy, weight, bias, y, nbnorm.layer_norm_backward(dy, x, COLS, weight)


@pytest.fixture(params=[1, 3, 7, 1 << 18], ids="buffer of {} elements".format)
def buffer(request, monkeypatch):
    """Buffers of one row, of a few, and of all of them."""
    monkeypatch.setattr("nbnorm.cpu.staging.BUFFER_ELEMENTS", request.param * COLS)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_of_inputs_does_not_change_a_bit(operands, buffer, layout):
    x, dy, weight, bias, y, grads = operands
    before = [layout(a) for a in (x, dy, weight, bias)]
    x, dy, weight, bias = [layout(a) for a in (x, dy, weight, bias)]
    result = nbnorm.layer_norm(x, COLS, weight, bias)
    assert result.dtype == y.dtype
    assert result.dtype.isnative
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, y)
    for grad, expected in zip(nbnorm.layer_norm_backward(dy, x, COLS, weight), grads, strict=True):
        assert grad.dtype.isnative
        np.testing.assert_array_equal(grad, expected)
    for a, b in zip((x, dy, weight, bias), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "read-only"])
def test_layout_of_out_does_not_change_a_bit(operands, buffer, layout):
    x, dy, weight, bias, y, grads = operands
    out = LAYOUTS[layout](np.zeros_like(x))
    assert nbnorm.layer_norm(x, COLS, weight, bias, out=out) is out
    np.testing.assert_array_equal(out, y)
    outs = tuple(LAYOUTS[layout](np.zeros_like(grad)) for grad in grads)
    result = nbnorm.layer_norm_backward(dy, x, COLS, weight, out=outs)
    for out, grad, expected in zip(outs, result, grads, strict=True):
        assert grad is out
        np.testing.assert_array_equal(out, expected)


def channels_last(array):
    """The array as a view of one whose rows are not contiguous."""
    return np.moveaxis(np.moveaxis(array, -1, 1).copy(), 1, -1)


# long rows are shared without a copy too
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("long_row", [0, pytest.param(1 << 16, marks=pytest.mark.compiled)])
@pytest.mark.parametrize("views", [channels_last, np.array], ids=["strided", "contiguous"])
def test_blocks_that_our_threads_share_have_the_same_bits(rng, dtype, monkeypatch, choose_workers, views, long_row):
    shape, cols = (3, 5, 23), 40
    x, dy = rng.standard_normal((2, *shape, cols)).astype(dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(np.float32)
    masks = [mask for mask in itertools.product([True, False], repeat=3) if any(mask)]

    def results(x, dy, out, dx):
        found = [a.copy() for a in nbnorm.layer_norm(x, cols, weight, bias, out=out, return_stats=True)]
        for mask in masks:
            outs = (dx if mask[0] else None, None, None)
            grads = nbnorm.layer_norm_backward(dy, x, cols, weight, output_mask=mask, out=outs)
            found += [grad for grad in grads if grad is not None]
            found = [a.copy() for a in found]
        return found

    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    choose_workers(parallel.ONE)
    expected = results(x, dy, None, None)
    choose_workers(parallel.OURS)
    # sums of blocks of 16 rows: a piece is one of them, or a few
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_GROUP_ELEMENTS", 50 * cols)
    shared = []
    share = threads.share
    monkeypatch.setattr("nbnorm.cpu.workers.threads.share", lambda *args: (shared.append(len(args[1])), share(*args)))
    for rows in (1, 7, 50):
        monkeypatch.setattr("nbnorm.cpu.staging.BUFFER_ELEMENTS", rows * cols)
        for out in (None, views(np.zeros_like(x))):
            for a, b in zip(results(views(x), views(dy), out, out), expected, strict=True):
                np.testing.assert_array_equal(a, b)
        in_place = views(x)
        np.testing.assert_array_equal(nbnorm.layer_norm(in_place, cols, weight, bias, out=in_place), expected[0])
    assert max(shared) > 3


@pytest.mark.parametrize("which", [0, 10, 22])
def test_an_error_in_a_block_ends_all_of_them(rng, monkeypatch, choose_workers, which):
    choose_workers(parallel.OURS)
    monkeypatch.setattr("nbnorm.cpu.staging.BUFFER_ELEMENTS", 10 * COLS)
    x = rng.standard_normal((COLS, 230)).T
    out = np.zeros_like(x)
    stored = []
    store = nbnorm.cpu.last_axes.store

    def failing(rows, block, buffer):
        stored.append(None)
        if len(stored) > which:
            raise MemoryError("no memory")
        store(rows, block, buffer)

    monkeypatch.setattr("nbnorm.cpu.last_axes.store", failing)
    with pytest.raises(MemoryError, match="no memory"):
        nbnorm.layer_norm(x, COLS, out=out)
    before = out.copy()
    time.sleep(0.01)
    np.testing.assert_array_equal(out, before)
    monkeypatch.undo()
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, out=out), nbnorm.layer_norm(x.copy(), COLS))


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_blocks_of_some_rows_are_these_rows(batch, data):
    count = math.prod(batch)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    limit = data.draw(st.integers(1, 10))
    rows = np.arange(count).reshape(batch)
    for order in (0, 1, -1):
        blocks = list(staging.row_blocks(batch, limit, order, slice(start, stop)))
        found = [rows[index].reshape(-1) for index, _ in blocks]
        for (_, span), values in zip(blocks, found, strict=True):
            assert 1 <= len(values) <= limit
            np.testing.assert_array_equal(values, np.arange(span.start, span.stop))
        np.testing.assert_array_equal(np.concatenate([[], *found][:: order or 1]), np.arange(start, stop))


def test_some_outs_may_be_none(operands):
    x, dy, weight, _, _, grads = operands
    dweight = np.empty(COLS, np.float32)
    result = nbnorm.layer_norm_backward(dy, x, COLS, weight, out=(None, dweight, None))
    assert result.dweight is dweight
    for grad, expected in zip(result, grads, strict=True):
        np.testing.assert_array_equal(grad, expected)


def test_in_place(operands, buffer):
    x, dy, weight, bias, y, grads = operands
    overwritten = x.copy()
    assert nbnorm.layer_norm(overwritten, COLS, weight, bias, out=overwritten) is overwritten
    np.testing.assert_array_equal(overwritten, y)
    for which in (0, 1):
        inputs = [dy.copy(), x.copy()]
        result = nbnorm.layer_norm_backward(*inputs, COLS, weight, out=(inputs[which], None, None))
        assert result.dx is inputs[which]
        for grad, expected in zip(result, grads, strict=True):
            np.testing.assert_array_equal(grad, expected)


@pytest.mark.parametrize("offset", range(0, 20, 3))
def test_rows_in_groups_in_place(rng, offset):
    # rows are taken four at a time, from where a line of dx begins
    cols, rows = 150, 9
    x, dy = rng.standard_normal((2, rows, cols), dtype=np.float32)
    expected = nbnorm.layer_norm_backward(dy, x, cols)
    for which in (0, 1):
        inputs = [dy, x]
        memory = np.empty(rows * cols + 32, np.float32)
        inputs[which] = memory[offset : offset + rows * cols].reshape(rows, cols)
        inputs[which][:] = (dy, x)[which]
        result = nbnorm.layer_norm_backward(*inputs, cols, out=(inputs[which], None, None))
        for grad, value in zip(result, expected, strict=True):
            np.testing.assert_array_equal(grad, value)


def test_out_may_be_the_weight():
    x, weight = np.random.default_rng(0).standard_normal((2, COLS))
    expected = nbnorm.layer_norm(x, COLS, weight)
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, weight, out=weight), expected)


@pytest.mark.parametrize("shift", [-1, 1, COLS - 1, COLS, 3 * COLS])
def test_out_that_partly_overlaps_an_input(rng, build, dtype, buffer, shift):
    rows = 10
    memory = rng.standard_normal(rows * COLS + 4 * COLS).astype(dtype)
    start = 2 * COLS

    def views(memory):
        x = memory[start : start + rows * COLS].reshape(rows, COLS)
        out_start = start + shift if shift < COLS else start - shift + COLS
        return x, memory[out_start : out_start + rows * COLS].reshape(rows, COLS)

    x, _ = views(memory.copy())
    dy = np.flip(x).copy()
    expected = nbnorm.layer_norm(x.copy(), COLS)
    expected_dx = nbnorm.layer_norm_backward(dy, x.copy(), COLS).dx
    x, out = views(memory.copy())
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, out=out), expected)
    x, out = views(memory.copy())
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(dy, x, COLS, out=(out, None, None)).dx, expected_dx)


def shifted(memory, shape, start):
    return memory[start : start + np.prod(shape)].reshape(shape)


@pytest.mark.parametrize("overlapped", ["weight", "bias"])
def test_out_that_overlaps_a_parameter(rng, overlapped):
    x = rng.standard_normal((4, COLS))
    memory = rng.standard_normal(5 * COLS)
    parameter = shifted(memory, (COLS,), 1)
    expected = nbnorm.layer_norm(x, COLS, **{overlapped: parameter.copy()})
    y = nbnorm.layer_norm(x, COLS, **{overlapped: parameter}, out=shifted(memory, x.shape, 0))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("overlapped", ["dy", "x", "weight", "mean", "rstd"])
def test_dx_that_overlaps_another_input(rng, overlapped):
    x, dy = rng.standard_normal((2, 4, COLS))
    operands = {"dy": dy, "x": x, "weight": rng.standard_normal(COLS)}
    _, operands["mean"], operands["rstd"] = nbnorm.layer_norm(x, COLS, return_stats=True)
    expected = nbnorm.layer_norm_backward(**operands, normalized_shape=COLS)
    memory = np.zeros(8 * COLS)
    # a row later than dx: what dx writes for a row is what the next one would read
    moved = shifted(memory, operands[overlapped].shape, COLS)
    moved[...] = operands[overlapped]
    outs = (shifted(memory, x.shape, 2 * COLS if overlapped in ("dy", "x") else 0), None, None)
    grads = nbnorm.layer_norm_backward(**operands | {overlapped: moved}, normalized_shape=COLS, out=outs)
    for grad, value in zip(grads, expected, strict=True):
        np.testing.assert_array_equal(grad, value)


def test_out_is_written_without_a_copy_where_nothing_overlaps(operands, monkeypatch, the_long_way):
    x, dy, weight, bias, _, _ = operands
    deliver = nbnorm.cpu.delivered
    delivered = []

    def spy(result, out):
        delivered.append(result is out)
        return deliver(result, out)

    monkeypatch.setattr("nbnorm.cpu.delivered", spy)
    in_place = x.copy()
    for out in (np.empty_like(x), in_place):
        nbnorm.layer_norm(in_place, COLS, weight, bias, out=out)
    for out in (np.empty_like(x), dy, in_place):
        nbnorm.layer_norm_backward(dy, in_place, COLS, weight, output_mask=(True, False, False), out=(out, None, None))
    assert delivered == [True] * 5


@pytest.mark.parametrize("rows", [1, 3, 1 << 18])
def test_out_is_the_transpose_of_x(rng, monkeypatch, rows):
    monkeypatch.setattr("nbnorm.cpu.staging.BUFFER_ELEMENTS", rows * COLS)
    x = rng.standard_normal((COLS, COLS))
    expected = nbnorm.layer_norm(x, COLS)
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, out=x.T), expected)


def test_dweight_may_overwrite_x(rng):
    x, dy = rng.standard_normal((2, 1, COLS))
    expected = nbnorm.layer_norm_backward(dy, x, COLS)
    result = nbnorm.layer_norm_backward(dy, x, COLS, out=(None, x[0], dy[0]))
    for grad, value in zip(result, expected, strict=True):
        np.testing.assert_array_equal(grad, value)


def test_broadcast_x_dy_and_weight(rng):
    row = rng.standard_normal(COLS)
    x = np.broadcast_to(row, SHAPE)
    y = nbnorm.layer_norm(x, COLS, np.broadcast_to(2.0, COLS), np.broadcast_to(1.0, COLS))
    assert_y(y, x, 1, np.full(COLS, 2.0), np.ones(COLS))
    dy = np.broadcast_to(rng.standard_normal((4, 1)), SHAPE)
    assert_grads(nbnorm.layer_norm_backward(dy, x, COLS, np.broadcast_to(2.0, COLS)), dy, x, 1, np.full(COLS, 2.0))


def test_memmap(rng, tmp_path):
    x = rng.standard_normal(SHAPE, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    y = nbnorm.layer_norm(mapped, COLS)
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, nbnorm.layer_norm(x, COLS))
    out = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, SHAPE)
    assert nbnorm.layer_norm(mapped, COLS, out=out) is out
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), y)


@pytest.mark.parametrize("x", [[[1, 2, 3], [4, 5, 9]], ((True, False, True), (False, False, True)), [[0.5, 1, 2.5]]])
def test_lists_become_float64(x):
    y = nbnorm.layer_norm(x, 3, [1, 2, 3], (0.5, 0, 1))
    assert y.dtype == np.float64
    assert_y(y, np.array(x, np.float64), 1, np.array([1, 2, 3]), np.array([0.5, 0, 1]))


def test_a_list_of_float32_rows_becomes_float64(rng):
    rows = rng.standard_normal((3, 5), dtype=np.float32)
    assert nbnorm.layer_norm(list(rows), 5).dtype == np.float64
    assert nbnorm.layer_norm(tuple(rows), 5).dtype == np.float64


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_integers_and_booleans_become_float64(rng, dtype):
    x = rng.integers(0, 2 if dtype == "bool" else 100, (5, COLS)).astype(dtype)
    y, mean, rstd = nbnorm.layer_norm(x, COLS, return_stats=True)
    assert y.dtype == mean.dtype == rstd.dtype == np.float64
    assert_y(y, x.astype(np.float64), 1)
    grads = nbnorm.layer_norm_backward(x[::-1], x, COLS, x[0])
    assert {grad.dtype for grad in grads} == {np.dtype(np.float64)}
    assert_grads(grads, x[::-1].astype(np.float64), x.astype(np.float64), 1, x[0].astype(np.float64))


def test_an_object_with_an_array_method_keeps_its_dtype(rng):
    class Frame:
        def __array__(self, dtype=None, copy=None):
            return values

    values = rng.standard_normal((3, COLS), dtype=np.float32)
    np.testing.assert_array_equal(nbnorm.layer_norm(Frame(), COLS), nbnorm.layer_norm(values, COLS))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
def test_zero_rows(shape):
    x = np.empty(shape, np.float32)
    out = np.empty(shape, np.float32)
    y, mean, rstd = nbnorm.layer_norm(x, 5, out=out, return_stats=True)
    assert y is out
    assert mean.shape == rstd.shape == (*shape[:-1], 1)
    dx, dweight, dbias = nbnorm.layer_norm_backward(x, x, 5, np.ones(5))
    assert dx.shape == shape
    assert dweight.dtype == np.float64
    np.testing.assert_array_equal([dweight, dbias], np.zeros((2, 5)))


@pytest.mark.parametrize(("shape", "normalized_shape"), [((3, 0), 0), ((2, 3, 0, 4), (0, 4)), ((0, 0), 0)])
def test_zero_columns(shape, normalized_shape):
    x = np.empty(shape)
    row = np.empty(normalized_shape)
    out = np.empty(shape)
    y, mean, rstd = nbnorm.layer_norm(x, normalized_shape, row, row, out=out, return_stats=True)
    assert y is out
    assert mean.shape == rstd.shape
    assert np.isnan(mean).all()
    dx, dweight, dbias = nbnorm.layer_norm_backward(x, x, normalized_shape, row)
    assert dx.shape == shape
    assert dweight.shape == dbias.shape == row.shape


def test_a_single_row_needs_no_batch(rng):
    x, dy = rng.standard_normal((2, 3, 4))
    y, mean, rstd = nbnorm.layer_norm(x, (3, 4), return_stats=True)
    assert mean.shape == rstd.shape == (1, 1)
    assert_y(y, x, 2)
    assert_grads(nbnorm.layer_norm_backward(dy, x, (3, 4)), dy, x, 2)


@st.composite
def strided_arrays(draw):
    """A view with arbitrary steps and order of axes, the same as a dense array, and how many dimensions to normalise."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    steps = draw(st.tuples(*(st.sampled_from([-3, -2, -1, 1, 2, 3]) for _ in shape)))
    order = draw(st.permutations(range(len(shape))))
    elements = st.floats(-1e3, 1e3, width=32)
    dense = draw(hnp.arrays(dtype, shape, elements=elements))
    memory = np.zeros([abs(steps[i]) * shape[i] + 1 for i in order], dtype)
    view = memory.transpose(np.argsort(order))
    view = view[tuple(slice(None, None, step) for step in steps)][tuple(slice(n) for n in shape)]
    view[...] = dense
    return view, dense, draw(st.integers(1, len(shape)))


@given(strided_arrays(), st.integers(0, 2**32 - 1))
def test_any_shape_and_strides(case, seed):
    x, dense, ndim = case
    rng = np.random.default_rng(seed)
    row = x.shape[-ndim:]
    weight, bias = rng.standard_normal((2, *row)).astype(x.dtype)
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    y = nbnorm.layer_norm(x, row, weight, bias, 0.1)
    np.testing.assert_array_equal(y, nbnorm.layer_norm(dense, row, weight, bias, 0.1))
    np.testing.assert_array_equal(x, dense)
    grads = nbnorm.layer_norm_backward(dy, x, row, weight, 0.1)
    assert (y.shape, grads.dx.shape, grads.dweight.shape) == (x.shape, x.shape, row)
    if x.size:
        assert_y(y, dense, ndim, weight, bias, 0.1)
        assert_grads(grads, dy, dense, ndim, weight, 0.1)


finite_rows = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


@given(finite_rows)
def test_any_finite_values(x):
    assert_y(nbnorm.layer_norm(x, x.shape[1]), x, 1)
    assert np.isfinite(nbnorm.layer_norm(x, x.shape[1], use_diff_of_squares=True)).all()


@given(hnp.arrays(np.float32, (3, 6), elements=st.floats(width=32)))
def test_any_values_at_all_stay_in_their_row(x):
    y = nbnorm.layer_norm(x, 6)
    for i in range(3):
        np.testing.assert_array_equal(y[i], nbnorm.layer_norm(x[i], 6))
