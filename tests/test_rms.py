"""Is RMS norm right, forward and backward, as layer norm's tests ask: every dtype and kernel, hard rows, the same bits?"""

import inspect
import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep, deep_and_compiled
from magnitudes import EPSILONS, SCALES
from nbnorm.cpu.workers.parallel import WORKERS
from tolerances import LARGEST, SMALLEST, assert_grads, assert_statistics, assert_y

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = [np.float32, *deep(np.float64, np.float16, BFLOAT16)]
# one element; fewer than a vector; two normalized dimensions; more rows than a block of the backward; whole rows
SHAPES = [((1, 1), 1), ((3, 5), 5), ((2, 3, 4, 5), (4, 5)), ((70, 9), 9), ((3, 2, 16), (16,)), ((5, 300), 300)]
COLS = 37


def operands(rng, shape, row, dtype):
    with np.errstate(under="ignore"):
        x, dy = (3 * rng.standard_normal((2, *shape)) + 1).astype(dtype)
        return x, dy, rng.standard_normal(row).astype(dtype)


def assert_right(x, dy, weight, row, eps):
    """Forward and backward, with rstd given and without."""
    default = 2.0**-52 if x.dtype == np.float64 else 2.0**-23
    ndim, exact_eps = len(row), default if eps is None else eps
    y, rstd = nbnorm.rms_norm(x, row, weight, eps, return_stats=True)
    assert (y.dtype, rstd.dtype) == (x.dtype, np.float64 if x.dtype == np.float64 else np.float32)
    assert rstd.shape == x.shape[: x.ndim - ndim] + (1,) * ndim
    assert_y(y, x, ndim, weight, None, exact_eps, is_rms=True)
    assert_statistics(None, rstd, x, ndim, exact_eps, is_rms=True)
    grads = nbnorm.rms_norm_backward(dy, x, row, weight, eps)
    assert grads.dweight.dtype == (x if weight is None else weight).dtype
    assert_grads(grads, dy, x, ndim, weight, exact_eps, is_rms=True)
    if np.isfinite(rstd).all():
        grads = nbnorm.rms_norm_backward(dy, x, row, weight, eps, rstd=rstd)
        assert_grads(grads, dy, x, ndim, weight, exact_eps, rstd=rstd, is_rms=True)


def test_signatures():
    def signature(function):
        parameters = inspect.signature(function).parameters.values()
        return str(inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters]))

    assert signature(nbnorm.rms_norm) == (
        "(x, normalized_shape, weight=None, eps=None, *, out=None, return_stats=False, stream=None, axis=None)"
    )
    assert signature(nbnorm.rms_norm_backward) == (
        "(dy, x, normalized_shape, weight=None, eps=None, "
        "*, rstd=None, output_mask=(True, True), out=None, stream=None, axis=None)"
    )
    assert signature(nbnorm.RMSNorm) == (
        "(normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, axis=None)"
    )


