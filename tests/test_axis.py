"""Are norms over axes that are not the last right, the same in every layout, and refused where they can't be?"""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import magnitudes
import nbnorm
import nbnorm.cpu.kernels.channels_first.blocks  # which takes of sizes what tests here change, for a kernel on disk
import oracle
from levels import deep, deep_and_compiled
from nbnorm.cpu import sizes
from nbnorm.cpu.workers.parallel import NUMBAS, ONE, OURS
from test_layouts import LAYOUTS
from tolerances import assert_grads, assert_statistics, assert_y

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = [np.float32, *deep(np.float64, np.float16, BFLOAT16)]
MODES = ["layer", *deep("squares"), "rms"]
# images with a rest of columns, one axis of two, adjacent ones, fewer rows than lanes, and more than a block
SHAPES = [((2, 13, 5, 7), 1), ((19, 37), 0), ((2, 3, 4, 5, 3), (1, 2)), ((3, 9, 2), -2)]
SHAPES += deep(((2, 130, 33), 1), ((1, 3, 700), 1), ((4, 1, 20), 1))


class Case:
    """Operands of a shape, their rows in the last dimensions for the oracle, and calls over the axes."""

    def __init__(self, rng, shape, axis, dtype, mode="layer", parameters=(True, True)):
        axes = axis if isinstance(axis, tuple) else (axis,)
        first, self.ndim = axes[0] % len(shape), len(axes)
        self.normalized_shape, self.axis = shape[first : first + self.ndim], axis
        self.places = tuple(range(first, first + self.ndim)), tuple(range(-self.ndim, 0))
        self.is_rms, self.squares, self.dtype = mode == "rms", mode == "squares", dtype
        with np.errstate(under="ignore"):
            self.x, self.residual, self.dy, self.dtotal = (rng.standard_normal((4, *shape)) * 3 + 1).astype(dtype)
            weight, bias = rng.standard_normal((2, *self.normalized_shape)).astype(np.float32)
        self.weight, self.bias = weight if parameters[0] else None, bias if parameters[1] and not self.is_rms else None

    def rows(self, array):
        """With the axes last, as the oracle has them."""
        return np.moveaxis(array, *self.places)

    def forward(self, x, **options):
        if self.is_rms:
            return nbnorm.rms_norm(x, self.normalized_shape, self.weight, 1e-5, axis=self.axis, **options)
        given = self.normalized_shape, self.weight, self.bias, 1e-5, self.squares
        return nbnorm.layer_norm(x, *given, axis=self.axis, **options)

    def backward(self, dy, x, **options):
        if self.is_rms:
            return nbnorm.rms_norm_backward(dy, x, self.normalized_shape, self.weight, 1e-5, axis=self.axis, **options)
        given = self.normalized_shape, self.weight, 1e-5, self.squares
        return nbnorm.layer_norm_backward(dy, x, *given, axis=self.axis, **options)

    def assert_right(self, y, statistics, grads):
        """All of a forward with its statistics, and a backward, against the oracle."""
        x, options = self.rows(self.x), {"use_diff_of_squares": self.squares, "is_rms": self.is_rms}
        assert_y(self.rows(y), x, self.ndim, self.weight, self.bias, **options)
        mean, rstd = (None, *statistics)[-2:]
        moved = [None if array is None else self.rows(array) for array in (mean, rstd)]
        assert_statistics(*moved, x, self.ndim, statistics_eps=8 if np.dtype(self.dtype).itemsize == 2 else 2, **options)
        grads = grads._replace(dx=self.rows(grads.dx))
        assert_grads(grads, self.rows(self.dy), x, self.ndim, self.weight, **options)


def bits(arrays):
    return [None if array is None else np.ascontiguousarray(array).view(f"u{array.itemsize}").tolist() for array in arrays]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape_and_axis", SHAPES, ids=str)
def test_oracle(rng, shape_and_axis, dtype, mode):
    case = Case(rng, *shape_and_axis, dtype, mode)
    y, *statistics = case.forward(case.x, return_stats=True)
    assert y.dtype == case.x.dtype
    assert y.flags.c_contiguous
    case.assert_right(y, statistics, case.backward(case.dy, case.x))


@pytest.mark.parametrize("parameters", deep((False, False), (True, False), (False, True)), ids=str)
def test_without_parameters(rng, parameters):
    case = Case(rng, (2, 13, 5, 7), 1, np.float32, "layer", parameters)
    y, *statistics = case.forward(case.x, return_stats=True)
    case.assert_right(y, statistics, case.backward(case.dy, case.x))