@pytest.mark.parametrize(("shape", "normalized_shape"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_product(rng, dtype, shape, normalized_shape):
    # by one thread; that the parallel build gives the same bits is tested below
    row = shape[-np.size(normalized_shape) :]
    x, dy, _ = operands(rng, shape, row, dtype)
    for weight_dtype, eps in itertools.product([None, dtype, np.float32], [None, 1e-3]):
        weight = None if weight_dtype is None else rng.standard_normal(row).astype(weight_dtype)
        assert_right(x, dy, weight, row, eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_output_mask(rng, dtype, mask):
    x, dy, weight = operands(rng, (40, COLS), (COLS,), dtype)
    grads = nbnorm.rms_norm_backward(dy, x, COLS, weight, 1e-3, output_mask=mask)
    assert tuple(grad is not None for grad in grads) == mask
    assert_grads(grads, dy, x, 1, weight, 1e-3, is_rms=True)


@pytest.mark.parametrize("cols", [COLS, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *deep(np.float16, BFLOAT16)])
@pytest.mark.parametrize("eps", EPSILONS)
def test_every_eps(rng, dtype, cols, eps):
    name = np.dtype(dtype).name
    scales = np.array([scale for scale in SCALES if SMALLEST[name] * 8 < scale <= LARGEST[name]])
    with np.errstate(under="ignore"):
        x = (rng.uniform(-1, 1, (scales.size, cols)) * scales[:, None]).astype(dtype)
    assert_y(nbnorm.rms_norm(x, cols, None, eps), x, 1, None, None, eps, is_rms=True)
    dy = rng.standard_normal(x.shape).astype(dtype)
    assert_grads(nbnorm.rms_norm_backward(dy, x, cols, None, eps), dy, x, 1, None, eps, is_rms=True)


@pytest.mark.parametrize("cols", [COLS, 300, *deep_and_compiled(70_001)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hard_rows(rng, dtype, cols):
    x, dy, weight = operands(rng, (9, cols), (cols,), dtype)
    x[0] += 1e6
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0
    x[4] = 7
    x[5] = 0
    x[5, -1] = 1e-20
    x[6, 1:] *= 1e-4
    assert_right(x, dy, weight, (cols,), None)
    assert_right(x[[0, 1, 2, 4, 6, 7, 8]], dy[:7], weight, (cols,), 0.0)


def test_sums_are_exact_where_terms_are_alike():
    # each addition of a float32 sum of squares would be rounded the same way
    x = np.full((2, 4096), 3.3, np.float32)
    x[1, 0] = 300
    assert_right(x, np.ones_like(x), np.ones(4096, np.float32), (4096,), 0.0)


def test_float64_sums_do_not_grow_with_the_row(rng):
    x = rng.uniform(1, 2, (2, 60_000))
    assert_y(nbnorm.rms_norm(x, 60_000, None, 0.0), x, 1, eps=0.0, is_rms=True)


@pytest.mark.parametrize("cols", [COLS, 300, *deep_and_compiled(70_001)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_stays_in_its_row(rng, cols, bad):
    x, dy, weight = operands(rng, (6, cols), (cols,), np.float32)
    expected, dx = nbnorm.rms_norm(x, cols, weight), nbnorm.rms_norm_backward(dy, x, cols, weight).dx
    x[2, 3] = bad
    with np.errstate(invalid="ignore"):
        y, rstd = nbnorm.rms_norm(x, cols, weight, return_stats=True)
        bad_dx = nbnorm.rms_norm_backward(dy, x, cols, weight).dx
    others = np.arange(6) != 2
    np.testing.assert_array_equal(y[others], expected[others])
    np.testing.assert_array_equal(bad_dx[others], dx[others])
    # 1 / Inf, or NaN
    assert np.isnan(rstd[2]) if np.isnan(bad) else rstd[2] == 0
    assert np.isnan(bad_dx[2]).all()
    assert np.isnan(y[2]).all() if np.isnan(bad) else np.isnan(y[2]).sum() == 1
    assert_y(y, x, 1, weight, eps=2.0**-23, is_rms=True)


@pytest.mark.parametrize(
    ("x", "eps"),
    [*((np.zeros((1, 4), dtype), 2.0**-23) for dtype in (np.float32, np.float16, BFLOAT16)),
     *((np.zeros((1, 4), dtype), 2.0**-52) for dtype in (np.float64, np.int32)), ([[0.0] * 4], 2.0**-52)],
)  # fmt: skip
def test_eps_by_default(x, eps):
    for _ in range(2):
        _, rstd = nbnorm.rms_norm(x, 4, return_stats=True)
        np.testing.assert_array_equal(rstd, np.full((1, 1), eps**-0.5, rstd.dtype), strict=True)


@pytest.mark.parametrize("cols", [COLS, 300])
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64, np.float16)])
def test_the_same_bits_whoever_works_and_in_every_batch(rng, choose_workers, dtype, cols):
    x, dy, weight = operands(rng, (203, cols), (cols,), dtype)

    def results(x, dy):
        return *nbnorm.rms_norm(x, cols, weight, return_stats=True), *nbnorm.rms_norm_backward(dy, x, cols, weight)

    expected = results(x, dy)
    for workers in WORKERS:
        choose_workers(workers)
        for a, b in zip(results(x, dy), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    for i in (0, 5, 202):
        for a, b in zip(results(x[i : i + 1], dy[i : i + 1])[:3], expected, strict=False):
            np.testing.assert_array_equal(a[0], b[i])


@pytest.mark.compiled
@pytest.mark.parametrize("normalized_shape", [COLS, (COLS,)])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_a_second_call_goes_the_short_way(rng, monkeypatch, dtype, normalized_shape):
    x, dy, weight = operands(rng, (6, COLS), (COLS,), dtype)
    ln = nbnorm.RMSNorm(normalized_shape, dtype=dtype)

    def step():
        y, rstd = nbnorm.rms_norm(x, normalized_shape, weight, return_stats=True)
        out = np.empty_like(x)
        assert nbnorm.rms_norm(x, normalized_shape, weight, 1e-5, out=out) is out
        grads = nbnorm.rms_norm_backward(dy, x, normalized_shape, weight, rstd=rstd)
        return y, rstd, out, ln(x), *grads, *nbnorm.rms_norm_backward(dy, x, normalized_shape, weight, 1e-5)

    expected = step()
    monkeypatch.setattr("nbnorm.calls.checks.forward", None)
    monkeypatch.setattr("nbnorm.calls.checks.backward", None)
    for a, b in zip(step(), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.compiled
def test_layer_norm_of_the_same_arrays_is_another_call(rng):
    x, dy, weight = operands(rng, (6, COLS), (COLS,), np.float32)
    for _ in range(2):
        assert_y(nbnorm.layer_norm(x, COLS, weight, eps=1e-3), x, 1, weight, eps=1e-3)
        assert_y(nbnorm.rms_norm(x, COLS, weight, 1e-3), x, 1, weight, eps=1e-3, is_rms=True)
        assert_grads(nbnorm.layer_norm_backward(dy, x, COLS, weight, 1e-3), dy, x, 1, weight, 1e-3)
        assert_grads(nbnorm.rms_norm_backward(dy, x, COLS, weight, 1e-3), dy, x, 1, weight, 1e-3, is_rms=True)


@pytest.mark.parametrize("layout", ["F", "strided", "reversed", "in place", "shifted"])
def test_layouts(rng, layout):
    x, dy, weight = operands(rng, (50, COLS), (COLS,), np.float32)
    expected = nbnorm.rms_norm(x, COLS, weight), *nbnorm.rms_norm_backward(dy, x, COLS, weight)
    if layout == "in place":
        y = x.copy()
        assert nbnorm.rms_norm(y, COLS, weight, out=y) is y
        dx = dy.copy()
        actual = y, *nbnorm.rms_norm_backward(dx, x, COLS, weight, out=(dx, None))
        assert actual[1] is dx
    elif layout == "shifted":
        memory = np.concatenate([x, np.zeros_like(x[:1])])
        y = nbnorm.rms_norm(memory[:-1], COLS, weight, out=memory[1:])
        actual = y, *nbnorm.rms_norm_backward(dy, x, COLS, weight)
    else:
        of = {
            "F": np.asfortranarray,
            "strided": lambda a: np.repeat(a, 2, 1)[:, ::2],
            "reversed": lambda a: a[::-1].copy()[::-1],
        }
        x, dy = map(of[layout], (x, dy))
        actual = nbnorm.rms_norm(x, COLS, weight), *nbnorm.rms_norm_backward(dy, x, COLS, weight)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_layer(rng):
    rms = nbnorm.RMSNorm([3, 4], 1e-6)
    assert (rms.normalized_shape, rms.eps, rms.elementwise_affine, rms.device) == ((3, 4), 1e-6, True, "cpu")
    np.testing.assert_array_equal(rms.weight, np.ones((3, 4), np.float32), strict=True)
    rms.load_state_dict({"norm.weight": rng.standard_normal((3, 4))}, prefix="norm.")
    x, dy = rng.standard_normal((2, 5, 3, 4), dtype=np.float32)
    np.testing.assert_array_equal(rms(x), nbnorm.rms_norm(x, (3, 4), rms.weight, 1e-6))
    for a, b in zip(rms.backward(dy, x), nbnorm.rms_norm_backward(dy, x, (3, 4), rms.weight, 1e-6), strict=True):
        np.testing.assert_array_equal(a, b)
    plain = nbnorm.RMSNorm(4, elementwise_affine=False, dtype="float64")
    assert plain.weight is None
    assert plain.state_dict() == {}
    assert plain.backward(dy, x).dweight is None
    assert repr(plain) == "RMSNorm((4,), eps=None, elementwise_affine=False)"
    assert list(rms.state_dict()) == ["weight"]
    with pytest.raises(ValueError, match="bias"):
        rms.load_state_dict({"weight": rms.weight, "bias": rms.weight})


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "eps: -1.0; expected a finite number", lambda x: nbnorm.rms_norm(x, 4, eps=-1.0)),
        (TypeError, "eps: ", lambda x: nbnorm.rms_norm(x, 4, eps="1")),
        (ValueError, "weight: shape", lambda x: nbnorm.rms_norm(x, 4, np.ones(3))),
        (ValueError, "output_mask: .*; expected two bools, for dx and dweight",
         lambda x: nbnorm.rms_norm_backward(x, x, 4, output_mask=(True,) * 3)),
        (TypeError, "output_mask: True; expected two bools", lambda x: nbnorm.rms_norm_backward(x, x, 4, output_mask=True)),
        (ValueError, "out: 3 entries; expected two, arrays or None for dx and dweight",
         lambda x: nbnorm.rms_norm_backward(x, x, 4, out=(None,) * 3)),
        (ValueError, r"out\[1\]: shares memory with out\[0\]", lambda x: nbnorm.rms_norm_backward(x, x, 4, out=(x, x[0]))),
        (ValueError, "rstd: shape", lambda x: nbnorm.rms_norm_backward(x, x, 4, rstd=np.ones(2))),
        (ValueError, "dy: shape", lambda x: nbnorm.rms_norm_backward(x[:1], x, 4)),
        (ValueError, "stream: 1; expected None", lambda x: nbnorm.rms_norm(x, 4, stream=1)),
    ],
)  # fmt: skip
def test_messages(error, message, call):
    with pytest.raises(error, match=message):
        call(np.ones((2, 4), np.float32))


# what the documentation of torch.nn.RMSNorm, TensorRT-LLM's functional.rms_norm and ONNX's RMSNormalization computes
def test_what_others_compute(rng):
    x = rng.standard_normal((2, 2, 3), dtype=np.float32)
    weight = rng.standard_normal((2, 3), dtype=np.float32)
    # torch: rms_norm = nn.RMSNorm([2, 3]); rms_norm(input)
    expected = x / np.sqrt(np.mean(x**2, axis=(1, 2), keepdims=True) + np.finfo(np.float32).eps)
    np.testing.assert_allclose(nbnorm.RMSNorm([2, 3])(x), expected, rtol=1e-6)
    # TensorRT-LLM: rms_norm(input, normalized_shape, num_groups=1, weight=None, eps=1e-06)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight[0]
    np.testing.assert_allclose(nbnorm.rms_norm(x, 3, weight[0], 1e-06), expected, rtol=1e-6)
    # ONNX: Y = X / Sqrt(ReduceMean(X * X, axes=(1, 2)) + epsilon) * scale, for axis=1, epsilon=1e-5
    expected = x / np.sqrt(np.mean(x * x, axis=(1, 2), keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(nbnorm.rms_norm(x, x.shape[1:], weight, 1e-5), expected, rtol=1e-6)