@pytest.mark.parametrize("shape_and_axis", deep_and_compiled(((2, 4100, 19), 1), ((2, 30, 150, 17), (1, 2))), ids=str)
@pytest.mark.parametrize("mode", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_rows_of_which_a_buffer_holds_a_part(rng, shape_and_axis, dtype, mode):
    case = Case(rng, *shape_and_axis, dtype, mode)
    buffer = sizes.buffer_elements(np.dtype(np.float64 if dtype == np.float64 else np.float32), 1)
    assert np.prod(case.normalized_shape) * 16 > buffer
    y, *statistics = case.forward(case.x, return_stats=True)
    grads = case.backward(case.dy, case.x)
    case.assert_right(y, statistics, grads)
    # as many as one buffer holds
    few = tuple(slice(None) if i in case.places[0] else slice(0, 1) for i in range(case.x.ndim))
    assert bits([case.forward(case.x[few].copy())]) == bits([y[few]])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("squares", [False, *deep(True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [1e-5, *deep(0.0, 1e-45, 1e38)])
def test_rows_of_every_size(rng, dtype, eps, squares):
    """Rows that need another arithmetic beside rows that do not."""
    x = magnitudes.rows(rng, dtype, 9, eps)
    order = rng.permutation(np.repeat(np.arange(len(x)), 2))
    x = x[order]
    weight, bias = np.ones(9, np.float32), np.zeros(9, np.float32)
    y, mean, rstd = nbnorm.layer_norm(x.T.copy(), 9, weight, bias, eps, squares, axis=0, return_stats=True)
    statistics_eps = 8 if np.dtype(dtype).itemsize == 2 else 2
    magnitudes.assert_forward(y.T, mean.T, rstd.T, x, eps, squares, 4, statistics_eps, "float64")
    dy = rng.standard_normal(x.shape).astype(dtype)
    grads = nbnorm.layer_norm_backward(dy.T.copy(), x.T.copy(), 9, weight, eps, squares, axis=0)
    magnitudes.assert_backward(grads._replace(dx=grads.dx.T), dy, x, weight, eps, squares, 8, "float64")


@pytest.mark.parametrize("mode", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_changes_another(rng, dtype, mode):
    case = Case(rng, (23, 37), 0, dtype, mode)
    with np.errstate(all="ignore"):
        for j, value in enumerate((np.nan, np.inf, 0.0, 1e30, 1e-30, 1e4)):
            case.x[:, 5 * j] = (case.x[:, 5 * j].astype(np.float64) * value if value else case.x[:, 5 * j] * 0).astype(dtype)
        case.x[3, 33] = dtype(np.inf)
        case.x[:, 36] = dtype(1e4)
    y, *statistics = case.forward(case.x, return_stats=True)
    dx, *_ = case.backward(case.dy, case.x)
    for j in range(37):
        alone, dy = case.x[:, j : j + 1].copy(), case.dy[:, j : j + 1].copy()
        expected, *expected_statistics = case.forward(alone, return_stats=True)
        assert bits([expected, *expected_statistics]) == bits([a[:, j : j + 1] for a in (y, *statistics)])
        assert bits([case.backward(dy, alone)[0]]) == bits([dx[:, j : j + 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, layout, dtype, monkeypatch):
    case = Case(rng, (2, 5, 3, 12), 1, dtype)
    change = LAYOUTS[layout]
    y, total, *statistics = nbnorm.add_layer_norm(
        case.x, case.residual, 5, case.weight, case.bias, axis=1, return_stats=True
    )
    grads = nbnorm.add_layer_norm_backward(case.dy, case.dtotal, total, 5, case.weight, axis=1)
    # in pieces of a few rows, which are never written past the caches
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", 0)
    for elements in (1 << 17, 1):
        monkeypatch.setattr("nbnorm.cpu.channels_first.BUFFER_ELEMENTS", elements)
        actual = nbnorm.add_layer_norm(
            change(case.x), change(case.residual), 5, change(case.weight), change(case.bias), axis=1, return_stats=True
        )
        assert bits(actual) == bits([y, total, *statistics])
        actual = nbnorm.add_layer_norm_backward(
            change(case.dy), change(case.dtotal), change(total), 5, change(case.weight), axis=1
        )
        assert bits(actual) == bits(grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(rng, dtype):
    case = Case(rng, (2, 5, 3, 11), 1, dtype)
    x, dy = case.x, case.dy
    expected, grads = case.forward(x), case.backward(dy, x)
    # in place; strided; overlapping another way than element for element
    out = x.copy()
    assert case.forward(out, out=out) is out
    strided = np.zeros((2, 5, 3, 22), dtype)[..., ::2]
    assert case.forward(x, out=strided) is strided
    room = np.concatenate([x.ravel(), x.ravel()[:40]])
    shifted, given_x = room[40:].reshape(x.shape), room[: x.size].reshape(x.shape)
    given_x[...] = x
    case.forward(given_x, out=shifted)
    assert bits([out]) == bits([strided]) == bits([shifted]) == bits([expected])
    dx, dweight, dbias = dy.copy(), np.zeros(5, np.float32), np.zeros(10, np.float32)[::2]
    actual = case.backward(dx, x, out=(dx, dweight, dbias))
    assert actual.dx is dx
    assert bits(actual) == bits(grads)


@pytest.mark.parametrize("norm", ["layer", *deep("rms")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(rng, norm, dtype):
    case = Case(rng, (2, 7, 21), 1, dtype, norm)
    parameters = (case.weight,) if case.is_rms else (case.weight, case.bias)
    add = nbnorm.add_rms_norm if case.is_rms else nbnorm.add_layer_norm
    add_backward = nbnorm.add_rms_norm_backward if case.is_rms else nbnorm.add_layer_norm_backward
    # beside rows that need another arithmetic
    with np.errstate(over="ignore"):
        case.x[0, :, 3] *= dtype(1e30)
    total = case.x + case.residual
    y, *statistics = (nbnorm.rms_norm if case.is_rms else nbnorm.layer_norm)(
        total, 7, *parameters, axis=1, return_stats=True
    )
    result = add(case.x, case.residual, 7, *parameters, axis=1, return_stats=True)
    assert bits(result) == bits([y, total, *statistics])
    assert add(case.x, case.residual, 7, *parameters, axis=1, total_out=False).total is None
    x, residual = case.x.copy(), case.residual.copy()
    assert bits(add(x, residual, 7, *parameters, axis=1, out=x, total_out=residual)) == bits([y, total])
    grads = add_backward(case.dy, None, total, 7, case.weight, axis=1)
    with np.errstate(invalid="ignore"):
        expected = (add_backward(case.dy, 0 * case.dtotal, total, 7, case.weight, axis=1).dx, *grads[1:])
    assert bits(grads[1:]) == bits(expected[1:])
    np.testing.assert_array_equal(grads.dx, expected[0])


@pytest.mark.parametrize("mode", ["layer", *deep("rms")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_statistics(rng, dtype, mode):
    case = Case(rng, (2, 5, 3, 11), 1, dtype, mode)
    _, *statistics = case.forward(case.x, return_stats=True)
    given = dict(zip(("rstd",) if case.is_rms else ("mean", "rstd"), statistics, strict=True))
    assert all(array.shape == (2, 1, 3, 11) for array in statistics)
    grads = case.backward(case.dy, case.x, **given)
    moved = {name: case.rows(array) for name, array in given.items()}
    assert_grads(
        grads._replace(dx=case.rows(grads.dx)), case.rows(case.dy), case.rows(case.x), 1, case.weight, is_rms=case.is_rms,
        **moved,
    )  # fmt: skip


@pytest.mark.parametrize("is_given", [False, *deep(True)])
@pytest.mark.parametrize(
    "mask", [(True, False, False), *deep((False, True, False), (False, False, True), (False, True, True))]
)
def test_masks(rng, mask, is_given):
    case = Case(rng, (2, 5, 3, 11), 1, np.float32)
    _, mean, rstd = case.forward(case.x, return_stats=True)
    given = {"mean": mean, "rstd": rstd} if is_given else {}
    whole = case.backward(case.dy, case.x, **given)
    some = case.backward(case.dy, case.x, output_mask=mask, **given)
    assert bits(some) == bits([grad if wanted else None for grad, wanted in zip(whole, mask, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers", [ONE, OURS, *deep(NUMBAS)])
def test_workers(rng, choose_workers, workers, dtype, monkeypatch):
    """More blocks than are summed in one go, streamed or not, from every place in a line."""
    case = Case(rng, (3, 5, 40, 16), 1, dtype)
    monkeypatch.setattr("nbnorm.cpu.sizes.MOST_ABREAST", 32)
    monkeypatch.setattr("nbnorm.cpu.sizes.MAX_BLOCKS", 7)
    expected, grads = case.forward(case.x), case.backward(case.dy, case.x)
    choose_workers(workers)
    assert bits([case.forward(case.x)]) == bits([expected])
    assert bits(case.backward(case.dy, case.x)) == bits(grads)
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", 0)
    memory = np.zeros(case.x.size + 64, dtype)
    for start in range(0, 64 // memory.itemsize, 16 // memory.itemsize):
        out = memory[start : start + case.x.size].reshape(case.x.shape)
        assert bits([case.forward(case.x, out=out)]) == bits([expected])
        assert bits(case.backward(case.dy, case.x, out=(out, None, None))) == bits(grads)


def test_sums_of_blocks_that_begin_in_an_earlier_piece(rng, choose_workers, monkeypatch):
    """They are one thread's too, in whatever order the threads work."""
    case = Case(rng, (3, 5, 160), 1, np.float32)
    for name, number in (("MOST_ABREAST", 16), ("MAX_BLOCKS", 8)):
        monkeypatch.setattr(f"nbnorm.cpu.sizes.{name}", number)
    monkeypatch.setattr("nbnorm.cpu.channels_first.BUFFER_ELEMENTS", 5 * 16 * 9)
    monkeypatch.setattr("nbnorm.cpu.workers.threads.PIECES", 1)
    expected = case.backward(case.dy, case.x)
    choose_workers(OURS)
    monkeypatch.setattr("nbnorm.cpu.workers.threads.share", lambda kernel, pieces, _: [kernel(*p) for p in pieces[::-1]])
    assert bits(case.backward(case.dy, np.repeat(case.x, 2, -1)[..., ::2])) == bits(expected)


def test_the_last_axis(rng):
    """It is the same call as one without an axis."""
    x, dy = rng.standard_normal((2, 3, 4, 5))
    weight = rng.standard_normal((4, 5))
    for axis, shape, scale in ((-1, 5, weight[0]), (2, 5, weight[0]), ((1, 2), (4, 5), weight), ([-2, -1], (4, 5), weight)):
        for _ in range(2):
            expected = nbnorm.layer_norm(x, shape, scale, return_stats=True)
            assert bits(nbnorm.layer_norm(x, shape, scale, axis=axis, return_stats=True)) == bits(expected)
            expected = nbnorm.layer_norm_backward(dy, x, shape, scale)
            assert bits(nbnorm.layer_norm_backward(dy, x, shape, scale, axis=axis)) == bits(expected)


def test_no_plan_is_taken_for_another_axis(rng):
    x, weight, bias = rng.standard_normal((4, 4, 4)).astype(np.float32), np.ones(4, np.float32), np.zeros(4, np.float32)
    for axis in (None, 1, None, 0, 1, 2, -3):
        last = -1 if axis is None else axis
        rows = np.moveaxis(x, last, -1)
        for _ in range(3):
            y = nbnorm.layer_norm(x, 4, weight, bias, axis=axis)
            assert_y(np.moveaxis(y, last, -1), rows, 1)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3), (0, 0, 0)])
def test_nothing_to_do(shape):
    x = np.zeros(shape, np.float32)
    y, mean, rstd = nbnorm.layer_norm(x, shape[1], axis=1, return_stats=True)
    assert y.shape == shape
    assert mean.shape == rstd.shape == (shape[0], 1, shape[2])
    assert np.isnan(mean).all()
    grads = nbnorm.layer_norm_backward(x, x, shape[1], axis=1)
    assert bits(grads) == bits([x, np.zeros(shape[1], np.float32), np.zeros(shape[1], np.float32)])


def test_layers(rng):
    x, dy = rng.standard_normal((2, 3, 6, 4, 4)).astype(np.float32)
    layer = nbnorm.LayerNorm(6, axis=1)
    assert repr(layer) == "LayerNorm((6,), eps=1e-05, elementwise_affine=True, bias=True, axis=1)"
    assert bits([layer(x)]) == bits([nbnorm.layer_norm(x, 6, layer.weight, layer.bias, axis=1)])
    assert bits(layer.backward(dy, x)) == bits(nbnorm.layer_norm_backward(dy, x, 6, layer.weight, axis=1))
    rms = nbnorm.RMSNorm((4, 6), axis=(-3, -2))
    assert repr(rms) == "RMSNorm((4, 6), eps=None, elementwise_affine=True, axis=(-3, -2))"
    x = x.swapaxes(1, 2)
    assert bits([rms(x)]) == bits([nbnorm.rms_norm(x, (4, 6), rms.weight, axis=(1, 2))])
    assert rms.backward(x, x).dweight.shape == (4, 6)


@pytest.mark.parametrize(
    ("axis", "error", "message"),
    [
        (3, ValueError, r"axis: 3; expected axes from -3 to 2, which x has"),
        (-4, ValueError, r"axis: -4; expected axes from -3 to 2"),
        ((0, 1), ValueError, r"axis: \(0, 1\); expected 1 of them, one for each dimension of normalized_shape, \(5,\)"),
        (0, ValueError, r"x: shape \(2, 5, 3\), \(2,\) along axis 0; expected \(5,\) there"),
        ((), ValueError, r"axis: \(\); expected at least one axis"),
        (1.0, TypeError, r"axis: 1.0; expected an int, or a sequence of ints"),
        ("1", TypeError, r"axis: '1'; expected an int"),
        (True, TypeError, r"axis: True; expected an int"),
        ([1.5], TypeError, r"axis: \[1.5\]; expected an int"),
    ],
)
def test_wrong_axes(axis, error, message):
    x = np.zeros((2, 5, 3), np.float32)
    with pytest.raises(error, match=message):
        nbnorm.layer_norm(x, 5, axis=axis)
    with pytest.raises(error, match=message):
        nbnorm.rms_norm_backward(x, x, 5, axis=axis)


def test_a_number_has_no_axes():
    with pytest.raises(ValueError, match=r"^x: shape \(\); expected one with axis 0"):
        nbnorm.layer_norm(np.float32(3), 1, axis=0)


def test_axes_that_are_not_adjacent():
    x = np.zeros((2, 5, 3), np.float32)
    for axis, shape in (((0, 2), (2, 3)), ((2, 1), (3, 5)), ((1, 1), (5, 5))):
        with pytest.raises(ValueError, match="expected adjacent axes, in their order: numpy.moveaxis"):
            nbnorm.layer_norm(x, shape, axis=axis)
        with pytest.raises(ValueError, match="expected adjacent axes"):
            nbnorm.LayerNorm(shape, axis=axis)
    with pytest.raises(ValueError, match="axes that all count from the front, or all from the back"):
        nbnorm.LayerNorm((3, 2), axis=(-1, 0))


def test_wrong_operands():
    x = np.zeros((2, 5, 3), np.float32)
    with pytest.raises(ValueError, match=r"weight: shape \(3,\); expected \(5,\), normalized_shape"):
        nbnorm.layer_norm(x, 5, np.ones(3), axis=1)
    with pytest.raises(ValueError, match=r"mean: shape \(2, 5, 1\); expected \(2, 1, 3\)"):
        nbnorm.layer_norm_backward(x, x, 5, mean=np.ones((2, 5, 1)), rstd=np.ones((2, 5, 1)), axis=1)
    with pytest.raises(ValueError, match=r"out: shape \(2, 3, 5\); expected \(2, 5, 3\)"):
        nbnorm.layer_norm(x, 5, axis=1, out=np.zeros((2, 3, 5), np.float32))


@pytest.mark.compiled
def test_compiled_ahead(rng, monkeypatch):
    nbnorm.compile("float32", 5, "float32", "float32", axis=1, rows=4)
    monkeypatch.setattr("nbnorm.cpu.choice._made", None)
    x, weight = rng.standard_normal((2, 5, 3)).astype(np.float32), np.ones(5, np.float32)
    nbnorm.layer_norm(x, 5, weight, weight, axis=1)
    nbnorm.layer_norm_backward(x, x, 5, weight, axis=1)


@given(data=st.data())
def test_any_axes_of_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    first = data.draw(st.integers(0, len(shape) - 1))
    last = data.draw(st.integers(first, len(shape) - 1))
    axis = tuple(range(first, last + 1)) if last > first else first
    case = Case(np.random.default_rng(data.draw(st.integers(0, 99))), shape, axis, np.float32)
    y, *statistics = case.forward(case.x, return_stats=True)
    case.assert_right(y, statistics, case.backward(case.dy, case.x))


def test_an_outlier_that_comes_first(rng):
    x = rng.standard_normal((100, 20))
    x[0] = 1000
    _, _, rstd = nbnorm.layer_norm(x, 100, axis=0, eps=0.0, use_diff_of_squares=True, return_stats=True)
    exact = oracle.forward(x.T, 1, eps=0.0)[2].T
    # off by 86 eps where sums are about the first element
    np.testing.assert_allclose(rstd / exact, 1, rtol=0, atol=4 * 2.0**-52)
